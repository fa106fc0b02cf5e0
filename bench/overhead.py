"""What the rules and their measurements cost, in the drills' healthy runs: the time that is spent inside of
them, as a share of the run, told apart in what is done once (the first five steps) and what every step pays;
and the median time from step to step with health on over that with health off, which this machine's noise
blurs by some per cent.

    python bench/overhead.py [--steps 200] [--rounds 3]
    python bench/overhead.py --config configs/tiny/sft.yaml        the same for any config, without the pairs
    python bench/overhead.py --large     counted for Llama 3.1 8B on one H100 and on eight

Counted: kernels of a measured step and forward passes of the first one, on a model of 32 layers with narrow
widths (their number depends on the number of tensors alone), at 5 µs a kernel, 700 TFLOP/s, 3 TB/s and
450 GB/s; a step is 16,384 tokens per GPU, forward and backward.
"""

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import scaling
from checkpoints.adapters import apply_lora
from dist import World
from health import drill
from health.vitals import EVERY, Vitals
from model import Transformer
from sft import StepSize, sft_loss
from text.packing import Batch

ONCE = 5  # steps in which a run is probed that it is not later
TOKENS, MICRO_BATCH = 16384, 512  # of a step of the large model, and of the narrow one that stands for it
PEAK, MEMORY, NVLINK, LAUNCH = 700e12, 3e12, 450e9, 5e-6  # FLOP/s, bytes/s, bytes/s, seconds a kernel

CLOCK = """
import json, time
import dist, health.doctor, health.vitals, rollouts.signs
inside, times = [0.0], []
def clocked(owner, name):
    function = getattr(owner, name)
    def call(*given, **named):
        begun = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            inside[0] += time.perf_counter() - begun
    setattr(owner, name, call)
for name in ("step_begins", "before_update", "metrics"):
    clocked(health.vitals.Vitals, name)
for name in ("begin", "observe", "metrics"):
    clocked(health.doctor.Doctor, name)
clocked(rollouts.signs, "of_groups")
clocked(rollouts.signs.ScoreChecks, "metrics")
beat = dist.beat
def timed(step, world):
    times.append((time.perf_counter(), inside[0]))
    open("TIMES", "w").write(json.dumps(times)) if step == LAST else None
    beat(step, world)
dist.beat = timed
"""


def timed(root: Path, base: str, steps: int, health: bool) -> list[list[float]]:
    """Of each step's beginning: the time, and the seconds spent in measurements until then."""
    out = root / "runs" / f"overhead-{base}-{health}"
    times = root / "times.json"
    patch = CLOCK.replace("TIMES", str(times)).replace("LAST", str(steps))
    options = {"output_dir": str(out), "health": health, "max_steps": steps, "num_epochs": 20}
    if base == "sft":
        options["eval_steps"] = steps
    done = drill.run(root, base, options, patch)
    assert done.code == 0, done.said()
    return json.loads(times.read_text())


def of_config(config: Path, steps: int) -> None:
    """Run a config and print the step's time and the share that is spent in measurements."""
    with tempfile.TemporaryDirectory() as folder:
        times, out = Path(folder) / "times.json", Path(folder) / "run"
        patch = CLOCK.replace("TIMES", str(times)).replace("LAST", str(steps))
        recipe = next(r for r in ("sft", "grpo", "ebft") if r in config.stem)
        begun = drill.begin(Path.cwd(), recipe, ["--config", str(config), f"output_dir={out}",
                                                 f"max_steps={steps}", "save_steps=null"], out, patch)
        begun.join()
        assert begun.exitcode == 0, (out / "stderr").read_text()
        stamps = json.loads(times.read_text())
    (start, spent), (end, total) = stamps[ONCE], stamps[-1]
    step = median_step(stamps)
    print(f"{config.name}: step {1000 * step:.1f} ms, inside {(total - spent) / (end - start):.2%}, "
          f"once {spent / step:.2f} steps")


class Kernels(TorchDispatchMode):
    """Counts the calls that compute: a kernel each, on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.name().startswith(("aten::detach", "aten::empty")))
        return func(*args, **kwargs or {})


def first_steps(model: Transformer, config: Any) -> tuple[int, list[int]]:
    """Train so many steps that the last is measured: its kernels, and the tokens of each forward pass of the
    first step's probes."""
    ids = torch.randint(0, model.arch.vocab_size, (1, MICRO_BATCH))
    batch = Batch(ids, ids.roll(-1, 1), torch.arange(MICRO_BATCH)[None], torch.zeros_like(ids), [0])
    vitals = Vitals(model, config, World(0, 1, 0, torch.device("cpu")))
    loss_of = functools.partial(sft_loss, model, size=StepSize(MICRO_BATCH, 1, 1), aux_coef=0.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    first: list[int] = []
    for step in range(1, EVERY + 1):
        vitals.step_begins()
        loss = loss_of(batch)[0]
        loss.backward()
        with mock.patch.object(model, "hidden_states", wraps=model.hidden_states) as seen:
            with Kernels() as before:
                vitals.before_update(step, [batch], ["row"], [loss.detach()], loss_of, contextlib.nullcontext)
            optimizer.step()
            optimizer.zero_grad()
            with Kernels() as after:
                vitals.metrics()
        if step == 1:
            first = [call.args[0].numel() for call in seen.call_args_list]
    return before.count + after.count, first


def large() -> None:
    """Print what the measurements of an 8B model come to, by count."""
    shape = scaling.SHAPES["Llama 3.1 8B"]
    with torch.device("meta"):
        weights = Transformer(scaling.architecture(shape)).count_parameters()
    narrow = scaling.architecture((shape[0] | {"vocab_size": 512}, 64, 64, 32, 2, 1, 32, False))
    gather = 2 * weights * 7 / 8 / NVLINK
    print(f"{'':<6}{'kernels':>9}{'ms':>7}{'share':>8}   passes of the first step, and steps that they last")
    for way in ("full", "LoRA"):
        config = scaling.config_of(**scaling.WAYS[way], bf16=False)
        model = Transformer(narrow).train()
        if way == "LoRA":
            apply_lora(model, config)
        kernels, first = first_steps(model, config)
        # FLOPs a parameter and token: forward 2, backward 4, or 2 where the weights stay
        step = TOKENS * weights * (6 if way == "full" else 4) / PEAK
        passes = [max(2 * weights * (TOKENS if n == MICRO_BATCH else n) / PEAK, 2 * weights / MEMORY)
                  for n in first]
        once = [sum(max(seconds, wire) for seconds in passes) / step for wire in (0.0, gather)]
        print(f"{way:<6}{kernels:>9}{1000 * kernels * LAUNCH:>7.1f}{kernels * LAUNCH / EVERY / step:>8.3%}"
              f"   {len(first)}: {once[0]:.2f} on one, {once[1]:.2f} on eight")


def median_step(stamps: list[list[float]]) -> float:
    return statistics.median(b[0] - a[0] for a, b in itertools.pairwise(stamps[ONCE:]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", type=Path, default=Path("outputs/drills"))
    parser.add_argument("--config", type=Path, nargs="*", help="measure these instead of the drills' runs")
    parser.add_argument("--large", action="store_true", help="count for a model of 8B instead")
    given = parser.parse_args()
    if given.large:
        sys.exit(large())
    if given.config:
        for config in given.config:
            of_config(config.absolute(), given.steps)
        sys.exit()
    place = given.root.absolute()
    drill.prepare(place)
    print(f"{'recipe':<8}{'step, ms':>10}{'inside':>10}{'once, steps':>13}{'on/off':>9}   "
          f"medians of {given.rounds} rounds, {given.steps} steps")
    for base in ("sft", "grpo", "ebft"):
        found = []
        for _ in range(given.rounds):
            off, on = (timed(place, base, given.steps, health) for health in (False, True))
            step = median_step(on)
            (begun, spent), (ended, total) = on[ONCE], on[-1]
            found.append(
                (1000 * step, (total - spent) / (ended - begun), spent / step, step / median_step(off))
            )
        step, share, once, ratio = map(statistics.median, zip(*found, strict=True))
        print(f"{base:<8}{step:>10.2f}{share:>10.2%}{once:>13.2f}{ratio:>9.4f}", flush=True)
