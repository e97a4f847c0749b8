"""Other programs' messages in our words: what is wrong, the value got, what is allowed, what to do."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

from gn_transfer.config import ConfigError, did_you_mean, is_out_of_memory


class Parser(argparse.ArgumentParser):
    """Python's parser, for the commands that are not Lightning's; options are never guessed from a beginning."""

    def __init__(self, *, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving the process."""
        raise ConfigError(f"{message}. See {self.prog} --help.")


def explain(message: str, known_keys: Sequence[str], data_modules: Sequence[str]) -> str:
    """Turn jsonargparse's message into ours.

    Args:
        message: Its message, of one or many lines.
        known_keys: Every key that a configuration may have.
        data_modules: What ``--data`` may name.

    Returns:
        Ours where the cause is known, else its own on one line.

    Example:
        >>> explain("Unrecognized arguments: --model.nrom gn", ["model.norm", "optimizer.lr"], [])
        "model.nrom is not a key; did you mean 'model.norm'? gn-transfer fit --help_all lists all."
    """
    flat = " ".join(message.split())
    if found := re.search(r"""(?:Unrecognized arguments: --?|does not accept option ['"])([\w.-]+)""", flat):
        return _unknown_key(found[1], known_keys)
    if found := re.search(r"Option '(\w+)' is not accepted", flat):
        return _unknown_key(f"data.{found[1]}", known_keys)
    flat = flat.split(" Given value type: ")[0] if "Problem with given class_path" in flat else flat
    section = "data." if "Problem with given class_path" in flat else ""
    if found := re.search(r"""Parser key "([\w.]+)": Expected a typing\.Literal\[(.+?)\]\. Got value: (.*)""", flat):
        key, choices, value = found.groups()
        norm = _NORM_NAMES.get(re.sub(r"[\W_]|norm(2d|ation)?$", "", value.lower()))
        meant = norm if norm in _words(choices) else value
        return f"{section}{key}={value} is not allowed; {did_you_mean(meant, _words(choices))}."
    if found := re.search(r"""Parser key "(\w+)": Unable to load config ['"](.*?)['"]""", flat):
        return f"{found[1]}={found[2]}: give the keys of {found[1]} one by one, such as --{found[1]}.KEY VALUE."
    if found := re.search(r"""Problem with given class_path '[\w.]*?(\w+)': Option '(\w+)' is required""", flat):
        return f"data.{found[2]} is not given, and {found[1]} needs it: --data.{found[2]} VALUE."
    if found := re.search(r"""Parser key "data":.*Given value: (\w+)$""", flat):
        return f"data={found[1]} is not a data module; {did_you_mean(found[1], data_modules)}."
    if found := re.search(r"""Parser key "([\w.]+)": Expected an? <class '(\w+)'>\. Got value: (.*)""", flat):
        return f"{section}{found[1]}={found[3]} is not of type {found[2]}."
    union = r"""Parser key "([\w.]+)": Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors:"""
    if found := re.search(union + r".*Given value: (.*)$", flat):
        key, kinds, value = found.groups()
        return f"{section}{key}={value} is not allowed; use {_either(_alternatives(kinds))}."
    return flat


def explain_fault(error: RuntimeError | MemoryError) -> str | None:
    """Say what a fault of the machine is, and what to do; None where it is none.

    Args:
        error: What ended a training or an evaluation.
    """
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return (
            f"out of memory ({text[:200] or 'MemoryError'}). Under a norm that does not look at the batch, a training "
            "with an effective batch goes on with --ckpt_path last and a lower data.batch_size. Otherwise begin anew "
            "with a lower data.batch_size or data.img_size, or with model.gradient_checkpointing=true."
        )
    if "can't start new thread" in text:
        return "no thread can be started: lower data.num_workers, or raise the limits of this account (ulimit -u, -v)."
    if re.search(r"Connection (closed|reset) by peer|ProcessGroupNCCL|gloo.*(timed? ?out|closed)", text, re.I):
        return (
            f"another process of this training has ended ({text[:200]}). Its own message says why; without one, it was "
            "killed, mostly because memory ran out. The training goes on with --ckpt_path last."
        )
    return None


# What other programs call our keys.
_ELSEWHERE = {
    "optimizer.lr": ("lr", "learning_rate", "lr0", "base_lr"),
    "optimizer.weight_decay": ("weight_decay", "wd"),
    "optimizer.momentum": ("momentum",),
    "optimizer.name": ("opt", "optim"),
    "optimizer.warmup_fraction": ("warmup", "warmup_epochs", "warmup_steps"),
    "optimizer.clip_norm": ("clip_grad", "grad_clip", "max_grad_norm"),
    "model.norm": ("norm", "norm_layer", "normalization"),
    "model.backbone": ("backbone", "arch", "architecture", "model_name", "encoder"),
    "model.pretrained": ("pretrained", "weights", "checkpoint_path"),
    "model.num_groups": ("num_groups", "groups"),
    "data.batch_size": ("batch_size", "bs", "batch", "b", "train_batch_size"),
    "data.img_size": ("img_size", "image_size", "size", "resolution", "imgsz", "input_size"),
    "data.root": ("root", "data_root", "data_dir", "data_path", "dataset"),
    "data.num_workers": ("num_workers", "workers", "j"),
    "data.recipe": ("recipe", "augment", "aug", "augmentation"),
    "data.val_fraction": ("val_fraction", "val_split", "valid_pct"),
    "data.test_fraction": ("test_fraction", "test_split"),
    "accumulation.effective_batch_size": (
        "effective_batch_size",
        "accumulate_grad_batches",
        "grad_accum_steps",
        "gradient_accumulation_steps",
        "accum",
        "grad_accum",
        "accumulation_steps",
    ),
    "trainer.max_epochs": ("epochs", "max_epochs", "num_epochs", "num_train_epochs", "epoch"),
    "trainer.max_steps": ("steps", "max_steps", "iterations"),
    "trainer.devices": ("devices", "gpus", "num_gpus"),
    "trainer.accelerator": ("accelerator", "device"),
    "trainer.default_root_dir": ("output", "output_dir", "out", "project"),
    "mixed_precision.mode": ("precision", "amp", "mixed_precision", "fp16", "bf16"),
    "regularization.mixup": ("mixup",),
    "regularization.cutmix": ("cutmix",),
    "regularization.label_smoothing": ("label_smoothing", "smoothing"),
    "freezing.epochs": ("freeze", "freeze_epochs"),
    "ema.decay": ("ema", "model_ema", "ema_decay"),
    "early_stopping.patience": ("patience",),
    "seed_everything": ("seed", "random_seed"),
    "ckpt_path": ("resume", "resume_from", "checkpoint", "ckpt"),
}


def _meant(key: str) -> str | None:
    """Find our key behind another program's name, or behind ours in a wrong section."""
    name = key.lower().replace("-", "_").rpartition(".")[2]
    return next((ours for ours, others in _ELSEWHERE.items() if name in others), None)


_NORM_NAMES = {
    "batch": "bn",
    "group": "gn",
    "layer": "ln",
    "instance": "in",
    "frozenbatch": "bn_frozen",
    "syncbatch": "bn_sync",
}
_KINDS = {"NoneType": "null", "int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}


def _either(words: Sequence[str]) -> str:
    """Join alternatives: ``null, a number or corrected``."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _alternatives(kinds: str) -> list[str]:
    """Put the members of a union into words: ``null``, ``a float``, or the values of a Literal."""
    names = []
    for kind, choices in re.findall(r"<class '(\w+)'>|typing\.Literal\[(.+?)\]", kinds):
        names += _words(choices) if choices else [_KINDS.get(kind, f"a {kind}")]
    return names


def _words(choices: str) -> list[str]:
    return re.findall(r"[^ ,']+", choices)


def _unknown_key(key: str, known: Sequence[str]) -> str:
    if key in known:  # jsonargparse does not say which class lacks it
        return f"{key} is a key of other data than those that are used; leave it out, or choose them with --data."
    near = [meant] if (meant := _meant(key)) else difflib.get_close_matches(key, known, n=1)
    if near:
        return f"{key} is not a key; did you mean {near[0]!r}? gn-transfer fit --help_all lists all."
    section = key.split(".")[0]
    siblings = [name for name in known if name.split(".")[0] == section]
    allowed = siblings if "." in key and siblings else dict.fromkeys(name.split(".")[0] for name in known)
    return f"{key} is not a key; known: {', '.join(allowed)}."
