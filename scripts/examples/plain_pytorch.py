"""An ordinary PyTorch loop with the tuner attached: the three lines that matter are marked."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agents import Tuner  # 1

EPOCHS = 20


def load() -> tuple[TensorDataset, TensorDataset]:
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.3, random_state=0)
    x_train, x_val, y_train, y_val = (torch.as_tensor(part) for part in parts)
    return TensorDataset(x_train.float(), y_train), TensorDataset(x_val.float(), y_val)


def main() -> None:
    torch.manual_seed(0)
    train_set, val_set = load()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of = nn.CrossEntropyLoss()

    tuner = Tuner.pretrained(optimizer, model=model, total_epochs=EPOCHS, batch_size=32)  # 2
    loader = DataLoader(train_set, batch_sampler=tuner.batch_sampler(train_set))

    for epoch in range(EPOCHS):
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
            outputs = model(x)
        val_loss = loss_of(outputs, y).item()
        accuracy = (outputs.argmax(1) == y).float().mean().item()
        used = tuner.hyperparameters
        tuner.step(train_loss=total / len(train_set), val_loss=val_loss)  # 3

        shown = "  ".join(f"{name} {value:.3g}" for name, value in used.items())
        print(f"epoch {epoch + 1:2d}  val loss {val_loss:.4f}  accuracy {accuracy:.3f}  {shown}")


if __name__ == "__main__":
    main()
