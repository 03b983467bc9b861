"""Latency targets: the sparsity at which an image-text pair takes a given number of milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyclip.common.progress import ended
from tinyclip.compress.calibrate import WORK, Calibration, telling
from tinyclip.compress.importance import Sample as Sample
from tinyclip.compress.importance import prunable
from tinyclip.compress.inheritance import compact
from tinyclip.model.masks import Tower
from tinyclip.model.model import CLIP
from tinyclip.model.speed import measure


def pair_latency_ms(model: CLIP, batch_size: int = 32) -> float:
    """Measure milliseconds per image-text pair, in a batch with texts of full length; median of a few runs."""
    every_kernel = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(every_kernel):  # training may have restricted the kernels
        return 1000 / float(measure(model, batch_size=batch_size, seconds=0.5)["pairs_per_s"])


def fraction_for_latency(latency_ms: Callable[[float], float], wanted_ms: float, tries: int = 6) -> float:
    """Find the smallest fraction to remove for a latency of at most `wanted_ms`, by bisection.

    Args:
        latency_ms: measures a model with that fraction of its MACs removed.

    Raises:
        ValueError: when removing 97 % is not enough, or nothing needs to be removed.
    """
    low, high = 0.0, 0.97
    whole, least = latency_ms(low), latency_ms(high)
    if wanted_ms < least:
        raise ValueError(f"latency_ms {wanted_ms:g} cannot be reached: {least:.3g} with 97 % of the MACs removed")
    if wanted_ms >= whole:
        raise ValueError(f"latency_ms {wanted_ms:g} needs no cut: the model already takes {whole:.3g}")
    for _ in range(tries):
        middle = (low + high) / 2
        low, high = (low, middle) if latency_ms(middle) <= wanted_ms else (middle, high)
    return high


def targets_for_latency(
    model: CLIP, samples: Iterable[Sample], latency_ms: float, towers: tuple[Tower, ...], how: Calibration
) -> tuple[dict[str, float], float]:
    """Find the target sparsity, in MACs, at which a pair takes `latency_ms` on the model's device, and the fraction of
    the model's MACs that it removes. Importance is measured once, on the batches of one round.

    Raises:
        ValueError: when it cannot be reached, or nothing needs to be removed.
    """
    how, config = replace(how, unit="macs"), model.config
    budget = "both" if len(towers) == 2 else towers[0]
    ones = {name: torch.ones(size) for name, size in prunable(config, towers, how.gates).items()}
    count = max(1, how.batches // how.rounds)
    found = how.measure(model, telling(iter(samples), 0, count, count), ones, how.seed * 1000)
    ended(WORK)
    start = how.sparsity(config, {}, budget)

    def measured(removed: float) -> float:
        if removed == 0:
            return pair_latency_ms(model)
        return pair_latency_ms(compact(model, how.fill(found, config, {budget: start + (1 - start) * removed})))

    removed = fraction_for_latency(measured, latency_ms)
    return {budget: start + (1 - start) * removed}, removed
