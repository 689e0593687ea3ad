"""Meta-train, meta-validation and meta-test: disjoint in data sets, not only in seeds.

Duplicates stay on one side: digits lies inside optdigits, and both are in meta-train.
"""

from __future__ import annotations

from inner_models.models import ModelKind, ModelSpec
from inner_models.sub_datasets import parent_of
from inner_models.tasks import Task, TaskDistribution

_TABLES = (
    "breast-cancer", "wine", "diabetes", "ames", "diamonds", "magic", "texture", "phoneme", "segment", "vowel",
    "vehicle", "pima", "ionosphere", "banana", "ring", "twonorm", "friedman",
)  # fmt: skip
_TEACHERS = tuple(f"teacher-{number}" for number in range(24))
_FUNCTIONS = tuple(f"function-{number}" for number in range(12))
_IMAGES = ("digits", "optdigits", *(f"images-{number}" for number in range(6)))
_SEQUENCES = (
    "gun-point",
    "osu-leaf",
    "arrow-head",
    "movement-libras",
    "waveforms",
    "xor-sequence",
    "addition-sequence",
)
_TEXTS = tuple(f"markov-text-{number}" for number in range(4))

_TABLE_KINDS: tuple[ModelKind, ...] = ("mlp", "mlp", "mlp", "mlp", "linear", "autoencoder")

META_TRAIN = TaskDistribution(
    entries=(
        *((name, _TABLE_KINDS) for name in _TABLES),
        *((name, _TABLE_KINDS) for name in _TEACHERS),
        *((name, ("mlp", "mlp", "mlp", "linear")) for name in _FUNCTIONS),
        *((name, ("mlp", "cnn", "cnn", "autoencoder")) for name in _IMAGES),
        *((name, ("mlp", "gru", "gru", "transformer")) for name in _SEQUENCES),
        *((name, ("gru", "transformer")) for name in _TEXTS),
    )
)
"""The distribution that agents are trained on."""

META_TRAIN_SMALL = TaskDistribution(
    entries=tuple((name, ("mlp",)) for name in ("digits", *_TABLES[:10], *_TEACHERS[:8])),
    widths=(16, 48),
    depths=(1, 2),
    optimizers=("adamw",),
    horizons=(8, 16),
    examples=(2048, 8192),
    train_rows=(96, 768),
    eval_rows=256,
)
"""A cheap part of it (MLPs on tables, AdamW, short runs), for demonstrations and tests of learning."""

META_VALIDATION: tuple[Task, ...] = (
    Task("satimage", ModelSpec("mlp", 48, 2), horizon=16, interval_examples=1024, train_rows=1500, eval_rows=512),
    Task("spambase", ModelSpec("mlp", 64, 2, "tanh"), horizon=40, interval_examples=512, train_rows=300, eval_rows=512),
    Task("concrete", ModelSpec("mlp", 64, 2, "silu"), horizon=24, interval_examples=512, eval_rows=512),
    Task("marketing", ModelSpec("mlp", 32, 3, "gelu", "layer"), horizon=16, interval_examples=1024, eval_rows=512),
    Task("mnist-5k", ModelSpec("mlp", 32, 1), horizon=20, interval_examples=512, train_rows=1000, eval_rows=512,
         label_noise=0.2),
    Task("satimage", ModelSpec("cnn", 8, 2), horizon=24, interval_examples=512, train_rows=1000, eval_rows=512),
    Task("japanese-vowels", ModelSpec("gru", 24, 1), horizon=16, interval_examples=384, eval_rows=512),
    Task("sunspot-month", ModelSpec("gru", 16, 1), horizon=12, interval_examples=512, eval_rows=256),
    Task("japanese-vowels", ModelSpec("transformer", 16, 1), horizon=16, interval_examples=256, eval_rows=512),
    Task("spambase", ModelSpec("mlp", 48, 2), "sgd", horizon=16, interval_examples=1024, eval_rows=512),
)  # fmt: skip
"""The tasks that decide between checkpoints and designs: other data sets, fixed sizes."""

META_VALIDATION_SMALL: tuple[Task, ...] = tuple(
    Task(name, ModelSpec("mlp", 32, 2), horizon=12, interval_examples=512, train_rows=rows, eval_rows=512)
    for name, rows in (("satimage", 512), ("spambase", 256), ("concrete", 384), ("marketing", 512))
)
"""The same for demonstrations."""

META_TEST: tuple[Task, ...] = (
    Task.named("fashion-mnist/cnn", interval_examples=512, eval_rows=512),
    Task.named("pydoc-topics/transformer", interval_examples=512, eval_rows=256),
    Task.named("deliveries/mlp"),
    Task.named("italy-power-demand/gru"),
    Task.named("letter/mlp"),
    Task.named("mnist1d/mlp"),
)
"""Tasks that are run once per shipped policy: 30 intervals, each an epoch but for the two costly models. Their data
sets appear in no other split."""


def datasets_of(split: TaskDistribution | tuple[Task, ...]) -> frozenset[str]:
    """The data sets of a split. A sub-data set counts as the one that its rows come from."""
    if isinstance(split, TaskDistribution):
        return frozenset(parent_of(name) for name, _ in split.entries)
    return frozenset(parent_of(task.dataset) for task in split)
