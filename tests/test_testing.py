"""The measuring tools themselves: each property has a test that goes red when the tool is broken."""

from __future__ import annotations

import copy
import gc
import io
import math
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowmem_higher.testing import assert_matches_unrolled, live_bytes, taylor_test

# ---------------------------------------------------------------------------------------------------- live_bytes

BYTES = 4  # of one float32


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """What dies in these tests dies by reference counting alone."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
class TestLiveBytes:
    def test_counts_what_is_alive_and_what_was_at_most(self) -> None:
        with live_bytes() as memory:
            assert (memory.current, memory.peak) == (0, 0)
            a = torch.zeros(100)
            assert memory.current == 100 * BYTES
            b = a.exp() + 1  # exp's result is alive while the sum is made
            assert (memory.current, memory.peak) == (200 * BYTES, 300 * BYTES)
            del a
            assert (memory.current, memory.peak) == (100 * BYTES, 300 * BYTES)
            memory.reset_peak()
            assert memory.peak == 100 * BYTES
            c = b.double()
            assert (memory.current, memory.peak) == (300 * BYTES, 300 * BYTES)
            memory.reset_peak()
        del b, c
        assert (memory.current, memory.peak) == (0, 300 * BYTES)
        memory.reset_peak()
        assert memory.peak == 0

    def test_two_runs_give_the_same_numbers(self) -> None:
        def run() -> tuple[int, int]:
            net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
            with live_bytes() as memory:
                net(torch.randn(32, 8)).square().mean().backward()
            return memory.current, memory.peak

        first = run()
        assert first == run()
        assert first[0] == sum(size * BYTES for size in (8 * 16, 16, 16, 1))  # the gradients
        assert first[1] > first[0]

    @pytest.mark.parametrize(
        ("make", "nbytes"),
        [
            (lambda: torch.tensor([1.0, 2.0]), 8),
            (lambda: torch.tensor([torch.tensor(1.0), torch.tensor(2.0)]), 8),
            (lambda: torch.Tensor([1.0, 2.0]), 8),
            (lambda: torch.FloatTensor(3), 12),
            (lambda: torch.from_numpy(np.ones(3)), 24),
            (lambda: torch.as_tensor(np.ones(3)), 24),
            (lambda: torch.asarray([1.0]), 4),
            (lambda: torch.empty(3), 12),
            (lambda: torch.full((3,), 2.0), 12),
            (lambda: torch.arange(3), 24),
            (lambda: torch.rand(3), 12),
            (lambda: torch.ones(3).to(torch.float64), 24),
            (lambda: torch.ones(3).new_tensor([1.0, 2.0]), 8),
            (lambda: torch.nn.Parameter(torch.ones(3)), 12),
            (lambda: torch.nn.Linear(3, 2), 32),
            (lambda: torch.zeros(()).expand(1000), 4),
            (lambda: torch.ones(1000)[10], 4000),
            (lambda: torch.ones(4).unbind(), 16),
            (lambda: torch.empty(7, device="meta"), 28),
            (lambda: torch.eye(4).to_sparse(), 2 * 4 * 8 + 4 * 4),
            (lambda: torch.ones(2) * 3.0, 8),
            (lambda: torch.ones(3).max(0), 4 + 8),
            (lambda: torch._foreach_mul([torch.ones(2), torch.ones(3)], 2.0), 20),
            (lambda: torch._efficientzerotensor((1000,)), 0),
            (lambda: torch.ones(10).to_mkldnn() if torch.backends.mkldnn.is_available() else None, 0),
        ],
    )
    def test_every_way_to_make_a_tensor(self, make: Callable[[], Any], nbytes: int) -> None:
        with live_bytes() as memory:
            made = make()
            assert memory.current == nbytes
            del made
            assert memory.current == 0

    def test_copies_of_outside_tensors_count_and_the_originals_do_not(self) -> None:
        outside = torch.ones(100)
        file = io.BytesIO()
        torch.save(outside, file)
        file.seek(0)
        with live_bytes() as memory:
            copied = copy.deepcopy({"x": outside, "view": outside[3:]})  # sharing survives deepcopy: one storage
            assert memory.current == 100 * BYTES
            loaded = torch.load(file, weights_only=True)
            assert memory.current == 200 * BYTES
            del copied, loaded
            assert memory.current == 0

    def test_views_and_in_place_operations_on_outside_tensors_do_not_count(self) -> None:
        outside, indices = torch.ones(100), torch.arange(3)
        with live_bytes() as memory:
            views = [
                outside.view(10, 10),
                outside[5:],
                outside.detach(),
                outside.data,
                outside[None],
                *outside.split(30),
            ]
            outside.add_(1.0)
            torch.exp(torch.ones(100), out=outside)
            outside[0] = 3.0
            alias = torch.empty(0).set_(outside)
            alias_of_storage = torch.empty(0).set_(outside.untyped_storage())
            unchanged = [torch.as_tensor(outside), torch.asarray(outside)]
            assert memory.current == 0
            chosen = outside[indices]
            assert memory.current == 3 * BYTES
        del views, alias, alias_of_storage, unchanged, chosen
        assert memory.current == 0

    def test_a_view_keeps_the_whole_storage_alive_and_counts_once(self) -> None:
        with live_bytes() as memory:
            x = torch.ones(100)
            view = x.view(10, 10)[0]
            del x
            assert memory.current == memory.peak == 100 * BYTES
            del view
            assert memory.current == 0

    def test_saved_tensors_live_until_the_backward(self) -> None:
        w = torch.ones(100, requires_grad=True)
        with live_bytes() as memory:
            loss = w.exp().sum()  # exp saves its result; no Python variable holds it
            assert memory.current == 101 * BYTES
            loss.backward()
            assert w.grad is not None
            assert memory.current == 101 * BYTES  # the gradient took its place
            w.grad = None
            assert memory.current == 1 * BYTES

    def test_functions_of_the_users_own_are_seen_forward_and_backward(self) -> None:
        held: list[torch.Tensor] = []

        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                ctx.save_for_backward(x, torch.ones(50))
                return x * x

            @staticmethod
            def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
                held.append(torch.ones(7))
                x: torch.Tensor = ctx.saved_tensors[0]
                return 2 * x * cotangent

        x = torch.ones(100, requires_grad=True)
        with live_bytes() as memory:
            y = Square.apply(x)
            assert memory.current == 150 * BYTES
            y.sum().backward()
            del y
            x.grad = None
            assert memory.current == 7 * BYTES

    def test_recomputation_in_checkpoint_is_seen(self) -> None:
        def block(x: torch.Tensor) -> torch.Tensor:
            for _ in range(4):
                x = x.sin()
            return x

        def peaks(run: Callable[[torch.Tensor], torch.Tensor]) -> tuple[int, int]:
            x = torch.ones(1000, requires_grad=True)
            with live_bytes() as memory:
                y = run(run(x))
                forward = memory.current
                memory.reset_peak()
                y.sum().backward()
            return forward, memory.peak

        plain, _ = peaks(block)
        kept, peak = peaks(lambda x: checkpoint(block, x, use_reentrant=False))
        assert plain == 8 * 1000 * BYTES
        assert kept < plain / 2
        assert peak > plain / 2

    # torch.func.jvp's first call compiles a decomposition with torch's own deprecated torch.jit.script.
    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
    def test_below_other_dispatch_modes_and_transforms(self) -> None:
        class Silent(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return func(*args, **(kwargs or {}))

        outside = torch.ones(5, 3)
        torch.func.jvp(torch.sin, (outside,), (outside,))
        with Silent(), live_bytes() as memory, Silent():
            a = outside + 1
            assert memory.current == 15 * BYTES
            b = torch.func.vmap(lambda row: row.exp())(outside)
            assert memory.current == 30 * BYTES
            value, tangent = torch.func.jvp(torch.sin, (outside,), (outside,))
            assert memory.current == 60 * BYTES
            gradient = torch.func.grad(lambda x: x.exp().sum())(outside)
            assert memory.current == 75 * BYTES
        del a, b, value, tangent, gradient
        assert memory.current == 0

    def test_threads_of_autograd_are_seen(self) -> None:
        """A backward inside a backward moves to another thread at depth 60, as CUDA's nodes do from the start."""
        threads: set[int] = set()

        class Nested(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor, depth: int) -> torch.Tensor:
                ctx.depth = depth
                return x.clone()

            @staticmethod
            def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor, None]:
                before = memory.current
                made = torch.ones(1000)
                assert memory.current == before + 1000 * BYTES
                threads.add(threading.get_ident())
                if ctx.depth:
                    with torch.enable_grad():
                        inner = torch.ones(3, requires_grad=True)
                        Nested.apply(inner, ctx.depth - 1).sum().backward()
                del made
                return cotangent, None

        x = torch.ones(3, requires_grad=True)
        with live_bytes() as memory:
            Nested.apply(x, 70).sum().backward()
        assert len(threads) > 1
        assert memory.peak > 71 * 1000 * BYTES
        x.grad = None
        assert memory.current == 0

    @pytest.mark.cuda
    def test_cuda_and_its_backward_thread_are_seen(self) -> None:
        threads: set[int] = set()
        held: list[torch.Tensor] = []

        def hook(gradient: torch.Tensor) -> None:
            threads.add(threading.get_ident())
            held.append(torch.ones(11, device="cuda"))

        w = torch.ones(100, device="cuda", requires_grad=True)
        with live_bytes() as memory:
            y = w.exp()
            y.register_hook(hook)
            y.sum().backward()
            del y
            assert threads != {threading.get_ident()}
            assert memory.current == (100 + 11) * BYTES
            held.clear()
            w.grad = None
            assert memory.current == 0

    def test_a_long_loop_leaves_nothing(self) -> None:
        with live_bytes() as memory:
            x = torch.ones(10, requires_grad=True)
            for _ in range(10_000):
                torch.autograd.grad((x * x).sum(), x)
            assert memory.current == 10 * BYTES
            assert memory.peak <= 10 * 10 * BYTES
            assert "storages=1)" in repr(memory)

    def test_nested_blocks_count_each_for_itself(self) -> None:
        with live_bytes() as outer:
            a = torch.ones(10)
            with live_bytes() as inner:
                b = torch.ones(20)
                a.add_(1.0)
            assert (outer.current, inner.current) == (30 * BYTES, 20 * BYTES)
            c = torch.ones(40)
            assert (outer.current, inner.current) == (70 * BYTES, 20 * BYTES)
            with outer:  # once more inside itself: nothing counts twice
                d = torch.ones(80)
            assert outer.current == 150 * BYTES
        del b
        assert (outer.current, inner.current) == (130 * BYTES, 0)
        del a, c, d
        assert outer.current == 0

    def test_after_the_block_nothing_new_counts_but_deaths_do(self) -> None:
        with live_bytes() as memory:
            a = torch.ones(10)
        b = torch.ones(10)
        assert memory.current == 10 * BYTES
        del a, b
        assert memory.current == 0
        with memory:  # entered again it goes on
            c = torch.ones(5)
        assert (memory.current, memory.peak) == (5 * BYTES, 10 * BYTES)
        del c

    def test_an_exception_leaves_the_block_cleanly(self) -> None:
        def fail() -> None:
            with live_bytes() as memory:
                memories.append(memory)
                local = torch.ones(10)
                local @ torch.ones(3)

        memories: list[live_bytes] = []
        with pytest.raises(RuntimeError, match="size"):
            fail()
        after = torch.ones(100)
        assert memories[0].current == 0
        assert memories[0].peak == 13 * BYTES
        del after

    def test_resized_storages(self) -> None:
        with live_bytes() as memory:
            x = torch.ones(10)
            x.resize_(30)
            assert memory._current == 30 * BYTES  # seen at once, without the look that `current` takes
            x.resize_(10)  # PyTorch keeps the storage
            assert memory.current == 30 * BYTES
            x.untyped_storage().resize_(0)
            assert memory.current == 0
            x.untyped_storage().resize_(80)
            x.add_(1.0)
            assert memory._current == 80
            x.untyped_storage().resize_(400)
            assert memory.peak == 400
            y = torch.empty(0)
            torch.exp(torch.ones(6), out=y.resize_(0))
            assert memory.current == 424
        del x, y
        assert memory.current == 0

    def test_a_storage_object_in_a_garbage_cycle_does_not_end_a_living_storage(self) -> None:
        def leave_in_a_cycle(x: torch.Tensor) -> None:
            cycle: list[Any] = [x.untyped_storage()]
            cycle.append(cycle)

        probe = torch.ones(1)
        reference = weakref.ref(probe.untyped_storage())
        leave_in_a_cycle(probe)
        gc.collect()
        if reference() is None:
            pytest.skip("in this PyTorch the collector ends weak references to storages early: rule B3 in testing.py")
        with live_bytes() as memory:
            x = torch.ones(10)
            leave_in_a_cycle(x)
            gc.collect()
            assert memory.current == 10 * BYTES
            del x
            assert memory.current == 0

    def test_is_unseen_by_function_modes(self) -> None:
        class Record(TorchFunctionMode):
            def __init__(self) -> None:
                super().__init__()
                self.names: list[str] = []

            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.names.append(func.__name__)
                return func(*args, **(kwargs or {}))

        def run() -> list[str]:
            with Record() as record:
                a = torch.from_numpy(np.ones(3, dtype=np.float32))
                (a.requires_grad_() * 2).sum().backward()
            return record.names

        expected = run()
        with live_bytes():
            assert run() == expected
        assert "mul" in expected

    def test_does_not_import_the_compiler(self) -> None:
        """PyTorch's default for a dispatch mode does, at its first operation: 3 seconds and 65 MB."""
        script = """
import sys
import torch
from lowmem_higher.testing import live_bytes
before = "torch._dynamo" in sys.modules
with live_bytes() as memory:
    x = torch.ones(1)
assert memory.peak == 4
assert ("torch._dynamo" in sys.modules) == before, "imported"
"""
        subprocess.run([sys.executable, "-c", script], check=True)

    def test_repr(self) -> None:
        with live_bytes() as memory:
            x = torch.ones(1000)
            del x
            y = torch.ones(300)
        assert repr(memory) == "live_bytes(current=1,200, peak=4,000, storages=1)"
        del y


# --------------------------------------------------------------------------------------------------- taylor_test


def trained_loss(w: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """A short unrolled training loop, as a function of its initial weights and learning rate."""
    data = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    for _ in range(5):
        loss = (torch.tanh(data @ w) - 0.3).square().sum()
        w = w - rate * torch.autograd.grad(loss, w, create_graph=True)[0]
    return (torch.tanh(data @ w) - 0.7).square().sum()


def exp_sum(x: torch.Tensor) -> torch.Tensor:
    return x.exp().sum()


class Counted:
    """Counts the calls of a function."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f, self.calls = f, 0

    def __call__(self, *tensors: torch.Tensor) -> Any:
        self.calls += 1
        return self.f(*tensors)


POINT = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
RATE = torch.tensor(0.05, dtype=torch.float64)


class TestTaylorTest:
    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize(
        ("f", "point"),
        [
            (exp_sum, POINT),
            (lambda x: (x**3 + (5 * x).sin()).sum(), POINT),
            (lambda x: 1e8 + x.exp().sum(), POINT),
            (lambda x: 1e-12 * x.exp().sum(), POINT),
            (lambda x: x.exp().sum().item() + x.exp().sum() - x.exp().sum().item(), POINT),
            (lambda x: x.square().sum(), POINT),
            (lambda x: x.exp().sum().reshape(1, 1), POINT.reshape(2, 2)),
            (lambda x: torch.nn.functional.dropout(x.exp()).sum(), POINT + 3),
            (lambda rate: (50 * rate).cos(), torch.tensor(0.01, dtype=torch.float64)),
            (trained_loss, (WEIGHTS, RATE)),
            (lambda rate: trained_loss(WEIGHTS.clone().requires_grad_(), rate), RATE),
        ],
    )
    def test_a_right_gradient_has_order_two(self, f: Callable[..., Any], point: Any, seed: int) -> None:
        counted = Counted(f)
        assert taylor_test(counted, point, seed=seed) == pytest.approx(2.0, abs=0.06)
        assert counted.calls <= 18

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("error", [1.0, 1e-2, 1e-4])
    def test_a_wrong_gradient_has_order_one(self, error: float, seed: int) -> None:
        gradient = (1 + error) * POINT.exp()
        assert taylor_test(exp_sum, POINT, gradient=gradient, seed=seed) == pytest.approx(1.0, abs=0.06)

    @pytest.mark.parametrize("wrong", [0, 1])
    def test_an_error_in_one_of_several_tensors_shows(self, wrong: int) -> None:
        leaves = [WEIGHTS.clone().requires_grad_(), RATE.clone().requires_grad_()]
        gradients = list(torch.autograd.grad(trained_loss(*leaves), leaves))
        assert taylor_test(trained_loss, [WEIGHTS, RATE], gradient=gradients) > 1.9
        gradients[wrong] = gradients[wrong] * 1.01
        assert taylor_test(trained_loss, [WEIGHTS, RATE], gradient=gradients) < 1.1

    def test_a_gradient_that_is_cut_off_shows(self) -> None:
        """First-order MAML in place of MAML: the mistake this tool is for."""

        def first_order(w: torch.Tensor) -> torch.Tensor:
            loss = (w**4).sum()
            w = w - 0.1 * torch.autograd.grad(loss, w)[0]
            return w.square().sum()

        assert taylor_test(first_order, WEIGHTS) < 1.1

    def test_none_stands_for_a_zero_gradient(self) -> None:
        def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.exp().sum() + 0.0 * y.detach().sum()

        assert taylor_test(f, [POINT, WEIGHTS]) > 1.9
        assert taylor_test(f, [POINT, WEIGHTS], gradient=[POINT.exp(), None]) > 1.9
        assert taylor_test(lambda x, y: f(x, y) + y.sin().sum(), [POINT, WEIGHTS], gradient=[POINT.exp(), None]) < 1.1

    def test_the_lower_of_the_last_two_orders_counts(self) -> None:
        """Where a small error and the curvature cancel, one order is far above 2 before the next one tells."""
        one = torch.ones((), dtype=torch.float64)
        assert taylor_test(lambda x: x * x, one, one, gradient=2 * one + 5e-7) < 1.0

    def test_the_direction_can_be_given(self) -> None:
        """A gradient wrong in its first entry only: one direction sees it, the other does not."""
        gradient = POINT.exp()
        gradient[0] += 0.5
        first, second = torch.eye(4, dtype=torch.float64)[:2]
        assert taylor_test(exp_sum, POINT, first, gradient=gradient) < 1.1
        assert taylor_test(exp_sum, [POINT], [second], gradient=[gradient]) > 1.9

    def test_the_seed_chooses_the_direction(self) -> None:
        seen: list[list[float]] = []

        def f(x: torch.Tensor) -> torch.Tensor:
            seen[-1].append(x.sum().item())
            return x.exp().sum()

        for seed in (0, 0, 1):
            seen.append([])
            taylor_test(f, POINT, seed=seed)
        assert seen[0] == seen[1] != seen[2]

    def test_steps_are_relative_to_each_tensor(self) -> None:
        largest = [0.0, 0.0]

        def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            for i, (value, start) in enumerate(((x, 1e-6), (y, 1e6))):
                largest[i] = max(largest[i], (value.detach() / start - 1).abs().max().item())
            return (1e6 * x).exp().sum() + (1e-6 * y).exp().sum()

        points = [torch.full((3,), 1e-6, dtype=torch.float64), torch.full((3,), 1e6, dtype=torch.float64)]
        assert taylor_test(f, points) > 1.9
        assert 0.01 < largest[0] < 0.5
        assert 0.01 < largest[1] < 0.5
        assert taylor_test(exp_sum, torch.zeros(3, dtype=torch.float64)) > 1.9

    def test_a_linear_function_gives_infinity_if_the_gradient_fits(self) -> None:
        assert taylor_test(lambda x: (3 * x).sum(), POINT) == math.inf
        for size in (1, 7, 1000):  # f(0) = 0 has no rounding, its neighbours have
            assert taylor_test(lambda x: (3 * x).sum(), torch.zeros(size, dtype=torch.float64)) == math.inf
        assert taylor_test(torch.sin, torch.zeros((), dtype=torch.float64)) > 1.9
        assert taylor_test(lambda x: (3 * x).sum(), POINT, gradient=torch.full_like(POINT, 3.001)) < 1.1

    def test_steps_where_f_is_not_finite_are_passed_over(self) -> None:
        point = torch.full((3,), 1e-3, dtype=torch.float64)
        direction = torch.tensor([-1.0, 0.2, 0.1], dtype=torch.float64)
        assert taylor_test(lambda x: x.log().sum(), point, direction) > 1.9  # log of a negative number at first
        assert taylor_test(lambda x: x.log().sum(), point, direction, gradient=1.01 / point) < 1.1

    def test_values_that_are_floats_need_a_gradient(self) -> None:
        assert taylor_test(lambda x: x.exp().sum().item(), POINT, gradient=POINT.exp()) > 1.9
        with pytest.raises(ValueError, match="autograd sees no path"):
            taylor_test(lambda x: x.exp().sum().item(), POINT)

    def test_f_gets_leaves_and_random_states_are_left_alone(self) -> None:
        def f(x: torch.Tensor) -> torch.Tensor:
            assert x.is_leaf
            assert x.requires_grad
            return x.exp().sum() * torch.rand((), dtype=torch.float64)

        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        assert taylor_test(f, POINT.clone().requires_grad_()) > 1.9
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize(
        ("f", "point", "keywords", "message"),
        [
            (lambda x: x.square().sum(), torch.zeros(3, dtype=torch.float64), {}, "zero everywhere"),
            (exp_sum, POINT, {"gradient": torch.zeros_like(POINT)}, "zero everywhere"),
            (exp_sum, POINT, {"gradient": [None]}, "zero everywhere"),
            (exp_sum, POINT, {"direction": torch.zeros_like(POINT)}, "zero or orthogonal"),
            (
                lambda x: x[0] + x[1] + x[1].exp(),
                torch.zeros(2, dtype=torch.float64),
                {"direction": torch.tensor([2.0, -1.0], dtype=torch.float64)},
                "zero or orthogonal",
            ),
            (
                lambda x: (x - 1).square().sum() + 1e-8 * x.sum(),
                torch.ones(2, dtype=torch.float64),
                {},
                "zero gradient would pass",
            ),
            (lambda x: (x + 1e-11 * x * x).sum(), POINT, {}, "too few to see an order"),
            (lambda x: x.exp().sum() + math.inf, POINT, {}, "f is inf and the norm of its gradient"),
            # Not finite at the first steps, within rounding after two more.
            (lambda x: 1e11 + x.log(), RATE / 50, {"direction": torch.tensor(-1.0).double()}, "only 2 steps"),
            (lambda x: x.sqrt().sum(), torch.zeros(2, dtype=torch.float64), {}, "norm of its gradient (inf|nan)"),
            (lambda x: x.exp().sum() + 1e-3 * random.random(), POINT, {}, "compute everything anew"),
            (exp_sum, POINT, {"gradient": POINT[:2]}, r"gradient has shapes \[\(2,\)\], but `point` has \[\(4,\)\]"),
            (exp_sum, POINT, {"gradient": [POINT, POINT]}, r"gradient has shapes \[\(4,\), \(4,\)\]"),
            (exp_sum, POINT, {"direction": POINT[:2]}, "direction has shapes"),
        ],
    )
    def test_what_proves_nothing_raises(self, f: Any, point: Any, keywords: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            taylor_test(f, point, **keywords)

    @pytest.mark.parametrize(
        ("f", "point", "keywords", "message"),
        [
            (exp_sum, POINT.float(), {}, r"point is torch.float32.*\.double\(\)"),
            (lambda x: x.float().exp().sum(), POINT, {}, "the value of f is torch.float32"),
            (exp_sum, POINT, {"gradient": POINT.float()}, "gradient is torch.float32"),
            (exp_sum, POINT, {"direction": POINT.float()}, "direction is torch.float32"),
            (exp_sum, [1.0], {}, "point is float"),
            (lambda x: x.exp(), POINT, {}, "one number"),
            (lambda x: None, POINT, {}, "one number"),
        ],
    )
    def test_what_is_not_float64_raises(self, f: Any, point: Any, keywords: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            taylor_test(f, point, **keywords)


# --------------------------------------------------------------------------------------- assert_matches_unrolled


class Loop:
    """In place of a user's loop: gives known gradients, and remembers the settings and random numbers it got."""

    def __init__(self, change: Callable[[dict[str, Any], dict[str, Any]], object] = lambda gradients, settings: None):
        self.change = change
        self.settings: list[dict[str, Any]] = []
        self.drawn: list[float] = []

    def __call__(self, **settings: Any) -> dict[str, Any]:
        self.settings.append(settings)
        self.drawn.append(torch.rand(()).item())
        gradients: dict[str, Any] = {
            "w": torch.tensor([3.0, 4.0], dtype=torch.float64),
            "rate": torch.tensor(-2.0, dtype=torch.float64),
            "unused": None,
        }
        self.change(gradients, settings)
        return gradients


def under_checkpointing(**changes: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    """Replace gradients of one setting out of six."""

    def change(gradients: dict[str, Any], settings: dict[str, Any]) -> None:
        if settings == {"checkpoint_every": 3, "replay": "torch"}:
            gradients.update(changes)

    return change


class TestAssertMatchesUnrolled:
    def test_runs_the_unroll_and_every_combination_from_the_same_random_state(self) -> None:
        loop = Loop()
        torch.manual_seed(7)
        expected = torch.rand(()).item()
        torch.manual_seed(7)
        differences = assert_matches_unrolled(loop, checkpoint_every=(2, 5), mixed=(True, False))
        assert loop.settings[0] == {"checkpoint_every": None}
        assert loop.settings[1:] == [
            {"checkpoint_every": every, "replay": replay, "mixed": mixed}
            for every in (2, 5)
            for replay in ("native", "torch")
            for mixed in (True, False)
        ]
        assert loop.drawn == [expected] * 9
        assert torch.rand(()).item() == expected
        assert list(differences)[1] == "checkpoint_every=2, replay='native', mixed=False"
        assert list(differences.values()) == [0.0] * 8

    def test_default_settings(self) -> None:
        assert list(assert_matches_unrolled(Loop())) == [
            f"checkpoint_every={every}, replay='{replay}'" for every in (1, 3, 10) for replay in ("native", "torch")
        ]

    def test_random_states_are_restored_after_an_exception(self) -> None:
        def loop(**settings: Any) -> None:
            torch.rand(3)
            raise KeyError

        before = torch.get_rng_state()
        with pytest.raises(KeyError):
            assert_matches_unrolled(loop)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.cuda
    def test_cuda_random_states_are_the_same_and_restored(self) -> None:
        drawn: list[float] = []

        def loop(**settings: Any) -> list[torch.Tensor]:
            drawn.append(torch.rand((), device="cuda").item())
            return [torch.ones(2, dtype=torch.float64, device="cuda")]

        before = torch.cuda.get_rng_state()
        assert_matches_unrolled(loop)
        assert len(set(drawn)) == 1
        assert torch.equal(torch.cuda.get_rng_state(), before)

    def test_returns_the_largest_difference_of_each_setting(self) -> None:
        loop = Loop(under_checkpointing(w=torch.tensor([3.0, 4.0 + 2e-9], dtype=torch.float64)))
        differences = assert_matches_unrolled(loop)
        assert differences.pop("checkpoint_every=3, replay='torch'") == pytest.approx(2e-9 / 5, rel=1e-4)
        assert set(differences.values()) == {0.0}

    def test_sequences_are_named_by_position(self) -> None:
        def loop(checkpoint_every: int | None, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
            w = torch.ones(2, dtype=torch.float64)
            return w, w * (1 if checkpoint_every != 10 else 2)

        with pytest.raises(AssertionError, match=r"checkpoint_every=10, replay='native': the gradient \[1\] differs"):
            assert_matches_unrolled(loop)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"w": torch.tensor([3.0, 4.0 + 6e-9], dtype=torch.float64)},
                r"^checkpoint_every=3, replay='torch': the gradient w differs from the full unroll's by 1\.20e-09 of "
                r"its norm \(rtol=1e-09\): here norm 5\.000000e\+00, shape \(2,\), in the full unroll norm "
                r"5\.000000e\+00, shape \(2,\)\. A second full unroll differs from the first by 0\.00e\+00\.$",
            ),
            ({"rate": torch.tensor(2.0, dtype=torch.float64)}, r"gradient rate differs .* 2\.00e\+00 of its norm"),
            ({"rate": torch.tensor(math.nan, dtype=torch.float64)}, "gradient rate differs .* inf of its norm"),
            ({"rate": torch.tensor(math.inf, dtype=torch.float64)}, "gradient rate differs .* inf of its norm"),
            ({"rate": torch.tensor([-2.0], dtype=torch.float64)}, r"inf of its norm .* here .* shape \(1,\)"),
            ({"w": None}, "gradient w differs .* here None"),
            ({"unused": torch.zeros(2, dtype=torch.float64)}, "gradient unused differs .* in the full unroll None"),
            ({"more": None}, r"loop returns \['w', 'rate', 'unused', 'more'\], but \['w', 'rate', 'unused'\]"),
        ],
    )
    def test_a_difference_is_named(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(AssertionError, match=message):
            assert_matches_unrolled(Loop(under_checkpointing(**changes)))

    def test_rtol(self) -> None:
        loop = Loop(under_checkpointing(w=torch.tensor([3.0, 4.005], dtype=torch.float64)))
        assert max(assert_matches_unrolled(loop, rtol=1.01e-3).values()) == pytest.approx(1e-3)
        with pytest.raises(AssertionError, match="differs"):
            assert_matches_unrolled(loop, rtol=0.99e-3)

    @pytest.mark.parametrize(
        ("gradients", "message"),
        [
            ({"w": torch.zeros(2, dtype=torch.float64)}, r"gradient w has norm 0\.0, and to agree .* proves nothing"),
            ({"rate": torch.tensor(math.nan, dtype=torch.float64)}, "gradient rate has norm nan"),
            ({"rate": torch.tensor(math.inf, dtype=torch.float64)}, "gradient rate has norm inf"),
            ({"w": None, "rate": None}, "no gradient at all"),
        ],
    )
    def test_a_reference_that_proves_nothing_fails(self, gradients: dict[str, Any], message: str) -> None:
        with pytest.raises(AssertionError, match=message):
            assert_matches_unrolled(Loop(lambda result, settings: result.update(gradients)))

    def test_float32_needs_a_coarse_rtol(self) -> None:
        loop = Loop(lambda gradients, settings: gradients.update(w=torch.ones(2)))
        with pytest.raises(TypeError, match=r"gradient w is torch\.float32, and rtol=1e-09 needs float64"):
            assert_matches_unrolled(loop)
        assert_matches_unrolled(loop, rtol=1e-4)

    def test_a_loop_that_does_not_repeat_is_called_by_its_name(self) -> None:
        w = torch.ones(2, dtype=torch.float64, requires_grad=True)

        def loop(**settings: Any) -> list[torch.Tensor | None]:
            (w * w).sum().backward()
            return [w.grad]  # adds up from run to run

        with pytest.raises(AssertionError, match=r"by 1\.00e\+00 of its norm.*does not repeat.*start afresh"):
            assert_matches_unrolled(loop)

    def test_a_single_tensor_is_refused(self) -> None:
        with pytest.raises(TypeError, match="a mapping or a sequence of gradients, not Tensor"):
            assert_matches_unrolled(lambda **settings: torch.ones(2, dtype=torch.float64))

    def test_nothing_to_compare_is_refused(self) -> None:
        with pytest.raises(ValueError, match="every setting needs at least one value"):
            assert_matches_unrolled(Loop(), replay=())
