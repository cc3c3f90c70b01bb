"""A hub on the loopback interface: the few endpoints that huggingface_hub needs to fetch a snapshot."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: Repositories that answer with an error: status and the hub's name for it.
ERRORS = {"fake/gated": (403, "GatedRepo"), "fake/broken": (500, "Oops")}


class Hub(ThreadingHTTPServer):
    """Serves the files of `repository` as ``fake/model`` and remembers the paths of all downloads."""

    def __init__(self, repository: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repository = repository
        self.downloads: list[str] = []
        self.requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[Path]:
        return sorted(path for path in self.repository.rglob("*") if path.is_file())


class Answer(BaseHTTPRequestHandler):
    """One request; HEAD and GET differ in the body only."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""

    def answer(self) -> None:
        self.server.requests += 1
        path = self.path.partition("?")[0].strip("/")
        repo_id = "/".join(path.removeprefix("api/models/").split("/")[:2])
        rest = path.partition(repo_id)[2].strip("/").split("/")
        if repo_id in ERRORS:
            return self.fail(*ERRORS[repo_id])
        if repo_id != "fake/model":
            return self.fail(404, "RepoNotFound")
        if len(rest) < 2 or rest[1] not in (COMMIT, "main"):
            return self.fail(404, "RevisionNotFound")
        if rest[0] == "resolve":
            return self.file("/".join(rest[2:]))
        root, files = self.server.repository, self.server.files()
        if rest[0] == "tree":
            return self.json(
                [
                    {"type": "file", "path": str(f.relative_to(root)), "size": f.stat().st_size, "oid": oid(f)}
                    for f in files
                ]
            )
        siblings = [{"rfilename": str(f.relative_to(root)), "size": f.stat().st_size} for f in files]
        return self.json({"id": "fake/model", "modelId": "fake/model", "sha": COMMIT, "siblings": siblings})

    def file(self, name: str) -> None:
        path = self.server.repository / name
        if not path.is_file():
            return self.fail(404, "EntryNotFound")
        if self.command == "GET":
            self.server.downloads.append(name)
        content = path.read_bytes()
        return self.send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{oid(path)}"', "Accept-Ranges": "bytes"})

    def json(self, content: object) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, code: str) -> None:
        self.send(status, b'{"error": "no"}', {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def running(repository: Path) -> Iterator[Hub]:
    """Serve `repository` until the block ends."""
    with Hub(repository) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
