"""Conversations about images for training: drawn scenes, or a JSON file in LLaVA's layout.

LLaVA's layout (that of `llava_v1_5_mix665k.json`, used in its second training stage) is a list of
objects with `image`, a path relative to a folder, and `conversations`, a list of turns with `from`
(human or gpt) and `value`; the first value contains `<image>`. Objects without an image are
text-only samples in LLaVA and are skipped here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from bench.data.chat import Conversation
from bench.data.image_files import UnfitImage, decode_image
from bench.errors import MissingData, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_PLACEHOLDER = "<image>"


_Message = TypedDict("_Message", {"from": str, "value": str})


class _Row(TypedDict):
    """A conversation with an image in LLaVA's layout."""

    image: str
    conversations: list[_Message]


@dataclass(frozen=True)
class Conversations:
    """Conversations by index, with images opened on access.

    `fingerprint` identifies the set; that of a file hashes the JSON but not the images.
    """

    fingerprint: str
    _rows: Sequence[Conversation | _Row]
    _folder: Path = Path()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Conversation:
        row = self._rows[number]
        if isinstance(row, Conversation):  # Drawn scenes contain their image.
            return row._replace(image=row.image.convert("RGB"))
        return Conversation(_open_image(self._folder / row["image"]), _turns(row))


def embedded_conversations(count: int, seed: int) -> Conversations:
    """Return conversations about scenes that are not in any task."""
    from bench.data.synthetic.scenes import ConversationSpec, draw_conversations

    # The conversations are a pure function of split, count and seed, so pixels are not hashed.
    digest = hashlib.sha256(f"scenes train {count} {seed}".encode()).hexdigest()
    return Conversations(
        digest, draw_conversations("train", count, seed, ConversationSpec(describe=False))
    )


def conversations_from_file(path: str, folder: str) -> Conversations:
    """Return the conversations with images of a JSON file in LLaVA's layout.

    Raises:
        MissingData: the file or the image folder does not exist or cannot be read.
        UserError: the file is not in LLaVA's layout, or has no image.
    """
    file, images = Path(path).expanduser(), Path(folder).expanduser()
    if not file.is_file() or not images.is_dir():
        missing = path if not file.is_file() else folder
        raise MissingData(f"conversations: no such file or folder: {missing}")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise MissingData(f"conversations: {path} cannot be read: {error.strerror}") from None
    try:
        rows = [row for row in json.loads(content) if "image" in row]
        # All rows are checked here, because an invalid one must not end a training after hours.
        for row in rows:
            _turns(row)
            _refuse_outside(images, row["image"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"conversations: {path} is not in LLaVA's layout: {error}") from None
    if not rows:
        raise UserError(f"conversations: {path} has no conversation with an image")
    return Conversations(hashlib.sha256(content).hexdigest(), rows, images)


def _turns(row: _Row) -> list[tuple[str, str]]:
    # `<image>` is dropped, because the chat template puts the image token where the model needs it.
    messages = row["conversations"]
    pairs = list(zip(messages[0::2], messages[1::2], strict=True))
    if not pairs or any((a["from"], b["from"]) != ("human", "gpt") for a, b in pairs):
        raise ValueError("turns must alternate between human and gpt")
    return [(a["value"].replace(IMAGE_PLACEHOLDER, "").strip(), b["value"]) for a, b in pairs]


def _refuse_outside(folder: Path, name: str) -> None:
    # A downloaded JSON file is untrusted: `../` or a symlink must not reach other files.
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"image {name!r} is outside the folder of images")


def _open_image(file: Path) -> Image:
    try:
        return decode_image(file.read_bytes())
    except (OSError, UnfitImage) as error:
        raise UserError(f"conversations: {file} cannot be read as an image: {error}") from None
