"""Model cards: the README.md of a checkpoint, in the Hugging Face hub's format. Unknown facts are
marked as unknown.

The front matter has the fields that the hub reads and, under `tinyclip`, the facts themselves; the card of a model made
from this one builds on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tinyclip.common.files import write_atomically
from tinyclip.common.yaml_text import parse
from tinyclip.model.axes import axis_table, count_parameters
from tinyclip.model.config import CLIPConfig, VisionConfig
from tinyclip.zoo.catalogue import SHIPPED, find, shipped
from tinyclip.zoo.resolve import HUB_ID

FILE = "README.md"
FIGURES = {  # keys of `evaluate`: description, and the hub's name for the metric
    "acc1": ("top-1", "accuracy"),
    "acc5": ("top-5", "accuracy"),
    "mean_per_class_recall": ("mean recall of the classes", "recall"),
} | {
    f"{query}_retrieval_recall@{k}": (f"{words}, recall@{k}", "recall")
    for query, words in (("image", "text to image"), ("text", "image to text"))
    for k in (1, 5, 10)
}
COUNTS = {"n": "labelled pictures", "classes": "classes", "templates": "prompt templates", "n_texts": "captions"}
HOW = {
    "manual": "cut by rule",
    "auto": "cut by learned masks",
    "calibrated": "cut by measured importance",
    "none": "random weights",
}
USE = {  # by library
    "tinyclip": """\
import tinyclip

clip = tinyclip.load("this-folder")  # or its name on the hub
print(clip.classify("photo.jpg", ["a dog", "a cat"]))
""",
    "open_clip": """\
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:this-folder")
tokenizer = open_clip.get_tokenizer("local-dir:this-folder")
""",
    "transformers": """\
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("this-folder"), CLIPProcessor.from_pretrained("this-folder")
""",
}


class Card(BaseModel):
    """Known facts about a model besides its shape; empty means unknown."""

    model_config = ConfigDict(extra="ignore")

    name: str = ""
    how: str = ""  # sentences: how its weights were made
    source: str = ""  # the model its weights come from: hub id, zoo name or path
    teacher: str = ""
    data: str = ""  # training data
    licence: str = ""  # as the hub spells it
    figures: dict[str, Any] = {}  # results of `evaluate`
    figures_of: str = ""  # the data they were measured on
    stages: list[dict[str, Any]] = []
    recipe: str = ""  # YAML


def write_card(folder: Path, config: CLIPConfig, card: Card, library: str = "tinyclip") -> None:
    """Write a checkpoint's README.md; `library` is the one that loads it.

    Raises:
        ValueError: if it cannot be written.
    """
    write_atomically(folder / FILE, card_text(config, card, library))


def card_text(config: CLIPConfig, card: Card, library: str = "tinyclip") -> str:
    """Return the README.md: front matter for the hub, then the same facts for people."""
    front = yaml.safe_dump(_front_matter(card, library), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---", f"# {card.name or 'A CLIP'}", _shape(config)]
    parts += ["## How it was made", card.how or "Unknown: not recorded when it was saved."]
    if card.source and card.source == card.teacher:
        parts.append(f"Its weights come from its teacher, {_link(card.teacher)}.")
    else:
        labels = {"Its weights come from": card.source, "Its teacher was": card.teacher}
        parts += [f"{label} {_link(model)}." for label, model in labels.items() if model]
    if card.stages:
        columns = list(card.stages[0])
        parts.append(_table(columns, [[str(stage.get(name, "")) for name in columns] for stage in card.stages]))
    if card.recipe:
        parts.append(f"<details><summary>The recipe</summary>\n\n```yaml\n{card.recipe.strip()}\n```\n\n</details>")
    parts += ["## Training data", f"{card.data}." if card.data else "Unknown."]
    parts += ["## Figures", _figures(card) or "None: it had not been evaluated when this was written."]
    unknown = "Unknown: it depends on the licences of the original model and of its training data."
    parts += ["## Licence", f"{card.licence}." if card.licence else unknown]
    parts += ["## Use", f"```python\n{USE[library]}```"]
    return "\n\n".join(parts) + "\n"


def read_card(folder: Path) -> Card:
    """Return the facts in a checkpoint's README.md, ours or others'; an empty card if there is no readable one."""
    try:
        _, front, _ = (folder / FILE).read_text(encoding="utf-8").split("---\n", 2)
        facts = parse(front)
        card = Card.model_validate(facts.get("tinyclip") or {})
    except (OSError, ValueError, AttributeError, ValidationError):
        return Card()  # people may have edited it
    licence, data = facts.get("license"), facts.get("datasets")
    if isinstance(licence, str):
        card.licence = licence
    if not card.data and isinstance(data, list):
        card.data = ", ".join(map(str, data))
    return card


def known(model: str | Path) -> Card:
    """Return the known facts about a model, given its path, zoo name or Hugging Face id; downloads nothing."""
    name, path = str(model), Path(model)
    if not path.exists() and name in SHIPPED:
        path = shipped(name)
    if path.exists():
        card = read_card(path if path.is_dir() else path.parent)
    elif entry := _entry(name):
        how, figures = f"Published by the authors of TinyCLIP; {HOW[entry.how]}.", {"acc1": entry.top1 / 100}
        licence, measured = entry.licence.lower(), "ImageNet-1K, as published"
        card = Card(how=how, data=entry.data, licence=licence, figures=figures, figures_of=measured)
    elif hub := _hub_id(name):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(hub, FILE)
        card = read_card(Path(cached).parent) if isinstance(cached, str) else Card()
    else:
        card = Card()
    return card.model_copy(update={"name": card.name or path.stem})


def made_from(model: str | Path, how: str) -> Card:
    """Return the card of a model whose weights were changed from another's; the other's figures are dropped."""
    before = known(model)
    return Card(how=how, source=shown(model), data=before.data, licence=before.licence)


def converted(model: str | Path, name: str) -> Card:
    """Return the card of the same model in another format, called `name` if it has no name of its own."""
    before = known(model)
    return before.model_copy(update={"name": before.name or name, "source": before.source or shown(model)})


def shown(model: str | Path) -> str:
    """Return a path or name for publishing: only the end of an absolute path, and no path that looks like a hub id."""
    path = Path(model)
    if path.is_absolute():
        return "/".join(["...", *path.parts[-2:]])
    return f"./{model}" if HUB_ID.fullmatch(str(model)) and path.exists() else str(model)


def _front_matter(card: Card, library: str) -> dict[str, Any]:
    front: dict[str, Any] = {"license": card.licence} if card.licence else {}
    front |= {"library_name": library, "pipeline_tag": "zero-shot-image-classification"}
    front["tags"] = ["clip", "tinyclip", *(["distillation"] if card.teacher else [])]
    if hub := _hub_id(card.source):
        front["base_model"] = hub
    if card.teacher:
        front["teacher"] = card.teacher
    if results := [(FIGURES[key], value) for key, value in card.figures.items() if key in FIGURES]:
        front["metrics"] = sorted({metric for (_, metric), _ in results})
        metrics = [{"type": metric, "name": name, "value": round(value, 5)} for (name, metric), value in results]
        data = {"type": "custom", "name": card.figures_of or "unknown"}
        task = {"type": "zero-shot-image-classification"}
        front["model-index"] = [
            {"name": card.name or "CLIP", "results": [{"task": task, "dataset": data, "metrics": metrics}]}
        ]
    return front | {"tinyclip": card.model_dump(exclude_defaults=True, exclude={"recipe"})}


def _shape(config: CLIPConfig) -> str:
    from tinyclip.model.costs import macs

    parts, operations, vision = count_parameters(axis_table(config)), macs(config), config.vision
    if isinstance(vision, VisionConfig):
        image = [f"ViT, {vision.image_size} px, patch {vision.patch_size}", f"{vision.layers} x {vision.width}"]
    else:
        image = [f"ResNet, {vision.image_size} px", f"{list(vision.layers)} x {vision.width}"]
    text = config.text
    rows = [
        ["kind", image[0], f"transformer, {text.context_length} tokens of {text.vocab_size:,}"],
        ["blocks x width", image[1], f"{text.layers} x {text.width}"],
        ["parameters", f"{parts['image']:,}", f"{parts['text']:,} + {parts['embedding']:,} token embedding"],
        ["GMACs", f"{operations['image'] / 1e9:.3g}", f"{operations['text'] / 1e9:.3g}"],
    ]
    table = _table(["", "image tower", "text tower"], rows)
    return f"A CLIP with an embedding of {config.embed_dim} and the activation {config.activation}.\n\n{table}"


def _figures(card: Card) -> str:
    columns = {"all": card.figures} | card.figures.get("subsets", {})
    names = [name for name in FIGURES if name in card.figures]
    if not names:
        return ""
    rows = [[FIGURES[name][0], *(_percent(found.get(name)) for found in columns.values())] for name in names]
    counts = [f"{card.figures[key]:,} {word}" for key, word in COUNTS.items() if key in card.figures]
    of = f"On {card.figures_of or 'unknown data'}{': ' + ', '.join(counts) if counts else ''}."
    return f"{of}\n\n{_table(['figure', *columns], rows)}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _link(model: str) -> str:
    hub = _hub_id(model)
    return f"[{model}](https://huggingface.co/{hub})" if hub else f"`{model}`"


def _entry(name: str) -> Any:
    try:
        return find(name) if name else None
    except ValueError:  # ambiguous name
        return None


def _hub_id(name: str) -> str | None:
    """Return the hub id of a model named by `shown`, if it has one."""
    if entry := _entry(name):
        return entry.hub_id
    plain = name.removeprefix("hf:")
    return plain.partition("@")[0] if HUB_ID.fullmatch(plain) else None
