"""Long runs of tiny models: does anything grow that should not?

    python bench/long.py --steps 600     what CI runs, a minute or two
    python bench/long.py --steps 2000    the whole proof, about a quarter of an hour on two cores

Each recipe runs with evaluation and checkpoints on, while its process is looked at from outside ten times a
second: resident memory, open files, threads, CPU time a step. Printed are the ratios of the end (last
quarter) to the beginning (second quarter), and the bytes of log a step. Then three short runs of each: equal
seeds must give equal bytes, another seed others. Exit code 1 where something grows, or where that does not
hold.
"""

import argparse
import hashlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from health import drill

RECIPES = ("sft", "grpo", "ebft")
SMALLER = {"sft": {"micro_batch_size": 8, "eval_steps": 200}, "grpo": {"micro_batch_size": 16},
           "ebft": {"micro_batch_size": 16}}
MOST = {"memory": 1.05, "files": 1.0, "threads": 1.0, "CPU/step": 1.2}  # end / beginning
LOG_A_STEP = 500  # bytes of run.log


def look(pid: int, out: Path) -> dict[str, float]:
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    steps = (out / "metrics.jsonl").read_bytes().count(b"\n")
    status = Path(f"/proc/{pid}/status").read_text()
    lines = {k: v.split() for k, _, v in (line.partition(":") for line in status.splitlines())}
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"memory": float(lines["VmRSS"][0]), "files": float(files), "threads": float(lines["Threads"][0]),
            "CPU": float(numbers[11]) + float(numbers[12]), "steps": float(steps)}


def quarters(values: list[float], of: Callable[[list[float]], float]) -> float:
    """The last quarter's median, or minimum, over the second quarter's."""
    n = len(values)
    return of(values[3 * n // 4 :]) / of(values[n // 4 : n // 2])


def options(out: Path, base: str, steps: int, seed: int) -> dict:
    shutil.rmtree(out, ignore_errors=True)
    return {**SMALLER[base], "output_dir": str(out), "max_steps": steps, "num_epochs": 99, "seed": seed,
            "save_steps": max(75, steps // 20)}


def long_run(root: Path, base: str, steps: int) -> dict[str, float]:
    out = root / "long" / base
    child = drill.start(root, base, options(out, base, steps, 1))
    seen: list[dict[str, float]] = []
    while child.is_alive():
        if (out / "metrics.jsonl").exists():
            try:
                seen.append(look(child.pid or 0, out))
            except (OSError, KeyError, IndexError):
                break  # it has just ended
        time.sleep(0.1)
    child.join()
    if child.exitcode != 0:
        raise RuntimeError(f"{base}: {drill.outcome(out, child.exitcode or -1).said()}")
    if json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] != steps:
        raise RuntimeError(f"{base}: the run has ended before step {steps}")
    # A background save has threads and files for a moment: one that stays raises the least that is ever open.
    measures = (("memory", median), ("files", min), ("threads", min))
    found = {name: quarters([s[name] for s in seen[:-2]], of) for name, of in measures}

    def cpu_a_step(begin: float) -> float:
        """The least of some windows of a second: what else runs on the machine slows this a little."""
        part = [s for s in seen if begin * steps <= s["steps"] <= (begin + 0.25) * steps]
        windows = max(1, min(5, len(part) // 10))
        cuts = [part[i] for i in np.linspace(0, len(part) - 1, 1 + windows).round().astype(int)]
        return min((b["CPU"] - a["CPU"]) / (b["steps"] - a["steps"]) for a, b in itertools.pairwise(cuts))

    found["CPU/step"] = cpu_a_step(0.7) / cpu_a_step(0.2)  # without the work at the run's end
    found["log"] = (out / "run.log").stat().st_size / steps
    return found


def weights(root: Path, base: str, seed: int, name: str) -> str:
    out = root / "long" / f"{base}-{name}"
    child = drill.start(root, base, options(out, base, 30, seed))
    child.join()
    return hashlib.sha256((out / "final" / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path("outputs/drills"))
    given = parser.parse_args()
    place = given.root.absolute()
    drill.prepare(place)
    good = True
    print(f"{'recipe':<8}{'steps':>6}" + "".join(f"{name:>11}" for name in MOST) + f"{'log B/step':>12}")
    wanted = [(place, base, given.steps) for base in RECIPES]
    for (_, base, steps), found in drill.in_parallel(long_run, wanted, given.jobs):
        bad = [n for n, most in MOST.items() if found[n] > most] + ["log"] * (found["log"] > LOG_A_STEP)
        good &= not bad
        figures = "".join(f"{found[name]:>11.3f}" for name in MOST) + f"{found['log']:>12.0f}"
        print(f"{base:<8}{steps:>6}{figures}" + (f"   GROWS: {', '.join(bad)}" if bad else ""), flush=True)
    seeds = [(1, "a"), (1, "b"), (2, "c")]
    wanted = [(place, base, seed, name) for base in RECIPES for seed, name in seeds]
    made = {(base, name): digest
            for (_, base, _, name), digest in drill.in_parallel(weights, wanted, given.jobs)}
    for base in RECIPES:
        a, b, c = (made[base, name] for name in "abc")
        good &= a == b != c
        print(f"{base}: equal seeds {'give equal bytes' if a == b else 'DIFFER'}, "
              f"another seed {'gives others' if a != c else 'THE SAME'}")
    sys.exit(0 if good else 1)
