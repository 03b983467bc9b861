"""OpenCLIP and `transformers` teachers: compared with the libraries themselves, in runs and caches; errors."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from tests.helpers.models import small_config
from tests.helpers.processes import assert_same
from tests.helpers.runs import run, stage
from tests.helpers.shards import WORDS, good, write_shard
from tests.teachers.test_cache import stopped_and_resumed, stored
from tinyclip.cli.main import main
from tinyclip.compress.size import sparsity
from tinyclip.data.samples import captions_of, image_of
from tinyclip.data.shards import read_shards
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.augment import View
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.loss import affinity_loss
from tinyclip.model.model import CLIP
from tinyclip.recipe.recipe import Recipe
from tinyclip.teachers import foreign as foreign_teacher
from tinyclip.teachers.cache import Cache
from tinyclip.teachers.foreign import _open_clip_name, is_foreign, load_teacher, local_part, short_name
from tinyclip.teachers.teacher import ForeignTeacher
from tinyclip.train.plan import plan
from tinyclip.train.setup import start
from tinyclip.train.smoke import smoke
from tinyclip.zoo.checkpoint import load_checkpoint, save_checkpoint
from tinyclip.zoo.openai import from_open_clip

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = ["caption Words", "a photo of a red apple", "dogs", ""]
LIKE = small_config(vocab_size=49408, image_size=16).model_dump(mode="json")


def word_tokenizer(package: ModuleType, pad: str, length: int) -> Any:
    """Return a lower-case whole-word tokenizer that ends texts with </s>."""
    words = sorted({"a", "photo", "of", "red", "apple", "two", "dogs", "caption", "words", "3", "4", "ripe", *WORDS})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": pad, "eos_token": "</s>", "unk_token": "<unk>"}
    return package.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, model_max_length=length)


def shaken(network: Any) -> Any:
    """Return the model with no parameter at its initial 0 or 1."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.startswith("logit_"):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return network.eval()


def saved(folder: Path, network: Any, tokenizer: Any, size: int, mean: float) -> Path:
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    looks = {"image_mean": [mean] * 3, "image_std": [0.5] * 3, "size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(looks))
    return folder


@pytest.fixture(scope="module")
def transformers(others: Callable[[str], ModuleType]) -> ModuleType:
    package = others("transformers")
    package.logging.disable_progress_bar()
    package.logging.set_verbosity_error()  # its configs' default token ids exceed vocabularies this small
    return package


@pytest.fixture(scope="module")
def open_clip(others: Callable[[str], ModuleType]) -> ModuleType:
    return others("open_clip")


@pytest.fixture(scope="module")
def siglip(transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP folder for 24 px pictures and texts of 10 tokens."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(transformers, "<pad>", 10)
    vision = TOWER | {"image_size": 24, "patch_size": 8}
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 10}
    network = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))
    network.logit_scale.data.fill_(math.log(117))
    network.logit_bias.data.fill_(-12.9)
    return saved(tmp_path_factory.mktemp("siglip") / "siglip", shaken(network), tokenizer, 24, 0.5)


@pytest.fixture(scope="module")
def clip_folder(transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `CLIPModel` folder that our loader cannot read, because its norms have another epsilon. The end token is used
    for padding, as in OpenAI's models."""
    torch.manual_seed(1)
    tokenizer = word_tokenizer(transformers, "</s>", 10)
    ids = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 1}
    text = TOWER | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 10, "layer_norm_eps": 1e-4}
    vision = TOWER | {"image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    network = shaken(transformers.CLIPModel(config))
    return saved(tmp_path_factory.mktemp("clip") / "clip", network, tokenizer, 32, 0.4)


def open_clip_folder(folder: Path, package: ModuleType, vision: dict[str, Any], **model: Any) -> Path:
    """Write a folder with random weights in OpenCLIP's format."""
    torch.manual_seed(2)
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 48, "vision_cfg": vision, "text_cfg": text} | model
    kind = package.model.CustomTextCLIP if config.pop("custom_text", False) else package.model.CLIP
    network = shaken(kind(**config))
    folder.mkdir()
    config["custom_text"] = kind is package.model.CustomTextCLIP
    looks = {"mean": [0.5] * 3, "std": [0.3] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": looks}))
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
CONVNEXT = {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear"}


@pytest.fixture(scope="module")
def convnext(open_clip: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip") / "convnext"
    return open_clip_folder(folder, open_clip, CONVNEXT, custom_text=True, init_logit_bias=-10)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data` (40 pairs) and `small`, an initial CLIP with its own vocabulary, for 16 px pictures."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "data").mkdir()
    write_shard(folder / "data" / "0.tar", [good(i % 30) | {"key": f"{i:05d}"} for i in range(40)])
    torch.manual_seed(3)
    tokenizer = clip_tokenizer()
    tokenizer = tokenizer.pruned(tokenizer.kept_ids(["caption words"]))
    model = CLIP(small_config(vocab_size=tokenizer.vocab_size, image_size=16))
    save_checkpoint(folder / "small", model, tokenizer, Preprocess(image_size=16, std=(0.2, 0.2, 0.2)))
    return folder


def recipe(place: Path, teacher: Any, output: Path, **changes: Any) -> Recipe:
    data: dict[str, Any] = {"teacher": teacher, "data": str(place / "data"), "output": str(output), "workers": 0}
    data |= {"device": "cpu", "precision": "float32", "log_every": 1, "save_every": 2}
    return Recipe.model_validate(data | {"stages": [stage(start=str(place / "small"))]} | changes)


def foreign(name: str) -> ForeignTeacher:
    teacher = load_teacher(name)
    assert isinstance(teacher, ForeignTeacher)
    return teacher


def views(size: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, (4, 3, size, size), np.uint8))


def normal(pixels: Tensor, mean: float, std: float) -> Tensor:
    return (pixels.double() / 255 - mean).div(std).float()


def padded_ids(tokenizer: Any) -> Tensor:
    return torch.tensor(tokenizer(TEXTS, padding="max_length", max_length=10, truncation=True)["input_ids"])


# --- transformers -----------------------------------------------------------------------------------------------


def test_a_siglip_says_what_transformers_says(siglip: Path, transformers: ModuleType) -> None:
    """Features, and the affinity: the softmax of its own logits, including the bias."""
    teacher = foreign(f"transformers:{siglip}")
    assert (teacher.kind, teacher.embed_dim, teacher.preprocess.image_size) == ("a SigLIP", 32, 24)
    assert teacher.scale.item() == pytest.approx(117, rel=1e-6)
    theirs = transformers.AutoModel.from_pretrained(siglip).eval()
    ids = padded_ids(transformers.AutoTokenizer.from_pretrained(siglip))
    with torch.no_grad():
        result = theirs(input_ids=ids, pixel_values=normal(views(24), 0.5, 0.5))
    image, text = teacher.image_features(views(24)), teacher.text_features(torch.from_numpy(teacher.tokenize(TEXTS)))
    torch.testing.assert_close(image, result.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text, result.text_embeds, atol=1e-5, rtol=0)
    mine = (teacher.scale * image @ text.T).softmax(1)
    torch.testing.assert_close(mine, result.logits_per_image.softmax(1), atol=1e-3, rtol=1e-3)
    assert result.logits_per_image.max() < 117 - 12.9 + 1e-3  # theirs includes the bias


def test_a_larger_view_is_resized_to_the_teachers_resolution(siglip: Path) -> None:
    """Bicubic with antialiasing, compared with Pillow's, which rounds its result to whole levels."""
    teacher, smooth = foreign(f"transformers:{siglip}"), torch.linspace(0, 255, 48).to(torch.uint8)
    view = (smooth[:, None] // 2 + smooth[None, :] // 2).expand(1, 3, 48, 48)
    small = Image.fromarray(view[0].permute(1, 2, 0).numpy()).resize((24, 24), Image.Resampling.BICUBIC)
    resized = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None]
    torch.testing.assert_close(teacher.image_features(view), teacher.image_features(resized), atol=5e-3, rtol=0)
    assert (teacher.image_features(view) - teacher.image_features(view.flip(2))).abs().max() > 0.02


def test_padding_is_masked_where_a_text_tower_wants_it(clip_folder: Path, transformers: ModuleType) -> None:
    """Compare with texts without padding, one by one."""
    teacher = foreign(f"transformers:{clip_folder}")
    assert "layer_norm_eps" in teacher.kind and teacher.embed_dim == 20
    theirs = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    pixels = normal(views(32), 0.4, 0.5)
    with torch.no_grad():
        one_by_one = torch.cat([theirs(input_ids=i, pixel_values=pixels[:1]).text_embeds for i in ids])
        images = theirs(input_ids=ids[0], pixel_values=pixels).image_embeds
    tokens = torch.from_numpy(teacher.tokenize(TEXTS))
    assert tokens.shape == (4, 10) and (tokens[0] == -1).any()
    torch.testing.assert_close(teacher.text_features(tokens), one_by_one, atol=1e-5, rtol=0)
    torch.testing.assert_close(teacher.image_features(views(32)), images, atol=1e-5, rtol=0)


def test_a_clip_that_our_loader_reads_becomes_ours(transformers: ModuleType, tmp_path: Path) -> None:
    """So that students can inherit from it; `transformers` is not used."""
    text = TOWER | {"hidden_act": "gelu"}
    config = transformers.CLIPConfig(text_config=text, vision_config=text | {"image_size": 32, "patch_size": 16})
    network = shaken(transformers.CLIPModel(config))
    network.save_pretrained(tmp_path / "clip")
    teacher = load_teacher(f"transformers:{tmp_path / 'clip'}")
    assert isinstance(teacher, Pipeline)
    tokens = teacher.tokenize(TEXTS)
    with torch.no_grad():
        theirs = network(input_ids=tokens, pixel_values=torch.zeros(1, 3, 32, 32)).text_embeds
    torch.testing.assert_close(teacher.encode_text(TEXTS), theirs, atol=1e-5, rtol=0)


# --- OpenCLIP ---------------------------------------------------------------------------------------------------


def test_a_convnext_says_what_open_clip_says(convnext: Path, open_clip: ModuleType) -> None:
    """With OpenCLIP's own transform and tokenizer."""
    teacher = foreign(f"open_clip:{convnext}")
    assert (teacher.kind, teacher.embed_dim, teacher.preprocess.image_size) == ("a SigLIP", 48, 64)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{convnext}")
    theirs.eval()
    pixels = views(64)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    with torch.no_grad():
        image = theirs.encode_image(torch.stack([transform(p) for p in pictures]), normalize=True)
        text = theirs.encode_text(open_clip.get_tokenizer(f"local-dir:{convnext}")(TEXTS), normalize=True)
    torch.testing.assert_close(teacher.image_features(pixels), image, atol=1e-5, rtol=0)
    tokens = torch.from_numpy(teacher.tokenize(TEXTS))
    torch.testing.assert_close(teacher.text_features(tokens), text, atol=1e-5, rtol=0)
    assert teacher.scale.item() == pytest.approx(theirs.logit_scale.exp().item())


@pytest.mark.parametrize("more", [{}, {"init_logit_bias": -10}, {"quick_gelu": True}])
def test_an_open_clip_of_our_shape_becomes_ours(more: dict[str, Any], open_clip: ModuleType, tmp_path: Path) -> None:
    """Even if it was trained with a sigmoid: the student does not need the bias."""
    folder = open_clip_folder(tmp_path / "vit", open_clip, VIT, **more)
    teacher = load_teacher(f"open_clip:{folder}")
    assert isinstance(teacher, Pipeline)
    assert teacher.model.config.activation == ("quick_gelu" if "quick_gelu" in more else "gelu")
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        text = theirs.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS), normalize=True)
    torch.testing.assert_close(teacher.encode_text(TEXTS), text, atol=1e-5, rtol=0)
    assert teacher.preprocessing.std == (0.3, 0.3, 0.3)


def test_an_open_clip_that_computes_otherwise_does_not(open_clip: ModuleType, tmp_path: Path) -> None:
    """A text tower without a causal mask has the same tensors."""
    folder = open_clip_folder(tmp_path / "vit", open_clip, VIT)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["no_causal_mask"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert "no_causal_mask" in foreign(f"open_clip:{folder}").kind


@pytest.mark.parametrize("what", ["its tokenizer differs", "it computes differently"])
def test_both_must_say_the_same(
    what: str, open_clip: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tokenizer keeps capitals; one activation is misread by our reader."""
    folder = open_clip_folder(tmp_path / "vit", open_clip, VIT)
    if "tokenizer" in what:
        capitals = open_clip.SimpleTokenizer(context_length=16, clean="whitespace")
        monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: capitals)
    else:
        monkeypatch.setattr(foreign_teacher, "from_open_clip", partial(with_quick_gelu, from_open_clip))
    assert what in foreign(f"open_clip:{folder}").kind


def with_quick_gelu(read: Any, data: dict[str, Any], *arguments: Any) -> Any:
    return read({**data, "model_cfg": data["model_cfg"] | {"quick_gelu": True}}, *arguments)


def test_a_name_with_a_file_of_weights(open_clip: ModuleType, tmp_path: Path) -> None:
    """For a model that OpenCLIP knows; the name decides on QuickGELU."""
    folder = open_clip_folder(tmp_path / "vit", open_clip, VIT, quick_gelu=True)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "Tiny-1.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "Tiny-1.json")
    torch.save({"state_dict": load_file(folder / "open_clip_model.safetensors")}, tmp_path / "weights.pt")
    teacher = load_teacher(f"open_clip:Tiny-1@{tmp_path / 'weights.pt'}")
    assert isinstance(teacher, Pipeline) and teacher.model.config.activation == "quick_gelu"
    torch.save({"state_dict": {"logit_scale": torch.ones(())}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt: OpenCLIP cannot make it \(Error\(s\) in loading"):
        load_teacher(f"open_clip:Tiny-1@{tmp_path / 'weights.pt'}")


def test_a_tags_activation_is_its_own(open_clip: ModuleType) -> None:
    """OpenCLIP only warns about OpenAI's weights in a GELU model."""
    assert _open_clip_name("open_clip:ViT-B-32/openai", open_clip) == ("ViT-B-32", "openai", True)
    assert _open_clip_name("open_clip:ViT-B/32/laion2b_e16", open_clip) == ("ViT-B-32", "laion2b_e16", False)


# --- the affinity of a sigmoid ----------------------------------------------------------------------------------


def cosines(seed: int = 0, n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    return image, text


def given_one_fits(logits: Tensor) -> Tensor:
    """For independent yes/no answers with probabilities sigmoid(logits): which column matches, given that exactly one
    does. Enumerates all answers of a row."""
    rows = []
    for row in logits.sigmoid():
        chances = torch.zeros(len(row), dtype=row.dtype)
        for answers in product((0, 1), repeat=len(row)):
            if sum(answers) == 1:
                yes = torch.tensor(answers, dtype=torch.bool)
                chances[answers.index(1)] = torch.where(yes, row, 1 - row).prod()
        rows.append(chances / chances.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [-12.9, 0.0, 6.0])
def test_the_affinity_of_a_sigmoid_is_which_pair_fits_given_that_one_does(bias: float) -> None:
    """For any bias and in both directions, by enumeration."""
    (image, text), (mine, words) = cosines(), cosines(1)
    logits, ours = 11 * image @ text.T + bias, 30 * mine @ words.T
    rows = -(given_one_fits(logits) * ours.log_softmax(1)).sum(1).mean()
    columns = -(given_one_fits(logits.T) * ours.T.log_softmax(1)).sum(1).mean()
    loss = affinity_loss(mine, words, image, text, 30.0, 11.0)
    assert loss.item() == pytest.approx(((rows + columns) / 2).item(), rel=1e-9)


def test_shares_of_the_sigmoids_agree_where_small_and_level_where_sure() -> None:
    """The two limits of p_ij / sum_k p_ik, compared with the softmax, which does not change."""
    image, text = cosines()
    cosine = image @ text.T
    softmax = (11 * cosine).softmax(1)
    for bias, check in ((-30.0, softmax), (40.0, torch.full_like(softmax, 1 / 5))):
        p = (11 * cosine + bias).sigmoid()
        torch.testing.assert_close(p / p.sum(1, keepdim=True), check, atol=1e-6, rtol=0)
    assert (softmax - 1 / 5).abs().max() > 0.3


# --- runs -------------------------------------------------------------------------------------------------------


def test_a_run_with_a_siglip_resumes_exactly(place: Path, siglip: Path, tmp_path: Path) -> None:
    """The student keeps the tokenizer and normalisation of its start; terms that need the teacher's feature size get
    it."""
    loss = {"image_affinity": 0.5, "feature": 0.1, "interactive": 0.1}
    settings: dict[str, Any] = {"workers": 1, "stages": [stage(start=str(place / "small"), loss=loss)]}
    _, events = run(recipe(place, f"transformers:{siglip}", tmp_path / "whole", **settings))
    losses = [e for e in events if e["event"] == "step"]
    assert all(math.isfinite(e["loss"]) and e["interactive"] > 0 for e in losses) and len(losses) == 5
    stopped_and_resumed(recipe(place, f"transformers:{siglip}", tmp_path / "parts", **settings), 3)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    student, tokenizer, looks = load_checkpoint(tmp_path / "whole" / "student")
    assert tokenizer.merges == load_checkpoint(place / "small")[1].merges
    assert looks.std == (0.2, 0.2, 0.2) and looks.image_size == 16
    assert student.logit_scale.exp().item() == pytest.approx(117, rel=1e-5)


def test_student_and_teacher_see_the_same_pairs_each_in_its_own_way(place: Path, siglip: Path, tmp_path: Path) -> None:
    """Compute a step's affinity by hand from the batch: one view and one caption, two tokenizers, image sizes and
    norms."""
    from tinyclip.train.run import loader_of

    begun = start(recipe(place, f"transformers:{siglip}", tmp_path / "run"))
    begun.lock.release()
    batch = next(iter(loader_of(begun, 0)))
    teacher, tokenizer = begun.teacher, begun.tokenizer
    assert isinstance(teacher, ForeignTeacher) and batch.images.shape[-1] == 24
    assert batch.tokens.shape[1] == 12 and batch.teacher_tokens.shape == (8, 10)
    samples = {s["__key__"]: captions_of(s) for s in read_shards(place / "data")}
    for key, mine, theirs in zip(batch.keys, batch.tokens, batch.teacher_tokens, strict=True):
        captions = samples[key]
        which = [np.array_equal(row, mine.numpy()) for row in tokenizer(captions, 12)]
        assert which.count(True) == 1
        assert np.array_equal(teacher.tokenize(captions)[which.index(True)], theirs.numpy())


def test_masks_are_learned_beside_a_foreign_teacher(place: Path, siglip: Path, tmp_path: Path) -> None:
    """Sparsity is relative to the start of the first stage; a calibrated stage follows the learned masks."""
    auto = {"target_sparsity": 0.7, "steps": 3, "ramp_steps": 2, "lr": 0.6}
    stages = [
        stage("a", start=str(place / "small"), steps=1),
        stage("b", student={}, inherit="auto", auto=auto, steps=4),
        stage("c", student={}, inherit="calibrated", calibrated={"target_sparsity": 0.9, "batches": 2}, steps=1),
    ]
    _, events = run(recipe(place, f"transformers:{siglip}", tmp_path / "run", stages=stages))
    assert [e["stage"] for e in events if e["event"] == "cut"] == ["b", "c"]
    began = next(e["sparsity"]["both"] for e in events if e["event"] == "step" and e["stage"] == "b")
    sliced, last = (load_checkpoint(tmp_path / "run" / "stages" / s / "last")[0].config for s in "ac")
    small = load_checkpoint(place / "small")[0].config
    gone = [sparsity(config, small, {}, ("visual", "text"), "params").item() for config in (sliced, last)]
    assert began == pytest.approx(gone[0], abs=0.1) and gone[0] > 0.3
    assert gone[1] > 0.85


def test_a_student_from_random_weights(place: Path, convnext: Path, tmp_path: Path) -> None:
    """The whole shape is given, with CLIP's tokenizer."""
    random = stage(inherit="none", student={"like": LIKE}, steps=2)
    run(recipe(place, f"open_clip:{convnext}", tmp_path / "run", stages=[random]))
    student, tokenizer, _ = load_checkpoint(tmp_path / "run" / "student")
    assert student.config.model_dump(mode="json") == LIKE and tokenizer.vocab_size == 49408


def test_a_cache_has_what_the_teacher_says(place: Path, siglip: Path, tmp_path: Path) -> None:
    """The stored features are the teacher's for the stored views, and for its own tokens of every caption."""
    data, cache = str(place / "data"), tmp_path / "cache"
    views = ["--augment", "rotate=10", "--draws", "2", "--image-size", "32", "--precision", "float32"]
    main_with("cache", f"transformers:{siglip}", data, "-o", str(cache), *views, "--workers", "0")
    found, teacher = stored(cache), foreign(f"transformers:{siglip}")
    for sample in read_shards(place / "data"):
        mine, image = found[sample["__shard__"], sample["__key__"]], image_of(sample)
        pixels = np.stack([View(*row).apply(image, 32) for row in mine["views"].tolist()])
        assert np.allclose(mine["image"], teacher.image_features(torch.from_numpy(pixels)).numpy(), atol=5e-4)
        text = teacher.text_features(torch.from_numpy(teacher.tokenize(captions_of(sample))))
        assert np.allclose(mine["text"], text.numpy(), atol=5e-4)
    info = Cache.load(cache).info
    assert info.scale == pytest.approx(117) and info.foreign is not None and info.foreign.kind == "a SigLIP"


def main_with(*arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tinyclip", *arguments])
        main()
    assert stop.value.code == code


def test_a_run_over_the_cache_resumes_exactly_and_needs_no_teacher(place: Path, siglip: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    main_with("cache", f"transformers:{siglip}", str(place / "data"), "-o", str(cache), "--workers", "0")
    settings: dict[str, Any] = {"stages": [stage(start=str(place / "small"))]}
    settings["stages"][0]["loss"] = {"feature": 0.5}
    run(recipe(place, {"cache": str(cache)}, tmp_path / "whole", **settings))
    stopped_and_resumed(recipe(place, {"cache": str(cache)}, tmp_path / "parts", **settings), 3)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    random = stage(inherit="none")
    with pytest.raises(ValueError, match=r"stages.0.student: give the whole shape .* a SigLIP"):
        start(recipe(place, {"cache": str(cache)}, tmp_path / "no", stages=[random]))


def test_a_cache_notices_another_teacher(
    place: Path, siglip: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher with the same name but other weights or another tokenizer is noticed; the same teacher elsewhere is
    accepted."""
    from shutil import copytree

    data, cache, mine = str(place / "data"), tmp_path / "cache", tmp_path / "mine"
    copytree(siglip, mine)
    main_with("cache", f"transformers:{siglip}", data, "-o", str(cache), "--workers", "0")
    main_with("cache", f"transformers:{mine}", data, "-o", str(cache), "--workers", "0")
    assert "1 shard of it was there" in capsys.readouterr().out
    copytree(clip_folder, tmp_path / "moved")  # its description in words includes its path
    for folder in (clip_folder, tmp_path / "moved"):
        main_with("cache", f"transformers:{folder}", data, "-o", str(tmp_path / "other"), "--workers", "0")
    assert "1 shard of it was there" in capsys.readouterr().out
    tensors = load_file(mine / "model.safetensors")
    tensors["logit_bias"] += 1
    save_file(tensors, mine / "model.safetensors", {"format": "pt"})
    main_with("cache", f"transformers:{mine}", data, "-o", str(cache), "--workers", "0", code=2)
    assert "differs in weights;" in capsys.readouterr().err.replace("\n", " ")
    changed = json.loads((siglip / "tokenizer.json").read_text())
    vocabulary = changed["model"]["vocab"]
    vocabulary["dogs"], vocabulary["red"] = vocabulary["red"], vocabulary["dogs"]
    copytree(siglip, mine, dirs_exist_ok=True)
    (mine / "tokenizer.json").write_text(json.dumps(changed))
    main_with("cache", f"transformers:{mine}", data, "-o", str(cache), "--workers", "0", code=2)
    assert "differs in foreign;" in capsys.readouterr().err.replace("\n", " ")


# --- checks before a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"stages.0.inherit: manual needs a CLIP to inherit from, and the teacher is a SigLIP; name a checkpoint"),
        ({"start": "teacher"}, r"stages.0.inherit: manual needs a CLIP"),
        ({"inherit": "none"}, r"stages.0.student: give the whole shape with `like: NAME`"),
        ({"towers": "image", "student": {}}, r"stages.0.towers: the other tower would be copied .* a SigLIP"),
        ({"inherit": "none", "student": {"like": LIKE | {"text": LIKE["text"] | {"vocab_size": 60}}}}, "60 tokens"),
    ],
)
def test_stages_that_need_the_teachers_weights(
    changes: dict[str, Any], message: str, place: Path, siglip: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        start(recipe(place, f"transformers:{siglip}", tmp_path / "run", stages=[stage(**changes)]))
    assert not (tmp_path / "run").exists()


def test_a_plan_and_a_dry_run_need_no_foreign_teacher(place: Path, tmp_path: Path) -> None:
    chosen = recipe(place, "open_clip:ViT-B-16-SigLIP/webli", tmp_path / "run")
    planned = plan(chosen)
    assert planned["teacher"] is None and "not counted; set `teacher_shape`" in planned["notes"][0]
    like = chosen.model_copy(update={"teacher_shape": small_config(image_size=32)})
    assert plan(like)["total"]["flops"] > planned["total"]["flops"] and plan(like)["notes"] == []
    assert [r["stage"] for r in smoke(chosen, small=True)] == ["50"]
    sliced = recipe(place, "open_clip:ViT-B-16/openai", tmp_path / "run", stages=[stage()])
    with pytest.raises(ValueError, match="its shape is unknown until it is loaded; set `teacher_shape`"):
        plan(sliced)
    given = sliced.model_copy(update={"teacher_shape": small_config()})
    assert plan(given)["stages"][0]["shape"] == "3 x 16, text 1 x 24"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-33/openai", "neither a folder nor an OpenCLIP model; did you mean ViT-B-32"),
        ("open_clip:", "neither a folder nor an OpenCLIP model"),
        ("open_clip:ViT-B-32", r"name its weights, open_clip:ViT-B-32/TAG .* or open_clip:ViT-B-32@FILE"),
        ("open_clip:ViT-B-32/laion2b", r"of \d+ tags, as laion2b_e16"),
        ("open_clip:ViT-B-32@absent.pt", "absent.pt: no such file"),
        ("open_clip:{empty}", "OpenCLIP cannot read its config .*open_clip_config.json"),
        ("transformers:", "neither a folder nor a Hugging Face id"),
        ("transformers:{empty}/absent", "neither a folder nor a Hugging Face id"),
        ("transformers:{empty}", "config.json: no such file"),
        ("{siglip}", "a recipe's teacher may be another type, as `transformers:"),
        ("transformers:{bert}", "'bert'.* no shared image and text features"),
        ("transformers:{bare}", "image_mean None"),
        ("transformers:{damaged}", "transformers cannot load it"),
        ("transformers:{nan}", "not finite"),
    ],
)
def test_what_cannot_be_a_teacher(
    name: str, message: str, siglip: Path, transformers: ModuleType, open_clip: ModuleType, tmp_path: Path
) -> None:
    places = {"siglip": siglip} | {kind: tmp_path / kind for kind in ("empty", "bert", "bare", "damaged", "nan")}
    for kind in ("empty", "bare", "damaged", "nan"):
        places[kind].mkdir()
        for file in siglip.iterdir() if kind != "empty" else ():
            (places[kind] / file.name).write_bytes(file.read_bytes())
    (places["bare"] / "preprocessor_config.json").write_text("{}")
    if kind := next((k for k in ("damaged", "nan", "bert") if k in name), ""):
        weights = places[kind] / "model.safetensors"
        if kind == "damaged":
            weights.write_bytes(weights.read_bytes()[:1000])
        elif kind == "nan":
            tensors = load_file(weights)
            tensors["vision_model.post_layernorm.weight"][0] = torch.nan
            save_file(tensors, weights, {"format": "pt"})
        else:
            small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
            transformers.BertModel(transformers.BertConfig(**small, vocab_size=9)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=message) as error:
        load_teacher(name.format(**places))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("prefix", "module"), [("open_clip", "open_clip"), ("transformers", "transformers")])
def test_a_package_that_is_missing(
    prefix: str, module: str, siglip: Path, convnext: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    package = {"open_clip": "open_clip_torch"}.get(module, module)
    folder = siglip if module == "transformers" else convnext
    with pytest.raises(ValueError, match=rf"needs {package}: pip install tinyclip\[teachers\]"):
        load_teacher(f"{prefix}:{folder}")


def test_weights_that_cannot_be_downloaded(open_clip: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(sys.modules["open_clip.factory"], "download_pretrained", refuse)
    with pytest.raises(ValueError, match=r"no route to host\); download it elsewhere") as error:
        load_teacher("open_clip:RN50/yfcc15m")
    assert "\n" not in str(error.value)


def test_names_of_teachers() -> None:
    assert is_foreign("open_clip:a/b") and is_foreign("transformers:a/b") and not is_foreign("runs/open_clip")
    assert local_part("open_clip:ViT-B-32@runs/x.pt") == "runs/x.pt" and local_part("runs/x") == "runs/x"
    assert short_name("open_clip:ViT-B-16-SigLIP/webli") == "ViT-B-16-SigLIP-webli"
    assert short_name("checkpoints/ViT-B-32.pt") == "ViT-B-32"
