"""How the engine's cost and memory grow with replicas and intervals."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpo_env.hyperparameters import CONTROLS
from hpo_env.vector_env import HPOVectorEnv
from inner_models.models import ModelSpec
from inner_models.sampling import MICRO_BATCH
from inner_models.tasks import Task, prepare
from scripts.benchmarking.processes import Crew, Memory
from scripts.benchmarking.sides import Engine

TINY = Task("digits", ModelSpec("mlp", 8, 1), horizon=50, interval_examples=16, train_rows=64, eval_rows=16)
"""Intervals of a millisecond; episodes end and begin among them."""

MEMORY_REPLICAS = {"cpu": (64, 256), "cuda": (512, 2048)}

_TINY_REPLICAS = 8
_BLOCKS = 20
_LARGE = 32  # replicas from which on an interval's cost is that of its replicas


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """b of the power law y = a x^b that is nearest, least squares in the logarithms. 1 is linear."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def straight_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The least squares line y = intercept + slope x, and R squared."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (intercept + slope * np.asarray(x))
    return {
        "intercept": float(intercept),
        "slope": float(slope),
        "r_squared": float(1 - residual.var() / np.var(y)),
    }


def against_replicas(task: Task, rates: Mapping[str, float | None], processes: int) -> dict[str, Any]:
    """Seconds an interval against replicas a process.

    Args:
        rates: replicas a process -> steps per second, all processes together.

    Returns:
        The exponent over counts from 32 on (all where there are fewer than two), the straight line over the same
        counts, in seconds and seconds a replica; empty where fewer than two counts were measured.
    """
    steps = processes * prepare(task).interval_examples // MICRO_BATCH
    seconds = {int(count): int(count) * steps / rate for count, rate in rates.items() if rate is not None}
    large = [count for count in seconds if count >= _LARGE]
    counts = large if len(large) > 1 else list(seconds)
    if len(counts) < 2:
        return {}
    costs = [seconds[count] for count in counts]
    return {"replicas": counts, "exponent": exponent(counts, costs), **straight_line(counts, costs)}


class Endurance:
    """A long run of `TINY`, its time and memory noted as it goes."""

    def __init__(self, device: str) -> None:
        self._env = HPOVectorEnv(_TINY_REPLICAS, task=TINY, device=device)
        self._memory = Memory("cpu")
        self._env.reset(seed=0)

    def run(self, intervals: int) -> tuple[list[int], list[float], list[int]]:
        """Intervals done, seconds and resident bytes: before the first, and after each twentieth of them."""
        stay = np.zeros((_TINY_REPLICAS, len(CONTROLS)), np.float32)
        done, seconds, memory = [0], [0.0], [self._memory.now()]
        started = time.perf_counter()
        for interval in range(1, intervals + 1):
            self._env.step(stay)
            if interval * _BLOCKS // intervals > (interval - 1) * _BLOCKS // intervals:
                done.append(interval)
                seconds.append(time.perf_counter() - started)
                memory.append(self._memory.now())
        return done, seconds, memory


def against_intervals(intervals: int, device: str) -> dict[str, Any]:
    """Seconds and memory of one process against intervals, in a process of its own (on a GPU: this one).

    A tenth as many intervals run first, as a warm-up.
    """
    with Crew(1 if device == "cpu" else 0) as crew:
        crew.build("endurance", Endurance, device)
        crew.call("endurance", "run", max(1, intervals // 10))
        done, seconds, memory = crew.call("endurance", "run", intervals)[0]
    half = (len(done) - 1) // 2
    return {
        "intervals": intervals,
        "replicas": _TINY_REPLICAS,
        "exponent": exponent(done[1:], seconds[1:]),
        **straight_line(done, seconds),
        "rss_first_bytes": memory[0],
        "rss_last_bytes": memory[-1],
        "rss_bytes_per_interval": (memory[-1] - memory[0]) / intervals,
        "rss_bytes_per_interval_second_half": (memory[-1] - memory[half]) / (done[-1] - done[half]),
    }


def bytes_per_replica(task: Task, device: str) -> float:
    """Slope of a new process's memory between two replica counts: what replicas share drops out.

    On the CPU, resident memory after a first engine, whose compilation takes more for a while than replicas do.
    """
    used = []
    fewer, more = MEMORY_REPLICAS[device.split(":")[0]]
    with Crew(1 if device == "cpu" else 0) as crew:
        crew.build("memory", Memory, device)
        for count in (1, fewer, more):
            crew.build("engine", Engine, task, count, device, MICRO_BATCH)
            used += crew.call("memory", "now")
            crew.drop("engine")
    return float(used[2] - used[1]) / (more - fewer)
