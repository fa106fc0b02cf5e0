"""On-policy distillation: a teacher says of every token that the student sampled how likely it would have
been to write it; the difference of the log-probabilities is the token's reward, whose sum over a completion
estimates −KL(student‖teacher) (Agarwal et al., arXiv 2306.13649; Gu et al., arXiv 2306.08543).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

import dist
from checkpoints import building
from checkpoints.weights import read_architecture
from dist import World
from model import Transformer, without_gradients
from rollouts.policy import can_share_prompts, collate, token_logprobs
from rollouts.rollout import Rollout
from run.config import ConfigError, check_ranges, resolve_checkpoint
from text.tokenizer import Tokenizer


@dataclass
class TeacherOptions:
    teacher_model: str | None = None
    """Learn from this model on the policy's own samples: a directory or a hub id, with the policy's
    tokenizer."""
    teacher_model_revision: str | None = None
    """Branch, tag or commit of teacher_model on the hub."""
    distillation_coef: float = 1.0
    """Weight of log π_teacher − log π of each token in its advantage."""

    def check(self) -> None:
        check_ranges(self, ("distillation_coef", 0, 1e6))


class Teacher:
    """A frozen model that advises on the student's tokens."""

    def __init__(self, model: Transformer):
        self.model = model

    def advise(
        self, student: Transformer, micro: Sequence[Sequence[Rollout]], options: Any, world: World,
        share_prompts: bool,
    ) -> dict[str, float]:
        """Add distillation_coef · (log π_teacher − log π_old) to the advantage of each token of this rank's
        micro-batches, and return the mean of log π_old − log π_teacher. A collective."""
        gap = tokens = 0.0
        share = share_prompts and can_share_prompts(self.model, None)
        for micro_batch in micro:
            batch = collate(micro_batch, world.device, share_prompts)
            old = batch.stored("old_logprobs")
            if old is None:
                with without_gradients(student):
                    old = token_logprobs(student, batch, options.temperature)[0]
            batch = batch if share == share_prompts else collate(micro_batch, world.device, share)
            with without_gradients(self.model):
                theirs = token_logprobs(self.model, batch, options.temperature)[0]
            better = ((theirs - old) * batch.mask).float().cpu().numpy()
            gap, tokens = gap - float(better.sum()), tokens + batch.mask.sum().item()
            for rollout, row in zip(micro_batch, options.distillation_coef * better, strict=True):
                own = np.float32(rollout.advantage) if rollout.token_advantages is None else (
                    rollout.token_advantages
                )
                rollout.token_advantages = (own + row[: len(rollout.completion_ids)]).astype(np.float32)
        gap, tokens = dist.all_reduce([gap, tokens], world)
        return {"distillation/reverse_kl": gap / max(tokens, 1.0)}


def read_teacher(run: Any) -> Teacher | None:
    """The teacher of a run's config, if it has one. Raises ConfigError if its tokens are not the policy's."""
    config = run.config
    if not config.teacher_model:
        return None
    place = resolve_checkpoint(config.teacher_model, config.teacher_model_revision, run.directory)
    arch = read_architecture(place)
    theirs, ours = (t.core.get_vocab() for t in (Tokenizer.load(place), run.tokenizer))
    different = [token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]]
    if different or len(theirs.keys() ^ ours.keys()) > 0.01 * len(ours):
        raise ConfigError(
            "teacher_model", config.teacher_model,
            "has another tokenizer than the policy: their log-probabilities are of different tokens"
        )
    whole = {"adapter": None, "load_in_4bit": False, "load_in_8bit": False, "fp8_frozen": False, "fp8": False}
    return Teacher(building.build_model(
        arch, place, SimpleNamespace(**{**vars(config), **whole}), run.world, frozen=True
    ))
