"""A prompt with what belongs to it."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Prompt:
    """A row as reinforcement learning sees it: what the model reads, and every column for reward
    functions."""

    ids: list[int]
    prompt: str | list[dict]  # as the row has it: text, or messages
    columns: dict[str, Any]  # the row's other columns; `answer` is its reference answer where it has one
    name: str  # file:line
    completion: str | None = None  # the answer after this prompt in the row
    tools: list[dict] | None = None  # as the chat template gets them
    source: int = 0  # index of the row's data set
