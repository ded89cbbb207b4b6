"""HumanEval (Chen et al. 2021, arXiv 2107.03374): functions to complete, judged by running their tests in the sandbox."""
import re

from nanochat.execution import run_program
from nanochat.tasks.common import RowTask, Source

FENCE = re.compile(r"```(?:python)?[ \t]*\n(.*?)\n?```", re.DOTALL)


def program_of(answer: str) -> str:
    """The first fenced block of an answer, else all of it."""
    match = FENCE.search(answer)
    return (match[1] if match else answer).strip()


def imports_of(prompt: str) -> str:
    """The import lines at the start of a prompt: a model that repeats the function often leaves them out."""
    kept = []
    for line in map(str.strip, prompt.splitlines()):
        if line.startswith(("import ", "from ")):
            kept.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(kept)


class HumanEval(RowTask):
    name = "HumanEval"
    source = Source("openai/openai_humaneval", "openai_humaneval", ("prompt", "canonical_solution", "test", "entry_point"))
    splits = {"test": "test"}

    def conversation(self, row):
        return {"messages": [{"role": "user", "content": row["prompt"]},
                             {"role": "assistant", "content": row["prompt"] + "\n" + row["canonical_solution"]}],
                "test": row["test"], "entry_point": row["entry_point"]}

    def evaluate(self, conversation, answer):
        prompt = conversation["messages"][0]["content"]
        program = "\n\n".join([imports_of(prompt), program_of(answer), conversation["test"],
                               f"check({conversation['entry_point']})"])
        return run_program(program).success
