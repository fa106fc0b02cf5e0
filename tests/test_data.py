import json
import random
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ConfigError
from conftest import CORPUS, ROOT, TEMPLATES, with_hub
from data import (
    IGNORE,
    BadRow,
    Batches,
    DataError,
    DataOptions,
    Dataset,
    Encoded,
    Encoder,
    Tokenizer,
    encode_dataset,
    load_tokenizer,
    pack,
    prepare,
    read_rows,
    split_held_out,
    without_thinking,
)  # fmt: skip

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int", "note": "<&> é"}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi, you!"}],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "  Four, naïve 日本 \n"},
    ],
    "tools": [
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ],
    "reasoning": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", "reasoning_content": "Let me think"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Thus.", "reasoning_content": "Once more\nwith lines"},
    ],
    "consecutive": [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "First"},
        {"role": "assistant", "content": "Second"},
    ],
    "the answer repeats the question": [
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "assistant"},
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "assistant"},
    ],
}


@pytest.fixture
def tokenizer(tokenizer_directory):
    return lambda name: Tokenizer.load(tokenizer_directory(name))


# ------------------------------------------------------------------------------------------------------------
# Chat templates
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_rendering_and_token_ids_equal_transformers(template, name, tools, tokenizer, tokenizer_directory):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_directory(template))
    ours = tokenizer(template)
    messages = CONVERSATIONS[name]
    for prompt in (False, True):
        text = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(messages, tools, prompt) == text
    ids = theirs.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    assert ours.encode_chat(messages, tools)[0] == ids
    ids = theirs.apply_chat_template(
        messages,
        tools=tools,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert ours.encode_prompt(messages, tools, enable_thinking=False) == ids


def trained_text(tokenizer, ids, labels):
    """The trained stretches as text."""
    pieces, current = [], []
    for token, label in zip([*ids, None], [*labels, IGNORE], strict=True):
        if label != IGNORE:
            assert label == token
            current.append(token)
        elif current:
            pieces.append(tokenizer.decode(current, special=True))
            current = []
    return pieces


@pytest.mark.parametrize(
    "template, end", [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("qwen3", "<|im_end|>")]
)
@pytest.mark.parametrize("name", ["one turn", "system", "consecutive", "the answer repeats the question"])
def test_what_the_assistant_wrote_and_its_end_of_turn_are_trained_and_nothing_else(
    template, end, name, tokenizer
):
    tok = tokenizer(template)
    messages = CONVERSATIONS[name]
    ids, labels = tok.encode_chat(messages)
    expected = [m["content"] for m in messages if m["role"] == "assistant"]
    if template == "llama3":
        expected = [text.strip() for text in expected]
    if template == "qwen3":  # the last turn begins with the (empty) thought that the model would write itself
        expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    assert trained_text(tok, ids, labels) == [text + end for text in expected]


def test_reasoning_and_tool_calls_are_trained_where_the_template_shows_them(tokenizer):
    tok = tokenizer("qwen3")
    pieces = trained_text(tok, *tok.encode_chat(CONVERSATIONS["reasoning"]))
    assert pieces == ["So.<|im_end|>", "<think>\nOnce more\nwith lines\n</think>\n\nThus.<|im_end|>"]
    pieces = trained_text(tok, *tok.encode_chat(CONVERSATIONS["tools"], TOOLS))
    assert pieces[0] == '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert pieces[1] == "<think>\n\n</think>\n\nIt is 2.<|im_end|>"
    llama = tokenizer("llama3")
    pieces = trained_text(llama, *llama.encode_chat(CONVERSATIONS["tools"], TOOLS))
    assert pieces == ['{"name": "add", "parameters": {"a": 1}}<|eot_id|>', "It is 2.<|eot_id|>"]


def test_generation_blocks_decide_where_the_template_has_them(tokenizer, tokenizer_directory):
    tok = tokenizer("chatml")
    from tokenizer import CHATML

    marked = Tokenizer(tok.core, tok.config, CHATML, tok.source)
    messages = CONVERSATIONS["system"]
    ids, labels = marked.encode_chat(messages)
    assert trained_text(marked, ids, labels) == ["Two.<|im_end|>", "  Four, naïve 日本 \n<|im_end|>"]
    assert marked.render(messages) == tok.render(messages)  # the marks leave no trace
    assert marked.stop_ids == [tok.core.token_to_id("<|im_end|>")]
    before, after = "+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>"
    bare = Tokenizer(tok.core, tok.config, CHATML.replace(before, after), tok.source)
    assert bare.encode_chat(messages) == (ids, labels)  # EOS is trained also where the block leaves it out


def test_train_and_weight_choose_turns(tokenizer):
    messages = [dict(m) for m in CONVERSATIONS["system"]]
    for flag in ({"train": False}, {"weight": 0}):
        messages[2] = {**CONVERSATIONS["system"][2], **flag}
        tok = tokenizer("chatml")
        assert trained_text(tok, *tok.encode_chat(messages)) == ["  Four, naïve 日本 \n<|im_end|>"]
    ids, labels = tok.encode_chat(messages, train_on_inputs=True)
    assert ids == labels


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "not closed by a special token"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}", "0 times"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}", "2 times"),
        (
            "{% for m in messages %}{{ m.content | length }}{{ m.content }}<|im_end|>{% endfor %}",
            "where this assistant turn",
        ),
        (
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{{ raise_exception('no') }}",
            "refuses it: no",
        ),
        ("{{ messages.missing.thing }}", "refuses it"),
    ],
)
def test_a_conversation_whose_bounds_cannot_be_trusted_is_refused(template, reason, tokenizer):
    tok = tokenizer("chatml")
    with pytest.raises(BadRow, match=reason):
        Tokenizer(tok.core, tok.config, template, tok.source).encode_chat(CONVERSATIONS["one turn"])


def test_a_token_across_the_start_of_an_answer_is_refused(tokenizer):
    """The prompt ends in the middle of a token: at inference the model would see other ids."""
    tok = tokenizer("chatml")
    start = "{% if m.role == 'assistant' %}sel{% endif %}"
    template = "{% for m in messages %}" + start + "{{ m.content }}<|im_end|>{% endfor %}"
    glued = Tokenizer(tok.core, tok.config, template, tok.source)
    assert len(tok.encode("self")) == 1
    with pytest.raises(BadRow, match="reaches across the start"):
        glued.encode_chat([{"role": "user", "content": "x"}, {"role": "assistant", "content": "f y"}])


@pytest.mark.parametrize("prepend", ["first", "always", "never"])
def test_an_answer_whose_first_word_carries_a_space_is_trained_from_that_space(prepend, tmp_path):
    """Sentencepiece-like tokenizers and Llama 2's template: no generation prompt, `▁word` after `[/INST]`."""
    import tokenizers

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=prepend)
    core.decoder = tokenizers.decoders.Metaspace(prepend_scheme=prepend)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False
    )
    core.train([CORPUS], trainer)
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tok = Tokenizer(core, {"bos_token": "<s>", "eos_token": "</s>"}, template, "here")
    ids, labels = tok.encode_chat(CONVERSATIONS["the answer repeats the question"])
    assert ids == tok.encode(tok.render(CONVERSATIONS["the answer repeats the question"]))
    pieces = trained_text(tok, ids, labels)
    assert [piece.replace(" ", "") for piece in pieces] == ["assistant</s>"] * 2
    first = labels.index(next(label for label in labels if label != IGNORE))
    prompt = tok.render(CONVERSATIONS["the answer repeats the question"][:1])
    assert ids[:first] == tok.encode(prompt)  # what the model is given at inference


def test_templates_run_in_a_sandbox(tokenizer):
    tok = tokenizer("chatml")
    for attack in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ):
        with pytest.raises(BadRow):
            Tokenizer(tok.core, tok.config, attack, tok.source).render(CONVERSATIONS["one turn"])


BIG = "{% set b = 'a' * 100000 %}"
GROWS = "{% set ns = namespace(s='aaaaaaaa', x=10, l=[1]) %}{% for i in range(60) %}"
GREEDY = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ 'a' * 10**9 }}", "{{ 'a'.center(10**9) }}", "{{ 'a' | center(10**9) }}", "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}", "{{ '{:999999999}'.format(1) }}", "{{ '{:{}}'.format(1, 99999999) }}",
    "{{ 2**(2**(2**10)) }}", "{{ (1).to_bytes(10**9, 'little') }}", "{{ [1] | batch(10**9, 1) | list }}",
    "{{ range(10**9) | list }}", "{{ lipsum(10**6) }}", "{{ 'a' | indent(10**9, true) }}",
    GROWS + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}", GROWS + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    GROWS + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    GROWS + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    GROWS + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
    BIG + "{% for i in range(9999) %}{{ b }}{% endfor %}", BIG + "{{ b.replace('a', b) }}",
    BIG + "{{ b | replace('a', b) }}", BIG + "{{ b.join([b] * 10000) }}", BIG + "{{ [b] * 9999 | join(b) }}",
    BIG + "{% set c %}{% for i in range(999) %}{{ b }}{% endfor %}{% endset %}{{ c | length }}",
]  # fmt: skip


@pytest.mark.parametrize("template", GREEDY)
def test_a_template_can_neither_run_for_ever_nor_fill_the_memory(template, tokenizer):
    tok = tokenizer("chatml")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadRow, match=r"the chat template (refuses|fails on) it"):
        Tokenizer(tok.core, tok.config, template, tok.source).render([{"role": "user", "content": "x"}])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_saved_tokenizer_reads_back_here_and_in_transformers(tokenizer, tmp_path):
    import transformers

    options = DataOptions(special_tokens={"pad_token": "<|pad|>"}, tokens=["<think>"], chat_template="chatml")
    tok = tokenizer("llama3").configure(options, ROOT)
    assert tok.core.token_to_id("<|pad|>") == tok.pad_id and tok.vocab_size == len(tok)
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    messages = CONVERSATIONS["one turn"]
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == again.encode_chat(messages)[0] == tok.encode_chat(messages)[0]
    assert theirs.pad_token == "<|pad|>" and again.stop_ids == tok.stop_ids
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == tok.stop_ids


# ------------------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return str(path)


def encode_all(spec, tok, directory=ROOT, **options):
    return list(encode_dataset(spec, tok, DataOptions(datasets=[spec], **options), directory))


def test_prompt_and_completion_are_tokenised_apart_and_eos_is_trained(tokenizer, tmp_path):
    tok = tokenizer("llama3")
    path = write(tmp_path / "a.jsonl", [{"prompt": "de", "completion": "f x"}])
    (row,) = encode_all({"path": path, "type": "prompt_completion"}, tok)
    prompt, completion = tok.encode("de", special=True), tok.encode("f x")
    assert row.input_ids == prompt + completion + [tok.eos_id]
    assert row.labels == [IGNORE] * len(prompt) + completion + [tok.eos_id]


def test_every_type_of_row_is_read(tokenizer, tmp_path):
    tok = tokenizer("chatml")
    instruct = write(tmp_path / "i.jsonl", [{"instruction": "Add", "input": "1 2", "output": "3"}])
    (row,) = encode_all({"path": instruct, "type": "instruct"}, tok)
    assert (
        tok.decode(row.input_ids, special=True)
        == "<|im_start|>user\nAdd\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )
    plain = tokenizer("none")
    (row,) = encode_all({"path": instruct, "type": "instruct"}, plain)
    assert "### Response:\n3<|im_end|>" in plain.decode(row.input_ids, special=True)
    assert trained_text(plain, row.input_ids, row.labels) == ["3<|im_end|>"]

    tokens = write(
        tmp_path / "t.jsonl", [{"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]}, {"input_ids": [5, 6]}]
    )
    rows = encode_all({"path": tokens, "type": "tokens"}, tok)
    assert rows[0].labels == [IGNORE, 6, 7] and rows[1].labels == [5, 6]

    chats = write(
        tmp_path / "p.jsonl",
        [
            {
                "prompt": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                ],
                "completion": [{"role": "assistant", "content": "d"}],
            }
        ],
    )
    (row,) = encode_all({"path": chats, "type": "prompt_completion"}, tok)
    assert trained_text(tok, row.input_ids, row.labels) == ["d<|im_end|>"]

    share = write(
        tmp_path / "s.jsonl",
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
    )
    (row,) = encode_all({"path": share, "type": "chat"}, tok)
    assert trained_text(tok, row.input_ids, row.labels) == ["b<|im_end|>"]

    renamed = write(tmp_path / "r.jsonl", [{"question": "Why", "reply": "So"}])
    spec = {"path": renamed, "type": "instruct", "columns": {"instruction": "question", "output": "reply"}}
    (row,) = encode_all(spec, tok)
    assert trained_text(tok, row.input_ids, row.labels) == ["So<|im_end|>"]

    (tmp_path / "book.txt").write_text("word " * 400)
    rows = encode_all({"path": str(tmp_path / "book.txt"), "type": "text"}, tok, sequence_len=64)
    whole = [*tok.encode("word " * 400), tok.eos_id]
    assert [i for row in rows for i in row.input_ids] == whole and all(
        len(row.input_ids) <= 64 for row in rows
    )


def test_json_parquet_directories_and_slices_are_read(tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"row {i}", "messages": None} for i in range(10)]
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"text": r["text"]} for r in rows]), tmp_path / "data/train-0.parquet"
    )
    (tmp_path / "data/test.json").write_text(json.dumps([{"text": "held out"}]))

    def texts(**spec):
        return [row.value["text"] for row in read_rows({"type": "text", **spec}, tmp_path)]

    assert texts(path="data") == [f"row {i}" for i in range(10)]
    assert texts(path="data", split="test") == ["held out"]
    assert texts(path="data", split="train[:20%]") == ["row 0", "row 1"]
    assert texts(path="data/train-0.parquet", split="[7:]") == ["row 7", "row 8", "row 9"]
    assert texts(path="data/train-0.parquet", split="[-1:]") == ["row 9"]
    for bad in (dict(path="data", split="dev"), dict(path="absent"), dict(path="data", split="train[x]")):
        with pytest.raises((DataError, ConfigError)):
            texts(**bad)
    with pytest.raises(ConfigError, match="pth"):
        list(read_rows({"pth": "x"}, tmp_path))


def test_a_dataset_on_the_hub_is_read_through_a_local_stand_in(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    write(files / "train.jsonl", [{"text": "from the hub"}])
    write(files / "test.jsonl", [{"text": "held out"}])
    code = (
        "import pathlib, data, config\n"
        "for split in ('train', 'test'):\n"
        "    spec = {'path': 'hf://datasets/org/tiny', 'type': 'text', 'split': split}\n"
        "    print([row.value['text'] for row in data.read_rows(spec, pathlib.Path('.'))])\n"
        "try: list(data.read_rows({'path': 'hf://datasets/org/absent', 'type': 'text'}, pathlib.Path('.')))\n"
        "except config.BallastError as error: print('refused', error)\n"
    )
    done, _ = with_hub(code, files, tmp_path / "home", "datasets")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["['from the hub']", "['held out']"], done.stderr
    assert lines[2].startswith("refused hf://datasets/org/absent")


BAD_ROWS = [
    ("chat", "{not json", "JSON"),
    ("chat", [1], "object"),
    ("chat", {"text": "x"}, "messages"),
    ("chat", {"messages": []}, "non-empty"),
    ("chat", {"messages": [{"role": "robot", "content": "x"}]}, "robot"),
    ("chat", {"messages": [{"role": "user", "content": "x"}]}, "no assistant"),
    ("chat", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 7}]},
    "content must be text"),
    ("chat", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y",
    "weight": 0.5}]}, "weight"),
    ("chat", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y",
    "train": False}]}, "no token is trained"),
    ("instruct", {"instruction": "x"}, "'output' is missing"),
    ("prompt_completion", {"prompt": "x", "completion": ""}, "empty"),
    ("text", {"text": "  "}, "empty"),
    ("tokens", {"input_ids": [1, 2], "labels": [1]}, "2 numbers"),
    ("tokens", {"input_ids": [1, -2]}, "negative"),
    ("tokens", {"input_ids": "1 2"}, "lists"),
]  # fmt: skip


@pytest.mark.parametrize("kind, row, reason", BAD_ROWS)
def test_a_bad_row_stops_with_file_and_line_or_is_counted(kind, row, reason, tokenizer, tmp_path):
    good = {"messages": CONVERSATIONS["one turn"], "instruction": "a", "output": "b", "prompt": "a",
    "completion": "b",
            "text": "a b c d", "input_ids": [1, 2]}  # fmt: skip
    path = write(tmp_path / "rows.jsonl", [good, row, good])
    tok = tokenizer("chatml")
    with pytest.raises(DataError, match=reason) as caught:
        encode_all({"path": path, "type": kind}, tok)
    assert str(caught.value).startswith(f"{path}:2: ")
    rows = encode_all({"path": path, "type": kind}, tok, on_bad_row="skip")
    assert [r.status for r in rows] == ["kept", "bad", "kept"]
    dataset = Dataset.build((0, r) for r in rows)
    assert len(dataset) == 2 and dataset.counts["bad"] == 1 and f"{path}:2" in dataset.counts["named"][0]
    assert dataset.name(1) == f"{path}:3"


@pytest.mark.parametrize("strategy", ["drop", "truncate", "error"])
def test_rows_that_are_too_long_are_dropped_cut_or_refused(strategy, tokenizer, tmp_path):
    path = write(
        tmp_path / "a.jsonl", [{"input_ids": list(range(3, 9))}, {"input_ids": [3, 4], "labels": [IGNORE, 4]}]
    )
    spec = {"path": path, "type": "tokens"}
    how = dict(sequence_len=4, excess_length_strategy=strategy)
    if strategy == "error":
        with pytest.raises(DataError, match="6 tokens"):
            encode_all(spec, tokenizer("chatml"), **how)
        return
    rows = encode_all(spec, tokenizer("chatml"), **how)
    assert [r.status for r in rows] == ["dropped" if strategy == "drop" else "truncated", "kept"]
    assert len(Dataset.build((0, r) for r in rows)) == (1 if strategy == "drop" else 2)


def test_a_row_whose_trained_tokens_are_all_cut_off_is_dropped_not_trained_on_nothing(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"input_ids": [3] * 6, "labels": [IGNORE] * 5 + [3]}])
    rows = encode_all(
        {"path": path, "type": "tokens"},
        tokenizer("chatml"),
        sequence_len=4,
        excess_length_strategy="truncate",
    )
    assert rows[0].status == "dropped"


def test_a_users_function_makes_rows_and_its_faults_are_named(tokenizer, tmp_path):
    (tmp_path / "mine_rows.py").write_text(
        "def f(row):\n"
        "    if row['n'] == 1: return None\n"
        "    if row['n'] == 2: raise KeyError('gone')\n"
        "    return {'prompt': 'n', 'completion': str(row['n'])}\n"
    )
    path = write(tmp_path / "a.jsonl", [{"n": 0}, {"n": 1}, {"n": 2}])
    tok = tokenizer("chatml")
    rows = encode_all({"path": path, "type": "mine_rows.f"}, tok, tmp_path, on_bad_row="skip")
    assert [r.status for r in rows] == ["kept", "skipped", "bad"]
    assert "KeyError" in rows[2].reason
    with pytest.raises(ConfigError, match=r"looked in .*try: cd"):
        encode_all({"path": path, "type": "absent_module.f"}, tok, tmp_path)
    with pytest.raises(ConfigError, match="not a type"):
        Encoder("chta", tok, DataOptions(), tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Packing and order
# ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=80))
def test_packing_is_best_fit_decreasing(lengths):
    packs = pack(lengths, 50)
    assert sorted(i for one in packs for i in one) == list(range(len(lengths)))
    bins = []  # the definition, in quadratic time
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [b for b in range(len(bins)) if bins[b] >= lengths[i]]
        if fits:
            best = min(fits, key=lambda b: bins[b])
            bins[best] -= lengths[i]
        else:
            bins.append(50 - lengths[i])
    assert sorted(50 - sum(lengths[i] for i in one) for one in packs) == sorted(bins)


def test_a_document_that_fits_no_pack_is_refused():
    with pytest.raises(ValueError, match="51"):
        pack([51], 50)


def make_dataset(lengths, sources=None):
    rng = random.Random(0)
    rows = []
    for n, length in enumerate(lengths):
        ids = [rng.randrange(3, 90) for _ in range(length)]
        labels = [IGNORE if rng.random() < 0.4 else i for i in ids]
        labels[-1] = ids[-1]
        rows.append((sources[n] if sources else 0, Encoded("f", n + 1, ids, labels)))
    return Dataset.build(iter(rows))


def make_batches(dataset, units=4, weights=(1.0,), seed=0, **options):
    return Batches(
        dataset, np.arange(len(dataset)), DataOptions(sequence_len=32, **options), weights=list(weights),
        units_a_step=units,
        seed=seed, pad_id=0,
    )  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro, world", [(1, 1), (4, 1), (1, 4), (2, 2), (1, 2), (3, 1)])
def test_every_row_is_seen_once_an_epoch_and_targets_are_the_next_labels(packing, micro, world):
    dataset = make_dataset([random.Random(i).randrange(2, 30) for i in range(53)])
    batches = make_batches(dataset, sample_packing=packing)
    seen = []
    for step in range(batches.plan(1)):
        units = batches.units(step)
        trained = 0
        counts = set()
        for rank in range(world):
            mine = batches.micro_batches(units, micro, rank, world)
            counts.add(len(mine))
            for batch in mine:
                seen += batch.rows
                trained += int((batch.targets != IGNORE).sum())
                flat = []
                for b in range(batch.input_ids.shape[0]):
                    for document in range(int(batch.document_ids[b].max()) + 1):
                        here = batch.document_ids[b] == document
                        flat.append(
                            (batch.input_ids[b][here], batch.targets[b][here], batch.position_ids[b][here])
                        )
                for row, (ids, targets, positions) in zip(batch.rows, flat, strict=False):
                    tokens, labels = dataset.row(row)
                    assert ids.tolist() == tokens.tolist()
                    assert targets.tolist() == [*labels[1:].tolist(), IGNORE]
                    assert positions.tolist() == list(range(len(tokens)))
                assert (batch.targets[batch.document_ids < 0] == IGNORE).all()
        assert len(counts) == 1  # every rank runs as many micro-batches
        assert trained == batches.trained_tokens(units)
    assert sorted(seen) == list(range(53))


def test_the_order_is_a_function_of_seed_and_step():
    dataset = make_dataset([5] * 50)
    one, two, other = make_batches(dataset), make_batches(dataset), make_batches(dataset, seed=1)
    steps = [one.units(s) for s in range(40)]
    assert steps[37] == two.units(37)  # asked for out of order, epochs later
    assert steps != [other.units(s) for s in range(40)]
    flat = [i for step in steps for unit in step for i in unit]
    assert sorted(flat[:50]) == sorted(flat[50:100]) == list(range(50)) and flat[:50] != flat[50:100]
    assert [one.plan(e) for e in (1, 2, 0.5)] == [13, 25, 7] and one.plan(9, max_steps=4) == 4
    assert one.epoch_of(25) == pytest.approx(2.0)


def test_weights_repeat_and_sample_sources():
    dataset = make_dataset([4] * 30, sources=[0] * 10 + [1] * 20)
    batches = make_batches(dataset, weights=(2.0, 0.25))
    first, second = ([i for unit in batches.epoch(e) for i in unit] for e in (0, 1))
    assert sorted(i for i in first if i < 10) == sorted(list(range(10)) * 2)
    assert len([i for i in first if i >= 10]) == 5
    assert {i for i in first if i >= 10} != {i for i in second if i >= 10}


def test_held_out_rows_never_meet_training_rows():
    train, held_out = split_held_out(100, 0.1, seed=3)
    assert len(held_out) == 10 and not set(train) & set(held_out) and len(train) == 90
    assert np.array_equal(held_out, split_held_out(100, 10, seed=3)[1])
    for bad in (100, 1.5, 0.001):
        with pytest.raises(ConfigError, match="val_set_size"):
            split_held_out(100, bad, seed=0)


def test_prepared_data_is_reused_until_anything_that_matters_changes(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "three"}])
    tok, cache = tokenizer("chatml"), tmp_path / "cache"
    spec = {"path": path, "type": "text"}

    def prepared(**options):
        return prepare([spec], tok, DataOptions(datasets=[spec], **options), ROOT, cache)

    first = prepared()
    assert prepared().fingerprint == first.fingerprint and len(list(cache.iterdir())) == 1
    prepared(sequence_len=4)
    assert len(list(cache.iterdir())) == 2
    write(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "other"}])
    assert prepared().fingerprint != first.fingerprint
    found = len(list(cache.iterdir()))
    (tmp_path / "edited.py").write_text("# masks made in another way")
    monkeypatch.setattr("data.getfile", lambda _: tmp_path / "edited.py")  # tokenizer.py was edited
    prepared()
    assert len(list(cache.iterdir())) == found + 1 and not list(cache.glob(".*"))


def test_a_damaged_cache_is_made_again_and_two_runs_may_share_one(tokenizer, tmp_path):
    rows = [{"text": f"words {i} " * 5} for i in range(20)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    specs = [{"path": "r.jsonl", "type": "text"}]

    def made(cache="cache"):
        return prepare(specs, tokenizer("chatml"), DataOptions(), tmp_path, tmp_path / cache)

    first = made()
    (place,) = (tmp_path / "cache").iterdir()
    for name in ("tokens.npy", "facts.json", "offsets.npy"):
        raw = (place / name).read_bytes()
        (place / name).write_bytes(raw[: len(raw) * 2 // 3])
        assert made().fingerprint == first.fingerprint, name
    first.save(place)  # as a second run that was slower would
    assert made().fingerprint == first.fingerprint and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_tokenizer_is_trained_once_and_splits_digits(tmp_path):
    path = write(
        tmp_path / "a.jsonl", [{"instruction": f"add {i} and {i}", "output": str(2 * i)} for i in range(200)]
    )
    options = DataOptions(datasets=[{"path": path, "type": "instruct"}], tokenizer_vocab_size=300)
    tok = load_tokenizer(tmp_path, options, tmp_path, tmp_path / "cache")
    assert tok.vocab_size <= 300 and len(tok.encode("1234")) == 4
    assert tok.decode(tok.encode("héllo 日本 12")) == "héllo 日本 12"
    stamp = next((tmp_path / "cache").iterdir()).stat().st_mtime_ns
    again = load_tokenizer(tmp_path, options, tmp_path, tmp_path / "cache")
    assert again.encode("add 7") == tok.encode("add 7")
    assert next((tmp_path / "cache").iterdir()).stat().st_mtime_ns == stamp


# ------------------------------------------------------------------------------------------------------------
# inspect
# ------------------------------------------------------------------------------------------------------------


def inspect(*arguments, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, str(ROOT / "data.py"), "inspect", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    return done.returncode, done.stdout, done.stderr


def test_inspect_prints_the_rows_that_training_sees_and_names_their_faults(
    tokenizer_directory, small_checkpoint, tmp_path
):
    directory, _ = small_checkpoint
    chat = {"messages": CONVERSATIONS["one turn"]}
    rows = [
        chat,
        chat,
        {"messages": []},
        {"messages": [*CONVERSATIONS["one turn"][:1], {"role": "assistant", "content": "word " * 300}]},
    ]
    write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "c.yaml").write_text(
        f"base_model: {directory}\nlearning_rate: 1e-5\nsequence_len: 128\non_bad_row: skip\n"
        "datasets: [{path: rows.jsonl, type: chat}]\n"
    )
    code, out, _ = inspect("--config", str(tmp_path / "c.yaml"), "--json")
    printed = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["status"] for r in printed] == ["kept", "kept", "bad", "dropped"]
    tok = Tokenizer.load(directory)
    ids, labels = tok.encode_chat(CONVERSATIONS["one turn"])
    assert printed[0]["input_ids"] == ids and printed[0]["labels"] == labels
    assert torch.tensor(labels).eq(IGNORE).any()

    code, out, _ = inspect("--config", str(tmp_path / "c.yaml"))
    assert code == 0 and "⟦Hi, you!<|im_end|>⟧" in out
    for line in (
        "rows.jsonl:3",
        "repeat another",
        "longer than sequence_len",
        "duplicates",
        "trained tokens",
    ):
        assert line in out, line


def test_inspect_answers_mistakes_in_one_line(tmp_path):
    for text, named in (
        ("base_model: nowhere/at/all\ndatasets: []\n", "nowhere"),
        ("datasets: []\n", "base_model"),
        ("a: [\n", "c.yaml:2"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        code, _, err = inspect("--config", str(tmp_path / "c.yaml"))
        assert code == 2 and named in err and len(err.strip().splitlines()) == 1


def test_rows_from_reasoning_gym_are_the_same_for_a_seed(tmp_path):
    pytest.importorskip("reasoning_gym")
    spec = {"path": "reasoning-gym:chain_sum", "type": "instruct", "size": 5, "seed": 3}
    one, two = ([r.value["question"] for r in read_rows(spec, tmp_path)] for _ in range(2))
    assert one == two and len(one) == 5
    with pytest.raises(ConfigError, match="reasoning-gym"):
        list(read_rows({**spec, "path": "reasoning-gym:no_such_task"}, tmp_path))


def test_reasoning_traces_are_taken_out_of_answers_only():
    row = {
        "messages": [{"role": "user", "content": "<think>mine</think>?"},
                     {"role": "assistant", "content": "<think>a\nb</think>\n\n4", "reasoning_content": "c"}],
        "output": "<think>x</think>5", "completion": "6<think>never ends", "input": "<think>y</think>z",
    }  # fmt: skip
    plain = without_thinking(row)
    assert plain["messages"] == [row["messages"][0], {"role": "assistant", "content": "4"}]
    assert (plain["output"], plain["completion"], plain["input"]) == ("5", "6", "<think>y</think>z")
    with pytest.raises(BadRow, match="nothing is left"):
        without_thinking({"completion": "<think>only"})
