"""Builds a config's model: sharded, with its weights and adapters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoints.adapters import adapter_token_rows, apply_lora, initialize_lora, load_adapter
from checkpoints.families import Architecture
from checkpoints.weights import initialize, load_weights, resized
from dist import World, log, shard
from model import Transformer, set_precision
from run.config import ConfigError


def build_model(
    arch: Architecture, checkpoint: Path, config: Any, world: World, random_init: bool = False,
    new_tokens: Sequence[int] = (), frozen: bool = False,
) -> Transformer:
    """Build a config's model, sharded, with its weights (loaded or random) and adapters, in training mode.
    With an adapter, the rows of `new_tokens` are trained too. `frozen`: a read-only copy in the compute dtype
    (with fp8 in fp32, because its products must start from the same weights as the model's).

    The model is created on the meta device, where it needs no memory; after sharding, each rank allocates
    its own rows and reads only those from the checkpoint.
    """
    if world.device.type == "cuda" and not config.bf16:
        log.warning(
            "bf16: false on a GPU: attention falls back to a form whose memory grows with the square of the "
            "length; set bf16: true unless this is intended"
        )
    stored = [k for k in ("load_in_4bit", "load_in_8bit", "fp8_frozen") if getattr(config, k)]
    if config.fsdp_cpu_offload and stored:
        raise ConfigError(
            stored[0], True, "cannot be combined with fsdp_cpu_offload, which moves parameters only: "
            "quantised "
            "weights are needed on the GPU all the time; leave one of the two out",
        )
    before = adapter_token_rows(config.lora_model_dir) if config.adapter and config.lora_model_dir else []
    rows = sorted({*before, *new_tokens})
    if config.adapter and rows:
        arch = resized(arch, max(arch.vocab_size, rows[-1] + 1))
    with torch.device("meta"):
        model = Transformer(arch)
        if config.adapter:
            dtype = torch.bfloat16 if config.bf16 else torch.float32
            apply_lora(model.to(dtype), config, token_rows=rows)
        elif frozen and config.bf16 and not config.fp8:
            model.to(torch.bfloat16)
        set_precision(model, config)
    shard(model, config, world)
    model.to_empty(device="cpu" if config.fsdp_cpu_offload else world.device)
    if random_init:
        initialize(model, config.seed)
    else:
        load_weights(model, checkpoint)
    if config.adapter:
        initialize_lora(model, config.seed)
        if config.lora_model_dir:
            load_adapter(model, config.lora_model_dir)
    return model.eval().requires_grad_(False) if frozen else model.train()
