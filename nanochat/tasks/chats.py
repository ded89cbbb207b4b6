"""Conversations to learn from: SmolTalk (arXiv 2502.02737), and a jsonl of one's own."""
from nanochat import conversations
from nanochat.tasks.common import RowTask, Source, Task, _lines, shared_folder


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
        file = shared_folder(path)
        self.name = file.name
        self.conversations = [conversations.parse(line, f"{file}, line {n}")
                              for n, line in enumerate(_lines(file), 1) if line.strip()]

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, index):
        return self.conversations[index]
