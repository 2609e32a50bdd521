"""What a run cost, in passes, bytes and seconds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Report:
    """What a context has cost so far; `diffopt.report` gives a new one at each reading.

    Attributes:
        steps: Steps taken.
        first_order_runs: Times a step's forward and backward ran without a graph of the backward; the user's own loop
            counts too. At most `2 * steps` after one outer backward with `replay="native"`.
        second_order_runs: Times a step ran with the graph that is differentiated. `steps` after one outer backward.
            The full unroll runs every step this way, in the loop.
        checkpoints_held: Carries kept now at the starts of segments.
        checkpoints_peak: The most that were kept at once.
        carry_bytes: Bytes of one carry (fast weights, optimizer state, buffers): the largest so far.
        carries_peak_bytes: The most that carries took at once on the device, those of the segment being replayed
            included.
        externals_bytes: Bytes of the distinct storages that recorded steps hold by reference now; a resident dataset
            that steps index counts in full, once.
        forward_seconds: From entering the context to the end of the last step.
        backward_seconds: Spent in replays and pullbacks.
        update_runs: Carries got by the update rule alone, from a step's journal.
        journal_bytes: Bytes of the journals that are alive: inner gradients, and buffers.
        stored_bytes: Bytes of kept carries that are in host memory or on disk now, by `store`.
        stored_peak_bytes: The most that were there at once.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net = torch.nn.Linear(2, 1)
        >>> opt = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=4) as (fnet, diffopt):
        ...     for _ in range(10):
        ...         _ = diffopt.step(fnet(torch.ones(3, 2)).square().mean())
        ...     fnet(torch.ones(1, 2)).sum().backward()
        >>> report = diffopt.report
        >>> report.steps, report.first_order_runs, report.second_order_runs, report.checkpoints_peak
        (10, 17, 10, 3)
    """

    steps: int = 0
    first_order_runs: int = 0
    second_order_runs: int = 0
    checkpoints_held: int = 0
    checkpoints_peak: int = 0
    carry_bytes: int = 0
    carries_peak_bytes: int = 0
    externals_bytes: int = 0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    update_runs: int = 0
    journal_bytes: int = 0
    stored_bytes: int = 0
    stored_peak_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The report as a plain dictionary, for JSON.

        Example:
            >>> Report(steps=3).as_dict()["steps"]
            3
        """
        return dataclasses.asdict(self)

    def __repr__(self) -> str:
        journal = f"\n  journal: {format_bytes(self.journal_bytes)}; {self.update_runs} update runs"
        stored = f"\n  stored: {format_bytes(self.stored_bytes)}, {format_bytes(self.stored_peak_bytes)} at most"
        return (
            f"Report: {self.steps} steps; {self.first_order_runs} first-order and {self.second_order_runs} "
            f"second-order runs\n  checkpoints: {self.checkpoints_held} held, {self.checkpoints_peak} at most, "
            f"{format_bytes(self.carry_bytes)} each; carries took {format_bytes(self.carries_peak_bytes)} at most\n"
            f"  externals: {format_bytes(self.externals_bytes)}\n"
            f"  seconds: {self.forward_seconds:.3f} in the loop, {self.backward_seconds:.3f} in replays and pullbacks"
            f"{journal if self.update_runs or self.journal_bytes else ''}{stored if self.stored_peak_bytes else ''}"
        )


def format_bytes(count: float) -> str:
    """A number of bytes as a person reads it.

    Example:
        >>> format_bytes(1536)
        '1.5 KiB'
    """
    if count < 1024:
        return f"{count:.0f} B"
    exponent = min(int(math.log(count, 1024)), 3)
    return f"{count / 1024**exponent:.1f} {('KiB', 'MiB', 'GiB')[exponent - 1]}"
