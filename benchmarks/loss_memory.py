"""Memory and time of the affinity and the contrastive loss with gradients, in tiles, and in whole matrices if they fit:
`python benchmarks/loss_memory.py` (about two minutes)."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from tinyclip.loss import affinity_loss, contrastive_loss

BATCHES, DIM = (2048, 8192, 32768), 512
WHOLE_UP_TO = 8192  # above this, whole matrices take many GB


def whole(si: torch.Tensor, st: torch.Tensor, ti: torch.Tensor, tt: torch.Tensor) -> torch.Tensor:
    logits, targets, diagonal = 50 * si @ st.T, 50 * ti @ tt.T, torch.arange(len(si))
    affinity = F.cross_entropy(logits, targets.softmax(1)) + F.cross_entropy(logits.T, targets.T.softmax(1))
    return (affinity + F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def tiled(si: torch.Tensor, st: torch.Tensor, ti: torch.Tensor, tt: torch.Tensor) -> torch.Tensor:
    return affinity_loss(si, st, ti, tt, 50.0, 50.0) + contrastive_loss(si, st, 50.0)


def measure(form: str, batch: int) -> None:
    """Print GB above the features, seconds, and the loss. Runs in a separate process, since a peak never falls."""
    warm = [F.normalize(torch.randn(64, DIM), dim=1).requires_grad_() for _ in range(4)]
    call = {"whole": whole, "tiled": tiled}[form]
    call(*warm).backward()
    torch.manual_seed(0)
    features = [F.normalize(torch.randn(batch, DIM), dim=1) for _ in range(4)]
    student = [x.requires_grad_() for x in features[:2]]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loss = call(*student, *features[2:])
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{batch:6}  {form}  {peak * 1024 / 1e9:6.2f}  {time.perf_counter() - start:6.2f}  {loss.item():.6f}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        print(" batch  form   GB above the features  seconds  loss", flush=True)
        for batch in BATCHES:
            for form in ("whole", "tiled"):
                if form == "tiled" or batch <= WHOLE_UP_TO:
                    subprocess.run([sys.executable, __file__, form, str(batch)], check=True)
