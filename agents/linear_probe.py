"""Linear probes: what a linear model can read off an autoencoder's code that it was never trained to tell.

Source: Alain and Bengio 2016 ("Understanding intermediate layers using linear classifier probes"). The probe, logistic
or ridge regression on standardized features, is fitted to the training rows and the data set's own targets; its score
is the accuracy, or the R2, on the validation rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpo_env.hyperparameters import Array
from inner_models.datasets import Dataset, Split
from inner_models.models import ModelSpec, build_model, encoder
from inner_models.tasks import Task, prepare

from .application import Cohort, Controller
from .controllers import WithPolicy
from .schedules import Constant, Cosine


def probe_code(task: Task, model: nn.Sequential) -> float:
    """Score of the code of `model`, an autoencoder: a `Training`'s, or one from `from_snapshot`."""
    encode = copy.deepcopy(encoder(model)).eval()
    like = next(model.parameters())

    @torch.no_grad()
    def codes(rows: Split) -> Array:
        found: Array = encode(rows.inputs.to(like)).cpu().numpy()
        return found

    data = labelled(task)
    return _score(data, codes(data.train), codes(data.val))


def probe_inputs(task: Task, components: int | None = None) -> float:
    """Score of the raw inputs; or of so many principal components, the best linear code (Baldi and Hornik 1989)."""
    data = labelled(task)
    train, val = (rows.inputs.flatten(1).numpy() for rows in (data.train, data.val))
    if components is not None:
        from sklearn.decomposition import PCA  # takes longer to import than torch: only those who need it pay

        projection = PCA(components, random_state=0).fit(train)
        train, val = projection.transform(train), projection.transform(val)
    return _score(data, train, val)


def code_size(task: Task) -> int:
    """Values in the code of `task`'s autoencoder."""
    return [m.out_features for m in encoder(_blank(task)) if isinstance(m, nn.Linear)][-1]


def from_snapshot(task: Task, snapshot: Mapping[str, Tensor]) -> nn.Sequential:
    """The model of a replica of the engine, from `BatchedTraining.snapshot`."""
    model = _blank(task)
    nn.utils.vector_to_parameters(snapshot["values"].float().cpu(), model.parameters())
    return model


@dataclass(frozen=True)
class Probed:
    """A method that trains autoencoders, and what a probe says of their codes at the end: `probe` in the runs' notes.

    Attributes:
        method: decides alone. Its type is one of those whose code the key of a `Cell` then covers.
    """

    method: WithPolicy | Cosine | Constant

    def attach(self, cohort: Cohort) -> Controller:
        labelled(cohort.task)  # rather an error now than after training
        return _Probing(self.method.attach(cohort), cohort)


class _Probing:
    def __init__(self, controller: Controller, cohort: Cohort) -> None:
        self._controller, self._cohort, self._left = controller, cohort, cohort.task.horizon
        self.notes: list[dict[str, Any]] = []

    @property
    def values(self) -> Mapping[str, Array]:
        return self._controller.values

    def step(self, signals: Mapping[str, Array]) -> None:
        self._left -= 1
        if not self._left:  # before a guard sets anything back
            task, snapshots = self._cohort.task, map(self._cohort.snapshot, range(self._cohort.runs))
            scores = [probe_code(task, from_snapshot(task, snapshot)) for snapshot in snapshots]
            notes = getattr(self._controller, "notes", [{}] * len(scores))
            self.notes = [{**note, "probe": score} for note, score in zip(notes, scores, strict=True)]
        self._controller.step(signals)


def _blank(task: Task) -> nn.Sequential:
    _check(task)
    return build_model(task.model, prepare(task).dataset)


def labelled(task: Task) -> Dataset:
    """The rows that `task` trains and validates on, with their own targets in place of reconstruction."""
    _check(task)
    return prepare(replace(task, model=ModelSpec("linear"), label_noise=0.0)).dataset


def _check(task: Task) -> None:
    if task.model.kind != "autoencoder":
        raise ValueError(f"{task.name} has no code to probe: the model must be an autoencoder")


def _score(data: Dataset, train: Array, val: Array) -> float:
    """Of features `[rows, features]`. Of a run that was lost, what is not finite counts as 0."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = LogisticRegression(max_iter=1000) if data.target == "classification" else Ridge()
    model = make_pipeline(StandardScaler(), probe)
    train, val = (np.nan_to_num(rows.astype(np.float64), posinf=0.0, neginf=0.0) for rows in (train, val))
    model.fit(train, data.train.targets.numpy())
    return float(model.score(val, data.val.targets.numpy()))
