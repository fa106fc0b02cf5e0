"""Routing Replay: the updates of a batch use the experts that the pass of π_old chose."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_vllm_client import WORLD
from torch.nn import functional as F

from checkpoints.weights import load_pretrained
from conftest import (
    CHATML_TEMPLATE,
    CHATML_TOKENS,
    ROOT,
    embedded,
    make_reference,
    metrics,
    run_ok,
    run_program,
    write_tokenizer,
)
from rollouts.policy import collate, keep_logprobs, rerouted, token_logprobs
from rollouts.rollout import Rollout


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A random Qwen3-MoE of three layers, the second of them dense, with a tokenizer."""
    directory = tmp_path_factory.mktemp("moe")
    write_tokenizer(directory, CHATML_TEMPLATE, CHATML_TOKENS, "<|im_end|>")
    make_reference("qwen3-moe", vocab_size=512, num_hidden_layers=3, max_position_embeddings=512
                   ).save_pretrained(directory)
    return directory


def rollouts():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 500, 6), rng.integers(5, 500, 9)]
    return [Rollout(p, rng.integers(5, 500, 3 + 2 * k), advantage=1.0) for p in prompts for k in range(3)]


class Options:
    temperature, beta, router_replay = 0.9, 0.0, True


def test_given_experts_are_used_with_the_weights_that_the_router_gives_them_now(mixture):
    """Each token by hand, in fp64; and the router still learns."""
    model = load_pretrained(str(mixture), dtype=torch.float64)
    experts, arch = model.layers[0].mlp, model.arch
    x = torch.randn(1, 7, arch.hidden_size, dtype=torch.float64)
    routes = torch.stack([torch.randperm(arch.num_experts)[: arch.experts_per_token] for _ in range(7)])
    out, logits = experts(x, routes)
    for n in range(7):
        p = logits[n].softmax(-1)[routes[n]]
        p = p / p.sum() if arch.normalize_experts else p
        expected = torch.zeros(arch.hidden_size, dtype=torch.float64)
        for weight, e in zip(p, routes[n].tolist(), strict=True):
            gate, up = (experts.gate_up_proj[e] @ x[0, n]).chunk(2)
            expected = expected + weight * (experts.down_proj[e] @ (F.silu(gate) * up))
        torch.testing.assert_close(out[0, n], expected)
    best, _ = experts(x)
    assert not torch.allclose(best, out)
    out.square().sum().backward()
    assert experts.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("shared", [False, True])
def test_what_one_pass_chose_another_replays_though_its_router_has_changed(shared, mixture):
    model = load_pretrained(str(mixture), dtype=torch.float32)
    batch = collate(rollouts(), torch.device("cpu"), shared)
    keep_logprobs(model, None, [batch.rollouts], Options, WORLD, shared, old=True, kl=False)
    old = batch.stored("old_logprobs")
    routes = batch.kept_routes(model.arch)
    assert list(routes) == [0, 2] and batch.rollouts[0].routes.dtype == np.int16
    logprobs, _, router_logits, _ = token_logprobs(model, batch, 0.9, routes=routes)
    torch.testing.assert_close(logprobs, old, atol=1e-5, rtol=0)
    assert rerouted(router_logits, routes) == 0
    with torch.no_grad():
        for layer in (0, 2):
            model.layers[layer].mlp.gate.weight.copy_(torch.randn_like(model.layers[layer].mlp.gate.weight))
    free, replayed = (token_logprobs(model, batch, 0.9, routes=r) for r in (None, routes))
    assert rerouted(replayed[2], routes) > 0.2
    assert not torch.allclose(free[0], replayed[0], atol=1e-4)
    # The other cut: a completion alone, with its own copy of the prompt, has the same routes
    alone = collate(batch.rollouts[4:5], torch.device("cpu"), False)
    own = token_logprobs(model, alone, 0.9, routes=alone.kept_routes(model.arch))[0]
    torch.testing.assert_close(own[0], replayed[0][4, : own.shape[1]], atol=1e-4, rtol=0)


def test_a_run_replays_and_goes_on_in_the_middle_of_a_batch_to_the_bit(mixture, task, tmp_path):
    more = ("router_replay=true", "num_iterations=2", "max_steps=4", "save_steps=1", "save_total_limit=9",
            "reward_funcs=[letters.spread]", "learning_rate=1.0e-2")
    run_ok(ROOT / "grpo.py", *embedded(task, mixture, tmp_path / "a", *more))
    rows = [row for row in metrics(tmp_path / "a") if "train/loss" in row]
    changed = [row["router/replayed_otherwise"] for row in rows]
    assert changed[0] == changed[2] == 0 < min(changed[1], changed[3])
    assert rows[0]["ratio/first_use"] < 1e-5
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / "checkpoints" / "step-1", tmp_path / "b" / "checkpoints" / "step-1")
    run_ok(ROOT / "grpo.py", *embedded(task, mixture, tmp_path / "b", *more))
    again = [row for row in metrics(tmp_path / "b") if row.get("step", 0) > 1]
    for row, before in zip(again, rows[1:], strict=True):
        assert row["train/loss"] == before["train/loss"]
        assert row["router/replayed_otherwise"] == before["router/replayed_otherwise"]
    recorded = (tmp_path / "a" / "rollouts" / "step-0.jsonl").read_text().splitlines()
    assert "routes" not in json.loads(recorded[0])


@pytest.mark.parametrize(
    "more, told", [([], "several updates"), (["num_iterations=2"], "this model is none")]
)
def test_replay_is_refused_where_there_is_nothing_to_replay(more, told, task, small_checkpoint, tmp_path):
    done = run_program(
        ROOT / "grpo.py", *embedded(task, small_checkpoint[0], tmp_path, "router_replay=true", *more)
    )
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
