"""SFT continued, GRPO and EBFT from one checkpoint, equal steps of 128 rows each: what held-out answers,
cross- entropy and features become, mean and spread over seeds (the comparison of Jelassi et al., arXiv
2603.12248, in small).

    python sft.py --config configs/tiny/sft.yaml         the checkpoint
    python bench/methods.py                              150 steps,
    three seeds: about half an hour on two cores

Every method reads the same 40,000 rows in its own order by seed, with Muon at its config's learning rate and
schedule. All results are judged alike: 8 samples of each of 500 held-out problems at temperature 1 with the
same random numbers, greedy answers, nats per token of the true answers, and ‖mean of the samples' features −
the truth's‖² in the features of the starting checkpoint (completion_mean, not whitened). `seconds` are those
of the steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ebft  # noqa: E402
from checkpoints.weights import load_pretrained  # noqa: E402
from data import read_prompts  # noqa: E402
from rollouts.generation import generate  # noqa: E402
from rollouts.policy import collate, token_logprobs  # noqa: E402
from rollouts.rollout import Rollout  # noqa: E402
from run.config import parse_config  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402

TINY = ROOT / "configs" / "tiny"
ROWS = (
    "datasets=[{path: 'reasoning-gym:chain_sum', type: tasks.arithmetic, size: 40000, seed: 1000000, "
    "params: {min_terms: 2, max_terms: 2, min_digits: 3, max_digits: 3}}]"
)
METHODS = {
    "SFT continued": ("sft.py", "sft.yaml", [
        ROWS, "random_init=false", "tokenizer_vocab_size=null", "micro_batch_size=128", "eval_answers=0",
        "weight_decay=0.0",
    ]),
    "GRPO": ("grpo.py", "grpo.yaml", []),
    "Distillation from GRPO's result": ("grpo.py", "distill.yaml", []),
    "EBFT, structured": ("ebft.py", "ebft.yaml", []),
    "EBFT, structured, ce_coef 0.1": ("ebft.py", "ebft.yaml", ["ce_coef=0.1"]),
    "EBFT, strided": ("ebft.py", "ebft_strided.yaml", []),
}
FORMS = [
    f"{mode}, whitening {form}"
    for mode in ("structured", "strided")
    for form in ("none", "feature", "sample")
]
for name in FORMS:  # the features' form alone: no cross-entropy in either mode
    mode, form = name.split(", whitening ")
    config = "ebft.yaml" if mode == "structured" else "ebft_strided.yaml"
    METHODS[name] = ("ebft.py", config, ["use_whitening=false", f"whitening={form}", "ce_coef=0.0"])
COLUMNS = {
    "sampled": ("right, sampled", "{:.1%}"), "greedy": ("right, greedy", "{:.1%}"),
    "cross_entropy": ("cross-entropy", "{:.4f}"), "cfm": ("feature distance", "{:.5f}"),
    "seconds": ("seconds", "{:.0f}"),
}


def train(method: str, start: Path, out: Path, steps: int, seed: int, more: list[str]) -> float:
    """Seconds of the steps."""
    script, config, own = METHODS[method]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--config", str(TINY / config), f"base_model={start}",
         f"output_dir={out}", f"max_steps={steps}", f"seed={seed}", "test_datasets=[]", "logging_steps=1",
         "save_steps=null", "eval_steps=null", *own, *more],
        capture_output=True, text=True,
    )
    if done.returncode:
        sys.exit(f"{method}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return sum(row.get("step_time", 0.0) for row in rows)


@torch.no_grad()
def judge(checkpoint: Path, start: Path, count: int) -> dict[str, float]:
    """Held-out figures of a checkpoint, in the features of the one that training began with."""
    config = parse_config(ebft.Config, ["--config", str(TINY / "ebft.yaml"), f"base_model={start}"])
    tokenizer = Tokenizer.load(start)
    specs = [{**spec, "size": count} for spec in config.test_datasets]
    prompts, _ = read_prompts(specs, tokenizer, config, TINY)
    truths = [ebft.true_completion(p, tokenizer)[0] for p in prompts]
    model, network = (
        load_pretrained(str(place), dtype=torch.float32).eval() for place in (checkpoint, start)
    )
    ids = [p.ids for p in prompts]

    def answers(n: int, temperature: float) -> list[list[int]]:
        return generate(
            model, ids, num_return_sequences=n, max_new_tokens=config.max_completion_length,
            stop_token_ids=tokenizer.stop_ids, temperature=temperature,
            generator=torch.Generator().manual_seed(7),
        ).completion_ids

    n = 8
    sampled, greedy = answers(n, 1.0), answers(1, 0.0)
    groups = [
        [Rollout(ids[i], sampled[i * n + k], ground_truth_ids=truths[i]) for k in range(n)]
        for i in range(len(ids))
    ]
    distances = []
    for begin in range(0, len(groups), 16):
        x, g = ebft.group_features(network, groups[begin : begin + 16], config)
        distances.append(ebft.cfm_loss(*(torch.nn.functional.normalize(t, dim=-1) for t in (x, g[:, None]))))
    nll, tokens = 0.0, 0
    for begin in range(0, len(ids), 128):
        part = [Rollout(ids[i], truths[i]) for i in range(begin, min(len(ids), begin + 128))]
        batch = collate(part, torch.device("cpu"))
        nll -= token_logprobs(model, batch, 1.0)[0].sum().item()
        tokens += len(batch.targets)
    return {
        "sampled": sum(s == truths[i // n] for i, s in enumerate(sampled)) / len(sampled),
        "greedy": sum(a == t for a, t in zip(greedy, truths, strict=True)) / len(greedy),
        "cross_entropy": nll / tokens, "cfm": torch.cat(distances).mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/tiny-sft/final"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--problems", type=int, default=500)
    usual = [name for name in METHODS if name not in FORMS]
    parser.add_argument("--methods", nargs="*", default=usual, choices=list(METHODS))
    parser.add_argument("--whitening", action="store_true", help="EBFT with each form of whitening instead")
    parser.add_argument("--sft-learning-rate", type=float, default=6e-4)
    parser.add_argument("more", nargs="*", help="more options for every run, key=value")
    given = parser.parse_args()
    given.methods = FORMS if given.whitening else given.methods
    start = given.checkpoint.resolve()
    if not (start / "config.json").exists():
        sys.exit(
            f"{given.checkpoint} is no checkpoint: run `python sft.py --config configs/tiny/sft.yaml` first"
        )
    METHODS["SFT continued"][2].append(f"learning_rate={given.sft_learning_rate}")
    before = judge(start, start, given.problems)
    print("before", {k: round(v, 5) for k, v in before.items()}, flush=True)
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in given.methods}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, given.seeds + 1):  # methods take turns, so that a slow hour touches all
            for method in given.methods:
                out = Path(folder) / f"{list(METHODS).index(method)}-{seed}"
                seconds = train(method, start, out, given.steps, seed, given.more)
                figures = {**judge(out / "final", start, given.problems), "seconds": seconds}
                found[method].append(figures)
                print(method, "seed", seed, {k: round(v, 5) for k, v in figures.items()}, flush=True)
    print(f"\n| {given.steps} steps, {given.seeds} seeds |", " | ".join(t for t, _ in COLUMNS.values()), "|")
    print("|---|" + "---:|" * len(COLUMNS))
    shown = [form.format(before[key]) if key in before else "" for key, (_, form) in COLUMNS.items()]
    print("| the checkpoint |", " | ".join(shown), "|")
    for method, runs in found.items():
        cells = []
        for key, (_, form) in COLUMNS.items():
            values = [run[key] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{form.format(statistics.mean(values))} ± {form.format(spread).rstrip('%')}")
        print(f"| {method} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
