r"""
Says how well a tokenizer compresses different kinds of text, beside GPT-2's and GPT-4's where their files are cached.

    python -m scripts.tok_eval
    python -m scripts.tok_eval --tokenizer ~/.cache/nanochat/chatsft_checkpoints/d32 --data notes.txt

Bytes per token: the higher, the fewer tokens a text costs. The table is also written to tok_eval/ under NANOCHAT_BASE_DIR,
from where scripts.report takes it.
"""
import argparse
from pathlib import Path

from nanochat import checkpoint_manager as ckpt
from nanochat.common import cli, get_base_dir, print0, user_path
from nanochat.dataset import prepare
from nanochat.shards import EMBEDDED, iter_texts
from nanochat.tokenizer import Tokenizer, cut_spaces
from scripts.tok_train import cached_encoding

# A few lines of each kind, written for this table.
TEXTS = {
    "English": "The ferry had been late for a week, and nobody on the island seemed to mind. The baker closed at noon, the "
               "school sent the children home early, and in the harbour the fishermen talked about the weather as if it "
               "were a relative who had promised to visit and then forgotten the date. On Thursday a letter arrived, with "
               "two stamps and no address, and the postman carried it from door to door until somebody knew the hand.",
    "German": "Die Fähre kam seit einer Woche zu spät, und auf der Insel schien es niemanden zu stören. Der Bäcker schloss "
              "mittags, die Schule schickte die Kinder früher nach Hause, und im Hafen redeten die Fischer über das Wetter.",
    "Chinese": "渡船已经晚点一个星期了，岛上似乎没有人在意。面包店中午就关门，学校让孩子们早早回家，渔民们在港口谈论天气。",
    "code": """def moving_average(values, size):
    total, out = 0.0, []
    for i, value in enumerate(values):
        total += value
        if i >= size:
            total -= values[i - size]
        if i >= size - 1:
            out.append(total / size)
    return out
""",
    "mathematics": r"Let $f(x) = x^3 - 2x + 1$. Then $f'(x) = 3x^2 - 2$, which is zero at $x = \pm\sqrt{2/3}$, so that "
                   r"$\int_0^1 f(x)\,dx = \frac{1}{4} - 1 + 1 = 0.25$; and 1,234 * 56 = 69,104.",
    "numbers": "1999 2024 3.14159 2,718,281 1e-8 0x7f 192.168.0.1 2026-11-29 17:45:03 +49 30 123456",
}


def bytes_per_token(encode, texts: list[str]) -> float:
    """Of a function from a text to its ids."""
    tokens = sum(len(encode(piece)) for text in texts for piece in cut_spaces(text))
    return sum(len(text.encode("utf-8", "replace")) for text in texts) / max(1, tokens)


@cli
def main(argv=None) -> dict:
    p = argparse.ArgumentParser(description="How many bytes a token stands for, by kind of text.")
    p.add_argument("--tokenizer", default=None,
                   help="its folder, or a checkpoint's (default: tokenizer in NANOCHAT_BASE_DIR)")
    p.add_argument("--data", default=EMBEDDED,
                   help=f"a validation split to judge on, too, as in tok_train (default: {EMBEDDED})")
    args = p.parse_args(argv)
    folder = user_path(args.tokenizer) if args.tokenizer else get_base_dir() / "tokenizer"
    tokenizer = Tokenizer.from_directory(folder)
    texts = {name: [text] for name, text in TEXTS.items()}
    texts[f"{Path(args.data).name} (validation)"] = list(iter_texts(prepare(args.data), "val", 1_000_000))
    encoders = {"this one": tokenizer.encode}
    for label, name in (("GPT-2", "gpt2"), ("GPT-4", "cl100k_base")):
        if (encoding := cached_encoding(name)) is not None:
            encoders[label] = encoding.encode_ordinary
    rows = {name: {label: bytes_per_token(encode, its) for label, encode in encoders.items()}
            for name, its in texts.items()}
    print0(f"{folder}: {tokenizer.get_vocab_size():,} ids")
    print0(f"{'bytes per token':<28}" + "".join(f"{label:>10}" for label in encoders))
    for name, row in rows.items():
        print0(f"{name:<28}" + "".join(f"{row[label]:>10.3f}" for label in encoders))
    result = {"tokenizer": str(folder), "vocab_size": tokenizer.get_vocab_size(), "rows": rows}
    ckpt.save_json(result, get_base_dir() / "tok_eval" / f"{tokenizer.fingerprint}.json")
    return result


if __name__ == "__main__":
    main()
