"""A run's output: one console line per step, metrics.jsonl, TensorBoard, wandb, run.log, the verdicts of
the rules, and how the run ended.
"""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import dist
from health.doctor import UNLOGGED, Doctor, Verdict, rules_of
from run.config import BallastError, ConfigError, check_at_least_one
from run.files import write_atomically
from run.log import log
from run.terminal import is_terminal


@dataclass
class LogOptions:
    logging_steps: int = 1
    """Write metrics every N steps."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project; WANDB_MODE=offline needs no network."""
    wandb_entity: str | None = None
    """Weights & Biases team."""
    wandb_name: str | None = None
    """Name of the Weights & Biases run."""
    wandb_run_id: str | None = None
    """Id of the Weights & Biases run; a resumed run continues under the same id."""
    profiler_steps: list[int] = field(default_factory=list)
    """Steps to record with the PyTorch profiler, into output_dir/profile."""
    report: bool = True
    """Write output_dir/report.html at the end of a run of 10 steps or more: verdict, every metric with its
    healthy band, samples, config."""
    health: bool = True
    """Judge every step by the rules of rules.py, and report when a rule is broken or recovers."""
    health_rules: dict = field(default_factory=dict)
    """Changes by rule: {entropy_collapse: off, grad_norm_high: {high: 20, window: 10}}. A rule's low, high,
    window (consecutive steps), after (steps before it applies) and severity can be set."""
    on_unhealthy: str | dict[str, str] = "warn"
    """When a rule is broken: warn, stop, or checkpoint_and_stop; or by severity: {critical: stop}."""

    def check(self) -> None:
        rules_of(asdict(self))
        check_at_least_one(self, "logging_steps")
        if any(step < 1 for step in self.profiler_steps):
            raise ConfigError("profiler_steps", self.profiler_steps, "must be steps, counted from 1")
        by_severity = self.on_unhealthy
        if isinstance(by_severity, str):
            by_severity = {"warning": by_severity, "critical": by_severity}
        for severity, action in by_severity.items():
            actions = ("warn", "stop", "checkpoint_and_stop")
            if severity not in ("warning", "critical") or action not in actions:
                raise ConfigError(
                    "on_unhealthy", self.on_unhealthy,
                    "must be warn, stop or checkpoint_and_stop, or {warning: …, critical: …} of these",
                )


class Unhealthy(BallastError):
    """A run that its own rules stopped (on_unhealthy)."""


# ------------------------------------------------------------------------------------------------------------
# Metrics as they are made
# ------------------------------------------------------------------------------------------------------------

# Metric → its name on the console's line, and its format. The name must not suggest another metric.
FORMATS = {
    "train/loss": ("loss", ".4f"), "eval/loss": ("eval", ".4f"), "train/grad_norm": ("norm", ".3f"),
    "train/learning_rate": ("lr", ".2e"), "reward": ("reward", ".3f"), "entropy": ("entropy", ".3f"),
    "kl": ("kl", ".4f"), "clip_ratio/region_mean": ("clip_ratio", ".3f"),
    "completions/mean_length": ("length", ".1f"), "completions/clipped_ratio": ("cut_at_limit", ".1%"),
    "step_time": ("s", ".2f"),
    "tokens_per_second": ("tok/s", ",.0f"), "memory/max_alloc": ("GiB", ".2f"), "mfu": ("mfu", ".1%"),
    "ebft/alignment_cosine": ("alignment_cosine", ".4f"), "ebft/cfm_unwhitened": ("cfm_unwhitened", ".5f"),
    "ebft/pairwise_cosine": ("pairwise_cosine", ".4f"), "eval/exact": ("held-out exact", ".1%"),
    "eval/cfm_unwhitened": ("held-out cfm_unwhitened", ".5f"),
    "eval/accuracy": ("held-out accuracy", ".1%"), "eval/reward": ("held-out reward", ".3f"),
    "eval/pass@1": ("held-out pass@1", ".1%"), "eval/greedy": ("held-out greedy", ".1%"),
}


def made_by() -> str:
    """The running code: version, commit, whether the tree has local changes, torch, Python."""
    try:
        version = importlib.metadata.version("ballast")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    commit, git, here = "", shutil.which("git"), Path(__file__).resolve().parent.parent
    if git and (here / ".git").exists():
        described = [git, "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(described, capture_output=True, text=True)
        commit = f", commit {found.stdout.strip()}" if found.returncode == 0 else ""
    return f"Ballast {version}{commit}, torch {torch.__version__}, Python {platform.python_version()}"


class MetricLogger:
    """Writes one dict per step to console, output_dir/metrics.jsonl, TensorBoard and wandb; only on the main
    rank."""

    running: ClassVar[list["MetricLogger"]] = []  # loggers to close if the run ends in an error

    def __init__(self, config: Any, output_dir: Path, *, main: bool, first_step: int, total_steps: int):
        self.main, self.output_dir = main, output_dir
        self.running.append(self)
        self.reporting = main and config.report and total_steps >= 10  # fewer points show nothing
        self.doctor: Doctor | None = None
        self.action = "warn"  # what the rules ask for: warn (continue), checkpoint_and_stop, or stop
        self.why = ""
        self.measured: dict[str, float] = {}  # before the first step, until its line is written
        self.bar: tqdm | None = None
        self.file: Any = None
        self.tensorboard: Any = None
        self.wandb: Any = None
        if not main:
            return
        kept: list[dict] = []
        values = {k: v for k, v in asdict(config).items() if k != "config_directory"}
        with self._reporting("metrics.jsonl"):
            kept = self._open_metrics(output_dir / "metrics.jsonl", first_step)
        with self._reporting("tensorboard"):
            purged = first_step + 1 if first_step else None
            self.tensorboard = SummaryWriter(str(output_dir / "tensorboard"), purge_step=purged)
        with self._reporting("config.yaml"):
            where = {"config_directory": str(Path(config.config_directory).resolve())}
            text = yaml.safe_dump(values | where, sort_keys=False, allow_unicode=True)
            write_atomically(output_dir / "config.yaml", f"# {made_by()}\n{text}")
        with self._reporting("wandb"):
            self._begin_wandb(config, values)
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False,
            disable=not is_terminal(sys.stderr), file=sys.stderr,
        )
        self.total_steps = total_steps
        if config.health:
            of_recipe = {k: v for k, v in values.items() if k not in unread_options(config)}
            self.doctor = Doctor(of_recipe, total_steps)
            self.doctor.recall(kept)
            if self.doctor.ill:
                log.warning("unhealthy since before the checkpoint: %s", self.doctor.status)

    @contextmanager
    def _reporting(self, sink: str) -> Iterator[None]:
        """What only reports never ends a run: its error is logged once, then the run does without it."""
        try:
            yield
        except Exception as error:  # wandb and TensorBoard have errors of many classes
            log.warning("%s cannot be written, the run continues without it: %s", sink, _reason(error))
            log.debug("%s", traceback.format_exc())
            attribute = {"metrics.jsonl": "file"}.get(sink, sink)
            if hasattr(self, attribute):
                setattr(self, attribute, None)

    def _open_metrics(self, path: Path, first_step: int) -> list[dict]:
        """Open metrics.jsonl to append to; returns its rows up to the checkpoint, dropping those after it."""
        kept = []
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            # A run that begins anew measures again what is logged as step 0.
            last = first_step or -1
            logged = [(line, row) for line in lines if (row := _logged(line)) and row["step"] <= last]
            write_atomically(path, "".join(line + "\n" for line, _ in logged))
            kept = [row for _, row in logged]
        self.file = path.open("a", encoding="utf-8")
        return kept

    def _begin_wandb(self, config: Any, values: dict) -> None:
        if config.wandb_project:
            import wandb  # slow to import: only if it is used

            self.wandb = wandb.init(
                project=config.wandb_project, entity=config.wandb_entity, name=config.wandb_name,
                id=config.wandb_run_id, resume="allow" if config.wandb_run_id else None,
                dir=str(self.output_dir), config=values,
            )

    def observe(self, step: int, metrics: dict[str, float], rows: Callable[[], str] | None = None) -> None:
        """Judge a finished step and log changes of state. The action that on_unhealthy asks for is kept in
        `action`, for the next collective to tell every rank. `rows` names the batch if a rule needs it."""
        if self.doctor is None:
            return
        self._say(self.doctor.observe(step, metrics, rows))

    def begin(self, measured: dict[str, float], new: bool) -> None:
        """Judge the settings and what was `measured` before the first step; a new run writes it with its
        first line of metrics."""
        if self.doctor is None:
            return
        self._say(self.doctor.begin(measured))
        self.measured = measured if new else {}

    def _say(self, verdicts: list[Verdict]) -> None:
        assert self.doctor is not None
        actions = self.doctor.config["on_unhealthy"]
        for verdict in verdicts:
            say = log.warning if verdict.ill else log.info
            say("%s", verdict.line(self.doctor.config))
            action = actions if isinstance(actions, str) else actions.get(verdict.rule.severity, "warn")
            if verdict.ill and action != "warn" and self.action == "warn":
                self.action = action
                self.why = f"{verdict.rule.name}: {verdict.metric} {verdict.found}"
        if self.bar is not None:
            self.bar.set_postfix_str(self.doctor.status)

    def stopping(self, signal: int | None, step: int, world: dist.World) -> bool:
        """Whether any rank received a signal, or the rules ask to save and stop. A collective. Raises
        Unhealthy if the rules ask to stop at once."""
        asked = [signal is not None or self.action == "checkpoint_and_stop", self.action == "stop"]
        save_and_stop, stop_at_once = dist.all_reduce([float(it) for it in asked], world)
        if stop_at_once:
            why = dist.from_main(lambda: self.why, world)
            raise Unhealthy(f"step {step}: stopped by on_unhealthy, without a checkpoint: {why}")
        return save_and_stop > 0

    def stopped(self, step: int, world: dist.World) -> None:
        """End a run that was saved and stopped. Raises Unhealthy if the rules asked for it."""
        why = dist.from_main(lambda: self.why, world)
        if why:
            raise Unhealthy(f"step {step}: saved and stopped by on_unhealthy: {why}")
        log.info("stopped by a signal after step %d; the same command continues from here", step)
        dist.finish()

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step that is done (`step` counts from 1)."""
        if not self.main:
            return
        measured, self.measured = self.measured, {}
        metrics = {  # JSON has no NaN
            k: v for k, v in (measured | metrics).items() if math.isfinite(v) and not k.startswith(UNLOGGED)
        }
        if self.doctor is not None:
            metrics = {**metrics, **self.doctor.metrics()}
        if self.file is not None:
            with self._reporting("metrics.jsonl"):
                self.file.write(json.dumps({"step": step, **metrics}) + "\n")
                self.file.flush()
        if self.tensorboard is not None:
            with self._reporting("tensorboard"):
                for name, value in metrics.items():
                    self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            with self._reporting("wandb"):
                self.wandb.log(metrics, step=step)
        shown = [f"{label} {metrics[key]:{form}}" for key, (label, form) in FORMATS.items() if key in metrics]
        if self.doctor is not None and self.doctor.ill:
            shown.append(f"unhealthy: {self.doctor.status}")
        log.info("step %*d/%d  %s", len(str(self.total_steps)), step, self.total_steps, "  ".join(shown))

    def close(self, failed: bool = False) -> None:
        """Close the files and log the rules' findings in one line; `failed` if the run ends in an error."""
        with suppress(ValueError):  # closed already
            self.running.remove(self)
        if not self.main:
            return
        if self.doctor is not None:
            verdicts = self.doctor.ever.values()
            named = ", ".join(f"{v.rule.name} at step {v.step}" for v in verdicts)
            well = "no rule spoke before the error" if failed else "well from beginning to end"
            log.info("health              %s", named or well)
        sinks = ((self.file, "metrics.jsonl"), (self.tensorboard, "tensorboard"), (self.bar, "bar"))
        for sink, name in sinks:
            if sink is not None:
                with self._reporting(name):
                    sink.close()
        if self.wandb is not None:
            with self._reporting("wandb"):
                self.wandb.finish()


def unread_options(config: Any) -> set[str]:
    """Options that a recipe's config has from what it joins, but that the recipe does not read."""
    of_other_mode = getattr(config, "of_other_mode", lambda mode: set())
    return {*getattr(config, "not_here", {}), *of_other_mode(getattr(config, "mode", ""))}


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def check_wandb(config: Any) -> None:
    """ConfigError where wandb has no key, before anything is loaded: it would ask for one, or end the run."""
    if not config.wandb_project or os.environ.get("WANDB_MODE", "online") != "online":
        return
    if config.wandb_run_id and set(config.wandb_run_id) & set("/\\#?%:"):
        raise ConfigError("wandb_run_id", config.wandb_run_id, "must not hold any of / \\ # ? % :")
    import wandb  # slow to import: only if it is used

    key: Any = "unknown"
    with suppress(Exception):  # a home folder that cannot be read, another version of wandb
        key = wandb.api.api_key
    if not key:
        remedy = "has no key to log with: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"
        raise ConfigError("wandb_project", config.wandb_project, remedy)


def _logged(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None  # the torn last line of a killed run
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class Meter:
    """Sums over the micro-batches and ranks of a step, and over the steps since the last line of metrics."""

    def __init__(self, world: dist.World):
        self.world = world
        self.parts: dict[str, list] = {}  # of the current step, on this rank
        self.sums: dict[str, float] = {}  # of finished steps, over all ranks

    def add(self, **values: float | torch.Tensor) -> None:
        """Add a micro-batch's values. Tensors are not read before the step ends: that blocks the host."""
        for name, value in values.items():
            self.parts.setdefault(name, []).append(value)

    def values(self, name: str) -> list:
        return self.parts[name]

    def end_step(
        self, dropped: Sequence[str] = (), *, seconds: Callable[[], float], **same: float
    ) -> dict[str, float]:
        """The step's sums over ranks, with those in `dropped` set to 0, its time, and the values that are
        already the `same` on every rank. A collective."""
        own = {name: float(sum(map(float, values))) for name, values in self.parts.items()}
        own |= dict.fromkeys(dropped, 0.0)
        sums = dict(zip(own, dist.all_reduce(list(own.values()), self.world), strict=True))
        sums |= {**same, "steps": 1, "seconds": seconds()}
        self.parts = {}
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in sums.items()}
        return sums

    def drain(self) -> dict[str, float]:
        """The sums of all steps since the last call."""
        sums, self.sums = self.sums, {}
        return sums


class HeldOutLosses:
    """How sure a held-out loss is, and how sure it is that it has risen: standard errors over rows. The same
    rows are evaluated each time, so that the rise since the best evaluation is a mean of differences, whose
    error is far smaller than that of either loss."""

    def __init__(self):
        self.best: tuple[float, np.ndarray] | None = None  # the loss, and each row's NLL

    def metrics(self, losses: list[tuple[float, int]], world: dist.World) -> dict[str, float]:
        """eval/loss and its errors, from (NLL, tokens) of each of this rank's rows. A collective."""
        rows = [row for of_rank in dist.gather(losses, world) for row in of_rank]
        nll, tokens = np.array(rows, float).reshape(-1, 2).T
        loss = float(nll.sum() / max(1.0, tokens.sum()))
        if len(nll) < 2:
            return {"eval/loss": loss}
        found = {"eval/loss": loss, "eval/loss_error": self._error(nll, tokens)}
        if self.best is not None and len(self.best[1]) == len(nll):
            found[f"{UNLOGGED}eval/loss_rise_error"] = self._error(nll - self.best[1], tokens)
        if self.best is None or loss < self.best[0]:
            self.best = loss, nll
        return found

    @staticmethod
    def _error(nll: np.ndarray, tokens: np.ndarray) -> float:
        """Standard error of Σ nll / Σ tokens over rows (Cochran, Sampling Techniques, 1977, eq. 6.13)."""
        total, n = max(1.0, tokens.sum()), len(nll)
        return float(np.sqrt(np.square(nll - nll.sum() / total * tokens).sum() * n / (n - 1)) / total)


def say_saved(final: Path) -> None:
    """Log where the model is saved, and the command to chat with it."""
    installed = Path(sys.argv[0]).name.startswith("ballast-")
    log.info("saved               %s", final)
    log.info(
        "talk to it          %s chat %s",
        "ballast-model" if installed else "python model.py", shlex.quote(str(final)),
    )


def evaluation_lines(before: dict[str, float] | None, after: dict[str, float] | None) -> list[str]:
    """Lines for the end of a run: the first and last value of every held-out metric."""
    after = after or before or {}
    return [
        f"{name.removeprefix('eval/'):<20}{first:8.4f} → {after[name]:.4f}"
        for name, first in (before or {}).items()
    ]


@contextmanager
def profiled(step: int, options: LogOptions, output_dir: Path, rank: int, device: torch.device):
    """Record one step with the profiler if it is in profiler_steps: a Chrome trace, and a memory snapshot on
    CUDA."""
    if step not in options.profiler_steps:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history()
    with torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True) as profiler:
        yield
    directory = output_dir / "profile"
    directory.mkdir(parents=True, exist_ok=True)
    # TensorBoard's profiler page expects this suffix; chrome://tracing and Perfetto accept any.
    profiler.export_chrome_trace(str(directory / f"step-{step}-rank-{rank}.pt.trace.json"))
    if device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(directory / f"memory-step-{step}-rank-{rank}.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    log.info(
        "profile of step %d in %s: chrome://tracing, ui.perfetto.dev, or tensorboard --logdir there",
        step, directory,
    )
