"""Diagnosis: what is measured, one first cause, and no alarm where nothing is wrong. The faults run in
bench/faults.py; here are the measurements against hand-made data, and the cases that once were alarms."""

import graphlib
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import falling, noisy
from health.doctor import Doctor, Verdict, explains, own_name
from health.monitor import HeldOutLosses
from health.report import judge
from health.rules import RULES
from health.settings import BOUNDS, extremes
from rollouts import signs
from rollouts.rollout import Rollout
from text import findings
from text.packing import Batches, Dataset, Encoded

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import faults  # noqa: E402 - of bench/, which is no package

NAMES = {rule.name for rule in RULES}


# ------------------------------------------------------------------------------------------------------------
# The catalogue
# ------------------------------------------------------------------------------------------------------------


def test_the_catalogue_is_large_and_every_entry_names_rules_that_exist():
    catalogue, healthy = faults.catalogue(), faults.healthy_runs()
    assert len(catalogue) >= 100 and len(healthy) >= 60
    for name, fault in catalogue.items():
        assert fault.breaks and (fault.options or fault.patch), name
        assert isinstance(fault.says, dict) or (fault.says and set(fault.says) <= NAMES), name
    assert {f.base for f in catalogue.values()} == {"sft", "grpo", "ebft", "strided"}


def test_no_rule_is_explained_by_what_it_explains():
    for a in RULES:
        for b in RULES:
            both = a is not b and explains(a, b.name) and explains(b, a.name)
            assert not both, f"{a.name} and {b.name} explain each other: both would be silent"
    causes = {b.name: {a.name for a in RULES if a is not b and explains(a, b.name)} for b in RULES}
    graphlib.TopologicalSorter(causes).prepare()  # raises CycleError


def test_a_cause_that_comes_later_than_its_critical_consequence_is_still_named_first():
    doctor = Doctor(RL, 100)
    kl, limit, loss = (next(r for r in RULES if r.name == name) for name in (
        "kl_high", "limit_hit_for_reward", "loss_spike"))
    for rule, step in ((loss, 30), (kl, 15), (limit, 20)):
        doctor.ever[rule.name] = Verdict(rule, step, rule.metrics[0], True)
    found = [(cause.rule.name, [v.rule.name for v in of]) for cause, of in doctor.causes()]
    assert found == [("limit_hit_for_reward", ["kl_high"]), ("loss_spike", [])]


# ------------------------------------------------------------------------------------------------------------
# No alarm where nothing is wrong
# ------------------------------------------------------------------------------------------------------------

RL = {"reward_funcs": ["score"], "base_model": "x", "learning_rate": 1e-6}
SFT = {"base_model": "x", "learning_rate": 1e-5, "datasets": [{"path": "x", "type": "chat"}]}


def spoken(config: dict, rows: list[dict]) -> list[str]:
    doctor = Doctor(config, len(rows))
    return [v.rule.name for k, row in enumerate(rows, 1) for v in doctor.observe(k, row) if v.ill]


@pytest.mark.parametrize("seed", range(20))
def test_a_reward_that_climbs_through_noise_has_not_collapsed(seed):
    means = [0.18, 0.27, 0.40, 0.77, 0.90, 1.37, 1.40, 1.63, 1.70, 1.45]
    rng = random.Random(seed)
    rewards = [max(0.0, rng.gauss(mean, 0.7)) for mean in means for _ in range(25)]
    rows = [{"reward": x, "reward_std": 0.7, "frac_reward_zero_std": 0.2} for x in rewards]
    assert spoken(RL, rows) == []
    fallen = rows + [{"reward": max(0.0, rng.gauss(0.1, 0.2))} for _ in range(60)]
    assert "reward_collapse" in spoken(RL, fallen)


def test_a_run_that_is_extended_is_not_judged_by_its_new_schedule():
    import dist

    config = {**SFT, "lr_scheduler": "cosine", "warmup_steps": 0, "warmup_ratio": 0.0, "min_lr_ratio": 0.0}
    options = SimpleNamespace(**config)

    def rows(first: int, last: int, total: int) -> list[dict]:
        return [{"step": s, "train/loss": 1.0, "health/alarms": 0.0,
                 "train/learning_rate": dist.learning_rate(s - 1, options, total)}
                for s in range(first, last + 1)]

    doctor = Doctor(config, 120)
    doctor.recall(rows(1, 60, 60))
    assert not doctor.ill and not doctor.ever
    for row in rows(61, 120, 120):
        assert doctor.observe(row["step"], row) == []
    whole = [*rows(1, 60, 60), *rows(61, 120, 120)]
    assert not judge(whole, config)[1], "recall, diagnose and the report agree"


def test_a_penalty_whose_best_is_0_is_no_failure():
    declared = [{"rewards/short/mean": 0.0, "rewards/short/best": 0.0}] * 40
    assert spoken(RL, declared) == []
    shown = [{"rewards/short/mean": x} for x in [-0.3, -0.1, *[0.0] * 40]]
    assert spoken(RL, shown) == []
    assert spoken(RL, [{"rewards/length/mean": 0.0}] * 40) == [], "the built-in one"
    assert spoken(RL, [{"rewards/score/mean": 0.0}] * 40) == ["reward_stuck_at_zero"]


def test_mild_fine_tuning_is_not_stuck_and_divergence_is_not_called_so():
    mild = [{"train/loss": x} for x in noisy(0.45, 200, 0.08)]
    assert "loss_stuck" not in spoken(SFT, mild)
    diverging = [{"train/loss": x} for x in [*falling(3.0, 2.2, 30), *[2.2 + 0.1 * k for k in range(60)]]]
    assert "loss_diverging" in spoken(SFT, diverging) and "loss_stuck" not in spoken(SFT, diverging)


def test_a_held_out_loss_that_bounces_is_not_overfitting():
    rng = random.Random(3)
    values = [2.0 - 0.5 * (1 - math.exp(-k / 10)) for k in range(80)]
    rows = [{"train/loss": x, "eval/loss": x * (1 + rng.uniform(0, 0.05))} for x in values]
    assert spoken(SFT, rows) == []
    few = [{"train/loss": 1.0 - 0.02 * k, "eval/loss": 1.0 + 0.03 * k, "eval/loss_rise_error": 0.2}
           for k in range(15)]
    assert "overfitting" not in spoken(SFT, few), "16 rows cannot tell a rise of 0.4 ± 0.2"


def test_the_entropy_of_a_policy_that_converges_is_not_too_high():
    rows = [{"entropy": 2.4 - 1.4 * k / 200, "reward": 0.01 + 0.12 * k / 200} for k in range(200)]
    assert spoken(RL, rows) == []
    assert "entropy_high" in spoken(RL, [{"entropy": 0.5 + 0.03 * k, "reward": 0.1} for k in range(80)])


def test_clipping_is_judged_by_the_worst_use_of_a_batch():
    config = {**RL, "num_iterations": 2, "steps_per_generation": 1, "gradient_accumulation_steps": 1}
    shares = [0.0, 0.55, 0.0, 0.50] * 5
    assert "clipping" in spoken(config, [{"clip_ratio/region_mean": x} for x in shares])
    assert spoken(config, [{"clip_ratio/region_mean": x} for x in [0.0, 0.08] * 20]) == []


def test_a_consequence_is_silent_while_its_cause_speaks_and_is_listed_under_it():
    doctor = Doctor(SFT, 100)
    heard = []
    for k in range(1, 40):
        row = {"train/loss": 3.0 + 0.2 * k, "train/grad_norm": 30.0}
        row |= {"first_step/future": 40.0} if k == 1 else {}
        heard += [v.rule.name for v in doctor.observe(k, row) if v.ill]
    assert heard[0] == "sees_the_future"
    first, _ = doctor.causes()[0]
    assert first.rule.name == "sees_the_future"


def test_advice_names_only_what_the_recipe_has_and_would_take():
    config = {**SFT, "test_datasets": [{"path": "y"}], "val_set_size": 0, "lora_r": 16, "adapter": None,
              "max_steps": 100, "num_epochs": 1.0, "weight_decay": 0.0, "lora_dropout": 0.0}
    (rule,) = (rule for rule in RULES if rule.name == "overfitting")
    from health.doctor import advice

    said = advice(rule, config)
    assert "weight_decay is 0" in said and not any(x in said for x in ("val_set_size", "lora_", "num_epochs"))
    assert "lora_r is 16" in advice(rule, {**config, "adapter": "lora"})


def test_evidence_counts_steps_and_rules():
    doctor, _ = judge([{"step": 10 * k, "train/loss": 2.0 - 0.01 * k} for k in range(1, 31)], {})
    assert doctor.evidence().startswith("291 steps in 30 rows; ")
    assert Doctor({}).evidence().startswith("0 steps; 0 of ")


@pytest.mark.parametrize("theirs, ours", [
    ("rewards/format_reward", "rewards/format_reward/mean"), ("completion_length", "completions/mean_length"),
    ("eval_loss", "eval/loss"), ("actor/grad_norm", "train/grad_norm"), ("kl", "kl"),
    ("rewards/x/std", "rewards/x/std"),
])
def test_names_of_other_trainers(theirs, ours):
    assert own_name(theirs) == ours


# ------------------------------------------------------------------------------------------------------------
# Measurements
# ------------------------------------------------------------------------------------------------------------


def test_settings_out_of_bounds_are_named_with_the_option():
    config = {**RL, "beta": 100.0, "temperature": 1.0, "epsilon": 0.2, "loss_type": "grpo"}
    assert [option for option, _ in extremes(config)] == ["beta"]
    verdict = Doctor(config, 10).begin({})[0]
    assert "beta is 100, above 2" in verdict.line(config) and "at the start" in verdict.line(config)
    known = {f for recipe in ("sft", "grpo", "ebft") for f in __import__(recipe).Config.__dataclass_fields__}
    assert {option for option, *_ in BOUNDS} <= known


@pytest.mark.parametrize("recipe", ["sft", "grpo", "ebft"])
def test_the_defaults_and_the_shipped_configs_are_within_all_bounds(recipe):
    import yaml

    module = __import__(recipe)
    fields = {name: field.default for name, field in module.Config.__dataclass_fields__.items()}
    plain = {name: value for name, value in fields.items() if isinstance(value, int | float | str)}
    assert not list(extremes({**plain, "base_model": "x"}))
    for path in (ROOT / "configs").rglob("*.yaml"):
        own = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert not list(extremes({**plain, **own})) or set(own) - set(fields), path


def test_the_error_of_a_held_out_loss_is_the_jackknifes():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, 400)
    nll = tokens * rng.normal(1.5, 0.4, 400)
    losses, world = HeldOutLosses(), SimpleNamespace(size=1, rank=0, main=True)
    first = losses.metrics([(float(n), int(t)) for n, t in zip(nll, tokens, strict=True)], world)
    left_out = [(nll.sum() - nll[k]) / (tokens.sum() - tokens[k]) for k in range(400)]
    jackknife = math.sqrt(399 / 400 * np.square(np.array(left_out) - np.mean(left_out)).sum())
    assert first["eval/loss"] == pytest.approx(nll.sum() / tokens.sum())
    assert first["eval/loss_error"] == pytest.approx(jackknife, rel=0.02)
    risen = [(float(n + 0.1 * t), int(t)) for n, t in zip(nll, tokens, strict=True)]
    again = losses.metrics(risen, world)  # all rows alike: the rise is sure, though the loss is not
    assert again["now/eval/loss_rise_error"] < 1e-12 < again["eval/loss_error"]


class Letters:
    """A tokenizer whose ids are code points; 0 ends a turn."""

    stop_ids: tuple[int, ...] = (0,)
    vocab_size = 512
    pad_id = 0
    new_ids: tuple[int, ...] | list[int] = ()
    untrained_ids: tuple[int, ...] | list[int] = ()

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int], special: bool = False) -> str:
        return "".join(chr(i) for i in ids if i or special)


def measured(
    rows: list[tuple[str, str]], shuffle: bool = True, held_out: list | None = None, **change
) -> dict:
    """Findings on (prompt, answer) rows; `change`: end, labels."""

    def dataset(rows: list[tuple[str, str]]) -> Dataset:
        def encoded():
            for k, (prompt, answer) in enumerate(rows):
                end = [0] if change.get("end", True) else []
                ids = [ord(c) for c in prompt + answer] + end
                labels = [-100] * len(prompt) + ids[len(prompt) :]
                if change.get("labels"):
                    labels = [-100] * len(prompt) + [i + 1 for i in ids[len(prompt) :]]
                yield 0, Encoded("f", k, ids, labels)

        return Dataset.build(encoded())

    train = dataset(rows)
    order = Batches(train, np.arange(len(rows)), weights=[1.0], units_per_step=4, seed=1, pad_id=0,
                    shuffle=shuffle)
    other = dataset(held_out) if held_out else train
    which = np.arange(len(other)) if held_out else np.zeros(0, int)
    letters = Letters()
    letters.new_ids, letters.untrained_ids = change.get("new", []), change.get("untrained", [])
    return findings.of_rows(train, order, other, which, letters, ["chat"])  # type: ignore[arg-type]


def some_rows(count: int, seed: int = 0, length: int = 40) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    word = lambda n: "".join(rng.choices("abcdefghijklmnop ", k=n))  # noqa: E731
    return [(word(12) + ":", word(length)) for _ in range(count)]


def test_sound_rows_have_no_finding():
    found = measured(some_rows(300), held_out=some_rows(60, 1))
    doctor = Doctor(SFT, 10)
    assert doctor.begin(found) == [] and found["data/duplicates"] == 0 == found["data/labels_differ"]
    counts = np.bincount([ord(c) for _, a in some_rows(300) for c in a + "\x00"])
    shares = counts[counts > 0] / counts.sum()
    assert found["data/unigram_nats"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_rows_that_are_alike_by_chance_are_no_copies():
    """Draws from few short texts, from many, and from a mixture, as arithmetic with one to three digits."""
    rng = np.random.default_rng(0)
    some = Counter((rng.pareto(1.2, 20000) * 3000).astype(int).tolist())
    mixture = Counter([*rng.integers(0, 200, 3000).tolist(), *rng.integers(10**3, 10**5, 20000).tolist()])
    for times in ([*some.values()], [*mixture.values()]):
        assert findings._not_by_chance(times) < 0.02
        assert findings._not_by_chance([2 * k for k in times]) > 0.45  # joined twice
        part = [k + (i % 3 == 0) * k for i, k in enumerate(times)]  # a third of the texts twice
        assert findings._not_by_chance(part) > 0.1


@pytest.mark.parametrize("name, found", [
    ("duplicates", lambda: measured(some_rows(200) * 2)),
    ("duplicates", lambda: measured(some_rows(400) + some_rows(200))),
    ("duplicates", lambda: measured(some_rows(20) * 10)),
    ("one_row_dominates", lambda: measured([*some_rows(200), *[("q:", "filler " * 6)] * 30])),
    ("held_out_in_training", lambda: measured(some_rows(300), held_out=some_rows(300)[:60])),
    ("held_out_shares_text", lambda: measured(
        some_rows(300), held_out=[("new:", a + "!") for _, a in some_rows(300)[:60]])),
    ("held_out_too_small", lambda: measured(some_rows(300), held_out=some_rows(2, 5))),
    ("not_shuffled", lambda: measured(some_rows(300), shuffle=False)),
    ("answers_without_end", lambda: measured(some_rows(300), end=False)),
    ("labels_differ", lambda: measured(some_rows(300), labels=True)),
    ("broken_text", lambda: measured([(p + "\x00\x01\x02", a) for p, a in some_rows(300)])),
    ("broken_text", lambda: measured([(p, a + " cafÃ© itâ€™s") for p, a in some_rows(300)])),
    ("new_tokens_unused", lambda: measured(some_rows(300), new=[ord("a"), ord("z")])),
    ("untrained_tokens", lambda: measured(some_rows(300), untrained=[ord(":")])),
    ("answer_in_prompt", lambda: measured([(p + a + ":", a) for p, a in some_rows(300)])),
])
def test_a_finding_of_the_rows_is_named(name, found):
    assert name in [verdict.rule.name for verdict in Doctor(SFT, 10).begin(found())]


def test_sorted_rows_are_named_by_what_they_are_sorted_by():
    by_length = sorted(some_rows(300), key=lambda row: len(row[1]))
    lengths = [(p, a[: 5 + k % 30]) for k, (p, a) in enumerate(by_length)]
    found = measured(sorted(lengths, key=lambda row: len(row[1])), shuffle=False)
    assert found["data/order_by_length"] > 0.95
    found = measured(sorted(some_rows(300), key=lambda row: row[1]), shuffle=False)
    assert found["data/order_by_start"] > 0.95
    assert findings.spearman(np.arange(100), np.arange(100)[::-1]) == pytest.approx(-1)


def group(texts: list[str], rewards: list[float], prompt: int = 1) -> list[Rollout]:
    middle = sum(rewards) / len(rewards)
    return [Rollout([prompt], [ord(c) for c in text], advantage=reward - middle)
            for text, reward in zip(texts, rewards, strict=True)]


def test_signs_of_a_batch_of_rollouts():
    texts, rewards = ["abcdefgh", "bcdefghij", "c" * 10, "defghijklmn"], [0.0, 0.2, 0.4, 1.0]
    sound = signs.of_groups(group(texts, rewards) + group(texts, rewards, 2), 4, rewards * 2)
    assert sound["groups/mixed"] == 0 == sound["completions/identical_groups"]
    assert sound["advantages/agreement"] == pytest.approx(1.0) and sound["advantages/off_centre"] < 1e-12
    expected = np.corrcoef([8, 9, 10, 11], rewards)[0, 1]
    assert sound["scores/correlation_with_length"] == pytest.approx(expected)
    assert sound["completions/repetition"] == pytest.approx(1 / 4)
    copied = signs.of_groups(group(["abc"] * 4, rewards), 4, rewards)
    assert copied["completions/identical_groups"] == 1
    mixed = signs.of_groups([*group(texts[:2], rewards[:2]), *group(texts[2:], rewards[2:], 2)], 4, rewards)
    assert mixed["groups/mixed"] == 1
    against = group(texts, rewards)
    for rollout in against:
        rollout.advantage *= -1
    assert signs.of_groups(against, 4, rewards)["advantages/agreement"] == pytest.approx(-1.0)


class Scores:
    """A scorer of one function of (answer, completion)."""

    def __init__(self, function):
        self.function, self.functions, self.tokenizer = function, {"score": function}, Letters()
        self.config = SimpleNamespace(reward_weights=None)

    def begin(self, prompts, ids):
        return {"score": [self.function(p.columns["answer"], "".join(map(chr, i)))
                          for p, i in zip(prompts, ids, strict=True)]}

    def finish(self, started):
        return started


def check_scores(function, given=None) -> dict[str, float]:
    prompts = [SimpleNamespace(columns={"answer": a}) for a in "wxyz"]
    rollouts = [Rollout([1], [ord(c)]) for c in "wayz"]
    scorer = Scores(function)
    scores = [{"score": function(p.columns["answer"], chr(r.completion_ids[0]))}
              for p, r in zip(prompts, rollouts, strict=True)]
    return signs.ScoreChecks(scorer).metrics(1, prompts, rollouts, given or scores)  # type: ignore[arg-type]


def test_scores_are_checked_by_scoring_again():
    right = check_scores(lambda answer, text: float(answer == text))
    assert right["scores/alone_difference"] == 0 == right["scores/noise_share"]
    assert right["scores/own_answer_gain"] == 2
    assert check_scores(lambda answer, text: -float(answer == text))["scores/own_answer_gain"] == -2

    def penalty(answer: str, text: str) -> float:
        return -float(answer != text)

    penalty.reward_range = (-1, 0)  # type: ignore[attr-defined]
    assert check_scores(penalty)["rewards/score/best"] == 0
    noise = random.Random(0)
    shares = [check_scores(lambda answer, text: noise.random())["scores/noise_share"] for _ in range(200)]
    mild = [check_scores(lambda answer, text: (answer == text) + 0.1 * noise.random())["scores/noise_share"]
            for _ in range(200)]
    assert np.mean(shares) > 0.8 and 0 < np.mean(mild) < 0.05
    rotated = [{"score": x} for x in (0.0, 1.0, 1.0, 1.0)]
    assert check_scores(lambda a, t: float(a == t), rotated)["scores/alone_difference"] > 0.1


def test_a_history_says_too_little_from_one_row(tmp_path):
    from conftest import run_program

    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "train/loss": 2.0}) + "\n")
    done = run_program("health", "diagnose", str(path))
    assert done.returncode == 0 and "too few steps to say" in done.stdout and "1 steps" in done.stdout
