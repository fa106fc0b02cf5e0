"""The shipped chat templates, and the sandbox in which all templates are rendered."""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
GEMMA = (  # the system message is prepended to the first question
    "{{ bos_token }}{% set ns = namespace(before='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.before = message['content'] | trim + '\\n\\n' %}"
    "{% elif message['role'] == 'assistant' %}{{ '<start_of_turn>model\\n' }}"
    "{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<start_of_turn>' + message['role'] + '\\n' + ns.before + message['content'] | trim }}"
    "{{ '<end_of_turn>\\n' }}{% set ns.before = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# name → (template, the special tokens that it needs); for base models that bring none of their own
SHIPPED_TEMPLATES = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "phi_3": (PHI_3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
}


class BadRow(Exception):
    """Why a row cannot be encoded; the caller knows its file and line."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks what the assistant wrote; the marks are cut out after
    rendering."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        begin, end = self.environment.marks  # type: ignore[attr-defined]
        return f"{begin}{caller()}{end}"


MOST_TURNS = 200_000  # loop iterations and macro calls per rendering
MOST_TEXT = 1 << 24  # characters or elements that one operation may make
MOST_WIDTH = 10_000  # characters to which text may be padded


class _Counted(jinja2.visitor.NodeTransformer):
    """Counts loop iterations and macro calls, and measures joined text."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        if node.recursive:
            raise jinja2.TemplateError("recursive loops are not supported")
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, "counted")
        return node

    def visit_Macro(self, node: jinja2.nodes.Macro) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, jinja2.nodes.Output([self._filtered(jinja2.nodes.Const(""), "one_turn")]))
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Expr:
        self.generic_visit(node)
        return self._filtered(node, "measured")

    @staticmethod
    def _filtered(node: Any, name: str) -> jinja2.nodes.Expr:
        return jinja2.nodes.Filter(node, name, [], [], None, None)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Templates come with checkpoints and are untrusted: no access to the internals of Python objects
    (jinja2's own sandbox), and bounded memory and running time."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
            finalize=self._shallow,
        )
        self.turns = 0
        self.date: datetime.datetime | None = None  # what strftime_now writes; unset: the time of the call
        nonce = secrets.token_hex(8)  # content cannot contain the marks
        self.marks = f"\x02{nonce}<", f"\x02{nonce}>"
        self.concat = self._join  # joins all output, in macros too
        self.globals = {
            "raise_exception": self._refuse, "strftime_now": self._now, "range": self.globals["range"],
            "dict": dict, "namespace": self.globals["namespace"], "joiner": self.globals["joiner"],
            "cycler": self.globals["cycler"],
        }
        self.filters |= {name: self._guarded(name, f) for name, f in self.filters.items()}
        self.filters |= {"tojson": self._tojson, "counted": self._count, "one_turn": self._one_turn,
                         "measured": self._measured}

    def template(self, source: str) -> jinja2.Template:
        return self.from_string(_Counted().visit(self.parse(source)))

    @staticmethod
    def _refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def _now(self, form: str) -> str:
        return (self.date or datetime.datetime.now()).strftime(form)

    def _tojson(
        self, value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ) -> str:  # jinja2's own filter escapes HTML characters, which a model must not see
        if isinstance(indent, int) and indent > 100:
            self._too_large()
        return json.dumps(
            self._shallow(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )

    @staticmethod
    def _too_large() -> None:
        raise jinja2.TemplateError(f"it produces a text of more than {MOST_TEXT:,} characters")

    @jinja2.pass_context  # keeps the compiler from evaluating it once, at compile time
    def _one_turn(self, context: Any, value: Any) -> Any:
        self.turns += 1
        if self.turns > MOST_TURNS:
            raise jinja2.TemplateError(f"its loops run for more than {MOST_TURNS:,} iterations")
        return value

    def _count(self, values: Any) -> Iterator[Any]:
        for value in values:
            yield self._one_turn(None, value)

    def _measured(self, text: str) -> str:
        if len(text) > MOST_TEXT:
            self._too_large()
        return text

    def _join(self, pieces: Any) -> str:
        made, length = [], 0
        for piece in pieces:
            length += len(piece)
            if length > MOST_TEXT:
                self._too_large()
            made.append(piece)
        return "".join(made)

    def _shallow(self, value: Any) -> Any:
        """Return the value. TemplateError if writing it out would take more than MOST_TURNS elements."""
        if not isinstance(value, list | tuple | dict):
            return value
        left, stack = MOST_TURNS, [value]
        while stack:
            top = stack.pop()
            parts = [*top, *top.values()] if isinstance(top, dict) else list(top)
            left -= 1 + len(parts)
            if left < 0:
                self._too_large()
            stack += [part for part in parts if isinstance(part, list | tuple | dict)]
        return value

    def _guarded(self, name: str, function: Callable) -> Callable:
        if name not in ("center", "indent", "wordwrap", "format", "batch", "slice", "replace", "join",
                        "string", "pprint", "sum", "urlize", "truncate"):
            return function

        before = 1 if hasattr(function, "jinja_pass_arg") else 0  # environment or context

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            value, *rest = args[before:]
            if name == "join":
                value = list(value)
            self._check_call(name, value, [*rest, *kwargs.values()])
            return function(*args[:before], value, *rest, **kwargs)

        return guarded

    def _check_call(self, name: str, value: Any, given: list) -> None:
        """Check the arguments before the method or filter `name` runs on `value`."""
        self._shallow(value)
        if any(isinstance(v, int) and abs(v) > MOST_WIDTH for v in given):
            raise jinja2.TemplateError(f"{name} to more than {MOST_WIDTH:,}")
        texts = [v for v in given if isinstance(v, str)]
        if name == "replace" and len(texts) == 2:
            if str(value).count(texts[0]) * len(texts[1]) > MOST_TEXT:
                self._too_large()
        elif name == "join" and isinstance(value, list):
            total = sum(len(str(self._shallow(v))) for v in value)
            if total + len(value) * sum(map(len, texts)) > MOST_TEXT:
                self._too_large()
        elif name in ("format", "format_map") and re.search(r"\d{5,}|[*{]\s*[*{]", str(value)):
            raise jinja2.TemplateError(f"{name} to more than {MOST_WIDTH:,}")

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # str.format is wrapped
        if isinstance(owner, str | bytes | int | list):
            name, given = function.__name__, [*args, *kwargs.values()]
            if name == "join" and args:
                args = (list(args[0]),)
                self._check_call("join", args[0], [owner])
            else:
                self._check_call(name, owner, given)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if not all(isinstance(x, int | float) and abs(x) <= 1000 for x in (left, right)):
                raise jinja2.TemplateError("** of numbers above 1000")
        elif operator == "%" and isinstance(left, str):
            if re.search(r"\d{5,}|\*", left):
                raise jinja2.TemplateError("a format wider than 9999")
        elif isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > 10_000:
                raise jinja2.TemplateError("numbers of more than 10,000 bits")
        else:
            sizes = [len(x) if isinstance(x, str | bytes | list | tuple) else x for x in (left, right)]
            if all(isinstance(x, int) for x in sizes):
                length = sizes[0] * sizes[1] if operator == "*" else sizes[0] + sizes[1]
                if length > MOST_TEXT:
                    self._too_large()
        return super().call_binop(context, operator, left, right)
