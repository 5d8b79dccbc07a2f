"""Shards of captioned pictures on an HTTP server of our own, which can fail for a while."""

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, also parts of them.

    Attributes:
        asked: method, path and range of what it was asked.
        gives_parts: whether it gives parts of files.
        failures: how many requests more it answers with 503.
        kind_without_size: the type of its answers, of which it does not say the size.
    """

    asked: list[tuple[str, str, str]] = []  # noqa: RUF012
    gives_parts, failures, kind_without_size = True, 0, ""

    def send_head(self) -> Any:
        asked = self.headers.get("Range", "")
        self.asked.append((self.command, self.path, asked))
        file = Path(self.translate_path(self.path))
        if type(self).failures > 0:
            type(self).failures -= 1
            self.send_error(503)
            return None
        if self.kind_without_size:
            self.send_response(200)
            self.send_header("Content-Type", self.kind_without_size)
            self.end_headers()
            return file.open("rb")
        if not asked or not self.gives_parts or not file.is_file():
            return super().send_head()
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Content-Range", f"bytes {first}-{last}/{file.stat().st_size}")
        self.end_headers()
        self.wfile.write(file.read_bytes()[first : last + 1])
        return None

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address at which the files of a folder are."""
    Server.asked.clear()
    Server.gives_parts, Server.failures = True, 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
