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
from dist import World
from health import memory
from model import Transformer, without_gradients
from rollouts.generation import generate
from rollouts.policy import collate, token_logprobs
from rollouts.rollout import Engine, Rollout
from rollouts.tokens import as_ids, as_logprobs
from rollouts.vllm_client import VllmEngine
from rollouts.vllm_server import Completion, EngineError
from run.log import log
from text.prompt import Prompt
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

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass


# ------------------------------------------------------------------------------------------------------------
# Which engine, and whether it samples from the policy
# ------------------------------------------------------------------------------------------------------------


def make_engine(
    model: Transformer, options: Any, tokenizer: Tokenizer, world: World, prompts: Sequence[Prompt]
) -> Engine:
    """The engine that this config asks for; evaluations of a replay are sampled in this process."""
    if options.rollout_engine == "vllm":
        return VllmEngine(model, options, tokenizer, world, prompts)
    return EmbeddedEngine(model, options, tokenizer, world)


def check_sampler(
    engine: Engine, model: Transformer, rollouts: Sequence[Rollout], micro: Sequence[Sequence[Rollout]],
    options: Any, world: World, share_prompts: bool,
) -> None:
    """Raise EngineError if the first batch from a server was not drawn from the trainer's distribution. The
    probe compares a few tokens, this check all that would be trained. Later batches, and batches older than
    the current weights, are not checked. A collective."""
    if not isinstance(engine, VllmEngine) or engine.batch_agreed:
        return
    if any(r.weight_version != engine.now or r.step != engine.now for r in rollouts):
        return
    engine.batch_agreed = True
    temperatures = [options.temperature] if options.temperature == 1 else [options.temperature, 1.0]
    sums = [0.0] * (1 + len(temperatures))
    for micro_batch in micro:
        batch = collate(micro_batch, world.device, share_prompts)
        if batch.sampling_logprobs is None:
            continue
        known = (batch.mask > 0) & batch.sampling_logprobs.isfinite()
        sums[0] += float(known.sum())
        for i, temperature in enumerate(temperatures, 1):
            with without_gradients(model):
                ours = token_logprobs(model, batch, temperature)[0]
            sums[i] += torch.where(known, ours - batch.sampling_logprobs, 0.0).abs().sum().item()
    count, *totals = dist.all_reduce(sums, world)
    gap, *untempered = [total / max(count, 1.0) for total in totals]
    named = f"the log-probs that the server gives to the {count:.0f} tokens of its first batch"
    remedy = "start it with `python grpo.py serve`, which sets logprobs_mode and generation_config"
    if untempered and untempered[0] < gap / 2 and gap > 1e-3:
        raise EngineError(
            f"{named} are those of temperature 1 (mean difference {untempered[0]:.2g}), not of "
            f"{options.temperature:g} ({gap:.2g}): its logprobs_mode is raw_logprobs; {remedy}"
        )
    if not gap <= engine.tolerance():
        raise EngineError(
            f"{named} differ by {gap:.2g} on average from the trainer's (allowed {engine.tolerance():g}: "
            f"vllm_probe_tolerance), though a probe agreed: it samples with other settings; {remedy}"
        )
