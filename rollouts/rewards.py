"""Rewards: the functions that judge a completion, built in or your own, and the scorer that calls them and
names the function, the row and the completion where one goes wrong.
"""

import asyncio
import inspect
import math
import re
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollouts.judge import Judge, JudgeOptions
from rollouts.tokens import IdLists, as_ids
from run.config import BallastError, ConfigError, import_attribute
from run.log import log
from text.conversations import is_null
from text.prompt import Prompt
from text.tokenizer import Tokenizer


@dataclass
class RewardOptions(JudgeOptions):
    reward_funcs: list[str] = field(default_factory=list)
    """Reward functions: exact_match, numeric_match, reasoning_gym, format, length, llm_judge, or your own
    module.function (from the config's directory or an installed package), called as f(prompts=…,
    completions=…, completion_ids=…, **columns) and returning a number, or None where it does not apply, for
    each completion."""
    reward_weights: list[float] | None = None
    """One weight per function; unset: 1 each."""
    reward_timeout: float = 300.0
    """Seconds that a reward function may take for a batch."""
    reward_format: str = r"(?s)<think>.*</think>.*<answer>.*</answer>\s*"
    """`format` gives 1 where the whole completion matches this regular expression, else 0."""

    def check(self) -> None:
        weights = self.reward_weights
        if weights is not None and len(weights) != len(self.reward_funcs):
            raise ConfigError("reward_weights", weights, f"must have {len(self.reward_funcs)} entries")
        if weights is not None and not all(math.isfinite(weight) for weight in weights):
            raise ConfigError("reward_weights", weights, "must be finite numbers")
        if weights and not any(weights):
            raise ConfigError("reward_weights", weights, "are all 0: nothing would be learnt")
        if not 0 < self.reward_timeout < math.inf:
            raise ConfigError("reward_timeout", self.reward_timeout, "must be above 0")
        try:
            re.compile(self.reward_format)
        except re.error as error:
            raise ConfigError(
                "reward_format", self.reward_format, f"is no regular expression: {error}"
            ) from None


class RewardError(BallastError):
    """A reward function that cannot be used, or that failed: named with the row and the completion."""


def completion_text(completion: str | list[dict]) -> str:
    """The text of a completion, which is a list of messages if the prompt is one."""
    return completion if isinstance(completion, str) else "".join(m.get("content") or "" for m in completion)


def answer_text(completion: str | list[dict]) -> str:
    """The text of a completion, or of the last answer of a conversation."""
    if isinstance(completion, str):
        return completion
    answers = [m for m in completion if m.get("role") == "assistant"]
    return completion_text(answers[-1:])


def exact_match(completions: list, answer: list, **_: Any) -> list[float | None]:
    """1 if the completion equals the answer, ignoring white space at its ends; None without an answer."""
    return [
        None if is_null(a) else float(answer_text(c).strip() == str(a).strip())
        for c, a in zip(completions, answer, strict=True)
    ]


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def _last_number(text: str) -> float | None:
    numbers = NUMBER.findall(text.split("####")[-1])  # GSM8K puts the answer after ####
    if not numbers:
        return None
    number, _, below = numbers[-1].replace(",", "").partition("/")
    return float(number) / float(below) if below and float(below) else float(number)


def numeric_match(completions: list, answer: list, **_: Any) -> list[float | None]:
    """1 if the last number of the completion is the answer's; also for equivalent mathematical forms if
    math-verify is installed. None without an answer."""
    try:
        from math_verify import parse, verify  # type: ignore[import-not-found]
    except ImportError:
        parse = verify = None
    scores: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        if is_null(expected):
            scores.append(None)
            continue
        text, wanted = answer_text(completion), _last_number(str(expected))
        right = wanted is not None and _last_number(text) == wanted
        if not right and parse is not None and verify is not None:
            # Its timeouts use signals, which fail in threads; reward_timeout limits the whole call.
            forms = [parse(t, parsing_timeout=None) for t in (str(expected), text)]
            right = bool(verify(*forms, timeout_seconds=None))
        scores.append(float(right))
    return scores


def reasoning_gym(completions: list, answer: list, metadata: list, **columns: Any) -> list[float | None]:
    """reasoning-gym's own verifier of the task that the row came from; None without answer or metadata."""
    import reasoning_gym as gym  # optional dependency: .[tiny]

    questions = columns.get("question") or [""] * len(answer)
    scores: list[float | None] = []
    for completion, a, meta, question in zip(completions, answer, metadata, questions, strict=True):
        if is_null(a) or is_null(meta):
            scores.append(None)
            continue
        score: Any = gym.get_score_answer_fn(meta["source_dataset"])
        entry = {"question": question, "answer": a, "metadata": meta}
        scores.append(float(score(answer_text(completion).strip(), entry)))
    return scores


def built_in_rewards(config: Any) -> dict[str, Callable]:
    def matches(completions: list, **_: Any) -> list[float]:
        return [
            float(re.fullmatch(config.reward_format, completion_text(c)) is not None) for c in completions
        ]

    def overlong(completion_ids: list[list[int]], **_: Any) -> list[float]:
        """0 up to 80 % of max_completion_length, then falling to −1 at the limit (DAPO, arXiv 2503.14476, eq.
        13)."""
        limit, room = config.max_completion_length, 0.2 * config.max_completion_length
        return [min(0.0, max(-1.0, (limit - room - len(ids)) / room)) for ids in completion_ids]

    return {
        "exact_match": exact_match, "numeric_match": numeric_match, "reasoning_gym": reasoning_gym,
        "format": matches, "length": overlong,
    }


def import_reward(name: str, config: Any) -> Callable:
    """A built-in by name, or module.function from the config's directory or an installed package."""
    built_in, directory = built_in_rewards(config), config.config_directory
    if name in built_in:
        return built_in[name]
    if name == "llm_judge":
        return Judge(config).llm_judge
    if "." not in name:
        known = ", ".join([*built_in, "llm_judge"])
        raise ConfigError("reward_funcs", name, f"is neither built in ({known}) nor a module.function")
    function = import_attribute("reward_funcs", name, directory)
    if not callable(function):
        raise ConfigError("reward_funcs", name, "is not a function")
    return function


class Steps(float):
    """The score of a completion that is rewarded step by step: the sum, with (tokens until then, reward) of
    each step."""

    steps: list[tuple[int, float]]

    @staticmethod
    def of(score: Any, length: int) -> "float | Steps | None":
        """What a function returned for a completion of so many tokens. Raises ValueError or TypeError."""
        if not isinstance(score, list | tuple):
            return None if score is None else float(score)
        steps = [(int(end), float(reward)) for end, reward in score]
        if not all(1 <= end <= length for end, _ in steps):
            raise ValueError(f"a step must end after 1 to {length} tokens")
        whole = Steps(sum(reward for _, reward in steps))
        whole.steps = steps
        return whole


class Scorer:
    """The reward functions of a run, each on a thread of its own. Lives on rank 0."""

    def __init__(self, config: Any, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.functions = {
            name.rpartition(".")[2] or name: import_reward(name, config) for name in config.reward_funcs
        }
        if len(self.functions) < len(config.reward_funcs):
            raise ConfigError("reward_funcs", config.reward_funcs, "has two functions of the same name")
        self.threads = ThreadPoolExecutor(max(1, 4 * len(self.functions)), thread_name_prefix="reward")

    def metrics(self) -> dict[str, float]:
        """What the functions have to say of themselves: the judge's replies and their cost."""
        judge = getattr(self.functions.get("llm_judge"), "__self__", None)
        return judge.metrics() if judge is not None else {}

    def begin(
        self, prompts: Sequence[Prompt], ids: Sequence[Any], messages: Sequence[list[dict] | None] = ()
    ) -> dict[str, Future]:
        """Start scoring completions `ids`; prompts[i] belongs to ids[i], and so do messages[i], what was said
        in a conversation."""
        arguments = self.arguments(prompts, ids, messages)
        names = [p.name for p in prompts]
        return {
            name: self.threads.submit(self._call, name, function, arguments, names)
            for name, function in self.functions.items()
        }

    def arguments(
        self, prompts: Sequence[Prompt], ids: Sequence[Any], messages: Sequence[list[dict] | None] = ()
    ) -> dict[str, Sequence]:
        """The keyword arguments of every reward function; one entry per completion."""
        texts = self.tokenizer.decode_all(ids)
        completions = [
            said or (text if isinstance(p.prompt, str) else [{"role": "assistant", "content": text}])
            for p, text, said in zip(prompts, texts, messages or [None] * len(texts), strict=True)
        ]
        columns = {
            key: [p.columns.get(key) for p in prompts]
            for key in sorted({k for p in prompts for k in p.columns})
        }
        return {**columns, "prompts": [p.prompt for p in prompts], "completions": completions,
                "completion_ids": IdLists([as_ids(i) for i in ids])}

    def finish(self, started: dict[str, Future]) -> dict[str, list[float | None]]:
        """Scores by function. RewardError if a function raises, times out or returns no valid scores."""
        deadline, scores = time.monotonic() + self.config.reward_timeout, {}
        for name, future in started.items():
            try:
                scores[name] = future.result(max(0.0, deadline - time.monotonic()))
            except FutureTimeout:
                raise RewardError(
                    f"reward {name}: no answer within {self.config.reward_timeout:g} s (reward_timeout); "
                    "try it with `python grpo.py test-rewards`"
                ) from None
        return scores

    def _call(self, name: str, function: Callable, arguments: dict, names: list[str]) -> list[float | None]:
        count = len(names)

        def run(kwargs: dict) -> Any:
            returned = function(**kwargs)
            return asyncio.run(returned) if inspect.iscoroutinefunction(function) else returned

        try:
            scores = run(arguments)
        except BallastError as error:  # of our own: clear, and names the function
            raise RewardError(f"reward {error}") from None
        except Exception as error:
            where = self._culprit(run, arguments, count)
            saved = self._save_traceback(name)
            shown = completion_text(arguments["completions"][where]) if where is not None else ""
            row = f"{names[where]}, completion {shown[:80]!r}" if where is not None else f"a batch of {count}"
            columns = ", ".join(k for k in arguments if k not in ("prompts", "completions", "completion_ids"))
            hint = (
                f"; it gets the columns {columns or '(none)'}"
                if isinstance(error, (TypeError, KeyError))
                else ""
            )
            raise RewardError(
                f"reward {name}: raised {type(error).__name__}: {error}, on {row}{hint}; traceback in {saved}"
            ) from None
        if not isinstance(scores, (list, tuple, np.ndarray, Tensor)) or len(scores) != count:
            length = len(scores) if hasattr(scores, "__len__") else type(scores).__name__
            raise RewardError(f"reward {name}: returned {length}, wanted a list of {count} numbers")
        checked: list[float | None] = []
        for i, score in enumerate(scores):
            try:
                value = Steps.of(score, len(arguments["completion_ids"][i]))
            except (TypeError, ValueError):
                value = math.nan
            if value is not None and not math.isfinite(value):
                shown = completion_text(arguments["completions"][i])
                raise RewardError(
                    f"reward {name}: returned {score!r} for {names[i]}, completion {shown[:80]!r}; a score "
                    "is a finite number, or None where it does not apply (or a list of (tokens until then, "
                    "reward))"
                )
            checked.append(value)
        return checked

    @staticmethod
    def _culprit(run: Callable, arguments: dict, count: int) -> int | None:
        """The first row for which a call with that row alone raises."""
        for i in range(count):
            try:
                run({key: values[i : i + 1] for key, values in arguments.items()})
            except Exception:
                return i
        return None

    def _save_traceback(self, name: str) -> Path:
        directory = Path(self.config.output_dir) / "incidents"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"reward-{name}.txt"
        path.write_text(traceback.format_exc(), encoding="utf-8")
        return path


# ------------------------------------------------------------------------------------------------------------
# The scores of a batch
# ------------------------------------------------------------------------------------------------------------


def weights_by_name(config: Any) -> dict[str, float]:
    """reward_weights by the short names of their functions."""
    given = zip(config.reward_funcs, config.reward_weights or (), strict=False)
    return {name.rpartition(".")[2] or name: weight for name, weight in given}


def reward_table(rollouts: Sequence[Any], config: Any) -> tuple[Tensor, list[str], Tensor]:
    """(rewards [B, R] in fp64 with NaN where a function does not apply, their names, weights [R])."""
    weights = dict.fromkeys((name for r in rollouts for name in r.rewards), 1.0) | weights_by_name(config)
    names = list(weights)
    if not names and not getattr(config, "teacher_model", None):
        raise BallastError("no rollout has a reward: name reward_funcs, or record rewards with the rollouts")
    table = [
        [math.nan if r.rewards.get(n) is None else float(r.rewards[n] or 0.0) for n in names]
        for r in rollouts
    ]
    return torch.tensor(table, dtype=torch.float64), names, torch.tensor([weights[n] for n in names]).double()


def weighted_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """rewards [B, R], NaN where a function does not apply, to [B]: their weighted sum; NaN where none
    applies."""
    total = (torch.nan_to_num(rewards, nan=0.0) * weights).sum(-1)
    return torch.where(torch.isnan(rewards).all(-1), torch.nan, total)


def spread(values: Tensor) -> float:
    """Unbiased standard deviation; exactly 0 of equal numbers."""
    return values.std().item() if len(values) > 1 and (values != values[0]).any() else 0.0


def reward_metrics(rewards: Tensor, names: Sequence[str]) -> dict[str, float]:
    """rewards/<name>/mean and std over the rows where the function applied; functions that applied to no row
    are left out. rewards [B, R]."""
    metrics = {}
    for i, name in enumerate(names):
        column = rewards[:, i][~torch.isnan(rewards[:, i])]
        if len(column):
            metrics[f"rewards/{name}/mean"] = column.mean().item()
            metrics[f"rewards/{name}/std"] = spread(column)
    return metrics


def refuse_no_rewards(rewards: Tensor, names: Sequence[str]) -> None:
    """Raise RewardError if no function applies to any completion of the first batch, rewards [B, R]: nothing
    would be learnt."""
    applied = (~torch.isnan(rewards)).any(0).tolist()
    if not any(applied):
        raise RewardError(
            f"no reward function applies to any of the first {len(rewards)} completions ({', '.join(names)} "
            "returned None for all): nothing would be learnt; try them with `python grpo.py test-rewards`"
        )
    for name, some in zip(names, applied, strict=True):
        if not some:
            log.warning("reward %s applies to none of the first %d completions", name, len(rewards))
