"""Blocks: submodules whose activations are not kept for the backward but computed again in it.

NOTE [ Blocks ]

A block's module gets a class of its own, whose `forward` runs the model's in one of three ways:

B1  First-order passes (the user's loop, replays, the outer loss) run it under `torch.utils.checkpoint`.
B2  A reverse-over-reverse pass runs it plainly: recomputation would fire in its first derivative already and save
    nothing.
B3  Forward over reverse mode runs it as a `_Recomputed` call, which keeps the values and tangents of the block's
    inputs. Its forward runs on dual tensors without a graph, its backward is a `torch.func.vjp` of the same code.

A recomputation sees the block as it was: attributes, buffers, random states, switches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem_higher.fast_weights import ParameterSlots, alive, copied
from lowmem_higher.forward_over_reverse import as_reverse_mode
from lowmem_higher.patch import class_of
from lowmem_higher.replay_state import Ambient, capture_rng, rng_restored
from lowmem_higher.second_order import second_order_here
from lowmem_higher.structure import flatten, unflatten
from lowmem_higher.watch import Watcher

Selection = type[nn.Module] | Sequence[type[nn.Module]] | Callable[[nn.Module], bool]


class _Here(threading.local):
    """How blocks run in this thread: "checkpoint", "plain" or "dual"."""

    way = "checkpoint"


_here = _Here()


@contextmanager
def blocks_run(way: str) -> Iterator[None]:
    """Run the blocks of this thread in one of the ways of NOTE [ Blocks ] inside the block of code."""
    before = _here.way
    _here.way = way
    try:
        yield
    finally:
        _here.way = before


def block_paths(model: nn.Module, selection: Selection) -> list[str]:
    """The paths of the submodules that are blocks.

    Args:
        model: The model.
        selection: A module class, several, or a function of a module that says whether it is a block.

    Raises:
        TypeError: `selection` is something else.
        ValueError: It names no submodule, or the model itself.

    Example:
        >>> block_paths(nn.Sequential(nn.Linear(1, 1), nn.Tanh()), (nn.Linear,))
        ['0']
    """
    is_class = isinstance(selection, type) and issubclass(selection, nn.Module)
    classes = (selection,) if is_class else selection
    if isinstance(classes, (tuple, list)) and classes and all(isinstance(item, type) for item in classes):
        chosen: Callable[[nn.Module], bool] = lambda module: isinstance(module, tuple(classes))  # noqa: E731
    elif callable(selection):
        chosen = cast(Callable[[nn.Module], bool], selection)
    else:
        raise TypeError(
            f"blocks={selection!r} must be a tuple of module classes, blocks=(TransformerBlock,), or a function that "
            "says of a module whether it is a block: blocks=lambda module: isinstance(module, TransformerBlock)."
        )
    paths = [path for path, module in model.named_modules() if chosen(module)]
    if not paths or "" in paths:
        what = "the model itself" if paths else "no submodule of the model"
        raise ValueError(
            f"blocks names {what}. Blocks are the parts that a forward calls one after the other, whose activations "
            "are to be computed again: blocks=(TransformerBlock,)."
        )
    return paths


def make_blocks(root: nn.Module, paths: Sequence[str]) -> None:
    """Let these submodules run as blocks."""
    for path in paths:
        module = root.get_submodule(path)
        module.__class__ = class_of("block", type(module), _make_block_class)


def _make_block_class(module_type: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _here.way == "plain" or not torch.is_grad_enabled():
            return module_type.forward(self, *args, **kwargs)
        call = _BlockCall(self, module_type.forward, args, kwargs)
        return call.checkpointed() if _here.way == "checkpoint" else call.dual()

    names = {"forward": forward, "__module__": module_type.__module__, "__qualname__": module_type.__qualname__}
    return type(module_type.__name__, (module_type,), names)


class _BlockCall:
    """One call of a block, and how everything stood that it reads besides its tensors."""

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        leaves: list[Any] = []
        self._module, self._forward = module, forward
        self._owner = module.__dict__.get("_call_through", (_nobody, ""))[0]()  # an fmodel, which its parts hold weakly
        self._structure = flatten((args, kwargs), leaves)
        self._leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._attributes = [(part, dict(part.__dict__)) for part in module.modules()]
        self._ambient = Ambient.capture()
        self._ran = False

    def _call(self, given: Sequence[Tensor]) -> Any:
        tensors = iter(given)
        leaves = [next(tensors) if leaf is _TENSOR else leaf for leaf in self._leaves]
        args, kwargs = unflatten(self._structure, iter(leaves))
        with blocks_run("plain"):
            return self._forward(self._module, *args, **kwargs)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """The switches and attributes of the first call inside the block; what is set on them is taken away again."""
        now = [(part, part.__dict__) for part, _ in self._attributes]
        try:
            for part, attributes in self._attributes:
                object.__setattr__(part, "__dict__", dict(attributes))
            with self._ambient.restored(Ambient.capture()):
                yield
        finally:
            for part, attributes in now:
                object.__setattr__(part, "__dict__", attributes)

    # First-order passes (B1)

    def checkpointed(self) -> Any:
        """Run the block now, and again in the backward; the weights and buffers of then are put in place (rule R7)."""
        given, self._given = self._given, []
        return checkpoint(self._first_or_again, *given, use_reentrant=False)

    def _first_or_again(self, *given: Tensor) -> Any:
        if not self._ran:
            self._ran = True
            return self._call(given)
        with self._as_it_was():
            return self._call(given)

    # Forward over reverse mode (B3)

    def dual(self) -> Any:
        """Run the block on dual tensors and keep its inputs only."""
        self._slots = ParameterSlots(self._module)
        self._buffers = copied(self._slots.read_buffers())
        weights = [cast(Tensor, alive(places[0][0])._parameters[places[0][1]]) for places in self._slots.params]
        self._count = len(self._given)
        tensors, self._given = [*self._given, *weights], []
        devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
        self._rng = capture_rng(devices)
        self.tangents: list[Tensor | None] = []
        outputs: tuple[Tensor, ...] = _Recomputed.apply(self, *tensors)  # type: ignore[no-untyped-call]
        results = iter(outputs)
        leaves = [next(results) if leaf is _TENSOR else leaf for leaf in self._results]
        return unflatten(self._result_structure, iter(leaves))

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, and their tangents in `tangents`."""
        watcher = Watcher(tensors)
        with self._slots.installed(tensors[self._count :], self._slots.read_buffers()), watcher.on():
            out = self._call(tensors[: self._count])
            buffers = self._slots.read_buffers()
        self._slots.install_buffers(buffers)
        if watcher.found:
            raise NotImplementedError(
                f"a block of class {type(self._module).__name__} reads a tensor that is neither its argument nor its "
                f"parameter (shape {tuple(watcher.found[0].shape)}; pass it as an argument, block(x, tensor))"
            )
        leaves: list[Any] = []
        self._result_structure = flatten(out, leaves)
        self._results = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        parts = [forward_ad.unpack_dual(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        self.tangents = [part.tangent for part in parts]
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return [
            part.primal.clone() if part.primal.untyped_storage().data_ptr() in given else part.primal.detach()
            for part in parts
        ]

    def again(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs that have a gradient, once more."""
        with (
            self._as_it_was(),
            rng_restored(self._rng),
            second_order_here(),
            self._slots.installed(tensors[self._count :], copied(self._buffers)),
        ):
            out = self._call(tensors[: self._count])
        leaves: list[Any] = []
        flatten(out, leaves)
        return tuple([leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()])


def _nobody() -> None:
    return None


_TENSOR = object()  # in the place of a tensor


class _Recomputed(torch.autograd.Function):
    """A block whose inputs are kept, values and tangents, and nothing else."""

    @staticmethod
    def forward(call: _BlockCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs; their tangents wait for `jvp`."""
        with forward_ad._set_fwd_grad_enabled(True), torch.enable_grad():
            return tuple(call.forward(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the inputs."""
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.mark_non_differentiable(*[tensor for tensor in output if not tensor.is_floating_point()])

    @staticmethod
    def jvp(ctx: Any, call: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The tangents that the forward has computed already."""
        found, ctx.call.tangents = ctx.call.tangents, []
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """Run the block again and pull the cotangents back through it."""
        if torch.is_grad_enabled():
            raise NotImplementedError("an inner derivative, create_graph=True, passes through a block")
        saved: list[Tensor] = list(ctx.saved_tensors)
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[1:]) if needed]

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            tensors = list(saved)
            for index, tensor in zip(wanted, inputs, strict=True):
                tensors[index] = tensor
            return ctx.call.again(*tensors)  # type: ignore[no-any-return]

        outputs, pull_back = cast(Any, torch.func.vjp(as_reverse_mode(run), *[saved[index] for index in wanted]))
        del outputs
        given = tuple([cotangent for cotangent in cotangents if cotangent.is_floating_point()])
        found = dict(zip(wanted, pull_back(given, retain_graph=False, create_graph=False), strict=True))
        return (None, *[found.get(index) for index in range(len(saved))])
