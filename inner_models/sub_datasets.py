"""Sub-data sets: a sample of a data set's rows, classes and features, as a data set of its own.

The name says it all: `letter:classes=5,features=8,rows=600,seed=3` is 600 rows of five of letter's classes, with eight
of its columns. Rows stay in the split that they are in: no test row of a data set is a training row of its samples.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from inner_models.names import unknown

Array = NDArray[Any]

LEVELS = 5
"""Different values that a feature needs to be predicted, none of them in more than half of the training rows."""

_MODALITIES = {
    "classes": ("table", "image", "sequence"),
    "features": ("table", "image", "sequence"),
    "steps": ("sequence",),
    "predict": ("table", "image", "sequence"),
}
"""What data an option is for; the others are for all."""


def parent_of(name: str) -> str:
    """The data set that a sub-data set is a sample of; any other name as it is."""
    parent, _, options = name.rpartition(":")
    return parent if "=" in options else name


@dataclass(frozen=True)
class Sampling:
    """What a sub-data set has of its parent; all where None.

    Each option has its own stream of `seed`: the same classes and features come with other `rows`, and a smaller number
    of classes, columns or channels is part of a larger one.

    Attributes:
        classes: this many classes, numbered anew in their old order. Of a regression: its target in so many bins of
            equal frequency, with edges from the training rows (Dougherty et al. 1995, "Supervised and Unsupervised
            Discretization of Continuous Features").
        features: columns of a table, channels of a sequence, or the side of a square region of an image.
        steps: a window of a sequence. Where series are padded in front, an early one may hold little else.
        predict: features that are held out and predicted from the others, a regression: columns of a table; pixels of
            an image (of one channel each), blanked in the inputs; of a sequence the last step of channels, of which
            the inputs are the steps before (one-step-ahead forecasting). Only what varies is drawn (`LEVELS`).
        rows: rows of all three splits together, in their proportions. Classes keep their shares.
        seed: of the sample. The split remains a matter of the task's own seed.
    """

    classes: int | None = None
    features: int | None = None
    steps: int | None = None
    predict: int | None = None
    rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("classes", 2), ("features", 1), ("steps", 1), ("predict", 1), ("rows", 3), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")

    @classmethod
    def parse(cls, options: str) -> Self:
        """Read what stands behind the colon of a name, `classes=5,seed=3`.

        Raises:
            ValueError: an option that is unknown (the message suggests the nearest), given twice, or not a number.
        """
        known = [field.name for field in fields(cls)]
        values: dict[str, int] = {}
        for option in options.split(","):
            name, _, value = option.partition("=")
            if name not in known:
                raise ValueError(unknown("option", name, known))
            if name in values:
                raise ValueError(f"{name} is given twice")
            if not (value.isascii() and value.isdecimal()):
                raise ValueError(f"{name} must be a whole number, such as {name}=5, not {value!r}")
            values[name] = int(value)
        return cls(**values)

    def apply(self, modality: str, inputs: Array, targets: Array, parts: Array) -> tuple[Array, Array, Array]:
        """Draw the sample. Rows keep their order, and values their scale.

        Args:
            inputs: `[rows, *input_shape]`.
            targets: `[rows]` classes, `[rows, outputs]` floats or `[rows, length]` tokens.
            parts: `[rows]`, 0 train, 1 val, 2 test.

        Returns:
            The same three of the sub-data set.

        Raises:
            ValueError: an option that is not for such data, more than there is of something, or a split without rows,
                be it of one class.
        """
        for name, modalities in _MODALITIES.items():
            if getattr(self, name) is not None and modality not in modalities:
                raise ValueError(f"{name} is for {', '.join(modalities)} data, not for {modality}: leave it out")
        if self.classes is not None:
            if targets.ndim == 1:
                inputs, targets, parts = self._of_classes(inputs, targets, parts, self.classes)
            else:
                targets = _binned(targets, parts == 0, self.classes)
        if modality != "table":  # pixels and channels are held out of the region
            inputs = self._narrowed(modality, inputs)
        if self.predict is not None:
            inputs, targets = self._held_out(modality, inputs, parts == 0, self.predict)
        if modality == "table":  # columns out of all: few may vary
            inputs = self._narrowed(modality, inputs)
        classes = int(targets.max()) + 1 if targets.ndim == 1 else 0
        if self.rows is not None:
            rows = self._rows(targets, parts, self.rows)
            inputs, targets, parts = inputs[rows], targets[rows], parts[rows]
        _check_rows(targets, parts, classes)
        return inputs, targets, parts

    def _rng(self, option: str) -> np.random.Generator:
        return np.random.default_rng([zlib.crc32(option.encode()), self.seed])

    def _of_classes(self, inputs: Array, targets: Array, parts: Array, count: int) -> tuple[Array, Array, Array]:
        there = int(targets.max()) + 1
        _check("classes", count, there)
        chosen = np.sort(self._rng("classes").permutation(there)[:count])
        kept = np.isin(targets, chosen)
        return inputs[kept], np.searchsorted(chosen, targets[kept]), parts[kept]

    def _narrowed(self, modality: str, inputs: Array) -> Array:
        if self.steps is not None:
            inputs = _window(inputs, 1, "steps", self.steps, self._rng("steps"))
        if self.features is None:
            return inputs
        rng = self._rng("features")
        if modality == "image":
            for axis in (2, 3):
                inputs = _window(inputs, axis, "features", self.features, rng)
            return inputs
        _check("features", self.features, inputs.shape[-1])
        return inputs[..., np.sort(rng.permutation(inputs.shape[-1])[: self.features])]

    def _held_out(self, modality: str, inputs: Array, train: Array, count: int) -> tuple[Array, Array]:
        """The inputs without some features, and these, `[rows, count]`."""
        columns = inputs[:, -1] if modality == "sequence" else inputs.reshape(len(inputs), -1)
        drawn = self._rng("predict").permutation(columns.shape[1])
        held = list(islice((column for column in drawn if _varies(columns[train, column])), count))
        _check("predict", count, len(held), " that vary enough")
        targets = columns[:, held]
        if modality == "table":
            inputs = np.delete(inputs, held, axis=1)
        elif modality == "sequence":
            inputs = inputs[:, :-1]
        else:
            inputs = np.where(np.isin(np.arange(columns.shape[1]), held), 0, columns).reshape(inputs.shape)
        if not inputs[0].size:
            raise ValueError(f"predict={count} leaves nothing to predict from: take fewer")
        return inputs, targets

    def _rows(self, targets: Array, parts: Array, count: int) -> Array:
        """The rows to keep: of each split, in random order class by class, every so many-th."""
        _check("rows", count, len(parts))
        rng = self._rng("rows")
        until = np.cumsum([0, *np.bincount(parts, minlength=3)])
        kept: list[Array] = []
        for part, wanted in enumerate(np.diff(np.rint(count * until / len(parts)).astype(np.int64))):
            rows = rng.permutation(np.flatnonzero(parts == part))
            if targets.ndim == 1:
                rows = rows[np.argsort(targets[rows], kind="stable")]
            kept.append(rows[np.arange(wanted) * len(rows) // max(wanted, 1)])
        return np.sort(np.concatenate(kept))


def _check(option: str, wanted: int, there: int, which: str = "") -> None:
    if wanted > there:
        raise ValueError(f"{option}={wanted}, but there are {there}{which}: take no more")


def _window(inputs: Array, axis: int, option: str, length: int, rng: np.random.Generator) -> Array:
    _check(option, length, inputs.shape[axis])
    start = int(rng.integers(inputs.shape[axis] - length + 1))
    return np.take(inputs, range(start, start + length), axis)


def _binned(targets: Array, train: Array, bins: int) -> Array:
    if targets.shape[1] > 1:
        raise ValueError(f"classes are bins of a single target, but there are {targets.shape[1]}: leave them out")
    edges = np.quantile(targets[train, 0], np.arange(1, bins) / bins)
    return np.searchsorted(edges, targets[:, 0], side="right")


def _varies(values: Array) -> bool:
    counts = np.unique(values, return_counts=True)[1]
    return len(counts) >= LEVELS and bool(counts.max() <= len(values) / 2)


def _check_rows(targets: Array, parts: Array, classes: int) -> None:
    for part, split in enumerate(("training", "validation", "test")):
        own = targets[parts == part]
        lacking = np.setdiff1d(np.arange(classes), own)
        if not len(own) or len(lacking):
            of = f" of class {lacking[0]}" if len(lacking) else ""
            raise ValueError(f"no {split} row{of} is left: take more rows, fewer classes or another seed")
