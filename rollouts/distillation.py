"""On-policy distillation: a teacher says of every token that the student sampled how likely it would have
been to write it; the difference of the log-probabilities is the token's reward, whose sum over a completion
estimates −KL(student‖teacher) (Agarwal et al., arXiv 2306.13649; Gu et al., arXiv 2306.08543).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dist
from checkpoints import building
from checkpoints.weights import read_architecture
from dist import World
from model import Transformer, without_gradients
from rollouts.policy import can_share_prompts, collate, token_logprobs
from rollouts.rollout import Rollout
from rollouts.tokens import as_logprobs, padded
from rollouts.vllm_server import NEUTRAL, EngineError, Server, ServerLost
from run.config import ConfigError, check_ranges, resolve_checkpoint
from text.tokenizer import Tokenizer


@dataclass
class TeacherOptions:
    teacher_model: str | None = None
    """Learn from this model on the policy's own samples: a directory or a hub id, with the policy's
    tokenizer."""
    teacher_model_revision: str | None = None
    """Branch, tag or commit of teacher_model on the hub."""
    teacher_server_base_url: str | None = None
    """Ask a vLLM server for the teacher's log-probabilities, where teacher_model is the name that it serves;
    at temperature 1 only."""
    distillation_coef: float = 1.0
    """Weight of log π_teacher − log π of each token in its advantage."""

    def check(self) -> None:
        check_ranges(self, ("distillation_coef", 0, 1e6))
        if self.teacher_server_base_url and not self.teacher_model:
            raise ConfigError("teacher_model", None, "must name what teacher_server_base_url serves")
        if self.teacher_server_base_url and getattr(self, "temperature", 1.0) != 1:
            raise ConfigError(
                "teacher_server_base_url", self.teacher_server_base_url,
                "gives log-probabilities of temperature 1: set temperature: 1, or load teacher_model here",
            )


class Teacher:
    """A frozen model that advises on the student's tokens."""

    def __init__(self, model: Transformer):
        self.model = model

    def logprobs(self, some: Sequence[Rollout], options: Any, world: World, share_prompts: bool) -> Tensor:
        """log π_teacher of each completion token [B, T], of the tempered distribution."""
        batch = collate(some, world.device, share_prompts and can_share_prompts(self.model, None))
        with without_gradients(self.model):
            return token_logprobs(self.model, batch, options.temperature)[0]

    def advise(
        self, student: Transformer, micro: Sequence[Sequence[Rollout]], options: Any, world: World,
        share_prompts: bool,
    ) -> dict[str, float]:
        """Add distillation_coef · (log π_teacher − log π_old) to the advantage of each token of this rank's
        micro-batches, and return the mean of log π_old − log π_teacher. A collective."""
        gap = tokens = 0.0
        for micro_batch in micro:
            batch = collate(micro_batch, world.device, share_prompts)
            old = batch.stored("old_logprobs")
            if old is None:
                with without_gradients(student):
                    old = token_logprobs(student, batch, options.temperature)[0]
            theirs = self.logprobs(micro_batch, options, world, share_prompts)
            better = ((theirs - old) * batch.mask).float().cpu().numpy()
            gap, tokens = gap - float(better.sum()), tokens + batch.mask.sum().item()
            for rollout, row in zip(micro_batch, options.distillation_coef * better, strict=True):
                own = np.float32(rollout.advantage) if rollout.token_advantages is None else (
                    rollout.token_advantages
                )
                rollout.token_advantages = (own + row[: len(rollout.completion_ids)]).astype(np.float32)
        gap, tokens = dist.all_reduce([gap, tokens], world)
        return {"distillation/reverse_kl": gap / max(tokens, 1.0)}


class ServedTeacher(Teacher):
    """A teacher on a vLLM server, which says how likely each token of a prompt is."""

    def __init__(self, url: str, name: str, timeout: float, tokenizer: Tokenizer):
        self.server, self.name = Server(url, timeout), name
        served = self._ask("GET", "/v1/models")
        names = [str(one.get("id")) for one in served.get("data", [])]
        if name not in names:
            raise EngineError(f"{url}: serves {', '.join(names)}, teacher_model is {name!r}")
        text = "What is 2 + 2? <b>Four</b>, or \u2163.\n"
        theirs = self._ask("POST", "/tokenize", {"model": name, "prompt": text, "add_special_tokens": False})
        if theirs.get("tokens") != tokenizer.encode(text):
            raise ConfigError("teacher_model", name, OTHER_TOKENIZER)

    def _ask(self, method: str, path: str, body: dict | None = None) -> Any:
        try:
            return self.server.ask(method, path, body)
        except ServerLost as problem:
            raise EngineError(f"teacher_server_base_url: {problem}; is the server running?") from None

    def logprobs(self, some: Sequence[Rollout], options: Any, world: World, share_prompts: bool) -> Tensor:
        rows, problem = [], None
        try:
            with ThreadPoolExecutor(32) as threads:
                rows = [*threads.map(self._score, some)]
        except EngineError as error:
            problem = str(error)
        problems = [text for text in dist.gather(problem, world) if text]
        if problems:  # on all ranks alike: what follows is a collective
            raise EngineError(problems[0])
        return torch.from_numpy(padded(rows, max(len(r.completion_ids) for r in some))).to(world.device)

    def _score(self, rollout: Rollout) -> np.ndarray:
        ids = [*rollout.prompt_ids.tolist(), *rollout.completion_ids.tolist()]
        answer = self._ask("POST", "/v1/completions", {
            "model": self.name, "prompt": ids, "max_tokens": 1, "temperature": 1.0, **NEUTRAL,
            "prompt_logprobs": 0,
        })
        try:
            given = answer["choices"][0]["prompt_logprobs"][len(rollout.prompt_ids) :]
            pairs = zip(given, rollout.completion_ids.tolist(), strict=True)
            found = as_logprobs([entry[str(token)]["logprob"] for entry, token in pairs])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise EngineError(
                f"{self.server.url}: scored a completion in an unknown format: {error!r}"
            ) from None
        return found


OTHER_TOKENIZER = "has another tokenizer than the policy: their log-probabilities are of different tokens"


def read_teacher(run: Any) -> Teacher | None:
    """The teacher of a run's config, if it has one. Raises ConfigError if its tokens are not the policy's."""
    config = run.config
    if not config.teacher_model:
        return None
    if config.teacher_server_base_url:
        url, timeout = config.teacher_server_base_url, config.vllm_timeout
        return ServedTeacher(url, config.teacher_model, timeout, run.tokenizer)
    place = resolve_checkpoint(config.teacher_model, config.teacher_model_revision, run.directory)
    arch = read_architecture(place)
    theirs, ours = (t.core.get_vocab() for t in (Tokenizer.load(place), run.tokenizer))
    different = [token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]]
    if different or len(theirs.keys() ^ ours.keys()) > 0.01 * len(ours):
        raise ConfigError("teacher_model", config.teacher_model, OTHER_TOKENIZER)
    whole = {"adapter": None, "load_in_4bit": False, "load_in_8bit": False, "fp8_frozen": False, "fp8": False}
    return Teacher(building.build_model(
        arch, place, SimpleNamespace(**{**vars(config), **whole}), run.world, frozen=True
    ))
