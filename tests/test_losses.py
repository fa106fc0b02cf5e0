"""The loss and the log-probabilities against naive fp64, in value and gradient."""

import ast
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from numerics import losses


def naive_loss(hidden, weight, labels, softcap=None):
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_linear_cross_entropy_equals_naive_fp64_in_value_and_gradient(softcap, chunk):
    torch.manual_seed(0)
    hidden = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(33, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(33, (50,))
    labels[::3] = -100
    got = losses.linear_cross_entropy(hidden, weight, labels, softcap=softcap, chunk=chunk)
    expected = naive_loss(hidden, weight, labels, softcap)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(got * 0.37, (hidden, weight)),
        torch.autograd.grad(expected * 0.37, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_linear_cross_entropy_gradient_equals_finite_differences():
    torch.manual_seed(0)
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 4, -100, 2, 2, -100])

    def loss():
        return losses.linear_cross_entropy(hidden, weight, labels, softcap=3.0, chunk=4)

    # Once: the weight gradient is scaled in place, so torch's gradcheck, which repeats it, cannot
    loss().backward()
    for tensor in (hidden, weight):
        flat = tensor.detach().view(-1)
        for i in range(flat.numel()):
            before = flat[i].item()
            values = []
            for step in (1e-6, -1e-6):
                flat[i] = before + step
                values.append(loss().item())
            flat[i] = before
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(tensor.grad.view(-1)[i].item(), abs=1e-7)


def test_linear_cross_entropy_is_finite_for_large_logits_and_zero_for_no_labels():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss = losses.linear_cross_entropy(hidden, weight, torch.tensor([1, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(4e4)
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    nothing = losses.linear_cross_entropy(hidden, weight, torch.tensor([-100, -100]))
    nothing.backward()
    assert nothing.item() == 0


def test_a_frozen_head_gets_no_gradient_and_bf16_sums_are_kept_in_fp32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4096, 8), torch.randn(64, 8)
    labels = torch.randint(64, (4096,))
    exact = naive_loss(hidden.bfloat16().double(), weight.bfloat16().double(), labels)
    h = hidden.bfloat16().requires_grad_()
    loss = losses.linear_cross_entropy(h, weight.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert abs(loss.item() / exact.item() - 1) < 2e-3
    loss.backward()
    assert h.grad is not None


# ------------------------------------------------------------------------------------------------------------
# Log-probabilities
# ------------------------------------------------------------------------------------------------------------


def naive_statistics(hidden, weight, labels, temperature, softcap):
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = (logits / temperature).log_softmax(-1)
    chosen = logp.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return chosen, -(logp.exp() * logp).sum(-1), (logits / temperature).logsumexp(-1), logits.argmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [3, None])
def test_linear_logprobs_equal_naive_fp64_in_value_and_gradient(temperature, softcap, chunk):
    torch.manual_seed(0)
    hidden = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(33, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(33, (20,))
    labels[::4] = -100
    got = losses.linear_logprobs(
        hidden, weight, labels, temperature=temperature, softcap=softcap, chunk=chunk
    )
    expected = naive_statistics(hidden, weight, labels, temperature, softcap)
    real = labels != -100
    fields = (got.logprobs, got.entropy, got.logsumexp)
    upstream = [torch.randn(20, dtype=torch.float64) * real for _ in range(3)]
    for field, value in zip(fields, expected, strict=False):
        torch.testing.assert_close(field[real], value[real], rtol=1e-10, atol=1e-12)
        assert (field[~real] == 0).all()
    assert torch.equal(got.argmax[real], expected[3][real]) and (got.argmax[~real] == -1).all()
    ours = torch.autograd.grad(
        sum((u * f).sum() for u, f in zip(upstream, fields, strict=True)), (hidden, weight)
    )
    naive = torch.autograd.grad(
        sum((u * f).sum() for u, f in zip(upstream, expected, strict=False)), (hidden, weight)
    )
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_linear_logprobs_pass_gradcheck_and_a_frozen_head_gets_no_gradient():
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 5, -100, 2, 3])

    def statistics(h, w):
        made = losses.linear_logprobs(h, w, labels, temperature=0.8, softcap=3.0, chunk=2)
        return made.logprobs, made.entropy, made.logsumexp

    assert torch.autograd.gradcheck(statistics, (hidden, weight))
    frozen = weight.detach()
    (gradient,) = torch.autograd.grad(statistics(hidden, frozen)[0].sum(), hidden)
    assert gradient.isfinite().all()


def test_linear_logprobs_are_finite_for_large_logits():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    made = losses.linear_logprobs(hidden, weight, torch.tensor([1, 0]))
    assert made.logprobs.tolist() == pytest.approx([-2e4, -2e4]) and made.argmax.tolist() == [0, 1]
    assert made.entropy.abs().max() < 1e-3
    (made.logprobs.sum() + made.entropy.sum()).backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_a_sharded_vocabulary_gives_every_rank_the_whole_result(tmp_path):
    from conftest import ROOT, run_program

    script = tmp_path / "sharded.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, torch.distributed as td\nfrom numerics import losses\n"
        "td.init_process_group('gloo'); r = td.get_rank(); torch.manual_seed(0)\n"
        "h = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)\n"
        "w = torch.randn(21, 8, dtype=torch.float64, requires_grad=True)\n"
        "y = torch.randint(21, (9,)); y[4] = -100\n"
        "part = slice(0, 11) if r == 0 else slice(11, 21)\n"
        "mine = w.detach()[part].clone().requires_grad_()\n"
        "whole = losses.linear_logprobs(h, w, y, temperature=0.7)\n"
        "how = dict(temperature=0.7, group=td.group.WORLD, offset=part.start)\n"
        "got = losses.linear_logprobs(h, mine, y, **how)\n"
        "for name in ('logprobs', 'entropy', 'logsumexp', 'argmax'):\n"
        "    torch.testing.assert_close(getattr(got, name), getattr(whole, name))\n"
        "def loss(m): return (m.logprobs * torch.arange(9)).sum() + m.entropy.sum()\n"
        "a = torch.autograd.grad(loss(whole), (h, w)); b = torch.autograd.grad(loss(got), (h, mine))\n"
        "torch.testing.assert_close(b[0], a[0]); torch.testing.assert_close(b[1], a[1][part])\n"
        "sys.stdout.write(f'same on rank {r}\\n'); sys.stdout.flush()\n"
    )
    done = run_program(script, str(ROOT), ranks=2)
    assert done.stdout.count("same on rank") == 2, done.stderr


@pytest.mark.parametrize("softcap", [False, True])
def test_the_cross_entropy_kernel_reads_no_logit_that_another_warp_may_have_replaced(softcap):
    """Its gradients replace the logits. A row's elements are read by the threads that write them, in
    vectors; a single one, read by all after the last reduction, would race with those writes."""
    program = f"""
import os, re
os.environ.pop("TRITON_INTERPRET", None)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from numerics import losses
names = dict(logits_ptr="*bf16", labels_ptr="*i64", nll_ptr="*fp32", V="i32", softcap="fp32")
constants = dict(SOFTCAP={softcap}, GRADIENT=True, BLOCK=4096)
source = ASTSource(losses._cross_entropy_kernel, names | dict.fromkeys(constants, "constexpr"), constants,
                   {{(i,): [["tt.divisibility", 16]] for i in range(4)}})
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=8))
print(sorted(set(re.findall(r"ld\\.global[.\\w:]*", made.asm["ptx"]))))
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment,
                          cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1500:]
    loads = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert [load for load in loads if ".v" in load] and [load for load in loads if load.endswith("64")]
    assert not [load for load in loads if load.endswith("16") and ".v" not in load], loads
