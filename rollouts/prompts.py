"""The prompts of a run: training prompts and their order, or a replay, and held-out prompts."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import read_prompts
from rollouts.records import ReplayEngine
from run.config import ConfigError
from text import findings
from text.packing import PromptOrder, split_held_out, weights_of, with_weights
from text.prompt import Prompt
from text.tokenizer import Tokenizer


@dataclass
class PromptData:
    train: list[Prompt]
    held_out: list[Prompt]
    order: PromptOrder
    replay: ReplayEngine | None
    batches: int  # generation batches in the run
    batches_per_epoch: int
    fingerprint: str
    measured: dict[str, float]  # for the rules

    def longest(self, config: Any) -> int:
        """Tokens of the longest prompt and completion together, of those that are sampled here."""
        return max((len(prompt.ids) for prompt in self.train), default=0) + config.max_completion_length

    def epoch_of(self, batch: int) -> float:
        """Epochs completed after this generation batch; 0 for a replay."""
        return 0.0 if self.replay else self.order.size * (batch + 1) / self.order.epoch_size


def read_prompt_data(
    config: Any, tokenizer: Tokenizer, directory: Path, batch_size: int, updates: int = 1, **how: Any
) -> PromptData:
    """Prompts for generation batches of `batch_size` completions, each used for `updates` optimiser steps.
    `how` goes to `read_prompts`. Raises ConfigError where there are too few."""

    counts: dict[str, int] = {}

    def read(specs: list[dict]) -> tuple[list[Prompt], str]:
        longest = config.max_prompt_length
        return read_prompts(specs, tokenizer, config, directory, longest, counts=counts, **how)

    train: list[Prompt] = []
    held_out: list[Prompt] = []
    replay, fingerprint, in_replay = None, "", 0
    if config.rollout_engine == "replay":
        replay = ReplayEngine(config.replay_path, directory, config, tokenizer)
        fingerprint, in_replay = replay.fingerprint, len(replay.rollouts) // batch_size
        if not in_replay:
            raise ConfigError(
                "replay_path", config.replay_path,
                f"holds {len(replay.rollouts)} rollouts, but a batch needs {batch_size}",
            )
    if config.datasets and (replay is None or config.val_set_size):
        train, read_from = read(config.datasets)
        fingerprint = read_from if replay is None else fingerprint
    if config.val_set_size and train:
        train_rows, held_rows = split_held_out(len(train), config.val_set_size, config.seed)
        train, held_out = [train[i] for i in train_rows], [train[i] for i in held_rows]
    if config.test_datasets:
        held_out, _ = read(config.test_datasets)
    if replay is not None:
        order = PromptOrder([0], 1, config.seed)
        return PromptData(train, held_out, order, replay, in_replay, in_replay, fingerprint, {})
    weights = weights_of(config.datasets)
    order = PromptOrder(
        [prompt.source for prompt in train], batch_size // config.num_generations, config.seed, weights
    )
    batches = math.ceil(config.max_steps / updates) if config.max_steps else order.batches(config.num_epochs)
    fingerprint = with_weights(fingerprint, weights)
    measured = {}
    if config.health:
        first = [row for number in range(min(order.batches(1.0), 2000)) for row in order.batch(number)]
        measured = findings.of_prompts(train, held_out, first, counts["too_long"], tokenizer)
    return PromptData(train, held_out, order, None, batches, order.batches(1.0), fingerprint, measured)
