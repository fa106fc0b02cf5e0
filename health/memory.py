"""Estimates the GPU memory of a run from config.json alone, advises what to change if it is too much, and
lists the live tensors after an out-of-memory error (reference page: OOM Debugging).

Weights, gradients and optimiser states are counted on a model without storage. The activations that a layer
keeps for the backward pass are measured on a few narrow blocks of the same kind: every kept tensor is tokens
× a width, so measured at four widths and two lengths, a linear model fits the rest.
"""

import contextlib
import copy
import dataclasses
import gc
import math
import resource
import sys
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import dist
import kernels
from checkpoints.adapters import apply_lora
from checkpoints.families import Architecture
from checkpoints.weights import read_architecture
from model import Block, Pass, Transformer, set_precision
from numerics import losses
from run.config import ConfigError, resolve_checkpoint
from run.log import log

# Dense bf16 peak in TFLOP/s, from the vendors' data sheets: MFU is relative to it.
PEAK_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "B200": 2250,
    "4090": 165,
    "MI300X": 1307,
}


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"memory/max_alloc": allocated / 2**30, "memory/max_reserved": reserved / 2**30}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"memory/max_alloc": peak / 2**30, "memory/max_reserved": peak / 2**30}


def gib(count: int) -> str:
    """Bytes in a readable unit: 1.30 GiB, 4.0 MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def report_weights(model: nn.Module) -> None:
    """Log the memory of this process's weights."""
    stored = weight_bytes(model)
    each = stored / model.count_parameters()  # type: ignore[operator]
    log.info("memory of a process: weights %s, %.2f bytes per parameter of the model", gib(stored), each)


def report_optimizers(optimizers: list, name: str, device: torch.device) -> None:
    """Log the memory of the optimiser states, and the peak of the first step."""
    log.info(
        "memory of a process: optimiser %s (%s), peak %.2f GiB after the first step",
        gib(optimizer_bytes(optimizers)), name, peak_memory(device)["memory/max_alloc"],
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of this process's parameters and stored weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(_local_bytes(tensor) for tensor in tensors)


def optimizer_bytes(optimizers: list) -> int:
    """Bytes of this process's optimiser states; 0 before the first step."""
    total = 0
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                parts = value if isinstance(value, tuple) else (value,)
                total += sum(_local_bytes(part) for part in parts if isinstance(part, torch.Tensor))
    return total


def _local_bytes(tensor: torch.Tensor) -> int:
    tensor = dist.local(tensor)
    return tensor.numel() * tensor.element_size()


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of the device, or None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for key, tera in PEAK_TFLOPS.items() if key in name), None)


@dataclasses.dataclass
class Estimate:
    """Bytes on one GPU, at the highest point of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int  # temporary tensors of a block's backward pass
    loss: int  # the chunk of logits, and the gradient of the head
    cache: int  # keys and values of the embedded rollout engine
    copies: int  # the frozen reference or feature network
    server: int  # a vLLM server on the same GPU, awake: weights, and keys and values of a batch
    naive_logits: int  # for comparison: all logits in fp32, with their gradient
    tokens: int  # in one forward pass
    accumulating: bool  # gradients of earlier micro-batches exist during the forward pass

    @property
    def peak(self) -> int:
        """The maximum over the backward pass and sampling."""
        early = self.activations + max(self.loss, self.working)
        training = early + self.gradients if self.accumulating else max(early, self.gradients + self.working)
        return self.resident + max(training, self.cache, self.server)

    @property
    def resident(self) -> int:
        """What stays while completions are sampled."""
        return self.weights + self.optimizer + self.copies


def tokens_of(config: Any) -> tuple[int, int]:
    """(maximum tokens in one forward pass of one process, tokens whose logits the loss needs)."""
    rows = config.micro_batch_size
    if getattr(config, "mode", None) == "strided":
        blocks = max(1, (config.sequence_len - config.context_length) // config.stride)
        samples = blocks * config.samples_a_pass * config.generate_max_len
        return rows * (config.sequence_len + samples), rows * (samples + config.sequence_len)
    if hasattr(config, "num_generations"):
        prompts = math.ceil(rows / config.num_generations) if config.share_prompts is not False else rows
        prompt = config.max_prompt_length or 512
        return prompts * prompt + rows * config.max_completion_length, rows * config.max_completion_length
    return rows * config.sequence_len, rows * config.sequence_len


def length_of(config: Any) -> int:
    """Tokens of the longest document that attends to itself."""
    if hasattr(config, "num_generations") and getattr(config, "mode", None) != "strided":
        return (config.max_prompt_length or 512) + config.max_completion_length
    return config.sequence_len


def estimate(arch: Architecture, config: Any, processes: int = 1) -> Estimate:
    """Estimate for a recipe's `config`; `processes`, or hsdp_shard_size of them, share weights (FSDP2)."""
    with torch.device("meta"):
        model = Transformer(arch)
        size = sum(p.numel() for p in model.parameters())
        if config.adapter:
            apply_lora(model.to(torch.bfloat16 if config.bf16 else torch.float32), config)
        set_precision(model, config)
    shards = (config.hsdp_shard_size or processes) if processes > 1 else 1
    stored = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for _, p in trained)
    state = 0
    for name, p in trained:
        muon = config.optimizer == "muon" and p.dim() == 2 and name.startswith("layers.")
        if config.optimizer == "adamw_8bit" and p.numel() >= 4096:
            state += 2 * p.numel() + p.numel() // 32
        else:
            state += (4 if muon else 8) * p.numel()
    tokens, judged = tokens_of(config)
    element = 2 if config.bf16 else 4
    layer, working = layer_bytes(arch, config, length_of(config))
    D, V = arch.hidden_size, arch.vocab_size
    if config.gradient_checkpointing:
        kept = tokens * (arch.num_layers * D * element + layer)
    else:
        kept = tokens * arch.num_layers * layer
    kept += tokens * 2 * D * element  # the embedding, and the last norm's output
    if config.bf16 and processes == 1:  # a bf16 copy of the matrices
        kept += sum(2 * p.numel() for p in model.parameters() if p.dim() >= 2 and p.element_size() == 4)
    chunk = min(judged, max(losses.TOKENS_PER_CHUNK, losses.LOGITS_PER_CHUNK // V))
    loss = chunk * V * (element + 4) + judged * D * element
    if any(n in ("lm_head.weight", "embed_tokens.weight") for n, _ in trained):
        loss += V * D * 4  # the head's gradient is made here, in fp32
    gathered = 0
    if shards > 1:  # FSDP gathers a block and the next one in the compute dtype
        block = max(sum(p.numel() for p in b.parameters()) for b in model.layers)
        gathered = element * (2 * block + V * D * (1 if arch.tied else 2))
    copies, cache, server = 0, 0, 0
    needs_copy = getattr(config, "beta", 0.0) or hasattr(config, "feature_layers")
    if hasattr(config, "num_generations") or hasattr(config, "feature_layers"):
        if needs_copy and not config.adapter and not getattr(config, "offload_feature_network", False):
            moves = getattr(config, "ref_model_sync_steps", None) is not None
            each = 2 if config.bf16 and not config.fp8 and not moves else 4
            copies = sum(p.numel() for p in model.parameters()) * each
        if getattr(config, "rollout_engine", "") == "embedded":
            length = (config.max_prompt_length or 512) + config.max_completion_length
            rows = config.micro_batch_size * config.gradient_accumulation_steps
            cache = min(rows, config.rollout_batch_size or MOST_ROWS) * sampled_bytes(arch, config, length)
        if getattr(config, "vllm_mode", "") == "colocate":
            length = (config.max_prompt_length or 512) + config.max_completion_length
            rows = min(MOST_ROWS, config.micro_batch_size * config.gradient_accumulation_steps)
            exact = config.vllm_dtype == "float32" or (config.vllm_dtype == "auto" and not config.bf16)
            a_token = arch.num_layers * 2 * arch.num_kv_heads * arch.head_dim
            server = (4 if exact else 2) * (size + rows * length * a_token)
    if config.fsdp_cpu_offload:
        stored = gradients = state = 0
    return Estimate(
        weights=stored // shards + gathered, gradients=gradients // shards, optimizer=state // shards,
        activations=kept, working=tokens * working, loss=loss, cache=cache, copies=copies // shards,
        server=server, naive_logits=judged * V * 8, tokens=tokens,
        accumulating=config.gradient_accumulation_steps > 1,
    )


MOST_ROWS = 512  # maximum sequences sampled at once, however much memory there is


def sampled_bytes(arch: Architecture, config: Any, length: int) -> int:
    """Bytes that one sequence of `length` tokens needs while it is sampled: keys, values and logits."""
    element = 2 if config.bf16 else 4
    kept = length * arch.num_layers * 2 * arch.num_kv_heads * arch.head_dim * element
    return kept + 4 * 4 * arch.vocab_size  # logits, log-probs, probabilities and clocks in fp32


def left_for_sampling(arch: Architecture, config: Any, total: int, processes: int = 1) -> float:
    """Bytes left for sampling: 90 % of the GPU's `total` minus weights, copies, gradients and optimiser.
    Estimated, not measured: the draws depend on how many sequences are sampled at once, so a resumed run
    must get the same number."""
    e = estimate(arch, config, processes)
    return 0.9 * total - e.weights - e.copies - e.optimizer - e.gradients


def rollout_rows(arch: Architecture, config: Any, length: int, left: float) -> int:
    """How many sequences of `length` tokens are sampled at once in `left` bytes: a power of two, at least
    1."""
    fitting = max(1, int(left / sampled_bytes(arch, config, length)))
    return min(MOST_ROWS, 1 << (fitting.bit_length() - 1))


def layer_bytes(arch: Architecture, config: Any, length: int) -> tuple[int, int]:
    """Bytes per token of the largest kind of layer: (kept for the backward pass, temporary during it)."""
    experts = any(arch.expert_layers)
    F = arch.expert_size if experts else arch.intermediate_size
    wide = (arch.hidden_size, F, arch.num_heads, arch.num_kv_heads)
    base = (128, 256, 4, 2)
    start = _per_token(arch, config, base)
    kept = start
    for i, width in enumerate(wide):
        more = tuple(2 * w if i == k else w for k, w in enumerate(base))
        kept += (_per_token(arch, config, more) - start) / base[i] * (width - base[i])
    # If attention keeps its scores (soft cap), each token keeps one per token of its document.
    scores = (_per_token(arch, config, base, length=61) - start) / (61 - 29) / base[2]
    kept += scores * arch.num_heads * (length - 29)
    element = 2 if config.bf16 else 4
    active = max(1, arch.experts_per_token if experts else 1)
    return round(kept), element * (2 * active * F + 2 * arch.hidden_size)


def _per_token(arch: Architecture, config: Any, widths: tuple[int, ...], length: int = 29) -> float:
    # No weight has a side of this length: weights that autograd saves are recognised by their shape.
    two, four = (_kept(arch, config, widths, n, length) for n in (2, 4))
    return (four - two) / (2 * length)


def _kept(arch: Architecture, config: Any, widths: tuple[int, ...], documents: int, length: int) -> int:
    """Bytes that autograd saves in one block's forward pass, excluding weights."""
    D, F, heads, kv = widths
    which = next((i for i, has in enumerate(arch.expert_layers) if has), 0)
    narrow = dataclasses.replace(
        arch, hidden_size=D, intermediate_size=F, expert_size=F, num_heads=heads, num_kv_heads=kv,
        num_layers=1,
        expert_layers=[arch.expert_layers[which]], windows=[None], layer_ropes=[arch.layer_ropes[which]],
        num_experts=min(arch.num_experts, 8), vocab_size=64, tied=True,
        experts_per_token=min(arch.experts_per_token, 8),
    )
    plain: Any = SimpleNamespace(
        **{**vars(config), "load_in_4bit": False, "load_in_8bit": False, "fp8_frozen": False}
    )
    model = Transformer(narrow)
    if config.adapter:
        apply_lora(model, plain)
    set_precision(model, plain)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    block = model.layers[0]
    assert isinstance(block, Block)
    seen: dict[int, tuple[int, Tensor]] = {}
    if config.bf16:
        model.to(torch.bfloat16)
    # Only live storages: an activation could reuse a freed address.
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    cast = {p.shape for p in model.parameters()} | {p.T.shape for p in model.parameters() if p.dim() == 2}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in ours and x.shape not in cast:
            seen[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    x = torch.randn(1, documents * length, D, requires_grad=True)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    positions = torch.arange(length).repeat(documents)[None]
    packed = kernels.Documents(torch.arange(documents).repeat_interleave(length)[None])
    x = x.to(dtype)
    tables = {key: rope.tables(positions, None, dtype) for key, rope in narrow.ropes.items()}
    ours |= {t.untyped_storage().data_ptr() for pair in tables.values() for t in pair}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = block(x, Pass(tables, packed, None, False))
    del out  # it kept the saved tensors alive
    return sum(size for size, _ in seen.values())


# ------------------------------------------------------------------------------------------------------------
# What to change
# ------------------------------------------------------------------------------------------------------------


def ladder(arch: Architecture, config: Any, processes: int = 1) -> list[tuple[str, int]]:
    """(change, bytes saved together with all changes before it), from least to most disruptive; changes that
    save nothing are omitted."""
    now = copy.copy(config)
    before = estimate(arch, now, processes).peak
    steps: list[tuple[str, int]] = []

    def rung(text: str, processes: int = processes, **changes: Any) -> None:
        changed = copy.copy(now)
        for key, value in changes.items():
            setattr(changed, key, value)
        try:
            after = estimate(arch, changed, processes).peak
        except ConfigError:  # not possible for this model
            return
        vars(now).update(vars(changed))
        if before - after > (steps[-1][1] if steps else 0):
            steps.append((text, before - after))

    if config.micro_batch_size > 1:
        more = config.gradient_accumulation_steps * config.micro_batch_size
        rung(
            f"micro_batch_size: 1 (is {config.micro_batch_size}) with gradient_accumulation_steps: {more} "
            f"(is {config.gradient_accumulation_steps}): the same batch",
            micro_batch_size=1, gradient_accumulation_steps=more,
        )
    if not config.gradient_checkpointing:
        rung("gradient_checkpointing: true (a third more time)", gradient_checkpointing=True)
    if not config.bf16:
        rung("bf16: true", bf16=True)
    if config.optimizer == "adamw":
        rung("optimizer: adamw_8bit", optimizer="adamw_8bit")
    if getattr(now, "beta", 0.0) and not config.adapter:
        rung("beta: 0, no reference model", beta=0.0)
    if not config.adapter:
        rung("adapter: lora (learning_rate 1e-4 to 3e-4 then)", adapter="lora")
    if now.adapter and not (config.load_in_4bit or config.load_in_8bit):
        rung("load_in_4bit: true (adapter: qlora)", load_in_4bit=True)
    for key in ("sequence_len", "max_completion_length"):
        value = getattr(config, key, None)
        if (
            isinstance(value, int)
            and value >= 64
            and (key == "sequence_len") != hasattr(config, "scale_rewards")
        ):
            rung(f"{key}: {value // 2} (is {value})", **{key: value // 2})
    rung(f"{2 * processes} processes (now {processes}): FSDP2 shards weights and optimiser", 2 * processes)
    return steps


def table(arch: Architecture, config: Any, processes: int = 1) -> str:
    """The estimate, and what to change, as text."""
    e = estimate(arch, config, processes)
    rows = [
        ("weights", e.weights, f"{'FSDP2 over ' + str(processes) if processes > 1 else 'one process'}"),
        ("gradients", e.gradients, ""),
        ("optimiser", e.optimizer, config.optimizer),
        ("frozen copy", e.copies, "reference or feature network"),
        ("activations", e.activations,
         f"{e.tokens:,} tokens in a pass" + ", recomputed by block" * config.gradient_checkpointing),
        ("backward", e.working, "of one block at a time"),
        ("loss", e.loss, f"a chunk of logits; all of them at once would take {gib(e.naive_logits)}"),
        ("keys and values", e.cache, "of the embedded engine, while it samples"),
        ("vLLM, awake", e.server, "its weights, and keys and values of a batch; asleep it has about 1 GiB"),
    ]
    lines = [f"{arch.name}: estimated peak of a process {gib(e.peak)}"]
    lines += [f"  {name:<16}{gib(size):>12}  {note}" for name, size, note in rows if size]
    if e.server:
        share = max(0.0, min(0.95, (80 - 2 - e.resident / 2**30) / 80))
        lines.append(f"  vllm_gpu_memory_utilization: at most {share:.2f} on 80 GiB, "
                     f"beside {gib(e.resident)} that stay while it samples")
    lines.append("what to change, from least to most disruptive (each with those above it):")
    lines += [f"  saves {gib(saved):>10}  {text}" for text, saved in ladder(arch, config, processes)]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# After an out-of-memory error
# ------------------------------------------------------------------------------------------------------------


def largest_tensors(count: int = 8) -> list[str]:
    """The largest live tensors by shape, with their number."""
    sizes: dict[tuple, list[int]] = {}
    seen: set[int] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn on isinstance
        objects = [it for it in gc.get_objects() if isinstance(it, Tensor)]
    for it in objects:
        try:
            if it.device.type == "meta" or it.untyped_storage().data_ptr() in seen:
                continue
            seen.add(it.untyped_storage().data_ptr())
            size = it.untyped_storage().nbytes()
        except Exception:  # noqa: S112 - a proxy that only looks like a tensor
            continue
        entry = sizes.setdefault(
            (tuple(it.shape), str(it.dtype).removeprefix("torch."), it.device.type), [0, 0]
        )
        entry[0] += 1
        entry[1] += size
    largest = sorted(sizes.items(), key=lambda entry: -entry[1][1])[:count]
    return [
        f"{gib(size)}: {n} × {list(shape)} {dtype} on {device}"
        for (shape, dtype, device), (n, size) in largest
    ]


def what_to_change(error: BaseException, config: Any) -> str:
    """Handle an out-of-memory error: log the largest tensors and a snapshot; return the advised changes, with
    the current values."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    with contextlib.suppress(Exception):  # the diagnosis must not raise another error
        for line in largest_tensors():
            log.info("alive: %s", line)
        if torch.cuda.is_available() and getattr(config, "output_dir", None):
            path = Path(config.output_dir) / "out_of_memory.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            log.info("snapshot in %s: python -m torch.cuda.memory._viz, or pytorch.org/memory_viz", path)
    traceback.clear_frames(error.__traceback__)  # they hold the activations
    gc.collect()
    try:
        directory = resolve_checkpoint(
            config.base_model, config.base_model_revision, Path(config.config_directory)
        )
        arch = read_architecture(directory, config.ignore_config_fields)
        rungs = [f"{text} (saves {gib(saved)})" for text, saved in ladder(arch, config)]
    except Exception:  # the advice must not hide the error
        log.debug("no estimate", exc_info=True)
        rungs = [
            "micro_batch_size: 1",
            "gradient_checkpointing: true",
            "smaller sequence_len",
            "adapter: lora",
        ]
    return f"out of memory: {first[:200]}; change, from least to most disruptive: " + "; ".join(rungs)
