"""What only a CUDA device can show: pytest -m gpu."""

import json

import pytest
import torch

import kernels
from conftest import FAMILIES, ROOT, run_program
from model import generate, load_pretrained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_and_generation_on_the_device_equal_those_on_the_cpu(name, references):
    _, directory = references(name)
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    cpu = load_pretrained(str(directory), dtype=torch.float32)
    gpu = load_pretrained(str(directory), dtype=torch.float32, device="cuda")
    assert (gpu(ids.cuda()).cpu() - cpu(ids)).abs().max() < 1e-3
    how = dict(max_new_tokens=10, temperature=0)
    assert (
        generate(gpu, [ids[0].tolist()], **how).completion_ids
        == generate(cpu, [ids[0].tolist()], **how).completion_ids
    )


def test_the_loss_and_its_gradients_on_the_device_equal_fp64():
    torch.manual_seed(0)
    hidden, weight = torch.randn(500, 64), torch.randn(1000, 64)
    labels = torch.randint(1000, (500,))
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum").backward()
    device = [x.cuda().requires_grad_() for x in (hidden, weight)]
    kernels.linear_cross_entropy(device[0], device[1], labels.cuda(), chunk=64).backward()
    for got, expected in zip(device, exact, strict=True):
        assert (got.grad.cpu() - expected.grad).norm() / expected.grad.norm() < 1e-3


@pytest.mark.parametrize(
    "options", [[], ["bf16=true"], ["bf16=true", "adapter=lora"], ["fsdp_cpu_offload=true"]]
)
def test_the_recipe_trains_on_the_device(options, small_checkpoint, chat_file, tmp_path):
    out = tmp_path / "out"
    done = run_program(
        ROOT / "sft.py", f"base_model={small_checkpoint[0]}",
        f"datasets=[{{path: {chat_file}, type: chat}}]", f"output_dir={out}",
        "sequence_len=256", "learning_rate=1e-3", "micro_batch_size=8", "max_steps=8",
        "sample_packing=true", "profiler_steps=[2]", "num_epochs=8", *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert list((out / "profile").glob("memory-step-2-rank-0.pickle"))


def test_deterministic_runs_on_the_device_give_the_same_bytes(small_checkpoint, chat_file, tmp_path):
    finals = []
    for name in ("a", "b"):
        done = run_program(
            ROOT / "sft.py", f"base_model={small_checkpoint[0]}",
            f"datasets=[{{path: {chat_file}, type: chat}}]", f"output_dir={tmp_path / name}",
            "micro_batch_size=8", "max_steps=4", "deterministic=true", "bf16=true",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        finals.append((tmp_path / name / "final" / "model.safetensors").read_bytes())
    assert finals[0] == finals[1]
