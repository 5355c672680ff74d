"""A server on a real socket that speaks the part of the Hub's API that a push and a download need."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results


USER, TOKEN = "somebody", "hf_PlantedTokenOfTheTests1234"
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.png", "*.parquet", "*tfevents*")  # as in the Hub's .gitattributes
DATASET_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


class FakeHub(ThreadingHTTPServer):
    """
    Repositories in memory.

    Attributes:
        repos (`dict[str, list[dict[str, dict]]]`): Of each repository its commits, each with its files by path.
        requests (`list[tuple[str, str, dict]]`): Method, path and headers of everything that was asked.
        fault (`Callable[[str, str], str | None]`): What goes wrong with a request, given method and path: a status as
            text, `"drop"` to close the connection in the middle of its body, or `None`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, list[dict]] = {}
        self.messages: dict[str, list[str]] = {}
        self.blobs: dict[str, bytes] = {}  # large files by SHA-256
        self.requests: list[tuple[str, str, dict]] = []
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.lock = threading.RLock()

    def handle_error(self, request, client_address):
        pass  # a client that went away, or a connection that was dropped on purpose

    def files(self, repo: str) -> dict[str, bytes]:
        """Files of the newest commit, such as of `models/somebody/student`."""
        return {path: self.content(entry) for path, entry in self.repos[repo][-1].items()}

    def content(self, entry: dict) -> bytes:
        return self.blobs[entry["oid"]] if entry["lfs"] else entry["content"]

    def stored(self) -> bytes:
        """Every byte that was ever stored."""
        with self.lock:
            regular = [
                entry["content"] for commits in self.repos.values() for files in commits for entry in files.values()
                if not entry["lfs"]
            ]  # fmt: skip
            return b"\n".join([*self.blobs.values(), *regular, repr(self.messages).encode()])


def commit_id(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo}@{number}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args):
        pass

    def answer(self, body=b"", status: int = 200, **headers: str):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str | None = None):
        headers = {"X-Error-Message": message}
        if code is not None:
            headers["X-Error-Code"] = code
        self.answer({"error": message}, status, **headers)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_request(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        with self.server.lock:
            self.server.requests.append((self.command, path, dict(self.headers)))
        fault = self.server.fault(self.command, path)
        if fault == "drop":
            self.rfile.read(min(64, int(self.headers.get("Content-Length") or 64)))
            self.close_connection = True
            self.connection.close()
            return
        body = self.body()
        if fault is not None:
            self.refuse(int(fault), "out of order")
            return
        with self.server.lock:
            for method, pattern, handler, needs_token in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                        self.refuse(401, "Invalid credentials in Authorization header")
                        return
                    handler(self, body, parse_qs(url.query), **match.groupdict())
                    return
        self.refuse(404, f"no such address: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, body, query):
        asked = json.loads(body)
        kind = asked.get("type") or "model"
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        repo = f"{kind}s/{repo_id}"
        url = f"{self.server.endpoint}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}"
        if repo in self.server.repos:
            self.answer({"error": "You already created this repo", "url": url}, 409)
            return
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
        self.server.repos[repo] = [{".gitattributes": self.regular(attributes)}]
        self.server.messages[repo] = ["initial commit"]
        self.answer({"url": url, "name": repo_id, "id": repo_id})

    @staticmethod
    def regular(content: bytes) -> dict:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"oid": oid, "size": len(content), "lfs": False, "content": content}

    def validate_yaml(self, body, query):
        text = json.loads(body)["content"]
        metadata = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
        errors = [
            f'"datasets[{index}]" with value "{name}" is not valid'
            for index, name in enumerate(metadata.get("datasets", []))
            if not DATASET_ID.fullmatch(name)
        ]
        if not isinstance(metadata.get("base_model", ""), str | list):
            errors.append('"base_model" must be a string or a list')
        if "model-index" in metadata:
            try:
                model_index_to_eval_results(metadata["model-index"])
            except (KeyError, TypeError, ValueError) as error:
                errors.append(f'"model-index" is not valid: {error!r}')
        if errors:
            self.answer({"errors": [{"message": error} for error in errors], "warnings": []}, 400)
        else:
            self.answer({"errors": [], "warnings": []})

    def preupload(self, body, query, kind, repo_id, revision):
        files = self.server.repos[f"{kind}/{repo_id}"][-1]
        modes = []
        for file in json.loads(body)["files"]:
            name = file["path"].rpartition("/")[2]
            lfs = file["size"] > 10_000_000 or any(fnmatch(name, pattern) for pattern in LFS_PATTERNS)
            modes.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": files[file["path"]]["oid"] if file["path"] in files else None,
                }
            )
        self.answer({"files": modes})

    def lfs_batch(self, body, query, repo_id, **_):
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.blobs:
                address = f"{self.server.endpoint}/storage/{asked['oid']}"
                entry["actions"] = {
                    "upload": {"href": f"{address}?X-Amz-Signature=secretsignature"},
                    "verify": {"href": f"{self.server.endpoint}/verify/{asked['oid']}"},
                }
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, body, query, oid):
        if query.get("X-Amz-Signature") != ["secretsignature"] or hashlib.sha256(body).hexdigest() != oid:
            self.refuse(400, "wrong signature or content")
            return
        self.server.blobs[oid] = body
        self.answer(ETag=f'"{oid}"')

    def verify(self, body, query, oid):
        stored = self.server.blobs.get(oid)
        if stored is None or len(stored) != json.loads(body)["size"]:
            self.refuse(404, "not uploaded")
        else:
            self.answer({})

    def commit(self, body, query, kind, repo_id, revision):
        repo = f"{kind}/{repo_id}"
        files = dict(self.server.repos[repo][-1])
        summary = ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                summary = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = self.regular(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    self.refuse(400, f"the large file {value['path']} was not uploaded")
                    return
                files[value["path"]] = {"oid": value["oid"], "size": value["size"], "lfs": True}
        self.server.repos[repo].append(files)
        self.server.messages[repo].append(summary)
        oid = commit_id(repo, len(self.server.repos[repo]) - 1)
        self.answer({"success": True, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid})

    def at_revision(self, repo: str, revision: str) -> tuple[dict, str] | None:
        """Files and commit, `None` once it has answered that there is no such thing."""
        if repo not in self.server.repos:
            self.refuse(404, "Repository not found", "RepoNotFound")
            return None
        commits = self.server.repos[repo]
        for number in reversed(range(len(commits))):
            if revision in ("main", commit_id(repo, number)):
                return commits[number], commit_id(repo, number)
        self.refuse(404, "Invalid rev id", "RevisionNotFound")
        return None

    def info(self, body, query, kind, repo_id, revision="main"):
        found = self.at_revision(f"{kind}/{repo_id}", revision)
        if found is not None:
            siblings = [{"rfilename": path} for path in found[0]]
            self.answer({"id": repo_id, "sha": found[1], "siblings": siblings, "private": False, "tags": []})

    def tree(self, body, query, kind, repo_id, revision, folder=None):
        found = self.at_revision(f"{kind}/{repo_id}", revision)
        if found is None:
            return
        prefix = f"{folder}/" if folder else ""
        entries = []
        for path, file in found[0].items():
            if path.startswith(prefix):
                entry = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"]}
                if file["lfs"]:
                    entry["lfs"] = {"oid": file["oid"], "size": file["size"], "pointerSize": 134}
                entries.append(entry)
        if folder and not entries:
            self.refuse(404, "no such folder", "EntryNotFound")
        else:
            self.answer(entries)

    def resolve(self, body, query, repo_id, revision, path, kind="models"):
        found = self.at_revision(f"{kind}/{repo_id}", revision)
        if found is None:
            return
        files, commit = found
        if path not in files:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        file = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file["oid"]}"'}
        if file["lfs"]:
            headers |= {"X-Linked-Etag": f'"{file["oid"]}"', "X-Linked-Size": str(file["size"])}
        self.answer(self.server.content(file), **headers)


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_KIND = r"(?P<kind>models|datasets)"
_REVISION = r"(?P<revision>[\w.-]+)"
_ROUTES = [
    (("POST",), r"/api/repos/create", _Handler.create, True),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml, False),
    (("POST",), rf"/api/{_KIND}/{_REPO}/preupload/{_REVISION}", _Handler.preupload, True),
    (("POST",), rf"/api/{_KIND}/{_REPO}/commit/{_REVISION}", _Handler.commit, True),
    (("POST",), rf"/(?:{_KIND}/)?{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch, True),
    (("PUT",), r"/storage/(?P<oid>[0-9a-f]{64})", _Handler.store, False),
    (("POST",), r"/verify/(?P<oid>[0-9a-f]{64})", _Handler.verify, True),
    (("GET",), rf"/api/{_KIND}/{_REPO}/tree/{_REVISION}(?:/(?P<folder>.+))?", _Handler.tree, False),
    (("GET",), rf"/api/{_KIND}/{_REPO}(?:/revision/{_REVISION})?", _Handler.info, False),
    (("GET", "HEAD"), rf"/(?P<kind>datasets)/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve, False),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve, False),
]
