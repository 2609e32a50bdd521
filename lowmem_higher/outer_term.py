"""Terms of the outer loss on the way: `diffopt.outer(loss)` keeps a term's value and place in the graph, not its graph.

A term is recorded like the loss of a step: the calls that lead from the current fast weights to it are cut out as a
program. It leaves one `TermNode` in the user's graph. When the backward reaches that, the carry of its time is
recomputed, the program is run once more, and one `autograd.grad` gives the cotangents of weights and externals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem_higher.carries import Held
from lowmem_higher.program import StepInputs, StepProgram
from lowmem_higher.pullback import freed_error, refuse_higher_order, whole_for_plain
from lowmem_higher.replay_state import Ambient, ModuleState, RngState
from lowmem_higher.step import Carry, External, StepRecord, check_loss_value, stand_ins_for
from lowmem_higher.truncation import LastSteps


@dataclass(eq=False, slots=True)
class TermRecord:
    """What is kept of one term. Its weights are those that the step `before` ended with, or `carry`."""

    time: int
    program: StepProgram
    ambient: Ambient
    before: StepRecord | None
    carry: Held | None
    trainable: tuple[bool, ...]
    externals: list[External]
    versions: tuple[int, ...]
    externals_in: tuple[int, ...]
    numbers: tuple[Any, ...]
    rng: tuple[RngState | None, ...]
    states: tuple[ModuleState | None, ...]
    targets: dict[int, Any]
    loss: float | None
    release: Callable[[list[External]], None]

    def __del__(self) -> None:
        """Count the externals off."""
        self.release(self.externals)

    @property
    def weights_in(self) -> list[int]:
        """The weights that the term's node takes."""
        return [index for index, trainable in enumerate(self.trainable) if trainable]

    def gradients(self, carry: Carry, cotangent: Tensor) -> list[Tensor | None]:
        """The vector-Jacobian product with the weights and externals that require grad."""
        weights = [
            weight.detach().requires_grad_(trainable)
            for weight, trainable in zip(carry.weights, self.trainable, strict=True)
        ]
        externals = stand_ins_for(
            self.externals, self.versions, self.externals_in, f"after the term of time {self.time}"
        )
        inputs = StepInputs(externals, self.externals, self.numbers, self.rng, self.states, self.targets)
        loss, _ = self.program.run(weights, carry.buffers, inputs)
        if self.loss is not None:
            check_loss_value(self, loss)
        wanted = [*(weights[index] for index in self.weights_in), *(externals[index] for index in self.externals_in)]
        with self.ambient.restored(Ambient.capture()):
            return list(torch.autograd.grad(loss, wanted, cotangent.reshape(loss.shape), allow_unused=True))


class Terms(Protocol):
    """Who pulls a term back (the trajectory)."""

    last: LastSteps  # the steps that gradients pass through

    def pull_back_term(self, term: TermRecord, cotangent: Tensor) -> list[Tensor | None]:
        """The gradients of a term's inputs."""


class TermNode(torch.autograd.Function):
    """The place of one term in the user's graph."""

    @staticmethod
    def forward(ctx: Any, terms: Terms, record: TermRecord, value: Tensor, *inputs: Tensor) -> Tensor:
        """Put the value, which is computed already, into the graph."""
        ctx.terms, ctx.record, ctx.inputs = terms, record, len(inputs)
        return value

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """Pull the cotangent back to the weights of the term's time."""
        if ctx.terms.last.inner:
            return tuple([None] * (3 + ctx.inputs))
        refuse_higher_order()
        if ctx.record is None:
            raise freed_error()
        term = ctx.record
        grads = whole_for_plain(ctx.terms.pull_back_term(term, cotangent), term.externals, term.externals_in)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.record = None
        return (None, None, None, *grads)
