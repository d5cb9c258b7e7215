"""Texts for perplexity, found before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.data import english, hub
from bench.errors import UserError
from bench.evaluation.config import PerplexityConfig
from bench.evaluation.local_files import SUFFIXES, read_rows
from bench.evaluation.source import Source, file_source, hub_source

_WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")
# C4 is measured on the first validation shard alone, as in GPTQ's scripts: the published numbers
# depend on it.
_C4_SHARD = ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz")


@dataclass(frozen=True)
class PlannedText:
    """A text as a sequence of documents, with the perplexity to be measured on it."""

    name: str
    config: PerplexityConfig
    documents: Sequence[str]
    split: str
    source: Source


def load(name: str, config: PerplexityConfig) -> PlannedText:
    """Read the text that a perplexity names, or the file that replaces it."""
    split = "validation" if config.text == "c4" else "test"
    if config.path is not None:
        documents, source = _local(f"benchmark.perplexity.{name}.path={config.path}", config.path)
    elif config.text == "english":
        documents = [english.test_text()]
        source = Source("embedded", "english", None, english.fingerprint())
    else:
        documents, source = _from_hub(config, split)
    return PlannedText(name, config, documents, split, source)


def _from_hub(config: PerplexityConfig, split: str) -> tuple[Sequence[str], Source]:
    if config.text == "c4":
        file = hub.download(*_C4_SHARD)
        rows = read_rows(file, hub.spell(*_C4_SHARD))
        source = hub_source(hub.spell(*_C4_SHARD), hub.commit_in(file), file.name)
        return [row["text"] for row in rows], source
    data = hub.load(*_WIKITEXT2)
    loaded = str(data[split]._fingerprint)
    return data[split]["text"], hub_source(hub.spell(*_WIKITEXT2), hub.commit_of(data), loaded)


def _local(key: str, path: str) -> tuple[Sequence[str], Source]:
    """Read the column `text` of a table, or any other file as one document of plain text."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}: no such file")
    if file.suffix in SUFFIXES:
        rows = read_rows(file, key)
        if not all(isinstance(row.get("text"), str) for row in rows):
            raise UserError(f"{key}: {file.name} needs a column 'text' of strings")
        return [row["text"] for row in rows], file_source([file])
    try:
        return [file.read_text(encoding="utf-8")], file_source([file])
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {file.name} is not UTF-8 text: {error}") from error
