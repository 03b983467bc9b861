from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest

from tinyclip.evaluate.stats import bootstrap, calibration, mcnemar


@pytest.fixture(scope="module")
def scipy_stats() -> Any:
    return import_module("scipy.stats")  # takes a second, so not in every test process


@pytest.mark.parametrize("lost", [0, 1, 2, 7, 40, 3000])
@pytest.mark.parametrize("won", [0, 1, 3, 8, 41, 3200])
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int, scipy_stats: Any) -> None:
    expected = scipy_stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(won, lost) == mcnemar(lost, won)


def test_mcnemar_of_many_pictures_does_not_overflow() -> None:
    assert mcnemar(15_000, 5_000) == 0
    assert mcnemar(10_000, 10_000) == 1


def test_intervals_of_means_and_ratios_are_scipys(scipy_stats: Any) -> None:
    generator = np.random.default_rng(3)
    hits = generator.random(400) < 0.3
    sums, sizes = generator.integers(0, 3, 400), generator.integers(3, 6, 400)
    ours = bootstrap({"mean": (hits, 1.0), "ratio": (sums, sizes)})
    options = {"method": "percentile", "n_resamples": 2000, "vectorized": False, "rng": generator}
    mean = scipy_stats.bootstrap((hits.astype(float),), np.mean, **options).confidence_interval
    ratio = scipy_stats.bootstrap((sums, sizes), lambda a, b: a.sum() / b.sum(), paired=True, **options)
    assert ours["mean"].value == hits.mean() and ours["ratio"].value == sums.sum() / sizes.sum()
    # A percentile of 2,000 samples has a standard error of about 0.06 standard deviations, here 0.0014 and 0.0008.
    assert ours["mean"].interval == pytest.approx(tuple(mean), abs=0.006)
    assert ours["ratio"].interval == pytest.approx(tuple(ratio.confidence_interval), abs=0.004)


def test_differences_are_paired_and_the_same_at_every_call() -> None:
    generator = np.random.default_rng(4)
    one, two = (generator.random((2, 90)) < [[0.6], [0.4]]).astype(float)
    found = bootstrap({"one": (one, 1.0), "two": (two, 1.0)})
    change = bootstrap({"change": (two - one, 1.0)})["change"]
    np.testing.assert_allclose(found["two"].minus(found["one"]).resampled, change.resampled, atol=1e-15)
    assert found["two"].minus(found["one"]).value == pytest.approx(change.value)
    assert bootstrap({"one": (one, 1.0)})["one"].interval == found["one"].interval
    assert found["one"].minus(found["one"]).interval == (0, 0)


def test_samples_without_a_member_of_a_subset_are_left_out() -> None:
    inside = np.array([True, False, False])  # missing from 8 of 27 samples
    figure = bootstrap({"subset": (inside, inside)})["subset"]
    assert figure.value == 1 and figure.interval == (1, 1)
    assert np.isnan(figure.resampled).any()


def test_calibration_against_a_loop() -> None:
    generator = np.random.default_rng(5)
    edges = [0.0, 1.0, 1 / 15, 2 / 15, 0.2, 7 / 15, 0.5]
    confidence = np.concatenate([generator.random(300), edges])
    right = generator.random(len(confidence)) < confidence**2
    found = calibration(confidence, right)
    error = 0.0
    for m in range(1, 16):
        low, high = (m - 1) / 15, m / 15
        own = [i for i, c in enumerate(confidence) if low < c <= high or (m == 1 and c == 0)]
        assert found.counts[m - 1] == len(own)
        if own:
            mean = sum(confidence[i] for i in own) / len(own)
            share = sum(bool(right[i]) for i in own) / len(own)
            assert (found.confidence[m - 1], found.accuracy[m - 1]) == (pytest.approx(mean), pytest.approx(share))
            error += len(own) / len(confidence) * abs(share - mean)
    assert found.error == pytest.approx(error)


def test_calibration_of_known_cases() -> None:
    assert calibration(np.full(4, 0.75), np.array([True, True, True, False])).error == 0
    assert calibration(np.ones(5), np.zeros(5, bool)).error == 1
    opposite = calibration(np.array([0.9, 0.1]), np.array([False, True]))  # errors of bins do not cancel out
    assert opposite.error == pytest.approx(0.9)
