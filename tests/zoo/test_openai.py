"""Reading other projects' checkpoints. The reference models are OpenCLIP's and Hugging Face's own."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tinyclip
from tests.helpers.models import golden, random_inputs, random_model
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig, VisionConfig, vit_clip
from tinyclip.model.model import CLIP
from tinyclip.zoo.checkpoint import load_checkpoint
from tinyclip.zoo.openai import Stated, config_from

State = dict[str, Any]
CONFIG = vit_clip(24, (2, 128), (3, 64), 16, image_size=32)


@pytest.fixture(scope="module")
def model() -> CLIP:
    return random_model(CONFIG, dtype=torch.float32)


@pytest.fixture
def state(model: CLIP) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: CLIP, b: CLIP) -> bool:
    return a.config == b.config and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def loaded(state: Any, folder: Path, **options: Any) -> CLIP:
    torch.save(state, folder / "weights.pt")
    return load_checkpoint(folder / "weights.pt", **options)[0]


# --- prefixes and containers


def towers(image: str, text: str, scale: str) -> Callable[[State], State]:
    def rename(state: State) -> State:
        prefix = {True: image, False: text}
        return {(scale if k == "logit_scale" else prefix[k.startswith("visual.")]) + k: v for k, v in state.items()}

    return rename


LAYOUTS = {
    "plain": towers("", "", ""),
    "ddp": towers("module.", "module.", "module."),
    "towers": towers("_image_encoder.", "_text_encoder.", "_logit_scale."),
    "towers with ddp": towers("_image_encoder.module.", "_text_encoder.module.", "_logit_scale.module."),
    "ddp around towers": towers("module._image_encoder.", "module._text_encoder.", "module._logit_scale."),
    "compiled": towers("_orig_mod.", "_orig_mod.", "_orig_mod."),
    "OpenCLIP custom_text": towers("", "text.", ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefixes(layout: str, model: CLIP, state: State, tmp_path: Path) -> None:
    assert same(loaded(LAYOUTS[layout](state), tmp_path), model)


def test_a_training_file_of_the_authors(model: CLIP, state: State, tmp_path: Path) -> None:
    tensors = LAYOUTS["towers with ddp"](state)
    twice = {k.replace("_image_encoder.module", "image_encoder_without_ddp"): v for k, v in tensors.items()}
    left_over = {"_image_encoder.module.l0_module.heads_loga": torch.ones(2, 2), "l0_module.lambda_1": torch.ones(())}
    data = {"epoch": 6, "iter_in_epoch": 3, "name": "run", "state_dict": tensors | twice | left_over}
    data |= {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}}
    data |= {"scaler": {"scale": 65536.0}, "args": argparse.Namespace(lr=1e-4, model="ViT", betas=[0.9, 0.98])}
    assert same(loaded(data, tmp_path), model)


def test_towers_registered_twice_must_agree(state: State, tmp_path: Path) -> None:
    other = state["visual.proj"] + 1
    with pytest.raises(ValueError, match=r"visual\.proj appears twice with different .*image_encoder_without_ddp\.vis"):
        loaded(state | {"image_encoder_without_ddp.visual.proj": other}, tmp_path)


@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors", "legacy"])
def test_file_types(suffix: str, model: CLIP, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=suffix != "legacy")
    assert same(load_checkpoint(path)[0], model)
    clip = tinyclip.load(str(path))
    assert clip.tokenizer.merges == clip_tokenizer().merges
    assert (clip.preprocessing.image_size, clip.model.training) == (32, False)


def test_half_precision_comes_back_in_float32(state: State, tmp_path: Path) -> None:
    model = loaded({k: v.half() for k, v in state.items()}, tmp_path)
    assert all(torch.equal(v, state[k].half().float()) for k, v in model.state_dict().items())


def test_a_logit_scale_of_one_axis(model: CLIP, state: State, tmp_path: Path) -> None:
    assert same(loaded(state | {"logit_scale": state["logit_scale"].view(1)}, tmp_path), model)


# --- config from tensors


def meta(layout: dict[str, list[int]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in layout.items()}


@pytest.mark.parametrize("name", ["TinyCLIP-ViT-8M-16-Text-3M", "TinyCLIP-ResNet-19M-Text-19M"])
def test_published_layouts(name: str) -> None:
    state = meta(golden(f"layout-{name}.json"))
    assert config_from(state, name, "gelu", Stated()) == CLIPConfig.named(name)


def test_an_automatically_cut_model() -> None:
    layout = golden("auto-ViT-B-32.json")["layout"]
    prefixed = LAYOUTS["towers with ddp"](meta(layout))
    state = {k.split(".module.")[1]: v for k, v in prefixed.items()}
    config = config_from(state, "auto", "gelu", Stated())
    assert isinstance(config.vision, VisionConfig)
    assert (config.vision.width, config.text.width, config.embed_dim) == (600, 389, 512)
    assert config.vision.heads == (9, 9, 10, 8, 8, 9, 10, 9, 9, 8, 8, 8)
    assert config.vision.mlp_width[:3] == (2245, 2225, 2229)
    with torch.device("meta"):
        expected = {key: list(value.shape) for key, value in CLIP(config).state_dict().items()}
    assert expected == layout


def test_blocks_that_lost_a_branch(tmp_path: Path) -> None:
    vision = {"kind": "vit", "image_size": 32, "patch_size": 16, "width": 75}
    vision |= {"heads": [2, None, 1], "mlp_width": [10, 7, None]}
    text = {"width": 50, "heads": [None, 3], "mlp_width": [0, 31]}
    config = CLIPConfig.from_dict({"embed_dim": 13, "vision": vision, "text": text})
    model = random_model(config, dtype=torch.float32)
    read = loaded(LAYOUTS["towers"](dict(model.state_dict())), tmp_path)
    assert same(read, model)
    pixels, tokens = random_inputs(config, torch.float32)
    torch.testing.assert_close(read(pixels, tokens), model(pixels, tokens))


@pytest.mark.parametrize(("layers", "width", "head_dim"), [(32, 1280, 80), (40, 1408, 88), (48, 1664, 104)])
def test_openclips_giants_have_wider_heads(layers: int, width: int, head_dim: int) -> None:
    with torch.device("meta"):
        state = CLIP(vit_clip(64, (layers, width), (1, 64), 14, head_dim=1)).state_dict()
    config = config_from(state, "giant", "gelu", Stated())
    assert (config.vision.head_dim, config.vision.heads) == (head_dim, (width // head_dim,) * layers)
    assert config.text.head_dim == 64


# --- the activation


def test_the_activation(state: State, tmp_path: Path) -> None:
    assert loaded(state, tmp_path).config.activation == "gelu"
    assert loaded(state, tmp_path, activation="quick_gelu").config.activation == "quick_gelu"
    extras = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77)}
    extras |= {"vocab_size": torch.tensor(49408)}
    assert loaded(state | extras, tmp_path).config.activation == "quick_gelu"
    assert loaded(state | extras, tmp_path, activation="gelu").config.activation == "gelu"
    with pytest.raises(ValueError, match=r"activation 'relu' is not one of gelu, quick_gelu"):
        loaded(state, tmp_path, activation="relu")


def test_our_own_folder_knows_its_activation(model: CLIP, tmp_path: Path) -> None:
    tinyclip.Pipeline(model, clip_tokenizer(), Preprocess(image_size=32)).save(tmp_path / "ours")
    assert same(load_checkpoint(tmp_path / "ours", activation="gelu")[0], model)
    with pytest.raises(ValueError, match=r"config\.json says gelu, so the activation cannot be quick_gelu"):
        load_checkpoint(tmp_path / "ours", activation="quick_gelu")
    assert same(load_checkpoint(tmp_path / "ours" / "model.safetensors")[0], model)


# --- errors


def change(**tensors: Tensor | None) -> Callable[[State], State]:
    """Replace tensors, or drop them with None; `_` stands for a dot."""

    def edit(state: State) -> State:
        names = {key.replace(".", "_"): key for key in state}
        new = state | {names.get(key, key): value for key, value in tensors.items()}
        return {key: value for key, value in new.items() if value is not None}

    return edit


def without(*starts: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if not key.startswith(starts)}


def plus(*keys: str) -> Callable[[State], State]:
    return lambda state: without("visual.conv1")(state) | {key: torch.ones(2) for key in keys}


ONES = torch.ones
BAD = {
    "missing": (without("visual.ln_post.bias"), r"is not a complete CLIP: missing visual\.ln_post\.bias$"),
    "left over": (lambda s: s | {"visual.ls_1.gamma": ONES(1)}, r"unexpected visual\.ls_1\.gamma"),
    "shape": (change(ln_final_weight=ONES(65)), r"ln_final\.weight is \(65,\), not \(64,\)"),
    "axes": (change(text_projection=ONES(64)), r"text_projection is \(64,\), it should have 2 axes"),
    "no square": (change(visual_positional_embedding=ONES(6, 128)), r"has 6 positions, not one more than a square"),
    "heads": (
        change(transformer_resblocks_1_attn_in_proj_weight=ONES(190, 64)),
        r"transformer\.resblocks\.1\.attn\.in_proj_weight has 190 rows, not a multiple of 3 x 64",
    ),
    "half a branch": (
        without("transformer.resblocks.1.attn.in_proj_weight"),
        r"transformer\.resblocks\.1\.attn\.in_proj_weight is missing",
    ),
    "no block": (without("transformer.resblocks.1."), r": transformer\.resblocks\.1 is missing, though"),
    "not finite": (change(logit_scale=torch.tensor(torch.nan)), r"logit_scale has non-finite values"),
    "integers": (lambda s: s | {"visual.proj": ONES(128, 24, dtype=torch.int8)}, r"visual\.proj holds torch\.int8"),
    "vocabulary": (change(token_embedding_weight=ONES(600, 64)), r"600 tokens and CLIP's own 49,408"),
    "not a tensor": (lambda s: s | {"visual.proj": 3}, r"visual\.proj is a int, not a tensor"),
    "timm": (plus("visual.trunk.blocks.0.norm1.weight"), r"timm's layout.*no visual\.conv1\.weight.*visual\.trunk"),
    "BERT": (plus("bert.embeddings.word_embeddings.weight"), r"a BERT model.*it has .*bert\.embeddings"),
    "Hugging Face": (lambda s: {"vision_model.x": ONES(1)}, r"give the folder that also has their config\.json"),
    "ResNet": (lambda s: {"layer1.0.conv1.weight": ONES(1), "fc.weight": ONES(1)}, r"a ResNet .*it has .*fc\.weight"),
    "anything": (lambda s: {"weight": ONES(1)}, r"is not a readable CLIP: no .* and 2 more; it has weight"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case: str, state: State, tmp_path: Path) -> None:
    edit, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        loaded(edit(state), tmp_path)
    assert "\n" not in str(error.value) and "weights.pt" in str(error.value)


def test_resnets_that_make_no_sense() -> None:
    state = meta(golden("layout-TinyCLIP-ResNet-19M-Text-19M.json"))
    state["visual.attnpool.q_proj.weight"] = torch.empty(1400, 1408, device="meta")
    with pytest.raises(ValueError, match=r"q_proj\.weight has 1400 rows, not a multiple of a head's 64"):
        config_from(state, "resnet", "gelu", Stated())


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "legacy.pt", "script.pt"])
@pytest.mark.parametrize("part", [0, 5, 0.5, 0.99])
def test_truncated_files(name: str, part: float, tmp_path: Path) -> None:
    path = tmp_path / name
    tensors = {"a": torch.ones(100), "b": torch.ones(50)}
    if name == "script.pt":
        archive(path, pickle.dumps({}, 2), {"0": bytes(400)})
    elif name == "weights.safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=name != "legacy.pt")
    data = path.read_bytes()
    path.write_bytes(data[: part if isinstance(part, int) else int(part * len(data))])
    with pytest.raises(ValueError, match=rf"{name}: damaged or not a .*file") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"x" * 999, b"PK\x03\x04" + bytes(99), bytes(99), b"\x80\x02]q\x00.", b"{}" * 20])
def test_garbage(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"weights\.pt: ") as error:
        load_checkpoint(tmp_path / "weights.pt")
    assert "\n" not in str(error.value)


def test_a_list_is_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it holds a list, not a state dict"):
        loaded([torch.ones(2)], tmp_path)
    with pytest.raises(ValueError, match=r"no tensors in it"):
        loaded({"state_dict": {}}, tmp_path)


def test_a_tensor_that_claims_more_than_the_file_has(state: State, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"visual\.proj claims more values than the file has"):
        loaded(state | {"visual.proj": torch.ones(1).expand(128, 10**9)}, tmp_path)
    with pytest.raises(ValueError, match=r"visual\.proj is not a plain tensor"):
        loaded(state | {"visual.proj": torch.ones(2, 2).to_sparse()}, tmp_path)


# --- no code from a file is run


class Hostile:
    """Runs a shell command when it is unpickled; `canary` shows whether it did."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


def archive(path: Path, data: bytes, storages: dict[str, bytes] | None = None, compression: int = 0) -> None:
    """Write a file that looks like a TorchScript archive."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("m/data.pkl", data)
        file.writestr("m/constants.pkl", pickle.dumps((), 2))
        file.writestr("m/code/__torch__.py", "class CLIP(Module): pass")
        for key, value in (storages or {}).items():
            file.writestr(f"m/data/{key}", value)


HOSTILE = {
    "zip": lambda path, bad, state: torch.save({"state_dict": state, "args": bad}, path),
    "legacy": lambda path, bad, state: torch.save({"x": bad}, path, _use_new_zipfile_serialization=False),
    "pickle": lambda path, bad, state: path.write_bytes(pickle.dumps({"x": bad}, 2)),
    "in a Namespace": lambda path, bad, state: torch.save({"args": argparse.Namespace(x=bad)} | state, path),
    "TorchScript": lambda path, bad, state: archive(path, pickle.dumps({"x": bad}, 2)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_runs_nothing(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    HOSTILE[kind](tmp_path / "weights.pt", Hostile(canary), {})
    with pytest.raises(ValueError, match=r"weights\.pt: refused, it asks for posix\.system; only tensors") as error:
        load_checkpoint(tmp_path / "weights.pt")
    assert not canary.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["zip", "in a Namespace"])
def test_a_hostile_object_beside_the_weights_is_read_and_not_run(
    kind: str, model: CLIP, state: State, tmp_path: Path
) -> None:
    HOSTILE[kind](tmp_path / "weights.pt", Hostile(tmp_path / "ran"), state)
    assert same(load_checkpoint(tmp_path / "weights.pt")[0], model)
    assert not (tmp_path / "ran").exists()


def test_the_hostile_object_would_run(tmp_path: Path) -> None:
    torch.save({"x": Hostile(tmp_path / "ran")}, tmp_path / "weights.pt")
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_hostile_hugging_face_folder_runs_nothing(tmp_path: Path) -> None:
    torch.save({"x": Hostile(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: refused, it asks for"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


# --- TorchScript archives


@pytest.mark.parametrize("how", ["trace", "script"])
def test_a_torchscript_archive(
    how: str, model: CLIP, others: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenCLIP's own model with our weights, in half precision and with OpenAI's extra entries."""
    open_clip = others("open_clip.model")
    theirs = open_clip_model(open_clip, quick_gelu=True)
    theirs.load_state_dict(model.state_dict())
    theirs.register_buffer("input_resolution", torch.tensor(32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        if how == "trace":
            pixels, tokens = random_inputs(CONFIG, torch.float32)
            script = torch.jit.trace_module(theirs, {"forward": (pixels, tokens)}, check_trace=False)
        else:
            script = torch.jit.script(theirs)
        script.half().save(tmp_path / "ViT.pt")
        monkeypatch.setattr(torch.jit, "load", None)  # it would run the archive's code
    read, _, _ = load_checkpoint(tmp_path / "ViT.pt")
    assert read.config == CONFIG.model_copy(update={"activation": "quick_gelu"})
    assert all(torch.equal(v, model.state_dict()[k].half().float()) for k, v in read.state_dict().items())


def open_clip_model(package: ModuleType, quick_gelu: bool) -> Any:
    vision = package.CLIPVisionCfg(layers=2, width=128, head_width=64, patch_size=16, image_size=32)
    text = package.CLIPTextCfg(layers=3, width=64, heads=1)
    return package.CLIP(24, vision, text, quick_gelu=quick_gelu).eval()


def tensor_pickle(size: tuple[int, ...], key: str = "0", length: int = 4, module: str = "__torch__") -> bytes:
    """Return `data.pkl` of a module with one tensor `a`, as PyTorch writes it (protocol 2)."""

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cuda:0") + number(length) + b"tQ"
    sizes = b"(" + b"".join(map(number, size)) + b"t"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    tensor = rebuild + storage + number(0) + sizes + sizes + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02c" + f"{module}\nM\n".encode() + b")\x81}(" + text("a") + tensor + b"ub."


@pytest.mark.parametrize(
    ("data", "storage", "compression", "message"),
    [
        (tensor_pickle((1,)), bytes(16), 0, r"not a readable CLIP: .*it has a$"),  # a valid archive
        (tensor_pickle((1,), module="__torch__.os"), bytes(16), 0, r"not a readable CLIP"),
        (tensor_pickle((1,), module="builtins"), bytes(16), 0, r"not a readable CLIP: .*it has a$"),
        (tensor_pickle((1,), module="torch._utils"), bytes(16), 0, r"not a readable CLIP: .*it has a$"),
        (tensor_pickle((1,)), bytes(15), 0, r"storage 0 has 15 bytes, not 16"),
        (tensor_pickle((1,), key="7"), bytes(16), 0, r"damaged"),
        (tensor_pickle((9,)), bytes(16), 0, r"a claims more values than the file has"),
        (tensor_pickle((3,), length=4), bytes(16), 0, r"a claims more values"),  # strides of 3 go out of bounds
        (tensor_pickle((1,)), bytes(16), zipfile.ZIP_DEFLATED, r"data\.pkl is compressed"),
        (b"\x80\x02K\x01Q.", bytes(16), 0, r"no tensors in it"),
    ],
)
def test_bad_archives(data: bytes, storage: bytes, compression: int, message: str, tmp_path: Path) -> None:
    archive(tmp_path / "ViT.pt", data, {"0": storage}, compression)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(tmp_path / "ViT.pt")
    assert "\n" not in str(error.value)


# --- Hugging Face folders


@pytest.fixture(scope="module")
def hugging_face(others: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that `transformers` wrote, and its model. Heads are 32 wide."""
    package = others("transformers")
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = text | {"image_size": 32, "patch_size": 16, "num_hidden_layers": 3, "hidden_act": "gelu"}
    torch.manual_seed(0)
    config = package.CLIPConfig(text_config=text | {"hidden_act": "gelu"}, vision_config=vision, projection_dim=24)
    model = package.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "sharded", max_shard_size="1MB")
    return folder, model


@pytest.mark.parametrize("kind", ["whole", "sharded", "bin"])
def test_a_hugging_face_folder(kind: str, hugging_face: tuple[Path, Any], tmp_path: Path) -> None:
    folder, theirs = hugging_face
    if kind == "bin":
        shutil.copy(folder / "whole" / "config.json", tmp_path)
        old = {"text_model.embeddings.position_ids": torch.arange(77)}  # a buffer of older versions
        torch.save(theirs.state_dict() | old, tmp_path / "pytorch_model.bin")
    model, tokenizer, _ = load_checkpoint(tmp_path if kind == "bin" else folder / kind)
    assert (model.config.text.head_dim, model.config.vision.image_size, model.config.activation) == (32, 32, "gelu")
    assert tokenizer.merges == clip_tokenizer().merges
    pixels, tokens = random_inputs(model.config, torch.float32)
    with torch.no_grad():
        result = theirs(input_ids=tokens, pixel_values=pixels)
        torch.testing.assert_close(model.encode_image(pixels, normalize=True), result.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_text(tokens, normalize=True), result.text_embeds, atol=1e-5, rtol=0)


def tower(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["text_config"].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(model_type="siglip"), r"a model of type 'siglip', only 'clip'"),
        (tower(hidden_act="quick_gelu"), r"hidden_act differ, gelu and quick_gelu"),
        (tower(layer_norm_eps=1e-6), r"text_config\.layer_norm_eps is 1e-06, only 1e-05"),
        (tower(num_attention_heads=3), r"3 heads do not divide 64"),
        (tower(num_attention_heads="2"), r"num_attention_heads is '2', not a positive whole number"),
        (tower(vocab_size="49408"), r"text_config\.vocab_size is '49408', not a positive whole number"),
        (tower(vocab_size=None), r"text_config\.vocab_size is None, not a positive whole number"),
        (tower(num_hidden_layers=5), r"the text tower has 2 blocks, its config says 5"),
        (tower(eos_token_id=7), r"eos_token_id is 7, not the highest token id"),
        (lambda c: c.update(text_config=[1]), r"text_config should be an object"),
        (lambda c: c["vision_config"].update(image_size=64), r"visual\.positional_embedding is \(5, 64\), not \(17, "),
        (lambda c: [c[k].update(hidden_act="relu") for k in ("text_config", "vision_config")], r"'relu' is not one of"),
    ],
)
def test_a_hugging_face_config_that_does_not_fit(
    edit: Callable[[dict[str, Any]], None], message: str, hugging_face: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(hugging_face[0] / "whole", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    edit(config)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "hf")


def test_a_missing_projection_is_named(hugging_face: tuple[Path, Any], tmp_path: Path) -> None:
    folder, theirs = hugging_face
    key = "vision_model.encoder.layers.1.self_attn.k_proj.bias"
    shutil.copy(folder / "whole" / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"no model\.safetensors or pytorch_model\.bin"):
        load_checkpoint(tmp_path)
    torch.save({k: v for k, v in theirs.state_dict().items() if k != key}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"{key} is missing"):
        load_checkpoint(tmp_path)


def test_shards_stay_in_their_folder(hugging_face: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copy(hugging_face[0] / "whole" / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(ValueError, match=r"weight_map should name files of this folder"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer.json", {"model": {"type": "WordPiece", "vocab": {"[CLS]": 0}}}, r"not a tokenizer of CLIP's kind"),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}, "merges": []}}, r"not in the order of CLIP's tokenizer"),
        ("tokenizer.json", {"model": {"vocab": {}, "merges": ["a b c"]}}, r"tokenizer\.json: "),
        ("preprocessor_config.json", {"size": {"shortest_edge": 40}}, r"size is .*only {'shortest_edge': 32}"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 32}}, r"size is .*only {'shortest_edge': 32}"),
        ("preprocessor_config.json", {"do_resize": False}, r"do_resize is False, only True"),
        ("preprocessor_config.json", {"do_center_crop": False}, r"do_center_crop is False, only True"),
        ("preprocessor_config.json", {"do_rescale": False}, r"do_rescale is False, only True"),
        ("preprocessor_config.json", {"do_normalize": False}, r"do_normalize is False, only True"),
        ("preprocessor_config.json", {"image_std": [0.5, 0, 0.5]}, r"std \[0.5, 0, 0.5\] should be .* above 0"),
        ("processor_config.json", {"image_processor": [1]}, r"image_processor should be an object"),
        ("preprocessor_config.json", {"image_mean": [1, 2]}, r"mean \[1, 2\] .* should be three numbers"),
        ("preprocessor_config.json", [], r"a JSON list, not an object"),
    ],
)
def test_other_tokenizers_and_transforms(
    name: str, data: Any, message: str, hugging_face: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(hugging_face[0] / "whole", tmp_path / "hf")
    (tmp_path / "hf" / name).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "hf")


def test_mean_and_std_are_read(hugging_face: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(hugging_face[0] / "whole", tmp_path / "hf")
    data = {"image_processor": {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "crop_size": 32}}
    (tmp_path / "hf" / "processor_config.json").write_text(json.dumps(data))
    preprocess = load_checkpoint(tmp_path / "hf")[2]
    assert (preprocess.mean, preprocess.std, preprocess.image_size) == ((0.5,) * 3, (0.25,) * 3, 32)


# --- OpenCLIP's folders


@pytest.fixture(scope="module")
def open_clip_folder(others: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that OpenCLIP's `push_to_hf_hub` wrote."""
    folder = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(0)
    torch.save(open_clip_model(others("open_clip.model"), False).state_dict(), folder / "open_clip_pytorch_model.bin")
    vision = {"image_size": 32, "layers": 2, "width": 128, "head_width": 32, "patch_size": 16, "pool_type": "tok"}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3}
    model = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    data = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(data))
    return folder


def test_an_open_clip_folder(open_clip_folder: Path) -> None:
    for path in (open_clip_folder, open_clip_folder / "open_clip_pytorch_model.bin"):
        model, _, preprocess = load_checkpoint(path)
        assert (model.config.activation, model.config.vision.head_dim, preprocess.std) == (
            "quick_gelu",
            32,
            (0.25,) * 3,
        )
        assert model.config.vision.heads == (4, 4)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("vision_cfg", {"timm_model_name": "vit"}, r"vision_cfg\.timm_model_name is 'vit', which cannot be read"),
        ("text_cfg", {"hf_model_name": "bert"}, r"text_cfg\.hf_model_name is 'bert'"),
        ("vision_cfg", {"pool_type": "avg"}, r"vision_cfg\.pool_type is 'avg'"),
        ("vision_cfg", {"layers": 3}, r"the image tower has 2 blocks, its config says 3"),
        ("text_cfg", {"heads": 0}, r"heads is 0, not a positive whole number"),
    ],
)
def test_an_open_clip_config_that_does_not_fit(
    section: str, values: dict[str, Any], message: str, open_clip_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(open_clip_folder, tmp_path / "open")
    path = tmp_path / "open" / "open_clip_config.json"
    data = json.loads(path.read_text())
    data["model_cfg"][section].update(values)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "open")


def test_an_open_clip_folder_without_weights(open_clip_folder: Path, tmp_path: Path) -> None:
    shutil.copy(open_clip_folder / "open_clip_config.json", tmp_path)
    with pytest.raises(ValueError, match=r"no open_clip_model\.safetensors or "):
        load_checkpoint(tmp_path)


def test_a_short_context_gets_a_short_tokenizer(state: State, tmp_path: Path) -> None:
    state["positional_embedding"] = state["positional_embedding"][:16].clone()
    torch.save(state, tmp_path / "weights.pt")
    clip = tinyclip.load(tmp_path / "weights.pt")
    assert clip.tokenizer("a dog").shape == (1, 16)
