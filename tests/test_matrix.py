"""Every recipe × (1, 2 processes) × (fp32, bf16) × (full, LoRA, 4 bit) × (activations kept or recomputed):
a few steps each, and what must agree between them."""

import itertools
import json
import math

import pytest

from conftest import CHATML_TEMPLATE, CHATML_TOKENS, ROOT, make_reference, run_program, write_tokenizer

RECIPES = {
    "sft": ("sft", ["micro_batch_size=4", "sequence_len=128", "val_set_size=4", "eval_steps=1",
     "eval_answers=2",
                    "eval_max_new_tokens=4"]),
    "grpo": ("grpo", ["micro_batch_size=8", "num_generations=4", "max_completion_length=6",
     "gradient_accumulation_steps=2",
                      "reward_funcs=[letters.spread]", "val_set_size=4", "eval_steps=1",
                       "steps_per_generation=4"]),
    "structured": ("ebft", ["micro_batch_size=8", "num_generations=4", "max_completion_length=6",
     "val_set_size=4",
                            "eval_steps=1", "gradient_accumulation_steps=2", "ce_coef=0.1"]),
    "strided": ("ebft", ["mode=strided", "micro_batch_size=4", "val_set_size=4", "eval_steps=1", "stride=4",
                         "generate_max_len=4", "context_length=4", "sequence_len=64", "ce_coef=0.1"]),
}
ADAPTERS = {
    "full": [],
    "lora": ["adapter=lora", "lora_r=4"],
    "nf4": ["adapter=qlora", "load_in_4bit=true", "lora_r=4"],
}
# For a reference beside the policy: beta, and full fine-tuning that moves it
EXTRA = {("grpo", "full"): ["beta=0.01", "ref_model_sync_steps=1"], ("grpo", "lora"): ["beta=0.01"]}
CELLS = list(itertools.product(RECIPES, (False, True), ADAPTERS, (False, True)))


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory):
    """As small_checkpoint, with inputs of a multiple of 64, which 4 bits need."""
    directory = tmp_path_factory.mktemp("wide")
    write_tokenizer(directory, CHATML_TEMPLATE, CHATML_TOKENS, "<|im_end|>")
    make_reference("qwen3", vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                   max_position_embeddings=512).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def matrix(wide_checkpoint, task, texts, tmp_path_factory):
    """processes → (cell's name → metrics of its steps)."""
    made: dict[int, dict] = {}

    def get(ranks: int) -> dict:
        if ranks in made:
            return made[ranks]
        folder = tmp_path_factory.mktemp(f"matrix{ranks}")
        (folder / "letters.py").write_text((task / "letters.py").read_text())
        runs = []
        for kind, bf16, adapter, recompute in CELLS:
            rows, form = (texts, "text") if kind == "strided" else (task / "rows.jsonl", "chat")
            config = folder / f"{kind}.yaml"
            config.write_text(f"base_model: {wide_checkpoint}\ndatasets: [{{path: {rows}, type: {form}}}]\n"
                              "max_steps: 3\nlearning_rate: 1e-3\nreport: false\n")
            recipe, options = RECIPES[kind]
            name = f"{kind} {'bf16' if bf16 else 'fp32'} {adapter}{' recomputed' if recompute else ''}"
            runs.append([name, recipe, [
                "--config", str(config), *options, *ADAPTERS[adapter], *EXTRA.get((kind, adapter), []),
                f"micro_batch_size={int(options[0 if kind != 'strided' else 1].split('=')[1]) // ranks}",
                f"bf16={bf16}".lower(), f"gradient_checkpointing={recompute}".lower(),
                f"output_dir={folder / name.replace(' ', '-')}",
            ]])
        (folder / "runs.json").write_text(json.dumps(runs))
        done = run_program(ROOT / "tests" / "matrix.py", str(folder / "runs.json"), str(folder / "out.json"),
                           ranks=ranks)
        assert (folder / "out.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
        made[ranks] = json.loads((folder / "out.json").read_text())
        return made[ranks]

    return get


NAMES = [f"{kind} {'bf16' if bf16 else 'fp32'} {adapter}{' recomputed' if recompute else ''}"
         for kind, bf16, adapter, recompute in CELLS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_combination_takes_its_steps(name, ranks, matrix):
    rows = matrix(ranks).get(name, "not run: one before it failed")
    assert isinstance(rows, list), rows
    norms = [row[key] for row in rows for key in ("grad_norm", "train/grad_norm") if key in row]
    assert len(norms) == 3 and all(math.isfinite(norm) and norm > 0 for norm in norms), norms


def losses(rows: list[dict]) -> list[float]:
    return [row[key] for row in rows for key in ("loss", "train/loss") if key in row]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("dtype, bound", [("fp32", 1e-5), ("bf16", 2e-3)])
def test_one_process_and_two_compute_the_same(dtype, bound, adapter, matrix):
    """The same global batch; in bf16 both have the residual stream, norms and rotation in bf16."""
    one, two = (losses(matrix(ranks)[f"sft {dtype} {adapter}"]) for ranks in (1, 2))
    assert len(one) == 3 and one == pytest.approx(two, rel=bound)
    assert one[0] == pytest.approx(two[0], rel=1e-5)  # of the same weights


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("recomputed")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_recomputing_activations_changes_nothing(name, ranks, matrix):
    kept, again = (losses(matrix(ranks)[n]) for n in (name, f"{name} recomputed"))
    assert kept == again
