"""Who may open the viewer: a small server in front of viser's, which knows neither tokens nor origins.

viser listens on loopback only. The gate reads the head of each request, page or websocket, and passes the bytes of an
allowed connection on. A page opened with ?token=TOKEN gets a cookie, with which its websocket is let in too. The gate
marks what it passes on, so that the server behind can refuse who found its port and goes around.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

MARK = "X-Distill3d-Gate"  # a header of requests that the gate has passed on
HEAD_SECONDS, HEAD_BYTES = 10.0, 1 << 16  # how long and how large the head of a request may be
TOKEN = re.compile(r"[A-Za-z0-9_.~-]{8,200}")


@dataclass(frozen=True)
class Address:
    """Where the viewer is opened. Raises ValueError for an address that others can reach without a token."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0 takes a free one
    token: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"the viewer's port must be 0 to 65535, got {self.port}")
        if self.token is not None and not TOKEN.fullmatch(self.token):
            raise ValueError("the viewer's token must be at least 8 letters, digits or - _ . ~")
        if self.token is None and not self.local:
            raise ValueError(
                f"{self.host} can be reached by others: choose a token that they must give, and put it in front: "
                f"TOKEN@{self.host}:{self.port}"
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_local(self.host)

    def url(self, port: int) -> str:
        """What to open in the browser."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{port}/" + (f"?token={self.token}" if self.token else "")


def address(text: str) -> Address:
    """The address in [TOKEN@][HOST:]PORT; ValueError for anything else, and as for `Address`."""
    token, at, place = text.rpartition("@")
    host, _, port = place.rpartition(":")
    if not port.isdecimal():
        raise ValueError(f"the viewer's address must be PORT, HOST:PORT or TOKEN@HOST:PORT, got {text!r}")
    return Address(host.strip("[]") or Address.host, int(port), token if at else None)


def is_local(host: str) -> bool:
    """Whether a name or an address is this machine's loopback."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Refused(Exception):
    """Why a request is not let in."""


class Gate:
    """Passes allowed connections on to a server on loopback."""

    def __init__(self, address: Address, behind: int, loop: asyncio.AbstractEventLoop):
        """Opens it in a running event loop of another thread.

        Args:
            behind: the port of the server on 127.0.0.1.

        Raises:
            ValueError: for a port in use, or an address that is not this machine's.
        """
        self.address, self.behind, self._loop = address, behind, loop
        self.secret = secrets.token_hex(16)  # the value of MARK
        serve = asyncio.start_server(self._serve, address.host, address.port, limit=HEAD_BYTES)
        try:
            self._server = asyncio.run_coroutine_threadsafe(serve, loop).result()
        except OSError as error:
            if isinstance(error, PermissionError) or "in use" in str(error):
                why = "is in use" if "in use" in str(error) else "is not allowed"
                raise ValueError(f"port {address.port} {why}: choose another one, or 0 for any free one") from None
            raise ValueError(f"{address.host} is not an address of this machine") from None
        self.port: int = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Takes no more connections."""
        self._loop.call_soon_threadsafe(self._server.close)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            try:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HEAD_SECONDS)
                target, headers = parse(head)
                answer = self._welcome(target, headers)
            except Refused as error:
                answer = _answer("403 Forbidden", str(error))
            if answer is None:
                await self._pass_on(head, reader, writer)
            else:
                writer.write(answer)
                await writer.drain()
        writer.close()

    def _welcome(self, target: str, headers: Mapping[str, str]) -> bytes | None:
        """The answer to a request, or None where it is passed on. Raises Refused."""
        host, upgrade = headers.get("host", ""), headers.get("upgrade", "").lower() == "websocket"
        if self.address.local and not is_local(urlsplit(f"//{host}").hostname or ""):
            raise Refused("This viewer is for its own machine only.")  # a page elsewhere whose name leads here
        if upgrade and "origin" in headers and urlsplit(headers["origin"]).netloc != host:
            raise Refused("This viewer takes no connections from other pages.")
        if self.address.token is None:
            return None
        name, parts = f"distill3d-{self.port}", urlsplit(target)
        given = parse_qs(parts.query).get("token", [""])[0]
        if self._is_token(given):
            if upgrade:
                return None
            cookie = f"Set-Cookie: {name}={given}; HttpOnly; SameSite=Strict; Path=/"
            return _answer("303 See Other", "", f"Location: {parts.path or '/'}", cookie)
        with contextlib.suppress(CookieError, KeyError):
            if self._is_token(SimpleCookie(headers.get("cookie", ""))[name].value):
                return None
        raise Refused("This viewer needs its token: open the address that ends in ?token=TOKEN.")

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self.address.token or "").encode())

    async def _pass_on(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.behind)
        inner_writer.write(head[:-2] + f"{MARK}: {self.secret}\r\n\r\n".encode())
        try:
            await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
        finally:
            inner_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Passes on what comes until the other side says no more; then this side says so, too."""
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError, RuntimeError):  # closed already
        writer.write_eof()


def parse(head: bytes) -> tuple[str, dict[str, str]]:
    """Target and headers (names in lower case) of the head of an HTTP request; raises Refused."""
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or words[0] != "GET":
        raise Refused("Only GET is understood.")
    pairs = [line.partition(":") for line in lines if line]
    return words[1], {name.strip().lower(): value.strip() for name, _, value in pairs}


def _answer(status: str, text: str, *headers: str) -> bytes:
    body = text.encode()
    lines = (f"HTTP/1.1 {status}", "Content-Type: text/plain; charset=utf-8", f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, "Connection: close", *headers, "", "")).encode() + body
