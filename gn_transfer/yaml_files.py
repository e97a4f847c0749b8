"""YAML files of plain values, read so that no content can hang or crash the reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gn_transfer.files import read_text

_MAX_DEPTH = 32
_MAX_VALUES = 100_000
_MAX_CHARACTERS = 4 * 2**20
_MAX_DIGITS = 64


class _YamlLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml is 10 times as fast
    """PyYAML's safe loader, which refuses a key that stands twice; PyYAML would take the second in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
                keys.add((key.tag, key.value))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Read a number of a length that a number can have: PyYAML's time grows with its square."""
        if len(node.value) > _MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value):,} characters", node.start_mark
            )
        of_int = node.tag.endswith(":int")
        number: int | float = self.construct_yaml_int(node) if of_int else self.construct_yaml_float(node)
        return number


for _tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    _YamlLoader.add_constructor(_tag, _YamlLoader.construct_number)


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values; errors are those of :func:`read_text` and :func:`parse_yaml`."""
    return parse_yaml(read_text(path))


def parse_yaml(text: str) -> Any:
    """Read YAML of plain values.

    Args:
        text: Its text.

    Returns:
        What it holds: mappings, lists, numbers, texts, None.

    Raises:
        ValueError: It is not YAML, longer than 4 MiB, has a key twice or a tag, is nested deeper than 32 levels, or
            holds more than 100,000 values when its aliases are written out.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"longer than {_MAX_CHARACTERS / 2**20:.0f} MiB")
    if not text.isascii():
        text.encode()  # bytes that are no UTF-8 raise a ValueError here
    try:
        _check_size(text)
        return yaml.load(text, Loader=_YamlLoader)
    except Exception as error:  # PyYAML's constructors raise what they run into
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _check_size(text: str) -> None:
    """Count the values before any is made, those behind an alias every time."""
    sizes: dict[str, int] = {}
    open_collections: list[tuple[str | None, int]] = []  # anchor, and the count where it began
    count = 0
    for event in yaml.parse(text, Loader=_YamlLoader):
        if tag := getattr(event, "tag", None):
            raise ValueError(f"the tag {tag.replace('tag:yaml.org,2002:', '!!')}; write plain values")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias {event.anchor} inside or before what it stands for")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_collections.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, began = open_collections.pop()
            if anchor is not None:
                sizes[anchor] = count - began
        if len(open_collections) > _MAX_DEPTH:
            raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
        if count > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES:,} values")
