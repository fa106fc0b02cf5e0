"""A config of axolotl, or the arguments of a TRL trainer as YAML, in our options: `python health.py convert
theirs.yaml`.

What has no counterpart is named with the reason, never dropped in silence. `python migrate.py >
docs/migration.md` writes the table; a test compares.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from config import ConfigError, read_options, shown

Values = dict[str, Any]

# theirs → ours, where only the name differs
NAMES: dict[str, str] = {
    "model_name_or_path": "base_model", "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs", "max_seq_length": "sequence_len", "max_length": "sequence_len",
    "packing": "sample_packing", "lr_scheduler_type": "lr_scheduler", "optim": "optimizer",
    "resume_from_checkpoint": "resume", "run_name": "wandb_name",
}  # fmt: skip

OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw": "adamw", "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "adamw_8bit", "muon": "muon",
}  # fmt: skip
SCHEDULERS = {
    "cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}  # fmt: skip
DATA_TYPES = {"chat_template": "chat", "alpaca": "instruct", "completion": "text", "sharegpt": "chat"}

# Options that are left out because there is nothing to switch, and why.
NOT_NEEDED: dict[str, str] = {
    **dict.fromkeys(("flash_attention", "flex_attention", "sdp_attention", "xformers_attention",
                     "attn_implementation"), "attention is one kernel of ours, always in blocks"),
    **dict.fromkeys(("fsdp", "fsdp_config", "fsdp_version"),
                    "FSDP2 shards as soon as torchrun starts several processes; see hsdp_shard_size"),
    "deepspeed": "no DeepSpeed: FSDP2 does what ZeRO-3 does",
    **dict.fromkeys(("dataset_num_proc", "dataset_processes"), "rows are encoded once and kept"),
    **dict.fromkeys(("pad_to_sequence_len", "eval_sample_packing", "group_by_length", "strict", "tf32",
                     "is_llama_derived_model", "model_type", "tokenizer_type", "trust_remote_code",
                     "hub_model_id", "hub_strategy", "push_to_hub", "local_rank", "report_to",
                     "remove_unused_columns", "use_liger_kernel", "plugins"), "nothing to set here"),
    "unfrozen_parameters": "full fine-tuning or LoRA; nothing between",
}  # fmt: skip


def _optimizer(value: Any) -> Values:
    return {"optimizer": OPTIMIZERS[value]}


def _scheduler(value: Any) -> Values:
    return {"lr_scheduler": SCHEDULERS[value]}


def _adapter(value: Any) -> Values:
    return {None: {}, "lora": {"adapter": "lora"}, "qlora": {"adapter": "lora", "load_in_4bit": True}}[value]


def _server(values: Values) -> Values:
    host, port = values.get("vllm_server_host", "127.0.0.1"), values.get("vllm_server_port", 8000)
    return {"rollout_engine": "vllm", "vllm_server_base_url": [f"http://{host}:{port}"]}


def _dataset(entry: Any) -> Values:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise KeyError(entry)
    made: Values = {"path": entry["path"]}
    local = entry["path"].startswith((".", "/", "~", "hf://")) or Path(entry["path"]).suffix
    if not local and entry["path"].count("/") == 1:
        made["path"] = "hf://datasets/" + entry["path"]
    kind = entry.get("type", "chat")
    made["type"] = DATA_TYPES.get(kind, kind) if isinstance(kind, str) else "chat"
    if entry.get("split"):
        made["split"] = entry["split"]
    if entry.get("field_messages"):
        made["columns"] = {"messages": entry["field_messages"]}
    return made


def _datasets(key: str) -> Callable[[Any], Values]:
    def convert(value: Any) -> Values:
        return {key: [_dataset(entry) for entry in value]}

    return convert


# theirs → (how it becomes ours, in words; the function that does it)
CHANGED: dict[str, tuple[str, Callable[[Any], Values]]] = {
    "optimizer": ("`optimizer`: " + ", ".join(f"{a} → {b}" for a, b in OPTIMIZERS.items()), _optimizer),
    "lr_scheduler": ("`lr_scheduler`: " + ", ".join(f"{a} → {b}" for a, b in SCHEDULERS.items()), _scheduler),
    "adapter": ("`adapter: lora`; qlora: with `load_in_4bit: true`", _adapter),
    "use_peft": ("`adapter: lora`", lambda v: {"adapter": "lora"} if v else {}),
    "bf16": ("`bf16`; auto and full are true", lambda v: {"bf16": v in (True, "auto", "full")}),
    "fp16": ("`bf16: true`: no loss scaling", lambda v: {"bf16": True} if v else {}),
    "datasets": (
        "`datasets`: type chat_template → chat, alpaca → instruct, completion → text; owner/name → "
        "hf://datasets/owner/name; field_messages → columns", _datasets("datasets"),
    ),
    "test_datasets": ("`test_datasets`, likewise", _datasets("test_datasets")),
    "dataset_name": ("`datasets`, from the hub", lambda v: {"datasets": [_dataset({"path": v})]}),
    "lora_target_linear": ("nothing: all linear layers of the blocks are the default", lambda v: {}),
    "gradient_checkpointing": ("`gradient_checkpointing`; offload and unsloth are true",
                               lambda v: {"gradient_checkpointing": bool(v)}),
    "chat_template": ("`chat_template`; tokenizer_default is the default",
                      lambda v: {} if v == "tokenizer_default" else {"chat_template": v}),
    "use_vllm": ("`rollout_engine: vllm`, with `vllm_server_host` and `vllm_server_port` in "
                 "`vllm_server_base_url`", lambda v: {}),
    "assistant_only_loss": ("`train_on_inputs: false`, the default", lambda v: {}),
    "scale_rewards": ("`scale_rewards`: true → group, false → none",
                      lambda v: {"scale_rewards": {True: "group", False: "none"}.get(v, v)}),
}  # fmt: skip
NESTED = ("trl", "ebft", "grpo")  # axolotl keeps a trainer's options in a block of its name
STEERS = ("rl", "vllm_server_host", "vllm_server_port", "vllm_mode")


def convert(theirs: Values, names: set[str]) -> tuple[Values, list[tuple[str, str]]]:
    """(our options, [(their option, why it is not taken over)]). `names` are the options of our recipe."""
    flat: Values = {}
    for key, value in theirs.items():
        if key in NESTED and isinstance(value, dict):
            flat |= {str(k): v for k, v in value.items()}
        else:
            flat[str(key)] = value
    made: Values = {}
    left: list[tuple[str, str]] = []
    for key, value in flat.items():
        ours = NAMES.get(key, key)
        if key in NOT_NEEDED:
            left.append((key, NOT_NEEDED[key]))
        elif value is None or key in STEERS:
            continue
        elif ours in CHANGED or key in CHANGED:
            name = key if key in CHANGED else ours
            try:
                made |= CHANGED[name][1](value)
            except (KeyError, TypeError):
                left.append((key, f"{shown(value)} has no counterpart; set {ours} yourself"))
        elif ours in names:
            made[ours] = value
        else:
            left.append((key, "not known here; see docs/configs.md"))
    if flat.get("use_vllm"):
        made |= _server(flat)
    return {k: v for k, v in made.items() if k in names}, left


def convert_file(path: Path, recipes: dict[str, type]) -> str:
    """The file as YAML of ours, with what was not taken over as comments. `recipes`: name → config class.
    ConfigError for a file that is no config."""
    theirs = read_options(path, "convert")
    inside = {key for block in NESTED if isinstance(theirs.get(block), dict) for key in theirs[block]}
    sampled = {"num_generations", "reward_funcs"} & {*theirs, *inside}
    kind = str(theirs.get("rl") or ("grpo" if sampled else "sft"))
    if kind not in recipes:
        raise ConfigError("rl", kind, f"is no recipe here; there are {', '.join(recipes)}")
    names = {field.name for field in dataclasses.fields(recipes[kind]) if field.init}
    made, left = convert(theirs, names)
    lines = [f"# From {path.name}. Run it: torchrun {kind}.py --config THIS_FILE"]
    lines += [f"# left out  {key}: {why}" for key, why in left]
    return "\n".join(lines) + "\n\n" + yaml.safe_dump(made, sort_keys=False, allow_unicode=True)


def page() -> str:
    """docs/migration.md."""
    lines = [
        "# From axolotl and TRL", "",
        "`python health.py convert theirs.yaml > ours.yaml` reads an axolotl config, or the arguments of a "
        "TRL trainer as YAML, and writes ours; what has no counterpart stands in it as a comment with the "
        "reason. "
        "Options of the same name and meaning (most of axolotl's: `micro_batch_size`, `lora_r`, "
        "`sample_packing`, `val_set_size`, …) are taken over as they are; blocks (`trl:`, `ebft:`) are laid "
        "flat. [configs.md](configs.md) has every option.", "",
        "This page is made by `python migrate.py`.", "",
        "| theirs | ours |", "|---|---|",
        *(f"| `{a}` | `{b}` |" for a, b in NAMES.items()),
        *(f"| `{name}` | {words} |" for name, (words, _) in CHANGED.items()), "",
        "## Not needed here", "", "| theirs | why |", "|---|---|",
        *(f"| `{name}` | {why} |" for name, why in NOT_NEEDED.items()), "",
        "## What else differs", "",
        "- The loss is summed over the trained tokens of the whole step, on all ranks, and divided once: no "
        "rank or micro-batch counts more because its rows are short.",
        "- `vllm_sync_interval` counts optimiser steps; where importance ratios fall towards 0 lower it.",
        "- A row that cannot be masked with certainty stops the run by file and line (`on_bad_row: skip` "
        "counts it instead).",
        "- `resume: auto` is the default: the same command goes on.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
