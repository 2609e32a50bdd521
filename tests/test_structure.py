"""Nested values: taken apart and put together again without a loss, and alike if and only if they are built alike."""

from __future__ import annotations

import collections
import dataclasses
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowmem_higher.structure import flatten, tensors_in, unflatten


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Record:
    first: Any
    second: Any


class Opaque:
    """Something that is not opened."""


constants = st.one_of(
    st.text(max_size=3),
    st.binary(max_size=3),
    st.booleans(),
    st.none(),
    st.just(...),
    st.sampled_from([torch.float32, torch.int64, torch.device("cpu"), torch.strided, torch.contiguous_format, int]),
)
numbers = st.one_of(st.integers(-5, 5), st.floats(-2, 2), st.complex_numbers(max_magnitude=2, allow_nan=False))
tensors = st.integers(0, 3).map(lambda n: torch.arange(float(n)))
leaves = st.one_of(constants, numbers, tensors, st.builds(Opaque))


def containers(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.one_of(st.text(max_size=2), st.integers(0, 3))
    return st.one_of(
        st.lists(items, max_size=3),
        st.lists(items, max_size=3).map(tuple),
        st.dictionaries(keys, items, max_size=3),
        st.dictionaries(keys, items, max_size=3).map(collections.OrderedDict),
        st.builds(Pair, items, items),
        st.builds(Record, items, items),
        st.builds(slice, numbers, st.none(), tensors),
    )


values = st.recursive(leaves, containers, max_leaves=12)


def same(one: Any, other: Any) -> bool:
    """Equal in kind and value, and identical where a leaf is passed on by reference."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (Tensor, Opaque)):
        return one is other
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Record):
        return same(one.first, other.first) and same(one.second, other.second)
    if isinstance(one, slice):
        return same([one.start, one.stop, one.step], [other.start, other.stop, other.step])
    return one is other or one == other


@given(values)
def test_round_trip(value: Any) -> None:
    found: list[Any] = []
    structure = flatten(value, found)
    hash(structure)
    left = iter(found)
    assert same(unflatten(structure, left), value)
    assert next(left, None) is None  # every leaf was used


@given(values, values)
def test_structures_are_equal_only_for_values_that_are_built_alike(one: Any, other: Any) -> None:
    """A program is shared by structure, so equality must not confuse two values that a call would tell apart."""
    structures = [flatten(value, []) for value in (one, other)]
    if structures[0] == structures[1]:
        found: list[Any] = []
        flatten(one, found)
        assert same(unflatten(structures[1], iter(found)), one)


@given(values)
def test_the_structure_does_not_depend_on_leaves(value: Any) -> None:
    found: list[Any] = []
    structure = flatten(value, found)
    others = [leaf + 1 if isinstance(leaf, (Tensor, int, float, complex)) else leaf for leaf in found]
    assert flatten(unflatten(structure, iter(others)), []) == structure


@given(values)
def test_all_tensors_are_found_in_order(value: Any) -> None:
    found: list[Any] = []
    flatten(value, found)
    inside = [leaf for leaf in found if isinstance(leaf, Tensor)]
    outputs = tensors_in(value)
    slices = any(isinstance(part, slice) for part in walk(value))  # arguments only, never a result
    assert slices or (len(outputs) == len(inside) and all(map(same, outputs, inside)))


def walk(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [value, *(part for item in value.values() for part in walk(item))]
    if isinstance(value, (list, tuple)):
        return [value, *(part for item in value for part in walk(item))]
    if isinstance(value, Record):
        return [value, *walk(value.first), *walk(value.second)]
    return [value]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (0, False),
        (1.0, True),
        ("a", b"a"),
        ([1], (1,)),
        ({"a": 1}, {"b": 1}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({}, collections.OrderedDict()),
        ((), []),
        (Pair(1, 2), (1, 2)),
        (Record(1, 2), Pair(1, 2)),
        (None, 0),
        (torch.zeros(1), 0),
        (torch.float32, torch.float64),
        (slice(1, None), slice(None, 1)),
        (True, "True"),
    ],
)
def test_structures_that_differ(one: Any, other: Any) -> None:
    assert flatten(one, []) != flatten(other, [])


@pytest.mark.parametrize(
    ("one", "other"), [(1, 2.5), ([1, "a"], [7, "a"]), ({"x": torch.zeros(2)}, {"x": torch.ones(3)}), (1, 2j)]
)
def test_numbers_and_tensors_are_leaves(one: Any, other: Any) -> None:
    """So that steps which differ in a number, or in a batch, share their program."""
    assert flatten(one, []) == flatten(other, [])


def test_an_array_is_copied_since_its_owner_may_write_into_it() -> None:
    array, found = np.arange(3), []
    structure = flatten([array], found)
    array[0] = 7
    assert unflatten(structure, iter(found))[0].tolist() == [0, 1, 2]


def test_torch_results_are_opened_and_rebuilt() -> None:
    result = torch.sort(torch.tensor([2.0, 1.0]))
    found: list[Any] = []
    again = unflatten(flatten(result, found), iter(found))
    assert type(again) is type(result)
    assert again.values is result.values
    assert again.indices is result.indices


def test_model_outputs_of_any_class_are_opened() -> None:
    class ModelOutput(collections.OrderedDict[str, Any]):
        """As in transformers: a mapping with attributes."""

    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    output = ModelOutput(loss=a, logits=b, past=[(c, None)])
    assert [id(tensor) for tensor in tensors_in(output)] == [id(a), id(b), id(c)]
    assert [id(tensor) for tensor in tensors_in(MappingProxyType({"x": Record(c, [a])}))] == [id(c), id(a)]
    assert tensors_in(Record) == []  # the class itself is no result


def test_a_frozen_dataclass_and_fields_that_init_does_not_take() -> None:
    @dataclasses.dataclass(frozen=True)
    class Frozen:
        x: Tensor
        derived: float = dataclasses.field(init=False, default=2.0)

    value = Frozen(torch.ones(2))
    found: list[Any] = []
    again = unflatten(flatten(value, found), iter(found))
    assert again.x is value.x
    assert again.derived == 2.0
