"""Energy-based fine-tuning: sample completions, and reward those whose features match the features of the
true completion (Jelassi et al., "Matching Features, Not Tokens", arXiv 2603.12248).

Cross-entropy trains on true prefixes; at inference a model reads its own output. Here the policy is trained
on what it writes itself, without a verifier: the reward is how well the hidden states of a frozen copy of the
starting model agree with those on the true completion, minus how similar the samples are.
"""

import functools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import dist
from checkpoints import building
from checkpoints.adapters import base_of
from checkpoints.saving import CheckpointOptions
from data import EncodingOptions, Prompt, RowOptions
from dist import DistOptions, OptimizerOptions
from health import memory, monitor
from health.forensics import ForensicOptions, Forensics
from health.monitor import LogOptions
from kernels import SharedPrompts
from model import ModelOptions, Transformer, forward_only, load_balancing_loss, without_gradients
from numerics.losses import linear_cross_entropy, linear_logprobs
from rollouts import policy, signs
from rollouts.blocks import (
    BlockOptions,
    BlockPass,
    Document,
    packed,
    read_documents,
    sample_blocks,
    write_blocks,
)
from rollouts.engines import check_sampler, make_engine
from rollouts.environments import conversations, play, played
from rollouts.policy import PolicyBatch, PolicyOptions, Tally
from rollouts.prompts import PromptData, read_prompt_data
from rollouts.queues import RolloutQueue
from rollouts.records import Recorder, as_parquet, kept
from rollouts.rollout import Rollout, tokens_of
from rollouts.sampler import as_rollouts
from rollouts.tokens import as_ids, as_mask, same_ids
from rollouts.truths import Conversation, true_completion, true_rollout
from rollouts.vllm_server import EngineError
from run import loop
from run.config import (
    ConfigError,
    check_at_least_one,
    check_every_part,
    check_ranges,
    option_names,
    refuse_unread,
)
from run.log import log
from run.loop import Run
from text.packing import LoopOptions
from text.tokenizer import IGNORE, Tokenizer


@dataclass
class FeatureOptions:
    feature_layers: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Depths whose hidden states make the features, as shares of the layers."""
    embed_method: Literal["last_token", "mean_pooling", "completion_mean", "concat"] = "last_token"
    """How a sequence's hidden states become one vector: of the last token, the mean of prefix and completion,
    the mean of the completion, or those at 25, 50 and 75 % of the completion."""
    use_whitening: bool = False
    """The same as `whitening: feature`."""
    whitening: Literal["none", "feature", "sample"] = "none"
    """Whiten the features of the samples of a prefix, in feature or in sample space. Whitened samples that
    are linearly independent have diversity 0 by construction: watch ebft/pairwise_cosine."""
    alignment_coef: float = 1.0
    """Weight of the agreement with the true completion."""
    diversity_coef: float = 1.0
    """Weight of the penalty on samples that are alike."""
    advantage_estimator: Literal["rloo", "group_norm", "reinforce"] = "rloo"
    """rloo: the reward minus a baseline from the other samples. group_norm: centred and divided by the
    group's standard deviation. reinforce: the reward itself."""
    rl_coef: float = 1.0
    """Weight of the policy gradient."""
    ce_coef: float = 0.0
    """Weight of the cross-entropy on the true tokens; 0.03 to 0.1 in the paper."""
    offload_feature_network: bool = False
    """Full fine-tuning: keep the frozen copy in host memory, and on the GPU only while it is used."""

    def check(self) -> None:
        if not self.feature_layers or not all(0 <= f <= 1 for f in self.feature_layers):
            raise ConfigError(
                "feature_layers", self.feature_layers, "must be shares of the depth, from 0 to 1"
            )
        for key in ("alignment_coef", "diversity_coef", "rl_coef", "ce_coef"):
            check_ranges(self, (key, -math.inf, math.inf))
        if not (self.rl_coef and (self.alignment_coef or self.diversity_coef)) and not self.ce_coef:
            key = "rl_coef" if not self.rl_coef else "alignment_coef"
            raise ConfigError(key, 0.0, "leaves nothing to train: all other coefficients are 0 too")


@dataclass
class Config(
    ModelOptions, RowOptions, FeatureOptions, BlockOptions, PolicyOptions, LoopOptions, OptimizerOptions,
    CheckpointOptions, DistOptions, LogOptions, ForensicOptions,
):
    mode: Literal["structured", "strided"] = "structured"
    """structured: prompts with a true completion, sampled by a rollout engine. strided: many short rollouts
    that branch off the prefixes of a document, in one forward pass, without a server."""
    adaptive_max_tokens: bool = True
    """structured: sample at most gt_length_multiplier times the longest true completion of the batch, but at
    least 64 tokens."""
    gt_length_multiplier: float = 1.5
    """structured: how much longer than the truth a completion may become."""
    chat_turns: Literal["last", "first", "every", "rollout"] = "last"
    """structured, type: chat: which answers of a conversation are sampled. rollout: the policy gives all
    answers from the first on, with the row's own questions in between (its `remaining_turns`)."""
    eval_num_generations: int = 4
    """structured: completions of each held-out prompt."""
    n_samples_per_prompt: int = 4
    """strided: samples of each block."""
    temperature: float = 0.6
    """Temperature of sampling and of the trained log-probabilities."""
    samples_a_pass: int = 1
    """strided: samples of a block in one forward pass of training; more is faster, 1 takes least memory."""

    not_here: ClassVar = {
        "sample_packing": "documents of a micro-batch are packed anyway",
        "environment": "it has no true completion to match; use grpo.py",
        "reward_funcs": "features are the reward; use grpo.py for functions",
        "streaming_partial_batch": "there is nothing to score early here",
        "random_init": "train with sft.py first", "tokenizer_vocab_size": "train with sft.py first",
        **dict.fromkeys(
            ("loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "num_iterations",
             "sapo_temperature_pos", "sapo_temperature_neg", "use_bias_correction_kl",
             "off_policy_mask_threshold", "top_entropy_quantile", "entropy_coef", "entropy_target",
             "mask_truncated_completions"),
            "a batch serves one update here, a policy gradient without a ratio to clip; use grpo.py",
        ),
    }

    @staticmethod
    def of_other_mode(mode: str) -> set[str]:
        """Options that `mode` does not read."""
        of_structured, of_strided = options_by_mode()
        return of_structured if mode == "strided" else of_strided

    def __post_init__(self):
        check_every_part(self)
        of_structured, of_strided = options_by_mode()
        if self.mode == "strided":
            refuse_unread(self, of_structured, "is of mode: structured, and mode is strided")
            if self.rollout_engine == "vllm":
                raise ConfigError("rollout_engine", "vllm", "is of mode: structured; blocks need no server")
        else:
            refuse_unread(self, of_strided, "is of mode: strided, and mode is structured")
        if not 0 < self.gt_length_multiplier < math.inf:
            raise ConfigError("gt_length_multiplier", self.gt_length_multiplier, "must be above 0")
        check_at_least_one(self, "n_samples_per_prompt", "samples_a_pass", "eval_num_generations")
        if self.use_whitening and self.whitening == "none":
            self.whitening = "feature"
        siblings = "num_generations" if self.mode == "structured" else "n_samples_per_prompt"
        if getattr(self, siblings) == 1 and (self.advantage_estimator != "reinforce" or self.diversity_coef):
            log.warning("%s is 1: without siblings only reinforce without diversity is defined", siblings)
            self.advantage_estimator, self.diversity_coef = "reinforce", 0.0
        if self.lora_dropout:
            raise ConfigError(
                "lora_dropout", self.lora_dropout,
                "makes the trained policy differ from the one that samples: set it to 0 here",
            )


def options_by_mode() -> tuple[set[str], set[str]]:
    """(options that only structured mode reads, those that only strided mode reads)."""
    both = {"temperature", "replay_path", "rollout_engine", "log_completions"}
    structured = {"adaptive_max_tokens", "gt_length_multiplier", "chat_turns", "eval_num_generations"}
    strided = {"n_samples_per_prompt", "samples_a_pass"}
    return (
        (option_names(PolicyOptions) | structured) - both,
        option_names(BlockOptions, EncodingOptions) | strided,
    )


# ------------------------------------------------------------------------------------------------------------
# Reward and advantage (all batched over prompts, or prompts and blocks: … below)
# ------------------------------------------------------------------------------------------------------------


def whiten(samples: Tensor, truth: Tensor, form: str) -> tuple[Tensor, Tensor, int]:
    """samples X [P, n, D] and truth [P, D] → whitened X, the truth of each sample [P, n, D], and how many
    prompts had to fall back.

    With the thin SVD X = U S Vᵀ, singular values below 1e-5 of the largest dropped: `feature` multiplies by V
    S⁻¹ Vᵀ on the right (never as a D × D matrix), `sample` by U S⁻¹ Uᵀ on the left. Both turn X into U Vᵀ;
    the truth differs. If the SVD fails, it is retried once with noise of 1e-6 · mean|X|; if that fails too,
    the features are only L2-normalised.
    """
    fallback = 0

    def decompose(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.linalg.svd(x, full_matrices=False)

    try:
        U, S, Vt = decompose(samples)
        if not torch.isfinite(S).all():
            raise RuntimeError("not finite")
    except RuntimeError:
        try:
            U, S, Vt = decompose(samples + 1e-6 * samples.abs().mean() * torch.randn_like(samples))
            if not torch.isfinite(S).all():
                raise RuntimeError("not finite")
        except RuntimeError:
            fallback = samples.shape[0]
            log.warning("whitening failed: the features of this batch are only normalised")
            x, g = (torch.nan_to_num(t, nan=0.0, posinf=0.0, neginf=0.0) for t in (samples, truth))
            return normalize(x, dim=-1), normalize(g, dim=-1)[:, None].expand_as(samples), fallback
    kept = 1e-5 * S.amax(-1, keepdim=True) < S
    inverse = torch.where(kept, 1 / torch.where(kept, S, 1.0), 0.0)
    flat = (U * kept[..., None, :]) @ Vt
    if form == "feature":
        coordinates = (Vt @ truth[..., None])[..., 0] * inverse
        white = (coordinates[..., None, :] @ Vt)[..., 0, :]
        return flat, white[:, None].expand_as(samples), fallback
    ones = U.sum(-2)  # Uᵀ·1: the truth repeated n times is 1 gᵀ
    weights = (U @ (inverse * ones)[..., None])[..., 0]
    return flat, weights[..., None] * truth[:, None], fallback


def alignment(samples: Tensor, truth: Tensor) -> Tensor:
    """2·cos(x_j, g_j): samples and truth [P, n, D] → [P, n] (paper, eq. 7)."""
    return 2 * torch.nn.functional.cosine_similarity(samples, truth, dim=-1, eps=1e-12)


def diversity(samples: Tensor) -> Tensor:
    """2/(n−1) · Σ_{j'≠j} x_j·x_{j'}: samples [P, n, D] → [P, n]; 0 for a single sample (paper, eq. 7)."""
    n = samples.shape[-2]
    if n == 1:
        return samples.new_zeros(samples.shape[:-1])
    products = samples @ samples.transpose(-1, -2)
    return 2 / (n - 1) * (products.sum(-1) - products.diagonal(dim1=-2, dim2=-1))


def cfm_loss(samples: Tensor, truth: Tensor) -> Tensor:
    """‖mean_j x_j − mean_j g_j‖² [P]: the distance that the method minimises (paper, eq. 2)."""
    return (samples.mean(-2) - truth.mean(-2)).square().sum(-1)


def advantages(
    align: Tensor, diverse: Tensor, estimator: str, alignment_coef: float = 1.0, diversity_coef: float = 1.0
) -> Tensor:
    """alignment and diversity [P, n] → advantages [P, n].

    `rloo`: the reward minus a baseline from the other samples. For alignment this is their mean; the
    diversity of the others includes their pairs with j, which are removed: (Σ_k d_k − 2 d_j)/(n − 2). The
    plain mean of the other rewards, as used elsewhere, is biased. Without whitening the baseline does not
    depend on sample j at all; with whitening, which uses all samples, it does (docs/ebft.md). `group_norm`:
    (reward − mean)/(std + 1e-8). `reinforce`: the reward.
    """
    n = align.shape[-1]
    reward = alignment_coef * align - diversity_coef * diverse
    if estimator == "reinforce":
        return reward
    assert n > 1, "one sample has no sibling: only reinforce"
    if estimator == "group_norm":
        return (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-8)
    others = (align.sum(-1, keepdim=True) - align) / (n - 1)
    apart = torch.zeros_like(diverse)
    if n > 2:
        apart = (diverse.sum(-1, keepdim=True) - 2 * diverse) / (n - 2)
    return reward - (alignment_coef * others - diversity_coef * apart)


def energy(samples: Tensor, truth: Tensor, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Features of the samples [P, n, D] and of the truth [P, D] → advantages [P, n], and statistics by
    prefix."""
    if config.whitening == "none":
        x, fallback = normalize(samples, dim=-1), 0
        g = normalize(truth, dim=-1)[:, None].expand_as(samples)
    else:
        x, g, fallback = whiten(samples, truth, config.whitening)
    align, diverse = alignment(x, g), diversity(x)
    n = samples.shape[1]
    stats = {
        "alignment": align.mean(-1), "diversity": diverse.mean(-1), "cfm_loss": cfm_loss(x, g),
        "reward": (config.alignment_coef * align - config.diversity_coef * diverse).mean(-1),
        "alignment_cosine": torch.nn.functional.cosine_similarity(samples, truth[:, None], dim=-1).mean(-1),
        **against_others(samples, truth),
        "cfm_unwhitened": cfm_loss(*(normalize(t, dim=-1) for t in (samples, truth[:, None]))),
        "pairwise_cosine": diversity(normalize(samples,
        dim=-1)).mean(-1) / 2 if n > 1 else torch.zeros(len(x)),
        "whitening_fallbacks": torch.full((len(x),), float(fallback > 0)),
    }
    estimator = config.advantage_estimator
    return advantages(align, diverse, estimator, config.alignment_coef, config.diversity_coef), stats


def against_others(samples: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """How far the samples of a prefix agree with another prefix's truth, and the truths with each other: what
    the agreement with their own is worth."""
    if len(truth) < 2:
        return {}
    cosine, other = torch.nn.functional.cosine_similarity, truth.roll(len(truth) // 2, 0)
    return {"alignment_other": cosine(samples, other[:, None], dim=-1).mean(-1),
            "truths_cosine": cosine(truth, other, dim=-1)}


def feature_network(run: Run, config: Config) -> Transformer | None:
    """The frozen copy of the starting weights, sharded like the model; None with LoRA, where the model
    without its adapters serves."""
    if config.adapter:
        return None
    away = config.offload_feature_network or config.fsdp_cpu_offload
    copied = replace(config, fsdp_cpu_offload=away)
    return building.build_model(run.arch, run.checkpoint, copied, run.world, frozen=True)


@contextmanager
def on_device(frozen: Transformer | None, config: Config, world: dist.World) -> Iterator[None]:
    """Move an offloaded frozen copy to the GPU and back. If it is sharded, FSDP does this itself, block by
    block."""
    if frozen is None or not config.offload_feature_network or world.mesh is not None:
        yield
        return
    frozen.to(world.device)
    try:
        yield
    finally:
        frozen.to("cpu")


JUDGED = ("alignment_cosine", "cfm_loss", "cfm_unwhitened", "reward", "pairwise_cosine")  # held out


def feature_depths(network: Transformer, config: Config) -> tuple[int, ...]:
    return tuple(int(share * network.arch.num_layers) for share in config.feature_layers)


def main(config: Config) -> None:
    if config.mode == "structured":
        structured(config)
    else:
        strided(config)


# ------------------------------------------------------------------------------------------------------------
# Structured: prompts with a true completion
# ------------------------------------------------------------------------------------------------------------


@dataclass
class StepSize:
    """Totals of an optimiser step over all micro-batches and ranks; losses are divided by them."""

    completions: int
    tokens: float  # that the policy wrote
    true_tokens: int  # of the true completions, each prompt's once
    ranks: int

    @staticmethod
    def of(rollouts: Sequence[Rollout], n: int, ranks: int) -> "StepSize":
        tokens = max(1.0, float(sum(r.written().sum() for r in rollouts)))
        true_tokens = sum(int(true_rollout(r).written().sum()) for r in rollouts[::n])
        return StepSize(len(rollouts), tokens, true_tokens, ranks)


@dataclass
class TruthBatch:
    """True completions. `counts` is false on a rank without rows: it computes a dummy batch of weight 0."""

    batch: PolicyBatch
    counts: bool


def policy_gradient(
    logprobs: Tensor, batch: PolicyBatch, size: StepSize, config: Config
) -> tuple[Tensor, dict[str, Any]]:
    """REINFORCE on the samples, logprobs [B, T]: the gradient of −A · log π, summed over tokens and divided
    by those of the step, weighted by π/μ where the sampler's log-probs are known, with a KL penalty. A batch
    serves one update, so the policy that sampled it is π itself: there is no ratio to clip."""
    advantages, old = batch.advantages[:, None].to(logprobs.dtype), logprobs.detach()
    counts, weight = (batch.mask > 0) & (advantages != 0), torch.ones_like(logprobs)
    stats: dict[str, Any] = {"mask": batch.mask, "old_logprobs": old}
    if batch.sampling_logprobs is not None:
        drawn_from = batch.sampling_logprobs
        ratio, applied, outside, known = policy.sampler_ratio(old, drawn_from, batch.mask, config)
        stats |= {"sampler_ratio": ratio, "sampler_applied": applied, "sampler_outside": outside,
                  "sampler_known": known}
        if config.vllm_importance_sampling_correction:
            weight = applied.detach()
            counts = counts & (weight > 0)
    likelier = torch.where(counts, logprobs - old, 0.0).exp()  # 1, with the gradient of log π
    loss = torch.where(counts, -likelier * advantages * weight, 0.0)
    ref_logprobs = batch.stored("ref_logprobs")
    if ref_logprobs is not None:
        back = ref_logprobs - logprobs
        k3 = back.exp() - back - 1  # Schulman's estimator
        stats["kl"] = k3.detach()
        loss = loss + config.beta * k3 if config.beta else loss
    return (loss * batch.mask).sum() / size.tokens, stats


def ebft_loss(
    model: Transformer, batch: PolicyBatch | TruthBatch, size: StepSize, config: Config, aux_coef: float
) -> tuple[Tensor, dict[str, Any]]:
    """This micro-batch's part of the step's loss (policy gradient of samples, or ce_coef · cross-entropy of
    true completions), and intermediate values. FSDP averages gradients over ranks: × ranks."""
    if isinstance(batch, TruthBatch):
        nll = -policy.token_logprobs(model, batch.batch, 1.0)[0].sum()
        if not batch.counts:  # torch.where, not a product with 0: the dummy row's loss may be infinite
            nll = torch.where(torch.zeros_like(nll, dtype=torch.bool), nll, 0.0)
        return nll * (config.ce_coef / size.true_tokens * size.ranks), {"nll": nll.detach()}
    logprobs, entropy, router_logits, nonfinite = policy.token_logprobs(model, batch, config.temperature)
    loss, stats = policy_gradient(logprobs, batch, size, config)
    stats |= {"loss": loss.detach(), "entropy": entropy.detach(), "nonfinite_hidden_states": nonfinite}
    if aux_coef and router_logits:
        real = torch.ones(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
        balance = load_balancing_loss(router_logits, model.arch, real)
        loss = loss + aux_coef * len(batch.rollouts) / size.completions * balance
    return loss * size.ranks, stats


def structured(config: Config) -> None:
    # 1. Set up.
    n, mb, accumulation = config.num_generations, config.micro_batch_size, config.gradient_accumulation_steps
    batch_size = mb * accumulation * dist.world_size()
    if batch_size % n:
        problem = f"makes a step of {batch_size} completions, not a multiple of num_generations ({n})"
        raise ConfigError("micro_batch_size", mb, problem)
    run = loop.begin(config)
    world, tokenizer = run.world, run.tokenizer

    # 2. Prompts and their true completions.
    prompts = read_prompt_data(config, tokenizer, run.directory, batch_size, turns=config.chat_turns)
    total_steps = min(prompts.batches, config.max_steps or prompts.batches)
    loop.plan(run, total_steps, prompts.batches_per_epoch, **{
        "completions a step": batch_size, "data": prompts.fingerprint,
    })
    run.measured |= prompts.measured
    train, held_out = (TruthSampler(which, run) for which in (prompts.train, prompts.held_out))
    refuse_without_truth(prompts)

    # 3. Model, optimiser, the frozen network of the features (and of kl), engine.
    model, optimizers = loop.build(run)
    if reason := policy.cannot_share_prompts(model):
        raise ConfigError("base_model", config.base_model, f"cannot give features: {reason}")
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = feature_network(run, config)
    reference = frozen if config.beta else None
    share_prompts, aux_coef = policy.can_share_prompts(model, config.share_prompts), loop.router_aux_coef(run)
    trained_on = "recorded" if prompts.replay else f"{len(prompts.train):,}"
    loop.describe(
        run, model, f"{trained_on} prompts, {len(prompts.held_out):,} held out; {total_steps} steps of "
        f"{batch_size} completions on {world.devices(config)}, {config.rollout_engine} rollouts",
    )
    policy.report_kl(config)
    loop.warn_beyond_positions(run, prompts.longest(config), "max_prompt_length or max_completion_length")

    # 4. Resume.
    loop.resume(run, model, optimizers)
    state = run.state
    engine = make_engine(model, config, tokenizer, world, prompts.train)
    train.engine = held_out.engine = engine
    queue = train.queue(prompts, batch_size, kept(run.resume_from, "ahead", state))
    forensics = Forensics(model, config, world, tokenizer, frozen)
    recorder = Recorder(run.output_dir / "rollouts", tokenizer, world.main)

    # 5. The loop.
    try:
        if prompts.held_out and state["eval_before"] is None:
            state["eval_before"] = evaluate_structured(model, frozen, held_out, run, recorder)
            run.logger.log(run.step, state["eval_before"])
        while run.step < total_steps:
            rank_timing = dist.begin_step(run.step + 1, world)
            timer, seconds_by_phase = dist.Timer(), {}
            # a. Samples of each prompt, from the engine or a recorded file.
            rollouts = queue.next(run.step, run.step, last=run.step + 1 >= total_steps)
            seconds_by_phase["generate"] = timer()

            # b. Their energies, and advantages over the siblings.
            advantage, energy_stats = energies(model, frozen, rollouts, n, run)
            for rollout, value in zip(rollouts, advantage.flatten().tolist(), strict=True):
                rollout.advantage, rollout.rewards = config.rl_coef * value, {}
            recorder.write(run.step, rollouts)
            seconds_by_phase["features"] = timer()

            tally, losses, skipped = Tally(), [], 0
            size = StepSize.of(rollouts, n, world.size)
            with monitor.profiled(run.step + 1, config, run.output_dir, world.rank, world.device):
                # c. Loss and backward, over this rank's micro-batches of the whole batch.
                micro_batches = [
                    rollouts[(k * world.size + world.rank) * mb :][:mb] for k in range(accumulation)
                ]
                check_sampler(engine, model, rollouts, micro_batches, config, world, share_prompts)
                with on_device(reference, config, world):
                    kl = policy.measures_kl(config, run.step, 1)
                    policy.keep_logprobs(
                        model, reference, micro_batches, config, world, share_prompts, old=False, kl=kl
                    )
                for k, micro_batch in enumerate(micro_batches):
                    across = rollouts[k * world.size * mb : (k + 1) * world.size * mb]
                    if not (any(r.advantage for r in across) or config.beta):
                        skipped += 1  # by all ranks alike: every rank knows all advantages
                        continue
                    batch = policy.collate(micro_batch, world.device, share_prompts)
                    forensics.remember(batch, batch.rows, batch.given)
                    loss, stats = ebft_loss(model, batch, size, config, aux_coef)
                    loss.backward()
                    losses.append(stats["loss"])
                    policy.tally_policy(tally, stats, batch, run.step + 1)
                # And the cross-entropy of the true completions, once per prompt.
                for truth in truth_batches(rollouts[::n], run) if config.ce_coef else ():
                    forensics.remember(truth, truth.batch.rows)
                    loss, stats = ebft_loss(model, truth, size, config, aux_coef)
                    loss.backward()
                    losses.append(config.ce_coef * stats["nll"] / size.true_tokens)
                    tally.mean("ebft/ce_loss", stats["nll"].item(), len(truth.batch.targets) * truth.counts)

                # d. The norm before clipping; nothing that is not finite may reach the weights.
                norm, with_gradient = dist.gradient_norm(trained)
                rate = dist.learning_rate(run.step, config, total_steps)
                loss_of = functools.partial(ebft_loss, model, size=size, config=config, aux_coef=aux_coef)
                if losses and forensics.healthy(run.step + 1, losses, norm, loss_of):
                    dist.clip_gradients(with_gradient, config.max_grad_norm, norm)
                    rate = dist.update(optimizers, rate)
            run.step += 1
            seconds_by_phase["train"] = timer()

            # e. Metrics over the whole step, on all ranks alike.
            tally.mean("train/loss", sum(loss.item() for loss in losses), 1.0 / world.size)
            state["num_tokens"] += tokens_of(rollouts)
            metrics: dict[str, float] = {
                **tally.result(world), **policy.completion_metrics(rollouts), **queue.metrics,
                **signs.of_groups(rollouts, n),
                **{f"ebft/{name}": values.mean().item() for name, values in energy_stats.items()},
                "ebft/advantages_std": advantage.std(-1).mean().item() if n > 1 else 0.0,
                "train/grad_norm": norm.item(), "train/learning_rate": rate,
                "num_tokens": state["num_tokens"], "skipped_micro_batches": float(skipped),
                "step_time": sum(seconds_by_phase.values()),
                "weight_version_lag": float(run.step - 1 - min(r.weight_version for r in rollouts)),
                **{f"step_time/{phase}": value for phase, value in seconds_by_phase.items()},
                **forensics.metrics(), **memory.peak_memory(world.device), **rank_timing,
            }

            # f. Evaluate, log, save.
            due = loop.end_step(run, evaluates=bool(prompts.held_out))
            if due.evaluate or due.save:
                queue.settle(run.step, run.step)  # before new weights are sent
            if due.evaluate:
                metrics |= evaluate_structured(model, frozen, held_out, run, recorder)
                engine.rest()
                state["eval_after"] = {k: v for k, v in metrics.items() if k.startswith("eval/")}
            run.logger.observe(run.step, metrics)
            if due.log or due.evaluate:
                run.logger.log(run.step, metrics)
                show_samples(rollouts[: 2 if config.log_completions and world.main else 0], run)
            if due.save:
                engine.sync(run.step, due=True)
                engine.rest()
                recorder.finish()
                files = {"ahead.parquet": as_parquet(queue.prefetched or [])}
                run.checkpointer.save(run.step, model, optimizers, state, files=files)
            if due.stop:
                return loop.stop(run)
    except EngineError as error:
        if run.step > (run.checkpointer.steps() or [0])[-1]:  # a lost server must not lose progress
            run.checkpointer.save(run.step, model, optimizers, state)
            run.checkpointer.finish()
            message = f"{error}; step {run.step} is saved, the same command continues from it"
            raise EngineError(message) from None
        raise
    finally:
        queue.close()

    # 6. Final save and report.
    recorder.finish()
    final = loop.save_model(run, model)
    loop.finish(run, final, monitor.evaluation_lines(state["eval_before"], state.get("eval_after")))


def refuse_without_truth(prompts: PromptData) -> None:
    """ConfigError for a replay without true completions."""
    replayed = prompts.replay.rollouts if prompts.replay else []
    bare = next((r.row for r in replayed if r.ground_truth_ids is None), None)
    if bare is not None:
        raise ConfigError("replay_path", bare, "has no ground_truth_ids, which EBFT compares with")


def show_samples(rollouts: Sequence[Rollout], run: Run) -> None:
    """For log_completions: show samples beside their true completions."""
    for r in rollouts:
        texts = (run.tokenizer.decode(ids) for ids in (r.completion_ids, true_rollout(r).completion_ids))
        log.info("  %r, true %r, advantage %+.3f", *texts, r.advantage)


class TruthSampler:
    """Samples completions of prompts, each paired with the true one."""

    engine: Any  # an Engine

    def __init__(self, prompts: list[Prompt], run: Run):
        self.prompts, self.config, self.tokenizer, self.world = prompts, run.config, run.tokenizer, run.world
        truths = [true_completion(p, run.tokenizer, run.config.max_turns) for p in prompts]
        self.truths = [(as_ids(ids), None if mask is None else as_mask(mask)) for ids, mask in truths]
        self.conversing = any("remaining_turns" in p.columns for p in prompts)

    def limit(self, which: Sequence[int]) -> int:
        """Maximum length of a completion, from the longest truth of the batch."""
        config = self.config
        wanted = max(math.ceil(len(self.truths[i][0]) * config.gt_length_multiplier) for i in which)
        limit = max(64, wanted) if config.adaptive_max_tokens else config.max_completion_length
        return min(limit, config.max_completion_length)

    def sample(
        self, which: Sequence[int], n: int, step: int, *seed: int, prefetched: bool = False
    ) -> list[Rollout]:
        """n completions of each of these prompts, or conversations, on every rank. A collective."""
        asked, limit, key = [self.prompts[i] for i in which], self.limit(which), (self.config.seed, *seed)
        if self.conversing and prefetched:
            rollouts = played(self.engine.collect(step), asked, which, n, step, self.engine)
        elif self.conversing:
            rollouts = play(
                self.engine, Conversation, asked, which, n, step=step, seed=key, tokenizer=self.tokenizer,
                world=self.world, options=replace(self.config, max_completion_length=limit),
            )
        else:
            groups = self.engine.collect(step) if prefetched else self.engine.generate(
                [p.ids for p in asked], n, seed=key, limits=[limit] * len(asked)
            )
            rollouts = as_rollouts(groups, asked, which, step, self.engine, self.tokenizer.stop_ids)
        return self._with_truth(rollouts)

    def job(self, which: Sequence[int], n: int, *seed: int) -> Any:
        """The same for an engine that samples it ahead."""
        asked, limit, key = [self.prompts[i] for i in which], self.limit(which), (self.config.seed, *seed)
        if self.conversing:
            options = replace(self.config, max_completion_length=limit)
            return self.engine.conversations_of(
                conversations(Conversation, asked, n, key, options, self.tokenizer)
            )
        return self.engine.completions_of([p.ids for p in asked], n, seed=key, limits=[limit] * len(asked))

    def _with_truth(self, rollouts: list[Rollout]) -> list[Rollout]:
        for rollout in rollouts:
            rollout.ground_truth_ids, rollout.ground_truth_mask = self.truths[rollout.prompt_index]
        return rollouts

    def queue(self, prompts: PromptData, batch_size: int, ahead: list[Rollout]) -> RolloutQueue:
        """The batches of a run; `ahead`: the next one, if a checkpoint kept it."""
        order, config, n = prompts.order, self.config, self.config.num_generations

        def sample(number: int, step: int, prefetched: bool) -> list[Rollout]:
            if prompts.replay is not None:
                return prompts.replay.batch(number, batch_size)
            return self.sample(order.batch(number), n, step, number, prefetched=prefetched)

        def prefetch(number: int) -> None:
            self.engine.prefetch(self.job(order.batch(number), n, number))

        return RolloutQueue(
            self.engine, sample, prefetch, asynchronous=config.async_prefetch, prefetched=ahead or None
        )


def energies(
    model: Transformer, frozen: Transformer | None, rollouts: Sequence[Rollout], n: int, run: Run
) -> tuple[Tensor, dict[str, Tensor]]:
    """(advantages [groups, n], statistics by group); each rank computes a share of the groups. A
    collective."""
    config, world = run.config, run.world
    groups = [list(rollouts[i : i + n]) for i in range(0, len(rollouts), n)]
    own_groups = groups[world.rank :: world.size]
    judged = []
    most, at_once = math.ceil(len(groups) / world.size), max(1, config.micro_batch_size // n)
    for first in range(0, most, at_once):  # the same number on every rank: each is a collective
        groups_at_once = own_groups[first : first + at_once] or groups[:1]
        with on_device(frozen, config, world), base_of(model, frozen) as network:
            samples, truth = group_features(network, groups_at_once, config)
        if first < len(own_groups):
            advantage, stats = energy(samples.double(), truth.double(), config)
            judged += [
                (advantage[k].tolist(), {name: v[k].item() for name, v in stats.items()})
                for k in range(len(groups_at_once))
            ]
    shares = dist.gather(judged, world)
    by_group = [shares[i % world.size][i // world.size] for i in range(len(groups))]
    names = by_group[0][1]
    stats = {name: torch.tensor([s[name] for _, s in by_group]) for name in names}
    return torch.tensor([a for a, _ in by_group]), stats


def evaluate_structured(
    model: Transformer, frozen: Transformer | None, sampler: TruthSampler, run: Run, recorder: Recorder
) -> dict[str, float]:
    """Energy of fresh samples, and cross-entropy of the truths, on the held-out prompts. A collective."""
    k, step = run.config.eval_num_generations, run.step
    sampler.engine.sync(step, due=True)
    rollouts = sampler.sample(range(len(sampler.prompts)), k, step, -1, step)
    model.eval()
    _, stats = energies(model, frozen, rollouts, k, run)
    tally = Tally()
    with without_gradients(model):
        for truth in truth_batches(rollouts[::k], run):
            logprobs = policy.token_logprobs(model, truth.batch, 1.0)[0]  # on every rank: a collective
            nll = -logprobs.sum().item()
            count = len(truth.batch.targets) * truth.counts
            tally.mean("eval/loss", nll if truth.counts else 0.0, count)
    model.train()
    recorder.write(step, rollouts, kind="eval")
    right = sum(same_ids(r.completion_ids, true_rollout(r).completion_ids) for r in rollouts)
    return {"eval/exact": right / len(rollouts), **tally.result(run.world),
            **{f"eval/{name}": stats[name].mean().item() for name in JUDGED}}


def truth_batches(rollouts: Sequence[Rollout], run: Run) -> Iterator[TruthBatch]:
    """The true completions of these rollouts: this rank's share, in equally many micro-batches per rank."""
    world, mb = run.world, run.config.micro_batch_size
    own_rollouts = rollouts[world.rank :: world.size]
    for k in range(math.ceil(math.ceil(len(rollouts) / world.size) / mb)):
        micro_batch = own_rollouts[k * mb : (k + 1) * mb]
        rows = [true_rollout(r) for r in micro_batch or rollouts[:1]]
        yield TruthBatch(policy.collate(rows, world.device), bool(micro_batch))


@forward_only
def group_features(
    network: Transformer, groups: list[list[Rollout]], config: Config
) -> tuple[Tensor, Tensor]:
    """(features of the samples [P, n, D'], of the truths [P, D']) of the frozen network; each prompt goes
    through it once, followed by its truth and samples."""
    device, depths = network.device, feature_depths(network, config)
    parts, total_ids = [], 0
    layout: list[tuple[int, list[tuple[int, int]]]] = []
    places: list[tuple[range, range]] = []  # of the prompt, of its continuation
    for group in groups:
        prompt = group[0].prompt_ids
        own = range(total_ids, total_ids + len(prompt))
        sequences = [true_rollout(group[0]).completion_ids, *(r.completion_ids for r in group)]
        parts += [prompt, *sequences]
        total_ids += len(prompt)
        layout.append((len(prompt), [(len(prompt), len(s)) for s in sequences]))
        for sequence in sequences:
            places.append((own, range(total_ids, total_ids + len(sequence))))
            total_ids += len(sequence)
    states = network.hidden_states(
        torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)[None],
        shared_prompts=SharedPrompts(layout, device), layers=depths,
    )[0][0]

    def pooled(prompt: range, own: range) -> Tensor:
        if config.embed_method == "last_token":
            return states[own[-1]]
        continuation = states[own.start : own.stop]
        if config.embed_method == "completion_mean":
            return continuation.mean(0)
        if config.embed_method == "concat":
            n = len(continuation)
            return torch.cat([continuation[min(n - 1, int(depth * n))] for depth in (0.25, 0.5, 0.75)])
        total = states[prompt.start : prompt.stop].sum(0) + continuation.sum(0)
        return total / (len(prompt) + len(continuation))

    features = torch.stack([pooled(*place) for place in places]).view(len(groups), 1 + len(groups[0]), -1)
    return features[:, 1:], features[:, 0]


# ------------------------------------------------------------------------------------------------------------
# Strided: short rollouts that branch off the prefixes of a document
# ------------------------------------------------------------------------------------------------------------


@dataclass
class BlockStepSize:
    """Totals of an optimiser step over all micro-batches and ranks; losses are divided by them."""

    documents: int
    tokens: int  # that were sampled
    true_tokens: int  # of the documents, trained
    ranks: int


@dataclass
class BlockBatch:
    """Some samples of every block of a micro-batch of documents."""

    documents: list[Document]
    tokens: Tensor  # [blocks · m, G]
    advantages: Tensor  # [blocks · m · G]
    share: float  # of these documents' samples in this pass
    with_truth: bool  # whether the cross-entropy of the documents is part of this pass


def strided_loss(
    model: Transformer, batch: BlockBatch, size: BlockStepSize, config: Config, aux_coef: float
) -> tuple[Tensor, dict[str, Any]]:
    """This pass's part of the step's loss: REINFORCE on the samples, −Σ A · log π over the step's tokens, and
    ce_coef · cross-entropy of the true tokens. FSDP averages gradients over ranks: × ranks."""
    blocks = BlockPass.make(batch.documents, batch.tokens)
    hidden, router_logits = model.hidden_states(blocks.input_ids, shared_prompts=blocks.shared)
    sampled = linear_logprobs(
        hidden[0].index_select(0, blocks.sources.flatten()), model.head_weight,
        blocks.input_ids[0, blocks.block_rows.flatten()], temperature=config.temperature,
        softcap=model.arch.final_softcap,
    )
    rl_loss = -(batch.advantages * sampled.logprobs).sum() / size.tokens
    loss, nll = config.rl_coef * rl_loss, None
    if batch.with_truth:
        nll, _ = document_nll(model, batch.documents, hidden[0].index_select(0, blocks.document_rows))
        loss = loss + config.ce_coef * nll / size.true_tokens
    stats = {
        "loss": loss.detach(), "rl_loss": rl_loss.detach(), "nll": None if nll is None else nll.detach(),
        "entropy": sampled.entropy.detach(), "logprobs": sampled.logprobs.detach(),
    }
    if aux_coef and router_logits:  # a mixture's experts stay in use
        share = len(batch.documents) / size.documents * batch.share
        loss = loss + aux_coef * share * load_balancing_loss(router_logits, model.arch)
    return loss * size.ranks, stats


def strided(config: Config) -> None:
    # 1. Set up.
    run = loop.begin(config)
    world = run.world

    # 2. Documents.
    vocab_size = max(run.arch.vocab_size, run.tokenizer.vocab_size)
    prepared = run.output_dir / "prepared"
    data = read_documents(config, run.tokenizer, run.directory, prepared, vocab_size, world)
    n, mb = config.n_samples_per_prompt, config.micro_batch_size
    loop.plan(run, data.total_steps, data.steps_per_epoch, **{
        "documents a step": data.order.size, "data": data.fingerprint,
    })

    # 3. Model, optimiser, and the frozen network of the features.
    model, optimizers = loop.build(run)
    if reason := policy.cannot_share_prompts(model):
        raise ConfigError("base_model", config.base_model, f"cannot be trained in blocks: {reason}")
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen, aux_coef = feature_network(run, config), loop.router_aux_coef(run)
    loop.describe(
        run, model, f"{len(data.documents):,} documents, {len(data.held_out):,} held out; {run.total_steps} "
        f"steps of {data.order.size} documents on {world.devices(config)}",
    )

    # 4. Resume.
    longest = max((len(document.ids) for document in data.documents), default=0)
    loop.warn_beyond_positions(run, longest, "sequence_len")
    loop.resume(run, model, optimizers)
    state = run.state
    forensics = Forensics(model, config, world, run.tokenizer, frozen)

    # 5. The loop.
    if data.held_out and state["eval_before"] is None:
        state["eval_before"] = evaluate_strided(model, frozen, data.held_out, run)
        run.logger.log(run.step, state["eval_before"])
    seconds = dist.Timer()
    while run.step < run.total_steps:
        rank_timing = dist.begin_step(run.step + 1, world)
        # a. This step's documents, the same on every rank, and this rank's micro-batches.
        chosen = data.step(run.step)
        places = [(k * world.size + world.rank) * mb for k in range(config.gradient_accumulation_steps)]
        parts = [chosen[place : place + mb] for place in places]
        blocks = sum(len(d.anchors) for d in chosen)
        size = BlockStepSize(len(chosen), blocks * n * config.generate_max_len,
                             max(1, sum(d.trained_tokens for d in chosen)), world.size)
        tally, drawn, losses = Tally(), [], []
        with monitor.profiled(run.step + 1, config, run.output_dir, world.rank, world.device):
            for k, documents in enumerate(parts):
                # b. Samples of every block, their energy, and advantages over the siblings of a block.
                seed = (run.step, k, world.rank)
                tokens, sampled, advantage, stats = sample_and_judge(model, frozen, documents, run, *seed)
                drawn.append((tokens, sampled, advantage))
                tally_energy(tally, stats, advantage)

                # c. REINFORCE on the samples, a few at a time so that memory stays near one sample's;
                # cross-entropy on the true tokens with the first.
                for first in range(0, n, config.samples_a_pass):
                    batch = block_batch(documents, tokens, advantage, first, config)
                    given = functools.partial(advantages_by_document, documents, advantage)
                    forensics.remember(batch, [d.name for d in documents], given)
                    loss, stats = strided_loss(model, batch, size, config, aux_coef)
                    loss.backward()
                    losses.append(stats["loss"])
                    tally_blocks(tally, stats, documents, sampled[:, first : first + config.samples_a_pass])
                    steps = 1.0 / world.size if k + first == 0 else 0.0
                    tally.mean("ebft/rl_loss", stats["rl_loss"].item(), steps)

            # d. The norm before clipping; nothing that is not finite may reach the weights.
            norm, with_gradient = dist.gradient_norm(trained)
            rate = dist.learning_rate(run.step, config, run.total_steps)
            loss_of = functools.partial(strided_loss, model, size=size, config=config, aux_coef=aux_coef)
            if forensics.healthy(run.step + 1, losses, norm, loss_of):
                dist.clip_gradients(with_gradient, config.max_grad_norm, norm)
                rate = dist.update(optimizers, rate)
        run.step += 1

        # e. Metrics over the whole step, on all ranks alike.
        tally.mean("train/loss", sum(loss.item() for loss in losses), 1.0 / world.size)
        state["num_tokens"] += sum(len(d.ids) for d in chosen) + size.tokens
        metrics = tally.result(world) | {
            "train/grad_norm": norm.item(), "train/learning_rate": rate, "num_tokens": state["num_tokens"],
            "ebft/num_blocks": float(blocks), "ebft/skipped_documents": float(data.skipped),
            "step_time": seconds(), "epoch": run.step * data.order.size / data.order.epoch_size,
            **forensics.metrics(), **memory.peak_memory(world.device), **rank_timing,
        }
        write_blocks(run.output_dir / "rollouts", run.step - 1, parts, drawn, places, world)

        # f. Evaluate, log, save.
        due = loop.end_step(run, evaluates=bool(data.held_out))
        if due.evaluate:
            metrics |= evaluate_strided(model, frozen, data.held_out, run)
            state["eval_after"] = {k: v for k, v in metrics.items() if k.startswith("eval/")}
        run.logger.observe(run.step, metrics)
        if due.log or due.evaluate:
            run.logger.log(run.step, metrics)
            if config.log_completions and world.main:
                show_blocks(parts[0], drawn[0], run.tokenizer)
        if due.save:
            run.checkpointer.save(run.step, model, optimizers, state)
        seconds()  # evaluating and saving are not training time
        if due.stop:
            return loop.stop(run)

    # 6. Final save and report.
    final = loop.save_model(run, model)
    loop.finish(run, final, monitor.evaluation_lines(state["eval_before"], state.get("eval_after")))


def sample_and_judge(
    model: Transformer, frozen: Transformer | None, documents: list[Document], run: Run, *seed: int
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(tokens [blocks, n, G], log-probs, advantages [blocks, n], statistics by block) of a micro-batch."""
    config, world = run.config, run.world
    n, G = config.n_samples_per_prompt, config.generate_max_len
    drawn = random.Random(repr((config.seed, *seed))).getrandbits(62)
    generator = torch.Generator(world.device).manual_seed(drawn)
    model.eval()
    if documents[0].recorded is None:
        tokens, logprobs = sample_blocks(model, documents, n, G, config.temperature, generator)
    else:
        recorded = zip(*(d.recorded for d in documents if d.recorded is not None), strict=True)
        tokens, logprobs = (torch.cat(x).flatten(0, 1).to(world.device) for x in recorded)
    with on_device(frozen, config, world), base_of(model, frozen) as network:
        features, truth = block_features(network, BlockPass.make(documents, tokens), documents, config)
    model.train()
    advantage, stats = energy(features.view(len(truth), n, -1).double(), truth.double(), config)
    return tokens.view(len(truth), n, G), logprobs.view(len(truth), n, G), advantage.float(), stats


def block_batch(
    documents: list[Document], tokens: Tensor, advantage: Tensor, first: int, config: Config
) -> BlockBatch:
    """The samples_a_pass samples of every block that start at `first`. tokens [blocks, n, G]."""
    n = tokens.shape[1]
    chosen = slice(first, min(n, first + config.samples_a_pass))
    weight = advantage[:, chosen].reshape(-1, 1).expand(-1, tokens.shape[2]).flatten()
    with_truth = bool(config.ce_coef) and first == 0
    tokens = tokens[:, chosen].flatten(0, 1)
    return BlockBatch(documents, tokens, weight, (chosen.stop - first) / n, with_truth)


def tally_energy(tally: Tally, stats: dict[str, Tensor], advantage: Tensor) -> None:
    """Add the energies of a micro-batch, and how far its advantages [blocks, n] spread."""
    for name, values in stats.items():
        tally.mean(f"ebft/{name}", values.sum().item(), len(values))
    spread = advantage.std(-1).sum().item() if advantage.shape[1] > 1 else 0.0
    tally.mean("ebft/advantages_std", spread, len(advantage))


def tally_blocks(tally: Tally, stats: dict[str, Any], documents: list[Document], sampled: Tensor) -> None:
    """Add one pass; `sampled` are the log-probs that its tokens were drawn from."""
    if stats["nll"] is not None:
        tally.mean("ebft/ce_loss", stats["nll"].item(), sum(d.trained_tokens for d in documents))
    gap = (stats["logprobs"] - sampled.flatten()).abs()
    tally.mean("entropy", stats["entropy"].sum().item(), len(gap))
    tally.mean("sampling/sampling_logp_difference/mean", gap.sum().item(), len(gap))
    tally.max("sampling/sampling_logp_difference/max", gap.max().item())


def evaluate_strided(
    model: Transformer, frozen: Transformer | None, held_out: list[Document], run: Run
) -> dict[str, float]:
    """Energy of fresh samples, and cross-entropy, on held-out documents. A collective."""
    tally, world, config = Tally(), run.world, run.config
    mb, G = config.micro_batch_size, config.generate_max_len
    own_documents = held_out[world.rank :: world.size] or held_out[:1]
    for k in range(math.ceil(math.ceil(len(held_out) / world.size) / mb)):  # as many on every rank
        documents = own_documents[k * mb : (k + 1) * mb] or own_documents[:1]
        tokens, _, _, stats = sample_and_judge(model, frozen, documents, run, -1, k, world.rank)
        truth = torch.tensor([d.ids[a : a + G] for d in documents for a in d.anchors], device=tokens.device)
        right = (tokens == truth[:, None]).all(-1)
        tally.mean("eval/exact", right.sum().item(), right.numel())  # samples equal to the true tokens
        with without_gradients(model):
            nll, count = document_nll(model, documents)
        for name in JUDGED:
            tally.mean(f"eval/{name}", stats[name].sum().item(), len(stats[name]))
        tally.mean("eval/loss", nll.item(), count)
    return tally.result(world)


def block_features(
    network: Transformer, batch: BlockPass, documents: list[Document], config: Config
) -> tuple[Tensor, Tensor]:
    """(features of the blocks [R', D'], of the true tokens of each block [blocks, D']), of the frozen
    network."""
    depths = feature_depths(network, config)
    with without_gradients(network):
        states = network.hidden_states(batch.input_ids, shared_prompts=batch.shared, layers=depths)[0][0]

    def pooled(rows: Tensor, prefix_sums: Tensor, prefixes: Tensor) -> Tensor:
        own = states[rows]  # [r, G, D']
        if config.embed_method == "last_token":
            return own[:, -1]
        if config.embed_method == "completion_mean":
            return own.mean(1)
        if config.embed_method == "concat":
            G = own.shape[1]
            return torch.cat([own[:, min(G - 1, int(depth * G))] for depth in (0.25, 0.5, 0.75)], dim=-1)
        return (prefix_sums + own.sum(1)) / (prefixes + own.shape[1])[:, None]

    sums, prefixes, first_row = [], [], 0
    for document in documents:  # running sums of a document's states serve every prefix of it
        places = batch.document_rows[first_row : first_row + len(document.ids)]
        running = states[places].cumsum(0)
        sums += [running[a - 1] for a in document.anchors]
        prefixes += document.anchors
        first_row += len(document.ids)
    m = batch.block_rows.shape[0] // len(prefixes)
    sums, lengths = torch.stack(sums), torch.tensor(prefixes, device=states.device)
    return (
        pooled(batch.block_rows, sums.repeat_interleave(m, 0), lengths.repeat_interleave(m)),
        pooled(batch.truth_rows, sums, lengths),
    )


def advantages_by_document(documents: list[Document], advantage: Tensor) -> dict[str, Tensor]:
    """The sum over a document's blocks [documents]: NaN if any block's advantage is NaN."""
    by_document = advantage.split([len(d.anchors) for d in documents])
    return {"advantages": torch.stack([a.sum() for a in by_document])}


def document_nll(
    model: Transformer, documents: list[Document], hidden: Tensor | None = None
) -> tuple[Tensor, int]:
    """(Σ −log p of the counted true tokens, how many), from the packed documents' hidden states [tokens, D],
    or from a separate forward pass."""
    ids, which, _ = packed(documents, model.device)
    if hidden is None:
        hidden = model.hidden_states(ids, document_ids=which)[0][0]
    labels = torch.full_like(ids[0], IGNORE)
    labels[:-1] = ids[0, 1:]
    keep = torch.tensor([c for d in documents for c in [*d.counted[1:], False]], device=ids.device)
    labels = labels.where(keep, IGNORE)
    return linear_cross_entropy(hidden, model.head_weight, labels, softcap=model.arch.final_softcap), int(
        keep.sum()
    )


def show_blocks(
    documents: list[Document], drawn: tuple[Tensor, Tensor, Tensor], tokenizer: Tokenizer
) -> None:
    """The first samples of the first block beside the truth."""
    tokens, _, advantage = drawn
    anchor, length = documents[0].anchors[0], tokens.shape[-1]
    before = tokenizer.decode(documents[0].ids[max(0, anchor - 16) : anchor])
    truth = tokenizer.decode(documents[0].ids[anchor : anchor + length])
    for ids, value in list(zip(tokens[0].tolist(), advantage[0].tolist(), strict=True))[:2]:
        log.info("  after %r: %r, true %r, advantage %+.3f", before, tokenizer.decode(ids), truth, value)


if __name__ == "__main__":
    loop.cli(main, Config, __doc__)
