"""Conversations to learn from: SmolTalk (arXiv 2502.02737), and a jsonl of one's own."""
from pathlib import Path

from nanochat import conversations
from nanochat.tasks.common import RowTask, Source, Task, numbered_lines


class SmolTalk(RowTask):
    """The smaller SmolTalk: general conversations; it has no right answers to be judged by."""
    name = "SmolTalk"
    source = Source("HuggingFaceTB/smol-smoltalk", "data", ("messages",))

    def conversation(self, row):
        conversation = {"messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]}
        list(conversations.turns(conversation))
        return conversation


class CustomJSON(Task):
    """A conversation on each line of a .jsonl, as nanochat.conversations reads them."""
    def __init__(self, path: str):
        file = Path(path).expanduser()
        if not file.exists():
            raise FileNotFoundError(f"no such file or folder: {file}")
        self.name = file.name
        self.conversations = [conversations.parse(line, where) for where, line in numbered_lines(file)]

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, index):
        return self.conversations[index]
