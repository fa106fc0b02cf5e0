"""Who did what when: output_dir/schedule.jsonl, from which the report draws the schedule of a run."""

import json
import time
from pathlib import Path
from typing import Any


class Schedule:
    """Writes a line for each optimiser step of a run whose rollouts come from servers, on rank 0: when the
    step ended, the seconds of its phases in their order, and when servers had something to do."""

    def __init__(self, engine: Any, directory: Path, main: bool):
        self.gate = getattr(engine, "gate", None) if main else None
        self.path, self.before = directory / "schedule.jsonl", time.time()

    def write(self, step: int, seconds: dict[str, float]) -> dict[str, float]:
        """Add the line of a step. Returns the shares of its time in which the trainer waited for rollouts,
        and in which no server was asked for any; nothing on other ranks, and without servers."""
        if self.gate is None:
            return {}
        now, busy, order = time.time(), self.gate.busy(), ("sync", "generate", "reward", "logprob", "train")
        phases = {name: seconds[name] for name in sorted(seconds, key=order.index) if seconds[name] > 0}
        line = {"step": step, "end": now, "phases": phases, "servers": busy}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        elapsed, self.before = now - self.before, now
        total = sum(seconds.values())
        return {
            "schedule/trainer_waits": seconds.get("generate", 0.0) / max(total, 1e-9),
            "schedule/servers_idle": max(0.0, 1 - sum(e - b for b, e in busy) / max(elapsed, 1e-9)),
        }
