"""Where a model's files are: embedded, fresh, a local folder, the hub; whether they are whole.

No weight is read here. Only safetensors are accepted: a pickled file can run code when it is
opened. The format: eight bytes little-endian with the header's length, a JSON header, then the
tensors without gaps (https://github.com/huggingface/safetensors, section Format).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.data.digests import contents_hash, fingerprint
from bench.errors import MissingData, UserError, unknown_name
from bench.models import embedded
from bench.schema import ModelConfig

if TYPE_CHECKING:
    from bench.models.classifiers.classifier import VisionConfig


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}

# The reference implementation's limit; it stops a corrupt length from allocating the memory.
MAX_HEADER_BYTES = 100_000_000


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files that transformers loads from a folder, after checking them.

    Raises:
        UserError: there are none, only pickled ones, one that is missing, truncated or corrupt, or
            one that lies outside the folder; or the folder makes transformers read further ones.
    """
    refuse_outside_links(folder)
    _refuse_further_weights(folder)
    # In this order, as transformers does: next to the single file, shards and their index are not
    # read. Variants (model.fp16.safetensors) and subfolders are read only on request.
    if (folder / SINGLE_FILE).is_file():
        files: tuple[Path, ...] = (folder / SINGLE_FILE,)
    elif (folder / INDEX_FILE).is_file():
        files = _indexed_shards(folder)
    else:
        raise UserError(_no_weights_message(folder))
    for file in files:
        check_header(file)
    return files


def _refuse_further_weights(folder: Path) -> None:
    """Raise if a file of the folder makes transformers read weights other than the usual files."""
    # With peft installed, an adapter is added to the weights; from a pickled file as well.
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}), which would change the weights in "
            "silence: merge it into them, or move it to a folder of its own"
        )
    for file in sorted(folder.glob("config*.json")):
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("transformers_weights")
        except (ValueError, AttributeError):
            continue  # transformers says what is wrong with it
        if named is not None:
            raise UserError(
                f"{file} names its weights by transformers_weights={named}: remove that key, and "
                f"rename them to {SINGLE_FILE}, or to {INDEX_FILE} with its shards"
            )


def refuse_outside_links(folder: Path) -> None:
    """Raise if a file of the folder, at any depth, is a link to a file outside it.

    A snapshot in the Hugging Face cache consists of links to `blobs` next to it; those stay within
    the model's own part of the cache and are allowed.
    """
    # A downloaded folder is untrusted: a link to ~/.ssh would otherwise be read as a tokenizer
    # file, and its content could end up in an error message.
    root = folder.resolve()
    if root.parent.name == "snapshots" and (root.parents[1] / "blobs").is_dir():
        root = root.parents[1]
    for file in sorted(folder.rglob("*")):
        if not file.exists():
            raise UserError(f"{file} is a link to a file that does not exist")
        if not file.resolve().is_relative_to(root):
            raise UserError(
                f"{file} leads out of its model folder to {file.resolve()}, which is not allowed"
            )


def check_header(file: Path) -> None:
    """Raise if a safetensors file is truncated or its header does not match its content."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{file} is cut off or not a safetensors file: it has {size} bytes")
        try:
            header = json.loads(stream.read(length))
            spans = sorted(
                _byte_range(entry) for name, entry in header.items() if name != "__metadata__"
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{file} is corrupt: its header cannot be read") from None
    end = 0
    for start, stop in spans:
        # Sorted spans that meet end to start cover the data part exactly once; gaps could hide
        # data, and overlaps let two tensors alias.
        if start != end or stop < start:
            raise UserError(f"{file} is corrupt: its tensors overlap or leave gaps")
        end = stop
    if 8 + length + end != size:
        wanted = 8 + length + end
        raise UserError(f"{file} is cut off: it has {size} bytes, its header describes {wanted}")


def _byte_range(entry: dict[str, Any]) -> tuple[int, int]:
    """Return where a tensor begins and ends in the file's data part."""
    start, stop = entry["data_offsets"]
    if not isinstance(entry["shape"], list) or not isinstance(entry["dtype"], str):
        # Caught by the caller, like every malformed entry.
        raise TypeError
    return int(start), int(stop)


def _indexed_shards(folder: Path) -> tuple[Path, ...]:
    """Return the shards named by the index."""
    try:
        named = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({str(name) for name in named})
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{folder / INDEX_FILE} is corrupt: it has no readable weight_map"
        ) from None
    for name in names:
        # The index is untrusted input, too: `../x.safetensors` would leave the folder without a
        # link.
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{folder / INDEX_FILE} names {name!r}, which is outside its folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(names)} weight files: {missing[0]}")
    if any(not name.endswith(".safetensors") for name in names):
        raise UserError(f"{folder / INDEX_FILE} names files that are not safetensors")
    return tuple(folder / name for name in names)


def _no_weights_message(folder: Path) -> str:
    """Describe what the folder has instead of safetensors."""
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickled:
        return (
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when opened: "
            "convert them to safetensors"
        )
    return f"{folder} has no weights: there is neither {SINGLE_FILE} nor {INDEX_FILE}"


EMBEDDED_PREFIX = "embedded:"
FRESH_PREFIX = "fresh:"
COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")
DOWNLOAD_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]

# Weights in subfolders and in formats of different software would be downloaded in vain.
IGNORE_PATTERNS = ["*/*", "consolidated*"]


# What transformers reads beside the weights: `from_pretrained` of config, tokenizer and processor.
# Recipes, licences and model cards are in the same folders and change no number.
_READ_FILES = (
    "config.json", "config.*.json", "generation_config.json", "slimbench.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "normalizer.json",
    "*vocab*", "merges.txt", "dict.txt", "emoji.json", "byte_maps.json", "word_*.json",
    "tekken.json", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.tokenizer", "*tokenizer/*",
    "chat_template*", "additional_chat_templates/*",
    "processor_config.json", "*preprocessor_config.json", "audio_tokenizer_config.json",
)  # fmt: skip


def read_files(folder: Path, *, remote_code: bool) -> dict[str, str]:
    """Return the hash of every file that loading a model reads, its weights excepted."""
    patterns = (*_READ_FILES, "**/*.py") if remote_code else _READ_FILES
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    # Read on every run, and not looked up by their state as weights are: the files are small.
    return {str(file.relative_to(folder)): contents_hash({"": file}) for file in sorted(files)}


@dataclass(frozen=True)
class ModelSource:
    """A model's files, found and checked; no weights are in memory.

    `fingerprint` is a SHA-256 over the weight files; `revision` is the hub's commit, None
    otherwise. `files` holds a hash of every other file that loading reads: two sources are equal
    only if the same model is loaded from them. Fresh weights have no files: `folder` is that of the
    code that draws them, and `fingerprint` covers what they depend on.
    """

    config: ModelConfig
    folder: Path
    fingerprint: str
    revision: str | None
    files: Mapping[str, str] = field(default_factory=dict, hash=False)


def resolve_model(config: ModelConfig, *, offline: bool) -> ModelSource:
    """Find and check the files of a model; hub models are downloaded unless `offline`.

    Raises:
        MissingData: the files cannot be reached; the message says how to get them.
        UserError: they can be reached but are unusable.
    """
    _gate_remote_code(config)
    if is_fresh(config):
        return ModelSource(config, fresh_folder(), fresh_fingerprint(config), None)
    folder, revision = _model_folder(config, offline=offline)
    # Before anything in the folder is opened, config.json included.
    refuse_outside_links(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    if config.trust_remote_code:
        _refuse_code_from_elsewhere(folder)
    weights = fingerprint(find_weight_files(folder))
    files = read_files(folder, remote_code=config.trust_remote_code)
    return ModelSource(config, folder, weights, revision, files)


def prefetch_model(config: ModelConfig) -> Path:
    """Download what is missing and return the folder of the model's files."""
    return resolve_model(config, offline=False).folder


def _gate_remote_code(config: ModelConfig) -> None:
    """Raise unless code from the model's repository is both allowed and pinned to a commit."""
    if not config.trust_remote_code:
        return
    if not config.allow_remote_code:
        raise UserError(
            f"model.trust_remote_code=true: {config.name} is not on the list of models whose own "
            "code may run: only its file in conf/model may set model.allow_remote_code"
        )
    # A branch or tag can be moved by the repository's owner after someone reviewed the code.
    if not COMMIT_PATTERN.fullmatch(config.revision):
        raise UserError(
            f"model.revision={config.revision} with model.trust_remote_code=true: code runs only "
            "from an explicit commit of 40 hexadecimal digits"
        )


def _refuse_code_from_elsewhere(folder: Path) -> None:
    """Raise if a file of the folder names code of another repository, at a commit of its own."""
    for file in sorted(folder.glob("*config*.json")):
        # transformers writes such a name as OWNER/REPOSITORY--MODULE.CLASS.
        found = re.search(r'"([^"\s]+/[^"\s]+--[\w.]+)"', file.read_text(errors="replace"))
        if found:
            raise UserError(
                f"{file} runs code of another repository ({found.group(1)}), which "
                "model.revision does not fix: copy that code into the model's folder"
            )


def _model_folder(config: ModelConfig, *, offline: bool) -> tuple[Path, str | None]:
    """Return the folder of the model's files and their commit."""
    if config.path is not None:
        folder = Path(config.path).expanduser()
        if not folder.is_dir():
            raise MissingData(f"model.path={config.path} is not a folder")
        return folder.absolute(), None
    if config.source.startswith(EMBEDDED_PREFIX):
        return _embedded_folder(config.source.removeprefix(EMBEDDED_PREFIX)), None
    return _hub_folder(config, offline=offline)


def _embedded_folder(name: str) -> Path:
    embedded_folder = Path(next(iter(embedded.__path__)))
    names = [file.parent.name for file in embedded_folder.glob("*/config.json")]
    if name not in names:
        raise unknown_name("embedded model", name, names)
    return embedded_folder / name


def _hub_folder(config: ModelConfig, *, offline: bool) -> tuple[Path, str | None]:
    """Return the snapshot folder of a hub model and its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    model = f"model {config.source} at revision {config.revision}"
    # Python files are not even downloaded unless the model may run them.
    wanted = [*DOWNLOAD_PATTERNS, "*.py"] if config.trust_remote_code else DOWNLOAD_PATTERNS
    try:
        folder = snapshot_download(
            config.source,
            revision=config.revision,
            allow_patterns=wanted,
            ignore_patterns=IGNORE_PATTERNS,
            local_files_only=offline,
        )
    except HFValidationError:
        raise UserError(f"model.source={config.source} is not a name on the hub") from None
    # Order matters: GatedRepoError is a RepositoryNotFoundError, and all are HfHubHTTPErrors.
    except GatedRepoError:
        raise MissingData(f"{model} is gated: request access on the hub and log in") from None
    except RevisionNotFoundError:
        raise UserError(f"{model}: this revision does not exist") from None
    except RepositoryNotFoundError:
        raise UserError(f"{model}: the model does not exist or is private") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError):
        raise MissingData(_not_cached_message(model, config.name, offline=offline)) from None
    # Snapshot folders are named by the commit that the revision resolved to.
    return Path(folder), Path(folder).name


def _not_cached_message(model: str, name: str, *, offline: bool) -> str:
    where = "and offline=true" if offline else "and the hub cannot be reached"
    return (
        f"{model} is not in the local cache {where}: run `bench prefetch model={name}` with "
        "network access, or set model.path=FOLDER"
    )


def is_fresh(config: ModelConfig) -> bool:
    """Whether the model has no files; `model.path`, when given, overrides its source."""
    return config.path is None and config.source.startswith(FRESH_PREFIX)


def fresh_vision_config(config: ModelConfig) -> VisionConfig:
    """Return the architecture's config with the input shape of the named data set.

    Raises:
        UserError: the architecture or the data set does not exist, or no data set is given.
    """
    # Imported here because the architectures import torch, and `bench.models.source` stays
    # importable without it.
    from bench.data.image_catalogue import IMAGE_SETS, image_shape
    from bench.models.classifiers.architectures import ARCHITECTURES
    from bench.models.classifiers.classifier import VisionConfig

    name = config.source.removeprefix(FRESH_PREFIX)
    if name not in ARCHITECTURES:
        raise unknown_name("architecture", name, ARCHITECTURES)
    if config.images is None:
        raise UserError(
            f"model.images is missing: {config.source} needs one of {', '.join(IMAGE_SETS)}"
        )
    images = image_shape(config.images)
    return VisionConfig(
        architecture=name, channels=images.channels, size=images.size, classes=images.classes
    )


def fresh_fingerprint(config: ModelConfig) -> str:
    """Hash everything that fresh weights depend on, except the version of torch."""
    described = f"{fresh_vision_config(config).model_dump_json()} seed {config.seed}"
    return hashlib.sha256(described.encode()).hexdigest()


def fresh_folder() -> Path:
    """Return the folder of the code that draws the weights."""
    from bench.models import classifiers

    return Path(next(iter(classifiers.__path__)))
