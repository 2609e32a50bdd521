"""Counts what a run costs: runs of steps, carries and externals that are alive."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lowmem_higher.report import Report, Timeline
from lowmem_higher.step import Carry, External, Journal
from lowmem_higher.structure import storages_of

StorageKey = tuple[int, int]  # address, bytes


class Counted(Protocol):
    """What is counted while it is on the device: a carry, a journal, externals that were read back."""

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages."""


Kind = TypeVar("Kind", bound=Counted)


def _nothing() -> None:
    return None


class Ledger:
    """Counts runs, and the bytes of the carries that are alive."""

    def __init__(self) -> None:
        self.steps = self.unrolled_steps = self.first_order_runs = self.second_order_runs = 0
        self.checkpoints = self.checkpoints_peak = 0
        self.carry_bytes = self.carries_bytes = self.carries_peak_bytes = 0
        self.externals_bytes = self.alone_bytes = 0
        self.newest_externals_bytes = 0  # what the newest record has added
        self.update_runs = self.journal_bytes = 0
        self.stored_bytes = self.stored_peak_bytes = 0
        self.forward_seconds = self.backward_seconds = self.compile_seconds = 0.0
        self._storages: Counter[StorageKey] = Counter()
        self._timeline = Timeline()
        self.on_run: Callable[[], None] = _nothing  # after each run of a step

    def keep(self, content: Kind) -> Kind:
        """Count a carry, a journal or externals on the device until they are freed."""
        size = content.nbytes
        if isinstance(content, Carry):
            self.carry_bytes = max(self.carry_bytes, size)
            add = self._add_carry
        else:
            add = self._add_journal if isinstance(content, Journal) else self._add_externals
        add(size)
        weakref.finalize(content, add, -size).atexit = False
        return content

    def _add_carry(self, size: int) -> None:
        self.carries_bytes += size
        self.carries_peak_bytes = max(self.carries_peak_bytes, self.carries_bytes)

    def count_checkpoint(self, held: object) -> None:
        """Count a kept carry, wherever it is, until what stands for it is freed."""
        self._add_checkpoints(1)
        weakref.finalize(held, self._add_checkpoints, -1).atexit = False

    def _add_checkpoints(self, count: int) -> None:
        self.checkpoints += count
        self.checkpoints_peak = max(self.checkpoints_peak, self.checkpoints)

    def count_stored(self, stored: object, size: int) -> None:
        """Count bytes on host or disk until what stands for them is freed."""
        self._add_stored(size)
        weakref.finalize(stored, self._add_stored, -size).atexit = False

    def _add_stored(self, size: int) -> None:
        self.stored_bytes += size
        self.stored_peak_bytes = max(self.stored_peak_bytes, self.stored_bytes)

    def _add_journal(self, size: int) -> None:
        self.journal_bytes += size

    def _add_externals(self, size: int) -> None:
        self.externals_bytes += size

    def count_first_order(self) -> None:
        """Count a first-order run."""
        self.first_order_runs += 1
        self.on_run()

    def count_second_order(self) -> None:
        """Count a second-order run."""
        self.second_order_runs += 1
        self.on_run()

    def count_unrolled(self, *, twice: bool) -> None:
        """Count a step of the full unroll, which runs once, with its graph."""
        (self.count_second_order if twice else self.count_first_order)()
        self.unrolled_steps += 1
        self.steps += 1

    def count_update(self) -> None:
        """Count a carry got by the update rule alone."""
        self.update_runs += 1
        self.on_run()

    def add_compile_seconds(self, seconds: float) -> None:
        """Count time spent tracing and compiling."""
        self.compile_seconds += seconds

    def begin_record(self) -> None:
        """What is held from now on is the newest record's."""
        self.newest_externals_bytes = 0

    def hold(self, externals: list[External]) -> None:
        """Count the storages that a record refers to, each once; those behind references are counted on their own."""
        for tensor in externals:
            if isinstance(tensor, Tensor):
                for storage in storages_of(tensor):
                    self._hold(_key(storage))

    def release(self, externals: list[External]) -> None:
        """Count them off again."""
        for tensor in externals:
            if isinstance(tensor, Tensor):
                for storage in storages_of(tensor):
                    self._release(_key(storage))

    def hold_storage(self, storage: torch.UntypedStorage) -> StorageKey:
        """Count a storage; returns what it is counted off by."""
        key = _key(storage)
        self._hold(key)
        return key

    def release_storage(self, key: StorageKey, *, alone: bool) -> None:
        """Count it off, also from those held for the backward alone."""
        self._release(key)
        self.alone_bytes -= key[1] if alone else 0

    def count_alone(self, key: StorageKey) -> None:
        """Count the bytes of a storage that nobody holds but for the backward."""
        self.alone_bytes += key[1]

    def _hold(self, key: StorageKey) -> None:
        self._storages[key] += 1
        if self._storages[key] == 1:
            self.externals_bytes += key[1]
            self.newest_externals_bytes += key[1]

    def _release(self, key: StorageKey) -> None:
        self._storages[key] -= 1
        if self._storages[key] == 0:
            del self._storages[key]
            self.externals_bytes -= key[1]

    def sample(self, phase: str, step: int) -> None:
        """Note what is held now."""
        self._timeline.add(phase, step, self.carries_bytes + self.externals_bytes)

    def report(self) -> Report:
        """The counts as a value."""
        return Report(
            self.steps,
            self.first_order_runs,
            self.second_order_runs,
            self.checkpoints,
            self.checkpoints_peak,
            self.carry_bytes,
            self.carries_peak_bytes,
            self.externals_bytes,
            self.forward_seconds,
            self.backward_seconds,
            self.update_runs,
            self.journal_bytes,
            self.stored_bytes,
            self.stored_peak_bytes,
            self.unrolled_steps,
            self.compile_seconds,
            self._timeline.samples(),
        )


def _key(storage: torch.UntypedStorage) -> StorageKey:
    return storage.data_ptr(), storage.nbytes()
