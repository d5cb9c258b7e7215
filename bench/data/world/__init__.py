"""A synthetic closed world: its facts, nine tasks about them in real schemas, and its prose.

Everything is a pure function of a seed. Test questions are about people, substances, objects,
routines, number pairs and passages that occur in no training question.
"""

from bench.data.world.corpus import corpus, prose_texts, question_texts
from bench.data.world.question import Document
from bench.data.world.render import Prompt, render
from bench.data.world.sets import SEED, TASKS, documents, fingerprint, questions, splits

__all__ = [
    "SEED",
    "TASKS",
    "Document",
    "Prompt",
    "corpus",
    "documents",
    "fingerprint",
    "prose_texts",
    "question_texts",
    "questions",
    "render",
    "splits",
]
