"""Upload a checkpoint's folder to the Hugging Face hub with the hub's own library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tinyclip.zoo.card import FILE, card_text, known
from tinyclip.zoo.checkpoint import load_checkpoint
from tinyclip.zoo.resolve import HUB_ID, resolve, transfer_errors

PRIVATE = {"state.pt", "checksums.json"}  # files of an unfinished run


@dataclass(frozen=True)
class Push:
    """The files to upload, and their destination."""

    folder: Path
    repository: str
    files: dict[str, int]  # size in bytes by name, including the model card
    card: str | None  # text of the model card if the folder has none

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def plan(model: str | Path, repository: str) -> Push:
    """Check that a model's folder is complete and return what would be uploaded: all files except hidden ones.

    Raises:
        ValueError: for a bad repository name, an incomplete checkpoint, or a model that is a single file.
    """
    if not HUB_ID.fullmatch(repository) or "@" in repository:
        raise ValueError(f"{repository}: not a Hugging Face id; write org/name")
    folder = resolve(model)
    if not folder.is_dir():
        raise ValueError(f"{folder}: a file, but the hub takes folders; make one with `tinyclip convert`")
    clip = load_checkpoint(folder)[0]
    found = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    files = {name: size for name, size in found.items() if not name.startswith(".") and name not in PRIVATE}
    card = None if FILE in files else card_text(clip.config, known(model))
    return Push(folder, repository, files | ({FILE: len(card.encode())} if card else {}), card)


def push(what: Push, private: bool = False, revision: str | None = None, message: str = "Upload by tinyclip") -> str:
    """Upload in one commit and return its URL; create the repository and the branch if they do not exist.

    The token comes from `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: if there is no token, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    if get_token() is None:
        raise ValueError("no token for the Hugging Face hub: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(endpoint=constants.ENDPOINT, library_name="tinyclip")
    place = f"{constants.ENDPOINT}/{what.repository}"
    with _one_line(what.repository, place):
        api.create_repo(what.repository, private=private or None, exist_ok=True)
        if private and not api.model_info(what.repository).private:
            raise ValueError(f"{place} already exists and is public; nothing was uploaded")
        if revision is not None:
            api.create_branch(what.repository, branch=revision, exist_ok=True)
        operations = [
            CommitOperationAdd(name, what.card.encode() if what.card and name == FILE else what.folder / name)
            for name in what.files
        ]
        commit = api.create_commit(what.repository, operations, commit_message=message, revision=revision)
    return str(commit.commit_url)


@contextmanager
def _one_line(repository: str, place: str) -> Iterator[None]:
    """Turn errors of the hub and the connection into a `ValueError` that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repository}: not a Hugging Face id ({' '.join(str(error).split())})") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        reasons = {
            401: "the token is not valid; log in with `hf auth login`, or set HF_TOKEN to a new one",
            403: "the token lacks write access; create one that has it, or choose another name",
            404: "no such organisation, or the token has no access to it",
        }
        said = " ".join((error.server_message or str(error)).split())
        raise ValueError(f"cannot push to {place}: HTTP {status}, {reasons.get(status, said)}") from None
    except RuntimeError as error:  # raised for a single file
        cause = " ".join(str(error.__cause__ or "").split())
        raise ValueError(f"cannot push to {place}: {error} {cause}".strip()) from None
    except transfer_errors() as error:
        raise ValueError(f"cannot push to {place}: {' '.join(str(error).split()) or 'no connection'}") from None
