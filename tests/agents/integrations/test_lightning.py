"""The tuner in Lightning: real runs of a real `Trainer`."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, TensorDataset

from agents import ControlPolicy, Tuner
from agents.policy import PolicyHeader
from inner_models.datasets import load_dataset
from tests.tiny import random_policy
from tests.user_runs import ROWS, constant_policy, equal

pl = pytest.importorskip("lightning.pytorch")
TunerCallback = importlib.import_module("agents.integrations.lightning").TunerCallback

EPOCHS = 5
DIGITS = load_dataset("digits")


class Shuffled(Sampler[int]):
    """An order of the rows that depends on the epoch alone: `Trainer` calls `set_epoch`."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.epoch)).tolist()

    def __len__(self) -> int:
        return ROWS


class Endless(Shuffled):
    """An order that never ends, and has no length."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from super().__iter__()

    def __len__(self) -> int:
        raise TypeError


class Stream(IterableDataset[tuple[Tensor, ...]]):
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(DIGITS.train.inputs[:ROWS], DIGITS.train.targets[:ROWS], strict=True)


class SizedStream(Stream):
    def __len__(self) -> int:
        return ROWS


def train_loader(workers: int = 0) -> DataLoader[Any]:
    rows = TensorDataset(DIGITS.train.inputs[:ROWS], DIGITS.train.targets[:ROWS])
    own = torch.Generator()  # so that it draws nothing from the run's
    return DataLoader(rows, batch_size=32, sampler=Shuffled(), num_workers=workers, generator=own)


def val_loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(DIGITS.val.inputs, DIGITS.val.targets), batch_size=1000)


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 10))


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    """A user's module. Its losses turn NaN in the epoch `broken`; it keeps the sizes of the batches of each epoch."""

    def __init__(self, broken: int = -1) -> None:
        super().__init__()
        self.network, self.broken = network(), broken
        self.sizes: list[list[int]] = []
        self.groups: list[dict[str, float]] = []
        self.validations: list[int] = []

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.current_epoch)
        self.sizes.append([])
        (group,) = self.optimizers().param_groups
        dropout = next(part.p for part in self.network if isinstance(part, nn.Dropout))
        self.groups.append({"lr": group["lr"], "weight_decay": group["weight_decay"], "dropout": dropout})

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        self.sizes[-1].append(len(x))
        loss = cross_entropy(self.network(x), y)
        self.log("logged", loss, on_epoch=True, on_step=False)
        return loss * math.nan if self.current_epoch == self.broken else loss

    def validation_step(self, batch: list[Tensor]) -> None:
        x, y = batch
        self.log("val_loss", cross_entropy(self.network(x), y))
        if not self.trainer.sanity_checking:
            self.validations.append(self.current_epoch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.002, weight_decay=0.03)


def trainer(*callbacks: Any, **arguments: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    checkpoints = any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks)
    settings = {"max_epochs": EPOCHS, "enable_checkpointing": checkpoints, **quiet, **arguments}
    return pl.Trainer(callbacks=list(callbacks), **settings)


def fit(callback: Any, module: Module | None = None, workers: int = 0, **arguments: Any) -> Module:
    module = module or Module()
    trainer(callback, **arguments).fit(module, train_loader(workers), val_loader())
    return module


def decided(callback: Any) -> list[float]:
    """The batch size of every epoch, as far as there are rows."""
    return [min(entry["hyperparameters"]["batch_size"], ROWS) for entry in callback.tuner.history]


def weights(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch.utilities.rank_zero"), "disabled", True)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
class TestRuns:
    def test_is_what_a_plain_loop_with_a_tuner_is(self) -> None:
        """The same signals, gradients included, the same decisions, the same weights."""
        policy = random_policy()
        callback = TunerCallback("val_loss", policy=policy)
        module = fit(callback, gradient_clip_val=1.0)

        plain, loader = network(), train_loader()
        optimizer = torch.optim.AdamW(plain.parameters(), lr=0.002, weight_decay=0.03)
        tuner = Tuner(policy, optimizer, model=plain, loader=loader, total_epochs=EPOCHS)
        for epoch in range(EPOCHS):
            torch.manual_seed(epoch)
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            plain.train()
            total: Tensor | float = 0.0
            for x, y in loader:
                optimizer.zero_grad()
                loss = cross_entropy(plain(x), y)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
                optimizer.step()
                total = total + loss.detach()
            plain.eval()
            with torch.no_grad():
                val_loss = cross_entropy(plain(DIGITS.val.inputs), DIGITS.val.targets)
            tuner.step(train_loss=float(total) / len(loader), val_loss=val_loss)

        assert callback.tuner.history == tuner.history
        assert equal(weights(module), weights(plain))
        missing = policy.header.features.index("gradients_missing")
        assert [entry["observation"][missing] for entry in tuner.history] == [1.0, 0.0, 0.0, 0.0, 0.0]

    def test_values_reach_the_optimizer_and_the_model(self) -> None:
        callback = TunerCallback("val_loss", policy=random_policy())
        run = trainer(callback)
        module = Module()
        run.fit(module, train_loader(), val_loader())
        chosen = [entry["hyperparameters"] for entry in callback.tuner.history]
        for used, values in zip(module.groups, chosen, strict=True):
            assert used == {name: values[name] for name in used}
        assert len({used["lr"] for used in module.groups}) == EPOCHS
        logged = {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("control/")}
        assert logged == pytest.approx({f"control/{name}": value for name, value in chosen[-1].items()})

    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_have_the_size_that_was_decided(self, workers: int) -> None:
        """And every epoch is a whole one, with its validation: the trainer counts its batches anew."""
        for policy, epochs in ((random_policy(3), 4), (constant_policy(batch_size=-1.0), 2)):
            callback = TunerCallback("val_loss", policy=policy)
            module = fit(callback, workers=workers, max_epochs=epochs)
            assert [sizes[0] for sizes in module.sizes] == decided(callback)
            assert [sum(sizes) for sizes in module.sizes] == [ROWS] * epochs
            assert module.validations == list(range(epochs))
            assert len({32, *decided(callback)}) > 1

    def test_loaders_that_are_made_anew_take_the_size_over(self) -> None:
        class Reloading(Module):
            def train_dataloader(self) -> Any:
                return train_loader()

            def val_dataloader(self) -> Any:
                return val_loader()

        callback, module = TunerCallback("val_loss", policy=random_policy(3)), Reloading()
        trainer(callback, reload_dataloaders_every_n_epochs=1).fit(module)
        assert [sizes[0] for sizes in module.sizes] == decided(callback)
        assert [sum(sizes) for sizes in module.sizes] == [ROWS] * EPOCHS

    def test_accumulated_batches_make_the_size_of_a_step(self) -> None:
        callback = TunerCallback("val_loss", policy=random_policy(3))
        module = fit(callback, accumulate_grad_batches=2)
        assert [min(2 * sizes[0], ROWS) for sizes in module.sizes] == decided(callback)
        reported = [entry["signals"]["train_loss"] for entry in callback.tuner.history[1:]]
        assert reported[0] == pytest.approx(math.log(10), rel=0.3), "the loss itself, not its share of a step"

    def test_a_share_of_the_batches_stays_that_share(self) -> None:
        callback = TunerCallback("val_loss", policy=constant_policy(batch_size=-1.0))
        module = fit(callback, limit_train_batches=3, val_check_interval=0.5)
        assert [sum(sizes) for sizes in module.sizes] == [96] * EPOCHS
        assert module.sizes[0][0] != 32
        assert module.validations == [epoch for epoch in range(EPOCHS) for _ in range(2)]
        assert callback.tuner.trajectory.examples_per_epoch == 96

    def test_validation_by_the_clock_leaves_the_batches_to_the_tuner(self) -> None:
        callback = TunerCallback("val_loss", policy=constant_policy(batch_size=-1.0))
        module = fit(callback, val_check_interval="00:01:00:00")
        assert [sum(sizes) for sizes in module.sizes] == [ROWS] * EPOCHS
        assert module.sizes[0][0] != 32

    @pytest.mark.parametrize("data", [Stream, SizedStream])
    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("change", [-1.0, 1.0])
    def test_a_stream_follows_and_is_read_whole(self, data: type[Stream], workers: int, change: float) -> None:
        """Whether or not its length is known."""
        callback, module = TunerCallback("val_loss", policy=constant_policy(batch_size=change)), Module()
        trainer(callback).fit(module, DataLoader(data(), batch_size=50, num_workers=workers), val_loader())
        assert [sizes[0] for sizes in module.sizes] == decided(callback)
        assert (module.sizes[-1][0] > 50) == (change > 0)
        assert [sum(sizes) for sizes in module.sizes] == [ROWS] * EPOCHS
        assert module.validations == list(range(EPOCHS))
        assert callback.tuner.trajectory.examples_per_epoch == (ROWS if data is SizedStream else None)

    @pytest.mark.parametrize(
        "loader",
        [DataLoader(Stream(), batch_size=32), DataLoader(train_loader().dataset, batch_size=32, sampler=Endless())],
        ids=["stream", "endless sampler"],
    )
    def test_a_number_of_batches_is_kept_where_nothing_else_is_known(self, loader: DataLoader[Any]) -> None:
        callback, module = TunerCallback("val_loss", policy=constant_policy(batch_size=-1.0)), Module()
        trainer(callback, limit_train_batches=3).fit(module, loader, val_loader())
        assert module.sizes == [[size] * 3 for size in decided(callback)]
        assert module.sizes[0][0] != 32
        assert module.validations == list(range(EPOCHS))

    def test_a_share_of_a_stream_stays_that_share(self) -> None:
        callback, module = TunerCallback("val_loss", policy=constant_policy(batch_size=-1.0)), Module()
        loader = DataLoader(SizedStream(), batch_size=32)
        trainer(callback, limit_train_batches=3).fit(module, loader, val_loader())
        assert [sum(sizes) for sizes in module.sizes] == [96] * EPOCHS
        assert module.sizes[0][0] != 32
        assert callback.tuner.trajectory.examples_per_epoch == 96

    def test_batches_that_come_ready_stay_as_they_are(self) -> None:
        batches = list(train_loader())
        callback, module = TunerCallback("val_loss", policy=random_policy()), Module()
        trainer(callback, limit_train_batches=3).fit(module, DataLoader(batches, batch_size=None), val_loader())  # type: ignore[arg-type]
        assert module.sizes == [[32] * 3] * EPOCHS
        assert callback.tuner.trajectory.examples_per_epoch is None

    def test_a_share_is_told_where_the_batch_size_stays(self) -> None:
        class Own(BatchSampler):
            def __iter__(self) -> Iterator[list[int]]:
                yield from super().__iter__()

        callback, module = TunerCallback("val_loss", policy=random_policy()), Module()
        loader = DataLoader(train_loader().dataset, batch_sampler=Own(Shuffled(), 32, False))
        trainer(callback, limit_train_batches=3).fit(module, loader, val_loader())
        assert module.sizes == [[32] * 3] * EPOCHS
        assert callback.tuner.trajectory.examples_per_epoch == 96

    def test_several_loaders_keep_their_batch_size(self, caplog: pytest.LogCaptureFixture) -> None:
        class Paired(Module):
            def training_step(self, batch: Any) -> Tensor:
                return super().training_step(batch[0])

        callback, module = TunerCallback("val_loss", policy=random_policy()), Paired()
        with caplog.at_level(logging.WARNING, "hyperpilot"):
            trainer(callback).fit(module, [train_loader(), train_loader()], val_loader())
        assert [record.getMessage() for record in caplog.records if "DataLoader" in record.getMessage()] == [
            "TunerCallback: training data that is not one DataLoader keeps its batch size"
        ]
        assert {size for sizes in module.sizes for size in sizes} == {32}
        assert "batch_size" not in callback.tuner.hyperparameters

    def test_epochs_without_validation_count_as_not_measured(self) -> None:
        callback = TunerCallback("val_loss", policy=random_policy())
        fit(callback, check_val_every_n_epoch=2)
        assert ["val_loss" in entry["signals"] for entry in callback.tuner.history] == [False, False, True, False, True]

    def test_the_training_loss_may_be_one_that_was_logged(self) -> None:
        callback = TunerCallback("val_loss", train_loss="logged", policy=random_policy(), guard=False)
        fit(callback, Module(broken=1))
        losses = [entry["signals"]["train_loss"] for entry in callback.tuner.history[1:]]
        assert all(math.isfinite(loss) for loss in losses[:1])
        assert callback.tuner.history[2]["guard"] is None

    def test_the_guard_takes_a_diverged_run_back(self) -> None:
        callback = TunerCallback("val_loss", policy=constant_policy())
        module = fit(callback, Module(broken=2))
        assert [entry["guard"] is not None for entry in callback.tuner.history] == [False, False, False, True, False]
        assert all(torch.isfinite(tensor).all() for tensor in weights(module))
        without = fit(TunerCallback("val_loss", policy=constant_policy()))
        assert module.groups[3]["lr"] == pytest.approx(without.groups[3]["lr"] / 4)

    def test_mixed_precision_and_manual_optimization(self) -> None:
        class Manual(Module):
            automatic_optimization = False

            def training_step(self, batch: list[Tensor]) -> Tensor:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                loss = super().training_step(batch)
                self.manual_backward(loss)
                optimizer.step()
                return loss

        runs = []
        for module, precision in ((Module(), "bf16-mixed"), (Manual(), "32-true"), (Module(), "32-true")):
            callback = TunerCallback("val_loss", policy=random_policy())
            fit(callback, module, precision=precision)
            runs.append((callback.tuner.history, weights(module)))
        assert runs[1][0] == runs[2][0]
        assert equal(runs[1][1], runs[2][1])
        seen, exact = (torch.tensor(history[1]["observation"]) for history, _ in (runs[0], runs[2]))
        assert not seen.equal(exact)
        assert (seen - exact).abs().max() < 0.1


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
class TestResuming:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_is_bit_for_bit_the_uninterrupted_run(self, tmp_path: Path, workers: int) -> None:
        def parts() -> tuple[Any, Module, Any]:
            callback = TunerCallback("val_loss", policy=random_policy(3))
            keep = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
            return callback, Module(broken=1), trainer(callback, keep)

        callback, module, run = parts()
        run.fit(module, train_loader(workers), val_loader())
        for epoch in (0, 2):
            resumed, again, run = parts()
            path = tmp_path / f"epoch={epoch}.ckpt"
            run.fit(again, train_loader(workers), val_loader(), ckpt_path=path, weights_only=True)
            assert resumed.tuner.history == callback.tuner.history
            assert equal(weights(again), weights(module))
            assert again.sizes == module.sizes[epoch + 1 :]

    def test_a_checkpoint_of_a_validation_keeps_what_was_measured(self, tmp_path: Path) -> None:
        keep = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
        callback = TunerCallback("val_loss", policy=random_policy())
        trainer(callback, keep).fit(Module(), train_loader(), val_loader())
        resumed, again = TunerCallback("val_loss", policy=random_policy()), Module()
        trainer(resumed).fit(again, train_loader(), val_loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
        assert len(again.sizes) == EPOCHS - 3
        assert len(resumed.tuner.history) == EPOCHS
        assert resumed.tuner.history[3]["signals"] == callback.tuner.history[3]["signals"]

    def test_fit_twice_and_a_test_in_between(self, tmp_path: Path) -> None:
        """A second run has a tuner of its own, and no more hooks on its optimizer than one."""
        callback = TunerCallback("val_loss", policy=random_policy())
        first = fit(callback)
        history = copy.deepcopy(callback.tuner.history)
        path = tmp_path / "checkpoint.ckpt"
        run = trainer(callback)
        run.fit(module := Module(), train_loader(), val_loader())
        run.save_checkpoint(path)
        run.validate(module, val_loader(), ckpt_path=path, verbose=False)
        assert not run.optimizers[0]._optimizer_step_pre_hooks
        second = fit(callback)
        assert callback.tuner.history == history
        assert equal(weights(first), weights(second))

    def test_attached_late_the_tuner_takes_what_is_left_of_the_run(self, tmp_path: Path) -> None:
        keep = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer(keep, max_epochs=2).fit(Module(), train_loader(), val_loader())
        callback = TunerCallback("val_loss", policy=random_policy())
        trainer(callback, keep).fit(Module(), train_loader(), val_loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
        assert callback.tuner.total_epochs == EPOCHS - 2
        resumed = TunerCallback("val_loss", policy=random_policy())
        trainer(resumed).fit(Module(), train_loader(), val_loader(), ckpt_path=tmp_path / "epoch=3.ckpt")
        assert resumed.tuner.history == callback.tuner.history


PROCESSES = """
from tests.agents.integrations.test_lightning import *

class Report(pl.Callback):
    def on_train_end(self, trainer, module):
        total = sum(float(weight.double().sum()) for weight in module.parameters())
        report = [[entry["hyperparameters"] for entry in callback.tuner.history], module.sizes, total]
        Path(sys.argv[1], str(trainer.global_rank)).write_text(json.dumps(report))

callback = TunerCallback("val_loss", policy=random_policy(3))
trainer(callback, Report(), devices=2, strategy="ddp_fork").fit(Module(), train_loader(), val_loader())
"""


def test_several_processes_decide_as_one(tmp_path: Path) -> None:
    """Of each step's examples every process has its half."""
    program = [sys.executable, "-c", PROCESSES, str(tmp_path)]
    subprocess.run(program, cwd=Path(__file__).parents[3], check=True, capture_output=True)
    (values, sizes, total), other = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert [values, sizes, total] == other
    assert [2 * batches[0] for batches in sizes] == [min(chosen["batch_size"], ROWS) for chosen in values]
    assert [sum(batches) for batches in sizes] == [ROWS / 2] * EPOCHS


class Scheduled(Module):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Adversarial(Module):
    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.parameters()), torch.optim.AdamW(self.parameters())]


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
class TestMisuse:
    @pytest.mark.parametrize(
        ("module", "arguments", "message"),
        [
            (Scheduled, {}, "StepLR and the tuner would both set the learning rate: return the optimizer alone"),
            (Adversarial, {}, "one optimizer, not 2"),
            (Module, {"max_epochs": -1}, r"max_epochs is -1: give Trainer\(max_epochs=...\)"),
            (Module, {"max_epochs": None, "max_steps": 9}, r"max_epochs is -1: give Trainer\(max_epochs=...\)"),
            (Module, {"max_steps": 9}, r"max_steps=9 counts optimizer steps, .* leave 'batch_size' out of Tuner"),
        ],
    )
    def test_is_refused_before_training(self, module: type[Module], arguments: dict[str, Any], message: str) -> None:
        made = module()
        with pytest.raises(ValueError, match=message):
            fit(TunerCallback("val_loss", policy=random_policy()), made, **arguments)
        assert not made.sizes

    def test_a_scheduler_may_have_the_learning_rate(self) -> None:
        callback = TunerCallback("val_loss", policy=random_policy(), controls=["weight_decay", "dropout"])
        module = fit(callback, Scheduled(), max_epochs=3)
        assert [group["lr"] for group in module.groups] == [0.002, 0.001, 0.0005]
        assert len({group["weight_decay"] for group in module.groups}) == 3

    def test_steps_in_place_of_epochs(self) -> None:
        callback = TunerCallback("val_loss", policy=random_policy(), total_epochs=3, controls=["lr"])
        fit(callback, max_epochs=None, max_steps=20)
        assert callback.tuner.total_epochs == 3

    @pytest.mark.parametrize(("accumulated", "epochs"), [(1, 4), (2, 7)])
    def test_steps_that_end_before_the_epochs(self, accumulated: int, epochs: int) -> None:
        """Batches of 32 that stay: six an epoch, and so the schedule ends where the run does."""
        callback = TunerCallback("val_loss", policy=random_policy(), controls=["lr"])
        batches = math.ceil(ROWS / 32)
        steps = (epochs - 1) * math.ceil(batches / accumulated) + 1
        fit(callback, max_epochs=9, max_steps=steps, accumulate_grad_batches=accumulated)
        assert callback.tuner.total_epochs == epochs

    def test_a_dry_run_is_none_by_steps(self) -> None:
        callback = TunerCallback("val_loss", policy=random_policy())
        fit(callback, fast_dev_run=2)
        assert callback.tuner.total_epochs == 1

    def test_the_length_of_a_stream_can_be_told(self) -> None:
        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Iterator[Any]:
                return iter(zip(DIGITS.train.inputs[:ROWS], DIGITS.train.targets[:ROWS], strict=True))

        callback = TunerCallback("val_loss", policy=random_policy(), examples_per_epoch=ROWS)
        trainer(callback, max_epochs=2).fit(Module(), DataLoader(Stream(), batch_size=32), val_loader())
        assert callback.tuner.trajectory.examples_per_epoch == ROWS

    @pytest.mark.parametrize("names", [{"monitor": "valid_loss"}, {"train_loss": "loged"}])
    def test_an_unknown_metric_is_named_with_the_nearest(self, names: dict[str, str]) -> None:
        nearest = {"valid_loss": "val_loss", "loged": "logged"}
        with pytest.raises(ValueError, match=r"unknown metric.*did you mean.*self\.log") as error:
            fit(TunerCallback(**names, policy=random_policy()))
        (given,) = names.values()
        assert f"{given!r}; did you mean {nearest[given]!r}?" in str(error.value)

    def test_a_training_step_without_a_loss(self) -> None:
        class Silent(Module):
            automatic_optimization = False

            def training_step(self, batch: list[Tensor]) -> None:  # type: ignore[override]
                super().training_step(batch)

        with pytest.raises(ValueError, match=r"returned no loss.*train_loss="):
            fit(TunerCallback("val_loss", policy=random_policy()), Silent())

    def test_without_lightning_the_import_tells_how_to_install_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "lightning"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delitem(sys.modules, "agents.integrations.lightning")
        monkeypatch.setattr(sys, "meta_path", [Without(), *sys.meta_path])
        with pytest.raises(ImportError, match=r"lightning is not installed; pip install 'hyperpilot\[lightning\]'"):
            importlib.import_module("agents.integrations.lightning")


class Without:
    """A finder to which Lightning is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "lightning":
            raise ModuleNotFoundError(f"No module named {name!r}", name="lightning")


@pytest.mark.parametrize("kind", ["file", "default"])
def test_policies(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.safetensors"
    random_policy(4).save(path)
    callback = TunerCallback("val_loss", policy=path if kind == "file" else None)
    fit(callback, max_epochs=1)
    policy = callback.tuner.policy
    assert isinstance(policy, ControlPolicy)
    assert isinstance(policy.header, PolicyHeader)
    expected = ControlPolicy.load(path) if kind == "file" else Tuner.pretrained(_optimizer(), total_epochs=1).policy
    assert policy.digest == expected.digest


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW(nn.Linear(1, 1).parameters())


def test_an_argument_that_the_tuner_does_not_have() -> None:
    """At once, not when training starts."""
    with pytest.raises(TypeError, match="unknown argument 'controlls'; did you mean 'controls'"):
        TunerCallback(controlls=["lr"])
