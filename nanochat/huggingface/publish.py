"""Uploads an exported repository to the Hugging Face hub: resumable file by file, private unless told otherwise."""
import json
import re
from pathlib import Path

from nanochat.huggingface.card import variants_card
from nanochat.huggingface.export import CODE

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def check_names(repo: str, variant: str | None) -> None:
    """ValueError for a repository that is not USER/NAME as the hub takes it, or a variant that is no plain folder name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"--push {repo} is no repository's name: give USER/NAME")
    try:
        validate_repo_id(repo)
    except HFValidationError as e:  # its own words say nothing of our flag
        raise ValueError(f"--push {repo} is no repository's name: the hub takes at most 96 letters, digits, '-', '_' and "
                         "'.', no '-' or '.' at either end, no '--' and no '..'") from e
    if variant is not None and not re.fullmatch(r"\w[\w.-]*", variant):
        raise ValueError(f"--variant {variant} is no plain folder name: use letters, digits, '_', '-' and '.'")


def publish(folder: Path, repo: str, variant: str | None = None, public: bool = False) -> str:
    """
    Uploads the files of an exported folder to the model repository USER/NAME, into its folder `variant` where one is given;
    the repository's card then lists all variants. What the hub has already is not sent again, so that the same call goes on
    where an interrupted one stopped. Returns the address.
    ValueError for a repository that you may not write, or one that is public although `public` is False (nothing is then
    uploaded); ConnectionError where the upload failed.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError
    check_names(repo, variant)
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        allowed = public or api.repo_info(repo).private
        if allowed:
            api.upload_folder(repo_id=repo, folder_path=folder, path_in_repo=variant, delete_patterns=list(WEIGHTS),
                              commit_message=f"Upload {variant or 'the model'}")
            if variant is not None:
                _list_variants(api, folder, repo)
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        if status in (401, 403, 404):
            raise ValueError(f"you may not write to {repo}, or you are not logged in: run `hf auth login` with a token that "
                             "may write, and check the name") from e
        raise ConnectionError(_failed(repo, e)) from e
    except Exception as e:  # the hub's client lets several libraries' exceptions through
        raise ConnectionError(_failed(repo, e)) from e
    if not allowed:
        raise ValueError(f"{repo} is there already and public: add --public to publish there, or name another")
    return f"{api.endpoint}/{repo}" + (f"/tree/main/{variant}" if variant else "")


def _failed(repo: str, e: Exception) -> str:
    line = (str(e).splitlines() or [type(e).__name__])[0][:120]
    return f"the upload to {repo} failed ({line}): check the network and run the same command again (what was sent is kept)"


def _list_variants(api, folder: Path, repo: str) -> None:
    """Writes the repository's card, and the code that from_pretrained(..., subfolder=...) looks for at the top."""
    from huggingface_hub import CommitOperationAdd
    names = sorted(path.split("/")[0] for path in api.list_repo_files(repo) if re.fullmatch(r"[^/]+/config\.json", path))
    configs = {}
    for name in names:
        config = json.loads(Path(api.hf_hub_download(repo, f"{name}/config.json")).read_text(encoding="utf-8"))
        if config.get("model_type") in ("adamba", "nanochat"):
            configs[name] = config
    additions = [CommitOperationAdd("README.md", variants_card(repo, configs).encode())]
    additions += [CommitOperationAdd(name, folder / name) for name in CODE if (folder / name).is_file()]
    api.create_commit(repo, additions, commit_message="List all variants")
