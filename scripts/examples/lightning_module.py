"""A Lightning module with the tuner attached: the three lines that matter are marked."""

import logging
import warnings

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from agents.integrations.lightning import TunerCallback  # 1
from scripts.examples.plain_pytorch import EPOCHS, load


class Classifier(pl.LightningModule):
    """An MLP, its loss, its optimizer: nothing in it knows of the tuner."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
        self.loss_of = nn.CrossEntropyLoss()
        self.val_losses: list[float] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        loss: Tensor = self.loss_of(self.network(x), y)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        x, y = batch
        self.log("val_loss", self.loss_of(self.network(x), y))

    def on_validation_epoch_end(self) -> None:
        self.val_losses.append(self.trainer.callback_metrics["val_loss"].item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def train(seed: int, tuned: bool) -> list[float]:
    """The validation loss of every epoch, with the tuner or with a constant AdamW 1e-3."""
    pl.seed_everything(seed, verbose=False)
    train_set, val_set = load()
    callback = TunerCallback(monitor="val_loss")  # 2
    module = Classifier()
    loaders = DataLoader(train_set, batch_size=32, shuffle=True), DataLoader(val_set, batch_size=len(val_set))
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=[callback] if tuned else [],  # 3
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, *loaders)
    return module.val_losses


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    constant, tuned = train(0, tuned=False), train(0, tuned=True)
    for epoch, losses in enumerate(zip(constant, tuned, strict=True), 1):
        print(f"epoch {epoch:2d}  val loss: constant AdamW 1e-3 {losses[0]:.4f}, with the tuner {losses[1]:.4f}")


if __name__ == "__main__":
    main()
