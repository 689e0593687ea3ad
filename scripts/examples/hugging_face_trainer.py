"""The Hugging Face Trainer with the tuner attached: the three lines that matter are marked."""

import tempfile

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from agents.integrations.transformers import TunerCallback  # 1
from scripts.examples.plain_pytorch import EPOCHS, load


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch, with the names of the model's arguments."""
    images, labels = zip(*rows, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


def train(seed: int, tuned: bool) -> list[float]:
    """The validation loss of every epoch, with the tuner or with a constant AdamW 1e-3."""
    train_set, val_set = load()
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=len(val_set),
            learning_rate=1e-3,
            weight_decay=0.01,
            lr_scheduler_type="constant",
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        callbacks: list[TrainerCallback] = [TunerCallback()] if tuned else []  # 2
        trainer = Trainer(
            Classifier(),
            args,
            collate,
            train_dataset=train_set,
            eval_dataset=val_set,
            callbacks=callbacks,  # 3
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def main() -> None:
    constant, tuned = train(0, tuned=False), train(0, tuned=True)
    for epoch, losses in enumerate(zip(constant, tuned, strict=True), 1):
        print(f"epoch {epoch:2d}  val loss: constant AdamW 1e-3 {losses[0]:.4f}, with the tuner {losses[1]:.4f}")


if __name__ == "__main__":
    main()
