"""Rollout engines: embedded, replay, conversations."""

import json
import math
import random

import numpy as np
import pytest
import torch

from checkpoints.weights import load_pretrained
from conftest import options
from dist import World
from rollouts.engines import EmbeddedEngine
from rollouts.environments import play
from rollouts.policy import collate, token_logprobs
from rollouts.rollout import Rollout
from rollouts.vllm_server import EngineError, ServerLost, read_completions
from text.tokenizer import Tokenizer

ALONE = World(0, 1, 0, torch.device("cpu"))
PROMPTS = [[5, 9, 40, 77, 8], [300, 301], [17, 4, 4, 4, 90, 12, 44, 3, 200]]


def test_log_probs_of_the_embedded_engine_equal_the_trainers(small_checkpoint):
    model, tokenizer = (
        load_pretrained(str(small_checkpoint[0]), dtype=torch.float32),
        Tokenizer.load(small_checkpoint[0]),
    )
    engine = EmbeddedEngine(model, options(temperature=0.8, max_completion_length=24), tokenizer, ALONE)
    groups = engine.generate(PROMPTS, 4, seed=(0, 1))
    rollouts = [Rollout(p, c.ids, c.logprobs) for p, g in zip(PROMPTS, groups, strict=True) for c in g]
    assert len({tuple(r.completion_ids) for r in rollouts}) > 4
    batch = collate(rollouts, torch.device("cpu"))
    with torch.no_grad():
        logprobs, _, _, bad = token_logprobs(model, batch, 0.8)
    assert bad == 0 and batch.sampling_logprobs is not None
    gap = (logprobs - batch.sampling_logprobs).abs()[batch.mask > 0]
    assert gap.max() < 1e-5  # products of other shapes sum in another order; 2e-6 here
    again = engine.generate(PROMPTS, 4, seed=(0, 1))
    assert again == groups and engine.generate(PROMPTS, 4, seed=(0, 2)) != groups


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma2", "gemma3", "qwen2", "mixtral"])
def test_completions_behind_one_copy_of_their_prompt_get_the_same_log_probs_and_gradients(name, references):
    model = load_pretrained(str(references(name)[1]), dtype=torch.float64)
    rng = random.Random(5)
    rollouts = []
    for P, lengths in ((5, [3, 1, 9]), (12, [2]), (2, [11, 11]), (20, [1, 6, 6, 2])):
        prompt = [rng.randrange(3, 96) for _ in range(P)]
        rollouts += [Rollout(prompt, [rng.randrange(3, 96) for _ in range(n)]) for n in lengths]
    rollouts[2].completion_mask = np.array([1, 1, 0, 0, 0, 1, 1, 1, 1], bool)
    results, sizes = [], []
    for shared in (False, True):
        batch = collate(rollouts, torch.device("cpu"), shared)
        sizes.append(batch.input_ids.numel())
        model.zero_grad()
        logprobs, entropy, _, _ = token_logprobs(model, batch, 0.7, entropy_gradient=True)
        ((logprobs * batch.mask).sin().sum() + entropy.square().sum()).backward()
        results.append([logprobs.detach(), entropy.detach(), *[p.grad.clone() for p in model.parameters()]])
    assert sizes == [52 + 2 * 5 + 2 + 3 * 20 + 39, 91] and sizes[0] > sizes[1]
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, a.abs().max().item())


def test_a_non_finite_hidden_state_is_replaced_and_counted(small_checkpoint):
    model = load_pretrained(str(small_checkpoint[0]), dtype=torch.float32)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
    batch = collate([Rollout([5, 6], [7, 8, 2])], torch.device("cpu"))
    logprobs, _, _, bad = token_logprobs(model, batch, 1.0)
    assert bad == 3 and torch.isfinite(logprobs).all()


def test_limits_and_batches_of_the_embedded_engine(small_checkpoint):
    model, tokenizer = (
        load_pretrained(str(small_checkpoint[0]), dtype=torch.float32),
        Tokenizer.load(small_checkpoint[0]),
    )
    engine = EmbeddedEngine(model, options(max_completion_length=24, rollout_batch_size=2), tokenizer, ALONE)
    groups = engine.generate(PROMPTS, 2, seed=(1,), limits=[1, 5, 9])
    for group, limit in zip(groups, (1, 5, 9), strict=True):
        for c in group:
            assert len(c.ids) == len(c.logprobs) <= limit
            assert (c.finish_reason == "length") == (c.ids[-1] not in tokenizer.stop_ids)


def answer(**changes):
    choice = {
        "index": 0,
        "token_ids": [5, 6],
        "finish_reason": "stop",
        "logprobs": {"token_logprobs": [-1.0, -2.0]},
    }
    return {"choices": [{**choice, **changes}]}


@pytest.mark.parametrize(
    "given, named",
    [
        ({"choices": []}, "0 completions, asked for 1"), ({}, "not understood"), (None, "not understood"),
        (answer(token_ids=[]), "0 token ids"), (answer(token_ids=[5] * 9), "9 token ids"),
        (answer(token_ids=[5, "x"]), "not understood .*token_ids"), (answer(token_ids=[5, -1]), "token ids"),
        (answer(logprobs={"token_logprobs": [-1.0]}), "2 tokens with 1 log-probs"),
        (answer(logprobs=None), "not understood"),
    ],
)
def test_a_server_that_answers_wrongly_is_refused(given, named):
    with pytest.raises(EngineError, match=named):
        read_completions(json.dumps(given).encode(), 1, 8, "http://x")


def test_what_was_aborted_is_a_part_where_parts_are_wanted_and_else_a_loss():
    """Before its first token too, where vLLM has neither ids nor log-probs."""
    begun, unbegun = (answer(finish_reason="abort", **more)
                      for more in ({}, {"token_ids": [], "logprobs": None}))
    for given, length in ((begun, 2), (unbegun, 0)):
        text = json.dumps(given).encode()
        (part,) = read_completions(text, 1, 8, "http://x", parts=True)
        assert part.finish_reason == "abort" and len(part.ids) == len(part.logprobs) == length
        with pytest.raises(ServerLost, match="abort"):
            read_completions(text, 1, 8, "http://x")


def test_missing_log_probs_are_kept_as_unknown():
    given = answer(logprobs={"token_logprobs": [None, -9999.0]})
    made = read_completions(json.dumps(given).encode(), 1, 8, "http://x")
    assert np.isnan(made[0].logprobs).all()


class Guess:
    """An environment: says `higher` twice, then rewards; counts what it was told."""

    def reset(self, prompt, **columns):
        self.turns = 0
        return None

    def step(self, text, ids):
        assert isinstance(text, str) and ids
        self.turns += 1
        return " higher", 0.5, self.turns == 3


def test_what_an_environment_says_is_read_but_not_trained_on(small_checkpoint):
    from data import Prompt

    model, tokenizer = (
        load_pretrained(str(small_checkpoint[0]), dtype=torch.float32),
        Tokenizer.load(small_checkpoint[0]),
    )
    config = options(max_completion_length=60, max_turns=8, environment="x.Guess")
    engine = EmbeddedEngine(model, config, tokenizer, ALONE)
    engine.stop_ids = list(range(0, 500, 8))  # a random model hardly ever ends its turn
    prompts = [Prompt(ids, "a question", {}, f"f:{i}") for i, ids in enumerate(PROMPTS)]
    rollouts = play(
        engine,
        Guess,
        prompts,
        [0, 1, 2],
        2,
        step=0,
        seed=(3,),
        options=config,
        tokenizer=tokenizer,
        world=ALONE,
    )
    said = tokenizer.encode(" higher")
    spoke = 0
    for r in rollouts:
        assert r.completion_mask is not None and r.sampling_logprobs is not None
        assert len(r.completion_mask) == len(r.completion_ids) == len(r.sampling_logprobs) <= 60
        theirs = [t for t, m in zip(r.completion_ids, r.completion_mask, strict=True) if not m]
        assert theirs == said * (len(theirs) // len(said))
        assert all(
            np.isnan(x) == (not m) for x, m in zip(r.sampling_logprobs, r.completion_mask, strict=True)
        )
        spoke += len(theirs) > 0
    assert spoke and max(r.rewards["environment"] for r in rollouts) <= 1.5
    batch = collate(rollouts, torch.device("cpu"))
    with torch.no_grad():
        logprobs, _, _, _ = token_logprobs(model, batch, 1.0)
    assert batch.sampling_logprobs is not None
    gap = (logprobs - batch.sampling_logprobs).abs()[batch.mask > 0]
    assert gap.max() < 1e-5 and (logprobs[batch.mask == 0] == 0).all()
