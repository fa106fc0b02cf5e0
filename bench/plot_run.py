"""Draw a run: python bench/plot_run.py outputs/tiny-sft docs/tiny-sft.png (matplotlib comes with [tiny])."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(run: Path, picture: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    def series(name: str) -> tuple[list[int], list[float]]:
        found = [(row["step"], row[name]) for row in rows if name in row]
        return [step for step, _ in found], [value for _, value in found]

    figure, (loss, norm, rate) = plt.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    loss.plot(*series("train/loss"), label="train/loss", color="#1f6f8b")
    loss.plot(*series("eval/loss"), "o--", label="eval/loss", color="#c8553d", markersize=4)
    loss.set_yscale("log")
    loss.legend(frameon=False)
    norm.plot(*series("train/grad_norm"), color="#1f6f8b")
    norm.axhspan(0.1, 10, color="#8fb996", alpha=0.2, lw=0)
    norm.set_yscale("log")
    norm.set_title("train/grad_norm (healthy: 0.1–10)", fontsize=10)
    rate.plot(*series("train/learning_rate"), color="#1f6f8b")
    rate.set_title("train/learning_rate", fontsize=10)
    loss.set_title("loss, nats a trained token", fontsize=10)
    for axis in (loss, norm, rate):
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python bench/plot_run.py RUN_DIRECTORY PICTURE.png")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
