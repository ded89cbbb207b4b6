"""
Trains the tokenizer on the training split and says how well it compresses the validation split.

    python -m scripts.tok_train --data embedded --vocab-size 8192
"""
import argparse
import time
from pathlib import Path

import tiktoken
import tiktoken.load

from nanochat.common import cli, get_base_dir, print0
from nanochat.dataset import DEFAULT_HUB, add_skip_arg, prepare
from nanochat.hub import DEFAULT_SHARDS
from nanochat.owner import gives_back, own
from nanochat.shards import EMBEDDED, iter_texts
from nanochat.tokenizer import Tokenizer, check_vocab_size, cut_spaces, find_file, is_ours


def parse_args(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default=EMBEDDED,
                        help=f"text to learn from: '{EMBEDDED}' (this Python's standard library), a local folder or "
                             f"file of .parquet, .jsonl, .txt, or a hub dataset such as {DEFAULT_HUB}")
    parser.add_argument("--num-shards", type=int, default=DEFAULT_SHARDS,
                        help="training shards to fetch from a hub dataset")
    parser.add_argument("--vocab-size", type=int, default=8192, help="number of ids, the nine special tokens included")
    parser.add_argument("--max-chars", type=int, default=2_000_000_000,
                        help="characters of the training split to learn from")
    add_skip_arg(parser)
    parser.add_argument("--out", type=Path, help="folder to write (default: tokenizer in NANOCHAT_BASE_DIR)")
    return parser.parse_args(argv)


def cached_encoding(name: str) -> tiktoken.Encoding | None:
    """An encoding of OpenAI's where tiktoken has its files in the cache; never over the network."""
    def refuse(path: str) -> bytes:
        raise OSError(f"{path} is not cached")
    read_file, tiktoken.load.read_file = tiktoken.load.read_file, refuse
    try:
        return tiktoken.get_encoding(name)
    except OSError:
        return None
    finally:
        tiktoken.load.read_file = read_file


@cli
@gives_back
def main(argv=None) -> None:
    args = parse_args(argv)
    check_vocab_size(args.vocab_size)
    if args.max_chars < 1:
        raise ValueError(f"--max-chars {args.max_chars} leaves no text: give at least 1")
    out = own(args.out or get_base_dir() / "tokenizer")
    there = Path(out, "tokenizer.pkl") if Path(out, "tokenizer.pkl").is_file() else find_file(out)
    if there and not is_ours(there):
        raise ValueError(f"{there} is another program's tokenizer, which is not overwritten: training takes it from there "
                         "as it is; to make one of your own name another folder with --out")
    folder = prepare(args.data, num_shards=args.num_shards, skip_bad_rows=args.skip_bad_rows)
    start = time.perf_counter()
    tokenizer = Tokenizer.train_from_iterator(iter_texts(folder, "train", args.max_chars), args.vocab_size)
    seconds = time.perf_counter() - start
    size = tokenizer.get_vocab_size()
    print0(f"trained {size} ids in {seconds:.1f} s from {folder}")
    if size < args.vocab_size:
        print0(f"the text has no more merges to learn: {args.vocab_size} ids were asked for")
    tokenizer.save(out)  # before anything else can go wrong
    print0(f"tokenizer folder: {out}")
    # The first few megabytes of validation text, in bytes per token: the higher, the fewer tokens a text costs.
    texts = list(iter_texts(folder, "val", 5_000_000))
    nbytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    tokens = sum(map(len, tokenizer.encode(texts)))
    if not tokens:
        raise ValueError(f"the tokenizer is written, but cannot be judged: the validation shard of {folder} holds no text; "
                         "give more or longer documents")
    line = f"validation: {nbytes:,} bytes in {tokens:,} tokens = {nbytes / tokens:.3f} bytes per token"
    gpt2 = cached_encoding("gpt2")
    if gpt2 is not None:
        pieces = [piece for text in texts for piece in cut_spaces(text)]
        line += f" (GPT-2's 50,257 ids: {nbytes / sum(map(len, gpt2.encode_ordinary_batch(pieces))):.3f})"
    print0(line)


if __name__ == "__main__":
    main()
