"""A stand-in Hub: a real HTTP server on this machine that speaks what `huggingface_hub` asks, with faults on order.

Large files go through git-LFS (single and in parts); there is no xet storage here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from card_check import card_faults
from hub_state import ATTRIBUTES, LARGE, Commit, Fault, Refused, Repository, listed, oid_of


class HubServer:
    """The server, running inside a `with` block.

    Args:
        users: token -> (name, whether it may write).
        part_size: files larger than this are uploaded in parts of it.

    Attributes:
        endpoint: what HF_ENDPOINT is set to.
        repositories: by name.
        stored: large files by SHA-256.
        requests: `METHOD /path` of every request, in order.
        uploads: bytes that came for each stored file, so that a second upload shows.
        faults: still to happen, in order.
        tells_contents: whether a listing with blobs says what the files hold, as mirrors of the Hub may not.
    """

    def __init__(self, users: dict[str, tuple[str, bool]], part_size: int = 200_000) -> None:
        self.users, self.part_size = users, part_size
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.uploads: dict[str, int] = {}
        self.requests: list[str] = []
        self.authorized_uploads = 0
        self.faults: list[Fault] = []
        self.tells_contents = True
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, name: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repository:
        """Make a repository as the Hub does, with a first commit of its own; `files` come in a second one."""
        self.repositories[name] = Repository(private, [])
        self.commit(name, "initial commit", {".gitattributes": ATTRIBUTES})
        if files:
            self.commit(name, "files", self.repositories[name].head.files | files)
        return self.repositories[name]

    def commit(self, name: str, message: str, files: dict[str, bytes]) -> Commit:
        repository = self.repositories[name]
        content = "".join(f"{path}{hashlib.sha256(data).hexdigest()}" for path, data in sorted(files.items()))
        oid = hashlib.sha1(f"{name}{len(repository.commits)}{message}{content}".encode()).hexdigest()
        repository.commits.append(Commit(oid, message, files))
        return repository.head

    def fault(self, request: str) -> Fault | None:
        """Return the fault that is to happen to `request`, once for each of its times."""
        with self.lock:
            for i, fault in enumerate(self.faults):
                if re.search(fault.where, request):
                    left = Fault(**{**fault.__dict__, "times": fault.times - 1})
                    self.faults[i : i + 1] = [left] if left.times else []
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        hub, asked = self.server.hub, urlsplit(self.path)
        self.path, self.query = unquote(asked.path), parse_qs(asked.query)
        request = f"{self.command} {self.path}"
        with hub.lock:
            hub.requests.append(request)
        fault = hub.fault(request)
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.drop == "midway":
            self.rfile.read(length // 2)
            return self._reset(fault)
        self.body = (
            self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        )
        if fault and fault.status:
            return self._send(fault.status, fault.body.replace("{token}", str(self._token())).encode(), fault.headers)
        try:
            with hub.lock:
                answer = self._answer()
        except Refused as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            return self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)
        if fault and fault.drop == "after":
            return self._reset(fault)
        body, headers = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
        self._send(200, body, headers)

    def _answer(self) -> Any:
        for method, pattern, respond in ROUTES:
            if (found := re.fullmatch(pattern, self.path)) and self.command in method.split("|"):
                return respond(self, **found.groupdict())
        raise Refused(404, f"no such path: {self.command} {self.path}")

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self, fault: Fault) -> None:
        if fault.reached:
            fault.reached.set()
        if fault.release:
            fault.release.wait(30)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: headers hold tokens."""

    # What the Hub answers

    def _token(self) -> str | None:
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token if scheme == "Bearer" else None

    def user(self, write_to: str | None = None) -> str:
        name, may_write = self.server.hub.users.get(self._token() or "", (None, False))
        if name is None:
            raise Refused(401, "Invalid username or password.")
        if write_to is not None and (not may_write or write_to.partition("/")[0] != name):
            raise Refused(403, f"Forbidden: you don't have the rights to write under {write_to.partition('/')[0]}")
        return name

    def repository(self, repo: str) -> Repository:
        held = self.server.hub.repositories.get(repo)
        owner = self.server.hub.users.get(self._token() or "", (None, False))[0]
        if held is None or (held.private and owner != repo.partition("/")[0]):
            raise Refused(404 if owner else 401, "Repository not found", "RepoNotFound")
        if held.gated and owner != repo.partition("/")[0]:
            raise Refused(403, "Access to this model is restricted", "GatedRepo")
        return held

    def at(self, repo: str, revision: str) -> Commit:
        repository = self.repository(repo)
        oid = repository.head.oid if revision == "main" else repository.tags.get(revision, revision)
        for commit in repository.commits:
            if commit.oid == oid:
                return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def whoami(self) -> Any:
        return {"type": "user", "name": self.user(), "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create_repo(self) -> Any:
        asked = json.loads(self.body)
        name = f"{asked['organization'] or self.user()}/{asked['name']}"
        self.user(write_to=name)
        if name in self.server.hub.repositories:
            raise Refused(409, "You already created this model repo")
        self.server.hub.create(name, private=asked.get("visibility") == "private")
        return {"url": f"{self.server.hub.endpoint}/{name}", "id": name}

    def preupload(self, repo: str, revision: str) -> Any:
        self.user(write_to=repo)
        held, answers = self.at(repo, revision).files, []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            content = held.get(path)
            large = path.endswith(LARGE)
            oid = None if content is None else oid_of(path, content)
            answers.append(
                {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        return {"files": answers}

    def batch(self, repo: str) -> Any:
        self.user(write_to=repo)
        hub, answers = self.server.hub, []
        for wanted in json.loads(self.body)["objects"]:
            answer = dict(wanted)
            if wanted["oid"] not in hub.stored:
                at = f"{hub.endpoint}/storage/{wanted['oid']}"
                parts = -(-wanted["size"] // hub.part_size)
                if parts > 1:
                    header = {str(i + 1): f"{at}/{i + 1}" for i in range(parts)} | {"chunk_size": str(hub.part_size)}
                    answer["actions"] = {"upload": {"href": f"{at}/complete", "header": header}}
                else:
                    answer["actions"] = {"upload": {"href": f"{at}/1"}}
                answer["actions"]["verify"] = {"href": f"{at}/verify"}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def put_part(self, oid: str, part: str) -> Any:
        hub = self.server.hub
        hub.authorized_uploads += "Authorization" in self.headers
        hub.uploads[oid] = hub.uploads.get(oid, 0) + len(self.body)
        hub.parts.setdefault(oid, {})[int(part)] = self.body
        return b"", {"ETag": hashlib.md5(self.body).hexdigest()}

    def complete(self, oid: str) -> Any:
        parts = self.server.hub.parts[oid]
        for part in json.loads(self.body)["parts"]:
            if hashlib.md5(parts[part["partNumber"]]).hexdigest() != part["etag"]:
                raise Refused(400, "a part is not what its ETag says")
        return {}

    def verify(self, oid: str) -> Any:
        self.user()
        hub = self.server.hub
        content = b"".join(data for _, data in sorted(hub.parts.pop(oid).items()))
        if hashlib.sha256(content).hexdigest() != oid or len(content) != json.loads(self.body)["size"]:
            raise Refused(400, "the content is not what its SHA-256 says")
        hub.stored[oid] = content
        return {}

    def make_commit(self, repo: str, revision: str) -> Any:
        self.user(write_to=repo)
        hub, lines = self.server.hub, [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, self.at(repo, revision).oid):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self.at(repo, revision).files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.stored:
                    raise Refused(400, f"{value['path']}: its content was not uploaded")
                files[value["path"]] = hub.stored[value["oid"]]
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        commit = hub.commit(repo, header["summary"], files)
        return {"success": True, "commitOid": commit.oid, "commitUrl": f"{hub.endpoint}/{repo}/commit/{commit.oid}"}

    def tag(self, repo: str, revision: str) -> Any:
        self.user(write_to=repo)
        tags, name = self.repository(repo).tags, json.loads(self.body)["tag"]
        if name in tags:
            raise Refused(409, f"Tag already exists: {name}")
        tags[name] = self.at(repo, revision).oid
        return {}

    def refs(self, repo: str) -> Any:
        held = self.repository(repo)
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in held.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": held.head.oid}
        return {"branches": [main], "tags": tags, "converts": []}

    def info(self, repo: str, revision: str | None = None) -> Any:
        held, commit = self.repository(repo), self.at(repo, revision or "main")
        blobs = self.server.hub.tells_contents and "blobs" in self.query
        siblings = [{"rfilename": path} | (listed(path, data) if blobs else {}) for path, data in commit.files.items()]
        return {
            "id": repo, "modelId": repo, "sha": commit.oid, "private": held.private, "gated": False, "tags": [],
            "siblings": siblings, "downloads": 0, "likes": 0,
        }  # fmt: skip

    def tree(self, repo: str, revision: str) -> Any:
        listed = []
        for path, content in self.at(repo, revision).files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            listed.append(entry)
        return listed

    def resolve(self, repo: str, revision: str, path: str) -> Any:
        commit = self.at(repo, revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{oid_of(path, content)}"'}
        return content, headers | {"Content-Type": "application/octet-stream"}

    def validate_card(self) -> Any:
        asked = json.loads(self.body)
        if asked.get("repoType") != "model" or (faults := card_faults(asked["content"])):
            raise Refused(400, "; ".join(faults))
        return {"errors": [], "warnings": []}


REPO, REV = r"(?P<repo>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
ROUTES: Iterable[tuple[str, str, Callable[..., Any]]] = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_card),
    ("POST", rf"/api/models/{REPO}/preupload/{REV}", _Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REV}", _Handler.make_commit),
    ("POST", rf"/api/models/{REPO}/tag/{REV}", _Handler.tag),
    ("GET", rf"/api/models/{REPO}/refs", _Handler.refs),
    ("GET", rf"/api/models/{REPO}/tree/{REV}", _Handler.tree),
    ("GET", rf"/api/models/{REPO}/revision/{REV}", _Handler.info),
    ("GET", rf"/api/models/{REPO}", _Handler.info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/storage/(?P<oid>\w+)/(?P<part>\d+)", _Handler.put_part),
    ("POST", r"/storage/(?P<oid>\w+)/complete", _Handler.complete),
    ("POST", r"/storage/(?P<oid>\w+)/verify", _Handler.verify),
    ("GET|HEAD", rf"/{REPO}/resolve/{REV}/(?P<path>.+)", _Handler.resolve),
)
