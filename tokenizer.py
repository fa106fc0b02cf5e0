"""Text to token ids: a checkpoint's tokenizer, its chat template in a sandbox, and which tokens of a
conversation the assistant wrote."""

import contextlib
import datetime
import functools
import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor
import tokenizers

from config import ConfigError, DataError

IGNORE = -100  # label of a token that is not trained
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class BadRow(Exception):
    """Why a row cannot be encoded; the caller knows its file and line."""


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(str(path), None, f"is not UTF-8 text (byte {error.start})", "convert it") from None
    except OSError as error:
        raise DataError(str(path), None, f"cannot be read ({error.strerror})") from None


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


MOST_TURNS = 200_000  # of loops, and calls of macros, in one rendering
MOST_TEXT = 1 << 24  # characters or elements that one operation may make
MOST_WIDTH = 10_000  # to which a text may be padded


class _Counted(jinja2.visitor.NodeTransformer):
    """Every turn of a loop and every call of a macro is counted, every joined text measured."""

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


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Templates come with checkpoints and are untrusted: no access to Python objects' insides (jinja2's own
    sandbox), and no way to fill the memory or to run for ever."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
            finalize=self._shallow,
        )  # fmt: skip
        self.turns = 0
        nonce = secrets.token_hex(8)  # content cannot contain the marks
        self.marks = f"\x02{nonce}<", f"\x02{nonce}>"
        self.concat = self._join  # of everything that is put out, in macros too
        self.globals = {
            "raise_exception": self._refuse, "strftime_now": self._now, "range": self.globals["range"],
            "dict": dict, "namespace": self.globals["namespace"], "joiner": self.globals["joiner"],
            "cycler": self.globals["cycler"],
        }  # fmt: skip
        self.filters |= {name: self._guarded(name, f) for name, f in self.filters.items()}
        self.filters |= {"tojson": self._tojson, "counted": self._count, "one_turn": self._one_turn,
                         "measured": self._measured}  # fmt: skip

    def template(self, source: str) -> jinja2.Template:
        return self.from_string(_Counted().visit(self.parse(source)))

    @staticmethod
    def _refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    @staticmethod
    def _now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def _tojson(
        self, value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ) -> str:  # jinja2's own filter escapes HTML characters, which a model must not see
        if isinstance(indent, int) and indent > 100:
            self._too_large()
        return json.dumps(
            self._shallow(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    @staticmethod
    def _too_large() -> None:
        raise jinja2.TemplateError(f"it makes a text of more than {MOST_TEXT:,} characters")

    @jinja2.pass_context  # which keeps the compiler from working it out once, beforehand
    def _one_turn(self, context: Any, value: Any) -> Any:
        self.turns += 1
        if self.turns > MOST_TURNS:
            raise jinja2.TemplateError(f"its loops turn more than {MOST_TURNS:,} times")
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
        """The value, unless writing it out would take more elements than may be."""
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
                        "string", "pprint", "sum", "urlize", "truncate"):  # fmt: skip
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
        """Before a method or filter of this name runs on `value`."""
        self._shallow(value)
        if any(isinstance(v, int) and abs(v) > MOST_WIDTH for v in given):
            raise jinja2.TemplateError(f"{name} to more than {MOST_WIDTH:,}")
        texts = [v for v in given if isinstance(v, str)]
        if name == "replace" and len(texts) == 2:
            if str(value).count(texts[0]) * len(texts[1]) > MOST_TEXT:
                self._too_large()
        elif name == "join" and isinstance(value, list):
            whole = sum(len(str(self._shallow(v))) for v in value)
            if whole + len(value) * sum(map(len, texts)) > MOST_TEXT:
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
                made = sizes[0] * sizes[1] if operator == "*" else sizes[0] + sizes[1]
                if made > MOST_TEXT:
                    self._too_large()
        return super().call_binop(context, operator, left, right)


SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


class Tokenizer:
    """A checkpoint's tokenizer and chat template, token ids in and out."""

    def __init__(
        self, core: tokenizers.Tokenizer, config: dict, template: str | None, source: str, stop_ids=()
    ):
        core.no_truncation()
        core.no_padding()
        self.core, self.config, self.template, self.source = core, config, template, source
        self.special = {name: self._text(config.get(name)) for name in SPECIAL_NAMES if config.get(name)}
        self.eos_id = core.token_to_id(self.special["eos_token"]) if "eos_token" in self.special else None
        pad = core.token_to_id(self.special["pad_token"]) if "pad_token" in self.special else None
        self.pad_id = next(
            (i for i in (pad, self.eos_id) if i is not None), 0
        )  # padding is never trained nor seen
        self.added = {token.content: i for i, token in core.get_added_tokens_decoder().items()}
        self.kwargs: dict = {}
        self._extra_stops = list(stop_ids)
        self._environment = _Sandbox()
        self._compiled: jinja2.Template | None = None
        self._turn_end: int | None = None
        self._headers: dict[str, str] = {}

    @staticmethod
    def _text(token: Any) -> Any:
        return token.get("content") if isinstance(token, dict) else token

    @staticmethod
    def load(directory: str | Path) -> "Tokenizer":
        """From a checkpoint's folder. Raises DataError where there is no tokenizer.json or it cannot be
        read."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.exists():
            hint = "only tokenizer.model is there; save it once with a fast tokenizer" if list(
                directory.glob("tokenizer.model")
            ) else "the checkpoint has no tokenizer"  # fmt: skip
            raise DataError(str(path), None, "is missing", hint)
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(str(path), None, f"cannot be read ({error})") from None

        def read(name: str) -> dict:
            file = directory / name
            if not file.exists():
                return {}
            try:
                value = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, OSError, RecursionError) as error:
                raise DataError(str(file), None, f"is not valid JSON ({error})") from None
            if not isinstance(value, dict):
                raise DataError(str(file), None, "must hold a JSON object")
            return value

        config = {**read("special_tokens_map.json"), **read("tokenizer_config.json")}
        template = config.pop("chat_template", None)
        if isinstance(template, list):  # several named templates
            named = {
                str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)
            }
            template = named.get("default") or next(iter(named.values()), None)
        if (directory / "chat_template.jinja").exists():
            template = read_text(directory / "chat_template.jinja")
        if template is not None and not isinstance(template, str):
            raise DataError(str(directory / "tokenizer_config.json"), None, "chat_template is not text")
        for name in SPECIAL_NAMES:
            if config.get(name) and not isinstance(Tokenizer._text(config[name]), str):
                raise DataError(str(directory / "tokenizer_config.json"), None, f"{name} is not text")
        stops = read("generation_config.json").get("eos_token_id") or read("config.json").get("eos_token_id")
        stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        if not all(type(stop) is int and 0 <= stop < 2**31 for stop in stops):
            raise DataError(
                str(directory / "generation_config.json"), None, "eos_token_id holds no token ids"
            )
        try:
            return Tokenizer(core, config, template, str(directory), stops)
        except UnicodeEncodeError as error:
            file = str(directory / "tokenizer_config.json")
            raise DataError(file, None, f"a special token is no text ({error})") from None

    @staticmethod
    def train(texts: Iterator[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE tokenizer with single digits and the ChatML template."""
        core = tokenizers.Tokenizer(tokenizers.models.BPE())
        core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(  # type: ignore[assignment]
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        core.decoder = tokenizers.decoders.ByteLevel()  # type: ignore[assignment]
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        core.train_from_iterator(texts, trainer)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
        }  # fmt: skip
        return Tokenizer(core, config, CHATML, "trained here")

    def configure(self, options: Any, directory: Path) -> "Tokenizer":
        """This tokenizer with the config's template, special tokens and further tokens."""
        unknown = set(options.special_tokens) - set(SPECIAL_NAMES)
        if unknown:
            raise ConfigError(
                "special_tokens", sorted(unknown)[0], f"is not one of {', '.join(SPECIAL_NAMES)}"
            )
        self.core.add_special_tokens(
            [t for t in options.special_tokens.values() if self.core.token_to_id(t) is None]
        )
        self.core.add_tokens([t for t in options.tokens if self.core.token_to_id(t) is None])
        template = self.template
        if options.chat_template == "chatml":
            template = CHATML
            self.core.add_special_tokens(
                [t for t in ("<|im_start|>", "<|im_end|>") if self.core.token_to_id(t) is None]
            )
        elif options.chat_template:
            path = Path(options.chat_template)
            template = read_text(
                path if path.is_absolute() or not (directory / path).exists() else directory / path
            )
        stops = self._extra_stops
        configured = Tokenizer(
            self.core, {**self.config, **options.special_tokens}, template, self.source, stops
        )
        configured.kwargs = dict(options.chat_template_kwargs)
        return configured

    def __len__(self) -> int:
        return self.core.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Highest id + 1: what an embedding needs."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: EOS, those of generation_config.json, and what closes the template's
        turns."""
        ids = {i for i in (self.eos_id, *self._extra_stops) if i is not None}
        if self.template:
            # A template that cannot render the probe ends its turns with one of the others.
            with contextlib.suppress(BadRow):
                ids.add(self.turn_end())
        return sorted(ids)

    def turn_end(self) -> int:
        """The special token that closes an assistant turn in the chat template. BadRow where there is
        none."""
        if self._turn_end is None:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            ids, labels = self.encode_chat(probe)
            self._turn_end = [token for token, label in zip(ids, labels, strict=True) if label != IGNORE][-1]
        return self._turn_end

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`; `special` lets the tokenizer add its own BOS."""
        try:
            return self.core.encode(text, add_special_tokens=special).ids
        except (TypeError, UnicodeEncodeError):  # what the library says of a lone surrogate
            raise BadRow("the text holds half a character (a lone surrogate)") from None

    def decode(self, ids: list[int], special: bool = False) -> str:
        return self.core.decode(ids, skip_special_tokens=not special)

    def save(self, directory: Path) -> None:
        """Write what transformers and vLLM need to read this tokenizer, its template and its stop tokens."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            source = Path(self.source) / name
            if source.exists():
                shutil.copyfile(source, directory / name)
        self.core.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(
            json.dumps(self.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if self.template:
            (directory / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        generation = Path(self.source) / "generation_config.json"
        values = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {}
        stops = self.stop_ids
        if stops:
            values["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        values.setdefault("pad_token_id", self.pad_id)
        (directory / "generation_config.json").write_text(
            json.dumps(values, indent=2) + "\n", encoding="utf-8"
        )

    # -- chat ------------------------------------------------------------------------------------------------
    # ---------

    def _render(self, messages: list[dict], tools: list | None, generation_prompt: bool, kwargs: dict) -> str:
        if self.template is None:
            raise BadRow("the tokenizer has no chat template; set chat_template: chatml or a .jinja file")
        try:
            if self._compiled is None:
                self._compiled = self._environment.template(self.template)
            self._environment.turns = 0
            return self._compiled.render(
                messages=messages, tools=tools or None, documents=None,
                add_generation_prompt=generation_prompt,
                **{**self.special, **self.kwargs, **kwargs},
            )  # fmt: skip
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template refuses it: {error.message or type(error).__name__}") from None
        except Exception as error:  # a template can divide by zero, recurse, …
            raise BadRow(f"the chat template fails on it: {type(error).__name__}: {error}") from None

    def render(
        self, messages: list[dict], tools: list | None = None, generation_prompt: bool = False, **kwargs
    ) -> str:
        """The conversation as text, as transformers' apply_chat_template renders it. Raises BadRow."""
        text = self._render(messages, tools, generation_prompt, kwargs)
        for mark in self._environment.marks:
            text = text.replace(mark, "")
        return text

    def encode_prompt(self, messages: list[dict], tools: list | None = None, **kwargs) -> list[int]:
        """Token ids up to where the assistant's answer begins."""
        return self.encode(self.render(messages, tools, generation_prompt=True, **kwargs))

    def encode_chat(
        self, messages: list[dict], tools: list | None = None, *, train_on_inputs: bool = False, **kwargs
    ) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of a conversation, labels −100 except on what the assistant wrote and its end
        of turn.

        The spans come from the template's `{% generation %}` blocks, or from `_assistant_spans`. Either way
        each end of a span is checked: the text before it, tokenised alone, must be exactly the first tokens
        of the whole. BadRow where that fails, for then no mask would be right.
        """
        marked = self._render(messages, tools, False, kwargs)
        begin, end = self._environment.marks
        text = marked.replace(begin, "").replace(end, "")
        ids = self.encode(text)
        if train_on_inputs:
            return ids, list(ids)
        assistant = [m for m in messages if m.get("role") == "assistant"]
        trained = [bool(m.get("train", True)) and m.get("weight", 1) != 0 for m in assistant]
        if begin in marked:
            spans, position = [], 0
            for piece in re.split(f"({re.escape(begin)}|{re.escape(end)})", marked):
                if piece == begin:
                    spans.append((position, position))
                elif piece == end:
                    spans[-1] = (spans[-1][0], position)
                else:
                    position += len(piece)
            if not all(trained) and len(spans) != len(trained):
                raise BadRow(
                    f"{len(trained)} assistant turns, {len(spans)} generation blocks: train/weight is unclear"
                )
            trained = trained if len(spans) == len(trained) else [True] * len(spans)
        else:
            spans = self._assistant_spans(messages, tools, text, kwargs)
        labels = [IGNORE] * len(ids)
        for (start, stop), train in zip(spans, trained, strict=True):
            stop = self._with_end_of_turn(text, start, stop)
            first = self._boundary(text, ids, start, "start", may_move=True)
            last = self._boundary(text, ids, stop, "end")
            if train:
                labels[first:last] = ids[first:last]
        return ids, labels

    def _assistant_spans(
        self, messages: list[dict], tools: list | None, text: str, kwargs: dict
    ) -> list[tuple[int, int]]:
        """Where each assistant turn's own text stands in the rendered conversation `text`.

        Each turn is rendered once more with its content replaced by a word that occurs nowhere else. What
        comes before the word and what comes after must then be the beginning and the end of `text`: that
        holds however a template trims, reorders or drops things, and also for consecutive assistant turns and
        for templates that drop the reasoning of earlier turns, where comparing shorter and longer
        conversations goes wrong. The answer begins where the generation prompt ends, if the template put one
        there (so reasoning before the content is trained too).
        """
        header = self._generation_prompt(tools, kwargs)
        word = "answer" + secrets.token_hex(8)
        spans, previous = [], 0
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            other = {
                k: v for k, v in message.items() if k not in ("reasoning_content", "tool_calls", "thinking")
            }
            probe = self.render(
                [*messages[:i], {**other, "content": word}, *messages[i + 1 :]], tools, **kwargs
            )
            if probe.count(word) != 1:
                raise BadRow(f"message {i}: the chat template shows it {probe.count(word)} times, not once")
            before, after = probe.split(word)
            start, end = len(before), len(text) - len(after)
            at = before.rfind(header, previous) if header else -1
            if at >= 0:
                start = at + len(header)
            if (
                not text.startswith(before[:start])
                or not text.endswith(after)
                or end < start
                or start < previous
            ):
                raise BadRow(
                    f"message {i}: cannot tell where this assistant turn begins and ends in the chat template"
                )
            spans.append((start, end))
            previous = end
        return spans

    def _generation_prompt(self, tools: list | None, kwargs: dict) -> str:
        """What the template writes before an answer, found by rendering a question with and without it."""
        key = json.dumps([tools, kwargs], sort_keys=True, default=str)
        if key not in self._headers:
            question = [{"role": "user", "content": "a"}]
            with_prompt = self.render(question, tools, True, **kwargs)
            without = self.render(question, tools, False, **kwargs)
            self._headers[key] = with_prompt.removeprefix(without) if with_prompt.startswith(without) else ""
        return self._headers[key]

    def _with_end_of_turn(self, text: str, start: int, end: int) -> int:
        """`end` moved past the special token that closes the turn: a model that never sees it trained never
        stops."""
        content = text[start:end].rstrip()
        if any(content.endswith(token) for token in self.added):
            return start + len(content)
        rest = text[end:]
        after = len(rest) - len(rest.lstrip())
        closing = max((t for t in self.added if rest.startswith(t, after)), key=len, default=None)
        if closing is None:
            raise BadRow(
                "an assistant turn is not closed by a special token in the chat template: it could never stop"
            )
        return end + after + len(closing)

    def _boundary(self, text: str, ids: list[int], at: int, what: str, may_move: bool = False) -> int:
        """The index of the token that begins at character `at` of `text`."""
        for place in (at, len(text[:at].rstrip())) if may_move else (at,):
            # Sentencepiece-like tokenizers glue a leading space to the answer's first word: then the answer
            # begins there.
            before = self.encode(text[:place])
            if ids[: len(before)] == before:
                return len(before)
        raise BadRow(
            f"a token reaches across the {what} of an assistant turn ({text[max(0, at - 10) : at + 10]!r})"
        )
