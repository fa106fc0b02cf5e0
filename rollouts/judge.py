"""A language model as a judge: the reward `llm_judge`, asked of any server with OpenAI's chat completions."""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from run.config import BallastError, ConfigError, check_at_least_one, check_ranges
from run.log import log

QUESTION = """Judge the answer to a question.

Question: {question}
Right answer: {answer}
Given answer: {completion}

Reply with a number from 0 (useless) to 10 (perfect), and nothing else."""


@dataclass
class JudgeOptions:
    judge_base_url: str = "http://127.0.0.1:8001/v1"
    """llm_judge: a server with /chat/completions, as of OpenAI or vLLM."""
    judge_model: str | None = None
    """llm_judge: the model's name there."""
    judge_prompt: str = QUESTION
    """llm_judge: what it is asked, with {question}, {answer}, {completion} and any column of the row in
    braces."""
    judge_pattern: str = r"(-?\d+(?:\.\d+)?)"
    """llm_judge: regular expression whose last match in the reply has the score in its first group."""
    judge_range: list[float] = field(default_factory=lambda: [0.0, 10.0])
    """llm_judge: the worst and the best score, which become rewards of 0 and 1. A reply without a score, or
    with one outside, gives none."""
    judge_api_key: str = "JUDGE_API_KEY"
    """llm_judge: name of the environment variable with the key, if the server wants one."""
    judge_max_tokens: int = 64
    """llm_judge: longest reply."""
    judge_workers: int = 32
    """llm_judge: requests at the same time."""
    judge_retries: int = 5
    """llm_judge: how often a request is repeated, after 1, 2, 4, … seconds, where the server is busy or
    silent."""
    judge_timeout: float = 60.0
    """llm_judge: seconds to wait for a reply."""
    judge_price: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """llm_judge: price of a million tokens read and written, for the line that says what it cost."""

    def check(self) -> None:
        check_at_least_one(self, "judge_max_tokens", "judge_workers")
        check_ranges(self, ("judge_retries", 0, 100))
        if not 0 < self.judge_timeout < float("inf"):
            raise ConfigError("judge_timeout", self.judge_timeout, "must be above 0")
        if len(self.judge_range) != 2 or not self.judge_range[0] < self.judge_range[1]:
            raise ConfigError("judge_range", self.judge_range, "must be [worst, best], the worst below")
        if len(self.judge_price) != 2 or min(self.judge_price) < 0:
            raise ConfigError("judge_price", self.judge_price, "must be [of tokens read, of tokens written]")
        try:
            groups = re.compile(self.judge_pattern).groups
        except re.error as error:
            raise ConfigError("judge_pattern", self.judge_pattern, f"is no expression: {error}") from None
        if not groups:
            raise ConfigError("judge_pattern", self.judge_pattern, "needs a group around the score")
        if "llm_judge" in getattr(self, "reward_funcs", ()) and not self.judge_model:
            raise ConfigError("judge_model", None, "must name the model that llm_judge asks")


class Cache:
    """Replies by request, on disk: a resumed or repeated run asks for none twice."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self.database.execute("create table if not exists replies (request text primary key, reply text)")

    @staticmethod
    def key(body: dict) -> str:
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> str | None:
        row = self.database.execute("select reply from replies where request = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, key: str, reply: str) -> None:
        self.database.execute("insert or replace into replies values (?, ?)", (key, reply))


class Judge:
    """Asks for a score of each completion. Lives on rank 0."""

    def __init__(self, config: Any):
        self.config = config
        self.cache = Cache(Path(config.output_dir) / "judge.sqlite")
        self.asked = self.cached = self.unclear = self.read = self.written = self.told = 0

    async def llm_judge(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float | None]:
        """Scores from 0 to 1, None where the reply has none."""
        limit = asyncio.Semaphore(self.config.judge_workers)
        key = os.environ.get(self.config.judge_api_key)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        rows = [{name: values[k] for name, values in columns.items()} for k in range(len(prompts))]
        async with httpx.AsyncClient(timeout=self.config.judge_timeout, headers=headers) as client:
            asked = [
                self._score(client, limit, self._question(prompt, completion, row))
                for prompt, completion, row in zip(prompts, completions, rows, strict=True)
            ]
            return await asyncio.gather(*asked)

    def _question(self, prompt: Any, completion: Any, row: dict) -> str:
        values = {**row, "question": _text(prompt), "completion": _text(completion)}
        return re.sub(r"\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), self.config.judge_prompt)

    async def _score(
        self, client: httpx.AsyncClient, limit: asyncio.Semaphore, question: str
    ) -> float | None:
        body = {"model": self.config.judge_model, "messages": [{"role": "user", "content": question}],
                "temperature": 0, "max_tokens": self.config.judge_max_tokens}
        key = Cache.key(body)
        reply = self.cache.get(key)
        if reply is None:
            async with limit:
                reply = await self._ask(client, body)
            self.cache.put(key, reply)
        else:
            self.cached += 1
        found = re.findall(self.config.judge_pattern, reply)
        low, high = self.config.judge_range
        with contextlib.suppress(ValueError, IndexError):
            last = found[-1]
            score = float(last[0] if isinstance(last, tuple) else last)
            if low <= score <= high:
                return (score - low) / (high - low)
        self.unclear += 1
        return None

    async def _ask(self, client: httpx.AsyncClient, body: dict) -> str:
        """The reply. BallastError where the server refuses, or is still silent after the last retry."""
        url, problem = self.config.judge_base_url.rstrip("/") + "/chat/completions", ""
        for tries in range(self.config.judge_retries + 1):
            if tries:
                await asyncio.sleep(min(2.0 ** (tries - 1), 60.0))
            try:
                response = await client.post(url, json=body)
            except httpx.HTTPError as error:
                problem = str(error) or type(error).__name__
                continue
            if response.status_code == 429 or response.status_code >= 500:
                problem = f"answered {response.status_code}"
                continue
            if response.status_code >= 400:
                words = " ".join(response.text[:200].split())
                raise BallastError(f"llm_judge: {url} answered {response.status_code}: {words}")
            try:
                answer = response.json()
                reply = answer["choices"][0]["message"]["content"] or ""
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise BallastError(f"llm_judge: {url}: a reply that is not understood ({error!r})") from None
            usage = answer.get("usage") or {}
            self.asked += 1
            self.read += int(usage.get("prompt_tokens") or 0)
            self.written += int(usage.get("completion_tokens") or 0)
            return reply
        raise BallastError(
            f"llm_judge: {url} {problem}, {self.config.judge_retries + 1} times; is the server running?"
        )

    @property
    def cost(self) -> float:
        return (self.read * self.config.judge_price[0] + self.written * self.config.judge_price[1]) / 1e6

    def metrics(self) -> dict[str, float]:
        """Of this process so far, and a line of them whenever they have doubled."""
        every = self.asked + self.cached
        if every < 2 * self.told:
            return self._figures(every)
        self.told = every
        price = f", {self.cost:.2f} by judge_price" if any(self.config.judge_price) else ""
        log.info("llm_judge: %s replies, %s of them from the cache, %s without a score; %s tokens read, %s "
                 "written%s", f"{every:,}", f"{self.cached:,}", f"{self.unclear:,}", f"{self.read:,}",
                 f"{self.written:,}", price)
        return self._figures(every)

    def _figures(self, every: int) -> dict[str, float]:
        return {"judge/replies": float(every), "judge/cached": float(self.cached),
                "judge/without_score": float(self.unclear), "judge/tokens": float(self.read + self.written),
                "judge/cost": self.cost}


def _text(said: Any) -> str:
    """A text, or the messages of a conversation with their roles."""
    if isinstance(said, str):
        return said
    if len(said) == 1:
        return str(said[0].get("content") or "")
    return "\n".join(f"{m.get('role')}: {m.get('content') or ''}" for m in said)
