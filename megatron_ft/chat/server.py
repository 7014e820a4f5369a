"""The chat page: a small server of the standard library on this machine's loopback address.

Pages of other sites cannot use it: a request must name this machine as its host (which a rebound DNS name does not), come from the page
itself if it names an origin, and send JSON. The page loads nothing from elsewhere. The browser holds the conversations.
"""

from __future__ import annotations

import json
import queue
import select
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from megatron_ft.chat.ports import LOOPBACK, refused
from megatron_ft.chat.questions import Question, parse_question
from megatron_ft.chat.values import as_values
from megatron_ft.errors import UserError

if TYPE_CHECKING:
    from megatron_ft.chat.models import Models
    from megatron_ft.chat.settings import Settings

FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HERE = {"localhost", "127.0.0.1", "::1"}
LARGEST = 4 << 20
"""Bytes of a question with its conversation."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def serve(models: Models, settings: Settings, system: str | None, port: int) -> None:
    """Serve the page until Ctrl-C. The main thread answers, one question after the other. Raise ConfigError for a port in use."""
    try:
        server = PageServer(port, models, settings, system)
    except OSError as error:
        raise refused(port, error) from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"the page is at http://{LOOPBACK}:{server.server_port}/ for this machine; Ctrl-C ends it", flush=True)
    try:
        while True:
            server.answer_next(models)
    finally:
        server.server_close()


def about(models: Models, settings: Settings, system: str | None) -> dict[str, Any]:
    """Return what the page shows before the first question."""
    return {"models": models.names, "system": system or "", "values": as_values(settings)}


class PageServer(ThreadingHTTPServer):
    """Threads read requests; questions wait in a queue for the main thread, which alone uses the models."""

    daemon_threads = True

    def __init__(self, port: int, models: Models, settings: Settings, system: str | None):
        super().__init__((LOOPBACK, port), _Handler)
        self.about, self.settings = about(models, settings, system), settings
        self.waiting: queue.Queue[_Asked] = queue.Queue()

    def answer_next(self, models: Models) -> None:
        """Answer one question, and wait for it if there is none."""
        asked = self.waiting.get()
        try:
            asked.answer(models)
        except UserError as error:
            asked.send({"error": str(error)})
        finally:
            asked.done.set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that a browser has closed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Asked:
    """A question and the connection that waits for its answer: one JSON object per line."""

    def __init__(self, question: Question, handler: BaseHTTPRequestHandler):
        self._question, self._handler = question, handler
        self._gone = False
        self.done = threading.Event()

    def answer(self, models: Models) -> None:
        if self._is_gone():
            return
        one = self._question
        reply = models.ask(one.model, one.messages, one.settings, self._show, self._is_gone)
        end = "length" if reply.answer.full else "stopped" if reply.answer.halted else "end"
        self.send({"end": end, "text": reply.answer.text, "tokens": reply.answer.tokens, "dropped": reply.dropped})

    def _show(self, text: str) -> None:
        if text:
            self.send({"more": text})

    def send(self, entry: dict[str, Any]) -> None:
        try:
            self._handler.wfile.write(json.dumps(entry).encode() + b"\n")
            self._handler.wfile.flush()
        except OSError:
            self._gone = True

    def _is_gone(self) -> bool:
        """Say if the browser has closed the connection, which its stop button does."""
        link = self._handler.connection
        if not self._gone and select.select([link], [], [], 0)[0]:
            try:
                self._gone = not link.recv(1, socket.MSG_PEEK)
            except OSError:
                self._gone = True
        return self._gone


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version, sys_version = "megatron_ft", ""
    timeout = 60

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not self._is_ours():
            self._refuse(HTTPStatus.FORBIDDEN, "this page is for this machine only")
        elif path == "/about":
            self._send(json.dumps(self.server.about).encode(), "application/json")
        elif path in FILES:
            name, kind = FILES[path]
            self._send(Path(__file__).with_name(name).read_bytes(), f"{kind}; charset=utf-8")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "no such page")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not self._is_ours():
            self._refuse(HTTPStatus.FORBIDDEN, "this page is for this machine only")
        elif self.path != "/answer":
            self._refuse(HTTPStatus.NOT_FOUND, "no such page")
        elif self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON")
        elif not (length.isascii() and length.isdigit()):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "say the length")
        elif int(length) > LARGEST:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a question has at most {LARGEST:,} bytes")
        else:
            self._answer(self.rfile.read(int(length)))

    def _answer(self, body: bytes) -> None:
        try:
            question = parse_question(body, self.server.settings, len(self.server.about["models"]))
        except UserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        self._head(HTTPStatus.OK, "application/x-ndjson")
        asked = _Asked(question, self)
        self.server.waiting.put(asked)
        asked.done.wait()

    def _is_ours(self) -> bool:
        """Say if a request names this machine, and comes from the page or from no page at all."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            return False
        if self.command == "POST" and self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return False  # a link elsewhere may lead to the page
        try:
            return urlsplit(f"//{host}").hostname in HERE
        except ValueError:
            return False

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._send(json.dumps({"error": why}).encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._head(status, kind, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind}.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: what people ask is their own."""
