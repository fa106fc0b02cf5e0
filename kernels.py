"""The operations that dominate a run's memory and time: attention over packed documents, norms and
activations. The loss is in numerics/losses.py, 8 and 4 bits are in numerics/low_precision.py.

Each operation has a plain-torch reference, which is exact and runs everywhere; if there is a Triton kernel
too, the public function uses it on a GPU. `KERNELS=torch` or `KERNELS=triton` in the
environment overrides the choice, so that a NaN can be bisected to a kernel in one run.

    python kernels.py clear-cache        empty Triton's cache, after a kernel was edited
"""

# Triton kernels are typed by Triton's compiler, not by Python's rules:
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportIndexIssue=false

import functools
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.attention.flex_attention
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # no wheel for macOS and Windows: every function uses its torch form there
    HAS_TRITON = False
    triton = tl = types.SimpleNamespace(jit=lambda function: function, constexpr=object)  # type: ignore

# Queries per block of explicitly masked attention; bounds its memory to QUERY_BLOCK × T
QUERY_BLOCK = 512


def use_triton(x: Tensor) -> bool:
    """Whether an operation on x uses its Triton kernel: on GPUs, unless KERNELS says otherwise."""
    choice = os.environ.get("KERNELS", "")
    if choice not in ("", "torch", "triton"):
        raise ValueError(f"KERNELS={choice!r} in the environment: use torch or triton")
    return choice == "triton" or (choice == "" and x.is_cuda and HAS_TRITON)


# ------------------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------------------


class Documents:
    """The documents in packed rows: computed once per forward pass, shared by all layers.

    `document_ids` [B, T]: a run of equal ids in a row is one document, a negative id is padding. Documents of
    similar length are grouped in dense buckets, so that a row of a hundred short answers costs one attention
    call instead of a hundred. Right padding inside a bucket needs no mask: under a causal mask no real
    query sees a later key.
    """

    def __init__(self, document_ids: Tensor):
        B, T = document_ids.shape
        device = document_ids.device
        ids = document_ids.cpu()
        first = torch.ones(B, T, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = first.flatten().nonzero().flatten()
        ends = torch.cat([starts[1:], torch.tensor([B * T])])
        real = ids.flatten()[starts] >= 0
        spans = sorted(zip((ends - starts)[real].tolist(), starts[real].tolist(), strict=True), reverse=True)

        self.buckets: list[tuple[int, int]] = []  # (documents n, length L): n·L consecutive slots
        token_of_slot, lengths = [], torch.zeros(B * T, dtype=torch.long)
        slot_of_token = torch.full((B * T,), -1)
        first_slots = []
        slots, i = 0, 0
        while i < len(spans):
            longest = spans[i][0]
            n = 1
            while i + n < len(spans) and (spans[i + n][0] >= 0.75 * longest or longest <= 32):
                n += 1
            length, start = torch.tensor(spans[i : i + n]).unbind(1)
            column = torch.arange(longest)
            # A slot past its document's end repeats the last token: finite, and no real query looks at it.
            token = start[:, None] + torch.minimum(column[None], length[:, None] - 1)
            inside = column[None] < length[:, None]
            slot_of_token[token[inside]] = (slots + torch.arange(n * longest)).view(n, longest)[inside]
            lengths[token[inside]] = length[:, None].expand(n, longest)[inside]
            token_of_slot.append(token.flatten())
            first_slots.append((slots + torch.arange(n) * longest).repeat_interleave(longest))
            self.buckets.append((n, longest))
            slots += n * longest
            i += n
        # For each slot: the first slot of its document, and the token that it holds.
        self.first_slot = torch.cat(first_slots or [torch.zeros(0, dtype=torch.long)]).to(device)
        self.token_of_slot = torch.cat(token_of_slot or [torch.zeros(0, dtype=torch.long)]).to(device)
        self.tokens = (slot_of_token >= 0).nonzero().flatten().to(device)  # tokens that are not padding
        self.slots = slot_of_token[slot_of_token >= 0].to(device)  # their slots, in the same order
        self.lengths = lengths.view(B, T).to(device)  # of the document that a token is in; 0 on padding

    @functools.cached_property
    def spans(self) -> Tensor:
        """The first and the last token of each token's document, as flat indices, int32 [2, N]. For a
        padding token the first lies after it and the last before it: it attends to nothing and is masked."""
        N = self.lengths.numel()
        index = torch.arange(N, device=self.lengths.device)
        length = self.lengths.flatten()
        # Slots of a document are consecutive, so a token's place in its document is known from its slot.
        first = torch.full((N,), 0x7FFFFFFF, device=index.device)
        first[self.tokens] = self.token_of_slot[self.first_slot[self.slots]]
        last = torch.where(length > 0, first + length - 1, -1)
        return torch.stack([first, last]).to(torch.int32)


def _of_each_token(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Of spans that lie one after the other: of each token its span, and its place in that."""
    span = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return span, torch.arange(len(span)) - (lengths.cumsum(0) - lengths)[span]


class SharedPrompts:
    """Documents with continuations, in one packed row: document, its continuations, the next document, ….

    A continuation is (P, L): L tokens after the first P tokens of its document. Its tokens attend to
    those P and to earlier tokens of the continuation; the document is computed once for all its
    continuations. `groups` are (length of a document, its continuations): a prompt and its completions, or a
    document and the blocks that branch off it.
    """

    TILE = 64  # short continuations of a document share attention tiles of up to this many tokens

    def __init__(self, groups: list[tuple[int, list[tuple[int, int]]]], device: torch.device):
        self.device, self.groups = device, groups
        spans: list[tuple[int, int, int, int]] = []  # document, continuation or −1, P, tokens
        # Each tile is (longest P, tokens, first token of the document, [(P, L, first own token)]).
        tiles: list[tuple[int, int, int, list[tuple[int, int, int]]]] = []
        at = 0
        for number, (length, continuations) in enumerate(groups):
            document, open_tile = at, False
            spans.append((number, -1, length, length))
            at += length
            for index, (P, L) in enumerate(continuations):
                assert 0 < P <= length and L > 0
                if open_tile and tiles[-1][1] + L <= self.TILE:
                    most, count, _, parts = tiles[-1]
                    tiles[-1] = (max(most, P), count + L, document, [*parts, (P, L, at)])
                else:
                    tiles.append((P, L, document, [(P, L, at)]))
                    open_tile = True
                spans.append((number, index, P, L))
                at += L
        table = torch.tensor(spans)
        number, index, P, L = table.unbind(1)
        span, within = _of_each_token(L)
        continued = index >= 0
        self.position_ids = (within + torch.where(continued, P, 0)[span])[None].to(device)
        # Continuations count as padding here
        self.prompts = Documents(torch.where(continued, -1, number)[span][None].to(device))
        self._kinds = table[span, :3].to(device)
        self._block_masks: dict[int | None, Any] = {}
        self._visible: dict[tuple[int, int | None], Tensor] = {}
        # Buckets of tiles of similar shape: (tokens [n, Q], which of them are real, keys [n, P + Q]); and the
        # rules for which query sees which key.
        self.buckets: list[tuple[Tensor, Tensor, Tensor]] = []
        self._rules: list[tuple[Tensor, ...]] = []
        tiles.sort(key=lambda tile: tile[:2], reverse=True)
        i = 0
        while i < len(tiles):
            P_most, Q_most = tiles[i][:2]
            n = 1
            while i + n < len(tiles):
                P, Q = tiles[i + n][:2]
                alike = 0.75 * P_most <= P and 0.5 * Q_most <= Q <= 2 * Q_most
                if not alike and not (P_most <= 64 and max(Q, Q_most) <= self.TILE):
                    break
                Q_most = max(Q, Q_most)
                n += 1
            self._add_bucket(tiles[i : i + n], P_most, Q_most)
            i += n

    def _add_bucket(self, tiles: list, P_most: int, Q_most: int) -> None:
        """A tile's keys are the document's first P tokens, then its own. Padding copies the last token's
        query mask; as a key it is masked."""
        parts = torch.tensor([(which, *part) for *_, own in tiles for which, part in enumerate(own)])
        which, P, L, first = parts.unbind(1)
        span, within = _of_each_token(L)
        count, columns = torch.tensor([tile[1] for tile in tiles])[:, None], torch.arange(Q_most)[None]
        inside = columns < count

        def padded(values: Tensor) -> Tensor:
            table = torch.zeros(inside.shape, dtype=torch.long)
            table[inside] = values  # tile after tile, as the parts are
            return table.gather(1, columns.minimum(count - 1))

        token, position = padded(first[span] + within), padded(P[span] + within)
        owner, prefix = padded(which[span]), padded(P[span])
        document, before = torch.tensor([tile[2] for tile in tiles])[:, None], torch.arange(P_most)[None]
        keys = torch.cat([document + before.minimum(prefix.amax(1, keepdim=True) - 1), token], dim=1)
        self.buckets.append((token.to(self.device), inside.to(self.device), keys.to(self.device)))
        key_owner = owner.where(inside, -1)
        rule = (before, prefix, position, owner, key_owner)
        self._rules.append(tuple(x.to(self.device) for x in rule))

    def visible(self, bucket: int, window: int | None) -> Tensor:
        """[n, 1, Q, P + Q]: which keys the queries of a bucket see. Computed once per forward pass, shared by
        all layers."""
        if (bucket, window) not in self._visible:
            before, prefix, position, owner, key_owner = self._rules[bucket]
            own = (owner[:, :, None] == key_owner[:, None]) & (position[:, None] <= position[:, :, None])
            shared = before[:, None] < prefix[:, :, None]
            if window is not None:
                shared = shared & (before[:, None] > position[:, :, None] - window)
                own &= position[:, None] > position[:, :, None] - window
            self._visible[bucket, window] = torch.cat([shared, own], dim=-1)[:, None]
        return self._visible[bucket, window]

    def predicate(self, window: int | None) -> tuple[Callable, Any]:
        """The same mask as a flex_attention predicate on flat token indices, and its cached block mask."""
        group, own, prefix = self._kinds.unbind(1)
        position = self.position_ids[0]

        def sees(b, h, q, k):
            reached = (own[k] == own[q]) | ((own[k] == -1) & (position[k] < prefix[q]))
            seen = (group[q] == group[k]) & reached & (position[k] <= position[q])
            return seen if window is None else seen & (position[k] > position[q] - window)

        if window not in self._block_masks:
            N = position.numel()
            self._block_masks[window] = make_block_mask(sees, 1, 1, N, N, self.device)
        return sees, self._block_masks[window]


def _shared_prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, shared: SharedPrompts, scale: float, window: int | None,
    softcap: float | None
) -> Tensor:
    """q [1, N, H, E], k and v [1, N, K, E] → [1, N, H, E]."""
    if q.is_cuda:
        sees, mask = shared.predicate(window)
        return predicate_attention(q, k, v, sees, scale=scale, softcap=softcap, block_mask=mask)
    out = attention(q, k, v, scale=scale, documents=shared.prompts, window=window, softcap=softcap)[0]
    for bucket, (token, inside, keys) in enumerate(shared.buckets):
        n, L = token.shape
        queries = q[0].index_select(0, token.flatten()).view(n, L, *q.shape[2:]).transpose(1, 2)
        seen = shared.visible(bucket, window)
        kb, vb = (
            x[0].index_select(0, keys.flatten()).view(*keys.shape, *x.shape[2:]).transpose(1, 2)
            for x in (k, v)
        )
        attended = _masked(queries, kb, vb, seen, scale, softcap).transpose(1, 2)
        out = out.index_copy(0, token[inside], attended[inside])
    return out[None]


class _ToSlots(torch.autograd.Function):
    """x [N, …] → [slots, …]. Backward is a gather too: each real token has one slot, and repeats get no
    gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, documents: Documents) -> Tensor:
        ctx.documents, ctx.shape = documents, x.shape
        return x.index_select(0, documents.token_of_slot)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple:
        (gradient,) = gradients
        real = gradient.index_select(0, ctx.documents.slots)
        if real.shape[0] == ctx.shape[0]:
            return real, None
        return gradient.new_zeros(ctx.shape).index_copy_(0, ctx.documents.tokens, real), None


class _FromSlots(torch.autograd.Function):
    """y [slots, …] → [N, …], zero on padding."""

    @staticmethod
    def forward(ctx, y: Tensor, documents: Documents, N: int) -> Tensor:
        ctx.documents, ctx.shape = documents, y.shape
        real = y.index_select(0, documents.slots)
        if real.shape[0] == N:
            return real
        return y.new_zeros(N, *y.shape[1:]).index_copy_(0, documents.tokens, real)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple:
        (gradient,) = gradients
        real = gradient if gradient.shape[0] == len(ctx.documents.tokens) else gradient[ctx.documents.tokens]
        return gradient.new_zeros(ctx.shape).index_copy_(0, ctx.documents.slots, real), None, None


@triton.jit
def soft_cap(x, softcap):
    """softcap · tanh(x / softcap), for x of any size."""
    e = tl.exp(2 * tl.minimum(tl.maximum(x / softcap, -15.0), 15.0))
    return softcap * (e - 1) / (e + 1)


@triton.jit
def _scores(q, k, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores of a tile, soft-capped: q [M, E], k [E, N] → [M, N]."""
    s = tl.dot(q, k, input_precision="ieee") * scale
    return soft_cap(s, softcap) if SOFTCAP else s


@triton.jit
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, first_ptr, last_ptr, N, scale, softcap,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """FlashAttention-2 (arXiv 2307.08691, algorithm 1) over concatenated documents: a block of queries reads
    only keys from its oldest visible one on, and masks the invisible ones among them."""
    start, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    zero = start.to(tl.int64) * 0  # makes what it is added to int64: offsets may pass 2^31
    offs_m = start + tl.arange(0, BLOCK_M)
    offs_e = tl.arange(0, BLOCK_E)
    oldest = tl.load(first_ptr + offs_m, mask=offs_m < N, other=0x7FFFFFFF)
    if WINDOW > 0:
        oldest = tl.maximum(oldest, offs_m - WINDOW + 1)
    # One 64-bit base per tile and 32-bit offsets within it: 64-bit offsets for every element would cost half
    # the registers.
    offs_q = (start.to(tl.int64) * H + head) * E + tl.arange(0, BLOCK_M)[:, None] * (H * E) + offs_e[None, :]
    q_tile = tl.load(q_ptr + offs_q, mask=(offs_m[:, None] < N) & (offs_e[None, :] < E), other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    begin = (tl.min(oldest, 0) // BLOCK_N) * BLOCK_N
    for start_k in range(begin, tl.minimum(start + BLOCK_M, N), BLOCK_N):
        offs_n = start_k + tl.arange(0, BLOCK_N)
        base = ((zero + start_k) * K + head // (H // K)) * E
        offs_k = base + tl.arange(0, BLOCK_N)[None, :] * (K * E) + offs_e[:, None]
        k_tile = tl.load(k_ptr + offs_k, mask=(offs_n[None, :] < N) & (offs_e[:, None] < E), other=0.0)
        s = _scores(q_tile, k_tile, scale, softcap, SOFTCAP)
        s = tl.where(
            (offs_n[None, :] <= offs_m[:, None]) & (offs_n[None, :] >= oldest[:, None]), s, float("-inf")
        )
        new_top = tl.maximum(top, tl.max(s, 1))
        # No visible key yet: exp(−inf − 0) is 0, not NaN
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp(s - safe[:, None])
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(p, 1)
        offs_v = base + tl.arange(0, BLOCK_N)[:, None] * (K * E) + offs_e[None, :]
        v_tile = tl.load(v_ptr + offs_v, mask=(offs_n[:, None] < N) & (offs_e[None, :] < E), other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
        top = new_top
    # Padding is a document that ends before it begins: no key, zeros out.
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(
        out_ptr + offs_q, acc.to(out_ptr.dtype.element_ty), mask=(offs_m[:, None] < N) & (offs_e[None, :] < E)
    )
    tl.store(
        lse_ptr + offs_m.to(tl.int64) * H + head,
        tl.where(empty, 0.0, top + tl.log(tl.where(empty, 1.0, total))),
        mask=offs_m < N,
    )


@triton.jit
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, first_ptr, last_ptr, N, scale, softcap,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """dq of a block of queries; probabilities are recomputed from the saved log-sum-exp."""
    start, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    zero = start.to(tl.int64) * 0  # makes what it is added to int64: offsets may pass 2^31
    offs_m = start + tl.arange(0, BLOCK_M)
    offs_e = tl.arange(0, BLOCK_E)
    oldest = tl.load(first_ptr + offs_m, mask=offs_m < N, other=0x7FFFFFFF)
    if WINDOW > 0:
        oldest = tl.maximum(oldest, offs_m - WINDOW + 1)
    # One 64-bit base per tile and 32-bit offsets within it: 64-bit offsets for every element would cost half
    # the registers.
    offs_q = (start.to(tl.int64) * H + head) * E + tl.arange(0, BLOCK_M)[:, None] * (H * E) + offs_e[None, :]
    inside = (offs_m[:, None] < N) & (offs_e[None, :] < E)
    q_tile = tl.load(q_ptr + offs_q, mask=inside, other=0.0)
    do_tile = tl.load(d_out_ptr + offs_q, mask=inside, other=0.0)
    lse_m = tl.load(lse_ptr + offs_m.to(tl.int64) * H + head, mask=offs_m < N, other=0.0)
    delta_m = tl.load(delta_ptr + offs_m.to(tl.int64) * H + head, mask=offs_m < N, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    begin = (tl.min(oldest, 0) // BLOCK_N) * BLOCK_N
    for start_k in range(begin, tl.minimum(start + BLOCK_M, N), BLOCK_N):
        offs_n = start_k + tl.arange(0, BLOCK_N)
        base = ((zero + start_k) * K + head // (H // K)) * E
        offs_k = base + tl.arange(0, BLOCK_N)[:, None] * (K * E) + offs_e[None, :]
        mask_k = (offs_n[:, None] < N) & (offs_e[None, :] < E)
        k_tile = tl.load(k_ptr + offs_k, mask=mask_k, other=0.0)
        s = _scores(q_tile, tl.trans(k_tile), scale, softcap, SOFTCAP)
        visible = (offs_n[None, :] <= offs_m[:, None]) & (offs_n[None, :] >= oldest[:, None])
        p = tl.where(visible, tl.exp(s - lse_m[:, None]), 0.0)
        v_tile = tl.load(v_ptr + offs_k, mask=mask_k, other=0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - delta_m[:, None])
        if SOFTCAP:
            ds = ds * (1 - (s / softcap) * (s / softcap))
        acc += tl.dot(ds.to(k_tile.dtype), k_tile, input_precision="ieee")
    tl.store(dq_ptr + offs_q, (acc * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, first_ptr, last_ptr, N, scale,
    softcap,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """dk and dv of a block of keys, summed over the query heads that share them."""
    start, head = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    zero = start.to(tl.int64) * 0  # makes what it is added to int64: offsets may pass 2^31
    offs_n = start + tl.arange(0, BLOCK_N)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = (start.to(tl.int64) * K + head) * E + tl.arange(0, BLOCK_N)[:, None] * (K * E) + offs_e[None, :]
    inside = (offs_n[:, None] < N) & (offs_e[None, :] < E)
    k_tile = tl.load(k_ptr + offs_k, mask=inside, other=0.0)
    v_tile = tl.load(v_ptr + offs_k, mask=inside, other=0.0)
    newest = tl.load(last_ptr + offs_n, mask=offs_n < N, other=-1)
    if WINDOW > 0:
        newest = tl.minimum(newest, offs_n + WINDOW - 1)
    end = tl.max(newest, 0) + 1
    dk_acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for group in range(0, H // K):
        h = head * (H // K) + group
        for start_q in range((start // BLOCK_M) * BLOCK_M, end, BLOCK_M):
            offs_m = start_q + tl.arange(0, BLOCK_M)
            offs_q = (
                ((zero + start_q) * H + h) * E + tl.arange(0, BLOCK_M)[:, None] * (H * E) + offs_e[None, :]
            )
            mask_q = (offs_m[:, None] < N) & (offs_e[None, :] < E)
            q_tile = tl.load(q_ptr + offs_q, mask=mask_q, other=0.0)
            do_tile = tl.load(d_out_ptr + offs_q, mask=mask_q, other=0.0)
            lse_m = tl.load(lse_ptr + offs_m.to(tl.int64) * H + h, mask=offs_m < N, other=0.0)
            delta_m = tl.load(delta_ptr + offs_m.to(tl.int64) * H + h, mask=offs_m < N, other=0.0)
            # Transposed (keys × queries), so that the products for dk and dv need no transpose of p and ds.
            s = _scores(k_tile, tl.trans(q_tile), scale, softcap, SOFTCAP)
            visible = (offs_n[:, None] <= offs_m[None, :]) & (offs_m[None, :] <= newest[:, None])
            p = tl.where(visible, tl.exp(s - lse_m[None, :]), 0.0)
            dv_acc += tl.dot(p.to(do_tile.dtype), do_tile, input_precision="ieee")
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
            ds = p * (dp - delta_m[None, :])
            if SOFTCAP:
                ds = ds * (1 - (s / softcap) * (s / softcap))
            dk_acc += tl.dot(ds.to(q_tile.dtype), q_tile, input_precision="ieee")
    tl.store(dk_ptr + offs_k, (dk_acc * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + offs_k, dv_acc.to(dv_ptr.dtype.element_ty), mask=inside)


def attention_blocks(E: int, kernel: str, instruction: str) -> dict[str, int]:
    """Tile sizes, warps and stages of the parts forward, dq and dkv by head width E and by the instruction of
    the tensor cores (`_tensor_core_instruction`): chosen so that no width spills (bench/kernels_aot.py)."""
    wide = max(16, 1 << (E - 1).bit_length())
    m, n, warps, stages = {
        "forward": {16: (128, 64, 4, 2), 32: (128, 64, 4, 2), 64: (128, 64, 4, 2), 128: (128, 64, 8, 2),
                    256: (64, 32, 8, 2)},
        "dq": {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 2),
               256: (64, 32, 8, 2)},
        "dkv": {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 2),
                256: (32, 64, 8, 2)},
    }[kernel][wide]
    # mma.sync takes its operands from registers, which leaves less room for the sums.
    m, n, warps, stages = {
        "wgmma": {("dkv", 128): (64, 64, 8, 2) if wide == E else (32, 64, 8, 2)},
        "mma.sync": {("forward", 64): (128, 64, 8, 2), ("forward", 128): (128, 32, 8, 2),
                     ("dq", 64): (64, 64, 8, 2), ("dkv", 64): (64, 64, 8, 2),
                     ("dkv", 128): (32, 64, 8, 2), ("dkv", 256): (32, 32, 8, 2)},
        "tcgen05": {("dkv", 256): (32, 64, 8, 1), ("dkv", 16): (64, 64, 4, 1),
                    ("forward", 256): (64, 32, 8, 2 if wide == E else 1)},
    }.get(instruction, {}).get((kernel, wide), (m, n, warps, stages))
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_E=wide, num_warps=warps, num_stages=stages)


def _tensor_core_instruction(x: Tensor) -> str:
    """wgmma on sm_90, tcgen05 on sm_100, and mma.sync on all others (also in the interpreter)."""
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    return {9: "wgmma", 10: "tcgen05"}.get(major, "mma.sync")


class _TritonAttention(torch.autograd.Function):
    """q [N, H, E], k and v [N, K, E], spans int32 [2, N] (first and last token of each token's document)."""

    @staticmethod
    def forward(ctx, q, k, v, spans, scale, window, softcap):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        N, H, E = q.shape
        out, lse = torch.empty_like(q), torch.empty(N, H, dtype=torch.float32, device=q.device)
        how = attention_blocks(E, "forward", _tensor_core_instruction(q))
        shape = dict(H=H, K=k.shape[1], E=E, WINDOW=window or 0, SOFTCAP=softcap is not None)
        _attention_forward_kernel[(-(-N // how["BLOCK_M"]), H)](
            q, k, v, out, lse, spans[0], spans[1], N, scale, softcap or 1.0, **shape, **how
        )
        ctx.save_for_backward(q, k, v, out, lse, spans)
        ctx.how = (scale, softcap or 1.0, shape)
        return out

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple:
        q, k, v, out, lse, spans = ctx.saved_tensors
        scale, softcap, shape = ctx.how
        d_out = gradients[0].contiguous()
        N, H, E = q.shape
        # [N, H]: the softmax's own gradient (FlashAttention-2, §3.1)
        delta = (d_out.float() * out.float()).sum(-1)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        rest = (spans[0], spans[1], N, scale, softcap)
        how = attention_blocks(E, "dq", _tensor_core_instruction(q))
        _attention_dq_kernel[(-(-N // how["BLOCK_M"]), H)](
            q, k, v, d_out, lse, delta, dq, *rest, **shape, **how
        )
        how = attention_blocks(E, "dkv", _tensor_core_instruction(q))
        _attention_dkv_kernel[(-(-N // how["BLOCK_N"]), k.shape[1])](
            q, k, v, d_out, lse, delta, dk, dv, *rest, **shape, **how
        )
        return dq, dk, dv, None, None, None, None


def _fits_triton_attention(q: Tensor) -> bool:
    """The kernels' tiles are sized for 16-bit inputs; in fp32, or for wide heads on GPUs with less than 160
    KiB of shared memory a block, they would not fit, and torch's attention is used."""
    if not use_triton(q) or q.shape[-1] > 256 or q.dtype == torch.float64:
        return False
    if not q.is_cuda:  # the interpreter
        return True
    if q.dtype == torch.float32:
        return False
    return q.shape[-1] <= 128 or (
        torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin >= 160 * 1024
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    documents: Documents | SharedPrompts | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal grouped-query attention inside each document.

    q [B, T, H, E], k and v [B, T, K, E] with H a multiple of K → [B, T, H, E]. Without `documents` each row
    is one document. `window` w lets a query see the w newest keys, itself included. `softcap` c replaces a
    score s by c·tanh(s/c) (Gemma 2, arXiv 2408.00118, §2). Padding gets zeros.
    """
    B, T, H, E = q.shape
    if isinstance(documents, SharedPrompts):
        return _shared_prompt_attention(q, k, v, documents, scale, window, softcap)
    if _fits_triton_attention(q):
        k, v = k.to(q.dtype), v.to(q.dtype)
        if documents is None:
            last = torch.arange(B, device=q.device, dtype=torch.int32).repeat_interleave(T) * T + (T - 1)
            spans = torch.stack([last - (T - 1), last])
        else:
            spans = documents.spans
        flat = (x.reshape(B * T, *x.shape[2:]) for x in (q, k, v))
        return _TritonAttention.apply(*flat, spans, scale, window, softcap).view(B, T, H, E)
    if documents is None:
        return _causal(q, k, v, scale, window, softcap)
    q, k, v = (_ToSlots.apply(x.reshape(B * T, *x.shape[2:]), documents) for x in (q, k, v))
    outputs, slot = [], 0
    for n, length in documents.buckets:
        slots = slice(slot, slot + n * length)
        bucket = (x[slots].view(n, length, *x.shape[1:]) for x in (q, k, v))
        outputs.append(_causal(*bucket, scale, window, softcap).reshape(n * length, H, E))
        slot += n * length
    out = torch.cat(outputs) if outputs else q
    return _FromSlots.apply(out, documents, B * T).view(B, T, H, E)


def _causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of dense rows [n, L, H|K, E]; a window or soft cap is applied one block of queries at
    a time."""
    L = q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [n, H|K, L, E]
    grouped = q.shape[1] != k.shape[1]
    if softcap is None and (window is None or window >= L):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    blocks = []
    for begin in range(0, L, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, L)
        oldest = 0 if window is None else max(0, begin - window + 1)
        query = torch.arange(begin, end, device=q.device)[:, None]
        key = torch.arange(oldest, end, device=q.device)[None]
        visible = key <= query
        if window is not None:
            visible &= key > query - window
        arguments = (q[:, :, begin:end], k[:, :, oldest:end], v[:, :, oldest:end], visible, scale, softcap)
        if L > QUERY_BLOCK and torch.is_grad_enabled() and q.requires_grad:
            # Recomputed in the backward pass: memory is O(L), not O(L²).
            blocks.append(checkpoint(_masked, *arguments, use_reentrant=False))
        else:
            blocks.append(_masked(*arguments))
    return torch.cat(blocks, dim=2).transpose(1, 2)


def _masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    """q [n, H, Q, E] against k, v [n, K, S, E] under a mask that broadcasts to [n, H, Q, S]."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    n, H, Q, E = q.shape
    K = k.shape[1]
    scores = (
        torch.matmul(q.reshape(n, K, H // K * Q, E), k.transpose(-1, -2)).view(n, K, H // K, Q, -1) * scale
    )
    scores = softcap * torch.tanh(scores / softcap)
    if visible.dim() == 4:
        visible = visible[:, :, None] if visible.shape[1] == 1 else visible.unflatten(1, (K, H // K))
    weights = scores.masked_fill(~visible, -torch.inf).softmax(
        -1, dtype=torch.promote_types(q.dtype, torch.float32)
    )
    return torch.matmul(weights.to(q.dtype).view(n, K, H // K * Q, -1), v).view(n, H, Q, E)


def predicate_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Callable, *, scale: float, softcap: float | None = None,
    block_mask: Any = None,
) -> Tensor:
    """Attention under any predicate visible(b, h, q_index, kv_index) → bool on index tensors (block-parallel
    masks).

    q [B, T, H, E], k and v [B, S, K, E] → [B, T, H, E]. On a GPU this is compiled flex_attention with a block
    mask: blocks that the predicate excludes are never computed, and quantities that change between batches
    must be tensors that the predicate closes over, to avoid recompilation. On CPUs, where torch 2.13 has no
    flex_attention backward, a dense mask is used. `block_mask`: a result of `make_block_mask` to reuse.
    Every query must see a key.
    """
    B, T, H, _ = q.shape
    S, grouped = k.shape[1], k.shape[2] != H
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cuda:
        mask = block_mask if block_mask is not None else make_block_mask(visible, B, H, T, S, q.device)
        cap = None if softcap is None else _capped(softcap)
        out = _flex_attention()(q, k, v, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    index = [torch.arange(n, device=q.device) for n in (B, H, T, S)]
    dense = visible(
        index[0][:, None, None, None], index[1][None, :, None, None], index[2][:, None], index[3][None]
    )
    return _masked(q, k, v, dense.expand(B, H, T, S), scale, softcap).transpose(1, 2)


def make_block_mask(visible: Callable, B: int, H: int, T: int, S: int, device: torch.device) -> Any:
    """A flex_attention block mask. Compiled, because eager mode stores all T·S pairs at 11 bytes per pair."""
    return _create_block_mask()(visible, B, H, T, S, device=str(device))


@functools.cache
def _flex_attention() -> Callable:
    return torch.compile(torch.nn.attention.flex_attention.flex_attention, dynamic=True)


@functools.cache
def _create_block_mask() -> Callable:
    return torch.compile(torch.nn.attention.flex_attention.create_block_mask, dynamic=True)


@functools.cache  # one function per value: a new one would be recompiled
def _capped(softcap: float) -> Callable:
    def score_mod(score, b, h, q, k):
        return softcap * torch.tanh(score / softcap)

    return score_mod


@triton.jit
def _decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, visible_ptr, out_ptr, top_ptr, total_ptr, S, stride_kb, stride_kk, stride_ks,
    per_split, scale, softcap,
    G: tl.constexpr, E: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The G queries of one sequence that share a key head, over one split of its keys: unnormalised output,
    maximum and sum, merged by the caller (flash decoding). Splits keep a GPU busy when there are few
    sequences."""
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, splits = tl.num_programs(1), tl.num_programs(2)
    offs_g, offs_e = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_E)
    first_query = (sequence.to(tl.int64) * heads + head) * G
    q_tile = tl.load(
        q_ptr + (first_query + offs_g[:, None]) * E + offs_e[None, :],
        mask=(offs_g[:, None] < G) & (offs_e[None, :] < E),
        other=0.0,
    )
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_E], tl.float32)
    base = sequence.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kk
    first = split * per_split
    for start in range(first, tl.minimum(first + per_split, S), BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        inside = (offs_s[:, None] < S) & (offs_e[None, :] < E)
        offs = base + offs_s[:, None].to(tl.int64) * stride_ks + offs_e[None, :]
        k_tile = tl.load(k_ptr + offs, mask=inside, other=0.0)
        s = _scores(q_tile, tl.trans(k_tile), scale, softcap, SOFTCAP)
        seen = tl.load(visible_ptr + sequence.to(tl.int64) * S + offs_s, mask=offs_s < S, other=0) != 0
        s = tl.where(seen[None, :], s, float("-inf"))
        new_best = tl.maximum(best, tl.max(s, 1))
        safe = tl.where(new_best == float("-inf"), 0.0, new_best)
        p = tl.exp(s - safe[:, None])
        shrink = tl.exp(best - safe)
        weight = weight * shrink + tl.sum(p, 1)
        v_tile = tl.load(v_ptr + offs, mask=inside, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
        best = new_best
    offs = (first_query + offs_g) * splits + split
    tl.store(top_ptr + offs, best, mask=offs_g < G)
    tl.store(total_ptr + offs, weight, mask=offs_g < G)
    tl.store(
        out_ptr + offs[:, None] * E + offs_e[None, :], acc, mask=(offs_g[:, None] < G) & (offs_e[None, :] < E)
    )


def _decode_attention_triton(q, k, v, visible, scale: float, softcap: float | None) -> Tensor:
    B, H, E = q.shape
    K, S = k.shape[1], k.shape[2]
    if k.stride(-1) != 1 or k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    splits = max(1, min(-(-S // 256), 512 // max(1, B * K)))
    per_split = -(-S // (splits * 64)) * 64  # whole blocks, so that no key is in two splits
    splits = -(-S // per_split)
    out = torch.empty(B, H, splits, E, device=q.device)
    top, total = torch.empty(B, H, splits, device=q.device), torch.empty(B, H, splits, device=q.device)
    _decode_attention_kernel[(B, K, splits)](
        q.contiguous(), k, v, visible.to(torch.uint8).contiguous(), out, top, total, S, *k.stride()[:3],
        per_split, scale, softcap or 1.0, G=H // K, E=E, SOFTCAP=softcap is not None,
        BLOCK_G=max(16, 1 << (H // K - 1).bit_length()), BLOCK_S=64,
        BLOCK_E=max(16, 1 << (E - 1).bit_length()), num_warps=4, num_stages=2,
    )
    shrink = (top - top.amax(-1, keepdim=True)).exp()
    return ((out * shrink[..., None]).sum(2) / (total * shrink).sum(-1, keepdim=True)).to(q.dtype)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention of one new query per row over cached keys.

    q [B, H, E], k and v [B, K, S, E], `visible` [B, S] → [B, H, E]. The query heads that share a key head are
    laid along the query axis, so that keys are read once and never repeated in memory.
    """
    B, H, E = q.shape
    K = k.shape[1]
    if _fits_triton_attention(q) and H // K <= 32:  # more query heads do not fit the registers
        return _decode_attention_triton(q, k, v, visible, scale, softcap)
    out = _masked(q.view(B, K, H // K, E), k, v, visible[:, None, None, :], scale, softcap)
    return out.reshape(B, H, E)


# ------------------------------------------------------------------------------------------------------------
# Norm, activation, rotary embedding: bound by memory, so each is one pass on a GPU
# ------------------------------------------------------------------------------------------------------------


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """x [..., D] / √(mean x² + eps) · weight (· (1 + weight) with `plus_one`), in fp32 whatever the input
    (arXiv 1910.07467): the mean of squares of a bf16 row loses the bits that keep training stable."""
    precise = torch.promote_types(x.dtype, torch.float32)
    scale = weight.to(precise) + 1 if plus_one else weight.to(precise)
    return F.rms_norm(x.to(precise), weight.shape, scale, eps).to(x.dtype)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, y_ptr, rstd_ptr, D, eps, PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr):
    row, offs_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    values = tl.load(x_ptr + row * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    scale = tl.load(weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    if PLUS_ONE:
        scale += 1
    tl.store(rstd_ptr + row, inverse)
    tl.store(y_ptr + row * D + offs_d, (values * inverse * scale).to(y_ptr.dtype.element_ty), mask=offs_d < D)


@triton.jit
def _rms_norm_backward_kernel(
    x_ptr, weight_ptr, dy_ptr, rstd_ptr, dx_ptr, dw_ptr, N, D, rows_per_program,
    PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr,
):
    """dx of some rows, and their part of dw: [programs, D], summed by the caller in a fixed order."""
    program, offs_d = tl.program_id(0), tl.arange(0, BLOCK)
    scale = tl.load(weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    if PLUS_ONE:
        scale += 1
    dw_partial = tl.zeros([BLOCK], tl.float32)
    zero = program.to(tl.int64) * 0  # makes what it is added to int64: offsets may pass 2^31
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, N)):
        offs = (zero + row) * D + offs_d
        inverse = tl.load(rstd_ptr + row)
        normed = tl.load(x_ptr + offs, mask=offs_d < D, other=0.0).to(tl.float32) * inverse
        g = tl.load(dy_ptr + offs, mask=offs_d < D, other=0.0).to(tl.float32)
        dw_partial += g * normed
        g = g * scale
        gradient = (g - normed * (tl.sum(g * normed, 0) / D)) * inverse
        tl.store(dx_ptr + offs, gradient.to(dx_ptr.dtype.element_ty), mask=offs_d < D)
    tl.store(dw_ptr + program.to(tl.int64) * D + offs_d, dw_partial, mask=offs_d < D)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, plus_one):
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        N, D = flat.shape
        y, rstd = torch.empty_like(flat), torch.empty(N, dtype=torch.float32, device=x.device)
        how = dict(PLUS_ONE=plus_one, BLOCK=1 << (D - 1).bit_length(), num_warps=4 if D <= 1024 else 8)
        if N:
            _rms_norm_kernel[(N,)](flat, weight, y, rstd, D, eps, **how)
        ctx.save_for_backward(flat, weight, rstd)
        ctx.how = how
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple:
        x, weight, rstd = ctx.saved_tensors
        dy = gradients[0].reshape(x.shape).contiguous()
        N, D = x.shape
        programs = max(1, min(N, 256))
        dx, dw = torch.empty_like(x), torch.zeros(programs, D, dtype=torch.float32, device=x.device)
        _rms_norm_backward_kernel[(programs,)](
            x, weight, dy, rstd, dx, dw, N, D, -(-N // programs), **ctx.how
        )
        return dx.view(gradients[0].shape), dw.sum(0).to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """As `rms_norm_reference`; on a GPU x is read once and no fp32 copy of it is kept for the backward
    pass, unless a row is too long for the registers."""
    if use_triton(x) and x.dtype != torch.float64 and x.shape[-1] <= 8192:
        return _RMSNorm.apply(x, weight, eps, plus_one)
    return rms_norm_reference(x, weight, eps, plus_one)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (arXiv 2002.05202)."""
    return F.silu(gate) * up


@triton.jit
def _swiglu_kernel(gate_ptr, up_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, (g * tl.sigmoid(g) * u).to(y_ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _swiglu_backward_kernel(gate_ptr, up_ptr, dy_ptr, d_gate_ptr, d_up_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    d = tl.load(dy_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(d_up_ptr + offs, (d * g * s).to(d_up_ptr.dtype.element_ty), mask=offs < size)
    tl.store(
        d_gate_ptr + offs, (d * u * s * (1 + g * (1 - s))).to(d_gate_ptr.dtype.element_ty), mask=offs < size
    )


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up only; the activation is recomputed in the backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        ctx.save_for_backward(gate, up)
        if y.numel():
            _swiglu_kernel[(-(-y.numel() // 1024),)](gate, up, y, y.numel(), BLOCK=1024)
        return y

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        if gate.numel():
            dy = gradients[0].contiguous()
            grid = (-(-gate.numel() // 1024),)
            _swiglu_backward_kernel[grid](gate, up, dy, d_gate, d_up, gate.numel(), BLOCK=1024)
        return d_gate, d_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `swiglu_reference`; on a GPU one pass, and no third tensor is kept for the backward pass."""
    if use_triton(gate) and gate.dtype != torch.float64 and gate.dtype == up.dtype:
        return _SwiGLU.apply(gate, up)
    return swiglu_reference(gate, up)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of x [B, T, heads, E] by cos and sin [B, T, 1, R/2]: the
    first R dimensions of a head are rotated, in pairs (i, i + R/2); the rest is unchanged."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


@triton.jit
def _rotate_kernel(x_ptr, cos_ptr, sin_ptr, y_ptr, heads, E, half, sign, BLOCK: tl.constexpr):
    """One program per token and head; `sign` −1 rotates back, which is the gradient."""
    program = tl.program_id(0).to(tl.int64)
    token, offs_i = program // heads, tl.arange(0, BLOCK)
    c = tl.load(cos_ptr + token * half + offs_i, mask=offs_i < half, other=1.0).to(tl.float32)
    s = tl.load(sin_ptr + token * half + offs_i, mask=offs_i < half, other=0.0).to(tl.float32) * sign
    offs = program * E + offs_i
    a = tl.load(x_ptr + offs, mask=offs_i < half, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + offs + half, mask=offs_i < half, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, (a * c - b * s).to(y_ptr.dtype.element_ty), mask=offs_i < half)
    tl.store(y_ptr + offs + half, (b * c + a * s).to(y_ptr.dtype.element_ty), mask=offs_i < half)
    rest = 2 * half + offs_i
    for start in range(0, E - 2 * half, BLOCK):
        inside = start + rest < E
        passed = tl.load(x_ptr + program * E + start + rest, mask=inside, other=0.0)
        tl.store(y_ptr + program * E + start + rest, passed, mask=inside)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _Rotate.turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        return _Rotate.turn(gradients[0], cos, sin, -1.0), None, None

    @staticmethod
    def turn(x, cos, sin, sign):
        x, half = x.contiguous(), cos.shape[-1]
        y = torch.empty_like(x)
        heads, E = x.shape[-2:]
        if x.numel():
            _rotate_kernel[(x.numel() // E,)](
                x, cos.contiguous(), sin.contiguous(), y, heads, E, half, sign,
                BLOCK=max(16, 1 << (half - 1).bit_length()), num_warps=1,
            )
        return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotate_reference`; on a GPU one pass each way, and only the tables are kept."""
    if use_triton(x) and x.dtype != torch.float64:
        return _Rotate.apply(x, cos, sin)
    return rotate_reference(x, cos, sin)


if __name__ == "__main__":
    if sys.argv[1:] != ["clear-cache"]:
        sys.exit("usage: python kernels.py clear-cache")
    place = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    shutil.rmtree(place, ignore_errors=True)
    print(f"emptied {place}")
