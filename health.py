"""What a run tells about itself: one tidy line a step, metrics.jsonl, TensorBoard, wandb, run.log, and clear
endings."""

import collections
import csv
import difflib
import fnmatch
import importlib
import itertools
import json
import logging
import math
import os
import re
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
import yaml
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import dist
from config import BallastError, ConfigError, UnknownOption, parse_config, read_yaml_file, resolve_checkpoint

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
    """Judge every step by the rules of health.py, and say when one is broken or well again."""
    health_rules: dict = field(default_factory=dict)
    """Other ranges, by rule: {entropy_collapse: off, grad_norm_high: {high: 20, window: 10}}. Of a rule low,
    high, window (steps in a row), after (steps before it may speak) and severity can be set."""
    on_unhealthy: str | dict[str, str] = "warn"
    """When a rule is broken: warn, stop, or checkpoint_and_stop; or by severity: {critical: stop}."""


def check_log_options(options: Any) -> None:
    rules_of(asdict(options))
    by_severity = options.on_unhealthy
    if isinstance(by_severity, str):
        by_severity = {"warning": by_severity, "critical": by_severity}
    for severity, action in by_severity.items():
        if severity not in ("warning", "critical") or action not in ("warn", "stop", "checkpoint_and_stop"):
            raise ConfigError(
                "on_unhealthy", options.on_unhealthy,
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
# page's table of errors, without the rows that cannot occur in this code: docs/stability.md says why.
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
                logger.close()  # its report shows the incident
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


# ------------------------------------------------------------------------------------------------------------
# Rules: what is unhealthy, why, and what to do (the reference page's tables, and what they leave out)
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One way to be ill. `low`, `high`, `window`, `after` and `severity` can be set under `health_rules`."""

    name: str
    metrics: tuple[str, ...]  # the first that a run has is read; a * stands for any name
    check: str  # one of CHECKS
    says: str  # what it means, in the verdict
    cause: str
    # (option, advice, from and to which value the advice says nothing new): the verdict adds the value of now
    fixes: tuple[tuple[str, str] | tuple[str, str, tuple[float, float]], ...]
    low: float | None = None
    high: float | None = None
    plus: str | None = None  # an option whose value is added to `high`
    window: int = 1  # observations: steps of a live run, lines of a finished one
    after: int = 0  # observations before it may speak
    severity: Literal["warning", "critical"] = "warning"
    guard: str | None = None  # one of GUARDS: does the rule apply to this config?


RULES: tuple[Rule, ...] = (
    # Supervised fine-tuning ("Key Metrics for SFT", "SFT Stability")
    Rule(
        "loss_stuck", ("train/loss",), "unmoved", "the loss has not moved since the first steps",
        "the learning rate is too low, or the labels mask what should be learnt",
        (("learning_rate", "try 2 to 5 times as much (full fine-tuning 1e-5 to 5e-5, LoRA 1e-4 to 3e-4)"),
         ("weight_decay", "above 0.1 it can suppress LoRA", (0, 0.1)),
         ("datasets", "see the mask: python data.py inspect")),
        high=0.97, window=50, after=60,
    ),
    Rule(
        "loss_plateau", ("train/loss",), "flat", "the loss has stopped falling, well above 0.5 to 2.0",
        "too low a learning rate, a warmup too short for it, or data without signal",
        (("learning_rate", "try 2 to 5 times as much"), ("warmup_ratio", "try 0.05 to 0.1", (0.05, 1)),
         ("datasets", "see the mask: python data.py inspect")),
        low=2.0, high=0.99, window=100, after=150,
    ),
    Rule(
        "loss_spike", ("train/loss",), "spike", "the loss jumped",
        "a malformed or very long row, or a learning rate that is too high",
        (("sample_packing", "set it to false for a while and see which batches do it", (0, 0)),
         ("learning_rate", "divide it by 2 to 5, or warm up longer"),
         ("bf16", "try false to see if precision is it", (0, 0))),
        low=2.0, high=8.0, window=30, after=20,
    ),
    Rule(
        "loss_diverging", ("train/loss", "loss/ce"), "above_best", "the loss climbs and stays up",
        "the learning rate is too high for this batch size or warmup",
        (("learning_rate", "divide it by 2 to 5"), ("warmup_ratio", "try 0.05 to 0.1", (0.05, 1)),
         ("max_grad_norm", "1.0 clips what a bad batch can do", (1e-9, 1.0))),
        low=0.5, high=1.5, window=10, after=10, severity="critical",
    ),
    Rule(
        "overfitting", ("eval/loss",), "rising", "held-out loss rises while training goes on",
        "the model learns the training rows by heart",
        (("num_epochs", "fewer, or set max_steps"), ("weight_decay", "try 0.01 to 0.1", (0.01, math.inf)),
         ("lora_r", "8 to 32"), ("lora_dropout", "try 0.05", (0.05, 1)),
         ("val_set_size", "0.05 gives a steadier figure")),
        high=0.03, window=2, after=3,
    ),
    Rule(
        "grad_norm_high", ("train/grad_norm",), "outside", "gradients are large",
        "too high a learning rate, noisy or malformed batches",
        (("max_grad_norm", "1.0 clips them", (1e-9, 1.0)), ("learning_rate", "divide it by 2 to 5"),
         ("gradient_accumulation_steps", "more smooth a noisy batch")),
        high=10.0, window=5, after=10,
    ),
    Rule(
        "grad_norm_exploding", ("train/grad_norm",), "outside", "the gradient explodes",
        "the step before it was too long, or one batch is broken",
        (("learning_rate", "divide it by 2 to 5"), ("max_grad_norm", "1.0 clips it", (1e-9, 1.0)),
         ("warmup_ratio", "try 0.05 to 0.1", (0.05, 1))),
        high=100.0, window=1, after=5, severity="critical",
    ),
    Rule(
        "grad_norm_vanishing", ("train/grad_norm",), "outside", "gradients are close to nothing",
        "hardly any token is trained, or the loss is already zero",
        (("datasets", "see the mask: python data.py inspect"),
        ("num_epochs", "the rows may be known by heart")),
        low=1e-4, window=20, after=10,
    ),
    Rule(
        "learning_rate_off_schedule", ("schedule/ratio",), "outside",
        "the learning rate is not the schedule's",
        "something else than the schedule sets it: an edited loop, a second scheduler, a wrong resume",
        (("lr_scheduler", "let dist.learning_rate alone set it"),),
        low=0.999, high=1.001, window=2, severity="critical",
    ),
    Rule(
        "loss_mis_scaled", ("train/loss_consistency",), "outside",
        "what is differentiated is not the mean over the step's tokens that is reported",
        "micro-batches are averaged each for itself, or divided by the wrong count (an edited loop)",
        (("gradient_accumulation_steps", "divide each micro-batch's sum by the tokens of the whole step"),),
        low=0.999, high=1.001, window=3, severity="critical",
    ),
    Rule(
        "few_trained_tokens", ("trained_token_share",), "outside", "hardly any token is trained",
        "prompts are much longer than answers, or the mask is wrong",
        (("datasets", "see the mask: python data.py inspect"),), low=0.01, window=5,
    ),
    Rule(
        "trained_on_prompts", ("trained_token_share",), "outside",
        "every token is trained, though the rows have prompts",
        "the loss is on the questions too", (("train_on_inputs", "set it to false", (0, 0)),),
        high=0.999, window=5, guard="has_prompts",
    ),
    # Reinforcement learning ("Key Metrics for RL", "RL/GRPO Stability")
    Rule(
        "reward_stuck_at_zero", ("rewards/*/mean", "reward"), "stays_at", "no completion has earned anything",
        "the reward function is broken, misses a column, or the task is too hard for this model",
        (("reward_funcs", "try it alone: python grpo.py test-rewards"),
         ("datasets", "has every row the column that it reads, e.g. answer?"),
         ("log_completions", "true shows what the model writes", (1, 1)),
         ("max_completion_length", "too short an answer earns nothing")),
        low=0.0, window=20, after=20,
    ),
    Rule(
        "no_signal", ("reward_std",), "stays_at",
        "all completions earn the same: there is nothing to learn from",
        "a constant reward, or a task that is always or never solved",
        (("reward_funcs", "try it alone: python grpo.py test-rewards"),
        ("temperature", "0.8 to 1.0 explores more", (0.8, math.inf)),
         ("num_generations", "16 and more find differences", (16, math.inf))),
        low=0.0, window=10, after=5,
    ),
    Rule(
        "all_groups_flat", ("frac_reward_zero_std",), "outside",
        "in every group all completions earn the same",
        "a reward that does not tell completions apart, or a policy that has collapsed",
        (("reward_funcs", "try it alone: python grpo.py test-rewards"),
        ("temperature", "0.8 to 1.0 explores more", (0.8, math.inf)),
         ("num_generations", "16 and more find differences", (16, math.inf))),
        high=0.9999, window=10, after=3, severity="critical",
    ),
    Rule(
        "flat_groups", ("frac_reward_zero_std",), "outside", "in most groups all completions earn the same",
        "the task is too easy or too hard for most prompts: their advantages are 0 and they are skipped",
        (("num_generations", "16 and more find differences", (16, math.inf)),
        ("temperature", "0.8 to 1.0 explores more", (0.8, math.inf)),
         ("datasets", "leave out what is always or never solved")),
        high=0.8, window=20, after=5,
    ),
    Rule(
        "entropy_collapse", ("entropy",), "outside", "completions are becoming identical",
        "the policy has put all its probability on one answer: no group disagrees any more",
        (("temperature", "try 0.8 to 1.0", (0.8, math.inf)), ("learning_rate", "halve it"),
        ("beta", "0.01 to 0.1 holds it to its start", (0.01, math.inf)),
         ("num_generations", "16 and more", (16, math.inf))),
        low=0.01, window=10, severity="critical",
    ),
    Rule(
        "entropy_high", ("entropy",), "outside", "the policy does not converge",
        "too high a temperature or learning rate, or a base model that does not know the task",
        (("temperature", "lower it"), ("learning_rate", "halve it")), high=1.0, window=20, after=20,
    ),
    Rule(
        "kl_high", ("kl",), "outside", "the policy has gone far from where it began",
        "too many or too long steps away from the reference",
        (("beta", "raise it"), ("learning_rate", "halve it"),
        ("num_iterations", "fewer passes over a batch", (0, 1))),
        high=2.0, window=3, severity="critical",
    ),
    Rule(
        "kl_drifting", ("kl",), "outside", "the policy drifts away from where it began",
        "long training without a hold, or a learning rate on the high side",
        (("beta", "raise it"), ("learning_rate", "halve it")), high=0.5, window=10,
    ),
    Rule(
        "sampler_mismatch", ("sampling/sampling_logp_difference/mean",), "outside",
        "the sampler's log-probs are not the trainer's",
        "stale or wrong weights on the server, another temperature there, or a precision that differs",
        (("vllm_sync_interval", "lower it: sync more often", (0, 1)),
        ("vllm_dtype", "the same as the trainer's"),
         ("temperature", "one for sampler and trainer")),
        high=0.1, window=5,
    ),
    Rule(
        "off_policy", ("sampling/sampling_logp_difference/mean",), "outside",
        "the sampler's weights are far from the trainer's",
        "the server has not had the weights for many updates, or has other ones",
        (("vllm_sync_interval", "lower it: sync more often", (0, 1)),
         ("off_policy_mask_threshold", "0.5 leaves stale samples out", (1e-9, 0.5)),
         ("importance_sampling_level", "token corrects finer than sequence")),
        high=1.0, window=2, severity="critical",
    ),
    Rule(  # The page's table says to raise vllm_sync_interval here, its text to lower it: lower is right.
        "ratio_vanishing", ("sampling/importance_sampling_ratio/min",), "outside",
        "the data are stale: some samples are all but impossible under the policy of now",
        "the policy has moved away from the weights that sampled",
        (("vllm_sync_interval", "lower it: sync more often", (0, 1)),
         ("off_policy_mask_threshold", "0.5 leaves stale samples out", (1e-9, 0.5)),
         ("importance_sampling_level", "token corrects finer than sequence"),
         ("async_prefetch", "costs one update", (0, 0))),
        low=0.1, window=5,
    ),
    Rule(
        "clipping", ("clip_ratio/region_mean",), "outside", "the ratio is clipped on most tokens",
        "the policy moves further in one batch than epsilon allows",
        (("learning_rate", "halve it"), ("num_iterations", "fewer passes over a batch", (0, 1)),
         ("epsilon", "wider clips less")),
        high=0.3, window=5,
    ),
    Rule(
        "length_creep", ("completions/mean_length",), "creep", "completions grow and grow",
        "the reward pays for length: reward hacking",
        (("reward_funcs", "see log_completions: what do the long ones earn? add or weigh `length`"),
         ("loss_type", "dr_grpo or dapo do not divide by a completion's own length"),
         ("mask_truncated_completions", "true keeps cut ones from teaching", (1, 1))),
        high=1.5, window=40, after=40,
    ),
    Rule(
        "completions_clipped", ("completions/clipped_ratio",), "outside",
        "many completions hit the length limit",
        "the limit is too short, or the model does not end its answers",
        (("max_completion_length", "raise it"),
        ("mask_truncated_completions", "true keeps cut ones from teaching", (1, 1)),
         ("chat_template", "does the model know the token that ends a turn?")),
        high=0.8, window=5,
    ),
    Rule(
        "stale_weights", ("weight_version_lag",), "outside", "samples come from old weights",
        "the sync is late: an engine that is lost or an interval that is long",
        (("vllm_sync_interval", "lower it: sync more often", (0, 1)),
        ("async_prefetch", "costs one update", (0, 0))),
        high=1.0, plus="vllm_sync_interval", window=2,
    ),
    Rule(
        "policy_gradient_large", ("grad_norm",), "outside", "gradients of the policy are large",
        "too high a learning rate, or advantages of a few odd completions",
        (("max_grad_norm", "1.0 clips them", (1e-9, 1.0)), ("learning_rate", "halve it"),
         ("gradient_accumulation_steps", "more smooth a noisy batch")),
        high=10.0, window=5, after=5, severity="critical",
    ),
    Rule(
        "no_gradient", ("grad_norm",), "stays_at", "no gradient reaches the weights",
        "every group is flat, or nothing is trained",
        (("reward_funcs", "try it alone: python grpo.py test-rewards"),
        ("num_generations", "16 and more", (16, math.inf))),
        low=0.0, window=10,
    ),
    Rule(
        "reward_collapse", ("reward",), "below_best", "the reward has fallen far from its best",
        "the policy has been broken by its own updates",
        (("learning_rate", "halve it"), ("beta", "0.01 to 0.1 holds it to its start", (0.01, math.inf)),
        ("max_grad_norm", "1.0", (1e-9, 1.0))),
        low=0.5, window=10, after=20, severity="critical",
    ),
    Rule(
        "step_skipped", ("skipped_steps",), "outside", "steps were left out: they were not finite",
        "see the incidents in output_dir/incidents", (("on_nonfinite", ""), ("learning_rate", "halve it")),
        high=0.0,
    ),
    Rule(
        "nonfinite_activations", ("nonfinite_hidden_states",), "outside",
        "hidden states that are not finite were replaced",
        "an overflow in the forward pass; see run.log for the module and the rows",
        (("bf16", "try false to see if precision is it", (0, 0)), ("fp8", "try false", (0, 0)),
        ("learning_rate", "halve it")),
        high=0.0, severity="critical",
    ),
    # Energy-based fine-tuning (the page's EBFT note; ranges are of the cosine before doubling, raw features)
    Rule(
        "alignment_low", ("ebft/alignment_cosine",), "outside",
        "samples have little to do with the true completions",
        "the policy is far from the data, or the features do not tell them",
        (("temperature", "lower it"), ("feature_layers", "deeper layers see more of the meaning"),
         ("ce_coef", "0.03 to 0.1 helps at the start", (0.03, math.inf))),
        low=0.3, window=20, after=20,
    ),
    Rule(
        "alignment_falling", ("ebft/alignment_cosine",), "below_best",
        "samples move away from the true completions",
        "the diversity term or the learning rate drives them off",
        (("diversity_coef", "lower it"), ("learning_rate", "halve it"),
        ("ce_coef", "0.03 to 0.1 holds the language", (0.03, math.inf))),
        low=0.95, window=10, after=20, severity="critical",
    ),
    Rule(  # Of whitened features that are independent it is 0 by construction: read entropy there.
        "samples_alike", ("ebft/diversity",), "outside",
        "the samples of a prompt are all alike: mode collapse",
        "alignment outweighs the penalty on likeness, or the temperature leaves no choice",
        (("temperature", "try 0.8 to 1.0", (0.8, math.inf)), ("diversity_coef", "raise it"),
        ("learning_rate", "halve it")),
        high=1.0, window=10, after=5, guard="raw_features",
    ),
    Rule(
        "samples_identical", ("ebft/pairwise_cosine",), "outside",
        "the samples of a prompt are the same: mode collapse",
        "alignment outweighs the penalty on likeness, or the temperature leaves no choice",
        (("temperature", "try 0.8 to 1.0", (0.8, math.inf)), ("diversity_coef", "raise it"),
         ("learning_rate", "halve it")),
        high=0.9999, window=5, after=3, severity="critical",
    ),
    Rule(
        "feature_distance_high", ("ebft/cfm_unwhitened",), "outside",
        "the features' distance is beyond all range",
        "features that are not normalised, or another network than the starting one", (("embed_method", ""),),
        high=10.0, window=3, severity="critical",
    ),
    Rule(
        "feature_distance_rising", ("ebft/cfm_unwhitened",), "above_best",
        "the features move away from the truth's",
        "the learning rate is too high, or the diversity term drives the samples off",
        (("learning_rate", "halve it"), ("diversity_coef", "lower it"),
        ("ce_coef", "0.03 to 0.1 holds the language", (0.03, math.inf))),
        low=0.02, high=3.0, window=10, after=20, severity="critical",
    ),
    Rule(
        "diversity_drowns_alignment", ("ebft/reward",), "outside",
        "the penalty on likeness outweighs the agreement",
        "the samples are rewarded for being different, not for being right",
        (("diversity_coef", "lower it"), ("use_whitening", "true counts what tells samples apart", (1, 1))),
        low=0.0, window=10, after=5,
    ),
    Rule(
        "whitening_failed", ("ebft/whitening_fallbacks",), "outside", "features could not be whitened",
        "features that are not finite", (("bf16", "try false", (0, 0)), ("learning_rate", "halve it")),
        high=0.0,
    ),
    # The system
    Rule(
        "memory_creep", ("memory/max_alloc",), "creep", "memory grows from step to step",
        "something keeps tensors of past steps alive, or rows grow longer",
        (("sequence_len", "bounds the longest row"), ("profiler_steps", "writes a memory snapshot on CUDA")),
        high=1.2, window=60, after=60,
    ),
    Rule(
        "step_time_jump", ("step_time",), "jump", "steps take much longer than before",
        "another program on this machine, a throttled GPU, a slow rank or server, or longer rows",
        (("profiler_steps", "shows where the time goes"),), high=3.0, window=5, after=30,
    ),
    Rule(
        "data_starvation", ("step_time/data_share",), "outside", "steps wait for data",
        "rows are made slower than the model trains on them",
        (("dataset_prepared_path", "prepare rows once, on a fast disk"),), high=0.5, window=10, after=5,
    ),
    Rule(  # Each value is ten steps apart (dist.race).
        "slow_rank", ("ranks/slowness",), "outside", "one rank's device is slower than the others'",
        "every step waits for it (ranks/slowest in the metrics is its number): a hot or throttled GPU, "
        "another process on it, or a weaker machine",
        (("gpu_timeout_minutes", "leave that machine out; so long the others wait for one that stands"),),
        high=1.5, window=3,
    ),
)  # fmt: skip

PROMPTED = {"chat", "instruct", "prompt_completion"}


def _types(config: dict) -> set[str]:
    return {str(spec.get("type")) for spec in config.get("datasets") or []}


GUARDS: dict[str, Callable[[dict], Any]] = {
    "has_prompts": lambda config: _types(config) & PROMPTED and _types(config) <= PROMPTED | {"text"},
    "raw_features": lambda config: (
        config.get("whitening", "none") == "none" and not config.get("use_whitening")
    ),
}

ALIASES = {  # what other trainers call the same
    "loss": "train/loss", "eval_loss": "eval/loss", "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
}  # fmt: skip


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _check_outside(rule: Rule, seen: "Series") -> str | None:
    last = seen.last(rule.window)
    if len(last) < rule.window:
        return None
    steps = "" if rule.window == 1 else f" for {rule.window} steps"
    if rule.low is not None and all(x < rule.low for x in last):
        return f"{_figure(last[-1])}{steps}, below {rule.low:g}"
    if rule.high is not None and all(x > rule.high for x in last):
        return f"{_figure(last[-1])}{steps}, above {rule.high:g}"
    return None


def _check_stays_at(rule: Rule, seen: "Series") -> str | None:
    last = seen.last(rule.window)
    if len(last) == rule.window and all(abs(x - (rule.low or 0.0)) < 1e-9 for x in last):
        return f"{_figure(last[-1])} for {rule.window} steps"
    return None


def _check_unmoved(rule: Rule, seen: "Series") -> str | None:
    now, then = median(seen.last(10)), median(seen.first)
    if seen.count >= rule.window and now > (rule.high or 1.0) * then:
        return f"{_figure(now)} after {seen.count} steps, {_figure(then)} at the start"
    return None


def _check_flat(rule: Rule, seen: "Series") -> str | None:
    last = seen.last(rule.window)
    half = len(last) // 2
    if len(last) < rule.window or seen.progress > 0.6:  # late in a run a schedule ends in a plateau
        return None
    before, now = median(last[:half]), median(last[half:])
    if now > (rule.high or 1.0) * before and now > (rule.low or 0.0):
        return f"{_figure(now)}, {_figure(before)} {half} steps ago"
    return None


def _check_spike(rule: Rule, seen: "Series") -> str | None:
    """The robust z-score of the last value: its distance from the median in units of the median deviation."""
    *before, now = seen.last(rule.window + 1)
    if len(before) < 10:
        return None
    middle = median(before)
    deviation = 1.4826 * median([abs(x - middle) for x in before]) + 0.01 * abs(middle) + 1e-12
    if (now - middle) / deviation > (rule.high or 0.0) and now > (rule.low or 0.0) * middle:
        return f"{_figure(now)} after a median of {_figure(middle)} ({now / middle:.1f} times as much)"
    return None


def _check_above_best(rule: Rule, seen: "Series") -> str | None:
    """Medians of a window against the lowest such median so far; differences below `low` are noise."""
    best, now = min(seen.lowest, seen.first[0]), median(seen.last(rule.window))
    if seen.count >= rule.window and now > (rule.high or 1.0) * best and now - best > (rule.low or 0.0):
        return f"{_figure(now)}, it was {_figure(best)}"
    return None


def _check_below_best(rule: Rule, seen: "Series") -> str | None:
    best, now = seen.highest, median(seen.last(rule.window))
    if seen.count >= rule.window and best > 0 and now < (rule.low or 0.0) * best:
        return f"{_figure(now)}, it was {_figure(best)}"
    return None


def _check_rising(rule: Rule, seen: "Series") -> str | None:
    last, best = seen.last(rule.window), seen.least
    if len(last) == rule.window and all(x > (1 + (rule.high or 0.0)) * best for x in last):
        return f"{_figure(last[-1])}, it was {_figure(best)}"
    return None


def _check_creep(rule: Rule, seen: "Series") -> str | None:
    """Four quarters of the window, each above the one before, and the whole by `high`."""
    last = seen.last(rule.window)
    if len(last) < rule.window:
        return None
    size = len(last) // 4
    quarters = [median(last[k * size : (k + 1) * size]) for k in range(4)]
    rising = all(b > 1.01 * a for a, b in itertools.pairwise(quarters))
    if rising and quarters[-1] > (rule.high or 1.0) * quarters[0]:
        return f"{_figure(quarters[0])} → {_figure(quarters[-1])} in {rule.window} steps, without a pause"
    return None


def _check_jump(rule: Rule, seen: "Series") -> str | None:
    last = seen.last(rule.window + 30)
    before, now = last[: -rule.window], last[-rule.window :]
    if len(before) >= 10 and min(now) > (rule.high or 1.0) * median(before):
        return f"{_figure(median(now))} for {rule.window} steps, before {_figure(median(before))}"
    return None


CHECKS: dict[str, Callable[[Rule, "Series"], str | None]] = {
    "outside": _check_outside, "stays_at": _check_stays_at, "unmoved": _check_unmoved, "flat": _check_flat,
    "spike": _check_spike, "above_best": _check_above_best, "below_best": _check_below_best,
    "rising": _check_rising, "creep": _check_creep, "jump": _check_jump,
}  # fmt: skip


class Series:
    """One metric as the rules see it: its last values, its first, and its best."""

    def __init__(self) -> None:
        self.values: collections.deque[float] = collections.deque(maxlen=256)
        self.first: list[float] = []
        self.count = 0
        self.progress = 0.0  # of the run, 0 to 1
        self.least = math.inf
        self.lowest, self.highest = math.inf, -math.inf  # of medians of ten

    def add(self, value: float, progress: float) -> None:
        self.values.append(value)
        self.count, self.progress = self.count + 1, progress
        if len(self.first) < 10:
            self.first.append(value)
        self.least = min(self.least, value)
        if self.count >= 10:
            middle = median(self.last(10))
            self.lowest, self.highest = min(self.lowest, middle), max(self.highest, middle)

    def last(self, count: int) -> list[float]:
        start = max(0, len(self.values) - count)
        return list(itertools.islice(self.values, start, None))


@dataclass
class Verdict:
    """A rule's change of state."""

    rule: Rule
    step: int
    metric: str
    ill: bool
    found: str = ""  # the figures
    rows: str = ""  # of the batch that did it

    def line(self, config: dict) -> str:
        if not self.ill:
            return f"health: step {self.step}: {self.rule.name} is over: {self.metric} is back in its range"
        advice = "; ".join(
            f"{_with_value(option, config)}: {words}"
            for option, words, *void in self.rule.fixes
            if not _says_nothing_new(config.get(option), void)
        )
        where = f"{self.metric} {self.found}" + (f" (rows {self.rows})" if self.rows else "")
        return (
            f"health: step {self.step}: {self.rule.name}: {where}: {self.rule.says}. "
            f"Cause: {self.rule.cause}. {advice}"
        )


def _says_nothing_new(value: Any, void: list) -> bool:
    return bool(void) and isinstance(value, int | float) and void[0][0] <= value <= void[0][1]


def _with_value(option: str, config: dict) -> str:
    value = config.get(option)
    if option not in config or isinstance(value, list | dict):
        return option
    return f"{option} is {value:g}" if isinstance(value, float) else f"{option} is {value}"


def rules_of(config: dict, rules: Sequence[Rule] = RULES) -> list[Rule]:
    """The rules that apply to a config, with its own ranges. ConfigError for what is no rule or no range."""
    own = config.get("health_rules") or {}
    if not isinstance(own, dict):
        raise ConfigError("health_rules", own, "must be {rule: {high: …}} or {rule: off}")
    names = {rule.name for rule in rules}
    for name, change in own.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise ConfigError(
                "health_rules", name, f"is no rule{f'; did you mean {near[0]}?' if near else ''}"
            )
        known = ("low", "high", "window", "after", "severity")
        if change not in (False, "off") and not (isinstance(change, dict) and set(change) <= set(known)):
            raise ConfigError(
                f"health_rules.{name}", change, f"must be off, or set some of {', '.join(known)}"
            )
        if isinstance(change, dict):
            for key, value in change.items():
                right = value in ("warning", "critical") if key == "severity" else (
                    isinstance(value, int | float) and not isinstance(value, bool)
                    and (key in ("low", "high") or (isinstance(value, int) and value >= (key == "window")))
                )  # fmt: skip
                if not right:
                    raise ConfigError(f"health_rules.{name}.{key}", value, "is not a value that it can have")
    found = []
    for rule in rules:
        change = own.get(rule.name, {})
        if change in (False, "off") or (rule.guard and not GUARDS[rule.guard](config)):
            continue
        if rule.plus is not None and rule.high is not None:
            rule = replace(rule, high=rule.high + float(config.get(rule.plus) or 0.0))
        found.append(replace(rule, **change))
    return found


MEASURED = re.compile(r"time|second|memory|mfu|data_share|^ranks/")  # of a clock or of the process


class Doctor:
    """Watches the metrics of a run, step by step, and speaks when a rule's state changes."""

    def __init__(self, config: dict, total_steps: int = 0):
        self.config, self.total_steps = config, total_steps
        self.rules = rules_of(config)
        self.options: Any = SimpleNamespace(**config)
        self.series: dict[str, Series] = {}
        self.ill: dict[tuple[str, str], int] = {}  # (rule, metric) → observations since it was last seen ill
        self.ever: dict[str, Verdict] = {}  # the first verdict of every rule that has spoken
        self.readers: dict[str, list[Rule]] = {}  # metric → what reads it

    def observe(
        self, step: int, metrics: dict[str, float], rows: Callable[[], str] | None = None
    ) -> list[Verdict]:
        verdicts = []
        progress = step / self.total_steps if self.total_steps else 0.0
        rate = metrics.get("train/learning_rate", metrics.get("learning_rate"))
        if rate is not None and self.total_steps and "lr_scheduler" in self.config:
            expected = dist.learning_rate(step - 1, self.options, self.total_steps)
            metrics = {**metrics, "schedule/ratio": rate / expected if expected else 1.0 + rate}
        figures = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
        for name in figures:
            self.series.setdefault(name, Series())
        for name, value in figures.items():
            if name not in self.readers:
                self.readers[name] = [rule for rule in self.rules if self._reads(rule, name)]
            if not self.readers[name]:
                continue
            seen = self.series[name]
            seen.add(value, progress)
            for rule in self.readers[name]:
                found = CHECKS[rule.check](rule, seen) if seen.count > rule.after else None
                key = (rule.name, name)
                if found is not None and key not in self.ill:
                    named = rows() if rows is not None and rule.check == "spike" else ""
                    verdicts.append(Verdict(rule, step, name, True, found, named))
                    self.ever.setdefault(rule.name, verdicts[-1])
                if found is not None:
                    self.ill[key] = 0
                elif key in self.ill:
                    self.ill[key] += 1
                    if self.ill[key] >= max(3, rule.window):  # not back and forth at the edge of a range
                        del self.ill[key]
                        verdicts.append(Verdict(rule, step, name, False))
        # The gravest first, and among equals the order of the table.
        order = {rule.name: place for place, rule in enumerate(self.rules)}
        return sorted(verdicts, key=lambda v: (not v.ill, v.rule.severity != "critical", order[v.rule.name]))

    def recall(self, rows: Iterable[dict]) -> None:
        """What a run that goes on had logged before: windows, best values and what is ill are as they were,
        except of what belongs to the process (MEASURED)."""
        for row in rows:
            self.observe(row["step"], {k: v for k, v in row.items() if not MEASURED.search(k)})

    def _reads(self, rule: Rule, name: str) -> bool:
        """Whether a rule reads this metric: its first name that the run has."""
        for pattern in rule.metrics:
            if fnmatch.fnmatchcase(name, pattern):
                return True
            if any(fnmatch.fnmatchcase(other, pattern) for other in self.series if other != name):
                return False
        return False

    @property
    def status(self) -> str:
        names = list(dict.fromkeys(name for name, _ in self.ill))
        return "well" if not names else ", ".join(names)

    def metrics(self) -> dict[str, float]:
        """health/alarms, and health/<rule> = 1 for each that is ill."""
        names = {name for name, _ in self.ill}
        return {"health/alarms": float(len(names)), **{f"health/{name}": 1.0 for name in sorted(names)}}


class Unhealthy(BallastError):
    """A run that its own rules stopped (on_unhealthy)."""


# ------------------------------------------------------------------------------------------------------------
# Metrics as they are made
# ------------------------------------------------------------------------------------------------------------

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


ABANDON = 1e6  # in the sum over ranks that asks whether to stop: stop without a checkpoint


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
            kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= first_step]  # type: ignore[operator]
            checkpoint.write_atomically(metrics, "".join(line + "\n" for line in kept))
        self.file = metrics.open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(
            str(output_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None
        )
        values = {k: v for k, v in asdict(config).items() if k != "config_directory"}
        checkpoint.write_atomically(
            output_dir / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
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
        if config.health:
            self.doctor = Doctor(values, total_steps)
            self.doctor.recall(map(json.loads, kept))
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

    def stop_if_asked(self, asked: float, step: int, world: dist.World) -> None:
        """`asked` is summed over ranks. Raises Unhealthy where the rules say to stop at once."""
        if asked >= ABANDON:
            why = dist.from_main(lambda: self.why, world)
            raise Unhealthy(f"step {step}: stopped by on_unhealthy, without a checkpoint: {why}")

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

    def close(self) -> None:
        """Close the files, and say in a line what the rules have found."""
        with suppress(ValueError):  # closed already
            self.running.remove(self)
        if not self.main:
            return
        if self.doctor is not None:
            found = self.doctor.ever.values()
            named = ", ".join(f"{v.rule.name} at step {v.step}" for v in found)
            log.info("health              %s", named or "well from beginning to end")
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
    for row in history:
        metrics = {k: v for k, v in row.items() if k != "step" and not k.startswith("health/")}
        verdicts += doctor.observe(row["step"], metrics)
    return doctor, verdicts


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
    """The config that a command line describes, of the recipe that knows all of its keys."""
    named = [a.partition("=")[2] for a in arguments if a.startswith("recipe=")]
    arguments = [a for a in arguments if not a.startswith("recipe=")]
    refused: ConfigError | None = None
    for name in named or ("sft", "grpo", "ebft"):
        if name not in ("sft", "grpo", "ebft"):
            raise ConfigError("recipe", name, "is none; sft, grpo or ebft")
        recipe = importlib.import_module(name)  # this is a program here: modules never import recipes
        try:
            return parse_config(recipe.Config, arguments)
        except UnknownOption as error:
            refused = error
    assert refused is not None
    raise refused


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
        if not doctor.ever:
            print(f"well: {len(history)} logged steps, {read} of {of} rules had something to read")
        return 1 if doctor.ever else 0
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
    try:
        sys.exit(command_line(sys.argv[1:]))
    except BallastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli()
