"""What steps read from outside: held by reference as long as somebody else holds it as well, else put into the store.

NOTE [ Held for the backward alone ]

A record needs the externals of its step until the backward. While somebody else holds the same storage, a resident
dataset or a list of batches, the reference costs nothing, and a copy would save nothing. Once nobody else does, the
storage is held for the backward alone. Then it goes into the store, once, however many tensors and steps read it; and
as nobody is left who could write into it, what is stored is final. With `store="device"` it stays, and is counted: when
such bytes outgrow the carries a warning says so, once.

That nobody else holds a storage is known by the number of its references. What is held of an external is an *alias*,
`tensor.detach()`: it has the same storage and the same version counter (rule R4), and lets the tensor itself die.
Whether a storage is held alone is looked up when a tensor that was read dies, not at every step for every storage.

The storages that the last step reads, taken or replayed, are *hot*: they stay on the device, as a kept carry does (NOTE
[ Hot and cold ]). So the newest batch, which the backward needs first, is not moved, and a dataset that the loop's
function has dropped is not read again for each step. Small storages stay, and so does what requires grad: a gradient
may be asked for it.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowmem_higher.errors import BatchesHeldWarning, ExternalModifiedError
from lowmem_higher.ledger import Ledger
from lowmem_higher.packing import Constants, is_strided
from lowmem_higher.program import modified_error
from lowmem_higher.record import version_of
from lowmem_higher.report import format_bytes
from lowmem_higher.step import External, Reference
from lowmem_higher.store import Store, Stored

_SMALL = 4096  # bytes: what a file takes on disk, and about what the objects that stand for a stored tensor take
_WORTH_A_WORD = 64 * 2**20  # bytes: nobody needs to be told of less
_LOOKS = 4  # storages looked at in each step of which the tensors that were read are gone, but not all others


class Hint:
    """Whether the warning was given; shared by all that belongs to one context."""

    given = False


class Pieces:
    """The tensors of one storage that steps have read."""

    advice = (
        "keep the batches out of it: cut them from resident data inside the loop, x[idx], or let the step fetch them, "
        "diffopt.step(fn, idx)"
    )

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self._versions = [version_of(tensor) for tensor in tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages."""
        storages = [tensor.untyped_storage() for tensor in self.tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def modified(self) -> Tensor | None:
        """One that was modified in place since they were read back; before that nobody is left who could."""
        for tensor, version in zip(self.tensors, self._versions, strict=True):
            if version_of(tensor) != version:
                return tensor
        return None

    @staticmethod
    def modified_error(tensor: Tensor, time: int) -> ExternalModifiedError:
        """Rule R4."""
        return modified_error(tuple(tensor.shape), 0, version_of(tensor), f"after step {time}")

    def taken_apart(self) -> tuple[list[Tensor], Callable[[list[Tensor]], Pieces]]:
        """The tensors, and the function that makes the same of such tensors."""
        return self.tensors, Pieces

    def described(self, time: int) -> str:
        """What they are, for a message."""
        return f"what step {time} reads from outside (a tensor of shape {tuple(self.tensors[0].shape)})"


class Original(weakref.ref[Tensor]):
    """A tensor that a step read, as long as it lives."""

    __slots__ = ("alias",)
    alias: weakref.ref[Alias]


class Count:
    """How many aliases there are of one storage, of all runs."""

    __slots__ = ("__weakref__", "aliases")

    def __init__(self) -> None:
        self.aliases = 0


class Alias:
    """One tensor that steps have read; their records hold it.

    Attributes:
        storage: What it is a part of.
        original: The tensor that was read; None once that is gone.
        tensor: The alias; None if the storage was put into the store.
        position: Which of the stored tensors it is.
    """

    __slots__ = ("__weakref__", "_holdings", "_version", "dtype", "original", "position", "shape", "storage", "tensor")

    requires_grad = False

    def __init__(self, original: Original, tensor: Tensor, storage: HeldStorage, holdings: Holdings) -> None:
        self.original: Original | None = original
        self.tensor: Tensor | None = tensor.detach()
        self.shape: tuple[int, ...] = tensor.shape
        self.dtype = tensor.dtype
        self.storage = storage
        self.position = self._version = 0
        self._holdings = holdings
        storage.add(self)

    def __del__(self) -> None:
        """Count it off."""
        if self.tensor is not None:
            self.storage.count.aliases -= 1

    @property
    def version(self) -> int:
        """How often its storage was written into."""
        return self._version if self.tensor is None else version_of(self.tensor)

    def read(self) -> Tensor:
        """The tensor, on its device."""
        return self.storage.pieces().tensors[self.position] if self.tensor is None else self.tensor

    def use_with(self, others: Sequence[Reference]) -> None:
        """These are about to be read, together."""
        self._holdings.use([other.storage for other in others if isinstance(other, Alias)])

    def let_go(self, position: int) -> None:
        """Leave it to the store alone."""
        self._version, self.position, self.tensor = self.version, position, None
        self.storage.count.aliases -= 1


class HeldStorage:
    """One storage that steps have read, on the device or in the store.

    Attributes:
        time: The step that read it first.
        count: Of its aliases.
        alone: Whether it is known to be held for the backward alone.
        awaited: Whether it is looked at now and then.
        stored: It in the store.
        back: What was read back from there, while it is hot.
    """

    __slots__ = ("__weakref__", "_aliases", "_key", "_ledger", "alone", "awaited", "back", "count", "stored", "time")

    def __init__(self, time: int, storage: torch.UntypedStorage, count: Count, ledger: Ledger) -> None:
        self.time = time
        self.count = count
        self.alone = self.awaited = False
        self.stored: Stored[Pieces] | None = None
        self.back: Pieces | None = None
        self._aliases: list[weakref.ref[Alias]] = []
        self._ledger = ledger
        self._key = ledger.hold_storage(storage)

    def __del__(self) -> None:
        """Count it off."""
        if self.stored is None:
            self._ledger.release_storage(self._key, alone=self.alone)

    def add(self, alias: Alias) -> None:
        """One more."""
        if len(self._aliases) > 2 * self.count.aliases + 8:
            self._aliases = [held for held in self._aliases if held() is not None]
        self._aliases.append(weakref.ref(alias))
        self.count.aliases += 1

    def own(self) -> list[Alias]:
        """The aliases of this run."""
        return [alias for held in self._aliases if (alias := held()) is not None]

    def newest(self) -> Alias | None:
        """The newest of them."""
        return next((alias for held in reversed(self._aliases) if (alias := held()) is not None), None)

    def is_alone(self, tensor: Tensor) -> bool:
        """Whether nobody holds it but records, of whatever run; `tensor` is one of the aliases."""
        return _references(tensor) - _UNCOUNTED == self.count.aliases

    def stays(self) -> None:
        """It is held alone, where it is."""
        self.alone = True
        self._ledger.count_alone(self._key)

    def put(self, store: Store) -> None:
        """Leave it to the store alone."""
        own = self.own()
        tensors = [alias.tensor for alias in own if alias.tensor is not None]
        self.stored = store.put(Pieces(tensors), self.time, Constants())
        for position, alias in enumerate(own):
            alias.let_go(position)
        self._ledger.release_storage(self._key, alone=False)

    def pieces(self) -> Pieces:
        """What is stored, on the device until it is no longer hot."""
        if self.back is None or self.back.modified is not None:
            assert self.stored is not None
            self.back = self.stored.get()
        return self.back


class Holdings:
    """The externals of one run's steps.

    Args:
        store: Where those go that are held for the backward alone; None leaves them where they are.
        ledger: Counts them.
        hint: Whether the warning was given.
    """

    def __init__(self, store: Store | None, ledger: Ledger, hint: Hint) -> None:
        self._store = None if store is None else store.beside()
        self._ledger = ledger
        self._hint = hint
        self._known: weakref.WeakValueDictionary[int, Alias] = weakref.WeakValueDictionary()  # by id of the original
        self._on_device: weakref.WeakValueDictionary[int, HeldStorage] = weakref.WeakValueDictionary()
        self._died: deque[Original] = deque()
        self._pending: deque[weakref.ref[HeldStorage]] = deque()  # to be looked at
        self._shared: deque[weakref.ref[HeldStorage]] = deque()  # others hold them, and none by a tensor that was read
        self._hot: list[weakref.ref[HeldStorage]] = []

    def hold(self, tensors: Sequence[Tensor], time: int) -> list[External]:
        """Hold what step `time` reads for as long as what is returned is held.

        Raises:
            StoreError: What an earlier step reads could not be put into the store.
        """
        self._ledger.begin_record()
        found: list[External] = [self._alias(tensor, time) if _is_large(tensor) else tensor for tensor in tensors]
        self.use([external.storage for external in found if isinstance(external, Alias)])
        if self._store is None:
            self._warn()
        return found

    def use(self, storages: Sequence[HeldStorage]) -> None:
        """These are hot now; let go of others."""
        if self._store is not None:
            self._store.let_go()
        self._pending.extend(self._hot)
        self._hot = [weakref.ref(storage) for storage in storages]
        while self._died:
            alias = self._died.popleft().alias()
            if alias is not None:
                self._pending.append(weakref.ref(alias.storage))
        for _ in range(min(_LOOKS, len(self._shared))):
            awaited = self._shared.popleft()
            if (held := awaited()) is not None:
                held.awaited = False
                self._pending.append(awaited)
        while self._pending:
            held = self._pending[0]()
            if held is not None and held not in storages:
                self._cool(held)
            self._pending.popleft()  # done, not to be done again if storing another one raises

    def _cool(self, held: HeldStorage) -> None:
        newest = held.newest()
        if held.stored is not None or held.alone or newest is None or newest.tensor is None:
            held.back = None
        elif held.is_alone(newest.tensor):
            self._on_device.pop(newest.tensor.untyped_storage()._cdata, None)
            if self._store is not None and self._store.takes(newest.tensor):
                held.put(self._store)
            else:
                held.stays()
            for alias in held.own():
                alias.original = None
        elif not held.awaited and (newest.original is None or newest.original() is None):
            held.awaited = True  # else it is looked at when that dies
            self._shared.append(weakref.ref(held))

    def _alias(self, tensor: Tensor, time: int) -> Alias:
        alias = self._known.get(id(tensor))
        if alias is not None and alias.original is not None and alias.original() is tensor:
            return alias
        storage = tensor.untyped_storage()
        held = self._on_device.get(storage._cdata)
        if held is None:
            count = _counts.get(storage._cdata)
            if count is None:
                count = _counts[storage._cdata] = Count()
            held = self._on_device[storage._cdata] = HeldStorage(time, storage, count, self._ledger)
        original = Original(tensor, self._died.append)
        alias = self._known[id(tensor)] = Alias(original, tensor, held, self)
        original.alias = weakref.ref(alias)
        return alias

    def _warn(self) -> None:
        alone, carries = self._ledger.alone_bytes, self._ledger.carries_bytes
        if self._hint.given or alone <= max(_WORTH_A_WORD, carries):
            return
        self._hint.given = True
        warnings.warn(
            f"The batches handed to {self._ledger.steps} inner steps take {format_bytes(alone)} that nothing but the "
            f"outer backward needs, more than the kept carries, {format_bytes(carries)}, and grow with every step. Cut "
            "each batch from resident data inside the loop, fmodel(x[idx]), of which idx alone is kept; or let the "
            "step fetch it, diffopt.step(fn, idx) with a function fn(fmodel, idx). Or put them elsewhere: "
            "innerloop_ctx(..., store='host') from a GPU, or store='a/directory'.",
            BatchesHeldWarning,
            stacklevel=6,
        )


_counts: weakref.WeakValueDictionary[int, Count] = weakref.WeakValueDictionary()  # by storage


def _is_large(tensor: Tensor) -> bool:
    return not tensor.requires_grad and is_strided(tensor) and tensor.untyped_storage().nbytes() >= _SMALL


def _references(tensor: Tensor) -> int:
    found: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return found


_UNCOUNTED = _references(torch.empty(1, device="cpu")) - 1  # by which the look itself adds to the count
