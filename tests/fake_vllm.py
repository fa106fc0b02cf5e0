"""The protocol of a vLLM server as VllmEngine and NcclTransfer speak it, answered by our own model in this
process, with faults to order."""

import json
import math
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from gloo_group import GlooGroup
from safetensors.torch import save_file

from checkpoints.weights import load_pretrained
from rollouts.vllm_worker import checksum, group_of, read_tensors


class FakeVllm:
    """`faults` may hold: ignores_weights, raw_logprobs, raw_below (of prompts shorter than this),
    cache_is_held (a number of times), fails_once (a prompt), and of tensors, by name, loses, corrupts and
    leaves_out; `fails`: by route, how many requests are answered 500, and after how many that are not;
    never_joins; dead: every answer is 503; token_seconds: what a token takes. `workers` share the server."""

    def __init__(
        self, checkpoint: Path, name: str, max_model_len: int = 512, workers: int = 1, **faults: Any
    ):
        self.checkpoint, self.workers = checkpoint, workers
        self.groups: list[GlooGroup] | None = None
        self.restart()
        self.name, self.max_model_len, self.faults = name, max_model_len, faults
        self.bodies: list[dict] = []
        self.asked: list[str] = []
        self.aborted = threading.Event()
        self.aborts = 0
        self.running = 0
        self.overlap = False  # whether an attempt began while requests of another ran
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def reply(self, status: int, answer: Any) -> None:
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                self.reply(*fake.answer(self.path, {}))

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self.reply(*fake.answer(self.path, json.loads(self.rfile.read(length) or b"{}")))

        class Listener(ThreadingHTTPServer):
            request_queue_size = 128  # many connect at once

        self.server = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def restart(self) -> None:
        """As a process that was started again: the checkpoint's weights, no group, no version."""
        self.model = load_pretrained(str(self.checkpoint), dtype=torch.float32).eval()
        self.version, self.groups, self.updating, self.received = "none", None, False, []

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: dict) -> tuple[int, Any]:
        self.asked.append(path)
        if self.faults.get("dead"):
            return 503, {"error": "dead"}
        failures = self.faults.get("fails", {}).get(path, [0, 0])
        if failures[0] > 0 and failures[1] == 0:
            failures[0] -= 1
            return 500, {"error": f"{path} fails"}
        failures[1] = max(0, failures[1] - 1)
        match path:
            case "/get_world_size":
                return 200, {"world_size": self.workers}
            case "/init_weight_transfer_engine":
                if self.faults.get("never_joins"):
                    time.sleep(5)
                    return 500, {"error": "nobody came"}
                self.groups = self.on_workers(self.join, body["init_info"])
                return 200, {"message": "initialized"}
            case "/shutdown_weight_transfer_engine":
                self.groups = None
                return 200, {"message": "shut down"}
            case "/start_weight_update":
                if self.updating or self.groups is None:
                    return 500, {"error": "an update is active, or nobody has joined"}
                self.updating = True
                return 200, {"message": "started"}
            case "/update_weights":
                try:
                    self.received = self.on_workers(self.receive, body["update_info"])
                except Exception as error:
                    self.updating = False
                    return 500, {"error": f"{error!r}"}
                return 200, {"message": "updated"}
            case "/finish_weight_update":
                if not self.updating:
                    return 500, {"error": "finish without a start"}
                self.updating = False
                if self.received:
                    self.take(self.received)
                return 200, {"message": "finished"}
            case "/sleep?level=1":
                return 200, {"status": "sleeping"}
            case "/sleep?level=2":
                with torch.no_grad():
                    for p in self.model.parameters():
                        p.zero_()
                return 200, {"status": "sleeping"}
            case "/wake_up?tags=weights" | "/wake_up?tags=kv_cache":
                return 200, {"status": "awake"}
            case "/health":
                return 200, {}
            case "/v1/models":
                return 200, {"data": [{"id": self.name, "max_model_len": self.max_model_len}]}
            case "/weight_info":
                with self.lock:
                    self.overlap |= self.running > 0
                return 200, {"weight_version": self.version}
            case "/update_weight_version":
                self.version = body["new_version"]
                return 200, {"success": True}
            case "/reset_prefix_cache":
                held = self.faults.get("cache_is_held", 0)
                self.faults["cache_is_held"] = max(0, held - 1)
                return 200, {"success": held == 0}
            case "/abort_requests":
                self.aborted.set()
                self.aborts += 1
                return 200, {"status": "aborted"}
            case "/collective_rpc":
                if not self.faults.get("ignores_weights"):
                    self.model = load_pretrained(body["args"][0], dtype=torch.float32).eval()
                received = {name: checksum(tensor) for name, tensor in read_tensors(body["args"][0])}
                held: dict[str, int] = defaultdict(int)
                for name, parameter in self.model.named_parameters():
                    held[group_of(name)] += checksum(parameter.detach())[0]
                for name in self.faults.get("loses", ()):
                    del received[name]
                for name in self.faults.get("corrupts", ()):
                    received[name][0] += 1
                missing = self.faults.get("leaves_out", [])
                return 200, {"results": [{"received": received, "missing": missing, "held": held}]}
            case "/v1/completions":
                self.bodies.append(body)
                with self.lock:
                    self.running += 1
                try:
                    return self.complete(body)
                finally:
                    with self.lock:
                        self.running -= 1
        return 404, {"error": path}

    def on_workers(self, work: Any, body: dict) -> list:
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda worker: work(worker, body), range(self.workers)))

    def join(self, worker: int, info: dict) -> GlooGroup:
        assert info["world_size"] == 1 + self.workers and info["packed"]
        self.buffer_size = info["packed_buffer_size_bytes"]
        rank = info["rank_offset"] + worker
        return GlooGroup(info["master_address"], info["master_port"], rank, info["world_size"])

    def receive(self, worker: int, update: dict) -> dict[str, torch.Tensor]:
        """As vLLM 0.32 cuts what arrives (packed_tensor.py): tensors until one makes them more than the size
        of a buffer."""
        tensors, waiting, size = {}, [], 0
        assert self.groups is not None
        shapes = list(zip(update["names"], update["dtype_names"], update["shapes"], strict=True))
        for k, (name, dtype, shape) in enumerate(shapes):
            count = math.prod(shape) * getattr(torch, dtype).itemsize
            waiting.append((name, getattr(torch, dtype), shape, count))
            size += count
            if size > self.buffer_size or k + 1 == len(shapes):
                buffer = torch.empty(size, dtype=torch.uint8)
                self.groups[worker].broadcast(buffer, src=0)
                parts = buffer.split([count for *_, count in waiting])
                for (name, dtype, shape, _), part in zip(waiting, parts, strict=True):
                    tensors[name] = part.clone().view(dtype).view(shape)
                waiting, size = [], 0
        return tensors

    def take(self, received: list[dict[str, torch.Tensor]]) -> None:
        if self.faults.get("ignores_weights"):
            return
        first = received[0]
        for other in received[1:]:
            assert first.keys() == other.keys() and all(torch.equal(first[n], other[n]) for n in first)
        with tempfile.TemporaryDirectory() as folder:
            save_file(first, Path(folder) / "model.safetensors")
            shutil.copy(Path(self.checkpoint) / "config.json", folder)
            self.model = load_pretrained(folder, dtype=torch.float32).eval()

    def complete(self, body: dict) -> tuple[int, Any]:
        if body["temperature"] == 0 and body["n"] > 1:
            return 400, {"error": "n must be 1 when using greedy sampling"}
        if "fails_once" in self.faults and len(body["prompt"]) < 100:  # not the probe
            if body["prompt"] == self.faults["fails_once"]:
                del self.faults["fails_once"]
                return 500, {"error": "once"}
            self.aborted.wait(2.0)  # the siblings take their time
        generator = torch.Generator().manual_seed(body["seed"] or 0)
        choices, aborts = [], self.aborts
        for index in range(body["n"]):
            ids, logprobs = list(body["prompt"]), []
            for _ in range(body["max_tokens"]):
                if self.aborts > aborts and "fails_once" not in self.faults:
                    break
                time.sleep(self.faults.get("token_seconds", 0))
                logits = self.logits(ids)[-1]
                tempered = (logits / body["temperature"] if body["temperature"] else logits).log_softmax(-1)
                token = (
                    int(torch.multinomial(tempered.exp(), 1, generator=generator))
                    if body["temperature"] else int(tempered.argmax())
                )
                raw = self.faults.get("raw_logprobs") or len(body["prompt"]) < self.faults.get("raw_below", 0)
                reported = logits.log_softmax(-1) if raw else tempered
                ids.append(token)
                logprobs.append(reported[token].item())
                if token in body.get("stop_token_ids", ()):
                    break
            ended = len(logprobs) and ids[-1] in body.get("stop_token_ids", ())
            aborted = not ended and len(logprobs) < body["max_tokens"]
            prompt = self.logits(body["prompt"]).log_softmax(-1)
            scored = [None] + [
                {str(token): {"logprob": prompt[at, token].item()}}
                for at, token in enumerate(body["prompt"][1:])
            ]
            choices.append({
                "index": index, "token_ids": ids[len(body["prompt"]) :],
                "finish_reason": "abort" if aborted else "stop" if ended else "length",
                "logprobs": {"token_logprobs": logprobs} if logprobs else None,
                "prompt_token_ids": body["prompt"],
                "prompt_logprobs": scored if "prompt_logprobs" in body else None,
            })
        time.sleep(0)
        return 200, {"choices": choices}

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        hidden, _ = self.model.hidden_states(torch.tensor([ids]))
        return self.model.logits(hidden[0]).float()
