"""Access to data sets on the Hugging Face hub: online or offline, with the commit they are from."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

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
    """Keep this process and its children off the hub, so that only cached files are loaded."""
    # Children inherit the environment. The libraries read it only once, when they are imported, so
    # the constants of those that are imported already have to be set as well.
    os.environ.update(dict.fromkeys(_OFFLINE_VARIABLES, "1"))
    for module, names in _OFFLINE_CONSTANTS.items():
        if module in sys.modules:
            for name in names:
                setattr(sys.modules[module], name, True)


@contextmanager
def offline_switch_restored() -> Iterator[None]:
    """Undo `go_offline` at the end of the block, for a process that goes on afterwards."""
    variables = {name: os.environ.get(name) for name in _OFFLINE_VARIABLES}
    constants = dict(_offline_constants())
    try:
        yield
    finally:
        for variable, value in variables.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value
        # A library that was imported during the block read the switch of the block, so its
        # constants are those that the restored environment would have given.
        switched_off = any((value or "").upper() in _TRUE for value in variables.values())
        for key, _ in list(_offline_constants()):
            module, name = key
            setattr(sys.modules[module], name, constants.get(key, switched_off))


def _offline_constants() -> Iterator[tuple[tuple[str, str], object]]:
    """Yield the constants of the libraries that are imported already, with their values."""
    for module, names in _OFFLINE_CONSTANTS.items():
        if module in sys.modules:
            for name in names:
                yield (module, name), getattr(sys.modules[module], name, False)


def is_offline() -> bool:
    """Tell whether the hub is switched off for this process."""
    # The constant and not the variable: it is what the library acts on, and it accepts more
    # spellings ("1", "ON", "YES", "TRUE") than a comparison here would.
    import huggingface_hub.constants

    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)


def is_reachable(timeout: float = 3.0) -> bool:
    """Tell whether the hub answers within `timeout` seconds; False if it is switched off."""
    from huggingface_hub import constants, get_session

    if is_offline():
        return False
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # the transport's own error classes differ between versions of the hub
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
    except Exception as error:  # missing, gated, uncached and unplugged share no base class
        raise unreachable_error(dataset_name(repository, config), error) from error


def has_cached_data_sets() -> bool:
    """Return whether any data set of the hub is in the local caches."""
    # Imports neither `datasets` nor a harness: an empty cache is known in milliseconds.
    from huggingface_hub import constants

    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    downloaded = Path(constants.HF_HUB_CACHE)
    return any(prepared.glob("*___*")) or any(downloaded.glob("datasets--*"))


def download_file(repository: str, file: str) -> Path:
    """Return the local path of one file of a data set's repository, downloading it if needed.

    Use it for a part of a large data set: `load_dataset` with `data_files` does not find its own
    cache again when the hub is switched off.

    Raises:
        DatasetUnreachable: the file is neither cached nor downloadable.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # as in `load_dataset`
        raise unreachable_error(dataset_name(repository, file), error) from error


def dataset_name(repository: str, part: str | None) -> str:
    """Join a repository and its configuration or file into one name."""
    return f"{repository}/{part}" if part else repository


def commit_of(splits: Mapping[str, object]) -> str | None:
    """Return the commit that the loaded splits came from, or None if it is unknown."""
    # `datasets` keeps no commit on a loaded split, but puts it into the path of the cache file.
    for split in splits.values():
        for file in getattr(split, "cache_files", ()):  # a streamed split has none
            commit = commit_in_path(file["filename"])
            if commit:
                return commit
    return None


def commit_in_path(path: str | Path) -> str | None:
    """Return the commit hash in a path of the hub's caches, or None."""
    found = _COMMIT.search(str(path))
    return found.group() if found else None


def unreachable_error(name: str, error: Exception) -> DatasetUnreachable:
    """Build the error; it gives a reason unless the hub is switched off, which is reason enough."""
    if is_offline():
        return DatasetUnreachable(name)
    reason = str(error).partition("\n")[0]
    return DatasetUnreachable(f"{name}: {type(error).__name__}: {reason}")
