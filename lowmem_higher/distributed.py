"""Several processes: averages over ranks that can be differentiated, and that know when ranks are not in step.

NOTE [ Ranks ]

D1  Each of W ranks runs the same loop on data of its own. The objective is the mean of the outer losses, and each rank
    begins its backward from its own one. So the cotangent that a rank holds of its copy of a tensor is W times the
    derivative of the objective by that copy.
D2  `average` in a step gives each rank the mean of all inner gradients. By D1 its adjoint is an average as well: a copy
    that each rank reads passes on the mean of the cotangents. It is one collective in a step and one in its pullback,
    and both can be differentiated again.
D3  The gradient by a tensor of which all ranks have a copy is the sum over the copies: the mean of what they hold (D1),
    by `average_gradients`. A tensor that one rank alone reads has its gradient there, W times that of the objective.
D4  A DTensor is one tensor, not W copies. Its gradient is that of the objective on all ranks, by DTensor's own rules.
D5  Ranks must call the same collectives in the same order, in replays too. So each one is preceded by a handshake of
    fixed size: a number made of what is to be averaged, in which step, as which collective since the start. Where the
    numbers differ all ranks raise, and each message says where every rank was. What one rank calls besides, such as an
    all-reduce of its own for a log, all have to call: a handshake that meets it ends in an abort or in a timeout.
D6  Copies that differ at the start would drift apart without a word. So the handshake of step 0, 1, 3, 7 ... of a loop
    compares the norms of the weights as well.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from lowmem_higher.current_step import current_step
from lowmem_higher.errors import LowmemError, RanksDifferError
from lowmem_higher.structure import is_dtensor

_NORMS = 2  # numbers that stand for the weights in a handshake
_DRIFT = 1e-5  # by which the norms of copies may differ, relative


class Average:
    """The mean over ranks of tensors, for `grad_callback`, and differentiable to any order.

    Use `lowmem_higher.distributed.average`, which is `Average()`, for all processes; make another one for a group.

    With it in each step, W processes that each take a part of the batch train as one process would on the whole batch,
    and their meta-gradients, averaged by `average_gradients`, are the meta-gradient of that process: equal parts, a
    loss that is a mean over the batch, and initial weights that are the same on all ranks. A DTensor is returned as it
    is: its gradient is that of all ranks already.

    Args:
        group: The processes; None for all.

    Raises:
        RanksDifferError: At a call or in a backward: the ranks are not in the same step, hold different weights, or
            have gradients for different parameters.
        RuntimeError: This is one of several processes, but there is no process group yet.

    Memory:
        One more copy of the gradients, joined, while they are averaged; in a step's graph another one.

    Passes:
        No run of a step. One all-reduce of the gradients in each run of a step, and one in each pullback; before each
        of them one of 48 bytes. (`journal=True` leaves out those of first-order replays.)

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net = torch.nn.Linear(2, 1)
        >>> opt = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=2) as (fnet, diffopt):
        ...     for _ in range(4):
        ...         loss = fnet(torch.ones(3, 2)).square().mean()
        ...         _ = diffopt.step(loss, grad_callback=higher.distributed.average)
        ...     fnet(torch.ones(1, 2)).sum().backward()
        >>> higher.distributed.average_gradients(net.parameters())  # in one process it changes nothing
        >>> net.weight.grad.shape
        torch.Size([1, 2])

    References:
        Li et al., PyTorch distributed: experiences on accelerating data parallel training, VLDB 2020.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    @overload
    def __call__(self, tensors: Tensor) -> Tensor: ...

    @overload
    def __call__(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]: ...

    def __call__(self, tensors: Tensor | Sequence[Tensor | None]) -> Tensor | list[Tensor | None]:
        """The means, in the same order; None where there is none.

        Args:
            tensors: A tensor, or a list of them and of None; of the same shapes on all ranks.
        """
        if isinstance(tensors, Tensor):
            return cast(Tensor, self([tensors])[0])
        given = list(tensors)
        if world_size(self.group) == 1:
            return given
        for tensor in given:
            if tensor is not None and is_dtensor(tensor):
                self._check_mesh(tensor)
        plain = [index for index, tensor in enumerate(given) if tensor is not None and not is_dtensor(tensor)]
        shapes = [None if tensor is None else (tuple(tensor.shape), tensor.dtype) for tensor in given]
        step = current_step()
        what = f"an average of {len(plain)} of {len(given)} tensors in {step or 'no step'}"
        if len(plain) < sum(tensor is not None for tensor in given):
            agree(self.group, f"{what}, beside DTensors", str(shapes), next(t for t in given if t is not None).device)
        if plain:
            means = _Mean.apply(self, what, str(shapes), *(given[index] for index in plain))  # type: ignore[no-untyped-call]
            for index, mean in zip(plain, means, strict=True):
                given[index] = mean
        return given

    def _check_mesh(self, tensor: Any) -> None:
        if tensor.device_mesh.size() != world_size(self.group):
            raise ValueError(
                f"A gradient is a DTensor over {tensor.device_mesh.size()} of the {world_size(self.group)} processes, "
                "and an average over all of them would mix shards. Shard the model over all processes: "
                "init_device_mesh(device, (world_size,))."
            )

    def __repr__(self) -> str:
        return f"Average(group={self.group})"


class _Mean(torch.autograd.Function):
    """The mean of copies: its own adjoint (D2)."""

    @staticmethod
    def forward(ctx: Any, average: Average, what: str, shapes: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
            raise TypeError(
                f"An average is of tensors and DTensors, not of {type(tensors[0]).__name__}. Average a plain one: "
                "average(tensor.as_subclass(torch.Tensor))."
            )
        ctx.average, ctx.what, ctx.shapes = average, what, shapes
        agree(average.group, what, shapes, tensors[0].device)
        return tuple(_means(tensors, average.group))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        means = _Mean.apply(ctx.average, f"the backward of {ctx.what}", ctx.shapes, *cotangents)  # type: ignore[no-untyped-call]
        return (None, None, None, *means)


def average_gradients(parameters: nn.Module | Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Let each `.grad` be the mean over ranks: after the outer backward, before the outer optimizer's step.

    With meta-tasks spread over ranks this is all that is needed: each rank runs loops of its own and adds up gradients.

    A parameter without a gradient counts as zero where another rank has one, and stays without where none has. The
    gradient of a DTensor stays as it is, and a DTensor that is the gradient of a plain tensor is put together first.

    Args:
        parameters: The meta-parameters, in the same order on all ranks; or the module that has them.
        group: The processes; None for all.

    Raises:
        RanksDifferError: The ranks differ in what they average, or one of them is still in a loop.
        RuntimeError: This is one of several processes, but there is no process group yet.

    Memory:
        One more copy of the gradients while they are averaged. No pass; one all-reduce of the gradients.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> meta = torch.ones(2, requires_grad=True)
        >>> (3 * meta).sum().backward()
        >>> higher.distributed.average_gradients([meta])  # of all processes, which is one here
        >>> meta.grad
        tensor([3., 3.])
    """
    given = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    with torch.no_grad():
        plain = [parameter for parameter in given if not is_dtensor(parameter)]
        for parameter in plain:
            if parameter.grad is not None and is_dtensor(parameter.grad):
                gradient: Any = parameter.grad
                parameter.grad = None
                parameter.grad = gradient.full_tensor()
        if world_size(group) == 1 or not plain:
            return
        shapes = str([(tuple(parameter.shape), parameter.dtype) for parameter in given])
        device = plain[0].device
        agree(group, f"average_gradients of {len(given)} tensors", shapes, device)
        present = torch.tensor([float(parameter.grad is not None) for parameter in plain], device=device)
        dist.all_reduce(present, dist.ReduceOp.MAX, group=group)
        averaged = list(itertools.compress(plain, present.tolist()))
        for parameter in averaged:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [cast(Tensor, parameter.grad) for parameter in averaged]
        for gradient, mean in zip(gradients, _means(gradients, group), strict=True):
            gradient.copy_(mean)


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """How many processes there are; 1 without torch.distributed.

    Raises:
        RuntimeError: This is one of several processes, but there is no process group yet.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(group)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"This is one of {os.environ['WORLD_SIZE']} processes, and there is no process group to average over. Make "
            'it first: torch.distributed.init_process_group("gloo"), or "nccl" on GPUs.'
        )
    return 1


def agree(group: dist.ProcessGroup | None, what: str, details: str, device: torch.device) -> None:
    """Raise on all ranks unless all are about to do the same (D5), with the same weights (D6)."""
    step = current_step()
    compares = step is not None and not step.replayed and (step.time + 1) & step.time == 0
    norms = _norms(step.weights if step is not None and compares else ())
    high_norms, low_norms = _handshake(group, what, details, device, norms)
    if any(one + other > _DRIFT * abs(one) for one, other in zip(high_norms, low_norms, strict=True)):
        raise RanksDifferError(
            f"The ranks hold different weights in {step}: their norm is {high_norms[0]:.9g} on one and "
            f"{-low_norms[0]:.9g} on another, so the mean of their gradients belongs to neither. Start from the same, "
            "for tensor in model.state_dict().values(): torch.distributed.broadcast(tensor, 0), and pass "
            "grad_callback=lowmem_higher.distributed.average to every step."
        )


def largest(
    group: dist.ProcessGroup | None, what: str, device: torch.device, votes: tuple[float, float]
) -> list[float]:
    """The largest of what the ranks say, which are all about to do the same (D5)."""
    with torch._C.DisableTorchFunction(), torch.no_grad():  # inside a loop nobody is to see it
        return _handshake(group, what, "", device, votes)[0]


def gathered(group: dist.ProcessGroup | None, what: str, device: torch.device, value: Any) -> list[Any]:
    """What the ranks say, in their order, which are all about to do the same (D5)."""
    largest(group, what, device, (0.0, 0.0))
    found: list[Any] = [None] * dist.get_world_size(group)
    with unless_gone(group, what):
        dist.all_gather_object(found, value, group=group)
    return found


@contextmanager
def unless_gone(group: dist.ProcessGroup | None, what: str) -> Iterator[None]:
    """Say where this rank was when a collective in the block failed."""
    try:
        yield
    except LowmemError:
        raise
    except RuntimeError as error:
        raise RanksDifferError(
            f"Another process is gone, or waits for something else, while this one (rank {dist.get_rank(group)}) came "
            f"to collective {_calls[_name(group)]}, {what}. {_ADVICE}"
        ) from error


def _handshake(
    group: dist.ProcessGroup | None, what: str, details: str, device: torch.device, numbers: Sequence[float]
) -> tuple[list[float], list[float]]:
    """The largest of some numbers and of their negatives, if all are about to do the same."""
    _calls[_name(group)] += 1
    called = _calls[_name(group)]
    digest = hashlib.sha256(f"{called} {what} {details}".encode()).digest()
    given = [float(int.from_bytes(digest[:6], "big")), *numbers]
    shaken = torch.tensor([*given, *(-number for number in given)], dtype=torch.float64, device=device)
    with unless_gone(group, what):
        dist.all_reduce(shaken, dist.ReduceOp.MAX, group=group)
        (high, *highs), (low, *lows) = shaken.view(2, -1).tolist()
        if high != -low:
            raise RanksDifferError(_difference(group, f"collective {called}: {what}", details))
    return highs, lows


def _name(group: dist.ProcessGroup | None) -> str:
    return "" if group is None else group.group_name


_calls: Counter[str] = Counter()  # by group
_ADVICE = (
    "All ranks have to take the same number of steps with the same settings, and to run the same backward passes; with "
    "memory_budget each measures for itself, so say how many carries to keep instead: checkpoints=10."
)


def _difference(group: dist.ProcessGroup | None, what: str, details: str) -> str:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (what, details), group=group)
    places = "; ".join(f"rank {rank} at {place}" for rank, (place, _) in enumerate(found))
    if len({place for place, _ in found}) == 1:
        places += "; shapes " + ", ".join(f"of rank {rank}: {shapes}" for rank, (_, shapes) in enumerate(found))
    return (
        f"The ranks are not at the same place: {places}. {_ADVICE} A parameter that one rank's loss does not use can "
        "take part with 0 * parameter.sum()."
    )


def _norms(weights: Sequence[Tensor]) -> list[float]:
    plain = [weight.detach() for weight in weights if not is_dtensor(weight)]
    if not plain:
        return [0.0] * _NORMS
    norms = torch.stack([torch.linalg.vector_norm(weight).to(plain[0].device, torch.float64) for weight in plain])
    order = torch.arange(1, len(norms) + 1, dtype=torch.float64, device=norms.device)
    found = [norms.sum().item(), (norms * order).sum().item()]
    return [0.0 if number != number else number for number in found]  # NaN compares with nothing


def _means(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Tensors of one dtype on one device are joined."""
    found: list[Tensor] = list(tensors)
    alike: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((tensor.dtype, tensor.device), []).append(index)
    for places in alike.values():
        batch = [tensors[place].detach().contiguous() for place in places]
        flat = _flatten_dense_tensors(batch)
        flat = flat / dist.get_world_size(group)
        dist.all_reduce(torch.view_as_real(flat) if flat.is_complex() else flat, group=group)
        for place, mean in zip(places, _unflatten_dense_tensors(flat, batch), strict=True):
            found[place] = mean.clone() if len(places) > 1 else mean
    return found


average = Average()
