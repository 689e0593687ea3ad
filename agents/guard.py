"""`Guard`: notices that a run has diverged, and takes it back to its best state."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .tolerance import Notices
from .watch import FRUITLESS, Finding, Watch

_MEANING = {
    False: "the losses themselves must have changed their meaning. They are believed from now on (guard=False does so "
    "from the start)",
    True: "the training loss is finite, so validation must be what is broken (a bad row, a mean over nothing). Its "
    "loss counts as not measured until it is finite",
}
"""What it means that taking a run back does not help, by whether validation alone is not finite."""


class Guard:
    """Keeps one copy of the model's and the optimizer's state, the run's best, in main memory."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, notices: Notices, *, lowers_lr: bool
    ) -> None:
        self._model, self._optimizer, self._notices = model, optimizer, notices
        self._lowers_lr = lowers_lr
        self._watch = Watch()
        self._divergences = 0  # in a row
        self._snapshot: dict[str, Any] = {}
        self._take()

    @property
    def validation_is_broken(self) -> bool:
        """As in `Watch`."""
        return self._watch.validation_is_broken

    def begin(self) -> None:
        """Training begins, from the state that there is now: weights may have been loaded since."""
        with self._notices.surviving("keeping a snapshot"):
            self._take()

    def check(self, epoch: int, losses: Mapping[str, float]) -> Finding:
        """Look at an epoch's losses, one or more. A new best is remembered with the run's state, to which a divergence
        takes it back.
        """
        found = self._watch.check(losses)
        self._divergences = self._divergences + 1 if found.verdict else 0
        if found.taken_back:
            self._notices.tell(
                "taken back",
                f"epoch %d: as bad after %d restores in a row: {_MEANING[self.validation_is_broken]}%s",
                epoch,
                found.taken_back,
                "; lr is back where it was" if self._lowers_lr else "",
            )
        if found.improved:
            with self._notices.surviving("keeping a snapshot"):
                self._take()
        if found.verdict:
            then = " and lowered lr to a quarter" if self._lowers_lr else ""
            with self._notices.surviving("restoring the best snapshot"):
                self.restore()
                self._notices.tell(
                    "divergence", "epoch %d: %s; restored the best snapshot%s", epoch, found.verdict, then
                )
            if self._divergences > FRUITLESS:
                self._notices.tell(
                    "lost",
                    "epoch %d: %s, %d times in a row: nothing is learned any more, as the run is taken back each time. "
                    "Look for what is not finite in the data, the model or the loss",
                    epoch,
                    found.verdict,
                    self._divergences,
                )
        return found

    @torch.inference_mode(False)  # as in `_take`
    def restore(self) -> None:
        """Load the snapshot; the parameter groups keep their settings.

        Raises:
            RuntimeError: the model has other tensors by now; those that fit are restored.
        """
        groups = self._optimizer.param_groups
        if _shapes(groups) == self._shapes:  # else no state fits them
            kept = [{key: value for key, value in group.items() if key != "params"} for group in groups]
            self._optimizer.load_state_dict(copy.deepcopy(self._snapshot["optimizer"]))
            for group, values in zip(self._optimizer.param_groups, kept, strict=True):
                group.update(values)
        self._model.load_state_dict(self._snapshot["model"])

    def state_dict(self) -> dict[str, Any]:
        return {**self._watch.state_dict(), "snapshot": _copied(self._snapshot)}

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: it is damaged, or of another model; the guard stays as it was.
        """
        own = self._snapshot
        snapshot = state["snapshot"] or own  # there is none where taking one failed
        parameters = own["model"].keys() & {name for name, _ in self._model.named_parameters()}
        if any(_layout(snapshot["model"][name]) != _layout(own["model"][name]) for name in parameters):
            raise ValueError("the guard's snapshot is of another model")
        moments, groups = snapshot["optimizer"]["state"], snapshot["optimizer"]["param_groups"]
        if any(_layout(moments[index]) != _layout(own["optimizer"]["state"].get(index)) for index in moments):
            raise ValueError(
                "the guard's snapshot is of another optimizer, or the optimizer's state was not loaded first"
            )
        if any("params" not in group for group in groups):
            raise ValueError("the guard's snapshot lacks the optimizer's parameters")
        self._watch.load_state_dict(state)
        self._shapes = _shapes(self._optimizer.param_groups)
        self._snapshot = _copied(snapshot)  # not the caller's own: the next best overwrites it

    @torch.inference_mode(False)  # a tensor made in that mode could not be overwritten outside of it
    def _take(self) -> None:
        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
        self._shapes = _shapes(self._optimizer.param_groups)
        into, self._snapshot = self._snapshot, {}  # which is all that a failure leaves, not a mixture
        self._snapshot = _copied(state, into)


def _shapes(groups: list[dict[str, Any]]) -> list[list[torch.Size]]:
    return [[parameter.shape for parameter in group["params"]] for group in groups]


def _layout(state: Any) -> Any:
    """The names, shapes and types of an entry of a state dict."""
    if isinstance(state, dict):
        return {name: _layout(value) for name, value in state.items()}
    return state.shape if isinstance(state, Tensor) else type(state)


def _copied(state: Any, into: Any = None) -> Any:
    """A copy of a state dict, its tensors in main memory: in those of `into`, an earlier copy, wherever they fit."""
    if isinstance(state, Tensor):
        fits = isinstance(into, Tensor) and (into.shape, into.dtype) == (state.shape, state.dtype)
        return into.copy_(state.detach()) if fits else state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        known = into if isinstance(into, dict) else {}
        return {key: _copied(value, known.get(key)) for key, value in state.items()}
    if isinstance(state, list):
        known = dict(enumerate(into)) if isinstance(into, list) else {}
        return [_copied(value, known.get(index)) for index, value in enumerate(state)]
    return copy.deepcopy(state)
