"""
Datasets of parquet shards on the hub, fetched shard by shard into the layout of nanochat.shards: interrupted transfers go
on, what is there needs no network and no permission to write, and all shards of a folder are of one revision. Which
shards train and which one validates: nanochat.data.splits.
"""
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from nanochat.common import atomic_write, print0, raise_if_full
from nanochat.data.splits import choose, left_out_line, side_of
from nanochat.shards import OTHER_SOURCES, first_line, fsync, locked, open_shard, progress

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


def _known_listing(repo: str, folder: Path) -> dict | None:
    """The listing that is kept beside the shards; None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        listing = json.loads((folder / "hub.json").read_text())
        if isinstance(listing, dict) and listing.get("repo") == repo and listing.get("files"):
            return listing
    return None


def _hub_listing(repo: str, folder: Path) -> dict:
    """
    {"repo", "revision", "files": [[name, bytes], ...], "card": the configurations of the dataset card or None}: asked once,
    then kept beside the shards, so that later calls need no network and all shards are of one revision.
    """
    if listing := _known_listing(repo, folder):
        return listing
    from huggingface_hub import HfApi
    info = _attempt(lambda: HfApi().dataset_info(repo, files_metadata=True, timeout=20), repo, folder)
    files = sorted((s.rfilename, s.size or 0) for s in info.siblings if s.rfilename.endswith(".parquet"))
    if not files:
        raise ValueError(f"{repo} holds 0 .parquet files, but one or more are needed: choose another dataset, "
                         f"or {OTHER_SOURCES}")
    card = getattr(info, "card_data", None)
    listing = {"repo": repo, "revision": info.sha, "files": files, "card": card.get("configs") if card else None}
    with atomic_write(folder / "hub.json", "w") as f:
        json.dump(listing, f)
    return listing


class _Shards(NamedTuple):
    """Of a dataset: (name on the hub, bytes, target) of all shards that train and of the one that validates."""
    train: list[tuple[str, int, Path]]
    val: tuple[str, int, Path] | None
    left_out: dict[str, str]

    def first(self, n: int) -> list[tuple[str, int, Path]]:
        """What `n` training shards need, validation first: a folder left half-filled never validates on a training shard."""
        return ([self.val] if self.val else []) + self.train[:n]


def _choose_shards(listing: dict, folder: Path, config: str | None) -> _Shards:
    sizes = dict(map(tuple, listing["files"]))
    try:
        chosen = choose(list(sizes), listing.get("card"), config)
    except ValueError as e:
        raise ValueError(f"{listing['repo']}: {e}") from e

    def shard(name, side):
        target = name.replace("/", "--")
        if chosen.val and side_of(target) != side:  # what only the card says is said by the name, too
            target = f"{target.removesuffix('.parquet')}--{side}.parquet"
        return name, sizes[name], folder / target
    train = [shard(name, "train") for name in chosen.train]
    if chosen.val:
        return _Shards(train, shard(chosen.val[0], "val" if side_of(chosen.val[0]) != "test" else "test"), chosen.left_out)
    return _Shards(train[:-1], train[-1], chosen.left_out) if len(train) > 1 else _Shards(train, None, chosen.left_out)


def prepare_hub(repo: str, num_shards: int, workers: int, base_data: Path, config: str | None = None) -> Path:
    """
    The folder of base_data with the first `num_shards` training shards of the hub's dataset `repo` and one that validates:
    the first that is named validation or test, else the last of all. A dataset of a single shard: that file, to be cut.
    config: one of its configurations (None: the default one).
    """
    if num_shards < 1 or workers < 1:
        raise ValueError(f"num_shards={num_shards} and workers={workers} must both be at least 1")
    folder = base_data / (repo + (f":{config}" if config else "")).replace("/", "--").replace(":", "--")

    def missing(chosen: _Shards) -> tuple[list, set[Path]]:
        """The shards to be fetched, and files that an earlier version fetched and that are not of this dataset's choice."""
        known = {path for *_, path in chosen.first(len(chosen.train))}
        return [s for s in chosen.first(num_shards) if not s[2].exists()], set(folder.glob("*.parquet")) - known
    listing = _known_listing(repo, folder)
    chosen = _choose_shards(listing, folder, config) if listing else None
    if chosen is None or any(missing(chosen)):
        with locked(folder):
            listing = _hub_listing(repo, folder)
            chosen = _choose_shards(listing, folder, config)
            if chosen.left_out:
                print0(left_out_line(repo, chosen.left_out))
            new, strange = missing(chosen)
            for path in strange:
                (folder / "not-read").mkdir(exist_ok=True)
                path.rename(folder / "not-read" / path.name)
            if new:
                _fetch_all(repo, listing["revision"], new, workers, folder)
    shards = chosen.first(num_shards)
    for *_, path in shards:
        open_shard(path).close()
    return folder if len(shards) > 1 else shards[0][2]


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

    size = sum(size for _, size, _ in missing)
    if not sys.stderr.isatty():  # where there is no bar it is said once, and then once a minute
        print(f"fetching {len(missing)} shards of {repo}, {size / 1e6:,.0f} MB", file=sys.stderr, flush=True)
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    pool = ThreadPoolExecutor(workers)
    try:
        with progress(size or None, f"fetching {len(missing)} shards") as bar:
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
