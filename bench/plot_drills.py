"""docs/drills.md and the pictures of docs/stability.md, from the runs that bench/drills.py left behind.

    python bench/drills.py --seeds 42 43 44 --healthy 0 && python bench/plot_drills.py

A picture for each section of the guide. Each panel is one drill: the metric of its rule in the broken run and
in the fixed one, and where the rule spoke. `--pictures` leaves the table as it is.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from health import drill, rules

DOCS = Path(__file__).resolve().parent.parent / "docs"
GUIDE = DOCS / "stability.md"
RULES = {rule.name: rule for rule in rules.RULES}
LOGGED = {"schedule/ratio": "train/learning_rate"}  # what stands in metrics.jsonl for what the doctor derives


def curve(run: Path, metric: str) -> tuple[list[int], list[float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    points = [(row["step"], row[metric]) for row in rows if metric in row]
    return [step for step, _ in points], [value for _, value in points]


def metric_of(run: Path, rule: rules.Rule) -> str | None:
    named = [LOGGED.get(name, name) for name in rule.metrics]
    return next((name for name in named if "*" not in name and curve(run, name)[0]), None)


def draw(root: Path, drills: list[drill.Drill], seed: int, place: Path) -> None:
    shown = []
    for one in drills:
        here = root / "runs" / one.name
        named = here / f"fixed-{seed}.place"  # the run may be another drill's that ends in the same
        fixed = Path(named.read_text(encoding="utf-8")) if named.exists() else here / f"fixed-{seed}"
        runs = [here / f"broken-{seed}", fixed]
        rule = RULES.get(str(one.sees.get("rule")))
        if rule is not None and (runs[0] / "metrics.jsonl").exists():
            metric = metric_of(runs[0], rule)
            if metric is not None:
                shown.append((one, metric, runs))
    columns = 4 if len(shown) > 6 else 3
    lines = -(-len(shown) // columns)
    if len(shown) < 2:  # a picture is for comparing
        return
    size = (3.4 * columns, 2.4 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (one, metric, (broken, fixed)) in zip(axes.flat, shown, strict=False):
        ax.axis("on")
        ax.plot(*curve(fixed, metric), color="tab:green", linewidth=1.2)
        ax.plot(*curve(broken, metric), color="tab:red", linewidth=1.2)
        ax.axvline(drill.outcome(broken, 0).step, color="black", linestyle=":", linewidth=0.8)
        values = [abs(v) for v in curve(broken, metric)[1] if v]
        if values and max(values) > 200 * min(values) and min(curve(broken, metric)[1]) >= 0:
            ax.set_yscale("log")
        ax.set_title(one.name, fontsize=9)
        ax.set_xlabel(f"step          {metric}", fontsize=7)
        ax.tick_params(labelsize=7)
    figure.savefig(place, dpi=80)
    plt.close(figure)


def said(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def row(root: Path, one: drill.Drill, seeds: list[int]) -> str:
    runs = [root / "runs" / one.name / f"broken-{seed}" for seed in seeds]
    found = [drill.outcome(run, 0) for run in runs if (run / "run.log").exists()]
    steps = ", ".join(str(outcome.step) for outcome in found) if "rule" in one.sees else "at once"
    seen = f"`{one.sees['rule']}`" if "rule" in one.sees else "its error"
    fix = {k: v for k, v in one.fix.items() if k not in ("datasets", "output_dir", "max_steps")}
    fixed = ", ".join(f"`{k}: {json.dumps(v)}`" for k, v in fix.items()) or (
        "other data" if "datasets" in one.fix else "the fault taken out"
    )
    what = f"{said(one.breaks)} {said(one.why)}"
    cells = (f"`{one.name}`", what, seen, steps, said(fixed), f"`{one.code}`")
    return "| " + " | ".join(cells) + " |"


def page(root: Path, drills: list[drill.Drill], seeds: list[int]) -> str:
    lines = [
        "# Failures, one by one", "",
        "Every drill in `drills/`: what it breaks and why that hurts, which rule (or error) named it first, "
        "the step on three seeds, what fixes it, and the place in the code where it is prevented or "
        "caught. Made by `python bench/plot_drills.py` from the runs of `bench/drills.py`; "
        "`python -m health drill NAME` shows one. The mechanisms and the pictures are in "
        "[the guide](stability.md).", "",
    ]
    for theme in dict.fromkeys(re.findall(r"^## (\w+)$", GUIDE.read_text(encoding="utf-8"), re.M)):
        of_theme = [one for one in drills if one.theme == theme.lower()]
        if of_theme:
            lines += [f"## [{theme}](stability.md#{theme.lower()})", ""]
            lines += [
                "| failure | what and why | seen | step | fixed by | in the code |",
                "|---|---|---|---|---|---|",
            ]
            lines += [*(row(root, one, seeds) for one in of_theme), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("outputs/drills"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--pictures", action="store_true", help="only these")
    given = parser.parse_args()
    every = [drill.Drill.read(name) for name in drill.names()]
    for theme in sorted({one.theme for one in every}):
        of_theme = [one for one in every if one.theme == theme]
        draw(given.root, of_theme, given.seeds[0], DOCS / f"stability-{theme}.png")
    if not given.pictures:
        (DOCS / "drills.md").write_text(page(given.root, every, given.seeds), encoding="utf-8")
