"""LoRA: add adapters to a model, load and save them as PEFT folders."""

import contextlib
import fnmatch
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.families import Architecture
from checkpoints.weights import TensorFile, hf_name, local_rows, read_json, weights_fingerprint, write_tensors
from model import Linear, ModelOptions, TokenRows, Transformer, block_linears, full_tensor
from run.config import CheckpointError, ConfigError, resolve_checkpoint, shown
from run.log import log


def lora_modules(model: Transformer) -> dict[str, Linear]:
    return {name: module for name, module in block_linears(model).items() if module.r}


def _target_modules(linear: dict[str, Linear], wanted: list[str] | str | None) -> dict[str, Linear]:
    """The linear layers that `lora_target_modules` selects, by PEFT's rules
    (tuners_utils.check_target_module_exists): a string is a regular expression that matches full names, a
    list entry matches the end of a name."""
    if wanted is None or wanted == "all-linear":
        return linear
    targets: dict[str, Linear] = {}
    for pattern in wanted if isinstance(wanted, list) else [wanted]:
        try:
            expression = re.compile(
                pattern if isinstance(wanted, str) else r"(?s:.*\.)?" + fnmatch.translate(pattern)
            )
        except re.error as error:
            problem = f"is no regular expression ({error}); give a list of names, e.g. [q_proj, v_proj]"
            raise ConfigError("lora_target_modules", pattern, problem) from None
        matched = {name: module for name, module in linear.items() if expression.fullmatch(hf_name(name))}
        if not matched:
            ends = sorted({name.rsplit(".", 1)[1] for name in linear})
            problem = f"matches no linear layer; there are {', '.join(ends)}"
            if isinstance(wanted, str):
                problem += (
                    ": a text is a regular expression for whole names, such as model.layers.0.mlp.up_proj"
                )
            raise ConfigError("lora_target_modules", pattern, problem)
        targets |= matched
    return {name: module for name, module in linear.items() if name in targets}


def _names_for_peft(chosen: dict[str, Linear], linear: dict[str, Linear]) -> list[str]:
    """The last parts of the names if they select exactly the chosen layers, else the full names."""
    ends = {name.rsplit(".", 1)[1] for name in chosen}
    short = all(name in chosen for name in linear if name.rsplit(".", 1)[1] in ends)
    return sorted(ends) if short else sorted(hf_name(name) for name in chosen)


def apply_lora(
    model: Transformer,
    options: ModelOptions,
    dtype: torch.dtype = torch.float32,
    token_rows: Sequence[int] = (),
) -> Transformer:
    """Freeze every weight and put adapters (in `dtype`) on the chosen linear layers, and on the rows of
    `token_rows` in embedding and head; in place."""
    chosen = _target_modules(block_linears(model), options.lora_target_modules)
    model.requires_grad_(False)
    r = options.lora_r
    scale = options.lora_alpha / (math.sqrt(r) if options.lora_use_rslora else r)
    for module in chosen.values():
        module.add_adapter(r, scale, options.lora_dropout, dtype)
    arch = model.arch
    if token_rows:
        device = model.embed_tokens.weight.device
        model.token_rows = TokenRows(list(token_rows), arch.hidden_size, arch.tied, dtype, device)
    names = ("embed_tokens",) if arch.tied else ("embed_tokens", "lm_head")
    trained = {name: sorted(token_rows) for name in names} if token_rows else None
    model.adapter = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout, "use_rslora": options.lora_use_rslora, "bias": "none",
        "target_modules": _names_for_peft(chosen, block_linears(model)),
        "base_model_name_or_path": options.base_model, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "modules_to_save": None, "trainable_token_indices": trained,
    }
    return model


@torch.no_grad()
def initialize_lora(model: Transformer, seed: int) -> None:
    """A uniform in ±1/√in (the reference's Kaiming bound), B zero, rows of new tokens copied: the
    adapted model starts as the base model, whose weights must be loaded already."""
    for number, module in enumerate(lora_modules(model).values()):
        local, begin = local_rows(module.lora_A)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        bound = module.in_features**-0.5
        full = torch.empty(module.lora_A.shape).uniform_(-bound, bound, generator=generator)
        local.copy_(full[begin : begin + local.shape[0]])
        local_rows(module.lora_B)[0].zero_()
    if model.token_rows is not None:
        rows = model.token_rows
        for parameter, source in (
            (rows.embedding, model.embed_tokens.weight), (rows.of_head, model._frozen_head),
        ):
            full = full_tensor(source)  # sharded: a collective
            local, begin = local_rows(parameter)
            local.copy_(full[rows.index(full.device)[begin : begin + local.shape[0]]])


@contextlib.contextmanager
def adapters_disabled(model: Transformer):
    """Inside the context the model is its base: the reference policy without a second copy of the weights."""
    modules: list[Any] = list(lora_modules(model).values())
    modules += [] if model.token_rows is None else [model.token_rows]
    before = [module.enabled for module in modules]
    try:
        for module in modules:
            module.enabled = False
        yield model
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled


@contextlib.contextmanager
def base_of(model: Transformer, copy: Transformer | None):
    """The initial model: a frozen copy, or with LoRA (no copy) the model without its adapters."""
    if copy is not None:
        yield copy
    else:
        with adapters_disabled(model):
            yield model


TOKEN_ROWS = "base_model.model.{}.token_adapter.trainable_tokens_delta"  # PEFT's name for the rows of a layer


def save_adapter(
    model: Transformer, directory: str | Path, *, main: bool = True, for_vllm: bool = False
) -> None:
    """Write the adapters as PEFT does: adapter_model.safetensors and adapter_config.json. A collective if
    sharded.

    vLLM does not accept trained token rows in PEFT's format. With `for_vllm` they are written as equivalent
    adapters of rank k on embedding and head; possible only for rows that the base model has."""
    assert model.adapter is not None
    tensors, config = {}, dict(model.adapter)

    def put(name: str, parameter: Tensor) -> None:
        full = full_tensor(parameter)
        if main:
            tensors[name] = full.detach().cpu().contiguous()

    for name, module in lora_modules(model).items():
        for factor in ("lora_A", "lora_B"):
            put(f"base_model.model.{hf_name(name)}.{factor}.weight", getattr(module, factor))
    rows = model.token_rows
    if rows is not None and not for_vllm:
        put(TOKEN_ROWS.format("model.embed_tokens"), rows.embedding)
        if not rows.tied:
            put(TOKEN_ROWS.format("lm_head"), rows.head)
    elif rows is not None:
        _put_rows_as_adapters(model, config, put)
    if main:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def rows_are_served(model: Transformer) -> bool:
    """Whether the base model has rows for the new tokens, so that a vLLM server can load them."""
    return model.token_rows is None or max(model.token_rows.ids) < model.arch.checkpoint_vocab_size


def _put_rows_as_adapters(model: Transformer, config: dict, put: Callable[[str, Tensor], None]) -> None:
    """Row i of a matrix W [V, D] becomes W_i + Δ_i: the product of a matrix [V, k] that has a 1 at each row
    and Δ [k, D], with a scale of 1."""
    rows = model.token_rows
    assert rows is not None and rows_are_served(model)
    k, V = len(rows.ids), model.arch.checkpoint_vocab_size
    index = rows.index(rows.embedding.device)
    chosen = torch.zeros(V, k, dtype=rows.embedding.dtype, device=index.device)
    chosen[index, torch.arange(k, device=index.device)] = 1.0

    def delta(trained: Tensor, frozen: Tensor) -> Tensor:
        return full_tensor(trained) - full_tensor(frozen)[index].to(trained.dtype)

    of_embedding = delta(rows.embedding, model.embed_tokens.weight)
    of_head = delta(rows.of_head, model._frozen_head)
    put("base_model.model.model.embed_tokens.lora_embedding_A", chosen.T)
    put("base_model.model.model.embed_tokens.lora_embedding_B", of_embedding.T)
    put("base_model.model.lm_head.lora_A.weight", of_head)
    put("base_model.model.lm_head.lora_B.weight", chosen)
    layers = ("embed_tokens", "lm_head")
    config["target_modules"] = sorted({*config["target_modules"], *layers})
    config["rank_pattern"] = dict.fromkeys(layers, k)
    config["alpha_pattern"] = dict.fromkeys(layers, math.sqrt(k) if config["use_rslora"] else k)
    config["trainable_token_indices"] = None


def adapter_token_rows(directory: str | Path) -> list[int]:
    """Ids of the tokens whose rows a PEFT adapter trained. Raises CheckpointError if the list is invalid or
    differs between embedding and head."""
    path = Path(directory) / "adapter_config.json"
    given = read_json(path).get("trainable_token_indices") or []
    lists = list(given.values()) if isinstance(given, dict) else [given]
    names = set(given) if isinstance(given, dict) else {"embed_tokens"}
    good = all(isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids) for ids in lists)
    if (
        not good
        or not names <= {"embed_tokens", "lm_head"}
        or any(sorted(x) != sorted(lists[0]) for x in lists)
    ):
        raise CheckpointError(
            f"{path}: trainable_token_indices is {shown(given)}; it must be one list of token ids, the same "
            "for embed_tokens and lm_head"
        )
    return sorted(lists[0]) if lists else []


def _rows_in_order(path: Path, layer: str) -> list[int]:
    """The token of each row that an adapter's file has for `layer` (embed_tokens or lm_head)."""
    given = read_json(path)["trainable_token_indices"]
    return given.get(layer, next(iter(given.values()))) if isinstance(given, dict) else given


# The values of init_lora_weights that leave the base weights alone; the folder would not hold their change.
PLAIN_STARTS = (None, True, False, "true", "false", "gaussian", "orthogonal", "eva")


def adopt_adapter(
    config: ModelOptions, arch: Architecture, checkpoint: Path | None, directory: Path
) -> None:
    """With `lora_model_dir`, which is relative to `directory` (of the config): take rank, scale and layers
    from the adapter in that folder. Raises ConfigError for an option that contradicts the adapter, and where
    the adapter was trained on other weights than those in `checkpoint` (None: not compared)."""
    if not config.lora_model_dir:
        return
    folder = resolve_checkpoint(config.lora_model_dir, None, directory).resolve()
    if not (folder / "adapter_config.json").exists():
        problem = "is no PEFT adapter: it has no adapter_config.json"
        raise ConfigError("lora_model_dir", config.lora_model_dir, problem)
    with torch.device("meta"):
        linear = block_linears(Transformer(arch))
    adapter, file = read_adapter_options(folder, config.base_model, linear), folder / "adapter_config.json"

    def same(key: str) -> bool:
        wanted, saved = getattr(config, key), getattr(adapter, key)
        if key == "lora_target_modules":
            return set(_target_modules(linear, wanted)) == set(_target_modules(linear, saved))
        return wanted == saved

    for key in ("lora_r", "lora_alpha", "lora_use_rslora", "lora_target_modules"):
        if key in config.given and not same(key):
            problem = f"contradicts {file}, which has {shown(getattr(adapter, key))}: leave it out"
            raise ConfigError(key, getattr(config, key), problem)
        setattr(config, key, getattr(adapter, key))
    config.lora_model_dir = str(folder)
    if checkpoint is not None:
        _check_base(config, folder, checkpoint, directory)


def _check_base(config: ModelOptions, folder: Path, checkpoint: Path, directory: Path) -> None:
    """ConfigError where the adapter in `folder` was trained on other weights than those in `checkpoint`."""
    base, revision = adapter_base(folder)
    if not base or (base == config.base_model and revision in (None, config.base_model_revision)):
        return
    if base == config.base_model:
        raise ConfigError(
            "base_model_revision", config.base_model_revision,
            f"contradicts {folder / 'adapter_config.json'}, which has {shown(revision)}",
        )
    candidates = [Path(base).expanduser(), folder / base, directory / base]
    found = next((path for path in candidates if (path / "config.json").exists()), None)
    if found is None:
        log.warning(
            "lora_model_dir was trained on %s, which is not on this disk: make sure that base_model %s has "
            "the same weights", base, config.base_model,
        )
    elif weights_fingerprint(found) != weights_fingerprint(checkpoint):
        problem = f"was trained on {found.resolve()}; base_model {config.base_model} has other weights"
        raise ConfigError("lora_model_dir", config.lora_model_dir, problem)


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """(the base model that a PEFT adapter names, "" if it names none; its revision)."""
    raw = read_json(folder / "adapter_config.json")
    base, revision = raw.get("base_model_name_or_path") or "", raw.get("revision")
    if not isinstance(base, str) or not isinstance(revision, str | None):
        path = folder / "adapter_config.json"
        raise CheckpointError(f"{path}: base_model_name_or_path and revision must be text")
    return base, revision


def read_adapter_options(
    directory: str | Path, base_model: str, linear: dict[str, Linear] | None = None
) -> ModelOptions:
    """The LoRA options that a PEFT adapter was made with. With the `linear` layers of its model, names that
    match none of them are left out, as in PEFT. Raises CheckpointError for variants not implemented here."""
    path = Path(directory) / "adapter_config.json"
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {raw.get('peft_type')} is not supported; only LORA is")
    known = {
        "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
        "auto_mapping",
        "base_model_name_or_path", "revision", "inference_mode", "init_lora_weights", "peft_version",
        "loftq_config",
        "megatron_core", "qalora_group_size", "trainable_token_indices",
    }
    for key, value in raw.items():
        if key not in known and value not in (None, False, "none", [], {}, 0, 0.0):
            raise CheckpointError(f"{path}: {key}={shown(value)} is not supported")
    start = raw.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights={shown(start)} is not supported: it changes the base weights; save "
            "the adapter as plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    figures = (
        ("r", int, 1, 2**16),
        ("lora_alpha", (int, float), 0, 2**16),
        ("lora_dropout", (int, float), 0, 1),
    )
    for key, kinds, low, high in figures:
        value = raw.get(key, 0.0 if key == "lora_dropout" else None)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise CheckpointError(f"{path}: {key} is {shown(value)}, not a number from {low} to {high}")
    targets = raw.get("target_modules")
    if isinstance(targets, list) and not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{path}: target_modules must be a list of names")
    if targets is not None and not isinstance(targets, str | list):
        raise CheckpointError(f"{path}: target_modules must be a list of names, it is {shown(targets)}")
    names = targets or None
    if isinstance(targets, list):
        names = [re.sub(r"^(base_model\.)?(model\.)+", "", target) for target in targets] or None
        if vocabulary := [t for t in targets if t.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens")]:
            raise CheckpointError(f"{path}: target_modules has {vocabulary[0]}, which is not supported")
        if linear is not None and names is not None:
            ends = tuple(hf_name(name) for name in linear)
            names = [n for n in names if any(f".{end}".endswith(f".{n}") for end in ends)]
            if not names:
                raise CheckpointError(f"{path}: target_modules {shown(targets)} match no linear layer here")
    return ModelOptions(
        base_model=base_model, adapter="lora", lora_r=raw["r"], lora_alpha=raw["lora_alpha"],
        lora_dropout=raw.get("lora_dropout", 0.0), lora_target_modules=names,
        lora_use_rslora=bool(raw.get("use_rslora")),
    )


@torch.no_grad()
def load_adapter(model: Transformer, directory: str | Path) -> None:
    """Fill the adapters of `model` (after apply_lora) from a PEFT folder."""
    path = Path(directory) / "adapter_model.safetensors"
    file = TensorFile(path)
    names = set(file.names)
    for name, module in lora_modules(model).items():
        for factor in ("lora_A", "lora_B"):
            key = f"base_model.model.{hf_name(name)}.{factor}.weight"
            parameter = getattr(module, factor)
            if key not in names:
                raise CheckpointError(f"{path}: tensor {key} is missing")
            view = file.slice(key)
            if view.get_shape() != list(parameter.shape):
                raise CheckpointError(
                    f"{path}: {key} has shape {view.get_shape()}, expected {list(parameter.shape)}"
                )
            local, begin = local_rows(parameter)
            local.copy_(view[begin : begin + local.shape[0]])
            names.discard(key)
    _load_token_rows(model, path, file, names)
    if names:
        raise CheckpointError(f"{path}: tensor {sorted(names)[0]} belongs to no adapted layer")


def _load_token_rows(model: Transformer, path: Path, file: TensorFile, names: set[str]) -> None:
    """Load the token rows that the adapter trained; the model's other rows keep their values."""
    rows, theirs = model.token_rows, adapter_token_rows(path.parent)
    if not theirs:
        return
    if rows is None or not set(theirs) <= set(rows.ids):
        raise CheckpointError(f"{path}: trains the rows of tokens {theirs[:4]}, which are not trained here")
    for layer, parameter in [("model.embed_tokens", rows.embedding)] + (
        [] if rows.tied else [("lm_head", rows.head)]
    ):
        key = TOKEN_ROWS.format(layer)
        if key not in names:
            raise CheckpointError(f"{path}: tensor {key} is missing")
        values = file.tensor(key)
        if list(values.shape) != [len(theirs), model.arch.hidden_size]:
            raise CheckpointError(
                f"{path}: {key} has shape {list(values.shape)}, expected "
                f"{[len(theirs), model.arch.hidden_size]}"
            )
        tokens = _rows_in_order(path.parent / "adapter_config.json", layer.removeprefix("model."))
        places = torch.tensor([rows.ids.index(i) for i in tokens])
        local, begin = local_rows(parameter)
        own = (places >= begin) & (places < begin + local.shape[0])
        local[(places[own] - begin).to(local.device)] = values[own].to(local)
        names.discard(key)
