"""Rows as people's files have them: nulls, JSON text, empty answers, calls, flags."""

import json

import pytest

import sft
from conftest import CALL, TOOLS, arguments, metrics, run_ok, write
from data import Encoder, RowOptions, encode_dataset, prepare, read_prompts, settle_type
from rollouts.rewards import exact_match, numeric_match, reasoning_gym
from run.config import ConfigError, DataError, load_yaml, parse_config
from text.rows import read_rows
from text.templates import BadRow
from text.tokenizer import IGNORE

ASK, ANSWER = {"role": "user", "content": "Add"}, {"role": "assistant", "content": "It is 2."}


def encode(tok, tmp_path, kind, row, **options):
    return Encoder(kind, tok, RowOptions(**options), tmp_path).encode(row)


@pytest.mark.parametrize("gap", [None, float("nan")], ids=["null", "NaN"])
def test_a_null_is_an_absent_column_in_every_type(gap, tokenizer, tmp_path):
    tok = tokenizer("chatml")
    whole = {
        "instruct": {"instruction": "Add", "output": "2"}, "text": {"text": "Some text"},
        "prompt_completion": {"prompt": "a", "completion": "b"}, "chat": {"messages": [ASK, ANSWER]},
        "tokens": {"input_ids": [1, 2, 3]},
    }
    gaps = ("input", "system", "tools", "chat_template_kwargs", "labels", "conversations", "prompt",
            "completion")
    for kind, row in whole.items():
        filled = {**{name: gap for name in gaps if name not in row}, **row}
        assert encode(tok, tmp_path, kind, filled) == encode(tok, tmp_path, kind, row), kind
    with pytest.raises(BadRow, match="column 'output' is missing"):
        encode(tok, tmp_path, "instruct", {"instruction": "Add", "output": gap})
    path = write(tmp_path / "p.jsonl", [{"instruction": "Add", "input": None, "output": "2", "answer": None}])
    (prompt,), _ = read_prompts([{"path": path, "type": "instruct"}], tok, RowOptions(), tmp_path)
    assert prompt.columns["answer"] in ("2", None)


EMPTY = [
    ("instruct", {"instruction": "Add", "output": ""}), ("instruct", {"instruction": "Add", "output": " \n"}),
    ("prompt_completion", {"prompt": "a", "completion": ""}),
    ("prompt_completion", {"prompt": "a", "completion": "  "}),
    ("prompt_completion", {"prompt": [ASK], "completion": [{"role": "assistant", "content": ""}]}),
    ("chat", {"messages": [ASK, {"role": "assistant", "content": ""}]}),
    ("chat", {"messages": [ASK, {"role": "assistant", "content": " "}, ASK, ANSWER]}),
    ("chat", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}),
    ("chat", {"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]}),
    ("chat", {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": []}]}),
]


@pytest.mark.parametrize("kind, row", EMPTY)
def test_an_empty_answer_is_refused_skipped_by_option_and_counted(kind, row, tokenizer, tmp_path):
    tok = tokenizer("chatml")
    with pytest.raises(BadRow, match="the answer is empty"):
        encode(tok, tmp_path, kind, row)
    path = write(tmp_path / "a.jsonl", [row])
    spec = {"path": path, "type": kind}
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*the answer is empty.*on_bad_row: skip"):
        list(encode_dataset(spec, tok, RowOptions(), tmp_path))
    (bad,) = encode_dataset(spec, tok, RowOptions(on_bad_row="skip"), tmp_path)
    assert bad.status == "bad" and "empty" in bad.reason  # what inspect counts under `empty`


def test_an_empty_turn_that_is_not_trained_stays(tokenizer, tmp_path):
    silent = {"role": "assistant", "content": "", "train": False}
    encode(tokenizer("chatml"), tmp_path, "chat", {"messages": [ASK, silent, ASK, ANSWER]})


def calls(arguments):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": TOOLS}


@pytest.mark.parametrize("name", ["qwen3", "llama3", "hermes"])
def test_arguments_as_json_text_are_the_object_that_they_say(name, tokenizer, tmp_path):
    tok = tokenizer(name if name in ("qwen3", "llama3") else "qwen3")
    as_object = encode(tok, tmp_path, "chat", calls({"a": 1, "b": None}))
    assert encode(tok, tmp_path, "chat", calls('{"a": 1, "b": null}')) == as_object
    assert '\\"' not in tok.decode(as_object[0], special=True)
    assert encode(tok, tmp_path, "chat", calls("")) == encode(tok, tmp_path, "chat", calls({}))
    for wrong in ("{", "[1]", "3", '"text"'):
        with pytest.raises(BadRow, match="arguments of a tool call"):
            encode(tok, tmp_path, "chat", calls(wrong))


def test_an_older_function_call_is_a_tool_call(tokenizer, tmp_path):
    tok = tokenizer("qwen3")
    older = {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": '{"a": 1}'}}
    newer = {"role": "assistant", "content": "", "tool_calls": CALL}
    rows = [{"messages": [ASK, turn], "tools": TOOLS} for turn in (older, newer)]
    assert encode(tok, tmp_path, "chat", rows[0]) == encode(tok, tmp_path, "chat", rows[1])


def test_rows_from_parquet_and_from_jsonl_are_the_same(tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    def row(name, arguments, properties):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        tool = {"type": "function", "function": {"name": name, "parameters": properties}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"messages": [ASK, answer], "tools": [tool]}

    rows = [row("add", {"a": 1, "deep": {"x": "1"}}, {"a": {"type": "int"}}),
            row("find", {"text": "b"}, {"text": {"type": "string", "enum": ["b"]}})]
    write(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    tok = tokenizer("qwen3")
    texts = []
    for name in ("a.jsonl", "a.parquet"):
        spec = {"path": str(tmp_path / name), "type": "chat"}
        encoded = list(encode_dataset(spec, tok, RowOptions(), tmp_path))
        texts.append([tok.decode(one.input_ids, special=True) for one in encoded])
    assert texts[0] == texts[1] and "null" not in "".join(texts[0])


def test_lists_that_a_file_has_as_json_text_are_read(tokenizer, tmp_path):
    tok = tokenizer("qwen3")
    row = {"messages": [ASK, {"role": "assistant", "content": "<think>hm</think>It is 2."}], "tools": TOOLS,
           "chat_template_kwargs": {"enable_thinking": False}}
    as_text = {name: json.dumps(value) for name, value in row.items()}
    for options in ({}, {"strip_thinking": True}):
        read = [encode(tok, tmp_path, "chat", form, **options) for form in (as_text, row)]
        assert read[0] == read[1]
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    tools = [{"name": "add", "parameters": {}}]
    both = [{"conversations": shared, "tools": tools},
            {"conversations": json.dumps(shared), "tools": json.dumps(tools)}]
    assert encode(tok, tmp_path, "chat", both[0]) == encode(tok, tmp_path, "chat", both[1])
    with pytest.raises(BadRow, match="tools is text that is not JSON"):
        encode(tok, tmp_path, "chat", {**row, "tools": "[{"})


@pytest.mark.parametrize("flag", ["false", "true", 0, 1, "no"])
def test_flags_of_messages_have_a_type(flag, tokenizer, tmp_path):
    with pytest.raises(BadRow, match="message 1: train must be true or false"):
        encode(tokenizer("chatml"), tmp_path, "chat", {"messages": [ASK, {**ANSWER, "train": flag}]})


def test_turns_of_a_prompt_in_sharegpts_form_are_not_trained(tokenizer, tmp_path):
    tok = tokenizer("chatml")
    said = (("human", "Hi"), ("gpt", "Old"), ("human", "And"))
    prompt = [{"from": speaker, "value": text} for speaker, text in said]
    ids, labels = encode(tok, tmp_path, "prompt_completion",
                         {"prompt": prompt, "completion": [{"from": "gpt", "value": "New"}]})
    trained = tok.decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORE])
    assert "New" in trained and "Old" not in trained


def test_columns_that_a_plain_prompt_has_no_place_for_are_named(tokenizer, tmp_path):
    tok = tokenizer("chatml")
    encoder = Encoder("prompt_completion", tok, RowOptions(), tmp_path)
    plain = {"prompt": "a", "completion": "b", "system": "Be brief", "tools": TOOLS}
    assert encoder.unread(plain) == ["system", "tools"]
    assert encoder.unread({"prompt": [ASK], "completion": [ANSWER], "system": "Be brief"}) == []


def test_messages_decide_the_type_before_a_prompt_of_text(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [ASK, ANSWER], "prompt": "Add", "prompt_id": "x"}])
    for prompts in (False, True):
        assert settle_type({"path": path}, tmp_path, prompts=prompts) == "chat"


def test_why_no_row_can_be_read_is_said_where_the_type_is_left_open(tmp_path):
    (tmp_path / "array.jsonl").write_text('[{"text": "a"}]\n')
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match=r"array\.jsonl:1: must be a JSON object"):
        settle_type({"path": str(tmp_path / "array.jsonl")}, tmp_path)
    with pytest.raises(ConfigError, match="has no rows"):
        settle_type({"path": str(tmp_path / "none.jsonl")}, tmp_path)


def test_names_within_messages_are_changed_in_json_text_too(tokenizer, tmp_path):
    tok = tokenizer("chatml")
    theirs = [{"speaker": "user", "said": "Add"}, {"speaker": "assistant", "said": "It is 2."}]
    columns = {"messages": "chat", "messages.role": "speaker", "messages.content": "said"}
    for chat in (theirs, json.dumps(theirs)):
        encoder = Encoder("chat", tok, RowOptions(), tmp_path, columns, "Be brief")
        plain = {"messages": [{"role": "system", "content": "Be brief"}, ASK, ANSWER]}
        assert encoder.encode({"chat": chat}) == encode(tok, tmp_path, "chat", plain)


def test_columns_must_name_what_the_row_has(tokenizer, tmp_path):
    tok = tokenizer("chatml")
    encoder = Encoder("chat", tok, RowOptions(), tmp_path, {"messages": "chat"})
    with pytest.raises(BadRow, match="has a column 'messages' and not 'chat'"):
        encoder.encode({"messages": [ASK, ANSWER]})
    # Also where the type is left open, and with a tokenizer that is trained on the rows
    path = write(tmp_path / "a.jsonl", [{"messages": [ASK, ANSWER]}])
    spec = {"path": path, "columns": {"messages": "chat"}}
    with pytest.raises(DataError, match=r"a\.jsonl:1: has a column 'messages' and not 'chat'"):
        list(encode_dataset(spec, tok, RowOptions(), tmp_path))


def test_a_text_is_cut_so_that_no_piece_is_a_single_token(tokenizer, tmp_path):
    tok = tokenizer("chatml")
    text = "word " * 200
    total = len(tok.encode(text)) + 1
    limit = next(n for n in range(8, total) if total % n == 1)
    path = write(tmp_path / "a.jsonl", [{"text": text}])
    options = RowOptions(sequence_len=limit)
    pieces = list(encode_dataset({"path": path, "type": "text"}, tok, options, tmp_path))
    assert min(len(piece.input_ids) for piece in pieces) == 2
    assert [i for piece in pieces for i in piece.input_ids] == [*tok.encode(text), tok.eos_id]


def test_a_row_function_that_returns_text_is_cut_as_text_is(tokenizer, tmp_path):
    (tmp_path / "mine.py").write_text("def f(row):\n    return {'text': row['story']}\n")
    path = write(tmp_path / "a.jsonl", [{"story": "word " * 200}])
    spec, options = {"path": path, "type": "mine.f"}, RowOptions(sequence_len=32)
    rows = list(encode_dataset(spec, tokenizer("chatml"), options, tmp_path))
    assert len(rows) > 5 and {row.status for row in rows} == {"kept"}


def test_a_step_without_a_trained_token_moves_nothing_and_is_counted(small_checkpoint, tmp_path):
    """Pieces of one token predict nothing: with sequence_len 1 every step is such a step."""
    path = write(tmp_path / "a.jsonl", [{"text": "one two three four five six"}])
    out = tmp_path / "out"
    run_ok("sft", *arguments(small_checkpoint, path, out, sequence_len=1, max_steps=2, logging_steps=1,
                             datasets=f"[{{path: {path}, type: text}}]"))
    assert metrics(out)[-1]["empty_steps"] == 2


def test_a_reward_does_not_apply_where_the_answer_is_null():
    for null in (None, float("nan")):
        assert exact_match(["None", "2"], [null, "2"]) == [None, 1.0]
        assert exact_match(["nan", "2"], [null, "3"]) == [None, 0.0]
        assert numeric_match(["5", "2"], [null, "2"]) == [None, 1.0]
        assert reasoning_gym(["x"], [null], [{"source_dataset": "chain_sum"}]) == [None]
        assert reasoning_gym(["x"], ["1"], [null]) == [None]


@pytest.mark.parametrize("text, value", [
    ("5e-1", 0.5), ("1e-4", 1e-4), ("1E3", 1000.0), ("-2e+1", -20.0), (".5", 0.5), ("1_000", 1000),
    ("010", 10), ("0x1F", 31), ("1:30", "1:30"), ("2026-11-27", "2026-11-27"), ("1e", "1e"),
    ("yes", True), ("Off", False), ("~", None), ("=", "="), ("'5e-1'", "5e-1"),
])
def test_values_are_read_as_people_write_them_at_every_depth(text, value):
    for form, find in (("a: {}", lambda d: d["a"]), ("a: [{}]", lambda d: d["a"][0]),
                       ("a: [{{b: {}}}]", lambda d: d["a"][0]["b"])):
        read = find(load_yaml(form.format(text), "x.yaml"))
        assert read == value and type(read) is type(value)


def test_a_key_that_is_given_twice_is_an_error_with_its_line(tmp_path):
    (tmp_path / "c.yaml").write_text("base_model: x\nlearning_rate: 1e-4\nlearning_rate: 1e-5\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:3: .*learning_rate is given twice"):
        parse_config(sft.Config, ["--config", str(tmp_path / "c.yaml")])


def test_a_weight_in_a_list_is_a_number(chat_file, tmp_path):
    (tmp_path / "c.yaml").write_text(f"base_model: x\ndatasets:\n  - {{path: {chat_file}, weight: 5e-1}}\n")
    assert parse_config(sft.Config, ["--config", str(tmp_path / "c.yaml")]).datasets[0]["weight"] == 0.5


def test_the_cache_of_encoded_rows_knows_the_helpers_of_a_row_function(tokenizer, tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("WORD = 'one'\n")
    (tmp_path / "mine.py").write_text(
        "import helper_of_mine\ndef f(row):\n    return {'text': helper_of_mine.WORD + row['x']}\n")
    path = write(tmp_path / "a.jsonl", [{"x": " more"}])
    tok, spec = tokenizer("chatml"), {"path": path, "type": "mine.f"}
    prepare([dict(spec)], tok, RowOptions(), tmp_path, tmp_path / "cache")
    (tmp_path / "helper_of_mine.py").write_text("WORD = 'two'\n")
    prepare([dict(spec)], tok, RowOptions(), tmp_path, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_held_out_data_without_a_row_is_an_error(small_checkpoint, chat_file, tmp_path):
    from conftest import run_program

    (tmp_path / "none.jsonl").write_text("\n")
    given = arguments(small_checkpoint, chat_file, tmp_path / "out", max_steps=1,
                      test_datasets=f"[{{path: {tmp_path / 'none.jsonl'}, type: chat}}]")
    done = run_program("sft", *given)
    assert done.returncode == 2 and "test_datasets" in done.stderr, done.stderr


def test_the_longest_row_beyond_the_models_positions_is_said(small_checkpoint, tmp_path):
    limit = json.loads((small_checkpoint[0] / "config.json").read_text())["max_position_embeddings"]
    path = write(tmp_path / "a.jsonl", [{"text": "word " * (limit + 10)}])
    given = arguments(small_checkpoint, path, tmp_path / "out", max_steps=1, sequence_len=limit + 8,
                      datasets=f"[{{path: {path}, type: text}}]")
    done = run_ok("sft", *given)
    assert f"the model was made for {limit}" in done.stdout and "sequence_len" in done.stdout


def test_held_out_data_of_a_folder_is_its_held_out_split(tmp_path):
    def texts(*names):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            write(folder / f"{name}.jsonl", [{"text": name}])
        config = RowOptions(datasets=[{"path": "x"}], test_datasets=[{"path": str(folder)}])
        config.check()
        return [row.value["text"] for row in read_rows(config.test_datasets[0], tmp_path)]

    assert texts("train", "test") == ["test"] and texts("train", "dev") == ["dev"]
    assert texts("train", "test", "valid") == ["test"] and texts("rows") == ["rows"]
    with pytest.raises(DataError, match="no file is of the held-out split"):
        texts("train", "train_more")
