"""Tools: Python functions that the policy may call. Their schemas for the chat template, the calls in what
the model wrote, and the environment that runs them.

A call that cannot be read or made is answered with an error text, from which the policy can learn; only a
template that shows no tools ends the run.
"""

import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import docstring_parser

from rollouts.environments import TimedOut, run_all
from run.config import ConfigError, import_attribute
from text.tokenizer import Tokenizer

PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", dict: "object",
         list: "array", Any: None, inspect.Parameter.empty: None}


# ------------------------------------------------------------------------------------------------------------
# Schemas
# ------------------------------------------------------------------------------------------------------------


def _schema(hint: Any) -> dict[str, Any]:
    """JSON schema of a type hint."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in PLAIN:
        return {} if PLAIN[hint] is None else {"type": PLAIN[hint]}
    if origin is Literal:
        kinds = {PLAIN.get(type(value)) for value in inner}
        return {**({"type": kinds.pop()} if len(kinds) == 1 else {}), "enum": list(inner)}
    if origin in (list, set, tuple, Sequence) and inner:
        return {"type": "array", "items": _schema(inner[0])}
    if origin is dict and len(inner) == 2:
        return {"type": "object", "additionalProperties": _schema(inner[1])}
    if origin in (typing.Union, types.UnionType):
        some = [_schema(x) for x in inner if x is not type(None)]
        found = some[0] if len(some) == 1 else {"anyOf": some}
        return {**found, "nullable": True} if type(None) in inner else found
    raise ValueError(f"the type {hint} has no JSON schema here")


def schema_of(function: Callable) -> dict[str, Any]:
    """What the chat template gets of a function: name, description and parameters, from its type hints and
    its docstring. Raises ValueError where one is missing."""
    name = function.__name__
    parsed = docstring_parser.parse(inspect.getdoc(function) or "")
    if not (parsed.description or "").strip():
        raise ValueError(f"{name} has no docstring: the model reads there what it does")
    hints = typing.get_type_hints(function)
    said = {p.arg_name: p.description for p in parsed.params}
    properties, required = {}, []
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ValueError(f"{name} has the parameter {parameter}: a model names each argument")
        if key not in hints:
            raise ValueError(f"{name} has no type hint for {key}")
        properties[key] = _schema(hints[key])
        if said.get(key):
            properties[key]["description"] = " ".join(str(said[key]).split())
        if parameter.default is parameter.empty:
            required.append(key)
    described = " ".join((parsed.description or "").split())
    parameters = {"type": "object", "properties": properties, **({"required": required} if required else {})}
    return {"type": "function",
            "function": {"name": name, "description": described, "parameters": parameters}}


# ------------------------------------------------------------------------------------------------------------
# Calls
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    name: str
    arguments: dict[str, Any]
    problem: str = ""  # why it cannot be made


def _of_object(value: Any) -> Call:
    """A call from the object that a model wrote."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call("", {}, 'a call must be {"name": …, "arguments": {…}}')
    given = value.get("arguments", value.get("parameters", {}))
    if isinstance(given, str):  # some templates write the arguments as text
        try:
            given = json.loads(given)
        except ValueError:
            return Call(value["name"], {}, "its arguments are text that is not JSON")
    if not isinstance(given, dict):
        return Call(value["name"], {}, "its arguments must be an object")
    return Call(value["name"], given)


def _of_json(text: str) -> list[Call]:
    try:
        value = json.loads(text)
    except ValueError as error:
        return [Call("", {}, f"it is not JSON ({error})")]
    return [_of_object(one) for one in value] if isinstance(value, list) else [_of_object(value)]


def _of_xml(text: str) -> list[Call]:
    """<function=name><parameter=key>value</parameter>…</function>, as Qwen3-Coder writes it."""
    calls = []
    for name, body in re.findall(r"<function=([^>\s]+)>(.*?)(?:</function>|$)", text, re.S):
        arguments = {}
        for key, value in re.findall(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", body, re.S):
            try:
                arguments[key] = json.loads(value)
            except ValueError:
                arguments[key] = value  # text stands there without quotes
        calls.append(Call(name, arguments))
    return calls or [Call("", {}, "it names no function")]


def _objects(text: str) -> list[Call]:
    """JSON objects one after the other, with `;` or white space between."""
    decoder, calls, at = json.JSONDecoder(), [], 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError as error:
            return [*calls, Call("", {}, f"it is not JSON ({error})")]
        calls.append(_of_object(value))
        while at < len(text) and text[at] in "; \n\t":
            at += 1
    return calls


def calls_in(text: str) -> tuple[str, list[Call]]:
    """(what stands before the calls, the calls) in what a model wrote: Hermes and Qwen (<tool_call> with JSON
    or XML), Llama (JSON, with or without <|python_tag|>), Mistral ([TOOL_CALLS], a list or name[ARGS]{…})."""
    if "<tool_call>" in text:
        before, _, rest = text.partition("<tool_call>")
        calls = []
        for block in rest.split("<tool_call>"):
            body = block.partition("</tool_call>")[0].strip()
            calls += _of_xml(body) if body.startswith("<function=") else _of_json(body)
        return before.strip(), calls
    if "[TOOL_CALLS]" in text:
        before, _, rest = text.partition("[TOOL_CALLS]")
        calls = []
        for block in rest.split("[TOOL_CALLS]"):
            name, mark, arguments = block.partition("[ARGS]")
            calls += _of_json(block.strip()) if not mark else [
                Call(name.strip(), one.arguments, one.problem)
                for one in [_of_object({"name": name.strip(), "arguments": arguments.strip()})]
            ]
        return before.strip(), calls
    if "<|python_tag|>" in text:
        before, _, rest = text.partition("<|python_tag|>")
        return before.strip(), _objects(rest.strip())
    bare = text.strip()
    if re.match(r'\{\s*"(?:name|type)"\s*:', bare) and ('"parameters"' in bare or '"arguments"' in bare):
        return "", _objects(bare)
    return text.strip(), []


# ------------------------------------------------------------------------------------------------------------
# The environment
# ------------------------------------------------------------------------------------------------------------


class ToolBox:
    """The tools of a run: functions, and classes whose public methods are tools of one conversation."""

    def __init__(self, names: Sequence[str], directory: Path):
        self.functions: dict[str, Callable] = {}
        self.makers: list[type] = []
        self.schemas: list[dict] = []
        for name in names:
            found = import_attribute("tools", name, directory)
            if not callable(found):
                raise ConfigError("tools", name, "is neither a function nor a class")
            if isinstance(found, type):
                self.makers.append(found)
                some = {k: f for k, f in inspect.getmembers(found, inspect.isfunction) if self._public(k)}
                if not some:
                    raise ConfigError("tools", name, "has no public method")
            else:
                some = {found.__name__: found}
                self.functions |= some
            for key, function in some.items():
                try:
                    schema = schema_of(_without_self(function) if isinstance(found, type) else function)
                except (ValueError, NameError, TypeError) as error:
                    raise ConfigError("tools", name, f"cannot be shown to a model: {error}") from None
                if any(schema["function"]["name"] == key for schema in self.schemas):
                    raise ConfigError("tools", name, f"brings a second tool {key}")
                self.schemas.append(schema)

    @staticmethod
    def _public(name: str) -> bool:
        return not name.startswith("_") and name != "reset"

    def of_conversation(self, columns: dict[str, Any]) -> dict[str, Callable]:
        """The tools by name, with fresh objects of the classes; an object's `reset(**columns)` is called."""
        tools = dict(self.functions)
        for maker in self.makers:
            one = maker()
            if callable(getattr(one, "reset", None)):
                one.reset(**columns)
            tools |= {k: getattr(one, k) for k, _ in inspect.getmembers(maker, inspect.isfunction)
                      if self._public(k)}
        return tools

    def environment(self, tokenizer: Tokenizer, timeout: float) -> Callable[[], "ToolEnvironment"]:
        return functools.partial(ToolEnvironment, self, tokenizer, timeout)


def _without_self(method: Callable) -> Callable:
    """The method as its caller sees it, for its signature."""

    @functools.wraps(method)
    def seen() -> None: ...

    signature = inspect.signature(method)
    own = list(signature.parameters.values())[1:]
    seen.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return seen


class ToolEnvironment:
    """Runs the calls of each answer, and ends with the first answer that has none."""

    rewards = False  # what a conversation is worth, reward functions say

    def __init__(self, box: ToolBox, tokenizer: Tokenizer, timeout: float):
        self.box, self.tokenizer, self.timeout = box, tokenizer, timeout
        self.calls = self.failures = 0

    def reset(self, prompt: Any, **columns: Any) -> None:
        self.tools = self.box.of_conversation(columns)

    def step(self, text: str, ids: list[int]) -> tuple[list[dict] | None, float, bool]:
        """(tool messages, 0, whether it is over)."""
        whole = self.tokenizer.decode(ids, special=True)  # [TOOL_CALLS] and the like are special tokens
        for stop in (self.tokenizer.decode([i], special=True) for i in self.tokenizer.stop_ids):
            whole = whole.removesuffix(stop)
        said, calls = calls_in(whole)
        self.message: dict[str, Any] = {"role": "assistant", "content": text}
        if not calls:
            return None, 0.0, True
        results = run_all([functools.partial(self._make, call) for call in calls], len(calls), self.timeout)
        messages, shown = [], []
        for call, result in zip(calls, results, strict=True):
            number = f"{self.calls:09d}"  # Mistral wants nine characters
            self.calls += 1
            self.failures += isinstance(result, BaseException)
            messages.append({"role": "tool", "name": call.name, "tool_call_id": number,
                             "content": self._text(call, result)})
            shown.append({"id": number, "type": "function",
                          "function": {"name": call.name, "arguments": call.arguments}})
        self.message = {"role": "assistant", "content": said, "tool_calls": shown}
        return messages, 0.0, False

    def _make(self, call: Call) -> Any:
        if call.problem:
            raise ValueError(call.problem)
        if call.name not in self.tools:
            raise ValueError(f"there is no tool {call.name!r}; there are {', '.join(self.tools)}")
        try:
            inspect.signature(self.tools[call.name]).bind(**call.arguments)
        except TypeError as error:
            raise ValueError(str(error)) from None
        return self.tools[call.name](**call.arguments)

    def _text(self, call: Call, result: Any) -> str:
        if isinstance(result, TimedOut):
            return f"error: no answer within {self.timeout:g} seconds"
        if isinstance(result, BaseException):
            return f"error: {result}" if isinstance(result, ValueError) else (
                f"error: {type(result).__name__}: {result}"
            )
        if isinstance(result, str):
            return result
        try:
            return json.dumps(result, ensure_ascii=False)
        except (TypeError, ValueError):
            return str(result)
