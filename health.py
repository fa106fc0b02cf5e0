"""What a run tells about itself: one tidy line a step, metrics.jsonl, TensorBoard, wandb, run.log, and clear
endings."""

import json
import logging
import math
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from config import BallastError, ConfigError

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


class NonFinite(BallastError):
    """A loss or gradient that is NaN or infinite; the optimiser has not touched anything."""

    def __init__(self, step: int, what: str, where: str, remedy: str):
        super().__init__(f"step {step}: {what} is not finite; {where}; {remedy}")


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
        output_dir.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(output_dir / "run.log", encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(to_file)
    else:
        log.addHandler(logging.NullHandler())


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(record.getMessage(), file=sys.stdout)  # above the progress bar, not through it
        sys.stdout.flush()


def run(main: Callable[[Any], None], parse: Callable[[], Any]) -> None:
    """Run a recipe. A user's mistake ends as one line and exit code 2, its traceback in run.log; on several
    ranks the first to fail prints it."""
    try:
        main(parse())
    except BallastError as error:
        log.debug("%s", traceback.format_exc())
        if _first_to_fail():
            print(f"error: {error}", file=sys.stderr, flush=True)
            log.debug("error: %s", error)
        logging.shutdown()
        os._exit(
            2
        )  # at once: another rank may wait in a collective, and torchrun stops it when this one is gone
    except torch.OutOfMemoryError as error:
        log.debug("%s", traceback.format_exc())
        print(f"error: out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        print(
            "mend it in this order: micro_batch_size: 1 with more gradient_accumulation_steps; "
            "gradient_checkpointing: true; smaller sequence_len; adapter: lora; more GPUs; fsdp_cpu_offload",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(2)
    except Exception:
        log.debug(
            "%s", traceback.format_exc()
        )  # a fault of ours: the whole traceback, on the console and in run.log
        raise
    except KeyboardInterrupt:
        print("stopped at once; the newest checkpoint is where a resumed run begins", file=sys.stderr)
        os._exit(130)


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


def check_finite(
    step: int,
    losses: list[torch.Tensor],
    batches: list,
    name_of: Callable[[int], str],
    norm: torch.Tensor,
    model: nn.Module,
) -> None:
    """Stop before the optimiser spreads a NaN into every weight, and say where it came from (reference page:
    NaN)."""
    if math.isfinite(norm.item()) and all(math.isfinite(loss.item()) for loss in losses):
        return
    for loss, batch in zip(losses, batches, strict=True):
        if not math.isfinite(loss.item()):
            rows = ", ".join(name_of(row) for row in batch.rows[:4]) + (" …" if len(batch.rows) > 4 else "")
            raise NonFinite(
                step, f"the loss ({loss.item()})", f"micro-batch of rows {rows}",
                "see them with `python data.py inspect`; if they are sound, lower learning_rate or drop bf16",
            )  # fmt: skip
    if not math.isfinite(norm.item()):
        bad = []
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            if gradient is not None and not torch.isfinite(gradient).all():
                bad.append(name)
        raise NonFinite(
            step, f"the gradient norm ({norm.item()}), though the loss is finite",
            f"{len(bad)} parameters, first {bad[-1] if bad else 'on another rank'} (in backward order)",
            "the backward pass overflowed: lower learning_rate; drop bf16 to see if precision is the cause",
        )  # fmt: skip


FORMATS = {
    "train/loss": ("loss", ".4f"), "eval/loss": ("eval", ".4f"), "train/grad_norm": ("norm", ".3f"),
    "train/learning_rate": ("lr", ".2e"), "reward": ("reward", ".3f"), "entropy": ("entropy", ".3f"),
    "kl": ("kl", ".4f"), "grad_norm": ("norm", ".3f"), "clip_ratio/region_mean": ("clipped", ".3f"),
    "completions/mean_length": ("length", ".1f"), "step_time": ("s", ".2f"),
    "tokens_per_second": ("tok/s", ",.0f"), "memory/max_alloc": ("GiB", ".2f"), "mfu": ("mfu", ".1%"),
    "ebft/alignment_cosine": ("alignment", ".4f"), "ebft/cfm_unwhitened": ("cfm", ".5f"),
    "ebft/pairwise_cosine": ("alike", ".4f"), "eval/exact": ("exact", ".1%"),
    "eval/cfm_unwhitened": ("held-out cfm", ".5f"),
    "eval/accuracy": ("right", ".1%"), "eval/reward": ("held-out reward", ".3f"),
    "eval/pass@1": ("pass@1", ".1%"), "eval/greedy": ("greedy", ".1%"),
}  # fmt: skip


class MetricLogger:
    """Console, output_dir/metrics.jsonl, TensorBoard and wandb, from one dict a step. Only the main rank
    writes."""

    def __init__(self, config: Any, output_dir: Path, *, main: bool, first_step: int, total_steps: int):
        self.main, self.output_dir = main, output_dir
        self.bar: tqdm | None = None
        self.wandb: Any = None
        if not main:
            return
        metrics = output_dir / "metrics.jsonl"
        if metrics.exists():  # a resumed run repeats the steps after its checkpoint: drop their first version
            lines = metrics.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= first_step]  # type: ignore[operator]
            aside = metrics.with_suffix(".tmp")
            aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            aside.replace(metrics)
        self.file = metrics.open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(
            str(output_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None
        )
        values = {k: v for k, v in asdict(config).items() if k != "config_directory"}
        (output_dir / "config.yaml").write_text(
            yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
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

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step that is done (`step` counts from 1)."""
        if not self.main:
            return
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)
        shown = [f"{label} {metrics[key]:{form}}" for key, (label, form) in FORMATS.items() if key in metrics]
        log.info("step %*d/%d  %s", len(str(self.total_steps)), step, self.total_steps, "  ".join(shown))

    def close(self) -> None:
        if not self.main:
            return
        self.file.close()
        self.tensorboard.close()
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # the torn last line of a killed run


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
    profiler.export_chrome_trace(str(directory / f"step-{step}-rank-{rank}.json"))
    if device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(directory / f"memory-step-{step}-rank-{rank}.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    log.info("profile of step %d in %s (open in chrome://tracing or ui.perfetto.dev)", step, directory)
