"""
SpellingBee, nanochat's: how often a letter occurs in a word, counted by spelling it out and then by the tool. Problems are
made from a word list and their number, so train and test never share one.
"""
import random
import string
from pathlib import Path

from nanochat.tasks.common import Task
from nanochat.tasks.gsm8k import final_answer

TEST_OFFSET = 10_000_000  # of the seeds of test problems
QUESTIONS = ("How many {letter} are in the word {word}", "How many {letter} are in {word}", "Count the {letter} in {word}",
             "How many times does {letter} appear in {word}", "What's the number of {letter} in {word}",
             "In {word}, count the {letter}", "Tell me the number of {letter} in {word}",
             "How many {letter} does {word} contain", "How often does {letter} occur in {word}")
WORDS = """about above accept across address afternoon against agreement airplane alphabet already although amount animal
answer appear apple area arrive assembly attention autumn average balance banana basket beautiful because become
before believe between bicycle biology bottle bottom branch breakfast bridge brother building business butterfly
calendar camera candle capital careful carpenter carrot castle century certain chapter chemistry children chocolate
circle climate clothes collect college committee common company compare complete computer condition connect consider
contain continent cottage country courage cousin creature cricket culture curious current customer daughter december
decide delicious dentist describe desert different difficult dinosaur direction discover distance doctor dollar
double dragon drawing during earthquake eastern education effect electric elephant eleven empty energy engine enough
entrance envelope environment evening everybody exactly example excellent exercise expect explain factory family
famous farmer february feeling fifteen finger flower follow foreign forest forward fourteen freedom friend furniture
future garden general gentle giraffe grammar grandmother grass ground guitar hammer happen harbour healthy heavy
helicopter history holiday honest hospital hundred husband imagine important increase industry insect instead
interest island january jealous journey kangaroo kitchen knowledge language laughter leather lesson letter library
lightning listen little machine magazine manager market material mathematics measure medicine member memory message
middle million minister minute mirror mississippi modern moment monkey morning mosquito mountain museum music
mystery narrow nation natural necessary neighbour notice november number object october office opinion orange
orchestra ordinary parallel parent parliament passenger pattern peculiar pencil people perfect perhaps person piano
picture pineapple planet pleasure pocket police popular possible potato practice prepare president pretty prince
problem process produce professor promise pronounce property protect pumpkin question quickly rabbit railway reason
receive recommend regular remember republic restaurant rhythm river saturday scarecrow science scissors season
secret september service seventeen shadow shoulder silver similar sister smooth snowflake society soldier sometimes
special spelling spider squirrel station straight strawberry street strength student success sudden sugar summer
surprise sweater swimming system telephone temperature terrible theatre thousand through thunder ticket together
tomato tomorrow tongue tradition traffic travel treasure triangle trouble tuesday umbrella uncle understand universe
usual vacation valley vegetable village violin visitor volcano volume watermelon weather wednesday weekend welcome
western whistle window winter without woman wonder yellow yesterday zebra""".split()


class SpellingBee(Task):
    name = "SpellingBee"
    baseline = 0.0

    def __init__(self, split: str, data: str | None = None, fetch: bool = False, size: int | None = None):
        """
        data: a .txt with a word on each line (nanochat's has 370,000); anything else means the 400 embedded words. There is
        nothing to fetch. size: how many problems (None: 256 to test, 20,000 to train).
        """
        if split not in ("train", "test"):
            raise ValueError(f"SpellingBee has no split '{split}': choose train or test")
        own = data is not None and data.endswith(".txt")
        words = Path(data).expanduser().read_text(encoding="utf-8").split() if own else WORDS
        self.words = [w for w in words if w.isascii() and w.isalpha()]
        if not self.words:
            raise ValueError(f"{data} holds no words of letters alone: give a file with a word on each line")
        size = size or {"train": 20_000, "test": 256}[split]
        self.size, self.offset, self.embedded = size, TEST_OFFSET * (split == "test"), False

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng = random.Random(self.offset + index)
        word = rng.choice(self.words)
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(string.ascii_lowercase)
        quote = rng.choice(["", "'", '"'])
        question = rng.choice(QUESTIONS).format(letter=f"{quote}{letter}{quote}", word=f"{quote}{word}{quote}")
        return {"messages": [{"role": "user", "content": question + rng.choice(["", "?"])},
                             {"role": "assistant", "content": solution(word, letter)}]}

    def evaluate(self, conversation, answer):
        return final_answer(answer) == final_answer(conversation["messages"][-1]["content"][-1]["text"])


def solution(word: str, letter: str) -> list[dict]:
    """The answer as parts: spelled out with a running count, then checked by the tool."""
    count, lines = 0, [f"Spelling {word}: {','.join(word)}\n\nCounting '{letter}':\n"]
    for i, char in enumerate(word, 1):
        count += char == letter
        lines.append(f"{i}:{char}" + (f" hit! count={count}\n" if char == letter else "\n"))
    return [{"type": "text", "text": "".join(lines) + f"\nThat makes {count}. Checking with Python:\n\n"},
            {"type": "python", "text": f"'{word}'.count('{letter}')"}, {"type": "python_output", "text": str(count)},
            {"type": "text", "text": f"\n\nPython says {count}.\n\n#### {count}"}]
