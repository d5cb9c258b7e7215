"""Repositories of models and adapters on the hub, and their copies in the local cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.errors import MissingData, UserError

# Weights in subfolders and in formats of different software would be downloaded in vain.
IGNORE_PATTERNS = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class HubRequest:
    """A repository of the hub, and how messages speak of it.

    `overrides` ask for it on the command line, and `local_key` takes a folder in its place.
    """

    repository: str
    revision: str
    words: str
    overrides: str
    local_key: str


def hub_folder(request: HubRequest, wanted: list[str], *, offline: bool) -> tuple[Path, str | None]:
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
            allow_patterns=wanted,
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
            f"{name}: it does not exist on the hub or is private, and is no folder here"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError):
        raise MissingData(not_cached_message(request, offline=offline)) from None
    # Snapshot folders are named by the commit that the revision resolved to.
    return Path(folder), Path(folder).name


def not_cached_message(request: HubRequest, *, offline: bool) -> str:
    """Say that a repository is neither cached nor reachable, and what to do about it."""
    where = "and offline=true" if offline else "and the hub cannot be reached"
    return (
        f"{request.words} is not in the local cache {where}: run `bench prefetch "
        f"{request.overrides}` with network access, or set {request.local_key}=FOLDER"
    )


def hub_weight_bytes(request: HubRequest, *, offline: bool) -> float | None:
    """Return the bytes of a repository's weight files, None if the hub does not answer."""
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
