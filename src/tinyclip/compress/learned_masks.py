"""Learned masks: one multiplier per element of a named axis, and one per branch.

`Masks` maps axis names (see `axes`) to 1-D tensors. An axis that is absent is not masked; an element at 0 is removed,
one between 0 and 1 is graded. Gates (`visual.attn.3`, `text.ffn.3`) have one element. The masks of a ResNet image tower
are only 0 or 1, since batch norm and shared channels leave no single place to fold a graded value into.

`HardConcrete` holds the learned masks (TinyCLIP, ICCV 2023, section 3.2, after CoFi pruning), and `Constraint` drives
them to a target size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from tinyclip.compress.budget import BUDGETS, NAMES, fill_budget
from tinyclip.compress.size import sparsity, tower_of, tower_size
from tinyclip.model.axes import axis_sizes
from tinyclip.model.config import CLIPConfig
from tinyclip.model.masks import Masks, Tower, Unit

START, LARGEST = 10.0, math.log(100)  # log_alpha: initial value, and clamp bound on either side
TEMPERATURE, LOWER, UPPER = 2 / 3, -0.1, 1.1  # of the hard concrete distribution, stretched to (LOWER, UPPER)
TIE = 1e-6  # log_alphas that differ by less count as equal at the cut
NOISE_MARGIN = 1e-6  # the uniform noise stays this far from 0 and 1
SHARPNESS = 0.8  # of the deterministic value; `magical_number` in the reference code


def probability_kept(log_alpha: Tensor) -> Tensor:
    """Probability that the mask is not 0."""
    return 1 - torch.sigmoid(math.log(-LOWER / UPPER) * TEMPERATURE - log_alpha)


def stretched_sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Return a hard concrete sample in [0, 1] from uniform noise in (0, 1) of the same shape (Louizos et al., 2018)."""
    soft = torch.sigmoid((uniform.log() - (1 - uniform).log() + log_alpha) / TEMPERATURE)
    return (soft * (UPPER - LOWER) + LOWER).clamp(0, 1)


def graded_value(log_alpha: Tensor) -> Tensor:
    """The evaluation mask of an element that is kept."""
    return torch.sigmoid(log_alpha / TEMPERATURE * SHARPNESS)


def deterministic_value(log_alpha: Tensor, align: int = 1) -> Tensor:
    """Return the evaluation mask: graded, with the smallest `round(expected number of zeros)` values set to 0.

    Args:
        align: round the number of kept elements up to a multiple of this.
    """
    value = graded_value(log_alpha)
    kept = len(value) - int((len(value) - probability_kept(log_alpha).sum()).round())
    kept = min(len(value), -(-kept // align) * align)
    return value.index_fill(0, value.argsort()[: len(value) - kept], 0.0)


class HardConcrete(nn.Module):
    """Learnable masks of both towers, or of one.

    For each tower, `log_alpha` has `visual_hidden` (a parameter of the tower's width), `visual_heads` and `visual_mlp`
    (lists with one parameter per block, empty where the branch is gone), and with gates `visual_attn` and `visual_ffn`
    (the same, with one element each).

    Args:
        config: the model to mask.
        original: the config that sparsity is relative to; by default the model itself.
        towers: the towers to mask.
        gates: whether whole branches can be removed too.
        unit: what sparsity counts.

    Raises:
        ValueError: for a tower that does not support learned masks.

    >>> import tinyclip
    >>> model = tinyclip.load("emoji-student").model
    >>> hard = tinyclip.HardConcrete(model.config)
    >>> masks = hard.deterministic()  # nothing is removed yet; `sample` is for training
    >>> tinyclip.compact(model, masks).config == model.config
    True
    """

    def __init__(
        self,
        config: CLIPConfig,
        original: CLIPConfig | None = None,
        *,
        towers: tuple[Tower, ...] = ("visual", "text"),
        gates: bool = False,
        unit: Unit = "params",
    ) -> None:
        super().__init__()
        self.config, self.original = config, original or config
        self.towers, self.gates, self.unit = towers, gates, unit
        sizes = axis_sizes(config)
        self.log_alpha = nn.ParameterDict()
        for tower in towers:
            layers = tower_of(config, tower).layers
            self.log_alpha[f"{tower}_hidden"] = _fresh(sizes[f"{tower}.hidden"])
            for kind in ("heads", "mlp", *(("attn", "ffn") if gates else ())):
                blocks = (_fresh(sizes.get(f"{tower}.{kind}.{i}", 0)) for i in range(layers))
                self.log_alpha[f"{tower}_{kind}"] = nn.ParameterList(blocks)

    def named_log_alpha(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every non-empty log_alpha with its axis name."""
        for key, entry in self.log_alpha.items():
            tower, kind = key.split("_")
            blocks = [(f"{tower}.{kind}", entry)]
            if isinstance(entry, nn.ParameterList):
                blocks = [(f"{tower}.{kind}.{i}", block) for i, block in enumerate(entry)]
            yield from ((name, block) for name, block in blocks if len(block))

    def start_from(self, importance: Mapping[str, Tensor]) -> None:
        """Start the masks in the order of measured importance, instead of equal.

        `log_alpha` rises from 0, for the element with the least importance per size saved, to the clamp; an element's
        value is in proportion to the size of all elements before it.

        Args:
            importance: of every element of every mask, by axis name (see `Calibration.measure`).
        """
        named = dict(self.named_log_alpha())
        lengths = {name: torch.tensor([float(len(value))], requires_grad=True) for name, value in named.items()}
        with torch.enable_grad():
            size = sum(tower_size(self.config, self.original, lengths, tower, self.unit) for tower in self.towers)
        costs = torch.autograd.grad(size, list(lengths.values()))  # type: ignore[arg-type]
        cost = torch.cat([c.double().expand(len(value)) for c, value in zip(costs, named.values(), strict=True)])
        found = torch.cat([importance[name].detach().double().cpu() for name in named])
        order = (found / cost).argsort(stable=True)
        before = torch.empty_like(cost)
        before[order] = cost[order].cumsum(0) - cost[order]
        rising = (before / cost.sum() * LARGEST).split([len(value) for value in named.values()])
        with torch.no_grad():
            for value, start in zip(named.values(), rising, strict=True):
                value.copy_(start)

    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Sample masks with one draw of noise, differentiable in `log_alpha`.

        Args:
            generator: on the CPU, so that every device and rank draws the same.
        """
        masks = {}
        for name, log_alpha in self.named_log_alpha():
            noise = torch.rand(log_alpha.shape, generator=generator).to(log_alpha, non_blocking=True)
            masks[name] = stretched_sample(log_alpha, NOISE_MARGIN + (1 - 2 * NOISE_MARGIN) * noise)
        return masks

    @torch.no_grad()
    def deterministic(self, align: int = 1) -> dict[str, Tensor]:
        """Return the masks for evaluation and for the cut.

        Args:
            align: round kept channels and neurons up to a multiple of this; not heads, since each is `head_dim` wide.
        """
        return {
            name: deterministic_value(value, align if name.split(".")[1] in ("hidden", "mlp") else 1)
            for name, value in self.named_log_alpha()
        }

    @torch.no_grad()
    def budgeted(self, targets: Mapping[str, float], align: int = 1) -> dict[str, Tensor]:
        """Return the masks for a cut to exactly these sizes, however far the masks have been trained.

        They keep the elements with the highest probability of being kept, at the value they have in `deterministic`.
        Equal ones, e.g. those at the clamp, are removed evenly from all axes, the last of each axis first.

        Args:
            targets: sparsity of each budget: `visual`, `text` or `both`; towers without a budget are not cut.
            align: as in `deterministic`.

        Raises:
            ValueError: for a target that is out of reach, or already met.
        """
        values = {name: value.detach().double().cpu() for name, value in self.named_log_alpha()}
        order = {name: value - TIE * torch.arange(len(value)) / len(value) for name, value in values.items()}
        settings = {"original": self.original, "unit": self.unit, "align": align, "per_size": False}
        with torch.enable_grad():  # costs are gradients of the size
            kept = fill_budget(order, self.config, targets, **settings)  # type: ignore[arg-type]
        return {name: graded_value(value) * kept[name].to(value) for name, value in self.named_log_alpha()}

    def expected_sparsity(self, tower: Literal["visual", "text", "both"] = "both") -> Tensor:
        """Expected fraction of the original's size that the masks remove (see `sparsity`); a scalar.

        `both` adds up the sizes of the towers; a tower without masks counts in full.
        """
        keep = {name: probability_kept(log_alpha) for name, log_alpha in self.named_log_alpha()}
        return sparsity(self.config, self.original, keep, BUDGETS[tower], self.unit)

    @torch.no_grad()
    def filled(self, values: Tensor) -> HardConcrete:
        """Copy these masks on the CPU, filled with `values` (also on the CPU): all parameters, concatenated."""
        settings = {"towers": self.towers, "gates": self.gates, "unit": self.unit}
        dtype = next(self.parameters()).dtype
        copy = HardConcrete(self.config, self.original, **settings).to(dtype)  # type: ignore[arg-type]
        nn.utils.vector_to_parameters(values.to(dtype), copy.parameters())
        return copy

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp every log_alpha to its bounds; call this after each step."""
        for _, log_alpha in self.named_log_alpha():
            log_alpha.clamp_(-LARGEST, LARGEST)


def _fresh(size: int) -> nn.Parameter:
    return nn.Parameter(torch.full((size,), START), requires_grad=size > 0)


def lagrangian(expected: Tensor, target: float, multipliers: Tensor) -> Tensor:
    """One-sided penalty l1 * relu(target - expected) + l2 * relu(target - expected)^2; multipliers: (2,)."""
    missing = torch.relu(target - expected)
    return multipliers[0] * missing + multipliers[1] * missing**2


class Constraint(nn.Module):
    """Holds `hard` to target sparsities that rise linearly over `ramp_steps`.

    Args:
        targets: target sparsity of each budget: `visual`, `text` or `both`.
    """

    def __init__(self, hard: HardConcrete, targets: Mapping[str, float], ramp_steps: int) -> None:
        super().__init__()
        self.targets, self.ramp_steps = dict(targets), ramp_steps
        self.multipliers = nn.ParameterDict({name: torch.full((2,), 10.0) for name in targets})
        self.start = {name: budget_bounds(hard, name)[0] for name in targets}

    def target(self, name: str, step: int) -> float:
        """Target sparsity at a step, counted from 0."""
        done = min(1.0, step / self.ramp_steps)
        return self.start[name] + done * (self.targets[name] - self.start[name])

    def forward(self, hard: HardConcrete, step: int) -> Tensor:
        """Return the term to add to the loss; the multipliers must ascend on it."""
        terms = [
            lagrangian(hard.expected_sparsity(name), self.target(name, step), multipliers)  # type: ignore[arg-type]
            for name, multipliers in self.multipliers.items()
        ]
        return torch.stack(terms).sum()


@torch.no_grad()
def budget_bounds(hard: HardConcrete, name: str) -> tuple[float, float]:
    """Return the sparsity of a budget before masking, and the largest one that the clamp allows."""

    def at(keep: Masks) -> float:
        return sparsity(hard.config, hard.original, keep, BUDGETS[name], hard.unit).item()

    least = probability_kept(torch.tensor(-LARGEST))
    return at({}), at({key: least.expand(len(value)) for key, value in hard.named_log_alpha()})


def check_targets(hard: HardConcrete, targets: Mapping[str, float]) -> None:
    """Refuse targets that the masks cannot meet.

    Raises:
        ValueError: for a target that is out of reach, or that the model already meets.
    """
    for name, target in targets.items():
        what = NAMES[name]
        start, largest = budget_bounds(hard, name)
        if target > largest:
            raise ValueError(
                f"target_sparsity {target} of {what} cannot be reached: masks can remove at most {largest:.3f}"
            )
        if target <= start:
            raise ValueError(
                f"target_sparsity {target} of {what} needs no cut: {start:.3f} of the teacher has already been removed"
            )
