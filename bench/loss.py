"""The loss from hidden states, against naive logits, torch's linear_cross_entropy and Liger.

    python bench/loss.py                        4,096 tokens, width 512, vocabulary 32k, 152k and 256k
    python bench/loss.py --tokens 1024 --vocabulary 151936

One process a measurement (peak resident memory on a CPU, the allocator's peak on a GPU), taking turns;
forward and backward into hidden states and weight; medians, and ratios to ours.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDES = ["ours", "ours logprobs", "naive", "torch", "liger"]


def measure(side: str, tokens: int, width: int, vocabulary: int, steps: int) -> dict:
    import torch
    import torch.nn.functional as F

    sys.path.insert(0, str(ROOT))
    from numerics import losses

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=device)

    if side == "ours":
        loss = lambda: losses.linear_cross_entropy(hidden, weight, labels) / tokens  # noqa: E731
    elif side == "ours logprobs":
        loss = lambda: -losses.linear_logprobs(hidden, weight, labels).logprobs.mean()  # noqa: E731
    elif side == "naive":
        loss = lambda: F.cross_entropy((hidden @ weight.T).float(), labels)  # noqa: E731
    elif side == "torch":
        loss = lambda: F.linear_cross_entropy(hidden, weight, labels)  # noqa: E731
    else:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        loss = lambda: fused(weight, hidden, labels)  # noqa: E731

    def memory() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    before, seconds, value = memory(), [], 0.0
    for _ in range(steps + 1):
        hidden.grad = weight.grad = None
        started = time.perf_counter()
        made = loss()
        made.backward()
        value = made.item()
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(seconds[1:]),
        "MiB": memory() - before,
        "loss": value,
        "device": device,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32768, 151936, 262144])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        result = measure(
            arguments.side, arguments.tokens, arguments.width, arguments.vocabulary[0], arguments.steps
        )
        print("RESULT " + json.dumps(result))
        return
    for vocabulary in arguments.vocabulary:
        print(f"\nvocabulary {vocabulary:,}, {arguments.tokens:,} tokens, width {arguments.width}")
        print(f"  {'':<16}{'seconds':>9}{'MiB above start':>17}{'loss':>10}{'time':>9}{'memory':>9}")
        base = None
        for side in SIDES:
            command = [sys.executable, __file__, f"--side={side}", "--vocabulary", str(vocabulary)]
            command += [f"--{key}={getattr(arguments, key)}" for key in ("tokens", "width", "steps")]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                last = (done.stderr.strip().splitlines() or ["no output"])[-1]
                print(f"  {side:<16}does not run here: {last[:80]}")
                continue
            result = json.loads(lines[0].removeprefix("RESULT "))
            base = base or result
            print(
                f"  {side:<16}{result['seconds']:>9.2f}{result['MiB']:>17,.0f}{result['loss']:>10.4f}"
                f"{result['seconds'] / base['seconds']:>8.2f}×{result['MiB'] / base['MiB']:>8.2f}×",
                flush=True,
            )


if __name__ == "__main__":
    main()
