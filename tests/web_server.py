"""A web server on this machine that fails as it is told."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the 5 of the standard library, workers that come at once wait for seconds


class WebServer:
    """Serves a folder; ``fail(path, number)`` says what goes wrong with the number-th request for a path.

    None: nothing; an int: that status; "cut": half of the body, then the end; "hang": no answer; "slow": by small
    pieces; "short": a whole answer that holds half of the file.
    """

    def __init__(self, folder, fail=lambda path, number: None, *, ranges=True):
        self.folder = folder
        self.fail = fail
        self.ranges = ranges
        self.requests = []
        self.failures = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 5

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                outer.answer(self, body=False)

            def do_GET(self):
                outer.answer(self, body=True)

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler, *, body):
        path = unquote(urlsplit(handler.path).path, errors="surrogateescape")
        with self._lock:
            self.requests.append((handler.command, path))
            number = self.requests.count((handler.command, path))
            failure = self.fail(path, number)
            if failure is not None:
                self.failures.append((path, failure))
        file = self.folder / path.lstrip("/")
        if failure == "hang":
            self._over.wait(30)
            handler.close_connection = True
            return
        status = failure if isinstance(failure, int) else 200 if file.is_file() else 404
        content = file.read_bytes() if status == 200 else b"no"
        if status == 200 and failure == "short":
            content = content[: len(content) // 2]
        wanted = handler.headers.get("Range")
        if status == 200 and wanted and self.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(content) - int(last))
            end = min(int(last) + 1, len(content)) if first and last else len(content)
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            content = content[start:end]
        else:
            handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        if status == 200:
            handler.send_header("ETag", f'"{file.stat().st_mtime_ns:x}"')
            handler.send_header("Accept-Ranges", "bytes" if self.ranges else "none")
        handler.end_headers()
        if not body:
            return
        if failure == "cut":
            handler.wfile.write(content[: len(content) // 2])
            handler.close_connection = True
        elif failure == "slow":
            for start in range(0, len(content), 1 + len(content) // 5):
                handler.wfile.write(content[start : start + 1 + len(content) // 5])
                handler.wfile.flush()
                time.sleep(0.02)
        else:
            handler.wfile.write(content)

    def count(self, path, command="GET"):
        return self.requests.count((command, path))


@contextmanager
def serving(folder, fail=lambda path, number: None, *, ranges=True):
    """A running :class:`WebServer`."""
    server = WebServer(folder, fail, ranges=ranges)
    thread = threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._over.set()
        server.server.shutdown()
        server.server.server_close()
        thread.join()
