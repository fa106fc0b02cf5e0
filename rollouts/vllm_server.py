"""One vLLM server over HTTP: its requests, the validation of its answers, and the command that starts it."""

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import msgspec
import numpy as np
import torch

from rollouts.tokens import as_ids, as_logprobs
from run.config import BallastError, ConfigError, resolve_checkpoint


class EngineError(BallastError):
    """A rollout engine that cannot continue: the line names the server, the step and the remedy."""


@dataclass(eq=False)
class Completion:
    """A completion that was sampled for a prompt. Lists are taken too."""

    ids: np.ndarray  # int32
    logprobs: np.ndarray  # fp32, under the distribution that each token was drawn from; NaN: unknown
    finish_reason: str  # stop or length; abort: a part of one
    versions: np.ndarray | None = None  # int32, of the weights that drew each token; None: the same for all

    def __post_init__(self):
        self.ids, self.logprobs = as_ids(self.ids), as_logprobs(self.logprobs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Completion) and self.finish_reason == other.finish_reason and (
            np.array_equal(self.ids, other.ids)
            and np.array_equal(self.logprobs, other.logprobs, equal_nan=True)
        )


class _LogProbs(msgspec.Struct):
    token_logprobs: list[float | None]


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int]
    logprobs: _LogProbs | None
    finish_reason: str | None = None
    prompt_token_ids: list[int] | None = None


class _Answer(msgspec.Struct):
    """What is read of the answer of /v1/completions; msgspec skips the rest, which is most of it."""

    choices: list[_Choice]


_DECODER = msgspec.json.Decoder(_Answer)


# ------------------------------------------------------------------------------------------------------------
# vLLM servers
# ------------------------------------------------------------------------------------------------------------


# Everything that a request leaves out, a server may fill from the checkpoint's generation_config.json.
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
           "frequency_penalty": 0.0}
THREADS_PER_SERVER = 64
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"  # noqa: S108 - names in it are random
PROBE_ANSWER = 16  # tokens that the probe lets a server sample


class ServerLost(Exception):
    """A server that does not answer, or answers 5xx: it may come back."""


class StaleServer(Exception):
    """A server whose weights are not the ones that were sent last: it was restarted or is shared."""


class Server:
    """One vLLM server over HTTP. Weights go through the routes of development mode."""

    def __init__(self, url: str, timeout: float):
        self.url = url.rstrip("/")
        # A generation may take long; connecting may not.
        self.client = httpx.Client(
            base_url=self.url, timeout=httpx.Timeout(timeout, connect=10.0),
            limits=httpx.Limits(max_connections=None),
        )

    def ask(self, method: str, path: str, json: Any = None, raw: bool = False, **kwargs) -> Any:
        """The decoded answer, or its bytes. ServerLost: no answer or 5xx. EngineError: 4xx, with the server's
        own words."""
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
        if raw:
            return response.content
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
        """Abort all requests in flight: their blocks would keep the prefix cache from being emptied."""
        self.ask("POST", "/abort_requests", {})

    def reset_prefix_cache(self) -> bool:
        """Whether the cache is empty now: a server answers 200 even if requests hold blocks."""
        answer = self.ask("POST", "/reset_prefix_cache")
        return not (isinstance(answer, dict) and answer.get("success") is False)

    def version(self) -> str:
        answer = self.ask("GET", "/weight_info")
        return str(answer.get("weight_version")) if isinstance(answer, dict) else "unknown"

    def set_version(self, version: str) -> None:
        self.ask("POST", "/update_weight_version", {"new_version": version})

    def sleep(self, level: int) -> None:
        """Leave the GPU: level 1 keeps the weights in the host's memory, level 2 nothing."""
        self.ask("POST", "/sleep", params={"level": level})

    def wake(self, what: str) -> None:
        """Take memory on the GPU again, for `weights` or `kv_cache`."""
        self.ask("POST", "/wake_up", params={"tags": what})

    def remote_call(self, method: str, *arguments: str) -> list:
        answer = self.ask("POST", "/collective_rpc", {"method": method, "args": list(arguments)})
        return answer.get("results", []) if isinstance(answer, dict) else []


def sync_method(options: Any) -> str:
    """The method that vllm_sync_method: auto selects. Files in this host's memory are local to it."""
    if options.vllm_sync_method != "auto":
        return options.vllm_sync_method
    if options.vllm_mode == "colocate":
        return "adapter" if options.adapter else "file"
    hosts = {urlparse(url).hostname for url in options.vllm_server_base_url}
    if hosts <= {"127.0.0.1", "localhost", "::1"} or options.vllm_sync_directory != MEMORY:
        return "adapter" if options.adapter else "file"
    return "nccl"


def compare_received(sent: dict[str, list[int]], worker: Any, url: str, step: int) -> None:
    """Raise EngineError if a worker of the server did not receive every tensor as it was sent, or has
    parameters that got no tensor. `worker` is the answer of ballast_load_weights."""
    where = f"{url}: in the sync of step {step}"
    try:
        received, missing = worker["received"], worker["missing"]
    except (TypeError, KeyError):
        raise EngineError(f"{where} its worker answered in an unknown format; start it with "
                          "`python grpo.py serve` of this version") from None
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


def read_completions(
    answer: bytes, n: int, limit: int, url: str, prompt: Sequence[int] | None = None,
    vocab_size: int | None = None, *, parts: bool = False,
) -> list[Completion]:
    """The completions in a server's JSON answer, with `parts` also what there is of those that were aborted.
    Raises EngineError if it does not match the request."""
    beyond = 2**31 if vocab_size is None else vocab_size
    try:
        choices = sorted(_DECODER.decode(answer).choices, key=lambda choice: choice.index)
    except msgspec.DecodeError as error:
        raise EngineError(f"{url}: an answer that is not understood ({error}); is it vLLM 0.32?") from None
    completions = []
    for choice in choices:
        logprobs = as_logprobs(choice.logprobs.token_logprobs if choice.logprobs else [])
        ids = np.array(choice.token_ids or [-1])
        if parts and choice.finish_reason == "abort" and not choice.token_ids and not len(logprobs):
            completions.append(Completion(as_ids([]), logprobs, "abort"))
            continue
        if choice.finish_reason not in ("stop", "length", *(("abort",) if parts else ())):
            raise ServerLost(f"{url}: ended a completion with {choice.finish_reason!r}")
        if choice.logprobs is None:
            raise EngineError(f"{url}: an answer that is not understood (no logprobs); is it vLLM 0.32?")
        if ids.dtype != np.int64 or ids.min() < 0 or ids.max() >= beyond or len(ids) > limit:
            raise EngineError(
                f"{url}: a completion of {len(choice.token_ids)} token ids, asked for 1 to {limit} below "
                f"{beyond}"
            )
        if len(logprobs) != len(ids):
            raise EngineError(f"{url}: {len(ids)} tokens with {len(logprobs)} log-probs")
        if prompt is not None and choice.prompt_token_ids not in (None, prompt):
            raise EngineError(f"{url}: answered a prompt other than the requested one")
        usable = np.isfinite(logprobs) & (logprobs > -9999.0)
        completions.append(Completion(ids, np.where(usable, logprobs, np.nan), choice.finish_reason))
    if len(completions) != n:
        raise EngineError(f"{url}: {len(completions)} completions, asked for {n}")
    count = sum(len(completion.ids) for completion in completions)
    # One may be vLLM's encoding of −∞; all of them are a fault
    if count >= 8 and all(np.isnan(completion.logprobs).all() for completion in completions):
        raise EngineError(
            f"{url}: {count} tokens and not one usable log-prob; start it with `python grpo.py serve`"
        )
    return completions


def server_dtype(options: Any) -> str:
    """The data type that the server computes in; auto: the trainer's."""
    if options.vllm_dtype != "auto":
        return options.vllm_dtype
    return "bfloat16" if options.bf16 else "float32"


def server_command(options: Any, model: str, url: str) -> tuple[dict[str, str], list[str]]:
    """Environment and command line of the vLLM server that this config needs, on CPU or GPU."""
    where = urlparse(url)
    gpu = torch.cuda.is_available()
    dtype = server_dtype(options)
    # Only the worker extension goes on the server's path: module names such as kernels and data could clash.
    folder = Path(options.output_dir).resolve() / "server"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).resolve().parent / "vllm_worker.py", folder / "vllm_worker.py")
    environment = {
        "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(folder),
    }
    command = [
        options.vllm_python or sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", model, "--served-model-name", options.vllm_model_name or options.base_model,
        "--host", where.hostname or "127.0.0.1", "--port", str(where.port or 8000), "--dtype", dtype,
        "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--seed", str(options.seed),
        "--worker-extension-cls", "vllm_worker.WeightReceiver",
    ]
    longest = options.vllm_max_model_len
    if longest is None and options.max_prompt_length:
        longest = options.max_prompt_length + options.max_completion_length
    if longest is not None:
        command += ["--max-model-len", str(longest)]
    method = sync_method(options)
    if method == "adapter":
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        most = max(options.lora_r, len(options.tokens) + len(options.special_tokens) + 2)  # 1 per new row
        most = most if options.tokens or options.special_tokens else options.lora_r
        rank = next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= most), most)
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2"]
    if gpu:
        if options.vllm_mode == "colocate":
            command += ["--enable-sleep-mode"]  # vLLM's CPU build has the routes and ignores them
        command += ["--gpu-memory-utilization", str(options.vllm_gpu_memory_utilization)]
        command += ["--tensor-parallel-size", str(options.vllm_tensor_parallel_size)]
        if method == "nccl":
            command += ["--weight-transfer-config", '{"backend": "nccl"}']
    else:
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        # On CPUs, a request with a seed whose prompt is prefilled in two chunks crashes vLLM's engine.
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
    return environment, command


def served_checkpoint(config: Any) -> Path:
    """The directory that a server reads. Raises ConfigError where there is none."""
    try:
        directory = Path(config.config_directory)
        return resolve_checkpoint(config.base_model, config.base_model_revision, directory).resolve()
    except BallastError as error:
        raise ConfigError("base_model", config.base_model, f"cannot be served: {error}") from None


def serve(config: Any) -> None:
    """Replace this process by the vLLM server that a config needs."""
    model = served_checkpoint(config)
    for url in config.vllm_server_base_url[1:]:
        again = ["python", "grpo.py", *sys.argv[1:], f"vllm_server_base_url=[{url}]"]
        print(f"# in another terminal:\n{shlex.join(again)}")
    environment, command = server_command(config, str(model), config.vllm_server_base_url[0])
    host = urlparse(config.vllm_server_base_url[0]).hostname
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"warning: {host} can be reached from other machines, and the routes that replace weights and "
            "run methods in the server have no password: whoever reaches this port owns the process; open "
            "it to the trainer's host alone (a firewall, a private network, an SSH tunnel)",
            file=sys.stderr, flush=True,
        )
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    print(" ".join([*settings, shlex.join(command)]), flush=True)
    if config.vllm_python is None and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vllm_python", None, f"is unset, and {sys.executable} has no vLLM: `pip install 'vllm==0.32.*'` "
            "into it or into a venv of its own, and set vllm_python to that one's Python",
        )
    try:
        os.execvpe(command[0], command, {**os.environ, **environment})  # noqa: S606
    except OSError as error:
        raise ConfigError("vllm_python", command[0], f"cannot be started ({error.strerror})") from None
