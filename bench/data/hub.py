"""The Hugging Face hub as a source of data sets: reach it, stay off it, load, say which commit."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict

_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_CONSTANTS = {
    "huggingface_hub.constants": ("HF_HUB_OFFLINE",),
    "datasets.config": ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
}
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Unreachable(Exception):
    """A data set is neither in the local caches nor to be had from the hub; says which one."""


def go_offline() -> None:
    """Keep this process and its children off the hub: only what is cached can be loaded.

    The libraries read their environment variables once, when they are imported, so the constants
    of those imported already are set as well.
    """
    os.environ.update(dict.fromkeys(_SWITCHES, "1"))
    for module, names in _CONSTANTS.items():
        if module in sys.modules:
            for name in names:
                setattr(sys.modules[module], name, True)


def is_offline() -> bool:
    """Say whether the hub is switched off for this process."""
    import huggingface_hub.constants

    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)


def is_reachable(timeout: float = 3.0) -> bool:
    """Say whether the hub answers within `timeout` seconds; False when it is switched off."""
    from huggingface_hub import constants, get_session

    if is_offline():
        return False
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # the transport's own error classes differ between versions of the hub
        return False
    return bool(answer.status_code < 400)


def load(repository: str, config: str | None, **options: Any) -> DatasetDict:
    """Load every split of a data set, from the cache if the hub is off; else `Unreachable`."""
    import datasets

    try:
        return datasets.load_dataset(repository, config, **options)
    except Exception as error:  # missing, gated, uncached and unplugged share no base class
        raise unreachable(spell(repository, config), error) from error


def download(repository: str, file: str) -> Path:
    """Return one file of a data set's repository, from the cache if the hub is off.

    For a part of a large data set: `load` with `data_files` cannot find its own cache again when
    the hub is off.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # as in `load`
        raise unreachable(spell(repository, file), error) from error


def spell(repository: str, part: str | None) -> str:
    """Write a data set's repository and its configuration or file as one name."""
    return f"{repository}/{part}" if part else repository


def commit_of(splits: dict[str, Any]) -> str | None:
    """Return the commit that the loaded splits came from, as their cache files name it."""
    for split in splits.values():
        for file in getattr(split, "cache_files", ()):  # a streamed split has none
            commit = commit_in(file["filename"])
            if commit:
                return commit
    return None


def commit_in(path: str | Path) -> str | None:
    """Return the commit that names a folder of the caches."""
    found = _COMMIT.search(str(path))
    return found.group() if found else None


def unreachable(name: str, error: Exception) -> Unreachable:
    """Say which data set, and why unless the hub is off and the answer is plain."""
    if is_offline():
        return Unreachable(name)
    reason = str(error).partition("\n")[0]
    return Unreachable(f"{name}: {type(error).__name__}: {reason}")
