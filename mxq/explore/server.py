"""The page and its answers over HTTP, for this machine only.

Bound to 127.0.0.1, and to nothing else that a request may call it: a web page elsewhere can give a
name of its own to this address, but then the Host header has that name and is refused. Nothing of
a request becomes a path: what is served is in memory, under fixed names.
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from socketserver import TCPServer
from typing import cast

ADDRESS = "127.0.0.1"

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: "
    "blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Scripts of this server only. Plotly writes its styles into the page, so those are let in."""

log = logging.getLogger("mxq")


@dataclass(frozen=True, slots=True)
class Resource:
    """A part of the page."""

    media_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Site:
    """What is served: the parts of the page by path, and ``solve`` for the query of ``/solve``.

    ``solve`` raises ValueError for a query that it does not understand.
    """

    resources: Mapping[str, Resource]
    solve: Callable[[str], Mapping[str, object]]


class LocalServer(ThreadingHTTPServer):
    """A site on a port of this machine; port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, site: Site, port: int = 0) -> None:
        self.site = site
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise ValueError(
                f"port {port} of {ADDRESS} cannot be used ({error.strerror}); "
                "give another --port, or none for a free one"
            ) from error

    def server_bind(self) -> None:
        """As HTTPServer does, without asking the network for the name of this machine."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, int(self.server_address[1])

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/"

    @property
    def hosts(self) -> frozenset[str]:
        """Host headers that are answered."""
        return frozenset({f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")})

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: object) -> None:
        """A browser that went away is no error; anything else is one of ours, and is logged."""
        if not isinstance(sys.exception(), ConnectionError):
            log.exception("a request to %s failed", self.url)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "mxq"
    sys_version = ""
    timeout = 60  # seconds that a connection may be idle

    def do_GET(self) -> None:
        server = cast(LocalServer, self.server)
        path, _, query = self.path.partition("?")
        if self.headers.get_all("Host") not in [[host] for host in server.hosts]:
            self._refuse(HTTPStatus.FORBIDDEN, f"this page is at {server.url} only")
        elif path == "/solve":
            self._solve(server.site, query)
        elif path in server.site.resources:
            self._send(HTTPStatus.OK, server.site.resources[path])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"nothing is here; the page is at {server.url}")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, such as other methods, in the form of this server."""
        self._refuse(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not worth a line of the terminal."""
        log.debug(format, *arguments)

    def _solve(self, site: Site, query: str) -> None:
        # Browsers say who asks. Other sites could not read the answer, only keep this machine busy.
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            self._refuse(HTTPStatus.FORBIDDEN, "only the page of this server may ask")
            return
        try:
            fields = site.solve(query)
        except ValueError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        self._send(HTTPStatus.OK, json_resource(fields))

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._send(status, json_resource({"error": message}))

    def _send(self, status: HTTPStatus, resource: Resource) -> None:
        self.send_response(status)
        self.send_header("Content-Type", resource.media_type)
        self.send_header("Content-Length", str(len(resource.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(resource.body)


def json_resource(fields: Mapping[str, object]) -> Resource:
    """Fields as the body of an answer."""
    text = json.dumps(fields, allow_nan=False, separators=(",", ":"))
    return Resource("application/json", text.encode())
