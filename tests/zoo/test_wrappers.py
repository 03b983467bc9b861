"""Other projects' training files: which of their values are the CLIP, whatever is wrapped around it."""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tinyclip
from tests.helpers.commands import tinyclip as command
from tests.helpers.models import random_model
from tinyclip.__main__ import main
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import vit_clip
from tinyclip.model.model import CLIP
from tinyclip.zoo.checkpoint import load_checkpoint, read_config
from tinyclip.zoo.convert import save_hugging_face, save_open_clip

State = dict[str, Any]
CONFIG = vit_clip(24, (2, 64), (2, 64), 16, image_size=32)


@pytest.fixture(scope="module")
def model() -> CLIP:
    return random_model(CONFIG, dtype=torch.float32)


@pytest.fixture
def state(model: CLIP) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: CLIP, b: CLIP) -> bool:
    return a.config == b.config and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def load(data: Any, folder: Path) -> tuple[CLIP, list[str]]:
    """Return a file's model, and the warnings about it."""
    torch.save(data, folder / "weights.pt")
    return read(folder / "weights.pt")


def read(path: Path) -> tuple[CLIP, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = load_checkpoint(path, "gelu", **(LOOKS if path.is_file() else {}))[0]
    return model, [str(warning.message) for warning in said]


LOOKS: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3}


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def other(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


def optimiser(state: State) -> dict[str, Any]:
    moments = {i: {"step": 3, "exp_avg": v, "exp_avg_sq": v} for i, v in enumerate(state.values())}
    return {"state": moments, "param_groups": [{"lr": np.float64(3e-4), "params": list(moments)}]}


WRAPPERS = ["state_dict", "model", "model_state_dict", "module", "model_ema", "ema", "state_dict_ema", "student"]
WRAPPERS += ["ema_state_dict", "net", "anything.else", "teacher"]


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper(name: str, model: CLIP, state: State, tmp_path: Path) -> None:
    read, said = load({"epoch": 3, name: state, "optimizer": optimiser(state)}, tmp_path)
    assert same(read, model) and said == []


NESTED = {
    "two": lambda s: {"model": {"state_dict": s}},
    "three with a prefix": lambda s: {"ema": {"shadow": {"module": prefixed("module.", s)}}},
    "in a list": lambda s: {"models": [s]},
    "ordered": lambda s: {"state_dict": OrderedDict(s)},
    "by name of the optimiser": lambda s: {"model": s, "optim": {"exp_avg": other(s)}},
    "twice": lambda s: {"model": s, "state_dict": s},
    "copies": lambda s: {"model": s, "module": {k: v.clone() for k, v in s.items()}},
    "towers apart": lambda s: {
        "image": {k: v for k, v in s.items() if k.startswith("visual.")},
        "text": {k: v for k, v in s.items() if not k.startswith("visual.")},
    },
}


@pytest.mark.parametrize("name", NESTED)
def test_wrappers_in_wrappers(name: str, model: CLIP, state: State, tmp_path: Path) -> None:
    read, said = load(NESTED[name](state), tmp_path)
    assert same(read, model) and said == []


PREFIXES = ["module.", "_orig_mod.", "model.", "clip.", "clip_model.", "net.", "_fsdp_wrapped_module."]
PREFIXES += ["module.module.", "_orig_mod.module.model.clip.", "a_b.c.0.", "text.", "visual_encoder.", "student."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_prefix(prefix: str, suffix: str, model: CLIP, state: State, tmp_path: Path) -> None:
    if suffix == "pt":
        found, said = load(prefixed(prefix, state), tmp_path)
    else:
        save_file(prefixed(prefix, state), tmp_path / "weights.safetensors")
        found, said = read(tmp_path / "weights.safetensors")
    assert same(found, model) and said == []


MIDDLES = {
    "FSDP": lambda k: k.replace("visual.", "visual._fsdp_wrapped_module.").replace(".0.", ".0._fsdp_wrapped_module."),
    "compiled towers": lambda k: k.replace("transformer.", "transformer._orig_mod."),
    "checkpointed blocks": lambda k: k.replace(".1.", ".1._checkpoint_wrapped_module."),
    "DataParallel of a tower": lambda k: k.replace("visual.", "module.visual.module."),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_wrappers_in_the_middle_of_keys(name: str, model: CLIP, state: State, tmp_path: Path) -> None:
    found, said = load({"state_dict": {MIDDLES[name](k): v for k, v in state.items()}}, tmp_path)
    assert same(found, model) and said == []


# --- several models


def test_of_a_student_and_a_teacher_the_student(model: CLIP, state: State, tmp_path: Path) -> None:
    for data in (
        prefixed("teacher.", other(state)) | prefixed("student.", state),
        {"teacher": other(state), "student": state},
        {"state_dict": prefixed("model.", state) | prefixed("teacher.", other(state))},
    ):
        found, said = load(data, tmp_path)
        assert same(found, model)
        assert len(said) == 1
        assert "teacher (the trained model, not its teacher)" in said[0] and "left out" not in said[0]


def test_of_weights_and_their_average_the_weights(model: CLIP, state: State, tmp_path: Path) -> None:
    for name in ("state_dict_ema", "model_ema", "ema", "ema_state_dict"):
        found, said = load({name: other(state), "model": state}, tmp_path)
        assert same(found, model)
        assert len(said) == 1 and f"reading model, not {name} (the weights themselves" in said[0]


def test_two_clips_are_refused_by_name(state: State, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"several CLIPs with different weights, a, net\.b; save only the one"):
        load(prefixed("a.", state) | prefixed("net.b.", other(state)), tmp_path)


def test_a_larger_training_module(model: CLIP, state: State, tmp_path: Path) -> None:
    without = {k: v for k, v in state.items() if k != "logit_scale"}
    rest = {"loss.weight": torch.ones(2), "head.bias": torch.ones(1)}
    found, said = load({"state_dict": prefixed("clip.", state) | rest, "callbacks": {}}, tmp_path)
    assert same(found, model)
    assert len(said) == 1 and said[0].endswith("ignored, since it is not part of the CLIP: loss.weight, head.bias")
    found, said = load(prefixed("clip.", without) | {"loss.logit_scale": state["logit_scale"]} | rest, tmp_path)
    assert same(found, model)
    assert len(said) == 1 and "the logit scale is loss.logit_scale" in said[0]


# --- keys without weights


EXTRA: dict[str, Any] = {
    "logit_bias": torch.tensor(-10.0),
    "attn_mask": torch.zeros(77, 77),
    "visual.attn_mask": torch.zeros(77, 77),
    "text.attn_mask": torch.zeros(77, 77),
    "transformer.position_ids": torch.arange(77),
    "positional_embedding_res": torch.zeros(77, 64),
    "num_batches_tracked": torch.tensor(3),
    "visual.some_table": torch.arange(9),
    "n_averaged": torch.tensor(4),
    "pixel_mean": torch.ones(3),
    "epoch": 7,
    "note": "text",
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("key", EXTRA)
def test_what_carries_no_weights_is_named_and_left_out(
    key: str, prefix: str, model: CLIP, state: State, tmp_path: Path
) -> None:
    found, said = load(prefixed(prefix, state | {key: EXTRA[key]}), tmp_path)
    assert same(found, model)
    assert len(said) == 1 and said[0].endswith(f"ignored, since it is not part of the CLIP: {prefix}{key}")


def test_many_are_one_warning(model: CLIP, state: State, tmp_path: Path) -> None:
    found, said = load(state | EXTRA | {"one more": 1}, tmp_path)
    assert same(found, model)
    assert len(said) == 1 and f"of the CLIP: {', '.join(EXTRA)} and 1 more" in said[0]


UNKNOWN: dict[str, Tensor] = {
    "visual.ls_1.gamma": torch.ones(64),
    "visual.transformer.resblocks.0.ls_1.gamma": torch.ones(64),
    "transformer.resblocks.0.attn.lora_A": torch.ones(2, 64),
    "text_projection.bias": torch.ones(24),
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_what_would_change_the_features_is_refused(key: str, state: State, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"is not a complete CLIP: unexpected {key}"):
        load(prefixed("module.", state | {key: UNKNOWN[key]}), tmp_path)


# --- the weights


class Quantised:
    pass


def test_a_weight_of_an_unknown_class_is_refused(state: State, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"visual\.proj: refused, it asks for {__name__}\.Quantised; only") as error:
        load({"state_dict": state | {"visual.proj": Quantised()}}, tmp_path)
    assert "\n" not in str(error.value)


def both(state: State, a: Callable[[Tensor], Tensor], b: Callable[[Tensor], Tensor]) -> State:
    return prefixed("_image_encoder.", {k: a(v) for k, v in state.items()}) | prefixed(
        "image_encoder_without_ddp.", {k: b(v) for k, v in state.items()}
    )


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_of_two_copies_the_wider(narrow: torch.dtype, model: CLIP, state: State, tmp_path: Path) -> None:
    for order in (both(state, Tensor.clone, lambda v: v.to(narrow)), both(state, lambda v: v.to(narrow), Tensor.clone)):
        assert same(load(order, tmp_path)[0], model)
    with pytest.raises(ValueError, match=r"appears twice with different values, .* as image_encoder_with"):
        load(both(state, Tensor.clone, lambda v: (v + 0.1).to(narrow)), tmp_path)


# --- what a bare file does not state


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {},
            r"that the activation is gelu \(activation\) and that pictures are .* OpenAI's mean and std \(mean, std\)",
        ),
        (
            {"activation": "quick_gelu"},
            r"weights\.pt does not state it, so assuming that pictures are normalised by",
        ),
        (LOOKS, r"so assuming that the activation is gelu \(activation\); override with these options"),
    ],
)
def test_what_is_assumed_is_said(said: dict[str, Any], message: str, state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match=message) as warned:
        load_checkpoint(tmp_path / "weights.pt", **said)
    assert len(warned) == 1 and "\n" not in str(warned[0].message)


def test_what_the_user_says_of_a_bare_file(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = tinyclip.load(tmp_path / "weights.pt", activation="quick_gelu", **LOOKS)
    assert clip.config.activation == "quick_gelu"
    assert (clip.preprocessing.mean, clip.preprocessing.std) == ((0.5,) * 3, (0.25,) * 3)
    clip.save(tmp_path / "ours")
    assert tinyclip.load(tmp_path / "ours", **LOOKS).preprocessing == clip.preprocessing
    with pytest.raises(ValueError, match=r"preprocess\.json says mean \(0\.5, .*, so they cannot be changed"):
        tinyclip.load(tmp_path / "ours", mean=[0.1] * 3, std=[0.25] * 3)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mean": [0.5] * 3}, r"give mean and std together"),
        ({"mean": [0.5] * 2, "std": [1] * 3}, r"mean \[0\.5, 0\.5\] and std .* should be three numbers each"),
        ({"mean": [0.5] * 3, "std": [0.5, 0, 0.5]}, r"std above 0"),
    ],
)
def test_mean_and_std_that_are_none(said: dict[str, Any], message: str, state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "weights.pt", "gelu", **said)


def test_openais_files_say_it(state: State, tmp_path: Path) -> None:
    sizes = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    torch.save(state | {key: torch.tensor(value) for key, value in sizes.items()}, tmp_path / "weights.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = tinyclip.load(tmp_path / "weights.pt")
    assert clip.tokenizer.special == ("<|startoftext|>", "<|endoftext|>")


def test_the_command_line_says_it_on_a_line(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, wanted = tmp_path / "weights.pt", tmp_path / "ours"
    torch.save(state | {"logit_bias": torch.ones(())}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        looks = ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
        monkeypatch.setattr("sys.argv", ["tinyclip", "convert", str(path), str(wanted), *looks])
        with pytest.raises(SystemExit, match="0"):
            main()
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert said == [
        f"warning: {path}: ignored, since it is not part of the CLIP: logit_bias",
        f"warning: {path} does not state it, so assuming that the activation is gelu (activation); "
        "override with these options of load, convert and export",
    ]
    assert tinyclip.load(wanted).preprocessing.std == (0.25,) * 3
    assert "--mean 0.5,x: give three numbers" in command("convert", path, tmp_path / "a", "--mean", "0.5,x", code=2)


def test_a_config_of_open_clip_beside_a_file_says_it(model: CLIP, state: State, tmp_path: Path) -> None:
    save_open_clip(tmp_path, model, clip_tokenizer(), Preprocess(image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3))
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save({"state_dict": prefixed("module.", state), "epoch": 3}, tmp_path / "epoch_3.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read, _, preprocess = load_checkpoint(tmp_path / "epoch_3.pt")
    assert (read.config.activation, preprocess.mean) == ("quick_gelu", (0.5,) * 3)


def test_a_whole_pickled_model(model: CLIP, tmp_path: Path) -> None:
    for data in (model, {"model": model, "epoch": 3}, {"ema": {"module": torch.nn.DataParallel(model)}}):
        found, said = load(data, tmp_path)
        assert same(found, model) and said == []


def test_of_equal_models_the_wider(model: CLIP, state: State, tmp_path: Path) -> None:
    half = {key: value.half() for key, value in state.items()}
    assert same(load({"model": half, "master": state}, tmp_path)[0], model)


def test_names_out_of_a_file_are_one_line(state: State, tmp_path: Path) -> None:
    _, said = load(state | {"a\x1b[2J\nb": torch.ones(1)}, tmp_path)
    assert len(said) == 1 and said[0].endswith("of the CLIP: a?[2J?b")


# --- Hugging Face


def hugging_face(folder: Path, model: CLIP, prefix: str, extra: State) -> Path:
    save_hugging_face(folder, model, clip_tokenizer(), Preprocess(image_size=32))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": prefixed(prefix, state | extra), "lr": np.float64(1)}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("prefix", ["", "module.", "clip.", "_orig_mod.module.model."])
def test_prefixes_in_a_hugging_face_folder(prefix: str, model: CLIP, tmp_path: Path) -> None:
    found, said = read(hugging_face(tmp_path, model, prefix, {"vision_model.embeddings.position_ids": torch.arange(5)}))
    assert same(found, model) and said == []


def test_what_carries_no_weights_in_a_hugging_face_folder(model: CLIP, tmp_path: Path) -> None:
    found, said = read(hugging_face(tmp_path, model, "clip.", {"logit_bias": torch.ones(1)}))
    assert same(found, model) and len(said) == 1 and said[0].endswith("of the CLIP: clip.logit_bias")


def test_shards_with_a_prefix(model: CLIP, tmp_path: Path) -> None:
    save_hugging_face(tmp_path, model, clip_tokenizer(), Preprocess(image_size=32))
    state = prefixed("clip.", load_file(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    names = list(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / name)
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(read(tmp_path)[0], model)


@pytest.mark.parametrize("where", ["0_CLIPModel", "", "0_Transformer"])
def test_a_folder_of_sentence_transformers(where: str, model: CLIP, tmp_path: Path) -> None:
    (tmp_path / where).mkdir(exist_ok=True)
    hugging_face(tmp_path / where, model, "", {})
    kind = "sentence_transformers.models.CLIPModel"
    modules = [{"idx": 0, "name": "0", "path": where, "type": kind}]
    modules += [{"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert same(read(tmp_path)[0], model)
    assert read_config(tmp_path) == model.config


@pytest.mark.parametrize(
    "modules", ["[]", '[{"path": "../x"}]', '[{"path": "gone"}]', "{", '[{"path": 3}]', "[" * 10**5]
)
def test_a_folder_of_sentence_transformers_without_a_clip(modules: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(modules)
    with pytest.raises(ValueError, match=r"modules\.json") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
