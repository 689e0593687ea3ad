from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from inner_models.datasets import SHARED_ROWS, dataset_names
from inner_models.models import build_model
from inner_models.splits import (
    META_TEST,
    META_TRAIN,
    META_TRAIN_SMALL,
    META_VALIDATION,
    META_VALIDATION_SMALL,
    datasets_of,
)
from inner_models.tasks import Task, prepare

TRAIN = datasets_of(META_TRAIN) | datasets_of(META_TRAIN_SMALL)
VALIDATION = datasets_of(META_VALIDATION) | datasets_of(META_VALIDATION_SMALL)
TEST = datasets_of(META_TEST)


def test_splits_are_disjoint_in_data_sets() -> None:
    for one, other in combinations((TRAIN, VALIDATION, TEST), 2):
        assert not one & other
    assert set(dataset_names()) >= TRAIN | VALIDATION | TEST


def test_data_sets_that_share_rows_stay_on_one_side() -> None:
    for shared in SHARED_ROWS:
        assert sum(bool(shared & split) for split in (TRAIN, VALIDATION, TEST)) == 1


@pytest.mark.parametrize("task", [*META_VALIDATION, *META_VALIDATION_SMALL], ids=lambda task: task.name)
def test_validation_tasks_can_be_built(task: Task) -> None:
    build_model(task.model, prepare(task).dataset)


@pytest.mark.parametrize("task", [task for task in META_TEST if "fashion" not in task.name], ids=lambda task: task.name)
def test_test_tasks_can_be_built(task: Task) -> None:
    build_model(task.model, prepare(task).dataset)


def test_sampled_tasks_can_be_built() -> None:
    rng = np.random.default_rng(0)
    for distribution in (META_TRAIN, META_TRAIN_SMALL):
        for _ in range(60):
            task = distribution.sample(rng)
            build_model(task.model, prepare(task).dataset)
