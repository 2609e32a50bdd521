"""scikit-learn's 1,797 handwritten digits, which come with it: 8 by 8 grey values each."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

Data = tuple[Tensor, Tensor]


def digits(*sizes: int) -> list[Data]:
    """Images (n, 64), from 0 to 1, and labels (n,), in random order: parts of these sizes, and the rest."""
    images, labels = load_digits(return_X_y=True)
    order, parts = torch.randperm(len(images)), [*sizes, len(images) - sum(sizes)]
    x, y = torch.as_tensor(images, dtype=torch.float32)[order] / 16, torch.as_tensor(labels)[order]
    return list(zip(x.split(parts), y.split(parts), strict=True))
