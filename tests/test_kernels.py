import pytest
import torch
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


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_shared_prompts_are_the_same_as_a_predicate_with_a_soft_cap(softcap, window):
    """What GPUs take: flex_attention, here without its compiler, and its dense stand-in with gradients."""
    torch.manual_seed(0)
    groups = [(7, [(7, 3), (4, 6), (7, 2)]), (5, []), (9, [(9, 4)])]
    N = sum(n + sum(length for _, length in tails) for n, tails in groups)
    q, k, v = (torch.randn(1, N, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    shared = kernels.SharedPrompts(groups, torch.device("cpu"))
    expected = kernels._shared_prompt_attention(q, k, v, shared, 0.3, window, softcap)
    sees, mask = shared.predicate(window)
    dense = kernels.predicate_attention(q, k, v, sees, scale=0.3, softcap=softcap)
    torch.testing.assert_close(dense, expected)
    upstream = torch.randn_like(dense)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (dense, expected)), strict=True):
        torch.testing.assert_close(a, b)
    flex = torch.nn.attention.flex_attention.flex_attention(
        *(x.detach().transpose(1, 2) for x in (q, k, v)), block_mask=mask, scale=0.3, enable_gqa=True,
        score_mod=None if softcap is None else kernels._capped(softcap),
    )
    torch.testing.assert_close(flex.transpose(1, 2), expected)


def test_block_masks_are_compiled_once():
    counters = torch._dynamo.utils.counters
    kernels.SharedPrompts([(200, [(200, 9)])], torch.device("cpu")).predicate(None)
    compiled = counters["stats"]["unique_graphs"]
    mask = kernels.SharedPrompts([(300, [(300, 9)]), (40, [(20, 3)])], torch.device("cpu")).predicate(None)[1]
    assert compiled > 0 and counters["stats"]["unique_graphs"] <= compiled + 1  # sizes that become symbols
    kernels.SharedPrompts([(90, [(80, 5)] * 9)], torch.device("cpu")).predicate(None)
    assert counters["stats"]["unique_graphs"] <= compiled + 1
    eager = torch.nn.attention.flex_attention.create_block_mask(
        mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu"
    )
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(mask, name), getattr(eager, name))


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
