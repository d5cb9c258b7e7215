"""Text for calibration and testing: found and hashed first, then cut into rows with a tokenizer.

Rows of tokens are cut at random, as in the code of GPTQ and CAMERA. The documents of one long text
are joined with blank lines and tokenized together, and every row starts at a random token. If
documents are separate, every row is a random window of a random document longer than the row.

The embedded text is English prose that ships with every Python installation: the language
reference. The pages of `pydoc_data.topics` are split into train and test by a hash of the page
name, so a page stays in its split if other pages are added, removed or changed.

The ids of a long text are cached in the user's cache folder, because tokenizing millions of
characters takes seconds and every run of a model calibrates on the same text.

Shapes: B rows, L tokens per row.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.metadata
import json
import platform
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

from bench.data.digests import cache_folder, contents_hash, read_checked, write_checked
from bench.errors import MissingData, UserError
from bench.schema import CalibrationConfig

if TYPE_CHECKING:
    from torch import Tensor

    from bench.data.chat import Tokenizer


WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")
C4_SHARD = "en/c4-train.00000-of-01024.json.gz"
# Number of characters above which reading cached ids is faster than tokenizing.
_LONG_TEXT = 100_000
_WORLD_FOLDER = Path(__file__).parent / "synthetic" / "world"


@dataclass(frozen=True)
class Calibration:
    """Tokenized text: `tokens` is int64 [B, L]; `fingerprint` is the SHA-256 of these tokens."""

    tokens: Tensor
    fingerprint: str


MOST_CHARACTERS = 16
"""Upper bound on the mean number of characters per token, for any tokenizer."""


@dataclass(frozen=True)
class TextShare:
    """Documents from one source, and the number of rows to cut from them.

    `joined` documents form one long text; otherwise no row spans two documents.
    """

    origin: str
    documents: Sequence[str]
    rows: int
    joined: bool = True

    def cut(self, length: int, tokenizer: Tokenizer, rng: random.Random) -> list[list[int]]:
        """Return the rows, each of `length` token ids.

        Raises:
            UserError: there are too few tokens; the message states the numbers.
        """
        if self.joined:
            return self._from_joined(length, tokenizer, rng)
        return self._from_documents(length, tokenizer, rng)

    def check(self, length: int, tokenizer: Tokenizer) -> None:
        """Raise like `cut` if a joined text is too short; long texts are not tokenized."""
        plenty = MOST_CHARACTERS * self._needed(length) <= sum(map(len, self.documents))
        if self.joined and not plenty:
            self._refuse_fewer(len(token_ids("\n\n".join(self.documents), tokenizer)), length)

    def _needed(self, length: int) -> int:
        # Rows may overlap, but with fewer tokens than in all rows most of them would. `randint`
        # requires one more token than a row has.
        return max(self.rows * length, length + 1)

    def _refuse_fewer(self, tokens: int, length: int) -> None:
        if tokens < self._needed(length):
            raise UserError(
                f"calibration text {self.origin} has {tokens} tokens, but {self.rows} rows of "
                f"{length} need {self._needed(length)}: lower calibration.rows or "
                "calibration.length"
            )

    def _from_joined(
        self, length: int, tokenizer: Tokenizer, rng: random.Random
    ) -> list[list[int]]:
        ids = token_ids("\n\n".join(self.documents), tokenizer)
        self._refuse_fewer(len(ids), length)
        # GPTQ's bounds: `randint` includes both ends, and the last possible window is never drawn.
        starts = [rng.randint(0, len(ids) - length - 1) for _ in range(self.rows)]
        return [ids[start : start + length].tolist() for start in starts]

    def _from_documents(
        self, length: int, tokenizer: Tokenizer, rng: random.Random
    ) -> list[list[int]]:
        # The order of draws and their bounds are those of GPTQ's get_c4: draw documents until one
        # is long enough, then a start. Any other order (filtering short documents first, drawing
        # all starts at the end) would give different rows for the same seed.
        rows: list[list[int]] = []
        too_short: set[int] = set()
        while len(rows) < self.rows:
            if len(too_short) == len(self.documents):
                raise UserError(
                    f"calibration text {self.origin}: none of its {len(self.documents)} documents "
                    f"is longer than {length} tokens: lower calibration.length"
                )
            chosen = rng.randint(0, len(self.documents) - 1)
            # Drawn as in GPTQ, but not tokenized a second time.
            if chosen in too_short:
                continue
            ids = token_ids(self.documents[chosen], tokenizer)
            # Equal length is too short as well, because `randint(0, -1)` would raise.
            if len(ids) <= length:
                too_short.add(chosen)
                continue
            start = rng.randint(0, len(ids) - length - 1)
            rows.append(ids[start : start + length].tolist())
        return rows


@dataclass(frozen=True)
class CalibrationSource:
    """Calibration text before tokenization; `fingerprint` covers the text and the settings."""

    config: CalibrationConfig
    parts: tuple[TextShare, ...]
    fingerprint: str

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise before weights are loaded if a text has fewer tokens than its rows need."""
        for part in self.parts:
            part.check(self.config.length, tokenizer)

    def tokenize(self, tokenizer: Tokenizer) -> Calibration:
        """Cut the rows; the same text, settings and tokenizer always give the same rows.

        Raises:
            UserError: a text has fewer tokens than its rows need.
        """
        import torch

        # A separate generator, because draws must not depend on earlier ones of the run. All shares
        # use it in turn, so their order affects the rows.
        rng = random.Random(self.config.seed)
        rows: list[list[int]] = []
        for part in self.parts:
            rows += part.cut(self.config.length, tokenizer, rng)
        tokens_BL = torch.tensor(rows, dtype=torch.int64)
        # The shape is hashed too, because 2 rows of 8 tokens have the same bytes as 4 rows of 4.
        digest = hashlib.sha256(f"{tuple(tokens_BL.shape)}".encode())
        digest.update(tokens_BL.numpy().tobytes())
        return Calibration(tokens_BL, digest.hexdigest())


def resolve_calibration(config: CalibrationConfig, *, offline: bool) -> CalibrationSource:
    """Find the text and hash it together with the settings, without tokenizing it.

    Raises:
        MissingData: a data set is neither cached nor downloadable, or the file of source=text
            cannot be opened.
        UserError: the file of source=text is not UTF-8.
    """
    parts = _text_shares(config, offline=offline)
    # `name` and `path` only state the origin of the text: configs with equal texts and settings are
    # the same calibration, wherever the file is.
    settings = config.model_dump(mode="json", exclude={"name", "path"})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in parts:
        for document in part.documents:
            # One digest per document, because moving a boundary between two must change the hash.
            digest.update(hashlib.sha256(document.encode()).digest())
    return CalibrationSource(config, parts, digest.hexdigest())


def prefetch_calibration(config: CalibrationConfig) -> str:
    """Download the text unless it is cached; return a one-line summary."""
    source = resolve_calibration(config, offline=False)
    return f"calibration {config.name}: {config.source}, {source.fingerprint[:12]}"


def _text_shares(config: CalibrationConfig, *, offline: bool) -> tuple[TextShare, ...]:
    if config.source == "embedded":
        # An odd row goes to the synthetic world: with rows=1 there is no English share.
        half = config.rows // 2
        return _world_share(config.rows - half), *((_english_share(half),) if half else ())
    if config.source == "world":
        return (_world_share(config.rows),)
    if config.source == "english":
        return (_english_share(config.rows),)
    if config.source == "text":
        return (TextShare(str(config.path), [_read_text(str(config.path))], config.rows),)
    documents = _documents_from_hub(config, offline=offline)
    # As in GPTQ's datautils.py: WikiText-2 is one long text, C4 has one window per document.
    return (TextShare(config.source, documents, config.rows, joined=config.source != "c4"),)


def _world_share(rows: int) -> TextShare:
    return TextShare("world", _world_corpus(), rows)


@functools.cache
def _world_corpus() -> list[str]:
    # Kept per process, because every run of a sweep reads the whole corpus, and in the user's cache
    # folder, because drawing it takes seconds. The result depends only on this code and on
    # Python's generator.
    code = {file.name: file for file in _WORLD_FOLDER.glob("*.py")}
    place = cache_folder("world") / f"{contents_hash(code)}-{platform.python_version()}"
    known = read_checked(place)
    if known is not None:
        documents: list[str] = json.loads(known)
        return documents
    from bench.data.synthetic.world import question_sets

    drawn = question_sets.corpus()
    write_checked(place, json.dumps(drawn).encode())
    return drawn


def _english_share(rows: int) -> TextShare:
    return TextShare("english", [train_text()], rows)


def _read_text(path: str) -> str:
    key = f"calibration.path={path}"
    file = Path(path).expanduser()
    if file.exists() and not file.is_file():
        raise UserError(f"{key} is not a file")  # Reading a pipe or a device may never end.
    try:
        # Without a byte order mark, which would become a token.
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MissingData(f"{key}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        where = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{key} is not a UTF-8 text file: see line {where}") from None
    if not text.strip():
        raise UserError(f"{key} contains no text")
    return text


def _documents_from_hub(config: CalibrationConfig, *, offline: bool) -> Sequence[str]:
    """Return the training documents of WikiText-2 (raw) or of C4's first shard."""
    from bench.data import hub

    # A probe of 3 s instead of the retries of `datasets`, which take far longer.
    if offline or not hub.is_reachable():
        hub.go_offline()
    try:
        if config.source == "c4":
            return _json_lines(hub.download_file("allenai/c4", C4_SHARD))
        documents: Sequence[str] = hub.load_dataset(*WIKITEXT2)["train"]["text"]
    except hub.DatasetUnreachable:
        raise MissingData(
            f"calibration text {config.source} is neither in the local cache nor downloadable now: "
            f"run `bench prefetch calibration={config.name}` with a network connection, or use "
            "calibration=embedded"
        ) from None
    return documents


def _json_lines(file: Path) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


_BUCKETS = 5


def is_test_page(name: str) -> bool:
    """Return whether the page called `name` is in the test split (about one page in five)."""
    # SHA-256, because Python's `hash` of a string differs between processes (PYTHONHASHSEED).
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _BUCKETS == 0


@cache
def train_text() -> str:
    """Return all pages for training and calibration, sorted by name."""
    return _join(test=False)


@cache
def test_text() -> str:
    """Return all pages for measuring perplexity, sorted by name."""
    return _join(test=True)


def fingerprint() -> str:
    """Return the SHA-256 of the test text; it differs between Python versions."""
    return hashlib.sha256(test_text().encode()).hexdigest()


def _join(*, test: bool) -> str:
    train = {text.strip() for name, text in topics.items() if not is_test_page(name)}
    pages = (topics[name].strip() for name in sorted(topics) if is_test_page(name) == test)
    # Some topics are aliases of the same page, and their names may be in both splits. Such a page
    # counts as a training page, so that the test text does not contain training text.
    return "\n\n".join(dict.fromkeys(p for p in pages if not test or p not in train))


def token_ids(text: str, tokenizer: Tokenizer) -> array[int]:
    """Tokenize a text with the tokenizer's own settings, or read its cached ids.

    The returned array takes 4 bytes per token, a list of Python integers about nine times as much.
    """
    if len(text) < _LONG_TEXT:
        return array("i", tokenizer(text, verbose=False)["input_ids"])
    return _long_token_ids(text, tokenizer)


# Two entries suffice for both halves of `embedded` in all runs of a process.
@functools.lru_cache(maxsize=2)
def _long_token_ids(text: str, tokenizer: Tokenizer) -> array[int]:
    key = _memory_key(text, tokenizer)
    place = None if key is None else cache_folder("tokens") / key
    known = None if place is None else _read_ids(place)
    if known is not None:
        return known
    ids = array("i", tokenizer(text, verbose=False)["input_ids"])
    if place is not None:
        write_checked(place, ids.tobytes())
    return ids


def _memory_key(text: str, tokenizer: Any) -> str | None:
    """Hash everything that determines the ids; None if the tokenizer runs its own Python code."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]
    # The serialized form has the vocabulary, merges, normalization and added special tokens. Its
    # arguments count as well, except for the paths of its files.
    settings = sorted(
        (name, repr(value))
        for name, value in tokenizer.init_kwargs.items()
        if name != "name_or_path" and not name.endswith("_file")
    )
    parts = (text, backend.to_str(), kind, repr(settings), *versions)
    total = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        total.update(f"{len(content)}\n".encode() + content)
    return total.hexdigest()


def _read_ids(place: Path) -> array[int] | None:
    """Return cached ids, or None if there are none or they are damaged."""
    body, ids = read_checked(place), array("i")
    if body is None or len(body) % ids.itemsize:
        return None
    ids.frombytes(body)
    return ids
