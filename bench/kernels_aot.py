"""Compile every Triton kernel ahead of time, without a GPU, and show what the compiler made of it.

    python bench/kernels_aot.py                       sm_80, sm_89, sm_90, sm_100 and gfx942
    python bench/kernels_aot.py 80 90 100 --check    what CI runs: fails on a spill or a lost instruction

Columns: registers a thread, spilled bytes (stack and local), shared memory, the tensor-core instruction that
was used, and for an H100 the arithmetic intensity of a typical shape (FLOPs and bytes counted from it) with
the time that the roofline allows: 989 TFLOP/s in bf16, 1,979 in FP8, 3.35 TB/s.
"""

import argparse
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from numerics import losses, low_precision

TARGETS = {
    "80": GPUTarget("cuda", 80, 32), "89": GPUTarget("cuda", 89, 32), "90": GPUTarget("cuda", 90, 32),
    "100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_CORES = {
    "80": "mma.sync",
    "89": "mma.sync",
    "90": "wgmma.mma_async",
    "100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
SHARED = {"80": 163, "89": 99, "90": 227, "100": 227}  # KiB that a block may have
WIDTH = 54


def case(
    kernel, types: str, constants: dict, flops=0.0, bytes_=0.0, fp8=False, dots=True, warps=4, stages=3
) -> dict:
    """A kernel with the types of its arguments (in order), its constants, and the work of a typical call."""
    names = [name for name in kernel.arg_names if name not in constants]
    given = types.split()
    assert len(names) == len(given), (kernel.__name__, names, given)
    signature = dict(zip(names, given, strict=True)) | dict.fromkeys(constants, "constexpr")
    return dict(kernel=kernel, signature=signature, constants=constants, flops=flops, bytes=bytes_, fp8=fp8,
                dots=dots,                warps=warps, stages=stages)


def cases(target: str) -> dict[str, dict]:
    """Every kernel in each type, head width and option that a config can reach."""
    M, N, K = 8192, 4096, 4096
    found = {}
    for kind, size in (("bf16", 2), ("fp32", 4)):
        exact = kind == "fp32"  # products in full precision: no tensor cores
        x = f"*{kind}"
        for block, label in ((False, "tiles"), (True, "blocks")):
            for power in (False, True):
                found[f"quantize_fp8 {label} {kind}{' powers of 2' * power}"] = case(
                    low_precision._quantize_fp8_kernel, f"{x} *u8 *fp32 i32 i32 i32 i32 i32",
                    dict(WHOLE_BLOCK=block, POWER_OF_TWO=power, ROWS=128 if block else 16, BLOCK=128),
                    flops=2 * M * K, bytes_=(size + 1) * M * K, dots=False,
                )
        for rows in (128, 1):
            for block_m in (128, 64):
                constants = dict(B_ROWS=rows, BLOCK_M=block_m, BLOCK_N=128 if rows == 128 else 64,
                                 BLOCK_K=128, GROUP=8)
                found[f"fp8_matmul scales {rows} rows {block_m} {kind}"] = case(
                    low_precision._fp8_matmul_kernel, f"*fp8e4nv *fp32 *fp8e4nv *fp32 {x} i32 i32 i32 i32",
                    constants, flops=2 * M * N * K, bytes_=M * K + N * K + size * M * N, fp8=True, warps=8,
                )
        for gradient in (False, True):
            label = "input gradient" if gradient else "forward"
            tile = 32 if exact else 64
            constants = dict(INPUT_GRADIENT=gradient, BLOCK_M=tile, BLOCK_N=tile, BLOCK_K=tile)
            work = dict(flops=2 * M * N * K, dots=not exact)
            found[f"nf4_matmul {label} {kind}"] = case(
                low_precision._nf4_matmul_kernel, f"{x} *u8 *u8 *fp32 *fp32 *fp32 *fp32 {x} i32 i32 i32",
                constants, bytes_=size * M * K + 0.52 * N * K + size * M * N, **work,
            )
            found[f"int8_matmul {label} {kind}"] = case(
                low_precision._int8_matmul_kernel, f"{x} *i8 *fp32 {x} i32 i32 i32",
                constants, bytes_=size * M * K + N * K + size * M * N, **work,
            )
        tokens, vocabulary, width = 8192, 151936, 2048
        for cap in (False, True):
            found[f"linear_logprobs {kind}{' soft cap' * cap}"] = case(
                losses._partial_statistics_kernel, f"{x} {x} *i32 *fp32 i32 i32 i32 i32 fp32 fp32",
                dict(SOFTCAP=cap, BLOCK_N=64, BLOCK_V=32 if exact else 64, BLOCK_D=32 if exact else 64),
                flops=2 * tokens * vocabulary * width, bytes_=size * (vocabulary + tokens) * width,
                dots=not exact,
            )
            for gradient in (False, True):
                found[f"cross_entropy {kind}{' soft cap' * cap}{' gradient' * gradient}"] = case(
                    losses._cross_entropy_kernel, f"{x} *i64 *fp32 i32 fp32",
                    dict(SOFTCAP=cap, GRADIENT=gradient, BLOCK=4096), flops=10 * 512 * vocabulary,
                    bytes_=(2 + gradient) * size * 512 * vocabulary, dots=False, warps=8,
                )
        pointwise = dict(dots=False)
        for plus_one in (False, True):
            for D in (128, 2048, 4096, 8192):  # a head's own norm, and rows of the largest models
                warps = 4 if D <= 1024 else 8
                label = f"{D} {kind}{' 1 + weight' * plus_one}"
                found[f"rms_norm {label}"] = case(
                    kernels._rms_norm_kernel, f"{x} {x} {x} *fp32 i32 fp32",
                    dict(PLUS_ONE=plus_one, BLOCK=D), flops=4 * M * D, bytes_=2 * size * M * D, warps=warps,
                    **pointwise,
                )
                found[f"rms_norm backward {label}"] = case(
                    kernels._rms_norm_backward_kernel, f"{x} {x} {x} *fp32 {x} *fp32 i32 i32 i32",
                    dict(PLUS_ONE=plus_one, BLOCK=D), flops=8 * M * D, bytes_=3 * size * M * D, warps=warps,
                    **pointwise,
                )
        D, elements = 4096, 8192 * 14336
        found[f"swiglu {kind}"] = case(
            kernels._swiglu_kernel, f"{x} {x} {x} i32", dict(BLOCK=1024), flops=5 * elements,
            bytes_=3 * size * elements, **pointwise,
        )
        found[f"swiglu backward {kind}"] = case(
            kernels._swiglu_backward_kernel, f"{x} {x} {x} {x} {x} i32", dict(BLOCK=1024),
            flops=10 * elements, bytes_=5 * size * elements, **pointwise,
        )
        for half in (16, 64, 128):
            found[f"rotate {half} pairs {kind}"] = case(
                kernels._rotate_kernel, f"{x} {x} {x} {x} i32 i32 i32 fp32", dict(BLOCK=half),
                flops=3 * M * D, bytes_=2 * size * M * D, warps=1, **pointwise,
            )
    T, H, K = 8192, 32, 8
    widths = (16, 32, 64, 80, 96, 112, 128, 160, 192, 256)  # 16-bit only: in fp32 torch's attention is taken
    for E in widths:
        wide = 1 << (E - 1).bit_length()
        for group in (1, 4, 32) if E in (64, 128, 256) else (4,):
            for cap in (False, True):
                found[f"decode_attention E {E}, {group} heads a key{', cap' * cap}"] = case(
                    kernels._decode_attention_kernel,
                    "*bf16 *bf16 *bf16 *u8 *fp32 *fp32 *fp32 i32 i32 i32 i32 i32 fp32 fp32",
                    dict(G=group, E=E, SOFTCAP=cap, BLOCK_G=max(16, group), BLOCK_S=64, BLOCK_E=wide),
                    flops=4 * 64 * H * E * T, bytes_=4 * 64 * K * E * T, stages=2, dots=False,
                )
    for E in widths:
        for window, cap in ((0, False), (4096, False), (0, True), (4096, True)):
            if window == 0 and cap and E not in (64, 128, 256):
                continue
            shape = dict(H=H, K=K, E=E, WINDOW=window, SOFTCAP=cap)
            flops = 4 * H * E * T * T / 2
            bytes_ = 2 * T * E * (2 * H + 2 * K)
            label = f"E {E}{', window' * (window > 0)}{', cap' * cap}"
            spans = "*i32 *i32 i32 fp32 fp32"
            for part, kernel, types, factor, name in (
                ("forward", kernels._attention_forward_kernel,
                 f"*bf16 *bf16 *bf16 *bf16 *fp32 {spans}", 1, "forward"),
                ("dq", kernels._attention_dq_kernel,
                 f"*bf16 *bf16 *bf16 *bf16 *fp32 *fp32 *bf16 {spans}", 1.5, "dq"),
                ("dkv", kernels._attention_dkv_kernel,
                 f"*bf16 *bf16 *bf16 *bf16 *fp32 *fp32 *bf16 *bf16 {spans}", 2, "dk, dv"),
            ):
                blocks = kernels.attention_blocks(E, part, TENSOR_CORES[target].split(".mma")[0])
                warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
                found[f"attention {name} {label}"] = case(
                    kernel, types, shape | blocks, flops=factor * flops, bytes_=bytes_, warps=warps,
                    stages=stages,
                )
    return found


def compile_one(one: dict, target_name: str) -> dict:
    target = TARGETS[target_name]
    constants = dict(one["constants"])
    # As Triton's launcher specialises: pointers and sizes that are multiples of 16, which allows wide copies.
    aligned = [i for i, name in enumerate(one["kernel"].arg_names) if one["signature"][name] != "constexpr"]
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i in aligned
        if one["signature"][one["kernel"].arg_names[i]] != "fp32"
    }
    source = ASTSource(one["kernel"], signature=one["signature"], constexprs=constants, attrs=attributes)
    options = {"num_warps": one["warps"], "num_stages": one["stages"] if target_name != "gfx942" else 2}
    compiled = triton.compile(source, target=target, options=options)
    text = compiled.asm.get("ptx") or compiled.asm.get("amdgcn") or ""
    result = {"shared": compiled.metadata.shared, "registers": None, "spilled": None}
    used = sorted(set(re.findall(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma|v_smfmac)", text)))
    result["instruction"] = ", ".join(used) or "—"
    result["lost"] = one["dots"] and TENSOR_CORES[target_name] not in used
    if "cubin" in compiled.asm:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        if "REG" in found:
            result["registers"], result["spilled"] = found["REG"], found["STACK"] + found["LOCAL"]
    return result


def attempt(name: str, target: str) -> dict | str:
    """As `compile_one`, or why there is nothing."""
    if "fp8" in name and target == "80":
        return "no e4m3 before sm_89: the torch form is taken there"
    if target == "89" and "attention" in name and any(f"E {E}" in name for E in (160, 192, 256)):
        return "its tiles need 160 KiB of shared memory: torch's attention is taken there"
    try:
        return compile_one(cases(target)[name], target)
    except Exception as error:  # a target may lack a type: say so and go on
        return f"does not compile: {str(error).strip().splitlines()[0][:70]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help="80 89 90 100 gfx942")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 on a spill or a lost tensor-core instruction"
    )
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    arguments = parser.parse_args()
    failures = []
    for target in arguments.targets:
        print(f"\n{'sm_' if target.isdigit() else ''}{target}")
        print(
            f"  {'kernel':<{WIDTH}}{'registers':>10}{'spilled':>9}{'shared KiB':>12}  {'tensor cores':<18}"
            "roofline on an H100"
        )
        every = cases(target)
        found = [name for name in every if arguments.only in name]
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as workers:
            results = list(workers.map(attempt, found, [target] * len(found), chunksize=8))
        for name, result in zip(found, results, strict=True):
            one = every[name]
            if isinstance(result, str):
                print(f"  {name:<{WIDTH}}{result}")
                if "does not compile" in result:
                    failures.append(f"{target}: {name}: {result}")
                continue
            intensity = one["flops"] / max(1, one["bytes"])
            peak = 1979e12 if one["fp8"] else 989e12
            seconds = max(one["flops"] / peak if one["dots"] else 0, one["bytes"] / 3.35e12)
            roofline = f"{intensity:7.1f} FLOP/byte, {seconds * 1e6:8.1f} µs"
            shown = {k: "—" if result[k] is None else str(result[k]) for k in ("registers", "spilled")}
            print(f"  {name:<{WIDTH}}{shown['registers']:>10}{shown['spilled']:>9}"
                  f"{result['shared'] / 1024:>12.1f}  {result['instruction']:<18}{roofline}")
            if result["spilled"]:
                failures.append(f"{target}: {name}: {result['spilled']} bytes spilled")
            if result["lost"]:
                failures.append(f"{target}: {name}: no {TENSOR_CORES[target]}")
            if result["shared"] > SHARED.get(target, math.inf) * 1024:
                failures.append(f"{target}: {name}: {result['shared']} bytes of shared memory")
    for failure in failures:
        print(f"problem: {failure}")
    return 1 if arguments.check and failures else 0


if __name__ == "__main__":
    sys.exit(main())
