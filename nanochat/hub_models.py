"""
Fetches one nanochat checkpoint of a repository on the hub: its weights, its meta file and its tokenizer, and nothing else.
What will be fetched is printed first, and a file that is there already is kept as it is.
"""
import errno
import re
import shutil
from pathlib import Path, PurePosixPath

from nanochat.checkpoint_manager import STEP_FILES, list_steps
from nanochat.common import existing_folder, is_full, print0
from nanochat.weight_files import first_line, some

TOKENIZER_FILES = {"tokenizer.pkl", "tokenizer.json", "tokenizer_config.json", "token_bytes.pt", "chat_template.jinja"}
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w./-]+)?")


def is_repo(name: str) -> bool:
    """Whether a name is that of a repository, OWNER/NAME or OWNER/NAME/FOLDER, and of no folder on this machine."""
    return bool(REPO.fullmatch(name)) and not Path(name).exists()


def model_files(names: list[str], step: int | None, inside: str, repo: str) -> tuple[str, list[str]]:
    """
    (the folder, the names of the files) of one checkpoint among the names in a repository: of the step given, or else the
    newest. inside: only in this folder ('': in any). ValueError where there is none, or more than one to choose from.
    """
    found = {}
    for name in names:
        path = PurePosixPath(name)
        match = re.fullmatch(r"meta_(\d+)\.json", path.name)
        if match and any(str(path.with_name(f"model_{match[1]}{end}")) in names for end in STEP_FILES):
            found.setdefault(str(path.parent), {})[int(match[1])] = match[1]
    if inside:
        found = {k: v for k, v in found.items() if k == inside.strip("/")}
    if not found:
        raise ValueError(f"{repo} has no nanochat checkpoint{f' in {inside}' if inside else ''} (model_NNNNNN.pt with "
                         "meta_NNNNNN.json): check the name")
    if len(found) > 1:
        raise ValueError(f"{repo} holds {len(found)} models, in {some(sorted(found))}: name one, such as "
                         f"{repo}/{sorted(set(found) - {'.'})[0]}")
    (folder, steps), = found.items()
    if step is not None and step not in steps:
        raise ValueError(f"{repo} has no step {step}: it has {', '.join(map(str, sorted(steps)))}")
    digits, here = steps[max(steps) if step is None else step], PurePosixPath(folder)
    weights = [n for n in names if PurePosixPath(n).parent == here
               and re.fullmatch(rf"model_{digits}(\.pt|\.safetensors|-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
                                PurePosixPath(n).name)]
    if (torch_file := str(here / f"model_{digits}.pt")) in weights:
        weights = [torch_file]
    texts = [n for n in names if PurePosixPath(n).name in TOKENIZER_FILES
             and PurePosixPath(n).parent in (here, here / "tokenizer")]
    return folder, [*weights, str(here / f"meta_{digits}.json"), *texts]


def fetch_model(repo: str, folder: Path, step: int | None = None) -> Path:
    """
    Fetches one checkpoint of `repo` (OWNER/NAME, or OWNER/NAME/FOLDER of a repository with several) into `folder`, or what
    is missing of it, and returns the folder that holds it. Without network what is there serves. ConnectionError where that
    is nothing; ValueError for a repository that is not there or holds no checkpoint, and for a file that is there and
    differs; OSError where the disk has no room.
    """
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError
    owner, name, *rest = repo.split("/", 2)
    whole, inside = f"{owner}/{name}", "".join(rest)
    try:
        info = huggingface_hub.HfApi().model_info(whole, files_metadata=True, timeout=20)
    except RepositoryNotFoundError as e:
        raise ValueError(f"{whole} is no folder here, and not on the hub either, or you may not read it (`hf auth login`): "
                         "check the name") from e
    except Exception as e:  # the hub's client lets several libraries' exceptions through
        if list_steps(folder / inside):
            print0(f"the hub does not answer ({first_line(e)}): {folder / inside} is taken as it is")
            return folder / inside
        raise _unreachable(whole, folder, e) from e
    sizes = {s.rfilename: s.size or 0 for s in info.siblings}
    where, names = model_files(list(sizes), step, inside, whole)
    missing = [n for n in names if not _is_here(folder / n, sizes[n])]
    print0(f"{whole} at revision {info.sha}: {len(names)} files, {sum(sizes[n] for n in names) / 1e9:.2f} GB, of which "
           f"{sum(sizes[n] for n in missing) / 1e9:.2f} GB are to be fetched into {folder}")
    if missing:
        _fetch(whole, info.sha, missing, folder, sum(sizes[n] for n in missing))
    return folder / where


def _is_here(path: Path, size: int) -> bool:
    """Whether a file is here already. ValueError where another one has its name."""
    if not path.exists():
        return False
    if not path.is_file() or path.stat().st_size != size:
        raise ValueError(f"{path} is another file than the hub's ({path.stat().st_size:,} bytes, there {size:,}) and is not "
                         "overwritten: move it away, or name another folder with --src")
    return True


def _fetch(repo: str, revision: str, names: list[str], folder: Path, size: int) -> None:
    import huggingface_hub
    free = shutil.disk_usage(existing_folder(folder)).free
    if free < size + 1e8:
        raise OSError(errno.ENOSPC, f"{repo} needs {size / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB of disk are "
                                    "free: free some, or move NANOCHAT_BASE_DIR")
    try:
        huggingface_hub.snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=names)
    except Exception as e:
        if is_full(e):
            raise OSError(e.errno, f"no room left to download {repo} into {folder}: free some disk space and run the same "
                                   "command again") from e
        raise _unreachable(repo, folder, e) from e
    if gone := [n for n in names if not (folder / n).is_file()]:  # without network the client is content with anything
        raise ConnectionError(f"{repo} could not be fetched whole into {folder} ({some(gone)} did not come): check the "
                              "network and run the same command again")


def _unreachable(repo: str, folder: Path, e: Exception) -> ConnectionError:
    return ConnectionError(f"{repo} could not be fetched ({first_line(e)}): check the network and run the same command "
                           f"again (what came is kept), or put its files into {folder} yourself")
