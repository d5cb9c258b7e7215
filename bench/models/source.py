"""Where a model's files are: embedded, fresh, a local folder, the hub; and its fingerprint."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import MissingData, UserError, unknown_name
from bench.models import embedded
from bench.models.hashing import fingerprint
from bench.models.weight_files import find_weight_files, refuse_outside_links
from bench.schema import ModelConfig

if TYPE_CHECKING:
    from bench.models.classifiers.classifier import VisionConfig

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
    # Before anything in the folder is opened, config.json included.
    refuse_outside_links(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
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
