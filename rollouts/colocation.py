"""vLLM servers on the trainer's own GPUs, started and ended by the run: they sleep while it trains."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from dist import World
from rollouts.vllm_server import EngineError, Server, served_checkpoint, server_command
from run.config import ConfigError
from run.log import log

# Variables that would make a server join the trainer's processes
OF_TORCHRUN = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC")


class ColocatedServers:
    """One server per GPU of this host, or one on a CPU. For rank 0."""

    def __init__(self, options: Any, world: World):
        if int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) != world.size:
            raise ConfigError(
                "vllm_mode", "colocate", "is for one host; start servers with `python grpo.py serve`"
            )
        model = served_checkpoint(options)
        self.log = Path(options.output_dir) / "server"
        self.log.mkdir(parents=True, exist_ok=True)
        self.processes: list[subprocess.Popen] = []
        self.urls = []
        for k in range(world.size if world.device.type == "cuda" else 1):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                url = f"http://127.0.0.1:{free.getsockname()[1]}"
            environment, command = server_command(options, str(model), url)
            if world.device.type == "cuda":
                environment["CUDA_VISIBLE_DEVICES"] = _gpu(k)
            inherited = {k: v for k, v in os.environ.items() if not k.startswith(OF_TORCHRUN)}
            try:
                with (self.log / f"server-{k}.log").open("w") as file:
                    self.processes.append(subprocess.Popen(
                        command, env={**inherited, **environment}, stdout=file, stderr=file,
                        start_new_session=True, preexec_fn=_end_with_parent,
                    ))
            except OSError as error:
                self.close()
                raise ConfigError(
                    "vllm_python", command[0], f"cannot be started ({error.strerror})"
                ) from None
            self.urls.append(url)
        many = "a vLLM server" if len(self.urls) == 1 else f"{len(self.urls)} vLLM servers"
        log.info("starting %s beside the trainer, log in %s", many, self.log)
        self._wait(options.vllm_timeout)

    def check(self) -> None:
        """Raise EngineError with the last words of a server that has ended."""
        for k, process in enumerate(self.processes):
            if process.poll() is not None:
                self._fail(k, "ended")

    def _fail(self, k: int, what: str) -> None:
        path = self.log / f"server-{k}.log"
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        told = next((line for line in reversed(lines) if "Error" in line), (lines or [""])[-1])
        raise EngineError(f"the vLLM server {what}: {told.strip()[:300]}; its log is {path}")

    def _wait(self, timeout: float) -> None:
        """Until all of them answer."""
        deadline = time.monotonic() + timeout
        try:
            for k, url in enumerate(self.urls):
                server = Server(url, timeout)
                while not server.healthy():
                    self.check()
                    if time.monotonic() > deadline:
                        self._fail(k, f"did not answer in {timeout:g} s (vllm_timeout)")
                    time.sleep(0.5)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        self.processes = []


def _gpu(k: int) -> str:
    """The name of this process's k-th GPU for a process of its own."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[k] if visible else str(k)


def _end_with_parent() -> None:
    """Linux: SIGTERM for this process when the trainer is gone, also where that is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def free_memory() -> None:
    """Give the memory that torch keeps for later back to the GPU, for the server beside it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
