"""docs/scaling.md's figures: memory and time of models from 0.5B to 70B, computed; and the same arithmetic
against what is measured here, on one process and on several.

    python bench/scaling.py                    what is computed
    python bench/scaling.py --measure 1 2 4    and on so many processes here, estimate beside measured

Measured is the highest sum of allocations and frees in a second step, above weights and optimiser states, as
torch's profiler sees them on the CPU; the speed is the share that a step reaches of this machine's own matrix
products.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import dist  # noqa: E402
from checkpoints import building  # noqa: E402
from checkpoints.families import Architecture  # noqa: E402
from health import memory  # noqa: E402
from health.memory import estimate  # noqa: E402
from model import Transformer  # noqa: E402
from sft import Config, batch_nll  # noqa: E402
from text.packing import Batch  # noqa: E402

QWEN, LLAMA = {"model_type": "qwen2", "vocab_size": 151936}, {"model_type": "llama", "vocab_size": 128256}
SHAPES = {  # hidden, feed-forward, layers, heads, key/value heads, head width, tied
    "Qwen2.5 0.5B": (QWEN, 896, 4864, 24, 14, 2, 64, True),
    "Qwen3 4B": ({**QWEN, "model_type": "qwen3"}, 2560, 9728, 36, 32, 8, 128, True),
    "Llama 3.1 8B": (LLAMA, 4096, 14336, 32, 32, 8, 128, False),
    "Llama 3.1 70B": (LLAMA, 8192, 28672, 80, 64, 8, 128, False),
}
WAYS = {"full": {}, "LoRA": {"adapter": "lora"}, "LoRA nf4": {"adapter": "qlora", "load_in_4bit": True}}
PEAK, SHARE, NVLINK, NETWORK = 989e12, 0.4, 450e9, 50e9  # H100: dense bf16; what is assumed of it; bytes/s
TOKENS = 4096


def architecture(shape: tuple) -> Architecture:
    base, D, F, layers, heads, kv, width, tied = shape
    return Architecture.from_config({
        **base, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": width,
        "tie_word_embeddings": tied, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    })


def config_of(**changes) -> Config:
    given = dict(
        base_model="x", datasets=[{"path": "x", "type": "chat"}], micro_batch_size=1, sequence_len=TOKENS,
        bf16=True, gradient_checkpointing=True,
    )
    return Config(**{**given, **changes})


def gibibytes(size: float) -> str:
    value = size / 2**30
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return f"({shown})" if value > 79 else shown


def computed() -> None:
    counts = (1, 8, 64, 256)
    print("memory of a GPU, GiB: " + f"bf16, gradient checkpointing, {TOKENS:,} tokens per pass\n")
    print("| model | | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in counts) + " |")
    print("|---|---|" + "---|" * len(counts))
    for name, shape in SHAPES.items():
        arch = architecture(shape)
        for way, changes in WAYS.items():
            if name == "Qwen2.5 0.5B" and way == "LoRA nf4":
                continue
            peaks = [gibibytes(estimate(arch, config_of(**changes), n).peak) for n in counts]
            print(f"| {name if way == 'full' else ''} | {way} | " + " | ".join(peaks) + " |", flush=True)
    print(f"\ntime: {SHARE:.0%} of an H100's {PEAK / 1e12:.0f} TFLOP/s, documents of {TOKENS:,} tokens\n")
    print("| model | GFLOP a token | tokens per second and GPU | 10⁹ tokens on 8 GPUs, hours | on 256 | "
          "tokens per GPU and step that hide FSDP: NVLink | network |")
    print("|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model = Transformer(architecture(shape))
        flops = model.flops_per_token(TOKENS)
        rate = PEAK * SHARE / (flops * 4 / 3)  # the forward pass runs twice
        moved = (2 + 2 + 4) * model.count_parameters()  # gathered twice in bf16, gradients reduced in fp32
        hide = [rate * moved / wire for wire in (NVLINK, NETWORK)]
        hours = [1e9 / rate / n / 3600 for n in (8, 256)]
        print(f"| {name} | {flops / 1e9:,.1f} | {rate:,.0f} | {hours[0]:,.1f} | {hours[1]:,.2f} | "
              f"{hide[0]:,.0f} | {hide[1]:,.0f} |")


MEASURED = {"": {}, "gradient checkpointing": {"gradient_checkpointing": True}, "bf16": {"bf16": True}}
SMALL = {**QWEN, "model_type": "qwen3", "vocab_size": 32768}, 512, 1536, 8, 8, 4, 64, True


def small_config(**changes) -> Config:
    plain = dict(bf16=False, gradient_checkpointing=False, micro_batch_size=4, sequence_len=512)
    return config_of(**{**plain, **changes})


def matmul_rate() -> float:
    """FLOP/s of products like those of the model, on this many threads."""
    a, b = torch.randn(2048, 512), torch.randn(512, 1536)
    times = []
    for _ in range(8):
        begun = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begun)
    return 2 * 2048 * 512 * 1536 / statistics.median(times)


def one_rank(changes: dict) -> None:
    """Steps of the small model; rank 0 prints [peak bytes, tokens per second, FLOP/s] of a process."""
    config = small_config(**changes)
    arch = architecture(SMALL)
    world = dist.init(config)
    model = building.build_model(arch, Path("."), config, world, random_init=True)
    optimizers = dist.make_optimizers(model, config)
    B, T = config.micro_batch_size, config.sequence_len
    ids = torch.randint(0, arch.vocab_size, (B, T))
    places = torch.arange(T).expand(B, T).contiguous()
    batch = Batch(ids, ids.clone(), places, torch.arange(B)[:, None].expand(B, T).contiguous(), [])

    def step() -> None:
        batch_nll(model, batch.to(world.device))[0].backward()
        dist.update(optimizers, 1e-4)

    step()
    held = memory.weight_bytes(model) + memory.optimizer_bytes(optimizers)
    seen = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with seen as profile:
        step()
    now = peak = 0
    assert profile.profiler is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    rate = B * T / statistics.median(times)
    if world.main:
        print(json.dumps([held + peak, rate, rate * model.flops_per_token(T)]))
    dist.finish()


def measured(counts: list[int]) -> None:
    """On several processes a rank's share is held, and blocks are gathered."""
    arch = architecture(SMALL)
    print(f"\nmeasured here, a Qwen3 of {SMALL[1]} × {SMALL[3]} layers, vocabulary "
          f"{SMALL[0]['vocab_size']:,}, 4 × 512 tokens per process\n")
    print("| processes | | estimate, GiB | measured, GiB | ratio | tokens per second, all "
          "| of matrix products |")
    print("|---|---|---|---|---|---|---|")
    threads = len(os.sched_getaffinity(0))
    for n in counts:
        for way, changes in MEASURED.items():
            each = str(max(1, threads // n))
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
            done = subprocess.run(
                [*command, __file__, "--rank", json.dumps(changes)],
                env={**os.environ, "OMP_NUM_THREADS": each}, capture_output=True, text=True, check=True,
            )
            peak, rate, flops = json.loads(done.stdout.splitlines()[-1])
            guess = estimate(arch, small_config(**changes), n).peak
            torch.set_num_threads(threads)
            print(f"| {n} | {way} | {guess / 2**30:.2f} | {peak / 2**30:.2f} | {guess / peak:.2f} | "
                  f"{n * rate:,.0f} | {n * flops / matmul_rate():.0%} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", type=int, nargs="+", default=[])
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        one_rank(json.loads(given.rank))
    else:
        computed()
        if given.measure:
            measured(given.measure)
