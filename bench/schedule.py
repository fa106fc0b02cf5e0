"""What waits for what: the schedule of GRPO with a vLLM server at several bounds of staleness, in one run.

    VLLM_PYTHON=…/python python bench/schedule.py --picture docs/schedule.png
    VLLM_PYTHON=…/python python bench/schedule.py --environment

The model and prompts of bench/grpo.py, 32 completions of 64 tokens a step. The server has one core, the
trainer another, as they would have GPUs of their own. With `--environment` each conversation begins with a
wait, 2 seconds on average and exponentially distributed, as sandboxes and tools take their time. The first
steps of each run are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.grpo import Vllm, make  # noqa: E402
from health.timeline import draw_schedule, read_schedule  # noqa: E402

MODES = {
    "one after the other": (), "async_prefetch": ("async_prefetch=true",),
    "max_staleness: 1": ("max_staleness=1",), "max_staleness: 2": ("max_staleness=2",),
    "max_staleness: 4": ("max_staleness=4",),
}
WAITS = (
    "import asyncio, random\n"
    "class Waits:\n"
    "    async def reset(self, prompt, **columns):\n"
    "        await asyncio.sleep(min(12.0, random.expovariate(0.5)))\n"
    "    def step(self, text, ids):\n"
    "        return None, sum(i % 2 for i in ids) / len(ids), True\n"
)
SKIP = 4  # steps: queues fill


def on_core(core: int) -> None:
    """This process, and those that it starts, on one core."""
    if len(os.sched_getaffinity(0)) > 1:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})


def run(directory: Path, url: str, name: str, steps: int, options: tuple[str, ...]) -> Path:
    out = directory / name.replace(" ", "-").replace(":", "")
    command = [sys.executable, ROOT / "grpo.py", "--config", directory / "c.yaml", f"output_dir={out}",
               f"max_steps={steps}", "rollout_engine=vllm", f"vllm_server_base_url=[{url}]",
               "micro_batch_size=32", *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          preexec_fn=lambda: on_core(1))
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--environment", action="store_true", help="conversations that wait")
    parser.add_argument("--picture", type=Path, help="draw the schedules into this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory, every = Path(name), os.sched_getaffinity(0)
        make(directory)
        (directory / "waits.py").write_text(WAITS)
        own = ("environment=waits.Waits", "reward_funcs=[]") if arguments.environment else ()
        on_core(0)
        server = Vllm(directory, os.environ["VLLM_PYTHON"])
        os.sched_setaffinity(0, every)
        found: dict[str, Path] = {}
        try:
            run(directory, server.url, "warm up", 2, ())
            print(f"{'':<22}{'s/step':>8}{'faster':>8}{'trainer waits':>15}{'servers idle':>14}"
                  f"{'oldest':>8}{'mean age':>10}{'dropped':>9}")
            base = 0.0
            for mode, options in MODES.items():
                found[mode] = run(directory, server.url, mode, arguments.steps, (*own, *options))
                lines = (found[mode] / "metrics.jsonl").read_text().splitlines()
                rows = [row for line in lines if "step_time" in (row := json.loads(line))][SKIP:]

                def mean(key: str, rows: list[dict] = rows) -> float:
                    return statistics.mean(row.get(key, 0.0) for row in rows)

                base = base or mean("step_time")
                print(f"{mode:<22}{mean('step_time'):>8.2f}{base / mean('step_time'):>7.2f}×"
                      f"{mean('schedule/trainer_waits'):>15.0%}{mean('schedule/servers_idle'):>14.0%}"
                      f"{max(row['weight_version_lag'] for row in rows):>8.0f}"
                      f"{mean('staleness/mean') or mean('weight_version_lag'):>10.2f}"
                      f"{sum(row.get('staleness/dropped', 0.0) for row in rows):>9.0f}", flush=True)
        finally:
            server.stop()
        if arguments.picture:
            draw(found, arguments.picture)


def draw(found: dict[str, Path], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 1, figsize=(9, 1.25 * len(found) + 0.6), sharex=True)
    for axis, (mode, out) in zip(axes, found.items(), strict=True):
        draw_schedule(axis, read_schedule(out))
        axis.set_title(mode, fontsize=8, loc="left")
    shown = min(axis.get_xlim()[1] for axis in axes)
    axes[0].set_xlim(0, shown)
    axes[-1].set_xlabel("seconds", fontsize=8)
    labels = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(),
                                                                    strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="upper center", ncols=6, fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main()
