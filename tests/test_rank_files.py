"""One `run_dir` for several processes: the bits of a run without files, whatever ends a rank, all of them or a file.

`rank_survivor.py` runs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_survivor
from rank_survivor import DAMAGE, FORMS, READS, SETTINGS

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = str(ROOT / "tests" / "rank_survivor.py")
EXACT = 1e-9
SHARE = 0.6  # of one process's bytes, with two


def ran(*command: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see `processes.py` of the examples
    environment |= {"QUIET": "1"} if quiet else {}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done


def test_two_ranks_keep_a_run_together(tmp_path: Path) -> None:
    found = json.loads(ran(PROGRAM, "cases", str(tmp_path)).stdout.splitlines()[-1])
    assert list(found) == [case.__name__ for case in rank_survivor.CASES]
    assert_same_bits(found["same_bits"])
    assert_goes_on(found["goes_on"])
    assert_damage(found["damage"])
    assert_other_worlds(found["other_worlds"])
    assert_errors(found["errors"])
    assert_sizes(found["sizes"])
    of_ranks, alone = found["example"]
    assert of_ranks == [pytest.approx(alone, rel=1e-7)] * 2


def assert_same_bits(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for form in FORMS:
            assert found.pop(f"{form}, whole") < EXACT
        assert found == dict.fromkeys(SETTINGS, True)


def assert_goes_on(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert len(found) == sum(map(len, READS.values()))
        for name, (ended, right, states) in found.items():
            assert not ended, name
            assert right, name
            assert {"manifest.json", "lock"} <= set(states), name
        kinds = {state.partition("-")[0] for _, _, states in found.values() for state in states}
        assert kinds >= {"carry", "newest", "adjoint", "final", "steps"}


def assert_damage(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0].keys() == ranks[1].keys()
    assert len(ranks[0]) == len(DAMAGE)
    for name in ranks[0]:
        (right, said), (other_right, other_said) = ranks[0][name], ranks[1][name]
        assert right, name
        assert other_right, name
        assert said, name
        assert said == other_said, name
        assert all("It was removed, and nothing was computed from it" in text for text in said)
        rank = 1 if "rank 1" in name else 0
        assert all(f"rank {rank}: " in text for text in said), name
        if "a bit of rank 1's shard" in name:
            assert all("rank 1: the checksum of __1_0.distcp is" in text for text in said)


def assert_other_worlds(groups: list[list[str]]) -> None:
    sizes = ["processes: 2, now none", "processes: 2, now 3", "processes: none, now 2", "over [0, 1]"]
    for texts, named in zip(groups, sizes, strict=True):
        for text in texts:
            assert text.startswith("RunDirectoryError"), text
            assert "is another one" in text
            assert named in text


def assert_errors(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        for name, error, part in [
            ("another directory", "RunDirectoryError", "of rank 1 is not the directory that rank 0 has made"),
            ("no directory", "RunDirectoryError", "cannot be used: Not a directory"),
            ("locked", "RunDirectoryError", "is in use by process"),
            ("full at rank 1", "StoreError", "No space left on device. The run is as it was last saved"),
            ("full at rank 1, in its shard", "StoreError", "No space left on device. The run is as it was last saved"),
            ("manifest", "RunDirectoryError", "manifest.json is damaged"),
            ("a signal", "SystemExit", "143"),
        ]:
            assert found[name].startswith(error), f"rank {rank}, {name}: {found[name]}"
            assert part in found[name], f"rank {rank}, {name}: {found[name]}"
        assert found["parts"] == []
        assert found["goes on"]
        assert 18 <= found["reads"] == ranks[0]["reads"] <= 18 + 5
    assert ranks[0]["loops of their own"] != ranks[1]["loops of their own"]


def assert_sizes(found: list[Any]) -> None:
    ranks, alone = found
    for kind in ("carry", "adjoint", "final"):
        for rank in ranks:
            assert 0.4 < rank[kind] / alone[kind] <= SHARE, (kind, rank, alone)


def test_a_rank_is_killed_at_random_moments(tmp_path: Path) -> None:
    found = json.loads(ran(PROGRAM, "kills", str(tmp_path), "sharded", "1", "3", quiet=True).stdout)
    assert found["kills"]["loop"] >= 1
    assert found["kills"]["backward"] >= 1
    assert found["not_the_same_bits"] == 0
    assert found["slowest_end"] < rank_survivor.GONE


def test_torchrun_starts_again_what_a_rank_has_died_of(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    ran(*torchrun, PROGRAM, "elastic", str(tmp_path), "data-parallel", "8,24")
    phases = [(tmp_path / f"killed-{start}").read_text() for start in range(2)]
    assert phases == ["loop", "backward"]
    assert [(tmp_path / f"result-{rank}").read_text() for rank in range(2)] == ["True", "True"]
    assert not (tmp_path / "run").exists()
