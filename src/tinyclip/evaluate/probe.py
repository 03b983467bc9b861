"""Linear probe: logistic regression on frozen image features, its regularisation chosen on a held-out part."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyclip.common.distributed import from_main
from tinyclip.common.faults import counts
from tinyclip.common.progress import busy, ended, tell
from tinyclip.data.datasets import Dataset
from tinyclip.evaluate.metrics import Encoder, Progress, accuracies, check_classes, encode_images

SOLVERS = ("auto", "sklearn", "torch")
HELD_OUT = 0.2  # share of each class
STEPS = 1000  # most L-BFGS steps
TOLERANCE = 1e-5  # on the largest gradient component of the mean loss
LARGE = 10**8  # scores (pictures x classes): scikit-learn holds them all in memory, 8 bytes each
FITS = 15  # most fits in a search
ROWS = 2**14  # pictures whose scores the torch solver holds at once


@dataclass(frozen=True)
class Linear:
    """A linear classifier: class scores are features @ weight.T + bias."""

    weight: Tensor  # float64 (classes, embed_dim)
    bias: Tensor  # float64 (classes,)
    classes: Tensor  # int64 (classes,), sorted: the label that each row stands for
    converged: bool

    def best(self, features: Tensor, k: int) -> Tensor:
        """Return the k most likely labels of features (n, embed_dim), int64 (n, at most k), best first."""
        k = min(k, len(self.classes))
        scored = (rows.double() @ self.weight.T + self.bias for rows in features.split(ROWS))
        return torch.cat([self.classes[scores.topk(k).indices] for scores in scored])


def probe(
    clip: Encoder,
    train: Dataset,
    test: Dataset | None = None,
    *,
    solver: str = "auto",
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done: None,
) -> dict[str, Any]:
    """Fit a linear probe on normalised features. Return `acc1`, `acc5`, `mean_per_class_recall` and `n` on the test
    data, the chosen `C` with its `validation_acc1`, and the whole `sweep`.

    C, the inverse of the weight of the squared norm, has the best top-1 accuracy on a fifth of the training data. It
    is searched for as in the CLIP paper (Radford et al. 2021, A.3): from 10^-6 to 10^6 in factors of 100, then around
    the best value in ever smaller steps, down to an eighth of a decade. The final fit uses all of the training data.

    Args:
        test: by default another fifth of the training data, not used for anything else.
        solver: `sklearn`, `torch` (L-BFGS in chunks, on `device`), or `auto`: scikit-learn if it is installed, the
            device is a CPU and the data is not large. Both minimise the same function.
        seed: seed of the random splits.

    Raises:
        ValueError: when the data has fewer than two classes, or the test data a class that the training data lacks.
    """
    check_solver(solver)
    given = _labelled(clip, train, progress)
    if test is not None:
        judged = _labelled(clip, test, progress)
        judged = judged[0], _as_in(train, test, judged[1])
    else:
        given, judged = split(*given, seed + 1, str(train.path))
    result = from_main(lambda: _figures(given, judged, solver, seed, torch.device(device), str(train.path)))
    skipped = [*train.skipped, *(test.skipped if test else [])]
    places = {"train": str(train.path), "test": str(test.path) if test else None}
    return places | result | {"skipped": len(skipped), "skipped_by_cause": counts(skipped)}


Labelled = tuple[Tensor, Tensor]  # features (n, embed_dim), labels (n,)


def _figures(
    given: Labelled, judged: Labelled, solver: str, seed: int, device: torch.device, name: str
) -> dict[str, Any]:
    solver = _chosen(solver, len(given[1]), len(given[1].unique()), device)
    fitting, holding = split(*given, seed, name)

    def fit(data: Labelled, exponent: float) -> Linear:
        problem = Problem.of(*data)
        return fit_sklearn(problem, 10**exponent) if solver == "sklearn" else fit_torch(problem, 10**exponent, device)

    def score(exponent: float) -> float:
        return (fit(fitting, exponent).best(holding[0], 1)[:, 0] == holding[1]).double().mean().item()

    exponent, sweep = search(score)
    with busy("fitting to all of the training data"):
        final = fit(given, exponent)
    result = accuracies(final.best(judged[0], 5) == judged[1][:, None], judged[1])
    result |= {"C": 10**exponent, "validation_acc1": sweep[exponent], "converged": final.converged}
    result |= {"classes": len(final.classes), "n_train": len(given[1]), "solver": solver, "seed": seed}
    return result | {"sweep": [{"C": 10**tried, "acc1": acc1} for tried, acc1 in sorted(sweep.items())]}


def search(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Return the exponent of 10, from -6 to 6, with the highest score (in a tie the lowest exponent, the strongest
    regularisation), and all scores computed."""
    known: dict[float, float] = {}

    def judge(exponent: float) -> None:
        tell("looking for C", len(known), FITS, "fits")
        known[exponent] = score(exponent)

    for exponent in (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0):
        judge(exponent)

    def peak() -> float:
        return min(known, key=lambda exponent: (-known[exponent], exponent))

    for step in (1.0, 0.5, 0.25, 0.125):
        centre = peak()
        for exponent in (centre - step, centre + step):
            if -6 <= exponent <= 6:
                judge(exponent)
    ended("looking for C")
    return peak(), known


# --- data -------------------------------------------------------------------------------------------------------


def _labelled(clip: Encoder, dataset: Dataset, progress: Progress) -> Labelled:
    features, examples = encode_images(clip, dataset, progress=progress)
    if any(e.labels is not None for e in examples):
        raise ValueError(f"{dataset.path}: its pictures may have several classes, and a linear probe takes one")
    chosen = [i for i, e in enumerate(examples) if e.label is not None]
    check_classes(dataset, len(chosen))
    labels = torch.tensor([examples[i].label for i in chosen])
    if len(labels.unique()) < 2:
        raise ValueError(f"{dataset.path}: a linear probe needs pictures of two classes or more")
    return features[chosen], labels


def _as_in(train: Dataset, test: Dataset, labels: Tensor) -> Tensor:
    """Map the labels of the test data to the training data's numbers, by class name."""
    ours, theirs = train.classnames, test.classnames
    if ours == theirs or not (ours and theirs):  # without names, compare by number
        return labels
    for name in (theirs[label] for label in labels.unique().tolist()):
        if ours.count(name) != 1:
            times = "more than once" if name in ours else "not"
            raise ValueError(f"{test.path}: its class {name!r} is {times} in {train.path}")
    numbers = {name: i for i, name in enumerate(ours)}
    return torch.tensor([numbers.get(name, 0) for name in theirs])[labels]


def split(features: Tensor, labels: Tensor, seed: int, name: str) -> tuple[Labelled, Labelled]:
    """Split off a fifth of each class, at least one picture of classes with two; return the rest and that part."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    order = shuffled[labels[shuffled].argsort(stable=True)]  # grouped by class, shuffled within each
    total = labels.bincount()
    place = torch.arange(len(labels)) - (total.cumsum(0) - total)[labels[order]]  # each picture's position in its class
    out = place < torch.where(total > 1, (total * HELD_OUT).long().clamp(min=1), 0)[labels[order]]
    if not out.any():
        raise ValueError(f"{name}: no class has two pictures, so none can be held out")
    kept, left = order[~out].sort().values, order[out].sort().values
    return (features[kept], labels[kept]), (features[left], labels[left])


# --- solvers ----------------------------------------------------------------------------------------------------
# Both minimise mean cross-entropy + |weight|^2 / (2 C n). With two classes only one has weights, as in scikit-learn.


@dataclass(frozen=True)
class Problem:
    """Features (n, embed_dim), and the index of each one's class in the sorted classes, int64 (n,)."""

    features: Tensor
    places: Tensor
    classes: Tensor

    @staticmethod
    def of(features: Tensor, labels: Tensor) -> Problem:
        classes, places = labels.unique(return_inverse=True)
        return Problem(features, places, classes)

    def linear(self, weight: Tensor, bias: Tensor, converged: bool) -> Linear:
        weight, bias = weight.double().cpu(), bias.double().cpu()
        if len(self.classes) == 2:
            weight, bias = F.pad(weight, (0, 0, 1, 0)), F.pad(bias, (1, 0))
        return Linear(weight, bias, self.classes, converged)


def check_solver(name: str) -> None:
    """Raise `ValueError` for an unknown solver, or for scikit-learn if it is not installed."""
    if name not in SOLVERS:
        raise ValueError(f"solver {name!r}: choose {', '.join(SOLVERS)}")
    if name == "sklearn" and not find_spec("sklearn"):
        raise ValueError("solver sklearn needs scikit-learn: pip install tinyclip[probe]")


def _chosen(solver: str, count: int, classes: int, device: torch.device) -> str:
    small = count * classes <= LARGE and device.type == "cpu"
    return solver if solver != "auto" else "sklearn" if small and find_spec("sklearn") else "torch"


def fit_sklearn(problem: Problem, c: float) -> Linear:
    """Fit scikit-learn's logistic regression, in float64."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, tol=TOLERANCE, max_iter=STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about non-convergence, which `converged` reports, and small data
        model.fit(problem.features.double().numpy(), problem.places.numpy())
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    return problem.linear(weight, bias, bool(model.n_iter_.max() < STEPS))


def fit_torch(problem: Problem, c: float, device: torch.device) -> Linear:
    """Fit the same model with torch's L-BFGS, in chunks; float64 on a CPU, float32 elsewhere."""
    count, width = problem.features.shape
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    rows = 1 if len(problem.classes) == 2 else len(problem.classes)
    weight = torch.zeros(rows, width, dtype=dtype, device=device, requires_grad=True)
    bias = torch.zeros(rows, dtype=dtype, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=TOLERANCE, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = weight.square().sum() / (2 * c * count)
        total.backward()
        for features, places in zip(problem.features.split(ROWS), problem.places.split(ROWS), strict=True):
            scores = features.to(device, dtype) @ weight.T + bias
            scores = F.pad(scores, (1, 0)) if rows == 1 else scores
            piece = F.cross_entropy(scores, places.to(device), reduction="sum") / count
            piece.backward()
            total = total + piece.detach()
        return total.detach()

    optimizer.step(loss)
    loss()
    slope = max(p.grad.abs().max().item() for p in (weight, bias) if p.grad is not None)
    return problem.linear(weight.detach(), bias.detach(), slope <= TOLERANCE)
