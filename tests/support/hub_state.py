"""What the loopback Hub of the tests knows: repositories, large files, faults to come."""

import hashlib
import re
import threading
from dataclasses import dataclass, field
from typing import Any

import yaml

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".gz")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Commit:
    """A commit; files: path -> content."""

    oid: str
    files: dict[str, bytes]
    message: str


@dataclass
class Repo:
    """A repository with its branches and tags, both name -> commit oid."""

    kind: str
    name: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> Commit:
        oid = hashlib.sha1(f"{self.name}/{branch}/{len(self.commits)}".encode()).hexdigest()
        self.commits.append(Commit(oid, files, message))
        self.branches[branch] = oid
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision, self.tags.get(revision, revision))
        return next((commit for commit in self.commits if commit.oid == oid), None)


@dataclass
class Fault:
    """What happens to the next `times` requests that match."""

    method: str
    path: str
    status: int
    times: int
    headers: dict[str, str]
    after: bool
    """Cut the connection after the request was carried out, or before."""


class Hub:
    """The state of the server, and what tests ask of it."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.url = ""

    def fail(
        self,
        method: str,
        path: str,
        status: int = 0,
        times: int = 1,
        headers: dict[str, str] | None = None,
        after: bool = False,
    ) -> None:
        """Answer with a status, or cut the connection (0)."""
        self.faults.append(Fault(method, path, status, times, headers or {}, after))

    def fault_for(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def add(self, kind: str, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A repository that is there already."""
        repo = self.repos[kind, name] = Repo(kind, name, private)
        repo.commit("main", {".gitattributes": b"", **files}, "initial commit")
        return repo

    def count(self, method: str, path: str) -> int:
        """Requests so far that match."""
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)


class Refused(Exception):
    """An error answer."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def oid_of(content: bytes, large: bool) -> str:
    """SHA-256 of a large file, git's SHA-1 of a small one."""
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def described(path: str, content: bytes) -> dict[str, Any]:
    """A file as the tree endpoint shows it."""
    actual = {"type": "file", "path": path, "oid": oid_of(content, False), "size": len(content)}
    if path.endswith(LFS_SUFFIXES):
        actual["lfs"] = {"oid": oid_of(content, True), "size": len(content), "pointerSize": 130}
    return actual


def directory(path: str) -> dict[str, Any]:
    """A folder as the tree endpoint shows it."""
    return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}


def metadata(readme: bytes) -> dict[str, Any]:
    """YAML front matter of a README."""
    parts = readme.decode().split("---\n")
    actual = yaml.safe_load(parts[1]) if len(parts) > 2 else None
    return actual if isinstance(actual, dict) else {}
