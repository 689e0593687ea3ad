"""A run over two processes: every rank makes the same decisions, whatever it measured itself."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.page import batches, script
from tests.recipes.ranks import BROKEN, ROWS

ROOT = Path(__file__).parents[2]
SHARE = ROWS // 2 + 1
"""A rank's rows: half of an odd number, of which one is drawn twice."""

Seen = dict[str, dict[str, Any]]

# Loopback and files are all that the processes need to meet.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("ranks")
    commands = [[sys.executable, "-m", "tests.recipes.ranks", str(rank), str(folder)] for rank in (0, 1)]
    started = [subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT) for command in commands]
    try:
        assert [process.wait(120) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["ordinary", "broken", "resumed", "held", "compiled", "moving"])
def test_all_ranks_do_the_same(ranks: list[Seen], name: str) -> None:
    one, other = (rank[name] for rank in ranks)
    assert all(a != b for a, b in zip(one["told"], other["told"], strict=True))
    assert str(one["history"]) == str(other["history"])  # NaN is no equal of NaN
    assert (one["final"], one["weights"]) == (other["final"], other["weights"])
    assert one["finite"]


@pytest.mark.parametrize("name", ["ordinary", "held", "compiled"])
def test_what_is_decided_on_is_the_mean(ranks: list[Seen], name: str) -> None:
    one, other = (rank[name] for rank in ranks)
    for epoch in range(1, 8):
        mean = (one["told"][epoch - 1] + other["told"][epoch - 1]) / 2
        assert one["history"][epoch]["signals"]["train_loss"] == pytest.approx(mean)
        assert one["history"][epoch]["signals"]["val_loss"] < 2.3  # which rank 0 alone has


def test_the_batch_size_is_that_of_all_ranks(ranks: list[Seen]) -> None:
    sizes = [int(entry["hyperparameters"]["batch_size"]) for entry in ranks[0]["moving"]["history"]]
    assert len(set(sizes)) > 1
    for rank in ranks:
        assert rank["moving"]["rows"] == [rows for size in sizes for rows in batches(SHARE, size // 2)]


@pytest.mark.parametrize("name", ["held", "compiled"])
def test_a_batch_size_that_stays_is_that_of_all_ranks(ranks: list[Seen], name: str) -> None:
    assert [rank[name]["final"]["batch_size"] for rank in ranks] == [64, 64]  # 32 on each


def test_told_once_when_no_model_is_distributed(ranks: list[Seen]) -> None:
    message = "2 processes, but no DistributedDataParallel in the model"
    for rank in ranks:
        assert [sum(message in line for line in lines) for lines in rank["warned"]] == [0, 1, 1, 1]


def test_the_guard_acts_on_every_rank(ranks: list[Seen]) -> None:
    assert math.isnan(ranks[1]["broken"]["told"][BROKEN])
    assert math.isfinite(ranks[0]["broken"]["told"][BROKEN])
    for rank in ranks:
        acted = [entry["guard"] is not None for entry in rank["broken"]["history"]]
        assert acted == [epoch == BROKEN + 1 for epoch in range(8)]


def test_resumed(ranks: list[Seen]) -> None:
    for rank in ranks:
        assert str(rank["resumed"]["history"]) == str(rank["ordinary"]["history"])
        assert rank["resumed"]["weights"] == rank["ordinary"]["weights"]


def test_the_recipe(tmp_path: Path) -> None:
    """As the page has it, but shorter: started by torchrun, which finds a free port by itself."""
    program = tmp_path / "train.py"
    shorter = script("distributed").replace("EPOCHS = 8", "EPOCHS = 3")
    program.write_text(shorter + "\nimport os\nos._exit(0)")  # as in `ranks`
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = sorted(re.findall(r"rank (\d) (epoch \d lr \S+ batch size \d+)", done.stdout))  # in any order, mixed up
    assert len(lines) == 6
    assert [line for rank, line in lines if rank == "0"] == [line for rank, line in lines if rank == "1"]
