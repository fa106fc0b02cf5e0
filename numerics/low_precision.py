"""8-bit and 4-bit numerics: FP8 products with a master weight, frozen weights in NF4 or int8, AdamW with
8-bit state. Each function has a plain-torch reference; if there is a Triton kernel too, the public function
uses it on a GPU (`KERNELS` overrides, as in kernels.py)."""

# Triton kernels are typed by Triton's compiler, not by Python's rules:
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportIndexIssue=false

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from kernels import tl, triton, use_triton

# ------------------------------------------------------------------------------------------------------------
# FP8: quantisation by tiles and blocks, the scaled matrix product, a linear layer
# ------------------------------------------------------------------------------------------------------------

FP8_MAX = 448.0  # largest e4m3 number
FP8_BLOCK = 128  # elements that share a scale along the contraction (DeepSeek-V3, arXiv 2412.19437, §3.3)
SMALLEST_NORMAL = 2.0**-126  # a denormal scale would be flushed to 0, and 0/0 is NaN


def _use_fp8_triton(x: Tensor) -> bool:
    """e4m3 exists in Triton from sm_89 on; an A100 uses the torch form, which is slow there but correct."""
    return use_triton(x) and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9))


def _fp8_scale(amax: Tensor, power_of_two: bool) -> Tensor:
    """amax/448, or the next power of two; 1 where amax is 0 (padding: reference page, FP8-Specific NaN
    Issues)."""
    scale = (amax / FP8_MAX).clamp(min=SMALLEST_NORMAL)
    if power_of_two:
        # Round the exponent up by its bits: log2 and exp2 would be off by one step at exact powers.
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(amax == 0, 1.0, scale)


def quantize_fp8_reference(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise x [M, N] to e4m3 with one fp32 scale per 1×128 tile: (q [M, N], scale [M, ⌈N/128⌉]), q·scale ≈
    x.

    An all-zero tile gets scale 1. NaN and ±Inf become NaN; their tile's scale is that of the finite
    elements, so that the fault stays local. Source: DeepSeek-V3, arXiv 2412.19437, §3.3.2.
    """
    M, N = x.shape
    padded = F.pad(x.float(), (0, -N % FP8_BLOCK)).view(M, -1, FP8_BLOCK)
    finite = padded.isfinite()
    scale = _fp8_scale(padded.abs().where(finite, 0.0).amax(-1), power_of_two)
    q = (padded / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).where(finite, torch.nan)
    return q.view(M, -1)[:, :N].to(torch.float8_e4m3fn).contiguous(), scale


def quantize_fp8_blocks_reference(w: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise w [N, K] to e4m3 with one fp32 scale per 128×128 block: (q [N, K], scale [⌈N/128⌉,
    ⌈K/128⌉])."""
    N, K = w.shape
    padded = F.pad(w.float(), (0, -K % FP8_BLOCK, 0, -N % FP8_BLOCK))
    blocks = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, padded.shape[1] // FP8_BLOCK, FP8_BLOCK)
    finite = blocks.isfinite()
    scale = _fp8_scale(blocks.abs().where(finite, 0.0).amax((1, 3)), power_of_two)
    q = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).where(finite, torch.nan)
    return q.view(padded.shape)[:N, :K].to(torch.float8_e4m3fn).contiguous(), scale


@triton.jit
def _fp8_scale_kernel(amax, POWER_OF_TWO: tl.constexpr):
    scale = tl.maximum(amax / 448.0, 1.1754943508222875e-38)
    if POWER_OF_TWO:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
    return tl.where(amax == 0, 1.0, scale)


@triton.jit
def _quantize_fp8_kernel(
    x_ptr, q_ptr, scale_ptr, M, N, stride_m, stride_n, scale_columns,
    WHOLE_BLOCK: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program per [ROWS, 128] tile: one scale per row, or with WHOLE_BLOCK (ROWS = 128) one per tile."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < M) & (column[None, :] < N)
    offs = row[:, None].to(tl.int64) * stride_m + column[None, :].to(tl.int64) * stride_n
    values = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    finite = tl.abs(values) <= 3.4028234663852886e38  # false for NaN too
    amax = tl.max(tl.where(finite, tl.abs(values), 0.0), axis=1)
    if WHOLE_BLOCK:
        block_scale = _fp8_scale_kernel(tl.max(amax, axis=0), POWER_OF_TWO)
        scales = tl.zeros([ROWS], tl.float32) + block_scale
        tl.store(scale_ptr + tl.program_id(0) * scale_columns + tl.program_id(1), block_scale)
    else:
        scales = _fp8_scale_kernel(amax, POWER_OF_TWO)
        tl.store(scale_ptr + row.to(tl.int64) * scale_columns + tl.program_id(1), scales, mask=row < M)
    scaled = tl.minimum(tl.maximum(values / scales[:, None], -448.0), 448.0)
    bits = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = tl.where(finite, bits, 0x7F)  # e4m3's NaN
    tl.store(q_ptr + row[:, None].to(tl.int64) * N + column[None, :], bits.to(tl.uint8), mask=inside)


def _quantize_fp8_triton(x: Tensor, power_of_two: bool, blocks: bool) -> tuple[Tensor, Tensor]:
    M, N = x.shape
    rows = FP8_BLOCK if blocks else 16
    columns = -(-N // FP8_BLOCK)
    q = torch.empty(M, N, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(-(-M // FP8_BLOCK) if blocks else M, columns, dtype=torch.float32, device=x.device)
    if x.numel():
        _quantize_fp8_kernel[(-(-M // rows), columns)](
            x, q.view(torch.uint8), scale, M, N, x.stride(0), x.stride(1), columns,
            WHOLE_BLOCK=blocks, POWER_OF_TWO=power_of_two, ROWS=rows, BLOCK=FP8_BLOCK, num_warps=4,
        )
    return q, scale


def quantize_fp8(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """As `quantize_fp8_reference`; on a GPU in one pass over x."""
    if _use_fp8_triton(x):
        return _quantize_fp8_triton(x, power_of_two, False)
    return quantize_fp8_reference(x, power_of_two)


def quantize_fp8_blocks(w: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """As `quantize_fp8_blocks_reference`; on a GPU in one pass over w."""
    if _use_fp8_triton(w):
        return _quantize_fp8_triton(w, power_of_two, True)
    return quantize_fp8_blocks_reference(w, power_of_two)


def dequantize_fp8(q: Tensor, scale: Tensor, rows: int = 1) -> Tensor:
    """q [M, N] times its scales, in fp32: scale [M, ⌈N/128⌉], or [⌈M/128⌉, ⌈N/128⌉] with rows = 128."""
    M, N = q.shape
    full_scale = scale.repeat_interleave(rows, 0)[:M].repeat_interleave(FP8_BLOCK, 1)[:, :N]
    return q.float() * full_scale


def fp8_matmul_reference(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int = FP8_BLOCK,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """a [M, K] times b [N, K] transposed, both e4m3, in fp32: [M, N].

    a_scale [M, ⌈K/128⌉] by tiles; b_scale [⌈N/b_rows⌉, ⌈K/128⌉], by blocks (b_rows 128) or by tiles (1).
    """
    return (dequantize_fp8(a, a_scale) @ dequantize_fp8(b, b_scale, b_rows).T).to(dtype)


@triton.jit
def _fp8_matmul_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, M, N, K, k_blocks,
    B_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    """c = (a·a_scale) @ (b·b_scale)ᵀ. Every 128 elements of K are one tensor-core product; its fp32 result is
    scaled and added in fp32 registers: the promotion that keeps FP8's short accumulators from losing small
    terms (DeepSeek-V3, §3.3.2)."""
    # Programs that share columns of b run close together in time, so b stays in the L2 cache.
    program, m_blocks, n_blocks = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * n_blocks)
    first = group * GROUP
    size = tl.minimum(m_blocks - first, GROUP)
    pid_m = first + (program % (GROUP * n_blocks)) % size
    pid_n = (program % (GROUP * n_blocks)) // size
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None].to(tl.int64) * K + offs_k[None, :]
    b_ptrs = b_ptr + offs_n[None, :].to(tl.int64) * K + offs_k[:, None]
    a_scale_ptrs = a_scale_ptr + offs_m.to(tl.int64) * k_blocks
    b_scale_ptrs = b_scale_ptr + (offs_n // B_ROWS).to(tl.int64) * k_blocks
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(0, k_blocks):
        left = K - block * BLOCK_K
        a_tile = tl.load(a_ptrs, mask=(offs_m[:, None] < M) & (offs_k[None, :] < left), other=0.0)
        b_tile = tl.load(b_ptrs, mask=(offs_n[None, :] < N) & (offs_k[:, None] < left), other=0.0)
        product = tl.dot(a_tile, b_tile)
        scale_m = tl.load(a_scale_ptrs + block, mask=offs_m < M, other=0.0)
        scale_n = tl.load(b_scale_ptrs + block, mask=offs_n < N, other=0.0)
        total += product * scale_m[:, None] * scale_n[None, :]
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    offs = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    tl.store(
        c_ptr + offs, total.to(c_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N)
    )


def fp8_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int = FP8_BLOCK,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """As `fp8_matmul_reference`, any M, N, K; on a GPU with FP8 tensor cores where it has them."""
    if not _use_fp8_triton(a):
        return fp8_matmul_reference(a, a_scale, b, b_scale, b_rows, dtype)
    M, K = a.shape
    N = b.shape[0]
    c = torch.empty(M, N, dtype=dtype, device=a.device)
    if c.numel() == 0:
        return c
    block_m = 128 if M > 64 else 64
    block_n = 128 if b_rows == FP8_BLOCK else 64  # a scale per column takes registers: a smaller tile
    grid = (-(-M // block_m) * -(-N // block_n),)
    _fp8_matmul_kernel[grid](
        a.contiguous(), a_scale.contiguous(), b.contiguous(), b_scale.contiguous(), c,
        M, N, K, a_scale.shape[1],
        B_ROWS=b_rows, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=FP8_BLOCK, GROUP=8,
        num_warps=8, num_stages=3,
    )
    return c


class _FP8Linear(torch.autograd.Function):
    """The three products of a linear layer, each with operands quantised along its own contraction:

    forward          y = x wᵀ       over K      x by 1×128 tiles        w by 128×128 blocks
    input gradient   dx = dy w      over N      dy by 1×128 tiles       w by the same blocks, transposed
    weight gradient  dw = dyᵀ x     over M      dyᵀ by 1×128 tiles      xᵀ by 1×128 tiles, result in fp32
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        q, scale = quantize_fp8(x)
        qw, scale_w = quantize_fp8_blocks(weight)
        keep = ctx.needs_input_grad
        ctx.save_for_backward(x if keep[1] else None, qw if keep[0] else None, scale_w if keep[0] else None)
        ctx.weight_dtype = weight.dtype
        return fp8_matmul(q, scale, qw, scale_w, dtype=x.dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple:
        dy = gradients[0].contiguous()
        x, qw, scale_w = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            q, scale = quantize_fp8(dy)
            dx = fp8_matmul(q, scale, qw.T.contiguous(), scale_w.T.contiguous(), dtype=dy.dtype)
        if ctx.needs_input_grad[1]:
            q, scale = quantize_fp8(dy.T)
            qx, scale_x = quantize_fp8(x.T)
            dw = fp8_matmul(q, scale, qx, scale_x, b_rows=1).to(ctx.weight_dtype)
        return dx, dw


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [N, K] transposed in FP8, forward and backward: [..., N] in x's dtype.

    The weight is a high-precision master, quantised anew in each pass. Any shape; no padding needed.
    """
    y = _FP8Linear.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.to(y.dtype)


# ------------------------------------------------------------------------------------------------------------
# NF4 and int8: frozen weights in half a byte or one byte
# ------------------------------------------------------------------------------------------------------------

NF4_BLOCK = 64  # weights that share an absmax (QLoRA, arXiv 2305.14314, §3)
NESTED_BLOCK = 256  # absmaxes that share a second-level absmax ("double quantisation")
# Quantiles of a standard normal, scaled to [−1, 1], with an exact 0 (QLoRA, appendix E).
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)


@functools.cache
def nf4_code(device: torch.device) -> Tensor:
    """The 16 values of NF4 [16] on a device, copied there once instead of in every product."""
    return torch.tensor(NF4_CODE, device=device)


@functools.cache
def dynamic_code(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of the dynamic 8-bit type [256], ascending (arXiv 2110.02861, §2.1): seven decades, each
    with twice as many steps as the one below it, and 0 and 1 exactly."""
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = 2**exponent * (1 if signed else 2)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += means.tolist() + ((-means).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def nearest_code(x: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest value of an ascending code, as uint8; ties go to the lower one."""
    return torch.bucketize(x, (code[:-1] + code[1:]) / 2).to(torch.uint8)


def quantize_blockwise(
    x: Tensor, code: Tensor, block: int = NESTED_BLOCK, signed_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantise x of any shape in flat blocks: (codes uint8 in x's shape, absmax fp32 [⌈n/block⌉]). A block of
    zeros has absmax 0."""
    flat = x.float().flatten()
    blocks = F.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))[:, 0]
    absmax = extreme if signed_scale else extreme.abs()
    scaled = blocks / torch.where(absmax == 0, 1.0, absmax)[:, None]
    return nearest_code(scaled, code).flatten()[: flat.numel()].view(x.shape), absmax


def dequantize_blockwise(q: Tensor, absmax: Tensor, code: Tensor, block: int = NESTED_BLOCK) -> Tensor:
    """The fp32 values that the codes of `quantize_blockwise` represent."""
    return code[q.int()] * absmax.repeat_interleave(block)[: q.numel()].view(q.shape)


def quantize_nf4(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w [N, K], K a multiple of 64, to NF4 with double quantisation: (packed uint8 [N, K/2], absmax codes
    uint8 [N, K/64], nested absmax fp32 [⌈N·K/64/256⌉], offset fp32 []). 0.516 bytes per weight.

    Codes, packing (first weight in the high four bits) and both levels are bitsandbytes'. Raises ValueError
    for other K.
    """
    N, K = w.shape
    if K % NF4_BLOCK:
        raise ValueError(f"NF4 needs rows of a multiple of {NF4_BLOCK} weights, not {K}")
    blocks = w.float().view(N, K // NF4_BLOCK, NF4_BLOCK)
    absmax = blocks.abs().amax(-1)
    codes = nearest_code(blocks / torch.where(absmax == 0, 1.0, absmax)[..., None], nf4_code(w.device)).view(
        N, K
    )
    offset = absmax.mean()
    absmax_codes, nested = quantize_blockwise(absmax - offset, dynamic_code(True, w.device))
    return (codes[:, ::2] << 4) | codes[:, 1::2], absmax_codes, nested, offset


def dequantize_nf4(packed: Tensor, absmax_codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """[N, K] in fp32."""
    N, half = packed.shape
    codes = torch.stack([packed >> 4, packed & 15], -1).view(N, half * 2)
    absmax = dequantize_blockwise(absmax_codes, nested, dynamic_code(True, packed.device)) + offset
    values = nf4_code(packed.device)[codes.int()]
    return (values.view(N, -1, NF4_BLOCK) * absmax[..., None]).view(N, -1)


def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K] to (int8 [N, K], fp32 row scale [N]), w ≈ q·scale: LLM.int8's weights (arXiv 2208.07339,
    §2.1)."""
    absmax = w.float().abs().amax(1)
    scale = torch.where(absmax == 0, 1.0, absmax / 127)
    return (w.float() / scale[:, None]).round().to(torch.int8), scale


@triton.jit
def _nf4_tile(
    packed_ptr, absmax_codes_ptr, nested_ptr, offset_ptr, code_ptr, dynamic_ptr, n, k_half, N, K,
    BLOCK_K: tl.constexpr,
):
    """A [BLOCK_N, BLOCK_K] tile of the weight, in fp32; `k_half` [BLOCK_K/2] are byte columns."""
    inside = (n[:, None] < N) & (k_half[None, :] < K // 2)
    byte = tl.load(packed_ptr + n[:, None].to(tl.int64) * (K // 2) + k_half[None, :], mask=inside, other=0)
    # Both weights of a byte share a block
    block = n[:, None].to(tl.int64) * (K // 64) + k_half[None, :] // 32
    absmax_code = tl.load(absmax_codes_ptr + block, mask=inside, other=0)
    absmax = tl.load(dynamic_ptr + absmax_code.to(tl.int32)) * tl.load(
        nested_ptr + block // 256, mask=inside, other=0.0
    )
    absmax = tl.where(inside, absmax + tl.load(offset_ptr), 0.0)
    high = tl.load(code_ptr + (byte >> 4).to(tl.int32)) * absmax
    low = tl.load(code_ptr + (byte & 15).to(tl.int32)) * absmax
    return tl.reshape(tl.join(high, low), [n.shape[0], BLOCK_K])


@triton.jit
def _nf4_matmul_kernel(
    x_ptr, packed_ptr, absmax_codes_ptr, nested_ptr, offset_ptr, code_ptr, dynamic_ptr, y_ptr, M, N, K,
    INPUT_GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y [M, N] = x [M, K] wᵀ, or with INPUT_GRADIENT y [M, K] = x [M, N] w, the weight dequantised tile by
    tile."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    half = tl.arange(0, BLOCK_K // 2)
    if INPUT_GRADIENT:
        k_half = tl.program_id(1) * (BLOCK_K // 2) + half
        offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for start in range(0, N, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            w = _nf4_tile(
                packed_ptr, absmax_codes_ptr, nested_ptr, offset_ptr, code_ptr, dynamic_ptr, offs_n,
                k_half, N, K, BLOCK_K,
            )
            inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
            g = tl.load(x_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :], mask=inside, other=0.0)
            total += tl.dot(g, w.to(g.dtype), input_precision="ieee")
        offs = offs_m[:, None].to(tl.int64) * K + offs_k[None, :]
        tl.store(
            y_ptr + offs, total.to(y_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_k[None, :] < K)
        )
    else:
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            w = _nf4_tile(
                packed_ptr, absmax_codes_ptr, nested_ptr, offset_ptr, code_ptr, dynamic_ptr, offs_n,
                start // 2 + half, N, K, BLOCK_K,
            )
            offs_k = start + tl.arange(0, BLOCK_K)
            inside = (offs_m[:, None] < M) & (offs_k[None, :] < K)
            a = tl.load(x_ptr + offs_m[:, None].to(tl.int64) * K + offs_k[None, :], mask=inside, other=0.0)
            total += tl.dot(a, tl.trans(w).to(a.dtype), input_precision="ieee")
        offs = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
        tl.store(
            y_ptr + offs, total.to(y_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N)
        )


@triton.jit
def _int8_matmul_kernel(
    x_ptr, q_ptr, scale_ptr, y_ptr, M, N, K,
    INPUT_GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """As _nf4_matmul_kernel, for q int8 [N, K] with one scale per row."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if INPUT_GRADIENT:
        offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for start in range(0, N, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            w = tl.load(
                q_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :],
                mask=(offs_n[:, None] < N) & (offs_k[None, :] < K),
                other=0,
            )
            s = tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0)
            inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
            g = tl.load(x_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :], mask=inside, other=0.0)
            total += tl.dot(g, (w.to(tl.float32) * s[:, None]).to(g.dtype), input_precision="ieee")
        offs = offs_m[:, None].to(tl.int64) * K + offs_k[None, :]
        tl.store(
            y_ptr + offs, total.to(y_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_k[None, :] < K)
        )
    else:
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            w = tl.load(
                q_ptr + offs_n[None, :].to(tl.int64) * K + offs_k[:, None],
                mask=(offs_n[None, :] < N) & (offs_k[:, None] < K),
                other=0,
            )
            inside = (offs_m[:, None] < M) & (offs_k[None, :] < K)
            a = tl.load(x_ptr + offs_m[:, None].to(tl.int64) * K + offs_k[None, :], mask=inside, other=0.0)
            total += tl.dot(a, w.to(a.dtype), input_precision="ieee")
        total *= tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
        offs = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
        tl.store(
            y_ptr + offs, total.to(y_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N)
        )


def _frozen_product(kind: str, x: Tensor, stored: tuple[Tensor, ...], input_gradient: bool) -> Tensor:
    """x [M, K] wᵀ, or x [M, N] w, for a weight stored as `kind`."""
    if kind == "fp8":
        qw, scale = stored
        q, scale_x = quantize_fp8(x)
        if input_gradient:
            return fp8_matmul(q, scale_x, qw.T.contiguous(), scale.T.contiguous(), dtype=x.dtype)
        return fp8_matmul(q, scale_x, qw, scale, dtype=x.dtype)
    if not use_triton(x):
        w = dequantize(kind, stored).to(x.dtype)
        return x @ w if input_gradient else x @ w.T
    N, K = stored[0].shape[0], stored[0].shape[1] * (2 if kind == "nf4" else 1)
    M, x = x.shape[0], x.contiguous()
    y = torch.empty(M, K if input_gradient else N, dtype=x.dtype, device=x.device)
    # fp32 products do not use tensor cores, and larger tiles would not fit into the registers.
    block_m = block_n = block_k = 64 if x.dtype.itemsize == 2 else 32
    columns = -(-K // block_k) if input_gradient else -(-N // block_n)
    how = dict(INPUT_GRADIENT=input_gradient, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4)
    grid = (-(-M // block_m), columns)
    if kind == "nf4":
        code, dynamic = nf4_code(x.device), dynamic_code(True, x.device)
        _nf4_matmul_kernel[grid](x, *stored, code, dynamic, y, M, N, K, **how)
    else:
        _int8_matmul_kernel[grid](x, *stored, y, M, N, K, **how)
    return y


class _FrozenLinear(torch.autograd.Function):
    """A linear layer with a frozen quantised weight: no dense copy of it outlives a pass."""

    @staticmethod
    def forward(ctx, x: Tensor, kind: str, *stored: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(*stored)
        return _frozen_product(kind, x, stored, input_gradient=False)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple:
        stored = ctx.saved_tensors  # read once: a recomputed tensor can be unpacked only once
        return (
            _frozen_product(ctx.kind, gradients[0], stored, input_gradient=True),
            None,
            *[None] * len(stored),
        )


def quantize(kind: str, w: Tensor) -> tuple[Tensor, ...]:
    """w [N, K] as `kind` stores it: nf4 (4 tensors), int8 (2) or fp8 (2); the first holds the weights."""
    return {"nf4": quantize_nf4, "int8": quantize_int8, "fp8": quantize_fp8_blocks}[kind](w)


def dequantize(kind: str, stored: tuple[Tensor, ...]) -> Tensor:
    """The fp32 weight [N, K] that `quantize` stored."""
    if kind == "nf4":
        return dequantize_nf4(*stored)
    q, scale = stored
    return q.float() * scale[:, None] if kind == "int8" else dequantize_fp8(q, scale, FP8_BLOCK)


def frozen_linear(x: Tensor, kind: str, stored: tuple[Tensor, ...], bias: Tensor | None = None) -> Tensor:
    """x [..., K] times a frozen quantised weight: [..., N]. Gradients flow to x only."""
    y = _FrozenLinear.apply(x.flatten(0, -2), kind, *stored).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(y.dtype)


# ------------------------------------------------------------------------------------------------------------
# AdamW with 8-bit states
# ------------------------------------------------------------------------------------------------------------


MOMENTS = ("exp_avg", "exp_avg_sq")
SLICE = 1 << 22  # elements that are updated at once: their fp32 copies take 32 bytes each


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _slices(count: int) -> Iterator[slice]:
    return (slice(begin, min(begin + SLICE, count)) for begin in range(0, count, SLICE))


def _blocks(elements: slice) -> slice:
    """The blocks of 256 elements that a slice covers; the slice begins at a block."""
    return slice(elements.start // NESTED_BLOCK, -(-elements.stop // NESTED_BLOCK))


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose two moments are kept in 8 bits, block-wise over 256 values with the
    dynamic code (arXiv 2110.02861): 2.03 bytes per parameter instead of 8. Tensors below 4,096 elements keep
    fp32 moments.

    A state dict holds the moments dequantised, under AdamW's names and shapes, so checkpoints are resharded
    like any other. Quantising them again gives the same codes: resuming is exact.
    """

    def __init__(
        self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                weights, gradients = _local(parameter).view(-1), _local(parameter.grad).reshape(-1)
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    for name in MOMENTS:
                        state[name] = self._pack(torch.zeros_like(_local(parameter)), name)
                state["step"] += 1
                t = state["step"].item()
                for elements in _slices(weights.numel()):
                    p, g = weights[elements], gradients[elements].float()
                    m = self._unpack(state["exp_avg"], "exp_avg", elements).lerp_(g, 1 - beta1)
                    v = self._unpack(state["exp_avg_sq"], "exp_avg_sq", elements)
                    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                    denominator = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.addcdiv_((m / (1 - beta1**t)).to(p.dtype), denominator.to(p.dtype), value=-group["lr"])
                    self._store(state["exp_avg"], "exp_avg", elements, m)
                    self._store(state["exp_avg_sq"], "exp_avg_sq", elements, v)

    @classmethod
    def _pack(cls, x: Tensor, name: str, device: torch.device | None = None):
        """The moment x [...] in its stored form on `device` (default: x's own): fp32, or (codes, absmax)."""
        device = device or x.device
        if x.numel() < 4096:
            return x.to(device, torch.float32)
        packed = (
            torch.empty(x.shape, dtype=torch.uint8, device=device),
            torch.empty(-(-x.numel() // NESTED_BLOCK), device=device),
        )
        for elements in _slices(x.numel()):
            cls._store(packed, name, elements, x.reshape(-1)[elements].to(device))
        return packed

    @staticmethod
    def _store(packed, name: str, elements: slice, values: Tensor) -> None:
        if isinstance(packed, Tensor):
            packed.view(-1)[elements] = values
            return
        # The signed code has 1 but not −1: scaling by the signed extreme value stores that value exactly, and
        # quantising the dequantised moments gives the same codes.
        code = dynamic_code(name == "exp_avg", values.device)
        codes, absmax = quantize_blockwise(values, code, signed_scale=True)
        packed[0].view(-1)[elements], packed[1][_blocks(elements)] = codes, absmax

    @staticmethod
    def _unpack(packed, name: str, elements: slice) -> Tensor:
        if isinstance(packed, Tensor):
            return packed.view(-1)[elements].clone()
        codes, absmax = packed[0].view(-1)[elements], packed[1][_blocks(elements)]
        return dequantize_blockwise(codes, absmax, dynamic_code(name == "exp_avg", codes.device))

    def _dequantized(self, packed, name: str) -> Tensor:
        """The whole moment in fp32, in host memory: saving must not use the GPU memory that 8 bits freed."""
        first = packed if isinstance(packed, Tensor) else packed[0]
        moment = torch.empty(first.shape, device="cpu")
        for elements in _slices(first.numel()):
            moment.view(-1)[elements] = self._unpack(packed, name, elements).cpu()
        return moment

    def state_dict(self) -> dict:
        held, whole = self.state, {}
        for parameter, state in held.items():
            whole[parameter] = {"step": state["step"]}
            for name in MOMENTS:
                value = self._dequantized(state[name], name)
                if isinstance(parameter, DTensor):
                    value = DTensor.from_local(
                        value, parameter.device_mesh, parameter.placements, shape=parameter.shape,
                        stride=parameter.stride(), run_check=False,
                    )
                whole[parameter][name] = value
        self.state = whole  # type: ignore[assignment]
        try:
            return super().state_dict()
        finally:
            self.state = held

    def load_state_dict(self, state_dict: dict) -> None:
        saved = state_dict["state"]
        steps = {k: {n: x for n, x in state.items() if n not in MOMENTS} for k, state in saved.items()}
        super().load_state_dict({**state_dict, "state": steps})
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        ours = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, ours, strict=True):
            for name in MOMENTS:
                if name in saved.get(key, {}):
                    moment = _local(saved[key][name])
                    self.state[parameter][name] = self._pack(moment, name, _local(parameter).device)
