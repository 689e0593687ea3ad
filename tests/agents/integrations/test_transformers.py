"""The tuner in the Hugging Face Trainer, on real small trainings."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from tests.user_runs import BASE, constant_policy, equal, warmup_cosine

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from agents import Tuner
from agents.integrations.transformers import FILE, TunerCallback, _Tuner

ROWS, BATCH = 44, 8
"""The last of six batches is not full."""

STEPS = 6


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class Points(Dataset[dict[str, Tensor]]):
    def __init__(self, rows: int = ROWS, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.points = torch.randn(rows, 4, generator=generator)
        self.labels = (self.points.sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"points": self.points[index], "labels": self.labels[index]}


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        points = Points()
        yield from (points[index] for index in range(ROWS))


class Net(nn.Module):
    """Two rates of dropout; weights that decay and biases and a normalization that do not. Remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(4, 16), nn.LayerNorm(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 8), nn.Dropout(0.1),
            nn.Linear(8, 2),
        )  # fmt: skip
        self.batches: list[int] = []
        self.losses: list[float] = []

    def forward(self, points: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(points)
        loss = nn.functional.cross_entropy(logits, labels)
        if self.training:
            self.batches.append(len(points))
            self.losses.append(loss.item())
        return {"loss": loss, "logits": logits}

    def rates(self) -> list[float]:
        return [module.p for module in self.modules() if isinstance(module, nn.Dropout)]


class Recorder(TrainerCallback):
    """What is in use at every step, and what callbacks behind the tuner's are told."""

    def __init__(self) -> None:
        self.used: list[dict[str, list[float]]] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        self.used.append(
            {
                "lr": [group["lr"] for group in groups],
                "weight_decay": [group["weight_decay"] for group in groups],
                "dropout": kwargs["model"].rates() if isinstance(kwargs["model"], Net) else [],
            }
        )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


class Poison(TrainerCallback):
    """Makes the weights NaN at a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            with torch.no_grad():
                next(kwargs["model"].parameters()).fill_(math.nan)


def trainer(folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    model, train = options.pop("model", None) or Net(), options.pop("train", None) or Points()
    given = {name: options.pop(name) for name in ("optimizers", "eval_dataset") if name in options}
    args: dict[str, Any] = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(folder), **{**args, **options})
    given = {"eval_dataset": Points(32, seed=1), **given}
    made = Trainer(model, arguments, train_dataset=train, callbacks=list(callbacks), **given)
    made.remove_callback(PrinterCallback)
    return made


def entries(made: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


def weights(made: Trainer) -> list[Tensor]:
    assert made.model is not None
    return [tensor.clone() for tensor in made.model.state_dict().values()]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_the_tuner_decides_is_in_use_at_every_step(tmp_path: Path, accumulation: int) -> None:
    callback, recorder = TunerCallback(), Recorder()
    # The Trainer's own default schedule; its warm-up starts at a rate of 0.
    options = {"lr_scheduler_type": "linear", "warmup_steps": 5, "logging_steps": 1}
    made = trainer(tmp_path, callback, recorder, gradient_accumulation_steps=accumulation, **options)
    made.train()
    assert callback.tuner is not None
    decided = [entry["hyperparameters"] for entry in callback.tuner.history]
    assert len({entry["lr"] for entry in decided}) == len(decided) == 4
    assert all(entry.keys() == {"lr", "weight_decay", "dropout"} for entry in decided)
    steps = STEPS // accumulation
    assert len(recorder.used) == 4 * steps == made.state.global_step == made.state.max_steps
    for step, used in enumerate(recorder.used):
        values = decided[step // steps]
        assert used["lr"] == [values["lr"]] * 2
        assert used["weight_decay"] == [values["weight_decay"], 0]
        assert used["dropout"] == pytest.approx([values["dropout"], values["dropout"] / 2])
    assert entries(made, "learning_rate") == [used["lr"][0] for used in recorder.used]
    assert callback.tuner.trajectory.examples_per_epoch == 48


@pytest.mark.parametrize("workers", [0, 2])
def test_every_example_is_seen_as_often_as_asked_for(tmp_path: Path, workers: int) -> None:
    model = Net()
    made = trainer(tmp_path, TunerCallback(), model=model, num_train_epochs=2, dataloader_num_workers=workers)
    made.train()
    assert model.batches == [8, 8, 8, 8, 8, 4] * 2
    assert (made.state.global_step, made.state.epoch) == (made.state.max_steps, 2) == (12, 2)


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        ({"logging_steps": 4}, [6, 12, 18, 24]),
        ({"logging_strategy": "no"}, [6, 12, 18, 24]),
        ({"eval_strategy": "steps", "eval_steps": 5, "logging_steps": 2}, [5, 10, 15, 20, 24]),
        ({"eval_strategy": "steps", "eval_steps": 0.25, "max_steps": 10}, [3, 6, 9, 10]),
        ({"num_train_epochs": 2.5}, [6, 12, 15]),
    ],
)
def test_an_interval_is_an_evaluation(tmp_path: Path, options: dict[str, Any], bounds: list[int]) -> None:
    callback, model = TunerCallback(), Net()
    made = trainer(tmp_path, callback, model=model, **options)
    made.train()
    made.evaluate()  # the user's own; the run is over
    tuner = callback.tuner
    assert tuner is not None
    assert tuner.epoch == tuner.total_epochs == len(bounds)
    parts = [model.losses[start:end] for start, end in zip([0, *bounds], bounds, strict=False)]
    assert sum(map(len, parts)) == len(model.losses)
    told = [entry["signals"] for entry in tuner.history[1:]]
    assert [entry["train_loss"] for entry in told] == pytest.approx([sum(p) / len(p) for p in parts[:-1]], rel=1e-5)
    assert [entry["val_loss"] for entry in told] == entries(made, "eval_loss")[: len(told)]


def test_late_evaluations_and_others_than_the_runs(tmp_path: Path) -> None:
    callback = TunerCallback()
    trainer(tmp_path, callback, eval_delay=2, eval_on_start=True).train()
    assert callback.tuner is not None
    assert callback.tuner.epoch == callback.tuner.total_epochs == 4
    assert ["val_loss" in entry["signals"] for entry in callback.tuner.history] == [False, False, True, True]


def test_one_of_several_evaluation_sets_is_monitored(tmp_path: Path) -> None:
    callback = TunerCallback(monitor="eval_near_loss")
    sets = {"far": Points(16, seed=2), "near": Points(32, seed=1), "odd": Points(8, seed=3)}
    made = trainer(tmp_path, callback, eval_dataset=sets)
    made.train()
    assert callback.tuner is not None
    told = [entry["signals"]["val_loss"] for entry in callback.tuner.history[1:]]
    assert told == entries(made, "eval_near_loss")[:3]


def test_values_are_in_the_trainers_logs(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter
    from transformers import integrations

    recorder, reporter = Recorder(), cast("Any", integrations).TensorBoardCallback
    writer = SummaryWriter(tmp_path / "events")
    callbacks = [TunerCallback(), recorder, reporter(writer)]
    made = trainer(tmp_path, *callbacks, num_train_epochs=2, logging_steps=2)
    made.train()
    for name in ("lr", "weight_decay", "dropout"):
        used = [max(used[name]) for used in recorder.used][1::2]
        assert entries(made, f"control/{name}") == used
        assert [logs[f"control/{name}"] for logs in recorder.logs if "loss" in logs] == used
        events = EventAccumulator(str(tmp_path / "events"))
        events.Reload()
        shown = events.Scalars(f"train/control/{name}")
        assert [(event.step, event.value) for event in shown] == [
            (2 * (index + 1), pytest.approx(value)) for index, value in enumerate(used)
        ]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def attached(**options: Any) -> tuple[TunerCallback, Trainer]:
        callback = TunerCallback(**options)
        settings = {"num_train_epochs": 6, "save_strategy": "epoch", "lr_scheduler_type": "cosine", "eval_delay": 2}
        return callback, trainer(tmp_path / "run", callback, **settings)

    callback, whole = attached()
    whole.train()
    # After an interval without and one with an evaluation; from a folder elsewhere that the user points out.
    moved = shutil.move(tmp_path / "run" / "checkpoint-18", tmp_path / "kept")
    for number, given in ((6, None), (12, None), (18, moved)):
        other, resumed = attached(resume_from=given)
        resumed.train(resume_from_checkpoint=str(given or tmp_path / "run" / f"checkpoint-{number}"))
        assert entries(resumed, "eval_loss") == entries(whole, "eval_loss")
        assert entries(resumed, "learning_rate") == entries(whole, "learning_rate")
        assert equal(weights(resumed), weights(whole))
        assert callback.tuner is not None
        assert other.tuner is not None
        assert other.tuner.history == callback.tuner.history


def test_a_run_resumed_within_an_interval_knows_its_losses(tmp_path: Path) -> None:
    def attached(model: Net) -> tuple[TunerCallback, Trainer]:
        callback = TunerCallback()
        steps = {"save_strategy": "steps", "save_steps": 10, "logging_steps": 2}
        return callback, trainer(tmp_path, callback, model=model, **steps)

    first, second = Net(), Net()
    attached(first)[1].train()
    callback, resumed = attached(second)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert callback.tuner is not None
    losses = first.losses[6:10] + second.losses[:2]
    assert callback.tuner.history[2]["signals"]["train_loss"] == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_only_the_state_of_the_resumed_run_is_taken(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_train_epochs": 2, "save_strategy": "epoch"}
    for name in ("one", "other"):
        made = trainer(tmp_path / name, TunerCallback(), learning_rate=1e-3, seed=len(name), **options)
        made.train()
    checkpoint = str(tmp_path / "other" / "checkpoint-6")
    with pytest.raises(ValueError, match=r"step 6.*resume_from="):
        trainer(tmp_path / "one", TunerCallback(), **options).train(resume_from_checkpoint=checkpoint)
    (tmp_path / "other" / "checkpoint-6" / FILE).unlink()
    with pytest.raises(ValueError, match=f"without {FILE}"):
        trainer(tmp_path / "other", TunerCallback(), **options).train(resume_from_checkpoint=checkpoint)


def test_the_guard_takes_a_diverged_run_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = TunerCallback()
    made = trainer(tmp_path, callback, Poison(9), save_strategy="epoch")
    made.train()
    losses = entries(made, "eval_loss")
    assert [math.isnan(loss) for loss in losses] == [False, True, False, False]
    assert sum("restored the best snapshot" in record.message for record in caplog.records) == 1
    assert all(tensor.isfinite().all() for tensor in weights(made))
    one, two = (
        torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"] for step in (6, 12)
    )
    assert equal([part["exp_avg"] for part in one.values()], [part["exp_avg"] for part in two.values()])
    assert callback.tuner is not None
    assert callback.tuner.history[2]["guard"]


def test_the_best_model_is_loaded_and_old_checkpoints_go(tmp_path: Path) -> None:
    saving = {"save_strategy": "epoch", "save_total_limit": 2, "load_best_model_at_end": True}
    made = trainer(tmp_path, TunerCallback(), Poison(20), **saving)
    made.train()
    best = Path(made.state.best_model_checkpoint or "").name
    left = {folder.name for folder in tmp_path.iterdir()}
    assert left == {best, "checkpoint-24"}
    assert all((tmp_path / name / FILE).is_file() for name in left)
    assert made.evaluate()["eval_loss"] == min(entries(made, "eval_loss")[:3])  # the fourth is NaN


def test_dropout_in_layers_moves_in_transformers_too(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    class Texts(Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": torch.arange(6) + index, "labels": index % 2}

    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        attention_probs_dropout_prob=0.05,
    )  # fmt: skip
    callback, recorder = TunerCallback(controls=["lr", "dropout"]), Recorder()
    model = BertForSequenceClassification(config)
    options = {"train": Texts(), "eval_dataset": Texts(), "num_train_epochs": 3, "bf16": True}
    trainer(tmp_path, callback, recorder, model=model, gradient_accumulation_steps=2, **options).train()
    assert callback.tuner is not None
    rate = callback.tuner.history[-1]["hyperparameters"]["dropout"]
    assert rate != 0.1
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert rates["bert.encoder.layer.0.output.dropout"] == pytest.approx(rate)
    assert rates["bert.encoder.layer.0.attention.self.dropout"] == pytest.approx(rate / 2)
    assert recorder.used[-1]["weight_decay"] == [0.01, 0]


def test_without_the_lr_control_the_trainers_schedule_stays(tmp_path: Path) -> None:
    made = trainer(tmp_path, TunerCallback(controls=["weight_decay"]), num_train_epochs=2, logging_steps=1)
    made.train()
    assert entries(made, "learning_rate") == pytest.approx([1e-3 * (1 - step / 12) for step in range(12)])


def test_users_start_and_policy(tmp_path: Path) -> None:
    policy = tmp_path / "policy.safetensors"
    constant_policy().save(policy)
    callback, recorder = TunerCallback(policy, start="given"), Recorder()
    trainer(tmp_path, callback, recorder, warmup_steps=5).train()
    # The user's 1e-3 with the tuner's own warm-up and cosine, not the 0 at which the Trainer's warm-up begins.
    assert max(used["lr"][0] for used in recorder.used) == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(64, 1), (64, 2)])
def test_the_learning_rate_follows_the_batch_size(tmp_path: Path, batch_size: int, accumulation: int) -> None:
    """From the first step on: by the root of its ratio to the base's 48."""
    policy = tmp_path / "policy.safetensors"
    constant_policy().save(policy)
    callback, recorder = TunerCallback(policy), Recorder()
    options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer(tmp_path, callback, recorder, train=Points(256), **options).train()
    follows = math.sqrt(batch_size * accumulation / BASE["adamw"].batch_size)
    steps = 256 // (batch_size * accumulation)
    assert [used["lr"][0] for used in recorder.used[::steps]] == pytest.approx(
        [follows * BASE["adamw"].lr * warmup_cosine(epoch, 4) for epoch in range(4)]
    )


def test_that_the_schedule_is_set_aside_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hyperpilot"):
        trainer(tmp_path, TunerCallback(), num_train_epochs=8, lr_scheduler_type="constant").train()
        assert not caplog.records
        trainer(tmp_path, TunerCallback(), num_train_epochs=8).train()
    assert [record.getMessage() for record in caplog.records] == [
        "the Trainer's linear schedule is set aside: the tuner sets the learning rate"
    ]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {"eval_strategy": "no"}, r"eval_strategy='epoch'"),
        ({"monitor": "eval_los"}, {}, r"unknown metric 'eval_los'; did you mean 'eval_loss'\?"),
        ({"monitor": "eval_los"}, {"num_train_epochs": 1}, r"unknown metric"),
        ({"monitor": "eval_los"}, {"save_strategy": "epoch"}, r"unknown metric"),
        (
            {},
            {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"},
            r"ReduceLROnPlateau .*lr_scheduler_type='constant'",
        ),
        ({}, {"train": Stream(), "max_steps": 4}, r"eval_strategy='steps'"),
        ({"controls": ["batch_size"]}, {}, r"unknown control 'batch_size'"),
    ],
)
def test_errors_tell_the_mend(tmp_path: Path, given: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, TunerCallback(**given), **options).train()


@pytest.mark.parametrize("name", ["batch_size", "loader", "model", "total_epochs", "examples_per_epoch"])
def test_what_the_trainer_tells_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"leave out {name}"):
        TunerCallback(None, **cast("Any", {name: 1}))


def test_data_of_unknown_length_works_with_steps(tmp_path: Path) -> None:
    callback = TunerCallback()
    trainer(tmp_path, callback, train=Stream(), max_steps=9, eval_strategy="steps", eval_steps=3).train()
    assert callback.tuner is not None
    assert callback.tuner.epoch == callback.tuner.total_epochs == 3


def test_a_callback_serves_a_second_run(tmp_path: Path) -> None:
    callback = TunerCallback()
    made = trainer(tmp_path, callback, num_train_epochs=2)
    made.train()
    first = callback.tuner
    made.train()
    assert first is not None
    assert callback.tuner is not None
    assert callback.tuner is not first
    assert callback.tuner.epoch == 2
    optimizer: Any = made.optimizer
    assert not optimizer.optimizer._optimizer_step_pre_hooks


def test_without_the_package_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "agents.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'hyperpilot\[transformers\]'"):
        import agents.integrations.transformers  # noqa: F401


def test_the_example_is_better_than_its_constant_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.examples import hugging_face_trainer as example

    monkeypatch.setattr(example, "EPOCHS", 5)
    pairs = [(example.train(seed, tuned=False)[-1], example.train(seed, tuned=True)[-1]) for seed in range(5)]
    assert sum(tuned < constant for constant, tuned in pairs) >= 4
    assert sum(tuned for _, tuned in pairs) < sum(constant for constant, _ in pairs)


def test_an_argument_that_the_tuner_does_not_have() -> None:
    """At once, not when training starts."""
    with pytest.raises(TypeError, match="unknown argument 'controlls'; did you mean 'controls'"):
        TunerCallback(controlls=["lr"])  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [Tuner, _Tuner])
def test_the_trainer_gathers_the_losses(
    kind: type[Tuner], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its callbacks see the bare model, on which a tuner of one's own warns that losses are not averaged."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    model = torch.nn.Linear(2, 2)
    kind(constant_policy(), torch.optim.AdamW(model.parameters()), model=model, total_epochs=3)
    assert ("2 processes" in caplog.text) == (kind is Tuner)
