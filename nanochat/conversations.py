"""
Conversations for training: what a line of a .jsonl may hold, what makes one malformed, and its turns.

On each line nanochat's form, a list of messages [{"role": "user", "content": ...}, {"role": "assistant", ...}], or the
same list as {"messages": [...]}. Tokenizer.render_conversation makes ids and the mask of what is learnt; here is no token.
"""
import json
from collections.abc import Iterator

FORMS = 'a list of {"role", "content"} or {"messages": such a list}'


def is_conversation(record: object) -> bool:
    """Whether a JSON value means to be a conversation, and not a text."""
    return isinstance(record, list) or (isinstance(record, dict) and "messages" in record)


def load(line: str | bytes, where: str) -> list | str | None:
    """The messages of a line of JSON in either form, as they are. ValueError, beginning with `where`, where it has none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not JSON ({e}): give {FORMS}") from e
    if not is_conversation(record):
        raise ValueError(f"{where} is no conversation: give {FORMS}")
    return record if isinstance(record, list) else record["messages"]


def check_at(messages: list | str | None, where: str) -> dict:
    """`check`, whose error begins with `where`, a file and a line in it."""
    try:
        return check(messages)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e


def parse(line: str | bytes, where: str) -> dict:
    """{"messages": [...]} of a line of JSON in either form. ValueError, beginning with `where`, for what `check` refuses."""
    return check_at(load(line, where), where)


def check(messages: list | str) -> dict:
    """
    {"messages": [...]} of a list of messages, or of the JSON of one, which is the same in every kind of file. Raises
    ValueError for what is malformed (see `turns`) or has nothing that an assistant says, from whom alone a model learns.
    """
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"its messages are not JSON ({e}): give {FORMS}") from e
    conversation = {"messages": messages}
    said = [parts for role, parts in turns(conversation) if role == "assistant"]
    if not said:
        raise ValueError("no message is the assistant's, so there is nothing to learn: complete or remove it")
    if not any(text for parts in said for kind, text in parts if kind != "python_output"):
        raise ValueError("the assistant says nothing in it, so there is nothing to learn: complete or remove it")
    return conversation


def plain_text(line: str, where: str) -> str:
    """What is said in the conversation, a paragraph a message: for a tokenizer to learn from."""
    return "\n\n".join("".join(text for _, text in parts) for _, parts in turns(parse(line, where)))


def messages_of(conversation: dict) -> list[dict]:
    """Its messages, each with a role and a content. Raises ValueError that says which is malformed."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation is {'messages': [...]} with at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"message {i} is not {{'role': ..., 'content': ...}}")
    return messages


def turns(conversation: dict) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """
    (role, [(kind, text), ...]) of each message, the system's merged into the first user's; kind is text, python or
    python_output. Raises ValueError that says which message is malformed.
    """
    messages = messages_of(conversation)
    system = ""
    first = int(messages[0]["role"] == "system")
    if first:
        if len(messages) < 2 or messages[1]["role"] != "user":
            raise ValueError("message 0 is the system's, so message 1 must be the user's")
        if not isinstance(messages[0]["content"], str):
            raise ValueError("message 0: the content of a system message must be a string")
        system = messages[0]["content"] + "\n\n"
    for i, message in enumerate(messages[first:], first):
        role, content = message["role"], message["content"]
        expected = "user" if (i - first) % 2 == 0 else "assistant"
        if role != expected:
            raise ValueError(f"message {i} is of role {role!r}, but user and assistant alternate: {expected!r} is due")
        if isinstance(content, str):
            yield role, [("text", system + content if i == first else content)]
            continue
        if role == "user" or not isinstance(content, list):
            due = "a user message must be a string" if role == "user" else \
                "an assistant message must be a string or a list of parts"
            raise ValueError(f"message {i}: the content of {due}, not {type(content).__name__}")
        for j, part in enumerate(content):
            if (not isinstance(part, dict) or part.get("type") not in ("text", "python", "python_output")
                    or not isinstance(part.get("text"), str)):
                raise ValueError(f"message {i}, part {j} is not {{'type': ..., 'text': ...}} of type text, python or "
                                 "python_output")
        yield role, [(part["type"], part["text"]) for part in content]
