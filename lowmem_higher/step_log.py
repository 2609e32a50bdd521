"""What is kept of each step of a loop that is a function: enough to notice that it is not the same when taken again."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from lowmem_higher.errors import ReplayMismatchError
from lowmem_higher.packing import is_strided
from lowmem_higher.span_files import memory_of
from lowmem_higher.structure import flatten, is_dtensor, layout_of, local

RECORD = 12  # bytes of a step in the file
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_COARSE = 3e-2


class StepLog:
    """Of each step the checksum of its batch, and its loss: what a replay, in this process or another, has to give."""

    def __init__(self, steps: int) -> None:
        self.batches = array("I", bytes(4 * steps))
        self.losses = array("d", bytes(8 * steps))
        self.count = 0  # steps that were taken so far

    def check_batch(self, step: int, batch: Any) -> None:
        """Note the batch of a step, or compare it with the one that the step had before.

        Raises:
            ReplayMismatchError: It is another one.
        """
        checksum = checksum_of(batch)
        if step >= self.count:
            self.batches[step] = checksum
        elif self.batches[step] != checksum:
            raise ReplayMismatchError(
                f"The batch of step {step} is not what it was when the loop took that step: its checksum is "
                f"{checksum:08x} and was {self.batches[step]:08x}. metagradient reads each batch again to replay its "
                "step, so batches(t), or batches[t], must give the same every time: shuffle with a generator seeded by "
                "t, random.Random(t) or torch.Generator().manual_seed(t), and leave the data as it is until the end."
            )

    def check_loss(self, step: int, loss: Tensor) -> None:
        """Note the loss of a step that was taken, or compare it with the one that the step had before.

        Raises:
            ReplayMismatchError: It is another one, by more than rounding.
        """
        value = float(loss)
        if step >= self.count:
            self.losses[step], self.count = value, step + 1
            return
        before = self.losses[step]
        if not abs(value - before) <= _TOLERANCE.get(loss.dtype, _COARSE) * (abs(before) + 1e-3):
            raise ReplayMismatchError(
                f"Step {step}, taken again, has the loss {value:.9g}, and had {before:.9g}. Likely causes: "
                "loss_fn, outer or the model's forward reads something that is no argument and has changed (a global, "
                "an attribute of another object), or draws random numbers from numpy or random; the program was "
                "changed between two calls with one run_dir; kernels that are not deterministic. Pass what changes as "
                "part of the batch, or by meta=...; begin a changed program with another run_dir=..."
            )

    def __getitem__(self, stretch: slice) -> bytes:
        """The records of some steps, as in the file."""
        records = bytearray()
        for checksum, loss in zip(self.batches[stretch], self.losses[stretch], strict=True):
            records += checksum.to_bytes(4, "little") + array("d", [loss]).tobytes()
        return bytes(records)

    def fill(self, records: bytes) -> None:
        """Take over what was read from the file."""
        self.count = min(len(records) // RECORD, len(self.batches))
        for step in range(self.count):
            record = records[step * RECORD : (step + 1) * RECORD]
            self.batches[step] = int.from_bytes(record[:4], "little")
            self.losses[step] = array("d", record[4:])[0]


def checksum_of(value: Any, checksum: int = 0, depth: int = 3) -> int:
    """The CRC-32 of tensors, arrays and numbers in nested collections and objects: of values, shapes and types.

    Example:
        >>> checksum_of([1, 2.0]) == checksum_of([1, 2.0]), checksum_of([1, 2.0]) == checksum_of([1, 2.5])
        (True, False)
    """
    with torch._C.DisableTorchFunction(), temporarily_clear_interpreter_stack(), torch.no_grad():
        leaves: list[Any] = []
        checksum = zlib.crc32(repr(flatten(value, leaves)).encode(), checksum)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                checksum = _of_tensor(leaf, checksum)
            elif isinstance(leaf, (int, float, complex)):
                checksum = zlib.crc32(repr(leaf).encode(), checksum)
            else:
                checksum = _of_object(leaf, checksum, depth)
    return checksum


def _of_tensor(tensor: Tensor, checksum: int) -> int:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # made inside a transform
        tensor = torch._C._functorch.get_unwrapped(tensor)
    checksum = zlib.crc32(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), checksum)
    if is_dtensor(tensor):
        checksum = zlib.crc32(layout_of(tensor).encode(), checksum)
        tensor = local(tensor)
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if not is_strided(tensor):
        return zlib.crc32(type(tensor).__name__.encode(), checksum)
    whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return zlib.crc32(memory_of(whole.reshape(-1).view(torch.uint8)), checksum)


def _of_object(leaf: Any, checksum: int, depth: int) -> int:
    """Of an array, or of what an object holds; of one that shows nothing its class is all that counts."""
    checksum = zlib.crc32(type(leaf).__name__.encode(), checksum)
    kind = getattr(leaf, "dtype", None)
    if hasattr(leaf, "tobytes") and not getattr(kind, "hasobject", False):
        checksum = zlib.crc32(f"{getattr(leaf, 'shape', '')} {kind}".encode(), checksum)
        return zlib.crc32(leaf.tobytes(), checksum)
    held = leaf if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", None)
    if depth == 0 or held is None or callable(leaf):
        return checksum
    return checksum_of(dict(held), checksum, depth - 1)
