"""What the processes of the distributed tests run: cases by name, whose results the tests look at.

Every loop is that of one process as well: with one rank the whole batch, no average, a plain model.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lowmem_higher as higher
from lowmem_higher import traced
from lowmem_higher.distributed import average, average_gradients
from lowmem_higher.examples import data_parallel as data_parallel_loop
from lowmem_higher.examples import sharded, tasks_over_ranks

STEPS, EXAMPLES = 7, 16
HANDSHAKE = 6  # numbers
LONGEST_WAIT = 120  # seconds: a rank that waits for longer fails its test
Case = Callable[[int, int], Any]
Results = list[dict[str, Any]]


def spawn(cases: Sequence[Case], world: int, folder: Path) -> Results:
    """The results of the cases, by rank; what a case raised is its result."""
    torch.multiprocessing.spawn(_run, (cases, world, folder), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _run(rank: int, cases: Sequence[Case], world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("error")
    traced.TRACE_AFTER = 2  # uses of a program
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=LONGEST_WAIT),
    )
    results: dict[str, Any] = {}
    for case in cases:
        try:
            results[case.__name__] = case(rank, world)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            results[case.__name__] = f"{type(error).__name__}: {error}"
        torch.save(results, folder / f"{rank}.pt")
        if case is one_is_gone:
            os._exit(0)
        dist.barrier()
    dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.inner(x))
        return found


class Run:
    """A loop with everything that can have a gradient: initial weights, a learning rate, weights of examples.

    Args:
        prepare: Shards the model, in place.
        part: The examples of this process.
        optimizer: Makes the inner optimizer.
        callback: The `grad_callback` of every step.
        steps: How many.
        settings: Of `innerloop_ctx`.
    """

    def __init__(
        self,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        *,
        part: slice = slice(None),
        callback: Any = None,
        prepare: Callable[[nn.Module], object] = lambda net: None,
        steps: int = STEPS,
        **settings: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(steps, EXAMPLES, 3, generator=generator)
        y = torch.randn(steps, EXAMPLES, 2, generator=generator)
        self.net = Net()
        prepare(self.net)
        self.rate = torch.tensor(0.05, requires_grad=True)
        self.of_examples = torch.zeros(steps, EXAMPLES, requires_grad=True)
        opt = optimizer(self.net.parameters())
        context = higher.innerloop_ctx(
            self.net, opt, copy_initial_weights=False, override={"lr": [self.rate]}, **settings
        )
        with context as (fnet, diffopt):
            self.outer = torch.zeros(())
            for step in range(steps):
                errors = (fnet(x[step][part]) - y[step][part]).square().mean(1)
                loss = (torch.sigmoid(self.of_examples[step][part]) * errors).mean()
                diffopt.step(loss, grad_callback=callback)
                if step == 2:
                    self.outer = diffopt.outer((fnet(x[0][part]) - y[1][part]).square().mean())
            self.outer = self.outer + (fnet(x[1][part]) - y[0][part]).square().mean()
        self.fnet, self.diffopt = fnet, diffopt

    @property
    def meta(self) -> list[Tensor]:
        return [*self.net.parameters(), self.rate, self.of_examples]

    def gradients(self, backwards: int = 1) -> list[Tensor]:
        for again in reversed(range(backwards)):
            self.outer.backward(retain_graph=again > 0)
        average_gradients(self.meta) if dist.get_world_size() > 1 and self.parallel else None
        return [whole(tensor.grad) for tensor in self.meta]

    parallel = True


class Alone(Run):
    """The same in one process."""

    parallel = False


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference."""
    assert all(one.norm() > 1e-6 for one in expected)
    return max(float((one - two).norm() / two.norm()) for one, two in zip(found, expected, strict=True))


def part_of(rank: int, world: int) -> slice:
    count = EXAMPLES // world
    return slice(rank * count, (rank + 1) * count)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05, centered=True, momentum=0.5),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05),
}
PERIODIC: dict[str, Any] = {"checkpoint_every": 3}
SOME = ("unroll", "every third")
SETTINGS: dict[str, dict[str, Any]] = {
    "unroll": {},
    "every step": {"checkpoint_every": 1},
    "every third": PERIODIC,
    "slots": {"checkpoints": 2},
    "slots, known": {"checkpoints": 2, "steps": STEPS},
    "graphs": {"checkpoint_every": 4, "graphs": 2},
    "all verified": {**PERIODIC, "verify": "all"},
    "torch's": {**PERIODIC, "replay": "torch"},
    "journal": {**PERIODIC, "journal": True},
    "mixed": {**PERIODIC, "pullback": "mixed"},
    "traced": {**PERIODIC, "compile": "trace"},
    "ample budget": {"memory_budget": "4MiB"},
    "budget": {"memory_budget": "24KiB", "steps": STEPS},
}


def battery(
    settings: dict[str, dict[str, Any]], one: Callable[..., Run], optimizers: Sequence[str]
) -> dict[str, float]:
    """The errors of optimizers with some settings, and of all settings with the first of them."""
    found = {}
    for name in optimizers:
        expected = Alone(OPTIMIZERS[name], **PERIODIC).gradients()
        for setting, keywords in settings.items():
            if name == optimizers[0] or setting in SOME:
                found[f"{name}, {setting}"] = error(one(OPTIMIZERS[name], **keywords).gradients(), expected)
    return found


# Data parallel


def data_parallel(rank: int, world: int) -> dict[str, float]:

    def one(*args: Any, **keywords: Any) -> Run:
        return Run(*args, part=part_of(rank, world), callback=average, **keywords)

    return battery(SETTINGS, one, [*OPTIMIZERS])


def twice_and_past_weights(rank: int, world: int) -> dict[str, float]:
    adam = OPTIMIZERS["adam"]
    alone, run = Alone(adam, **PERIODIC), Run(adam, part=part_of(rank, world), callback=average, **PERIODIC)
    past, expected = ([*one.fnet.parameters(time=4)] for one in (run, alone))
    at_four = torch.autograd.grad(run.outer, past, retain_graph=True)
    means = [mean for mean in average(at_four) if mean is not None]
    return {
        "by the weights of time 4": error(means, torch.autograd.grad(alone.outer, expected, retain_graph=True)),
        "two backward passes": error(run.gradients(backwards=2), alone.gradients(backwards=2)),
    }


def composed_with_clipping(rank: int, world: int) -> dict[str, float]:
    clip, sgd = higher.clip_grad_norm(0.3), OPTIMIZERS["sgd"]

    def both(grads: Any) -> Any:
        return clip(average(grads))

    alone = Alone(sgd, callback=clip, **PERIODIC).gradients()
    return {"clipped": error(Run(sgd, part=part_of(rank, world), callback=both, **PERIODIC).gradients(), alone)}


def higher_order(rank: int, world: int) -> dict[str, float]:
    def twice(run: Run) -> list[Tensor]:
        first = torch.autograd.grad(run.outer, run.meta[:-1], create_graph=True)
        if run.parallel:
            first = tuple(average(first))
        return list(torch.autograd.grad(sum(one.square().sum() for one in first), run.meta[:-1]))

    sgd = OPTIMIZERS["sgd"]
    run = Run(sgd, part=part_of(rank, world), callback=average)
    found = [one for one in average(twice(run)) if one is not None]
    return {"second derivative of the unroll": error(found, twice(Alone(sgd)))}


def collectives_in_the_loss(rank: int, world: int) -> dict[str, float]:
    import torch.distributed._functional_collectives as functional

    generator = torch.Generator().manual_seed(5)
    x = torch.randn(EXAMPLES, 3, generator=generator)

    def gradients(loss: Callable[[Any], Tensor], mine: Tensor, callback: Any, **settings: Any) -> list[Tensor]:
        net = Net()
        opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
        with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
            for _ in range(8):
                diffopt.step(loss(fnet), grad_callback=callback)
            fnet(mine).square().mean().backward()
        average_gradients(net) if callback is not None else None
        return [whole(parameter.grad) for parameter in net.parameters()]

    def coupled(mean: Tensor, out: Tensor) -> Tensor:
        return (mean - 1).square() * out.square().mean()

    expected = gradients(lambda fnet: coupled(fnet(x).mean(), fnet(x)), x, None)
    mine = x[part_of(rank, world)]

    def ours(fnet: Any) -> Tensor:
        out = fnet(mine)
        return coupled(average(out.mean()), out)

    def of_torch(fnet: Any) -> Tensor:
        out = fnet(mine)
        return coupled(functional.all_reduce(out.mean(), "sum", dist.group.WORLD) / world, out)

    return {
        f"{name}, {settings}": error(gradients(loss, mine, average, **settings), expected)
        for name, loss in (("ours", ours), ("torch's", of_torch))
        for settings in ({}, PERIODIC, {**PERIODIC, "compile": "trace"})
    }


def tasks(rank: int, world: int) -> dict[str, float]:
    """Loops of their own on each rank; the last parameter takes part in the tasks of the last rank alone."""
    count = 4

    def gradients(mine: Sequence[int], share: int) -> list[Tensor]:
        net, offset = Net(), torch.ones(2, requires_grad=True)
        unused = torch.ones(2, requires_grad=True)
        for task in mine:
            x = torch.randn(6, 3, generator=torch.Generator().manual_seed(task))
            opt = torch.optim.SGD(net.parameters(), lr=0.1)
            with higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=2) as (fnet, diffopt):
                for _ in range(3 + task):
                    diffopt.step((fnet(x) - x[:, :2]).square().mean())
                out = fnet(x) * offset if task == count - 1 else fnet(x)
                ((out - 1).square().mean() / share).backward()
        if share < count:
            average_gradients([*net.parameters(), offset, unused])
        assert unused.grad is None
        return [whole(parameter.grad) for parameter in (*net.parameters(), offset)]

    return {"tasks": error(gradients(range(rank, count, world), count // world), gradients(range(count), count))}


def traffic(rank: int, world: int) -> tuple[int, int, int]:
    """Elements averaged in a loop and its backward, and its runs."""
    averaged = 0
    original = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **keywords: Any) -> Any:
        nonlocal averaged
        averaged += 0 if tensor.numel() == HANDSHAKE else tensor.numel()
        return original(tensor, *args, **keywords)

    dist.all_reduce = counting
    try:
        run = Run(OPTIMIZERS["sgd"], part=part_of(rank, world), callback=average, **PERIODIC)
        run.outer.backward()
    finally:
        dist.all_reduce = original
    report = run.diffopt.report
    return averaged, report.first_order_runs, report.second_order_runs


def example_programs(rank: int, world: int) -> list[float]:
    """What the examples return, in short runs; in one process too."""
    return [
        *tasks_over_ranks.main(["--updates", "2", "--tasks", "4"]),
        *data_parallel_loop.main(["--updates", "2", "--steps", "12"]),
        sharded.main(["--updates", "2", "--steps", "6"])[0],
    ]


# Shards

NOT_WITH_DTENSORS = ("mixed", "ample budget", "budget")


def mesh_of(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world,))


def _stores(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    directory = tempfile.mkdtemp()
    kept = {name: value for name, value in settings.items() if name not in NOT_WITH_DTENSORS}
    return {**kept, "host": {**PERIODIC, "store": "host"}, "disk": {**PERIODIC, "store": directory}}


def fsdp(rank: int, world: int) -> dict[str, float]:
    def prepare(net: Any) -> None:
        fully_shard(net.inner, mesh=mesh_of(world))
        fully_shard(net, mesh=mesh_of(world))

    def one(*args: Any, **keywords: Any) -> Run:
        return Run(*args, part=part_of(rank, world), prepare=prepare, callback=average, **keywords)

    found = battery(_stores(SETTINGS), one, ["adam", "sgd"])
    for key, settings in (("carry", {}), ("stored", {"store": "host"})):
        run = one(OPTIMIZERS["adam"], **PERIODIC, **settings)
        alone = Alone(OPTIMIZERS["adam"], **PERIODIC, **settings)
        ours, theirs = run.diffopt.report, alone.diffopt.report
        found[f"bytes of {key}"] = (
            ours.stored_bytes / theirs.stored_bytes if settings else ours.carries_peak_bytes / theirs.carries_peak_bytes
        )
        found["bytes of one"] = ours.carry_bytes
    return found


def tensor_parallel(rank: int, world: int) -> dict[str, float]:
    def prepare(net: nn.Module) -> None:
        parallelize_module(net, mesh_of(world), {"inner.0": ColwiseParallel(), "last": RowwiseParallel()})

    def one(*args: Any, **keywords: Any) -> Run:
        return Run(*args, prepare=prepare, callback=average, **keywords)

    return battery(_stores(SETTINGS), one, ["adamw", "rmsprop"])


def fsdp_after_a_forward(rank: int, world: int) -> dict[str, Any]:
    """The model itself runs before and after, a frozen part stays whole, and the loop's result is written back."""
    net = Net()
    net.inner.requires_grad_(False)
    plain = Net()
    plain.inner.requires_grad_(False)
    x = torch.randn(EXAMPLES, 3, generator=torch.Generator().manual_seed(7))
    mine = x[part_of(rank, world)]
    fully_shard(net, mesh=mesh_of(world), ignored_params=set(net.inner.parameters()))
    results = []
    for model, data in ((net, mine), (plain, x)):
        opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(data).square().mean().backward()
        opt.step()
        opt.zero_grad()
        with higher.innerloop_ctx(model, opt, checkpoint_every=2) as (fnet, diffopt):
            for _ in range(3):
                diffopt.step(fnet(data).square().mean())
            diffopt.commit(model, opt)
        assert type(fnet).__mro__[2] is Net
        model(data).square().mean().backward()
        opt.step()
        results.append([whole(p.detach()) for p in model.state_dict().values()])
    return {"trained on": error(*results)}


def fsdp_in_half_precision(rank: int, world: int) -> str:
    net = Net()
    fully_shard(net, mesh=mesh_of(world), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return raised(lambda: higher.monkeypatch(net))


def fsdp_of_tensor_parallel(rank: int, world: int) -> str:
    net, mesh = Net(), init_device_mesh("cpu", (world, 1), mesh_dim_names=("data", "model"))
    parallelize_module(net, mesh["model"], {"inner.0": ColwiseParallel(), "last": RowwiseParallel()})
    fully_shard(net, mesh=mesh["data"])
    return raised(lambda: higher.monkeypatch(net))


def sharded_with_a_budget(rank: int, world: int) -> str:
    net = Net()
    fully_shard(net, mesh=mesh_of(world))

    def loop() -> None:
        with higher.innerloop_ctx(net, OPTIMIZERS["sgd"](net.parameters()), memory_budget="1MiB"):
            pass

    return raised(loop)


# What ranks do that differs


def raised(run: Callable[[], object]) -> str:
    try:
        run()
    except (RuntimeError, ValueError, TypeError) as found:
        return f"{type(found).__name__}: {found}"
    return "nothing"


def steps_differ(rank: int, world: int) -> str:
    return raised(lambda: Run(OPTIMIZERS["sgd"], callback=average, steps=5 + rank, **PERIODIC).gradients())


def settings_differ(rank: int, world: int) -> str:
    return raised(lambda: Run(OPTIMIZERS["sgd"], callback=average, checkpoint_every=2 + rank).gradients())


def budgets_differ(rank: int, world: int) -> str:
    budget = ["24KiB", "4MiB"][min(rank, 1)]
    return raised(lambda: Run(OPTIMIZERS["sgd"], callback=average, memory_budget=budget, steps=STEPS).gradients())


def backwards_differ(rank: int, world: int) -> str:
    run = Run(OPTIMIZERS["sgd"], callback=average, **PERIODIC)
    return raised(lambda: average_gradients(run.meta) if rank else run.gradients())


def weights_differ(rank: int, world: int) -> str:
    def prepare(net: Any) -> None:
        with torch.no_grad():
            net.last.weight.mul_(1 + rank)

    return raised(lambda: Run(OPTIMIZERS["sgd"], callback=average, prepare=prepare))


def rates_differ(rank: int, world: int) -> str:
    def local(grads: Any) -> Any:
        return [None if grad is None else grad * (1 + rank) for grad in average(grads)]

    return raised(lambda: Run(OPTIMIZERS["sgd"], callback=local))


def gradients_differ(rank: int, world: int) -> str:
    def loop() -> None:
        net = Net()
        with higher.innerloop_ctx(net, OPTIMIZERS["sgd"](net.parameters()), **PERIODIC) as (fnet, diffopt):
            out = fnet(torch.ones(2, 3)) if rank else fnet.inner(torch.ones(2, 3))
            diffopt.step(out.square().mean(), grad_callback=average)

    return raised(loop)


def in_place_in_the_loss(rank: int, world: int) -> str:
    def loop() -> None:
        net = Net()
        with higher.innerloop_ctx(net, OPTIMIZERS["sgd"](net.parameters()), **PERIODIC) as (fnet, diffopt):
            loss = fnet(torch.ones(2, 3)).square().mean()
            dist.all_reduce(loss.detach().clone())  # to look at it
            dist.all_reduce(loss)
            diffopt.step(loss)

    return raised(loop)


class Synchronized(torch.autograd.Function):
    """Like SyncBatchNorm's: the backward has a collective that autograd does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad = 2 * x * cotangent
        dist.all_reduce(grad)
        return grad


class Synchronizing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Synchronized.apply(x)
        return found


def in_place_in_a_backward(rank: int, world: int) -> str:
    def loop() -> None:
        net = nn.Sequential(nn.Linear(3, 2), Synchronizing())
        with higher.innerloop_ctx(net, OPTIMIZERS["sgd"](net.parameters()), **PERIODIC) as (fnet, diffopt):
            diffopt.step(fnet(torch.ones(2, 3)).mean())
        fnet(torch.ones(2, 3)).mean().backward()

    return raised(loop)


def wrapped(rank: int, world: int) -> str:
    return raised(lambda: higher.monkeypatch(nn.parallel.DistributedDataParallel(Net())))


def part_of_a_mesh(rank: int, world: int) -> str:
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("data", "model"))["model"]
    return raised(lambda: average([distribute_tensor(torch.ones(4), mesh, [Shard(0)])]))


def one_is_gone(rank: int, world: int) -> str:
    """The last case of a run: the other ranks leave."""
    return "gone" if rank else raised(lambda: Run(OPTIMIZERS["sgd"], callback=average))
