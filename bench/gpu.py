"""Every kernel on the GPU at hand: correct, how fast, and what share of the device's roofline.

    python bench/gpu.py                    every kernel, beside the library one would use instead
    python bench/gpu.py attention fp8      only the names that contain one of these
    python bench/gpu.py sft                SFT end to end, shapes of Qwen3-0.6B, random weights: tokens/s, MFU
    python bench/gpu.py --small            small shapes; runs on a CPU too, where the figures mean nothing

Ten minutes on a GPU: `pytest -m gpu 2>&1 | tee gpu-tests.txt`, then `python bench/gpu.py`, which writes what
it prints to gpu-DEVICE.txt too. Send both files back: they go into bench/README.md with the device's name.

A row: milliseconds, TFLOP/s or GB/s counted from the shapes, the share of the roofline (the device's
published peaks if they are known, else a large bf16 product and a large copy, measured first), the relative
error against fp32, and the time relative to ours. Liger, flex_attention, torch.compile and cuBLAS take part
where they run; one that cannot says why.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels  # noqa: E402
from health.memory import peak_flops  # noqa: E402
from numerics import losses, low_precision  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "B200": 8e12, "L40S": 0.864e12}  # bytes/s


@dataclass
class Case:
    name: str
    flops: float
    bytes: float
    sides: dict[str, Callable[[], object]]  # the first is ours, in bf16 or lower; each returns tensors
    exact: Callable[[], object] | None = None  # the same in fp32
    peak: float = 1.0  # of the bf16 peak: 2 for FP8


def seconds(run: Callable[[], object]) -> float:
    """Median of one call, after warming up."""
    if DEVICE.type == "cuda":
        from triton.testing import do_bench

        milliseconds = do_bench(run, warmup=50, rep=200, return_mode="median")
        assert isinstance(milliseconds, float)
        return milliseconds / 1e3
    run()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def tensors(result: object) -> list[torch.Tensor]:
    return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if torch.is_tensor(x)]


def relative_error(got: object, expected: object) -> float:
    pairs = zip(tensors(got), tensors(expected), strict=True)
    return max(float((g.float() - e.float()).norm() / e.float().norm().clamp(min=1e-12)) for g, e in pairs)


def gradients(make: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
    """Forward and backward of `make` into every input, from a fixed gradient of its output."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        like = make(*leaves)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(like.shape, generator=generator).to(like.device, like.dtype)

    def run():
        y = make(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, g)]

    return run


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def products(small: bool) -> Iterator[Case]:
    M, N, K = (256, 256, 256) if small else (8192, 4096, 4096)
    x, w = randn(M, K), randn(N, K) / K**0.5
    exact = lambda: x.float() @ w.float().T  # noqa: E731
    flops = 2 * M * N * K
    (q, scale), (qw, scale_w) = low_precision.quantize_fp8(x), low_precision.quantize_fp8_blocks(w)
    one = torch.ones((), device=DEVICE)

    def cublas_fp8():  # one scale a tensor: the product alone, without finding the scales
        return torch._scaled_mm(q, qw.T, one, one, out_dtype=torch.bfloat16)

    yield Case(
        "fp8 product (quantised operands)", flops, M * K + N * K + 2 * M * N,
        {"ours": lambda: low_precision.fp8_matmul(q, scale, qw, scale_w, dtype=torch.bfloat16),
         "cuBLAS bf16": lambda: x @ w.T, "cuBLAS fp8, no scales": cublas_fp8}, exact, peak=2,
    )
    yield Case(
        "fp8 linear, forward + backward", 3 * flops, 3 * (M * K + N * K + 2 * M * N),
        {"ours": gradients(lambda x, w: low_precision.fp8_linear(x, w), x, w),
         "cuBLAS bf16": gradients(lambda x, w: x @ w.T, x, w)},
        gradients(lambda x, w: x @ w.T, x.float(), w.float()), peak=2,
    )
    for blocks in (False, True):
        ours = low_precision.quantize_fp8_blocks if blocks else low_precision.quantize_fp8
        torch_form = (
            low_precision.quantize_fp8_blocks_reference if blocks else low_precision.quantize_fp8_reference
        )
        compiled = torch.compile(torch_form)
        yield Case(
            f"fp8 quantise by {'blocks' if blocks else 'tiles'}", 0, 3 * M * K,
            {"ours": lambda f=ours: f(x)[1], "torch": lambda f=torch_form: f(x)[1],
             "torch.compile": lambda f=compiled: f(x)[1]},
        )
    for kind, width in (("nf4", 0.516), ("int8", 1.0), ("fp8", 1.0)):
        stored = low_precision.quantize(kind, w)
        for rows in (M, 16):
            part = x[:rows]
            yield Case(
                f"{kind} frozen weight, {rows} rows", 2 * rows * N * K, 2 * rows * (K + N) + width * N * K,
                {"ours": lambda p=part, k=kind, s=stored: low_precision.frozen_linear(p, k, s),
                 "dequantise, cuBLAS": lambda p=part, k=kind, s=stored:
                    p @ low_precision.dequantize(k, s).to(p.dtype).T,
                 "cuBLAS bf16": lambda p=part: p @ w.T},
                lambda p=part: p.float() @ w.float().T, peak=2 if kind == "fp8" else 1,
            )


def attentions(small: bool) -> Iterator[Case]:
    B, T, H, K = (1, 256, 4, 2) if small else (2, 8192, 32, 8)

    def causal(b, h, i, j):
        return i >= j

    mask = kernels.make_block_mask(causal, B, H, T, T, DEVICE) if DEVICE.type == "cuda" else None
    for E in (64, 128, 256):
        q, k, v = randn(B, T, H, E), randn(B, T, K, E), randn(B, T, K, E)
        flops = 4 * B * H * E * T * T / 2
        bytes_ = 2 * B * T * E * (2 * H + 2 * K)

        def ours(q, k, v, E=E, documents=None):
            return kernels.attention(q, k, v, scale=E**-0.5, documents=documents)

        def sdpa(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        def flex(q, k, v, E=E):
            return kernels.predicate_attention(q, k, v, causal, scale=E**-0.5, block_mask=mask)

        exact = (x.float() for x in (q, k, v))
        yield Case(
            f"attention E {E}, forward", flops, bytes_,
            {"ours": lambda q=q, k=k, v=v, f=ours: f(q, k, v), "SDPA": lambda q=q, k=k, v=v: sdpa(q, k, v),
             "flex_attention": lambda q=q, k=k, v=v, f=flex: f(q, k, v)},
        )
        yield Case(
            f"attention E {E}, forward + backward", 3.5 * flops, 3 * bytes_,
            {"ours": gradients(ours, q, k, v), "SDPA": gradients(sdpa, q, k, v),
             "flex_attention": gradients(flex, q, k, v)},
            gradients(sdpa, *exact) if T <= 2048 else None,
        )
    E = 128
    ids = torch.arange(T, device=DEVICE).div(T // 8, rounding_mode="floor").expand(B, T)
    documents = kernels.Documents(ids)
    q, k, v = randn(B, T, H, E), randn(B, T, K, E), randn(B, T, K, E)
    yield Case(
        "attention E 128, 8 packed documents, forward + backward", 3.5 * 4 * B * H * E * T * T / 16,
        6 * B * T * E * (2 * H + 2 * K),
        {"ours": gradients(
            lambda q, k, v: kernels.attention(q, k, v, scale=E**-0.5, documents=documents), q, k, v)},
    )
    rows, S = (4, 256) if small else (64, 8192)
    q, k, v = randn(rows, H, E), randn(rows, K, S, E), randn(rows, K, S, E)
    visible = torch.ones(rows, S, dtype=torch.bool, device=DEVICE)

    def decode_sdpa():
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    yield Case(
        f"decoding, {rows} rows, {S:,} keys", 4 * rows * H * E * S, 4 * rows * K * E * S,
        {"ours": lambda: kernels.decode_attention(q, k, v, visible, scale=E**-0.5), "SDPA": decode_sdpa},
        lambda: F.scaled_dot_product_attention(
            q[:, :, None].float(), k.float(), v.float(), enable_gqa=True)[:, :, 0],
    )


def loss_cases(small: bool) -> Iterator[Case]:
    tokens, width, vocabulary = (64, 64, 1000) if small else (8192, 2048, 151936)
    hidden, weight = randn(tokens, width), randn(vocabulary, width) / width**0.5
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    work = 6 * tokens * vocabulary * width

    def liger(hidden, weight):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)

    naive = lambda h, w: F.cross_entropy((h @ w.T).float(), labels, reduction="sum")  # noqa: E731
    yield Case(
        f"linear cross-entropy, {vocabulary:,}", work, 6 * vocabulary * width,
        {"ours": gradients(lambda h, w: losses.linear_cross_entropy(h, w, labels), hidden, weight),
         "naive": gradients(naive, hidden, weight), "Liger": gradients_or_reason(liger, hidden, weight),
         "torch linear_cross_entropy": gradients(
             lambda h, w: F.linear_cross_entropy(h, w, labels, reduction="sum"), hidden, weight)},
        gradients(naive, hidden.float(), weight.float()) if small else None,
    )

    def naive_statistics():
        logp = F.log_softmax((hidden @ weight.T).float(), -1)
        return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def statistics():
        made = losses.linear_logprobs(hidden, weight, labels)
        return made.logprobs, made.entropy

    yield Case(
        f"log-probability + entropy, {vocabulary:,}, forward", work / 3, 2 * vocabulary * width,
        {"ours": statistics, "naive": naive_statistics}, naive_statistics,
    )


def gradients_or_reason(make: Callable, *inputs: torch.Tensor) -> Callable[[], object]:
    """As `gradients`, but a library that cannot run here fails when it is timed, not before."""
    return lambda: gradients(make, *inputs)()


def pointwise(small: bool) -> Iterator[Case]:
    M, D, width = (64, 128, 256) if small else (8192, 4096, 14336)
    x, w = randn(M, D), randn(D)
    gate, up = randn(M, width), randn(M, width)
    q, angles = randn(1, M, 32 if not small else 2, 128), randn(1, M, 1, 64, dtype=torch.float32)
    rope = angles.cos(), angles.sin()

    def liger_rms(x, w):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, w, 1e-6)

    def liger_swiglu(gate, up):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)

    rms = lambda x, w: kernels.rms_norm(x, w, 1e-6)  # noqa: E731
    rms_torch = lambda x, w: kernels.rms_norm_reference(x, w, 1e-6)  # noqa: E731
    rotate = lambda q: kernels.rotate(q, *rope)  # noqa: E731
    rotate_torch = lambda q: kernels.rotate_reference(q, *rope)  # noqa: E731
    for name, bytes_, ours, torch_form, liger, inputs in (
        ("rms_norm", 10 * M * D, rms, rms_torch, liger_rms, (x, w)),
        ("swiglu", 16 * M * width, kernels.swiglu, kernels.swiglu_reference, liger_swiglu, (gate, up)),
        ("rotate", 8 * q.numel(), rotate, rotate_torch, None, (q,)),
    ):
        sides = {"ours": gradients(ours, *inputs), "torch": gradients(torch_form, *inputs),
                 "torch.compile": gradients_or_reason(torch.compile(torch_form), *inputs)}
        if liger is not None:
            sides["Liger"] = gradients_or_reason(liger, *inputs)
        exact = gradients(torch_form, *(t.float() for t in inputs))
        yield Case(f"{name}, forward + backward", 0, bytes_, sides, exact)


def optimisers(small: bool) -> Iterator[Case]:
    size = 2**14 if small else 2**27
    grad = randn(size, dtype=torch.float32)

    def stepper(make):
        weight = torch.nn.Parameter(torch.zeros(size, device=DEVICE))
        weight.grad = grad.clone()
        optimiser = make([weight], lr=1e-3)
        return lambda: (optimiser.step(), weight.detach())[1]

    def bitsandbytes():
        import bitsandbytes

        return stepper(bitsandbytes.optim.AdamW8bit)()

    yield Case(
        f"AdamW, {size / 2**20:,.2f}M parameters", 0, 16 * size,
        {"ours, 8 bit": stepper(low_precision.AdamW8bit),
         "torch fused, fp32": stepper(lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)),
         "bitsandbytes, 8 bit": bitsandbytes},
    )


def peaks() -> tuple[float, float, str]:
    """FLOP/s in bf16 and bytes/s: published where known, else measured."""
    size, many = (8192, 2**28) if DEVICE.type == "cuda" else (512, 2**22)
    a, b = randn(size, size), torch.zeros(many, dtype=torch.bfloat16, device=DEVICE)
    measured = 2 * size**3 / seconds(lambda: a @ a), 2 * b.nbytes / seconds(lambda: b.clone())
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    published = peak_flops(DEVICE), next((rate for key, rate in BANDWIDTH.items() if key in name), None)
    flops, rate = published[0] or measured[0], published[1] or measured[1]
    kind = "published" if published[0] and published[1] else "measured"
    line = (
        f"{name}, torch {torch.__version__}: roofline {flops / 1e12:,.1f} TFLOP/s bf16 and {rate / 1e9:,.0f} "
        f"GB/s ({kind}); a large product reaches {measured[0] / 1e12:,.1f}, a copy {measured[1] / 1e9:,.0f}"
    )
    return flops, rate, line


def kernels_table(wanted: list[str], small: bool) -> None:
    flops_peak, bytes_peak, line = peaks()
    print(line)
    print(f"{'':<28}{'ms':>10}{'TFLOP/s':>10}{'GB/s':>8}{'roofline':>10}{'error':>10}{'time':>8}")
    for group in (products, attentions, loss_cases, pointwise, optimisers):
        for case in group(small):
            if wanted and not any(word in case.name for word in wanted):
                continue
            print(f"\n{case.name}")
            base = None
            expected = case.exact() if case.exact else None
            for side, run in case.sides.items():
                try:
                    error = relative_error(run(), expected) if expected is not None else None
                    took = seconds(run)
                except Exception as problem:  # a peer may lack this device or shape: the table goes on
                    reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
                    if base is None:
                        raise  # ours must run
                    print(f"  {side:<26}  does not run: {reason[:70]}")
                    continue
                base = base or took
                least = max(case.flops / (case.peak * flops_peak), case.bytes / bytes_peak)
                shown = f"{case.flops / took / 1e12:10.1f}" if case.flops else f"{'—':>10}"
                wrong = "—" if error is None else f"{error:.1e}"
                print(f"  {side:<26}{took * 1e3:10.3f}{shown}{case.bytes / took / 1e9:8.0f}"
                      f"{least / took:10.0%}{wrong:>10}{took / base:7.2f}×", flush=True)


def sft(small: bool) -> None:
    """The recipe itself on random weights of Qwen3-0.6B's shape, packed 2 × 4,096 tokens per step."""
    shape = dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=1024, num_hidden_layers=28,
        intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        vocab_size=151936, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_theta=1e6,
        max_position_embeddings=40960, hidden_act="silu", attention_bias=False,
    )
    length, rows = (128, 64) if small else (4096, 3000)
    if small:
        shape |= dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128, head_dim=16, vocab_size=512)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(shape))
        with (directory / "rows.jsonl").open("w") as file:
            for i in range(rows):
                words = " ".join(str((i * 7919 + j * 104729) % 10007) for j in range(20 if small else 250))
                file.write(json.dumps({"text": words}) + "\n")
        # random_init has the tokenizer's rows; padded to the model's own, head and loss are its size too.
        own = [
            "random_init=true",
            "tokenizer_vocab_size=400",
            f"pad_vocab_to_multiple_of={shape['vocab_size']}",
        ]
        runs = {
            "bf16": own, "fp8": [*own, "fp8=true"], "checkpointing": [*own, "gradient_checkpointing=true"],
            "lora": ["adapter=lora", "lora_r=16"],  # on what the first run saved
        }
        for label, options in runs.items():
            base = directory / "bf16" / "final" if label == "lora" else directory
            command = [
                sys.executable, ROOT / "sft.py", f"base_model={base}",
                f"datasets=[{{path: {directory / 'rows.jsonl'}, type: text}}]", f"sequence_len={length}",
                "sample_packing=true", "micro_batch_size=2", "max_steps=20", "num_epochs=100", "bf16=true",
                "logging_steps=5", "learning_rate=1e-4", f"output_dir={directory / label}", *options,
            ]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
            if done.returncode:
                print(f"{label:<16}failed: {(done.stdout + done.stderr).strip().splitlines()[-1][:120]}")
                continue
            saved = base if label == "lora" else directory / label / "final"
            vocabulary = json.loads((saved / "config.json").read_text())["vocab_size"]
            if vocabulary != shape["vocab_size"]:
                sys.exit(
                    f"{label}: trained with {vocabulary} tokens, not {shape['vocab_size']}: not the model"
                )
            lines = (directory / label / "metrics.jsonl").read_text().splitlines()
            last = [json.loads(line) for line in lines if "tokens_per_second" in line][-1]
            mfu = f", MFU {last['mfu']:.1%}" if "mfu" in last else ""
            print(f"{label:<16}{last['tokens_per_second']:>12,.0f} tokens/s, "
                  f"{last['memory/max_alloc']:.1f} GiB{mfu}", flush=True)


class Both(io.TextIOBase):
    """A stream that writes to two."""

    def __init__(self, *streams: IO[str]):
        self.streams = streams

    def write(self, text: str) -> int:
        for stream in self.streams:
            stream.write(text)
            stream.flush()
        return len(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of kernels' names, or `sft`")
    parser.add_argument("--small", action="store_true", help="small shapes, on a CPU too")
    arguments = parser.parse_args()
    if DEVICE.type == "cpu" and not arguments.small:
        sys.exit("no GPU is visible to torch; `--small` runs the same code on the CPU")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    report = Path(f"gpu-{name.replace(' ', '-')}.txt")
    with report.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(Both(sys.stdout, file)):
        if arguments.names != ["sft"]:
            kernels_table(arguments.names, arguments.small)
        if not arguments.names or "sft" in arguments.names:
            sft(arguments.small)
    print(f"\nwritten to {report}: send it back, with what `pytest -m gpu` printed")


if __name__ == "__main__":
    main()
