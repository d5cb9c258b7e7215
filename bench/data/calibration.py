"""Calibration text: found and hashed first, cut into rows of tokens when a tokenizer is there.

Shapes: B rows, L tokens a row.
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
    """Which text, how many rows of how many tokens, drawn with which seed.

    `embedded` takes half of its rows from the closed world's corpus and half from English prose;
    both ship with the package. `text` reads one UTF-8 file at `path`.
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
            raise ValueError("calibration.source=text needs a file, no other source takes one")
        return path


@dataclass(frozen=True)
class Calibration:
    """Tokenised text: `tokens` is int64 of shape [B, L]; `fingerprint` hashes exactly these."""

    tokens: Tensor
    fingerprint: str


@dataclass(frozen=True)
class CalibrationSource:
    """Text that is there but not yet tokenised; `fingerprint` covers text and settings."""

    config: CalibrationConfig
    parts: tuple[Part, ...]
    fingerprint: str

    def tokenize(self, tokenizer: Any) -> Calibration:
        """Cut the rows; the same text, settings and tokenizer always give the same ones.

        Raises:
            UserError: a text has fewer tokens than are asked of it.
        """
        import torch

        rng = random.Random(self.config.seed)
        rows: list[list[int]] = []
        for part in self.parts:
            rows += part.cut(self.config.length, tokenizer, rng)
        tokens_BL = torch.tensor(rows, dtype=torch.int64)
        digest = hashlib.sha256(f"{tuple(tokens_BL.shape)}".encode())
        digest.update(tokens_BL.numpy().tobytes())
        return Calibration(tokens_BL, digest.hexdigest())


def resolve(config: CalibrationConfig, *, offline: bool) -> CalibrationSource:
    """Find the text and hash it together with the settings; nothing is tokenised.

    Raises:
        MissingData: a data set is neither cached nor to be had from the hub.
        UserError: the file of source=text cannot be read.
    """
    parts = _parts(config, offline=offline)
    settings = config.model_dump(mode="json", exclude={"name", "path"})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in parts:
        for document in part.documents:
            digest.update(hashlib.sha256(document.encode()).digest())
    return CalibrationSource(config, parts, digest.hexdigest())


def prefetch(config: CalibrationConfig) -> str:
    """Download the text where it is not here yet, and say in one line that it is."""
    source = resolve(config, offline=False)
    return f"calibration {config.name}: {config.source}, {source.fingerprint[:12]}"


def _parts(config: CalibrationConfig, *, offline: bool) -> tuple[Part, ...]:
    """Return the documents that a source stands for."""
    if config.source == "embedded":
        half = config.rows // 2
        return _world(config.rows - half), *((_english(half),) if half else ())
    if config.source == "world":
        return (_world(config.rows),)
    if config.source == "english":
        return (_english(config.rows),)
    if config.source == "text":
        return (Part(str(config.path), [_read(str(config.path))], config.rows),)
    documents = _from_hub(config, offline=offline)
    return (Part(config.source, documents, config.rows, joined=config.source != "c4"),)


def _world(rows: int) -> Part:
    """Return the closed world's training corpus."""
    return Part("world", _world_corpus(), rows)


@functools.cache
def _world_corpus() -> list[str]:
    """Write the world's corpus once a process; every run of a sweep asks for it."""
    from bench.data import world

    return world.corpus()


def _english(rows: int) -> Part:
    """Return the training side of the English prose."""
    from bench.data import english

    return Part("english", [english.train_text()], rows)


def _read(path: str) -> str:
    """Return the content of a text file."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise MissingData(f"calibration.path={path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"calibration.path={path} is not a UTF-8 text file") from None


def _from_hub(config: CalibrationConfig, *, offline: bool) -> Sequence[str]:
    """Return the training documents of WikiText-2 (raw) or of C4's first shard."""
    from bench.data import hub

    if offline or not hub.is_reachable():
        hub.go_offline()
    try:
        if config.source == "c4":
            return _json_lines(hub.download("allenai/c4", C4_SHARD))
        documents: Sequence[str] = hub.load(*WIKITEXT2)["train"]["text"]
    except hub.Unreachable:
        raise MissingData(
            f"calibration text {config.source} is not in the local cache and cannot be downloaded "
            f"now: run `bench prefetch calibration={config.name}` where there is a network, or use "
            "calibration=embedded"
        ) from None
    return documents


def _json_lines(file: Path) -> list[str]:
    """Return the texts of a compressed file of one JSON object a line."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]
