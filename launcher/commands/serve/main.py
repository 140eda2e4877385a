"""The server: a page at /, and POST /predict with JSON. One request is answered at a time."""

import json
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from shardlaunch.checkpoints.records import to_json
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.ckpt.output import warn
from shardlaunch.launcher.commands.serve.models import InTurn, Kind, Served, open_served
from shardlaunch.launcher.commands.serve.page import page
from shardlaunch.launcher.runs.session import silent_libraries

LOCAL = ("127.0.0.1", "localhost", "::1")
MOST_BYTES = 16 << 20
_EXAMPLES: dict[Kind, dict[str, Any]] = {
    "text": {"texts": ["..."]},
    "prompt": {"prompt": "..."},
    "image": {"image": "BASE64"},
}
_LONGEST_WAIT_S = 30  # for the rest of a request that has begun


class Handler(BaseHTTPRequestHandler):
    """Answers requests with a model."""

    server: "Server"
    timeout = _LONGEST_WAIT_S

    def do_GET(self) -> None:
        """Send the page."""
        if not self._is_from_here():
            return
        if urlsplit(self.path).path != "/":
            self._send(HTTPStatus.NOT_FOUND, {"error": "there is / with GET, and /predict with POST"})
            return
        self._send(HTTPStatus.OK, page(self.server.served.kind, self.server.title).encode())

    def do_POST(self) -> None:
        """Answer a request to the model."""
        if not self._is_from_here():
            return
        if urlsplit(self.path).path != "/predict":
            self._send(HTTPStatus.NOT_FOUND, {"error": "POST is for /predict"})
            return
        if self.headers.get_content_type() != "application/json":
            self._send(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": "the request must be application/json"})
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            problem = f"the request must have a Content-Length of at most {MOST_BYTES:,} bytes"
            self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": problem})
            return
        try:
            found = self.server.in_turn.answer(self.rfile.read(int(length)))
        except (UserError, msgspec.MsgspecError) as error:
            self._send(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except Exception as error:  # of the model: the server goes on
            warn(f"a request failed: {type(error).__name__}: {error}")
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"{type(error).__name__}: {error}"})
        else:
            self._send(HTTPStatus.OK, found)

    def _is_from_here(self) -> bool:
        """Return whether a request is meant for this server, and not sent by the page of another one in a browser."""
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        origin = self.headers.get("Origin")
        is_own = origin is None or urlsplit(origin).netloc == self.headers.get("Host")
        if is_own and (name in LOCAL or self.server.is_open):
            return True
        self._send(
            HTTPStatus.FORBIDDEN, {"error": "this server answers its own page and programs of this machine only"}
        )
        return False

    def _send(self, status: HTTPStatus, content: bytes | dict[str, Any]) -> None:
        is_page = isinstance(content, bytes)
        data = content if isinstance(content, bytes) else to_json(content) + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8" if is_page else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing per request."""


class Server(ThreadingHTTPServer):
    """A server of one model."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], served: Served, title: str) -> None:
        super().__init__(address, Handler)
        self.served, self.title = served, title
        self.in_turn = InTurn(served=served)
        self.is_open = address[0] not in LOCAL

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong with a connection, unless the other side has left."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            warn(f"a connection failed: {type(error).__name__}: {error}")


def new_server(path: Path, *, host: str, port: int, ema: bool, recipe: str) -> Server:
    """Return a server of a run's model that has its port. Raises UserError."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be from 0 (any that is free) to 65535")
    with silent_libraries():
        served = open_served(path, ema=ema, recipe=recipe)
    try:
        return Server((host, port), served, title=path.name or str(path))
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; choose another --port") from error


def serve_run(path: Path, *, host: str, port: int, ema: bool, recipe: str) -> int:
    """Serve a run's model until it is interrupted."""
    server = new_server(path, host=host, port=port, ema=ema, recipe=recipe)
    if server.is_open:
        warn(f"--host {host}: everyone who reaches this machine can use the model")
    example = {"text": {"texts": ["..."]}, "prompt": {"prompt": "..."}, "image": {"image": "BASE64"}}[
        server.served.kind
    ]
    url = f"http://{host}:{server.server_port}"
    print(f"serving {path} at {url} (Ctrl-C ends it)")
    print(f"  curl -H 'Content-Type: application/json' -d '{json.dumps(example)}' {url}/predict", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
    return 0
