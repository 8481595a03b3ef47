"""A server on loopback that speaks the Hub's HTTP API, as far as huggingface_hub, transformers and datasets ask for it.

Accounts with their tokens' roles, repositories of models and data sets, branches and commits, pre-upload, LFS objects
in one piece or in parts, resolve, trees. Large files lie on a storage of another host name, as on the real Hub, so the
client must not send its token there. What can go wrong on the way is a list of ``Fault``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".parquet", ".arrow", ".zip", ".gz", ".msgpack", ".h5")
"""What goes the LFS way whatever its size (the Hub's first ``.gitattributes``)."""


@dataclass
class Fault:
    """Something that goes wrong with requests.

    Attributes:
        part: the path has this part.
        status: answered instead of doing what was asked; 0 for a connection that is cut.
        times: how often before all is well again; -1 for ever.
        cut_after: bytes of the body that are read before the connection is cut.
        too_late: do what was asked, then cut the connection before the answer.
        hang: seconds for which nothing happens.
        headers: of the answer.
        message: of the answer.
        method: only requests of this method.
    """

    part: str
    status: int = 0
    times: int = 1
    cut_after: int = 0
    too_late: bool = False
    hang: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "the server says no"
    method: str = ""


@dataclass
class Request:
    """A request that came in: bytes of its body that arrived, and its token."""

    method: str
    path: str
    received: int
    authorization: str | None
    host: str


@dataclass
class Repo:
    """A repository: the commits of each branch, newest last, and the LFS objects it has."""

    private: bool
    branches: dict[str, list[dict[str, Any]]]
    objects: set[str] = field(default_factory=set)

    def files(self, revision: str) -> dict[str, tuple[str, bytes]]:
        """Path -> (mode, content) at a branch or commit."""
        return self.commit(revision)["files"]

    def commit(self, revision: str) -> dict[str, Any]:
        """The commit that a branch's name or an id stands for."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next(c for commits in self.branches.values() for c in commits if c["oid"] == revision)


def account(name: str, role: str = "write", orgs: dict[str, str] | None = None, scopes: Any = None) -> dict[str, Any]:
    """What ``whoami`` says of a token.

    Args:
        name: of the user.
        role: ``read``, ``write`` or ``fineGrained``.
        orgs: organization -> the user's role in it.
        scopes: of a fine-grained token: (type, name, permissions) of each entity.
    """
    token: dict[str, Any] = {"displayName": "test", "role": role, "createdAt": "2026-01-01T00:00:00.000Z"}
    if role == "fineGrained":
        scoped = [
            {"entity": {"_id": "0", "type": kind, "name": who}, "permissions": rights} for kind, who, rights in scopes
        ]
        token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
    found = [{"type": "org", "name": org, "roleInOrg": what} for org, what in (orgs or {}).items()]
    return {
        "type": "user",
        "id": name,
        "name": name,
        "orgs": found,
        "auth": {"type": "access_token", "accessToken": token},
    }


class Hub(ThreadingHTTPServer):
    """See the module. Everything is kept in memory.

    Args:
        part_size: bytes of a part; objects larger than that are uploaded in parts.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, part_size: int = 5_000_000) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.part_size = part_size
        self.accounts: dict[str, dict[str, Any]] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        """What ``HF_ENDPOINT`` is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage(self) -> str:
        """Where large files lie: the same server under another name."""
        return f"http://localhost:{self.server_address[1]}"

    def files(self, repo_id: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Path -> content of a repository's files, without the ``.gitattributes`` that the server makes itself."""
        found = self.repos[kind, repo_id].files(revision)
        return {path: content for path, (_, content) in found.items() if path != ".gitattributes"}

    def commits(self, repo_id: str, kind: str = "model", revision: str = "main") -> list[dict[str, Any]]:
        """The commits of a branch after the first, which the server makes itself."""
        return self.repos[kind, repo_id].branches[revision][1:]

    def new_repo(self, repo_id: str, kind: str = "model", private: bool = False) -> Repo:
        """Create a repository as its owner would have on the website."""
        files = {".gitattributes": ("regular", b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
        self.repos[kind, repo_id] = Repo(private, {"main": [_new_commit("initial commit", files, "")]})
        return self.repos[kind, repo_id]

    def sent(self, part: str, method: str = "PUT") -> int:
        """Bytes that arrived in requests whose path has this part."""
        return sum(r.received for r in self.requests if part in r.path and r.method == method)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: connections are cut on purpose."""


def _new_commit(title: str, files: dict[str, tuple[str, bytes]], parent: str) -> dict[str, Any]:
    listed = sorted((path, hashlib.sha256(content).hexdigest()) for path, (_, content) in files.items())
    oid = hashlib.sha1(json.dumps([title, parent, listed]).encode()).hexdigest()
    return {"oid": oid, "title": title, "files": files, "parent": parent}


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _file_info(path: str, mode: str, content: bytes) -> dict[str, Any]:
    info: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    if mode == "lfs":
        info["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return info


def _card_errors(text: str) -> list[str]:
    """What the Hub finds wrong with the YAML header of a card."""
    if not text.startswith("---\n"):
        return []
    try:
        data = yaml.safe_load(text.split("---\n")[1])
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(data, dict):
        return ["the header is no mapping"]
    errors = []
    for entry in data.get("model-index") or []:
        for result in entry.get("results") or []:
            wanted = {"task": ("type",), "dataset": ("type", "name")}
            for key, names in wanted.items():
                errors += [f'"model-index" {key}.{n} is required' for n in names if not (result.get(key) or {}).get(n)]
            for metric in result.get("metrics") or [{}]:
                errors += [f'"model-index" metric.{n} is required' for n in ("type", "value") if n not in metric]
        if not entry.get("name"):
            errors.append('"model-index" name is required')
    for name in ("license", "library_name", "pipeline_tag"):
        if name in data and not isinstance(data[name], str):
            errors.append(f'"{name}" must be a string')
    return errors


class _Refuse(Exception):
    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
        if code:
            self.headers["X-Error-Code"] = code


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    # --- the exchange ---

    def _respond(self) -> None:
        hub = self.server
        fault = self._fault()
        if fault is not None and fault.hang:
            time.sleep(fault.hang)
        cut = fault is not None and not fault.status and not fault.too_late and not fault.hang
        body = self._body(fault.cut_after if cut else None)
        path = urlsplit(self.path)
        with hub.lock:
            authorization, host = self.headers.get("Authorization"), self.headers.get("Host", "")
            hub.requests.append(Request(self.command, self.path, len(body), authorization, host.split(":")[0]))
        if cut:
            self._cut()
            return
        try:
            if fault is not None and fault.status:
                raise _Refuse(fault.status, fault.message, headers=fault.headers)
            with hub.lock:
                answer = self._route([unquote(part) for part in path.path.strip("/").split("/")], body)
        except _Refuse as refusal:
            content = {"error": refusal.message}
            if refusal.status == 400:
                content = {"error": refusal.message, "errors": [{"message": refusal.message}]}
            message = refusal.message.encode("ascii", "replace").decode()
            answer = (refusal.status, content, {"X-Error-Message": message} | refusal.headers)
        if fault is not None and fault.too_late:
            self._cut()
            return
        self._send(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = _respond

    def _fault(self) -> Fault | None:
        with self.server.lock:
            for fault in self.server.faults:
                if fault.times and fault.part in self.path and fault.method in ("", self.command):
                    fault.times -= 1
                    return fault
        return None

    def _cut(self) -> None:
        """End the connection as a broken network does: by a reset, without a word."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()

    def _body(self, most: int | None) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts, size = [], 1
            while size and (most is None or sum(map(len, parts)) < most):
                size = int(self.rfile.readline(), 16)
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length if most is None else min(most, length))

    def _send(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        wanted = self.headers.get("Range", "")
        if status == 200 and isinstance(content, bytes) and wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            whole = len(body)
            start, end = int(first or 0), min(int(last or whole - 1), whole - 1)
            body, status = body[start : end + 1], 206
            headers = dict(headers or {}) | {"Content-Range": f"bytes {start}-{end}/{whole}"}
        self.send_response(status)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # --- who asks, and for what ---

    def _account(self) -> dict[str, Any] | None:
        sent = self.headers.get("Authorization")
        if sent is None:
            return None
        found = self.server.accounts.get(sent.removeprefix("Bearer "))
        if found is None:
            raise _Refuse(401, "Invalid credentials in Authorization header")
        return found

    def _may_write(self, kind: str, repo_id: str) -> bool:
        who, owner = self._account(), repo_id.split("/")[0]
        if who is None:
            return False
        roles = {who["name"]: "admin"} | {org["name"]: org["roleInOrg"] for org in who["orgs"]}
        token = who["auth"]["accessToken"]
        if roles.get(owner, "read") == "read" or token["role"] == "read":
            return False
        if token["role"] == "write":
            return True
        named = {("user", owner), ("org", owner), (kind, repo_id)}
        return any(
            (s["entity"]["type"], s["entity"]["name"]) in named and "repo.write" in s["permissions"]
            for s in token["fineGrained"]["scoped"]
        )

    def _repo(self, kind: str, repo_id: str, *, write: bool = False) -> Repo:
        repo, who = self.server.repos.get((kind, repo_id)), self._account()
        mine = who is not None and repo_id.split("/")[0] in {who["name"], *(org["name"] for org in who["orgs"])}
        if repo is None or (repo.private and not mine):
            raise _Refuse(404 if who else 401, "Repository not found", "RepoNotFound")
        if write and not self._may_write(kind, repo_id):
            problem = "You don't have the required permissions to perform this action"
            raise _Refuse(403 if who else 401, problem)
        return repo

    @staticmethod
    def _commit_of(repo: Repo, revision: str) -> dict[str, Any]:
        try:
            return repo.commit(revision)
        except StopIteration:
            raise _Refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None

    def _route(self, parts: list[str], body: bytes) -> tuple[Any, ...]:
        if parts[0] == "storage":
            return self._storage(parts[1:], body)
        if parts[:2] == ["api", "whoami-v2"]:
            who = self._account()
            if who is None:
                raise _Refuse(401, "Invalid username or password.")
            return 200, who
        if parts[:2] == ["api", "validate-yaml"]:
            errors = _card_errors(json.loads(body)["content"])
            if errors:
                raise _Refuse(400, "; ".join(errors))
            return 200, {"errors": [], "warnings": []}
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[0] == "api" and parts[1] in ("models", "datasets") and len(parts) > 3:
            return self._api(parts[1][:-1], f"{parts[2]}/{parts[3]}", parts[4:], body)
        kind, rest = ("dataset", parts[1:]) if parts[0] == "datasets" else ("model", parts)
        if rest[2:] == ["info", "lfs", "objects", "batch"]:
            return self._batch(kind, f"{rest[0]}/{rest[1].removesuffix('.git')}", json.loads(body))
        if len(rest) > 4 and rest[2] == "resolve":
            return self._resolve(kind, f"{rest[0]}/{rest[1]}", rest[3], "/".join(rest[4:]))
        raise _Refuse(404, f"no such endpoint: {self.command} {self.path}")

    def _create(self, wanted: dict[str, Any]) -> tuple[Any, ...]:
        who, hub = self._account(), self.server
        if who is None:
            raise _Refuse(401, "Invalid username or password.")
        kind, repo_id = wanted.get("type", "model"), f"{wanted['organization'] or who['name']}/{wanted['name']}"
        prefix = "datasets/" if kind == "dataset" else ""
        if (kind, repo_id) in hub.repos:
            return 409, {"url": f"{hub.url}/{prefix}{repo_id}", "error": f"You already created this {kind} repo"}
        if not self._may_write("namespace", repo_id):
            raise _Refuse(403, f"You don't have the rights to create a {kind} under the namespace {repo_id}")
        hub.new_repo(repo_id, kind, wanted.get("visibility") == "private")
        return 200, {"url": f"{hub.url}/{prefix}{repo_id}"}

    def _api(self, kind: str, repo_id: str, rest: list[str], body: bytes) -> tuple[Any, ...]:
        what = rest[0] if rest else ""
        query = parse_qs(urlsplit(self.path).query)
        if what == "auth-check":
            self._repo(kind, repo_id, write=rest[1:] == ["write"])
            return 200, {}
        if what in ("", "revision"):
            return self._info(kind, repo_id, rest[1] if rest else "main")
        if what == "refs":
            branches = self._repo(kind, repo_id).branches
            found = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1]["oid"]}
                for name, commits in branches.items()
            ]
            return 200, {"branches": found, "converts": [], "tags": []}
        if what == "tree":
            return self._tree(kind, repo_id, rest[1], "/".join(rest[2:]), query["recursive"] == ["true"])
        if what == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            files = self._commit_of(self._repo(kind, repo_id), rest[1])["files"]
            return 200, _PlainList(_file_info(p, *files[p]) for p in wanted if p in files)
        if what == "branch":
            return self._branch(kind, repo_id, rest[1], json.loads(body or b"{}"))
        if what == "preupload":
            return self._preupload(kind, repo_id, rest[1], json.loads(body))
        if what == "commit":
            return self._commit(kind, repo_id, rest[1], [json.loads(line) for line in body.splitlines()])
        raise _Refuse(404, f"no such endpoint: {self.command} {self.path}")

    # --- reading ---

    def _info(self, kind: str, repo_id: str, revision: str) -> tuple[Any, ...]:
        repo = self._repo(kind, repo_id)
        commit = self._commit_of(repo, revision)
        card = commit["files"].get("README.md", ("", b""))[1].decode()
        data = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
        siblings = [{"rfilename": path} for path in commit["files"]]
        found = {"id": repo_id, "sha": commit["oid"], "private": repo.private, "siblings": siblings, "cardData": data}
        found |= {"tags": [*data.get("tags", []), *filter(None, [data.get("library_name")])], "gated": False}
        return 200, found | {"pipeline_tag": data.get("pipeline_tag"), "disabled": False, "downloads": 0, "likes": 0}

    def _tree(self, kind: str, repo_id: str, revision: str, folder: str, recursive: bool) -> tuple[Any, ...]:
        files = self._commit_of(self._repo(kind, repo_id), revision)["files"]
        prefix, found, folders = f"{folder}/" if folder else "", [], set()
        for path, (mode, content) in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            above = path[len(prefix) :].split("/")[:-1]
            inner = {prefix + "/".join(above[: i + 1]) for i in range(len(above) if recursive else min(1, len(above)))}
            found += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(inner - folders)]
            folders |= inner
            if recursive or not above:
                found.append(_file_info(path, mode, content))
        if folder and not found:
            raise _Refuse(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return 200, _PlainList(found)

    def _resolve(self, kind: str, repo_id: str, revision: str, path: str) -> tuple[Any, ...]:
        commit = self._commit_of(self._repo(kind, repo_id), revision)
        headers = {"X-Repo-Commit": commit["oid"]}
        if path not in commit["files"]:
            raise _Refuse(404, "Entry not found", "EntryNotFound", headers)
        mode, content = commit["files"][path]
        if mode == "regular":
            return 200, content, headers | {"ETag": f'"{_git_oid(content)}"', "Accept-Ranges": "bytes"}
        oid = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return 302, {}, headers | {"Location": f"{self.server.storage}/storage/{oid}"}

    # --- writing ---

    def _branch(self, kind: str, repo_id: str, name: str, wanted: dict[str, Any]) -> tuple[Any, ...]:
        repo = self._repo(kind, repo_id, write=True)
        if name in repo.branches:
            raise _Refuse(409, f"Reference already exists: refs/heads/{name}")
        start = self._commit_of(repo, wanted.get("startingPoint", "main"))
        repo.branches[name] = [start]
        return 200, {}

    def _preupload(self, kind: str, repo_id: str, revision: str, wanted: dict[str, Any]) -> tuple[Any, ...]:
        there = self._commit_of(self._repo(kind, repo_id, write=True), revision)["files"]
        found = []
        for file in wanted["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10_000_000 else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in there:
                known, content = there[file["path"]]
                answer["oid"] = hashlib.sha256(content).hexdigest() if known == "lfs" else _git_oid(content)
            found.append(answer)
        return 200, {"files": found}

    def _batch(self, kind: str, repo_id: str, wanted: dict[str, Any]) -> tuple[Any, ...]:
        hub, repo = self.server, self._repo(kind, repo_id, write=True)
        found = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repo.objects:
                header: dict[str, str] = {}
                href = f"{hub.storage}/storage/{item['oid']}?repo={kind}/{repo_id}"
                if item["size"] > hub.part_size:
                    count = -(-item["size"] // hub.part_size)
                    header = {f"{n:05d}": f"{hub.storage}/storage/{item['oid']}/{n}" for n in range(1, count + 1)}
                    header["chunk_size"] = str(hub.part_size)
                    hub.parts[item["oid"]] = {}  # an upload in parts that is begun anew forgets the parts it had
                    href = f"{hub.url}/storage/{item['oid']}/complete?repo={kind}/{repo_id}"
                answer["actions"] = {"upload": {"href": href, "header": header}}
            found.append(answer)
        transfer = "multipart" if any(o["size"] > hub.part_size for o in wanted["objects"]) else "basic"
        return 200, {"transfer": transfer, "objects": found}

    def _storage(self, parts: list[str], body: bytes) -> tuple[Any, ...]:
        hub, oid = self.server, parts[0]
        if self.command in ("GET", "HEAD"):
            if oid not in hub.objects:
                raise _Refuse(404, "no such object")
            return 200, hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if self.command == "PUT" and len(parts) == 2:
            hub.parts[oid][int(parts[1])] = body
            return 200, {}, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
        if self.command == "POST":
            wanted, stored = json.loads(body), hub.parts[oid]
            tags = {n: f'"{hashlib.md5(content).hexdigest()}"' for n, content in stored.items()}
            if {p["partNumber"]: p["etag"] for p in wanted["parts"]} != tags:
                raise _Refuse(400, "parts are missing")
            body = b"".join(stored[n] for n in sorted(stored))
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refuse(400, "the content is not what its name says")
        hub.objects[oid] = body
        kind, _, repo_id = parse_qs(urlsplit(self.path).query)["repo"][0].partition("/")
        hub.repos[kind, repo_id].objects.add(oid)
        return 200, {}

    def _commit(self, kind: str, repo_id: str, branch: str, lines: list[dict[str, Any]]) -> tuple[Any, ...]:
        hub, repo = self.server, self._repo(kind, repo_id, write=True)
        if branch not in repo.branches:
            raise _Refuse(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = repo.branches[branch][-1]
        files, title = dict(head["files"]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = ("regular", base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise _Refuse(400, f"Your push was rejected: the LFS object of {value['path']} was not uploaded")
                files[value["path"]] = ("lfs", hub.objects[value["oid"]])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = _new_commit(title, files, head["oid"])
        repo.branches[branch].append(commit)
        prefix = "datasets/" if kind == "dataset" else ""
        return 200, {"commitUrl": f"{hub.url}/{prefix}{repo_id}/commit/{commit['oid']}", "commitOid": commit["oid"]}


class _PlainList(list):
    """A list that is sent even where it is empty."""

    def __bool__(self) -> bool:
        return True


@contextmanager
def serving(**options: Any) -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    server = Hub(**options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
