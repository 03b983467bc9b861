"""Estimate the cost of a training step on 1 to 1,024 GPUs; nothing is measured.

    python scripts/scaling.py recipes/vit-b-32-manual.yaml --stage 1

Compute: FLOPs of the towers (as in `tinyclip plan`) and of the loss, each at a sustained speed. Communication: bytes
over the slowest link of a ring, and a latency for every collective operation. Gradients are sent while the towers'
backward pass is still running; everything else waits.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

from tinyclip.model.axes import axis_table, count_parameters
from tinyclip.recipe.recipe import load_recipe
from tinyclip.train.plan import stage_shapes, step_macs, teacher_config

GPUS = (1, 8, 32, 128, 512, 1024)
BUCKET = 25 * 2**20  # gradient bytes that DistributedDataParallel sends at once
OVERLAP = 0.5  # part of the towers' time that is the student's backward pass, which overlaps with sending gradients


@dataclass(frozen=True)
class Machine:
    """Assumed sustained speeds per GPU."""

    tflops: float  # towers, bfloat16
    loss_tflops: float  # loss, float32
    node: float  # GB/s between GPUs of a node
    network: float  # GB/s of network per GPU
    latency_us: float  # per collective operation and doubling of the GPUs
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Work:
    """What a stage needs."""

    macs: int  # per pair: forward and backward of the student, forward of the teacher
    parameters: int  # trained
    embed_dims: tuple[int, int]  # (student, teacher)


def work_of(path: str, index: int) -> Work:
    recipe = load_recipe(path)
    first, _ = teacher_config(recipe)
    shapes, _ = stage_shapes(recipe, first)
    student, stage = shapes[index].student, recipe.stages[index]
    parameters = sum(count_parameters(axis_table(student)).values())
    return Work(step_macs(student, stage, first), parameters, (student.embed_dim, first.embed_dim))


def step(work: Work, machine: Machine, gpus: int, batch: int) -> dict[str, float]:
    """Return the seconds by part for one step of `batch` pairs on `gpus`, and the megabytes that each GPU sends."""
    ours, theirs = work.embed_dims
    link = machine.node if gpus <= machine.gpus_per_node else machine.network
    others = (gpus - 1) / gpus
    towers = 2 * work.macs * batch / gpus / (machine.tflops * 1e12)
    # Both directions: the student's similarities and the gradients of rows and columns; the teacher's similarities.
    loss = 2 * 2 * batch**2 * (3 * ours + theirs) / gpus / (machine.loss_tflops * 1e12)
    # Gathered: student and teacher, images and texts; scattered back: the student's two.
    features = others * 4 * batch * 2 * (2 * ours + theirs)
    gradients = 2 * others * 4 * work.parameters
    hop = machine.latency_us * 1e-6 * log2(gpus)
    waited = features / (link * 1e9) + (6 + 2) * hop
    sent = gradients / (link * 1e9) + ceil(4 * work.parameters / BUCKET) * hop
    late = max(0.0, sent - OVERLAP * towers)
    megabytes = {"features_mb": features / 1e6, "gradients_mb": gradients / 1e6}
    return {"towers": towers, "loss": loss, "features": waited, "gradients": late} | megabytes


def table(work: Work, machine: Machine, batch: int, weak: bool) -> list[dict[str, float]]:
    """Return a row for each number of GPUs; `efficiency` is relative to one GPU."""
    rows: list[dict[str, float]] = []
    for gpus in GPUS:
        pairs = batch * gpus if weak else batch
        parts = step(work, machine, gpus, pairs)
        seconds = sum(parts[name] for name in ("towers", "loss", "features", "gradients"))
        speed = pairs / seconds
        alone = rows[0]["pairs_per_s"] if rows else speed
        rows.append(parts | {"gpus": gpus, "pairs": pairs, "pairs_per_s": speed, "efficiency": speed / gpus / alone})
    return rows


def show(title: str, rows: list[dict[str, float]]) -> None:
    print(f"\n{title}")
    columns = (
        "GPUs",
        "pairs/GPU",
        "towers ms",
        "loss ms",
        "features ms",
        "gradients ms",
        "MB sent",
        "pairs/s",
        "eff. %",
    )
    print("".join(f"{name:>14}" for name in columns))
    for row in rows:
        milliseconds = [f"{1000 * row[name]:.2f}" for name in ("towers", "loss", "features", "gradients")]
        sent = f"{row['features_mb'] + row['gradients_mb']:,.0f}"
        last = [f"{row['pairs_per_s']:,.0f}", f"{100 * row['efficiency']:.0f}"]
        cells: list[Any] = [row["gpus"], f"{row['pairs'] / row['gpus']:,.0f}", *milliseconds, sent, *last]
        print("".join(f"{cell:>14}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a step on 1 to 1,024 GPUs, by reasoning.")
    parser.add_argument("recipe")
    parser.add_argument("--stage", type=int, default=0, help="which, from 0")
    parser.add_argument("--batch", type=int, default=32768, help="pairs a step, all GPUs together (strong scaling)")
    parser.add_argument("--pairs", type=int, default=1024, help="pairs a step and GPU (weak scaling)")
    parser.add_argument("--tflops", type=float, default=200, help="sustained by the towers, bfloat16")
    parser.add_argument("--loss-tflops", type=float, default=40, help="sustained by the loss, float32")
    parser.add_argument("--node", type=float, default=300, help="GB/s between the GPUs of a node")
    parser.add_argument("--network", type=float, default=40, help="GB/s of a GPU's share of the network")
    parser.add_argument("--latency", type=float, default=15, help="microseconds a collective and doubling of GPUs")
    given = parser.parse_args()
    work = work_of(given.recipe, given.stage)
    machine = Machine(given.tflops, given.loss_tflops, given.node, given.network, given.latency)
    flops = f"{2 * work.macs / 1e9:.1f} GFLOP a pair in the towers"
    print(f"{flops}, {work.parameters / 1e6:.1f} M trained parameters, embedding {work.embed_dims[0]}")
    show(f"Strong scaling: {given.batch:,} pairs a step", table(work, machine, given.batch, weak=False))
    show(f"Weak scaling: {given.pairs:,} pairs a step and GPU", table(work, machine, given.pairs, weak=True))


if __name__ == "__main__":
    main()
