"""Health rules as data (RULES): the symptoms, causes and remedies of the reference page's tables, and further
ones; and the Doctor, which applies them to a run's metrics.
"""

import collections
import difflib
import fnmatch
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal

import dist
from run.config import ConfigError


@dataclass(frozen=True)
class Rule:
    """One health rule. `low`, `high`, `window`, `after` and `severity` can be set under `health_rules`."""

    name: str
    metrics: tuple[str, ...]  # the first one that a run logs is read; * matches any name
    check: str  # one of CHECKS
    says: str  # what it means, in the verdict
    cause: str
    # (option, advice, (low, high) or names: omit the advice if the option already lies inside); the verdict
    # adds the option's value
    fixes: tuple[tuple[str, str] | tuple[str, str, tuple[float, float] | tuple[str, ...]], ...]
    low: float | None = None
    high: float | None = None
    plus: str | None = None  # an option whose value is added to `high`
    window: int = 1  # observations: steps of a live run, lines of a finished one
    after: int = 0  # observations before the rule applies
    severity: Literal["warning", "critical"] = "warning"
    guard: str | None = None  # one of GUARDS: does the rule apply to this config?
    unless: str | None = None  # the rule is silent while this one, which explains it, is broken


_CORRECTION: tuple[str, str, tuple[str, ...]] = (
    "vllm_importance_sampling_mode",
    "token_truncate or geometric_mask does not grow with the length of a completion",
    ("token_truncate", "token_mask", "geometric_mask", "geometric_truncate"),
)

RULES: tuple[Rule, ...] = (
    # Supervised fine-tuning ("Key Metrics for SFT", "SFT Stability")
    Rule(
        "loss_stuck", ("train/loss",), "unmoved", "the loss has not moved since the first steps",
        "the learning rate is too low, or the labels mask what should be learnt",
        (("learning_rate", "try 2 to 5 times as much (full fine-tuning 1e-5 to 5e-5, LoRA 1e-4 to 3e-4)"),
         ("weight_decay", "above 0.1 it can suppress LoRA", (0, 0.1)),
         ("datasets", "see the mask: python data.py inspect")),
        high=0.97, window=50, after=60, guard="supervised",
    ),
    Rule(
        "loss_plateau", ("train/loss",), "flat", "the loss has stopped falling, well above 0.5 to 2.0",
        "too low a learning rate, a warmup too short for it, or data without signal",
        (("learning_rate", "try 2 to 5 times as much"), ("warmup_ratio", "try 0.05 to 0.1", (0.05, 1)),
         ("datasets", "see the mask: python data.py inspect")),
        low=2.0, high=0.99, window=100, after=150, guard="supervised",
    ),
    Rule(
        "loss_spike", ("train/loss",), "spike", "the loss jumped",
        "a malformed or very long row, or a learning rate that is too high",
        (("sample_packing", "set it to false for a while and see which batches do it", (0, 0)),
         ("learning_rate", "divide it by 2 to 5, or warm up longer"),
         ("bf16", "try false to see if precision is the cause", (0, 0))),
        low=2.0, high=8.0, window=30, after=20, guard="supervised",
    ),
    Rule(
        "loss_diverging", ("train/loss",), "above_best", "the loss climbs and stays up",
        "the learning rate is too high for this batch size or warmup",
        (("learning_rate", "divide it by 2 to 5"), ("warmup_ratio", "try 0.05 to 0.1", (0.05, 1)),
         ("max_grad_norm", "1.0 clips what a bad batch can do", (1e-9, 1.0))),
        low=0.5, high=1.5, window=10, after=10, severity="critical", guard="supervised",
    ),
    Rule(
        "overfitting", ("eval/loss",), "rising", "held-out loss rises while training goes on",
        "the model learns the training rows by heart",
        (("num_epochs", "fewer, or set max_steps"), ("weight_decay", "try 0.01 to 0.1", (0.01, math.inf)),
         ("lora_r", "8 to 32"), ("lora_dropout", "try 0.05", (0.05, 1)),
         ("val_set_size", "0.05 gives a steadier figure")),
        high=0.03, window=2, after=3, unless="loss_diverging",
    ),
    Rule(
        "grad_norm_high", ("train/grad_norm",), "outside", "gradients are large",
        "too high a learning rate, noisy or malformed batches",
        (("max_grad_norm", "1.0 clips them", (1e-9, 1.0)), ("learning_rate", "divide it by 2 to 5"),
         ("gradient_accumulation_steps", "more smooth a noisy batch")),
        high=10.0, window=5, after=10, guard="supervised",
    ),
    Rule(
        "grad_norm_exploding", ("train/grad_norm",), "outside", "the gradient explodes",
        "the step before it was too long, or one batch is broken",
        (("learning_rate", "divide it by 2 to 5"), ("max_grad_norm", "1.0 clips it", (1e-9, 1.0)),
         ("warmup_ratio", "try 0.05 to 0.1", (0.05, 1))),
        high=100.0, window=1, after=5, severity="critical", guard="supervised",
    ),
    Rule(
        "grad_norm_vanishing", ("train/grad_norm",), "outside", "gradients are close to zero",
        "hardly any token is trained, or the loss is already zero",
        (("datasets", "see the mask: python data.py inspect"),
        ("num_epochs", "the rows may be known by heart")),
        low=1e-4, window=20, after=10, guard="supervised",
    ),
    Rule(
        "learning_rate_off_schedule", ("schedule/ratio",), "outside",
        "the learning rate is not the schedule's",
        "something other than the schedule sets it: an edited loop, a second scheduler, a wrong resume",
        (("lr_scheduler", "let dist.learning_rate alone set it"),),
        low=0.999, high=1.001, window=2, severity="critical",
    ),
    Rule(
        "loss_mis_scaled", ("train/loss_consistency",), "outside",
        "the differentiated loss is not the reported mean over the step's tokens",
        "micro-batches are averaged separately, or divided by the wrong count (an edited loop)",
        (("gradient_accumulation_steps", "divide each micro-batch's sum by the tokens of the whole step"),),
        low=0.999, high=1.001, window=3, severity="critical", guard="supervised",
    ),
    Rule(
        "few_trained_tokens", ("trained_token_share",), "outside", "hardly any token is trained",
        "prompts are much longer than answers, or the mask is wrong",
        (("datasets", "see the mask: python data.py inspect"),), low=0.01, window=5,
    ),
    Rule(
        "trained_on_prompts", ("trained_token_share",), "outside",
        "every token is trained, though the rows have prompts",
        "the loss is on the questions too", (("train_on_inputs", "set it to false", (0, 0)),),
        high=0.999, window=5, guard="has_prompts",
    ),
    # Reinforcement learning ("Key Metrics for RL", "RL/GRPO Stability")
    Rule(
        "reward_stuck_at_zero", ("rewards/*/mean", "reward"), "stays_at", "no completion has earned anything",
        "the reward function is broken, misses a column, or the task is too hard for this model",
        (("reward_funcs", "try it alone: python grpo.py test-rewards"),
         ("datasets", "has every row the column that it reads, e.g. answer?"),
         ("log_completions", "true shows what the model writes", (1, 1)),
         ("max_completion_length", "too short an answer earns nothing")),
        low=0.0, window=20, after=20,
    ),
    Rule(
        "no_signal", ("reward_std",), "stays_at",
        "all completions earn the same: there is nothing to learn from",
        "a constant reward, or a task that is always or never solved",
        (("reward_funcs", "try it alone: python grpo.py test-rewards"),
        ("temperature", "0.8 to 1.0 explores more", (0.8, math.inf)),
         ("num_generations", "16 and more find differences", (16, math.inf))),
        low=0.0, window=10, after=5,
    ),
    Rule(
        "all_groups_flat", ("frac_reward_zero_std",), "outside",
        "in every group all completions earn the same",
        "a reward that does not tell completions apart, or a policy that has collapsed",
        (("reward_funcs", "try it alone: python grpo.py test-rewards"),
        ("temperature", "0.8 to 1.0 explores more", (0.8, math.inf)),
         ("num_generations", "16 and more find differences", (16, math.inf))),
        high=0.9999, window=10, after=3, severity="critical",
    ),
    Rule(
        "flat_groups", ("frac_reward_zero_std",), "outside", "in most groups all completions earn the same",
        "the task is too easy or too hard for most prompts: their advantages are 0 and they are skipped",
        (("num_generations", "16 and more find differences", (16, math.inf)),
        ("temperature", "0.8 to 1.0 explores more", (0.8, math.inf)),
         ("datasets", "leave out what is always or never solved")),
        high=0.8, window=20, after=5,
    ),
    Rule(
        "entropy_collapse", ("entropy",), "outside", "completions are becoming identical",
        "the policy has put all its probability on one answer: no group disagrees any more",
        (("temperature", "try 0.8 to 1.0", (0.8, math.inf)), ("learning_rate", "halve it"),
        ("beta", "0.01 to 0.1 holds it to its start", (0.01, math.inf)),
         ("num_generations", "16 and more", (16, math.inf))),
        low=0.01, window=10, severity="critical",
    ),
    Rule(
        "entropy_high", ("entropy",), "outside", "the policy does not converge",
        "too high a temperature or learning rate, or a base model that does not know the task",
        (("temperature", "lower it"), ("learning_rate", "halve it")), high=1.0, window=20, after=20,
    ),
    Rule(
        "kl_high", ("kl",), "outside", "the policy has gone far from where it began",
        "too many or too long steps away from the reference",
        (("beta", "raise it"), ("learning_rate", "halve it"),
        ("num_iterations", "fewer passes over a batch", (0, 1))),
        high=2.0, window=3, severity="critical",
    ),
    Rule(
        "kl_drifting", ("kl",), "outside", "the policy drifts away from where it began",
        "long training without a KL penalty, or a rather high learning rate",
        (("beta", "raise it"), ("learning_rate", "halve it")), high=0.5, window=10,
    ),
    Rule(
        "sampler_mismatch", ("sampling/sampling_logp_difference/mean",), "outside",
        "the sampler's log-probs are not the trainer's",
        "the server's own settings (logprobs_mode, generation_config, another temperature), stale or wrong "
        "weights there, or a precision that differs",
        (("vllm_server_base_url", "start the server there with `python grpo.py serve`, which sets them"),
         ("vllm_sync_interval", "lower it: sync more often", (0, 1)),
        ("vllm_dtype", "the same as the trainer's"),
         ("temperature", "the same for sampler and trainer")),
        high=0.1, window=5,
    ),
    Rule(
        "off_policy", ("sampling/sampling_logp_difference/mean",), "outside",
        "the sampler's weights are far from the trainer's",
        "the server has not received weights for many updates, or has the wrong ones",
        (("vllm_sync_interval", "lower it: sync more often", (0, 1)),
         ("off_policy_mask_threshold", "0.5 leaves stale samples out", (1e-9, 0.5)),
         _CORRECTION),
        high=1.0, window=2, severity="critical",
    ),
    Rule(  # The page's table says to raise vllm_sync_interval here, its text to lower it: lower is right.
        "ratio_vanishing", ("sampling/importance_sampling_ratio/min",), "outside",
        "the data are stale: some samples are almost impossible under the current policy",
        "the policy has moved away from the weights that sampled",
        (("vllm_sync_interval", "lower it: sync more often", (0, 1)),
         ("off_policy_mask_threshold", "0.5 leaves stale samples out", (1e-9, 0.5)),
         _CORRECTION,
         ("async_prefetch", "costs one update", (0, 0))),
        low=0.1, window=5,
    ),
    Rule(  # The smallest ratio and the mean difference can both be fine where a product over 8,192 is not.
        "correction_wastes_samples", ("sampling/importance_sampling_ratio/effective_share",), "outside",
        "the sampler correction concentrates the weight on few samples: effective share (Σw)²/(n·Σw²)",
        "small differences between sampler and trainer multiply up over long completions, or old weights",
        (_CORRECTION, ("vllm_dtype", "the same as the trainer's makes the difference smaller"),
         ("vllm_sync_interval", "lower it: sync more often", (0, 1))),
        low=0.5, window=5, after=2,
    ),
    Rule(
        "correction_drops_samples", ("sampling/importance_sampling_ratio/outside_share",), "outside",
        "much of what was sampled lies outside of the sampler correction's limits and is dropped or clamped",
        "long completions, older weights or another precision: the sampler's log-probs are not the trainer's",
        (_CORRECTION, ("vllm_importance_sampling_clip_max", "wider limits drop less"),
         ("vllm_sync_interval", "lower it: sync more often", (0, 1))),
        high=0.2, window=5, after=2,
    ),
    Rule(
        "clipping", ("clip_ratio/region_mean",), "outside", "the ratio is clipped on most tokens",
        "the policy moves further in one batch than epsilon allows",
        (("learning_rate", "halve it"), ("num_iterations", "fewer passes over a batch", (0, 1)),
         ("epsilon", "wider clips less")),
        high=0.3, window=5,
    ),
    Rule(
        "length_creep", ("completions/mean_length",), "creep", "completions grow and grow",
        "the reward pays for length: reward hacking",
        (("reward_funcs", "see log_completions: what do the long ones earn? add or weigh `length`"),
         ("loss_type", "dr_grpo or dapo do not divide by a completion's own length"),
         ("mask_truncated_completions", "true keeps cut ones from teaching", (1, 1))),
        high=1.5, window=40, after=40,
    ),
    Rule(
        "completions_clipped", ("completions/clipped_ratio",), "outside",
        "many completions hit the length limit",
        "the limit is too short, or the model does not end its answers",
        (("max_completion_length", "raise it"),
        ("mask_truncated_completions", "true keeps cut ones from teaching", (1, 1)),
         ("chat_template", "does the model know the token that ends a turn?")),
        high=0.8, window=5,
    ),
    Rule(
        "stale_weights", ("weight_version_lag",), "outside", "samples come from old weights",
        "the sync is late: an engine that is lost or an interval that is long",
        (("vllm_sync_interval", "lower it: sync more often", (0, 1)),
        ("async_prefetch", "costs one update", (0, 0))),
        high=1.0, plus="vllm_sync_interval", window=2,
    ),
    Rule(
        "policy_gradient_large", ("train/grad_norm",), "outside", "gradients of the policy are large",
        "too high a learning rate, or advantages of a few odd completions",
        (("max_grad_norm", "1.0 clips them", (1e-9, 1.0)), ("learning_rate", "halve it"),
         ("gradient_accumulation_steps", "more smooth a noisy batch")),
        high=10.0, window=5, after=5, severity="critical", guard="samples",
    ),
    Rule(
        "no_gradient", ("train/grad_norm",), "stays_at", "no gradient reaches the weights",
        "every group is flat, or nothing is trained",
        (("reward_funcs", "try it alone: python grpo.py test-rewards"),
        ("num_generations", "16 and more", (16, math.inf))),
        low=0.0, window=10, guard="samples",
    ),
    Rule(
        "reward_collapse", ("reward",), "below_best", "the reward has fallen far from its best",
        "the policy has been broken by its own updates",
        (("learning_rate", "halve it"), ("beta", "0.01 to 0.1 holds it to its start", (0.01, math.inf)),
        ("max_grad_norm", "1.0", (1e-9, 1.0))),
        low=0.5, window=10, after=20, severity="critical",
    ),
    Rule(
        "step_skipped", ("skipped_steps",), "outside", "steps were left out: they were not finite",
        "see the incidents in output_dir/incidents", (("on_nonfinite", ""), ("learning_rate", "halve it")),
        high=0.0,
    ),
    Rule(
        "nonfinite_activations", ("nonfinite_hidden_states",), "outside",
        "hidden states that are not finite were replaced",
        "an overflow in the forward pass; see run.log for the module and the rows",
        (("bf16", "try false to see if precision is the cause", (0, 0)), ("fp8", "try false", (0, 0)),
        ("learning_rate", "halve it")),
        high=0.0, severity="critical",
    ),
    # Energy-based fine-tuning (the page's EBFT note; ranges are of the cosine before doubling, raw features)
    Rule(
        "alignment_low", ("ebft/alignment_cosine",), "outside",
        "samples have little to do with the true completions",
        "the policy is far from the data, or the features do not distinguish them",
        (("temperature", "lower it"), ("feature_layers", "deeper layers see more of the meaning"),
         ("ce_coef", "0.03 to 0.1 helps at the start", (0.03, math.inf))),
        low=0.3, window=20, after=20,
    ),
    Rule(
        "alignment_falling", ("ebft/alignment_cosine",), "below_best",
        "samples move away from the true completions",
        "the diversity term or the learning rate drives them off",
        (("diversity_coef", "lower it"), ("learning_rate", "halve it"),
        ("ce_coef", "0.03 to 0.1 holds the language", (0.03, math.inf))),
        low=0.95, window=10, after=20, severity="critical",
    ),
    Rule(  # For independent whitened features it is 0 by construction: watch the entropy instead.
        "samples_alike", ("ebft/diversity",), "outside",
        "the samples of a prompt are all alike: mode collapse",
        "alignment outweighs the penalty on likeness, or the temperature leaves no choice",
        (("temperature", "try 0.8 to 1.0", (0.8, math.inf)), ("diversity_coef", "raise it"),
        ("learning_rate", "halve it")),
        high=1.0, window=10, after=5, guard="raw_features",
    ),
    Rule(
        "samples_identical", ("ebft/pairwise_cosine",), "outside",
        "the samples of a prompt are the same: mode collapse",
        "alignment outweighs the penalty on likeness, or the temperature leaves no choice",
        (("temperature", "try 0.8 to 1.0", (0.8, math.inf)), ("diversity_coef", "raise it"),
         ("learning_rate", "halve it")),
        high=0.9999, window=5, after=3, severity="critical",
    ),
    Rule(
        "feature_distance_high", ("ebft/cfm_unwhitened",), "outside",
        "the feature distance is out of range",
        "features are not normalised, or the feature network is not the initial one", (("embed_method", ""),),
        high=10.0, window=3, severity="critical",
    ),
    Rule(
        "feature_distance_rising", ("ebft/cfm_unwhitened",), "above_best",
        "the features move away from the truth's",
        "the learning rate is too high, or the diversity term drives the samples off",
        (("learning_rate", "halve it"), ("diversity_coef", "lower it"),
        ("ce_coef", "0.03 to 0.1 holds the language", (0.03, math.inf))),
        low=0.02, high=3.0, window=10, after=20, severity="critical",
    ),
    Rule(
        "diversity_drowns_alignment", ("ebft/reward",), "outside",
        "the penalty on likeness outweighs the agreement",
        "the samples are rewarded for being different, not for being right",
        (("diversity_coef", "lower it"), ("use_whitening", "true counts what tells samples apart", (1, 1))),
        low=0.0, window=10, after=5,
    ),
    Rule(
        "whitening_failed", ("ebft/whitening_fallbacks",), "outside", "features could not be whitened",
        "features that are not finite", (("bf16", "try false", (0, 0)), ("learning_rate", "halve it")),
        high=0.0,
    ),
    # The system
    Rule(
        "memory_creep", ("memory/max_alloc",), "creep", "memory grows from step to step",
        "something keeps tensors of past steps alive, or rows grow longer",
        (("sequence_len", "bounds the longest row"), ("profiler_steps", "writes a memory snapshot on CUDA")),
        high=1.2, window=60, after=60,
    ),
    Rule(
        "step_time_jump", ("step_time",), "jump", "steps take much longer than before",
        "another program on this machine, a throttled GPU, a slow rank or server, or longer rows",
        (("profiler_steps", "shows where the time goes"),), high=3.0, window=5, after=30,
    ),
    Rule(
        "data_starvation", ("step_time/data_share",), "outside", "steps wait for data",
        "rows are made slower than the model trains on them",
        (("dataset_prepared_path", "prepare rows once, on a fast disk"),), high=0.5, window=10, after=5,
    ),
    Rule(  # Values are ten steps apart (dist.race).
        "slow_rank", ("ranks/slowness",), "outside", "one rank's device is slower than the others'",
        "every step waits for it (ranks/slowest in the metrics is its number): a hot or throttled GPU, "
        "another process on it, or a weaker machine",
        (("gpu_timeout_minutes", "leave that machine out; this is how long ranks wait for a missing one"),),
        high=1.5, window=3,
    ),
)

PROMPTED = {"chat", "instruct", "prompt_completion"}


def _types(config: dict) -> set[str]:
    return {str(spec.get("type")) for spec in config.get("datasets") or []}


def of_training(rows: Iterable[dict]) -> Iterator[dict]:
    """The rows that a run was judged by while it ran: all but the evaluation before its first step."""
    for row in rows:
        if row["step"] or any(not name.startswith(("eval/", "health/")) for name in row if name != "step"):
            yield row


def samples(config: dict) -> bool:
    """Whether this config's recipe trains on what the policy samples: GRPO and EBFT."""
    return "reward_funcs" in config or "feature_layers" in config


GUARDS: dict[str, Callable[[dict], Any]] = {
    "samples": samples,
    "supervised": lambda config: not samples(config),
    "has_prompts": lambda config: _types(config) & PROMPTED and _types(config) <= PROMPTED | {"text"},
    "raw_features": lambda config: (
        config.get("whitening", "none") == "none" and not config.get("use_whitening")
    ),
}

ALIASES: dict[str, str] = {  # names in other trainers and in versions before 0.3
    "loss": "train/loss", "eval_loss": "eval/loss", "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
}


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _check_outside(rule: Rule, seen: "Series") -> str | None:
    last = seen.last(rule.window)
    if len(last) < rule.window:
        return None
    steps = "" if rule.window == 1 else f" for {rule.window} steps"
    if rule.low is not None and all(x < rule.low for x in last):
        return f"{_figure(last[-1])}{steps}, below {rule.low:g}"
    if rule.high is not None and all(x > rule.high for x in last):
        return f"{_figure(last[-1])}{steps}, above {rule.high:g}"
    return None


def _check_stays_at(rule: Rule, seen: "Series") -> str | None:
    last = seen.last(rule.window)
    if len(last) == rule.window and all(abs(x - (rule.low or 0.0)) < 1e-9 for x in last):
        return f"{_figure(last[-1])} for {rule.window} steps"
    return None


def _check_unmoved(rule: Rule, seen: "Series") -> str | None:
    latest, first = median(seen.last(10)), median(seen.first)
    if seen.count >= rule.window and latest > (rule.high or 1.0) * first:
        return f"{_figure(latest)} after {seen.count} steps, {_figure(first)} at the start"
    return None


def _check_flat(rule: Rule, seen: "Series") -> str | None:
    last = seen.last(rule.window)
    half = len(last) // 2
    if len(last) < rule.window or seen.progress > 0.6:  # late in a run a schedule ends in a plateau
        return None
    before, latest = median(last[:half]), median(last[half:])
    if latest > (rule.high or 1.0) * before and latest > (rule.low or 0.0):
        return f"{_figure(latest)}, {_figure(before)} {half} steps ago"
    return None


def _check_spike(rule: Rule, seen: "Series") -> str | None:
    """The robust z-score of the last value: its distance from the median in units of the median deviation."""
    *before, latest = seen.last(rule.window + 1)
    if len(before) < 10:
        return None
    middle = median(before)
    deviation = 1.4826 * median([abs(x - middle) for x in before]) + 0.01 * abs(middle) + 1e-12
    if (latest - middle) / deviation > (rule.high or 0.0) and latest > (rule.low or 0.0) * middle:
        return f"{_figure(latest)} after a median of {_figure(middle)} ({latest / middle:.1f} times as much)"
    return None


def _check_above_best(rule: Rule, seen: "Series") -> str | None:
    """Medians of a window against the lowest such median so far; differences below `low` are noise."""
    best, latest = min(seen.lowest, seen.first[0]), median(seen.last(rule.window))
    if seen.count >= rule.window and latest > (rule.high or 1.0) * best and latest - best > (rule.low or 0.0):
        return f"{_figure(latest)}, it was {_figure(best)}"
    return None


def _check_below_best(rule: Rule, seen: "Series") -> str | None:
    best, latest = seen.highest, median(seen.last(rule.window))
    if seen.count >= rule.window and best > 0 and latest < (rule.low or 0.0) * best:
        return f"{_figure(latest)}, it was {_figure(best)}"
    return None


def _check_rising(rule: Rule, seen: "Series") -> str | None:
    last, best = seen.last(rule.window), seen.least
    if len(last) == rule.window and all(x > (1 + (rule.high or 0.0)) * best for x in last):
        return f"{_figure(last[-1])}, it was {_figure(best)}"
    return None


def _check_creep(rule: Rule, seen: "Series") -> str | None:
    """Each quarter of the window is above the one before, and the last above the first by factor `high`."""
    last = seen.last(rule.window)
    if len(last) < rule.window:
        return None
    size = len(last) // 4
    quarters = [median(last[k * size : (k + 1) * size]) for k in range(4)]
    rising = all(b > 1.01 * a for a, b in itertools.pairwise(quarters))
    if rising and quarters[-1] > (rule.high or 1.0) * quarters[0]:
        return f"{_figure(quarters[0])} → {_figure(quarters[-1])} in {rule.window} steps, without a pause"
    return None


def _check_jump(rule: Rule, seen: "Series") -> str | None:
    last = seen.last(rule.window + 30)
    before, latest = last[: -rule.window], last[-rule.window :]
    if len(before) >= 10 and min(latest) > (rule.high or 1.0) * median(before):
        return f"{_figure(median(latest))} for {rule.window} steps, before {_figure(median(before))}"
    return None


CHECKS: dict[str, Callable[[Rule, "Series"], str | None]] = {
    "outside": _check_outside, "stays_at": _check_stays_at, "unmoved": _check_unmoved, "flat": _check_flat,
    "spike": _check_spike, "above_best": _check_above_best, "below_best": _check_below_best,
    "rising": _check_rising, "creep": _check_creep, "jump": _check_jump,
}


class Series:
    """One metric as the rules see it: its last values, its first, and its best."""

    def __init__(self) -> None:
        self.values: collections.deque[float] = collections.deque(maxlen=256)
        self.first: list[float] = []
        self.count = 0
        self.progress = 0.0  # of the run, 0 to 1
        self.least = math.inf
        self.lowest, self.highest = math.inf, -math.inf  # medians of ten values

    def add(self, value: float, progress: float) -> None:
        self.values.append(value)
        self.count, self.progress = self.count + 1, progress
        if len(self.first) < 10:
            self.first.append(value)
        self.least = min(self.least, value)
        if self.count >= 10:
            middle = median(self.last(10))
            self.lowest, self.highest = min(self.lowest, middle), max(self.highest, middle)

    def last(self, count: int) -> list[float]:
        start = max(0, len(self.values) - count)
        return list(itertools.islice(self.values, start, None))


@dataclass
class Verdict:
    """A rule's change of state."""

    rule: Rule
    step: int
    metric: str
    ill: bool
    found: str = ""  # the figures
    rows: str = ""  # the batch that caused it

    def line(self, config: dict) -> str:
        if not self.ill:
            return f"health: step {self.step}: {self.rule.name} is over: {self.metric} is back in its range"
        advice = "; ".join(
            f"{_with_value(option, config)}: {words}"
            for option, words, *void in self.rule.fixes
            if not _says_nothing_new(config.get(option), void)
        )
        where = f"{self.metric} {self.found}" + (f" (rows {self.rows})" if self.rows else "")
        return (
            f"health: step {self.step}: {self.rule.name}: {where}: {self.rule.says}. "
            f"Cause: {self.rule.cause}. {advice}"
        )


def _says_nothing_new(value: Any, void: list) -> bool:
    if not void or isinstance(value, str):
        return bool(void) and value in void[0]
    return isinstance(value, int | float) and void[0][0] <= value <= void[0][1]


def _with_value(option: str, config: dict) -> str:
    value = config.get(option)
    if option not in config or isinstance(value, list | dict):
        return option
    return f"{option} is {value:g}" if isinstance(value, float) else f"{option} is {value}"


def rules_of(config: dict, rules: Sequence[Rule] = RULES) -> list[Rule]:
    """The rules that apply to a config, with its own ranges. Raises ConfigError for an unknown rule or an
    invalid setting."""
    own = config.get("health_rules") or {}
    if not isinstance(own, dict):
        raise ConfigError("health_rules", own, "must be {rule: {high: …}} or {rule: off}")
    names = {rule.name for rule in rules}
    for name, change in own.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise ConfigError(
                "health_rules", name, f"is no rule{f'; did you mean {near[0]}?' if near else ''}"
            )
        known = ("low", "high", "window", "after", "severity")
        if change not in (False, "off") and not (isinstance(change, dict) and set(change) <= set(known)):
            raise ConfigError(
                f"health_rules.{name}", change, f"must be off, or set some of {', '.join(known)}"
            )
        if isinstance(change, dict):
            for key, value in change.items():
                right = value in ("warning", "critical") if key == "severity" else (
                    isinstance(value, int | float) and not isinstance(value, bool)
                    and (key in ("low", "high") or (isinstance(value, int) and value >= (key == "window")))
                )
                if not right:
                    raise ConfigError(f"health_rules.{name}.{key}", value, "is not a valid value")
    found = []
    for rule in rules:
        change = own.get(rule.name, {})
        if change in (False, "off") or (rule.guard and not GUARDS[rule.guard](config)):
            continue
        if rule.plus is not None and rule.high is not None:
            rule = replace(rule, high=rule.high + float(config.get(rule.plus) or 0.0))
        found.append(replace(rule, **change))
    return found


MEASURED = re.compile(r"time|second|memory|mfu|data_share|^ranks/")  # depend on the machine or the process


class Doctor:
    """Watches the metrics of a run, step by step, and reports each change of a rule's state."""

    def __init__(self, config: dict, total_steps: int = 0):
        self.config, self.total_steps = config, total_steps
        self.rules = rules_of(config)
        self.options: Any = SimpleNamespace(**config)
        self.series: dict[str, Series] = {}
        self.ill: dict[tuple[str, str], int] = {}  # (rule, metric) → observations since it was last seen ill
        self.ever: dict[str, Verdict] = {}  # the first verdict of every rule that has spoken
        self.readers: dict[str, list[Rule]] = {}  # metric → the rules that read it

    def observe(
        self, step: int, metrics: dict[str, float], rows: Callable[[], str] | None = None
    ) -> list[Verdict]:
        verdicts = []
        progress = step / self.total_steps if self.total_steps else 0.0
        rate = metrics.get("train/learning_rate")
        if rate is not None and self.total_steps and "lr_scheduler" in self.config:
            expected = dist.learning_rate(step - 1, self.options, self.total_steps)
            metrics = {**metrics, "schedule/ratio": rate / expected if expected else 1.0 + rate}
        figures = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
        for name in figures:
            self.series.setdefault(name, Series())
        for name, value in figures.items():
            if name not in self.readers:
                self.readers[name] = [rule for rule in self.rules if self._reads(rule, name)]
            if not self.readers[name]:
                continue
            seen = self.series[name]
            seen.add(value, progress)
            for rule in self.readers[name]:
                finding = CHECKS[rule.check](rule, seen) if seen.count > rule.after else None
                if rule.unless in {ill for ill, _ in self.ill}:
                    finding = None
                key = (rule.name, name)
                if finding is not None and key not in self.ill:
                    named = rows() if rows is not None and rule.check == "spike" else ""
                    verdicts.append(Verdict(rule, step, name, True, finding, named))
                    self.ever.setdefault(rule.name, verdicts[-1])
                if finding is not None:
                    self.ill[key] = 0
                elif key in self.ill:
                    self.ill[key] += 1
                    if self.ill[key] >= max(3, rule.window):  # avoids flapping at the edge of a range
                        del self.ill[key]
                        verdicts.append(Verdict(rule, step, name, False))
        # The most severe first, then in the order of the table.
        order = {rule.name: index for index, rule in enumerate(self.rules)}
        return sorted(verdicts, key=lambda v: (not v.ill, v.rule.severity != "critical", order[v.rule.name]))

    def recall(self, rows: Iterable[dict]) -> None:
        """Restore the state of a resumed run from its logged metrics: windows, best values and broken rules,
        except for metrics that depend on the process (MEASURED)."""
        for row in of_training(rows):
            kept = {ALIASES.get(str(k), str(k)): v for k, v in row.items() if not MEASURED.search(k)}
            self.observe(row["step"], kept)

    def _reads(self, rule: Rule, name: str) -> bool:
        """Whether a rule reads this metric: its first name that the run has."""
        for pattern in rule.metrics:
            if fnmatch.fnmatchcase(name, pattern):
                return True
            if any(fnmatch.fnmatchcase(other, pattern) for other in self.series if other != name):
                return False
        return False

    @property
    def status(self) -> str:
        names = list(dict.fromkeys(name for name, _ in self.ill))
        return "well" if not names else ", ".join(names)

    def metrics(self) -> dict[str, float]:
        """health/alarms, and health/<rule> = 1 for each that is ill."""
        names = {name for name, _ in self.ill}
        return {"health/alarms": float(len(names)), **{f"health/{name}": 1.0 for name in sorted(names)}}
