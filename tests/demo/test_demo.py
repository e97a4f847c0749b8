"""``gn-transfer demo`` in headless Chromium, and the folder for a Space, which runs without torch."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from gn_transfer import load_bundle
from gn_transfer.__main__ import main
from gn_transfer.demo.heat_map import laid_over, occlusion, scaled
from gn_transfer.inference.bundle_files import CARD, METADATA, metadata_sha256, seal

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def served(command: list[str], port: int, folder: Path) -> Iterator[str]:
    """Run a server of the page; gives its address."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder),
    }
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            for _ in range(1200):
                if process.poll() is not None or "page http" in (folder / "log").read_text():
                    break
                time.sleep(0.1)
            assert process.poll() is None, (folder / "log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture
def browser():
    """Headless Chromium, which records what it asks the network for."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,1400", "--disable-background-networking"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def hostile_copy(bundle: Path, target: Path) -> Path:
    """A bundle whose texts would fetch images and show a form, if a page took them for Markdown or HTML."""
    shutil.copytree(bundle, target)
    texts = "![a](http://127.0.0.1:9/a.png) <img src='http://127.0.0.1:9/b.png'> <form><input id='stolen'></form>"
    with (target / "README.md").open("a") as card:
        card.write(texts)
    metadata = json.loads((target / "bundle.json").read_text())
    seal(target, {**metadata, "backbone": texts})
    return target


def test_the_page_in_a_browser(bundle, browser, tmp_path, exported_run):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def text(element: str) -> str:
        return browser.find_element(By.CSS_SELECTOR, element).text

    def wait_for(condition):
        return WebDriverWait(browser, 60, ignored_exceptions=[Exception]).until(lambda _: condition())

    def upload(path: Path) -> None:
        wait_for(lambda: browser.find_element(By.CSS_SELECTOR, "#upload input[type=file]")).send_keys(str(path))

    hostile = hostile_copy(bundle, tmp_path / "hostile")
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "gn_transfer", "demo", str(hostile), "--port", str(port)]
    with served([*command, "--data.root", str(exported_run / "images")], port, tmp_path) as address:
        browser.get(address)
        photo = exported_run / "images" / "class 0" / "0.png"
        [prediction] = load_bundle(bundle).predict([photo])
        upload(photo)
        wait_for(lambda: prediction.label in text("#classes"))
        assert f"{prediction.prob:.0%}" in text("#classes")
        wait_for(lambda: browser.find_element(By.CSS_SELECTOR, "#heat img"))
        assert "Grad-CAM" in text("#heat")
        assert len(browser.find_elements(By.CSS_SELECTOR, "#examples img")) == 6  # the validation images

        browser.find_element(By.CSS_SELECTOR, "#upload button[aria-label='Remove this file'], #upload button").click()
        wait_for(lambda: not browser.find_elements(By.CSS_SELECTOR, "#seen img"))
        (tmp_path / "text.jpg").write_text("This is no image, whatever its name says.")
        upload(tmp_path / "text.jpg")
        wait_for(lambda: "cannot be read" in text("#status"))
        assert "not an image" in text("#status")
        assert not browser.find_elements(By.CSS_SELECTOR, "#seen img")

        browser.find_elements(By.CSS_SELECTOR, "#examples img")[0].click()
        wait_for(lambda: "class " in text("#classes"))
        assert text("#status") == ""
        assert "<img src=" in text("h1")  # as text
        browser.find_element(By.CSS_SELECTOR, "#card button").click()
        card = wait_for(lambda: browser.find_element(By.CSS_SELECTOR, "#card textarea")).get_attribute("value")
        assert "<img src=" in card
        assert not browser.find_elements(By.ID, "stolen")
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]  # this machine alone


WITHOUT_TORCH = """
import runpy, sys
sys.path.insert(0, ".")
for name in ("torch", "timm", "lightning", "scipy", "onnx"):
    sys.modules[name] = None
import gn_transfer, pathlib
assert pathlib.Path(gn_transfer.__file__).parent == pathlib.Path("gn_transfer").resolve()
runpy.run_path("app.py")
"""


def test_a_space_answers_without_torch(bundle, exported_run, tmp_path, monkeypatch, capsys):
    from gradio_client import Client, handle_file

    monkeypatch.chdir(exported_run)
    space = tmp_path / "space"
    assert main(["demo", str(bundle), "--space", str(space), "--data.root", "images"]) == 0
    assert not list(space.rglob("*.safetensors"))
    assert len(list((space / "examples").iterdir())) == 6
    assert (space / "README.md").read_text().startswith('---\ntitle: "resnetv2_18 gn_ws"\nsdk: gradio\nsdk_version: ')
    assert "onnxruntime==" in (space / "requirements.txt").read_text()
    assert "torch" not in (space / "requirements.txt").read_text()
    assert f'python_version: "3.{sys.version_info.minor}"' in (space / "README.md").read_text()
    photo = exported_run / "images" / "class 1" / "1.png"
    [prediction] = load_bundle(bundle).predict([photo])
    with served([sys.executable, "-W", "ignore", "-c", WITHOUT_TORCH], free_port(), space) as address:
        client = Client(address, verbose=False)
        status, classes, *_ = client.predict(handle_file(photo), api_name="/answer_file")
        assert classes["label"] == prediction.label
        assert classes["confidences"][0]["confidence"] == pytest.approx(prediction.prob, abs=1e-4)
        assert not status
        client.close()
    assert main(["demo", str(bundle), "--space", str(space)]) == 2
    assert "exists and holds something; name a new folder" in capsys.readouterr().err


PAGE = """
import json, sys
from gn_transfer import load_bundle
from gn_transfer.demo.page import build_page
print(json.dumps(build_page(load_bundle(sys.argv[1])).get_config_file(), default=str))
"""


def test_no_card_is_shown_that_the_bundle_does_not_list(bundle, tmp_path):
    def shown(folder: Path) -> str:
        command = [sys.executable, "-W", "ignore", "-c", PAGE, str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (tmp_path / "secret").write_text("root:x:0")
    metadata = json.loads((copy / METADATA).read_text())
    del metadata["files"][CARD]
    metadata["sha256"] = metadata_sha256(metadata)
    (copy / METADATA).write_text(json.dumps(metadata))
    (copy / CARD).unlink()
    (copy / CARD).symlink_to(tmp_path / "secret")
    assert "Model card" in shown(bundle)
    assert "Model card" not in (page := shown(copy))
    assert "root:x:0" not in page


def test_a_port_in_use(bundle, capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert main(["demo", str(bundle), "--port", str(port)]) == 2
    assert f"--port {port} cannot be listened on: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "0"], "--port=0 is out of range"),
        (["--data.root", "nowhere"], "nowhere"),
        (["--host", "no.such.host.invalid"], "cannot be listened on"),
    ],
)
def test_bad_options(bundle, capsys, words, message):
    assert main(["demo", str(bundle), *words]) == 2
    assert message in capsys.readouterr().err


def test_without_gradio(bundle, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "gn_transfer.demo.page", raising=False)
    assert main(["demo", str(bundle)]) == 2
    assert "demo needs gradio: pip install 'gn-transfer[demo]'" in capsys.readouterr().err


class Bright:
    """Says how bright the top left quarter is."""

    def logits_and_probs(self, squares):
        corner = squares[:, :32, :32].mean((1, 2, 3))
        return np.stack([corner, -corner], axis=1).astype(np.float32), None


def test_occlusion_finds_what_decides():
    square = np.zeros((64, 64, 3), np.uint8)
    square[:32, :32] = 250
    heat = occlusion(Bright())(square, 0)
    assert heat.shape == (64, 64)
    assert heat[8:24, 8:24].mean() > 0.8
    assert heat[40:, 40:].max() < 0.05
    assert laid_over(square, heat).shape == square.shape
    assert scaled(np.zeros((7, 7)), 64).max() == 0


@pytest.mark.parametrize("name", ["resnetv2_18", "tf_efficientnet_lite0", "resnet18"])
def test_grad_cam_takes_the_last_feature_map(name):
    import timm

    from gn_transfer.demo.grad_cam import last_feature_map

    model = timm.create_model(name, num_classes=3).eval()
    shapes = []
    layer = last_feature_map(model, torch.zeros(1, 3, 64, 64))
    layer.register_forward_hook(lambda layer, inputs, output: shapes.append(output.shape))
    model(torch.zeros(1, 3, 64, 64))
    assert tuple(shapes[0]) == (1, model.num_features, 2, 2)


class Brightness(torch.nn.Module):
    """Class 0 is bright, class 1 is dark: the mean of a coarse map of brightness, and its negative."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse = torch.nn.AvgPool2d(8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = self.coarse(images.mean(1, keepdim=True)).mean((1, 2, 3))
        return torch.stack([mean, -mean], dim=1)


def test_grad_cam_points_at_what_decides(monkeypatch):
    from gn_transfer.demo import grad_cam

    task = SimpleNamespace(model=Brightness(), normalize=lambda pixels: pixels.float() / 255)
    task.eval = lambda: task
    monkeypatch.setattr(grad_cam, "load_for_training", lambda folder: task)
    square = np.zeros((64, 64, 3), np.uint8)
    square[:32, 32:] = 250
    heat = grad_cam.grad_cam(Path("bundle"))(square, 0)
    assert heat.shape == (64, 64)
    assert heat[8:24, 40:56].mean() > 0.9
    assert max(heat[40:].max(), heat[:, :24].max()) < 0.1
    assert grad_cam.grad_cam(Path("bundle"))(square, 1).max() == 0  # brightness speaks against the class


def test_grad_cam_of_a_bundle(exported_run, bundle):
    from gn_transfer.demo.grad_cam import grad_cam

    square = np.asarray(Image.open(exported_run / "images" / "class 0" / "0.png").resize((64, 64)))
    maps = [grad_cam(bundle)(square, number) for number in range(3)]
    assert all(heat.shape == (64, 64) and 0 <= heat.min() <= heat.max() <= 1 for heat in maps)
    assert not np.array_equal(maps[0], maps[1])
