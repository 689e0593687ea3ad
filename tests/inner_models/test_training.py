"""The reference training and its parts: seeds, row order, gradient statistics and dropout."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from inner_models.models import Dropout, ModelKind, ModelSpec, build_model
from inner_models.sampling import BatchSampler, draw_bytes, draw_order
from inner_models.signals import MEASURE_EVERY, SAMPLED, SIGNALS, GradientMeter
from inner_models.tasks import Task, prepare
from inner_models.training import Training, build_optimizer

NAMES = ["digits/linear", "digits/mlp", "digits/cnn", "waveforms/gru", "markov-text-0/transformer", "diabetes/mlp"]


def make_task(name: str) -> Task:
    return Task.named(name, interval_examples=64, eval_rows=64)


def curve(name: str, seed: int) -> list[dict[str, float]]:
    run = Training(make_task(name), seed)
    return [run.advance() for _ in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_runs(name: str) -> None:
    torch.manual_seed(1)
    first = curve(name, seed=3)
    torch.manual_seed(2)
    assert curve(name, seed=3) == first
    assert curve(name, seed=4)[0]["train_loss"] != first[0]["train_loss"]
    assert set(first[0]) == set(SIGNALS)


@pytest.mark.parametrize("name", NAMES)
def test_global_generators_are_left_alone(name: str) -> None:
    before = torch.random.get_rng_state(), str(np.random.get_state(legacy=False))  # noqa: NPY002
    task = make_task(name)
    build_model(task.model, prepare(task).dataset, seed=1)
    Training(task, seed=1).advance()
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert str(np.random.get_state(legacy=False)) == before[1]  # noqa: NPY002


@pytest.mark.parametrize(
    ("kind", "dataset", "message"),
    [
        ("cnn", "iris", "model 'cnn' takes image data, but 'iris' is table data"),
        ("gru", "digits", "takes sequence or text data"),
        ("mlp", "markov-text-0", "takes table or image or sequence data"),
        ("transformer", "iris", "takes sequence or text data"),
    ],
)
def test_models_refuse_other_modalities(kind: ModelKind, dataset: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(Task(dataset, ModelSpec(kind)), seed=0)


def test_learning_rate_zero_keeps_the_weights() -> None:
    run = Training(make_task("digits/mlp"), 0)
    before = copy.deepcopy(run.model.state_dict())
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    assert run.advance()["update_ratio"] == 0
    after = run.model.state_dict()
    assert isinstance(before, dict)
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_training_learns() -> None:
    run = Training(Task.named("digits/mlp"), 0)
    start = run.evaluate("val")
    for _ in range(5):
        signals = run.advance()
    assert signals["val_loss"] < 0.3 * start


def test_only_matrices_decay() -> None:
    model = Training(make_task("markov-text-0/transformer"), 0).model
    decayed, others = build_optimizer("adamw", model).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


# -- row order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 3), (12, 4), (5, 16), (1, 1)])
def test_a_pass_has_every_row_once(rows: int, batch_size: int) -> None:
    sampler = BatchSampler(rows, batch_size, np.random.default_rng(0))
    for _ in range(2):
        batches = list(sampler)
        assert sorted(row for batch in batches for row in batch) == list(range(rows))
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert len(batches) == len(sampler)


def test_passes_come_in_different_orders() -> None:
    sampler = BatchSampler(50, 50, np.random.default_rng(0))
    assert list(sampler) != list(sampler)


@pytest.mark.parametrize("examples", [4, 10, 25])
def test_passes_of_other_lengths_than_an_epoch(examples: int) -> None:
    """Whole permutations come one after the other; the last one is cut."""
    sampler = BatchSampler(10, 4, np.random.default_rng(0), examples)
    order = [row for batch in sampler for row in batch]
    assert len(order) == examples
    assert len(sampler) == math.ceil(examples / 4)
    for start in range(0, examples, 10):
        epoch = order[start : start + 10]
        assert len(set(epoch)) == len(epoch)
    assert order == draw_order(10, examples, np.random.default_rng(0)).tolist()


def test_batch_size_may_change_within_a_pass() -> None:
    sampler = BatchSampler(30, 4, np.random.default_rng(0))
    sizes: list[int] = []
    rows: list[int] = []
    for batch in sampler:
        sizes.append(len(batch))
        rows += batch
        sampler.batch_size = 10
    assert sizes == [4, 10, 10, 6]
    assert sorted(rows) == list(range(30))
    assert len(sampler) == 3


@pytest.mark.parametrize(("rows", "batch_size"), [(0, 1), (1, 0), (5, -2)])
def test_batch_sampler_refuses(rows: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="rows and batch_size must be at least 1"):
        BatchSampler(rows, batch_size, np.random.default_rng(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_sampler_in_a_data_loader(workers: int) -> None:
    sampler = BatchSampler(20, 6, np.random.default_rng(0))
    loader = DataLoader(TensorDataset(torch.arange(20)), batch_sampler=sampler, num_workers=workers)
    for size, count in ((6, 4), (9, 3)):
        sampler.batch_size = size
        batches = [batch.tolist() for (batch,) in loader]
        assert [len(batch) for batch in batches[:-1]] == [size] * (count - 1)
        assert sorted(row for batch in batches for row in batch) == list(range(20))


# -- gradient statistics -----------------------------------------------------------------------------------------------


def test_gradient_meter_by_hand() -> None:
    """Two parameters at (3, 4) under SGD with lr 0.1 and momentum 0.5.

    The gradient is (3, 4) in the first step, zero in the next ones (not measured) and (0, 12) in the next measured one.
    Norms: 5 and 12. Cosines: 0 without a momentum, then (0, 12) with a multiple of (3, 4), 4/5. Of the first gradient
    `left` is in the momentum in the end; the momenta sum to (3, 4)(2 - left) + (0, 12).
    """
    parameters = [nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (3.0, 4.0)]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.5)
    meter = GradientMeter(optimizer)

    def step(*gradient: float) -> None:
        for parameter, value in zip(parameters, gradient, strict=True):
            parameter.grad = torch.tensor([value], dtype=torch.float64)
        optimizer.step()

    for gradient in ((3.0, 4.0), *[(0.0, 0.0)] * (MEASURE_EVERY - 1), (0.0, 12.0)):
        step(*gradient)
    left = 0.5**MEASURE_EVERY
    moved = 0.3 * (2 - left), 0.4 * (2 - left) + 1.2
    assert [p.item() for p in parameters] == pytest.approx([3 - moved[0], 4 - moved[1]])
    assert meter.finish() == pytest.approx(
        {
            "grad_norm": 8.5,
            "grad_norm_std": 3.5,
            "grad_cosine": 0.4,
            "update_ratio": math.hypot(*moved) / math.hypot(3 - moved[0], 4 - moved[1]),
        }
    )
    # The next interval begins at its own first step.
    momentum = 3 * left, 4 * left + 12
    step(6.0, 8.0)
    signals = meter.finish()
    assert (signals["grad_norm"], signals["grad_norm_std"]) == (10, 0)
    assert signals["grad_cosine"] == pytest.approx((0.6 * momentum[0] + 0.8 * momentum[1]) / math.hypot(*momentum))
    meter.close()
    step(1.0, 1.0)
    assert math.isnan(meter.finish()["grad_norm"])


def test_gradient_meter_without_momentum_or_steps() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    meter = GradientMeter(optimizer)
    signals = meter.finish()
    assert all(math.isnan(signals[name]) for name in ("grad_norm", "grad_norm_std", "grad_cosine"))
    assert signals["update_ratio"] == 0
    optimizer.step()  # no gradient at all
    assert math.isnan(meter.finish()["grad_norm"])


def test_gradient_meter_measures_one_step_in_several() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    meter = GradientMeter(optimizer)
    for norm in range(2 * MEASURE_EVERY + 2):
        assert meter.steps == norm
        parameter.grad = torch.full((1,), float(norm))
        optimizer.step()
    signals = meter.finish()
    assert signals["grad_norm"] == pytest.approx(MEASURE_EVERY)
    assert signals["grad_norm_std"] == pytest.approx(np.std([0, MEASURE_EVERY, 2 * MEASURE_EVERY]))
    assert meter.steps == 0


def test_gradient_meter_in_half_precision() -> None:
    """Products of small numbers, 1e-8 here, must not be rounded to zero."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.5)
    meter = GradientMeter(optimizer)
    for _ in range(MEASURE_EVERY + 1):
        parameter.grad = torch.full((4,), 1e-4, dtype=torch.float16)
        optimizer.step()
    assert meter.finish()["grad_cosine"] == pytest.approx(0.5, rel=1e-3)  # 0 in the first step, 1 in the last


def test_gradient_meter_where_parameters_lie_otherwise_than_gradients() -> None:
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3).t().contiguous().t())
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.5)
    meter = GradientMeter(optimizer)
    gradient = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    for step in range(MEASURE_EVERY + 1):
        weight.grad = gradient if step < MEASURE_EVERY else gradient.t().contiguous().t()
        optimizer.step()
    assert meter.finish()["grad_cosine"] == pytest.approx(0.5)


def test_gradient_meter_after_a_conversion() -> None:
    """The interval in which parameters are converted says nothing of their way; the next one does."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    meter = GradientMeter(optimizer)
    model.double()
    assert math.isnan(meter.finish()["update_ratio"])
    model.weight.data = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    meter.begin()
    model.weight.grad = torch.tensor([[0.0, 8.0]], dtype=torch.float64)
    optimizer.step()
    assert meter.finish()["update_ratio"] == pytest.approx(4 / 3)


@pytest.mark.parametrize("width", [64, 700])
def test_gradient_meter_looks_at_a_part_of_large_models(width: int) -> None:
    """Up to `SAMPLED` parameters all signals are exact; of larger models, estimates from not many more."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(width, width), (width,), (3, width, 5), (2, 2), ()]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    total = sum(parameter.numel() for parameter in parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.5)
    meter = GradientMeter(optimizer)
    start = torch.cat([parameter.detach().flatten().clone() for parameter in parameters])
    norms, cosines = [], [0.0]
    for step in range(MEASURE_EVERY + 1):
        momentum = [optimizer.state[p]["momentum_buffer"].flatten().clone() for p in parameters] if step else []
        for parameter in parameters:
            parameter.grad = 0.3 * parameter.detach() + torch.randn(parameter.shape, generator=generator)
        if step % MEASURE_EVERY == 0:
            gradient = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
            norms.append(gradient.norm().item())
            if step:
                cosines.append(torch.cosine_similarity(gradient, torch.cat(momentum), dim=0).item())
        optimizer.step()
    end = torch.cat([parameter.detach().flatten() for parameter in parameters])
    looked_at = meter._sample.size
    assert looked_at == total if total <= SAMPLED else SAMPLED / 2 < looked_at < 1.2 * SAMPLED < total
    tolerance = 1e-5 if looked_at == total else 0.02
    signals = meter.finish()
    assert signals["grad_norm"] == pytest.approx(np.mean(norms), rel=tolerance)
    assert signals["grad_cosine"] == pytest.approx(np.mean(cosines), abs=tolerance)
    assert signals["update_ratio"] == pytest.approx(((end - start).norm() / end.norm()).item(), rel=tolerance)


def test_gradient_meter_when_parameters_come_and_go() -> None:
    """A new parameter has no start to be compared with; a frozen one is left out."""
    first, second, third = (nn.Parameter(torch.full((4,), value)) for value in (3.0, 4.0, 5.0))
    optimizer = torch.optim.SGD([first, second], lr=1.0)
    meter = GradientMeter(optimizer)
    optimizer.add_param_group({"params": [third]})
    second.requires_grad_(False)
    for parameter in (first, third):
        parameter.grad = torch.full((4,), 1.0)
    optimizer.step()
    assert meter.finish()["update_ratio"] == pytest.approx(1 / 2)
    third.grad = torch.full((4,), 2.0)
    first.grad = None
    optimizer.step()
    assert meter.finish()["update_ratio"] == pytest.approx(2 / math.hypot(2, 2))


# -- dropout -----------------------------------------------------------------------------------------------------------


def dropout(rate: float, seed: int | None = 0) -> Dropout:
    module = Dropout(rate)
    module.stream = None if seed is None else np.random.default_rng(seed)
    return module


@pytest.mark.parametrize("rate", [0.0, 0.005, 0.1, 0.3, 0.5])
def test_dropout_keeps_the_mean(rate: float) -> None:
    count = 400_000
    out = dropout(rate)(torch.ones(count))
    rounded = round(rate * 256) / 256
    deviation = math.sqrt(rounded * (1 - rounded) / count)
    assert (out == 0).double().mean().item() == pytest.approx(rounded, abs=5 * deviation)
    assert out.max().item() == pytest.approx(1 / (1 - rounded))
    assert out.mean().item() == pytest.approx(1, abs=5 * deviation / (1 - rounded))
    # Torch's own, whose rate is not rounded.
    plain = nn.Dropout(rate)(torch.ones(count))
    assert out.var().item() == pytest.approx(plain.var().item(), abs=0.02)


def test_dropout_masks_depend_on_rows_not_on_batches() -> None:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    whole, parts = dropout(0.4), dropout(0.4)
    assert torch.equal(whole(x), torch.cat([parts(part) for part in torch.split(x, 16)]))


def test_dropout_is_off_in_evaluation() -> None:
    x = torch.ones(1000)
    assert torch.equal(dropout(0.5).eval()(x), x)


def test_dropout_without_a_stream_is_torchs() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = nn.Dropout(0.3)(torch.ones(1000))
        torch.manual_seed(0)
        assert torch.equal(dropout(0.3, seed=None)(torch.ones(1000)), expected)


def test_bytes_are_the_same_however_they_are_drawn() -> None:
    whole = draw_bytes(np.random.default_rng(3), 48)
    generator = np.random.default_rng(3)
    assert np.concatenate([draw_bytes(generator, count) for count in (8, 24, 16)]).tolist() == whole.tolist()
    numbers = np.random.default_rng(3).integers(0, 2**64 - 1, 6, dtype=np.uint64, endpoint=True)
    assert whole.tolist() == numbers.view(np.uint8).tolist()
    assert draw_bytes(generator, 0).size == 0
    spread = np.bincount(draw_bytes(np.random.default_rng(0), 1 << 16), minlength=256)
    assert 150 < spread.min() < spread.max() < 370  # 256 expected, standard deviation 16
    with pytest.raises(ValueError, match="multiple of 8, not 12"):
        draw_bytes(generator, 12)
