"""A small Hugging Face hub on this machine, for the real client: repositories in memory, uploads by Git LFS, downloads."""
import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


class Hub:
    """
    repos: {USER/NAME: {"private": bool, "files": {path: bytes}, "commits": int}}. uploads: oids in the order they came;
    fail_after: how many uploads succeed before the server answers 507 to all others (None: all succeed). token: who else may
    not write.
    """
    def __init__(self, token="hf_test"):
        self.repos, self.lfs, self.uploads, self.fail_after, self.token = {}, {}, [], None, token
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                url = urllib.parse.urlsplit(self.path)
                allowed = self.headers.get("Authorization") == f"Bearer {hub.token}"
                try:
                    code, content, headers = hub.handle(self.command, urllib.parse.unquote(url.path), body, allowed)
                except KeyError:
                    code, content, headers = 404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"}
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(code)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)
            do_GET = do_POST = do_PUT = do_HEAD = answer
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def handle(self, method, path, body, allowed):
        """(status, content, headers) of one request."""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path.startswith("/lfs/"):
            return self.receive(path.removeprefix("/lfs/"), body)
        if not allowed:
            return 401, {"error": "Invalid credentials"}, {}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}, {}
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.repos[name] = {"private": bool(private), "files": {}, "commits": 0}
            return 200, {"url": f"{self.url}/{name}", "name": name}, {}
        if path == "/api/whoami-v2":
            return 200, {"name": "someone", "orgs": []}, {}
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/[^/]+.*)?", path):
            return self.api(self.repos[match[1]], match[1], match[2], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
            repo = self.repos[match[1]]
            data = repo["files"][match[2]]
            return 200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.sha(repo)}
        raise KeyError(path)

    @staticmethod
    def sha(repo):
        return hashlib.sha1(str(repo["commits"]).encode()).hexdigest()

    def api(self, repo, name, what, body):
        if what in (None, "revision"):
            return 200, {"id": name, "sha": self.sha(repo), "private": repo["private"], "tags": [],
                         "siblings": [{"rfilename": p, "size": len(d)} for p, d in repo["files"].items()]}, {}
        if what == "tree":
            return 200, [{"type": "file", "path": p, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                         for p, data in sorted(repo["files"].items())], {}
        if what == "preupload":
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".pt")) else "regular",
                      "shouldIgnore": False, "oid": None} for f in json.loads(body)["files"]]
            return 200, {"files": modes}, {}
        assert what == "commit"
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo["files"][value["path"]] = self.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo["files"][value["path"]]
        repo["commits"] += 1
        sha = self.sha(repo)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}"}, {}

    def lfs_batch(self, wanted):
        objects = [{"oid": o["oid"], "size": o["size"]} | ({} if o["oid"] in self.lfs else {
            "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}}) for o in wanted["objects"]]
        return 200, {"transfer": "basic", "objects": objects}, {}

    def receive(self, oid, body):
        if self.fail_after is not None and len(self.uploads) >= self.fail_after:
            return 507, {"error": "the disk of the hub is full"}, {}
        assert hashlib.sha256(body).hexdigest() == oid
        self.lfs[oid] = body
        self.uploads.append(oid)
        return 200, b"", {}
