"""A loopback server that speaks as much of the hub's protocol as its real client needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO = "owner/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A running hub with one repository, the files of `folder`.

    `sent_bytes` counts what each file's downloads carried. A file in `breaking` breaks off
    halfway.
    """

    folder: Path
    endpoint: str = ""
    sent_bytes: dict[str, int] = field(default_factory=dict)
    breaking: set[str] = field(default_factory=set)

    def environment(self, cache: Path) -> dict[str, str]:
        """What points huggingface_hub here, with its cache in `cache`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPO}"):
            self._listing(path)
            return
        prefix = f"/{REPO}/resolve/"
        name = path.removeprefix(prefix).partition("/")[2]
        file = self.hub.folder / name
        if not path.startswith(prefix) or not name or not file.is_file():
            code = "EntryNotFound" if path.startswith(prefix) else "RepoNotFound"
            self._send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            return
        self._file(name, file.read_bytes(), with_body)

    def _listing(self, path: str) -> None:
        names = sorted(p.name for p in self.hub.folder.iterdir())
        if "/tree/" in path:
            sizes = [(name, (self.hub.folder / name).stat().st_size) for name in names]
            body = [{"type": "file", "path": n, "size": size, "oid": n} for n, size in sizes]
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
            return
        siblings = [{"rfilename": name} for name in names]
        body = {"id": REPO, "sha": COMMIT, "siblings": siblings}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, data: bytes, with_body: bool) -> None:
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, total = 200, len(data)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else total, total)
            status, data = 206, data[start:end]
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        if not with_body:
            self._send(status, b"", headers, length=len(data))
            return
        if name in self.hub.breaking:
            self._send(status, data[: len(data) // 2], headers, length=len(data))
            self.close_connection = True
            return
        self.hub.sent_bytes[name] = self.hub.sent_bytes.get(name, 0) + len(data)
        self._send(status, data, headers)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Serve `folder` as the repository `owner/model` on a free loopback port."""
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
