"""Protection for our pages and APIs: who may send requests, and how much data. ASGI, independent of Gradio.

Uploads are kept in memory under names that cannot be guessed, so nothing a client sends ever names a file.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from tinyclip.app.serving import host_of, is_loopback

SHORTEST_TOKEN = 16  # characters
RECEIVE_S = 120  # seconds in which a body must arrive
FRAMING = FLOOR = 2**16  # bytes: for part headers in a request; least that a file counts for
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:/?#@\[\]\s]+)(:\d{1,5})?", re.ASCII)
TEXT = "text/plain; charset=utf-8"
SAFETY = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "same-origin",
}


class Refused(Exception):
    """A request that is refused with a status and a line of text."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status, self.line = status, line


async def answer(send: Any, status: int, body: bytes = b"", kind: str = TEXT, **more: str) -> None:
    """Send a complete response; `more` are extra headers, with `_` for `-`."""
    headers = {"content-type": kind, "content-length": str(len(body)), "cache-control": "no-store"}
    headers |= {name.replace("_", "-"): value for name, value in more.items()}
    raw = [(name.encode("ascii"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def fields(scope: Any, name: str) -> list[str]:
    """Return all values of a header."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name.encode("ascii")]


# --- who may ask -------------------------------------------------------------------------------------------------


def new_token() -> str:
    return secrets.token_urlsafe(24)


def check_token(token: str) -> None:
    """Refuse a token that could be guessed, or that does not fit in a URL.

    Raises:
        ValueError: when it is too short or contains characters other than ASCII letters, digits and `._~-`.
    """
    if len(token) < SHORTEST_TOKEN or not re.fullmatch(r"[\w.~-]+", token, re.ASCII):
        raise ValueError(f"--token: at least {SHORTEST_TOKEN} characters, only letters, digits and . _ ~ -")


def check_host(name: str) -> None:
    """Refuse a name that no Host header can have.

    Raises:
        ValueError: for an address with a scheme or a port, or an empty name.
    """
    found = HOST.fullmatch(name.lower())
    if not found or found[2]:
        raise ValueError(f"--allow-host {name!r}: give only a host name or address, such as example.org")


class Gate:
    """Admits only requests to this server's own names, from its own pages, and with the token if one is set.

    Clients are identified by a signed cookie set by the page, or by their address if they keep no cookies. The app
    behind the gate finds the client in `scope["client_id"]`.

    Args:
        host: the host that `place` was requested with, possibly a name.
        proxies: names of proxies in front of the server; pages served through them count as its own, on any port.
        token: token that each request must have, in a cookie (set by `?token=`), in the query, or as a bearer token.
    """

    def __init__(
        self,
        app: Any,
        place: socket.socket,
        host: str = "localhost",
        proxies: Sequence[str] = (),
        token: str | None = None,
    ) -> None:
        self.app, self.token, self.proxies = app, token, {name.lower().strip("[]") for name in proxies}
        self.names = {"localhost", "127.0.0.1", "::1", host_of(place).strip("[]"), host.lower()} | self.proxies
        if not is_loopback(place):
            machine = socket.gethostname().lower()
            self.names |= {machine, f"{machine}.local"}
        self.cookie = f"tinyclip-{place.getsockname()[1]}"  # browsers share cookies between ports
        self.secret = secrets.token_bytes(32)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        fresh = ""  # a new cookie for this client

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = SAFETY | ({"set-cookie": fresh} if fresh else {})
                added = [(name.encode("ascii"), value.encode("ascii")) for name, value in more.items()]
                message = message | {"headers": [*message.get("headers", ()), *added]}
            await send(message)

        try:
            self._check_names(scope)
            known = self._client(scope)
            asked = self._without_token(scope)
            if not (known or asked is not None or self._is_bearer(scope) or self.token is None):
                line = "a token is required: open the address that the server printed, with ?token= in it"
                raise Refused(401, f"{line}, or send it as a bearer")
            reads = scope["method"] in ("GET", "HEAD")
            if not known and reads and (asked is not None or scope["path"] == "/"):
                known, fresh = self._new_cookie(scope)
            if asked is not None and reads:
                place = "/" + quote(scope["path"].lstrip("/")) + (f"?{asked}" if asked else "")
                await answer(guarded, 303, location=place)
                return
            query = scope["query_string"] if asked is None else asked.encode("ascii")
            address = scope["client"][0] if scope.get("client") else ""
            await self.app(scope | {"client_id": known or address, "query_string": query}, receive, guarded)
        except Refused as refusal:
            more = {"www_authenticate": "Bearer"} if refusal.status == 401 else {}
            await answer(guarded, refusal.status, f"{refusal.line}\n".encode(), **more)

    def _check_names(self, scope: Any) -> None:
        hosts = fields(scope, "host")
        if len(hosts) != 1 or not all(self._is_ours(host, scope) for host in (*hosts, *forwarded(scope))):
            raise Refused(400, "this host name is not allowed; add it with --allow-host")
        for origin in fields(scope, "origin"):
            site = origin.lower().partition("://")[2]
            if site != hosts[0].lower() and _name(site) not in self.proxies:
                raise Refused(403, "requests from other sites are refused")
        embedded = any(mode != "navigate" for mode in fields(scope, "sec-fetch-mode"))
        if embedded and any(site in ("cross-site", "same-site") for site in fields(scope, "sec-fetch-site")):
            raise Refused(403, "requests from other sites are refused")

    def _is_ours(self, host: str, scope: Any) -> bool:
        """Whether a Host is one of our names, or the address that the client is connected to."""
        name = _name(host)
        try:
            return name in self.names or ip_address(name) == ip_address(scope["server"][0].partition("%")[0])
        except (ValueError, TypeError):
            return False

    def _is_bearer(self, scope: Any) -> bool:
        shown = [value.partition(" ") for value in fields(scope, "authorization")]
        return any(scheme.lower() == "bearer" and self._is_token(value.strip()) for scheme, _, value in shown)

    def _is_token(self, shown: str) -> bool:
        return self.token is not None and hmac.compare_digest(shown.encode(), self.token.encode())

    def _without_token(self, scope: Any) -> str | None:
        """Return the query without its token, or None if it has no valid token."""
        try:
            query = parse_qs(scope["query_string"].decode("ascii"), keep_blank_values=True, max_num_fields=50)
        except ValueError:
            return None
        shown = query.pop("token", [])
        return urlencode(query, doseq=True) if len(shown) == 1 and self._is_token(shown[0]) else None

    def _client(self, scope: Any) -> str | None:
        """Return the id from our cookie, or None."""
        crumbs = [crumb.strip().partition("=") for value in fields(scope, "cookie") for crumb in value.split(";")]
        for name, _, value in crumbs:
            identity, _, signature = value.partition(".")
            if name == self.cookie and hmac.compare_digest(signature.encode(), self._sign(identity).encode()):
                return identity
        return None

    def _new_cookie(self, scope: Any) -> tuple[str, str]:
        identity = secrets.token_hex(16)
        secure = "; Secure" if "https" in fields(scope, "x-forwarded-proto") else ""
        # Lax, so that links in mails or notebooks open the page. POSTs from other sites are refused by their Origin.
        return identity, f"{self.cookie}={identity}.{self._sign(identity)}; Path=/; HttpOnly; SameSite=Lax{secure}"

    def _sign(self, identity: str) -> str:
        return hmac.digest(self.secret, identity.encode(), "sha256").hex()


def forwarded(scope: Any) -> list[str]:
    """Return the hosts that a proxy reports as requested."""
    return [one.strip() for value in fields(scope, "x-forwarded-host") for one in value.split(",")]


def _name(host: str) -> str:
    found = HOST.fullmatch(host.lower())
    return found[1].strip("[]").rstrip(".") if found else ""


# --- how much may be sent ----------------------------------------------------------------------------------------


async def chunks(scope: Any, receive: Any, most: int, framing: int = 0) -> AsyncIterator[bytes]:
    """Yield a request's body in chunks, allowing `framing` extra bytes for what separates its parts.

    Raises:
        Refused: when it is longer than `most` bytes, declared or sent; takes over `RECEIVE_S`; or breaks off.
    """
    too_large = Refused(413, f"too large: {most:,} bytes at most")
    stated = fields(scope, "content-length")
    if any(not length.isdecimal() or len(length) > 15 or int(length) > most + framing for length in stated):
        raise too_large
    until, sum_, more = asyncio.get_running_loop().time() + RECEIVE_S, 0, True
    while more:
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            raise Refused(408, "the request body took too long") from None
        if message["type"] != "http.request":
            raise Refused(400, "the request body ended early")
        sum_, more = sum_ + len(message.get("body", b"")), message.get("more_body", False)
        if sum_ > most + framing:
            raise too_large
        yield message.get("body", b"")


async def whole(scope: Any, receive: Any, most: int) -> bytes:
    """Return a request's whole body; raises as `chunks`."""
    return b"".join([piece async for piece in chunks(scope, receive, most)])


@dataclass(frozen=True)
class Kept:
    owner: str
    data: bytes
    since: float  # on the event loop's clock

    @property
    def weight(self) -> int:
        """The bytes charged for the upload; even a tiny file has overhead."""
        return max(len(self.data), FLOOR)


class Uploads:
    """Clients' uploads, in memory under unguessable names, each accessible only to its owner.

    Args:
        request: most bytes per request, over all its files.
        files: most files per request.
        own: bytes kept per client; beyond that, its oldest uploads are dropped.
        all: bytes kept and arriving for all clients; beyond that, the oldest uploads are dropped, or new ones refused.
        seconds: how long a file is kept.
    """

    def __init__(self, request: int, files: int, own: int, all: int, seconds: float) -> None:
        self.request, self.files, self.own, self.all, self.seconds = request, files, own, all, seconds
        self._kept: dict[str, Kept] = {}  # oldest first
        self._arriving = 0
        self._watched = False  # whether a call of `_forget` is scheduled

    def owned(self, name: str, client: str) -> bytes | None:
        """Return a client's own upload by the name it was given, or None."""
        kept = self._kept.get(name)
        return kept.data if kept and hmac.compare_digest(kept.owner.encode(), client.encode()) else None

    def read(self, name: str) -> bytes:
        """Return an upload without checking its owner; call `owned` first.

        Raises:
            ValueError: when it is no longer kept.
        """
        kept = self._kept.get(name)
        if kept is None:
            raise ValueError("The picture has expired: choose it again.")
        return kept.data

    async def take(self, scope: Any, receive: Any) -> list[str]:
        """Store the files of a multipart request, all or none, and return their names.

        Raises:
            Refused: when it is not multipart, has too many bytes or files, or when the server has no room.
        """
        from starlette.datastructures import Headers, UploadFile
        from starlette.formparsers import MultiPartException, MultiPartParser

        class InMemory(MultiPartParser):
            spool_max_size = 0  # with size 0, a spooled file never rolls over to disk

        headers = Headers(scope=scope)
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            raise Refused(400, "multipart/form-data is needed")
        arrived = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal arrived
            async for piece in chunks(scope, receive, self.request, FRAMING):
                arrived, self._arriving = arrived + len(piece), self._arriving + len(piece)
                self._make_room()
                yield piece

        try:
            most: dict[str, Any] = {"max_files": self.files, "max_fields": 0}
            form = await InMemory(headers, counted(), **most).parse()
            data = [await file.read() for file in form.getlist("files") if isinstance(file, UploadFile)]
            await form.close()
        except MultiPartException as error:
            raise Refused(413 if "Too many" in error.message else 400, error.message) from None
        except (ValueError, KeyError, AssertionError):
            raise Refused(400, "a malformed multipart body") from None
        finally:
            self._arriving -= arrived
        if sum(map(len, data)) > self.request:
            raise Refused(413, f"too large: {self.request:,} bytes at most")
        return [self._keep(Kept(scope["client_id"], one, asyncio.get_running_loop().time())) for one in data]

    def _keep(self, new: Kept) -> str:
        name = secrets.token_hex(16)
        self._kept[name] = new
        if not self._watched:
            asyncio.get_running_loop().call_later(self.seconds, self._forget)
            self._watched = True
        own = [key for key, kept in self._kept.items() if kept.owner == new.owner]
        while len(own) > 1 and sum(self._kept[key].weight for key in own) > self.own:
            del self._kept[own.pop(0)]
        self._make_room()
        return name

    def _forget(self) -> None:
        """Drop expired uploads, and schedule the next call for the rest."""
        loop = asyncio.get_running_loop()
        while self._kept and self._oldest().since + self.seconds <= loop.time():
            del self._kept[next(iter(self._kept))]
        self._watched = bool(self._kept)
        if self._watched:
            loop.call_at(self._oldest().since + self.seconds, self._forget)

    def _oldest(self) -> Kept:
        return next(iter(self._kept.values()))

    def _make_room(self) -> None:
        while self._kept and sum(kept.weight for kept in self._kept.values()) + self._arriving > self.all:
            del self._kept[next(iter(self._kept))]
        if self._arriving > self.all:
            raise Refused(503, "the server is busy: try again")
