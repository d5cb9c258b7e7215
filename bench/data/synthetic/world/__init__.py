"""A synthetic closed world: its facts, nine tasks about them in real schemas, and its prose.

Everything is a pure function of a seed. Test questions are about people, substances, objects,
routines, number pairs and passages that occur in no training question.
"""

from bench.data.synthetic.world.entities import RenderedQuestion, WorldDocument, render_question
from bench.data.synthetic.world.question_sets import (
    SEED,
    TASKS,
    corpus,
    documents,
    documents_by_split,
    draw_questions,
    fingerprint,
    prose_texts,
    question_texts,
)

__all__ = [
    "SEED",
    "TASKS",
    "RenderedQuestion",
    "WorldDocument",
    "corpus",
    "documents",
    "documents_by_split",
    "draw_questions",
    "fingerprint",
    "prose_texts",
    "question_texts",
    "render_question",
]
