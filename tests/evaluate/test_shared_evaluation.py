"""Several processes get exactly the same figures together as one process alone."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import small_config, small_tokenizer
from tests.helpers.processes import together
from tests.helpers.shards import picture, write_shard
from tinyclip.common.distributed import gather_uneven, processes, rank
from tinyclip.evaluate import metrics as evaluation
from tinyclip.evaluate.metrics import evaluate, open_dataset
from tinyclip.evaluate.probe import probe
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.model import CLIP

PROCESSES = 2


def clip() -> Pipeline:
    torch.manual_seed(0)
    return Pipeline(CLIP(small_config(vocab_size=602)).eval(), small_tokenizer(), Preprocess(image_size=32))


def data(root: Path) -> None:
    """Class folders, and shards with captions, including broken pictures and a damaged shard that every process
    encounters."""
    for c in range(4):
        (root / "classes" / f"{c}").mkdir(parents=True)
        for i in range(5):
            content = b"junk" if (c, i) == (2, 1) else picture(10 * c + i)
            (root / "classes" / f"{c}" / f"{i}.jpg").write_bytes(content)
    (root / "shards").mkdir()
    samples = [{"key": str(i), "jpg": picture(i), "txt": f"a photo {i}\nit {i}".encode()} for i in range(19)]
    write_shard(root / "shards" / "a.tar", [*samples, {"key": "x", "jpg": b"junk"}])
    (root / "shards" / "b.tar").write_bytes(b"junk")
    (root / "empty" / "a").mkdir(parents=True)
    (root / "empty" / "a" / "0.jpg").write_bytes(b"junk")


def everything(root: Path) -> list[dict[str, Any]]:
    model = clip()
    found = [evaluate(model, open_dataset(place), per_class=True) for place in (root / "classes", root / "shards")]
    return [*found, probe(model, open_dataset(root / "classes"), solver="torch")]


def small_pieces() -> None:
    """More batches and blocks than processes."""
    evaluation.TEXTS = 3
    evaluation.encode_images.__defaults__ = (4, *evaluation.encode_images.__defaults__[1:])  # type: ignore[index]


def work(index: int, port: int, root: Path, alone: list[dict[str, Any]]) -> None:
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["WORLD_SIZE"] = str(PROCESSES)
    torch.set_num_threads(1)
    small_pieces()
    with processes():
        assert everything(root) == alone
        rows = torch.full((2, 5), 7.0) if rank() else torch.empty(0, 0)
        assert gather_uneven(rows).tolist() == [[7.0] * 5] * 2
        assert gather_uneven(torch.empty(0, 0)).shape == (0, 0)
        with pytest.raises(ValueError, match="no readable pictures"):
            evaluate(clip(), open_dataset(root / "empty"))


def test_processes_share_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data(tmp_path)
    monkeypatch.setattr(evaluation, "TEXTS", evaluation.TEXTS)
    monkeypatch.setattr(evaluation.encode_images, "__defaults__", evaluation.encode_images.__defaults__)
    small_pieces()
    alone = everything(tmp_path)
    assert alone[0]["skipped"] == 1 and alone[1]["skipped"] == 2 and alone[1]["n_images"] == 19
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together(work, (port, tmp_path, alone), PROCESSES)
