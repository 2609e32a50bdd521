"""One step of the inner loop: what is kept of it, and how it is run again from a carry."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem_higher.alike import form_of, nudged, state_positions
from lowmem_higher.current_step import CurrentStep
from lowmem_higher.custom_rules import advance_again, is_custom
from lowmem_higher.errors import ExternalModifiedError, ReplayMismatchError
from lowmem_higher.fast_weights import replayed_weights
from lowmem_higher.optim.base import DifferentiableOptimizer, GradCallback, Gradients, Group, State, called_back
from lowmem_higher.program import Buffers, Ref, StepInputs, StepProgram, modified_error
from lowmem_higher.record import version_of
from lowmem_higher.replay_state import Ambient, ModuleState, RngState, rng_restored
from lowmem_higher.second_order import second_order_here
from lowmem_higher.structure import Structure, bytes_of, local, storages_of, unflatten
from lowmem_higher.watch import Watcher

StateKey = tuple[int, int, str]  # parameter group, parameter in it, name


@dataclass(eq=False)
class Carry:
    """What a step maps to the next: fast weights, optimizer state, buffers. Detached."""

    weights: list[Tensor]
    state: State
    buffers: Buffers
    versions: list[int] = field(default_factory=list)
    known_form: Any = None

    def __post_init__(self) -> None:
        self.versions = [version_of(tensor) for tensor in self.tensors()]

    def tensors(self) -> list[Tensor]:
        """All tensors of the carry."""
        buffers = [buffer for buffer in self.buffers if buffer is not None]
        return [*self.weights, *state_tensors(self.state), *buffers]

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages."""
        storages = [storage for tensor in self.tensors() for storage in storages_of(tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def modified(self) -> Tensor | None:
        """A tensor that was modified in place since the carry was made."""
        for tensor, version in zip(self.tensors(), self.versions, strict=True):
            if version_of(tensor) != version:
                return tensor
        return None

    def check_unmodified(self, time: int) -> None:
        """Rule R4, for the carry: fast weights are updated by steps and `update_params`, not in place."""
        if (tensor := self.modified) is not None:
            raise self.modified_error(tensor, time)

    @staticmethod
    def modified_error(tensor: Tensor, time: int) -> ExternalModifiedError:
        """Rule R4."""
        return ExternalModifiedError(
            f"A fast weight, optimizer state or buffer of time {time} (shape {tuple(tensor.shape)}) was modified in "
            "place after it was kept for the backward. Set new values with fmodel.update_params([...])."
        )

    @property
    def form(self) -> Any:
        """What a trace depends on besides values: forms of tensors, which state there is and where it has numbers."""
        if self.known_form is None:
            there = tuple([buffer is not None for buffer in self.buffers])
            forms = tuple(map(form_of, self.tensors()))
            self.known_form = (forms, tuple(state_keys(self.state)), tuple(state_positions(self.state)), there)
        return self.known_form

    def nudged(self) -> Carry:
        """The same but for the last bit of about half of the weights' elements."""
        return Carry(nudged(self.weights), self.state, self.buffers)

    advice = "keep fewer carries, checkpoints=10"

    def described(self, time: int) -> str:
        """What it is, for a message."""
        return f"the carry of step {time}"

    def taken_apart(self) -> tuple[list[Tensor], Callable[[list[Tensor]], Carry]]:
        """The tensors, and the function that makes a carry from such tensors; it holds none of them."""
        count, keys = len(self.weights), state_keys(self.state)
        there = [buffer is not None for buffer in self.buffers]
        hollow: State = [{index: dict(entry) for index, entry in entries.items()} for entries in self.state]
        for group, index, name in keys:
            hollow[group][index][name] = None

        def filled(tensors: list[Tensor]) -> Carry:
            given = iter(tensors)
            weights = list(itertools.islice(given, count))
            state = with_state_leaves(hollow, {key: next(given) for key in keys})
            return Carry(weights, state, tuple([next(given) if present else None for present in there]))

        return self.tensors(), filled


def state_keys(state: State) -> list[StateKey]:
    """Where the optimizer state holds tensors."""
    return [
        (group, index, name)
        for group, entries in enumerate(state)
        for index, entry in entries.items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    ]


def state_tensors(state: State) -> list[Tensor]:
    """The tensors of the optimizer state, in the order of `state_keys`."""
    return [
        value
        for entries in state
        for entry in entries.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    ]


def plain_state(state: State) -> list[Any]:
    """What the optimizer state holds besides tensors: step counts."""
    return [
        (index, name, value)
        for entries in state
        for index, entry in entries.items()
        for name, value in entry.items()
        if not isinstance(value, Tensor)
    ]


def state_leaf(state: State, key: StateKey) -> Tensor:
    """One tensor of the optimizer state."""
    found: Tensor = state[key[0]][key[1]][key[2]]
    return found


def detached_state(state: State) -> State:
    """The same optimizer state, cut off from its graph."""
    return with_state_leaves(state, {key: state_leaf(state, key).detach() for key in state_keys(state)})


def with_state_leaves(state: State, leaves: dict[StateKey, Tensor]) -> State:
    """The same optimizer state with some tensors replaced."""
    new = [{index: dict(entry) for index, entry in entries.items()} for entries in state]
    for (group, index, name), tensor in leaves.items():
        new[group][index][name] = tensor
    return new


@dataclass(frozen=True)
class Layout:
    """Which tensors a step's node takes and gives: shared by all steps alike."""

    trainable: tuple[bool, ...]
    weights_in: tuple[int, ...]
    state_in: tuple[StateKey, ...]
    externals_in: tuple[int, ...]
    weights_out: tuple[int, ...]
    state_out: tuple[StateKey, ...]


@dataclass(frozen=True)
class Update:
    """How the update of a step was configured: hyperparameters, callback, switches. Shared by steps alike."""

    structure: Structure
    refs: tuple[Ref, ...]
    ambient: Ambient
    found: tuple[Ref, ...]


@dataclass
class StepRun:
    """What one run of a step gave. `weights` and `state` have a graph in a second-order run."""

    weights: list[Tensor]
    state: State
    buffers: Buffers
    loss: Tensor | None = None
    grads: Gradients = ()

    @property
    def results(self) -> StepRun:
        """What the next step starts from, alone: this may be held for long."""
        return StepRun(self.weights, self.state, self.buffers)


@dataclass(eq=False)
class Journal:
    """What a step's update alone can be run again from: the gradients that it used, and the buffers after the step."""

    grads: Gradients
    buffers: Buffers
    versions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.versions = [version_of(tensor) for tensor in self.tensors()]

    def tensors(self) -> list[Tensor]:
        """The gradients and the buffers."""
        return [tensor for tensor in (*self.grads, *self.buffers) if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of them all."""
        return sum(map(bytes_of, self.tensors()))

    @property
    def modified(self) -> Tensor | None:
        """A tensor that was modified in place since the step."""
        for tensor, version in zip(self.tensors(), self.versions, strict=True):
            if version_of(tensor) != version:
                return tensor
        return None

    def check_unmodified(self, time: int) -> None:
        """Rule R4, for the journal."""
        if (tensor := self.modified) is not None:
            raise self.modified_error(tensor, time)

    @staticmethod
    def modified_error(tensor: Tensor, time: int) -> ExternalModifiedError:
        """Rule R4."""
        return ExternalModifiedError(
            f"An inner gradient of step {time}, kept by journal=True, was modified in place after the step (shape "
            f"{tuple(tensor.shape)}). Let grad_callback return tensors of its own, [g.clone() for g in grads], or "
            "change copies."
        )

    advice = "recompute without inner gradients, journal=False"

    def described(self, time: int) -> str:
        """What it is, for a message."""
        return f"the inner gradient of step {time}"

    def taken_apart(self) -> tuple[list[Tensor], Callable[[list[Tensor]], Journal]]:
        """The tensors, and the function that makes a journal from such tensors; it holds none of them."""
        count = len(self.grads)
        there = [tensor is not None for tensor in (*self.grads, *self.buffers)]

        def filled(tensors: list[Tensor]) -> Journal:
            given = iter(tensors)
            found = [next(given) if present else None for present in there]
            return Journal(found[:count], tuple(found[count:]))

        return self.tensors(), filled


class HeldJournal(Protocol):
    """A journal, on the device or in a store."""

    def get(self) -> Journal:
        """The journal, on the device."""


class Reference(Protocol):
    """What stands for an external that is large: it may be in a store."""

    @property
    def version(self) -> int:
        """How often its storage was written into."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's."""

    @property
    def requires_grad(self) -> bool:
        """The tensor's: False."""

    def read(self) -> Tensor:
        """The tensor, on its device."""

    def use_with(self, others: Sequence[Reference]) -> None:
        """These are about to be read, together; those read before them are not needed for now."""


External = Tensor | Reference


@dataclass(eq=False, slots=True, weakref_slot=True)
class StepRecord:
    """What is kept of one step: references, numbers, random states; no tensor that the step made, but for a journal."""

    time: int
    program: StepProgram
    layout: Layout
    update: Update
    rules: DifferentiableOptimizer
    names: list[str]
    token: object
    externals: list[External]
    versions: tuple[int, ...]
    numbers: tuple[Any, ...]
    rng: tuple[RngState | None, ...]
    states: tuple[ModuleState | None, ...]
    targets: dict[int, Any]
    callback: GradCallback | None
    callback_rng: RngState | None
    rule_rng: RngState | None
    loss: float | None
    fingerprint: Tensor | None
    segment: Any
    previous: StepRecord | None
    journal: HeldJournal | None
    release: Callable[[list[External]], None]

    def __del__(self) -> None:
        """Count the externals off."""
        self.release(self.externals)

    def stand_ins(self) -> list[Tensor]:
        """The externals, cut off from the user's graph where they have one, to collect their gradients apart."""
        return stand_ins_for(self.externals, self.versions, self.layout.externals_in, f"after step {self.time}")

    def stand_ins_of_update(self) -> list[Tensor]:
        """The same for the update alone; what it does not read is not fetched from a store."""
        read = {ref.at for ref in (*self.update.refs, *self.update.found) if ref.kind == "external"}
        needed = [
            external if isinstance(external, Tensor) or index in read else _NOT_FETCHED
            for index, external in enumerate(self.externals)
        ]
        versions = [
            0 if external is _NOT_FETCHED else version
            for external, version in zip(needed, self.versions, strict=True)
        ]  # fmt: skip
        return stand_ins_for(needed, versions, self.layout.externals_in, f"after step {self.time}")

    def run(
        self,
        weights: list[Tensor],
        state: State,
        buffers: Buffers,
        externals: list[Tensor],
        *,
        create_graph: bool,
    ) -> StepRun:
        """Run the step again (rule R1); the one place where that is done."""
        loss, new_buffers = self.loss_again(weights, buffers, externals)
        with self.update.ambient.restored(Ambient.capture()), second_order_here():
            if self.loss is not None:
                check_loss_value(self, loss)
            grads: Gradients = self.rules.gradients(loss, weights, create_graph=create_graph, retain_graph=create_graph)
            if self.fingerprint is not None:
                check_fingerprint(self, loss, grads)
            grads = self.called_back(grads, weights, externals)
        new_weights, new_state = self.update_again(weights, grads, state, externals, create_graph=create_graph)
        return StepRun(new_weights, new_state, new_buffers, loss, grads)

    def inputs(self, externals: list[Tensor]) -> StepInputs:
        """What the program reads besides the carry."""
        return StepInputs(externals, self.externals, self.numbers, self.rng, self.states, self.targets)

    def loss_again(
        self, weights: Sequence[Tensor], buffers: Buffers, externals: list[Tensor]
    ) -> tuple[Tensor, Buffers]:
        """Run the loss alone again; also returns the buffers after it."""
        with second_order_here():
            return self.program.run(weights, buffers, self.inputs(externals))

    def called_back(self, grads: Gradients, weights: list[Tensor], externals: list[Tensor]) -> Gradients:
        """The gradients that the update uses, once more."""
        return grads if self.callback is None else self._call_back(self.callback, grads, weights, externals)

    def update_again(
        self, weights: list[Tensor], grads: Gradients, state: State, externals: list[Tensor], *, create_graph: bool
    ) -> tuple[list[Tensor], State]:
        """Run the update alone again, from the gradients that it used."""
        new_weights, new_state = self.update_only(weights, grads, state, externals, create_graph=create_graph)
        expected = self.segment.marks.get(self.time + 1)
        if expected is not None:
            check_mark(self, expected, new_weights, new_state, grads)
        return new_weights, new_state

    def update_only(
        self, weights: list[Tensor], grads: Gradients, state: State, externals: list[Tensor], *, create_graph: bool
    ) -> tuple[list[Tensor], State]:
        """The same from any gradients."""
        with (
            self.update.ambient.restored(Ambient.capture()),
            second_order_here(),
            torch.set_grad_enabled(create_graph),
        ):
            return self._advance(weights, grads, state, externals)

    def _call_back(
        self, callback: GradCallback, grads: Gradients, weights: list[Tensor], externals: list[Tensor]
    ) -> Gradients:
        watcher = Watcher([*weights, *(grad for grad in grads if grad is not None)], self._stand_ins(externals))
        with (
            torch.enable_grad(),
            rng_restored(self.callback_rng),
            replayed_weights(self.token, weights),
            watcher.on(),
        ):
            used = called_back(callback, grads, CurrentStep(self.time, weights, replayed=True))
        if watcher.found:
            raise ReplayMismatchError(
                f"In the replay of step {self.time} grad_callback read {len(watcher.found)} tensor(s) that "
                "require grad and that it did not read while your loop ran. Bind what it reads when it is made, for "
                "example with functools.partial(callback, tensor); in it, fmodel.parameters() are those of its step."
            )
        return used

    def _advance(
        self, weights: list[Tensor], grads: Gradients, state: State, externals: list[Tensor]
    ) -> tuple[list[Tensor], State]:
        groups = self.groups(externals)
        if is_custom(self.rules):
            return advance_again(self.rules, weights, grads, state, groups, self._stand_ins(externals), self.rule_rng)
        return self.rules.advance(weights, grads, state, groups)

    def _stand_ins(self, externals: list[Tensor]) -> dict[int, Tensor]:
        """For what the callback and the rule read without being given it."""
        return {id(self.externals[ref.at]): externals[ref.at] for ref in self.update.found}

    def groups(self, externals: Sequence[Tensor]) -> list[Group]:
        """The hyperparameters of this step."""
        leaves = (externals[ref.at] if ref.kind == "external" else self.numbers[ref.at] for ref in self.update.refs)
        groups: list[Group] = unflatten(self.update.structure, leaves)
        return groups


_NOT_FETCHED = torch.empty(0, device="meta")  # no value can be computed from it


def stand_ins_for(
    externals: Sequence[External], versions: Sequence[int], taken: Sequence[int], when: str
) -> list[Tensor]:
    """The same tensors cut off from the user's graph; those `taken` require grad, as they did when they were read."""
    references = [external for external in externals if not isinstance(external, Tensor)]
    for external, version in zip(externals, versions, strict=True):
        now = version_of(external) if isinstance(external, Tensor) else external.version
        if now != version:
            raise modified_error(tuple(external.shape), version, now, when)
    if references:
        references[0].use_with(references)
    tensors = [external if isinstance(external, Tensor) else external.read() for external in externals]
    with_gradient = set(taken)
    return [
        tensor.detach().requires_grad_() if index in with_gradient else tensor.detach()
        for index, tensor in enumerate(tensors)
    ]


def advance_carry(record: StepRecord, carry: Carry) -> Carry:
    """The next carry, by a first-order run, or by the update alone where the step has a journal."""
    weights = [
        weight.detach().requires_grad_(trainable)
        for weight, trainable in zip(carry.weights, record.layout.trainable, strict=True)
    ]
    if record.journal is not None:
        journal, read = record.journal.get(), record.stand_ins_of_update()
        new_weights, new_state = record.update_again(weights, journal.grads, carry.state, read, create_graph=False)
        return Carry([weight.detach() for weight in new_weights], new_state, journal.buffers)
    run = record.run(weights, carry.state, carry.buffers, record.stand_ins(), create_graph=False)
    return Carry([weight.detach() for weight in run.weights], run.state, run.buffers)


def fingerprint(loss: Tensor, grads: Gradients) -> Tensor:
    """A few numbers that tell one run of a step from another: the loss, and each gradient's sum and norm."""
    with torch.no_grad():
        parts = [local(loss).reshape(())]
        for grad in grads:
            if grad is not None:
                parts += [_real(grad).sum(), torch.linalg.vector_norm(local(grad))]
        return torch.stack([part.to(loss.device, torch.float64) for part in parts])


@dataclass(frozen=True)
class Mark:
    """A few numbers of a carry that the loop went on with: the sum and norm of each of its tensors.

    `noise` says which gradients of the step before were rounding alone.
    """

    numbers: Tensor
    noise: Tensor

    @staticmethod
    def of(tensors: Sequence[Tensor], norms: Sequence[Tensor | None]) -> Mark:
        """The mark of a carry, given its weights and optimizer state, and the norms of the step's gradients."""
        return Mark(_numbers(tensors), _noise_among(norms, tensors[0].device))


def _numbers(tensors: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        parts = [part for tensor in tensors for part in (_real(tensor).sum(), torch.linalg.vector_norm(local(tensor)))]
        return torch.stack([part.to(tensors[0].device, torch.float64) for part in parts])


def gradient_norms(grads: Gradients) -> list[Tensor | None]:
    """Of each gradient; None where there is none."""
    with torch.no_grad():
        return [None if grad is None else torch.linalg.vector_norm(local(grad)) for grad in grads]


def _noise_among(norms: Sequence[Tensor | None], device: torch.device) -> Tensor:
    numbers = [torch.zeros(()) if norm is None else norm for norm in norms]
    stacked = torch.stack([number.to(device, torch.float64) for number in numbers])
    return _are_noise(stacked, [None if norm is None else norm.dtype for norm in norms])


def _are_noise(norms: Tensor, dtypes: Sequence[torch.dtype | None]) -> Tensor:
    """Which gradients of these norms are nothing but rounding.

    Such a gradient is zero in exact arithmetic, like that of a bias before a normalization. One run rounds it in
    another way than the next: torch computes some backward passes by another formula where a second derivative may
    follow. It is left out of a comparison if it was so in the loop and in the replay: one alone says nothing.
    """
    levels = torch.tensor([0.0 if dtype is None else _NOISE.get(dtype, 0.0) for dtype in dtypes]).to(norms.device)
    largest = norms.max()
    return (levels > 0) & (norms <= levels * largest) & largest.isfinite()


def _real(tensor: Tensor) -> Tensor:
    tensor = local(tensor)
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def check_mark(record: StepRecord, mark: Mark, weights: list[Tensor], state: State, grads: Gradients) -> None:
    """Rule R10, for a whole segment: its replay must end where the user's loop went on.

    A parameter whose gradient is rounding alone is left out: an optimizer such as Adam makes whole steps of it.
    """
    found, expected = _numbers([*weights, *state_tensors(state)]), mark.numbers
    noise = _noise_among(gradient_norms(grads), found.device) & mark.noise
    owners = [*range(len(weights)), *(record.rules.parameter(group, at) for group, at, _ in state_keys(state))]
    compared = ~noise[owners].repeat_interleave(2)
    scale = torch.maximum(expected, found).abs()[1::2].repeat_interleave(2)
    tolerance = max(_DRIFT.get(weight.dtype.to_real(), _COARSE_TOLERANCE) for weight in weights)
    if len(found) == len(expected):
        wrong = ~((found - expected).abs() <= tolerance * (scale + 1e-30) * 10)
        if not (wrong & compared).any():
            return
    raise ReplayMismatchError(
        f"The replay up to step {record.time} does not end at the weights and optimizer state that your loop went on "
        "with: the largest difference of a norm or sum is "
        f"{(found - expected).abs().max().item() if len(found) == len(expected) else float('nan'):.3g}. Likely causes: "
        "grad_callback reads something that changed since (bind it with functools.partial); fast weights or optimizer "
        "state were changed by other means than diffopt.step and fmodel.update_params([...]); kernels that are not "
        "deterministic (torch.use_deterministic_algorithms(True))."
    )


_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_DRIFT = {torch.float64: 1e-10, torch.float32: 2e-5}  # over one segment, of which the rounding is the same on a CPU
_COARSE_TOLERANCE = 3e-2  # half precision and autocast
_NOISE = {dtype: 256 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}  # of the largest gradient


class Compared(Protocol):
    """What a replay's loss is compared with: the record of a step, or of a term of the outer loss."""

    time: int
    program: StepProgram
    loss: float | None


def check_loss_value(record: Compared, loss: Tensor) -> None:
    """Rule R10, at every replay: the loss is the one that the user's loop had."""
    found, expected = loss.detach().item(), record.loss
    assert expected is not None
    if not abs(found - expected) <= tolerance_of(record, [loss]) * (abs(expected) + 1e-3):
        raise mismatch_error(record, f"the loss was {expected:.9g} in your loop and is {found:.9g} now")


def tolerance_of(record: Compared, tensors: Sequence[Tensor]) -> float:
    """How far a replay may differ by rounding, relative."""
    if any(instruction.ambient.autocast_enabled for instruction in record.program.instructions):
        return _COARSE_TOLERANCE
    return max(_TOLERANCE.get(tensor.dtype.to_real(), _COARSE_TOLERANCE) for tensor in tensors)


def check_fingerprint(record: StepRecord, loss: Tensor, grads: Gradients) -> None:
    """Rule R10: a replay gives what the user's code gave, or raises."""
    assert record.fingerprint is not None
    found, expected = fingerprint(loss, grads), record.fingerprint
    present = [(name, grad) for name, grad in zip(record.names, grads, strict=True) if grad is not None]
    tolerance = tolerance_of(record, [loss, *(grad for _, grad in present)])
    labels, scales = ["the loss"], [expected[0].abs()]
    if len(found) == len(expected):
        for position, (name, grad) in enumerate(present):
            labels += [f"the sum of the gradient of {name}", f"the norm of the gradient of {name}"]
            norm = expected[2 + 2 * position]
            scales += [norm * grad.numel() ** 0.5, norm]
        bad = (found - expected).abs() > tolerance * torch.stack(scales)
        bad |= found.isnan() != expected.isnan()
        dtypes = [grad.dtype.to_real() for _, grad in present]
        noise = _are_noise(found[2::2], dtypes) & _are_noise(expected[2::2], dtypes)
        bad[1:] &= ~noise.repeat_interleave(2)
        if not bad.any():
            return
        worst = int(bad.nonzero()[0])
        difference = (
            f"{labels[worst]} was {expected[worst].item():.9g} in your loop and is {found[worst].item():.9g} now"
        )
    else:
        difference = "other parameters have a gradient than in your loop"
    raise mismatch_error(record, difference)


def mismatch_error(record: Compared, difference: str) -> ReplayMismatchError:
    """Rule R10."""
    return ReplayMismatchError(
        f"The replay of step {record.time} differs from what your code computed: {difference}. Likely causes: forward, "
        "grad_callback or the function given to step reads something that changed since and is no argument (a global, "
        "a list, an attribute of another object); it draws random numbers from numpy or random; the model writes into "
        "tensors that are not buffers; kernels that are not deterministic. Pass what changes as an argument, use "
        "torch's generators, register_buffer for state; or let the step be a function of all it needs, "
        "diffopt.step(fn, *args)."
    )
