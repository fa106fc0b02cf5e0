"""The arithmetic that decides whether a run fits and how fast it is: attention over packed documents, and the
loss.

Everything here is plain torch and exact; it is what CPUs run, and the reference for a GPU kernel of the same
signature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Queries a block where attention has to be masked by hand; bounds its memory to QUERY_BLOCK × T
QUERY_BLOCK = 512
LOGITS_A_CHUNK = 2**23  # elements of logits that exist at one time in linear_cross_entropy: 32 MiB in fp32


# ------------------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------------------


class Documents:
    """The documents in packed rows, found once for a forward pass and used by every layer.

    `document_ids` [B, T]: a run of equal ids in a row is one document, a negative id is padding. Documents of
    similar length are laid side by side in dense buckets, so that a row of a hundred short answers costs one
    attention call and not a hundred. Right padding inside a bucket needs no mask: under a causal mask no real
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
            self.buckets.append((n, longest))
            slots += n * longest
            i += n
        self.token_of_slot = torch.cat(token_of_slot or [torch.zeros(0, dtype=torch.long)]).to(device)
        self.tokens = (slot_of_token >= 0).nonzero().flatten().to(device)  # tokens that are no padding
        self.slots = slot_of_token[slot_of_token >= 0].to(device)  # their slots, in the same order
        self.lengths = lengths.view(B, T).to(device)  # of the document that a token is in; 0 on padding


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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    documents: Documents | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal grouped-query attention inside each document.

    q [B, T, H, E], k and v [B, T, K, E] with H a multiple of K → [B, T, H, E]. Without `documents` each row
    is one document. `window` w lets a query see the w newest keys, itself included. `softcap` c replaces a
    score s by c·tanh(s/c) (Gemma 2, arXiv 2408.00118, §2). Padding gets zeros.
    """
    B, T, H, E = q.shape
    if documents is None:
        return _causal(q, k, v, scale, window, softcap)
    q, k, v = (_ToSlots.apply(x.reshape(B * T, *x.shape[2:]), documents) for x in (q, k, v))
    outputs, slot = [], 0
    for n, length in documents.buckets:
        part = slice(slot, slot + n * length)
        bucket = (x[part].view(n, length, *x.shape[1:]) for x in (q, k, v))
        outputs.append(_causal(*bucket, scale, window, softcap).reshape(n * length, H, E))
        slot += n * length
    out = torch.cat(outputs) if outputs else q
    return _FromSlots.apply(out, documents, B * T).view(B, T, H, E)


def _causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of dense rows [n, L, H|K, E]; window and soft cap are masked a block of queries at a
    time."""
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
            blocks.append(
                checkpoint(_masked, *arguments, use_reentrant=False)
            )  # keeps memory O(L), not O(L²)
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
    visible = visible if visible.dim() == 2 else visible[:, :, None]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(
        -1, dtype=torch.promote_types(q.dtype, torch.float32)
    )
    return torch.matmul(weights.to(q.dtype).view(n, K, H // K * Q, -1), v).view(n, H, Q, E)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention of one new query a row over cached keys.

    q [B, H, E], k and v [B, K, S, E], `visible` [B, S] → [B, H, E]. The query heads that share a key head are
    laid along the query axis, so that keys are read once and never repeated in memory.
    """
    B, H, E = q.shape
    K = k.shape[1]
    out = _masked(q.view(B, K, H // K, E), k, v, visible[:, None, None, :], scale, softcap)
    return out.reshape(B, H, E)


# ------------------------------------------------------------------------------------------------------------
# The loss
# ------------------------------------------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of NLLs. The gradients are made in the forward pass, where each chunk's probabilities are at hand:
    the logits are computed once, not a second time in backward, and only the upstream scalar multiplies them
    later."""

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
        for begin in range(0, N, chunk):
            rows = slice(begin, begin + chunk)
            x, target = hidden[rows], labels[rows, None]
            logits, slope = (x @ weight.T).to(precise), None  # [c, V]
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
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if d_weight is not None:
                if d_weight.dtype == hidden.dtype:
                    d_weight.addmm_(d_logits.T, x)
                else:
                    d_weight += d_logits.T @ x
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple:
        (upstream,) = gradients
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * upstream.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = d_weight.mul_(
                upstream.to(d_weight.dtype)
            )  # [V, D] is the largest tensor here: no second copy
        return d_hidden, d_weight, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None = None, chunk: int | None = None
) -> Tensor:
    """Sum over tokens of −log softmax(hidden @ weight.T)[label], without ever holding [N, V] logits.

    hidden [N, D], weight [V, D], labels [N] with −100 where a token is not trained: such rows cost nothing.
    Returns a scalar in fp32 (fp64 for fp64 input). Exact to the naive computation in value and gradient; peak
    memory is one chunk of logits and one [V, D] gradient. `softcap` is Gemma 2's final soft cap; `chunk`
    tokens are taken at a time. Backward may be called once.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    trained = labels != -100
    if not trained.all():
        keep = trained.nonzero().flatten()
        hidden, labels = hidden.index_select(0, keep), labels.index_select(0, keep)
    if chunk is None:
        chunk = max(64, LOGITS_A_CHUNK // weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, labels, softcap, chunk)
