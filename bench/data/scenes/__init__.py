"""Drawn scenes with real handwritten digits, and seven tasks about them in real schemas.

A scene is a pure function of its split and its index. The text of a question is independent of its
answer, so a text-only model scores at a known chance level.
"""

from bench.data.conversations import Conversation
from bench.data.scenes.conversations import Lesson, conversation, conversations
from bench.data.scenes.prompts import Document, render
from bench.data.scenes.render import SIZE as IMAGE_SIZE
from bench.data.scenes.scene import Split
from bench.data.scenes.sets import TASKS, chance, documents, fingerprint, images
from bench.data.scenes.tasks import ROTATION

__all__ = [
    "IMAGE_SIZE",
    "ROTATION",
    "TASKS",
    "Conversation",
    "Document",
    "Lesson",
    "Split",
    "chance",
    "conversation",
    "conversations",
    "documents",
    "fingerprint",
    "images",
    "render",
]
