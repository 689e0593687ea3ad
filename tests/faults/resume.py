"""Meta-training that is killed, interrupted and terminated, and one that runs for hours.

`python -m tests.faults.resume FOLDER [DECISIONS]` is the training itself: begun, or gone on with.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.checkpoints import Checkpoints
from hpo_env.env import Variation
from tests.faults import Fault, Outcome, hear_ctrl_c
from tests.tiny import TINY, TINY_CONFIG

SETTLED = 0.4
"""Share of a soak after which caches are full."""

Entries = dict[str, Any]


def train(out: Path, timesteps: int) -> None:
    """A small meta-training with workers and episodes longer than a rollout."""
    from agents.ppo import meta_train

    config = replace(
        TINY_CONFIG,
        timesteps=timesteps,
        workers=2,
        tasks=replace(TINY, horizons=(5, 9)),
        variation=Variation(start_probability=0.5),
    )
    meta_train(config, out, seed=1, resume=Checkpoints(out).newest() is not None)


def start(out: Path, timesteps: int = 1024) -> subprocess.Popen[bytes]:
    """The training in a process group of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.resume", str(out), str(timesteps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, start_new_session=True, env=environment, stderr=subprocess.PIPE)


def entries(state: Any, path: str = "") -> Entries:
    """All that a checkpoint holds, but for what the clock and the names of files decide."""
    if isinstance(state, torch.Tensor):
        return {path: (state.dtype, state.tolist())}
    if not isinstance(state, dict | list):
        return {path: state}
    parts = state.items() if isinstance(state, dict) else enumerate(state)
    kept = [(key, part) for key, part in parts if key not in ("t", "seconds", "events")]
    return {name: leaf for key, part in kept for name, leaf in entries(part, f"{path}/{key}").items()}


def curves(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar tag's steps and values as TensorBoard shows them, but for those of the clock."""
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def left_behind(group: int, patience: float = 10.0) -> list[int]:
    """Processes of a group that are alive after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        alive = [p.pid for p in psutil.process_iter() if _group(p.pid) == group and p.status() != psutil.STATUS_ZOMBIE]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.1)


def _group(process: int) -> int | None:
    try:
        return os.getpgid(process)
    except ProcessLookupError:
        return None


def killed_and_resumed(count: int, folder: Path) -> Outcome:
    """SIGKILL `count` times, at moments spread over the run, each time gone on with."""
    whole, cut = folder / "whole", folder / "cut"
    process = start(whole)
    process.communicate()
    rng, kills, failures = random.Random(0), 0, list[str]()
    total = 1024
    while kills < count:
        process, target = start(cut), total * (kills + 1) // (count + 1)
        while process.poll() is None and _step(cut) < target:  # then at any moment of the next rollouts
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        kills += 1
        if orphans := left_behind(process.pid):
            failures.append(f"kill {kills}: orphans {orphans}")
    process = start(cut)
    _, errors = process.communicate()
    if process.returncode:
        failures.append(f"the last resume ended with {process.returncode}: {errors.decode()[-500:]}")
    states = [Checkpoints(out).newest() for out in (whole, cut)]
    assert states[0] is not None
    assert states[1] is not None
    expected, found = (entries(state.state) for state in states if state)
    failures += [f"another {name} in the last checkpoint" for name in expected if found.get(name) != expected[name]]
    expected_curves, found_curves = curves(whole), curves(cut)
    failures += [f"another curve {tag}" for tag in expected_curves if found_curves.get(tag) != expected_curves[tag]]
    remark = f"{len(expected)} entries and {len(expected_curves)} curves compared"
    return Outcome(kills, tuple(failures), remark)


def _step(out: Path) -> int:
    """Of the newest checkpoint, by its name."""
    names = [path.stem.rpartition("-")[2] for path in (out / "checkpoints").glob("checkpoint-*.safetensors")]
    return max((int(name) for name in names), default=0)


def told_to_stop(count: int, folder: Path) -> Outcome:
    """Ctrl-C (to the whole group, as a terminal sends it) and SIGTERM (to the process), half each, to the script."""
    failures, slowest = list[str](), 0.0
    for number in range(count):
        by_hand, out = number % 2 == 0, folder / str(number)
        command = [sys.executable, "scripts/train_agent.py", "--preset", "smoke", "--out", str(out)]
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
            preexec_fn=hear_ctrl_c,
        )  # fmt: skip
        while process.poll() is None and _step(out) < 2048:
            time.sleep(0.05)
        time.sleep(0.3 * (number // 2))
        asked = time.monotonic()
        if by_hand:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        _, errors = process.communicate()
        slowest = max(slowest, time.monotonic() - asked)
        said, expected = errors.decode().strip().splitlines(), 130 if by_hand else 143
        if process.returncode != expected:
            failures.append(f"exit {process.returncode} instead of {expected}")
        if said != ["interrupted; go on with --resume"]:
            failures.append(f"it said {said[-5:]}")
        if orphans := left_behind(process.pid):
            failures.append(f"orphans {orphans}")
        if Checkpoints(out).newest() is None:
            failures.append("no checkpoint")
    return Outcome(count, tuple(failures), f"slowest end {slowest:.1f} s")


def soak(count: int, folder: Path) -> Outcome:
    """Meta-train for `count` minutes; memory (of all processes, fitted once caches are full) and file handles."""
    process = start(folder, 10**9)
    beginning, samples = time.monotonic(), list[tuple[float, float, int]]()
    while (now := time.monotonic() - beginning) < 60 * count and process.poll() is None:
        time.sleep(min(10.0, count))
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        memory = sum(member.memory_info().rss for member in family) / 2**20
        samples.append((now / 3600, memory, sum(member.num_fds() for member in family)))
    decisions = _step(folder)
    ended = process.poll()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    late = np.array(samples[int(SETTLED * len(samples)) :])
    slope, middle = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]), float(np.median(late[:, 1]))
    failures = [] if ended is None else [f"it ended by itself with {ended}"]
    growth = slope * (late[-1, 0] - late[0, 0])
    if growth > 0.02 * middle:
        failures.append(f"memory grew by {growth:.0f} MiB")
    if late[-1, 2] > late[0, 2]:
        failures.append(f"file handles grew from {late[0, 2]:.0f} to {late[-1, 2]:.0f}")
    remark = f"{decisions:,} decisions; {middle:.0f} MiB {slope:+.1f} MiB/h; {late[-1, 2]:.0f} file handles"
    return Outcome(count, tuple(failures), remark)


FAULTS = (
    Fault(
        "meta-training killed and resumed",
        "the last checkpoint and all curves bit for bit as without",
        killed_and_resumed,
        20,
    ),
    Fault("Ctrl-C and SIGTERM", "a checkpoint, exit 130 and 143, one line, no orphan", told_to_stop, 10),
    Fault("soak: minutes of meta-training", "memory flat, no more file handles", soak, 180),
)

if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
