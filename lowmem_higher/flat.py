"""A flat graph of ATen calls: traced from a function of tensors, simplified, and run without autograd.

NOTE [ What a flat graph may hold ]

Tracing runs a function once, on tensors that have shapes and no values, and writes down every call below autograd. So
whatever the function makes of its inputs' *values* in Python (a branch, a number read with `item`, a numpy array)
cannot be traced and raises, and so does a tensor that is no input (a closure, a global). What stays is baked in: Python
numbers, shapes, strides, types. Whoever runs the graph again has to compare those.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_logger = logging.getLogger("torch._subclasses.fake_tensor")


class NotTraceableError(Exception):
    """Why a function cannot be traced."""


class FlatGraph:
    """A traced function `f(*tensors) -> list of tensors`.

    Args:
        graph: Its calls.
        outputs: Which of its outputs are wanted; the others are not computed.
        fresh: Which of those must not share memory with an input: they are copied where they would.
    """

    def __init__(self, graph: fx.Graph, outputs: Sequence[int] | None = None, fresh: Container[int] = ()) -> None:
        copied = fx.Graph()
        returned = copied.graph_copy(graph, {})
        values = list(returned) if outputs is None else [returned[index] for index in outputs]  # type: ignore[index, arg-type]
        inside = _views_of_inputs(copied)
        for place, value in enumerate(values):
            if place in fresh and value in inside:
                values[place] = copied.call_function(_aten.clone.default, (value,))
        copied.output(values)
        copied.eliminate_dead_code()
        self.graph = copied
        self.placed = sum(node.op == "placeholder" for node in copied.nodes)
        self._run = _generated(copied)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Any]:
        """Run it; the results have no graph."""
        with _BELOW_AUTOGRAD():
            found: list[Any] = self._run(*inputs)
        return found

    def __len__(self) -> int:
        return sum(node.op == "call_function" for node in self.graph.nodes)


def traced(function: Callable[..., Sequence[Any]], inputs: Sequence[Tensor]) -> fx.Graph:
    """Trace a function of tensors that returns a list of tensors.

    Raises:
        NotTraceableError: The function depends on values, reads other tensors, draws random numbers or writes into its
            inputs.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # takes seconds: on the first use

    level = _logger.level
    _logger.setLevel(logging.CRITICAL)  # a refusal is no error
    try:
        # A tensor that is given twice (Adam's second moment and its maximum, after one step) is two inputs.
        module = make_fx(function, tracing_mode="fake")(*[tensor.detach() for tensor in inputs])
    except NotTraceableError:
        raise
    except Exception as error:
        # Whatever the code of a model raises when its tensors have no values.
        raise NotTraceableError(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    finally:
        _logger.setLevel(level)
    graph: fx.Graph = module.graph
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise NotTraceableError(f"it holds a constant tensor ({node.target})")
        if isinstance(node.target, torch._ops.OpOverload):
            if "c10d" in node.target.namespace:
                raise NotTraceableError(f"it calls a collective, in an order that all processes share ({node.target})")
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                raise NotTraceableError(f"it draws random numbers ({node.target})")
            if torch.Tag.data_dependent_output in node.target.tags:
                raise NotTraceableError(f"it reads the value of a tensor in Python ({node.target})")
    _drop_aliases(graph)
    _views_of_inputs(graph)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        node.meta.clear()  # of the tensors without values
    return graph


_SAME = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}
_VIEWS = {  # calls that give the same elements under other indices, whatever the strides
    _aten.t.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
    _aten.slice.Tensor,
    _aten.select.int,
}


def _drop_aliases(graph: fx.Graph) -> None:
    """Let views that show the same elements in the same shape be one: `t(t(x))` is `x`."""
    seen: dict[Any, fx.Node] = {}
    roots: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target in _SAME:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        if node.target in _VIEWS:
            roots[node] = root = roots.get(node.args[0], node.args[0])
            key = (root, value.shape, value.stride(), value.storage_offset(), value.dtype)
            same = seen.setdefault(key, node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
        else:
            seen[node, value.shape, value.stride(), value.storage_offset(), value.dtype] = node


def _views_of_inputs(graph: fx.Graph) -> set[fx.Node]:
    """The inputs, and all that may share memory with one.

    Raises:
        NotTraceableError: A call writes into one.
    """
    inside: set[fx.Node] = {node for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if not isinstance(node.target, torch._ops.OpOverload):  # an element of a tuple
            if inside.intersection(node.all_input_nodes):
                inside.add(node)
            continue
        for place, argument in enumerate(node.target._schema.arguments):
            given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            if argument.alias_info is None or not inside.intersection(_nodes_in(given)):
                continue
            if argument.alias_info.is_write:
                raise NotTraceableError(f"it writes into an input ({node.target})")
            inside.add(node)
    return inside


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _generated(graph: fx.Graph) -> Callable[..., list[Any]]:
    """The graph as a Python function. Values are let go after their last use."""
    return fx.GraphModule({}, _bound(graph)).forward


def _bound(graph: fx.Graph) -> fx.Graph:
    """The same graph, with torch's own bindings in place of operators: each call takes half the time."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in copied.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = _BINDINGS.get(node.target, node.target)
    return copied


_BINDINGS: dict[Any, Any] = {
    getattr(getattr(_aten, name), overload): getattr(torch.Tensor if name in ("view", "expand") else torch, name)
    for name, overloads in {
        "add": ["Tensor"], "sub": ["Tensor"], "mul": ["Tensor"], "div": ["Tensor"], "mm": ["default"],
        "addmm": ["default"], "t": ["default"], "view": ["default"], "expand": ["default"], "neg": ["default"],
        "tanh": ["default"], "sum": ["default", "dim_IntList"], "cat": ["default"], "bmm": ["default"],
        "transpose": ["int"], "permute": ["default"], "relu": ["default"], "sigmoid": ["default"],
        "exp": ["default"], "sqrt": ["default"], "rsqrt": ["default"], "where": ["self"], "clone": ["default"],
    }.items()
    for overload in overloads
}  # fmt: skip
_BELOW_AUTOGRAD = torch._C._AutoDispatchBelowAutograd
