import csv

import torch

from gn_transfer.data.dataset import LabeledImage
from gn_transfer.training.predictions import ImagePredictions, in_order


class OneProcess:
    """Stands for the module: gathering from one process adds nothing."""

    def all_gather(self, tensor):
        return tensor


def test_predictions_of_two_batches_by_hand(tmp_path):
    callback = ImagePredictions()
    callback.on_validation_start(None, None)
    for logits, targets in (([[0.0, 0.0, 9.0], [0.0, 9.0, 0.0]], [2, 0]), ([[1.0, 1.0, 0.0]], [1])):
        callback.on_validation_batch_end(None, None, torch.tensor(logits), (torch.empty(0), torch.tensor(targets)), 0)
    callback.on_validation_epoch_end(None, OneProcess())
    images = [
        LabeledImage("a,b.jpg", 2),
        LabeledImage("\udcffé.jpg", 0),
        LabeledImage("c.jpg", 1),
        LabeledImage("not seen.jpg", 1),
    ]
    callback.write(tmp_path / "predictions.csv", images, ["red", "green", "blue"])
    with (tmp_path / "predictions.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert list(csv.reader(file)) == [
            ["path", "target", "predicted", "prob_target", "prob_predicted"],
            ["a,b.jpg", "blue", "blue", "0.99975", "0.99975"],  # e^9 / (e^9 + 2)
            ["\udcffé.jpg", "red", "green", "0.00012338", "0.99975"],  # 1 / (e^9 + 2)
            ["c.jpg", "green", "red", "0.42232", "0.42232"],  # e / (2 e + 1)
        ]


def test_two_ranks_are_put_back_in_order():
    ranks = torch.tensor([[[0, 2, 4]], [[1, 3, 0]]])  # 5 images dealt to 2 ranks, the first repeated
    assert in_order(ranks).tolist() == [[0, 1, 2, 3, 4, 0]]
