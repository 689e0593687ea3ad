"""`TrialTuner`: a tuner that reports to an Optuna trial; and the example that searches an architecture with it."""

from __future__ import annotations

import importlib
import math
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agents.replay import Replay
from tests.tiny import random_policy
from tests.user_runs import ROWS, Loop

optuna = pytest.importorskip("optuna")

from agents.integrations.optuna import ATTRIBUTE, TrialTuner, trajectory_of  # noqa: E402
from scripts.examples import optuna_architecture  # noqa: E402

ROOT = Path(__file__).parents[3]
EPOCHS = 4


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


class AfterFirst(optuna.pruners.BasePruner):  # type: ignore[misc, name-defined]
    """Prunes every trial but the first, as soon as it is asked."""

    def prune(self, study: Any, trial: Any) -> bool:
        return bool(trial.number)


def tuner_for(trial: Any, run: Loop, **arguments: Any) -> TrialTuner:
    settings = {"model": run.model, "total_epochs": EPOCHS, "examples_per_epoch": ROWS, **arguments}
    return TrialTuner(random_policy(scale=0.3), run.optimizer, trial=trial, **settings)


def train(tuner: TrialTuner, run: Loop, epochs: int = EPOCHS) -> list[float]:
    losses = []
    for epoch in range(epochs):
        train_loss, val_loss = run.epoch(epoch)
        losses.append(val_loss)
        tuner.step(train_loss=train_loss, val_loss=val_loss)
    return losses


def test_losses_are_intermediate_values() -> None:
    study, run = optuna.create_study(pruner=AfterFirst()), Loop()
    trial = study.ask()
    tuner = tuner_for(trial, run)
    losses = train(tuner, run)
    study.tell(trial, losses[-1])
    assert study.trials[0].intermediate_values == dict(enumerate(losses))
    assert tuner.epoch == EPOCHS


def test_pruned_trials_end_at_once() -> None:
    """Before the last epoch; and the trajectory of what was trained is kept."""
    study, last = optuna.create_study(pruner=AfterFirst()), []

    def objective(trial: Any) -> float:
        run = Loop()
        tuner = tuner_for(trial, run)
        try:
            return train(tuner, run)[-1]
        finally:
            last.append(tuner.epoch)

    study.optimize(objective, n_trials=3)
    states = [trial.state.name for trial in study.trials]
    assert (states, last) == (["COMPLETE", "PRUNED", "PRUNED"], [EPOCHS, 1, 1])
    assert [trajectory_of(trial).epochs for trial in study.trials] == last


def test_a_trained_trial_is_not_pruned() -> None:
    study = optuna.create_study(pruner=AfterFirst())
    study.add_trial(optuna.trial.create_trial(value=1.0))
    run = Loop()
    tuner = tuner_for(study.ask(), run, total_epochs=1)
    assert len(train(tuner, run, epochs=1)) == 1


def test_losses_that_are_missing_or_not_finite() -> None:
    """One that is None is not reported, nor is pruning asked for; one that is not finite is NaN."""
    study, run = optuna.create_study(pruner=AfterFirst()), Loop()
    study.add_trial(optuna.trial.create_trial(value=1.0))
    trial = study.ask()
    tuner = tuner_for(trial, run)
    tuner.step(train_loss=1.0)
    with pytest.raises(optuna.TrialPruned, match=r"epoch 2.*inf"):
        tuner.step(train_loss=1.0, val_loss=math.nan)
    ((step, value),) = study.trials[1].intermediate_values.items()
    assert step == 1
    assert math.isnan(value)
    assert trajectory_of(study.trials[1]).losses["val_loss"] == [None, None]


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_divergence_with_optunas_own_pruners() -> None:
    """They prune trials that diverge, which are not taken for good ones, nor make bad ones pass."""
    for pruner in (
        optuna.pruners.MedianPruner(n_startup_trials=4),
        optuna.pruners.SuccessiveHalvingPruner(reduction_factor=2),
        optuna.pruners.HyperbandPruner(max_resource=EPOCHS),
    ):
        study = optuna.create_study(pruner=pruner, sampler=optuna.samplers.TPESampler(seed=0))
        for level in (0.2, 0.1, math.inf, math.nan, math.inf, 5.0):
            trial = study.ask()
            tuner = tuner_for(trial, Loop(), guard=False)
            try:
                for epoch in range(EPOCHS):
                    tuner.step(train_loss=1.0, val_loss=level / (1 + epoch))
                study.tell(trial, 1e9 if math.isnan(level) else level)
            except optuna.TrialPruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        assert study.best_trial.number == 1
        if not isinstance(pruner, optuna.pruners.HyperbandPruner):  # some of its brackets prune late
            assert [trial.state.name for trial in study.trials][-2:] == ["PRUNED", "PRUNED"]


def test_the_best_trial_is_replayed() -> None:
    study, run = optuna.create_study(), Loop()
    trial = study.ask()
    expected = tuner_for(trial, run)
    losses = train(expected, run)
    study.tell(trial, losses[-1])

    trajectory = trajectory_of(study.best_trial)
    assert trajectory.values == expected.trajectory.values
    assert trajectory.decisions == []  # they may be too long for a data base
    again = Loop()
    replay = Replay(trajectory, again.optimizer, model=again.model, total_epochs=EPOCHS)
    for epoch, loss in enumerate(losses):
        assert again.epoch(epoch)[1] == loss
        replay.step()


def test_trials_that_end_otherwise_keep_what_they_are_told_to() -> None:
    study, run = optuna.create_study(), Loop()
    trial = study.ask()
    tuner = tuner_for(trial, run)
    train(tuner, run, epochs=2)
    with pytest.raises(ValueError, match=r"trial 0 has no trajectory.*keep\(\)"):
        trajectory_of(study.trials[0])
    tuner.keep()
    assert trajectory_of(study.trials[0]).epochs == 2
    trial.set_user_attr(ATTRIBUTE, "{}")
    with pytest.raises(ValueError, match="cannot be used as a trajectory"):
        trajectory_of(study.trials[0])


def test_a_resumed_trial_goes_on_where_it_was() -> None:
    """The same trial, taken up by another process: steps are epochs of the run, and none is reported twice."""
    study, run = optuna.create_study(), Loop()
    trial = study.ask()
    first = tuner_for(trial, run)
    losses = train(first, run, epochs=2)
    second = tuner_for(optuna.trial.Trial(study, trial._trial_id), run)
    second.load_state_dict(first.state_dict())
    for epoch in (2, 3):
        losses.append(run.epoch(epoch)[1])
        second.step(train_loss=1.0, val_loss=losses[-1])
    assert study.trials[0].intermediate_values == dict(enumerate(losses))
    assert trajectory_of(study.trials[0]).epochs == EPOCHS


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"]])
def test_a_study_that_does_not_minimize_one_loss(directions: list[str]) -> None:
    run = Loop()
    before = run.settings()
    with pytest.raises(ValueError, match=f"must minimize one objective.*{', '.join(directions)}"):
        tuner_for(optuna.create_study(directions=directions).ask(), run)
    assert run.settings() == before


def test_a_fixed_trial() -> None:
    """To train a chosen architecture once more, outside of any study."""
    run = Loop()
    trial = optuna.trial.FixedTrial({"width": 8})
    train(tuner_for(trial, run), run)
    assert ATTRIBUTE in trial.user_attrs


def test_pretrained() -> None:
    run, trial = Loop(), optuna.create_study().ask()
    tuner = TrialTuner.pretrained(run.optimizer, trial=trial, model=run.model, total_epochs=8)
    tuner.step(train_loss=1.0, val_loss=0.5)
    assert trial.study.trials[0].intermediate_values == {0: 0.5}


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "agents.integrations.optuna")
    with pytest.raises(ImportError, match=r"optuna is not installed; pip install 'hyperpilot\[compare\]'"):
        importlib.import_module("agents.integrations.optuna")


def test_the_example() -> None:
    study = optuna_architecture.search(seed=0, trials=3, epochs=4, pruner=AfterFirst())
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    for trial in study.trials:
        trajectory = trajectory_of(trial)
        assert list(trial.intermediate_values.values()) == trajectory.losses["val_loss"]
    assert study.best_value == study.best_trial.intermediate_values[3]


def test_the_example_is_better_than_its_constant_default() -> None:
    """The same architectures, the same epochs."""
    best = {}
    for tuned in (True, False):
        study = optuna_architecture.search(0, tuned, trials=2, epochs=8, pruner=optuna.pruners.NopPruner())
        best[tuned] = study.best_value
    assert best[True] < best[False]


def test_the_page() -> None:
    """The code of docs/optuna.md runs, but for the number of trials as it stands."""
    blocks = re.findall(r" *```python\n(.*?)```", (ROOT / "docs" / "optuna.md").read_text(), re.DOTALL)

    def build(width: int, depth: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.Dropout(0.1), nn.Linear(width, 2))

    loader = DataLoader(TensorDataset(torch.zeros(64)), batch_size=32)
    names: dict[str, Any] = {"torch": torch, "build": build, "loader": loader, "train_loss": 1.0, "val_loss": 1.0}
    for block in blocks:
        exec(textwrap.dedent(block).replace("n_trials=50", "n_trials=2"), names)
    assert len(blocks) == 2
    assert len(names["study"].trials) == 2
    assert names["replay"].total_epochs == 100
