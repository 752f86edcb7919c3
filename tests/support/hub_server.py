"""A small Hub on the loopback address: the endpoints that huggingface_hub and datasets speak.

Repositories live in memory. A fault can be set: an error status, a rate limit or a cut connection
for the next requests that match.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_state import (
    DATE,
    LFS_SUFFIXES,
    Commit,
    Fault,
    Hub,
    Refused,
    Repo,
    described,
    directory,
    metadata,
    oid_of,
)

TOKEN, READ_TOKEN = "hf_loopbackwrite", "hf_loopbackread"
USERS = {TOKEN: "me", READ_TOKEN: "reader"}
ORGANISATIONS = {"me": ["lab"]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        path = url.path  # quoted: a revision may have a slash
        length = int(self.headers.get("Content-Length") or 0)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(length) if length else b""
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            fault = self.hub.fault_for(self.command, path)
            if fault is not None and not fault.after:
                return self._faulty(fault)
            try:
                self._route(path, {k: v[0] for k, v in parse_qs(url.query).items()}, body, fault)
            except Refused as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
                shown = {name: value for name, value in headers.items() if value}
                self.answer({"error": refused.message}, refused.status, shown)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _faulty(self, fault: Fault) -> None:
        if fault.status:
            return self.answer({"error": "fault"}, fault.status, fault.headers)
        self.close_connection = True
        self.connection.close()

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        for name, content in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ------------------------------------------------------------------ who may do what

    @property
    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in USERS:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return USERS[token]

    def _require_write(self, owner: str) -> None:
        user = self.user
        if user is None:
            raise Refused(401, "", "Unauthorized")
        token = self.headers["Authorization"].removeprefix("Bearer ")
        if token == READ_TOKEN or owner not in (user, *ORGANISATIONS.get(user, [])):
            raise Refused(403, "", f"You don't have the rights to write under {owner}")

    def _repo(self, kind: str, name: str) -> Repo:
        repo = self.hub.repos.get((kind, name))
        owner = name.partition("/")[0]
        user = self.user
        if repo is None or (
            repo.private and owner not in (user, *ORGANISATIONS.get(user or "", []))
        ):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # ------------------------------------------------------------------ the endpoints

    def _route(self, path: str, query: dict[str, str], body: bytes, fault: Fault | None) -> None:
        routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate_yaml),
            ("POST", r"/(?:(datasets)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            ("PUT", r"/lfs/(\w+)", self.put_object),
            ("POST", r"/lfs/(\w+)/verify", self.verify),
            ("GET|HEAD", r"/lfs/(\w+)", self.get_object),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/commit/(.+)", self.make_commit),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/(.+)", self.paths_info),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/branch/(.+)", self.branch),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/tag/(.+)", self.tag),
            ("DELETE", r"/api/(models|datasets)/([^/]+/[^/]+)/tag/(.+)", self.delete_tag),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/refs", self.refs),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self.tree),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/revision/(.+)", self.info),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)", self.info),
            ("GET|HEAD", r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ]
        for methods, pattern, handler in routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                groups = [None if group is None else unquote(group) for group in match.groups()]
                actual = handler(*groups, query=query, body=body)
                if fault is not None:  # carried out, and the answer is lost
                    return self._faulty(fault)
                value, status, headers = actual if isinstance(actual, tuple) else (actual, 200, {})
                return self.answer(value, status, headers)
        raise Refused(404, "", f"no endpoint {self.command} {path}")

    def whoami(self, **_: Any) -> Any:
        if self.user is None:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        names = ORGANISATIONS.get(self.user, [])
        return {"type": "user", "name": self.user, "orgs": [{"name": name} for name in names]}

    def create(self, body: bytes, **_: Any) -> Any:
        asked = json.loads(body)
        owner = asked.get("organization") or self.user
        self._require_write(owner)
        kind, name = asked.get("type", "model"), f"{owner}/{asked['name']}"
        prefix = "datasets/" if kind == "dataset" else ""
        url = {"url": f"{self.hub.url}/{prefix}{name}", "name": name}
        if (kind, name) in self.hub.repos:
            return url, 409, {}
        self.hub.add(kind, name, {}, asked.get("visibility") == "private" or asked.get("private"))
        return url

    def validate_yaml(self, body: bytes, **_: Any) -> Any:
        asked = json.loads(body)
        data = metadata(asked["content"].encode())
        errors = [
            {"message": f"{name} is required for {asked['repoType']}"}
            for name in ("license",)
            if not data.get(name)
        ]
        return {"errors": errors, "warnings": []}, 400 if errors else 200, {}

    def preupload(self, kind: str, name: str, revision: str, body: bytes, **_: Any) -> Any:
        self._require_write(name.partition("/")[0])
        files = self._commit(self._repo(kind[:-1], name), revision).files
        out = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LFS_SUFFIXES)
            old = files.get(file["path"])
            out.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None if old is None else oid_of(old, large),
                }
            )
        return {"files": out}

    def batch(self, prefix: str | None, name: str, body: bytes, **_: Any) -> Any:
        self._require_write(name.partition("/")[0])
        objects = []
        for item in json.loads(body)["objects"]:
            if item["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{item['oid']}"
                item["actions"] = {
                    "upload": {"href": href, "header": {}},
                    "verify": {"href": f"{href}/verify", "header": {}},
                }
            objects.append(item)
        return {"transfer": "basic", "objects": objects}

    def put_object(self, oid: str, body: bytes, **_: Any) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "", "content does not match its hash")
        self.hub.objects[oid] = body
        return {}

    def verify(self, oid: str, body: bytes, **_: Any) -> Any:
        asked = json.loads(body)
        if len(self.hub.objects.get(oid, b"")) != asked["size"]:
            raise Refused(404, "", "no such object")
        return {}

    def get_object(self, oid: str, **_: Any) -> Any:
        return self.hub.objects[oid]

    def make_commit(self, kind: str, name: str, revision: str, body: bytes, **_: Any) -> Any:
        self._require_write(name.partition("/")[0])
        repo = self._repo(kind[:-1], name)
        files = dict(self._commit(repo, revision).files)
        summary = ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                summary = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(revision, files, summary).oid
        return {"commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}

    def branch(self, kind: str, name: str, branch: str, body: bytes, **_: Any) -> Any:
        self._require_write(name.partition("/")[0])
        repo = self._repo(kind[:-1], name)
        if branch in repo.branches:
            raise Refused(409, "", "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return {}

    def tag(self, kind: str, name: str, revision: str, body: bytes, **_: Any) -> Any:
        self._require_write(name.partition("/")[0])
        repo, tag = self._repo(kind[:-1], name), json.loads(body)["tag"]
        if tag in repo.tags:
            raise Refused(409, "", "Tag already exists")
        repo.tags[tag] = self._commit(repo, revision).oid
        return {}

    def delete_tag(self, kind: str, name: str, tag: str, **_: Any) -> Any:
        self._require_write(name.partition("/")[0])
        repo = self._repo(kind[:-1], name)
        if tag not in repo.tags:
            raise Refused(404, "RevisionNotFound", "no such tag")
        del repo.tags[tag]
        return {}

    def refs(self, kind: str, name: str, **_: Any) -> Any:
        repo = self._repo(kind[:-1], name)

        def listed(refs: dict[str, str], place: str) -> list[dict[str, str]]:
            return [
                {"name": n, "ref": f"refs/{place}/{n}", "targetCommit": oid}
                for n, oid in refs.items()
            ]

        branches, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def info(self, kind: str, name: str, revision: str = "main", **_: Any) -> Any:
        repo = self._repo(kind[:-1], name)
        commit = self._commit(repo, revision)
        tags = metadata(commit.files.get("README.md", b"")).get("tags", [])
        return {
            "_id": "0" * 24,
            "id": name,
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags,
            "createdAt": DATE,
            "lastModified": DATE,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def tree(
        self,
        kind: str,
        name: str,
        revision: str,
        folder: str | None,
        query: dict[str, str],
        **_: Any,
    ) -> Any:
        files = self._commit(self._repo(kind[:-1], name), revision).files
        start = f"{folder.rstrip('/')}/" if folder else ""
        inside = {path: c for path, c in files.items() if path.startswith(start)}
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        actual: dict[str, Any] = {}
        for path, content in sorted(inside.items()):
            rest = path.removeprefix(start).split("/")
            for depth in range(1, len(rest)):
                parent = start + "/".join(rest[:depth])
                if depth == 1 or query.get("recursive", "").lower() in ("true", "1"):
                    actual[parent] = directory(parent)
            if len(rest) == 1 or query.get("recursive", "").lower() in ("true", "1"):
                actual[path] = described(path, content)
        return list(actual.values())

    def paths_info(self, kind: str, name: str, revision: str, body: bytes, **_: Any) -> Any:
        files = self._commit(self._repo(kind[:-1], name), revision).files
        text = body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        out = [described(path, files[path]) for path in asked if path in files]
        folders = {p for p in asked if any(f.startswith(f"{p.rstrip('/')}/") for f in files)}
        return out + [directory(path) for path in folders]

    def resolve(self, prefix: str | None, name: str, revision: str, path: str, **_: Any) -> Any:
        commit = self._commit(self._repo("dataset" if prefix else "model", name), revision)
        if path not in commit.files:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        content = commit.files[path]
        large = path.endswith(LFS_SUFFIXES)
        oid = oid_of(content, large)
        headers = {"ETag": f'"{oid}"', "X-Repo-Commit": commit.oid}
        if not large:
            return content, 200, headers
        self.hub.objects[oid] = content
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        # Another host, as the Hub's storage is: the client must keep what this answer says.
        storage = self.hub.url.replace("127.0.0.1", "localhost")
        return b"", 302, {**headers, **linked, "Location": f"{storage}/lfs/{oid}"}


@contextmanager
def serve() -> Iterator[Hub]:
    """A running server; its address is hub.url."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(hub: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """Variables with which the real clients talk to this server and to nothing else."""
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # large files by the LFS protocol
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    return variables | ({"HF_TOKEN": token} if token is not None else {})
