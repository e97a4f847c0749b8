"""Weights files of the Hugging Face hub: from its cache, or downloaded whole or not at all, or a message that helps."""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name

from gn_transfer.config import ConfigError
from gn_transfer.files import sha256

FILES = ("model.safetensors", "pytorch_model.bin")
"""Names under which timm's repositories hold their weights, the safe one first."""

ANSWER_S = 4.0
"""Time in which the hub must answer at all, in seconds."""

SILENCE_S = 5
"""Longest silence of the hub before a read is tried again, in seconds; HF_HUB_DOWNLOAD_TIMEOUT overrules it."""


def fetch(repository: str, source_name: str) -> Path:
    """Find a repository's weights in the hub's cache, or download them.

    Args:
        repository: ``timm/resnet18.a1_in1k``, with ``@revision`` behind it where one is meant.
        source_name: What to call the weights in messages.

    Returns:
        Path of the file in the cache; where the hub stated its sha256, the file has it.

    Raises:
        ConfigError: Not in the cache, and the hub is unreachable, silent, lacks the file or sent something else.
    """
    repository, _, revision = repository.partition("@")
    # Without a network the hub's client tries for a minute; told to look into its cache only, it answers at once.
    reachable = answers()
    error: Exception | None = None
    for name in FILES:
        try:
            with _impatient():
                path = hf_hub_download(repository, name, revision=revision or None, local_files_only=not reachable)
        except Exception as caught:  # the client raises its own errors, those of its HTTP library, and OSError
            # A hub that lacks one name may have the other; whatever else is wrong is wrong with both.
            error = error if error is not None and _is_missing(caught) else caught
            if reachable and not _is_missing(caught):
                break
        else:
            return _verified(Path(path), source_name)
    assert error is not None
    if reachable:
        _sweep(repository)
    raise ConfigError(
        f"model.pretrained: the weights {source_name} are not on this machine and could not be downloaded: "
        f"{_reason(error, reachable)}. With a network, run the command again; without one, copy "
        f"{constants.ENDPOINT}/{repository}/resolve/main/{FILES[0]} here from elsewhere and set model.pretrained to "
        "its path, or train from scratch with model.pretrained=null."
    ) from error


def in_cache(repository: str) -> bool:
    """Say whether a repository's weights are in the hub's cache; asks no network."""
    repository, _, revision = repository.partition("@")
    for name in FILES:
        try:
            hf_hub_download(repository, name, revision=revision or None, local_files_only=True)
        except OSError:  # all of the client's "not here" are
            continue
        return True
    return False


def forget(path: Path) -> None:
    """Remove a file from the hub's cache, so that it is downloaded again.

    Args:
        path: As :func:`fetch` gave it: a link to the content.
    """
    content = path.resolve()
    path.unlink(missing_ok=True)
    content.unlink(missing_ok=True)


def _verified(path: Path, source_name: str) -> Path:
    """Compare a file with the checksum that the hub stated; the cache names the content by it."""
    stated = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", stated):
        found = sha256(path)
        if found != stated:
            forget(path)
            raise ConfigError(
                f"model.pretrained: the weights {source_name} have sha256 {found[:12]}... instead of the "
                f"{stated[:12]}... that {constants.ENDPOINT} states; they were removed. Run the command again, or copy "
                "the file here from elsewhere and set model.pretrained to its path."
            )
    return path


def _sweep(repository: str) -> None:
    """Remove what an interrupted download left of a repository's files."""
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "blobs"
    for part in blobs.glob("*.incomplete"):
        part.unlink(missing_ok=True)


def _is_missing(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, EntryNotFoundError) or (isinstance(error, HfHubHTTPError) and status == 404)


def _reason(error: Exception, reachable: bool) -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if not reachable:
        return f"{constants.ENDPOINT} does not answer"
    cause = error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status is not None:
        return f"{constants.ENDPOINT} answers {status} for {' and '.join(FILES) if status == 404 else FILES[0]}"
    first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
    return f"{constants.ENDPOINT}: {type(cause).__name__}: {first_line}"


@contextmanager
def _impatient() -> Iterator[None]:
    before = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if "HF_HUB_DOWNLOAD_TIMEOUT" not in os.environ:
        constants.HF_HUB_DOWNLOAD_TIMEOUT = SILENCE_S
    try:
        yield
    finally:
        constants.HF_HUB_DOWNLOAD_TIMEOUT = before


def answers() -> bool:
    """Say whether the hub can be asked: it answers within :data:`ANSWER_S`, and nothing forbids to ask."""
    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)


def _answers(url: str) -> bool:
    """Say whether a server answers at all, within :data:`ANSWER_S`."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_S):
            return True
    except urllib.error.HTTPError:
        return True  # an answer, if not the one hoped for
    except (OSError, ValueError, http.client.HTTPException):  # ValueError: no address, such as one without https://
        return False
