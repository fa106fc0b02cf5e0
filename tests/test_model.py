import json

import pytest
import torch

import model as ballast
from checkpoints.adapters import apply_lora
from checkpoints.families import Architecture
from checkpoints.weights import load_pretrained, save_pretrained
from conftest import FAMILIES, ids
from rollouts.generation import generate

T = 40


# ------------------------------------------------------------------------------------------------------------
# Against transformers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers_and_a_saved_copy_goes_back(name, references, tmp_path):
    import transformers

    reference, directory = references(name)
    model = load_pretrained(str(directory), dtype=torch.float32)
    expected = reference(ids()).logits
    assert (model(ids()) - expected).abs().max() < 1e-4

    save_pretrained(model, tmp_path)
    attention = reference.config._attn_implementation
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation=attention
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (again.eval()(ids()).logits - expected).abs().max() == 0


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_packed_padded_and_separate_documents_have_the_same_logits(name, references):
    reference, directory = references(name)
    model = load_pretrained(str(directory), dtype=torch.float32)
    lengths = [5, 1, 20, 14]
    documents = [ids(1, 1, n) for n in lengths]
    separate = [reference(document).logits[0] for document in documents]
    packed_ids = torch.cat(documents, 1)
    document_ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model(packed_ids, document_ids=document_ids)[0]
    assert (packed - torch.cat(separate)).abs().max() < 1e-4

    padded_ids = torch.zeros(4, 20, dtype=torch.long)
    padding = torch.full((4, 20), -1)
    for i, document in enumerate(documents):
        padded_ids[i, : lengths[i]] = document
        padding[i, : lengths[i]] = 0
    padded = model(padded_ids, document_ids=padding)
    for i, n in enumerate(lengths):
        assert (padded[i, :n] - separate[i]).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_cached_generation_agrees_with_the_full_forward(name, references):
    _, directory = references(name)
    model = load_pretrained(str(directory), dtype=torch.float32)
    prompts = [ids(2, 20).tolist(), ids(3, 7).tolist(), [5]]
    made = generate(
        model, prompts, max_new_tokens=15, num_return_sequences=2, generator=torch.Generator().manual_seed(0),
        stop_token_ids=[7, 8, 9],
    )
    for i, (completion, logprobs) in enumerate(zip(made.completion_ids, made.logprobs, strict=True)):
        prompt = prompts[i // 2]
        for j, (token, logprob) in enumerate(zip(completion, logprobs, strict=True)):
            full = model(torch.tensor([prompt + completion[:j]]))[0, -1].log_softmax(-1)
            assert abs(full[token].item() - logprob) < 1e-5


OLD_DIALECT = {
    "llama3": {"rope_theta": 10000.0, "rope_scaling": {k: v for k,
    v in FAMILIES["llama3"][1]["rope_parameters"].items() if k != "rope_theta"}},
    "llama-linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-dynamic": {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "qwen3-yarn": {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
    "original_max_position_embeddings": 16}},
    "gemma3": {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
    "gemma2": {"rope_theta": 10000.0},
    "qwen2": {"rope_theta": 10000.0},
    "smollm3": {"rope_theta": 2000000.0},
}


@pytest.mark.parametrize("name", OLD_DIALECT)
def test_the_older_dialect_of_config_json_means_the_same(name, references, tmp_path):
    """transformers 4 writes rope_theta and rope_scaling, and leaves layer_types out."""
    _, directory = references(name)
    raw = json.loads((directory / "config.json").read_text())
    old = {
        k: v
        for k, v in raw.items()
        if k not in ("rope_parameters", "layer_types", "dtype", "_sliding_window_pattern")
    }
    old |= {"torch_dtype": "float32", **OLD_DIALECT[name]}
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    with torch.no_grad():
        new_logits = load_pretrained(str(directory), dtype=torch.float32)(ids())
        assert (load_pretrained(str(tmp_path), dtype=torch.float32)(ids()) - new_logits).abs().max() == 0


def test_the_load_balancing_loss_equals_transformers(references):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    _, directory = references("mixtral")
    model = load_pretrained(str(directory), dtype=torch.float32)
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, 25:] = 0
    _, router_logits = model.hidden_states(ids())
    expected = load_balancing_loss_func(tuple(router_logits), 4, 2, mask)
    got = ballast.load_balancing_loss(router_logits, model.arch, mask.flatten() == 1)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(reentrant, references):
    _, directory = references("mixtral")
    model = load_pretrained(str(directory), dtype=torch.float64).train()
    gradients = []
    for checkpointing in (None, reentrant):
        for block in model.layers:
            block.checkpointing = checkpointing
        model.zero_grad()
        hidden, router_logits = model.hidden_states(ids())
        (hidden.square().sum() + ballast.load_balancing_loss(router_logits, model.arch)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_frozen_weight_costs_four_flops_a_token_and_a_trained_one_six():
    arch = Architecture.from_config({
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True, "rope_theta": 1e4,
        "max_position_embeddings": 64, "attention_bias": False,
    })
    attention = 6 * 1 * 4 * 16 * 10  # documents of 10 tokens
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128  # q, k and v, o, the three of the MLP
    model = ballast.Transformer(arch)
    assert model.flops_per_token(10) == 6 * (layer + 100 * 64) + attention
    apply_lora(model, ballast.ModelOptions(adapter="lora", lora_r=4))
    lora = 4 * sum(sum(shape) for shape in [(64, 64), (64, 32), (64, 32), (64, 64)] + [(64, 128)] * 3)
    assert model.flops_per_token(10) == 4 * (layer + 100 * 64) + 6 * lora + attention
