"""``gn-transfer compare`` on made-up runs."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from fabricate import fabricate

from gn_transfer.__main__ import main
from gn_transfer.comparison import compare, write_report
from gn_transfer.comparison.answer import answer
from gn_transfer.comparison.checks import too_many_contrasts
from gn_transfer.comparison.figures import batch_panels
from gn_transfer.comparison.grouping import group_runs, shown
from gn_transfer.comparison.importance import anova, importances
from gn_transfer.comparison.tables import as_text, group_count_tables
from gn_transfer.config import ConfigError
from gn_transfer.report.runs import Run


def two_norms(root: Path, seeds: int = 5, **options) -> Path:
    for seed in range(seeds):
        fabricate(root, "gn_ws", 1, seed, 0.7 + 0.025 * (seed % 2), **options)
        fabricate(root, "bn", 1, seed, 0.4, **options)
    return root


def failure(capsys, *arguments: str) -> str:
    assert main(["compare", *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


def test_runs_that_chose_their_micro_batch_stand_where_they_trained(tmp_path):
    for seed in range(3):
        fabricate(tmp_path / "runs", "gn_ws", "auto", seed, 0.7, micro_batch_size=8, images_per_sec=30.0)
        fabricate(tmp_path / "runs", "gn_ws", 1, seed, 0.7)
    report = compare([tmp_path / "runs"])
    assert {group.runs[0].settings["batch_size"]: group.n for group in report.groups} == {"auto": 3, 1: 3}
    write_report(report, tmp_path / "report")
    assert "batch auto" in (tmp_path / "report" / "index.html").read_text()


def test_two_norms_by_hand(tmp_path):
    report = compare([two_norms(tmp_path)])
    bn, gn_ws = report.groups
    assert (bn.label, bn.n, bn.mean, bn.sd) == ("bn", 5, pytest.approx(0.4), pytest.approx(0))
    assert (gn_ws.mean, gn_ws.n) == (pytest.approx(0.71), 5)
    assert gn_ws.low < 0.71 < gn_ws.high
    [contrast] = report.contrasts
    assert (contrast.group, contrast.baseline, contrast.against) == (gn_ws, bn, "bn")
    assert contrast.difference == pytest.approx(0.31)
    assert (contrast.test.p, contrast.p_holm, contrast.test.exact) == (0.0625, 0.0625, True)
    assert report.metric == "test/acc1"
    assert report.grouping.equal["num_groups"] == 32  # it does not apply to bn, so the groups do not differ in it
    text = as_text(report)
    assert "71.00" in text
    assert "0.0625" in text
    for said in (
        "The runs start from different weights: bn from gn_transfer:resnetv2_18.bn (pretrained on Tiny-ImageNet)",
        "one pretraining per norm",
        "BiT weights were pretrained on ImageNet-21k",
        "Fewer than 6 seeds",
        "cannot give a p-value below 0.062",
    ):
        assert said in text
    assert "Holm's correction over" not in text  # one contrast needs no correction


def test_holms_correction_limits_what_several_contrasts_can_show():
    assert too_many_contrasts(1, 0.0625) == []
    assert too_many_contrasts(4, 0.0078) == []
    [said] = too_many_contrasts(2, 0.0312)
    assert "Holm's correction over 2 contrasts" in said
    assert "no p-value can be below 0.062" in said


def test_json_and_csv_go_to_standard_output(tmp_path, capsys):
    two_norms(tmp_path)
    assert main(["compare", str(tmp_path), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [group["mean"] for group in found["groups"]] == pytest.approx([0.4, 0.71])
    assert found["contrasts"][0]["p"] == 0.0625
    assert main(["compare", str(tmp_path), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["norm"], row["n"]) for row in rows] == [("bn", "5"), ("gn_ws", "5")]


def test_the_page_stands_alone_and_all_files_are_there(tmp_path, write_image):
    images = tmp_path / "images"
    for number in range(40):
        write_image(images / f"est_{number}.jpg", seed=number)
    output = tmp_path / "report"
    two_norms(tmp_path / "runs", data_root=str(images))
    for seed in range(5):
        fabricate(tmp_path / "runs", "bn", 4, seed, 0.5, data_root=str(images))
        fabricate(tmp_path / "runs", "gn_ws", 4, seed, 0.7, data_root=str(images))
    notes = ["learning rates chosen before"]
    write_report(compare([tmp_path / "runs"], title="BN & GN <at batch 1>", notes=notes), output)
    page = (output / "index.html").read_text()
    assert "BN &amp; GN &lt;at batch 1&gt;" in page
    assert "learning rates chosen before" in page
    assert "data:image/jpeg;base64," in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert not re.findall(r"@import|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)
    drawn = {path.stem for path in (output / "figures").iterdir()}
    assert drawn == {"batch_size", "groups", "curves", "parallel", "importance", "classes"}
    assert all("<svg" in (output / "figures" / f"{name}.svg").read_text() for name in drawn)
    assert "| gn_ws | 1 | 5 | 71.00 |" in (output / "table.md").read_text()
    with (output / "rows.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 20
    assert json.loads((output / "report.json").read_text())["metric"] == "test/acc1"


def test_a_baseline_is_matched_in_all_other_settings(tmp_path):
    for norm in ("bn", "bn_frozen", "gn_ws"):
        for batch_size in (1, 4):
            for seed in range(2):
                fabricate(tmp_path, norm, batch_size, seed, 0.5)
    found = {
        (c.group.label, c.baseline.label) for c in compare([tmp_path], baseline={"model.norm": "bn_frozen"}).contrasts
    }
    assert found == {
        ("bn, batch 1", "bn_frozen, batch 1"),
        ("bn, batch 4", "bn_frozen, batch 4"),
        ("gn_ws, batch 1", "bn_frozen, batch 1"),
        ("gn_ws, batch 4", "bn_frozen, batch 4"),
    }
    one = compare([tmp_path], baseline={"norm": "bn", "batch_size": "1"})
    assert {contrast.baseline.label for contrast in one.contrasts} == {"bn, batch 1"}
    assert len(one.contrasts) == 5
    some = compare([tmp_path], where={"batch_size": "1", "norm": "bn|gn_ws"})
    assert [group.label for group in some.groups] == ["bn", "gn_ws"]


def test_each_arm_has_its_contrast_whatever_the_learning_rates_chosen_for_it(tmp_path):
    for seed in range(2):
        for arm, norm, lr in (("A", "bn", 0.03), ("A", "gn_ws", 0.01), ("B", "bn", 0.01), ("B", "gn_ws", 0.001)):
            fabricate(tmp_path, norm, 16, seed, effective_batch_size=16, config={"lr": lr}, arm=arm, stage="final")
    report = compare([tmp_path])
    assert [(c.group.label, c.against) for c in report.contrasts] == [
        ("gn_ws, arm A", "bn"),
        ("gn_ws, arm B", "bn"),
    ]
    fabricate(tmp_path, "gn_ws", 4, 0, effective_batch_size=16, arm="A", stage="final")
    assert any("the same settings: gn_ws, batch 4, arm A." in note for note in compare([tmp_path]).notes)


def test_runs_on_which_a_study_chose_do_not_count(tmp_path):
    for seed in range(2):
        fabricate(tmp_path, "bn", seed=seed, stage="final")
        fabricate(tmp_path, "bn", seed=8 + seed, tested=False, stage="select")
    report = compare([tmp_path])
    assert (len(report.runs), report.metric) == (2, "test/acc1")
    assert "2 runs on which a study made its choices are left out." in report.notes
    assert len(compare(sorted(tmp_path.glob("*seed[89]"))).runs) == 2


def test_final_runs_of_a_study_that_chose_again_do_not_count(tmp_path):
    kept = [fabricate(tmp_path, "bn", seed=seed, stage="final") for seed in range(2)]
    for seed in range(3):
        fabricate(tmp_path, "gn_ws", seed=seed, stage="final")
    assert len(compare([tmp_path]).runs) == 5
    study = {"title": "A study", "notes": [], "final_runs": [folder.name for folder in kept]}
    (tmp_path / "study.json").write_text(json.dumps(study))
    report = compare([tmp_path])
    assert {run.folder for run in report.runs} == set(kept)
    assert "3 runs with values that their study no longer chooses are left out." in report.notes


def test_settings_that_others_determine_are_no_groups_of_their_own(tmp_path):
    for seed in range(2):
        fabricate(tmp_path, "bn", 1, seed, config={"lr": 0.001})
        fabricate(tmp_path, "gn_ws", 1, seed, config={"lr": 0.003})
    report = compare([tmp_path])
    assert report.grouping.keys == ["norm"]
    assert report.grouping.tied == ["lr"]
    assert "lr differs too: 0.001 for bn; 0.003 for gn_ws." in report.notes


def test_runs_of_the_same_seed_are_averaged(tmp_path):
    for accuracy in (0.5, 0.7):
        fabricate(tmp_path, "gn", 1, 0, accuracy)
    [group] = compare([tmp_path]).groups
    assert (group.n, group.mean, group.sd) == (1, pytest.approx(0.6), None)


def test_pairs_are_runs_of_the_same_seed(tmp_path):
    for seed in range(5):
        fabricate(tmp_path, "bn", 1, seed, 0.4 + 0.05 * seed)
    for seed in (6, 4, 3, 2):
        fabricate(tmp_path, "gn_ws", 1, seed, 0.5 + 0.05 * seed)
    [contrast] = compare([tmp_path]).contrasts
    assert contrast.test.pairs == 3
    assert contrast.difference == pytest.approx(0.1)


def test_predictions_that_contradict_the_stored_figure_are_not_used(tmp_path):
    for seed in range(2):
        fabricate(tmp_path, "bn", 1, seed, 0.5)
        fabricate(tmp_path, "gn_ws", 1, seed, 0.5, **{"test/acc1": 0.75})
    report = compare([tmp_path])
    assert {run.parent.name + "/" + run.name for run in report.predictions} == {
        f"{tmp_path.name}/bn-bs1-seed{seed}" for seed in range(2)
    }
    assert any("2 of 4 runs hold no predictions per image" in note for note in report.notes)


def test_one_metric_for_all(tmp_path):
    two_norms(tmp_path, seeds=2)
    last = fabricate(tmp_path, "bn", 1, 2, tested=False)
    report = compare([tmp_path])
    assert report.metric == "val/acc1"
    assert "1 of 5 runs have not been tested" in report.metric_note
    with pytest.raises(ConfigError, match=r"--metric test/acc1: made_up/bn-bs1-seed2 have no such figure"):
        compare([tmp_path], metric="test/acc1")
    with pytest.raises(ConfigError, match="did you mean 'val/acc1'"):
        compare([tmp_path], metric="val/acc")
    metrics = json.loads((last / "metrics.json").read_text())
    (last / "metrics.json").write_text(
        json.dumps(metrics | {"test/acc1": 0.6, "test/checkpoint": "last.ckpt", "test_split": "the test images"})
    )
    assert "different checkpoints: best.ckpt, last.ckpt" in compare([tmp_path]).metric_note


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"test_split": "others"}, "the list of test images differs: the test images in"),
        ({"samples_seen": 1616}, "samples_seen differs: 1600 in"),
        ({"tested": False, "val_split": "others"}, "the list of validation images of seed 0 differs"),
        ({"classes": 5}, "the number of classes differs: None in"),
    ],
)
def test_what_is_not_comparable_is_refused_unless_forced(tmp_path, capsys, changes, said):
    for seed in range(2):
        fabricate(tmp_path / "runs", "bn", 1, seed)
    fabricate(tmp_path / "runs", "gn_ws", 1, 0, **changes)
    message = failure(capsys, str(tmp_path / "runs"))
    assert said in message
    assert "--force" in message
    assert main(["compare", str(tmp_path / "runs"), "--force", "--output", str(tmp_path / "report")]) == 0
    assert said in capsys.readouterr().out
    page = (tmp_path / "report" / "index.html").read_text()
    assert "These runs are not comparable" in page
    assert said in page


def test_less_than_an_optimizer_step_apart_is_comparable(tmp_path):
    fabricate(tmp_path, "bn", 1, 0)
    fabricate(tmp_path, "gn_ws", 1, 0, samples_seen=1607)
    assert "The runs were trained on between 1,600 and 1,607 training samples." in compare([tmp_path]).notes


def test_another_machine_is_a_confound(tmp_path):
    fabricate(tmp_path, "bn", 1, 0)
    fabricate(tmp_path, "gn_ws", 1, 0, device="NVIDIA H100", versions={"torch": "2.12.0"}, train_split="other")
    notes = " ".join(compare([tmp_path]).notes)
    assert "The hardware differs: NVIDIA H100, cpu AVX512" in notes
    assert "Versions differ: torch 2.11.0 and 2.12.0." in notes
    assert "trained on different lists of images" in notes


def test_what_cannot_be_used_is_named_and_the_rest_compared(tmp_path, capsys):
    runs = two_norms(tmp_path / "runs", seeds=2)
    broken = {
        "half": ('{"norm": "bn", "sta', "metrics.json cannot be read (Unterminated string"),
        "foreign": ('{"accuracy": 0.9}', "metrics.json is not one of gn-transfer fit"),
        "list": ("[1]", "metrics.json holds no mapping"),
        "binary": ("\udcff\udcfe", "metrics.json cannot be read"),
    }
    for name, (text, _) in broken.items():
        (runs / name).mkdir()
        (runs / name / "metrics.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    said = [message for _, message in broken.values()]
    for number, (changes, message) in enumerate(
        [
            ({"format_version": 7}, "a newer gn-transfer wrote it (format_version 7, this one reads 1)"),
            ({"format_version": None}, "metrics.json has format_version None"),
            ({"status": "running"}, "still running, or killed"),
            ({"status": "failed"}, "the run failed; its run.log says more"),
            ({"status": "interrupted"}, "the run was interrupted"),
            ({"val/acc1": float("nan")}, "metrics.json has val/acc1 nan, not a number"),
            ({"peak_memory_mib": None}, "metrics.json has peak_memory_mib None, not a number"),
        ]
    ):
        fabricate(runs, "gn", 8, number, **changes)
        said.append(message)
    (fabricate(runs, "gn", 16, 0) / "config.yaml").write_text("model: [")
    (fabricate(runs, "gn", 16, 1) / "config.yaml").write_text("model: {}")
    (fabricate(runs, "gn", 16, 2) / "metrics.json").unlink()
    fabricate(runs, "gn", "auto", 0)  # taken, although it does not say which size was chosen
    fabricate(runs, "gn", "many", 0)
    said += ["config.yaml has batch_size many, not a whole number"]
    said += ["config.yaml cannot be read", "config.yaml is not one of gn-transfer fit", "it has no metrics.json"]
    assert main(["compare", str(runs), "--output", str(tmp_path / "report")]) == 3
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert f"{len(said)} of {len(said) + 5} runs left out" in captured.err
    page = (tmp_path / "report" / "index.html").read_text()
    for message in said:
        assert message in captured.err
        assert message in page
    assert "gn_ws" in captured.out


def test_a_table_holds_no_formula_and_no_markup(tmp_path, capsys):
    for norm in ("gn", "gn_ws"):
        for seed in range(2):
            run = fabricate(tmp_path / "runs", norm, seed=seed, config={"backbone": f"=cmd|<script>{norm}"})
            config = yaml.safe_load((run / "config.yaml").read_text())
            config["optimizer"]["=key"] = f"=cmd|<script>{seed}"
            (run / "config.yaml").write_text(yaml.safe_dump(config))
    fabricate(tmp_path / "runs", "gn", seed=9, status="running").rename(tmp_path / "runs" / "`<script>`")
    assert main(["compare", str(tmp_path / "runs"), "--format", "csv", "--output", str(tmp_path / "report")]) == 3
    tables = [
        capsys.readouterr().out,
        *((tmp_path / "report" / name).read_text() for name in ("table.csv", "rows.csv")),
    ]
    for table in tables:
        assert "'=key" in table
        assert not any(cell.startswith("=") for row in csv.reader(io.StringIO(table)) for cell in row)
    assert "<script" not in (tmp_path / "report" / "table.md").read_text()


def test_a_folder_of_another_program_is_no_report(tmp_path, capsys):
    runs, site, outside = two_norms(tmp_path / "runs", seeds=2), tmp_path / "site", tmp_path / "outside"
    site.mkdir()
    outside.mkdir()
    for name, content in (("report.json", '{"lighthouse": 1}'), ("index.html", "mine")):
        (site / name).write_text(content)
    assert "something that is no report (index.html, report.json)" in failure(capsys, str(runs), "--output", str(site))
    assert (site / "index.html").read_text() == "mine"
    report = tmp_path / "report"
    write_report(compare([runs]), report)
    (report / "index.html").unlink()
    for path in report.iterdir():
        path.unlink() if path.is_file() else None
    write_report(compare([runs]), report)  # one that was interrupted after its figures
    shutil.rmtree(report / "figures")
    (report / "figures").symlink_to(outside)
    with pytest.raises(ConfigError, match="is a link to"):
        write_report(compare([runs]), report)
    assert not list(outside.iterdir())


def test_the_name_of_a_folder_does_not_reach_the_terminal(tmp_path, capsys):
    runs = two_norms(tmp_path / "runs", seeds=2)
    for number, folder in enumerate(sorted(runs.iterdir())):
        metrics = json.loads((folder / "metrics.json").read_text())
        del metrics["run"]
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "predictions_test.csv").unlink()
        folder.rename(runs / f"{number}\x1b[31m")
    assert main(["compare", str(runs)]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err


def test_many_settings_in_few_runs_take_no_memory(tmp_path):
    """One setting at a time: 40 settings of two values would be 2^40 combinations."""
    values = {f"key{place}": [float(place == run) for run in range(41)] for place in range(40)}
    assert anova(values, [0] * 41, [float(run) for run in range(41)]) is None


def test_corrupt_curves_and_predictions_only_leave_out_what_needs_them(tmp_path):
    runs = two_norms(tmp_path / "runs", seeds=2)
    for folder in runs.iterdir():
        (folder / "epochs.csv").write_text("epoch,val/acc1\n1,xyz\n")
        (folder / "predictions_test.csv").write_bytes(b"path,target,predicted,prob_target\na.jpg,pu")
    report = compare([runs])
    write_report(report, tmp_path / "report")
    assert {path.stem for path in (tmp_path / "report" / "figures").iterdir()} == {"groups", "parallel"}
    assert any("4 of 4 runs hold no predictions per image" in note for note in report.notes)


@pytest.mark.parametrize("seen", ["1e308", "-1e308", "nan"])
def test_curves_over_numbers_that_nothing_can_draw_are_left_out(tmp_path, seen):
    runs = two_norms(tmp_path / "runs", seeds=2)
    for folder in runs.iterdir():
        (folder / "epochs.csv").write_text(f"epoch,samples_seen,val/acc1\n0,0,0.5\n1,{seen},0.5\n")
    write_report(compare([runs]), tmp_path / "report")
    assert "curves" not in {path.stem for path in (tmp_path / "report" / "figures").iterdir()}


def test_a_long_curve_has_a_bounded_number_of_points(tmp_path):
    runs = two_norms(tmp_path / "runs", seeds=2)
    rows = "".join(f"{epoch},{epoch},0.5\n" for epoch in range(5000))
    for folder in runs.iterdir():
        (folder / "epochs.csv").write_text(f"epoch,samples_seen,val/acc1\n{rows}")
    write_report(compare([runs]), tmp_path / "report")
    [curves] = (path for path in (tmp_path / "report" / "figures").iterdir() if path.stem == "curves")
    assert curves.read_text().count("images: 50.0 %") <= 2 * 300


def test_bad_arguments(tmp_path, capsys):
    two_norms(tmp_path / "runs", seeds=2)
    runs = str(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert "nowhere: no such folder" in failure(capsys, "nowhere")
    assert "no run in there" in failure(capsys, str(tmp_path / "empty"))
    assert "write KEY=VALUE" in failure(capsys, runs, "--baseline", "bn")
    assert "did you mean 'norm'" in failure(capsys, runs, "--baseline", "nrom=bn")
    assert "did you mean 'bn'" in failure(capsys, runs, "--baseline", "norm=bnn")
    assert "did you mean 'batch_size'" in failure(capsys, runs, "--where", "batch_siz=1")
    assert "batch_size=9: no run has this value; allowed: 1." in failure(capsys, runs, "--where", "batch_size=9")
    assert "did you mean 'gn_ws'" in failure(capsys, runs, "--where", "norm=gnws")
    assert "required: RUNS" in failure(capsys)
    assert main(["compare", runs, "--output", str(tmp_path / "file")]) == 2
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("mine")
    assert main(["compare", runs, "--output", str(tmp_path / "site")]) == 2
    assert (tmp_path / "site/index.html").read_text() == "mine"
    assert "cannot be written to" in capsys.readouterr().err
    fabricate(tmp_path / "bad", status="failed")
    assert "none of 1 runs can be compared" in failure(capsys, str(tmp_path / "bad"))


def test_a_study_of_group_counts_in_the_form_of_the_paper(tmp_path):
    for groups, accuracy in ((64, 0.75), (32, 0.8), (1, 0.7)):
        fabricate(tmp_path, "gn", 1, 0, accuracy, config={"num_groups": groups})
    for size, accuracy in ((16, 0.75), (1, 0.5)):
        fabricate(tmp_path, "gn", 1, 0, accuracy, config={"group_size": size})
    fabricate(tmp_path, "bn", 1, 0, 0.5)
    counts, sizes = group_count_tables(compare([tmp_path]))
    assert counts == (
        "Error in percent by number of groups",
        [
            {"": "gn", "64": "25.00", "32": "20.00", "1": "30.00"},
            {"": "above the best", "64": "5.00", "32": "0.00", "1": "10.00"},
        ],
    )
    assert sizes[1][0] == {"": "gn", "16": "25.00", "1": "50.00"}


def test_the_two_arms_of_a_study_over_batch_sizes(tmp_path):
    for batch_size in (1, 4, 8):
        fabricate(tmp_path, "bn", batch_size, 0, effective_batch_size=8)
        if batch_size < 8:
            fabricate(tmp_path, "bn", batch_size, 0, effective_batch_size=batch_size)
    panels = batch_panels(compare([tmp_path]).groups)
    assert [(title, len(groups)) for title, groups in panels] == [
        ("no accumulation: batch = effective batch", 3),
        ("accumulated to an effective batch of 8", 3),
    ]


def test_arms_with_names_have_a_panel_each_and_labels_leave_out_what_is_usual(tmp_path):
    for batch_size in (1, 8):
        for case in ({}, {"reestimate_images": 256}):
            settings = {"evaluation": "running", "reestimate_images": 0, "lr": 0.03, **case}
            fabricate(tmp_path, "bn", batch_size, 0, effective_batch_size=8, config=settings, arm="A")
        settings = {"evaluation": "running", "reestimate_images": 0, "lr": 0.01}
        fabricate(tmp_path, "bn", batch_size, 0, effective_batch_size=batch_size, config=settings, arm="B")
    groups = compare([tmp_path]).groups
    assert [(title, len(some)) for title, some in batch_panels(groups)] == [
        ("arm A: accumulated to an effective batch of 8", 4),
        ("arm B: no accumulation: batch = effective batch", 2),
    ]
    assert [group.label for group in groups if group.settings["batch_size"] == 8] == [
        "batch 8, effective batch 8, arm A",
        "batch 8, effective batch 8, arm A, batch_norm.reestimate_images 256",
        "batch 8, effective batch 8, arm B",
    ]


def test_importance_of_what_matters_and_of_what_applies_to_some_runs_only(tmp_path):
    for seed in range(4):
        for batch_size in (1, 2, 4):
            fabricate(tmp_path, "bn", batch_size, seed, 0.3 + 0.1 * batch_size)
            for groups in (1, 8):
                fabricate(tmp_path, "gn", batch_size, seed, 0.5 + 0.03 * groups, config={"num_groups": groups})
    everywhere, where_groups = importances(compare([tmp_path]))
    assert set(everywhere.shares) == {"norm", "batch_size", "seed"}
    assert "fANOVA" in everywhere.note
    assert (where_groups.heading, where_groups.runs) == ("where num_groups applies", 24)
    assert where_groups.shares["num_groups"] == pytest.approx(1)
    assert sum(everywhere.shares.values()) == pytest.approx(1)


def test_importance_of_a_crossed_study_has_a_known_truth(tmp_path):
    """As in the quick start: the norm makes 77 points of difference, accumulation next to none."""
    points = {("bn", 16): 0.2, ("bn", 1): 0.2, ("gn_ws", 16): 0.9, ("gn_ws", 1): 0.975}
    for (norm, effective), accuracy in points.items():
        for seed in range(3):
            fabricate(tmp_path, norm, 1, seed, accuracy + 0.025 * (seed == 1), effective_batch_size=effective)
    [found] = importances(compare([tmp_path]))
    assert "ANOVA" in found.note
    scores = {
        (norm, effective, seed): accuracy + 0.025 * (seed == 1)
        for (norm, effective), accuracy in points.items()
        for seed in range(3)
    }
    rounded = np.array([round(40 * score) / 40 for score in scores.values()])
    total = ((rounded - rounded.mean()) ** 2).sum()
    by_hand = {}
    for place, name in enumerate(("norm", "effective_batch_size", "seed")):
        levels = [key[place] for key in scores]
        means = {level: rounded[[one == level for one in levels]].mean() for level in set(levels)}
        by_hand[name] = sum((means[level] - rounded.mean()) ** 2 for level in levels) / total
    for name, share in by_hand.items():
        assert found.shares[name] == pytest.approx(share)
    assert next(iter(found.shares)) == "norm"
    assert found.shares["norm"] > 0.98
    assert set(found.shares) == {"norm", "effective_batch_size", "together", "seed", "rest"}
    assert sum(found.shares.values()) == pytest.approx(1)


def test_a_tie_has_no_winner(tmp_path):
    for seed in range(3):
        fabricate(tmp_path / "runs", "bn_frozen", 1, seed, 0.7)
        fabricate(tmp_path / "runs", "gn_ws", 1, seed, 0.7 + 0.05 * (seed - 1))
    first = answer(compare([tmp_path / "runs"]))[0]
    assert first.startswith(("No clear winner: bn_frozen with 70.0 % [", "No clear winner: gn_ws with 70.0 % ["))
    assert "(+0.0 points, 95 % interval -" in first


def test_one_run_of_each_kind_shows_nothing(tmp_path):
    for norm, accuracy in (("bn", 0.6), ("gn_ws", 0.7)):
        fabricate(tmp_path / "runs", norm, 1, 0, accuracy, predictions=False)
    report = compare([tmp_path / "runs"])
    first, second, *_ = answer(report)
    assert first == (
        "No clear winner: gn_ws with 70.0 % against bn with 60.0 % (+10.0 points, no interval from a single pair "
        "without predictions; test/acc1, 1 seed)."
    )
    assert second.endswith("(no interval from a single pair without predictions). This is no clear difference.")
    [contrast] = report.contrasts
    assert (contrast.low, contrast.high) == (None, None)
    write_report(report, tmp_path / "report")
    stored = json.loads((tmp_path / "report" / "report.json").read_text())
    assert stored["contrasts"][0]["low"] is None


def test_different_folders_of_images_are_named(tmp_path):
    fabricate(tmp_path, "bn", 1, 0, data_root="/photos")
    fabricate(tmp_path, "gn_ws", 1, 0, data_root="/xrays")
    notes = compare([tmp_path]).notes
    assert "The images lay in different folders: /photos, /xrays. Make sure that they are the same." in notes


def test_the_answer_comes_first_and_says_what_few_seeds_cannot_show(tmp_path):
    two_norms(tmp_path / "runs", seeds=2)
    best, contrast, power = answer(compare([tmp_path / "runs"]))
    assert best.startswith("Best: gn_ws with 71.2 % [")
    assert contrast.startswith("gn_ws is 31.2 points above bn: 71.2 % against 40.0 % (95 % interval +")
    assert power.startswith("With 2 seeds the exact paired test cannot give a p-value below 0.5, whatever")
    write_report(compare([tmp_path / "runs"]), tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.index(best.replace("+", "+")) < page.index("<h2>Result</h2>")


@pytest.mark.parametrize(("others", "said"), [(6, None), (7, "One more contrast is"), (8, "2 more contrasts are")])
def test_contrasts_beyond_the_largest_are_counted(tmp_path, others, said):
    fabricate(tmp_path, "bn", 1, 0, 0.5)
    for number in range(others):
        fabricate(tmp_path, f"norm{number}", 1, 0, 0.6 + 0.025 * number)
    found = [line for line in answer(compare([tmp_path])) if line.endswith("in the table.")]
    assert found == ([] if said is None else [f"{said} in the table."])


def test_sentences_use_the_means_of_the_seeds_that_both_have(tmp_path):
    fabricate(tmp_path, "bn", 1, 0, 0.5)
    fabricate(tmp_path, "bn", 1, 1, 0.2)
    fabricate(tmp_path, "gn_ws", 1, 0, 0.6)
    found = answer(compare([tmp_path]))
    assert any("10.0 points above bn: 60.0 % against 50.0 % over the 1 seed that both have" in line for line in found)


def test_groups_without_a_common_seed_are_named(tmp_path):
    fabricate(tmp_path, "bn", 1, 0, 0.5)
    fabricate(tmp_path, "gn_ws", 1, 1, 0.6)
    report = compare([tmp_path])
    assert report.contrasts == []
    assert any("they share no seed: gn_ws (seeds 1) and bn (seeds 0)" in note for note in report.notes)


def test_a_group_that_only_guesses_is_named(tmp_path):
    for seed in range(3):
        fabricate(tmp_path, "bn", 1, seed, 0.25)
        fabricate(tmp_path, "gn_ws", 1, seed, 0.75)
    said = "bn is not clearly better than always naming the most frequent class (25.0 %)."
    assert said in answer(compare([tmp_path]))


@pytest.mark.parametrize(("contrasts", "seeds"), [(1, 6), (2, 7)])
def test_how_many_seeds_could_show_something(tmp_path, contrasts, seeds):
    for norm in ["bn", "gn_ws", "gn"][: contrasts + 1]:
        for seed in range(2):
            fabricate(tmp_path, norm, 1, seed, 0.25 if norm == "bn" else 0.75)
    last = answer(compare([tmp_path]))[-1]
    assert f"With {seeds} seeds it can reach 0.05" in last
    assert last.endswith(" for all 2 contrasts." if contrasts == 2 else "0.05.")


def test_one_run_above_guessing_is_not_doubted_and_intervals_are(tmp_path):
    for norm in ("gn", "bn"):
        fabricate(tmp_path / "one", norm, 1, 0, 0.6)
    assert not any("always naming" in line for line in answer(compare([tmp_path / "one"])))
    for seed, accuracy in enumerate((0.1, 0.9, 0.1)):
        fabricate(tmp_path / "three", "gn", 1, seed, accuracy)
        fabricate(tmp_path / "three", "bn", 1, seed, 0.9)
    assert any("gn is not clearly better than always naming" in line for line in answer(compare([tmp_path / "three"])))


def test_weights_that_have_seen_other_images_are_named(tmp_path):
    said = "The weights were trained on different images"
    for norm, seen in (("gn", "Tiny-ImageNet"), ("bn", "")):
        fabricate(tmp_path, norm, 1, 0, weights=f"weights of {norm}", weights_pretrained_on=seen)
    assert not any(said in line for line in compare([tmp_path]).remarks())
    fabricate(tmp_path, "bn_frozen", 1, 0, weights="others", weights_pretrained_on="ImageNet-1k")
    assert any(said in line for line in compare([tmp_path]).remarks())


def test_a_curve_of_one_point_is_left_out(tmp_path):
    for folder in two_norms(tmp_path / "runs", seeds=2).iterdir():
        lines = (folder / "epochs.csv").read_text().splitlines()
        (folder / "epochs.csv").write_text("\n".join(lines[:2]) + "\n")
    write_report(compare([tmp_path / "runs"]), tmp_path / "report")
    assert not (tmp_path / "report" / "figures" / "curves.svg").exists()


def test_two_hundred_runs_without_torch_within_time_and_memory(tmp_path):
    for seed in range(10):
        for norm in ("bn", "bn_frozen", "gn", "gn_ws"):
            for batch_size in (1, 2, 4, 8, 16):
                fabricate(tmp_path / "runs", norm, batch_size, seed, 0.5 + 0.02 * seed, effective_batch_size=16)
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from gn_transfer.__main__ import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'lightning', 'timm'} & set(sys.modules)\n"
        "status = Path('/proc/self/status')\n"  # getrusage starts from the peak of the process that started it
        "lines = status.read_text().splitlines() if status.exists() else ['VmHWM: 0 kB']\n"
        "print(time.process_time(), next(line for line in lines if line.startswith('VmHWM:')).split()[1])\n"
    )
    command = [sys.executable, "-c", code, "compare", str(tmp_path / "runs"), "--output", str(tmp_path / "report")]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    seconds, peak_kib = map(float, output.split()[-2:])
    assert seconds < 30  # of processor time, whatever else runs; about 5 alone
    assert peak_kib < 500 * 1024


def test_the_only_group_with_the_baselines_value_serves_all(tmp_path):
    for norm, batch_size in (("bn", 1), ("gn_ws", 1), ("gn_ws", 4)):
        fabricate(tmp_path, norm, batch_size, 0)
    pairs = [(contrast.group.label, contrast.baseline.label) for contrast in compare([tmp_path]).contrasts]
    assert pairs == [("gn_ws, batch 1", "bn, batch 1"), ("gn_ws, batch 4", "bn, batch 1")]
    with pytest.raises(ConfigError, match="norm=bn, batch_size=4: no group has all these values"):
        compare([tmp_path], baseline={"norm": "bn", "batch_size": "4"})


def test_groups_stand_by_kind_and_size_of_their_values():
    runs = [Run(Path(str(n)), {}, {"trainer.max_steps": v}, 0) for n, v in enumerate(("null", 16, -1, None, 4, "auto"))]
    assert [value for (value,) in group_runs(runs).groups] == [None, -1, 4, 16, "auto", "null"]


def test_a_setting_that_half_of_the_groups_have_is_named(tmp_path):
    for images in (0, 256):
        fabricate(tmp_path, "bn", 1, 0, config={"reestimate_images": images})
    labels = [group.label for group in compare([tmp_path]).groups]
    assert labels == ["batch_norm.reestimate_images 0", "batch_norm.reestimate_images 256"]


def test_values_are_shown_as_the_command_line_takes_them():
    values = (True, False, 0.1 + 0.2, 8.0, 4, "bn", None)
    assert [shown(value) for value in values] == ["true", "false", "0.3", "8", "4", "bn", "-"]
