"""A step whose meta-parameters only come after the model's outputs, pulled back by one JVP of these.

NOTE [ Meta-parameters after the outputs ]

Example weights, a weighting net, a learned loss: what has to be learned is often read after the last fast weight was.
The inner loss is then E(l(P), e), with outputs l that do not depend on e. If nobody wants the cotangent of P (the first
step, whose weights nothing trains), all that is left to compute is, with v the cotangent of the gradient,

    d/de <dE/dP, v>  =  d/de <dE/dl, dl/dP v>

The derivative of l along v is one pass in forward mode that keeps nothing; only the small E has a graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lowmem_higher.forward_over_reverse import values_and_derivatives
from lowmem_higher.live_module import ModuleCall
from lowmem_higher.program import StepProgram
from lowmem_higher.split import Halves, halved, inputs_at
from lowmem_higher.step import Carry, StepRecord


class Epilogue:
    """The last calls of a program, which read certain externals and no fast weight.

    Args:
        halves: The program, cut before these calls.
        asked: The externals whose cotangents are wanted.

    Attributes:
        read: Those of them that the calls read at all.
    """

    def __init__(self, halves: Halves, asked: Sequence[int]) -> None:
        self._halves = halves
        self.read = [index for index in halves.externals if index in asked]

    def derivative(
        self, record: StepRecord, carry: Carry, externals: Sequence[Tensor], vectors: Sequence[Tensor | None]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The loss, and by externals the derivative of the product of its gradient with `vectors`.

        Args:
            record: Of the step.
            carry: It starts from this.
            externals: What it reads.
            vectors: For each weight; None is zero.
        """
        halves = self._halves

        def outputs(*weights: Tensor) -> list[Tensor]:
            inputs = inputs_at(record, externals, halves.first_at)
            return halves.first.evaluate(weights, carry.buffers, inputs, halves.made)

        externals = [external.detach() for external in externals]
        made, along = values_and_derivatives(outputs, [weight.detach() for weight in carry.weights], vectors)
        with torch.enable_grad():
            leaves = {index: externals[index].detach().requires_grad_() for index in self.read}
            moving = [
                value.detach().requires_grad_(tangent is not None)
                for value, tangent in zip(made, along, strict=True)
            ]  # fmt: skip
            read = [*(leaves.get(index, externals[index]) for index in halves.externals), *moving]
            loss = halves.second.run((), (), inputs_at(record, read, halves.second_at))[0]
            pairs = [(value, tangent) for value, tangent in zip(moving, along, strict=True) if tangent is not None]
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if pairs and leaves:
                of_outputs = torch.autograd.grad(
                    loss, [value for value, _ in pairs], create_graph=True, allow_unused=True
                )
                reached = [
                    (grad, tangent)
                    for grad, (_, tangent) in zip(of_outputs, pairs, strict=True)
                    if grad is not None and grad.requires_grad
                ]
                if reached:
                    grads, tangents = zip(*reached, strict=True)
                    found = torch.autograd.grad(grads, list(leaves.values()), tangents, allow_unused=True)
        return loss.detach(), {i: grad for i, grad in zip(leaves, found, strict=True) if grad is not None}


def epilogue_of(program: StepProgram, asked: Collection[int]) -> Epilogue | None:
    """The calls that depend on the externals `asked`; None if they read fast weights or cannot be cut off."""
    depends: list[bool] = []
    for one in program.instructions:
        read = [*one.refs, *one.found]
        depends.append(
            any(depends[ref.at] if ref.kind == "made" else ref.kind == "external" and ref.at in asked for ref in read)
        )
        if one.call is torch.autograd.grad or any(ref.kind == "made" and ref.output < 0 for ref in one.refs):
            return None  # a derivative may be taken through the cut; a write may be seen on both sides of it
        if depends[-1] and (isinstance(one.call, ModuleCall) or any(ref.kind == "weight" for ref in read)):
            return None
    return Epilogue(halved(dataclasses.replace(program, buffers=None), depends), list(asked))
