"""The page under attack over HTTP, with everything that could be sent to its API."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.browser.clients import FILE_DATA, call, join, raw, start, stop, upload, visitor

ROOT = Path(__file__).parent.parent.parent
CANARY = "the canary that no answer may hold"
LABELS = "a dog, a green apple"
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's working folder, with files that attackers look for."""
    place = tmp_path_factory.mktemp("scene")
    (place / "canary.txt").write_text(CANARY)
    picture().save(place / "canary.png", pnginfo=None)
    os.mkfifo(place / "pipe")
    (place / "tmp").mkdir()
    (place / "link.png").symlink_to(place / "canary.png")
    return place


def left(folder: Path) -> list[Path]:
    """Return the temporary folders and files that a page left."""
    return [file for file in folder.iterdir() if not file.name.startswith("torchinductor")]


def picture() -> Image.Image:
    with tarfile.open(ROOT / "assets" / "emoji" / "eval" / "shard-00000.tar.gz") as shard:
        member = shard.extractfile("twemoji-1f34f.webp")
        assert member
        return Image.open(io.BytesIO(member.read())).convert("RGB")


def apple() -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def address(scene: Path) -> Iterator[str]:
    process, address = start("emoji-student", cwd=scene, env=os.environ | {"TMPDIR": str(scene / "tmp")})
    yield address
    stop(process)
    assert not left(scene / "tmp")


@pytest.fixture(autouse=True)
def nothing_is_kept_on_disk_and_the_page_lives(scene: Path, address: str) -> Iterator[None]:
    yield
    assert [file for file in (scene / "tmp").rglob("*") if not file.is_dir()] == []
    with visitor(address) as client:
        assert "green apple" in str(call(client, [{"path": upload(client, apple())[0]}, LABELS])["data"])


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with visitor(address) as client:
        yield client


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[tuple[str, list[Any]]]:
    """The address of a server that must receive no requests, and the requests that it received."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked: list[Any] = []

        def accept() -> None:
            while True:
                try:
                    asked.append(server.accept())
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/picture.png", asked
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert not asked


def paths(scene: Path, url: str) -> list[str]:
    inside = [scene / name for name in ("canary.txt", "canary.png", "pipe", "link.png")]
    names = [
        *map(str, inside),
        "canary.png",
        "./canary.txt",
        f"../{scene.name}/canary.png",
        *(f"file://{one}" for one in inside),
    ]
    names += [
        "/etc/passwd",
        "/proc/self/environ",
        "/proc/self/fd/0",
        "/dev/zero",
        "/dev/stdin",
        "",
        ".",
        "/",
        "~",
        "\0",
    ]
    return [*names, url, url.replace("http:", "HTTP:"), f"//{url.partition('//')[2]}", "data:image/png;base64,AAAA"]


def shapes(path: str) -> Iterator[Any]:
    """Yield a picture that is not an upload, in the forms that Gradio accepts or used to accept."""
    yield {"path": path}
    yield {"path": path, "meta": FILE_DATA}
    yield {"path": path, "url": path, "meta": FILE_DATA, "orig_name": "a.png", "is_stream": False}
    yield {"path": path, "meta": FILE_DATA, "is_stream": True}
    yield {"path": None, "url": path, "meta": FILE_DATA}
    yield {"name": path, "is_file": True, "data": path}
    yield {"path": {"path": path, "meta": FILE_DATA}, "meta": FILE_DATA}
    yield {
        "image": {"path": path, "meta": FILE_DATA},
        "meta": {"_type": "x", "deeper": {"path": path, "meta": FILE_DATA}},
    }
    yield [{"path": path, "meta": FILE_DATA}]
    yield path
    yield f"/gradio_api/file={path}"


def test_no_path_and_no_address_is_ever_opened(
    client: httpx.Client, scene: Path, elsewhere: tuple[str, list[Any]]
) -> None:
    refused = told = 0
    for path in paths(scene, elsewhere[0]):
        for number, shape in enumerate(shapes(path)):
            answer = join(client, [shape, LABELS])
            if answer.status_code == 400:
                refused += 1
                continue
            assert answer.status_code in (200, 429), answer.text
            output = call(client, [shape, LABELS], session=f"s{number}") if answer.status_code == 200 else {}
            assert output.get("error", "").startswith(("The picture has expired", "No picture")), output
            told += 1
            client.get("/gradio_api/queue/data", params={"session_hash": "here"})  # collect the first result
        for shape in shapes(path):  # where a text belongs
            if not isinstance(shape, str):
                assert join(client, [None, shape]).status_code == 400
    assert refused and told


def test_other_ways_into_gradio_are_closed(client: httpx.Client, scene: Path, elsewhere: tuple[str, list[Any]]) -> None:
    hidden = {"path": str(scene / "canary.txt"), "meta": FILE_DATA}
    body = {"data": [hidden, LABELS], "session_hash": "here", "fn_index": 0, "event_id": "x", "component_id": 5}
    body |= {"fn_name": "x", "prompt": "x", "code": "x", "hash": "x"}
    posts = [f"{way}/{name}" for way in ("run", "api", "call", "call/v2") for name in ("classify", "predict", "0")]
    posts += ["component_server", "component_server/", "stream/x", "stream/x/close", "reset", "reset/", "cancel"]
    posts += [
        "process_recording",
        "vibe-edit",
        "vibe-code/",
        "undo-vibe-edit",
        "vibe-starter-queries",
        "run-history/connect",
    ]
    posts += ["queue/join/", "queue//join", "upload/", "profiling/clear", "mcp", "mcp/sse"]
    for path in posts:
        answer = client.post(f"/gradio_api/{path}", json=body)
        assert answer.status_code == 404 and CANARY not in answer.text, path
    for path in ("/login", "/", "/config", "/queue/join", "/theme.css"):
        assert client.post(path, json=body).status_code == 404
    gets = ["deep_link?session_hash=here", "config", "info", "info?all_endpoints=true", "openapi.json", "token", "user"]
    gets += [
        "app_id",
        "runs",
        "startup-events",
        "heartbeat/here",
        "queue/status",
        "login_check",
        "dev/reload",
        "vibe-code",
    ]
    gets += [
        "custom_component/x/client/component/a.js",
        f"proxy={elsewhere[0]}",
        "upload_progress/x",
        "mcp/sse",
        "theme.css",
    ]
    gets += ["call/classify/x", "stream/here/0/5/playlist.m3u8", "stream/here/0/5/playlist-file", "profiling/traces"]
    for path in gets:
        assert client.get(f"/gradio_api/{path}").status_code == 404, path
    for path in (
        "/config",
        "/monitoring",
        "/monitoring/summary",
        "/monitoring/x",
        "/manifest.json",
        "/pwa_icon",
        "/svelte/x",
        "/docs",
        "/openapi.json",
        "/robots.txt",
        "/logout",
        "/login",
        "/file/x",
    ):
        assert client.get(path).status_code == 404, path
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert client.request(method, "/gradio_api/queue/join").status_code == 404


def test_a_deep_link_names_nothing(client: httpx.Client) -> None:
    page = client.get("/").text
    for link in ("x", "../x", "a" * 43):
        assert client.get("/", params={"deep_link": link, "__theme": "dark"}).text == page


@pytest.mark.parametrize(
    "start", ["gradio_api/file=", "gradio_api/file/", "file=", "file/", "assets/", "static/", "static/fonts/"]
)
def test_no_file_is_handed_out(
    client: httpx.Client, address: str, scene: Path, start: str, elsewhere: tuple[str, list[Any]]
) -> None:
    back = "../" * 20
    for path in (
        *paths(scene, elsewhere[0]),
        f"{back}etc/passwd",
        f"{back}{scene}/canary.txt",
        "..",
        "%2e%2e/index.html",
    ):
        for written in (
            path,
            path.replace("/", "%2f"),
            path.replace(".", "%2e"),
            path.replace("/", "%252f"),
            f"%2f{path}",
            path.replace("/", "\\"),
        ):
            target = f"/{start}{written}".replace("\0", "%00").replace(" ", "%20")
            answer = raw(address, f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            assert answer.split()[1] in (b"404", b"400"), target
            assert CANARY.encode() not in answer and b"root:" not in answer


def test_an_upload_is_its_senders_alone(client: httpx.Client, address: str) -> None:
    name = upload(client, apple())[0]
    own = client.get(f"/gradio_api/file={name}")
    assert own.content == apple() and own.headers["content-type"] == "image/png"
    assert own.headers["x-content-type-options"] == "nosniff"
    assert client.head(f"/gradio_api/file={name}").content == b""
    stranger = httpx.Client(base_url=address, trust_env=False)
    for other in (stranger, *(visitors := [visitor(address)])):
        with other as someone:
            assert someone.get(f"/gradio_api/file={name}").status_code == 404
            assert call(someone, [{"path": name}, LABELS])["error"].startswith("The picture has expired")
            assert join(someone, [name, LABELS]).status_code == 400
    assert visitors and "green apple" in str(call(client, [{"path": name, "meta": FILE_DATA}, LABELS])["data"])


def test_an_upload_is_no_page_of_ours(client: httpx.Client) -> None:
    for data in (b"<script>alert(1)</script>", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"):
        answer = client.get(f"/gradio_api/file={upload(client, data)[0]}")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert (
            answer.headers["content-disposition"] == "attachment"
            and "sandbox" in answer.headers["content-security-policy"]
        )


def test_results_are_read_by_the_one_who_asked(client: httpx.Client, address: str) -> None:
    name = upload(client, apple())[0]
    assert join(client, [{"path": name}, LABELS], session_hash="mine").status_code == 200
    with visitor(address) as other:
        assert other.get("/gradio_api/queue/data", params={"session_hash": "mine"}).status_code == 404
    assert "green apple" in client.get("/gradio_api/queue/data", params={"session_hash": "mine"}).text


def test_calls_of_another_form_are_refused(client: httpx.Client) -> None:
    nested = "[" * 100_000 + "]" * 100_000
    wrong = [
        b"",
        b"{",
        b"[]",
        b"1",
        nested.encode(),
        b'{"data":' + nested.encode() + b"}",
        b"\xff\xfe",
        b'{"data": NaN}',
    ]
    wrong += [b'{"fn_index": ' + b"9" * 5000 + b"}", b'{"fn_index": 0, "session_hash": "a", "data": [null, "\\ud800"]}']
    wrong += [b'{"fn_index": true, "session_hash": "a", "data": [null, ""]}', b'{"fn_index": [], "data": []}']
    wrong += [b'{"fn_index": 0, "session_hash": "../a", "data": [null, ""]}', b'{"fn_index": 0, "data": [null, ""]}']
    for body in wrong:
        answer = client.post("/gradio_api/queue/join", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, body[:80]
    for data in (
        [],
        [None],
        [None, "", ""],
        "ab",
        {},
        [None, ["a"]],
        [None, {"a": 1}],
        [5, ""],
        [None, 5],
        [None, True],
    ):
        assert join(client, data).status_code == 400  # type: ignore[arg-type]
    for function in (99, -1, 10**30):
        assert join(client, [None, ""], function).status_code == 400
    assert join(client, [None, "a" * 2**21]).status_code == 413
    for query in ("", "?session_hash=", "?session_hash=../a", "?session_hashes=a", f"?{'a=1&' * 1000}"):
        assert client.get(f"/gradio_api/queue/data{query}").status_code == 400
    assert join(client, [None, ""], simple_format=True, batched=True, event_id="x", oauth_token="x").status_code == 200


def test_results_that_nobody_collects_are_forgotten(client: httpx.Client) -> None:
    for i in range(105):
        while (
            answer := join(client, [None, LABELS], session_hash=f"s{i}")
        ).status_code == 503:  # full: wait for the others
            pass
        assert answer.status_code == 200
    first, last = ({"session_hash": f"s{i}"} for i in (0, 104))
    assert "No picture" in client.get("/gradio_api/queue/data", params=last).text
    assert client.get("/gradio_api/queue/data", params=first).status_code == 404


def test_one_client_cannot_fill_the_queue(client: httpx.Client) -> None:
    answers = [join(client, [None, ""], session_hash="full").status_code for _ in range(12)]
    assert answers.count(200) == 8 and answers.count(429) == 4
    client.get("/gradio_api/queue/data", params={"session_hash": "full"})


# --- uploads -----------------------------------------------------------------------------------------------------


def test_a_requests_uploads_are_bounded_in_sum(client: httpx.Client) -> None:
    half, most = bytes(10 * MEBIBYTE), bytes(20 * MEBIBYTE)
    assert len(upload(client, half, half)) == 2 and len(upload(client, *[b"a"] * 10)) == 10
    for data in ([most, b"a"], [half, half, half], [b"a"] * 11):
        answer = client.post("/gradio_api/upload", files=[("files", ("a.png", one)) for one in data])
        assert answer.status_code == 413, answer.text


def test_uploads_of_no_stated_length_are_bounded_too(address: str) -> None:
    lines = ["POST /gradio_api/upload HTTP/1.1", "Host: localhost", "Transfer-Encoding: chunked"]
    head = "\r\n".join([*lines, "Content-Type: multipart/form-data; boundary=b", "", ""])
    part = '--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'

    def chunks() -> Iterator[bytes]:
        for data in [part.encode(), *[bytes(MEBIBYTE)] * 24]:
            yield b"%x\r\n%s\r\n" % (len(data), data)
        yield b"0\r\n\r\n"

    assert raw(address, head.encode(), chunks()).split()[1] == b"413"
    stated = f"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**12}\r\n"
    assert raw(address, f"{stated}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode()).split()[1] == b"413"


def test_uploads_that_are_none(client: httpx.Client) -> None:
    for kind, body in (
        ("application/json", b"{}"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"no boundary"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nno name\r\n--b--\r\n"),
        ("", b""),
    ):
        answer = client.post("/gradio_api/upload", content=body, headers={"content-type": kind})
        assert answer.status_code == 400, (kind, body, answer.text)
    strange = [("files", ("../../canary.txt\0", b"a")), ("files", ("/etc/passwd", b"b"))]
    names = client.post("/gradio_api/upload", files=strange).json()
    assert [client.get(f"/gradio_api/file={name}").content for name in names] == [b"a", b"b"]


def test_all_that_the_server_keeps_is_bounded(address: str) -> None:
    """The oldest files are dropped first; a client's uploads displace its own files first."""
    with visitor(address) as victim, visitor(address) as other:
        name = upload(victim, b"mine")[0]
        names = [upload(other, bytes(20 * MEBIBYTE))[0] for _ in range(5)]
        kept = [other.head(f"/gradio_api/file={one}").status_code for one in names]
        assert kept == [404, 404, 200, 200, 200]
        assert victim.get(f"/gradio_api/file={name}").content == b"mine"


# --- access ------------------------------------------------------------------------------------------------------


def test_foreign_names_and_pages_are_refused(client: httpx.Client, address: str) -> None:
    for host in (
        "elsewhere.example",
        "localhost.elsewhere.example",
        "",
        "127.0.0.1.nip.io",
        "8.8.8.8",
        "localhost:a",
        "a@localhost",
    ):
        assert client.get("/", headers={"Host": host}).status_code == 400, host
    assert raw(address, b"GET / HTTP/1.0\r\n\r\n").split()[1] == b"400"
    assert client.get("/", headers={"X-Forwarded-Host": "elsewhere.example"}).status_code == 400
    for origin in (
        "http://elsewhere.example",
        "null",
        "http://localhost:1",
        "http://127.0.0.1:1",
        address.replace("127.0.0.1", "localhost"),
    ):
        files = {"files": ("a.png", b"a")}
        assert client.post("/gradio_api/upload", files=files, headers={"Origin": origin}).status_code == 403
        body = {"fn_index": 0, "session_hash": "a", "data": [None, ""]}
        assert client.post("/gradio_api/queue/join", json=body, headers={"Origin": origin}).status_code == 403
    assert (
        client.post("/gradio_api/upload", files={"files": ("a", b"a")}, headers={"Origin": address}).status_code == 200
    )
    cross = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert client.get("/", headers=cross).status_code == 403
    assert client.get("/", headers=cross | {"Sec-Fetch-Mode": "navigate"}).status_code == 200
    page = client.get(
        "/", headers={"X-Gradio-Server": "http://elsewhere.example", "X-Direct-Url": "http://elsewhere.example"}
    )
    assert "elsewhere" not in page.text


def test_off_loopback_each_request_needs_the_token() -> None:
    process, printed = start("emoji-student", "--host", "0.0.0.0", "--allow-host", "page.example")
    address, _, token = printed.partition("/?token=")
    assert len(token) >= 32
    with httpx.Client(base_url=address, trust_env=False) as client:
        for path in (
            "/",
            "/theme.css",
            "/assets/x.js",
            "/gradio_api/queue/data?session_hash=a",
            "/x",
            "/?token=",
            "/?token=wrong",
            f"/?token={token[:-1]}",
        ):
            assert client.get(path).status_code == 401, path
            assert client.post(path).status_code == 401, path
        forged = {"Cookie": f"tinyclip-{address.rpartition(':')[2]}=abc.{'0' * 64}"}
        assert client.get("/", headers=forged).status_code == 401
        assert client.get("/", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/", headers={"Authorization": f"Bearer {token}"}).status_code == 200
        client.cookies.clear()
        answer = client.get(f"{address}//elsewhere.example/?token={token}&a=1")
        assert answer.status_code == 303 and answer.headers["location"] == "/elsewhere.example/?a=1"
        client.cookies.clear()
        answer = client.get(f"/?token={token}")
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert "HttpOnly" in answer.headers["set-cookie"] and token not in answer.headers["set-cookie"]
        assert client.get("/").status_code == 200
        assert client.get("/", headers={"Host": "page.example", "X-Forwarded-Host": "page.example"}).status_code == 200
        assert client.get("/", headers={"Host": "127.0.0.1"}).status_code == 200
        for host in ("elsewhere.example", "8.8.8.8"):
            assert client.get("/", headers={"Host": host}).status_code == 400
        assert "green apple" in str(call(client, [{"path": upload(client, apple())[0]}, LABELS])["data"])
        foreign = client.post(
            "/gradio_api/upload", files={"files": b"a"}, headers={"Origin": "http://elsewhere.example"}
        )
        assert foreign.status_code == 403
        own = client.post("/gradio_api/upload", files={"files": b"a"}, headers={"Origin": "https://page.example"})
        assert own.status_code == 200
    stop(process)


# --- shutdown ----------------------------------------------------------------------------------------------------

STUCK = """
import sys, threading
from tinyclip import __main__
from tinyclip.app import page
def stuck(*_):
    print("stuck", flush=True)
    threading.Event().wait()
page.Served.classify = stuck
__main__.main()
"""


def test_it_ends_whatever_a_worker_does(tmp_path: Path) -> None:
    process, address = start(
        "emoji-student", command=[sys.executable, "-c", STUCK], env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    with visitor(address) as client:
        name = upload(client, apple())[0]
        thread = threading.Thread(target=_try_to_join, args=(client, name))
        thread.start()
        assert process.stdout and process.stdout.readline() == "stuck\n"
        stop(process, signal.SIGTERM)
        thread.join()
    assert not left(tmp_path)


def _try_to_join(client: httpx.Client, name: str) -> None:
    with suppress(httpx.HTTPError):
        join(client, [{"path": name}, LABELS])
