"""What the rules cost: the median time from step to step with health on and off, in turn, of the drills'
healthy runs.

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

CLOCK = """
import dist, json, time
beat, times = dist.beat, []
def timed(step, world):
    times.append(time.perf_counter())
    open("TIMES", "w").write(json.dumps(times)) if step == LAST else None
    beat(step, world)
dist.beat = timed
"""


def interval(root: Path, base: str, steps: int, health: bool) -> float:
    """Median seconds from one step's beginning to the next one's."""
    out = root / "runs" / f"overhead-{base}-{health}"
    times = root / "times.json"
    patch = CLOCK.replace("TIMES", str(times)).replace("LAST", str(steps))
    options = {"output_dir": str(out), "health": health, "max_steps": steps, "num_epochs": 20}
    if base == "sft":
        options["eval_steps"] = steps
    done = drill.run(root, base, options, patch)
    assert done.code == 0, done.said()
    stamps = json.loads(times.read_text())
    return statistics.median(b - a for a, b in itertools.pairwise(stamps[5:]))


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
    print(f"{'recipe':<8}{'off, ms':>10}{'on, ms':>10}{'ratio':>8}   medians of {given.steps} steps")
    for base in ("sft", "grpo", "ebft"):
        pairs = [
            [interval(place, base, given.steps, on) for on in (False, True)] for _ in range(given.rounds)
        ]
        off, on = (min(p[k] for p in pairs) for k in (0, 1))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"{base:<8}{1000 * off:>10.2f}{1000 * on:>10.2f}{ratio:>8.4f}", flush=True)
