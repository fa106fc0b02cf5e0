"""Converts an axolotl config, or a TRL trainer's arguments as YAML, to our options: `python -m health convert
theirs.yaml`.

Options that the source config omits keep *its* defaults, which are written out where ours differ. Comments
list options whose meaning changes, that are lost, or that need no setting; other algorithms are refused.
`python -m health convert > docs/migration.md` writes the tables; a test checks that they are current.
Sources: axolotl's schemas (src/axolotl/utils/schemas) and TRL 1.16's config classes.
"""

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from run.config import ConfigError, config_of, read_options, shown

Values = dict[str, Any]

# ------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------

# theirs → ours, where only the name differs
NAMES: dict[str, str] = {
    "model_name_or_path": "base_model", "model_revision": "base_model_revision",
    "revision_of_model": "base_model_revision", "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs", "max_seq_length": "sequence_len", "max_length": "sequence_len",
    "packing": "sample_packing", "run_name": "wandb_name", "adam_eps": "adam_epsilon",
    "peft_use_rslora": "lora_use_rslora", "use_rslora": "lora_use_rslora",
    "cosine_min_lr_ratio": "min_lr_ratio", "vllm_server_timeout": "vllm_timeout",
    "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
    "dp_shard_size": "hsdp_shard_size", "num_generations_eval": "eval_num_generations",
    "vllm_max_model_length": "vllm_max_model_len",
}


def _words(text: str) -> set[str]:
    return set(text.split())


def _by_name(table: dict[str, str]) -> dict[str, str]:
    """Invert {key: "name name …"} to {name: key}."""
    return {name: under for under, names in table.items() for name in names.split()}


OPTIMIZERS = _by_name({
    "adamw": "adamw adamw_torch adamw_torch_fused adamw_hf paged_adamw paged_adamw_32bit adamw_apex_fused",
    "adamw_8bit": "adamw_8bit adamw_bnb_8bit adamw_torch_8bit paged_adamw_8bit ao_adamw_8bit", "muon": "muon",
})
SCHEDULERS = {
    "cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd", "cosine_with_min_lr": "cosine",
}

# axolotl's template name → the one shipped here; for all others the checkpoint's own is used.
TEMPLATES = {"chatml": "chatml", "llama3": "llama3", "gemma": "gemma", "gemma3": "gemma", "phi_3": "phi_3",
             "phi_35": "phi_3"}
OWN_TEMPLATES = _words("""
    tokenizer_default qwen_25 qwen3 qwen3_5 mistral_v1 mistral_v2v3 mistral_v3_tekken mistral_v7_tekken
    deepseek_v2 deepseek_v3 phi_4 cohere command_a command_a_tool_use command_a_rag jamba falcon_h1 exaone
    exaone4 llama4 gemma3n gemma4 gemma4_unified nemotron_h aya llama3_2_vision metharme pixtral llava
    qwen2_vl
""")

# axolotl's data set type → (our type, columns, options of the whole run, what changes)
DATA_TYPES: dict[str, tuple[str | None, Values, Values, str]] = {
    "chat_template": ("chat", {}, {}, ""), "chat_template.default": ("chat", {}, {}, ""),
    "sharegpt": ("chat", {}, {}, ""),
    "alpaca": ("instruct", {}, {}, "goes through the chat template if there is one, where axolotl writes "
                                   "the Alpaca prompt"),
    "completion": ("text", {}, {}, ""), "pretrain": ("text", {}, {}, ""),
    "ebft_pretrain.transform": ("text", {}, {}, ""),
    "ebft_opencode.transform": ("instruct", {"instruction": "input"}, {}, ""),
    "ebft_strided_structured.transform": (
        "prompt_completion", {"prompt": "input", "completion": "output"}, {},
        "axolotl takes the first of input, prompt, question and of output, completion, answer: set columns"),
    "ebft_strided_chat.transform": ("chat", {}, {}, ""),
    "ebft_chat_multiturn.transform": ("chat", {}, {"chat_turns": "rollout"}, ""),
    "ebft_chat_multiturn.transform_last_turn": ("chat", {}, {"chat_turns": "last"}, ""),
    "ebft_chat_multiturn.transform_all_turns": ("chat", {}, {"chat_turns": "every"}, ""),
    "ebft_reasoning.transform": ("chat", {}, {}, ""),
    "ebft_reasoning.transform_strided": ("chat", {}, {}, ""),
    "ebft_reasoning.transform_answer_only": ("chat", {}, {"strip_thinking": True}, ""),
}

# Their defaults where ours differ, by recipe
DEFAULTS: dict[str, dict[str, Values]] = {
    "axolotl": {
        "all": {"adam_beta2": 0.999, "weight_decay": 0.0, "warmup_ratio": 0.03, "saves_per_epoch": 1,
                "save_total_limit": 4},
        "sft": {"sequence_len": 512},
        "grpo": {"max_completion_length": 512, "micro_batch_size": 1},
        "ebft": {"max_completion_length": 512, "sequence_len": 512},
    },
    "TRL": {
        "all": {"adam_beta2": 0.999, "weight_decay": 0.0, "num_epochs": 3, "lr_scheduler": "linear",
                "micro_batch_size": 8, "bf16": True, "gradient_checkpointing": True, "logging_steps": 10,
                "save_steps": 500},
        "sft": {"sequence_len": 1024, "excess_length_strategy": "truncate", "train_on_inputs": True},
        "grpo": {"learning_rate": 1e-6, "max_completion_length": 512, "use_bias_correction_kl": True},
    },
}
PEFT_DEFAULTS: Values = {"lora_dropout": 0.05, "lora_target_modules": ["q_proj", "v_proj"]}

# Options that are dropped because nothing needs to be set: reason → options
NOT_NEEDED = _by_name({
    "attention is one kernel of ours, always within documents": """
        flash_attention flex_attention sdp_attention xformers_attention attn_implementation s2_attention
        flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp fused_attn_kernel
        flex_attn_compile_kwargs
        pretrain_multipack_attn flash_optimum gemma4_hybrid_attn_impl batch_flattening""",
    "FSDP2 shards as soon as torchrun starts several processes; see hsdp_shard_size": """
        fsdp fsdp_version ddp ddp_find_unused_parameters ddp_backend ddp_timeout ddp_bucket_cap_mb
        ddp_broadcast_buffers device_map accelerator_config experimental_skip_move_to_device use_ray
        ray_num_workers dp_replicate_size local_rank use_cpu no_cuda ds3_gather_for_generation""",
    "no DeepSpeed: FSDP2 does what ZeRO-3 does; its offload is fsdp_cpu_offload": "deepspeed",
    "rows are encoded once, cached, and shuffled by seed": """
        dataset_num_proc dataset_processes skip_prepare_dataset streaming streaming_multipack_buffer_size
        shuffle_merged_datasets dataset_kwargs remove_unused_columns dataloader_num_workers
        dataloader_pin_memory
        dataloader_prefetch_factor dataloader_persistent_workers shuffle_dataset dataset_streaming
        data_seed""",
    "our own kernels are used where they apply": """
        liger_rms_norm liger_glu_activation liger_rope liger_layer_norm liger_swiglu liger_rms_norm_gated
        liger_cross_entropy liger_fused_linear_cross_entropy use_liger_kernel use_liger_loss cut_cross_entropy
        lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel use_kernels tiled_mlp
        torch_compile
        torch_compile_backend torch_compile_mode use_scattermoe use_sonicmoe experts_implementation
        unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o use_dsv4_kernels dsv4_fp4_grouped_mode
        use_glm_dsa_kernels llama4_linearized_experts activation_offloading cache_implementation""",
    "the token that ends a turn is found by the chat template": "eot_tokens",
    "FSDP2 alone gives the same numbers, but fits less into a GPU": """
        context_parallel_size tensor_parallel_size expert_parallel_size sequence_parallel_degree
        heads_k_stride
        ring_attn_func expert_parallel_num_nvl_bytes expert_parallel_token_capacity""",
    "final/ is a folder that can be uploaded as it is": """
        hub_model_id hub_strategy hub_model_revision hub_private_repo push_to_hub hub_always_push hub_token
        log_completions_hub_repo push_dataset_to_hub overwrite_hub_revision callbacks benchmarks""",
    "metrics.jsonl and TensorBoard are always written; wandb_project adds Weights & Biases": """
        report_to use_wandb use_tensorboard use_mlflow mlflow_experiment_name wandb_watch
        wandb_log_model use_comet
        use_swanlab swanlab_project swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace
        swanlab_log_model swanlab_log_completions swanlab_completion_log_interval
        swanlab_completion_max_buffer
        use_otel_metrics otel_metrics_host otel_metrics_port logging_dir log_multimodal log_unique_prompts
        logging_strategy logging_first_step log_level disable_tqdm log_on_each_node
        num_completions_to_print""",
    "the server is plain vLLM, started by `python grpo.py serve`": """
        vllm_host vllm_port vllm_group_port vllm_model_impl vllm_enable_sleep_mode vllm_device vllm_lora_sync
        vllm_serve_module vllm_worker_extension_cls vllm_enforce_eager vllm_enable_prefix_caching
        vllm_data_parallel_size use_transformers_paged use_transformers_continuous_batching""",
    "nothing to set here": """
        pad_to_sequence_len eval_sample_packing eval_packing group_by_length strict tf32
        is_llama_derived_model
        is_falcon_derived_model is_mistral_derived_model model_type tokenizer_type tokenizer_config
        tokenizer_use_fast tokenizer_legacy trust_remote_code base_model_config
        base_model_ignore_patterns plugins
        low_cpu_mem_usage torch_dtype dtype padding_free packing_strategy eval_batch_size do_train do_eval
        per_device_eval_batch_size sample_packing_bin_size sample_packing_group_size lora_task_type
        save_safetensors save_only_model lora_fan_in_fan_out hf_use_auth_token average_tokens_across_devices
        bnb_config_kwargs bnb_4bit_quant_type bnb_4bit_compute_dtype use_bnb_nested_quant
        bnb_4bit_quant_storage
        bnb_4bit_use_double_quant debug overwrite_output_dir full_finetune ignore_data_skip model_init_kwargs
        include_tokens_per_second include_num_input_tokens_seen gc_steps torch_empty_cache_steps
        disable_dropout
        use_data_producer prefetch_depth skip_zero_advantage_batches reward_num_workers
        ignore_bias_buffers env""",
})

# Options that are dropped although they change the result: remarks on the common ones
LOST: dict[str, str] = {
    "model_config": "the checkpoint's config.json is used unchanged",
    "unfrozen_parameters": "either every weight is trained or only adapters are",
    "lora_modules_to_save": "only adapters, and the rows of new tokens, are trained beside the frozen base",
    "lora_target_parameters": "adapters sit on linear layers, not on stacked experts",
    "neftune_noise_alpha": "there is no noise on embeddings",
    "label_smoothing_factor": "there is no label smoothing",
    "early_stopping_patience": "a run has a fixed length; on_unhealthy can stop an unhealthy one",
    "loss_watchdog_threshold": "see the rules of the health page and on_unhealthy: stop",
    "loss_watchdog_patience": "see the rules of the health page and on_unhealthy: stop",
    "system_prompt": "write it into `system:` of the data set",
    "quantize_moe_experts": "experts stay in bf16",
    "tokenizer_use_mistral_common": "the checkpoint's tokenizer.json is read",
    "completion_only_loss": "train_on_inputs is for all data sets",
    "init_lora_weights": "A is uniform and B zero", "peft_init_lora_weights": "A is uniform and B zero",
    "peft": "docs/training.md lists the supported adapters",
    "repetition_penalty": "sampling from anything but the policy itself makes every ratio wrong",
    "generation_kwargs": "answers end at the checkpoint's own stop tokens",
    "top_p": "must be 1 in training: the sampler would renormalise, the trainer not",
    "top_k": "must be 0 in training: the sampler would renormalise, the trainer not",
    "min_p": "must be 0 in training: the sampler would renormalise, the trainer not",
    "reinit_weights": "random_init of sft.py does this",
}

# Options that identify an unsupported algorithm: algorithm → options
OTHER_ALGORITHMS = _by_name({
    "a reward model": "reward_model center_rewards_coefficient", "a classifier": "num_labels",
    "a process reward model": "process_reward_model step_separator",
    "preference optimisation": """
        rl_beta orpo_alpha cpo_alpha simpo_gamma dpo_beta dpo_label_smoothing dpo_norm_loss
        dpo_use_weighting rpo_alpha
        reference_free label_smoothing f_divergence_type precompute_ref_log_probs judge""",
    "KTO": "kto_desirable_weight kto_undesirable_weight desirable_weight undesirable_weight",
    "PPO": "cliprange vf_coef num_ppo_epochs lam kl_coef",
    "distillation": "teacher_model_name_or_path lmbda teacher", "a diffusion language model": "diffusion",
    "ReLoRA": "relora", "LISA": "lisa_n_layers", "quantisation-aware training": "qat",
    "pruning": "llmcompressor",
    "training on GPTQ weights": "gptq",
    "a model of images or sound, and only text is trained here": "processor_type",
})
PREFERENCE_LOSSES = _words("""
    sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_pair aot_unpaired discopop
    apo_zero apo_down sigmoid_norm kto simpo alphapo
""")
RL_NAMES = {"dpo": "DPO", "ipo": "IPO", "orpo": "ORPO", "kto": "KTO", "simpo": "SimPO", "gdpo": "GDPO"}
SAMPLED = {"num_generations", "reward_funcs", "reward_weights", "max_completion_length", "scale_rewards"}
NESTED = ("trl", "ebft", "grpo")  # axolotl's blocks of trainer options
# Options that another option's rule reads
STEERS = _words("""
    rl vllm_server_host vllm_server_port vllm_server_base_url vllm_mode lr_scheduler_kwargs eta_min
    save_strategy eval_strategy evaluation_strategy sync_ref_model dataset_config dataset_train_split
    dataset_test_split dataset_prompt_column dataset_splits dataset_split dataset_text_field
    chat_template_jinja batch_size
""")


# ------------------------------------------------------------------------------------------------------------
# One config
# ------------------------------------------------------------------------------------------------------------


class Conversion:
    """A conversion in progress: the source options, flattened; the converted ones; and notes for the user."""

    def __init__(self, theirs: Values, recipe_names: set[str], recipe: str):
        self.source = (
            "TRL" if {"model_name_or_path", "per_device_train_batch_size"} & theirs.keys() else "axolotl"
        )
        self.recipe, self.names = recipe, recipe_names
        self.theirs: Values = {}
        for key, value in theirs.items():
            if key in NESTED and isinstance(value, dict):
                self.theirs |= {str(k): _number(v) for k, v in value.items()}
            elif key == "vllm" and isinstance(value, dict):
                self.theirs |= {f"vllm_{k}": _number(v) for k, v in value.items() if v is not None}
            else:
                self.theirs[str(key)] = _number(value)
        self.made: Values = {}
        self.filled: Values = {}  # the part of `made` that theirs omits
        self.notes: dict[str, list[tuple[str, str]]] = {"changed": [], "lost": [], "not needed": []}

    def say(self, kind: str, key: str, why: str) -> None:
        self.notes[kind].append((key, why))

    def get(self, key: str, default: Any = None) -> Any:
        value = self.theirs.get(key)
        return default if value is None else value


def _number(value: Any) -> Any:
    """Convert numbers such as 1e-4, which YAML 1.1 reads as text."""
    number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value.strip())
    return float(value) if number else value


Rule = Callable[[Conversion, Any], Values]


def _optimizer(c: Conversion, value: Any) -> Values:
    if value not in OPTIMIZERS:
        c.say("lost", "optimizer", f"{shown(value)} has no counterpart: adamw is taken")
        return {}
    return {"optimizer": OPTIMIZERS[value]}


def _scheduler(c: Conversion, value: Any) -> Values:
    if value not in SCHEDULERS:
        c.say("lost", "lr_scheduler", f"{shown(value)} has no counterpart: cosine is taken")
        return {"lr_scheduler": "cosine"}
    ours: Values = {"lr_scheduler": SCHEDULERS[value]}
    more = c.get("lr_scheduler_kwargs", {})
    lowest = more.get("min_lr", c.get("eta_min")) if isinstance(more, dict) else None
    if isinstance(more, dict) and "min_lr_rate" in more:
        ours["min_lr_ratio"] = more["min_lr_rate"]
    elif lowest is not None and float(c.get("learning_rate", 0)) > 0:
        ours["min_lr_ratio"] = float(f"{float(lowest) / float(c.theirs['learning_rate']):.6g}")
    rest = set(more) - {"min_lr", "min_lr_rate"} if isinstance(more, dict) else {more}
    if rest:
        c.say("lost", "lr_scheduler_kwargs", f"{', '.join(sorted(map(str, rest)))}: see lr_scheduler")
    return ours


def _warmup(c: Conversion, value: Any) -> Values:
    return {"warmup_ratio" if 0 < value < 1 else "warmup_steps": value if 0 < value < 1 else int(value)}


def _warmup_ratio(c: Conversion, value: Any) -> Values:
    return {} if c.get("warmup_steps", 0) else {"warmup_ratio": value}


def _adapter(c: Conversion, value: Any) -> Values:
    if value not in ("lora", "qlora"):
        raise ConfigError("adapter", value, "is not known here: adapters are lora or qlora")
    return {"adapter": "lora"} | ({"load_in_4bit": True} if value == "qlora" else {})


def _targets(c: Conversion, value: Any) -> Values:
    if value in ("all-linear", ["all-linear"]):
        return {}
    if isinstance(value, list) and len(value) == 1 and re.search(r"[\\^$+()|]", str(value[0])):
        return {"lora_target_modules": value[0]}
    return {"lora_target_modules": value}


def _saves(c: Conversion, value: Any) -> Values:
    return {} if c.get("save_strategy") in ("no", "epoch") else {"save_steps": value}


def _evals(c: Conversion, value: Any) -> Values:
    off = c.get("eval_strategy", c.get("evaluation_strategy")) == "no"
    return {} if off or not value else {"eval_steps": value}


def _evals_per_epoch(c: Conversion, value: Any) -> Values:
    return {"evals_per_epoch": int(value)} if value else {}


def _saves_per_epoch(c: Conversion, value: Any) -> Values:
    return {"saves_per_epoch": int(value)} if value else {}


def _resume(c: Conversion, value: Any) -> Values:
    if value == "":
        return {}
    if value in (True, "true", "True"):
        return {"resume": "auto"}
    return {"resume": "never" if value in (False, "false", "False") else value}


def _template(c: Conversion, value: Any) -> Values:
    if value in ("jinja", None):
        return {"chat_template": c.get("chat_template_jinja")} if c.get("chat_template_jinja") else {}
    name = str(value).removeprefix("tokenizer_default_fallback_")
    if name != value:
        c.say("changed", "chat_template", f"the checkpoint's own; set chat_template: {name} if it has none")
        return {}
    if value in TEMPLATES:
        return {"chat_template": TEMPLATES[value]}
    if value in OWN_TEMPLATES:
        if value != "tokenizer_default":
            c.say("changed", "chat_template", f"{value}: the checkpoint's own is taken, which is the same "
                                              "in the chat versions of that family")
        return {}
    return {"chat_template": value}  # the template itself, or a file


def _train_on_inputs(c: Conversion, value: Any) -> Values:
    return {"train_on_inputs": bool(value)}


def _assistant_only(c: Conversion, value: Any) -> Values:
    return {"train_on_inputs": not value}


def _tokens(c: Conversion, value: Any) -> Values:
    return {"special_tokens": value} if isinstance(value, dict) else {"tokens": value}


def _special(name: str) -> Rule:
    return lambda c, value: {"special_tokens": {**c.made.get("special_tokens", {}), name: value}}


def _accumulation(c: Conversion, value: Any) -> Values:
    if value == "auto":
        raise ConfigError("gradient_accumulation_steps", value, "must be a number here")
    return {"gradient_accumulation_steps": value}


def _generation_batch(c: Conversion, value: Any) -> Values:
    rows = c.get("micro_batch_size", c.get("per_device_train_batch_size", 8))
    c.say("changed", "generation_batch_size", "became steps_per_generation, for one process")
    return {"steps_per_generation": max(1, int(value) // int(rows))}


def _loss_type(c: Conversion, value: Any) -> Values:
    if c.recipe != "sft":
        return {"loss_type": value}
    if value not in ("nll", "chunked_nll"):
        c.say("lost", "loss_type", f"{shown(value)}: sft.py has the negative log-likelihood and no other")
    return {}


def _scale_rewards(c: Conversion, value: Any) -> Values:
    return {
        "scale_rewards": {True: "group", False: "none", "True": "group", "False": "none"}.get(value, value)
    }


def _colocated(c: Conversion) -> bool:
    return c.get("vllm_mode", "colocate" if c.source == "TRL" else "server") == "colocate"


def _vllm(c: Conversion, value: Any) -> Values:
    if not value:
        return {}
    if _colocated(c):
        c.say("changed", "vllm_mode", "colocate: here each server is a process of its own beside the trainer "
                                      "and always sleeps while it trains; set vllm_python if vLLM has an "
                                      "environment of its own")
        share = c.get("vllm_gpu_memory_utilization", 0.3)  # TRL's default; ours is that of a whole GPU
        return {"rollout_engine": "vllm", "vllm_mode": "colocate", "vllm_gpu_memory_utilization": share}
    host = c.get("vllm_server_host", c.get("vllm_host", "127.0.0.1"))
    host = "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104  a listening address, not the client's
    url = (
        c.get("vllm_server_base_url")
        or f"http://{host}:{c.get('vllm_server_port', c.get('vllm_port', 8000))}"
    )
    c.say(
        "changed",
        "use_vllm",
        "the server is plain vLLM: start it with `python grpo.py serve`, not with theirs",
    )
    return {"rollout_engine": "vllm", "vllm_server_base_url": [url] if isinstance(url, str) else url}


def _serving(name: str) -> Rule:
    """A vLLM server option; dropped if the config does not use vLLM. Ours has a server per GPU beside the
    trainer."""

    def rule(c: Conversion, value: Any) -> Values:
        if not c.get("use_vllm") or value is None:
            return {}
        if name == "vllm_tensor_parallel_size" and _colocated(c) and value != 1:
            c.say("changed", name, f"{value}: beside the trainer each GPU has a server of its own here")
            return {}
        return {name: value}

    return rule


def _reference_sync(c: Conversion, value: Any) -> Values:
    synced = c.get("sync_ref_model") and c.get("beta")
    return {"ref_model_sync_steps": value} if synced else {}


def _reference_alpha(c: Conversion, value: Any) -> Values:
    return {"ref_model_mixup_alpha": value} if c.get("sync_ref_model") and c.get("beta") else {}


def _fsdp_config(c: Conversion, value: Any) -> Values:
    plain = {str(k).removeprefix("fsdp_"): v for k, v in value.items()} if isinstance(value, dict) else {}
    ours: Values = {}
    if plain.get("offload_params"):
        ours["fsdp_cpu_offload"] = True
    if plain.get("reshard_after_forward") in (False, "NO_SHARD", "SHARD_GRAD_OP"):
        ours["fsdp_reshard_after_forward"] = False
    return ours


def _max_steps(c: Conversion, value: Any) -> Values:
    return {"max_steps": value} if value > 0 else {}


def _prompt_length(c: Conversion, value: Any) -> Values:
    c.say("changed", "max_prompt_length", "longer prompts are dropped; older TRL cuts off their beginning")
    return {"max_prompt_length": value}


def _reward_funcs(c: Conversion, value: Any) -> Values:
    functions = value if isinstance(value, list) else [value]
    own = {"exact_match", "numeric_match", "reasoning_gym", "format", "length"}
    for name in functions:
        if "." not in str(name) and (name not in own or name == "format"):
            remedy = f"write it as module.function beside this file, or take one of {', '.join(sorted(own))}"
            c.say("lost", "reward_funcs", f"{name} is a function of theirs: {remedy}")
    return {"reward_funcs": functions}


def _precision(c: Conversion, value: Any) -> Values:
    return {"bf16": value in (True, "auto", "full", "true")}


def _half(c: Conversion, value: Any) -> Values:
    if value is True:
        c.say("changed", "fp16", "became bf16, which needs no loss scaling")
    return {"bf16": True} if value is True else {}


def _checkpointing(c: Conversion, value: Any) -> Values:
    return {"gradient_checkpointing": bool(value)}


def _neutral(name: str, neutral: tuple) -> Rule:
    def rule(c: Conversion, value: Any) -> Values:
        if value not in neutral:
            c.say("lost", name, LOST[name])
        return {}

    return rule


def _as_it_is(name: str) -> Rule:
    return lambda c, value: {name: value}


# -- data sets -----------------------------------------------------------------------------------------------

_KNOWN_ROLES = {"user": {"human", "user"}, "assistant": {"gpt", "assistant", "chatgpt", "model"},
                "system": {"system"}, "tool": {"tool", "observation", "function_response"}}
_KNOWN_KEYS = {"role": {"role", "from"}, "content": {"content", "value"}}


def _path(entry: Values) -> str:
    path, local = entry["path"], entry["path"].startswith((".", "/", "~", "hf://"))
    ending = Path(path).suffix in (".jsonl", ".json", ".parquet", ".txt", ".ndjson")
    if not local and not ending and path.count("/") == 1:
        revision = entry.get("revision")
        path = "hf://datasets/" + path + (f"@{revision}" if revision else "")
    return path


def _dataset(c: Conversion, entry: Any) -> list[Values]:
    """Convert one axolotl data set; it becomes several if it lists several files."""
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ConfigError("datasets", entry, "each entry needs a path")
    given = {k: v for k, v in entry.items() if v not in (None, [], {})}
    made: Values = {"path": _path(given)}
    columns: dict[str, str] = {}
    kind = given.pop("type", None)
    if isinstance(kind, dict):  # a prompt format of the user's own
        made["type"] = "instruct"
        fields = {"instruction": "field_instruction", "input": "field_input", "output": "field_output",
                  "system": "field_system"}
        columns |= {ours: kind[its] for ours, its in fields.items() if kind.get(its) not in (None, "", ours)}
        if kind.get("system_prompt"):
            made["system"] = kind["system_prompt"]
        if any(kind.get(name) for name in ("format", "no_input_format", "system_format")):
            c.say("lost", "datasets.type.format", "instruct rows go through the chat template if there is "
                                                  "one, else under ### Instruction: and ### Response:; "
                                                  "for other forms write module.function")
    elif kind is not None:
        _refuse_preferences(str(kind), given)
        base = str(kind).split(":")[0] if str(kind).startswith(("alpaca:", "completion:")) else str(kind)
        if base in DATA_TYPES:
            made["type"], known, options, changed = DATA_TYPES[base]
            columns |= known
            c.made |= {name: value for name, value in options.items() if name in c.names}
            if changed or base != kind:
                c.say("changed", f"datasets.type {kind}", changed or f"{base} without {kind}")
        else:
            made["type"] = kind
            c.say("lost", "datasets.type", f"{kind} is a function or format of theirs: write "
                                           "module.function, which takes a row and returns one with "
                                           "messages, or prompt and completion")
    else:
        _refuse_preferences("", given)
    for field_, ours in (("field_messages", "messages"), ("field_tools", "tools"), ("field", "text"),
                         ("text_column", "text")):
        if (value := given.pop(field_, None)) not in (None, ours, "conversations"):
            columns[ours] = value
    mapping = dict(given.pop("message_property_mappings", {}))
    for key, ours in (("message_field_role", "role"), ("message_field_content", "content"),
                      ("message_field_training", "train")):
        if key in given:
            mapping[ours] = given.pop(key)
    thinking, shown_as = given.pop("field_thinking", None), given.pop("template_thinking_key", None)
    if thinking or shown_as:
        mapping["reasoning_content"] = thinking or "reasoning_content"
    known = {**_KNOWN_KEYS, "reasoning_content": {"reasoning_content", "thinking", "reasoning"}}
    columns |= {f"messages.{o}": its for o, its in mapping.items() if its not in known.get(o, {o})}
    roles = given.pop("roles", {})
    if any(set(theirs) - _KNOWN_ROLES.get(ours, {ours}) for ours, theirs in roles.items()):
        c.say("lost", "datasets.roles", f"{shown(roles)}: roles of other names need module.function")
    trained = given.pop("roles_to_train", ["assistant"])
    if set(trained) - {"assistant", "gpt"}:
        c.say("lost", "datasets.roles_to_train", f"{shown(trained)}: only assistant turns are trained, "
                                                 "or everything with train_on_inputs")
    for key, usual in (("train_on_eos", "turn"), ("train_on_eot", "turn")):
        if (value := given.pop(key, usual)) != usual:
            c.say("lost", f"datasets.{key}", f"{value}: the end of every trained turn is trained")
    template = given.pop("chat_template", None)
    template = given.pop("chat_template_jinja", None) if template == "jinja" else template
    if template is not None:
        of_run = _template(c, template).get("chat_template")
        if c.made.setdefault("chat_template", of_run) != of_run:
            c.say("lost", "datasets.chat_template", f"{shown(template)}: one template serves all data sets")
    for key in ("split", "name", "weight"):
        if key in given:
            made[key] = given.pop(key)
    if made.get("name") and not made["path"].startswith("hf://"):
        c.say("not needed", "datasets.name", f"{made.pop('name')}: {made['path']} is a file or folder")
    if columns:
        made["columns"] = columns
    files = given.pop("data_files", None)
    for key in ("path", "revision", "ds_type", "trust_remote_code", "shards", "skip", "preprocess_shards",
                "train_on_split", "conversation", "strict"):
        given.pop(key, None)
    for key, value in given.items():
        c.say("lost", f"datasets.{key}", f"{shown(value)}: not known here; see docs/data.md")
    if made.get("type") == "text" and "split" not in made and files is None and c.get("pretraining_dataset"):
        made["split"] = "train"
    if files is None:
        return [made]
    made.pop("split", None)
    return [
        {**made, "path": f"{made['path']}/{name}"} for name in ([files] if isinstance(files, str) else files)
    ]


def _refuse_preferences(kind: str, given: Values) -> None:
    signs = {"field_chosen", "field_rejected", "field_prompt"} & given.keys()
    if kind.startswith(("bradley_terry", "stepwise_supervised")):
        raise ConfigError("datasets", kind, "is data for a reward model; there are sft, grpo and ebft here")
    if signs or kind.rsplit(".", 1)[-1] in ("argilla", "ultra", "intel", "zephyr", "prompt_pairs"):
        raise ConfigError(
            "datasets", kind or sorted(signs)[0], "is preference data; there are sft, grpo and ebft"
        )


def _datasets(key: str) -> Rule:
    def rule(c: Conversion, value: Any) -> Values:
        entries = value if isinstance(value, list) else [{"path": value}]
        return {key: [made for entry in entries for made in _dataset(c, entry)]}

    return rule


def _pretraining(c: Conversion, value: Any) -> Values:
    entries = [{"type": "completion", **({"path": e} if isinstance(e, str) else e)}
               for e in (value if isinstance(value, list) else [value])]
    datasets = [one for entry in entries for one in _dataset(c, {**entry, "type": "completion"})]
    return {"datasets": datasets, "excess_length_strategy": "truncate"}


def _trl_dataset(c: Conversion, value: Any) -> Values:
    """Convert dataset_name and its companions; the first row's columns determine the type."""
    train: Values = {"path": _path({"path": value})}
    if c.get("dataset_config"):
        train["name"] = c.theirs["dataset_config"]
    if c.get("dataset_text_field", "text") != "text":
        train |= {"type": "text", "columns": {"text": c.theirs["dataset_text_field"]}}
    column = c.get("dataset_prompt_column")
    if column is not None:  # open-r1: the column becomes the user's message
        train |= {"type": "instruct", "columns": {"instruction": column}}
        if c.theirs.get("system_prompt"):
            train["system"] = c.theirs["system_prompt"]
    ours: Values = {"datasets": [train]}
    if c.get("dataset_train_split", c.get("dataset_split", "train")) != "train":
        train["split"] = c.get("dataset_train_split", c.get("dataset_split"))
    if c.get("eval_strategy", c.get("evaluation_strategy", "no")) != "no":
        ours["test_datasets"] = [{**train, "split": c.get("dataset_test_split", "test")}]
    return ours


def _mixture(c: Conversion, value: Any) -> Values:
    datasets = []
    for entry in value.get("datasets", []):
        one: Values = {"path": _path({"path": entry.get("id", entry.get("path"))})}
        if entry.get("config", entry.get("name")):
            one["name"] = entry.get("config", entry.get("name"))
        if entry.get("split"):
            one["split"] = entry["split"]
        if entry.get("weight") not in (None, 1, 1.0):
            one["weight"] = entry["weight"]
        datasets.append(one)
    held_out = {"val_set_size": value["test_split_size"]} if value.get("test_split_size") else {}
    return {"datasets": datasets} | held_out


def _mixer(c: Conversion, value: Any) -> Values:
    splits = c.get("dataset_splits", ["train"])
    for split in splits:
        if "pref" in split:
            raise ConfigError(
                "dataset_splits", split, "is preference data; there are sft, grpo and ebft here"
            )
    entries = [{"id": path, "split": splits[0], "weight": share} for path, share in value.items()]
    return _mixture(c, {"datasets": entries})


# their option → (description of the conversion, function that does it)
CHANGED: dict[str, tuple[str, Rule]] = {
    **dict.fromkeys(("optimizer", "optim"), (
        "`optimizer`: " + ", ".join(f"{a} → {b}" for a, b in OPTIMIZERS.items()), _optimizer)),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), (
        "`lr_scheduler`: " + ", ".join(f"{a} → {b}" for a, b in SCHEDULERS.items())
        + "; the floor in lr_scheduler_kwargs or eta_min → `min_lr_ratio`", _scheduler)),
    "warmup_steps": ("`warmup_steps`; below 1 `warmup_ratio`", _warmup),
    "warmup_ratio": ("`warmup_ratio`, unless warmup_steps is set", _warmup_ratio),
    "max_steps": ("`max_steps`; −1 is left out", _max_steps),
    "save_steps": ("`save_steps`, also as a share of the run", _saves),
    "eval_steps": ("`eval_steps`, also as a share of the run", _evals),
    "saves_per_epoch": ("`saves_per_epoch`", _saves_per_epoch),
    "evals_per_epoch": ("`evals_per_epoch`", _evals_per_epoch),
    "gradient_accumulation_steps": ("`gradient_accumulation_steps`", _accumulation),
    "adapter": ("`adapter: lora`; qlora: with `load_in_4bit: true`", _adapter),
    "use_peft": ("`adapter: lora`, with PEFT's defaults", lambda c, v: {"adapter": "lora"} if v else {}),
    "lora_target_modules": ("`lora_target_modules`: names, or a regular expression; all-linear is the "
                            "default",
                            _targets),
    "lora_target_linear": ("nothing: all linear layers of the blocks are the default", lambda c, v: {}),
    **dict.fromkeys(("bf16", "bfloat16"), ("`bf16`; auto and full are true", _precision)),
    **dict.fromkeys(("fp16", "float16"), ("`bf16: true`: no loss scaling", _half)),
    "gradient_checkpointing": ("`gradient_checkpointing`; offload and unsloth are true", _checkpointing),
    "fsdp_config": ("offload_params → `fsdp_cpu_offload`, reshard_after_forward", _fsdp_config),
    "chat_template": (
        "`chat_template`: " + ", ".join(f"{a} → {b}" for a, b in TEMPLATES.items())
        + "; the other names are the checkpoint's own; jinja and the template itself as they are", _template),
    "chat_template_path": ("`chat_template`", _as_it_is("chat_template")),
    "train_on_inputs": ("`train_on_inputs`", _train_on_inputs),
    "assistant_only_loss": ("`train_on_inputs`, which is true in TRL unless this is", _assistant_only),
    "tokens": ("`tokens`; the old form {bos_token: …} `special_tokens`", _tokens),
    "resize_token_embeddings_to_32x": (
        "`pad_vocab_to_multiple_of: 32`", lambda c, v: {"pad_vocab_to_multiple_of": 32} if v else {}),
    "max_packed_sequence_len": (
        "`sequence_len` with `sample_packing`", lambda c, v: {"sequence_len": v, "sample_packing": True}),
    "eos_token": ("`special_tokens: {eos_token: …}`", _special("eos_token")),
    "pad_token": ("`special_tokens: {pad_token: …}`", _special("pad_token")),
    "resume_from_checkpoint": ("`resume`: true is auto, false never, or the folder", _resume),
    "auto_resume_from_checkpoints": ("`resume: auto`", _resume),
    "datasets": (
        "`datasets`: type chat_template → chat, alpaca and custom formats → instruct, completion → text; "
        "owner/name → hf://datasets/owner/name; name, split, revision, data_files; field_messages, "
        "message_property_mappings and field_thinking → columns", _datasets("datasets"),
    ),
    "test_datasets": ("`test_datasets`, likewise", _datasets("test_datasets")),
    "pretraining_dataset": ("`datasets` of type text", _pretraining),
    "dataset_name": ("`datasets`, from the hub, with dataset_config and the splits; the columns determine "
                     "the type",
                     _trl_dataset),
    "dataset_mixture": ("`datasets` with `weight`; test_split_size → `val_set_size`", _mixture),
    "dataset_mixer": ("`datasets` with `weight`", _mixer),
    "use_vllm": (
        "server: `rollout_engine: vllm` at the address that theirs names; colocate: `vllm_mode: "
        "colocate`",
        _vllm),
    **{name: (f"`{ours}` of `serve`", _serving(ours)) for name, ours in (
        ("vllm_gpu_memory_utilization", "vllm_gpu_memory_utilization"), ("vllm_dtype", "vllm_dtype"),
        ("vllm_tensor_parallel_size", "vllm_tensor_parallel_size"),
        ("vllm_max_model_len", "vllm_max_model_len"), ("vllm_max_model_length", "vllm_max_model_len"))},
    "generation_batch_size": ("`steps_per_generation`", _generation_batch),
    "loss_type": ("`loss_type`; nll and chunked_nll are SFT's own", _loss_type),
    "scale_rewards": ("`scale_rewards`: true → group, false → none", _scale_rewards),
    "reward_funcs": ("`reward_funcs`: module.function; their built-in names are reported", _reward_funcs),
    "max_prompt_length": ("`max_prompt_length`: longer prompts are dropped, not cut", _prompt_length),
    "ref_model_sync_steps": ("`ref_model_sync_steps`, with sync_ref_model and beta", _reference_sync),
    "ref_model_mixup_alpha": ("`ref_model_mixup_alpha`, with sync_ref_model and beta", _reference_alpha),
    "top_p": ("must be 1", _neutral("top_p", (1, 1.0))),
    "top_k": ("must be 0", _neutral("top_k", (0, -1))),
    "min_p": ("must be 0", _neutral("min_p", (0, 0.0))),
    "repetition_penalty": ("must be 1", _neutral("repetition_penalty", (1, 1.0))),
}


def _refuse_other_algorithms(theirs: Values, sampled: bool) -> None:
    """Raise ConfigError for an unsupported algorithm, which must not be trained silently as SFT."""
    here = "; there are sft, grpo and ebft here"
    if theirs.get("rl") in RL_NAMES:
        raise ConfigError("rl", theirs["rl"], f"is {RL_NAMES[theirs['rl']]}{here}")
    for key, what in OTHER_ALGORITHMS.items():
        if theirs.get(key) not in (None, False, 0, "", [], {}):
            raise ConfigError(key, theirs[key], f"belongs to {what}{here}")
    if theirs.get("model_type") == "AutoModelForSequenceClassification":
        raise ConfigError("model_type", theirs["model_type"], f"is a classifier or reward model{here}")
    losses = theirs.get("loss_type")
    if set(losses if isinstance(losses, list) else [losses]) & PREFERENCE_LOSSES:
        raise ConfigError("loss_type", losses, f"is preference optimisation (DPO and its kin){here}")
    for name in theirs.get("plugins") or []:
        if "diffusion" in str(name).lower():
            raise ConfigError("plugins", name, f"trains a diffusion language model{here}")
    if not sampled and theirs.get("rl") is None:
        for key in ("beta", "max_prompt_length"):
            if theirs.get(key) is not None:
                raise ConfigError(
                    key, theirs[key], f"without num_generations is preference optimisation{here}"
                )
        split = str(theirs.get("dataset_train_split", ""))
        mixed = theirs.get("dataset_mixture") or {}
        splits = [split, *(str(e.get("split")) for e in mixed.get("datasets", []) if isinstance(e, dict))]
        if any("prefs" in one for one in splits):
            raise ConfigError("dataset_mixture", splits[-1], f"is preference data{here}")


def convert(theirs: Values, recipe: str, config_class: type) -> Conversion:
    """Convert their config to the options of `config_class`. Raises ConfigError if that is impossible."""
    names = {field.name for field in dataclasses.fields(config_class) if field.init}
    c = Conversion(theirs, names, recipe)
    reasons = getattr(config_class, "not_here", {})
    if c.get("batch_size") and not c.get("gradient_accumulation_steps"):
        c.made["gradient_accumulation_steps"] = max(1, c.theirs["batch_size"] // c.get("micro_batch_size", 1))
    for key, value in c.theirs.items():
        ours = NAMES.get(key, key)
        if value is None or key in STEERS:
            continue
        if key in NOT_NEEDED:
            c.say("not needed", key, NOT_NEEDED[key])
        elif key in CHANGED:
            try:
                converted = CHANGED[key][1](c, value)
            except (KeyError, TypeError, ValueError, AttributeError):
                raise ConfigError(key, value, "cannot be read; see docs/migration.md") from None
            for name, became in converted.items():
                if name in names:
                    c.made[name] = became
                else:
                    c.say("not needed", key, reasons.get(name, f"{recipe}.py has no {name}"))
        elif ours in names:
            c.made[ours] = value
        elif ours in reasons:
            c.say("not needed", key, reasons[ours])
        elif value not in (False, "", [], {}):  # a switch that is off changes nothing
            c.say("lost", key, LOST.get(key, "not known here; see docs/configs.md"))
    if c.get("chat_template_jinja") and "chat_template" not in c.theirs:
        c.made["chat_template"] = c.theirs["chat_template_jinja"]
    if "lr_scheduler" not in c.made and (c.get("lr_scheduler_kwargs") or c.get("eta_min") is not None):
        c.made |= _scheduler(c, "linear" if c.source == "TRL" else "cosine")
    if c.get("save_strategy") == "epoch":
        c.made["saves_per_epoch"] = 1
    if c.get("eval_strategy", c.get("evaluation_strategy")) == "epoch":
        c.made["evals_per_epoch"] = 1
    if "system_prompt" in c.theirs and any("system" in entry for entry in c.made.get("datasets", [])):
        c.notes["lost"] = [note for note in c.notes["lost"] if note[0] != "system_prompt"]
        c.say("changed", "system_prompt", "became `system` of the data set")
    if c.made.get("chat_template") is None:
        c.made.pop("chat_template", None)
    if not (c.made.get("val_set_size") or c.made.get("test_datasets")):
        for key in ("eval_steps", "evals_per_epoch"):
            c.made.pop(key, None)
    if not c.made.get("adapter"):
        for key in [k for k in c.made if k.startswith("lora_") or k == "merge_adapter"]:
            del c.made[key]
            c.say("not needed", key, "there is no adapter")
    if recipe != "sft" and c.made.get("lora_dropout"):
        c.say("changed", "lora_dropout", "0: the policy that is trained must be the one that samples")
        c.made["lora_dropout"] = 0.0
    c.filled = _defaults(c)
    c.made |= c.filled
    _leave_out_the_other_mode(c, config_class)
    config_of(config_class, {key: (value, key) for key, value in copy.deepcopy(c.made).items()})
    return c


def _defaults(c: Conversion) -> Values:
    """Their defaults for options that the config omits, where ours differ."""
    tables = DEFAULTS[c.source]
    defaults = {**tables["all"], **tables.get(c.recipe, {})}
    if c.source == "TRL" and c.made.get("adapter"):
        defaults |= {k: v for k, v in PEFT_DEFAULTS.items() if k not in c.theirs}
        if c.recipe != "sft":
            defaults.pop("lora_dropout", None)
        if "lora_target_modules" not in c.theirs:
            c.say(
                "changed",
                "lora_target_modules",
                "PEFT's default is these two for most families, qkv_proj for Phi-3",
            )
    if "warmup_steps" in c.made or "warmup_ratio" in c.made:
        defaults.pop("warmup_ratio", None)
    if (
        c.get("save_strategy") in ("no", "epoch", "best")
        or "save_steps" in c.made
        or "saves_per_epoch" in c.made
    ):
        defaults.pop("saves_per_epoch", None)
        defaults.pop("save_steps", None)
    if (
        c.get("train_on_inputs") is None
        and "train_on_inputs" in defaults
        and not c.get("assistant_only_loss")
    ):
        c.say("changed", "train_on_inputs", "TRL trains every token of conversations and texts, but only "
                                            "the completion of prompt-completion rows: for those remove "
                                            "the line")
    return {k: v for k, v in defaults.items() if k in c.names and k not in c.made}


def _leave_out_the_other_mode(c: Conversion, config_class: type) -> None:
    foreign = getattr(config_class, "of_other_mode", lambda mode: set())(c.made.get("mode", "structured"))
    for key in sorted(foreign & c.made.keys()):
        if key in c.theirs:
            c.say("not needed", key, f"is not of mode {c.made.get('mode', 'structured')}")
        del c.made[key]


def read_conversion(path: Path, recipes: dict[str, type]) -> Conversion:
    """Read and convert a config file. `recipes`: name → config class. Raises ConfigError if the file is no
    axolotl or TRL config, or is for another algorithm."""
    theirs = read_options(path, "convert")
    inside = {key for block in NESTED if isinstance(theirs.get(block), dict) for key in theirs[block]}
    if not {"base_model", "model_name_or_path"} & theirs.keys():
        problem = "names neither base_model nor model_name_or_path: it is not an axolotl or TRL config"
        raise ConfigError("convert", path.name, problem)
    sampled = bool(SAMPLED & {*theirs, *inside})
    _refuse_other_algorithms(theirs, sampled)
    kind = str(theirs.get("rl") or ("grpo" if sampled else "sft"))
    if kind not in recipes:
        raise ConfigError("rl", kind, f"has no recipe here; there are {', '.join(recipes)}")
    return convert(theirs, kind, recipes[kind])


class _Dumper(yaml.SafeDumper):
    """Writes multi-line strings as literal blocks."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def convert_file(path: Path, recipes: dict[str, type]) -> str:
    """The converted file as YAML, with the notes as comments."""
    c = read_conversion(path, recipes)
    lines = [f"# From {path.name} ({c.source}). Run it: torchrun {c.recipe}.py --config THIS_FILE"]
    for kind, label in (("lost", "LOST"), ("changed", "changed"), ("not needed", "not needed")):
        by_reason: dict[str, list[str]] = {}
        for key, why in dict.fromkeys(c.notes[kind]):
            by_reason.setdefault(" ".join(why.split()), []).append(key)
        lines += [f"# {label:<12}{', '.join(dict.fromkeys(keys))}: {why}" for why, keys in by_reason.items()]
    lines.append("")
    for name, value in c.made.items():
        text = yaml.dump({name: value}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
        lines.append(text.rstrip("\n") + (f"  # {c.source}'s default" if name in c.filled else ""))
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------


def page(recipes: dict[str, type]) -> str:
    """The text of docs/migration.md. `recipes`: name → config class; their defaults are shown too."""

    def grouped(table: dict[str, Any]) -> list[str]:
        by_text: dict[str, list[str]] = {}
        for name, words in table.items():
            by_text.setdefault(words, []).append(f"`{name}`")
        return [f"| {', '.join(names)} | {words} |" for words, names in by_text.items()]

    lines = [
        "# From axolotl and TRL", "",
        "`python -m health convert theirs.yaml > ours.yaml` reads an axolotl config, or the arguments of "
        "a TRL trainer as YAML, and writes ours. Options of the same name and meaning (most of axolotl's: "
        "`micro_batch_size`, `lora_r`, `sample_packing`, `val_set_size`, …) are taken over as they are; "
        "blocks (`trl:`, `ebft:`, `vllm:`) are flattened. Options that theirs omits keep their own defaults, "
        "which are written out where ours differ. Comments list options that are LOST although they matter, "
        "that change their meaning, or that need no setting. [configs.md](configs.md) has every option.", "",
        "DPO and its kin, KTO, reward models, diffusion, quantisation-aware training and models of images "
        "are refused: none of the three recipes implements them.", "",
        "This page is written by `python -m health convert`. `python bench/convert.py DIRECTORY` counts how "
        "many configs of a folder convert.", "",
        "| theirs | ours |", "|---|---|",
        *(f"| `{a}` | `{b}` |" for a, b in NAMES.items() if a not in CHANGED),
        *grouped({name: words for name, (words, _) in CHANGED.items()}), "",
        "## Defaults that differ", "",
        "Written into the result if theirs omits the option.", "",
        "| option | axolotl | TRL | here |", "|---|---|---|---|", *_default_rows(recipes), "",
        "With `use_peft` TRL means `lora_dropout: 0.05` and `lora_target_modules: [q_proj, v_proj]` "
        "(PEFT's default for most families); here dropout is 0 and every linear layer of the blocks has "
        "an adapter.", "",
        "## Lost", "", "They change the result and have no counterpart. The same holds for options that this "
                       "page does not list.", "", "| theirs | why |", "|---|---|", *grouped(LOST), "",
        "## Refused", "", "| theirs | belongs to |", "|---|---|", *grouped(OTHER_ALGORITHMS), "",
        "## Not needed here", "", "| theirs | why |", "|---|---|", *grouped(NOT_NEEDED), "",
        "## What else differs", "",
        "- The loss is summed over the trained tokens of the whole step, on all ranks, and divided once: "
        "no rank or micro-batch counts more because its rows are short.",
        "- Weights that are trained, their gradients and the optimiser stay in fp32 with `bf16: true`; "
        "TRL with `torch_dtype: bfloat16` trains weights in bf16.",
        "- `vllm_sync_interval` counts optimiser steps; lower it if importance ratios fall towards 0.",
        "- A row that cannot be masked with certainty stops the run with file and line (`on_bad_row: skip` "
        "counts it instead).",
        "- `resume: auto` is the default: the same command continues. The two checkpoints are kept "
        "(`save_total_limit`); TRL keeps all.",
    ]
    return "\n".join(lines) + "\n"


def _default_rows(recipes: dict[str, type]) -> list[str]:
    ours: Values = {}
    for config in recipes.values():
        for entry in dataclasses.fields(config):
            ours.setdefault(entry.name, entry.default)
    rows = []
    for recipe in ("all", "sft", "grpo", "ebft"):
        theirs = [DEFAULTS[source].get(recipe, {}) for source in ("axolotl", "TRL")]
        for name in dict.fromkeys([*theirs[0], *theirs[1]]):
            cells = [f"`{shown(t[name])}`" if name in t else "as here" for t in theirs]
            label = f"`{name}`" + ("" if recipe == "all" else f" ({recipe}.py)")
            rows.append(f"| {label} | {cells[0]} | {cells[1]} | `{shown(ours[name])}` |")
    return rows
