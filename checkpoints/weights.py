"""Reads and writes Hugging Face checkpoints: read slice by slice, sharded or whole, and validated completely;
written as transformers and vLLM load them.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from checkpoints.families import Architecture
from model import Linear, Transformer, block_linears, full_tensor
from numerics import low_precision
from run.config import CheckpointError, resolve_checkpoint
from run.log import log

T = TypeVar("T")
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
    """Read config.json. Raises CheckpointError if it is invalid or not supported exactly."""
    path = directory / "config.json"
    try:
        arch = Architecture.from_config(read_json(path), str(path), ignore)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: a field has a value that cannot be used ({error})") from None
    for note in arch.notes:
        log.warning("%s: %s", path, note)
    return arch


def resized(arch: Architecture, vocab_size: int, multiple: int = 1) -> Architecture:
    """The same arithmetic with another number of embedding rows, rounded up to a multiple; loading fills new
    rows with the mean row."""
    vocab_size = -(-vocab_size // multiple) * multiple
    arch.vocab_size = vocab_size
    arch.raw["vocab_size"] = vocab_size
    return arch


class TensorFile:
    """A safetensors file. The library's errors become a CheckpointError of one line."""

    def __init__(self, path: Path):
        self.path = path
        self._file = self._reading(lambda: safetensors.safe_open(path, framework="pt"))
        self.names: set[str] = set(self._reading(self._file.keys))

    def _reading(self, read: Callable[[], T], name: str = "") -> T:
        try:
            return read()
        except (OSError, safetensors.SafetensorError, ValueError, TypeError, AttributeError) as error:
            what = f"{self.path}: {f'tensor {name} ' if name else ''}cannot be read ({error})"
            raise CheckpointError(what) from None

    def slice(self, name: str):
        """A view with get_shape() and row slicing; only the rows asked for leave the disk."""
        return self._reading(lambda: self._file.get_slice(name), name)

    def tensor(self, name: str) -> Tensor:
        return self._reading(lambda: self._file.get_tensor(name), name)


class Weights:
    """The tensors of a safetensors checkpoint, single or sharded, read one slice at a time."""

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        self.files: dict[str, TensorFile] = {}
        if single.exists():
            self.where = dict.fromkeys(self._open(single.name).names, single.name)
            if index.exists():
                log.warning("%s is read, as in transformers, and not the files of %s", single, index.name)
        elif index.exists():
            self.where = read_json(index).get("weight_map", {})
            named = isinstance(self.where, dict) and all(isinstance(n, str) for n in self.where.values())
            if not named or any(Path(n).name != n for n in self.where.values()):  # no path out of the folder
                raise CheckpointError(f"{index}: weight_map must be {{tensor: file in this folder}}")
            self._check_index(index)
        else:
            pickled = sorted(p.name for p in directory.glob("*.bin"))
            hint = "save the weights there"
            if pickled:
                hint = f"only {pickled[0]} is there: convert it to safetensors"
            raise CheckpointError(
                f"{directory}: no model.safetensors or model.safetensors.index.json; {hint}"
            )

    def _open(self, name: str) -> TensorFile:
        if name not in self.files:
            self.files[name] = TensorFile(self.directory / name)
        return self.files[name]

    def _check_index(self, index: Path) -> None:
        """Raise CheckpointError if two files of the index hold the same tensor with different values."""
        for file in sorted(set(self.where.values())):
            for name in self._open(file).names:
                indexed = self.where.setdefault(name, file)  # not indexed: used, or refused as unexpected
                if indexed != file and name in self._open(indexed).names:
                    one, other = self._open(indexed).tensor(name), self._open(file).tensor(name)
                    if one.dtype != other.dtype or not torch.equal(one, other):
                        raise CheckpointError(
                            f"{index}: tensor {name} stands in {indexed} and, with other values, in {file}; "
                            "is one of them left over from another save?"
                        )

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def slice(self, name: str):
        """A view with get_shape() and row slicing; only the rows asked for leave the disk. A weight
        quantised by bitsandbytes is dequantised as a whole."""
        if self._kind(name) is not None:
            return _Whole(low_precision.dequantize(*self._read_quantized(name)))
        return self._open(self.where[name]).slice(name)

    def raw_slice(self, name: str):
        """As `slice`, but of what the file holds."""
        return self._open(self.where[name]).slice(name)

    def _tensor(self, name: str) -> Tensor:
        return self._open(self.where[name]).tensor(name)

    def parts(self, name: str) -> list[str]:
        """Names of the weight's tensor and of the tensors that bitsandbytes stores with it."""
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
        """A weight quantised by bitsandbytes, with the same values in our format."""
        if self._kind(name) == "int8":
            scb = name.removesuffix("weight") + "SCB"
            return "int8", (
                self._tensor(name),
                self._tensor(scb if scb in self.where else f"{name}.SCB").float() / 127,
            )
        quant_state = json.loads(bytes(self._tensor(f"{name}.quant_state.bitsandbytes__nf4").tolist()))
        N, K = quant_state["shape"]
        nested = quant_state.get("nested_blocksize")
        if (
            quant_state["blocksize"] != low_precision.NF4_BLOCK
            or K % low_precision.NF4_BLOCK
            or nested not in (None, 256)
        ):
            raise CheckpointError(
                f"{self.directory}: {name}: NF4 blocks of {quant_state['blocksize']} are not supported"
            )
        packed, absmax = self._tensor(name).view(N, K // 2), self._tensor(f"{name}.absmax").view(N, K // 64)
        if nested is None:  # single quantisation: quantise the absmaxes here
            offset = absmax.float().mean()
            codes, nested_absmax = low_precision.quantize_blockwise(
                absmax.float() - offset, low_precision.dynamic_code(True)
            )
            return "nf4", (packed, codes, nested_absmax, offset)
        offset = torch.tensor(quant_state["nested_offset"], dtype=torch.float32)
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


def untrained_rows(directory: Path, ids: Iterable[int]) -> list[int]:
    """Those of `ids` whose row of the embedding no text has trained: shorter than a tenth of the median row,
    or equal to that of another of them. Reads these rows and a sample of the others."""
    weights = Weights(directory)
    name = "model.embed_tokens.weight"
    if name not in weights:
        return []
    view = weights.slice(name)
    count = view.get_shape()[0]
    lengths = [view[k : k + 1].float().norm() for k in range(0, count, max(1, count // 256))]
    least = 0.1 * float(torch.stack(lengths).median())
    rows = {i: view[i : i + 1].float() for i in sorted(set(ids)) if i < count}
    twins = Counter(row.numpy().tobytes() for row in rows.values())
    return [i for i, row in rows.items() if float(row.norm()) < least or twins[row.numpy().tobytes()] > 1]


def weights_fingerprint(directory: Path) -> str:
    """Hash of a checkpoint's tensors: names, shapes, and of each the first, the middle and the last row, as
    bf16. It does not depend on how they are distributed over files, nor on whether fp32 or bf16 is stored."""
    weights, digest = Weights(directory), hashlib.sha256()
    for name in sorted(weights.where):
        view = weights.raw_slice(name)
        shape = view.get_shape()
        digest.update(repr((name, shape)).encode())
        rows = {0, shape[0] // 2, shape[0] - 1} if shape and shape[0] else set()
        for i in sorted(rows):
            row = view[i : i + 1]
            row = row.to(torch.bfloat16).view(torch.int16) if row.is_floating_point() else row
            digest.update(row.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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
    return [f"{prefix}.experts.{number}.{projection}.weight" for projection in names]


def _dense_hf_name(name: str, arch: Architecture) -> str:
    if arch.family.experts == "mixtral" and name.endswith("mlp.gate.weight"):
        return hf_name(name).replace(".mlp.", ".block_sparse_moe.")
    return hf_name(name)


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This process's shard of a parameter as a plain tensor, and the global index of its first row."""
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
        """`may_grow`: the model may have more rows than config.json and the checkpoint."""
        if source not in weights:
            raise CheckpointError(f"{directory}: tensor {source} is missing")
        used.update(weights.parts(source))
        view = weights.slice(source)
        shape, expected = view.get_shape(), list(whole)
        if may_grow:
            expected[0] = arch.checkpoint_vocab_size
        if shape != expected:
            hint = "; correct vocab_size, or save the checkpoint again" if may_grow else ""
            raise CheckpointError(
                f"{directory}: tensor {source} has shape {shape}, config.json says {expected}{hint}"
            )
        if not (dtype := view[:0].dtype).is_floating_point:
            raise CheckpointError(f"{directory}: tensor {source} holds {dtype}, not floating-point numbers")
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
                for tensor_name, piece in zip(parts, local[i].chunk(len(parts)), strict=True):
                    copy(piece, tensor_name, 0, piece.shape)
            used.update(itertools.chain(*(hf_parts(name, arch, e) for e in range(arch.num_experts))))
        else:
            vocabulary = name in ("embed_tokens.weight", "lm_head.weight")
            source = _dense_hf_name(name, arch)
            if vocabulary and arch.tied and source not in weights:
                source = "lm_head.weight"  # either name may hold the shared matrix
            copy(local, source, begin, parameter.shape, may_grow=vocabulary)
    if arch.tied:
        _check_tied(weights, directory)
    unexpected = [n for n in weights.where if n not in used and not n.endswith("rotary_emb.inv_freq")]
    if arch.tied:  # some checkpoints store the tied matrix twice
        unexpected = [n for n in unexpected if n != "lm_head.weight"]
    if unexpected:
        raise CheckpointError(
            f"{directory}: tensor {unexpected[0]} is not part of {arch.name} as config.json describes it"
        )


def _check_tied(weights: Weights, directory: Path) -> None:
    """Raise CheckpointError if a tied matrix is stored twice with different values."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    if not all(name in weights for name in names):
        return
    one, other = (weights.slice(name) for name in names)
    rows = one.get_shape()[0]
    pieces = [slice(i, i + 8192) for i in range(0, rows, 8192)]
    equal = one.get_shape() == other.get_shape()
    if not (equal and all(torch.equal(one[piece].float(), other[piece].float()) for piece in pieces)):
        raise CheckpointError(
            f"{directory}: lm_head.weight and {names[0]} differ, though tie_word_embeddings is true; set it "
            "to false in config.json if the model has a head of its own, or remove lm_head.weight"
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
            full = torch.randn(parameter.shape, generator=generator).mul_(std)
            local.copy_(full[begin : begin + local.shape[0]])


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

    With sharded parameters this is a collective: every rank iterates, but only `main` gets tensors. `merge`
    adds the adapter's product to copies of the base weights; without it a model with adapters yields its base
    weights. `dtype` converts the result.
    """
    arch, modules = model.arch, dict(model.named_modules())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, module in block_linears(model).items():
            if module.kind is not None:
                added = module.delta() if merge and module.r else None  # sharded: a collective
                if main:
                    full = low_precision.dequantize(module.kind, module.stored)
                    yield hf_name(name) + ".weight", full if added is None else full + added.to(full.dtype)
        for name, parameter in model.named_parameters():
            if of_adapter(name):
                continue
            full = full_tensor(parameter)
            if merge and model.token_rows is not None and name in ("embed_tokens.weight", "lm_head.weight"):
                rows = model.token_rows
                trained = full_tensor(rows.embedding if name.startswith("embed") else rows.of_head)
                full = full.index_copy(0, rows.index(full.device), trained.to(full.dtype))
            module = modules[name.rpartition(".")[0]]
            if merge and isinstance(module, Linear) and module.r and name.endswith(".weight"):
                full = full + module.delta().to(full.dtype)
            if not main:
                continue
            if parameter.dim() == 3:
                for e in range(arch.num_experts):
                    parts = hf_parts(name, arch, e)
                    yield from zip(parts, full[e].chunk(len(parts)), strict=True)
            else:
                yield _dense_hf_name(name, arch), full

    for name, tensor in tensors():
        yield name, tensor.detach().to(dtype or tensor.dtype)


def weight_shapes(model: Transformer) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that `iterate_weights` yields, in its order, without gathering them."""
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
                shapes += zip(parts, (tuple(half.shape) for half in halves), strict=True)
        else:
            shapes.append((_dense_hf_name(name, model.arch), tuple(parameter.shape)))
    return shapes


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the read permissions of its folder: by default only the owner could read
    it, and a server run by another user could not load it."""
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
    for key in {"torch_dtype", "dtype"} & raw.keys() or {"dtype"}:
        raw[key] = saved_dtype
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
