"""Mutation testing: change the code in one place at a time, and see whether a test notices.

    python tests/mutate.py --mutants 8 --workers 2

Each mutant lives in a process of its own, which imports the changed module and runs the tests that belong to it. A
mutant that survives is a test that is missing, or a change that makes no difference; those stand in
``mutants_that_may_survive.txt`` with the reason, by module and changed line.
"""

from __future__ import annotations

import argparse
import ast
import doctest
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

from forked import run_forked

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = Path(__file__).with_name("mutants_that_may_survive.txt")
TIMEOUT_SECONDS = 240

TARGETS = {
    "layers/group_norm.py": ["tests/layers/test_group_norm.py"],
    "layers/std_conv.py": ["tests/layers/test_std_conv.py"],
    "layers/batch_norm.py": ["tests/layers/test_batch_norm.py"],
    "layers/convert.py": ["tests/layers/test_convert.py", "tests/layers/test_calibrate.py"],
    "layers/calibrate.py": ["tests/layers/test_calibrate.py"],
    "layers/accumulation_engine.py": [
        "tests/layers/test_accumulation_engine.py",
        "tests/layers/test_std_conv.py",
        "tests/layers/test_folded_norm.py",
    ],
    "training/batch_size.py": ["tests/training/test_batch_size.py"],
    "training/accumulation.py": ["tests/training/test_accumulation.py", "tests/training/test_python_use.py"],
    "training/ema.py": ["tests/training/test_recipes.py"],
    "training/freezing.py": ["tests/training/test_recipes.py"],
    "training/batch_norm_statistics.py": ["tests/training/test_recipes.py"],
    "training/checkpoint.py": [
        "tests/training/test_checkpoint.py",
        "tests/commands/test_class_paths.py",
        "tests/training/test_python_use.py",
    ],
    "training/checkpoint_callbacks.py": [
        "tests/training/test_checkpoint_callbacks.py",
        "tests/training/test_checkpoint.py",
        "tests/training/test_resume.py",
        "tests/training/test_batch_size.py",
    ],
    "training/divergence.py": ["tests/training/test_divergence.py"],
    "training/run_folder.py": ["tests/training/test_run_folder.py"],
    "training/optimizer.py": ["tests/training/test_optimizer.py"],
    "training/schedules.py": ["tests/training/test_optimizer.py"],
    "training/mixing.py": ["tests/training/test_mixing.py"],
    "training/predictions.py": ["tests/training/test_predictions.py"],
    "training/split_check.py": ["tests/training/test_split_check.py"],
    "comparison/statistics.py": ["tests/comparison/test_statistics.py"],
    "comparison/grouping.py": ["tests/comparison/test_compare.py"],
    "report/predictions.py": ["tests/report", "tests/comparison"],
    "data/splits.py": ["tests/data/test_splits.py"],
    "data/hold_out.py": ["tests/data/test_duplicates.py", "tests/data/test_splits.py", "tests/data/test_folder.py"],
    "data/pair_layout.py": ["tests/data/test_segmentation.py"],
    "data/masks.py": ["tests/data/test_segmentation.py"],
    "data/pair_augmentation.py": ["tests/data/test_segmentation.py"],
    "data/free_memory.py": ["tests/data/test_free_memory.py"],
    "data/sampler.py": ["tests/data/test_sampler.py"],
    "inference/graph_check.py": ["tests/inference/test_bundle.py"],
    "report/calibration.py": ["tests/report"],
    "study/planning.py": ["tests/study/test_planning.py"],
    "study/trials.py": ["tests/study/test_planning.py"],
    "study/definition.py": ["tests/study/test_planning.py"],
    "study/runner.py": ["tests/study/test_runner.py"],
    "study/store.py": ["tests/study/test_store.py", "tests/study/test_runner.py"],
    "comparison/checks.py": ["tests/comparison/test_compare.py"],
    "comparison/answer.py": ["tests/comparison/test_compare.py"],
    "backbones/transfer.py": [
        "tests/backbones/test_transfer.py",
        "tests/backbones/test_create.py",
        "tests/backbones/test_released.py",
    ],
    "backbones/pretrained.py": [
        "tests/backbones/test_transfer.py",
        "tests/backbones/test_create.py",
        "tests/backbones/test_released.py",
    ],
    "backbones/released.py": ["tests/backbones/test_released.py"],
    "files.py": ["tests/test_files.py"],
    "yaml_files.py": ["tests/test_files.py"],
    "commands/class_paths.py": ["tests/commands/test_class_paths.py"],
}
"""Modules, and the tests that should notice a change in them."""

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.BitOr: ast.BitAnd},
    **{ast.BitAnd: ast.BitOr},
}


class Mutant(NamedTuple):
    """A module with one change.

    Attributes:
        module: Path below the package.
        line: Number of the changed line.
        text: The line before the change, stripped.
        change: What was done.
        tree: The changed module.
    """

    module: str
    line: int
    text: str
    change: str
    tree: ast.Module


def mutants_of(module: str) -> list[Mutant]:
    """List all changes of a module, in a fixed order.

    Docstrings, annotations, messages, decorators and asserts are left alone: an assert only says what holds already.
    """
    source = (ROOT / "gn_transfer" / module).read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    left_alone = {id(part) for node in ast.walk(tree) for kind in _left_alone(node) for part in ast.walk(kind)}
    found = []
    for number, node in enumerate(ast.walk(tree)):
        for change, apply in () if id(node) in left_alone else _changes(node):
            changed = deepcopy(tree)
            twin = next(other for place, other in enumerate(ast.walk(changed)) if place == number)
            apply(twin)
            line = getattr(node, "lineno", 0)
            found.append(Mutant(module, line, lines[line - 1].strip(), change, ast.fix_missing_locations(changed)))
    return found


def _left_alone(node: ast.AST) -> Iterator[ast.AST]:
    yield from [node] if isinstance(node, ast.Assert) else getattr(node, "decorator_list", [])
    for field in ("annotation", "returns"):
        if (found := getattr(node, field, None)) is not None:
            yield found


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], None]]]:
    """List the changes of a node: what is done, and a function that does it to a copy."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            if swap := _SWAPS.get(type(operator)):
                yield f"{type(operator).__name__} -> {swap.__name__}", _set_operator(place, swap)
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        of_text = isinstance(node, ast.BinOp) and any(_is_text(side) for side in (node.left, node.right))
        if (swap := _SWAPS.get(type(node.op))) and not of_text:
            yield f"{type(node.op).__name__} -> {swap.__name__}", _set("op", swap)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not x -> x", _become_bool
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", _set_value(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield f"{node.value} -> {node.value + 1}", _set_value(node.value + 1)
    elif isinstance(node, ast.If | ast.IfExp):
        yield "condition -> False", _set_test
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call left out", _leave_out
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield "return None", _return_none


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _set_operator(place: int, operator: type[ast.AST]) -> Callable[[ast.AST], None]:
    def apply(node: ast.AST) -> None:
        node.ops[place] = operator()  # type: ignore[attr-defined]

    return apply


def _set(field: str, kind: type[ast.AST]) -> Callable[[ast.AST], None]:
    return lambda node: setattr(node, field, kind())


def _set_value(value: object) -> Callable[[ast.AST], None]:
    return lambda node: setattr(node, "value", value)


def _set_test(node: ast.AST) -> None:
    node.test = ast.Constant(False)  # type: ignore[attr-defined]


def _become_bool(node: ast.AST) -> None:
    node.op = ast.UAdd()  # type: ignore[attr-defined]
    node.operand = ast.Call(ast.Name("bool", ast.Load()), [node.operand], [])  # type: ignore[attr-defined]


def _leave_out(node: ast.AST) -> None:
    node.value = ast.Constant(None)  # type: ignore[attr-defined]


def _return_none(node: ast.AST) -> None:
    node.value = None  # type: ignore[attr-defined]


class _Loader(importlib.machinery.SourceFileLoader):
    """Load a module from a changed tree."""

    def __init__(self, fullname: str, path: str, tree: ast.Module) -> None:
        super().__init__(fullname, path)
        self.tree = tree

    def get_code(self, fullname: str) -> CodeType:
        """Compile the tree."""
        code: CodeType = compile(self.tree, self.path, "exec")
        return code


class _Finder(importlib.abc.MetaPathFinder):
    """Find one module in a changed form."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = "gn_transfer." + mutant.module.removesuffix(".py").replace("/", ".")
        self.path = str(ROOT / "gn_transfer" / mutant.module)
        self.tree = mutant.tree

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> object:
        """Give the changed module."""
        if fullname != self.name:
            return None
        loader = _Loader(fullname, self.path, self.tree)
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


def survives(mutant: Mutant) -> bool:
    """Run the tests of a mutant in a process of its own; a test that does not end notices as well."""

    def tests() -> int:
        import pytest

        sys.meta_path.insert(0, _Finder(mutant))
        options = ["-x", "-q", "-p", "no:cacheprovider"]
        code = int(pytest.main([*options, *(str(ROOT / path) for path in TARGETS[mutant.module])]))
        examples = importlib.import_module("gn_transfer." + mutant.module.removesuffix(".py").replace("/", "."))
        return code or doctest.testmod(examples).failed

    return run_forked(tests, TIMEOUT_SECONDS) == 0


def allowed_survivors() -> set[tuple[str, str, str]]:
    """Read the changes that may survive: module, line and change, with a reason behind them."""
    entries = set()
    for line in ALLOWED.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            module, rest = line.split(" | ", 1)
            text, change, reason = rest.rsplit(" | ", 2)  # code may hold the sign
            assert reason
            entries.add((module, text, change))
    return entries


def main(arguments: Sequence[str] | None = None) -> int:
    """Try mutants and print those that survive; 1 where one may not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=6, help="of each module, by chance (default 6); 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("modules", nargs="*", help="such as layers/convert.py (default: all)")
    options = parser.parse_args(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins are imported already
    os.chdir(ROOT)
    import lightning.pytorch
    import timm
    import torch  # what every test needs is imported once, before the processes fork

    torch.set_num_threads(1)
    del lightning, timm
    unchanged, chosen = [], []
    for module in options.modules or TARGETS:
        source = (ROOT / "gn_transfer" / module).read_text(encoding="utf-8")
        unchanged.append(Mutant(module, 0, "", "", ast.parse(source)))
        mutants = mutants_of(module)
        count = len(mutants) if options.mutants == 0 else min(options.mutants, len(mutants))
        chosen += random.Random(f"{options.seed} {module}").sample(mutants, count)
    allowed = allowed_survivors()
    survivors = 0
    with ThreadPoolExecutor(options.workers) as pool:
        for mutant, passes in zip(unchanged, pool.map(survives, unchanged), strict=True):
            if not passes:
                print(f"{mutant.module}: its tests fail without any change")
                return 2
        for tried, (mutant, survived) in enumerate(zip(chosen, pool.map(survives, chosen), strict=True)):
            if tried % 20 == 0:
                print(f"{tried} of {len(chosen)} tried", flush=True)
            if survived:
                known = (mutant.module, mutant.text, mutant.change) in allowed
                survivors += not known
                print(f"{'may survive' if known else 'SURVIVES'}  {mutant.module}:{mutant.line}  {mutant.change}")
                print(f"    {mutant.text}", flush=True)
    killed = len(chosen) - survivors
    print(f"{killed} of {len(chosen)} mutants are noticed, or make no difference ({killed / len(chosen):.1%})")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
