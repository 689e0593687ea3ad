"""How transfer is measured, on cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest

from agents.meta_dataset import Studied
from agents.transfer import best_on_average, held_out, normalized_regret, transfer_order
from agents.warm_start import WarmStart
from inner_models.models import ModelSpec
from inner_models.tasks import Task
from tests.fabricated import runs

NAMES = ("wine", "breast-cancer", "diabetes", "iris")


def studied(number: int, *ends: float) -> Studied:
    task = Task(NAMES[number % 4], ModelSpec("mlp", 8, 1))
    return Studied(task, {"place": float(number)}, runs(*ends), runs(1.0, 1.0))


def test_the_order_of_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """The farther a task, the worse its best trial on the target: 1; the other way around: -1; all alike: 0."""
    monkeypatch.setattr("agents.warm_start.meta_features", lambda task: {"place": 0.0})
    table = [studied(number, *(0.5 if trial == number else 1.0 for trial in range(3))) for number in range(3)]
    start = WarmStart.fit(table, "euclidean", 1)
    for ends, expected in (((0.5, 0.7, 0.9), 1), ((0.9, 0.7, 0.5), -1), ((0.7, 0.7, 0.7), 0)):
        assert transfer_order(start, studied(3, *ends), table) == pytest.approx(expected)


def test_folds_share_no_data_set() -> None:
    table = [studied(number, 0.5, 1.0) for number in range(10)]
    split = held_out(table, 3)
    assert sorted(id(one) for _, out in split for one in out) == sorted(map(id, table))
    for rest, out in split:
        assert len(rest) + len(out) == 10
        assert not {one.task.dataset for one in rest} & {one.task.dataset for one in out}


def test_normalized_regret() -> None:
    trials = np.array([-1.0, 0.0, 4.0])
    assert [normalized_regret(value, trials) for value in (-1.0, 1.0, 3.0, -2.0)] == pytest.approx([0, 1, 2, -0.5])


def test_the_best_on_average() -> None:
    table = [studied(0, 0.9, 0.8), studied(1, 0.9, 0.8), studied(2, 0.1, 1.2)]
    assert best_on_average("adamw", table) == 0
    assert best_on_average("adamw", table[:2]) == 1
