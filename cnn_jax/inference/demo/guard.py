"""What may reach the page: its few requests, from itself alone, in bounded time, memory and connections.

Gradio has some seventy routes, takes files, and answers every site that a browser shows. Here is all that the page
sends; nothing else comes to Gradio, not even a query or a header.
"""

import asyncio
import base64
import contextlib
import json
import logging
import re
import socket
import threading
from collections.abc import Iterator

import numpy as np
import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from cnn_jax.inference.page import BOARD

ANSWER = "/gradio_api/run/predict"
# What a browser loads of Gradio; longer names are no file's.
FILES = r"theme\.css|favicon\.ico|manifest\.json|(assets|static)(/\w[\w.-]{0,200}){1,8}"
REQUESTS = re.compile(rf"(GET|HEAD) /|GET /({FILES})|POST {ANSWER}", re.ASCII)
MAXIMUM_BODY = 2**16  # bytes; a drawing has 26 kB
SECONDS = 10  # for a request, from the wait for it to the last byte of its answer
CONNECTIONS, CONNECTIONS_PER_CLIENT = 256, 32  # a browser opens 6
ANSWERS = 64  # in progress at once; those to connections that were ended go on to their ends
# No other site may show the page in a frame, hold its window, or load its parts.
ISOLATION = {
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@contextlib.contextmanager
def serve_guarded(page: ASGIApp, listener: socket.socket, host: str) -> Iterator[None]:
    """Serve a page at a listening socket until the block ends.

    Args:
      page: The page.
      listener: The socket.
      host: The host of which the user asked for the socket.
    """
    address, port = listener.getsockname()
    server = uvicorn.Server(
        uvicorn.Config(
            Guard(page, host_pattern(host, address, port)),
            http=BoundedConnection,
            loop="asyncio",
            ws="none",
            proxy_headers=False,
            backlog=CONNECTIONS,
            timeout_graceful_shutdown=1,
            log_config=None,
            log_level="critical",
        )
    )
    # asyncio would show a traceback for each connection beyond the limit of open files; they wait for others to end.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    # In the main thread uvicorn would handle the signals.
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def host_pattern(host: str, address: str, port: int) -> re.Pattern[str]:
    """Return what matches the Host headers of requests for the page.

    A site can give its own name this machine's address, and then it shares an origin with the page. So names are
    allowed only if they are known to be this machine's; an address is never another site's name.

    Args:
      host: What the user asked to listen on.
      address: The address of it; 0.0.0.0 for all that the machine has.
      port: The page's port; browsers leave out 80.
    """
    names = {host, address}
    if address in ("127.0.0.1", "0.0.0.0"):
        names.add("localhost")
    if address == "0.0.0.0":
        names |= {socket.gethostname(), f"{socket.gethostname()}.local"}
    known = "|".join(map(re.escape, sorted(names))) + (r"|[\d.]+" if address == "0.0.0.0" else "")
    return re.compile(rf"({known})(:{port}){'?' if port == 80 else ''}", re.ASCII | re.IGNORECASE)


class Guard:
    """Passes on the page's own requests, and answers any other in one line.

    Args:
      app: The page.
      hosts: What matches the page's Host headers, see `host_pattern`.
    """

    def __init__(self, app: ASGIApp, hosts: re.Pattern[str]) -> None:
        self._app = app
        self._hosts = hosts
        self._answering = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or the start or end of the server."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif refusal := self._refuse(scope):
            await refusal(scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    def _refuse(self, scope: Scope) -> PlainTextResponse | None:
        """Return why a request is refused before its body is read, or nothing."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._hosts.fullmatch(host):
            return PlainTextResponse("this page has another host or port; see --host", 421)
        if any(origin != f"http://{host}" for origin in headers.getlist("origin")):
            return PlainTextResponse("only the page itself may ask this", 403)
        if not REQUESTS.fullmatch(f"{scope['method']} {scope['path']}"):
            return PlainTextResponse("the page has no such request", 404)
        if "transfer-encoding" in headers:
            return PlainTextResponse("the length is missing", 411)
        if int(headers.get("content-length", 0)) > MAXIMUM_BODY:
            return PlainTextResponse(f"more than {MAXIMUM_BODY:,} bytes", 413)
        return None

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the page a request without its query, and of its headers and body only the host and the drawing."""
        request = Request(scope, receive)
        body = b""
        if request.method == "POST":
            try:
                body = take_drawing(await request.body())
            except ClientDisconnect:
                return
            except ValueError as error:
                await PlainTextResponse(str(error), 422)(scope, receive, send)
                return
        headers = Headers({"host": request.headers["host"], "content-type": "application/json"})
        messages = iter([{"type": "http.request", "body": body}])

        async def receive_body() -> Message:
            return next(messages, None) or await receive()  # later, the page asks whether the client is still there

        async def send_isolated(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(ISOLATION)
            await send(message)

        if self._answering >= ANSWERS:
            await PlainTextResponse("too many answers are in progress; try again", 503)(scope, receive, send)
            return
        self._answering += 1
        try:
            await self._app({**scope, "query_string": b"", "headers": headers.raw}, receive_body, send_isolated)
        finally:
            self._answering -= 1


def take_drawing(body: bytes) -> bytes:
    """Return the request for the answer to a drawing, with only the drawing of the one that a browser sent.

    Raises:
      ValueError: there is no drawing.
    """
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        call = None
    match call:
        case {"data": [str(drawing)], "fn_index": 0}:  # the page has one function
            read_drawing(drawing)
            return json.dumps({"data": [drawing], "fn_index": 0}).encode()
        case _:
            raise ValueError("this is no drawing; load the page again")


def read_drawing(drawing: str) -> np.ndarray:
    """Return the ink on the board, (BOARD, BOARD), uint8, 0 for none, of the base64 that the board sends.

    Raises:
      ValueError: it is anything else.
    """
    try:
        ink = base64.b64decode(drawing, validate=True)
    except ValueError:
        ink = b""
    if len(ink) != BOARD**2:
        raise ValueError(f"a drawing is {BOARD}x{BOARD} bytes in base64; load the page again")
    return np.frombuffer(ink, np.uint8).reshape(BOARD, BOARD)


class BoundedConnection(H11Protocol):
    """A connection that ends when a request takes too long, or when newer connections need its place."""

    _end: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the time of the first request; of too many connections, end the one that has waited longest."""
        super().connection_made(transport)
        self._end = self.loop.call_later(SECONDS, transport.abort)
        everyone = [each for each in self.connections if isinstance(each, BoundedConnection)]
        mine = [each for each in everyone if each.client and self.client and each.client[0] == self.client[0]]
        for crowd, most in ((mine, CONNECTIONS_PER_CLIENT), (everyone, CONNECTIONS)):
            if len(crowd) > most:
                oldest = min(crowd, key=lambda each: each._end.when())
                self.connections.discard(oldest)  # it is lost only later, and others may come before
                oldest.transport.abort()
                break

    def on_response_complete(self) -> None:
        """Start the time of the next request."""
        self._end.cancel()
        self._end = self.loop.call_later(SECONDS, self.transport.abort)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time."""
        self._end.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """End at once, whatever the client still sends or reads."""
        self.transport.abort()
