"""Nested arguments and results: taken apart into a hashable structure and a list of leaves, and put together again."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Values that are part of the structure: they are immutable, compare by value and never carry a gradient.
_CONSTANTS = (
    str,
    bytes,
    bool,
    type(None),
    type(Ellipsis),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    type,
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The place of a leaf in a structure; `kind` is "tensor" or "value"."""

    kind: str


TENSOR, VALUE = Leaf("tensor"), Leaf("value")
Structure = Any  # nested tuples of constants and Leaf, hashable


def flatten(value: Any, leaves: list[Any]) -> Structure:
    """Append the leaves of `value` to `leaves` and return its structure.

    Tuples (named ones too), lists, dictionaries, slices and dataclasses are opened. Numbers are leaves rather than
    constants, so that a step which differs only in a number has the same structure. An array is copied, since its
    owner may write into it; any other object is a leaf by reference.
    """
    if isinstance(value, Tensor):
        leaves.append(value)
        return TENSOR
    kind = type(value)
    if issubclass(kind, _CONSTANTS):
        return value
    if kind is tuple or kind is list:
        return (kind, tuple([flatten(item, leaves) for item in value]))
    if issubclass(kind, tuple):  # named tuples and torch's own result tuples
        return (kind, tuple([flatten(item, leaves) for item in value]))
    if kind is dict or kind is OrderedDict:
        return (kind, tuple(value), tuple([flatten(item, leaves) for item in value.values()]))
    if dataclasses.is_dataclass(value):  # Hugging Face's model outputs too
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return (kind, tuple(fields), tuple([flatten(item, leaves) for item in fields.values()]))
    if kind is slice:
        return (slice, tuple([flatten(item, leaves) for item in (value.start, value.stop, value.step)]))
    leaves.append(copy.copy(value) if hasattr(value, "__array__") else value)
    return VALUE


def unflatten(structure: Structure, leaves: Any) -> Any:
    """Put a structure together again from an iterator over its leaves."""
    if structure is TENSOR or structure is VALUE:
        return next(leaves)
    if not isinstance(structure, tuple):
        return structure
    kind = structure[0]
    if len(structure) == 3:
        named = {key: unflatten(item, leaves) for key, item in zip(structure[1], structure[2], strict=True)}
        return kind(named) if kind is dict or kind is OrderedDict else kind(**named)
    items = [unflatten(item, leaves) for item in structure[1]]
    if kind is slice:
        return slice(*items)
    if kind is tuple or kind is list:
        return kind(items)
    return kind(*items) if hasattr(kind, "_fields") else kind(items)


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages that hold a tensor: one, or one for each part of a sparse tensor; none where torch shows none.

    Example:
        >>> matrix = torch.eye(3)
        >>> len(storages_of(matrix)), len(storages_of(matrix.to_sparse()))
        (1, 2)
    """
    tensor = local(tensor)
    parts = _SPARSE_PARTS.get(tensor.layout)
    if parts is not None:
        with torch._C.DisableTorchFunction():  # our own reading of tensors is not to be seen
            return [part(tensor).untyped_storage() for part in parts]
    return [tensor.untyped_storage()] if tensor.layout is torch.strided else []


_ROWS = (Tensor.crow_indices, Tensor.col_indices, Tensor.values)
_COLUMNS = (Tensor.ccol_indices, Tensor.row_indices, Tensor.values)
_SPARSE_PARTS: dict[torch.layout, tuple[Callable[[Tensor], Tensor], ...]] = {
    torch.sparse_coo: (Tensor._indices, Tensor._values),
    torch.sparse_csr: _ROWS,
    torch.sparse_bsr: _ROWS,
    torch.sparse_csc: _COLUMNS,
    torch.sparse_bsc: _COLUMNS,
}


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is one of `torch.distributed.tensor`, of which each process holds a part."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, without a graph; another tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return part


def layout_of(tensor: Any) -> str:
    """How a DTensor is spread over which processes."""
    mesh = tensor.device_mesh
    return f"{[*map(str, tensor.placements)]} over {mesh.mesh.tolist()} {mesh.mesh_dim_names}"


def bytes_of(tensor: Tensor) -> int:
    """The bytes of a tensor's elements; those of a sparse one's parts."""
    tensor = local(tensor)
    if tensor.layout is torch.strided:
        return tensor.nbytes
    return sum(storage.nbytes() for storage in storages_of(tensor))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a result, in a fixed order; dictionaries of any class and dataclasses are opened too."""
    found: list[Tensor] = []
    _collect(value, found.append)
    return found


def _collect(value: Any, add: Callable[[Tensor], None]) -> None:
    if isinstance(value, Tensor):
        add(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, add)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, add)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _collect(getattr(value, field.name), add)
