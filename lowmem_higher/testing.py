"""Prove a loop of your own: its memory, its gradient, and that checkpointing left the gradient as it was.

    live_bytes                memory: bytes of tensor storages alive, exact and the same in every run
    taylor_test               the gradient against finite differences, which share no code with autograd
    assert_matches_unrolled   the checkpointed gradient against the full unroll's, over many settings

They answer three different questions, so use all three: two gradients that agree can both be wrong, and a gradient
that finite differences confirm along one direction to five digits can still differ from the unroll in the ninth.
This file imports nothing of the engine that it judges.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["assert_matches_unrolled", "live_bytes", "taylor_test"]

# NOTE [ What live_bytes counts ]
#
# B1  A storage is created by the operation that returns it, unless one of that operation's tensor arguments already
#     has it. So views and in-place operations on older tensors do not count, and no list of view operations is needed.
# B2  Two kinds of operation return a storage made by code that dispatches nothing: `lift_fresh` (torch.tensor,
#     from_numpy) and `set_` with sizes (copy.deepcopy, torch.load). Their result is new although an argument has it.
# B3  A storage is gone when its weak reference says so. PyTorch keeps the Python object of a storage for as long as
#     the storage itself, whoever holds it (an autograd node, another thread), so this needs no garbage collection.
#     One hole, seen with PyTorch 2.6 and closed in 2.13: if the collector finds that Python object, which somebody
#     took with `tensor.untyped_storage()`, in a cycle of garbage, the reference ends although the tensor lives.
# B4  A TorchFunctionMode (lowmem_higher's recorder is one) must see what it would see without us: neither our look at
#     a tensor nor the call that we pass on, which from Python would reach it a second time.
_aten = torch.ops.aten
_RETURNS_UNSEEN_STORAGE = (_aten.lift_fresh.default, _aten.set_.source_Storage_storage_offset)


class _StorageReference(weakref.ref[torch.UntypedStorage]):
    __slots__ = ("key", "nbytes")
    key: int
    nbytes: int


class live_bytes(TorchDispatchMode):
    """Counts the bytes of tensor storages that were created inside the block and are still alive, on any device.

    Each storage counts once with all its bytes, however many tensors view it, from the operation that returns it until
    its last holder lets go: a variable, an autograd graph, a list. Unlike the memory of the process the count is exact
    and the same in every run, so a test can compare it with `==`. It covers backward passes, in whichever thread
    autograd runs them, `torch.utils.checkpoint`, `autograd.Function` and `torch.func`. After the block `current` goes
    on falling as storages die. Blocks can be nested; each has its own count.

    Not seen:
        - what a kernel allocates and frees within one operation (workspaces, cuBLAS), and what the allocator rounds up
          or keeps: `torch.cuda.max_memory_allocated()` shows these;
        - memory of numpy and other libraries, until `torch.from_numpy` makes a tensor of it, which counts in full;
          `torch.frombuffer`, `torch.from_dlpack` and a bare `torch.UntypedStorage(n)` never count;
        - operations in other Python threads, sparse CSR and MKL-DNN tensors (sparse COO counts), and the tensors inside
          a wrapper subclass;
        - `storage.resize_(n)`, until an operation returns that storage or `current` is read (`tensor.resize_` is seen).

    A tensor on the meta device counts the bytes it would have. Under any dispatch mode autograd adds up gradients out
    of place where it would else reuse a buffer, so `peak` can exceed an unwatched backward's by one such gradient.

    Attributes:
        current: bytes alive now. Reading it takes time in proportion to the number of storages alive.
        peak: the highest value of `current` so far, or since `reset_peak()`.

    Memory:
        About 300 bytes of Python objects for each storage alive. Time: about 20 microseconds for each operation.

    Example:
        >>> with live_bytes() as memory:
        ...     total = torch.ones(1000).exp().sum()
        >>> memory.peak, memory.current  # two vectors of 1000 float32 at once; the sum is left
        (8000, 4)
        >>> del total
        >>> memory
        live_bytes(current=0, peak=8,000, storages=0)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, _StorageReference] = {}
        self._current = 0
        self._peak = 0

    @property
    def current(self) -> int:
        """Bytes alive now."""
        for reference in list(self._alive.values()):
            if (storage := reference()) is not None:
                self._set_size(reference, storage.nbytes())
        return self._current

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once since the start or the last `reset_peak()`."""
        return max(self.current, self._peak)

    def reset_peak(self) -> None:
        """Starts a new peak from what is alive now."""
        self._peak = self.current

    def __repr__(self) -> str:
        return f"live_bytes(current={self.current:,}, peak={self.peak:,}, storages={len(self._alive):,})"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # B4
            result = func(*args, **kwargs)
            for storage in _storages(result):
                reference = self._alive.get(storage._cdata)
                if reference is not None:
                    self._set_size(reference, storage.nbytes())
                elif func in _RETURNS_UNSEEN_STORAGE or not any(  # B2, B1
                    storage is older for older in _storages((*args, *kwargs.values()))
                ):
                    self._watch(storage)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # PyTorch's hook. Its default, True, imports the compiler at the first operation: 3 seconds and 65 MB.
        return False

    def _watch(self, storage: torch.UntypedStorage) -> None:
        reference = _StorageReference(storage, self._forget)
        reference.key, reference.nbytes = storage._cdata, 0
        self._alive[reference.key] = reference
        self._set_size(reference, storage.nbytes())

    def _forget(self, reference: _StorageReference) -> None:
        self._set_size(reference, 0)
        del self._alive[reference.key]

    def _set_size(self, reference: _StorageReference, nbytes: int) -> None:
        self._current += nbytes - reference.nbytes
        self._peak = max(self._peak, self._current)
        reference.nbytes = nbytes


def _storages(value: object) -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors in the arguments or the result of an operation."""
    if isinstance(value, torch.Tensor) and hasattr(value, "_local_tensor"):  # a DTensor
        yield from _storages(value._local_tensor)
    elif isinstance(value, torch.Tensor):
        if value.layout is torch.sparse_coo:
            yield from _storages((value._indices(), value._values()))
        elif not value._is_zerotensor():  # forward-mode AD's zero claims a size but has no memory
            with suppress(NotImplementedError):  # opaque layouts
                storage = value.untyped_storage()
                if storage.device.type == value.device.type:  # else a fake of tracing, which claims a device
                    yield storage
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _storages(item)


def taylor_test(
    f: Callable[..., Any],
    point: torch.Tensor | Sequence[torch.Tensor],
    direction: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    gradient: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    step: float = 0.1,
    seed: int = 0,
) -> float:
    """Returns the order at which the remainder of a first-order Taylor expansion vanishes: 2 if the gradient is right.

    With the right gradient g the remainder |f(x + h d) - f(x) - h <g, d>| falls as h^2, with any other as h. The steps
    are chosen for you: h starts at `step` and is divided by 4 until the remainder comes within a factor of 100 of the
    rounding noise of f, which is measured, since a long loop amplifies rounding. The result is the lower order of the
    last two divisions, where a small error shows best: a relative error of 1e-4 in <g, d> is found in practice, often
    one of 1e-5. Write `assert taylor_test(...) > 1.9`.

    One direction tests one number, <g, d>, so test inputs of very different influence one at a time, with several
    seeds. And f must be smooth around `point`. A loop that trains a ReLU network is not: when an activation changes
    sign in an inner step the inner gradient jumps, f jumps with it, and the order comes out near 0 or far above 2.
    Test such a loop with tanh or softplus.

    Args:
        f: Called as `f(x)`, or `f(*tensors)` if `point` is a sequence; gives a scalar (a float64 tensor of one element,
            or a float). It must compute everything anew in each call. Every call starts from the same state of
            PyTorch's random number generators, and gets leaf tensors that require grad.
        point: Where to test; float64.
        direction: Tensors shaped like `point`. By default normal random numbers, for each tensor times its root mean
            square (times 1 if it is all zero), so that `step` means a relative change.
        gradient: The gradient to judge, shaped like `point`; None for a tensor says that its gradient is zero. By
            default it is taken with `torch.autograd.grad`.
        step: The first and largest h. Steps at which f is not finite are passed over.
        seed: Of the random direction.

    Returns:
        The order. `math.inf` if f is linear along the direction up to rounding and the gradient fits it.

    Raises:
        ValueError: The test would prove nothing: the gradient is zero, orthogonal to the direction, or so small that
            a zero would pass as well; f or the gradient is not finite; f is not a function of `point` alone; fewer
            than three steps lie above rounding.
        TypeError: A tensor is not float64. In float32 the remainder drowns in rounding before its order can be seen.

    Memory:
        That of one call of f, and with `gradient=None` of its backward pass. Time: about 12 calls of f, at most 18.

    Example:
        >>> x = torch.linspace(1, 2, 5, dtype=torch.float64)
        >>> round(taylor_test(lambda x: x.exp().sum(), x), 2)
        2.0
        >>> round(taylor_test(lambda x: x.exp().sum(), x, gradient=1.001 * x.exp()), 2)
        1.0

    References:
        Farrell, Ham, Funke, Rognes, "Automated derivation of the adjoint of high-level transient finite element
        programs", SIAM J. Sci. Comput. 35(4), 2013, use this test for the adjoints of whole simulations.
    """
    points = _float64_tensors("point", point)
    if direction is None:
        generator = torch.Generator().manual_seed(seed)
        normal = [torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device) for x in points]
        directions = [n * (x.square().mean().sqrt().item() or 1.0) for n, x in zip(normal, points, strict=True)]
    else:
        directions = _float64_tensors("direction", direction, points)

    def evaluate(h: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        leaves = [(x + h * d).requires_grad_() for x, d in zip(points, directions, strict=True)]
        value = f(*leaves)
        if isinstance(value, float):
            value = torch.tensor(value, dtype=torch.float64)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise TypeError(
                "taylor_test: f must return one number, a tensor with a single element or a float: return loss.mean()."
            )
        _float64_tensors("the value of f", value)
        return value, leaves

    with _same_random_numbers():
        value, leaves = evaluate(0.0)
        if gradient is None:
            if not value.requires_grad:
                raise ValueError(
                    "taylor_test: autograd sees no path from `point` to the value of f. Compute it from the arguments "
                    "of f, or pass the gradient that is to be tested: taylor_test(f, point, gradient=...)."
                )
            gradient = torch.autograd.grad(value, leaves, allow_unused=True)
    base = value.item()
    del value, leaves
    gradients = _float64_tensors("gradient", gradient, points)
    gradient_norm = _norm(gradients)
    if not math.isfinite(base) or not math.isfinite(gradient_norm):
        raise ValueError(
            f"taylor_test: f is {base} and the norm of its gradient {gradient_norm} at `point`. Choose a point where "
            "both are finite: a smaller learning rate, fewer steps, or taylor_test(f, 0.1 * point)."
        )
    products = [g * d for g, d in zip(gradients, directions, strict=True)]
    slope = sum(product.sum().item() for product in products)
    spread = sum(product.abs().sum().item() for product in products)
    if gradient_norm == 0.0:
        raise ValueError(
            "taylor_test: the gradient is zero everywhere, which proves nothing. Choose another point, "
            "taylor_test(f, torch.randn_like(point))."
        )
    if abs(slope) <= 1e-9 * spread:
        raise ValueError(
            "taylor_test: the direction is zero or orthogonal to the gradient, which proves nothing. Leave it out, or "
            "draw another one: taylor_test(f, point, seed=1)."
        )

    def remainder(h: float) -> float:
        with _same_random_numbers():
            return abs(evaluate(h)[0].item() - base - h * slope)

    # Steps of a few rounding units show what rounding alone does to f; a random or stateful f shows here too.
    noise = max(remainder(k * 2.0**-50) for k in range(4)) + 2.0**-52 * abs(base)
    if not noise < 1e-6 * (abs(base) + abs(slope)):
        raise ValueError(
            f"taylor_test: two calls of f at the same point, up to rounding, differ by {noise:.1e} (f is {base:.6g}). "
            "f must compute everything anew from its arguments: inside f copy.deepcopy(model) and numpy.random.seed(0)."
        )
    ladder: list[tuple[float, float]] = []
    for h in (step * 4.0**-i for i in range(13)):
        size, floor = remainder(h), 100 * (noise + 2.0**-52 * h * spread)
        if not math.isfinite(size):
            ladder.clear()
        elif size <= floor:
            break
        else:
            ladder.append((h, size))
    if not ladder and math.isfinite(size) and floor < 1e-6 * h * abs(slope):
        return math.inf
    if len(ladder) < 3:
        raise ValueError(
            f"taylor_test: only {len(ladder)} steps from h = {step:g} down have a finite remainder above 100 times the "
            f"rounding noise ({noise:.1e}), too few to see an order. Pass another `step` or direction: "
            "taylor_test(f, point, step=..., seed=1)."
        )
    order = min(math.log(a[1] / b[1], 4.0) for a, b in itertools.pairwise(ladder[-3:]))
    h, size = ladder[-1]
    if order > 1.5 and h * abs(slope) < 10 * size:
        raise ValueError(
            f"taylor_test: the slope along the direction, {slope:.1e}, is so small against the curvature that a zero "
            "gradient would pass as well. Choose another point or direction: taylor_test(f, point, seed=1)."
        )
    return order


def assert_matches_unrolled(
    loop: Callable[..., Any],
    *,
    checkpoint_every: Sequence[int] = (1, 3, 10),
    replay: Sequence[str] = ("native", "torch"),
    rtol: float = 1e-9,
    **more_settings: Sequence[Any],
) -> dict[str, float]:
    """Asserts that your loop gives the same gradients under checkpointing as in the full unroll.

    `loop(**settings)` is your whole loop in a function: it builds or copies the model, opens
    `innerloop_ctx(model, optimizer, **settings)`, trains, differentiates, and returns the gradients. It runs once with
    `checkpoint_every=None`, the full unroll, then once with each combination of the settings, every time from the same
    state of PyTorch's random number generators (CPU and CUDA), which are afterwards as they were.

    A gradient agrees if |a - b| <= rtol |b| in the 2-norm, with b the unroll's. The comparison means something only
    where `loop` passes `**settings` on and leaves nothing behind: return `torch.autograd.grad(...)`, or `.grad` fields
    of parameters made in this call, since fields of older ones add up from run to run.

    Args:
        loop: Returns a mapping from names to gradients, or a sequence of gradients. None stands for a tensor that gets
            no gradient and must then get none in every setting.
        checkpoint_every: The values to try. Include 1, one that does not divide the steps, and one that exceeds them.
        replay: The replay strategies to try.
        rtol: Largest relative difference. Below 1e-6 it asks for float64 gradients.
        **more_settings: Any other keyword of `innerloop_ctx` with the values to try, as in
            `pullback=("reverse", "mixed")`. The reference run does not get them.

    Returns:
        The largest relative difference of each combination, under a name such as "checkpoint_every=3, replay='torch'".

    Raises:
        AssertionError: A gradient differs, is missing or is not finite; or the reference can prove nothing, being
            empty, zero or not finite. The message names setting, tensor, difference and both norms, and tells whether
            the full unroll repeats itself.
        ValueError: A setting has no value to try.
        TypeError: `loop` returns something else, or the gradients' dtype is too coarse for `rtol`.

    Memory:
        That of the full unroll, which is the reference: use a short loop. Time: one unroll and a run per combination.

    Example:
        >>> import lowmem_higher as higher
        >>> def loop(**settings):
        ...     net = torch.nn.Linear(3, 1, dtype=torch.float64)
        ...     x = torch.randn(5, 3, dtype=torch.float64)
        ...     opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        ...     with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
        ...         for _ in range(5):
        ...             _ = diffopt.step((fnet(x) - 1).square().mean())
        ...         outer = fnet(x).square().mean()
        ...     return torch.autograd.grad(outer, list(net.parameters()))
        >>> differences = assert_matches_unrolled(loop, checkpoint_every=(1, 2))
        >>> sorted(differences)[:2]
        ["checkpoint_every=1, replay='native'", "checkpoint_every=1, replay='torch'"]
    """
    choices = {"checkpoint_every": checkpoint_every, "replay": replay, **more_settings}

    def run(**settings: Any) -> dict[str, torch.Tensor | None]:
        with _same_random_numbers():
            result = loop(**settings)
        if not isinstance(result, (Mapping, list, tuple)):
            raise TypeError(
                f"loop must return a mapping or a sequence of gradients, not {type(result).__name__}: "
                "return torch.autograd.grad(outer_loss, [w])."
            )
        named = result.items() if isinstance(result, Mapping) else ((f"[{i}]", g) for i, g in enumerate(result))
        # Clones, because a `.grad` that later runs add to would change the reference together with them.
        return {name: None if gradient is None else gradient.detach().clone() for name, gradient in named}

    reference = run(checkpoint_every=None)
    if all(gradient is None for gradient in reference.values()):
        raise AssertionError(
            "the full unroll gives no gradient at all, which proves nothing. Open the context with "
            "copy_initial_weights=False, or return gradients of something else that takes part."
        )
    for name, gradient in reference.items():
        if gradient is None:
            continue
        if rtol < 1e-6 and gradient.dtype not in (torch.float64, torch.complex128):
            raise TypeError(
                f"the gradient {name} is {gradient.dtype}, and rtol={rtol:g} needs float64: convert the model and the "
                "data with .double(), or pass rtol=1e-4."
            )
        if not 0.0 < _norm([gradient]) < math.inf:
            raise AssertionError(
                f"the full unroll's gradient {name} has norm {_norm([gradient])}, and to agree with it proves nothing. "
                "Choose data for which it is finite and not zero, x = torch.randn(...), or do not return it."
            )

    differences: dict[str, float] = {}
    for values in itertools.product(*choices.values()):
        settings = dict(zip(choices, values, strict=True))
        label = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        gradients = run(**settings)
        if gradients.keys() != reference.keys():
            raise AssertionError(
                f"{label}: loop returns {list(gradients)}, but {list(reference)} in the full unroll. Return the same "
                "gradients under every setting, in the same order: return torch.autograd.grad(outer_loss, wanted)."
            )
        differences[label] = 0.0
        for name, gradient in gradients.items():
            difference = _relative_difference(gradient, reference[name])
            if difference > rtol:
                again = _relative_difference(run(checkpoint_every=None)[name], reference[name])
                raise AssertionError(
                    f"{label}: the gradient {name} differs from the full unroll's by {difference:.2e} of its norm "
                    f"(rtol={rtol:g}): here {_describe(gradient)}, in the full unroll {_describe(reference[name])}. "
                    f"A second full unroll differs from the first by {again:.2e}"
                    + (": the loop itself does not repeat, so first make it start afresh." if again > rtol else ".")
                )
            differences[label] = max(differences[label], difference)
    if not differences:
        raise ValueError(
            "nothing to compare: every setting needs at least one value, as in checkpoint_every=(1, 3, 10)."
        )
    return differences


def _same_random_numbers() -> AbstractContextManager[None]:
    """Puts PyTorch's random states (CPU, every CUDA device) back at the end, so that the next block draws the same."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()), device_type="cuda")


def _float64_tensors(
    name: str,
    value: torch.Tensor | Sequence[torch.Tensor | None],
    like: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """`value` as a list of detached tensors, with zeros in place of None, after a check of dtypes and shapes."""
    items = [value] if isinstance(value, torch.Tensor) else list(value)
    if like is not None and len(items) == len(like):
        items = [torch.zeros_like(x) if item is None else item for item, x in zip(items, like, strict=True)]
    tensors = []
    for item in items:
        if not isinstance(item, torch.Tensor) or item.dtype != torch.float64:
            found = item.dtype if isinstance(item, torch.Tensor) else type(item).__name__
            raise TypeError(
                f"taylor_test needs float64 tensors, and {name} is {found}. In float32 the remainder drowns in "
                "rounding before its order can be seen: convert the model and the data with .double()."
            )
        tensors.append(item.detach())
    if like is not None and [t.shape for t in tensors] != [x.shape for x in like]:
        raise ValueError(
            f"taylor_test: {name} has shapes {[tuple(t.shape) for t in tensors]}, "
            f"but `point` has {[tuple(x.shape) for x in like]}. Give one for each argument of f, of its shape: "
            "[torch.randn_like(x) for x in point]."
        )
    return tensors


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.hypot(*(torch.linalg.vector_norm(tensor).item() for tensor in tensors))


def _relative_difference(gradient: torch.Tensor | None, reference: torch.Tensor | None) -> float:
    """|gradient - reference| / |reference|; infinite where the two cannot be compared or are not finite."""
    if gradient is None or reference is None:
        return 0.0 if gradient is reference else math.inf
    if gradient.shape != reference.shape:
        return math.inf
    difference = _norm([gradient.to(reference) - reference]) / _norm([reference])
    return difference if math.isfinite(difference) else math.inf


def _describe(gradient: torch.Tensor | None) -> str:
    return "None" if gradient is None else f"norm {_norm([gradient]):.6e}, shape {tuple(gradient.shape)}"
