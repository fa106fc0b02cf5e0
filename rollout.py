"""Rollouts: prompts in, completions with the log-probabilities that they were drawn from out.

Three engines make them. Embedded: our own `generate`, in this process, on policy by construction. vLLM: one
or several servers over HTTP, token ids in and out, which get the trainer's weights every vllm_sync_interval
steps; after each sync a probe is scored on both sides, for a 200 from a server is no proof. Replay: a file
that an earlier run, or another program, wrote.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import torch

import checkpoint
import dist
import memory
from config import BallastError, ConfigError, DataError, check_at_least_one, import_attribute
from data import Prompt
from dist import World
from generation import generate
from health import log
from model import Transformer
from tokenizer import BadRow, Tokenizer
from vllm_client import VllmEngine
from vllm_server import MEMORY, Completion


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
    rollout_batch_size: int | None = None
    """embedded: at most so many sequences at a time; bounds the key/value cache. Unset: 512, or fewer where
    the GPU's memory does not hold that many."""
    replay_path: str | None = None
    """replay: a JSONL file (or a directory of step-N.jsonl) of rollouts instead of sampling."""
    max_turns: int = 8
    """Multi-turn: at most so many answers in one completion."""
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
    vllm_sync_directory: str = MEMORY
    """Where weights for servers are put for a moment: memory of this host, or a shared file system."""
    vllm_sync_address: str | None = None
    """nccl: the address of this host under which the servers reach it; unset: its own on the way to them."""
    vllm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the server computes in; auto: bfloat16 with bf16: true, else float32."""
    vllm_timeout: float = 600.0
    """Seconds to wait for a server that does not answer; then the run saves and stops."""
    vllm_probe_tolerance: float | None = None
    """Largest mean difference of log-probs between server and trainer after a sync; unset: 1e-3 where both
    are fp32, else 0.1."""
    vllm_allow_missing_servers: bool = False
    """Go on with the servers that answer where others do not within vllm_timeout."""
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
    """serve: GPUs a server."""
    log_completions: bool = False
    """Show a few completions at every logged step, with their rewards or beside their truths, and all of them
    in wandb."""

    def check(self) -> None:
        check_at_least_one(
            self, "num_generations", "max_completion_length", "rollout_batch_size", "max_turns",
            "vllm_sync_interval", "vllm_tensor_parallel_size", "max_prompt_length", "vllm_max_model_len",
        )  # fmt: skip
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
                )  # fmt: skip
        if (self.rollout_engine == "replay") != (self.replay_path is not None):
            raise ConfigError("replay_path", self.replay_path, "goes together with rollout_engine: replay")
        if self.async_prefetch and self.rollout_engine != "vllm":
            raise ConfigError(
                "async_prefetch", True, "needs rollout_engine: vllm; in one process nothing overlaps"
            )
        if self.rollout_engine == "vllm":
            if not self.vllm_server_base_url:
                raise ConfigError("vllm_server_base_url", None, "must name at least one server")
            for url in self.vllm_server_base_url:
                if not url.startswith(("http://", "https://")):
                    raise ConfigError("vllm_server_base_url", url, "must begin with http:// or https://")
                if urlparse(url).username or urlparse(url).password:
                    raise ConfigError(
                        "vllm_server_base_url", None,
                        "holds a user name or password, which would stand in config.yaml and the logs; reach "
                        "the server through an SSH tunnel or a private network instead",
                    )  # fmt: skip


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
        self._left: float | None = None  # bytes for sampling, once they were asked for
        self._fewest = memory.MOST_ROWS

    def generate(
        self, prompts: list[list[int]], n: int, *, seed: tuple[int, ...], temperature: float | None = None,
        limits: list[int] | None = None, on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """`n` completions of each prompt, the same on every rank. `limits` are most tokens by prompt. A
        collective; `on_group(prompt, completions)` is called on rank 0."""
        world = self.world
        limits = limits or [self.options.max_completion_length] * len(prompts)
        mine = list(range(world.rank, len(prompts), world.size))
        at_once = max(1, self._rows(max(map(len, prompts)) + max(limits)) // n)
        most = math.ceil(len(prompts) / world.size)
        rounds = math.ceil(most / at_once)  # as many on every rank: each is a collective
        drawn = random.Random(repr((seed, world.rank))).getrandbits(62)
        generator = torch.Generator(world.device).manual_seed(drawn)
        made: dict[int, list[Completion]] = {}

        def anyone(active: bool) -> bool:
            return active if world.size == 1 else dist.all_reduce([float(active)], world)[0] > 0

        for turn in range(rounds):
            part = mine[turn * at_once : (turn + 1) * at_once]
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

    def _rows(self, length: int) -> int:
        """Sequences of this length that are sampled at once."""
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
            before = tokenizer.render(history, prompt.tools)
            after = tokenizer.render([*history, *said], prompt.tools, generation_prompt=True)
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
