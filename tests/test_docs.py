"""Every code block of the documentation runs, page by page, in the order in which a reader meets them.

Trainings are shortened: one epoch of two batches. A block that cannot run here has a comment before it,
``<!-- not run: why -->``.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from gn_transfer.__main__ import main

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "checkpoints/README.md",
]
NOT_RUN = ("not run", "the test command")
SHORT = {
    "--trainer.max_epochs": "1",
    "--trainer.limit_train_batches": "2",
    "--trainer.limit_val_batches": "1",
    "--mixed_precision.mode": "fp32",
}
OFFLINE = {"--model.backbone": "resnetv2_18", "--data.img_size": "64"}  # folder.yaml's own model needs the hub


class Block(NamedTuple):
    """A code block.

    Attributes:
        line: Where it begins.
        language: What stands behind the backticks.
        code: Its lines.
        note: The comment before it, or empty.
    """

    line: int
    language: str
    code: str
    note: str


def blocks(page: Path) -> list[Block]:
    """Find the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    matches = re.finditer(r"(?:<!-- ([^>]*) -->\n)?```(\w+)\n(.*?)```", text, flags=re.DOTALL)
    return [Block(text[: m.start()].count("\n") + 1, m[2], m[3], m[1] or "") for m in matches]


def run_shell(code: str) -> None:
    """Run the lines of a shell block that call gn-transfer, in process."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        program = Path(words.pop(0)).name
        assert program == "gn-transfer", f"{line}: mark the block as not run, or let it call gn-transfer"
        if words[0] == "fit":
            resumes = "--ckpt_path" in words
            given = {**SHORT, **({} if resumes or "folder.yaml" not in line else OFFLINE)}
            words += [word for key, value in given.items() if key not in words and not resumes for word in (key, value)]
        if words[0] == "sweep" and "--dry_run" not in words:
            words.append("--dry_run")
        if words[0] == "export":  # two images of noise, seen twice: no precision, and int8 may change both
            asked = {"--precision": "0.1", "--max_drop": "100"}
            words = [asked.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        if words[0] in ("data",) and "--model.backbone" not in words and words[1] != "sample":
            words += [word for pair in OFFLINE.items() for word in pair]
        assert main(words) == 0, line


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a reader has: photos of two classes, and the runs of the pages before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    generator = np.random.default_rng(0)
    for name in ("apple", "pear"):
        for number in range(1, 9):
            path = tmp_path / "photos" / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(path)
    return tmp_path


def earlier(page: Path, folder: Path) -> None:
    """Leave what earlier pages have left: a run of the photos, a run of the sample, a bundle."""
    needs = {"export.md": ["photos"], "studies.md": ["photos", "bn"], "README.md": []}.get(page.name, [])
    words = ["gn-transfer", "fit", "photos"]
    for need in needs:
        run_shell(shlex.join([*words, *(["--model.norm", "bn"] if need == "bn" else [])]))


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:Importing from|The given NumPy array|You are trying to:UserWarning")
@pytest.mark.filterwarnings("ignore:.* calibrated norms reproduce:UserWarning")  # of models without pretrained weights
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(not b.note.startswith(NOT_RUN) for b in blocks(page))],
    ids=lambda page: page.name,
)
def test_every_block_runs(page: Path, reader: Path) -> None:
    earlier(page, reader)
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for block in blocks(page):
        if block.note.startswith(NOT_RUN) or block.language == "text":
            continue
        if block.language == "yaml":
            (reader / block.note).write_text(block.code, encoding="utf-8")
        elif block.language == "sh":
            run_shell(block.code)
        else:
            assert block.language == "python", f"{page.name}:{block.line}: a block in {block.language}"
            exec(compile(shortened(block.code), f"{page.name}:{block.line}", "exec"), namespace)


def shortened(code: str) -> str:
    """Let a training of a page take two batches."""
    return re.sub(r"max_epochs=\d+,", "max_epochs=1, limit_train_batches=2, enable_progress_bar=False,", code)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:Importing from|The given NumPy array|You are trying to:UserWarning")
def test_the_notebook_runs(reader: Path) -> None:
    cells = json.loads((ROOT / "docs" / "from_folder_to_bundle.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [(number, "".join(cell["source"])) for number, cell in enumerate(cells) if cell["cell_type"] == "code"]
    namespace: dict[str, Any] = {"__name__": "__notebook__"}
    for number, source in code:
        exec(compile(shortened(source), f"cell {number}", "exec"), namespace)
    assert (reader / "bundle" / "bundle.json").is_file()
    assert (reader / "report.html").is_file()
    assert len(namespace["images"]) > 0


def test_blocks_that_do_not_run_say_why() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.note.startswith("not run"):
                assert re.fullmatch(r"not run: \w.{5,}", block.note), f"{page.name}:{block.line}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
