"""Models on the Hugging Face hub, through huggingface_hub, which is imported when one is asked for.

A hub id is `owner/name`, or `owner/name@revision` for a branch, a tag or a commit. The hub's own cache, environment
variables (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE) and login apply. What was downloaded once loads without a network. A
mistyped path may look like an id, so callers `warn` before anything is asked.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from purifyloader.errors import CheckpointError, InputError

__all__ = ["download", "files", "is_hub_id", "parse", "warn"]

log = logging.getLogger("purifyloader")

# the hub's own rule for names; a revision may be a branch with slashes, and by git's rule no part of it begins with a
# dot, nor are there two dots together
_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_REVISION = re.compile(r"(?!.*\.\.)\w[\w.+-]*(?:/[\w+-][\w.+-]*)*", re.ASCII)
_ID = re.compile(rf"(?P<repository>{_NAME}/{_NAME})(?:@(?P<revision>{_REVISION.pattern}))?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Tell whether `name` is written like a hub id. The network is not asked."""
    return _ID.fullmatch(name) is not None


def parse(hub_id: str) -> tuple[str, str | None]:
    """Split a hub id into repository and revision; `InputError` if it is not written like one."""
    match = _ID.fullmatch(hub_id)
    if match is None:
        raise InputError(f"A model on the hub is given as owner/name or owner/name@revision. Got {hub_id!r}.")
    return match["repository"], match["revision"]


def warn(hub_id: str) -> None:
    """Warn that a name is taken for a hub id, before the hub is asked: it may have been meant as a path."""
    log.warning("no folder %s here: taking it from the hub", hub_id)


def download(repository: str, revision: str | None, names: Sequence[str]) -> Path:
    """Return a folder with those of the files `names` that the repository has; its own name is the commit.

    Without a network, what an earlier download left is used. `InputError` for no possible revision (None is the main
    branch); `CheckpointError` for no such repository or revision, no access, or no network and nothing there from
    before.
    """
    _check_revision(revision)
    from huggingface_hub import snapshot_download  # half a second, for those who use the hub

    try:
        # a name is a pattern to the hub's client: brackets of a name must not be read as one
        patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in names]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # its errors are of httpx, of requests or its own, by version
        raise _explained(repository, revision, error) from error


def files(repository: str, revision: str | None) -> list[str]:
    """List the paths of all files of a repository, sorted. Needs the network; raises as `download`."""
    _check_revision(revision)
    from huggingface_hub import HfApi

    try:
        return sorted(HfApi().list_repo_files(repository, revision=revision))
    except Exception as error:
        raise _explained(repository, revision, error) from error


def _check_revision(revision: str | None) -> None:
    if revision is not None and _REVISION.fullmatch(revision) is None:
        raise InputError(f"A revision on the hub is a branch, a tag or a commit. Got {revision!r}.")


def _explained(repository: str, revision: str | None, error: Exception) -> CheckpointError:
    from huggingface_hub import errors

    what = f"{repository}@{revision}" if revision is not None else repository
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    got = f"{type(error).__name__}: {first[:200]}"
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{what!r} must be a model on the hub that you may read. Got: access to it must be asked for. Ask for it "
            "on its page, log in with `hf auth login`, and load it again."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{what!r} must be a folder here, or a public model on the hub. Got no such folder, and the hub says that "
            "there is no such model, or that it is private. Check the spelling, or log in with `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{repository!r} on the hub must have the revision {revision!r}. Got none of that name. Give a branch, a "
            "tag or a commit of it."
        )
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(f"A model on the hub is owner/name. Got {what!r}: {first}")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return CheckpointError(f"Could not store {what!r} in the cache of the hub. Got {got}. Is the disk full?")
    return CheckpointError(
        f"{what!r} must be a folder here, or a model on the hub. Got no such folder, and "
        + ("HF_HUB_OFFLINE forbids the network" if offline else f"the hub could not be reached ({got})")
        + ", nor was it downloaded before. Check the path and the network, or download the model on another machine "
        "and give its folder."
    )
