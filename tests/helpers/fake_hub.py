"""A hub of one model or dataset on this machine: as much of the Hugging Face hub's HTTP interface as a fetch uses."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

STORE = "/store/"
LOCAL = "127.0.0.1"
COMMIT = "c0ffee" + 34 * "0"


@dataclass
class FakeHub:
    """Serves the files of ``folder`` as ``name``; what was asked and sent is in the attributes.

    As the hub does, it has one commit, which is the branch ``main`` and the tag ``v1``, and answers ``Range``.

    Args:
        kind: models or datasets.
        status: every request is answered with it, where it is not 200.
        error_code: the hub's own name of a refusal, beside the status.
        break_after: a download of a weight file stops after so many bytes in all and the connection closes.
        released: no content of a weight file is sent before it is set, or 60 s have passed.
        host: address of this machine that it is reached at.
    """

    folder: Path
    name: str = "org/tiny"
    kind: str = "models"
    status: int = 200
    error_code: str | None = None
    break_after: int | None = None
    released: threading.Event = field(default_factory=threading.Event)
    host: str = LOCAL
    served: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    store_tokens: set[str | None] = field(default_factory=set)
    requests: int = 0

    def __enter__(self) -> FakeHub:
        self.released.set()
        self.server = ThreadingHTTPServer((self.host, 0), type("Handler", (_Handler,), {"hub": self}))
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.server.server_address[1]}"

    @property
    def api(self) -> str:
        return f"/api/{self.kind}/{self.name}"

    def files(self) -> dict[str, Path]:
        return {str(p.relative_to(self.folder)): p for p in sorted(self.folder.rglob("*")) if p.is_file()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        hub = self.hub
        hub.requests += 1
        path = unquote(urlsplit(self.path).path)
        if path.startswith(STORE):
            hub.store_tokens.add(self.headers.get("Authorization"))
            name = path.removeprefix(STORE)
            return self._file(name, hub.files()[name], with_body=with_body)
        if hub.name in self.path:  # the client also asks for things that are no model's
            hub.tokens.add(self.headers.get("Authorization"))
        if hub.status != 200:
            code = {"X-Error-Code": hub.error_code} if hub.error_code else {}
            return self._send(hub.status, b"{}", code, with_body=with_body)
        if path.startswith(f"{hub.api}/revision/") or path == hub.api:
            if path.rpartition("/")[2] not in ("main", "v1", COMMIT, hub.name.partition("/")[2]):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body=with_body)
            siblings = [{"rfilename": name} for name in hub.files()]
            body = {"_id": "0", "id": hub.name, "modelId": hub.name, "sha": COMMIT, "siblings": siblings, "tags": []}
            return self._send(200, json.dumps(body).encode(), {}, with_body=with_body)
        if path.startswith(f"{hub.api}/tree/"):
            return self._send(
                200, json.dumps([_entry(n, p) for n, p in hub.files().items()]).encode(), {}, with_body=with_body
            )
        prefix = f"{'/datasets' if hub.kind == 'datasets' else ''}/{hub.name}/resolve/"
        if path.startswith(prefix):
            name = path.removeprefix(prefix).partition("/")[2]
            if name.endswith(".safetensors") and name in hub.files():
                return self._redirect(name, hub.files()[name])
            if name in hub.files():
                return self._file(name, hub.files()[name], with_body=with_body)
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)

    def _redirect(self, name: str, path: Path) -> None:
        """Large files are in a store of another host, where this machine has two names."""
        host = "localhost" if self.hub.host == LOCAL else self.hub.host
        store = f"http://{host}:{self.hub.server.server_address[1]}{STORE}{name}"
        linked = {"X-Linked-Size": str(path.stat().st_size), "X-Linked-ETag": f'"{_digest(path)}"'}
        self._send(302, b"", {"Location": store, "X-Repo-Commit": COMMIT, **linked}, with_body=False)

    def _file(self, name: str, path: Path, *, with_body: bool) -> None:
        hub, content = self.hub, path.read_bytes()
        start, status, headers = (
            0,
            200,
            {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(path)}"', "Accept-Ranges": "bytes"},
        )
        given = self.headers.get("Range")
        if given is not None:
            start, status = int(given.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            hub.ranges.append(f"{name} from {start}")
        body = content[start:]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body:
            return
        if hub.break_after is not None and name.endswith(".safetensors"):
            body = body[: max(0, hub.break_after - hub.served[name])]
            self.close_connection = True
        if name.endswith(".safetensors"):
            hub.released.wait(60)
        hub.served[name] += len(body)
        self.wfile.write(body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _entry(name: str, path: Path) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)[:40]}
    if name.endswith(".safetensors"):
        entry["lfs"] = {"oid": _digest(path), "size": path.stat().st_size, "pointerSize": 100}
    return entry


def _digest(path: Path) -> str:
    """As the hub's ETag: SHA-256 of a large file, 40 hexadecimal digits of a small one."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return digest if path.suffix == ".safetensors" else digest[:40]
