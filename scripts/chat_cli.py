r"""
Completes text or chats, streaming, at a chosen mode.

    python -m scripts.chat_cli --checkpoint ~/.cache/nanochat/fractal_checkpoints/d4_256_unfrozen \
        -p "def read(" --mode normal
    python -m scripts.chat_cli --checkpoint ... --chat
"""
import argparse
import sys
import time

from nanochat import checkpoint_manager as ckpt
from nanochat.common import autodetect_device_type, cli
from nanochat.engine import Engine, prepare_inference


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description="Complete text or chat, streaming. Without -p it asks for input; /mode NAME "
                                            "changes the mode, /clear forgets the conversation, an empty line ends.")
    p.add_argument("--checkpoint", required=True, help="a model's folder (export or training), or the model.pt in it")
    p.add_argument("-p", "--prompt", default=None, help="answer this one and exit")
    p.add_argument("--chat", action="store_true", help="converse with the chat tokens (default: complete the text)")
    p.add_argument("--mode", default="god",
                   help="ghost, whisper, normal, think, god, or a width (default: god, the full width)")
    p.add_argument("--max-tokens", type=int, default=200, help="tokens to generate (default: 200)")
    p.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    p.add_argument("--top-k", type=int, default=50, help="sample among this many likeliest tokens (default: 50)")
    p.add_argument("--top-p", type=float, default=None, help="... and among those that hold this much probability")
    p.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    args = p.parse_args(argv)

    device = autodetect_device_type()
    model, tokenizer, _, _ = ckpt.load(args.checkpoint, device)
    if args.mode != "auto":  # which the engine answers for
        model.resolve_widths(args.mode)  # a wrong mode is reported before anything else happens
    prepare_inference(model, device)
    engine = Engine(model, tokenizer)
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")

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
                                         top_k=args.top_k, top_p=args.top_p, seed=args.seed, stop=(bos, end)):
                count += 1
                yield token
        for piece in engine.stream_text(counted()):
            text += piece
            print(piece, end="", flush=True)
        seconds = time.perf_counter() - start
        print(f"\n[{count} tokens, {count / seconds:.1f} tok/s, mode {args.mode}]", file=sys.stderr)
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
                model.resolve_widths(line[6:].strip())
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
