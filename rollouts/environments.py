"""Conversations with an environment."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import dist
from dist import World
from rollouts.rollout import Engine, Rollout
from rollouts.tokens import as_ids, as_logprobs, as_mask
from run.config import BallastError, ConfigError, import_attribute
from text.prompt import Prompt
from text.templates import BadRow
from text.tokenizer import Tokenizer


def load_environment(name: str, directory: Path) -> Callable[[], Any]:
    environment = import_attribute("environment", name, directory)
    for method in ("reset", "step"):
        if not callable(getattr(environment, method, None)):
            raise ConfigError("environment", name, f"has no method {method}")
    return environment


def play(
    engine: Engine, environment: Callable[[], Any], prompts: Sequence[Prompt], indices: Sequence[int], n: int,
    *, step: int, seed: tuple[int, ...], options: Any, tokenizer: Tokenizer, world: World,
    temperature: float | None = None,
) -> list[Rollout]:
    """Multi-turn rollouts: the policy answers, the environment replies, until it ends or the length limit is
    reached.

    Tokens of the environment are context and not trained on (mask 0). Its rewards are summed under the name
    `environment`. It runs on rank 0 only, which sends its replies to all ranks. A collective.
    """
    played = [(p, i) for p, i in zip(prompts, indices, strict=True) for _ in range(n)]
    rollouts = [
        Rollout(as_ids(p.ids), as_ids([]), as_logprobs([]), as_mask([]), step=step,
                weight_version=engine.version(step), row=p.name, prompt_index=i, rewards={"environment": 0.0})
        for p, i in played
    ]
    worlds: list[Any] = []

    def begin() -> list[list[int]]:
        first = []
        for p, _ in played:
            worlds.append(environment())
            observation = worlds[-1].reset(p.prompt, **p.columns)
            first.append(_said_ids(observation, p, [], tokenizer) if observation is not None else [])
        return first

    for rollout, more in zip(rollouts, dist.from_main(begin, world), strict=True):
        if more:
            rollout.prompt_ids = np.concatenate([rollout.prompt_ids, as_ids(more)])
    active = list(range(len(rollouts)))
    histories: list[list[dict]] = [
        list(p.prompt) if isinstance(p.prompt, list) else [{"role": "user", "content": p.prompt}]
        for p, _ in played
    ]
    for turn in range(options.max_turns):
        rooms = [options.max_completion_length - len(rollouts[i].completion_ids) for i in active]
        texts = [[*rollouts[i].prompt_ids.tolist(), *rollouts[i].completion_ids.tolist()] for i in active]
        shared = turn == 0 and all(texts[k : k + n] == [texts[k]] * n for k in range(0, len(texts), n))
        if shared:  # the texts of a prompt do not differ yet: one prefill serves its completions
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
                    observation, reward, done = worlds[i].step(text, answer.ids.tolist())
                except Exception as error:
                    raise BallastError(
                        f"environment: step raised {type(error).__name__}: {error}, on {played[i][0].name}, "
                        f"turn {turn + 1}"
                    ) from error
                histories[i].append({"role": "assistant", "content": text})
                over = (
                    done or observation is None or answer.finish_reason == "length"
                    or turn + 1 == options.max_turns
                )
                ids = [] if over else _said_ids(observation, played[i][0], histories[i], tokenizer)
                replies.append((ids, float(reward or 0.0), over))
            return replies

        still = []
        for i, answer, (ids, reward, over) in zip(active, answers, dist.from_main(reply, world), strict=True):
            rollout = rollouts[i]
            _extend(rollout, answer.ids, answer.logprobs, True)
            rollout.rewards["environment"] = (rollout.rewards["environment"] or 0.0) + reward
            rollout.truncated = answer.finish_reason == "length"
            room = options.max_completion_length - len(rollout.completion_ids) - len(ids)
            if over or room < 1:
                rollout.truncated = rollout.truncated or not over
                continue
            _extend(rollout, as_ids(ids), np.full(len(ids), np.nan, np.float32), False)
            still.append(i)
        active = still
        if not active:
            break
    return rollouts


def _extend(rollout: Rollout, ids: np.ndarray, logprobs: np.ndarray, written: bool) -> None:
    assert rollout.sampling_logprobs is not None and rollout.completion_mask is not None
    rollout.completion_ids = np.concatenate([rollout.completion_ids, ids])
    rollout.sampling_logprobs = np.concatenate([rollout.sampling_logprobs, logprobs])
    rollout.completion_mask = np.concatenate([rollout.completion_mask, np.full(len(ids), written)])


def _said_ids(observation: Any, prompt: Prompt, history: list[dict], tokenizer: Tokenizer) -> list[int]:
    """An observation as token ids: ids are kept, text is tokenised, messages go through the chat template."""
    if isinstance(observation, str):
        return tokenizer.encode_rest(observation)
    if isinstance(observation, list) and observation and all(type(i) is int for i in observation):
        return observation
    if isinstance(observation, list) and all(isinstance(m, dict) for m in observation) and history:
        try:
            before = tokenizer.render(history, prompt.tools)
            after = tokenizer.render([*history, *observation], prompt.tools, generation_prompt=True)
        except BadRow as error:
            raise BallastError(f"environment: {error} ({prompt.name})") from None
        history.extend(observation)
        if after.startswith(before):
            # The template closes the assistant's turn; its end token was sampled, what follows it was not.
            closed = tokenizer.decode([tokenizer.turn_end()], special=True)
            tail = before[before.rfind(closed) + len(closed) :] if closed in before else ""
            return tokenizer.encode_rest(tail + after[len(before) :])
        raise BallastError(
            "environment: this chat template changes earlier turns; return text or token ids, not messages"
        )
    raise BallastError(
        f"environment: returned {observation!r}; it must be text, token ids, messages or None ({prompt.name})"
    )
