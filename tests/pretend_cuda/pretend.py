"""Recipes on a GPU that is not there. Tensors that say "cuda" carry real values on the CPU, and every
operation checks what a GPU would: no tensor of the CPU meets one of the GPU, and each that is read back is
counted with its line. Triton kernels run in the interpreter, on arguments that must be on the GPU too.

    python pretend.py RUNS.json OUT.json          as matrix.py, on the GPU; test_fake_cuda.py starts it

What it cannot show: speed, NCCL, rounding of the GPU's own products, races. The interpreter loses the carry
when it rounds to e4m3 (124.4 becomes 64, one value in fifty): FP8's numbers are only near those of the CPU.
"""

import collections
import ctypes
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as td
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent


def build(directory: Path) -> Path:
    """The device's shared library, compiled by g++."""
    library, base = directory / "device.so", Path(torch.__file__).parent
    command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", f"-I{base}/include",
               f"-I{base}/include/torch/csrc/api/include", str(HERE / "device.cpp"), "-o", str(library),
               f"-L{base}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def environment(library: Path) -> dict[str, str]:
    """For a process whose torch finds the device: it must be loaded before torch is."""
    return {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(Path(torch.__file__).parent / "lib"),
            "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PRETEND_DEVICE": str(library)}


CUDA = torch.device("cuda", 0)
SYNCS: collections.Counter[str] = collections.Counter()  # what made the host wait for the GPU: place → times
COPIES = ("aten::_to_copy", "aten::copy_", "aten::to", "aten::set_")


class OnGPU(torch.Tensor):
    """A tensor that says that it is on the GPU; `held` has the values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnGPU":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=CUDA, requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGPU({self.held})"

    def tolist(self) -> Any:  # torch refuses it to subclasses
        SYNCS[f"{place()} tolist"] += 1
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def place() -> str:
    """The line of ours that asked."""
    ours = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT))
            and "/tests/" not in f.filename and "/.venv" not in f.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def dispatch(function, args, kwargs):
    name = function._schema.name
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, OnGPU)]
    if ours and name not in COPIES:
        for other in tensors:
            if not isinstance(other, OnGPU) and other.dim() > 0:  # numbers may
                raise RuntimeError(f"{name}: a tensor of the CPU {list(other.shape)} meets tensors on cuda:0")
    count(name, args, kwargs, ours)

    def held(x: Any) -> Any:
        if isinstance(x, OnGPU):
            return x.held
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x

    a, k = tree_map(held, (args, kwargs))
    if is_cuda(k.get("device")):
        k["device"] = torch.device("cpu")
    if k.get("pin_memory"):
        k["pin_memory"] = False
    result = function(*a, **k)
    if name == "aten::copy_":
        return args[0]
    asked = kwargs.get("device")
    if not (is_cuda(asked) if asked is not None else ours):
        return result
    return tree_map(lambda x: _same(x, ours), result)


def _same(x: Any, ours: list[OnGPU]) -> Any:
    """What an operation gave back: an argument that it changed in place stays the object that it was."""
    if not isinstance(x, torch.Tensor) or isinstance(x, OnGPU):
        return x
    for mine in ours:
        if mine.held is x:
            return mine
    return OnGPU(x)


def count(name: str, args: tuple, kwargs: dict, ours: list[OnGPU]) -> None:
    if not ours:
        if name == "aten::_to_copy" and is_cuda(kwargs.get("device")) and not kwargs.get("non_blocking"):
            SYNCS[f"{place()} to the GPU"] += 1
        return
    boolean = name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") and any(
        x is not None and x.dtype == torch.bool for x in args[1]
    )
    if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::unique_dim",
                "aten::_unique2", "aten::masked_select", "aten::is_nonzero",
                 "aten::equal") or boolean:
        SYNCS[f"{place()} {name.removeprefix('aten::')}"] += 1
    elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        SYNCS[f"{place()} repeat_interleave"] += 1
    elif name == "aten::_to_copy" and kwargs.get("device") is not None and not is_cuda(kwargs["device"]):
        SYNCS[f"{place()} to the CPU"] += 1
    elif name == "aten::copy_" and isinstance(args[0], OnGPU) != isinstance(args[1], OnGPU):
        SYNCS[f"{place()} copy_"] += 1


class Pretend(TorchDispatchMode):
    """Factories too: torch.zeros(…, device="cuda")."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


# ------------------------------------------------------------------------------------------------------------
# torch.cuda, and the kernels
# ------------------------------------------------------------------------------------------------------------


class Launcher:
    """A Triton kernel in the interpreter. Its tensors must be on the GPU; 16-bit ones are interpreted in
    fp32, since the interpreter's products of bf16 are wrong, and rounded when they are stored."""

    def __init__(self, kernel: Any, name: str):
        self.kernel, self.name = kernel, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # within another kernel
        return self.kernel(*args, **kwargs)

    def __getitem__(self, grid):
        def launch(*args: Any, **kwargs: Any) -> None:
            given = []
            for i, x in enumerate(args):
                if not isinstance(x, torch.Tensor):
                    given.append((x, None))
                    continue
                if not isinstance(x, OnGPU):
                    raise RuntimeError(f"{self.name}: argument {i} {list(x.shape)} is on the CPU")
                if x.dtype not in (torch.bfloat16, torch.float16):
                    given.append((x.held, None))
                    continue
                stored = x.held.as_strided((x.held.untyped_storage().nbytes() // 2,), (1,), 0)
                computed = stored.float()
                same = computed.as_strided(x.shape, x.stride(), x.held.storage_offset())
                given.append((same, (computed, stored)))
            self.kernel[grid](*(x for x, _ in given), **kwargs)
            for _, both in given:
                if both is not None:
                    both[1].copy_(both[0])

        return launch


def written_out(q, k, v, *, score_mod, block_mask, scale, enable_gqa):
    """What flex_attention computes; every query must see a key."""
    b, h, i, j = (torch.arange(n, device=q.device) for n in (*q.shape[:3], k.shape[2]))
    places = b[:, None, None, None], h[None, :, None, None], i[:, None], j[None]
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if score_mod is not None:
        scores = score_mod(scores, *places)
    return (scores.masked_fill(~block_mask.mask_mod(*places), -torch.inf).softmax(-1) @ v.float()).to(q.dtype)


def install(capability: tuple[int, int] = (9, 0)) -> None:
    """Make this process believe in the GPU."""
    ctypes.CDLL(os.environ["PRETEND_DEVICE"]).register_device()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") copies what it made on the CPU
    cuda: Any = torch.cuda
    properties = SimpleNamespace(
        shared_memory_per_block_optin=232448, total_memory=80 * 2**30, multi_processor_count=2,
        name="NVIDIA H100 80GB HBM3", major=capability[0], minor=capability[1],
    )
    for name, value in {
        "_lazy_init": lambda: None, "is_available": lambda: True, "is_initialized": lambda: True,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda d: None,
        "synchronize": lambda d=None: SYNCS.update([f"{place()} synchronize"]),
        "get_device_capability": lambda d=None: capability, "get_device_name": lambda d=None: properties.name,
        "get_device_properties": lambda d=None: properties, "is_bf16_supported": lambda *a, **k: True,
        "max_memory_allocated": lambda d=None: 0, "max_memory_reserved": lambda d=None: 0,
        "reset_peak_memory_stats": lambda d=None: None, "empty_cache": lambda: None,
        "mem_get_info": lambda d=None: (70 * 2**30, 80 * 2**30), "manual_seed_all": lambda seed: None,
        "manual_seed": lambda seed: None, "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda d=None: torch.get_rng_state(), "set_rng_state": lambda s, d=None: None,
    }.items():
        setattr(cuda, name, value)
    real = torch.Generator

    def generator(device: Any = "cpu") -> torch.Generator:
        return real("cpu")

    torch.Generator = generator  # type: ignore[assignment, misc]
    import kernels
    from numerics import losses, low_precision

    kernels._flex_attention = lambda: written_out  # it is compiled for the GPU that there is
    kernels._create_block_mask = lambda: lambda visible, B, H, T, S, device: SimpleNamespace(mask_mod=visible)
    assert os.environ.get("TRITON_INTERPRET") == "1"
    for module in (kernels, losses, low_precision):
        for name in [n for n in dir(module) if n.startswith("_") and n.endswith("_kernel")]:
            setattr(module, name, Launcher(getattr(module, name), name))


def main(runs: str, out: str) -> None:
    import dist
    import ebft
    import grpo
    import model
    import sft
    from run.config import parse_config

    install()
    if os.environ.get("PRETEND_MIXED"):  # a sabotage: work where the parameters of fsdp_cpu_offload rest
        model.Transformer.device = property(lambda self: torch.device("cpu"))  # type: ignore[assignment]
    td.init_process_group("gloo", store=td.HashStore(), rank=0, world_size=1)  # there is no NCCL
    recipes = {"sft": sft, "grpo": grpo, "ebft": ebft}
    dist.finish = lambda: None
    results: dict[str, Any] = {}
    for name, recipe, arguments in json.loads(Path(runs).read_text()):
        config = parse_config(recipes[recipe].Config, arguments)
        SYNCS.clear()
        begin = time.perf_counter()
        try:
            with Pretend():
                recipes[recipe].main(config)
        except BaseException as error:
            where = "".join(traceback.format_tb(error.__traceback__)[-12:])
            results[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}\n{where}"
            continue
        lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        results[name] = {"metrics": metrics, "syncs": dict(SYNCS), "seconds": time.perf_counter() - begin}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:])
