"""How a rule reads the series of a metric: the checks (CHECKS), and the statistics that they share.

A figure moves for two reasons, training and noise. Every check that compares a figure with an earlier one
takes the series' own noise as its scale: from the differences of neighbours, which a trend hardly touches
(von Neumann et al., "The Mean Square Successive Difference", 1941).
"""

import collections
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

KEPT = 256  # values that are kept of each metric
BLOCK = 10  # values that are averaged for comparisons over a whole run


def noise(values: Sequence[float]) -> float:
    """Standard deviation of one value around the trend: √(mean squared difference of neighbours / 2)."""
    if len(values) < 2:
        return 0.0
    return math.sqrt(fmean((b - a) ** 2 for a, b in itertools.pairwise(values)) / 2)


class Series:
    """One metric as the rules see it: its last values, its first, and its best."""

    def __init__(self) -> None:
        self.values: list[float] = []  # at least the last KEPT
        self.first: list[float] = []
        self.count = 0  # observations of this process and, where a run was resumed, those before
        self.progress = 0.0  # of the run, 0 to 1
        self.least, self.most = math.inf, -math.inf
        self.lowest = math.inf  # median of ten values
        self.blocks: collections.deque[float] = collections.deque(maxlen=4)  # means of BLOCK values each
        self.best: dict[int, float] = {}  # blocks → the highest mean of as many that follow each other
        self.began = 0.0  # mean of the first block
        self.at_least: float | None = None  # the training loss when this one was least
        self._squares, self._sum, self._previous = 0.0, 0.0, None

    def add(self, value: float, progress: float, training_loss: float | None = None) -> None:
        self.values.append(value)
        if len(self.values) > 2 * KEPT:
            del self.values[:KEPT]
        self.count, self.progress = self.count + 1, progress
        if len(self.first) < 10:
            self.first.append(value)
        if value < self.least:
            self.at_least = training_loss
        self.least, self.most = min(self.least, value), max(self.most, value)
        if self._previous is not None:
            self._squares += (value - self._previous) ** 2
        self._previous, self._sum = value, self._sum + value
        if self.count >= 10:
            middle = sorted(self.values[-10:])[4:6]  # at every step: statistics.median is slow
            self.lowest = min(self.lowest, sum(middle) / 2)
        if self.count % BLOCK == 0:
            self.blocks.append(self._sum / BLOCK)
            self.began = self.began if self.count > BLOCK else self.blocks[0]
            self._sum = 0.0
            for size in (1, 2, 4):
                if len(self.blocks) >= size:
                    mean = fmean(itertools.islice(self.blocks, len(self.blocks) - size, None))
                    self.best[size] = max(mean, self.best.get(size, -math.inf))

    @property
    def noise(self) -> float:
        """Standard deviation of one value around the trend, over the whole run."""
        return math.sqrt(self._squares / (2 * max(1, self.count - 1)))

    def last(self, count: int) -> list[float]:
        return self.values[-count:]


@dataclass
class Facts:
    """What a check may know besides its series."""

    config: dict = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    stride: int = 1  # steps from one observation to the next: more than 1 in a log that leaves out steps
    first_step: int = 1  # of this process: later than 1 in a resumed run
    step: int = 0

    def middle(self, metric: str, count: int = 10) -> float | None:
        """Median of a metric's last values, if it was logged."""
        seen = self.series.get(metric)
        return median(seen.last(count)) if seen is not None and seen.count else None

    def observations(self, steps: int) -> int:
        """Observations in so many steps; at least four, or all of them if there are fewer."""
        return max(min(steps, 4), math.ceil(steps / self.stride))


def figure(value: float) -> str:
    return f"{value:.4g}"


def _steps(count: int, facts: Facts) -> str:
    return "" if count == 1 else f" for {count * facts.stride} steps"


def _outside(rule: Any, seen: Series, facts: Facts) -> str | None:
    latest = seen.values[-1]
    if (rule.low is None or latest >= rule.low) and (rule.high is None or latest <= rule.high):
        return None  # as it is nearly always
    wanted = facts.observations(rule.window)
    last = seen.last(wanted)
    if len(last) < wanted:
        return None
    if rule.low is not None and all(x < rule.low for x in last):
        return f"{figure(last[-1])}{_steps(wanted, facts)}, below {rule.low:g}"
    if rule.high is not None and all(x > rule.high for x in last):
        return f"{figure(last[-1])}{_steps(wanted, facts)}, above {rule.high:g}"
    return None


def _from_the_start(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Outside of the range; in a run's first step, before any update, one value is enough."""
    if seen.count == 1 and facts.step == 1 and rule.high is not None and seen.values[0] > rule.high:
        return f"{figure(seen.values[0])} in the first step, before any update, above {rule.high:g}"
    return _outside(rule, seen, facts)


def _at_first(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Outside of the range in a run's first step, when no update has been made."""
    if seen.count > 1 or facts.step > 1:
        return None
    value = seen.values[0]
    if (rule.high is not None and value > rule.high) or (rule.low is not None and value < rule.low):
        return f"{figure(value)} in the first step, before any update"
    return None


def _pooled(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Outside of the range in every batch's worst use: a batch's first use is on policy, its later ones are
    not."""
    config = facts.config
    slices = (config.get("steps_per_generation") or 1) // (config.get("gradient_accumulation_steps") or 1)
    uses = max(1, slices) * (config.get("num_iterations") or 1)
    wanted = max(2, math.ceil(facts.observations(rule.window) / uses))
    if "num_iterations" not in config:  # another trainer's log: leave out first uses, which are exactly 0
        last = [x for x in seen.last(2 * wanted) if x > 0][-wanted:]
    else:
        every = seen.last(wanted * uses)
        last = [max(every[i : i + uses]) for i in range(len(every) % uses, len(every), uses)][-wanted:]
    if len(last) == wanted and all(x > rule.high for x in last):
        return f"{figure(max(last))} at most in each of {wanted} batches, above {rule.high:g}"
    return _outside(rule, seen, facts)  # or in many uses of one batch


def _climbs_above(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Above the range, not below where it began, and the reward does not rise: what comes down into the range
    is on its way, and a policy that learns converges in its own time."""
    last, start = seen.last(facts.observations(rule.window)), median(seen.first)
    found, reward = _outside(rule, seen, facts), facts.series.get("reward")
    if found is None or fmean(last) < 0.9 * start or (reward is not None and _has_risen(reward)):
        return None
    return f"{found}; it began at {figure(start)}"


def _stays_at(rule: Any, seen: Series, facts: Facts) -> str | None:
    wanted = facts.observations(rule.window)
    last = seen.last(wanted)
    if len(last) == wanted and all(abs(x - (rule.low or 0.0)) < 1e-9 for x in last):
        return f"{figure(last[-1])}{_steps(wanted, facts)}"
    return None


def _has_risen(seen: Series) -> bool:
    """Whether the mean of the last ten values, or of half of them all, lies four standard errors above that
    of the first."""
    size = min(10, seen.count // 2)
    if size < 4:
        return False
    return fmean(seen.last(size)) - fmean(seen.first[:size]) > 4 * seen.noise * math.sqrt(2 / size)


def _earns_nothing(rule: Any, seen: Series, facts: Facts) -> str | None:
    """0 all the time, and 0 is not the best that the function gives: as a penalty's best is."""
    name = next((n for n, other in facts.series.items() if other is seen), "")
    best = facts.middle(name.replace("/mean", "/best")) if name.startswith("rewards/") else None
    functions = [str(f) for f in facts.config.get("reward_funcs") or []]
    if best == 0 or name == "rewards/length/mean" or (name == "reward" and functions == ["length"]):
        return None
    if seen.least < 0 and seen.most <= 0:  # the data show that it punishes
        return None
    total = facts.series.get("reward")
    if total is not None and total is not seen and _has_risen(total):  # others are earned, more and more
        return None
    return _stays_at(rule, seen, facts)


def _unmoved(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Where it began, well above `low`; mild fine-tuning begins low and moves little."""
    wanted = facts.observations(rule.window)
    latest, first = median(seen.last(10)), median(seen.first)
    if seen.count < max(wanted, 20) or first < (rule.low or 0.0):
        return None
    held_out = facts.series.get("eval/loss")
    if held_out is not None and held_out.count > 1 and held_out.values[-1] < 0.99 * held_out.first[0]:
        return None
    if (rule.high or 1.0) * first < latest < 1.03 * first + 2 * seen.noise:
        return f"{figure(latest)} after {seen.count * facts.stride} steps, {figure(first)} at the start"
    return None


def _flat(rule: Any, seen: Series, facts: Facts) -> str | None:
    wanted = facts.observations(rule.window)
    last = seen.last(wanted)
    half = len(last) // 2
    if len(last) < wanted or seen.progress > 0.6:  # late in a run a schedule ends in a plateau
        return None
    before, latest = median(last[:half]), median(last[half:])
    error = 1.25 * noise(last) * math.sqrt(2 / max(1, half))  # of the difference of two medians
    if error > (1 - (rule.high or 1.0)) * before:  # too noisy to see a fall of that size
        return None
    if latest > (rule.high or 1.0) * before and latest > (rule.low or 0.0):
        return f"{figure(latest)}, {figure(before)} {half * facts.stride} steps ago"
    return None


def _spike(rule: Any, seen: Series, facts: Facts) -> str | None:
    """The robust z-score of the last value: its distance from the median in units of the median deviation."""
    *before, latest = seen.last(rule.window + 1)
    if len(before) < 10:
        return None
    middle = median(before)
    deviation = 1.4826 * median([abs(x - middle) for x in before]) + 0.01 * abs(middle) + 1e-12
    if (latest - middle) / deviation > (rule.high or 0.0) and latest > (rule.low or 0.0) * middle:
        return f"{figure(latest)} after a median of {figure(middle)} ({latest / middle:.1f} times as much)"
    return None


def _above_best(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Medians of a window against the lowest such median so far; differences below `low`, and those within
    the noise of the window, are none."""
    wanted = facts.observations(rule.window)
    best, latest = min(seen.lowest, seen.first[0]), median(seen.last(wanted))
    recent = noise(seen.last(2 * wanted))
    if seen.count < wanted or latest <= (rule.high or 1.0) * best or latest - best <= (rule.low or 0.0):
        return None
    if latest - best < 4 * min(recent, seen.noise) * math.sqrt(2 / wanted):
        return None
    return f"{figure(latest)}, it was {figure(best)}"


def _below_best(rule: Any, seen: Series, facts: Facts) -> str | None:
    """The mean of the last 10, 20 or 40 values against the best earlier mean of as many. The fall must be six
    standard errors: the best of many means is high by chance. Where the best is not above 0, as with
    penalties, the fall is compared with the climb before it."""
    for blocks, best in seen.best.items():
        size = blocks * BLOCK
        if seen.count < 2 * size:
            return None
        latest, start = fmean(seen.last(size)), seen.began
        error = seen.noise * math.sqrt(2 / size)
        limit = (rule.low or 0.0) * best if best > 0 else best - 0.5 * max(best - start, abs(best))
        if latest < limit and best - latest > 6 * error:
            return f"{figure(latest)} over {size * facts.stride} steps, it was {figure(best)}"
    return None


def _rising(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Above the best by more than `high` and by three standard errors, while the training loss does not. The
    error is that of the mean over held-out rows where it is logged, else from the series itself."""
    last, best = seen.last(rule.window), seen.least
    if len(last) < rule.window or not all(x > (1 + (rule.high or 0.0)) * best for x in last):
        return None
    known = facts.series.get("eval/loss_rise_error")
    values = seen.last(40)
    earlier = values[: values.index(min(values)) + 1]
    error = known.values[-1] if known is not None and known.count else noise(earlier)
    training = facts.middle("train/loss")
    if training is not None and seen.at_least is not None and training > 1.01 * seen.at_least:
        return None
    if last[-1] - best <= 3 * error or last[-1] < best + 0.5 * (last[0] - best):  # on its way back
        return None
    return f"{figure(last[-1])} ± {figure(error)}, it was {figure(best)}"


def _creep(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Each quarter of the window is above the one before, and the last above the first by factor `high`."""
    wanted = facts.observations(rule.window)
    last = seen.last(wanted)
    if len(last) < max(wanted, 8):
        return None
    size = len(last) // 4
    quarters = [median(last[k * size : (k + 1) * size]) for k in range(4)]
    rising = all(b > 1.01 * a for a, b in itertools.pairwise(quarters))
    pays = facts.middle("scores/correlation_with_length", 20)
    if rule.name == "length_creep" and pays is not None and pays < 0.1:  # longer is not what earns
        return None
    if rising and quarters[-1] > (rule.high or 1.0) * quarters[0]:
        many = wanted * facts.stride
        return f"{figure(quarters[0])} → {figure(quarters[-1])} in {many} steps, without a pause"
    return None


def _jump(rule: Any, seen: Series, facts: Facts) -> str | None:
    last = seen.last(rule.window + 30)
    before, latest = last[: -rule.window], last[-rule.window :]
    if len(before) >= 10 and min(latest) > (rule.high or 1.0) * median(before):
        many = f"{figure(median(latest))} for {rule.window * facts.stride} steps"
        return f"{many}, before {figure(median(before))}"
    return None


def _drops_at_once(rule: Any, seen: Series, facts: Facts) -> str | None:
    """The last `window` values lie six deviations below all of the 20 before them, and the policy did not
    move: entropy and length are what they were."""
    last = seen.last(rule.window + 20)
    before, latest = last[: -rule.window], last[-rule.window :]
    if len(before) < 20:
        return None
    scale = max(noise(before), 1e-3 * (max(before) - min(before)), 1e-9)
    if max(latest) > min(before) - 2 * scale or fmean(before) - fmean(latest) < 6 * scale:
        return None
    for metric in ("entropy", "completions/mean_length"):
        other = facts.series.get(metric)
        if other is None or other.count < len(last):
            continue
        values = other.last(len(last))
        old, new = values[: -rule.window], values[-rule.window :]
        if abs(fmean(new) - fmean(old)) > max(6 * noise(old), 0.3 * abs(fmean(old))):
            return None
    return f"{figure(fmean(before))} → {figure(fmean(latest))} from one step to the next, and stays there"


def _after_resume(rule: Any, seen: Series, facts: Facts) -> str | None:
    """The first value after a resume lies ten deviations above the values before it."""
    if facts.first_step == 1 or facts.step != facts.first_step or seen.count < 11:
        return None
    *before, latest = seen.last(31)
    scale = max(noise(before), 0.01 * abs(median(before)))
    if latest - median(before[-10:]) > 10 * scale and latest > (rule.high or 1.0) * median(before[-10:]):
        return f"{figure(latest)} in the first step after the resume, before {figure(median(before[-10:]))}"
    return None


def _longer_after_resume(rule: Any, seen: Series, facts: Facts) -> str | None:
    """The first value after a resume is `high` times the last before it, for the same learning rate."""
    rates = facts.series.get("train/learning_rate")
    if facts.first_step == 1 or facts.step != facts.first_step or seen.count < 2:
        return None
    before, now = rates.last(2) if rates is not None and rates.count > 1 else (1.0, 1.0)
    last, latest = seen.last(2)
    if latest / max(now, 1e-12) > (rule.high or 1.0) * last / max(before, 1e-12):
        return f"{figure(latest)} in the first step after the resume, before {figure(last)}"
    return None


def _share_of_start(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Below a share `low` of where it began."""
    wanted = facts.observations(rule.window)
    last, start = seen.last(wanted), median(seen.first)
    if len(last) == wanted and seen.count > 10 and start > 0 and max(last) < (rule.low or 0.0) * start:
        return f"{figure(last[-1])}{_steps(wanted, facts)}, it began at {figure(start)}"
    return None


def _uphill(rule: Any, seen: Series, facts: Facts) -> str | None:
    """In each of the first steps the loss rose by about what its gradient said that it would fall: a long
    step overshoots, but not by just that."""
    values = list(seen.values)
    if len(values) != rule.window or not all(0.5 < -x < 2 for x in values):
        return None
    return f"{' and '.join(figure(x) for x in values)} times what the gradient says"


def _still(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Below the range, though there were gradients."""
    norm = facts.series.get("train/grad_norm")
    if norm is not None and not all(x > 1e-7 for x in norm.last(min(rule.window, norm.count))):
        return None
    return _outside(rule, seen, facts)


def _only_decay(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Above the range, by updates as long as the rate times the weight decay."""
    moved, rate = facts.middle("weights/moved", 1), facts.middle("train/learning_rate", 1)
    decay, found = float(facts.config.get("weight_decay") or 0.0), _still(rule, seen, facts)
    if found is None or not moved or not rate or not decay or moved > 1.1 * rate * decay:
        return None
    return f"{found}; a step of {figure(moved)} is learning_rate · weight_decay"


def _moved_but_zero(rule: Any, seen: Series, facts: Facts) -> str | None:
    """0 all the time while the weights move."""
    moved = facts.middle("weights/moved", 3)
    return _stays_at(rule, seen, facts) if moved is None or moved > 0 else None


def _left_over(rule: Any, seen: Series, facts: Facts) -> str | None:
    """All tensors have gradients left, and the optimiser has moved them: it holds the model's own."""
    changed = facts.series.get("weights/changed")
    if seen.values[-1] < 0.99 or changed is None or changed.most <= 0:
        return None
    return f"{figure(seen.values[-1])} of the tensors"


def _thrown(rule: Any, seen: Series, facts: Facts) -> str | None:
    """A step has changed the weights by more than the range, and the loss was above its start afterwards."""
    loss = facts.series.get("train/loss")
    if seen.count < rule.window or loss is None or seen.most <= rule.high or loss.most < 1.1 * loss.first[0]:
        return None
    rise = f"{figure(loss.first[0])} → {figure(loss.most)}"
    return f"up to {figure(seen.most)}, with a loss of {rise}"


def _mean_below(rule: Any, seen: Series, facts: Facts) -> str | None:
    """The mean of the window lies below the range: single batches are few prompts."""
    wanted = facts.observations(rule.window)
    last = seen.last(wanted)
    if len(last) == wanted and fmean(last) < rule.low:
        return f"{figure(fmean(last))} over {wanted * facts.stride} steps, below {rule.low:g}"
    return None


def _mean_above(rule: Any, seen: Series, facts: Facts) -> str | None:
    last = seen.last(rule.window)
    if len(last) == rule.window and fmean(last) > rule.high:
        return f"{figure(fmean(last))} in {rule.window} measurements, above {rule.high:g}"
    return None


def _stops_at_zero(rule: Any, seen: Series, facts: Facts) -> str | None:
    """0 from the start, or long before the end of the run: a schedule ends there."""
    last = seen.last(rule.window)
    if len(last) < rule.window or any(last) or (seen.most > 0 and seen.progress > 0.9):
        return None
    return f"0 for {rule.window * facts.stride} steps"


def _hits_limit_for_reward(rule: Any, seen: Series, facts: Facts) -> str | None:
    """More and more completions hit the limit while the reward rises."""
    reward, wanted = facts.series.get("reward"), facts.observations(rule.window)
    last = seen.last(wanted)
    if reward is None or len(last) < wanted or min(last) < (rule.high or 0.0):
        return None
    start = fmean(seen.first[:3])
    if fmean(last) - start < 0.2 or not _has_risen(reward):
        return None
    earned = f"{figure(fmean(reward.first))} to {figure(fmean(reward.last(10)))}"
    return f"{figure(start)} → {figure(last[-1])} while the reward rose from {earned}"


def _hits_limit(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Above the range, and not because the reward pays for it: then a higher limit is no remedy."""
    found, reward = _outside(rule, seen, facts), facts.series.get("reward")
    grown = fmean(seen.last(5)) - fmean(seen.first[:3]) > 0.2
    return None if grown and reward is not None and _has_risen(reward) else found


def _not_risen(rule: Any, seen: Series, facts: Facts) -> str | None:
    """The mean of the last values is within two standard errors of the first's, while groups disagree: what
    is solved has no room to rise."""
    solved, apart = facts.middle("frac_reward_zero_std", 20), facts.middle("reward_std", 20)
    if seen.count < rule.window or not apart or solved is None or solved > 0.5:
        return None
    latest, first = fmean(seen.last(rule.window)), fmean(seen.first)
    error = seen.noise * math.sqrt(1 / rule.window + 1 / len(seen.first))
    if 2 * error > 0.1 * max(abs(first), apart):  # too noisy to see a rise that matters
        return None
    if latest - first > 2 * error or latest < first - 4 * error:  # a fall has rules of its own
        return None
    many = seen.count * facts.stride
    return f"{figure(latest)} ± {figure(error)} after {many} steps, {figure(first)} at first"


def _above_and_not_falling(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Above the range, and not on its way down: a model that knows nothing yet begins there."""
    found = _outside(rule, seen, facts)
    return found if found and median(seen.last(5)) > 0.97 * median(seen.first) else None


def _early(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Outside of the range in the first measurements: later the momentum of other batches counts more."""
    return _outside(rule, seen, facts) if seen.count <= 5 else None


def _seen_before(rule: Any, seen: Series, facts: Facts) -> str | None:
    """The first value of a resumed run is one that the run has had."""
    if facts.first_step == 1 or facts.step != facts.first_step:
        return None
    *before, latest = seen.values
    return f"those of {len(before) - before.index(latest)} steps ago" if latest in before else None


def _never_above(rule: Any, seen: Series, facts: Facts) -> str | None:
    """No value of the run has been above `low`."""
    norm = facts.series.get("train/grad_norm")
    if norm is not None and norm.most < 1e-7:  # there is nothing to follow
        return None
    if seen.count >= rule.window and seen.most < (rule.low or 0.0):
        return f"{figure(seen.most)} at most in {seen.count} measurements, below {rule.low:g}"
    return None


def _identical(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Above the range while the entropy is that of a policy whose samples differ."""
    entropy = facts.middle("entropy", rule.window)
    return _outside(rule, seen, facts) if entropy is None or entropy > 0.1 else None


def _same_prompts(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Above the range, and not because there are hardly more prompts than a batch takes."""
    rows, in_batch = facts.middle("data/rows"), facts.middle("prompts/in_batch")
    many = rows is None or in_batch is None or rows > 2 * in_batch
    return _outside(rule, seen, facts) if many else None


def _repeats(rule: Any, seen: Series, facts: Facts) -> str | None:
    """Below the range, and not because there are hardly more rows than a step takes."""
    rows, in_step = facts.middle("data/rows"), facts.middle("rows/in_step")
    many = rows is None or in_step is None or rows > 2 * in_step
    return _outside(rule, seen, facts) if many else None


def _unrelated(rule: Any, seen: Series, facts: Facts) -> str | None:
    """The mean lies below `low`; a model that starts from nothing learns late what belongs to what."""
    over = facts.middle("loss/over_frequencies", 5)
    late = seen.progress >= 0.75 and over is not None and over < 0.6
    if facts.config.get("random_init") and not late:
        return None
    return _mean_below(rule, seen, facts) if seen.count >= rule.window else None


CHECKS: dict[str, Callable[[Any, Series, Facts], str | None]] = {
    "outside": _outside, "from_the_start": _from_the_start, "at_first": _at_first, "pooled": _pooled,
    "climbs_above": _climbs_above, "stays_at": _stays_at, "earns_nothing": _earns_nothing,
    "unmoved": _unmoved, "flat": _flat, "spike": _spike, "above_best": _above_best,
    "below_best": _below_best, "rising": _rising, "creep": _creep, "jump": _jump,
    "drops_at_once": _drops_at_once, "after_resume": _after_resume,
    "longer_after_resume": _longer_after_resume, "share_of_start": _share_of_start,
    "never_above": _never_above, "uphill": _uphill, "still": _still, "only_decay": _only_decay,
    "moved_but_zero": _moved_but_zero, "left_over": _left_over, "thrown": _thrown,
    "mean_below": _mean_below, "mean_above": _mean_above, "not_risen": _not_risen,
    "hits_limit": _hits_limit, "early": _early,
    "above_and_not_falling": _above_and_not_falling, "seen_before": _seen_before,
    "stops_at_zero": _stops_at_zero, "hits_limit_for_reward": _hits_limit_for_reward,
    "identical": _identical, "repeats": _repeats, "same_prompts": _same_prompts, "unrelated": _unrelated,
}
