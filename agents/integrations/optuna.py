"""Optuna chooses what the policy does not move, such as the architecture; the tuner does the rest within each trial."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, Self, Unpack

from torch import Tensor
from torch.optim import Optimizer

from ..arguments import TunerArguments
from ..optional import require
from ..policy import ControlPolicy
from ..trajectory import Trajectory
from ..tuner import Tuner, pretrained_path

if TYPE_CHECKING:
    import optuna
else:
    optuna = require("optuna", extra="compare")

ATTRIBUTE = "hyperpilot"
"""The user attribute of a trial that holds its trajectory, as JSON without the decisions."""


class TrialArguments(TunerArguments, total=False):
    """The keyword arguments of `TrialTuner`."""

    trial: Required[optuna.trial.BaseTrial]


class TrialTuner(Tuner):
    """A tuner whose `step` reports the validation loss to an Optuna trial, and ends the trial if it is to be pruned.

    The trajectory is kept with the trial when it ends, for `trajectory_of`.

    Args:
        trial: the trial, of a study that minimizes one objective.
        arguments: those of `Tuner`; `TrialTuner.pretrained(optimizer, trial=trial, ...)` and `load` work as there.

    Raises:
        ValueError: the study does not minimize one objective; and as in `Tuner`.

    Examples:
        >>> def objective(trial):  # doctest: +SKIP
        ...     model = build(width=trial.suggest_int("width", 16, 256, log=True))
        ...     optimizer = torch.optim.AdamW(model.parameters())
        ...     tuner = TrialTuner.pretrained(optimizer, trial=trial, model=model, total_epochs=30)
        ...     for epoch in range(30):
        ...         train_loss, val_loss = train_one_epoch(model, optimizer), validate(model)
        ...         tuner.step(train_loss=train_loss, val_loss=val_loss)
        ...     return val_loss
    """

    def __init__(self, *arguments: Any, trial: optuna.trial.BaseTrial, **named: Any) -> None:
        directions = trial.study.directions if isinstance(trial, optuna.Trial) else []
        if directions and directions != [optuna.study.StudyDirection.MINIMIZE]:
            names = ", ".join(direction.name.lower() for direction in directions)
            raise ValueError(f"the study must minimize one objective, as losses are reported to it, not {names}")
        super().__init__(*arguments, **named)
        self._trial = trial

    # Both take one argument more than the tuner's own.
    @classmethod
    def load(cls, path: Path | str, optimizer: Optimizer, **arguments: Unpack[TrialArguments]) -> Self:  # type: ignore[override]
        return cls(ControlPolicy.load(path), optimizer, **arguments)

    @classmethod
    def pretrained(cls, optimizer: Optimizer, **arguments: Unpack[TrialArguments]) -> Self:  # type: ignore[override]
        return cls.load(pretrained_path(), optimizer, **arguments)

    def step(self, *, train_loss: float | Tensor | None, val_loss: float | Tensor | None = None) -> dict[str, float]:
        """As in `Tuner`. Then reports the epoch's validation loss: nothing if it is None, and if it is not finite NaN,
        which Optuna's pruners leave out of what they compare trials to.

        Raises:
            optuna.TrialPruned: the study's pruner says so; only before the last epoch, and where the loss was measured.
            ValueError: as in `Tuner`.
        """
        values = super().step(train_loss=train_loss, val_loss=val_loss)
        loss = self._epochs[-1]["losses"].get("val_loss")
        if loss is not None:
            self._trial.report(loss if math.isfinite(loss) else math.nan, self.epoch - 1)  # Optuna's steps begin at 0
        last = self.epoch == self.total_epochs
        pruned = loss is not None and not last and self._trial.should_prune()
        if pruned or last:
            self.keep()
        if pruned:
            raise optuna.TrialPruned(f"pruned after epoch {self.epoch}, at a validation loss of {loss:.4g}")
        return values

    def keep(self) -> None:
        """Keep the trajectory with the trial now: for trials that end neither at the last epoch nor by pruning."""
        self._trial.set_user_attr(ATTRIBUTE, replace(self.trajectory, decisions=[]).to_json())


def trajectory_of(trial: optuna.trial.FrozenTrial) -> Trajectory:
    """The trajectory kept with a trial such as `study.best_trial`, for `Replay`; without its decisions.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if ATTRIBUTE not in trial.user_attrs:
        raise ValueError(f"trial {trial.number} has no trajectory: it did not end in TrialTuner.step or with keep()")
    return Trajectory.from_json(trial.user_attrs[ATTRIBUTE])
