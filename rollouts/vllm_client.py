"""The client of vLLM servers: sends requests with retries, validates answers completely, and loads weights
into running servers, with a probe that verifies that they arrived. The server's side: vllm_worker.py.
"""

import concurrent.futures
import contextlib
import functools
import math
import random
import secrets
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dist
from checkpoints.adapters import save_adapter
from checkpoints.weights import iterate_weights, save_pretrained, weight_shapes
from dist import World
from model import Transformer, without_gradients
from numerics.losses import linear_logprobs
from rollouts.colocation import ColocatedServers, free_memory
from rollouts.gate import Gate
from rollouts.nccl_transfer import NcclTransfer, refuse_nccl
from rollouts.tokens import as_ids, as_logprobs
from rollouts.vllm_server import (
    NEUTRAL,
    PROBE_ANSWER,
    THREADS_PER_SERVER,
    Completion,
    EngineError,
    Server,
    ServerLost,
    StaleServer,
    compare_received,
    read_completions,
    server_dtype,
    sync_method,
)
from rollouts.vllm_worker import checksum, group_of, read_tensors
from run.config import ConfigError
from run.log import log
from text.prompt import Prompt
from text.tokenizer import Tokenizer


class VllmEngine:
    """Samples from vLLM servers. Only rank 0 talks to them and broadcasts the results; work that needs all
    ranks (gathering sharded weights) is done at one point: no collective ever runs on a thread."""

    def __init__(
        self, model: Transformer, options: Any, tokenizer: Tokenizer, world: World, prompts: Sequence[Prompt]
    ):
        self.model, self.options, self.world = model, options, world
        self.stop_ids = tokenizer.stop_ids
        self.name = options.vllm_model_name or options.base_model
        self.colocated = options.vllm_mode == "colocate"
        self._own: ColocatedServers | None = None
        urls = options.vllm_server_base_url if not self.colocated else dist.from_main(
            self._start_servers, world, long=True
        )
        self.servers = [Server(url, options.vllm_timeout) for url in urls]
        self.asleep = False
        self.run_id = dist.from_main(lambda: secrets.token_hex(4), world)
        self.now = 0  # optimiser steps of the trainer's weights
        self.sent: int | None = None  # optimiser steps of the weights on the servers
        self.adapter: str | None = None  # name of the adapter that they serve
        self.method = options.vllm_sync_method
        if self.method == "auto":
            self.method = sync_method(options)
        grown = max(tokenizer.new_ids, default=-1) >= model.arch.checkpoint_vocab_size
        if grown and (model.token_rows is not None or options.adapter is None):
            raise ConfigError(
                "tokens", options.tokens,
                "lie beyond the rows that a server of base_model has; train with sft.py first "
                "(merge_adapter: true), whose result has them, or set rollout_engine: embedded",
            )
        if self.method == "adapter" and not options.adapter:
            raise ConfigError("vllm_sync_method", "adapter", "needs adapter: lora; use file or nccl")
        if self.method == "nccl":
            refuse_nccl(options, world.device)
        self._transfer = NcclTransfer(world.device, options.vllm_sync_address, options.vllm_timeout)
        self._held: dict[
            str, dict[str, dict[str, int]]
        ] = {}  # by server: bit sums last sent and last held
        self._versions: set[str] = set()  # versions that this run has set on servers
        self.gate = Gate()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if world.main else None
        threads = THREADS_PER_SERVER * len(self.servers)
        self._requests = ThreadPoolExecutor(threads, thread_name_prefix="vllm") if world.main else None
        self._speakers: ThreadPoolExecutor | None = None  # of conversations, which wait for environments too
        self.longest = max((len(p.ids) for p in prompts), default=0)
        self._pending: Future | None = None
        self.gap_told = False
        self.batch_agreed = False  # whether a whole batch was compared (engines.check_sampler)
        self._wait_until_healthy()
        room = dist.from_main(self._meet, world)
        # Repeated, so that few, short prompts suffice: it must exceed 128 tokens, one block of a prefix cache
        text = [token for p in prompts[:16] for token in p.ids] * 160
        self.probe = text[: 160 if room is None else max(1, min(160, room - PROBE_ANSWER))]
        # The trainer's log-probs of the probe at the first and last sync: the server's must move with them
        self._earlier: dict[str, torch.Tensor] = {}
        self._floor = math.inf  # smallest difference of a probe so far

    def _start_servers(self) -> list[str]:
        self._own = ColocatedServers(self.options, self.world)
        return self._own.urls

    def close(self) -> None:
        """End the servers that this run has started."""
        if self._own is not None:
            self._own.close()

    def rest(self) -> None:
        """Let servers that share the trainer's GPUs sleep until the next sync. A collective."""
        if self.colocated and not self.asleep:
            # An adapter is loaded onto weights that must be there still.
            level = 1 if self.method == "adapter" else 2
            try:
                self._on_main(lambda: [server.sleep(level) for server in self.servers])
            except ServerLost as problem:  # found again, or given up, when it is to wake
                log.warning("%s", problem)
            self.asleep = True

    def _wake(self, what: str) -> None:
        if self.asleep:
            self._on_main(lambda: [server.wake(what) for server in self.servers])

    # -- before the first step -------------------------------------------------------------------------------

    def _meet(self) -> int | None:
        """Compare every server's model with the config's. Returns the longest length that all accept."""
        rooms = []
        for server in self.servers:
            served = server.models()
            if self.name not in served:
                raise EngineError(
                    f"{server.url}: serves {', '.join(sorted(served))}, the config wants {self.name!r}; "
                    "start it with `python grpo.py serve`, or set vllm_model_name"
                )
            room = served[self.name].get("max_model_len")
            need = self.longest + self.options.max_completion_length
            if room is not None and room < need:
                raise EngineError(
                    f"{server.url}: takes {room} tokens; the longest prompt has {self.longest}, "
                    f"max_completion_length is {self.options.max_completion_length}: start it with "
                    f"--max-model-len {need}, or lower max_prompt_length"
                )
            rooms += [room] if room is not None else []
            server.version()  # 404 without the development routes
        return min(rooms, default=None)

    def _wait_until_healthy(self) -> None:
        """Wait for the servers; every rank continues with the same ones. A collective."""
        living = dist.from_main(self._living, self.world, long=True)
        self.servers = [server for server in self.servers if server.url in living]

    def _living(self) -> list[str]:
        """Wait until all servers answer; after vllm_timeout return those that do, if that is allowed."""
        deadline, pause = time.monotonic() + self.options.vllm_timeout, 0.5
        told = False
        while lost := [server.url for server in self.servers if not server.healthy()]:
            if self._own is not None:
                self._own.check()
            if time.monotonic() > deadline:
                living = [server for server in self.servers if server.url not in lost]
                if living and self.options.vllm_allow_missing_servers:
                    log.warning("%s: no answer for %g s (vllm_timeout); the run continues with %s",
                                ", ".join(lost), self.options.vllm_timeout,
                                ", ".join(server.url for server in living))
                    return [server.url for server in living]
                raise EngineError(
                    f"{lost[0]}: no healthy answer for {self.options.vllm_timeout:g} s (vllm_timeout); is "
                    "the server running? `python grpo.py serve` starts it"
                )
            if not told:
                log.info("waiting for %s", ", ".join(lost))
                told = True
            time.sleep(min(pause, max(0.1, deadline - time.monotonic())))
            pause = min(pause * 1.5, 10.0)
        return [server.url for server in self.servers]

    # -- sampling --------------------------------------------------------------------------------------------

    def generate(
        self, prompts: list[list[int]], n: int, *, seed: tuple[int, ...], temperature: float | None = None,
        limits: list[int] | None = None, on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Like EmbeddedEngine.generate. After a server is lost, wait for it, send the weights again and
        repeat the batch. A collective."""
        return self._until_done(lambda: self._groups(prompts, n, seed, temperature, limits, on_group))

    def converse(self, tasks: Callable[[], list[Callable]]) -> list[dict[str, Any]]:
        """What each conversation comes to. `tasks()` makes them, on rank 0 alone and anew for each attempt; a
        task is called with `ask(prompt, n, limit, temperature, seed)`, which returns n completions, and
        returns an object with `told()`. A collective."""
        return self._until_done(lambda: self._conversations(tasks))

    def prefetch(self, job: Callable[[], tuple[str, Any]]) -> None:
        """Start a job (`completions_of`, `conversations_of`) on a thread of rank 0; `collect` has its
        result."""
        self._job = job
        if self._thread is not None:
            self._pending = self._thread.submit(job)

    def completions_of(self, prompts: list[list[int]], n: int, **how: Any) -> Callable[[], tuple[str, Any]]:
        """A job for `prefetch`: what `generate` would sample."""
        how = {"temperature": None, "limits": None, "on_group": None, **how}
        return lambda: self._groups(prompts, n, **how)

    def conversations_of(self, tasks: Callable[[], list[Callable]]) -> Callable[[], tuple[str, Any]]:
        """A job for `prefetch`: what `converse` would return."""
        return lambda: self._conversations(tasks)

    def collect(self, step: int) -> list:
        """The result of `prefetch`; `step`: optimiser steps done by now. A collective."""
        self.now = step
        job, pending = self._job, self._pending
        self._pending = None
        return self._until_done(job, lambda: pending.result() if pending else ("ok", None))

    def _until_done(
        self, job: Callable[[], tuple[str, Any]], first: Callable[[], tuple[str, Any]] | None = None
    ) -> list:
        attempt = first or job
        losses = 0
        while True:
            state, result = dist.from_main(attempt, self.world, long=True)
            if state == "ok":
                return result
            losses += 1
            if losses > 5:
                raise EngineError(f"{result}; five attempts in a row failed; see the server's log")
            self.restore(result)
            attempt = job

    def _groups(self, prompts, n, seed, temperature, limits, on_group) -> tuple[str, Any]:
        """One attempt at n completions of each prompt."""
        limits = limits or [self.options.max_completion_length] * len(prompts)
        temperature = self.options.temperature if temperature is None else temperature
        different = n if temperature > 0 else 1  # greedy completions are identical, and vLLM refuses n > 1

        def group(i: int, ask: Callable[..., list[Completion]]) -> list[Completion]:
            made = ask(prompts[i], different, limits[i], temperature, (seed, i)) * (n // different)
            if on_group is not None:
                on_group(i, made)
            return made

        return self._attempt([functools.partial(group, i) for i in range(len(prompts))], self._requests)

    def _conversations(self, tasks: Callable[[], list[Callable]]) -> tuple[str, Any]:
        """One attempt at all conversations."""
        if self._speakers is None:
            workers = getattr(self.options, "environment_workers", THREADS_PER_SERVER * len(self.servers))
            self._speakers = ThreadPoolExecutor(workers, thread_name_prefix="conversation")
        state, found = self._attempt(tasks(), self._speakers)
        return state, [one.told() for one in found] if state == "ok" else found

    def _attempt(self, tasks: Sequence[Callable], threads: ThreadPoolExecutor | None) -> tuple[str, Any]:
        """("ok", what each task returned), or ("stale", reason) if a server was lost or has other weights
        than were sent. Raises EngineError if a retry cannot help."""
        results: list[Any] = [None] * len(tasks)
        over = threading.Event()  # set when the attempt ends: later answers are ignored

        def ask(
            place: int, prompt: list[int], n: int, limit: int, temperature: float | None, seed: tuple
        ) -> list[Completion]:
            server = self.servers[place % len(self.servers)]
            if over.is_set():
                raise ServerLost(f"{server.url}: the attempt has ended")
            with self.gate.passage():
                found = self._draw(server, prompt, n, limit, temperature, seed)
            if over.is_set():
                raise ServerLost(f"{server.url}: the attempt has ended")
            return found

        def one(i: int) -> None:
            if not over.is_set():
                results[i] = tasks[i](ask=functools.partial(ask, i))

        asked: list[Future] = []
        try:
            self.check_versions()
            assert threads is not None
            asked = [threads.submit(one, i) for i in range(len(tasks))]
            for done in concurrent.futures.as_completed(asked):
                done.result()
            self.check_versions()  # a server that was restarted in between sampled from other weights
        except (StaleServer, ServerLost) as problem:
            return "stale", str(problem)  # a lost server may come back with other weights: send them again
        finally:
            over.set()
            self._end(asked)
        return "ok", results

    def _end(self, asked: list[Future]) -> None:
        """End the requests of an attempt: they would hold blocks of old weights, and report to the next
        one."""
        if running := [one for one in asked if not one.done() and not one.cancel()]:
            self.abort()
            concurrent.futures.wait(running)

    def _draw(
        self, server: Server, prompt: list[int], n: int, limit: int, temperature: float | None, seed: tuple,
        parts: bool = False,
    ) -> list[Completion]:
        """The answer to one request."""
        chosen = self.options.temperature if temperature is None else temperature
        body = self._body(prompt, n, limit, chosen, random.Random(repr(seed)).getrandbits(31))
        answer = server.ask("POST", "/v1/completions", body, raw=True)
        vocab_size = self.model.arch.vocab_size
        return read_completions(answer, n, limit, server.url, prompt, vocab_size, parts=parts)

    def abort(self) -> None:
        """End what the servers are asked at the moment."""
        for server in self.servers:
            with contextlib.suppress(ServerLost, EngineError):
                server.abort()

    def go_on(
        self, era: int, place: int, prompt: list[int], n: int, limit: int, temperature: float | None,
        seed: tuple,
    ) -> list[Completion]:
        """One completion (n is 1) that an update of the weights interrupts and does not end: what is written
        stays, the new weights read it and go on. Each token has the version of the weights that drew it.
        Raises ServerLost where the gate's era is over."""
        ids, logprobs, versions = as_ids([]), as_logprobs([]), as_ids([])
        reason, failures = "abort", 0
        while reason == "abort" and len(ids) < limit:
            left, context = limit - len(ids), [*prompt, *ids.tolist()]
            with self.gate.passage(era):
                server, version = self.servers[place % len(self.servers)], self.sent
                try:
                    (part,) = self._draw(
                        server, context, 1, left, temperature, (seed, len(ids)), parts=True
                    )
                except ServerLost as problem:
                    failures += 1
                    if failures > 3 or not self._has_our_weights(server):
                        self.gate.lost(str(problem), era)
                        raise
                    time.sleep(0.1 * failures)  # a connection that broke: the server is well
                    continue
            ids, logprobs = np.concatenate([ids, part.ids]), np.concatenate([logprobs, part.logprobs])
            versions = np.concatenate([versions, np.full(len(part.ids), version, np.int32)])
            reason = part.finish_reason
        return [Completion(ids, logprobs, "length" if reason == "abort" else reason, versions)]

    def _has_our_weights(self, server: Server) -> bool:
        try:
            return server.version() == self._version_name()
        except (ServerLost, EngineError):
            return False

    def restore(self, reason: str) -> None:
        """After a loss: wait for the servers and send the weights again. A collective."""
        log.warning("%s", reason)
        self.gate.lost(reason, self.gate.era)
        self._wait_until_healthy()
        self._send_until_it_works(self.now)

    def _body(
        self, prompt: list[int], n: int, limit: int, temperature: float, seed: int | None
    ) -> dict[str, Any]:
        """A request that leaves nothing to the server's defaults. The salt excludes cached keys and values of
        other weights."""
        return {
            "model": self.adapter or self.name, "prompt": prompt, "n": n, "max_tokens": limit,
            "temperature": temperature, **NEUTRAL, "logprobs": 0, "return_token_ids": True,
            "stop_token_ids": self.stop_ids, "skip_special_tokens": False, "seed": seed,
            "cache_salt": self._version_name(),
        }

    def check_versions(self) -> None:
        """Raise StaleServer, or ServerLost, unless every server has the weights that were sent last."""
        for server in self.servers:
            version = server.version()
            if version != self._version_name():
                raise StaleServer(
                    f"{server.url}: has weights {version!r}, this run sent {self._version_name()!r}: "
                    "restarted, or used by another run; sending them again"
                )

    def _version_name(self) -> str:
        return f"ballast-{self.run_id}-{self.sent}"

    def version(self, step: int) -> int:
        return self.sent if self.sent is not None else 0

    # -- weights ---------------------------------------------------------------------------------------------

    def sync(self, step: int, due: bool = False) -> dict[str, float]:
        """Send the weights of `step` if the interval asks for it (or `due`), and verify it. A collective."""
        self.now = step
        if self.sent == step and not self.asleep:
            return {}
        soon = self.sent is not None and step - self.sent < self.options.vllm_sync_interval
        if soon and not due and not self.asleep:
            return {}
        return self._send_until_it_works(step)

    def _send_until_it_works(self, step: int) -> dict[str, float]:
        last = ""
        with self.gate.shut(self.abort):
            for tries in range(5):
                try:
                    return self._send(step)
                except ServerLost as problem:
                    last = str(problem)
                    log.warning("%s (sync %d)", last, tries + 1)
                    self._wait_until_healthy()
        raise EngineError(
            f"step {step}: the weights could not be sent in five attempts: {last}; was the server started "
            "with `python grpo.py serve`?"
        )

    def _send(self, step: int) -> dict[str, float]:
        seconds = dist.Timer()
        self.sent = step
        send = {"file": self._send_file, "adapter": self._send_adapter, "nccl": self._send_nccl}
        if self.asleep:
            free_memory()
        self._wake("weights")
        count = send[self.method](step)
        self._wake("kv_cache")
        self.asleep = False

        def settle() -> None:
            for server in self.servers:
                for _ in range(20):
                    if server.reset_prefix_cache():
                        break
                    server.abort()
                    time.sleep(0.1)
                else:
                    log.warning("%s: requests of other clients kept the prefix cache from being emptied; "
                                "this run does not read their entries", server.url)
                server.set_version(self._version_name())
            self._versions.add(self._version_name())

        self._on_main(settle)
        elapsed = seconds()
        gap = self._compare_probe(step)
        metrics = {
            "sync/seconds": elapsed,
            "sync/gigabytes_per_second": count / elapsed / 1e9,
            "sync/probe_difference": gap,
        }
        return metrics

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """`work()` on rank 0; ServerLost there is ServerLost on all ranks."""

        def guarded() -> tuple[str, Any]:
            try:
                return "ok", work()
            except ServerLost as problem:
                return "lost", str(problem)

        state, result = dist.from_main(guarded, self.world, long=True)
        if state == "lost":
            raise ServerLost(result)
        return result

    def _server_dtype(self) -> torch.dtype:
        return getattr(torch, server_dtype(self.options))

    def _both_exact(self) -> bool:
        return self._server_dtype() == torch.float32 and not self.options.bf16

    def tolerance(self) -> float:
        """Largest accepted mean difference of log-probs between server and trainer."""
        if self.options.vllm_probe_tolerance is not None:
            return self.options.vllm_probe_tolerance
        return 1e-3 if self._both_exact() else 0.1

    def _folder(self, name: str) -> Path:
        return Path(self.options.vllm_sync_directory) / f"ballast-{self.run_id}-{name}"

    def _send_file(self, step: int) -> int:
        """Every rank gathers tensor by tensor, rank 0 writes them; the server's workers read the file."""
        folder = self._folder("weights")
        try:
            merge = self.options.adapter is not None
            save_pretrained(self.model, folder, dtype=self._server_dtype(), merge=merge, main=self.world.main)

            def load() -> int:
                sent = {name: checksum(tensor) for name, tensor in read_tensors(folder)}
                sums: dict[str, int] = defaultdict(int)
                for name, (bits, *_) in sent.items():
                    sums[group_of(name)] += bits
                for server in self.servers:
                    answers = self._load_file(server, folder)
                    for worker in answers:
                        compare_received(sent, worker, server.url, step)
                    self._compare_held(server, answers, dict(sums), step)
                return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

            return self._on_main(load)
        finally:
            if self.world.main:
                shutil.rmtree(folder, ignore_errors=True)

    def _compare_held(self, server: Server, answers: list, sent: dict[str, int], step: int) -> None:
        """Raise EngineError if the server's layers do not hold what was sent. If one worker holds a whole
        layer (fused but otherwise unchanged), both sums of bits are equal. If they differed before (tensor
        parallelism, another dtype, quantisation), a layer that changed here must have changed there."""
        held: dict[str, int] = defaultdict(int)
        for worker in answers:
            for name, bits in worker["held"].items():
                held[name] += bits
        before, self._held[server.url] = self._held.get(server.url), {"sent": sent, "held": dict(held)}
        if before is None:
            return
        for name, bits in sent.items():
            if before["sent"].get(name) == before["held"].get(name):
                wrong = held[name] != bits
            else:
                wrong = bits != before["sent"].get(name) and held[name] == before["held"].get(name)
            if wrong:
                raise EngineError(
                    f"{server.url}: after the sync of step {step} {name} does not hold what was sent, though "
                    "the server says that it has loaded it; start it with `python grpo.py serve` of this "
                    "version"
                )

    def _load_file(self, server: Server, folder: Path) -> list:
        return server.remote_call("ballast_load_weights", str(folder))

    def _send_adapter(self, step: int) -> int:
        """Load the adapter under a new name, so that no cached prefix of the old one can be reused, and
        unload the old one."""
        name, before = f"policy-{self.run_id}-{step}", self.adapter
        folder = self._folder(name)
        save_adapter(self.model, folder, main=self.world.main, for_vllm=True)

        def load() -> int:
            for server in self.servers:
                served = server.models()
                if name in served:
                    server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
                server.ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
                if before is not None and before != name and before in served:
                    server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": before})
            if before is not None and before != name:
                shutil.rmtree(self._folder(before), ignore_errors=True)
            return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

        count = self._on_main(load)
        self.adapter = name
        return count

    def _send_nccl(self, step: int) -> int:
        """GPU to GPU: every rank gathers, rank 0 broadcasts to the workers of all servers."""
        dtype, merge = self._server_dtype(), self.options.adapter is not None
        shapes, transfer = weight_shapes(self.model), self._transfer

        def has_ours(server: Server) -> bool:
            return server.version() in self._versions

        self._on_main(lambda: transfer.begin(self.servers, shapes, dtype, has_ours))
        tensors = iterate_weights(self.model, dtype=dtype, merge=merge, main=self.world.main)
        if self.world.main:
            transfer.send(tensors)
        else:
            for _ in tensors:
                pass
        self._on_main(transfer.finish)
        return sum(math.prod(shape) for _, shape in shapes) * dtype.itemsize

    def _compare_probe(self, step: int) -> float:
        """Mean |log-prob| difference of the probe between each server and the trainer, the largest of them.

        Raises EngineError with both numbers where it is beyond the tolerance: a stale, wrong or corrupted
        server answers 200 like any other.
        """
        scored = self._on_main(self._ask_probe)
        training = self.model.training
        self.model.eval()
        with without_gradients(self.model):
            ours = self._trainer_logprobs(self.probe, 1.0)
            sampled = [
                self._trainer_logprobs(self.probe + answer, self.options.temperature)[len(self.probe) - 1 :]
                for _, _, answer, _ in scored
            ]
        self.model.train(training)
        allowed = self.tolerance()

        def judge() -> float:  # on one rank: near a bound, two ranks might disagree
            pairs = zip(scored, sampled, strict=True)
            worst = max(self._judge(server, ours, own, allowed, step) for server, own in pairs)
            self._floor = min(self._floor, worst)
            self._earlier = {"first": self._earlier.get("first", ours), "last": ours}
            return worst

        worst = dist.from_main(judge, self.world)
        if not self.gap_told:
            self.gap_told = True
            what = (
                "both in fp32"
                if self._both_exact()
                else "due to precision: a constant offset of the sampling ratios"
            )
            log.info("probe: server and trainer differ by %.2g in log-prob, %s", worst, what)
        return worst

    def _judge(
        self, server: tuple, ours: torch.Tensor, own: torch.Tensor, allowed: float, step: int
    ) -> float:
        """Mean |difference| between one server's probe (an entry of `_ask_probe`) and the trainer's log-probs
        `ours`. Raises EngineError if it is too large, or if that of the sampled tokens to `own` is."""
        url, prompt, _, drawn = server
        theirs = torch.tensor(prompt)
        gap = (theirs - ours).abs().mean().item()
        where = f"{url}: after the sync of step {step}"
        if not gap <= allowed:  # also where it is NaN
            raise EngineError(
                f"{where} the probe has mean log-prob {theirs.mean():.4f} on the server, {ours.mean():.4f} "
                f"in the trainer (mean difference {gap:.2g}, allowed {allowed:g}: vllm_probe_tolerance): it "
                "does not have these weights; start it with `python grpo.py serve`"
            )
        for since, earlier in self._earlier.items():
            moved = (ours - earlier).abs().mean().item()
            if moved > 4 * self._floor and gap > moved / 2:
                raise EngineError(
                    f"{where} the probe differs by {gap:.2g} in mean log-prob from the trainer's, whose "
                    f"own moved by {moved:.2g} since the {since}: the server lacks some of the weights; "
                    "start it with `python grpo.py serve`"
                )
        off, most = (torch.tensor(drawn) - own).abs().mean().item(), max(allowed, 4 * gap)
        if not off <= most:
            raise EngineError(
                f"{where} the tokens that it samples have log-probs that differ by {off:.2g} from the "
                f"trainer's (allowed {most:.2g}), while those of a prompt agree: other settings of sampling "
                "(--logprobs-mode must be processed_logprobs) or stale keys in its prefix cache; start it "
                "with `python grpo.py serve`"
            )
        return gap

    def _trainer_logprobs(self, tokens: list[int], temperature: float) -> torch.Tensor:
        """log π of tokens[1:] in the trainer: [len − 1], fp32 on the CPU."""
        ids = torch.tensor([tokens], device=self.world.device)
        hidden, _ = self.model.hidden_states(ids)
        return linear_logprobs(
            hidden[0, :-1], self.model.head_weight, ids[0, 1:], temperature=temperature,
            softcap=self.model.arch.final_softcap,
        ).logprobs.float().cpu()

    def _ask_probe(self) -> list[tuple[str, list[float], list[int], list[float]]]:
        """For each server: address, log-probs of the probe, and tokens sampled after the probe with the run's
        own settings, with their log-probs. It samples twice, so that the second time the probe comes from the
        prefix cache."""
        answers = []
        for server in self.servers:
            scored = self._score(server)
            body = self._body(self.probe, 1, PROBE_ANSWER, self.options.temperature, 1)
            for _ in range(2):
                answer = server.ask("POST", "/v1/completions", body, raw=True)
            (drawn,) = read_completions(
                answer, 1, PROBE_ANSWER, server.url, self.probe, self.model.arch.vocab_size
            )
            answers.append((server.url, scored, drawn.ids.tolist(), drawn.logprobs.tolist()))
        return answers

    def _score(self, server: Server) -> list[float]:
        body = {**self._body(self.probe, 1, 1, 1.0, None), "prompt_logprobs": 0}
        answer = server.ask("POST", "/v1/completions", body)
        try:
            given = answer["choices"][0]["prompt_logprobs"][1:]
            return [
                float(entry[str(token)]["logprob"])
                for entry, token in zip(given, self.probe[1:], strict=True)
            ]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise EngineError(
                f"{server.url}: scored the probe in an unknown format: {error!r}"
            ) from None
