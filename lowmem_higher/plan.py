"""What an inner loop will take under each setting, measured on a few real steps before the run.

NOTE [ Laws of the peak ]

With T steps, n carries held besides the current one, |carry| the bytes that one more of them takes, r what a step
leaves behind (random states, its batch), all other bytes measured on loops of three steps:

    checkpoints     base + r T + the most of: n |carry| + a step of the loop or the outer loss, while the loop runs,
                    n |carry| + one step's graph, in the backward
    full unroll     base + T (one step's graph) + its outer backward

In the loop `checkpoint_every=c` has n + 1 = ceil(T/c), and `checkpoints=s, steps=T` has n = s; in the backward n + 1 is
`carries_in_backward`. The first pullback gets cotangents of the weights only, later ones of the optimizer state as
well, so they are told apart. The passes are those of `schedule.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_higher.budget import Sizes, allot, budget_bytes, free_bytes
from lowmem_higher.errors import MemoryBudgetError
from lowmem_higher.innerloop import innerloop_ctx
from lowmem_higher.replay_state import capture_rng, rng_restored
from lowmem_higher.report import format_bytes
from lowmem_higher.schedule import Revolve, first_order_runs, optimal_runs
from lowmem_higher.structure import flatten, unflatten
from lowmem_higher.testing import live_bytes

Loss = Callable[..., Tensor]

_PROBE_STEPS = 3  # the first may have no optimizer state yet; the third is like all that follow, and has no fingerprint
_TIMED_SEGMENT = 3  # steps; two segments are timed
_REPEATS, _REPEAT_SECONDS = 5, 1.0  # of the loops that are timed: so many, but none begins after so long
_FREE_SHARE = 0.8  # of the free memory, where no budget is given


@dataclasses.dataclass(frozen=True)
class PlannedSetting:
    """What a run takes with one setting.

    Attributes:
        checkpoint_every: As in `innerloop_ctx`; None with `checkpoints`, and for the full unroll.
        checkpoints: As in `innerloop_ctx`, with `steps` given; with `memory_budget` as many as it has room for.
        peak_bytes: The most bytes alive at once, those of the model and of data that exist anyway not counted.
        first_order_runs: As `diffopt.report` will count them after one outer backward.
        second_order_runs: The same.
        seconds: Of the loop and the backward.
        code: The call of `innerloop_ctx`.
        memory_budget: As in `innerloop_ctx`, with `steps` given: a part of the steps is unrolled.
    """

    checkpoint_every: int | None
    checkpoints: int | None
    peak_bytes: int
    first_order_runs: int
    second_order_runs: int
    seconds: float
    code: str
    memory_budget: int | None = None

    @property
    def label(self) -> str:
        """The keyword alone."""
        if self.memory_budget is not None:
            return f"memory_budget='{format_bytes(self.memory_budget).replace(' ', '')}'"
        if self.checkpoint_every is not None:
            return f"checkpoint_every={self.checkpoint_every}"
        return "full unroll" if self.checkpoints is None else f"checkpoints={self.checkpoints}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an inner loop will take under each setting; made by `plan`.

    Attributes:
        steps: Inner steps T.
        carry_bytes: Bytes of one carry (fast weights, optimizer state, buffers), as `diffopt.report` counts it.
        graph_bytes: Peak of differentiating one step, beyond what it starts from.
        batch_bytes: Bytes of `batch`, which every step holds until the backward.
        first_order_seconds: Of a step of the loop.
        replay_seconds: Of a first-order run in the backward.
        second_order_seconds: Of a step that is run with its graph and differentiated.
        unrolled_seconds: Of a step of the full unroll, its share of the backward included.
        budget_bytes: What the run may take; None if nothing is known of the memory.
        settings: One `PlannedSetting` each.
    """

    steps: int
    carry_bytes: int
    graph_bytes: int
    batch_bytes: int
    first_order_seconds: float
    replay_seconds: float
    second_order_seconds: float
    unrolled_seconds: float
    budget_bytes: int | None
    settings: tuple[PlannedSetting, ...]

    @property
    def best(self) -> PlannedSetting | None:
        """The setting that takes the least time of those that fit the budget; None if nothing fits."""
        fitting = [s for s in self.settings if self.budget_bytes is None or s.peak_bytes <= self.budget_bytes]
        return min(fitting, key=lambda setting: setting.seconds, default=None)

    @property
    def recommended(self) -> str | None:
        """`best` as code; None if nothing fits."""
        return None if self.best is None else self.best.code

    def as_dict(self) -> dict[str, Any]:
        """The plan as a plain dictionary, for JSON; `recommended` is part of it."""
        return {**dataclasses.asdict(self), "recommended": self.recommended}

    def plot(self, path: str | Path) -> None:
        """Save a picture: seconds against peak memory, a point for each setting, and the budget.

        Args:
            path: Where to; the ending says the format, for example `plan.png` or `plan.svg`.

        Raises:
            ImportError: matplotlib is not installed; it comes with `lowmem_higher[plot]`.
        """
        from lowmem_higher.pictures import draw_plan

        points = [(setting.label, setting.peak_bytes, setting.seconds) for setting in self.settings]
        draw_plan(Path(path), points, self.budget_bytes, None if self.best is None else self.best.label, self.steps)

    def __repr__(self) -> str:
        width = max(len(setting.label) for setting in self.settings)
        rows = [
            f"{'>' if setting == self.best else ' '} {setting.label:<{width}} {format_bytes(setting.peak_bytes):>11}"
            f" {setting.first_order_runs:>12,} {setting.second_order_runs:>13,} {setting.seconds:>10.3g}"
            for setting in self.settings
        ]
        return "\n".join(
            [
                f"Plan: {self.steps:,} steps; carry {format_bytes(self.carry_bytes)}, one step's graph "
                f"{format_bytes(self.graph_bytes)}, batch {format_bytes(self.batch_bytes)}",
                f"  milliseconds of a step: {1000 * self.first_order_seconds:.3g} first-order, "
                f"{1000 * self.replay_seconds:.3g} replayed, {1000 * self.second_order_seconds:.3g} second-order, "
                f"{1000 * self.unrolled_seconds:.3g} unrolled",
                f"  {'setting':<{width}} {'peak':>11} {'first-order':>12} {'second-order':>13} {'seconds':>10}",
                *rows,
                self._verdict(),
            ]
        )

    def _verdict(self) -> str:
        budget = "no budget known" if self.budget_bytes is None else f"budget {format_bytes(self.budget_bytes)}"
        if self.recommended is not None:
            return f"  {budget}; recommended: {self.recommended}"
        least = min(self.settings, key=lambda setting: setting.peak_bytes)
        return (
            f"  {budget}: nothing fits, the least is {format_bytes(least.peak_bytes)} with {least.label}; "
            "a smaller batch makes the graph of a step smaller"
        )


def plan(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    *,
    steps: int,
    batch: Any,
    loss: Loss,
    outer: Callable[[Any], Tensor] | None = None,
    override: Mapping[str, Sequence[Any]] | None = None,
    memory_budget: float | str | None = None,
) -> Plan:
    """Measure a few real steps and say what a run will take, in bytes, passes and seconds, under each setting.

    The steps are taken on copies of the weights, buffers and optimizer state, by `innerloop_ctx` itself. Model,
    optimizer, gradients and torch's random states stay as they were, also after an exception.

    Args:
        model: The model, as for `innerloop_ctx`.
        opt: Its optimizer, as for `innerloop_ctx`.
        steps: How many inner steps the run will take, T.
        batch: What is new at each step: a tuple or list is passed on as `loss(fmodel, *batch)`, anything else as
            `loss(fmodel, batch)`. Its tensors are counted T times, since steps hold what they are handed until the
            backward. Where your loop cuts batches from data in memory, give the index and cut in `loss`; `()` if
            nothing is new.
        loss: Computes the inner loss as your loop does; a scalar tensor.
        outer: `outer(fmodel)` computes the outer loss; by default it is taken to be as large as the inner one.
        override: As for `innerloop_ctx`.
        memory_budget: Bytes, a text such as "2GiB", or a fraction of what is free now on the device of the model; None
            is 0.8 of it.

    Returns:
        A `Plan`: `print` shows it as a table, `recommended` is the setting to use, as code.

    Raises:
        ValueError: `steps` is below 1, or `memory_budget` cannot be read.
        TypeError: `steps` is no whole number, or a loss is no tensor.

    Memory:
        At most what a full unroll of two steps takes, or three carries and one step's graph.
        Two things are not counted, which your run has besides: gradients of meta-parameters, and random states, 5 KB
        for each step that draws numbers on the CPU.

    Passes:
        At least 16 first-order and 13 second-order runs of a step; where they are fast up to three times as many,
        for steadier medians.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
        >>> opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> x, y = torch.randn(64, 8), torch.randn(64, 1)
        >>> def inner_loss(fnet, x, y):
        ...     return (fnet(x) - y).square().mean()
        >>> found = higher.plan(net, opt, steps=1000, batch=(x, y), loss=inner_loss, memory_budget="5MiB")
        >>> [(row.label, row.first_order_runs) for row in found.settings[:4]]
        [('full unroll', 0), ('checkpoint_every=1', 1000), ('checkpoint_every=10', 1900), ('checkpoint_every=32', 1968)]
        >>> found.settings[0].peak_bytes > 5 * 2**20 > found.best.peak_bytes
        True
    """
    _check_steps(steps)
    budget = _default_budget(model) if memory_budget is None else budget_bytes(memory_budget, model)
    run = _Run(model, opt, loss, batch, outer, override)
    with run.prepared():
        bytes_ = run.measure_bytes()
        seconds = run.measure_seconds()
        sizes = run.measure_sizes()
    leaves: list[Any] = []
    flatten(batch, leaves)
    batch_bytes = sum({id(leaf): leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)}.values())
    settings = [*_settings(steps, batch_bytes, bytes_, seconds)]
    if budget is not None and sizes is not None and budget < settings[0].peak_bytes:
        settings += _within(budget, sizes, steps, batch_bytes, bytes_, seconds)
    return Plan(
        steps=steps,
        carry_bytes=bytes_.carry,
        graph_bytes=bytes_.graph,
        batch_bytes=batch_bytes,
        first_order_seconds=seconds.first_order,
        replay_seconds=seconds.replay,
        second_order_seconds=seconds.second_order,
        unrolled_seconds=seconds.unrolled,
        budget_bytes=budget,
        settings=tuple(settings),
    )


@dataclasses.dataclass(frozen=True)
class _Bytes:
    """Live bytes of probes; NOTE [ Laws of the peak ]."""

    carry: int  # as the report counts it
    base: int  # held at the end of a loop, its first carry included
    kept: int  # by one more carry
    residue: int  # by one more step
    loop: int  # a step of the loop takes beyond what it leaves
    outer: int
    first_graph: int
    graph: int
    unrolled: int  # by one more step of the full unroll
    unrolled_base: int
    unrolled_rest: int

    def checkpointed(self, steps: int, batch: int, in_loop: int, at_first: int, later: int) -> int:
        """The peak with so many carries held in the loop, at the first pullback, and later."""
        most = max(
            (in_loop - 1) * self.kept + max(self.loop, self.outer),
            (at_first - 1) * self.kept + self.first_graph,
            (later - 1) * self.kept + self.graph,
        )
        return self.base + steps * (self.residue + batch) + most

    def full_unroll(self, steps: int, batch: int) -> int:
        """The peak of a full unroll."""
        return self.unrolled_base + steps * (self.unrolled + batch) + self.unrolled_rest


@dataclasses.dataclass(frozen=True)
class _Seconds:
    first_order: float
    replay: float
    second_order: float
    unrolled: float

    def checkpointed(self, steps: int, first_order_runs: int) -> float:
        """Of a run and its backward."""
        return steps * (self.first_order + self.second_order) + (first_order_runs - steps) * self.replay


def carries_in_backward(steps: int, every: int | None = None, checkpoints: int | None = None) -> tuple[int, int]:
    """Carries held when the newest step is differentiated, and the most held at a later one; one way is given.

    Example:
        >>> carries_in_backward(100, every=10), carries_in_backward(101, every=10), carries_in_backward(5, every=10)
        ((19, 18), (11, 19), (5, 4))
        >>> carries_in_backward(100, checkpoints=10), carries_in_backward(12, checkpoints=10)
        ((11, 11), (11, 10))
    """
    if every is not None:
        segments = math.ceil(steps / every)
        newest = steps - (segments - 1) * every
        return segments + newest - 1, segments + max(newest, every if segments > 1 else 0) - 2
    assert checkpoints is not None
    slots = min(checkpoints, steps - 1)
    return slots + 1, slots + 1 if steps > 2 * checkpoints else slots


def _settings(steps: int, batch: int, bytes_: _Bytes, seconds: _Seconds) -> Iterator[PlannedSetting]:
    peak = bytes_.full_unroll(steps, batch)
    yield PlannedSetting(None, None, peak, 0, steps, steps * seconds.unrolled, "innerloop_ctx(model, opt)")
    for every in sorted({1, 10, 100, math.ceil(math.sqrt(steps))}):
        if every == 1 or every < steps:
            segments = math.ceil(steps / every)
            peak = bytes_.checkpointed(steps, batch, segments, *carries_in_backward(steps, every=every))
            runs = 2 * steps - segments
            code = f"innerloop_ctx(model, opt, checkpoint_every={every})"
            yield PlannedSetting(every, None, peak, runs, steps, seconds.checkpointed(steps, runs), code)
    for checkpoints in (3, 10, 30, 100):
        if checkpoints < steps:
            in_backward = carries_in_backward(steps, checkpoints=checkpoints)
            peak = bytes_.checkpointed(steps, batch, checkpoints + 1, *in_backward)
            runs = optimal_runs(steps, checkpoints)
            code = f"innerloop_ctx(model, opt, checkpoints={checkpoints}, steps={steps})"
            yield PlannedSetting(None, checkpoints, peak, runs, steps, seconds.checkpointed(steps, runs), code)


def _within(
    budget: int, sizes: Sizes, steps: int, batch: int, bytes_: _Bytes, seconds: _Seconds
) -> Iterator[PlannedSetting]:
    """What `memory_budget` will do where the sizes of a step are known by its first step; see `budgeted.py`."""
    try:
        found = allot(budget, sizes, steps - 1, held=1)
    except MemoryBudgetError:
        return
    if found.spare < (steps - 1 - found.unrolled) * sizes.batch:
        return  # batches alone would fill it
    unrolled, checkpoints = found.unrolled, found.checkpoints
    before = 1 if unrolled else 0  # steps that are checkpointed apart from the last stretch
    rest = steps - before - unrolled
    peak = bytes_.full_unroll(unrolled, batch) + bytes_.kept
    runs = before
    if rest:
        runs += first_order_runs(Revolve(checkpoints, rest, found.graphs), rest)
        in_backward = carries_in_backward(rest, checkpoints=checkpoints)
        in_loop = min(rest, checkpoints + 1)
        later = bytes_.checkpointed(rest, batch, in_loop, *in_backward) + before * bytes_.kept
        beside = unrolled * (bytes_.unrolled + batch) + (min(found.graphs, rest) - 1) * bytes_.unrolled
        peak = max(peak, later + beside)
    yield PlannedSetting(
        None,
        checkpoints,
        peak,
        runs,
        steps,
        seconds.checkpointed(steps - unrolled, runs) + unrolled * seconds.unrolled,
        f"innerloop_ctx(model, opt, memory_budget={budget}, steps={steps})",
        budget,
    )


class _Run:
    """Takes a few steps of the user's loop."""

    def __init__(
        self,
        model: nn.Module,
        opt: torch.optim.Optimizer,
        loss: Loss,
        batch: Any,
        outer: Callable[[Any], Tensor] | None,
        override: Mapping[str, Sequence[Any]] | None,
    ) -> None:
        self._model, self._opt, self._override = model, opt, override
        self._loss, self._outer = loss, outer
        self._args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        self._devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Random states are put back at the end (rule R12)."""
        with rng_restored(capture_rng(self._devices)), torch.enable_grad():
            yield

    def _context(self, every: int | None, **settings: Any) -> Any:
        return innerloop_ctx(self._model, self._opt, override=self._override, checkpoint_every=every, **settings)

    def _step(self, fmodel: Any, diffopt: Any, args: Sequence[Any] | None = None) -> list[Tensor]:
        """Take one step; the weights that it made, since it may use a part of the model only."""
        before = list(fmodel.parameters())
        diffopt.step(self._loss(fmodel, *(self._args if args is None else args)))
        pairs = zip(fmodel.parameters(), before, strict=True)
        return [new for new, old in pairs if new is not old and new.grad_fn is not None]

    def _outer_loss(self, fmodel: Any) -> Tensor:
        return self._loss(fmodel, *self._args) if self._outer is None else self._outer(fmodel)

    def _cotangents(self, fmodel: Any, weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Those of the newest weights that the outer loss uses, and its gradient with respect to them."""
        grads = torch.autograd.grad(self._outer_loss(fmodel), weights, allow_unused=True)
        pairs = [(weight, grad) for weight, grad in zip(weights, grads, strict=True) if grad is not None]
        pairs = pairs or [(weight, torch.ones_like(weight)) for weight in weights]
        return [weight for weight, _ in pairs], [grad for _, grad in pairs]

    def _back(self, fmodel: Any, weights: list[Tensor], grads: list[Tensor]) -> None:
        """Back to the initial copies, and to nothing else: the user's tensors get no gradient, their graphs stay."""
        first = [weight for weight in fmodel.parameters(time=0) if weight.requires_grad]
        torch.autograd.grad(weights, first, grads, allow_unused=True)

    def measure_bytes(self) -> _Bytes:
        """Three loops: with one carry and no backward, with a carry of every step, and the full unroll of two."""
        with live_bytes() as memory, self._context(_PROBE_STEPS + 1) as (fmodel, diffopt):
            sizes: list[int] = []
            for _ in range(_PROBE_STEPS):
                memory.reset_peak()
                self._step(fmodel, diffopt)
                sizes.append(memory.current)
            residue = sizes[-1] - sizes[-2]
            base, loop = sizes[-1] - _PROBE_STEPS * residue, memory.peak - sizes[-1]
        del fmodel, diffopt
        with live_bytes() as memory, self._context(1) as (fmodel, diffopt):
            sizes.clear()
            nodes: list[Any] = []
            for _ in range(_PROBE_STEPS):
                weights = self._step(fmodel, diffopt)
                nodes.append(weights[0].grad_fn)
                sizes.append(memory.current)
            kept = sizes[-1] - sizes[-2] - residue
            memory.reset_peak()
            weights, grads = self._cotangents(fmodel, weights)
            outer, peaks = memory.peak - sizes[-1], []

            def begin_pullback(_: object) -> None:
                peaks.append(memory.peak)
                memory.reset_peak()

            for node in nodes:
                node.register_prehook(begin_pullback)
            self._back(fmodel, weights, grads)
            peaks.append(memory.peak)
            first_graph = peaks[1] - sizes[-1]
            graph = peaks[2] - (sizes[-1] - kept) if len(peaks) > 2 else first_graph
            carry = diffopt.report.carry_bytes
        del fmodel, diffopt, nodes, node, weights, grads
        with live_bytes() as memory, self._context(None) as (fmodel, diffopt):
            sizes.clear()
            for _ in range(2):
                weights = self._step(fmodel, diffopt)
                sizes.append(memory.current)
            unrolled = sizes[1] - sizes[0]
            self._back(fmodel, *self._cotangents(fmodel, weights))
            rest = memory.peak - sizes[1]
        unrolled_base = sizes[1] - 2 * unrolled
        return _Bytes(carry, base, kept, residue, loop, outer, first_graph, graph, unrolled, unrolled_base, rest)

    def measure_sizes(self) -> Sizes | None:
        """What `memory_budget` measures itself; it remembers them for the run."""
        with self._context(None, memory_budget=1 << 60) as (fmodel, diffopt):
            for _ in range(2):
                leaves: list[Any] = []
                structure = flatten(self._args, leaves)
                with torch._C.DisableTorchFunction():  # the loop does not see how its batches are made
                    new = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                self._step(fmodel, diffopt, unflatten(structure, iter(new)))
            found: Sizes | None = diffopt._run.sizes
        return found

    def measure_seconds(self) -> _Seconds:
        """Medians over warm loops."""
        checkpointed = _repeated(self._time_checkpointed)
        unrolled = _repeated(self._time_unrolled)
        first, replay, second = (statistics.median(column) for column in zip(*checkpointed, strict=True))
        return _Seconds(first, replay, second, statistics.median(column[0] for column in unrolled))

    def _time_checkpointed(self) -> tuple[float, ...]:
        """Seconds of a step, of its replay, and of its pullback.

        A long run is checked now and then, which would weigh too much in a short one: here nothing is checked.
        """
        with self._context(_TIMED_SEGMENT, verify="off") as (fmodel, diffopt):
            times = [self._now()]
            nodes: list[Any] = []
            for _ in range(2 * _TIMED_SEGMENT):
                weights = self._step(fmodel, diffopt)
                nodes.append(weights[0].grad_fn)
                times.append(self._now())
            step = statistics.median(_differences(times))
            weights, grads = self._cotangents(fmodel, weights)
            times.clear()
            for node in nodes:
                node.register_prehook(lambda _: times.append(self._now()))
            self._back(fmodel, weights, grads)
            times.append(self._now())
        pullbacks = _differences(times)[1:]  # the first one sets up
        if len(pullbacks) < 2 * _TIMED_SEGMENT - 1:  # steps of separate weights: a gradient goes through some only
            return step, step, statistics.median(_differences(times))
        with_replays = pullbacks.pop(_TIMED_SEGMENT - 1)
        pullback = statistics.median(pullbacks)
        return step, max(0.0, with_replays - pullback) / (_TIMED_SEGMENT - 1), pullback

    def _time_unrolled(self) -> tuple[float, ...]:
        """Seconds of a step of the full unroll and of its share of the backward."""
        with self._context(None) as (fmodel, diffopt):
            self._step(fmodel, diffopt)
            started = self._now()
            weights = self._step(fmodel, diffopt)
            step = self._now() - started
            weights, grads = self._cotangents(fmodel, weights)
            started = self._now()
            self._back(fmodel, weights, grads)
            return (step + (self._now() - started) / 2,)

    def _now(self) -> float:
        for device in self._devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def _repeated(measure: Callable[[], tuple[float, ...]]) -> list[tuple[float, ...]]:
    found, started = [measure()], time.perf_counter()
    while len(found) < _REPEATS and time.perf_counter() - started < _REPEAT_SECONDS:
        found.append(measure())
    return found


def _check_steps(steps: object) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(
            f"steps={steps!r} is a {type(steps).__name__}; it must be a whole number, that of the inner steps: "
            "plan(model, opt, steps=1000, ...)."
        )
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1: plan(model, opt, steps=1000, ...).")


def _default_budget(model: nn.Module) -> int | None:
    free = free_bytes(model)
    return None if free is None else int(_FREE_SHARE * free)
