"""Measures of finished runs: values computed by hand or by enumeration, and what bad input does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import trim_mean

from agents.measures import (
    LOSS_FLOOR,
    Interval,
    capped,
    equivalents_interval,
    expected_at_best,
    expected_best,
    interquartile_mean,
    log_ratio,
    mean,
    performance_profile,
    random_search_equivalents,
    speedup,
    win_rate,
    worst_decile,
)
from hpo_env.rewards import CEILING

# Whatever a measure is given, it warns of nothing.
pytestmark = pytest.mark.filterwarnings("error")

MULTIPLES = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
CURVE = [3.0, 2.1, 1.7, 1.3, 1.1, 0.7]

Aggregate = Callable[..., Interval]


def test_capped_by_hand() -> None:
    losses = [[0.5, 20.0, 20.5, 1e308], [np.nan, np.inf, -np.inf, -1.0]]
    assert CEILING == 10
    assert capped(losses, 2.0).tolist() == [[0.5, 20, 20, 20], [20, 20, 20, -1]]
    assert capped(losses, [[2.0], [1.0]]).tolist() == [[0.5, 20, 20, 20], [10, 10, 10, -1]]
    assert capped([np.nan, 5.0, 3.0], [1.0, 2.0, 2.0], ceiling=2).tolist() == [2, 4, 3]


def test_expected_best_by_hand() -> None:
    # Pairs of 1, 2, 4 have the minima 1, 1, 2.
    assert expected_best([4, 1, 2]) == pytest.approx([7 / 3, 4 / 3, 1], rel=1e-14)
    assert expected_best([3]).tolist() == [3]


@pytest.mark.parametrize("seed", [0, 1])
def test_expected_best_is_the_mean_over_all_subsets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bank, tests = rng.lognormal(size=7), rng.lognormal(size=7)
    bank[3] = bank[5]  # a tie, which the first wins
    for n in range(1, 8):
        subsets = list(itertools.combinations(range(7), n))
        best = [min(subset, key=lambda trial: bank[trial]) for subset in subsets]
        assert expected_best(bank)[n - 1] == pytest.approx(np.mean(bank[best]), rel=1e-13)
        assert expected_at_best(bank, tests)[n - 1] == pytest.approx(np.mean(tests[best]), rel=1e-13)


def test_expected_best_of_a_large_bank() -> None:
    bank = np.random.default_rng(0).lognormal(sigma=3, size=1000)
    expected = expected_best(bank)
    assert expected[-1] == bank.min()
    assert expected[0] == pytest.approx(bank.mean(), rel=1e-12)
    assert (np.diff(expected) < 0).all()
    ordered, n = np.sort(bank).tolist(), 500
    weighted = sum(value * math.comb(999 - i, n - 1) / math.comb(1000, n) for i, value in enumerate(ordered))
    assert expected[n - 1] == pytest.approx(weighted, rel=1e-11)


def test_expected_at_best_by_hand() -> None:
    # Chosen by 1, 2, 4: the values 10, 0, 5, in pairs 10, 10, 0. Ties: the first of the bank.
    assert expected_at_best([4, 1, 2], [5, 10, 0]) == pytest.approx([5, 20 / 3, 10], rel=1e-14)
    assert expected_at_best([1, 1], [3, 5]).tolist() == [4, 3]
    assert expected_at_best([1, 1], [5, 3]).tolist() == [4, 5]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(5, 1), (7 / 3, 1), (2.33, 2), (4 / 3, 2), (1.33, 3), (1, 3), (0.5, 3)],
)
def test_random_search_equivalents_by_hand(loss: float, expected: int) -> None:
    assert random_search_equivalents([2, 4, 1], loss) == expected


@pytest.mark.parametrize("seed", range(5))
def test_random_search_equivalents_of_its_own_bank(seed: int) -> None:
    bank = np.random.default_rng(seed).lognormal(size=256)
    assert random_search_equivalents(bank, bank.min()) == 256
    assert random_search_equivalents(bank, bank.min() * (1 + 1e-9)) == 256
    assert random_search_equivalents(bank, bank.mean()) == 1
    assert [random_search_equivalents(bank, loss) for loss in expected_best(bank)] == list(range(1, 257))


def test_interval_of_the_median_of_equivalents() -> None:
    """Where neither trials nor seeds differ, nothing varies; else as the tasks' own intervals do."""
    same, cap = [1.0] * 16, [2.0] * 16
    settled = equivalents_interval([same, cap, same], [[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]])
    assert (settled.value, settled.low, settled.high) == (1, 1, 1)
    bank, runs = np.linspace(1, 2, 64), [1.01, 1.02, 1.2]
    alone, far = (equivalents_interval([bank], [own]) for own in (runs, [2.0, 2.0]))
    assert alone.low < alone.value < alone.high
    assert (far.value, far.low, far.high) == (1, 1, 1)
    thrice = equivalents_interval([bank] * 3, [runs] * 3)
    assert thrice.value == alone.value
    assert alone.low <= thrice.low < thrice.value < thrice.high < alone.high  # the median of three varies less
    between = equivalents_interval([bank, bank], [runs, [2.0, 2.0]])
    assert between.value == (alone.value + 1) / 2


def test_random_search_equivalents_of_equal_losses() -> None:
    # Among any 5 of 7 is one of the three best; all of a bank that is constant are the best.
    assert random_search_equivalents([0.1, 0.1, 0.7, 0.8, 0.1, 0.3, 0.9], 0.1) == 5
    for value in (0.0, 0.1, 0.3, 0.7, 1e-12, 1e300):
        assert random_search_equivalents([value] * 100, value) == 1


def test_speedup_by_hand() -> None:
    # Log-log halfway from (1, 8) to (2, 2) lies (sqrt 2, 4), a quarter of the way lies (2^(1/4), 8 / sqrt 2).
    assert speedup([1, 2], [8, 2], 4) == pytest.approx(math.sqrt(2))
    assert speedup([1, 2], [8, 2], 8 / math.sqrt(2)) == pytest.approx(2**0.25)
    assert speedup([0.25, 1, 8], [16, 8, 1], 2) == pytest.approx(4)
    assert speedup([0.25, 1, 8], [16, 8, 1], 8 * math.sqrt(2)) == pytest.approx(0.5)
    assert speedup(MULTIPLES, CURVE, 3.0) == speedup(MULTIPLES, CURVE, 9.0) == 0.25
    assert speedup(MULTIPLES, CURVE, 0.69) == 8
    assert speedup([2], [1], 0.5) == speedup([2], [1], 1.5) == 2


def test_speedup_against_itself_is_exact() -> None:
    assert [speedup(MULTIPLES, CURVE, loss) for loss in CURVE] == MULTIPLES
    odd = [0.3, 1.0, 3.3]
    assert [speedup(odd, [0.7, 0.3, 0.1], loss) for loss in (0.7, 0.3, 0.1)] == odd


def test_speedup_takes_the_first_crossing() -> None:
    assert speedup([1, 2, 4, 8], [8, 2, 8, 1], 2) == 2
    assert speedup([1, 2, 4, 8], [8, 2, 8, 1], 4) == pytest.approx(math.sqrt(2))
    assert speedup([1, 2, 4], [8, 8, 8], 8) == 1
    assert speedup([1, 2, 4], [9, 8, 8], 8) == 2
    assert speedup([1, 2], [np.nextafter(1, 2), 1], 1) == 2


def test_log_ratio_by_hand() -> None:
    assert log_ratio([[2.0, 1.0], [3.0, 0.5]], [[1.0, 2.0], [3.0, 0.5]]).tolist() == [
        [math.log(2), -math.log(2)],
        [0, 0],
    ]


def test_log_ratio_near_zero() -> None:
    assert LOSS_FLOOR == 1e-12
    assert log_ratio([0.0, 1.0, 1e-13, -1e-17], [0.0, 0.0, 1e-12, 1e-300]) == pytest.approx(
        [0, 12 * math.log(10), 0, 0]
    )


def test_a_run_against_itself() -> None:
    losses = capped([0.3, np.nan, 0.0, 7.0], 1.5)
    ratios = log_ratio(losses, losses)
    assert ratios.tolist() == [0] * 4
    assert win_rate(ratios) == 0.5
    assert worst_decile(ratios) == 0
    assert interquartile_mean([ratios[:2], ratios[2:]]) == Interval(0, 0, 0)


def test_interquartile_mean_by_hand() -> None:
    # Of 8 values 2 are cut at either end: 3, 4, 5, 6 stay. Of 3 values none.
    assert interquartile_mean([[1, 900, 5, 4], [6, 3], [-50, 7]]).value == 4.5
    assert interquartile_mean([[1, 2, 6]]).value == 3
    assert mean([[1, 2], [6]]).value == 3
    strata = np.random.default_rng(0).normal(size=(6, 5))
    assert interquartile_mean(list(strata)).value == pytest.approx(trim_mean(strata.ravel(), 0.25), rel=1e-14)
    assert mean(list(strata)).value == pytest.approx(strata.mean(), rel=1e-14)


@pytest.mark.parametrize("aggregate", [interquartile_mean, mean])
def test_strata_are_resampled_within_themselves(aggregate: Aggregate) -> None:
    constant = [np.full(5, value) for value in (-3.0, 0.1, 0.7, 20.0)]
    within = aggregate(constant)
    assert within.low == within.high == within.value
    pooled = aggregate([np.concatenate(constant)])
    assert pooled.high - pooled.low > 1


@pytest.mark.parametrize("aggregate", [interquartile_mean, mean])
@pytest.mark.parametrize(
    "strata",
    [
        [[0.1]],
        [[0.1], [0.7], [-3.0]],
        [[0.1] * 7],
        [[0.1] * 7, [0.1]],
        [[0.1] * 3, [0.7] * 2, [5.0]],
        [[0.21]],  # SciPy's own interval ends are rounded at these
        [[0.33, 0.33]],
    ],
)
def test_strata_that_cannot_vary_have_no_width(aggregate: Aggregate, strata: list[list[float]]) -> None:
    interval = aggregate(strata)
    assert interval.low == interval.high == interval.value
    assert interval.value == pytest.approx(float(trim_mean(np.concatenate(strata), 0.25 * (aggregate is not mean))))


def test_intervals_by_enumeration() -> None:
    # Resamples of (0, 1) have the means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4; the lone 2 is always there, once.
    assert mean([[0, 1]]) == Interval(0.5, 0, 1)
    assert mean([[0, 1]], level=0.4) == Interval(0.5, 0.5, 0.5)
    lone = mean([[0, 1], [2]])
    assert [lone.low, lone.value, lone.high] == pytest.approx([2 / 3, 1, 4 / 3])
    # 5 and 1/8 for each of 8 fair coins: at most 0 are heads in 0.4 % of all cases, at most 1 in 3.5 %.
    coins = mean([[0, 1], [10, 11], [0, 1], [10, 11]])
    assert [coins.low, coins.value, coins.high] == pytest.approx([5 + 1 / 8, 5.5, 5 + 7 / 8])


@pytest.mark.parametrize("aggregate", [interquartile_mean, mean])
def test_intervals_cover_and_repeat(aggregate: Aggregate) -> None:
    rng = np.random.default_rng(0)
    covered = [aggregate(list(rng.normal(3, 1, (4, 8))), resamples=300) for _ in range(100)]
    hits = sum(interval.low <= 3 <= interval.high for interval in covered)
    assert 84 <= hits < 100  # 95 % nominal; the percentile method is a little narrow for 8 seeds
    assert all(interval.low < interval.value < interval.high for interval in covered)
    strata = list(rng.normal(size=(4, 8)))
    assert aggregate(strata, seed=1) == aggregate(strata, seed=1) != aggregate(strata, seed=2)
    wide, narrow = aggregate(strata), aggregate(strata, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_shares_by_hand() -> None:
    ratios = [[0.2, -0.1], [0.0, 0.3]]
    assert win_rate(ratios) == 0.625
    assert win_rate([-1e-300]) == 0
    assert worst_decile(np.arange(11.0)[::-1]) == 1
    assert worst_decile([[0.0], [1.0]]) == pytest.approx(0.1)
    assert performance_profile(ratios, [-1, -0.1, 0, 0.25, 0.3]).tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: capped([1.0], [0.0]), "initial must be finite and above 0, got 0.0"),
        (lambda: capped([1.0], np.nan), "initial .* got nan"),
        (lambda: capped([1.0], 1.0, ceiling=-2), "ceiling .* got -2.0"),
        (lambda: expected_best([]), r"losses .* got shape \(0,\)"),
        (lambda: expected_best([[1.0, 2.0]]), r"losses .* of 1 dimensions, got shape \(1, 2\)"),
        (lambda: expected_best([1.0, np.inf]), "losses must be finite, got inf"),
        (lambda: expected_at_best([1.0, 2.0], [1.0]), r"values .* of shape \(2,\), got shape \(1,\)"),
        (lambda: expected_at_best([1.0], [np.nan]), "values must be finite, got nan"),
        (lambda: random_search_equivalents([1.0], np.nan), "loss must be finite, got nan"),
        (lambda: speedup([1, 2], [2.0, 1.0], 0.0), "loss must be finite and above 0, got 0.0"),
        (lambda: speedup([1, 2], [2.0, -1.0], 1.0), "baseline .* got -1.0"),
        (lambda: speedup([0, 2], [2.0, 1.0], 1.0), "multiples .* got 0.0"),
        (lambda: speedup([2, 1], [2.0, 1.0], 1.0), r"multiples must rise, got \[2.0, 1.0\]"),
        (lambda: speedup([1, 1], [2.0, 1.0], 1.0), "multiples must rise"),
        (lambda: speedup([1, 2], [2.0], 1.0), r"baseline .* of shape \(2,\)"),
        (lambda: log_ratio([1.0], [-0.5]), "own must be finite and above -1e-12, got -0.5"),
        (lambda: log_ratio([np.inf], [1.0]), "baseline .* got inf"),
        (lambda: log_ratio([[1.0], [2.0]], [1.0, 2.0]), r"own .* of shape \(2, 1\), got shape \(2,\)"),
        (lambda: interquartile_mean([]), "0 strata"),
        (lambda: interquartile_mean([[1.0], []]), r"strata\[1\] .* got shape \(0,\)"),
        (lambda: interquartile_mean([[1.0], [2.0, np.nan]]), r"strata\[1\] must be finite, got nan"),
        (lambda: mean([[1.0, 2.0]], level=1.0), r"level in \(0, 1\), .* got 1.0"),
        (lambda: mean([[1.0, 2.0]], level=0.0), r"level in \(0, 1\), .* got 0.0"),
        (lambda: mean([[1.0, 2.0]], resamples=1), "resamples >= 2 .* got 0.95, 1"),
        (lambda: win_rate([]), "ratios must be a non-empty array, got shape"),
        (lambda: worst_decile([np.nan, 1.0]), "ratios must be finite, got nan"),
        (lambda: performance_profile([1.0], [[0.0]]), "thresholds .* of 1 dimensions"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
