"""Every Triton kernel in Triton's interpreter, on the CPU. Run by test_low_precision.py, or by hand:

    TRITON_INTERPRET=1 KERNELS=triton pytest tests/interpreted.py

bf16 inputs of tl.dot are wrong in the interpreter, hence fp32 here; its cast to e4m3 rounds some numbers to
the other neighbour, hence a tolerance of one step.
"""

import os
import sys
from pathlib import Path

assert os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("KERNELS") == "triton"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from test_kernels import naive_attention  # noqa: E402
from test_low_precision import fp8_step  # noqa: E402

import kernels  # noqa: E402
from numerics import losses, low_precision  # noqa: E402

SHAPES = [(1, 1), (3, 128), (17, 300), (130, 257)]


def hard(shape, seed=0):
    """Ordinary numbers, an all-zero tile, a huge outlier, denormals, NaN and infinities."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[0, : min(128, shape[1])] = 0
    if shape[0] > 2 and shape[1] > 20:
        x[1, 3], x[1, 4], x[1, 5] = float("nan"), float("inf"), -float("inf")
        x[2, 7] = 1e30
        x[-1, :10] = 1e-41
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_fp8_quantisation(shape, power_of_two, blocks):
    x = hard(shape)
    reference = (
        low_precision.quantize_fp8_blocks_reference if blocks else low_precision.quantize_fp8_reference
    )
    q, scale = (low_precision.quantize_fp8_blocks if blocks else low_precision.quantize_fp8)(x, power_of_two)
    expected_q, expected_scale = reference(x, power_of_two)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    nan = expected_q.float().isnan()
    assert torch.equal(q.float().isnan(), nan)
    # Left out: the interpreter's cast does not carry into the exponent, and mangles what is 0 in e4m3.
    magnitude = expected_q.float().abs()
    sound = ~nan & (torch.frexp(magnitude).mantissa != 0.5) & (magnitude > 2.0**-6)
    assert sound.any() or x.numel() == 1
    difference = (q.float() - expected_q.float()).abs()[sound]
    assert (difference <= fp8_step(expected_q.float()[sound]) * 1.001).all()
    transposed = low_precision.quantize_fp8(x.T)[1]
    torch.testing.assert_close(transposed, low_precision.quantize_fp8_reference(x.T)[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (20, 130, 300), (130, 40, 128)])
@pytest.mark.parametrize("b_rows", [1, 128])
def test_fp8_product(M, N, K, b_rows):
    torch.manual_seed(0)
    a, a_scale = low_precision.quantize_fp8_reference(torch.randn(M, K))
    make = (
        low_precision.quantize_fp8_reference if b_rows == 1 else low_precision.quantize_fp8_blocks_reference
    )
    b, b_scale = make(torch.randn(N, K))
    exact = (
        low_precision.dequantize_fp8(a, a_scale).double()
        @ low_precision.dequantize_fp8(b, b_scale, b_rows).double().T
    )
    got = low_precision.fp8_matmul(a, a_scale, b, b_scale, b_rows)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


def test_fp8_linear_forward_and_backward():
    torch.manual_seed(0)
    x, w = torch.randn(2, 20, 140, requires_grad=True), torch.randn(70, 140, requires_grad=True)
    y = low_precision.fp8_linear(x, w)
    exact = x @ w.T
    g = torch.randn_like(exact)
    for a, b in zip(
        (y, *torch.autograd.grad(y, (x, w), g)), (exact, *torch.autograd.grad(exact, (x, w), g)), strict=True
    ):
        assert (a - b).norm() / b.norm() < 0.15  # some casts are a factor 2 off in the interpreter


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("M, N, K", [(1, 3, 64), (70, 130, 192)])
def test_frozen_products(kind, M, N, K):
    torch.manual_seed(0)
    stored = low_precision.quantize(kind, torch.randn(N, K))
    dense = low_precision.dequantize(kind, stored).double()
    x = torch.randn(M, K, requires_grad=True)
    y = low_precision.frozen_linear(x, kind, stored)
    torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=1e-4, atol=1e-4)
    g = torch.randn(M, N)
    (dx,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(dx.double(), g.double() @ dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("N, V, D", [(1, 3, 5), (70, 200, 72)])
@pytest.mark.parametrize("softcap, temperature", [(None, 1.0), (4.0, 0.7)])
def test_linear_logprobs(N, V, D, softcap, temperature):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    hidden[0] *= 1e3
    labels = torch.randint(V, (N,))
    got = losses.linear_logprobs(hidden, weight, labels, temperature=temperature, softcap=softcap)
    exact = losses.linear_logprobs(
        hidden.double(), weight.double(), labels, temperature=temperature, softcap=softcap
    )
    for name in ("logprobs", "entropy", "logsumexp"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=1e-4, atol=2e-4)
    assert torch.equal(got.argmax, exact.argmax)


@pytest.mark.parametrize("lengths", [[[70]], [[1, 1, 40, 28], [70]], [[33, 37], [9, 2, 13]]])
@pytest.mark.parametrize("window, softcap", [(None, None), (7, None), (None, 3.0), (20, 3.0)])
@pytest.mark.parametrize("H, K, E", [(2, 1, 32), (2, 2, 20)])
def test_attention_forward_and_backward(lengths, window, softcap, H, K, E):
    torch.manual_seed(0)
    B, T = len(lengths), 70
    ids = torch.full((B, T), -1)
    for b, row in enumerate(lengths):
        ids[b, : sum(row)] = torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row))
    q, k, v = (torch.randn(B, T, heads, E, requires_grad=True) for heads in (H, K, K))
    how = dict(scale=0.3, window=window, softcap=softcap)
    real = ids >= 0
    unique = torch.where(real, ids, 1000 + torch.arange(T))  # padding: documents of their own, then left out
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = naive_attention(*exact, unique, **how) * real[..., None, None]
    got = kernels.attention(q, k, v, documents=kernels.Documents(ids), **how)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    g = torch.randn(got.shape)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(expected, exact, g.double()), strict=True
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    if lengths == [[70]]:
        torch.testing.assert_close(kernels.attention(q, k, v, **how), got)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_linear_cross_entropy(softcap):
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 16), torch.randn(5000, 16)
    hidden[3] *= 1e3
    labels = torch.randint(5000, (20,))
    labels[5] = -100
    got, exact = [], []
    for dtype, results in ((torch.float32, got), (torch.float64, exact)):
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        loss = losses.linear_cross_entropy(h, w, labels, softcap=softcap, chunk=7)
        results += [loss, *torch.autograd.grad(loss, (h, w))]
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-4)


def compare(function, inputs, tolerance=1e-4):
    """Value and gradients of a Triton function against the same call in fp64, which takes the torch form."""
    results = []
    for dtype in (torch.float32, torch.float64):
        given = [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs]
        out = function(*given)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([out, *torch.autograd.grad(out, [x for x in given if x.requires_grad], upstream)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 1), (300, 20), (2, 3, 130)])
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(shape, plus_one):
    torch.manual_seed(0)
    compare(
        lambda x, w: kernels.rms_norm(x, w, 1e-6, plus_one), [torch.randn(shape) * 3, torch.randn(shape[-1])]
    )


@pytest.mark.parametrize("size", [1, 1500])
def test_swiglu(size):
    torch.manual_seed(0)
    compare(kernels.swiglu, [torch.randn(size) * 4, torch.randn(size)])


@pytest.mark.parametrize("E, half", [(16, 8), (20, 6), (64, 8)])
def test_rotary_embedding(E, half):
    torch.manual_seed(0)
    angles = torch.randn(2, 5, 1, half)
    compare(
        lambda x: kernels.rotate(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype)),
        [torch.randn(2, 5, 3, E)],
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("H, K, E, S", [(6, 2, 20, 9), (4, 4, 32, 600)])
def test_decoding(softcap, H, K, E, S):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, H, E),
        torch.randn(2, K, S + 7, E)[:, :, :S],
        torch.randn(2, K, S + 7, E)[:, :, :S],
    )
    visible = torch.ones(2, S, dtype=torch.bool)
    visible[1, : S // 2] = False
    got = kernels.decode_attention(q, k, v, visible, scale=0.3, softcap=softcap)
    exact = kernels.decode_attention(q.double(), k.double(), v.double(), visible, scale=0.3, softcap=softcap)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)
