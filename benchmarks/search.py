"""Cost and recall of a vector index: time to build, milliseconds per query, memory, recall, by number of vectors.

    python benchmarks/search.py --counts 10000 100000                # the table of docs/search.md
    python benchmarks/search.py --counts 1000000 --kinds features    # its largest row
    python benchmarks/search.py --counts 100000 --sweep              # basis for the settings in vectors.py

There are two kinds of vectors. `random` vectors have no close neighbours, which is the worst case for a graph.
`features` imitate a CLIP's: few significant directions (64 of 512), clusters, and queries (the texts) that lie apart
from the vectors (the pictures). Exact results come from NumPy in float32. Memory and latency are measured in a fresh
process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinyclip.search import vectors
from tinyclip.search.vectors import Vectors

CHUNK, QUERIES, BEST = 10_000, 200, 10


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def drawn(kind: str, part: int, count: int, dim: int) -> np.ndarray:
    """Return float32 (count, dim), normalised; part -1 is the queries."""
    rng = np.random.default_rng((3, part + 1))
    if kind == "random":
        return unit(rng.standard_normal((count, dim)))
    shared = np.random.default_rng(7)
    centres, up = shared.standard_normal((2_000, 64)), shared.standard_normal((64, dim)) / 8
    means = shared.standard_normal((2, dim))
    inner = centres[rng.integers(0, len(centres), count)] + 0.7 * rng.standard_normal((count, 64))
    return unit(inner @ up + 0.2 * rng.standard_normal((count, dim)) + means[int(part < 0)])


def parts(kind: str, count: int, dim: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield keys and vectors in chunks."""
    for part, start in enumerate(range(0, count, CHUNK)):
        keys = np.arange(start, min(start + CHUNK, count))
        yield keys, drawn(kind, part, CHUNK, dim)[: len(keys)]


def nearest(kind: str, count: int, dim: int) -> np.ndarray:
    """Return the true nearest neighbours, int (QUERIES, BEST)."""
    queries = drawn(kind, -1, QUERIES, dim)
    keys, cosines = np.empty((QUERIES, 0), int), np.empty((QUERIES, 0), np.float32)
    for some, rows in parts(kind, count, dim):
        cosines = np.concatenate([cosines, queries @ rows.T], 1)
        keys = np.concatenate([keys, np.broadcast_to(some, (QUERIES, len(some)))], 1)
        best = np.argpartition(-cosines, BEST, 1)[:, :BEST]
        keys, cosines = (np.take_along_axis(x, best, 1) for x in (keys, cosines))
    return keys


def build(kind: str, count: int, dim: int, file: Path) -> float:
    """Return the seconds to add all vectors and write the file."""
    made, seconds = Vectors(dim), 0.0
    for keys, rows in parts(kind, count, dim):
        start = time.perf_counter()
        made.add(keys, rows)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    made.save(file)
    return seconds + time.perf_counter() - start


def asked(kind: str, count: int, dim: int, file: Path, exact: bool) -> dict[str, Any]:
    """Measured in a separate process: milliseconds per query, one by one, memory, and the keys found."""
    queries = drawn(kind, -1, QUERIES, dim)
    before, start = memory(), time.perf_counter()
    opened = Vectors.open(file, dim)
    opened.search(queries[:1], BEST, exact)
    first, times, found = 1000 * (time.perf_counter() - start), [], []
    for query in queries:
        start = time.perf_counter()
        found.append(opened.search(query[None], BEST, exact)[0][0].tolist())
        times.append(1000 * (time.perf_counter() - start))
    after = memory()
    used = {name: after[name] - before[name] for name in after}
    return {"first_ms": first, "ms": statistics.median(times), "found": found} | used


def memory() -> dict[str, float]:
    """Return the memory of this process in MB: its own, and file pages, which the system reclaims when needed."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
    return {"own_mb": sizes["RssAnon"], "mapped_mb": sizes["RssFile"]}


def measure(kind: str, count: int, dim: int, folder: Path, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(vectors, name, value)
    file, said = folder / "vectors", " ".join(f"{name}={value}" for name, value in settings.items())
    seconds, best = build(kind, count, dim, file), nearest(kind, count, dim)
    sizes = f"{kind:8} {count:>9,} {said} built {seconds:.1f} s, {file.stat().st_size / 2**20:.0f} MB"
    for exact in (False, True):
        command = [sys.executable, __file__, "--ask", kind, str(count), str(dim), str(file), str(int(exact))]
        expansion = ["--expansion", str(vectors.EXPANSION)]
        told = json.loads(subprocess.run([*command, *expansion], check=True, capture_output=True, text=True).stdout)
        recall = np.mean([len(set(a) & set(b)) / BEST for a, b in zip(told.pop("found"), best.tolist(), strict=True)])
        figures = " ".join(f"{name} {value:.2f}" for name, value in told.items())
        print(f"{sizes} | {'exact' if exact else 'graph'}: recall@{BEST} {recall:.4f} {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", default=["features", "random"])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--sweep", action="store_true", help="several numbers types and graphs")
    parser.add_argument("--expansion", type=int, default=vectors.EXPANSION)
    parser.add_argument("--ask", nargs=5)
    options = parser.parse_args()
    vectors.EXPANSION = options.expansion
    if options.ask:
        kind, count, dim, file, exact = options.ask
        print(json.dumps(asked(kind, int(count), int(dim), Path(file), exact == "1")))
        return
    choices: list[dict[str, Any]] = [{}]
    if options.sweep:
        choices = [{"DTYPE": d, "CONNECTIVITY": c} for d in ("f16", "i8") for c in (16, 32)]
        choices += [{"DTYPE": "bf16", "CONNECTIVITY": 16}, {"EXPANSION_ADD": 256, "CONNECTIVITY": 16}]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for count in options.counts:
            for kind in options.kinds:
                for settings in choices:
                    measure(kind, count, options.dim, Path(folder), settings)


if __name__ == "__main__":
    main()
