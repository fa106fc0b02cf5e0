"""Text to token ids: a checkpoint's tokenizer, its chat template in a sandbox, and which tokens of a
conversation the assistant wrote."""

import contextlib
import datetime
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers

from run.config import ConfigError, DataError
from text.probes import LAST_RESORT, REASONING, Part, lost_parts, probes
from text.special_tokens import SPECIAL_NAMES, add_tokens
from text.templates import CHATML, SHIPPED_TEMPLATES, BadRow, Sandbox

IGNORE = -100  # label of a token that is not trained


def _list(ids: Sequence[int] | np.ndarray) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # without the mark that Windows begins a file with
    except UnicodeDecodeError as error:
        raise DataError(str(path), None, f"is not UTF-8 text (byte {error.start})", "convert it") from None
    except OSError as error:
        raise DataError(str(path), None, f"cannot be read ({error.strerror})") from None


MORE_TEMPLATES = "additional_chat_templates"  # transformers' folder for named templates
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt",
    "tokenizer.model",
)


class Tokenizer:
    """A checkpoint's tokenizer and chat template, token ids in and out."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        config: dict,
        template: str | None,
        source: str,
        stop_ids=(),
        templates: dict[str, str] | None = None,
    ):
        core.no_truncation()
        core.no_padding()
        self.core, self.config, self.template, self.source = core, config, template, source
        self.special = {name: self._text(config.get(name)) for name in SPECIAL_NAMES if config.get(name)}
        self.eos_id = core.token_to_id(self.special["eos_token"]) if "eos_token" in self.special else None
        pad = core.token_to_id(self.special["pad_token"]) if "pad_token" in self.special else None
        # Padding is neither trained on nor attended to.
        self.pad_id = next((i for i in (pad, self.eos_id) if i is not None), 0)
        self.added = {token.content: i for i, token in core.get_added_tokens_decoder().items()}
        self.kwargs: dict = {}
        self._bos: list[int] | None = None  # what the tokenizer puts before a text
        self._prefixes: bool | None = None  # whether it puts a space before one
        self._extra_stops = list(stop_ids)
        self._environment = Sandbox()
        self.new_ids: list[int] = []  # tokens that the config adds
        self.untrained_ids: list[int] = []  # tokens whose row of the embedding is not and will not be trained
        self.templates = dict(templates or {})  # named templates besides the default, such as tool_use
        self._compiled: dict[str, jinja2.Template] = {}
        self._found: dict[str, str] = {}  # cache of values that all conversations of a template share

    @staticmethod
    def _text(token: Any) -> Any:
        return token.get("content") if isinstance(token, dict) else token

    @staticmethod
    def load(directory: str | Path) -> "Tokenizer":
        """Load from a checkpoint's folder. Raises DataError if tokenizer.json is missing or cannot be
        read."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.exists():
            names = ("tokenizer.model", "vocab.json", "vocab.txt")
            slow = [name for name in names if (directory / name).exists()]
            hint = f"only {slow[0]} is there; save it once with a fast tokenizer" if slow else ""
            hint = hint or "the checkpoint has no tokenizer"
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

        config = read("tokenizer_config.json")
        try:
            config = add_tokens(core, config, read("special_tokens_map.json"), read("added_tokens.json"))
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            file = str(directory / "tokenizer_config.json")
            raise DataError(file, None, f"lists added tokens that cannot be read ({error})") from None
        if config.get("split_special_tokens"):
            file = str(directory / "tokenizer_config.json")
            raise DataError(file, None, "split_special_tokens: true is not supported", "remove it")
        stored = json.loads(core.pre_tokenizer.__getstate__()) if core.pre_tokenizer else {}
        if {config.get("add_prefix_space"), stored.get("add_prefix_space")} == {True, False}:
            logging.getLogger("ballast").warning(
                "%s: add_prefix_space is %s in tokenizer_config.json and %s in tokenizer.json, which is "
                "followed", directory, config["add_prefix_space"], stored["add_prefix_space"],
            )
        template = config.pop("chat_template", None)
        named: dict[str, Any] = {"default": template} if template is not None else {}
        if isinstance(template, list):  # several named templates
            named = {
                str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)
            }
        files = {file.stem: file for file in sorted((directory / MORE_TEMPLATES).glob("*.jinja"))}
        if (directory / "chat_template.jinja").exists():
            files["default"] = directory / "chat_template.jinja"
        if files:  # they win over tokenizer_config.json, as in transformers
            named = {name: read_text(file) for name, file in files.items()}
        if not all(isinstance(text, str) for text in named.values()):
            raise DataError(str(directory / "tokenizer_config.json"), None, "chat_template is not text")
        template = named.pop("default", None)
        for name in SPECIAL_NAMES:
            if config.get(name) and not isinstance(Tokenizer._text(config[name]), str):
                raise DataError(str(directory / "tokenizer_config.json"), None, f"{name} is not text")
        stops = read("generation_config.json").get("eos_token_id") or read("config.json").get("eos_token_id")
        if not isinstance(stops, list):
            stops = [] if stops is None else [stops]
        if not all(type(stop) is int and 0 <= stop < 2**31 for stop in stops):
            raise DataError(
                str(directory / "generation_config.json"), None, "eos_token_id holds no token ids"
            )
        try:
            return Tokenizer(core, config, template, str(directory), stops, named)
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
        )
        core.train_from_iterator(texts, trainer)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
        }
        return Tokenizer(core, config, CHATML, "trained here")

    def configure(self, options: Any, directory: Path) -> "Tokenizer":
        """This tokenizer with the config's template, special tokens and further tokens."""
        unknown = set(options.special_tokens) - set(SPECIAL_NAMES)
        if unknown:
            raise ConfigError(
                "special_tokens", sorted(unknown)[0], f"is not one of {', '.join(SPECIAL_NAMES)}"
            )
        known = self.core.get_vocab(with_added_tokens=True)
        self.core.add_special_tokens(
            [t for t in options.special_tokens.values() if self.core.token_to_id(t) is None]
        )
        self.core.add_tokens([t for t in options.tokens if self.core.token_to_id(t) is None])
        template, named = self.template, self.templates
        if options.chat_template in self.templates:
            template, named = self.templates[options.chat_template], {}
        elif options.chat_template in SHIPPED_TEMPLATES:
            (template, needed), named = SHIPPED_TEMPLATES[options.chat_template], {}
            self.core.add_special_tokens([t for t in needed if self.core.token_to_id(t) is None])
        elif options.chat_template and re.search(r"\{[{%]", options.chat_template):  # the template itself
            template, named = options.chat_template, {}
        elif options.chat_template:
            path = Path(options.chat_template)
            path = path if path.is_absolute() or not (directory / path).exists() else directory / path
            if not path.exists():
                known = [*SHIPPED_TEMPLATES, *self.templates, "a .jinja file", "the template itself"]
                raise ConfigError(
                    "chat_template", options.chat_template,
                    f"is no file (looked in {directory} and here); give {', '.join(known)}",
                )
            template, named = read_text(path), {}
        stops = self._extra_stops
        configured = Tokenizer(
            self.core, {**self.config, **options.special_tokens}, template, self.source, stops, named
        )
        configured.kwargs = dict(options.chat_template_kwargs)
        vocabulary = self.core.get_vocab(with_added_tokens=True)
        configured.new_ids = sorted(i for token, i in vocabulary.items() if token not in known)
        return configured

    def pin_date(self, date: datetime.datetime) -> None:
        """Let a chat template that writes today's date write this one: a run may last longer than a day."""
        self._environment.date = date

    @property
    def date(self) -> str:
        """The pinned day as YYYY-MM-DD; "" if none is pinned or no chat template writes it."""
        pinned = self._environment.date
        writes = any("strftime_now" in source for source in (self.template or "", *self.templates.values()))
        return pinned.date().isoformat() if pinned and writes else ""

    def __len__(self) -> int:
        return self.core.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Highest id + 1: the rows that an embedding needs."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: EOS, those of generation_config.json, and what closes the template's
        turns."""
        ids = {i for i in (self.eos_id, *self._extra_stops) if i is not None}
        if self.template:
            # If the template closes turns without a special token, the others must end them.
            with contextlib.suppress(BadRow):
                ids.add(self.turn_end())
        return sorted(ids)

    def turn_end(self) -> int:
        """The special token that closes an assistant turn in the chat template (the first, if several).
        Raises BadRow if there is none."""
        closing = self._usual_closing(None, {}).lstrip()
        token = max((token for token in self.added if closing.startswith(token)), key=len, default=None)
        if token is None:
            raise BadRow("the chat template closes an answer with no special token: a model could never stop")
        return self.added[token]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, and nothing that the tokenizer adds at its ends."""
        try:
            return self.core.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # what the library says of a lone surrogate
            raise BadRow("the text holds half a character (a lone surrogate)") from None

    def encode_start(self, text: str) -> list[int]:
        """Token ids of the beginning of a row: after the BOS that the tokenizer adds to a text, once, and
        without the EOS that some tokenizers add too, since the row continues."""
        ids = self.encode(text)
        if self._bos is None:
            sample = self.encode("a")
            whole = self.core.encode("a", add_special_tokens=True).ids
            extra = range(len(whole) - len(sample) + 1)
            self._bos = next((whole[:k] for k in extra if whole[k : k + len(sample)] == sample), [])
        return ids if self._bos and ids[: len(self._bos)] == self._bos else self._bos + ids

    def encode_rest(self, text: str) -> list[int]:
        """Token ids of a text that continues a row: without the space that some tokenizers put before a
        text (Llama 2's normaliser, Metaspace, ByteLevel with add_prefix_space)."""
        if self._prefixes is None:
            self._prefixes = self._after("\n", "a") not in (None, self.encode("a"))
        if not self._prefixes:
            return self.encode(text)
        continued = (self._after(before, text) for before in ("\n", "a", ":", "。"))
        return next((ids for ids in continued if ids is not None), self.encode(text))

    def _after(self, before: str, text: str) -> list[int] | None:
        """The tokens of `text` behind `before`, where no token spans the two."""
        head, both = self.encode(before), self.encode(before + text)
        return both[len(head) :] if both[: len(head)] == head else None

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        return self.core.decode(_list(ids), skip_special_tokens=not special)

    def decode_all(self, rows: Sequence[Sequence[int] | np.ndarray], special: bool = False) -> list[str]:
        """The texts of several rows of token ids, decoded on all cores."""
        return self.core.decode_batch([_list(row) for row in rows], skip_special_tokens=not special)

    def save(self, directory: Path) -> None:
        """Write what transformers and vLLM need to read this tokenizer, its template and its stop tokens."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            source = Path(self.source) / name
            if source.exists():
                shutil.copyfile(source, directory / name)
        self.core.save(str(directory / "tokenizer.json"))
        config = dict(self.config)
        if "added_tokens_decoder" in config:
            added = self.core.get_added_tokens_decoder().items()
            config["added_tokens_decoder"] = {str(i): token.__getstate__() for i, token in added}
        (directory / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if self.template:
            (directory / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        for name, template in self.templates.items():
            if Path(name).name != name:
                raise DataError(
                    self.source, None, f"a chat template is named {name!r}, which is no file name"
                )
            (directory / MORE_TEMPLATES).mkdir(exist_ok=True)
            (directory / MORE_TEMPLATES / f"{name}.jinja").write_text(template, encoding="utf-8")
        generation = Path(self.source) / "generation_config.json"
        values = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {}
        stops = self.stop_ids
        if stops:
            values["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        values.setdefault("pad_token_id", self.pad_id)
        (directory / "generation_config.json").write_text(
            json.dumps(values, indent=2) + "\n", encoding="utf-8"
        )

    # --------------------------------------------------------------------------------------------------------
    # Conversations
    # --------------------------------------------------------------------------------------------------------

    def _render(self, messages: list[dict], tools: list | None, generation_prompt: bool, kwargs: dict) -> str:
        source = self._template_for(tools)
        try:
            if source not in self._compiled:
                self._compiled[source] = self._environment.template(source)
            self._environment.turns = 0
            return self._compiled[source].render(
                messages=[_as_templates_read(message) for message in messages], tools=tools or None,
                documents=None, add_generation_prompt=generation_prompt,
                **{**self.special, **self.kwargs, **kwargs},
            )
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template refuses it: {error.message or type(error).__name__}") from None
        except Exception as error:  # a template can divide by zero, recurse, …
            raise BadRow(f"the chat template fails on it: {type(error).__name__}: {error}") from None

    def _template_for(self, tools: list | None) -> str:
        """The template to use; as in transformers, `tool_use` for conversations with tools if it exists."""
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if self.template is None and self.templates:
            raise BadRow(
                f"the tokenizer has no default chat template; set chat_template to one of "
                f"{', '.join(sorted(self.templates))}"
            )
        if self.template is None:
            raise BadRow("the tokenizer has no chat template; set chat_template: chatml or a .jinja file")
        return self.template

    def render(
        self, messages: list[dict], tools: list | None = None, generation_prompt: bool = False, **kwargs
    ) -> str:
        """The conversation as text, as transformers' apply_chat_template renders it. Raises BadRow."""
        text = self._render(messages, tools, generation_prompt, kwargs)
        for mark in self._environment.marks:
            text = text.replace(mark, "")
        return text

    def with_readable_parts(self, messages: list[dict], tools: list | None = None, **kwargs) -> list[dict]:
        """The messages, with lists of text parts joined if the template cannot read lists (it fails on them,
        or prints them as Python lists)."""
        lists = [message["content"] for message in messages if isinstance(message.get("content"), list)]
        if not lists:
            return messages
        try:
            text = self.render(messages, tools, **kwargs)
            if not any(str(content) in text for content in lists):
                return messages
        except BadRow:  # any cause other than the list is raised again later
            pass
        return [
            {**m, "content": "".join(part["text"] for part in m["content"])}
            if isinstance(m.get("content"), list)
            else m
            for m in messages
        ]

    def encode_prompt(self, messages: list[dict], tools: list | None = None, **kwargs) -> list[int]:
        """Token ids up to where the assistant's answer begins."""
        return self.encode(self.render(messages, tools, generation_prompt=True, **kwargs))

    def encode_chat(
        self, messages: list[dict], tools: list | None = None, *, train_on_inputs: bool = False, **kwargs
    ) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of `encode_conversation`."""
        chat = self.encode_conversation(messages, tools, train_on_inputs=train_on_inputs, **kwargs)
        return chat.input_ids, chat.labels

    def encode_conversation(
        self, messages: list[dict], tools: list | None = None, *, train_on_inputs: bool = False, **kwargs
    ) -> "Conversation":
        """Token ids of a conversation, labels −100 except on what the assistant wrote and its end of turn.

        The spans are exactly the template's `{% generation %}` blocks if it has them; otherwise those of
        `_assistant_spans`, with the tokens that close a turn. Both ends of a span are checked: the text
        before them, tokenised alone, must give exactly the first tokens of the whole. Raises BadRow
        otherwise, as no mask would be right.
        """
        marked = self._render(messages, tools, False, kwargs)
        begin, end = self._environment.marks
        text = marked.replace(begin, "").replace(end, "")
        ids = self.encode(text)
        chat = Conversation(ids, list(ids))
        if train_on_inputs:
            return chat
        assistant = [m for m in messages if m.get("role") == "assistant"]
        trained = [bool(m.get("train", True)) and m.get("weight", 1) != 0 for m in assistant]
        if begin in marked:
            spans = self._generation_spans(marked)
            if not all(trained) and len(spans) != len(trained):
                raise BadRow(
                    f"{len(trained)} assistant turns, {len(spans)} generation blocks: train/weight is unclear"
                )
            trained = trained if len(spans) == len(trained) else [True] * len(spans)
        else:
            spans = self._assistant_spans(messages, tools, text, kwargs)
        if len(spans) == len(assistant):
            chat.lost = [
                lost
                for m, span in zip(assistant, spans, strict=True)
                for lost in lost_parts(m, text[slice(*span)])
            ]
        chat.labels = [IGNORE] * len(ids)
        for (start, stop), train in zip(spans, trained, strict=True):
            if not train or start == stop:
                continue
            first = self._boundary(text, ids, start, "start", may_move=begin not in marked)
            last = self._boundary(text, ids, stop, "end")
            chat.labels[first:last] = ids[first:last]
        return chat

    def _generation_spans(self, marked: str) -> list[tuple[int, int]]:
        begin, end = self._environment.marks
        spans, position = [], 0
        for piece in re.split(f"({re.escape(begin)}|{re.escape(end)})", marked):
            if piece == begin:
                spans.append((position, position))
            elif piece == end:
                spans[-1] = (spans[-1][0], position)
            else:
                position += len(piece)
        return spans

    def _assistant_spans(
        self, messages: list[dict], tools: list | None, text: str, kwargs: dict
    ) -> list[tuple[int, int]]:
        """The span of each assistant turn in the rendered conversation `text`, with the tokens that end it.

        Each turn is rendered again with one part (its content, or the last argument of its last tool call)
        replaced by a unique word. The text before and after the turn must then be the beginning and the end
        of `text`. This holds however a template trims, reorders or drops text, also for consecutive assistant
        turns and for templates that drop the reasoning of earlier turns, where comparing shorter and longer
        conversations fails.
        """
        spans, previous = [], 0
        for i, message in enumerate(messages):
            if message.get("role") == "assistant":
                spans.append(self._assistant_span(messages, i, tools, text, previous, kwargs))
                previous = spans[-1][1]
        return spans

    def _assistant_span(
        self, messages: list[dict], i: int, tools: list | None, text: str, previous: int, kwargs: dict
    ) -> tuple[int, int]:
        """The span of the assistant turn `messages[i]`, which begins at `previous` or later."""
        shown, problems = self._shown_parts(messages, i, tools, previous, kwargs)
        if not shown:
            about_content = [problem for problem in problems if "its content" in problem]
            raise BadRow(f"message {i}: {[*about_content, *problems][0]}")
        first, last = (
            min(shown, key=lambda part: len(part.before)),
            min(shown, key=lambda part: len(part.after)),
        )
        start = self._turn_start(messages, i, tools, text, previous, kwargs, first)
        closed = self._closing(messages, i, last, tools, kwargs)
        if start is not None and closed is None:
            # The template does not close turns: only a stop token at the end of the content can end this one.
            content = text[start : max(start, len(text) - len(last.after))].rstrip()
            if text.endswith(last.after) and content.endswith(tuple(self._end_tokens(tools, kwargs)) or "\0"):
                return start, start + len(content)
            raise BadRow(
                f"message {i}: an assistant turn is not closed by a special token in the chat template: the "
                "model could never stop"
            )
        end = len(text) - len(last.after) + closed if closed is not None else -1
        if start is None or end < start or not text.endswith(last.after[closed:]):
            raise BadRow(
                f"message {i}: cannot tell where this assistant turn begins and ends in the chat template"
            )
        if first is not last and self._begins_before(messages, i + 1, tools, kwargs, len(text) - end):
            raise BadRow(
                f"message {i}: the chat template writes message {i + 1} into the middle of this turn"
            )
        return start, end

    def _shown_parts(
        self, messages: list[dict], i: int, tools: list | None, previous: int, kwargs: dict
    ) -> tuple[list["Part"], list[str]]:
        """The parts of turn i that the template shows, located by putting a unique word in place of each; and
        why others were not found."""
        word, shown, problems = "answer" + secrets.token_hex(8), [], []
        header = self._generation_prompt(tools, kwargs)
        for path, probe in probes(messages[i], word):
            before = shown[0].before if shown else ""
            if path == LAST_RESORT and shown:
                break
            if path == "call's name" and shown and shown[-1].place == "call's arguments":
                continue  # one of the two is enough to find the call
            if path in ("reasoning", "<think> block") and header and before.count(header, previous) == 1:
                continue  # the turn begins after the header, whichever part comes first
            try:
                text = self.render([*messages[:i], probe, *messages[i + 1 :]], tools, **kwargs)
            except BadRow as error:
                problems.append(
                    f"to find where this assistant turn begins and ends its {path} was replaced by a word, "
                    f"and {error}; use a template that marks turns with {{% generation %}} (chat_template), "
                    "or leave the row out"
                )
                continue
            if text.count(word) == 1:
                before, after = text.split(word)
                shown.append(Part(path, probe, word, before, after))
            else:
                problems.append(f"the chat template shows its {path} {text.count(word)} times, not once")
        return shown, problems

    def _begins_before(
        self, messages: list[dict], i: int, tools: list | None, kwargs: dict, left: int
    ) -> bool:
        """Whether the template shows message i before the last `left` characters of the conversation."""
        if i >= len(messages) or messages[i].get("role") == "assistant":
            return False
        word = "answer" + secrets.token_hex(8)
        with contextlib.suppress(BadRow):
            changed = [*messages[:i], {**messages[i], "content": word}, *messages[i + 1 :]]
            _, between, after = self.render(changed, tools, **kwargs).partition(word)
            return bool(between) and len(after) > left
        return False

    def _turn_start(
        self, messages: list[dict], i: int, tools: list | None, text: str, previous: int, kwargs: dict,
        part: "Part",
    ) -> int | None:
        """The position where the model begins to write turn i: after the generation prompt, if the template
        has one there (so that reasoning or a call's brackets before the content are trained too)."""
        header, before = self._generation_prompt(tools, kwargs), part.before
        at = before.rfind(header, previous) if header else -1
        if at >= 0 and before.count(header, previous) == 1 and text.startswith(before[: at + len(header)]):
            return at + len(header)
        if header:  # without one the prompt ends before the turn's own header
            with contextlib.suppress(BadRow):  # not every template renders a part of a conversation
                prompt = self.render(messages[:i], tools, True, **kwargs)
                start = len(_common_beginning(text, prompt))
                if start >= previous and not prompt[start:].strip():
                    return start
        if at >= 0 and text.startswith(before[: at + len(header)]):
            return at + len(header)
        calls = part.place.startswith("call")
        if calls:  # the call's brackets precede the word: an answer would begin before them
            with contextlib.suppress(BadRow):
                answer = {"role": "assistant", "content": part.word}
                before = self.render([*messages[:i], answer], tools, **kwargs).partition(part.word)[0]
        start = len(_common_beginning(text, before))
        if start >= previous and not before[start:].strip():
            return start
        return self._end_of_question(messages, i, tools, text, kwargs, previous) if calls else None

    def _end_of_question(
        self, messages: list[dict], i: int, tools: list | None, text: str, kwargs: dict, previous: int
    ) -> int | None:
        """The end in `text` of the generation prompt that follows message i − 1: for templates that move
        other parts, such as the list of tools, when the conversation continues."""
        if not i or not isinstance(messages[i - 1].get("content"), str):
            return None
        word = "answer" + secrets.token_hex(8)
        asked = [*messages[: i - 1], {**messages[i - 1], "content": word}]
        with contextlib.suppress(BadRow):
            _, _, after = self.render([*asked, *messages[i:]], tools, **kwargs).partition(word)
            _, _, closing = self.render(asked, tools, True, **kwargs).partition(word)
            same = _common_beginning(after, closing)
            start = len(text) - len(after) + len(same)
            if same.endswith(tuple(self.added) or "\0") and text.endswith(after) and start >= previous:
                return start
        return None

    def _closing(
        self, messages: list[dict], i: int, part: "Part", tools: list | None, kwargs: dict
    ) -> int | None:
        """The length of the text after the last part of turn i, up to the end of the token that closes the
        turn.

        The template also writes this text, of any length, at the end of a conversation that ends with this
        turn; what follows belongs to the next turn. A token at the end of the content closes nothing.
        """
        after, calls = part.after, bool(part.probe.get("tool_calls"))
        usual = self._usual_closing(tools, kwargs)
        if not calls and usual and after.startswith(usual):
            return len(usual)
        ending = after if i + 1 == len(messages) else ""
        if not ending:
            with contextlib.suppress(BadRow):
                ending = self.render([*messages[:i], part.probe], tools, **kwargs).partition(part.word)[2]
        same = _common_beginning(after, ending).rstrip()
        # Where answers are not closed, the last token of a call closes its brackets, not the turn
        closers = tuple(self._end_tokens(tools, kwargs) if calls and not usual else self.added)
        if same.endswith(closers or "\0"):
            return len(same)
        if calls:  # the calls come in between
            ends = [after.find(t) + len(t) for t in self._end_tokens(tools, kwargs) if t in after]
            return min(ends, default=None)
        rest = after.lstrip()
        closing = max((token for token in self.added if rest.startswith(token)), key=len, default=None)
        return None if closing is None else len(after) - len(rest) + len(closing)

    def _end_tokens(self, tools: list | None, kwargs: dict) -> list[str]:
        """The texts of the tokens that end an answer."""
        ids = {self.eos_id, *self._extra_stops}
        usual = self._usual_closing(tools, kwargs)
        return [
            token for token, i in self.added.items() if i in ids or usual.startswith(token) or token == usual
        ]

    def _generation_prompt(self, tools: list | None, kwargs: dict) -> str:
        """The template's generation prompt, found by rendering a question with and without it."""
        question = [{"role": "user", "content": "a"}]

        def find() -> str:
            with_prompt = self.render(question, tools, True, **kwargs)
            without = self.render(question, tools, False, **kwargs)
            return with_prompt.removeprefix(without) if with_prompt.startswith(without) else ""

        return self._once("prompt", tools, kwargs, find)

    def _usual_closing(self, tools: list | None, kwargs: dict) -> str:
        """What the template writes after an answer, up to its last special token; "" where it writes none."""

        def find() -> str:
            word = "answer" + secrets.token_hex(8)
            chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": word}]
            closing = self.render(chat, tools, **kwargs).partition(word)[2].rstrip()
            return closing if closing.endswith(tuple(self.added) or "\0") else ""

        return self._once("closing", tools, kwargs, find)

    def _once(self, what: str, tools: list | None, kwargs: dict, find: Callable[[], str]) -> str:
        """`find()`, cached; "" if the template refuses the conversation."""
        key = what + json.dumps([tools, kwargs], sort_keys=True, default=str)
        if key not in self._found:
            self._found[key] = ""
            with contextlib.suppress(BadRow):
                self._found[key] = find()
        return self._found[key]

    def _boundary(self, text: str, ids: list[int], at: int, what: str, may_move: bool = False) -> int:
        """The index of the token that begins at character `at` of `text`."""
        for candidate in (at, len(text[:at].rstrip())) if may_move else (at,):
            # Sentencepiece-like tokenizers glue a leading space to the answer's first word: then the answer
            # begins there.
            before = self.encode(text[:candidate])
            if ids[: len(before)] == before:
                return len(before)
        raise BadRow(
            f"a token reaches across the {what} of an assistant turn ({text[max(0, at - 10) : at + 10]!r})"
        )


@dataclass
class Conversation:
    """An encoded conversation."""

    input_ids: list[int]
    labels: list[int]
    lost: list[str] = field(default_factory=list)  # parts of the row that the template does not show


def _common_beginning(a: str, b: str) -> str:
    return os.path.commonprefix([a, b])  # noqa: RUF071 - works on any two texts, despite its name


def _as_templates_read(message: dict) -> dict:
    """A message as transformers hands it to a template: without nulls, and with reasoning under the names
    that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return (
        message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
    )
