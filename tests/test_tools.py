"""Tools: schemas beside transformers', calls as templates write them, and conversations that use them."""

import json
import time
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from conftest import ROOT, embedded, options, run_program
from dist import World
from rollouts.environments import play
from rollouts.rewards import Scorer
from rollouts.tools import Call, ToolBox, calls_in, schema_of
from rollouts.vllm_server import Completion
from run.config import ConfigError
from text.prompt import Prompt

ALONE = World(0, 1, 0, torch.device("cpu"))


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def find(words: list[str], where: Literal["title", "body"] = "title", most: int | None = None,
         weights: dict[str, float] | None = None, exact: bool = False) -> str:
    """Search the library.

    The best hit comes first.

    Args:
        words: What to look for,
            in this order.
        where: The part that is searched.
        most: How many hits.
        weights: How much each word counts.
        exact: Whether words must match whole.
    """
    return ", ".join(words)


@pytest.mark.parametrize("function", [add, find])
def test_the_schema_of_a_function_is_that_of_transformers(function):
    from transformers.utils import get_json_schema

    ours, theirs = schema_of(function), get_json_schema(function)
    theirs["function"].pop("return", None)
    described = theirs["function"]["description"]
    theirs["function"]["description"] = " ".join(described.split())
    for one in theirs["function"]["parameters"]["properties"].values():
        one["description"] = " ".join(one["description"].split())
    assert ours == theirs


def test_a_function_that_cannot_be_shown_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def silent(a: int) -> int:\n    return a\n"
        "def untyped(a):\n    'Does it.'\n"
        "def many(*a: int):\n    'Does it.'\n"
        "class Nothing:\n    'Has no tool.'\n    def reset(self, **columns): ...\n"
        "def odd(a: complex):\n    'Does it.'\n"
    )
    for name, why in (("silent", "no docstring"), ("untyped", "no type hint for a"), ("many", "names each"),
                      ("Nothing", "no public method"), ("odd", "no JSON schema")):
        with pytest.raises(ConfigError, match=rf"tools: 'mine.{name}' .*{why}"):
            ToolBox([f"mine.{name}"], tmp_path)
    with pytest.raises(ConfigError, match="cannot be imported"):
        ToolBox(["mine.absent"], tmp_path)


CALL = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
SUM = Call("add", {"a": 1, "b": 2})


@pytest.mark.parametrize("text, before, calls", [
    (f"I add.\n<tool_call>\n{CALL}\n</tool_call>", "I add.", [SUM]),
    (f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", "", [SUM, SUM]),
    (f"<tool_call>{CALL}", "", [SUM]),  # cut off behind the call
    ("<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n"
     "</tool_call>", "", [SUM]),
    ("<tool_call><function=find><parameter=words>\n[\"x y\"]\n</parameter><parameter=where>\nbody\n"
     "</parameter></function></tool_call>", "", [Call("find", {"words": ["x y"], "where": "body"})]),
    ('{"name": "add", "parameters": {"a": 1, "b": 2}}', "", [SUM]),
    ('<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}; {"name": "now", "parameters": {}}', "",
     [SUM, Call("now", {})]),
    ('{"type": "function", "name": "add", "parameters": {"a": 1, "b": 2}}', "", [SUM]),
    (f"[TOOL_CALLS][{CALL}, {CALL}]", "", [SUM, SUM]),
    ('[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]now[ARGS]{}', "", [SUM, Call("now", {})]),
    ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}</tool_call>', "", [SUM]),
    ("The answer is 3.", "The answer is 3.", []),
    ('Use {"a": 1}.', 'Use {"a": 1}.', []),
    ("", "", []),
])
def test_calls_are_read_as_each_family_writes_them(text, before, calls):
    assert calls_in(text) == (before, calls)


@pytest.mark.parametrize("text, why", [
    ("<tool_call>{not json}</tool_call>", "is not JSON"), ("<tool_call>[1]</tool_call>", "must be"),
    ('<tool_call>{"name": 3}</tool_call>', "must be"), ("<tool_call></tool_call>", "is not JSON"),
    ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "must be an object"),
    ('<tool_call>{"name": "add", "arguments": "x"}</tool_call>', "not JSON"),
    ("<tool_call><function></tool_call>", "is not JSON"), ("<|python_tag|>print(1)", "is not JSON"),
    ("[TOOL_CALLS]add[ARGS]{", "not JSON"),
])
def test_a_call_that_cannot_be_read_says_why(text, why):
    _, calls = calls_in(text)
    assert len(calls) == 1 and why in calls[0].problem


def test_what_a_template_writes_of_a_call_is_read_back(tokenizer):
    coder = tokenizer("qwen3")
    messages = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "I add.",
         "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]},
    ]
    written = coder.render(messages, [schema_of(add)])
    after = written[written.index("I add.") :]
    assert calls_in(after.split("<|im_end|>")[0]) == ("I add.", [SUM])


class Scripted:
    """An engine that says what the script says, turn by turn; it keeps what it was asked."""

    def __init__(self, tokenizer, *turns, stop="<|im_end|>"):
        self.asked, self.turns = [], [
            [*tokenizer.encode(turn), tokenizer.added[stop]] for turn in turns
        ]

    def version(self, step):
        return step

    def generate(self, prompts, n, **_):
        self.asked.append(prompts)
        ids = self.turns[len(self.asked) - 1]
        return [[Completion(ids, [-0.5] * len(ids), "stop") for _ in range(n)] for _ in prompts]


def conversation(coder, box, *turns, columns=None, timeout=5.0, **more):
    question = [{"role": "user", "content": "1 + 2?"}]
    ids = coder.encode_prompt(question, box.schemas)
    engine = Scripted(coder, *turns)
    prompt = Prompt(ids, question, columns or {}, "f:1", tools=box.schemas)
    rollouts = play(
        engine, box.environment(coder, timeout), [prompt], [0], 2, step=0, seed=(1,),
        options=options(max_completion_length=2000, **more), tokenizer=coder, world=ALONE,
    )
    return engine, rollouts


TOOLS = '''
import time

def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b

async def later(a: int) -> dict:
    """Give it back."""
    return {"a": a}

def stuck() -> str:
    """Never answers."""
    time.sleep(60)

class Counter:
    def reset(self, start=0, **columns):
        self.count = start

    def up(self, by: int = 1) -> int:
        """Count up."""
        self.count += by
        return self.count
'''


@pytest.fixture
def box(tmp_path):
    (tmp_path / "kit.py").write_text(TOOLS)
    return ToolBox(["kit.add", "kit.later", "kit.stuck", "kit.Counter"], tmp_path)


def test_calls_are_made_and_their_results_are_read_but_not_trained_on(box, tokenizer):
    coder = tokenizer("qwen3")
    call = f"I add.\n<tool_call>\n{CALL}\n</tool_call>"
    engine, (one, two) = conversation(coder, box, call, "3", columns={"answer": "3"})
    assert len(engine.asked) == 2 and one.rewards == {} and not one.truncated
    heard = coder.decode(one.completion_ids[~one.written()], special=True)
    assert "<tool_response>\n3\n</tool_response>" in heard and heard.endswith("<|im_start|>assistant\n")
    own = coder.decode(one.completion_ids[one.written()], special=True)
    assert own == call + "<|im_end|>3<|im_end|>"
    # What the model read before its second answer is what the template makes of the conversation
    question = {"role": "user", "content": "1 + 2?"}
    whole = coder.render([question, *one.messages[:-1]], box.schemas, generation_prompt=True)
    assert coder.decode(engine.asked[1][0], special=True) == whole
    assert [m["role"] for m in one.messages] == ["assistant", "tool", "assistant"]
    assert one.messages[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1, "b": 2}}
    config = SimpleNamespace(
        reward_funcs=["exact_match"], config_directory=".", reward_format="", reward_timeout=5.0
    )
    scorer = Scorer(config, coder)
    prompts = [Prompt([1], [question], {"answer": "3"}, "f:1")] * 2
    started = scorer.begin(prompts, [one.completion_ids, two.completion_ids], [one.messages, two.messages])
    assert scorer.finish(started) == {"exact_match": [1.0, 1.0]}  # the last answer is judged


def says(rollout):
    return [m["content"] for m in rollout.messages if m["role"] == "tool"]


def test_what_goes_wrong_is_answered_with_an_error_text(box, tokenizer):
    def call(name, **arguments):
        return "<tool_call>" + json.dumps({"name": name, "arguments": arguments}) + "</tool_call>"

    several = call("gone") + call("add", a=1) + call("add", a=1, b="x") + call("later", a=4)
    several += "<tool_call>{</tool_call>"
    _, (one, _) = conversation(tokenizer("qwen3"), box, several, "done")
    gone, missing, wrong, later, broken = says(one)
    assert gone == "error: there is no tool 'gone'; there are add, later, stuck, up"
    assert missing == "error: missing a required argument: 'b'" and wrong.startswith("error: TypeError: ")
    assert later == '{"a": 4}' and broken.startswith("error: it is not JSON")
    begun = time.monotonic()
    _, (one, _) = conversation(tokenizer("qwen3"), box, call("stuck"), "done", timeout=0.3)
    assert says(one) == ["error: no answer within 0.3 seconds"] and time.monotonic() - begun < 10


def test_each_conversation_has_its_own_objects(box, tokenizer):
    up = '<tool_call>{"name": "up", "arguments": {"by": 2}}</tool_call>'
    _, rollouts = conversation(tokenizer("qwen3"), box, up + up, up, "done", columns={"start": 10})
    assert [says(r) for r in rollouts] == [["12", "14", "16"]] * 2


def test_a_conversation_ends_after_max_turns(box, tokenizer):
    call = f"<tool_call>{CALL}</tool_call>"
    engine, (one, _) = conversation(tokenizer("qwen3"), box, *[call] * 5, max_turns=3)
    assert len(engine.asked) == 3 and one.messages[-1]["role"] == "tool"


def test_a_run_with_tools_shows_them_in_the_prompt_and_refuses_rows_that_bring_others(
    task, small_checkpoint, tokenizer_directory, tmp_path
):
    (tmp_path / "kit.py").write_text(TOOLS)
    rows = [json.loads(line) for line in (task / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters.py").write_text((task / "letters.py").read_text())
    (tmp_path / "tools.jinja").write_text(json.loads(
        (tokenizer_directory("qwen3") / "tokenizer_config.json").read_text()
    ).get("chat_template") or (tokenizer_directory("qwen3") / "chat_template.jinja").read_text())
    given = embedded(
        tmp_path, small_checkpoint[0], tmp_path / "run", "tools=[kit.add]", "max_steps=1",
        f"chat_template={tmp_path / 'tools.jinja'}", "reward_funcs=[letters.spread]", "max_turns=2",
    )
    done = run_program(ROOT / "grpo.py", *given)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "run" / "rollouts" / "step-0.jsonl").read_text().splitlines()[0])
    assert "Add two numbers." in row["prompt"] and row["messages"][0]["role"] == "assistant"
    rows[3]["tools"] = [schema_of(add)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_program(ROOT / "grpo.py", *given, "output_dir=" + str(tmp_path / "other"))
    assert done.returncode == 2 and "rows.jsonl:4: has tools of its own" in done.stderr, done.stderr
