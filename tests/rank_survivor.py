"""Runs of several processes with one `run_dir`, that are broken off, damaged and killed: what the tests look at.

    rank_survivor.py cases folder                              print what each case found, by rank, as JSON
    rank_survivor.py kills folder form kills seed              kill one rank of two, so often in each phase; print JSON
    torchrun ... rank_survivor.py elastic folder form reads    under torchrun: a rank kills itself at so many reads

Processes are forks, so that they find torch imported.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from survivor import CUT, Net, bits, forked, same, used
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lowmem_higher as higher
from lowmem_higher import pieces, rank_files, resumable
from lowmem_higher.distributed import average
from lowmem_higher.examples import surviving

STEPS = 14
FORMS = ("data-parallel", "sharded")
SETTINGS: dict[str, dict[str, Any]] = {
    "data-parallel, every fourth": {"checkpoint_every": 4},
    "data-parallel, mixed": {"checkpoints": 3, "pullback": "mixed"},
    "sharded, truncated": {"checkpoint_every": 3, "truncate": 9},
}
GONE = 20  # seconds that a rank may take to see that another one is dead


class Broken(BaseException):
    """Ends a run as a kill of all ranks would."""


class Problem:
    """One call of `metagradient` in each of several processes.

    Args:
        form: Of `FORMS`.
        rank: Of this process.
        world: How many there are.
        plain: Without noise, dropout and BatchNorm, so that one process gets the same.
    """

    def __init__(self, form: str, rank: int, world: int, *, plain: bool = False) -> None:
        torch.manual_seed(0)
        self.net: nn.Module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)) if plain else Net()
        self.net.double()
        self.x, self.y = torch.randn(12, 8, 3).double(), torch.randn(12, 8, 1).double()
        self.weights = torch.zeros(12, 8, dtype=torch.float64, requires_grad=True)
        self.rate = torch.tensor(0.03, dtype=torch.float64, requires_grad=True)
        self.rank, self.plain, self.mine = rank, plain, slice(rank * 8 // world, (rank + 1) * 8 // world)
        if form == "sharded" and world > 1:
            mesh = init_device_mesh("cpu", (world,))
            fully_shard(self.net.get_submodule("0" if plain else "first"), mesh=mesh)  # 5 rows: uneven
            fully_shard(self.net, mesh=mesh)  # 1 row: nothing for the last rank
        self.callback = average if form == "data-parallel" else None
        self.opt = torch.optim.Adam(self.net.parameters())
        self.reads = 0
        self.at_read: Callable[[int], None] = lambda read: None

    def batches(self, step: int) -> tuple[int, Tensor, Tensor]:
        """Of this process's examples."""
        self.reads += 1
        self.at_read(self.reads)
        x = self.x[step % 12][self.mine]
        return step % 12, x if self.plain else x + 0.1 * torch.randn_like(x), self.y[step % 12][self.mine]

    def loss(self, fnet: Any, batch: Any, weights: Tensor, rate: Tensor) -> Tensor:
        """A weighed error."""
        index, x, y = batch
        return (weights[index][self.mine].sigmoid() * (fnet(x) - y).square().squeeze(1)).mean() + rate * x.mean() ** 2

    def outer(self, fnet: Any) -> Tensor:
        """Of this process's examples."""
        return (fnet(self.x[0][self.mine]) - self.y[0][self.mine]).square().mean()

    def found(self, run_dir: Path | None, **settings: Any) -> higher.MetaGradient:
        """Make the call."""
        torch.manual_seed(5 + self.rank)
        return higher.metagradient(
            self.loss,
            self.net,
            self.opt,
            self.batches,
            steps=STEPS,
            outer={STEPS - 4: self.outer, STEPS: self.outer},
            meta=(self.weights, self.rate),
            override={"lr": [self.rate]},
            grad_callback=self.callback,
            run_dir=run_dir,
            **settings,
        )

    def run(self, run_dir: Path | None, **settings: Any) -> list[Tensor]:
        """This process's part of all that must be the same."""
        return [part(tensor) for tensor in bits(self.found(run_dir, **(settings or {"checkpoints": 3})))]


def part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(found: higher.MetaGradient) -> list[Tensor]:
    """The gradients of the objective, put together."""
    assert isinstance(found.meta, tuple)
    given = [grad for grad in (*found.weights.values(), *found.meta) if grad is not None]
    means = [mean for mean in average(given) if mean is not None]
    return [mean.full_tensor() if isinstance(mean, DTensor) else mean for mean in means]


# Processes


def cut_up() -> None:
    """Many small pieces and saves, which need not reach the disk."""
    for name, value in CUT.items():
        setattr(resumable, name, value)
    pieces.WAY_STEPS = 4
    os.fsync = lambda handle: None
    torch.set_num_threads(1)


class Group:
    """Forks of this process that make a process group; what they return is in files."""

    made = 0

    def __init__(self, folder: Path, world: int, work: Callable[[int, int], Any]) -> None:
        Group.made += 1
        self.results = [folder / f"{Group.made}-{rank}.pt" for rank in range(world)]

        def begin(rank: int) -> Callable[[], None]:
            def run() -> None:
                signal.alarm(240)
                if os.environ.get("QUIET"):
                    sys.stderr = io.StringIO()
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{folder}/rendezvous-{Group.made}",
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=120),
                )
                torch.save(work(rank, world), self.results[rank])
                dist.barrier()

            return run

        self.processes = [forked(begin(rank)) for rank in range(world)]

    def found(self) -> list[Any]:
        """What they returned."""
        for process in self.processes:
            _, status = os.waitpid(process, 0)
            assert status == 0, status
        return [torch.load(result, weights_only=False) for result in self.results]


def raised(work: Callable[[], object]) -> str:
    """What it raised, in words."""
    try:
        work()
    except (Exception, KeyboardInterrupt, SystemExit, Broken) as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "nothing"


# Cases: of each rank what it found


def same_bits(folder: Path) -> Any:
    """With files and without, and what one process gets."""

    def work(rank: int, world: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, settings in SETTINGS.items():
            form = name.partition(",")[0]
            runs = [Problem(form, rank, world).run(where, **settings) for where in (None, folder / "same")]
            found[name] = same(*runs)
        for form in FORMS:
            found[f"{form}, whole"] = whole(
                Problem(form, rank, world, plain=True).found(folder / "same", checkpoints=3)
            )
        return found

    ranks = Group(folder, 2, work).found()
    assert not (folder / "same").exists()
    alone = whole(Problem("alone", 0, 1, plain=True).found(None, checkpoints=3))
    for found in ranks:
        for form in FORMS:
            errors = [(a - b).norm() / b.norm() for a, b in zip(found[f"{form}, whole"], alone, strict=True)]
            found[f"{form}, whole"] = float(max(errors))
    return ranks


def broken_at(form: str, rank: int, world: int, read: int, run_dir: Path, **settings: Any) -> bool:
    """Go on with a run until so many batches were read, on all ranks; returns whether it came to its end."""
    problem = Problem(form, rank, world)

    def end(now: int) -> None:
        if now == read:
            raise Broken

    problem.at_read = end
    return raised(lambda: problem.run(run_dir, **settings)) == "nothing"


READS = {"data-parallel": (1, 8, 21, 35), "sharded": (13, 28)}


def save_at_first(rank: int) -> None:
    """Let one rank alone want to save, after each of the first steps."""
    resumable.Resumable._overdue = (  # type: ignore[method-assign]
        lambda self: self._ranks.rank == rank and self._log.count <= 8
    )


def goes_on(folder: Path) -> Any:
    """Broken off at all kinds of moments."""
    save_at_first(1)

    def work(rank: int, world: int) -> dict[str, Any]:
        found = {}
        for form in FORMS:
            expected, run_dir = Problem(form, rank, world).run(None), folder / form
            for read in READS[form]:
                ended = broken_at(form, rank, world, read, run_dir)
                states = sorted(entry.name for entry in run_dir.iterdir()) if run_dir.exists() else []
                dist.barrier()
                found[f"{form}, {read}"] = [ended, same(Problem(form, rank, world).run(run_dir), expected), states]
        return found

    return Group(folder, 2, work).found()


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of rank 1's shard": lambda state: flipped(state / "__1_0.distcp"),
    "rank 1's shard cut short": lambda state: os.truncate(state / "__1_0.distcp", 700),
    "rank 0's shard gone": lambda state: (state / "__0_0.distcp").unlink(),
    "a bit of rank 1's description": lambda state: flipped(state / "rank-1.json"),
    "a bit of the metadata": lambda state: flipped(state / ".metadata"),
    "rank 1's log": lambda state: flipped(state.parent / "steps-1.log"),
    "all of it": lambda state: [entry.write_bytes(b"") for entry in state.iterdir()],
}
KINDS = {"carry": 13, "newest": 8, "adjoint": 35, "final": 28}  # a read after which there is one


def damage(folder: Path) -> Any:
    """A part of one rank is damaged: all go back to the same earlier state."""
    save_at_first(0)

    def work(rank: int, world: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        undamaged = {form: Problem(form, rank, world).run(None) for form in FORMS}
        for at, (name, harm) in enumerate(DAMAGE.items()):
            kind, form = [*KINDS][at % len(KINDS)], FORMS[at % 3 % 2]
            run_dir, expected = folder / f"damaged {at}", undamaged[form]
            assert not broken_at(form, rank, world, KINDS[kind], run_dir)
            dist.barrier()
            states = [entry for entry in run_dir.iterdir() if entry.name.startswith(kind)]
            assert states, kind
            dist.barrier()
            if rank == 0:
                for state in states:
                    harm(state)
            dist.barrier()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                right = same(Problem(form, rank, world).run(run_dir), expected)
            said = [str(one.message) for one in caught if one.category is higher.DamagedFileWarning]
            found[f"{name}, {kind}, {form}"] = [right, said]
        return found

    found = Group(folder, 2, work).found()
    assert not list(folder.glob("damaged*"))
    return found


def other_worlds(folder: Path) -> Any:
    """A run of two processes is refused to one and to three, and that of one to two."""
    run_dir, alone = folder / "of two", folder / "of one"
    Group(folder, 2, lambda rank, world: broken_at("data-parallel", rank, world, 16, run_dir)).found()
    broken_at("data-parallel", 0, 1, 16, alone)

    def start(where: Path) -> Callable[[int, int], str]:
        return lambda rank, world: raised(lambda: Problem("data-parallel", rank, world).run(where))

    before = sorted(str(entry) for entry in run_dir.rglob("*"))
    found = [[start(run_dir)(0, 1)], Group(folder, 3, start(run_dir)).found(), Group(folder, 2, start(alone)).found()]
    sharded = Group(folder, 2, lambda rank, world: raised(lambda: Problem("sharded", rank, world).run(run_dir))).found()
    assert before == sorted(str(entry) for entry in run_dir.rglob("*"))
    return [*found, sharded]


def errors(folder: Path) -> Any:
    """What one rank alone meets is raised on both; and they go on."""

    def work(rank: int, world: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        form, run_dir = "sharded", folder / "errors"
        expected = Problem(form, rank, world).run(None)

        def attempt(name: str, where: Path = run_dir) -> None:
            dist.barrier()
            found[name] = raised(lambda: Problem(form, rank, world).run(where))
            dist.barrier()

        attempt("another directory", folder / f"mine {rank}")
        with (folder / "file").open("w"):
            attempt("no directory", folder / "file" / "run")
        if rank == 0:
            lock = rank_files.opened(run_dir)
            lock.__enter__()
        attempt("locked")
        if rank == 0:
            lock.__exit__(None, None, None)
        checked, synced, writes = rank_files._checked, os.fsync, 0

        def full(*args: Any) -> Any:
            raise OSError(28, "No space left on device")

        def full_after_the_log(handle: int) -> None:
            nonlocal writes
            writes += 1
            if writes == 2:
                full()

        if rank == 1:
            rank_files._checked = full
        attempt("full at rank 1")
        rank_files._checked = checked
        if rank == 1:
            os.fsync = full_after_the_log
        attempt("full at rank 1, in its shard")
        os.fsync = synced
        found["parts"] = [entry.name for entry in run_dir.glob("*.part")]
        dist.barrier()
        if rank == 0:
            flipped(run_dir / "manifest.json")
        attempt("manifest")
        if rank == 0:
            flipped(run_dir / "manifest.json")
        dist.barrier()
        problem = Problem(form, rank, world)
        problem.at_read = lambda read: os.kill(os.getpid(), signal.SIGTERM) if (rank, read) == (1, 18) else None
        found["a signal"] = raised(lambda: problem.run(run_dir))
        found["reads"] = problem.reads
        found["goes on"] = same(Problem(form, rank, world).run(run_dir), expected)
        other = dist.new_subgroups(1)[0]
        own = Problem("alone", 0, 1)
        own.run(folder / f"own {rank}", group=other, checkpoints=2 + rank)
        found["loops of their own"] = own.reads
        return found

    return Group(folder, 2, work).found()


def sizes(folder: Path) -> Any:
    """The bytes of a rank's shard, and of the same state of one process."""

    def written(run_dir: Path, pattern: str) -> int:
        return max(entry.stat().st_size for entry in run_dir.glob(pattern))

    def big(rank: int, world: int) -> Any:
        problem = Problem("sharded", rank, world, plain=True)
        torch.manual_seed(0)
        problem.net = nn.Sequential(nn.Linear(3, 4000), nn.Tanh(), nn.Linear(4000, 2), nn.AvgPool1d(2)).double()
        if world > 1:
            fully_shard(problem.net, mesh=init_device_mesh("cpu", (world,)))
        problem.opt = torch.optim.Adam(problem.net.parameters())
        problem.at_read = lambda read: os._exit(0) if read == 99 else None
        asked: list[int] = []
        kept = rank_files.RankFiles.remove
        rank_files.RankFiles.remove = lambda self, kind, time: None  # type: ignore[method-assign]
        space = rank_files.RunFiles.check_space
        rank_files.RunFiles.check_space = lambda self, needed: asked.append(needed)  # type: ignore[method-assign]

        def end(now: int) -> None:
            if now == 35:
                raise Broken

        problem.at_read = end
        run_dir = folder / f"big {world}"
        raised(lambda: problem.run(run_dir))
        rank_files.RankFiles.remove, rank_files.RunFiles.check_space = kept, space  # type: ignore[method-assign]
        if world == 1:
            return {kind: written(run_dir, f"{kind}*.tensors") for kind in ("carry", "adjoint", "final")}
        dist.barrier()
        return {kind: written(run_dir, f"{kind}*/__{rank}_0.distcp") for kind in ("carry", "adjoint", "final")}

    return [Group(folder, 2, big).found(), big(0, 1)]


def example(folder: Path) -> Any:
    """What `surviving` learns, in two processes and in one; of its outer steps the first two were taken before."""

    def learned(name: str, *updates: str) -> list[float]:
        for count in updates:
            found = surviving.main(["--updates", count, "--steps", "12", "--run-dir", str(folder / name)])
        return list(found)

    return [Group(folder, 2, lambda rank, world: learned("two", "1", "2")).found(), learned("one", "2")]


CASES: list[Callable[[Path], Any]] = [same_bits, goes_on, damage, other_worlds, errors, sizes, example]


# Kills


def survive(folder: Path, form: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill a rank of two, drawn by chance, so often in each phase, and start both again; up to six times in a run.

    Returns:
        How many kills there were by phase, how many runs, how many of these did not give the same bits, and how long it
        took the other rank at most to end.
    """
    chosen, run_dir = random.Random(seed), folder / "run"

    def work(where: Path | None) -> Callable[[int, int], list[Tensor]]:
        return lambda rank, world: Problem(form, rank, world).run(where)

    Problem("alone", 0, 1).run(None)  # here, so that the forks find imported what a first run imports
    expected = Group(folder, 2, work(None)).found()
    began = os.times()
    assert all(map(same, Group(folder, 2, work(run_dir)).found(), expected))
    ended = os.times()
    took = (ended.children_user + ended.children_system - began.children_user - began.children_system) / 2
    counts, runs, wrong, slowest = {"loop": 0, "backward": 0, "outside": 0}, 0, 0, 0.0
    while min(counts["loop"], counts["backward"]) < kills:
        for _ in range(6):
            group = Group(folder, 2, work(run_dir))
            victim = chosen.randrange(2)
            in_loop = counts["loop"] < kills and phase_of(run_dir) != "backward"
            moment = chosen.uniform(0, 0.5 if in_loop else 1.0) * took
            while used(group.processes[victim]) < moment and not group.results[victim].exists():
                time.sleep(0.002)
            if group.results[victim].exists():
                break
            os.kill(group.processes[victim], signal.SIGKILL)
            since = time.monotonic()
            for process in group.processes:
                os.waitpid(process, 0)
            slowest = max(slowest, time.monotonic() - since)
            counts[phase_of(run_dir)] += 1
        else:
            group = Group(folder, 2, work(run_dir))
        runs += 1
        wrong += not all(map(same, group.found(), expected)) or run_dir.exists()
    return {"kills": counts, "runs": runs, "not_the_same_bits": wrong, "slowest_end": round(slowest, 2)}


def phase_of(run_dir: Path) -> str:
    """Where a run that was killed stands, by its files."""
    names = [entry.name for entry in run_dir.iterdir()] if run_dir.exists() else []
    if "manifest.json" not in names:
        return "outside"
    return "backward" if any(name.startswith("adjoint") and "part" not in name for name in names) else "loop"


def elastic(folder: Path, form: str, reads: list[int]) -> None:
    """Under torchrun: at each start but the last a rank kills itself, after so many reads."""
    dist.init_process_group("gloo")
    rank, world, start = dist.get_rank(), dist.get_world_size(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    problem = Problem(form, rank, world)

    def end(now: int) -> None:
        if start < len(reads) and rank == start % world and now == reads[start]:
            (folder / f"killed-{start}").write_text(phase_of(folder / "run"))
            os.kill(os.getpid(), signal.SIGKILL)

    problem.at_read = end
    found = problem.run(folder / "run")
    problem = Problem(form, rank, world)
    (folder / f"result-{rank}").write_text(str(same(found, problem.run(None))))
    dist.destroy_process_group()


def main() -> None:
    """One of the three."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    __import__("torch.distributed.checkpoint")  # here, so that the forks find it imported
    cut_up()
    if what == "elastic":
        elastic(folder, sys.argv[3], list(map(int, sys.argv[4].split(","))))
    elif what == "kills":
        print(json.dumps(survive(folder, sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))))
    else:
        kept = resumable.Resumable._overdue
        found = {}
        for case in CASES:
            if len(sys.argv) > 3 and case.__name__ not in sys.argv[3:]:
                continue
            shutil.rmtree(folder / case.__name__, ignore_errors=True)
            (folder / case.__name__).mkdir(parents=True)
            resumable.Resumable._overdue = kept  # type: ignore[method-assign]
            began = os.times()
            found[case.__name__] = case(folder / case.__name__)
            took = [round(now - before, 1) for now, before in zip(os.times(), began, strict=True)]
            print(case.__name__, *took, file=sys.stderr)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
