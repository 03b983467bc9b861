"""How long `tinyclip classify` takes from a cold start, without and with torch, alternating.

    python benchmarks/start.py

Uses the shipped emoji student as a checkpoint and as exports. Prints the seconds of the whole command, median and
range.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from side_by_side import table

from tinyclip.export.export import export


def main() -> None:
    parser = argparse.ArgumentParser(description="the start of tinyclip classify")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        Image.linear_gradient("L").save(folder / "photo.png")
        for to in ("onnx", "openvino"):
            export("emoji-student", folder / to, to)
        ways = {
            "checkpoint, PyTorch": ["emoji-student"],
            "ONNX, ONNX Runtime": [str(folder / "onnx"), "--runtime", "onnxruntime"],
            "ONNX, OpenVINO": [str(folder / "onnx"), "--runtime", "openvino"],
            "OpenVINO": [str(folder / "openvino")],
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, (model, *options) in ways.items():
                command = [sys.executable, "-m", "tinyclip", "classify", model, str(folder / "photo.png")]
                start = time.perf_counter()
                subprocess.run([*command, "a dog", "a cat", *options], check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - start)
    rows = [
        [name, f"{statistics.median(found[1:]):.2f}", f"{min(found[1:]):.2f} to {max(found[1:]):.2f}"]
        for name, found in seconds.items()  # the first round fills the file system cache
    ]
    print(table(["", "seconds", "range"], rows))


if __name__ == "__main__":
    main()
