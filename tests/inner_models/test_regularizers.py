"""Augmentation and label smoothing in the engine are those of the reference; runs that lack them are as ever."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from inner_models import batched_training, masks
from inner_models.augmentation import Augment
from inner_models.batched_training import BatchedTraining
from inner_models.signals import SIGNALS
from inner_models.tasks import OptimizerName, Task, prepare
from inner_models.training import Training
from tests.inner_models import test_batched_training as plain
from tests.inner_models.test_batched_training import SEEDS, TASKS, assert_same

VALUES = plain.VALUES | {"augmentation": np.array([0.5, 0.05, 0.2]), "label_smoothing": np.array([0.1, 0.3, 0.01])}


def make_task(dataset: str, kind: str, optimizer: OptimizerName = "adamw") -> Task:
    task = plain.make_task(dataset, kind, optimizer, "layer")
    return replace(task, regularizers=("augmentation", "label_smoothing"))


def advance(run: Training, replica: int) -> dict[str, float]:
    for layer in run.model.modules():
        if isinstance(layer, Augment):
            layer.strength = VALUES["augmentation"][replica]
    if isinstance(run.criterion, torch.nn.CrossEntropyLoss):
        run.criterion.label_smoothing = VALUES["label_smoothing"][replica]
    return plain.advance(run, replica)


def assert_twins(task: Task, device: str = "cpu", intervals: int = 2) -> BatchedTraining:
    engine = BatchedTraining(task, SEEDS, device=device, dtype=torch.float64)
    runs = [Training(task, seed, device=device, dtype=torch.float64) for seed in SEEDS]
    for _ in range(intervals):
        signals = engine.advance(VALUES)
        for replica, run in enumerate(runs):
            assert_same(signals, replica, advance(run, replica))
    return engine


@pytest.mark.parametrize(("dataset", "kind"), TASKS)
def test_engine_equals_reference(dataset: str, kind: str) -> None:
    assert_twins(make_task(dataset, kind))


def test_engine_equals_reference_with_sgd() -> None:
    assert_twins(make_task("digits", "cnn", "sgd"))


@plain.CUDA
@pytest.mark.parametrize(("dataset", "kind"), TASKS)
def test_engine_equals_reference_on_cuda(dataset: str, kind: str) -> None:
    engine = assert_twins(make_task(dataset, kind), "cuda", intervals=6)
    assert all(program.captured for program in plain.programs_of(engine))


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize(("dataset", "kind"), TASKS)
def test_the_calls_for_a_gpu_equal_the_reference(dataset: str, kind: str) -> None:
    assert_twins(make_task(dataset, kind))


@pytest.mark.parametrize(("dataset", "kind"), [("digits", "cnn"), ("diabetes", "mlp"), ("markov-text-0", "gru")])
def test_each_moves_the_run(dataset: str, kind: str) -> None:
    """What the twins compare depends on the strength."""
    task = make_task(dataset, kind)
    names = prepare(task).regularizers
    first = BatchedTraining(task, SEEDS).advance(VALUES)["val_loss"]
    for name in names:
        other = BatchedTraining(task, SEEDS).advance(VALUES | {name: VALUES[name] + 0.1})["val_loss"]
        assert (other != first).all(), name
    assert ("label_smoothing" in names) == (dataset != "diabetes")


@pytest.mark.parametrize(("dataset", "kind"), TASKS)
def test_strengths_of_zero_are_a_run_without(dataset: str, kind: str) -> None:
    """To the last bit, dropout included: augmentation has a stream of its own."""
    task = make_task(dataset, kind)
    without, zero = BatchedTraining(replace(task, regularizers=()), SEEDS), BatchedTraining(task, SEEDS)
    off = {name: np.zeros(3) for name in ("augmentation", "label_smoothing")}
    for _ in range(2):
        a, b = without.advance(plain.VALUES), zero.advance(VALUES | off)
        for name in SIGNALS:
            np.testing.assert_array_equal(a[name], b[name])


# The small buffers are refilled within an interval, and a restart falls into the middle of one.
@pytest.mark.parametrize("refill_bytes", [1 << 24, 7 * 3 * 256])
@pytest.mark.parametrize(("dataset", "kind"), [("digits", "mlp"), ("markov-text-0", "gru"), ("waveforms", "mlp")])
def test_restarted_replica_is_a_fresh_run(
    dataset: str, kind: str, refill_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "_REFILL_BYTES", refill_bytes)
    task = make_task(dataset, kind)
    engine = BatchedTraining(task, SEEDS, dtype=torch.float64)
    runs = [Training(task, seed, dtype=torch.float64) for seed in SEEDS]
    for interval in range(2):
        if interval == 1:
            engine.restart(1, 99)
            runs[1] = Training(task, 99, dtype=torch.float64)
        signals = engine.advance(VALUES)
        for replica, run in enumerate(runs):
            assert_same(signals, replica, advance(run, replica))


@pytest.mark.parametrize(("dataset", "kind"), [("digits", "mlp"), ("digits", "cnn"), ("markov-text-0", "transformer")])
def test_blocks_and_strides_change_nothing(dataset: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of two replicas and one, and strides of one replica, beside all three at once."""
    task = make_task(dataset, kind)
    together = BatchedTraining(task, SEEDS, dtype=torch.float64)
    monkeypatch.setattr(batched_training, "_STATE_BYTES", 2 * 4 * 8 * together.parameters)
    monkeypatch.setattr(batched_training, "_ACTIVATION_BYTES", 1)
    divided = BatchedTraining(task, SEEDS, dtype=torch.float64)
    for _ in range(2):
        a, b = together.advance(VALUES), divided.advance(VALUES)
        for name in SIGNALS:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    ("dataset", "kind", "fitting"),
    [
        ("digits", "mlp", ("augmentation", "label_smoothing")),
        ("digits", "autoencoder", ()),
        ("diabetes", "mlp", ("augmentation",)),
        ("markov-text-0", "gru", ("augmentation", "label_smoothing")),
    ],
)
def test_a_task_has_those_that_fit(dataset: str, kind: str, fitting: tuple[str, ...]) -> None:
    task = make_task(dataset, kind)
    assert prepare(task).regularizers == fitting
    assert BatchedTraining(task, SEEDS).hyperparameters[4:] == fitting
    assert prepare(replace(task, regularizers=())).regularizers == ()


def test_an_unknown_regularizer() -> None:
    with pytest.raises(ValueError, match="unknown regularizer 'smoothing'; did you mean 'label_smoothing'"):
        Task.named("digits/mlp", regularizers=("smoothing",))
