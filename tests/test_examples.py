"""The two example programs, in short: they learn, they print, and their gradients are those of `higher`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_higher.examples import energy, few_shot

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
