"""YAML files of plain values, read so that no content can hang or crash the reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gn_transfer.files import read_text

_MAX_DEPTH = 32
_MAX_VALUES = 100_000


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


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values.

    Args:
        path: The file.

    Returns:
        What it holds: mappings, lists, numbers, texts, None.

    Raises:
        OSError: See :func:`read_text`.
        ValueError: It is not YAML, has a key twice, is nested deeper than 32 levels, or holds more than 100,000 values
            when its aliases are written out.
    """
    text = read_text(path)
    if not text.isascii():
        text.encode()  # bytes that are no UTF-8 raise a ValueError here
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_YamlLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
        content = yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    waiting, seen = [content], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES:,} values")
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return content
