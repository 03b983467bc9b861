"""Names of files by which a run, a checkpoint in it and an export are known. No torch here."""

from __future__ import annotations

from pathlib import Path

FACTS = "tinyclip.json"
TOKENIZER = "tokenizer.json"
ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}  # of a tower's file


def find_export(path: str | Path) -> Path | None:
    """The folder of an export that a path leads to, itself or a file in it; None for anything else.

    Raises:
        ValueError: for an ONNX, OpenVINO or `.pt2` model that is not in such a folder.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    is_facts = path.name == FACTS
    if (folder / FACTS).is_file() and (
        path.is_dir() or is_facts or (path.is_file() and path.stem in ("image", "text"))
    ):
        return folder
    alone = path.suffix in ENDINGS.values() and path.exists()
    if path.is_dir() and not any(path.glob("*config*.json")):  # of a checkpoint
        alone = alone or any(file.suffix in ENDINGS.values() for file in path.iterdir())
    if alone:
        raise ValueError(
            f"{path} is no export of tinyclip: {folder if path.is_file() else path} has no {FACTS}, which says how "
            "pictures and texts go in; make one with `tinyclip export`"
        )
    return None


STATE = "state.pt"
MANIFEST = "checksums.json"  # of the files beside it; written last, so that a whole checkpoint has it
