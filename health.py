"""What a run tells about itself: one tidy line a step, metrics.jsonl, TensorBoard, wandb, run.log, verdicts
(rules.py) and clear endings; and the commands that judge, explain and redraw a finished run.
"""

import csv
import importlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import dist
from config import (
    BallastError,
    ConfigError,
    check_at_least_one,
    given_options,
    option_names,
    parse_config,
    read_yaml_file,
    resolve_checkpoint,
    run_command,
)
from rules import ALIASES, Doctor, Verdict, of_training, rules_of

log = logging.getLogger("ballast")

# Dense bf16 peak in TFLOP/s, from the vendors' data sheets: what MFU is a share of.
PEAK_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "B200": 2250,
    "4090": 165,
    "MI300X": 1307,
}


@dataclass
class LogOptions:
    logging_steps: int = 1
    """Write metrics every so many steps."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project; WANDB_MODE=offline needs no network."""
    wandb_entity: str | None = None
    """Weights & Biases team."""
    wandb_name: str | None = None
    """Name of the run there."""
    wandb_run_id: str | None = None
    """Id of the run there; a resumed run goes on under the same id."""
    profiler_steps: list[int] = field(default_factory=list)
    """Steps to record with the PyTorch profiler, into output_dir/profile."""
    report: bool = True
    """At the end write output_dir/report.html: verdict, every metric with its healthy band, samples, config,
    where the run has 10 steps or more."""
    health: bool = True
    """Judge every step by the rules of rules.py, and say when one is broken or well again."""
    health_rules: dict = field(default_factory=dict)
    """Other ranges, by rule: {entropy_collapse: off, grad_norm_high: {high: 20, window: 10}}. Of a rule low,
    high, window (steps in a row), after (steps before it may speak) and severity can be set."""
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
                )  # fmt: skip


def start_log(output_dir: Path, main: bool) -> None:
    """Everything printed goes to run.log too. LOG_LEVEL=DEBUG shows more on the console; the file always has
    it."""
    name = os.environ.get("LOG_LEVEL", "INFO").upper()
    level = logging.getLevelNamesMapping().get(name)
    if level is None:
        raise ConfigError("LOG_LEVEL", name, "is not a level; use DEBUG, INFO, WARNING or ERROR")
    log.handlers.clear()
    log.setLevel(logging.DEBUG)
    log.propagate = False
    if main:
        log.addHandler(_Console(level))
        checkpoint.claim(output_dir)
        to_file = logging.FileHandler(output_dir / "run.log", encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(to_file)
    else:
        log.addHandler(logging.NullHandler())


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(record.getMessage(), file=sys.stdout)  # above the progress bar, not through it
        sys.stdout.flush()


# What a message of torch, NCCL, CUDA, a hub or the system means here: (pattern, cause, what to do). The
# page's table of errors, without the rows that cannot occur in this code: docs/health.md says why.
ERRORS: tuple[tuple[str, str, str], ...] = (
    (r"timed? ?out.*(recv|send|operation|waiting|collective)|Watchdog caught collective operation timeout",
     "a process waited longer than gpu_timeout_minutes for the others: one is stuck, or took another path",
     "look at that rank's machine, disk and server; raise gpu_timeout_minutes if it was only slow"),
    (r"Connection (closed|reset) by peer|Broken pipe|Connection refused.*TCPStore|Socket closed",
     "another process of this run is gone: killed (exit code −9: out of host memory), or ended by an error",
     "look for the first error above or in dmesg; fewer or smaller rows (sequence_len) if memory was it"),
    (r"NCCL.*(abort|error|unhandled)|ncclUnhandled|ncclSystem|ncclRemote|communicator was aborted",
     "the link between GPUs failed, or another process ended first",
     "set NCCL_DEBUG=INFO and look for the first rank that reports; check NCCL_SOCKET_IFNAME and /dev/shm"),
    (r"device-side assert|index out of (range|bounds)",
     "a token id or index is beyond a table",
     "run once on a CPU, or with CUDA_LAUNCH_BLOCKING=1: the row is named there; was it made with another "
     "tokenizer?"),
    (r"CheckpointError|number of tensors saved|different number of tensors",
     "activation checkpointing recomputed something else than it had saved",
     "gradient_checkpointing_kwargs: {use_reentrant: true}"),
    (r"returned nan values in its",
     "detect_anomaly found the operation whose gradient is NaN; it is named in the traceback in run.log",
     "detect_anomaly: false lets the forensics name module and rows; then lower learning_rate"),
    (r"CAS service|hf_xet|xet_get",
     "the hub's XET storage could not be reached", "export HF_HUB_DISABLE_XET=1 and try again"),
    (r"No space left on device|Disk quota exceeded",
     "the disk is full; the newest whole checkpoint is untouched",
     "free space, or lower save_total_limit; the same command goes on from there"),
    (r"Read-only file system|Permission denied",
     "output_dir cannot be written", "choose another output_dir"),
    (r"triton.*(compil|out of resource|PTX)|out of resource: shared memory",
     "a Triton kernel could not be built for this GPU",
     "after editing a kernel clear its cache: rm -rf ~/.triton/cache"),
    (r"CUDA driver version is insufficient|no kernel image is available",
     "torch was built for another driver or GPU", "install the torch that pyproject.toml pins"),
    (r"Too many open files", "the process's limit of open files is reached", "ulimit -n 65536"),
)  # fmt: skip


def explain_error(error: BaseException) -> str | None:
    """Cause and remedy of an error that is not ours, in one line, or None where it is not known."""
    text = f"{type(error).__name__}: {error}"
    for pattern, cause, remedy in ERRORS:
        if re.search(pattern, text, re.IGNORECASE | re.DOTALL):
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            return f"{cause} ({first[:160]}); {remedy}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the host (torch's CPU allocator raises a plain RuntimeError)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def run(main: Callable[[Any], None], parse: Callable[[], Any]) -> None:
    """Run a recipe. A user's mistake, and an error whose cause is known, end as one line and exit code 2, the
    traceback in run.log; on several ranks the first to fail prints it."""
    config = None
    try:
        config = parse()
        main(config)
    except KeyboardInterrupt:
        print("stopped at once; the newest checkpoint is where a resumed run begins", file=sys.stderr)
        os._exit(130)
    except Exception as error:
        log.debug("%s", traceback.format_exc())
        if is_out_of_memory(error):
            from memory import what_to_change  # its modules import this one

            said = what_to_change(error, config)
        else:
            said = str(error) if isinstance(error, BallastError) else explain_error(error)
        if said is None:
            raise  # a fault of ours: the whole traceback, on the console and in run.log
        if not isinstance(error, BallastError) and (missing := dist.behind()):
            said = f"{missing}: {said}"
        if _first_to_fail():
            print(f"error: {said}", file=sys.stderr, flush=True)
            log.debug("error: %s", said)
        for logger in list(MetricLogger.running):
            with suppress(Exception):  # the error above is what counts
                logger.close(failed=True)  # its report shows the incident
        logging.shutdown()
        # At once: another rank may wait in a collective, and torchrun stops it when this one is gone.
        os._exit(2)


def _first_to_fail() -> bool:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    run_id = f"{os.environ['TORCHELASTIC_RUN_ID']}-{os.environ.get('MASTER_PORT')}-{os.getppid()}"
    try:
        os.close(os.open(Path(tempfile.gettempdir()) / f"ballast-error-{run_id}", os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"memory/max_alloc": allocated / 2**30, "memory/max_reserved": reserved / 2**30}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"memory/max_alloc": peak / 2**30, "memory/max_reserved": peak / 2**30}


def gib(count: int) -> str:
    """Bytes as a reader takes them in: 1.3 GiB, 4.0 MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def weight_bytes(model: nn.Module) -> int:
    """Bytes of this process's parameters and stored weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(_local_bytes(tensor) for tensor in tensors)


def optimizer_bytes(optimizers: list) -> int:
    """Bytes of this process's optimiser states; 0 before the first step."""
    total = 0
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                parts = value if isinstance(value, tuple) else (value,)
                total += sum(_local_bytes(part) for part in parts if isinstance(part, torch.Tensor))
    return total


def _local_bytes(tensor: torch.Tensor) -> int:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.numel() * tensor.element_size()


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of the device in bf16 where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for key, tera in PEAK_TFLOPS.items() if key in name), None)


class Unhealthy(BallastError):
    """A run that its own rules stopped (on_unhealthy)."""


# ------------------------------------------------------------------------------------------------------------
# Metrics as they are made
# ------------------------------------------------------------------------------------------------------------

# Metric → its name on the console's line, and its format. The name must not read as another metric's.
FORMATS = {
    "train/loss": ("loss", ".4f"), "eval/loss": ("eval", ".4f"), "train/grad_norm": ("norm", ".3f"),
    "train/learning_rate": ("lr", ".2e"), "reward": ("reward", ".3f"), "entropy": ("entropy", ".3f"),
    "kl": ("kl", ".4f"), "grad_norm": ("norm", ".3f"), "clip_ratio/region_mean": ("clip_ratio", ".3f"),
    "completions/mean_length": ("length", ".1f"), "completions/clipped_ratio": ("cut_at_limit", ".1%"),
    "step_time": ("s", ".2f"),
    "tokens_per_second": ("tok/s", ",.0f"), "memory/max_alloc": ("GiB", ".2f"), "mfu": ("mfu", ".1%"),
    "ebft/alignment_cosine": ("alignment_cosine", ".4f"), "ebft/cfm_unwhitened": ("cfm_unwhitened", ".5f"),
    "ebft/pairwise_cosine": ("pairwise_cosine", ".4f"), "eval/exact": ("held-out exact", ".1%"),
    "eval/cfm_unwhitened": ("held-out cfm_unwhitened", ".5f"),
    "eval/accuracy": ("held-out accuracy", ".1%"), "eval/reward": ("held-out reward", ".3f"),
    "eval/pass@1": ("held-out pass@1", ".1%"), "eval/greedy": ("held-out greedy", ".1%"),
}  # fmt: skip


ABANDON = 1e6  # in the sum over ranks that asks whether to stop: stop without a checkpoint


def made_by() -> str:
    """The code that runs: version, commit, whether the tree has changes of its own, and torch."""
    try:
        version = importlib.metadata.version("ballast")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    commit, git, here = "", shutil.which("git"), Path(__file__).resolve().parent
    if git and (here / ".git").exists():
        described = [git, "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(described, capture_output=True, text=True)
        commit = f", commit {found.stdout.strip()}" if found.returncode == 0 else ""
    return f"Ballast {version}{commit}, torch {torch.__version__}, Python {platform.python_version()}"


class MetricLogger:
    """Console, output_dir/metrics.jsonl, TensorBoard and wandb, from one dict a step. Only the main rank
    writes."""

    running: ClassVar[list["MetricLogger"]] = []  # for a run that ends in an error to close

    def __init__(self, config: Any, output_dir: Path, *, main: bool, first_step: int, total_steps: int):
        self.main, self.output_dir = main, output_dir
        self.running.append(self)
        self.reporting = config.report and total_steps >= 10  # fewer points show nothing
        self.doctor: Doctor | None = None
        self.asked = 0.0  # what the rules ask for: 0 to go on, 1 to save and stop, ABANDON to stop
        self.why = ""
        self.bar: tqdm | None = None
        self.wandb: Any = None
        if not main:
            return
        metrics, kept = output_dir / "metrics.jsonl", []
        if metrics.exists():  # a resumed run repeats the steps after its checkpoint: drop their first version
            lines = metrics.read_text(encoding="utf-8").splitlines()
            logged = [(line, row) for line in lines if (row := _logged(line)) and row["step"] <= first_step]
            checkpoint.write_atomically(metrics, "".join(line + "\n" for line, _ in logged))
            kept = [row for _, row in logged]
        self.file = metrics.open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(
            str(output_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None
        )
        values = {k: v for k, v in asdict(config).items() if k != "config_directory"}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        checkpoint.write_atomically(output_dir / "config.yaml", f"# {made_by()}\n{text}")
        if config.wandb_project:
            import wandb

            self.wandb = wandb.init(
                project=config.wandb_project, entity=config.wandb_entity, name=config.wandb_name,
                id=config.wandb_run_id, resume="allow" if config.wandb_run_id else None,
                dir=str(output_dir), config=values,
            )  # fmt: skip
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False,
            disable=not sys.stderr.isatty(), file=sys.stderr,
        )  # fmt: skip
        self.total_steps = total_steps
        if config.health:
            self.doctor = Doctor(values, total_steps)
            self.doctor.recall(kept)
            if self.doctor.ill:
                log.warning("unhealthy since before the checkpoint: %s", self.doctor.status)

    def observe(self, step: int, metrics: dict[str, float], rows: Callable[[], str] | None = None) -> None:
        """Judge a step that is done. What changes is said; what on_unhealthy asks for stands in `asked`, for
        the next collective to tell every rank. `rows` names the batch, where a rule asks for it."""
        if self.doctor is None:
            return
        actions = self.doctor.config["on_unhealthy"]
        for verdict in self.doctor.observe(step, metrics, rows):
            say = log.warning if verdict.ill else log.info
            say("%s", verdict.line(self.doctor.config))
            action = actions if isinstance(actions, str) else actions.get(verdict.rule.severity, "warn")
            if verdict.ill and action != "warn" and not self.asked:
                self.asked = ABANDON if action == "stop" else 1.0
                self.why = f"{verdict.rule.name}: {verdict.metric} {verdict.found}"
        if self.bar is not None:
            self.bar.set_postfix_str(self.doctor.status)

    def stopping(self, signal: int | None, step: int, world: dist.World) -> bool:
        """Whether any rank has had a signal, or the rules ask to save and stop. A collective. Raises
        Unhealthy where the rules say to stop at once."""
        asked = dist.all_reduce([float(signal is not None) + self.asked], world)[0]
        if asked >= ABANDON:
            why = dist.from_main(lambda: self.why, world)
            raise Unhealthy(f"step {step}: stopped by on_unhealthy, without a checkpoint: {why}")
        return asked > 0

    def stopped(self, step: int, world: dist.World) -> None:
        """The end of a run that was stopped and saved. Raises Unhealthy where the rules asked for it."""
        self.close()
        why = dist.from_main(lambda: self.why, world)
        if why:
            raise Unhealthy(f"step {step}: saved and stopped by on_unhealthy: {why}")
        log.info("stopped by a signal after step %d; the same command goes on from here", step)
        dist.finish()

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step that is done (`step` counts from 1)."""
        if not self.main:
            return
        metrics = {k: v for k, v in metrics.items() if math.isfinite(v)}  # JSON has no NaN
        if self.doctor is not None:
            metrics = {**metrics, **self.doctor.metrics()}
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)
        shown = [f"{label} {metrics[key]:{form}}" for key, (label, form) in FORMATS.items() if key in metrics]
        if self.doctor is not None and self.doctor.ill:
            shown.append(f"unhealthy: {self.doctor.status}")
        log.info("step %*d/%d  %s", len(str(self.total_steps)), step, self.total_steps, "  ".join(shown))

    def close(self, failed: bool = False) -> None:
        """Close the files, and say in a line what the rules have found; `failed` where the run ends in an
        error."""
        with suppress(ValueError):  # closed already
            self.running.remove(self)
        if not self.main:
            return
        if self.doctor is not None:
            found = self.doctor.ever.values()
            named = ", ".join(f"{v.rule.name} at step {v.step}" for v in found)
            well = "no rule spoke before the error" if failed else "well from beginning to end"
            log.info("health              %s", named or well)
        self.file.close()
        self.tensorboard.close()
        if self.bar is not None:
            self.bar.close()
        if self.reporting:
            try:
                from report import write

                log.info("report              %s", write([self.output_dir], self.output_dir / "report.html"))
            except Exception:  # a page that cannot be drawn must not fail a run that is done
                log.warning("no report could be written; the traceback is in run.log")
                log.debug("%s", traceback.format_exc())
        if self.wandb is not None:
            self.wandb.finish()


def _logged(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None  # the torn last line of a killed run
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def say_saved(final: Path) -> None:
    """Where the model is, and the command that talks to it."""
    installed = Path(sys.argv[0]).name.startswith("ballast-")
    log.info("saved               %s", final)
    log.info(
        "talk to it          %s chat %s",
        "ballast-generation" if installed else "python generation.py", final,
    )  # fmt: skip


def report_evaluation(before: dict[str, float], after: dict[str, float]) -> None:
    """At the end of a run: every held-out metric, first and last."""
    for name in before:
        log.info("%-20s%8.4f → %.4f", name.removeprefix("eval/"), before[name], after[name])


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
    # The ending is what TensorBoard's profiler page looks for; chrome://tracing and Perfetto do not mind.
    profiler.export_chrome_trace(str(directory / f"step-{step}-rank-{rank}.pt.trace.json"))
    if device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(directory / f"memory-step-{step}-rank-{rank}.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    log.info(
        "profile of step %d in %s: chrome://tracing, ui.perfetto.dev, or tensorboard --logdir there",
        step, directory,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# A finished run, ours or another trainer's
# ------------------------------------------------------------------------------------------------------------


def read_history(path: Path) -> tuple[list[dict], dict]:
    """(one dict a logged step, config) of a run directory, a metrics.jsonl, a trainer_state.json (TRL,
    axolotl) or a table exported from wandb (.csv, .jsonl). ConfigError for anything else."""
    if path.is_dir():
        path = next((path / n for n in ("metrics.jsonl", "trainer_state.json") if (path / n).exists()), path)
    if not path.is_file():
        raise ConfigError(str(path), None, "is neither a run's directory nor a file of metrics")
    config: dict = {}
    if (beside := path.parent / "config.yaml").exists():
        loaded = read_yaml_file(beside, "config.yaml")
        config = loaded if isinstance(loaded, dict) else {}
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(text.splitlines()))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            whole = json.loads(text)
            rows = whole["log_history"] if isinstance(whole, dict) else whole
    except (ValueError, KeyError, RecursionError, csv.Error) as error:
        raise ConfigError(str(path), None, f"is not a history that can be read ({error!r})") from None
    if not isinstance(rows, list):
        raise ConfigError(str(path), None, "must hold a list of logged steps")
    history = []
    foreign = path.suffix != ".jsonl" or not any("train/loss" in r for r in rows if isinstance(r, dict))
    rewarded = any(isinstance(r, dict) and any(str(k).endswith("reward") for k in r) for r in rows)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number}", None, "is no object")
        made: dict[str, float] = {}
        for name, value in row.items():
            try:
                figure = float(value)
            except (TypeError, ValueError):
                continue
            name = str(name).rpartition(" - ")[2]  # a wandb export puts the run's name before the metric's
            if name.startswith("train/") and (rewarded or name == "train/global_step"):
                name = name.removeprefix("train/")
            if foreign and not rewarded:
                name = ALIASES.get(name, name)
            made[name] = figure
        step = next((made.pop(n) for n in ("step", "_step", "Step", "global_step") if n in made), number)
        if not abs(step) < 2**53:
            raise ConfigError(f"{path}:{number}", None, f"has step {step}, which is none")
        history.append({"step": int(step), **made})
    if not history:
        raise ConfigError(str(path), None, "holds no metrics")
    return history, config


def judge(history: list[dict], config: dict) -> tuple[Doctor, list[Verdict]]:
    """The verdicts that a run with these metrics would have had."""
    # How long it was meant to be is unknown, and with it the schedule.
    known = {k: v for k, v in config.items() if k != "lr_scheduler"}
    try:
        doctor = Doctor(known, total_steps=history[-1]["step"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError("config.yaml", None, f"holds an option of another kind ({error})") from None
    verdicts = []
    for row in of_training(history):
        metrics = {k: v for k, v in row.items() if k != "step" and not k.startswith("health/")}
        verdicts += doctor.observe(row["step"], metrics)
    return doctor, verdicts


def ended_in(directory: Path) -> str | None:
    """The error that a run ended in, by the end of its log; None where it came to its end or has gone on."""
    try:
        with (directory / "run.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if " DEBUG error: " in line:
            return line.split(" DEBUG error: ", 1)[1]
        if re.search(r" INFO (?!health  |report  )", line):
            return None
    return None


USAGE = """usage: python health.py COMMAND …
    diagnose RUN          verdicts for a finished run: its directory, a metrics.jsonl, a trainer_state.json
                          (TRL, axolotl) or a table exported from wandb (.csv, .jsonl)
    report DIR [DIR …]    one page about a run, or several side by side: report.html; out=FILE
    replay DIR            run an incident (output_dir/incidents/step-N) again, in one CPU process
    memory --config X     what a run needs of a GPU's memory, and what to change; also key=value, processes=N
                          and recipe=sft|grpo|ebft
    convert FILE          an axolotl or TRL config in our options, on stdout (docs/migration.md)
    drill NAME | all      break a tiny run on purpose, see it named, mend it (drills/*.yaml)"""


def recipe_config(arguments: list[str]) -> Any:
    """The config that a command line describes, of the recipe that knows most of its keys."""
    named = [a.partition("=")[2] for a in arguments if a.startswith("recipe=")]
    arguments = [a for a in arguments if not a.startswith("recipe=")]
    for name in named:
        if name not in ("sft", "grpo", "ebft"):
            raise ConfigError("recipe", name, "is none; sft, grpo or ebft")
    # This is a program here: modules never import recipes
    configs = [importlib.import_module(name).Config for name in named or ("sft", "grpo", "ebft")]
    given = given_options(arguments)
    unknown = [len(given - option_names(config)) for config in configs]
    return parse_config(configs[unknown.index(min(unknown))], arguments)


def memory_table(arguments: list[str]) -> str:
    from memory import table
    from weights import read_architecture

    processes = [a.partition("=")[2] for a in arguments if a.startswith("processes=")]
    if processes and not (processes[-1].isdigit() and int(processes[-1])):
        raise ConfigError("processes", processes[-1], "must be a whole number of at least 1")
    config = recipe_config([a for a in arguments if not a.startswith("processes=")])
    place = resolve_checkpoint(
        config.base_model, config.base_model_revision, Path(config.config_directory), only_config=True
    )
    arch = read_architecture(place, config.ignore_config_fields)
    return table(arch, config, int(processes[-1]) if processes else 1)


def command_line(arguments: list[str]) -> int:
    """0: well, 1: something was found, 2: bad usage."""
    command, *rest = arguments or [""]
    if command == "diagnose" and len(rest) == 1:
        history, config = read_history(Path(rest[0]))
        doctor, verdicts = judge(history, config)
        for verdict in verdicts:
            print(verdict.line(config))
        readers = [rule for found in doctor.readers.values() for rule in found]
        of, read = len(doctor.rules), sum(rule in readers for rule in doctor.rules)
        if (error := ended_in(Path(rest[0]))) is not None:
            print(f"ended in an error: {error}")
        elif not doctor.ever:
            print(f"well: {len(history)} logged steps, {read} of {of} rules had something to read")
        return 1 if doctor.ever or error else 0
    if command == "report" and rest:
        from report import write

        runs = [Path(a) for a in rest if not a.startswith("out=")]
        named = [Path(a.removeprefix("out=")) for a in rest if a.startswith("out=")]
        if runs:
            beside = runs[0] if len(runs) == 1 and runs[0].is_dir() else Path(".")
            print(write(runs, named[-1] if named else beside / "report.html"))
            return 0
    if command == "replay" and len(rest) == 1:
        from forensics import replay  # its modules import this one

        return 0 if replay(Path(rest[0])) else 1
    if command == "memory" and rest:
        print(memory_table(rest))
        return 0
    if command == "convert" and len(rest) == 1:
        from migrate import convert_file

        recipes = {name: importlib.import_module(name).Config for name in ("sft", "grpo", "ebft")}
        print(convert_file(Path(rest[0]), recipes), end="")
        return 0
    if command == "drill" and len(rest) == 1:
        from drill import show, show_all

        root = Path("outputs/drills").absolute()
        return 0 if (show_all(root) if rest[0] == "all" else show(rest[0], root)) else 1
    print(USAGE, file=sys.stderr)
    return 2


def cli() -> None:
    """python health.py, or ballast-health where the package is installed."""
    run_command(lambda: command_line(sys.argv[1:]))


if __name__ == "__main__":
    cli()
