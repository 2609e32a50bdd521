"""What `progress=True` shows: the steps of the loop, the runs of the backward, closed whatever happens."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lowmem_higher as higher
from lowmem_higher import progress as progress_module
from lowmem_higher.progress import Line, Progress
from lowmem_higher.schedule import optimal_runs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """In the place of stderr, from here on: pytest's own comes back between a fixture and its test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.fixture(params=["tqdm", "line"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "line":
        monkeypatch.setitem(sys.modules, "tqdm", None)


class Bars:
    """The bars that were opened, each as `[name, done, total first, total last, closed]`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[list[Any]] = []
        bars = self

        class Bar:
            def __init__(self, name: str, unit: str, total: int | None, done: int) -> None:
                self.n, self._total, self.row = done, total, [name, done, total, total, False]
                bars.found.append(self.row)

            @property
            def total(self) -> int | None:
                return self._total

            @total.setter
            def total(self, value: int) -> None:
                self._total = self.row[3] = value

            def update(self) -> None:
                assert not self.row[4]
                self.n += 1
                self.row[1] = self.n

            def close(self) -> None:
                self.row[4] = True

        monkeypatch.setitem(sys.modules, "tqdm", None)
        monkeypatch.setattr(progress_module, "Line", Bar)


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Bars:
    return Bars(monkeypatch)


def problem() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.randn(5, 3)


def run(count: int, backwards: int = 1, **settings: Any) -> list[higher.Report]:
    """Reports after the loop and after each backward."""
    model, optimizer, x = problem()
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False, **{"progress": "always", **settings}) as (
        fmodel,
        diffopt,
    ):
        for _ in range(count):
            diffopt.step(fmodel(x).square().mean())
        reports = [diffopt.report]
        for left in reversed(range(backwards)):
            fmodel(x).mean().backward(retain_graph=left > 0)
            reports.append(diffopt.report)
    return reports


def runs(report: higher.Report) -> int:
    return report.first_order_runs + report.second_order_runs + report.update_runs


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpoint_every": 1},
        {"checkpoint_every": 7},
        {"checkpoint_every": 50},
        {"checkpoints": 3},
        {"checkpoints": 10},
        {"checkpoints": 50},
        {"checkpoints": 3, "steps": 40},
        {"checkpoints": 5, "steps": 30},
        {"checkpoints": 5, "steps": 60},
        {"checkpoint_every": 7, "replay": "torch"},
        {"checkpoint_every": 7, "journal": True},
        {"checkpoints": 3, "first_order": True},
        {"checkpoint_every": 7, "truncate": 10},
    ],
    ids=str,
)
def test_the_total_of_a_backward_is_known_when_it_begins(settings: dict[str, Any], bars: Bars) -> None:
    loop, after = run(40, **settings)
    total = runs(after) - runs(loop)
    known = settings.get("steps")
    assert bars.found == [
        ["inner loop", 40, known, known and max(known, 40), True],
        ["outer backward", total, total, total, True],
    ]


def test_each_backward_has_a_bar_of_its_own(bars: Bars) -> None:
    reports = run(20, backwards=2, checkpoint_every=6)
    assert [row[0] for row in bars.found] == ["inner loop", "outer backward", "outer backward"]
    for row, before, after in zip(bars.found[1:], reports, reports[1:], strict=False):
        assert row == ["outer backward", runs(after) - runs(before), 36, 36, True]


def test_a_total_that_was_too_low_grows(bars: Bars) -> None:
    """Carries that a first backward gave up have to be recomputed in a second one."""
    reports = run(40, backwards=2, checkpoints=3)
    _, done, first, last, closed = bars.found[2]
    assert done == last == runs(reports[2]) - runs(reports[1]) >= first
    assert closed


def test_a_loop_that_goes_on_after_a_backward_counts_on(bars: Bars) -> None:
    model, optimizer, x = problem()
    with higher.innerloop_ctx(model, optimizer, checkpoint_every=3, progress="always") as (fmodel, diffopt):
        for _ in range(2):
            for _ in range(5):
                diffopt.step(fmodel(x).square().mean())
            torch.autograd.grad(fmodel(x).mean(), list(fmodel.parameters(time=0)), retain_graph=True)
    assert [(name, done) for name, done, *_ in bars.found] == [
        ("inner loop", 5),
        ("outer backward", 8),
        ("inner loop", 10),
        ("outer backward", 16),
    ]


def test_past_weights_asked_for_in_the_loop_are_no_progress(bars: Bars) -> None:
    model, optimizer, x = problem()
    with higher.innerloop_ctx(model, optimizer, checkpoint_every=4, progress="always") as (fmodel, diffopt):
        for _ in range(8):
            diffopt.step(fmodel(x).square().mean())
            list(fmodel.parameters(time=diffopt.report.steps // 2))
    assert diffopt.report.first_order_runs > 8
    assert bars.found == [["inner loop", 8, None, None, True]]


def test_the_full_unroll_shows_its_loop(bars: Bars) -> None:
    run(6)
    assert bars.found == [["inner loop", 6, None, None, True]]


def test_contexts_have_bars_of_their_own(bars: Bars) -> None:
    (model, optimizer, x), (other, other_optimizer, _) = problem(), problem()
    with (
        higher.innerloop_ctx(model, optimizer, checkpoint_every=2, progress="always") as (fmodel, diffopt),
        higher.innerloop_ctx(other, other_optimizer, checkpoint_every=3, progress="always") as (fother, other_opt),
    ):
        for _ in range(6):
            diffopt.step(fmodel(x).square().mean())
            other_opt.step(fother(x).square().mean())
        weights = [*fmodel.parameters(time=0), *fother.parameters(time=0)]
        torch.autograd.grad((fmodel(x) * fother(x)).mean(), weights)
    assert sorted(bars.found[2:]) == [
        ["outer backward", 3 + 6, 9, 9, True],
        ["outer backward", 4 + 6, 10, 10, True],
    ]
    assert bars.found[:2] == [["inner loop", 6, None, None, True]] * 2


def test_an_exception_in_the_loop_closes_the_bar(bars: Bars) -> None:
    model, optimizer, x = problem()
    with (
        pytest.raises(RuntimeError, match="mine"),
        higher.innerloop_ctx(model, optimizer, checkpoint_every=2, progress="always") as (fmodel, diffopt),
    ):
        diffopt.step(fmodel(x).square().mean())
        raise RuntimeError("mine")
    assert bars.found == [["inner loop", 1, None, None, True]]


def test_an_exception_in_a_replay_closes_the_bar(bars: Bars) -> None:
    model, optimizer, x = problem()
    with higher.innerloop_ctx(model, optimizer, checkpoint_every=2, progress="always") as (fmodel, diffopt):
        for _ in range(4):
            diffopt.step(fmodel(x).square().mean())
        outer = fmodel(torch.ones(2, 3)).mean()
    x.add_(1)
    with pytest.raises(higher.ExternalModifiedError):
        outer.backward()
    assert [row[4] for row in bars.found] == [True, True]


def test_an_exception_of_another_node_leaves_a_bar_that_the_context_closes(bars: Bars) -> None:
    model, optimizer, x = problem()

    def stop(_: object) -> None:
        raise RuntimeError("mine")

    with higher.innerloop_ctx(model, optimizer, checkpoint_every=2, progress="always") as (fmodel, diffopt):
        for _ in range(4):
            diffopt.step(fmodel(x).square().mean())
            if diffopt.report.steps == 2:
                next(fmodel.parameters()).grad_fn.register_prehook(stop)
        with pytest.raises(RuntimeError, match="mine"):
            fmodel(x).mean().backward()
    assert [row[4] for row in bars.found] == [True, True]


def test_a_backward_after_the_context_is_shown_and_closed(bars: Bars) -> None:
    model, optimizer, x = problem()
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False, checkpoint_every=2, progress="always") as (
        fmodel,
        diffopt,
    ):
        for _ in range(4):
            diffopt.step(fmodel(x).square().mean())
    torch.autograd.grad(fmodel(x).mean(), fmodel.gradient_edges(time=2))
    assert bars.found[-1][0] == "outer backward"
    assert bars.found[-1][4]


@pytest.mark.usefixtures("either")
def test_silent_unless_asked_and_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, asked in ((Terminal(), False), (io.StringIO(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        run(5, checkpoint_every=2, progress=asked)
        assert stream.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    run(5, checkpoint_every=2, progress="always")
    assert "outer backward" in stream.getvalue()


@pytest.mark.usefixtures("either")
def test_what_a_terminal_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    run(12, checkpoints=3, steps=12, progress=True)
    lines = [line.split("\r")[-1] for line in stream.getvalue().rstrip("\n").split("\n")]
    assert len(lines) == 2
    assert lines[0].startswith("inner loop: ")
    assert "12/12" in lines[0]
    assert lines[1].startswith("outer backward: ")
    total = optimal_runs(12, 3)  # less the loop's 12, and 12 differentiated
    assert f"{total}/{total}" in lines[1]


def test_the_line_tells_the_time_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    line = Line("inner loop", "step", 40, 10)
    for _ in range(10):
        now[0] += 61.0
        line.update()
    assert stream.getvalue().endswith("\rinner loop: 20/40 steps, 10:10 elapsed, 20:20 to go")
    now[0] += 3600
    line.close()
    assert stream.getvalue().endswith("\rinner loop: 20/40 steps, 1:10:10 elapsed, 2:20:20 to go\n")


def test_a_shorter_text_covers_the_longer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    line = Line("inner loop", "step", 2, 0)
    for _ in range(2):
        now[0] += 3600.0
        line.update()
    assert stream.getvalue() == (
        "\rinner loop: 1/2 steps, 1:00:00 elapsed, 1:00:00 to go\rinner loop: 2/2 steps, 2:00:00 elapsed, 0:00 to go   "
    )


def test_the_line_is_not_written_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    line = Line("inner loop", "step", None, 0)
    for _ in range(1000):
        now[0] += 0.001
        line.update()
    line.close()
    assert 4 <= stream.getvalue().count("\r") <= 7
    assert stream.getvalue().endswith("\rinner loop: 1000 steps, 0:01 elapsed\n")


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_other_values_are_refused(value: Any) -> None:
    model, optimizer, _ = problem()
    with (
        pytest.raises(ValueError, match=r"progress=.* is unknown; it can be False, True .*'always'"),
        higher.innerloop_ctx(model, optimizer, progress=value),
    ):
        pass


def test_progress_by_itself_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    calls: list[Callable[[], Any]] = [lambda: shown.step(1), lambda: shown.begin_backward(lambda: 3), shown.run]
    for call in [*calls, shown.close]:
        call()
    assert capsys.readouterr().err == ""
