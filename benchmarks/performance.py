"""tinyclip compared with OpenCLIP and Hugging Face transformers with the same weights, alternating in one process.

    python benchmarks/performance.py                      # every section, about half an hour on two cores
    python benchmarks/performance.py --only inference --rounds 3

Prints the tables of docs/performance.md. Ratios are computed per round; their minimum and maximum are in brackets.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

import torch
from performance_sections import SECTIONS, Setting

from tinyclip.common.devices import best_precision


def main() -> None:
    parser = argparse.ArgumentParser(description="tinyclip beside OpenCLIP and transformers")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    precision = best_precision(torch.device(arguments.device))
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else processor()
    print(f"{where}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, {precision}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), arguments.rounds, arguments.device, getattr(torch, precision))
        for name in arguments.only:
            print(f"\n## {name}\n", flush=True)
            SECTIONS[name](setting)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
