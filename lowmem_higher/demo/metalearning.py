"""Learn what an inner training run should be, from the gradient of its outcome.

The inner run trains a small net with SGD. The outcome is the loss of the trained net on clean validation images. Its
exact gradient, through every step of the run, says for each training example whether the net would have done better
with more or less of it, and the same for the learning rate, the momentum and the weights that the run starts from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import lowmem_higher as higher
from lowmem_higher.demo.data import CLASSES, TRAIN_EXAMPLES, Digits
from lowmem_higher.demo.options import DTYPE, Options
from lowmem_higher.demo.progress import CHECKPOINTED_PASSES, Progress

BATCH = 100
HIDDEN_UNITS = 64
FIRST_LEARNING_RATE = 0.05
FIRST_MOMENTUM = 0.5
FIRST_WEIGHT = 1.0

# Step sizes of the outer optimizer, and bounds that keep the inner run stable. Chosen on seeds 1 to 4, not on the
# default seed. Adam's first steps are close to the sign of the gradient, so a weight moves by about 0.1 a step.
_OUTER_STEP_SIZE = {"example_weights": 0.1, "log_learning_rate": 0.05, "momentum": 0.01, "initial_weights": 0.01}
_OUTER_BETAS = (0.5, 0.9)
_LARGEST_LEARNING_RATE = 0.5
_LARGEST_MOMENTUM = 0.95


class DivergedError(RuntimeError):
    """The inner run or its gradient is no longer finite."""


class Classifier(nn.Module):
    """A net with one hidden layer: 64 grey values to 10 classes.

    Args:
        tick: Called at every pass, so that a progress bar also sees the passes of a backward.
    """

    def __init__(self, tick: Callable[[], None]) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, HIDDEN_UNITS, dtype=DTYPE)
        self.output = nn.Linear(HIDDEN_UNITS, CLASSES, dtype=DTYPE)
        self.tick = tick

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of shape (images, 10)."""
        self.tick()
        logits: torch.Tensor = self.output(torch.tanh(self.hidden(images)))
        return logits


@dataclass(frozen=True)
class MetaParameters:
    """What the outer loop learns.

    Attributes:
        model: The net, whose weights are those that each inner run starts from.
        example_weights: (1000,), how much each training example counts; from 1, never below 0.
        log_learning_rate: Logarithm of the learning rate.
        momentum: From 0 to 1.
    """

    model: Classifier
    example_weights: torch.Tensor
    log_learning_rate: torch.Tensor
    momentum: torch.Tensor

    def groups(self) -> dict[str, list[torch.Tensor]]:
        """All learned tensors by name."""
        return {
            "example_weights": [self.example_weights],
            "log_learning_rate": [self.log_learning_rate],
            "momentum": [self.momentum],
            "initial_weights": list(self.model.parameters()),
        }


@dataclass(frozen=True)
class MetaGradient:
    """The outcome of one inner run and its gradient.

    Attributes:
        loss: Validation loss of the trained net.
        gradients: Like `MetaParameters.groups()`.
        report: `diffopt.report.as_dict()` after the backward.
        seconds: Of the run and the backward together.
    """

    loss: float
    gradients: dict[str, list[torch.Tensor]]
    report: dict[str, object]
    seconds: float


@dataclass(frozen=True)
class OuterStep:
    """One line of the outer loop's history: the loss before the update, and the values after it."""

    validation_loss: float
    learning_rate: float
    momentum: float
    seconds: float


def first_meta_parameters(seed: int, device: torch.device, tick: Callable[[], None]) -> MetaParameters:
    """The starting point: every example counts 1. Leaves torch's own random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(tick)

    def leaf(value: torch.Tensor) -> torch.Tensor:
        return value.to(device=device, dtype=DTYPE).requires_grad_()

    return MetaParameters(
        model=model.to(device),
        example_weights=leaf(torch.full((TRAIN_EXAMPLES,), FIRST_WEIGHT)),
        log_learning_rate=leaf(torch.tensor(math.log(FIRST_LEARNING_RATE))),
        momentum=leaf(torch.tensor(FIRST_MOMENTUM)),
    )


def meta_gradient(
    digits: Digits, meta: MetaParameters, *, steps: int, checkpoint_every: int | None, draw: int
) -> MetaGradient:
    """Trains the net for `steps` steps and differentiates its validation loss through all of them.

    Args:
        digits: The data.
        meta: Where to take the gradient.
        steps: Inner steps T.
        checkpoint_every: Steps N between stored carries; None keeps the graph of every step, as `higher` does.
        draw: Seed of the minibatches.

    Memory:
        `(ceil(T/N) + N)` carries, of two copies of the net each, and one step's graph; with None, T steps' graphs.
    """
    start = time.perf_counter()
    draws = torch.Generator().manual_seed(draw)
    optimizer = torch.optim.SGD(meta.model.parameters(), lr=1.0, momentum=0.5)  # both overridden
    with higher.innerloop_ctx(
        meta.model,
        optimizer,
        copy_initial_weights=False,
        override={"lr": [meta.log_learning_rate.exp()], "momentum": [meta.momentum]},
        checkpoint_every=checkpoint_every,
    ) as (fmodel, diffopt):
        for _ in range(steps):
            index = draw_batch(len(digits.train_labels), draws, digits.train_labels.device)
            logits = fmodel(digits.train_images[index])
            losses = F.cross_entropy(logits, digits.train_labels[index], reduction="none")
            diffopt.step((meta.example_weights[index] * losses).mean())
        loss = F.cross_entropy(fmodel(digits.validation_images), digits.validation_labels)
        groups = meta.groups()
        tensors_of_all = [tensor for tensors in groups.values() for tensor in tensors]
        # A run of one step never uses the momentum: its gradient is zero then.
        flat = list(torch.autograd.grad(loss, tensors_of_all, materialize_grads=True))
    gradients = {name: [flat.pop(0) for _ in tensors] for name, tensors in groups.items()}
    value = loss.item()  # waits for the device, so that the time is the whole time
    return MetaGradient(value, gradients, diffopt.report.as_dict(), time.perf_counter() - start)


def draw_batch(examples: int, draws: torch.Generator, device: torch.device) -> torch.Tensor:
    """The indices of one minibatch, drawn on the CPU so that they are the same on every device."""
    return torch.randint(examples, (BATCH,), generator=draws).to(device)


def learn(digits: Digits, meta: MetaParameters, options: Options, progress: Progress) -> list[OuterStep]:
    """Updates the meta-parameters in place, `options.outer_steps` times.

    Raises:
        DivergedError: A gradient is not finite.
    """
    groups = meta.groups()
    adam = torch.optim.Adam(
        [{"params": tensors, "lr": _OUTER_STEP_SIZE[name]} for name, tensors in groups.items()], betas=_OUTER_BETAS
    )
    history = []
    passes = CHECKPOINTED_PASSES * options.steps
    with progress.phase("learning the weights", options.outer_steps * passes):
        for number in range(options.outer_steps):
            outcome = meta_gradient(
                digits,
                meta,
                steps=options.steps,
                checkpoint_every=options.checkpoint_every,
                draw=draw_seed(options.seed, number),
            )
            for name, tensors in groups.items():
                for tensor, gradient in zip(tensors, outcome.gradients[name], strict=True):
                    if not gradient.isfinite().all():
                        raise DivergedError(
                            f"outer step {number + 1}: the gradient of {name} is not finite; try fewer --steps"
                        )
                    tensor.grad = gradient
            adam.step()
            with torch.no_grad():
                meta.example_weights.clamp_(min=0.0)
                meta.log_learning_rate.clamp_(max=math.log(_LARGEST_LEARNING_RATE))
                meta.momentum.clamp_(0.0, _LARGEST_MOMENTUM)
            progress.reach((number + 1) * passes)
            history.append(
                OuterStep(outcome.loss, meta.log_learning_rate.exp().item(), meta.momentum.item(), outcome.seconds)
            )
    adam.zero_grad()
    return history


def draw_seed(seed: int, number: int) -> int:
    """A seed for the minibatches of one run, different for every run of every seed."""
    return seed * 1_000_003 + number + 1
