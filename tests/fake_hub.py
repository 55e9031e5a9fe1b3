"""A Hub on the loopback interface: `python fake_hub.py ROOT` prints its address and serves until its stdin closes.

Speaks what huggingface_hub uses to create a repository, commit to it and download from it. Every file is committed as
a regular one, weights are served by redirect to another host, as from the Hub's CDN, and ROOT/requests.txt lists
the requests. A repository's commits are folders, ROOT/<owner>/<name>/<sha>, and repo.json says which is the newest.
Writing, and reading a private repository, need the bearer token hf_test.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
COMMIT_LOCK = threading.Lock()


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    # Requests

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.route(
            (rf"/api/models/{REPO}(/revision/(?P<rev>[^/]+))?", self.repo_info),
            (rf"/api/models/{REPO}/tree/(?P<rev>[^/]+)(/(?P<path>.*))?", self.tree),
            (rf"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", self.resolve),
            (r"/cdn/(?P<digest>\w+)", self.cdn),
        )

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.reply(401, {"error": "writing needs the token"})
        self.route(
            (r"/api/repos/create", self.create_repo),
            (r"/api/validate-yaml", lambda: self.reply(200, {"errors": [], "warnings": []})),
            (rf"/api/models/{REPO}/preupload/(?P<rev>[^/]+)", self.preupload),
            (rf"/api/models/{REPO}/commit/(?P<rev>[^/]+)", self.commit),
        )

    def route(self, *routes):
        path = unquote(urlsplit(self.path).path)
        with (self.root / "requests.txt").open("a") as log:
            log.write(f"{self.command} {path}\n")
        for pattern, handler in routes:
            if match := re.fullmatch(pattern, path):
                arguments = match.groupdict()
                if "repo" in arguments and not self.may_read(arguments["repo"]):
                    return self.reply(404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
                return handler(**arguments)
        self.reply(404, {"error": f"no such page: {path}"})

    # Reading

    def repo_info(self, repo, rev):
        files = [{"rfilename": path.name} for path in sorted(self.snapshot(repo, rev).iterdir())]
        self.reply(200, {"id": repo, "sha": self.newest(repo), "private": False, "tags": [], "siblings": files})

    def tree(self, repo, rev, path):
        if path:
            return self.reply(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        entries = [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": etag(file)}
            for file in sorted(self.snapshot(repo, rev).iterdir())
        ]
        self.reply(200, entries)

    def resolve(self, repo, rev, path):
        file, commit = self.snapshot(repo, rev) / path, {"X-Repo-Commit": self.newest(repo)}
        if not file.is_file():
            return self.reply(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", **commit})
        if file.suffix == ".safetensors":
            elsewhere = f"http://localhost:{self.server.server_port}/cdn/{etag(file)}"
            linked = {"X-Linked-Etag": f'"{etag(file)}"', "X-Linked-Size": str(file.stat().st_size)}
            return self.reply(302, {}, {"Location": elsewhere, **linked, **commit})
        self.reply(200, file.read_bytes(), {"ETag": f'"{etag(file)}"', **commit})

    def cdn(self, digest):
        """Weights by their content, for whoever knows it: the client does not send its token to other hosts."""
        file = next(file for file in self.root.glob("*/*/*/*.safetensors") if etag(file) == digest)
        self.reply(200, file.read_bytes(), {"ETag": f'"{digest}"'})

    # Writing

    def create_repo(self):
        wanted = json.loads(self.body)
        repo = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        exists = (self.root / repo / "repo.json").is_file()
        if not exists:
            (self.root / repo / "empty").mkdir(parents=True)
            self.remember(repo, newest="empty", private=wanted.get("visibility") == "private")
        self.reply(409 if exists else 200, {"url": f"http://{self.headers['Host']}/{repo}", "name": repo})

    def preupload(self, repo, rev):
        files = [file["path"] for file in json.loads(self.body)["files"]]
        answers = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in files]
        self.reply(200, {"files": answers})

    def commit(self, repo, rev):
        with COMMIT_LOCK:
            parent = self.newest(repo)
            sha = hashlib.sha1(parent.encode() + self.body).hexdigest()
            folder = self.root / repo / sha
            shutil.copytree(self.root / repo / parent, folder)
            for operation in map(json.loads, self.body.splitlines()):
                value = operation["value"]
                if operation["key"] == "file":
                    (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
                elif operation["key"] == "deletedFile":
                    (folder / value["path"]).unlink()
            self.remember(repo, newest=sha)
        url = f"http://{self.headers['Host']}/{repo}/commit/{sha}"
        self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    # Storage

    def state(self, repo):
        file = self.root / repo / "repo.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def newest(self, repo):
        return self.state(repo)["newest"]

    def remember(self, repo, **changes):
        (self.root / repo / "repo.json").write_text(json.dumps({**(self.state(repo) or {}), **changes}))

    def may_read(self, repo):
        state = self.state(repo)
        return state is not None and (not state["private"] or self.headers.get("Authorization") == "Bearer hf_test")

    def snapshot(self, repo, rev):
        return self.root / repo / (self.newest(repo) if rev in (None, "main") else rev)

    # Answers

    def reply(self, status, content, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def etag(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def hub_environment(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that has the token of a Hub in `folder` / "hub", and an empty cache beside it."""
    root = folder / "hub"
    root.mkdir()
    command = [sys.executable, __file__, root]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hub:
        assert hub.stdin is not None and hub.stdout is not None
        yield {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": hub.stdout.readline().strip(),
            "HF_TOKEN": "hf_test",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(place for place in sys.path if place),
        }
        hub.stdin.close()


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()
    server.shutdown()
