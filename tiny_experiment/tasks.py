"""
The tasks, in three difficulties, made at random without end and split so that no held-out instance is ever trained on.

easy    copy or repeat a random word            copy qzkf=qzkf          twice hb=hbhb
medium  count a letter, a length, two numbers   count xbqb b=2         len wkxqa=5         47+85=132
hard    three numbers, x + reverse(x), digits   12+30+9=51              flip 47=121         sum 345=12

A hash of its prompt says to which split an instance belongs, so that no two splits overlap, whatever the seed.
"""
import random
import zlib
from typing import NamedTuple

import torch

from nanochat.tokenizer import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIFFICULTIES = ("easy", "medium", "hard")


class Instance(NamedTuple):
    """A prompt, its answer, and the task and difficulty that it belongs to."""
    prompt: str
    answer: str
    task: str
    difficulty: str


def _word(rng, low, high, letters=LETTERS):
    return "".join(rng.choice(letters) for _ in range(rng.randint(low, high)))


def _copy(rng):
    w = _word(rng, 3, 8)
    return f"copy {w}=", w


def _twice(rng):
    w = _word(rng, 2, 4)
    return f"twice {w}=", w + w


def _count(rng):
    letter, n = rng.choice(LETTERS), rng.randint(3, 8)
    hits = rng.sample(range(n), rng.randint(0, min(n, 4)))  # planted, or most counts would be 0
    others = LETTERS.replace(letter, "")
    w = "".join(letter if i in hits else rng.choice(others) for i in range(n))
    return f"count {w} {letter}=", str(len(hits))


def _length(rng):
    w = _word(rng, 2, 10)
    return f"len {w}=", str(len(w))


def _add_two(rng):
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return f"{a}+{b}=", str(a + b)


def _add_three(rng):
    n = [rng.randint(0, 30) for _ in range(3)]
    return "+".join(map(str, n)) + "=", str(sum(n))


def _flip(rng):
    x = rng.randint(10, 99)
    return f"flip {x}=", str(x + int(str(x)[::-1]))


def _digits(rng):
    x = rng.randint(100, 999)
    return f"sum {x}=", str(sum(map(int, str(x))))


TASKS = {"easy": {"copy": _copy, "twice": _twice}, "medium": {"count": _count, "len": _length, "add two": _add_two},
         "hard": {"add three": _add_three, "flip": _flip, "digits": _digits}}


def split_of(prompt: str) -> str:
    """
    'calibration' for 15 % of all instances, 'test' and 'controls' for half as many each, 'train' for the rest. The controls
    learn from instances that the model was not trained on: what it knows by heart looks easy at any width.
    """
    at = zlib.crc32(prompt.encode()) % 40
    return "calibration" if at < 6 else "test" if at < 9 else "controls" if at < 12 else "train"


def draw(rng: random.Random, difficulty: str, split: str) -> Instance:
    """One instance of a random task of this difficulty; split: see split_of."""
    task, make = rng.choice(list(TASKS[difficulty].items()))
    while True:
        prompt, answer = make(rng)
        if split_of(prompt) == split:
            return Instance(prompt, answer, task, difficulty)


def draw_many(seed: int, n: int, split: str) -> list[Instance]:
    """
    n instances, the difficulties in equal thirds; of 'calibration' and 'test' no two are the same. Small families run out
    there ('flip' has 90 instances in all), and others of their difficulty take their place: asked twenty times over, one
    question would decide what a whole model is worth. Twice as many of 'calibration' as of 'test' hold the same shares of
    each task, and so does any part of either, but for chance.
    """
    rng, once = random.Random(f"{split} {seed}"), split in ("calibration", "test")
    drawn, seen = [], set()
    while len(drawn) < n:
        instance = draw(rng, DIFFICULTIES[len(drawn) % 3], split)
        if not once or instance not in seen:
            seen.add(instance)
            drawn.append(instance)
    if once:  # small families came first
        thirds = [drawn[k::len(DIFFICULTIES)] for k in range(len(DIFFICULTIES))]
        for k, third in enumerate(thirds):
            rng.shuffle(third)
            drawn[k::len(DIFFICULTIES)] = third
    return drawn


def make_tokenizer() -> Tokenizer:
    """The package's byte-level tokenizer without merges: a character is a token."""
    return Tokenizer([bytes([i]) for i in range(256)])


class Encoder:
    """Instances -> token ids. Every text begins with <|bos|> and ends with <|assistant_end|>."""
    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.bos, self.end = (tokenizer.encode_special(f"<|{name}|>") for name in ("bos", "assistant_end"))

    def prompt(self, instance: Instance) -> list[int]:
        return [self.bos, *self.tokenizer.encode(instance.prompt)]

    def answer(self, instance: Instance) -> list[int]:
        return [*self.tokenizer.encode(instance.answer), self.end]

    def batch(self, instances: list[Instance]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        (x (B, T), y (B, T), starts (B,)) int64: inputs, targets (-1 but for the answer and its end), and the length of each
        prompt.
        """
        prompts, answers = map(self.prompt, instances), map(self.answer, instances)
        rows = [(p, a) for p, a in zip(prompts, answers)]
        T = max(len(p) + len(a) for p, a in rows) - 1
        x, y = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), -1)
        for r, (p, a) in enumerate(rows):
            text = torch.tensor(p + a)
            x[r, :len(text) - 1] = text[:-1]
            y[r, len(p) - 1:len(text) - 1] = text[len(p):]
        return x, y, torch.tensor([len(p) for p, _ in rows])
