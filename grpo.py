"""Group relative policy optimisation: sample several completions of each prompt, score them, and make the
better ones of each group likelier (DeepSeekMath, arXiv 2402.03300, and the losses of its successors).

    python grpo.py --config configs/tiny/grpo.yaml
    torchrun --nproc-per-node 8 grpo.py --config configs/qwen2.5-1.5b-gsm8k-8gpu.yaml
    python grpo.py test-rewards --config x.yaml      score sample completions outside training
    python grpo.py serve --config x.yaml             start the vLLM server that this config needs

One generation batch (micro_batch_size · steps_per_generation · processes completions, num_generations for
each prompt) is sampled, scored and used for num_iterations passes of optimiser steps. The loss of a step is
divided by the totals of the whole step, over all micro-batches and ranks, so it does not depend on how the
step is split.
"""

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

import dist
from checkpoints import building
from checkpoints.saving import CheckpointOptions
from data import DataOptions
from dist import DistOptions, OptimizerOptions, World
from health import memory, monitor
from health.forensics import ForensicOptions, Forensics
from health.monitor import LogOptions
from model import ModelOptions, Transformer, load_balancing_loss
from rollouts import policy, signs
from rollouts.advantages import SMALL, AdvantageOptions, assign, in_groups, separate_advantages
from rollouts.distillation import TeacherOptions, read_teacher
from rollouts.engines import check_sampler, make_engine
from rollouts.policy import PolicyBatch, PolicyOptions, Tally
from rollouts.prompts import read_prompt_data
from rollouts.queues import RolloutQueue
from rollouts.records import Recorder, as_parquet, kept
from rollouts.rewards import (
    RewardOptions,
    refuse_no_rewards,
    reward_metrics,
    reward_table,
    spread,
    weighted_rewards,
)
from rollouts.rollout import OF_TRAINER, Rollout, show_rollouts, tokens_of
from rollouts.sampler import ReplayBuffer, Sampler, SamplerOptions, evaluate, groups_of
from rollouts.schedule import Schedule
from rollouts.tools import ToolBox
from rollouts.trial import score_samples
from rollouts.vllm_server import EngineError, serve
from run import loop
from run.config import (
    BallastError,
    ConfigError,
    check_at_least_one,
    check_every_part,
    check_ranges,
    parse_config,
)
from run.loop import Run
from text.packing import LoopOptions


@dataclass
class LossOptions:
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"] = "dapo"
    """How token losses become one number. dapo and bnpo: sum / tokens of the step. grpo: mean over
    completions of each one's token mean. dr_grpo: sum / (completions · max_completion_length). cispo:
    truncated ratio times log-probability, reduced as dapo. sapo: a sigmoid instead of the clip, reduced as
    grpo."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """The ratio π/π_old of each token, or the geometric mean over the completion (GSPO)."""
    epsilon: float = 0.2
    """Clip range below 1."""
    epsilon_high: float | None = None
    """Clip range above 1; unset: epsilon. For cispo the largest ratio, usually 5."""
    delta: float | None = None
    """Upper bound of the ratio that also holds for negative advantages."""
    sapo_temperature_pos: float = 1.0
    """sapo: steepness for positive advantages."""
    sapo_temperature_neg: float = 1.05
    """sapo: steepness for all other advantages."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """The penalty of beta. Differentiated with samples of π held fixed, k3 pulls along the gradient of
    KL(π_ref‖π), k2 = (log π/π_ref)²/2 along that of KL(π‖π_ref)."""
    use_bias_correction_kl: bool = False
    """Weigh the KL of each token by its ratio: unbiased where the batch is off policy (DeepSeek-V3.2)."""
    off_policy_mask_threshold: float | None = None
    """Leave out completions with negative advantage whose mean log μ − log π exceeds this (DeepSeek-V3.2)."""
    mask_truncated_completions: bool = False
    """Leave completions that hit the length limit out of the loss."""
    top_entropy_quantile: float = 1.0
    """Train only on this share of tokens, those of highest entropy (arXiv 2506.01939)."""
    bypass_mode: bool = False
    """Take the sampler's log-probs as π_old: no pass computes it, epsilon bounds the ratio to the sampler,
    and the sampler correction does nothing."""
    router_replay: bool = False
    """Mixture of experts: the updates of a batch use the experts that the pass of π_old chose, so that ratios
    show what training changed and not which experts flipped (Routing Replay, GSPO, arXiv 2507.18071)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    entropy_target: float | None = None
    """Give the bonus only while the entropy of the last step was below this."""

    def check(self) -> None:
        check_ranges(
            self, ("epsilon", 0, math.inf), ("epsilon_high", 0, math.inf), ("delta", 0, math.inf),
            ("entropy_coef", -math.inf, math.inf), ("entropy_target", 0, math.inf),
            ("off_policy_mask_threshold", -math.inf, math.inf),
        )
        for key in ("sapo_temperature_pos", "sapo_temperature_neg"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(key, getattr(self, key), "must be above 0")
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ConfigError("epsilon_high", None, "loss_type cispo needs it: the largest ratio, e.g. 5.0")
        if not 0 < self.top_entropy_quantile <= 1:
            raise ConfigError("top_entropy_quantile", self.top_entropy_quantile, "must be above 0, at most 1")


@dataclass
class Config(
    ModelOptions, DataOptions, RewardOptions, SamplerOptions, AdvantageOptions, TeacherOptions, LossOptions,
    PolicyOptions, LoopOptions, OptimizerOptions, CheckpointOptions, DistOptions, LogOptions, ForensicOptions,
):
    ref_model_sync_steps: int | None = None
    """With beta in full fine-tuning: move the reference towards the policy every N steps."""
    ref_model_mixup_alpha: float = 0.6
    """Weight of the policy in that update of the reference."""
    micro_batch_size: int = 8
    """Completions in one forward pass of one process."""
    steps_per_generation: int | None = None
    """Micro-batches of each process in one generation batch; unset: gradient_accumulation_steps."""
    num_iterations: int = 1
    """Passes over a generation batch."""
    not_here: ClassVar = {
        "sequence_len": "prompts and completions are bounded by max_prompt_length and max_completion_length",
        "excess_length_strategy": "prompts longer than max_prompt_length are left out",
        "sample_packing": "the completions of a micro-batch are packed anyway",
        "train_on_inputs": "only tokens that the policy wrote are trained",
        "random_init": "train with sft.py first", "tokenizer_vocab_size": "train with sft.py first",
    }

    def __post_init__(self):
        check_every_part(self)
        replayed = self.rollout_engine == "replay"
        if not (self.reward_funcs or replayed or self.environment or self.teacher_model):
            raise ConfigError(
                "reward_funcs", None, "must name at least one reward function, e.g. [exact_match]"
            )
        check_at_least_one(
            self, "num_iterations", "steps_per_generation", "ref_model_sync_steps"
        )
        check_ranges(self, ("ref_model_mixup_alpha", 0, 1))
        if self.num_generations < 2 and not replayed and self.rl_coef:
            raise ConfigError(
                "num_generations", self.num_generations, "must be at least 2: a group is its own baseline"
            )
        if not self.rl_coef and not self.teacher_model:
            raise ConfigError("rl_coef", 0, "leaves nothing to learn from without a teacher_model")
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        several = self.num_iterations > 1 or self.steps_per_generation > self.gradient_accumulation_steps
        if self.router_replay and (self.bypass_mode or not several):
            raise ConfigError(
                "router_replay", True,
                "needs a pass that computes π_old: several updates a batch (num_iterations or "
                "steps_per_generation), without bypass_mode",
            )
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ConfigError(
                "steps_per_generation", self.steps_per_generation,
                f"must be a multiple of gradient_accumulation_steps ({self.gradient_accumulation_steps})",
            )
        if self.lora_dropout:
            raise ConfigError(
                "lora_dropout", self.lora_dropout,
                "makes the trained policy differ from the one that samples: set it to 0 here",
            )


# ------------------------------------------------------------------------------------------------------------
# The loss
# ------------------------------------------------------------------------------------------------------------


@dataclass
class StepSize:
    """Totals of an optimiser step over all micro-batches and ranks. Losses are divided by these and never by
    a micro-batch's own counts: the result must not depend on how the step is cut into micro-batches."""

    completions: int
    tokens: float  # Σ m
    ranks: int = 1
    reused: bool = False  # the batch serves several steps: its π_old was kept
    entropy_coef: float = 0.0  # weight of the entropy bonus in this step
    entropy_threshold: float | None = None  # tokens of less entropy are not trained on
    trained_tokens: float = 1.0  # tokens that get the bonus: Σ m, or those above the threshold

    @staticmethod
    def of(rollouts: Sequence[Rollout], options: Any, **more: Any) -> "StepSize":
        tokens = sum(
            r.written().sum() for r in rollouts if not (options.mask_truncated_completions and r.truncated)
        )
        tokens = max(1.0, float(tokens))
        return StepSize(len(rollouts), tokens, **{"trained_tokens": tokens, **more})


def policy_loss(
    logprobs: Tensor, *, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, options: Any,
    size: StepSize, sampling_logprobs: Tensor | None = None, ref_logprobs: Tensor | None = None,
    entropy_mask: Tensor | None = None, truncated: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's part of the step's loss, and intermediate values for the metrics.

    All [B, T] but `truncated` [B] and `advantages`, [B] or [B, T]. The parts of all micro-batches and ranks
    add up to the loss. Formulas: GRPO arXiv 2402.03300, Dr. GRPO 2503.20783, DAPO 2503.14476, GSPO
    2507.18071, CISPO 2506.13585, SAPO 2511.20347; k3 is Schulman's estimator, (π_ref/π) − log(π_ref/π) − 1.
    """
    A = advantages.view(len(advantages), -1).to(logprobs.dtype)
    stats: dict[str, Tensor] = {}
    if truncated is not None and options.mask_truncated_completions:
        mask = mask * (~truncated)[:, None]
    length = mask.sum(-1, keepdim=True).clamp(min=1)

    # Which tokens count, and with what weight: what the sampler drew from need not be π_old (other precision,
    # older weights).
    counts = (mask > 0) & (A != 0)
    weight: Tensor | float = 1.0
    if options.off_policy_mask_threshold is not None:
        drawn_from = old_logprobs if sampling_logprobs is None else sampling_logprobs
        drift = torch.nan_to_num(drawn_from - logprobs.detach(), nan=0.0) * mask
        keep = (A >= 0) | (drift.sum(-1, keepdim=True) / length <= options.off_policy_mask_threshold)
        counts = counts & keep
        stats["off_policy_masked"] = (~keep).any(-1)
    if entropy_mask is not None:
        counts = counts & (entropy_mask > 0)
    if sampling_logprobs is not None:
        ratio, applied, outside, known = policy.sampler_ratio(old_logprobs, sampling_logprobs, mask, options)
        stats |= {"sampler_ratio": ratio, "sampler_applied": applied, "sampler_outside": outside,
                  "sampler_known": known}
        if options.vllm_importance_sampling_correction:
            weight = applied.detach()
            counts = counts & (weight > 0)

    # The ratio of the policy to the weights that made the batch. Tokens that do not count get log-ratio 0
    # before the exponential: an infinite ratio times 0 is NaN, and so is its gradient.
    log_ratio = logprobs - old_logprobs
    if options.importance_sampling_level == "sequence":
        log_ratio = (torch.where(mask > 0, log_ratio, 0.0) * mask).sum(-1, keepdim=True) / length
    every_ratio, stats["log_ratio"] = log_ratio.detach().exp(), log_ratio.detach()
    here = counts if log_ratio.shape == counts.shape else counts.any(-1, keepdim=True)
    ratio = torch.where(here, log_ratio, 0.0).exp()
    low, high = options.epsilon, options.epsilon_high if options.epsilon_high is not None else options.epsilon
    if options.loss_type == "cispo":
        loss = -ratio.clamp(max=high).detach() * A * logprobs
        stats["cispo_clipped"] = (every_ratio > high) & (A > 0)
    elif options.loss_type == "sapo":
        steep = torch.where(A > 0, options.sapo_temperature_pos, options.sapo_temperature_neg)
        loss = -A * torch.sigmoid(steep * (ratio - 1)) * 4 / steep
    else:
        bounded = ratio if options.delta is None else ratio.clamp(max=options.delta)
        loss = -torch.minimum(bounded * A, ratio.clamp(1 - low, 1 + high) * A)
        judged = every_ratio if options.delta is None else every_ratio.clamp(max=options.delta)
        stats["clipped_low"], stats["clipped_high"] = (
            (judged < 1 - low) & (A < 0),
            (judged > 1 + high) & (A > 0),
        )
    loss = torch.where(counts, loss * weight, 0.0)

    if ref_logprobs is not None:
        back = ref_logprobs - logprobs
        k3 = back.exp() - back - 1
        stats["kl"] = k3.detach()
        if options.beta:
            penalty = k3 if options.kl_estimator == "k3" else back.square() / 2
            weighted = penalty * log_ratio.exp() if options.use_bias_correction_kl else penalty
            loss = loss + options.beta * weighted

    if options.loss_type in ("grpo", "sapo"):
        total = ((loss * mask).sum(-1, keepdim=True) / length).sum() / size.completions
    elif options.loss_type == "dr_grpo":
        total = (loss * mask).sum() / (size.completions * options.max_completion_length)
    else:
        total = (loss * mask).sum() / size.tokens
    stats["mask"] = mask
    return total, stats


def grpo_loss(
    model: Transformer, batch: PolicyBatch, size: StepSize, config: Any, aux_coef: float
) -> tuple[Tensor, dict[str, Any]]:
    """This micro-batch's part of the step's loss, and intermediate values for the metrics. FSDP averages
    gradients over ranks, but the loss is a sum over them: × ranks."""
    routes = batch.kept_routes(model.arch) if config.router_replay else None
    logprobs, entropy, router_logits, nonfinite = policy.token_logprobs(
        model, batch, config.temperature, entropy_gradient=bool(size.entropy_coef), routes=routes
    )
    old_logprobs, entropy_mask = logprobs.detach(), None
    if config.bypass_mode and batch.sampling_logprobs is not None:
        old_logprobs = torch.where(batch.sampling_logprobs.isfinite(), batch.sampling_logprobs, old_logprobs)
    elif size.reused:
        old_logprobs = batch.stored("old_logprobs")
        if old_logprobs is None:
            raise BallastError(
                "the checkpoint was written in the middle of a batch by a version before 0.3, without π_old; "
                "resume from one at the end of a batch, or set resume: never"
            )
    if size.entropy_threshold is not None:
        entropies = batch.stored("entropies")
        assert entropies is not None
        entropy_mask = entropies >= size.entropy_threshold
    loss, stats = policy_loss(
        logprobs, old_logprobs=old_logprobs, advantages=batch.advantages, mask=batch.mask, options=config,
        size=size, sampling_logprobs=batch.sampling_logprobs, truncated=batch.truncated,
        entropy_mask=entropy_mask, ref_logprobs=batch.stored("ref_logprobs"),
    )
    if size.entropy_coef:
        counted = stats["mask"] if entropy_mask is None else stats["mask"] * entropy_mask
        loss = loss - size.entropy_coef * (entropy * counted).sum() / size.trained_tokens
    stats |= {"loss": loss.detach(), "entropy": entropy.detach(),
              "old_logprobs": logprobs.detach() if config.bypass_mode else old_logprobs,
              "nonfinite_hidden_states": nonfinite}
    if routes is not None:
        stats["rerouted"] = policy.rerouted(router_logits, routes)
    if aux_coef and router_logits:
        real = torch.ones(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
        balance = load_balancing_loss(router_logits, model.arch, real)
        loss = loss + aux_coef * len(batch.rollouts) / size.completions * balance
    return loss * size.ranks, stats


def entropy_threshold(micro: Sequence[Sequence[Rollout]], options: Any, world: World) -> tuple[float, float]:
    """The entropy above which the top `top_entropy_quantile` of a step's tokens lie, over all micro-batches
    and ranks; and the number of these tokens."""
    own_entropies = [
        r.entropies[r.written()] for micro_batch in micro for r in micro_batch
        if r.entropies is not None and not (options.mask_truncated_completions and r.truncated)
    ]
    of_ranks = dist.gather(np.concatenate([np.empty(0), *own_entropies]), world)
    values = np.concatenate(of_ranks)  # in fp64
    if not len(values):
        return math.inf, 1.0
    threshold = float(np.quantile(values, 1 - options.top_entropy_quantile))
    return threshold, float((values >= threshold).sum())


def entropy_bonus(options: Any, last_entropy: float) -> float:
    """entropy_coef; with entropy_target only while the last step's entropy was not above it."""
    target = options.entropy_target
    return 0.0 if target is not None and last_entropy > target else options.entropy_coef


# ------------------------------------------------------------------------------------------------------------
# Rewards to advantages
# ------------------------------------------------------------------------------------------------------------


def generation_batch_size(config: Config, world_size: int) -> int:
    """Completions per generation batch. Raises ConfigError if it would split a group."""
    assert config.steps_per_generation is not None
    size, n = config.micro_batch_size * world_size * config.steps_per_generation, config.num_generations
    if size % n:
        each = world_size * config.steps_per_generation
        fitting = [m for m in range(1, 8 * n + 1) if m * each % n == 0]
        near = sorted(fitting, key=lambda m: abs(m - config.micro_batch_size))[:3]
        raise ConfigError(
            "micro_batch_size", config.micro_batch_size,
            f"makes a generation batch of {size} completions (micro_batch_size · {world_size} processes · "
            f"{config.steps_per_generation} steps_per_generation), not a multiple of num_generations ({n}); "
            f"these would do: {', '.join(str(m) for m in sorted(near))}",
        )
    return size


def group_advantages(rewards: Tensor, num_generations: int, scale: str) -> tuple[Tensor, dict[str, float]]:
    """rewards [B], group after group, NaN on rows without one → advantages [B] and the metrics of the batch.

    A reward counts relative to its siblings (DeepSeekMath, §4.1.2), over their unbiased standard deviation +
    1e-4. Rows without a reward get 0 and stay out of every statistic. In a group that counts as flat in
    frac_reward_zero_std every advantage is exactly 0.
    """
    centred, group_std, flat, judged = in_groups(rewards, num_generations)
    present = rewards[~torch.isnan(rewards)]
    batch_std = spread(present)
    divisor = {"group": group_std + SMALL, "batch": rewards.new_tensor(batch_std + SMALL), "none": 1.0}
    groups = judged.sum().clamp(min=1)
    metrics = {} if not len(present) else {
        "reward": present.mean().item(),
        "reward_std": batch_std,
        "reward_std_within_group": (group_std.sum() / groups).item(),
        "frac_reward_zero_std": ((flat & judged).sum() / groups).item(),
    }
    return (centred / divisor[scale]).flatten(), metrics


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    # 1. Set up.
    batch_size = generation_batch_size(config, dist.world_size())
    run = loop.begin(config)
    world, tokenizer, n = run.world, run.tokenizer, config.num_generations
    assert config.steps_per_generation is not None
    slices = config.steps_per_generation // config.gradient_accumulation_steps  # optimiser steps of one pass
    updates = slices * config.num_iterations  # optimiser steps that a generation batch is used for
    step_rows = batch_size // slices  # completions of an optimiser step
    rows_at_once = config.micro_batch_size * world.size  # in one micro-batch of all ranks

    # 2. Prompts.
    prompts = read_prompt_data(config, tokenizer, run.directory, batch_size, updates,
                               tools=ToolBox(config.tools, run.directory).schemas)
    total_steps = min(prompts.batches * updates, config.max_steps or prompts.batches * updates)
    loop.plan(run, total_steps, updates * prompts.batches_per_epoch, **{
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "completions of a generation batch": batch_size, "data": prompts.fingerprint,
    })
    run.measured |= prompts.measured

    # 3. Model, optimiser, reference, engine.
    model, optimizers = loop.build(run)
    trained = [p for p in model.parameters() if p.requires_grad]
    reference, teacher = reference_model(run, config), read_teacher(run)
    share_prompts, aux_coef = policy.can_share_prompts(model, config.share_prompts), loop.router_aux_coef(run)
    trained_on = "recorded" if prompts.replay else f"{len(prompts.train):,}"
    loop.describe(
        run, model, f"{trained_on} prompts, {len(prompts.held_out):,} held out; {total_steps} steps of "
        f"{step_rows} completions on {world.devices(config)}, {config.rollout_engine} rollouts",
    )
    policy.report_kl(config)
    if config.router_replay and not any(model.arch.expert_layers):
        raise ConfigError("router_replay", True, "is for mixtures of experts, and this model is none")
    loop.warn_beyond_positions(run, prompts.longest(config), "max_prompt_length or max_completion_length")

    # 4. Resume.
    moving = {"reference": reference} if reference is not None and config.ref_model_sync_steps else {}
    loop.resume(run, model, optimizers, moving)
    state = run.state
    rollouts = kept(run.resume_from, "rollouts", state)  # the generation batch in use
    buffer = ReplayBuffer(config.replay_buffer_size)
    buffer.groups.extend(groups_of(kept(run.resume_from, "buffer", state), n))
    engine = make_engine(model, config, tokenizer, world, prompts.train)
    sampler = Sampler(engine, prompts.train, config, tokenizer, world)
    queue = sampler.queue(prompts, batch_size, updates, run)
    eval_sampler = Sampler(engine, prompts.held_out, config, tokenizer, world)
    forensics = Forensics(model, config, world, tokenizer, reference)
    recorder = Recorder(run.output_dir / "rollouts", tokenizer, world.main)
    schedule = Schedule(engine, run.output_dir, world.main)

    def micro_batches(rollouts: list[Rollout]) -> list[list[Rollout]]:
        """This rank's share of some rollouts, cut into micro-batches."""
        mb = config.micro_batch_size
        return [rollouts[i : i + mb] for i in range(world.rank * mb, len(rollouts), world.size * mb)]

    # 5. The loop.
    try:
        if prompts.held_out and state["eval_before"] is None:
            state["eval_before"] = evaluate(eval_sampler, run, recorder)
            run.logger.log(run.step, state["eval_before"])
        while run.step < total_steps:
            rank_timing = dist.begin_step(run.step + 1, world)
            generation, used = divmod(run.step, updates)
            timer, seconds_by_phase = dist.Timer(), {"sync": 0.0, "logprob": 0.0, "train": 0.0}
            sampler.seconds, queue.seconds, queue.metrics = {"generate": 0.0, "reward": 0.0}, 0.0, {}
            if used:
                queue.refresh(generation + 1, run.step)
            else:
                # a. Roll out: num_generations completions of each prompt, scored. Token ids, never text.
                rollouts = queue.next(generation, run.step, last=run.step + updates >= total_steps)
                timer()

                # b. Advantages: a completion is good only relative to its siblings.
                table, names, weights = reward_table(rollouts, config)
                if generation == 0 and names:
                    refuse_no_rewards(table, names)
                rewards = weighted_rewards(table, weights)
                advantages, batch_metrics = group_advantages(rewards, n, config.scale_rewards)
                if config.multi_objective_aggregation == "normalize_then_sum":
                    advantages = separate_advantages(table, weights, n)
                assign(rollouts, advantages, n, config)
                state["num_tokens"] += tokens_of(rollouts)
                batch_metrics |= reward_metrics(table, names) | policy.completion_metrics(rollouts)
                batch_metrics |= sampler.signs | signs.of_groups(rollouts, n, rewards.tolist())
                batch_metrics["weight_version_lag"] = float(
                    run.step - min(r.weight_version for r in rollouts)
                )
                recorder.write(run.step, rollouts)
                shown = rollouts
                if config.replay_buffer_size:
                    rollouts, replaced = buffer.refill(rollouts, n)
                    batch_metrics["replayed_groups"] = float(replaced)
                state["batch_metrics"] = batch_metrics  # every step that uses the batch reports them
                check_sampler(
                    engine, model, rollouts, micro_batches(rollouts), config, world, share_prompts
                )

                # c. log π_old of the whole batch, before the first update changes its weights; and log π_ref.
                policy.keep_logprobs(
                    model, reference, micro_batches(rollouts), config, world, share_prompts,
                    old=(updates > 1 and not config.bypass_mode) or config.top_entropy_quantile < 1,
                    kl=policy.measures_kl(config, run.step, updates),
                )
                if teacher is not None:
                    batch_metrics |= teacher.advise(
                        model, micro_batches(rollouts), config, world, share_prompts
                    )
                seconds_by_phase["logprob"] = timer()

            # The rows of this optimiser step. Groups stay together: prompts came in random order already, and
            # a micro-batch of flat groups can be skipped.
            step_rollouts = rollouts[(used % slices) * step_rows :][:step_rows]
            size = step_size(step_rollouts, micro_batches(step_rollouts), run, reused=updates > 1)

            # d. Loss and backward, over this rank's micro-batches.
            tally, losses, skipped = Tally(), [], 0
            with monitor.profiled(run.step + 1, config, run.output_dir, world.rank, world.device):
                for k, micro_batch in enumerate(micro_batches(step_rollouts)):
                    across = step_rollouts[k * rows_at_once : (k + 1) * rows_at_once]
                    if not (any(r.signal for r in across) or config.beta or size.entropy_coef or teacher):
                        skipped += 1  # by all ranks alike: every rank knows all advantages
                        continue
                    batch = policy.collate(micro_batch, world.device, share_prompts)
                    forensics.remember(batch, batch.rows, batch.given)
                    loss, stats = grpo_loss(model, batch, size, config, aux_coef)
                    loss.backward()
                    losses.append(stats["loss"])
                    policy.tally_policy(tally, stats, batch, run.step + 1, first_use=not used)

                # e. The norm before clipping; nothing that is not finite may reach the weights. A step
                # without any signal leaves the optimiser alone: momentum alone would still move the weights.
                norm, with_gradient = dist.gradient_norm(trained)
                rate = dist.learning_rate(run.step, config, total_steps)
                loss_of = functools.partial(grpo_loss, model, size=size, config=config, aux_coef=aux_coef)
                if losses and forensics.healthy(run.step + 1, losses, norm, loss_of):
                    dist.clip_gradients(with_gradient, config.max_grad_norm, norm)
                    rate = dist.update(optimizers, rate)
            run.step += 1
            seconds_by_phase["train"] = timer()
            if (
                reference is not None
                and config.ref_model_sync_steps
                and run.step % config.ref_model_sync_steps == 0
            ):
                dist.mix_weights(reference, model, config.ref_model_mixup_alpha)

            # f. Metrics over the whole step, on all ranks alike.
            tally.mean("train/loss", sum(loss.item() for loss in losses), 1.0 / world.size)
            policy_metrics = tally.result(world)
            state["entropy"] = policy_metrics.get("entropy", state.get("entropy", 0.0))
            seconds_by_phase |= {**sampler.seconds, "sync": queue.seconds}
            metrics: dict[str, float] = {
                **state["batch_metrics"], **policy_metrics, "train/grad_norm": norm.item(),
                "train/learning_rate": rate, "num_tokens": state["num_tokens"],
                "skipped_micro_batches": float(skipped), "entropy_coef": size.entropy_coef,
                "epoch": prompts.epoch_of(generation),
                "step_time": sum(seconds_by_phase.values()),
                **{f"step_time/{phase}": value for phase, value in seconds_by_phase.items()},
                **schedule.write(run.step, seconds_by_phase), **queue.metrics, **forensics.metrics(),
                **memory.peak_memory(world.device), **rank_timing,
            }

            # g. Evaluate, log, save.
            due = loop.end_step(run, evaluates=bool(prompts.held_out))
            if due.evaluate or due.save:
                queue.settle(generation + 1, run.step)  # before new weights are sent
            if due.evaluate:
                metrics |= evaluate(eval_sampler, run, recorder)
                state["eval_after"] = {k: v for k, v in metrics.items() if k.startswith("eval/")}
            run.logger.observe(run.step, metrics)
            if due.log or due.evaluate:
                run.logger.log(run.step, metrics)
                if config.log_completions and used == 0:
                    show_rollouts(shown, tokenizer, run.logger, run.step)
            if due.save:
                # The servers get the weights of the checkpoint, so that a resumed run samples from the same.
                engine.sync(run.step, due=True)
                recorder.finish()
                save(run, model, optimizers, rollouts, queue, buffer, moving)
            if due.stop:
                return loop.stop(run)
    except EngineError as error:
        # A lost server must not lose progress: save what was trained so far before the run ends.
        if run.step > (run.checkpointer.steps() or [0])[-1]:
            save(run, model, optimizers, rollouts, queue, buffer, moving)
            run.checkpointer.finish()
            raise EngineError(
                f"{error}; step {run.step} is saved, the same command continues from it"
            ) from None
        raise
    finally:
        queue.close()

    # 6. Final save and report.
    recorder.finish()
    final = loop.save_model(run, model)
    loop.finish(run, final, monitor.evaluation_lines(state["eval_before"], state.get("eval_after")))


def reference_model(run: Run, config: Config) -> Transformer | None:
    """π_ref, a frozen copy of the starting weights. None without beta, and with LoRA, where the model without
    its adapters serves."""
    if not config.beta or config.adapter:
        return None
    moves = config.ref_model_sync_steps is not None  # by less than bf16 can represent
    model = building.build_model(run.arch, run.checkpoint, config, run.world, frozen=not moves)
    return model.eval().requires_grad_(False)


def step_size(
    rollouts: list[Rollout], micro_batches: list[list[Rollout]], run: Run, reused: bool
) -> StepSize:
    """The totals that a step's losses are divided by. A collective with top_entropy_quantile."""
    config = run.config
    more: dict[str, Any] = {}
    if config.top_entropy_quantile < 1:
        threshold, count = entropy_threshold(micro_batches, config, run.world)
        more = {"entropy_threshold": threshold, "trained_tokens": count}
    bonus = entropy_bonus(config, run.state.get("entropy", 0.0))
    return StepSize.of(rollouts, config, ranks=run.world.size, reused=reused, entropy_coef=bonus, **more)


def save(
    run: Run, model: Transformer, optimizers: list, rollouts: list[Rollout],
    queue: RolloutQueue, buffer: ReplayBuffer, moving: dict[str, Any],
) -> None:
    """A checkpoint with what the loop holds besides weights: the batch in use with its π_old and π_ref, what
    was sampled ahead, the replay buffer. A collective."""
    stored = [(i, name, value) for i, r in enumerate(rollouts) for name in OF_TRAINER
              if (value := getattr(r, name)) is not None]
    for of_rank in dist.gather(stored, run.world):
        for i, name, value in of_rank:
            setattr(rollouts[i], name, value)
    queue.engine.rest()
    ahead, run.state["queue"] = queue.keep()
    held = {"rollouts": rollouts, "ahead": ahead, "buffer": [r for g in buffer.groups for r in g]}
    files = {f"{name}.parquet": as_parquet(some) for name, some in held.items() if run.world.main}
    run.checkpointer.save(run.step, model, optimizers, run.state, moving, files)


# ------------------------------------------------------------------------------------------------------------
# Tools
# ------------------------------------------------------------------------------------------------------------


@dataclass
class TestConfig(Config):
    completions: list[str] = field(default_factory=list)
    """test-rewards: score these texts, one after the other, instead."""
    source: Literal["answer", "generate"] = "answer"
    """test-rewards: score the rows' own answers, or completions sampled from the model."""
    rows: int = 4
    """test-rewards: how many rows."""


def test_rewards(argv: list[str]) -> None:
    """Score sample completions outside training, and show what the functions get."""
    score_samples(parse_config(TestConfig, argv, description="Score sample completions outside training."))


def cli() -> None:
    """python grpo.py, or one of its tools."""
    if sys.argv[1:2] == ["test-rewards"]:
        loop.start(test_rewards, lambda: sys.argv[2:])
    elif sys.argv[1:2] == ["serve"]:
        how = "Start the vLLM server that a config needs."
        loop.start(serve, lambda: parse_config(Config, sys.argv[2:], description=how))
    else:
        loop.cli(main, Config, __doc__)


if __name__ == "__main__":
    cli()
