"""Test accuracy of nets trained in the ordinary way: before, after, and the nets that the result is held against.

The comparison would flatter if it left out what else the clean validation images could have been used for.
So there is a net trained on them alone, and one trained on them and the noisy images together.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lowmem_higher.demo.data import Digits
from lowmem_higher.demo.metalearning import (
    MetaParameters,
    draw_batch,
    draw_seed,
)
from lowmem_higher.demo.options import Options
from lowmem_higher.demo.progress import Progress

_RUNS = 3
_FIRST_DRAW = 20_000  # beyond those of the outer steps, so that no net is judged on minibatches that were learned on


@dataclass(frozen=True)
class Accuracy:
    """Shares of the test images named right, each the mean of three runs with other minibatches.

    Attributes:
        noisy: Trained on the noisy labels: before.
        meta_learned: The same images with learned weights, learning rate, momentum and initial weights: after.
        noisy_and_validation: Trained on the noisy images and the clean validation images together.
        validation: Trained on the validation images alone.
        clean: Trained on those training images whose label is right, which nobody could know.
    """

    noisy: float
    meta_learned: float
    noisy_and_validation: float
    validation: float
    clean: float


def measure(
    digits: Digits, first: MetaParameters, learned: MetaParameters, options: Options, bar: Progress
) -> Accuracy:
    """Trains all the nets for `options.steps` steps each and tests them."""
    noisy = (digits.train_images, digits.train_labels)
    validation = (digits.validation_images, digits.validation_labels)
    right = ~digits.corrupted

    def mean_accuracy(images: torch.Tensor, labels: torch.Tensor, meta: MetaParameters) -> float:
        weights = meta.example_weights if meta is learned else torch.ones_like(images[:, 0])
        runs = [
            _accuracy(digits, images, labels, weights.detach(), meta, options.steps, draw_seed(options.seed, draw))
            for draw in range(_FIRST_DRAW, _FIRST_DRAW + _RUNS)
        ]
        return sum(runs) / _RUNS

    with bar.phase("training nets to compare", 5 * _RUNS * (options.steps + 1)):
        return Accuracy(
            noisy=mean_accuracy(*noisy, first),
            meta_learned=mean_accuracy(*noisy, learned),
            noisy_and_validation=mean_accuracy(
                torch.cat([noisy[0], validation[0]]), torch.cat([noisy[1], validation[1]]), first
            ),
            validation=mean_accuracy(*validation, first),
            clean=mean_accuracy(digits.train_images[right], digits.train_labels[right], first),
        )


def _accuracy(
    digits: Digits,
    images: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    meta: MetaParameters,
    steps: int,
    draw: int,
) -> float:
    model = copy.deepcopy(meta.model)
    draws = torch.Generator().manual_seed(draw)
    sgd = torch.optim.SGD(model.parameters(), lr=meta.log_learning_rate.exp().item(), momentum=meta.momentum.item())
    for _ in range(steps):
        index = draw_batch(len(labels), draws, labels.device)
        losses = F.cross_entropy(model(images[index]), labels[index], reduction="none")
        sgd.zero_grad()
        (weights[index] * losses).mean().backward()
        sgd.step()
    with torch.no_grad():
        named = model(digits.test_images).argmax(dim=1)
    return int((named == digits.test_labels).sum()) / len(named)
