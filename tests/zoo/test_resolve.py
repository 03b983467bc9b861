from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import requests
import torch
import yaml
from torch import Tensor

from tests.helpers.models import ROOT, TEXTS, filled, golden, images, random_model
from tests.helpers.server import FileServer, serving
from tests.helpers.shards import good, picture, write_shard
from tinyclip.cli.main import main
from tinyclip.common import download
from tinyclip.inference.pipeline import Pipeline, load
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.axes import axis_table
from tinyclip.model.config import CLIPConfig, ResNetConfig, TransformerConfig, vit_clip
from tinyclip.model.model import CLIP
from tinyclip.recipe.recipe import load_recipe
from tinyclip.train.loop import start
from tinyclip.zoo import catalogue, listing
from tinyclip.zoo.catalogue import ENTRIES, Entry, find
from tinyclip.zoo.convert import convert
from tinyclip.zoo.listing import recount
from tinyclip.zoo.resolve import resolve

RELEASE = "https://github.com/wkcn/TinyCLIP-model-zoo/releases/download/checkpoints/"
EARLIER = "https://github.com/zhouzhenghong-gt/tinyclip_ckpt/releases/download/pre/"
# As published: file, earlier file, ImageNet-1K top-1, parameters (image, text), GMACs, pairs/s on a V100.
PUBLISHED = [
    ("TinyCLIP-ViT-39M-16-Text-19M-YFCC15M.pt", None, 63.5, (39, 19), 9.5, 1469),
    ("TinyCLIP-ViT-8M-16-Text-3M-YFCC15M.pt", None, 41.1, (8, 3), 2.0, 4150),
    ("TinyCLIP-ResNet-30M-Text-29M-LAION400M.pt", "TinyCLIP-ResNet-30M_epoch_6.pt", 59.1, (30, 29), 6.9, 1811),
    ("TinyCLIP-ResNet-19M-Text-19M-LAION400M.pt", "TinyCLIP-ResNet-19M_epoch_12.pt", 56.3, (19, 19), 4.4, 3024),
    ("TinyCLIP-ViT-61M-32-Text-29M-LAION400M.pt", "TinyCLIP-ViT-61M-32_epoch_6.pt", 62.4, (61, 29), 5.3, 3191),
    ("TinyCLIP-ViT-40M-32-Text-19M-LAION400M.pt", "TinyCLIP-ViT-40M-32_epoch_16.pt", 59.8, (40, 19), 3.5, 4641),
    ("TinyCLIP-auto-ViT-63M-32-Text-31M-LAION400M.pt", "TinyCLIP-ViT-63M-32-LAION.pt", 63.9, (63, 31), 5.6, 2905),
    ("TinyCLIP-auto-ViT-45M-32-Text-18M-LAION400M.pt", "TinyCLIP-ViT-45M-32-LAION.pt", 61.4, (45, 18), 3.7, 3682),
    ("TinyCLIP-auto-ViT-22M-32-Text-10M-LAION400M.pt", "TinyCLIP-ViT-22M-32-LAION.pt", 53.7, (22, 10), 1.9, 5504),
    (
        "TinyCLIP-auto-ViT-63M-32-Text-31M-LAIONYFCC400M.pt",
        "TinyCLIP-ViT-63M-32-LAION-YFCC.pt",
        64.5,
        (63, 31),
        5.6,
        2909,
    ),
    (  # the table's 1.9 GMACs are a mistake
        "TinyCLIP-auto-ViT-45M-32-Text-18M-LAIONYFCC400M.pt",
        "TinyCLIP-ViT-45M-32-LAION-YFCC.pt",
        62.7,
        (45, 18),
        3.7,
        3685,
    ),
]
FORTY, AUTO = "TinyCLIP-ViT-40M-32-Text-19M-LAION400M", "TinyCLIP-auto-ViT-22M-32-Text-10M-LAION400M"
CUT = CLIPConfig.from_dict(  # as in golden/auto-ViT-B-32.json, plus a block without attention
    {
        "embed_dim": 32,
        "vision": {"kind": "vit", "image_size": 224, "patch_size": 32, "width": 37}
        | {"heads": (2, None, 1), "mlp_width": (51, 13, 29)},
        "text": {"width": 23, "heads": (1, 3), "mlp_width": (17, 40)},
    }
)

# --- the published layouts ---------------------------------------------------------------------------------------


def training_file(state: dict[str, Tensor], path: Path, layout: str) -> None:
    """Write a file as the authors' training code does."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        part = "image" if key.startswith("visual.") else "logit" if key == "logit_scale" else "text"
        if layout == "older":
            named[f"module.{key}"] = value
            continue
        prefix = {"image": "_image_encoder.", "text": "_text_encoder.", "logit": "_logit_scale."}[part]
        named[f"{prefix}module.{key}" if layout == "ddp" else f"{prefix}{key}"] = value
        if layout == "auto" and part != "logit":
            named[f"{part}_encoder_without_ddp.{key}"] = value
    if layout == "auto":
        named["_image_encoder.l0_module.heads_loga"] = torch.zeros(12, 12)
    data = {"state_dict": named, "epoch": 6, "iter_in_epoch": 0, "name": "run", "scaler": {"scale": 65536.0}}
    data["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save(data | {"args": argparse.Namespace(model="ViT-B-32", lr=1e-4, world_size=32)}, path)


def manual_reference(entry: Entry, open_clip: ModuleType) -> Any:
    """Return OpenCLIP's model of the same kind with reduced width and depth, filled with noise."""
    torch.manual_seed(len(entry.name))
    vision: dict[str, Any] = {"image_size": 224, "layers": 2, "width": 64, "head_width": 64}
    vision |= {"patch_size": 16 if "-16-" in entry.name else 32}
    if "ResNet" in entry.name:
        vision = {"image_size": 224, "layers": [1, 2, 1, 1], "width": 8, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.model.CLIP(48, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "token_embedding.weight":
                parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    return model


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Stand-in for GitHub, as far as the zoo uses it; the cache is `tmp_path / "cache"`."""
    monkeypatch.setenv(catalogue.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(download, "FIRST_WAIT_S", 0.001)
    original = requests.adapters.HTTPAdapter.send

    with serving() as running:

        def send(self: Any, request: Any, *arguments: Any, **options: Any) -> Any:
            request.url = request.url.replace(RELEASE, f"{running.address}/release/")
            assert request.url.startswith(running.address), f"a test asks for {request.url}"
            return original(self, request, *arguments, **{**options, "proxies": {}})

        monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
        yield running


def publish(server: FileServer, entry: Entry, state: dict[str, Tensor], layout: str, folder: Path) -> None:
    training_file(state, folder / "published.pt", layout)
    server.files[entry.file] = (folder / "published.pt").read_bytes()


def cut_model(seed: int = 0) -> CLIP:
    return random_model(CUT, seed, torch.float32)


def run(*arguments: object, code: int = 0) -> None:
    """Run the command line in this process, with the server as GitHub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tinyclip", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert (stop.value.code or 0) == code


# --- facts about the models --------------------------------------------------------------------------------------


def test_every_published_row_is_there() -> None:
    rows = [(e.url, e.earlier_url, e.top1, e.params_m, e.gmacs, e.pairs_per_s) for e in ENTRIES]
    assert rows == [(RELEASE + file, old and EARLIER + old, *figures) for file, old, *figures in PUBLISHED]
    assert {e.licence for e in ENTRIES} == {"MIT"}
    assert [e.how for e in ENTRIES] == ["manual"] * 6 + ["auto"] * 5
    on_hub = (
        "39M-16-Text-19M-YFCC15M",
        "8M-16-Text-3M-YFCC15M",
        "61M-32-Text-29M-LAION400M",
        "40M-32-Text-19M-LAION400M",
    )
    assert [e.hub_id for e in ENTRIES if e.hub_id] == [f"wkcn/TinyCLIP-ViT-{name}" for name in on_hub]
    assert "mistake" in ENTRIES[-1].note and ENTRIES[-1].data == "LAION+YFCC-400M"


# Counted from the authors' code: (image, text); the MACs exclude the two attention products.
@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [
        ("ViT-39M-16", (38.6, 19.2), (7.51, 1.45)),
        ("ViT-8M-16", (8.3, 2.5), (1.59, 0.18)),
        ("ViT-61M-32", (61.4, 28.7), (3.05, 2.18)),
        ("ViT-40M-32", (39.7, 19.2), (1.96, 1.45)),
        ("ResNet-30M", (29.6, 28.9), (4.68, 2.18)),
        ("ResNet-19M", (18.6, 19.5), (2.91, 1.45)),
    ],
)
def test_the_recount_of_a_shape(name: str, params: tuple[float, ...], gmacs: tuple[float, ...]) -> None:
    entry = catalogue.get(name)
    counts = recount(entry)
    assert counts is not None and entry.shape is not None
    assert (counts["params_image"] / 1e6, counts["params_text"] / 1e6) == pytest.approx(params, abs=0.05)
    config = CLIPConfig.named(entry.shape)

    def products(tower: TransformerConfig | ResNetConfig, length: int) -> int:
        heads = tower.heads if isinstance(tower, TransformerConfig) else (tower.heads,)  # heads of the pool
        return 2 * length**2 * sum(n or 0 for n in heads) * tower.head_dim

    image = counts["macs_image"] - products(config.vision, config.vision.grid**2 + 1)
    text = counts["macs_text"] - products(config.text, config.text.context_length)
    assert (image / 1e9, text / 1e9) == pytest.approx(gmacs, abs=0.006)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        *[(e.name, e.name) for e in ENTRIES],
        *[(e.file, e.name) for e in ENTRIES],
        *[(e.name.removeprefix("TinyCLIP-").replace("auto-", "").lower(), e.name) for e in ENTRIES],
        ("TinyCLIP-ViT-40M-32-Text-19M", FORTY),
        ("TinyCLIP-ViT-22M-32-Text-10M", AUTO),
        ("ViT-40M/32 Text-19M", FORTY),
        ("vit-40m/32", FORTY),
        ("TinyCLIP-ResNet-30M", "TinyCLIP-ResNet-30M-Text-29M-LAION400M"),
    ],
)
def test_names_as_people_write_them(name: str, full: str) -> None:
    assert catalogue.get(name).name == full


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-4", "TinyCLIP", "", "TinyCLIP-ViT-40M-32-Text-19M-LAION", "nowhere"])
def test_what_is_no_name(name: str) -> None:
    assert find(name) is None


def test_a_name_of_several_models_names_them() -> None:
    with pytest.raises(ValueError, match=r"ViT-45M-32 is ambiguous: \S+-LAION400M or \S+-LAIONYFCC400M; give a longer"):
        find("ViT-45M-32")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TinyCLIP-ViT-40M-32-Text-19M-LAION40M", rf"no such checkpoint; did you mean {FORTY}"),
        ("ViT-40M-33", rf"did you mean {FORTY}"),
        ("nowhere", r"nowhere: no such checkpoint; `tinyclip zoo` lists"),
        ("runs/emoji-50/student", "runs/emoji-50/student: no such checkpoint"),
        ("./student", "no such checkpoint"),
        ("ViT-B-32", "the name is a shape"),
    ],
)
def test_an_unknown_name_is_one_line_with_what_is_like_it(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # ignore files in the tests' working directory, such as those of `make demo`
    with pytest.raises(ValueError, match=message) as caught:
        resolve(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_local_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (FORTY, "emoji-student"):
        (tmp_path / name).mkdir()
        with pytest.warns(UserWarning, match=rf"{name}: reading {tmp_path / name}, not the published model"):
            assert resolve(name, tmp_path / "cache") == Path(name)
        assert resolve(tmp_path / name) == tmp_path / name  # without a warning
    with pytest.raises(ValueError, match=r"runs/mine: no such checkpoint; "):  # not a hub id: a folder `runs` exists
        (tmp_path / "runs").mkdir()
        resolve("runs/mine", tmp_path / "cache")


def test_the_place_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(catalogue.CACHE_VARIABLE, str(tmp_path))
    assert catalogue.cache_folder() == tmp_path
    assert catalogue.cache_folder(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv(catalogue.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert catalogue.cache_folder().name == "tinyclip"


# --- loading by name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.how == "manual"], ids=lambda e: e.name)
def test_a_manual_model_by_name(
    entry: Entry, server: FileServer, tmp_path: Path, others: Callable[[str], ModuleType]
) -> None:
    reference = manual_reference(entry, others("open_clip"))
    layout = "older" if "ResNet" in entry.name else "ddp" if "YFCC" in entry.name else "plain"
    state = {key: value for key, value in reference.state_dict().items() if key != "attn_mask"}
    publish(server, entry, state, layout, tmp_path)
    clip = load(entry.name)
    pixels, tokens = torch.rand(2, 3, 224, 224), clip.tokenize(["a dog", "two cats"])
    with torch.inference_mode():
        expected = reference.encode_image(pixels), reference.encode_text(tokens)
        found = clip.model.encode_image(pixels), clip.model.encode_text(tokens)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.how == "auto"], ids=lambda e: e.name)
def test_an_auto_model_by_name(entry: Entry, server: FileServer, tmp_path: Path) -> None:
    model = cut_model(len(entry.name))
    assert not any(key.startswith("visual.transformer.resblocks.1.attn") for key in model.state_dict())
    publish(server, entry, model.state_dict(), "auto", tmp_path)
    assert recount(entry) is None
    clip = load(entry.name.replace("auto-", ""))
    assert clip.model.config == CUT
    for key, value in clip.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    counts = recount(entry)
    sizes = {key: value.numel() for key, value in model.state_dict().items() if key != "token_embedding.weight"}
    assert counts is not None
    assert counts["params_image"] == sum(size for key, size in sizes.items() if key.startswith("visual."))
    assert counts["params_text"] == sum(size for key, size in sizes.items() if not key.startswith("visual."))
    record = download.read_record(tmp_path / "cache" / entry.file)
    assert record is not None and record["recount"] == counts


def test_a_model_at_full_size(server: FileServer, tmp_path: Path) -> None:
    reference = golden("forward-TinyCLIP-ViT-8M-16-Text-3M.npz")
    entry, salt = catalogue.get("ViT-8M-16"), int(reference["salt"])
    assert entry.shape is not None
    model = filled(CLIPConfig.named(entry.shape), salt)
    publish(server, entry, model.state_dict(), "ddp", tmp_path)
    server.cuts = [20_000_000]
    clip = load("TinyCLIP-ViT-8M-16-Text-3M")
    assert len(server.log) == 2 and clip.model.config == model.config
    pixels = images(model.config, salt)
    np.testing.assert_allclose(clip.encode_image(pixels), reference["image_features"], atol=2e-5)
    np.testing.assert_allclose(clip.encode_text(TEXTS), reference["text_features"], atol=2e-5)
    counts = recount(entry)
    assert counts is not None
    table = axis_table(clip.model.config)
    assert counts["params_image"] == sum(np.prod(e.shape) for k, e in table.items() if k.startswith("visual."))


def test_a_damaged_download_is_one_line(server: FileServer, tmp_path: Path) -> None:
    server.files[f"{AUTO}.pt"] = b"PK\x03\x04 and nothing more"
    path = tmp_path / "cache" / f"{AUTO}.pt"
    with pytest.raises(ValueError, match=rf"cache/{AUTO}\.pt.*; delete {path} to download it again$") as caught:
        load(AUTO)
    assert "\n" not in str(caught.value)
    facts = listing.describe(catalogue.get(AUTO))
    assert facts["state"] == "damaged" and AUTO in facts["recount"]


def test_a_tampered_file_is_refused_until_it_is_deleted(server: FileServer, tmp_path: Path) -> None:
    publish(server, catalogue.get(AUTO), cut_model().state_dict(), "auto", tmp_path)
    load(AUTO)
    path = tmp_path / "cache" / f"{AUTO}.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is not the file that was downloaded"):
        load(AUTO)
    path.unlink()
    with pytest.raises(ValueError, match="is not the file that was downloaded"):  # another file on the server
        publish(server, catalogue.get(AUTO), cut_model(1).state_dict(), "auto", tmp_path)
        load(AUTO)


# --- the Hugging Face hub ----------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = (
    "import sys; from tinyclip.zoo.resolve import resolve; assert 'torch' not in sys.modules; "
    "print(resolve(sys.argv[1]))"
)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FileServer]:
    """The hub with one model, `org/small`, as `transformers` saves it, and files that are not needed."""
    config = vit_clip(32, (2, 64), (1, 64), 32)
    (tmp_path / "hub").mkdir()
    Pipeline(random_model(config, 0, torch.float32), clip_tokenizer(), Preprocess(image_size=224)).save(
        tmp_path / "own"
    )
    convert(tmp_path / "own", tmp_path / "hub" / "small", "hf")
    with serving() as running:
        tree = []
        files = {path.name: path.read_bytes() for path in (tmp_path / "hub" / "small").iterdir()}
        for name, data in (files | {"flax_model.msgpack": b"big", "pytorch_model.bin": b"twice"}).items():
            running.files[f"org/small/resolve/{COMMIT}/{name}"] = data
            running.headers[f"org/small/resolve/{COMMIT}/{name}"] = {"X-Repo-Commit": COMMIT}
            tree.append({"type": "file", "path": name, "size": len(data), "oid": "0" * 40})
        siblings = [{"rfilename": entry["path"]} for entry in tree]
        for revision in ("main", COMMIT):
            path = f"api/models/org/small/revision/{revision}"
            running.files[path] = json.dumps({"id": "org/small", "sha": COMMIT, "siblings": siblings}).encode()
        running.files["api/models/org/small"] = running.files[path]
        running.files[f"api/models/org/small/tree/{COMMIT}"] = json.dumps(tree).encode()
        yield running


def from_hub(server: FileServer, folder: Path, name: str, code: int = 0, **environment: str) -> str:
    """Return the output of a new process that resolves a name; it must be new because the hub's settings are read on
    import."""
    settings = {"HF_ENDPOINT": server.address, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", RESOLVE, name]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings | environment, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout.strip() if code == 0 else done.stderr.splitlines()[-1]


def test_a_model_of_the_hub(hub: FileServer, tmp_path: Path) -> None:
    folder = Path(from_hub(hub, tmp_path, "org/small"))
    assert folder.is_relative_to(tmp_path / "hf")
    assert "model.safetensors" in {path.name for path in folder.iterdir()}
    assert not {"flax_model.msgpack", "pytorch_model.bin"} & {path.name for path in folder.iterdir()}
    found, expected = load(folder), load(tmp_path / "own")
    assert found.model.config == expected.model.config
    assert torch.equal(found.encode_text("a dog"), expected.encode_text("a dog"))
    hub.log.clear()
    assert from_hub(hub, tmp_path, f"hf:org/small@{COMMIT}", HF_HUB_OFFLINE="1") == str(folder)
    assert hub.log == []


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("org/other", {}, "org/other: no such checkpoint here, and .*/org/other cannot be read .HTTP 404"),
        ("hf:org/small@v9", {}, "org/small@v9: no such checkpoint here, and .*/org/small cannot be read .HTTP 404"),
        ("hf:a//b", {}, "a//b: not a Hugging Face id; write org/name"),
        ("org/small", {"HF_HUB_OFFLINE": "1"}, "the Hugging Face hub cannot be reached or is disabled"),
        ("org/small", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hugging Face hub cannot be reached"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(
    name: str, environment: dict[str, str], message: str, hub: FileServer, tmp_path: Path
) -> None:
    hub.missing = {"X-Error-Code": "RevisionNotFound" if "@" in name else "RepoNotFound"}
    assert re.match(f"ValueError: .*{message}", from_hub(hub, tmp_path, name, 1, **environment))


def test_a_transfer_that_breaks_is_one_line(hub: FileServer, tmp_path: Path) -> None:
    weights = f"org/small/resolve/{COMMIT}/model.safetensors"
    hub.headers[weights]["Content-Length"] = str(len(hub.files[weights]))
    hub.files[weights] = b"too little"
    assert re.match("ValueError: org/small: cannot be downloaded ", from_hub(hub, tmp_path, "org/small", 1))


def test_a_hub_model_without_weights(hub: FileServer, tmp_path: Path) -> None:
    tree = [{"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}]
    hub.files[f"api/models/org/small/tree/{COMMIT}"] = json.dumps(tree).encode()
    for path in list(hub.files):
        if path.startswith("api/models/org/small") and "/tree/" not in path:
            siblings = [{"rfilename": "config.json"}]
            hub.files[path] = json.dumps({"id": "org/small", "sha": COMMIT, "siblings": siblings}).encode()
    assert "org/small: no weights in " in from_hub(hub, tmp_path, "org/small", 1)


# --- the command line --------------------------------------------------------------------------------------------


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(catalogue.CACHE_VARIABLE, str(tmp_path))
    run("zoo")
    lines = capsys.readouterr().out.splitlines()
    forty = next(line.split() for line in lines if FORTY in line)
    assert forty == [FORTY, "manual", "59.8", "40+19", "39.7+19.2", "3.5", "2.00+1.49", "4,641", "-"]
    assert all(any(entry.name in line for line in lines) for entry in ENTRIES)
    assert "from the file" in next(line for line in lines if AUTO in line)
    run("zoo", "--json")
    listed = json.loads(capsys.readouterr().out)["models"]
    assert [facts["name"] for facts in listed] == [entry.name for entry in ENTRIES]
    assert listed[-1]["published"]["gmacs"] == 3.7
    assert list(tmp_path.iterdir()) == []


def test_the_page_has_the_table(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    for entry in ENTRIES:
        cells = [cell.strip() for cell in re.findall(rf"\| {entry.name} .*", page)[0].strip("|").split("|")]
        row = listing.row(listing.describe(entry, tmp_path))[:-1]
        assert cells == row


def test_download_verify_and_use_by_name(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(server, catalogue.get(AUTO), cut_model().state_dict(), "auto", tmp_path)
    run("zoo", AUTO, "--download", "--verify", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["state"] == "cached" and len(facts["sha256"]) == 64
    run("zoo", "ViT-22M")
    output = capsys.readouterr().out
    assert facts["sha256"] in output and f"{facts['recount']['macs_image']:,}" in output
    (tmp_path / "photo.jpg").write_bytes(picture(1))
    run("classify", "ViT-22M-32", tmp_path / "photo.jpg", "a dog", "a cat", "--json")
    assert len(json.loads(capsys.readouterr().out)["labels"]) == 2
    run("measure", AUTO, "--json")
    assert json.loads(capsys.readouterr().out)["params_image"] == facts["recount"]["params_image"]
    path = tmp_path / "cache" / f"{AUTO}.pt"
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    run("zoo", AUTO, "--verify", code=2)
    assert "is not the file that was downloaded" in capsys.readouterr().err
    assert len(server.log) == 1


def test_a_file_that_was_put_there_has_nothing_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(catalogue.CACHE_VARIABLE, str(tmp_path))
    (tmp_path / f"{FORTY}.pt").write_bytes(b"junk")
    digest = sha256(b"junk").hexdigest()
    run("zoo", FORTY, "--download", "--verify", "--json")
    output, error = capsys.readouterr()
    assert json.loads(output)["sha256"] == digest
    assert f"{FORTY}.pt: no checksum was recorded, so there was nothing to compare; recorded now: {digest}" in error
    run("zoo", FORTY, "--verify")
    assert capsys.readouterr().err == ""


def test_a_teacher_by_name(server: FileServer, tmp_path: Path) -> None:
    publish(server, catalogue.get(AUTO), cut_model().state_dict(), "auto", tmp_path)
    resolve(AUTO)
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "0.tar", [good(i) for i in range(20)])
    stage = {"name": "75", "steps": 2, "batch_size": 4, "student": {"vision": {"width": 30}}}
    recipe = {"teacher": AUTO, "data": str(tmp_path / "data"), "output": str(tmp_path / "run"), "stages": [stage]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = start(load_recipe(tmp_path / "recipe.yaml"))
    assert run.teacher is not None and run.teacher.model.config == CUT
    assert run.configs[0].vision.width == 30
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["teacher"] == AUTO


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zoo", "ViT-99M"), "ViT-99M: not in the zoo; did you mean"),
        (("zoo", "--verify"), "--download and --verify need the name"),
        (("zoo", AUTO, "--verify"), "not downloaded yet"),
        (("zoo", AUTO, "--download"), "HTTP 404 Not Found; if you have the file from elsewhere, put it at"),
        (("measure", AUTO), "HTTP 404"),
        (("evaluate", "ViT-63M", "."), "ViT-63M is ambiguous"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*arguments, code=2)
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
