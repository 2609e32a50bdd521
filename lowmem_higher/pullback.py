"""Differentiates one step: the node that a step leaves in the user's graph, and the two ways to build its graph.

NOTE [ One node per step ]

Each step leaves one `StepNode` in the autograd graph. Its inputs are the carry and the externals that require grad, its
outputs the new fast weights and optimizer state. It holds the step's record and saves no value. So autograd itself
chains the steps, adds up the gradients of meta-parameters used at many steps and of weights used at any time, and
serves `.backward()` and `torch.autograd.grad` alike; and what nobody can differentiate any more is freed with its node.

The outputs are "saved" through hooks that keep no value but recompute it. That costs nothing until somebody asks for
the weights of a past time: unpacked, they are tensors whose place in the graph is this node's output.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lowmem_higher.errors import HigherOrderError, HistoryFreedError
from lowmem_higher.optim.base import State
from lowmem_higher.program import Buffers
from lowmem_higher.step import (
    Carry,
    External,
    Layout,
    StepRecord,
    StepRun,
    detached_state,
    state_leaf,
    with_state_leaves,
)
from lowmem_higher.structure import is_dtensor
from lowmem_higher.truncation import LastSteps


class Carries(Protocol):
    """Who hands out carries (the trajectory)."""

    last: LastSteps  # the steps that gradients pass through

    def carry_before(self, record: StepRecord) -> Carry:
        """The carry that a step started from."""

    def weights_after(self, record: StepRecord) -> list[Tensor]:
        """The fast weights that a step ended with."""

    def pull_back(
        self, record: StepRecord, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of those of a step's inputs that are wanted."""

    def keep(self, carry: Carry) -> Carry:
        """Count a carry that a replay holds."""

    def built_with(self, last: StepRecord) -> list[StepRecord]:
        """The steps whose graphs are built together with that of `last` by a native replay, in order."""

    def rebuilt_with(self, last: StepRecord) -> list[StepRecord]:
        """The steps whose graphs are held together with that of `last`, in order."""

    def spent(self, record: StepRecord) -> None:
        """The step was pulled back for the last time."""


class Recorded(Protocol):
    """What a node holds: the record of a step, or a scan."""

    layout: Layout

    @property
    def externals(self) -> Sequence[External]:
        """What else the node reads."""


class StepNode(torch.autograd.Function):
    """The place of one step in the user's graph."""

    @staticmethod
    def forward(
        ctx: Any, carries: Carries, record: StepRecord, outputs: list[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Put the outputs, which are computed already, into the graph."""
        ctx.set_materialize_grads(False)
        ctx.carries, ctx.record, ctx.inputs, ctx.truncated = carries, record, len(inputs), False
        ctx.save_for_backward(*outputs[: len(record.layout.weights_out)])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Pull the cotangents back through the step."""
        if ctx.truncated:
            return tuple([None] * (3 + ctx.inputs))
        if ctx.carries.last.inner:
            # A weight that no step has used yet is an output of an early node, and an input of all later ones. To get
            # to it the engine runs those as well; but the inner gradient is the partial derivative, which ends here.
            return tuple([None] * (3 + ctx.inputs))
        refuse_higher_order()
        record = ctx.record
        if record is None:
            raise freed_error()
        grads = ctx.carries.pull_back(record, cotangents, wanted_inputs(ctx.next_functions))
        grads = whole_for_plain(grads, record.externals, record.layout.externals_in)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.record = None
            ctx.carries.spent(record)
        return (None, None, None, *grads)


def whole_for_plain(
    grads: Sequence[Any], externals: Sequence[External], externals_in: Sequence[int]
) -> list[Tensor | None]:
    """The same gradients, the last ones of `externals_in`: those of plain tensors put together where they are DTensors.

    A learning rate's is one, since it was multiplied with DTensors.
    """
    found = list(grads)
    for place, index in enumerate(externals_in, len(found) - len(externals_in)):
        external, grad = externals[index], found[place]
        plain = not isinstance(external, Tensor) or not is_dtensor(external)
        if plain and grad is not None and is_dtensor(grad):
            found[place] = grad.full_tensor()
    return found


def wanted_inputs(edges: Sequence[tuple[Any, int]]) -> list[bool]:
    """Which inputs of the node that runs now lead to something whose gradient this backward is for.

    At the first step these are often meta-parameters alone, which saves the Hessian-vector product with the weights.
    """
    found: dict[Any, bool] = {None: False}
    for function, _ in edges:
        if function not in found:
            try:
                found[function] = torch._C._will_engine_execute_node(function)
            except RuntimeError:  # of a leaf that torch.autograd.grad was asked for
                found[function] = True
    return [found[function] for function, _ in edges]


def refuse_higher_order() -> None:
    """An outer gradient cannot be differentiated again."""
    if torch.is_grad_enabled():
        raise HigherOrderError(
            "A backward with create_graph=True went through a checkpointed context, whose gradient is exact but "
            "cannot itself be differentiated. Use innerloop_ctx(..., checkpoint_every=None), which supports any "
            "order of derivative."
        )


def freed_error() -> HistoryFreedError:
    """Rule R11."""
    return HistoryFreedError(
        "This step was freed by an earlier backward through it. If you need to go through it again, keep it the first "
        "time: outer_loss.backward(retain_graph=True)."
    )


def attach(
    carries: Carries, record: Recorded, outputs: list[Tensor], inputs: list[Tensor]
) -> tuple[tuple[Tensor, ...], PastWeights]:
    """Put a step into the graph; returns its outputs with their place in the graph, and the weights of its time."""
    counter = itertools.count()
    recompute = functools.partial(_weight_after, carries, weakref.ref(record))  # held by the node until it lets go
    with torch.enable_grad(), saved_tensors_hooks(lambda _: next(counter), recompute):
        attached = StepNode.apply(carries, record, outputs, *inputs)  # type: ignore[no-untyped-call]
    return attached, PastWeights(weakref.ref(attached[0].grad_fn), record.layout.weights_out)


def _weight_after(carries: Carries, held: weakref.ref[Any], position: int) -> Tensor:
    record = held()
    if record is None:
        raise freed_error()
    weights: list[Tensor] = carries.weights_after(record)
    index: int = record.layout.weights_out[position]
    return weights[index].detach()


@dataclass(frozen=True)
class PastWeights:
    """The fast weights that a step made, recomputed on request as long as its node is alive."""

    node: weakref.ref[Any]
    updated: tuple[int, ...]

    def weights(self) -> dict[int, Tensor]:
        """The weights that the step updated, by index."""
        node = self.node()
        if node is not None and node.truncated:
            raise HistoryFreedError(
                "These weights were let go by truncate=K, which keeps those of the last K steps. Ask for a later time, "
                "fmodel.parameters(time=-1), or for a larger K: innerloop_ctx(..., truncate=K)."
            )
        if node is None or node.record is None:
            raise freed_error()
        return dict(zip(self.updated, node.saved_tensors, strict=True))


@dataclass
class StepGraph:
    """The graph of one step, from stand-ins for its inputs to its outputs."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    run: StepRun
    carry: Carry | None = None  # what the graph starts from, where it is held for it

    @property
    def following(self) -> Carry:
        """The carry that the next step starts from: new leaves.

        Among its own outputs a step's weights depend on its momentum, and a gradient for both must not pass from one to
        the other.
        """
        run = self.run
        return Carry([weight.detach() for weight in run.weights], detached_state(run.state), run.buffers)

    def let_go_of_state(self, weights: int) -> None:
        """Hold the values of the first outputs, the weights, alone, and those that the graph itself has saved."""
        self.outputs[weights:] = [_Place.apply(output) for output in self.outputs[weights:]]  # type: ignore[no-untyped-call]
        self.run = StepRun([], [], ())

    def pull_back(self, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
        """The vector-Jacobian product, once, as far as it is wanted."""
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(self.outputs, cotangents, strict=True)
            if cotangent is not None and output.requires_grad
        ]
        inputs = list(itertools.compress(self.inputs, wanted))
        if not pairs or not inputs:
            return [None] * len(self.inputs)
        outputs, vectors = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, inputs, vectors, allow_unused=True))
        return [next(found) if asked else None for asked in wanted]


class _Place(torch.autograd.Function):
    """The place of a tensor in the graph, without its values."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.new_empty(()).expand(tensor.shape)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent


class PulledBack(Protocol):
    """A step, ready to be pulled back."""

    def pull_back(self, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
        """The vector-Jacobian product, once, as far as it is wanted."""


class Replay(Protocol):
    """How a step is made ready to be pulled back."""

    def graph(self, record: StepRecord, carries: Carries) -> PulledBack:
        """The graph of a step, or what does its work."""


def inputs_of(layout: Layout, weights: list[Tensor], state: State, externals: list[Tensor]) -> list[Tensor]:
    """The tensors that a step's node takes, in its order."""
    return [
        *(weights[index] for index in layout.weights_in),
        *(state_leaf(state, key) for key in layout.state_in),
        *(externals[index] for index in layout.externals_in),
    ]


def outputs_of(layout: Layout, weights: list[Tensor], state: State) -> list[Tensor]:
    """The tensors that a step's node gives, in its order."""
    return [*(weights[index] for index in layout.weights_out), *(state_leaf(state, key) for key in layout.state_out)]


def carry_stand_ins(record: StepRecord, carry: Carry) -> tuple[list[Tensor], State]:
    """New leaves in place of a carry's weights, and of its optimizer state where that may have a gradient."""
    weights = [
        weight.detach().requires_grad_(trainable)
        for weight, trainable in zip(carry.weights, record.layout.trainable, strict=True)
    ]
    leaves = {key: state_leaf(carry.state, key).detach().requires_grad_() for key in record.layout.state_in}
    return weights, with_state_leaves(carry.state, leaves)


class NativeReplay:
    """Advance first-order to the step's carry, then build the graph of that one step, or of the few that lead to it."""

    def __init__(self, count: Callable[[], None]) -> None:
        self._count = count

    def graph(self, record: StepRecord, carries: Carries) -> StepGraph:
        """The graph of a step."""
        graphs = record.segment.graphs
        if record.time not in graphs:
            records = carries.built_with(record)
            carry = carries.carry_before(records[0])
            for step in records:
                self._count()
                graphs[step.time] = graph = second_order_graph(step, carry)
                carry = graph.following
        found: StepGraph = graphs.pop(record.time)
        return found


def second_order_graph(record: StepRecord, carry: Carry) -> StepGraph:
    """The graph of one step from its carry, by a second-order run."""
    weights, state = carry_stand_ins(record, carry)
    externals = record.stand_ins()
    run = record.run(weights, state, carry.buffers, externals, create_graph=True)
    inputs = inputs_of(record.layout, weights, state, externals)
    return StepGraph(inputs, outputs_of(record.layout, run.weights, run.state), run.results)


class TorchReplay:
    """Rebuild a whole segment through `torch.utils.checkpoint`, one checkpoint a step, and differentiate that.

    Short and independent of the native way, which it is an oracle for. An inner `autograd.grad` inside a checkpoint
    makes it recompute already in the forward, so this takes three second-order runs a step.
    """

    RUNS = 3

    def __init__(self, count: Callable[[], None]) -> None:
        self._count = count

    def graph(self, record: StepRecord, carries: Carries) -> StepGraph:
        """The graph of a step, out of its segment's."""
        graphs = record.segment.graphs
        if record.time not in graphs:
            self._rebuild(record, carries)
        found: StepGraph = graphs.pop(record.time)
        return found

    def _rebuild(self, last: StepRecord, carries: Carries) -> None:
        records = carries.rebuilt_with(last)
        carry = carries.carry_before(records[0])
        for record in records:
            weights, state = carry_stand_ins(record, carry)
            externals, runs = record.stand_ins(), list[StepRun]()
            inputs = inputs_of(record.layout, weights, state, externals)
            body = functools.partial(self._body, record, weights, state, carry.buffers, externals, runs)
            outputs = list(checkpoint(body, *inputs, use_reentrant=False, preserve_rng_state=False))
            graph = StepGraph(inputs, outputs, runs.pop(), carries.keep(carry))
            record.segment.graphs[record.time] = graph
            carry = graph.following

    def _body(
        self,
        record: StepRecord,
        weights: list[Tensor],
        state: State,
        buffers: Buffers,
        externals: list[Tensor],
        runs: list[StepRun],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        self._count()
        layout, given = record.layout, iter(inputs)
        weights, externals = list(weights), list(externals)
        for index in layout.weights_in:
            weights[index] = next(given)
        state = with_state_leaves(state, {key: next(given) for key in layout.state_in})
        for index in layout.externals_in:
            externals[index] = next(given)
        run = record.run(weights, state, buffers, externals, create_graph=True)
        runs[:] = [run.results]
        return tuple(outputs_of(layout, run.weights, run.state))
