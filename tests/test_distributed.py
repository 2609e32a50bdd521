"""Several processes: what they get together is what one process gets, and what cannot work raises on each of them.

Processes are started once, and run the cases of `ranks.py`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import nn

import lowmem_higher as higher
from lowmem_higher.distributed import average, average_gradients
from lowmem_higher.scale import Transformer, predict

WORLD = 2
EXACT = 1e-9
SHARE = 0.6  # of one process's bytes, with two


def assert_exact(rank: int, found: dict[str, Any]) -> None:
    for case in EXACT_CASES:
        errors = found[case.__name__]
        assert isinstance(errors, dict), f"rank {rank}, {case.__name__}: {errors}"
        wrong = {name: value for name, value in errors.items() if "bytes" not in name and not value <= EXACT}
        assert not wrong, f"rank {rank}, {case.__name__}: {wrong}"
    assert len(found["data_parallel"]) == len(ranks.SETTINGS) + len(ranks.SOME) * (len(ranks.OPTIMIZERS) - 1)


EXACT_CASES: list[ranks.Case] = [
    ranks.data_parallel,
    ranks.twice_and_past_weights,
    ranks.composed_with_clipping,
    ranks.higher_order,
    ranks.collectives_in_the_loss,
    ranks.tasks,
    ranks.fsdp,
    ranks.tensor_parallel,
    ranks.fsdp_after_a_forward,
]
DIFFERING: dict[ranks.Case, str] = {
    ranks.steps_differ: "in the replay of step 3; rank 1 at collective",
    ranks.settings_differ: "All ranks have to take the same number of steps with the same settings",
    ranks.budgets_differ: "with memory_budget each measures for itself",
    ranks.backwards_differ: "average_gradients of 6 tensors",
    ranks.weights_differ: "different weights in step 0 of the loop",
    ranks.rates_differ: "different weights in step 1 of the loop",
    ranks.gradients_differ: "can take part with 0 * parameter.sum()",
}
REFUSED: dict[ranks.Case, str] = {
    ranks.in_place_in_the_loss: "use lowmem_higher.distributed.average(tensor)",
    ranks.in_place_in_a_backward: "SyncBatchNorm does that",
    ranks.wrapped: "Hand over what is inside, model.module",
    ranks.part_of_a_mesh: "over 1 of the 2 processes",
    ranks.fsdp_in_half_precision: "run the loop under torch.autocast",
    ranks.fsdp_of_tensor_parallel: "Use one of both",
    ranks.sharded_with_a_budget: "innerloop_ctx(..., checkpoints=10)",
}


@pytest.mark.usefixtures("float64")  # as in the ranks
def test_ranks_equal_one_process_or_raise(tmp_path: Path) -> None:
    others: list[ranks.Case] = [ranks.traffic, ranks.example_programs, *DIFFERING, *REFUSED, ranks.one_is_gone]
    results = ranks.spawn([*EXACT_CASES, *others], WORLD, tmp_path)
    alone = ranks.example_programs(0, 1)
    size = Transformer("net", sum(parameter.numel() for parameter in ranks.Net().parameters()), 1, 1, 1, 1)
    predicted = predict(size, steps=1, batch=WORLD, sequence=1, world=WORLD, sharded=True, states=3, element=8)
    for rank, found in enumerate(results):
        assert_exact(rank, found)
        assert 0.4 < found["fsdp"]["bytes of carry"] <= SHARE
        assert 0.4 < found["fsdp"]["bytes of stored"] <= SHARE
        assert found["fsdp"]["bytes of one"] == predicted.carry_bytes
        averaged, first_order_runs, second_order_runs = found["traffic"]
        of_steps = first_order_runs - 1  # one is of a term of the outer loss
        assert averaged == size.parameters * (of_steps + 2 * second_order_runs)  # L6 of `scale.py`
        assert found["example_programs"] == pytest.approx(alone, rel=1e-7)
        for case, part in (*DIFFERING.items(), *REFUSED.items()):
            text = found[case.__name__]
            assert isinstance(text, str), f"rank {rank}, {case.__name__}: {text}"
            assert part in text, f"rank {rank}, {case.__name__}: {text}"
            assert text.startswith("RanksDifferError") is (case in DIFFERING), f"rank {rank}, {case.__name__}: {text}"
    assert "Another process is gone" in results[0]["one_is_gone"]


def test_torchrun_runs_an_example() -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    program = ["lowmem_higher.examples.data_parallel", "--updates=1", "--steps=4"]
    done = subprocess.run([sys.executable, *command, *program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("outer step 1 of 1, 2 processes") == 1


def test_wrappers_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"start one process for each device with torchrun.*grad_callback"):
        higher.monkeypatch(nn.DataParallel(nn.Linear(2, 1)))

    class FullyShardedDataParallel(nn.Module):
        """Stands for torch's, which needs a process group."""

        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 1)

    outer = nn.Sequential(nn.Linear(2, 2), FullyShardedDataParallel())
    with pytest.raises(TypeError, match=r"a part, '1', .*model\.1\.module.*fully_shard"):
        higher.monkeypatch(outer)


def test_one_process_needs_no_group_and_several_do(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = torch.ones(2, requires_grad=True)
    (3 * meta).sum().backward()
    average_gradients([meta])
    assert meta.grad is not None
    assert torch.equal(meta.grad, torch.tensor([3.0, 3.0]))
    assert average([meta, None])[0] is meta
    assert average(meta) is meta
    monkeypatch.setenv("WORLD_SIZE", "2")
    for run in (lambda: average([meta]), lambda: average_gradients([meta])):
        with pytest.raises(RuntimeError, match="init_process_group"):
            run()
