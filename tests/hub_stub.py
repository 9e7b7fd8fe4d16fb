"""A model hub without a network: huggingface_hub's own client code talks to a transport that serves local folders."""

import base64
import hashlib
import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub

# huggingface_hub 1.x builds on httpx, 2.x on httpx2; both have the names used here
http = importlib.import_module(type(huggingface_hub.get_session()).__module__.split(".")[0])


@dataclass
class HubStub:
    """Serves and takes models.

    Attributes:
        models: folder by (name, revision); the commit of a revision is a hash of the two.
        gated: names that need a token.
        token: the one that opens them.
        online: whether connections succeed.
        requests: (method, path, token) of every request so far.
    """

    models: dict[tuple[str, str], Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_secret"  # noqa: S105
    online: bool = True
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    pushed: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @contextmanager
    def installed(self) -> Iterator["HubStub"]:
        """Let huggingface_hub use this transport."""
        transport = http.MockTransport(self._handle)
        huggingface_hub.set_client_factory(lambda: http.Client(transport=transport, follow_redirects=True))
        try:
            yield self
        finally:
            huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)

    def downloads(self) -> list[str]:
        """Names of the files fetched so far."""
        return [path.rsplit("/", 1)[1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def _handle(self, request: Any) -> Any:
        authorization = request.headers.get("authorization", "")
        token = authorization.removeprefix("Bearer ") or None
        self.requests.append((request.method, request.url.path, token))
        if not self.online:
            raise http.ConnectError("no network", request=request)
        for method, pattern, answer in (
            ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/(.+)", self._tree),
            ("GET", r"/api/models/([^/]+/[^/]+)", self._info),
            ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
            ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", lambda _request: http.Response(200, json={"errors": [], "warnings": []})),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
        ):
            match = re.fullmatch(pattern, request.url.path)
            if match and method == request.method:
                name = match[1] if match.groups() else None
                if name in self.gated and token != self.token:
                    return _error(401, "GatedRepo", "Access to this model is restricted. Please log in.")
                return answer(request, *match.groups())
        raise AssertionError(f"the stub has no answer to {request.method} {request.url}")

    def _find(self, name: str, revision: str) -> Path | None:
        for (model, branch), folder in self.models.items():
            if model == name and revision in (branch, commit_of(model, branch)):
                return folder
        return None

    def _info(self, _request: Any, name: str, revision: str = "main") -> Any:
        if not any(model == name for model, _ in [*self.models, *((pushed, "") for pushed in self.pushed)]):
            return _error(404, "RepoNotFound", "Repository not found")
        if name not in self.pushed and self._find(name, revision) is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return http.Response(200, json={"id": name, "sha": commit_of(name, revision), "siblings": []})

    def _tree(self, _request: Any, name: str, revision: str) -> Any:
        files = sorted(path for path in self._find(name, revision).rglob("*") if path.is_file())
        return http.Response(
            200,
            json=[
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _etag(path)} for path in files
            ],
        )

    def _file(self, request: Any, name: str, revision: str, file: str) -> Any:
        path = self._find(name, revision) / file
        if not path.exists():
            return _error(404, "EntryNotFound", "Entry not found")
        content = path.read_bytes()
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": revision, "Content-Length": str(len(content))}
        return http.Response(200, headers=headers, content=b"" if request.method == "HEAD" else content)

    def _create(self, request: Any) -> Any:
        body = json.loads(request.content)
        name = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
        self.pushed[name] = {}
        return http.Response(200, json={"url": f"https://huggingface.co/{name}"})

    def _preupload(self, request: Any, name: str, revision: str) -> Any:
        files = [file["path"] for file in json.loads(request.content)["files"]]
        modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
        return http.Response(200, json={"files": modes})

    def _commit(self, request: Any, name: str, revision: str) -> Any:
        for line in map(json.loads, request.content.splitlines()):
            if line["key"] == "file":
                self.pushed[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = commit_of(name, revision)
        url = f"https://huggingface.co/{name}/commit/{commit}"
        return http.Response(200, json={"success": True, "commitOid": commit, "commitUrl": url})


def commit_of(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name}@{revision}".encode(), usedforsecurity=False).hexdigest()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


def _error(status: int, code: str, message: str) -> Any:
    return http.Response(status, headers={"X-Error-Code": code, "X-Error-Message": message}, json={"error": message})
