r"""
Completes text or chats, streaming, at a chosen mode.

    python -m scripts.chat_cli --checkpoint ~/.cache/nanochat/fractal_checkpoints/d4_256_unfrozen \
        -p "def read(" --mode normal
    python -m scripts.chat_cli -i sft -g d32                       # chats with the newest model of that source and tag
    python -m scripts.chat_cli --checkpoint ... --chat
    python -m scripts.chat_cli --checkpoint ... -p "def read(" --lossless --temperature 0 --trace
"""
import argparse
import sys
import time
from collections import Counter
from dataclasses import replace

from nanochat import checkpoint_manager as ckpt
from nanochat.chat import answer_parts, check_chats, fit, prompt_room, stop_tokens, visible_text
from nanochat.common import autodetect_device_type, cli
from nanochat.engine import Compute, Engine, prepare_inference, total_flops

DEPTH_COLOURS = (46, 82, 118, 154, 190, 226, 220, 214, 208, 202, 196)  # of a 256-colour terminal: green, shallow, to red


def print_trace(trace, model, count: int) -> None:
    """The widths, the depths of the `count` tokens that are seen, and the compute saved, of one answer."""
    n_block, flops = model.config.n_block, trace.flops(model)
    depths = [depth for depth, _ in trace.steps[:count]]
    print(f"[widths by block: {' '.join(map(str, trace.widths))}]", file=sys.stderr)
    print("[depth of the tokens: " + ", ".join(f"{d} of {n_block} blocks {depths.count(d)}x" for d in sorted(set(depths)))
          + "]", file=sys.stderr)
    if trace.rounds:
        print_rounds(trace, flops, count)
        return
    spent, full = total_flops(flops)
    print(f"[FLOPs saved: {1 - flops['generated'] / flops['full_generated']:.1%} on the generated tokens, "
          f"{1 - spent / full:.1%} with the prompt]", file=sys.stderr)


def print_rounds(trace, flops, count: int) -> None:
    """What the drafts of one lossless answer brought."""
    checked = [r for r in trace.rounds if r.draft]
    drafted, kept = (sum(r[i] for r in checked) for i in (1, 2))
    used = Counter(r.draft for r in checked)
    print(f"[{count} tokens in {len(trace.rounds) + 1} passes: {drafted} tokens were drafted and {kept} kept"
          + "".join(f"; {n}x after {d.depth} blocks at width {d.width}" for d, n in used.most_common(3)) + "]",
          file=sys.stderr)
    for note in trace.notes:
        print(f"[{note}]", file=sys.stderr)
    print(f"[FLOPs of the generated tokens: {flops['generated'] / flops['full_generated']:.2f} of plain decoding's]",
          file=sys.stderr)


HELP = """/mode NAME     answer in another mode: ghost, whisper, normal, think, god, a width or auto
/budget SHARE  share of full compute for mode auto; without a number as it was calibrated
/clear         forget the conversation
/help          this list
/quit          end (so does an empty line)"""


class Session:
    """One user's conversation with a model, or texts that it completes, and the compute at which it answers."""
    def __init__(self, engine: Engine, args, compute: Compute, chat: bool):
        self.engine, self.args, self.compute, self.chat = engine, args, compute, chat
        self.stop, self.messages, self.said_long = stop_tokens(engine.tokenizer), [], False

    def prompt(self, text: str) -> tuple[list[int], int]:
        """(the ids to go on from, how many tokens the answer may have) of a user's line. ValueError where it is too long."""
        tokenizer, limit, most = self.engine.tokenizer, self.engine.model.config.sequence_len, self.args.max_tokens
        if not self.chat:
            return tokenizer.encode(text, prepend="<|bos|>"), most
        ids, dropped = fit(tokenizer, [*self.messages, {"role": "user", "content": text}], prompt_room(limit, most))
        if dropped and not self.said_long:
            self.said_long = True
            print(f"[the conversation is longer than the model's context of {limit} tokens: its oldest messages are left "
                  "out from here on]", file=sys.stderr)
        self.messages = self.messages[dropped:]
        return ids, min(most, limit - len(ids))

    def answer(self, text: str) -> None:
        """Prints the answer to a line as it comes, and keeps it in the conversation."""
        args, engine = self.args, self.engine
        ids, most = self.prompt(text)
        tokens, start = [], time.perf_counter()
        stream = engine.tokens(ids, most, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
                               stop=self.stop, mode=self.compute.mode, budget=self.compute.budget,
                               lossless=self.compute.lossless)

        def kept():
            for token in stream:
                tokens.append(token)
                yield token
        for i, piece in enumerate(visible_text(engine.tokenizer, kept())):
            if i == 0 and not self.chat:
                print(text, end="")
            if args.trace and i < len(tokens):
                depth = engine.traces[0].steps[i][0]
                print(f"\033[38;5;{DEPTH_COLOURS[(len(DEPTH_COLOURS) - 1) * depth // engine.model.config.n_block]}m", end="")
            print(piece, end="", flush=True)
        if not tokens and not self.chat:
            print(text, end="")
        seconds = time.perf_counter() - start
        print("\033[0m" * args.trace + f"\n[{len(tokens)} tokens, {len(tokens) / seconds:.1f} tok/s, mode "
              f"{self.compute.mode}]", file=sys.stderr)
        if args.trace and tokens:
            print_trace(engine.traces[0], engine.model, len(tokens))
        if self.chat:
            self.messages += [{"role": "user", "content": text},
                              {"role": "assistant", "content": answer_parts(engine.tokenizer, tokens)}]

    def command(self, line: str) -> bool:
        """Does what a line that begins with / says; whether the session goes on. ValueError for what it cannot do."""
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/quit":
            return False
        if name == "/clear":
            self.messages, self.said_long = [], False
        elif (name == "/mode" and value) or name == "/budget":
            try:
                changed = {"mode": value} if name == "/mode" else {"budget": float(value) if value else None}
            except ValueError:
                raise ValueError(f"/budget {value}: give a share such as 0.6") from None
            if changed.get("mode", "auto") != "auto":
                changed["budget"] = None
            compute = replace(self.compute, **changed)
            compute.check(self.engine.model, self.engine.calibration)
            self.compute = compute
        else:
            if name != "/help":
                print(f"there is no command {line}", file=sys.stderr)
            print(HELP, file=sys.stderr)
        return True

    def run(self) -> None:
        """Answers line after line until the user ends it."""
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                return
            if not line:
                return
            try:
                if not line.startswith("/"):
                    self.answer(line)
                elif not self.command(line):
                    return
            except ValueError as e:  # a message too long for the context, a mode that there is not; the session goes on
                print(e, file=sys.stderr)


def parse_args(argv) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Complete text or chat, streaming. Without -p it asks for input; /help lists "
                                            "what may be entered besides.")
    ckpt.add_model_args(p)
    p.add_argument("-p", "--prompt", default=None, help="answer this one and exit")
    p.add_argument("--chat", action="store_true",
                   help="converse with the chat tokens (default: with -i mid, sft or rl; else complete the text)")
    p.add_argument("--mode", default="god",
                   help="ghost, whisper, normal, think, god, a width, or auto: as much as each prompt and token needs "
                        "(default: god, the full width)")
    p.add_argument("--budget", type=float, default=None,
                   help="for --mode auto: share of full compute that the widths may cost on average over prompts, exits not "
                        "counted (default: what the checkpoint was calibrated at)")
    p.add_argument("--lossless", action="store_true",
                   help="the tokens of full compute (greedy) or its distribution, faster where drafts pay: --mode then says "
                        "how tokens are drafted (auto: by what it has brought so far)")
    p.add_argument("--trace", action="store_true",
                   help="colour each token by the depth it needed, and print the widths and the compute saved")
    p.add_argument("-m", "--max-tokens", type=int, default=200, help="tokens to generate (default: 200)")
    p.add_argument("-t", "--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    p.add_argument("-k", "--top-k", type=int, default=50, help="sample among this many likeliest tokens (default: 50)")
    p.add_argument("--top-p", type=float, default=None, help="... and among those that hold this much probability")
    p.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    p.add_argument("--device-type", default=None, choices=["cpu", "cuda"], help="default: cuda where there is one")
    args = p.parse_args(argv)
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens is {args.max_tokens}; it must be at least 1")
    return args


@cli
def main(argv=None):
    args = parse_args(argv)
    device = args.device_type or autodetect_device_type()
    model, tokenizer, info, _ = ckpt.load(ckpt.chosen_model(args), device)
    compute, calibration = Compute(args.mode, args.budget, None, args.lossless), info.get("calibration")
    compute.check(model, calibration)  # before anything else happens
    prepare_inference(model, device)
    chat = args.chat or args.source in ckpt.CHAT_SOURCES
    if chat:
        check_chats(model, tokenizer)
    session = Session(Engine(model, tokenizer, calibration), args, compute, chat)
    if args.prompt is not None:
        session.answer(args.prompt)
    else:
        session.run()


if __name__ == "__main__":
    main()
