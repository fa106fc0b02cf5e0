"""Processes, sharding, optimiser, schedule and checkpoints: what turns a loop into one that runs on many
devices and goes on after it was killed.

One process and many are the same program: `python sft.py` is a world of one. With more, FSDP2 shards each
block; no rank ever holds a whole full-precision model.
"""

import contextlib
import fcntl
import io
import json
import logging
import math
import os
import pickle
import random
import shutil
import signal
import socket
import statistics
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as td
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

import low_precision
from config import BallastError, ConfigError, check_ranges
from model import Architecture, Block, Transformer, set_precision
from weights import (  # fmt: skip
    apply_lora,
    initialize,
    initialize_lora,
    load_adapter,
    load_weights,
    save_adapter,
    save_pretrained,
)

T = TypeVar("T")
log = logging.getLogger("ballast")


@dataclass
class DistOptions:
    bf16: bool = False
    """Compute in bfloat16. Trained weights, their gradients and the optimiser stay in fp32; frozen weights
    are bf16."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""
    gradient_checkpointing_kwargs: dict = field(default_factory=dict)
    """{use_reentrant: false} is the default; true is the older implementation."""
    fsdp_reshard_after_forward: bool = True
    """Free a block's gathered weights between forward and backward: less memory, one more gather."""
    fsdp_cpu_offload: bool = False
    """Keep weights and optimiser state in host memory (CUDA only)."""
    hsdp_shard_size: int | None = None
    """Shard over groups of so many processes and replicate across groups (HSDP), e.g. the GPUs of one
    node; 1 replicates only (DDP)."""
    deterministic: bool = False
    """On CUDA: only kernels that give the same bits every time, slower. CPU runs always do."""
    gpu_timeout_minutes: float = 30
    """A collective that waits longer stops the run: some rank died or took another path."""


@dataclass
class OptimizerOptions:
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """adamw_8bit: moments in 8 bits, 2 bytes a parameter instead of 8. muon: orthogonalised momentum for the
    matrices of the blocks, AdamW for the rest."""
    learning_rate: float = 2e-5
    """Peak learning rate. Full fine-tuning 1e-5–5e-5, LoRA 1e-4–3e-4."""
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warmup; wsd holds the peak and decays over the last wsd_decay_ratio of the run."""
    min_lr_ratio: float = 0.0
    """Where the decay ends, as a share of the peak."""
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
    """Clip the global gradient norm to this; 0 leaves it."""


@dataclass
class CheckpointOptions:
    output_dir: str = "outputs/run"
    """Everything the run writes goes here."""
    save_steps: int | None = None
    """Write a checkpoint every so many steps; unset: only when the run is interrupted."""
    save_total_limit: int = 2
    """Keep this many checkpoints, the newest."""
    save_async: bool = True
    """Write checkpoints in the background while training goes on."""
    resume: str = "auto"
    """auto: continue from the newest checkpoint in output_dir if there is one; never; or a checkpoint's
    directory."""
    resume_with_new_data: bool = False
    """Allow a checkpoint to go on with data other than it was made with; its position then means other
    rows."""


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

    @property
    def main(self) -> bool:
        return self.rank == 0

    def autocast(self, bf16: bool) -> contextlib.AbstractContextManager:
        """bf16 compute for one process; with several, FSDP's mixed precision does it."""
        return (
            torch.autocast(self.device.type, torch.bfloat16)
            if bf16 and self.mesh is None
            else contextlib.nullcontext()
        )


def init(options: DistOptions) -> World:
    """Join the other processes (torchrun's environment) or be a world of one."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if not options.gpu_timeout_minutes > 0:
        raise ConfigError("gpu_timeout_minutes", options.gpu_timeout_minutes, "must be above 0")
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
            td.init_process_group(backend, timeout=timeout)
        else:
            td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1, timeout=timeout)
    world = World(rank, size, local_rank, device)
    shard = options.hsdp_shard_size
    if shard is not None and (shard < 1 or size % shard):
        raise ConfigError("hsdp_shard_size", shard, f"must divide the {size} processes")
    if size > 1 or options.fsdp_cpu_offload:  # offloading is FSDP's, also for a world of one
        shape, names = ((size // shard, shard), ("replicate", "shard")) if shard else ((size,), ("shard",))
        world.mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return world


def finish() -> None:
    if td.is_initialized():
        td.destroy_process_group()


_claimed: dict[Path, int] = {}  # output directory → descriptor of its lock, held as long as the process lives


def claim(output_dir: Path) -> None:
    """Make the directory, and keep every other run out of it while this process lives: two would write over
    each other's checkpoints. ConfigError where another run is in it, or where nothing can be written."""
    output_dir = output_dir.resolve()
    if output_dir in _claimed:
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}); choose another"
        raise ConfigError("output_dir", str(output_dir), remedy) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        remedy = f"is another run's at this moment ({holder}): choose another, or stop that run"
        raise ConfigError("output_dir", str(output_dir), remedy) from None
    except OSError as error:  # a network file system without locks
        log.warning("output_dir cannot be locked (%s): see to it that no other run uses it", error.strerror)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _claimed[output_dir] = descriptor


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


def from_main(work: Callable[[], T], world: World) -> T:
    """The result of `work()` on rank 0, on every rank. Its error stops all of them."""
    if world.size == 1:
        return work()
    told: list[Any] = [None, None, None]  # result, error's class, its message
    error: Exception | None = None
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


def main_first(work: Callable[[], T], world: World) -> T:
    """`work()` on rank 0, then on the others, which find what it left on disk. Its error stops all of
    them."""
    if world.size == 1:
        return work()
    failure: list[str | None] = [None]
    result: T | None = None
    error: Exception | None = None
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


def beat(step: int, world: World) -> None:
    """Tell the others which step this rank has begun, so that a rank which is missing can be named."""
    if world.size > 1:
        store = td.distributed_c10d._get_default_store()
        store.set(f"ballast-step-{world.rank}", str(step))


RACE_EVERY = 10  # steps


def race(step: int, world: World) -> dict[str, float]:
    """Every tenth step each rank times the same small product, some milliseconds of it: under FSDP every step
    waits for the slowest device, and all ranks' step times look alike. `ranks/slowness` is the slowest rank's
    time over the median rank's, `ranks/slowest` says which it is. Empty in other steps, and for one process.
    A collective."""
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
        torch.cuda.synchronize(device)  # what is queued from the step before is not this rank's speed
    begun = time.perf_counter()
    for _ in range(times):
        matrix = matrix @ matrix
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def behind() -> str:
    """After a collective failed: which ranks have not come as far as the others, or which have gone."""
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
    """SIGINT and SIGTERM ask the loop to save and stop; a second signal stops at once."""

    def __init__(self):
        self.signal: int | None = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._caught)

    def _caught(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# Sharding
# ------------------------------------------------------------------------------------------------------------


def shard(model: Transformer, options: DistOptions, world: World) -> Transformer:
    """Set up activation checkpointing and, with several processes, FSDP2 on each block and the rest. In
    place; the model may still be on the meta device."""
    unknown = set(options.gradient_checkpointing_kwargs) - {"use_reentrant"}
    if unknown:
        raise ConfigError(
            "gradient_checkpointing_kwargs", sorted(unknown)[0], "is not known; only use_reentrant is"
        )
    if options.gradient_checkpointing:
        for block in model.layers:
            assert isinstance(block, Block)
            block.checkpointing = bool(options.gradient_checkpointing_kwargs.get("use_reentrant", False))
    if world.mesh is None:
        return model
    dtype = torch.bfloat16 if options.bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    offload = CPUOffloadPolicy() if options.fsdp_cpu_offload else OffloadPolicy()
    for block in model.layers:
        fully_shard(
            block, mesh=world.mesh, mp_policy=policy, offload_policy=offload,
            reshard_after_forward=options.fsdp_reshard_after_forward,
        )  # fmt: skip
    # The head is needed again right after the forward pass, for the loss: keep the root's weights gathered.
    fully_shard(model, mesh=world.mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden_states")
    return model


def build_model(arch: Architecture, checkpoint: Path, config: Any, world: World) -> Transformer:
    """The model of a config, sharded, with its weights (loaded or random) and adapters, in training mode.

    It is made on the meta device, where it costs nothing; once it is sharded each rank gives storage to its
    own rows and reads only those from the checkpoint.
    """
    with torch.device("meta"):
        model = Transformer(arch)
        if config.adapter:
            apply_lora(model.to(torch.bfloat16 if config.bf16 else torch.float32), config)
        set_precision(model, config)
    shard(model, config, world)
    model.to_empty(device="cpu" if config.fsdp_cpu_offload else world.device)
    if config.random_init:
        initialize(model, config.seed)
    else:
        load_weights(model, checkpoint)
    if config.adapter:
        initialize_lora(model, config.seed)
        if config.lora_model_dir:
            load_adapter(model, config.lora_model_dir)
    return model.train()


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
    """One step at this learning rate, and the gradients dropped; the rate that the optimiser then has."""
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


def check_optimizer_options(options: OptimizerOptions) -> None:
    if options.warmup_steps is not None and options.warmup_ratio is not None:
        raise ConfigError(
            "warmup_ratio", options.warmup_ratio, "contradicts warmup_steps; keep one of the two"
        )
    check_ranges(
        options, ("learning_rate", 0, math.inf), ("warmup_ratio", 0, 1), ("warmup_steps", 0, math.inf),
        ("weight_decay", 0, math.inf), ("max_grad_norm", 0, math.inf), ("min_lr_ratio", 0, 1),
        ("wsd_decay_ratio", 0, 1),
    )  # fmt: skip


def gradient_norm(parameters: Iterable[nn.Parameter]) -> tuple[Tensor, list[nn.Parameter]]:
    """L2 norm of all gradients, over all ranks, in fp32; and the parameters that have one."""
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return torch.zeros(()), []
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_grad])  # type: ignore[misc]
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float(), with_grad


def clip_gradients(parameters: list[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    if parameters and max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


@torch.no_grad()
def mix_weights(into: nn.Module, other: nn.Module, share: float) -> None:
    """into ← share · other + (1 − share) · into, each rank its own rows."""
    for a, b in zip(into.parameters(), other.parameters(), strict=True):
        a, b = (x.to_local() if isinstance(x, DTensor) else x for x in (a, b))
        a.lerp_(b.to(a.dtype), share)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """The file is either the old one or the whole new one, also after a power cut."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def publish(aside: Path, final: Path) -> None:
    """Make a finished directory appear under its name at once: flush every file, rename, flush the parent."""
    for file in aside.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    _sync_directory(aside)
    if (
        final.exists()
    ):  # rename cannot replace a directory that holds files: move the old one out of the way first
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        aside.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        aside.rename(final)
    _sync_directory(final.parent)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None after every byte was found as it was written."""
    try:
        sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        for name, (size, checksum) in sums.items():
            file = path / Path(name).name  # files of this directory alone
            if not file.exists() or file.stat().st_size != size or _checksum(file) != checksum:
                return f"{file}: damaged (size or checksum differs)"
        if not {"trainer.json", ".metadata"} <= set(sums):
            return f"{path}: is not a whole checkpoint"
        json.loads((path / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{path}: is not a whole checkpoint ({error})"
    return None


def _reason(error: BaseException) -> str:
    """The first line of what went wrong; DCP's own error (which is no Exception) holds one for each rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Unpickler(pickle.Unpickler):
    """DCP keeps its index of tensors as a pickle, which could name any function to be called: only what an
    index is made of is let in."""

    CLASSES = frozenset({
        ("pathlib", "PosixPath"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
        *(("torch.distributed.checkpoint.metadata", name) for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in self.CLASSES:
            return super().find_class(module, name)
        raise BallastError(f"a checkpoint's index names {module}.{name}, which none of ours does: not loaded")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises on all but numbers and their names; DCP would run it
        value.seek(0)
        super().load_bytes(read_item, value)


class Checkpointer:
    """Sharded checkpoints (DCP) in `directory`/step-N that exist whole or not at all.

    A checkpoint holds the trained parameters, the optimisers, each rank's random state and a JSON state of
    the loop. It is written in .step-N, with a checksum for every file, and renamed when the last rank is
    done; `latest` follows.
    """

    def __init__(self, directory: Path, world: World, options: CheckpointOptions):
        self.directory, self.world, self.options = directory, world, options
        self._pending: Future | None = None
        self._group: Any = td.new_group(
            backend="gloo"
        )  # collectives of a background save never mix with the loop's own
        if world.main:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob(".step-*"):  # of a run that was killed while saving
                replaced = directory / leftover.name.removeprefix(".").removesuffix(".old")
                if leftover.suffix == ".old" and not replaced.exists():
                    leftover.rename(replaced)  # killed between the two renames of publish
                else:
                    shutil.rmtree(leftover, ignore_errors=True)
        if world.size > 1:
            td.barrier()

    def steps(self) -> list[int]:
        found = (p.name.removeprefix("step-") for p in self.directory.glob("step-*") if p.is_dir())
        return sorted(int(n) for n in found if n.isdigit())

    def newest(self) -> Path | None:
        """The newest checkpoint whose checksums are right. What is damaged is put aside under another name
        (never deleted) and said. BallastError where checkpoints are there and none of them is whole."""

        def look() -> str | None:
            tried = []
            for step in reversed(self.steps()):
                path = self.directory / f"step-{step}"
                if (wrong := damage(path)) is None:
                    return str(path)
                aside = self.directory / f"damaged-step-{step}"
                shutil.rmtree(aside, ignore_errors=True)  # an earlier one of the same step
                path.rename(aside)
                log.warning("checkpoint step-%d is damaged and now %s: %s", step, aside.name, wrong)
                tried.append(step)
            if tried:
                raise BallastError(
                    f"{self.directory}: none of its {len(tried)} checkpoints is whole; "
                    "train from the start in another output_dir"
                )
            return None

        found = from_main(look, self.world)
        return Path(found) if found else None

    @staticmethod
    def _state_dict(
        model: Transformer, optimizers: list[torch.optim.Optimizer], others: Mapping[str, nn.Module]
    ) -> dict[str, Any]:
        options = StateDictOptions(
            ignore_frozen_params=True
        )  # the base weights of LoRA are not the run's to save
        return {
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizers, options=options),
            **{name: get_model_state_dict(other) for name, other in others.items()},
        }

    def save(
        self, step: int, model: Transformer, optimizers: list[torch.optim.Optimizer], state: dict,
        others: Mapping[str, nn.Module] | None = None,
    ) -> None:  # fmt: skip
        """Write step-N; in the background if `save_async`. A collective. `state` must be JSON; `others` are
        frozen models that move, all of whose weights are saved too."""
        self.finish()
        final, aside = self.directory / f"step-{step}", self.directory / f".step-{step}"
        with self._named():
            if self.world.main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                facts = {**state, "step": step, "world": self.world.size}
                (aside / "trainer.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            td.barrier(self._group)
            torch.save(_random_state(), aside / f"random-{self.world.rank}.pt")
        state_dict = self._state_dict(model, optimizers, others or {})

        def publish_it() -> None:
            if not self.world.main:
                return
            sums = {p.name: [p.stat().st_size, _checksum(p)] for p in sorted(aside.iterdir())}
            (aside / "checksums.json").write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
            publish(aside, final)
            write_atomically(self.directory / "latest", final.name + "\n")
            for old in self.steps()[: -max(1, self.options.save_total_limit)]:
                shutil.rmtree(self.directory / f"step-{old}", ignore_errors=True)

        if not self.options.save_async:
            with self._named():
                dcp.save(state_dict, checkpoint_id=aside, process_group=self._group)
                publish_it()
            td.barrier(self._group)
            return
        # Rank 0's part is done only when DCP has heard from every rank, so rank 0 alone decides when it is
        # whole.
        written = dcp.async_save(state_dict, checkpoint_id=aside, process_group=self._group)
        assert isinstance(written, Future)
        done: Future = Future()

        def wait() -> None:
            try:
                written.result()
                publish_it()
                done.set_result(None)
            except BaseException as error:  # raised in the loop by finish()
                done.set_exception(error)

        threading.Thread(target=wait, daemon=True).start()
        self._pending = done

    def finish(self) -> None:
        """Wait for a save in the background; its error is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._named():
                pending.result()
            td.barrier(self._group)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of writing as a line that names the directory."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            raise BallastError(
                f"no checkpoint could be written to {self.directory} ({_reason(error)}); those before it are "
                "whole: make room, and the same command goes on from there"
            ) from error

    def to_resume(self, identity: dict) -> tuple[Path | None, dict]:
        """The checkpoint that `resume` asks for, if there is one, and its JSON state.

        `identity` says what a checkpoint can go on with: option → value, and "data" → fingerprint. Raises
        ConfigError where the checkpoint has another: it would silently continue a different run.
        """
        resume = self.options.resume
        path = self.newest() if resume == "auto" else None if resume == "never" else Path(resume)
        if resume == "never" and self.steps():
            raise ConfigError(
                "output_dir",
                self.options.output_dir,
                "holds checkpoints already; choose another, or resume: auto",
            )
        if path is None:
            return None, {}
        if not (path / "trainer.json").exists():
            raise ConfigError(
                "resume", resume, "is not a checkpoint; give auto, never or …/checkpoints/step-N"
            )
        if resume != "auto" and (wrong := from_main(lambda: damage(path), self.world)):
            raise BallastError(f"{wrong}; resume from another checkpoint")
        state = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        saved = state["identity"]
        for key, value in identity.items():
            if saved.get(key) == value or (key == "data" and self.options.resume_with_new_data):
                continue
            if key == "data":
                remedy = (
                    "was made with other data: its position means other rows; set resume_with_new_data: true"
                )
                raise ConfigError("datasets", None, f"{path} {remedy} to go on, or choose another output_dir")
            remedy = f"but {path} was made with {saved.get(key)!r}: set it back, or choose another output_dir"
            raise ConfigError(key, value, remedy)
        return path, state

    def load(
        self, path: Path, model: Transformer, optimizers: list[torch.optim.Optimizer], seed: int,
        others: Mapping[str, nn.Module] | None = None,
    ) -> bool:  # fmt: skip
        """Bring parameters, optimisers and random state back. False if the world has another size than the
        checkpoint's: the numbers then agree only to rounding, and random state starts anew from `seed`."""
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        state_dict = self._state_dict(model, optimizers, others or {})
        try:
            dcp.load(state_dict, storage_reader=_Reader(path), planner=_Planner(), process_group=self._group)
        except CheckpointException as error:
            raise BallastError(f"{path}: cannot be loaded ({_reason(error)})") from error
        set_model_state_dict(model, state_dict["model"], options=options)
        set_optimizer_state_dict(model, optimizers, state_dict["optimizer"], options=options)
        for name, other in (others or {}).items():
            set_model_state_dict(other, state_dict[name])
        same = json.loads((path / "trainer.json").read_text(encoding="utf-8"))["world"] == self.world.size
        if same:
            _set_random_state(torch.load(path / f"random-{self.world.rank}.pt", weights_only=True))
        else:
            seed_everything(seed, self.world.rank)
        return same


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, pos, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(), "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), pos, has_gauss, cached],
    }  # fmt: skip
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), pos, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def appearing(final: Path, world: World):
    """A directory that all ranks may write in, which appears under its name when the block ends without an
    error."""
    aside = final.with_name(f".{final.name}.tmp")
    if world.main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    if world.size > 1:
        td.barrier()
    yield aside
    if world.size > 1:
        td.barrier()
    if world.main:
        publish(aside, final)
    if world.size > 1:
        td.barrier()


def save_final(model: Transformer, tokenizer: Any, config: Any, world: World) -> Path:
    """output_dir/final: the model as a Hugging Face folder, or the adapter as a PEFT folder, when it is
    whole."""
    final = Path(config.output_dir) / "final"
    with appearing(final, world) as aside:
        if config.adapter and not config.merge_adapter:
            save_adapter(model, aside, main=world.main)
        else:
            dtype = torch.bfloat16 if config.bf16 else torch.float32
            save_pretrained(model, aside, dtype=dtype, merge=config.adapter is not None, main=world.main)
        if world.main:
            tokenizer.save(aside)
    return final


class Timer:
    """Seconds since the last call."""

    def __init__(self):
        self.last = time.perf_counter()

    def __call__(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed

    def so_far(self) -> float:
        """Seconds since the last call, which stays the last."""
        return time.perf_counter() - self.last
