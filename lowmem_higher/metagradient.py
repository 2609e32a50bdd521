"""metagradient: an inner loop that can be written as a function, and one that survives its process."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowmem_higher.agreement import Alone, Ranks, together_in
from lowmem_higher.fingerprint import fingerprint_of
from lowmem_higher.innerloop import inner_loop
from lowmem_higher.interrupts import Interrupts
from lowmem_higher.loop_function import LoopFunction, Meta, Outer
from lowmem_higher.optim.base import GradCallback
from lowmem_higher.piece_plan import PiecePlan
from lowmem_higher.pieces import Pieces
from lowmem_higher.progress import Work
from lowmem_higher.rank_files import opened_together
from lowmem_higher.report import Report
from lowmem_higher.resumable import Resumable
from lowmem_higher.run_directory import RunFiles, opened
from lowmem_higher.schedule import Periodic, Revolve
from lowmem_higher.settings import Settings
from lowmem_higher.sharded import reshard
from lowmem_higher.step_log import StepLog

CHECKPOINTS = 30  # where nothing else is asked for

_SETTINGS = frozenset(field.name for field in dataclasses.fields(Settings)) - {"steps", "progress"}
_CONTEXT = frozenset(["device", "override"])
_FIXED = {
    "copy_initial_weights": "the initial weights are copied, and their gradients returned by name",
    "track_higher_grads": "gradients are what is asked for",
}


@dataclass(frozen=True, repr=False)
class MetaGradient:
    """What `metagradient` returns.

    Attributes:
        outer: The outer loss, a scalar without a graph.
        weights: Its gradients by the initial weights, by name; None where it does not depend on one. Frozen weights are
            not in it.
        meta: Its gradients by `meta`, in the form of that: a dictionary or a tuple; None where it does not depend.
        final_weights: The fast weights after the last step, by name.
        final_buffers: The buffers after the last step (and the outer loss), by name:
            `model.load_state_dict(found.final_weights | found.final_buffers, strict=False)`.
        report: What it cost.
    """

    outer: Tensor
    weights: dict[str, Tensor | None]
    meta: dict[str, Tensor | None] | tuple[Tensor | None, ...]
    final_weights: dict[str, Tensor]
    final_buffers: dict[str, Tensor]
    report: Report

    def __repr__(self) -> str:
        of_meta = self.meta.items() if isinstance(self.meta, dict) else enumerate(self.meta)
        shown = [f"  meta[{name!r}]: {_described(grad)}" for name, grad in of_meta]
        shown += [f"  weights[{name!r}]: {_described(grad)}" for name, grad in self.weights.items()]
        return "\n".join([f"MetaGradient: outer loss {self.outer.item():.6g}, gradients", *shown, repr(self.report)])


def _described(grad: Tensor | None) -> str:
    return "none" if grad is None else f"shape {tuple(grad.shape)}, norm {torch.linalg.vector_norm(grad).item():.3g}"


def metagradient(
    loss_fn: Callable[..., Tensor],
    model: nn.Module,
    opt: torch.optim.Optimizer,
    batches: Any,
    *,
    steps: int,
    outer: Outer | Mapping[int, Outer],
    meta: Meta = (),
    run_dir: str | os.PathLike[str] | None = None,
    grad_callback: GradCallback | None = None,
    group: dist.ProcessGroup | None = None,
    progress: bool | str = True,
    **settings: Any,
) -> MetaGradient:
    """Differentiate an outer loss through an inner loop that is a function; with `run_dir` in a way that survives.

    It takes the steps that this loop takes, with the same engine, and returns the same gradients to the bit::

        with innerloop_ctx(model, opt, checkpoints=30, steps=steps) as (fmodel, diffopt):
            for t in range(steps):
                diffopt.step(loss_fn(fmodel, batches[t], *meta))
            gradients = torch.autograd.grad(outer(fmodel), [*fmodel.parameters(time=0), *meta])

    Args:
        loss_fn: `loss_fn(fmodel, batch, *meta)`, or `loss_fn(fmodel, batch, **meta)` if `meta` is a dictionary: the
            inner loss, a scalar. It is called again at each replay, so what it reads besides must stay as it is.
        model: The model; it is not changed.
        opt: A torch optimizer over (some of) its parameters; its state is taken over, it is not changed.
        batches: A sequence of at least `steps` batches, or a function of the step number. Each is read at its step and
            again at each replay; a checksum tells whether it is the same. What it draws from torch's default generators
            is drawn again.
        steps: The number of inner steps.
        outer: `outer(fmodel)`, the outer loss after the last step, a scalar; or `{steps: function}`: the sum of such
            terms, each taken after so many steps. With `run_dir` a term is computed again at each run of its step, and
            past weights (`time=`) cannot be asked for, nor under `compile` those between two terms.
        meta: The tensors that gradients are wanted of besides the initial weights, a sequence or a dictionary; leaves
            that require grad. All go to `loss_fn`, also hyperparameters in `override`.
        run_dir: A directory for the files of this run, made if it is not there. If the process is killed, the same call
            goes on from there and returns the same gradients, to the bit on the same machine. Nothing is left in it
            after success: the result is what is returned. One run at a time; another model, optimizer, `meta`, number
            of steps or setting is refused as long as there are files of this one. Several processes that run one loop
            together (`grad_callback`, sharded weights) share one directory, which all of them see.
        grad_callback: That of every step, as in `diffopt.step`: data-parallel, `lowmem_higher.distributed.average`. It
            is called again at replays. What is returned is this process's part, as without `metagradient`: gradients of
            plain tensors are still to be averaged, `average(list(found.weights.values()))`.
        group: The processes that share `run_dir`; None for all that there are. For a loop of each process alone:
            `group=torch.distributed.new_subgroups(1)[0]`, and a directory for each.
        progress: True shows a bar on stderr, if that is a terminal, with the time to go; "always" also if it is a file.
            A trial of up to a hundredth of the steps comes first, so that the time is right from the start.
        settings: The keywords of `innerloop_ctx`: `checkpoints` (30, if nothing is said), `checkpoint_every`,
            `override`, `device`, `pullback`, `truncate`, `first_order`, `verify`, `compile` and so on.
            `verify="off"` compares no checksums either. With `run_dir` no `memory_budget` and no full unroll.
            With `compile="trace"` or `True` the steps from one term of `outer` to the next are one `diffopt.scan`, the
            loop's included, and the gradients agree to rounding. `loss_fn` then reads tensors through its arguments
            and the functional model alone; give an index in a batch as a tensor, and each batch tensors of its own. Not
            with `run_dir`: where a process begins to use compiled code would show in the bits.

    Returns:
        A `MetaGradient`: the outer loss, its gradients by name for the initial weights and for `meta`, the final
        weights, a report.

    Raises:
        TypeError, ValueError: An argument cannot be used; the message says what can.
        ReplayMismatchError: A batch, or the loss of a step, is not what it was when the loop took that step.
        RunDirectoryError: Another process works in `run_dir`, its run is another one or of another number of processes,
            or its manifest is damaged. What one of several processes finds is raised on all of them.
        StoreError: A file cannot be written, or the disk has too little room for what will be; what was saved stays.
        RanksDifferError: Another process is gone, or is at another place of the loop.
        RecordError: A forward reads what an earlier step left on the model and is no buffer (with `run_dir`).
        KeyboardInterrupt, SystemExit: With `run_dir`, Ctrl-C or SIGTERM came: the step, or the piece of the backward,
            was finished and saved, and the command to go on was printed. A second signal ends at once. A signal to
            one of several processes ends all.

    Warns:
        CompileFallbackWarning: Under `compile` the steps cannot be traced; they are taken one by one.
        DamagedFileWarning: A file in `run_dir` is not what was written: the run goes on from an earlier one.

    Memory:
        That of `innerloop_ctx`, and no batch but the current one. A step leaves 5 KB of Python objects until its
        backward, so 500 MB at 100,000 steps; with `run_dir` those of 512 steps at most. The files take up to
        `(checkpoints + 1) |carry|`, three times the gradients, the final weights and 12 bytes a step. Of several
        processes each writes its shards; what is equal on all is written once, gradients and the log by each.

    Passes:
        Those of `innerloop_ctx` with known `steps`, the optimum of the slots. With `run_dir` one first-order run more
        for each piece that is differentiated at once: 512 steps, or about half a minute. What a kill interrupts is run
        again: up to one such piece, or a minute of the loop. Several processes agree in each step of the loop, by 48
        bytes, whether to save and whether a signal came.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> x, y = torch.randn(20, 8, 3), torch.randn(20, 8, 1)
        >>> net, weights = torch.nn.Linear(3, 1), torch.ones(8, 1, requires_grad=True)
        >>> def loss(fnet, batch, weights):
        ...     return (weights * (fnet(batch[0]) - batch[1]).square()).mean()
        >>> found = higher.metagradient(
        ...     loss,
        ...     net,
        ...     torch.optim.SGD(net.parameters(), lr=0.1),
        ...     list(zip(x, y)),
        ...     steps=20,
        ...     outer=lambda fnet: (fnet(x[0]) - y[0]).square().mean(),
        ...     meta={"weights": weights},
        ... )
        >>> found.meta["weights"].shape, found.weights["bias"].shape
        (torch.Size([8, 1]), torch.Size([1]))

    References:
        Griewank and Walther, Algorithm 799: revolve, ACM Trans. Math. Softw. 26(1), 2000.
    """
    function, chosen, context = _checked(loss_fn, batches, steps, outer, meta, grad_callback, progress, settings)
    if run_dir is None:
        return _in_memory(function, model, opt, chosen, context, steps)
    plan = _planned(chosen, steps, function)
    ranks = together_in(group)
    reshard(model)
    with _files_in(Path(run_dir), ranks, [*model.parameters(), *function.tensors]) as files:
        fingerprint = fingerprint_of(model, opt, steps, chosen, context, function, ranks)
        work = Work(progress if ranks.rank == 0 else False)
        pieces = Pieces(function, model, opt, chosen, context, steps, work.ran)
        with Interrupts() as interrupts:
            run = Resumable(pieces, plan, function.log, files, fingerprint, interrupts, work, ranks)
            final, adjoint, report = run.run()
        files.remove_run()
    reached = {
        name: adjoint.weights.get(index) if plan.end == 0 or index not in pieces.made else None
        for index, (name, param) in enumerate(model.named_parameters())
        if param.requires_grad
    }
    of_meta = function.in_the_form_of_meta([adjoint.meta.get(index) for index in range(len(function.tensors))])
    return MetaGradient(final.outer, reached, of_meta, final.weights, final.buffers, report)


def _files_in(path: Path, ranks: Alone, tensors: Sequence[Tensor]) -> AbstractContextManager[RunFiles]:
    return opened_together(path, ranks, tensors) if isinstance(ranks, Ranks) else opened(path)


def _in_memory(
    function: LoopFunction,
    model: nn.Module,
    opt: torch.optim.Optimizer,
    settings: Settings,
    context: Mapping[str, Any],
    steps: int,
) -> MetaGradient:
    with inner_loop(model, opt, settings, **context) as (fmodel, diffopt):
        initial = dict(fmodel.named_parameters())
        total: Tensor | None = None
        at = 0
        for stop in sorted({*function.terms, steps}):
            if not (settings.compile and function.scan(diffopt, at, stop)):
                for step in range(at, stop):
                    function.take(diffopt, step)
            at = stop
            term = function.term(fmodel, at)
            if term is not None:
                term = term if at == steps else diffopt.outer(term)
                total = term if total is None else total + term
        assert total is not None
        trained = {name: weight for name, weight in initial.items() if weight.requires_grad}
        found = torch.autograd.grad(total, [*trained.values(), *function.tensors], allow_unused=True)
    return MetaGradient(
        total.detach(),
        dict(zip(trained, found, strict=False)),
        function.in_the_form_of_meta(found[len(trained) :]),
        {name: weight.detach() for name, weight in fmodel.named_parameters()},
        {name: buffer.detach() for name, buffer in fmodel.named_buffers()},
        diffopt.report,
    )


def _checked(
    loss_fn: object,
    batches: object,
    steps: object,
    outer: Any,
    meta: Any,
    grad_callback: GradCallback | None,
    progress: bool | str,
    keywords: dict[str, Any],
) -> tuple[LoopFunction, Settings, dict[str, Any]]:
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn is a {type(loss_fn).__name__}; it must be a function of the functional model, a batch and meta: "
            "def loss_fn(fmodel, batch, *meta): return criterion(fmodel(batch.x), batch.y)."
        )
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps={steps!r} is a {type(steps).__name__}; it must be a whole number of inner steps.")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1: so many inner steps are taken.")
    _check_batches(batches, steps)
    terms = _terms(outer, steps)
    _check_meta(meta)
    unknown = keywords.keys() - _SETTINGS - _CONTEXT
    for name in sorted(unknown):
        if name in _FIXED:
            raise TypeError(
                f"metagradient takes no {name}: {_FIXED[name]}. Leave it out, or write the loop: "
                f"innerloop_ctx(model, opt, {name}=...)."
            )
        allowed = ", ".join(sorted(_SETTINGS | _CONTEXT))
        raise TypeError(f"metagradient takes no {name!r}. Of the keywords of innerloop_ctx(...) it takes {allowed}.")
    chosen = {name: value for name, value in keywords.items() if name in _SETTINGS}
    if not chosen.keys() & {"checkpoint_every", "checkpoints", "memory_budget"}:
        chosen["checkpoints"] = CHECKPOINTS
    bounded = chosen.get("checkpoints") is not None or chosen.get("memory_budget") is not None
    settings = Settings(**chosen, steps=steps if bounded else None, progress=progress)
    function = LoopFunction(loss_fn, batches, terms, meta, StepLog(steps), settings.verify != "off", grad_callback)
    return function, settings, {name: keywords.get(name) for name in sorted(_CONTEXT)}


def _check_batches(batches: Any, steps: int) -> None:
    indexed = hasattr(batches, "__getitem__") and hasattr(batches, "__len__") and not isinstance(batches, Mapping)
    if not indexed and not callable(batches):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which cannot be read again at a step's replay. Give a sequence, "
            "list(loader), or a function of the step number, lambda t: (x[index[t]], y[index[t]])."
        )
    if indexed and len(batches) < steps:
        raise ValueError(
            f"There are {len(batches)} batches for steps={steps}. To go through them again and again give a function "
            "of the step number: lambda t: batches[t % len(batches)]."
        )


def _terms(outer: Any, steps: int) -> dict[int, Outer]:
    if callable(outer):
        return {steps: outer}
    if not isinstance(outer, Mapping) or not outer or not all(map(callable, outer.values())):
        raise TypeError(
            "outer must be a function of the functional model, or a dictionary that says after how many steps which "
            "function is added: outer={50: validate, 100: validate}."
        )
    wrong = [at for at in outer if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at <= steps]
    if wrong:
        raise ValueError(
            f"outer has a term after {wrong[0]!r} steps; it can be after 0 to {steps} of them: "
            f"outer={{{steps}: validate}}."
        )
    return {at: outer[at] for at in sorted(outer)}


def _check_meta(meta: Any) -> None:
    if isinstance(meta, Tensor) or not isinstance(meta, (Mapping, Sequence)):
        raise TypeError(
            f"meta is a {type(meta).__name__}; it must be a sequence of tensors, meta=(w,), or a dictionary of "
            'tensors, meta={"w": w}.'
        )
    named = meta if isinstance(meta, Mapping) else dict(enumerate(meta))
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"meta[{name!r}] is a {type(tensor).__name__}; it must be a tensor. What needs no gradient is for the "
                "function itself: functools.partial(loss_fn, option=...)."
            )
        if not tensor.requires_grad:
            raise ValueError(
                f"meta[{name!r}] does not require grad, and meta is what gradients are returned for: "
                "w.requires_grad_(), or leave it out of meta."
            )
        if not tensor.is_leaf:
            raise ValueError(
                f"meta[{name!r}] was computed from other tensors. Hand in a leaf, and go on from its gradient: "
                "leaf = w.detach().requires_grad_(), then w.backward(found.meta[0])."
            )
    tensors = list(named.values())
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        raise ValueError("meta holds one tensor twice; give each once: meta=tuple(set(meta)).")


def _planned(settings: Settings, steps: int, function: LoopFunction) -> PiecePlan:
    schedule = settings.schedule
    if not isinstance(schedule, (Periodic, Revolve)):
        what = "The full unroll" if schedule is None else f"memory_budget={settings.memory_budget!r}"
        raise ValueError(
            f"{what} keeps whole graphs, which no file can hold. With run_dir say how many carries to keep: "
            "checkpoints=30, or checkpoint_every=100."
        )
    if settings.compile:
        raise ValueError(
            f"compile={settings.compile!r} and run_dir were both given. Traced and compiled steps round in a way of "
            "their own, from some use on in each process, so a run that goes on would not return the bits of one that "
            "was never ended. Leave one of them out: metagradient(..., run_dir=...)."
        )
    end = 0 if settings.truncate is None else max(0, steps - settings.truncate)
    if end > 0 and min(function.terms) <= end:
        raise ValueError(
            f"outer has a term after {min(function.terms)} steps, and with truncate={settings.truncate} and run_dir "
            f"the backward does not get there: it pulls back the steps from {end} on. Take terms after later steps, or "
            "leave truncate or run_dir out."
        )
    return PiecePlan(schedule, steps, end)
