"""Location of a model's files: the package, a local folder, or the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bench.errors import MissingData, UserError, unknown
from bench.models import zoo
from bench.models.config import ModelConfig
from bench.models.fingerprint import fingerprint
from bench.models.fresh import fresh_fingerprint, fresh_folder, is_fresh
from bench.models.weights import refuse_escapes, weight_files

ZOO = "zoo:"
COMMIT = re.compile(r"[0-9a-f]{40}")
WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
# Weights in subfolders and in formats of different software would be downloaded in vain.
UNWANTED_FILES = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class Source:
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


def resolve(config: ModelConfig, *, offline: bool) -> Source:
    """Find and check the files of a model; hub models are downloaded unless `offline`.

    Raises:
        MissingData: the files cannot be reached; the message says how to get them.
        UserError: they can be reached but are unusable.
    """
    _gate_remote_code(config)
    if is_fresh(config):
        return Source(config, fresh_folder(), fresh_fingerprint(config), None)
    folder, revision = _folder(config, offline=offline)
    # Before anything in the folder is opened, config.json included.
    refuse_escapes(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    return Source(config, folder, fingerprint(weight_files(folder)), revision)


def prefetch(config: ModelConfig) -> Path:
    """Download what is missing and return the folder of the model's files."""
    return resolve(config, offline=False).folder


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
    if not COMMIT.fullmatch(config.revision):
        raise UserError(
            f"model.revision={config.revision} with model.trust_remote_code=true: code runs only "
            "from an explicit commit of 40 hexadecimal digits"
        )


def _folder(config: ModelConfig, *, offline: bool) -> tuple[Path, str | None]:
    """Return the folder of the model's files and their commit."""
    if config.path is not None:
        folder = Path(config.path).expanduser()
        if not folder.is_dir():
            raise MissingData(f"model.path={config.path} is not a folder")
        return folder.absolute(), None
    if config.source.startswith(ZOO):
        return _shipped(config.source.removeprefix(ZOO)), None
    return _from_hub(config, offline=offline)


def _shipped(name: str) -> Path:
    zoo_folder = Path(next(iter(zoo.__path__)))
    names = [file.parent.name for file in zoo_folder.glob("*/config.json")]
    if name not in names:
        raise unknown("shipped model", name, names)
    return zoo_folder / name


def _from_hub(config: ModelConfig, *, offline: bool) -> tuple[Path, str | None]:
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

    asked = f"model {config.source} at revision {config.revision}"
    # Python files are not even downloaded unless the model may run them.
    wanted = [*WANTED_FILES, "*.py"] if config.trust_remote_code else WANTED_FILES
    try:
        folder = snapshot_download(
            config.source,
            revision=config.revision,
            allow_patterns=wanted,
            ignore_patterns=UNWANTED_FILES,
            local_files_only=offline,
        )
    except HFValidationError:
        raise UserError(f"model.source={config.source} is not a name on the hub") from None
    # Order matters: GatedRepoError is a RepositoryNotFoundError, and all are HfHubHTTPErrors.
    except GatedRepoError:
        raise MissingData(f"{asked} is gated: request access on the hub and log in") from None
    except RevisionNotFoundError:
        raise UserError(f"{asked}: this revision does not exist") from None
    except RepositoryNotFoundError:
        raise UserError(f"{asked}: the model does not exist or is private") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError):
        raise MissingData(_cure(asked, config.name, offline=offline)) from None
    # Snapshot folders are named by the commit that the revision resolved to.
    return Path(folder), Path(folder).name


def _cure(asked: str, name: str, *, offline: bool) -> str:
    where = "and offline=true" if offline else "and the hub cannot be reached"
    return (
        f"{asked} is not in the local cache {where}: run `bench prefetch model={name}` with "
        "network access, or set model.path=FOLDER"
    )
