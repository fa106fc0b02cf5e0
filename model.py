"""One decoder for every family: a table of switches, and a block that reads them.

Shapes: B batch, T positions, D model width, H query heads, K key/value heads, E head width, F feed-forward
width, V vocabulary, X experts, N = B·T tokens. Parameter names are Hugging Face's without the leading
`model.`.

    python model.py chat DIR              talk to a checkpoint
"""

import contextlib
import functools
import importlib
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import kernels
from checkpoints.families import Architecture
from numerics import low_precision
from run.config import ConfigError, check_at_least_one, check_ranges, run_command
from run.terminal import make_printable


@dataclass
class ModelOptions:
    base_model: str = ""
    """Checkpoint to start from: a directory or a Hugging Face hub id."""
    base_model_revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""
    ignore_config_fields: list[str] = field(default_factory=list)
    """Fields of config.json that you know not to change the arithmetic; other unknown fields are refused."""
    pad_vocab_to_multiple_of: int = 1
    """Grow the embedding to a multiple of this (64 or 128 make the head faster on GPUs). New rows hold the
    mean row."""
    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of mixture-of-experts models; default: the checkpoint's own value."""
    fp8: bool = False
    """Multiply in FP8 (e4m3, a scale per 128 values) in the linear layers of the blocks, forward and
    backward. Not in embedding, head, norms and router. Needs FP8 tensor cores to be fast; elsewhere it
    computes the same numbers."""
    fp8_frozen: bool = False
    """With an adapter: keep the frozen weights of the blocks in FP8, 1 byte each."""
    load_in_4bit: bool = False
    """With `adapter: qlora`: keep the frozen weights of the blocks in NF4, 0.52 bytes each."""
    load_in_8bit: bool = False
    """With an adapter: keep the frozen weights of the blocks in int8, 1 byte each."""
    adapter: Literal["lora", "qlora"] | None = None
    """`lora` trains low-rank adapters and freezes the base weights; `qlora` also quantises them (load_in_4bit
    or load_in_8bit); unset trains every weight."""
    lora_model_dir: str | None = None
    """A PEFT adapter to continue from."""
    lora_r: int = 16
    """Rank of the adapters; 8–32 are usual."""
    lora_alpha: float = 32
    """Adapters are scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout on the input of the adapters; 0.05 helps against overfitting."""
    lora_target_modules: list[str] | str | None = None
    """Names of the linear layers that get adapters, e.g. [q_proj, v_proj], or the ends of their full names,
    where `*` and `?` are wildcards; or, as in PEFT, a regular expression for full names
    (model.layers.0.mlp.up_proj), or all-linear (the default)."""
    lora_use_rslora: bool = False
    """Scale by lora_alpha / √lora_r instead (rank-stabilised LoRA, arXiv 2312.03732)."""
    merge_adapter: bool = False
    """Save the base model with the adapter merged in instead of the adapter alone."""

    given: ClassVar[frozenset[str]] = frozenset()  # the options that the YAML or the command line sets

    def check(self) -> None:
        """Raises ConfigError for options that contradict each other."""
        if not self.base_model:
            raise ConfigError("base_model", None, "must be set: a checkpoint directory or a hub id")
        if self.adapter is None:
            for key in ("lora_model_dir", "lora_target_modules", "merge_adapter"):
                if getattr(self, key):
                    raise ConfigError(key, getattr(self, key), "needs adapter: lora")
        stored = [key for key in ("load_in_4bit", "load_in_8bit", "fp8_frozen") if getattr(self, key)]
        if len(stored) > 1:
            raise ConfigError(stored[1], True, f"contradicts {stored[0]}; keep one of the two")
        if stored and self.adapter is None:
            raise ConfigError(stored[0], True, "keeps frozen weights only: add adapter: qlora")
        if self.adapter == "qlora" and not stored:
            raise ConfigError("adapter", "qlora", "needs load_in_4bit: true (or load_in_8bit, fp8_frozen)")
        if self.fp8 and stored in (["load_in_4bit"], ["load_in_8bit"]):
            raise ConfigError(
                "fp8", True, f"contradicts {stored[0]}: those weights are multiplied in high precision"
            )
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError("lora_dropout", self.lora_dropout, "must lie between 0 and 1")
        if not self.lora_alpha > 0 or not math.isfinite(self.lora_alpha):
            raise ConfigError(
                "lora_alpha", self.lora_alpha,
                "must be above 0: adapters are scaled by it, at 0 they change nothing and learn nothing",
            )
        if self.lora_target_modules in ([], ""):
            problem = "names no layer; leave it out for all of them"
            raise ConfigError("lora_target_modules", self.lora_target_modules, problem)
        check_at_least_one(self, "lora_r", "pad_vocab_to_multiple_of")
        check_ranges(self, ("router_aux_loss_coef", 0, math.inf))


# ------------------------------------------------------------------------------------------------------------
# The decoder
# ------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, plus_one: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, as_dtype(self.weight, x.dtype), self.eps, self.plus_one)


def as_dtype(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in the dtype of a product: the copy made by `without_gradients`, else a cast whose gradient
    flows to the master weight. A no-op if it has that dtype already, as under FSDP's mixed precision."""
    copy = getattr(parameter, "inference_copy", None)
    return copy if isinstance(copy, Tensor) and copy.dtype == dtype else parameter.to(dtype)


@contextlib.contextmanager
def without_gradients(model: "Transformer"):
    """Context for forward passes without gradients. A single process casts its weights once instead of in
    every pass. Sharded weights are resharded at the end: FSDP keeps the root gathered after a forward pass
    without a backward pass, and copies in the compute dtype would replace the master weights."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    dtype, copied = model.compute_dtype, []
    try:
        with torch.no_grad():
            for parameter in model.parameters() if dtype is not None and not sharded else ():
                if parameter.dtype != dtype and not hasattr(parameter, "inference_copy"):
                    copied.append(parameter)
                    parameter.inference_copy = parameter.to(dtype)  # type: ignore[attr-defined]
            yield
    finally:
        for parameter in copied:
            if hasattr(parameter, "inference_copy"):
                del parameter.inference_copy
        for module in sharded:
            module.reshard()


Function = TypeVar("Function", bound=Callable[..., Any])


def forward_only(function: Function) -> Function:
    """Decorator: run the function under `without_gradients` of its first argument, a model."""

    @functools.wraps(function)
    def run(model: "Transformer", *args: Any, **kwargs: Any) -> Any:
        with without_gradients(model):
            return function(model, *args, **kwargs)

    return run  # type: ignore[return-value]


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole tensor of a parameter that may be sharded. A collective over its mesh."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


class Linear(nn.Linear):
    """A linear layer of a block: in full precision or FP8, or with a frozen quantised weight; plus optionally
    an adapter scale·B·A (LoRA, arXiv 2106.09685). With `enabled` off it equals the base layer, bit for
    bit."""

    fp8: bool = False
    kind: str | None = None  # how the frozen weight is stored: nf4, int8, fp8; then `weight` is None
    r: int = 0
    scale: float = 0.0
    dropout: float = 0.0
    enabled: bool = True
    lora_A: nn.Parameter  # [r, in]
    lora_B: nn.Parameter  # [out, r]

    def add_adapter(self, r: int, scale: float, dropout: float, dtype: torch.dtype) -> None:
        device = self.weight.device
        self.r, self.scale, self.dropout = r, scale, dropout
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, dtype=dtype, device=device))

    def store_as(self, kind: str) -> None:
        """Replace the dense weight by buffers for the quantised form, filled by `put`. FSDP does not shard
        buffers: at half a byte per weight, keeping them on every rank costs less than a gather per pass."""
        name = "load_in_4bit" if kind == "nf4" else "load_in_8bit"
        if kind == "nf4" and self.in_features % low_precision.NF4_BLOCK:
            raise ConfigError(
                name, True, f"needs layers with inputs of a multiple of 64, not {self.in_features}"
            )
        N, K, device = self.out_features, self.in_features, self.weight.device
        shapes = {
            "nf4": [((N, K // 2), torch.uint8), ((N, K // 64), torch.uint8),
                    ((-(-N * K // 64 // 256),), torch.float32),
                    ((), torch.float32)],
            "int8": [((N, K), torch.int8), ((N,), torch.float32)],
            "fp8": [((N, K), torch.float8_e4m3fn), ((-(-N // 128), -(-K // 128)), torch.float32)],
        }[kind]
        self.register_parameter("weight", None)
        self.kind = kind
        for i, (shape, dtype) in enumerate(shapes):
            self.register_buffer(
                f"stored_{i}", torch.empty(shape, dtype=dtype, device=device), persistent=False
            )

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"stored_{i}") for i in range(4 if self.kind == "nf4" else 2))

    def put(self, stored: tuple[Tensor, ...]) -> None:
        for buffer, value in zip(self.stored, stored, strict=True):
            buffer.copy_(value.view(buffer.shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind is not None:
            out = low_precision.frozen_linear(x, self.kind, self.stored, self.bias)
        elif self.fp8:
            out = low_precision.fp8_linear(x, self.weight, self.bias)
        else:
            bias = None if self.bias is None else as_dtype(self.bias, x.dtype)
            out = F.linear(x, as_dtype(self.weight, x.dtype), bias)
        if not self.r or not self.enabled:
            return out
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        update = F.linear(F.linear(x, as_dtype(self.lora_A, x.dtype)), as_dtype(self.lora_B, x.dtype))
        return out + self.scale * update

    def delta(self) -> Tensor:
        """scale·B·A [out, in] in the adapter's dtype: what merging adds to the weight."""
        return self.scale * (full_tensor(self.lora_B) @ full_tensor(self.lora_A))


def block_linears(model: "Transformer") -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def set_precision(model: "Transformer", options: ModelOptions) -> None:
    """FP8 products and quantised frozen weights in the linear layers of the blocks, as the options say."""
    kind = (
        "nf4"
        if options.load_in_4bit
        else "int8"
        if options.load_in_8bit
        else "fp8"
        if options.fp8_frozen
        else None
    )
    for module in block_linears(model).values():
        module.fp8 = options.fp8
        if kind is not None:
            module.store_as(kind)


@dataclass
class Pass:
    """State that all blocks share in one forward pass."""

    rope_tables: dict[str, tuple[Tensor, Tensor]]
    documents: kernels.Documents | kernels.SharedPrompts | None
    cache: "Cache | None"
    decoding: bool  # one new token per row against the cache
    routes: dict[int, Tensor] = field(default_factory=dict)  # by layer: experts to use [N, k], not the best


class Attention(nn.Module):
    def __init__(self, arch: Architecture, layer: int):
        super().__init__()
        self.arch, self.layer = arch, layer
        D, H, K, E = arch.hidden_size, arch.num_heads, arch.num_kv_heads, arch.head_dim
        if arch.family.fused_projections:
            self.qkv_proj = Linear(D, (H + 2 * K) * E, bias=arch.qkv_bias)
        else:
            self.q_proj = Linear(D, H * E, bias=arch.qkv_bias)
            self.k_proj = Linear(D, K * E, bias=arch.qkv_bias)
            self.v_proj = Linear(D, K * E, bias=arch.qkv_bias)
        self.o_proj = Linear(H * E, D, bias=arch.o_bias)
        if arch.family.qk_norm != "none":
            heads = (H, K) if arch.family.qk_norm == "all" else (1, 1)
            self.q_norm = RMSNorm(heads[0] * E, arch.norm_eps, arch.family.norm_plus_one)
            self.k_norm = RMSNorm(heads[1] * E, arch.norm_eps, arch.family.norm_plus_one)

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        arch, layer = self.arch, self.layer
        B, T, _ = x.shape
        H, K, E = arch.num_heads, arch.num_kv_heads, arch.head_dim
        if arch.family.fused_projections:
            q, k, v = self.qkv_proj(x).split([H * E, K * E, K * E], dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if arch.family.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.view(B, T, H, E), k.view(B, T, K, E), v.view(B, T, K, E)
        if arch.family.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        rope = arch.layer_ropes[layer]
        if rope is not None:
            tables = context.rope_tables[rope]
            q, k = kernels.rotate(q, *tables), kernels.rotate(k, *tables)
        window, scale, softcap = arch.windows[layer], arch.attention_scale, arch.attention_softcap
        if context.cache is None:
            out = kernels.attention(
                q, k, v, scale=scale, documents=context.documents, window=window, softcap=softcap
            )
        else:
            out = context.cache.attend(layer, q, k, v, context, window=window, scale=scale, softcap=softcap)
        return self.o_proj(out.reshape(B, T, H * E))


def _activate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return kernels.swiglu(gate, up)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_pytorch_tanh" else "none") * up


class FeedForward(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        D, hidden = arch.hidden_size, arch.intermediate_size
        self.activation, self.fused = arch.activation, arch.family.fused_projections
        if self.fused:
            self.gate_up_proj = Linear(D, 2 * hidden, bias=arch.mlp_bias)
        else:
            self.gate_proj = Linear(D, hidden, bias=arch.mlp_bias)
            self.up_proj = Linear(D, hidden, bias=arch.mlp_bias)
        self.down_proj = Linear(hidden, D, bias=arch.mlp_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        gate, up = self.gate_up_proj(x).chunk(2, -1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(_activate(gate, up, self.activation)), None


class Experts(nn.Module):
    """Mixture of experts: a linear router sends each token to its `experts_per_token` best experts."""

    def __init__(self, arch: Architecture):
        super().__init__()
        X, D, hidden = arch.num_experts, arch.hidden_size, arch.expert_size
        self.arch = arch
        self.gate = nn.Linear(D, X, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(X, 2 * hidden, D))
        self.down_proj = nn.Parameter(torch.empty(X, D, hidden))

    def forward(self, x_BTD: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`routes` [N, k]: experts to use in the place of the best ones; their weights are those of now."""
        x = x_BTD.flatten(0, 1)  # [N, D]
        router_logits = F.linear(x, as_dtype(self.gate.weight, x.dtype))  # [N, X]
        probabilities = router_logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
        weights, experts = probabilities.topk(self.arch.experts_per_token, dim=-1)
        if routes is not None:
            weights, experts = probabilities.gather(-1, routes), routes
        if self.arch.normalize_experts:
            weights = weights / weights.sum(-1, keepdim=True)
        # Tokens sorted by expert: every expert's rows are one contiguous block of a grouped matrix product.
        order = experts.flatten().argsort(stable=True)
        token = order // self.arch.experts_per_token
        # Cumulative count of choices by expert; bincount would make the host wait for the GPU.
        which = torch.arange(self.arch.num_experts, device=x.device)
        ends = torch.searchsorted(experts.flatten()[order], which, right=True)
        gate_up, down = as_dtype(self.gate_up_proj, x.dtype), as_dtype(self.down_proj, x.dtype)
        gate, up = _grouped(x[token], gate_up, ends).chunk(2, -1)
        out = _grouped(_activate(gate, up, self.arch.activation), down, ends)
        out = out * weights.flatten()[order, None].to(out.dtype)
        return torch.zeros_like(x).index_add(0, token, out.to(x.dtype)).view(x_BTD.shape), router_logits


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x [N, in], sorted by expert with cumulative counts `ends` [X], times weight[expert] [X, out,
    in] → [N, out]."""
    # grouped_mm exists for fp32 and bf16 with rows of 16 bytes; fp64 (tests) and odd widths take the loop.
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.dtype in (torch.float32, torch.bfloat16) and aligned:
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends.to(torch.int32))
    begins = [0, *ends.tolist()]
    return torch.cat([x[a:b] @ weight[e].T for e, (a, b) in enumerate(itertools.pairwise(begins))])


class Block(nn.Module):
    def __init__(self, arch: Architecture, layer: int):
        super().__init__()
        family = arch.family

        def norm() -> RMSNorm:
            return RMSNorm(arch.hidden_size, arch.norm_eps, family.norm_plus_one)

        self.norms = family.norms
        self.self_attn = Attention(arch, layer)
        self.mlp = Experts(arch) if arch.expert_layers[layer] else FeedForward(arch)
        if family.norms == "pre":
            self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        else:  # Hugging Face's names: here post_attention_layernorm really is after the attention
            self.post_attention_layernorm, self.post_feedforward_layernorm = norm(), norm()
            if family.norms == "both":
                self.input_layernorm, self.pre_feedforward_layernorm = norm(), norm()
        # None keeps activations; True/False recomputes them, use_reentrant or not
        self.checkpointing: bool | None = None

    def forward(self, x: Tensor, context: Pass) -> tuple[Tensor, Tensor | None]:
        if self.checkpointing is None or not torch.is_grad_enabled():
            return self._forward(x, context)
        if self.checkpointing and not x.requires_grad:
            # Reentrant checkpointing drops the gradients of a block whose input requires none.
            x = x.detach().requires_grad_()
        return checkpoint(self._forward, x, context, use_reentrant=self.checkpointing)  # type: ignore[return-value]

    def _forward(self, x: Tensor, context: Pass) -> tuple[Tensor, Tensor | None]:
        if self.norms == "pre":
            x = x + self.self_attn(self.input_layernorm(x), context)
            out, router_logits = self._feed(self.post_attention_layernorm(x), context)
            return x + out, router_logits
        both = self.norms == "both"
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x) if both else x, context))
        out, router_logits = self._feed(self.pre_feedforward_layernorm(x) if both else x, context)
        return x + self.post_feedforward_layernorm(out), router_logits

    def _feed(self, x: Tensor, context: Pass) -> tuple[Tensor, Tensor | None]:
        routes = context.routes.get(self.self_attn.layer)
        return self.mlp(x) if routes is None else self.mlp(x, routes)


class TokenRows(nn.Module):
    """Rows of the frozen embedding, and of the head, that are trained beside an adapter: those of new tokens
    (PEFT calls them trainable_token_indices). With `enabled` off the base rows are used."""

    def __init__(self, ids: list[int], width: int, tied: bool, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.ids, self.tied, self.enabled = sorted(ids), tied, True
        self.embedding = nn.Parameter(torch.empty(len(ids), width, dtype=dtype, device=device))
        if not tied:
            self.head = nn.Parameter(torch.empty(len(ids), width, dtype=dtype, device=device))
        self._index: Tensor | None = None

    def index(self, device: torch.device) -> Tensor:
        if self._index is None or self._index.device != device:
            self._index = torch.tensor(self.ids, device=device)
        return self._index

    @property
    def of_head(self) -> Tensor:
        return self.embedding if self.tied else self.head

    def into_embedding(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """x [B, T, D] of the frozen embedding, with the trained rows where `input_ids` [B, T] ask for
        them."""
        ids = self.index(input_ids.device)
        row = torch.searchsorted(ids, input_ids).clamp(max=len(self.ids) - 1)
        return torch.where((ids[row] == input_ids)[..., None], self.embedding[row].to(x.dtype), x)

    def into_head(self, weight: Tensor) -> Tensor:
        """The head [V, D] with the trained rows: a copy, through which their gradient flows."""
        return weight.index_copy(0, self.index(weight.device), self.of_head.to(weight.dtype))

    def into_logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Put the trained rows' logits into logits [..., V] of the frozen head, in place; no gradient."""
        logits[..., self.index(logits.device)] = F.linear(hidden, self.of_head.to(hidden.dtype))
        return logits


class Transformer(nn.Module):
    """A decoder-only language model in the arithmetic that `arch` describes."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        self.embed_tokens = nn.Embedding(arch.vocab_size, arch.hidden_size)
        self.layers = nn.ModuleList(Block(arch, layer) for layer in range(arch.num_layers))
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps, arch.family.norm_plus_one)
        if not arch.tied:
            self.lm_head = nn.Linear(arch.hidden_size, arch.vocab_size, bias=False)
        self.adapter: dict | None = None  # the contents of adapter_config.json, if there are adapters
        self.token_rows: TokenRows | None = None
        self.compute_dtype: torch.dtype | None = None  # of the hidden states and products; None: the weights'
        self.compute_device: torch.device | None = None  # where it computes; None: where the weights are

    @property
    def device(self) -> torch.device:
        """The device of inputs and caches; with fsdp_cpu_offload the weights rest in host memory."""
        return self.compute_device or self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states; a sharded weight at rest may have another."""
        return self.compute_dtype or self.embed_tokens.weight.dtype

    @property
    def _frozen_head(self) -> Tensor:
        return self.embed_tokens.weight if self.arch.tied else self.lm_head.weight

    @property
    def head_weight(self) -> Tensor:
        """The output embedding [V, D]; the input embedding where they are tied."""
        rows = self.token_rows
        return self._frozen_head if rows is None or not rows.enabled else rows.into_head(self._frozen_head)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: "Cache | None" = None,
    ) -> Tensor:
        """Logits [B, T, V] for `input_ids` [B, T]. See `hidden_states` for the other arguments."""
        hidden, _ = self.hidden_states(
            input_ids, position_ids=position_ids, document_ids=document_ids, cache=cache
        )
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] → logits [..., V], with Gemma 2's final soft cap where the model has it."""
        without_gradient = not torch.is_grad_enabled()
        weight = as_dtype(self._frozen_head if without_gradient else self.head_weight, hidden.dtype)
        if hidden.device.type == "cpu" and hidden.dim() == 2 and len(hidden) <= 64 and without_gradient:
            # A few rows times a large head: this operand order is 1.5 to 3 times as fast with CPU libraries.
            out = (weight @ hidden.T).T.contiguous()
        else:
            out = F.linear(hidden, weight)
        if without_gradient and self.token_rows is not None and self.token_rows.enabled:
            out = self.token_rows.into_logits(out, hidden)
        cap = self.arch.final_softcap
        return out if cap is None else cap * torch.tanh(out / cap)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        shared_prompts: kernels.SharedPrompts | None = None,
        cache: "Cache | None" = None,
        layers: tuple[int, ...] | None = None,
        routes: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [B, T, D] after the last norm, and each expert layer's router logits [N, X].

        `document_ids` [B, T]: a run of equal ids is one document, attention stays inside it, a negative id is
        padding. `position_ids` [B, T] default to counting from 0 in each document (each row). With a `cache`
        the keys and values are stored: first a prefill of packed prompts, then one token per row. With
        `shared_prompts` the one row holds prompts and their completions, which attend to their prompt. With
        `layers` the result is instead those layers' outputs, L2-normalised per token and concatenated: [B, T,
        D · layers]; 0 is the embedding, the last layer is taken after the norm, and no deeper layer is run.
        `routes`: by layer the experts of each token [N, k], in the place of the router's choice.
        """
        B, T = input_ids.shape
        decoding = cache is not None and cache.length > 0
        documents: kernels.Documents | kernels.SharedPrompts | None = shared_prompts
        if shared_prompts is not None:
            position_ids = shared_prompts.position_ids
        elif document_ids is not None and not decoding:
            documents = kernels.Documents(document_ids)
        if position_ids is None:
            if decoding:
                position_ids = cache.next_positions()[:, None]  # type: ignore[union-attr]
            elif documents is None:
                position_ids = torch.arange(T, device=input_ids.device).expand(B, T)
            else:
                position_ids = count_positions(document_ids)  # type: ignore[arg-type]
        lengths = None
        if any(rope.kind == "dynamic" for rope in self.arch.ropes.values()):
            if decoding:
                lengths = position_ids + 1
            else:
                assert shared_prompts is None, "dynamic rope depends on the length of each whole document"
                lengths = torch.full_like(position_ids, T)
                if isinstance(documents, kernels.Documents):
                    lengths = documents.lengths
        x = self.embed_tokens(input_ids)
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        if self.token_rows is not None and self.token_rows.enabled:
            x = self.token_rows.into_embedding(x, input_ids)
        if self.arch.family.scale_embeddings:
            # Rounded to x's dtype, as Gemma was trained.
            x = x * torch.tensor(self.arch.hidden_size**0.5, dtype=x.dtype)
        tables = {key: rope.tables(position_ids, lengths, x.dtype) for key, rope in self.arch.ropes.items()}
        context = Pass(tables, documents, cache, decoding, routes or {})
        all_router_logits = []
        features = {0: x}
        for depth, block in enumerate(self.layers, 1):
            if layers is not None and depth > max(layers):
                break
            x, router_logits = block(x, context)
            if router_logits is not None:
                all_router_logits.append(router_logits)
            if layers is not None:
                features[depth] = x if depth < len(self.layers) else self.norm(x)
        # Normalise each layer first: one with large norms must not drown the others.
        if layers is not None:
            return torch.cat([F.normalize(features[i].float(), dim=-1) for i in layers], dim=-1), []
        if cache is not None:
            cache.advance(T)
        return self.norm(x), all_router_logits

    def count_parameters(self) -> int:
        """The number of weights, including quantised ones."""
        stored = sum(
            m.in_features * m.out_features for m in block_linears(self).values() if m.kind is not None
        )
        return stored + sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: float) -> float:
        """Training FLOPs per token (forward and backward) in documents of mean length `length`: 6 per
        trained matrix weight, 4 per frozen one (no weight gradient), and 12·E·H·length/2 per layer for causal
        attention (PaLM, arXiv 2204.02311, appendix B)."""
        arch = self.arch
        flops = 0.0
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or "embed_tokens" in name:
                continue
            active_share = arch.experts_per_token / arch.num_experts if parameter.dim() == 3 else 1.0
            flops += (6 if parameter.requires_grad else 4) * active_share * parameter.numel()
        flops += 4 * sum(
            m.in_features * m.out_features for m in block_linears(self).values() if m.kind is not None
        )
        if arch.tied:
            trained = self.embed_tokens.weight.requires_grad
            flops += (6 if trained else 4) * arch.vocab_size * arch.hidden_size
        return flops + 6 * arch.num_layers * arch.num_heads * arch.head_dim * length


def count_positions(document_ids: Tensor) -> Tensor:
    """Position of each token in its document [B, T]: counting restarts at every change of id."""
    T = document_ids.shape[1]
    index = torch.arange(T, device=document_ids.device).expand_as(document_ids)
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(first, index, 0).cummax(dim=1).values


def load_balancing_loss(
    router_logits: list[Tensor], arch: Architecture, real: Tensor | None = None
) -> Tensor:
    """Switch-Transformer auxiliary loss (arXiv 2101.03961, eq. 4–6) over all layers: X · Σ_e f_e·P_e,
    minimal when tokens are spread evenly; f_e is expert e's share of the choices times experts_per_token, P_e
    its mean probability.

    `router_logits`: one [N, X] per layer; `real` [N] marks tokens that are not padding.
    """
    logits = torch.stack(router_logits)  # [L, N, X]
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = probabilities.topk(arch.experts_per_token, dim=-1).indices
    mask = torch.ones(logits.shape[1], device=logits.device) if real is None else real.to(probabilities.dtype)
    counts = F.one_hot(chosen, arch.num_experts).sum(2).to(probabilities.dtype)  # [L, N, X]
    total = mask.sum().clamp(min=1) * logits.shape[0]
    token_share = (counts * mask[None, :, None]).sum((0, 1)) / total
    mean_probability = (probabilities * mask[None, :, None]).sum((0, 1)) / total
    return arch.num_experts * (token_share * mean_probability).sum()


# ------------------------------------------------------------------------------------------------------------
# Generation
# ------------------------------------------------------------------------------------------------------------


class Cache(Protocol):
    """Keys and values of earlier tokens: every layer attends through it. KVCache here; BlockCache in
    rollouts/blocks.py for continuations that branch off a document."""

    length: int  # 0 before the first pass

    def next_positions(self) -> Tensor: ...

    def advance(self, T: int) -> None: ...

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, context: Pass, window: int | None, *, scale: float,
        softcap: float | None = None,
    ) -> Tensor: ...


class KVCache:
    """Keys and values of B sequences, right-aligned: rows end in the same column, so a step writes one
    column.

    `starts` [B] is the column of each row's first token; `length` columns are filled.
    """

    def __init__(
        self, arch: Architecture, prompt_lengths: list[int], device, dtype: torch.dtype, room: int = 64
    ):
        B, self.prompt = len(prompt_lengths), max(prompt_lengths)
        shape = (B, arch.num_kv_heads, self.prompt + room, arch.head_dim)
        self.length = 0
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(arch.num_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(arch.num_layers)]
        self.starts = self.prompt - torch.tensor(prompt_lengths, device=device)
        # The cache slot of each token of the packed prompts.
        lengths = torch.tensor(prompt_lengths, device=device)
        self.rows = torch.repeat_interleave(torch.arange(B, device=device), lengths)
        self.columns = torch.cat(
            [torch.arange(self.prompt - n, self.prompt, device=device) for n in prompt_lengths]
        )

    def next_positions(self) -> Tensor:
        return self.length - self.starts

    def advance(self, T: int) -> None:
        self.length = self.prompt if self.length == 0 else self.length + T

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, context: Pass, window: int | None, **how
    ) -> Tensor:
        """Store this pass's keys and values, and attend. q [B, T, H, E], k and v [B, T, K, E] → [B, T, H,
        E]."""
        if not context.decoding:
            self.k[layer][self.rows, :, self.columns] = k.flatten(0, 1)
            self.v[layer][self.rows, :, self.columns] = v.flatten(0, 1)
            return kernels.attention(q, k, v, documents=context.documents, window=window, **how)
        if self.length == self.k[layer].shape[2]:
            room = torch.zeros_like(self.k[layer][:, :, : max(64, self.length // 2)])
            self.k[layer] = torch.cat([self.k[layer], room], dim=2)
            self.v[layer] = torch.cat([self.v[layer], room], dim=2)
        self.k[layer][:, :, self.length] = k[:, 0]
        self.v[layer][:, :, self.length] = v[:, 0]
        oldest = 0 if window is None else max(0, self.length + 1 - window)
        seen = slice(oldest, self.length + 1)
        columns = torch.arange(oldest, self.length + 1, device=q.device)
        visible = columns[None] >= self.starts[:, None]
        out = kernels.decode_attention(
            q[:, 0], self.k[layer][:, :, seen], self.v[layer][:, :, seen], visible, **how
        )
        return out[:, None]

    def select(self, rows: Tensor) -> None:
        """Keep these rows (an index may repeat: that is how one prefill serves G generations)."""
        for layer in range(len(self.k)):
            self.k[layer], self.v[layer] = self.k[layer][rows], self.v[layer][rows]
        self.starts = self.starts[rows]


def cli() -> None:
    """python model.py chat DIR, or ballast-model where the package is installed."""
    make_printable()
    if sys.argv[1:2] != ["chat"]:
        sys.exit("usage: model.py chat DIR [--temperature 0.7] [--max-new-tokens 512]")
    chat = importlib.import_module("rollouts.chat").chat  # imported here: only the command needs it
    run_command(lambda: chat(sys.argv[2:]))


if __name__ == "__main__":
    cli()
