"""`python -m lowmem_higher profile`: peaks by phase, counts of all loops, and scripts that run as python runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lowmem_higher as higher
from lowmem_higher.__main__ import main
from lowmem_higher.innerloop import OBSERVERS
from lowmem_higher.meters import AllocatedBytes, LiveBytes, ResidentBytes
from lowmem_higher.profile import Profile
from lowmem_higher.testing import live_bytes

MB = 10**6


@pytest.fixture(autouse=True)
def leaves_the_interpreter_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # a failed script's traceback is shortened at the very end
    before = sys.argv, sys.path, sys.modules["__main__"]
    yield
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before
    assert not OBSERVERS


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def profiled(path: Path, *arguments: object) -> dict[str, Any]:
    """Of a script that ends well."""
    out = path.with_name("profile.json")
    assert main(["profile", "--json", str(out), *map(str, arguments[:-1]), str(path), *arguments[-1:]]) == 0
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


LOOP = """
    import torch, lowmem_higher as higher

    def spend(megabytes):
        return torch.zeros(megabytes * 250_000).sum()

    x, net = torch.randn(10, 4), torch.nn.Linear(4, 1)
    spend(40)
    with higher.innerloop_ctx(
        net, torch.optim.SGD(net.parameters(), 0.1), copy_initial_weights=False, checkpoint_every=5
    ) as (fnet, diffopt):
        for step in range(20):
            if step in (0, 7):
                spend(10)
            diffopt.step(fnet(x).square().mean())
    spend(20)
    fnet(x).mean().backward()
"""


def test_a_peak_belongs_to_the_phase_in_which_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = profiled(script(tmp_path, LOOP))
    assert found["loops"] == 1
    inner = found["largest"]
    peaks = [phase["peaks"]["live bytes"] for phase in (found["before"], inner["loop"], inner["backward"])]
    for peak, spent in zip(peaks, (40, 10, 20), strict=True):
        assert spent * MB < peak < (spent + 0.1) * MB
    assert 0 < inner["begun"]["live bytes"] < 0.1 * MB
    assert inner["loop"]["peaks"]["resident size"] > 10 * MB
    assert inner["settings"] == "checkpoint_every=5"
    assert (found["steps"], found["first_order_runs"], found["second_order_runs"]) == (20, 36, 20)
    assert inner["report"] == found["last"]["report"]
    assert inner["report"]["first_order_runs"] == 36
    seconds = [found[phase]["seconds"] for phase in ("before", "loop", "backward")]
    assert min(seconds) > 0
    assert sum(seconds) == pytest.approx(found["seconds"])
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "loop 1, the only one: checkpoint_every=5" in shown.err
    assert "in the backward" in shown.err


def problem() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    net = nn.Linear(4, 1)
    return net, torch.optim.SGD(net.parameters(), lr=0.1), torch.randn(10, 4)


def task(steps: int, **settings: Any) -> torch.Tensor:
    """An outer loss; the optimizer is let go, the graph leads to the run."""
    net, opt, x = problem()
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
        for _ in range(steps):
            diffopt.step(fnet(x).square().mean())
        outer: torch.Tensor = fnet(x).mean()
    return outer


def test_one_backward_through_many_loops_is_counted_in_full() -> None:
    profile = Profile([])
    with profile.watching():
        total = sum((task(steps, checkpoint_every=4) for steps in (8, 12, 4)), torch.zeros(()))
        total.backward()
        del total
        unrolled = task(5)
        unrolled.backward()
    assert profile.loops == 4
    assert profile.counts == {
        "steps": 29,
        "first_order_runs": 24 + (6 + 9 + 3),
        "second_order_runs": 29,
        "update_runs": 0,
        "unrolled_steps": 5,
    }
    assert profile.last is not None
    assert profile.last.settings == "full unroll"
    assert profile.last.report.steps == 5


def test_steps_of_two_open_loops_go_to_their_own() -> None:
    live = LiveBytes()
    profile = Profile([live])
    with live, profile.watching():
        (one, opt, x), (other, other_opt, _) = problem(), problem()
        with (
            higher.innerloop_ctx(one, opt, checkpoint_every=2) as (fone, first),
            higher.innerloop_ctx(other, other_opt) as (fother, second),
        ):
            for size in (3, 1, 2):
                torch.zeros(size * 250_000)
                first.step(fone(x).mean())
                torch.zeros(10 * size * 250_000)
                second.step(fother(x).mean())
    assert profile.largest is profile.last is not None
    assert 30 * MB < profile.largest.loop.peaks["live bytes"] < 31 * MB
    assert profile.largest.number == 2
    assert profile.counts["steps"] == 6
    assert profile.largest.backward.peaks["live bytes"] < MB


@pytest.mark.parametrize("settings", [{}, {"checkpoint_every": 3}, {"memory_budget": "1MiB"}], ids=str)
def test_nothing_is_held_longer_than_without_a_profile(settings: dict[str, Any]) -> None:
    profile = Profile([])
    with profile.watching():
        task(1, **settings).backward()  # whatever is made once
        with live_bytes() as memory:
            outer = task(9, **settings)
            outer.backward()
            del outer
            assert memory.current == 0
        assert profile.counts["steps"] == 10


def test_the_largest_loop_is_shown_and_the_last_and_a_line_of_all() -> None:
    live = LiveBytes()
    profile = Profile([live])
    with live, profile.watching():
        for steps in (5, 30, 3):
            task(steps).backward()
    assert profile.largest is not None
    assert profile.largest.number == 2
    text = str(profile)
    assert "3 inner loops" in text
    assert "38 steps, 0 first-order and 38 second-order runs" in text
    assert "loop 2, the largest: full unroll" in text
    assert "loop 3, the last: full unroll" in text


def test_meters_start_again_after_each_look() -> None:
    with LiveBytes() as live:
        torch.zeros(1000)
        assert (live.take(), live.take()) == (4000, 0)
        torch.zeros(1000)
        profile = Profile([live])
        with profile.watching():
            torch.zeros(100)
    assert profile.before.peaks == {"live bytes": 400}


def test_the_resident_size_is_the_largest_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([5, 9, 7, 6, 6])
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(sizes)))
    monkeypatch.setattr("psutil.Process", lambda: process)
    meter = ResidentBytes()
    assert (meter.now(), meter.now(), meter.take(), meter.take(), meter.take()) == (5, 9, 9, 7, 6)


def test_what_comes_after_a_step_is_the_backward_of_that_loop() -> None:
    live = LiveBytes()
    profile = Profile([live])
    with live, profile.watching():
        (one, opt, x), (other, other_opt, _) = problem(), problem()
        with (
            higher.innerloop_ctx(one, opt, checkpoint_every=2) as (fone, first),
            higher.innerloop_ctx(other, other_opt) as (fother, second),
        ):
            second.step(fother(x).mean())
            first.step(fone(x).mean())
            torch.zeros(250_000)
    assert profile.largest is not None
    assert profile.largest.number == 1
    assert MB <= profile.largest.backward.peaks["live bytes"] < 1.1 * MB
    assert profile.last is not None
    assert profile.last.backward.peaks == {}


def test_a_script_that_imports_higher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "higher"]:
        monkeypatch.delitem(sys.modules, name)
    text = LOOP.replace("lowmem_higher as higher", "higher").replace(", checkpoint_every=5", "")
    found = profiled(script(tmp_path, text), "--as-higher", "--no-live-bytes", "--its-own")
    assert found["second_order_runs"] == 20
    assert found["last"]["settings"] == "full unroll"
    assert found["meters"] == ["resident size"]
    assert found["arguments"] == ["--its-own"]
    assert "higher" not in sys.modules


def test_a_script_without_a_loop_is_told_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--no-live-bytes", str(script(tmp_path, "print('mine')"))]) == 0
    shown = capsys.readouterr()
    assert shown.out == "mine\n"
    assert "no inner loop began" in shown.err
    assert "--as-higher" in shown.err


@pytest.mark.parametrize(
    ("ending", "kind", "argument"),
    [
        ("raise SystemExit(3)", SystemExit, 3),
        ("raise KeyboardInterrupt", KeyboardInterrupt, None),
        ("1 / 0", ZeroDivisionError, "division by zero"),
        ("higher.innerloop_ctx(1, 2, checkpoint_every=0).__enter__()", ValueError, None),
    ],
)
def test_what_was_measured_is_shown_however_a_script_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, kind: type[BaseException], argument: Any
) -> None:
    text = textwrap.dedent(LOOP) + ending
    with pytest.raises(kind) as caught:
        main(["profile", "--no-live-bytes", str(script(tmp_path, text))])
    assert argument is None or caught.value.args[0] == argument
    assert "20 steps; 36 first-order" in capsys.readouterr().err


def test_an_error_looks_as_if_python_had_run_the_script(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("def fail(): raise LookupError('of the script')\n")
    path = script(
        tmp_path,
        """
        import pickle, sys
        from beside import fail
        class Mine: pass
        assert type(pickle.loads(pickle.dumps(Mine()))) is Mine
        print(sys.argv, sys.path[0], __name__, __file__, __package__, __spec__, "annotations" in vars())
        fail()
        """,
    )
    commands = (["-m", "lowmem_higher", "profile", "--no-live-bytes"], [])
    ours, pythons = (
        subprocess.run(
            [sys.executable, *command, str(path), "-x", "--", "y"], capture_output=True, text=True, timeout=120
        )
        for command in commands
    )
    assert ours.stdout == pythons.stdout != ""
    assert ours.returncode == pythons.returncode == 1
    assert ours.stderr.endswith(pythons.stderr)
    assert pythons.stderr.startswith("Traceback")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "required: script.py"),
        (["none.py"], "cannot read 'none.py': No such file"),
        (["."], "cannot read '.': Is a directory"),
        (["--json", "none/a.json", "script.py"], "--json: cannot write to 'none/a.json'"),
        (["--json", ".", "script.py"], "--json: '.' is a directory"),
        (["--picture", "a.xyz", "script.py"], "--picture: no picture ends in '.xyz'"),
        (["--snapshot", "a.pickle", "script.py"], "--snapshot: no CUDA device"),
        (["--jso", "a.json", "script.py"], "unrecognized arguments: --jso"),
    ],
    ids=str,
)
def test_a_bad_option_gives_one_line_and_nothing_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script(tmp_path, "print('ran')")
    with pytest.raises(SystemExit) as error:
        main(["profile", *options])
    assert error.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("python -m lowmem_higher")
    assert message in line


def test_a_picture_and_a_file_are_where_they_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the script goes to another directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    path = script(tmp_path, textwrap.dedent(LOOP) + "import os; os.chdir('other')")
    assert main(["profile", "--json", "a.json", "--picture", "a.png", path.name]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "a.json").read_text())
    assert len(found["samples"]) > 1
    assert {len(sample) for sample in found["samples"]} == {1 + len(found["meters"])}


def test_without_psutil_or_matplotlib_it_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert profiled(script(tmp_path, LOOP))["meters"] == ["live bytes"]
    assert "pip install psutil" in capsys.readouterr().err
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(SystemExit):
        main(["profile", "--picture", str(tmp_path / "a.png"), str(script(tmp_path, LOOP))])
    assert "lowmem_higher[plot]" in capsys.readouterr().err


class FakeCuda:
    """Two devices that take what they are told, in the place of torch.cuda's functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.peak, self.calls = [0, 0], [0, 0], list[object]()
        for name, function in {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "init": lambda: self.calls.append("init"),
            "device_count": lambda: 2,
            "get_device_name": lambda: "a device",
            "memory_allocated": self.now.__getitem__,
            "max_memory_allocated": self.peak.__getitem__,
            "reset_peak_memory_stats": self.reset,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        for name in ("_record_memory_history", "_dump_snapshot"):
            monkeypatch.setattr(
                torch.cuda.memory, name, lambda *args, name=name, **options: self.calls.append((name, args, options))
            )

    def reset(self, device: int) -> None:
        self.peak[device] = self.now[device]

    def take(self, device: int, size: int) -> None:
        self.now[device] += size
        self.peak[device] = max(self.peak[device], self.now[device])


def test_cuda_peaks_are_those_of_the_fullest_device_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, meter = FakeCuda(monkeypatch), AllocatedBytes()
    for device, size in ((0, 50), (1, 70), (1, -40)):
        cuda.take(device, size)
    assert (meter.now(), meter.take(), meter.take()) == (50, 70, 50)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert (meter.now(), meter.take()) == (0, 0)


def test_a_snapshot_is_recorded_around_the_script_and_saved_also_if_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda = FakeCuda(monkeypatch)
    path = script(tmp_path, "import torch; torch.cuda.init(); raise LookupError")
    with pytest.raises(LookupError):
        main(["profile", "--no-live-bytes", "--snapshot", str(tmp_path / "a.pickle"), str(path)])
    names = [call if isinstance(call, str) else call[0] for call in cuda.calls]
    assert names == ["init", "_record_memory_history", "init", "_dump_snapshot", "_record_memory_history"]
    assert cuda.calls[3] == ("_dump_snapshot", (str(tmp_path / "a.pickle"),), {})
    assert cuda.calls[4] == ("_record_memory_history", (), {"enabled": None})
    capsys.readouterr()
