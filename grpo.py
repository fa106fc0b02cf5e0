"""Group relative policy optimisation: sample several completions of each prompt, score them, and make the
better ones of each group likelier (DeepSeekMath, arXiv 2402.03300; losses of its successors in policy.py).

    python grpo.py --config configs/tiny/grpo.yaml
    torchrun --nproc-per-node 8 grpo.py --config configs/qwen2.5-1.5b-gsm8k-8gpu.yaml
    python grpo.py test-rewards --config x.yaml      score sample completions outside training
    python grpo.py serve --config x.yaml             start the vLLM server that this config needs

One generation batch (micro_batch_size · steps_per_generation · processes completions, num_generations for
each prompt) is sampled, scored and used for num_iterations passes of optimiser steps. The loss of a step is
divided by what the whole step holds, over all micro-batches and ranks, so it does not depend on how the step
is cut.
"""

import importlib.util
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlparse

import torch
from torch import Tensor

import dist
from checkpoints import building
from checkpoints.saving import Checkpointer, CheckpointOptions, save_final
from checkpoints.weights import load_pretrained, read_architecture, resized
from data import DataOptions, Prompt, load_tokenizer, read_prompts
from dist import DistOptions, OptimizerOptions, World
from health import memory, monitor
from health.forensics import ForensicOptions, Forensics
from health.monitor import LogOptions, MetricLogger
from model import ModelOptions
from rollouts.engines import EmbeddedEngine, ReplayEngine, as_rollouts, make_engine
from rollouts.environments import load_environment, play
from rollouts.policy import (
    PolicyOptions,
    accumulate_gradients,
    can_share_prompts,
    check_sampler,
    completion_metrics,
    entropy_bonus,
    keep_logprobs,
    measures_kl,
    report_kl,
)
from rollouts.rewards import RewardError, RewardOptions, Scorer
from rollouts.rollout import Engine, Rollout, write_rollouts
from rollouts.vllm_client import VllmEngine
from rollouts.vllm_server import Completion, EngineError, server_command
from run.config import (
    BallastError,
    ConfigError,
    check_at_least_one,
    check_every_part,
    check_ranges,
    parse_config,
    resolve_checkpoint,
)
from run.log import _Console, log, start_log
from run.loop import run
from text.packing import LoopOptions, PromptOrder, settle_intervals, split_held_out, weights_of, with_weights
from text.tokenizer import Tokenizer


@dataclass
class Config(
    ModelOptions, DataOptions, RewardOptions, PolicyOptions, LoopOptions, OptimizerOptions, CheckpointOptions,
    DistOptions, LogOptions, ForensicOptions,
):  # fmt: skip
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of their group, of the batch, or not at all."""
    ref_model_sync_steps: int | None = None
    """With beta in full fine-tuning: move the reference towards the policy every N steps."""
    ref_model_mixup_alpha: float = 0.6
    """Share of the policy in that move."""
    replay_buffer_size: int = 0
    """Keep so many groups with differing rewards, and use them in place of groups that have none."""
    environment: str | None = None
    """Multi-turn: module.Class with reset(prompt, **columns) and step(text, ids) → (observation, reward,
    done)."""
    streaming_partial_batch: bool = False
    """Score a prompt's completions as soon as they are all there."""
    micro_batch_size: int = 8
    """Completions in one forward pass of one process."""
    steps_per_generation: int | None = None
    """Micro-batches of each process in one generation batch; unset: gradient_accumulation_steps."""
    num_iterations: int = 1
    """Passes over a generation batch."""
    eval_num_generations: int = 1
    """Completions of each held-out prompt, for pass@1 and pass@k."""
    eval_temperature: float | None = None
    """Of these completions; unset: temperature. 0 is greedy."""
    eval_greedy: bool = False
    """Evaluate one greedy completion of each held-out prompt too."""
    eval_success_reward: float = 1.0
    """A completion passes when its weighted reward reaches this."""

    not_here: ClassVar = {
        "sequence_len": "prompts and completions are bounded by max_prompt_length and max_completion_length",
        "excess_length_strategy": "prompts longer than max_prompt_length are left out",
        "sample_packing": "the completions of a micro-batch are packed anyway",
        "train_on_inputs": "what the policy wrote is trained and nothing else",
        "random_init": "train with sft.py first", "tokenizer_vocab_size": "train with sft.py first",
    }  # fmt: skip

    def __post_init__(self):
        check_every_part(self)
        replayed = self.rollout_engine == "replay"
        if not self.reward_funcs and not replayed and not self.environment:
            raise ConfigError(
                "reward_funcs", None, "must name at least one reward function, e.g. [exact_match]"
            )
        check_at_least_one(
            self, "num_iterations", "eval_num_generations", "steps_per_generation", "ref_model_sync_steps"
        )
        check_ranges(
            self, ("replay_buffer_size", 0, math.inf), ("ref_model_mixup_alpha", 0, 1),
            ("eval_temperature", 0, math.inf), ("eval_success_reward", -math.inf, math.inf),
        )  # fmt: skip
        if self.async_prefetch and self.environment:
            problem = "does not work with an environment; drop one of the two"
            raise ConfigError("async_prefetch", True, problem)
        if self.num_generations < 2 and not replayed:
            raise ConfigError(
                "num_generations", self.num_generations, "must be at least 2: a group is its own baseline"
            )
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ConfigError(
                "steps_per_generation", self.steps_per_generation,
                f"must be a multiple of gradient_accumulation_steps ({self.gradient_accumulation_steps})",
            )  # fmt: skip
        if self.lora_dropout:
            raise ConfigError(
                "lora_dropout", self.lora_dropout,
                "makes the trained policy another one than the one that samples: set it to 0 here",
            )  # fmt: skip


def generation_batch_size(config: Config, world_size: int) -> int:
    """Completions of one generation batch. ConfigError where groups would be torn."""
    assert config.steps_per_generation is not None
    size, n = config.micro_batch_size * world_size * config.steps_per_generation, config.num_generations
    if size % n:
        each = world_size * config.steps_per_generation
        fitting = [m for m in range(1, 8 * n + 1) if m * each % n == 0]
        near = sorted(fitting, key=lambda m: abs(m - config.micro_batch_size))[:3]
        raise ConfigError(
            "micro_batch_size", config.micro_batch_size,
            f"makes a generation batch of {size} completions (micro_batch_size · {world_size} processes · "
            f"{config.steps_per_generation} steps_per_generation), no multiple of num_generations ({n}); "
            f"these would do: {', '.join(str(m) for m in sorted(near))}",
        )  # fmt: skip
    return size


def weighted_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """rewards [B, R], NaN where a function does not apply, to [B]: their weighted sum; NaN where none
    applies."""
    total = (torch.nan_to_num(rewards, nan=0.0) * weights).sum(-1)
    return torch.where(torch.isnan(rewards).all(-1), torch.nan, total)


FLAT = 1e-8  # standard deviation below which the rewards of a group are the same


def spread(values: Tensor) -> float:
    """Unbiased standard deviation; exactly 0 of equal numbers."""
    return values.std().item() if len(values) > 1 and (values != values[0]).any() else 0.0


def group_advantages(rewards: Tensor, num_generations: int, scale: str) -> tuple[Tensor, dict[str, float]]:
    """rewards [B] of groups in a row, NaN on rows without one → advantages [B] and the metrics of the batch.

    A reward counts relative to its siblings (DeepSeekMath, §4.1.2), over their unbiased standard deviation +
    1e-4. Rows without a reward get 0 and stay out of every statistic. In a group that counts as flat in
    frac_reward_zero_std every advantage is exactly 0.
    """
    grouped = rewards.view(-1, num_generations)
    known = ~torch.isnan(grouped)
    count = known.sum(-1, keepdim=True)
    filled = torch.nan_to_num(grouped, nan=0.0)
    mean = filled.sum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(known, filled - mean, 0.0)
    group_std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    # A mean of equal numbers may miss them by a rounding: what counts as flat must have no advantage at all.
    highest = torch.where(known, grouped, mean).amax(-1, keepdim=True)
    flat = (group_std < FLAT) | ((grouped == highest) | ~known).all(-1, keepdim=True)
    centred, group_std = torch.where(flat, 0.0, centred), torch.where(flat, 0.0, group_std)
    present = rewards[~torch.isnan(rewards)]
    batch_std = spread(present)
    divisor = {"group": group_std + 1e-4, "batch": rewards.new_tensor(batch_std + 1e-4), "none": 1.0}
    groups = (count > 0).sum().clamp(min=1)
    metrics = {
        "reward": present.mean().item() if len(present) else 0.0,
        "reward_std": batch_std,
        "reward_std_within_group": (group_std.sum() / groups).item(),
        "frac_reward_zero_std": ((flat & (count > 0)).sum() / groups).item(),
    }
    return (centred / divisor[scale]).flatten(), metrics


def reward_metrics(rewards: Tensor, names: Sequence[str]) -> dict[str, float]:
    """rewards/<name>/mean and std over the rows where the function applied, without those that applied to
    none; rewards [B, R]."""
    found = {}
    for i, name in enumerate(names):
        column = rewards[:, i][~torch.isnan(rewards[:, i])]
        if len(column):
            found[f"rewards/{name}/mean"] = column.mean().item()
            found[f"rewards/{name}/std"] = spread(column)
    return found


def refuse_no_rewards(rewards: Tensor, names: Sequence[str]) -> None:
    """RewardError where no function applies to any completion [B, R] of the first batch: nothing would
    train."""
    applied = (~torch.isnan(rewards)).any(0).tolist()
    if not any(applied):
        raise RewardError(
            f"no reward function applies to any of the first {len(rewards)} completions ({', '.join(names)} "
            "returned None for all): nothing would be learnt; try them with `python grpo.py test-rewards`"
        )
    for name, some in zip(names, applied, strict=True):
        if not some:
            log.warning("reward %s applies to none of the first %d completions", name, len(rewards))


# ------------------------------------------------------------------------------------------------------------
# Prompts, samples, evaluation
# ------------------------------------------------------------------------------------------------------------


class Sampler:
    """Prompts to scored rollouts: engine, environment and reward functions together."""

    def __init__(
        self, engine: Engine, prompts: list[Prompt], config: Config, tokenizer: Tokenizer, world: World
    ):
        self.engine, self.prompts, self.config = engine, prompts, config
        self.tokenizer, self.world = tokenizer, world
        self.scorer = Scorer(config, tokenizer) if world.main else None
        self.environment = None
        if config.environment:
            self.environment = load_environment(config.environment, Path(config.config_directory))
        self.seconds = {"generate": 0.0, "reward": 0.0}
        self._early: dict[int, dict[str, Future]] = {}

    def _watch(self, prompts: list[Prompt]) -> Callable[[int, list[Completion]], None] | None:
        """streaming_partial_batch: score a group while others are still being sampled."""
        self._early = {}
        if not self.config.streaming_partial_batch or self.scorer is None:
            return None
        scorer, early = self.scorer, self._early

        def group_is_done(i: int, group: list[Completion]) -> None:
            early[i] = scorer.begin([prompts[i]] * len(group), [c.ids for c in group])

        return group_is_done

    def prefetch(self, indices: list[int], seed: tuple[int, ...]) -> None:
        assert isinstance(self.engine, VllmEngine)
        prompts = [self.prompts[i] for i in indices]
        ids = [p.ids for p in prompts]
        self.engine.prefetch(ids, self.config.num_generations, seed=seed, on_group=self._watch(prompts))

    def sample(
        self, indices: list[int], step: int, seed: tuple[int, ...], *, n: int | None = None,
        temperature: float | None = None, prefetched: bool = False,
    ) -> list[Rollout]:  # fmt: skip
        """Rollouts of these prompts with their rewards, n of each in a row, the same on every rank. A
        collective."""
        prompts, n = [self.prompts[i] for i in indices], n or self.config.num_generations
        seconds = dist.Timer()
        if self.environment is not None:
            rollouts = play(
                self.engine, self.environment, prompts, indices, n, step=step, seed=seed, options=self.config,
                tokenizer=self.tokenizer, world=self.world, temperature=temperature,
            )  # fmt: skip
        else:
            if prefetched:
                assert isinstance(self.engine, VllmEngine)
                groups = self.engine.collect(step)
            else:
                groups = self.engine.generate(
                    [p.ids for p in prompts], n, seed=seed, temperature=temperature,
                    on_group=self._watch(prompts) if temperature is None else None,
                )  # fmt: skip
            rollouts = as_rollouts(groups, prompts, indices, step, self.engine, self.tokenizer.stop_ids)
        self.seconds["generate"] += seconds()

        def score() -> list[dict[str, float | None]]:
            assert self.scorer is not None
            early, self._early = self._early, {}
            if len(early) == len(prompts):
                parts = [self.scorer.finish(early[i]) for i in range(len(prompts))]
                scores = {name: [x for part in parts for x in part[name]] for name in self.scorer.functions}
            else:
                each = [p for p in prompts for _ in range(n)]
                scores = self.scorer.finish(self.scorer.begin(each, [r.completion_ids for r in rollouts]))
            return [{name: scores[name][i] for name in scores} for i in range(len(rollouts))]

        for rollout, rewards in zip(rollouts, dist.from_main(score, self.world), strict=True):
            rollout.rewards |= rewards
        self.seconds["reward"] += seconds()
        return rollouts


def reward_table(rollouts: Sequence[Rollout], config: Config) -> tuple[Tensor, list[str], Tensor]:
    """(rewards [B, R] in fp64 with NaN where a function does not apply, their names, weights [R])."""
    weights = dict.fromkeys((name for r in rollouts for name in r.rewards), 1.0)
    if config.reward_weights is not None:
        weights |= {
            n.rpartition(".")[2] or n: w
            for n, w in zip(config.reward_funcs, config.reward_weights, strict=True)
        }
    names = list(weights)
    if not names:
        raise BallastError("no rollout has a reward: name reward_funcs, or record rewards with the rollouts")
    table = [
        [math.nan if r.rewards.get(n) is None else float(r.rewards[n] or 0.0) for n in names]
        for r in rollouts
    ]
    return torch.tensor(table, dtype=torch.float64), names, torch.tensor([weights[n] for n in names]).double()


def pass_at_k(right: int, n: int, k: int) -> float:
    """Chance that one of k draws without replacement from n completions, `right` of them right, is right
    (Codex, arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def evaluate(sampler: Sampler, step: int, config: Config) -> tuple[dict[str, float], list[Rollout]]:
    """Mean reward, pass@1 and pass@k on the held-out prompts; and the samples."""
    indices, n = list(range(len(sampler.prompts))), config.eval_num_generations
    temperature = config.temperature if config.eval_temperature is None else config.eval_temperature

    def scored(n: int, temperature: float) -> tuple[Tensor, list[Rollout]]:
        rollouts = sampler.sample(indices, step, (config.seed, -1, step), n=n, temperature=temperature)
        table, _, weights = reward_table(rollouts, config)
        return torch.nan_to_num(weighted_rewards(table, weights), nan=0.0).view(-1, n), rollouts

    rewards, rollouts = scored(n, temperature)
    right = (rewards >= config.eval_success_reward - 1e-9).sum(-1).tolist()
    metrics = {"eval/reward": rewards.mean().item()}
    for k in sorted({1, n}):
        metrics[f"eval/pass@{k}"] = sum(pass_at_k(r, n, k) for r in right) / len(right)
    metrics["eval/mean_length"] = completion_metrics(rollouts)["completions/mean_length"]
    if config.eval_greedy:
        greedy, _ = scored(1, 0.0)
        metrics["eval/greedy"] = (greedy >= config.eval_success_reward - 1e-9).double().mean().item()
    return metrics, rollouts


class ReplayBuffer:
    """Groups whose rewards differ, the newest first out, to stand in for groups that teach nothing."""

    def __init__(self, size: int):
        self.groups: deque[list[Rollout]] = deque(maxlen=size)

    def refill(self, rollouts: list[Rollout], n: int) -> tuple[list[Rollout], int]:
        """The batch with its flat groups replaced as far as there are others; and how many were."""
        groups = [rollouts[i : i + n] for i in range(0, len(rollouts), n)]
        fresh = [group for group in groups if any(r.advantage for r in group)]
        made, replaced = [], 0
        for group in groups:
            if not any(r.advantage for r in group) and self.groups:
                group = self.groups.pop()
                replaced += 1
            made += group
        self.groups.extend(fresh)
        return made, replaced


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    # 1. Set up.
    output_dir, directory = Path(config.output_dir), Path(config.config_directory)
    world = dist.init(config)
    start_log(output_dir, world.main)
    dist.seed_everything(config.seed, world.rank)
    interrupt = dist.Interrupt()
    batch_size, n = generation_batch_size(config, world.size), config.num_generations
    assert config.steps_per_generation is not None
    accumulation, mb = config.gradient_accumulation_steps, config.micro_batch_size
    slices = config.steps_per_generation // accumulation  # optimiser steps in one pass over a batch
    updates = slices * config.num_iterations  # optimiser steps in all that a batch is used for

    # 2. Prompts.
    checkpoint = dist.main_first(
        lambda: resolve_checkpoint(config.base_model, config.base_model_revision, directory), world
    )
    arch = read_architecture(checkpoint, config.ignore_config_fields)
    tokenizer = load_tokenizer(checkpoint, config, directory)
    prompts: list[Prompt] = []
    held_out: list[Prompt] = []
    replay, data = None, ""
    if config.rollout_engine == "replay":
        assert config.replay_path is not None
        replay = ReplayEngine(config.replay_path, directory, config, tokenizer)
        batches = len(replay.rollouts) // batch_size
        data = replay.fingerprint
        if not batches:
            raise ConfigError(
                "replay_path",
                config.replay_path,
                f"holds {len(replay.rollouts)} rollouts, a batch takes {batch_size}",
            )
        order = PromptOrder([0], 1, config.seed)
    if config.datasets and (replay is None or config.val_set_size):
        prompts, data = read_prompts(config.datasets, tokenizer, config, directory, config.max_prompt_length)
    if config.val_set_size:
        train_rows, held_rows = split_held_out(len(prompts), config.val_set_size, config.seed)
        prompts, held_out = [prompts[i] for i in train_rows], [prompts[i] for i in held_rows]
    if config.test_datasets:
        held_out, _ = read_prompts(
            config.test_datasets, tokenizer, config, directory, config.max_prompt_length
        )
    if replay is None:
        source, weights = [prompt.source for prompt in prompts], weights_of(config.datasets)
        order, data = PromptOrder(source, batch_size // n, config.seed, weights), with_weights(data, weights)
        batches = (
            math.ceil(config.max_steps / updates) if config.max_steps else order.batches(config.num_epochs)
        )
    total_steps = min(batches * updates, config.max_steps or batches * updates)
    dist.check_schedule(config, total_steps)
    settle_intervals(config, total_steps, updates * (order.batches(1.0) if replay is None else batches))
    checkpointer = Checkpointer(output_dir / "checkpoints", world, config)
    identity = run_identity(config, batch_size, data)
    resume_from, saved = checkpointer.to_resume(identity)

    # 3. Model, optimiser, reference, engine.
    rows = max(arch.vocab_size, tokenizer.vocab_size)
    arch = resized(arch, rows, config.pad_vocab_to_multiple_of)
    model = building.build_model(arch, checkpoint, config, world, new_tokens=tokenizer.new_ids)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = dist.make_optimizers(model, config)
    reference = None  # LoRA: the model itself with its adapters off, no second copy
    if config.beta and not config.adapter:
        moves = config.ref_model_sync_steps is not None  # by less than bf16 could hold
        reference = building.build_model(arch, checkpoint, config, world, frozen=not moves)
        reference.eval().requires_grad_(False)
    share = can_share_prompts(model, config.share_prompts)
    aux_coef = (
        arch.router_aux_loss_coef if config.router_aux_loss_coef is None else config.router_aux_loss_coef
    )
    log.info(
        "%s: %s parameters, %s trained; %s prompts, %s held out; %d steps of %d completions on %s, "
        "%s rollouts",
        arch.name, f"{model.count_parameters():,}", f"{sum(p.numel() for p in trained):,}",
        f"{len(prompts):,}" if replay is None else "recorded", f"{len(held_out):,}", total_steps,
        batch_size // slices, world.devices(config), config.rollout_engine,
    )  # fmt: skip

    report_kl(config)

    # 4. Resume.
    moving = {"reference": reference} if reference is not None and config.ref_model_sync_steps else {}
    state: dict[str, Any] = {"num_tokens": 0, "eval_before": None, "identity": identity}
    step = 0
    buffer = ReplayBuffer(config.replay_buffer_size)
    rollouts: list[Rollout] = []  # the generation batch in use
    ahead: list[Rollout] | None = None  # the next one, where it was prefetched before a checkpoint
    if resume_from is not None:
        step, state = saved["step"], {**saved, "identity": identity}
        checkpointer.load(resume_from, model, optimizers, config.seed, moving)
        rollouts = [Rollout(**r) for r in state.pop("rollouts")]
        ahead = None if state["ahead"] is None else [Rollout(**r) for r in state["ahead"]]
        buffer.groups.extend([[Rollout(**r) for r in group] for group in state.pop("buffer")])
        state.pop("ahead")
    logger = MetricLogger(config, output_dir, main=world.main, first_step=step, total_steps=total_steps)
    engine = make_engine(model, config, tokenizer, world, prompts)
    sampler = Sampler(engine, prompts, config, tokenizer, world)
    judge = Sampler(engine, held_out, config, tokenizer, world) if held_out else None
    watch = Forensics(model, config, world, tokenizer)

    def evaluated(step: int) -> dict[str, float]:
        assert judge is not None
        engine.sync(step, due=True)
        metrics, samples = evaluate(judge, step, config)
        if world.main:
            write_rollouts(output_dir / "rollouts", step, samples, tokenizer, kind="eval")
        return metrics

    def micro_batches(rollouts: list[Rollout]) -> list[list[Rollout]]:
        """This rank's share of some rollouts, cut into micro-batches."""
        return [
            rollouts[begin : begin + mb] for begin in range(world.rank * mb, len(rollouts), world.size * mb)
        ]

    pending = False  # whether the next batch is being prefetched

    def fetch(generation: int, step: int) -> list[Rollout]:
        """The rollouts of a generation batch, scored."""
        if replay is not None:
            return replay.batch(generation, batch_size)
        return sampler.sample(order.batch(generation), step, (config.seed, generation), prefetched=pending)

    # 5. The loop.
    try:
        if judge is not None and state["eval_before"] is None:
            state["eval_before"] = evaluated(step)
            logger.log(step, state["eval_before"])
        while step < total_steps:
            raced = dist.begin_step(step + 1, world)
            generation, used = divmod(step, updates)
            seconds = dist.Timer()
            took = {"sync": 0.0, "logprob": 0.0, "train": 0.0}
            sync_metrics: dict[str, float] = {}
            sampler.seconds = {"generate": 0.0, "reward": 0.0}
            if used == 0:
                # a. Roll out: num_generations completions of each prompt, scored. Token ids, never text.
                if not pending and ahead is None and replay is None:
                    sync_metrics = engine.sync(step)
                    took["sync"] += seconds()
                rollouts = ahead if ahead is not None else fetch(generation, step)
                ahead, pending = None, False
                seconds()
                if config.async_prefetch and step + updates < total_steps:
                    sync_metrics = engine.sync(step) or sync_metrics
                    took["sync"] += seconds()
                    sampler.prefetch(order.batch(generation + 1), (config.seed, generation + 1))
                    pending = True

                # b. Advantages: a completion is good only relative to its siblings.
                table, names, weights = reward_table(rollouts, config)
                if generation == 0:
                    refuse_no_rewards(table, names)
                advantages, batch_metrics = group_advantages(
                    weighted_rewards(table, weights), n, config.scale_rewards
                )
                for rollout, advantage in zip(rollouts, advantages.tolist(), strict=True):
                    rollout.advantage = advantage
                batch_metrics |= reward_metrics(table, names) | completion_metrics(rollouts)
                batch_metrics["weight_version_lag"] = float(step - min(r.weight_version for r in rollouts))
                state["num_tokens"] += sum(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)
                if world.main:
                    write_rollouts(output_dir / "rollouts", step, rollouts, tokenizer)
                shown = rollouts
                if config.replay_buffer_size:
                    rollouts, replaced = buffer.refill(rollouts, n)
                    batch_metrics["replayed_groups"] = float(replaced)
                state["batch_metrics"] = batch_metrics  # every step that uses the batch reports them

                check_sampler(engine, model, rollouts, micro_batches(rollouts), config, world, share)

                # c. π_old of the whole batch, before the first update moves the weights it is of; and π_ref.
                keep_logprobs(
                    model, reference, micro_batches(rollouts), config, world, share, old=updates > 1,
                    kl=measures_kl(config, step, updates),
                )  # fmt: skip
                took["logprob"] += seconds()

            # The rows of this optimiser step, and this rank's micro-batches. Groups stay together: prompts
            # came in random order already, and a micro-batch of a flat group can be skipped.
            begin = (used % slices) * accumulation * world.size * mb
            in_step = rollouts[begin : begin + accumulation * world.size * mb]
            micro = micro_batches(in_step)

            # d. Loss and backward, over this rank's micro-batches: policy_loss in policy.py.
            bonus = entropy_bonus(config, state.get("entropy", 0.0))
            with monitor.profiled(step + 1, config, output_dir, world.rank, world.device):
                tally, losses, skipped = accumulate_gradients(
                    model, in_step, micro, config, world, share, watch, step=step + 1, reused=updates > 1,
                    bonus=bonus,
                    aux_coef=aux_coef,
                )  # fmt: skip

                # e. The norm before clipping; nothing that is not finite may reach the weights. A step
                # without any signal leaves the optimiser alone: its momentum would move the weights on
                # nothing.
                norm, with_gradient = dist.gradient_norm(trained)
                rate = dist.learning_rate(step, config, total_steps)
                if losses and watch.healthy(step + 1, losses, norm):
                    dist.clip_gradients(with_gradient, config.max_grad_norm, norm)
                    rate = dist.update(optimizers, rate)
            step += 1
            took["train"] += seconds()
            if (
                reference is not None
                and config.ref_model_sync_steps
                and step % config.ref_model_sync_steps == 0
            ):
                dist.mix_weights(reference, model, config.ref_model_mixup_alpha)

            # f. Metrics over the whole step, on all ranks alike.
            tally.mean("loss", sum(loss.item() for loss in losses), 1.0 / world.size)
            policy_metrics = tally.result(world)
            state["entropy"] = policy_metrics.get("entropy", state.get("entropy", 0.0))
            took |= sampler.seconds
            metrics: dict[str, float] = {
                **state["batch_metrics"], **policy_metrics,
                "grad_norm": norm.item(), "learning_rate": rate, "num_tokens": state["num_tokens"],
                "skipped_micro_batches": float(skipped), "entropy_coef": bonus,
                "epoch": order.size * (generation + 1) / order.epoch_size if replay is None else 0.0,
                "step_time": sum(took.values()), **{f"step_time/{k}": v for k, v in took.items()},
                **sync_metrics, **watch.metrics(), **memory.peak_memory(world.device), **raced,
            }  # fmt: skip
            logger.advance()
            stopping = logger.stopping(interrupt.signal, step, world)
            evaluating = judge is not None and (
                step == total_steps or (config.eval_steps is not None and step % config.eval_steps == 0)
            )
            saving = config.save_steps is not None and (step % config.save_steps == 0 or step == total_steps)
            # What is under way was sampled from the old weights
            if pending and (evaluating or saving or stopping):
                ahead, pending = fetch(generation + 1, step), False
            if evaluating:
                metrics |= evaluated(step)
                state["eval_after"] = {k: v for k, v in metrics.items() if k.startswith("eval/")}
            logger.observe(step, metrics)
            if step % config.logging_steps == 0 or step == total_steps or evaluating:
                logger.log(step, metrics)
                if config.log_completions and used == 0:
                    show_completions(shown, tokenizer, logger, step)
            if saving or stopping:
                # The servers get the weights of the checkpoint, so that a resumed run samples from the same.
                engine.sync(step, due=True)
                save(checkpointer, step, model, optimizers, state, rollouts, ahead, buffer, moving, world)
            if stopping and step < total_steps:
                checkpointer.finish()
                logger.stopped(step, world)
                return
    except EngineError as error:
        # Nothing of the run is lost to a server: what was trained so far is saved before the run ends.
        if step > (checkpointer.steps() or [0])[-1]:
            save(checkpointer, step, model, optimizers, state, rollouts, ahead, buffer, moving, world)
            checkpointer.finish()
            raise EngineError(f"{error}; step {step} is saved, the same command goes on from it") from None
        raise
    checkpointer.finish()

    # 6. Final save and report.
    final = save_final(model, tokenizer, config, world)
    logger.close()
    if judge is not None:
        monitor.report_evaluation(state["eval_before"], state.get("eval_after", state["eval_before"]))
    monitor.say_saved(final)
    dist.finish()


def save(
    checkpointer: Checkpointer, step: int, model: Any, optimizers: list, state: dict, rollouts: list[Rollout],
    ahead: list[Rollout] | None, buffer: ReplayBuffer, moving: dict[str, Any], world: World,
) -> None:  # fmt: skip
    """A checkpoint with what the loop holds besides weights: the batch in use with its π_old and π_ref, a
    prefetched batch, the replay buffer. A collective."""
    stored = {
        i: (r.old_logprobs, r.ref_logprobs, r.entropies)
        for i, r in enumerate(rollouts) if r.old_logprobs or r.ref_logprobs
    }  # fmt: skip
    for part in dist.gather(stored, world):
        for i, (old, ref, entropies) in part.items():
            rollouts[i].old_logprobs, rollouts[i].ref_logprobs, rollouts[i].entropies = old, ref, entropies
    checkpointer.save(step, model, optimizers, {
        **state, "rollouts": [vars(r) for r in rollouts],
        "ahead": None if ahead is None else [vars(r) for r in ahead],
        "buffer": [[vars(r) for r in group] for group in buffer.groups],
    }, moving)  # fmt: skip


def show_completions(rollouts: list[Rollout], tokenizer: Tokenizer, logger: MetricLogger, step: int) -> None:
    """log_completions: a few on the console, all of them to wandb (JSONL always has them)."""

    def short(ids: list[int], width: int) -> str:
        text = " ".join(tokenizer.decode(ids, special=True).split())
        return text if len(text) <= width else "…" + text[1 - width :]

    for r in rollouts[:4]:
        rewards = "  ".join(f"{k} {'—' if v is None else f'{v:g}'}" for k, v in r.rewards.items())
        log.info(
            "  %s → %s   [%s  advantage %+.2f]",
            short(r.prompt_ids, 48),
            short(r.completion_ids, 60),
            rewards,
            r.advantage,
        )
    if logger.main and logger.wandb is not None:
        import wandb  # a run without it does not wait for it

        names = list(rollouts[0].rewards)
        table = wandb.Table(columns=["step", "prompt", "completion", *names, "advantage"])
        for r in rollouts:
            table.add_data(
                step, tokenizer.decode(r.prompt_ids, special=True),
                tokenizer.decode(r.completion_ids, special=True),
                *[r.rewards.get(name) for name in names], r.advantage,
            )  # fmt: skip
        logger.wandb.log({"completions": table}, step=step)


def run_identity(config: Config, batch_size: int, data: str) -> dict:
    """What a checkpoint of this run can go on with."""
    keys = ("base_model", "adapter", "load_in_4bit", "load_in_8bit", "fp8", "fp8_frozen", "lora_r",
            "lora_target_modules", "optimizer", "seed", "num_generations", "num_iterations",
            "gradient_accumulation_steps", "steps_per_generation", "val_set_size",
            "rollout_engine")  # fmt: skip
    values = asdict(config)
    return {
        **{key: values[key] for key in keys},
        "completions of a generation batch": batch_size,
        "data": data,
    }


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


def test_rewards(argv: list[str]) -> int:
    """Score sample completions outside training, and show what the functions get."""
    config = parse_config(TestConfig, argv, description="Score sample completions outside training.")
    log.addHandler(_Console(20))
    log.setLevel(20)
    directory = Path(config.config_directory)
    checkpoint = resolve_checkpoint(config.base_model, config.base_model_revision, directory)
    tokenizer = load_tokenizer(checkpoint, config, directory)
    prompts, _ = read_prompts(config.datasets, tokenizer, config, directory, config.max_prompt_length)
    prompts = prompts[: config.rows]
    scorer = Scorer(config, tokenizer)
    if config.completions:
        prompts = [prompts[i % len(prompts)] for i in range(len(config.completions))]
        ids = [tokenizer.encode(text) for text in config.completions]
    elif config.source == "generate":
        model = load_pretrained(str(checkpoint), dtype=torch.float32)
        engine = EmbeddedEngine(model, config, tokenizer, World(0, 1, 0, torch.device("cpu")))
        ids = [g[0].ids for g in engine.generate([p.ids for p in prompts], 1, seed=(config.seed,))]
    else:
        missing = next((p.name for p in prompts if "answer" not in p.columns), None)
        if missing:
            raise ConfigError(
                "source", "answer", f"needs a reference answer, {missing} has none; use source=generate"
            )
        ids = [tokenizer.encode(str(p.columns["answer"])) for p in prompts]
    arguments = scorer.arguments(prompts, ids)
    print("columns that a reward function gets, from the first row:")
    for name, values in arguments.items():
        shown = json.dumps(values[0], ensure_ascii=False, default=str)
        print(f"  {name:<16} {shown if len(shown) < 90 else shown[:90] + ' …'}")
    scores = scorer.finish(scorer.begin(prompts, ids))
    print(f"\nscores of {len(ids)} completions:")
    for i, tokens in enumerate(ids):
        values = "  ".join(
            f"{name} {'—' if s[i] is None else format(s[i], 'g')}" for name, s in scores.items()
        )
        print(f"  {prompts[i].name}  {tokenizer.decode(tokens)[:60]!r}  {values}")
    for name, values in scores.items():
        if len({v for v in values}) == 1 and not config.completions:
            print(f"note: {name} gave every completion the same score, {values[0]}")
    return 0


def serve(argv: list[str]) -> None:
    """Start the vLLM server that a config needs, in this process's place."""
    config = parse_config(Config, argv, description="Start the vLLM server that a config needs.")
    try:
        place = Path(config.config_directory)
        model = resolve_checkpoint(config.base_model, config.base_model_revision, place).resolve()
    except BallastError as error:
        raise ConfigError("base_model", config.base_model, f"cannot be served: {error}") from None
    for url in config.vllm_server_base_url[1:]:
        print(f"# another terminal: python grpo.py serve … 'vllm_server_base_url=[{url}]'")
    environment, command = server_command(config, str(model), config.vllm_server_base_url[0])
    host = urlparse(config.vllm_server_base_url[0]).hostname
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"warning: {host} can be reached from other machines, and the routes that replace weights and "
            "run methods in the server have no password: whoever reaches this port owns the process; open "
            "it to the trainer's host alone (a firewall, a private network, an SSH tunnel)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    print(" ".join([*(f"{k}={v}" for k, v in environment.items()), *command]), flush=True)
    if config.vllm_python is None and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vllm_python", None, f"is unset, and {sys.executable} has no vLLM: `pip install 'vllm==0.32.*'` "
            "into it or into a venv of its own, and set vllm_python to that one's Python",
        )  # fmt: skip
    try:
        os.execvpe(command[0], command, {**os.environ, **environment})  # noqa: S606
    except OSError as error:
        raise ConfigError("vllm_python", command[0], f"cannot be started ({error.strerror})") from None


def cli() -> None:
    """torchrun grpo.py, or ballast-grpo where the package is installed."""
    if sys.argv[1:2] == ["test-rewards"]:
        run(lambda argv: sys.exit(test_rewards(argv)), lambda: sys.argv[2:])
    elif sys.argv[1:2] == ["serve"]:
        run(serve, lambda: sys.argv[2:])
    else:
        run(
            main, lambda: parse_config(Config, description=" ".join((__doc__ or "").split("\n\n")[0].split()))
        )


if __name__ == "__main__":
    cli()
