"""Blocks: where they begin, how they are sampled, and the pass that trains on them."""

import random

import pytest
import torch
import torch.nn.functional as F

from checkpoints.weights import load_pretrained
from ebft import Config, block_features, energy
from numerics.losses import linear_logprobs
from rollouts import generation
from rollouts.blocks import BlockPass, Document, block_anchors, sample_blocks


def test_blocks_have_their_whole_truth_in_the_document():
    assert block_anchors(20, 4, 8, 3) == [4, 7, 10]  # ⌊(20 − 8 − 4)/3⌋ + 1 = 3
    assert block_anchors(12, 4, 8, 3) == [4] and block_anchors(11, 4, 8, 3) == []


def documents(seed: int, vocab: int = 96) -> list[Document]:
    rng = random.Random(seed)
    made = []
    for i in range(3):
        length = rng.randrange(14, 40)
        ids = [rng.randrange(3, vocab) for _ in range(length)]
        anchors = block_anchors(length, rng.randrange(1, 6), 5, rng.randrange(2, 7))
        made.append(Document(ids, anchors, [True] * length, f"d:{i}"))
    return made


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma2", "gemma3", "qwen3"])
def test_blocks_equal_ordinary_causal_passes_over_prefix_and_rollout(name, seed, references):
    model = load_pretrained(str(references(name)[1]), dtype=torch.float64)
    docs, n, G, temperature = documents(seed), 2, 5, 0.7
    generator = torch.Generator().manual_seed(seed)
    tokens, sampled = sample_blocks(model, docs, n, G, temperature, generator)
    batch = BlockPass.make(docs, tokens)
    hidden, _ = model.hidden_states(batch.input_ids, shared_prompts=batch.shared)
    trained = linear_logprobs(
        hidden[0][batch.sources.flatten()], model.head_weight, tokens.flatten(), temperature=temperature,
        softcap=model.arch.final_softcap,
    ).logprobs.view_as(sampled)
    weights = torch.randn(sampled.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    parameters = list(model.parameters())
    gradients = torch.autograd.grad((weights * trained).sum(), parameters)

    one_by_one, row, total = [], 0, torch.zeros((), dtype=torch.float64)
    for document in docs:
        for anchor in document.anchors:
            for _ in range(n):
                whole = torch.tensor([document.ids[:anchor] + tokens[row].tolist()])
                alone, _ = model.hidden_states(whole)
                assert (alone[0, anchor:] - hidden[0][batch.block_rows[row]]).abs().max() < 1e-9
                logp = (model.logits(alone[0, anchor - 1 : -1]) / temperature).log_softmax(-1)
                logp = logp.gather(-1, tokens[row][:, None])[:, 0]
                one_by_one.append(logp.detach())
                total = total + (weights[row] * logp).sum()
                row += 1
    expected = torch.stack(one_by_one)
    assert row == len(tokens)
    assert (sampled - expected).abs().max() < 1e-9 and (trained - expected).abs().max() < 1e-9
    for a, b in zip(gradients, torch.autograd.grad(total, parameters), strict=True):
        assert (a - b).abs().max() <= 1e-8 * max(1.0, b.abs().max().item())
    # The two mistakes of other code: hidden states one place off, and rows in another order.
    off = linear_logprobs(
        hidden[0][batch.block_rows.flatten()], model.head_weight, tokens.flatten(), temperature=temperature,
        softcap=model.arch.final_softcap,
    ).logprobs.view_as(sampled)
    assert (off - expected).abs().max() > 1e-2
    assert (trained.detach() - expected.flatten().view(G, -1).T).abs().max() > 1e-2


def test_the_sampler_draws_what_an_ordinary_sampler_would_under_the_same_random_numbers(references):
    model = load_pretrained(str(references("qwen3")[1]), dtype=torch.float64)
    docs, G = documents(3), 4
    tokens, _ = sample_blocks(model, docs, 1, G, 0.9, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    rows = [d.ids[:a] for d in docs for a in d.anchors]
    for step in range(G):
        with torch.no_grad():
            logits = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
        drawn = generation.sample((logits / 0.9).log_softmax(-1), generator).tolist()
        assert drawn == tokens[:, step].tolist()
        rows = [[*row, token] for row, token in zip(rows, drawn, strict=True)]


@pytest.mark.parametrize("method", ["last_token", "mean_pooling", "completion_mean", "concat"])
def test_features_equal_those_of_each_sequence_alone(method, references):
    model = load_pretrained(str(references("llama2")[1]), dtype=torch.float32)
    docs, G, n = documents(4), 5, 2
    tokens, _ = sample_blocks(model, docs, n, G, 1.0, torch.Generator().manual_seed(0))
    config = Config(
        base_model="x",
        mode="strided",
        datasets=[{"path": "x"}],
        embed_method=method,
        feature_layers=[0.5, 1.0],
    )
    made, truth = block_features(model, BlockPass.make(docs, tokens), docs, config)

    def alone(ids: list[int], anchor: int) -> torch.Tensor:
        with torch.no_grad():
            states = model.hidden_states(torch.tensor([ids]), layers=(2, 4))[0][0]
        own = states[anchor:]
        pooled = {
            "last_token": own[-1], "mean_pooling": states.mean(0), "completion_mean": own.mean(0),
            "concat": torch.cat([own[1], own[2], own[3]]),
        }
        return pooled[method]

    row = block = 0
    for document in docs:
        for anchor in document.anchors:
            expected = alone(document.ids[: anchor + G], anchor)
            assert (truth[block] - expected).abs().max() < 1e-4
            for _ in range(n):
                expected = alone(document.ids[:anchor] + tokens[row].tolist(), anchor)
                assert (made[row] - expected).abs().max() < 1e-4
                row += 1
            block += 1


def test_feature_layers_equal_transformers_hidden_states(references):
    reference, directory = references("qwen3")
    model = load_pretrained(str(directory), dtype=torch.float32)
    ids = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = reference(ids, output_hidden_states=True).hidden_states
        ours = model.hidden_states(ids, layers=(0, 1, 3, 4))[0]
    expected = torch.cat([F.normalize(theirs[i], dim=-1) for i in (0, 1, 3, 4)], dim=-1)
    assert (ours - expected).abs().max() < 1e-5


def test_energy_rewards_the_sample_whose_features_are_the_truths():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(1, 6, generator=generator)
    samples = torch.randn(1, 4, 6, generator=generator)
    samples[0, 2] = truth[0]
    config = Config(base_model="x", mode="strided", datasets=[{"path": "x"}])
    advantage, facts = energy(samples, truth, config)
    assert advantage[0].argmax() == 2 and facts["cfm_loss"].item() > 0
    exact, facts = energy(truth[:, None].expand(1, 4, 6), truth, config)
    assert exact.abs().max() < 1e-5 and facts["cfm_loss"].item() < 1e-10 and facts["diversity"].item() > 1.99
