"""The board that `scripts/show.py` opens, on real runs of every kind."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from agents import Tuner
from agents.application import Run
from agents.board import BEST_LOG_RATIO, HPARAMS, META_TRAINING_TAGS, RUN_RESULTS, RUN_TAGS
from agents.ppo import meta_train
from hpo_env.base_schedules import REGULARIZERS
from scripts import apply_policy, show
from scripts.show import CHARTS, LAYOUT_FILE
from tests.agents.test_board import columns, read, session
from tests.scripts.doors import Door, one_line
from tests.tiny import TINY_CONFIG, random_policy
from tests.user_runs import Loop

METHODS = ["policy", "constant", "cosine", "plateau", "calibrated"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five applied runs, a meta-training and a user's run."""
    folder = tmp_path_factory.mktemp("runs")
    random_policy().save(folder / "policy.safetensors")
    policy = folder / "policy.safetensors"
    apply_policy.main(apply_policy.Config(task="wine/mlp", out=folder / "wine", policy=policy, epochs=3, seed=2))
    meta_train(TINY_CONFIG, folder / "trained", seed=3)
    run = Loop()
    with SummaryWriter(str(folder / "mine")) as writer:
        tuner = Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=2, writer=writer)
        for epoch in range(2):
            train_loss, val_loss = run.epoch(epoch)
            tuner.step(train_loss=train_loss, val_loss=val_loss)
    return folder


@pytest.fixture
def logdir(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs"))


def listed(tags: list[str], table: dict[str, Any]) -> dict[str, list[str]]:
    """Entry of a table of tags -> the tags that it stands for."""
    patterns = {entry: re.compile(re.escape(entry).replace(r"\*", ".+")) for entry in table}
    return {entry: [tag for tag in tags if pattern.fullmatch(tag)] for entry, pattern in patterns.items()}


def described(folder: Path, table: dict[str, Any]) -> list[str]:
    """The entries of a table of tags that a run has written; all that it has written is in the table."""
    tags = read(folder).Tags()
    written = tags["scalars"] + [tag.removesuffix("/text_summary") for tag in tags["tensors"]]
    found = listed(written, table)
    assert {tag for tags in found.values() for tag in tags} == {tag for tag in written if tag != "tags/meanings"}
    return [entry for entry, tags in found.items() if tags]


# -- what runs write ---------------------------------------------------------------------------------------------------


def test_applied_runs_write_what_the_table_says(made: Path) -> None:
    lacking = {f"control/{name}" for name in REGULARIZERS}
    everywhere = set(RUN_TAGS) - {"policy/reasons", "control_groups/lr/*"} - lacking  # and they have one learning rate
    for name in METHODS:
        reasons = {"policy/reasons"} if name == "policy" else set()
        assert set(described(made / "wine" / name, RUN_TAGS)) == everywhere | reasons


def test_meta_training_writes_what_the_table_says(made: Path) -> None:
    assert described(made / "trained" / "tensorboard", META_TRAINING_TAGS) == list(META_TRAINING_TAGS)


def test_a_run_of_ones_own_writes_what_the_table_says(made: Path) -> None:
    found = set(described(made / "mine", RUN_TAGS))
    assert {"inner/val_loss", "control/lr", "control_groups/lr/*", "policy/reasons"} <= found
    assert found.isdisjoint(RUN_RESULTS)


def test_every_decision_has_its_reason(made: Path) -> None:
    for folder, epochs in ((made / "wine" / "policy", 3), (made / "mine", 2)):
        texts = read(folder).Tensors("policy/reasons/text_summary")
        assert [text.step for text in texts] == list(range(1, epochs + 1))
        assert all(len(text.tensor_proto.string_val[0]) > 10 for text in texts)


def test_parameter_groups_without_weight_decay_stay_so(made: Path) -> None:
    events = read(made / "wine" / "calibrated")
    first, second = (events.Scalars(f"control_groups/weight_decay/{index}") for index in (0, 1))
    assert [event.step for event in first] == [1, 2, 3]
    assert first[0].value == events.Scalars("control/weight_decay")[0].value > 0
    assert {event.value for event in second} == {0.0}


def test_rows_of_the_hparams_tab(made: Path) -> None:
    results = json.loads((made / "wine" / apply_policy.RESULT_FILE).read_text())
    for name in METHODS:
        events = read(made / "wine" / name)
        assert session(events) == {"method": name, "task": "wine/mlp", "optimizer": "adamw", "epochs": 3, "seed": 2}
        run = Run.from_dict(results[name])
        expected = [run.val_loss[-1], min(run.val_loss), run.test_loss, run.final_test_loss]
        assert [events.Scalars(tag)[0].value for tag in RUN_RESULTS] == pytest.approx(expected)
        assert [events.Scalars(tag)[0].step for tag in RUN_RESULTS] == [3, 3, 3, 3]
    trained = read(made / "trained" / "tensorboard")
    row = session(trained)
    assert {name: row[name] for name in HPARAMS if name in row} == {
        "method": "meta-training", "task": "2 data sets", "optimizer": "adamw", "seed": 3.0,
    }  # fmt: skip
    assert row["training/timesteps"] == TINY_CONFIG.timesteps
    scores = [event.value for event in trained.Scalars("meta_validation/log_ratio_to_calibrated")]
    assert trained.Scalars(BEST_LOG_RATIO)[0].value == max(scores)
    assert columns(trained) == columns(read(made / "wine" / "policy"))


def test_results_stand_under_their_names() -> None:
    run = Run(0, 9.0, [8.0, 7.0, 6.0], [5.0, 3.0, 4.0], {}, test_loss=2.0, final_test_loss=1.0, seconds=0.0)
    assert apply_policy.results(run) == {
        "result/final_val_loss": 4.0, "result/best_val_loss": 3.0, "result/test_loss": 2.0,
        "result/final_test_loss": 1.0,
    }  # fmt: skip


# -- the layout --------------------------------------------------------------------------------------------------------


def runs(logdir: Path) -> list[str]:
    """The runs that TensorBoard shows."""
    return sorted(EventMultiplexer().AddRunsFromDirectory(str(logdir)).Reload().Runs())


def charts(logdir: Path) -> dict[str, dict[str, str]]:
    """Category -> chart -> pattern, of the one layout in a folder."""
    (path,) = logdir.rglob(LAYOUT_FILE)
    events = read(path.parent)
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    found: dict[str, dict[str, str]] = {}
    for category in layout.category:
        for chart in category.chart:
            (found.setdefault(category.title, {})[chart.title],) = chart.multiline.tag
    return found


def test_every_chart_has_its_tags_and_no_other(door: Door, logdir: Path) -> None:
    written = {tag for folder in logdir.rglob("*tfevents*") for tag in read(folder.parent).Tags()["scalars"]}
    door(show, "--logdir", logdir)
    found = charts(logdir)
    assert {category: list(entries) for category, entries in found.items()} == {
        category: [title for title in entries if title.removeprefix("mean ").replace(" ", "_") not in REGULARIZERS]
        for category, entries in CHARTS.items()
    }
    for category, entries in found.items():
        for title, pattern in entries.items():
            tag = CHARTS[category][title]
            expected = listed(sorted(written), {tag: None})[tag]
            assert [name for name in sorted(written) if re.match(pattern, name)] == expected != [], title


def test_the_layout_fits(door: Door, logdir: Path) -> None:
    door(show, "--logdir", logdir / "trained")
    assert {name.partition(":")[0] for name in charts(logdir / "trained")} == {"Meta-training"}
    door(show, "--logdir", logdir / "mine")
    assert set(charts(logdir / "mine")) <= {"Losses", "Hyperparameters", "Gradients"}
    assert "batch size" not in charts(logdir / "mine")["Hyperparameters"]  # this user's run does not give it


def test_the_layout_is_no_run_and_touches_none(door: Door, logdir: Path) -> None:
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in logdir.rglob("*") if path.is_file()}

    before, shown = content(), runs(logdir)
    door(show, "--logdir", logdir / "wine")
    door(show, "--logdir", logdir)
    after = content()
    (layout,) = set(after) - set(before)
    assert layout.name == LAYOUT_FILE
    assert {path: after[path] for path in before} == before
    assert runs(logdir) == shown
    door(show, "--logdir", logdir)
    assert content() == after


def test_a_layout_hides_nothing_of_a_run_that_goes_on(door: Door, tmp_path: Path) -> None:
    """TensorBoard reads the files of a folder in order, and does not come back to one."""
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("inner/val_loss", 1.0, 1)
        writer.flush()
        began = read(tmp_path).FirstEventTimestamp()
        door(show, "--logdir", tmp_path)
        events = read(tmp_path)
        assert "custom_scalars__config__" in events.Tags()["tensors"]
        assert events.FirstEventTimestamp() == began
        writer.add_scalar("inner/val_loss", 0.5, 2)
        writer.flush()
        events.Reload()
        assert [event.step for event in events.Scalars("inner/val_loss")] == [1, 2]


# -- the door ----------------------------------------------------------------------------------------------------------


def test_it_says_what_there_is(door: Door, logdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SummaryWriter(str(logdir / "other")) as writer:
        writer.add_scalar("accuracy", 1.0, 1)
    show.main(show.Config(logdir=logdir))
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == [
        f"applied: {', '.join(f'wine/{name}' for name in sorted(METHODS))}",
        "meta-training: trained/tensorboard",
        "your own: mine",
        "other: other",
    ]
    assert said[4].startswith(f"{sys.executable} -m tensorboard.main --logdir {logdir} --port 6006")
    assert len(said) == 5


def test_where_to_look_first(made: Path) -> None:
    address = urlsplit(show.address(6007, show.runs_in(made / "wine")))
    assert (address.netloc, address.fragment) == ("localhost:6007", "custom_scalars&_smoothingWeight=0")
    query = parse_qs(address.query)
    assert query["smoothing"] == ["0"]
    assert [pin["tag"] for pin in json.loads(query["pinnedCards"][0])] == ["inner/val_loss", "control/lr"]


def test_folders_without_events(door: Door, logdir: Path) -> None:
    one_line(door(show, "--logdir", logdir / "win", status=2), "no folder", "win", str(logdir / "wine"))
    (logdir / "empty").mkdir()
    one_line(door(show, "--logdir", logdir / "empty", status=2), "no TensorBoard events in", str(logdir / "mine"))
    one_line(door(show, "--logdir", logdir / "mine" / "x", status=2), "no folder")
    one_line(door(show, "--logdri", logdir, status=2), "'--logdri'; did you mean '--logdir'?")


def test_a_layout_alone_is_nothing_to_show(door: Door, logdir: Path) -> None:
    door(show, "--logdir", logdir / "mine")
    for path in (logdir / "mine").iterdir():
        if path.name != LAYOUT_FILE:
            path.unlink()
    one_line(door(show, "--logdir", logdir / "mine", status=2), "no TensorBoard events in")
    assert list((logdir / "mine").iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_shown_all_the_same(
    logdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(f"cannot write {path.name}")

    monkeypatch.setattr(show, "write_atomically", refuse)
    show.main(show.Config(logdir=logdir))
    *_, remark, command = capsys.readouterr().out.splitlines()
    assert remark == f"no Custom Scalars: cannot write {LAYOUT_FILE}"
    assert "tensorboard.main" in command


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "console", Console(force_terminal=True))


class Program:
    """In place of TensorBoard."""

    def __init__(self, command: list[str]) -> None:
        self.command, self.told = command, list[str]()
        STARTED.append(self)

    def wait(self) -> int:
        self.told.append("wait")
        if INTERRUPTED and len(self.told) == 1:
            raise KeyboardInterrupt
        return 3

    def terminate(self) -> None:
        self.told.append("terminate")


STARTED: list[Program] = []
INTERRUPTED: list[bool] = []


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(("interrupted", "status"), [(False, 3), (True, 130)])
def test_it_runs_tensorboard(
    door: Door, logdir: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool, status: int
) -> None:
    STARTED.clear()
    INTERRUPTED[:] = [True] * interrupted
    monkeypatch.setattr("subprocess.Popen", Program)
    door(show, "--logdir", logdir, "--port", 7000, "--write-only")
    assert STARTED == []
    said = door(show, "--logdir", logdir, "--port", 7000, status=status)
    assert said == ("interrupted\n" if interrupted else "")
    (program,) = STARTED
    assert program.command[:3] == [sys.executable, "-m", "tensorboard.main"]
    assert program.command[3:7] == ["--logdir", str(logdir), "--port", "7000"]
    assert program.told == ["wait", "terminate", "wait"]
