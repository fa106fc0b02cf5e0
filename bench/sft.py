"""Supervised fine-tuning side by side with TRL's SFTTrainer: the same random model and data, one after the
other.

    python bench/sft.py              width 256, 6 layers, vocabulary 32,768, packed 8 × 512, fp32
    python bench/sft.py vocabulary   width 128, 2 layers, vocabulary 151,936, unpacked

Prints tokens per second (real tokens, first step left out), peak memory of the process and the time from its
start to the end of the first step, for both, and the ratios. Machines drift: the sides take turns, `--rounds`
times.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "packed": dict(hidden_size=256, num_hidden_layers=6, intermediate_size=768, num_attention_heads=8,
    num_key_value_heads=4,
                   head_dim=32, vocab_size=32768, rows=8, length=512, packing=True),
    "vocabulary": dict(hidden_size=128, num_hidden_layers=2, intermediate_size=384, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=32, vocab_size=151936, rows=8, length=512,
                       packing=False),
}


def make(shape: dict, directory: Path, steps: int) -> int:
    """A random Qwen3 checkpoint and random documents, enough for `steps` steps; returns the number of
    documents."""
    import random

    import tokenizers
    import transformers

    arch = {k: v for k, v in shape.items() if k not in ("rows", "length", "packing")}
    config = transformers.Qwen3Config(**arch, max_position_embeddings=2048, tie_word_embeddings=False)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    rng = random.Random(0)
    count = 0
    with (directory / "rows.jsonl").open("w") as file:
        total = 0
        needed = (
            steps
            * shape["rows"]
            * (shape["length"] if shape["packing"] else 1)
            * (1.3 if shape["packing"] else 1)
        )
        while total < needed:
            length = rng.randint(shape["length"] // 8, shape["length"])
            ids = [rng.randrange(2, shape["vocab_size"]) for _ in range(length)]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
            total += length if shape["packing"] else 1
            count += 1
    return count


def ours(directory: Path, shape: dict, steps: int, started: float) -> dict:
    output = directory / f"ours-{time.time_ns()}"
    command = [
        sys.executable, str(ROOT / "sft.py"), f"base_model={directory}", f"output_dir={output}",
        f"max_steps={steps}",
        f"datasets=[{{path: {directory}/rows.jsonl, type: tokens}}]", f"micro_batch_size={shape['rows']}",
        f"sequence_len={shape['length']}", f"sample_packing={str(shape['packing']).lower()}",
        "learning_rate=1e-4",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    first = None
    for line in process.stdout or []:
        if first is None and line.startswith("step"):
            first = time.time() - started
    process.wait()
    assert process.returncode == 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(row["step_time"] for row in rows[1:])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"tokens_per_second": (rows[-1]["num_tokens"] - rows[0]["num_tokens"]) / seconds, "peak_GiB": peak,
            "first_step_seconds": first}


def trl(directory: Path, shape: dict, steps: int, started: float) -> dict:
    import datasets
    import torch
    import transformers
    import trl

    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            times.append((time.time(), state.num_input_tokens_seen))

    rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
    config = trl.SFTConfig(
        output_dir=str(directory / "trl"), per_device_train_batch_size=shape["rows"],
        max_length=shape["length"],
        packing=shape["packing"], max_steps=steps, learning_rate=1e-4, bf16=False, fp16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[], seed=0,
        disable_tqdm=True,
        include_num_input_tokens_seen="non_padding", dataloader_num_workers=0,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    trainer = trl.SFTTrainer(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(directory), callbacks=[Clock()],
    )
    trainer.train()
    (first, seen), (last, seen_last) = times[0], times[-1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "tokens_per_second": float(seen_last - seen) / (last - first),
        "peak_GiB": peak,
        "first_step_seconds": first - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", nargs="?", default="packed", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.side:
        side = ours if arguments.side == "ours" else trl
        result = side(Path(arguments.directory), shape, arguments.steps, arguments.started)
        print("RESULT " + json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as directory:
        make(shape, Path(directory), arguments.steps)
        results: dict[str, list[dict]] = {"trl": [], "ours": []}
        for round_number in range(arguments.rounds):
            for side in results:
                command = [sys.executable, __file__, arguments.shape, f"--steps={arguments.steps}",
                f"--side={side}",
                           f"--directory={directory}", f"--started={time.time()}"]
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                )
                lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                if not lines:
                    sys.exit(done.stdout + done.stderr)
                results[side].append(json.loads(lines[0].removeprefix("RESULT ")))
                print(f"round {round_number + 1} {side:<5} {results[side][-1]}", flush=True)
        print(f"\n{arguments.shape}: {shape}, {arguments.steps} steps, medians of {arguments.rounds} rounds")
        print(f"{'':<22} {'ballast':>10} {'TRL':>10} {'ratio':>8}")
        for key in ("tokens_per_second", "peak_GiB", "first_step_seconds"):
            a, b = (statistics.median(r[key] for r in results[side]) for side in ("ours", "trl"))
            print(f"{key:<22} {a:>10,.2f} {b:>10,.2f} {a / b:>7.2f}×")


if __name__ == "__main__":
    main()
