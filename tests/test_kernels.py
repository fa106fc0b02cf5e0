import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels


def naive_attention(q, k, v, document_ids, scale, window=None, softcap=None):
    """Dense scores and a mask written out from the definition."""
    T, H = q.shape[1:3]
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    visible = (j <= i) & (document_ids[:, :, None] == document_ids[:, None, :])
    if window is not None:
        visible &= j > i - window
    return torch.einsum("bhqk,bkhe->bqhe", scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("lengths", [[[24]], [[1, 1, 22], [24]], [[9, 2, 13], [3, 3, 18]]])
def test_attention_over_documents_equals_a_dense_mask_in_value_and_gradient(window, softcap, lengths):
    torch.manual_seed(0)
    B, T = len(lengths), 24
    document_ids = torch.stack(
        [torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths]
    )
    q, k, v = (torch.randn(B, T, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    how = dict(scale=0.3, window=window, softcap=softcap)
    expected = naive_attention(q, k, v, document_ids, **how)
    got = kernels.attention(q, k, v, documents=kernels.Documents(document_ids), **how)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_attention_in_blocks_of_queries_equals_one_block(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    results = []
    for block in (64, 7):
        monkeypatch.setattr(kernels, "QUERY_BLOCK", block)
        out = kernels.attention(q, k, v, scale=0.3, window=11, softcap=3.0)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_padding_gets_zeros_and_gives_no_gradient():
    torch.manual_seed(0)
    document_ids = torch.tensor([[0, 0, 0, 1, 1, -1, -1]])
    q, k, v = (torch.randn(1, 7, 2, 4, requires_grad=True) for _ in range(3))
    out = kernels.attention(q, k, v, scale=1.0, documents=kernels.Documents(document_ids))
    assert (out[0, 5:] == 0).all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (gradient[0, 5:] == 0).all()


def test_attention_under_a_predicate_equals_the_mask_written_out():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 12, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])

    def visible(b, h, i, j):
        return (ids[b, i] == ids[b, j]) & (j <= i)

    got = kernels.predicate_attention(q, k, v, visible, scale=0.3)
    expected = naive_attention(q, k, v, ids, 0.3)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3))
def test_every_real_token_has_exactly_one_slot(rows):
    T = max(sum(row) for row in rows)
    ids = torch.full((len(rows), T), -1)
    for b, row in enumerate(rows):
        at = 0
        for i, n in enumerate(row):
            ids[b, at : at + n] = i
            at += n
    documents = kernels.Documents(ids)
    assert torch.equal(documents.token_of_slot[documents.slots], documents.tokens)
    assert torch.equal(documents.tokens, (ids.flatten() >= 0).nonzero().flatten())
    assert sum(n * length for n, length in documents.buckets) == len(documents.token_of_slot)
    assert sorted(documents.lengths[ids >= 0].tolist()) == sorted(
        n for row in rows for n in row for _ in range(n)
    )


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
    got = kernels.linear_cross_entropy(hidden, weight, labels, softcap=softcap, chunk=chunk)
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
        return kernels.linear_cross_entropy(hidden, weight, labels, softcap=3.0, chunk=4)

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
    loss = kernels.linear_cross_entropy(hidden, weight, torch.tensor([1, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(4e4)
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    nothing = kernels.linear_cross_entropy(hidden, weight, torch.tensor([-100, -100]))
    nothing.backward()
    assert nothing.item() == 0


def test_a_frozen_head_gets_no_gradient_and_bf16_sums_are_kept_in_fp32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4096, 8), torch.randn(64, 8)
    labels = torch.randint(64, (4096,))
    exact = naive_loss(hidden.bfloat16().double(), weight.bfloat16().double(), labels)
    h = hidden.bfloat16().requires_grad_()
    loss = kernels.linear_cross_entropy(h, weight.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert abs(loss.item() / exact.item() - 1) < 2e-3
    loss.backward()
    assert h.grad is not None


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_decoding_equals_the_last_row_of_attention(softcap):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, heads, 8, dtype=torch.float64) for heads in (6, 2, 2))
    visible = torch.ones(2, 9, dtype=torch.bool)
    visible[1, :4] = False
    document_ids = torch.zeros(2, 9, dtype=torch.long)
    document_ids[1, :4] = 1
    expected = naive_attention(q, k, v, document_ids, 0.3, softcap=softcap)[:, -1]
    got = kernels.decode_attention(
        q[:, -1], k.transpose(1, 2), v.transpose(1, 2), visible, scale=0.3, softcap=softcap
    )
    torch.testing.assert_close(got, expected)


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
    got = kernels.linear_logprobs(
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
        made = kernels.linear_logprobs(h, w, labels, temperature=0.8, softcap=3.0, chunk=2)
        return made.logprobs, made.entropy, made.logsumexp

    assert torch.autograd.gradcheck(statistics, (hidden, weight))
    frozen = weight.detach()
    (gradient,) = torch.autograd.grad(statistics(hidden, frozen)[0].sum(), hidden)
    assert gradient.isfinite().all()


def test_linear_logprobs_are_finite_for_large_logits():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    made = kernels.linear_logprobs(hidden, weight, torch.tensor([1, 0]))
    assert made.logprobs.tolist() == pytest.approx([-2e4, -2e4]) and made.argmax.tolist() == [0, 1]
    assert made.entropy.abs().max() < 1e-3
    (made.logprobs.sum() + made.entropy.sum()).backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_a_sharded_vocabulary_gives_every_rank_the_whole_result(tmp_path):
    from conftest import ROOT, run_program

    script = tmp_path / "sharded.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, torch.distributed as td, kernels\n"
        "td.init_process_group('gloo'); r = td.get_rank(); torch.manual_seed(0)\n"
        "h = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)\n"
        "w = torch.randn(21, 8, dtype=torch.float64, requires_grad=True)\n"
        "y = torch.randint(21, (9,)); y[4] = -100\n"
        "part = slice(0, 11) if r == 0 else slice(11, 21)\n"
        "mine = w.detach()[part].clone().requires_grad_()\n"
        "whole = kernels.linear_logprobs(h, w, y, temperature=0.7)\n"
        "how = dict(temperature=0.7, group=td.group.WORLD, offset=part.start)\n"
        "got = kernels.linear_logprobs(h, mine, y, **how)\n"
        "for name in ('logprobs', 'entropy', 'logsumexp', 'argmax'):\n"
        "    torch.testing.assert_close(getattr(got, name), getattr(whole, name))\n"
        "def loss(m): return (m.logprobs * torch.arange(9)).sum() + m.entropy.sum()\n"
        "a = torch.autograd.grad(loss(whole), (h, w)); b = torch.autograd.grad(loss(got), (h, mine))\n"
        "torch.testing.assert_close(b[0], a[0]); torch.testing.assert_close(b[1], a[1][part])\n"
        "print('same on rank', r, flush=True)\n"
    )
    done = run_program(script, str(ROOT), ranks=2)
    assert done.stdout.count("same on rank") == 2, done.stderr
