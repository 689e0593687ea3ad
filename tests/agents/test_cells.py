"""Cells: that none is computed twice, and what befalls an evaluation that is cut short."""

from __future__ import annotations

import json
import os
import platform
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.application import Run, train, train_cohort
from agents.cells import Cell, Store, describe, run_cells
from agents.controllers import WithPolicy
from agents.population_based import PopulationBased
from agents.provenance import provenance
from agents.schedules import Constant, Cosine, OneCycle
from agents.searches import Searched
from inner_models.models import ModelSpec
from inner_models.tasks import Task
from tests.faults import writers
from tests.tiny import random_policy

TASK = Task("digits", ModelSpec("mlp", 8, 1), horizon=2, interval_examples=32, train_rows=64, eval_rows=32)
OTHER = replace(TASK, dataset="wine", optimizer="sgd")
METHODS = [Constant(), Cosine(), OneCycle(), WithPolicy(random_policy())]
CELLS = [Cell(task, method, (0, 1)) for task in (TASK, OTHER) for method in METHODS]


def results(cells: list[Cell], store: Store) -> list[list[dict[str, Any]]]:
    """Everything but the time it took."""
    return [[{**result.to_dict(), "seconds": 0} for result in store.load(cell)] for cell in cells]


def test_a_cell_holds_its_runs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run_cells(CELLS[:4], store, workers=1)
    for cell in CELLS[:4]:
        runs: list[Any] = list(store.load(cell))
        if isinstance(cell.method, OneCycle):
            expected = [train(TASK, cell.method, seed) for seed in cell.seeds]
        else:
            expected = train_cohort(TASK, cell.method, cell.seeds)
        assert runs == [replace(run, seconds=found.seconds) for run, found in zip(expected, runs, strict=True)]


def test_a_search_comes_back_as_one(tmp_path: Path) -> None:
    cell, store = Cell(TASK, PopulationBased(2), (0,)), Store(tmp_path)
    run_cells([cell], store, workers=1)
    (found,) = store.load(cell)
    assert isinstance(found, Searched)
    assert found.cost == [2.0]


def test_nothing_is_computed_twice(tmp_path: Path, computed: list[Cell]) -> None:
    store, lines = Store(tmp_path), list[tuple[float, float, str]]()
    twins = [replace(cell) for cell in CELLS[:2]]
    run_cells([*CELLS[:3], *twins], store, workers=1)
    assert len(computed) == 3
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    run_cells(CELLS, store, workers=1, report=lambda *line: lines.append(line))
    assert len(computed) == len(CELLS)
    assert len({cell.key for cell in computed}) == len(CELLS)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name in before} == before
    assert lines[0][2] == f"3 of {len(CELLS)} cells were there"
    assert lines[0][0] == pytest.approx(sum(cell.cost for cell in CELLS[:3]))
    assert lines[-1][0] == pytest.approx(lines[-1][1])
    assert len(lines) == 1 + len(CELLS) - 3
    run_cells(CELLS, Store(tmp_path), workers=1)
    assert len(computed) == len(CELLS)


@pytest.mark.parametrize("broken", ["report", "method"])
def test_an_interrupted_evaluation_goes_on(
    broken: str, tmp_path: Path, computed: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)

    def interrupt(*_: Any) -> Any:
        if broken == "method" or len(computed) == 2:
            raise KeyboardInterrupt

    costliest = max(CELLS, key=lambda cell: cell.cost)
    with monkeypatch.context() as patch:
        if broken == "method":
            patch.setattr(Constant, "attach", interrupt)
        report = interrupt if broken == "report" else lambda *_: None
        with pytest.raises(KeyboardInterrupt):
            run_cells(CELLS, store, workers=1, report=report)
    there = [cell for cell in CELLS if cell in store]
    assert costliest in there
    assert 0 < len(there) < len(CELLS)
    assert len(list(tmp_path.iterdir())) == len(there)  # and no half-written files
    computed.clear()
    run_cells(CELLS, store, workers=1)
    assert len(computed) == len(CELLS) - len(there)
    assert all(cell in store for cell in CELLS)


@pytest.mark.parametrize("text", ["", '{"results": [', "[]", '{"results": [{"seed": 0}]}', '{"results": null}', "\xff"])
def test_a_damaged_cell(text: str, tmp_path: Path, computed: list[Cell]) -> None:
    cell, store = CELLS[0], Store(tmp_path)
    path = store.path(cell)
    path.write_bytes(text.encode("latin-1"))
    run_cells([cell], store, workers=1)
    with pytest.raises(ValueError, match=r"is damaged .*; remove it, and it will be computed anew") as caught:
        store.load(cell)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == text.encode("latin-1")
    assert not computed
    path.unlink()
    run_cells([cell], store, workers=1)
    assert len(store.load(cell)) == 2


def test_two_workers_do_the_same_as_one(tmp_path: Path) -> None:
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    run_cells(CELLS, one, workers=1)
    run_cells(CELLS, two, workers=2)
    assert results(CELLS, one) == results(CELLS, two)
    runs = [result for cell in CELLS for result in one.load(cell)]
    assert all(isinstance(run, Run) for run in runs)
    assert len({result.val_loss[-1] for result in runs if isinstance(result, Run)}) == len(runs)


def test_a_file_says_what_and_with_what_but_not_where(tmp_path: Path) -> None:
    cell, store = CELLS[0], Store(tmp_path)
    run_cells([cell], store, workers=1)
    text = store.path(cell).read_text()
    record = json.loads(text)
    assert record["task"] == describe(TASK)
    assert record["method"] == {"Constant": {"values": "default"}}
    assert record["provenance"] == provenance("cpu")
    assert record["provenance"].keys() == {"device", "processor", "gpu", "python", "torch", "numpy", "scipy"}
    assert record["provenance"]["python"] == platform.python_version()
    for secret in (socket.gethostname(), platform.node(), str(tmp_path), str(Path.cwd()), str(Path.home())):
        assert len(secret) < 3 or secret not in text
    assert os.sep not in store.path(cell).name


def test_ten_processes_write_at_the_same_time(tmp_path: Path) -> None:
    assert writers.records(50, tmp_path).failures == ()
