"""Prompts with images for calibration: embedded scenes, a file, or a split on the hub."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.data import chat
from bench.data.chat import ModelInputs, Processor
from bench.data.image_files import UnfitImage, decode_image, open_images, refuse_clipped
from bench.errors import MissingData, UserError
from bench.schema import PromptsConfig

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ProcessedPrompts:
    """Processor outputs, one mapping per forward; `fingerprint` is their SHA-256."""

    inputs: tuple[ModelInputs, ...]
    fingerprint: str

    @staticmethod
    def of(inputs: Sequence[ModelInputs]) -> ProcessedPrompts:
        """Wrap processor outputs and hash their names, shapes, dtypes and values."""
        digest = hashlib.sha256()
        for call in inputs:
            for name in sorted(call):
                value = call[name].detach().cpu().contiguous()
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                # Viewed as bytes first, because numpy has no bfloat16.
                digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
        return ProcessedPrompts(tuple(inputs), digest.hexdigest())


ImagePrompt = tuple["Image", str]
_Row = dict[str, object]


@dataclass(frozen=True)
class PromptSource:
    """Images with questions before processing; `fingerprint` hashes them and the settings."""

    config: PromptsConfig
    prompts: tuple[ImagePrompt, ...]
    fingerprint: str

    def process(self, processor: Processor, system: str | None = None) -> ProcessedPrompts:
        """Return the processor's tensors, in batches of `config.batch` prompts padded on the left.

        A prompt is one user turn with the image before the question, in the model's own chat
        template with the `system` message, up to the start of the answer, as in evaluation.
        """
        return ProcessedPrompts.of(list(self._calls(processor, system)))

    def _calls(self, processor: Processor, system: str | None) -> Iterator[ModelInputs]:
        # Padded on the left, as for generation, so that the last position of every row is its last
        # token. The side is state of the tokenizer and is restored, because evaluation has its own.
        side, processor.tokenizer.padding_side = processor.tokenizer.padding_side, "left"
        try:
            for start in range(0, len(self.prompts), self.config.batch):
                batch = self.prompts[start : start + self.config.batch]
                texts = [
                    chat.render_chat(processor, [(question, None)], images=1, system=system)
                    for _, question in batch
                ]
                yield chat.encode_chats(
                    processor, texts, [[image] for image, _ in batch], padding=True
                )
        finally:
            processor.tokenizer.padding_side = side


def resolve_prompts(config: PromptsConfig, *, offline: bool) -> PromptSource:
    """Find the prompts and hash them together with the settings, without processing them.

    Raises:
        MissingData: the data set is neither cached nor downloadable.
        UserError: the file or the data set has too few rows or lacks a column or the split.
    """
    prompts = tuple(_draw_prompts(config, offline=offline))
    settings = config.model_dump(mode="json", exclude={"name", "path"})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for image, question in prompts:
        digest.update(f"{image.mode}{image.size}{question}".encode())
        digest.update(image.tobytes())
    return PromptSource(config, prompts, digest.hexdigest())


def prefetch_prompts(config: PromptsConfig) -> str:
    """Download the prompts unless they are cached; return a one-line summary."""
    source = resolve_prompts(config, offline=False)
    return f"prompts {config.name}: {config.source}, {source.fingerprint[:12]}"


def _draw_prompts(config: PromptsConfig, *, offline: bool) -> Iterator[ImagePrompt]:
    if config.source == "embedded":
        yield from _embedded_prompts(config)
        return
    key = f"prompts.path={config.path}" if config.source == "file" else f"prompts {config.name}"
    rows = (
        _rows_from_file(config, key)
        if config.source == "file"
        else _rows_from_hub(config, offline=offline)
    )
    if len(rows) < config.count:
        raise UserError(f"{key} has {len(rows)} rows, but prompts.count={config.count}")
    # Rows are sampled by index, so that only the selected images of a hub data set are decoded.
    for place in random.Random(config.seed).sample(range(len(rows)), config.count):
        row = _drawn_row(rows, place, key)
        yield _decode_row(row, config, key, place)


def _drawn_row(rows: Sequence[_Row], place: int, key: str) -> _Row:
    # A split of `datasets` decodes the image on access.
    try:
        return open_images(lambda: rows[place])
    except UnfitImage as error:
        raise UserError(f"{key}: row {place} is not a prompt: {error}") from error


def _embedded_prompts(config: PromptsConfig) -> Iterator[ImagePrompt]:
    from bench.data.synthetic.scenes import ConversationSpec, draw_conversations

    # Only the first question of each conversation is used.
    for image, turns in draw_conversations(
        "train", config.count, config.seed, ConversationSpec(describe=False)
    ):
        yield image.convert("RGB"), turns[0][0]


def _rows_from_file(config: PromptsConfig, key: str) -> Sequence[_Row]:
    import datasets
    from pyarrow import ArrowException, parquet

    file = Path(str(config.path)).expanduser()
    # Pipes and devices also exist, but reading them may never end.
    if not file.is_file():
        raise UserError(f"{key}: no such file")
    try:
        table = parquet.read_table(file, memory_map=True)
    except (OSError, ValueError, ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{key} cannot be read as parquet: {reason}") from error
    # Rows, including images, are converted to Python objects only when they are selected.
    rows: Sequence[_Row] = datasets.Dataset(table)
    return rows


def _rows_from_hub(config: PromptsConfig, *, offline: bool) -> Sequence[_Row]:
    from bench.data import hub

    if offline:
        hub.go_offline()
    try:
        splits = hub.load_dataset(str(config.dataset), config.subset)
    except hub.DatasetUnreachable as error:
        raise MissingData(
            f"prompts={config.name} needs {error}, which is neither cached nor reachable: run "
            f"`bench prefetch prompts={config.name}` with a network connection, or use a file: "
            "prompts=file prompts.path=PATH"
        ) from None
    if config.split not in splits:
        raise UserError(
            f"prompts.split={config.split} does not exist: {config.dataset} has the splits "
            f"{', '.join(sorted(splits))}"
        )
    # A split of `datasets` decodes an image when its row is read.
    rows: Sequence[_Row] = splits[config.split]
    return rows


def _decode_row(row: _Row, config: PromptsConfig, key: str, place: int) -> ImagePrompt:
    for column in (config.image_column, config.question_column):
        if row.get(column) is None:
            columns = ", ".join(sorted(row))
            raise UserError(f"{key}: row {place} has no column {column!r}; there are {columns}")
    question = row[config.question_column]
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{key}: row {place} has no text in {config.question_column!r}")
    try:
        return _decode_image(row[config.image_column]), question
    except UnfitImage as error:
        raise UserError(f"{key}: row {place} is not a prompt: {error}") from error


def _decode_image(value: object) -> Image:
    # The hub's library returns decoded images. A parquet file has bytes, or a struct of bytes and
    # path if `datasets` wrote it.
    import PIL.Image

    if isinstance(value, PIL.Image.Image):
        return refuse_clipped(value).convert("RGB")
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise UnfitImage("the value of its image column is not an image")
    return decode_image(content)
