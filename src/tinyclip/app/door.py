"""The only access to the page's Gradio: an allowlist of routes, and calls rebuilt from their permitted fields.

Gradio copies, fetches and serves any file that its clients name. Clients' files never reach it: we keep the uploads,
and calls contain only an upload's name, a plain word.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from tinyclip.app.guard import Refused, Uploads, answer, whole

CALL = 2**20  # bytes
WAITING = 8  # results that a client may leave uncollected
PAGE = re.compile(r"/|/theme\.css|/favicon\.ico|/(assets|static)(/[\w@+-][\w.@+-]*)+", re.ASCII)
API = "/gradio_api"
UPLOADED = re.compile(rf"{API}/file=([0-9a-f]{{32}})", re.ASCII)
GONE = "gone"  # a name that no upload has
# Request headers passed on to Gradio, which trusts others too, such as those naming the sender.
TOLD = {"host", "accept", "accept-encoding", "accept-language", "if-none-match", "if-modified-since"}
TOLD |= {"x-forwarded-host", "x-forwarded-proto"}
MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"BM": "image/bmp"}


class Door:
    """Stands in front of a Gradio app mounted in `app`; results are held for the newest `sessions` pages."""

    def __init__(self, app: Any, blocks: Any, uploads: Uploads, sessions: int) -> None:
        self.app, self.blocks, self.uploads, self.sessions = app, blocks, uploads, sessions

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        reads, upload = method in ("GET", "HEAD"), UPLOADED.fullmatch(path)
        if reads and PAGE.fullmatch(path):
            await self._pass(scope, receive, send)
        elif reads and upload:
            await self._show(scope, send, upload[1])
        elif method == "GET" and path == f"{API}/queue/data":
            stated = re.search(r"(?:^|&)session_hash=(\w+)", scope["query_string"].decode("latin-1"), re.ASCII)
            session = _session(scope, stated and stated[1])
            if session not in self.blocks._queue.pending_messages_per_session:
                raise Refused(404, "nothing was asked")
            await self._pass(scope, receive, send, f"session_hash={session}")
        elif method == "POST" and path == f"{API}/upload":
            names = await self.uploads.take(scope, receive)
            await answer(send, 200, json.dumps(names).encode(), "application/json")
        elif method == "GET" and path == f"{API}/upload_progress":  # polled by the page; uploads are short
            await answer(send, 200, b'data: {"msg": "done"}\n\n', "text/event-stream")
        elif method == "POST" and path == f"{API}/queue/join":
            await self._join(scope, receive, send)
        else:
            raise Refused(404, "not here")

    async def _pass(self, scope: Any, receive: Any, send: Any, query: str = "", body: bytes | None = None) -> None:
        headers = [(key, value) for key, value in scope["headers"] if key.decode("latin-1") in TOLD]
        if body is not None:
            headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        given = scope | {"headers": headers, "query_string": query.encode("ascii")}
        told = body is None

        async def rebuilt() -> Any:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(given, rebuilt, send)

    async def _show(self, scope: Any, send: Any, name: str) -> None:
        """Serve an upload to its sender, for the preview next to the button."""
        data = self.uploads.owned(name, scope["client_id"])
        if data is None:
            raise Refused(404, "not here")
        kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), None)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            kind = "image/webp"
        if data[4:12] in (b"ftypavif", b"ftypavis"):
            kind = "image/avif"
        policy = {"content_security_policy": "sandbox; default-src 'none'"}
        if kind is None:  # nothing that a browser would execute under our origin
            policy["content_disposition"] = "attachment"
        body = data if scope["method"] == "GET" else b""
        await answer(send, 200, body, kind or "application/octet-stream", **policy)

    async def _join(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            given = json.loads(await whole(scope, receive, CALL), parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise Refused(400, "expected a JSON object") from None
        call = self._rebuilt(given, scope)
        self._forget_uncollected()
        waiting = self.blocks._queue.pending_event_ids_session.get(call["session_hash"], ())
        if len(waiting) >= WAITING:
            raise Refused(429, "too many calls at once")
        await self._pass(scope, receive, send, body=json.dumps(call).encode())

    def _forget_uncollected(self) -> None:
        """Drop uncollected results, which Gradio would keep."""
        queue = self.blocks._queue
        working = {event.session_hash for event in queue.event_ids_to_events.values()}
        done = [session for session in queue.pending_messages_per_session if session not in working]
        kept = working.union(done[-self.sessions :])
        for table in (queue.pending_messages_per_session, queue.pending_event_ids_session):
            for session in [session for session in table if session not in kept]:
                del table[session]

    def _rebuilt(self, given: Any, scope: Any) -> dict[str, Any]:
        """Rebuild a call from only the fields that the page's own calls have.

        Raises:
            Refused: when it names no function of the page, or its values do not match that function's fields.
        """
        import gradio

        number = given.get("fn_index") if isinstance(given, dict) else None
        function = self.blocks.fns.get(number) if type(number) is int else None
        if function is None:
            raise Refused(400, "unknown function")
        values, inputs = given.get("data"), function.inputs
        if not isinstance(values, list) or len(values) != len(inputs):
            raise Refused(400, f"a call has {len(inputs)} values in a list")
        data: list[Any] = []
        for value, field in zip(values, inputs, strict=True):
            if isinstance(field, gradio.Image):
                data.append(self._picture(value, scope))
            else:
                data.append(_number(value) if isinstance(field, gradio.Slider) else _text(value))
        return {"fn_index": number, "session_hash": _session(scope, given.get("session_hash")), "data": data}

    def _picture(self, value: Any, scope: Any) -> str | None:
        """Return the name of this client's upload, the only part of the page's file data that is read."""
        if value is None:
            return None
        name = value.get("path") if isinstance(value, dict) else None
        if not isinstance(name, str):
            raise Refused(400, "expected a picture as the upload returned it")
        return name if self.uploads.owned(name, scope["client_id"]) is not None else GONE


def _text(value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise Refused(400, "expected text")
    if value and re.search("[\ud800-\udfff]", value):
        raise Refused(400, "not valid text: an unpaired surrogate")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > 1e6:
        raise Refused(400, "expected a number")
    return value


def _session(scope: Any, name: Any) -> str:
    """Bind Gradio's session name for an open page to this client, so no other client can read its results."""
    if not isinstance(name, str) or not re.fullmatch(r"\w{1,64}", name, re.ASCII):
        raise Refused(400, "session_hash is missing")
    return hashlib.sha256(f"{scope['client_id']} {name}".encode()).hexdigest()


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
