"""`doctor`: nothing is wrong here, what is broken is called wrong, and what is only missing is not."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_higher import doctor, probes
from lowmem_higher.__main__ import main
from lowmem_higher.doctor import Finding, small_loop

CPU = torch.device("cpu")


def wrong(findings: Iterator[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.kind == "WRONG"]


def test_nothing_is_wrong_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "WRONG" not in printed
    assert torch.__version__ in printed
    assert "is that of finite differences" in printed
    assert "checkpoints=2, steps=7, store='a directory' is that of the full unroll" in printed
    assert printed.splitlines()[-1].startswith("nothing is wrong (")


def test_its_loop_has_a_gradient_everywhere() -> None:
    _, found = small_loop(CPU)
    assert found.numel() == 1 + 12 + 37
    assert (found != 0).sum() >= found.numel() - 1  # one example is in no batch


def test_a_wrong_replay_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def slightly_off(*args: Any, **settings: Any) -> tuple[float, Tensor]:
        loss, found = small_loop(*args, **settings)
        return loss, found * (1 + 1e-6 * ("journal" in settings))

    monkeypatch.setattr(doctor, "small_loop", slightly_off)
    (finding,) = wrong(doctor._gradients(CPU))
    assert "checkpoint_every=3, journal=True differs by 1.0e-06" in finding.text
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 WRONG, see above")


def test_a_wrong_unroll_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(*args: Any, **settings: Any) -> tuple[float, Tensor]:
        loss, found = small_loop(*args, **settings)
        return loss, found / 2

    monkeypatch.setattr(doctor, "small_loop", half)
    (finding,) = wrong(doctor._gradients(CPU))
    assert "differs by 5.0e-01 from finite differences" in finding.text


def test_an_error_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device, *args: Any, **settings: Any) -> tuple[float, Tensor]:
        if "checkpoints" in settings:
            raise RuntimeError("no such\nkernel")
        return small_loop(device, *args, **settings)

    monkeypatch.setattr(doctor, "small_loop", broken)
    findings = wrong(doctor._gradients(CPU))
    assert len(findings) == 2
    assert all("ended in RuntimeError: no such kernel." in finding.text for finding in findings)


def test_a_kernel_that_no_context_repairs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the replacement torch's own weight_norm runs, whose second derivative is wrong on a CPU.
    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    monkeypatch.setattr(probes, "second_order", nothing)
    alone = {name: deviation for name, deviation, _ in probes.second_derivatives(CPU)}
    expected = {name for name, deviation in alone.items() if isinstance(deviation, str) or deviation > 1e-5}
    assert {finding.about for finding in wrong(doctor._odd_derivatives(CPU))} == {f"{name} on cpu" for name in expected}
    assert "attention" in expected


def test_the_probe_tells_a_right_second_derivative_from_a_wrong_one() -> None:
    class Halved(torch.autograd.Function):
        """The second derivative of a square, times a half."""

        @staticmethod
        def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
            ctx.save_for_backward(grad, x)
            return 2 * grad * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            grad, x = ctx.saved_tensors
            return 2 * grads[0] * x, grads[0] * grad

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return Halved.apply(grads[0], x)

    x = torch.tensor([0.3, -0.7], dtype=torch.float64)
    assert probes._deviation(lambda x: x.square().sum(), [x]) < 1e-8
    assert probes._deviation(lambda x: Square.apply(x).sum(), [x]) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(("version", "kind"), [("2.5.0", "ok"), ("2.15.3+cu999", "ok"), ("2.4.1", "WRONG")])
def test_the_range_of_versions(monkeypatch: pytest.MonkeyPatch, version: str, kind: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    first = next(doctor._torch())
    assert first.kind == kind
    assert version in first.text
    assert ("pip install 'torch>=2.5,<2.16'" in first.text) == (kind == "WRONG")


def test_a_torch_without_a_part_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_INTERNALS", (*probes._INTERNALS, "_autograd._of_another_version"))
    (finding,) = wrong(doctor._torch())
    assert "has no torch._C._autograd._of_another_version: pip install" in finding.text


def test_what_is_missing_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    findings = list(doctor._optional_packages())
    assert {finding.kind for finding in findings} == {"note"}
    assert 'pip install "lowmem_higher[plot]"' in str(findings[0])


def test_memory_that_is_not_saved_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._memory().kind == "ok"
    context = doctor.innerloop_ctx
    monkeypatch.setattr(
        doctor, "innerloop_ctx", lambda model, opt, **settings: context(model, opt, copy_initial_weights=False)
    )
    assert doctor._memory().kind == "WRONG"


def test_the_internals_are_those_that_the_code_calls() -> None:
    assert probes.missing_internals() == []
    files = [path for path in Path(doctor.__file__).parent.rglob("*.py") if path.name != "probes.py"]
    package = "".join(path.read_text(encoding="utf-8") for path in files)
    assert not [name for name in probes._INTERNALS if f"torch._C.{name}" not in package]


def test_in_a_context_every_probe_is_right() -> None:
    found = {name: inside for name, _, inside in probes.second_derivatives(CPU)}
    assert set(found) == {"weight_norm", "attention", "recurrent layers"}
    assert all(isinstance(inside, float) and inside < 1e-6 for inside in found.values())
