"""Batch norm of ResNet towers in training: its statistics are re-estimated and frozen, or trained further."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tinyclip.model.model import CLIP


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def freeze(model: nn.Module) -> None:
    """Normalise by fixed running statistics, whatever the mode of the other modules; weights and biases still learn.
    Call this after every `model.train()`."""
    for norm in batch_norms(model):
        norm.eval()


@torch.no_grad()
def reestimate(model: CLIP, images: Iterable[Tensor]) -> None:
    """Replace the running mean and variance of every batch norm by their averages over these batches.

    A cut changes the inputs of a layer, so the teacher's statistics no longer hold. All layers are estimated in one
    pass, in which earlier layers normalise by the statistics of the batch. No weight changes.

    Args:
        images: batches of normalised pixels, (n, 3, image_size, image_size) on the model's device.
    """
    norms, training = batch_norms(model), model.training
    momentum = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # in torch: cumulative average
        norm.train()
    for batch in images:
        model.encode_image(batch)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    model.train(training)


def synchronise(model: CLIP, device: torch.device) -> None:
    """On several GPUs, make batch norms in training use the statistics of the whole batch."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
