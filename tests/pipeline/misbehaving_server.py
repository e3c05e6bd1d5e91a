"""A web server on loopback that hands out one file, in ranges, and does wrong what it is told to."""

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any

SLICE = 1 << 16  # bytes written at a time


@dataclass(frozen=True)
class Fault:
    """What is done wrong at one request."""

    status: int = 0  # answered instead of the file
    headers: dict[str, str | None] = field(default_factory=dict)  # set, or left out where None
    whole: bool = False  # answers 200 and the file, whatever range was asked for
    stop_after: int | None = None  # bytes of the body, then:
    then: str = "close"  # or "reset" the connection, or "stall" until the server ends or is told to go on
    shift: int = 0  # the Content-Range, and the body, begin so many bytes late
    chunked: bool = False  # no Content-Length


@dataclass
class Server:
    """What is handed out, how, and what was asked for."""

    content: bytes
    url: str = ""
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    faults: list[Fault | None] = field(default_factory=list)  # at the next requests, in turn
    always: Fault | None = None  # at all the others
    asked: list[dict[str, str]] = field(default_factory=list)  # headers of each request, and its "path"
    sent: list[tuple[int, int]] = field(default_factory=list)  # (first byte, behind the last) of each body
    go_on: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def sent_bytes(self) -> int:
        with self.lock:
            return sum(end - first for first, end in self.sent)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 9  # seconds that a connection may lie idle
    server: Any

    def do_GET(self) -> None:
        record: Server = self.server.record
        with record.lock:
            record.asked.append({"path": self.path, **dict(self.headers.items())})
            fault = (record.faults.pop(0) if record.faults else record.always) or Fault()
        content, validator = record.content, record.etag or record.modified
        first, end, status = 0, len(content), 200
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and record.ranges and not fault.whole and self.headers.get("If-Range") in (None, validator):
            first, end, status = int(span[1]), min(int(span[2] or len(content) - 1) + 1, len(content)), 206
        if status == 206 and first >= len(content):
            status, first, end = 416, 0, 0
        if fault.status:
            status, first, end = fault.status, 0, 0
        first += fault.shift
        headers: dict[str, str | None] = {"Content-Length": str(end - first), "ETag": record.etag}
        headers["Last-Modified"] = record.modified
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
        if fault.chunked:
            headers |= {"Content-Length": None, "Transfer-Encoding": "chunked"}
        self.send_response(status)
        for name, text in (headers | fault.headers).items():
            if text is not None:
                self.send_header(name, text)
        self.end_headers()
        self._send(record, fault, first, end)

    def _send(self, record: Server, fault: Fault, first: int, end: int) -> None:
        stop = end if fault.stop_after is None else min(end, first + fault.stop_after)
        with record.lock:
            number = len(record.sent)
            record.sent.append((first, first))
        with contextlib.suppress(OSError):  # who asked is gone
            for start in range(first, stop, SLICE):
                body = record.content[start : min(start + SLICE, stop)]
                with record.lock:  # before it is written: who asked may look at it as soon as all has come
                    record.sent[number] = (first, start + len(body))
                self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body) if fault.chunked else body)
            if fault.chunked and stop == end:
                self.wfile.write(b"0\r\n\r\n")
        if stop < end:
            self.close_connection = True
            if fault.then == "stall":
                record.go_on.wait()
            elif fault.then == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def log_message(self, *arguments: Any) -> None:
        pass


class _One(HTTPServer):
    """Serves one connection until it is closed, and then the next."""

    def shutdown_request(self, request: Any) -> None:
        with contextlib.suppress(OSError):  # a connection that was reset
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # who asked is gone


class _Threads(_One, ThreadingHTTPServer):
    pass


@contextlib.contextmanager
def running(content: bytes, one_at_a_time: bool = False, **how: Any) -> Iterator[Server]:
    """A server at http://127.0.0.1:PORT/x.zip."""
    with (_One if one_at_a_time else _Threads)(("127.0.0.1", 0), _Handler) as server:
        record = Server(content, f"http://127.0.0.1:{server.server_port}", **how)
        server.record = record  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield record
        finally:
            record.go_on.set()
            server.shutdown()
            thread.join()
