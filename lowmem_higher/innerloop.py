"""innerloop_ctx: wires the parts together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_higher import traced
from lowmem_higher.blocks import Selection, block_paths, make_blocks
from lowmem_higher.budget import budget_bytes
from lowmem_higher.budgeted import Budgeted
from lowmem_higher.compiled import Inductor
from lowmem_higher.fast_weights import copied
from lowmem_higher.holdings import Hint
from lowmem_higher.ledger import Ledger
from lowmem_higher.live_module import LiveModule
from lowmem_higher.optim import DifferentiableOptimizer, get_diff_optim
from lowmem_higher.optim.base import State
from lowmem_higher.patch import FunctionalModule, call_submodules_through, monkeypatch
from lowmem_higher.program import Buffers
from lowmem_higher.progress import Progress
from lowmem_higher.recompute import follow_view
from lowmem_higher.record import recorder
from lowmem_higher.report import Report
from lowmem_higher.scan import Known
from lowmem_higher.second_order import second_order
from lowmem_higher.settings import Settings
from lowmem_higher.slip import warn_of_slip
from lowmem_higher.step import StateKey, detached_state, state_keys, state_leaf, with_state_leaves
from lowmem_higher.structure import is_dtensor
from lowmem_higher.traced import Replays
from lowmem_higher.trajectory import Trajectory


def _replays(model: nn.Module, settings: Settings) -> Replays:
    if settings.compile is True:
        return Replays(model, Inductor(), traced.COMPILE_AFTER)
    return Replays(model, None, traced.TRACE_AFTER if settings.compile else None)


class Unrolled:
    """Counts the steps of a full unroll, which runs each with its graph, in the loop."""

    program = None

    def __init__(self, twice: bool, progress: Progress) -> None:
        self.ledger = Ledger()
        self._progress, self._twice = progress, twice
        self._entered = time.perf_counter()

    def count_step(self) -> None:
        """Count one step."""
        self.ledger.count_unrolled(twice=self._twice)
        self._progress.step(self.ledger.steps)
        self.ledger.forward_seconds = time.perf_counter() - self._entered

    @property
    def report(self) -> Report:
        """What the run has cost so far."""
        return self.ledger.report()


@dataclass(frozen=True)
class Start:
    """Where a loop goes on that began in another context.

    Attributes:
        time: The steps that were taken before.
        weights: Those that steps have made, by index; the others are the model's. Not written into.
        state: The optimizer state.
        followed: Those of its tensors that earlier steps have made, so that they have a gradient.
        buffers: All buffers.
        attributes: Plain attributes that forwards have set, as `(submodule, name, value)`.
    """

    time: int
    weights: Mapping[int, Tensor]
    state: State
    followed: tuple[StateKey, ...]
    buffers: Buffers
    attributes: tuple[tuple[int, str, Any], ...]

    @staticmethod
    def of(
        fmodel: Any, diffopt: DifferentiableOptimizer, time: int, attributes: Sequence[tuple[int, str, Any]]
    ) -> Start:
        """Where a loop stands after `time` steps."""
        view, state = fmodel._view, diffopt.state
        made = {
            index: view.current[index].detach() for index in sorted(diffopt.held) if view.current[index].requires_grad
        }
        followed = tuple([key for key in state_keys(state) if state_leaf(state, key).requires_grad])
        return Start(time, made, detached_state(state), followed, tuple(view.slots.read_buffers()), tuple(attributes))

    def put_into(self, fmodel: Any, diffopt: DifferentiableOptimizer) -> None:
        """Let a new context begin here; weights and state are leaves."""
        view = fmodel._view
        weights = [
            self.weights[index].detach().requires_grad_(weight.requires_grad) if index in self.weights else weight
            for index, weight in enumerate(view.current)
        ]
        view.begin(self.time, weights)
        view.slots.install_buffers(copied(self.buffers))
        leaves = {key: state_leaf(self.state, key).detach().requires_grad_() for key in self.followed}
        diffopt.state = with_state_leaves(self.state, leaves)
        modules = list(fmodel.modules())
        for module, name, value in self.attributes:
            object.__setattr__(modules[module], name, value)


Observer = Callable[[Settings, Trajectory | Unrolled], Callable[[], None]]
OBSERVERS: list[Observer] = []
"""Called when an inner loop begins, with what will count it; what they return is called after each of its steps."""


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    override: Mapping[str, Sequence[Any]] | None = None,
    track_higher_grads: bool = True,
    *,
    checkpoint_every: int | None = None,
    checkpoints: int | None = None,
    steps: int | None = None,
    memory_budget: float | str | None = None,
    graphs: int = 1,
    replay: str = "native",
    pullback: str = "reverse",
    verify: str = "new",
    truncate: int | None = None,
    first_order: bool = False,
    journal: bool = False,
    store: str | os.PathLike[str] = "device",
    progress: bool | str = False,
    blocks: Selection | None = None,
    microbatches: int = 1,
    compile: bool | str = False,  # noqa: A002  (torch's word for it)
) -> Iterator[tuple[Any, DifferentiableOptimizer]]:
    """Open a differentiable inner loop: `higher`'s own context manager, with memory that need not grow with the steps.

    Inside the context write an ordinary training loop with `fmodel` for the model and `diffopt.step(loss)` for the
    optimizer; then differentiate any loss of the result with respect to anything that requires grad and took part.

    Args:
        model: The model; it is not changed.
        opt: A torch optimizer over (some of) the model's parameters; its state is taken over, it is not changed.
        device: Where fast weights, buffers and optimizer state go; `None` leaves them where they are.
        copy_initial_weights: True (as in `higher`): the initial fast weights are detached copies, and
            `model.parameters()` get no gradient. False: gradients reach `model.parameters()`. A `NothingTrainedWarning`
            is given where an outer backward ended at those copies, which nobody asked for, and at nothing else.
        override: `{hyperparameter: [value]}` or one value per parameter group; tensors get gradients.
        track_higher_grads: False records no graph at all, for evaluation.
        checkpoint_every: `None` is the full unroll: any order of derivative, memory that grows with every step. N keeps
            the weights of every N-th step only, and recomputes the rest during the outer backward: the same gradient.
        checkpoints: Instead of `checkpoint_every`: keep so many carries, however many steps there will be. They are
            spread over the steps while the loop runs, and their slots are used again in the backward.
        steps: With `checkpoints` or `memory_budget`: the number of inner steps, if it is known. Saves up to an eighth
            of the replays, and lets a budget be used in full.
        memory_budget: Instead of these: how much the loop may take, in bytes, as a text such as "2GiB", or as a
            fraction of the memory that is free on the model's device when the context is entered, 0.5. The first two
            steps are measured; then as many steps keep their graphs, as in the full unroll, and as many carries are
            held for the others as there is room for. Where all graphs fit, nothing is replayed.
        graphs: K lets the backward hold the graphs of K steps at once: it builds them one after the other from one
            kept carry, with no other run. With `checkpoint_every=N, graphs=N` nothing else is replayed, which takes
            what a full unroll takes and a first-order run for each step, in the memory of N graphs.
        replay: "native" recomputes the weights first, then differentiates one step at a time. "torch" rebuilds a
            segment through `torch.utils.checkpoint`; slower, an independent check.
        pullback: "reverse" builds one step's second-order graph, reverse over reverse mode. "mixed" builds none: the
            update rule is pulled back by reverse mode, and the inner gradient is differentiated in forward mode along
            one direction. The first use of each step program is compared with reverse mode, which takes the peak of
            "reverse" once (`verify="off"` leaves that out, and compares losses only: then an operator that is wrong in
            forward mode makes a wrong gradient). A program that differs, or that torch cannot differentiate so (an
            `autograd.Function` without `setup_context` and `jvp`, `torch.utils.checkpoint` in the model), is pulled
            back by reverse mode, with one `MixedFallbackWarning`. Wants `checkpoint_every` or `checkpoints`,
            `replay="native"`, no `first_order`.
        verify: What replays are compared with. "new": the loss of every step, the gradients at the 1st, 2nd, 4th,
            8th ... use of each step program, the weights and optimizer state at the end of each segment. "all": the
            gradients of every step as well. "off": nothing.
        truncate: `None` differentiates through all steps. K differentiates through the last K steps taken when the
            outer backward runs: what earlier ones have made is a constant, as if the weights and the optimizer state
            had been detached K steps before the end.
        first_order: True treats each inner gradient as a constant (first-order MAML), so nothing is differentiated
            twice: initial weights and hyperparameters get gradients, what only feeds an inner loss gets none.
        journal: True keeps the gradients of every step, as large as the weights, and recomputes carries by the update
            rule alone: no model is run for a replay, except for the second-order run of each step.
        store: Where kept carries live, and journals, and the tensors that steps read from outside: "device", where they
            are made; "host", in pinned memory, copied while the loop goes on and back while the backward does (of CUDA
            devices; for a CPU it saves nothing); or an existing directory, in files that go when no gradient can need
            them, at the latest when Python ends. Weights and buffers that never change are not copied. A tensor from
            outside goes once nobody but the backward holds its storage, one copy for all who read it: a batch when the
            loop takes the next one, a resident dataset never. One below 4 KiB stays, and one that requires grad. The
            gradient is the same to the bit.
        progress: True shows a bar on stderr, if that is a terminal: the steps of the loop, then the recomputed and
            differentiated steps of the backward, with the time to go. "always" shows it also where stderr is a file. By
            tqdm if that is installed (`lowmem_higher[progress]`), else a line that counts. The full unroll shows the
            loop only.
        blocks: With `pullback="mixed"`: submodules whose activations are computed again in each backward, also those
            of first-order runs and of the outer loss. Module classes, `blocks=(TransformerBlock,)`, or a function of a
            module that says whether it is one. A block may read its arguments and its own parameters and buffers.
        microbatches: With `pullback="mixed"`: cut the batch of each step into so many parts of their own graphs, for a
            loss that is a mean or a sum over its batch. Checked: the losses of the parts must give the loss of every
            step (`ReplayMismatchError`); statistics of the batch and random draws are refused. The loop itself runs
            whole batches.
        compile: False: every replay runs the code of the model. "trace": the replays and pullbacks of a step program
            that has been used often (200 times, by all contexts of one model) are traced once, as flat graphs of torch
            calls, and run without autograd and without the code of the model: a backward of half the time where tensors
            are small. Traces that are no faster are dropped. True: they are traced early, and pullbacks compiled by
            torch's inductor, which takes seconds to minutes and, on a CPU, a C++ compiler
            (`diffopt.report.compile_seconds`); what cannot be compiled is replayed, with a `CompileFallbackWarning`
            that says why. The gradients agree to rounding; those of "trace" are the same to the bit unless numbers (a
            step count, a learning rate that is no tensor) differ from step to step. Traces are compared with replays,
            at their first use in each context and at their 2nd, 4th, 8th ... use. Dropout, rules of your own and
            forwards that branch on values stay as they are. Only with `replay="native"` and `pullback="reverse"`.

    Yields:
        `(fmodel, diffopt)`: the functional model and the differentiable optimizer. Both stay usable after the context.

    Raises:
        TypeError, ValueError: An argument cannot be used; the message says what can.
        MemoryBudgetError: At the second step: not even one checkpoint fits `memory_budget`.
        StoreError: At a step or in the backward: the disk is full, or a file did not come back as it was written.

    Warns:
        NothingTrainedWarning: See `copy_initial_weights`.
        BatchesHeldWarning: Once, at a step, with `store="device"`: batches handed in from outside, which nobody but the
            backward holds, take more than the kept carries and more than 64 MiB. Cut them from resident data inside the
            loop, `fmodel(x[idx])`, or let the step fetch them, `diffopt.step(fn, idx)`: then `idx` alone is held.

    Memory:
        With c = `checkpoint_every`, T steps, |carry| the bytes of fast weights, optimizer state and buffers, and G
        one step's second-order graph: `(ceil(T/c) + c) |carry| + G`, and the tensors that your loop hands in from
        outside, which are held by reference: T batches, or one dataset from which `x[idx]` is cut. Least near
        `c = sqrt(T)`. The full unroll needs about `T * G`. With s = `checkpoints`: `(s + 3) |carry| + G` for any T.
        With `graphs=K` G is K times as large.
        With `memory_budget` these terms and the graphs of unrolled steps stay below it, as live bytes, as long as the
        steps are like the first two. Not counted: the model, what your loop hands in from outside, the outer loss.
        With `truncate=K` the first term is `(ceil(K/c) + 1 + c) |carry|`, for any T; the full unroll still holds the
        graphs of all steps. `journal=True` adds T times the bytes of the weights. With `first_order=True` G is the
        graph of a plain backward, or of the update if larger.
        With `store="host"` or a directory the device has `(c + 3) |carry| + G`, or `5 |carry| + G` with `checkpoints`,
        whatever s is, two batches, two inner gradients with `journal`, and copies under way on CUDA; the rest,
        `ceil(T/c) |carry|` or `(s + 1) |carry|`, T batches and T inner gradients, is stored.

    Passes:
        At most 2 T first-order runs, your loop included, and T second-order runs. The full unroll: T second-order runs.
        With `checkpoints=s` and `steps=T` the fewest first-order runs that s slots allow, for example 3.6 T at T=1000,
        s=10 and 2.5 T at s=30 (`lowmem_higher.schedule.optimal_runs`); without `steps` at most 1.14 times as many.
        With `checkpoint_every=N` and `graphs=K` the first-order runs are T of your loop and N - K of each segment.
        With `memory_budget` one second-order run more for each loop whose steps were not measured in an earlier one;
        the steps that are unrolled need no first-order run.
        With `truncate=K` T first-order runs of your loop, K + c at most of the backward, and K second-order runs. With
        `first_order=True` what would be second-order runs are first-order ones. With `journal=True` there are no other
        first-order runs than your loop's. (`replay="native"`.)
        With `pullback="mixed"` a second-order run is one in forward over reverse mode, and one more compares each kind
        of step; T first-order runs are added for the inner gradients, but for SGD (whose update is linear in them) and
        with `journal=True`. `blocks` add a forward to each run. A first step whose initial weights' gradient nobody
        asks for, and whose meta-parameters come after the model's outputs (weights of examples, a learned loss), takes
        a first-order run in place of the second-order one: one JVP of the outputs, which keeps no activations.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net = torch.nn.Linear(3, 1)
        >>> opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
        >>> with higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=10) as (fnet, diffopt):
        ...     for _ in range(100):
        ...         _ = diffopt.step((fnet(x) - y).square().mean())
        ...     fnet(x).mean().backward()
        >>> net.weight.grad.shape
        torch.Size([1, 3])

    References:
        Grefenstette et al., Generalized inner loop meta-learning, arXiv 1910.01727 (`higher`).
        Griewank and Walther, Algorithm 799: revolve, ACM TOMS 26(1), 2000 (checkpointing of adjoint computations).
        Shaban et al., Truncated back-propagation for bilevel optimization, AISTATS 2019 (`truncate`).
        Finn et al., Model-agnostic meta-learning, ICML 2017, section 5.2 (`first_order`).
        Kemaev et al., Scalable meta-learning via mixed-mode differentiation, arXiv 2505.00793 (`pullback="mixed"`).
    """
    settings = Settings(
        checkpoint_every=checkpoint_every,
        checkpoints=checkpoints,
        steps=steps,
        memory_budget=memory_budget,
        graphs=graphs,
        replay=replay,
        pullback=pullback,
        verify=verify,
        truncate=truncate,
        first_order=first_order,
        journal=journal,
        store=store,
        progress=progress,
        blocks=blocks,
        microbatches=microbatches,
        compile=compile,
    )
    with inner_loop(model, opt, settings, device, copy_initial_weights, override, track_higher_grads) as parts:
        yield parts


@contextmanager
def inner_loop(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    settings: Settings,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    override: Mapping[str, Sequence[Any]] | None = None,
    track_higher_grads: bool = True,
    start: Start | None = None,
) -> Iterator[tuple[Any, DifferentiableOptimizer]]:
    """What `innerloop_ctx` opens, with settings that are checked; from a later step on if there is a `start`."""
    where = None if device is None else torch.device(device)
    fmodel = monkeypatch(model, where, copy_initial_weights, track_higher_grads)
    diffopt = get_diff_optim(
        opt,
        model.parameters(),
        fmodel=fmodel,
        device=where,
        override=override,
        track_higher_grads=track_higher_grads,
    )
    if start is not None:
        start.put_into(fmodel, diffopt)
    view = fmodel._view
    if copy_initial_weights and track_higher_grads:
        warn_of_slip(view)
    wiring = _Wiring(model, fmodel, settings, track_higher_grads)
    with follow_view(view), second_order() if track_higher_grads else nullcontext(), wiring.open():
        wiring.join(diffopt)
        view.joined = wiring.join
        yield fmodel, diffopt


class _Wiring:
    """Gives the optimizers of one context what carries out their steps: one as a rule, or several on one fmodel."""

    def __init__(self, model: nn.Module, fmodel: FunctionalModule, settings: Settings, tracked: bool) -> None:
        self._settings, self._tracked = settings, tracked
        self._model = model
        self._trajectories: list[Trajectory] = []
        self._shown: list[Progress] = []
        self._hint = Hint()
        self._open = False
        self._live: LiveModule | None = None
        if settings.schedule is not None and tracked:
            self._live = LiveModule(model, fmodel, recorder())
            if settings.blocks is not None:
                paths = block_paths(model, settings.blocks)
                make_blocks(fmodel, paths)
                make_blocks(self._live.twin.root, paths)
            call_submodules_through(fmodel, self._live)
        self._model = model
        self._last = fmodel._view.last
        self._last.count = settings.truncate

    def join(self, optimizer: DifferentiableOptimizer) -> None:
        """Carry out the steps of an optimizer."""
        settings = self._settings
        optimizer.first_order = settings.first_order
        schedule = settings.schedule
        progress = Progress(settings.progress, settings.steps)
        self._shown.append(progress)
        if self._live is None or schedule is None:
            unrolled = Unrolled(self._tracked and not settings.first_order, progress)
            optimizer.follow(None, unrolled)
            progress.after_step += [observer(settings, unrolled) for observer in OBSERVERS]
            return
        trajectory = Trajectory(
            optimizer,
            self._live,
            recorder(),
            schedule,
            settings.replay,
            settings.verify,
            self._last,
            settings.journal,
            settings.store,
            self._hint,
            progress,
            settings.microbatches if settings.pullback == "mixed" else None,
            _replays(self._model, settings),
            Known.by(self._model) if settings.compile else None,
        )
        if settings.memory_budget is None:
            optimizer.follow(trajectory, trajectory)
        else:
            if self._open and self._trajectories:
                raise ValueError(
                    "A second optimizer joined a context with memory_budget, whose steps keep a carry each, so that no "
                    "budget holds. Say which carries to keep instead: innerloop_ctx(..., checkpoint_every=10)."
                )
            if any(map(is_dtensor, self._model.parameters())):
                raise ValueError(
                    f"memory_budget={settings.memory_budget!r} is shared out after each process has measured its own "
                    "steps, and the model has DTensors, whose collectives all processes must call in the same order. "
                    "Say which carries to keep instead: innerloop_ctx(..., checkpoints=10)."
                )
            limit = budget_bytes(settings.memory_budget, self._model)
            budgeted = Budgeted(optimizer, trajectory, self._model, limit, settings.steps)
            optimizer.follow(budgeted, budgeted)
        progress.after_step += [observer(settings, trajectory) for observer in OBSERVERS]
        if self._open:
            trajectory.open()
            self._trajectories.append(trajectory)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Record the steps inside the block."""
        self._open = True
        try:
            yield
        finally:
            self._open = False
            for progress in self._shown:
                progress.close()
            for trajectory in self._trajectories:
                trajectory.close()
            self._trajectories.clear()
