"""Calibration text: resolved and hashed first, cut into rows of tokens once a tokenizer is loaded.

Shapes: B rows, L tokens per row.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from bench.data.sampling import Part
from bench.errors import MissingData, UserError

if TYPE_CHECKING:
    from torch import Tensor

WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")
C4_SHARD = "en/c4-train.00000-of-01024.json.gz"


class CalibrationConfig(BaseModel):
    """Source of the calibration text, number and length of its rows, and sampling seed.

    `embedded` takes half of its rows from the closed world's corpus and half from English prose,
    both of which are available offline. `text` reads one UTF-8 file at `path`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: Literal["embedded", "english", "world", "wikitext2", "c4", "text"]
    path: str | None = Field(default=None, validate_default=True)
    rows: int = Field(default=128, ge=1)
    length: int = Field(default=2048, ge=2)
    seed: int = Field(default=1234, ge=0)

    @field_validator("path")
    @classmethod
    def _path_for_text_only(cls, path: str | None, others: ValidationInfo) -> str | None:
        if (others.data.get("source") == "text") != (path is not None):
            raise ValueError("calibration.path is required by source=text and by no other source")
        return path


@dataclass(frozen=True)
class Calibration:
    """Tokenised text: `tokens` is int64 [B, L]; `fingerprint` is the SHA-256 of these tokens."""

    tokens: Tensor
    fingerprint: str


@dataclass(frozen=True)
class CalibrationSource:
    """Calibration text before tokenisation; `fingerprint` covers the text and the settings."""

    config: CalibrationConfig
    parts: tuple[Part, ...]
    fingerprint: str

    def tokenize(self, tokenizer: Any) -> Calibration:
        """Cut the rows; the same text, settings and tokenizer always give the same rows.

        Raises:
            UserError: a text has fewer tokens than its rows need.
        """
        import torch

        # A generator of its own: the draws must not depend on what a run drew before. All shares
        # use this one generator in turn, so their order decides the rows.
        rng = random.Random(self.config.seed)
        rows: list[list[int]] = []
        for part in self.parts:
            rows += part.cut(self.config.length, tokenizer, rng)
        tokens_BL = torch.tensor(rows, dtype=torch.int64)
        # The bytes alone cannot tell 2 rows of 8 tokens from 4 rows of 4.
        digest = hashlib.sha256(f"{tuple(tokens_BL.shape)}".encode())
        digest.update(tokens_BL.numpy().tobytes())
        return Calibration(tokens_BL, digest.hexdigest())


def resolve(config: CalibrationConfig, *, offline: bool) -> CalibrationSource:
    """Find the text and hash it together with the settings, without tokenising it.

    Raises:
        MissingData: a data set is neither cached nor downloadable, or the file of source=text
            cannot be opened.
        UserError: the file of source=text is not UTF-8.
    """
    parts = _parts(config, offline=offline)
    # `name` and `path` only say where the text comes from: two configs with equal text and equal
    # settings are one calibration, wherever the file lies.
    settings = config.model_dump(mode="json", exclude={"name", "path"})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in parts:
        for document in part.documents:
            # One digest per document, or moving a boundary between two would change nothing.
            digest.update(hashlib.sha256(document.encode()).digest())
    return CalibrationSource(config, parts, digest.hexdigest())


def prefetch(config: CalibrationConfig) -> str:
    """Download the text unless it is cached; return a one-line summary."""
    source = resolve(config, offline=False)
    return f"calibration {config.name}: {config.source}, {source.fingerprint[:12]}"


def _parts(config: CalibrationConfig, *, offline: bool) -> tuple[Part, ...]:
    if config.source == "embedded":
        # An odd row goes to the world: with rows=1 there is no English share.
        half = config.rows // 2
        return _world(config.rows - half), *((_english(half),) if half else ())
    if config.source == "world":
        return (_world(config.rows),)
    if config.source == "english":
        return (_english(config.rows),)
    if config.source == "text":
        return (Part(str(config.path), [_read(str(config.path))], config.rows),)
    documents = _from_hub(config, offline=offline)
    # As in GPTQ's datautils.py: WikiText-2 is one long text, C4 one window per document.
    return (Part(config.source, documents, config.rows, joined=config.source != "c4"),)


def _world(rows: int) -> Part:
    return Part("world", _world_corpus(), rows)


@functools.cache
def _world_corpus() -> list[str]:
    # Generated once per process, because every run of a sweep reads the whole corpus.
    from bench.data import world

    return world.corpus()


def _english(rows: int) -> Part:
    from bench.data import english

    return Part("english", [english.train_text()], rows)


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise MissingData(f"calibration.path={path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"calibration.path={path} is not a UTF-8 text file") from None


def _from_hub(config: CalibrationConfig, *, offline: bool) -> Sequence[str]:
    """Return the training documents of WikiText-2 (raw) or of C4's first shard."""
    from bench.data import hub

    # One probe of 3 s instead of the retries of `datasets`, which take far longer to give up.
    if offline or not hub.is_reachable():
        hub.go_offline()
    try:
        if config.source == "c4":
            return _json_lines(hub.download("allenai/c4", C4_SHARD))
        documents: Sequence[str] = hub.load(*WIKITEXT2)["train"]["text"]
    except hub.Unreachable:
        raise MissingData(
            f"calibration text {config.source} is neither in the local cache nor downloadable now: "
            f"run `bench prefetch calibration={config.name}` with a network connection, or use "
            "calibration=embedded"
        ) from None
    return documents


def _json_lines(file: Path) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]
