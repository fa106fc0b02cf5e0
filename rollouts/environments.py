"""Conversations with an environment: the policy answers, the environment replies, until one of them ends it.

Environments live on rank 0. Their calls run beside each other, and beside sampling where the engine is a
server; a call that takes longer than environment_timeout costs its row, not the step.
"""

import asyncio
import contextlib
import functools
import inspect
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import dist
from dist import World
from rollouts.rollout import Engine, Rollout
from rollouts.tokens import as_ids, as_logprobs, as_mask
from rollouts.vllm_server import Completion
from run.config import BallastError, ConfigError, check_at_least_one, import_attribute
from text.prompt import Prompt
from text.templates import BadRow
from text.tokenizer import Tokenizer


@dataclass
class EnvironmentOptions:
    environment: str | None = None
    """Multi-turn: module.Class with reset(prompt, **columns) and step(text, ids) → (observation, reward,
    done), plain or async."""
    tools: list[str] = field(default_factory=list)
    """Python functions that the policy may call, as module.function with type hints and a docstring, or
    module.Class, whose public methods are tools and which is made anew for each conversation. Results come
    back as tool messages, which are not trained on, for at most max_turns answers."""
    tool_timeout: float = 30.0
    """Seconds that a tool may take; then its call is answered with an error."""
    environment_workers: int = 256
    """Conversations, and calls of environments, at the same time."""
    environment_timeout: float = 600.0
    """Seconds that a call of an environment may take; then its completion is left out of the loss, and
    counted."""

    def check(self) -> None:
        check_at_least_one(self, "environment_workers")
        for key in ("environment_timeout", "tool_timeout"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ConfigError(key, getattr(self, key), "must be above 0")
        if self.tools and self.environment:
            raise ConfigError("tools", self.tools, "are an environment of their own: drop `environment`")


def load_environment(name: str, directory: Path) -> Callable[[], Any]:
    environment = import_attribute("environment", name, directory)
    for method in ("reset", "step"):
        if not callable(getattr(environment, method, None)):
            raise ConfigError("environment", name, f"has no method {method}")
    return environment


# ------------------------------------------------------------------------------------------------------------
# Calls at the same time
# ------------------------------------------------------------------------------------------------------------


class TimedOut(Exception):
    """A call took longer than it may."""


_ONE = threading.Lock()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for all coroutines, on a thread of its own: clients and sessions belong to a loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="environments").start()
    return loop


def finished(value: Any) -> Any:
    """The value itself, or what it comes to if it can be awaited."""
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    with _ONE:  # a cache alone could make two
        loop = _loop()
    return asyncio.run_coroutine_threadsafe(wait(), loop).result()


def run_all(calls: Sequence[Callable[[], Any]], workers: int, timeout: float) -> list[Any]:
    """What each call returns, or the exception that it raised (TimedOut after `timeout` seconds), at most
    `workers` of them at a time. A thread that is late is left behind: nothing can stop it."""
    results: list[Any] = [TimedOut()] * len(calls)
    done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    waiting, running = deque(range(len(calls))), {}

    def one(i: int) -> None:
        try:
            done.put((i, finished(calls[i]())))
        except BaseException as error:  # handed to the caller, whatever it is
            done.put((i, error))

    while waiting or running:
        while waiting and len(running) < workers:
            i = waiting.popleft()
            running[i] = time.monotonic() + timeout
            threading.Thread(target=one, args=(i,), daemon=True, name="environment").start()
        try:
            i, found = done.get(timeout=max(0.0, min(running.values()) - time.monotonic()))
            if running.pop(i, None) is not None:
                results[i] = found
        except queue.Empty:
            now = time.monotonic()
            running = {i: end for i, end in running.items() if end > now}
    return results


def _limits(options: Any) -> tuple[int, float]:
    """(workers, timeout); EBFT's conversations, which need neither, have no such options."""
    default = EnvironmentOptions()
    return (getattr(options, "environment_workers", default.environment_workers),
            getattr(options, "environment_timeout", default.environment_timeout))


# ------------------------------------------------------------------------------------------------------------
# Conversations
# ------------------------------------------------------------------------------------------------------------


class Episode:
    """One conversation, on rank 0."""

    def __init__(self, make: Callable[[], Any], prompt: Prompt, options: Any, tokenizer: Tokenizer):
        self.make, self.prompt, self.options, self.tokenizer = make, prompt, options, tokenizer
        self.prompt_ids = as_ids(prompt.ids)
        self.ids, self.logprobs, self.mask = as_ids([]), as_logprobs([]), as_mask([])
        self.versions = as_ids([])  # of the weights that wrote each token, where an engine tells
        self.rewards: list[tuple[int, float]] = []  # (tokens until then, reward) of each turn
        self.over = self.failed = self.truncated = False
        text = prompt.prompt
        self.history = list(text) if isinstance(text, list) else [{"role": "user", "content": text}]
        self.world: Any = None
        self.asked = len(self.history)  # messages before the first answer

    def begin(self) -> None:
        """Make the environment and hear what it says first."""
        self.world = self.make()
        said = finished(self.world.reset(self.prompt.prompt, **self.prompt.columns))
        if isinstance(said, list) and said and isinstance(said[0], dict):
            self.history = _joined(self.history, said)
            self.prompt_ids = as_ids(self.tokenizer.encode_prompt(self.history, self.prompt.tools))
        elif said is not None:
            more = _said_ids(said, self.prompt, [], self.tokenizer)
            self.prompt_ids = np.concatenate([self.prompt_ids, as_ids(more)])
        self.asked = len(self.history)

    @property
    def context(self) -> list[int]:
        return [*self.prompt_ids.tolist(), *self.ids.tolist()]

    @property
    def room(self) -> int:
        return self.options.max_completion_length - len(self.ids)

    def extend(self, ids: np.ndarray, logprobs: np.ndarray, written: bool) -> None:
        self.ids, self.logprobs = np.concatenate([self.ids, ids]), np.concatenate([self.logprobs, logprobs])
        self.mask = np.concatenate([self.mask, np.full(len(ids), written)])

    def answered(self, answer: Completion) -> None:
        """Take the policy's answer, and hear what the environment says to it."""
        self.extend(answer.ids, answer.logprobs, True)
        if answer.versions is not None:
            self.versions = np.concatenate([self.versions, answer.versions])
        text = self.tokenizer.decode(answer.ids)
        observation, reward, done = finished(self.world.step(text, answer.ids.tolist()))
        self.rewards.append((len(self.ids), float(reward or 0.0)))
        self.history.append(getattr(self.world, "message", {"role": "assistant", "content": text}))
        cut = answer.finish_reason == "length"
        self.truncated = cut
        last = done or observation is None or cut or len(self.rewards) == self.options.max_turns
        ids = [] if last else _said_ids(observation, self.prompt, self.history, self.tokenizer)
        if last and isinstance(observation, list) and all(isinstance(m, dict) for m in observation):
            self.history += observation
        self.over = last or self.room - len(ids) < 1
        if self.over:
            self.truncated = cut or not last
        else:
            self.extend(as_ids(ids), np.full(len(ids), np.nan, np.float32), False)
            if len(self.versions):
                self.versions = np.concatenate([self.versions, np.full(len(ids), self.versions[-1])])

    def fail(self, error: Any) -> None:
        """End it: a time-out costs the row; what else was raised ends the run."""
        if isinstance(error, TimedOut):
            self.over = self.failed = True
        elif isinstance(error, BallastError):
            raise error
        elif isinstance(error, BaseException):
            method = "step" if len(self.ids) else "reset"
            raise BallastError(
                f"environment: {method} raised {type(error).__name__}: {error}, on {self.prompt.name}, "
                f"turn {len(self.rewards) + 1}"
            ) from error

    def talk(self, ask: Callable[..., list[Completion]], seed: tuple, temperature: float | None) -> "Episode":
        """The whole conversation with a server, at its own pace."""
        how = {"workers": 1, "timeout": _limits(self.options)[1]}
        self.fail(run_all([self.begin], **how)[0])
        while not self.over:
            turn = len(self.rewards)
            (answer,) = ask(self.context, 1, self.room, temperature, (*seed, turn))
            self.fail(run_all([functools.partial(self.answered, answer)], **how)[0])
        return self

    def earned(self) -> dict[str, float | None]:
        """Its reward by name; tools give none."""
        if not getattr(self.world, "rewards", True):
            return {}
        return {"environment": None if self.failed else float(sum(reward for _, reward in self.rewards))}

    def told(self) -> dict[str, Any]:
        """What becomes a rollout of it. One whose environment never answered has a token that is not
        trained."""
        ids, logprobs, mask = self.ids, self.logprobs, self.mask
        if not len(ids):
            ids, logprobs, mask = as_ids(self.tokenizer.stop_ids[:1]), as_logprobs([None]), as_mask([0])
        ends, rewards = zip(*self.rewards, strict=True) if self.rewards else ((), ())
        return {
            "prompt_ids": self.prompt_ids, "completion_ids": ids, "sampling_logprobs": logprobs,
            "completion_mask": np.zeros_like(mask) if self.failed else mask, "failed": self.failed,
            "messages": self.history[self.asked :],
            "token_versions": self.versions if len(self.versions) == len(ids) else None,
            "truncated": self.truncated, "step_ends": as_ids(ends), "step_rewards": as_logprobs(rewards),
            "rewards": self.earned(),
        }


def play(
    engine: Engine, environment: Callable[[], Any], prompts: Sequence[Prompt], indices: Sequence[int], n: int,
    *, step: int, seed: tuple[int, ...], options: Any, tokenizer: Tokenizer, world: World,
    temperature: float | None = None,
) -> list[Rollout]:
    """n conversations about each prompt, until the environment ends them or a limit is reached. A server is
    asked by each of them as soon as its environment has answered; the embedded engine samples a turn of all
    of them together.

    Tokens of the environment are context and not trained on (mask 0). Its rewards are summed under the name
    `environment`. A collective.
    """
    tasks = conversations(environment, prompts, n, seed, options, tokenizer, temperature)
    if hasattr(engine, "converse"):
        told = engine.converse(tasks)  # type: ignore[attr-defined]
    else:
        episodes = [Episode(environment, p, options, tokenizer) for p in prompts for _ in range(n)]
        told = _in_turns(engine, episodes, n, seed, options, world, temperature)
    return played(told, prompts, indices, n, step, engine)


def conversations(
    environment: Callable[[], Any], prompts: Sequence[Prompt], n: int, seed: tuple[int, ...], options: Any,
    tokenizer: Tokenizer, temperature: float | None = None,
) -> Callable[[], list[Callable]]:
    """What makes the tasks of an engine that is asked by each conversation: n about each prompt."""
    return lambda: [
        functools.partial(
            Episode(environment, p, options, tokenizer).talk, seed=(*seed, k), temperature=temperature
        )
        for k, p in enumerate(p for p in prompts for _ in range(n))
    ]


def played(
    told: list[dict[str, Any]], prompts: Sequence[Prompt], indices: Sequence[int], n: int, step: int,
    engine: Engine,
) -> list[Rollout]:
    """The rollouts of what conversations told, n about each prompt."""
    about = [(p, i) for p, i in zip(prompts, indices, strict=True) for _ in range(n)]
    return [
        Rollout(**fields, step=step, weight_version=engine.version(step), row=p.name, prompt_index=i)
        for (p, i), fields in zip(about, told, strict=True)
    ]


def _in_turns(
    engine: Engine, episodes: list[Episode], n: int, seed: tuple[int, ...], options: Any, world: World,
    temperature: float | None,
) -> list[dict[str, Any]]:
    """All conversations, a turn of each at a time; those of rank 0 are held. A collective."""

    def at_once(some: list[Episode], calls: list[Callable[[], None]]) -> None:
        results = run_all(calls, *_limits(options))
        for episode, result in zip(some, results, strict=True):
            episode.fail(result)

    def begin() -> list[tuple[list[int], int]]:
        at_once(episodes, [e.begin for e in episodes])
        return asked()

    def asked() -> list[tuple[list[int], int]]:
        return [(e.context, e.room) for e in episodes if not e.over]

    contexts, turn = dist.from_main(begin, world, long=True), 0
    while contexts:
        texts, rooms = zip(*contexts, strict=True)
        if turn == 0 and len(texts) % n == 0 and all(
            texts[k : k + n] == (texts[k],) * n for k in range(0, len(texts), n)
        ):  # the texts of a prompt do not differ yet: one prefill serves its completions
            groups = engine.generate(
                [*texts[::n]], n, seed=(*seed, turn), temperature=temperature, limits=[*rooms[::n]]
            )
        else:
            groups = engine.generate(
                [*texts], 1, seed=(*seed, turn), temperature=temperature, limits=[*rooms]
            )
        answers = [answer for group in groups for answer in group]

        def reply(answers: list[Completion] = answers) -> list[tuple[list[int], int]]:
            active = [e for e in episodes if not e.over]
            at_once(active, [functools.partial(e.answered, a) for e, a in zip(active, answers, strict=True)])
            return asked()

        contexts, turn = dist.from_main(reply, world, long=True), turn + 1
    return dist.from_main(lambda: [e.told() for e in episodes], world)


def _joined(messages: list[dict], more: list[dict]) -> list[dict]:
    """The messages with more behind them; two of the user in a row, which some templates refuse, are one."""
    if messages and messages[-1]["role"] == more[0].get("role") == "user":
        both = "\n\n".join(str(m.get("content") or "") for m in (messages[-1], more[0]))
        return [*messages[:-1], {**messages[-1], "content": both}, *more[1:]]
    return [*messages, *more]


def _said_ids(observation: Any, prompt: Prompt, history: list[dict], tokenizer: Tokenizer) -> list[int]:
    """An observation as token ids: ids are kept, text is tokenised, messages go through the chat template."""
    if isinstance(observation, str):
        return tokenizer.encode_rest(observation)
    if isinstance(observation, list) and observation and all(type(i) is int for i in observation):
        return observation
    if isinstance(observation, list) and all(isinstance(m, dict) for m in observation) and history:
        try:
            more = _after_answer(observation, prompt, history, tokenizer)
        except BadRow as error:
            raise BallastError(f"environment: {error} ({prompt.name})") from None
        history.extend(observation)
        if more is not None:
            return tokenizer.encode_rest(more)
        raise BallastError(
            "environment: this chat template changes earlier turns; return text or token ids, not messages"
        )
    raise BallastError(
        f"environment: returned {observation!r}; it must be text, token ids, messages or None ({prompt.name})"
    )


ANSWER = "the answer of the policy stands here"


def _after_answer(
    observation: list[dict], prompt: Prompt, history: list[dict], tokenizer: Tokenizer
) -> str | None:
    """What the chat template writes after the end token of the last answer: the observation, and the
    beginning of the next answer. None where that cannot be told apart from what stands before.

    A template may write an answer otherwise when something follows it (Qwen3 puts an empty <think> into the
    last one alone), so a placeholder stands for it here: what the policy has read and written stays as it is.
    """
    closed = tokenizer.decode([tokenizer.turn_end()], special=True)
    with contextlib.suppress(BadRow):  # a template may want the calls that a tool answers
        marked = [*history[:-1], {"role": "assistant", "content": ANSWER}, *observation]
        _, found, rest = tokenizer.render(marked, prompt.tools, generation_prompt=True).rpartition(ANSWER)
        before, end, after = rest.partition(closed)
        if found and end and not before.strip():
            return after
    head = tokenizer.render(history, prompt.tools)
    whole = tokenizer.render([*history, *observation], prompt.tools, generation_prompt=True)
    if not whole.startswith(head):
        return None
    # The template closes the assistant's turn; its end token was sampled, what follows it was not.
    return (head[head.rfind(closed) + len(closed) :] if closed in head else "") + whole[len(head) :]
