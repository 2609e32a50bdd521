"""What a run reports of itself: every field, at any moment, as a value that stays as it was read."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem_higher as higher
from lowmem_higher.report import Report, Timeline, format_bytes

FIELDS = [
    "steps",
    "first_order_runs",
    "second_order_runs",
    "checkpoints_held",
    "checkpoints_peak",
    "carry_bytes",
    "carries_peak_bytes",
    "externals_bytes",
    "forward_seconds",
    "backward_seconds",
    "update_runs",
    "journal_bytes",
    "stored_bytes",
    "stored_peak_bytes",
    "unrolled_steps",
    "compile_seconds",
    "timeline",
]
NOT_COUNTS = ("forward_seconds", "backward_seconds", "compile_seconds", "timeline")


class WithBuffer(nn.Module):
    """24 weights and 6 + 6 + 1 numbers of a BatchNorm as buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x))


def counts(report: Report) -> dict[str, Any]:
    return {key: value for key, value in report.as_dict().items() if key not in NOT_COUNTS}


def test_every_field_at_every_moment() -> None:
    model, x = nn.Linear(3, 2, bias=False), torch.randn(5, 3)
    weights, momentum = 4 * 6, 4 * 6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False, checkpoint_every=2) as (fmodel, diffopt):
        assert counts(diffopt.report) == counts(Report())
        for _ in range(5):
            diffopt.step(fmodel(x).square().mean())
            seen.append(diffopt.report)
        fmodel(x).mean().backward(retain_graph=True)
        kept = diffopt.report
        fmodel(x).mean().backward()
        done = diffopt.report
    assert [report.steps for report in seen] == [1, 2, 3, 4, 5]  # a report is a value: the earlier ones stay
    assert [report.first_order_runs for report in seen] == [1, 2, 3, 4, 5]
    assert [report.checkpoints_held for report in seen] == [1, 1, 2, 2, 3]
    assert [report.checkpoints_peak for report in seen] == [1, 1, 2, 2, 3]
    assert [report.carry_bytes for report in seen] == [weights] * 2 + [weights + momentum] * 3
    assert [report.carries_peak_bytes for report in seen] == [24, 24, 24 + 48, 24 + 48, 24 + 2 * 48]
    assert [report.externals_bytes for report in seen] == [x.nbytes] * 5
    assert all(report.second_order_runs == 0 and report.backward_seconds == 0 for report in seen)
    assert counts(kept) == {
        **counts(seen[-1]),
        "first_order_runs": 5 + 2,
        "second_order_runs": 5,
        "carries_peak_bytes": 24 + 3 * 48,  # the last checkpoint is alone in its segment; then one carry is replayed
    }
    assert counts(done) == {
        **counts(kept),
        "first_order_runs": 5 + 2 + 2,
        "second_order_runs": 10,
        "checkpoints_held": 0,
        "externals_bytes": 0,
    }


def test_buffers_are_part_of_the_carry() -> None:
    model = WithBuffer()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer, checkpoint_every=1) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(fmodel(torch.randn(5, 3)).square().sum())
    buffers = 4 * 6 + 4 * 6 + 8
    assert diffopt.report.carry_bytes == 3 * 4 * 18 + buffers


def test_seconds_are_those_of_the_loop_and_of_the_pullbacks() -> None:
    """Compared with the clock around the same code only, so that no machine is too slow for it."""
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    with higher.innerloop_ctx(
        model, torch.optim.SGD(model.parameters(), lr=0.1), copy_initial_weights=False, checkpoint_every=3
    ) as (fmodel, diffopt):
        started = time.perf_counter()
        for _ in range(6):
            diffopt.step(fmodel(x).square().mean())
        loop = time.perf_counter() - started
        report = diffopt.report
        assert report.forward_seconds >= loop
        started = time.perf_counter()
        fmodel(x).mean().backward()
        backward = time.perf_counter() - started
    assert 0 < diffopt.report.backward_seconds <= backward
    assert diffopt.report.forward_seconds == report.forward_seconds  # only steps add to it


@pytest.mark.parametrize("tracked", [True, False])
def test_the_full_unroll_reports_too(tracked: bool) -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=tracked) as (fmodel, diffopt):
        for _ in range(4):
            diffopt.step(fmodel(x).square().mean())
    report = diffopt.report
    assert counts(report) == {
        **counts(Report()),
        "steps": 4,
        "unrolled_steps": 4,
        "first_order_runs": 0 if tracked else 4,
        "second_order_runs": 4 if tracked else 0,
    }
    assert report.forward_seconds > 0


def test_a_step_that_raises_is_not_counted() -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer, checkpoint_every=2) as (fmodel, diffopt):
        diffopt.step(fmodel(x).square().mean())
        before = counts(diffopt.report)
        with pytest.raises(ValueError, match="shape"):
            diffopt.step(fmodel(x))
        assert counts(diffopt.report) == before


def test_two_contexts_count_apart() -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        higher.innerloop_ctx(model, optimizer, checkpoint_every=2) as (fmodel, diffopt),
        higher.innerloop_ctx(model, optimizer, checkpoint_every=1) as (other_model, other_opt),
    ):
        for t in range(4):
            diffopt.step(fmodel(x).square().mean())
            if t < 3:
                other_opt.step(other_model(x).square().mean())
    assert (diffopt.report.steps, diffopt.report.checkpoints_held) == (4, 2)
    assert (other_opt.report.steps, other_opt.report.checkpoints_held) == (3, 3)


def test_as_dict_is_plain_and_goes_through_json() -> None:
    report = Report(steps=3, forward_seconds=0.5)
    assert list(report.as_dict()) == FIELDS
    assert Report(**json.loads(json.dumps(report.as_dict()))) == report
    assert [field.name for field in dataclasses.fields(Report)] == FIELDS


def test_a_report_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Report().steps = 3  # type: ignore[misc]  # that is the point


def test_repr_reads_well() -> None:
    report = Report(1000, 1967, 1000, 2, 33, 10_576, 650_424, 3_221_225_472, 1.25, 0.0625)
    assert repr(report) == (
        "Report: 1000 steps; 1967 first-order and 1000 second-order runs\n"
        "  checkpoints: 2 held, 33 at most, 10.3 KiB each; carries took 635.2 KiB at most\n"
        "  externals: 3.0 GiB\n"
        "  seconds: 1.250 in the loop, 0.062 in replays and pullbacks"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2, "1.0 MiB"),
        (5 * 1024**3, "5.0 GiB"),
        (5000 * 1024**3, "5000.0 GiB"),
    ],
)
def test_bytes_are_shown_as_a_person_reads_them(count: int, text: str) -> None:
    assert format_bytes(count) == text


# The timeline


def test_timeline_of_a_small_run() -> None:
    """Carries of 24 bytes, and 48 with the momentum; the batch of 60 bytes is held until the backward is over."""
    model, x = nn.Linear(3, 2, bias=False), torch.randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False, checkpoint_every=2) as (fmodel, diffopt):
        assert diffopt.report.timeline == ()
        for _ in range(5):
            diffopt.step(fmodel(x).square().mean())
        loop = diffopt.report.timeline
        fmodel(x).mean().backward()
    assert loop == tuple(
        ("forward", step, 60 + size) for step, size in enumerate([24, 24, 24 + 48, 24 + 48, 24 + 2 * 48])
    )
    report = diffopt.report
    assert report.timeline == (
        *loop,
        ("backward", 4, 60 + 24 + 2 * 48),
        ("backward", 3, 60 + 24 + 2 * 48),  # carry 4 is gone, carry 3 replayed
        ("backward", 2, 60 + 24 + 48),
        ("backward", 1, 60 + 24 + 48),
        ("backward", 0, 60 + 24),
    )
    assert max(size for _, _, size in report.timeline) <= report.carries_peak_bytes + x.nbytes
    assert Report(**json.loads(json.dumps(report.as_dict()))) == report


def test_the_full_unroll_has_no_timeline(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (fmodel, diffopt):
        diffopt.step(fmodel(torch.randn(5, 3)).square().mean())
    assert diffopt.report.timeline == ()
    with pytest.raises(ValueError, match=r"no timeline to draw.*checkpoint_every=10"):
        diffopt.report.plot(tmp_path / "run.png")


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 1002, 2500, 40_000])
def test_a_timeline_is_thinned_evenly_and_keeps_its_heights(count: int) -> None:
    timeline = Timeline()
    for step in range(count):
        timeline.add("forward", step, (step * 7919) % 10_007)
    for step in reversed(range(count)):
        timeline.add("backward", step, 20_000 + step)
    samples = timeline.samples()
    assert len(samples) <= 1000
    assert len(samples) >= min(2 * count, 400)
    assert [phase for phase, _, _ in samples] == sorted((phase for phase, _, _ in samples), reverse=True)
    forward = [step for phase, step, _ in samples if phase == "forward"]
    backward = [step for phase, step, _ in samples if phase == "backward"]
    assert forward == sorted(set(forward))
    assert backward == sorted(set(backward), reverse=True)
    assert max(size for phase, _, size in samples if phase == "forward") == max(
        (step * 7919) % 10_007 for step in range(count)
    )
    assert samples[len(forward)] == ("backward", count - 1, 20_000 + count - 1)
    stretches = [after - before for before, after in itertools.pairwise(forward)]
    assert max(stretches, default=1) <= 2 * max(1, 4 * count / 1000)
    for phase, step, size in samples:
        assert size == ((step * 7919) % 10_007 if phase == "forward" else 20_000 + step)


def test_plot_saves_a_picture(tmp_path: Path) -> None:
    timeline = [("forward", step, 1000 * step) for step in range(20)] + [("backward", 19, 30_000)]
    Report(timeline=timeline).plot(tmp_path / "run.png")
    Report(timeline=timeline[:1]).plot(str(tmp_path / "one.png"))
    for name in ("run.png", "one.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "lowmem_higher\[plot\]"'):
        Report(timeline=[("forward", 0, 1)]).plot(tmp_path / "run.png")


def test_what_becomes_one_sample_is_the_largest() -> None:
    timeline = Timeline()
    for step in range(3000):
        timeline.add("forward", step, step % 7)
    sizes = [size for _, _, size in timeline.samples()]
    assert len(sizes) == 750
    assert min(sizes) == 3  # the largest of four in a row
