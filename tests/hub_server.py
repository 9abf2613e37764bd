"""A small Hugging Face Hub on loopback: as much of its HTTP interface as uploading and loading an adapter takes.

Repositories live in memory. The real `huggingface_hub` client talks to it with `HF_ENDPOINT` set to its address.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Hub:
    """What the server knows: branches of commits of files by repository, uploaded blobs, and what it was asked."""

    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    address: str = ""

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        """The files of a revision, a branch or a commit; `None` where there is none."""
        return self.commits.get(self.branches.get(repo, {}).get(revision, revision))

    def sha(self, repo: str, revision: str) -> str:
        return self.branches[repo].get(revision, revision)

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((repo, branch, sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches.setdefault(repo, {})[branch] = sha
        return sha


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")

    def answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, what: str) -> None:
        self.answer(404, {"error": what}, {"X-Error-Code": what})

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                return function(self, body, **match.groupdict())
        self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = respond


def create(request: Handler, body: bytes) -> None:
    asked = json.loads(body)
    repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
    url = f"{request.hub.address}/{repo}"
    if repo in request.hub.branches:
        return request.answer(409, {"error": "exists", "url": url})
    request.hub.commit(repo, "main", {})
    request.answer(200, {"url": url, "name": repo, "id": repo})


def branch(request: Handler, body: bytes, repo: str, name: str) -> None:
    request.hub.branches[repo][name] = request.hub.branches[repo]["main"]
    request.answer(200, {})


def info(request: Handler, body: bytes, repo: str, revision: str = "main") -> None:
    files = request.hub.files(repo, revision)
    if files is None:
        return request.missing("RevisionNotFound" if repo in request.hub.branches else "RepoNotFound")
    siblings = [{"rfilename": name} for name in files]
    request.answer(
        200,
        {"id": repo, "modelId": repo, "sha": request.hub.sha(repo, revision), "siblings": siblings, "private": False,
         "tags": [], "downloads": 0, "likes": 0},
    )  # fmt: skip


def tree(request: Handler, body: bytes, repo: str, revision: str, folder: str = "") -> None:
    files = request.hub.files(repo, revision) or {}
    entries = [
        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for name, content in files.items()
        if name.startswith(folder)
    ]
    request.answer(200, entries)


def preupload(request: Handler, body: bytes, repo: str, revision: str) -> None:
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
            "shouldIgnore": False,
        }
        for file in json.loads(body)["files"]
    ]
    request.answer(200, {"files": files})


def lfs_batch(request: Handler, body: bytes, repo: str) -> None:
    objects = [
        {
            "oid": item["oid"],
            "size": item["size"],
            "actions": {"upload": {"href": f"{request.hub.address}/blobs/{item['oid']}"}},
        }
        for item in json.loads(body)["objects"]
    ]
    request.answer(200, {"transfer": "basic", "objects": objects})


def put_blob(request: Handler, body: bytes, oid: str) -> None:
    if hashlib.sha256(body).hexdigest() != oid:
        return request.answer(400, {"error": "wrong hash"})
    request.hub.blobs[oid] = body
    request.answer(200)


def commit(request: Handler, body: bytes, repo: str, revision: str) -> None:
    files = dict(request.hub.files(repo, revision) or {})
    for line in body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            files[value["path"]] = request.hub.blobs[value["oid"]]
    sha = request.hub.commit(repo, revision, files)
    request.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{request.hub.address}/{repo}/commit/{sha}"})


def resolve(request: Handler, body: bytes, repo: str, revision: str, file: str) -> None:
    files = request.hub.files(repo, revision)
    if files is None:
        return request.missing("RevisionNotFound" if repo in request.hub.branches else "RepoNotFound")
    if file not in files:
        return request.missing("EntryNotFound")
    content = files[file]
    headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": request.hub.sha(repo, revision)}
    request.answer(200, content, headers)


ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", lambda request, body: request.answer(200, {"errors": [], "warnings": []})),
    ("POST", rf"/api/models/{REPO}/branch/(?P<name>.+)", branch),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", commit),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", tree),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", info),
    ("GET", rf"/api/models/{REPO}", info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/blobs/(?P<oid>\w+)", put_blob),
    ("GET|HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", resolve),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at `hub.address` while the context lasts."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
