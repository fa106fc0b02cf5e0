"""The client of a vLLM server: requests that are retried or refused and never half believed, and weights that
are put into a running server, with a probe that shows whether they arrived. The server's end: vllm_worker.py.
"""

import concurrent.futures
import contextlib
import importlib
import math
import os
import random
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import torch

import dist
from config import BallastError, ConfigError
from data import Prompt
from dist import World
from health import log
from losses import linear_logprobs
from model import Transformer, without_gradients
from tokenizer import Tokenizer
from vllm_worker import checksum, read_tensors
from weights import iterate_weights, save_adapter, save_pretrained


class EngineError(BallastError):
    """A rollout engine that cannot go on: the line names the server, the step and the remedy."""


@dataclass
class Completion:
    """What a sampler wrote after a prompt."""

    ids: list[int]
    logprobs: list[float | None]  # of each token under the distribution that it was drawn from; None: unknown
    finish_reason: str  # stop or length


# ------------------------------------------------------------------------------------------------------------
# vLLM servers
# ------------------------------------------------------------------------------------------------------------


# Everything that a request leaves out, a server may fill from the checkpoint's generation_config.json.
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
           "frequency_penalty": 0.0}  # fmt: skip
THREADS_A_SERVER = 64
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"  # noqa: S108 - names in it are random
PROBE_ANSWER = 16  # tokens that the probe lets a server sample


class ServerLost(Exception):
    """A server that does not answer, or answers 5xx: it may come back."""


class StaleServer(Exception):
    """A server whose weights are not the ones that were sent last: it was restarted, or somebody else's."""


class Server:
    """One vLLM server, by HTTP. Routes under development mode carry the weights."""

    def __init__(self, url: str, timeout: float):
        self.url = url.rstrip("/")
        # A generation may take long; connecting may not.
        self.client = httpx.Client(
            base_url=self.url, timeout=httpx.Timeout(timeout, connect=10.0),
            limits=httpx.Limits(max_connections=None),
        )  # fmt: skip

    def ask(self, method: str, path: str, json: Any = None, **kwargs) -> Any:
        """The decoded answer. ServerLost: no answer or 5xx. EngineError: 4xx, with the server's own words."""
        try:
            response = self.client.request(method, path, json=json, **kwargs)
        except httpx.HTTPError as error:
            raise ServerLost(f"{self.url}{path}: {str(error) or type(error).__name__}") from None
        if response.status_code >= 500:
            raise ServerLost(f"{self.url}{path}: {response.status_code} {response.text[:200]}")
        if response.status_code >= 400:
            hint = ""
            if response.status_code == 404 and path != "/v1/completions":
                hint = "; start the server with `python grpo.py serve`, which switches these routes on"
            words = " ".join(response.text[:300].split())
            raise EngineError(f"{self.url}{path}: answered {response.status_code}: {words}{hint}")
        if not response.headers.get("content-type", "").startswith("application/json"):
            return response.text or None  # some routes answer nothing, or a sentence
        try:
            return response.json()
        except ValueError:
            raise EngineError(f"{self.url}{path}: answered something that is not JSON") from None

    def healthy(self) -> bool:
        try:
            return self.client.get("/health", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def models(self) -> dict[str, dict]:
        answer = self.ask("GET", "/v1/models")
        if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
            raise EngineError(f"{self.url}/v1/models: no list of models; is it a vLLM server?")
        return {str(e["id"]): e for e in answer["data"] if isinstance(e, dict) and "id" in e}

    def abort(self) -> None:
        """End all that is in flight: its blocks would keep the prefix cache from being emptied."""
        self.ask("POST", "/abort_requests", {})

    def reset_prefix_cache(self) -> bool:
        """Whether it is empty now: a server answers 200 also where requests hold blocks."""
        answer = self.ask("POST", "/reset_prefix_cache")
        return not (isinstance(answer, dict) and answer.get("success") is False)

    def version(self) -> str:
        answer = self.ask("GET", "/weight_info")
        return str(answer.get("weight_version")) if isinstance(answer, dict) else "unknown"

    def set_version(self, version: str) -> None:
        self.ask("POST", "/update_weight_version", {"new_version": version})

    def remote_call(self, method: str, *arguments: str) -> list:
        answer = self.ask("POST", "/collective_rpc", {"method": method, "args": list(arguments)})
        return answer.get("results", []) if isinstance(answer, dict) else []


class VllmEngine:
    """vLLM servers. Rank 0 alone talks to them; what it learns is told to all ranks, and what needs all ranks
    (gathering sharded weights) is done by all, at one place: no collective ever runs on a thread."""

    def __init__(
        self, model: Transformer, options: Any, tokenizer: Tokenizer, world: World, prompts: Sequence[Prompt]
    ):
        self.model, self.options, self.world = model, options, world
        self.stop_ids = tokenizer.stop_ids
        self.name = options.vllm_model_name or options.base_model
        self.servers = [Server(url, options.vllm_timeout) for url in options.vllm_server_base_url]
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
            )  # fmt: skip
        if self.method == "adapter" and not options.adapter:
            raise ConfigError("vllm_sync_method", "adapter", "needs adapter: lora; use file or nccl")
        if self.method == "nccl" and world.device.type != "cuda":
            raise ConfigError(
                "vllm_sync_method", "nccl", "needs GPUs; use file, with a directory that all hosts share"
            )
        self._transfers: list[Any] = []  # NCCL: one sender a server
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if world.main else None
        threads = THREADS_A_SERVER * len(self.servers)
        self._requests = ThreadPoolExecutor(threads, thread_name_prefix="vllm") if world.main else None
        self.longest = max((len(p.ids) for p in prompts), default=0)
        self._pending: Future | None = None
        self.gap_told = False
        self._wait_until_healthy()
        room = dist.from_main(self._meet, world)
        # Also where there are few, short prompts; beyond 128 tokens, which are a block of a prefix cache
        text = [token for p in prompts[:16] for token in p.ids] * 160
        self.probe = text[: 160 if room is None else max(1, min(160, room - PROBE_ANSWER))]
        # What the trainer gave the probe at the first sync and the last: where it moved, the server must too
        self._earlier: dict[str, torch.Tensor] = {}
        self._floor = math.inf  # smallest difference of a probe so far

    # -- before the first step -------------------------------------------------------------------------------

    def _meet(self) -> int | None:
        """Compare every server's model with the config's. The most tokens that all take."""
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
        """Every rank goes on with the same servers. A collective."""
        living = dist.from_main(self._living, self.world, long=True)
        self.servers = [server for server in self.servers if server.url in living]

    def _living(self) -> list[str]:
        """The servers that answer, once all do, or those that do after vllm_timeout where that is allowed."""
        deadline, pause = time.monotonic() + self.options.vllm_timeout, 0.5
        told = False
        while lost := [server.url for server in self.servers if not server.healthy()]:
            if time.monotonic() > deadline:
                living = [server for server in self.servers if server.url not in lost]
                if living and self.options.vllm_allow_missing_servers:
                    log.warning("%s: no answer for %g s (vllm_timeout); the run goes on with %s",
                                ", ".join(lost), self.options.vllm_timeout,
                                ", ".join(server.url for server in living))  # fmt: skip
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
    ) -> list[list[Completion]]:  # fmt: skip
        """As EmbeddedEngine.generate. A server that was lost is waited for, gets the weights again, and the
        batch is asked for again. A collective."""
        job = (prompts, n, seed, temperature, limits, on_group)
        return self._until_done(lambda: self._attempt(*job), job)

    def prefetch(
        self, prompts: list[list[int]], n: int, *, seed: tuple[int, ...], limits: list[int] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> None:  # fmt: skip
        """Start sampling on a thread of rank 0; `collect` has the result."""
        self._job = (prompts, n, seed, None, limits, on_group)
        if self._thread is not None:
            self._pending = self._thread.submit(self._attempt, *self._job)

    def collect(self, step: int) -> list[list[Completion]]:
        """What `prefetch` began; `step` are the optimiser steps done by now. A collective."""
        self.now = step
        job, pending = self._job, self._pending
        self._pending = None
        return self._until_done(lambda: pending.result() if pending else ("ok", None), job)

    def _until_done(self, first: Callable[[], tuple[str, Any]], job: tuple) -> list[list[Completion]]:
        attempt = first
        losses = 0
        while True:
            state, result = dist.from_main(attempt, self.world, long=True)
            if state == "ok":
                return result
            losses += 1
            log.warning("%s", result)
            if losses > 5:
                raise EngineError(f"{result}; five attempts in a row failed; see the server's log")
            self._wait_until_healthy()
            self._send_until_it_works(self.now)

            def attempt() -> tuple[str, Any]:
                return self._attempt(*job)

    def _attempt(self, prompts, n, seed, temperature, limits, on_group) -> tuple[str, Any]:
        """("ok", groups), or ("stale", reason) where a server was lost, or has other weights than were sent;
        EngineError where trying again is no use."""
        limits = limits or [self.options.max_completion_length] * len(prompts)
        temperature = self.options.temperature if temperature is None else temperature
        groups: list[list[Completion]] = [[] for _ in prompts]
        different = n if temperature > 0 else 1  # greedy completions are one, and vLLM refuses several
        over = threading.Event()  # this attempt: what still arrives belongs to nobody

        def one(i: int) -> None:
            server = self.servers[i % len(self.servers)]
            drawn = random.Random(repr((seed, i))).getrandbits(31)
            body = self._body(prompts[i], different, limits[i], temperature, drawn)
            if over.is_set():
                return
            answer = server.ask("POST", "/v1/completions", body)
            made = read_completions(
                answer, different, limits[i], server.url, prompts[i], self.model.arch.vocab_size
            )
            groups[i] = made * (n // different)
            if on_group is not None and not over.is_set():
                on_group(i, groups[i])

        asked: list[Future] = []
        try:
            self._check_versions()
            assert self._requests is not None
            asked = [self._requests.submit(one, i) for i in range(len(prompts))]
            for done in concurrent.futures.as_completed(asked):
                done.result()
            self._check_versions()  # a server that was restarted in between sampled from other weights
        except (StaleServer, ServerLost) as problem:
            return "stale", str(problem)  # a lost server may come back with other weights: send them again
        finally:
            over.set()
            self._end(asked)
        return "ok", groups

    def _end(self, asked: list[Future]) -> None:
        """No request outlives its attempt: it would hold blocks of old weights, and report to the next."""
        if running := [one for one in asked if not one.done() and not one.cancel()]:
            for server in self.servers:
                with contextlib.suppress(ServerLost, EngineError):
                    server.abort()
            concurrent.futures.wait(running)

    def _body(
        self, prompt: list[int], n: int, limit: int, temperature: float, seed: int | None
    ) -> dict[str, Any]:
        """A request that leaves nothing to the server's defaults. The salt keeps keys and values that other
        weights made out of it."""
        return {
            "model": self.adapter or self.name, "prompt": prompt, "n": n, "max_tokens": limit,
            "temperature": temperature, **NEUTRAL, "logprobs": 0, "return_token_ids": True,
            "stop_token_ids": self.stop_ids, "skip_special_tokens": False, "seed": seed,
            "cache_salt": self._version_name(),
        }  # fmt: skip

    def _check_versions(self) -> None:
        for server in self.servers:
            found = server.version()
            if found != self._version_name():
                raise StaleServer(
                    f"{server.url}: has weights {found!r}, this run sent {self._version_name()!r}: "
                    "restarted, or used by another run; sending them again"
                )

    def _version_name(self) -> str:
        return f"ballast-{self.run_id}-{self.sent}"

    def version(self, step: int) -> int:
        return self.sent if self.sent is not None else 0

    # -- weights ---------------------------------------------------------------------------------------------

    def sync(self, step: int, due: bool = False) -> dict[str, float]:
        """Send the weights of `step` if the interval asks for it (or `due`), and prove it. A collective."""
        self.now = step
        if self.sent == step:
            return {}
        if self.sent is not None and not due and step - self.sent < self.options.vllm_sync_interval:
            return {}
        return self._send_until_it_works(step)

    def _send_until_it_works(self, step: int) -> dict[str, float]:
        last = ""
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
        count = getattr(self, f"_send_{self.method}")(step)

        def settle() -> None:
            for server in self.servers:
                for _ in range(20):
                    if server.reset_prefix_cache():
                        break
                    server.abort()
                    time.sleep(0.1)
                else:
                    log.warning("%s: requests of others hold its prefix cache, which could not be emptied; "
                                "this run does not read what they left", server.url)  # fmt: skip
                server.set_version(self._version_name())

        self._on_main(settle)
        took = seconds()
        gap = self._compare_probe(step)
        metrics = {
            "sync/seconds": took,
            "sync/gigabytes_per_second": count / took / 1e9,
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
        name = self.options.vllm_dtype
        return getattr(torch, ("bfloat16" if self.options.bf16 else "float32") if name == "auto" else name)

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
                for server in self.servers:
                    for worker in self._load_file(server, folder):
                        compare_received(sent, worker, server.url, step)
                return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

            return self._on_main(load)
        finally:
            if self.world.main:
                shutil.rmtree(folder, ignore_errors=True)

    def _load_file(self, server: Server, folder: Path) -> list:
        return server.remote_call("ballast_load_weights", str(folder))

    def _send_adapter(self, step: int) -> int:
        """The adapter under a new name (a cached prefix of the old one can then never be taken for its own),
        and the old one dropped."""
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
        """GPU to GPU through vLLM's own sender: rank 0 joins a group with each server's workers and
        broadcasts while the HTTP call that makes them receive is on its way."""
        transfer = "vllm.distributed.weight_transfer."  # installed on GPU machines only
        base = importlib.import_module(transfer + "base")
        clients = importlib.import_module(transfer + "clients")
        nccl = importlib.import_module(transfer + "nccl_engine")
        engine, dtype = self, self._server_dtype()

        class Source(base.WeightSource):
            """Every rank iterates it (a gather is a collective); only rank 0's tensors travel."""

            def metadata(self) -> list:
                return [base.ParamMeta(name, dtype, tuple(shape)) for name, shape in engine._shapes]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                merge = engine.options.adapter is not None
                for name, tensor in iterate_weights(engine.model, dtype=dtype, merge=merge):
                    yield name, tensor.to(engine.world.device)

        if not self._transfers:
            merge = self.options.adapter is not None
            self._shapes = [(n, t.shape) for n, t in iterate_weights(self.model, dtype=dtype, merge=merge)]
            address = os.environ.get("MASTER_ADDR", "127.0.0.1")
            for server in self.servers:
                workers = self._on_main(lambda s=server: int(s.ask("GET", "/get_world_size")["world_size"]))
                port = self._on_main(_free_port)
                info = nccl.NCCLTrainerInitInfo(
                    rank=self.world.rank, master_address=address, master_port=port, world_size=1 + workers
                )
                client = clients.HTTPVLLMWeightSyncClient(server.url, timeout=self.options.vllm_timeout)
                self._transfers.append(
                    nccl.NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=Source())
                )
        for sender in self._transfers:
            sender.send_weights()
        return sum(math.prod(shape) for _, shape in self._shapes) * dtype.itemsize

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
        both_exact = self._server_dtype() == torch.float32 and not self.options.bf16
        allowed = self.options.vllm_probe_tolerance
        allowed = (1e-3 if both_exact else 0.1) if allowed is None else allowed

        def judge() -> float:  # on one rank: at the edge of a bound two might not agree
            pairs = zip(scored, sampled, strict=True)
            worst = max(self._judge(server, ours, own, allowed, step) for server, own in pairs)
            self._floor = min(self._floor, worst)
            self._earlier = {"first": self._earlier.get("first", ours), "last": ours}
            return worst

        worst = dist.from_main(judge, self.world)
        if not self.gap_told:
            self.gap_told = True
            what = "both in fp32" if both_exact else "of precision: a constant offset of the sampling ratios"
            log.info("probe: server and trainer differ by %.2g in log-prob, %s", worst, what)
        return worst

    def _judge(
        self, server: tuple, ours: torch.Tensor, own: torch.Tensor, allowed: float, step: int
    ) -> float:
        """Mean |difference| of one server's probe (as `_ask_probe` has it) from the trainer's log-probs
        `ours`. EngineError where it is too large, or that from `own`, of the tokens that it sampled."""
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
                    f"own moved by {moved:.2g} since the {since}: the server has not all of the weights; "
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
        ).logprobs.float().cpu()  # fmt: skip

    def _ask_probe(self) -> list[tuple[str, list[float], list[int], list[float]]]:
        """By server: its address, log-probs of the probe, and tokens that it sampled after the probe with the
        run's own settings, with their log-probs. It samples twice, so that the probe comes from its prefix
        cache."""
        made = []
        for server in self.servers:
            scored = self._score(server)
            body = self._body(self.probe, 1, PROBE_ANSWER, self.options.temperature, 1)
            for _ in range(2):
                answer = server.ask("POST", "/v1/completions", body)
            (drawn,) = read_completions(
                answer, 1, PROBE_ANSWER, server.url, self.probe, self.model.arch.vocab_size
            )
            known = [x if x is not None else math.nan for x in drawn.logprobs]
            made.append((server.url, scored, drawn.ids, known))
        return made

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
                f"{server.url}: scored the probe in a form that is not understood: {error!r}"
            ) from None


def sync_method(options: Any) -> str:
    """What vllm_sync_method: auto means: what is written to memory of this host can be read here only."""
    if options.vllm_sync_method != "auto":
        return options.vllm_sync_method
    hosts = {urlparse(url).hostname for url in options.vllm_server_base_url}
    if hosts <= {"127.0.0.1", "localhost", "::1"} or options.vllm_sync_directory != MEMORY:
        return "adapter" if options.adapter else "file"
    return "nccl"


def compare_received(sent: dict[str, list[int]], worker: Any, url: str, step: int) -> None:
    """EngineError where a worker of the server has not received what was sent, tensor by tensor, or has
    parameters that no tensor went to. `worker` is what ballast_load_weights answered."""
    where = f"{url}: in the sync of step {step}"
    try:
        received, missing = worker["received"], worker["missing"]
    except (TypeError, KeyError):
        raise EngineError(f"{where} its worker answered in a form that is not understood; start it with "
                          "`python grpo.py serve` of this version") from None  # fmt: skip
    wrong = sorted(name for name in sent.keys() | received.keys() if sent.get(name) != received.get(name))
    if wrong:
        raise EngineError(
            f"{where} {len(wrong)} of {len(sent)} tensors did not arrive as they were sent, the first is "
            f"{wrong[0]}; is vllm_sync_directory a file system that both see at once?"
        )
    if missing:
        raise EngineError(
            f"{where} {len(missing)} of its parameters got no weights, the first is {missing[0]}"
        )


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def read_completions(
    answer: Any, n: int, limit: int, url: str, prompt: list[int] | None = None, vocab_size: int | None = None
) -> list[Completion]:
    """The completions in a server's answer. EngineError where it is not what was asked for: never trained
    on."""
    beyond = math.inf if vocab_size is None else vocab_size
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        found = []
        for choice in choices:
            ids, reason = choice["token_ids"], choice["finish_reason"]
            logprobs = choice["logprobs"]["token_logprobs"]
            if reason not in ("stop", "length"):
                raise ServerLost(f"{url}: ended a completion with {reason!r}")
            if not ids or not all(type(i) is int and 0 <= i < beyond for i in ids) or len(ids) > limit:
                raise EngineError(
                    f"{url}: a completion of {len(ids)} token ids, asked for 1 to {limit} below {beyond}"
                )
            if len(logprobs) != len(ids):
                raise EngineError(f"{url}: {len(ids)} tokens with {len(logprobs)} log-probs")
            if prompt is not None and choice.get("prompt_token_ids") not in (None, prompt):
                raise EngineError(f"{url}: answered another prompt than it was asked")
            usable = [x if x is not None and math.isfinite(x) and x > -9999.0 else None for x in logprobs]
            found.append(Completion(ids, usable, reason))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{url}: an answer that is not understood ({error!r}); is it vLLM 0.32?") from None
    if len(found) != n:
        raise EngineError(f"{url}: {len(found)} completions, asked for {n}")
    known = [x is not None for completion in found for x in completion.logprobs]
    if len(known) >= 8 and not any(known):  # one is vLLM's own way of saying −∞; all of them are a fault
        raise EngineError(
            f"{url}: {len(known)} tokens and not one usable log-prob; start it with `python grpo.py serve`"
        )
    return found


def server_command(options: Any, model: str, url: str) -> tuple[dict[str, str], list[str]]:
    """Environment and command line of the vLLM server that this config needs, on CPU or GPU."""
    where = urlparse(url)
    gpu = torch.cuda.is_available()
    dtype = options.vllm_dtype
    dtype = ("bfloat16" if options.bf16 else "float32") if dtype == "auto" else dtype
    # The worker extension alone goes on the server's path: our module names (kernels, data) are others' too.
    folder = Path(options.output_dir).resolve() / "server"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).resolve().parent / "vllm_worker.py", folder / "vllm_worker.py")
    environment = {
        "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(folder),
    }  # fmt: skip
    command = [
        options.vllm_python or sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", model, "--served-model-name", options.vllm_model_name or options.base_model,
        "--host", where.hostname or "127.0.0.1", "--port", str(where.port or 8000), "--dtype", dtype,
        "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--seed", str(options.seed),
        "--worker-extension-cls", "vllm_worker.WeightReceiver",
    ]  # fmt: skip
    longest = options.vllm_max_model_len
    if longest is None and options.max_prompt_length:
        longest = options.max_prompt_length + options.max_completion_length
    if longest is not None:
        command += ["--max-model-len", str(longest)]
    method = sync_method(options)
    if method == "adapter":
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        most = max(options.lora_r, len(options.tokens) + len(options.special_tokens) + 2)  # a rank a new row
        most = most if options.tokens or options.special_tokens else options.lora_r
        rank = next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= most), most)
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2"]
    if gpu:
        command += ["--gpu-memory-utilization", str(options.vllm_gpu_memory_utilization)]
        command += ["--tensor-parallel-size", str(options.vllm_tensor_parallel_size)]
        if method == "nccl":
            command += ["--weight-transfer-config", '{"backend": "nccl"}']
    else:
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        # A request with a seed whose prompt is read in two parts ends vLLM's engine on CPUs.
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
    return environment, command
