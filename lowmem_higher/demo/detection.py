"""What the learned example weights tell about the labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score

from lowmem_higher.demo.metalearning import FIRST_WEIGHT


@dataclass(frozen=True)
class Detection:
    """How well a low weight marks a wrong label.

    Attributes:
        auc: The chance that a wrong label has a lower weight than a right one; 0.5 is guessing, 1 is perfect.
        corrupted: Number of wrong labels.
        corrupted_lowered: How many of them ended below the weight they began with.
        clean: Number of right labels.
        clean_lowered: How many of them ended below the weight they began with.
        corrupted_mean: Mean weight of the wrong labels.
        clean_mean: Mean weight of the right ones.
    """

    auc: float
    corrupted: int
    corrupted_lowered: int
    clean: int
    clean_lowered: int
    corrupted_mean: float
    clean_mean: float


def judge(weights: torch.Tensor, corrupted: torch.Tensor) -> Detection:
    """Compares the weights with the truth.

    Args:
        weights: (examples,), not negative.
        corrupted: (examples,), true where the label is wrong.

    Example:
        >>> judge(torch.tensor([0.2, 1.4, 0.9]), torch.tensor([True, False, False])).auc
        1.0
    """
    weights, corrupted = weights.detach().cpu(), corrupted.cpu()
    lowered = weights < FIRST_WEIGHT
    return Detection(
        auc=float(roc_auc_score(corrupted.numpy(), -weights.numpy())),
        corrupted=int(corrupted.sum()),
        corrupted_lowered=int((lowered & corrupted).sum()),
        clean=int((~corrupted).sum()),
        clean_lowered=int((lowered & ~corrupted).sum()),
        corrupted_mean=weights[corrupted].mean().item(),
        clean_mean=weights[~corrupted].mean().item(),
    )
