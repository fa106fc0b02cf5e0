"""The diagnosis matrix: every fault of faults/ in a tiny run, what was said of it first, and healthy runs
that must stay silent.

    python bench/faults.py --share 0.1                 what CI runs: every tenth
    python bench/faults.py --seeds 42 43 44 --jobs 2   the whole proof, about an hour and a half on two cores

A fault counts as right where the first line that the run says names it, as partly right where a later line
does, as wrong where only other causes are named, and as silent where none is. Prints a line for each that is
not right, the matrix by recipe, and the alarms of healthy runs by rule. Exit code 1 below the bounds.
"""

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from health import drill

HERE = Path(__file__).resolve().parent
CATALOGUE = HERE.parent / "faults"
RIGHT, WRONG = 0.85, 0.05  # least share named rightly first, most share with a wrong cause alone
SAID = re.compile(r" WARNING health: (?:step (\d+)|at the start): (\w+): (.*)")


@dataclass
class Fault:
    """A run and what should be said of it: rules, any of which names the cause, or an error."""

    base: str
    breaks: str = ""
    says: list[str] | dict[str, str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    patch: str = ""
    first: dict[str, Any] | None = None  # options of the first half of a run that is resumed


@dataclass
class Heard:
    verdict: str  # right, partly, wrong, silent
    rules: list[str]
    line: str
    seconds: float


def catalogue() -> dict[str, Fault]:
    return {
        path.stem: Fault(**yaml.safe_load(path.read_text(encoding="utf-8")))
        for path in sorted(CATALOGUE.glob("*.yaml"))
    }


def healthy_runs() -> dict[str, Fault]:
    entries = yaml.safe_load((HERE / "healthy.yaml").read_text(encoding="utf-8"))
    return {name: Fault(**entry) for name, entry in entries.items()}


def hear(root: Path, name: str, fault: Fault, seed: int) -> Heard:
    """Run it, and compare what it said with what it should have said."""
    place = root / "faults" / f"{name}-{seed}"
    options = json.loads(json.dumps(fault.options).replace("ROOT", str(root)))
    options = {**options, "output_dir": str(place), "seed": seed}
    if fault.first is None:
        done = drill.run(root, fault.base, options, fault.patch, seed=seed)
    else:
        done = drill.run(root, fault.base, {**options, **fault.first}, "", seed=seed)
        if done.code == 0:
            shutil.rmtree(place / "final", ignore_errors=True)
            child = drill.start(root, fault.base, options, fault.patch)
            child.join(600)
            code = -1 if child.exitcode is None else child.exitcode
            done = drill.outcome(place, code, done.seconds)
    log = place / "run.log"
    found = SAID.findall(log.read_text(encoding="utf-8")) if log.exists() else []
    rules = [rule for _, rule, _ in found]
    line = f"{found[0][1]}: {found[0][2]}" if found else done.error or "nothing"
    if isinstance(fault.says, dict):
        right = done.code == 2 and re.search(fault.says["error"], done.error)
        verdict = "right" if right else "wrong" if rules or done.error else "silent"
    elif done.code not in (0, 2):
        verdict, line = "wrong", f"exit code {done.code}: {done.error}"
    else:
        named = [rule in fault.says for rule in rules]
        verdict = "silent" if not rules and not done.error else (
            "right" if named and named[0] else "partly" if any(named) else "wrong"
        )
    return Heard(verdict, rules, line, done.seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--share", type=float, default=1.0, help="this share of the faults and healthy runs")
    parser.add_argument("--only", nargs="+", help="these faults or healthy runs, by a part of their name")
    parser.add_argument("--without-healthy", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path("outputs/drills"))
    given = parser.parse_args()
    place, every = given.root.absolute(), round(1 / given.share)
    faults, healthy = catalogue(), {} if given.without_healthy else healthy_runs()
    chosen = {k: v for k, v in {**faults, **healthy}.items()
              if not given.only or any(part in k for part in given.only)}
    names = [n for kind in (faults, healthy) for n in [k for k in kind if k in chosen][::every]]
    drill.prepare(place)
    wanted = [(place, name, chosen[name], seed) for name in names for seed in given.seeds]
    counts: dict[str, Counter] = {}
    alarms: Counter = Counter()
    silent_runs = 0
    for (_, name, fault, seed), heard in drill.in_parallel(hear, wanted, given.jobs):
        if name in healthy:
            silent_runs += not heard.rules
            alarms.update(set(heard.rules))
            if heard.rules or heard.verdict == "wrong":
                print(f"ALARM   {name}-{seed}: {', '.join(heard.rules)}: {heard.line[:300]}", flush=True)
            continue
        counts.setdefault(fault.base, Counter())[heard.verdict] += 1
        if heard.verdict != "right":
            said = ", ".join(dict.fromkeys(heard.rules))
            print(f"{heard.verdict:<8}{name}-{seed}: wanted {fault.says}, heard [{said}] {heard.line[:260]}",
                  flush=True)
    print(f"\n{'recipe':<10}{'faults':>8}{'right':>8}{'partly':>8}{'wrong':>8}{'silent':>8}")
    total: Counter = Counter()
    for base, found in counts.items():
        total.update(found)
        print(f"{base:<10}{sum(found.values()):>8}"
              + "".join(f"{found[k]:>8}" for k in ("right", "partly", "wrong", "silent")))
    tried = max(1, sum(total.values()))
    shares = {k: total[k] / tried for k in ("right", "partly", "wrong", "silent")}
    print(f"{'all':<10}{sum(total.values()):>8}" + "".join(f"{v:>8.1%}" for v in shares.values()))
    runs = sum(1 for _, name, _, _ in wanted if name in healthy)
    print(f"healthy runs: {runs}, with an alarm: {runs - silent_runs}"
          + "".join(f"\n  {rule}: {n}" for rule, n in alarms.most_common()))
    bad = sum(total.values()) and (shares["right"] < RIGHT or shares["wrong"] > WRONG)
    sys.exit(1 if bad or alarms else 0)
