"""The policy gradient on rollouts: log-probabilities of what was sampled, importance ratios, the losses of
the GRPO family, and every metric of a policy step. GRPO and EBFT share it; they differ in where rewards come
from.

Names follow the papers: π the policy that is trained, π_old the weights that the batch was made with, μ what
the sampler reported, π_ref the reference. B completions, T positions of the longest, m the mask of tokens
that the policy wrote.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import dist
from checkpoints.adapters import base_of
from checkpoints.families import Architecture
from dist import World
from kernels import SharedPrompts
from model import Transformer, forward_only, without_gradients
from numerics.losses import linear_logprobs
from rollouts.rollout import Rollout, RolloutOptions
from rollouts.tokens import padded, same_ids
from run.config import ConfigError, check_at_least_one, check_ranges
from run.log import log


@dataclass
class PolicyOptions(RolloutOptions):
    beta: float = 0.0
    """Weight of the KL penalty against the reference model."""
    kl_steps: int | None = 20
    """With beta 0 and an adapter: measure kl against the base model every N steps, which costs a forward pass
    over the batch each time; null: never. With beta it is part of every step."""
    vllm_importance_sampling_correction: bool = True
    """Weigh tokens by π_old/μ wherever the sampler reports μ: it may run in other precision or on older
    weights."""
    vllm_importance_sampling_mode: Literal[
        "sequence_mask", "sequence_truncate", "token_mask", "token_truncate", "geometric_mask",
        "geometric_truncate",
    ] = "sequence_mask"
    """Ratio of each token, of the whole completion (the product over its tokens, whose spread grows with its
    length), or the geometric mean over its tokens; truncate clamps it, mask drops what lies outside.
    geometric_mask drops completions and leaves the others unweighted. Beyond a few hundred tokens use
    token_truncate or geometric_mask."""
    vllm_importance_sampling_clip_min: float = 0.0
    """Lower bound of that ratio."""
    vllm_importance_sampling_clip_max: float = 3.0
    """Upper bound of that ratio."""
    share_prompts: bool | None = None
    """Send each prompt through the model once for all of its completions in a micro-batch. Unset: only on
    CPUs, as on GPUs it needs compiled flex_attention."""

    def check(self) -> None:
        check_ranges(
            self, ("beta", 0, math.inf), ("vllm_importance_sampling_clip_min", 0, math.inf),
            ("vllm_importance_sampling_clip_max", 0, math.inf),
        )
        check_at_least_one(self, "kl_steps")
        if self.vllm_importance_sampling_clip_min >= self.vllm_importance_sampling_clip_max:
            raise ConfigError(
                "vllm_importance_sampling_clip_min", self.vllm_importance_sampling_clip_min,
                "must be below vllm_importance_sampling_clip_max",
            )
        geometric = self.vllm_importance_sampling_mode.startswith("geometric")
        if geometric and self.vllm_importance_sampling_clip_min == 0:
            raise ConfigError(
                "vllm_importance_sampling_clip_min", 0.0,
                "rejects nothing: a geometric mean stays near 1; set limits around it, e.g. 0.95 here and "
                "vllm_importance_sampling_clip_max: 1.05",
            )


# ------------------------------------------------------------------------------------------------------------
# From rollouts to tensors
# ------------------------------------------------------------------------------------------------------------


@dataclass
class PolicyBatch:
    """B completions for one forward pass: packed in one row for the model, padded to [B, T] for the loss."""

    input_ids: Tensor  # [1, N], prompts and completions one after the other
    document_ids: Tensor | None  # [1, N], where each completion has a copy of its prompt
    shared_prompts: SharedPrompts | None  # otherwise: each prompt stands once, before its completions
    sources: Tensor  # [M]: for each token that the policy wrote, the place in N that predicts it
    targets: Tensor  # [M]: that token
    places: Tensor  # [M]: where it stands in a flat [B·T]
    mask: Tensor  # [B, T] in fp32: 1 where the policy wrote the token
    advantages: Tensor  # [B], or [B, T] where the tokens of a completion differ in it
    sampling_logprobs: Tensor | None  # [B, T], NaN where the sampler gave none
    truncated: Tensor  # [B] bool: hit the length limit
    rollouts: Sequence[Rollout]
    spans: np.ndarray  # [B, 2]: places in N where prompt and completion of each begin

    @property
    def rows(self) -> list[str]:
        return [r.row for r in self.rollouts]

    def keep(self, name: str, values: Tensor) -> None:
        """Keep per-token values [B, T] with the rollouts, for later passes and checkpoints."""
        for rollout, row in zip(self.rollouts, values.float().cpu().numpy(), strict=True):
            setattr(rollout, name, row[: len(rollout.completion_ids)].copy())

    def stored(self, name: str) -> Tensor | None:
        """The values [B, T] that `keep` stored, or None."""
        rows = [getattr(rollout, name) for rollout in self.rollouts]
        if any(row is None for row in rows):
            return None
        return torch.from_numpy(padded(rows, self.mask.shape[1])).to(self.mask.device)

    def keep_routes(self, router_logits: Sequence[Tensor], experts: int) -> None:
        """Keep the `experts` that each expert layer chose for every token, from its logits [N, X]."""
        chosen = torch.stack([logits.topk(experts).indices for logits in router_logits], 1)
        table = chosen.to(torch.int16).cpu().numpy()  # [N, layers, k]
        for r, (prompt, completion) in zip(self.rollouts, self.spans.tolist(), strict=True):
            r.routes = np.concatenate([
                table[prompt : prompt + len(r.prompt_ids)],
                table[completion : completion + len(r.completion_ids)],
            ]).reshape(-1)

    def kept_routes(self, arch: Architecture) -> dict[int, Tensor] | None:
        """By expert layer the routes [N, k] that `keep_routes` kept, or None."""
        layers, k = [i for i, has in enumerate(arch.expert_layers) if has], arch.experts_per_token
        table = np.zeros((self.input_ids.numel(), len(layers), k), np.int64)
        for r, (prompt, completion) in zip(self.rollouts, self.spans.tolist(), strict=True):
            if r.routes is None:
                return None
            P, routes = len(r.prompt_ids), r.routes.reshape(-1, len(layers), k)
            table[prompt : prompt + P] = routes[:P]
            table[completion : completion + len(r.completion_ids)] = routes[P:]
        on_device = torch.from_numpy(table).to(self.input_ids.device)
        return {layer: on_device[:, place] for place, layer in enumerate(layers)}

    def given(self) -> dict[str, Tensor]:
        """The tensors that the loss takes besides the model, [B] or [B, T]."""
        stored = {name: self.stored(name) for name in ("old_logprobs", "ref_logprobs")}
        return {"advantages": self.advantages, **{k: v for k, v in stored.items() if v is not None}}

    def spread(self, flat: Tensor) -> Tensor:
        """Place the values of the written tokens, in order, in a [B, T] of zeros."""
        out = torch.zeros(self.mask.numel(), dtype=flat.dtype, device=flat.device)
        return out.index_copy(0, self.places, flat).view_as(self.mask)


def collate(rollouts: Sequence[Rollout], device: torch.device, share_prompts: bool = False) -> PolicyBatch:
    """Pack rollouts for one forward pass. With `share_prompts`, adjacent rollouts of a prompt share one copy
    of it."""
    B = len(rollouts)
    prompts = np.array([len(r.prompt_ids) for r in rollouts])
    lengths = np.array([len(r.completion_ids) for r in rollouts])
    T = int(lengths.max())
    own_copy = np.array([  # does a copy of the prompt stand before this completion?
        not (share_prompts and k and same_ids(r.prompt_ids, rollouts[k - 1].prompt_ids))
        for k, r in enumerate(rollouts)
    ])
    begins = np.cumsum(own_copy * prompts + lengths) - lengths
    last = np.maximum.accumulate(np.where(own_copy, begins - 1, 0))  # place of the prompt's last token
    parts = [part for r, own in zip(rollouts, own_copy, strict=True)
             for part in ((r.prompt_ids, r.completion_ids) if own else (r.completion_ids,))]

    row = np.repeat(np.arange(B), lengths)  # of each completion token: its row, and its place there
    t = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    written = np.concatenate([r.written() for r in rollouts])
    sources = np.where(t == 0, last[row], begins[row] + t - 1)[written]
    targets = np.concatenate([r.completion_ids for r in rollouts])[written]

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device)

    shared = None
    if share_prompts:
        groups: list[tuple[int, list[tuple[int, int]]]] = []
        for own, P, n in zip(own_copy.tolist(), prompts.tolist(), lengths.tolist(), strict=True):
            if own:
                groups.append((P, []))
            groups[-1][1].append((P, n))
        shared = SharedPrompts(groups, device)
    reported = None
    if any(r.sampling_logprobs is not None for r in rollouts):
        unknown = np.empty(0, np.float32)
        given = [unknown if r.sampling_logprobs is None else r.sampling_logprobs for r in rollouts]
        reported = torch.from_numpy(padded(given, T, math.nan)).to(device)
    return PolicyBatch(
        on_device(np.concatenate(parts))[None],
        None if share_prompts else on_device(np.repeat(np.arange(B), prompts + lengths))[None], shared,
        on_device(sources), on_device(targets), on_device((row * T + t)[written]),
        torch.from_numpy(padded([r.written() for r in rollouts], T)).to(device),
        _advantages(rollouts, T).to(device), reported,
        torch.tensor([r.truncated for r in rollouts], device=device), rollouts,
        np.stack([last - prompts + 1, begins], -1),
    )


def _advantages(rollouts: Sequence[Rollout], width: int) -> Tensor:
    if all(r.token_advantages is None for r in rollouts):
        return torch.tensor([r.advantage for r in rollouts])
    rows = [np.full(len(r.completion_ids), r.advantage, np.float32) if r.token_advantages is None
            else r.token_advantages for r in rollouts]
    return torch.from_numpy(padded(rows, width))


def hidden_states(
    model: Transformer, batch: PolicyBatch, routes: dict[int, Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    return model.hidden_states(
        batch.input_ids, document_ids=batch.document_ids, shared_prompts=batch.shared_prompts, routes=routes
    )


def cannot_share_prompts(model: Transformer) -> str | None:
    """Why completions cannot share one copy of their prompt with this model, or None."""
    if any(rope.kind == "dynamic" for rope in model.arch.ropes.values()):
        return "its dynamic rope makes a prompt depend on what follows it"
    return None


def can_share_prompts(model: Transformer, wanted: bool | None) -> bool:
    """Whether to share prompts: as configured, else on CPUs only. ConfigError if requested but impossible."""
    reason = cannot_share_prompts(model)
    if wanted and reason:
        raise ConfigError("share_prompts", True, f"does not work with this model: {reason}; leave it out")
    return reason is None and model.device.type == "cpu" if wanted is None else wanted


def token_logprobs(
    model: Transformer, batch: PolicyBatch, temperature: float, entropy_gradient: bool = False,
    routes: dict[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], int]:
    """(log π [B, T], entropy [B, T], router logits, number of non-finite hidden states) of the tempered
    policy, zeros where m is 0. `routes`: those of another pass, in the place of the router's choice."""
    hidden, router_logits = hidden_states(model, batch, routes)
    hidden = hidden[0].index_select(0, batch.sources)
    bad = int((~torch.isfinite(hidden)).any(-1).sum())
    if bad:  # the safety net: replaced so that one bad token does not end the step, but counted and named
        hidden = torch.nan_to_num(hidden, nan=0.0, posinf=0.0, neginf=0.0)
    statistics = linear_logprobs(
        hidden, model.head_weight, batch.targets,
        temperature=temperature, softcap=model.arch.final_softcap,
    )
    entropy = statistics.entropy if entropy_gradient else statistics.entropy.detach()
    return batch.spread(statistics.logprobs), batch.spread(entropy), router_logits, bad


def rerouted(router_logits: Sequence[Tensor], routes: dict[int, Tensor]) -> Tensor:
    """The share of replayed choices that the routers would not make now."""
    kept = [
        (logits.topk(chosen.shape[-1]).indices[:, :, None] == chosen[:, None]).any(-1).float().mean()
        for logits, chosen in zip(router_logits, routes.values(), strict=True)
    ]
    return 1 - torch.stack(kept).mean()


# ------------------------------------------------------------------------------------------------------------
# The loss
# ------------------------------------------------------------------------------------------------------------


def sampler_ratio(
    old_logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, options: PolicyOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(π_old/μ per token [B, T] before any limit, the weight that is applied [B, T] or [B, 1], which ratios
    lie outside of the limits [B, T] or [B, 1], the tokens that μ is known for [B, T]).

    A token without a usable μ counts as on policy: it must neither poison the sequence nor stop the run. The
    geometric mean does not grow with length: its limits reject whole completions, the others get weight 1.
    """
    known = mask * torch.isfinite(sampling_logprobs)
    difference = torch.where(known > 0, old_logprobs - sampling_logprobs, 0.0)
    raw = difference.exp()
    level, _, what = options.vllm_importance_sampling_mode.partition("_")
    if level == "token":
        ratio = raw
    else:
        total = difference.sum(-1, keepdim=True)
        ratio = (total if level == "sequence" else total / known.sum(-1, keepdim=True).clamp(min=1)).exp()
    low, high = options.vllm_importance_sampling_clip_min, options.vllm_importance_sampling_clip_max
    outside = (ratio < low) | (ratio > high)
    if what == "truncate":
        applied = ratio.clamp(low, high)
    else:  # torch.where, not a product: ∞ · 0 is NaN
        applied = torch.where(outside, 0.0, 1.0 if level == "geometric" else ratio)
    return raw, applied, outside, known


# ------------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------------


class Tally:
    """Means, minima and maxima of a step, gathered over micro-batches and ranks before any division: a mean
    of means would weigh a token by how full its micro-batch is."""

    def __init__(self):
        self.sums: dict[str, list[float]] = {}
        self.low: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self.squares: dict[str, list[float]] = {}  # Σw, Σw², number of weights

    def mean(self, name: str, total: float, count: float) -> None:
        entry = self.sums.setdefault(name, [0.0, 0.0])
        entry[0] += total
        entry[1] += count

    def min(self, name: str, value: float) -> None:
        self.low[name] = min(value, self.low.get(name, math.inf))

    def max(self, name: str, value: float) -> None:
        self.high[name] = max(value, self.high.get(name, -math.inf))

    def effective_share(self, name: str, weights: Tensor) -> None:
        """Kish's effective sample size over the sample size, (Σw)²/(n Σw²): the share of the samples that
        would give the same variance with equal weights (Kish, Survey Sampling, 1965)."""
        entry = self.squares.setdefault(name, [0.0, 0.0, 0.0])
        for i, value in enumerate((weights.sum(), weights.square().sum(), weights.numel())):
            entry[i] += float(value)

    def result(self, world: World) -> dict[str, float]:
        """The metrics, the same on every rank. A collective; ranks may lack names that others have."""
        by_rank = dist.gather((self.sums, self.low, self.high, self.squares), world)
        totals: dict[str, list[float]] = {}
        squares: dict[str, list[float]] = {}
        metrics: dict[str, float] = {}
        for sums, low, high, rank_squares in by_rank:
            for name, (total, count) in sums.items():
                entry = totals.setdefault(name, [0.0, 0.0])
                entry[0] += total
                entry[1] += count
            for name, value in low.items():
                metrics[name] = min(value, metrics.get(name, math.inf))
            for name, value in high.items():
                metrics[name] = max(value, metrics.get(name, -math.inf))
            for name, values in rank_squares.items():
                squares[name] = [a + b for a, b in zip(squares.get(name, [0.0] * 3), values, strict=True)]
        for name, (total, square, count) in squares.items():
            metrics[name] = total**2 / (count * square) if square else 0.0
        return metrics | {name: total / count if count else 0.0 for name, (total, count) in totals.items()}


@torch.no_grad()
def tally_policy(
    tally: Tally, stats: dict[str, Any], batch: PolicyBatch, step: int, first_use: bool = False
) -> None:
    """Add one micro-batch to the policy metrics (reference page: Key Metrics for RL). `stats` holds
    intermediate values of its loss. `first_use`: no update was made since π_old."""
    mask, old, sampled = stats["mask"], stats["old_logprobs"], batch.sampling_logprobs
    tokens, B = mask.sum().item(), mask.shape[0]
    if count := stats["nonfinite_hidden_states"]:
        rows = ", ".join(batch.rows[:4])
        log.warning(
            "step %d: %d hidden states are not finite and were replaced by 0; rows %s", step, count, rows
        )
        tally.max("nonfinite_hidden_states", float(count))

    def masked_mean(name: str, x: Tensor) -> None:
        if x.shape[1] == 1:  # sequence-level ratio: one value per completion
            tally.mean(name, x.float().sum().item(), B)
        else:
            tally.mean(name, (x * mask).sum().item(), tokens)

    masked_mean("entropy", stats["entropy"])
    if "rerouted" in stats:
        tally.mean("router/replayed_otherwise", stats["rerouted"].item(), 1)
    if first_use and "log_ratio" in stats:
        masked_mean("ratio/first_use", stats["log_ratio"].abs())
    if "kl" in stats:
        masked_mean("kl", stats["kl"])
    if "clipped_low" in stats:
        low, high = stats["clipped_low"], stats["clipped_high"]
        masked_mean("clip_ratio/low_mean", low)
        masked_mean("clip_ratio/high_mean", high)
        masked_mean("clip_ratio/region_mean", low | high)
        length = mask.sum(-1)
        for name, x, add in (("low_min", low, tally.min), ("high_max", high, tally.max)):
            share = x[:, 0].float() if x.shape[1] == 1 else (x * mask).sum(-1) / length.clamp(min=1)
            for value in share[length > 0].tolist():
                add(f"clip_ratio/{name}", value)
    if "cispo_clipped" in stats:
        masked_mean("cispo_clip_ratio", stats["cispo_clipped"])
    if "off_policy_masked" in stats:
        tally.mean("off_policy_masked_fraction", stats["off_policy_masked"].sum().item(), B)
    if sampled is not None:
        known = stats["sampler_known"] > 0
        gap, ratio = (old - sampled).abs()[known].double(), stats["sampler_ratio"][known].double()
        count = known.sum().item()
        tally.mean("sampling/sampling_logp_difference/mean", gap.sum().item(), count)
        tally.mean("sampling/importance_sampling_ratio/mean", ratio.sum().item(), count)
        applied, outside = stats["sampler_applied"].double(), stats["sampler_outside"]
        tally.mean(
            "sampling/importance_sampling_ratio/applied_mean",
            applied.expand_as(mask)[known].sum().item(), count,
        )
        tally.mean("sampling/unknown_logprobs", tokens - count, tokens)
        # Over the units that are weighted, completions or tokens: those outside are dropped or clamped.
        units = known if applied.shape == known.shape else known.any(-1, keepdim=True)
        tally.mean(
            "sampling/importance_sampling_ratio/outside_share",
            outside[units].sum().item(),
            units.sum().item(),
        )
        tally.effective_share("sampling/importance_sampling_ratio/effective_share", applied[units])
        if count:
            tally.max("sampling/sampling_logp_difference/max", gap.max().item())
            tally.min("sampling/importance_sampling_ratio/min", ratio.min().item())
            tally.max("sampling/importance_sampling_ratio/max", ratio.max().item())


def completion_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Lengths and endings of the completions of a batch."""
    lengths = [int(r.written().sum()) for r in rollouts]
    ended = [n for n, r in zip(lengths, rollouts, strict=True) if not r.truncated] or [0]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(r.truncated for r in rollouts) / len(rollouts),
        "completions/mean_terminated_length": sum(ended) / len(ended),
        "completions/min_terminated_length": float(min(ended)),
        "completions/max_terminated_length": float(max(ended)),
    }


# ------------------------------------------------------------------------------------------------------------
# One optimiser step's forward and backward passes
# ------------------------------------------------------------------------------------------------------------


def measures_kl(options: Any, step: int, steps: int) -> bool:
    """Whether to measure kl on a batch for the `steps` optimiser steps from `step` on although beta is 0:
    with an adapter the reference needs no second copy, but its forward pass takes time (kl_steps)."""
    return bool(options.adapter and options.kl_steps and step % options.kl_steps < steps)


def report_kl(options: Any) -> None:
    """Say at the start of a run how often kl is measured, where that is not every step."""
    if options.adapter and not options.beta:
        often = f"every {options.kl_steps} steps" if options.kl_steps else "never"
        log.info(
            "kl against the base model is measured %s: with beta 0 it costs a forward pass (kl_steps)", often
        )


@forward_only
def keep_logprobs(
    model: Transformer, reference: Transformer | None, micro: Sequence[Sequence[Rollout]], options: Any,
    world: World, share_prompts: bool, *, old: bool, kl: bool,
) -> None:
    """Store log π_old and entropies (`old`: the weights will move before these micro-batches are used up, or
    tokens are chosen by entropy) and log π_ref (`kl`; from a frozen copy, or with LoRA the model with its
    adapters off) with this rank's rollouts. No gradients."""
    kl = kl or bool(options.beta)
    if not old and not kl:
        return
    for micro_batch in micro:
        batch = collate(micro_batch, world.device, share_prompts)
        if old:
            logprobs, entropy, router_logits, _ = token_logprobs(model, batch, options.temperature)
            if getattr(options, "router_replay", False):
                batch.keep_routes(router_logits, model.arch.experts_per_token)
            batch.keep("old_logprobs", logprobs)
            batch.keep("entropies", entropy)
        if kl:
            with base_of(model, reference) as base, without_gradients(base):
                batch.keep("ref_logprobs", token_logprobs(base, batch, options.temperature)[0])
