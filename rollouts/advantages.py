"""From rewards to advantages: relative to the group, by reward, and by step.

A group is num_generations completions of one prompt, adjacent; NaN where a completion has no reward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rollouts.rewards import Steps, spread
from rollouts.rollout import Rollout
from rollouts.tokens import as_ids, as_logprobs
from run.config import ConfigError, check_ranges

SMALL = 1e-4  # added to a standard deviation before dividing by it
FLAT = 1e-8  # standard deviation below which the rewards of a group are the same


@dataclass
class AdvantageOptions:
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of their group, of the batch, or not at all."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Several reward functions: weigh and add their scores, then compare within the group; or compare each
    function's scores within the group first, so that none drowns another, then weigh, add and divide by the
    standard deviation of the batch (GDPO, arXiv 2601.05242)."""
    advantage_level: Literal["completion", "step"] = "completion"
    """One advantage for a completion; or one for each of its steps, from the rewards of that step and all
    later ones (DeepSeekMath, arXiv 2402.03300, §4.1.3): an environment's rewards by turn, or a reward
    function's lists of (tokens until then, reward)."""
    rl_coef: float = 1.0
    """Weight of these advantages; 0 with a teacher: rewards are measured only."""

    def check(self) -> None:
        check_ranges(self, ("rl_coef", 0, math.inf))
        if self.advantage_level == "step" and self.multi_objective_aggregation == "normalize_then_sum":
            raise ConfigError(
                "advantage_level", "step", "compares the sum of all rewards of a step: leave "
                "multi_objective_aggregation at sum_then_normalize",
            )


def in_groups(rewards: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rewards [B] → of each group of n: reward minus the mean [G, n], the unbiased standard deviation [G, 1],
    whether it is flat [G, 1], where both are exactly 0, and whether any reward is known [G, 1]."""
    grouped = rewards.view(-1, n)
    known = ~torch.isnan(grouped)
    count = known.sum(-1, keepdim=True)
    filled = torch.nan_to_num(grouped, nan=0.0)
    mean = filled.sum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(known, filled - mean, 0.0)
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    # The mean of equal numbers may be off by rounding, but advantages in a flat group must be exactly 0.
    highest = torch.where(known, grouped, mean).amax(-1, keepdim=True)
    flat = (std < FLAT) | ((grouped == highest) | ~known).all(-1, keepdim=True)
    return torch.where(flat, 0.0, centred), torch.where(flat, 0.0, std), flat, count > 0


def separate_advantages(table: Tensor, weights: Tensor, n: int) -> Tensor:
    """Scores [B, R] of R functions → [B]: each compared within its group by itself, over its own standard
    deviation, then weighed, added, and divided by the standard deviation of the batch (GDPO, arXiv
    2601.05242, eq. 4 to 6). 0 where no function applies."""
    parts = []
    for column in table.unbind(-1):
        centred, std, _, _ = in_groups(column, n)
        parts.append((centred / (std + SMALL)).flatten())
    total = torch.stack(parts, -1) @ weights
    applies = ~torch.isnan(table).all(-1)
    return torch.where(applies, total / (spread(total[applies]) + SMALL), 0.0)


def rewarded_steps(rollout: Rollout, weights: dict[str, float]) -> None:
    """Set step_ends and step_rewards from all rewards: those of an environment's turns as they are, a
    function's steps times its weight, and what judges the whole completion at its end."""
    ends = [] if rollout.step_ends is None else rollout.step_ends.tolist()
    rewards = [] if rollout.step_rewards is None else rollout.step_rewards.tolist()
    steps = list(zip(ends, rewards, strict=True))
    for name, value in rollout.rewards.items():
        weight = weights.get(name, 1.0)
        if isinstance(value, Steps):
            steps += [(end, weight * reward) for end, reward in value.steps]
        elif value is not None and name != "environment":
            steps.append((len(rollout.completion_ids), weight * value))
    steps.sort()
    rollout.step_ends = as_ids([end for end, _ in steps])
    rollout.step_rewards = as_logprobs([reward for _, reward in steps])


def step_advantages(group: Sequence[Rollout], scale: str) -> list[np.ndarray]:
    """Of each token of each completion of a group the sum of the rewards of its step and the later ones, each
    minus the mean of all step rewards of the group, over their standard deviation unless `scale` is none
    (DeepSeekMath, §4.1.3)."""
    every = np.concatenate([r.step_rewards for r in group if r.step_rewards is not None] or [np.empty(0)])
    every = every.astype(np.float64)
    mean, std = (every.mean(), every.std(ddof=1)) if len(every) > 1 else (0.0, 0.0)
    divisor = 1.0 if scale == "none" else std + SMALL
    found = []
    for r in group:
        tokens = np.zeros(len(r.completion_ids), np.float64)
        if r.step_rewards is not None and r.step_ends is not None and std >= FLAT:
            np.add.at(tokens, np.clip(r.step_ends, 1, len(tokens)) - 1, (r.step_rewards - mean) / divisor)
        found.append(tokens[::-1].cumsum()[::-1].astype(np.float32))
    return found


def assign(rollouts: Sequence[Rollout], advantages: Tensor, n: int, options: AdvantageOptions) -> None:
    """Give the rollouts their advantages [B], or those of their steps, times rl_coef."""
    for rollout, advantage in zip(rollouts, (options.rl_coef * advantages).tolist(), strict=True):
        rollout.advantage, rollout.token_advantages = advantage, None
    if options.advantage_level == "step":
        for k in range(0, len(rollouts), n):
            group = rollouts[k : k + n]
            for r, tokens in zip(group, step_advantages(group, options.scale_rewards), strict=True):
                r.token_advantages = np.float32(options.rl_coef) * tokens
                r.advantage = float(r.token_advantages[0])
