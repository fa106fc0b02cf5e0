"""The code around the loop that all recipes share: begin, resume, end a step, end a run. Plain functions that
the loop calls; none calls back."""

import json
import logging
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dist
from checkpoints import building
from checkpoints.adapters import adapter_base, adopt_adapter
from checkpoints.families import Architecture
from checkpoints.saving import Checkpointer, peek, save_final
from checkpoints.weights import read_architecture, resized, untrained_rows, weights_fingerprint
from data import load_tokenizer, trained_tokenizer
from health import memory, report
from health.monitor import MetricLogger, check_wandb, say_saved
from model import Transformer
from run.config import BallastError, ConfigError, expanded, parse_config, resolve_checkpoint, shown
from run.log import log, start_log
from run.terminal import make_printable
from text.packing import settle_intervals
from text.tokenizer import Tokenizer

STARTED = time.time()  # of this process


@dataclass
class Run:
    """State that lives as long as the run."""

    config: Any
    world: dist.World
    interrupt: dist.Interrupt
    checkpoint: Path  # base_model, on this disk
    arch: Architecture
    tokenizer: Tokenizer
    date: str = ""  # when the run began, ISO 8601: what chat templates write as today
    step: int = 0  # optimiser steps done
    total_steps: int = 0

    def __post_init__(self):
        self.output_dir = Path(self.config.output_dir)
        self.directory = Path(self.config.config_directory)  # base of relative paths in the config
        self.changed: dict[str, tuple[Any, Any]] = {}  # option → (the checkpoint's, ours)
        self.state: dict[str, Any] = {}  # stored in a checkpoint besides weights and optimiser, as JSON
        self.seconds = dist.Timer()  # since the start; read once
        self.measured: dict[str, float] = {}  # before the first step: data/…, for the rules
        self.resume_from: Path | None = None
        self.checkpointer: Checkpointer
        self.logger: MetricLogger

    @property
    def last(self) -> bool:
        return self.step == self.total_steps


def refuse_adapter_as_base(config: Any, checkpoint: Path) -> None:
    """ConfigError where base_model is a PEFT adapter, with the options that train it further."""
    if (checkpoint / "adapter_config.json").exists() and not (checkpoint / "config.json").exists():
        base, _ = adapter_base(checkpoint)
        problem = f"is a PEFT adapter; set base_model: {base or '(its base model)'}, adapter: lora and "
        raise ConfigError("base_model", config.base_model, f"{problem}lora_model_dir: {config.base_model}")


def begin(config: Any) -> Run:
    """Set up processes, run.log, seeds and signals; fetch base_model, read its architecture and tokenizer."""
    output_dir, directory = Path(config.output_dir), Path(config.config_directory)
    world = dist.init(config)
    start_log(output_dir, world.main)
    dist.seed_everything(config.seed, world.rank)
    interrupt = dist.Interrupt()
    checkpoint = dist.main_first(
        lambda: resolve_checkpoint(config.base_model, config.base_model_revision, directory), world
    )
    refuse_adapter_as_base(config, checkpoint)
    if world.main:
        check_wandb(config)
    arch = read_architecture(checkpoint, config.ignore_config_fields)
    adopt_adapter(config, arch, checkpoint, directory)
    if any((place / expanded(config.base_model)).is_dir() for place in (directory, Path())):
        config.base_model = str(checkpoint.resolve())  # files that name it are read from other folders
    if getattr(config, "tokenizer_vocab_size", None) is None:
        tokenizer = load_tokenizer(checkpoint, config, directory)
    else:
        cache = Path(config.dataset_prepared_path or output_dir / "prepared")
        tokenizer = dist.main_first(lambda: trained_tokenizer(config, directory, cache), world)
    date = dist.from_main(lambda: _beginning(config), world)
    if config.health and config.adapter and not config.lora_model_dir and world.main:
        # The adapter trains the rows of tokens that the config adds, and no other row.
        others = {*tokenizer.added.values()} - {*tokenizer.new_ids}
        tokenizer.untrained_ids = untrained_rows(checkpoint, others)
    tokenizer.pin_date(date)
    return Run(config, world, interrupt, checkpoint, arch, tokenizer, date=date.isoformat())


def _beginning(config: Any) -> datetime:
    """When the run began: now, or what the checkpoint says that it resumes from."""
    try:
        return datetime.fromisoformat(peek(config)["date"])
    except (KeyError, TypeError, ValueError):  # no checkpoint, or one of an earlier version
        return datetime.now()


# Options that may differ between a run and the checkpoint that it resumes from. Everything else changes the
# function, the data or the objective: resumed with another value it would silently be a different run.
MAY_CHANGE = frozenset({
    # The rate, the optimiser's own constants, and the length
    "learning_rate", "lr_scheduler", "min_lr_ratio", "wsd_decay_ratio", "warmup_steps", "warmup_ratio",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "num_epochs", "max_steps",
    # Logging, health, evaluation
    "logging_steps", "wandb_project", "wandb_entity", "wandb_name", "wandb_run_id", "profiler_steps",
    "report", "health", "health_rules", "on_unhealthy", "on_nonfinite", "max_skipped_steps", "detect_anomaly",
    "log_completions", "kl_steps", "eval_steps", "evals_per_epoch", "eval_answers", "eval_max_new_tokens",
    "eval_num_generations", "eval_temperature", "eval_greedy", "eval_success_reward", "test_datasets",
    # Saving
    "output_dir", "save_steps", "saves_per_epoch", "save_total_limit", "save_async", "resume",
    "resume_with_new_data", "merge_adapter",
    # Machines and speed: the same numbers, or the same to rounding
    "micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "fsdp_reshard_after_forward", "fsdp_cpu_offload", "hsdp_shard_size",
    "deterministic", "gpu_timeout_minutes", "bf16", "share_prompts", "samples_a_pass", "rollout_batch_size",
    "offload_feature_network", "reward_timeout", "streaming_partial_batch", "async_prefetch", "max_staleness",
    "vllm_mode", "vllm_server_base_url", "vllm_model_name", "vllm_sync_interval", "vllm_sync_method",
    "vllm_sync_directory", "vllm_sync_address", "vllm_dtype", "vllm_timeout", "vllm_probe_tolerance",
    "vllm_allow_missing_servers", "vllm_python", "vllm_max_model_len", "vllm_gpu_memory_utilization",
    "vllm_tensor_parallel_size",
    # Places: what they hold is compared instead (weights, tokenizer, rows)
    "base_model", "base_model_revision", "ignore_config_fields", "lora_model_dir", "chat_template",
    "special_tokens", "tokens", "datasets", "dataset_prepared_path", "config_directory", "replay_path",
    "on_bad_row",
})


def identity_of(run: Run, **more: Any) -> dict[str, Any]:
    """What a run and the checkpoint that it resumes from must share: option → value, and hashes of what the
    options name. `more` is what the recipe adds, under names that the user reads."""
    config, tokenizer = run.config, run.tokenizer
    options = {key: value for key, value in asdict(config).items() if key not in MAY_CHANGE}
    named: dict[str, Any] = {
        "config.json of base_model": run.arch.arithmetic(),
        "tokenizer": (tokenizer.core.to_str(), tokenizer.special),
        "chat template": (tokenizer.template, sorted(tokenizer.templates.items())),
    }
    if not getattr(config, "random_init", False):
        weights = dist.from_main(lambda: weights_fingerprint(run.checkpoint), run.world)
        named["weights of base_model"] = weights
    hashes = {name: sha256(repr(value).encode()).hexdigest()[:16] for name, value in named.items()}
    return {**options, **hashes, **more}


def plan(run: Run, total_steps: int, steps_per_epoch: int, **identity: Any) -> None:
    """Set the length of the run and find the checkpoint that it resumes from, if there is one. `identity` is
    what must be the same there beside the options, under names that the user reads."""
    config = run.config
    run.total_steps = total_steps
    dist.check_schedule(config, total_steps)
    settle_intervals(config, total_steps, steps_per_epoch)
    identity = json.loads(json.dumps(identity_of(run, **identity), default=str))  # as a checkpoint has it
    run.checkpointer = Checkpointer(run.output_dir / "checkpoints", run.world, config)
    run.resume_from, saved = run.checkpointer.to_resume(identity)
    if run.resume_from is None and dist.from_main((run.output_dir / "final").exists, run.world):
        problem = "holds a finished run (final/) and no checkpoint to continue from; choose another"
        raise ConfigError("output_dir", config.output_dir, problem)
    run.step = saved.get("step", 0)
    options = json.loads(json.dumps(asdict(config), default=str))
    before = saved.get("options", options)
    both = sorted(before.keys() & options.keys())
    run.changed = {key: (before[key], options[key]) for key in both if before[key] != options[key]}
    run.state = {"num_tokens": 0, "eval_before": None, **saved}
    run.state |= {"identity": identity, "options": options, "date": run.date}


def build(run: Run, rows: int | None = None) -> tuple[Transformer, list[torch.optim.Optimizer]]:
    """Build the model to train, with `rows` vocabulary rows (unset: the checkpoint's, or the tokenizer's if
    it has more), and its optimisers."""
    config, tokenizer = run.config, run.tokenizer
    rows = rows or max(run.arch.vocab_size, tokenizer.vocab_size)
    without_row = range(run.arch.vocab_size, tokenizer.vocab_size)  # tokens without weights in the checkpoint
    if without_row and not getattr(config, "random_init", False):
        count = len(without_row)
        log.info("%d tokens have no row in the checkpoint's embedding: they start as its mean row", count)
    run.arch = resized(run.arch, rows, config.pad_vocab_to_multiple_of)
    model = building.build_model(
        run.arch, run.checkpoint, config, run.world, getattr(config, "random_init", False),
        new_tokens=sorted({*tokenizer.new_ids, *without_row}),
    )
    return model, dist.make_optimizers(model, config)


def warn_beyond_positions(run: Run, longest: int, option: str) -> None:
    """Log a warning where the `longest` sequence, in tokens, has more positions than the model was made for;
    `option` bounds it."""
    limit = run.arch.raw.get("max_position_embeddings")
    if limit and longest > limit:
        log.warning(
            "the longest sequence has %d tokens, the model was made for %d (max_position_embeddings): it has "
            "never seen positions beyond; lower %s, or take a model for longer texts", longest, limit, option,
        )


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
        run.measured |= run.checkpointer.load(run.resume_from, model, optimizers, run.config.seed, moving)
        changes = [f"{key} {shown(old)} → {shown(new)}" for key, (old, new) in run.changed.items()]
        if changes:
            log.info("options that differ from the checkpoint's: %s", ", ".join(changes))
        if run.step >= run.total_steps:
            log.warning(
                "nothing is trained: the run in %s has done all of its %d steps; raise max_steps or "
                "num_epochs, or choose another output_dir", run.output_dir, run.step,
            )
    log.debug("ready after %.1f s", run.seconds())
    run.logger = MetricLogger(
        run.config, run.output_dir, main=run.world.main, first_step=run.step, total_steps=run.total_steps
    )
    if not run.step or any(name.endswith("not_restored") for name in run.measured):
        run.logger.begin(run.measured, new=not run.step)


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
        except Exception:  # an error in the report must not fail a completed run
            log.warning("no report could be written; the traceback is in run.log")
            log.debug("%s", traceback.format_exc())


def save_model(run: Run, model: Transformer) -> Path:
    """Write output_dir/final, once the last checkpoint is complete."""
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
    """Run a recipe from its command line, described by the first paragraph of its docstring."""
    description = " ".join((doc or "").split("\n\n")[0].split())
    start(main, lambda: parse_config(config_class, sys.argv[1:], description=description))


# ------------------------------------------------------------------------------------------------------------
# How a run ends after an error
# ------------------------------------------------------------------------------------------------------------

# Known errors of torch, NCCL, CUDA, the hub and the system: (pattern, cause, remedy). This is the reference
# page's table of errors without the rows that cannot occur in this code (docs/health.md says why).
ERRORS: tuple[tuple[str, str, str], ...] = (
    (r"timed? ?out.*(recv|send|operation|waiting|collective)|Watchdog caught collective operation timeout",
     "a process waited longer than gpu_timeout_minutes for the others: one is stuck or took another branch",
     "look at that rank's machine, disk and server; raise gpu_timeout_minutes if it was only slow"),
    (r"Connection (closed|reset) by peer|Broken pipe|Connection refused.*TCPStore|Socket closed",
     "another process of this run is gone: killed (exit code −9: out of host memory), or ended by an error",
     "look for the first error above or in dmesg; fewer or shorter rows (sequence_len) if memory ran out"),
    (r"NCCL.*(abort|error|unhandled)|ncclUnhandled|ncclSystem|ncclRemote|communicator was aborted",
     "the link between GPUs failed, or another process ended first",
     "set NCCL_DEBUG=INFO and look for the first rank that reports; check NCCL_SOCKET_IFNAME and /dev/shm"),
    (r"device-side assert|index out of (range|bounds)",
     "a token id or index is out of range",
     "run once on a CPU, or with CUDA_LAUNCH_BLOCKING=1: the row is named there; was it made with another "
     "tokenizer?"),
    (r"CheckpointError|number of tensors saved|different number of tensors",
     "activation checkpointing recomputed tensors that differ from the saved ones",
     "gradient_checkpointing_kwargs: {use_reentrant: true}"),
    (r"returned nan values in its",
     "detect_anomaly found the operation whose gradient is NaN; it is named in the traceback in run.log",
     "detect_anomaly: false lets the forensics name module and rows; then lower learning_rate"),
    (r"CAS service|hf_xet|xet_get",
     "the hub's XET storage could not be reached", "export HF_HUB_DISABLE_XET=1 and try again"),
    (r"No space left on device|Disk quota exceeded",
     "the disk is full; the newest whole checkpoint is untouched",
     "free space, or lower save_total_limit; the same command continues from there"),
    (r"Read-only file system|Permission denied",
     "a place of the run cannot be written", "choose another output_dir or dataset_prepared_path"),
    (r"triton.*(compil|out of resource|PTX)|out of resource: shared memory",
     "a Triton kernel could not be built for this GPU",
     "after editing a kernel clear its cache: rm -rf ~/.triton/cache"),
    (r"CUDA driver version is insufficient|no kernel image is available",
     "torch was built for another driver or GPU", "install the torch that pyproject.toml pins"),
    (r"Too many open files", "the process's limit of open files is reached", "ulimit -n 65536"),
)


def explain_error(error: BaseException) -> str | None:
    """Cause and remedy, in one line, of an error of a library or the system; None if it is not known."""
    text = f"{type(error).__name__}: {error}"
    for pattern, cause, remedy in ERRORS:
        if re.search(pattern, text, re.IGNORECASE | re.DOTALL):
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            return f"{cause} ({first[:160]}); {remedy}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the host ran out of memory (torch's CPU allocator raises a plain RuntimeError)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def start(main: Callable[[Any], None], parse: Callable[[], Any]) -> None:
    """Run a recipe. User errors and errors with a known cause end in one line and exit code 2, with the
    traceback in run.log; of several ranks, the first to fail prints the line."""
    config = None
    make_printable()
    try:
        config = parse()
        main(config)
    except KeyboardInterrupt:
        print("stopped at once; a resumed run continues from the newest checkpoint", file=sys.stderr)
        os._exit(130)
    except Exception as error:
        log.debug("%s", traceback.format_exc())
        if is_out_of_memory(error):
            message = memory.what_to_change(error, config)
        else:
            message = str(error) if isinstance(error, BallastError) else explain_error(error)
        if message is None and isinstance(error, OSError) and isinstance(error.filename, str | os.PathLike):
            where = os.fspath(error.filename)
            message = f"{where}: {error.strerror}; make room there, or choose another place"
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
    mark = Path(tempfile.gettempdir()) / f"ballast-error-{run_id}"
    with suppress(OSError):
        if mark.stat().st_mtime < STARTED - 60:  # of an earlier run with the same numbers, as in a container
            mark.unlink()
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        pass
    return True
