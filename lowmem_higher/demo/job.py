"""Runs the whole demo."""

from __future__ import annotations

import time

import torch

from lowmem_higher.demo import accuracy, data, detection, picture, summary
from lowmem_higher.demo.comparison import compare
from lowmem_higher.demo.metalearning import first_meta_parameters, learn
from lowmem_higher.demo.options import Options
from lowmem_higher.demo.progress import Progress

PICTURE = "demo.png"
NUMBERS = "demo.json"


def run(options: Options) -> summary.Result:
    """Learns, measures, draws, saves, and prints the result to stdout; progress goes to stderr.

    Raises:
        DivergedError: The inner training or its gradient is no longer finite.
        OSError: The results cannot be written.
    """
    start = time.perf_counter()
    print(summary.introduction(options), flush=True)
    progress = Progress()
    digits = data.load(options.seed, options.device)
    first, learned = (
        first_meta_parameters(options.seed, options.device, lambda: progress.tick()) for _ in ("before", "after")
    )
    history = learn(digits, learned, options, progress)
    found = detection.judge(learned.example_weights, digits.corrupted)
    accuracies = accuracy.measure(digits, first, learned, options, progress)
    comparison = compare(digits, learned, options, progress)
    result = summary.Result(options, accuracies, found, history, comparison, time.perf_counter() - start)

    picture_path, numbers_path = options.out / PICTURE, options.out / NUMBERS
    weights = learned.example_weights
    picture.draw(picture_path, comparison, weights, digits.corrupted, found, options.checkpoint_every)
    summary.save(numbers_path, summary.as_dict(result, _device_name(options.device)))
    print(summary.page(result, picture_path, numbers_path), flush=True)
    return result


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
