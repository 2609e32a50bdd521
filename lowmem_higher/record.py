"""The recorder: sees every torch call of the user's loop and remembers how living tensors were made.

NOTE [ The shadow graph ]

The user's loop hands over a finished loss tensor, never a function. To run a step again the engine must know how the
loss was made, so a `TorchFunctionMode` sees each torch call made in the context:

* A tensor leads weakly to the `Node` that made it; a node holds its inputs and their nodes. When the tensors that need
  a node are gone the node is gone too: evaluating a thousand batches between two steps leaves nothing behind.
* A call of the fmodel (or of a submodule) is one node. Its inside is only watched (see `watch.py`).
* `autograd.Function.apply` is one node, replayed through `apply`, and so keeps its own backward (rule R8).
* An in-place write is a node; a later reader of the same storage depends on the last write, and so on all before it.
* What a node reads that was made before the last step is an *external*, held by reference. So is a tensor without
  gradient that the recorder chose not to follow: by value it is exact too. It follows one only where that saves
  memory (a batch cut from a resident dataset), so not what depends on weights, what is smaller than what it was made
  from or than the record of its making (`_SMALL`, `_SMALL_DRAW`), what would make a recipe long (`_LONGEST_RECIPE`),
  and what was read from a tensor that the loop writes into.

A tensor whose making was not seen is an external as well. If it depends on the current fast weights, `step` finds that
in the autograd graph and raises (rule R9).
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from lowmem_higher.replay_state import Ambient, ModuleState, RngState, capture_rng, same_rng
from lowmem_higher.structure import Structure, bytes_of, flatten, tensors_in
from lowmem_higher.tensor_map import TensorMap
from lowmem_higher.watch import Watcher, intercepted_apply, may_write, written_statistics

_SMALL = 64  # bytes: a tensor of this size costs no more than the record of how it was made
_SMALL_DRAW = 5056  # bytes: the state of the CPU's generator, which replaying a draw would need
_LONGEST_RECIPE = 31  # calls


@dataclass(eq=False)
class BufferState:
    """The buffers of a model at one moment; never written into. `producer` is the call that left them so."""

    tensors: tuple[Tensor | None, ...]
    producer: weakref.ref[Node] | None = None


@dataclass(eq=False)
class Inside:
    """What a call of the model read besides its arguments."""

    weights: list[Tensor]
    buffers: BufferState
    state: ModuleState
    found: list[Tensor]
    found_versions: list[int]


class Overwritten:
    """In place of a leaf that its node wrote into; a replay has the value from the leaf's own maker."""


class Link(NamedTuple):
    """How a tensor was made: `output` of `node`, or, if negative, its leaf `-1 - index` after a write into it."""

    node: Node
    output: int
    version: int
    leaf: bool


class Node:
    """One recorded call: what was called, with what, and in which state."""

    __slots__ = (
        "__weakref__",
        "after",
        "ambient",
        "call",
        "index",
        "inside",
        "leaves",
        "links",
        "outputs",
        "rng",
        "structure",
        "versions",
        "weight",
    )

    def __init__(
        self, index: int, call: Any, structure: Structure, leaves: list[Any], inside: Inside | None = None
    ) -> None:
        self.index = index
        self.call = call
        self.structure = structure
        self.leaves = leaves
        self.links: list[tuple[Node, int] | None] = [None] * len(leaves)
        self.after: list[Node] = []  # writes that come before this call without being arguments
        self.versions: list[int] = [0] * len(leaves)
        self.ambient = Ambient.capture()
        self.rng: RngState | None = None
        self.inside = inside
        self.weight = 1
        self.outputs = 1


@dataclass(frozen=True)
class FunctionApply:
    """The call of a custom `autograd.Function`."""

    function: Any

    def __call__(self, *args: Any) -> Any:
        """Apply the function, with its own backward."""
        return self.function.apply(*args)

    @property
    def __name__(self) -> str:
        return f"{self.function.__name__}.apply"


class Recorder(TorchFunctionMode):
    """Records the torch calls of one thread while a checkpointed context is open."""

    def __init__(self) -> None:
        super().__init__()
        self._made: TensorMap[Link] = TensorMap()
        self._written: TensorMap[Link] = TensorMap()  # by the base of the views that share a storage: the last write
        self._volatile: TensorMap[bool] = TensorMap()  # tensors from outside that the loop writes into
        self._hooked: TensorMap[bool] = TensorMap()  # tensors with a hook, which a replay would not call
        self._exposed: TensorMap[bool] = TensorMap()  # tensors whose `.data` was taken: writes into it are not counted
        self._indices = itertools.count(1)
        self._windows: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._horizon = 0  # nodes older than every open window are never replayed again
        self._purge_above = 256
        self._busy = False  # inside a recorded call
        self._watcher: Watcher | None = None
        self._contexts = 0
        self._recording = 0  # of these contexts; the others are paused
        self._depth = 0  # of the mode among those of torch functions
        self.inner_leaves: TensorMap[bool] = TensorMap()  # made inside watched code, and requiring grad
        self.devices: set[torch.device] = set()

    # Contexts and windows

    def enter(self) -> None:
        """A checkpointed context opens: the first one starts the recording."""
        self._contexts += 1
        self._depth = len(_get_current_function_mode_stack()) if self._recording == 0 else self._depth
        self.resume()

    def leave(self, window: object) -> None:
        """A context closes, in whatever order contexts close: the last one ends the recording."""
        self._contexts -= 1
        self.pause(window)
        if self._contexts == 0:
            for entries in (self._made, self._written, self._volatile, self._hooked, self._exposed, self.inner_leaves):
                entries.clear()

    def pause(self, window: object) -> None:
        """The next steps of a context are not to be replayed: if no other one records, see nothing."""
        self._windows.pop(window, None)
        self._recording -= 1
        if self._recording == 0:
            self._depth = _get_current_function_mode_stack().index(self)
            with _lifted_from(self._depth + 1):
                super().__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch's
            intercepted_apply.remove(self._apply)

    def resume(self) -> None:
        """They are again: see the calls, from the same place among the modes, whatever was opened since."""
        self._recording += 1
        if self._recording == 1:
            intercepted_apply.push(self._apply)
            with _lifted_from(self._depth):
                super().__enter__()  # type: ignore[no-untyped-call]  # torch's

    @property
    def active(self) -> bool:
        """Whether torch calls made now are recorded."""
        return self._recording > 0 and self._watcher is None and not self._busy

    def start_window(self, window: object) -> int:
        """A step of this trajectory was taken: what was made until now is past for it. Returns the first new index."""
        start = next(self._indices)
        self._windows[window] = start
        self._horizon = min(self._windows.values())
        if self._horizon == start:
            self._made.clear()
            self._written.clear()
        elif len(self._made) > self._purge_above:
            for entries in (self._made, self._written):
                entries.keep(lambda link: link.node.index >= self._horizon)
            self._purge_above = 2 * len(self._made) + 256
        return start

    @contextmanager
    def watching(self, watcher: Watcher | None) -> Iterator[None]:
        """Record nothing inside the block; let `watcher` see the calls, if there is one."""
        busy, watched = self._busy, self._watcher
        self._busy, self._watcher = watcher is None, watcher
        try:
            yield
        finally:
            self._busy, self._watcher = busy, watched

    @property
    def inside(self) -> bool:
        """Whether a recorded call is running now."""
        return self._busy or self._watcher is not None

    def hooked(self, tensor: Tensor) -> bool:
        """Whether a hook was registered on a tensor while recording."""
        return bool(self._hooked.get(tensor))

    def exposed(self, tensor: Tensor) -> bool:
        """Whether a tensor may have been written into through `.data`, which no version counts."""
        return bool(self._exposed.get(tensor))

    # Seeing calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See one torch call: run it, and remember what it made."""
        kwargs = kwargs or {}
        if self._watcher is not None:
            return self._watcher.__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.register_hook and not self._busy:
            self._hooked.set(args[0], True)
        if func in _BACKWARD:
            with self.watching(None):  # hooks and recomputations that it runs are not the loop's own calls
                return func(*args, **kwargs)
        if self._busy or func in _NOT_RECORDED or _is_getter(func) or torch._C._are_functorch_transforms_active():
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            return func(*args, **kwargs)
        return self._record(func, func, args, kwargs)

    def _apply(self, function: type, original: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self._watcher is not None:
            return original(*self._watcher.look(args, {})[0])
        if self._busy or torch._C._are_functorch_transforms_active():
            return original(*args)
        return self._record(FunctionApply(function), original, args, {})

    def made_in(self, window: int, tensor: Tensor) -> bool:
        """Whether a tensor was made, as it is now, in this window or inside watched code."""
        link, _ = self.link(tensor)
        return bool(self.inner_leaves.get(tensor)) or (link is not None and link.node.index >= window)

    def new_node(self, call: Any, structure: Structure, leaves: list[Any], inside: Inside | None = None) -> Node:
        """A node for a call that is about to run, linked to the makers of its inputs."""
        for leaf in leaves:
            if isinstance(leaf, Tensor) and self._got_gradient_by_base(leaf):
                self._see_as_view(leaf)
        node = Node(next(self._indices), call, structure, leaves, inside)
        self._read_inputs(node)
        return node

    def _record(self, call: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = getattr(call, "__name__", "")
        if _changes_flags(call, name):
            self._made.pop(args[0])  # from here on it is held by reference
            return run(*args, **kwargs)
        if call == _TAKE_DATA:
            self._exposed.set(args[0], True)
        statistics = written_statistics(call, args, kwargs)
        leaves: list[Any] = []
        structure = flatten(_without(statistics, args, kwargs) if statistics else (args, kwargs), leaves)
        if may_write(name, kwargs):
            self._copy_before_write(leaves)
        node = self.new_node(call, structure, leaves)
        tensors = [position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        rng = None if name in _DRAWS_NOTHING else capture_rng(self.devices)
        self._busy = True
        try:
            out = run(*args, **kwargs)
        finally:
            self._busy = False
        if rng is not None and not same_rng(rng, capture_rng(self.devices)):
            node.rng = rng
        written = [
            position for position in tensors if version_of(leaves[position]) != node.versions[position]
        ]  # fmt: skip
        for tensor in statistics:
            self._volatile.set(_base(tensor), True)
        outputs = tensors_in(out)
        if written or outputs:
            self.add(node, outputs, written)
        return out

    def _read_inputs(self, node: Node) -> None:
        for position, leaf in enumerate(node.leaves):
            if isinstance(leaf, Tensor):
                node.versions[position] = version_of(leaf)
                link, after = self.link(leaf)
                if link is not None:
                    node.links[position] = (link.node, link.output)
                    node.weight += link.node.weight
                if after is not None:
                    node.after.append(after)
                    node.weight += after.weight
            elif isinstance(leaf, torch.Generator):
                node.leaves[position] = leaf.clone_state()

    def link(self, tensor: Tensor) -> tuple[Link | None, Node | None]:
        """Who made a tensor as it is now, and the last write into its storage by another name; None if not known."""
        made = self._made.get(tensor)
        if made is None or made.node.index < self._horizon:
            return None, None
        if made.version == version_of(tensor) and made.leaf == tensor.is_leaf:
            return made, None
        written = self._written.get(_base(tensor))
        if written is not None and written.version == version_of(tensor) and written.node.index >= self._horizon:
            return made, written.node
        return None, None

    def add(self, node: Node, outputs: list[Tensor], written: Sequence[int] = (), older: Container[int] = ()) -> None:
        """Remember what a node made and wrote, as far as it is worth following (NOTE [ The shadow graph ]).

        Args:
            node: The call that was run.
            outputs: The tensors of its result.
            written: The positions of the leaves that it wrote into.
            older: Ids of outputs that it only passed on: they existed before.
        """
        tensors = [leaf for leaf in node.leaves if isinstance(leaf, Tensor)]
        followed = node.inside is None and node.weight <= _LONGEST_RECIPE and not self._opaque(node)
        followed = followed and not any(tensor.requires_grad for tensor in tensors)
        inputs = {id(leaf) for leaf in node.leaves}
        node.outputs = len(outputs)
        for position, tensor in [(position, node.leaves[position]) for position in written]:
            if tensor.requires_grad and node.links[position] is not None:
                link = Link(node, -1 - position, version_of(tensor), tensor.is_leaf)
                self._made.set(tensor, link)
                self._written.set(_base(tensor), link)
                _let_go(node, _base(tensor))
            else:
                self._volatile.set(_base(tensor), True)
                self._made.pop(tensor)
                self._written.pop(_base(tensor))
        small = _SMALL if node.rng is None else _SMALL_DRAW
        if getattr(node.call, "__name__", "") not in _CUTS:
            small = max([small, *(bytes_of(tensor) - 1 for tensor in tensors)])
        made = False
        for index, tensor in enumerate(outputs):
            if tensor.device.type != "cpu":
                self.devices.add(tensor.device)
            if id(tensor) in inputs or id(tensor) in older or (tensor.requires_grad and tensor.is_leaf):
                continue  # a leaf that requires grad is an input, whoever made it
            if tensor.requires_grad or (followed and bytes_of(tensor) > small):
                made = True
                self._made.set(tensor, Link(node, index, version_of(tensor), tensor.is_leaf))
        if made and not followed:
            self._copy_what_may_change(node)

    def _copy_what_may_change(self, node: Node) -> None:
        """Hold copies of constants that the loop may write into before the step: small views, parts of such tensors."""
        for position, leaf in enumerate(node.leaves):
            if isinstance(leaf, Tensor) and not leaf.requires_grad and node.links[position] is None:
                small_view = leaf._base is not None and leaf.nbytes <= _SMALL
                if small_view or self._volatile.get(_base(leaf)):
                    node.leaves[position], node.versions[position] = leaf.clone(), 0

    def _opaque(self, node: Node) -> bool:
        """Whether a node read what may change behind the recorder's back."""
        return any(
            self._volatile.get(_base(leaf)) if isinstance(leaf, Tensor) else not isinstance(leaf, (int, float, complex))
            for leaf in node.leaves
        )

    def _copy_before_write(self, leaves: list[Any]) -> None:
        """A write that gives a tensor from outside a gradient: let the replay start from a copy of what it was.

        The tensor `out = torch.zeros(3)` of `out[i] = loss_i` is such a one. Of a view all of its base is copied, since
        the write reaches that as well.
        """
        target = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
        if target is None or target.requires_grad or not torch.is_grad_enabled() or self.link(target)[0] is not None:
            return
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            base = _base(target)
            if self.link(base)[0] is None:
                with torch.no_grad():
                    before = base.clone()
                node = Node(next(self._indices), torch.clone, _ONE_TENSOR, [before])
                self._made.set(base, Link(node, 0, version_of(base), True))
            if base is not target:
                self._see_as_view(target)

    def _got_gradient_by_base(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view, not followed so far, of one that was given a gradient by a write."""
        if tensor._base is None or not tensor.requires_grad:
            return False
        return self._made.get(tensor) is None and self._written.get(tensor._base) is not None

    def _see_as_view(self, view: Tensor) -> None:
        """Let a view whose making was not followed be made from its base, which was."""
        leaves: list[Any] = []
        structure = flatten(((_base(view), view.size(), view.stride(), view.storage_offset()), {}), leaves)
        self._made.set(
            view, Link(self.new_node(torch.as_strided, structure, leaves), 0, version_of(view), view.is_leaf)
        )


def _without(statistics: list[Tensor], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The same arguments without running statistics, on which the result of a call that writes them does not depend."""
    written = {id(tensor) for tensor in statistics}
    left = tuple([None if id(value) in written else value for value in args])
    return left, {key: None if id(value) in written else value for key, value in kwargs.items()}


_ONE_TENSOR = flatten(((torch.empty(0),), {}), [])
_thread = threading.local()


def recorder() -> Recorder:
    """The recorder of this thread: one, so that contexts may be open side by side and close in any order."""
    if not hasattr(_thread, "recorder"):
        _thread.recorder = Recorder()
    found: Recorder = _thread.recorder
    return found


def _let_go(node: Node, base: Tensor) -> None:
    """After a write, let the node and those that made the view hold the storage no more: it would never die."""
    pending = [node]
    while pending:
        current = pending.pop()
        for position, leaf in enumerate(current.leaves):
            made = current.links[position]
            if made is not None and isinstance(leaf, Tensor) and _base(leaf) is base:
                current.leaves[position] = Overwritten()
                pending.append(made[0])


def version_of(tensor: Tensor) -> int:
    """How often the storage was written into; 0 for an inference tensor, which does not count."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


@contextmanager
def _lifted_from(depth: int) -> Iterator[None]:
    """The torch-function modes from this place on are off the stack inside the block."""
    above = _get_current_function_mode_stack()[depth:]
    for mode in reversed(above):
        mode.__exit__(None, None, None)
    try:
        yield
    finally:
        for mode in above:
            mode.__enter__()


# Calls whose results are no tensors, or tensors that are not made by them.
_BACKWARD = (torch.Tensor.backward, torch.autograd.backward)
_NOT_RECORDED = {
    *(getattr(torch.Tensor, name) for name in (
        "size", "dim", "numel", "stride", "item", "tolist", "numpy", "data_ptr", "is_floating_point", "is_complex",
        "untyped_storage", "element_size", "get_device", "register_hook", "retain_grad", "__len__", "__repr__",
        "__format__", "__bool__", "__float__", "__int__", "__index__", "__hash__", "__array__", "__contains__",
        "__deepcopy__", "__reduce_ex__",
    )),
}  # fmt: skip
_TAKE_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]  # a getter of C
_MADE_BY_GETTER = {"T", "mT", "H", "mH", "real", "imag", "data"}


def _is_getter(func: Any) -> bool:
    """Whether `func` only reads an attribute: `x.shape`, not `x.T`."""
    if getattr(func, "__name__", "") != "__get__":
        return False
    return getattr(getattr(func, "__self__", None), "__name__", "") not in _MADE_BY_GETTER


def _changes_flags(func: Any, name: str) -> bool:
    """Whether a call changes its tensor without writing into the storage: its place in the graph, or all of it."""
    if name == "__set__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in ("requires_grad", "data")
    return name in ("requires_grad_", "detach_")


# Calls whose result is a small part of a tensor that is likely to stay: a batch of a resident dataset.
_CUTS = frozenset(["__getitem__", "index_select", "narrow", "select", "take", "gather", "chunk", "split", "unbind"])

# Calls that never draw a random number, so that the generators need not be read around them.
_DRAWS_NOTHING = frozenset(
    """
    __abs__ __add__ __and__ __eq__ __ge__ __get__ __getitem__ __gt__ __iadd__ __imul__ __invert__
    __itruediv__ __le__ __lt__ __matmul__ __mul__ __ne__ __neg__ __or__ __pow__ __radd__ __rmatmul__ __rmul__
    __rpow__ __rsub__ __rtruediv__ __set__ __setitem__ __sub__ __truediv__ __xor__ abs add add_ addcdiv
    addcmul amax amin arange argmax argmin as_tensor avg_pool2d bfloat16 binary_cross_entropy
    binary_cross_entropy_with_logits bmm bool cat chunk clamp clamp_ clone contiguous conv1d conv2d conv3d
    copy_ cos cosine_similarity cpu cross_entropy cuda cumsum detach detach_ div div_ dot double einsum
    embedding empty exp expand expand_as expm1 eye fill_ flatten float full full_like gather grad group_norm
    half huber_loss index_select int interpolate kl_div l1_loss layer_norm lerp linear linspace log log1p
    log_softmax logsumexp long masked_fill masked_select matmul max max_pool2d mean min mm mse_loss mul mul_
    mv narrow neg nll_loss norm normalize one_hot ones ones_like outer pad permute pow prod relu repeat
    requires_grad_ reshape rsqrt scatter sigmoid sign sin smooth_l1_loss softmax softplus sort split sqrt
    square squeeze stack std sub sub_ sum t take tanh tensor to topk transpose true_divide type type_as
    unbind unsqueeze var view view_as where zero_ zeros zeros_like
    """.split()  # noqa: SIM905  (a list of 200 strings, one a line, would hide the rest of the file)
)
