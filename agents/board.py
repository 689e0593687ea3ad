"""What runs write to TensorBoard: the tags with their meanings, and what writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from inner_models.signals import SIGNALS

from .files import ScalarWriter

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_UNITS = {"train_loss": "loss", "val_loss": "loss", "grad_cosine": "-1 to 1", "update_ratio": "ratio"}
_GRADIENT = "loss / parameter"

RUN_TAGS: dict[str, tuple[str, str]] = {
    **{f"inner/{name}": (meaning, _UNITS.get(name, _GRADIENT)) for name, meaning in SIGNALS.items()},
    "control/lr": ("learning rate over the epoch, largest of the parameter groups", "step size"),
    "control/batch_size": ("batch size over the epoch", "examples"),
    "control/weight_decay": ("weight decay over the epoch, largest of the parameter groups", "share per step and lr"),
    "control/dropout": ("dropout over the epoch, largest of the layers", "probability"),
    "control/augmentation": ("strength of the augmentation over the epoch", "share of the largest"),
    "control/label_smoothing": ("label smoothing over the epoch", "share of the target"),
    "control_groups/lr/*": ("the same of each parameter group, where they differ", "step size"),
    "control_groups/weight_decay/*": ("the same of each parameter group, where they differ", "share per step and lr"),
    "policy/reasons": ("why the policy set what it set, at the first epoch that it is for", "text"),
    "result/final_val_loss": ("validation loss at the end", "loss"),
    "result/best_val_loss": ("least validation loss", "loss"),
    "result/test_loss": ("test loss of the weights with the least validation loss", "loss"),
    "result/final_test_loss": ("test loss at the end", "loss"),
}
"""Tag -> meaning, unit, of a run with a tuner or a baseline. The horizontal axis counts epochs from 1."""

META_TRAINING_TAGS: dict[str, tuple[str, str]] = {
    "meta_validation/log_ratio_to_calibrated": (
        "ln(final validation loss of the calibrated schedule / of the policy), interquartile mean over meta-validation "
        "tasks x seeds; above 0 the policy is better; it chooses the policy that is kept",
        "ln",
    ),
    "meta_validation/best_log_ratio_to_calibrated": ("the best of these, at the end", "ln"),
    "meta_validation/return": ("fall of ln(validation loss) over a run, mean over meta-validation tasks x seeds", "ln"),
    "meta_validation_log_ratio/*": ("log_ratio_to_calibrated task by task, mean over seeds", "ln"),
    "inner/final_val_loss": ("validation loss of the inner trainings that ended in the rollout, mean", "loss"),
    "inner/diverged_share": ("share of them that diverged", "0 to 1"),
    "control/*_mean": ("what the policy set, geometric mean over the rollout's inner trainings", "as above"),
    "rollout/ep_rew_mean": ("fall of ln(validation loss) over an inner training, mean over the last 100", "ln"),
    "rollout/ep_len_mean": ("length of an inner training", "intervals"),
    "time/fps": ("speed", "decisions / s"),
    "train/*": ("PPO's own losses and statistics, as stable-baselines3 explains them", "various"),
}
"""Tag -> meaning, unit, of a meta-training. The horizontal axis counts decisions."""

ABOUT = "tags/meanings"
"""Where a run says what its tags mean, as text."""

RUN_RESULTS = tuple(tag for tag in RUN_TAGS if tag.startswith("result/"))
BEST_LOG_RATIO = "meta_validation/best_log_ratio_to_calibrated"

HPARAMS: dict[str, type[str] | type[float]] = {
    "epochs": float, "method": str, "optimizer": str, "seed": float, "task": str,
}  # fmt: skip
"""Columns of the HParams tab that every run fills as far as it can."""

TRAINING_HPARAMS = (
    "timesteps", "cohorts", "replicas", "rollout_steps", "validate_every", "validation_seeds", "epochs", "minibatch",
    "learning_rate", "gae_lambda", "clip", "entropy", "log_std", "averaging", "strength", "workers",
)  # fmt: skip
"""Settings of a meta-training (`MetaTrainingConfig`) that are columns, too, as `training/<name>`: TensorBoard sorts
columns by name and shows the first five until asked for more, which are those of `HPARAMS`."""


def about(tags: Mapping[str, tuple[str, str]], axis: str) -> str:
    """A table of tags, in Markdown."""
    rows = [f"| `{tag}` | {meaning} | {unit} |" for tag, (meaning, unit) in tags.items()]
    return "\n".join(["| tag | meaning | unit |", "|---|---|---|", *rows, "", f"Horizontal axis: {axis}."])


def write_epoch(
    writer: ScalarWriter,
    epoch: int,
    losses: Mapping[str, float],
    values: Mapping[str, float],
    groups: Mapping[str, Sequence[float]],
) -> None:
    """Write what an epoch measured and was trained with.

    Args:
        epoch: counted from 1.
        losses: signal -> value (`inner_models.signals.SIGNALS`).
        values: control -> value.
        groups: control -> its value in every parameter group, as `group_values` has them. Written where they differ.
    """
    scalars = {f"inner/{name}": value for name, value in losses.items()}
    scalars |= {f"control/{name}": value for name, value in values.items()}
    for name, by_group in groups.items():
        if len(set(by_group)) > 1:
            scalars |= {f"control_groups/{name}/{index}": value for index, value in enumerate(by_group)}
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, epoch)


def group_values(optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
    """Learning rate and weight decay of every parameter group."""
    groups = optimizer.param_groups
    return {name: [float(group[name]) for group in groups] for name in ("lr", "weight_decay") if name in groups[0]}


def write_decision(writer: ScalarWriter, epoch: int, reason: str) -> None:
    """Write why a decision was taken, as text. A writer without `add_text` is not told.

    Args:
        epoch: the first that the decision is for, counted from 1: where its values stand on the curves.
    """
    if add_text := getattr(writer, "add_text", None):
        add_text("policy/reasons", reason, epoch)


def write_hparams(
    writer: SummaryWriter, hparams: Mapping[str, str | float], results: Mapping[str, float], step: int
) -> None:
    """Enter a finished run into the HParams tab, and its results into its curves.

    All goes into the run's own event file, where `SummaryWriter.add_hparams` makes a further run. Every run declares
    the same columns, since TensorBoard takes those of whichever run it meets first.

    Args:
        hparams: column (of `HPARAMS`, or `training/` and one of `TRAINING_HPARAMS`) -> value.
        results: tag (of `RUN_RESULTS`, or `BEST_LOG_RATIO`) -> value.
        step: where the results stand on the horizontal axis.

    Raises:
        ValueError: no such column or result.
    """
    from torch.utils.tensorboard.summary import hparams as summaries

    columns = {
        **{name: kind() for name, kind in HPARAMS.items()},
        **{f"training/{name}": 0.0 for name in TRAINING_HPARAMS},
    }
    metrics = dict.fromkeys((*RUN_RESULTS, BEST_LOG_RATIO), 0.0)
    unknown = [name for name in (*hparams, *results) if name not in columns and name not in metrics]
    if unknown:
        raise ValueError(f"no columns of the HParams tab: {', '.join(unknown)}")
    experiment = summaries(columns, metrics)[0]  # type: ignore[no-untyped-call]
    _, start, end = summaries(dict(hparams), {})  # type: ignore[no-untyped-call]
    for tag, value in results.items():
        writer.add_scalar(tag, value, step)
    file = writer._get_file_writer()  # type: ignore[no-untyped-call]
    for summary in (experiment, start, end):
        file.add_summary(summary)
