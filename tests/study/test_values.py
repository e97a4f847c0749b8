"""Properties of what a study reads from words and files."""

from __future__ import annotations

import contextlib
import math

import yaml
from hypothesis import given
from hypothesis import strategies as st

from gn_transfer.commands.parsing import explain
from gn_transfer.config import did_you_mean
from gn_transfer.study.definition import flatten, parse_value

PLAIN = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text("abcn_", min_size=1, max_size=8)


@given(PLAIN | st.lists(PLAIN, max_size=4))
def test_a_value_is_read_as_it_is_written(value: object) -> None:
    assert parse_value(yaml.safe_dump(value).removesuffix("...\n").strip()) == value


@given(st.floats(1e-300, 1e300))
def test_numbers_in_any_notation(value: float) -> None:
    for text in (f"{value!r}", f"{value:e}", f"{value:.3e}"):
        assert math.isclose(parse_value(text), value, rel_tol=1e-2)


@given(st.dictionaries(WORDS, st.dictionaries(WORDS, PLAIN, min_size=1), min_size=1))
def test_flattening_loses_nothing(nested: dict[str, dict[str, object]]) -> None:
    special = {"class_path", "init_args"}
    nested = {group: {k: v for k, v in some.items() if k not in special} for group, some in nested.items()}
    flat = flatten({group: some for group, some in nested.items() if group not in special})
    assert flat == {
        f"{group}.{key}": value for group, some in nested.items() if group not in special for key, value in some.items()
    }


@given(st.text(max_size=60), st.lists(WORDS, max_size=5))
def test_a_message_is_made_of_any_text(text: str, names: list[str]) -> None:
    assert isinstance(explain(text, names, names), str)
    assert all(name in did_you_mean(text, names) for name in names)


@given(st.text(max_size=40))
def test_no_text_crashes_the_reader(text: str) -> None:
    with contextlib.suppress(yaml.YAMLError, ValueError):  # what the command line explains
        parse_value(text)
