"""The benchmark: its formulas, that its sides do the same work, what it leaves behind. No timing decides a test."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.presets import PRESETS
from inner_models.models import ModelSpec, build_model
from inner_models.tasks import Task, prepare
from inner_models.training import Training
from scripts import benchmark
from scripts.benchmarking import growth, limits, sides, speed, tuner
from scripts.benchmarking.growth import against_replicas, exponent, straight_line
from scripts.benchmarking.limits import limit_steps_per_second, work
from scripts.benchmarking.meta_training import Clock
from scripts.benchmarking.processes import Crew
from scripts.benchmarking.sides import Engine, OfCrew, Reference, Subproc, Vmap, base_schedule, first_action
from scripts.benchmarking.speed import Setting, expected_seconds, median_ratio, sweep
from scripts.common import run_main
from tests.tiny import TINY_CONFIG

LINEAR = Task.named("digits/linear", interval_examples=64, eval_rows=64)


@pytest.fixture
def here() -> Iterator[Setting]:
    """Everything in this process, as fast as can be."""
    threads = torch.get_num_threads()
    with Crew(0) as crew:
        yield Setting(crew, processes=1, device="cpu", rounds=1, seconds=0.0)
    torch.set_num_threads(threads)


def test_products_by_hand() -> None:
    found = work(LINEAR)
    assert found.training == {
        (1, 16, 64, 10): 1,
        (1, 10, 16, 64): 1,
    }  # forward; gradient of the weight, none of the input
    assert found.evaluation == {(1, 64, 64, 10): 1}
    assert found.evaluation_share == 1 / 4  # four steps an interval
    assert found.flops == 2 * (2 * 16 * 64 * 10) + 2 * 64 * 64 * 10 / 4
    assert found.parameters == 64 * 10 + 10


def test_products_of_a_convolution_by_hand() -> None:
    found = work(Task("digits", ModelSpec("cnn", width=4, depth=2), interval_examples=64, eval_rows=64))
    places, fewer = 16 * 8 * 8, 16 * 4 * 4
    assert found.training == {
        (1, 4, 9, places): 1, (1, 4, places, 9): 1,
        (1, 4, 36, fewer): 1, (1, 4, fewer, 36): 1, (1, 36, 4, fewer): 1,
        (1, 16, 16, 10): 1, (1, 10, 16, 16): 1, (1, 16, 10, 16): 1,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_flops_are_those_of_torchs_own_counter(kind: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    task = Task.named(f"waveforms/{kind}", interval_examples=64)
    data = prepare(task)
    model = build_model(task.model, data.dataset)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(data.dataset.train.inputs[:16]).sum().backward()
    assert sum(2 * count * int(np.prod(product)) for product, count in work(task).training.items()) == (
        counter.get_total_flops()
    )


def test_limit_by_hand() -> None:
    # 4 Mflop at 2 Gflop/s take 2 ms, 1 MB at 0.5 GB/s as long
    assert limit_steps_per_second(4e6, 2e9, 1e6, 0.5e9) == pytest.approx(250)


def test_share_of_limit(here: Setting) -> None:
    figures = limits.share_of_limit(LINEAR, 4, 1000.0, here)
    assert figures["optimizer_bytes_per_step"] == 32 * 650
    limit = limit_steps_per_second(
        figures["flops_per_step"], figures["flops_per_second"], 32 * 650, figures["bytes_per_second"]
    )
    assert figures["limit_steps_per_second"] == pytest.approx(limit)
    assert figures["share_of_limit"] == pytest.approx(1000 / limit)


def test_growth_by_hand() -> None:
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert straight_line([0, 1, 2], [1, 3, 5]) == pytest.approx({"intercept": 1, "slope": 2, "r_squared": 1})
    assert straight_line([0, 1, 2, 3], [0, 1, 1, 0])["r_squared"] == pytest.approx(0)
    # 4 steps an interval in each of 2 processes; 0.1 s + 0.01 s a replica from 32 on; not measured at 128
    rates = {str(count): 8 * count / (0.1 + 0.01 * count) for count in (32, 64, 96)}
    found = against_replicas(LINEAR, {"1": 1.0, **rates, "128": None}, 2)
    assert found["replicas"] == [32, 64, 96]
    assert (found["intercept"], found["slope"], found["r_squared"]) == pytest.approx((0.1, 0.01, 1))
    assert against_replicas(LINEAR, {"1": 5.0, "8": None}, 2) == {}
    assert median_ratio([2, 9, 8], [1, 3, 1]) == 3


def test_a_watched_call_within_another_counts_once() -> None:
    class Nested:
        def outer(self) -> int:
            return self.inner() + 1

        def inner(self) -> int:
            return 1

    clock, original = Clock(), Nested.inner
    with clock.watch(Nested, "outer", "inner"):
        assert (Nested().outer(), Nested().inner()) == (2, 1)
    assert len(clock.seconds) == 2
    assert Nested.inner is original
    clock.seconds = [5.0, 1.0, 2.0]
    assert clock.since(1 / 3) == 3


def test_the_environments_sides_train_alike(here: Setting) -> None:
    task = Task.named("digits/mlp", interval_examples=64, eval_rows=64)
    subproc = Subproc(task, 2)
    try:
        for batch_size in (16, 64):
            engine = OfCrew(here.crew, Engine, task, 2, "cpu", batch_size)
            found = subproc.begin(batch_size)
            assert found == engine.hyperparameters()
            assert found["batch_size"] == batch_size
            assert engine.examples == subproc.examples == 128
            subproc.interval()
            engine.interval()
    finally:
        subproc.close()
    assert list(first_action(64)) == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["digits/linear", "digits/cnn", "waveforms/gru", "waveforms/transformer"])
def test_vmap_trains_as_the_reference_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task.named(name, interval_examples=16, train_rows=16, eval_rows=32)  # all in one batch: no order, no chance
    monkeypatch.setattr(sides, "base_schedule", lambda task: replace(base_schedule(task), dropout=0.0))
    batched = Vmap(task, 2, "cpu", 16)
    losses = batched.interval()
    values = {name: float(value) for name, value in base_schedule(task).values(np.array(0.5)).items()}
    for replica in range(2):
        run = Training(task, 0)
        run.model.load_state_dict(build_model(task.model, run.data.dataset, replica).state_dict())
        for module in run.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        decayed, *others = run.optimizer.param_groups
        decayed["weight_decay"] = values["weight_decay"]
        for group in (decayed, *others):
            group["lr"] = values["lr"]
        run.advance()
        signals = run.advance()
        assert losses[:, replica] == pytest.approx([signals["train_loss"], signals["val_loss"]], rel=1e-4)


def test_a_sweep_says_what_it_leaves_out(here: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(speed.INTERVAL_LIMITS, Vmap, 0.0)
    found = sweep(Vmap, LINEAR, (1, 2), here)
    assert found.best == 1
    assert found.rates[2] is None
    assert "an interval would take about" in found.reasons[2]

    monkeypatch.setitem(speed.INTERVAL_LIMITS, Vmap, 1e9)

    def fail(*arguments: object) -> None:
        raise NotImplementedError("no batching rule\nfor this")

    monkeypatch.setattr(Vmap, "interval", fail)
    found = sweep(Vmap, LINEAR, (1, 2), here)
    assert (found.best, found.reasons) == (None, {1: "for this", 2: "for this"})


def test_expected_seconds_by_hand() -> None:
    assert expected_seconds({}, 8) == 0
    assert expected_seconds({1: 3.0}, 8) == 3  # dispatch, perhaps
    assert expected_seconds({1: 9.0, 8: 1.0, 32: 2.0}, 128) == pytest.approx(4)
    assert expected_seconds({8: 1.0, 32: 4.0}, 512) == pytest.approx(64)
    assert expected_seconds({8: 2.0, 32: 1.0}, 128) == 1


def test_a_workers_error_arrives() -> None:
    with Crew(1) as crew:
        with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
            crew.call("nobody", "interval")
        crew.build("linear", Reference, LINEAR, 1, "cpu", 16)
        assert crew.call("linear", "interval") == [None]


def test_the_benchmark_leaves_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "smoke", TINY_CONFIG)
    monkeypatch.setattr(growth, "MEMORY_REPLICAS", {"cpu": (1, 2)})
    monkeypatch.setattr(benchmark, "MIN_EPOCHS", 1)
    monkeypatch.setattr(tuner, "BATCHES", 2)
    arguments = (
        "--tasks digits/linear --replicas 1 2 --repeats 1 --seconds 0 --processes 1 --intervals 20 --iterations 1 "
        f"--preset smoke --json {tmp_path / 'figures.json'}"
    )
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments.split()])
    run_main(benchmark.Config, benchmark.main)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["cpu", "linearity", "meta_training", "tuner", "provenance"]
    linear = figures["cpu"]["linear"]
    assert {
        "steps_per_second", "replicas", "best_replicas", "subproc_steps_per_second", "ratio_subproc",
        "ratio_subproc_range", "ratio_subproc_batch64", "vmap_steps_per_second", "ratio_vmap", "share_of_limit",
        "limit_steps_per_second", "bytes_per_replica", "not_measured",
    } <= set(linear)  # fmt: skip
    assert list(linear["replicas"]) == list(linear["vmap_replicas"]) == ["1", "2"]
    assert {"exponent", "r_squared"} <= set(figures["linearity"]["replicas"]["linear"])
    assert {"exponent", "rss_first_bytes", "rss_last_bytes", "rss_bytes_per_interval"} <= set(
        figures["linearity"]["intervals"]
    )
    shares = figures["meta_training"]["shares"]
    assert list(shares) == ["inner_training", "observation_and_reward", "policy", "ppo_update", "other"]
    assert sum(shares.values()) == pytest.approx(1)
    assert figures["meta_training"]["learner_share"] == shares["ppo_update"]
    assert {"share_of_loop", "share_of_loop_with_snapshot", "seconds_per_decision"} <= set(figures["tuner"])
    text = json.dumps(figures["provenance"])
    assert str(tmp_path) not in text
    assert "--json figures.json --tasks digits/linear --replicas 1 2" in figures["provenance"]["command"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--replicas", "8", "1"], "ascending"),
        (["--replicas", "8"], "two"),
        (["--repeats", "0"], "repeats"),
        (["--preset", "smok"], "'smoke'"),
        (["--tasks", "digits/mpl"], "'mlp'"),
        (["--tasks", "digits/mlp", "letter/mlp"], "different model kinds"),
    ],
)
def test_bad_input(
    arguments: list[str], part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as exit_:
        run_main(benchmark.Config, benchmark.main)
    assert exit_.value.code == 2
    assert part in capsys.readouterr().err
