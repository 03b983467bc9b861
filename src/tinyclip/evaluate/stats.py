"""Confidence intervals, a paired test and calibration, on plain NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
BINS = 15

Key = TypeVar("Key")


@dataclass(frozen=True)
class Bootstrapped:
    """A metric, and its values on bootstrap samples, (resamples,)."""

    value: float
    resampled: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """Return the percentile interval of `LEVEL` (Efron, 1979), ignoring samples with nothing to count."""
        tail = (1 - LEVEL) / 2
        low, high = np.nanquantile(self.resampled, (tail, 1 - tail))
        return float(low), float(high)

    def minus(self, other: Bootstrapped) -> Bootstrapped:
        """Return the difference, sample by sample. Both must come from the same call of `bootstrap`."""
        return Bootstrapped(self.value - other.value, self.resampled - other.resampled)


def bootstrap(
    figures: Mapping[Key, tuple[np.ndarray, np.ndarray | float]], resamples: int = RESAMPLES, seed: int = 0
) -> dict[Key, Bootstrapped]:
    """Compute ratios of sums over pictures, for all pictures and for samples drawn with replacement. All metrics use
    the same samples, so differences between them are paired.

    Args:
        figures: name -> (numerator, denominator) per picture, (n,), n at least 1; a denominator of 1.0 gives a mean.
    """
    columns = [
        np.broadcast_to(np.asarray(part, np.float64), (len(pair[0]),)) for pair in figures.values() for part in pair
    ]
    values = np.stack(columns, axis=1)
    count, generator = len(values), np.random.default_rng(seed)
    sums = np.empty((resamples, values.shape[1]))
    for row in sums:
        row[:] = np.bincount(generator.integers(0, count, count), minlength=count) @ values
    whole = values.sum(0)
    with np.errstate(invalid="ignore"):  # a sample with nothing to count gives NaN
        ratios = sums[:, ::2] / sums[:, 1::2]
    return {name: Bootstrapped(float(whole[2 * i] / whole[2 * i + 1]), ratios[:, i]) for i, name in enumerate(figures)}


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar test: the probability, if neither model were better, of a split at least this uneven of
    the pictures that only one of two models gets right (McNemar, 1947; binomial with p = 1/2).

    Args:
        lost, won: number of pictures that only the first, and only the second, model gets right.
    """
    total, term, tail = lost + won, 1, 0
    for k in range(min(lost, won) + 1):  # term: total over k, exact
        tail += term
        term = term * (total - k) // (k + 1)
    return min(1.0, 2 * tail / 2**total)


@dataclass(frozen=True)
class Calibration:
    """Agreement of confidence and accuracy, in bins of equal width; each array (bins,), 0 for empty bins."""

    counts: np.ndarray
    confidence: np.ndarray  # mean over the bin
    accuracy: np.ndarray  # mean over the bin
    error: float  # expected calibration error


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> Calibration:
    """Compute the reliability diagram and the expected calibration error: the mean over pictures of
    |accuracy - confidence| of their bin (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation
    3). Bin m is ((m-1)/bins, m/bins].

    Args:
        confidence: (n,) probability of each picture's answer, n at least 1.
        right: bool (n,), whether the answer is right.
    """
    confidence = np.asarray(confidence, np.float64)
    edges = np.arange(1, bins) / bins
    place = np.searchsorted(edges, confidence, side="left")  # an edge belongs to the lower bin
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=w, minlength=bins) for w in (confidence, np.asarray(right, np.float64))]
    means = [s / np.maximum(counts, 1) for s in sums]
    error = float(np.abs(sums[1] - sums[0]).sum() / len(confidence))
    return Calibration(counts, means[0], means[1], error)
