"""Configs whose arithmetic is not what a table row says are refused by name."""

import dataclasses
import json
import logging

import pytest
import torch

from checkpoints.families import Architecture
from checkpoints.weights import load_pretrained, save_pretrained
from conftest import ROOT, ids
from run.config import CheckpointError


def _changed(references, tmp_path, name="llama2", **changes):
    _, directory = references(name)
    raw = json.loads((directory / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if not (tmp_path / "model.safetensors").exists():
        (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    return str(tmp_path)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"attention_sinks": 4}, "attention_sinks"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_act": "relu2"}, "relu2"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "twist": 2}}, "twist"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"intermediate_size": 64}, "mlp.gate_proj.weight"),
        ({"num_hidden_layers": 5}, "model.layers.4"),
        ({"num_hidden_layers": 3}, "model.layers.3"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', not a number"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True, not a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not a number"),
        ({"rope_theta": "10000", "rope_parameters": None}, "rope_theta is '10000', not a number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2", "rope_theta": 1e4}}, "factor is '2'"),
        ({"rope_parameters": "default"}, "rope_parameters is 'default', not an object"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', neither true nor false"),
        ({"attention_bias": 1}, "attention_bias is 1, neither true nor false"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4', not a whole number"),
        ({"max_position_embeddings": 64.0}, "max_position_embeddings is 64.0, not a whole number"),
        ({"initializer_range": "0.02"}, "initializer_range is '0.02', not a number"),
        ({"hidden_act": ["silu"]}, "hidden_act is .*, not the name of an activation"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', not a list"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention', not a list"),
        ({"vocab_size": 130}, r"embed_tokens.weight has shape \[96, .*config.json says \[130"),
        ({"vocab_size": 90}, r"embed_tokens.weight has shape \[96, .*config.json says \[90"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(changes, named, references, tmp_path):
    with pytest.raises(CheckpointError, match=named) as caught:
        load_pretrained(_changed(references, tmp_path, **changes), dtype=torch.float32)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "name, scaling, parameters",
    [
        ("llama2", {"type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 5e3}),
        ("llama2", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 777.0}, {"rope_theta": 1e4}),
        ("qwen3", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
         {"rope_theta": 5e3}),
        ("gemma3", {"rope_type": "linear", "factor": 8.0}, {
            "full_attention": {"rope_type": "default", "rope_theta": 2e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}),
    ],
)
def test_rope_scaling_beside_rope_parameters_is_read_as_transformers_reads_it(
    name, scaling, parameters, references, tmp_path, caplog, monkeypatch
):
    import transformers

    monkeypatch.setattr(logging.getLogger("ballast"), "propagate", True)
    directory = _changed(references, tmp_path, name, rope_scaling=scaling, rope_parameters=parameters)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = load_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        assert (model(ids()) - reference(ids()).logits).abs().max() < 1e-4
    assert "contradict each other: rope_scaling is followed" in caplog.text
    save_pretrained(model, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (again(ids()).logits - reference(ids()).logits).abs().max() < 1e-6


@pytest.mark.parametrize("name, changes", [
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {
        "rope_type": "default"}}}),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}),
    ("mistral", {"sliding_window": None}), ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
])
def test_what_is_left_out_or_null_means_what_it_means_to_transformers(name, changes, references, tmp_path):
    import transformers

    directory = _changed(references, tmp_path, name, **changes)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = load_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        assert (model(ids()) - reference(ids()).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name, changes, named", [
    ("gemma2", {"sliding_window_pattern": 3, "layer_types": None}, "sliding_window_pattern"),
    ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama2", {"model_type": "mistral"}, "model_type means MistralForCausalLM"),
    ("llama2", {"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4 is not supported"),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.8}}, "attn_factor"),
])
def test_contradictions_of_published_configs_are_refused_by_name(name, changes, named, references, tmp_path):
    with pytest.raises(CheckpointError, match=named):
        load_pretrained(_changed(references, tmp_path, name, **changes), dtype=torch.float32)


def test_a_rope_field_can_be_vouched_for(references):
    raw = json.loads((references("qwen3")[1] / "config.json").read_text())
    raw["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.8, "rope_theta": 1e4}
    assert Architecture.from_config(raw, ignore=["attn_factor"]).ropes["all"].kind == "yarn"


def test_both_names_of_the_dtype_are_saved(references, tmp_path):
    directory = _changed(references, tmp_path, torch_dtype="float16", dtype="float16")
    model = load_pretrained(directory, dtype=torch.float32)
    save_pretrained(model, tmp_path / "saved", dtype=torch.bfloat16)
    raw = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"


def test_rope_fields_that_say_the_same_are_no_contradiction(references, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ballast"), "propagate", True)
    same = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    load_pretrained(
        _changed(references, tmp_path, rope_scaling=dict(same), rope_parameters=same), dtype=torch.float32
    )
    assert "contradict" not in caplog.text


def test_two_names_for_the_number_of_experts_must_agree(references):
    raw = json.loads((references("qwen3-moe")[1] / "config.json").read_text())
    number = raw.get("num_experts") or raw["num_local_experts"]
    Architecture.from_config(raw | {"num_experts": number, "num_local_experts": number})
    with pytest.raises(CheckpointError, match="the same number by two names"):
        Architecture.from_config(raw | {"num_experts": number, "num_local_experts": number + 1})


def test_switches_that_are_off_and_fields_that_the_user_vouches_for_are_accepted(references, tmp_path):
    load_pretrained(
        _changed(references, tmp_path, some_feature=False, other=None, attention_dropout=0.0),
        dtype=torch.float32,
    )
    raw = json.loads((tmp_path / "config.json").read_text()) | {"training_note": "x"}
    with pytest.raises(CheckpointError, match="training_note"):
        Architecture.from_config(raw)
    Architecture.from_config(raw, ignore=["training_note"])


# ------------------------------------------------------------------------------------------------------------
# The config.json files of published checkpoints
# ------------------------------------------------------------------------------------------------------------

REAL = json.loads((ROOT / "tests" / "real_configs.json").read_text())
SMALL = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    moe_intermediate_size=24, num_experts=6, num_local_experts=6, num_experts_per_tok=2,
)


def shrunk(raw: dict) -> dict:
    """The file with every field that it has, but small: what the fields mean is left as it is."""
    small = {key: SMALL.get(key, value) for key, value in raw.items()}
    if raw["num_attention_heads"] == raw.get("num_key_value_heads"):
        small["num_key_value_heads"] = 4
    layers = min(raw["num_hidden_layers"], 7)
    small |= {"num_hidden_layers": layers, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for key in ("layer_types", "no_rope_layers"):
        if raw.get(key):
            small[key] = raw[key][:layers]
    for key in ("sliding_window", "sliding_window_size"):
        if raw.get(key):
            small[key] = 6
    if raw.get("head_dim"):
        small["head_dim"] = 16
    if raw.get("max_window_layers"):
        small["max_window_layers"] = raw["max_window_layers"] * layers // raw["num_hidden_layers"]
    small.pop("quantization_config", None)
    return small


@pytest.mark.parametrize("name", REAL)
def test_the_file_of_a_published_checkpoint_is_read_and_computes_what_transformers_computes(name, tmp_path):
    import transformers

    Architecture.from_config(REAL[name], name)
    raw = shrunk(REAL[name])
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = "float32"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    attention = "eager" if raw["model_type"] == "gemma2" else "sdpa"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.eval().float()
    for parameter in model.parameters():
        of_norm = parameter.dim() == 1
        mean = float(of_norm and "gemma" not in raw["model_type"])
        torch.nn.init.normal_(parameter, mean=mean, std=0.1 if of_norm else 0.2)
    model.tie_weights()
    model.save_pretrained(tmp_path)  # whose config.json is transformers' own: the published one again
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = load_pretrained(str(tmp_path), dtype=torch.float32)
    with torch.no_grad():
        assert (ours(ids()) - model(ids()).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name, field, value", [
    ("Llama-3.1-8B", "use_bidirectional_attention", True),
    ("Gemma-3-1b-it", "use_bidirectional_attention", True),
    ("Gemma-2-9b (sliding_window_size)", "sliding_window_size", 1024), ("Llama-2-7b", "use_qk_norm", True),
    ("Mixtral-8x7B-v0.1", "moe_frequency", 2), ("Llama-2-7b", "add_cross_attention", True),
    ("Qwen2-7B-Instruct", "use_mrope", True), ("Llama-2-7b", "rope_interleaved", True),
    ("Llama-3-8B", "draft_vocab_size", 32000),
])
def test_a_field_that_may_change_the_arithmetic_is_still_refused(name, field, value):
    with pytest.raises(CheckpointError, match=f"field {field}="):
        Architecture.from_config({**REAL[name], field: value})


@pytest.mark.parametrize("field, value", [
    ("_model_name_or_path", "a/b"), ("_commit_hash", "4e2"), ("_anything", {"a": 1}), ("use_bfloat16", True),
    ("gradient_checkpointing", True), ("max_sequence_length", 2048), ("loss_type", "ForCausalLMLoss"),
    ("tokenizer_name", "a/b"), ("is_decoder", True), ("model_max_length", 4096), ("output_attentions", True),
])
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Gemma-3-1b-it", "Qwen3-30B-A3B"])
def test_leftovers_of_training_libraries_are_no_reason_to_refuse(name, field, value):
    before, after = (Architecture.from_config(raw) for raw in (REAL[name], {**REAL[name], field: value}))
    assert dataclasses.replace(after, raw={}) == dataclasses.replace(before, raw={})


def test_an_underscore_field_that_a_family_reads_still_counts():
    raw = {
        k: v for k, v in REAL["Gemma-3-1b-it"].items() if k not in ("layer_types", "sliding_window_pattern")
    }
    two, six = (Architecture.from_config({**raw, "_sliding_window_pattern": n}).windows for n in (2, 6))
    assert two != six
