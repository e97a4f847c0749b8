"""Which graphs of ONNX are run: those that keep to themselves and come to an end. Needs neither torch nor onnx.

A graph from outside could name files beside it, or hold a loop without end. Its messages are read as protobuf writes
them: fields of a number and a type, some of which hold messages again. Sources: protobuf's encoding; ``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gn_transfer.config import ConfigError, shortened

# Fields by number: of ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto, SparseTensorProto.
_GRAPH_OF_MODEL, _FUNCTION_OF_MODEL = 7, 25
_OTHERS_OF_MODEL = frozenset({1, 2, 3, 4, 5, 6, 8, 14})  # versions, names, texts, operator sets
_NODE_OF_GRAPH, _TENSOR_OF_GRAPH, _SPARSE_OF_GRAPH = 1, 5, 15
_OPERATOR, _ATTRIBUTE_OF_NODE = 4, 5
_TENSORS_OF_ATTRIBUTE, _GRAPHS_OF_ATTRIBUTE, _SPARSE_OF_ATTRIBUTE = (5, 10), (6, 11), (22, 23)
_EXTERNAL, _PLACE = 13, 14
_TENSORS_OF_SPARSE = (1, 2)

_NEVER_ENDING = frozenset({"Loop", "Scan", "If"})
_MAX_DEPTH = 8
_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5


def check_graph(path: Path) -> None:
    """Refuse a graph with values in other files, which no SHA-256 covers, with loops, or with functions of its own.

    Args:
        path: The ONNX file.

    Raises:
        ConfigError: See above, or it is no such file.
    """
    try:
        for problem in _problems_of_model(memoryview(path.read_bytes())):
            raise ConfigError(f"{path} {problem}, which no export does; refused.")
    except (ValueError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} is no graph of ONNX; copy the bundle again, or export the checkpoint again."
        ) from error


def _problems_of_model(data: memoryview) -> Iterator[str]:
    for number, content in _fields(data):
        if number == _GRAPH_OF_MODEL:
            yield from _problems_of_graph(content, 0)
        elif number == _FUNCTION_OF_MODEL:
            yield "holds functions, which can call each other without end"
        elif number not in _OTHERS_OF_MODEL:
            yield f"holds a field of the number {number}"


def _problems_of_graph(data: memoryview, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError("graphs inside graphs")
    for number, content in _fields(data):
        if number == _NODE_OF_GRAPH:
            yield from _problems_of_node(content, depth)
        elif number == _TENSOR_OF_GRAPH:
            yield from _problems_of_tensor(content)
        elif number == _SPARSE_OF_GRAPH:
            yield from _problems_of_sparse(content)


def _problems_of_node(data: memoryview, depth: int) -> Iterator[str]:
    for number, content in _fields(data):
        if number == _OPERATOR and (name := bytes(content).decode("utf-8", "replace")) in _NEVER_ENDING:
            yield f"holds the operator {shortened(name)}"
        elif number == _ATTRIBUTE_OF_NODE:
            yield from _problems_of_attribute(content, depth)


def _problems_of_attribute(data: memoryview, depth: int) -> Iterator[str]:
    for number, content in _fields(data):
        if number in _TENSORS_OF_ATTRIBUTE:
            yield from _problems_of_tensor(content)
        elif number in _GRAPHS_OF_ATTRIBUTE:
            yield from _problems_of_graph(content, depth + 1)
        elif number in _SPARSE_OF_ATTRIBUTE:
            yield from _problems_of_sparse(content)


def _problems_of_sparse(data: memoryview) -> Iterator[str]:
    for number, content in _fields(data):
        if number in _TENSORS_OF_SPARSE:
            yield from _problems_of_tensor(content)


def _problems_of_tensor(data: memoryview) -> Iterator[str]:
    if any(number == _EXTERNAL or (number == _PLACE and bytes(content) != b"\0") for number, content in _fields(data)):
        yield "keeps values in another file"


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Give number and content of the fields of a message.

    Raises:
        ValueError, IndexError: It is cut short, or none.
    """
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        if key >= 2**32:  # other readers keep 32 bits of it, and would see another field
            raise ValueError(f"a field of the key {key}")
        kind = key & 7
        if kind == _VARINT:
            begin = place
            _, place = _varint(data, place)
        elif kind == _LENGTH:
            length, begin = _varint(data, place)
            place = begin + length
        elif kind in (_FIXED_32, _FIXED_64):
            begin, place = place, place + (4 if kind == _FIXED_32 else 8)
        else:
            raise ValueError(f"a field of type {kind}")
        if place > len(data):
            raise ValueError("cut short")
        yield key >> 3, data[begin:place]


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Read a number of up to ten bytes; give it, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise ValueError("a number of more than ten bytes")
