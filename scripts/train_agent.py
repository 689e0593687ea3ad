"""Meta-train an agent across many small training runs, or adapt one to a task; leave a policy file and TensorBoard
events."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from agents.adaptation import ADAPTED_FILE, Settings, adapt
from agents.checkpoints import Checkpoints
from agents.files import CONFIG_FILE
from agents.policy import ControlPolicy
from agents.ppo import POLICY_FILE, Progress, meta_train, validation_history
from agents.presets import PRESETS, MetaTrainingConfig, effective_config
from inner_models.tasks import Regularizer, Task
from scripts.common import (
    Quiet,
    check_device,
    check_out,
    console,
    known,
    progress_bar,
    run_main,
    tensorboard_hint,
    write_json,
)


@dataclass
class Config(Quiet):
    """Meta-train a policy with PPO, across many small training runs.

    Needs the packages of the extra `data`. Leaves policy.safetensors (the best by meta-validation), the effective
    settings, checkpoints and TensorBoard events. However it ends, `--resume` goes on from the newest checkpoint,
    exactly.

        python scripts/train_agent.py --preset smoke --out runs/tiny
        python scripts/train_agent.py --preset default --out runs/default --resume

    With `--adapt`, a finished policy goes on learning on one task instead. That is short and cannot be resumed.

        python scripts/train_agent.py --adapt runs/tiny/policy.safetensors --task letter/mlp --out runs/letter
    """

    out: Path
    """Folder for policy.safetensors, config.json, checkpoints and TensorBoard events."""
    preset: str = "default"
    """smoke (one to two minutes on 2 cores, to see that all works), demo (a few minutes, to be watched) or default
    (half an hour to two hours, by the processor; to be used)."""
    regularizers: bool = False
    """Learn to move augmentation and label smoothing, too: the preset's tasks have them, where they fit."""
    seed: int = 0
    """Fixes initial weights, tasks and all noise."""
    device: str = "cpu"
    """Where the inner models train: cpu or cuda."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder."""
    json: Path | None = None
    """Also write the meta-validation history to this file; with --adapt, by how much each cohort's loss fell."""
    adapt: Path | None = None
    """Policy file to adapt to --task."""
    task: str | None = None
    """With --adapt: what to adapt to, as <data set>/<model>, such as letter/mlp."""
    episodes: int = Settings.episodes
    """With --adapt: training runs of the task to learn from, rounded up to a multiple of 8 from there on."""
    epochs: int = 30
    """With --adapt: epochs in a run."""


def main(config: Config) -> None:
    if config.adapt or config.task:
        return _adapt(config)
    preset = _preset(config)
    check_device(config.device)
    if config.resume:
        _check_same_run(config)
    else:
        check_out(config.out)
    started = time.monotonic()
    with progress_bar(f"meta-training ({config.preset})", preset.timesteps) as update:
        remark = ""

        def report(progress: Progress) -> None:
            nonlocal remark
            if progress.score:
                ratio, value = progress.score.log_ratio_iqm, progress.score.mean_return
                remark = f"meta-validation return {value:.3f}, log ratio to calibrated {ratio:+.4f}"
            update(progress.timesteps, remark)

        try:
            policy = meta_train(
                preset,
                config.out,
                seed=config.seed,
                device=config.device,
                resume=config.resume,
                provenance={"preset": config.preset, "command": command(config)},
                report=report,
            )
        except KeyboardInterrupt as stop:
            kept = Checkpoints(config.out).newest() is not None
            raise type(stop)(f"interrupted; {'go on with --resume' if kept else 'no checkpoint yet'}") from None
    history = validation_history(config.out)
    _print_result(config, policy, history, time.monotonic() - started)
    if config.json:
        write_json(config.json, {"history": history, "scores": policy.header.scores})


def _preset(config: Config) -> MetaTrainingConfig:
    preset = PRESETS[known("preset", config.preset, list(PRESETS))]
    if not config.regularizers:
        return preset
    names = get_args(Regularizer)
    validation = tuple(replace(task, regularizers=names) for task in preset.validation)
    return replace(preset, tasks=replace(preset.tasks, regularizers=names), validation=validation)


def _adapt(config: Config) -> None:
    if config.adapt is None or config.task is None:
        raise ValueError("--adapt and --task go together: a policy file, and the task to adapt it to")
    if config.resume or config.preset != Config.preset or config.regularizers:
        raise ValueError(
            "an adaptation has no preset and is too short to be resumed: leave out --preset, --resume, --regularizers"
        )
    policy, settings = ControlPolicy.load(config.adapt), Settings(episodes=config.episodes)
    task = Task.named(config.task, horizon=config.epochs)
    check_device(config.device)
    check_out(config.out)
    history: list[dict[str, float]] = []
    with progress_bar(f"adapting to {task.name}", settings.updates * settings.cohort) as update:

        def report(runs: int, fall: float) -> None:
            history.append({"episodes": runs, "return": fall})
            update(runs, f"ln(validation loss) fell by {fall:.3f}")

        given = {"command": command(config)}
        adapt(
            policy, task, config.out, settings, seed=config.seed, device=config.device, provenance=given, report=report
        )
    console.print(
        f"policy: {config.out / ADAPTED_FILE} (adapted from {config.adapt}, {history[-1]['episodes']} episodes)"
    )
    first, last = history[0]["return"], history[-1]["return"]
    console.print(
        f"with exploration, ln(validation loss) fell by {first:.3f} in the first {settings.cohort} and by {last:.3f} "
        f"in the last {settings.cohort} (docs/adaptation.md says how to judge it)"
    )
    console.print(tensorboard_hint(config.out), soft_wrap=True)
    if config.json:
        write_json(config.json, {"history": history})


def command(config: Config) -> str:
    """The command line that gives this run."""
    if config.adapt:
        what = f"--adapt {config.adapt.name} --task {config.task} --episodes {config.episodes} --epochs {config.epochs}"
    else:
        what = f"--preset {config.preset}{' --regularizers' * config.regularizers}"
    options = f"{what} --seed {config.seed} --device {config.device} --out {config.out.name}"
    return f"python scripts/train_agent.py {options}"


def _check_same_run(config: Config) -> None:
    path = config.out / CONFIG_FILE
    if not path.is_file() or Checkpoints(config.out).newest() is None:
        raise ValueError(f"nothing to resume: no checkpoint in {config.out}")
    expected = json.loads(json.dumps(effective_config(_preset(config), config.seed, config.device)))
    if {**json.loads(path.read_text()), "device": config.device} != expected:
        raise ValueError(f"{config.out} holds a run with other settings ({path}); give the same preset and seed")


def _print_result(config: Config, policy: ControlPolicy, history: list[dict[str, float]], seconds: float) -> None:
    scores = policy.header.scores
    console.print(
        f"policy: {config.out / POLICY_FILE} (best of {len(history)} meta-validations, after "
        f"{scores['timesteps']:,} decisions; {seconds:.0f} s)"
    )
    console.print(
        f"meta-validation return: {history[0]['return']:.3f} at the beginning, {history[-1]['return']:.3f} at the end, "
        f"{scores['mean_return']:.3f} for the policy kept (calibrated schedule: {scores['mean_return_calibrated']:.3f})"
    )
    console.print(tensorboard_hint(config.out), soft_wrap=True)


if __name__ == "__main__":
    run_main(Config, main)
