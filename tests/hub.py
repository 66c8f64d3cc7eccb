"""A double of the Hugging Face Hub: the few endpoints that pushing needs, with LFS and without xet.

What the real one does was read in huggingface_hub 2.4: `create_repo`, `create_commit`, `list_repo_commits`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_LARGE = 10_000  # bytes; larger files go to LFS


@dataclass
class Commit:
    """One commit: its message, and its files by path."""

    title: str
    description: str
    revision: str
    files: dict[str, bytes]


@dataclass
class Hub:
    """What is on the hub. `failing`: part of a path, how often it fails, and whether it does its work before it fails."""

    endpoint: str = ""
    commits: list[Commit] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, authorization
    failing: tuple[str, int, bool] = ("", 0, False)

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """The JSON that answers a request; raises KeyError for what is not there."""
        if path == "/api/repos/create":
            return {"url": f"{self.endpoint}/me/model", "name": "me/model", "id": "me/model"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = ["lfs" if file["size"] > _LARGE else "regular" for file in files]
            found = zip(files, modes, strict=True)
            return {
                "files": [{"path": f["path"], "uploadMode": m, "shouldIgnore": False, "oid": None} for f, m in found]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {"transfer": "basic", "objects": [self._batch(each) for each in objects]}
        if path.startswith("/blob/") and method == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/blob/")
            self.blobs[path.removeprefix("/blob/")] = body
            return {}
        if path == "/verify":
            return {}
        if (found := re.fullmatch(r"/api/models/me/model/commit/(.+)", path)) is not None:
            return self._commit(found[1], body)
        if (found := re.fullmatch(r"/api/models/me/model/commits/(.+)", path)) is not None:
            return [
                {
                    "id": f"{n:040d}",
                    "title": c.title,
                    "message": c.description,
                    "authors": [],
                    "date": "2026-01-01T00:00:00.000Z",
                }
                for n, c in reversed(list(enumerate(self.commits)))
                if c.revision == found[1]
            ]
        if path.startswith("/api/models/me/model/branch/"):
            return {}
        raise KeyError(path)

    def _batch(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.blobs:
            return wanted
        upload = {"href": f"{self.endpoint}/blob/{wanted['oid']}"}
        return {**wanted, "actions": {"upload": upload, "verify": {"href": f"{self.endpoint}/verify"}}}

    def _commit(self, revision: str, body: bytes) -> dict[str, Any]:
        head: dict[str, Any] = {}
        files = {}
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                head = value
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        self.commits.append(Commit(head["summary"], head["description"], revision, files))
        oid = f"{len(self.commits):040d}"
        url = f"{self.endpoint}/me/model/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def _any(self) -> None:
            path = self.path.partition("?")[0]
            body = self._body()
            found.requests.append((self.command, path, self.headers.get("Authorization", "")))
            part, times, late = found.failing
            fails = bool(part) and part in path and times > 0
            if fails:
                found.failing = (part, times - 1, late)
            try:
                answer, code = (found.answer(self.command, path, body), 200) if late or not fails else ({}, 500)
            except KeyError:
                answer, code = {"error": "not here"}, 404
            self._send(json.dumps(answer).encode(), 500 if fails else code)

        do_GET = do_POST = do_PUT = do_HEAD = _any

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            data = b""
            while count := int(self.rfile.readline(), 16):
                data += self.rfile.read(count)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def _send(self, data: bytes, code: int) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()
