"""Advantages beyond the plain group, k2 and k3, bypass, dynamic sampling and distillation."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from checkpoints.weights import load_pretrained
from conftest import ROOT, PolicyOptions, embedded, metrics, options, run_ok, run_program
from dist import World
from grpo import StepSize, group_advantages, policy_loss
from rollouts.advantages import AdvantageOptions, assign, rewarded_steps, separate_advantages, step_advantages
from rollouts.distillation import Teacher
from rollouts.policy import collate, token_logprobs
from rollouts.rewards import Steps
from rollouts.rollout import Rollout
from rollouts.sampler import Sampler


def trained(run):
    """The metrics of a run's steps, without the evaluation before the first."""
    return [row for row in metrics(run) if row["step"]]


ALONE = World(0, 1, 0, torch.device("cpu"))
NAN = math.nan


def trl_gdpo(rewards: torch.Tensor, weights: torch.Tensor, n: int) -> torch.Tensor:
    """TRL 1.16, GRPOTrainer, multi_objective_aggregation = normalize_then_sum, without unscorable rows."""
    grouped = rewards.view(-1, n, rewards.shape[1])
    each = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    total = (each.view(-1, rewards.shape[1]) * weights).sum(1)
    return (total - total.mean()) / (total.std() + 1e-4)


def test_rewards_that_are_compared_one_by_one_agree_with_trl():
    rewards = torch.rand(24, 3, generator=torch.Generator().manual_seed(0)).double()
    rewards *= torch.tensor([1, 100, 0.01])
    weights = torch.tensor([1.0, 0.5, 2.0]).double()
    ours = separate_advantages(rewards, weights, 4)
    assert (ours - trl_gdpo(rewards, weights, 4)).abs().max() < 1e-9
    summed, _ = group_advantages(rewards @ weights, 4, "group")
    first, _ = group_advantages(rewards[:, 0], 4, "group")
    alike = [torch.corrcoef(torch.stack([first, x]))[0, 1].item() for x in (summed, ours)]
    assert alike[0] < 0.3 < alike[1]  # a hundred times larger, the second reward drowns the first in the sum


def test_a_reward_that_is_missing_counts_as_the_mean_of_its_group():
    table = torch.tensor([[1.0, NAN], [0.0, NAN], [NAN, NAN], [0.5, 3.0]]).double()
    found = separate_advantages(table, torch.ones(2).double(), 4)
    assert found[2] == 0 and found[0] == -found[1] > 0 and abs(found[3]) < 1e-12


def steps(ends, rewards, tokens=6):
    return Rollout([1], [5] * tokens, step_ends=ends, step_rewards=rewards)


def test_a_step_earns_its_own_and_all_later_rewards():
    group = [steps([2, 5], [1.0, 0.0]), steps([3], [0.5]), steps([6, 6], [0.0, 1.0]), Rollout([1], [5, 5])]
    every = np.array([1.0, 0.0, 0.5, 0.0, 1.0])
    r = (every - every.mean()) / (every.std(ddof=1) + 1e-4)
    found = step_advantages(group, "group")
    expected = [
        [r[0] + r[1]] * 2 + [r[1]] * 3 + [0], [r[2]] * 3 + [0] * 3, [r[3] + r[4]] * 6, [0, 0],
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tolist() == pytest.approx(theirs, abs=1e-6)
    plain = step_advantages(group, "none")
    assert plain[0].tolist() == pytest.approx([0.5 - 0.5] * 2 + [-0.5] * 3 + [0])
    flat = step_advantages([steps([2], [0.5]), steps([3], [0.5])], "group")
    assert not any(tokens.any() for tokens in flat)


def test_a_function_may_score_step_by_step_beside_others():
    score = Steps.of([(2, 0.5), (6, 1.0)], 6)
    assert score == 1.5 and Steps.of(2, 6) == 2.0 and Steps.of(None, 6) is None
    for wrong in ([(0, 1.0)], [(7, 1.0)], [1.0, 2.0], [("a", 1.0)]):
        with pytest.raises((ValueError, TypeError)):
            Steps.of(wrong, 6)
    one = steps([3], [0.25])  # of a turn of the environment
    one.rewards = {"environment": 0.25, "process": score, "whole": 4.0, "not_here": None}
    rewarded_steps(one, {"process": 2.0, "whole": 0.5})
    assert one.step_ends.tolist() == [2, 3, 6, 6] and one.step_rewards.tolist() == [1.0, 0.25, 2.0, 2.0]


def test_steps_of_a_reward_function_train_tokens_unlike(task, small_checkpoint, tmp_path):
    (tmp_path / "process.py").write_text(
        "def halves(completion_ids, **_):\n"
        "    return [[(max(1, len(i) // 2), i[0] % 5), (len(i), i[-1] % 5)] for i in completion_ids]\n"
    )
    (tmp_path / "rows.jsonl").write_text((task / "rows.jsonl").read_text())
    given = embedded(tmp_path, small_checkpoint[0], tmp_path / "run", "reward_funcs=[process.halves]",
                     "advantage_level=step", "max_steps=2", "val_set_size=0")
    run_ok(ROOT / "grpo.py", *given)
    lines = (tmp_path / "run" / "rollouts" / "step-0.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        ids = row["completion_ids"]
        assert row["step_rewards"] == [ids[0] % 5, ids[-1] % 5] and row["step_ends"][-1] == len(ids)
        assert row["rewards"]["halves"] == sum(row["step_rewards"])
    assert all(row["train/grad_norm"] > 0 for row in trained(tmp_path / "run"))


def test_advantages_of_steps_reach_the_loss_token_by_token():
    group = [steps([2, 5], [1.0, 0.0]), steps([3], [0.5])]
    assign(group, torch.tensor([1.0, -1.0]), 2, AdvantageOptions(advantage_level="step"))
    batch = collate(group, torch.device("cpu"))
    assert batch.advantages.shape == (2, 6) and group[0].signal
    assert np.allclose(batch.advantages[0].numpy(), group[0].token_advantages)
    assign(group, torch.tensor([1.0, -1.0]), 2, AdvantageOptions())
    assert collate(group, torch.device("cpu")).advantages.tolist() == [1.0, -1.0]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_the_loss_of_equal_token_advantages_is_that_of_one_a_completion(kind):
    made = torch.Generator().manual_seed(1)
    old = -torch.rand(3, 5, generator=made, dtype=torch.float64)
    now = (old + 0.1 * torch.randn(3, 5, generator=made, dtype=torch.float64)).requires_grad_()
    mask = torch.ones(3, 5, dtype=torch.float64)
    chosen = PolicyOptions(loss_type=kind, epsilon_high=0.3, max_completion_length=5)
    one = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    found = []
    for advantages in (one, one[:, None].expand(3, 5)):
        loss, _ = policy_loss(now, old_logprobs=old, advantages=advantages, mask=mask, options=chosen,
                              size=StepSize(3, 15.0))
        found.append((loss.item(), torch.autograd.grad(loss, now)[0]))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("estimator, of", [("k2", "KL(π‖π_ref)"), ("k3", "KL(π_ref‖π)")])
def test_each_estimator_pulls_along_the_gradient_that_is_said_of_it(estimator, of):
    """Over every token of a small vocabulary, weighed by π itself: the expectation, exactly."""
    V, made = 6, torch.Generator().manual_seed(3)
    theta = torch.randn(V, generator=made, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(V, generator=made, dtype=torch.float64).log_softmax(-1)
    logprobs = theta.log_softmax(-1)
    chosen = PolicyOptions(beta=1.0, kl_estimator=estimator, loss_type="dapo")
    parts = []
    for token in range(V):
        loss, _ = policy_loss(
            logprobs[token].view(1, 1), old_logprobs=logprobs[token].detach().view(1, 1),
            advantages=torch.zeros(1, dtype=torch.float64), mask=torch.ones(1, 1, dtype=torch.float64),
            options=chosen, size=StepSize(1, 1.0), ref_logprobs=reference[token].view(1, 1),
        )
        parts.append(logprobs[token].exp().detach() * loss)
    ours = torch.autograd.grad(sum(parts), theta, retain_graph=True)[0]
    p, q = logprobs.exp(), reference.exp()
    true = {"KL(π‖π_ref)": (p * (logprobs - reference)).sum(),
            "KL(π_ref‖π)": (q * (reference - logprobs)).sum()}
    exact = {name: torch.autograd.grad(value, theta, retain_graph=True)[0] for name, value in true.items()}
    assert (ours - exact[of]).abs().max() < 1e-12
    assert all((ours - g).abs().max() > 1e-3 for name, g in exact.items() if name != of)


def test_bypass_takes_the_samplers_log_probs_and_makes_no_pass_for_them(task, small_checkpoint, tmp_path):
    chosen = ("num_iterations=2", "max_steps=4", "learning_rate=1e-3")
    for name, more in (("plain", ()), ("bypass", ("bypass_mode=true",))):
        run_ok(ROOT / "grpo.py", *embedded(task, small_checkpoint[0], tmp_path / name, *chosen, *more))
    plain, bypass = (trained(tmp_path / name) for name in ("plain", "bypass"))
    for a, b in zip(plain, bypass, strict=True):  # the embedded engine's are the trainer's to rounding
        assert b["train/loss"] == pytest.approx(a["train/loss"], abs=1e-4)
        assert b["entropy"] == pytest.approx(a["entropy"], abs=1e-3)
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-4 for row in bypass[::2])


class Prompts:
    """Ten prompts; the batches of later epochs are rotated."""

    batches = 5

    class order:
        @staticmethod
        def batch(number):
            return [(2 * number + k + number // 5) % 10 for k in range(2)]


def sampler_of(reward, rounds):
    """A Sampler whose completions are the prompt's number and the sample's, scored by `reward(prompt, k)`."""
    made = object.__new__(Sampler)
    made.config = SimpleNamespace(
        num_generations=2, dynamic_sampling=rounds, seed=1, reward_weights=None, reward_funcs=["r"]
    )
    made.signs, made.asked = {}, []

    def sample(indices, step, seed, **_):
        made.asked.append(([*indices], seed))
        made.signs = {"of": float(len(made.asked))}
        return [Rollout([i + 1], [k + 1], rewards={"r": reward(i, k)}, prompt_index=i)
                for i in indices for k in range(2)]

    made.sample = sample
    return made


def test_groups_without_a_signal_give_way_to_fresh_prompts_in_the_order_of_the_seed():
    made = sampler_of(lambda i, k: float(k if i % 3 else 1), rounds=3)  # prompts 0, 3, 6, 9 are flat
    first = made.sample([0, 1], 0, (1, 0))
    filled = made.replace_flat(first, made.fresh(Prompts, 0, 0))
    assert [r.prompt_index for r in filled] == [2, 2, 1, 1]  # of batch 5, [1, 2], the first that is not here
    assert made.asked == [([0, 1], (1, 0)), ([2], (1, 0, 1))]
    assert made.signs == {
        "of": 1.0, "dynamic_sampling/flat_before": 0.5, "dynamic_sampling/replaced_groups": 1.0,
        "dynamic_sampling/rounds": 1.0, "dynamic_sampling/reward_before": 0.75,
    }
    again = sampler_of(lambda i, k: float(k if i % 3 else 1), rounds=3)
    same = again.replace_flat(again.sample([0, 1], 0, (1, 0)), again.fresh(Prompts, 0, 0))
    assert [r.prompt_index for r in same] == [r.prompt_index for r in filled]


def test_dynamic_sampling_ends_with_its_rounds():
    made = sampler_of(lambda i, k: 1.0, rounds=2)
    filled = made.replace_flat(made.sample([0, 1], 0, (1, 0)), made.fresh(Prompts, 0, 0))
    assert [r.prompt_index for r in filled] == [0, 0, 1, 1] and len(made.asked) == 3
    assert made.signs["dynamic_sampling/replaced_groups"] == 0


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_with_dynamic_sampling_has_fewer_flat_groups(ranks, task, small_checkpoint, tmp_path):
    (tmp_path / "odd.py").write_text(  # half of the prompts have a signal
        "def odd(completion_ids, answer, **_):\n"
        "    return [sum(i) % 7 / 7 if int(a) % 2 else 0.0 for i, a in zip(completion_ids, answer)]\n"
    )
    (tmp_path / "rows.jsonl").write_text((task / "rows.jsonl").read_text())
    chosen = ("reward_funcs=[odd.odd]", "max_steps=3", f"micro_batch_size={8 // ranks}")
    for name, more in (("plain", ()), ("dynamic", ("dynamic_sampling=4",))):
        given = embedded(tmp_path, small_checkpoint[0], tmp_path / name, *chosen, *more)
        run_ok(ROOT / "grpo.py", *given, ranks=ranks)
    plain, dynamic = (trained(tmp_path / name) for name in ("plain", "dynamic"))
    flat = [[row["frac_reward_zero_std"] for row in rows] for rows in (plain, dynamic)]
    assert sum(flat[1]) < sum(flat[0]) and sum(row["dynamic_sampling/replaced_groups"] for row in dynamic) > 0
    assert all(r["dynamic_sampling/flat_before"] >= r["frac_reward_zero_std"] for r in dynamic)
    assert len((tmp_path / "dynamic" / "rollouts" / "step-0.jsonl").read_text().splitlines()) == len(
        (tmp_path / "plain" / "rollouts" / "step-0.jsonl").read_text().splitlines()
    )


def some_rollouts():
    return [Rollout([5, 6, 7], [8, 9, 10 + k], advantage=0.5 * k, completion_mask=[1, 0, 1] if k else None)
            for k in range(3)]


def test_a_teacher_adds_the_difference_of_the_log_probs_of_each_token(references):
    student, teacher = (
        load_pretrained(str(references(name)[1]), dtype=torch.float32) for name in ("qwen3", "llama2")
    )
    rollouts, chosen = some_rollouts(), options(distillation_coef=0.5, temperature=0.8)
    found = Teacher(teacher).advise(student, [rollouts[:2], rollouts[2:]], chosen, ALONE, True)
    total = count = 0.0
    for k, r in enumerate(rollouts):
        batch = collate([r], torch.device("cpu"))
        with torch.no_grad():
            theirs, ours = (token_logprobs(m, batch, 0.8)[0][0].double() for m in (teacher, student))
        better = ((theirs - ours) * batch.mask[0]).numpy()
        assert np.allclose(r.token_advantages, 0.5 * k + 0.5 * better, atol=1e-5)
        total, count = total - better.sum(), count + batch.mask.sum().item()
    assert found["distillation/reverse_kl"] == pytest.approx(total / count, abs=1e-5)
    same = some_rollouts()
    assert Teacher(student).advise(student, [same], chosen, ALONE, False) == {"distillation/reverse_kl": 0.0}
    assert [r.token_advantages.tolist() for r in same] == [[0.5 * k] * 3 for k in range(3)]


def test_a_student_comes_nearer_to_its_teacher_without_any_reward(task, small_checkpoint, tmp_path):
    """The teacher is the same model after ten steps of a reward for the letter g."""
    reward = ("learning_rate=2e-3", "max_steps=12", "reward_funcs=[letters.many_g]")
    run_ok(ROOT / "grpo.py", *embedded(task, small_checkpoint[0], tmp_path / "teacher", *reward))
    given = ("learning_rate=2e-3", "max_steps=12", "rl_coef=0", "num_generations=1", "reward_funcs=[]",
             f"teacher_model={tmp_path / 'teacher' / 'final'}", "save_steps=5", "num_iterations=2")
    run_ok(ROOT / "grpo.py", *embedded(task, small_checkpoint[0], tmp_path / "student", *given))
    gap = [row["distillation/reverse_kl"] for row in trained(tmp_path / "student")]
    assert gap[0] > 0.01 and sum(gap[-2:]) / 2 < 0.5 * gap[0]
    assert "reward" not in trained(tmp_path / "student")[0]
    weights = (tmp_path / "student" / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "student" / "final")
    shutil.rmtree(tmp_path / "student" / "checkpoints" / "step-10")  # goes on in the middle of a batch
    run_ok(ROOT / "grpo.py", *embedded(task, small_checkpoint[0], tmp_path / "student", *given))
    assert (tmp_path / "student" / "final" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("more, named", [
    (["rl_coef=0"], "rl_coef: .*leaves nothing to learn from without a teacher_model"),
    (["teacher_model=OTHER"], "teacher_model: .*has another tokenizer"),
    (["advantage_level=step", "multi_objective_aggregation=normalize_then_sum"], "advantage_level: .*sum"),
])
def test_what_cannot_be_learnt_from_is_refused(
    more, named, task, small_checkpoint, tokenizer_directory, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(small_checkpoint[0], other)
    shutil.copy(tokenizer_directory("llama3") / "tokenizer.json", other / "tokenizer.json")
    more = [value.replace("OTHER", str(other)) for value in more]
    done = run_program(ROOT / "grpo.py", *embedded(task, small_checkpoint[0], tmp_path / "run", *more))
    assert done.returncode == 2 and re.search(named, done.stderr), done.stderr
