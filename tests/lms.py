"""LMs of tests that ask nobody."""

import copy
from types import SimpleNamespace

import dspy


class Asked(dspy.BaseLM):
    """Says that the mood is good, and remembers how it and its copies were asked."""

    def __init__(self, calls, **kwargs):
        super().__init__("asked", **kwargs)
        self.calls = calls

    def __deepcopy__(self, memo):
        twin = copy.copy(self)
        twin.kwargs = dict(self.kwargs)
        return twin

    def forward(self, prompt=None, messages=None, **kwargs):
        self.calls.append({**self.kwargs, **kwargs, "system": messages[0]["content"]})
        text = "[[ ## mood ## ]]\ngood\n\n[[ ## completed ## ]]"
        message = SimpleNamespace(content=text, tool_calls=None)
        choice = SimpleNamespace(message=message, finish_reason="stop")
        return SimpleNamespace(choices=[choice], usage={"prompt_tokens": 7}, model=self.model)
