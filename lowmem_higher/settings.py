"""The keywords of `innerloop_ctx` as one checked value; nothing else reads keywords."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lowmem_higher.blocks import Selection
from lowmem_higher.budget import parse_budget
from lowmem_higher.schedule import Bounded, Periodic, Revolve, Schedule

_ALL = 1 << 60  # carries, until it is known how many fit
_CHOICES = {"replay": ("native", "torch"), "pullback": ("reverse", "mixed"), "verify": ("new", "all", "off")}


@dataclass(frozen=True)
class Settings:
    """The keywords of `innerloop_ctx` that say how gradients are computed, checked."""

    checkpoint_every: int | None = None
    checkpoints: int | None = None
    steps: int | None = None
    memory_budget: float | str | None = None
    graphs: int = 1
    replay: str = "native"
    pullback: str = "reverse"
    verify: str = "new"
    truncate: int | None = None
    first_order: bool = False
    journal: bool = False
    store: str | os.PathLike[str] = "device"
    progress: bool | str = False
    blocks: Selection | None = None
    microbatches: int = 1
    compile: bool | str = False

    def __post_init__(self) -> None:
        _check_count("checkpoint_every", self.checkpoint_every, "a carry is kept every so many steps")
        _check_count("checkpoints", self.checkpoints, "so many carries are held")
        _check_count("steps", self.steps, "so many inner steps will be taken")
        if self.checkpoint_every is not None and self.checkpoints is not None:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} and checkpoints={self.checkpoints} are two ways to say "
                "which carries are kept: every so many steps, or so many in all. Give one of them."
            )
        self._check_budget()
        if self.steps is not None and self.checkpoints is None and self.memory_budget is None:
            raise ValueError(
                f"steps={self.steps} tells for how many steps the carries are to be placed, and needs their number, or "
                f"the memory for them: innerloop_ctx(..., checkpoints=10, steps={self.steps})."
            )
        self._check_graphs()
        _check_count("truncate", self.truncate, "gradients pass through so many of the last steps")
        if self.truncate is not None and self.checkpoints is not None:
            raise ValueError(
                f"checkpoints={self.checkpoints} spreads the carries over all steps, of which truncate={self.truncate} "
                f"uses the last only. Keep every so many instead: checkpoint_every=10, truncate={self.truncate}."
            )
        for name in ("first_order", "journal"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be True or False.")
        if self.journal and self.schedule is None:
            raise ValueError(
                "journal=True keeps inner gradients to recompute carries from, and the full unroll recomputes none. "
                "Say which carries to keep: innerloop_ctx(..., checkpoints=10, journal=True)."
            )
        _check_store(self.store, kept=self.schedule is not None)
        if not isinstance(self.progress, bool) and self.progress != "always":
            raise ValueError(
                f"progress={self.progress!r} is unknown; it can be False, True (bars where stderr is a terminal) or "
                "'always' (also where it is not)."
            )
        if not isinstance(self.compile, bool) and self.compile != "trace":
            raise ValueError(
                f"compile={self.compile!r} is unknown; it can be False (steps are replayed), 'trace' (those "
                "that were replayed often are traced) or True (they are compiled)."
            )
        asked = (self.replay, self.pullback)
        if self.compile and (self.schedule is None or asked != ("native", "reverse")):
            raise ValueError(
                f"compile={self.compile!r} is for the pullbacks of a checkpointed context by reverse mode; "
                "replay='torch', pullback='mixed' and the full unroll have none. Say which carries to keep: "
                f"innerloop_ctx(..., checkpoint_every=10, compile={self.compile!r})."
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                allowed = " or ".join(repr(choice) for choice in choices)
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; it can be {allowed}.")
        self._check_mixed()

    def _check_mixed(self) -> None:
        if isinstance(self.microbatches, bool) or not isinstance(self.microbatches, int):
            raise TypeError(
                f"microbatches={self.microbatches!r} is a {type(self.microbatches).__name__}; it must be a whole "
                "number: each batch is cut into so many parts. Use microbatches=4, or 1 for whole batches."
            )
        if self.microbatches < 1:
            raise ValueError(
                f"microbatches={self.microbatches} must be at least 1: each batch is cut into so many parts. Use "
                "microbatches=4, or 1 for whole batches."
            )
        asked = [
            name
            for name, given in (("blocks", self.blocks is not None), ("microbatches", self.microbatches > 1))
            if given
        ]
        if self.pullback == "reverse":
            if asked:
                raise ValueError(
                    f"{asked[0]} saves memory in mixed mode only: what reverse over reverse mode computes again it "
                    f'keeps all the same. Ask for mixed mode: innerloop_ctx(..., pullback="mixed", {asked[0]}=...).'
                )
            return
        if self.schedule is None:
            raise ValueError(
                'pullback="mixed" pulls back one step at a time, and the full unroll differentiates all steps as one '
                'graph. Say which carries to keep: innerloop_ctx(..., checkpoint_every=10, pullback="mixed").'
            )
        if self.memory_budget is not None:
            raise ValueError(
                f'memory_budget={self.memory_budget!r} reckons with the graphs of reverse mode, and pullback="mixed" '
                'builds none. Say which carries to keep: innerloop_ctx(..., checkpoint_every=10, pullback="mixed").'
            )
        if self.graphs > 1:
            raise ValueError(
                f'graphs={self.graphs} holds the second-order graphs of several steps, and pullback="mixed" builds '
                'none. Leave one of them out: innerloop_ctx(..., pullback="mixed").'
            )
        if self.replay != "native":
            raise ValueError(
                f'replay={self.replay!r} builds the second-order graphs of a whole segment, and pullback="mixed" '
                'builds none. Leave one of them out: innerloop_ctx(..., pullback="mixed").'
            )
        if self.first_order:
            raise ValueError(
                'pullback="mixed" is a way to differentiate inner gradients, and with first_order=True they are '
                "constants. Leave one of them out: innerloop_ctx(..., first_order=True)."
            )

    def _check_graphs(self) -> None:
        meaning, otherwise = "the backward holds the graphs of so many steps", "1 for the least memory"
        _check_count("graphs", "None" if self.graphs is None else self.graphs, meaning, otherwise)
        if self.graphs > 1 and (self.schedule is None or self.memory_budget is not None or self.replay != "native"):
            raise ValueError(
                f"graphs={self.graphs} says how many steps' graphs the backward builds from one kept carry. It goes "
                "with checkpoint_every=N or checkpoints=s, and replay='native': innerloop_ctx(..., "
                f"checkpoint_every={self.graphs}, graphs={self.graphs}). memory_budget decides that by itself."
            )

    def _check_budget(self) -> None:
        if self.memory_budget is None:
            return
        parse_budget(self.memory_budget)
        rivals = {
            "checkpoint_every": "which carries are kept is what the budget decides",
            "checkpoints": "which carries are kept is what the budget decides",
            "truncate": "steps out of reach need no memory at all: give checkpoint_every=10 with truncate",
            "journal": "a journal grows with every step, which no budget can hold: give checkpoints=10 with journal",
        }
        for name, reason in rivals.items():
            if getattr(self, name):
                raise ValueError(
                    f"memory_budget={self.memory_budget!r} and {name}={getattr(self, name)!r} were both given; "
                    f"{reason}. Give one of them."
                )
        if self.store != "device":
            raise ValueError(
                f"memory_budget={self.memory_budget!r} is shared out on the device, and "
                f"store={os.fspath(self.store)!r} takes the carries off it. With a store say how many to keep: "
                "checkpoints=100."
            )

    @property
    def schedule(self) -> Schedule | None:
        """Which carries are kept, with `memory_budget` at first; None for the full unroll."""
        if self.memory_budget is not None:
            return Bounded(_ALL)
        if self.checkpoint_every is not None:
            return Periodic(self.checkpoint_every, self.graphs)
        if self.checkpoints is None:
            return None
        if self.steps is None:
            return Bounded(self.checkpoints, self.graphs)
        return Revolve(self.checkpoints, self.steps, self.graphs)


def _check_store(store: object, *, kept: bool) -> None:
    if not isinstance(store, (str, os.PathLike)) or not isinstance(os.fspath(store), str):
        raise TypeError(
            f"store={store!r} is a {type(store).__name__}; it must be 'device', 'host' or the path of a directory."
        )
    if store == "device":
        return
    if store != "host" and not (os.fspath(store) and Path(store).is_dir()):
        raise ValueError(
            f"store={os.fspath(store)!r} is neither 'device' nor 'host' nor a directory that exists. If it is to be a "
            f"directory, make it: os.makedirs({os.fspath(store)!r})."
        )
    if not kept:
        raise ValueError(
            f"store={os.fspath(store)!r} says where kept carries live, and the full unroll keeps none. Say which "
            "to keep: innerloop_ctx(..., checkpoint_every=10, store=...)."
        )


def _check_count(name: str, value: object, meaning: str, otherwise: str = "None for the full unroll") -> None:
    example = f"Use {name}=10, or {otherwise}."
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}; it must be a whole number: {meaning}. {example}"
        )
    if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1: {meaning}. {example}")
