"""Who may send requests to our server, and how much; the tests over HTTP are with the page (`tests/browser`)."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.commands import tinyclip
from tinyclip.app import guard, serving

TOKEN = "a-token-of-our-own"


def place(host: str, port: int = 80) -> Any:
    return SimpleNamespace(getsockname=lambda: (host, port))


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await guard.answer(send, 200, f"{scope['client_id']} {scope['query_string'].decode()}".encode())


def ask(gate: Any, query: str = "", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    """Request `/` and return the status, headers and body; header names use _ for -."""
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": "/", "headers": raw, "query_string": query.encode()}
    scope |= {"client": ("10.0.0.9", 5), "server": ("10.0.0.5", 80)}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(gate(scope, None, send))
    got = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], got, sent[1]["body"].decode()


def test_only_own_names_are_answered() -> None:
    loopback, open_ = (
        guard.Gate(hello, place("127.0.0.1"), "127.0.0.1"),
        guard.Gate(hello, place("0.0.0.0"), "Machine.lan", ["Page.Example"]),
    )
    for host in ("localhost", "localhost:80", "LOCALHOST.", "127.0.0.1:1", "[::1]:80", "::1"):
        assert ask(loopback, host=host)[0] == (400 if host == "::1" else 200), host
    for host in ("page.example", "machine.lan", "10.0.0.5", "10.0.0.5:8080"):
        assert ask(open_, host=host)[0] == 200, host
    for host in (
        "elsewhere.example",
        "10.0.0.6",
        "",
        "a b",
        "localhost:",
        "localhost:x",
        "localhost@elsewhere",
        "[::1",
        "1",
    ):
        assert ask(loopback, host=host)[0] == ask(open_, host=host)[0] == 400, host
    assert ask(loopback)[0] == 400
    assert ask(open_, host="localhost", x_forwarded_host="page.example, elsewhere.example")[0] == 400
    assert ask(open_, host="localhost", x_forwarded_host="page.example")[0] == 200


def test_other_sites_pages_are_refused() -> None:
    gate = guard.Gate(hello, place("127.0.0.1"), "127.0.0.1", ["page.example"])
    for origin, status in (
        ("http://localhost:80", 200),
        ("https://page.example", 200),
        ("https://page.example:8443", 200),
        ("http://localhost", 403),
        ("http://127.0.0.1:80", 403),
        ("http://127.0.0.1:81", 403),
        ("http://localhost:81", 403),
        ("http://elsewhere.example", 403),
        ("http://page.example.elsewhere", 403),
        ("http://localhost:80@elsewhere.example", 403),
        ("null", 403),
        ("http://[::1", 403),
        ("", 403),
    ):
        assert ask(gate, method="POST", host="localhost:80", origin=origin)[0] == status, origin
    for site, mode, status in (
        ("same-origin", "cors", 200),
        ("none", "navigate", 200),
        ("cross-site", "navigate", 200),
    ):
        assert ask(gate, host="localhost", sec_fetch_site=site, sec_fetch_mode=mode)[0] == status
    for site in ("cross-site", "same-site"):
        assert ask(gate, host="localhost", sec_fetch_site=site, sec_fetch_mode="no-cors")[0] == 403


def test_the_token_is_asked_for_and_becomes_a_cookie() -> None:
    gate, other = (guard.Gate(hello, place("0.0.0.0", 81), token=TOKEN) for _ in range(2))
    for query, more in (
        ("", {}),
        ("token=", {}),
        (f"token={TOKEN}x", {}),
        (f"token={TOKEN}&token=x", {}),
        ("token=%ff", {}),
        ("", {"authorization": "Bearer x"}),
        ("", {"authorization": f"Basic {TOKEN}"}),
        ("", {"cookie": "tinyclip-81=abc."}),
        ("", {"cookie": "tinyclip-81=ä.ö; tinyclip-81"}),
        ("", {"cookie": f"tinyclip-81={TOKEN}"}),
    ):
        for method in ("GET", "POST"):
            status, got, body = ask(gate, query, method, host="localhost", **more)
            assert status == 401 and "set-cookie" not in got and "?token=" in body, (query, more)
    status, got, _ = ask(gate, f"token={TOKEN}&a=1&b=%2F", host="localhost")
    assert status == 303 and got["location"] == "/?a=1&b=%2F"
    cookie = got["set-cookie"].partition(";")[0]
    assert (
        re.fullmatch(r"tinyclip-81=[0-9a-f]{32}\.[0-9a-f]{64}", cookie)
        and "HttpOnly; SameSite=Lax" in got["set-cookie"]
    )
    status, got, body = ask(gate, host="localhost", cookie=f"a=b; {cookie}")
    assert status == 200 and "set-cookie" not in got and body.strip() == cookie[12:44]
    assert ask(other, host="localhost", cookie=cookie)[0] == 401
    assert ask(gate, host="localhost", cookie=cookie.replace("=", "=0"))[0] == 401
    assert ask(gate, "a=1", "POST", host="localhost", authorization=f"Bearer {TOKEN}")[2] == "10.0.0.9 a=1"
    assert ask(gate, f"token={TOKEN}&a=1", "POST", host="localhost")[2] == "10.0.0.9 a=1"


def test_a_page_without_token_tells_its_clients_apart() -> None:
    gate = guard.Gate(hello, place("127.0.0.1"))
    cookies = [ask(gate, host="localhost")[1]["set-cookie"].partition(";")[0] for _ in range(2)]
    names = {ask(gate, host="localhost", cookie=cookie)[2] for cookie in cookies}
    assert len(names) == 2 and ask(gate, method="POST", host="localhost")[2] == "10.0.0.9 "


@pytest.mark.parametrize(
    ("stated", "pieces", "status"),
    [
        (None, [b"abc", b"de"], None),
        ("5", [b"abc", b"de"], None),
        ("6", [], 413),
        ("-1", [], 413),
        ("9" * 5000, [], 413),
        (None, [b"abc", b"def"], 413),
        (None, [b"abc", None], 400),
    ],
)
def test_a_body_is_bounded(stated: str | None, pieces: list[bytes | None], status: int | None) -> None:
    left = list(pieces)

    async def receive() -> Any:
        piece = left.pop(0)
        return (
            {"type": "http.disconnect"}
            if piece is None
            else {"type": "http.request", "body": piece, "more_body": bool(left)}
        )

    scope = {"headers": [(b"content-length", stated.encode())] if stated else []}
    if status is None:
        assert asyncio.run(guard.whole(scope, receive, 5)) == b"abcde"
        return
    with pytest.raises(guard.Refused) as raised:
        asyncio.run(guard.whole(scope, receive, 5))
    assert raised.value.status == status


def test_a_body_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "RECEIVE_S", 0)
    with pytest.raises(guard.Refused, match="too long"):
        asyncio.run(guard.whole({"headers": []}, lambda: asyncio.Event().wait(), 5))


def test_uploads_are_kept_within_bounds() -> None:
    async def check() -> None:
        uploads = guard.Uploads(100, 1, 3 * guard.FLOOR, 5 * guard.FLOOR, 0.01)
        loop = asyncio.get_running_loop()

        def keep(owner: str) -> str:
            return uploads._keep(guard.Kept(owner, owner.encode(), loop.time()))

        first = keep("a")
        many = [keep("b") for _ in range(5)]
        assert [uploads.owned(name, "b") for name in many] == [None, None, b"b", b"b", b"b"]
        assert uploads.owned(first, "a") == uploads.read(first) == b"a" and uploads.owned(first, "b") is None
        [keep("c") for _ in range(3)]
        assert uploads.owned(first, "a") is None and uploads.owned(many[2], "b") is None
        with pytest.raises(ValueError, match="has expired"):
            uploads.read(first)
        uploads._arriving = 5 * guard.FLOOR + 1
        with pytest.raises(guard.Refused, match="the server is busy"):
            uploads._make_room()
        uploads._arriving = 0
        for _ in range(2):  # also after none was left
            late = keep("d")
            while uploads.owned(late, "d"):
                await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(check(), 30))


def test_options_that_no_request_could_meet() -> None:
    for option, value in (("--token", "short"), ("--token", "sixteen letters and more"), ("--token", "")):
        assert option in tinyclip("app", "emoji-student", option, value, code=2)
    for name in ("", "http://page.example", "page.example:80", "page.example/a"):
        assert "--allow-host" in tinyclip("app", "emoji-student", "--allow-host", name, code=2)
    assert len(guard.new_token()) >= 32 and guard.new_token() != guard.new_token()
    guard.check_token(guard.new_token())
    guard.check_host("page.example")


def test_an_address_of_ipv6_is_what_browsers_call_it() -> None:
    there: Any = SimpleNamespace(getsockname=lambda: ("::1", 80, 0, 0))
    assert serving.is_loopback(there) and serving.host_of(there) == "[::1]"
    assert serving.address(there) == "http://[::1]:80"


def test_a_port_that_is_taken() -> None:
    with serving.listen("127.0.0.1", 0) as taken:
        assert serving.is_loopback(taken) and re.fullmatch(r"http://127\.0\.0\.1:\d+", serving.address(taken))
        with pytest.raises(ValueError, match=r"already in use; choose another with --port"):
            serving.listen("127.0.0.1", taken.getsockname()[1])
    with serving.listen("0.0.0.0", 0) as everywhere:
        assert not serving.is_loopback(everywhere) and serving.address(everywhere).startswith("http://localhost:")
    with pytest.raises(ValueError, match=r"nowhere\.invalid, port 0: "):
        serving.listen("nowhere.invalid", 0)
