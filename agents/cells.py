"""Cells: one method on one task with some seeds, computed once and kept, so that an evaluation never repeats a run.

A cell is known by its task, its method with all settings, its seeds, and the code that it runs: a change of any of
these is another cell. Comments, docstrings and formatting are not code.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed

from hpo_env.base_schedules import CALIBRATION_FILE
from inner_models.datasets import content_of
from inner_models.sampling import MICRO_BATCH
from inner_models.tasks import Task, prepare
from inner_models.workers import one_thread_each

from .application import Run, train, train_cohort
from .files import write_atomically
from .policy import ControlPolicy
from .provenance import provenance
from .searches import Searched

_ROOT = Path(__file__).parents[1]

_PACKAGES = {"searches": ("optuna",)}
"""Packages that decide what the methods of a module do."""

Result = list[Run] | list[Searched]


@dataclass(frozen=True)
class Cell:
    """One method on one task.

    Attributes:
        method: a search (it has `run`), what runs as a cohort (it has `attach`), or what attaches to a torch run.
        seeds: one run (or search) each.
    """

    task: Task
    method: Any
    seeds: tuple[int, ...]

    @property
    def is_search(self) -> bool:
        return hasattr(self.method, "run")

    @cached_property
    def key(self) -> str:
        """What the cell is known by. It goes along to worker processes, whatever becomes of the code meanwhile."""
        version = code_version(type(self.method).__module__)
        parts = [describe(self.task), describe(self.method), list(self.seeds), version, content_of(self.task.dataset)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def cost(self) -> float:
        """Rough seconds on one core, to order cells by."""
        data = prepare(self.task)
        row = data.dataset.train.inputs[0]
        positions = {"cnn": row[0].numel(), "gru": 8 * len(row), "transformer": 30 * len(row)}
        per_step = 5e-5 + 2e-6 * positions.get(self.task.model.kind, 0)
        if not hasattr(self.method, "attach") and not self.is_search:
            per_step += 5e-4  # plain PyTorch, step by step
        trials = getattr(self.method, "budget", getattr(self.method, "population", 1))
        return len(self.seeds) * trials * self.task.horizon * data.interval_examples / MICRO_BATCH * per_step

    def compute(self, device: str) -> Result:
        if self.is_search:
            found: list[Searched] = self.method.run(self.task, self.seeds, device)
            return found
        if hasattr(self.method, "attach"):
            return train_cohort(self.task, self.method, self.seeds, device=device)
        return [train(self.task, self.method, seed, device=device) for seed in self.seeds]


class Store:
    """Finished cells, one JSON file each.

    Args:
        folder: made if need be; may be shared between evaluations and processes.

    Attributes:
        origins: where and with what the cells loaded so far were computed, each once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.origins: list[dict[str, Any]] = []

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.task.name.replace('/', '-')}-{type(cell.method).__name__}-{cell.key[:24]}.json"

    def __contains__(self, cell: Cell) -> bool:
        return self.path(cell).is_file()

    def load(self, cell: Cell) -> Result:
        """The finished cell's result.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.path(cell)
        try:
            record = json.loads(path.read_text())
            origin = record["provenance"]
            results = [(Searched if cell.is_search else Run).from_dict(result) for result in record["results"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and it will be computed anew") from error
        if origin not in self.origins:
            self.origins.append(origin)
        return results  # type: ignore[return-value]

    def save(self, cell: Cell, results: Result, device: str) -> None:
        record = {
            "task": describe(cell.task),
            "method": describe(cell.method),
            "seeds": cell.seeds,
            "provenance": provenance(device),
            "results": [result.to_dict() for result in results],
        }
        write_atomically(self.path(cell), json.dumps(record, allow_nan=False).encode())


def run_cells(
    cells: Sequence[Cell],
    store: Store,
    *,
    workers: int = 2,
    device: str = "cpu",
    report: Callable[[float, float, str], None] = lambda done, total, name: None,
) -> None:
    """Compute the cells that `store` does not hold, the costliest first, each stored as soon as it is done.

    Args:
        workers: processes, one thread each; on a GPU there is one, whatever this says.
        report: receives the work done so far, all the work (both in `Cell.cost`), and what was finished.
    """
    cells = list({cell.key: cell for cell in cells}.values())
    missing = sorted((cell for cell in cells if cell not in store), key=lambda cell: -cell.cost)
    total = sum(cell.cost for cell in cells)
    done = total - sum(cell.cost for cell in missing)
    report(done, total, f"{len(cells) - len(missing)} of {len(cells)} cells were there")
    for index in _finished(missing, store, workers, device):
        done += missing[index].cost
        report(done, total, f"{missing[index].task.name} {type(missing[index].method).__name__}")


def _finished(cells: Sequence[Cell], store: Store, workers: int, device: str) -> Iterator[int]:
    if workers == 1 or not device.startswith("cpu"):
        for index, cell in enumerate(cells):
            yield _compute(index, cell, store, device)
        return
    jobs = (delayed(_in_worker)(index, cell, store, device) for index, cell in enumerate(cells))
    with one_thread_each():
        yield from Parallel(n_jobs=workers, return_as="generator_unordered")(jobs)


def _in_worker(index: int, cell: Cell, store: Store, device: str) -> int:
    torch.set_num_threads(1)
    return _compute(index, cell, store, device)


def _compute(index: int, cell: Cell, store: Store, device: str) -> int:
    store.save(cell, cell.compute(device), device)
    return index


def describe(value: Any) -> Any:
    """A task, a method or a part of one, as JSON: equal for equal settings only."""
    if isinstance(value, ControlPolicy):
        return {"policy": value.digest}
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        return {"array": hashlib.sha256(f"{data.dtype}{data.shape}".encode() + data.tobytes()).hexdigest()}
    if is_dataclass(value):
        return {type(value).__name__: {f.name: describe(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(key): describe(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [describe(entry) for entry in value]
    if value is None or isinstance(value, str | int | float):
        return value
    if hasattr(value, "state_dict"):
        return {type(value).__name__: describe(value.state_dict())}
    raise TypeError(f"no description of a {type(value).__name__}")


@cache
def code_version(module: str) -> str:
    """Hash of the code that a method runs: its module, what trains it, and all of this project that these import."""
    digest = hashlib.sha256()
    for path in sorted(_needed(_ROOT / "agents" / "application.py") | _needed(_path(module))):
        digest.update(path.relative_to(_ROOT).as_posix().encode() + _code_of(path.read_text()).encode())
    digest.update((_ROOT / "hpo_env" / CALIBRATION_FILE).read_bytes())
    for package in _PACKAGES.get(module.rpartition(".")[2], ()):
        digest.update(f"{package} {metadata.version(package)}".encode())
    return digest.hexdigest()


def _needed(module: Path) -> set[Path]:
    """A module of this project and, over and over, those that it imports."""
    found, left = {module}, [module]
    while left:
        path = left.pop()
        for module_name, relative, names in _imports(path.read_text()):
            name = f"{path.parent.name}.{module_name}" if relative else module_name
            imported = {_path(name), *(_path(f"{name}.{other}") for other in names)}
            new = {file for file in imported if file.is_file()} - found
            found |= new
            left += new
    return found


@cache
def _imports(source: str) -> list[tuple[str, bool, list[str]]]:
    """What `source` imports by `from ... import ...`: module, whether relative to its own package, names."""
    return [
        (node.module, node.level > 0, [alias.name for alias in node.names])
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module
    ]


def _path(module: str) -> Path:
    return _ROOT / (module.replace(".", "/") + ".py")


@cache  # most modules are behind most methods
def _code_of(source: str) -> str:
    """`source` without comments, docstrings and formatting, as this version of Python writes it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            texts = [entry for entry in body if isinstance(entry, ast.Expr) and isinstance(entry.value, ast.Constant)]
            node.body = [entry for entry in body if entry not in texts]  # type: ignore[attr-defined]
    return ast.dump(tree)
