"""Meta-features: finite and comparable on every kind of task, what they say, and that they leave everything alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from agents.meta_features import INTERVALS, LANDMARK_COST, LR_FACTORS, descriptors, landmarks, meta_features
from inner_models.models import ModelKind
from inner_models.splits import META_TRAIN
from inner_models.tasks import Task, prepare

KINDS = ("wine/linear", "pima/mlp", "digits/cnn", "gun-point/gru", "waveforms/transformer", "ames/autoencoder")
OTHERS = ("diabetes/mlp", "markov-text-0/gru")


@pytest.mark.parametrize("name", [*KINDS, *OTHERS])
def test_every_kind_of_task_has_the_same_finite_features(name: str) -> None:
    task = Task.named(name, horizon=4, interval_examples=64, eval_rows=64)
    found = meta_features(task)
    assert list(found) == list(meta_features(Task.named("iris/mlp", horizon=4, interval_examples=64)))
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values()), found
    kind = name.rpartition("/")[2]
    assert {known: found[known] for known in get_args(ModelKind)} == {
        known: float(known == kind) for known in get_args(ModelKind)
    }


def test_sizes_are_those_of_the_run() -> None:
    task = Task.named("pima/mlp", horizon=8, interval_examples=160, train_rows=100)
    found = descriptors(task)
    assert math.exp(found["rows"]) == pytest.approx(100)
    assert math.exp(found["examples"]) == pytest.approx(8 * 160)
    assert math.exp(found["epochs"]) == pytest.approx(8 * 160 / 100)
    assert math.exp(found["inputs"]) == pytest.approx(8)
    assert math.exp(found["outputs"]) == pytest.approx(2)
    assert math.exp(found["parameters"]) == pytest.approx(8 * 64 + 64 + 64 * 64 + 64 + 64 * 2 + 2)
    assert found["has_dropout"] == 1 == 1 - descriptors(Task.named("pima/linear"))["has_dropout"]


def test_moments_are_of_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task.named("pima/mlp")
    data = prepare(task)
    columns = data.dataset.train.inputs.double().numpy()
    correlations = np.corrcoef(columns, rowvar=False)
    off_diagonal = correlations[~np.eye(len(correlations), dtype=bool)]
    found = descriptors(task)
    assert found["correlation"] == pytest.approx(math.sqrt((off_diagonal**2).mean()), rel=1e-6)
    spectrum = np.linalg.eigvalsh(correlations) / len(correlations)
    assert found["dimension"] == pytest.approx(np.exp(-(spectrum * np.log(spectrum)).sum()) / 8, rel=1e-6)
    shares = np.bincount(data.dataset.train.targets.numpy()) / len(columns)
    assert found["balance"] == pytest.approx(-(shares * np.log2(shares)).sum())


def test_landmarks_tell_what_can_be_learned_from_what_cannot() -> None:
    """Labels that mean nothing fall little, whatever the learning rate; and a rate too high shows."""
    task = Task.named("banana/mlp", horizon=16, interval_examples=2048, eval_rows=512)
    clean, noise = landmarks(task), landmarks(replace(task, label_noise=1.0))
    assert clean["val_2_lr_x1"] < -0.1 < noise["val_2_lr_x1"]
    assert clean["val_2_lr_x1"] < clean["val_2_lr_x0.1"]
    assert len(clean) == 2 * INTERVALS * len(LR_FACTORS)
    assert 0 < LANDMARK_COST < 0.25


def test_landmarks_that_diverge_are_told_as_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.meta_features.LR_FACTORS", (1.0, 1e18))
    found = landmarks(Task.named("diabetes/linear", optimizer="sgd"))
    assert found["val_2_lr_x1e+18"] == 2.0
    assert abs(found["val_2_lr_x1"]) < 2.0


def test_nothing_of_the_callers_is_touched() -> None:
    before = torch.random.get_rng_state()
    task = Task.named("wine/mlp", horizon=3, interval_examples=32, seed=3)
    first = meta_features(task)
    meta_features.cache_clear()
    assert meta_features(task) == first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tasks_of_one_data_set_are_nearer_than_others() -> None:
    """A sanity check of the whole: descriptors of subsets of a data set lie closer together than those of others."""
    names = [f"{name}/mlp" for name in ("wine", "phoneme", "ring", "ionosphere")]
    rows = []
    for name in names:
        for seed in (0, 1):
            task = Task.named(name, horizon=4, interval_examples=64, train_rows=96, seed=seed)
            rows.append(list(descriptors(task).values()))
    table = np.array(rows)
    std = table.std(axis=0)
    table = (table - table.mean(axis=0)) / np.where(std > 0, std, 1)
    distances = np.linalg.norm(table[:, None] - table[None], axis=2) + np.diag(np.full(len(table), np.inf))
    assert [int(index) for index in distances.argmin(axis=1)] == [1, 0, 3, 2, 5, 4, 7, 6]


def test_a_task_of_meta_train_has_features() -> None:
    assert meta_features(replace(META_TRAIN.sample(np.random.default_rng(0)), horizon=2, interval_examples=32))
