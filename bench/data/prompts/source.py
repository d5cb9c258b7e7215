"""Image prompts from embedded scenes, a parquet file, or a split of a data set on the hub."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.data.prompts import chat
from bench.data.prompts.config import PromptsConfig
from bench.data.prompts.samples import Samples
from bench.errors import MissingData, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Prompt = tuple["Image", str]


@dataclass(frozen=True)
class PromptSource:
    """Images with questions before processing; `fingerprint` hashes them and the settings."""

    config: PromptsConfig
    prompts: tuple[Prompt, ...]
    fingerprint: str

    def process(self, processor: Any, system: str | None = None) -> Samples:
        """Return the processor's tensors, in batches of `config.batch` prompts padded on the left.

        A prompt is one user turn with the image before the question, in the model's own chat
        template with its `system` message, up to the start of the answer, as in an evaluation.
        """
        return Samples.of(list(self._calls(processor, system)))

    def _calls(self, processor: Any, system: str | None) -> Iterator[dict[str, Any]]:
        # Left padding, as for generation: the last position of every row is its last token. The
        # side is state of the tokenizer and is restored, because evaluation relies on its own.
        side, processor.tokenizer.padding_side = processor.tokenizer.padding_side, "left"
        try:
            for start in range(0, len(self.prompts), self.config.batch):
                batch = self.prompts[start : start + self.config.batch]
                texts = [
                    chat.render(processor, [(question, None)], images=1, system=system)
                    for _, question in batch
                ]
                yield chat.encode(processor, texts, [[image] for image, _ in batch], padding=True)
        finally:
            processor.tokenizer.padding_side = side


def resolve(config: PromptsConfig, *, offline: bool) -> PromptSource:
    """Find the prompts and hash them together with the settings, without processing them.

    Raises:
        MissingData: the data set is neither cached nor downloadable.
        UserError: the file or the data set has too few rows or lacks a column or the split.
    """
    prompts = tuple(_prompts(config, offline=offline))
    settings = config.model_dump(mode="json", exclude={"name", "path"})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for image, question in prompts:
        digest.update(f"{image.mode}{image.size}{question}".encode())
        digest.update(image.tobytes())
    return PromptSource(config, prompts, digest.hexdigest())


def prefetch(config: PromptsConfig) -> str:
    """Download the prompts unless they are cached; return a one-line summary."""
    source = resolve(config, offline=False)
    return f"prompts {config.name}: {config.source}, {source.fingerprint[:12]}"


def _prompts(config: PromptsConfig, *, offline: bool) -> Iterator[Prompt]:
    if config.source == "embedded":
        yield from _embedded(config)
        return
    key = f"prompts.path={config.path}" if config.source == "file" else f"prompts {config.name}"
    rows = _file(config, key) if config.source == "file" else _hub(config, offline=offline)
    if len(rows) < config.count:
        raise UserError(f"{key} has {len(rows)} rows, but prompts.count={config.count}")
    # Rows are sampled by index, so that only the drawn images of a hub data set are decoded.
    for place in random.Random(config.seed).sample(range(len(rows)), config.count):
        yield _prompt(rows[place], config, key)


def _embedded(config: PromptsConfig) -> Iterator[Prompt]:
    from bench.data.scenes import Lesson, conversations

    # Of each conversation only the first question is used.
    for image, turns in conversations("train", config.count, config.seed, Lesson(describe=False)):
        yield image.convert("RGB"), turns[0][0]


def _file(config: PromptsConfig, key: str) -> Sequence[dict[str, Any]]:
    from pyarrow import parquet

    file = Path(str(config.path)).expanduser()
    if not file.is_file():
        raise UserError(f"{key}: no such file")
    try:
        table = parquet.read_table(file)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{key} cannot be read as parquet: {reason}") from error
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _hub(config: PromptsConfig, *, offline: bool) -> Any:
    # Typed as Any because `datasets` has no stubs here. A split decodes an image on access.
    from bench.data import hub

    if offline:
        hub.go_offline()
    try:
        splits = hub.load(str(config.dataset), config.subset)
    except hub.Unreachable as error:
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
    return splits[config.split]


def _prompt(row: dict[str, Any], config: PromptsConfig, key: str) -> Prompt:
    for column in (config.image_column, config.question_column):
        if row.get(column) is None:
            raise UserError(f"{key} has no column {column!r}: it has {', '.join(sorted(row))}")
    return _image(row[config.image_column], key), str(row[config.question_column])


def _image(value: Any, key: str) -> Image:
    # The hub hands over decoded images. A parquet file holds bytes, or a struct of bytes and path
    # if `datasets` wrote it.
    import PIL.Image

    if isinstance(value, PIL.Image.Image):
        return value.convert("RGB")
    content: Any = value.get("bytes") if isinstance(value, dict) else value
    try:
        return PIL.Image.open(io.BytesIO(content)).convert("RGB")
    except (TypeError, PIL.UnidentifiedImageError):
        raise UserError(f"{key}: a value of its image column is not an image") from None
