"""Interprets the columns and messages of a row: conversations in the usual formats, their tools, reasoning
traces and system messages. All functions are pure; BadRow says what is wrong with a row.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from run.config import ConfigError, shown
from text.probes import REASONING
from text.templates import BadRow
from text.tokenizer import Tokenizer

ROLES = {"system", "user", "assistant", "tool", "developer"}


@contextlib.contextmanager
def readable(kind: str) -> Iterator[None]:
    """Turn an error caused by a row of unexpected shape into BadRow, so that it does not end the run."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise BadRow(f"cannot be read as {kind} ({type(error).__name__}: {error})") from None
    except RecursionError:
        raise BadRow("is nested too deeply") from None


# Columns that hold lists or objects; some files have them as JSON text
STRUCTURED = ("messages", "conversations", "tools", "chat_template_kwargs", "remaining_turns")


def is_null(value: Any) -> bool:
    """Whether a column is empty: null, or NaN, which is pandas' null."""
    return value is None or (isinstance(value, float) and value != value)


def cleaned(row: dict) -> dict:
    """The row without its nulls (or NaN, pandas' null), which stand for absent columns, and with lists and
    objects that are stored as JSON text parsed. Raises BadRow for text that is not JSON."""
    row = {name: value for name, value in row.items() if not is_null(value)}
    for name in STRUCTURED:
        if isinstance(row.get(name), str):
            try:
                row[name] = json.loads(row[name]) if row[name].strip() else None
            except (ValueError, RecursionError):
                raise BadRow(f"{name} is text that is not JSON") from None
    return {name: value for name, value in row.items() if value is not None}


def need_text(row: dict, name: str, default: str | None = None) -> str:
    value = row.get(name, default)
    if value is None:
        raise BadRow(f"column {name!r} is missing (there are {', '.join(sorted(row)) or 'none'})")
    if not isinstance(value, str):
        raise BadRow(f"column {name!r} must be text, it is {type(value).__name__}")
    return value


def check_messages(messages: Any, need_answer: bool = True) -> list[dict]:
    """A conversation as {role, content, …}, with ShareGPT's and older forms translated. `need_answer`: the
    assistant must have a turn, and none that is trained may be empty. Raises BadRow."""
    if not isinstance(messages, list) or not messages:
        raise BadRow("messages must be a non-empty list")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRow(f"message {i} must be an object")
        message = {key: value for key, value in message.items() if value is not None}  # nulls from Parquet
        if "role" not in message and "from" in message:
            message = _from_sharegpt(message, i)
        message = _with_decoded_calls(message, i)
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f"message {i}: role {shown(role)} is not one of {', '.join(sorted(ROLES))}")
        if isinstance(content, list):
            _check_parts(content, i)
        elif (
            content is None
            and role == "assistant"
            and any(message.get(k) for k in ("tool_calls", *REASONING))
        ):
            pass  # APIs write a turn of tool calls alone without content
        elif not isinstance(content, str):
            raise BadRow(f"message {i}: content must be text, it is {type(content).__name__}")
        if message.get("weight", 1) not in (0, 1):
            raise BadRow(f"message {i}: weight must be 0 or 1, it is {shown(message['weight'])}")
        if not isinstance(message.get("train", True), bool):
            raise BadRow(f"message {i}: train must be true or false, it is {shown(message['train'])}")
        trained = message.get("train", True) and message.get("weight", 1) != 0
        answers = (text_of(content) or "").strip(), *(message.get(k) for k in ("tool_calls", *REASONING))
        if need_answer and role == "assistant" and trained and not any(answers):
            raise BadRow(f"message {i}: the answer is empty")
        checked.append(message)
    if need_answer and not any(m["role"] == "assistant" for m in checked):
        raise BadRow("no assistant message: nothing to train on")
    return checked


def _with_decoded_calls(message: dict, i: int) -> dict:
    """The arguments of tool calls as objects, as chat templates expect them; OpenAI's interface sends JSON
    text, which a template would encode a second time. Its older `function_call` becomes a tool call."""
    if isinstance(message.get("function_call"), dict) and not message.get("tool_calls"):
        call = {"type": "function", "function": message["function_call"]}
        message = {**{k: v for k, v in message.items() if k != "function_call"}, "tool_calls": [call]}
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    decoded = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get("arguments"), str):
            try:
                arguments = json.loads(inner["arguments"]) if inner["arguments"].strip() else {}
            except (ValueError, RecursionError):
                arguments = None
            if not isinstance(arguments, dict):
                raise BadRow(
                    f"message {i}: the arguments of a tool call must be an object, or one as JSON text: "
                    f"{shown(inner['arguments'])}"
                )
            inner = {**inner, "arguments": arguments}
            call = {**call, "function": inner} if "function" in call else inner
        decoded.append(call)
    return {**message, "tool_calls": decoded}


def _check_parts(parts: list, i: int) -> None:
    """Content given as a list may only have text parts; images and other types are refused by name."""
    for part in parts:
        if not isinstance(part, dict):
            raise BadRow(f"message {i}: content has a part that is {type(part).__name__}, not an object")
        kind = part.get("type", "text" if "text" in part else None)
        if kind != "text":
            raise BadRow(
                f"message {i}: content has a part of type {shown(kind)}: only text can be trained here"
            )
        if not isinstance(part.get("text"), str):
            raise BadRow(f"message {i}: content has a part without text")


SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool",
    "function": "tool", "function_response": "tool", "function_call": "assistant",
}


def _from_sharegpt(message: dict, i: int) -> dict:
    """{from, value} as {role, content}; a function_call's value is the call, or a list of calls, as JSON."""
    speaker, value = message["from"], message.get("value", message.get("content"))
    role = SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    rest = {k: v for k, v in message.items() if k not in ("from", "value", "content")}
    if speaker != "function_call":
        return {**rest, "role": role, "content": value}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise BadRow(f"message {i}: the value of a function_call must be JSON: {shown(value)}") from None
    tool_calls = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise BadRow(f"message {i}: a function_call must be {{name, arguments}}, it is {shown(call)}")
        arguments = call.get("arguments", call.get("parameters", {}))
        tool_calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return {**rest, "role": "assistant", "content": "", "tool_calls": tool_calls}


# Columns of data that supervised training cannot use as they are
PREFERENCES = ("chosen", "rejected")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def refuse_other_data(row: dict, columns: dict) -> None:
    """Raise BadRow for preference data and for rows with images: as plain text they would teach the wrong
    thing. `columns` are the names that the config chose."""
    chosen = set(columns.values())
    if all(row.get(name) is not None for name in PREFERENCES) and not chosen & set(PREFERENCES):
        raise BadRow(
            "is preference data (columns chosen and rejected), which no recipe here reads; to train on the "
            "chosen answers alone name them: columns: {messages: chosen}"
        )
    if isinstance(row.get("label"), bool) and "completion" in row and "label" not in chosen:
        raise BadRow(
            "is preference data (a column label that is true or false), which no recipe here reads; leave "
            "the column out, and the rows where it is false"
        )
    if media := [name for name in MEDIA if row.get(name)]:
        raise BadRow(f"has {media[0]}, which no model here reads: only text can be trained")


def chat_of(
    row: dict, tokenizer: Tokenizer, need_answer: bool = True
) -> tuple[list[dict], list | None, dict]:
    """(messages, tools, variables for the template) of a conversation's row. Raises BadRow."""
    names = ("messages", "conversations", "prompt")
    conversation = next((row[name] for name in names if row.get(name) is not None), None)
    if conversation is None:
        raise BadRow(f"column 'messages' is missing (there are {', '.join(sorted(row)) or 'none'})")
    messages = check_messages(conversation, need_answer)
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0]["content"] != system:
            raise BadRow("has a column system and another system message in its conversation")
    elif system is not None and not isinstance(system, str):
        raise BadRow(f"column 'system' must be text, it is {type(system).__name__}")
    tools, kwargs = _tools_of(row), row.get("chat_template_kwargs") or {}
    return tokenizer.with_readable_parts(messages, tools, **kwargs), tools, kwargs


def _tools_of(row: dict) -> list[dict] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise BadRow("tools is text that is not JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools must be a list of objects")
    first = (row.get("conversations") or [None])[0]
    if isinstance(first, dict) and "from" in first:  # ShareGPT-style data lists the bare functions
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return tools


def without_thinking(row: dict) -> dict:
    """The row without the reasoning traces in its assistant messages and text columns. An unclosed trace
    removes everything after it. Raises BadRow if nothing is left of an answer."""

    def text(value: str) -> str:
        left = re.sub(r"<think>.*?(</think>\s*|\Z)", "", value, flags=re.DOTALL)
        if not left.strip() and value.strip():
            raise BadRow("nothing is left of an answer but its <think> block (strip_thinking)")
        return left

    def message(value: Any) -> Any:
        role = value.get("role", value.get("from")) if isinstance(value, dict) else None
        if not isinstance(role, str) or SHAREGPT_ROLES.get(role, role) != "assistant":
            return value
        kept = {k: v for k, v in value.items() if k not in REASONING}
        for k in ("content", "value"):
            if isinstance(kept.get(k), str):
                kept[k] = text(kept[k])
            elif isinstance(kept.get(k), list):
                kept[k] = [
                    {**part, "text": text(part["text"])}
                    if isinstance(part, dict) and isinstance(part.get("text"), str)
                    else part
                    for part in kept[k]
                ]
        return kept

    changed = {}
    for name in ("messages", "conversations", "prompt", "completion", "remaining_turns"):
        if isinstance(row.get(name), list):
            changed[name] = [message(m) for m in row[name]]
    for name in ("completion", "output", "answer", "text"):
        if isinstance(row.get(name), str):
            changed[name] = text(row[name])
    return {**row, **changed}


def instruct_prompt(row: dict, tokenizer: Tokenizer) -> str | list[dict]:
    """The question of an instruct row: messages where the tokenizer has a chat template, else text."""
    instruction, more, system = need_text(row, "instruction"), need_text(row, "input", ""), row.get("system")
    if not isinstance(system, str | None):
        raise BadRow(f"column 'system' must be text, it is {type(system).__name__}")
    if tokenizer.template:
        messages = [{"role": "user", "content": f"{instruction}\n\n{more}" if more else instruction}]
        return [{"role": "system", "content": system}, *messages] if system else messages
    middle = f"### Input:\n{more}\n\n" if more else ""
    start = f"{system}\n\n" if system else ""
    return f"{start}### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def with_system(row: dict, system: Any) -> dict:
    """The row with a data set's system message, unless its conversation has one."""
    if system is None:
        return row
    if not isinstance(system, str):
        raise ConfigError("datasets", system, "system must be text")
    names = ("messages", "conversations", "prompt")
    conversation = next((row[name] for name in names if isinstance(row.get(name), list)), [])
    first = conversation[0] if conversation and isinstance(conversation[0], dict) else {}
    if not conversation and "instruction" not in row:
        raise BadRow("has no conversation that the data set's system message could begin")
    has_one = row.get("system") or "system" in (first.get("role"), first.get("from"))
    return row if has_one else {**row, "system": system}


def renamed(row: dict, columns: dict) -> dict:
    """The row with the file's column names, and the keys of its messages, replaced by ours."""
    plain = {ours: its for ours, its in columns.items() if "." not in ours and its in row}
    row = {k: v for k, v in row.items() if k not in plain.values()} | {
        o: row[its] for o, its in plain.items()
    }
    inner = {ours.split(".", 1)[1]: its for ours, its in columns.items() if ours.startswith("messages.")}
    for name in ("messages", "conversations", "prompt", "completion") if inner else ():
        if isinstance(row.get(name), list):
            row[name] = [renamed(m, inner) if isinstance(m, dict) else m for m in row[name]]
    return row


def text_of(content: Any) -> Any:
    """Message content as text; the parts of a list are joined."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def as_ours(row: dict, columns: dict) -> dict:
    """A file's row under our names of columns (`columns`: {ours: the file's}), without its gaps. Raises
    BadRow for a row that has our name and not the file's."""
    dotted = {ours: its for ours, its in columns.items() if "." in ours}
    plain = {ours: its for ours, its in columns.items() if ours not in dotted}
    for ours, its in plain.items():
        if ours in row and its not in row and ours not in plain.values():
            raise BadRow(f"has a column {ours!r} and not {its!r}, which columns names in its place")
    return renamed(cleaned(renamed(row, plain)), dotted)
