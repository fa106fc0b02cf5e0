"""Configs whose arithmetic is not what a table row says are refused by name."""

import json

import pytest
import torch

from config import CheckpointError
from families import Architecture
from weights import load_pretrained


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
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(changes, named, references, tmp_path):
    with pytest.raises(CheckpointError, match=named) as caught:
        load_pretrained(_changed(references, tmp_path, **changes), dtype=torch.float32)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_switches_that_are_off_and_fields_that_the_user_vouches_for_are_accepted(references, tmp_path):
    load_pretrained(
        _changed(references, tmp_path, some_feature=False, other=None, attention_dropout=0.0),
        dtype=torch.float32,
    )
    raw = json.loads((tmp_path / "config.json").read_text()) | {"training_note": "x"}
    with pytest.raises(CheckpointError, match="training_note"):
        Architecture.from_config(raw)
    Architecture.from_config(raw, ignore=["training_note"])
