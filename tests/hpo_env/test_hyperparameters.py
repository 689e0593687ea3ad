"""Hyperparameters: scales, bounds, and reading and writing them on a torch run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpo_env.hyperparameters import CONTROLS, SCALES, Array, Binding, Hyperparameter, Scales, finite_positive
from inner_models.augmentation import Augment

HYPERPARAMETERS = [*CONTROLS.values(), Hyperparameter("momentum", 0.01, 0.999, "logit")]


def ids(hyperparameter: Hyperparameter) -> str:
    return hyperparameter.name


@pytest.mark.parametrize("hyperparameter", HYPERPARAMETERS, ids=ids)
def test_round_trips(hyperparameter: Hyperparameter) -> None:
    units = np.linspace(0, 1, 21)
    values = hyperparameter.denormalize(units)
    assert (np.diff(values) >= 0).all()
    assert hyperparameter.from_scale(hyperparameter.to_scale(values)) == pytest.approx(values, rel=1e-12)
    assert hyperparameter.denormalize(hyperparameter.normalize(values)) == pytest.approx(values, rel=1e-12)
    if not hyperparameter.multiple:
        assert hyperparameter.normalize(values) == pytest.approx(units, abs=1e-12)


@pytest.mark.parametrize("hyperparameter", HYPERPARAMETERS, ids=ids)
def test_values_stay_in_their_range(hyperparameter: Hyperparameter) -> None:
    low, high = hyperparameter.low, hyperparameter.high
    ends = hyperparameter.denormalize(np.array([0.0, 1.0, -5.0, 6.0]))
    far = hyperparameter.from_scale(np.array([-1e9, 1e9, -np.inf, np.inf]))
    for values in (ends, far):
        assert values == pytest.approx([low, high, low, high], rel=1e-12)
        assert ((values >= low) & (values <= high)).all()
    with np.errstate(all="raise"):
        normalized = hyperparameter.normalize(np.array([low - 1e9, 0.0, high + 1e9, np.inf]))
    assert ((normalized >= 0) & (normalized <= 1)).all()
    assert normalized[[0, 2, 3]].tolist() == [0, 1, 1]


def test_scales_by_hand() -> None:
    assert CONTROLS["lr"].to_scale(np.array([1e-3])) == pytest.approx([math.log(1e-3)])
    assert CONTROLS["dropout"].to_scale(np.array([0.2])) == pytest.approx([math.log(0.25)])
    assert CONTROLS["lr"].normalize(np.array([1e-3])) == pytest.approx([0.5])


def test_all_at_once_are_each_by_itself() -> None:
    units = np.random.default_rng(0).uniform(-0.1, 1.1, (50, len(CONTROLS)))
    values = np.stack(
        [control.denormalize(column) for control, column in zip(CONTROLS.values(), units.T, strict=True)], 1
    )
    values[:9] *= 0.01
    values[9:18] *= 1.7
    for method in ("to_scale", "from_scale", "normalize"):
        together = np.array(getattr(SCALES, method)(values))
        for index, control in enumerate(CONTROLS.values()):
            assert together[..., index].tolist() == np.array(getattr(control, method)(values[:, index])).tolist()


def room(hyperparameter: Hyperparameter, values: Array) -> Array:
    """Of `Scales.room`, `[2, values]`: down and up."""
    return np.stack(Scales([hyperparameter]).room(values[:, None]))[..., 0]


@pytest.mark.parametrize("hyperparameter", HYPERPARAMETERS, ids=ids)
def test_room_is_the_way_to_the_ends(hyperparameter: Hyperparameter) -> None:
    values = hyperparameter.denormalize(np.array([0.0, 0.3, 1.0]))
    down, up = room(hyperparameter, values)
    scaled = hyperparameter.to_scale(values)
    assert hyperparameter.from_scale(scaled + down) == pytest.approx([hyperparameter.low] * 3)
    assert hyperparameter.from_scale(scaled + up) == pytest.approx([hyperparameter.high] * 3)
    assert (down[0], up[2]) == pytest.approx((0, 0), abs=1e-12)
    assert (down[1:] < 0).all()
    assert (up[:2] > 0).all()
    down, up = room(hyperparameter, np.array([hyperparameter.high + 9.0]))
    assert (down[0], up[0]) == (pytest.approx(scaled[0] - scaled[2]), 0)  # none above the range, and all the way back


def test_room_by_hand() -> None:
    down, up = room(CONTROLS["lr"], np.array([1e-3]))
    assert [down[0], up[0]] == pytest.approx([math.log(1e-3), math.log(1e3)])


def test_batch_sizes_are_multiples() -> None:
    control = CONTROLS["batch_size"]
    sizes = control.from_scale(np.log(np.array([16.0, 23.9, 24.1, 100.0, 250.0])))
    assert sizes.tolist() == [16, 16, 32, 96, 256]
    assert set(control.denormalize(np.linspace(0, 1, 500)) % 16) == {0.0}


@pytest.mark.parametrize(
    ("low", "high", "scale"),
    [(1.0, 1.0, "log"), (2.0, 1.0, "log"), (0.0, 1.0, "log"), (0.0, 0.5, "logit"), (0.5, 1.0, "logit")],
)
def test_ranges_that_do_not_fit(low: float, high: float, scale: Any) -> None:
    with pytest.raises(ValueError, match=f"thing: .*{low}.*{high}"):
        Hyperparameter("thing", low, high, scale)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_finite_positive(value: float) -> None:
    assert finite_positive("lr", 0.1) == 0.1
    with pytest.raises(ValueError, match="lr must be a positive number, not"):
        finite_positive("lr", value)


# -- on a torch run ----------------------------------------------------------------------------------------------------


@dataclass
class Sampler:
    batch_size: int = 32


def weights(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(1)) for _ in range(count)]


def test_groups_keep_their_ratios() -> None:
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for parameters, lr, decay in zip(
            [weights(1), weights(1), weights(1)], (1e-2, 1e-3, 1e-2), (0.1, 0.4, 0.0), strict=True
        )
    ]
    optimizer = torch.optim.AdamW(groups)
    binding = Binding(optimizer)
    assert binding.read() == {"lr": 1e-2, "weight_decay": 0.4}
    # The ratios are those at the start, also after values that would have lost them.
    for lr, decay in ((1e-6, 1e-6), (0.5, 0.8)):
        binding.write({"lr": lr, "weight_decay": decay})
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, lr / 10, lr])
        assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([decay / 4, decay, 0])
        assert binding.read() == pytest.approx({"lr": lr, "weight_decay": decay})


@pytest.mark.parametrize(
    ("make", "offered"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), False),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), True),
        (lambda p: torch.optim.AdamW(p), True),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.0), False),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), False),  # coupled: the number means another thing
        (lambda p: torch.optim.NAdam(p, weight_decay=0.1, decoupled_weight_decay=True), True),
    ],
)
def test_decay_is_offered_only_where_it_means_the_same(
    make: Callable[[Any], torch.optim.Optimizer], offered: bool
) -> None:
    assert ("weight_decay" in Binding(make(weights(1))).available) == offered


def test_what_is_off_stays_off() -> None:
    model = nn.Sequential(Augment("table", 0.0), nn.Linear(1, 1), nn.Dropout(0.0))
    binding = Binding(torch.optim.SGD(model.parameters(), lr=0.1), model, criterion=nn.CrossEntropyLoss())
    assert binding.available == ("lr",)


def test_dropouts_keep_their_ratios() -> None:
    model = nn.Sequential(nn.Dropout(0.4), nn.Linear(1, 1), nn.Sequential(nn.Dropout2d(0.1)), nn.Dropout(0.0))
    binding = Binding(torch.optim.SGD(model.parameters(), lr=0.1), model)
    binding.write({"dropout": 0.2})
    rates = [module.p for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    assert rates == pytest.approx([0.2, 0.05, 0])
    assert binding.read()["dropout"] == 0.2


def test_augmentations_and_losses_keep_their_ratios() -> None:
    """Two of each, one of them at half the strength of the other."""
    model = nn.Sequential(Augment("image", 0.2), nn.Sequential(Augment("image", 0.1)), nn.Linear(1, 1))
    losses = nn.ModuleList(
        [nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss(), nn.CrossEntropyLoss(label_smoothing=0.2)]
    )
    binding = Binding(torch.optim.SGD(model.parameters(), lr=0.1), model, criterion=losses)
    assert binding.read() == {"lr": 0.1, "augmentation": 0.2, "label_smoothing": 0.2}
    binding.write({"augmentation": 0.4, "label_smoothing": 0.1})
    strengths = [layer.strength for layer in model.modules() if isinstance(layer, Augment)]
    smoothing = [loss.label_smoothing for loss in losses if isinstance(loss, nn.CrossEntropyLoss)]
    assert strengths == pytest.approx([0.4, 0.2])
    assert smoothing == pytest.approx([0.05, 0.1])
    assert binding.read() == pytest.approx({"lr": 0.1, "augmentation": 0.4, "label_smoothing": 0.1})


def test_batch_size_is_an_int() -> None:
    sampler = Sampler()
    binding = Binding(torch.optim.SGD(weights(1), lr=0.1), batch_sampler=sampler)
    assert binding.read()["batch_size"] == 32
    binding.write({"batch_size": 48.0})
    assert sampler.batch_size == 48
    assert isinstance(sampler.batch_size, int)


def test_learning_rate_in_a_tensor() -> None:
    lr = torch.tensor(0.1)
    optimizer = torch.optim.AdamW(weights(1), lr=lr)
    Binding(optimizer).write({"lr": 0.01})
    assert optimizer.param_groups[0]["lr"] is lr  # a captured graph reads this very tensor
    assert lr.item() == pytest.approx(0.01)


def test_available_controls() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1))
    optimizer = torch.optim.AdamW(model.parameters())
    assert Binding(optimizer).available == ("lr", "weight_decay")
    assert Binding(optimizer, nn.Linear(1, 1)).available == ("lr", "weight_decay")
    assert Binding(optimizer, model, Sampler()).available == tuple(CONTROLS)[:4]
    augmented = nn.Sequential(Augment("table", 0.1), model)
    assert Binding(optimizer, augmented, Sampler(), nn.CrossEntropyLoss(label_smoothing=0.1)).available == tuple(
        CONTROLS
    )
    assert Binding(optimizer, model, Sampler(), nn.CrossEntropyLoss()).available == tuple(CONTROLS)[:4]
    assert Binding(optimizer, model, Sampler(), nn.MSELoss()).available == tuple(CONTROLS)[:4]
    assert Binding(torch.optim.Rprop(model.parameters())).available == ("lr",)


def test_unknown_controls_are_an_error() -> None:
    optimizer = torch.optim.AdamW(weights(1), lr=0.1)
    binding = Binding(optimizer)
    with pytest.raises(ValueError, match="this run has no dropout, momentum; it has lr, weight_decay"):
        binding.write({"lr": 0.2, "dropout": 0.1, "momentum": 0.9})
    assert optimizer.param_groups[0]["lr"] == 0.1  # nothing is written when anything is wrong
