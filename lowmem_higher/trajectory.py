"""The trajectory of one inner loop: takes its steps and pulls them back. It holds the newest record only."""

from __future__ import annotations

import functools
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowmem_higher.budget import Sizes
from lowmem_higher.carries import Carries
from lowmem_higher.current_step import CurrentStep
from lowmem_higher.custom_rules import advance_first, is_custom
from lowmem_higher.errors import ExternalModifiedError, RecordError
from lowmem_higher.fast_weights import copied
from lowmem_higher.flat import NotTraceableError
from lowmem_higher.holdings import Hint, Holdings
from lowmem_higher.journals import Journals
from lowmem_higher.ledger import Ledger
from lowmem_higher.live_module import LiveModule
from lowmem_higher.mixed import MixedReplay
from lowmem_higher.optim.base import (
    DifferentiableOptimizer,
    GradCallback,
    Gradients,
    Group,
    State,
    called_back,
    check_loss,
)
from lowmem_higher.outer_term import TermNode, TermRecord
from lowmem_higher.patch import FunctionalModule
from lowmem_higher.program import Externals, Ref, StepProgram, check_ancestors, check_dependence, cut
from lowmem_higher.progress import Progress
from lowmem_higher.pullback import Replay, TorchReplay, attach, inputs_of, outputs_of, second_order_graph
from lowmem_higher.record import BufferState, Node, Recorder, version_of
from lowmem_higher.replay_state import Ambient, ModuleState, RngState, capture_rng, same_rng
from lowmem_higher.report import Report
from lowmem_higher.scan import Function, Known, Scan, Scanned, ScanStep, warn_of_loop
from lowmem_higher.schedule import Schedule
from lowmem_higher.step import (
    Carry,
    Journal,
    Layout,
    Mark,
    StepRecord,
    Update,
    detached_state,
    fingerprint,
    gradient_norms,
    plain_state,
    state_keys,
    state_leaf,
    state_tensors,
    with_state_leaves,
)
from lowmem_higher.structure import flatten
from lowmem_higher.testing import live_bytes
from lowmem_higher.traced import Replays, TracedReplay
from lowmem_higher.truncation import LastSteps
from lowmem_higher.watch import Watcher, refuse_hidden


def _nothing() -> None:
    return None


def _advance(replays: Replays, record: StepRecord | ScanStep, carry: Carry) -> Carry:
    return record.advance(carry) if isinstance(record, ScanStep) else replays.advance(record, carry)


class Trajectory:
    """Takes the steps of one checkpointed inner loop, and pulls them back.

    Args:
        optimizer: The differentiable optimizer whose steps these are.
        live: The model under recording.
        recorder: The recorder of this thread.
        schedule: Which carries are kept.
        replay: "native" or "torch".
        verify: "new", "all" or "off": which replays are checked.
        last: The steps that gradients pass through.
        journal: Whether each step's inner gradient is kept.
        store: Where kept carries, journals and externals live: "device", "host" or a directory.
        hint: Whether the warning of batches that outgrow the carries was given.
        progress: Is told how far the run is.
        mixed: None for reverse over reverse mode; else mixed mode, with each batch in so many parts.
        replays: Runs replays and pullbacks, traced where it can.
        traces: Of scans of this model; None: a scan is a loop.
    """

    def __init__(
        self,
        optimizer: DifferentiableOptimizer,
        live: LiveModule,
        recorder: Recorder,
        schedule: Schedule,
        replay: str,
        verify: str,
        last: LastSteps,
        journal: bool,
        store: str | os.PathLike[str],
        hint: Hint,
        progress: Progress,
        mixed: int | None,
        replays: Replays,
        traces: Known | None,
    ) -> None:
        self.ledger = Ledger()
        self.program: StepProgram | None = None
        self.last = last
        self._progress = progress
        self.ledger.on_run = progress.run
        replays.on_traced = self.ledger.add_compile_seconds
        self._rules = optimizer.rules_only()
        self._live = live
        self._recorder = recorder
        self._replays, self._traces = replays, traces
        self._carries = Carries(schedule, self.ledger, store, functools.partial(_advance, replays))
        self._holdings = Holdings(self._carries.store, self.ledger, hint)
        self._journals = Journals(self._carries.store, self._carries.constants, self.ledger) if journal else None
        once, twice = self.ledger.count_first_order, self.ledger.count_second_order
        self._count_pullback = once if optimizer.first_order else twice
        self._replay: Replay
        self._mixed = mixed is not None
        if mixed is not None:
            self._replay = MixedReplay(once, self._count_pullback, verify, mixed)
        elif replay == "torch":
            self._replay = TorchReplay(self._count_pullback)
        else:
            self._replay = TracedReplay(self._count_pullback, replays)
        self._verify = verify
        self._programs: dict[StepProgram, StepProgram] = {}
        self._layouts: dict[Layout, Layout] = {}
        self._updates: dict[Update, Update] = {}
        self._uses: Counter[StepProgram] = Counter()
        self._tail: StepRecord | None = None
        # Weights and state as the last step left them: weakly, since they lead through the graph back to here.
        self._outputs: list[weakref.ref[Tensor]] = []
        self._versions: list[int] = []
        self._plain_state: list[Any] = []
        self._node: Callable[[], Any] = _nothing  # of the last step, weakly
        self._norms: list[Tensor | None] = []  # of the last step's gradients
        self._updated: set[int] = set()  # the weights that some step has changed
        self._window = 0
        self._since = 0
        self._window_buffers = BufferState(())
        self._open = self._paused = False
        self._entered = time.perf_counter()

    def open(self) -> None:
        """The context is entered: record from here on."""
        self._recorder.enter()
        self._open = True
        self._start_window()

    def close(self) -> None:
        """The context is left. The graph stays usable."""
        if self._paused:
            self._recorder.resume()
        self._recorder.leave(self)
        self._open = False
        self._carries.close()
        self._progress.close()

    @property
    def report(self) -> Report:
        """What the run has cost so far."""
        return self.ledger.report()

    # Steps of the full unroll in between, see `budgeted.py`

    def pause(self, fmodel: FunctionalModule) -> None:
        """The next steps are unrolled: nothing is recorded."""
        fmodel._view.caller = None
        self._paused = True
        if self._open:
            self._recorder.pause(self)

    def resume(self, fmodel: FunctionalModule) -> None:
        """Those after them are checkpointed again."""
        fmodel._view.caller = self._live
        self._window_buffers = self._live.current_buffers(fmodel)
        self._paused = False
        if self._open:
            self._recorder.resume()
            self._start_window()

    def count_step(self) -> None:
        """A step was unrolled."""
        self.ledger.count_unrolled(twice=not self._rules.first_order)
        self._progress.step(self.ledger.steps)
        self.ledger.forward_seconds = time.perf_counter() - self._entered

    def schedule(self, schedule: Schedule) -> None:
        """From now on, hold carries as this one says; those that it has no slots for go."""
        self._carries.schedule(schedule, self._newest())

    def kind_of_step(self) -> Hashable:
        """What the bytes of the last step depend on, as far as a step shows it."""
        record = self._newest()
        tensors = [*record.externals, *self._carries.before(record).weights]
        shown = [(tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for tensor in tensors]
        layout, rules = record.layout, self._rules
        numbers = repr(record.numbers)  # where a batch is a slice, its size
        return (type(rules), rules.first_order, str(record.program), numbers, *shown, layout.weights_in)

    def measure_step(self) -> Sizes:
        """Run the last step again, and pull it back, to see what that takes."""
        record = self._newest()
        with self._recorder.watching(None), torch.enable_grad(), live_bytes() as memory:
            self._count_pullback()
            graph = second_order_graph(record, self._carries.before(record))
            weights = len(record.layout.weights_out)
            graph.outputs[:weights] = [out.clone() if out._is_view() else out for out in graph.outputs[:weights]]
            graph.let_go_of_state(weights)  # as the optimizer does, which holds the newest
            held = memory.current
            graph.pull_back([torch.ones_like(output) for output in graph.outputs], [True] * len(graph.inputs))
            pullback = memory.peak
        return Sizes(self._carries.before(record).nbytes, held, pullback, self.ledger.newest_externals_bytes)

    def _newest(self) -> StepRecord:
        assert self._tail is not None
        return self._tail

    def attributes_read(self) -> list[Tensor]:
        """The tensors that the last step read as plain attributes of the model."""
        states = [state for state in self._newest().states if state is not None]
        return [tensor for state in states for attributes in state.tensors for tensor in attributes.values()]

    # Taking steps

    def step(
        self,
        optimizer: DifferentiableOptimizer,
        loss: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        callback: GradCallback | None,
    ) -> None:
        """Take one step and leave its node in the graph. Nothing is changed if this raises (rule R12)."""
        if not self._open and not callable(loss):
            raise RecordError(
                "step(loss) was called after the context was left, where nothing is recorded. Take the step inside "
                "`with innerloop_ctx(...)`, or as diffopt.step(fn, *args), which needs no recording."
            )
        self._refuse_inside()
        fmodel: FunctionalModule = optimizer._fmodel
        with self._recording():
            node = None
            if callable(loss):
                run = functools.partial(loss, fmodel)
                loss, node = self._live.call(fmodel, loss, run, args, kwargs)
            with self._recorder.watching(None), torch._C.DisableTorchFunction():
                value = check_loss(loss)
                self._take(optimizer, fmodel, loss, value, node, callback)
            self._start_window()
        self.ledger.forward_seconds = time.perf_counter() - self._entered

    def _refuse_inside(self) -> None:
        if self._recorder.inside:
            raise RecordError(
                "A step was taken inside forward, or inside a function that the engine calls and a replay would call "
                "again. Take it in the loop: diffopt.step(loss)."
            )

    def _take(
        self,
        optimizer: DifferentiableOptimizer,
        fmodel: FunctionalModule,
        loss: Tensor,
        value: float,
        node: Node | None,
        callback: GradCallback | None,
    ) -> None:
        fmodel._view.take_assigned()
        weights = fmodel._view.current
        state = optimizer.state
        continues = self._check_weights(weights, state)
        buffers = self._live.current_buffers(fmodel)
        externals = Externals()
        piece = cut(self._recorder, loss, node, self._window, weights, self._window_buffers, buffers, externals)
        program = self._programs.setdefault(piece.program, piece.program)
        checked = self._checked(program)
        made_inside = functools.partial(self._recorder.made_in, self._window) if checked else None
        check_dependence(loss, weights, externals.tensors, self._since, made_inside, self._is_step)
        self._check_ancestors(optimizer, weights, externals.tensors)

        ambient = Ambient.capture()
        # The backward may run the model's code again (rule R7).
        with self.last.inner_gradient(), torch._C._EnableTorchFunction():
            grads: Gradients = optimizer.gradients(loss, weights, create_graph=False)
        held, reads_all = optimizer.held, callback is not None or optimizer.updates_in_place
        feeding = tuple([
            weight.requires_grad and (reads_all or grads[index] is not None or index not in held)
            for index, weight in enumerate(weights)
        ])  # fmt: skip
        mark = fingerprint(loss, grads) if checked else None
        found: list[Tensor] = []
        callback_rng = None
        if callback is not None:
            grads, found, callback_rng = self._call_back(callback, grads, weights)
        numbers = list(piece.numbers)
        rules, rule_rng = self._rules, None
        groups = [dict(group) for group in optimizer.param_groups]
        if is_custom(optimizer):
            rules = optimizer.rules_only()
            advanced, read, rule_rng = advance_first(optimizer, weights, grads, self._recorder.devices)
            found += read
        else:
            with torch.no_grad():
                advanced = optimizer.advance(weights, grads, state, groups)
        new_weights, new_state = advanced
        update = self._configured(groups, externals, numbers, ambient, found)

        layout = self._layout(weights, feeding, new_weights, state, new_state, externals.tensors)
        before = self._tail if continues else None
        carry = functools.partial(self._carry, weights, state, self._window_buffers)
        segment = self._carries.segment_of(self.ledger.steps, before, carry)
        held_externals = self._holdings.hold(externals.tensors, self.ledger.steps)
        journal = None
        if self._journals is not None:
            journal = self._journals.hold(Journal(grads, buffers.tensors), self.ledger.steps)
        record = StepRecord(
            time=self.ledger.steps,
            program=program,
            layout=layout,
            update=update,
            rules=rules,
            names=fmodel._view.slots.names,
            token=fmodel._view.token,
            externals=held_externals,
            versions=tuple(externals.versions),
            numbers=tuple(numbers),
            rng=piece.rng,
            states=piece.states,
            targets=piece.targets,
            callback=callback,
            callback_rng=callback_rng,
            rule_rng=rule_rng,
            loss=None if self._verify == "off" and not self._mixed else value,
            fingerprint=mark,
            segment=segment,
            previous=before if before is not None and before.segment is segment else None,
            journal=journal,
            release=self.ledger.release,
        )
        self.ledger.hold(record.externals)
        inputs = inputs_of(layout, weights, state, externals.tensors)
        # Parts of a joined update share its storage; what the user gets are tensors of their own.
        parts = outputs_of(layout, new_weights, new_state)
        outputs = [part.clone() if part._is_view() else part.detach() for part in parts]
        attached, past = attach(self, record, outputs, inputs)
        public = list(weights)
        for index, output in zip(layout.weights_out, attached, strict=False):
            public[index] = output
        leaves = dict(zip(layout.state_out, attached[len(layout.weights_out) :], strict=True))

        # From here on nothing can fail: make the step's results the current ones.
        kept = self._carries.taken(record, carry)
        if kept and before is not None and self._verify != "off":
            before.segment.marks[record.time] = Mark.of([*weights, *state_tensors(state)], self._norms)
        self._norms = gradient_norms(grads if self._verify != "off" else ())
        fmodel._view.append(public, past)
        optimizer.state = with_state_leaves(new_state, leaves)
        self.program = program
        self._uses[program] += 1
        self._tail = record
        self._node = past.node
        self.last.left(past.node)
        self._updated.update(layout.weights_out)
        self._outputs = [weakref.ref(tensor) for tensor in (*public, *state_tensors(optimizer.state))]
        self._versions = [version_of(tensor) for tensor in (*public, *state_tensors(optimizer.state))]
        self._plain_state = plain_state(optimizer.state)
        self._window_buffers = buffers
        self.ledger.steps += 1
        self.ledger.count_first_order()
        self.ledger.sample("forward", record.time)
        self._progress.step(self.ledger.steps)

    # Many steps at once

    def scan(
        self,
        optimizer: DifferentiableOptimizer,
        fn: Callable[..., Tensor],
        batches: Sequence[Any],
        args: tuple[Any, ...],
    ) -> bool:
        """Take as many steps as there are batches, by traces; False, and nothing is changed, where that can't be."""
        self._refuse_inside()
        fmodel: FunctionalModule = optimizer._fmodel
        fmodel._view.take_assigned()
        weights, state = list(fmodel._view.current), optimizer.state
        self._check_weights(weights, state)
        buffers = self._live.current_buffers(fmodel)
        carry = self._carry([weight.contiguous() for weight in weights], state, buffers)
        trainable = tuple([weight.requires_grad for weight in weights])
        modules = list(fmodel.modules())
        self._live.check_structure(modules)
        attributes, taken = ModuleState.capture(modules), self.ledger.steps
        with self._unrecorded():
            try:
                if self._traces is None:
                    raise NotTraceableError("compile=False")
                if self.last.count is not None or self._journals is not None:
                    raise NotTraceableError("truncate and journal are for single steps")
                if optimizer._grad_callback is not None or is_custom(optimizer):
                    raise NotTraceableError("it has a grad_callback or an update rule that is not this package's")
                function = Function(
                    fn, args, optimizer.param_groups, self._rules, self._live.twin, attributes, trainable
                )
                scan = Scan(
                    function,
                    batches,
                    self._verify,
                    self._traces,
                    self._replays.compiler,
                    self.ledger.add_compile_seconds,
                )
                last, carry = scan.steps(carry, taken, self._carries, self.ledger, self._progress)
            except BaseException as reason:
                self.ledger.steps = taken
                if not isinstance(reason, NotTraceableError):
                    raise
                if self._traces is not None:
                    warn_of_loop(f"{reason}", stacklevel=4)
                return False
            layout = scan.layout(weights, state, carry)
            record = Scanned(layout, last)
            self.ledger.hold([*function.constant])
            outputs = [tensor.detach() for tensor in outputs_of(layout, carry.weights, carry.state)]
            attached, past = attach(self, record, outputs, inputs_of(layout, weights, state, function.constant))
        for index, output in zip(layout.weights_out, attached, strict=False):
            weights[index] = output
        fmodel._view.append(weights, past, inside=len(batches) - 1)
        optimizer.state = with_state_leaves(
            carry.state, dict(zip(layout.state_out, attached[len(layout.weights_out) :], strict=True))
        )
        fmodel._view.slots.install_buffers(copied(carry.buffers))
        self._window_buffers = self._live.current_buffers(fmodel)
        self._tail = None
        self._outputs, self._versions, self._plain_state, self._norms = [], [], [], []
        self._updated.update(layout.weights_out)
        return True

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """What runs inside the block is no part of a step."""
        if self._open:
            self._recorder.pause(self)
        try:
            with self._recorder.watching(None):
                yield
        finally:
            if self._open:
                self._recorder.resume()
                self._start_window()

    # Terms of the outer loss

    def outer(self, optimizer: DifferentiableOptimizer, loss: Tensor) -> Tensor:
        """The same value and gradient as `loss`, without its graph."""
        if not self._open or self._recorder.inside:
            raise RecordError(
                "outer(loss) was called where nothing is recorded: after the context was left, or inside forward or a "
                "function that the engine calls. Call it in the loop, or use the loss itself."
            )
        fmodel: FunctionalModule = optimizer._fmodel
        with self._recorder.watching(None), torch._C.DisableTorchFunction():
            value = check_loss(loss)
            fmodel._view.take_assigned()
            weights, state = fmodel._view.current, optimizer.state
            before = self._tail if self._check_weights(weights, state) else None
            buffers, externals = self._live.current_buffers(fmodel), Externals()
            piece = cut(self._recorder, loss, None, self._window, weights, self._window_buffers, buffers, externals)
            made_inside = functools.partial(self._recorder.made_in, self._window)
            check_dependence(loss, weights, externals.tensors, self._since, made_inside, self._is_step)
            carry = None
            if before is None:
                carry = self._carries.hold(self.ledger.steps, self._carry(weights, state, self._window_buffers))
            term = TermRecord(
                time=self.ledger.steps,
                program=self._programs.setdefault(piece.program, piece.program),
                ambient=Ambient.capture(),
                before=before,
                carry=carry,
                trainable=tuple([weight.requires_grad for weight in weights]),
                externals=self._holdings.hold(externals.tensors, self.ledger.steps),
                versions=tuple(externals.versions),
                externals_in=tuple([i for i, tensor in enumerate(externals.tensors) if tensor.requires_grad]),
                numbers=piece.numbers,
                rng=piece.rng,
                states=piece.states,
                targets=piece.targets,
                loss=None if self._verify == "off" else value,
                release=self.ledger.release,
            )
            self.ledger.hold(term.externals)
            inputs = [weights[index] for index in term.weights_in]
            inputs += [externals.tensors[index] for index in term.externals_in]
            with torch.enable_grad():
                found: Tensor = TermNode.apply(self, term, loss.detach().clone(), *inputs)  # type: ignore[no-untyped-call]
        return found

    def pull_back_term(self, term: TermRecord, cotangent: Tensor) -> list[Tensor | None]:
        """The gradients of a term's inputs, from the cotangent of its value."""
        started = time.perf_counter()
        with self._recorder.watching(None), torch.enable_grad():
            if term.before is not None:
                carry = self._carries.after(term.before)
            else:
                assert term.carry is not None
                carry = self._carries.read(term.carry)
            self.ledger.count_first_order()
            grads = term.gradients(carry, cotangent)
        self.ledger.backward_seconds += time.perf_counter() - started
        return grads

    def _start_window(self) -> None:
        self._window = self._recorder.start_window(self)
        self._since = torch._C._autograd._get_sequence_nr()
        if self.ledger.steps == 0:
            self._window_buffers = self._live.buffers

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Record also after the context was left, for one step that runs a function."""
        if self._open:
            yield
            return
        self._recorder.enter()
        try:
            self._start_window()
            yield
        finally:
            self._recorder.leave(self)

    def _check_weights(self, weights: list[Tensor], state: State) -> bool:
        """Whether weights and state are as the last step left them; if not, this step's carry is kept."""
        now = [*weights, *state_tensors(state)]
        same = len(now) == len(self._outputs) and all(
            tensor is output() for tensor, output in zip(now, self._outputs, strict=True)
        )
        if same and [version_of(weight) for weight in weights] != self._versions[: len(weights)]:
            raise ExternalModifiedError(
                "A fast weight was modified in place since the last step, which neither this step's gradient nor its "
                "replay can account for. Set new values instead: fmodel.update_params([new values])."
            )
        return (
            same
            and [version_of(tensor) for tensor in now] == self._versions
            and plain_state(state) == self._plain_state
            and self._tail is not None
            and self._tail.layout.trainable == tuple([weight.requires_grad for weight in weights])
            and not any(map(self._recorder.exposed, weights))
        )

    def _is_step(self, node: Any) -> bool:
        """Whether a node of the graph is a step of this functional model, by this optimizer or another."""
        return getattr(getattr(node, "carries", None), "last", None) is self.last

    def _check_ancestors(
        self, optimizer: DifferentiableOptimizer, weights: list[Tensor], externals: list[Tensor]
    ) -> None:
        """An optimized weight of an earlier time must be no ancestor of what else this step reads."""
        last = None if self._tail is None else self._node()
        earlier = [
            weights[index]
            for index in optimizer.held & self._updated
            if weights[index].requires_grad
            and (weights[index].grad_fn is None or weights[index].grad_fn is not last)
            and not (
                self._outputs and weights[index] is self._outputs[index]()
            )  # what a step only passed on is no ancestor inside
        ]
        if earlier:
            others = [weight for weight in weights if not any(weight is other for other in earlier)]
            check_ancestors(earlier, [*others, *externals])

    def _checked(self, program: StepProgram) -> bool:
        """Whether this step keeps a fingerprint: under "new" the 1st, 2nd, 4th, 8th ... use of each program.

        The first use alone would leave a program unchecked that a backward does not follow to its start.
        """
        uses = self._uses[program] + 1
        return self._verify == "all" or (self._verify == "new" and uses & (uses - 1) == 0)

    def _call_back(
        self, callback: GradCallback, grads: Gradients, weights: list[Tensor]
    ) -> tuple[Gradients, list[Tensor], RngState | None]:
        rng = capture_rng(self._recorder.devices)
        watcher = Watcher([*weights, *(grad for grad in grads if grad is not None)])
        with torch.enable_grad(), torch._C._EnableTorchFunction(), refuse_hidden(watcher), watcher.on():
            used = called_back(callback, grads, CurrentStep(self.ledger.steps, weights))
        drawn = None if same_rng(rng, capture_rng(self._recorder.devices)) else rng
        return [None if grad is None else grad.detach() for grad in used], watcher.found, drawn

    def _configured(
        self,
        groups: Sequence[Group],
        externals: Externals,
        numbers: list[Any],
        ambient: Ambient,
        found: list[Tensor],
    ) -> Update:
        leaves: list[Any] = []
        structure = flatten([{k: value for k, value in group.items() if k != "params"} for group in groups], leaves)
        refs = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                refs.append(externals.ref(leaf, version_of(leaf)))
            else:
                refs.append(Ref("number", len(numbers)))
                numbers.append(leaf)
        found_refs = tuple([externals.ref(tensor, version_of(tensor)) for tensor in found])
        update = Update(structure, tuple(refs), ambient, found_refs)
        return self._updates.setdefault(update, update)

    def _layout(
        self,
        weights: list[Tensor],
        feeding: Sequence[bool],
        new_weights: list[Tensor],
        state: State,
        new_state: State,
        externals: list[Tensor],
    ) -> Layout:
        before = {key: state_leaf(state, key) for key in state_keys(state)}
        layout = Layout(
            trainable=tuple([weight.requires_grad for weight in weights]),
            weights_in=tuple([index for index, feeds in enumerate(feeding) if feeds]),
            state_in=tuple([key for key, leaf in before.items() if leaf.requires_grad]),
            externals_in=tuple([index for index, tensor in enumerate(externals) if tensor.requires_grad]),
            weights_out=tuple([index for index, weight in enumerate(weights) if weight is not new_weights[index]]),
            state_out=tuple(
                [key for key in state_keys(new_state) if before.get(key) is not state_leaf(new_state, key)]
            ),
        )
        return self._layouts.setdefault(layout, layout)

    def _carry(self, weights: list[Tensor], state: State, buffers: BufferState) -> Carry:
        return Carry([w.detach() for w in weights], detached_state(state), buffers.tensors)

    # Handing out carries

    def keep(self, carry: Carry) -> Carry:
        """Count a carry that a replay holds."""
        return self._carries.keep(carry)

    def carry_before(self, record: StepRecord) -> Carry:
        """The carry that a step started from."""
        return self._carries.before(record)

    def weights_after(self, record: StepRecord | Scanned) -> list[Tensor]:
        """The fast weights that a step, or a scan, ended with."""
        with self._recorder.watching(None):
            return self._carries.after(record.last if isinstance(record, Scanned) else record).weights

    def built_with(self, last: StepRecord) -> list[StepRecord]:
        """The steps whose graphs are built together with that of `last` by a native replay."""
        return self._carries.built_with(last)

    def rebuilt_with(self, last: StepRecord) -> list[StepRecord]:
        """The steps whose graphs are held together with that of `last`."""
        return self._carries.rebuilt_with(last)

    # Going back

    def pull_back(
        self, record: StepRecord | Scanned, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of those of a step's inputs that are wanted, from the cotangents of its outputs."""
        started = time.perf_counter()
        if record is self._tail:
            self._mark_end(record)
            self._carries.begin_backward(record)
        if self._progress.begin_backward(functools.partial(self._runs_ahead, record)):
            torch.autograd.Variable._execution_engine.queue_callback(self._progress.close)
        try:
            with self._recorder.watching(None), torch.enable_grad():
                if isinstance(record, Scanned):
                    return record.pull_back(cotangents, self._carries, self.ledger, self._count_pullback)
                graph = self._replay.graph(record, self)
            self.ledger.sample("backward", record.time)
            with self._recorder.watching(None):
                grads = graph.pull_back(cotangents, wanted)
        except BaseException:
            self._progress.close()
            raise
        self._carries.passed(record)
        self.ledger.backward_seconds += time.perf_counter() - started
        return grads

    def _runs_ahead(self, record: StepRecord | Scanned) -> int:
        """About how many runs a backward from this step takes: recomputed and differentiated steps."""
        steps = reached = record.time + 1
        if self.last.count is not None:
            reached = min(steps, self.last.count)
        if isinstance(self._replay, TorchReplay):
            return reached * TorchReplay.RUNS
        newest = record.last if isinstance(record, Scanned) else record
        recomputed = self._carries.runs_back(newest, steps)
        return reached + (recomputed if reached == steps else min(recomputed, reached))

    def _mark_end(self, record: StepRecord) -> None:
        """Let the newest step's replay be compared with the weights that the loop ended with, if they are alive."""
        tensors = [tensor for output in self._outputs if (tensor := output()) is not None]
        unchanged = [version_of(tensor) for tensor in tensors] == self._versions
        if self._verify != "off" and unchanged and not any(map(self._recorder.exposed, tensors)):
            record.segment.marks[record.time + 1] = Mark.of(tensors, self._norms)

    def spent(self, record: StepRecord) -> None:
        """The step was pulled back for the last time: if it was the newest, the next one starts from a kept carry."""
        if self._tail is record:
            self._tail = None
            self._norms = []
