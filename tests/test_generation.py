"""Sampling: its distribution, its end, its caches, and greedy decoding against transformers."""

import math

import pytest
import torch

from checkpoints.weights import load_pretrained
from conftest import ids
from rollouts import chat, generation
from rollouts.generation import generate, sampling_logprobs


def test_greedy_generation_equals_transformers(references):
    reference, directory = references("llama3")
    model = load_pretrained(str(directory), dtype=torch.float32)
    prompt = ids(4, 9)
    made = generate(model, [prompt.tolist()], max_new_tokens=20, temperature=0)
    expected = reference.generate(
        prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert made.completion_ids[0] == expected[0, 9:].tolist()
    assert made.finish_reasons == ["length"] and made.logprobs[0] == [0.0] * 20


@pytest.mark.parametrize(
    "how", [dict(top_k=3), dict(top_p=0.7), dict(min_p=0.2), dict(top_k=6, top_p=0.8, min_p=0.05), dict()]
)
def test_the_sampled_distribution_is_the_truncated_and_renormalised_one(how):
    torch.manual_seed(0)
    logits = torch.randn(50, 20, dtype=torch.float64) * 2
    got = sampling_logprobs(logits, 0.7, **how).exp()
    for row in range(50):
        p = torch.softmax(logits[row] / 0.7, -1)
        keep = p >= how.get("min_p", 0.0) * p.max()
        if how.get("top_k"):
            order = (p * keep).argsort(descending=True)[: how["top_k"]]
            keep &= torch.isin(torch.arange(20), order)
        q = p * keep / (p * keep).sum()
        if how.get("top_p", 1.0) < 1:
            mass = 0.0
            chosen = []
            for token in q.argsort(descending=True).tolist():
                if mass < how["top_p"]:
                    chosen.append(token)
                mass += q[token].item()
            q = torch.where(torch.isin(torch.arange(20), torch.tensor(chosen)), q, 0.0)
            q = q / q.sum()
        torch.testing.assert_close(got[row], q)


def test_draws_follow_the_distribution_and_never_leave_its_support():
    torch.manual_seed(0)
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    draws = generation.sample(p.log().expand(20000, -1), torch.Generator().manual_seed(1))
    counts = torch.bincount(draws, minlength=6) / 20000
    assert (counts[p == 0] == 0).all()
    assert (counts - p).abs().max() < 4 * math.sqrt(0.25 / 20000)  # four standard errors


def test_generation_is_reproducible_shares_a_prefill_and_ends_at_stop_tokens(references):
    _, directory = references("qwen3")
    model = load_pretrained(str(directory), dtype=torch.float32)
    prompts = [ids(5, 11).tolist(), ids(6, 4).tolist()]
    passes = []
    original = model.hidden_states

    def counted(input_ids, **kwargs):
        passes.append(tuple(input_ids.shape))
        return original(input_ids, **kwargs)

    model.hidden_states = counted
    how = dict(max_new_tokens=12, num_return_sequences=3, stop_token_ids=range(3, 20))
    one = generate(model, prompts, generator=torch.Generator().manual_seed(3), **how)
    assert passes[0] == (1, 15)  # both prompts once, packed, for six completions
    assert passes[-1][0] < 6  # finished sequences have left
    two = generate(model, prompts, generator=torch.Generator().manual_seed(3), **how)
    assert one == two and len(one.completion_ids) == 6
    for completion, reason in zip(one.completion_ids, one.finish_reasons, strict=True):
        stops = [token in range(3, 20) for token in completion]
        assert not any(stops[:-1]) and stops[-1] == (reason == "stop")
        assert reason == "stop" or len(completion) == 12
    for bad in (
        dict(max_new_tokens=0),
        dict(max_new_tokens=1, top_p=0.0),
        dict(max_new_tokens=1, temperature=-1),
    ):
        with pytest.raises(ValueError):
            generate(model, prompts, **bad)
    with pytest.raises(ValueError):
        generate(model, [[]], max_new_tokens=1)


def test_a_cache_that_outgrows_its_room_goes_on(references):
    _, directory = references("qwen3")
    model = load_pretrained(str(directory), dtype=torch.float32)
    prompt = [5, 6, 7]
    made = generate(model, [prompt], max_new_tokens=150, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model(torch.tensor([prompt + made.completion_ids[0]]))[0].log_softmax(-1)
    expected = full[2:-1].gather(-1, torch.tensor(made.completion_ids[0])[:, None])[:, 0]
    assert (expected - torch.tensor(made.logprobs[0])).abs().max() < 1e-5


def test_a_new_conversation_forgets_the_one_before(small_checkpoint, monkeypatch):
    said, prompts = iter(["Hello there", "/new", "Hello there", "Hello there", ""]), []
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    monkeypatch.setattr(
        chat, "_stream_reply", lambda _, __, prompt, **___: prompts.append(prompt) or "Hi"
    )
    chat.chat([str(small_checkpoint[0])])
    first, again, longer = prompts
    assert first == again and longer[: len(first)] == first and len(longer) > 2 * len(first)


def test_samples_follow_their_distribution_and_never_what_has_no_probability():
    logprobs = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 1.0, 0.0, 0.0]]).log()
    generator = torch.Generator().manual_seed(3)
    drawn = torch.stack([generation.sample(logprobs, generator) for _ in range(20_000)])
    share = torch.bincount(drawn[:, 0], minlength=4) / len(drawn)
    # Four standard errors of a share of 0.5
    assert (share - logprobs[0].exp()).abs().max() < 4 * (0.25 / len(drawn)) ** 0.5
    assert share[3] == 0 and (drawn[:, 1] == 1).all()
