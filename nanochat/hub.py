"""
Datasets of parquet shards on the hub, fetched shard by shard into the layout of nanochat.shards: interrupted transfers go
on, what is there needs no network, and all shards of a folder are of one revision.
"""
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from nanochat.common import atomic_write
from nanochat.shards import OTHER_SOURCES, first_line, fsync, locked, open_shard, progress, raise_if_full

DEFAULT_SHARDS = 4  # training shards fetched from a hub (climbmix: some 90 MB each); the validation shard comes on top
DEFAULT_WORKERS = 4
RETRY_SECONDS = 1.0  # first wait after a failed transfer; doubles
ATTEMPTS = 3


def huggingface_cli() -> None:
    """
    The command `huggingface-cli`, under which nanochat's instructions download d32: the library's own CLI, which since
    huggingface_hub 1.0 is installed as `hf` only and takes the same arguments.
    """
    from huggingface_hub.cli import hf
    hf.main()


def _attempt(action: Callable, what: str, folder: Path):
    """action(), tried again after a wait when the transfer failed. Raises ValueError or OSError with the remedy."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as e:  # the hub's client lets several libraries' exceptions through
            raise_if_full(e, folder)
            if isinstance(e, RepositoryNotFoundError):
                raise ValueError(f"{what}: no such dataset on the hub, or none you may read (`hf auth login`): check "
                                 f"the name, or {OTHER_SOURCES}") from e
            if isinstance(e, EntryNotFoundError) and not isinstance(e, LocalEntryNotFoundError):
                raise ValueError(f"{what}: no such file on the hub; remove {folder} to list the dataset afresh") from e
            if isinstance(e, PermissionError):
                raise
            if attempt == ATTEMPTS:
                raise ConnectionError(f"{what} could not be fetched ({first_line(e)}): check the network and run the "
                                      f"same command again (what came is kept), or {OTHER_SOURCES}") from e
            time.sleep(RETRY_SECONDS * 2 ** (attempt - 1))


def _hub_listing(repo: str, folder: Path) -> dict:
    """
    {"repo", "revision", "files": [[name, bytes], ...]}: asked once, then kept beside the shards, so that later calls
    need no network and all shards are of one revision.
    """
    path = folder / "hub.json"
    with contextlib.suppress(FileNotFoundError, ValueError):
        listing = json.loads(path.read_text())
        if listing.get("repo") == repo and listing.get("files"):
            return listing
    from huggingface_hub import HfApi
    info = _attempt(lambda: HfApi().dataset_info(repo, files_metadata=True, timeout=20), repo, folder)
    files = sorted((s.rfilename, s.size or 0) for s in info.siblings if s.rfilename.endswith(".parquet"))
    if len(files) < 2:
        raise ValueError(f"{repo} holds {len(files)} .parquet files, but two or more are needed (one validates): "
                         f"choose another dataset, or {OTHER_SOURCES}")
    listing = {"repo": repo, "revision": info.sha, "files": files}
    with atomic_write(path, "w") as f:
        json.dump(listing, f)
    return listing


def prepare_hub(repo: str, num_shards: int, workers: int, base_data: Path) -> Path:
    """The folder of base_data with the first `num_shards` training shards of the hub's dataset `repo` and its last one."""
    if num_shards < 1 or workers < 1:
        raise ValueError(f"num_shards={num_shards} and workers={workers} must both be at least 1")
    folder = base_data / repo.replace("/", "--")
    with locked(folder):
        listing = _hub_listing(repo, folder)
        *train, last = [(name, size, folder / name.replace("/", "--")) for name, size in listing["files"]]
        # Validation first and alone: a folder left half-filled never validates on a training shard.
        wanted = [last, *train[:num_shards]]
        missing = [shard for shard in wanted if not shard[2].exists()]
        if missing:
            _fetch_all(repo, listing["revision"], missing, workers, folder)
    for *_, path in wanted:
        open_shard(path).close()
    return folder


def _fetch_all(repo: str, revision: str, missing: list[tuple[str, int, Path]], workers: int, folder: Path) -> None:
    """The shards (name, bytes, target), the first alone, then `workers` at once, with one progress bar for all."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    staging = folder / ".download"  # here an interrupted transfer goes on; whole, checked shards are renamed from it

    def fetch(name: str, target: Path) -> None:
        got = _attempt(lambda: hf_hub_download(repo, name, repo_type="dataset", revision=revision, local_dir=staging),
                       f"{repo}/{name}", folder)
        open_shard(got).close()
        fsync(got)
        os.replace(got, target)

    def arrived() -> int:
        sizes = 0
        for path in (*(target for *_, target in missing), *staging.rglob("*.incomplete")):
            with contextlib.suppress(OSError):  # not there yet, or just renamed
                sizes += path.stat().st_size
        return sizes

    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    pool = ThreadPoolExecutor(workers)
    try:
        with progress(sum(size for _, size, _ in missing) or None, f"fetching {len(missing)} shards") as bar:
            for part in (missing[:1], missing[1:]):
                pending = {pool.submit(fetch, name, target) for name, _, target in part}
                while pending:
                    done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    bar.update(max(arrived() - bar.n, 0))
                    for future in done:
                        future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        if not quiet:
            enable_progress_bars()
    shutil.rmtree(staging, ignore_errors=True)
