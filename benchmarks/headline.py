"""The studies over the learning rate: store their runs compactly, and compute every number that is published of them.

    gn-transfer sweep --config sweep_imagenet.yaml --workers 2 --data.root DATA
    python benchmarks/headline.py collect runs/sweep_imagenet --data_root DATA
    python benchmarks/headline.py analyse sweep_imagenet

and the same with `sweep_imagenet_shift`, whose DATA is `data_sample`.

`collect` writes `results/STUDY_runs.csv`, one row per run, those that choose the learning rate included, and
`results/STUDY_predictions.csv`, the class that each final run gave to each test image. Test images that also stand in
trainval, exactly or nearly, are marked there and left out of every number. `analyse` reads only these two files and
writes `results/STUDY.json`, `results/STUDY.md` and `results/STUDY.svg`.

Summaries, fixed before the runs: the curve over the rate (validation, mean over seeds, t interval); the best rate,
nested (chosen on the other seeds, scored on the seed left out); the mean over all rates; the width of the band within 3
points of the best, as a factor of the rate. On the test images: mean with an interval over seeds and images; against
`bn_frozen` the paired difference, the exact sign-flip test, Holm's correction, and equivalence within 2 points (two
one-sided tests at 5 %: the 90 % interval lies inside). A run whose loss stopped being finite counts as chance.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from gn_transfer.comparison.statistics import holm, interval, sign_flip_test
from gn_transfer.data import Pets
from gn_transfer.data.duplicates import group_duplicates
from gn_transfer.data.workers import core_count
from gn_transfer.files import read_json, write_csv, write_json, write_text
from gn_transfer.report.predictions import image_weights
from gn_transfer.training.environment import environment

RESULTS = Path(__file__).parent / "results"
BASELINE = "bn_frozen"
MARGIN = 0.02
BAND = 0.03
_KEPT = ("seed", "val/acc1", "val/loss", "test/acc1", "samples_seen", "images_per_sec", "peak_memory_mib")


def collect(study: Path, data_root: Path) -> None:
    """Store the runs of a study."""
    rows, predicted, targets = [], {}, {}
    for folder in sorted(path.parent for path in study.glob("*/metrics.json")):
        record = read_json(folder / "metrics.json")
        finished = record.get("status") == "finished"
        if not finished and record.get("status") != "failed":
            continue  # not run to its end
        kept = {key: record.get(key) if finished else None for key in _KEPT}
        rows.append(
            {
                "run": folder.name,
                "stage": record.get("stage"),
                "arm": record.get("case"),
                "lr": record.get("lr"),
                **kept,
                "seed": int(folder.name.rpartition("-seed")[2]),
                "status": record.get("status"),
                "device": record.get("device"),
                "git_commit": record.get("git_commit"),
            }
        )
        if (path := folder / "predictions_test.csv").is_file():
            found = list(csv.DictReader(path.open(encoding="utf-8")))
            targets = {row["path"]: row["target"] for row in found}
            predicted[folder.name] = {row["path"]: row["predicted"] for row in found}
    write_csv(RESULTS / f"{study.name}_runs.csv", list(rows[0]), (list(row.values()) for row in rows))
    classes = sorted(set(targets.values()))
    known = in_trainval(data_root) if targets else set()
    write_csv(
        RESULTS / f"{study.name}_predictions.csv",
        ["path", "target", "in_trainval", *predicted],
        (
            [path, classes.index(target), int(path in known), *(classes.index(p[path]) for p in predicted.values())]
            for path, target in sorted(targets.items())
        ),
    )
    print(f"{len(rows)} runs, {len(predicted)} with test predictions, {len(known)} test images also in trainval")


def in_trainval(root: Path) -> set[str]:
    """Find the test images that stand in trainval too, exactly or nearly."""
    data = Pets(root)
    trainval, test = data.list_fit().train, data.list_test()
    groups = group_duplicates(Path(data.root), [*trainval, *test], core_count())
    return {
        test[position - len(trainval)].path
        for group in groups
        if group[0] < len(trainval)
        for position in group
        if position >= len(trainval)
    }


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean of few values."""
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def band_factor(rates: Sequence[float], means: Sequence[float], width: float = BAND) -> float:
    """Width of the band of rates within `width` of the best, as a factor; between rates it is linear in log(rate).

    Example:
        >>> round(band_factor([0.01, 0.1, 1.0], [0.0, 0.06, 0.0]), 2)  # half a decade to either side
        10.0
    """
    logs, floor, best = np.log10(rates), max(means) - width, int(np.argmax(means))
    ends = []
    for step in (-1, 1):
        place = best
        while 0 <= place + step < len(means) and means[place + step] >= floor:
            place += step
        end = logs[place]
        if 0 <= place + step < len(means):
            share = (means[place] - floor) / (means[place] - means[place + step])
            end += share * (logs[place + step] - logs[place])
        ends.append(end)
    return float(10 ** (ends[1] - ends[0]))


def curves(rows: Sequence[Mapping[str, str]], chance: float) -> dict[str, Any]:
    """Summarize the runs over the rate."""
    found: dict[str, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["stage"] == "select":
            found[row["arm"]][float(row["lr"])][int(row["seed"])] = float(row["val/acc1"] or chance)
    result = {}
    for arm, by_rate in found.items():
        rates = sorted(by_rate)
        seeds = sorted(set.intersection(*(set(by_rate[rate]) for rate in rates)))
        table = np.array([[by_rate[rate][seed] for seed in seeds] for rate in rates])  # (rates, seeds)
        nested = []
        for left_out in range(len(seeds)):
            others = np.delete(table, left_out, axis=1)
            nested.append(float(table[int(others.mean(axis=1).argmax()) if others.size else 0, left_out]))
        means = table.mean(axis=1)
        result[arm] = {
            "seeds": seeds,
            "curve": [
                {"lr": rate, "mean": mean, "interval": t_interval(row) if len(seeds) > 1 else None}
                for rate, mean, row in zip(rates, means.tolist(), table, strict=True)
            ],
            "best_lr": rates[int(means.argmax())],
            "best_nested": float(np.mean(nested)),
            "best_nested_interval": t_interval(nested) if len(seeds) > 1 else None,
            "mean_over_rates": float(means.mean()),
            "mean_over_rates_interval": t_interval(table.mean(axis=0)) if len(seeds) > 1 else None,
            "band_factor": band_factor(rates, means.tolist()),
            "band_reaches_the_end": bool(means[0] >= means.max() - BAND or means[-1] >= means.max() - BAND),
        }
    return result


def finals(rows: Sequence[Mapping[str, str]], predictions: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Summarize the final runs on the test images, those of trainval left out."""
    images = [row for row in predictions if row["in_trainval"] == "0"]
    arms: dict[str, dict[int, str]] = defaultdict(dict)
    for row in rows:
        if row["stage"] == "final" and images and row["run"] in images[0]:
            arms[row["arm"]][int(row["seed"])] = row["run"]
    if not arms:
        return {}
    runs = [run for by_seed in arms.values() for run in by_seed.values()]
    correct = {run: np.array([image[run] == image["target"] for image in images], dtype=np.float32) for run in runs}
    weights = image_weights(len(images), 0)
    resampled = {run: weights @ right / len(images) for run, right in correct.items()}
    result: dict[str, Any] = {"images": len(images), "left_out": len(predictions) - len(images), "arms": {}}
    p_values = []
    for arm, by_seed in arms.items():
        scores = [float(correct[run].mean()) for run in by_seed.values()]
        low, high = interval([resampled[run] for run in by_seed.values()])
        row: dict[str, Any] = {"n": len(scores), "mean": float(np.mean(scores)), "interval": [low, high]}
        common = sorted(set(by_seed) & set(arms[BASELINE])) if arm != BASELINE else []
        if common:
            pairs = [(by_seed[seed], arms[BASELINE][seed]) for seed in common]
            differences = [float(correct[ours].mean() - correct[theirs].mean()) for ours, theirs in pairs]
            spread = [resampled[ours] - resampled[theirs] for ours, theirs in pairs]
            inner = interval(spread, level=0.90)
            test = sign_flip_test(differences)
            row |= {
                "difference": float(np.mean(differences)),
                "difference_interval": list(interval(spread)),
                "p": test.p,
                "equivalent_within_2_points": inner[0] > -MARGIN and inner[1] < MARGIN,
            }
            p_values.append(test.p)
        result["arms"][arm] = row
    contrasts = [row for row in result["arms"].values() if "p" in row]
    for row, corrected in zip(contrasts, holm(p_values), strict=True):
        row["p_holm"] = corrected
    return result


def figure(summary: Mapping[str, Any], chance: float) -> Figure:
    """Draw the curves over the rate, with t intervals over the seeds."""
    drawn = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes = drawn.add_subplot()
    best_first = sorted(summary.items(), key=lambda item: -max(point["mean"] for point in item[1]["curve"]))
    for number, (arm, found) in enumerate(best_first):
        rates = np.array([point["lr"] for point in found["curve"]]) * 1.02 ** (
            number - len(summary) / 2
        )  # side by side
        means = np.array([point["mean"] for point in found["curve"]])
        ends = np.array([point["interval"] or (point["mean"],) * 2 for point in found["curve"]]).clip(0, 1)
        errors = np.abs(ends.T - means)
        line, marker = f"C{number}", "osD^v<>pX"[number % 9]
        axes.errorbar(rates, 100 * means, 100 * errors, color=line, linewidth=0, elinewidth=0.8, alpha=0.4)
        axes.plot(rates, 100 * means, color=line, marker=marker, markersize=4, linewidth=1.4, label=arm)
    axes.axhline(100 * chance, color="#999", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy, %", ylim=(0, 102))
    axes.spines[["top", "right"]].set_visible(False)
    drawn.legend(loc="outside right center", frameon=False, fontsize=8)
    return drawn


def analyse(study: str) -> None:
    """Compute and print every number from the stored rows."""
    rows = list(csv.DictReader((RESULTS / f"{study}_runs.csv").open(encoding="utf-8")))
    predictions = list(csv.DictReader((RESULTS / f"{study}_predictions.csv").open(encoding="utf-8")))
    chance = 1 / max(2, len({row["target"] for row in predictions})) if predictions else 0.2
    over_rates = curves(rows, chance)
    summary = {"over_rates": over_rates, "test": finals(rows, predictions), "runs": len(rows), **environment()}
    write_json(RESULTS / f"{study}.json", summary)
    figure(over_rates, chance).savefig(RESULTS / f"{study}.svg", metadata={"Date": None})
    write_text(RESULTS / f"{study}.md", table(summary))
    print(table(summary))


def table(summary: Mapping[str, Any]) -> str:
    """Write the summary as Markdown."""
    columns = ("arm", "best rate", "best (nested), %", "mean over rates, %", "band within 3 points", "test, %")
    lines = [f"| {' | '.join(columns)} | minus {BASELINE} |", "|---" * (len(columns) + 1) + "|"]
    tested = summary["test"].get("arms", {})
    for arm, found in summary["over_rates"].items():
        row = tested.get(arm, {})
        test = f"{_shown(row['mean'], row['interval'])} (n = {row['n']})" if row else ""
        difference = _shown(row["difference"], row["difference_interval"], sign="+") if "difference" in row else ""
        more = f", p {row['p']:.2g}, Holm {row['p_holm']:.2g}" if "p" in row else ""
        edge = ", reaches the end of the rates" if found["band_reaches_the_end"] else ""
        lines.append(
            f"| {arm} | {found['best_lr']:g} | {_shown(found['best_nested'], found['best_nested_interval'])} | "
            f"{_shown(found['mean_over_rates'], found['mean_over_rates_interval'])} | factor "
            f"{found['band_factor']:.1f}{edge} | {test} | {difference}{more} |"
        )
    return "\n".join(lines) + "\n"


def _shown(mean: float, ends: Sequence[float] | None, sign: str = "") -> str:
    shown = f"{100 * mean:{sign}.1f}"
    return shown if ends is None else f"{shown} [{100 * ends[0]:{sign}.1f}, {100 * ends[1]:{sign}.1f}]"


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="store the runs of a study")
    collecting.add_argument("study", type=Path, help="folder of its runs")
    collecting.add_argument("--data_root", type=Path, required=True)
    analysing = commands.add_parser("analyse", help="compute every number from the stored runs")
    analysing.add_argument("study", help="name of the folder that was collected")
    options = parser.parse_args()
    if options.command == "collect":
        collect(options.study, options.data_root)
    else:
        analyse(options.study)


if __name__ == "__main__":
    main()
