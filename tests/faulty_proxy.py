"""Stands between a client and a real vLLM server, and spoils what it is told to."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx


def _choices(change: Callable[[dict], Any]) -> Callable[[Any], Any]:
    def spoil(answer: dict) -> dict:
        for choice in answer["choices"]:
            change(choice)
        return answer

    return spoil


def _logprobs(choice: dict) -> list:
    return choice["logprobs"]["token_logprobs"]


# What may be done to a decoded answer.
SPOIL: dict[str, Callable[[Any], Any]] = {
    "too_few": lambda a: {**a, "choices": a["choices"][1:]},
    "too_many": lambda a: {**a, "choices": [*a["choices"], a["choices"][0]]},
    "no_logprobs": _choices(lambda c: c.update(logprobs=None)),
    "nan_logprobs": _choices(
        lambda c: c["logprobs"].update(token_logprobs=[float("nan")] * len(_logprobs(c)))
    ),
    "fewer_logprobs": _choices(lambda c: _logprobs(c).pop()),
    "other_prompt": _choices(lambda c: c.update(prompt_token_ids=[1, 2, 3])),
    "foreign_ids": _choices(lambda c: c["token_ids"].__setitem__(0, 10**6)),
    "too_long": _choices(lambda c: c.update(token_ids=c["token_ids"] * 99)),
    "aborted": _choices(lambda c: c.update(finish_reason="abort")),
    "a_list": lambda a: [a],
    "null": lambda a: None,
}


class FaultyProxy:
    """`fail(path, fault, times)`: the next answers of this path are spoilt; `failed` counts them."""

    def __init__(self, target: str):
        self.target, self.client = target, httpx.Client(timeout=60)
        self.path, self.fault, self.times, self.failed = "", "", 0, 0
        self.seen: list[str] = []
        self.lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                proxy.answer(self)

            def do_POST(self) -> None:
                proxy.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fail(self, path: str, fault: str, times: int) -> None:
        with self.lock:
            self.path, self.fault, self.times, self.failed = path, fault, times, 0

    def close(self) -> None:
        self.server.shutdown()
        self.client.close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        with self.lock:
            self.seen.append(handler.path)
            fault = self.fault if handler.path == self.path and self.failed < self.times else ""
            self.failed += bool(fault)
        if fault == "refuse":
            handler.close_connection = True
            handler.connection.close()
            return
        if fault == "slow":
            time.sleep(6)  # longer than the client's patience
        given = self.client.request(
            handler.command, self.target + handler.path, content=body,
            headers={"content-type": handler.headers.get("content-type", "application/json")},
        )
        status, raw = given.status_code, given.content
        if fault in ("500", "400"):
            status, raw = int(fault), b"spoilt on purpose"
        elif fault == "not_json":
            raw = raw[: len(raw) // 2]
        elif fault in SPOIL:
            raw = json.dumps(SPOIL[fault](json.loads(raw))).encode()
        handler.send_response(status)
        handler.send_header("content-type", given.headers.get("content-type", "application/json"))
        handler.send_header("content-length", str(len(raw)))
        handler.end_headers()
        if fault == "drop":
            raw = raw[: len(raw) // 2]
            handler.close_connection = True
        with contextlib.suppress(OSError):  # the client may be gone
            handler.wfile.write(raw)
        if fault == "drop":
            handler.wfile.flush()
            handler.connection.close()
