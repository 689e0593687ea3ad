"""How figures look, and what they share.

Matplotlib is of the extra `compare`; nothing of its global state is left changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from agents.optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POLICY = "#D55E00"
"""The policy's own colour (Okabe & Ito's vermilion)."""

LABELS = {
    "lr": "learning rate",
    "batch_size": "batch size\n[examples]",
    "weight_decay": "weight decay",
    "dropout": "dropout",
    "augmentation": "augmentation",
    "label_smoothing": "label smoothing",
    "val": "validation",
    "test": "test, at the best validation loss",
}

_STYLE: dict[str, Any] = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "figure.titlesize": 10, "legend.fontsize": 8.5,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.8, "axes.grid": True, "grid.color": "#ECECEC", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.frameon": False, "lines.linewidth": 1.3, "savefig.dpi": 150, "figure.dpi": 150,
}  # fmt: skip

_DPI = 150
Arguments = ParamSpec("Arguments")


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each as `<name>.png`, making the folder if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=_DPI)
    return paths


def paper(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """`draw`, a function that makes a figure, in this project's style."""

    @wraps(draw)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with require("matplotlib", extra="compare").rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def subplots(rows: int, columns: int, *, width: float, height: float, **shared: Any) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes, `[rows, columns]`."""
    require("matplotlib", extra="compare")
    figure: Figure = require("matplotlib.figure", extra="compare").Figure(figsize=(width, height), layout="constrained")
    require("matplotlib.backends.backend_agg", extra="compare").FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def powers_of_two(axes: Any, low: float, high: float, axis: str = "x") -> None:
    ticks = [2**power for power in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    getattr(axes, f"set_{axis}scale")("log", base=2)
    axes.set(**{f"{axis}ticks": ticks, f"{axis}ticklabels": [str(tick) for tick in ticks]})
    axes.minorticks_off()


def log_axis(axes: Any) -> None:
    """A logarithmic vertical axis that bears at least two numbers: powers of ten if it spans a factor of 30, else 1, 2
    and 5 in each, or whatever it takes where it spans less."""
    ticker = require("matplotlib.ticker", extra="compare")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)]
    locator = ticker.MaxNLocator(5, steps=[1, 2, 5, 10])
    choices: list[tuple[int, ...]] = [(1, 2, 5), tuple(range(1, 10))]
    for digits in [(1,), *choices] if high > 30 * low else choices:
        if sum(low <= digit * power <= high for digit in digits for power in powers) >= 2:
            locator = ticker.LogLocator(subs=digits)
            break
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def legend(figure: Figure, axes: Any, *, columns: int, reverse: bool = False) -> None:
    """One legend below all panels, each name once."""
    handles, names = axes.get_legend_handles_labels()
    entries = dict(zip(names, handles, strict=True))
    order = list(entries)[::-1] if reverse else list(entries)
    figure.legend([entries[name] for name in order], order, loc="outside lower center", ncols=columns)
