"""A small server that speaks the part of the Hugging Face hub's API that fetching a model uses, for the tests.

Repositories are held in memory.  It writes down what it was asked, and can break the connection in the middle of a
file, once.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class HubServer:
    """``with HubServer({"org/name": {"config.json": b"{}"}}) as hub: ... hub.url``"""

    repos: dict[str, dict[str, bytes]]
    break_once: dict[str, int] = field(default_factory=dict)
    """After how many bytes of a file, by its path, the connection is cut the first time."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range header of each request."""

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def downloads(self, path):
        """The Range headers of the downloads of one file, in order; None for a whole one."""
        return [range_ for method, asked, range_ in self.requests if method == "GET" and asked.endswith("/" + path)]

    def commit(self, repo):
        return hashlib.sha1(repo.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(with_body=True)

    def do_HEAD(self):
        self._answer(with_body=False)

    def _answer(self, with_body):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if match := _API.fullmatch(path):
            self._answer_api(**match.groupdict())
        elif match := _FILE.fullmatch(path):
            self._answer_file(match["repo"], match["revision"], match["path"], with_body)
        else:
            self._refuse("EntryNotFound")

    def _answer_api(self, repo, what, revision):
        if repo not in self.hub.repos:
            return self._refuse("RepoNotFound")
        if not self._knows(repo, revision):
            return self._refuse("RevisionNotFound")
        files = self.hub.repos[repo]
        if what == "tree":
            return self._send_json([_tree_entry(path, content) for path, content in files.items()])
        siblings = [{"rfilename": path} for path in files]
        return self._send_json(
            {"_id": "1", "id": repo, "modelId": repo, "sha": self.hub.commit(repo), "private": False, "tags": [],
             "downloads": 0, "likes": 0, "siblings": siblings}
        )  # fmt: skip

    def _answer_file(self, repo, revision, path, with_body):
        if repo not in self.hub.repos:
            return self._refuse("RepoNotFound")
        if not self._knows(repo, revision):
            return self._refuse("RevisionNotFound")
        content = self.hub.repos[repo].get(path)
        if content is None:
            return self._refuse("EntryNotFound", {"X-Repo-Commit": self.hub.commit(repo)})
        return self._send_file(repo, path, content, with_body)

    def _knows(self, repo, revision):
        return revision in (None, "main", self.hub.commit(repo))

    def _send_file(self, repo, path, content, with_body):
        start = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers["Range"])[1]) if "Range" in self.headers else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.commit(repo))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if with_body:
            self._send_body(path, content[start:])

    def _send_body(self, path, body):
        cut = self.hub.break_once.pop(path, None)
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def _send_json(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, code, headers=()):
        self.send_response(404)
        for name, value in {
            "X-Error-Code": code,
            "X-Error-Message": code,
            "Content-Length": "0",
            **dict(headers),
        }.items():
            self.send_header(name, value)
        self.end_headers()


def _tree_entry(path, content):
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
