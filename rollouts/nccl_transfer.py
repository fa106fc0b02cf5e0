"""Sends weights from this run's GPU to vLLM servers: the trainer's side of the protocol of vLLM 0.32
(vllm/distributed/weight_transfer/nccl_engine.py). One gather serves all servers, and failures on rank 0 are
raised after the gather, so that no rank is left in a collective.
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

BUFFER = 1 << 28  # bytes per broadcast; the servers are told this size
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
    """NCCL groups, one per server: this process (rank 0) and the server's workers (ranks 1 and up). Used only
    on rank 0 of the trainer: `begin`, `send` and `finish` for each sync."""

    def __init__(self, device: torch.device, address: str | None, timeout: float):
        """`address`: where the servers reach this host; unset: the address that this host uses towards them.
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
        """Make every server ready to receive tensors of these names and shapes. `version(server)` is false if
        the server no longer has weights of this run: it was restarted, and its workers join again.

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
                self._drop(server.url)  # its state is unknown: the next attempt joins again
                raise
            body = {"update_info": update}
            self.receiving[server.url] = _in_background(server.ask, "POST", "/update_weights", body)

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Broadcast the tensors announced in `begin` to all servers; returns their bytes. `tensors` is read
        to its end even after a failure, because the other ranks gather them together with this one."""
        count, sent = 0, []  # sent: buffers in flight, each with an event after its last broadcast
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
        """Let the servers continue with the weights they received. Raises the first failure since `begin`."""
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
        """Form a group with the workers of a server. Each side blocks until the other joins, hence the
        threads: if the server refuses, this side would wait for ever."""
        for path in ("/finish_weight_update", "/shutdown_weight_transfer_engine"):
            with contextlib.suppress(ServerLost, EngineError):  # clears the state of an earlier run, if any
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
        """Servers that are still receiving; one that has already answered with an error has failed."""
        for url, answer in self.receiving.items():
            if url not in self.failures and answer.done() and answer.exception() is not None:
                self._fail(url, answer.exception())
        living = [server.url for server in self.servers if server.url not in self.failures]
        if not living:
            raise _AllLost
        return living

    def _stream(self, buffer: Tensor) -> Any:
        """A separate stream for broadcasts: one that nobody receives must not block training."""
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
            group.destroy()  # also aborts operations that hang in it


class _AllLost(Exception):
    """No server is left to send to."""


def packed(
    tensors: Iterator[tuple[str, Tensor]], device: torch.device, size: int | None = None
) -> Iterator[Tensor]:
    """Byte buffers on `device`: tensors in order, until one takes the buffer beyond `size` (unset: BUFFER).
    vLLM's workers split by the same rule."""
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
    """The address that this host uses towards a server, found without sending a packet."""
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
    """Run `work` on a daemon thread, which does not keep the process alive: it may wait for ever."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
