"""Reports of an evaluation: tables, plots and files hold the right figures, also of runs that were lost."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.application import Run, jsonable
from agents.evaluation import BASELINES, FACTORS, Budget, Evaluation, ablations
from agents.optional import MissingPackage
from agents.searches import Searched
from agents.summary import losses, summarize
from hpo_env.rewards import CEILING
from inner_models.tasks import Task
from scripts.reporting import drawing, files, plots, tables
from tests.tiny import random_policy

CONTROLS_MADE = ("replay-same-task", "replay-other-tasks", "shuffled")
SEEDS, BANK, HORIZON = 3, 8, 4
LOST = ("wine/linear", "constant", 1)
FIGURES = {"random-search-equivalents", "performance-profile", "searches", "loss-curves", "trajectories"}


def run(seed: int, level: float, *, dropout: bool = True, lost: bool = False) -> Run:
    """A run whose losses fall to `level`."""
    curve = [level * (1 + 1 / (interval + seed + 1)) for interval in range(HORIZON - 1)] + [level]
    if lost:
        curve[2:] = [math.nan, math.nan]
    controls = {"lr": [1e-3] * HORIZON, "batch_size": [32.0] * HORIZON, "weight_decay": [0.1] * HORIZON}
    if dropout:
        controls["dropout"] = [0.1 + 0.05 * seed] * HORIZON
    test = math.nan if lost else 1.1 * level
    return Run(seed, 2.0, [0.9 * loss for loss in curve], curve, controls, test, 1.2 * level, 0.5 + seed)


def fabricated(*, tasks: int = 2, searches: bool = True) -> Evaluation:
    """An evaluation of made-up runs: the policy ends at 0.5, method m at 0.5 + 0.02 m, seed s 0.01 s above."""
    policy = random_policy()
    named = {label: Task.named(label, horizon=HORIZON) for label in ("wine/mlp", "wine/linear")[:tasks]}
    named |= {f"wine/mlp#{number}": Task.named("wine/mlp", horizon=HORIZON) for number in range(2, tasks)}
    methods = ["policy", *BASELINES, *ablations(policy), *CONTROLS_MADE]

    def runs(level: float, label: str, count: int = SEEDS, method: str = "") -> list[Run]:
        dropout = label != "wine/linear"
        return [
            run(seed, level + 0.01 * seed, dropout=dropout, lost=(label, method, seed) == LOST) for seed in range(count)
        ]

    budget = Budget(
        seeds=SEEDS, bank=BANK, multiples=(0.5, 1.0, 2.0), searches=("tpe", "population-based") if searches else (),
        search_cost=4, search_seeds=2,
    )  # fmt: skip
    found = {
        "tpe": [Searched(s, [1.0, 2.5, 4.0], [math.inf, 0.7, 0.4], [math.inf, 0.8, 0.6], [], 1.0) for s in range(2)],
        "population-based": [Searched(s, [4.0], [0.55], [0.65], [], 1.0) for s in range(2)],
    }
    return Evaluation(
        policy,
        budget,
        named,
        runs={
            method: {label: runs(0.5 + 0.02 * number, label, method=method) for label in named}
            for number, method in enumerate(methods)
        },
        banks={label: runs(0.47, label, BANK) for label in named},
        budgets={label: {m: runs(0.6 / m, label) for m in budget.multiples} for label in named},
        starts={
            label: {name: {f: runs(0.6, label) for f in FACTORS} for name in ("policy", "calibrated", "cosine")}
            for label in named
        },
        searches={label: found if searches else {} for label in named},
    )


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return fabricated()


@pytest.fixture(scope="module")
def result(evaluation: Evaluation) -> dict[str, Any]:
    return summarize(evaluation)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace(r"\|", "").strip().strip("|").split("|")]


def document(evaluation: Evaluation, result: dict[str, Any]) -> str:
    return tables.markdown(result, {"machine": "a | b", "torch": "2"}, evaluation.budget)


def test_every_method_has_its_settings_and_its_group(evaluation: Evaluation) -> None:
    assert set(evaluation.runs) - {"policy"} == set(tables.SETTINGS)
    assert sorted(name for members in tables.GROUPS.values() for name in members) == sorted(
        (*tables.SETTINGS, *tables.LEARNED)
    )


def test_methods_that_no_group_knows_come_last() -> None:
    groups = tables.grouped(["cosine", "new", "shuffled", "calibrated"])
    assert groups == {
        "one trial": ["calibrated", "cosine"], "controls that must lose": ["shuffled"], "others": ["new"]
    }  # fmt: skip


def shown(result: dict[str, Any], width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for table in tables.overview(result):
        console.print(table)
    return console.export_text()


def test_overview_renders_with_the_figures(evaluation: Evaluation, result: dict[str, Any]) -> None:
    text = shown(result, 200)
    for name in (*evaluation.runs, *evaluation.tasks, *evaluation.budget.searches, "n = 2 tasks x 3 seeds"):
        assert name in text
    lines = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")
    ]
    summary = result["summary"]
    low, high = summary["val_log_ratio_ci"]
    headline = next(cells for cells in lines if cells[0] == "val log ratio to it")
    assert headline[2] == f"{summary['val_log_ratio_iqm']:+.3f} [{low:+.3f}, {high:+.3f}]"
    rse = next(cells for cells in lines if cells[0] == "RSE, median over tasks")
    low, high = summary["rse_median_ci"]
    assert low <= summary["rse_median"] <= high
    assert rse[1:3] == [
        f"{summary['rse_median']:g} [{low:.0f}, {high:.0f}]",
        f"{result['tasks']['wine/mlp']['rse_calibrated']}",
    ]
    assert next(cells for cells in lines if cells[0] == "policy")[1:5] == ["0.5100", "0.5100", "0.5610", "0.6120"]
    assert next(cells for cells in lines[::-1] if cells[0] == "constant")[-2] == "1"  # lost


def test_a_narrow_terminal_cuts_no_figure_off(result: dict[str, Any]) -> None:
    assert "…" not in shown(result, 140)


def test_markdown_is_well_formed_and_leaves_nothing_out(evaluation: Evaluation, result: dict[str, Any]) -> None:
    text = document(evaluation, result)
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if block.startswith("|"):
            assert set(cells(lines[1])) <= {"---", "---:"}
            assert len({len(cells(line)) for line in lines}) == 1, block
    against = text[text.index("### policy against each method") :]
    for name, figures in result["summary"]["against"].items():
        assert f"- `{name}`: {tables.SETTINGS[name]}" in text
        row = next(line for line in against.splitlines() if line.startswith(f"| {name} |"))
        for key, value in figures.items():
            plain = f"{value:.1%}" if key.endswith("win_rate") else f"| {value:g} |" if key == "rse_median" else None
            for number in value if isinstance(value, list) else [value]:
                assert (plain or f"{round(number, 3) + 0.0:+.3f}") in row, (name, key)
    for name, by_cost in result["summary"]["against_searches"].items():
        assert f"- `{name}`: " in text
        for figures in by_cost.values():
            assert f"{figures['test_log_ratio_iqm']:+.3f}" in text
    for label, task in result["tasks"].items():
        assert f"### {label}: 4 intervals, n = 3 seeds" in text
        for figures in task["methods"].values():
            assert f"{np.mean(figures['test_final']):#.4g}" in text
    assert r"| machine | a \| b |" in text
    assert "| multiples | 0.5, 1.0, 2.0 |" in text
    assert "<" not in text


def test_markdown_of_what_json_gave_back(evaluation: Evaluation, result: dict[str, Any]) -> None:
    read = json.loads(json.dumps(jsonable(result), allow_nan=False))
    assert document(evaluation, read) == document(evaluation, result)


def test_what_a_search_had_not_found_yet(evaluation: Evaluation, result: dict[str, Any]) -> None:
    row = next(line for line in document(evaluation, result).splitlines() if line.startswith("| tpe | "))
    name, two, four, eight = cells(row)  # it found something at 2.5 and ended at 4
    assert (name, two, eight) == ("tpe", tables.NOT_REACHED, "")
    figures = result["summary"]["against_searches"]["tpe"]["4"]
    assert four.startswith(f"{figures['val_log_ratio_iqm']:+.3f} [")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.1, "0.1000"), (12.0, "12.00"), (1234.5, "1234"), (None, "not reached"), (math.inf, "not reached")],
)
def test_losses_have_four_digits(value: float | None, shown: str) -> None:
    assert tables._loss(value) == shown


def test_log_ratios_have_a_sign() -> None:
    assert [tables._ratio(value) for value in (0.0, -0.0001, -0.25, None)] == [
        "+0.000",
        "+0.000",
        "-0.250",
        "not reached",
    ]


def test_csv_has_a_row_a_run(evaluation: Evaluation, tmp_path: Path) -> None:
    written = files.write_csv(evaluation, tmp_path / "new" / "runs.csv")
    assert [path.name for path in written] == ["runs.csv", "searches.csv"]
    with written[0].open(newline="") as file:
        rows = {(row["task"], row["method"], int(row["seed"])): row for row in csv.DictReader(file)}
    assert len(rows) == len(evaluation.runs) * 2 * SEEDS
    for (label, method, seed), row in rows.items():
        run = evaluation.runs[method][label][seed]
        if (label, method, seed) == LOST:
            assert (row["val_loss"], row["test_loss"]) == ("", "")
        else:
            assert (float(row["val_loss"]), float(row["test_loss"])) == (run.val_loss[-1], run.test_loss)
        assert float(row["best_val_loss"]) == np.nanmin(run.val_loss)
        assert (float(row["final_test_loss"]), float(row["seconds"])) == (run.final_test_loss, run.seconds)
    with written[1].open(newline="") as file:
        searches = list(csv.DictReader(file))
    assert tuple(searches[0]) == files.SEARCH_COLUMNS
    tpe = [row for row in searches if (row["task"], row["search"], row["seed"]) == ("wine/linear", "tpe", "1")]
    assert [(row["cost"], row["best_val_loss"], row["test_loss"]) for row in tpe] == [
        ("1.0", "", ""), ("2.5", "0.7", "0.8"), ("4.0", "0.4", "0.6"),
    ]  # fmt: skip


def test_csv_without_searches(tmp_path: Path) -> None:
    written = files.write_csv(fabricated(searches=False), tmp_path / "runs.csv")
    assert written == [tmp_path / "runs.csv"]


@pytest.mark.parametrize(("tasks", "searches"), [(1, False), (5, True)])
def test_plots_are_pictures(tasks: int, searches: bool, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    settings = dict(matplotlib.rcParams)
    made = fabricated(tasks=tasks, searches=searches)
    figures = plots.figures(made, summarize(made))
    assert set(figures) == FIGURES
    paths = drawing.save(figures, tmp_path / "plots")
    assert {path.stem for path in paths} == FIGURES
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = matplotlib.image.imread(path)[..., :3]
        assert pixels.std() > 0.05
        near = np.abs(pixels - matplotlib.colors.to_rgb(drawing.POLICY)).max(axis=-1) < 0.02
        assert near.sum() > 50, f"{path.name} does not show the policy"
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1e-4, 1.0, ["0.0001", "0.001", "0.01", "0.1", "1"]),
        (0.0011, 0.05, ["0.002", "0.005", "0.01", "0.02", "0.05"]),  # a factor of 45 with one power of ten
        (0.08, 1.1, ["0.1", "0.2", "0.5", "1"]),
        (0.4, 1.0, ["0.5", "1"]),
        (0.12, 0.45, ["0.2", "0.3", "0.4"]),
        (0.31, 0.345, ["0.31", "0.32", "0.33", "0.34"]),
        (31.0, 170.0, ["50", "100"]),
    ],
)
def test_logarithmic_axes_bear_at_least_two_numbers(low: float, high: float, labels: list[str]) -> None:
    pytest.importorskip("matplotlib")
    figure, ((axes,),) = drawing.subplots(1, 1, width=4, height=3)
    axes.set_ylim(low, high)
    drawing.log_axis(axes)
    figure.draw_without_rendering()
    shown = [tick.label1.get_text() for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert shown == labels


def test_methods_look_different() -> None:
    looks = [(plots._line(name)["color"], str(plots._line(name).get("linestyle"))) for name in ("policy", *BASELINES)]
    assert len(set(looks)) == len(looks)


def test_plots_show_the_losses(evaluation: Evaluation) -> None:
    pytest.importorskip("matplotlib")
    axes = plots.loss_curves(evaluation).axes
    policy = next(line for line in axes[0].lines if line.get_label() == "policy")
    assert np.asarray(policy.get_ydata())[-1] == pytest.approx(0.51)  # the median of 0.50, 0.51 and 0.52
    assert np.asarray(policy.get_xdata())[-1] == 1
    assert [a.get_title("left") for a in axes] == ["wine/mlp\n4 intervals", "wine/linear\n4 intervals"]
    rows = plots.trajectories(evaluation).axes
    assert [text.get_text() for text in rows[-1].texts] == ["none in\nthis model"]


def test_without_matplotlib_one_line_says_what_to_install(
    evaluation: Evaluation, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match=r"^matplotlib is not installed; pip install .*\[compare\]"):
        plots.figures(evaluation, result)


def test_tensorboard_reads_it_back(evaluation: Evaluation, result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = {"searches": plots.search_curves(result), "rse": plots.rse_plot(result)}
    files.write_tensorboard(evaluation, result, figures, tmp_path)
    found = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("events.out.*")}
    assert found == {"summary", *evaluation.runs}
    assert len(list(tmp_path.rglob("events.out.*"))) == len(found)

    def read(name: str) -> EventAccumulator:
        events = EventAccumulator(str(tmp_path / name))
        events.Reload()
        return events

    policy = read("policy")
    assert {f"wine-mlp/{name}" for name in ("val_loss", "train_loss", "lr", "dropout")} <= set(policy.Tags()["scalars"])
    assert [event.step for event in policy.Scalars("wine-mlp/val_loss")] == [1, 2, 3, 4]
    assert policy.Scalars("wine-mlp/val_loss")[-1].value == pytest.approx(0.51)
    assert policy.Scalars("wine-mlp/dropout")[0].value == pytest.approx(0.15)
    lost = read("constant")
    assert "wine-linear/dropout" not in lost.Tags()["scalars"]
    expected = losses(evaluation.runs["constant"]["wine/linear"], "val")
    assert expected.max() == CEILING * 2.0
    assert lost.Scalars("wine-linear/val_loss")[-1].value == pytest.approx(expected.mean())
    summary = read("summary")
    assert set(summary.Tags()["images"]) == set(figures)
    assert summary.Images("rse")[0].width > 600
    assert summary.Scalars("headline/rse_median")[0].value == result["summary"]["rse_median"]
    assert len(summary.Tags()["scalars"]) < 20
    text = summary.Tensors("overview/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| calibrated | " in text


def test_one_task_has_no_controls_from_others(tmp_path: Path) -> None:
    made = fabricated(tasks=1, searches=False)
    for name in ("replay-other-tasks", "shuffled"):
        del made.runs[name]
    result = summarize(made)
    assert result["summary"]["shuffled_log_ratio_ci"] is None
    assert "n = 1 task x 3 seeds" in document(made, result)
    files.write_tensorboard(made, result, {}, tmp_path)
    assert (tmp_path / "summary").is_dir()
