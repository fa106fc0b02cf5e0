"""Rollouts: from prompts to completions with the log-probabilities of the sampled tokens.

Three engines make them. Embedded: our own `generate`, in this process, on policy by construction. vLLM: one
or several servers over HTTP, token ids in and out, which get the trainer's weights every vllm_sync_interval
steps; after each sync a probe is scored on both sides, since HTTP 200 does not prove that the weights were
loaded. Replay: a file that an earlier run, or another program, wrote.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

import dist
from data import Prompt
from dist import Timer, World
from health import memory
from model import Transformer
from rollouts.generation import generate
from rollouts.rollout import Engine, Rollout
from rollouts.tokens import as_ids, as_logprobs
from rollouts.vllm_client import VllmEngine
from rollouts.vllm_server import Completion
from run.log import log
from text.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------------------
# Embedded
# ------------------------------------------------------------------------------------------------------------


class EmbeddedEngine:
    """Our own `generate`: prompts are split over ranks, finished sequences leave the batch, a prompt's
    prefill serves all of its completions. Always on policy: it samples from the very weights that are
    trained."""

    def __init__(self, model: Transformer, options: Any, tokenizer: Tokenizer, world: World):
        self.model, self.options, self.world = model, options, world
        self.stop_ids = tokenizer.stop_ids
        self._left: float | None = None  # bytes left for sampling, once known
        self._fewest = memory.MOST_ROWS

    def generate(
        self, prompts: list[list[int]], n: int, *, seed: tuple[int, ...], temperature: float | None = None,
        limits: list[int] | None = None, on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """`n` completions of each prompt, the same on every rank. `limits`: maximum number of tokens for each
        prompt. A collective; `on_group(prompt, completions)` is called on rank 0."""
        world = self.world
        limits = limits or [self.options.max_completion_length] * len(prompts)
        own_prompts = list(range(world.rank, len(prompts), world.size))
        at_once = max(1, self._rows(max(map(len, prompts)) + max(limits)) // n)
        most = math.ceil(len(prompts) / world.size)
        rounds = math.ceil(most / at_once)  # the same number on every rank: each is a collective
        drawn = random.Random(repr((seed, world.rank))).getrandbits(62)
        generator = torch.Generator(world.device).manual_seed(drawn)
        completions: dict[int, list[Completion]] = {}

        def anyone(active: bool) -> bool:
            return active if world.size == 1 else dist.all_reduce([float(active)], world)[0] > 0

        for turn in range(rounds):
            batch = own_prompts[turn * at_once : (turn + 1) * at_once]
            generation = generate(
                self.model, [prompts[i] for i in batch] or [prompts[0]], num_return_sequences=n,
                max_new_tokens=max(limits), stop_token_ids=self.stop_ids, generator=generator,
                anyone=anyone,
                temperature=self.options.temperature if temperature is None else temperature,
            )
            for position, i in enumerate(batch):
                completions[i] = []
                for row in range(position * n, position * n + n):
                    ids, reason = generation.completion_ids[row], generation.finish_reasons[row]
                    if len(ids) > limits[i]:
                        ids, reason = ids[: limits[i]], "length"
                    logprobs = as_logprobs(generation.logprobs[row][: len(ids)])
                    completions[i].append(Completion(as_ids(ids), logprobs, reason))
        everything = {i: group for batch in dist.gather(completions, world) for i, group in batch.items()}
        groups = [everything[i] for i in range(len(prompts))]
        if on_group is not None and world.main:
            for i, group in enumerate(groups):
                on_group(i, group)
        return groups

    def _rows(self, length: int) -> int:
        """Number of sequences of this length to sample at once."""
        if self.options.rollout_batch_size is not None:
            return self.options.rollout_batch_size
        if self.world.device.type != "cuda":
            return memory.MOST_ROWS
        arch, world = self.model.arch, self.world
        if self._left is None:
            total = torch.cuda.get_device_properties(world.device).total_memory
            self._left = memory.left_for_sampling(arch, self.options, total, world.size)
        rows = memory.rollout_rows(arch, self.options, length, self._left)
        if rows < self._fewest:
            self._fewest = rows
            log.info("sampling %d sequences of up to %d tokens at once, as memory allows", rows, length)
        return rows

    def sync(self, step: int, due: bool = False) -> dict[str, float]:
        return {}

    def version(self, step: int) -> int:
        return step


# ------------------------------------------------------------------------------------------------------------
# One batch of rollouts from prompts
# ------------------------------------------------------------------------------------------------------------


def make_engine(
    model: Transformer, options: Any, tokenizer: Tokenizer, world: World, prompts: Sequence[Prompt]
) -> Engine:
    """The engine that this config asks for; evaluations of a replay are sampled in this process."""
    if options.rollout_engine == "vllm":
        return VllmEngine(model, options, tokenizer, world, prompts)
    return EmbeddedEngine(model, options, tokenizer, world)


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


class RolloutQueue:
    """Yields generation batches in order. Before each the engine gets the trainer's weights; with
    async_prefetch it samples the next batch while this one trains.

    `sample(number, step, prefetched)` makes a batch, from what was prefetched or anew; `prefetch(number)`
    begins one on the engine's thread.
    """

    def __init__(
        self, engine: Engine, sample: Callable[[int, int, bool], list[Rollout]],
        prefetch: Callable[[int], None], *, asynchronous: bool, prefetched: list[Rollout] | None = None,
    ):
        self.engine, self.sample, self.prefetch, self.asynchronous = engine, sample, prefetch, asynchronous
        self.prefetched = prefetched  # the next batch, if it was collected early for a checkpoint
        self.under_way = False  # whether the engine samples the next batch
        self.seconds = 0.0  # spent on sending weights in the last `next`
        self.metrics: dict[str, float] = {}  # of that sync, and of the batch's prompts
        self.prompts_before: set[int] = set()  # of the last batch

    def next(self, number: int, step: int, last: bool) -> list[Rollout]:
        """Batch `number`, after `step` optimiser steps; `last`: there is no other to prefetch. A
        collective."""
        timer, self.seconds, self.metrics = Timer(), 0.0, {}
        if not self.under_way and self.prefetched is None:
            self.metrics = self.engine.sync(step)
            self.seconds += timer()
        rollouts = self.prefetched
        if rollouts is None:
            rollouts = self.sample(number, step, self.under_way)
        self.prefetched, self.under_way = None, False
        timer()
        if self.asynchronous and not last:
            self.metrics = self.engine.sync(step) or self.metrics
            self.seconds += timer()
            self.prefetch(number + 1)
            self.under_way = True
        prompts = {r.prompt_index for r in rollouts if r.prompt_index >= 0}
        if prompts and self.prompts_before:
            repeated = len(prompts & self.prompts_before) / len(prompts)
            self.metrics = {
                **self.metrics, "now/prompts/repeated": repeated, "now/prompts/in_batch": float(len(prompts)),
            }
        self.prompts_before = prompts
        return rollouts

    def settle(self, number: int, step: int) -> None:
        """Collect the prefetched batch `number` before new weights are sent. A collective."""
        if self.under_way:
            self.prefetched, self.under_way = self.sample(number, step, True), False
