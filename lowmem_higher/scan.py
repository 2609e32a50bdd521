"""Many steps of one function at once, each run as flat or compiled code: `diffopt.scan` under `compile`.

NOTE [ What a scan may take for granted ]

Between the steps of a scan none of the user's code runs but the function, and that reads tensors through its arguments
and the functional model alone. So nothing has to be recorded, and a step is a function of tensors: the carry, the
batch, and what is the same at all steps (arguments, hyperparameters). It is traced with inner gradient and update rule
inside, once for each shape of these tensors (`flat.py`), and again with its pullback. The loop, replays and pullbacks
run those traces, so a replay has the bits of the loop.

A tensor that the function reads from elsewhere cannot be traced, nor can a random draw or a branch on a value. Then the
scan is a loop of recorded steps, and a warning says why. What the function reads in Python besides (a global, an
attribute of an object) is baked in; so traces are compared with the function itself, in the loop and in the backward,
at their 1st, 2nd, 4th, 8th, ... use of all, and the 1st, 16th, 256th, ... in each scan. The losses of all replays are
compared with the loop's (rule R10).

A scan leaves one node in the user's graph, and its carries are a segment of their own. Which are held, where, and how
the others are replayed is decided by the same `Carries` as for recorded steps.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_higher.alike import PLAIN, agree, form_of, same_attributes, standing_for, state_positions, traceable
from lowmem_higher.carries import Carries
from lowmem_higher.errors import CompileFallbackWarning, ExternalModifiedError, ReplayMismatchError
from lowmem_higher.flat import FlatGraph, NotTraceableError, traced
from lowmem_higher.ledger import Ledger
from lowmem_higher.live_module import Twin
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, State
from lowmem_higher.progress import Progress
from lowmem_higher.pullback import StepGraph, inputs_of, outputs_of
from lowmem_higher.record import version_of
from lowmem_higher.replay_state import Ambient, ModuleState
from lowmem_higher.second_order import second_order_here
from lowmem_higher.state_outputs import put_state, taken_state
from lowmem_higher.step import Carry, Layout, StateKey, StepRun, state_keys, state_leaf, with_state_leaves
from lowmem_higher.structure import Structure, flatten, unflatten
from lowmem_higher.traced import Compiler

COMPILE_AFTER = 2  # uses of a trace in one scan
_SHAPES = 8  # traces of one function, at most
_EVERY = 16
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
Graph = Callable[[Sequence[Tensor]], list[Any]]


@dataclass(eq=False)
class Inputs:
    """What one step reads: the carry, and leaves of the batch and of what is the same at all steps."""

    carry: Carry
    batch: Structure
    leaves: list[Any]
    constant: list[Tensor]

    def __post_init__(self) -> None:
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.numbers = [leaf for leaf in self.leaves if not isinstance(leaf, Tensor)]

    def nudged(self) -> Inputs:
        """The same but for the last bits of the weights."""
        return Inputs(self.carry.nudged(), self.batch, self.leaves, self.constant)

    @property
    def versions(self) -> tuple[int, ...]:
        """How often the batch and the constants were written into."""
        return tuple([version_of(tensor) for tensor in (*self.tensors, *self.constant)])

    @property
    def signature(self) -> Any:
        """Equal for steps that one trace serves, but for the numbers of the optimizer state.

        Raises:
            NotTraceableError: There is none for such a batch.
        """
        if not all(isinstance(number, PLAIN) for number in self.numbers):
            raise NotTraceableError("a batch holds an object of a class of its own")
        if any(tensor.requires_grad for tensor in self.tensors):
            raise NotTraceableError("a batch holds a tensor that requires grad; pass it to scan after the batches")
        numbers = tuple([(type(number), number) for number in self.numbers])
        return self.carry.form, self.batch, numbers, tuple(map(form_of, self.tensors))

    def check(self) -> None:
        """Raise if no trace can be made of such a step."""
        if not all(map(traceable, (*self.carry.tensors(), *self.tensors, *self.constant))):
            raise NotTraceableError("it reads tensors that are complex, sparse, or of a class of their own")


@dataclass
class Adjoint:
    """Cotangents of weights, by index, and of optimizer state; gradients of what is the same at all steps."""

    weights: dict[int, Tensor]
    state: dict[StateKey, Tensor]
    constant: list[Tensor | None]


class Function:
    """One step as a function: the loss of `fn(fmodel, batch, *args)`, its gradient, and the update.

    Args:
        fn: The user's.
        args: The same at all steps.
        groups: The hyperparameters.
        rules: The update rules.
        twin: Where `fn` runs.
        modules: The attributes of the model.
        trainable: Which weights require grad.
    """

    def __init__(
        self,
        fn: Callable[..., Tensor],
        args: tuple[Any, ...],
        groups: Sequence[Group],
        rules: DifferentiableOptimizer,
        twin: Twin,
        modules: ModuleState,
        trainable: tuple[bool, ...],
    ) -> None:
        self.fn, self.rules, self.twin, self.modules, self.trainable = fn, rules, twin, modules, trainable
        self.ambient = Ambient.capture()
        leaves: list[Any] = []
        hyperparameters = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.structure = flatten((args, hyperparameters), leaves)
        self.constant = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.numbers = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]

    @property
    def key(self) -> Any:
        """Equal for functions that do the same."""
        rules = self.rules
        numbers = tuple([(type(number), number) for number in self.numbers])
        constant = tuple([(form_of(tensor), tensor.requires_grad) for tensor in self.constant])
        held = tuple(map(tuple, rules._group_to_param_list))
        return (
            standing_for(self.fn), type(rules), rules.first_order, held, self.structure, numbers, constant,
            self.trainable, self.ambient,
        )  # fmt: skip

    def check(self) -> None:
        """Raise if it cannot be traced."""
        if self.ambient.autocast_enabled:
            raise NotTraceableError("autocast is on")
        if not all(isinstance(number, PLAIN) for number in self.numbers):
            raise NotTraceableError("an argument is an object of a class of its own")

    def run(self, weights: list[Tensor], state: State, inputs: Inputs, *, create_graph: bool) -> StepRun:
        """Run it; `weights` and `state` stand for the carry's."""
        constant, batch = iter(inputs.constant), iter(inputs.leaves)
        numbers = iter(self.numbers)
        leaves = (next(constant) if is_tensor else next(numbers) for is_tensor in self._is_tensor)
        args, groups = unflatten(self.structure, leaves)
        with self.ambient.restored(Ambient.capture()), second_order_here():
            with torch.enable_grad():
                loss, buffers = self.twin.run(
                    self._called,
                    (unflatten(inputs.batch, batch), *args),
                    {},
                    weights=weights,
                    buffers=inputs.carry.buffers,
                    state=self.modules,
                    stand_ins={},
                    leaves=[],
                )
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    raise NotTraceableError("the function returns no scalar tensor")
                grads = self.rules.gradients(loss, weights, create_graph=create_graph, retain_graph=create_graph)
            with torch.set_grad_enabled(create_graph):
                new_weights, new_state = self.rules.advance(weights, grads, state, groups)
        return StepRun(new_weights, new_state, buffers, loss.reshape(()), grads)

    def _called(self, model: nn.Module, *args: Any) -> Any:
        """Call `fn`, and see that it leaves nothing on the model: the next step, elsewhere, would not find it."""
        before = ModuleState.capture(self.twin.modules)
        loss = self.fn(model, *args)
        if ModuleState.capture(self.twin.modules, before) is not before:
            raise NotTraceableError("a forward sets an attribute of the model, which the next one might read")
        return loss

    def advanced(self, inputs: Inputs) -> StepRun:
        """A first-order run."""
        return self.run(self._weights(inputs.carry), inputs.carry.state, inputs, create_graph=False)

    def graph(self, inputs: Inputs, lifted: Container[StateKey]) -> tuple[StepGraph, Layout]:
        """A second-order run: the graph from stand-ins for all that may have a gradient, and what those are.

        The numbers of the optimizer state that are `lifted` to tensors have none.
        """
        carry, weights = inputs.carry, self._weights(inputs.carry)
        leaves = {key: leaf.detach().requires_grad_() for key, leaf in _differentiable(carry.state, lifted).items()}
        state = with_state_leaves(carry.state, leaves)
        constant = [
            tensor.detach().requires_grad_(own.requires_grad)
            for tensor, own in zip(inputs.constant, self.constant, strict=True)
        ]
        apart = Inputs(carry, inputs.batch, inputs.leaves, constant)
        run = self.run(weights, state, apart, create_graph=True)
        layout = Layout(
            trainable=self.trainable,
            weights_in=tuple([index for index, trainable in enumerate(self.trainable) if trainable]),
            state_in=tuple(leaves),
            externals_in=tuple([index for index, tensor in enumerate(constant) if tensor.requires_grad]),
            weights_out=tuple([index for index, weight in enumerate(weights) if weight is not run.weights[index]]),
            state_out=tuple(
                [key for key, leaf in _differentiable(run.state, lifted).items() if leaf is not leaves.get(key)]
            ),
        )
        outputs = outputs_of(layout, run.weights, run.state)
        return StepGraph(inputs_of(layout, weights, state, constant), outputs, run), layout

    def _weights(self, carry: Carry) -> list[Tensor]:
        return [
            weight.detach().requires_grad_(trainable)
            for weight, trainable in zip(carry.weights, self.trainable, strict=True)
        ]


def _differentiable(state: State, lifted: Container[StateKey] = ()) -> dict[StateKey, Tensor]:
    leaves = {key: state_leaf(state, key) for key in state_keys(state) if key not in lifted}
    return {key: leaf for key, leaf in leaves.items() if leaf.is_floating_point()}


class Trace:
    """A step as flat graphs: the next carry, and the pullback. It holds no tensor and nothing of one context.

    Args:
        function: What is traced.
        inputs: Of a step.

    Attributes:
        seconds: Spent making its graphs, and compiling them.
    """

    def __init__(self, function: Function, inputs: Inputs) -> None:
        inputs.check()
        self.seconds = 0.0
        self.uses: dict[Graph, int] = {}
        self._ambient = function.ambient
        self._lifted: dict[StateKey, type] = {}  # numbers of the optimizer state, which are inputs
        equal: dict[Any, list[StateKey]] = {}
        for place, index, name in state_positions(inputs.carry.state):
            value = inputs.carry.state[place][index][name]
            if type(value) not in (int, float):
                raise NotTraceableError(f"the optimizer state holds {name}={value!r}")
            self._lifted[place, index, name] = type(value)
            equal.setdefault((name, value), []).append((place, index, name))
        self._groups = list(equal.values())
        self.weights_out: tuple[int, ...] = ()
        self._state: State = []
        self._buffers: tuple[bool, ...] = ()
        self._carry_form: Any = None
        self.layout: Layout | None = None
        self._like: list[tuple[torch.Size, torch.dtype, torch.device]] = []  # of the state that it gives
        self._advance = self._traced(function, inputs, self._advanced, [])
        self._compiled_advance: Graph | None = None
        self._pull_back: FlatGraph | None = None
        self._compiled_pull_back: Graph | None = None

    def fits(self, inputs: Inputs) -> bool:
        """Whether the numbers that were equal when it was made are equal."""
        state = inputs.carry.state
        return all(
            state[place][index][name] == state[group[0][0]][group[0][1]][name]
            for group in self._groups
            for place, index, name in group
        )

    def flat(self, inputs: Inputs, cotangents: Sequence[Tensor] = ()) -> list[Tensor]:
        """The inputs of its graphs."""
        state = inputs.carry.state
        numbers = [
            torch.tensor(float(state[place][index][name]), dtype=torch.float64)
            for (place, index, name), *_ in self._groups
        ]
        tensors = (*inputs.carry.tensors(), *inputs.tensors, *inputs.constant, *numbers, *cotangents)
        return [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]

    def _traced(
        self,
        function: Function,
        inputs: Inputs,
        body: Callable[[Function, Inputs, list[Tensor]], list[Any]],
        cotangents: list[Tensor],
    ) -> FlatGraph:
        tensors, filled = inputs.carry.taken_apart()
        counts = [len(tensors), len(inputs.tensors), len(inputs.constant), len(self._groups)]

        def flat(*given: Tensor) -> list[Any]:
            remaining = iter(given)
            in_carry, batch, constant, numbers = ([next(remaining) for _ in range(count)] for count in counts)
            carry = filled(in_carry)
            for group, number in zip(self._groups, numbers, strict=True):
                for place, index, name in group:
                    carry.state[place][index][name] = number
            of_batch = iter(batch)
            leaves = [next(of_batch) if isinstance(leaf, Tensor) else leaf for leaf in inputs.leaves]
            outputs = body(function, Inputs(carry, inputs.batch, leaves, constant), list(remaining))
            return [None if output is None else output.contiguous() for output in outputs]

        with self._making():
            graph = traced(flat, self.flat(inputs, cotangents))
        return FlatGraph(graph, fresh=range(len(graph.nodes)))

    def _compiled(self, graph: FlatGraph, tensors: list[Tensor], compiler: Compiler) -> Graph:
        with self._making():
            return compiler.compiled(graph, tensors)

    @contextmanager
    def _making(self) -> Iterator[None]:
        started = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - started

    def run(self, graph: Graph, tensors: Sequence[Tensor]) -> list[Any]:
        """Run one of its graphs, with the switches that it was traced under."""
        now = Ambient.capture()
        with torch._C.DisableTorchFunction():
            if now.switches[1:] == self._ambient.switches[1:]:
                return graph(tensors)
            with self._ambient.restored(now):
                return graph(tensors)

    # The next carry

    def _advanced(self, function: Function, inputs: Inputs, cotangents: list[Tensor]) -> list[Any]:
        weights = function._weights(inputs.carry)
        run = function.run(weights, inputs.carry.state, inputs, create_graph=False)
        self.weights_out = tuple([index for index, weight in enumerate(weights) if weight is not run.weights[index]])
        outputs: list[Any] = [run.loss, *(run.weights[index] for index in self.weights_out)]
        self._state = put_state(run.state, self._lifted, outputs)
        self._buffers = tuple([buffer is not None for buffer in run.buffers])
        return [*outputs, *(buffer for buffer in run.buffers if buffer is not None)]

    def advance(self, inputs: Inputs, run: Graph) -> tuple[Tensor, Carry]:
        """The loss, and the next carry."""
        outputs = self.run(run, self.flat(inputs))
        weights = list(inputs.carry.weights)
        for at, index in enumerate(self.weights_out):
            weights[index] = outputs[1 + at]
        kept = iter(outputs[len(outputs) - sum(self._buffers) :])
        carry = Carry(
            weights,
            taken_state(self._state, outputs),
            tuple([next(kept) if there else None for there in self._buffers]),
        )
        carry.known_form = self._carry_form
        self._carry_form = carry.form
        return outputs[0], carry

    def advance_graph(self, inputs: Inputs, compiler: Compiler | None) -> Graph:
        """What computes the next carry: compiled by `compiler` if there is one, or was."""
        if self._compiled_advance is None and compiler is not None:
            self._compiled_advance = self._compiled(self._advance, self.flat(inputs), compiler)
        return self._compiled_advance or self._advance

    # The pullback

    def pull_back_graph(self, function: Function, inputs: Inputs, compiler: Compiler | None) -> Graph:
        """What computes the pullback."""
        if self._pull_back is None:
            run = function.advanced(inputs)
            _, self.layout = function.graph(inputs, self._lifted)
            leaves = [state_leaf(run.state, key) for key in self.layout.state_out]
            self._like = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
            cotangents = self.cotangents(inputs, Adjoint({}, {}, []))
            self._pull_back = self._traced(function, inputs, self._pulled_back, cotangents)
        if self._compiled_pull_back is None and compiler is not None:
            cotangents = self.cotangents(inputs, Adjoint({}, {}, []))
            self._compiled_pull_back = self._compiled(self._pull_back, self.flat(inputs, cotangents), compiler)
        return self._compiled_pull_back or self._pull_back

    def _pulled_back(self, function: Function, inputs: Inputs, cotangents: list[Tensor]) -> list[Any]:
        graph, _ = function.graph(inputs, self._lifted)
        return [graph.run.loss, *graph.pull_back(cotangents, [True] * len(graph.inputs))]

    def cotangents(self, inputs: Inputs, adjoint: Adjoint) -> list[Tensor]:
        """The cotangents of the step's outputs, zeros where there are none."""
        assert self.layout is not None
        found: list[Tensor] = []
        for index in self.layout.weights_out:
            cotangent = adjoint.weights.get(index)
            found.append(torch.zeros_like(inputs.carry.weights[index]) if cotangent is None else cotangent)
        for key, (shape, dtype, device) in zip(self.layout.state_out, self._like, strict=True):
            cotangent = adjoint.state.get(key)
            found.append(torch.zeros(shape, dtype=dtype, device=device) if cotangent is None else cotangent)
        return [cotangent.contiguous() for cotangent in found]

    def put(self, found: Iterator[Tensor | None], adjoint: Adjoint) -> None:
        """Take the adjoint to the step's inputs, given their gradients."""
        assert self.layout is not None
        layout = self.layout
        for index in layout.weights_out:
            adjoint.weights.pop(index, None)
        for key in layout.state_out:
            adjoint.state.pop(key, None)
        for index in layout.weights_in:
            _add(adjoint.weights, index, next(found))
        for key in layout.state_in:
            _add(adjoint.state, key, next(found))
        for index in layout.externals_in:
            before, grad = adjoint.constant[index], next(found)
            adjoint.constant[index] = before if grad is None else grad if before is None else before + grad


def _add(sums: dict[Any, Tensor], key: Any, term: Tensor | None) -> None:
    if term is not None:
        sums[key] = sums[key] + term if key in sums else term


@dataclass(eq=False, slots=True, weakref_slot=True)
class ScanStep:
    """What is kept of one step of a scan."""

    scan: Scan
    index: int
    time: int
    trace: Trace
    run: Graph
    loss: float
    versions: tuple[int, ...]
    previous: ScanStep | None
    segment: Any = None
    journal: None = None

    def advance(self, carry: Carry) -> Carry:
        """The next carry."""
        loss, following = self.trace.advance(self._inputs(carry), self.run)
        self._check(loss)
        return following

    def pull_back(self, carry: Carry, adjoint: Adjoint) -> None:
        """Take the adjoint from the step's outputs to its inputs."""
        self._check(self.scan.pull_back(self.trace, self._inputs(carry), adjoint))

    def _inputs(self, carry: Carry) -> Inputs:
        inputs = self.scan.inputs(self.index, carry)
        if inputs.versions != self.versions:
            raise ExternalModifiedError(
                f"A tensor of batches[{self.index}], an argument or a hyperparameter of a scan was modified in place "
                "after its step. Modify a copy, tensor.clone(), or wait for the outer backward."
            )
        return inputs

    def _check(self, loss: Tensor) -> None:
        if self.scan.verify == "off":
            return
        found, tolerance = loss.item(), _TOLERANCE.get(loss.dtype, 3e-2)
        if not abs(found - self.loss) <= tolerance * (abs(self.loss) + 1e-3):
            raise ReplayMismatchError(
                f"The replay of step {self.index} of a scan differs: the loss was {self.loss:.9g} in the loop and is "
                f"{found:.9g} now. Let batches[{self.index}] be the same when it is read again: no random draws there."
            )


@dataclass(eq=False)
class Scanned:
    """A finished scan, as its node in the graph holds it: the newest step leads to those before it."""

    layout: Layout
    last: ScanStep

    @property
    def time(self) -> int:
        """Of the newest step."""
        return self.last.time

    @property
    def externals(self) -> list[Tensor]:
        """What is the same at all steps."""
        return self.last.scan.function.constant

    @property
    def segment(self) -> Any:
        """That of its steps."""
        return self.last.segment

    def pull_back(
        self, cotangents: Sequence[Tensor | None], carries: Carries, ledger: Ledger, count: Callable[[], None]
    ) -> list[Tensor | None]:
        """The gradients of the node's inputs, from the cotangents of its outputs."""
        layout = self.layout
        adjoint = Adjoint({}, {}, [None] * len(self.last.scan.function.constant))
        given = iter(cotangents)
        for index in layout.weights_out:
            _add(adjoint.weights, index, next(given))
        for key in layout.state_out:
            _add(adjoint.state, key, next(given))
        carries.begin_backward(self.last)
        step: ScanStep | None = self.last
        while step is not None:
            carry = carries.before(step)
            count()
            ledger.sample("backward", step.time)
            step.pull_back(carry, adjoint)
            carries.passed(step)
            step = step.previous
        return [
            *(adjoint.weights.get(index) for index in layout.weights_in),
            *(adjoint.state.get(key) for key in layout.state_in),
            *(adjoint.constant[index] for index in layout.externals_in),
        ]


class Known:
    """The traces of one model, of all contexts."""

    def __init__(self) -> None:
        self._found: list[tuple[Any, list[dict[str, Any]], dict[Any, Trace]]] = []

    def of(self, function: Function, compiled: bool) -> dict[Any, Trace]:
        """The traces of a function by the forms of its inputs."""
        key, plain = (compiled, function.key), function.modules.plain
        for known, attributes, traces in self._found:
            if known == key and same_attributes(attributes, plain):
                return traces
        if len(self._found) == _SHAPES:
            del self._found[0]
        self._found.append((key, plain, {}))
        return self._found[-1][2]

    @staticmethod
    def by(model: nn.Module) -> Known:
        """Of a model."""
        if id(model) not in _known:
            _known[id(model)] = Known()
            weakref.finalize(model, _known.pop, id(model), None).atexit = False
        return _known[id(model)]


_known: dict[int, Known] = {}


class Scan:
    """The steps of one scan.

    Args:
        function: One step.
        batches: Indexed once by the loop, and again by each replay.
        verify: "new", "all" or "off": when traces are compared with the function.
        known: What was traced of this model before.
        compiler: Makes a faster function of a flat graph; None: it is run call by call.
        on_traced: Is told how long it took to trace and to compile, each time.
    """

    def __init__(
        self,
        function: Function,
        batches: Sequence[Any],
        verify: str,
        known: Known,
        compiler: Compiler | None,
        on_traced: Callable[[float], None],
    ) -> None:
        function.check()
        self._on_traced = on_traced
        self.function, self.batches, self.verify = function, batches, verify
        self._compiler = compiler
        self._traces = known.of(function, compiler is not None)
        self._taken: dict[Trace, int] = {}  # steps of the loop
        self._uses: dict[Graph, int] = {}

    def inputs(self, index: int, carry: Carry) -> Inputs:
        """What a step reads."""
        leaves: list[Any] = []
        structure = flatten(self.batches[index], leaves)
        return Inputs(carry, structure, leaves, self.function.constant)

    def step(self, index: int, carry: Carry, time: int, previous: ScanStep | None) -> tuple[ScanStep, Carry]:
        """Take a step of the loop."""
        inputs = self.inputs(index, carry)
        trace = self._traces.get(inputs.signature)
        before = 0.0 if trace is None else trace.seconds
        if trace is None or not trace.fits(inputs):
            if len(self._traces) == _SHAPES:
                raise NotTraceableError("its tensors have too many different shapes")
            trace = self._traces[inputs.signature] = Trace(self.function, inputs)
        self._taken[trace] = self._taken.get(trace, 0) + 1
        run = trace.advance_graph(inputs, self._compiler_of(trace))
        self._tell(trace, before)
        loss, following = trace.advance(inputs, run)
        if self._is_due(trace, run):
            found = [loss, *following.tensors()]
            again = functools.partial(self._advanced, inputs)
            if not agree(again(False), found, again):
                raise self._differs(f"Step {index}")
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(
                f"The loss of step {index} of a scan is {value}, and no gradient goes through that. Lower the learning "
                "rate, override={'lr': [0.01]}, or take the steps one by one and clip: "
                "diffopt.step(fn, batch, grad_callback=higher.clip_grad_norm(1.0))."
            )
        return ScanStep(self, index, time, trace, run, value, inputs.versions, previous), following

    def steps(
        self, carry: Carry, time: int, carries: Carries, ledger: Ledger, progress: Progress
    ) -> tuple[ScanStep, Carry]:
        """Take the steps of the loop; returns the last one, and the carry after it."""
        last: ScanStep | None = None
        for index in range(len(self.batches)):
            before = carry
            step, carry = self.step(index, before, time + index, last)
            step.segment = carries.segment_of(step.time, last, functools.partial(_given, before))
            carries.taken(step, functools.partial(_given, before))
            last = step
            ledger.steps += 1
            ledger.count_first_order()
            ledger.sample("forward", step.time)
            progress.step(ledger.steps)
        assert last is not None
        return last, carry

    def pull_back(self, trace: Trace, inputs: Inputs, adjoint: Adjoint) -> Tensor:
        """Take the adjoint from a step's outputs to its inputs; returns the step's loss."""
        before = trace.seconds
        run = trace.pull_back_graph(self.function, inputs, self._compiler_of(trace))
        self._tell(trace, before)
        cotangents = trace.cotangents(inputs, adjoint)
        found = trace.run(run, trace.flat(inputs, cotangents))
        if self._is_due(trace, run):
            again = functools.partial(self._pulled_back, inputs, cotangents)
            if not agree(again(False), found[1:], again):
                raise self._differs("A pullback")
        loss: Tensor = found[0]
        trace.put(iter(found[1:]), adjoint)
        return loss

    def layout(self, weights: Sequence[Tensor], state: State, last: Carry) -> Layout:
        """What the node takes, of the first step's inputs, and gives."""
        before = {key: state_leaf(state, key) for key in state_keys(state)}
        return Layout(
            trainable=self.function.trainable,
            weights_in=tuple([index for index, trainable in enumerate(self.function.trainable) if trainable]),
            state_in=tuple([key for key, leaf in before.items() if leaf.requires_grad]),
            externals_in=tuple([at for at, tensor in enumerate(self.function.constant) if tensor.requires_grad]),
            weights_out=tuple(sorted({index for trace in self._traces.values() for index in trace.weights_out})),
            state_out=tuple(_differentiable(last.state)),
        )

    def _compiler_of(self, trace: Trace) -> Compiler | None:
        """None for a trace of few steps: the first one, whose optimizer state is empty, the last batch."""
        return self._compiler if self._taken[trace] > COMPILE_AFTER else None

    def _tell(self, trace: Trace, before: float) -> None:
        if trace.seconds > before:
            self._on_traced(trace.seconds - before)

    def _is_due(self, trace: Trace, run: Graph) -> bool:
        """Whether this use of a trace is to be compared with the function itself."""
        here = self._uses[run] = self._uses.get(run, 0) + 1
        ever = trace.uses[run] = trace.uses.get(run, 0) + 1
        while here % _EVERY == 0:
            here //= _EVERY
        return self.verify == "all" or (self.verify == "new" and (here == 1 or ever & (ever - 1) == 0))

    def _advanced(self, inputs: Inputs, nudge: bool) -> list[Tensor]:
        run = self.function.advanced(inputs.nudged() if nudge else inputs)
        assert run.loss is not None
        return [
            run.loss.detach(),
            *Carry([weight.detach() for weight in run.weights], run.state, run.buffers).tensors(),
        ]

    def _pulled_back(self, inputs: Inputs, cotangents: Sequence[Tensor], nudge: bool) -> list[Tensor | None]:
        graph, _ = self.function.graph(inputs.nudged() if nudge else inputs, ())
        return graph.pull_back(cotangents, [True] * len(graph.inputs))

    @staticmethod
    def _differs(where: str) -> ReplayMismatchError:
        return ReplayMismatchError(
            f"{where} of a scan, traced, gives another result than its function. Probably the function or the model "
            "reads something in Python that changes and is no argument (a global, a list, a counter). Let it be a "
            "part of the batch, or run the steps as they are: innerloop_ctx(..., compile=False)."
        )


def warn_of_loop(reason: str, stacklevel: int) -> None:
    """Say why the steps of a scan are taken one by one."""
    warnings.warn(
        f"A scan is run as a loop of steps, since {reason}. The gradient is the same.",
        CompileFallbackWarning,
        stacklevel=stacklevel,
    )


def _given(carry: Carry) -> Carry:
    return carry
