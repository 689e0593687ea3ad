"""A network that searches: an LSTM that reads the trials of a task so far and proposes the next, learned on meta-train.

Chen et al. 2017 ("Learning to Learn without Gradient Descent by Gradient Descent", arXiv:1611.03824): the network is
unrolled over whole searches, and trained by backpropagation through the functions that it searches. Theirs are draws
from the prior of a Gaussian process, these from its posteriors on studied tasks (`agents.emulators`); and proposals are
random here, for a network that gives one number a control soon repeats itself. What it knows across tasks is in its
weights, what it knows of one task in its state, as in RL^2 (Duan et al. 2016, arXiv:1611.02779; Wang et al. 2016,
arXiv:1611.05763).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from inner_models.tasks import Task

from .calibration import SEARCHED
from .emulators import Emulators
from .meta_dataset import Studied
from .meta_features import LANDMARK_COST, meta_features
from .state_file import load_state, save_state

KIND = "recurrent-search"

CLIP = 3.0
"""Of meta-features, in standard deviations over meta-train."""

SCALES = (1.0, 0.3, 0.03)
"""A score is read as its tanh on each of these: hundredths count, and so do failures."""

LEAST_GAIN = 0.02
"""What is lost on a task is relative to the best score of its own trials, which counts as this at least."""

MAX_NORM = 1.0
"""Gradients are clipped to this norm."""

START = -1.0
"""Logarithm of the standard deviation of a proposal's logits, where learning begins."""

LOG_STD = (-5.0, 1.0)
"""And where it may go."""


@dataclass(frozen=True)
class Config:
    """How a proposer is learned.

    Attributes:
        features: whether it reads the task's meta-features.
        blind: whether scores are hidden from it: what is left is a list of trials, a portfolio.
        hidden: units of the LSTM.
        trials: of a search that it is unrolled over, the calibrated schedule's included.
        updates: of the weights, each on a batch of searches; the learning rate falls to 0 as a cosine.
        spread: of the functions that are searched about their emulators' means, as for `Emulators.draw`.
        noise: standard deviation of that on what is read of a task, which keeps it from knowing tasks by heart.
    """

    features: bool = True
    blind: bool = False
    hidden: int = 128
    trials: int = 32
    updates: int = 1000
    batch: int = 64
    lr: float = 3e-3
    spread: float = 1.0
    noise: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.hidden, self.updates, self.batch) < 1 or self.trials < 2:
            raise ValueError(
                f"hidden, updates and batch must be at least 1 and trials at least 2, not {self.hidden}, "
                f"{self.updates}, {self.batch} and {self.trials}"
            )


@dataclass(frozen=True)
class History:
    """What a proposer keeps of searches, `[searches, ...]` each.

    Attributes:
        context: what it reads of the task.
        settings, score: of the best trial so far.
        state: of the LSTM; none before the first proposal.
    """

    context: Tensor
    settings: Tensor
    score: Tensor
    state: tuple[Tensor, Tensor] | None = None


class Proposer(nn.Module):
    """Reads trials, proposes settings.

    Args:
        names: of the meta-features that it reads, in order.
        mean, std: of what it reads of a task: whether its optimizer is SGD, and these. `[1 + names]`.

    Attributes:
        landmark_cost: what it costs to begin on a task, in full runs.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, names: Sequence[str], mean: Tensor, std: Tensor, *, hidden: int = 128, blind: bool = False):
        super().__init__()
        self.names, self.blind = tuple(names), blind
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self._cell = nn.LSTMCell(2 * (len(SEARCHED) + len(SCALES)) + len(mean), hidden)
        self._head = nn.Linear(hidden, 2 * len(SEARCHED))
        nn.init.constant_(self._head.bias[-len(SEARCHED) :], START)

    @classmethod
    def fit(
        cls,
        studied: Sequence[Studied],
        config: Config | None = None,
        report: Callable[[int], None] = lambda updates: None,
    ) -> Self:
        """Learn to search on tasks of meta-train.

        Minimizes the best score so far, averaged over trials, relative to the best score of the task's own trials.

        Args:
            report: receives the number of updates done.

        Raises:
            ValueError: as from `Emulators`.
        """
        config = config or Config()
        emulators = Emulators(studied)
        generator = torch.Generator().manual_seed(config.seed)
        names = tuple(studied[0].features) if config.features else ()
        std, mean = torch.std_mean(torch.stack([_read(one.task, names, one.features) for one in studied]), dim=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            std = std.where(std > 1e-6, 1.0)
            proposer = cls(names, mean, std, hidden=config.hidden, blind=config.blind)
        contexts = proposer.contexts(studied)
        gains = torch.tensor([max(LEAST_GAIN, -one.scores.min()) for one in studied], dtype=torch.float32)
        optimizer = torch.optim.Adam(proposer.parameters(), config.lr)
        decline = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.updates)
        for update in range(config.updates):
            tasks = torch.randint(len(studied), (config.batch,), generator=generator)
            noise = config.noise * torch.randn(config.batch, contexts.shape[1], generator=generator)
            scores = unroll(
                proposer, emulators, tasks, contexts[tasks] + noise, config.trials, generator, spread=config.spread
            )
            loss = (scores.cummin(dim=1).values.mean(dim=1) / gains[tasks]).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(proposer.parameters(), MAX_NORM)
            optimizer.step()
            decline.step()
            report(update + 1)
        return proposer.requires_grad_(False)

    @property
    def landmark_cost(self) -> float:
        return LANDMARK_COST if self.names else 0.0

    def contexts(self, studied: Sequence[Studied]) -> Tensor:
        """What it reads of studied tasks beside their trials, `[tasks, inputs]`."""
        return self._standardized(torch.stack([_read(one.task, self.names, one.features) for one in studied]))

    def context(self, task: Task) -> Tensor:
        """The same of a task that is new, `[inputs]`. Meta-features cost their landmarks.

        Raises:
            ValueError: an optimizer of which it has studied no task.
        """
        self.check(task.optimizer)
        return self._standardized(_read(task, self.names, meta_features(task) if self.names else {}))

    def check(self, optimizer: str) -> None:
        """Raise a ValueError unless tasks with this optimizer were studied."""
        if self.mean[0] == float(optimizer != "sgd"):
            raise ValueError(f"the proposer has studied no task with {optimizer}; fit it to some")

    def _standardized(self, read: Tensor) -> Tensor:
        return ((read - self.mean) / self.std).clamp(-CLIP, CLIP)

    def forward(self, history: History, settings: Tensor, score: Tensor, noise: Tensor) -> tuple[Tensor, History]:
        """The next settings, in the unit cube: a draw from a normal distribution of their logits.

        Args:
            settings: of the last trial, `[searches, controls]`.
            score: its score, `flattened`, `[searches]`.
            noise: standard normal, `[searches, controls]`.
        """
        if self.blind:
            score = torch.zeros_like(score)
        better = score < history.score
        best, least = settings.where(better[:, None], history.settings), score.where(better, history.score)
        seen = torch.stack([score, least], dim=1)[..., None] / score.new_tensor(SCALES)
        inputs = [history.context, settings - 0.5, best - 0.5, seen.tanh().flatten(1)]
        state = self._cell(torch.cat(inputs, dim=1), history.state)
        mean, log_std = self._head(state[0]).chunk(2, dim=1)
        return (mean + log_std.clamp(*LOG_STD).exp() * noise).sigmoid(), History(history.context, best, least, state)

    def save(self, path: Path) -> None:
        about = {"kind": KIND, "names": list(self.names), "hidden": self._cell.hidden_size, "blind": self.blind}
        save_state(path, {**about, "weights": dict(self.state_dict())})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, it is damaged, or not a proposer.
        """
        if not path.is_file():
            raise ValueError(f"there is no file {path}: give one that measure_recurrent_search.py wrote with --out")
        state = load_state(path)
        try:
            return cls.from_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """From the state that `save` writes.

        Raises:
            ValueError: not a proposer's.
        """
        if state.get("kind") != KIND:
            raise ValueError(f"this is not the state of a {KIND} but of {state.get('kind')!r}")
        weights: dict[str, Tensor] = state["weights"]
        proposer = cls(state["names"], weights["mean"], weights["std"], hidden=state["hidden"], blind=state["blind"])
        proposer.load_state_dict(weights)
        return proposer.requires_grad_(False)


def _read(task: Task, names: Sequence[str], features: Mapping[str, float]) -> Tensor:
    numbers = [float(task.optimizer == "sgd"), *(features[name] for name in names)]
    return torch.tensor(numbers, dtype=torch.float32)


def unroll(
    proposer: Proposer,
    emulators: Emulators,
    tasks: Tensor,
    contexts: Tensor,
    trials: int,
    generator: torch.Generator,
    *,
    spread: float = 1.0,
) -> Tensor:
    """Search functions that are drawn from emulators.

    The proposer sees scores with their tasks' noise on them; those of each trial are against the same calibrated run.

    Args:
        tasks: which of the emulators' each searches, `[searches]`.
        contexts: of these, `[searches, inputs]`, as from `Proposer.contexts`.

    Returns:
        Scores without noise, `[searches, trials]`, the first 0.
    """
    function = emulators.draw(tasks, generator, spread=spread)
    start, noise = emulators.calibrated[tasks], emulators.noise[tasks]
    reference, offset = function(start), noise * torch.randn(len(tasks), generator=generator)
    settings, seen = start, torch.zeros(len(tasks))
    history, scores = History(contexts, settings, seen), [seen]
    for _ in range(1, trials):
        settings, history = proposer(history, settings, seen, torch.randn(settings.shape, generator=generator))
        scores.append(function(settings) - reference)
        seen = scores[-1] + noise * torch.randn(len(tasks), generator=generator) - offset
    return torch.stack(scores, dim=1)
