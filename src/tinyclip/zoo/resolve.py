"""Resolve names of published TinyCLIP models and hub ids to local files."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from tinyclip.model.config import NAMED
from tinyclip.zoo.catalogue import ENTRIES, SHIPPED, Entry, _hint, cache_folder, find, shipped

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Tried in order until weights are found: first `transformers`' names, then OpenCLIP's.
HUB_SMALL = ("*.json", "*.txt", "*.model", "README.md")  # *.model: SentencePiece vocabularies
HUB_WEIGHTS = (
    *("model*.safetensors", "pytorch_model*.bin", "open_clip_*.safetensors", "open_clip_*.bin"),
    *("0_CLIPModel/model*.safetensors", "0_CLIPModel/pytorch_model*.bin"),  # sentence-transformers
)


def resolve(name_or_path: str | Path, cache: str | Path | None = None) -> Path:
    """Return the local file or folder for a path, a zoo name, the name of a model shipped with the package, or a
    Hugging Face id (`org/name`, `hf:org/name@revision`).

    A local path wins over a name; if it is also the name of a published model, warn. Missing files are downloaded into
    `cache` or the hub's own cache.

    Raises:
        ValueError: for an unknown name (suggests similar names), or if a download fails.
    """
    name = str(name_or_path)
    if Path(name).exists():
        if _is_published(name):
            warnings.warn(
                f"{name}: reading {Path(name).resolve()}, not the published model of this name; "
                "give its full path if you want this file, or rename it",
                stacklevel=2,
            )
        return Path(name)
    if name in SHIPPED:
        return shipped(name)
    if name.startswith("hf:"):
        return _from_hub(name.removeprefix("hf:"))
    if entry := find(name):
        return local_file(entry, cache)
    if HUB_ID.fullmatch(name) and not Path(name).parent.exists():
        return _from_hub(name)
    if name in NAMED:
        raise ValueError(f"{name}: no such checkpoint; the name is a shape without weights in the zoo")
    raise ValueError(f"{name}: no such checkpoint; {_hint(name)}")


def _is_published(name: str) -> bool:
    """Return whether a bare name that is also a local path is exactly a published model's name."""
    return Path(name).name == name and name in (*SHIPPED, *(entry.name for entry in ENTRIES))


def local_file(entry: Entry, cache: str | Path | None = None) -> Path:
    """Return a model's file. Download it once; check it against its record if its size or time changed."""
    from tinyclip.common.download import check, fetch

    path = cache_folder(cache) / entry.file
    if not path.exists():
        return fetch(entry.url, path)
    check(path)
    return path


def _from_hub(identifier: str) -> Path:
    """Return a model's folder in the Hugging Face hub's cache; download it if needed (see HF_HOME, HF_HUB_OFFLINE)."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = identifier.partition("@")
    place = f"{constants.ENDPOINT}/{repository}"
    try:
        for weights in HUB_WEIGHTS:
            patterns = [*HUB_SMALL, weights]
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
            if any(folder.glob(weights)):
                return folder
    except HFValidationError:
        raise ValueError(f"{identifier}: not a Hugging Face id; write org/name or hf:org/name@revision") from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{identifier}: no such checkpoint here, and the Hugging Face hub cannot be reached or is disabled; "
            f"download {place} elsewhere and give its folder"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        raise ValueError(
            f"{identifier}: no such checkpoint here, and {place} cannot be read (HTTP {status}: no such model or "
            "revision, or it needs `hf auth login`)"
        ) from None
    except transfer_errors() as error:
        raise ValueError(f"{identifier}: cannot be downloaded ({' '.join(str(error).split())})") from None
    raise ValueError(f"{identifier}: no weights in {place} that can be read")


def transfer_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of a broken transfer, including the HTTP library's, which differs between hub versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


FACTS = "tinyclip.json"
TOKENIZER = "tokenizer.json"
ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}  # of a tower's file


def find_export(path: str | Path) -> Path | None:
    """Return the export folder that a path refers to, either itself or a file in it; None for anything else.

    Raises:
        ValueError: for an ONNX, OpenVINO or `.pt2` model outside such a folder.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    is_facts = path.name == FACTS
    if (folder / FACTS).is_file() and (
        path.is_dir() or is_facts or (path.is_file() and path.stem in ("image", "text"))
    ):
        return folder
    alone = path.suffix in ENDINGS.values() and path.exists()
    if path.is_dir() and not any(path.glob("*config*.json")):  # a checkpoint has a config
        alone = alone or any(file.suffix in ENDINGS.values() for file in path.iterdir())
    if alone:
        raise ValueError(
            f"{path} is not a tinyclip export: {folder if path.is_file() else path} has no {FACTS}, which describes "
            "its inputs; make one with `tinyclip export`"
        )
    return None


STATE = "state.pt"
MANIFEST = "checksums.json"  # of the files next to it; written last, so only complete checkpoints have it
