"""Emulators: posteriors as the textbook has them, draws that follow them, predictions of what was left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agents.emulators import Emulators, flattened
from hpo_env.hyperparameters import Array
from tests.studied import bowl, studied

CENTERS = (np.full(4, 0.3), np.array([0.7, 0.2, 0.5, 0.5]))


@pytest.fixture(scope="module")
def emulators() -> Emulators:
    return Emulators([studied(bowl(center)) for center in CENTERS])


def textbook(emulators: Emulators, task: int, trials: list[int], place: Array) -> tuple[float, float]:
    """Mean and standard deviation of a task's function at `place`, given some of its trials (the last is the calibrated
    schedule's), by Rasmussen and Williams 2006, eqs. 2.25 and 2.26."""
    length, amplitude, mean = (
        value[task].numpy() for value in (emulators._length, emulators._amplitude, emulators._mean)
    )

    def kernel(one: Array, other: Array) -> Array:
        distance = math.sqrt(5) * np.linalg.norm((one[:, None] - other[None]) / length, axis=-1)
        return np.asarray(amplitude**2 * (1 + distance + distance**2 / 3) * np.exp(-distance))

    x, y = emulators._settings[task].numpy()[trials], emulators._scores[task].numpy()[trials]
    shares = np.where(np.array(trials) == emulators._settings.shape[1] - 1, 1 / 3, 1.0)
    covariance = kernel(x, x) + np.diag(float(emulators.noise[task]) ** 2 * shares + 1e-6)
    near = np.linalg.solve(covariance, kernel(x, place[None]))[:, 0]
    return float(mean + near @ (y - mean)), float(np.sqrt(amplitude**2 - near @ kernel(x, place[None])[:, 0]))


def test_draws_follow_the_posterior(emulators: Emulators) -> None:
    count = 4000
    every = list(range(emulators._settings.shape[1]))
    places = np.array([[0.31, 0.3, 0.3, 0.3], [0.95, 0.95, 0.05, 0.95]])
    for task in range(2):
        tasks = torch.full((count,), task)
        function = emulators.draw(tasks, torch.Generator().manual_seed(0))
        for place in places:
            values = function(torch.tensor(place).float().expand(count, -1)).double().numpy()
            mean, std = textbook(emulators, task, every, place)
            assert values.mean() == pytest.approx(mean, abs=5 * std / math.sqrt(count) + 1e-3)
            assert values.std() == pytest.approx(std, rel=0.1)


def test_no_spread_is_the_mean(emulators: Emulators) -> None:
    function = emulators.draw(torch.tensor([1, 0]), torch.Generator().manual_seed(0), spread=0.0)
    place = np.array([0.4, 0.6, 0.2, 0.8])
    expected = [textbook(emulators, task, list(range(25)), place)[0] for task in (1, 0)]
    assert function(torch.tensor(place).float().expand(2, -1)).tolist() == pytest.approx(expected, abs=1e-4)


def test_the_mean_is_near_the_true_function(emulators: Emulators) -> None:
    """And so are its derivatives, which learning follows."""
    rng = np.random.default_rng(0)
    places = torch.tensor(rng.uniform(0.1, 0.9, (200, 4))).float().requires_grad_()
    for task, center in enumerate(CENTERS):
        tasks = torch.full((200,), task)
        values = emulators.draw(tasks, torch.Generator().manual_seed(0), spread=0.0)(places)
        reference = np.square(emulators.calibrated[task].numpy() - center).sum()
        true = flattened(np.square(places.detach().numpy() - center).sum(axis=1) - reference)
        assert np.corrcoef(values.detach().numpy(), true)[0, 1] > 0.93
        (slopes,) = torch.autograd.grad(values.sum(), places)
        towards = torch.tensor(center).float() - places.detach()
        assert (torch.cosine_similarity(-slopes, towards, dim=1) > 0).float().mean() > 0.9


def test_leave_one_out_is_as_if_the_trial_had_not_been(emulators: Emulators) -> None:
    mean, std = emulators.leave_one_out()
    assert mean.shape == std.shape == (2, 24)
    for task, trial in ((0, 0), (1, 7), (1, 23)):
        others = [other for other in range(25) if other != trial]
        expected, doubt = textbook(emulators, task, others, emulators._settings[task, trial].numpy())
        assert mean[task, trial] == pytest.approx(expected, abs=1e-5)
        noise = float(emulators.noise[task]) ** 2 + 1e-6
        assert std[task, trial] == pytest.approx(math.sqrt(doubt**2 + noise), rel=1e-4)


def test_noise_and_length_scales_are_those_of_the_trials() -> None:
    """A control that does not matter has a long length scale, and noisy trials are known for such."""
    rng = np.random.default_rng(0)

    def emulator(noise: float) -> Emulators:
        def loss(places: Array) -> Array:
            return np.exp(np.sin(6 * places[..., 0]) / 4 + noise * rng.normal(size=places.shape[:-1]))

        return Emulators([studied(loss, trials=48)])

    clean, noisy = emulator(0.0), emulator(0.1)
    assert clean._length[0].argmin() == 0
    assert clean.noise[0] < 0.03
    assert 0.06 < noisy.noise[0] < 0.15


def test_flattened_keeps_order_and_what_is_good() -> None:
    scores = np.array([-3.0, -0.1, 0.0, 0.01, 0.5, 1.0])
    flat = flattened(scores)
    assert flat[:3].tolist() == scores[:3].tolist()
    assert (np.diff(flat) > 0).all()
    assert flat[3] == pytest.approx(0.01, rel=1e-3)
    assert flat[-1] < 0.5


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="equally many trials, not with no tasks"):
        Emulators([])
    with pytest.raises(ValueError, match=r"not with \[4, 5\]"):
        Emulators([studied(bowl(CENTERS[0]), trials=trials) for trials in (4, 5)])
