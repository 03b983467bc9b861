"""Exports give the model's features in every runtime, without torch, or are not written."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tinyclip
from tests.golden.fill import picture
from tests.helpers.commands import tinyclip as command
from tests.helpers.models import random_model, random_resnet, resnet_config, small_tokenizer, uneven_config
from tests.helpers.shards import good, write_shard
from tests.helpers.shared import made_once
from tinyclip.export import agreement, quantise
from tinyclip.export.export import TOWERS, export, write_facts
from tinyclip.inference import engines
from tinyclip.inference.exported import RuntimePipeline, load_export
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.tokenizer import CLIPTokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig, vit_clip
from tinyclip.model.model import CLIP
from tinyclip.zoo.checkpoint import save_checkpoint

TEXTS = ["a cat", "", "the end", "an <end_of_text> in it", "the other thing in there " * 9, "日本語"]
WAYS = [
    *(("uneven", "onnx", "openvino"), ("uneven", "onnx", "onnxruntime"), ("uneven", "openvino", "openvino")),
    *(("resnet", "onnx", "openvino"), ("resnet", "onnx", "onnxruntime")),
    *(("shortest", "onnx", "openvino"), ("shortest", "onnx", "onnxruntime"), ("shortest", "torch", "torch")),
]


def with_tokenizer(config: CLIPConfig) -> tuple[CLIPConfig, CLIPTokenizer]:
    """Return the config with the vocabulary of a small tokenizer."""
    tokenizer = small_tokenizer()
    text = config.text.model_copy(update={"vocab_size": tokenizer.vocab_size})
    return config.model_copy(update={"text": text}), tokenizer


def uneven() -> CLIPConfig:
    """Two blocks a tower: attention or MLP missing, or there but empty."""
    config = uneven_config()
    vision = config.vision.model_copy(update={"heads": (3, 0), "mlp_width": (7, None)})
    text = config.text.model_copy(update={"heads": (None, 2), "mlp_width": (0, None)})
    return config.model_copy(update={"vision": vision, "text": text})


def models() -> dict[str, tuple[CLIP, CLIPTokenizer]]:
    """Float64 models: a ViT as automatic pruning leaves it, a ResNet, a ViT with QuickGELU and the shortest context."""
    found = {}
    for name, config in {
        "uneven": uneven(),
        "resnet": resnet_config((1, 1, 1, 1)),
        "shortest": vit_clip(
            8, (1, 8), (1, 8), 8, image_size=16, head_dim=8, context_length=2, activation="quick_gelu"
        ),
    }.items():
        config, tokenizer = with_tokenizer(config)
        make = random_resnet if name == "resnet" else random_model
        found[name] = make(config), tokenizer
    return found


MODELS = models()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of `MODELS` by name, exports `NAME-FORMAT`, shards in `shards`, pictures `0.png` to `2.png`."""
    return made_once(tmp_path_factory, "exports", fill)


def fill(folder: Path) -> None:
    for name, (model, tokenizer) in MODELS.items():
        save_checkpoint(
            folder / name, model, tokenizer, Preprocess(image_size=model.config.vision.image_size), torch.float32
        )
    for name, to in {(name, to) for name, to, _ in WAYS}:
        export(folder / name, folder / f"{name}-{to}", to)
    (folder / "shards").mkdir()
    write_shard(folder / "shards" / "0.tar", [good(i) for i in range(12)])
    for i in range(3):
        Image.fromarray(picture(50 + i, 40, i)).save(folder / f"{i}.png")


def expected(name: str, texts: list[str], count: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return preprocessed random pictures, their features, and the features of texts padded to the context, in
    float64."""
    model, tokenizer = MODELS[name]
    size, context = model.config.vision.image_size, model.config.text.context_length
    pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        text = model.encode_text(torch.from_numpy(tokenizer(texts, context)), normalize=True)
        return pixels.float().numpy(), model.encode_image(pixels, normalize=True).numpy(), text.numpy()


@pytest.mark.parametrize(("name", "to", "runtime"), WAYS)
def test_features_are_those_of_float64(name: str, to: str, runtime: str, place: Path) -> None:
    clip = tinyclip.load(place / f"{name}-{to}", runtime=runtime)
    assert isinstance(clip, RuntimePipeline)
    assert clip.computing == {"dtype": "float32", "device": "cpu", "runtime": runtime}
    pixels, image, text = expected(name, TEXTS)
    for batch_size in (None, 1, 2):
        np.testing.assert_allclose(clip.encode_image(pixels, batch_size=batch_size), image, atol=2e-5)
        np.testing.assert_allclose(clip.encode_text(TEXTS, batch_size=batch_size), text, atol=2e-5)
    assert clip.logit_scale == pytest.approx(MODELS[name][0].logit_scale.item())


@pytest.fixture(scope="module")
def clip(place: Path) -> RuntimePipeline:
    return load_export(place / "uneven-onnx", "onnxruntime")


def test_pictures_in_any_form_are_the_checkpoints(place: Path, clip: RuntimePipeline) -> None:
    paths = [place / f"{i}.png" for i in range(3)]
    torchs = tinyclip.load(place / "uneven")
    whole = torchs.encode_image(paths).numpy()
    prepared = np.stack([clip.preprocess(Image.open(path)) for path in paths])
    for given in (
        paths,
        [str(paths[0]), Image.open(paths[1]), np.asarray(Image.open(paths[2]))],
        prepared,
        prepared.astype(np.float64),
        list(prepared),
        torch.from_numpy(prepared),
        [torch.from_numpy(prepared[0]), paths[1], prepared[2]],
    ):
        np.testing.assert_allclose(clip.encode_image(given), whole, atol=2e-5)
    np.testing.assert_allclose(clip.encode_image(paths * 30, batch_size=7), np.tile(whole, (30, 1)), atol=2e-5)
    labels = ["a cat", "a dog"]
    np.testing.assert_allclose(clip.classify(paths, labels), torchs.classify(paths, labels).numpy(), atol=1e-4)
    np.testing.assert_allclose(clip.similarity(paths[0], "a"), torchs.similarity(paths[0], "a").numpy(), atol=2e-5)
    raw = clip.encode_image(paths, normalize=False)
    np.testing.assert_allclose(raw, torchs.encode_image(paths, normalize=False).numpy(), rtol=1e-3, atol=1e-4)
    assert np.array_equal(clip.tokenize(labels), torchs.tokenize(labels).numpy())
    assert clip.encode_image([]).shape == clip.encode_text([]).shape == (0, 13)


@pytest.mark.parametrize(
    "given",
    [
        3,
        np.zeros((3, 32, 33), np.float32),
        np.zeros((8, 8, 5), np.uint8),
        [np.zeros((3, 1, 1), np.float32)],
        "none.png",
    ],
)
def test_what_is_no_picture_is_refused(given: Any, clip: RuntimePipeline) -> None:
    with pytest.raises(ValueError, match=r"not an image|shape|image array|no such file"):
        clip.encode_image(given)


def test_tensors_of_whole_numbers_are_no_prepared_pictures(clip: RuntimePipeline) -> None:
    side = clip.preprocessing.image_size
    with pytest.raises(ValueError, match=r"image tensor is torch\.uint8"):
        clip.encode_image(torch.zeros(3, side, side, dtype=torch.uint8))


def test_threads_and_pickles(place: Path) -> None:
    clip = load_export(place / "uneven-openvino")
    pixels, image, text = expected("uneven", TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda i: clip.encode_image(pixels[i % 3 :], batch_size=1), range(12)):
            np.testing.assert_allclose(found, image[3 - len(found) :], atol=2e-5)
    again = pickle.loads(pickle.dumps(clip))
    np.testing.assert_allclose(again.encode_text(TEXTS), text, atol=2e-5)


def test_nothing_computes_any_more_when_a_batch_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise OpenVINO would keep reading from a freed batch, which crashes the process."""
    at_work: set[int] = set()

    class Request:
        def start_async(self, inputs: Any, share_inputs: bool) -> None:
            at_work.add(id(self))

        def wait(self) -> None:
            at_work.discard(id(self))

        def get_output_tensor(self, number: int) -> Any:
            return SimpleNamespace(data=np.zeros((1, 2), np.float32))

    compiled = SimpleNamespace(get_property=lambda name: 3, create_infer_request=Request)
    monkeypatch.setattr(engines, "core", lambda: SimpleNamespace(compile_model=lambda *arguments: compiled))
    tower = engines.start("openvino", Path("image.xml"), "float32")

    def batches() -> Iterator[np.ndarray]:
        for _ in range(5):
            yield np.zeros((1, 3), np.float32)
        assert len(at_work) > 1
        raise ValueError("a broken picture")

    with pytest.raises(ValueError, match="a broken picture"):
        list(tower.run(batches()))
    assert not at_work
    some = tower.run(batches())
    next(some)
    some.close()  # type: ignore[attr-defined]
    assert not at_work


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_both_towers_are_loaded_at_once(to: str, place: Path) -> None:
    image = Image.open(place / "0.png")
    found = tinyclip.load(place / f"shortest-{to}").classify(image, ["a cat", "a dog"])
    whole = tinyclip.load(place / "shortest").classify(image, ["a cat", "a dog"]).numpy()
    np.testing.assert_allclose(found, whole, atol=2e-4)


def test_what_the_model_made_its_export_can_use(place: Path) -> None:
    expected = tinyclip.load(place / "shortest").fingerprint()
    assert {tinyclip.load(place / f"shortest-{to}").fingerprint() for to in ("onnx", "torch")} == {expected}
    assert tinyclip.load(place / "uneven").fingerprint() != expected


def test_a_checkpoint_is_converted_in_memory(place: Path) -> None:
    clip = tinyclip.load(place / "shortest", runtime="openvino")
    _, _, text = expected("shortest", TEXTS)
    np.testing.assert_allclose(clip.encode_text(TEXTS), text, atol=2e-5)
    assert clip.computing["runtime"] == "openvino"
    assert isinstance(clip, RuntimePipeline) and clip.size() > 10_000
    with pytest.raises(ValueError, match="only exports can be pickled"):
        pickle.dumps(clip)


# --- without torch


@pytest.mark.parametrize(("name", "to", "runtime"), WAYS[:3])
def test_no_torch_is_imported(name: str, to: str, runtime: str, place: Path) -> None:
    code = f"""
import sys, tinyclip
clip = tinyclip.load({str(place / f"{name}-{to}")!r}, runtime={runtime!r}, dtype="auto")
clip.encode_image({str(place / "0.png")!r})
clip.classify({str(place / "0.png")!r}, ["a cat", "a dog"])
print(*{{name.split(".")[0] for name in sys.modules}})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert runtime in loaded
    # Neither torch nor the module that reports usage to OpenVINO's makers.
    assert not loaded & {"torch", "openvino_telemetry", "megatron", "webdataset", "matplotlib", "ftfy"}


def test_the_command_imports_no_torch(place: Path) -> None:
    code = """
import sys
from tinyclip.cli.main import app
app(sys.argv[1:], standalone_mode=False)
assert not {"torch", "megatron", "matplotlib", "pyarrow"} & set(sys.modules)"""
    command = [sys.executable, "-c", code, "classify", str(place / "uneven-onnx"), str(place / "0.png"), "a", "b"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["runtime"] == "openvino"
    assert sum(label["probability"] for label in result["labels"]) == pytest.approx(1, abs=1e-6)


# --- 8 bits


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_int8(to: str, tmp_path: Path, place: Path) -> None:
    config, tokenizer = with_tokenizer(vit_clip(32, (1, 64), (1, 64), 8, image_size=16, head_dim=16, context_length=12))
    torch.manual_seed(0)
    model = CLIP(config).eval()
    save_checkpoint(tmp_path / "model", model, tokenizer, Preprocess(image_size=16))
    facts = export(tmp_path / "model", tmp_path / "out", to, int8=True, calibration=place / "shards")
    assert facts["precision"] == "int8" and facts["calibration"] == {"images": 9, "texts": 9}
    assert len(facts["in_float"]["image"]) == 1
    clip = load_export(tmp_path / "out")
    assert clip.computing["dtype"] == "int8"
    weights = sum(parameter.numel() for parameter in model.visual.parameters())
    assert facts["files"]["image.onnx" if to == "onnx" else "image.bin"][0] < 3.2 * weights  # bytes; 4 in float32
    pixels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = model.encode_image(pixels, normalize=True).numpy()
    cosines = (clip.encode_image(pixels) * wanted).sum(1)
    assert 0.95 < cosines.min() < 1 - 1e-6  # close, but in fewer bits


def test_features_of_another_calibration_are_refused(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    write_shard(tmp_path / "other" / "0.tar", [good(i) for i in range(12, 24)])
    (tmp_path / "texts.txt").write_text("a red fox\na grey wolf\n")
    for name, calibration in (("one", place / "shards"), ("two", tmp_path / "other")):
        command("export", place / "shortest", "--to", "onnx", "--int8", "--calibration-data", calibration, "-o", name)
    one, two = (tinyclip.load(name) for name in ("one", "two"))
    assert isinstance(one, RuntimePipeline) and isinstance(two, RuntimePipeline)
    assert one.fingerprint() == two.fingerprint()  # same fingerprint, so either model can search the index
    for name, code in (("one", 0), ("two", 2), ("one", 0)):
        said = command("embed", name, "texts.txt", "-o", "features", code=code)
        assert ("made with another model (one, now two)" in said) == (code == 2)


def test_int8_keeps_more_in_float_and_then_gives_up(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def quantise(*arguments: Any) -> dict[str, list[str]]:
        tried.append(arguments[-1])
        for tower in ("image", "text"):
            shutil.copy(arguments[0] / f"{tower}.onnx", arguments[1])
        return {}

    monkeypatch.setattr("tinyclip.export.quantise.quantise", quantise)
    monkeypatch.setitem(agreement.LEAST, "int8", 1.1)
    with pytest.raises(ValueError, match=r"onnx export with .* disagrees with the model: image features have cosines"):
        export(place / "shortest", tmp_path / "out", "onnx", int8=True, calibration=place / "shards")
    assert tried == [(0, 1), (1, 1), (5, 5)]
    assert not list(tmp_path.iterdir())


def test_a_tower_of_which_all_is_kept_stays_in_float(place: Path, tmp_path: Path) -> None:
    inputs = [np.zeros((1, 3, 32, 32), np.float32)]
    assert quantise._onnx(place / "shortest-onnx" / "image.onnx", tmp_path / "image.onnx", inputs, (99, 99))
    import onnx

    assert not any("Quantize" in node.op_type for node in onnx.load(tmp_path / "image.onnx").graph.node)


def test_samples_are_no_more_than_asked_for(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard, *_) = sorted((place / "shards").glob("*.tar"))
    for i in range(3):
        shutil.copy(shard, tmp_path / f"{i}.tar")
    monkeypatch.setattr(agreement, "COUNT", 2)
    assert len(agreement.samples_of(tmp_path, tinyclip.load(place / "shortest")).pixels) == 2


def test_a_wrong_export_is_refused_and_leaves_nothing(tmp_path: Path, place: Path, monkeypatch: Any) -> None:
    write = TOWERS["torch"]

    def wrong(program: Any, file: Path) -> None:
        for weight in program.state_dict.values():
            weight.data.add_(0.05)
        write(program, file)

    monkeypatch.setitem(TOWERS, "torch", wrong)
    with pytest.raises(ValueError, match=r"torch export with torch in float32 disagrees"):
        export(place / "shortest", tmp_path / "out", "torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "message"), [("torch", "No space left"), ("openvino", r"is the disk full\? \(basic_ios")]
)
def test_a_full_disk_is_one_line(
    to: str, message: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If torch wrote the file itself, a full disk would crash the process."""

    def full(*_: Any, **options: Any) -> None:
        raise RuntimeError("basic_ios::clear") if options else OSError(errno.ENOSPC, "No space left on device")

    if to == "torch":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr(engines.needed("openvino"), "save_model", full)
    with pytest.raises(ValueError, match=rf"cannot write {tmp_path}/out: {message}"):
        export(place / "shortest", tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_what_is_compared() -> None:
    turn = np.array([[0.8, -0.6], [0.6, 0.8]], np.float32)
    ours = agreement.Answers(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), 0.5)
    theirs = agreement.Answers(turn @ ours.image, np.float32([[0, 1], [1, 0]]), 0.25)
    figures = agreement.compare(ours, theirs, real=True)
    assert figures["image_min_cosine"] == figures["image_mean_cosine"] == pytest.approx(0.8)
    assert figures["image_max_error"] == pytest.approx(0.6) and figures["text_max_error"] == 1
    assert (figures["text_min_cosine"], figures["top1_agreement"]) == (0, 0)
    assert (figures["acc1_model"], figures["acc1"]) == (0.5, 0.25)
    assert agreement.compare(ours, ours, real=True)["top1_agreement"] == 1
    for precision in agreement.LEAST:
        with pytest.raises(ValueError, match=rf"it disagrees .* {precision} requires"):
            agreement.refuse(figures, precision, "it")
    with pytest.raises(ValueError, match=r"image features have cosines down to nan"):
        agreement.refuse(figures | {"image_min_cosine": float("nan")}, "int8", "it")


def test_accuracy_is_judged_where_there_are_classes(tmp_path: Path, place: Path, monkeypatch: Any) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "eval" / name).mkdir(parents=True)
        shutil.copy(place / "0.png", tmp_path / "eval" / name)
    facts = export(place / "shortest", tmp_path / "out", "torch", data=tmp_path / "eval")
    figures = facts["check"]["torch float32"]
    assert figures["acc1"] == figures["acc1_model"] == 0.5
    monkeypatch.setitem(agreement.MOST_LOST, "float32", -0.1)
    with pytest.raises(ValueError, match=r"loses 0.00 points of top-1 accuracy"):
        export(place / "shortest", tmp_path / "other", "torch", data=tmp_path / "eval")
    assert not (tmp_path / "other").exists()


# --- unusable folders


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "shortest-onnx", tmp_path / "model.onnx"))


def change(folder: Path, **facts: Any) -> None:
    path = folder / "tinyclip.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.mark.parametrize("inside", ["", "image.onnx", "text.onnx", "tinyclip.json"])
def test_a_folder_or_a_file_in_it(inside: str, copy: Path) -> None:
    assert tinyclip.load(copy / inside).encode_text("a").shape == (1, 8)


def flip(folder: Path) -> None:
    data = bytearray((folder / "text.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "text.onnx").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"text\.onnx: damaged"),
        (lambda folder: (folder / "image.onnx").unlink(), r"image\.onnx: no such file, though tinyclip\.json lists it"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer\.json: damaged"),
        (lambda folder: (folder / "tinyclip.json").write_text("{"), r"cannot be read as JSON"),
        (lambda folder: (folder / "tinyclip.json").write_text("{}"), r"no export's facts"),
        (lambda folder: change(folder, format=2), r"format 2 from a newer tinyclip; this one reads 1; update"),
        (lambda folder: change(folder, config=None), r"config is missing or not dict"),
        (lambda folder: change(folder, config={}), r"config: embed_dim: missing"),
        (lambda folder: change(folder, export="tflite"), r"export is 'tflite'"),
        (lambda folder: change(folder, preprocess={"image_size": 0}), r"image_size"),
        (lambda folder: change(folder, files={}), r"image\.onnx is not among its files"),
        (lambda folder: (folder / "tinyclip.json").unlink(), r"model\.onnx is not a tinyclip export"),
    ],
)
def test_a_damaged_folder_is_one_line(damage: Callable[[Path], Any], message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=message) as error:
        tinyclip.load(copy)
    assert "\n" not in str(error.value)


def test_a_folder_with_a_model_of_others_is_one_line(tmp_path: Path, copy: Path) -> None:
    (tmp_path / "others").mkdir()
    (copy / "image.onnx").rename(tmp_path / "others" / "model.onnx")
    with pytest.raises(ValueError, match=r"others is not a tinyclip export: .* has no tinyclip\.json"):
        tinyclip.load(tmp_path / "others")


def of_the_future(file: Path) -> None:
    import onnx

    model = onnx.load(file)
    model.opset_import[0].version = 999
    onnx.save(model, file)


@pytest.mark.parametrize(
    ("runtime", "spoil"), [("onnxruntime", of_the_future), ("openvino", lambda file: file.write_bytes(b"\x08junk"))]
)
def test_what_a_runtime_cannot_load_is_one_line(runtime: str, spoil: Callable[[Path], Any], copy: Path) -> None:
    spoil(copy / "image.onnx")
    write_facts(copy, json.loads((copy / "tinyclip.json").read_text()))
    clip = tinyclip.load(copy, runtime=runtime)
    with pytest.raises(ValueError, match=rf"image\.onnx: {runtime} .* cannot load it") as error:
        clip.encode_image(np.zeros((1, 3, 16, 16), np.float32))
    assert "\n" not in str(error.value)


def test_a_runtime_that_is_missing_or_cannot(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"an export to onnx, which torch cannot run; openvino or onnxruntime can"):
        tinyclip.load(place / "uneven-onnx", runtime="torch")
    with pytest.raises(ValueError, match=r"runtime 'tensorrt': choose auto"):
        tinyclip.load(place / "uneven-onnx", runtime="tensorrt")
    with pytest.raises(ValueError, match=r"dtype 'bfloat16': onnxruntime computes in float32 here"):
        tinyclip.load(place / "uneven-onnx", runtime="onnxruntime", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"run on the CPU only, not on cuda"):
        tinyclip.load(place / "uneven-onnx", device="cuda")
    with pytest.raises(ValueError, match=r"uneven-onnx is an export, whose activation is part of its graph"):
        tinyclip.load(place / "uneven-onnx", activation="gelu")
    missing = {"openvino"}
    find_spec = engines.find_spec
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name in missing else find_spec(name))
    assert tinyclip.load(place / "uneven-onnx").computing["runtime"] == "onnxruntime"
    with pytest.raises(ValueError, match=r"needs openvino: pip install tinyclip\[openvino\]"):
        tinyclip.load(place / "uneven-openvino")
    missing.add("onnxruntime")
    with pytest.raises(ValueError, match=r"needs onnxruntime: pip install tinyclip\[onnx\]"):
        tinyclip.load(place / "uneven-onnx")


def test_a_package_that_the_export_needs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"needs onnxscript: pip install tinyclip\[onnx\]"):
        export(place / "shortest", tmp_path / "out", "onnx")
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ValueError, match=r"needs nncf: pip install tinyclip\[openvino\]"):
        export(place / "shortest", tmp_path / "out", "openvino", int8=True, calibration=place / "shards")


# --- commands


def test_export_then_use_it(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    made = ("export", place / "shortest", "--to", "onnx", "-o", out)
    shown = command(*made)
    assert "openvino float32" in shown and "onnxruntime float32" in shown and f"MB: {out}" in shown
    assert "exists; choose another" in command(*made, code=2)
    result = json.loads(command(*made, "--overwrite", "--json", "--calibration-data", place / "shards"))
    assert result["check"]["onnxruntime float32"]["texts"] == 12
    measured = json.loads(command("measure", out, "--runtime", "onnxruntime", "--json"))
    checkpoint = json.loads(command("measure", place / "shortest", "--json"))
    same = [key for key in checkpoint if key.startswith(("params", "macs"))]
    assert {key: measured[key] for key in same} == {key: checkpoint[key] for key in same}
    assert measured["pairs_per_s"] > 0 and measured["size_mb"] > 0
    for model in (out, place / "shortest"):
        command("embed", model, place / "shards", "-o", tmp_path / f"of-{model.name}", "--compute-dtype", "float32")
    import pyarrow.parquet

    for name in ("image-00000", "text-00000"):
        ours, theirs = (
            pyarrow.parquet.read_table(tmp_path / folder / f"{name}.parquet")
            for folder in ("of-model.onnx", "of-shortest")
        )
        assert ours["key"] == theirs["key"]
        np.testing.assert_allclose(ours["features"].to_pylist(), theirs["features"].to_pylist(), atol=2e-3)


def test_evaluating_an_export(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "eval" / name).mkdir(parents=True)
        shutil.copy(place / f"{i}.png", tmp_path / "eval" / name)
    ours, theirs = (
        json.loads(command("evaluate", place / model, tmp_path / "eval", "--dtype", "float32", "--json"))
        for model in ("uneven-onnx", "uneven")
    )
    assert ours["runtime"] == "openvino"
    assert (ours["acc1"], ours["n"]) == (theirs["acc1"], theirs["n"])
    # Even with a GPU, an export runs on the CPU.
    monkeypatch.setattr("tinyclip.common.devices.best_device", lambda: torch.device("cuda"))
    export_of = place / "uneven-onnx"
    assert json.loads(command("evaluate", export_of, tmp_path / "eval", "--json"))["n"] == 2
    assert json.loads(command("embed", export_of, tmp_path / "eval", "-o", tmp_path / "out", "--json"))["images"] == 2


@pytest.mark.parametrize("to", ["hf", "open_clip"])
def test_formats_of_others_are_checked_too(to: str, tmp_path: Path, place: Path) -> None:
    message = {"hf": r"block 0 of the image tower has 3 heads", "open_clip": r"the vocabulary has 602 tokens"}[to]
    with pytest.raises(ValueError, match=message):
        export(place / "uneven", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    model = random_model(vit_clip(24, (2, 128), (2, 128), 16, image_size=32), dtype=torch.float32)
    Pipeline(model, tinyclip.inputs.tokenizer.clip_tokenizer(), Preprocess(image_size=32)).save(tmp_path / "model")
    facts = export(tmp_path / "model", tmp_path / "out", to)
    assert facts["check"]["torch float32"]["image_max_error"] < 1e-6
    assert tinyclip.load(tmp_path / "out").model.config == model.config


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("export", "uneven", "--to", "tflite", "-o", "x"), "unknown format 'tflite'; choose onnx, openvino"),
        (("export", "uneven", "--to", "onnx", "--int8", "-o", "x"), "--calibration-data FOLDER"),
        (
            ("export", "uneven", "--to", "torch", "--int8", "-o", "x"),
            "int8 is for onnx and openvino, not torch",
        ),
        (("export", "nowhere", "--to", "onnx", "-o", "x"), "nowhere: no such checkpoint"),
        (("export", "uneven-onnx", "--to", "openvino", "-o", "x"), "uneven-onnx is an export, which cannot be used"),
        (("export", "uneven", "--to", "onnx", "-o", "0.png", "--overwrite"), "is a file, so"),
        (("export", "uneven", "--to", "onnx", "-o", "x", "--data", "nowhere"), "nowhere: no such data folder"),
        (
            ("export", "uneven", "--to", "onnx", "--int8", "-o", "x", "--calibration-data", "nowhere"),
            "nowhere: no such file or folder",
        ),
        (
            ("export", "uneven", "--to", "onnx", "--int8", "-o", "x", "--calibration-data", "uneven"),
            "uneven: contains no pictures",
        ),
        (("classify", "uneven-onnx", "0.png", "a", "--device", "cuda"), "run on the CPU"),
        (("classify", "uneven-onnx", "0.png", "a", "--runtime", "torch"), "torch cannot run"),
        (("measure", "ViT-B-32", "--runtime", "openvino"), "it runs with torch, not"),
        (("evaluate", "uneven-onnx", "shards", "--compile"), "other runtimes always compile"),
        (("structure", "uneven-onnx"), "is an export, which cannot be used for this"),
        (("distill", "uneven-onnx"), "uneven-onnx"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], named: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    error = command(*arguments, code=2)
    assert named in error and len(error.splitlines()) == 1
    assert not (place / "x").exists()


def test_signals_after_a_model_is_gone(place: Path) -> None:
    """If OpenVINO is deleted in a thread other than the one that created it, the creating thread loses its signal
    stack."""
    code = f"""
import gc, signal, subprocess, threading, tinyclip
signal.signal(signal.SIGCHLD, lambda *_: None)
clips = [tinyclip.load({str(place / "shortest-onnx")!r}, runtime="openvino")]
clips[0].encode_text("a")
deleting = threading.Thread(target=lambda: (clips.clear(), gc.collect()))
deleting.start()
deleting.join()
subprocess.run(["true"])"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("lanes", "count", "together"), [(1, 8, 8), (1, 100, 32), (2, 8, 4), (2, 9, 5), (2, 100, 32), (4, 3, 1), (4, 0, 1)]
)
def test_few_items_are_shared_among_the_lanes(lanes: int, count: int, together: int) -> None:
    assert engines.Tower(iter, lanes).batch(count, 32) == together
