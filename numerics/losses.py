"""Loss and log-probabilities from hidden states and the head, without storing all logits: they are computed
one chunk at a time, and the gradient while the chunk is in cache. Each function has a plain-torch reference;
if there is a Triton kernel too, the public function uses it on a GPU (`KERNELS` overrides, as in
kernels.py)."""

# Triton kernels are typed by Triton's compiler, not by Python's rules:
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportIndexIssue=false

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from kernels import soft_cap, tl, triton, use_triton

# Elements of logits that exist at one time: 64 MiB in fp32. With fewer than 256 tokens per chunk the products
# get slow: at a vocabulary of 151,936 chunks of 64 take twice as long as chunks of 220 (bench/loss.py).
LOGITS_PER_CHUNK = 2**24
TOKENS_PER_CHUNK = 256


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, nll_ptr, V, softcap,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program per row of logits [c, V]: computes its NLL, and with GRADIENT replaces the logits by
    d NLL / d logits. Two passes over the row instead of torch's seven."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    top = float("-inf")
    total = 0.0
    chosen = 0.0  # read in the loop: after the last reduction another warp might have overwritten it
    for start in range(0, V, BLOCK):
        offs_v = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + row * V + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        if SOFTCAP:
            z = tl.where(offs_v < V, soft_cap(z, softcap), float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        chosen += tl.sum(tl.where(offs_v == label, z, 0.0), 0)
        top = new_top
    tl.store(nll_ptr + row, top + tl.log(total) - chosen)
    if GRADIENT:
        for start in range(0, V, BLOCK):
            offs_v = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + row * V + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
            if SOFTCAP:
                z = soft_cap(z, softcap)
            d = tl.exp(z - top) / total - tl.where(offs_v == label, 1.0, 0.0)
            if SOFTCAP:
                d = d * (1 - (z / softcap) * (z / softcap))
            tl.store(logits_ptr + row * V + offs_v, d.to(logits_ptr.dtype.element_ty), mask=offs_v < V)


def _add_gradients(
    d_logits: Tensor, x: Tensor, weight: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, rows: slice
) -> None:
    """A chunk's part of the gradients of hidden states and head, from d_logits [c, V]."""
    if d_hidden is not None:
        torch.mm(d_logits, weight, out=d_hidden[rows])
    if d_weight is not None:
        if d_weight.dtype == x.dtype:
            d_weight.addmm_(d_logits.T, x)
        else:
            d_weight += d_logits.T @ x


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of NLLs. Gradients are computed in the forward pass, while each chunk's probabilities exist: the
    logits are computed only once, and backward only multiplies by the upstream scalar."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, chunk: int
    ) -> Tensor:
        N = hidden.shape[0]
        precise = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        # The sum over chunks is kept in fp32: bf16 would lose the small contributions of later chunks.
        d_weight = torch.zeros(weight.shape, dtype=precise, device=weight.device) if need_weight else None
        total = torch.zeros((), dtype=precise, device=hidden.device)
        fused = use_triton(hidden) and hidden.dtype != torch.float64
        buffer = _logits_buffer(hidden, weight, chunk)
        for begin in range(0, N, chunk):
            rows = slice(begin, begin + chunk)
            x, target = hidden[rows], labels[rows, None]
            if fused:
                d_logits = torch.mm(x, weight.T, out=buffer[: len(x)])  # [c, V], in hidden's own precision
                nll = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
                _cross_entropy_kernel[(x.shape[0],)](
                    d_logits, target, nll, weight.shape[0], softcap or 1.0, SOFTCAP=softcap is not None,
                    GRADIENT=need_hidden or need_weight, BLOCK=4096, num_warps=8,
                )
                total += nll.sum()
                _add_gradients(d_logits, x, weight, d_hidden, d_weight, rows)
                continue
            logits, slope = torch.mm(x, weight.T, out=buffer[: len(x)]).to(precise), None  # [c, V]
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
                slope = 1 - (logits / softcap).square()
            logits.sub_(logits.amax(-1, keepdim=True))  # exp never overflows
            chosen = logits.gather(-1, target)
            sums = logits.exp_().sum(-1, keepdim=True)
            total += (sums.log() - chosen).sum()
            if not (need_hidden or need_weight):
                continue
            d_logits = logits.div_(sums)  # softmax
            d_logits.scatter_add_(-1, target, torch.full_like(chosen, -1.0))
            if slope is not None:
                d_logits.mul_(slope)
            _add_gradients(d_logits.to(hidden.dtype), x, weight, d_hidden, d_weight, rows)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple:
        (upstream,) = gradients
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * upstream.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = d_weight.mul_(upstream.to(d_weight.dtype))  # [V, D] is the largest tensor: no copy
        return d_hidden, d_weight, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None = None, chunk: int | None = None
) -> Tensor:
    """Sum over tokens of −log softmax(hidden @ weight.T)[label], without ever holding [N, V] logits.

    hidden [N, D], weight [V, D], labels [N] with −100 where a token is not trained: such rows cost nothing.
    Returns a scalar in fp32 (fp64 for fp64 input). Exact to the naive computation in value and gradient; peak
    memory is one chunk of logits and one [V, D] gradient. `softcap` is Gemma 2's final soft cap; `chunk`
    tokens are processed at a time. Backward may be called once.
    """
    weight = weight.to(hidden.dtype)
    trained = labels != -100
    if not trained.all():
        keep = trained.nonzero().flatten()
        hidden, labels = hidden.index_select(0, keep), labels.index_select(0, keep)
    if chunk is None:
        chunk = max(TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, labels, softcap, chunk)


@dataclass
class TokenStatistics:
    """Statistics of each token [N] under the tempered distribution, from one pass over the vocabulary."""

    logprobs: Tensor  # of the label; 0 on rows that are not trained
    entropy: Tensor  # −Σ p log p, nats
    logsumexp: Tensor  # of the tempered logits
    argmax: Tensor  # the likeliest token, int64; −1 on rows that are not trained


def _chunk_logits(
    x: Tensor, weight: Tensor, temperature: float, softcap: float | None, buffer: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Tempered logits [c, V] in fp32 or better, in `buffer` where its type allows, and d(capped)/d(raw) where
    there is a soft cap."""
    raw = torch.mm(x, weight.T, out=buffer[: x.shape[0]])
    logits = raw.to(torch.promote_types(x.dtype, torch.float32))
    slope = None
    if softcap is not None:
        logits = logits.div_(softcap).tanh_()
        slope = 1 - logits.square()
        logits.mul_(softcap)
    return logits.div_(temperature) if temperature != 1 else logits, slope


def _logits_buffer(x: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """A buffer for one chunk's logits, reused by all chunks: allocating it anew costs more than the
    arithmetic."""
    return torch.empty(min(chunk, x.shape[0]), weight.shape[0], dtype=x.dtype, device=x.device)


def _partial_statistics_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, softcap: float | None, chunk: int
) -> Tensor:
    """Over the rows of `weight` [V, D]: per token the maximal logit, Σ e^(z−max), Σ z·e^(z−max), the label's
    logit (−inf if the label is not among these rows) and the index of the maximum: [N, 5]. The results of
    several parts of a vocabulary can be merged."""
    parts = []
    buffer = _logits_buffer(hidden, weight, chunk)
    # On a CPU process a few rows at a time, so that they stay in cache between passes.
    few = chunk if hidden.is_cuda else max(1, 2**19 // weight.shape[0])
    for begin in range(0, hidden.shape[0], chunk):
        chunk_logits, _ = _chunk_logits(hidden[begin : begin + chunk], weight, temperature, softcap, buffer)
        chunk_labels = labels[begin : begin + chunk]
        for logits, label in zip(chunk_logits.split(few), chunk_labels.split(few), strict=True):
            here = (label >= 0) & (label < weight.shape[0])
            chosen = logits.gather(-1, label.clamp(0, weight.shape[0] - 1)[:, None])[:, 0]
            top, index = logits.max(-1)
            weights = logits.sub_(top[:, None]).exp()
            total = weights.sum(-1)
            weighted = torch.linalg.vecdot(weights, logits) + top * total
            chosen = chosen.where(here, -torch.inf)
            parts.append(torch.stack([top, total, weighted, chosen, index.to(top.dtype)], -1))
    return (
        torch.cat(parts)
        if parts
        else hidden.new_zeros(0, 5, dtype=torch.promote_types(hidden.dtype, torch.float32))
    )


@triton.jit
def _partial_statistics_kernel(
    hidden_ptr, weight_ptr, labels_ptr, out_ptr, N, V, D, per_split, temperature, softcap,
    SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """The statistics of BLOCK_N tokens over one split of the vocabulary, logits never leaving the
    registers."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    label = tl.load(labels_ptr + offs_n, mask=offs_n < N, other=-1)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    weighted = tl.zeros([BLOCK_N], tl.float32)
    chosen = tl.full([BLOCK_N], float("-inf"), tl.float32)
    best = tl.zeros([BLOCK_N], tl.int32)
    offs_d = tl.arange(0, BLOCK_D)
    first = split * per_split
    for start in range(first, tl.minimum(first + per_split, V), BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        logits = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start_d in range(0, D, BLOCK_D):
            x = tl.load(hidden_ptr + offs_n[:, None].to(tl.int64) * D + start_d + offs_d[None, :],
                        mask=(offs_n[:, None] < N) & (start_d + offs_d[None, :] < D), other=0.0)
            w = tl.load(weight_ptr + offs_v[None, :].to(tl.int64) * D + start_d + offs_d[:, None],
                        mask=(offs_v[None, :] < V) & (start_d + offs_d[:, None] < D), other=0.0)
            logits = tl.dot(x, w, logits, input_precision="ieee")
        if SOFTCAP:
            logits = soft_cap(logits, softcap)
        logits = logits / temperature
        logits = tl.where(offs_v[None, :] < V, logits, float("-inf"))
        block_top, block_index = tl.max(logits, 1, return_indices=True)
        best = tl.where(block_top > top, start + block_index, best)
        new_top = tl.maximum(top, block_top)
        shrink = tl.exp(top - new_top)
        e = tl.exp(logits - new_top[:, None])
        total = total * shrink + tl.sum(e, 1)
        weighted = weighted * shrink + tl.sum(tl.where(e > 0, e * logits, 0.0), 1)
        top = new_top
        hit = tl.max(tl.where(offs_v[None, :] == label[:, None], logits, float("-inf")), 1)
        chosen = tl.maximum(chosen, hit)
    out_ptrs = out_ptr + (split * N + offs_n).to(tl.int64) * 5
    tl.store(out_ptrs, top, mask=offs_n < N)
    tl.store(out_ptrs + 1, total, mask=offs_n < N)
    tl.store(out_ptrs + 2, weighted, mask=offs_n < N)
    tl.store(out_ptrs + 3, chosen, mask=offs_n < N)
    tl.store(out_ptrs + 4, best.to(tl.float32), mask=offs_n < N)


def _partial_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, softcap: float | None, chunk: int
) -> Tensor:
    """As the reference, but [parts, N, 5]: the kernel returns one part per split of the vocabulary."""
    if not use_triton(hidden) or hidden.dtype == torch.float64 or hidden.shape[0] == 0:
        return _partial_statistics_reference(hidden, weight, labels, temperature, softcap, chunk)[None]
    N, D = hidden.shape
    V = weight.shape[0]
    assert V < 2**24, "indices are kept in fp32"
    # fp32 products do not use tensor cores, and larger tiles would not fit into the registers.
    block_n, block_v, block_d = (64, 64, 64) if hidden.dtype.itemsize == 2 else (64, 32, 32)
    # Enough programs to fill a GPU even with few tokens
    splits = max(1, min(16, 256 // -(-N // block_n)))
    per_split = -(-V // (splits * block_v)) * block_v
    splits = -(-V // per_split)
    out = torch.empty(splits, N, 5, device=hidden.device)
    _partial_statistics_kernel[(-(-N // block_n), splits)](
        hidden.contiguous(), weight.contiguous(), labels.to(torch.int32), out, N, V, D, per_split,
        temperature,
        softcap or 1.0, SOFTCAP=softcap is not None, BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_D=block_d,
        num_warps=4, num_stages=3,
    )
    return out


def _merge_statistics(parts: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """parts [P, N, 5] over P pieces of the vocabulary, piece p starting at offsets[p]: (log-sum-exp,
    entropy, the label's logit, argmax), each [N]."""
    top, total, weighted, chosen, index = parts.unbind(-1)
    highest = top.amax(0)
    shrink = (top - highest).exp()
    total, weighted = (total * shrink).sum(0), (weighted * shrink).sum(0)
    logsumexp = highest + total.log()
    piece = top.argmax(0)
    argmax = index.gather(0, piece[None])[0].long() + offsets[piece]
    return logsumexp, logsumexp - weighted / total, chosen.amax(0), argmax


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, softcap, chunk, group, offset):
        first = 0 if group is None else offset
        parts = _partial_statistics(hidden, weight, labels - first, temperature, softcap, chunk)
        splits = parts.shape[0]
        offsets = torch.zeros(splits, dtype=torch.long, device=hidden.device)
        if group is not None:  # every rank's pieces; kernel and reference give indices within a rank's rows
            logsumexp, entropy, chosen, argmax = _merge_statistics(parts, offsets)
            own_logits = torch.stack(
                [logsumexp, (logsumexp - entropy), chosen, (argmax + first).to(logsumexp.dtype)], -1
            )
            everyone = [torch.empty_like(own_logits) for _ in range(td.get_world_size(group))]
            top = parts[..., 0].amax(0)
            tops = [torch.empty_like(top) for _ in everyone]
            td.all_gather(everyone, own_logits.contiguous(), group=group)
            td.all_gather(tops, top.contiguous(), group=group)
            logsumexps, means, chosens, argmaxes = torch.stack(everyone).unbind(-1)
            logsumexp = logsumexps.logsumexp(0)
            entropy = logsumexp - (means * (logsumexps - logsumexp).exp()).sum(0)
            chosen = chosens.amax(0)
            argmax = argmaxes.gather(0, torch.stack(tops).argmax(0)[None])[0].long()
        else:
            logsumexp, entropy, chosen, argmax = _merge_statistics(parts, offsets)
        ctx.save_for_backward(hidden, weight, labels, logsumexp, entropy)
        ctx.how = (temperature, softcap, chunk, group, first)
        ctx.mark_non_differentiable(argmax)
        ctx.set_materialize_grads(False)  # an entropy that nobody differentiates costs nothing
        return chosen - logsumexp, entropy, logsumexp, argmax

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple:
        g_logprobs, g_entropy, g_logsumexp, _ = gradients
        hidden, weight, labels, logsumexp, entropy = ctx.saved_tensors
        temperature, softcap, chunk, group, first = ctx.how
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        precise = logsumexp.dtype
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=precise, device=weight.device) if need_weight else None
        buffer = _logits_buffer(hidden, weight, chunk)
        for begin in range(0, hidden.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            x, label = hidden[rows], labels[rows] - first
            logits, slope = _chunk_logits(x, weight, temperature, softcap, buffer)
            logp = logits.sub_(logsumexp[rows, None])
            # d logprob = onehot − p;  d entropy = −p (log p + H);  d logsumexp = p
            scale = torch.zeros_like(logsumexp[rows])
            if g_logsumexp is not None:
                scale += g_logsumexp[rows]
            if g_logprobs is not None:
                scale -= g_logprobs[rows]
            if g_entropy is None:
                d_logits = logp.exp_().mul_((scale / temperature)[:, None])
            else:
                p = logp.exp()
                d_logits = p * scale[:, None]
                d_logits -= g_entropy[rows, None] * p * (logp + entropy[rows, None]).where(p > 0, 0.0)
                d_logits.div_(temperature)
            if g_logprobs is not None:
                here = (label >= 0) & (label < weight.shape[0])
                add = g_logprobs[rows].where(here, 0.0)[:, None] / temperature
                d_logits.scatter_add_(-1, label.clamp(0, weight.shape[0] - 1)[:, None], add)
            if slope is not None:
                d_logits.mul_(slope)
            _add_gradients(d_logits.to(hidden.dtype), x, weight, d_hidden, d_weight, rows)
        if d_hidden is not None and group is not None:
            td.all_reduce(d_hidden, group=group)  # each rank saw its part of the vocabulary only
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), *[None] * 6


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    group: Any = None,
    offset: int = 0,
) -> TokenStatistics:
    """Log-probability of each label, entropy, log-sum-exp and argmax of softmax(hidden @ weight.T /
    temperature), without ever holding [N, V] logits; differentiable in hidden and weight (a frozen weight
    gets no dense gradient).

    hidden [N, D], weight [V, D], labels [N]; rows with −100 cost nothing and return zeros. With
    `group` the vocabulary is sharded: `weight` are this rank's rows, starting at row `offset`; every rank
    gets the complete result. Statistics are in fp32 (fp64 for fp64 input) and finite for logits of any size.
    """
    weight = weight.to(hidden.dtype)
    N = hidden.shape[0]
    keep = (labels != -100).nonzero().flatten()
    if chunk is None:
        chunk = max(TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // weight.shape[0])
    outputs = _LinearLogprobs.apply(
        hidden.index_select(0, keep), weight, labels.index_select(0, keep), temperature, softcap, chunk,
        group, offset,
    )
    if len(keep) == N:
        return TokenStatistics(*outputs)
    *floats, argmax = outputs
    spread = [torch.zeros(N, dtype=x.dtype, device=x.device).index_copy(0, keep, x) for x in floats]
    return TokenStatistics(*spread, torch.full((N,), -1, device=hidden.device).index_copy(0, keep, argmax))
