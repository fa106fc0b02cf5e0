"""Environments: calls at the same time, time-outs, coroutines, and rewards of turns."""

import asyncio
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from checkpoints.weights import load_pretrained
from conftest import ROOT, embedded, metrics, options, run_ok, run_program
from dist import World
from rollouts.bridges import Gymnasium, OpenEnv
from rollouts.engines import EmbeddedEngine
from rollouts.environments import TimedOut, play, run_all
from rollouts.vllm_server import Completion
from run.config import BallastError
from text.prompt import Prompt
from text.tokenizer import Tokenizer

ALONE = World(0, 1, 0, torch.device("cpu"))


def test_calls_run_at_the_same_time_and_come_back_in_order():
    barrier, most, running = threading.Barrier(4, timeout=10), [0], [0]
    lock = threading.Lock()

    def together(i):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        barrier.wait()  # passes only if four run at once
        with lock:
            running[0] -= 1
        return i

    assert run_all([lambda i=i: together(i) for i in range(8)], 4, 10.0) == [*range(8)]
    assert most[0] == 4


def test_a_late_call_costs_itself_and_no_other():
    begun = time.monotonic()
    found = run_all([lambda: time.sleep(30), lambda: 1, lambda: time.sleep(30), lambda: 2], 2, 0.3)
    assert time.monotonic() - begun < 5
    assert isinstance(found[0], TimedOut) and isinstance(found[2], TimedOut) and found[1::2] == [1, 2]


def test_coroutines_share_one_loop_and_errors_come_back():
    async def which():
        await asyncio.sleep(0.01)
        return id(asyncio.get_running_loop())

    async def broken():
        raise ValueError("no")

    a, b, c = run_all([which, which, broken], 3, 10.0)
    assert a == b and isinstance(c, ValueError)
    assert run_all([], 3, 1.0) == []


class Slow:
    """Ends at once, but never answers to every fourth prompt; async where it says so."""

    def reset(self, prompt, number=0, **columns):
        self.number = number

    async def step(self, text, ids):
        if self.number % 4 == 3:
            await asyncio.sleep(60)
        return None, 1.0, True


def engine_of(checkpoint, **changes):
    model = load_pretrained(str(checkpoint), dtype=torch.float32)
    tokenizer, config = Tokenizer.load(checkpoint), options(max_completion_length=6, **changes)
    return EmbeddedEngine(model, config, tokenizer, ALONE), tokenizer, config


def test_a_row_whose_environment_is_late_is_neither_scored_nor_trained(small_checkpoint):
    engine, tokenizer, config = engine_of(small_checkpoint[0], environment_timeout=0.5)
    prompts = [Prompt([5, 6 + k], "a question", {"number": k}, f"f:{k}") for k in range(4)]
    rollouts = play(engine, Slow, prompts, [0, 1, 2, 3], 2, step=0, seed=(1,), options=config,
                    tokenizer=tokenizer, world=ALONE)
    assert [r.failed for r in rollouts] == [False] * 6 + [True] * 2
    assert [r.rewards["environment"] for r in rollouts] == [1.0] * 6 + [None] * 2
    assert not any(r.written().any() for r in rollouts[6:]) and all(r.written().any() for r in rollouts[:6])
    assert all(r.step_ends.tolist() == [len(r.completion_ids)] for r in rollouts[:6])


def test_an_environment_that_never_begins_leaves_a_row_without_a_trained_token(small_checkpoint):
    class Never:
        def reset(self, prompt, **columns):
            time.sleep(30)

    engine, tokenizer, config = engine_of(small_checkpoint[0], environment_timeout=0.2)
    one, two = play(engine, Never, [Prompt([5, 6], "q", {}, "f:1")], [0], 2, step=0, seed=(1,),
                    options=config, tokenizer=tokenizer, world=ALONE)
    assert one.failed and len(one.completion_ids) == 1 and not one.written().any()
    assert np.isnan(two.sampling_logprobs).all()


def test_what_an_environment_raises_is_named_with_the_row(small_checkpoint):
    class Broken(Slow):
        async def step(self, text, ids):
            raise KeyError("board")

    engine, tokenizer, config = engine_of(small_checkpoint[0])
    with pytest.raises(BallastError, match=r"environment: step raised KeyError: 'board', on f:7, turn 1"):
        play(engine, Broken, [Prompt([5, 6], "q", {}, "f:7")], [0], 2, step=0, seed=(1,), options=config,
             tokenizer=tokenizer, world=ALONE)


TURNS = """
import asyncio

class Three:
    def reset(self, prompt, **columns):
        self.turn = 0

    async def step(self, text, ids):
        await asyncio.sleep(0.01)
        self.turn += 1
        return f" {self.turn}", len(set(ids)) / 10, self.turn == 3
"""


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_turns_are_rewarded_each_for_itself(ranks, task, small_checkpoint, tmp_path):
    (tmp_path / "three.py").write_text(TURNS)
    (tmp_path / "rows.jsonl").write_text((task / "rows.jsonl").read_text())
    given = embedded(
        tmp_path, small_checkpoint[0], tmp_path / "run", "environment=three.Three", "reward_funcs=[]",
        "advantage_level=step", "max_completion_length=40", "max_steps=2", f"micro_batch_size={8 // ranks}",
        "val_set_size=0",
    )
    run_ok(ROOT / "grpo.py", *given, ranks=ranks)
    rows = [row for row in metrics(tmp_path / "run") if row["step"]]
    assert all(row["environment/turns"] >= 1 and row["environment/timeouts"] == 0 for row in rows)
    lines = (tmp_path / "run" / "rollouts" / "step-0.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert len(row["step_ends"]) == len(row["step_rewards"]) > 0
        assert row["rewards"]["environment"] == pytest.approx(sum(row["step_rewards"]), abs=1e-5)
        assert row["step_ends"][-1] <= len(row["completion_ids"])


def test_an_environment_that_is_late_in_a_run_is_counted(task, small_checkpoint, tmp_path):
    (tmp_path / "late.py").write_text(
        "import time\n"
        "class Late:\n"
        "    def reset(self, prompt, answer='0', **columns):\n"
        "        self.late = int(answer) % 3 == 0\n"
        "    def step(self, text, ids):\n"
        "        time.sleep(20 if self.late else 0)\n"
        "        return None, sum(ids) % 7 / 7, True\n"
    )
    (tmp_path / "rows.jsonl").write_text((task / "rows.jsonl").read_text())
    done = run_program(ROOT / "grpo.py", *embedded(
        tmp_path, small_checkpoint[0], tmp_path / "run", "environment=late.Late", "reward_funcs=[]",
        "environment_timeout=1", "max_steps=2", "micro_batch_size=24", "val_set_size=0",
    ), timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [row for row in metrics(tmp_path / "run") if row["step"]]
    assert sum(row["environment/timeouts"] for row in rows) > 0
    assert all(row["train/grad_norm"] > 0 for row in rows)


# Bridges ----------------------------------------------------------------------------------------------------


class Says:
    """An engine that answers what it is told to, turn by turn."""

    def __init__(self, tokenizer, *answers):
        self.tokenizer, self.answers, self.asked = tokenizer, [*answers], []

    def version(self, step):
        return step

    def generate(self, prompts, n, **_):
        self.asked.append([self.tokenizer.decode(ids, special=True) for ids in prompts])
        ids = [*self.tokenizer.encode(self.answers.pop(0)), self.tokenizer.turn_end()]
        return [[Completion(ids, [-0.5] * len(ids), "stop") for _ in range(n)] for _ in prompts]


def games(coder, environment, *answers, columns=None, n=1):
    question = [{"role": "user", "content": "Play."}]
    prompt = Prompt(coder.encode_prompt(question), question, columns or {}, "f:1")
    engine = Says(coder, *answers)
    rollouts = play(engine, environment, [prompt], [0], n, step=0, seed=(1,), tokenizer=coder, world=ALONE,
                    options=options(max_completion_length=1000))
    return engine, rollouts


def test_a_game_of_gymnasium_is_played(tokenizer):
    gymnasium = pytest.importorskip("gymnasium")

    class Lake(Gymnasium):
        make = staticmethod(lambda: gymnasium.make("FrozenLake-v1", is_slippery=False))
        penalty = -0.1

        def action(self, text):
            return ["left", "down", "right", "up"].index(text.strip())

        def text(self, observation):
            return f"You stand on field {observation}."

    coder = tokenizer("chatml")
    way = ["down", "down", "right", "fly", "right", "down", "right"]
    engine, (one,) = games(coder, Lake, *way, columns={"seed": 3})
    assert engine.asked[0][0].endswith("Play.\n\nYou stand on field 0.<|im_end|>\n<|im_start|>assistant\n")
    said = [m["content"] for m in one.messages if m["role"] == "user"]
    assert said[:3] == ["You stand on field 4.", "You stand on field 8.", "You stand on field 9."]
    assert said[3].startswith("error: 'fly' is no action") and said[-1] == "You stand on field 15."
    assert one.rewards["environment"] == pytest.approx(0.9) and len(one.step_ends) == 7
    assert coder.decode(one.completion_ids[one.written()]) == "".join(way)


def test_the_completions_of_a_prompt_play_the_same_game(tokenizer):
    gymnasium = pytest.importorskip("gymnasium")

    class Cards(Gymnasium):
        make = staticmethod(lambda: gymnasium.make("Blackjack-v1"))

        def action(self, text):
            return {"stick": 0, "hit": 1}[text.strip()]

    engine, _ = games(tokenizer("chatml"), Cards, "stick", columns={"seed": 11}, n=8)
    assert len(engine.asked[0]) == 1  # one prompt for all eight: one prefill serves them


def test_a_client_of_openenv_is_played(tokenizer):
    """As openenv's EnvClient answers: StepResult(observation, reward, done), async or not."""

    class Client:
        closed = False

        async def reset(self):
            return SimpleNamespace(observation="Guess a number.", reward=None, done=False)

        def step(self, action):
            done = action == "7"
            return SimpleNamespace(observation="right" if done else "higher", reward=float(done), done=done)

        async def close(self):
            Client.closed = True

    class Guess(OpenEnv):
        make = Client

    _, (one,) = games(tokenizer("chatml"), Guess, "3", "7")
    assert [m["content"] for m in one.messages] == ["3", "higher", "7", "right"] and Client.closed
    assert one.rewards == {"environment": 1.0} and one.step_rewards.tolist() == [0.0, 1.0]
