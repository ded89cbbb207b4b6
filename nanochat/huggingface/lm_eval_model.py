"""
Our models for lm-eval (EleutherAI's lm-evaluation-harness): log-likelihoods by parallel passes, answers by our engine, in
any mode, 'auto' and lossless decoding among them. Importing this registers the model type 'adamba'; scripts/lm_eval.py does.
"""
import re
from dataclasses import asdict

import lm_eval.models  # noqa: F401  (the other model types first: lm-eval loads them only into an empty registry)
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from nanochat import checkpoint_manager as ckpt
from nanochat.chat import stop_tokens, visible_text
from nanochat.common import find_device_type, user_path
from nanochat.confidence_probe import Controls, pad
from nanochat.engine import Compute, Engine, prepare_inference

LOGIT_ROWS = 256  # tokens whose logits are in memory at once
TRUE = {"true", "1", "yes"}


@register_model("adamba")
class AdambaLM(TemplateLM):
    """
    pretrained: a checkpoint of ours, or an exported repository. mode, depth, budget, lossless: how much compute is used
    (engine.Compute). add_bos: every text begins with <|bos|>, as in training. ValueError for a mode that the model does not
    have, and for options that are not known.
    """
    def __init__(self, pretrained: str, mode: str | int | None = None, depth: int | None = None, budget: float | None = None,
                 lossless: bool | str = False, add_bos: bool | str = True, max_gen_toks: int = 256,
                 batch_size: int | str = 1, max_batch_size: int | None = None, device: str | None = None, **unknown):
        super().__init__()
        if unknown:
            raise ValueError(f"--model_args {', '.join(unknown)} is not known: there are pretrained, mode, depth, budget, "
                             "lossless, add_bos and max_gen_toks")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"--batch_size {batch_size} is not known here: give a number of at least 1")
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # cuda is lm-eval's own default, whatever the machine has
        kind = find_device_type(None if device is None else device.split(":")[0])
        self._device = torch.device(device or kind)
        model, self.tokenizer, info, _ = ckpt.load(user_path(pretrained), self._device)
        prepare_inference(model, self._device)
        self.engine = Engine(model, self.tokenizer, info.get("calibration"))
        self.compute = Compute(mode, budget, depth, _true(lossless))
        self.compute.check(model, self.engine.calibration)
        self.batch_size, self.max_gen_toks, self.add_bos = int(batch_size), int(max_gen_toks), _true(add_bos)
        self.max_length = model.config.sequence_len
        self._special = re.compile("(" + "|".join(map(re.escape, self.tokenizer.get_special_tokens())) + ")")

    # --- text

    @property
    def tokenizer_name(self) -> str:
        """Under which lm-eval caches what depends on the tokenizer."""
        return f"adamba-{self.tokenizer.fingerprint}"

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.encode_special("<|assistant_end|>")

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.get_bos_token_id()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids; special tokens' names stand for them (lm-eval passes conversations as text). <|bos|> is never doubled."""
        special, ids = self.tokenizer.get_special_tokens(), []
        for piece in self._special.split(string):
            ids += [special[piece]] if piece in special else self.tokenizer.encode(piece)
        add = self.add_bos if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id, *ids] if add and ids[:1] != [self.prefix_token_id] else ids

    def chat_template(self, chat_template: bool | str = False) -> str:
        """A name for the format of conversations; lm-eval keeps it with the results."""
        return "nanochat"

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """The conversation as text, ready for the assistant's answer, or for the rest of its last message."""
        if add_generation_prompt:
            answer = {"role": "assistant", "content": ""}
            ids = self.tokenizer.render_for_completion({"messages": [*chat_history, answer]})
        else:
            ids = self.tokenizer.render_conversation({"messages": chat_history}, max_tokens=2**62)[0][:-1]
        return self.tokenizer.decode(ids)

    # --- log-likelihoods

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """requests: (texts, context ids, continuation ids) -> (log-likelihood in nats, whether greedy decoding gives it)."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        results = [None] * len(requests)
        for at in tqdm(range(0, len(order), self.batch_size), disable=disable_tqdm, desc="log-likelihoods"):
            batch = order[at:at + self.batch_size]
            pairs = [requests[i][1:] for i in batch]
            for i, answer in zip(batch, self._score(pairs)):
                results[i] = answer
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return results

    @torch.no_grad()
    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Of pairs (context ids, continuation ids); what is too long for the model loses its beginning."""
        limit, rows, starts = self.max_length, [], []
        for context, continuation in pairs:
            if len(continuation) > limit:
                raise ValueError(f"a continuation has {len(continuation)} tokens, and the model's context only {limit}")
            text = (context + continuation)[-(limit + 1):]
            rows.append(text)
            starts.append(len(text) - len(continuation))
        idx, _ = pad([text[:-1] for text in rows], self._device)
        h = self._states(idx, rows, starts)
        own = torch.cat([h[r, start - 1:len(text) - 1] for r, (text, start) in enumerate(zip(rows, starts))])
        targets = torch.tensor([t for text, start in zip(rows, starts) for t in text[start:]], device=self._device)
        likely, best = [], []
        for at in range(0, len(own), LOGIT_ROWS):
            logits, target = self.engine.model.logits(own[at:at + LOGIT_ROWS]), targets[at:at + LOGIT_ROWS]
            likely.append(logits.log_softmax(-1).gather(1, target[:, None])[:, 0])
            best.append(logits.argmax(-1) == target)
        counts = [len(text) - start for text, start in zip(rows, starts)]
        return [(float(a.double().sum()), bool(b.all()))
                for a, b in zip(torch.cat(likely).split(counts), torch.cat(best).split(counts))]

    def _states(self, idx: torch.Tensor, rows: list[list[int]], starts: list[int]) -> torch.Tensor:
        """Final states (B, T, D) as decoding each continuation behind its context would give them."""
        model, c = self.engine.model, self.compute
        if c.lossless:  # decides at full compute
            return model.hidden(idx)
        if c.mode != "auto":
            return model.hidden(idx, c.mode, c.depth)
        control = Controls(model, c.budget, calibration=self.engine.calibration)
        place, ends = torch.arange(idx.size(1)), torch.tensor([len(text) - 1 for text in rows])
        acts = (place >= torch.tensor(starts)[:, None] - 1) & (place < ends[:, None])
        return control.parallel(idx, [text[:start] for text, start in zip(rows, starts)], acts)[0]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, behind <|bos|>, in windows of the model's context where they are longer."""
        windows = [[(None, *make_disjoint_window(w)) for w in get_rolling_token_windows(
            self.tok_encode(request.args[0], add_special_tokens=False), self.prefix_token_id, self.max_length, 1)]
            for request in requests]
        scores = iter(self._loglikelihood_tokens([w for own in windows for w in own], disable_tqdm))
        out = []
        for request, own in zip(requests, windows):
            out.append(sum(next(scores)[0] for _ in own))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, out[-1])
        return out

    # --- answers

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of its stop sequences or the end of the answer."""
        groups = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        answers, bar = [None] * len(requests), tqdm(total=len(requests), disable=disable_tqdm, desc="answers")
        for group in groups.values():
            prompts = {i: self.tok_encode(requests[i].args[0]) for i in group}
            group.sort(key=lambda i: -len(prompts[i]))
            options = normalize_gen_kwargs(requests[group[0]].args[1], self.max_gen_toks)
            for at in range(0, len(group), self.batch_size):
                batch = group[at:at + self.batch_size]
                for i, text in zip(batch, self._answer([prompts[i] for i in batch], options)):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update()
        return answers

    def _answer(self, prompts: list[list[int]], options: dict) -> list[str]:
        """Answers to prompts, as text; what is too long for the model loses its beginning."""
        until, most = [u for u in options.get("until", []) if u], int(options["max_gen_toks"])
        room = self.max_length - most
        if room < 1:
            raise ValueError(f"answers of {most} tokens leave no room for a question in the model's context of "
                             f"{self.max_length}: give a smaller max_gen_toks")
        sampling = {"temperature": float(options.get("temperature", 0.0)), "top_k": options.get("top_k"),
                    "top_p": options.get("top_p")}
        tokens, ended = [[] for _ in prompts], set()
        for pairs in self.engine.stream([p[-room:] for p in prompts], most, stop=stop_tokens(self.tokenizer), ended=ended,
                                        **sampling, **asdict(self.compute)):
            for row, token in pairs:
                tokens[row].append(token)
                if until and any(u in self._text(tokens[row]) for u in until):
                    ended.add(row)
        texts = [self._text(row) for row in tokens]
        return [text[:min((text.index(u) for u in until if u in text), default=len(text))] for text in texts]

    def _text(self, tokens: list[int]) -> str:
        return "".join(visible_text(self.tokenizer, tokens))


def _true(value: bool | str) -> bool:
    return value if isinstance(value, bool) else str(value).lower() in TRUE
