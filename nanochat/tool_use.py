"""
The calculator as a chat model uses it: when the model has written <|python_start|>expression<|python_end|>, the next tokens
of the answer are not sampled but given: <|output_start|>result<|output_end|>.
"""
from collections import deque

from nanochat.execution import MAX_EXPRESSION, calculate


class ToolUse:
    """
    What one row of a batch has written towards a tool call. `forced` holds the tokens that must come next, oldest first;
    while it is empty the row samples. A call that the calculator refuses forces nothing, and the model goes on by itself.
    """
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        special = tokenizer.encode_special
        self.start, self.end = special("<|python_start|>"), special("<|python_end|>")
        self.brackets = special("<|output_start|>"), special("<|output_end|>")
        self.forced: deque[int] = deque()
        self._call: list[int] | None = None  # the tokens since <|python_start|>

    def wrote(self, token: int) -> None:
        """Tells that the row has a new token, sampled or forced."""
        if token == self.start:
            self._call = []
        elif token == self.end and self._call is not None:
            call, self._call = self._call, None
            result = calculate(self.tokenizer.decode(call)) if len(call) <= MAX_EXPRESSION else None
            if result is not None:
                self.forced.extend((self.brackets[0], *self.tokenizer.encode(result), self.brackets[1]))
        elif self._call is not None:
            self._call.append(token)

    def next(self, sampled: list[int]) -> list[int]:
        """What the row writes instead of its `sampled` tokens: the next forced token if there is one, else these."""
        return [self.forced.popleft()] if self.forced else sampled
