"""
A conversation as a chat program sees it: whether a model can chat at all, what of a long conversation still fits, and the
answer as text, without the tokens that only mark its parts.
"""
import codecs
from bisect import bisect_left
from collections.abc import Iterable, Iterator

import torch

from nanochat.cache import MatryoshkaKVCache
from nanochat.tool_use import ToolUse

PROBE_TOKENS = 64
PROBE = {"messages": [{"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "2"}]}


@torch.inference_mode()
def check_chats(model, tokenizer) -> None:
    """
    ValueError for a model that was never taught to chat: one that gives <|assistant_end|> less than a tenth of the
    probability that it would have by chance, both after a finished answer and anywhere in an answer of its own. (One that
    was taught answers of one kind only need not end as the finished answer does.)
    """
    ids, _ = tokenizer.render_conversation(PROBE)
    end, start = map(tokenizer.encode_special, ("<|assistant_end|>", "<|assistant_start|>"))
    least = 0.1 / tokenizer.get_vocab_size()
    finished, question = ids[:ids.index(end)], ids[:ids.index(start) + 1]
    if float(model(torch.tensor([finished], device=model.device))[0, -1].float().softmax(-1)[end]) >= least:
        return
    most = min(PROBE_TOKENS, model.config.sequence_len - len(question))
    cache, tool, new = MatryoshkaKVCache(model, 1, len(question) + most), ToolUse(tokenizer), question
    for _ in range(most):
        h = model.hidden(torch.tensor([new], device=model.device), cache=cache)
        probs = model.logits(h[:, -1])[0].float().softmax(-1)
        if float(probs[end]) >= least:
            return
        new = tool.next([int(probs.argmax())])
        tool.wrote(new[0])
    raise ValueError("this is a base model: it was never taught to end an answer, so it cannot chat. Complete text with "
                     "it, or train it on conversations first")


def stop_tokens(tokenizer) -> set[int]:
    """The tokens that end an answer: the assistant's end, and the beginning of another document."""
    return {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}


def prompt_room(limit: int, max_tokens: int) -> int:
    """How many tokens of a context of `limit` a conversation may take beside an answer of max_tokens: at least half."""
    return max(limit - max_tokens, limit // 2)


def fit(tokenizer, messages: list[dict], room: int) -> tuple[list[int], int]:
    """
    (ids that end in <|assistant_start|>, how many of the oldest messages were dropped for them to fit into `room` tokens).
    messages end with the user's; a system message stays. What is dropped are whole turns, a user's with its answer.
    ValueError where the last message alone does not fit.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system):]

    def rendered(pairs):
        kept = [*system, *turns[2 * pairs:], {"role": "assistant", "content": ""}]
        return tokenizer.render_for_completion({"messages": kept})
    most = (len(turns) - 1) // 2
    # Each pair that goes makes it shorter, so a few renderings find how many must go, however long the conversation is.
    pairs = bisect_left(range(most), True, key=lambda n: len(rendered(n)) <= room)
    ids = rendered(pairs)
    if len(ids) > room:
        raise ValueError(f"the message has {len(ids)} tokens, and the model's context has room for {room}: shorten it")
    return ids, 2 * pairs


def visible_text(tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """
    One piece of text for each token, in whole characters ('' while a character is unfinished); special tokens are never
    shown, and a tool call with its output reads like text. What is left unfinished at the end comes as a last piece.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    special = set(tokenizer.get_special_tokens().values())
    for token in tokens:
        yield "" if token in special else decoder.decode(tokenizer.id_to_bytes(token))
    if rest := decoder.decode(b"", final=True):
        yield rest


def answer_parts(tokenizer, tokens: Iterable[int]) -> list[dict]:
    """
    An answer's tokens as the parts of a message (nanochat.conversations): text, python for a tool call, python_output for
    its result. The inverse of Tokenizer.render_conversation for what an assistant says; a bracket that is not closed, or
    closes nothing, is dropped.
    """
    special = {token: name for name, token in tokenizer.get_special_tokens().items()}
    kinds = {"<|python_start|>": "python", "<|output_start|>": "python_output"}
    parts, kind, held = [], "text", []

    def close():
        if held:
            parts.append({"type": kind, "text": tokenizer.decode(held)})
        held.clear()
    for token in tokens:
        if token in special:
            close()
            kind = kinds.get(special[token], "text")
        else:
            held.append(token)
    close()
    return parts
