"""The protocol of a vLLM server as VllmEngine speaks it, answered by our own model in this process, with
faults to order."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from vllm_worker import checksum, read_tensors
from weights import load_pretrained


class FakeVllm:
    """`faults` may hold: ignores_weights, raw_logprobs, cache_is_held (a number of times), fails_once (a
    prompt), and of tensors, by name, loses, corrupts and leaves_out."""

    def __init__(self, checkpoint: Path, name: str, max_model_len: int = 512, **faults: Any):
        self.model = load_pretrained(str(checkpoint), dtype=torch.float32).eval()
        self.name, self.max_model_len, self.faults = name, max_model_len, faults
        self.version = "none"
        self.bodies: list[dict] = []
        self.asked: list[str] = []
        self.aborted = threading.Event()
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

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: dict) -> tuple[int, Any]:
        self.asked.append(path)
        match path:
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
                return 200, {"status": "aborted"}
            case "/collective_rpc":
                if not self.faults.get("ignores_weights"):
                    self.model = load_pretrained(body["args"][0], dtype=torch.float32).eval()
                received = {name: checksum(tensor) for name, tensor in read_tensors(body["args"][0])}
                for name in self.faults.get("loses", ()):
                    del received[name]
                for name in self.faults.get("corrupts", ()):
                    received[name][0] += 1
                missing = self.faults.get("leaves_out", [])
                return 200, {"results": [{"received": received, "missing": missing}]}
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

    def complete(self, body: dict) -> tuple[int, Any]:
        if body["temperature"] == 0 and body["n"] > 1:
            return 400, {"error": "n must be 1 when using greedy sampling"}
        if "fails_once" in self.faults and len(body["prompt"]) < 100:  # not the probe
            if body["prompt"] == self.faults["fails_once"]:
                del self.faults["fails_once"]
                return 500, {"error": "once"}
            self.aborted.wait(2.0)  # the siblings take their time
        generator = torch.Generator().manual_seed(body["seed"] or 0)
        choices = []
        for index in range(body["n"]):
            ids, logprobs = list(body["prompt"]), []
            for _ in range(body["max_tokens"]):
                logits = self.logits(ids)[-1]
                tempered = (logits / body["temperature"] if body["temperature"] else logits).log_softmax(-1)
                token = (
                    int(torch.multinomial(tempered.exp(), 1, generator=generator))
                    if body["temperature"] else int(tempered.argmax())
                )  # fmt: skip
                reported = logits.log_softmax(-1) if self.faults.get("raw_logprobs") else tempered
                ids.append(token)
                logprobs.append(reported[token].item())
            prompt = self.logits(body["prompt"]).log_softmax(-1)
            scored = [None] + [
                {str(token): {"logprob": prompt[at, token].item()}}
                for at, token in enumerate(body["prompt"][1:])
            ]
            choices.append({
                "index": index, "token_ids": ids[len(body["prompt"]) :], "finish_reason": "length",
                "logprobs": {"token_logprobs": logprobs}, "prompt_token_ids": body["prompt"],
                "prompt_logprobs": scored if "prompt_logprobs" in body else None,
            })  # fmt: skip
        time.sleep(0)
        return 200, {"choices": choices}

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        hidden, _ = self.model.hidden_states(torch.tensor([ids]))
        return self.model.logits(hidden[0]).float()
