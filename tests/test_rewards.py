"""Rewards: the built-in ones, how functions are called, and what is said when one is wrong."""

import pytest

from conftest import options
from rollouts import rewards
from rollouts.rewards import RewardError
from rollouts.rollout import Rollout
from rollouts.sampler import ReplayBuffer, pass_at_k
from run.config import ConfigError
from text.packing import PromptOrder
from text.tokenizer import Tokenizer

REWARDS = """
import asyncio, time
from conftest import options
def good(completions, answer, **_): return [float(a in c) for c, a in zip(completions, answer)]
async def patient(completions, **_):
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)
def sometimes(completions, **_): return [None if i % 2 else 2.0 for i, _ in enumerate(completions)]
def short(completions, **_): return [1.0]
def nan(completions, **_): return [float("nan")] * len(completions)
def words(completions, **_): return ["much"] * len(completions)
def raises(completions, answer, **_):
    if "b" in answer: raise ValueError("no b please")
    return [0.0] * len(completions)
def wants(completions, solution): return [0.0] * len(completions)
def slow(completions, **_):
    time.sleep(30)
"""


@pytest.fixture(scope="module")
def scoring(tmp_path_factory, tokenizer_directory):
    from data import Prompt

    directory = tmp_path_factory.mktemp("rewards")
    (directory / "rewards_of_test.py").write_text(REWARDS)
    tokenizer = Tokenizer.load(tokenizer_directory("chatml"))
    prompts = [Prompt([5], "p", {"answer": a}, f"rows.jsonl:{i + 1}") for i, a in enumerate("abc")]
    ids = [tokenizer.encode(text) for text in ("a cat", "none", "c")]

    def score(*names, **changes):
        config = options(reward_funcs=list(names), output_dir=str(directory / "out"), **changes)
        config.config_directory = str(directory)
        scorer = rewards.Scorer(config, tokenizer)
        return scorer.finish(scorer.begin(prompts, ids))

    return score, directory


def test_reward_functions_sync_and_async_score_by_name(scoring):
    score, _ = scoring
    names = [f"rewards_of_test.{n}" for n in ("good", "patient", "sometimes")]
    assert score(*names, "length") == {
        "good": [1.0, 0.0, 1.0], "patient": [1.0] * 3, "sometimes": [2.0, None, 2.0], "length": [0.0] * 3,
    }


@pytest.mark.parametrize(
    "name, named",
    [
        ("short", "returned 1, wanted a list of 3"),
        ("nan", r"returned nan for rows.jsonl:1, completion 'a cat'"),
        ("words", "returned 'much' for rows.jsonl:1"),
        ("raises", r"ValueError: no b please, on rows.jsonl:2, completion 'none'"),
        ("wants", "it gets the columns answer"), ("slow", r"no answer within 0.2 s \(reward_timeout\)"),
    ],
)
def test_a_reward_function_that_fails_is_named_with_row_and_completion(name, named, scoring):
    score, directory = scoring
    with pytest.raises(RewardError, match=named):
        score(f"rewards_of_test.{name}", reward_timeout=0.2)
    if name == "raises":
        assert "no b please" in (directory / "out" / "incidents" / "reward-raises.txt").read_text()


@pytest.mark.parametrize("name", ["nowhere.f", "rewards_of_test.absent", "no_such_builtin"])
def test_a_reward_function_that_cannot_be_imported_says_where_it_was_looked_for(name, scoring):
    score, directory = scoring
    with pytest.raises(ConfigError) as caught:
        score(name)
    if "." in name:
        assert str(directory) in str(caught.value) and "python -c" in str(caught.value)
    else:
        assert "exact_match" in str(caught.value)


@pytest.mark.parametrize(
    "text, expected, right",
    [
        ("so it is 1,234", "1234", 1), ("#### 18", "steps … #### 18", 1), ("the answer is 1/2.", "0.5", 1),
        ("-3", "3", 0), ("no number", "3", 0), ("3 then 4", "3", 0), ("7.0", "7", 1),
    ],
)
def test_numeric_match_reads_the_last_number(text, expected, right):
    assert rewards.numeric_match([text], [expected]) == [float(right)]


def test_built_in_rewards_on_text_and_messages():
    assert rewards.exact_match([" 5 ", [{"role": "assistant", "content": "6"}]], ["5", "5"]) == [1.0, 0.0]
    built_in = rewards.built_in_rewards(options(max_completion_length=10))
    assert built_in["length"](completion_ids=[[1] * 8, [1] * 9, [1] * 10, [1] * 12]) == [
        0.0,
        -0.5,
        -1.0,
        -1.0,
    ]
    assert built_in["format"](completions=["<think>a</think> <answer>b</answer>", "b"]) == [1.0, 0.0]


def test_the_reasoning_gym_scorer_uses_the_tasks_own_verifier():
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset("chain_sum", size=1, seed=0)[0]
    columns = {k: [entry[k]] * 2 for k in ("answer", "metadata", "question")}
    assert rewards.reasoning_gym([entry["answer"], "x"], **columns)[0] == 1.0


def test_pass_at_k_equals_counting():
    import itertools

    for n, right, k in ((5, 2, 3), (4, 0, 2), (4, 4, 1), (6, 1, 6)):
        flags = [1] * right + [0] * (n - right)
        draws = list(itertools.combinations(flags, k))
        assert pass_at_k(right, n, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


def test_the_order_of_prompts_is_a_permutation_of_each_epoch_and_depends_on_the_seed_only():
    order = PromptOrder([0] * 10, 4, seed=3)
    drawn = [i for b in range(5) for i in order.batch(b)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert PromptOrder([0] * 10, 4, seed=3).batch(3) == drawn[12:16]
    assert PromptOrder([0] * 10, 4, seed=4).batch(0) != drawn[:4]


def test_the_replay_buffer_stands_in_for_flat_groups_newest_first():
    def group(name, advantage):
        return [Rollout([1], [2], row=name, advantage=a) for a in (advantage, -advantage)]

    buffer = ReplayBuffer(2)
    first, replaced = buffer.refill(group("a", 1.0) + group("b", 0.0), 2)
    assert [r.row for r in first] == ["a", "a", "b", "b"] and replaced == 0
    second, replaced = buffer.refill(group("c", 0.0) + group("d", 1.0), 2)
    assert [r.row for r in second] == ["a", "a", "d", "d"] and replaced == 1
    assert [g[0].row for g in buffer.groups] == ["d"]
