"""Optuna searches the architecture; within each trial the tuner sets what it sets, and bad trials are pruned."""

from itertools import pairwise

import optuna
import torch
from torch import nn
from torch.utils.data import DataLoader

from agents.integrations.optuna import TrialTuner, trajectory_of
from scripts.examples.plain_pytorch import load

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


def build(trial: optuna.Trial) -> nn.Sequential:
    width = trial.suggest_categorical("width", [16, 32, 64, 128, 256])
    activation = ACTIVATIONS[trial.suggest_categorical("activation", list(ACTIVATIONS))]
    sizes = [64, *[width] * trial.suggest_int("depth", 1, 3)]
    hidden = [
        part
        for inputs, outputs in pairwise(sizes)
        for part in (nn.Linear(inputs, outputs), activation(), nn.Dropout(0.1))
    ]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def train(trial: optuna.Trial, seed: int, epochs: int, tuned: bool) -> float:
    """The last validation loss of a trial's model; with `tuned=False`, at the constant default."""
    torch.manual_seed(1000 * seed + trial.number)
    train_set, val_set = load()
    model = build(trial)
    optimizer = torch.optim.AdamW(model.parameters())
    loader = DataLoader(train_set, batch_size=32, shuffle=True)
    tuner = None
    if tuned:
        tuner = TrialTuner.pretrained(optimizer, trial=trial, model=model, loader=loader, total_epochs=epochs)
    loss_of = nn.CrossEntropyLoss()

    for epoch in range(epochs):
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
            val_loss: float = loss_of(model(val_set.tensors[0]), val_set.tensors[1]).item()
        if tuner:
            tuner.step(train_loss=total / len(train_set), val_loss=val_loss)  # reports, and prunes
        else:
            trial.report(val_loss, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
    return val_loss


def search(
    seed: int, tuned: bool = True, trials: int = 12, epochs: int = 10, pruner: optuna.pruners.BasePruner | None = None
) -> optuna.Study:
    """A study of the architecture, which by default prunes trials that are worse than the median."""
    sampler = optuna.samplers.TPESampler(seed=seed)
    pruner = pruner or optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=2)
    study = optuna.create_study(direction="minimize", sampler=sampler, pruner=pruner)
    study.optimize(lambda trial: train(trial, seed, epochs, tuned), n_trials=trials)
    return study


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = search(seed=0)
    for trial in study.trials:
        losses = trial.intermediate_values
        print(f"trial {trial.number:2d}  {trial.state.name:8s}  {len(losses):2d} epochs  "
              f"val loss {min(losses.values()):.4f}  {trial.params}")  # fmt: skip
    print(f"best: {study.best_params}, validation loss {study.best_value:.4f}")
    rates = trajectory_of(study.best_trial).values["lr"]
    print("its learning rates: " + "  ".join(f"{rate:.2g}" for rate in rates))


if __name__ == "__main__":
    main()
