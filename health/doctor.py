"""The Doctor: applies the rules to a run's metrics, step by step, and names the first cause. A consequence is
silent while the rule that explains it is broken."""

import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import dist
from health.checks import CHECKS, Facts, Series
from health.rules import GUARDS, RULES, Rule
from health.settings import extremes
from run.config import ConfigError

MEASURED = re.compile(r"time|second|memory|mfu|data_share|^ranks/")  # depend on the machine or the process

# Names in other trainers and in earlier versions, as regular expressions
ALIASES: tuple[tuple[str, str], ...] = (
    (r"loss", "train/loss"), (r"eval_loss", "eval/loss"), (r"grad_norm|actor/grad_norm", "train/grad_norm"),
    (r"learning_rate|actor/lr", "train/learning_rate"),
    (r"rewards/([^/]+)", r"rewards/\1/mean"), (r"completion_length|response_length/mean",
                                              "completions/mean_length"),
    (r"completions/clip_ratio|response_length/clip_ratio", "completions/clipped_ratio"),
    (r"clip_ratio|actor/pg_clipfrac|policy/clipfrac_avg", "clip_ratio/region_mean"),
    (r"objective/kl|actor/ppo_kl", "kl"), (r"objective/entropy|actor/entropy(?:_loss)?", "entropy"),
    (r"critic/(?:score|rewards)/mean|objective/scores|reward/mean", "reward"),
)


UNLOGGED = "now/"  # begins the names of what is judged and not logged

CONTEXT = (  # metrics that checks read beside their own
    "eval/loss", "reward", "frac_reward_zero_std", "entropy", "completions/mean_length", "weights/", "data/",
    "train/", "rows/", "prompts/", "scores/", "loss/",
)


def own_name(metric: str) -> str:
    """Our name of a metric of another trainer or an earlier version."""
    for pattern, name in ALIASES:
        if found := re.fullmatch(pattern, metric):
            return found.expand(name)
    return metric


def of_training(rows: Iterable[dict]) -> Iterator[dict]:
    """The rows that a run was judged by while it ran: all but what was measured before its first step."""
    for row in rows:
        if row["step"] or any(not name.startswith(("eval/", "health/", "data/")) for name in row
                              if name != "step"):
            yield row


@dataclass
class Verdict:
    """A rule's change of state."""

    rule: Rule
    step: int
    metric: str
    ill: bool
    found: str = ""  # the figures
    rows: str = ""  # the batch that caused it

    def line(self, config: dict) -> str:
        when = f"step {self.step}" if self.step else "at the start"
        if not self.ill:
            return f"health: {when}: {self.rule.name} is over: {self.metric} is back in its range"
        where = f"{self.metric} {self.found}" + (f" (rows {self.rows})" if self.rows else "")
        parts = [
            f"{self.rule.says}. Cause: {self.rule.cause}",
            f"To tell: {self.rule.tell}" if self.rule.tell else "", advice(self.rule, config),
        ]
        return f"health: {when}: {self.rule.name}: {where}: {'. '.join(filter(None, parts))}"

    @property
    def weight(self) -> tuple:
        """The first cause comes first: what was wrong at the start, what is critical, what came earlier."""
        return (self.step > 0, self.rule.severity != "critical", self.step)


# Options that advice may name only where another option makes them apply
NEEDS: tuple[tuple[str, Callable[[dict], Any]], ...] = (
    ("lora_*", lambda config: config.get("adapter")),
    ("vllm_importance_sampling*", lambda config: True),
    ("vllm_*", lambda config: config.get("rollout_engine", "vllm") == "vllm"),
    ("async_prefetch", lambda config: config.get("async_prefetch")),
    ("max_staleness", lambda config: config.get("max_staleness")),
    ("val_set_size", lambda config: not config.get("test_datasets")),
    ("warmup_ratio", lambda config: config.get("warmup_steps") is None),
    ("num_epochs", lambda config: config.get("max_steps") is None),
    ("max_steps", lambda config: config.get("max_steps") is not None),
    ("fp8", lambda config: config.get("fp8")),
    ("loss_type", lambda config: "epsilon" in config),
)


def advice(rule: Rule, config: dict) -> str:
    """What to change, with the options' values: only options that this run's recipe has and would take."""
    lines = []
    for option, words, *void in rule.fixes:
        known = not config.get("base_model") or option in config
        fits = all(needed(config) for pattern, needed in NEEDS if fnmatch.fnmatchcase(option, pattern)
                   ) if config.get("base_model") else True
        if known and fits and not _says_nothing_new(config.get(option), void):
            lines.append(f"{_with_value(option, config)}: {words}" if words else _with_value(option, config))
    return "; ".join(lines)


def _says_nothing_new(value: Any, void: list) -> bool:
    if not void or isinstance(value, str):
        return bool(void) and value in void[0]
    return isinstance(value, int | float) and void[0][0] <= value <= void[0][1]


def _with_value(option: str, config: dict) -> str:
    value = config.get(option)
    if option not in config or isinstance(value, list | dict):
        return option
    return f"{option} is {value:g}" if isinstance(value, float) else f"{option} is {value}"


def rules_of(config: dict, rules: Sequence[Rule] = RULES) -> list[Rule]:
    """The rules that apply to a config, with its own ranges. Raises ConfigError for an unknown rule or an
    invalid setting."""
    own = config.get("health_rules") or {}
    if not isinstance(own, dict):
        raise ConfigError("health_rules", own, "must be {rule: {high: …}} or {rule: off}")
    names = {rule.name for rule in rules}
    for name, change in own.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise ConfigError(
                "health_rules", name, f"is no rule{f'; did you mean {near[0]}?' if near else ''}"
            )
        known = ("low", "high", "window", "after", "severity")
        if change not in (False, "off") and not (isinstance(change, dict) and set(change) <= set(known)):
            raise ConfigError(
                f"health_rules.{name}", change, f"must be off, or set some of {', '.join(known)}"
            )
        if isinstance(change, dict):
            for key, value in change.items():
                right = value in ("warning", "critical") if key == "severity" else (
                    isinstance(value, int | float) and not isinstance(value, bool)
                    and (key in ("low", "high") or (isinstance(value, int) and value >= (key == "window")))
                )
                if not right:
                    raise ConfigError(f"health_rules.{name}.{key}", value, "is not a valid value")
    found = []
    for rule in rules:
        change = own.get(rule.name, {})
        if change in (False, "off") or (rule.guard and not GUARDS[rule.guard](config)):
            continue
        if rule.plus and rule.high is not None:
            more = sum(float(config.get(option) or 0.0) for option in rule.plus)
            rule = replace(rule, high=rule.high + more)
        found.append(replace(rule, **change))
    return found


class Doctor:
    """Watches the metrics of a run, step by step, and reports each change of a rule's state."""

    def __init__(self, config: dict, total_steps: int | None = 0, stride: int = 1):
        self.config, self.total_steps = config, total_steps or 0
        self.rules = rules_of(config)
        self.by_name = {rule.name: rule for rule in self.rules}
        self.options: Any = SimpleNamespace(**config)
        self.names: set[str] = set()  # of all metrics that were logged
        self.series: dict[str, Series] = {}  # of those that are read
        self.facts = Facts(config, self.series, stride)
        self.ill: dict[tuple[str, str], int] = {}  # (rule, metric) → observations since it was last seen ill
        self.ever: dict[str, Verdict] = {}  # the first verdict of every rule that has spoken
        self.readers: dict[str, list[Rule]] = {}  # metric → the rules that read it
        self.steps: tuple[int, int] | None = None  # first and last step that was observed
        self._recalling = False

    def begin(self, measured: dict[str, float]) -> list[Verdict]:
        """Judge what is known before the first step: the settings, and measurements of the data."""
        setting = self.by_name.get("setting_out_of_bounds")
        verdicts = []
        for option, found in extremes(self.config) if setting is not None else ():
            assert setting is not None
            verdicts.append(Verdict(setting, 0, option, True, found))
            self.ever.setdefault(setting.name, verdicts[-1])
            self.ill[setting.name, option] = 0
        return verdicts + self.observe(0, measured)

    def observe(
        self, step: int, metrics: dict[str, float], rows: Callable[[], str] | None = None
    ) -> list[Verdict]:
        verdicts, findings = [], []
        progress = step / self.total_steps if self.total_steps else 0.0
        self.facts.step = step
        figures = {
            name.removeprefix(UNLOGGED): float(value) for name, value in metrics.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        if step:
            self.steps = (self.steps[0] if self.steps else step, step)
        figures |= self._schedule(step, figures) | self._derived(figures)
        self.names.update(figures)
        training = self.facts.middle("train/loss")
        for name, value in figures.items():
            if name not in self.readers:
                self.readers[name] = [rule for rule in self.rules if self._reads(rule, name)]
                if self.readers[name] or name.startswith(CONTEXT):
                    self.series[name] = Series()
            if name in self.series:
                self.series[name].add(value, progress, training)
        for name in figures:
            for rule in self.readers[name]:
                seen = self.series[name]
                found = None
                if seen.count * self.facts.stride > rule.after:
                    found = CHECKS[rule.check](rule, seen, self.facts)
                if found is not None or (rule.name, name) in self.ill:
                    findings.append((rule, name, found))
        speaking = {name for name, _ in self.ill} | {rule.name for rule, _, found in findings if found}
        for rule, name, found in findings:
            if found is not None and self._explained(rule.name, speaking):
                found = None
            key = (rule.name, name)
            if found is not None and key not in self.ill:
                named = rows() if rows is not None and rule.check == "spike" else ""
                verdicts.append(Verdict(rule, step, name, True, found, named))
                self.ever.setdefault(rule.name, verdicts[-1])
            if found is not None:
                self.ill[key] = 0
            elif key in self.ill:
                self.ill[key] += 1
                if self.ill[key] >= max(3, rule.window):  # avoids flapping at the edge of a range
                    del self.ill[key]
                    verdicts.append(Verdict(rule, step, name, False))
        # The most severe first, then in the order of the table.
        order = [*self.by_name]
        return sorted(verdicts, key=lambda v: (
            not v.ill, v.rule.severity != "critical", order.index(v.rule.name)))

    def _schedule(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """The learning rate over the schedule's. The past is not judged by the schedule of now: a run that
        was extended had another."""
        rate = metrics.get("train/learning_rate")
        if rate is None or not self.total_steps or self._recalling or "lr_scheduler" not in self.config:
            return {}
        expected = dist.learning_rate(step - 1, self.options, self.total_steps)
        return {"schedule/ratio": rate / expected if expected else 1.0 + rate}

    def _derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Figures that follow from others."""
        found = {}
        frequencies, loss = self.facts.middle("data/unigram_nats"), metrics.get("train/loss")
        if (uniform := self.facts.middle("data/uniform_nats")) and loss is not None:
            found["loss/over_uniform"] = loss / uniform
        if frequencies and loss is not None:
            found["loss/over_frequencies"] = loss / frequencies
        if "ebft/pairwise_cosine" in metrics:
            found["ebft/spread"] = 1.0 - metrics["ebft/pairwise_cosine"]
        if "ebft/alignment_other" in metrics:
            gain = metrics["ebft/alignment_cosine"] - metrics["ebft/alignment_other"]
            found["ebft/own_truth_gain"] = gain / max(1e-6, 1.0 - metrics["ebft/truths_cosine"])
        return found

    def _explained(self, name: str, speaking: set[str]) -> bool:
        """Whether a rule that speaks explains this one. A warning never silences what is critical, for which
        on_unhealthy may ask to stop."""
        grave = self.by_name[name].severity == "critical"
        causes = [self.by_name[other] for other in speaking if other != name]
        return any(explains(c, name) and (c.severity == "critical" or not grave) for c in causes)

    def recall(self, rows: Iterable[dict]) -> None:
        """Restore the state of a resumed run from its logged metrics: windows, best values and broken rules,
        except for metrics that depend on the process (MEASURED)."""
        self._recalling, rows = True, list(rows)
        for row in rows:
            self.read({own_name(str(k)): v for k, v in row.items() if not MEASURED.search(str(k))})
        if self.steps is not None:
            self.facts.first_step = self.steps[1] + 1
        self._recalling = False
        self.agree_with(rows)

    def read(self, row: dict) -> list[Verdict]:
        """Judge a logged row: what was measured before the first step apart from the rest."""
        before = {k: v for k, v in row.items() if k.startswith("data/")}
        rest = {k: v for k, v in row.items() if k != "step" and not k.startswith(("data/", "health/"))}
        verdicts = self.begin(before) if before else []
        return verdicts + (self.observe(row["step"], rest) if any(True for _ in of_training([row])) else [])

    def agree_with(self, rows: list[dict]) -> None:
        """Take over what the run said while it ran (health/… in its rows): it knew every step, its config of
        that time and its schedule."""
        said = [row for row in rows if "health/alarms" in row]
        if not said or 2 * len(said) < len(rows):  # judged in a part of the run alone
            return
        first: dict[str, int] = {}
        for row in said:
            for name in row:
                if name.startswith("health/") and name != "health/alarms":
                    first.setdefault(name.removeprefix("health/"), row["step"])
        for name in [name for name in self.ever if name not in first]:
            del self.ever[name]
        for name, step in first.items():
            if name in self.by_name and name not in self.ever:
                rule = self.by_name[name]
                self.ever[name] = Verdict(rule, step, rule.metrics[0], True, "was out of its range")
        now = {name.removeprefix("health/") for name in said[-1] if name.startswith("health/")}
        self.ill = {key: count for key, count in self.ill.items() if key[0] in now}
        for name in now & self.by_name.keys() - {key[0] for key in self.ill}:
            self.ill[name, self.by_name[name].metrics[0]] = 0

    def _reads(self, rule: Rule, name: str) -> bool:
        """Whether a rule reads this metric: its first name that the run has."""
        for pattern in rule.metrics:
            if not set(pattern) & set("*?["):  # a plain name, as most are
                if pattern == name or pattern in self.names:
                    return pattern == name
            elif fnmatch.fnmatchcase(name, pattern):
                return True
            elif any(fnmatch.fnmatchcase(other, pattern) for other in self.names):
                return False
        return False

    @property
    def status(self) -> str:
        names = list(dict.fromkeys(name for name, _ in self.ill))
        return "well" if not names else ", ".join(names)

    def causes(self) -> list[tuple[Verdict, list[Verdict]]]:
        """What was ever broken: each cause with its consequences, the first cause first."""
        verdicts = sorted(self.ever.values(), key=lambda verdict: verdict.weight)

        def above(verdict: Verdict) -> Verdict | None:
            others = (other for other in verdicts if other is not verdict)
            return next((other for other in others if explains(other.rule, verdict.rule.name)), None)

        causes: dict[str, tuple[Verdict, list[Verdict]]] = {
            verdict.rule.name: (verdict, []) for verdict in verdicts if above(verdict) is None
        }
        for verdict in verdicts:
            root = verdict
            while (cause := above(root)) is not None:
                root = cause
            if root is not verdict:
                causes[root.rule.name][1].append(verdict)
        return [*causes.values()]

    def evidence(self) -> str:
        """How much there was to judge by: steps, and the rules that had something to read."""
        readers = {rule.name for rules in self.readers.values() for rule in rules}
        judged = [
            r for r in self.rules
            if r.name in readers and any(
                self.series[name].count * self.facts.stride > r.after
                and self.series[name].count >= min(self.facts.observations(r.window), 4)
                for name, rules in self.readers.items() if r in rules
            )
        ]
        steps = self.steps[1] - self.steps[0] + 1 if self.steps else 0
        rows = max((s.count for s in self.series.values()), default=0)
        every = f" in {rows} rows" if rows < steps else ""
        return f"{steps} steps{every}; {len(judged)} of {len(self.rules)} rules had enough to read"

    def metrics(self) -> dict[str, float]:
        """health/alarms, and health/<rule> = 1 for each that is ill."""
        names = {name for name, _ in self.ill}
        return {"health/alarms": float(len(names)), **{f"health/{name}": 1.0 for name in sorted(names)}}


def explains(cause: Rule, name: str) -> bool:
    """Whether rule `name` only reports a consequence of `cause`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in cause.explains)
