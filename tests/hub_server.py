"""A small Hugging Face hub on loopback: the answers that huggingface_hub asks for when it downloads a model."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
INFO = re.compile(rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?")
TREE = re.compile(rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)")
FILE = re.compile(rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


def sha1(data: bytes) -> str:
    """Forty hex digits, as git names blobs and commits."""
    return hashlib.sha1(data).hexdigest()


class Hub:
    """The repositories of a hub, what was asked of it, and how it misbehaves.

    repos:     repo id -> revision -> file name -> bytes
    requests:  "METHOD /path" of every request so far
    gated:     repos whose files only a token opens
    answers:   path -> a body to answer with, whatever was asked for there
    stalled:   a file's name -> set when it is asked for; after half of its bytes nothing more comes until `released`
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.answers: dict[str, bytes] = {}
        self.stalled: dict[str, threading.Event] = {}
        self.released = threading.Event()
        self.url = ""

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Put a commit at the tip of a revision, and say its hash."""
        self.repos.setdefault(repo, {})[revision] = files
        return self.commit(repo, revision)

    def commit(self, repo: str, revision: str) -> str:
        """The commit at the tip of a revision: the hash of its files."""
        files = self.repos[repo][revision]
        return sha1("".join(f"{name} {sha1(data)}\n" for name, data in sorted(files.items())).encode())

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and files of a branch, a tag or a commit."""
        for tip, files in self.repos[repo].items():
            if revision in (tip, self.commit(repo, tip)):
                return self.commit(repo, tip), files
        return None


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port of 127.0.0.1, until the block ends."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            hub.released.set()
            server.shutdown()
            thread.join()


def point_at(hub: Hub, home: Path, monkeypatch: Any) -> None:
    """Make this process ask `hub`, with a cache in `home`, whatever the settings, the token and the cache of its user are."""
    from huggingface_hub import constants

    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(variable, value)
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):  # these were fixed when huggingface_hub was imported
        monkeypatch.setattr(constants, name, str(home / name))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # else it would ask the hub it was imported for


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body right after its headers would wait 40 ms

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        if path in self.hub.answers:
            self.send(200, self.hub.answers[path])
            return
        for pattern, respond in ((TREE, self.tree), (INFO, self.info), (FILE, self.file)):
            if asked := pattern.fullmatch(path):
                if found := self.lookup(asked["repo"], unquote(asked["revision"] or "main")):
                    respond(asked, *found)
                return
        self.send(404, b"not found")

    def lookup(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in self.hub.repos:  # the real hub says 401, so as not to tell private repositories from missing ones
            self.send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        if not (found := self.hub.find(repo, revision)):
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
        return found

    def info(self, asked: re.Match[str], commit: str, files: dict[str, bytes]) -> None:
        siblings = [{"rfilename": name, "size": len(data), "blobId": sha1(data)} for name, data in files.items()]
        config = json.loads(files.get("config.json", b"{}"))
        self.send_json({"_id": "0", "id": asked["repo"], "sha": commit, "siblings": siblings, "tags": [], "config": config})

    def tree(self, _asked: re.Match[str], _commit: str, files: dict[str, bytes]) -> None:
        self.send_json([{"type": "file", "path": name, "size": len(data), "oid": sha1(data)} for name, data in files.items()])

    def file(self, asked: re.Match[str], commit: str, files: dict[str, bytes]) -> None:
        if asked["repo"] in self.hub.gated and "Authorization" not in self.headers:
            self.send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this repository is restricted"})
            return
        name = unquote(asked["file"])
        data = files[name]
        headers = {
            "ETag": f'"{sha1(data)}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'inline; filename="{name}";',
        }
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(206 if wanted else 200, data[start:], headers, stalled=self.hub.stalled.get(name))

    def send_json(self, document: Any) -> None:
        self.send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, stalled: threading.Event | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if stalled:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            stalled.set()
            self.hub.released.wait(30)
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name that http.server gives it)
        """Keep quiet: `requests` has them."""
