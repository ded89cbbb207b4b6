"""Hub datasets against a stub of the hub, and through the real client against a local server."""
import collections
import errno
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from test_shards import both_splits, make_texts, nothing_made, write_shard

from nanochat import hub as hub_module
from nanochat.dataset import prepare
from nanochat.shards import list_shards


class StubHub:
    """Stands for the hub: a folder of shards; counts requests, fails on demand."""

    def __init__(self, root, monkeypatch):
        self.root, self.fail, self.requests, self.down = root, collections.Counter(), [], False
        self.running = self.most = 0
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(hub_module, "RETRY_SECONDS", 0.001)

    def dataset_info(self, repo, files_metadata, timeout):
        self.requests.append(repo)
        if self.down:
            raise RuntimeError("Name or service not known\nsecond line")
        names = sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())
        sibling = collections.namedtuple("Sibling", "rfilename size")
        info = collections.namedtuple("Info", "sha siblings")
        return info("cafe", [sibling(n, (self.root / n).stat().st_size) for n in names])

    def download(self, repo, name, repo_type, revision, local_dir):
        assert (repo_type, revision) == ("dataset", "cafe")
        self.requests.append(name)
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.02)
        self.running -= 1
        if self.down or self.fail[name] > 0:
            self.fail[name] -= 1
            raise RuntimeError("connection reset")
        target = Path(local_dir) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((self.root / name).read_bytes())
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for i in range(7):
        write_shard(tmp_path / "remote/data" / f"shard_{i:05d}.parquet", make_texts(5, i))
    (tmp_path / "remote/README.md").write_text("card")
    return StubHub(tmp_path / "remote", monkeypatch)


def test_hub_fetches_what_is_asked_and_the_last(tmp_path, hub):
    folder = prepare("own/set", num_shards=3, workers=3, base_dir=tmp_path / "base")
    assert folder == tmp_path / "base/base_data/own--set"
    train, val = both_splits(folder)
    assert train == [text for i in range(3) for text in make_texts(5, i)] and val == make_texts(5, 6)
    assert hub.most > 1  # several at once
    assert hub.requests[1] == "data/shard_00006.parquet"  # validation before everything else
    assert not (folder / ".download").exists()


def test_hub_needs_no_network_for_what_is_there_and_extends(tmp_path, hub):
    folder = prepare("own/set", num_shards=2, base_dir=tmp_path / "base")
    hub.down, hub.requests = True, []
    assert prepare("own/set", num_shards=2, base_dir=tmp_path / "base") == folder and not hub.requests
    assert prepare("own/set", num_shards=1, base_dir=tmp_path / "base") == folder and not hub.requests
    hub.down = False
    prepare("own/set", num_shards=4, base_dir=tmp_path / "base")
    assert sorted(hub.requests) == ["data/shard_00002.parquet", "data/shard_00003.parquet"]
    prepare("own/set", num_shards=10**6, base_dir=tmp_path / "base")
    assert len(list_shards(folder, "train")) == 6 and len(list_shards(folder, "val")) == 1


def test_hub_retries_and_goes_on_after_an_interruption(tmp_path, hub):
    hub.fail.update({"data/shard_00000.parquet": 2, "data/shard_00002.parquet": 99})
    with pytest.raises(ConnectionError, match=r"shard_00002.parquet could not be fetched.*connection reset.*embedded"):
        prepare("own/set", num_shards=3, workers=1, base_dir=tmp_path / "base")
    folder = tmp_path / "base/base_data/own--set"
    assert [p.name for p in sorted(folder.glob("*.parquet"))] == [f"data--shard_0000{i}.parquet" for i in (0, 1, 6)]
    hub.fail.clear()
    hub.requests.clear()
    prepare("own/set", num_shards=3, base_dir=tmp_path / "base")
    assert hub.requests == ["data/shard_00002.parquet"]


def test_hub_without_network_names_the_alternatives(tmp_path, hub):
    hub.down = True
    with pytest.raises(ConnectionError, match=r"own/set could not be fetched.*folder or file.*--data embedded") as info:
        prepare("own/set", base_dir=tmp_path / "base")
    assert "\n" not in str(info.value) and nothing_made(tmp_path / "base")


def test_hub_errors(tmp_path, hub, monkeypatch):
    (hub.root / "data/shard_00001.parquet").write_bytes(b"an error page")
    with pytest.raises(ValueError, match=r"shard_00001\.parquet is not a readable parquet file"):
        prepare("own/set", base_dir=tmp_path / "base")
    assert not (tmp_path / "base/base_data/own--set/data--shard_00001.parquet").exists()
    with pytest.raises(ValueError, match="num_shards=0"):
        prepare("own/set", num_shards=0, base_dir=tmp_path / "base")
    for path in list(hub.root.rglob("*.parquet"))[1:]:
        path.unlink()
    with pytest.raises(ValueError, match=r"own/other holds 1 .parquet files.*choose another"):
        prepare("own/other", base_dir=tmp_path / "base")

    def missing(*args, **kwargs):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404")
    monkeypatch.setattr(hub, "dataset_info", missing)
    with pytest.raises(ValueError, match=r"own/none: no such dataset on the hub.*embedded"):
        prepare("own/none", base_dir=tmp_path / "base")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(hub, "dataset_info", full)
    with pytest.raises(OSError, match="no room left"):
        prepare("own/none", base_dir=tmp_path / "base")


class HubHandler(http.server.BaseHTTPRequestHandler):
    """
    As much of the hub's protocol as its client needs. Each file's first transfer breaks off half-way, unless the server's
    `broken`, where it notes these, is None.
    """
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        root, broken, ranges = self.server.root, self.server.broken, self.server.ranges
        if "/tree/" in self.path:
            body = json.dumps([{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": f"{p.stat().st_size:040d}"}
                               for p in sorted(root.iterdir())]).encode()
            return self._send(200, body, {"Content-Type": "application/json"})
        if self.path.startswith("/api/"):
            body = json.dumps({"id": "own/set", "sha": "c" * 40, "siblings": [
                {"rfilename": p.name, "size": p.stat().st_size} for p in sorted(root.iterdir())]}).encode()
            return self._send(200, body, {"Content-Type": "application/json"})
        data = (root / self.path.rpartition("/")[2]).read_bytes()
        headers = {"ETag": f'"{len(data):040d}"', "X-Repo-Commit": "c" * 40, "Accept-Ranges": "bytes"}
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked:
            start = int(asked[1])
            ranges.append(start)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._send(206, data[start:], headers)
        cut = None if self.command == "HEAD" or broken is None or self.path in broken else len(data) // 2
        if cut:
            broken.add(self.path)
        return self._send(200, data, headers, cut)

    def _send(self, code, body, headers, cut=None):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection = cut is not None


def test_hub_through_its_real_client(tmp_path):
    """huggingface_hub itself against a local server that breaks every transfer once: the rest is fetched, not the whole."""
    for i in range(3):
        write_shard(tmp_path / "remote" / f"{i}.parquet", [os.urandom(400).hex() for _ in range(2000)], rows=500)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.root, server.broken, server.ranges = tmp_path / "remote", set(), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1",
           "NANOCHAT_BASE_DIR": str(tmp_path / "base"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    try:
        # The client writes whole chunks: with its 10 MB nothing of these small files would be kept.
        code = ("import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 65536; import sys; "
                "sys.argv[1:] = ['--data', 'own/set']; from nanochat.dataset import main; main()")
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "base/base_data/own--set"
    for i in range(3):
        assert (folder / f"{i}.parquet").read_bytes() == (tmp_path / "remote" / f"{i}.parquet").read_bytes()
    assert len(server.broken) == 3 and len(server.ranges) == 3 and min(server.ranges) > 0
    assert "fetching 3 shards" in done.stderr and str(folder) in done.stdout
