"""Small images in the real layouts, a run and its bundle, and databases for studies."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import settings
from onnx import TensorProto, helper
from PIL import Image

from gn_transfer.files import sha256
from gn_transfer.inference.bundle_files import FORMAT, FORMAT_VERSION, GRAPH, METADATA, metadata_sha256

settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")

WriteImage = Callable[..., Path]
BUNDLE_CLASSES = ["red", "green", "blue"]
BUNDLE_SIZE = 8


def make_pixels(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth random colours, which JPEG keeps within a few levels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded images of a test go away with it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg_cache"))


@pytest.fixture
def write_image() -> WriteImage:
    """Write a small JPEG of random colours."""

    def write(path: Path, seed: int = 0, size: tuple[int, int] = (48, 40)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_pixels(*size, seed)).save(path, "JPEG", quality=95)
        return path

    return write


@pytest.fixture
def pets_root(tmp_path: Path, write_image: WriteImage) -> Path:
    """Three breeds in the layout of Oxford-IIIT Pet: 10 images each in trainval, 2 in test."""
    breeds = {1: "Abyssinian", 2: "american_bulldog", 3: "Maine_Coon"}
    base = tmp_path / "pets" / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split, numbers in (("trainval", range(1, 11)), ("test", range(11, 13))):
        lines = []
        for class_id, breed in breeds.items():
            for number in numbers:
                write_image(base / "images" / f"{breed}_{number}.jpg", seed=100 * class_id + number)
                lines.append(f"{breed}_{number} {class_id} {1 if breed[0].isupper() else 2} 1")
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "pets"


@pytest.fixture
def folder_root(tmp_path: Path, write_image: WriteImage) -> Path:
    """Class folders at the top: 8 apples, 4 pears."""
    for name, count in (("apple", 8), ("pear", 4)):
        for number in range(count):
            write_image(tmp_path / "fruit" / name / f"{number}.jpg", seed=number)
    return tmp_path / "fruit"


@pytest.fixture
def real_data() -> Path:
    """The folder of real images."""
    folder = os.environ.get("GN_TRANSFER_TEST_DATA")
    if not folder:
        pytest.skip("GN_TRANSFER_TEST_DATA is not set: no real images to test on")
    return Path(folder)


def _write_graph(path: Path) -> None:
    """Logits are the mean of each channel / 10: the brightest channel is the class."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
        helper.make_node("Div", ["means", "ten"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probs"], axis=1),
    ]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
        helper.make_tensor("ten", TensorProto.FLOAT, [], [10.0]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", BUNDLE_SIZE, BUNDLE_SIZE, 3])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("logits", "probs")]
    graph = helper.make_graph(nodes, "brightest", [images], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def _seal(folder: Path, **changes: object) -> None:
    """Write bundle.json as export would, with changes."""
    metadata: dict[str, object] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "classes": BUNDLE_CLASSES,
        "img_size": BUNDLE_SIZE,
        "crop_fraction": 0.875,
        "norm": "gn",
        "backbone": "none",
        "weights": "as trained",
        "files": {path.name: sha256(path) for path in folder.iterdir() if path.name != METADATA},
        **changes,
    }
    metadata["sha256"] = metadata_sha256(metadata)
    (folder / METADATA).write_text(json.dumps(metadata))


@pytest.fixture
def bundle_dir(tmp_path: Path) -> Path:
    """A bundle whose class is the brightest of three channels."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    _write_graph(folder / GRAPH)
    (folder / "README.md").write_text("a card")
    _seal(folder)
    return folder


@pytest.fixture
def seal() -> Callable[..., None]:
    """Write the bundle.json of a folder anew, with changes."""
    return _seal


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A server of our own on loopback, in a temporary folder."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("no PostgreSQL under /usr/lib/postgresql: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="pip install 'gn-transfer[postgresql]'")
    user = "postgres" if os.getuid() == 0 else None  # the server refuses root
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    if user:
        shutil.chown(folder, user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet: dict[str, Any] = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    data = str(folder / "data")
    subprocess.run([str(programs[-1]), "-D", data, "-A", "trust", "-U", "tester", "-N"], check=True, **quiet)
    command = [str(programs[-1].with_name("postgres")), "-D", data, "-p", str(port), "-k", str(folder)]
    server = subprocess.Popen([*command, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"], **quiet)
    url = f"postgresql://tester@127.0.0.1:{port}/postgres"
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        time.sleep(0.5)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database for one study: a file, and one on the server."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    base: str = request.getfixturevalue("postgresql")
    import psycopg

    name = f"t{random.randrange(10**9)}"
    with psycopg.connect(base, autocommit=True) as connection:
        connection.execute(f"create database {name}")
    return base.removesuffix("postgres") + name


@pytest.fixture(scope="session")
def exported_run(tmp_path_factory) -> Path:
    """What a run of one optimizer step over 30 images of noise leaves."""
    from gn_transfer.__main__ import main

    root = tmp_path_factory.mktemp("run")
    draw = np.random.default_rng(0)
    for number in range(30):
        folder = root / "images" / f"class {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    words = "--model.backbone resnetv2_18 --model.norm gn_ws --model.pretrained null --data.img_size 64"
    words += " --data.batch_size 4 --accumulation.effective_batch_size 4 --mixed_precision.mode fp32"
    words += " --trainer.max_epochs 1 --trainer.limit_train_batches 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("OMP_NUM_THREADS", "1")
        assert main(["fit", "--config", "folder.yaml", "--data.root", "images", *words.split()]) == 0
    return root


@pytest.fixture(scope="session")
def bundle(exported_run: Path) -> Path:
    """The bundle of that run."""
    from gn_transfer.__main__ import main

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(exported_run)
        assert main(["export", "checkpoints/folder/gn_ws-bs4-seed0/best.ckpt", "--output", "bundle"]) == 0
    return exported_run / "bundle"
