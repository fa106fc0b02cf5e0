"""A picture of the schedule of a run: what the trainer did, and when servers were sampling."""

import json
from pathlib import Path
from typing import Any

COLOURS = {"sync": "#b8860b", "generate": "#e6e1dc", "reward": "#6b4e9b", "logprob": "#7fb3c8",
           "train": "#1f6f8b", "servers": "#2e7d4f"}
NAMES = {"sync": "sends weights", "generate": "waits for rollouts", "reward": "rewards",
         "logprob": "log π_old", "train": "trains", "servers": "servers sample"}
STEPS = 12  # that a picture shows: the last ones


def read_schedule(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's schedule.jsonl, the newest of each step; none if it has no such file."""
    try:
        lines = (directory / "schedule.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            row = json.loads(line)
            by_step[row["step"]] = row
        except (ValueError, TypeError, KeyError):  # cut off by a kill
            continue
    return [by_step[step] for step in sorted(by_step)]


def draw_schedule(axis: Any, rows: list[dict[str, Any]]) -> None:
    """The last steps on a matplotlib axis: seconds from left to right, the trainer above the servers."""
    rows = rows[-STEPS:]
    if not rows:
        return
    begin = rows[0]["end"] - sum(rows[0]["phases"].values())
    seen: set[str] = set()

    def bar(y: float, name: str, start: float, width: float) -> None:
        label = None if name in seen else NAMES[name]
        seen.add(name)
        axis.barh(y, width, left=start - begin, height=0.7, color=COLOURS[name], label=label)

    for row in rows:
        at = row["end"] - sum(row["phases"].values())
        for name, seconds in row["phases"].items():
            bar(1, name, at, seconds)
            at += seconds
        axis.axvline(row["end"] - begin, color="white", lw=0.8)
        for start, end in row["servers"]:
            bar(0, "servers", max(start, begin), max(0.0, end - max(start, begin)))
    axis.set_yticks([0, 1], ["servers", "trainer"], fontsize=8)
    axis.set_xlim(0, rows[-1]["end"] - begin)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right", "left"]].set_visible(False)
