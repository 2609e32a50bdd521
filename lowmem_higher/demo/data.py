"""Handwritten digits in three parts: training images, many with a wrong label; clean validation images; test images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits

from lowmem_higher.demo.options import DTYPE

CLASSES = 10
TRAIN_EXAMPLES = 1000
VALIDATION_EXAMPLES = 250
CORRUPTED_SHARE = 0.4


@dataclass(frozen=True)
class Digits:
    """The data, resident on the device.

    Attributes:
        train_images: (1000, 64), from 0 to 1.
        train_labels: (1000,), of which 400 are wrong.
        corrupted: (1000,), true where the label is wrong. Only used to judge the result.
        validation_images: (250, 64).
        validation_labels: (250,), all right.
        test_images: (547, 64). Only used to judge the result.
        test_labels: (547,), all right.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    corrupted: torch.Tensor
    validation_images: torch.Tensor
    validation_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load(seed: int, device: torch.device) -> Digits:
    """Splits scikit-learn's 1797 digits of 8x8 grey values and makes 40 % of the training labels wrong.

    Each wrong label is drawn uniformly from the nine other classes.

    Args:
        seed: Of the split and the wrong labels. They are drawn on the CPU, so they are the same on every device.
        device: Where the tensors go.
    """
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.as_tensor(images, dtype=DTYPE) / 16, torch.as_tensor(labels, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, validation, test = order.tensor_split((TRAIN_EXAMPLES, TRAIN_EXAMPLES + VALIDATION_EXAMPLES))

    wrong = torch.randperm(TRAIN_EXAMPLES, generator=generator)[: int(CORRUPTED_SHARE * TRAIN_EXAMPLES)]
    train_labels = labels[train]
    shift = torch.randint(1, CLASSES, (len(wrong),), generator=generator)
    train_labels[wrong] = (train_labels[wrong] + shift) % CLASSES
    return Digits(
        train_images=images[train].to(device),
        train_labels=train_labels.to(device),
        corrupted=(train_labels != labels[train]).to(device),
        validation_images=images[validation].to(device),
        validation_labels=labels[validation].to(device),
        test_images=images[test].to(device),
        test_labels=labels[test].to(device),
    )
