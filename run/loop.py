"""How a run begins and ends."""

import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import dist
from health.memory import what_to_change
from health.monitor import MetricLogger
from run.config import BallastError
from run.log import log

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
