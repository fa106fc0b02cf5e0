"""Interprets a checkpoint's config.json: a table of families, each a row of switches, and the resulting
architecture, including rotary embeddings. Fields that no row lists are refused: they may change the
arithmetic."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from run.config import CheckpointError, shown


@dataclass(frozen=True)
class Family:
    """What distinguishes one architecture from another. A string value names the config.json field that
    decides."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    # RMSNorm of q and k: per head (Qwen 3) or over all heads (OLMo 2)
    qk_norm: Literal["none", "head", "all"] = "none"
    # Norms of a block's sublayers: before, after (OLMo 2) or both (Gemma)
    norms: Literal["pre", "post", "both"] = "pre"
    norm_plus_one: bool = False  # Gemma's norm multiplies by 1 + weight
    softcaps: bool = False  # Gemma's caps on scores and logits, and its own scale of scores
    scale_embeddings: bool = False  # Gemma's embedding output is multiplied by √D
    fused_projections: bool = False  # Phi-3's qkv_proj and gate_up_proj
    windows: Literal["none", "all", "typed"] = "none"  # which layers have the sliding window
    experts: Literal["none", "mixtral", "qwen"] = "none"
    defaults: dict = field(default_factory=dict)  # values of fields that config.json omits
    reads: tuple[str, ...] = ()  # fields of config.json that this family has besides the common ones


_LLAMA_BIASES: dict[str, Any] = dict(qkv_bias="attention_bias", o_bias="attention_bias")
_GEMMA: dict[str, Any] = dict(
    **_LLAMA_BIASES, norms="both", norm_plus_one=True, softcaps=True, scale_embeddings=True, windows="typed",
    reads=("hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
           "attention_bias", "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"),
)
_GEMMA_DEFAULTS: dict[str, Any] = dict(
    head_dim=256, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, sliding_window=4096,
    tie_word_embeddings=True,
)
_QWEN_WINDOW = ("use_sliding_window", "max_window_layers")

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        **_LLAMA_BIASES, mlp_bias="mlp_bias", reads=("attention_bias", "mlp_bias")
    ),
    "MistralForCausalLM": Family(windows="all", defaults=dict(sliding_window=4096)),
    "Qwen2ForCausalLM": Family(qkv_bias=True, windows="typed", reads=_QWEN_WINDOW),
    "Qwen3ForCausalLM": Family(
        **_LLAMA_BIASES, qk_norm="head", windows="typed", defaults=dict(head_dim=128),
        reads=("attention_bias", *_QWEN_WINDOW),
    ),
    "Gemma2ForCausalLM": Family(
        **_GEMMA,
        defaults=dict(**_GEMMA_DEFAULTS, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
                      sliding_window_pattern=2),
    ),
    "Gemma3ForCausalLM": Family(
        **_GEMMA, qk_norm="head",
        defaults=dict(**_GEMMA_DEFAULTS, sliding_window_pattern=6, rope_theta=1e6, rope_local_base_freq=1e4),
    ),
    "Phi3ForCausalLM": Family(
        fused_projections=True, windows="all", defaults=dict(rms_norm_eps=1e-5),
        reads=("original_max_position_embeddings", "partial_rotary_factor"),
    ),
    "Olmo2ForCausalLM": Family(
        **_LLAMA_BIASES, qk_norm="all", norms="post", defaults=dict(rms_norm_eps=1e-5),
        reads=("attention_bias",)
    ),
    "SmolLM3ForCausalLM": Family(
        **_LLAMA_BIASES, mlp_bias="mlp_bias", windows="typed",
        defaults=dict(rope_theta=2e6, tie_word_embeddings=True, no_rope_layer_interval=4),
        reads=("attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", *_QWEN_WINDOW),
    ),
    "MixtralForCausalLM": Family(
        windows="all", experts="mixtral", defaults=dict(rms_norm_eps=1e-5, rope_theta=1e6,
        num_local_experts=8),
        reads=("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef", "output_router_logits"),
    ),
    "Qwen3MoeForCausalLM": Family(
        **_LLAMA_BIASES, qk_norm="head", windows="all", experts="qwen",
        reads=("attention_bias", *_QWEN_WINDOW, "num_local_experts", "num_experts", "num_experts_per_tok",
               "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
               "router_aux_loss_coef", "output_router_logits"),
    ),
}

COMMON_FIELDS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings",
    "max_position_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "layer_types",
}
# Fields whose default is a feature, which null turns off
OFF_BY_NULL = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "num_key_value_heads", "sliding_window", "num_local_experts", "num_experts", "num_experts_per_tok",
    "moe_intermediate_size", "decoder_sparse_step", "max_window_layers", "no_rope_layer_interval",
    "max_position_embeddings", "original_max_position_embeddings", "sliding_window_pattern",
    "_sliding_window_pattern",
)
SWITCHES = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob",
    "output_router_logits",
)
NUMBERS = (
    "rms_norm_eps", "rope_theta", "partial_rotary_factor", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "rope_local_base_freq", "router_aux_loss_coef", "initializer_range",
)
# Fields that do not touch the forward arithmetic: identity, generation defaults, and leftovers of training
# libraries and servers. Neither does any name that begins with an underscore, unless the family reads it.
INERT_FIELDS = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "auto_map",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "use_cache",
    "initializer_range", "return_dict", "torchscript", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type", "tokenizer_class", "prefix", "task_specific_params", "finetuning_task", "pruned_heads",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "cache_implementation", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
    "unsloth_version", "unsloth_fixed", "is_llama_config", "transformers.js_config", "pretraining_tp",
    "max_window_layers",
    "output_router_logits", "router_aux_loss_coef", "num_logits_to_keep", "hidden_activation",
    "use_bfloat16", "gradient_checkpointing", "gradient_checkpointing_kwargs", "max_sequence_length",
    "max_seq_length", "model_max_length", "loss_type", "tokenizer_name", "is_decoder", "output_attentions",
    "output_hidden_states", "output_scores", "return_dict_in_generate", "remove_invalid_values",
    "tf_legacy_loss", "use_flash_attn", "use_flash_attention", "use_sdpa", "low_cpu_mem_usage", "world_size",
    "model_name", "move_model_to_device", "sequence_parallel_enabled", "selective_checkpoint_enabled",
    "tokenizer_padding_side", "pad_token",
}
# Fields that restate what this code computes anyway, with the value for which that is true
IMPLIED_FIELDS = {"partial_rotary_factor": 1, "moe_frequency": 1, "full_attn_mod": 1, "interpolate_factor": 1}


@dataclass
class Rope:
    """Rotary embedding of one kind of layer: its frequencies, and their scaling with length."""

    dim: int  # rotated dimensions of a head
    kind: str = "default"
    theta: float = 10000.0
    params: dict = field(default_factory=dict)
    max_positions: int = 0  # where `dynamic` starts to stretch

    def frequencies(self, device) -> tuple[Tensor, float]:
        """Inverse frequencies [dim/2] in fp32, and the factor on cos and sin."""
        p = self.params
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim
        inverse = 1.0 / self.theta**exponent
        if self.kind in ("default", "dynamic"):
            return inverse, 1.0
        if self.kind == "linear":  # position interpolation, arXiv 2306.15595
            return inverse / p["factor"], 1.0
        original = p.get("original_max_position_embeddings") or self.max_positions
        if self.kind == "llama3":  # Llama 3.1: stretch long wavelengths, keep short ones, blend between
            low, high = p["low_freq_factor"], p["high_freq_factor"]
            wavelength = 2 * math.pi / inverse
            blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
            return blend * inverse + (1 - blend) * inverse / p["factor"], 1.0
        # yarn, arXiv 2309.00071 §3.2–3.3: interpolate dimensions that turn less than beta_slow times in the
        # original context, keep those that turn more than beta_fast times, a linear ramp between.
        factor = p.get("factor") or self.max_positions / original

        def turns_at(rotations: float) -> float:
            return self.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        first, last = turns_at(p.get("beta_fast") or 32), turns_at(p.get("beta_slow") or 1)
        if p.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.dim - 1)
        ramp = (torch.arange(self.dim // 2, dtype=torch.float32, device=device) - first) / max(
            last - first, 0.001
        )
        ramp = ramp.clamp(0, 1)

        def mscale(m: float) -> float:
            return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

        scale = p.get("attention_factor")
        if scale is None:
            both = p.get("mscale") and p.get("mscale_all_dim")
            scale = mscale(p["mscale"]) / mscale(p["mscale_all_dim"]) if both else mscale(1.0)
        return inverse / factor * ramp + inverse * (1 - ramp), float(scale)

    def tables(
        self, position_ids: Tensor, lengths: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, 1, dim/2] for `position_ids` [B, T].

        `dynamic` (NTK-aware) stretches theta with the length of the sequence that a token is in, `lengths`
        [B, T]: by document, so that packing or batching does not change what a document computes.
        """
        inverse, scale = self.frequencies(position_ids.device)
        if self.kind == "dynamic":
            assert lengths is not None
            factor = self.params["factor"]
            length = lengths.clamp(min=self.max_positions).float()[..., None]
            stretch = (factor * length / self.max_positions - (factor - 1)) ** (self.dim / (self.dim - 2))
            exponent = (
                torch.arange(0, self.dim, 2, dtype=torch.float32, device=position_ids.device) / self.dim
            )
            inverse = 1.0 / (self.theta * stretch) ** exponent
        angles = position_ids[..., None].float() * inverse
        return (angles.cos() * scale).to(dtype)[:, :, None], (angles.sin() * scale).to(dtype)[:, :, None]


@dataclass
class Architecture:
    """One checkpoint's arithmetic, read from its config.json."""

    name: str
    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    attention_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    windows: list[int | None]  # by layer
    ropes: dict[str, Rope]
    layer_ropes: list[str | None]  # by layer: key into ropes, None for a layer without positions (NoPE)
    num_experts: int
    experts_per_token: int
    expert_size: int
    normalize_experts: bool
    expert_layers: list[bool]  # by layer
    router_aux_loss_coef: float
    raw: dict  # config.json as it was read, written back on save
    checkpoint_vocab_size: int = 0  # rows of the embedding before it was grown
    notes: tuple[str, ...] = ()  # where config.json contradicts itself, and which value is followed

    def arithmetic(self) -> list[tuple[str, Any]]:
        """The fields of config.json that decide what is computed, except the size of the vocabulary."""
        inert = INERT_FIELDS - set(self.family.reads) | {"vocab_size"}
        read = [k for k in self.raw if k in self.family.reads or not (k in inert or k.startswith("_"))]
        return [(key, self.raw[key]) for key in sorted(read)]

    @staticmethod
    def from_config(raw: dict, source: str = "config.json", ignore: list[str] | tuple = ()) -> "Architecture":
        """Raises CheckpointError for an unsupported field or architecture, or a value of the wrong type."""

        def refuse(what: str, remedy: str = "") -> CheckpointError:
            return CheckpointError(f"{source}: {what}{'; ' + remedy if remedy else ''}")

        name = _family_name(raw, refuse)
        family = FAMILIES[name]
        cfg: dict[str, Any] = {**family.defaults, **{k: v for k, v in raw.items() if v is not None}}
        for key in OFF_BY_NULL & raw.keys():  # null is not the same as absent: it overrides the default
            if raw[key] is None:
                cfg.pop(key, None)
        _check_fields(cfg, name, ignore, refuse)
        try:
            L, D, H = cfg["num_hidden_layers"], cfg["hidden_size"], cfg["num_attention_heads"]
            vocab_size, F_ = cfg["vocab_size"], cfg["intermediate_size"]
        except KeyError as error:
            raise refuse(f"field {error.args[0]} is missing") from None
        E = cfg.get("head_dim") or D // H
        activation = cfg.get("hidden_activation" if "hidden_activation" in family.reads else "hidden_act")
        activation = activation or "silu"
        if activation not in ("silu", "gelu_pytorch_tanh", "gelu"):
            raise refuse(
                f"activation {activation!r} is not supported", "supported: silu, gelu, gelu_pytorch_tanh"
            )

        if "partial_rotary_factor" not in family.reads:  # 1, or one that the user says to ignore
            cfg.pop("partial_rotary_factor", None)
        rope_layers: list = cfg.get("no_rope_layers") or []  # despite its name, 1 marks a layer with RoPE
        if "no_rope_layers" in family.reads and not rope_layers:
            rope_layers = [int((i + 1) % cfg["no_rope_layer_interval"] != 0) for i in range(L)]
        window, types = _layer_types(family, cfg, raw, rope_layers, refuse)
        ropes, notes = _read_ropes(cfg, E, refuse, ignore)
        layer_ropes: list[str | None] = ["all" if "all" in ropes else kind for kind in types]
        if rope_layers:
            layer_ropes = [key if rope else None for key, rope in zip(layer_ropes, rope_layers, strict=True)]
        superseded = {"quantization_config"}  # the weights are saved dense
        if cfg.get("rope_scaling") and "rope_local_base_freq" not in cfg:
            superseded.add("rope_parameters")

        def decide(switch: bool | str) -> bool:
            return bool(cfg.get(switch, False)) if isinstance(switch, str) else switch

        X = (cfg.get("num_local_experts") or cfg.get("num_experts") or 0) if family.experts != "none" else 0
        dense = cfg.get("mlp_only_layers", [])
        sparse_step = cfg.get("decoder_sparse_step", 1)
        scalar = cfg.get("query_pre_attn_scalar") if family.softcaps else None
        mixtral = family.experts == "mixtral"
        return Architecture(
            name=name, family=family, vocab_size=vocab_size, hidden_size=D, intermediate_size=F_,
            num_layers=L, num_heads=H, num_kv_heads=cfg.get("num_key_value_heads") or H, head_dim=E,
            norm_eps=cfg.get("rms_norm_eps", 1e-6), activation=activation,
            tied=bool(cfg.get("tie_word_embeddings", False)),
            qkv_bias=decide(family.qkv_bias), o_bias=decide(family.o_bias), mlp_bias=decide(family.mlp_bias),
            attention_scale=(scalar or E) ** -0.5,
            attention_softcap=cfg.get("attn_logit_softcapping") if family.softcaps else None,
            final_softcap=cfg.get("final_logit_softcapping") if family.softcaps else None,
            windows=[window if kind == "sliding_attention" else None for kind in types],
            ropes=ropes, layer_ropes=layer_ropes,
            num_experts=X, experts_per_token=cfg.get("num_experts_per_tok", 2 if mixtral else 8),
            expert_size=F_ if mixtral else cfg.get("moe_intermediate_size", 768),
            normalize_experts=mixtral or bool(cfg.get("norm_topk_prob", False)),
            expert_layers=[X > 0 and i not in dense and (i + 1) % sparse_step == 0 for i in range(L)],
            router_aux_loss_coef=cfg.get("router_aux_loss_coef", 0.001) if X else 0.0,
            raw={key: value for key, value in raw.items() if key not in superseded},
            checkpoint_vocab_size=vocab_size, notes=tuple(notes),
        )


def _family_name(raw: dict, refuse: Callable) -> str:
    """The key into FAMILIES: from `architectures`, or from `model_type` where there is none."""
    names = raw.get("architectures") or [None]
    if not isinstance(names, list):
        raise refuse(f"architectures is {shown(names)}, not a list of names")
    spellings = {known.lower(): known for known in FAMILIES}  # early conversions say LLaMAForCausalLM
    by_type = {re.sub(r"\W|_", "", k.removesuffix("ForCausalLM")).lower(): k for k in FAMILIES}
    model_type = re.sub(r"_text$", "", str(raw.get("model_type"))).replace("_", "")
    name = spellings.get(str(names[0]).lower(), names[0]) or by_type.get(model_type, raw.get("model_type"))
    if name not in FAMILIES:
        raise refuse(f"architecture {name} is not supported", "supported: " + ", ".join(FAMILIES))
    if (other := by_type.get(model_type, name)) != name:
        raise refuse(f"architectures has {name}, but model_type means {other}", "correct the wrong one")
    return name


def _check_fields(cfg: dict, name: str, ignore: list[str] | tuple, refuse: Callable) -> None:
    """Refuse unsupported quantisation, unknown fields, and values of the wrong type."""
    family = FAMILIES[name]
    quantization = cfg.get("quantization_config")
    if quantization is not None:
        if not isinstance(quantization, dict):
            raise refuse(f"quantization_config is {shown(quantization)}, not an object")
        method, kind = quantization.get("quant_method"), quantization.get("bnb_4bit_quant_type", "nf4")
        if method is None:  # bitsandbytes before it had a name; NVIDIA's tools say quant_algo
            old = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
            method = "bitsandbytes" if old else quantization.get("quant_algo", shown(quantization))
        if method != "bitsandbytes" or kind != "nf4":
            what = kind if method == "bitsandbytes" else method
            raise refuse(f"quantization_config: {what} is not supported", "use the bf16 original")
    known = COMMON_FIELDS | INERT_FIELDS | set(family.reads) | set(ignore) | {"quantization_config"}
    implied = IMPLIED_FIELDS | {"sliding_window_size": cfg.get("sliding_window")}
    implied |= {"use_qk_norm": True} if family.qk_norm != "none" else {}
    for key, value in cfg.items():
        # A switch that is off changes nothing.
        inert = key in known or key.startswith("_") or value in (None, False, 0, 0.0, [], {})
        if not inert and (key not in implied or value != implied[key]):
            raise refuse(
                f"field {key}={shown(value)} is not known for {name} and may change the arithmetic",
                f"if it does not, set ignore_config_fields: [{key}]",
            )
    read = COMMON_FIELDS | set(family.reads) | {"initializer_range"}
    for key in sorted(read & cfg.keys()):
        check_type(key, cfg[key], refuse)
    if name == "Gemma2ForCausalLM" and cfg["sliding_window_pattern"] != 2:
        raise refuse("sliding_window_pattern is not 2, which Gemma 2 always has", "use layer_types")
    experts = {key: cfg[key] for key in ("num_experts", "num_local_experts") if key in read & cfg.keys()}
    if len(set(experts.values())) > 1:
        raise refuse(f"{shown(experts)} are the same number by two names", "keep the right one")


def check_type(key: str, value: Any, refuse: Callable) -> None:
    """Refuse a value of the wrong type: text instead of a number would fail much later, in a way that names
    neither the file nor the field."""

    def number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def list_of(value: Any, kind: type) -> bool:
        return isinstance(value, list) and all(type(item) is kind for item in value)

    if key in SIZES:
        most = 10_000 if key == "num_hidden_layers" else 2**24
        if not (type(value) is int and 0 <= value <= most):
            raise refuse(f"{key} is {shown(value)}, not a whole number up to {most:,}")
    elif key in SWITCHES and type(value) is not bool:
        raise refuse(f"{key} is {shown(value)}, neither true nor false")
    elif key in NUMBERS and not (number(value) and value >= 0):
        raise refuse(f"{key} is {shown(value)}, not a number of at least 0")
    elif key in ("hidden_act", "hidden_activation") and not isinstance(value, str):
        raise refuse(f"{key} is {shown(value)}, not the name of an activation")
    elif key == "layer_types" and not list_of(value, str):
        raise refuse(f"{key} is {shown(value)}, not a list of names")
    elif key in ("no_rope_layers", "mlp_only_layers") and not list_of(value, int):
        raise refuse(f"{key} is {shown(value)}, not a list of whole numbers")
    elif key in ("rope_parameters", "rope_scaling") and not isinstance(value, dict):
        raise refuse(f"{key} is {shown(value)}, not an object")


def _layer_types(
    family: Family, cfg: dict, raw: dict, rope_layers: list, refuse: Callable
) -> tuple[int | None, list[str]]:
    """(the sliding window, full_attention or sliding_attention by layer)."""
    L, window, types = cfg["num_hidden_layers"], cfg.get("sliding_window"), cfg.get("layer_types")
    if "use_sliding_window" in family.reads and not cfg.get("use_sliding_window", False):
        window = None if "layer_types" not in raw else window
    if types is not None:
        if len(types) != L or any(t not in ("full_attention", "sliding_attention") for t in types):
            raise refuse(f"layer_types must be {L} of full_attention, sliding_attention", f"it is {types}")
    elif family.windows == "none" or window is None:
        types = ["full_attention"] * L
    elif family.windows == "all":
        types = ["sliding_attention"] * L
    elif "no_rope_layers" in family.reads:
        types = ["full_attention" if rope else "sliding_attention" for rope in rope_layers]
    elif "max_window_layers" in family.reads:
        first = cfg.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(L)]
    else:
        period = cfg.get("_sliding_window_pattern") or cfg["sliding_window_pattern"]
        types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(L)]
    if "sliding_attention" in types and not window:
        raise refuse("layer_types has sliding_attention but sliding_window is not set")
    return window, types


def _read_ropes(
    cfg: dict, head_dim: int, refuse: Callable, ignore: Sequence[str]
) -> tuple[dict[str, Rope], list[str]]:
    """(rotary embeddings by kind of layer, notes), in the format of transformers 4 (rope_scaling) or 5
    (rope_parameters). If both are given, rope_scaling wins, as in transformers
    (modeling_rope_utils.convert_rope_params_to_dict)."""
    parameters, scaling = dict(cfg.get("rope_parameters") or {}), cfg.get("rope_scaling") or {}

    def read(parameters: dict, scaling: dict) -> dict[str, Rope]:
        if "rope_local_base_freq" in cfg:  # Gemma 3: rope_scaling applies to global layers only
            by_type = parameters
            if not {"full_attention", "sliding_attention"} & set(parameters):
                local = {"rope_theta": cfg["rope_local_base_freq"]}
                by_type = {"full_attention": parameters, "sliding_attention": local}
            by_type = {**by_type, "full_attention": {**(by_type.get("full_attention") or {}), **scaling}}
            local = {"rope_theta": cfg["rope_local_base_freq"], **(by_type.get("sliding_attention") or {})}
            by_type = {**by_type, "sliding_attention": local}
        else:
            by_type = scaling or parameters
            if not {"full_attention", "sliding_attention"} & set(by_type):
                by_type = {"all": by_type}
        for key, value in by_type.items():
            if not isinstance(value, dict):
                raise refuse(f"rope_parameters: {key} is {shown(value)}, not an object")
        kept = {key: {k: v for k, v in value.items() if k not in ignore} for key, value in by_type.items()}
        return {key: _read_rope(value, cfg, head_dim, refuse) for key, value in kept.items()}

    ropes = read(parameters, scaling)
    if not (parameters and scaling) or ropes == read(parameters, {}):
        return ropes, []
    return ropes, [
        f"rope_scaling ({shown(scaling)}) and rope_parameters ({shown(parameters)}) contradict each other: "
        "rope_scaling is followed, as in transformers"
    ]


ROPE_FIELDS = {
    "default": set(), "linear": {"factor"}, "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
    "mscale",
             "mscale_all_dim", "truncate"},
}


def _read_rope(params: dict, cfg: dict, head_dim: int, refuse: Callable) -> Rope:
    kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
    params.pop("type", None)
    theta = params.pop("rope_theta", None) or cfg.get("rope_theta", 10000.0)
    partial = params.pop("partial_rotary_factor", None) or cfg.get("partial_rotary_factor", 1.0)
    params = {key: value for key, value in params.items() if value is not None}
    check_type("rope_theta", theta, refuse)
    check_type("partial_rotary_factor", partial, refuse)
    for key, value in params.items():
        kinds = (bool,) if key in ("truncate", "finetuned") else (int, float)
        if type(value) not in kinds:
            what = "neither true nor false" if kinds == (bool,) else "not a number"
            raise refuse(f"rope field {key} is {shown(value)}, {what}")
    if kind not in ROPE_FIELDS:
        raise refuse(f"rope type {kind!r} is not supported", "supported: " + ", ".join(ROPE_FIELDS))
    inert = {"original_max_position_embeddings", "finetuned"}  # the first is read by llama3 and yarn only
    unknown = set(params) - ROPE_FIELDS[kind] - inert
    if unknown:
        field = sorted(unknown)[0]
        raise refuse(
            f"rope field {field} is not known for rope type {kind}",
            f"if it changes nothing, set ignore_config_fields: [{field}]",
        )
    needed = {"linear": {"factor"}, "dynamic": {"factor"}, "llama3": ROPE_FIELDS["llama3"]}.get(kind, set())
    if needed - set(params):
        raise refuse(f"rope type {kind} lacks {sorted(needed - set(params))[0]}")
    return Rope(int(head_dim * partial), kind, float(theta), params, cfg.get("max_position_embeddings", 0))
