"""
Word problems like GSM8K's, whose arithmetic is too much for a small model's head: what dev/tool_arithmetic.sh teaches.

    python dev/tool_arithmetic.py FOLDER

writes FOLDER/train.jsonl and FOLDER/plain.jsonl (conversations, with and without calls of the calculator) and
FOLDER/main/test.jsonl (other problems, in GSM8K's columns, for chat_eval --data FOLDER).
"""
import json
import random
import re
import sys
from pathlib import Path

from nanochat.tasks.gsm8k import with_calls

NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida")
THINGS = ("apples", "books", "cards", "eggs", "nails", "pens", "shells", "stamps")
FORMS = ("{n} has {a} boxes of {b} {t} and gives away {c} of them. How many {t} does {n} keep?",
         "There are {b} {t} in a box. {n} buys {a} boxes and loses {c} {t}. How many {t} are left?",
         "{n} packs {b} {t} into each of {a} boxes, and then {c} {t} break. How many {t} are whole?")


def problem(rng: random.Random) -> dict:
    """{'question', 'answer'} in GSM8K's format: a product of two numbers of two digits, then a difference."""
    a, b, name, thing = rng.randint(11, 99), rng.randint(11, 99), rng.choice(NAMES), rng.choice(THINGS)
    c = rng.randint(11, a * b - 1)
    question = rng.choice(FORMS).format(n=name, a=a, b=b, c=c, t=thing)
    return {"question": question, "answer": f"First {a}*{b}=<<{a}*{b}={a * b}>>{a * b}. Then {a * b}-{c}="
                                            f"<<{a * b}-{c}={a * b - c}>>{a * b - c}.\n#### {a * b - c}"}


def main(folder: Path, train: int = 20_000, test: int = 200) -> None:
    rng, seen = random.Random(1), {}
    while len(seen) < train + test:
        row = problem(rng)
        seen[row["question"]] = row
    rows = list(seen.values())
    (folder / "main").mkdir(parents=True, exist_ok=True)
    for name, plain in (("train", False), ("plain", True)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as f:
            for row in rows[test:]:
                said = re.sub("<<[^>]+>>", "", row["answer"]) if plain else with_calls(row["answer"])
                f.write(json.dumps([{"role": "user", "content": row["question"]},
                                    {"role": "assistant", "content": said}]) + "\n")
    with open(folder / "main" / "test.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows[:test])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
