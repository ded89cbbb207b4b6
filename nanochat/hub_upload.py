"""Uploads an exported folder to Hugging Face's hub, whole or as one of a repository's variants."""
import re
import tempfile
from pathlib import Path

from nanochat.common import print0
from nanochat.hf_export import CODE_FILES
from nanochat.shards import first_line

VARIANTS = ("| variant | parameters | width | dtype | bits per byte |", "|---|---|---|---|---|")


def check_repo(repo: str, variant: str | None) -> None:
    """ValueError for names that the hub does not take."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo):
        raise ValueError(f"--push {repo} is no name of a repository: write it as USER/NAME")
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", variant):
        raise ValueError(f"--variant {variant} is no name of a folder: use letters, digits, '.', '_' and '-'")


def push(folder: Path, repo: str, variant: str | None, row: str, private: bool) -> str:
    """
    Uploads `folder` to the repository (made if absent), into the folder `variant` of it where one is named; then the
    repository's card gets or replaces the variant's `row`. Returns the address. Large files that the hub has already are not
    sent again, so the same command goes on after an interruption. PermissionError without the right to write there;
    ConnectionError where the upload failed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, path_in_repo=variant, ignore_patterns=["token_bytes.pt"],
                          commit_message=f"Upload {variant or 'the model'}")
        if variant is not None:
            # transformers looks for the code of a repository at its root, whatever folder the weights are in
            code = [name for name in CODE_FILES if (folder / name).is_file()]
            if code:
                api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=code,
                                  commit_message="Upload the code that runs the variants")
            card = variants_card(_card_of(api, repo), repo, variant, row)
            api.upload_file(repo_id=repo, path_or_fileobj=card.encode(), path_in_repo="README.md",
                            commit_message=f"List {variant}")
        info = api.repo_info(repo)
    except LocalTokenNotFoundError as e:
        raise PermissionError(f"the hub does not know you: run `hf auth login` with a token that may write, then the same "
                              f"command again ({folder} is written)") from e
    except Exception as e:  # the hub's client lets several libraries' exceptions through
        code = getattr(getattr(e, "response", None), "status_code", None) if isinstance(e, HfHubHTTPError) else None
        if code in (401, 403):
            raise PermissionError(f"you may not write to {repo}: run `hf auth login` with a token that may, or name another "
                                  f"repository with --push ({folder} is written)") from e
        raise ConnectionError(f"{folder} could not be uploaded to {repo} ({first_line(e)}): check the network and run the "
                              "same command again; what has arrived is not sent again") from e
    if private and not info.private:
        print0(f"note: {repo} was there before and is public")
    return str(made)


def _card_of(api, repo: str) -> str:
    """The repository's README.md; empty where it has none. Whatever else keeps it from being read is raised."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = api.hf_hub_download(repo, "README.md", local_dir=folder)
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except EntryNotFoundError as e:
            if isinstance(e, LocalEntryNotFoundError):  # the hub did not answer
                raise
            return ""


def variants_card(before: str, repo: str, variant: str, row: str) -> str:
    """
    The card of a repository of variants: `before` with the variant's row added to its table, or put in its place; a new card
    where `before` has no such table.
    """
    if VARIANTS[0] not in before:
        use = ["```python", "from transformers import AutoModelForCausalLM",
               f'model = AutoModelForCausalLM.from_pretrained("{repo}", subfolder="{variant}",',
               "                                             trust_remote_code=True)", "```"]
        before = "\n".join(["---", "license: mit", "library_name: transformers", "pipeline_tag: text-generation",
                            "tags: [adamba, nanochat]", "---", f"# {repo.partition('/')[2]}", "",
                            "One folder for each variant of the model; each has a card of its own.", "", *VARIANTS, "",
                            *use, ""])
    lines = before.splitlines()
    first = lines.index(VARIANTS[0]) + 2
    end = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
    rows = {line.split("|")[1].strip(): line for line in lines[first:end]}
    rows[f"[{variant}](./{variant})"] = f"| [{variant}](./{variant}) | {row} |"
    return "\n".join([*lines[:first], *(rows[name] for name in sorted(rows)), *lines[end:]]) + "\n"
