"""Emulators: studied tasks as functions of the settings that can be differentiated.

One Gaussian process a task (Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning": Matern 5/2, a
length scale a control). Functions are drawn from its posterior by Matheron's rule, the prior's part of random Fourier
features (Wilson et al. 2020, "Efficiently Sampling Functions from Gaussian Process Posteriors", arXiv:2002.09309). Far
from all trials draws differ, so that whoever learns from many of them cannot count on what nobody has seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hpo_env.base_schedules import calibrated
from hpo_env.hyperparameters import Array

from .meta_dataset import Studied, to_unit

_PRIOR = {"length": 0.7, "amplitude": 0.3, "noise": 0.03}
"""Medians of log-normal priors, whose logarithms have a standard deviation of 1."""

_STEPS, _LR = 80, 0.1

_FOURIER = 256
"""Random features of a draw."""


class Emulators:
    """Posteriors of the scores of several tasks, as functions of their settings.

    Scores are `flattened`. The calibrated schedule's runs count as one more trial, of score 0.

    Args:
        studied: at least 1, with equally many trials.

    Attributes:
        calibrated: settings of the calibrated schedule, `[tasks, controls]`.
        noise: standard deviation of a trial's score about its task's function, `[tasks]`.

    Raises:
        ValueError: no tasks, numbers of trials that differ.
    """

    def __init__(self, studied: Sequence[Studied]) -> None:
        if len(counts := {len(one.runs) for one in studied}) != 1:
            raise ValueError(f"emulators need tasks with equally many trials, not with {sorted(counts) or 'no tasks'}")
        optimizers = [one.task.optimizer for one in studied]
        start = np.stack([to_unit(calibrated(optimizer), optimizer) for optimizer in optimizers])
        trials = np.stack([one.settings for one in studied])
        self._settings = torch.from_numpy(np.concatenate([trials, start[:, None]], axis=1))
        self._scores = torch.from_numpy(np.stack([[*flattened(one.scores), 0.0] for one in studied]))
        self._share = torch.ones(self._scores.shape[1], dtype=torch.float64)  # of a trial's variance
        self._share[-1] /= len(studied[0].calibrated)
        logs = _fitted(self._settings, self._scores, self._share)
        self._length, self._amplitude, noise = (logs[name].exp() for name in _PRIOR)
        self._mean = logs["mean"]
        self._factor = _factor(self._settings, self._length, self._amplitude, noise, self._share)
        self.noise, self.calibrated = noise.float(), torch.from_numpy(start).float()

    def leave_one_out(self) -> tuple[Array, Array]:
        """Predictions of each trial's score from the task's other trials, the length scales and such as they are, and
        their standard deviations (Rasmussen and Williams 2006, eq. 5.12), `[tasks, trials]` each."""
        inverse = torch.cholesky_inverse(self._factor)
        variance = 1 / inverse.diagonal(dim1=1, dim2=2)
        residual = (inverse @ (self._scores - self._mean[:, None])[..., None])[..., 0] * variance
        return (self._scores - residual)[:, :-1].numpy(), variance.sqrt()[:, :-1].numpy()

    def draw(self, tasks: Tensor, generator: torch.Generator, *, spread: float = 1.0) -> Draw:
        """A function for each of `tasks` (indices, `[batch]`).

        Args:
            spread: factor on how far draws lie from the posterior's mean; 0 is the mean itself.
        """
        return Draw(self, tasks, generator, spread)


def flattened(scores: Array) -> Array:
    """Scores above 0 squashed to below 1/2, in order: how bad a bad trial is says little of the good ones."""
    return np.where(scores > 0, np.tanh(2 * scores) / 2, scores)


class Draw:
    """Functions drawn from the posteriors of a batch of tasks."""

    def __init__(self, emulators: Emulators, tasks: Tensor, generator: torch.Generator, spread: float) -> None:
        def own(values: Tensor) -> Tensor:
            return values[tasks].float()

        batch, (_, trials, controls) = len(tasks), emulators._settings.shape
        self._length, self._amplitude, self._mean = (
            own(values) for values in (emulators._length, emulators._amplitude, emulators._mean)
        )
        self._trials = own(emulators._settings) / self._length[:, None]
        # The kernel's spectral density is Student's t with 5 degrees of freedom.
        normal = torch.randn(batch, _FOURIER, controls, generator=generator)
        chi = torch.randn(batch, _FOURIER, 5, generator=generator).square().mean(dim=-1)
        self._frequencies = normal / chi.sqrt()[..., None]
        self._phases = 2 * math.pi * torch.rand(batch, 1, _FOURIER, generator=generator)
        weights = torch.randn(batch, _FOURIER, 1, generator=generator)
        self._weights = spread * self._amplitude[:, None, None] * math.sqrt(2 / _FOURIER) * weights
        noise = own(emulators.noise)[:, None] * emulators._share.sqrt().float()
        noisy = self._prior(self._trials) + spread * noise * torch.randn(batch, trials, generator=generator)
        residual = emulators._scores[tasks] - (self._mean[:, None] + noisy).double()
        self._update = torch.cholesky_solve(residual[..., None], emulators._factor[tasks])[..., 0].float()

    def __call__(self, settings: Tensor) -> Tensor:
        """Scores without noise, `[batch, controls]` to `[batch]`."""
        scaled = (settings / self._length)[:, None]
        near = _matern((scaled - self._trials).square().sum(dim=-1))
        posterior = self._amplitude.square() * (near * self._update).sum(dim=-1)
        return self._mean + self._prior(scaled)[:, 0] + posterior

    def _prior(self, scaled: Tensor) -> Tensor:
        """A draw from the prior, less its mean: `[batch, points, controls]` in length scales to `[batch, points]`."""
        angles = scaled @ self._frequencies.mT + self._phases
        return (angles.cos() @ self._weights)[..., 0]


def _matern(squared: Tensor) -> Tensor:
    """The kernel, at squared distances in length scales."""
    distance = (5 * squared.clamp_min(1e-12)).sqrt()
    return (1 + distance + distance.square() / 3) * (-distance).exp()


def _factor(settings: Tensor, length: Tensor, amplitude: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """Cholesky factors of the covariances of the scores, `[tasks, trials, trials]`."""
    scaled = settings / length[:, None]
    squared = (scaled[:, :, None] - scaled[:, None]).square().sum(dim=-1)
    variance = noise.square()[:, None] * share + 1e-6
    factor: Tensor = torch.linalg.cholesky(
        amplitude.square()[:, None, None] * _matern(squared) + torch.diag_embed(variance)
    )
    return factor


def _fitted(settings: Tensor, scores: Tensor, share: Tensor) -> dict[str, Tensor]:
    """The most probable logarithms of each task's length scales, amplitude and noise, and its mean."""
    tasks, _, controls = settings.shape
    logs = {
        name: torch.full((tasks, controls) if name == "length" else (tasks,), math.log(median), dtype=torch.float64)
        for name, median in _PRIOR.items()
    }
    fitted = {**logs, "mean": scores.mean(dim=1)}
    fitted = {name: value.clone().requires_grad_() for name, value in fitted.items()}
    optimizer = torch.optim.Adam(fitted.values(), _LR)
    decline = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        length, amplitude, noise = (fitted[name].exp() for name in _PRIOR)
        factor = _factor(settings, length, amplitude, noise, share)
        residual = (scores - fitted["mean"][:, None])[..., None]
        white = torch.linalg.solve_triangular(factor, residual, upper=False)
        surprise = sum((fitted[name] - log).square().sum() for name, log in logs.items())
        loss = (white.square().sum() + surprise) / 2 + factor.diagonal(dim1=1, dim2=2).log().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decline.step()
    return {name: value.detach() for name, value in fitted.items()}
