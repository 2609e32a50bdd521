"""What every test gets: the same seed and thread count, and a check that it leaves torch as it found it (rule R12)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import settings

# One thread: the sums come out in the same order on every machine, and small nets are not slowed by waking threads.
torch.set_num_threads(1)

# A property's first example may include an import or a warm-up; seconds are the benchmarks' business.
settings.register_profile("lowmem_higher", parent=settings(), deadline=None)
settings.load_profile("lowmem_higher")

GlobalState = dict[str, object]


def read_global_state() -> GlobalState:
    """Everything torch keeps outside of tensors and modules that a replay touches, or could leave behind."""
    backends, checkpoint = torch.backends, torch.utils.checkpoint
    state: GlobalState = {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.empty(0).device,
        "threads": torch.get_num_threads(),
        "anomaly detection": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "modes for torch functions": torch._C._len_torch_function_stack(),
        "torch function disabled": not torch._C._is_torch_function_enabled(),
        "modes for dispatch": torch._C._len_torch_dispatch_stack(),
        "functorch level": torch._C._functorch.peek_interpreter_stack() is not None,
        "hooks on all modules": {
            name: dict(hooks)
            for name, hooks in vars(torch.nn.modules.module).items()
            if name.startswith("_global_") and isinstance(hooks, dict)
        },
        "custom functions' apply": (
            vars(torch.autograd.Function)["apply"],
            vars(torch.autograd.function._SingleLevelFunction).get("apply"),
        ),
    }
    if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):  # not yet in torch 2.6
        state["hooks on saved tensors"] = torch._C._autograd._top_saved_tensors_default_hooks(True)
    for device in ("cpu", "cuda"):
        state[f"autocast on {device}"] = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    for flag in ("enabled", "benchmark", "deterministic", "allow_tf32"):
        state[f"cudnn.{flag}"] = getattr(backends.cudnn, flag)
    for flag in ("math", "flash", "mem_efficient", "cudnn"):
        state[f"scaled_dot_product_attention.{flag}"] = getattr(backends.cuda, f"{flag}_sdp_enabled")()
    for owner in (
        checkpoint,
        torch.autograd,
        torch.autograd.graph,
        torch.Tensor,
        torch.nn.Module,
        torch.optim.Optimizer,
    ):
        for name, value in vars(owner).items():
            if callable(value):
                state[f"{owner.__name__}.{name}"] = value
    return state


def changed(before: GlobalState, after: GlobalState) -> list[str]:
    """One line per difference, in words."""
    return [
        f"{name}: {before.get(name, 'absent')} before, {after.get(name, 'absent')} after"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, "absent") != after.get(name, "absent")
    ]


@pytest.fixture(autouse=True)
def leaves_torch_as_it_was() -> Iterator[None]:
    """Seed the test, and fail it if any of torch's global state differs after it."""
    torch.manual_seed(0)
    before = read_global_state()
    yield
    differences = changed(before, read_global_state())
    if differences:
        pytest.fail("the test left torch's global state changed:\n  " + "\n  ".join(differences), pytrace=False)


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 as the default dtype for one test: `@pytest.mark.usefixtures("float64")`."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@pytest.fixture
def global_state() -> Callable[[], GlobalState]:
    """Reads torch's global state, for a test that compares it itself (after an exception, say)."""
    return read_global_state


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `cuda` needs a device."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
