"""
A local server with as much of the hub's protocol as huggingface_hub needs to make a repository, upload to it, list it and
download from it. Files lie in memory: `repos` {name: {"private": bool, "files": {path: bytes}}}.
"""
import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote, urlsplit


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, code, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.requests.append((self.command, path))
        if self.headers.get("Authorization") == "Bearer hf_reader" and self.command in ("POST", "PUT"):
            return self.reply(403, {"error": "forbidden"}, X_Error_Message="forbidden")
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        for pattern, method in ((r"/api/models/([^/]+/[^/]+)/preupload/main", self.preupload),
                                (r"/api/models/([^/]+/[^/]+)/commit/main", self.commit),
                                (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.lfs_batch),
                                (r"/lfs/([0-9a-f]+)()", self.lfs_put),
                                (r"/api/models/([^/]+/[^/]+)/tree/[^/]+(?:/.*)?", self.tree),
                                (r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", self.info),
                                (r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.resolve)):
            if match := re.fullmatch(pattern, path):
                return method(body, *match.groups())
        return self.reply(404, {"error": f"no {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def create(self, asked):
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.server.repos:
            return self.reply(409, {"error": "there already", "url": f"{self.server.url}/{name}"})
        self.server.repos[name] = {"private": "private" in (asked.get("visibility"), asked.get("private") and "private"),
                                   "files": {}}
        return self.reply(200, {"url": f"{self.server.url}/{name}"})

    def preupload(self, body, repo):
        return self.reply(200, {"files": [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
             "shouldIgnore": False, "oid": None} for f in json.loads(body)["files"]]})

    def lfs_batch(self, body, repo):
        objects = []
        for o in json.loads(body)["objects"]:
            there = o["oid"] in self.server.objects
            action = {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}", "header": {}}}
            objects.append({"oid": o["oid"], "size": o["size"], **({} if there else {"actions": action})})
        return self.reply(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def lfs_put(self, body, oid, _):
        if self.server.fail_uploads:
            self.server.fail_uploads -= 1
            return self.reply(400, {"error": "broken"})
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        return self.reply(200)

    def commit(self, body, repo):
        files = self.server.repos[repo]["files"]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        return self.reply(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{'c' * 40}", "commitOid": "c" * 40,
                                "pullRequestUrl": None})

    def info(self, body, repo):
        if repo not in self.server.repos:
            return self.reply(404, {"error": "none"}, X_Error_Code="RepoNotFound")
        found = self.server.repos[repo]
        return self.reply(200, {"id": repo, "sha": "c" * 40, "private": found["private"],
                                "siblings": [{"rfilename": name} for name in sorted(found["files"])]})

    def tree(self, body, repo):
        return self.reply(200, [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                                for name, data in sorted(self.server.repos[repo]["files"].items())])

    def resolve(self, body, repo, name):
        data = self.server.repos.get(repo, {"files": {}})["files"].get(name)
        if data is None:
            return self.reply(404, {"error": "none"}, X_Error_Code="EntryNotFound")
        return self.reply(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit="c" * 40)


@contextlib.contextmanager
def hub_server():
    """A running server; `url`, `repos`, `objects`, `requests`, and `fail_uploads`: how many of the next are refused."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repos, server.objects, server.requests, server.fail_uploads = {}, {}, [], 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
