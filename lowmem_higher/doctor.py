"""`python -m lowmem_higher doctor`: what is installed, what is odd about it, and a gradient that proves itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem_higher.budget import free_bytes
from lowmem_higher.innerloop import innerloop_ctx
from lowmem_higher.probes import missing_internals, second_derivatives
from lowmem_higher.report import format_bytes
from lowmem_higher.testing import live_bytes

_OPTIONAL = (
    ("matplotlib", "plot", "pictures of plans and reports"),
    ("tqdm", "progress", "progress bars"),
    ("scikit-learn", "demo", "the data of the main job"),
    ("psutil", "test", "resident size in profiles"),
)
_STEPS = 7
_TOLERANCE = 1e-9
_SECOND_DERIVATIVE_IS_OFF = 1e-5


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        kind: "ok", "note" (to know, nothing to repair) or "WRONG".
        about: What was looked at.
        text: What was found; of something wrong also what to do.
    """

    kind: str
    about: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind:>5}  {self.about}: {self.text}"


def examine() -> Iterator[Finding]:
    """Everything that `doctor` looks at, in the order of its report; takes a few seconds."""
    yield _python()
    yield from _torch()
    yield from _devices()
    yield from _optional_packages()
    for device in _found_devices():
        yield from _odd_derivatives(device)
        yield from _gradients(device)
    yield _memory()


def doctor() -> int:
    """Prints what is installed, what is odd about it, and whether small gradients are right.

    Returns:
        0, or 1 if something is wrong.
    """
    started = time.perf_counter()
    wrong = 0
    for finding in examine():
        print(finding, flush=True)
        wrong += finding.kind == "WRONG"
    verdict = f"{wrong} WRONG, see above" if wrong else "nothing is wrong"
    print(f"\n{verdict} ({time.perf_counter() - started:.1f} s)")
    return 1 if wrong else 0


# --------------------------------------------------------------------------------------------------------- installed


def _python() -> Finding:
    import lowmem_higher

    where = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Finding("ok", "lowmem_higher", f"{lowmem_higher.__version__}, {where}")


def _torch() -> Iterator[Finding]:
    version = torch.__version__
    admitted = _admitted_range()
    if admitted is None:
        yield Finding("note", "torch", f"{version}; this package is not installed, so nobody checked the version")
    else:
        least, above = admitted
        inside = least <= _numbers(version) < above
        spelled = f"torch>={'.'.join(map(str, least))},<{'.'.join(map(str, above))}"
        advice = f"{version} is none of the admitted versions: pip install '{spelled}'"
        yield Finding("ok" if inside else "WRONG", "torch", version if inside else advice)
    if missing := missing_internals():
        yield Finding("WRONG", "torch", f"has no {', '.join(missing)}: pip install 'torch>=2.5'")


def _admitted_range() -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    try:
        lines = importlib.metadata.requires("lowmem_higher") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    (line,) = [line for line in lines if re.match(r"torch\b", line)]
    bounds = {sign: _numbers(number) for sign, number in re.findall(r"(>=|<)([\d.]+)", line)}
    return bounds[">="], bounds["<"]


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _found_devices() -> list[torch.device]:
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def _devices() -> Iterator[Finding]:
    free = free_bytes(nn.Module())
    memory = "" if free is None else f", {format_bytes(free)} free"
    yield Finding("ok", "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch{memory}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, whole = torch.cuda.mem_get_info(index)
            memory = f"{format_bytes(free)} of {format_bytes(whole)} free"
            yield Finding("ok", f"CUDA {index}", f"{torch.cuda.get_device_name(index)}, {memory}")
        yield Finding("note", "CUDA", "the CUDA tests of this package were never run; what follows is measured here")
    else:
        yield Finding("note", "CUDA", "no device; everything runs on the CPU")


def _optional_packages() -> Iterator[Finding]:
    for package, extra, purpose in _OPTIONAL:
        try:
            yield Finding("ok", package, f"{importlib.metadata.version(package)}, for {purpose}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding("note", package, f'not installed; for {purpose}: pip install "lowmem_higher[{extra}]"')
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        yield Finding("note", "C++ compiler", "none; only compile=True needs one, and then: apt-get install g++")
    else:
        yield Finding("ok", "C++ compiler", "found, for compile=True")


# ------------------------------------------------------------------------------------------------------------ probed


def _odd_derivatives(device: torch.device) -> Iterator[Finding]:
    for name, alone, inside in second_derivatives(device):
        about = f"{name} on {device}"
        if isinstance(inside, str) or inside > _SECOND_DERIVATIVE_IS_OFF:
            yield Finding("WRONG", about, f"in a context its second derivative {_off(inside)}. {_REPORT}")
        elif isinstance(alone, str) or alone > _SECOND_DERIVATIVE_IS_OFF:
            right = "in a context another form is used, which is right"
            yield Finding("note", about, f"torch's own second derivative {_off(alone)}; {right}")
        else:
            yield Finding("ok", about, "the second derivative is right")


_REPORT = "Leave such a layer out of the inner loop, and report this line with the versions above."


def _off(deviation: float | str) -> str:
    return f"raises ({deviation})" if isinstance(deviation, str) else f"is off by {deviation:.2g} times its norm"


# --------------------------------------------------------------------------------------------------------- self-test


def _gradients(device: torch.device) -> Iterator[Finding]:
    """Small meta-gradients: the full unroll against finite differences, each setting against the full unroll."""
    about = f"gradient on {device}"
    try:
        _, unrolled = small_loop(device)
        deviation = _from_finite_differences(device, unrolled)
    except Exception as error:  # noqa: BLE001  (whatever is broken here is what the reader came for)
        yield Finding("WRONG", about, _failure("the full unroll", error))
        return
    if not deviation < 1e-5:
        advice = f"differs by {deviation:.1e} from finite differences. {_REPORT}"
        yield Finding("WRONG", about, f"the full unroll's {advice}")
    else:
        yield Finding("ok", about, f"the full unroll's is that of finite differences, to {deviation:.1e}")
    with tempfile.TemporaryDirectory() as folder:
        settings: list[dict[str, Any]] = [
            {"checkpoint_every": 3},
            {"checkpoint_every": 3, "replay": "torch"},
            {"checkpoint_every": 3, "graphs": 3},
            {"checkpoint_every": 3, "journal": True},
            {"checkpoint_every": 3, "pullback": "mixed"},
            {"checkpoints": 2},
            {"checkpoints": 2, "steps": _STEPS, "store": folder},
            {"memory_budget": "1GiB"},
            {"checkpoint_every": None, "recomputed": True},
            {"checkpoint_every": 3, "recomputed": True},
        ]
        for setting in settings:
            yield _compared(about, _label(setting), setting, unrolled)


def _label(setting: dict[str, Any]) -> str:
    shown = {name: "a directory" if name == "store" else value for name, value in setting.items()}
    recomputed = " and torch.utils.checkpoint in the model" if shown.pop("recomputed", False) else ""
    return ", ".join(f"{name}={value!r}" for name, value in shown.items()) + recomputed


def _compared(about: str, label: str, setting: dict[str, Any], unrolled: Tensor) -> Finding:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, found = small_loop(unrolled.device, **setting)
    except Exception as error:  # noqa: BLE001
        return Finding("WRONG", about, _failure(label, error))
    deviation = ((found - unrolled).norm() / unrolled.norm()).item()
    if not deviation <= _TOLERANCE:
        return Finding("WRONG", about, f"{label} differs by {deviation:.1e} from the full unroll. {_REPORT}")
    if caught:
        return Finding("note", about, f"{label} is right, with a warning: {str(caught[0].message).splitlines()[0]}")
    return Finding("ok", about, f"{label} is that of the full unroll, to {deviation:.1e}")


def _failure(label: str, error: Exception) -> str:
    return f"{label} ended in {type(error).__name__}: {' '.join(str(error).split())}. {_REPORT}"


class _Recomputed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return out


def small_loop(
    device: torch.device, rate: float = 0.05, recomputed: bool = False, **settings: Any
) -> tuple[float, Tensor]:
    """The outer loss of a small loop, and its gradient by learning rate, example weights and initial weights.

    Example:
        >>> loss, exact = small_loop(torch.device("cpu"))
        >>> torch.testing.assert_close(small_loop(torch.device("cpu"), checkpoint_every=2)[1], exact)
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)

    kind = _Recomputed if recomputed else nn.Sequential
    model = kind(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double().to(device)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(drawn(*param.shape))
    x, y, weights = drawn(12, 4), drawn(12, 1), torch.zeros(12, dtype=torch.float64, device=device).requires_grad_()
    lr = torch.tensor(rate, dtype=torch.float64, device=device, requires_grad=True)
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    wanted = [lr, weights, *model.parameters()]
    with (
        torch.enable_grad(),
        innerloop_ctx(model, opt, copy_initial_weights=False, override={"lr": [lr]}, **settings) as (fmodel, diffopt),
    ):
        for step in range(_STEPS):
            rows = slice(step, step + 5)
            diffopt.step((weights[rows].exp() * (fmodel(x[rows]) - y[rows]).square().mean(1)).mean())
        outer = (fmodel(x) - y).square().mean()
        return outer.item(), torch.cat([grad.flatten() for grad in torch.autograd.grad(outer, wanted)])


def _from_finite_differences(device: torch.device, unrolled: Tensor) -> float:
    """How far the derivative by the learning rate is off, relatively."""
    above, below = (small_loop(device, rate)[0] for rate in (0.05 + 1e-5, 0.05 - 1e-5))
    expected = (above - below) / 2e-5
    return abs(unrolled[0].item() - expected) / abs(expected)


def _memory() -> Finding:
    """Live bytes of a loop, as it is and checkpointed."""
    peaks = []
    for every in (None, 6):
        model = nn.Linear(32, 32)
        x = torch.ones(64, 32)
        with live_bytes() as memory:
            opt = torch.optim.SGD(model.parameters(), lr=0.01)
            with innerloop_ctx(model, opt, copy_initial_weights=False, checkpoint_every=every) as (fmodel, diffopt):
                for _ in range(36):
                    diffopt.step(fmodel(x).tanh().square().mean())
                torch.autograd.grad(fmodel(x).sum(), list(model.parameters()))
        peaks.append(memory.peak)
    shown = f"{format_bytes(peaks[0])} in the full unroll of 36 steps, {format_bytes(peaks[1])} with checkpoint_every=6"
    if not peaks[1] < peaks[0] / 2:
        return Finding("WRONG", "memory", f"{shown}: nothing is saved. {_REPORT}")
    return Finding("ok", "memory", shown)
