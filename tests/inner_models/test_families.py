"""Task families: what their members are, and that all of them can be trained on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from inner_models import datasets
from inner_models.datasets import DatasetError, load_dataset
from inner_models.families import LEAST_ROWS, family
from inner_models.models import build_model
from inner_models.sub_datasets import Sampling, parent_of
from inner_models.tasks import DEFAULT_SPECS, Task, prepare


def sampling(task: Task) -> Sampling:
    return Sampling.parse(task.dataset.removeprefix(f"{parent_of(task.dataset)}:"))


@pytest.mark.parametrize("kind", ["classification", "regression", "embedding"])
@pytest.mark.parametrize("parent", ["digits", "breast-cancer", "diabetes", "waveforms", "addition-sequence"])
def test_members_can_be_trained_on(parent: str, kind: Any) -> None:
    whole, tasks = load_dataset(parent), family(parent, kind, 4, horizon=7)
    assert len({sampling(task).seed for task in tasks}) == 4
    assert tasks == family(parent, kind, 4, horizon=7)
    assert not set(tasks) & set(family(parent, kind, 4, seed=1, horizon=7))
    for task in tasks:
        assert (parent_of(task.dataset), task.horizon) == (parent, 7)
        data, taken = prepare(task, with_test=True), sampling(task)
        build_model(task.model, data.dataset)
        assert data.loss == ("cross_entropy" if kind == "classification" else "mse")
        assert taken.predict == (1 if kind == "regression" and whole.target == "classification" else None)
        if kind == "embedding":
            assert task.model.width // 8 == min(max(2, math.prod(data.dataset.input_shape) // 4), 8)
        else:
            assert task.model == DEFAULT_SPECS["gru" if whole.modality == "sequence" else "mlp"]


def test_options_spread_over_their_ranges() -> None:
    taken = [sampling(task) for task in family("digits", "classification", 40)]
    assert {one.classes for one in taken} == set(range(2, 11))
    assert {one.features for one in taken} == {4, 5, 6, 7, 8}
    assert {sampling(task).features for task in family("wine", "regression", 40)} == set(range(6, 13))
    assert {sampling(task).classes for task in family("diabetes", "classification", 40)} == {2, 3, 4, 5}
    assert {sampling(task).classes for task in family("diabetes", "embedding", 4)} == {None}
    steps = {sampling(task).steps for task in family("waveforms", "embedding", 60)}
    assert (min(filter(None, steps)), max(filter(None, steps))) == (16, 32)


def test_rows_are_log_uniform_and_enough_for_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def uneven(rng: np.random.Generator) -> datasets._Source:
        return datasets._Source(rng.normal(size=(5000, 4)).astype(np.float32), (np.arange(5000) < 25).astype(np.int64))

    monkeypatch.setitem(datasets._REGISTRY, "uneven", datasets._Spec("table", uneven))
    rows = [sampling(task).rows or 0 for task in family("uneven", "classification", 12)]
    assert min(rows) >= 2 * 5000 / 5 > LEAST_ROWS  # validation has five rows of the rare class
    rows = [sampling(task).rows or 0 for task in family("friedman", "regression", 60)]
    assert LEAST_ROWS <= min(rows) < 350
    assert 1750 < max(rows) <= 2000
    assert np.median(rows) == pytest.approx(math.sqrt(LEAST_ROWS * 2000), rel=0.2)
    assert {sampling(task).rows for task in family("iris", "regression", 3)} == {150}  # all


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits", "xyz", 3), "unknown kind of family 'xyz'; known: classification, regression, embedding"),
        (("digits", "embeding", 3), "did you mean 'embedding'"),
        (("digits", "regression", 0), "a family has at least 1 member, not 0"),
        (("markov-text-0", "regression", 2), "'markov-text-0' is text, without features to choose or predict: take a"),
        (("digitz", "regression", 2), "unknown data set 'digitz'; did you mean 'digits'"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        family(*arguments)
    assert isinstance(error.value, DatasetError) == arguments[0].startswith(("markov", "digitz"))
