"""What only a CUDA device can show: pytest -m gpu."""

import json

import pytest
import torch

import kernels
from checkpoints.weights import load_pretrained
from conftest import FAMILIES, ROOT, run_program
from numerics import losses, low_precision
from rollouts.generation import generate

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
    losses.linear_cross_entropy(device[0], device[1], labels.cuda(), chunk=64).backward()
    for got, expected in zip(device, exact, strict=True):
        assert (got.grad.cpu() - expected.grad).norm() / expected.grad.norm() < 1e-3


def close(got, expected, tolerance):
    got, expected = got.double().cpu(), expected.double().cpu()
    error = (got - expected).norm()
    assert error <= tolerance * expected.norm() + 1e-6, (error / expected.norm()).item()


@pytest.mark.parametrize("M, N, K", [(1, 3, 64), (300, 520, 192), (1024, 1024, 1024)])
def test_low_precision_products_on_the_device_equal_their_references(M, N, K):
    torch.manual_seed(0)
    x, w = torch.randn(M, K), torch.randn(N, K)
    for quantize, reference in (
        (low_precision.quantize_fp8, low_precision.quantize_fp8_reference),
        (low_precision.quantize_fp8_blocks, low_precision.quantize_fp8_blocks_reference),
    ):
        (q, scale), (expected, expected_scale) = quantize(x.cuda()), reference(x)
        close(scale, expected_scale, 1e-6)
        assert (q.cpu().float() == expected.float()).float().mean() > 0.999
    close(low_precision.fp8_linear(x.cuda(), w.cuda()), low_precision.fp8_linear(x, w), 1e-3)
    for kind in ("nf4", "int8", "fp8"):
        stored = low_precision.quantize(kind, w)
        for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 2e-2)):
            given = x.to(dtype).requires_grad_()
            device = x.to(dtype).cuda().requires_grad_()
            y = low_precision.frozen_linear(device, kind, tuple(t.cuda() for t in stored))
            expected = low_precision.frozen_linear(given, kind, stored)
            close(y, expected, tolerance)
            g = torch.randn(M, N).to(dtype)
            (dx,), (expected_dx,) = (
                torch.autograd.grad(y, device, g.cuda()),
                torch.autograd.grad(expected, given, g),
            )
            close(dx, expected_dx, tolerance)


@pytest.mark.parametrize("E", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("window, softcap", [(None, None), (100, 20.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_the_device_equals_the_cpu_forward_and_backward(E, window, softcap, dtype):
    torch.manual_seed(0)
    lengths = torch.tensor([[5, 1, 300, 206], [512, 0, 0, 0]])
    ids = torch.stack([torch.repeat_interleave(torch.arange(4), row) for row in lengths])
    given = [torch.randn(2, 512, heads, E).to(dtype) for heads in (4, 2, 2)]
    g = torch.randn(2, 512, 4, E).to(dtype)
    results = []
    for place, precision in (("cpu", torch.float64), ("cuda", dtype)):
        q, k, v = (x.to(place, precision).requires_grad_() for x in given)
        documents = kernels.Documents(ids.to(place))
        out = kernels.attention(q, k, v, scale=E**-0.5, documents=documents, window=window, softcap=softcap)
        results.append([out, *torch.autograd.grad(out, (q, k, v), g.to(place, precision))])
    for expected, got in zip(*results, strict=True):
        close(got, expected, 5e-3 if dtype == torch.float32 else 2e-2)


def test_pointwise_kernels_and_log_probabilities_on_the_device_equal_the_cpu():
    torch.manual_seed(0)
    x, w, up = torch.randn(300, 200), torch.randn(200), torch.randn(300, 200)
    close(kernels.rms_norm(x.cuda(), w.cuda(), 1e-6), kernels.rms_norm(x, w, 1e-6), 1e-5)
    close(kernels.swiglu(x.cuda(), up.cuda()), kernels.swiglu(x, up), 1e-5)
    head, labels = torch.randn(5000, 200), torch.randint(5000, (300,))
    device = losses.linear_logprobs(x.cuda(), head.cuda(), labels.cuda(), temperature=0.7)
    host = losses.linear_logprobs(x, head, labels, temperature=0.7)
    for name in ("logprobs", "entropy", "logsumexp"):
        close(getattr(device, name), getattr(host, name), 1e-2)


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
    )
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
        )
        assert done.returncode == 0, done.stdout + done.stderr
        finals.append((tmp_path / name / "final" / "model.safetensors").read_bytes())
    assert finals[0] == finals[1]


def test_completions_behind_one_copy_of_their_prompt_on_the_device_equal_the_cpu(references):
    from rollouts.policy import collate, token_logprobs
    from rollouts.rollout import Rollout

    directory = str(references("qwen3")[1])
    rollouts = [
        Rollout(p, c) for p, cs in (([5, 6, 7], ([8, 9], [10])), ([11] * 30, ([12] * 9,))) for c in cs
    ]
    results = []
    for device, share in (("cpu", False), ("cuda", True), ("cuda", False)):
        model = load_pretrained(directory, dtype=torch.float32, device=device)
        batch = collate(rollouts, torch.device(device), share)
        logprobs, entropy, _, _ = token_logprobs(model, batch, 0.8)
        logprobs.sum().backward()
        results.append([logprobs, entropy, model.layers[0].self_attn.q_proj.weight.grad])
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            close(a, b, 5e-3)


@pytest.mark.parametrize("options", [[], ["share_prompts=true"], ["adapter=lora", "bf16=true"]])
def test_grpo_samples_and_trains_on_the_device(options, small_checkpoint, tmp_path):
    rows = [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_program(
        ROOT / "grpo.py", f"base_model={small_checkpoint[0]}", "reward_funcs=[length]", "num_generations=4",
        f"datasets=[{{path: {tmp_path / 'rows.jsonl'}, type: prompt_completion}}]", "micro_batch_size=8",
        f"output_dir={tmp_path / 'out'}", "max_completion_length=16", "max_steps=3", "learning_rate=1e-3",
        *options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    gap = last.get("sampling/sampling_logp_difference/mean", 0.0)
    assert gap < (5e-2 if "bf16=true" in options else 1e-3)


def test_blocks_of_ebft_train_on_the_device(small_checkpoint, tmp_path):
    rows = [{"text": f"number {i} and number {i + 1} and some more words here"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_program(
        ROOT / "ebft.py", f"base_model={small_checkpoint[0]}", "micro_batch_size=2", "max_steps=3",
        f"datasets=[{{path: {tmp_path / 'rows.jsonl'}, type: text}}]", f"output_dir={tmp_path / 'out'}",
        "learning_rate=1e-3", "generate_max_len=4", "mode=strided",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["sampling/sampling_logp_difference/max"] < 1e-2
