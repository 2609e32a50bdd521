"""Mixed mode: one step is pulled back without a second-order graph.

NOTE [ Mixed mode ]

A step maps weights P and optimizer state S to U(P, S, g, h), with g the gradient of the inner loss L(P, e) and h the
hyperparameters. Given cotangents of its outputs:

M1  Reverse mode through U and `grad_callback` alone, with g as a leaf, gives what U passes to P, S and h, and v, the
    cotangent of g.
M2  L passes on the derivative of <g(P, e), v> by P and e, which is the derivative of the gradient by (P, e) along v:
    forward over reverse mode, one pass (`forward_over_reverse.py`).
M3  g is needed for M1, and comes out of M2. Where v does not depend on g (SGD), zeros stand for g at first; v is
    compared with the v of the true g, to the bit. Elsewhere g is the journal's, or comes of a first-order run.
M4  At the first use of a step program, of shapes and of train/eval flags the derivative of M2 is computed in reverse
    mode as well, and both must agree; later uses are checked by the loss, and by the gradient where that is known. A
    program that cannot be run so, or differs, is pulled back by reverse mode from then on.
M5  Where nobody wants the cotangent of P, and the externals come after the model's outputs, one JVP of these takes the
    place of M2 (`epilogue.py`); and g is computed only for a hyperparameter's cotangent, for an update whose v depends
    on it, and at those uses of a program whose gradient is compared.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowmem_higher.blocks import blocks_run
from lowmem_higher.custom_rules import is_custom
from lowmem_higher.epilogue import Epilogue, epilogue_of
from lowmem_higher.errors import LowmemError, MixedFallbackWarning, ReplayMismatchError
from lowmem_higher.forward_over_reverse import gradient_and_derivative
from lowmem_higher.microbatches import MicroBatches, Parts, Whole, cannot_cut
from lowmem_higher.optim.base import Gradients, State
from lowmem_higher.program import StepProgram
from lowmem_higher.pullback import Carries, PulledBack, carry_stand_ins, inputs_of, second_order_graph
from lowmem_higher.replay_state import Ambient
from lowmem_higher.second_order import second_order_here
from lowmem_higher.step import (
    Carry,
    StepRecord,
    check_fingerprint,
    check_loss_value,
    gradient_norms,
    state_leaf,
    tolerance_of,
)


class MixedReplay:
    """Advances first-order to the step's carry, then pulls that one step back in mixed mode.

    Args:
        count_first: Counts a first-order run.
        count_second: Counts a run of mixed or of reverse mode.
        verify: "new", "all" or "off": which uses of a program are compared with reverse mode.
        microbatches: Into how many parts each batch is cut.
    """

    def __init__(
        self, count_first: Callable[[], None], count_second: Callable[[], None], verify: str, microbatches: int
    ) -> None:
        self.count_first, self.count_second = count_first, count_second
        self._verify = verify
        self._micro_batches = MicroBatches(microbatches) if microbatches > 1 else None
        self._agreed: set[Any] = set()
        self._reverse: set[StepProgram] = set()
        self.epilogues: dict[Any, Epilogue | None] = {}  # of a program and the externals that are asked for
        self.independent: dict[Any, bool] = {}  # of an update: whether its v does not depend on g (M3)

    def graph(self, record: StepRecord, carries: Carries) -> PulledBack:
        """The step, ready to be pulled back."""
        return _MixedStep(self, record, carries.carry_before(record))

    def parts(self, record: StepRecord, carry: Carry, externals: list[Tensor]) -> Parts:
        """The loss of a step as a sum of parts."""
        if self._micro_batches is None:
            return Whole(record, carry, externals)
        return self._micro_batches.parts(record, carry, externals)

    def wants_comparison(self, record: StepRecord, asked: tuple[bool, ...]) -> bool:
        """Whether this use is compared with reverse mode (M4): of inputs, the cotangents of those `asked` for."""
        return self._verify == "all" or (self._verify == "new" and (_kind_of(record), asked) not in self._agreed)

    def agreed(self, record: StepRecord, asked: tuple[bool, ...]) -> None:
        """Both modes gave the same."""
        self._agreed.add((_kind_of(record), asked))

    def in_reverse(self, record: StepRecord) -> bool:
        """Whether this program is pulled back by reverse mode."""
        return record.program in self._reverse

    def fall_back(self, record: StepRecord, why: str) -> None:
        """Pull this program back by reverse mode from now on, and say so."""
        self._reverse.add(record.program)
        warnings.warn(
            MixedFallbackWarning(
                f'pullback="mixed" cannot pull back step {record.time}, and others of the same program: {why}. They '
                "are pulled back by reverse mode instead, whose gradient is the same and whose memory is that of "
                'pullback="reverse".'
            ),
            stacklevel=2,
        )


def _kind_of(record: StepRecord) -> Any:
    tensors = tuple([(tuple(external.shape), external.dtype) for external in record.externals])
    training = tuple([part.get("training") for state in record.states if state for part in state.plain])
    return record.program, record.layout, record.update.structure, tensors, training


_SMALL = 1 << 20  # bytes: less than that is updated at once


class _UnableError(RuntimeError):
    """Mixed mode did not give what it must."""


_CANNOT = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


class _MixedStep:
    """One step from its carry."""

    def __init__(self, replay: MixedReplay, record: StepRecord, carry: Carry) -> None:
        self._replay, self._record, self._carry = replay, record, carry

    def pull_back(self, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
        """The vector-Jacobian product, as far as it is wanted."""
        replay, record = self._replay, self._record
        if replay.in_reverse(record):
            return self._in_reverse(cotangents, wanted)
        try:
            found = _Pass(replay, record, self._carry, wanted).pull_back(cotangents)
        except (LowmemError, torch.OutOfMemoryError):
            raise
        except _CANNOT as error:
            replay.fall_back(record, _in_short(error))
            return self._in_reverse(cotangents, wanted)
        return [tensor if asked else None for tensor, asked in zip(found, wanted, strict=True)]

    def _in_reverse(self, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
        self._replay.count_second()
        with torch.enable_grad(), blocks_run("plain"):
            graph = second_order_graph(self._record, self._carry)
            return graph.pull_back(cotangents, wanted)


class _Pass:
    """One step in mixed mode; see NOTE [ Mixed mode ]."""

    def __init__(self, replay: MixedReplay, record: StepRecord, carry: Carry, wanted: Sequence[bool]) -> None:
        self._replay, self._record, self._carry, self._wanted = replay, record, carry, wanted
        with torch.enable_grad():
            self._weights, self._state = carry_stand_ins(record, carry)
            self._externals = record.stand_ins()
            self._parts = replay.parts(record, carry, self._externals)

    def pull_back(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The cotangents of the step's inputs."""
        epilogue = self._epilogue()
        if epilogue is not None:
            return self._by_outputs(epilogue, cotangents)
        found = self._from_zeros(cotangents) if self._replay.independent.get(self._rule) else None
        if found is not None:
            return found
        grads = self._gradient()
        self._check_end(grads)
        direct, vectors = self._through_update(grads, cotangents)
        self._judge_rule(grads, cotangents, vectors)
        norms = gradient_norms(grads)
        del grads
        if all(vector is None for vector in vectors):
            return direct
        found_grads, derived = self._derivative(vectors)
        self._check_gradient(norms, found_grads)
        del found_grads, vectors
        return _added(direct, derived)

    def _from_zeros(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """The same where v does not depend on g (M3); None if it does after all."""
        vectors = self._through_update(self._zeros(), cotangents, direct=False)[1]
        if all(vector is None for vector in vectors):
            return None
        grads, derived = self._derivative(vectors)
        self._check_gradient(self._recorded_norms(grads), grads)
        self._check_end(grads)
        direct, true_vectors = self._through_update(grads, cotangents)
        if _same(vectors, true_vectors):
            del vectors, true_vectors, grads
            return _added(direct, derived)
        self._replay.independent[self._rule] = False
        return None

    # M5

    def _epilogue(self) -> Epilogue | None:
        """The part of the program that M5 needs; None if that is not the way to pull this step back."""
        weights, program = len(self._record.layout.weights_in), self._record.program
        if any(self._wanted[:weights]) or self._parts.count > 1:
            return None
        asked = frozenset(self._asked_externals())
        known = self._replay.epilogues
        if (program, asked) not in known:
            known[program, asked] = epilogue_of(program, asked)
        return known[program, asked]

    def _asked_externals(self) -> list[int]:
        taken = self._record.layout.externals_in
        return [
            index for index, wanted in zip(taken, self._wanted[len(self._wanted) - len(taken) :], strict=True) if wanted
        ]

    def _by_outputs(self, epilogue: Epilogue, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        record, layout, weights = self._record, self._record.layout, len(self._record.layout.weights_in)
        direct: list[Tensor | None] = [None] * len(self._wanted)
        if self._needs_gradient():
            grads = self._gradient()
            self._check_end(grads)
            direct, vectors = self._through_update(grads, cotangents)
            self._judge_rule(grads, cotangents, vectors)
            del grads
        else:
            vectors = self._through_update(self._zeros(), cotangents, direct=False)[1]
        if not epilogue.read or all(vector is None for vector in vectors):
            return direct
        self._replay.count_first()
        with self._ambient():
            loss, found = epilogue.derivative(record, self._carry, self._externals, vectors)
        self._check_derivative(loss)
        derived = [found.get(index) for index in layout.externals_in]
        asked = (*[False] * weights, *(index in epilogue.read for index in layout.externals_in))
        self._compare([*[None] * weights, *derived], vectors, asked)
        return _added(direct, [*[None] * (len(direct) - len(derived)), *derived])

    def _needs_gradient(self) -> bool:
        """Whether v, or the cotangent of a hyperparameter or of state, depends on g, or this use is checked."""
        record = self._record
        update = {ref.at for ref in (*record.update.refs, *record.update.found) if ref.kind == "external"}
        state = self._wanted[len(record.layout.weights_in) : len(self._wanted) - len(record.layout.externals_in)]
        return (
            record.fingerprint is not None
            or self._rule is None
            or not self._replay.independent.get(self._rule, record.rules.affine)
            or any(state)
            or not update.isdisjoint(self._asked_externals())
        )

    def _judge_rule(
        self, grads: Gradients, cotangents: Sequence[Tensor | None], vectors: Sequence[Tensor | None]
    ) -> None:
        """See whether v depends on g (M3)."""
        rule = self._rule
        if rule is None or rule in self._replay.independent or not any(vector is not None for vector in vectors):
            return
        zeros: Gradients = [None if grad is None else torch.zeros_like(grad) for grad in grads]
        same = _same(vectors, self._through_update(zeros, cotangents, direct=False)[1])
        self._replay.independent[rule] = same

    @property
    def _rule(self) -> Any:
        """What v may be independent of g for: the update as it was configured; None where it surely isn't."""
        record = self._record
        if record.callback is not None or record.journal is not None or is_custom(record.rules):
            return None
        return record.update, type(record.rules), record.layout

    def _zeros(self) -> Gradients:
        updated = set(self._record.layout.weights_out)
        return [torch.zeros_like(w) if index in updated else None for index, w in enumerate(self._weights)]

    # The gradient

    def _gradient(self) -> Gradients:
        """The inner gradient, by a first-order run or from the journal."""
        record, parts = self._record, self._parts
        if record.journal is not None and record.callback is None:
            return record.journal.get().grads
        self._replay.count_first()
        total, grads = None, list[Tensor | None]()
        with torch.enable_grad():
            for part in range(parts.count):
                loss = parts.loss(part, self._weights, parts.leaves)
                with self._ambient():
                    found = record.rules.gradients(loss, self._weights, create_graph=False, retain_graph=False)
                total = loss.detach() if total is None else total + loss.detach()
                grads = found if not grads else [_sum(one, other) for one, other in zip(grads, found, strict=True)]
        assert total is not None
        self._check_loss(total)
        if record.fingerprint is not None:
            if parts.count == 1:
                check_fingerprint(record, total, grads)
            else:
                self._check_gradient(self._recorded_norms(grads), grads)
        return grads

    def _check_loss(self, loss: Tensor) -> None:
        record, count = self._record, self._parts.count
        if record.loss is None:
            return
        try:
            check_loss_value(record, loss)
        except ReplayMismatchError:
            if count == 1:
                raise
            why = f"it is {record.loss:.9g}, and the parts give {loss.item():.9g}"
            raise cannot_cut(record, count, why) from None

    def _check_gradient(self, norms: Sequence[Tensor | None], found: Gradients) -> None:
        """Compare with the norms of the same gradient, by the norm of them all: some may be zero but for rounding."""
        pairs = [(norm, new) for norm, new in zip(norms, found, strict=True) if norm is not None and new is not None]
        if len(pairs) < sum(norm is not None for norm in norms):
            raise _UnableError("in forward over reverse mode a weight has no inner gradient")
        if not pairs:
            return
        before = torch.stack([norm.to(pairs[0][0]) for norm, _ in pairs])
        now = torch.stack([torch.linalg.vector_norm(new).to(before) for _, new in pairs])
        tolerance = tolerance_of(self._record, [new for _, new in pairs])
        if not torch.linalg.vector_norm(before - now) <= tolerance * torch.linalg.vector_norm(before):
            if self._parts.count > 1:
                raise cannot_cut(self._record, self._parts.count, "its gradient is not that of the parts")
            raise _UnableError("in forward over reverse mode the inner gradient is another one")

    def _recorded_norms(self, grads: Gradients) -> list[Tensor | None]:
        """The norms of the gradients in the user's loop, which were kept of some uses of a program."""
        kept = self._record.fingerprint
        if kept is None or len(kept) != 1 + 2 * sum(grad is not None for grad in grads):
            return [None] * len(grads)
        norms = iter(kept[2::2])
        return [None if grad is None else next(norms) for grad in grads]

    # M1

    def _through_update(
        self, grads: Gradients, cotangents: Sequence[Tensor | None], *, direct: bool = True
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The cotangents of the step's inputs through the update alone (if `direct`), and those of the gradients."""
        record, layout = self._record, self._record.layout
        inputs = inputs_of(layout, self._weights, self._state, self._externals) if direct else []
        through: list[Tensor | None] = [None] * len(inputs)
        vectors: list[Tensor | None] = [None] * len(grads)
        chunks = self._chunks(grads)
        for chunk in chunks:
            with torch.enable_grad():
                leaves = {index: grads[index].detach().requires_grad_() for index in chunk}  # type: ignore[union-attr]
                used: Gradients = [leaves.get(index) for index in range(len(grads))]
                with self._ambient():
                    used = record.called_back(used, self._weights, self._externals)
                weights, state = record.update_only(
                    self._weights, used, self._state, self._externals, create_graph=True
                )
            pairs = [
                (output, cotangent)
                for output, cotangent in self._outputs(weights, state, cotangents, chunk if len(chunks) > 1 else None)
                if output.requires_grad
            ]
            if not pairs:
                continue
            outputs, given = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, [*inputs, *leaves.values()], given, allow_unused=True)
            through = [_sum(one, other) for one, other in zip(through, found[: len(inputs)], strict=True)]
            for index, vector in zip(leaves, found[len(inputs) :], strict=True):
                vectors[index] = vector
        return through, vectors

    def _outputs(
        self, weights: list[Tensor], state: State, cotangents: Sequence[Tensor | None], chunk: list[int] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The step's outputs that have a cotangent, with it; those of the parameters in `chunk` if that is given."""
        layout, parameter = self._record.layout, self._record.rules.parameter
        for index, cotangent in zip(layout.weights_out, cotangents, strict=False):
            if cotangent is not None and (chunk is None or index in chunk):
                yield weights[index], cotangent
        for key, cotangent in zip(layout.state_out, cotangents[len(layout.weights_out) :], strict=True):
            if cotangent is not None and (chunk is None or parameter(key[0], key[1]) in chunk):
                yield state_leaf(state, key), cotangent

    def _chunks(self, grads: Gradients) -> list[list[int]]:
        """The parameters that are updated at a time: an eighth, where a rule treats each parameter alone."""
        present = [index for index, grad in enumerate(grads) if grad is not None]
        record = self._record
        if record.callback is not None or record.rules.updates_in_place or is_custom(record.rules):
            return [present]
        sizes = {index: self._weights[index].nbytes for index in present}
        limit = max(sum(sizes.values()) / 8, max(sizes.values()), _SMALL)
        chunks: list[list[int]] = [[]]
        for index in present:
            if chunks[-1] and sum(sizes[other] for other in chunks[-1]) + sizes[index] > limit:
                chunks.append([])
            chunks[-1].append(index)
        return chunks

    def _check_end(self, grads: Gradients) -> None:
        """Compare the end of a segment with where the loop went on, if this step is the last of one."""
        record = self._record
        if record.time + 1 in record.segment.marks:
            with self._ambient():
                used = record.called_back(grads, self._weights, self._externals)
            record.update_again(self._weights, used, self._state, self._externals, create_graph=False)

    # M2

    def _derivative(self, vectors: Sequence[Tensor | None]) -> tuple[Gradients, list[Tensor | None]]:
        """The inner gradient, and its derivative by the step's inputs along `vectors`."""
        parts, layout = self._parts, self._record.layout
        weights = [weight.detach() for weight in self._weights]
        leaves = [leaf.detach() for leaf in parts.leaves]
        wanted = [index for index, leaf in enumerate(parts.leaves) if leaf.requires_grad]
        inputs = [*(weights[index] for index in layout.weights_in), *(leaves[index] for index in wanted)]
        tangents = [*(vectors[index] for index in layout.weights_in), *([None] * len(wanted))]
        count = len(layout.weights_in)
        self._replay.count_second()
        total: Tensor | None = None
        grads: list[Tensor | None] = [None] * len(inputs)
        derived: list[Tensor | None] = [None] * len(inputs)
        for part in range(parts.count):

            def loss(*given: Tensor, part: int = part) -> Tensor:
                weights_here, leaves_here = list(weights), list(leaves)
                for index, tensor in zip(layout.weights_in, given[:count], strict=True):
                    weights_here[index] = tensor
                for index, tensor in zip(wanted, given[count:], strict=True):
                    leaves_here[index] = tensor
                return parts.loss(part, weights_here, leaves_here)

            with torch.enable_grad(), blocks_run("dual"), self._ambient():
                value, found, along = gradient_and_derivative(loss, inputs, tangents)
            total = value if total is None else total + value
            with torch.no_grad():
                for index in range(len(inputs)):
                    if index < count:
                        grads[index] = _sum(grads[index], found[index])
                    derived[index] = _sum(derived[index], along[index])
            del found, along
        assert total is not None
        self._check_derivative(total)
        by_weight = dict(zip(layout.weights_in, grads, strict=False))
        updated = set(layout.weights_out)
        gradient = [by_weight.get(index) if index in updated else None for index in range(len(weights))]
        by_leaf = {index: along for index, along in zip(wanted, derived[count:], strict=True) if along is not None}
        by_external = parts.to_externals(by_leaf)
        by_inputs = [*derived[:count], *(by_external.get(index) for index in layout.externals_in)]
        self._compare(by_inputs, vectors, (True,) * len(by_inputs))
        return gradient, [*by_inputs[:count], *([None] * len(layout.state_in)), *by_inputs[count:]]

    def _compare(
        self, found: Sequence[Tensor | None], vectors: Sequence[Tensor | None], asked: tuple[bool, ...]
    ) -> None:
        """The same in reverse mode, with the whole batch and no block (M4), unless this use needs no comparison."""
        record, layout, carry = self._record, self._record.layout, self._carry
        if not self._replay.wants_comparison(record, asked):
            return
        self._replay.count_second()
        with torch.enable_grad(), blocks_run("plain"):
            weights, externals = carry_stand_ins(record, carry)[0], record.stand_ins()
            loss = record.loss_again(weights, carry.buffers, externals)[0]
            with self._ambient():
                grads = record.rules.gradients(loss, weights, create_graph=True)
                pairs = [
                    (grad, vector)
                    for grad, vector in zip(grads, vectors, strict=True)
                    if grad is not None and vector is not None and grad.requires_grad
                ]
                inputs = [
                    *(weights[index] for index in layout.weights_in),
                    *(externals[i] for i in layout.externals_in),
                ]
                expected: list[Tensor | None] = [None] * len(inputs)
                if pairs and any(asked):
                    outputs, given = zip(*pairs, strict=True)
                    by = list(itertools.compress(inputs, asked))
                    derived = iter(torch.autograd.grad(outputs, by, given, allow_unused=True))
                    expected = [next(derived) if wanted else None for wanted in asked]
        if (difference := _difference(record, found, expected)) is not None:
            raise _UnableError(difference)
        if any(vector is not None and bool(vector.any()) for vector in vectors):
            self._replay.agreed(record, asked)

    def _check_derivative(self, total: Tensor) -> None:
        try:
            self._check_loss(total)
        except ReplayMismatchError as error:
            if self._parts.count > 1:
                raise
            raise _UnableError("in forward over reverse mode the loss is another one") from error

    @contextmanager
    def _ambient(self) -> Iterator[None]:
        with self._record.update.ambient.restored(Ambient.capture()), second_order_here():
            yield


def _added(some: list[Tensor | None], others: list[Tensor | None]) -> list[Tensor | None]:
    """The sums, by position; the terms are let go on the way."""
    for index in range(len(some)):
        some[index], others[index] = _sum(some[index], others[index]), None
    return some


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _same(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Whether vectors are equal to the bit."""
    return all(
        one is other if one is None or other is None else torch.equal(one, other)
        for one, other in zip(some, others, strict=True)
    )


# How far both modes may differ by rounding, relative to the norm. In float32 the products with a Hessian are exact to
# eps (6e-8) times the condition of the sum; the square root of eps leaves room for a loss of 3 digits, and an operator
# that is wrong is off by far more.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-4}
_COARSE = 5e-2  # half precision


def _difference(record: StepRecord, found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> str | None:
    """Where two results differ by more than rounding, in words; None if nowhere."""
    layout = record.layout
    names = [
        *(f"weight {record.names[index]}" for index in layout.weights_in),
        *(f"a tensor of shape {tuple(record.externals[index].shape)}" for index in layout.externals_in),
    ]
    of_weights = len(layout.weights_in)
    # A gradient that is zero but for rounding (a bias before a normalization) is judged by the norm of all weights'.
    floors = [tensor.abs().square().sum() for tensor in expected[:of_weights] if tensor is not None]
    floor = 1e-3 * torch.stack([part.to(floors[0]) for part in floors]).sum().sqrt().item() if floors else 0.0
    for position, (name, one, other) in enumerate(zip(names, found, expected, strict=True)):
        if one is None and other is None:
            continue
        here = other if one is None else one
        assert here is not None
        scale = 0.0 if other is None else torch.linalg.vector_norm(other).item()
        error = torch.linalg.vector_norm((0 if one is None else one) - (0 if other is None else other)).item()
        coarse = any(instruction.ambient.autocast_enabled for instruction in record.program.instructions)
        tolerance = _COARSE if coarse else _TOLERANCE.get(here.dtype.to_real(), _COARSE)
        if not error <= tolerance * max(scale, floor if position < of_weights else 0.0):
            return (
                f"for {name} it gives a derivative of the inner gradient that differs from reverse mode's by "
                f"{error:.3g}, where that has norm {scale:.3g}; an operator may be wrong in forward mode"
            )
    return None


def _in_short(error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).split("\n")[0]
    return first.rstrip(".") if len(first) <= 300 else first[:297] + ".."
