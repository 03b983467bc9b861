"""The Python API as people use it: pickled, in threads and other processes, with autograd; and its examples."""

from __future__ import annotations

import doctest
import pickle
from concurrent.futures import ThreadPoolExecutor
from inspect import getmembers, isfunction
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import tinyclip
from tests.golden import fill
from tests.helpers import typed_user
from tinyclip.inference.pipeline import Pipeline


class Features(Dataset[Any]):
    """Encodes an item in the worker that loads it; the pipeline reaches the worker by fork or pickle."""

    def __init__(self, clip: Pipeline, paths: list[Path]) -> None:
        self.clip, self.paths = clip, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.clip.encode_image(self.paths[i])[0], self.clip.encode_text(f"picture {i}")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures `photo.jpg` and `0.png` to `3.png`."""
    folder = tmp_path_factory.mktemp("python")
    for i in range(4):
        Image.fromarray(fill.picture(50 + i, 40, i)).save(folder / f"{i}.png")
    Image.fromarray(fill.picture(60, 40, 9)).save(folder / "photo.jpg")
    return folder


@pytest.fixture(scope="module")
def clip() -> Pipeline:
    return tinyclip.load("emoji-student")


def test_a_pickled_pipeline_gives_the_same(folder: Path, clip: Pipeline) -> None:
    again = pickle.loads(pickle.dumps(clip))
    assert isinstance(again, Pipeline) and not again.model.training
    assert torch.equal(again.encode_image(folder / "0.png"), clip.encode_image(folder / "0.png"))
    assert torch.equal(again.encode_text("a red apple"), clip.encode_text("a red apple"))
    model, _ = tinyclip.clip.load("emoji-student", device="cpu")
    tokens = tinyclip.clip.tokenize("a red apple")
    assert torch.equal(pickle.loads(pickle.dumps(model)).encode_text(tokens), model.encode_text(tokens))


def test_threads_share_one_pipeline(folder: Path, clip: Pipeline) -> None:
    jobs = [([folder / f"{i % 4}.png", folder / f"{(i + 1) % 4}.png"], f"thing number {i}") for i in range(24)]
    expected = [(clip.encode_image(paths), clip.encode_text(text)) for paths, text in jobs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: (clip.encode_image(job[0]), clip.encode_text(job[1])), jobs))
    for ours, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, alone)


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_a_loader_encode(method: str, workers: int, folder: Path, clip: Pipeline) -> None:
    paths = [folder / f"{i}.png" for i in range(4)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:  # the threads of this process do not exist in a forked one
        expected = clip.encode_image(paths), clip.encode_text([f"picture {i}" for i in range(4)])
        context = torch.multiprocessing.get_context(method)
        loader = DataLoader(Features(clip, paths), 2, num_workers=workers, multiprocessing_context=context, timeout=100)
        for found, wanted in zip(zip(*loader, strict=True), expected, strict=True):
            torch.testing.assert_close(torch.cat(found), wanted)
    finally:
        torch.set_num_threads(before)


def test_features_may_be_trained_on(folder: Path, clip: Pipeline) -> None:
    features = torch.cat([clip.encode_image([folder / "0.png", folder / "1.png"]), clip.encode_text(["a", "b"])])
    probe = torch.nn.Linear(features.shape[1], 2)
    probe(features).sum().backward()
    assert probe.weight.grad is not None
    torch.testing.assert_close(probe.weight.grad, features.sum(0).expand(2, -1))


def test_inference_mode_of_the_caller_changes_nothing(folder: Path, clip: Pipeline) -> None:
    with torch.inference_mode():
        inside = clip.classify(folder / "0.png", ["a dog", "a cat"])
    torch.testing.assert_close(inside.clone(), clip.classify(folder / "0.png", ["a dog", "a cat"]))


def test_what_ships_loads_by_its_name(clip: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert clip.model.config.vision.image_size == 48
    with pytest.raises(ValueError, match="emoji: no such checkpoint; did you mean emoji-student"):
        tinyclip.load("emoji")


def test_the_shipped_student_knows_emojis(clip: Pipeline) -> None:
    data = tinyclip.evaluate.open_dataset(Path(__file__).parent.parent / "assets/emoji/eval")
    examples = [example for example in islice(data, 0, 160, 8) if example.label is not None]
    names = [data.classnames[example.label or 0] for example in examples]
    best = clip.classify([example.image for example in examples], names).argmax(1).tolist()
    assert sum(i == right for right, i in enumerate(best)) >= 10  # of 20; chance gives one


def test_a_pipeline_says_what_it_is(clip: Pipeline) -> None:
    assert repr(clip) == "Pipeline(vit at 48 px, 32 tokens, 2.1 M parameters, float32 on cpu)"


def test_what_a_user_writes_runs(folder: Path) -> None:
    typed_user.main(folder / "photo.jpg")


EXAMPLES = [
    *("load", "tokenize", "preprocess", "inherit", "compact", "affinity_loss", "measure", "HardConcrete"),
    *("Pipeline", "CLIPConfig", "clip"),
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings_run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    thing, names = getattr(tinyclip, name), {}
    tests = [test for test in doctest.DocTestFinder(recurse=True).find(thing, name) if test.examples]
    assert tests
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in sorted(tests, key=lambda test: test.lineno or 0):  # examples of a method continue those of its class
        test.globs = names
        runner.run(test, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0


def test_public_functions_have_docstrings_and_types() -> None:
    for name in tinyclip.__all__:
        thing = getattr(tinyclip, name)
        assert thing.__doc__, name
        for method, function in getmembers(thing, isfunction) if isinstance(thing, type) else ():
            if not method.startswith("_") and function.__module__.startswith("tinyclip"):
                assert "return" in function.__annotations__, f"{name}.{method}"
