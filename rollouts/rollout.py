"""Rollouts, the options of sampling them, and what an engine is. records.py has their files."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import urlparse

import numpy as np

from rollouts.tokens import as_ids, as_logprobs, as_mask, as_routes
from rollouts.vllm_server import MEMORY, Completion
from run.config import ConfigError, check_at_least_one
from run.log import log
from text.tokenizer import Tokenizer


@dataclass
class RolloutOptions:
    rollout_engine: Literal["embedded", "vllm", "replay"] = "embedded"
    """What samples completions: this process, vLLM servers, or a recorded file (replay_path)."""
    num_generations: int = 8
    """Completions of each prompt; 16 and more give better advantage estimates."""
    max_prompt_length: int | None = None
    """Leave out prompts with more tokens."""
    max_completion_length: int = 256
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Temperature of sampling and of the trained log-probabilities; if they differed, ratios would be wrong
    from the start."""
    top_p: float = 1.0
    """Must stay 1 in training: the sampler would renormalise over the tokens that it keeps, the trainer would
    not."""
    top_k: int = 0
    """Must stay 0 in training, for the same reason."""
    min_p: float = 0.0
    """Must stay 0 in training, for the same reason."""
    rollout_batch_size: int | None = None
    """embedded: most sequences sampled at once; bounds the key/value cache. Unset: 512, or fewer if GPU
    memory does not suffice."""
    replay_path: str | None = None
    """replay: a JSONL file (or a directory of step-N.jsonl) of rollouts instead of sampling."""
    max_turns: int = 8
    """Multi-turn: maximum number of answers in one completion."""
    vllm_mode: Literal["server", "colocate"] = "server"
    """server: vLLM servers that you start. colocate: the run starts one on each of its GPUs; they sleep while
    it trains, and weights and cache leave the GPU then."""
    vllm_server_base_url: list[str] = field(default_factory=lambda: ["http://127.0.0.1:8000"])
    """vLLM servers; prompts are spread over them."""
    vllm_model_name: str | None = None
    """Name under which the servers serve the model; unset: base_model. Checked before the first step."""
    vllm_sync_interval: int = 1
    """Send weights every N optimiser steps. Smaller is closer to on-policy: lower it when
    importance_sampling_ratio/min falls towards 0."""
    vllm_sync_method: Literal["auto", "file", "nccl", "adapter"] = "auto"
    """adapter: only the LoRA adapter. file: safetensors through vllm_sync_directory. nccl: GPU to GPU. auto:
    adapter for LoRA, file for servers on this host, else nccl."""
    vllm_sync_directory: str = MEMORY
    """Where weights for servers are stored temporarily: memory of this host, or a shared file system."""
    vllm_sync_address: str | None = None
    """nccl: the address at which servers reach this host; unset: the one that this host uses towards them."""
    vllm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type that the server computes in; auto: bfloat16 with bf16: true, else float32."""
    vllm_timeout: float = 600.0
    """Seconds to wait for a server that does not answer; then the run saves and stops."""
    vllm_probe_tolerance: float | None = None
    """Largest mean difference of log-probs between server and trainer after a sync; unset: 1e-3 where both
    are fp32, else 0.1."""
    vllm_allow_missing_servers: bool = False
    """Continue with the servers that answer if others do not within vllm_timeout."""
    async_prefetch: bool = False
    """vllm: sample the next batch while this one trains; it is one update more off policy."""
    vllm_python: str | None = None
    """serve: the Python that has vLLM installed; unset: this one."""
    vllm_max_model_len: int | None = None
    """serve: longest prompt + completion; unset: max_prompt_length + max_completion_length, or the
    model's."""
    vllm_gpu_memory_utilization: float = 0.9
    """serve: share of a GPU's memory for vLLM."""
    vllm_tensor_parallel_size: int = 1
    """serve: GPUs per server."""
    log_completions: bool = False
    """Show a few completions at every logged step, with their rewards or true completions, and all of them in
    wandb."""

    def check(self) -> None:
        check_at_least_one(
            self, "num_generations", "max_completion_length", "rollout_batch_size", "max_turns",
            "vllm_sync_interval", "vllm_tensor_parallel_size", "max_prompt_length", "vllm_max_model_len",
        )
        for key in ("vllm_timeout", "vllm_probe_tolerance"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(key, value, "must be above 0")
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            key = "vllm_gpu_memory_utilization"
            raise ConfigError(key, self.vllm_gpu_memory_utilization, "must be above 0, at most 1")
        if not 0 < self.temperature < math.inf:
            raise ConfigError("temperature", self.temperature, "must be above 0")
        for key, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            if getattr(self, key) != off:
                raise ConfigError(
                    key, getattr(self, key),
                    "would make importance ratios wrong: the sampler renormalises over the tokens that it "
                    f"keeps, the trainer does not; leave it at {off} and lower temperature instead",
                )
        if (self.rollout_engine == "replay") != (self.replay_path is not None):
            raise ConfigError("replay_path", self.replay_path, "goes together with rollout_engine: replay")
        if self.async_prefetch and self.rollout_engine != "vllm":
            raise ConfigError(
                "async_prefetch", True, "needs rollout_engine: vllm; in one process nothing overlaps"
            )
        if self.vllm_mode == "colocate":
            self._check_colocate()
        if self.rollout_engine == "vllm":
            if not self.vllm_server_base_url:
                raise ConfigError("vllm_server_base_url", None, "must name at least one server")
            for url in self.vllm_server_base_url:
                if not url.startswith(("http://", "https://")):
                    raise ConfigError("vllm_server_base_url", url, "must begin with http:// or https://")
                if urlparse(url).username or urlparse(url).password:
                    raise ConfigError(
                        "vllm_server_base_url", None,
                        "holds a user name or password, which would show in config.yaml and the logs; reach "
                        "the server through an SSH tunnel or a private network instead",
                    )

    def _check_colocate(self) -> None:
        """A server that sleeps while the trainer trains takes part in nothing that runs meanwhile."""
        if self.rollout_engine != "vllm":
            raise ConfigError("vllm_mode", "colocate", "needs rollout_engine: vllm")
        for key, only in (("async_prefetch", False), ("max_staleness", 0), ("vllm_sync_interval", 1),
                          ("vllm_tensor_parallel_size", 1)):
            if getattr(self, key, only) != only:
                words = f"must be {str(only).lower()} with vllm_mode: colocate"
                raise ConfigError(key, getattr(self, key), words)
        if self.vllm_sync_method == "nccl":
            raise ConfigError(
                "vllm_sync_method", "nccl", "does not work between two processes on one GPU; leave it at auto"
            )


class Engine(Protocol):
    """Samples completions: `rollouts.engines.EmbeddedEngine` or `rollouts.vllm_client.VllmEngine`."""

    def generate(
        self, prompts: list[list[int]], n: int, *, seed: tuple[int, ...], temperature: float | None = None,
        limits: list[int] | None = None, on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """`n` completions of each prompt, the same on every rank. A collective."""
        ...

    def sync(self, step: int, due: bool = False) -> dict[str, float]:
        """Send the weights of `step`, unless the engine shares the trainer's; returns metrics. A
        collective."""
        ...

    def version(self, step: int) -> int:
        """Optimiser steps in the weights that the engine samples from."""
        ...

    def rest(self) -> None:
        """Nothing is sampled before the next `sync`. A collective."""
        ...

    def close(self) -> None:
        """The run has ended."""
        ...


@dataclass(eq=False)
class Rollout:
    """One completion of one prompt, as every engine makes it and as rollouts/step-N.jsonl records it. Token
    ids are int32 arrays, log-probs fp32 and masks bool; lists are taken too, with None for NaN."""

    prompt_ids: np.ndarray  # one array for all completions of a prompt
    completion_ids: np.ndarray
    sampling_logprobs: np.ndarray | None = None  # NaN where the sampler gave none
    completion_mask: np.ndarray | None = None  # False on tokens of an environment; None: the policy wrote all
    messages: list[dict] | None = None  # of a conversation: what came after the prompt
    failed: bool = False  # its environment did not answer in time: neither scored nor trained
    truncated: bool = False  # the last token does not end a turn
    rewards: dict[str, float | None] = field(default_factory=dict)
    step_ends: np.ndarray | None = None  # tokens until the end of each rewarded step, and its reward
    step_rewards: np.ndarray | None = None
    advantage: float = 0.0
    step: int = 0  # optimiser steps done when it was sampled
    weight_version: int = 0  # optimiser steps done by the weights that sampled its first token
    token_versions: np.ndarray | None = None  # those of each token, where they differ
    row: str = ""  # file:line of the prompt
    prompt_index: int = -1  # the prompt in the data set; −1 for a replay
    ground_truth_ids: np.ndarray | None = None
    ground_truth_mask: np.ndarray | None = None  # False on questions between true answers
    old_logprobs: np.ndarray | None = None  # log π_old of each token, where the trainer computed it
    ref_logprobs: np.ndarray | None = None
    entropies: np.ndarray | None = None
    routes: np.ndarray | None = None  # experts that π_old used, of prompt and completion [tokens, layers, k]
    token_advantages: np.ndarray | None = None  # in the place of `advantage`, where tokens differ in it

    def __post_init__(self):
        for name, convert in ARRAYS.items():
            value = getattr(self, name)
            if value is not None and type(value) is not np.ndarray:
                setattr(self, name, convert(value))

    @property
    def signal(self) -> bool:
        """Whether it says anything about which tokens should become likelier."""
        tokens = self.token_advantages
        return bool(self.advantage) or (tokens is not None and bool(tokens.any()))

    def written(self) -> np.ndarray:
        """Which tokens the policy wrote, bool."""
        mask = self.completion_mask
        return np.ones(len(self.completion_ids), bool) if mask is None else mask


ARRAYS: dict[str, Callable[[Any], np.ndarray]] = {
    "prompt_ids": as_ids, "completion_ids": as_ids, "sampling_logprobs": as_logprobs,
    "completion_mask": as_mask, "ground_truth_ids": as_ids, "ground_truth_mask": as_mask,
    "old_logprobs": as_logprobs, "ref_logprobs": as_logprobs, "entropies": as_logprobs,
    "step_ends": as_ids, "step_rewards": as_logprobs, "token_advantages": as_logprobs,
    "token_versions": as_ids, "routes": as_routes,
}
# Computed from the trainer's current weights: not recorded
OF_TRAINER = ("old_logprobs", "ref_logprobs", "entropies", "token_advantages", "routes")


def tokens_of(rollouts: Sequence[Rollout]) -> int:
    """Tokens of all prompts and completions."""
    return sum(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)


def show_rollouts(rollouts: list[Rollout], tokenizer: Tokenizer, logger: Any, step: int) -> None:
    """For log_completions: show a few on the console and send all to wandb (the JSONL always has them)."""

    def short(ids: np.ndarray, width: int) -> str:
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
        import wandb  # slow to import; only needed here

        names = list(rollouts[0].rewards)
        table = wandb.Table(columns=["step", "prompt", "completion", *names, "advantage"])
        for r in rollouts:
            table.add_data(
                step, tokenizer.decode(r.prompt_ids, special=True),
                tokenizer.decode(r.completion_ids, special=True),
                *[r.rewards.get(name) for name in names], r.advantage,
            )
        logger.wandb.log({"completions": table}, step=step)
