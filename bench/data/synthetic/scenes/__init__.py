"""Drawn scenes with real handwritten digits, and seven tasks about them in real schemas.

A scene is a pure function of its split and its index. The text of a question is independent of its
answer, so a text-only model scores at a known chance level.
"""

from bench.data.chat import Conversation
from bench.data.synthetic.scenes.question_sets import (
    TASKS,
    chance_accuracy,
    documents,
    fingerprint,
    rows_fingerprint,
    scene_images,
)
from bench.data.synthetic.scenes.scene import IMAGE_SIZE
from bench.data.synthetic.scenes.tasks import ROTATION_OFFSET, SceneDocument, render_task_prompt
from bench.data.synthetic.scenes.training_conversations import (
    ConversationSpec,
    draw_conversation,
    draw_conversations,
)

__all__ = [
    "IMAGE_SIZE",
    "ROTATION_OFFSET",
    "TASKS",
    "Conversation",
    "ConversationSpec",
    "SceneDocument",
    "chance_accuracy",
    "documents",
    "draw_conversation",
    "draw_conversations",
    "fingerprint",
    "render_task_prompt",
    "rows_fingerprint",
    "scene_images",
]
