"""The judge's figures, on evaluations whose right answer is known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest

from agents.application import Run
from agents.evaluation import FACTORS
from agents.searches import Searched, Trial
from agents.summary import losses, search_losses, summarize
from tests.fabricated import SEEDS, evaluation, run, runs

# -- golden cases ------------------------------------------------------------------------------------------------------


def test_a_policy_judged_against_itself() -> None:
    own = {"a": runs(1.0, 2.0, 0.5, 0.7), "b": runs(0.1, 0.3, 0.2, 0.9)}
    found = summarize(evaluation(own, lambda label: runs(*np.linspace(0.1, 3, 8))))
    summary = found["summary"]
    for measure in ("val", "test"):
        assert (summary[f"{measure}_log_ratio_iqm"], summary[f"{measure}_log_ratio_ci"]) == (0.0, [0.0, 0.0])
    assert summary["win_rate"] == summary["test_win_rate"] == 0.5
    assert summary["worst_decile"] == 0.0
    assert summary["rse_by_task"] == summary["rse_calibrated_by_task"]
    assert summary["speedup_iqm"] == 1.0
    assert found["tasks"]["a"]["methods"]["calibrated"]["val_log_ratio"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_policy_as_good_as_the_best_of_the_bank() -> None:
    own = {"a": runs(*[0.25] * SEEDS), "b": runs(*[0.5] * SEEDS)}
    banks = {"a": [3.0, 0.25, 1.0, 2.0, 0.5, 0.75, 1.5, 2.5], "b": [0.5, 1.0] * 4}
    found = summarize(evaluation(own, lambda label: runs(*banks[label])))["summary"]
    # On b, half of the bank is as good: any 5 of the 8 have one of those.
    assert found["rse_by_task"] == {"a": 8, "b": 5}
    assert found["rse_median"] == 6.5
    low, high = found["rse_median_ci"]
    assert low < 6.5 < high <= 8
    assert found["rse_cap"] == 8


def test_a_policy_that_is_worse_than_everything() -> None:
    own = {"a": runs(3.0, 3.5, math.nan, 3.2)}
    found = summarize(
        evaluation(own, lambda _: runs(*np.linspace(0.1, 1, 8)), {"calibrated": lambda _: runs(*[1] * 4)})
    )
    summary = found["summary"]
    assert summary["rse_by_task"] == {"a": 1}
    assert summary["rse_calibrated_by_task"]["a"] == 1  # the worst of the bank
    assert summary["win_rate"] == summary["test_win_rate"] == 0
    assert summary["val_log_ratio_ci"][1] < 0
    # The lost run counts as ten times its initial loss. Quantile 0.1 lies 0.3 of the way from the worst to the next.
    assert summary["worst_decile"] == pytest.approx(-(0.7 * math.log(40) + 0.3 * math.log(3.5)))
    assert summary["val_log_ratio_iqm"] == pytest.approx(-(math.log(3.2) + math.log(3.5)) / 2)
    assert found["tasks"]["a"]["methods"]["policy"]["lost"] == 1
    assert found["tasks"]["a"]["methods"]["policy"]["val"] == [3.0, 3.5, 40.0, 3.2]
    assert summary["bad_start_failures"]["policy"] == 1.0
    assert summary["pays_for_itself_after_runs"] is None


@pytest.mark.parametrize(("tests", "worth"), [(range(16), 3.5), (range(16, 0, -1), 1.0)])
def test_what_the_trials_are_worth_that_are_best_on_test(tests: Sequence[int], worth: float) -> None:
    # Of the losses 1..16 the expected best of n is 17 / (n + 1): the losses 1..8 are worth 16, 8, 5, 4, 3, 2, 2, 2.
    bank = [run(float(val), test=float(test)) for val, test in zip(range(1, 17), tests, strict=True)]
    found = summarize(evaluation({"a": runs(1.0, 2.0)}, lambda _: bank))
    assert found["tasks"]["a"]["rse_of_best_on_test"] == worth


def test_losses_by_hand() -> None:
    lost = Run(0, 2.0, [1.0] * 3, [1.5, math.inf, math.nan], {}, math.nan, -math.inf, 1.0)
    late = Run(1, 2.0, [1.0] * 3, [30.0, 0.25, 0.5], {}, 0.3, 25.0, 1.0)
    never = Run(2, 3.0, [1.0], [math.nan], {}, math.inf, math.inf, 1.0)
    found = {name: losses([lost, late, never], name).tolist() for name in ("val", "val_best", "test", "test_final")}
    assert found == {
        "val": [20, 0.5, 30],
        "val_best": [1.5, 0.25, 30],
        "test": [20, 0.3, 30],
        "test_final": [20, 20, 30],
    }


def test_bad_starts_by_hand() -> None:
    """Two tasks, two seeds: the bar is what the calibrated schedule reaches from its own start, seed by seed."""
    bars = {"a": runs(1.0, 2.0), "b": runs(1.0, 1.0)}
    ends = {"policy": (1.2, 1.8), "calibrated": (1.0, 1.5), "cosine": (math.nan, 0.1)}

    def starting(label: str, name: str, factor: float) -> list[Run]:
        return bars[label] if label == "b" or factor < 10 else runs(*ends[name])

    own = {"a": runs(1.0 + 1e-12, 2.1), "b": runs(0.5, math.inf)}
    found = summarize(evaluation(own, lambda _: runs(1, 2), {"calibrated": lambda label: bars[label]}, starting))
    failures = found["summary"]["bad_start_failures"]
    assert failures["policy"] == 2 / 4  # 2.1 and the lost one; what rounding adds is no failure
    shares = {"policy_given": 0.25, "calibrated": 0.0, "cosine": 0.25}  # one of four, at two of the five factors
    for name, share in shares.items():
        assert failures["by_factor"][name] == {str(f): share if f >= 10 else 0.0 for f in FACTORS}
        assert failures[name] == pytest.approx(share * 2 / 5)
    recovered = found["summary"]["bad_start_recovery"]
    # On a 1.2 / 1 and 1.8 / 2 of the policy's; 1 / 1 and 1.5 / 2; a lost one and 0.1 / 2. On b all are as good as good.
    for name, near, median in (("policy", 0.75, 1.0), ("calibrated", 1.0, 1.0), ("cosine", 0.75, 1.0)):
        for factor in FACTORS:
            expected = {"near": near, "median": median} if factor >= 10 else {"near": 1.0, "median": 1.0}
            assert recovered[name][str(factor)] == expected


def test_when_meta_training_has_paid_for_itself() -> None:
    own = {"a": runs(0.25, 0.25), "b": runs(0.5, 0.5)}
    worse = {"calibrated": lambda _: runs(2, 2)}  # worth one trial
    made = evaluation(own, lambda _: runs(0.5, 0.25, 1, 1), worse, training={"seconds": 60.0})
    found = summarize(made)["summary"]
    # On b, the expected best of one trial is 0.6875, of two (3 x 0.25 + 2 x 0.5 + 1) / 6.
    assert found["rse_by_task"] == {"a": 4, "b": 2}
    assert found["rse_median"] == 3.0
    assert found["pays_for_itself_after_runs"] == pytest.approx(60 / ((3 + 1) / 2 * 2))  # trials of 2 seconds


# -- searches ----------------------------------------------------------------------------------------------------------


def searched(cost: Sequence[float], best: Sequence[float], test: Sequence[float], seed: int = 0) -> Searched:
    trials = [Trial({"lr": 0.1}, [1.0], False) for _ in cost]
    return Searched(seed, list(cost), list(best), list(test), trials, 1.0)


def test_search_losses_by_hand() -> None:
    one = searched([0.5, 2.0, 3.0, 4.0], [math.inf, 0.9, 0.7, 0.7], [math.inf, 1.1, 1.3, 1.2])
    late = searched([3.0], [0.5], [0.6])
    rounded = searched([math.nextafter(2, 3), 4.0], [0.4, 0.3], [0.5, 0.2])  # a hair more than 2
    found = {cost: search_losses([one, late, rounded], cost, "val").tolist() for cost in (0.25, 1, 2, 3.5, 64)}
    assert found == {
        0.25: [math.inf] * 3,
        1: [math.inf] * 3,
        2: [0.9, math.inf, 0.4],
        3.5: [0.7, 0.5, 0.4],
        64: [0.7, 0.5, 0.3],
    }
    assert search_losses([one, late, rounded], 3, "test").tolist() == [1.3, 0.6, 0.5]


def test_searches_in_the_table() -> None:
    """Random search is the bank's expectation; a search counts from the cost at which all have found something."""
    own = {"a": runs(0.5, 0.5)}
    searches = {"a": {"tpe": [searched([1, 2, 3, 4, 5], [math.inf, 1.0, 1.0, 0.25, 0.25], [math.inf, 2, 2, 3, 3])]}}
    bank = [run(0.5, test=0.9), run(1.0, test=0.6), run(2.0, test=0.3), run(2.0, test=0.3)]
    found = summarize(evaluation(own, lambda _: bank, searches=searches))
    table = found["tasks"]["a"]
    # Of the six pairs, three have the best trial, two the second, and one neither; means are geometric.
    assert table["random_search"]["2"]["val"] == pytest.approx((0.5**3 * 1**2 * 2) ** (1 / 6))
    assert table["random_search"]["2"]["test"] == pytest.approx((0.9**3 * 0.6**2 * 0.3) ** (1 / 6))
    assert table["random_search"]["4"] == pytest.approx({"val": 0.5, "test": 0.9})
    assert table["searches"]["tpe"] == {
        "2": {"val": [1.0], "test": [2.0]},
        "4": {"val": [0.25], "test": [3.0]},
        "8": {"val": [0.25], "test": [3.0]},
    }
    against = found["summary"]["against_searches"]
    assert list(against["random"]) == ["2", "4"]
    assert against["random"]["4"]["val_log_ratio_iqm"] == pytest.approx(0)
    assert against["random"]["4"]["test_log_ratio_iqm"] == pytest.approx(math.log(0.9 / 0.75))
    assert against["tpe"]["2"]["val_log_ratio_iqm"] == pytest.approx(math.log(2))
    assert against["tpe"]["4"]["val_log_ratio_iqm"] == pytest.approx(-math.log(2))
    assert against["tpe"]["4"]["test_log_ratio_iqm"] == pytest.approx(math.log(4))


def test_figures_of_lost_runs_are_json() -> None:
    lost = [Run(seed, 2.0, [math.nan], [math.nan], {}, math.inf, math.nan, 1.0) for seed in range(2)]
    searches = {"a": {"gp": [searched([1.0], [math.inf], [math.inf])]}}
    found = summarize(evaluation({"a": lost}, lambda _: lost, searches=searches))
    json.dumps(found, allow_nan=False)
    assert found["summary"]["against_searches"]["gp"] == {}
    assert found["tasks"]["a"]["searches"] == {"gp": {}}
