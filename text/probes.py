"""Parts of a conversation's turns, located in what a chat template writes by a word in their place."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

REASONING = ("reasoning_content", "thinking", "reasoning")  # synonyms; templates read the first
LAST_RESORT = "content (without its calls)"


@dataclass
class Part:
    """A part of a turn that a template shows, located by a unique word in its place."""

    place: str
    probe: dict  # the message with the word
    word: str
    before: str  # the conversation before the word, and after it
    after: str


def probes(message: dict, word: str) -> Iterator[tuple[str, dict]]:
    """(part, the message with `word` in its place): content, reasoning, the first and the last call. Some
    templates show the content or the calls of a turn, not both, and some refuse a turn without its calls."""
    content, calls = message.get("content"), message.get("tool_calls")
    reasoning = {key: word for key in REASONING if isinstance(message.get(key), str)}
    if isinstance(content, str) and "</think>" in content:
        opened, closed = content.find("<think>"), content.rindex("</think>")
        yield "content", {**message, "content": content[: closed + 8] + word}
        if 0 <= opened < closed:
            yield "<think> block", {**message, "content": content[: opened + 7] + word + content[closed:]}
    else:
        yield "content", {**message, "content": word}
    if reasoning:
        yield "reasoning", {**message, **reasoning}
    if not isinstance(calls, list):
        return
    for k in sorted({0, len(calls) - 1}):
        if calls and isinstance(calls[k], dict):
            function = calls[k].get("function", calls[k])
            for key, value in (("arguments", _with_word(function, word)), ("name", word)):
                if value is not None:
                    changed = {**function, key: value}
                    call = {**calls[k], "function": changed} if "function" in calls[k] else changed
                    yield f"call's {key}", {**message, "tool_calls": [*calls[:k], call, *calls[k + 1 :]]}
    yield (
        LAST_RESORT,
        {k: v for k, v in message.items() if k not in REASONING and k != "tool_calls"} | {"content": word},
    )


def _with_word(function: Any, word: str) -> Any:
    """The arguments of a call with the last one's value replaced; None where there is nothing to replace."""
    arguments = function.get("arguments") if isinstance(function, dict) else None
    as_text = isinstance(arguments, str)
    if as_text:
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    changed = {**arguments, list(arguments)[-1]: word} if arguments else {word: 1}
    return json.dumps(changed) if as_text else changed


def lost_parts(message: dict, shown: str) -> list[str]:
    """Parts of an assistant turn that are missing from the text of its span."""
    lost = []
    calls = message.get("tool_calls") or []
    names = [call.get("function", call).get("name") for call in calls if isinstance(call, dict)]
    if any(isinstance(name, str) and name not in shown for name in names):
        lost.append("tool calls")
    content = message.get("content")
    if calls and isinstance(content, str) and content.strip() and content.strip()[:40] not in shown:
        lost.append("content beside tool calls")
    return lost
