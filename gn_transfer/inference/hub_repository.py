"""A bundle as a repository of the Hugging Face hub, which ``timm.create_model("hf-hub:USER/NAME")`` loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors.torch import save
from torch import Tensor, nn

from gn_transfer.backbones.hub import answers
from gn_transfer.backbones.pretrained import ALIASES
from gn_transfer.config import ConfigError
from gn_transfer.data.preprocess import CROP_FRACTION
from gn_transfer.files import parse_json, read_text, write_json
from gn_transfer.inference.bundle_files import CARD, METADATA, seal
from gn_transfer.inference.load import load_for_training
from gn_transfer.inference.onnx_graph import plain

CONFIG = "config.json"
PLAIN_WEIGHTS = "timm.safetensors"
"""Weights for timm where it has no option for weight standardization: already standardized, for plain convolutions."""

_NORM_ARGUMENTS: tuple[dict[str, Any], ...] = ({}, {"norm_layer": "groupnorm"}, {"norm_layer": "groupnorm1"})
"""The norms that timm builds from words in a file: its own, GroupNorm of 32 groups, of one group."""

_OF_THE_CLIENT = ("huggingface_hub", "httpx", "requests")
_TOLERANCE = 1e-4
_OF_A_NEW_REPOSITORY = {".gitattributes", "README.md"}

_CARD = """\
---
library_name: timm
pipeline_tag: image-classification
tags: [timm, gn-transfer]
---
{card}
## In timm

```python
import timm

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
```
"""


def check_hub(repository: str) -> None:
    """Find out whether a bundle can be pushed, before minutes are spent on it.

    Args:
        repository: ``USER/NAME``.

    Raises:
        ConfigError: Not such a name, a hub that is unreachable, no token, or one that may not write there; a repository
            that holds something else than a bundle.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push_to_hub {repository}: {error}") from error
    if "/" not in repository:
        raise ConfigError(f"--push_to_hub {repository}: give USER/NAME, with your name on the hub.")
    if not answers():
        raise ConfigError(
            f"--push_to_hub: {constants.ENDPOINT} cannot be reached, or HF_HUB_OFFLINE is set. Export without it, and "
            "push when there is a network."
        )
    api = HfApi(endpoint=constants.ENDPOINT)
    with _explained(repository):
        user = api.whoami()
        try:
            there = {file.rfilename for file in api.model_info(repository).siblings or []}
        except RepositoryNotFoundError:
            there = set()
    owners = [user["name"], *(one["name"] for one in user.get("orgs", []))]
    if repository.split("/")[0] not in owners:
        raise ConfigError(f"--push_to_hub {repository}: your token is one of {', '.join(owners)}; give such a USER.")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError("--push_to_hub: your token may only read; log in with hf auth login and one that may write.")
    if there - _OF_A_NEW_REPOSITORY and METADATA not in there:
        raise ConfigError(
            f"--push_to_hub {repository} holds something that is no bundle ({', '.join(sorted(there)[:3])}), which "
            "would be overwritten; name a new repository."
        )


def push_bundle(folder: Path, repository: str) -> str:
    """Push a bundle in one commit; the repository is created where there is none.

    Args:
        folder: A bundle that classifies images, with its weights.
        repository: ``USER/NAME``.

    Returns:
        Address of the repository.

    Raises:
        ConfigError: timm cannot build the model from words in a file, or the hub refuses. The bundle stays as it is.
    """
    with TemporaryDirectory() as scratch:
        prepared = write_repository(folder, repository, Path(scratch) / "repository")
        api = HfApi(endpoint=constants.ENDPOINT)
        with _explained(repository):
            api.create_repo(repository, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=prepared,
                commit_message="Bundle of gn-transfer export",
                delete_patterns="*.safetensors",  # what an earlier bundle had and this one has not
            )
    return f"{constants.ENDPOINT}/{repository}"


def write_repository(folder: Path, repository: str, target: Path) -> Path:
    """Write the files of the repository: the bundle's, and ``config.json`` for timm.

    Args:
        folder: The bundle.
        repository: ``USER/NAME``, for the card.
        target: The folder to create; it is a bundle too.

    Returns:
        The folder.

    Raises:
        ConfigError: timm cannot build the model from words in a file.
    """
    task = load_for_training(folder).eval()
    assert task.model is not None
    metadata = parse_json(read_text(folder / METADATA))
    name, arguments, weights, built = find_arguments(task.model, metadata)
    shutil.copytree(folder, target)
    own: dict[str, Any] = built.pretrained_cfg  # type: ignore[assignment]
    config = {
        "architecture": name,
        "num_classes": len(metadata["classes"]),
        "num_features": built.num_features,
        "label_names": metadata["classes"],
        "model_args": {**arguments, "num_classes": len(metadata["classes"])},
        "pretrained_cfg": {
            "input_size": [3, metadata["img_size"], metadata["img_size"]],
            "crop_pct": CROP_FRACTION,
            "interpolation": "bilinear",
            "fixed_input_size": False,
            "mean": metadata["mean"],
            "std": metadata["std"],
            **{key: own[key] for key in ("first_conv", "classifier", "pool_size") if own.get(key) is not None},
            **({"hf_hub_filename": PLAIN_WEIGHTS} if weights is not None else {}),
        },
    }
    if weights is not None:
        contiguous = {key: tensor.contiguous() for key, tensor in weights.items()}
        (target / PLAIN_WEIGHTS).write_bytes(save(contiguous, metadata={"format": "pt"}))
    write_json(target / CONFIG, config)
    card = target / CARD
    card.write_text(_CARD.format(card=card.read_text(encoding="utf-8"), repository=repository), encoding="utf-8")
    seal(target, metadata)
    return target


def find_arguments(
    model: nn.Module, metadata: Mapping[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Tensor] | None, nn.Module]:
    """Find arguments from which timm builds a model that computes the same, by building it.

    Args:
        model: The trained model, in evaluation mode.
        metadata: What bundle.json says of it.

    Returns:
        timm's name of the architecture; the arguments; the weights where they are not those of the model itself; and
        what timm built.

    Raises:
        ConfigError: There are none.
    """
    wanted = metadata["architecture"]["architecture"]
    name, fixed = ALIASES.get(wanted, (wanted, {}))
    as_trained, standardized = model.state_dict(), plain(model).state_dict()
    images = torch.randn(2, 3, metadata["img_size"], metadata["img_size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images)
        for weights in (as_trained, standardized):
            for of_norm in _NORM_ARGUMENTS:
                arguments = {**fixed, **of_norm}
                try:
                    built = timm.create_model(name, num_classes=len(metadata["classes"]), **arguments).eval()
                    built.load_state_dict(weights)
                except (TypeError, RuntimeError, ValueError, AssertionError):
                    continue  # an argument that this model does not have, or channels that 32 does not divide
                if (built(images) - expected).abs().max() <= _TOLERANCE * max(1.0, float(expected.abs().max())):
                    return name, arguments, None if weights is as_trained else weights, built
    raise ConfigError(
        f"--push_to_hub: timm cannot build {metadata['backbone']} with norm {metadata['norm']} from words in a file "
        "(it knows BatchNorm, and GroupNorm of 32 groups or of one). Export without it; you may upload the folder of "
        "the bundle with hf upload, and load it with gn_transfer."
    )


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn the errors of the hub's client into ours."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ConfigError("--push_to_hub: there is no token; log in with hf auth login, or set HF_TOKEN.") from error
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _OF_THE_CLIENT:
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        refused = "refuses the token" if status in (401, 403) else f"answers {status}" if status else first_line
        raise ConfigError(
            f"--push_to_hub {repository}: {constants.ENDPOINT} {refused}. Log in with hf auth login as a user who may "
            "write there, and run the command again."
        ) from error
