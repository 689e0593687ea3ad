"""One policy out of several: the mean of their actions, scored on meta-validation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from agents.mean_policy import mean_policy
from agents.meta_validation import MetaValidation, validation_seeds
from agents.policy import ControlPolicy
from agents.ppo import POLICY_FILE
from agents.presets import PRESETS
from scripts.common import (
    Quiet,
    check_device,
    check_out,
    console,
    known,
    progress_bar,
    recorded,
    run_main,
    write_config,
)


@dataclass
class Config(Quiet):
    """Make the mean of several policies, such as those of one preset with several seeds.

    Its actions are the means of theirs. Needs the packages of the extra `data`. Leaves policy.safetensors, with its
    score on the preset's meta-validation; that takes half a minute for each of them and for the mean.

        python scripts/average_policies.py --policies a/policy.safetensors b/policy.safetensors --out runs/mean
    """

    policies: tuple[Path, ...]
    """Policy files, at least two."""
    out: Path
    """Folder for policy.safetensors and config.json."""
    strength: float = 1.0
    """Share of the mean's actions that is taken from the second decision on, 0..1; the members' own does not count."""
    preset: str = "default"
    """Whose meta-validation tasks to score it on: smoke, demo or default."""
    device: str = "cpu"
    """Where the inner models train: cpu or cuda."""


def main(config: Config) -> None:
    preset = PRESETS[known("preset", config.preset, list(PRESETS))]
    check_device(config.device)
    members = [ControlPolicy.load(path) for path in config.policies]
    policy = mean_policy(members, config.strength)
    check_out(config.out)
    write_config(config.out, "average_policies", config)
    validate = MetaValidation(preset.validation, validation_seeds(preset.validation_seeds), device=config.device)
    scores = []
    with progress_bar("meta-validation", len(members) + 1) as update:
        for done, one in enumerate([*members, policy], start=1):
            scores.append(validate(one))
            update(done, f"log ratio to calibrated {scores[-1].log_ratio_iqm:+.4f}")
    training = {**policy.header.training, "command": command(config)}
    told = {"timesteps": policy.header.training["timesteps"], **validate.told(scores[-1])}
    policy.header = replace(policy.header, training=training, scores=told)
    policy.save(config.out / POLICY_FILE)
    for name, score in zip([*map(str, config.policies), "their mean"], scores, strict=True):
        console.print(f"{name}: log ratio to calibrated {score.log_ratio_iqm:+.4f}", soft_wrap=True)
    console.print(f"policy: {config.out / POLICY_FILE}", soft_wrap=True)


def command(config: Config) -> str:
    """The command line that gives this policy."""
    given = f"--policies {' '.join(map(recorded, config.policies))} --strength {config.strength:g}"
    where = f"--preset {config.preset} --device {config.device} --out {recorded(config.out)}"
    return f"python scripts/average_policies.py {given} {where}"


if __name__ == "__main__":
    run_main(Config, main)
