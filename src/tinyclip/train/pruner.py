"""Automatic inheritance during training: the masks, their constraint and their optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tinyclip.compress.budget import BUDGETS
from tinyclip.compress.inheritance import compact
from tinyclip.compress.learned_masks import Constraint, HardConcrete
from tinyclip.compress.size import TOWERS, sparsity
from tinyclip.model.config import CLIPConfig
from tinyclip.model.model import CLIP
from tinyclip.recipe.stage import Stage, Target, TowerSparsity
from tinyclip.zoo.checkpoint import write_weights

DEFAULT_RAMP = 1000  # steps, as in the released recipes
MASKS = "masks.safetensors"  # present in a checkpoint whose student is not cut yet


class Pruner:
    """Masks learned together with the weights.

    Masks and multipliers use AdamW without weight decay, the multipliers with gradient ascent (as in the reference
    code, after CoFi pruning).

    Args:
        config, original: shape of the student before the cut, and of the teacher that sparsity is relative to.
        targets: sparsity by budget: `visual`, `text` or `both`.
        seed: seed of the noise; the noise depends only on the seed and the step, so a resumed run draws the same noise.

    Raises:
        ValueError: if a tower does not support learned masks, or a target is out of reach.
    """

    def __init__(
        self,
        config: CLIPConfig,
        original: CLIPConfig,
        stage: Stage,
        targets: dict[str, float],
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        assert stage.auto is not None, "only stages with `inherit: auto` learn masks"
        auto = stage.auto
        towers = TOWERS[stage.towers]
        self.auto, self.seed = auto, seed
        self.hard = HardConcrete(config, original, towers=towers, gates=auto.gates, unit=auto.counted)
        self.constraint = Constraint(self.hard, targets, auto.ramp_steps or min(DEFAULT_RAMP, auto.steps))
        self.hard.to(device)
        self.constraint.to(device)
        settings: dict[str, Any] = {"lr": auto.mask_lr, "weight_decay": 0.0}
        groups = [
            {"params": list(self.hard.parameters())} | settings,
            {"params": list(self.constraint.parameters())} | settings | {"maximize": True},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.hard.parameters(), *self.constraint.parameters()]

    def sample(self, step: int) -> dict[str, Tensor]:
        """Sample the masks of one step, the same on every rank."""
        return self.hard.sample(torch.Generator().manual_seed(self.seed * 1_000_003 + step))

    def cut_now(self, model: CLIP) -> CLIP:
        """Return the student cut down to what the masks keep at this step, whatever its size, to evaluate it."""
        return compact(model, self.hard.deterministic(self.auto.align))

    def cut(self, model: CLIP) -> tuple[CLIP, dict[str, Any]]:
        """Return the student, cut to the target sizes in the masks' order (see `HardConcrete.budgeted`), with the
        sparsity of each budget as `removed`, and how many units each mask keeps as `kept`."""
        hard, targets = self.hard, self.constraint.targets
        left = {name: target for name, target in targets.items() if target > self.constraint.start[name]}
        masks = hard.budgeted(left, self.auto.align) if left else {}
        kept = {name: (mask > 0).cpu().double() for name, mask in masks.items()}
        removed = {
            name: sparsity(hard.config, hard.original, kept, BUDGETS[name], hard.unit).item() for name in targets
        }
        return compact(model, masks), {
            "removed": removed,
            "kept": {name: int(mask.sum()) for name, mask in kept.items()},
        }

    def values(self) -> Tensor:
        """Return the mask parameters as one tensor on their device."""
        return nn.utils.parameters_to_vector(self.hard.parameters()).detach()

    @torch.no_grad()
    def figures(self, step: int, values: Tensor | None = None) -> dict[str, Any]:
        """Return each budget's sparsity and target, and how many units each mask keeps.

        Args:
            values: the result of `values`, on the CPU, if already available.
        """
        names = self.constraint.targets
        hard = self.hard.filled(self.values().cpu() if values is None else values)
        masks = hard.deterministic(self.auto.align)
        return {
            "sparsity": {name: hard.expected_sparsity(name).item() for name in names},  # type: ignore[arg-type]
            "target_sparsity": {name: self.constraint.target(name, step) for name in names},
            "mask_lr": self.optimizer.param_groups[0]["lr"],
            "kept": {name: int(mask.count_nonzero()) for name, mask in masks.items()},
        }

    def save(self, folder: Path) -> None:
        """Write masks and multipliers as safetensors; the optimizer is saved with the stage's state."""
        write_weights(folder / MASKS, self._named(), {"targets": json.dumps(self.constraint.targets)})

    def load(self, folder: Path) -> None:
        """Load what `save` wrote; `ValueError` if it does not fit."""
        tensors, named = load_file(folder / MASKS), self._named()
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in named.items()}:
            raise ValueError(f"{folder / MASKS}: masks of another model; remove {folder} to restart the stage")
        with torch.no_grad():
            for key, value in named.items():
                value.copy_(tensors[key])

    def _named(self) -> dict[str, Tensor]:
        multipliers = {f"multipliers.{name}": value for name, value in self.constraint.multipliers.items()}
        return dict(self.hard.named_log_alpha()) | multipliers


def budgets(target: Target, towers: str) -> dict[str, float] | None:
    """Return the target sparsity by budget; None if the target is a latency."""
    goal = target.target_sparsity
    if goal is None:
        return None
    if isinstance(goal, TowerSparsity):
        return {"visual": goal.image, "text": goal.text}
    return {"both": goal} if towers == "both" else {TOWERS[towers][0]: goal}


def off_target(reached: float, target: float) -> str:
    """Return the message for masks that ended away from their target."""
    short = reached < target
    then = "removed the rest in their order" if short else "kept more, in their order"
    more = "; more auto.steps or a larger auto.lr would let the masks decide" if short else ""
    return f"masks ended at sparsity {reached:.3f}, the target is {target:.3f}: the cut {then}{more}"


def already_gone(gone: float, target: float) -> str:
    """Return the message for a budget that an earlier stage already met by overshooting."""
    return f"{gone:.3f} of the teacher is already removed; target_sparsity {target:.3f} removes no more"


def saved_targets(folder: Path) -> dict[str, float]:
    """Return the targets stored in a checkpoint with masks; `ValueError` if the file is damaged."""
    try:
        with safe_open(folder / MASKS, "pt") as file:
            return dict(json.loads(file.metadata()["targets"]))
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MASKS}: damaged ({error}); remove {folder} to restart the stage") from None
