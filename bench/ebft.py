"""Strided EBFT: block-parallel sampling, features and training, against the same blocks one by one; and the
training pass against one with a dense mask.

    python bench/ebft.py                     documents of 128, 256 and 512 tokens,
    and three strides: some minutes
    python bench/ebft.py --lengths 1024
    python bench/ebft.py --whitening         what each form of whitening does to alignment and advantages

A random Qwen3 (width 256, 6 layers, vocabulary 8,192, fp32), one document a step, 4 samples of 8 tokens a
block. One by one, a block's samples are drawn from its prefix by our own `generate`, its features come from
ordinary passes over [prefix, sample], and so do its gradients; the rollouts that are trained are the same on
both sides, and so are the gradients (the largest relative difference is printed). One process a measurement;
medians.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
G, N = 8, 4  # tokens of a block, samples of it


def whitening() -> None:
    """Advantages of 8 simulated samples (unit vectors of 64 dimensions around a common one, as hidden states
    are) whose truth is one of them, drawn like them, or unrelated; means over 4,000 prompts. Then how far
    the baseline of a sample moves when the sample is replaced."""
    import torch
    from torch.nn.functional import normalize

    import ebft

    torch.manual_seed(0)
    P, n, D = 4000, 8, 64

    def unit(*shape: int) -> torch.Tensor:
        return normalize(torch.randn(*shape, D, dtype=torch.float64), dim=-1)

    def judged(x: torch.Tensor, g: torch.Tensor, form: str) -> tuple[torch.Tensor, ...]:
        white, truth = (x, g[:, None].expand_as(x)) if form == "none" else ebft.whiten(x, g, form)[:2]
        align, diverse = ebft.alignment(white, truth), ebft.diversity(white)
        advantage = ebft.advantages(align, diverse, "rloo")
        return align, advantage, align - diverse - advantage

    print("| spread of the samples | whitening | Σ(alignment/2)² | RMS of advantages: truth among them | "
          "truth drawn like them | truth unrelated | baseline moves by |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for spread in (0.1, 0.3, 1.0):
        common = unit(P, 1)
        x, other = normalize(common + spread * unit(P, n), dim=-1), x_like(common, spread, unit(P, 1))
        truths = [x[:, 0].clone(), other[:, 0], unit(P)]
        for form in ("none", "feature", "sample"):
            rows = [judged(x, g, form) for g in truths]
            changed = torch.cat([x_like(common, spread, unit(P, 1)), x[:, 1:]], dim=1)
            moved = (judged(changed, truths[1], form)[2] - rows[1][2])[:, 0].abs().mean()
            total = (rows[1][0] / 2).square().sum(-1).mean()
            sizes = " | ".join(f"{advantage.square().mean().sqrt():.3f}" for _, advantage, _ in rows)
            print(f"| {spread} | {form} | {total:.2f} | {sizes} | {moved:.4f} |")


def x_like(common, spread: float, direction):
    from torch.nn.functional import normalize

    return normalize(common + spread * direction, dim=-1)


def network():
    import torch

    from checkpoints.families import Architecture
    from checkpoints.weights import initialize
    from model import Transformer

    arch = Architecture.from_config({
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 768,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True, "rope_theta": 1e4,
        "max_position_embeddings": 4096, "attention_bias": False,
    })
    with torch.device("meta"):
        model = Transformer(arch)
    model.to_empty(device="cpu")
    initialize(model, 0)
    return model


def document(length: int, stride: int):
    import torch

    from rollouts.blocks import Document, block_anchors

    ids = torch.randint(8192, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    return Document(ids, block_anchors(length, 8, G, stride), [True] * length, "one")


def blocks_loss(model, part, tokens, weights):
    """Σ weight · log p over the blocks' tokens [blocks · N, G], in one pass."""
    from numerics.losses import linear_logprobs
    from rollouts.blocks import BlockPass

    batch = BlockPass.make(part, tokens)
    hidden, _ = model.hidden_states(batch.input_ids, shared_prompts=batch.shared)
    made = linear_logprobs(
        hidden[0].index_select(0, batch.sources.flatten()), model.head_weight,
        batch.input_ids[0, batch.block_rows.flatten()],
    )
    return -(made.logprobs * weights.repeat_interleave(G)).sum()


def speed(length: int, stride: int, rounds: int) -> dict:
    """Medians of seconds for sampling, features and training, on both sides, taking turns."""
    import torch

    from ebft import Config, block_features, group_features
    from rollouts.blocks import BlockPass, sample_blocks
    from rollouts.generation import generate
    from rollouts.policy import collate, token_logprobs
    from rollouts.rollout import Rollout

    model, frozen = network(), network()
    one = document(length, stride)
    config = Config(base_model="x", datasets=[{"path": "x"}], mode="strided")
    weights = torch.randn(len(one.anchors) * N, generator=torch.Generator().manual_seed(2))
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable):
        started = time.perf_counter()
        made = work()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        return made

    def gradients() -> torch.Tensor:
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return flat

    def one_round() -> float:
        """How far the gradients of the two sides differ."""
        generator = torch.Generator().manual_seed(3)
        tokens, _ = timed("ours sampling", lambda: sample_blocks(model, [one], N, G, 1.0, generator))
        timed("ours features", lambda: block_features(frozen, BlockPass.make([one], tokens), [one], config))
        timed("ours training", lambda: blocks_loss(model, [one], tokens, weights).backward())
        ours = gradients()

        def rollouts(block: int) -> list[Rollout]:
            anchor = one.anchors[block]
            rows = tokens[block * N : block * N + N].tolist()
            truth = one.ids[anchor : anchor + G]
            return [Rollout(one.ids[:anchor], row, ground_truth_ids=truth) for row in rows]

        def sampling() -> None:
            for anchor in one.anchors:
                generate(
                    model, [one.ids[:anchor]], num_return_sequences=N, max_new_tokens=G, temperature=1.0,
                    generator=generator,
                )

        def features() -> None:
            for block in range(len(one.anchors)):
                for rollout in rollouts(block):  # one sequence a pass
                    group_features(frozen, [[rollout]], config)

        def training() -> None:
            for block in range(len(one.anchors)):
                batch = collate(rollouts(block), torch.device("cpu"))
                logprobs = token_logprobs(model, batch, 1.0)[0]
                (-(logprobs * weights[block * N : block * N + N, None]).sum()).backward()

        timed("single sampling", sampling)
        timed("single features", features)
        timed("single training", training)
        theirs = gradients()
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    one_round()
    seconds.clear()
    worst = max(one_round() for _ in range(rounds))
    return {"blocks": len(one.anchors), "gradient": worst,
            **{name: statistics.median(values) for name, values in seconds.items()}}


def training_pass(side: str, length: int, stride: int, rounds: int) -> dict:
    """Seconds and peak memory (above that of the model and its gradients) of a training pass."""
    import torch
    import torch.nn.functional as F

    import kernels

    def dense(q, k, v, shared, scale, window, softcap):
        """Every token against every other under one mask, as SDPA takes it."""
        if not hasattr(shared, "dense_mask"):
            sees, _ = shared.predicate(window)
            index = torch.arange(q.shape[1])
            shared.dense_mask = sees(0, 0, index[:, None], index[None])
        made = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=shared.dense_mask, scale=scale, enable_gqa=True
        )
        return made.transpose(1, 2)

    if side == "dense":
        kernels._shared_prompt_attention = dense
    model, one = network(), document(length, stride)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(8192, (len(one.anchors) * N, G), generator=torch.Generator().manual_seed(4))
    weights = torch.ones(len(one.anchors) * N)
    blocks_loss(model, [document(64, 32)], tokens[: 2 * N], weights[: 2 * N]).backward()  # warm
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(rounds):
        started = time.perf_counter()
        blocks_loss(model, [one], tokens, weights).backward()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds), "MiB": (peak - before) / 1024}


def measured(*arguments: object) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--strides", type=int, nargs="*", default=[32, 16], help="at the longest, beside 8")
    parser.add_argument("--memory-lengths", type=int, nargs="*", default=[512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whitening", action="store_true", help="the table of what whitening does, alone")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.whitening:
        return whitening()
    if given.only:
        kind, *rest = given.only
        figures = speed(*map(int, rest)) if kind == "speed" else training_pass(kind, *map(int, rest))
        print(json.dumps(figures))
        return

    print("| document | stride | blocks | block-parallel: sampling, features, training, s | one by one, s "
          "| ratio | sampling | features | training | gradients differ |")
    print("|---:|---:|---:|---|---|---:|---:|---:|---:|---:|")
    shapes = [(length, 8) for length in given.lengths]
    for length, stride in shapes + [(max(given.lengths), s) for s in given.strides]:
        found = measured("--only", "speed", length, stride, given.rounds)
        parts = ("sampling", "features", "training")
        ours, single = ([found[f"{side} {part}"] for part in parts] for side in ("ours", "single"))
        ratios = [sum(single) / sum(ours), *(s / o for s, o in zip(single, ours, strict=True))]
        cells = [", ".join(f"{x:.2f}" for x in side) for side in (ours, single)]
        cells += [f"{ratio:.1f}×" for ratio in ratios] + [f"{found['gradient']:.0e}"]
        print(f"| {length} | {stride} | {found['blocks']} |", " | ".join(cells), "|", flush=True)

    print(
        "\n| document, stride 8 | training pass, s | dense mask, s | ratio | peak, MiB | dense, MiB | ratio |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for length in given.memory_lengths:
        ours, dense = (measured("--only", side, length, 8, given.rounds) for side in ("blocks", "dense"))
        cells = [f"{ours['seconds']:.2f}", f"{dense['seconds']:.2f}",
                 f"{dense['seconds'] / ours['seconds']:.2f}×", f"{ours['MiB']:.0f}", f"{dense['MiB']:.0f}",
                 f"{dense['MiB'] / max(1.0, ours['MiB']):.2f}×"]
        print(f"| {length} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
