r"""
The tokenizer: byte-level BPE in the style of GPT-4, trained with rustbpe, run with tiktoken, and the chat format.

    python -m scripts.tok_train --data embedded --vocab-size 8192

Ids: the 256 bytes and the merges first, in order of their rank, then nanochat's nine special tokens. Kept on disk as
Hugging Face's tokenizer.json (tokenizer_json.py; data only, nothing in it can run), with what AutoTokenizer needs beside
it. nanochat's own tokenizer.pkl is a pickle, which can hold any program: `read_pickle` lets nothing but the encoding's
parts through.
"""
import base64
import binascii
import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import pickletools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
import torch

from nanochat import tokenizer_json
from nanochat.common import atomic_write
from nanochat.conversations import messages_of, turns
from nanochat.shards import split_text

SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document
    "<|user_start|>", "<|user_end|>",  # the others appear in conversations only
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",  # the assistant calls the Python tool
    "<|output_start|>", "<|output_end|>",  # what the tool printed
)

# GPT-4's pattern, with at most two digits in a token where GPT-4 has three: kinder to small vocabularies.
SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
OLD_FORMAT = "adamba-bpe-1"  # of our files until November 2026
MAX_PAIRS = 2**31 - 1  # rustbpe counts pairs in 32 bits
MAX_SPACES = 500_000  # tiktoken's regex engine panics at a run of white space of about a million characters
REMEDY = ("copy it again from where its model came from or, if no model was trained with it, make one with "
          "python -m scripts.tok_train")


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError for a vocabulary that has no room for the bytes and the special tokens."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"a vocabulary of {vocab_size} is too small: give at least {MIN_VOCAB_SIZE}, for 256 bytes "
                         f"and {len(SPECIAL_TOKENS)} special tokens")
    if vocab_size > MAX_PAIRS:
        raise ValueError(f"a vocabulary of {vocab_size} is too large: give at most {MAX_PAIRS}")


def cut_spaces(text: str) -> list[str]:
    """The text in pieces, cut only where a run of white space is longer than MAX_SPACES."""
    if len(text) <= MAX_SPACES:
        return [text]
    cuts = [at for run in re.finditer(r"\s{1000,}", text) for at in range(run.start() + MAX_SPACES, run.end(), MAX_SPACES)]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]


def _count_pairs(pieces: Iterable[str]) -> Iterator[str]:
    """
    The pieces, whose pairs of neighbouring bytes are counted in 64 bits as they pass; no pair of longer tokens can be more
    frequent than the bytes where it meets. ValueError where one is too frequent for rustbpe.
    """
    counts, waiting, size = np.zeros(65_536, dtype=np.int64), [], 0

    def count() -> None:
        nonlocal counts
        data = np.frombuffer("\n".join(waiting).encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64)
        counts += np.bincount(data[:-1] * 256 + data[1:], minlength=65_536)
        if counts.max() > MAX_PAIRS:
            raise ValueError(f"a pair of bytes occurs more than {MAX_PAIRS:,} times in the text, more than the trainer can "
                             "count: give less text, as by a lower --max-chars")
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size > 1_000_000:
            count()
            waiting, size = [], 0
        yield piece
    count()


class Tokenizer:
    """
    Text <-> token ids. Made by train_from_iterator or from_directory; the constructor takes the parts:
    tokens (list of bytes, its index is the id), the split pattern, and the special tokens' names (the ids that follow).
    Raises ValueError where the parts are no tokenizer.
    """

    def __init__(self, tokens: Sequence[bytes], pattern: str = SPLIT_PATTERN,
                 special_tokens: Sequence[str] = SPECIAL_TOKENS):
        ranks = _check_parts(tokens, pattern, special_tokens)
        self.pattern = pattern
        self.special_tokens = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
        try:
            self.enc = tiktoken.Encoding("adamba", pat_str=pattern, mergeable_ranks=ranks,
                                         special_tokens=self.special_tokens)
        except ValueError as e:  # the regex engine's words
            raise ValueError(f"the tokenizer's split pattern does not compile ({e}): {REMEDY}") from e
        self._bytes = [*tokens, *(name.encode() for name in special_tokens)]  # id -> bytes

    # --- making, saving, loading

    @classmethod
    def train_from_iterator(cls, text_iterator: Iterable[str], vocab_size: int) -> "Tokenizer":
        """
        Learns a vocabulary of `vocab_size` ids, specials included, from the texts; of fewer where they are too short to
        have that many merges. Raises ValueError below 265, and for more text than can be counted.
        """
        check_vocab_size(vocab_size)
        trainer = rustbpe.Tokenizer()
        # rustbpe holds buffer_size texts at a time: in pieces of 64k characters that is 64 MB, whatever the documents.
        pieces = (text[a:b] for text in text_iterator for a, b in split_text(text, 65_536))
        trainer.train_from_iterator(_count_pairs(pieces), vocab_size - len(SPECIAL_TOKENS), buffer_size=1024,
                                    pattern=SPLIT_PATTERN)
        return cls([bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])])

    @classmethod
    def from_directory(cls, folder: str | os.PathLike) -> "Tokenizer":
        """
        Reads the tokenizer in `folder` or its subfolder tokenizer/: a tokenizer.json that we wrote, else nanochat's
        tokenizer.pkl, else another program's tokenizer.json. Raises FileNotFoundError or ValueError.
        """
        path = find_file(folder)
        if path is None:
            raise FileNotFoundError(f"no tokenizer.json or tokenizer.pkl in {folder}: {REMEDY} --out {folder}")
        tokens, pattern, special_tokens = read_pickle(path) if path.suffix == ".pkl" else _read_json(path)
        try:
            return cls(tokens, pattern, special_tokens)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e

    def save(self, folder: str | os.PathLike) -> None:
        """
        Writes tokenizer.json, tokenizer_config.json, chat_template.jinja (for AutoTokenizer) and token_bytes.pt (int32
        [vocab]) into `folder`, each atomically.
        """
        folder = Path(folder)
        buffer = io.BytesIO()
        torch.save(self.token_bytes(), buffer)
        with atomic_write(folder / "token_bytes.pt") as f:
            f.write(buffer.getvalue())
        tokenizer_json.write_companions(folder)
        n = len(self._bytes) - len(self.special_tokens)
        with atomic_write(folder / "tokenizer.json", "w") as f:
            json.dump(tokenizer_json.to_dict(self._bytes[:n], self.pattern, list(self.special_tokens)), f)

    # --- what it is

    def get_vocab_size(self) -> int:
        """The number of ids, special tokens included."""
        return len(self._bytes)

    def get_special_tokens(self) -> dict[str, int]:
        """Name -> id of the special tokens."""
        return dict(self.special_tokens)

    def encode_special(self, name: str) -> int:
        """The id of a special token. Raises ValueError for any other name."""
        try:
            return self.special_tokens[name]
        except KeyError:
            raise ValueError(f"no special token {name!r}: there are {', '.join(self.special_tokens)}") from None

    def get_bos_token_id(self) -> int:
        return self.special_tokens["<|bos|>"]

    def token_bytes(self) -> torch.Tensor:
        """
        int32 [vocab]: how many bytes of UTF-8 each token stands for, 0 for special tokens, for bits per byte. Counted
        on the token's own bytes, so that the sum over a text's tokens is its length (nanochat counts a token that is
        part of a character as the three bytes of U+FFFD).
        """
        n = len(self._bytes) - len(self.special_tokens)
        return torch.tensor([len(token) if i < n else 0 for i, token in enumerate(self._bytes)], dtype=torch.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of all that decides how text is encoded."""
        digest = hashlib.blake2b(repr((self.pattern, list(self.special_tokens))).encode(), digest_size=8)
        for token in self._bytes:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    # --- text to ids and back

    def encode(self, text: str | list[str], prepend: int | str | None = None, append: int | str | None = None,
               num_threads: int = 2) -> list[int] | list[list[int]]:
        """
        Ids of a text, or a list of them for a list of texts (on `num_threads` threads). `prepend` and `append` add a
        special token by name or id. Text that looks like a special token is ordinary text. Raises ValueError.
        """
        head, tail = ([] if token is None else [self._special_id(token)] for token in (prepend, append))
        if isinstance(text, str):
            return head + [i for piece in cut_spaces(text) for i in self.enc.encode_ordinary(piece)] + tail
        if not isinstance(text, list) or not all(isinstance(t, str) for t in text):
            raise ValueError(f"can only encode a string or a list of strings, not {type(text).__name__}")
        if any(len(t) > MAX_SPACES for t in text):
            return [self.encode(t, prepend, append) for t in text]
        return [head + ids + tail for ids in self.enc.encode_ordinary_batch(text, num_threads=num_threads)]

    __call__ = encode

    def _special_id(self, token: int | str) -> int:
        if isinstance(token, str):
            return self.encode_special(token)
        if not 0 <= token < self.get_vocab_size():
            raise ValueError(f"token id {token} is outside the vocabulary of {self.get_vocab_size()}")
        return token

    def id_to_bytes(self, id: int) -> bytes:
        """The bytes of one token (a special token's are its name's). Raises ValueError outside the vocabulary."""
        if not 0 <= id < len(self._bytes):
            raise ValueError(f"token id {id} is outside the vocabulary of {self.get_vocab_size()}")
        return self._bytes[id]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.id_to_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens by their names; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # --- conversations

    def render_conversation(self, conversation: dict, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """
        (ids, mask) of {"messages": [{"role": ..., "content": ...}, ...]}, cut to `max_tokens`. mask is 1 on what the
        assistant is to learn: its text, its tool calls with their brackets, and <|assistant_end|>.
        A first message of the system is put before the first user message. Then user and assistant alternate; an
        assistant's content is a string or a list of parts {"type": "text" | "python" | "python_output", "text": ...}.
        Raises ValueError that says which message is malformed.
        """
        ids, mask = [self.get_bos_token_id()], [0]
        for role, parts in turns(conversation):
            # Who opens a turn is given, not learnt; how the assistant ends its own is learnt.
            learn_end = int(role == "assistant")
            pieces = [([self.special_tokens[f"<|{role}_start|>"]], 0)]
            for kind, text in parts:
                body = self.encode(text)
                if kind == "python":
                    body = [self.special_tokens["<|python_start|>"], *body, self.special_tokens["<|python_end|>"]]
                elif kind == "python_output":
                    body = [self.special_tokens["<|output_start|>"], *body, self.special_tokens["<|output_end|>"]]
                pieces.append((body, int(role == "assistant" and kind != "python_output")))
            pieces.append(([self.special_tokens[f"<|{role}_end|>"]], learn_end))
            for body, learn in pieces:
                ids += body
                mask += [learn] * len(body)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """Ids of the conversation without its last message (the assistant's), ending in <|assistant_start|>."""
        messages = messages_of(conversation)
        if messages[-1].get("role") != "assistant":
            raise ValueError(f"message {len(messages) - 1} is the last and must be the assistant's, not of role "
                             f"{messages[-1].get('role')!r}, for a completion")
        ids, _ = self.render_conversation({"messages": messages[:-1]}, max_tokens=2**62)
        return [*ids, self.special_tokens["<|assistant_start|>"]]


# ---------------------------------------------------------------------------------------------------------------------
# Files

def is_ours(path: Path) -> bool:
    """Whether we wrote this tokenizer.json: it has our old form, or the file beside it names us."""
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        beside = path.with_name("tokenizer_config.json")
        if beside.is_file():
            return json.loads(beside.read_text(encoding="utf-8")).get("written_by") == tokenizer_json.WRITTEN_BY
        with open(path, encoding="utf-8") as f:
            return OLD_FORMAT in f.read(100)
    return False


def find_file(folder: str | os.PathLike) -> Path | None:
    """The tokenizer's file in `folder` or its subfolder tokenizer/, in the order of Tokenizer.from_directory; or None."""
    places = Path(folder), Path(folder) / "tokenizer"
    tables = [place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()]
    pickles = [place / "tokenizer.pkl" for place in places if (place / "tokenizer.pkl").is_file()]
    return next(iter([*filter(is_ours, tables), *pickles, *tables]), None)


def _check_parts(tokens: Sequence[bytes], pattern: str, special_tokens: Sequence[str]) -> dict[bytes, int]:
    """{token: rank}, or a ValueError that says what is wrong with the parts."""
    if not isinstance(pattern, str) or not 0 < len(pattern) < 10_000:
        raise ValueError(f"the tokenizer's split pattern is not a short string: {REMEDY}")
    if not all(isinstance(token, bytes) and token for token in tokens):
        raise ValueError(f"a token of the tokenizer is empty or not bytes: {REMEDY}")
    ranks = {token: i for i, token in enumerate(tokens)}
    if len(ranks) != len(tokens) or not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError(f"the tokenizer repeats a token or lacks a single byte: {REMEDY}")
    if tuple(special_tokens) != SPECIAL_TOKENS:
        raise ValueError("the tokenizer's special tokens are not nanochat's nine, "
                         f"{', '.join(SPECIAL_TOKENS)}: {REMEDY}")
    return ranks


def _read_json(path: Path) -> tuple[list[bytes], str, list[str]]:
    """(tokens, pattern, special tokens) of a tokenizer.json, Hugging Face's or our old one. ValueError for others."""
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(parts, dict):
            raise ValueError("it is no JSON object")
        if "format" not in parts:
            return tokenizer_json.from_dict(parts)
        if parts["format"] != OLD_FORMAT:
            raise ValueError(f"its 'format' is not {OLD_FORMAT}")
        tokens = [base64.b64decode(token, validate=True) for token in parts["tokens_base64"]]
        if not isinstance(parts["special_tokens"], list):
            raise ValueError("its special tokens are no list")
        return tokens, parts["pattern"], parts["special_tokens"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as e:
        raise ValueError(f"{path} cannot be read as a tokenizer ({type(e).__name__}: {e}): {REMEDY}") from e


# What pickling a tiktoken Encoding (protocols 3 to 5; nanochat writes 4 or 5) consists of: Encoding.__new__ and a dict
# of str, bytes and int as its state. No REDUCE, INST, OBJ or EXT: nothing on this list calls a function by its name.
_PICKLE_OPCODES = frozenset("""PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL
    EMPTY_TUPLE EMPTY_DICT SETITEM SETITEMS NEWOBJ BUILD SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES BININT
    BININT1 BININT2""".split())
_PICKLE_MAX_BYTES = 256 * 2**20
_NOT_OURS = ("refused: it is not a plain pickled tiktoken Encoding ({}), and unpickling it could run a program. If its "
             "origin is trusted get it anew, else " + REMEDY)


class _Parts:
    """Stands for tiktoken.Encoding while unpickling: it keeps the state and does nothing with it."""
    state = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _Parts

    def persistent_load(self, pid: object) -> object:
        raise pickle.UnpicklingError("it has a persistent id")


def read_pickle(path: str | os.PathLike) -> tuple[list[bytes], str, list[str]]:
    """
    (tokens, pattern, special tokens) of nanochat's tokenizer.pkl. The opcodes are looked through before anything is
    executed, then a restricted unpickler builds inert parts, then their types and ids are checked.
    Raises ValueError with the remedy for anything that is not a plain tiktoken Encoding; none of it has run then.
    """
    path = Path(path)
    if path.stat().st_size > _PICKLE_MAX_BYTES:
        raise ValueError(f"{path} " + _NOT_OURS.format(f"larger than {_PICKLE_MAX_BYTES >> 20} MB"))
    data = path.read_bytes()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name not in _PICKLE_OPCODES:
                raise ValueError(f"it uses {opcode.name}")
            if opcode.name in ("BINPUT", "LONG_BINPUT") and argument > count:
                raise ValueError("a memo index that would allocate memory")  # the C unpickler sizes a table by it
        parts = _RestrictedUnpickler(io.BytesIO(data)).load()
        return _check_state(parts.state if type(parts) is _Parts else None)
    except Exception as e:  # a hostile file may raise anything
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{path} " + _NOT_OURS.format(reason)) from e


def _check_state(state: object) -> tuple[list[bytes], str, list[str]]:
    """The parts in order of their ids, from Encoding.__getstate__'s dict."""
    if type(state) is not dict or set(state) != {"name", "pat_str", "mergeable_ranks", "special_tokens"}:
        raise ValueError("its state is not that of an encoding with its own vocabulary")
    ranks, special = state["mergeable_ranks"], state["special_tokens"]
    for table, kind in ((ranks, bytes), (special, str)):
        if type(table) is not dict or not all(type(k) is kind and type(v) is int for k, v in table.items()):
            raise ValueError("a vocabulary of it is not a table of tokens and ids")
    if type(state["name"]) is not str or type(state["pat_str"]) is not str:
        raise ValueError("its name or pattern is not a string")
    ids = [*sorted(ranks.values()), *sorted(special.values())]
    if ids != list(range(len(ids))):
        raise ValueError("its ids are not 0, 1, 2, ... with the special tokens last")
    return sorted(ranks, key=ranks.get), state["pat_str"], sorted(special, key=special.get)
