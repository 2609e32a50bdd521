"""The nets and their data: random weights, random batches that lie in memory, a held-out batch, an inner loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUMBER_OF_BATCHES = 8


class CountedModel(nn.Module):
    """Passes through to `body` and counts its calls, replays included: a pass count that no library gives of itself."""

    calls: ClassVar[int] = 0  # of the class: a library may copy the module

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor) -> Tensor:
        CountedModel.calls += 1
        output: Tensor = self.body(inputs)
        return output


@dataclass(frozen=True)
class Problem:
    """One net with its data: batches are used in turn, the held-out batch makes the outer loss."""

    name: str
    description: str
    model: CountedModel
    batches: list[tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    learning_rate: float

    def to(self, device: torch.device) -> Problem:
        """The same problem on `device`; the model is copied."""
        return Problem(
            self.name,
            self.description,
            copy.deepcopy(self.model).to(device),
            [(inputs.to(device), targets.to(device)) for inputs, targets in self.batches],
            (self.held_out[0].to(device), self.held_out[1].to(device)),
            self.loss,
            self.learning_rate,
        )


def _classification(
    name: str, description: str, body: nn.Module, batch: int, shape: tuple[int, ...], classes: int, learning_rate: float
) -> Problem:
    def draw() -> tuple[Tensor, Tensor]:
        targets = torch.randint(0, classes, (batch,))
        return 0.5 * prototypes[targets] + torch.randn(batch, *shape), targets

    prototypes = torch.randn(classes, *shape)
    batches = [draw() for _ in range(NUMBER_OF_BATCHES)]
    return Problem(name, description, CountedModel(body), batches, draw(), F.cross_entropy, learning_rate)


def tiny(seed: int = 0) -> Problem:
    """3-layer tanh net, 40 units, batch 10: all overhead, hardly any arithmetic."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(10, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))

    def draw() -> tuple[Tensor, Tensor]:
        inputs = torch.randn(10, 10)
        return inputs, torch.sin(inputs.sum(1, keepdim=True))

    batches = [draw() for _ in range(NUMBER_OF_BATCHES)]
    return Problem(
        "tiny", "3-layer tanh net, 40 units, batch 10", CountedModel(body), batches, draw(), F.mse_loss, 0.01
    )


def mlp(seed: int = 0, width: int = 512, batch: int = 512, name: str = "mlp512") -> Problem:
    """3-layer ReLU net, by default 512 units and batch 512: matrix products."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    description = f"3-layer ReLU net, {width} units, batch {batch}"
    return _classification(name, description, body, batch, (width,), 10, 0.01)


def one_layer(seed: int = 0) -> Problem:
    """One tanh layer, 64 inputs, 32 outputs, batch 16: the least time of a step, for the longest loops."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Tanh())

    def draw() -> tuple[Tensor, Tensor]:
        inputs = torch.randn(16, 64)
        return inputs, torch.sin(inputs[:, :32])

    batches = [draw() for _ in range(NUMBER_OF_BATCHES)]
    return Problem(
        "one layer",
        "one tanh layer of 64 x 32 weights, batch 16",
        CountedModel(body),
        batches,
        draw(),
        F.mse_loss,
        0.01,
    )


def conv4(seed: int = 0) -> Problem:
    """4 convolutions of 64 channels with BatchNorm (MAML's net) on 28x28 images, batch 25 (5 classes)."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for channels in (1, 64, 64, 64):
        layers += [nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 5))
    description = "4-conv net, 64 channels, BatchNorm, 28x28, batch 25"
    return _classification("conv4", description, body, 25, (1, 28, 28), 5, 0.01)


class GptBlock(nn.Module):
    """A transformer block: causal attention and an MLP, each after a LayerNorm and around a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.into, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.after = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape, (batch, length, width)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.into(self.norm(x)).chunk(3, dim=-1)
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # written out, since higher knows no fused attention
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(self.after(x))
        return result


def token_loss(out: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all tokens."""
    return F.cross_entropy(out.flatten(0, 1), targets.flatten())


def gpt(seed: int = 0, width: int = 128, blocks: int = 4, length: int = 64, batch: int = 8) -> Problem:
    """A GPT without positions: 4 blocks of 128 units, 4 heads, 64 tokens of 256, batch 8; predicts the next token."""
    torch.manual_seed(seed)
    middle = [GptBlock(width, 4) for _ in range(blocks)]
    body = nn.Sequential(nn.Embedding(256, width), *middle, nn.LayerNorm(width), nn.Linear(width, 256))

    def draw() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 256, (batch, length + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    batches = [draw() for _ in range(NUMBER_OF_BATCHES)]
    description = f"GPT-like, {blocks} blocks of {width} units, {length} tokens, batch {batch}"
    return Problem("gpt", description, CountedModel(body), batches, draw(), token_loss, 0.01)
