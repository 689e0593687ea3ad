"""Learning is real on real tasks: the smoke preset (about a minute) improves the policy that it begins with. Of
seed 0, the tutorial's, its test says so."""

from __future__ import annotations

from pathlib import Path

from agents.ppo import Progress, meta_train
from agents.presets import PRESETS


def test_smoke_preset_raises_the_meta_validation_return(tmp_path: Path) -> None:
    returns: list[float] = []

    def report(progress: Progress) -> None:
        if progress.score:
            returns.append(progress.score.mean_return)

    policy = meta_train(PRESETS["smoke"], tmp_path / "run", seed=1, report=report)
    assert len(returns) == 4
    assert returns[-1] > returns[0]
    assert policy.header.scores["mean_return"] >= returns[0]
