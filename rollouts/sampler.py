"""From prompts to scored rollouts, the queue of a run's batches, what stands in for groups without a signal,
and the evaluation on held-out prompts."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dist
from dist import World
from rollouts import policy
from rollouts.advantages import in_groups, rewarded_steps
from rollouts.environments import EnvironmentOptions, Episode, conversations, load_environment, play, played
from rollouts.prompts import PromptData
from rollouts.queues import Group, RolloutQueue, Stream, StreamOptions, StreamQueue
from rollouts.records import Recorder, kept
from rollouts.rewards import Scorer, reward_table, weighted_rewards, weights_by_name
from rollouts.rollout import Engine, Rollout
from rollouts.signs import ScoreChecks
from rollouts.tokens import as_ids
from rollouts.tools import ToolBox
from rollouts.vllm_server import Completion
from run.config import check_at_least_one, check_ranges
from text.prompt import Prompt
from text.tokenizer import Tokenizer

SEQUENCES_PER_SERVER = 512  # that a stream asks for at the same time


@dataclass
class SamplerOptions(EnvironmentOptions, StreamOptions):
    replay_buffer_size: int = 0
    """Keep the last N groups with differing rewards, and use them in place of flat groups."""
    dynamic_sampling: int = 0
    """Rounds of sampling in which groups without a signal are replaced by groups of fresh prompts (DAPO,
    arXiv 2503.14476, §3.2); 0: none."""
    streaming_partial_batch: bool = False
    """Score a prompt's completions as soon as all of them are sampled."""
    eval_num_generations: int = 1
    """Completions of each held-out prompt, for pass@1 and pass@k."""
    eval_temperature: float | None = None
    """Temperature of these completions; unset: `temperature`. 0 is greedy."""
    eval_greedy: bool = False
    """Evaluate one greedy completion of each held-out prompt too."""
    eval_success_reward: float = 1.0
    """A completion passes when its weighted reward reaches this."""

    def check(self) -> None:
        check_at_least_one(self, "eval_num_generations")
        check_ranges(
            self, ("replay_buffer_size", 0, math.inf), ("dynamic_sampling", 0, 100),
            ("eval_temperature", 0, math.inf), ("eval_success_reward", -math.inf, math.inf),
        )


def as_rollouts(
    groups: list[list[Completion]], prompts: Sequence[Prompt], indices: Sequence[int], step: int,
    engine: Engine, stop_ids: Sequence[int],
) -> list[Rollout]:
    """One rollout per completion; those of a prompt are adjacent."""
    stops, rollouts = set(stop_ids), []
    for prompt, index, group in zip(prompts, indices, groups, strict=True):
        prompt_ids = as_ids(prompt.ids)  # one array for the group
        for c in group:
            rollouts.append(
                Rollout(
                    prompt_ids, c.ids, c.logprobs, truncated=int(c.ids[-1]) not in stops, step=step,
                    weight_version=engine.version(step), row=prompt.name, prompt_index=index,
                )
            )
    return rollouts


class Sampler:
    """Turns prompts into scored rollouts, with engine, environment and reward functions."""

    def __init__(
        self, engine: Engine, prompts: list[Prompt], config: Any, tokenizer: Tokenizer, world: World
    ):
        self.prompts, self.config = prompts, config
        self.engine: Any = engine
        self.tokenizer, self.world = tokenizer, world
        self.scorer = Scorer(config, tokenizer) if world.main else None
        self.score_checks = ScoreChecks(self.scorer) if self.scorer is not None and config.health else None
        self.environment = None
        directory = Path(config.config_directory)
        if config.environment:
            self.environment = load_environment(config.environment, directory)
        elif config.tools:
            self.environment = ToolBox(config.tools, directory).environment(tokenizer, config.tool_timeout)
        self.weights = weights_by_name(config)
        self.seconds = {"generate": 0.0, "reward": 0.0}
        self.signs: dict[str, float] = {}  # what scoring the last batch showed
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
        prompts, n = [self.prompts[i] for i in indices], self.config.num_generations
        if self.environment is not None:
            tasks = conversations(self.environment, prompts, n, seed, self.config, self.tokenizer)
            return self.engine.prefetch(self.engine.conversations_of(tasks))
        ids = [p.ids for p in prompts]
        self.engine.prefetch(self.engine.completions_of(ids, n, seed=seed, on_group=self._watch(prompts)))

    def sample(
        self, indices: list[int], step: int, seed: tuple[int, ...], *, n: int | None = None,
        temperature: float | None = None, prefetched: bool = False,
    ) -> list[Rollout]:
        """n adjacent rollouts of each of these prompts, with rewards, the same on every rank. A
        collective."""
        prompts = [self.prompts[i] for i in indices]
        count: int = n or self.config.num_generations
        seconds = dist.Timer()
        if self.environment is not None and prefetched:
            rollouts = played(self.engine.collect(step), prompts, indices, count, step, self.engine)
        elif self.environment is not None:
            rollouts = play(
                self.engine, self.environment, prompts, indices, count, step=step, seed=seed,
                options=self.config, tokenizer=self.tokenizer, world=self.world, temperature=temperature,
            )
        else:
            if prefetched:
                groups = self.engine.collect(step)
            else:
                groups = self.engine.generate(
                    [p.ids for p in prompts], count, seed=seed, temperature=temperature,
                    on_group=self._watch(prompts) if temperature is None else None,
                )
            rollouts = as_rollouts(groups, prompts, indices, step, self.engine, self.tokenizer.stop_ids)
        self.seconds["generate"] += seconds()
        begun, self._early = [one for _, one in sorted(self._early.items())], {}
        checks = self.score_checks if temperature is None and self.environment is None else None
        return self._scored(rollouts, prompts, begun, checks, seed[1])

    def _scored(
        self, rollouts: list[Rollout], prompts: list[Prompt], begun: Sequence[dict[str, Future] | None],
        checks: ScoreChecks | None, generation: int,
    ) -> list[Rollout]:
        """The rollouts, those of a prompt adjacent, with rewards; `begun`: the scores that were begun before,
        by prompt. A collective."""
        count, seconds = len(rollouts) // len(prompts), dist.Timer()

        def score() -> tuple[list[dict[str, float | None]], dict[str, float]]:
            assert self.scorer is not None
            each = [p for p in prompts for _ in range(count)]
            if len(begun) == len(prompts):
                parts = [self.scorer.finish(one) for one in begun if one is not None]
                scores = {name: [x for part in parts for x in part[name]] for name in self.scorer.functions}
            else:
                ids, messages = [r.completion_ids for r in rollouts], [r.messages for r in rollouts]
                scores = self.scorer.finish(self.scorer.begin(each, ids, messages))
            rewards = [{name: scores[name][i] for name in scores} for i in range(len(rollouts))]
            found = checks.metrics(generation + 1, each, rollouts, rewards) if checks else {}
            return rewards, found | self.scorer.metrics()

        rewards_of, self.signs = dist.from_main(score, self.world)
        for rollout, rewards in zip(rollouts, rewards_of, strict=True):
            rollout.rewards |= dict.fromkeys(rewards) if rollout.failed else rewards
            if self.config.advantage_level == "step" and not rollout.failed:
                rewarded_steps(rollout, self.weights)
        if self.environment is not None:
            turns = sum(0 if r.step_ends is None else len(r.step_ends) for r in rollouts)
            self.signs = self.signs | {
                "environment/turns": turns / len(rollouts),
                "environment/timeouts": float(sum(r.failed for r in rollouts)),
            }
        self.seconds["reward"] += seconds()
        return rollouts

    def replace_flat(
        self, rollouts: list[Rollout], fresh: Callable[[int, int, set[int]], list[Rollout]]
    ) -> list[Rollout]:
        """Dynamic sampling: groups whose rewards are all the same give way to those that `fresh(round, how
        many, prompts in the batch)` samples, as long as rounds are left. A collective."""
        n, first_signs = self.config.num_generations, self.signs
        groups, replaced, rounds = groups_of(rollouts, n), 0, 0
        rewards, flat = self._judge(rollouts)
        share = sum(flat) / len(flat)
        for rounds in range(1, self.config.dynamic_sampling + 1):
            empty = [k for k, is_flat in enumerate(flat) if is_flat]
            here = {group[0].prompt_index for group in groups}
            more = fresh(rounds, len(empty), here) if empty else []
            if not more:
                rounds -= 1
                break
            good = [g for g, bad in zip(groups_of(more, n), self._judge(more)[1], strict=True) if not bad]
            for k, group in zip(empty, good, strict=False):
                groups[k], flat[k] = group, False
                replaced += 1
        known = rewards[~torch.isnan(rewards)]
        self.signs = first_signs | {
            "dynamic_sampling/flat_before": share, "dynamic_sampling/replaced_groups": float(replaced),
            "dynamic_sampling/rounds": float(rounds),
            "dynamic_sampling/reward_before": known.mean().item() if len(known) else 0.0,
        }
        return [rollout for group in groups for rollout in group]

    def fresh(
        self, prompts: PromptData, generation: int, step: int
    ) -> Callable[[int, int, set[int]], list[Rollout]]:
        """Samples other prompts than those of a batch; which is a function of the seed, the batch and the
        round."""

        def sample(round: int, count: int, here: set[int]) -> list[Rollout]:
            later = prompts.order.batch(round * prompts.batches + generation)
            chosen = [i for i in later if i not in here][:count]
            return self.sample(chosen, step, (self.config.seed, generation, round)) if chosen else []

        return sample

    def _judge(self, rollouts: list[Rollout]) -> tuple[Tensor, list[bool]]:
        """(the weighted reward of each, NaN without one; which groups are flat)."""
        table, _, weights = reward_table(rollouts, self.config)
        rewards = weighted_rewards(table, weights)
        return rewards, in_groups(rewards, self.config.num_generations)[2].flatten().tolist()

    def queue(self, prompts: PromptData, batch_size: int, updates: int, run: Any) -> RolloutQueue:
        """The generation batches of a run, each for `updates` optimiser steps; it begins with what the
        checkpoint kept that the run goes on from."""
        order, seed, config = prompts.order, self.config.seed, self.config
        ahead, state = kept(run.resume_from, "ahead", run.state), run.state.get("queue")
        if config.max_staleness:
            taken = -(-run.step // updates)  # batches until now
            state = state or {"following": taken * order.size, "done": [], "begun": []}
            return self._stream(prompts, batch_size, updates, ahead, state)
        if state:  # of a stream: its groups are no batch
            ahead = []

        def sample(generation: int, step: int, prefetched: bool) -> list[Rollout]:
            if prompts.replay is not None:
                return prompts.replay.batch(generation, batch_size)
            rollouts = self.sample(order.batch(generation), step, (seed, generation), prefetched=prefetched)
            if config.dynamic_sampling:
                rollouts = self.replace_flat(rollouts, self.fresh(prompts, generation, step))
            return rollouts

        def prefetch(generation: int) -> None:
            self.prefetch(order.batch(generation), (seed, generation))

        return RolloutQueue(
            self.engine, sample, prefetch, asynchronous=config.async_prefetch, prefetched=ahead or None
        )

    def _stream(
        self, prompts: PromptData, batch_size: int, updates: int, ahead: list[Rollout], state: dict[str, Any]
    ) -> StreamQueue:
        config, n, order = self.config, self.config.num_generations, prompts.order
        rows = batch_size * (1 + config.max_staleness // updates)
        most = SEQUENCES_PER_SERVER * len(config.vllm_server_base_url)

        def task(group: Group, k: int) -> Callable[..., dict[str, Any]]:
            prompt, seed = self.prompts[group.index], (config.seed, group.number, k)
            if self.environment is not None:
                episode = Episode(self.environment, prompt, config, self.tokenizer)
                return lambda ask: episode.talk(ask, seed, None).told()
            return lambda ask: _fields(
                prompt, ask(prompt.ids, 1, config.max_completion_length, None, seed)[0],
                self.tokenizer.stop_ids,
            )

        def score(group: Group) -> dict[str, Future]:
            assert self.scorer is not None
            made = [group.made[k] for k in range(n)]
            ids, messages = [m["completion_ids"] for m in made], [m.get("messages") for m in made]
            return self.scorer.begin([self.prompts[group.index]] * n, ids, messages)

        def rolled_out(groups: Sequence[Group], step: int, waited: float) -> list[Rollout]:
            self.seconds["generate"] += waited
            asked = [self.prompts[g.index] for g in groups]
            rollouts = [r for g, p in zip(groups, asked, strict=True) for r in g.rollouts(p, step)]
            checks = self.score_checks if self.environment is None else None
            return self._scored(rollouts, asked, [g.scores for g in groups], checks, step // updates)

        stream = None
        if self.world.main:
            stream = Stream(
                self.engine, lambda number: order.batch(number // order.size)[number % order.size], n, task,
                score, batch=order.size, updates=updates, staleness=config.max_staleness,
                batches=prompts.batches, workers=min(rows, config.environment_workers) if self.environment
                else min(rows, most),
            )
            stream.restore(ahead, state)
        flat = self.replace_flat if config.dynamic_sampling else None
        return StreamQueue(
            self.engine, stream, rolled_out, flat, self.world, order.size, prompts.batches
        )


def _fields(prompt: Prompt, completion: Completion, stop_ids: Sequence[int]) -> dict[str, Any]:
    """The fields of a rollout that one completion settles."""
    return {
        "prompt_ids": as_ids(prompt.ids), "completion_ids": completion.ids,
        "sampling_logprobs": completion.logprobs, "truncated": int(completion.ids[-1]) not in stop_ids,
        "token_versions": completion.versions,
    }


def groups_of(rollouts: list[Rollout], n: int) -> list[list[Rollout]]:
    return [rollouts[i : i + n] for i in range(0, len(rollouts), n)]


class ReplayBuffer:
    """Groups with differing rewards, newest out first, to replace flat groups, which have no signal."""

    def __init__(self, size: int):
        self.groups: deque[list[Rollout]] = deque(maxlen=size)

    def refill(self, rollouts: list[Rollout], n: int) -> tuple[list[Rollout], int]:
        """The batch with flat groups replaced while the buffer lasts, and the number replaced."""
        groups = groups_of(rollouts, n)
        fresh = [group for group in groups if any(r.signal for r in group)]
        refilled, replaced = [], 0
        for group in groups:
            if not any(r.signal for r in group) and self.groups:
                group = self.groups.pop()
                replaced += 1
            refilled += group
        self.groups.extend(fresh)
        return refilled, replaced


def pass_at_k(right: int, n: int, k: int) -> float:
    """Chance that one of k draws without replacement from n completions, `right` of them right, is right
    (Codex, arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def evaluate(sampler: Sampler, run: Any, recorder: Recorder) -> dict[str, float]:
    """Mean reward, pass@1 and pass@k on the held-out prompts. A collective."""
    config, step = run.config, run.step
    sampler.engine.sync(step, due=True)
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
    metrics["eval/mean_length"] = policy.completion_metrics(rollouts)["completions/mean_length"]
    if config.eval_greedy:
        greedy, _ = scored(1, 0.0)
        metrics["eval/greedy"] = (greedy >= config.eval_success_reward - 1e-9).double().mean().item()
    sampler.engine.rest()
    recorder.write(step, rollouts, kind="eval")
    return metrics
