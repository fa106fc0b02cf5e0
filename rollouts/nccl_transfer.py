"""Weights from this run's GPU to those of vLLM servers: the trainer's end of the protocol of vLLM 0.32
(vllm/distributed/weight_transfer/nccl_engine.py). One gather serves all servers, and what fails on rank 0 is
told after the gather, so that no rank is left in a collective.
"""

import concurrent.futures
import contextlib
import importlib
import importlib.util
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

from rollouts.vllm_server import EngineError, Server, ServerLost
from run.config import ConfigError

BUFFER = 1 << 28  # bytes of tensors that travel together; the servers are told
IN_FLIGHT = 2  # buffers that are being sent at once


def refuse_nccl(options: Any, device: torch.device) -> None:
    """ConfigError where this process cannot send over NCCL."""
    key, value = "vllm_sync_method", options.vllm_sync_method
    other = "or set vllm_sync_directory to a file system that all hosts share, and vllm_sync_method: file"
    if device.type != "cuda":
        raise ConfigError(key, value, f"means nccl here, which needs GPUs; train on one, {other}")
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            key, value, "means nccl here, for which the trainer's Python needs vLLM too: "
            f"`pip install 'vllm==0.32.*'` into it, {other}",
        )


class NcclTransfer:
    """Groups of this process (rank 0 of each) with the workers of each server (ranks 1 and up). Used on rank
    0 of the trainer alone: `begin`, `send` and `finish` for each sync."""

    def __init__(self, device: torch.device, address: str | None, timeout: float):
        """`address`: under which the servers reach this host; unset: this host's own on the way to them.
        `timeout`: seconds for a server's workers to join, and for a buffer to arrive."""
        self.device, self.address, self.timeout = device, address, timeout
        self.groups: dict[str, Any] = {}  # communicators by server
        self.receiving: dict[str, Future] = {}  # servers' answers to the request to receive
        self.failures: dict[str, Exception] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(
        self, servers: Sequence[Server], shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype,
        version: Callable[[Server], bool],
    ) -> None:
        """Every server starts to receive tensors of these names and shapes. `version` tells whether a server
        still has what it was sent: one that has not was restarted, and its workers join anew.

        Raises ServerLost and EngineError.
        """
        self.servers, self.failures, self.receiving = list(servers), {}, {}
        for server in servers:
            if server.url in self.groups and not version(server):
                self._drop(server.url)
            if server.url not in self.groups:
                self.groups[server.url] = self._join(server)
        update = {
            "names": [name for name, _ in shapes],
            "dtype_names": [str(dtype).removeprefix("torch.")] * len(shapes),
            "shapes": [list(shape) for _, shape in shapes],
        }
        for server in servers:
            try:
                server.ask("POST", "/start_weight_update", {})
            except (ServerLost, EngineError):
                self._drop(server.url)  # whatever state it is in, the next attempt begins from none
                raise
            body = {"update_info": update}
            self.receiving[server.url] = _in_background(server.ask, "POST", "/update_weights", body)

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Broadcast tensors, as `begin` announced them, to all servers; bytes. All of `tensors` is read
        whatever fails, as other ranks gather them with this one."""
        count, sent = 0, []  # of what is on its way: the buffer, and an event after its last broadcast
        tensors = iter(tensors)
        with contextlib.suppress(_AllLost):
            for buffer in packed(tensors, self.device):
                count += buffer.numel()
                for url in self._living():
                    try:
                        self.groups[url].broadcast(buffer, src=0, stream=self._stream(buffer))
                    except Exception as error:
                        self._fail(url, ServerLost(f"{url}: NCCL: {error}"))
                if self.stream is not None:
                    sent.append((buffer, self.stream.record_event()))
                    if len(sent) >= IN_FLIGHT:
                        self._wait_for(sent.pop(0)[1])
            for _, event in sent:
                self._wait_for(event)
        for _ in tensors:
            pass
        return count

    def finish(self) -> None:
        """The servers go on with what they received. Raises what went wrong since `begin`."""
        for server in self.servers:
            if server.url in self.failures:
                continue
            try:
                self.receiving[server.url].result(self.timeout)
                server.ask("POST", "/finish_weight_update", {})
            except TimeoutError:
                reason = f"{server.url}: has not received the weights within {self.timeout:g} s"
                self._fail(server.url, ServerLost(reason))
            except (ServerLost, EngineError) as error:
                self._fail(server.url, error)
        for failure in self.failures.values():
            raise failure

    # -- the parts -------------------------------------------------------------------------------------------

    def _join(self, server: Server) -> Any:
        """A group with the workers of a server. Both sides wait for each other, hence the threads: where the
        server refuses, nobody will ever come."""
        for path in ("/finish_weight_update", "/shutdown_weight_transfer_engine"):
            with contextlib.suppress(ServerLost, EngineError):  # what an earlier run left there, or nothing
                server.ask("POST", path, {})
        workers = int(server.ask("GET", "/get_world_size")["world_size"])
        address = self.address or address_towards(server.url)
        port = _free_port(address)
        info = {
            "master_address": address, "master_port": port, "rank_offset": 1, "world_size": 1 + workers,
            "packed": True, "packed_buffer_size_bytes": BUFFER, "packed_num_buffers": IN_FLIGHT,
        }
        asked = _in_background(server.ask, "POST", "/init_weight_transfer_engine", {"init_info": info})
        joined = _in_background(join, address, port, 1 + workers, self.device)
        done, waiting = concurrent.futures.wait(
            (asked, joined), timeout=self.timeout, return_when=concurrent.futures.FIRST_EXCEPTION
        )
        for future in done:
            future.result()
        if waiting:
            raise EngineError(
                f"{server.url}: its {workers} workers and this process did not meet at {address}:{port} "
                f"within {self.timeout:g} s; set vllm_sync_address to an address of this host that they reach"
            )
        return joined.result()

    def _living(self) -> list[str]:
        """Servers that still receive; one whose answer has come already has failed."""
        for url, answer in self.receiving.items():
            if url not in self.failures and answer.done() and answer.exception() is not None:
                self._fail(url, answer.exception())
        living = [server.url for server in self.servers if server.url not in self.failures]
        if not living:
            raise _AllLost
        return living

    def _stream(self, buffer: Tensor) -> Any:
        """One of their own: a broadcast that nobody receives must not hold up training."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            buffer.record_stream(self.stream)
        return self.stream

    def _wait_for(self, event: torch.cuda.Event) -> None:
        deadline = time.monotonic() + self.timeout
        while not event.query():
            living = self._living()
            if time.monotonic() > deadline:
                for url in living:
                    reason = f"{url}: a buffer of weights did not arrive within {self.timeout:g} s"
                    self._fail(url, ServerLost(reason))
            time.sleep(1e-4)

    def _fail(self, url: str, error: BaseException | None) -> None:
        answer = self.receiving[url]
        if answer.done() and answer.exception() is not None:  # the cause, where NCCL reports the effect
            error = answer.exception()
        known = isinstance(error, ServerLost | EngineError)
        self.failures[url] = error if known else ServerLost(f"{url}: {error!r}")
        self._drop(url)

    def _drop(self, url: str) -> None:
        group = self.groups.pop(url, None)
        if group is not None:
            group.destroy()  # also ends what hangs in it


class _AllLost(Exception):
    """No server is left to send to."""


def packed(
    tensors: Iterator[tuple[str, Tensor]], device: torch.device, size: int | None = None
) -> Iterator[Tensor]:
    """Buffers of bytes on `device`: tensors in their order until one makes it more than `size` (unset:
    BUFFER), as vLLM's workers cut them again."""
    size = BUFFER if size is None else size
    parts: list[Tensor] = []
    count = 0
    for _, tensor in tensors:
        parts.append(tensor.to(device).contiguous().view(-1).view(torch.uint8))
        count += parts[-1].numel()
        if count > size:
            yield torch.cat(parts)
            parts, count = [], 0
    if parts:
        yield torch.cat(parts)


def join(address: str, port: int, world_size: int, device: torch.device) -> Any:
    """vLLM's own communicator, as rank 0 of `world_size`. Waits for the others."""
    common = importlib.import_module("vllm.distributed.weight_transfer.nccl_common")
    torch.cuda.set_device(device)  # of this thread
    return common.trainer_init({"master_address": address, "master_port": port, "world_size": world_size})


def address_towards(url: str) -> str:
    """This host's own address on the way to a server: no packet is sent to learn it."""
    where = urlparse(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((where.hostname or "127.0.0.1", where.port or 80))
        except OSError as error:
            raise ServerLost(f"{url}: {error.strerror or error}") from None
        return probe.getsockname()[0]


def _free_port(address: str) -> int:
    with socket.socket() as free:
        try:
            free.bind((address, 0))
        except OSError as error:
            raise EngineError(
                f"vllm_sync_address: {address} is no address of this host ({error.strerror})"
            ) from None
        return free.getsockname()[1]


def _in_background(work: Callable[..., Any], *arguments: Any) -> Future:
    """On a thread that does not keep the process from ending: what it waits for may never come."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
