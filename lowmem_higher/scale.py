"""What a meta-gradient takes on machines that are not there: bytes and hours of each process, by formulas.

NOTE [ Laws at scale ]

With P parameters of b bytes, n tensors of optimizer state for each, W processes, T steps, and D tokens in a batch:

L1  A carry has (1 + n) P b bytes, a process's part of it 1 / W of that where weights are sharded (FSDP2).
L2  A process holds (s + 3) carries, s = `checkpoints`, and the graph of one step; with `store=` 5 carries and the
    graph, and s + 1 carries are stored (`innerloop_ctx`, Memory).
L3  A forward takes 2 P D + 4 L D l d operations with L layers of width d and sequences of length l (Chowdhery et al.,
    appendix B). A first-order run takes 3 forwards, a second-order run with its pullback 9: the backward of each pass
    takes twice the pass. Each process has D / W tokens.
L4  The runs are those of `schedule.py`: T second-order runs, and the fewest first-order runs for s carries.
L5  The graph of a step keeps, of each layer and token, 34 d + 5 a l numbers of half of b bytes, a heads (Korthikanti et
    al., table 2, of 2-byte activations), and the logits three times; second-order, `_GRAPH` times all that. Besides
    three times the weights, whole (weight, gradient, cotangent), and 1 + 3 n times a process's part, by the update
    rule. The constants are measured on small decoders (`tests/test_scale.py`), and hold there to a quarter.
L6  A first-order run moves 2 (W - 1) / W P b bytes over each link (a ring's all-reduce, or gather and reduce-scatter),
    a second-order run with its pullback twice that (`distributed.py`, D2).
L7  Each kept carry is stored once and read once. Computing, links and stores do not overlap.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from lowmem_higher.report import format_bytes
from lowmem_higher.schedule import Keep, Revolve, actions, optimal_runs

_FIRST_ORDER, _SECOND_ORDER = 3, 9  # forwards
_GRAPH = 2.2
_WHOLE_WEIGHTS = 3
_HELD_WITH_STORE = 5


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The size of a decoder.

    Attributes:
        name: How it is shown.
        parameters: P.
        layers: L.
        width: d.
        heads: a.
        vocabulary: Entries of the logits.

    Example:
        >>> GPT2.parameters, gpt2("gpt2-xl", layers=48, width=1600, heads=25).parameters
        (124439808, 1557611200)
    """

    name: str
    parameters: int
    layers: int
    width: int
    heads: int
    vocabulary: int


def gpt2(
    name: str, *, layers: int, width: int, heads: int, vocabulary: int = 50257, context: int = 1024
) -> Transformer:
    """A decoder of GPT-2's form: tied embeddings, biases, LayerNorm, 4 times the width inside.

    References:
        Radford et al., Language models are unsupervised multitask learners, 2019.
    """
    layer = 12 * width * width + 13 * width
    count = layers * layer + (vocabulary + context + 2) * width
    return Transformer(name, count, layers, width, heads, vocabulary)


GPT2 = gpt2("GPT-2 small", layers=12, width=768, heads=12)
GPT2_MEDIUM = gpt2("GPT-2 medium", layers=24, width=1024, heads=16)
GPT2_XL = gpt2("GPT-2 XL", layers=48, width=1600, heads=25)
LLAMA_7B = Transformer("Llama 7B", 6_738_415_616, layers=32, width=4096, heads=32, vocabulary=32000)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What each process has.

    Attributes:
        flops: Operations per second that the device reaches at its best.
        efficiency: The part of these that a run gets.
        link: Bytes per second between two processes.
        disk: Bytes per second to and from the store.
        memory: Bytes of the device.
    """

    flops: float = 100e12
    efficiency: float = 0.4
    link: float = 50e9
    disk: float = 3e9
    memory: float = 80 * 2**30


@dataclasses.dataclass(frozen=True)
class PredictedSetting:
    """What one process takes with one setting.

    Attributes:
        checkpoints: As in `innerloop_ctx`, with `steps` given.
        stored: Whether carries go to a store, `store="a/directory"`.
        device_bytes: On the device, at most.
        stored_bytes: In the store, at most.
        first_order_runs: As `diffopt.report` counts them.
        second_order_runs: The same.
        compute_seconds: Of all runs.
        link_seconds: Of the averages, gathers and reduce-scatters.
        store_seconds: Of carries on their way to the store and back.
    """

    checkpoints: int
    stored: bool
    device_bytes: int
    stored_bytes: int
    first_order_runs: int
    second_order_runs: int
    compute_seconds: float
    link_seconds: float
    store_seconds: float

    @property
    def seconds(self) -> float:
        """Of one meta-gradient."""
        return self.compute_seconds + self.link_seconds + self.store_seconds

    @property
    def label(self) -> str:
        """The keywords."""
        return f"checkpoints={self.checkpoints}{', store=...' if self.stored else ''}"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What one meta-gradient takes on each process, under each setting; made by `predict`.

    Attributes:
        model: Of which size.
        steps: T.
        world: Processes.
        sharded: Whether each holds a part of the weights (FSDP2), or all (data parallel).
        carry_bytes: Of one carry, on one process.
        graph_bytes: Of one step's graph, on one process.
        memory: Bytes of a device.
        settings: One `PredictedSetting` each.
    """

    model: Transformer
    steps: int
    world: int
    sharded: bool
    carry_bytes: int
    graph_bytes: int
    memory: float
    settings: tuple[PredictedSetting, ...]

    @property
    def best(self) -> PredictedSetting | None:
        """The fastest setting that fits; None if none does."""
        fitting = [setting for setting in self.settings if setting.device_bytes <= self.memory]
        return min(fitting, key=lambda setting: setting.seconds, default=None)

    def as_dict(self) -> dict[str, Any]:
        """The prediction as a plain dictionary, for JSON."""
        return dataclasses.asdict(self)

    def __repr__(self) -> str:
        width = max(len(setting.label) for setting in self.settings)
        how = f"{self.world} processes, {'sharded' if self.sharded else 'data parallel'}" if self.world > 1 else "alone"
        rows = [
            f"{'>' if setting == self.best else ' '} {setting.label:<{width}} {format_bytes(setting.device_bytes):>11}"
            f" {format_bytes(setting.stored_bytes):>11} {setting.first_order_runs:>12,} {setting.seconds / 3600:>9.3g}"
            for setting in self.settings
        ]
        return "\n".join(
            [
                f"{self.model.name}, {self.steps:,} steps, {how}; of each process: carry "
                f"{format_bytes(self.carry_bytes)}, one step's graph {format_bytes(self.graph_bytes)}, device "
                f"{format_bytes(self.memory)}",
                f"  {'setting':<{width}} {'device':>11} {'store':>11} {'first-order':>12} {'hours':>9}",
                *rows,
                *([] if self.best is not None else ["  nothing fits: shard over more processes, or cut the batch"]),
            ]
        )


def predict(
    model: Transformer,
    *,
    steps: int,
    batch: int,
    sequence: int,
    world: int = 1,
    sharded: bool = False,
    machine: Machine | None = None,
    checkpoints: Sequence[int] = (10, 30, 100),
    states: int = 2,
    element: int = 4,
    graph_bytes: int | None = None,
) -> Prediction:
    """Predict bytes and hours of one meta-gradient through an inner loop, for each process.

    Nothing is run. The assumptions are L1 to L7 in `lowmem_higher/scale.py`. Besides these: each process has the same
    number of sequences; the loop cuts its batches from resident data; the outer loss is as large as an inner one; a
    step without tricks, neither mixed mode nor blocks. Bytes follow the engine's laws; hours are as good as `machine`.

    Args:
        model: Its size: `GPT2`, `GPT2_MEDIUM`, `GPT2_XL`, `LLAMA_7B`, `gpt2(...)` or a `Transformer` of yours.
        steps: Inner steps, T.
        batch: Sequences of one inner step, of all processes together; a multiple of `world`.
        sequence: Tokens of each.
        world: Processes.
        sharded: Whether weights are sharded over them (FSDP2); else each has a copy.
        machine: What each process has; None for `Machine()`.
        checkpoints: Settings to predict.
        states: Tensors of optimizer state for each parameter: 2 for Adam, 1 for momentum.
        element: Bytes of a number.
        graph_bytes: Of one step's graph on one process, where it was measured (`plan(...).graph_bytes`), for L5.

    Returns:
        A `Prediction`: `print` shows it as a table.

    Raises:
        ValueError: A number is below 1, or `batch` is no multiple of `world`.

    Example:
        >>> predict(LLAMA_7B, steps=10_000, batch=64, sequence=2048, world=64, sharded=True, checkpoints=(10, 30))
        Llama 7B, 10,000 steps, 64 processes, sharded; of each process: carry 1.2 GiB, one step's graph ...
          setting                     device       store  first-order     hours
          checkpoints=10 ...
          checkpoints=10, store=... ...

    References:
        Chowdhery et al., PaLM: scaling language modeling with pathways, arXiv 2204.02311, appendix B.
        Korthikanti et al., Reducing activation recomputation in large transformer models, arXiv 2205.05198.
        Griewank and Walther, Algorithm 799: revolve, ACM TOMS 26(1), 2000.
    """
    for name, value in {"steps": steps, "batch": batch, "sequence": sequence, "world": world}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1, as in predict(..., {name}=8).")
    if batch % world:
        raise ValueError(
            f"batch={batch} sequences cannot be shared out equally to world={world} processes; give a multiple, "
            f"batch={batch + -batch % world}."
        )
    found = machine or Machine()
    parts = world if sharded else 1
    carry = -(-carry_bytes(model.parameters, states, element) // parts)
    graph = graph_bytes
    if graph is None:
        graph = step_graph_bytes(model, batch // world, sequence, parts=parts, states=states, element=element)
    forward = forward_operations(model, batch // world, sequence)
    settings = []
    for count in checkpoints:
        first, kept = schedule_counts(steps, count)
        compute = forward * (_FIRST_ORDER * first + _SECOND_ORDER * steps) / (found.flops * found.efficiency)
        moved = 2 * (world - 1) / world * model.parameters * element * (first + 2 * steps)
        on_device = PredictedSetting(
            checkpoints=count,
            stored=False,
            device_bytes=(count + 3) * carry + graph,
            stored_bytes=0,
            first_order_runs=first,
            second_order_runs=steps,
            compute_seconds=compute,
            link_seconds=moved / found.link,
            store_seconds=0.0,
        )
        in_store = dataclasses.replace(
            on_device,
            stored=True,
            device_bytes=_HELD_WITH_STORE * carry + graph,
            stored_bytes=(count + 1) * carry,
            store_seconds=2 * kept * carry / found.disk,
        )
        settings += [on_device, in_store]
    return Prediction(model, steps, world, sharded, carry, graph, found.memory, tuple(settings))


def carry_bytes(parameters: int, states: int, element: int = 4) -> int:
    """The bytes of a whole carry (L1).

    Example:
        >>> carry_bytes(1000, states=2)
        12000
    """
    return (1 + states) * parameters * element


def forward_operations(model: Transformer, batch: int, sequence: int) -> int:
    """The operations of a forward of one step (L3).

    Example:
        >>> forward_operations(GPT2, batch=1, sequence=1024) // 10**9
        293
    """
    return batch * sequence * (2 * model.parameters + 4 * model.layers * sequence * model.width)


def step_graph_bytes(
    model: Transformer, batch: int, sequence: int, *, parts: int = 1, states: int = 2, element: int = 4
) -> int:
    """The bytes of one step's second-order graph on one process, which holds one of so many parts (L5).

    Example:
        >>> step_graph_bytes(GPT2, batch=8, sequence=1024) // 2**30
        50
    """
    layer = (34 * model.width + 5 * model.heads * sequence) * element / 2
    activations = batch * sequence * (model.layers * layer + 3 * model.vocabulary * element)
    weights = model.parameters * element
    return int(_GRAPH * activations) + _WHOLE_WEIGHTS * weights + (1 + 3 * states) * weights // parts


@functools.lru_cache(maxsize=64)
def schedule_counts(steps: int, checkpoints: int) -> tuple[int, int]:
    """The first-order runs of a loop and its backward, and the carries that are kept on the way (L4, L7).

    Example:
        >>> schedule_counts(1000, 10)
        (3637, 715)
    """
    kept = sum(isinstance(action, Keep) for action in actions(Revolve(checkpoints, steps), steps))
    return optimal_runs(steps, checkpoints), kept
