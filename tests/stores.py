"""An object store that speaks S3, in a process of its own, and a proxy before it that fails as stores do."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from clusters import find_ports

BUCKET = "bucket"


@dataclass
class Faults:
    """How a store misbehaves.

    Args:
        refused: the share of requests that are answered by 503.
        dropped: of those whose connection ends before an answer.
        cut: of answers that end in the middle.
        cut_short: of uploads of which the first half is kept, and called whole.
        delay_s: how long each answer takes.
        unseen_s: how long what was written is not there for those who ask.
    """

    refused: float = 0.0
    dropped: float = 0.0
    cut: float = 0.0
    cut_short: float = 0.0
    delay_s: float = 0.0
    unseen_s: float = 0.0
    met: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self._rng, self._lock = random.Random(self.seed), threading.Lock()

    def draw(self, kind: str) -> bool:
        """Tell whether to fail in this way now, and count it."""
        with self._lock:
            struck = self._rng.random() < getattr(self, kind)
            self.met[kind] = self.met.get(kind, 0) + struck
            return struck


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a store, or not."""

    daemon_threads = True

    def __init__(self, store: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.store, self.faults = store, Faults()
        self.asked: list[tuple[str, str]] = []
        self.written: dict[str, float] = {}

    def handle_error(self, request: object, address: object) -> None:
        """Say nothing of callers who went away."""


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def pass_on(self) -> None:
        """Answer as the store does, or fail as is told."""
        body = self.read_body()
        faults, path = self.server.faults, self.path.partition("?")[0]
        self.server.asked.append((self.command, path))
        time.sleep(faults.delay_s)
        if faults.draw("dropped"):
            return self.end()
        if faults.draw("refused"):
            return self.answer(
                503, {}, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"
            )
        if self.command in ("GET", "HEAD") and time.monotonic() < self.server.written.get(path, 0):
            faults.met["unseen"] = faults.met.get("unseen", 0) + 1
            return self.answer(404, {}, b"<Error><Code>NoSuchKey</Code></Error>")
        if self.command == "PUT" and len(body) > 1 and faults.draw("cut_short"):
            body = body[: len(body) // 2]
        store = http.client.HTTPConnection("127.0.0.1", self.server.store, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        store.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        found = store.getresponse()
        content = found.read()
        if self.command == "PUT":
            self.server.written[path] = time.monotonic() + faults.unseen_s
        self.answer(found.status, dict(found.getheaders()), content, cut=len(content) > 1000 and faults.draw("cut"))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def read_body(self) -> bytes:
        """Give what the caller sends, as a whole or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def answer(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
        """Send an answer, or the first half of one."""
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        length = headers.get("content-length") or headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.end()

    def end(self) -> None:
        """Close the connection as a machine does that goes down."""
        self.close_connection = True
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def start_store() -> Iterator[Proxy]:
    """Run a store with one empty bucket, and a proxy before it, as long as the block lasts."""
    [port] = find_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    proxy = Proxy(port)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        make_bucket(f"http://127.0.0.1:{port}/{BUCKET}", run)
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        run.terminate()
        run.wait(30)


def make_bucket(url: str, run: subprocess.Popen) -> None:
    for _ in range(300):
        assert run.poll() is None, "the store ended"
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()
            return
        time.sleep(0.1)
    raise AssertionError("the store does not start")


def name_place(proxy: Proxy, prefix: str) -> str:
    """Give the URI of a folder in the store, by way of the proxy."""
    options = f"endpoint_override=127.0.0.1:{proxy.server_port}&scheme=http&region=us-east-1"
    return f"s3://key:secret@{BUCKET}/{prefix}?{options}"
