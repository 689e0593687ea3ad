"""Procedural data sets: a `number` fixes the problem, `rng` the sample.

Each generator returns inputs `[rows, *input_shape]` and targets, in the forms that `inner_models.datasets` takes from
any source: integer classes `[rows]`, integer tokens `[rows, length]` or numbers `[rows, outputs]`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[Any]
Sample = tuple[Array, Array]


def teacher(number: int, rng: Generator) -> Sample:
    """Labels of a random tanh network, some of them wrong."""
    problem = np.random.default_rng([1, number])
    features, classes, rows = problem.integers(10, 61), problem.integers(2, 11), problem.integers(600, 3001)
    hidden = problem.normal(size=(features, 16)) * 2 / np.sqrt(features)
    readout, noise = problem.normal(size=(16, classes)), problem.uniform(0, 0.3)
    inputs = rng.normal(size=(rows, features))
    logits = np.tanh(inputs @ hidden) @ readout
    labels = ((logits - logits.mean(axis=0)) / logits.std(axis=0)).argmax(axis=1)  # no class starves
    labels = np.where(rng.random(rows) < noise, rng.integers(classes, size=rows), labels)
    return inputs, np.unique(labels, return_inverse=True)[1]  # numbered without gaps


def function(number: int, rng: Generator) -> Sample:
    """Values of a random tanh network of some of the inputs, in noise of constant or of varying size, some of it wild.

    Inputs are mixtures of independent ones, heavy-tailed in every other problem, beside 0/1 columns.
    """
    problem = np.random.default_rng([5, number])
    features, rows = int(problem.integers(6, 31)), int(problem.integers(1000, 8001))
    relevant = int(problem.integers(3, features + 1))
    mixing = np.eye(features) + problem.normal(size=(features, features)) * 0.5 / np.sqrt(features)
    hidden = problem.normal(size=(relevant, 24)) * problem.uniform(0.7, 2.0) / np.sqrt(relevant)
    readout, noise = problem.normal(size=24), math.exp(problem.uniform(math.log(0.05), math.log(1.0)))
    binary = problem.random(features) < 0.3
    wild, uneven = number % 2 == 1, problem.random() < 0.5
    inputs = rng.normal(size=(rows, features)) @ mixing
    if wild:
        inputs = np.sinh(inputs)
    inputs = np.where(binary, inputs > 0, inputs)
    signal = np.tanh(inputs[:, :relevant] @ hidden) @ readout
    size = noise * signal.std() * (np.exp(0.7 * inputs[:, 0].clip(-2, 2)) if uneven else 1.0)
    error = rng.standard_t(3, size=rows) / math.sqrt(3) if wild else rng.normal(size=rows)
    return inputs, (signal + size * error)[:, None]


def friedman(rng: Generator) -> Sample:
    from sklearn.datasets import make_friedman1

    inputs, targets = make_friedman1(2000, noise=1.0, random_state=int(rng.integers(2**31)))
    return inputs, targets[:, None]


def _smoothing(size: int, width: float) -> Array:
    """[size, size] Gaussian smoothing that keeps white noise at unit variance."""
    kernel = np.exp(-0.5 * np.square(np.subtract.outer(np.arange(size), np.arange(size)) / width))
    return np.asarray(kernel / np.linalg.norm(kernel, axis=1, keepdims=True))


def mnist1d(rng: Generator) -> Sample:
    """After MNIST-1D (Greydanus and Kobak, 2024): ten templates, moved, stretched, scaled, sheared, in smooth noise."""
    rows, steps = 5000, 40
    templates = np.random.default_rng(2).normal(size=(10, 12)) @ _smoothing(12, 1.2).T
    labels = rng.integers(10, size=rows)
    width = rng.uniform(18, 30, size=(rows, 1))
    position = (np.arange(steps) - rng.uniform(0, steps - width)) / width * 11
    left = np.clip(np.floor(position).astype(np.int64), 0, 10)
    shape = templates[labels[:, None], left] * (left + 1 - position)
    shape += templates[labels[:, None], left + 1] * (position - left)
    shape = np.where((position < 0) | (position > 11), 0, shape) * rng.normal(1, 0.25, size=(rows, 1))
    shear = rng.uniform(-0.75, 0.75, size=(rows, 1)) * np.linspace(-1, 1, steps)
    noise = 0.25 * rng.normal(size=(rows, steps)) @ _smoothing(steps, 1.0).T
    return (shape + shear + noise)[:, :, None], labels


def _marked_pair(rows: int, steps: int, rng: Generator) -> tuple[Array, Array]:
    """[rows, steps] markers, 1 at two places, and the two places [rows, 2]."""
    places = rng.random((rows, steps)).argsort(axis=1)[:, :2]
    markers = np.zeros((rows, steps))
    np.put_along_axis(markers, places, 1, axis=1)
    return markers, places


def xor(rng: Generator) -> Sample:
    """Parity of the two marked bits."""
    bits = rng.integers(2, size=(4000, 14))
    markers, places = _marked_pair(4000, 14, rng)
    return np.stack([bits, markers], axis=2), np.take_along_axis(bits, places, axis=1).sum(axis=1) % 2


def addition(rng: Generator) -> Sample:
    """Sum of the two marked numbers (Hochreiter and Schmidhuber, 1997)."""
    numbers = rng.random((4000, 20))
    markers, places = _marked_pair(4000, 20, rng)
    return np.stack([numbers, markers], axis=2), np.take_along_axis(numbers, places, axis=1).sum(1)[:, None]


def waveforms(rng: Generator) -> Sample:
    """Which of six frequencies is the strongest, at any phase, among weaker ones and noise."""
    rows = 3000
    labels, time = rng.integers(6, size=rows), np.arange(32) / 32
    frequency = np.column_stack([2 + 1.5 * labels, rng.uniform(1, 12, size=(rows, 2))])
    amplitude = np.array([1.0, 0.5, 0.5]) * rng.uniform(0.7, 1.3, size=(rows, 3))
    phase = rng.uniform(0, 2 * np.pi, size=(rows, 3))
    waves = amplitude[:, :, None] * np.sin(2 * np.pi * frequency[:, :, None] * time + phase[:, :, None])
    return (waves.sum(axis=1) + 0.3 * rng.normal(size=(rows, 32)))[:, :, None], labels


def markov_text(number: int, rng: Generator, *, length: int) -> Sample:
    """Windows of `length` tokens of an order-2 Markov chain; each pair of symbols has at most four successors."""
    problem = np.random.default_rng([3, number])
    symbols, rows = int(problem.integers(20, 41)), 3000
    successors = problem.integers(symbols, size=(symbols, symbols, 4))
    chances = problem.dirichlet(np.full(4, 0.5), size=(symbols, symbols)).cumsum(axis=2)
    text = list(rng.integers(symbols, size=(2, rows)))
    for _ in range(7 + length + 1):  # the first steps only forget the start
        choice = (rng.random((rows, 1)) > chances[text[-2], text[-1]]).sum(axis=1).clip(max=3)
        text.append(successors[text[-2], text[-1], choice])
    windows = np.stack(text[-length - 1 :], axis=1)
    return windows[:, :-1], windows[:, 1:]


def images(number: int, rng: Generator) -> Sample:
    """Random blob templates, one a class, shifted and faded in noise."""
    problem = np.random.default_rng([4, number])
    size, classes, rows = 8 + 4 * (number % 2), problem.integers(4, 11), problem.integers(1500, 4001)
    smoothing, noise, shift = _smoothing(size, problem.uniform(0.8, 1.6)), problem.uniform(0.8, 2.0), 1 + number % 2
    templates = smoothing @ problem.normal(size=(classes, size, size)) @ smoothing.T
    labels = rng.integers(classes, size=rows)
    down, right = (np.arange(size) + rng.integers(-shift, shift + 1, size=(2, rows, 1))) % size
    images = templates[labels[:, None, None], down[:, :, None], right[:, None, :]] * rng.uniform(0.5, 1.5, (rows, 1, 1))
    return (images + noise * rng.normal(size=images.shape))[:, None], labels
