"""Processes, sharding, optimiser and schedule: what a training loop needs to run on many devices.

The same program runs on one process or many: `python sft.py` has a world size of 1. With more processes,
FSDP2 shards each block; no rank ever holds a whole full-precision model.
"""

import contextlib
import itertools
import math
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from model import Block, Transformer, full_tensor
from numerics import low_precision
from run.config import BallastError, ConfigError, check_at_least_one, check_ranges
from run.log import log

T = TypeVar("T")


@dataclass
class DistOptions:
    bf16: bool | None = None
    """Compute hidden states and products in bfloat16; unset: on GPUs that support it. Trained weights, their
    gradients and the optimiser stay in fp32; frozen weights are bf16."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""
    gradient_checkpointing_kwargs: dict = field(default_factory=dict)
    """{use_reentrant: false} is the default; true is the older implementation."""
    fsdp_reshard_after_forward: bool = True
    """Free a block's gathered weights between forward and backward: less memory, one more gather."""
    fsdp_cpu_offload: bool = False
    """Keep weights and optimiser state in host memory (CUDA only)."""
    hsdp_shard_size: int | None = None
    """Shard over groups of N processes and replicate across groups (HSDP), e.g. the GPUs of one
    node; 1 replicates only (DDP)."""
    deterministic: bool = False
    """On CUDA: use only deterministic kernels, which are slower. CPU runs are always deterministic."""
    gpu_timeout_minutes: float = 30
    """How long ranks wait in a collective for a missing one before the run stops."""

    def check(self) -> None:
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        if not 0 < self.gpu_timeout_minutes < math.inf:
            raise ConfigError("gpu_timeout_minutes", self.gpu_timeout_minutes, "must be above 0")
        check_at_least_one(self, "hsdp_shard_size")
        unknown = set(self.gradient_checkpointing_kwargs) - {"use_reentrant"}
        if unknown:
            key = f"gradient_checkpointing_kwargs.{sorted(unknown)[0]}"
            raise ConfigError(key, None, "is not known; only use_reentrant is")


@dataclass
class OptimizerOptions:
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """adamw_8bit: moments in 8 bits, 2 bytes per parameter instead of 8. muon: orthogonalised momentum for
    the matrices of the blocks, AdamW for the rest."""
    learning_rate: float = 2e-5
    """Peak learning rate. Full fine-tuning 1e-5–5e-5, LoRA 1e-4–3e-4."""
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warmup; wsd holds the peak and decays over the last wsd_decay_ratio of the run."""
    min_lr_ratio: float = 0.0
    """Final learning rate of the decay, as a fraction of the peak."""
    wsd_decay_ratio: float = 0.2
    """Share of the run over which wsd decays."""
    warmup_steps: int | None = None
    """Steps of linear warmup; 5–10 % of the run is usual."""
    warmup_ratio: float | None = None
    """Warmup as a share of the run, instead of warmup_steps."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""
    adam_beta1: float = 0.9
    """AdamW's first-moment decay."""
    adam_beta2: float = 0.95
    """AdamW's second-moment decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0 disables clipping."""

    def check(self) -> None:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ConfigError(
                "warmup_ratio", self.warmup_ratio, "contradicts warmup_steps; keep one of the two"
            )
        check_ranges(
            self, ("learning_rate", 0, math.inf), ("warmup_ratio", 0, 1), ("warmup_steps", 0, math.inf),
            ("weight_decay", 0, math.inf), ("max_grad_norm", 0, math.inf), ("min_lr_ratio", 0, 1),
            ("wsd_decay_ratio", 0, 1),
        )
        for key in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "must be at least 0 and below 1")
        if not 0 < self.adam_epsilon < math.inf:
            raise ConfigError("adam_epsilon", self.adam_epsilon, "must be above 0")


# ------------------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------------------


@dataclass
class World:
    rank: int
    size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh | None = None  # over which parameters are sharded; None for one process
    timeout: timedelta | None = None  # of a collective; None: torch's own

    @property
    def main(self) -> bool:
        return self.rank == 0

    def devices(self, options: DistOptions) -> str:
        """The devices of this run and their precision, as in `8 × NVIDIA H100 in bf16`."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else self.device.type
        return f"{self.size} × {name} in {'bf16' if options.bf16 else 'fp32'}"


def world_size() -> int:
    """The number of processes that torchrun started; known before the process group is set up."""
    size = _of_launcher("WORLD_SIZE", 1)
    if size > 1 and "RANK" not in os.environ:
        problem = "is in the environment without RANK: unset it (left over from a job?) or use torchrun"
        raise ConfigError("WORLD_SIZE", size, problem)
    return size


def _of_launcher(name: str, default: int) -> int:
    """A number that torchrun puts into the environment. ConfigError for what is none."""
    text = os.environ.get(name, str(default))
    if not text.strip().isdigit():
        raise ConfigError(name, text, "is in the environment and no number: unset it, or start with torchrun")
    return int(text)


def init(options: DistOptions) -> World:
    """Join the process group of torchrun's environment, or create one of size 1."""
    rank, size = _of_launcher("RANK", 0), world_size()
    local_rank = _of_launcher("LOCAL_RANK", 0)
    cuda = torch.cuda.is_available()
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if cuda:
        torch.cuda.set_device(local_rank)
    elif options.fsdp_cpu_offload:
        raise ConfigError(
            "fsdp_cpu_offload", True, "needs CUDA; without a GPU everything is in host memory already"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if not td.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        timeout = timedelta(minutes=options.gpu_timeout_minutes)
        if "RANK" in os.environ:
            _join(backend, timeout)
        else:
            td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1, timeout=timeout)
    timeout = timedelta(minutes=options.gpu_timeout_minutes)
    world = World(rank, size, local_rank, device, timeout=timeout)
    shard = options.hsdp_shard_size
    if shard is not None and (shard < 1 or size % shard):
        raise ConfigError("hsdp_shard_size", shard, f"must divide the {size} processes")
    if size > 1 or options.fsdp_cpu_offload:  # FSDP does the offloading, even with one process
        shape, names = ((size // shard, shard), ("replicate", "shard")) if shard else ((size,), ("shard",))
        world.mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return world


def _join(backend: str, timeout: timedelta) -> None:
    """Join the process group that the environment describes. BallastError where that cannot be."""
    needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not os.environ.get(name)]:
        problem = f"is in the environment without {', '.join(missing)}: unset it (left over from a job?)"
        raise ConfigError("RANK", os.environ["RANK"], f"{problem} or use torchrun")
    try:
        td.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).strip().splitlines()[0]
        raise BallastError(
            f"the processes cannot meet at MASTER_ADDR:MASTER_PORT = {where} ({reason}); if another job has "
            "the port, set another MASTER_PORT, or torchrun --rdzv-backend c10d --rdzv-endpoint localhost:0"
        ) from None


def finish() -> None:
    if td.is_initialized():
        td.destroy_process_group()


def seed_everything(seed: int, rank: int = 0) -> None:
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def all_reduce(values: list[float], world: World, op: Any = td.ReduceOp.SUM) -> list[float]:
    """Sums (or another reduction) over ranks, in fp64 on the CPU group: one call for many numbers."""
    if world.size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    td.all_reduce(tensor, op)
    return tensor.tolist()


def gather(value: T, world: World) -> list[T]:
    """Every rank's value, in order of rank, on every rank: for small Python objects."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    td.all_gather_object(values, value)
    return values


def from_main(work: Callable[[], T], world: World, long: bool = False) -> T:
    """Run `work()` on rank 0 and return its result, or raise its error, on every rank. `long` work may take
    longer than the limit of a collective (gpu_timeout_minutes)."""
    if world.size == 1:
        return work()
    told: list[Any] = [None, None, None]  # result, error's class, its message
    error: Exception | None = None
    with long_work(world) if long else contextlib.nullcontext():
        if world.main:
            try:
                told[0] = work()
            except Exception as caught:  # told to the others, then raised here
                error = caught
                plain = isinstance(caught, BallastError) and type(caught).__init__ is BallastError.__init__
                told = [None, type(caught) if plain else BallastError, str(caught)]
    td.broadcast_object_list(told, src=0)
    if error is not None:
        raise error
    if told[1] is not None:
        raise told[1](told[2])
    return told[0]


_long_works = itertools.count()


@contextlib.contextmanager
def long_work(world: World) -> Iterator[None]:
    """Context for work that rank 0 does alone and shares by a collective afterwards. The other ranks wait for
    its start with the collective's timeout, so that a missing rank 0 is noticed, and for its end without."""
    if world.size == 1:
        yield
        return
    store, name = td.distributed_c10d._get_default_store(), f"ballast-long-{next(_long_works)}"
    if world.main:
        store.set(f"{name}-begun", "")
        try:
            yield
        finally:
            store.set(f"{name}-done", "")
        return
    with contextlib.suppress(td.DistStoreError):  # the collective that follows says who is missing
        store.wait([f"{name}-begun"], world.timeout or timedelta(minutes=30))
        store.wait([f"{name}-done"], timedelta(days=30))
    yield


def main_first(work: Callable[[], T], world: World) -> T:
    """Run `work()` on rank 0, however long it takes, then on the other ranks, which reuse the files it wrote.
    An error on rank 0 is raised on all ranks."""
    if world.size == 1:
        return work()
    failure: list[str | None] = [None]
    result: T | None = None
    error: Exception | None = None
    with long_work(world):
        if world.main:
            try:
                result = work()
            except Exception as caught:  # told to the others, then raised here
                failure, error = [str(caught)], caught
    td.broadcast_object_list(failure, src=0)
    if error is not None:
        raise error
    if failure[0] is not None:
        raise BallastError(failure[0])
    return result if world.main else work()  # type: ignore[return-value]


def begin_step(step: int, world: World) -> dict[str, float]:
    """Begin a step: publish its number to the other ranks, and every tenth step time them (`race`)."""
    beat(step, world)
    return race(step, world)


def beat(step: int, world: World) -> None:
    """Tell the others which step this rank has begun, so that a rank which is missing can be named."""
    if world.size > 1:
        store = td.distributed_c10d._get_default_store()
        store.set(f"ballast-step-{world.rank}", str(step))


RACE_EVERY = 10  # steps


def race(step: int, world: World) -> dict[str, float]:
    """Every tenth step, time the same product of a few milliseconds on each rank: under FSDP every step waits
    for the slowest device, so the ranks' step times do not differ. `ranks/slowness` is the slowest rank's
    time relative to the median, `ranks/slowest` its number. Returns {} in other steps and for one process. A
    collective."""
    if world.size == 1 or step % RACE_EVERY:
        return {}
    times = gather(_small_product(world.device), world)
    slowest = max(range(world.size), key=times.__getitem__)
    return {"ranks/slowness": times[slowest] / statistics.median_low(times), "ranks/slowest": float(slowest)}


def _small_product(device: torch.device) -> float:
    """Seconds that some products of fixed matrices take on this rank's device alone."""
    cuda = device.type == "cuda"
    size, times, dtype = (4096, 10, torch.bfloat16) if cuda else (256, 8, torch.float32)
    matrix = torch.full((size, size), 1 / size, dtype=dtype, device=device)
    if cuda:
        torch.cuda.synchronize(device)  # do not time work queued by the previous step
    begun = time.perf_counter()
    for _ in range(times):
        matrix = matrix @ matrix
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def behind() -> str:
    """After a collective has failed: name the ranks that are behind the others, or that are gone."""
    if not td.is_initialized() or td.get_world_size() == 1:
        return ""
    try:
        store = td.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=2))
        steps = [int(store.get(f"ballast-step-{rank}")) for rank in range(td.get_world_size())]
    except Exception:  # the store lived in rank 0, which is gone
        return "rank 0 is gone"
    late = [rank for rank, step in enumerate(steps) if step < max(steps)]
    if late:
        named = ", ".join(f"rank {rank} is in step {steps[rank]}" for rank in late)
        return f"{named}, the others in step {max(steps)}"
    return f"all ranks had begun step {max(steps)}"


class Interrupt:
    """SIGINT, SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1 (Slurm's warning) ask the loop to save and
    stop; a second signal stops at once."""

    def __init__(self):
        self.signal: int | None = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks for
                    signal.signal(number, self._caught)

    def _caught(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            print("\nstopping after this step; interrupt again to stop at once", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# Sharding
# ------------------------------------------------------------------------------------------------------------


def shard(model: Transformer, options: DistOptions, world: World) -> Transformer:
    """Set up activation checkpointing, the dtype of hidden states and products, and with several processes
    FSDP2 on each block and the rest. In place; the model may still be on the meta device."""
    model.compute_device = world.device
    model.compute_dtype = torch.bfloat16 if options.bf16 else None
    if options.gradient_checkpointing:
        for block in model.layers:
            assert isinstance(block, Block)
            block.checkpointing = bool(options.gradient_checkpointing_kwargs.get("use_reentrant", False))
    if world.mesh is None:
        return model
    dtype = model.compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    offload = CPUOffloadPolicy() if options.fsdp_cpu_offload else OffloadPolicy()
    for block in model.layers:
        fully_shard(
            block, mesh=world.mesh, mp_policy=policy, offload_policy=offload,
            reshard_after_forward=options.fsdp_reshard_after_forward,
        )
    # The head is needed again right after the forward pass, for the loss: keep the root's weights gathered.
    fully_shard(model, mesh=world.mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden_states")
    return model


# ------------------------------------------------------------------------------------------------------------
# Optimiser and schedule
# ------------------------------------------------------------------------------------------------------------


def make_optimizers(model: nn.Module, options: OptimizerOptions) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon and AdamW. Norms, biases and other vectors have no weight decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = []
    if options.optimizer == "muon":
        # The orthogonalisation is for maps between hidden states; embeddings, head and experts' stacks keep
        # AdamW.
        matrices = [
            p for name, p in named if p.dim() == 2 and name.startswith("layers.") and "lora_" not in name
        ]
        if not matrices:
            raise ConfigError(
                "optimizer", "muon", "has no matrix to train here (LoRA trains adapters); use adamw"
            )
    taken = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (options.adam_beta1, options.adam_beta2)
    how: dict[str, Any] = dict(lr=options.learning_rate, betas=betas, eps=options.adam_epsilon)
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "adamw_8bit":
        return [low_precision.AdamW8bit(groups, **how)]
    adamw = torch.optim.AdamW(groups, **how, fused=True)
    if not matrices:
        return [adamw]
    # match_rms_adamw (arXiv 2502.16982) scales Muon's updates to AdamW's size, so one learning_rate serves
    # both.
    muon = torch.optim.Muon(
        matrices, lr=options.learning_rate, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adamw]


def update(optimizers: list[torch.optim.Optimizer], rate: float) -> float:
    """Make one optimiser step at this learning rate, drop the gradients, and return the rate in use."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizers[0].param_groups[0]["lr"]


def warmup(options: OptimizerOptions, total_steps: int) -> int:
    if options.warmup_steps is not None:
        return options.warmup_steps
    return round((options.warmup_ratio or 0.0) * total_steps)


def check_schedule(options: OptimizerOptions, total_steps: int) -> None:
    """Raise ConfigError where the warmup is longer than the run; warn where the learning rate is 0."""
    if warmup(options, total_steps) > total_steps:
        raise ConfigError(
            "warmup_steps", options.warmup_steps, f"is longer than the run of {total_steps} steps"
        )
    if options.learning_rate == 0:
        log.warning("learning_rate is 0: no weight will move in this run")


def learning_rate(step: int, options: OptimizerOptions, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (counted from 0) of `total_steps`: linear warmup, then the
    decay."""
    peak, floor, warm = options.learning_rate, options.min_lr_ratio, warmup(options, total_steps)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, total_steps - warm)
    if options.lr_scheduler == "constant":
        shape = 1.0
    elif options.lr_scheduler == "linear":
        shape = 1 - progress
    elif options.lr_scheduler == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay = max(1, round(options.wsd_decay_ratio * total_steps))
        shape = min(1.0, (total_steps - step) / decay)
    return peak * (floor + (1 - floor) * shape)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> tuple[Tensor, list[nn.Parameter]]:
    """L2 norm of all gradients, over all ranks, in fp32; and the parameters that have one."""
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return torch.zeros(()), []
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_grad])  # type: ignore[misc]
    return full_tensor(norm).float(), with_grad


def clip_gradients(parameters: list[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    if parameters and max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, without a graph."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def samples(tensors: Iterable[Tensor], most: int) -> list[Tensor]:
    """At most so many elements of this process's part of each tensor, evenly spaced: 1-D, views where the
    tensor is contiguous."""
    flat = (local(tensor).reshape(-1) for tensor in tensors)
    return [x[:: max(1, -(-x.numel() // most))] for x in flat]


@torch.no_grad()
def mix_weights(into: nn.Module, other: nn.Module, weight: float) -> None:
    """into ← weight · other + (1 − weight) · into; each rank updates its own rows."""
    for a, b in zip(into.parameters(), other.parameters(), strict=True):
        a, b = local(a), local(b)
        a.lerp_(b.to(a.dtype), weight)


class Timer:
    """Seconds since the last call."""

    def __init__(self):
        self.last = time.perf_counter()

    def __call__(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed

    def so_far(self) -> float:
        """Seconds since the last call, without resetting the timer."""
        return time.perf_counter() - self.last
