"""The losses against golden numbers; how a step is cut changes nothing."""

import math
from dataclasses import replace

import pytest
import torch

from conftest import GOLDEN, PolicyOptions, golden, tallied
from dist import World
from grpo import StepSize, policy_loss
from rollouts.policy import Tally, measures_kl, sampler_ratio
from run.config import ConfigError, check_every_part

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"]


def golden_loss(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss_type, *rest = name.split("/")
    mask, truncated = golden("mask"), torch.tensor(GOLDEN["truncated"])
    options, more = PolicyOptions(loss_type=loss_type, max_completion_length=mask.shape[1]), {}
    for word in rest:
        number = float(word.rpartition("_")[2]) if "_" in word and word[-1].isdigit() else 0.0
        if word in ("token", "sequence"):
            options.importance_sampling_level = word
        elif word.startswith("eps_high"):
            options.epsilon_high = number
        elif word.startswith("delta"):
            options.delta = number
        elif word.startswith("beta"):
            options.beta, more["ref_logprobs"] = number, golden("ref_logp")
        elif word.startswith("off_policy_mask"):
            options.off_policy_mask_threshold, options.vllm_importance_sampling_correction = number, False
            more["sampling_logprobs"] = golden("sampling_logp")
        elif word.startswith("is_"):
            options.vllm_importance_sampling_mode = "_".join(word.split("_")[1:3])
            options.vllm_importance_sampling_clip_max = number
            more["sampling_logprobs"] = golden("sampling_logp")
        elif word == "mask_truncated":
            options.mask_truncated_completions, more["truncated"] = True, truncated
        else:
            assert word == "top_entropy_0.2"
            entropy = golden("entropy_per_token")
            more["entropy_mask"] = entropy >= torch.quantile(entropy[mask > 0], 0.8)
    counted = mask * (~truncated)[:, None] if options.mask_truncated_completions else mask
    advantages = torch.tensor(GOLDEN["advantages"]["group"], dtype=torch.float64)
    return policy_loss(
        golden("logp"), old_logprobs=golden("old_logp"), advantages=advantages, mask=mask, options=options,
        size=StepSize(len(mask), counted.sum().item()), **more,
    )


@pytest.mark.parametrize("name", GOLDEN["loss"])
def test_every_loss_meets_the_golden_number(name):
    assert golden_loss(name)[0].item() == pytest.approx(GOLDEN["loss"][name], abs=1e-9)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_loss_and_gradient_do_not_depend_on_how_the_step_is_cut(loss_type, level):
    generator = torch.Generator().manual_seed(3)
    B, T = 8, 7
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    lengths = torch.tensor([7, 1, 3, 5, 2, 7, 6, 1])
    mask = (torch.arange(T) < lengths[:, None]).double()
    old, advantages = -draw(B, T).abs(), draw(B)
    new = (old + 0.3 * draw(B, T)).requires_grad_()
    options = PolicyOptions(
        loss_type=loss_type, importance_sampling_level=level, beta=0.1, epsilon_high=5.0,
        max_completion_length=T,
        mask_truncated_completions=True, off_policy_mask_threshold=0.1,
    )
    truncated = torch.tensor([0, 0, 1, 0, 0, 0, 1, 0], dtype=torch.bool)
    more = dict(sampling_logprobs=old + 0.1 * draw(B, T), ref_logprobs=old + 0.2 * draw(B, T))
    size = StepSize(B, (mask * (~truncated)[:, None]).sum().item())
    results = []
    for cut in (8, 1, 3):
        total = torch.zeros((), dtype=torch.float64)
        for begin in range(0, B, cut):
            part = slice(begin, begin + cut)
            total = total + policy_loss(
                new[part], old_logprobs=old[part], advantages=advantages[part], mask=mask[part],
                options=options,
                size=size, truncated=truncated[part], **{k: v[part] for k, v in more.items()},
            )[0]
        results.append((total.item(), torch.autograd.grad(total, new)[0]))
    for value, gradient in results[1:]:
        assert value == pytest.approx(results[0][0], abs=1e-12)
        assert (gradient - results[0][1]).abs().max() < 1e-12
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(
            x, old_logprobs=old, advantages=advantages, mask=mask, options=replace(options, loss_type="sapo"),
            size=size, truncated=truncated, **more,
        )[0], (new,),
    )


def test_the_gradient_of_k3_and_of_its_corrected_form():
    """Over all tokens of a vocabulary, weighed by π: k3 has the gradient of KL(π_ref‖π), with
    use_bias_correction_kl it is that of KL(π‖π_ref), on policy too (docs/grpo.md)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_pi = logits.log_softmax(-1)
    pi = log_pi.detach().exp()
    kl_of_pi = (log_pi.exp() * (log_pi - reference)).sum()
    kl_of_reference = (reference.exp() * (reference - log_pi)).sum()
    for corrected, expected in ((False, kl_of_reference), (True, kl_of_pi)):
        loss = sum(
            pi[k] * policy_loss(
                log_pi[k].view(1, 1), old_logprobs=log_pi[k].detach().view(1, 1), advantages=torch.zeros(1),
                mask=torch.ones(1, 1), size=StepSize(1, 1.0), ref_logprobs=reference[k].view(1, 1),
                options=PolicyOptions(beta=1.0, use_bias_correction_kl=corrected),
            )[0]
            for k in range(6)
        )
        assert loss.item() == pytest.approx(kl_of_pi.item())  # k3's mean is KL(π‖π_ref) either way
        got, wanted = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected))
        assert (got - wanted).abs().max() < 1e-12


def test_a_token_without_a_sampling_logprob_counts_as_on_policy():
    old, mask = torch.zeros(1, 3), torch.ones(1, 3)
    sampled = torch.tensor([[-1.0, math.nan, -1.0]])
    options = PolicyOptions(
        vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=2.0
    )
    raw, applied, _, known = sampler_ratio(old, sampled, mask, options)
    assert applied.tolist() == [[2.0, 1.0, 2.0]] and known.tolist() == [[1.0, 0.0, 1.0]]
    assert raw[0, 0].item() == pytest.approx(math.e)


MODES = ["sequence_mask", "sequence_truncate", "token_mask", "token_truncate", "geometric_mask",
         "geometric_truncate"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_beyond_the_largest_number_is_dropped_or_clamped_and_never_nan(mode, dtype):
    """Log-ratios that sum to 100 in fp32, or to 800 in fp64, have an infinite exponential; ∞ · 0 is NaN."""
    sum_of_log_ratios = 100.0 if dtype == torch.float32 else 800.0
    old = torch.tensor([[sum_of_log_ratios / 2] * 2, [0.0, 0.0]], dtype=dtype)
    options = PolicyOptions(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=0.5)
    _, applied, outside, _ = sampler_ratio(old, torch.zeros_like(old), torch.ones_like(old), options)
    first = 0.0 if mode.endswith("mask") else 3.0
    assert applied[:, 0].tolist() == [first, 1.0] and outside[:, 0].tolist() == [True, False]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_is_left_out_of_the_loss_may_be_infinite(loss_type, level):
    """A flat group, a masked completion, an entropy mask and a stale one: each drops a completion whose ratio
    π/π_old is infinite. Loss and gradient are those of the others."""
    B, T = 6, 3
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(B, T, generator=generator)
    far = old.clone()
    far[:4] += 200.0  # exp(200) is infinite in fp32
    options = PolicyOptions(
        loss_type=loss_type, importance_sampling_level=level, epsilon_high=5.0, max_completion_length=T,
        mask_truncated_completions=True, off_policy_mask_threshold=0.1,
    )
    advantages = torch.tensor([0.0, -1.0, -1.0, -1.0, 1.0, -0.5])
    truncated = torch.tensor([False, True, False, False, False, False])
    entropy_mask = torch.ones(B, T, dtype=torch.bool)
    entropy_mask[2] = False
    sampled = old.clone()
    sampled[3] += 400.0  # stale: log μ − log π is 200 a token
    results = []
    for rows in (slice(0, B), slice(4, B)):
        logprobs = far[rows].clone().requires_grad_()
        loss, _ = policy_loss(
            logprobs, old_logprobs=old[rows], advantages=advantages[rows], mask=torch.ones(B, T)[rows],
            options=options, size=StepSize(B, 15.0), sampling_logprobs=sampled[rows],
            entropy_mask=entropy_mask[rows], truncated=truncated[rows],
        )
        loss.backward()
        results.append((loss.item(), logprobs.grad))
    (loss, gradient), (expected, of_the_others) = results
    assert loss == expected and math.isfinite(loss)
    assert torch.equal(gradient[4:], of_the_others) and not gradient[:4].any()


def test_geometric_mean_rejects_whole_completions_whatever_their_length():
    """Drift of 0.001 a token over 4,000 tokens: the product is e⁴ = 55, the mean a token 1.001."""
    T = 4000
    old, sampled, mask = torch.full((3, T), -1.0), torch.full((3, T), -1.001), torch.ones(3, T)
    sampled[1] = -1.1  # a drift of 0.1 a token
    mask[2, 5:] = 0
    options = PolicyOptions(
        vllm_importance_sampling_mode="geometric_mask", vllm_importance_sampling_clip_min=0.95,
        vllm_importance_sampling_clip_max=1.05,
    )
    _, applied, outside, _ = sampler_ratio(old, sampled, mask, options)
    assert applied[:, 0].tolist() == [1.0, 0.0, 1.0] and outside[:, 0].tolist() == [False, True, False]
    options = replace(options, vllm_importance_sampling_mode="geometric_truncate")
    _, applied, _, _ = sampler_ratio(old, sampled, mask, options)
    assert applied[:, 0].tolist() == pytest.approx([math.exp(0.001), 1.05, math.exp(0.001)], rel=1e-4)
    by_product = replace(options, vllm_importance_sampling_mode="sequence_mask")
    assert sampler_ratio(old, sampled, mask, by_product)[1][0].item() == 0.0


def test_a_geometric_mean_without_limits_of_its_own_is_refused():
    with pytest.raises(ConfigError, match="rejects nothing"):
        check_every_part(PolicyOptions(vllm_importance_sampling_mode="geometric_mask"))


def shares(options, old, sampled, mask, cut: int) -> dict[str, float]:
    tally = Tally()
    for begin in range(0, len(old), cut):
        part = slice(begin, begin + cut)
        _, facts = policy_loss(
            old[part], old_logprobs=old[part], advantages=torch.ones(len(old[part])), mask=mask[part],
            options=options, size=StepSize(len(old), 1.0), sampling_logprobs=sampled[part],
        )
        tallied(tally, facts, torch.zeros_like(old[part]), old[part], sampled[part])
    found = tally.result(World(0, 1, 0, torch.device("cpu")))
    return {
        name.removeprefix("sampling/").removeprefix("importance_"): value for name, value in found.items()
    }


@pytest.mark.parametrize("cut", [8, 3, 1])
def test_the_effective_share_is_kish_s_over_the_whole_step(cut):
    """Eight completions of one token with weights 1, 1, 2, 2, 3, 3, 4, 4; above 3.5 is dropped:
    (Σw)²/(nΣw²) = 12²/(8 · 28)."""
    weights = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0])
    old, mask = torch.log(weights)[:, None].double(), torch.ones(8, 1)
    options = PolicyOptions(vllm_importance_sampling_clip_max=3.5)
    found = shares(options, old, torch.zeros_like(old), mask, cut)
    assert (
        found["sampling_ratio/effective_share"] == pytest.approx(144 / 224)
        and found["sampling_ratio/outside_share"] == 0.25
    )
    options.vllm_importance_sampling_mode = "token_truncate"  # 4 becomes 3.5: (19)²/(8 · 52.5)
    found = shares(options, old, torch.zeros_like(old), mask, cut)
    assert (
        found["sampling_ratio/effective_share"] == pytest.approx(361 / 420)
        and found["sampling_ratio/outside_share"] == 0.25
    )


def test_a_small_mismatch_over_long_completions_wastes_samples_and_the_rule_says_so():
    """64 completions of 8,192 tokens that differ by σ = 0.02 a token: the mean difference and the smallest
    ratio are both in their ranges, and the product keeps little of the batch."""
    from health.doctor import Doctor

    generator = torch.Generator().manual_seed(0)
    old = torch.zeros(64, 8192)
    sampled = old + 0.02 * torch.randn(64, 8192, generator=generator)
    found = shares(PolicyOptions(), old, sampled, torch.ones(64, 8192), 64)
    assert (
        found["sampling_logp_difference/mean"] < 0.1 and found["sampling_ratio/min"] > 0.1
    )  # what the page asks for
    assert found["sampling_ratio/effective_share"] < 0.5
    for mode in ("token_truncate", "geometric_mask"):
        options = PolicyOptions(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=0.95)
        assert (
            shares(options, old, sampled, torch.ones(64, 8192), 64)["sampling_ratio/effective_share"] > 0.95
        )
    doctor = Doctor({"vllm_importance_sampling_mode": "sequence_mask", "importance_sampling_level": "token"})
    name = "sampling/importance_sampling_ratio/effective_share"
    verdicts = [
        v
        for step in range(1, 12)
        for v in doctor.observe(step, {name: found["sampling_ratio/effective_share"]})
    ]
    assert [v.rule.name for v in verdicts] == ["correction_wastes_samples"]
    line = verdicts[0].line(doctor.config)
    assert "vllm_importance_sampling_mode is sequence_mask: token_truncate or geometric_mask" in line
    assert "importance_sampling_level" not in line
    assert "token_truncate" not in verdicts[0].line({"vllm_importance_sampling_mode": "geometric_mask"})


def test_kl_without_a_weight_is_measured_every_kl_steps():
    options = PolicyOptions()
    options.adapter = "lora"
    assert [step for step in range(45) if measures_kl(options, step, 1)] == [0, 20, 40]
    assert [step for step in range(0, 60, 6) if measures_kl(options, step, 6)] == [
        0,
        24,
        42,
    ]  # batches of 6 steps
    options.kl_steps = None
    assert not measures_kl(options, 0, 1)
    options.kl_steps, options.adapter = 1, None  # no reference at hand
    assert not measures_kl(options, 0, 1)
