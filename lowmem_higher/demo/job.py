"""Runs the whole demo."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

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
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    print(summary.introduction(options), flush=True)
    progress = Progress()
    with _one_thread(), progress.interruptible():
        result, weights, corrupted = _find(options, progress)
    picture_path, numbers_path = options.out / PICTURE, options.out / NUMBERS
    comparison, every = result.comparison, options.checkpoint_every
    picture.draw(picture_path, comparison, weights, corrupted, result.detection, every)
    summary.save(numbers_path, summary.as_dict(result, _device_name(options.device)))
    print(summary.page(result, picture_path, numbers_path), flush=True)
    return result


def _find(options: Options, progress: Progress) -> tuple[summary.Result, torch.Tensor, torch.Tensor]:
    """The result, the learned weights, and which labels are wrong."""
    start = time.perf_counter()
    digits = data.load(options.seed, options.device)
    first, learned = (
        first_meta_parameters(options.seed, options.device, lambda: progress.tick()) for _ in ("before", "after")
    )
    history = learn(digits, learned, options, progress)
    found = detection.judge(learned.example_weights, digits.corrupted)
    accuracies = accuracy.measure(digits, first, learned, options, progress)
    comparison = compare(digits, learned, options, progress)
    result = summary.Result(
        options=options,
        accuracy=accuracies,
        detection=found,
        history=history,
        comparison=comparison,
        test_examples=len(digits.test_labels),
        seconds=time.perf_counter() - start,
    )
    return result, learned.example_weights.detach(), digits.corrupted


@contextmanager
def _one_thread() -> Iterator[None]:
    """Computes on one CPU thread: the net is too small to share, and threads that wait spin.

    With two threads on two cores that other programs also use, the job was measured to run seven times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
