"""Tasks: validation, names, noise, subsets, and the distributions that they are sampled from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from inner_models.datasets import DatasetError, load_dataset
from inner_models.models import ModelKind, ModelSpec
from inner_models.names import unknown
from inner_models.sampling import MICRO_BATCH
from inner_models.tasks import (
    COST_SHARE,
    DEFAULT_SPECS,
    FULL_SHARE_WIDTH,
    Task,
    TaskDistribution,
    elementwise_loss,
    prepare,
)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optimizer", "adam", "optimizer 'adam' is not one of adamw, sgd"),
        ("horizon", 0, "horizon must be a whole number of intervals, at least 1, not 0"),
        ("horizon", 4.0, "horizon must be a whole number of intervals, at least 1, not 4.0"),
        ("regularizers", ["augmentation"], r"regularizers must be a tuple of names, not \['augmentation'\]"),
        ("interval_examples", 15, "interval_examples must be at least 16, not 15"),
        ("train_rows", 0, "train_rows must be at least 16, not 0"),
        ("eval_rows", -1, "eval_rows must be at least 16, not -1"),
        ("label_noise", 1.1, r"label_noise must lie in 0\.\.1, not 1\.1"),
        ("label_noise", -0.1, r"label_noise must lie in 0\.\.1"),
        ("label_noise", math.nan, r"label_noise must lie in 0\.\.1"),
    ],
)
def test_task_names_the_bad_value(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task.named("digits/mlp", **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "mpl", "model kind 'mpl' is not one of linear, mlp"),
        ("activation", "elu", "model activation 'elu' is not one of relu"),
        ("normalization", "batch", "model normalization 'batch' is not one of none, layer"),
        ("width", 0, "width and depth must be at least 1, not 0 and 2"),
        ("depth", 0, "width and depth must be at least 1, not 64 and 0"),
    ],
)
def test_model_spec_names_the_bad_value(field: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = {"kind": "mlp", field: value}
    with pytest.raises(ValueError, match=message):
        ModelSpec(**arguments)


@pytest.mark.parametrize("kind", DEFAULT_SPECS)
def test_named(kind: ModelKind) -> None:
    task = Task.named(f"digits/{kind}", horizon=7, label_noise=0.1)
    assert task == Task("digits", DEFAULT_SPECS[kind], horizon=7, label_noise=0.1)
    assert task.name == f"digits/{kind}"


def test_named_takes_downloads_without_fetching_them() -> None:
    assert Task.named("openml:31/mlp").dataset == "openml:31"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("letter", "task 'letter' is not of the form <data set>/<model>, such as letter/mlp"),
        ("lettr/mlp", r"unknown data set 'lettr'; did you mean 'letter'\? known: addition-sequence, "),
        ("letter/mpl", r"unknown model 'mpl'; did you mean 'mlp'\? known: linear, mlp, "),
        ("letter/???", r"unknown model '\?\?\?'; known: linear, mlp, "),
        ("/mlp", "unknown data set ''; known: addition-sequence, "),
        ("elsewhere:31/mlp", "unknown data set 'elsewhere:31'"),
    ],
)
def test_named_suggests_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Task.named(name)
    assert "\n" not in str(error.value)


def test_unknown_lists_what_it_is_told_to() -> None:
    assert (
        unknown("set", "a-9", ["a-0", "a-1"], shown=["a-0..1"])
        == "unknown set 'a-9'; did you mean 'a-1'? known: a-0..1"
    )


# -- preparation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits/mlp", "diabetes/mlp", "digits/autoencoder", "markov-text-0/gru"])
def test_the_test_split_is_left_out_unless_asked_for(name: str) -> None:
    task = Task.named(name)
    assert prepare(task).dataset.test is None
    assert prepare(task, with_test=False).dataset.test is None
    test = prepare(task, with_test=True).dataset.test
    original = load_dataset(task.dataset).test
    assert test is not None
    assert original is not None
    assert torch.equal(test.inputs, original.inputs)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("digits/mlp", "cross_entropy"),
        ("markov-text-0/gru", "cross_entropy"),
        ("diabetes/mlp", "mse"),
        ("digits/autoencoder", "mse"),
    ],
)
def test_loss_follows_from_data_and_model(name: str, loss: str) -> None:
    assert prepare(Task.named(name)).loss == loss


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_autoencoder_targets_are_its_inputs(split: str) -> None:
    rows = getattr(prepare(Task.named("digits/autoencoder", label_noise=0.5), with_test=True).dataset, split)
    assert torch.equal(rows.targets, rows.inputs.flatten(1))


@pytest.mark.parametrize(("given", "expected"), [(None, 1079 // 16 * 16), (16, 16), (31, 16), (5000, 4992)])
def test_interval_is_whole_micro_batches(given: int | None, expected: int) -> None:
    assert len(load_dataset("digits").train) == 1079
    assert prepare(Task.named("digits/mlp", interval_examples=given)).interval_examples == expected


def test_train_subset() -> None:
    whole = load_dataset("digits").train
    subset = prepare(Task.named("digits/mlp", train_rows=100)).dataset.train
    # Rows of digits do not repeat, so a row's bytes are its identity.
    places = {row.numpy().tobytes(): place for place, row in enumerate(whole.inputs)}
    rows = [places[row.numpy().tobytes()] for row in subset.inputs]
    assert len(set(rows)) == 100
    assert torch.equal(subset.targets, whole.targets[rows])
    assert rows != list(range(100))
    assert len(prepare(Task.named("digits/mlp", train_rows=10**6)).dataset.train) == len(whole)


def test_eval_rows() -> None:
    whole = load_dataset("digits")
    dataset = prepare(Task.named("digits/mlp", eval_rows=32), with_test=True).dataset
    assert torch.equal(dataset.val.inputs, whole.val.inputs[:32])
    assert dataset.test is not None
    assert whole.test is not None
    assert len(dataset.test) == len(whole.test)  # a score is never taken on a part


@pytest.mark.parametrize(("name", "classes"), [("letter/mlp", 26), ("markov-text-0/gru", None)])
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_label_noise_redraws_its_share(name: str, classes: int | None, noise: float) -> None:
    task = Task.named(name, label_noise=noise)
    try:
        clean = load_dataset(task.dataset)
    except DatasetError as error:
        pytest.skip(str(error))
    noisy = prepare(task, with_test=True).dataset
    assert classes in (None, clean.outputs)
    changed = (noisy.train.targets != clean.train.targets).double()
    # A redrawn label is the old one once in `outputs` times.
    share = noise * (1 - 1 / clean.outputs)
    assert changed.mean().item() == pytest.approx(share, abs=5 * math.sqrt(share / changed.numel()))
    assert int(noisy.train.targets.max()) < clean.outputs
    assert torch.equal(noisy.train.inputs, clean.train.inputs)
    assert noisy.test is not None
    assert clean.test is not None
    assert torch.equal(noisy.val.targets, clean.val.targets)
    assert torch.equal(noisy.test.targets, clean.test.targets)


def test_noise_of_regression_targets() -> None:
    clean = load_dataset("friedman").train.targets
    noisy = prepare(Task.named("friedman/mlp", label_noise=0.5)).dataset.train.targets
    assert noisy.dtype == clean.dtype
    assert (noisy - clean).std().item() == pytest.approx(0.5, rel=0.1)


def test_seed_fixes_subset_and_noise() -> None:
    task = Task.named("digits/mlp", train_rows=100, label_noise=0.3)
    first = prepare(task).dataset.train
    prepare.cache_clear()
    again, other = prepare(task).dataset.train, prepare(replace(task, seed=1)).dataset.train
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, other.inputs)
    assert not torch.equal(first.targets, other.targets)


def test_unknown_data_set() -> None:
    with pytest.raises(DatasetError, match="unknown data set 'nowhere'"):
        prepare(Task("nowhere", ModelSpec("mlp")))


def test_elementwise_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    losses = elementwise_loss(logits, torch.tensor([1, 0]), "cross_entropy")
    assert losses.tolist() == pytest.approx([math.log(4 / 3), math.log(2)])
    # A fifth of the target spread over both classes: log(4 / 3) + 0.1 log(3).
    smooth = elementwise_loss(logits, torch.tensor([1, 0]), "cross_entropy", label_smoothing=0.2)
    assert smooth.tolist() == pytest.approx([math.log(4 / 3) + 0.1 * math.log(3), math.log(2)])
    squares = elementwise_loss(torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0, 4.0]]), "mse")
    assert squares.tolist() == [[4.0, 0.0]]


# -- distributions -----------------------------------------------------------------------------------------------------

DISTRIBUTION = TaskDistribution(
    entries=(
        ("digits", ("linear", "mlp", "cnn", "autoencoder")),
        ("waveforms", ("gru", "transformer")),
    ),
    widths=(16, 96),
    depths=(1, 3),
    optimizers=("adamw", "adamw", "adamw", "sgd"),
    horizons=(8, 32),
    examples=(4096, 16_384),
    train_rows=(96, 2048),
    eval_rows=384,
    noisy_share=0.3,
)


def samples(count: int = 200, seed: int = 0) -> list[Task]:
    rng = np.random.default_rng(seed)
    return [DISTRIBUTION.sample(rng) for _ in range(count)]


def test_sampling_is_deterministic() -> None:
    assert samples(seed=0) == samples(seed=0)
    assert samples(seed=0) != samples(seed=1)


def test_samples_lie_in_their_ranges() -> None:
    tasks = samples()
    entries = dict(DISTRIBUTION.entries)
    for task in tasks:
        kind, width, depth = task.model.kind, task.model.width, task.model.depth
        assert kind in entries[task.dataset]
        assert 8 <= task.horizon <= 32
        assert task.train_rows is not None
        assert 96 <= task.train_rows <= 2048
        assert 0 <= task.seed < 4
        assert task.label_noise == 0 or 0.05 <= task.label_noise <= 0.3
        assert task.interval_examples is not None
        share = COST_SHARE.get(kind, 1)
        examples = task.horizon * task.interval_examples
        assert examples <= share * 16_384 or task.interval_examples == 2 * MICRO_BATCH
        assert examples > share * FULL_SHARE_WIDTH / 96 * 4096 - task.horizon
        if kind == "mlp":
            narrow = min(1, FULL_SHARE_WIDTH / width)
            assert narrow * 4096 - task.horizon < examples <= narrow * 16_384
        assert task.eval_rows == max(128, int(share * 384))
        assert 1 <= depth <= (2 if kind in ("gru", "transformer", "autoencoder") else 3)
        if kind == "cnn":
            assert 4 <= width <= 24
        elif kind in ("gru", "transformer"):
            assert width in (16, 32, 48)
        else:
            assert 16 <= width <= 96


def test_samples_reach_everything() -> None:
    tasks = samples()
    assert {(task.dataset, task.model.kind) for task in tasks} == {
        (dataset, kind) for dataset, kinds in DISTRIBUTION.entries for kind in kinds
    }
    assert {task.model.activation for task in tasks} == {"relu", "gelu", "tanh", "silu"}
    assert {task.model.normalization for task in tasks} == {"none", "layer"}
    assert {task.model.depth for task in tasks} == {1, 2, 3}
    assert {task.seed for task in tasks} == {0, 1, 2, 3}
    # Five standard deviations of a share among 200.
    assert np.mean([task.optimizer == "sgd" for task in tasks]) == pytest.approx(0.25, abs=0.16)
    assert np.mean([task.label_noise > 0 for task in tasks]) == pytest.approx(0.3, abs=0.17)
    # Log-uniform: the median is the geometric mean of the ends.
    assert np.median([task.horizon for task in tasks]) == pytest.approx(16, abs=2.5)


def test_examples_are_those_of_the_episode() -> None:
    """However many intervals they are divided into."""
    distribution = TaskDistribution(entries=(("digits", ("linear",)),), widths=(16, 64), examples=(2000, 32_000))
    rng = np.random.default_rng(0)
    tasks = [distribution.sample(rng) for _ in range(400)]
    examples = np.array([task.horizon * (task.interval_examples or 0) for task in tasks])
    horizons = np.array([task.horizon for task in tasks])
    assert np.median(examples) == pytest.approx(8000, rel=0.2)
    assert abs(np.corrcoef(np.log(examples), np.log(horizons))[0, 1]) < 0.15
    assert (examples <= 32_000).all()
    assert (examples > 2000 - horizons).all()


def test_an_interval_has_two_micro_batches_at_least() -> None:
    distribution = TaskDistribution(entries=(("waveforms", ("gru",)),), horizons=(64, 64), examples=(64, 128))
    rng = np.random.default_rng(0)
    assert {distribution.sample(rng).interval_examples for _ in range(20)} == {2 * MICRO_BATCH}


@pytest.mark.parametrize("field", ["widths", "depths", "horizons", "examples", "train_rows"])
@pytest.mark.parametrize("bad", [(0, 5), (7, 6), (-1, 2)])
def test_ranges_that_are_none(field: str, bad: tuple[int, int]) -> None:
    arguments: dict[str, Any] = {field: bad}
    with pytest.raises(ValueError, match=rf"{field} must be a range of positive .* not {bad[0]}\.\.{bad[1]}"):
        replace(DISTRIBUTION, **arguments)


def test_other_settings_that_are_none() -> None:
    with pytest.raises(ValueError, match="train_rows must be at least 16, not 4"):
        replace(DISTRIBUTION, train_rows=(4, 80))
    with pytest.raises(ValueError, match=r"noisy_share must lie in 0\.\.1, not 5"):
        replace(DISTRIBUTION, noisy_share=5.0)


def test_samples_can_be_prepared() -> None:
    for task in samples(12):
        data = prepare(task)
        assert data.interval_examples % MICRO_BATCH == 0
        assert data.dataset.test is None


def test_distribution_is_hashable() -> None:
    assert len({DISTRIBUTION, replace(DISTRIBUTION), replace(DISTRIBUTION, noisy_share=0.1)}) == 2
