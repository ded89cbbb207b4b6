"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): word problems whose solutions call a calculator, <<12/60=0.2>>."""
import re

from nanochat.tasks.common import RowTask, Source

FINAL = re.compile(r"#### (-?[0-9.,]+)")


def final_answer(text: str) -> str | None:
    """The number after '#### ', commas dropped, or None."""
    match = FINAL.search(text)
    return match[1].replace(",", "") if match else None


def with_calls(solution: str) -> list[dict]:
    """A solution as parts of a message: <<expression=result>> becomes a tool call and its output."""
    parts = []
    for piece in re.split(r"(<<[^>]+>>)", solution):
        if piece.startswith("<<") and piece.endswith(">>"):
            expression, _, result = piece[2:-2].rpartition("=")
            parts += [{"type": "python", "text": expression or result},
                      {"type": "python_output", "text": result if expression else ""}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


class GSM8K(RowTask):
    name = "GSM8K"
    source = Source("openai/gsm8k", "main", ("question", "answer"))

    def conversation(self, row):
        return {"messages": [{"role": "user", "content": row["question"]},
                             {"role": "assistant", "content": with_calls(row["answer"])}]}

    def evaluate(self, conversation, answer):
        right = final_answer(conversation["messages"][-1]["content"][-1]["text"])
        return right is not None and final_answer(answer) == right
