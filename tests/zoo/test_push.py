"""`tinyclip push` to a small hub of our own: only HTTP is mocked."""

from __future__ import annotations

import base64
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from tests.helpers.models import random_model, small_config, small_tokenizer
from tinyclip.cli.main import main
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.transforms import Preprocess

# Raised inside huggingface_hub by its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
FILES = ["README.md", "config.json", "model.safetensors", "preprocess.json", "tokenizer.json"]


class Hub(ThreadingHTTPServer):
    """Accepts repositories, branches and commits as the hub does; weights by LFS, everything else in the commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status: dict[str, int] = {}  # status of answers, by end of the path
        self.private = False
        self.log: list[tuple[str, str]] = []
        self.bodies: dict[str, Any] = {}
        self.tokens: dict[str, str | None] = {}
        self.committed: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._take(b"")

    def do_POST(self) -> None:
        self._take(self._body())

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({}, self.server.status.get("put", 200))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _take(self, body: bytes) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.log.append((self.command, path))
        hub.tokens[path] = self.headers.get("Authorization")
        for end, status in hub.status.items():
            if path.endswith(end):
                self._answer({"error": "what the hub says"}, status)
                return
        if path.endswith("/api/repos/create"):
            hub.bodies["create"] = json.loads(body)
            self._answer({"url": f"{hub.address}/org/small", "name": "org/small", "id": "1"})
        elif path == "/api/models/org/small":
            self._answer({"id": "org/small", "private": hub.private, "siblings": [], "sha": "0" * 40})
        elif "/branch/" in path:
            self._answer({})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [("lfs" if f["path"].endswith(".safetensors") else "regular", f["path"]) for f in files]
            self._answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for m, p in modes]})
        elif path.endswith("/info/lfs/objects/batch"):
            upload = lambda o: {"upload": {"href": f"{hub.address}/lfs/{o['oid']}"}}  # noqa: E731
            objects = [{"oid": o["oid"], "size": o["size"], "actions": upload(o)} for o in json.loads(body)["objects"]]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._answer({"error": f"no {path}"}, 404)

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        hub = self.server
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                hub.bodies["commit"] = value
            elif line["key"] == "file":
                hub.committed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.committed[value["path"]] = hub.objects[value["oid"]]
        address = f"{hub.address}/org/small/commit/{'1' * 40}"
        self._answer({"commitUrl": address, "commitOid": "1" * 40, "success": True})

    def _answer(self, data: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "small"
    tokenizer = small_tokenizer()
    clip = Pipeline(
        random_model(small_config(vocab_size=tokenizer.vocab_size), 0, torch.float32),
        tokenizer,
        Preprocess(image_size=32),
    )
    clip.save(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tinyclip", "push", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_all_files_arrive_in_one_commit(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, model, "org/small") == 0
    assert hub.committed == {name: (model / name).read_bytes() for name in FILES}
    assert hub.bodies["create"] == {"name": "small", "organization": "org"}
    assert hub.bodies["commit"]["summary"] == "Upload by tinyclip"
    assert hub.tokens["/api/models/org/small/commit/main"] == "Bearer hf_secret"
    assert [path for _, path in hub.log if "/commit/" in path] == ["/api/models/org/small/commit/main"]
    output = capsys.readouterr().out
    assert f"{hub.address}/org/small/commit/{'1' * 40}" in output and 'tinyclip.load("org/small")' in output
    assert "hf_secret" not in output


def test_a_branch_a_message_and_a_private_place(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.private = True
    assert run(monkeypatch, model, "org/small", "--private", "--branch", "v2", "--message", "Better") == 0
    assert hub.bodies["create"]["visibility"] == "private"
    assert ("POST", "/api/models/org/small/branch/v2") in hub.log
    assert ("POST", "/api/models/org/small/commit/v2") in hub.log
    assert hub.bodies["commit"]["summary"] == "Better"
    assert 'tinyclip.load("org/small@v2")' in capsys.readouterr().out


def test_private_never_goes_to_a_public_place(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, model, "org/small", "--private") == 2
    assert "already exists and is public; nothing was uploaded" in capsys.readouterr().err
    assert hub.committed == {}


def test_a_missing_card_is_made_and_what_is_of_a_run_stays_here(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "old")
    (folder / "README.md").unlink()
    for name in ("state.pt", "checksums.json", ".lock"):
        (folder / name).write_text("of a run")
    (folder / "metrics.jsonl").write_text("{}")
    assert run(monkeypatch, folder, "org/small") == 0
    assert sorted(hub.committed) == sorted([*FILES, "metrics.jsonl"])
    assert hub.committed["README.md"].startswith(b"---\nlibrary_name: tinyclip\n")
    assert not (folder / "README.md").exists()


def test_a_dry_run_only_lists(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, model, "org/small", "--dry-run") == 0
    output = capsys.readouterr().out
    assert all(name in output for name in FILES) and "would upload 5 files" in output
    assert hub.log == []


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"": 401}, "HTTP 401, the token is not valid; log in with `hf auth login`"),
        ({"/repos/create": 403, "/org/small": 404}, "HTTP 403, the token lacks write access"),
        ({"/repos/create": 404}, "HTTP 404, no such organisation"),
        ({"/commit/main": 403}, "HTTP 403, the token lacks write access"),
        ({"/commit/main": 400}, "HTTP 400, what the hub says"),
        ({"put": 403}, "Error while uploading 'model.safetensors' to the Hub"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    answers: dict[str, int],
    message: str,
    model: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.status = answers
    assert run(monkeypatch, model, "org/small") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]  # may follow a progress bar
    assert f"cannot push to {hub.address}/org/small: " in last and message in last
    assert "model.safetensors" not in hub.committed


def test_no_token_and_no_way_to_the_hub(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert run(monkeypatch, model, "org/small") == 2
    assert "cannot push to http://127.0.0.1:9/org/small: " in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert run(monkeypatch, model, "org/small") == 2
    assert "no token for the Hugging Face hub: log in with `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "repository", "message"),
    [
        ("nothing", "small", "small: not a Hugging Face id; write org/name"),
        ("nothing", "org/small@v2", "not a Hugging Face id"),
        ("no weights", "org/small", "model.safetensors: no such file"),
        ("torn weights", "org/small", "damaged or not a safetensors file"),
        ("one file", "org/small", "a file, but the hub takes folders"),
        ("not there", "org/small", "no such checkpoint"),
    ],
)
def test_what_is_not_whole_never_leaves(
    change: str,
    repository: str,
    message: str,
    model: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    weights = folder / "model.safetensors"
    if change == "no weights":
        weights.unlink()
    elif change == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "one file":
        torch.save({}, folder := tmp_path / "weights.pt")
    elif change == "not there":
        folder = tmp_path / "nowhere"
    assert run(monkeypatch, folder, repository) == 2
    assert message in capsys.readouterr().err
    assert hub.log == []
