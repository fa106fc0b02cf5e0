import json
import subprocess
import sys

import pytest
import torch

from conftest import (
    CHATML_TOKENS,
    CONVERSATIONS,
    QWEN3_TEMPLATE,
    ROOT,
    TOOLS,
    arguments,
    run_program,
    trained_text,
    write,
    write_tokenizer,
)
from data import (
    DataOptions,
    Encoder,
    RowOptions,
    encode_dataset,
    prepare,
    read_prompts,
    settle_type,
    trained_tokenizer,
    without_thinking,
)
from run.config import ConfigError, DataError
from text.inspection import InspectOptions, turns_without_end
from text.packing import Dataset
from text.templates import BadRow
from text.tokenizer import IGNORE, Tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


def encode_all(spec, tok, directory=ROOT, **options):
    return list(encode_dataset(spec, tok, RowOptions(datasets=[spec], **options), directory))


def test_prompt_and_completion_are_tokenised_apart_and_eos_is_trained(tokenizer, tmp_path):
    tok = tokenizer("llama3")
    path = write(tmp_path / "a.jsonl", [{"prompt": "de", "completion": "f x"}])
    (row,) = encode_all({"path": path, "type": "prompt_completion"}, tok)
    prompt, completion = tok.encode_start("de"), tok.encode("f x")
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
]


@pytest.mark.parametrize("kind, row, reason", BAD_ROWS)
def test_a_bad_row_stops_with_file_and_line_or_is_counted(kind, row, reason, tokenizer, tmp_path):
    good = {"messages": CONVERSATIONS["one turn"], "instruction": "a", "output": "b", "prompt": "a",
    "completion": "b",
            "text": "a b c d", "input_ids": [1, 2]}
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
        Encoder("chta", tok, RowOptions(), tmp_path)


def test_prepared_data_is_reused_until_anything_that_matters_changes(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "three"}])
    tok, cache = tokenizer("chatml"), tmp_path / "cache"
    spec = {"path": path, "type": "text"}

    def prepared(**options):
        return prepare([spec], tok, RowOptions(datasets=[spec], **options), ROOT, cache)

    first = prepared()
    assert prepared().fingerprint == first.fingerprint and len(list(cache.iterdir())) == 1
    prepared(sequence_len=4)
    assert len(list(cache.iterdir())) == 2
    write(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "other"}])
    assert prepared().fingerprint != first.fingerprint
    found = len(list(cache.iterdir()))
    (tmp_path / "edited.py").write_text("# masks made in another way")
    monkeypatch.setattr("data.getfile", lambda _: tmp_path / "edited.py")  # a file of text/ was edited
    prepared()
    assert len(list(cache.iterdir())) == found + 1 and not list(cache.glob(".*"))


def test_a_damaged_cache_is_made_again_and_two_runs_may_share_one(tokenizer, tmp_path):
    rows = [{"text": f"words {i} " * 5} for i in range(20)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    specs = [{"path": "r.jsonl", "type": "text"}]

    def made(cache="cache"):
        return prepare(specs, tokenizer("chatml"), RowOptions(datasets=specs), tmp_path, tmp_path / cache)

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
    options = InspectOptions(datasets=[{"path": path, "type": "instruct"}], tokenizer_vocab_size=300)
    tok = trained_tokenizer(options, tmp_path, tmp_path / "cache")
    assert tok.vocab_size <= 300 and len(tok.encode("1234")) == 4
    assert tok.decode(tok.encode("héllo 日本 12")) == "héllo 日本 12"
    stamp = next((tmp_path / "cache").iterdir()).stat().st_mtime_ns
    again = trained_tokenizer(options, tmp_path, tmp_path / "cache")
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


def test_reasoning_traces_are_taken_out_of_answers_only():
    row = {
        "messages": [{"role": "user", "content": "<think>mine</think>?"},
                     {"role": "assistant", "content": "<think>a\nb</think>\n\n4", "reasoning_content": "c"}],
        "output": "<think>x</think>5", "completion": "6<think>never ends", "input": "<think>y</think>z",
    }
    plain = without_thinking(row)
    assert plain["messages"] == [row["messages"][0], {"role": "assistant", "content": "4"}]
    assert (plain["output"], plain["completion"], plain["input"]) == ("5", "6", "<think>y</think>z")
    with pytest.raises(BadRow, match="nothing is left"):
        without_thinking({"completion": "<think>only"})


SHAREGPT_TOOLS = {
    "conversations": [
        {"from": "human", "value": "Add"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": [{"type": "text", "text": "It is 2."}]},
    ],
    "tools": json.dumps([tool["function"] for tool in TOOLS]),
    "system": "Be brief.",
}
AS_MESSAGES = [{"role": "system", "content": "Be brief."}, *CONVERSATIONS["tools"]]


@pytest.mark.parametrize(
    "value",
    [
        '{"name": "add", "arguments": {"a": 1}}', '[{"name": "add", "arguments": {"a": 1}}]',
        '{"name": "add", "arguments": "{\\"a\\": 1}"}',
    ],
)
def test_sharegpt_rows_with_tools_are_the_conversation_that_they_mean(value, tokenizer, tmp_path):
    row = json.loads(json.dumps(SHAREGPT_TOOLS))
    row["conversations"][1]["value"] = value
    path = write(tmp_path / "a.jsonl", [row, {"messages": AS_MESSAGES, "tools": TOOLS}])
    rows = encode_all({"path": path, "type": "chat"}, tokenizer("qwen3"))
    assert rows[0].input_ids == rows[1].input_ids and rows[0].labels == rows[1].labels
    assert "Be brief." in tokenizer("qwen3").decode(rows[0].input_ids)
    (first, second), _ = read_prompts(
        [{"path": path, "type": "chat"}], tokenizer("qwen3"), DataOptions(), ROOT
    )
    assert first.ids == second.ids and first.completion == second.completion == "It is 2."
    assert first.tools == second.tools == TOOLS


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [], "chosen": "a", "rejected": "b"}, r"preference data .*: \{messages: chosen\}"),
        ({"prompt": "a", "completion": "b", "label": True}, r"preference data .* true or false"),
        ({"messages": CONVERSATIONS["one turn"], "images": ["a.png"]}, "has images"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "part of type 'audio'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "a part that is str"),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "function_call must be JSON"),
        ({"conversations": [{"from": "function_call", "value": "[1]"}]}, "must be {name, arguments}"),
        ({"messages": [{"role": "system", "content": "a"}, *CONVERSATIONS["one turn"]], "system": "b"},
         "another system message"),
        ({"messages": CONVERSATIONS["one turn"], "tools": "no"}, "tools is text that is not JSON"),
        ({"messages": CONVERSATIONS["one turn"], "tools": {"a": 1}}, "tools must be a list"),
    ],
)
def test_rows_that_mean_something_else_are_refused_by_name(row, reason, tokenizer, tmp_path):
    kind = "prompt_completion" if "completion" in row else "chat"
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=reason):
        encode_all({"path": path, "type": kind}, tokenizer("chatml"))
    with pytest.raises(DataError, match=reason):
        read_prompts([{"path": path, "type": kind}], tokenizer("chatml"), DataOptions(), ROOT)


def test_one_side_of_preference_data_can_be_chosen_by_its_column(tokenizer, tmp_path):
    row = {"chosen": CONVERSATIONS["one turn"], "rejected": CONVERSATIONS["system"]}
    path = write(tmp_path / "a.jsonl", [row])
    (encoded,) = encode_all(
        {"path": path, "type": "chat", "columns": {"messages": "chosen"}}, tokenizer("chatml")
    )
    assert encoded.labels == tokenizer("chatml").encode_chat(CONVERSATIONS["one turn"])[1]
    assert encoded.unread == ["rejected"]


def test_columns_that_nothing_reads_are_named_once_in_the_log_and_by_inspect(small_checkpoint, tmp_path):
    rows = [{"messages": CONVERSATIONS["one turn"], "quality": 3, "source": "web", "id": None, "system": ""}
            for _ in range(4)]
    chats = write(tmp_path / "a.jsonl", [*rows, {"messages": CONVERSATIONS["system"], "source": "book"}])
    line = "nothing reads these columns: quality (4 rows), source (5 rows)"
    for _ in range(2):  # the second run finds the rows prepared
        done = run_program(
            ROOT / "sft.py", *arguments(small_checkpoint, chats, tmp_path / "out", max_steps=1),
            f"dataset_prepared_path={tmp_path / 'prepared'}",
        )
        assert done.stdout.count(line) == 1, done.stdout + done.stderr
    done = run_program(
        ROOT / "data.py", "inspect", f"base_model={small_checkpoint[0]}",
        f"datasets=[{{path: {chats}, type: chat}}]",
    )
    assert f"warning: {line}" in done.stdout, done.stdout + done.stderr


def test_inspect_warns_of_every_answer_without_a_trained_end_and_of_calls_that_are_not_shown(tmp_path):
    """One template's generation blocks leave the end out, another knows no calls."""
    header, end = "{{- '<|im_start|>assistant\\n' }}\n{%- if loop", "{{- '<|im_end|>\\n' }}\n{%- elif"
    template = QWEN3_TEMPLATE.replace(header, header.replace("\n", "{% generation %}\n"))
    template = template.replace(end, "{% endgeneration %}" + end)
    assert template.count("generation %}") == 2
    directory = write_tokenizer(tmp_path / "t", template, CHATML_TOKENS, "<|im_end|>")
    tok = Tokenizer.load(directory)
    path = write(tmp_path / "a.jsonl", [{"messages": CONVERSATIONS["tools"], "tools": TOOLS}])
    (row,) = encode_all({"path": path, "type": "chat"}, tok)
    assert turns_without_end(row, set(tok.stop_ids)) == 2
    (good,) = encode_all({"path": path, "type": "chat"}, Tokenizer.load(write_tokenizer(
        tmp_path / "good", QWEN3_TEMPLATE, CHATML_TOKENS, "<|im_end|>")))
    assert turns_without_end(good, set(tok.stop_ids)) == 0 and not good.lost
    no_calls = QWEN3_TEMPLATE.replace("message.tool_calls or []", "[]")
    (row,) = encode_all({"path": path, "type": "chat"}, Tokenizer.load(write_tokenizer(
        tmp_path / "none", no_calls, CHATML_TOKENS, "<|im_end|>")))
    assert row.lost == ["tool calls"]
    for name, expected in (
        ("t", f"2 answers in 1 rows do not end with a trained stop token ({path}:1)"),
        ("none", f"the chat template does not show the tool calls of 1 rows (first {path}:1)"),
    ):
        done = run_program(
            ROOT / "data.py",
            "inspect",
            f"base_model={tmp_path / name}",
            f"datasets=[{{path: {path}, type: chat}}]",
        )
        assert f"warning: {expected}" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("row, kind", [
    ({"messages": CHAT}, "chat"), ({"conversations": CHAT, "text": "x"}, "chat"),
    ({"prompt": "q", "completion": "a"}, "prompt_completion"),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt_completion"),
    ({"instruction": "q", "output": "a", "text": "both"}, "instruct"), ({"input_ids": [1, 2]}, "tokens"),
    ({"text": "a"}, "text"), ({"id": 3}, None),
])
def test_a_type_that_is_left_out_is_the_one_that_the_columns_show(row, kind, tmp_path):
    write(tmp_path / "rows.jsonl", [row])
    spec = {"path": "rows.jsonl"}
    if kind is None:
        with pytest.raises(ConfigError, match=r"columns \(id\) do not show a type; set type: chat"):
            settle_type(spec, tmp_path)
        return
    assert settle_type(spec, tmp_path) == kind and spec["type"] == kind
    spec = {"path": "rows.jsonl"}
    if kind in ("text", "tokens"):
        with pytest.raises(ConfigError, match="do not show a type"):
            settle_type(spec, tmp_path, prompts=True)
    else:
        assert settle_type(spec, tmp_path, prompts=True) == kind


def test_a_bare_prompt_is_enough_for_recipes_that_sample(tmp_path):
    for prompt, kind in (("q", "prompt_completion"), (CHAT[:1], "chat")):
        write(tmp_path / "rows.jsonl", [{"prompt": prompt, "answer": "4"}])
        assert settle_type({"path": "rows.jsonl"}, tmp_path, prompts=True) == kind


def test_columns_rename_what_messages_hold_and_leave_no_second_copy(tokenizer, tmp_path):
    dialog = [{"speaker": "user", "said": "Hi"}, {"speaker": "assistant", "said": "Yes"}]
    write(tmp_path / "rows.jsonl", [{"dialog": dialog}, {"dialog": dialog}])
    columns = {"messages": "dialog", "messages.role": "speaker", "messages.content": "said"}
    spec = {"path": "rows.jsonl", "type": "chat", "columns": columns}
    made = next(encode_dataset(spec, tokenizer("chatml"), RowOptions(), tmp_path))
    assert (made.input_ids, made.labels) == tokenizer("chatml").encode_chat(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    )
    # instruct reads `input` too: the column that became the instruction is not read a second time
    write(tmp_path / "code.jsonl", [{"input": "Add.", "output": "1"}])
    spec = {"path": "code.jsonl", "type": "instruct", "columns": {"instruction": "input"}}
    made = next(encode_dataset(spec, tokenizer("chatml"), RowOptions(), tmp_path))
    assert tokenizer("chatml").decode(made.input_ids).count("Add.") == 1


def test_the_system_message_of_a_data_set_begins_the_conversations_that_have_none(tokenizer, tmp_path):
    own = [{"role": "system", "content": "Mine."}, *CHAT]
    rows = [{"messages": CHAT}, {"messages": own}, {"messages": CHAT, "system": "The row's."}]
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / "instruct.jsonl", [{"instruction": "Hi", "output": "Yes"}])
    tok = tokenizer("chatml")
    for path, kind, expected in (("rows.jsonl", "chat", ["Be brief.", "Mine.", "The row's."]),
                                 ("instruct.jsonl", "instruct", ["Be brief."])):
        spec = {"path": path, "type": kind, "system": "Be brief."}
        made = [tok.decode(row.input_ids) for row in encode_dataset(spec, tok, RowOptions(), tmp_path)]
        assert [text.split("system\n")[1].split("user")[0].strip() for text in made] == expected
        prompts, _ = read_prompts([spec], tok, DataOptions(datasets=[spec]), tmp_path)
        assert [tok.decode(p.ids).split("system\n")[1].split("user")[0].strip() for p in prompts] == expected
    write(tmp_path / "text.jsonl", [{"prompt": "q", "completion": "a"}])
    spec = {"path": "text.jsonl", "type": "prompt_completion", "system": "Be brief."}
    with pytest.raises(DataError, match="no conversation that the data set's system message"):
        list(encode_dataset(spec, tok, RowOptions(), tmp_path))
