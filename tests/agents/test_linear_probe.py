"""Linear probes: known scores, the same code from the reference and the engine, and runs that they leave alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from agents import linear_probe
from agents.application import train_cohort
from agents.cells import Cell, _needed, _path
from agents.linear_probe import Probed, code_size, from_snapshot, labelled, probe_code, probe_inputs
from agents.schedules import DEFAULTS, Constant, Cosine
from hpo_env.hyperparameters import CONTROLS
from inner_models.batched_training import BatchedTraining
from inner_models.datasets import load_dataset
from inner_models.models import ModelSpec, encoder
from inner_models.tasks import Task, prepare
from inner_models.training import Training

SPEC = ModelSpec("autoencoder", width=32, depth=2, activation="tanh", normalization="layer")
TASK = Task("digits", SPEC, horizon=2, interval_examples=256, train_rows=200, eval_rows=200, seed=1)
REGRESSION = Task("diabetes", ModelSpec("autoencoder", width=16, depth=1), horizon=2)


def test_the_encoder_is_the_first_half() -> None:
    model = Training(TASK, 0).model.eval()
    inputs = load_dataset("digits").val.inputs[:5]
    half = encoder(model)
    assert half(inputs).shape == (5, 4)
    assert code_size(TASK) == 4
    assert torch.equal(nn.Sequential(*list(model)[len(half) :])(half(inputs)), model(inputs))
    assert isinstance(model[len(half)], nn.Linear)
    assert next(half.parameters()) is next(model.parameters())


@pytest.mark.parametrize("task", [TASK, REGRESSION], ids=["classes", "values"])
def test_labels_are_those_of_the_rows_trained_on(task: Task) -> None:
    data = labelled(replace(task, label_noise=0.5))
    for split in ("train", "val"):
        assert torch.equal(getattr(data, split).inputs, getattr(prepare(task).dataset, split).inputs)
    assert data.test is None
    whole = load_dataset(task.dataset, seed=task.seed)
    assert torch.equal(data.val.targets, whole.val.targets[: task.eval_rows])
    known = {row.numpy().tobytes(): target for row, target in zip(whole.train.inputs, whole.train.targets, strict=True)}
    for row, target in zip(data.train.inputs, data.train.targets, strict=True):
        assert torch.equal(known[row.numpy().tobytes()], target)


def test_known_scores() -> None:
    data = labelled(TASK)
    train, val = (rows.targets[:, None].eq(torch.arange(10)).numpy().astype(float) for rows in (data.train, data.val))
    assert linear_probe._score(data, train, val) == 1.0
    assert linear_probe._score(data, 1e-4 * train - 3, 1e-4 * val - 3) == 1.0  # whatever their scale
    rng = np.random.default_rng(0)
    assert linear_probe._score(data, rng.permutation(train), val) < 0.3
    assert linear_probe._score(data, train, rng.permutation(val)) < 0.3
    values = labelled(REGRESSION)
    train, val = (3 * rows.targets.numpy() + 1 for rows in (values.train, values.val))
    assert linear_probe._score(values, train, val) == pytest.approx(1.0, abs=1e-4)
    lost = np.full_like(train, np.nan)
    lost[::2] = np.inf
    assert linear_probe._score(values, lost, val) == pytest.approx(0.0, abs=0.05)
    assert probe_inputs(TASK) > 0.85 > probe_inputs(TASK, 2) > 0.3
    assert probe_inputs(TASK, 64) == pytest.approx(probe_inputs(TASK), abs=0.05)


def test_reference_and_engine_have_the_same_code() -> None:
    reference, engine = Training(TASK, 3), BatchedTraining(TASK, [8, 3])
    model = from_snapshot(TASK, engine.snapshot(1))
    for name, values in reference.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], values), name
    assert probe_code(TASK, model) == probe_code(TASK, reference.model)
    assert probe_code(TASK, model) != probe_code(TASK, from_snapshot(TASK, engine.snapshot(0)))


def test_probing_leaves_the_model_alone() -> None:
    run = Training(TASK, 0)
    run.model.train()
    for dropout in (module for module in run.model if isinstance(module, nn.Dropout)):
        dropout.p = 0.4
    assert probe_code(TASK, run.model) == probe_code(TASK, run.model)
    assert all(module.training for module in run.model.modules())


def test_probed_runs_are_the_same_runs() -> None:
    plain, probed = (train_cohort(TASK, method, [0, 4]) for method in (Constant(), Probed(Constant())))
    assert [run.val_loss for run in probed] == [run.val_loss for run in plain]
    engine = BatchedTraining(TASK, [0, 4])
    values = {name: np.full(2, getattr(DEFAULTS["adamw"], name)) for name in CONTROLS}
    for _ in range(TASK.horizon):
        engine.advance(values)
    expected = [probe_code(TASK, from_snapshot(TASK, engine.snapshot(run))) for run in range(2)]
    assert [run.notes["probe"] for run in probed] == expected
    assert expected[0] != expected[1]


def test_probes_are_of_autoencoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BatchedTraining, "advance")  # found out before training
    task = replace(TASK, model=ModelSpec("mlp", 8, 1))
    with pytest.raises(ValueError, match="digits/mlp has no code to probe: the model must be an autoencoder"):
        train_cohort(task, Probed(Constant()), [0])


def test_a_cell_knows_what_is_probed_and_its_code() -> None:
    assert Cell(TASK, Probed(Constant()), (0,)).key != Cell(TASK, Probed(Cosine()), (0,)).key
    needed = {path.name for path in _needed(_path(Probed.__module__))}
    assert {"controllers.py", "schedules.py", "policy.py"} <= needed
