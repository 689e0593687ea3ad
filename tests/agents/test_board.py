"""What runs write to TensorBoard, read back as TensorBoard reads it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from torch.utils.tensorboard import SummaryWriter

from agents.board import (
    BEST_LOG_RATIO,
    HPARAMS,
    META_TRAINING_TAGS,
    RUN_RESULTS,
    RUN_TAGS,
    TRAINING_HPARAMS,
    about,
    group_values,
    write_decision,
    write_epoch,
    write_hparams,
)
from hpo_env.hyperparameters import CONTROLS
from inner_models.signals import SIGNALS
from tests.tiny import TINY_CONFIG
from tests.user_runs import Loop, Writer

GUIDE = Path(__file__).parents[2] / "docs" / "tensorboard.md"


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def columns(events: EventAccumulator) -> tuple[list[str], list[str]]:
    """Hyperparameters and metrics of the HParams tab, in the order in which TensorBoard shows them."""
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)[metadata.EXPERIMENT_TAG]
    experiment = metadata.parse_experiment_plugin_data(content)
    names = sorted(experiment.hparam_infos, key=lambda info: (not info.differs, info.name))
    return [info.name for info in names], [info.name.tag for info in experiment.metric_infos]


def session(events: EventAccumulator) -> dict[str, str | float]:
    """The run's row of the HParams tab, without the metrics."""
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)
    assert metadata.SESSION_END_INFO_TAG in content
    values = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG]).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


# -- epochs and decisions ----------------------------------------------------------------------------------------------


def test_an_epoch() -> None:
    writer = Writer()
    write_epoch(writer, 3, {"val_loss": 0.5}, {"lr": 0.01}, {"lr": [0.01, 0.002], "weight_decay": [0.1, 0.1]})
    assert writer.scalars == [
        ("inner/val_loss", 0.5, 3),
        ("control/lr", 0.01, 3),
        ("control_groups/lr/0", 0.01, 3),
        ("control_groups/lr/1", 0.002, 3),
    ]


def test_values_of_parameter_groups() -> None:
    assert group_values(Loop().optimizer) == {"lr": [0.002, 0.0005, 0.002], "weight_decay": [0.03, 0.01, 0.0]}
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert group_values(torch.optim.Rprop([parameter], lr=0.5)) == {"lr": [0.5]}
    assert group_values(torch.optim.Adam([parameter], lr=torch.tensor(0.5)))["lr"] == [0.5]


def test_a_decision_is_text(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for epoch in range(1, 31):
            write_decision(writer, epoch, f"because of {epoch}")
    texts = read(tmp_path).Tensors("policy/reasons/text_summary")
    assert [(text.step, text.tensor_proto.string_val[0].decode()) for text in texts] == [
        (epoch, f"because of {epoch}") for epoch in range(1, 31)
    ]


def test_a_writer_of_scalars_alone_is_told_no_reasons() -> None:
    writer = Writer()
    write_decision(writer, 1, "because")
    assert writer.scalars == []


# -- the HParams tab ---------------------------------------------------------------------------------------------------


def enter(folder: Path, hparams: dict[str, Any], results: dict[str, float]) -> EventAccumulator:
    with SummaryWriter(str(folder)) as writer:
        write_hparams(writer, hparams, results, 7)
    return read(folder)


def test_a_run_is_one_row_and_no_further_run(tmp_path: Path) -> None:
    given: dict[str, Any] = {"method": "policy", "task": "wine/mlp", "optimizer": "sgd", "epochs": 7, "seed": 3}
    events = enter(tmp_path / "run", given, {"result/test_loss": 0.25, "result/final_val_loss": float("inf")})
    assert session(events) == given
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("result/test_loss")] == [(7, 0.25)]
    assert events.Scalars("result/final_val_loss")[0].value == float("inf")
    assert [path.parent for path in tmp_path.rglob("*tfevents*")] == [tmp_path / "run"]


def test_every_kind_of_run_declares_the_same_columns(tmp_path: Path) -> None:
    applied = enter(tmp_path / "a", {"method": "cosine"}, {"result/test_loss": 1.0})
    trained = enter(tmp_path / "b", {"training/clip": 0.2, "seed": 1}, {BEST_LOG_RATIO: 0.1})
    assert columns(applied) == columns(trained)
    names, metrics = columns(applied)
    assert names[:5] == list(HPARAMS)  # TensorBoard shows five at first
    assert len(names) == len({*HPARAMS, *TRAINING_HPARAMS}) + 1  # epochs are both
    assert metrics == [*RUN_RESULTS, BEST_LOG_RATIO]


def test_unknown_columns_are_refused(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        with pytest.raises(ValueError, match="learning_rte"):
            write_hparams(writer, {"training/learning_rte": 1.0}, {}, 0)
        with pytest.raises(ValueError, match="result/tset_loss"):
            write_hparams(writer, {}, {"result/tset_loss": 1.0}, 0)
    assert read(tmp_path).Tags()["scalars"] == []


# -- the tables --------------------------------------------------------------------------------------------------------


def test_the_tables_have_all_there_is() -> None:
    assert [tag for tag in RUN_TAGS if tag.startswith("inner/")] == [f"inner/{name}" for name in SIGNALS]
    assert {tag for tag in RUN_TAGS if tag.startswith("control/")} == {f"control/{name}" for name in CONTROLS}
    numbers = [name for name, value in asdict(TINY_CONFIG).items() if isinstance(value, int | float)]
    assert sorted(TRAINING_HPARAMS) == sorted(numbers)


def test_the_guide_has_the_tables() -> None:
    text = GUIDE.read_text()
    assert about(RUN_TAGS, "epochs") in text
    assert about(META_TRAINING_TAGS, "decisions") in text
