"""An ordinary PyTorch loop with the tuner attached: the three lines that matter are marked."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agents import Tuner  # 1

EPOCHS = 20


def load() -> tuple[TensorDataset, TensorDataset]:
    """Handwritten digits for training and validation."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.3, random_state=0)
    x_train, x_val, y_train, y_val = (torch.as_tensor(part) for part in parts)
    return TensorDataset(x_train.float(), y_train), TensorDataset(x_val.float(), y_val)


def train(seed: int, tuned: bool) -> list[float]:
    """The validation loss of every epoch, with the tuner or with a constant AdamW 1e-3."""
    torch.manual_seed(seed)
    train_set, val_set = load()
    loader = DataLoader(train_set, batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of = nn.CrossEntropyLoss()
    val_losses = []
    if tuned:
        tuner = Tuner.pretrained(optimizer, model=model, loader=loader, total_epochs=EPOCHS)  # 2

    for _ in range(EPOCHS):
        model.train()
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
        model.eval()
        with torch.no_grad():
            x, y = val_set.tensors
            val_losses.append(loss_of(model(x), y).item())
        if tuned:
            tuner.step(train_loss=total / len(train_set), val_loss=val_losses[-1])  # 3
    return val_losses


def main() -> None:
    constant, tuned = train(0, tuned=False), train(0, tuned=True)
    for epoch, losses in enumerate(zip(constant, tuned, strict=True), 1):
        print(f"epoch {epoch:2d}  val loss: constant AdamW 1e-3 {losses[0]:.4f}, with the tuner {losses[1]:.4f}")


if __name__ == "__main__":
    main()
