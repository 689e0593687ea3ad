"""Inner steps per second of the engine beside those of the other sides, for one task."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inner_models.sampling import MICRO_BATCH
from inner_models.tasks import Task
from scripts.benchmarking.growth import exponent
from scripts.benchmarking.processes import Crew
from scripts.benchmarking.sides import Engine, OfCrew, Reference, Side, Subproc, Vmap, rate


@dataclass(frozen=True)
class Setting:
    """How sides are measured.

    Attributes:
        crew: runs the engine and vmap.
        processes: of the `SubprocVecEnv`.
        device: where the crew's sides train.
        rounds: measurements of each side behind a ratio.
        seconds: shortest time of a measurement.
    """

    crew: Crew
    processes: int
    device: str
    rounds: int
    seconds: float


LARGE_BATCH = 64
INTERVAL_LIMITS: dict[type, float] = {Engine: 12.0, Vmap: 6.0}
"""Seconds that an interval may be expected to take; beyond, a side is not measured."""


@dataclass
class Sweep:
    """Steps per second by replicas a process, None where not measured, and why not."""

    rates: dict[int, float | None] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    @property
    def best(self) -> int | None:
        """The replica count of the highest rate."""
        measured = {count: value for count, value in self.rates.items() if value is not None}
        return max(measured, key=measured.__getitem__, default=None)


def sweep(factory: type, task: Task, counts: Sequence[int], setting: Setting) -> Sweep:
    """Measure a side at each replica count, except where an interval is expected to take too long."""
    result = Sweep()
    taken: dict[int, float] = {}
    for count in counts:
        expected = expected_seconds(taken, count)
        result.rates[count] = None
        if expected > INTERVAL_LIMITS[factory]:
            result.reasons[count] = f"an interval would take about {expected:.0f} s"
            continue
        try:
            side = OfCrew(setting.crew, factory, task, count, setting.device)
            examples = rate(side, setting.seconds)
        except (RuntimeError, NotImplementedError) as error:  # out of memory; no batching rule
            result.reasons[count] = str(error).strip().splitlines()[-1]
        else:
            taken[count] = side.examples / examples
            result.rates[count] = examples / MICRO_BATCH
        finally:
            setting.crew.drop(factory.__name__)
    return result


def expected_seconds(taken: Mapping[int, float], replicas: int) -> float:
    """Seconds of an interval, by the power law through the last two measured; at least those of the last.

    From few replicas, whose cost is mostly dispatch, a proportional guess would be far too high.
    """
    if len(taken) < 2:
        return max(taken.values(), default=0.0)
    counts, seconds = list(taken)[-2:], list(taken.values())[-2:]
    return float(seconds[1] * (replicas / counts[1]) ** max(0.0, exponent(counts, seconds)))


def in_turn(sides: Mapping[str, Side], setting: Setting) -> dict[str, list[float]]:
    """Examples per second of each side, round by round: every round measures them one after the other."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(setting.rounds):
        for name, side in sides.items():
            rates[name].append(rate(side, setting.seconds))
    return rates


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the pairs' ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def compare(task: Task, counts: Sequence[int], setting: Setting) -> dict[str, Any]:
    """The engine beside the others: by replicas a process (`counts`), then all at their best counts in turn.

    Raises:
        RuntimeError: the engine's and the `SubprocVecEnv`'s inner trainings have different hyperparameters.
    """
    crew, device = setting.crew, setting.device
    swept = sweep(Engine, task, counts, setting)
    swept_vmap = sweep(Vmap, task, counts, setting)
    if swept.best is None:
        raise RuntimeError(f"the engine could not be measured on {task.name}: {swept.reasons}")
    subproc = Subproc(task, setting.processes)
    try:
        engine = OfCrew(crew, Engine, task, swept.best, device)
        _check_same(subproc.begin(MICRO_BATCH), engine.hyperparameters())
        sides: dict[str, Side] = {"subproc": subproc, "engine": engine}
        if swept_vmap.best is not None:
            sides["vmap"] = OfCrew(crew, Vmap, task, swept_vmap.best, device)
        if device != "cpu":
            sides["reference"] = OfCrew(crew, Reference, task, 1, device)
        rates = in_turn(sides, setting)
        large = OfCrew(crew, Engine, task, swept.best, device, LARGE_BATCH)
        _check_same(subproc.begin(LARGE_BATCH), large.hyperparameters())
        large_rates = in_turn({"subproc": subproc, "engine": large}, setting)
    finally:
        subproc.close()
        for factory in (Engine, Vmap, Reference):
            crew.drop(factory.__name__)
    return {
        **_figures(swept.best, rates),
        f"ratio_subproc_batch{LARGE_BATCH}": median_ratio(large_rates["engine"], large_rates["subproc"]),
        "replicas": {str(count): value for count, value in swept.rates.items()},
        "vmap_best_replicas": swept_vmap.best,
        "vmap_replicas": {str(count): value for count, value in swept_vmap.rates.items()},
        "not_measured": {
            f"{side} {count}": reason
            for side, found in (("engine", swept), ("vmap", swept_vmap))
            for count, reason in found.reasons.items()
        },
    }


def _figures(best: int, rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What follows from rates taken in turn; None for a side that could not be measured."""
    engine = rates["engine"]
    ratios = [a / b for a, b in zip(engine, rates["subproc"], strict=True)]
    figures: dict[str, Any] = {"steps_per_second": statistics.median(engine) / MICRO_BATCH, "best_replicas": best}
    for name in dict.fromkeys(("subproc", "vmap", *rates)):
        if name != "engine":
            measured = rates.get(name)
            figures[f"ratio_{name}"] = median_ratio(engine, measured) if measured else None
            figures[f"{name}_steps_per_second"] = statistics.median(measured) / MICRO_BATCH if measured else None
    return figures | {"ratio_subproc_range": [min(ratios), max(ratios)]}


def _check_same(one: Mapping[str, float], other: Mapping[str, float]) -> None:
    if dict(one) != dict(other):
        raise RuntimeError(f"the sides do not train alike: {dict(one)} and {dict(other)}")
