"""Rollouts: prompts in, completions with the log-probabilities that they were drawn from out.

Three engines make them. Embedded: our own `generate`, in this process, on policy by construction. vLLM: one
or several servers over HTTP, token ids in and out, which get the trainer's weights every vllm_sync_interval
steps; after each sync a probe is scored on both sides, for a 200 from a server is no proof. Replay: a file
that an earlier run, or another program, wrote.
"""

import hashlib
import importlib
import json
import math
import os
import random
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import httpx
import torch

import checkpoint
import dist
from config import BallastError, ConfigError, DataError, check_at_least_one, import_attribute
from data import Prompt
from dist import World
from generation import generate
from health import log
from kernels import linear_logprobs
from model import Transformer
from tokenizer import BadRow, Tokenizer
from weights import iterate_weights, save_adapter, save_pretrained


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
    """Of sampling, and of the log-probabilities that are trained: one number for both, or the ratio is off
    from the start."""
    top_p: float = 1.0
    """Must stay 1 in training: the sampler would renormalise over the tokens that it keeps, the trainer
    not."""
    top_k: int = 0
    """Must stay 0 in training, for the same reason."""
    min_p: float = 0.0
    """Must stay 0 in training, for the same reason."""
    rollout_batch_size: int = 512
    """embedded: at most so many sequences at a time; bounds the key/value cache."""
    replay_path: str | None = None
    """replay: a JSONL file (or a directory of step-N.jsonl) of rollouts instead of sampling."""
    environment: str | None = None
    """Multi-turn: module.Class with reset(prompt, **columns) and step(text, ids) → (observation, reward,
    done)."""
    max_turns: int = 8
    """With an environment: at most so many answers in one completion."""
    vllm_server_base_url: list[str] = field(default_factory=lambda: ["http://127.0.0.1:8000"])
    """vLLM servers; prompts are spread over them."""
    vllm_model_name: str | None = None
    """Name under which they serve the model; unset: base_model. Compared before the first step."""
    vllm_sync_interval: int = 1
    """Send weights every so many optimiser steps. Smaller is closer to on-policy: lower it when
    importance_sampling_ratio/min falls towards 0."""
    vllm_sync_method: Literal["auto", "file", "nccl", "adapter"] = "auto"
    """adapter: only the LoRA adapter. file: safetensors through vllm_sync_directory. nccl: GPU to GPU. auto:
    adapter for LoRA, file for servers on this host, else nccl."""
    vllm_sync_directory: str = "/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"  # noqa: S108 - random names
    """Where weights for servers are put for a moment: memory of this host, or a shared file system."""
    vllm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the server computes in; auto: bfloat16 with bf16: true, else float32."""
    vllm_timeout: float = 600.0
    """Seconds to wait for a server that does not answer; then the run saves and stops."""
    vllm_probe_tolerance: float | None = None
    """Largest mean difference of log-probs between server and trainer after a sync; unset: 1e-3 where both
    are fp32, else 0.1."""
    async_prefetch: bool = False
    """vllm: sample the next batch while this one trains; it is one update more off policy."""
    streaming_partial_batch: bool = False
    """Score a prompt's completions as soon as they are all there."""
    vllm_python: str | None = None
    """serve: the Python that has vLLM installed; unset: this one."""
    vllm_max_model_len: int | None = None
    """serve: longest prompt + completion; unset: max_prompt_length + max_completion_length, or the
    model's."""
    vllm_gpu_memory_utilization: float = 0.9
    """serve: share of a GPU's memory for vLLM."""
    vllm_tensor_parallel_size: int = 1
    """serve: GPUs a server."""


class EngineError(BallastError):
    """A rollout engine that cannot go on: the line names the server, the step and the remedy."""


def check_rollout_options(options: RolloutOptions) -> None:
    check_at_least_one(
        options, "num_generations", "max_completion_length", "rollout_batch_size", "max_turns",
        "vllm_sync_interval", "vllm_tensor_parallel_size",
    )  # fmt: skip
    if not 0 < options.temperature < math.inf:
        raise ConfigError("temperature", options.temperature, "must be above 0")
    for key, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        if getattr(options, key) != off:
            raise ConfigError(
                key, getattr(options, key),
                f"would make importance ratios wrong: the sampler renormalises over the tokens that it keeps,"
                f" the trainer does not; leave it at {off} and lower temperature instead",
            )  # fmt: skip
    if (options.rollout_engine == "replay") != (options.replay_path is not None):
        raise ConfigError("replay_path", options.replay_path, "goes together with rollout_engine: replay")
    if options.async_prefetch and options.rollout_engine != "vllm":
        raise ConfigError(
            "async_prefetch", True, "needs rollout_engine: vllm; in one process nothing overlaps"
        )
    if options.async_prefetch and options.environment:
        raise ConfigError("async_prefetch", True, "does not work with an environment; drop one of the two")
    if options.rollout_engine == "vllm":
        if not options.vllm_server_base_url:
            raise ConfigError("vllm_server_base_url", None, "must name at least one server")
        for url in options.vllm_server_base_url:
            if not url.startswith(("http://", "https://")):
                raise ConfigError("vllm_server_base_url", url, "must begin with http:// or https://")
            if urlparse(url).username or urlparse(url).password:
                raise ConfigError(
                    "vllm_server_base_url", None,
                    "holds a user name or password, which would stand in config.yaml and the logs; reach the "
                    "server through an SSH tunnel or a private network instead",
                )  # fmt: skip


@dataclass
class Completion:
    """What a sampler wrote after a prompt."""

    ids: list[int]
    logprobs: list[float | None]  # of each token under the distribution that it was drawn from; None: unknown
    finish_reason: str  # stop or length


@dataclass
class Rollout:
    """One completion of one prompt, as every engine makes it and as rollouts/step-N.jsonl records it."""

    prompt_ids: list[int]
    completion_ids: list[int]
    sampling_logprobs: list[float | None] | None = None
    completion_mask: list[int] | None = None  # 0 on tokens of an environment; None: the policy wrote all
    truncated: bool = False  # the last token does not end a turn
    rewards: dict[str, float | None] = field(default_factory=dict)
    advantage: float = 0.0
    step: int = 0  # optimiser steps done when it was sampled
    weight_version: int = 0  # optimiser steps done by the weights that sampled it
    row: str = ""  # file:line of the prompt
    prompt_index: int = -1  # the prompt in the data set; −1 for a replay
    ground_truth_ids: list[int] | None = None
    ground_truth_mask: list[int] | None = None  # 0 on questions between true answers; None: all are answers
    old_logprobs: list[float] | None = None  # log π_old of each token, where the trainer computed it
    ref_logprobs: list[float] | None = None
    entropies: list[float] | None = None

    def written(self) -> list[int]:
        return self.completion_mask or [1] * len(self.completion_ids)


def to_json(rollout: Rollout) -> dict[str, Any]:
    """Without what is unknown, and without what the trainer computed from its weights of the moment."""
    mine = {"old_logprobs", "ref_logprobs", "entropies"}
    return {k: v for k, v in vars(rollout).items() if v is not None and k not in mine}


def write_rollouts(
    directory: Path, step: int, rollouts: Sequence[Rollout], tokenizer: Tokenizer, kind: str = "step"
) -> None:
    """directory/step-N.jsonl, one completion a line, those of a prompt in a row; the replay engine reads
    it."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for rollout in rollouts:
        texts = {
            "prompt": tokenizer.decode(rollout.prompt_ids, special=True),
            "completion": tokenizer.decode(rollout.completion_ids, special=True),
        }
        lines.append(json.dumps({**to_json(rollout), **texts}, ensure_ascii=False) + "\n")
    checkpoint.write_atomically(directory / f"{kind}-{step}.jsonl", "".join(lines))


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

    def generate(
        self, prompts: list[list[int]], n: int, *, seed: tuple[int, ...], temperature: float | None = None,
        limits: list[int] | None = None, on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """`n` completions of each prompt, the same on every rank. `limits` are most tokens by prompt. A
        collective; `on_group(prompt, completions)` is called on rank 0."""
        world = self.world
        limits = limits or [self.options.max_completion_length] * len(prompts)
        mine = list(range(world.rank, len(prompts), world.size))
        at_once = max(1, self.options.rollout_batch_size // n)
        most = math.ceil(len(prompts) / world.size)
        rounds = math.ceil(most / at_once)  # as many on every rank: each is a collective
        drawn = random.Random(repr((seed, world.rank))).getrandbits(62)
        generator = torch.Generator(world.device).manual_seed(drawn)
        made: dict[int, list[Completion]] = {}

        def anyone(active: bool) -> bool:
            return active if world.size == 1 else dist.all_reduce([float(active)], world)[0] > 0

        for turn in range(rounds):
            part = mine[turn * at_once : (turn + 1) * at_once]
            with world.autocast(self.options.bf16):
                found = generate(
                    self.model, [prompts[i] for i in part] or [prompts[0]], num_return_sequences=n,
                    max_new_tokens=max(limits), stop_token_ids=self.stop_ids, generator=generator,
                    anyone=anyone,
                    temperature=self.options.temperature if temperature is None else temperature,
                )  # fmt: skip
            for place, i in enumerate(part):
                made[i] = []
                for row in range(place * n, place * n + n):
                    ids, reason = found.completion_ids[row], found.finish_reasons[row]
                    if len(ids) > limits[i]:
                        ids, reason = ids[: limits[i]], "length"
                    made[i].append(Completion(ids, list(found.logprobs[row][: len(ids)]), reason))
        everything = {i: group for part in dist.gather(made, world) for i, group in part.items()}
        groups = [everything[i] for i in range(len(prompts))]
        if on_group is not None and world.main:
            for i, group in enumerate(groups):
                on_group(i, group)
        return groups

    def sync(self, step: int, due: bool = False) -> dict[str, float]:
        return {}

    def version(self, step: int) -> int:
        return step


# ------------------------------------------------------------------------------------------------------------
# vLLM servers
# ------------------------------------------------------------------------------------------------------------


class ServerLost(Exception):
    """A server that does not answer, or answers 5xx: it may come back."""


class StaleServer(Exception):
    """A server whose weights are not the ones that were sent last: it was restarted, or somebody else's."""


class Server:
    """One vLLM server, by HTTP. Routes under development mode carry the weights."""

    def __init__(self, url: str, timeout: float):
        self.url = url.rstrip("/")
        # A generation may take long; connecting may not.
        self.client = httpx.Client(
            base_url=self.url, timeout=httpx.Timeout(timeout, connect=10.0),
            limits=httpx.Limits(max_connections=None),
        )  # fmt: skip

    def ask(self, method: str, path: str, json: Any = None, **kwargs) -> Any:
        """The decoded answer. ServerLost: no answer or 5xx. EngineError: 4xx, with the server's own words."""
        try:
            response = self.client.request(method, path, json=json, **kwargs)
        except httpx.HTTPError as error:
            raise ServerLost(f"{self.url}{path}: {str(error) or type(error).__name__}") from None
        if response.status_code >= 500:
            raise ServerLost(f"{self.url}{path}: {response.status_code} {response.text[:200]}")
        if response.status_code >= 400:
            hint = ""
            if response.status_code == 404 and path != "/v1/completions":
                hint = "; start the server with `python grpo.py serve`, which switches these routes on"
            words = " ".join(response.text[:300].split())
            raise EngineError(f"{self.url}{path}: answered {response.status_code}: {words}{hint}")
        if not response.headers.get("content-type", "").startswith("application/json"):
            return response.text or None  # some routes answer nothing, or a sentence
        try:
            return response.json()
        except ValueError:
            raise EngineError(f"{self.url}{path}: answered something that is not JSON") from None

    def healthy(self) -> bool:
        try:
            return self.client.get("/health", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def models(self) -> dict[str, dict]:
        answer = self.ask("GET", "/v1/models")
        if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
            raise EngineError(f"{self.url}/v1/models: no list of models; is it a vLLM server?")
        return {str(e["id"]): e for e in answer["data"] if isinstance(e, dict) and "id" in e}

    def version(self) -> str:
        answer = self.ask("GET", "/weight_info")
        return str(answer.get("weight_version")) if isinstance(answer, dict) else "unknown"

    def set_version(self, version: str) -> None:
        self.ask("POST", "/update_weight_version", {"new_version": version})

    def remote_call(self, method: str, *arguments: str) -> list:
        answer = self.ask("POST", "/collective_rpc", {"method": method, "args": list(arguments)})
        return answer.get("results", []) if isinstance(answer, dict) else []


class VllmEngine:
    """vLLM servers. Rank 0 alone talks to them; what it learns is told to all ranks, and what needs all ranks
    (gathering sharded weights) is done by all, at one place: no collective ever runs on a thread."""

    def __init__(
        self, model: Transformer, options: Any, tokenizer: Tokenizer, world: World, prompts: Sequence[Prompt]
    ):
        self.model, self.options, self.world = model, options, world
        self.stop_ids = tokenizer.stop_ids
        self.name = options.vllm_model_name or options.base_model
        self.servers = [Server(url, options.vllm_timeout) for url in options.vllm_server_base_url]
        self.run_id = dist.from_main(lambda: secrets.token_hex(4), world)
        self.now = 0  # optimiser steps of the trainer's weights
        self.sent: int | None = None  # optimiser steps of the weights on the servers
        self.adapter: str | None = None  # name of the adapter that they serve
        self.method = options.vllm_sync_method
        if self.method == "auto":
            hosts = {urlparse(url).hostname for url in options.vllm_server_base_url}
            here = hosts <= {"127.0.0.1", "localhost", "::1"}
            self.method = "adapter" if options.adapter else "file" if here else "nccl"
        if self.method == "adapter" and not options.adapter:
            raise ConfigError("vllm_sync_method", "adapter", "needs adapter: lora; use file or nccl")
        if self.method == "nccl" and world.device.type != "cuda":
            raise ConfigError(
                "vllm_sync_method", "nccl", "needs GPUs; use file, with a directory that all hosts share"
            )
        self._transfers: list[Any] = []  # NCCL: one sender a server
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if world.main else None
        self._requests = ThreadPoolExecutor(64, thread_name_prefix="vllm") if world.main else None
        self._pending: Future | None = None
        self.gap_told = False
        room = dist.from_main(self._meet, world)
        # Also where there are few, short prompts
        text = [token for p in prompts[:16] for token in p.ids] * 64
        self.probe = text[: 64 if room is None else min(64, room - 1)]

    # -- before the first step -------------------------------------------------------------------------------

    def _meet(self) -> int | None:
        """Wait for every server, and compare its model with the config's. The most tokens that all take."""
        rooms = []
        self._wait_until_healthy()
        for server in self.servers:
            served = server.models()
            if self.name not in served:
                raise EngineError(
                    f"{server.url}: serves {', '.join(sorted(served))}, the config wants {self.name!r}; "
                    "start it with `python grpo.py serve`, or set vllm_model_name"
                )
            room = served[self.name].get("max_model_len")
            need = (self.options.max_prompt_length or 0) + self.options.max_completion_length
            if room is not None and room < need:
                raise EngineError(
                    f"{server.url}: takes {room} tokens, max_prompt_length + max_completion_length is {need}"
                    f"; start it with --max-model-len {need}"
                )
            rooms += [room] if room is not None else []
            server.version()  # 404 without the development routes
        return min(rooms, default=None)

    def _wait_until_healthy(self) -> None:
        deadline, pause = time.monotonic() + self.options.vllm_timeout, 0.5
        told = False
        while lost := [server.url for server in self.servers if not server.healthy()]:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{lost[0]}: no healthy answer for {self.options.vllm_timeout:g} s (vllm_timeout); is "
                    "the server running? `python grpo.py serve` starts it"
                )
            if not told:
                log.info("waiting for %s", ", ".join(lost))
                told = True
            time.sleep(min(pause, max(0.1, deadline - time.monotonic())))
            pause = min(pause * 1.5, 10.0)

    # -- sampling --------------------------------------------------------------------------------------------

    def generate(
        self, prompts: list[list[int]], n: int, *, seed: tuple[int, ...], temperature: float | None = None,
        limits: list[int] | None = None, on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """As EmbeddedEngine.generate. A server that was lost is waited for, gets the weights again, and the
        batch is asked for again. A collective."""
        job = (prompts, n, seed, temperature, limits, on_group)
        return self._until_done(lambda: self._attempt(*job), job)

    def prefetch(
        self, prompts: list[list[int]], n: int, *, seed: tuple[int, ...], limits: list[int] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> None:  # fmt: skip
        """Start sampling on a thread of rank 0; `collect` has the result."""
        self._job = (prompts, n, seed, None, limits, on_group)
        if self._thread is not None:
            self._pending = self._thread.submit(self._attempt, *self._job)

    def collect(self, step: int) -> list[list[Completion]]:
        """What `prefetch` began; `step` are the optimiser steps done by now. A collective."""
        self.now = step
        job, pending = self._job, self._pending
        self._pending = None
        return self._until_done(lambda: pending.result() if pending else ("ok", None), job)

    def _until_done(self, first: Callable[[], tuple[str, Any]], job: tuple) -> list[list[Completion]]:
        attempt = first
        losses = 0
        while True:
            state, result = dist.from_main(attempt, self.world)
            if state == "ok":
                return result
            losses += 1
            log.warning("%s", result)
            if losses > 5:
                raise EngineError(f"{result}; five attempts in a row failed; see the server's log")
            dist.from_main(self._wait_until_healthy, self.world)
            self._send_until_it_works(self.now)

            def attempt() -> tuple[str, Any]:
                return self._attempt(*job)

    def _attempt(self, prompts, n, seed, temperature, limits, on_group) -> tuple[str, Any]:
        """("ok", groups), or ("stale", reason) where a server was lost, or has other weights than were sent;
        EngineError where trying again is no use."""
        limits = limits or [self.options.max_completion_length] * len(prompts)
        temperature = self.options.temperature if temperature is None else temperature
        groups: list[list[Completion]] = [[] for _ in prompts]

        def one(i: int) -> None:
            server = self.servers[i % len(self.servers)]
            body = {
                "model": self.adapter or self.name, "prompt": prompts[i], "n": n, "max_tokens": limits[i],
                "temperature": temperature, "logprobs": 0, "return_token_ids": True,
                "stop_token_ids": self.stop_ids, "skip_special_tokens": False,
                "seed": random.Random(repr((seed, i))).getrandbits(31),
            }  # fmt: skip
            answer = server.ask("POST", "/v1/completions", body)
            groups[i] = read_completions(
                answer, n, limits[i], server.url, prompts[i], self.model.arch.vocab_size
            )
            if on_group is not None:
                on_group(i, groups[i])

        try:
            self._check_versions()
            assert self._requests is not None
            for done in [self._requests.submit(one, i) for i in range(len(prompts))]:
                done.result()
            self._check_versions()  # a server that was restarted in between sampled from other weights
        except (StaleServer, ServerLost) as problem:
            return "stale", str(problem)  # a lost server may come back with other weights: send them again
        return "ok", groups

    def _check_versions(self) -> None:
        for server in self.servers:
            found = server.version()
            if found != self._version_name():
                raise StaleServer(
                    f"{server.url}: has weights {found!r}, this run sent {self._version_name()!r}: "
                    "restarted, or used by another run; sending them again"
                )

    def _version_name(self) -> str:
        return f"ballast-{self.run_id}-{self.sent}"

    def version(self, step: int) -> int:
        return self.sent if self.sent is not None else 0

    # -- weights ---------------------------------------------------------------------------------------------

    def sync(self, step: int, due: bool = False) -> dict[str, float]:
        """Send the weights of `step` if the interval asks for it (or `due`), and prove it. A collective."""
        self.now = step
        if self.sent == step:
            return {}
        if self.sent is not None and not due and step - self.sent < self.options.vllm_sync_interval:
            return {}
        return self._send_until_it_works(step)

    def _send_until_it_works(self, step: int) -> dict[str, float]:
        last = ""
        for tries in range(5):
            try:
                return self._send(step)
            except ServerLost as problem:
                last = str(problem)
                log.warning("%s (sync %d)", last, tries + 1)
                dist.from_main(self._wait_until_healthy, self.world)
        raise EngineError(
            f"step {step}: the weights could not be sent in five attempts: {last}; was the server started "
            "with `python grpo.py serve`?"
        )

    def _send(self, step: int) -> dict[str, float]:
        seconds = dist.Timer()
        self.sent = step
        count = getattr(self, f"_send_{self.method}")(step)

        def settle() -> None:
            for server in self.servers:
                server.ask("POST", "/reset_prefix_cache")
                server.set_version(self._version_name())

        self._on_main(settle)
        took = seconds()
        gap = self._compare_probe(step)
        metrics = {
            "sync/seconds": took,
            "sync/gigabytes_per_second": count / took / 1e9,
            "sync/probe_difference": gap,
        }
        return metrics

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """`work()` on rank 0; ServerLost there is ServerLost on all ranks."""

        def guarded() -> tuple[str, Any]:
            try:
                return "ok", work()
            except ServerLost as problem:
                return "lost", str(problem)

        state, result = dist.from_main(guarded, self.world)
        if state == "lost":
            raise ServerLost(result)
        return result

    def _server_dtype(self) -> torch.dtype:
        name = self.options.vllm_dtype
        return getattr(torch, ("bfloat16" if self.options.bf16 else "float32") if name == "auto" else name)

    def _folder(self, name: str) -> Path:
        return Path(self.options.vllm_sync_directory) / f"ballast-{self.run_id}-{name}"

    def _send_file(self, step: int) -> int:
        """Every rank gathers tensor by tensor, rank 0 writes them; the server's workers read the file."""
        folder = self._folder("weights")
        try:
            merge = self.options.adapter is not None
            save_pretrained(self.model, folder, dtype=self._server_dtype(), merge=merge, main=self.world.main)

            def load() -> int:
                for server in self.servers:
                    self._load_file(server, folder)
                return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

            return self._on_main(load)
        finally:
            if self.world.main:
                shutil.rmtree(folder, ignore_errors=True)

    def _load_file(self, server: Server, folder: Path) -> None:
        server.remote_call("ballast_load_weights", str(folder))

    def _send_adapter(self, step: int) -> int:
        """The adapter under a new name (a cached prefix of the old one can then never be taken for its own),
        and the old one dropped."""
        name, before = f"policy-{self.run_id}-{step}", self.adapter
        folder = self._folder(name)
        save_adapter(self.model, folder, main=self.world.main)

        def load() -> int:
            for server in self.servers:
                served = server.models()
                if name in served:
                    server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
                server.ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
                if before is not None and before != name and before in served:
                    server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": before})
            if before is not None and before != name:
                shutil.rmtree(self._folder(before), ignore_errors=True)
            return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

        count = self._on_main(load)
        self.adapter = name
        return count

    def _send_nccl(self, step: int) -> int:
        """GPU to GPU through vLLM's own sender: rank 0 joins a group with each server's workers and
        broadcasts while the HTTP call that makes them receive is on its way."""
        transfer = "vllm.distributed.weight_transfer."  # installed on GPU machines only
        base = importlib.import_module(transfer + "base")
        clients = importlib.import_module(transfer + "clients")
        nccl = importlib.import_module(transfer + "nccl_engine")
        engine, dtype = self, self._server_dtype()

        class Source(base.WeightSource):
            """Every rank iterates it (a gather is a collective); only rank 0's tensors travel."""

            def metadata(self) -> list:
                return [base.ParamMeta(name, dtype, tuple(shape)) for name, shape in engine._shapes]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                merge = engine.options.adapter is not None
                for name, tensor in iterate_weights(engine.model, dtype=dtype, merge=merge):
                    yield name, tensor.to(engine.world.device)

        if not self._transfers:
            merge = self.options.adapter is not None
            self._shapes = [(n, t.shape) for n, t in iterate_weights(self.model, dtype=dtype, merge=merge)]
            address = os.environ.get("MASTER_ADDR", "127.0.0.1")
            for server in self.servers:
                workers = self._on_main(lambda s=server: int(s.ask("GET", "/get_world_size")["world_size"]))
                port = self._on_main(_free_port)
                info = nccl.NCCLTrainerInitInfo(
                    rank=self.world.rank, master_address=address, master_port=port, world_size=1 + workers
                )
                client = clients.HTTPVLLMWeightSyncClient(server.url, timeout=self.options.vllm_timeout)
                self._transfers.append(
                    nccl.NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=Source())
                )
        for sender in self._transfers:
            sender.send_weights()
        return sum(math.prod(shape) for _, shape in self._shapes) * dtype.itemsize

    @torch.no_grad()
    def _compare_probe(self, step: int) -> float:
        """Mean |log-prob| difference of the probe between each server and the trainer, the largest of them.

        Raises EngineError with both numbers where it is beyond the tolerance: a stale, wrong or corrupted
        server answers 200 like any other.
        """
        ids = torch.tensor([self.probe], device=self.world.device)
        training = self.model.training
        self.model.eval()
        with self.world.autocast(self.options.bf16):
            hidden, _ = self.model.hidden_states(ids)
            ours = linear_logprobs(
                hidden[0, :-1], self.model.head_weight, ids[0, 1:], softcap=self.model.arch.final_softcap
            ).logprobs.float().cpu()  # fmt: skip
        self.model.train(training)
        both_exact = self._server_dtype() == torch.float32 and not self.options.bf16
        allowed = self.options.vllm_probe_tolerance
        allowed = (1e-3 if both_exact else 0.1) if allowed is None else allowed

        def compare() -> float:
            worst = 0.0
            for server in self.servers:
                theirs = torch.tensor(self._score(server))
                gap = (theirs - ours).abs().mean().item()
                if not gap <= allowed:  # also where it is NaN
                    raise EngineError(
                        f"{server.url}: after the sync of step {step} the probe has mean log-prob "
                        f"{theirs.mean():.4f} on the server, {ours.mean():.4f} in the trainer "
                        f"(mean difference {gap:.2g}, allowed {allowed:g}: vllm_probe_tolerance): it does "
                        "not have these weights; start it with `python grpo.py serve`"
                    )
                worst = max(worst, gap)
            return worst

        worst = self._on_main(compare)
        if not self.gap_told:
            self.gap_told = True
            what = "both in fp32" if both_exact else "of precision: a constant offset of the sampling ratios"
            log.info("probe: server and trainer differ by %.2g in log-prob, %s", worst, what)
        return worst

    def _score(self, server: Server) -> list[float]:
        body = {"model": self.adapter or self.name, "prompt": self.probe, "max_tokens": 1, "temperature": 1.0,
                "prompt_logprobs": 0}  # fmt: skip
        answer = server.ask("POST", "/v1/completions", body)
        try:
            given = answer["choices"][0]["prompt_logprobs"][1:]
            return [
                float(entry[str(token)]["logprob"])
                for entry, token in zip(given, self.probe[1:], strict=True)
            ]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise EngineError(
                f"{server.url}: scored the probe in a form that is not understood: {error!r}"
            ) from None


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def read_completions(
    answer: Any, n: int, limit: int, url: str, prompt: list[int] | None = None, vocab_size: int | None = None
) -> list[Completion]:
    """The completions in a server's answer. EngineError where it is not what was asked for: never trained
    on."""
    beyond = math.inf if vocab_size is None else vocab_size
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        found = []
        for choice in choices:
            ids, reason = choice["token_ids"], choice["finish_reason"]
            logprobs = choice["logprobs"]["token_logprobs"]
            if reason not in ("stop", "length"):
                raise ServerLost(f"{url}: ended a completion with {reason!r}")
            if not ids or not all(type(i) is int and 0 <= i < beyond for i in ids) or len(ids) > limit:
                raise EngineError(
                    f"{url}: a completion of {len(ids)} token ids, asked for 1 to {limit} below {beyond}"
                )
            if len(logprobs) != len(ids):
                raise EngineError(f"{url}: {len(ids)} tokens with {len(logprobs)} log-probs")
            if prompt is not None and choice.get("prompt_token_ids") not in (None, prompt):
                raise EngineError(f"{url}: answered another prompt than it was asked")
            usable = [x if x is not None and math.isfinite(x) and x > -9999.0 else None for x in logprobs]
            found.append(Completion(ids, usable, reason))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{url}: an answer that is not understood ({error!r}); is it vLLM 0.32?") from None
    if len(found) != n:
        raise EngineError(f"{url}: {len(found)} completions, asked for {n}")
    known = [x is not None for completion in found for x in completion.logprobs]
    if len(known) >= 8 and not any(known):  # one is vLLM's own way of saying −∞; all of them are a fault
        raise EngineError(
            f"{url}: {len(known)} tokens and not one usable log-prob; start it with `python grpo.py serve`"
        )
    return found


def server_command(options: Any, model: str, url: str) -> tuple[dict[str, str], list[str]]:
    """Environment and command line of the vLLM server that this config needs, on CPU or GPU."""
    where = urlparse(url)
    gpu = torch.cuda.is_available()
    dtype = options.vllm_dtype
    dtype = ("bfloat16" if options.bf16 else "float32") if dtype == "auto" else dtype
    # The worker extension alone goes on the server's path: our module names (kernels, data) are others' too.
    folder = Path(options.output_dir).resolve() / "server"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).resolve().parent / "vllm_worker.py", folder / "vllm_worker.py")
    environment = {
        "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(folder),
    }  # fmt: skip
    command = [
        options.vllm_python or sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", model, "--served-model-name", options.vllm_model_name or options.base_model,
        "--host", where.hostname or "127.0.0.1", "--port", str(where.port or 8000), "--dtype", dtype,
        "--logprobs-mode", "processed_logprobs", "--seed", str(options.seed),
        "--worker-extension-cls", "vllm_worker.WeightReceiver",
    ]  # fmt: skip
    longest = options.vllm_max_model_len
    if longest is None and options.max_prompt_length:
        longest = options.max_prompt_length + options.max_completion_length
    if longest is not None:
        command += ["--max-model-len", str(longest)]
    if options.adapter:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        rank = next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= options.lora_r), options.lora_r)
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2"]
    if gpu:
        command += ["--gpu-memory-utilization", str(options.vllm_gpu_memory_utilization)]
        command += ["--tensor-parallel-size", str(options.vllm_tensor_parallel_size)]
        if options.vllm_sync_method in ("auto", "nccl") and not options.adapter:
            command += ["--weight-transfer-config", '{"backend": "nccl"}']
    else:
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        command += ["--enforce-eager"]
    return environment, command


# ------------------------------------------------------------------------------------------------------------
# Replay
# ------------------------------------------------------------------------------------------------------------


def replay_lines(path: str, directory: Path) -> Iterator[tuple[str, int, str]]:
    """(file, number, line) of a JSONL file, or of every step-N.jsonl of a directory in order."""
    place = next((p for p in (directory / path, Path(path)) if p.exists()), None)
    if place is None:
        raise ConfigError("replay_path", path, f"does not exist (looked in {directory} and here)")
    files = [place]
    if place.is_dir():
        steps = [p for p in place.glob("step-*.jsonl") if p.stem.removeprefix("step-").isdigit()]
        files = sorted(steps, key=lambda p: int(p.stem.removeprefix("step-")))
    for file in files:
        number = 0
        try:
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield str(file), number, line
        except UnicodeDecodeError:
            raise DataError(str(file), number + 1, "is not UTF-8 text (here or some lines on)") from None


class ReplayEngine:
    """Rollouts from JSONL: what a run recorded, or what another implementation sampled."""

    def __init__(self, path: str, directory: Path, options: Any, tokenizer: Tokenizer):
        stops, n = set(tokenizer.stop_ids), options.num_generations
        self.rollouts = [
            _read_rollout(line, file, k, stops) for file, k, line in replay_lines(path, directory)
        ]
        for begin in range(0, len(self.rollouts), n):
            group = self.rollouts[begin : begin + n]
            if len(group) < n or any(r.prompt_ids != group[0].prompt_ids for r in group):
                raise DataError(
                    *_place(group[-1]), f"the {n} completions of a prompt must stand in a row",
                    "set num_generations to what the file was made with",
                )  # fmt: skip
        if not self.rollouts:
            raise ConfigError("replay_path", path, "holds no rollout")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr([r.completion_ids for r in self.rollouts]).encode()).hexdigest()

    def batch(self, number: int, size: int) -> list[Rollout]:
        return self.rollouts[number * size : (number + 1) * size]


def _place(rollout: Rollout) -> tuple[str, int]:
    file, _, line = rollout.row.rpartition(":")
    return file, int(line)


def _read_rollout(line: str, file: str, number: int, stops: set[int]) -> Rollout:
    def whole(values: Any) -> bool:
        return isinstance(values, list) and bool(values) and all(type(v) is int and v >= 0 for v in values)

    def figure(value: Any) -> bool:
        return value is None or (type(value) in (int, float) and math.isfinite(value))

    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(file, number, f"is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(file, number, "must be an object")
    for name in ("prompt_ids", "completion_ids"):
        if not whole(row.get(name)):
            raise DataError(file, number, f"{name} must be a non-empty list of token ids")
    length = len(row["completion_ids"])
    logprobs, mask, truth, truth_mask = (
        row.get(k) for k in ("sampling_logprobs", "completion_mask", "ground_truth_ids", "ground_truth_mask")
    )
    if logprobs is not None:
        if not isinstance(logprobs, list) or len(logprobs) != length:
            raise DataError(
                file, number, f"sampling_logprobs must have {length} entries, one a completion token"
            )
        if not all(figure(x) for x in logprobs):
            raise DataError(file, number, "sampling_logprobs holds something that is no number")
    if truth is not None and not whole(truth):
        raise DataError(file, number, "ground_truth_ids must be a non-empty list of token ids")
    for name, given, count in (
        ("completion_mask", mask, length), ("ground_truth_mask", truth_mask, len(truth or [])),
    ):  # fmt: skip
        if given is None:
            continue
        if not isinstance(given, list) or len(given) != count or not all(x in (0, 1) for x in given):
            raise DataError(file, number, f"{name} must have {count} entries of 0 or 1")
    rewards = row.get("rewards", {})
    if not isinstance(rewards, dict) or not all(figure(value) for value in rewards.values()):
        raise DataError(file, number, "rewards must be {name: number or null}")
    steps = [row.get("step", 0), row.get("weight_version", row.get("step", 0))]
    if not all(type(x) is int and abs(x) < 2**63 for x in steps):
        raise DataError(file, number, "step and weight_version must be whole numbers")
    last = row["completion_ids"][-1]
    return Rollout(
        row["prompt_ids"], row["completion_ids"], logprobs, mask,
        truncated=bool(row.get("truncated", last not in stops)),
        rewards={str(k): None if v is None else float(v) for k, v in rewards.items()},
        step=steps[0], weight_version=steps[1],
        row=f"{file}:{number}", ground_truth_ids=truth, ground_truth_mask=truth_mask,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# One batch of rollouts from prompts
# ------------------------------------------------------------------------------------------------------------

Engine = EmbeddedEngine | VllmEngine


def make_engine(
    model: Transformer, options: Any, tokenizer: Tokenizer, world: World, prompts: Sequence[Prompt]
) -> Engine:
    """What samples for this config; a replay's evaluations are sampled in this process."""
    if options.rollout_engine == "vllm":
        return VllmEngine(model, options, tokenizer, world, prompts)
    return EmbeddedEngine(model, options, tokenizer, world)


def as_rollouts(
    groups: list[list[Completion]], prompts: Sequence[Prompt], indices: Sequence[int], step: int,
    engine: Engine, stop_ids: Sequence[int],
) -> list[Rollout]:  # fmt: skip
    """The completions of each prompt, in a row."""
    stops, made = set(stop_ids), []
    for prompt, index, group in zip(prompts, indices, groups, strict=True):
        for c in group:
            made.append(
                Rollout(
                    prompt.ids, c.ids, c.logprobs, truncated=c.ids[-1] not in stops, step=step,
                    weight_version=engine.version(step), row=prompt.name, prompt_index=index,
                )
            )  # fmt: skip
    return made


def load_environment(name: str, directory: Path) -> Callable[[], Any]:
    made = import_attribute("environment", name, directory)
    for method in ("reset", "step"):
        if not callable(getattr(made, method, None)):
            raise ConfigError("environment", name, f"has no method {method}")
    return made


def play(
    engine: Engine, environment: Callable[[], Any], prompts: Sequence[Prompt], indices: Sequence[int], n: int,
    *, step: int, seed: tuple[int, ...], options: Any, tokenizer: Tokenizer, world: World,
    temperature: float | None = None,
) -> list[Rollout]:  # fmt: skip
    """Multi-turn rollouts: the policy answers, the environment replies, until it is done or there is no room.

    What the environment says is read but not trained on (mask 0). Its rewards add up under the name
    `environment`. It runs on rank 0 only: what it says is the same for all. A collective.
    """
    played = [(p, i) for p, i in zip(prompts, indices, strict=True) for _ in range(n)]
    rollouts = [
        Rollout(list(p.ids), [], [], [], step=step, weight_version=engine.version(step), row=p.name,
                prompt_index=i, rewards={"environment": 0.0})
        for p, i in played
    ]  # fmt: skip
    worlds: list[Any] = []

    def begin() -> list[list[int]]:
        first = []
        for p, _ in played:
            worlds.append(environment())
            said = worlds[-1].reset(p.prompt, **p.columns)
            first.append(_said_ids(said, p, [], tokenizer) if said is not None else [])
        return first

    for rollout, more in zip(rollouts, dist.from_main(begin, world), strict=True):
        rollout.prompt_ids += more
    active = list(range(len(rollouts)))
    histories: list[list[dict]] = [
        list(p.prompt) if isinstance(p.prompt, list) else [{"role": "user", "content": p.prompt}]
        for p, _ in played
    ]
    for turn in range(options.max_turns):
        rooms = [options.max_completion_length - len(rollouts[i].completion_ids) for i in active]
        texts = [rollouts[i].prompt_ids + rollouts[i].completion_ids for i in active]
        shared = turn == 0 and all(texts[k : k + n] == [texts[k]] * n for k in range(0, len(texts), n))
        if shared:  # nothing was said yet that differs: one prefill for the completions of a prompt
            groups = engine.generate(
                texts[::n], n, seed=(*seed, turn), temperature=temperature, limits=rooms[::n]
            )
            answers = [c for group in groups for c in group]
        else:
            groups = engine.generate(texts, 1, seed=(*seed, turn), temperature=temperature, limits=rooms)
            answers = [group[0] for group in groups]

        def reply(answers=answers, active=tuple(active), turn=turn) -> list[tuple[list[int], float, bool]]:
            replies = []
            for i, answer in zip(active, answers, strict=True):
                text = tokenizer.decode(answer.ids)
                try:
                    said, reward, done = worlds[i].step(text, list(answer.ids))
                except Exception as error:
                    raise BallastError(
                        f"environment: step raised {type(error).__name__}: {error}, on {played[i][0].name}, "
                        f"turn {turn + 1}"
                    ) from error
                histories[i].append({"role": "assistant", "content": text})
                over = (
                    done or said is None or answer.finish_reason == "length" or turn + 1 == options.max_turns
                )
                ids = [] if over else _said_ids(said, played[i][0], histories[i], tokenizer)
                replies.append((ids, float(reward or 0.0), over))
            return replies

        still = []
        for i, answer, (ids, reward, over) in zip(active, answers, dist.from_main(reply, world), strict=True):
            rollout = rollouts[i]
            rollout.completion_ids = rollout.completion_ids + answer.ids
            rollout.completion_mask = (rollout.completion_mask or []) + [1] * len(answer.ids)
            rollout.sampling_logprobs = (rollout.sampling_logprobs or []) + answer.logprobs
            rollout.rewards["environment"] = (rollout.rewards["environment"] or 0.0) + reward
            rollout.truncated = answer.finish_reason == "length"
            room = options.max_completion_length - len(rollout.completion_ids) - len(ids)
            if over or room < 1:
                rollout.truncated = rollout.truncated or not over
                continue
            rollout.completion_ids = rollout.completion_ids + ids
            rollout.completion_mask = rollout.completion_mask + [0] * len(ids)
            rollout.sampling_logprobs = rollout.sampling_logprobs + [None] * len(ids)
            still.append(i)
        active = still
        if not active:
            break
    return rollouts


def _said_ids(said: Any, prompt: Prompt, history: list[dict], tokenizer: Tokenizer) -> list[int]:
    """An environment's words as token ids: ids as they are, text as text, messages through the chat
    template."""
    if isinstance(said, str):
        return tokenizer.encode(said)
    if isinstance(said, list) and said and all(type(i) is int for i in said):
        return said
    if isinstance(said, list) and all(isinstance(m, dict) for m in said) and history:
        try:
            before = tokenizer.render(history)
            after = tokenizer.render([*history, *said], generation_prompt=True)
        except BadRow as error:
            raise BallastError(f"environment: {error} ({prompt.name})") from None
        history.extend(said)
        if after.startswith(before):
            # The template closes the assistant's turn; its end token was sampled, what follows it was not.
            closed = tokenizer.decode([tokenizer.turn_end()], special=True)
            tail = before[before.rfind(closed) + len(closed) :] if closed in before else ""
            return tokenizer.encode(tail + after[len(before) :])
        raise BallastError(
            "environment: this chat template changes earlier turns; return text or token ids, not messages"
        )
    raise BallastError(
        f"environment: said {said!r}; it must be text, token ids, messages or None ({prompt.name})"
    )
