"""How fast inner training is, beside others and beside what the machine allows; what meta-training and the tuner cost.

All figures come from one run, the sides of a ratio measured in turn. `scripts/benchmarking` says how each is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from agents.presets import PRESETS
from inner_models.tasks import Task
from scripts.benchmarking.growth import against_intervals, against_replicas, bytes_per_replica
from scripts.benchmarking.limits import share_of_limit
from scripts.benchmarking.meta_training import iteration_split
from scripts.benchmarking.processes import Crew, cores
from scripts.benchmarking.provenance import provenance
from scripts.benchmarking.speed import Setting, compare
from scripts.benchmarking.tuner import overhead
from scripts.common import Quiet, check_device, console, known, progress_bar, run_main, write_json

HORIZON = 100
REPLICAS = {"cpu": (1, 8, 32, 128, 512), "cuda": (1, 8, 32, 128, 512, 2048, 8192)}
MIN_EPOCHS = 25
"""Epochs of the loops with and without a tuner, at least."""


@dataclass
class Config(Quiet):
    """Measure the engine, meta-training and the tuner.

    Prints a table and, with --json, leaves all figures with their provenance. Takes 8 to 10 minutes on 2 cores; leave
    them alone meanwhile.

        python scripts/benchmark.py --json benchmarks/cpu.json
        python scripts/benchmark.py --tasks digits/linear digits/mlp --replicas 8 32 --repeats 1 --iterations 1
    """

    device: str = "cpu"
    """Where the engine trains: cpu (one process a core) or cuda (one process)."""
    json: Path | None = None
    """Also write the figures to this file."""
    tasks: tuple[str, ...] = ("digits/linear", "digits/mlp", "digits/cnn", "waveforms/gru", "waveforms/transformer")
    """Tasks, one of each model kind."""
    replicas: tuple[int, ...] = ()
    """Replica counts of a process, ascending; 1 to 512 (on a GPU 8192) when none are given."""
    repeats: int = 5
    """Pairs of measurements behind each ratio; the median is reported."""
    seconds: float = 0.4
    """Shortest time of a measurement."""
    processes: int = 0
    """Worker processes on the CPU; one a core when 0."""
    intervals: int = 10_000
    """Intervals of the long run that shows leaks."""
    preset: str = "default"
    """Preset whose sizes the meta-training iterations take."""
    iterations: int = 2
    """Meta-training iterations measured, after one that warms up."""


def main(config: Config) -> None:
    check_device(config.device)
    preset = PRESETS[known("preset", config.preset, list(PRESETS))]
    tasks = [Task.named(name, horizon=HORIZON) for name in config.tasks]
    kind_of_device = config.device.split(":")[0]
    counts = config.replicas or REPLICAS[kind_of_device]
    if len(counts) < 2 or counts[0] < 1 or list(counts) != sorted(set(counts)):
        raise ValueError(f"replicas must be at least two ascending counts, not {counts}")
    if len({task.model.kind for task in tasks}) < max(1, len(tasks)):
        raise ValueError(f"give tasks of different model kinds, not {', '.join(config.tasks)}")
    if min(config.repeats, config.intervals, config.iterations) < 1:
        raise ValueError("repeats, intervals and iterations must be at least 1")
    processes = config.processes or cores()
    workers = processes if kind_of_device == "cpu" else 0
    kinds: dict[str, Any] = {}
    linearity: dict[str, Any] = {"replicas": {}}
    with progress_bar("benchmark", len(tasks) + 3) as report:
        with Crew(workers) as crew:
            setting = Setting(crew, processes, config.device, config.repeats, config.seconds)
            for done, task in enumerate(tasks):
                report(done, task.name)
                kind = task.model.kind
                kinds[kind] = _measure(task, counts, setting)
                linearity["replicas"][kind] = against_replicas(task, kinds[kind]["replicas"], crew.size)
            described = provenance(crew, config.device) | {"command": _command(config), "processes": processes}
        report(len(tasks), "a long run")
        linearity["intervals"] = against_intervals(config.intervals, config.device)
        report(len(tasks) + 1, "meta-training")
        split = iteration_split(preset, config.iterations, config.device)
        report(len(tasks) + 2, "tuner")
        tuner = overhead(max(MIN_EPOCHS, config.repeats), config.device)
        report(len(tasks) + 3, "done")
    result = {
        kind_of_device: kinds,
        "linearity": linearity,
        "meta_training": split,
        "tuner": tuner,
        "provenance": described,
    }
    _print(kinds, result)
    if config.json:
        write_json(config.json, result)


def _measure(task: Task, counts: Sequence[int], setting: Setting) -> dict[str, Any]:
    compared = compare(task, counts, setting)
    best, reached = compared["best_replicas"], compared["steps_per_second"]
    return {
        "task": task.name,
        **compared,
        **share_of_limit(task, best, reached, setting),
        "bytes_per_replica": bytes_per_replica(task, setting.device),
    }


def _command(config: Config) -> str:
    """The command line of this run, files by their names alone."""
    words = ["python scripts/benchmark.py"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name != "quiet":
            values = value if isinstance(value, tuple) else (value.name if isinstance(value, Path) else value,)
            words += [f"--{field.name}", *map(str, values)]
    return " ".join(words)


def _print(kinds: dict[str, Any], result: dict[str, Any]) -> None:
    ratios = [key for key in next(iter(kinds.values())) if key.startswith("ratio_") and not key.endswith("_range")]
    table = Table(title="inner steps (batches of 16) of the engine; x: times as many as the other side's")
    headings = ["model", "steps/s", "replicas", *(key.replace("ratio_", "x ").replace("_", ", ") for key in ratios)]
    for heading in (*headings, "share of limit", "kB/replica", "exponent"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for kind, figures in kinds.items():
        table.add_row(
            kind,
            f"{figures['steps_per_second']:,.0f}",
            str(figures["best_replicas"]),
            *("-" if figures[key] is None else f"{figures[key]:.1f}" for key in ratios),
            f"{figures['share_of_limit']:.0%}",
            f"{figures['bytes_per_replica'] / 1e3:,.0f}",
            f"{result['linearity']['replicas'][kind].get('exponent', math.nan):.2f}",
        )
    console.print(table)
    long_run, split, tuner = result["linearity"]["intervals"], result["meta_training"], result["tuner"]
    console.print(
        f"{long_run['intervals']:,} intervals: time ~ intervals^{long_run['exponent']:.3f}, "
        f"memory {long_run['rss_bytes_per_interval']:+.1f} bytes an interval "
        f"({long_run['rss_bytes_per_interval_second_half']:+.1f} in the second half)"
    )
    shares = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in split["shares"].items())
    console.print(f"meta-training, an iteration of {split['seconds_per_iteration']:.1f} s: {shares}")
    for title, suffix in (("tuner", ""), ("tuner, a snapshot every epoch", "_with_snapshot")):
        share, decision = tuner[f"share_of_loop{suffix}"], tuner[f"seconds_per_decision{suffix}"]
        console.print(f"{title}: {share:+.2%} of the loop, {1e3 * decision:.1f} ms a decision")


if __name__ == "__main__":
    run_main(Config, main)
