"""What every recipe does around its loop: begin, resume, end a step, end a run. Plain functions that a loop
calls and that never call it."""

import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dist
from checkpoints import building
from checkpoints.families import Architecture
from checkpoints.saving import Checkpointer, save_final
from checkpoints.weights import read_architecture, resized
from data import load_tokenizer, trained_tokenizer
from health import memory, report
from health.monitor import MetricLogger, say_saved
from model import Transformer
from run.config import BallastError, parse_config, resolve_checkpoint
from run.log import log, start_log
from text.packing import settle_intervals
from text.tokenizer import Tokenizer


@dataclass
class Run:
    """What exists from the beginning of a run to its end."""

    config: Any
    world: dist.World
    interrupt: dist.Interrupt
    checkpoint: Path  # base_model, on this disk
    arch: Architecture
    tokenizer: Tokenizer
    step: int = 0  # optimiser steps done
    total_steps: int = 0

    def __post_init__(self):
        self.output_dir = Path(self.config.output_dir)
        self.directory = Path(self.config.config_directory)  # that paths of the config are relative to
        self.state: dict[str, Any] = {}  # what a checkpoint keeps beside weights and optimiser, as JSON
        self.seconds = dist.Timer()  # since the beginning, once
        self.resume_from: Path | None = None
        self.checkpointer: Checkpointer
        self.logger: MetricLogger

    @property
    def last(self) -> bool:
        return self.step == self.total_steps


def begin(config: Any) -> Run:
    """Processes, run.log, seeds, signals; base_model on this disk, its architecture and tokenizer."""
    output_dir, directory = Path(config.output_dir), Path(config.config_directory)
    world = dist.init(config)
    start_log(output_dir, world.main)
    dist.seed_everything(config.seed, world.rank)
    interrupt = dist.Interrupt()
    checkpoint = dist.main_first(
        lambda: resolve_checkpoint(config.base_model, config.base_model_revision, directory), world
    )
    arch = read_architecture(checkpoint, config.ignore_config_fields)
    if getattr(config, "tokenizer_vocab_size", None) is None:
        tokenizer = load_tokenizer(checkpoint, config, directory)
    else:
        cache = Path(config.dataset_prepared_path or output_dir / "prepared")
        tokenizer = dist.main_first(lambda: trained_tokenizer(config, directory, cache), world)
    return Run(config, world, interrupt, checkpoint, arch, tokenizer)


# Options that a run and the checkpoint that it resumes from must share.
IDENTITY = (
    "base_model", "random_init", "mode", "adapter", "load_in_4bit", "load_in_8bit", "fp8", "fp8_frozen",
    "lora_r", "lora_target_modules", "optimizer", "seed", "sequence_len", "sample_packing", "val_set_size",
    "num_generations", "num_iterations", "steps_per_generation", "rollout_engine", "stride",
    "context_length", "generate_max_len", "n_samples_per_prompt",
)


def plan(run: Run, total_steps: int, steps_per_epoch: int, **identity: Any) -> None:
    """Set the length of the run and find the checkpoint that it resumes from, if there is one. `identity` is
    what must be the same there beside the options of IDENTITY, under names that the user reads."""
    config = run.config
    run.total_steps = total_steps
    dist.check_schedule(config, total_steps)
    settle_intervals(config, total_steps, steps_per_epoch)
    values = asdict(config)
    identity = {**{key: values[key] for key in IDENTITY if key in values}, **identity}
    run.checkpointer = Checkpointer(run.output_dir / "checkpoints", run.world, config)
    run.resume_from, saved = run.checkpointer.to_resume(identity)
    run.step = saved.get("step", 0)
    run.state = {"num_tokens": 0, "eval_before": None, **saved, "identity": identity}


def build(run: Run, rows: int | None = None) -> tuple[Transformer, list[torch.optim.Optimizer]]:
    """The model that is trained, with `rows` in its vocabulary (unset: those of the checkpoint, and of the
    tokenizer where it has more), and its optimisers."""
    config, tokenizer = run.config, run.tokenizer
    rows = rows or max(run.arch.vocab_size, tokenizer.vocab_size)
    run.arch = resized(run.arch, rows, config.pad_vocab_to_multiple_of)
    model = building.build_model(
        run.arch, run.checkpoint, config, run.world, getattr(config, "random_init", False),
        new_tokens=tokenizer.new_ids,
    )
    return model, dist.make_optimizers(model, config)


def describe(run: Run, model: Transformer, what: str) -> None:
    """Log the first line of a run; `what` describes the data and the steps."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        "%s: %s parameters, %s trained; %s",
        run.arch.name,
        f"{model.count_parameters():,}",
        f"{trained:,}",
        what,
    )


def resume(
    run: Run, model: Transformer, optimizers: list, moving: Mapping[str, nn.Module] | None = None
) -> None:
    """Load weights, optimisers and random state of the checkpoint, if there is one, and open the metrics.
    `moving` are other models that change during the run."""
    if run.resume_from is not None:
        run.checkpointer.load(run.resume_from, model, optimizers, run.config.seed, moving)
    log.debug("ready after %.1f s", run.seconds())
    run.logger = MetricLogger(
        run.config, run.output_dir, main=run.world.main, first_step=run.step, total_steps=run.total_steps
    )


def router_aux_coef(run: Run) -> float:
    """Weight of the load-balancing loss: the config's, else the checkpoint's own."""
    given = run.config.router_aux_loss_coef
    return run.arch.router_aux_loss_coef if given is None else given


@dataclass
class Due:
    """What to do after a step."""

    evaluate: bool
    log: bool
    save: bool
    stop: bool  # a signal or a rule asks for it: save, and leave the loop


def end_step(run: Run, evaluates: bool) -> Due:
    """What is due after run.step steps, the same on every rank. `evaluates`: there is held-out data. A
    collective."""
    config, step = run.config, run.step
    run.logger.advance()
    stop = run.logger.stopping(run.interrupt.signal, step, run.world)

    def every(steps: int | None) -> bool:
        return steps is not None and step % steps == 0

    evaluate = evaluates and (run.last or every(config.eval_steps))
    save = config.save_steps is not None and (run.last or every(config.save_steps))
    return Due(evaluate, run.last or every(config.logging_steps), save or stop, stop and not run.last)


def stop(run: Run) -> None:
    """End a run that was asked to stop and has been saved."""
    run.checkpointer.finish()
    _close(run.logger)
    run.logger.stopped(run.step, run.world)


def _close(logger: MetricLogger, failed: bool = False) -> None:
    """Close the metrics and write the report of the run; `failed` where the run ends in an error."""
    logger.close(failed)
    if logger.reporting:
        try:
            page = report.write([logger.output_dir], logger.output_dir / "report.html")
            log.info("report              %s", page)
        except Exception:  # a page that cannot be drawn must not fail a run that is done
            log.warning("no report could be written; the traceback is in run.log")
            log.debug("%s", traceback.format_exc())


def save_model(run: Run, model: Transformer) -> Path:
    """output_dir/final, once the last checkpoint is whole."""
    run.checkpointer.finish()
    return save_final(model, run.tokenizer, run.config, run.world)


def finish(run: Run, final: Path, summary: Sequence[str] = ()) -> None:
    """Close the metrics and log how the run went and where the model is."""
    _close(run.logger)
    for line in summary:
        log.info("%s", line)
    say_saved(final)
    dist.finish()


def cli(main: Callable[[Any], None], config_class: type, doc: str | None) -> None:
    """A recipe as a program: its command line, described by the beginning of its docstring."""
    description = " ".join((doc or "").split("\n\n")[0].split())
    start(main, lambda: parse_config(config_class, sys.argv[1:], description=description))


# ------------------------------------------------------------------------------------------------------------
# How a run ends that went wrong
# ------------------------------------------------------------------------------------------------------------

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
)


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


def start(main: Callable[[Any], None], parse: Callable[[], Any]) -> None:
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
            message = memory.what_to_change(error, config)
        else:
            message = str(error) if isinstance(error, BallastError) else explain_error(error)
        if message is None:
            raise  # a fault of ours: the whole traceback, on the console and in run.log
        if not isinstance(error, BallastError) and (missing := dist.behind()):
            message = f"{missing}: {message}"
        if _first_to_fail():
            print(f"error: {message}", file=sys.stderr, flush=True)
            log.debug("error: %s", message)
        for logger in list(MetricLogger.running):
            with suppress(Exception):  # the error above is what counts
                _close(logger, failed=True)  # the report shows the incident
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
