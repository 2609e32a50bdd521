"""`run_dir`: a run that ends anywhere goes on to the same bits; damage, two runs, a full disk: no wrong gradient."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import on_a_disk, spaces
from hypothesis import given
from hypothesis import strategies as st
from survivor import CUT, Problem, same

import lowmem_higher as higher
from lowmem_higher import resumable
from lowmem_higher.piece_plan import PiecePlan
from lowmem_higher.run_directory import opened
from lowmem_higher.schedule import Periodic, Revolve, optimal_runs

STEPS = 14
ROOT = Path(__file__).resolve().parent.parent


class Broken(BaseException):
    """Ends a run as a kill would, as far as the files go."""


def cut_up(patch: pytest.MonkeyPatch) -> None:
    """Many small pieces, and a save after each step of a way, which need not reach the disk."""
    for name, value in CUT.items():
        patch.setattr(resumable, name, value)
    patch.setattr(resumable.Resumable, "_overdue", lambda self: True)
    patch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each test."""
    cut_up(monkeypatch)


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    """The result of a run without files."""
    return Problem().run(STEPS, checkpoints=3)


def broken_at(read: int, run_dir: Path, problem: Problem | None = None) -> bool:
    """Go on with the run until it has read so many batches; returns whether it came to its end."""
    problem = Problem() if problem is None else problem

    def end(now: int) -> None:
        if now == read:
            raise Broken

    problem.at_read = end
    try:
        problem.run(STEPS, run_dir, checkpoints=3)
    except Broken:
        return False
    return True


def go_on(run_dir: Path) -> list[torch.Tensor]:
    """The same call once more, to the end: no files are left."""
    found = Problem().run(STEPS, run_dir, checkpoints=3)
    assert not run_dir.exists() or not any(run_dir.iterdir())
    return found


@pytest.mark.parametrize("read", [1, 2, 7, 12, 13, 15, 20, 27, 35, 44])
def test_a_run_that_ended_anywhere_goes_on_to_the_same_bits(
    read: int, tmp_path: Path, expected: list[torch.Tensor]
) -> None:
    assert not broken_at(read, tmp_path / "run")
    assert (tmp_path / "run" / "manifest.json").exists()
    assert same(go_on(tmp_path / "run"), expected)


def test_a_run_that_ends_again_and_again(tmp_path: Path, expected: list[torch.Tensor]) -> None:
    run_dir, endings = tmp_path / "run", 0
    while not broken_at(12, run_dir):
        endings += 1
        files = Counter(entry.name.split("-")[0] for entry in run_dir.iterdir())
        assert files["carry"] <= 2
        assert files["adjoint"] <= 3
    assert endings >= 3
    assert not run_dir.exists()
    assert not broken_at(31, run_dir)
    assert same(go_on(run_dir), expected)


def test_killed_for_good(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "survivor.py"), str(tmp_path), "24", "2", "3", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["kills"]["loop"] >= 2
    assert found["kills"]["backward"] >= 3
    assert found["not_the_same_bits"] == 0


# ------------------------------------------------------------------------------------------------ damage


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flipped(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 16
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut short": cut_short,
    "first line": lambda path: flipped(path, 0.02),
    "middle": lambda path: flipped(path, 0.6),
    "end": lambda path: flipped(path, 1.0),
    "empty": emptied,
    "deleted": Path.unlink,
}


@pytest.fixture(scope="module")
def broken_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that ended on the way to a carry, later in the loop, and in the backward: with all kinds of files."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        cut_up(patch)
        for phase, read in (("way", 7), ("loop", 13), ("way back", 28), ("backward", 31)):
            found[phase] = tmp_path_factory.mktemp(phase) / "run"
            assert not broken_at(read, found[phase])
    return found


KINDS = [
    ("way", "newest"),
    ("way", "steps"),
    ("loop", "carry"),
    ("way back", "newest"),
    ("backward", "carry"),
    ("backward", "adjoint"),
    ("backward", "final"),
    ("backward", "steps"),
]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("phase", "kind"), KINDS)
def test_a_damaged_file_costs_time_only(
    phase: str,
    kind: str,
    damage: str,
    broken_runs: dict[str, Path],
    tmp_path: Path,
    expected: list[torch.Tensor],
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(broken_runs[phase], run_dir)
    victims = [entry for entry in run_dir.iterdir() if entry.name.startswith(kind)]
    assert victims
    for victim in victims:
        DAMAGE[damage](victim)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert same(go_on(run_dir), expected)
    assert {warning.category for warning in caught} <= {higher.DamagedFileWarning}
    if damage != "deleted":
        assert any("It was removed, and nothing was computed from it" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "deleted"])
def test_a_damaged_manifest_is_an_error(damage: str, broken_runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(broken_runs["backward"], tmp_path / "run")
    DAMAGE[damage](tmp_path / "run" / "manifest.json")
    with pytest.raises(higher.RunDirectoryError, match=r"manifest\.json.*shutil\.rmtree"):
        go_on(tmp_path / "run")


def test_without_a_manifest_it_begins_anew(
    broken_runs: dict[str, Path], tmp_path: Path, expected: list[torch.Tensor]
) -> None:
    shutil.copytree(broken_runs["backward"], tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    assert same(go_on(tmp_path / "run"), expected)


def test_only_the_newest_of_each_kind_is_damaged(
    broken_runs: dict[str, Path], tmp_path: Path, expected: list[torch.Tensor]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(broken_runs["backward"], run_dir)
    adjoints = sorted(run_dir.glob("adjoint-*"), key=lambda path: int(path.stem.split("-")[1]))
    assert len(adjoints) == 2
    cut_short(adjoints[0])
    with pytest.warns(higher.DamagedFileWarning, match=adjoints[0].name):
        assert same(go_on(run_dir), expected)


def test_a_file_of_another_run_or_of_another_time_is_not_used(
    broken_runs: dict[str, Path], tmp_path: Path, expected: list[torch.Tensor]
) -> None:
    run_dir, foreign = tmp_path / "run", tmp_path / "foreign"
    shutil.copytree(broken_runs["backward"], run_dir)
    assert not broken_at(31, foreign, Problem(seed=1))
    adjoints = sorted(run_dir.glob("adjoint-*"))
    shutil.copy(next(foreign.glob("adjoint-*")), adjoints[0])
    carry = next(run_dir.glob("carry-*"))
    carry.rename(run_dir / "carry-1.tensors")
    with pytest.warns(higher.DamagedFileWarning, match="of another run|has been renamed"):
        assert same(go_on(run_dir), expected)


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine")
    (run_dir / "carry-3.part").write_text("left by a kill")
    Problem().run(STEPS, run_dir, checkpoints=3)
    assert [entry.name for entry in run_dir.iterdir()] == ["notes.txt"]


# ------------------------------------------------------------------------------------------------ full disks


@pytest.mark.parametrize("write", [1, 2, 3, 6, 9, 14, 20])
def test_a_full_disk_is_an_error_that_one_goes_on_from(
    write: int, tmp_path: Path, expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = 0

    def full(handle: int) -> None:
        nonlocal writes
        writes += 1
        if writes == write:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(higher.StoreError, match=r"No space left on device.*make the same call again"):
            Problem().run(STEPS, tmp_path / "run", checkpoints=3)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.part"))
    assert same(go_on(tmp_path / "run"), expected)


@pytest.mark.skipif(not spaces()[0], reason=spaces()[1])
def test_a_disk_that_somebody_else_fills(tmp_path: Path) -> None:
    found = on_a_disk(tmp_path, "unforeseen=0,4,14,25", "log=342", "store=0,20")
    for kind, outcome in found.items():
        assert outcome["refused"] >= {"unforeseen": 10, "log": 1, "store": 4}[kind]
        assert outcome["not the same bits"] == outcome["odd files"] == outcome["files left"] == 0, outcome
        for said in outcome["said"]:
            assert "No space left on device. " in said
            assert re.search(r"make room there and make the same call again|Give one that can|Make room there", said)
    said = " ".join([*found["unforeseen"]["said"], *found["log"]["said"]])
    for what in (
        "run_dir='DISK/run' cannot",
        "The manifest could",
        "newest-#",
        "final-#",
        "adjoint-#",
        "The log of the",
    ):
        assert what in said


def test_a_lock_without_room_for_its_holder_is_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = iter(range(10))

    def full(handle: int, content: bytes, offset: int) -> int:
        next(tries)  # raises something else if it is tried again and again
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with opened(tmp_path / "run"), pytest.raises(higher.RunDirectoryError, match="in use by another process"):
        go_on(tmp_path / "run")


def test_no_room_for_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(
            higher.StoreError, match=r"cannot be used: No space left on device.*make the same call again"
        ):
            go_on(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_little_room_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
    problem = Problem()
    with pytest.raises(higher.StoreError, match=r"will take up to .* where 4\.9 KiB are free"):
        problem.run(STEPS, tmp_path / "run", checkpoints=3)
    assert problem.reads == 0
    assert not (tmp_path / "run").exists()


def test_the_estimate_is_an_upper_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("lowmem_higher.run_directory.RunFiles.check_space", lambda self, needed: asked.append(needed))
    problem, most = Problem(), 0

    def look(read: int) -> None:
        nonlocal most
        most = max(most, sum(entry.stat().st_size for entry in (tmp_path / "run").iterdir()))

    problem.at_read = look
    problem.run(STEPS, tmp_path / "run", checkpoints=3)
    assert 0 < most <= asked[0]


# ------------------------------------------------------------------------------------------------ two runs


class Other(torch.nn.Module):
    """Another class of model, with the same parameters."""


def change_weights(problem: Problem) -> None:
    with torch.no_grad():
        problem.net.first.weight[0, 0] += 1e-9


def change_meta(problem: Problem) -> None:
    with torch.no_grad():
        problem.weights[3] = 0.5


def change_rate(problem: Problem) -> None:
    problem.rate = torch.tensor(0.04, dtype=torch.float64, requires_grad=True)


def change_betas(problem: Problem) -> None:
    problem.opt.param_groups[0]["betas"] = (0.8, 0.99)


def change_training(problem: Problem) -> None:
    problem.net.norm.eval()


def change_buffer(problem: Problem) -> None:
    problem.net.norm.running_mean += 1.0


def change_frozen(problem: Problem) -> None:
    problem.net.last.bias.requires_grad_(True)


def change_optimizer(problem: Problem) -> None:
    problem.opt = torch.optim.SGD(problem.net.parameters(), lr=0.1)


def change_model(problem: Problem) -> None:
    problem.net.norm = torch.nn.BatchNorm1d(5, affine=False).double()
    problem.opt = torch.optim.Adam(problem.net.parameters())


def change_version(problem: Problem) -> None:
    torch.__version__ = torch.torch_version.TorchVersion("2.0.0")


@pytest.mark.parametrize(
    ("change", "settings", "named"),
    [
        (change_weights, {}, "initial weights"),
        (change_meta, {}, "meta, 0: .* with checksum"),
        (change_rate, {}, "override, lr"),
        (change_betas, {}, "options of the optimizer"),
        (change_training, {}, "attributes of the modules"),
        (change_buffer, {}, "initial buffers"),
        (change_frozen, {}, "parameters, last.bias"),
        (change_optimizer, {}, "optimizer: torch.optim.adam.Adam, now torch.optim.sgd.SGD"),
        (change_model, {}, "parameters, norm.weight: .*, now none"),
        (change_version, {}, "torch version: .*, now 2.0.0"),
        (lambda problem: None, {"steps": STEPS + 1}, f"steps: {STEPS}, now {STEPS + 1}"),
        (lambda problem: None, {"checkpoints": 4}, "settings, checkpoints: 3, now 4"),
        (lambda problem: None, {"first_order": True}, "settings, first_order: False, now True"),
        (lambda problem: None, {"batches": 20}, "batches: a function, now 20"),
    ],
)
def test_two_runs_are_not_mixed(
    change: Callable[[Problem], None],
    settings: dict[str, Any],
    named: str,
    broken_runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(broken_runs["loop"], tmp_path / "run")
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "run").iterdir() if entry.name != "lock"}
    problem, settings = Problem(), dict(settings)
    monkeypatch.setattr(torch, "__version__", torch.__version__)
    change(problem)
    batches: Any = [problem.batches(t) for t in range(settings.pop("batches"))] if "batches" in settings else None
    given = problem.arguments(**{"steps": STEPS, "checkpoints": 3, **settings})
    with pytest.raises(higher.RunDirectoryError, match=f"is another one(.|\n)*{named}"):
        higher.metagradient(
            problem.loss, problem.net, problem.opt, batches or problem.batches, run_dir=tmp_path / "run", **given
        )
    after = {entry.name: entry.read_bytes() for entry in (tmp_path / "run").iterdir() if entry.name != "lock"}
    assert before == after


def test_one_process_at_a_time(tmp_path: Path, expected: list[torch.Tensor]) -> None:
    with opened(tmp_path / "run"), pytest.raises(higher.RunDirectoryError, match=f"in use by process {os.getpid()}"):
        go_on(tmp_path / "run")
    assert same(go_on(tmp_path / "run"), expected)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(higher.RunDirectoryError, match="cannot be used"):
        go_on(tmp_path / "file" / "run")


def test_a_format_of_another_version_is_refused(broken_runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(broken_runs["loop"], tmp_path / "run")
    files_of = __import__("lowmem_higher.run_directory", fromlist=["checksum_of_json"])
    path = tmp_path / "run" / "manifest.json"
    manifest = {**json.loads(path.read_text()), "version": 2}
    del manifest["checksum"]
    path.write_text(json.dumps({**manifest, "checksum": files_of.checksum_of_json(manifest)}))
    with pytest.raises(higher.RunDirectoryError, match="written in version 2"):
        go_on(tmp_path / "run")


# ------------------------------------------------------------------------------------------------ signals


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises, which is ignored in a job that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("read", [3, 13, 17, 31])
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_run_with_all_saved(
    number: signal.Signals,
    error: type[BaseException],
    read: int,
    tmp_path: Path,
    expected: list[torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    handlers, random_state = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)], None
    problem = Problem()

    def end(now: int) -> None:
        if now == read:
            os.kill(os.getpid(), number)

    problem.at_read = end
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    with pytest.raises(error):
        problem.run(STEPS, tmp_path / "run", checkpoints=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    said = capsys.readouterr().err
    assert "All that it needs is saved" in said
    assert sys.executable in said
    again = Problem()
    assert same(again.run(STEPS, tmp_path / "run", checkpoints=3), expected)
    whole = Problem()
    whole.run(STEPS, tmp_path / "run", checkpoints=3)
    assert problem.reads + again.reads <= whole.reads + 2 * CUT["LEAF_STEPS"]


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_signal_ends_at_once(tmp_path: Path, expected: list[torch.Tensor]) -> None:
    problem = Problem()

    def end(now: int) -> None:
        if now == 20:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    problem.at_read = end
    with pytest.raises(KeyboardInterrupt):
        problem.run(STEPS, tmp_path / "run", checkpoints=3)
    assert problem.reads == 20
    assert same(go_on(tmp_path / "run"), expected)


# ------------------------------------------------------------------------------------------------ plans and files


@given(st.integers(1, 400), st.integers(2, 12), st.integers(1, 40))
def test_pieces_cost_the_optimum_and_one_run_for_each_leaf(steps: int, slots: int, longest: int) -> None:
    plan = PiecePlan(Revolve(slots, steps), steps)
    held, position, leaves, way = [0], steps, 0, 0
    while position > 0:
        piece = plan.next(held, position, longest)
        assert held[-1] == piece.start <= piece.stop < position
        way += piece.stop - piece.start
        if piece.kept:
            held.append(piece.stop)
            assert len(held) <= slots
            continue
        assert position - piece.stop <= longest
        leaves, position = leaves + 1, piece.stop
        held = [0, *(at for at in held if 0 < at < position)]
    ahead = plan.ahead([0], steps, longest)
    assert ahead.way == way
    assert ahead.second_order == steps
    assert ahead.way + ahead.first_order <= optimal_runs(steps, slots) + leaves - 1


def test_pieces_of_a_periodic_schedule() -> None:
    plan = PiecePlan(Periodic(10), 95, end=35)
    ahead = plan.ahead([0], 95, longest=5)
    assert (ahead.way, ahead.first_order, ahead.second_order) == (85, 60, 60)
    assert plan.next([0], 95, 5).stop == 35


def test_a_file_says_what_is_in_it(broken_runs: dict[str, Path]) -> None:
    with next(broken_runs["backward"].glob("carry-*")).open("rb") as file:
        header = json.loads(file.readline())
    assert (header["magic"], header["version"], header["kind"]) == ("lowmem_higher run", 1, "carry")
    assert "weight/first.weight" in header["names"]
    assert "random/cpu" in header["names"]
    assert len(header["names"]) == len(header["tensors"])
    log = (broken_runs["backward"] / "steps.log").read_bytes()
    assert len(log) == 12 * STEPS
