"""Task families: many tasks out of one data set, each on a sample of its rows, classes and features."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from inner_models.datasets import Dataset, DatasetError, Split, load_dataset
from inner_models.names import unknown
from inner_models.tasks import DEFAULT_SPECS, Task

FamilyKind = Literal["classification", "regression", "embedding"]

LEAST_ROWS = 300
"""Rows that a member has, if its data set has as many; more where a class would go without."""

MOST_BINS = 5
MOST_CODE = 8


def family(parent: str, kind: FamilyKind, count: int, seed: int = 0, **overrides: Any) -> tuple[Task, ...]:
    """Draw tasks on sub-data sets of `parent` (`inner_models.sub_datasets.Sampling` says how each is made).

    A member has half to all of the features (columns, channels, pixels a side; of a single channel, half to all of its
    steps) and, log-uniformly, `LEAST_ROWS` to all of the rows.

    - classification: two to all of the classes; where the parent is a regression, its target in two to five bins.
    - regression: one feature, predicted from the others; where the parent is a regression, its own target.
    - embedding: an autoencoder on the rows of two to all of the classes. Its code has a quarter as many values as its
      inputs, two to eight.

    Classes and values are predicted by a GRU from sequences and by an MLP from all else, both of the default size.

    Args:
        parent: a data set, but not a text.
        count: members, at least 1; no two are the same.
        seed: of the draw.
        overrides: fields of the tasks.

    Raises:
        DatasetError: `parent` is unknown, not installed or a text.
    """
    if kind not in get_args(FamilyKind):
        raise ValueError(unknown("kind of family", kind, get_args(FamilyKind)))
    if count < 1:
        raise ValueError(f"a family has at least 1 member, not {count}")
    whole = load_dataset(parent)
    if whole.modality == "text":
        raise DatasetError(
            f"{parent!r} is text, without features to choose or predict: take a table, image or sequence"
        )
    rng = np.random.default_rng([zlib.crc32(f"{parent} {kind}".encode()), seed])
    seeds = rng.choice(10_000 + count, count, replace=False)
    return tuple(_member(whole, kind, int(number), rng, overrides) for number in seeds)


def _member(whole: Dataset, kind: FamilyKind, seed: int, rng: np.random.Generator, overrides: dict[str, Any]) -> Task:
    options: dict[str, int] = {}
    classes = whole.outputs if whole.target == "classification" else MOST_BINS if kind == "classification" else 0
    if kind == "regression" and classes:
        options["predict"] = 1
    elif classes:
        options["classes"] = int(rng.integers(2, classes + 1))
    one_channel = whole.modality == "sequence" and whole.input_shape[1] == 1
    size = whole.input_shape[0] if one_channel else min(whole.input_shape[1:] or whole.input_shape)
    if whole.modality == "table":
        size -= options.get("predict", 0)
    options["steps" if one_channel else "features"] = int(rng.integers(-(-size // 2), size + 1))
    sample = load_dataset(_name(whole.name, options, seed))
    least, most = _rows(sample)
    options["rows"] = round(math.exp(rng.uniform(math.log(least), math.log(most))))
    model = DEFAULT_SPECS["gru" if whole.modality == "sequence" else "mlp"]
    if kind == "embedding":
        code = min(max(2, math.prod(sample.input_shape) // 4), MOST_CODE)
        model = replace(DEFAULT_SPECS["autoencoder"], width=8 * code)
    return Task(**{"dataset": _name(whole.name, options, seed), "model": model, **overrides})


def _name(parent: str, options: dict[str, int], seed: int) -> str:
    return f"{parent}:{','.join(f'{option}={value}' for option, value in (options | {'seed': seed}).items())}"


def _rows(sample: Dataset) -> tuple[int, int]:
    """How many rows to take, at least and at most: enough for every class to be in every split."""
    splits: list[Split] = [split for split in (sample.train, sample.val, sample.test) if split is not None]
    there = sum(map(len, splits))
    least = LEAST_ROWS
    if sample.target == "classification":
        rarest = min(int(split.targets.bincount().min()) for split in splits)
        least = max(least, -(-2 * there // rarest))
    return min(least, there), there
