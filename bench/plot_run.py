"""Draw a run: python bench/plot_run.py outputs/tiny-grpo docs/tiny-grpo.png (matplotlib is a dependency)."""

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

    rewarded = any("reward" in row for row in rows)
    axes = draw_policy(series) if rewarded else draw_supervised(series)
    for axis in axes:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].figure.savefig(picture, dpi=110)


def draw_supervised(series) -> list:
    _, (loss, norm, rate) = plt.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
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
    return [loss, norm, rate]


def draw_policy(series) -> list:
    _, axes = plt.subplots(1, 4, figsize=(15, 3.2), constrained_layout=True)
    reward, entropy, kl, norm = axes
    reward.plot(*series("reward"), color="#1f6f8b", alpha=0.35, label="reward in training")
    reward.plot(*series("eval/pass@1"), "o-", color="#1f6f8b", markersize=4, label="held out, sampled")
    reward.plot(*series("eval/greedy"), "o-", color="#c8553d", markersize=4, label="held out, greedy")
    reward.set_title("share of right answers", fontsize=10)
    reward.legend(frameon=False, fontsize=8)
    for axis, name, low, high in (
        (entropy, "entropy", 0.05, 0.5),
        (kl, "kl", 0.0, 0.5),
        (norm, "train/grad_norm", 0.001, 10.0),
    ):
        axis.plot(*series(name), color="#1f6f8b")
        axis.axhspan(low, high, color="#8fb996", alpha=0.2, lw=0)
        axis.set_title(f"{name} (green: {low:g}–{high:g})", fontsize=10)
        axis.set_ylim(bottom=0)
    norm.axhline(1.0, color="#8fb996", lw=0.8, ls="--")
    return list(axes)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python bench/plot_run.py RUN_DIRECTORY PICTURE.png")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
