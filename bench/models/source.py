"""Where a model's files are: embedded, fresh, a local folder, the hub; whether they are whole.

No weight is read here. Only safetensors are accepted: a pickled file can run code when it is
opened. The format: eight bytes little-endian with the header's length, a JSON header, then the
tensors without gaps (https://github.com/huggingface/safetensors, section Format).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import MissingData, UserError, unknown_name
from bench.models import embedded
from bench.models.hashing import fingerprint
from bench.models.stated_sizes import (
    MalformedEntry,
    byte_range,
    read_json_object,
    refuse_impossible_sizes,
)
from bench.schema import ModelConfig

if TYPE_CHECKING:
    from bench.models.classifiers.classifier import VisionConfig


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}

# The reference implementation's limit; it stops a corrupt length from allocating the memory.
MAX_HEADER_BYTES = 100_000_000


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a model folder, sorted by name, after checking them.

    Raises:
        UserError: there are none, only pickled ones, one that is missing, truncated or corrupt, or
            one that lies outside the folder; or config.json states sizes that do not fit them.
    """
    refuse_outside_links(folder)
    if (folder / INDEX_FILE).is_file():
        files = _indexed_shards(folder)
    elif (folder / SINGLE_FILE).is_file():
        files = (folder / SINGLE_FILE,)
    else:
        raise UserError(_no_weights_message(folder))
    tensors, config = sum(map(check_header, files)), folder / "config.json"
    if config.is_file():
        bits = 8 * sum(file.stat().st_size for file in files)
        refuse_impossible_sizes(read_json_object(config), str(config), tensors=tensors, bits=bits)
    return files


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
        # Reading a pipe or a device would never end.
        if not file.is_file() and not file.is_dir():
            raise UserError(f"{file} is neither a file nor a folder")
        if not file.resolve().is_relative_to(root):
            raise UserError(
                f"{file} leads out of its model folder to {file.resolve()}, which is not allowed"
            )


def check_header(file: Path) -> int:
    """Check a safetensors file against its header and return the number of its tensors.

    Raises:
        UserError: the file is truncated, or its header does not match its content.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{file} is cut off or not a safetensors file: it has {size} bytes")
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            spans = sorted(byte_range(name, entry) for name, entry in tensors.items())
        except MalformedEntry as fault:
            raise UserError(f"{file} is corrupt: {fault}") from None
        # RecursionError: a header can be nested thousands of levels deep.
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
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
    return len(spans)


def _indexed_shards(folder: Path) -> tuple[Path, ...]:
    """Return the shards named by the index."""
    try:
        named = read_json_object(folder / INDEX_FILE)["weight_map"].values()
        names = sorted({str(name) for name in named})
    except (TypeError, KeyError, AttributeError):
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


@dataclass(frozen=True)
class ModelSource:
    """A model's files, found and checked; no weights are in memory.

    `fingerprint` is a SHA-256 over the weight files; `revision` is the hub's commit, None
    otherwise. Fresh weights have no files: `folder` is that of the code that draws them, and
    `fingerprint` covers what they depend on.
    """

    config: ModelConfig
    folder: Path
    fingerprint: str
    revision: str | None

    @property
    def is_embedded(self) -> bool:
        """Whether the files ship with the package, and need not be distrusted."""
        return self.config.path is None and self.config.source.startswith(EMBEDDED_PREFIX)

    @property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))


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
    # First, since any folder of the system has links that lead elsewhere; nothing is opened yet.
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    # Before anything in the folder is opened, config.json included.
    refuse_outside_links(folder)
    return ModelSource(config, folder, fingerprint(find_weight_files(folder)), revision)


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
