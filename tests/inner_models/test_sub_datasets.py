"""Sub-data sets: what is taken, that rows stay in their splits, and errors that name the option."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from inner_models.datasets import Dataset, DatasetError, Split, check_dataset_name, load_dataset
from inner_models.models import build_model
from inner_models.splits import datasets_of
from inner_models.sub_datasets import Array, Sampling, parent_of
from inner_models.tasks import Task, prepare


def numbered(rows: int, classes: int = 5) -> tuple[Array, Array, Array]:
    """Inputs that are row numbers, uneven classes, and parts of 60/20/20 in mixed order."""
    rng = np.random.default_rng(0)
    targets = np.sort(rng.integers(classes, size=(rows, 2)).max(axis=1))
    return np.arange(float(rows))[:, None], rng.permutation(targets), rng.permutation(np.arange(rows) % 5).clip(2) - 2


def splits(dataset: Dataset) -> tuple[Split, Split, Split]:
    assert dataset.test is not None
    return dataset.train, dataset.val, dataset.test


def pixels(split: Split) -> set[bytes]:
    """Rows of digits as they were before any standardization, which is one scale and shift for all of them."""
    low, high = split.inputs.min(), split.inputs.max()
    return {row.numpy().tobytes() for row in ((split.inputs - low) / (high - low) * 16).round().to(torch.int8)}


@pytest.mark.parametrize(
    "options", ["rows=200", "rows=151,seed=1", "classes=3", "classes=4,rows=97", "classes=2,predict=1,rows=60"]
)
def test_a_row_stays_in_its_split_and_the_rows_in_their_order(options: str) -> None:
    inputs, targets, parts = numbered(500)
    sampling = Sampling.parse(options)
    sample, _, where = sampling.apply("table", np.hstack([inputs, inputs]), targets, parts)
    assert (np.diff(sample[:, 0]) > 0).all()
    assert (parts[sample[:, 0].astype(int)] == where).all()
    assert sampling.rows in (None, len(sample))
    there = np.bincount(parts[np.isin(targets, np.unique(targets[sample[:, 0].astype(int)]))])
    assert np.abs(np.bincount(where) - len(sample) * there / there.sum()).max() <= 1


@pytest.mark.parametrize("seed", [0, 1])
def test_no_test_row_of_a_set_is_a_training_row_of_its_sample(seed: int) -> None:
    whole, sample = (splits(load_dataset(name, seed=seed)) for name in ("digits", "digits:rows=500,seed=7"))
    assert [len(split) for split in sample] == [300, 100, 100]
    for one, other in zip(whole, sample, strict=True):
        assert pixels(other) < pixels(one)
    assert not pixels(sample[0]) & (pixels(whole[1]) | pixels(whole[2]))


def test_classes_keep_their_shares_and_order() -> None:
    inputs, targets, parts = numbered(1000)
    sample, classes, where = Sampling(rows=250).apply("table", inputs, targets, parts)
    for part in range(3):
        there, taken = np.bincount(targets[parts == part]), np.bincount(classes[where == part])
        assert np.abs(taken - there * (where == part).sum() / (parts == part).sum()).max() < 1
    sample, classes, _ = Sampling(classes=3, seed=2).apply("table", inputs, targets, parts)
    old = targets[sample[:, 0].astype(int)]
    assert (np.unique(old)[classes] == old).all()
    assert len(np.unique(old)) == 3
    assert len(old) == np.isin(targets, old).sum()


def test_every_option_has_its_own_stream() -> None:
    inputs, targets, parts = numbered(1000, 9)

    def chosen(**options: int) -> set[int]:
        sample, _, _ = Sampling(**options).apply("table", np.hstack([inputs] * 3), targets, parts)
        return set(targets[sample[:, 0].astype(int)].tolist())

    assert chosen(classes=4) == chosen(classes=4, rows=300) == chosen(classes=4, features=2) < chosen(classes=6)
    assert len({frozenset(chosen(classes=4, seed=seed)) for seed in range(8)}) > 1
    many = np.tile(np.arange(30.0), (1000, 1))
    few, more, other = (
        Sampling(features=features, rows=rows, seed=seed).apply("table", many, targets, parts)[0][0].tolist()
        for features, rows, seed in ((5, 900, 0), (9, None, 0), (9, None, 1))
    )
    assert few == sorted(few)
    assert set(few) < set(more) != set(other)


def test_features_and_steps() -> None:
    _, targets, parts = numbered(300)
    places = np.arange(2 * 7 * 8.0).reshape(2, 7, 8)
    image = np.broadcast_to(places, (300, 2, 7, 8))
    regions = [Sampling(features=3, seed=seed).apply("image", image, targets, parts)[0][0] for seed in range(6)]
    for region in regions:
        top, left = divmod(int(region[0, 0, 0]), 8)
        assert (region == places[:, top : top + 3, left : left + 3]).all()
    assert len({region[0, 0, 0] // 8 for region in regions}) > 1 < len({region[0, 0, 0] % 8 for region in regions})
    series = np.broadcast_to(places[0], (300, 7, 8))
    window = Sampling(steps=4, features=2).apply("sequence", series, targets, parts)[0][0]
    assert window.shape == (4, 2)
    assert (np.diff(window, axis=0) == 8).all()
    assert (window % 8 == window[:1] % 8).all()
    starts = {Sampling(steps=4, seed=n).apply("sequence", series, targets, parts)[0][0, 0, 0] for n in range(9)}
    assert starts == {0.0, 8.0, 16.0, 24.0}


def test_what_is_predicted_is_not_seen() -> None:
    rng = np.random.default_rng(0)
    _, targets, parts = numbered(300)
    table = rng.normal(size=(300, 6))
    inputs, held, _ = Sampling(predict=2, features=3).apply("table", table, targets, parts)
    columns = [row.tolist() for row in table.T]
    taken, predicted = ([columns.index(row.tolist()) for row in values.T] for values in (inputs, held))
    assert len({*taken, *predicted}) == 5
    image = rng.normal(size=(300, 2, 4, 4))
    inputs, held, _ = Sampling(predict=3).apply("image", image, targets, parts)
    blank = inputs != image
    assert (inputs[blank] == 0).all()
    assert sorted(np.unique(np.flatnonzero(blank) % 32)) == sorted(
        int(np.flatnonzero((image.reshape(300, 32) == column[:, None]).all(axis=0))[0]) for column in held.T
    )
    series = rng.normal(size=(300, 5, 3))
    inputs, held, _ = Sampling(predict=2).apply("sequence", series, targets, parts)
    assert (inputs == series[:, :-1]).all()
    assert all(any((column == series[:, -1, channel]).all() for channel in range(3)) for column in held.T)
    assert held.shape == (300, 2)


def test_only_what_varies_is_predicted() -> None:
    _, targets, parts = numbered(300)
    rng = np.random.default_rng(0)
    rare = np.where(rng.random(300) < 0.4, rng.normal(size=300), 0.0)
    rare_in_training = np.where((parts == 0) & (rng.random(300) < 0.75), 0.0, rng.normal(size=300))
    assert (rare_in_training == 0).mean() < 0.5
    table = np.stack([rare, rng.integers(4, size=300), rare_in_training, rng.normal(size=300)], axis=1)
    for seed in range(5):
        _, held, _ = Sampling(predict=1, seed=seed).apply("table", table, targets, parts)
        assert (held[:, 0] == table[:, 3]).all()
    with pytest.raises(ValueError, match="predict=2, but there are 1 that vary enough: take no more"):
        Sampling(predict=2).apply("table", table, targets, parts)


def test_a_regression_is_cut_into_bins_by_its_training_rows() -> None:
    inputs, _, parts = numbered(500)
    values = np.random.default_rng(0).normal(size=(500, 1))
    values[parts > 0] += 0.5
    _, bins, _ = Sampling(classes=4).apply("table", inputs, values, parts)
    assert np.bincount(bins[parts == 0]).tolist() == [75] * 4
    assert np.bincount(bins[parts > 0])[0] < 40
    assert (np.diff(bins[np.argsort(values[:, 0])]) >= 0).all()
    with pytest.raises(ValueError, match="there are 2: leave them out"):
        Sampling(classes=4).apply("table", inputs, np.hstack([values, values]), parts)
    tied = np.where(values > 0.4, values, 0.0)
    with pytest.raises(ValueError, match="no training row of class"):
        Sampling(classes=4).apply("table", inputs, tied, parts)


def test_a_sample_is_a_data_set() -> None:
    sample = load_dataset("digits:classes=3,features=6,rows=200,seed=1")
    assert sample.name == "digits:classes=3,features=6,rows=200,seed=1"
    assert (sample.modality, sample.target) == ("image", "classification")
    assert (sample.input_shape, sample.outputs, sample.procedural) == ((1, 6, 6), 3, False)
    assert abs(float(sample.train.inputs.mean())) < 1e-5
    assert float(sample.train.inputs.std()) == pytest.approx(1, abs=0.01)
    regression = load_dataset("wine:predict=2,features=4")
    assert (regression.target, regression.outputs, regression.input_shape) == ("regression", 2, (4,))
    assert regression.train.targets.mean(0).abs().max() < 1e-5
    assert load_dataset("diabetes:classes=3").outputs == 3
    assert load_dataset("teacher-0:rows=90").procedural
    assert load_dataset("digits:rows=90") is load_dataset("digits:rows=90", seed=0)
    text, whole = load_dataset("pydoc-topics:rows=40"), load_dataset("pydoc-topics")
    assert text.outputs == whole.outputs > max(int(split.inputs.max()) for split in splits(text)) + 1
    assert len(text.train) == 24


def test_tasks_take_it_by_name() -> None:
    task = Task.named("digits:classes=3,rows=200/mlp", train_rows=64)
    assert task.name == "digits:classes=3,rows=200/mlp"
    data = prepare(task)
    assert len(data.dataset.train) == 64
    assert build_model(task.model, data.dataset)[-1].out_features == 3
    assert datasets_of((task, Task.named("wine/mlp"))) == {"digits", "wine"}
    assert parent_of("openml:31") == "openml:31"
    assert parent_of("openml:31:rows=600") == "openml:31"
    check_dataset_name("openml:31:rows=600")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits:clases=5", "'digits:clases=5': unknown option 'clases'; did you mean 'classes'? known: classes, feat"),
        ("digits:classes=11", "'digits:classes=11': classes=11, but there are 10: take no more"),
        ("digits:classes=1", "classes must be at least 2, not 1"),
        ("digits:classes=3,classes=4", "classes is given twice"),
        ("digits:rows=many", "rows must be a whole number, such as rows=5, not 'many'"),
        ("digits:rows=-1", "rows must be a whole number, such as rows=5, not '-1'"),
        ("digits:rows=", "rows must be a whole number, such as rows=5, not ''"),
        ("digits:rows=2", "rows must be at least 3, not 2"),
        ("digits:rows=1798", "rows=1798, but there are 1797: take no more"),
        ("digits:rows=20", "no validation row of class 1 is left: take more rows, fewer classes or another seed"),
        ("diabetes:rows=3", "no validation row is left: take more rows, fewer classes or another seed"),
        ("digits:features=9", "features=9, but there are 8: take no more"),
        ("wine:features=14", "features=14, but there are 13: take no more"),
        ("wine:features=13,predict=1", "features=13, but there are 12: take no more"),
        ("wine:steps=3", "steps is for sequence data, not for table: leave it out"),
        ("iris:predict=4", "predict=4 leaves nothing to predict from: take fewer"),
        ("waveforms:steps=33", "steps=33, but there are 32: take no more"),
        ("waveforms:features=2", "features=2, but there are 1: take no more"),
        ("waveforms:steps=1,predict=1", "predict=1 leaves nothing to predict from: take fewer"),
        ("markov-text-0:features=3", "features is for table, image, sequence data, not for text: leave it out"),
        ("markov-text-0:classes=3", "classes is for table, image, sequence data, not for text: leave it out"),
        ("markov-text-0:predict=1", "predict is for table, image, sequence data, not for text: leave it out"),
        ("digits:rows=300:seed=1", "a sub-data set is named like digits:rows=600,seed=3, with options once"),
        ("digits:classes", "a sub-data set is named like digits:rows=600,seed=3, with options once"),
        ("digitz:rows=300", "unknown data set 'digitz'; did you mean 'digits'?"),
    ],
)  # fmt: skip
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(DatasetError) as error:
        load_dataset(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["digits:clases=5", "digits:classes=1", "digitz:rows=300/mlp", "digits:rows=x"])
def test_a_bad_name_is_told_before_anything_is_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("inner_models.datasets._load", load)
    with pytest.raises(DatasetError):
        Task.named(f"{name}/mlp")
