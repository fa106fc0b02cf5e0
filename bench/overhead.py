"""What the rules and their measurements cost, in the drills' healthy runs: the time that is spent inside of
them, as a share of the run, told apart in what is done once (the first five steps) and what every step pays;
and the median time from step to step with health on over that with health off, which this machine's noise
blurs by some per cent.

    python bench/overhead.py [--steps 200] [--rounds 3]
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from health import drill

ONCE = 5  # steps in which a run is probed that it is not later

CLOCK = """
import json, time
import dist, health.doctor, health.vitals, rollouts.signs
inside, times = [0.0], []
def clocked(owner, name):
    function = getattr(owner, name)
    def call(*given, **named):
        begun = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            inside[0] += time.perf_counter() - begun
    setattr(owner, name, call)
for name in ("step_begins", "before_update", "metrics"):
    clocked(health.vitals.Vitals, name)
for name in ("begin", "observe", "metrics"):
    clocked(health.doctor.Doctor, name)
clocked(rollouts.signs, "of_groups")
clocked(rollouts.signs.ScoreChecks, "metrics")
beat = dist.beat
def timed(step, world):
    times.append((time.perf_counter(), inside[0]))
    open("TIMES", "w").write(json.dumps(times)) if step == LAST else None
    beat(step, world)
dist.beat = timed
"""


def timed(root: Path, base: str, steps: int, health: bool) -> list[list[float]]:
    """Of each step's beginning: the time, and the seconds spent in measurements until then."""
    out = root / "runs" / f"overhead-{base}-{health}"
    times = root / "times.json"
    patch = CLOCK.replace("TIMES", str(times)).replace("LAST", str(steps))
    options = {"output_dir": str(out), "health": health, "max_steps": steps, "num_epochs": 20}
    if base == "sft":
        options["eval_steps"] = steps
    done = drill.run(root, base, options, patch)
    assert done.code == 0, done.said()
    return json.loads(times.read_text())


def median_step(stamps: list[list[float]]) -> float:
    return statistics.median(b[0] - a[0] for a, b in itertools.pairwise(stamps[ONCE:]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", type=Path, default=Path("outputs/drills"))
    given = parser.parse_args()
    place = given.root.absolute()
    drill.prepare(place)
    print(f"{'recipe':<8}{'step, ms':>10}{'inside':>10}{'once, steps':>13}{'on/off':>9}   "
          f"medians of {given.rounds} rounds, {given.steps} steps")
    for base in ("sft", "grpo", "ebft"):
        found = []
        for _ in range(given.rounds):
            off, on = (timed(place, base, given.steps, health) for health in (False, True))
            step = median_step(on)
            (begun, spent), (ended, total) = on[ONCE], on[-1]
            found.append(
                (1000 * step, (total - spent) / (ended - begun), spent / step, step / median_step(off))
            )
        step, share, once, ratio = map(statistics.median, zip(*found, strict=True))
        print(f"{base:<8}{step:>10.2f}{share:>10.2%}{once:>13.2f}{ratio:>9.4f}", flush=True)
