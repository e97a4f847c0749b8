"""A folder that is ready for a Hugging Face Space: page, bundle and the code that both need, without torch."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import gn_transfer
from gn_transfer.config import ConfigError
from gn_transfer.files import whole_folder
from gn_transfer.inference.bundle import Bundle
from gn_transfer.inference.bundle_files import METADATA, WEIGHTS

_NEEDED = ("gradio", "numpy", "onnxruntime", "opencv-python-headless", "pillow", "simplejpeg")

_APP = '''\
"""The page of the bundle in this folder."""

import os
from pathlib import Path

from gn_transfer import load_bundle
from gn_transfer.demo.heat_map import occlusion
from gn_transfer.demo.page import build_page, serve
from gn_transfer.inference.classification import ClassificationBundle

here = Path(__file__).parent
bundle = load_bundle(here / "bundle")
explain = occlusion(bundle) if isinstance(bundle, ClassificationBundle) else None
page = build_page(bundle, sorted(here.glob("examples/*")), explain, "occlusion")
serve(page, os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
'''

_README = """\
---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
---
The page of a [bundle](bundle/README.md) of gn-transfer, made by `gn-transfer demo --space`. It needs no GPU.
`gn_transfer/` is the code that made the bundle, under the licence Apache-2.0.
"""


def write_space(bundle: Bundle, examples: Sequence[Path], output: Path) -> None:
    """Write the folder.

    Args:
        bundle: The bundle; what only training needs stays behind.
        examples: Images to offer.
        output: The folder, which must be new or empty.

    Raises:
        ConfigError: It holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--space {output} exists and holds something; name a new folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(output) as folder:
        (folder / "app.py").write_text(_APP, encoding="utf-8")
        python = f"{sys.version_info.major}.{sys.version_info.minor}"  # the pins of requirements.txt are for it
        title = f"{bundle.metadata['backbone']} {bundle.metadata['norm']}"
        (folder / "README.md").write_text(
            _README.format(title=json.dumps(title), gradio=version("gradio"), python=python), encoding="utf-8"
        )
        pins = "".join(f"{name}=={version(name)}\n" for name in _NEEDED if name != "gradio")  # Spaces install their own
        (folder / "requirements.txt").write_text(pins, encoding="utf-8")
        shutil.copytree(
            Path(gn_transfer.__file__).parent,
            folder / "gn_transfer",
            ignore=shutil.ignore_patterns("__pycache__", "checkpoints", "configs"),
        )
        (folder / "bundle").mkdir()
        needed = [name for name in bundle.metadata["files"] if name != WEIGHTS]
        for name in (METADATA, *needed):
            shutil.copyfile(bundle.folder / name, folder / "bundle" / name)
        for number, path in enumerate(examples):
            target = folder / "examples" / f"{number}{path.suffix.lower()}"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
