"""The examples in plain PyTorch and in other people's trainers: with the tuner, and at the constant default."""

from __future__ import annotations

import importlib
import logging
import platform
import re
import statistics
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.files import write_atomically
from agents.measures import log_ratio, mean
from agents.optional import require
from agents.policy import ControlPolicy
from agents.provenance import provenance
from agents.tuner import pretrained_path
from scripts.common import Quiet, console, known, progress_bar, recorded, run_main, write_json
from scripts.reporting.sheet import Sheet


@dataclass(frozen=True)
class Example:
    """A module of `scripts.examples` with `train(seed, tuned)`, and the package, with its extra, that it needs."""

    title: str
    module: str
    package: str


EXAMPLES = {
    "plain": Example("plain PyTorch", "plain_pytorch", "torch"),
    "lightning": Example("Lightning", "lightning_module", "lightning"),
    "transformers": Example("Hugging Face Trainer", "hugging_face_trainer", "transformers"),
}

HEAD = (
    "trainer", "n", "tuned", "constant AdamW 1e-3", "ln(constant / tuned)", "wins", "CPU seconds: tuned", "constant",
)  # fmt: skip

FIGURES = re.compile(r"(<!-- figures -->\n).*(?=<!-- end of figures -->)", re.S)
"""The part of the page that is written here; the rest is written by hand."""


@dataclass
class Config(Quiet):
    """Train the examples with the tuner and at the constant default, and compare their final validation losses.

    Needs the extras of the trainers. Takes some minutes.

        python scripts/measure_trainers.py --json results/trainers.json --markdown docs/trainers.md
    """

    json: Path
    """File for the figures."""
    markdown: Path | None = None
    """Page whose table is replaced, between `<!-- figures -->` and `<!-- end of figures -->`."""
    trainers: tuple[str, ...] = tuple(EXAMPLES)
    """Which of them."""
    seeds: int = 5
    """Runs of each kind, paired."""


def main(config: Config) -> None:
    examples = [EXAMPLES[known("trainer", name, list(EXAMPLES))] for name in config.trainers]
    if config.seeds < 2:
        raise ValueError(f"seeds must be at least 2, for an interval, not {config.seeds}")
    page = _page(config.markdown) if config.markdown else ""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with progress_bar("measuring", 2 * config.seeds * len(examples)) as update:
        for example in examples:
            done = 2 * config.seeds * len(rows)
            rows.append(measure(example, range(config.seeds), lambda runs: update(done + runs, example.title)))  # noqa: B023
    sheet = Sheet.plain("final validation loss; above 0 the tuner is better", HEAD, map(_cells, rows))
    console.print(sheet.to_rich())
    packages = {example.package: version(example.package) for example in examples}
    policy = ControlPolicy.load(pretrained_path()).digest
    origin = {**provenance("cpu"), "threads": 1, "packages": packages, "policy": policy, "command": _command(config)}
    write_json(config.json, {"rows": rows, "provenance": origin})
    if config.markdown:
        text = f"\n{sheet.body()}\n\n{_remark(origin)}\n\n"
        write_atomically(config.markdown, FIGURES.sub(lambda found: f"{found[1]}{text}", page).encode())


def measure(example: Example, seeds: range, report: Any = lambda runs: None) -> dict[str, Any]:
    """Run an example with each seed, tuned and not.

    Raises:
        ValueError: its package is not installed.
    """
    train = _import(example).train
    losses: dict[str, list[float]] = {"tuned": [], "constant": []}
    seconds: dict[str, list[float]] = {"tuned": [], "constant": []}
    for seed in seeds:
        for kind in losses:
            started = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the trainers advise on loggers and workers
                losses[kind].append(train(seed, tuned=kind == "tuned")[-1])
            seconds[kind].append(time.process_time() - started)
            report(len(losses["tuned"]) + len(losses["constant"]))
    ratios = log_ratio(losses["constant"], losses["tuned"])
    interval = mean([ratios])
    return {
        "trainer": example.title,
        "losses": losses,
        "log_ratio": {"mean": interval.value, "ci": [interval.low, interval.high]},
        "wins": int(np.count_nonzero(ratios > 0)),
        "seconds": {kind: statistics.median(values) for kind, values in seconds.items()},
    }


def _import(example: Example) -> Any:
    require(example.package, extra=example.package)
    module = importlib.import_module(f"scripts.examples.{example.module}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return module


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["log_ratio"]["ci"]
    losses, seconds = row["losses"], row["seconds"]
    return [
        row["trainer"],
        str(len(losses["tuned"])),
        *(f"{statistics.fmean(losses[kind]):.4f}" for kind in ("tuned", "constant")),
        f"{row['log_ratio']['mean']:+.3f} [{low:+.3f}, {high:+.3f}]",
        f"{row['wins']} of {len(losses['tuned'])}",
        *(f"{seconds[kind]:.1f}" for kind in ("tuned", "constant")),
    ]


def _command(config: Config) -> str:
    """What repeats this."""
    words = ["python scripts/measure_trainers.py", f"--seeds {config.seeds}"]
    if len(config.trainers) < len(EXAMPLES):
        words.append(f"--trainers {' '.join(config.trainers)}")
    words.append(f"--json {recorded(config.json)}")
    if config.markdown:
        words.append(f"--markdown {recorded(config.markdown)}")
    return " ".join(words)


def _remark(origin: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in origin["packages"].items())
    return (
        "Mean final validation losses; the ratio's mean with its bootstrap 95 % interval; the median run's CPU time, "
        f"on one thread of a processor {origin['processor']}. Python {platform.python_version()}, {packages}. "
        f"`{origin['command']}`"
    )


def _page(path: Path) -> str:
    """The page's text; a ValueError unless it has a place for the figures."""
    text = path.read_text()
    if not FIGURES.search(text):
        raise ValueError(f"{path} has no place for the figures: <!-- figures --> ... <!-- end of figures -->")
    return text


if __name__ == "__main__":
    run_main(Config, main)
