"""The example programs, in short: they learn, they print, and they run on `higher` as well, with its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_higher.examples import (
    compare,
    distill,
    energy,
    few_shot,
    learned_loss,
    learned_optimizer,
    options,
    rates,
    reweight,
)
from lowmem_higher.optim import registry

higher = pytest.importorskip("higher")


def test_few_shot_learns(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = few_shot.main(["--tasks", "8", "--updates", "7", "--steps", "5", "--checkpoint-every", "2"])
    printed = capsys.readouterr().out
    assert after > before + 0.02
    assert "outer step 7 of 7" in printed
    assert f"{before:.1%} -> {after:.1%}" in printed


def test_energy_learns(capsys: pytest.CaptureFixture[str]) -> None:
    of_the_mean, of_the_energy = energy.main(["--updates", "130", "--steps", "6", "--batch", "32"])
    assert of_the_energy < 0.95 * of_the_mean
    assert f"{of_the_energy:.4f} by descent" in capsys.readouterr().out


def test_reweighting_finds_wrong_labels(capsys: pytest.CaptureFixture[str]) -> None:
    found = reweight.main(["--steps", "40", "--updates", "6", "--checkpoint-every", "7"])
    assert found["judged correctly"] > 0.75  # 0.6 if all were taken to be right
    assert found["learned weights"] > found["equal weights"]
    assert f"labels judged correctly: {found['judged correctly']:.1%}" in capsys.readouterr().out


def test_a_schedule_is_better_than_the_constant_that_it_starts_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "GRID", [(0.01, 1e-4), (1e-4, 1e-4)])
    found = rates.main(["--steps", "40", "--updates", "6", "--checkpoint-every", "7"])
    assert found["schedule"][0] < 0.8 * found["constant"][0]
    assert found["schedule"][1] > found["constant"][1]


def test_distilled_images_teach_more_than_real_ones(capsys: pytest.CaptureFixture[str]) -> None:
    real, distilled = distill.main(["--steps", "15", "--updates", "15", "--checkpoint-every", "4"])
    assert distilled > real + 0.1
    assert f"{distilled:.1%}" in capsys.readouterr().out


@pytest.fixture
def rules() -> Iterator[None]:
    before = dict(registry._rules)
    yield
    registry._rules.clear()
    registry._rules.update(before)


@pytest.mark.usefixtures("rules")
def test_a_learned_optimizer_gets_better() -> None:
    found = learned_optimizer.main(["--steps", "15", "--updates", "8", "--checkpoint-every", "4"])
    assert found["learned"] < 0.8 * found["before"]
    assert min(found["SGD"], found["Adam"]) < found["before"]  # the start is no better than what is known


def test_a_learned_loss_bears_wrong_labels_of_other_classes() -> None:
    plain, learned = learned_loss.main(["--steps", "60", "--updates", "20", "--checkpoint-every", "0"])
    assert learned > plain + 0.02


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize("name", ["learned_loss", "learned_optimizer", "reweight"])
def test_examples_run_on_higher_as_well(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_optimizer, "RIVALS", {"SGD": learned_optimizer.RIVALS["SGD"][:1]})
    found = compare.main([name, "--updates", "1", "--steps", "24"])
    peaks, printed = zip(*found.values(), strict=True)
    assert printed[1] == printed[2]
    assert peaks[0] < 0.8 * min(peaks[1:])


def test_options_for_a_full_unroll_are_no_keywords() -> None:
    assert options.parse("", ["--checkpoint-every", "0"], checkpoint_every=5, truncate=0).settings == {}
    parsed = options.parse("", ["--truncate", "3"], checkpoint_every=5, truncate=0)
    assert parsed.settings == {"checkpoint_every": 5, "truncate": 3}
    assert parsed.seed == 0


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_few_shot_gradients_are_those_of_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, few_shot.WAYS)).double()
    task = few_shot.draw_task([images.double() for images in few_shot.digits_by_class()])

    def gradients(**settings: Any) -> list[Tensor]:
        loss, _ = few_shot.adapted(model, task, 5, **settings)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    found = [gradients(checkpoint_every=every) for every in (None, 2)]
    monkeypatch.setattr(few_shot, "higher", higher)
    for ours in found:
        assert_same(ours, gradients())


def test_energy_gradients_are_those_of_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = energy.Energy(), torch.rand(5, energy.HALF)

    def gradients() -> list[Tensor]:
        outer = (energy.completed(model, x, 6) - 0.2).square().sum()
        return list(torch.autograd.grad(outer, list(model.parameters())[:3]))

    ours = gradients()
    monkeypatch.setattr(energy.higher, "get_diff_optim", higher.get_diff_optim)
    for a, b in zip(ours, gradients(), strict=True):
        assert b.norm() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)  # both in float32
