"""innerloop_ctx: checks the arguments and wires the parts together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowmem_higher.ledger import Ledger
from lowmem_higher.live_module import LiveModule
from lowmem_higher.optim import DifferentiableOptimizer, get_diff_optim
from lowmem_higher.patch import FunctionalModule, FunctionalView, call_submodules_through, make_functional_copy
from lowmem_higher.recompute import follow_view
from lowmem_higher.record import recorder
from lowmem_higher.report import Report
from lowmem_higher.schedule import Bounded, Periodic, Revolve, Schedule
from lowmem_higher.second_order import second_order, second_order_here
from lowmem_higher.trajectory import Trajectory

_CHOICES = {"replay": ("native", "torch"), "pullback": ("reverse",), "verify": ("new", "all", "off")}


@dataclass(frozen=True)
class Settings:
    """The keywords of `innerloop_ctx` that say how gradients are computed, checked."""

    checkpoint_every: int | None = None
    checkpoints: int | None = None
    steps: int | None = None
    replay: str = "native"
    pullback: str = "reverse"
    verify: str = "new"

    def __post_init__(self) -> None:
        _check_count("checkpoint_every", self.checkpoint_every, "a carry is kept every so many steps")
        _check_count("checkpoints", self.checkpoints, "so many carries are held")
        _check_count("steps", self.steps, "so many inner steps will be taken")
        if self.checkpoint_every is not None and self.checkpoints is not None:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} and checkpoints={self.checkpoints} are two ways to say "
                "which carries are kept: every so many steps, or so many in all. Give one of them."
            )
        if self.steps is not None and self.checkpoints is None:
            raise ValueError(
                f"steps={self.steps} tells for how many steps the carries are to be placed, and needs their number: "
                f"innerloop_ctx(..., checkpoints=10, steps={self.steps})."
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                allowed = " or ".join(repr(choice) for choice in choices)
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; it can be {allowed}.")

    @property
    def schedule(self) -> Schedule | None:
        """Which carries are kept; None for the full unroll."""
        if self.checkpoint_every is not None:
            return Periodic(self.checkpoint_every)
        if self.checkpoints is None:
            return None
        return Bounded(self.checkpoints) if self.steps is None else Revolve(self.checkpoints, self.steps)


def _check_count(name: str, value: object, meaning: str) -> None:
    example = f"Use {name}=10, or None for the full unroll."
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}; it must be a whole number: {meaning}. {example}"
        )
    if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1: {meaning}. {example}")


class Unrolled:
    """Counts the steps of a full unroll, which runs each with its graph, in the loop."""

    program = None

    def __init__(self, tracked: bool) -> None:
        self._ledger = Ledger()
        self._count = self._ledger.count_second_order if tracked else self._ledger.count_first_order
        self._entered = time.perf_counter()

    def count_step(self) -> None:
        """Count one step."""
        self._count()
        self._ledger.steps += 1
        self._ledger.forward_seconds = time.perf_counter() - self._entered

    @property
    def report(self) -> Report:
        """What the run has cost so far."""
        return self._ledger.report()


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
    replay: str = "native",
    pullback: str = "reverse",
    verify: str = "new",
) -> Iterator[tuple[Any, DifferentiableOptimizer]]:
    """Open a differentiable inner loop: `higher`'s own context manager, with memory that need not grow with the steps.

    Inside the context write an ordinary training loop with `fmodel` for the model and `diffopt.step(loss)` for the
    optimizer; then differentiate any loss of the result with respect to anything that requires grad and took part.

    Args:
        model: The model; it is not changed.
        opt: A torch optimizer over (some of) the model's parameters; its state is taken over, it is not changed.
        device: Where fast weights, buffers and optimizer state go; `None` leaves them where they are.
        copy_initial_weights: True (as in `higher`): the initial fast weights are detached copies, and
            `model.parameters()` get no gradient. False: gradients reach `model.parameters()`.
        override: `{hyperparameter: [value]}` or one value per parameter group; tensors get gradients.
        track_higher_grads: False records no graph at all, for evaluation.
        checkpoint_every: `None` is the full unroll: any order of derivative, memory that grows with every step. N keeps
            the weights of every N-th step only, and recomputes the rest during the outer backward: the same gradient.
        checkpoints: Instead of `checkpoint_every`: keep so many carries, however many steps there will be. They are
            spread over the steps while the loop runs, and their slots are used again in the backward.
        steps: With `checkpoints`: the number of inner steps, if it is known; saves up to an eighth of the replays.
        replay: "native" recomputes the weights first, then differentiates one step at a time. "torch" rebuilds a
            segment through `torch.utils.checkpoint`; slower, an independent check.
        pullback: "reverse", reverse over reverse mode.
        verify: What replays are compared with. "new": the loss of every step, the gradients at the 1st, 2nd, 4th,
            8th ... use of each step program, the weights and optimizer state at the end of each segment. "all": the
            gradients of every step as well. "off": nothing.

    Yields:
        `(fmodel, diffopt)`: the functional model and the differentiable optimizer. Both stay usable after the context.

    Raises:
        TypeError, ValueError: An argument cannot be used; the message says what can.

    Memory:
        With c = `checkpoint_every`, T steps, |carry| the bytes of fast weights, optimizer state and buffers, and G
        one step's second-order graph: `(ceil(T/c) + c) |carry| + G`, and the tensors that your loop hands in from
        outside, which are held by reference. Least near `c = sqrt(T)`. The full unroll needs about `T * G`. With
        s = `checkpoints`: `(s + 3) |carry| + G` for any T.

    Passes:
        At most 2 T first-order runs, your loop included, and T second-order runs. The full unroll: T second-order runs.
        With `checkpoints=s` and `steps=T` the fewest first-order runs that s slots allow, for example 3.6 T at T=1000,
        s=10 and 2.5 T at s=30 (`lowmem_higher.schedule.optimal_runs`); without `steps` at most 1.14 times as many.

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
    """
    settings = Settings(checkpoint_every, checkpoints, steps, replay, pullback, verify)
    where = None if device is None else torch.device(device)
    fmodel = make_functional_copy(model, where, copy_initial_weights, track_higher_grads)
    diffopt = get_diff_optim(
        opt,
        model.parameters(),
        fmodel=fmodel,
        device=where,
        override=override,
        track_higher_grads=track_higher_grads,
    )
    view = fmodel._view
    view.around_call = _around_call
    with follow_view(view), second_order() if track_higher_grads else nullcontext():
        if settings.schedule is None or not track_higher_grads:
            diffopt.follow(None, Unrolled(track_higher_grads))
            yield fmodel, diffopt
            return
        trajectory = _checkpointed(model, fmodel, diffopt, settings, settings.schedule)
        trajectory.open()
        try:
            yield fmodel, diffopt
        finally:
            trajectory.close()


@contextmanager
def _around_call(view: FunctionalView) -> Iterator[None]:
    with follow_view(view), second_order_here() if view.track else nullcontext():
        yield


def _checkpointed(
    model: nn.Module,
    fmodel: FunctionalModule,
    diffopt: DifferentiableOptimizer,
    settings: Settings,
    schedule: Schedule,
) -> Trajectory:
    live = LiveModule(model, fmodel, recorder())
    trajectory = Trajectory(diffopt, live, recorder(), schedule, settings.replay, settings.verify)
    call_submodules_through(fmodel, live)
    diffopt.follow(trajectory, trajectory)
    return trajectory
