"""Every recipe's step on a GPU that is not there (pretend_cuda/pretend.py), in every precision and adapter:
no tensor of the CPU meets one of the GPU, and the numbers are those of the CPU."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from pretend_cuda import pretend

from conftest import CHATML_TEMPLATE, CHATML_TOKENS, ROOT, make_reference, run_program, write_tokenizer

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SMALL = ["micro_batch_size=2", "val_set_size=1", "eval_steps=1"]
RECIPES = {
    "sft": ("sft", [*SMALL, "sequence_len=128", "eval_answers=1", "eval_max_new_tokens=4"]),
    "grpo": ("grpo", [*SMALL, "num_generations=2", "max_completion_length=4", "steps_per_generation=2",
                      "reward_funcs=[letters.spread]", "share_prompts=true", "beta=0.01"]),
    "structured": ("ebft", [*SMALL, "num_generations=2", "max_completion_length=4", "ce_coef=0.1"]),
    "strided": ("ebft", [*SMALL, "mode=strided", "stride=16", "n_samples_per_prompt=2", "generate_max_len=3",
                         "context_length=4", "sequence_len=64", "ce_coef=0.1"]),
}
ADAPTERS = {
    "full": [],
    "lora": ["adapter=lora", "lora_r=4"],
    "nf4": ["adapter=qlora", "load_in_4bit=true", "lora_r=4"],
    "int8": ["adapter=lora", "load_in_8bit=true", "lora_r=4"],
    "fp8": ["fp8=true"],
}
OTHERS = {  # what else takes another way on a GPU
    "sft bf16 muon": ["optimizer=muon"],
    "sft bf16 adamw_8bit": ["optimizer=adamw_8bit"],
    "sft bf16 recomputed": ["gradient_checkpointing=true"],
    "grpo bf16 moved reference": ["ref_model_sync_steps=1"],
    "grpo bf16 deterministic": ["deterministic=true"],
}
CELLS = [
    f"{kind} {dtype} {adapter}"
    for kind in RECIPES for dtype in ("fp32", "bf16") for adapter in ADAPTERS
    if not (adapter == "fp8" and dtype == "fp32")
]
QUICK = {"sft fp32 nf4", "sft bf16 full", "sft bf16 fp8", "grpo bf16 lora", "structured fp32 full",
         "strided bf16 nf4", "sft bf16 muon"}
FAMILIES = ["gemma2", "mixtral"]


def options(cell: str) -> tuple[str, list[str]]:
    kind, dtype, *rest = cell.split()
    recipe, own = RECIPES[kind]
    extra = OTHERS.get(cell) or ADAPTERS.get(" ".join(rest), [])
    return recipe, [*own, *extra, f"bf16={dtype == 'bf16'}".lower()]


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """family → a checkpoint of one layer with inputs of a multiple of 64, which 4 bits need."""

    def make(family: str):
        directory = tmp_path_factory.mktemp(family)
        write_tokenizer(directory, CHATML_TEMPLATE, CHATML_TOKENS, "<|im_end|>")
        layers = 2 if family == "gemma2" else 1  # every other one has a window
        make_reference(family, vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=layers,
                       max_position_embeddings=512).save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def started(wide, task, texts, tmp_path_factory):
    """Runs cells, on the pretended GPU or on the CPU, in one process: cell → what became of it."""
    library = pretend.build(tmp_path_factory.mktemp("device"))
    qwen = wide("qwen3")

    def start(cells: list[str], gpu: bool = True, base=None, **environment: str) -> dict:
        folder = tmp_path_factory.mktemp("cells")
        shutil.copy(task / "letters.py", folder / "letters.py")
        runs = []
        for cell in cells:
            recipe, chosen = options(cell)
            rows, form = (texts, "text") if cell.startswith("strided") else (task / "rows.jsonl", "chat")
            config = folder / f"{form}.yaml"
            config.write_text(
                f"base_model: {base or qwen}\ndatasets: [{{path: {rows}, type: {form}}}]\n"
                "max_steps: 1\nlearning_rate: 1e-3\nreport: false\nresume: never\n"
            )
            out = f"output_dir={folder / cell.replace(' ', '-')}"
            runs.append([cell, recipe, ["--config", str(config), *chosen, out]])
        (folder / "runs.json").write_text(json.dumps(runs))
        names = [str(folder / "runs.json"), str(folder / "out.json")]
        if not gpu:
            done = run_program(ROOT / "tests" / "matrix.py", *names)
        else:
            done = subprocess.run(
                [sys.executable, str(ROOT / "tests" / "pretend_cuda" / "pretend.py"), *names],
                env={**os.environ, **pretend.environment(library), **environment},
                capture_output=True, text=True,
            )
        assert (folder / "out.json").exists(), done.stdout[-2000:] + done.stderr[-2000:]
        return json.loads((folder / "out.json").read_text())

    return start


@pytest.fixture(scope="session")
def quick(started):
    cells = [cell for cell in [*CELLS, *OTHERS] if cell in QUICK]
    return started(cells), started(cells, gpu=False)


@pytest.fixture(scope="session")
def every(started):
    cells = [cell for cell in [*CELLS, *OTHERS] if cell not in QUICK]
    return started(cells), started(cells, gpu=False)


def judge(cell: str, gpu: dict, cpu: dict) -> None:
    made = gpu[cell]
    assert not isinstance(made, str), made
    (row,) = (row for row in made["metrics"] if "train/grad_norm" in row)
    assert math.isfinite(row["train/grad_norm"]) and row["train/grad_norm"] > 0
    (same,) = (row for row in cpu[cell] if "train/grad_norm" in row)
    if cell.startswith("sft"):  # the others sample, and the smallest difference makes another token
        bound = 1e-4 if "fp32" in cell else 2e-2
        for key in ("train/loss",) if "fp8" in cell else ("train/loss", "train/grad_norm"):
            assert row[key] == pytest.approx(same[key], rel=bound), key


@pytest.mark.parametrize("cell", sorted(QUICK))
def test_a_step_on_the_gpu(cell, quick):
    judge(cell, *quick)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in [*CELLS, *OTHERS] if cell not in QUICK])
def test_a_step_on_the_gpu_in_every_precision_and_adapter(cell, every):
    judge(cell, *every)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_other_families_on_the_gpu(family, started, wide):
    """Gemma 2 has a soft cap and windows, Mixtral experts."""
    cells = ["sft bf16 full", "grpo bf16 full", "strided bf16 full"]
    base = wide(family)
    gpu, cpu = started(cells, base=base), started(cells, gpu=False, base=base)
    for cell in cells:
        judge(cell, gpu, cpu)


def test_a_mixed_device_is_found(started):
    """With positions and masks where the parameters rest under fsdp_cpu_offload: on the CPU."""
    cells = ["sft bf16 full", "structured fp32 full"]
    for cell, message in started(cells, PRETEND_MIXED="1").items():
        assert isinstance(message, str) and "a tensor of the CPU" in message, (cell, message)


def test_what_the_host_waits_for_in_a_step(quick):
    """The model and its kernels never read a tensor back; the losses do once a micro-batch."""
    for cell in ("sft bf16 full", "sft bf16 fp8"):
        waits = [w for w in quick[0][cell]["syncs"] if not w.endswith("to the GPU")]
        inside = [w for w in waits if w.split(":")[0] in ("model.py", "low_precision.py")]
        assert not [w for w in inside if not w.endswith("repeat_interleave")], inside
