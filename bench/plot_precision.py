"""Draw runs of different precision in one picture: python bench/plot_precision.py PICTURE.png RUN_DIRECTORY …

Runs with an adapter are drawn on the right, the others on the left; a run is named by its directory.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml


def main(picture: Path, runs: list[Path]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), constrained_layout=True)
    for number, run in enumerate(runs):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        adapter = yaml.safe_load((run / "config.yaml").read_text())["adapter"] is not None
        axis, colour = axes[int(adapter)], f"C{number}"
        for name, style in (("train/loss", "-"), ("eval/loss", "o--")):
            steps, values = zip(*[(row["step"], row[name]) for row in rows if name in row], strict=True)
            label = f"{run.name}, held out {values[-1]:.4f} at the end" if name == "eval/loss" else None
            axis.plot(steps, values, style, color=colour, label=label, markersize=4, alpha=0.85)
    for axis, title in zip(axes, ("every weight, from scratch", "LoRA on frozen weights"), strict=True):
        axis.set_title(f"{title}: train (line) and held-out loss (dots), nats", fontsize=10)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python bench/plot_precision.py PICTURE.png RUN_DIRECTORY …")
    main(Path(sys.argv[1]), [Path(run) for run in sys.argv[2:]])
