"""The losses against golden numbers; how a step is cut changes nothing."""

import math
from dataclasses import replace

import pytest
import torch

from conftest import GOLDEN, golden
from policy import PolicyOptions, StepSize, policy_loss, sampler_ratio

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
    )  # fmt: skip


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
    )  # fmt: skip
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
            )[0]  # fmt: skip
        results.append((total.item(), torch.autograd.grad(total, new)[0]))
    for value, gradient in results[1:]:
        assert value == pytest.approx(results[0][0], abs=1e-12)
        assert (gradient - results[0][1]).abs().max() < 1e-12
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(
            x, old_logprobs=old, advantages=advantages, mask=mask, options=replace(options, loss_type="sapo"),
            size=size, truncated=truncated, **more,
        )[0], (new,),
    )  # fmt: skip


def test_a_token_without_a_sampling_logprob_counts_as_on_policy():
    old, mask = torch.zeros(1, 3), torch.ones(1, 3)
    sampled = torch.tensor([[-1.0, math.nan, -1.0]])
    options = PolicyOptions(
        vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=2.0
    )
    raw, applied, known = sampler_ratio(old, sampled, mask, options)
    assert applied.tolist() == [[2.0, 1.0, 2.0]] and known.tolist() == [[1.0, 0.0, 1.0]]
    assert raw[0, 0].item() == pytest.approx(math.e)
