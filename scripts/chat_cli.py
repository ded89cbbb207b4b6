r"""
Completes text or chats, streaming, at a chosen mode.

    python -m scripts.chat_cli --checkpoint ~/.cache/nanochat/fractal_checkpoints/d4_256_unfrozen \
        -p "def read(" --mode normal
    python -m scripts.chat_cli --checkpoint ... --chat
    python -m scripts.chat_cli --checkpoint ... -p "def read(" --lossless --temperature 0 --trace
"""
import argparse
import sys
import time
from collections import Counter

from nanochat import checkpoint_manager as ckpt
from nanochat.chat import stop_tokens
from nanochat.common import autodetect_device_type, cli
from nanochat.confidence_probe import Controls, check_trained
from nanochat.engine import Engine, prepare_inference, total_flops
from nanochat.speculative import candidates

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


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description="Complete text or chat, streaming. Without -p it asks for input; /mode NAME "
                                            "changes the mode, /clear forgets the conversation, an empty line ends.")
    p.add_argument("--checkpoint", required=True, help="a model's folder (export or training), or the model.pt in it")
    p.add_argument("-p", "--prompt", default=None, help="answer this one and exit")
    p.add_argument("--chat", action="store_true", help="converse with the chat tokens (default: complete the text)")
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
    p.add_argument("--max-tokens", type=int, default=200, help="tokens to generate (default: 200)")
    p.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    p.add_argument("--top-k", type=int, default=50, help="sample among this many likeliest tokens (default: 50)")
    p.add_argument("--top-p", type=float, default=None, help="... and among those that hold this much probability")
    p.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    args = p.parse_args(argv)
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens is {args.max_tokens}; it must be at least 1")

    device = autodetect_device_type()
    model, tokenizer, info, _ = ckpt.load(args.checkpoint, device)

    def check(mode):  # a wrong mode is reported before anything else happens
        if args.lossless and args.budget is not None:
            raise ValueError("--lossless always decides at full compute: drop --budget")
        if args.lossless:
            candidates(model.config, mode)
        elif mode == "auto":
            check_trained(model)
            Controls(model, args.budget, calibration=info.get("calibration"))
        elif args.budget is not None:
            raise ValueError("--budget has an effect with --mode auto only: add it, or drop --budget")
        else:
            model.resolve_widths(mode)
    check(args.mode)
    prepare_inference(model, device)
    engine = Engine(model, tokenizer, info.get("calibration"))
    stop = stop_tokens(tokenizer)

    def answer(messages: list[dict]) -> str:
        if args.chat:
            ids = tokenizer.render_for_completion({"messages": [*messages, {"role": "assistant", "content": ""}]})
        else:
            ids = tokenizer.encode(messages[-1]["content"], prepend="<|bos|>")
            print(messages[-1]["content"], end="", flush=True)
        start, count, text = time.perf_counter(), 0, ""

        def counted():
            nonlocal count
            for token in engine.generate(ids, args.max_tokens, mode=args.mode, temperature=args.temperature,
                                         top_k=args.top_k, top_p=args.top_p, seed=args.seed, stop=stop,
                                         budget=args.budget, lossless=args.lossless):
                count += 1
                if args.trace:
                    depth = engine.traces[0].steps[count - 1][0]
                    print(f"\033[38;5;{DEPTH_COLOURS[(len(DEPTH_COLOURS) - 1) * depth // model.config.n_block]}m", end="")
                yield token
        try:
            for piece in engine.stream_text(counted()):
                text += piece
                print(piece, end="", flush=True)
        except ValueError:
            if not args.chat:
                print(flush=True)  # behind the prompt: the error gets a line of its own
            raise
        seconds = time.perf_counter() - start
        print("\033[0m" * args.trace + f"\n[{count} tokens, {count / seconds:.1f} tok/s, mode {args.mode}]", file=sys.stderr)
        if args.trace:
            print_trace(engine.traces[0], model, count)
        return text

    if args.prompt is not None:
        answer([{"role": "user", "content": args.prompt}])
        return
    messages = []
    while True:
        try:
            line = input("\n> ")
        except EOFError:
            return
        if not line.strip():
            return
        if line.startswith("/mode "):
            try:
                check(line[6:].strip())
                args.mode = line[6:].strip()
            except ValueError as e:
                print(e, file=sys.stderr)
        elif line.strip() == "/clear":
            messages = []
        else:
            messages = [*messages, {"role": "user", "content": line}] if args.chat else [{"role": "user", "content": line}]
            try:
                messages.append({"role": "assistant", "content": answer(messages)})
            except ValueError as e:  # too long for the context, say; the session goes on
                messages.pop()
                print(e, file=sys.stderr)


if __name__ == "__main__":
    main()
