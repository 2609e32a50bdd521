"""What the examples for several processes share: the process group that torchrun's variables describe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist


class Process(NamedTuple):
    """This process among the others."""

    rank: int
    world: int
    device: torch.device


@contextmanager
def process_group() -> Iterator[Process]:
    """Join the group of torchrun's processes, by NCCL on GPUs and by gloo on CPUs; alone where there is none.

    torchrun of PyTorch 2.13 keeps its store when it starts processes again, and these may find the addresses of those
    that died; TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new one.
    """
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    begun = not dist.is_initialized() and "RANK" in os.environ
    if begun:
        dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        if dist.is_initialized():
            yield Process(dist.get_rank(), dist.get_world_size(), device)
        else:
            yield Process(0, 1, device)
    finally:
        if begun:
            dist.destroy_process_group()
