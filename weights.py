"""Hugging Face checkpoints and PEFT adapters, in and out: read slice by slice, sharded or whole, with nothing
believed unchecked; written as transformers and peft read them. LoRA on a model that is there.
"""

import contextlib
import fnmatch
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import low_precision
from config import CheckpointError, ConfigError, resolve_checkpoint, shown
from families import Architecture
from model import Linear, ModelOptions, TokenRows, Transformer, block_linears, full_tensor

SHARD_BYTES = 5 * 10**9  # a saved file holds at most this much, as on the hub

# ------------------------------------------------------------------------------------------------------------
# Checkpoints: Hugging Face in and out
# ------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def read_architecture(directory: Path, ignore: list[str] | tuple = ()) -> Architecture:
    """Raises CheckpointError for a config.json that cannot be computed as it is meant."""
    path = directory / "config.json"
    try:
        return Architecture.from_config(read_json(path), str(path), ignore)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: a field has a value that cannot be used ({error})") from None


def resized(arch: Architecture, vocab_size: int, multiple: int = 1) -> Architecture:
    """The same arithmetic with another number of embedding rows, rounded up to a multiple; loading fills new
    rows with the mean row."""
    vocab_size = -(-vocab_size // multiple) * multiple
    arch.vocab_size = vocab_size
    arch.raw["vocab_size"] = vocab_size
    return arch


class Weights:
    """The tensors of a safetensors checkpoint, single or sharded, read one slice at a time."""

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        self.files: dict[str, Any] = {}
        if index.exists():
            self.where = read_json(index).get("weight_map", {})
            named = isinstance(self.where, dict) and all(isinstance(n, str) for n in self.where.values())
            if not named or any(Path(n).name != n for n in self.where.values()):  # no path out of the folder
                raise CheckpointError(f"{index}: weight_map must be {{tensor: file in this folder}}")
        elif single.exists():
            self.where = {name: single.name for name in self._open(single.name).keys()}  # noqa: SIM118
        else:
            found = sorted(p.name for p in directory.glob("*.bin"))
            hint = (
                f"only {found[0]} is there: convert it to safetensors" if found else "save the weights there"
            )
            raise CheckpointError(
                f"{directory}: no model.safetensors or model.safetensors.index.json; {hint}"
            )

    def _open(self, name: str):
        if name not in self.files:
            try:
                self.files[name] = safe_open(self.directory / name, framework="pt")
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(f"{self.directory / name}: cannot be read ({error})") from None
        return self.files[name]

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def slice(self, name: str):
        """A view with get_shape() and row slicing; only the rows asked for leave the disk. A weight that
        bitsandbytes quantised comes dequantised, whole."""
        if self._kind(name) is not None:
            return _Whole(low_precision.dequantize(*self._read_quantized(name)))
        return self._open(self.where[name]).get_slice(name)

    def _tensor(self, name: str) -> Tensor:
        return self._open(self.where[name]).get_tensor(name)

    def parts(self, name: str) -> list[str]:
        """The weight's tensor, and those that bitsandbytes put beside it."""
        beside = [name.removesuffix("weight") + "SCB", name.removesuffix("weight") + "weight_format"]
        return [k for k in self.where if k == name or k.startswith(name + ".") or k in beside]

    def _kind(self, name: str) -> str | None:
        """How bitsandbytes quantised a weight, if it did."""
        if f"{name}.quant_state.bitsandbytes__nf4" in self.where:
            return "nf4"
        return (
            "int8"
            if name.removesuffix("weight") + "SCB" in self.where or f"{name}.SCB" in self.where
            else None
        )

    def _read_quantized(self, name: str) -> tuple[str, tuple[Tensor, ...]]:
        """A weight that bitsandbytes quantised, in our form of the same numbers."""
        if self._kind(name) == "int8":
            scb = name.removesuffix("weight") + "SCB"
            return "int8", (
                self._tensor(name),
                self._tensor(scb if scb in self.where else f"{name}.SCB").float() / 127,
            )
        facts = json.loads(bytes(self._tensor(f"{name}.quant_state.bitsandbytes__nf4").tolist()))
        N, K = facts["shape"]
        nested = facts.get("nested_blocksize")
        if (
            facts["blocksize"] != low_precision.NF4_BLOCK
            or K % low_precision.NF4_BLOCK
            or nested not in (None, 256)
        ):
            raise CheckpointError(
                f"{self.directory}: {name}: NF4 blocks of {facts['blocksize']} are not supported"
            )
        packed, absmax = self._tensor(name).view(N, K // 2), self._tensor(f"{name}.absmax").view(N, K // 64)
        if nested is None:  # single quantisation: quantise the absmaxes here
            offset = absmax.float().mean()
            codes, nested_absmax = low_precision.quantize_blockwise(
                absmax.float() - offset, low_precision.dynamic_code(True)
            )
            return "nf4", (packed, codes, nested_absmax, offset)
        offset = torch.tensor(facts["nested_offset"], dtype=torch.float32)
        return "nf4", (packed, absmax, self._tensor(f"{name}.nested_absmax"), offset)

    def quantized(
        self, name: str, kind: str, shape: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, ...]:
        """A weight in the form `kind`: as bitsandbytes stored it, or quantised now, on `device`. One dense
        weight exists at a time."""
        if name not in self:
            raise CheckpointError(f"{self.directory}: tensor {name} is missing")
        if self._kind(name) == kind:
            return self._read_quantized(name)[1]
        view = self.slice(name)
        if view.get_shape() != list(shape):
            raise CheckpointError(
                f"{self.directory}: tensor {name} has shape {view.get_shape()}, config.json says {shape}"
            )
        return low_precision.quantize(kind, view[:].to(device))


class _Whole:
    """A tensor in memory behind the interface of a lazy slice."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, rows) -> Tensor:
        return self.tensor[rows]


def hf_name(name: str) -> str:
    return name if name.startswith("lm_head.") else "model." + name


def hf_parts(name: str, arch: Architecture, number: int) -> list[str]:
    """Hugging Face names of expert `number` of the stacked parameter `name`: two (gate, up) or one (down)."""
    prefix = hf_name(name).rsplit(".", 1)[0]
    if arch.family.experts == "mixtral":
        prefix = prefix.replace(".mlp", ".block_sparse_moe")
        names = ("w1", "w3") if name.endswith("gate_up_proj") else ("w2",)
    else:
        names = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
    return [f"{prefix}.experts.{number}.{part}.weight" for part in names]


def _dense_hf_name(name: str, arch: Architecture) -> str:
    if arch.family.experts == "mixtral" and name.endswith("mlp.gate.weight"):
        return hf_name(name).replace(".mlp.", ".block_sparse_moe.")
    return hf_name(name)


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This process's part of a parameter, a plain tensor, and the row of the whole at which it begins."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local(), offset[0] if offset else 0


@torch.no_grad()
def load_weights(model: Transformer, directory: Path) -> None:
    """Fill `model` (whole or sharded by dist.shard) from a checkpoint, reading only the rows that this
    process keeps.

    Raises CheckpointError for tensors that are missing, of the wrong shape, or not expected.
    """
    weights, arch, device = Weights(directory), model.arch, model.embed_tokens.weight.device
    used = set()

    def copy(into: Tensor, source: str, begin: int, whole: torch.Size, may_grow: bool = False) -> None:
        if source not in weights:
            raise CheckpointError(f"{directory}: tensor {source} is missing")
        used.update(weights.parts(source))
        view = weights.slice(source)
        shape = view.get_shape()
        grown = may_grow and shape[0] < whole[0] and shape[1:] == list(whole[1:])
        if shape != list(whole) and not grown:
            raise CheckpointError(
                f"{directory}: tensor {source} has shape {shape}, config.json says {list(whole)}"
            )
        if into.numel() == 0:
            return
        rows = max(0, min(shape[0] - begin, into.shape[0]))
        if rows:
            into[:rows].copy_(view[begin : begin + rows])
        if (
            rows < into.shape[0]
        ):  # rows past the checkpoint's vocabulary: the mean row is the least surprising logit
            chunks = [view[i : i + 8192].float().sum(0) for i in range(0, shape[0], 8192)]
            into[rows:] = (torch.stack(chunks).sum(0) / shape[0]).to(into.dtype)

    for name, module in block_linears(model).items():
        if module.kind is not None:
            source = hf_name(name) + ".weight"
            used.update(weights.parts(source))
            module.put(
                weights.quantized(source, module.kind, (module.out_features, module.in_features), device)
            )
    for name, parameter in model.named_parameters():
        if of_adapter(name):
            continue
        local, begin = local_rows(parameter)
        if parameter.dim() == 3:  # stacked experts
            for i in range(local.shape[0]):
                parts = hf_parts(name, arch, begin + i)
                for part, piece in zip(parts, local[i].chunk(len(parts)), strict=True):
                    copy(piece, part, 0, piece.shape)
            used.update(part for e in range(arch.num_experts) for part in hf_parts(name, arch, e))
        else:
            vocabulary = name in ("embed_tokens.weight", "lm_head.weight")
            copy(local, _dense_hf_name(name, arch), begin, parameter.shape, may_grow=vocabulary)
    unexpected = [n for n in weights.where if n not in used and not n.endswith("rotary_emb.inv_freq")]
    if arch.tied:  # some checkpoints store the tied matrix twice
        unexpected = [n for n in unexpected if n != "lm_head.weight"]
    if unexpected:
        raise CheckpointError(
            f"{directory}: tensor {unexpected[0]} is not part of {arch.name} as config.json describes it"
        )


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Random weights: normal with config.json's initializer_range, norms at the identity, biases 0. Every
    tensor has a generator of its own, so the result does not depend on sharding or on the order of
    creation."""
    std = model.arch.raw.get("initializer_range", 0.02)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        local, begin = local_rows(parameter)
        if name.endswith("norm.weight"):
            local.fill_(0.0 if model.arch.family.norm_plus_one else 1.0)
        elif name.endswith("bias"):
            local.zero_()
        elif not of_adapter(name):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            whole = torch.randn(parameter.shape, generator=generator).mul_(std)
            local.copy_(whole[begin : begin + local.shape[0]])


def load_pretrained(
    path_or_repo_id: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    vocab_size: int = 0,
) -> Transformer:
    """A whole model from a directory or hub id, ready for inference or single-process training, with at least
    `vocab_size` rows of embedding.

    Raises CheckpointError in one line for anything that cannot be loaded exactly.
    """
    directory = resolve_checkpoint(str(path_or_repo_id), revision)
    arch = read_architecture(directory)
    arch = resized(arch, max(arch.vocab_size, vocab_size))
    with torch.device("meta"):
        model = Transformer(arch).to(dtype)
    model.to_empty(device=device)
    load_weights(model, directory)
    return model.eval()


def iterate_weights(
    model: Transformer, *, dtype: torch.dtype | None = None, merge: bool = False, main: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor), one at a time, on ranks with `main`.

    With sharded parameters this is a collective: every rank iterates, the others get nothing. `merge` adds
    the adapter's product to copies of the base weights; without it a model with adapters gives its base.
    `dtype` converts on the way out.
    """
    arch, modules = model.arch, dict(model.named_modules())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, module in block_linears(model).items():
            if module.kind is not None:
                added = module.delta() if merge and module.r else None  # sharded: a collective
                if main:
                    whole = low_precision.dequantize(module.kind, module.stored)
                    yield hf_name(name) + ".weight", whole if added is None else whole + added.to(whole.dtype)
        for name, parameter in model.named_parameters():
            if of_adapter(name):
                continue
            whole = full_tensor(parameter)
            if merge and model.token_rows is not None and name in ("embed_tokens.weight", "lm_head.weight"):
                rows = model.token_rows
                trained = full_tensor(rows.embedding if name.startswith("embed") else rows.of_head)
                whole = whole.index_copy(0, rows.index(whole.device), trained.to(whole.dtype))
            module = modules[name.rpartition(".")[0]]
            if merge and isinstance(module, Linear) and module.r and name.endswith(".weight"):
                whole = whole + module.delta().to(whole.dtype)
            if not main:
                continue
            if parameter.dim() == 3:
                for e in range(arch.num_experts):
                    parts = hf_parts(name, arch, e)
                    yield from zip(parts, whole[e].chunk(len(parts)), strict=True)
            else:
                yield _dense_hf_name(name, arch), whole

    for name, tensor in tensors():
        yield name, tensor.detach().to(dtype or tensor.dtype)


def weight_shapes(model: Transformer) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of what `iterate_weights` gives, in its order, without gathering anything."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for name, module in block_linears(model).items():
        if module.kind is not None:
            shapes.append((hf_name(name) + ".weight", (module.out_features, module.in_features)))
    for name, parameter in model.named_parameters():
        if of_adapter(name):
            continue
        if parameter.dim() == 3:
            for e in range(model.arch.num_experts):
                parts = hf_parts(name, model.arch, e)
                halves = torch.empty(parameter.shape[1:], device="meta").chunk(len(parts))
                shapes += [(part, tuple(half.shape)) for part, half in zip(parts, halves, strict=True)]
        else:
            shapes.append((_dense_hf_name(name, model.arch), tuple(parameter.shape)))
    return shapes


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file that those may read who may read its folder: the library alone makes it its owner's,
    and a server of another user could not load it."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


def save_pretrained(
    model: Transformer,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    merge: bool = False,
    main: bool = True,
) -> None:
    """Write config.json and safetensors that transformers and vLLM load unchanged, one shard in memory at a
    time. See `iterate_weights` for the arguments; every rank calls it, the one with `main` writes."""
    directory, arch = Path(directory), model.arch
    if main:
        directory.mkdir(parents=True, exist_ok=True)

    shard: dict[str, Tensor] = {}
    shard_bytes, total, files, where = 0, 0, [], {}

    def flush() -> None:
        nonlocal shard, shard_bytes
        if shard:
            files.append(f"model-{len(files) + 1:05d}.safetensors")
            where.update(dict.fromkeys(shard, files[-1]))
            write_tensors(shard, directory / files[-1])
        shard, shard_bytes = {}, 0

    for name, tensor in iterate_weights(model, dtype=dtype, merge=merge, main=main):
        tensor = tensor.to("cpu").contiguous().clone()
        size = tensor.numel() * tensor.element_size()
        if shard and shard_bytes + size > SHARD_BYTES:
            flush()
        shard[name] = tensor
        shard_bytes += size
        total += size
    if not main:
        return
    flush()
    saved_dtype = str(dtype or next(model.parameters()).dtype).removeprefix("torch.")
    raw = dict(arch.raw)
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = saved_dtype
    raw["architectures"] = [arch.name]
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    if len(files) == 1:
        (directory / files[0]).rename(directory / "model.safetensors")
        return
    names = {old: f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i, old in enumerate(files)}
    for old, new in names.items():
        (directory / old).rename(directory / new)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[file] for name, file in where.items()},
    }
    (directory / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )


# ------------------------------------------------------------------------------------------------------------
# LoRA
# ------------------------------------------------------------------------------------------------------------


def of_adapter(name: str) -> bool:
    """Whether a parameter is trained beside the frozen weights."""
    return "lora_" in name or name.startswith("token_rows.")


def lora_modules(model: Transformer) -> dict[str, Linear]:
    return {name: module for name, module in block_linears(model).items() if module.r}


def _target_modules(linear: dict[str, Linear], wanted: list[str] | str | None) -> dict[str, Linear]:
    """The linear layers that `lora_target_modules` names, in PEFT's ways
    (tuners_utils.check_target_module_exists): a text is a regular expression for the whole of a full name,
    an entry of a list the end of one."""
    if wanted is None or wanted == "all-linear":
        return linear
    found: dict[str, Linear] = {}
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
        found |= matched
    return {name: module for name, module in linear.items() if name in found}


def _names_for_peft(chosen: dict[str, Linear], linear: dict[str, Linear]) -> list[str]:
    """The last parts of the names where these name just the chosen layers, else the full names."""
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
    wanted = options.lora_target_modules
    if wanted and options.lora_target_linear:
        raise ConfigError("lora_target_linear", True, "contradicts lora_target_modules; keep one of the two")
    chosen = _target_modules(block_linears(model), wanted)
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
    }  # fmt: skip
    return model


@torch.no_grad()
def initialize_lora(model: Transformer, seed: int) -> None:
    """A uniform in ±1/√in (the reference's Kaiming bound), B zero, rows of new tokens as they are: the
    adapted model starts as the base model, whose weights must be there."""
    for number, module in enumerate(lora_modules(model).values()):
        local, begin = local_rows(module.lora_A)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        bound = module.in_features**-0.5
        whole = torch.empty(module.lora_A.shape).uniform_(-bound, bound, generator=generator)
        local.copy_(whole[begin : begin + local.shape[0]])
        local_rows(module.lora_B)[0].zero_()
    if model.token_rows is not None:
        rows = model.token_rows
        for parameter, source in (
            (rows.embedding, model.embed_tokens.weight), (rows.of_head, model._frozen_head),
        ):  # fmt: skip
            whole = full_tensor(source)  # sharded: a collective
            local, begin = local_rows(parameter)
            local.copy_(whole[rows.index(whole.device)[begin : begin + local.shape[0]]])


@contextlib.contextmanager
def adapters_disabled(model: Transformer):
    """Inside, the model is its base: the reference policy, without a second copy of the weights."""
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
    """The weights that training began with: a frozen copy, or with LoRA (no copy) the model without its
    adapters."""
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

    vLLM refuses rows of tokens in PEFT's form. With `for_vllm` they are written as adapters of rank k on
    embedding and head, exactly what vLLM's layers add up to: only for rows that the base model has."""
    assert model.adapter is not None
    tensors, config = {}, dict(model.adapter)

    def put(name: str, parameter: Tensor) -> None:
        whole = full_tensor(parameter)
        if main:
            tensors[name] = whole.detach().cpu().contiguous()

    for name, module in lora_modules(model).items():
        for part in ("lora_A", "lora_B"):
            put(f"base_model.model.{hf_name(name)}.{part}.weight", getattr(module, part))
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
    """Whether a server of the base model has the rows of the new tokens."""
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
    """Ids of the tokens whose rows a PEFT adapter trained. CheckpointError for what is no such list, or where
    embedding and head have different ones."""
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


def read_adapter_options(directory: str | Path, base_model: str) -> ModelOptions:
    """The LoRA options that a PEFT adapter was made with. Raises CheckpointError for variants not implemented
    here."""
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
    }  # fmt: skip
    for key, value in raw.items():
        if key not in known and value not in (None, False, "none", [], {}, 0, 0.0):
            raise CheckpointError(f"{path}: {key}={shown(value)} is not supported")
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
    return ModelOptions(
        base_model=base_model, adapter="lora", lora_r=raw["r"], lora_alpha=raw["lora_alpha"],
        lora_dropout=raw.get("lora_dropout", 0.0), lora_target_modules=names,
        lora_use_rslora=bool(raw.get("use_rslora")),
    )  # fmt: skip


@torch.no_grad()
def load_adapter(model: Transformer, directory: str | Path) -> None:
    """Fill the adapters of `model` (after apply_lora) from a PEFT folder."""
    path = Path(directory) / "adapter_model.safetensors"
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    names = set(file.keys())
    for name, module in lora_modules(model).items():
        for part in ("lora_A", "lora_B"):
            key = f"base_model.model.{hf_name(name)}.{part}.weight"
            parameter = getattr(module, part)
            if key not in names:
                raise CheckpointError(f"{path}: tensor {key} is missing")
            view = file.get_slice(key)
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


def _load_token_rows(model: Transformer, path: Path, file: Any, names: set[str]) -> None:
    """Fill the rows of the tokens that the adapter trained; others of the model keep what they have."""
    rows, theirs = model.token_rows, adapter_token_rows(path.parent)
    if not theirs:
        return
    if rows is None or not set(theirs) <= set(rows.ids):
        raise CheckpointError(f"{path}: trains the rows of tokens {theirs[:4]}, which are not trained here")
    places = torch.tensor([rows.ids.index(i) for i in theirs])
    for layer, parameter in [("model.embed_tokens", rows.embedding)] + (
        [] if rows.tied else [("lm_head", rows.head)]
    ):
        key = TOKEN_ROWS.format(layer)
        if key not in names:
            raise CheckpointError(f"{path}: tensor {key} is missing")
        values = file.get_tensor(key)
        if list(values.shape) != [len(theirs), model.arch.hidden_size]:
            raise CheckpointError(
                f"{path}: {key} has shape {list(values.shape)}, expected "
                f"{[len(theirs), model.arch.hidden_size]}"
            )
        local, begin = local_rows(parameter)
        mine = (places >= begin) & (places < begin + local.shape[0])
        local[(places[mine] - begin).to(local.device)] = values[mine].to(local)
        names.discard(key)
