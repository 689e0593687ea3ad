"""Measures that compare finished runs: pure functions of losses. Lower losses are better, log ratios above 0 are wins.

Unless a docstring says otherwise, an input that is empty, misshapen or not finite raises a ValueError that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap, trim_mean

from hpo_env.hyperparameters import Array
from hpo_env.rewards import CEILING

LOSS_FLOOR = 1e-12
"""Losses below this count as this in a log ratio."""

ROUNDING = 1e-12
"""Relative difference that is put down to rounding where a loss is compared with an expected one."""


def capped(losses: ArrayLike, initial: ArrayLike, ceiling: float = CEILING) -> Array:
    """Losses of lost runs made finite: one that is not finite (-inf too), or is above the cap, counts as the cap.

    Args:
        losses: any shape.
        initial: losses before training, > 0; broadcast against `losses`.
        ceiling: the cap, as a multiple of `initial`, > 0.

    Returns:
        The broadcast shape, finite.
    """
    values = np.asarray(losses, np.float64)
    cap = _checked("ceiling", ceiling, 0, above=0) * _checked("initial", initial, above=0)
    return np.asarray(np.where(np.isfinite(values), np.minimum(values, cap), cap))


def expected_best(losses: ArrayLike) -> Array:
    """Expected least loss of n trials, for every n: E_n = sum_i L_(i) C(N - i, n - 1) / C(N, n), L_(1) the least.

    The n trials are drawn *without* replacement from the N in the bank: the mean over all its subsets of size n, the
    unbiased estimator of Tang et al. 2020 ("Showing Your Work Doesn't Always Work"). Dodge et al. 2019 ("Show Your
    Work") draw with replacement, where even N draws may miss the best trial, so that no n reaches it. Here E_N is the
    bank's minimum exactly: a run that equals the best of the bank is worth the whole bank.

    From `[N]` to `[N]`, entry n - 1 for n trials; but for rounding, it never rises.
    """
    return expected_at_best(losses, losses)


def expected_at_best(losses: ArrayLike, values: ArrayLike) -> Array:
    """Expected value (a test loss, say) of the trial of least loss among n drawn as in `expected_best`, for every n.

    Args:
        losses: what the best is chosen by, `[N]`; of equal ones the first in the bank is the best.
        values: what is reported of it, `[N]`. Entry n - 1 of the result, `[N]` too, is for n trials.
    """
    chosen_by = _checked("losses", losses, 1)
    reported = _checked("values", values, like=chosen_by)
    # The first weight is n / N, each further one the one before times (N - i - n + 1) / (N - i): products of numbers in
    # [0, 1], so nothing cancels or overflows, and from i = N - n + 2 on they are exactly 0.
    count = len(chosen_by)
    trials, left = np.arange(1, count + 1)[:, None], np.arange(count - 1, 0, -1)
    weights = np.cumprod(np.hstack([trials / count, np.maximum(left - trials + 1, 0) / left]), axis=1)
    return np.asarray(weights @ reported[np.argsort(chosen_by, kind="stable")])


def random_search_equivalents(bank: ArrayLike, loss: float) -> int:
    """The smallest n whose expected best of n random trials is no worse than `loss`.

    Args:
        bank: losses of the random trials, `[N]`.
        loss: of the run to judge.

    Returns:
        1 .. N. N is a cap: it also stands for a loss below everything in the bank.
    """
    return trials_to_reach(expected_best(bank), loss)


def trials_to_reach(expected: ArrayLike, loss: float) -> int:
    """The smallest n of which `expected`, as from `expected_best` or `expected_at_best`, is no worse than `loss`.

    Args:
        expected: `[N]`, entry n - 1 for n trials.

    Returns:
        1 .. N, and N also where none is.
    """
    own, curve = float(_checked("loss", loss, 0)), _checked("expected", expected, 1)
    reached = curve <= own + ROUNDING * abs(own)
    return int(reached.argmax()) + 1 if reached.any() else len(reached)


def equivalents_interval(
    banks: Sequence[ArrayLike], losses: Sequence[ArrayLike], resamples: int = 300, seed: int = 0
) -> Interval:
    """Median over tasks of the `random_search_equivalents` of a run's mean loss, with its 95 % bootstrap percentile
    interval: how it varies with seeds and searches, not with the choice of tasks.

    Args:
        banks: of each task, `[N]`, at least 2 trials; resampled, for another search would have drawn others.
        losses: of the run to judge on each task, `[seeds]`, at least 2; resampled too.
    """

    def statistic(trials: Array, runs: Array) -> float:
        return float(random_search_equivalents(trials, float(runs.mean())))

    rng = np.random.default_rng(seed)
    values, resampled = [], []
    for bank, own in zip(banks, losses, strict=True):
        data = (_checked("bank", bank, 1), _checked("losses", own, 1))
        values.append(statistic(*data))
        result = bootstrap(
            data, statistic, n_resamples=resamples, vectorized=False, method="percentile", random_state=rng
        )
        resampled.append(result.bootstrap_distribution)
    low, high = np.percentile(np.median(resampled, axis=0), [2.5, 97.5])
    return Interval(float(np.median(values)), float(low), float(high))


def speedup(multiples: ArrayLike, baseline: ArrayLike, loss: float) -> float:
    """Budget multiple at which the baseline first reaches `loss`, linear in (log multiple, log loss) in between.

    Args:
        multiples: budgets in units of the judged run's own, `[M]`, > 0 and rising, such as 0.25, 0.5, 1, 2, 4, 8.
        baseline: final losses of the baseline at these, `[M]`, > 0. They need not fall: the first crossing counts.
        loss: of the run to judge, > 0.

    Returns:
        Within [multiples[0], multiples[-1]], the first also if the baseline is there already, the last also if it
        never gets there. A loss that the baseline first reaches at one of the multiples gives that multiple exactly.
    """
    budgets, own = _checked("multiples", multiples, 1, above=0), float(_checked("loss", loss, 0, above=0))
    losses = _checked("baseline", baseline, above=0, like=budgets)
    if not (np.diff(budgets) > 0).all():
        raise ValueError(f"multiples must rise, got {budgets.tolist()}")
    reached = losses <= own
    if reached[0] or not reached.any():
        return float(budgets[0 if reached[0] else -1])
    around = slice(int(reached.argmax()) - 1, int(reached.argmax()) + 1)
    (less, more), (above, below) = budgets[around].tolist(), losses[around].tolist()
    # Backwards from the crossing: the exponent is exactly 0 where the losses are equal.
    return float(more * (less / more) ** (math.log(own / below) / math.log(above / below)))


def log_ratio(baseline: ArrayLike, own: ArrayLike) -> Array:
    """ln(baseline / own), above 0 where `own` is better, of paired losses of one shape, as from `capped`.

    Losses within LOSS_FLOOR of 0 count as LOSS_FLOOR; those further below 0 are an error.
    """
    theirs = _checked("baseline", baseline, above=-LOSS_FLOOR)
    ours = _checked("own", own, above=-LOSS_FLOOR, like=theirs)
    return np.asarray(np.log(np.maximum(theirs, LOSS_FLOOR)) - np.log(np.maximum(ours, LOSS_FLOOR)))


@dataclass(frozen=True)
class Interval:
    """An aggregate, `value`, and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def interquartile_mean(
    strata: Sequence[ArrayLike], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of the middle half of all values pooled, with a stratified-bootstrap percentile interval.

    Source: Agarwal et al. 2021 ("Deep RL at the Edge of the Statistical Precipice", rliable). Seeds are resampled
    within each task, so the interval says how the figure varies with the seeds, not with the choice of tasks.

    Args:
        strata: one array a task, one value a seed, `[seeds]` each. Lengths may differ, and every value counts alike.
        level: confidence level, in (0, 1).
        resamples, seed: of the bootstrap; at least 2 resamples.

    Returns:
        The interval; of width 0 where resampling changes nothing, as with one value a stratum.
    """
    return _bootstrapped(lambda pooled: trim_mean(pooled, 0.25, axis=-1), strata, level, resamples, seed)


def mean(strata: Sequence[ArrayLike], level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """As `interquartile_mean`, of the plain mean: for the few seeds of one task, as the only stratum."""
    return _bootstrapped(lambda pooled: pooled.mean(axis=-1), strata, level, resamples, seed)


def win_rate(ratios: ArrayLike) -> float:
    """Share of the log ratios, of any shape, that are above 0; ties count half."""
    return float((np.sign(_checked("ratios", ratios)).mean() + 1) / 2)


def worst_decile(ratios: ArrayLike) -> float:
    """The 10 % quantile of the log ratios, of any shape, linear between two of them."""
    return float(np.quantile(_checked("ratios", ratios), 0.1))


def performance_profile(ratios: ArrayLike, thresholds: ArrayLike) -> Array:
    """Share of (task, seed), `ratios` of any shape, above each of the `[thresholds]` (Agarwal et al. 2021, 4.2)."""
    above = _checked("ratios", ratios).reshape(-1, 1) > _checked("thresholds", thresholds, 1)
    return np.asarray(above.mean(axis=0))


def _bootstrapped(
    statistic: Callable[[Array], Any], strata: Sequence[ArrayLike], level: float, resamples: int, seed: int
) -> Interval:
    """`statistic`, from `[..., values]` to `[...]`, of the pooled strata."""
    if not (0 < level < 1 and resamples >= 2 and len(strata)):
        got = f"{level}, {resamples}, {len(strata)} strata"
        raise ValueError(f"level in (0, 1), resamples >= 2 and strata are needed, got {got}")
    samples = [_checked(f"strata[{index}]", stratum, 1) for index, stratum in enumerate(strata)]

    def of_pooled(*drawn: Array, axis: int) -> Any:
        return statistic(np.concatenate([d[..., : len(s)] for d, s in zip(drawn, samples, strict=True)], axis))

    # SciPy refuses samples of one value: such a one goes in twice, and is cut to one again before it counts. The ends
    # of its own interval are one rounding off where all resamples are alike; NumPy's quantiles of them are not.
    given = [np.repeat(sample, 2) if len(sample) == 1 else sample for sample in samples]
    rng = np.random.default_rng(seed)
    drawn = bootstrap(given, of_pooled, n_resamples=resamples, vectorized=True, method="percentile", random_state=rng)
    low, high = np.quantile(drawn.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(float(of_pooled(*given, axis=-1)), low, high)


def _checked(
    name: str, values: ArrayLike, ndim: int | None = None, *, above: float = -math.inf, like: Array | None = None
) -> Array:
    """`values` as an array: not empty, finite, above `above`; of `ndim` dimensions, or shaped `like`, where given."""
    array = np.asarray(values, np.float64)
    if not array.size or ndim not in (None, array.ndim) or (like is not None and array.shape != like.shape):
        wanted = f" of shape {like.shape}" if like is not None else f" of {ndim} dimensions" if ndim is not None else ""
        raise ValueError(f"{name} must be a non-empty array{wanted}, got shape {array.shape}")
    bad = array[~(np.isfinite(array) & (array > above))]
    if bad.size:
        raise ValueError(f"{name} must be finite{'' if above == -math.inf else f' and above {above}'}, got {bad[0]}")
    return array
