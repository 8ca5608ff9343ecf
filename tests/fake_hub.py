"""A Hugging Face hub on loopback, as far as data sets need it: listings, ranged downloads that can
be cut, errors, uploads."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """`repos`: {(repo, revision): {path: bytes}}; `private` and `gated` repos need `token`.
    `requests` lists what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.private, self.gated, self.token = {}, set(), set(), "hf_right"
        self.requests, self.pushed, self.created = [], {}, []
        self.cut_after = 0  # bytes after which the next download breaks off, once
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @staticmethod
    def commit(repo, revision):
        return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()

    def find(self, repo, revision):
        """Return (commit, files) of a revision given by its name or commit."""
        for (name, at), inside in self.repos.items():
            if name == repo and revision in (at, self.commit(name, at)):
                return self.commit(name, at), inside


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, value, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def allowed(self, repo):
        hub, known = self.server, any(name == repo for name, _ in self.server.repos)
        right = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if not known or repo in hub.private and not right:
            # like the hub: without a token it does not even tell whether there is such a repository
            self.reply(
                {"error": "Repository not found"},
                404 if right else 401,
                X_Error_Code="RepoNotFound",
                X_Error_Message="not found",
            )
        elif repo in hub.gated and not right:
            self.reply(
                {"error": "gated"},
                403,
                X_Error_Code="GatedRepo",
                X_Error_Message="Access to this dataset is restricted",
            )
        else:
            return True

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            repo, kind, revision = found[1], found[2], found[3] or "main"
            if not self.allowed(repo):
                return
            if (there := hub.find(repo, revision)) is None:
                return self.reply(
                    {"error": "no"},
                    404,
                    X_Error_Code="RevisionNotFound",
                    X_Error_Message=f"Invalid rev id: {revision}",
                )
            commit, inside = there
            if kind == "tree":
                return self.reply(
                    [
                        {
                            "type": "file",
                            "path": name,
                            "size": len(data),
                            "oid": hashlib.sha1(data).hexdigest(),
                        }
                        for name, data in inside.items()
                    ]
                )
            return self.reply(
                {
                    "id": repo,
                    "sha": commit,
                    "private": False,
                    "siblings": [{"rfilename": name} for name in inside],
                }
            )
        if found := re.fullmatch(
            r"/datasets/([^/]+/[^/]+)/resolve/(refs/convert/parquet|[^/]+)/(.+)", path
        ):
            if not self.allowed(found[1]):
                return
            commit, inside = hub.find(found[1], found[2])
            whole = inside[found[3]]
            headers = {
                "ETag": f'"{hashlib.sha1(whole).hexdigest()}"',
                "X_Repo_Commit": commit,
                "Accept_Ranges": "bytes",
            }
            start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
            if start:
                return self.reply(
                    whole[start:],
                    206,
                    Content_Range=f"bytes {start}-{len(whole) - 1}/{len(whole)}",
                    **headers,
                )
            if self.command == "GET" and hub.cut_after:
                cut, hub.cut_after = hub.cut_after, 0
                self.send_response(200)
                for name, text in (headers | {"Content_Length": str(len(whole))}).items():
                    self.send_header(name.replace("_", "-"), text)
                self.end_headers()
                self.wfile.write(whole[:cut])
                self.close_connection = True
                return None
            return self.reply(whole, **headers)
        return self.reply({"error": "not found"}, 404)

    do_HEAD = do_GET

    def do_POST(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.reply({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            hub.created.append(asked)
            hub.repos.setdefault((f"{asked.get('organization')}/{asked['name']}", "main"), {})
            return self.reply(
                {"url": f"{hub.url}/datasets/{asked.get('organization')}/{asked['name']}"}
            )
        if "/preupload/" in path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self.reply(
                {
                    "files": [
                        {"path": path, "uploadMode": "regular", "shouldIgnore": False}
                        for path in paths
                    ]
                }
            )
        if "/commit/" in path:
            repo = re.match(r"/api/datasets/([^/]+/[^/]+)/", path)[1]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.pushed[repo, line["value"]["path"]] = base64.b64decode(
                        line["value"]["content"]
                    )
                    hub.repos[repo, "main"][line["value"]["path"]] = b"pushed"
                elif line["key"] == "deletedFile":
                    del (
                        hub.pushed[repo, line["value"]["path"]],
                        hub.repos[repo, "main"][line["value"]["path"]],
                    )
            return self.reply(
                {
                    "commitUrl": f"{hub.url}/datasets/{repo}/commit/{'0' * 40}",
                    "commitOid": "0" * 40,
                    "hookOutput": "",
                }
            )
        return self.reply({"error": "not found"}, 404)
