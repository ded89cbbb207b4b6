"""
Which files of a dataset train, which validate, and which are left out: told from their names and, where there is one, from
the dataset card (README.md), as the hub's own loader reads both.

- Train on what is named train, validate on what is named validation, else on what is named test. What is named test is never
  trained on. Where no file is named train, those without such a word are the training text.
- Of several configurations, which often contain each other, one is read: the one that is named in --data, else the card's
  default, else the one called default or all.
"""
import re
from typing import NamedTuple

_SIDES = {"train": "train", "training": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val",
          "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
_WHOLE = ("default", "all")  # configurations that hold the others


class Chosen(NamedTuple):
    """Names of files: those that train, those that validate (none: to be cut from train), and name -> why it is neither."""
    train: list[str]
    val: list[str]
    left_out: dict[str, str]


def side_of(name: str) -> str | None:
    """
    "train", "val" or "test": the last word of a path that names a split, such as data/train-00000-of-00004.parquet. None
    where no word does.
    """
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((_SIDES[w] for w in (re.sub(r"\d+$", "", word) for word in reversed(words)) if w in _SIDES), None)


def choose(names: list[str], card: list | None = None, config: str | None = None) -> Chosen:
    """
    The files of one configuration by their side. names: paths within the dataset. card: the list `configs` of the dataset
    card, or None. config: the configuration's name, or None for the default one. ValueError for one that is not there, or
    where one must be named, or where nothing trains.
    """
    left_out = {}
    by_split = _of_card(names, card, config)
    if by_split is None:
        own = _of_folders(names, config)
        by_split = {}
        for name in own:
            by_split.setdefault(side_of(name) or "", []).append(name)
    read = [name for files in by_split.values() for name in files]
    left_out |= dict.fromkeys(sorted(set(names) - set(read)), "another configuration")
    train = _first(by_split, "train") or _first(by_split, None)
    if train is None:
        raise ValueError(f"there is a split named {', '.join(sorted(by_split))} and none to train on: name one of its files "
                         "to train on it nevertheless, or give another source")
    val = _first(by_split, "val", like=train) or _first(by_split, "test", like=train)
    for split in by_split.keys() - {train, val}:
        left_out |= dict.fromkeys(by_split[split], f"split {split}" if split else "no split's, beside a split train")
    return Chosen(sorted(by_split[train]), sorted(by_split[val]) if val is not None else [], left_out)


def _first(by_split: dict[str, list[str]], side: str | None, like: str = "") -> str | None:
    """The split of a side: the plainest of several, the one with the words of `like` first (test_sft for train_sft)."""
    rest = set(re.split(r"[^a-z0-9]+", like.lower())) - _SIDES.keys()
    found = [split for split in by_split if (side_of(split) if split else None) == side and by_split[split]]

    def key(split):
        words = set(re.split(r"[^a-z0-9]+", split.lower())) - _SIDES.keys()
        return words != rest if like else bool(words), "sft" not in words, split
    return min(found, key=key, default=None)


def _of_folders(names: list[str], config: str | None) -> list[str]:
    """The names of one configuration, where folders are all that tells of any."""
    def folder(name):
        return next((p for p in name.split("/")[:-1] if p != "data" and side_of(p) is None), "")
    if config is not None:
        if not (own := [n for n in names if config in n.split("/")[:-1]]):
            raise ValueError(f"there is no configuration '{config}': the folders are "
                             f"{_list(sorted({folder(n) for n in names} - {''})) or 'none'}")
        return own
    folders = {folder(n) for n in names}
    whole = next((w for w in _WHOLE if w in folders and len(folders) > 1), None)
    return names if whole is None else [n for n in names if folder(n) == whole]


def _of_card(names: list[str], card: list | None, config: str | None) -> dict[str, list[str]] | None:
    """Split -> names, of one configuration of the card; None where it says nothing that can be used."""
    known = {c["config_name"]: c for c in card or () if isinstance(c, dict) and isinstance(c.get("config_name"), str)
             and c.get("data_files")}
    if not known:
        return None
    if config is None:
        flagged = [name for name, c in known.items() if c.get("default") is True]
        flagged += [name for name in _WHOLE if name in known] or (list(known) if len(known) == 1 else [])
        config = flagged[0] if flagged else None
        if config is None:
            raise ValueError(f"it has the configurations {_list(list(known))}: name one behind a colon, as in "
                             f"--data OWNER/NAME:{next(iter(known))}")
    if config not in known:
        raise ValueError(f"there is no configuration '{config}': there are {_list(list(known))}")
    by_split: dict[str, list[str]] = {}
    entries = known[config]["data_files"]
    for entry in entries if isinstance(entries, list) else [entries]:
        split, paths = (str(entry.get("split", "train")), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for pattern in paths if isinstance(paths, list) else [paths]:
            if isinstance(pattern, str):
                by_split.setdefault(split, []).extend(n for n in names if _matches(n, pattern))
    by_split = {split: sorted(set(files)) for split, files in by_split.items() if files}
    return by_split or None  # it names files of a kind that is not read


def _matches(name: str, pattern: str) -> bool:
    """Whether a card's pattern names a file: * within a folder, ** over several."""
    pattern = pattern.removeprefix("./")
    if pattern.endswith("/"):
        pattern += "**"
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = (known.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))
    return re.fullmatch("".join(parts), name) is not None


def _list(names: list[str], n: int = 8) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def left_out_line(what: str, left_out: dict[str, str]) -> str:
    """One line that names what of a source is not read, and why."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    return f"{what}: not read are " + "; ".join(f"{_list(names, 3)} ({reason})" for reason, names in by_reason.items())
