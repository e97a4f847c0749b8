"""Help that appears at once, without the imports of a training: one screen with what people set."""

from __future__ import annotations

FIT = """\
usage: gn-transfer fit PATH [options]
       gn-transfer fit --config CONFIG [options]

Train on a folder of images: PATH/<class>/*.jpg, or PATH/train, val and test with a folder per class each. The options
below overrule what is chosen for the folder, and what a configuration says.

  --config FILE                         a configuration: a file, or a built-in one such as folder.yaml
  --model.norm NORM                     bn, bn_frozen, gn, gn_ws (GroupNorm + Weight Standardization), ...
  --model.backbone NAME                 a model of timm: resnetv2_50, resnet18, ... (gn-transfer backbones lists them)
  --model.pretrained WHICH              auto, a tag of timm, a file, or null to train from scratch
  --data.img_size PIXELS                side of the images
  --data.batch_size N                   images in memory at a time; auto measures what is fastest
  --accumulation.effective_batch_size N images per optimizer step
  --optimizer.lr LR                     learning rate
  --trainer.max_epochs N                passes over the training images
  --data.recipe RECIPE                  augmentation: none, light, crop_flip, bit, strong
  --data.test_fraction F                share of the images held out for gn-transfer test
  --data.shots_per_class N              train on N images of each class only
  --mixed_precision.mode MODE           auto, fp32, bf16, fp16
  --seed_everything N                   seed of weights, split, order and augmentation
  --ckpt_path FILE                      continue a run; last means the newest
  --name NAME                           name of the folder of runs: runs/NAME/..., checkpoints/NAME/...
  --allow_class_path                    let configuration files name any class; they can then run any code
  --dry_run                             print the plan and stop
  --help_all                            every option; --data.help Folder lists those of a data module

Example: gn-transfer fit photos --model.norm bn_frozen
"""

EVALUATE = """\
usage: gn-transfer {command} PATH [options]

Evaluate a checkpoint on the {split} images of its run. PATH is a checkpoint, the folder of a run, or the folder of
images that the newest run was trained on.

  --ckpt_path FILE                      the checkpoint, instead of PATH
  --data.root PATH                      where the images lie now, if they were moved
  --data.batch_size N                   images at a time
  --help_all                            every option

Example: gn-transfer {command} checkpoints/photos/gn_ws-bs1-seed0/best.ckpt
"""


DATA_COMMANDS = {
    "check": "decode everything; report corruption, duplicates, the same image in two splits, counts",
    "sample": "write the embedded sample: gn-transfer data sample --root data_sample",
    "cache": "decode everything into the disk cache ahead of training",
    "show": "write a contact sheet of what the model sees: gn-transfer data show --config X --output sheet.png",
}

DATA = """\
usage: gn-transfer data COMMAND PATH [options]

{commands}

check, cache and show take the folder of images, or --config and every other option of fit (gn-transfer fit --help),
such as --data.test_fraction 0.2; gn-transfer data COMMAND --help lists what each has besides.
"""


def short_help(command: str) -> str:
    """Compose the help of ``fit``, ``validate``, ``test`` or ``data``."""
    if command == "fit":
        return FIT
    if command == "data":
        width = max(map(len, DATA_COMMANDS))
        return DATA.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in DATA_COMMANDS.items()))
    return EVALUATE.format(command=command, split="validation" if command == "validate" else "test")
