"""Turns rows into token ids and labels, or into prompts; and shows what training would see of them.

    python data.py inspect --config x.yaml           show what training would see, name its faults
    python data.py inspect --config x.yaml --json    one object per row: input_ids, labels (−100: not trained)

A row is encoded once, by the same code for training and for `inspect`. What cannot be encoded with certainty
(a chat whose assistant turns cannot be told apart, token by token, from the rest) is refused with its file
and line.
"""

import hashlib
import importlib
import itertools
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import getfile
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from run.config import ConfigError, DataError, check_at_least_one, import_attribute, run_command
from run.log import log
from run.terminal import is_terminal, make_printable
from text.conversations import (
    as_ours,
    chat_of,
    check_messages,
    cleaned,
    instruct_prompt,
    need_text,
    readable,
    refuse_other_data,
    renamed,
    text_of,
    with_system,
    without_thinking,
)
from text.packing import Dataset, Encoded, settle
from text.prompt import Prompt
from text.rows import HELD_OUT, Row, locate, read_rows
from text.templates import BadRow
from text.tokenizer import IGNORE, Tokenizer


@dataclass
class DataOptions:
    datasets: list[dict] = field(default_factory=list)
    """What to train on: a list of {path, name, type, weight, split, columns, system}. path: a file or
    directory (JSONL, JSON, Parquet, text), hf://datasets/owner/name, or reasoning-gym:TASK with {size, seed,
    params}. name: a subset of it. type: chat, instruct, prompt_completion, text, tokens, or your own
    module.function(row); unset: inferred from the columns of the first row. weight: times a row is seen per
    epoch. split: train, test[:100], train[10%:]. columns: {our name: the file's name}, for messages
    {messages.role: the file's name}. system: a system message for rows that have none."""
    test_datasets: list[dict] = field(default_factory=list)
    """Held-out data in the same form; instead of val_set_size."""
    val_set_size: int | float = 0
    """Rows to hold out of `datasets` for evaluation: a count, or a fraction below 1 (0.05)."""
    strip_thinking: bool = False
    """Take reasoning traces (<think>…</think>, reasoning_content) out of the answers."""
    chat_template: str | None = None
    """Instead of the tokenizer's default: one of its named templates, a .jinja file, the template itself, or
    chatml, llama3, gemma or phi_3."""
    chat_template_kwargs: dict = field(default_factory=dict)
    """More variables for the chat template, e.g. {enable_thinking: false}."""
    special_tokens: dict[str, str] = field(default_factory=dict)
    """Set the tokenizer's special tokens, e.g. {pad_token: "<|endoftext|>"}; unknown ones are added."""
    tokens: list[str] = field(default_factory=list)
    """More tokens for the tokenizer; the embedding grows to fit. With an adapter, new rows are trained."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at the first row that cannot be used, or skip such rows, count and list them."""
    config_directory: str = field(default=".", init=False)  # folder of the YAML file, base of relative paths

    def check(self) -> None:
        if not self.datasets and not getattr(self, "replay_path", None):
            raise ConfigError("datasets", None, "must name at least one data set: [{path: …, type: chat}]")
        size = self.val_set_size
        if size < 0 or not math.isfinite(size) or (size > 1 and size != int(size)):
            raise ConfigError("val_set_size", size, "must be a count, or a fraction between 0 and 1")
        if size and self.test_datasets:
            raise ConfigError("test_datasets", None, "contradicts val_set_size; keep one of the two")
        for key in ("eval_steps", "evals_per_epoch", "eval_answers"):
            if getattr(self, key, None) and not (size or self.test_datasets):
                problem = "needs held-out data: set val_set_size or test_datasets"
                raise ConfigError(key, getattr(self, key), problem)
        for spec in self.test_datasets:
            spec.setdefault("split", HELD_OUT)
        weights = [spec.get("weight", 1.0) for spec in (*self.datasets, *self.test_datasets)]
        for weight in weights:
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not 0 <= weight < math.inf:
                raise ConfigError("datasets", weight, "weight must be a number of at least 0")
        if weights and not any(spec.get("weight", 1.0) for spec in self.datasets) and self.datasets:
            raise ConfigError("datasets", None, "every weight is 0: nothing would be trained")


@dataclass
class EncodingOptions:
    """For recipes that train on the tokens of the rows."""

    sequence_len: int = 2048
    """Longest row, in tokens; packed rows are filled up to it."""
    excess_length_strategy: Literal["drop", "truncate", "error"] = "drop"
    """Rows longer than sequence_len: leave out and count, cut the end off, or stop. Plain text is always cut
    in pieces."""
    train_on_inputs: bool = False
    """Train on every token, prompts too."""
    dataset_prepared_path: str | None = None
    """Where encoded data is kept between runs; default: output_dir/prepared."""

    def check(self) -> None:
        check_at_least_one(self, "sequence_len")


@dataclass
class ScratchOptions:
    """For training from scratch."""

    random_init: bool = False
    """Start from random weights (seeded by `seed`) in the shape that base_model's config.json describes."""
    tokenizer_vocab_size: int | None = None
    """With random_init: train a byte-level BPE tokenizer of this size on the training rows, once, instead of
    loading one."""

    def check(self) -> None:
        check_at_least_one(self, "tokenizer_vocab_size")
        if self.tokenizer_vocab_size is not None and not self.random_init:
            raise ConfigError("tokenizer_vocab_size", self.tokenizer_vocab_size, "needs random_init: true")
        if self.random_init and getattr(self, "adapter", None):
            problem = "makes no sense on random weights; drop one of the two"
            raise ConfigError("adapter", self.adapter, problem)  # type: ignore[attr-defined]


@dataclass
class RowOptions(DataOptions, EncodingOptions):
    """The options of `encode_dataset` and `prepare`."""


# ------------------------------------------------------------------------------------------------------------
# Rows to token ids and labels
# ------------------------------------------------------------------------------------------------------------

# The columns that each type reads; others are named once (Dataset.counts)
READS = {
    "chat": {"messages", "conversations", "system", "tools", "chat_template_kwargs"},
    "instruct": {"instruction", "input", "output", "system"},
    "prompt_completion": {"prompt", "completion", "system", "tools", "chat_template_kwargs"},
    "text": {"text"}, "tokens": {"input_ids", "labels"},
}


# Columns from which a type is inferred if the config names none; the first match decides
SHAPES = (
    ("chat", ("messages",)), ("chat", ("conversations",)), ("prompt_completion", ("prompt", "completion")),
    ("instruct", ("instruction", "output")), ("tokens", ("input_ids",)), ("text", ("text",)),
)


def settle_type(spec: dict, directory: Path, prompts: bool = False) -> str:
    """The type of a data set; if the config leaves it open, it is inferred from the columns of the first row
    and stored in `spec`. `prompts`: only types that have a prompt. Raises ConfigError if none fits."""
    if spec.get("type") is None:
        rows = itertools.islice(read_rows(spec, directory), 100)
        first = next(rows, None)
        row = next((row for row in itertools.chain([first], rows) if isinstance(row, Row)), None)
        if row is None and isinstance(first, DataError):
            raise first
        if row is None:
            raise ConfigError("datasets", spec["path"], "has no rows")
        held = renamed(row.value, spec.get("columns") or {}) if row is not None else {}
        shapes = (*SHAPES[:4], ("chat", ("prompt",))) if prompts else SHAPES
        spec["type"] = next((k for k, names in shapes if all(held.get(n) is not None for n in names)), None)
        chats = [held.get(name) for name in ("messages", "conversations")]
        if spec["type"] == "chat" and isinstance(held.get("prompt"), str) and not any(chats):
            spec["type"] = "prompt_completion"
        if spec["type"] is None:
            known = "chat, instruct, prompt_completion, text, tokens or your module.function"
            problem = (
                f"its columns ({', '.join(sorted(held)) or 'none'}) do not show a type; set type: {known}"
            )
            raise ConfigError("datasets", spec["path"], problem)
    kind = spec["type"]
    if not isinstance(kind, str) or (prompts and kind in ("text", "tokens")):
        known = ["chat", "instruct", "prompt_completion", *([] if prompts else ["text", "tokens"])]
        what = "a type with prompts: " if prompts else "a type: "
        problem = f"needs {what}{', '.join(known)} or your module.function"
        raise ConfigError("datasets", spec.get("path"), problem)
    return kind


class Encoder:
    """A row of one dataset as (input_ids, labels). `encode` raises BadRow."""

    def __init__(
        self,
        kind: str,
        tokenizer: Tokenizer,
        options: RowOptions,
        directory: Path,
        columns: dict | None = None,
        system: str | None = None,
    ):
        self.system = system
        self.tokenizer, self.options, self.columns = tokenizer, options, columns or {}
        self.kind, self.function = kind, None
        self.form = kind  # of the last encoded row: the type, or what the user's function returned
        self.lost: list[str] = []  # parts of the last encoded row that the chat template does not show
        if kind not in ("chat", "instruct", "prompt_completion", "text", "tokens"):
            self.function = _import_function(kind, directory)

    def encode(self, row: dict) -> tuple[list[int], list[int]] | None:
        kind, self.lost = self.kind, []
        row = as_ours(row, self.columns)
        if self.function is not None:
            try:
                returned = self.function(row)
            except Exception as error:  # user code may raise anything; the row is named by the caller
                raise BadRow(f"{kind} raised {type(error).__name__}: {error}") from error
            if returned is None:
                return None
            shapes = [("chat", "messages"), ("tokens", "input_ids"), ("prompt_completion", "completion"),
                      ("instruct", "output"), ("text", "text")]
            columns = returned if isinstance(returned, dict) else {}
            kind = next((k for k, column in shapes if column in columns), None)
            if kind is None:
                raise BadRow(
                    f"{self.kind} must return a dict with messages, completion, output, text or input_ids"
                )
            row = cleaned(returned)
        else:
            refuse_other_data(row, self.columns)
        self.form = kind
        with readable(kind):
            row = with_system(row, self.system)
            if self.options.strip_thinking:
                row = without_thinking(row)
            return getattr(self, "_" + kind)(row)

    def unread(self, row: dict) -> list[str]:
        """Non-empty columns of the row that this type does not read."""
        if self.function is not None:
            return []
        known = READS[self.kind] | set(self.columns.values())
        prompt = row.get(self.columns.get("prompt", "prompt"))
        if self.kind == "prompt_completion" and isinstance(prompt, str):  # plain text has no place for these
            known -= {"system", "tools", "chat_template_kwargs"}
        return [name for name, value in row.items() if name not in known and value not in (None, "", [], {})]

    def _masked(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        ids = prompt + answer
        return ids, list(ids) if self.options.train_on_inputs else [IGNORE] * len(prompt) + answer

    def _ended(self, ids: list[int]) -> list[int]:
        """With EOS behind it, once."""
        eos = self.tokenizer.eos_id
        if eos is None:
            raise BadRow("the tokenizer has no EOS token; set special_tokens: {eos_token: …}")
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def _chat(self, row: dict) -> tuple[list[int], list[int]]:
        messages, tools, kwargs = chat_of(row, self.tokenizer)
        chat = self.tokenizer.encode_conversation(
            messages, tools, train_on_inputs=self.options.train_on_inputs, **kwargs
        )
        self.lost = chat.lost
        return chat.input_ids, chat.labels

    def _instruct(self, row: dict) -> tuple[list[int], list[int]]:
        prompt, output = instruct_prompt(row, self.tokenizer), need_text(row, "output")
        if not output.strip():
            raise BadRow("the answer is empty (column 'output')")
        if isinstance(prompt, list):
            return self._chat({"messages": [*prompt, {"role": "assistant", "content": output}]})
        return self._prompt_completion({"prompt": prompt, "completion": output})

    def _prompt_completion(self, row: dict) -> tuple[list[int], list[int]]:
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            prompt, completion = check_messages(prompt, need_answer=False), check_messages(completion)
            unmarked = [
                {**message, "train": False} if message["role"] == "assistant" else message
                for message in prompt
            ]
            return self._chat({**row, "messages": [*unmarked, *completion]})
        # Tokenised separately, as a model reads the prompt before it writes: no token can span both.
        prompt = need_text(row, "prompt", "")
        completion = need_text(row, "completion")
        if not completion.strip():
            raise BadRow("the answer is empty (column 'completion')")
        answer = self._ended(self.tokenizer.encode_rest(completion))
        return self._masked(self.tokenizer.encode_start(prompt), answer)

    def _text(self, row: dict) -> tuple[list[int], list[int]]:
        text = need_text(row, "text")
        if not text.strip():
            raise BadRow("text is empty")
        ids = self._ended(self.tokenizer.encode_start(text))
        return ids, list(ids)

    def _tokens(self, row: dict) -> tuple[list[int], list[int]]:
        ids, labels = row.get("input_ids"), row.get("labels")
        labels = ids if labels is None else labels

        def whole(values: Any) -> bool:
            return isinstance(values, list) and all(
                isinstance(v, int) and not isinstance(v, bool) for v in values
            )

        if not whole(ids) or not whole(labels):
            raise BadRow("input_ids and labels must be lists of whole numbers")
        assert isinstance(ids, list) and isinstance(labels, list)
        if len(ids) != len(labels):
            raise BadRow(f"input_ids has {len(ids)} numbers, labels {len(labels)}")
        if any(i >= 2**31 for i in (*ids, *labels)):
            raise BadRow("an id of more than 31 bits")
        if any(i < 0 for i in ids) or any(label < 0 and label != IGNORE for label in labels):
            raise BadRow("a negative id (labels may be −100)")
        return ids, labels


def _import_function(name: str, directory: Path) -> Callable[[dict], Any]:
    if "." not in name:
        known = "chat, instruct, prompt_completion, text, tokens or your own module.function"
        raise ConfigError("datasets", name, f"is not a type; use {known}")
    function = import_attribute("datasets", name, directory)
    if not callable(function):
        raise ConfigError("datasets", name, "is not a function")
    return function


def encode_dataset(
    spec: dict, tokenizer: Tokenizer, options: RowOptions, directory: Path
) -> Iterator[Encoded]:
    """Encode every row of one dataset with the code that training uses. Raises DataError for a bad row under
    `on_bad_row: error`."""
    kind = settle_type(spec, directory)
    encoder = Encoder(kind, tokenizer, options, directory, spec.get("columns"), spec.get("system"))
    limit = options.sequence_len
    for row in read_rows(spec, directory):
        if isinstance(row, DataError):
            encoded, problem = Encoded(row.file, row.line or 0, [], []), row.reason
        else:
            encoded, problem = Encoded(row.file, row.line, [], []), ""
            encoded.unread = encoder.unread(row.value)
            try:
                token_lists = encoder.encode(row.value)
                encoded.lost = encoder.lost
                if token_lists is None:
                    encoded.status, encoded.reason = "skipped", f"{kind} returned None"
                    yield encoded
                    continue
                encoded.input_ids, encoded.labels = token_lists
            except BadRow as error:
                problem = str(error)
        ids, labels = encoded.input_ids, encoded.labels
        if not problem and encoder.form == "text" and len(ids) > limit:
            cuts = [*range(0, len(ids), limit), len(ids)]
            if cuts[-1] - cuts[-2] == 1 and limit > 2:  # a piece of one token would predict nothing
                cuts[-2] -= 1
            for begin, end in itertools.pairwise(cuts):
                yield Encoded(encoded.file, encoded.line, ids[begin:end], labels[begin:end])
            continue
        if not problem and not any(label != IGNORE for label in labels[1:]):
            problem = "no token is trained"  # position 0 has no prediction before it
        if not problem and len(ids) > limit:
            if options.excess_length_strategy == "error":
                problem = f"has {len(ids)} tokens, sequence_len is {limit}"
            else:
                encoded.status, encoded.reason = "truncated", f"{len(ids)} tokens, sequence_len is {limit}"
                encoded.input_ids, encoded.labels = ids[:limit], labels[:limit]
                if options.excess_length_strategy == "drop" or all(x == IGNORE for x in encoded.labels[1:]):
                    encoded.status = "dropped"
        if problem:
            if options.on_bad_row == "error":
                remedy = "fix the row, or set on_bad_row: skip"
                raise DataError(encoded.file, encoded.line, problem, remedy)
            encoded.status, encoded.reason = "bad", problem
        yield encoded


# ------------------------------------------------------------------------------------------------------------
# Prompts, for recipes that sample the answers themselves
# ------------------------------------------------------------------------------------------------------------


def _prompt_of(
    kind: str, row: dict, tokenizer: Tokenizer
) -> tuple[list[int], str | list[dict], str | None, list[dict] | None]:
    """(prompt ids, prompt, reference answer, tools) of a row; a final assistant message is the reference, not
    part of the prompt."""
    if kind == "instruct":
        prompt = instruct_prompt(row, tokenizer)
        chat = isinstance(prompt, list)
        ids = tokenizer.encode_prompt(prompt) if chat else tokenizer.encode_start(prompt)
        return ids, prompt, row.get("output"), None
    if kind == "prompt_completion" and isinstance(row.get("prompt"), str):
        return tokenizer.encode_start(row["prompt"]), row["prompt"], row.get("completion"), None
    messages, tools, kwargs = chat_of(row, tokenizer, need_answer=False)
    answer = None
    if messages[-1]["role"] == "assistant":
        answer = text_of(messages.pop().get("content"))
        if not messages:
            raise BadRow("the only message is the assistant's: there is no prompt")
    elif isinstance(row.get("completion"), list):
        answer = row["completion"][-1].get("content")
    return tokenizer.encode_prompt(messages, tools, **kwargs), messages, answer, tools


def only_tools(row: dict, tools: list[dict], form: str) -> list[dict]:
    """The tools of a run; BadRow for a row that brings its own, or that has no messages to show them in."""
    if row.get("tools"):
        raise BadRow("has tools of its own, which cannot be called here: remove the column or the option")
    if form == "instruct" or (form == "prompt_completion" and isinstance(row.get("prompt"), str)):
        raise BadRow("is no conversation: the chat template shows tools to messages only")
    return tools


Turns = Literal["last", "first", "every", "rollout"]


def _turns_of(kind: str, row: dict, turns: Turns) -> list[dict]:
    """Split a conversation into rows: one that ends with its last answer, or its first; one per answer; or
    one that ends with the first and keeps the rest, up to the last answer, in `remaining_turns`."""
    conversation = next((row[name] for name in ("messages", "conversations", "prompt") if name in row), None)
    if kind != "chat" or turns == "last" or conversation is None or isinstance(row.get("completion"), list):
        return [row]
    messages = check_messages(conversation)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    rows = [{**row, "messages": messages[: i + 1]} for i in answers]
    if turns == "every":
        return rows
    if turns == "rollout" and len(answers) > 1:
        rows[0]["remaining_turns"] = messages[answers[0] + 1 : answers[-1] + 1]
    return rows[:1]


def read_prompts(
    specs: list[dict], tokenizer: Tokenizer, options: DataOptions, directory: Path,
    longest: int | None = None, turns: Turns = "last", counts: dict[str, int] | None = None,
    tools: list[dict] | None = None,
) -> tuple[list[Prompt], str]:
    """Every row of the datasets as a prompt, and a fingerprint of them all. `turns` says which answers of a
    conversation are asked for; the number of prompts left out as too long is added to `counts`; `tools` are
    shown to every prompt.

    Kinds: chat (`messages`, or `prompt` as a list), instruct, prompt_completion, or your module.function,
    which returns one of those forms. Every column of the row, and of what the function returned, goes to the
    reward functions. Prompts of more than `longest` tokens are left out and counted. Raises DataError.
    """
    prompts: list[Prompt] = []
    digest, too_long, bad = hashlib.sha256(), 0, 0
    for number, spec in enumerate(specs):
        kind = settle_type(spec, directory, prompts=True)
        known = ("chat", "instruct", "prompt_completion")
        function = None if kind in known else _import_function(kind, directory)
        for row in read_rows(spec, directory):
            name = f"{row.file}:{row.line}"
            try:
                if isinstance(row, DataError):
                    raise BadRow(row.reason)
                values, form = as_ours(row.value, spec.get("columns") or {}), kind
                if function is None:
                    refuse_other_data(values, spec.get("columns") or {})
                else:
                    try:
                        returned = function(values)
                    except Exception as error:  # user code may raise anything; the row is named below
                        raise BadRow(f"{kind} raised {type(error).__name__}: {error}") from error
                    if returned is None:
                        continue
                    if not isinstance(returned, dict):
                        raise BadRow(f"{kind} must return a dict, or None to leave the row out")
                    values = cleaned({**values, **returned})
                    form = "prompt_completion" if isinstance(values.get("prompt"), str) else "chat"
                    form = "instruct" if "instruction" in returned else form
                with readable(form):
                    values = with_system(values, spec.get("system"))
                    if options.strip_thinking:
                        values = without_thinking(values)
                    if tools:
                        values = {**values, "tools": only_tools(values, tools, form)}
                    parts = [(v, *_prompt_of(form, v, tokenizer)) for v in _turns_of(form, values, turns)]
                if not all(ids for _, ids, *_ in parts):
                    raise BadRow("the prompt is empty")
            except BadRow as error:
                if options.on_bad_row == "error":
                    remedy = "fix the row, or set on_bad_row: skip"
                    raise DataError(row.file, row.line, str(error), remedy) from None
                bad += 1
                log.info("data: %s: bad: %s", name, error)
                continue
            for values, ids, prompt, answer, shown in parts:
                if longest is not None and len(ids) > longest:
                    too_long += 1
                    continue
                taken = {"prompt", "messages", "conversations", "completion"}
                columns = {k: v for k, v in {**row.value, **values}.items() if k not in taken}
                if answer is not None:
                    columns.setdefault("answer", answer)
                completion = answer if isinstance(answer, str) else None
                prompts.append(Prompt(ids, prompt, columns, name, completion, shown, number))
                digest.update(repr((ids, sorted(columns.items(), key=str), completion)).encode())
    if too_long:
        log.info("data: %d prompts of more than %d tokens left out (max_prompt_length)", too_long, longest)
    if counts is not None:
        counts["too_long"] = counts.get("too_long", 0) + too_long
    if bad:
        log.info("data: %d bad rows left out", bad)
    if not prompts:
        raise ConfigError("datasets", None, "hold no prompt that can be used")
    return prompts, digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Encoded once, kept on disk
# ------------------------------------------------------------------------------------------------------------


def prepare(
    specs: list[dict], tokenizer: Tokenizer, options: RowOptions, directory: Path, cache: Path
) -> Dataset:
    """Encode every dataset, or find the result of an earlier run with the same files, options, tokenizer and
    code."""
    key = hashlib.sha256(Path(__file__).read_bytes())
    for source in sorted(Path(getfile(Row)).parent.glob("*.py")):  # the code that reads rows and templates
        key.update(source.read_bytes())
    for spec in specs:
        settle_type(spec, directory)
        key.update(json.dumps(spec, sort_keys=True, default=str).encode())
        if not spec.get("path", "").startswith("reasoning-gym:"):
            for file in locate(spec, directory)[0]:
                stat = file.stat()
                key.update(os.fsencode(file) + f" {stat.st_size} {stat.st_mtime_ns}".encode())
        if "." in str(spec.get("type")):
            function = _import_function(spec["type"], directory)
            key.update(_code_beside(function, directory))
    key.update(repr((options.sequence_len, options.excess_length_strategy, options.train_on_inputs)).encode())
    key.update(repr(options.strip_thinking).encode())
    key.update(tokenizer.date.encode())
    key.update(repr((options.on_bad_row, options.chat_template_kwargs, tokenizer.special)).encode())
    key.update((tokenizer.template or "").encode() + tokenizer.core.to_str().encode())
    cached = cache / key.hexdigest()[:16]
    if cached.is_dir():
        try:
            return Dataset.load(cached)
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:  # a power cut, a full disk
            log.warning("data: %s is damaged (%s): encoding again", cached, error)
            shutil.rmtree(cached)

    def rows() -> Iterator[tuple[int, Encoded]]:
        for number, spec in enumerate(specs):
            for encoded in encode_dataset(spec, tokenizer, options, directory):
                yield number, encoded

    log.info("encoding the rows of %s", ", ".join(spec["path"] for spec in specs))
    progress = tqdm(rows(), unit=" rows", leave=False, file=sys.stderr, disable=not is_terminal(sys.stderr))
    encoded = Dataset.build(iter(progress))
    if not len(encoded):
        option = "test_datasets" if specs is options.test_datasets else "datasets"
        raise ConfigError(option, [spec["path"] for spec in specs], "hold no row that can be used")
    encoded.save(cached)
    return Dataset.load(cached)


def _code_beside(function: Callable, directory: Path) -> bytes:
    """The code of a user's function: its file, and what it has imported from the folder of the config."""
    files = {getattr(sys.modules.get(function.__module__), "__file__", None)}
    folder = str(directory.resolve()) + os.sep
    loaded = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files |= {file for file in loaded if file and os.path.realpath(file).startswith(folder)}
    return b"".join(Path(file).read_bytes() for file in sorted(filter(None, files)) if file.endswith(".py"))


def report_rows(dataset: Dataset) -> None:
    """Log what training will not see."""
    counts = dataset.counts
    left_out = {name: counts[name] for name in ("truncated", "dropped", "bad", "skipped") if counts[name]}
    if left_out:
        log.info("data: %s of %d rows", ", ".join(f"{n} {k}" for k, n in left_out.items()), counts["rows"])
    for line in (*counts["named"], *what_is_left_out(counts)):
        log.info("data: %s", line)


def what_is_left_out(counts: dict) -> list[str]:
    """Lines about columns that nothing reads, and about what chat templates do not show."""
    lines = []
    if counts["unread"]:
        columns = ", ".join(f"{name} ({entry['rows']} rows)" for name, entry in counts["unread"].items())
        lines.append(f"nothing reads these columns: {columns}")
    for what, entry in counts["lost"].items():
        lines.append(
            f"the chat template does not show the {what} of {entry['rows']} rows (first {entry['first']})"
        )
    return lines


# ------------------------------------------------------------------------------------------------------------
# Tokenizer and data of a config
# ------------------------------------------------------------------------------------------------------------


def load_tokenizer(checkpoint: Path, options: DataOptions, directory: Path) -> Tokenizer:
    """The checkpoint's tokenizer, with what the config changes about it."""
    return Tokenizer.load(checkpoint).configure(options, directory)


def trained_tokenizer(options: Any, directory: Path, cache: Path) -> Tokenizer:
    """A tokenizer of `tokenizer_vocab_size` tokens, trained on the data once and kept in `cache`."""
    key = hashlib.sha256(repr((options.tokenizer_vocab_size, options.datasets)).encode()).hexdigest()[:16]
    cached = cache / f"tokenizer-{key}"
    if not (cached / "tokenizer.json").exists():

        def texts() -> Iterator[str]:
            def strings(value: Any) -> Iterator[str]:
                if isinstance(value, str):
                    yield value
                elif isinstance(value, dict):
                    for item in value.values():
                        yield from strings(item)
                elif isinstance(value, list):
                    for item in value:
                        yield from strings(item)

            columns = ("messages", "conversations", "instruction", "input", "output", "prompt", "completion",
                       "text")
            for spec in options.datasets:
                for row in read_rows(spec, directory):
                    if isinstance(row, Row):
                        value = renamed(row.value, spec.get("columns") or {})
                        yield from strings({k: value[k] for k in columns if k in value})

        log.info("training a tokenizer of %d tokens on the rows", options.tokenizer_vocab_size)
        aside = cached.with_name(f".{cached.name}.{secrets.token_hex(4)}")
        Tokenizer.train(texts(), options.tokenizer_vocab_size).save(aside)
        settle(aside, cached)
    return Tokenizer.load(cached).configure(options, directory)


def cli() -> None:
    """python data.py, or ballast-data where the package is installed."""
    make_printable()
    if sys.argv[1:2] != ["inspect"]:
        sys.exit("usage: data.py inspect --config x.yaml [--json] [key=value …]")
    inspect = importlib.import_module("text.inspection").inspect  # not at the top: only this command needs it
    run_command(lambda: inspect(sys.argv[2:]))


if __name__ == "__main__":
    cli()
