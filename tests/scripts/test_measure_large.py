"""Large runs, on small data: what every method does, and that a stopped measurement goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpo_env.base_schedules import calibrated
from scripts import measure_large
from scripts.measure_large import METHODS, residual_network
from tests.scripts.doors import Door, one_line

SMALL = ["--epochs", 3, "--rows", 400, "--blocks", 1]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On one thread of a processor without AVX-512, oneDNN's gradients of convolutions abort (torch 2.13)."""
    monkeypatch.setattr(measure_large, "DATASETS", {"resnet": "digits", "transformer": "markov-text-0"})
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def measured(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_every_method_on_the_same_runs(door: Door, tmp_path: Path) -> None:
    door(measure_large, "--width", 4, "--seeds", 2, *SMALL, "--json", file := tmp_path / "resnet.json")
    found = measured(file)
    assert [row["method"] for row in found["rows"]] == list(METHODS)
    assert {row["runs"] for row in found["rows"]} == {2}
    runs = {(run["method"], run["seed"]): run for run in found["runs"]}
    for method in METHODS:
        assert runs[method, 0]["val_loss"] != runs[method, 1]["val_loss"]
        assert len(runs[method, 0]["val_loss"]) == len(runs[method, 0]["hyperparameters"]) == 3
        assert runs[method, 0]["val_loss"][-1] < np.log(10)
        assert 0.1 < runs[method, 0]["test"]["accuracy"] <= 1
    ratio = found["rows"][-1]["log_ratio_val"]
    expected = [np.log(runs["sgd", seed]["val_loss"][-1] / runs["policy", seed]["val_loss"][-1]) for seed in (0, 1)]
    assert ratio["mean"] == pytest.approx(np.mean(expected))
    assert "log_ratio_val" not in found["rows"][0]


def test_methods_set_what_they_are_named_for(door: Door, tmp_path: Path) -> None:
    arguments = ["--problem", "transformer", "--width", 8, "--seeds", 1, *SMALL]
    door(measure_large, *arguments, "--json", file := tmp_path / "transformer.json")
    used = {run["method"]: run["hyperparameters"] for run in measured(file)["runs"]}
    start = calibrated("adamw")
    assert used["policy"][0] != used["base-rule"][0]
    assert used["base-rule"][0]["lr"] > used["base-rule"][2]["lr"]
    assert used["policy"][0]["batch_size"] != 128
    assert {values["batch_size"] for values in used["policy-at-128"]} == {128}
    assert len({values["dropout"] for values in used["policy-at-128"]}) == 3
    decays = [values["weight_decay"] for values in used["base-rule"]]
    assert decays == pytest.approx([decays[0]] * 3)
    assert used["calibrated"][1]["weight_decay"] == pytest.approx(start.weight_decay)
    assert {values["dropout"] for values in used["calibrated"]} == {start.dropout}
    assert {values["dropout"] for method in ("adamw", "sgd") for values in used[method]} == {0.1}
    assert used["adamw"][0]["lr"] == 1e-3
    assert used["sgd"][0]["lr"] == 0.1
    assert used["sgd"][2]["lr"] < 0.1 * (1 + np.cos(np.pi / 2)) / 2


def test_goes_on_where_it_stopped(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--width", 4, *SMALL, "--methods", "policy", "adamw", "--json", file := tmp_path / "a.json"]
    door(measure_large, *arguments, "--seeds", 1)
    first = measured(file)["runs"]
    trained: list[tuple[str, int]] = []
    make = measure_large._Run

    def watched(config: Any, policy: Any, dataset: Any, method: str, seed: int) -> Any:
        trained.append((method, seed))
        return make(config, policy, dataset, method, seed)

    monkeypatch.setattr(measure_large, "_Run", watched)
    door(measure_large, *arguments, "--seeds", 2)
    assert trained == [("policy", 1), ("adamw", 1)]
    assert measured(file)["runs"][:2] == first
    one_line(door(measure_large, *arguments, "--rows", 100, status=2), "a.json holds runs of another setting", "400")


def test_a_run_that_diverges_is_one_of_them(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_large._Run, "_loss", lambda run, *batch: run._model(batch[0]).sum() * np.inf)
    arguments = [
        "--width",
        4,
        "--seeds",
        1,
        *SMALL,
        "--methods",
        "policy",
        "adamw",
        "--json",
        file := tmp_path / "a.json",
    ]
    for _ in range(2):  # the second finds the runs
        door(measure_large, *arguments)
        found = measured(file)
        assert [run["val_loss"][-1] for run in found["runs"]][1] is None
        assert found["rows"][1]["test"] is None


def test_residual_network_is_the_one_of_the_paper() -> None:
    """ResNet-20 on three channels has 0.27 million parameters (He et al. 2016, table 6); ours adds 1x1 shortcuts."""
    model = residual_network(3, 16, 3, 10)
    shortcuts = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722 + shortcuts
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert len([layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]) == 19 + 2
