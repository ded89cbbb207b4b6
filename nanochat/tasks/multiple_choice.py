"""ARC (Clark et al. 2018, arXiv 1803.05457) and MMLU (Hendrycks et al. 2020, arXiv 2009.03300)."""
from nanochat.tasks.common import RowTask, Source

LETTERS = "ABCD"


def question_text(question: str, letters: list[str], choices: list[str]) -> str:
    """
    How nanochat asks: each choice before its letter, with no blank between, so that the letter is the token that the
    model answers with.
    """
    listed = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{listed}\nRespond only with the letter of the correct answer."


class MultipleChoice(RowTask):
    kind = "categorical"
    baseline = 0.25

    def pose(self, question: str, letters: list[str], choices: list[str], answer: str) -> dict:
        if answer not in letters or len(letters) != len(choices):
            raise ValueError(f"{self.name}: the answer {answer!r} is none of {', '.join(letters)}, or a choice lacks one")
        return {"messages": [{"role": "user", "content": question_text(question, letters, choices)},
                             {"role": "assistant", "content": answer}], "letters": letters}

    def evaluate(self, conversation, answer):
        return answer == conversation["messages"][-1]["content"]


class ARC(MultipleChoice):
    """subset: ARC-Easy or ARC-Challenge."""
    def __init__(self, subset: str, split: str, data: str | None = None, fetch: bool = False):
        self.name = subset
        self.source = Source("allenai/ai2_arc", subset, ("question", "choices", "answerKey"))
        super().__init__(split, data, fetch)

    def conversation(self, row):
        return self.pose(row["question"], list(row["choices"]["label"]), list(row["choices"]["text"]), row["answerKey"])


class MMLU(MultipleChoice):
    """'train' is nanochat's auxiliary training set, 'test' the benchmark."""
    name = "MMLU"
    splits = {"train": "train", "validation": "validation", "test": "test"}

    def __init__(self, split: str, data: str | None = None, fetch: bool = False):
        config = "auxiliary_train" if split == "train" else "all"
        self.source = Source("cais/mmlu", config, ("question", "choices", "answer"))
        super().__init__(split, data, fetch)

    def unwrap(self, row):
        return row.get("train", row)  # the auxiliary set nests its columns

    def conversation(self, row):
        choices, answer = list(row["choices"]), row["answer"]
        if not isinstance(answer, int) or not 0 <= answer < len(choices) <= len(LETTERS):
            raise ValueError(f"MMLU: answer {answer!r} of {len(choices)} choices is no index of one of up to four")
        letters = list(LETTERS[:len(choices)])
        return self.pose(row["question"], letters, choices, letters[answer])
