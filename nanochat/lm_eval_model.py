"""
Our models for EleutherAI's lm-evaluation-harness, under the name 'adamba': scripts/lm_eval.py registers it.

model_args: pretrained=FOLDER (whatever --checkpoint takes), mode, depth, budget, lossless=True as in chat_cli; dtype
(float32 or bfloat16; default: the device's), device, max_gen_toks (256).
"""
import re

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from nanochat import checkpoint_manager as ckpt
from nanochat.chat import stop_tokens, visible_text
from nanochat.common import find_device_type
from nanochat.confidence_probe import Controls, pad
from nanochat.engine import Compute, Engine, prepare_inference
from nanochat.tokenizer import SPECIAL_TOKENS

DTYPES = {None: None, "auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class AdambaLM(TemplateLM):
    """
    Scores and generates in one mode, at one depth, in mode auto at a budget, or losslessly (then log-likelihoods are those
    of full compute). ValueError for what the model does not have or what does not go together.
    """

    def __init__(self, pretrained: str, mode=None, depth: int | None = None, budget: float | None = None,
                 lossless: bool = False, batch_size: int | str = 1, device: str | None = None, dtype: str | None = None,
                 max_gen_toks: int = 256, max_batch_size: int | None = None):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"--batch_size is {batch_size}; give a number of rows")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype} is not known: choose float32 or bfloat16")
        self.batch_size, self.max_gen_toks = int(batch_size), int(max_gen_toks)
        wanted = None if device is None else str(device).partition(":")[0]
        # cuda is the harness's own default, whatever the machine has
        kind = find_device_type(None if wanted == "cuda" and not torch.cuda.is_available() else wanted)
        self.model, self.its, info, _ = ckpt.load(pretrained, kind)
        prepare_inference(self.model, kind, DTYPES[dtype])
        self.calibration = info.get("calibration")
        self.compute = Compute(None if mode is None else str(mode), budget, depth, bool(lossless))
        self.compute.check(self.model, self.calibration)
        self._rank, self._world_size, self._device = 0, 1, self.model.device

    # --- text and tokens

    @property
    def eot_token_id(self) -> int:
        return self.its.encode_special("<|assistant_end|>")

    @property
    def prefix_token_id(self) -> int:
        return self.its.get_bos_token_id()

    @property
    def max_length(self) -> int:
        return self.model.config.sequence_len

    @property
    def tokenizer_name(self) -> str:
        return f"adamba {self.its.fingerprint}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """A name for the conversation format, which is not Jinja's: apply_chat_template renders it."""
        return "nanochat"

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """A conversation as text, special tokens by their names; it begins with <|bos|>, by which tok_encode knows it."""
        if add_generation_prompt:
            messages = [*chat_history, {"role": "assistant", "content": ""}]
            return self.its.decode(self.its.render_for_completion({"messages": messages}))
        ids, _ = self.its.render_conversation({"messages": chat_history}, max_tokens=2**62)
        return self.its.decode(ids[:-1])  # the assistant's turn is left open

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids, behind <|bos|> unless that is not wanted; a conversation of apply_chat_template has its own."""
        if string.startswith("<|bos|>"):
            parts = re.split("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")", string)
            return [i for part in parts for i in ([self.its.encode_special(part)] if part in SPECIAL_TOKENS
                                                  else self.its.encode(part))]
        return self.its.encode(string, prepend=None if add_special_tokens is False else "<|bos|>")

    # --- log-likelihoods

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether it is the greedy one) of ((texts), context, continuation)."""
        out: list = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for at in tqdm(range(0, len(order), self.batch_size), disable=disable_tqdm, desc="log-likelihoods"):
            batch = order[at:at + self.batch_size]
            pairs = [self._cut(context, continuation) for _, context, continuation in (requests[i] for i in batch)]
            for i, result in zip(batch, self._score(pairs)):
                out[i] = result
                if kwargs.get("override_bs") is None and requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
        return out

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Both, without what does not fit the model's context, which begins with a token at least."""
        continuation = continuation[-self.max_length:]
        room = self.max_length + 1 - len(continuation)
        return context[-room:], continuation

    @torch.inference_mode()
    def _score(self, pairs) -> list[tuple[float, bool]]:
        idx, _ = pad([(a + b)[:-1] for a, b in pairs], self.model.device)
        h, out = self._hidden(idx, pairs), []
        for row, (a, b) in enumerate(pairs):
            logits = self.model.logits(h[row, len(a) - 1:len(a) + len(b) - 1])
            targets = torch.tensor(b, device=logits.device)
            out.append((-float(F.cross_entropy(logits, targets, reduction="sum")),
                        bool((logits.argmax(-1) == targets).all())))
        return out

    def _hidden(self, idx: torch.Tensor, pairs) -> torch.Tensor:
        """Final states as decoding would make them; in mode auto the tokens that predict the continuation are decided on."""
        if self.compute.lossless:
            return self.model.hidden(idx)
        if self.compute.mode == "auto":
            place = torch.arange(idx.size(1))
            acts = torch.stack([(place >= len(a) - 1) & (place < len(a) + len(b) - 1) for a, b in pairs])
            control = Controls(self.model, self.compute.budget, calibration=self.calibration)
            return control.parallel(idx, [a for a, _ in pairs], acts)[0]
        return self.model.hidden(idx, self.compute.mode, self.compute.depth)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the model's context that overlap by one token."""
        out = []
        for (text,) in (request.args for request in requests):
            windows = map(make_disjoint_window, get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length, 1))
            scores = self._loglikelihood_tokens([(None, a, b) for a, b in windows], disable_tqdm=True)
            out.append(sum(score for score, _ in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), out[-1])
        return out

    # --- generation

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Texts that follow the contexts, up to the first of the strings in 'until'; batched where settings are equal."""
        out: list = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generation") as bar:
            for group in groups.values():
                group.sort(key=lambda i: len(requests[i].args[0]))
                for at in range(0, len(group), self.batch_size):
                    batch = group[at:at + self.batch_size]
                    options = requests[batch[0]].args[1]
                    for i, text in zip(batch, self._generate([requests[i].args[0] for i in batch], options)):
                        out[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return out

    def _generate(self, contexts: list[str], options: dict) -> list[str]:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else [u for u in until if u]
        most = min(int(options.get("max_gen_toks", self.max_gen_toks)), self.max_length - 1)
        sampled = options.get("do_sample", float(options.get("temperature") or 0) > 0)
        drawing = {"temperature": float(options.get("temperature") or 1) if sampled else 0.0,
                   "top_k": options.get("top_k") if sampled else None, "top_p": options.get("top_p") if sampled else None}
        prompts = [self.tok_encode(text)[-(self.max_length - most):] for text in contexts]
        engine, rows, ended = Engine(self.model, self.its, self.calibration), [[] for _ in prompts], set()
        compute = {"mode": self.compute.mode, "budget": self.compute.budget, "depth": self.compute.depth,
                   "lossless": self.compute.lossless}
        for pairs in engine.stream(prompts, most, stop=stop_tokens(self.its), ended=ended, **compute, **drawing):
            for row, token in pairs:
                rows[row].append(token)
                tail = "".join(visible_text(self.its, rows[row][-32:]))
                if any(u in tail for u in until):
                    ended.add(row)
        return [_before("".join(visible_text(self.its, row)), until) for row in rows]


def _before(text: str, until: list[str]) -> str:
    """The text before the first of some strings in it."""
    return text[:min((at for u in until if (at := text.find(u)) >= 0), default=len(text))]
