"""What `Augment` does to each kind of data, by hand, and when it does nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from inner_models.augmentation import Augment
from inner_models.datasets import Modality

INPUTS: dict[Modality, Tensor] = {
    "table": torch.randn(64, 6, generator=torch.Generator().manual_seed(0)),
    "image": torch.randn(64, 3, 8, 6, generator=torch.Generator().manual_seed(0)),
    "sequence": torch.randn(64, 10, 2, generator=torch.Generator().manual_seed(0)),
    "text": torch.randint(30, (64, 12), generator=torch.Generator().manual_seed(0)),
}


def made(modality: Modality, strength: float = 0.25, seed: int | None = None) -> Augment:
    layer = Augment(modality, strength, vocabulary=30 if modality == "text" else None)
    layer.stream = None if seed is None else np.random.default_rng(seed)
    return layer.train()


def changed(layer: Augment, x: Tensor, numbers: list[float], strength: float) -> Tensor:
    """One example."""
    return layer.changed(x[None], torch.tensor([numbers]), torch.tensor([strength]))[0]


def test_noise_by_hand() -> None:
    assert changed(made("table"), torch.tensor([1.0, -2.0, 0.0]), [2.0, -1.0, 0.5], 0.5).tolist() == [2.0, -2.5, 0.25]


def test_steps_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert changed(made("sequence"), x, [0.5, 0.49, 0.9], 0.5).tolist() == [[1.0, 2.0], [0.0, 0.0], [5.0, 6.0]]


def test_tokens_by_hand() -> None:
    """The first half of the numbers says which ones, the second which tokens come in: 30 x 0.99 is 29."""
    x = torch.tensor([7, 8, 9])
    assert changed(made("text"), x, [0.1, 0.9, 0.2, 0.99, 0.5, 0.0], 0.25).tolist() == [29, 8, 0]


@pytest.mark.parametrize(
    ("numbers", "down", "right"),
    [([0.5, 0.5], 0, 0), ([1.0, 0.5], 2, 0), ([0.5, 0.0], 0, -2), ([0.0, 0.75], -2, 1), ([0.55, 0.45], 0, 0)],
)
def test_shifts_by_hand(numbers: list[float], down: int, right: int) -> None:
    """At a strength of a half, an image of 8 x 8 moves by up to 2 pixels; the edge is repeated."""
    x = torch.arange(2 * 8 * 8.0).view(2, 8, 8)
    rows = [min(max(row + down, 0), 7) for row in range(8)]
    columns = [min(max(column + right, 0), 7) for column in range(8)]
    assert torch.equal(changed(made("image"), x, numbers, 0.5), x[:, rows][:, :, columns])


def test_shares_are_those_asked_for() -> None:
    """Of many numbers: a quarter of the steps and of the tokens (one in 30 of which stays the same), noise of 1/4."""
    torch.manual_seed(0)
    steps = made("sequence")(torch.ones(4000, 10, 2))
    assert (steps == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(steps[..., 0], steps[..., 1])
    before = torch.zeros(4000, 10, dtype=torch.int64)
    tokens = made("text")(before)
    assert (tokens != 0).float().mean().item() == pytest.approx(0.25 * 29 / 30, abs=0.01)
    assert set(tokens.flatten().tolist()) == set(range(30))
    noise = made("table")(torch.zeros(4000, 10))
    assert (noise.mean().item(), noise.std().item()) == pytest.approx((0, 0.25), abs=0.01)
    columns = torch.arange(9.0).expand(4000, 1, 9, 9)
    for strength, shifts in ((4 / 9, 2), (8 / 9, 4)):  # so many pixels at most, each as likely as the others
        middle = made("image", strength)(columns)[:, 0, 4, 4]
        shares = torch.bincount(middle.long(), minlength=9) / 4000
        assert shares[4 - shifts : 5 + shifts].tolist() == pytest.approx(
            [1 / (2 * shifts + 1)] * (2 * shifts + 1), abs=0.03
        )
    small = made("image", 0.02)(columns)[:, 0, 4, 4]  # 0.09 of a pixel: 0.09 / 0.59 of the images
    assert (small != 4).float().mean().item() == pytest.approx(0.09 / 0.59, abs=0.02)


@pytest.mark.parametrize("modality", INPUTS)
def test_only_in_training(modality: Modality) -> None:
    x = INPUTS[modality]
    kept = x.clone()
    for seed in (None, 0):
        layer = made(modality, seed=seed)
        assert not torch.equal(layer(x), x)
        assert layer(x).dtype == x.dtype
        assert layer(x).shape == x.shape
        assert layer.eval()(x) is x
    layer = made(modality, 0.0)
    assert layer(x) is x
    assert torch.equal(made(modality, 0.0, seed=0)(x), x)
    assert torch.equal(x, kept)  # data are shared


@pytest.mark.parametrize("modality", INPUTS)
def test_batch_sizes_do_not_matter(modality: Modality) -> None:
    x = INPUTS[modality]
    whole, parts = made(modality, seed=3), made(modality, seed=3)
    assert torch.equal(whole(x), torch.cat([parts(part) for part in torch.split(x, 16)]))
    assert not torch.equal(made(modality, seed=4)(x), made(modality, seed=3)(x))


def test_its_own_stream_leaves_the_global_one_alone() -> None:
    before = torch.random.get_rng_state()
    made("table", seed=0)(INPUTS["table"])
    assert torch.equal(torch.random.get_rng_state(), before)
    made("table")(INPUTS["table"])
    assert not torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modality": "sound"}, "'sound' is not one of table, image, sequence, text"),
        ({"modality": "table", "strength": 1.5}, "0..1, not 1.5"),
        ({"modality": "table", "strength": math.nan}, "0..1, not nan"),
        ({"modality": "text"}, "not None of a text"),
        ({"modality": "image", "vocabulary": 9}, "not 9 of a image"),
    ],
)
def test_what_it_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**arguments)  # type: ignore[arg-type]


def test_a_subclass_is_another_augmentation() -> None:
    class Flips(Augment):
        def changed(self, x: Tensor, numbers: Tensor, strength: Tensor) -> Tensor:
            flipped = (numbers[..., 0] < strength).view(-1, 1, 1, 1)
            return torch.where(flipped, x.flip(-1), x)

    x = INPUTS["image"]
    assert torch.equal(Flips("image", 1.0).train()(x), x.flip(-1))
    assert torch.equal(Flips("image", 1.0).eval()(x), x)
