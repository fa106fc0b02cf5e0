"""The detection matrix: every drill over some seeds, broken and fixed, and healthy runs of each recipe that
must stay silent.

    python bench/drills.py                                  one seed, 3 healthy runs of each: what CI runs
    python bench/drills.py --seeds 42 43 44 --healthy 20    the whole proof, about an hour on two cores

Prints a line for each drill: what was seen first, in which step, and how the fixed run was. Exit code 1
where a drill was not seen first by its own rule within its window, or where a fixed or a healthy run was not
well.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from health import drill

BASES = ("sft", "grpo", "ebft", "strided")


def healthy_run(root: Path, base: str, seed: int) -> drill.Outcome:
    where = root / "runs" / f"healthy-{base}-{seed}"
    return drill.run(root, base, {"output_dir": str(where)}, seed=seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--healthy", type=int, default=3, help="healthy runs of each recipe")
    parser.add_argument("--only", nargs="+", help="these drills alone")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path("outputs/drills"))
    given = parser.parse_args()
    place = given.root.absolute()
    if given.healthy:
        drill.prepare(place)  # also what no drill of --only begins from
    good = drill.show_all(place, given.only, tuple(given.seeds), given.jobs)
    wanted = [(place, base, 1000 + seed) for base in BASES for seed in range(given.healthy)]
    found = drill.in_parallel(healthy_run, wanted, given.jobs)
    runs = [(base, seed, outcome) for (_, base, seed), outcome in found]
    alarms = [(base, seed, outcome) for base, seed, outcome in runs if not outcome.well]
    for base, seed, outcome in alarms:
        print(f"healthy {base}, seed {seed}: {outcome.said()[:160]}")
    counts = Counter(base for base, _, _ in runs)
    print(
        "healthy runs: "
        + ", ".join(f"{n} of {base}" for base, n in counts.items())
        + f"; alarms: {len(alarms)}"
    )
    sys.exit(0 if good and not alarms else 1)
