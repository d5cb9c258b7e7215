"""Access to the Hugging Face hub, online or offline: data sets and model repositories."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import MissingData, UserError

if TYPE_CHECKING:
    from datasets import DatasetDict

_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_OFFLINE_CONSTANTS = {
    "huggingface_hub.constants": ("HF_HUB_OFFLINE",),
    "datasets.config": ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
}
_TRUE = {"1", "ON", "YES", "TRUE"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


class DatasetUnreachable(Exception):
    """A data set is neither in the local caches nor downloadable; the message names it."""


def go_offline() -> None:
    """Disable the hub in this process and its children, so that only cached files are loaded."""
    # Children inherit the environment. The libraries read it only on import, so the constants of
    # libraries that are already imported must be set as well.
    os.environ.update(dict.fromkeys(_OFFLINE_VARIABLES, "1"))
    for module, names in _OFFLINE_CONSTANTS.items():
        if module in sys.modules:
            for name in names:
                setattr(sys.modules[module], name, True)


@contextmanager
def offline_switch_restored() -> Iterator[None]:
    """Undo `go_offline` at the end of the block, for a process that continues afterwards."""
    variables = {name: os.environ.get(name) for name in _OFFLINE_VARIABLES}
    constants = dict(_offline_constants())
    try:
        yield
    finally:
        for variable, value in variables.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value
        # A library imported during the block has read the switch of the block, so its constants
        # are set to the values for the restored environment.
        switched_off = any((value or "").upper() in _TRUE for value in variables.values())
        for key, _ in list(_offline_constants()):
            module, name = key
            setattr(sys.modules[module], name, constants.get(key, switched_off))


def _offline_constants() -> Iterator[tuple[tuple[str, str], object]]:
    """Yield the constants of the libraries that are already imported, with their values."""
    for module, names in _OFFLINE_CONSTANTS.items():
        if module in sys.modules:
            for name in names:
                yield (module, name), getattr(sys.modules[module], name, False)


def is_offline() -> bool:
    """Return whether the hub is switched off for this process."""
    # The constant instead of the variable, because the library acts on it and accepts more
    # spellings ("1", "ON", "YES", "TRUE").
    import huggingface_hub.constants

    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)


def is_reachable(timeout: float = 3.0) -> bool:
    """Return whether the hub answers within `timeout` seconds; False if it is switched off."""
    from huggingface_hub import constants, get_session

    if is_offline():
        return False
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # Error classes of the transport differ between versions of the hub.
        return False
    return bool(answer.status_code < 400)


def load_dataset(repository: str, config: str | None, **options: object) -> DatasetDict:
    """Load all splits of a data set, from the cache if the hub is switched off.

    Raises:
        DatasetUnreachable: the data set is neither cached nor downloadable.
    """
    import datasets

    try:
        return datasets.load_dataset(repository, config, **options)
    except Exception as error:  # Missing, gated, uncached and offline have no common base.
        raise unreachable_error(dataset_name(repository, config), error) from error


def has_cached_data_sets() -> bool:
    """Return whether any data set of the hub is in the local caches."""
    # Without importing `datasets` or a harness, so that an empty cache is known in milliseconds.
    from huggingface_hub import constants

    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    downloaded = Path(constants.HF_HUB_CACHE)
    return any(prepared.glob("*___*")) or any(downloaded.glob("datasets--*"))


def download_file(repository: str, file: str) -> Path:
    """Return the local path of one file of a data set's repository, downloading it if needed.

    Use it for parts of large data sets, because `load_dataset` with `data_files` does not find its
    own cache if the hub is switched off.

    Raises:
        DatasetUnreachable: the file is neither cached nor downloadable.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # As in `load_dataset`.
        raise unreachable_error(dataset_name(repository, file), error) from error


def dataset_name(repository: str, part: str | None) -> str:
    """Join a repository and its configuration or file into one name."""
    return f"{repository}/{part}" if part else repository


def commit_of(splits: Mapping[str, object]) -> str | None:
    """Return the commit of the loaded splits, or None if it is unknown."""
    # `datasets` does not store the commit in a split, but in the path of its cache file.
    for split in splits.values():
        for file in getattr(split, "cache_files", ()):  # A streamed split has none.
            commit = commit_in_path(file["filename"])
            if commit:
                return commit
    return None


def commit_in_path(path: str | Path) -> str | None:
    """Return the commit hash in a path of the hub's caches, or None."""
    found = _COMMIT.search(str(path))
    return found.group() if found else None


def unreachable_error(name: str, error: Exception) -> DatasetUnreachable:
    """Build the error, with a reason unless the hub is switched off, which is reason enough."""
    if is_offline():
        return DatasetUnreachable(name)
    reason = str(error).partition("\n")[0]
    return DatasetUnreachable(f"{name}: {type(error).__name__}: {reason}")


# Other subfolders and formats are not needed and not downloaded.
IGNORE_PATTERNS = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class HubRequest:
    """A repository of the hub, and how messages refer to it.

    `overrides` select it on the command line, and `local_key` is the key for a folder instead.
    """

    repository: str
    revision: str
    words: str
    overrides: str
    local_key: str


def hub_folder(
    request: HubRequest, patterns: list[str], *, offline: bool
) -> tuple[Path, str | None]:
    """Return the snapshot folder of a repository and its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = request.words
    try:
        folder = snapshot_download(
            request.repository,
            revision=request.revision,
            allow_patterns=patterns,
            ignore_patterns=IGNORE_PATTERNS,
            local_files_only=offline,
        )
    except HFValidationError:
        raise UserError(f"{name}: {request.repository} is not a name on the hub") from None
    # Order matters: GatedRepoError is a RepositoryNotFoundError, and all are HfHubHTTPErrors.
    except GatedRepoError:
        raise MissingData(f"{name} is gated: request access on the hub and log in") from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: this revision does not exist") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: it does not exist on the hub or is private, and is not a folder here"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError):
        raise MissingData(not_cached_message(request, offline=offline)) from None
    # Snapshot folders are named after the commit to which the revision resolves.
    return Path(folder), Path(folder).name


def not_cached_message(request: HubRequest, *, offline: bool) -> str:
    """Return a message that a repository is neither cached nor reachable, with the cure."""
    where = "and offline=true" if offline else "and the hub cannot be reached"
    return (
        f"{request.words} is not in the local cache {where}: run `bench prefetch "
        f"{request.overrides}` with network access, or set {request.local_key}=FOLDER"
    )


def hub_weight_bytes(request: HubRequest, *, offline: bool) -> float | None:
    """Return the size of a repository's weight files in bytes, None if the hub does not answer."""
    if offline:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = (
            HfApi()
            .model_info(request.repository, revision=request.revision, files_metadata=True)
            .siblings
        )
    except (HfHubHTTPError, ConnectionError, OSError):
        return None
    weights = [file for file in files or () if file.rfilename.endswith(".safetensors")]
    return float(sum(file.size or 0 for file in weights if "/" not in file.rfilename))
