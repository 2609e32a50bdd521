"""The step program: what was recorded of one step, cut out of the shadow graph and made ready to run again.

NOTE [ Programs and records ]

A `StepProgram` says which calls lead from the carry to the loss, without any value: steps that differ only in their
batch, their numbers or their weights share one program. What differs is in the step's `StepRecord`: the externals (by
reference), the numbers, the random states. The program refers to values by `Ref`:

    weight i        fast weight i of this step's carry
    made n, k       output k of the program's call n (k < 0: its leaf -1 - k, after the call wrote into it)
    external j      tensor j of the record
    number c        number (or other value) c of the record
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lowmem_higher.errors import ExternalModifiedError, RecordError
from lowmem_higher.live_module import ModuleCall, describe
from lowmem_higher.record import BufferState, FunctionApply, Node, Overwritten, Recorder, version_of
from lowmem_higher.replay_state import Ambient, ModuleState, RngState, rng_restored
from lowmem_higher.structure import Leaf, Structure, tensors_in, unflatten

Buffers = tuple[Tensor | None, ...]


class Ref(NamedTuple):
    """Where a value of a program comes from; see NOTE [ Programs and records ]."""

    kind: str
    at: int
    output: int = 0


@dataclass(frozen=True)
class Instruction:
    """One call of a program. The last three are set for calls of the model only; None stands for the carry's own."""

    call: Any
    structure: Structure
    refs: tuple[Ref, ...]
    ambient: Ambient
    outputs: int = 1
    weights: tuple[Ref, ...] | None = None
    buffers: tuple[Ref, ...] | None = None
    found: tuple[Ref, ...] = ()


@dataclass(frozen=True)
class StepProgram:
    """What leads from a carry to the loss; `buffers` are those of the next carry, None if they stay."""

    instructions: tuple[Instruction, ...]
    loss: Ref
    buffers: tuple[Ref, ...] | None

    def run(self, weights: Sequence[Tensor], buffers: Buffers, inputs: StepInputs) -> tuple[Tensor, Buffers]:
        """Compute the loss, and the buffers after it, from other weights and buffers."""
        loss, *new_buffers = self.evaluate(weights, buffers, inputs, [self.loss, *(self.buffers or ())])
        return loss, buffers if self.buffers is None else tuple(new_buffers)

    def evaluate(
        self, weights: Sequence[Tensor], buffers: Buffers, inputs: StepInputs, wanted: Sequence[Ref]
    ) -> list[Any]:
        """Compute the values that `wanted` refers to."""
        results: list[tuple[list[Tensor], list[Any], Buffers]] = []
        values: dict[str, Callable[[Ref], Any]] = {
            "weight": lambda ref: weights[ref.at],
            "external": lambda ref: inputs.externals[ref.at],
            "number": lambda ref: _fresh(inputs.numbers[ref.at]),
            "made": lambda ref: results[ref.at][0 if ref.output >= 0 else 1][_position(ref.output)],
            "buffers": lambda ref: results[ref.at][2][ref.output],
            "none": lambda ref: None,
        }
        now = Ambient.capture()
        for instruction, rng, state in zip(self.instructions, inputs.rng, inputs.states, strict=True):
            leaves = [values[ref.kind](ref) for ref in instruction.refs]
            args, kwargs = unflatten(instruction.structure, iter(leaves))
            after: Buffers = ()
            with instruction.ambient.restored(now), rng_restored(rng):
                if isinstance(instruction.call, ModuleCall):
                    assert state is not None
                    own = instruction.weights, instruction.buffers
                    out, after = instruction.call.twin.run(
                        inputs.targets.get(len(results), instruction.call.target),
                        args,
                        kwargs,
                        weights=weights if own[0] is None else [values[ref.kind](ref) for ref in own[0]],
                        buffers=buffers if own[1] is None else [values[ref.kind](ref) for ref in own[1]],
                        state=state,
                        stand_ins={id(inputs.originals[ref.at]): values[ref.kind](ref) for ref in instruction.found},
                        leaves=leaves,
                    )
                else:
                    out = instruction.call(*args, **kwargs)
            results.append((tensors_in(out), leaves, after))
        return [values[ref.kind](ref) for ref in wanted]

    def __repr__(self) -> str:
        """The program as code that a person can read."""

        def name(ref: Ref) -> str:
            if ref.kind != "made":
                return f"{ref.kind}s[{ref.at}]"
            if ref.output < 0:  # what the call wrote into keeps its name
                return name(self.instructions[ref.at].refs[-1 - ref.output])
            return f"v{ref.at}[{ref.output}]" if self.instructions[ref.at].outputs > 1 else f"v{ref.at}"

        lines = ["def step_program(weights, externals, numbers):"]
        for position, instruction in enumerate(self.instructions):
            args, kwargs = unflatten(instruction.structure, (_Name(name(ref)) for ref in instruction.refs))
            parts = [repr(arg) for arg in args] + [
                f"{key}={value!r}" for key, value in kwargs.items() if value is not None
            ]
            notes = [] if instruction.ambient.grad_enabled else ["no_grad"]
            notes += [f"also reads {', '.join(map(name, instruction.found))}"] if instruction.found else []
            comment = f"  # {'; '.join(notes)}" if notes else ""
            lines.append(f"    v{position} = {_shown_call(instruction.call)}({', '.join(parts)}){comment}")
        return "\n".join([*lines, f"    return {name(self.loss)}"])


@dataclass
class StepInputs:
    """What one run of a program reads besides the carry; `externals` may be stand-ins for `originals`."""

    externals: Sequence[Tensor]
    originals: Sequence[object]
    numbers: Sequence[Any]
    rng: Sequence[RngState | None]
    states: Sequence[ModuleState | None]
    targets: dict[int, Any]


class Externals:
    """The distinct tensors that a step reads and did not make, with the version at which each was read."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.versions: list[int] = []
        self._index: dict[int, int] = {}

    def ref(self, tensor: Tensor, version: int) -> Ref:
        """The reference to a tensor, added if it is new."""
        index = self._index.setdefault(id(tensor), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(tensor)
            self.versions.append(version)
        if version_of(tensor) != version or self.versions[index] != version:
            raise modified_error(
                tuple(tensor.shape), version, version_of(tensor), "between its use in the loss and the step"
            )
        return Ref("external", index)


def modified_error(shape: tuple[int, ...], version: int, now: int, when: str) -> ExternalModifiedError:
    """Rule R4: a tensor that a step reads must stay as it was."""
    return ExternalModifiedError(
        f"A tensor of shape {shape} that a recorded step reads was modified in place {when} (version "
        f"{version} was read, it is now at {now}), so the step cannot be replayed as it was. Modify a "
        "copy: t = t.clone(); or hand the step its own data: diffopt.step(fn, t.clone())."
    )


@dataclass
class Slice:
    """What was cut out of the shadow graph for one step."""

    program: StepProgram
    numbers: tuple[Any, ...]
    rng: tuple[RngState | None, ...]
    states: tuple[ModuleState | None, ...]
    targets: dict[int, Any]


def cut(
    recorder: Recorder,
    loss: Tensor,
    node: Node | None,
    window: int,
    weights: list[Tensor],
    before: BufferState,
    after: BufferState,
    externals: Externals,
) -> Slice:
    """Cut the part of the shadow graph that leads from `weights` to `loss` and was made in this window.

    Args:
        recorder: The recorder.
        loss: The loss of the step.
        node: The call that made it, if it came from a function given to `step`.
        window: The index of the first node after the last step.
        weights: The current fast weights.
        before: The buffers at the start of the window.
        after: The buffers now.
        externals: Receives what is read from outside.
    """
    if node is None:
        link, later_write = recorder.link(loss)
        if link is None or link.node.index < window:
            raise unseen_error(loss, "The loss")
        roots, loss_made = [link.node, *([later_write] if later_write else [])], (link.node, link.output)
    else:
        roots, loss_made = [node], (node, 0)
    weight_index = {id(weight): index for index, weight in enumerate(weights)}
    nodes = _reached(roots, window, weight_index)
    position = {id(node): index for index, node in enumerate(nodes)}
    hooked = [leaf for made in nodes for leaf in made.leaves if isinstance(leaf, Tensor) and recorder.hooked(leaf)]
    if recorder.hooked(loss) or any(map(recorder.hooked, weights)) or any(not leaf.is_leaf for leaf in hooked):
        raise RecordError(
            "A hook was registered (register_hook) on a fast weight, or on a tensor that leads to the loss, "
            "and a replay would not call it. Change gradients with grad_callback, or take the step as "
            "diffopt.step(fn, *args) with the hook registered inside fn."
        )
    numbers: list[Any] = []

    def tensor_ref(tensor: Tensor, version: int) -> Ref:
        if id(tensor) in weight_index:
            return Ref("weight", weight_index[id(tensor)])
        return externals.ref(tensor, version)

    def leaf_ref(leaf: Any, made: tuple[Node, int] | None, version: int) -> Ref:
        if id(leaf) in weight_index:
            return Ref("weight", weight_index[id(leaf)])
        if made is not None and id(made[0]) in position:
            return Ref("made", position[id(made[0])], made[1])
        if isinstance(leaf, Tensor):
            return tensor_ref(leaf, version)
        if isinstance(leaf, Overwritten):
            raise unseen_error(loss, "The loss")
        numbers.append(leaf)
        return Ref("number", len(numbers) - 1)

    def buffer_refs(state: BufferState) -> tuple[Ref, ...] | None:
        if state is before:
            return None
        producer = None if state.producer is None else state.producer()
        if producer is not None and id(producer) in position:
            return tuple(Ref("buffers", position[id(producer)], k) for k in range(len(state.tensors)))
        return tuple(
            Ref("none", 0) if tensor is None else externals.ref(tensor, version_of(tensor)) for tensor in state.tensors
        )

    instructions: list[Instruction] = []
    states: list[ModuleState | None] = []
    targets: dict[int, Any] = {}
    for index, made in enumerate(nodes):
        refs = tuple([
            leaf_ref(*leaf) for leaf in zip(made.leaves, made.links, made.versions, strict=True)
        ])  # fmt: skip
        inside, call = made.inside, made.call
        if inside is None:
            instructions.append(Instruction(call, made.structure, refs, made.ambient, made.outputs))
            states.append(None)
            continue
        if not isinstance(call.target, str):  # a function may be a new object at each step: its code stands for it
            targets[index] = call.target
            call = ModuleCall(call.twin, getattr(call.target, "__code__", type(call.target)))
        own_weights = len(inside.weights) == len(weights) and all(map(_same, inside.weights, weights))
        instructions.append(
            Instruction(
                call,
                made.structure,
                refs,
                made.ambient,
                made.outputs,
                None if own_weights else tuple([tensor_ref(w, version_of(w)) for w in inside.weights]),
                buffer_refs(inside.buffers),
                tuple(map(tensor_ref, inside.found, inside.found_versions)),
            )
        )
        states.append(inside.state)
    loss_ref = Ref("made", position[id(loss_made[0])], loss_made[1])
    program = StepProgram(tuple(instructions), loss_ref, buffer_refs(after))
    return Slice(program, tuple(numbers), tuple([made.rng for made in nodes]), tuple(states), targets)


def _same(one: object, other: object) -> bool:
    return one is other


def _reached(roots: list[Node], window: int, weights: Container[int]) -> list[Node]:
    """The nodes of this window that `roots` depend on other than through the weights, in the order of their calls."""
    found = {id(node): node for node in roots}
    pending = list(roots)
    while pending:
        node = pending.pop()
        linked = [
            link[0] for leaf, link in zip(node.leaves, node.links, strict=True) if link and id(leaf) not in weights
        ]
        for other in [*linked, *node.after]:
            if other.index >= window and id(other) not in found:
                found[id(other)] = other
                pending.append(other)
    return sorted(found.values(), key=lambda node: node.index)


def check_dependence(
    loss: Tensor,
    weights: Sequence[Tensor],
    externals: Sequence[Tensor],
    since: int,
    made_inside: Callable[[Tensor], bool] | None,
    is_step: Callable[[Any], bool],
) -> None:
    """Rules R9 and R6: nothing read from outside depends on the fast weights unseen, and no input is missed.

    Args:
        loss: The loss.
        weights: The fast weights of this step.
        externals: What the step reads from outside.
        since: The autograd sequence number at the start of the window; older graph cannot reach `weights`.
        made_inside: If given, also walk the graph of the loss, and require each of its inputs to be known; says of a
            leaf whether the step itself makes it.
        is_step: Says whether a node of the graph is a step of this model, through which no inner gradient passes.

    Raises:
        RecordError: An external depends on the weights, or an input of the loss is not known.
    """
    edges = {_edge(weight) for weight in weights if weight.requires_grad}
    for external in externals:
        if _made_since(external, since) and _boundary(external, since, edges, is_step)[1]:
            raise unseen_error(external, "A tensor that the loss is made from")
    for weight in weights:
        if _made_since(weight, since) and _boundary(weight, since, edges - {_edge(weight)}, is_step)[1]:
            raise RecordError(
                f"A fast weight that was set by hand (shape {tuple(weight.shape)}) is a function of another one that "
                "stayed as it was. The gradient for that one would count twice. Set all weights that take part: "
                "fmodel.update_params([...]) with a new tensor, w.clone(), for each."
            )
    if made_inside is not None:
        known = edges | {_edge(external) for external in externals if external.requires_grad}
        for leaf in _boundary(loss, since, known)[0]:
            if leaf is not None and made_inside(leaf):
                continue
            shown = "not a leaf" if leaf is None else f"a leaf of shape {tuple(leaf.shape)}"
            raise RecordError(
                f"The loss depends on a tensor that requires grad and that the recorder did not see ({shown}): it "
                "was probably read by compiled or C++ code, from a closure or a global. Pass it to the model as an "
                "argument, fmodel(x, tensor), or to the step, diffopt.step(fn, tensor)."
            )


def check_ancestors(earlier: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Refuse a step whose inner gradient would depend on how its inputs came about.

    Args:
        earlier: Optimized weights that the last step did not make: set back to those of another time, or passed over.
        others: What else the step reads.

    Raises:
        RecordError: One of `others` was made from one of `earlier` by the steps in between. The inner gradient would
            then be the total derivative, through those steps; a step here takes the partial one.
    """
    edges = {_edge(weight) for weight in earlier}
    oldest = min(number for number, _ in edges) if all(weight.grad_fn is not None for weight in earlier) else 0
    for other in others:
        if other.requires_grad and not other.is_leaf and _boundary(other, oldest, edges)[1]:
            raise RecordError(
                f"A fast weight of an earlier time is optimized in this step, and a tensor of shape "
                f"{tuple(other.shape)} that the step reads as well was made from that weight by the steps since. "
                "The inner gradient would flow back through those steps. Cut one of both: use other.detach(), or go "
                "back to copies, fmodel.update_params([w.clone() for w in fmodel.parameters(time=k)])."
            )


def _made_since(tensor: Tensor, since: int) -> bool:
    """Whether a tensor's place in the graph is newer than a sequence number."""
    return not tensor.is_leaf and cast(Any, tensor.grad_fn)._sequence_nr() >= since


def _edge(tensor: Tensor) -> tuple[int, int]:
    """A tensor's place in the autograd graph; a leaf is its own."""
    return (id(tensor), -1) if tensor.grad_fn is None else (tensor.grad_fn._sequence_nr(), tensor.output_nr)


def _boundary(
    start: Tensor, since: int, known: set[tuple[int, int]], is_step: Callable[[Any], bool] | None = None
) -> tuple[list[Tensor | None], bool]:
    """Walk a graph back to `known` places or to what is older than `since`.

    Returns:
        What was reached without being known (leaves; None for what is no leaf), and whether a known place was reached.
    """
    unknown: list[Tensor | None] = []
    reached = False
    if start.grad_fn is None or _edge(start) in known or (is_step is not None and is_step(start.grad_fn)):
        return unknown, _edge(start) in known
    seen, pending = {start.grad_fn}, [start.grad_fn]
    while pending:
        for node, output in pending.pop().next_functions:
            if node is None:
                continue
            variable = getattr(node, "variable", None)  # of a leaf's AccumulateGrad
            edge = (node._sequence_nr(), output) if variable is None else (id(variable), -1)
            if edge in known:
                reached = True
            elif variable is not None or node._sequence_nr() < since:
                unknown.append(variable)
            elif node not in seen and not (is_step is not None and is_step(node)):
                seen.add(node)
                pending.append(node)
    return unknown, reached


def unseen_error(tensor: Tensor, what: str) -> RecordError:
    """Rule R9: how a tensor was made was not seen."""
    made_by = "an operation" if tensor.grad_fn is None else tensor.grad_fn.name()
    return RecordError(
        f"{what} (shape {tuple(tensor.shape)}, made by {made_by}) depends on the current fast weights in a way that "
        "the recorder did not see: through torch.func or vmap, a C++ extension, an attribute set inside forward, or a "
        "call made before the last step or outside the context. Let the engine call your code itself: write it as a "
        "function, def inner_loss(fmodel, *args): ..., and take diffopt.step(inner_loss, *args)."
    )


def _position(output: int) -> int:
    return output if output >= 0 else -1 - output


def _fresh(value: Any) -> Any:
    """A generator draws on from where it stood; each run gets its own."""
    return value.clone_state() if isinstance(value, torch.Generator) else value


class _Name:
    """Prints as a bare name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def _shown_call(call: Any) -> str:
    if isinstance(call, ModuleCall):
        return describe(call.target) if isinstance(call.target, str) else getattr(call.target, "co_name", "function")
    if isinstance(call, FunctionApply):
        return call.__name__
    name = torch.overrides.resolve_name(call) or getattr(call, "__qualname__", repr(call))
    return "torch.autograd.grad" if call is torch.autograd.grad else str(name)


__all__ = [
    "Externals",
    "Instruction",
    "Leaf",
    "Ref",
    "Slice",
    "StepInputs",
    "StepProgram",
    "check_ancestors",
    "check_dependence",
    "cut",
]
