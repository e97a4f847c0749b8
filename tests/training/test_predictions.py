import csv
from types import SimpleNamespace

import torch

from gn_transfer.data.dataset import LabeledImage
from gn_transfer.training.classification import TransferClassifier
from gn_transfer.training.predictions import ImagePredictions, in_order
from gn_transfer.training.segmentation import TransferSegmenter
from gn_transfer.training.tensorboard import ValidationFigures


def evaluated(task, classes, batches):
    """Run the callback as Lightning does, in one process."""
    task.classes = classes
    task.all_gather = lambda tensor: tensor
    callback = ImagePredictions()
    callback.on_validation_start(None, task)
    for outputs, targets in batches:
        callback.on_validation_batch_end(None, task, torch.tensor(outputs), (torch.empty(0), torch.tensor(targets)), 0)
    callback.on_validation_epoch_end(None, task)
    return callback


def read(path):
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


def test_figures_leave_out_images_that_fill_up_the_batches_of_other_processes():
    seen, figures = [], ValidationFigures()
    task = SimpleNamespace(create_figures=lambda: SimpleNamespace(update=lambda *parts: seen.append(parts)))
    figures.on_validation_start(None, task)
    for own in (2, 1, 0):
        task.own_images_of_batch = own
        batch = (torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
        figures.on_validation_batch_end(None, task, torch.zeros(2, 5), batch, 0)
    assert [[len(part) for part in parts] for parts in seen] == [[2, 2, 2], [1, 1, 1]]


def test_predictions_of_two_batches_by_hand(tmp_path):
    task = TransferClassifier()
    batches = [([[0.0, 0.0, 9.0], [0.0, 9.0, 0.0]], [2, 0]), ([[1.0, 1.0, 0.0]], [1])]
    callback = evaluated(task, ["red", "green", "blue"], batches)
    images = [
        LabeledImage("a,b.jpg", 2),
        LabeledImage("\udcffé.jpg", 0),
        LabeledImage("c.jpg", 1),
        LabeledImage("not seen.jpg", 1),
    ]
    callback.write(tmp_path / "predictions.csv", images, task)
    assert callback.count == 3
    assert read(tmp_path / "predictions.csv") == [
        ["path", "target", "predicted", "prob_target", "prob_predicted"],
        ["a,b.jpg", "blue", "blue", "0.99975", "0.99975"],  # e^9 / (e^9 + 2)
        ["\udcffé.jpg", "red", "green", "0.00012338", "0.99975"],  # 1 / (e^9 + 2)
        ["c.jpg", "green", "red", "0.42232", "0.42232"],  # e / (2 e + 1)
    ]


COUNTS = ("intersection", "union", "pixels")


def test_pixels_of_a_segmentation_by_hand(tmp_path):
    """Three pixels, of which the last is ignored; then an image without a labeled pixel."""
    task = TransferSegmenter()
    first = [[[[9.0, 9.0, 0.0]], [[0.0, 0.0, 9.0]]]]  # predicted 0, 0, 1
    batches = [(first, [[[0, 1, 255]]]), (first, [[[255, 255, 255]]])]
    callback = evaluated(task, ["ground", "pet"], batches)
    callback.write(tmp_path / "predictions.csv", [LabeledImage("a.jpg", 0), LabeledImage("b.jpg", 0)], task)
    assert read(tmp_path / "predictions.csv") == [
        ["path", "miou", *(f"{count}:{name}" for name in ("ground", "pet") for count in COUNTS)],
        ["a.jpg", "0.25000", "1", "2", "1", "0", "1", "1"],
        ["b.jpg", "", "0", "0", "0", "0", "0", "0"],
    ]


def test_two_ranks_are_put_back_in_order():
    ranks = torch.tensor([[[0, 2, 4]], [[1, 3, 0]]])  # 5 images dealt to 2 ranks, the first repeated
    assert in_order(ranks).tolist() == [[0, 1, 2, 3, 4, 0]]


def test_images_of_two_processes_come_back_in_their_order():
    """The loader gives the images in turn: 0 and 2 to the first process, 1 and 3 to the second."""
    module = SimpleNamespace(
        score_images=lambda outputs, targets: outputs, all_gather=lambda own: torch.stack([own, own + 1])
    )
    callback = ImagePredictions()
    callback.on_validation_start(None, module)
    for outputs in (torch.tensor([[0, 2]]), torch.tensor([[4]])):
        callback.on_validation_batch_end(None, module, outputs, (None, None), 0)
    callback.on_validation_epoch_end(None, module)
    assert callback.scores.tolist() == [[0, 1, 2, 3, 4, 5]]
