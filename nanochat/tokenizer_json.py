"""
Our tokenizer as Hugging Face's tokenizer.json, and back.

The two describe the same byte-level BPE differently. Ours (tiktoken's) is a list of tokens: wherever two neighbours
together are a token, they may merge, and the token of the lowest id merges first. Hugging Face's has a vocabulary of
tokens written in printable characters, and an ordered list of pairs that may merge. So every way to cut a token into two
tokens is a pair of that list, in the order of the tokens' ids.
"""
import functools
import json
import os
from pathlib import Path

from nanochat.common import atomic_write

BOS, EOS = "<|bos|>", "<|assistant_end|>"
WRITTEN_BY = "adamba"  # in tokenizer_config.json: tokenizer.json itself admits no field of ours

# nanochat's conversation format: the system's message goes before the first user message, after a blank line.
CHAT_TEMPLATE = """\
{{- '<|bos|>' -}}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] == 'user' and loop.index0 % 2 == 0 -%}
        {{- '<|user_start|>' + (system if loop.first else '') + message['content'] + '<|user_end|>' -}}
    {%- elif message['role'] == 'assistant' and loop.index0 % 2 == 1 -%}
        {{- '<|assistant_start|>' -}}
        {%- if message['content'] is string -%}
            {{- message['content'] -}}
        {%- else -%}
            {%- for part in message['content'] -%}
                {%- if part['type'] == 'python' -%}
                    {{- '<|python_start|>' + part['text'] + '<|python_end|>' -}}
                {%- elif part['type'] == 'python_output' -%}
                    {{- '<|output_start|>' + part['text'] + '<|output_end|>' -}}
                {%- else -%}
                    {{- part['text'] -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {{- '<|assistant_end|>' -}}
    {%- else -%}
        {{- raise_exception('after a first system message, user and assistant take turns, the user first') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant_start|>' -}}
{%- endif -%}
"""


@functools.cache
def byte_characters() -> str:
    """The printable character that stands for each byte, by the byte's value: GPT-2's convention (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return "".join(chr(b) if b in printable else chr(next(others)) for b in range(256))


@functools.cache
def _bytes_of_characters() -> dict[int, int]:
    return {ord(c): b for b, c in enumerate(byte_characters())}


def write_token(token: bytes) -> str:
    """A token in printable characters."""
    return token.decode("latin-1").translate(byte_characters())


def read_token(text: str) -> bytes:
    """The bytes of a token in printable characters. ValueError for characters that stand for no byte."""
    try:
        return bytes(_bytes_of_characters()[ord(c)] for c in text)
    except KeyError as e:
        raise ValueError(f"the token {text!r} has the character {chr(e.args[0])!r}, which stands for no byte") from None


def merges_of(tokens: list[bytes]) -> list[list[str]]:
    """Every pair of tokens that together are a token, in the order of what they make."""
    ids = {token: i for i, token in enumerate(tokens)}
    written = [write_token(token) for token in tokens]
    return [[written[ids[token[:cut]]], written[ids[token[cut:]]]] for token in tokens for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids]


def to_dict(tokens: list[bytes], pattern: str, special_tokens: list[str]) -> dict:
    """The content of a tokenizer.json. Encoding with special tokens puts <|bos|> first."""
    n = len(tokens)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    bos = n + special_tokens.index(BOS)
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": n + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, name in enumerate(special_tokens)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, byte_level]},
        "post_processor": {"type": "TemplateProcessing",
                           "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                                    {"Sequence": {"id": "B", "type_id": 0}}],
                           "special_tokens": {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}}},
        "decoder": byte_level,
        # ignore_merges: a piece of text that is a token is that token, even if no pairs lead to it
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {write_token(token): i for i, token in enumerate(tokens)}, "merges": merges_of(tokens)},
    }


def from_dict(parts: dict) -> tuple[list[bytes], str, list[str]]:
    """
    (tokens, pattern, special tokens) of a tokenizer.json's content. ValueError for one that would encode text otherwise
    than by a list of tokens: another kind of model, a normalizer, several patterns, merges in another order than the ids.
    """
    model = parts["model"]
    if parts.get("normalizer") or model.get("type", "BPE") != "BPE" or any(
            model.get(k) for k in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                                   "byte_fallback")):
        raise ValueError("it is no plain byte-level BPE")
    steps = parts["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if [s["type"] for s in steps] != ["Split", "ByteLevel"] or steps[0]["behavior"] != "Isolated" or steps[0]["invert"] \
            or steps[1].get("add_prefix_space", True) or steps[1].get("use_regex", True):
        raise ValueError("it does not cut text by one pattern into bytes")
    vocab = model["vocab"]
    special = {t["content"]: t["id"] for t in parts["added_tokens"]}
    ids = {text: i for text, i in vocab.items() if text not in special}
    names = sorted(ids, key=ids.get)
    if [*(ids[t] for t in names), *sorted(special.values())] != list(range(len(ids) + len(special))):
        raise ValueError("its ids are not 0, 1, 2, ... with the special tokens last")
    _check_merges(model["merges"], ids)
    return [read_token(t) for t in names], steps[0]["pattern"]["Regex"], sorted(special, key=special.get)


def _check_merges(merges: list, ids: dict[str, int]) -> None:
    """ValueError unless the pairs make every longer token, and in the order of the ids."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    made = [ids["".join(pair)] for pair in pairs if len(pair) == 2 and pair[0] in ids and pair[1] in ids]
    if len(made) != len(pairs) or made != sorted(made):
        raise ValueError("its merges are not in the order of its tokens")
    if missing := {i for text, i in ids.items() if len(text) > 1}.difference(made):
        raise ValueError(f"no merge makes its token {min(missing)}")


def write_companions(folder: str | os.PathLike) -> None:
    """tokenizer_config.json and chat_template.jinja, with which AutoTokenizer reads the folder and renders conversations."""
    with atomic_write(Path(folder) / "tokenizer_config.json", "w") as f:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS,
                   "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
                   "padding_side": "left", "written_by": WRITTEN_BY}, f, indent=1)
    with atomic_write(Path(folder) / "chat_template.jinja", "w") as f:
        f.write(CHAT_TEMPLATE)
