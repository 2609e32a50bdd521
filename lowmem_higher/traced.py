"""Replays and pullbacks as flat graphs: no autograd and none of the user's Python at run time.

NOTE [ When a traced step may stand for a replay ]

A step's replay is a function of tensors: its carry, its externals, and for a pullback the cotangents. After some uses
of a program it is traced (`flat.py`), with the inner gradient, the update rule and the pullback inside, and the flat
graph is run in place of the replay. What tracing bakes in is compared at every use, and another trace is made, or none:

* shapes, strides, types and devices of all tensors; which parameters, states and cotangents there are;
* the program, the layout, the update and its switches, the optimizer's class; the functions given to `step`;
* the plain attributes of every submodule (`training`, a rate);
* numbers: hyperparameters, step counts, arguments of calls. A number that was seen to differ between steps becomes an
  input, a tensor without dimensions; then a replay is traced up to the gradients, and the update rule run as it is.

Nothing is traced that draws random numbers, needs a tensor's value in Python, reads tensors that are no inputs, writes
into one, runs an update rule of the user's own, or runs under autocast.

What the user's code reads besides (a dictionary, a global) is seen at the time of tracing only, where a replay sees it
at the time of the replay; the loop saw it at the time of the step. So traced steps are checked as replays are (rule
R10): the loss at each, weights and state at the end of each segment. Steps that have a fingerprint are not traced.
Moreover a trace is compared with the replay itself, all outputs, at its first use in each context, and its 1st, 2nd,
4th, 8th ... use of all. One that is hardly faster than the replay is not used any more.
"""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lowmem_higher.alike import (
    PLAIN,
    agree,
    form_of,
    same_attributes,
    same_number,
    standing_for,
    state_positions,
    traceable,
)
from lowmem_higher.custom_rules import is_custom
from lowmem_higher.errors import ReplayMismatchError
from lowmem_higher.flat import FlatGraph, NotTraceableError, traced
from lowmem_higher.live_module import ModuleCall
from lowmem_higher.optim.base import State
from lowmem_higher.pullback import (
    Carries,
    NativeReplay,
    PulledBack,
    StepGraph,
    carry_stand_ins,
    inputs_of,
    outputs_of,
    second_order_graph,
)
from lowmem_higher.replay_state import Ambient
from lowmem_higher.split import Parts, split
from lowmem_higher.state_outputs import put_state, taken_state
from lowmem_higher.step import (
    Carry,
    StepRecord,
    advance_carry,
    check_loss_value,
    check_mark,
    plain_state,
)

TRACE_AFTER = 200  # uses of a program: two traces cost as much as some hundred replays of a tiny net
COMPILE_AFTER = 2  # the same where it is compiled
OF_ONE_SHAPE = 3  # of them with the same shapes, over which it is seen which numbers differ
WORTH = 0.9  # of the replay's time: a trace that takes more is not used
_SHAPES = 8  # traces of one program, at most
_RARE = 20  # shapes of fewer than one use in so many are not worth a trace: a loop's last step
_KINDS = 64  # of steps that are told apart at a time
_TRIES = 3  # times that a trace is made again for other numbers
Result = TypeVar("Result")


class Replays:
    """Runs replays and pullbacks of one trajectory: as they are, or traced.

    Args:
        model: The model, whose contexts share their traces.
        compiler: Makes a faster function of a flat graph; None: it is run call by call.
        after: Uses of a program before it is traced, None: it never is.
    """

    def __init__(self, model: nn.Module, compiler: Compiler | None, after: int | None) -> None:
        self._shared = _shared_by(model)
        self._found: dict[tuple[int, ...], tuple[Steps, Parts | None, Callable[[], Any]]] = {}
        self._unverified: dict[Trace, int] = {}  # uses in this context since the trace was compared
        self.compiler = compiler
        self._after = after
        self.on_traced: Callable[[float], None] = _ignore  # told the seconds spent tracing and compiling

    def advance(self, record: StepRecord, carry: Carry) -> Carry:
        """The next carry."""
        as_it_is = record.journal is not None or record.time + 1 in record.segment.marks
        use = None if as_it_is else self._use("advance", record, carry, (), ())
        if use is None:
            return advance_carry(record, carry)
        return self._checked(
            use,
            use.advanced,
            lambda nudge: advance_carry(record, carry.nudged() if nudge else carry),
            Carry.tensors,
        )

    def pull_back(
        self,
        record: StepRecord,
        carry: Carry,
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients of those of a step's inputs that are wanted."""

        def replayed(nudge: bool) -> list[Tensor | None]:
            with torch.enable_grad():
                graph = second_order_graph(record, carry.nudged() if nudge else carry)
            return graph.pull_back(cotangents, wanted)

        use = self._use("pull back", record, carry, cotangents, wanted)
        return replayed(False) if use is None else self._checked(use, use.pulled_back, replayed, list)

    def _checked(
        self,
        use: Use,
        run: Callable[[], Result],
        replay: Callable[[bool], Result],
        tensors: Callable[[Result], list[Any]],
    ) -> Result:
        trace = use.trace
        unverified = self._unverified.get(trace)
        if unverified is not None and not trace.is_due():
            try:
                found = run()
            except ReplayMismatchError:
                expected = replay(False)
                self._distrust(trace)
                return expected
            self._unverified[trace] = unverified + 1
            return found
        started = time.thread_time()
        expected = replay(False)
        replayed = time.thread_time()
        try:
            found = run()
            own = time.thread_time() - replayed
            same = agree(tensors(expected), tensors(found), lambda nudge: tensors(replay(nudge)))
        except ReplayMismatchError:
            same, own = False, 0.0
        trace.timed(replayed - started, own)
        if not same:
            self._distrust(trace)
        self._unverified[trace] = 0
        return expected

    def _distrust(self, trace: Trace) -> None:
        trace.distrusted = True
        if self._unverified.get(trace):
            raise ReplayMismatchError(
                "A traced step gives another result than its replay, and was used since they were compared last. "
                "Probably the model, a function given to step or grad_callback reads something in Python that changed "
                "and is no argument (a global, a list, an attribute of another object). Pass it as an argument, or "
                "run replays as they are: innerloop_ctx(..., compile=False)."
            )
        warnings.warn(
            "A traced step gives another result than its replay, at its first use here. It is replayed instead.",
            RuntimeWarning,
            stacklevel=2,
        )

    def _use(
        self,
        kind: str,
        record: StepRecord,
        carry: Carry,
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> Use | None:
        """One use of a trace; None if the step is to be replayed as it is."""
        if self._after is None or record.fingerprint is not None:
            return None
        steps, parts = self._alike(kind, record)
        steps.uses += 1
        if parts is None or steps.reason is not None or steps.uses <= self._after:
            return None
        use = Use(kind, record, parts, carry, cotangents, wanted, self.compiler is not None)
        entry = steps.entry(use.signature)
        if entry is None or entry.off or use.empty:
            return None
        try:
            use.check(entry.trace is None)
            started = time.perf_counter()
            made = entry.prepare(use, self.compiler, steps.uses // _RARE)
            if made:
                self.on_traced(time.perf_counter() - started)
        except NotTraceableError as reason:
            entry.off = True
            if self.compiler is not None:
                self.compiler.give_up(f"{reason}")
            return None
        if entry.trace is None or entry.trace.slow:
            entry.off = entry.trace is not None
            return None
        use.trace = entry.trace
        return use

    def _alike(self, kind: str, record: StepRecord) -> tuple[Steps, Parts | None]:
        ids = (
            id(record.program), id(record.layout), id(record.update), id(record.callback), kind == "advance",
        )  # fmt: skip
        known = self._found.get(ids)
        if known is None or known[2]() is not record.callback:
            reason = _reason(record)
            parts = split(record.program, record.update, record.layout.externals_in) if reason is None else None
            if reason is not None or record.callback is not None:
                steps = Steps(reason=reason)
            else:
                steps = self._shared.setdefault(_key(kind, record), Steps())
            if reason is not None and self.compiler is not None:
                self.compiler.give_up(reason)
            if len(self._found) == _KINDS:
                self._found.clear()
            # The trajectory holds programs, layouts and updates; a callback may hold tensors of the user's.
            callback = _none if record.callback is None else weakref.ref(record.callback)
            known = self._found[ids] = (steps, parts, callback)
        return known[0], known[1]


def _none() -> None:
    return None


def _ignore(seconds: float) -> None:
    pass


class TracedReplay:
    """Advance to the step's carry, then pull that one step back: traced, or through its graph."""

    def __init__(self, count: Callable[[], None], replays: Replays) -> None:
        self._count, self._replays = count, replays
        self._native = NativeReplay(count)

    def graph(self, record: StepRecord, carries: Carries) -> PulledBack:
        """What the step is pulled back by; its graph is built when the cotangents are known, if at all."""
        if record.time in record.segment.graphs or len(carries.built_with(record)) > 1:
            return self._native.graph(record, carries)
        carry = carries.carry_before(record)
        self._count()
        return StepToPullBack(self._replays, record, carry)


@dataclass
class StepToPullBack:
    """A step of which nothing was run yet."""

    replays: Replays
    record: StepRecord
    carry: Carry

    def pull_back(self, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
        """The vector-Jacobian product, once, as far as it is wanted."""
        return self.replays.pull_back(self.record, self.carry, cotangents, wanted)


class Compiler(Protocol):
    """Makes a faster function of a flat graph."""

    def compiled(self, graph: FlatGraph, inputs: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], list[Any]]:
        """A function of the same inputs with the same outputs; the graph itself if it cannot be compiled."""

    def give_up(self, reason: str) -> None:
        """Say that some steps are replayed as they are."""


@dataclass(eq=False)
class Steps:
    """Steps that differ in the values of tensors and numbers, and in shapes. Holds no tensor."""

    reason: str | None = None  # why they are not traced
    uses: int = 0
    entries: dict[Any, Entry] = field(default_factory=dict)

    def entry(self, signature: Any) -> Entry | None:
        """What there is for tensors of these shapes; None if there are too many."""
        found = self.entries.get(signature)
        if found is None and len(self.entries) < _SHAPES:
            found = self.entries[signature] = Entry()
        return found


class Entry:
    """The trace of steps of the same shapes, once there is one, and the numbers that they had."""

    def __init__(self) -> None:
        self.trace: Trace | None = None
        self.off = False
        self._uses = self._tries = 0
        self._first: list[Any] = []
        self._differ: set[int] = set()
        self._lock = threading.Lock()

    def prepare(self, use: Use, compiler: Compiler | None, at_least: int) -> bool:
        """Make the trace, or another one, after `at_least` so many uses. Returns whether that was done."""
        with self._lock:
            if self.trace is not None and self.trace.distrusted:
                raise NotTraceableError("its trace gave another result than the replay")
            if self.trace is not None and self.trace.fits(use):
                return False
            self._uses += 1
            if not self._first:
                self._first = use.numbers
            self._differ.update(
                at for at, pair in enumerate(zip(self._first, use.numbers, strict=True)) if not same_number(*pair)
            )
            if self.trace is None and self._uses < max(OF_ONE_SHAPE, at_least):
                return False
            if self._tries == _TRIES:
                raise NotTraceableError("what it reads in Python differs from step to step")
            self.trace, self._tries = None, self._tries + 1
            self.trace = Trace(use, self._differ, compiler)
            return True


class Trace:
    """A traced replay or pullback, and what was baked into it.

    Args:
        use: The step that it is traced with.
        differ: Which of its numbers differ between steps.
        compiler: Makes it faster.
    """

    def __init__(self, use: Use, differ: set[int], compiler: Compiler | None) -> None:
        self.distrusted = False
        self._uses = 0
        self._times: list[tuple[float, float]] = []
        groups: dict[Any, list[int]] = {}
        for at in sorted(differ):
            value = use.numbers[at]
            if type(value) not in (int, float):
                raise NotTraceableError(f"an argument that is no number differs from step to step ({value!r})")
            groups.setdefault((type(value), value, use.dtype_of(at)), []).append(at)
        self.lifted = list(groups.values())
        self.dtypes = [dtype for _, _, dtype in groups]
        self._kept = [at for at in range(len(use.numbers)) if at not in differ]
        self._baked = [use.numbers[at] for at in self._kept]
        self._states = use.states()  # not their tensors, which lead to graphs
        self._targets = use.targets()
        # An update rule rounds in another way where a number is a tensor, and over a segment that adds up.
        self.form = Form(updates=not self.lifted or use.kind != "advance")
        inputs = use.inputs(self)
        graph = traced(use.function(self), inputs)
        self._ambient = use.record.update.ambient
        needed = self.form.needed
        full = FlatGraph(graph, fresh=range(needed or 0))
        lean = full if needed is None else FlatGraph(graph, range(needed), fresh=range(needed))
        self._full: Callable[[Sequence[Tensor]], list[Any]] = full
        self._lean: Callable[[Sequence[Tensor]], list[Any]] = lean
        if compiler is not None and needed is not None:
            self._lean = compiler.compiled(lean, inputs)

    def fits(self, use: Use) -> bool:
        """Whether what was baked in is the same for this step."""
        if use.targets() != self._targets:
            return False
        states = use.states()
        if not all(one is other for one, other in zip(states, self._states, strict=True)):
            if not all(map(same_attributes, states, self._states)):
                return False
            self._states = states
        numbers = use.numbers
        if not all(map(same_number, [numbers[at] for at in self._kept], self._baked)):
            return False
        return all(numbers[at] == numbers[group[0]] for group in self.lifted for at in group)

    def __call__(self, inputs: Sequence[Tensor], *, full: bool) -> list[Any]:
        """Run it."""
        self._uses += 1
        now = Ambient.capture()
        run = self._full if full else self._lean
        with torch._C.DisableTorchFunction():
            if now.switches[1:] == self._ambient.switches[1:]:
                return run(inputs)
            with self._ambient.restored(now):
                return run(inputs)

    def timed(self, replay: float, own: float) -> None:
        """Add what a replay took, and what the trace took for the same: seconds of this thread."""
        self._times.append((replay, own))

    @property
    def slow(self) -> bool:
        """Whether it is no faster than the replay, as where kernels take all the time; its comparisons then cost."""
        replays, own = map(sum, zip(*self._times[1:], strict=True)) if len(self._times) > 1 else (1.0, 0.0)
        return own > WORTH * replays

    def is_due(self) -> bool:
        """Whether the next use is to be compared with the replay: the 1st, 2nd, 4th, 8th ... is."""
        return (self._uses + 1) & self._uses == 0


@dataclass
class Form:
    """What the outputs of a trace are."""

    updates: bool  # whether the update is traced as well
    gradients: int = 0
    state: State = field(default_factory=list)
    buffers: tuple[bool, ...] = ()
    carry: Any = None  # the form of the next carry's tensors, once there was one
    needed: int | None = None  # the first so many outputs, where no mark has to be checked


class Use:
    """One step that is to be run by a trace: its tensors and numbers, in the trace's order."""

    trace: Trace

    def __init__(
        self,
        kind: str,
        record: StepRecord,
        parts: Parts,
        carry: Carry,
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[bool],
        compiled: bool,
    ) -> None:
        self.kind, self.record, self._parts, self._carry, self._cotangents = kind, record, parts, carry, cotangents
        self._wanted = wanted
        self.empty = kind == "pull back" and (not any(wanted) or all(cotangent is None for cotangent in cotangents))
        self._given = [cotangent for cotangent in cotangents if cotangent is not None]
        self._stand_ins = record.stand_ins()
        made = parts.before(record, self._stand_ins)
        taken = set(record.layout.externals_in)
        self._trainable = [index in taken for index in parts.externals] + [tensor.requires_grad for tensor in made]
        self._externals = [*(self._stand_ins[index] for index in parts.externals), *made]
        self._plain = plain_state(carry.state)
        self.numbers = [*(record.numbers[at] for at in parts.numbers), *(value for _, _, value in self._plain)]
        self._tensors = [*carry.tensors(), *self._externals]
        self.signature = (
            compiled,
            tuple([cotangent is None for cotangent in cotangents]),
            tuple(self._trainable),
            tuple(wanted),
            carry.form,
            tuple([form_of(tensor) for tensor in (*self._externals, *self._given)]),
        )

    def check(self, first: bool) -> None:
        """Raise if something in this step rules a trace out; its tensors are looked at where there is none yet."""
        record = self.record
        if record.callback_rng is not None or any(record.rng[position] is not None for position in self._parts.body_at):
            raise NotTraceableError("it draws random numbers")
        if first and not all(isinstance(number, PLAIN) for number in self.numbers):
            raise NotTraceableError("an argument of a call is an object of a class of its own")
        if first and not all(map(traceable, (*self._tensors, *self._given))):
            raise NotTraceableError("it reads tensors that are complex, sparse, or of a class of their own")

    def states(self) -> list[list[dict[str, Any]] | None]:
        """The plain attributes of the model at each call of the body."""
        states = [self.record.states[position] for position in self._parts.body_at]
        return [None if state is None else state.plain for state in states]

    def targets(self) -> list[Any]:
        """What stands for the functions that the body calls."""
        return [standing_for(target) for target in self.record.targets.values()]

    def dtype_of(self, at: int) -> torch.dtype:
        """What a number is as a tensor: precise for the update rule; one that leaves the loss's type as it is."""
        of_update = {ref.at for ref in self._parts.update.refs if ref.kind == "number"}
        if at >= len(self._parts.numbers) or self._parts.numbers[at] in of_update:
            return torch.float64
        return self._carry.weights[0].dtype

    def inputs(self, trace: Trace) -> list[Tensor]:
        """The tensors to run a trace with."""
        lifted = [
            torch.tensor(float(self.numbers[group[0]]), dtype=dtype)
            for group, dtype in zip(trace.lifted, trace.dtypes, strict=True)
        ]
        return [
            tensor.detach() if tensor.requires_grad else tensor for tensor in (*self._tensors, *lifted, *self._given)
        ]

    def function(self, trace: Trace) -> Callable[..., list[Any]]:
        """The function to trace."""
        tensors, filled = self._carry.taken_apart()
        trainable = self._trainable
        counts = [len(tensors), len(trainable), len(trace.lifted), len(self._given)]
        record, parts, form = self.record, self._parts, trace.form
        positions = state_positions(self._carry.state)
        body = self._advance if self.kind == "advance" else self._pull_back

        def function(*flat: Tensor) -> list[Any]:
            given = iter(flat)
            in_carry, external, lifted, cotangents = ([next(given) for _ in range(count)] for count in counts)
            carry = filled(in_carry)
            numbers: list[Any] = list(record.numbers)
            for group, number in zip(trace.lifted, lifted, strict=True):
                for at in group:
                    if at < len(parts.numbers):
                        numbers[parts.numbers[at]] = number
                    else:
                        place, index, name = positions[at - len(parts.numbers)]
                        carry.state[place][index][name] = number
            externals = [
                tensor.detach().requires_grad_(train) for tensor, train in zip(external, trainable, strict=True)
            ]
            with torch.enable_grad():
                return body(form, parts.bodied(record, numbers, trainable), carry, externals, cotangents)

        return function

    def _advance(
        self, form: Form, record: StepRecord, carry: Carry, externals: list[Tensor], cotangents: list[Tensor]
    ) -> list[Any]:
        outputs: list[Any]
        weights = [
            weight.detach().requires_grad_(trainable)
            for weight, trainable in zip(carry.weights, record.layout.trainable, strict=True)
        ]
        run = record.run(weights, carry.state, carry.buffers, externals, create_graph=False)
        form.buffers = tuple([buffer is not None for buffer in run.buffers])
        buffers = [buffer for buffer in run.buffers if buffer is not None]
        if form.updates:
            outputs = [run.loss, *run.weights]
            self._put_state(form, run.state, outputs)
        else:
            outputs = [run.loss, *run.grads]
        return [*outputs, *buffers]

    def _pull_back(
        self, form: Form, record: StepRecord, carry: Carry, externals: list[Tensor], cotangents: list[Tensor]
    ) -> list[Any]:
        weights, state = carry_stand_ins(record, carry)
        run = record.run(weights, state, carry.buffers, externals, create_graph=True)
        inputs = inputs_of(record.layout, weights, state, externals)
        given = iter(cotangents)
        carried = len(record.layout.weights_in) + len(record.layout.state_in)
        of_external = dict(zip(self.record.layout.externals_in, self._wanted[carried:], strict=True))
        places = self._parts.externals
        wanted = [*self._wanted[:carried]]
        wanted += [  # of what the prologue made, all
            index >= len(places) or of_external[places[index]] for index in record.layout.externals_in
        ]
        pulled = StepGraph(inputs, outputs_of(record.layout, run.weights, run.state), run.results).pull_back(
            [None if cotangent is None else next(given) for cotangent in self._cotangents], wanted
        )
        outputs = [run.loss, *pulled, *run.weights, *run.grads]
        form.gradients, form.needed = len(pulled), 1 + len(pulled)
        self._put_state(form, run.state, outputs)
        return outputs

    def _put_state(self, form: Form, state: State, outputs: list[Any]) -> None:
        numbers = {
            position: type(value)
            for position, (_, _, value) in zip(state_positions(self._carry.state), self._plain, strict=True)
        }
        form.state = put_state(state, numbers, outputs)

    def advanced(self) -> Carry:
        """Run the trace of a replay, and the update after it if that is not in the trace."""
        record, form = self.record, self.trace.form
        outputs = self._run(full=True)
        count = len(self._carry.weights)
        weights: list[Tensor] = outputs[1 : 1 + count]
        if form.updates:
            state = taken_state(form.state, outputs)
        else:
            externals = [tensor.detach() for tensor in self._stand_ins]
            grads: list[Tensor | None] = outputs[1 : 1 + count]
            weights, state = record.update_again(
                self._carry.weights, grads, self._carry.state, externals, create_graph=False
            )
        kept = iter(outputs[len(outputs) - sum(form.buffers) :])
        carry = Carry(weights, state, tuple([next(kept) if there else None for there in form.buffers]))
        carry.known_form = form.carry
        form.carry = carry.form
        return carry

    def pulled_back(self) -> list[Tensor | None]:
        """Run the trace of a pullback."""
        record, form = self.record, self.trace.form
        expected = record.segment.marks.get(record.time + 1)
        outputs = self._run(full=expected is not None)
        if expected is not None:
            first, count = 1 + form.gradients, len(self._carry.weights)
            grads = outputs[first + count : first + 2 * count]
            check_mark(record, expected, outputs[first : first + count], taken_state(form.state, outputs), grads)
        found: list[Tensor | None] = outputs[1 : 1 + form.gradients]
        return self._spread(found)

    def _spread(self, found: list[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the body's externals as gradients of the step's."""
        layout, parts = self.record.layout, self._parts
        carried = len(layout.weights_in) + len(layout.state_in)
        if not layout.externals_in:
            return found
        body = [index for index, trainable in enumerate(self._trainable) if trainable]
        of_external: dict[int, Tensor] = {}
        ends: list[tuple[Tensor, Tensor]] = []
        for index, grad in zip(body, found[carried:], strict=True):
            if grad is not None and index < len(parts.externals):
                of_external[parts.externals[index]] = grad
            elif grad is not None:
                ends.append((self._externals[index], grad))
        if ends:
            made, grads = zip(*ends, strict=True)
            sources = [self._stand_ins[index] for index in layout.externals_in]
            through = torch.autograd.grad(made, sources, grads, allow_unused=True)
            for index, grad in zip(layout.externals_in, through, strict=True):
                if grad is not None:
                    of_external[index] = of_external[index] + grad if index in of_external else grad
        asked = zip(layout.externals_in, self._wanted[carried:], strict=True)
        return [*found[:carried], *(of_external.get(index) if wanted else None for index, wanted in asked)]

    def _run(self, *, full: bool) -> list[Any]:
        outputs = self.trace(self.inputs(self.trace), full=full)
        if self.record.loss is not None:
            check_loss_value(self.record, outputs[0])
        return outputs


def _reason(record: StepRecord) -> str | None:
    """Why steps like this one are never traced."""
    if is_custom(record.rules):
        return "the update rule is not one of this package's"
    ambients = [instruction.ambient for instruction in record.program.instructions]
    if any(ambient.autocast_enabled for ambient in (record.update.ambient, *ambients)):
        return "autocast is on"
    if any(ambient.switches[1:] != record.update.ambient.switches[1:] for ambient in ambients):
        return "a switch (of a back end, a default dtype) was changed inside a step"
    if any(instruction.call is torch.utils.checkpoint.checkpoint for instruction in record.program.instructions):
        return "it recomputes a part of itself"
    return None


def _key(kind: str, record: StepRecord) -> Any:
    """Equal for steps of one model that are alike, also in different contexts."""
    instructions = tuple([
        (
            ("model", one.call.target) if isinstance(one.call, ModuleCall) else one.call,
            one.structure,
            one.refs,
            one.ambient,
            one.outputs,
            one.weights,
            one.buffers,
            one.found,
        )
        for one in record.program.instructions
    ])  # fmt: skip
    rules = record.rules
    return (
        kind,
        instructions,
        record.program.loss,
        record.program.buffers,
        record.layout,
        record.update,
        type(rules),
        rules.first_order,
        tuple(map(tuple, rules._group_to_param_list)),
    )


_families: dict[int, dict[Any, Steps]] = {}


def _shared_by(model: nn.Module) -> dict[Any, Steps]:
    """The steps of all contexts of one model."""
    if id(model) not in _families:
        _families[id(model)] = {}
        weakref.finalize(model, _families.pop, id(model), None).atexit = False
    return _families[id(model)]
