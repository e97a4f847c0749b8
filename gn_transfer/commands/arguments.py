"""The arguments before the parser reads them: built-in configs, ``last``, and the configuration inside a checkpoint."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from gn_transfer.commands.class_paths import config_of_checkpoint, read_config, typed_classes
from gn_transfer.commands.recognize import find_checkpoint, leading_path, recognize, run_name
from gn_transfer.config import ConfigError, find_config
from gn_transfer.training.checkpoint import read_checkpoint
from gn_transfer.training.run_folder import LAST, PREVIOUS, find_last


class Arguments:
    """The arguments as Lightning's command line will read them, with what had to be found out before.

    Attributes:
        command: The command.
        config_name: Name of the last config, without suffix; the name of a folder of runs.
        typed: The arguments as the user typed them.
        typed_classes: Classes that the user named in them.
        remarks: What was found in the folder that ``fit PATH`` names, and what was chosen for it.
        notes: What the user should know about the checkpoint.
        checkpoint: Path behind ``--ckpt_path``, resolved.
        stored: Content of that checkpoint under ``gn_transfer``.
        names_images: Whether a path, a configuration, a checkpoint or an option says which images are meant.
        allow_class_path: Files may name any class.
    """

    def __init__(self, command: str, arguments: Sequence[str], *, typed: Collection[str] | None = None) -> None:
        self.command = command
        self.typed = list(arguments)
        self.typed_classes = typed_classes(self.typed) if typed is None else frozenset(typed)
        path, self.argv = leading_path(["--help" if word == "--help_all" else word for word in arguments])
        self.remarks: list[str] = []
        self.notes: list[str] = []
        self.allow_class_path = "--allow_class_path" in self.argv
        self.argv = [word for word in self.argv if word != "--allow_class_path"]
        name = self._take("--name")
        root = Path(next((self._get(index) for index in self._values_of("--trainer.default_root_dir")), "."))
        if path is not None and self.argv and not path.exists() and not self.argv[0].startswith("-"):
            raise ConfigError(f"{path}: no such folder; put a path with spaces in quotes: '{path} {self.argv[0]}'.")
        if path is not None:
            self._serve(path, root)
        configs = [self._replace(index, find_config) for index in self._values_of("--config", "-c")]
        self._configs = {
            config: read_config(Path(config), allow_class_path=self.allow_class_path) for config in configs
        }
        if studies := [config for config, content in self._configs.items() if "base" in content]:
            raise ConfigError(f"{studies[0]} is a study of many runs: gn-transfer sweep --config {studies[0]}.")
        if not self._values_of("--trainer.default_root_dir"):
            roots = (content.get("trainer", {}).get("default_root_dir") for content in self._configs.values())
            root = Path(next((found for found in reversed([*roots]) if isinstance(found, str)), root))
        self.config_name = run_name(Path(name or path or (Path(configs[-1]).stem if configs else "default")))
        self.has_config = bool(configs)
        self.checkpoint: Path | None = None
        self.stored: dict[str, Any] | None = None
        named = bool(configs) or path is not None or name is not None
        for index in self._values_of("--ckpt_path"):
            newest = self._get(index) == "last"
            self.checkpoint = Path(self._replace(index, lambda value: self._checkpoint(value, root, named)))
            if command != "fit" and newest:  # the configuration only says whose newest run is meant
                for option in ("--config", "-c"):
                    self._take(option)
                configs = []
            self.has_config = bool(configs)
            self.stored = self._read(index)
        self.names_images = bool(self._configs) or bool(
            self.stored or any(word == "--data" or word.startswith(("--data=", "--data.")) for word in self.argv)
        )
        if self.stored is not None and not configs and name is None:
            self.config_name = run_name(Path(str(self.stored.get("config_name"))))
        if command != "fit" and self.stored is None and not any(a in ("-h", "--help") for a in self.argv):
            raise ConfigError(
                f"{command} needs a checkpoint: give --ckpt_path checkpoints/CONFIG/RUN/best.ckpt, or "
                "--config NAME with --ckpt_path last."
            )

    def _read(self, index: int) -> dict[str, Any]:
        """Read the checkpoint; a run whose last one is corrupt goes on with the one before."""
        assert self.checkpoint is not None
        try:
            content = read_checkpoint(self.checkpoint)
        except ConfigError as error:
            before = self.checkpoint.parent / PREVIOUS
            if self.command != "fit" or self.checkpoint.name != LAST or not before.is_file():
                raise
            content = read_checkpoint(before)
            self.checkpoint = Path(self._replace(index, lambda _: before))
            self.notes.append(f"{error} The run goes on with the checkpoint before it, {before.name}.")
        stored: dict[str, Any] = content["gn_transfer"]
        if not self.has_config and not isinstance(stored.get("config"), dict):
            raise ConfigError(
                f"--ckpt_path {self.checkpoint} stores no configuration, as one that a script of yours wrote; give the "
                "options of the run, --config NAME or --data ...."
            )
        return stored

    def _serve(self, path: Path, root: Path) -> None:
        """Turn a path in front of the options into options."""
        option = "--data.root" if self.command == "fit" else "--ckpt_path"
        if self._values_of(option):
            raise ConfigError(f"{self.command} {path}: the path says what {option} says; give one of them.")
        if self.command != "fit":
            self.argv = ["--ckpt_path", str(find_checkpoint(path, root)), *self.argv]
        elif self._values_of("--config", "-c", "--ckpt_path"):
            self.argv += ["--data.root", str(path.resolve())]
        else:
            recognized = recognize(path)
            chosen, overruled = self._not_given(recognized.options)
            self.argv, self.remarks = [*chosen, *self.argv], recognized.remarks
            if overruled:
                self.remarks.append(f"your own options count instead of {', '.join(overruled)}")
            words = shlex.join(word for word in self.argv if word != "--dry_run")
            self.remarks.append(f"as: gn-transfer {self.command} {words}")

    def _not_given(self, options: Sequence[str]) -> tuple[list[str], list[str]]:
        """Leave out what the user gives himself; name that as well."""
        pairs = list(zip(options[::2], options[1::2], strict=True))
        overruled = [f"{key} {value}" for key, value in pairs if self._values_of(key)]
        return [word for pair in pairs if not self._values_of(pair[0]) for word in pair], overruled

    def _take(self, option: str) -> str | None:
        """Remove an option that the parser does not know, and give its value."""
        value = None
        for index in reversed(self._values_of(option)):
            value = self._get(index) if value is None else value  # the last one counts
            del self.argv[index - (self.argv[index - 1] == option) : index + 1]
        return value

    @contextmanager
    def files(self) -> Iterator[list[str]]:
        """Give the arguments; without a config, the checkpoint's own configuration stands in front of them."""
        if self.stored is None or self.has_config:
            yield [self.command, *self._default_data(), *self.argv]
            return
        assert self.checkpoint is not None
        config, left_out = config_of_checkpoint(
            self.stored["config"], self.checkpoint, root_is_typed=bool(self._values_of("--data.root"))
        )
        typed = self._values_of("--trainer.max_epochs", "--trainer.max_steps") and not self._values_of("--samples")
        if typed and config.pop("samples", None) is not None:  # another length of the run
            config["trainer"].pop("limit_train_batches", None)
        if left_out and self.command == "fit":
            self.notes.append(
                f"not taken from the checkpoint: {', '.join(left_out)}; where they are wanted, give them again"
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            yield [self.command, "--config", str(path), *self.argv]

    def _default_data(self) -> list[str]:
        """Choose the sample where nothing else is chosen.

        A default of the parser would hand its own arguments down to the data that is chosen instead.
        """
        chosen = bool(self._values_of("--data")) or any("data" in content for content in self._configs.values())
        return [] if chosen else ["--data", "Sample"]

    def _checkpoint(self, value: str, root: Path, has_config: bool) -> Path:
        if value != "last":
            return Path(value)
        name = self.config_name if has_config else "*"
        found = find_last(root, name)
        if found is None:
            raise ConfigError(
                f"--ckpt_path last: no run under {root / 'checkpoints' / name} has a {LAST}; start one with "
                "gn-transfer fit, or give the path of a checkpoint."
            )
        return found

    def _values_of(self, *names: str) -> list[int]:
        """Positions whose argument is, or contains after ``=``, the value of an option."""
        found = []
        for index, argument in enumerate(self.argv):
            if argument in names and index + 1 < len(self.argv):
                found.append(index + 1)
            elif argument.startswith(tuple(f"{name}=" for name in names if name.startswith("--"))):
                found.append(index)
        return found

    def _get(self, index: int) -> str:
        argument = self.argv[index]
        return argument.split("=", 1)[1] if argument.startswith("--") else argument

    def _replace(self, index: int, resolve: Callable[[str], object]) -> str:
        value = str(resolve(self._get(index)))
        option, equals, _ = self.argv[index].partition("=")
        self.argv[index] = f"{option}={value}" if option.startswith("--") and equals else value
        return value
