"""What a batch of rollouts shows of its sampler and its rewards: who is in a group, whether completions are
copies, what the reward goes with, and whether a score is its completion's own."""

import math
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from rollouts.rewards import RewardError, Scorer
from rollouts.rollout import Rollout
from rollouts.tokens import same_ids
from text.prompt import Prompt

Scores = Sequence[dict[str, float | None]]  # by function, of each completion


def of_groups(
    rollouts: Sequence[Rollout], n: int, rewards: Sequence[float] | None = None
) -> dict[str, float]:
    """Signs of a batch of adjacent groups of n. `rewards`: the weighted reward of each completion, NaN where
    there is none."""
    groups = [rollouts[i : i + n] for i in range(0, len(rollouts), n)]
    found = {
        "groups/mixed": _share(
            any(not same_ids(r.prompt_ids, group[0].prompt_ids) for r in group) for group in groups
        ),
        "completions/identical_groups": _share(
            all(same_ids(r.completion_ids, group[0].completion_ids) for r in group[1:])
            for group in groups if len(group) > 1
        ),
        "completions/repetition": _repetition([r.completion_ids for r in rollouts]),
    }
    if rewards is None:
        return found
    values = np.array(rewards, float).reshape(len(groups), -1)
    lengths = np.array([len(r.completion_ids) for r in rollouts], float).reshape(values.shape)
    advantages = np.array([r.advantage for r in rollouts], float).reshape(values.shape)
    judged = np.where(np.isnan(values).all(-1, keepdims=True), 0.0, values)
    apart = values - np.nanmean(judged, -1, keepdims=True)
    found |= _correlation("scores/correlation_with_length", apart, lengths - lengths.mean(-1, keepdims=True))
    found |= _correlation("advantages/agreement", apart, advantages)
    if (advantages != 0).any():
        size = np.abs(advantages).mean()
        found["advantages/off_centre"] = float(np.abs(advantages.mean(-1)).mean() / size)
        found["advantages/size"] = float(np.abs(advantages[advantages != 0]).mean())
    return found


def _share(flags) -> float:
    values = [float(flag) for flag in flags]
    return sum(values) / len(values) if values else 0.0


def _repetition(completions: Sequence[np.ndarray]) -> float:
    """Share of tokens equal to the one before, averaged; 0 for completions too short to tell."""
    lengths = np.array([len(ids) for ids in completions])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    flat = np.concatenate(completions)
    repeated = (flat[1:] == flat[:-1]) & (rows[1:] == rows[:-1])
    counts = np.bincount(rows[1:][repeated], minlength=len(lengths))
    return float(np.where(lengths >= 8, counts / np.maximum(lengths - 1, 1), 0.0).mean())


def _correlation(name: str, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Correlation over all completions of values that are centred in their groups; left out where one of the
    two does not vary."""
    known = ~np.isnan(x)
    x, y = x[known], y[known]
    size = math.sqrt(float((x * x).sum() * (y * y).sum()))
    scale = math.sqrt(float((x * x).mean())) if len(x) else 0.0
    return {name: float((x * y).sum()) / size} if size and scale > 1e-9 else {}


class ScoreChecks:
    """Scores a few completions again, alone, in batches 1, 2, 4, 8, …; and once the rows' own answers."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer

    def metrics(
        self, batch: int, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], scores: Scores
    ) -> dict[str, float]:
        """Of generation batch number `batch`, from 1; prompts[i] and scores[i] belong to rollouts[i]. A
        function that fails here is left alone: it was judged where it is needed."""
        if batch & (batch - 1):
            return {}
        declared = self._declared() if batch == 1 else {}
        with suppress(RewardError):
            found = self._again(prompts, rollouts, scores)
            if batch == 1 and not any(found.values()):
                found |= self._own_answers(prompts)
            return declared | found
        return declared

    def _declared(self) -> dict[str, float]:
        """rewards/<name>/best of each function that has a range, as in score.reward_range = (-1, 0)."""
        functions = self.scorer.functions.items()
        ranges = {name: getattr(function, "reward_range", None) for name, function in functions}
        return {f"rewards/{name}/best": float(found[1]) for name, found in ranges.items() if found}

    def _score(self, prompt: Prompt, ids: Sequence[int] | np.ndarray) -> dict[str, float | None]:
        scores = self.scorer.finish(self.scorer.begin([prompt], [ids]))
        return {name: values[0] for name, values in scores.items()}

    def _again(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], scores: Scores
    ) -> dict[str, float]:
        chosen = self._chosen(rollouts, scores)
        once = [self._score(prompts[k], rollouts[k].completion_ids) for k in chosen]
        twice = [self._score(prompts[k], rollouts[k].completion_ids) for k in chosen]
        given = [{name: scores[k][name] for name in scores[k]} for k in chosen]
        sizes = {
            name: float(np.std([value for s in scores if (value := s[name]) is not None] or [0.0]))
            for name in scores[0]
        }
        # What differs each time differs from the batch too: only a stable score can be another row's.
        stable = self._difference(once, twice, sizes) < 1e-6
        return {"scores/noise_share": 0.0 if stable else self._noise_share(once, twice, sizes),
                "scores/alone_difference": self._difference(given, once, sizes) if stable else 0.0}

    @staticmethod
    def _noise_share(a: Scores, b: Scores, sizes: dict[str, float]) -> float:
        """The largest share over functions of a score's variance that is not the completion's: half of the
        mean squared difference of two scores of the same, over the variance in the batch (repeatability, as
        in Fisher, Statistical Methods for Research Workers, 1925, §38)."""
        shares = [0.0]
        for name, size in sizes.items():
            pairs = [(x, y) for p, q in zip(a, b, strict=True)
                     if (x := p.get(name)) is not None and (y := q.get(name)) is not None]
            half = sum((x - y) ** 2 for x, y in pairs) / 2 / max(1, len(pairs))
            shares.append(half / size**2 if size else float(half > 0))
        return max(shares)

    @staticmethod
    def _chosen(rollouts: Sequence[Rollout], scores: Scores) -> list[int]:
        """Four completions, of different rewards where there are any."""
        by_score: dict[str, list[int]] = {}
        for k, score in enumerate(scores):
            by_score.setdefault(repr(score), []).append(k)
        piles, chosen = list(by_score.values()), []
        while len(chosen) < min(4, len(rollouts)):
            for pile in piles:
                if pile and len(chosen) < 4:
                    chosen.append(pile.pop(len(pile) // 2))
        return chosen

    @staticmethod
    def _difference(a: Scores, b: Scores, sizes: dict[str, float]) -> float:
        """The largest difference of two scores of the same completion, over the function's standard deviation
        in the batch, or its size where all are the same."""
        worst = 0.0
        for first, second in zip(a, b, strict=True):
            for name, x in first.items():
                y = second.get(name)
                if x is None or y is None:
                    worst = max(worst, float(x is not y))
                elif abs(x - y) > 1e-6 * max(abs(x), abs(y), 1e-6):
                    worst = max(worst, abs(x - y) / (sizes[name] or max(abs(x), abs(y))))
        return worst

    def _own_answers(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """How much more a row's own answer earns than another row's: four rows with different answers."""
        rows: dict[str, Prompt] = {}
        for prompt in prompts:
            answer = prompt.columns.get("answer")
            if isinstance(answer, str) and answer.strip():
                rows.setdefault(answer, prompt)
        answers = list(rows)[:4]
        if len(answers) < 2:
            return {}
        weights = self.scorer.config.reward_weights or [1.0] * len(self.scorer.functions)

        def earned(prompt: Prompt, answer: str) -> float:
            scores = self._score(prompt, self.scorer.tokenizer.encode(answer))
            return sum(w * (s or 0.0) for w, s in zip(weights, scores.values(), strict=True))

        own = [earned(rows[a], a) for a in answers]
        others = [earned(rows[a], answers[(k + 1) % len(answers)]) for k, a in enumerate(answers)]
        # In standard deviations of all of them: a score that knows no answer is apart by chance.
        apart = (sum(own) - sum(others)) / len(answers) / max(float(np.std(own + others)), 1e-9)
        return {"scores/own_answer_gain": apart}
