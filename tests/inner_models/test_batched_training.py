"""The engine is held to the reference training: same seeds, same hyperparameters, same signals."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from inner_models import batched_training, masks
from inner_models.batched_training import BatchedTraining
from inner_models.models import Activation, ModelSpec, Normalization, build_model
from inner_models.programs import Program, Tape, Workspace
from inner_models.replicated_layers import parameter_count, record
from inner_models.signals import SIGNALS
from inner_models.tasks import OptimizerName, Task, prepare
from inner_models.training import Training

TASKS = [
    ("digits", "linear"),
    ("digits", "mlp"),
    ("digits", "cnn"),
    ("waveforms", "gru"),
    ("waveforms", "transformer"),
    ("markov-text-0", "gru"),
    ("markov-text-0", "transformer"),
    ("digits", "autoencoder"),
    ("diabetes", "mlp"),
]
SEEDS = (5, 6, 7)
VALUES: dict[str, NDArray[np.float64]] = {
    "lr": np.array([1e-2, 1e-3, 3e-2]),
    "batch_size": np.array([16.0, 48.0, 64.0]),
    "weight_decay": np.array([1e-3, 0.1, 1.0]),
    "dropout": np.array([0.1, 0.3, 0.005]),
}


def make_task(
    dataset: str, kind: str, optimizer: OptimizerName = "adamw", normalization: Normalization = "none"
) -> Task:
    # Ten micro-batches an interval: whole and cut batches for sizes 48 and 64, and more examples than the 120 rows.
    spec = ModelSpec(kind, width=16, depth=2, activation="gelu", normalization=normalization)  # type: ignore[arg-type]
    return Task(dataset, spec, optimizer, interval_examples=160, train_rows=120, eval_rows=50)


def advance(run: Training, replica: int, values: dict[str, NDArray[np.float64]] = VALUES) -> dict[str, float]:
    """One interval of a reference run under the hyperparameters of `replica`."""
    decayed, *others = run.optimizer.param_groups
    assert all(group["weight_decay"] == 0 for group in others)
    decayed["weight_decay"] = values["weight_decay"][replica]
    for group in run.optimizer.param_groups:
        group["lr"] = values["lr"][replica]
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = values["dropout"][replica]
    run.batch_sampler.batch_size = int(values["batch_size"][replica])
    return run.advance()


def assert_same(
    engine: dict[str, NDArray[np.float64]], replica: int, reference: dict[str, float], rtol: float = 1e-7
) -> None:
    assert {name: engine[name][replica] for name in SIGNALS} == pytest.approx(reference, rel=rtol, abs=1e-12)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def assert_twins(task: Task, device: str = "cpu", intervals: int = 3) -> BatchedTraining:
    engine = BatchedTraining(task, SEEDS, device=device, dtype=torch.float64)
    runs = [Training(task, seed, device=device, dtype=torch.float64) for seed in SEEDS]
    for _ in range(intervals):
        signals = engine.advance(VALUES)
        for replica, run in enumerate(runs):
            assert_same(signals, replica, advance(run, replica))
    return engine


def programs_of(engine: BatchedTraining) -> list[Program]:
    """All that the engine has recorded."""
    found: list[Program] = []
    for block in engine._blocks:
        found += [program for program, _ in block._programs.values()]
        found += [*block._updates.values(), *(program for _, _, program, _ in block._evaluations.values())]
    return found


@pytest.mark.parametrize("normalization", ["none", "layer"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("dataset", "kind"), TASKS)
def test_engine_equals_reference(
    dataset: str, kind: str, optimizer: OptimizerName, normalization: Normalization
) -> None:
    assert_twins(make_task(dataset, kind, optimizer, normalization))


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_every_activation(kind: str, activation: Activation) -> None:
    task = make_task("digits", kind)
    assert_twins(replace(task, model=replace(task.model, activation=activation)))


@CUDA
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("dataset", "kind"), TASKS)
def test_engine_equals_reference_on_cuda(
    dataset: str, kind: str, optimizer: OptimizerName, caplog: pytest.LogCaptureFixture
) -> None:
    """Long enough that every program is captured and replayed; nothing is warned of."""
    engine = assert_twins(make_task(dataset, kind, optimizer, normalization="layer"), "cuda", intervals=6)
    assert all(program.captured for program in programs_of(engine))
    assert not caplog.records


@CUDA
@pytest.mark.parametrize(("dataset", "kind"), TASKS)
def test_single_precision_on_cuda_is_that_of_the_cpu(dataset: str, kind: str) -> None:
    task = make_task(dataset, kind, normalization="layer")
    on_cpu, on_cuda = (BatchedTraining(task, SEEDS, device=device) for device in ("cpu", "cuda"))
    for _ in range(2):
        expected, found = on_cpu.advance(VALUES), on_cuda.advance(VALUES)
    for name in SIGNALS:
        assert found[name] == pytest.approx(expected[name], rel=2e-2, abs=1e-4), name


@CUDA
def test_graphs_outlive_engines_that_were_captured_before() -> None:
    task = make_task("digits", "mlp")
    lone = BatchedTraining(task, SEEDS, device="cuda", dtype=torch.float64)
    expected = [lone.advance(VALUES) for _ in range(8)]
    first, second = (BatchedTraining(task, SEEDS, device="cuda", dtype=torch.float64) for _ in range(2))
    found = []
    for _ in range(4):
        first.advance(VALUES)
        found.append(second.advance(VALUES))
    del first, lone
    gc.collect()
    torch.cuda.empty_cache()
    found += [second.advance(VALUES) for _ in range(4)]
    for one, other in zip(expected, found, strict=True):
        for name in SIGNALS:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize(("dataset", "kind"), TASKS)
def test_the_calls_for_a_gpu_equal_the_reference(dataset: str, kind: str) -> None:
    assert_twins(make_task(dataset, kind, normalization="layer"))


def test_replicas_differ() -> None:
    """What the twin tests compare is not one and the same curve."""
    same = {name: np.full(3, values[0]) for name, values in VALUES.items()}
    signals = BatchedTraining(make_task("digits", "mlp"), SEEDS).advance(same)
    for name in SIGNALS:
        assert len(set(signals[name])) == 3, name


# The small buffers are refilled within an interval, and a restart falls into the middle of one.
@pytest.mark.parametrize("refill_bytes", [1 << 24, 7 * 3 * 256])
@pytest.mark.parametrize(("dataset", "kind"), [("digits", "mlp"), ("markov-text-0", "transformer")])
@pytest.mark.parametrize("calls", ["for a CPU", "for a GPU"])
def test_restarted_replica_is_a_fresh_run(
    calls: str,
    dataset: str,
    kind: str,
    refill_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if calls == "for a GPU":
        request.getfixturevalue("like_a_gpu")
    monkeypatch.setattr(masks, "_REFILL_BYTES", refill_bytes)
    task = make_task(dataset, kind)
    engine = BatchedTraining(task, SEEDS, dtype=torch.float64)
    runs = [Training(task, seed, dtype=torch.float64) for seed in SEEDS]
    for interval in range(3):
        if interval == 1:
            engine.restart(1, 99)
            runs[1] = Training(task, 99, dtype=torch.float64)
            assert engine.evaluate("val")[1] == pytest.approx(runs[1].evaluate("val"), rel=1e-9)
        signals = engine.advance(VALUES)
        for replica, run in enumerate(runs):
            assert_same(signals, replica, advance(run, replica))


def test_restart_before_any_interval() -> None:
    task = make_task("digits", "mlp")
    engine = BatchedTraining(task, SEEDS, dtype=torch.float64)
    engine.restart(2, 99)
    assert_same(engine.advance(VALUES), 2, advance(Training(task, 99, dtype=torch.float64), 2))


def test_hyperparameters_may_change_between_intervals() -> None:
    task = make_task("digits", "mlp")
    engine = BatchedTraining(task, SEEDS, dtype=torch.float64)
    runs = [Training(task, seed, dtype=torch.float64) for seed in SEEDS]
    for shift in range(3):
        values = {name: np.roll(column, shift) for name, column in VALUES.items()}
        signals = engine.advance(values)
        for replica, run in enumerate(runs):
            assert_same(signals, replica, advance(run, replica, values))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_lost_replica_leaves_the_others_alone(kind: str, optimizer: OptimizerName) -> None:
    task = make_task("digits", kind, optimizer)
    lr = VALUES["lr"].copy()
    lr[1] = 1e4 if optimizer == "sgd" else 1e300
    lost, sound = (BatchedTraining(task, SEEDS, dtype=torch.float64) for _ in range(2))
    for _ in range(3):
        broken, signals = lost.advance(VALUES | {"lr": lr}), sound.advance(VALUES)
        for name in SIGNALS:
            np.testing.assert_allclose(broken[name][[0, 2]], signals[name][[0, 2]], rtol=1e-12)
    assert not np.isfinite(broken["train_loss"][1])
    # A restart takes the lost replica back to health, whatever its buffers held.
    lost.restart(1, 99)
    assert_same(lost.advance(VALUES), 1, advance(Training(task, 99, dtype=torch.float64), 1))


@pytest.mark.parametrize("size", [0.0, -16.0, 8.0, 24.0, 33.0, np.nan, np.inf])
def test_batch_sizes_are_multiples_of_a_micro_batch(size: float) -> None:
    engine = BatchedTraining(make_task("digits", "linear"), SEEDS)
    with pytest.raises(ValueError, match="must be multiples of 16"):
        engine.advance(VALUES | {"batch_size": np.array([16.0, size, 32.0])})


def test_signals_and_sizes() -> None:
    task = make_task("digits", "mlp")
    engine = BatchedTraining(task, SEEDS)
    signals = engine.advance(VALUES)
    assert list(signals) == list(SIGNALS)
    assert all(values.shape == (3,) and values.dtype == np.float64 for values in signals.values())
    assert engine.parameters == parameter_count(build_model(task.model, prepare(task).dataset))
    assert engine.hyperparameters == ("lr", "batch_size", "weight_decay", "dropout")
    linear = BatchedTraining(make_task("digits", "linear"), SEEDS)
    assert linear.hyperparameters == ("lr", "batch_size", "weight_decay")


@pytest.mark.parametrize("name", ["digits/cnn", "diabetes/mlp", "digits/autoencoder", "markov-text-0/gru"])
def test_test_split_is_there_only_when_handed_in(name: str) -> None:
    task = Task.named(name, interval_examples=64)
    with pytest.raises(LookupError, match="made without the test split"):
        BatchedTraining(task, SEEDS).evaluate("test")
    with pytest.raises(LookupError, match="made without the test split"):
        Training(task, 5).evaluate("test")
    data = prepare(task, with_test=True)
    engine = BatchedTraining(task, SEEDS, data=data, dtype=torch.float64)
    references = [Training(task, seed, data=data, dtype=torch.float64) for seed in SEEDS]
    for split in ("train", "val", "test"):
        losses = [run.evaluate(split) for run in references]
        assert engine.evaluate(split) == pytest.approx(losses, rel=1e-9)
    assert engine.evaluate("test")[0] != engine.evaluate("val")[0]


@pytest.mark.parametrize("layer", [nn.Softplus(), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3)])
def test_unsupported_layer(layer: nn.Module) -> None:
    model = nn.Sequential(nn.ReLU(), layer)
    tape = Tape(Workspace(torch.device("cpu"), torch.float32), training=True, fresh=True)
    with pytest.raises(NotImplementedError, match=f"{type(layer).__name__} has no replicated twin"):
        record(model, {}, [], tape, torch.ones(1, 16, 4))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("dataset", "kind"), [("digits", "mlp"), ("digits", "cnn"), ("waveforms", "gru"), ("markov-text-0", "transformer")]
)
def test_blocks_and_strides_change_nothing(
    dataset: str, kind: str, optimizer: OptimizerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks of two replicas and one, and strides of one replica, beside all three at once."""
    task = make_task(dataset, kind, optimizer, "layer")
    together = BatchedTraining(task, SEEDS, dtype=torch.float64)
    state = 4 * 8 * together.parameters
    monkeypatch.setattr(batched_training, "_STATE_BYTES", 2 * state)
    monkeypatch.setattr(batched_training, "_ACTIVATION_BYTES", 1)
    divided = BatchedTraining(task, SEEDS, dtype=torch.float64)
    for interval in range(3):
        if interval == 1:
            for engine in (together, divided):
                engine.restart(2, 99)
        a, b = together.advance(VALUES), divided.advance(VALUES)
        for name in SIGNALS:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_snapshot_and_restore(optimizer: OptimizerName) -> None:
    task = make_task("digits", "linear", optimizer)  # no dropout: what follows a snapshot depends on the order alone
    engine, other = (BatchedTraining(task, SEEDS, dtype=torch.float64) for _ in range(2))
    for run in (engine, other):
        run.advance(VALUES)
    loss = engine.evaluate("val")
    kept = engine.snapshot(1)
    engine.advance(VALUES | {"lr": VALUES["lr"] * 100})
    other.advance(VALUES)
    assert engine.evaluate("val")[1] != pytest.approx(loss[1])
    moved = engine.evaluate("val")
    engine.restore(1, kept)
    restored = engine.evaluate("val")
    assert restored[1] == pytest.approx(loss[1], rel=1e-12)
    assert restored[[0, 2]] == pytest.approx(moved[[0, 2]], rel=1e-12)
    # From here it goes on as a run that has seen the same orders from the same state.
    other.restore(1, kept)
    assert engine.advance(VALUES)["val_loss"][1] == pytest.approx(other.advance(VALUES)["val_loss"][1], rel=1e-9)


def test_memory_does_not_grow_with_intervals() -> None:
    """Buffers are made once: after a first interval, none are added."""
    engine = BatchedTraining(make_task("markov-text-0", "transformer"), SEEDS)
    engine.advance(VALUES)
    workspace = engine._blocks[0]._job.workspace
    before = len(workspace.pool), len(workspace._named)
    for _ in range(3):
        engine.advance(VALUES)
    assert (len(workspace.pool), len(workspace._named)) == before
