"""Configs of others in our options: what the reference page names, and nothing dropped in silence."""

import subprocess
import sys

import pytest
import yaml

import migrate
from config import ConfigError, parse_config
from conftest import ROOT
from ebft import Config as EbftConfig
from grpo import Config as GrpoConfig
from sft import Config as SftConfig

RECIPES = {"sft": SftConfig, "grpo": GrpoConfig, "ebft": EbftConfig}
AXOLOTL = """
base_model: Qwen/Qwen3-0.6B
datasets:
  - {path: owner/chats, type: chat_template, split: "train[:90%]", field_messages: turns}
  - {path: ./rows.jsonl, type: alpaca}
  - {path: /data/books, type: completion}
adapter: qlora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: constant_with_warmup
learning_rate: 0.0002
warmup_ratio: 0.1
bf16: auto
flash_attention: true
gradient_checkpointing: offload
logging_steps: 10
saves_per_epoch: 2
val_set_size: 0.05
deepspeed: zero3.json
special_tokens: {pad_token: <|endoftext|>}
wandb_project: mine
"""


def converted(tmp_path, text):
    (tmp_path / "theirs.yaml").write_text(text)
    made = migrate.convert_file(tmp_path / "theirs.yaml", RECIPES)
    (tmp_path / "ours.yaml").write_text(made)
    return made, tmp_path / "ours.yaml"


def test_an_axolotl_config_becomes_one_that_its_recipe_reads(tmp_path):
    text, path = converted(tmp_path, AXOLOTL)
    config = parse_config(SftConfig, ["--config", str(path)])
    assert config.datasets == [
        {"path": "hf://datasets/owner/chats", "type": "chat", "split": "train[:90%]",
         "columns": {"messages": "turns"}},
        {"path": "./rows.jsonl", "type": "instruct"}, {"path": "/data/books", "type": "text"},
    ]  # fmt: skip
    assert (config.adapter, config.load_in_4bit, config.lora_r, config.lora_alpha) == ("lora", True, 16, 32)
    assert (config.optimizer, config.lr_scheduler, config.bf16) == ("adamw_8bit", "constant", True)
    assert config.gradient_checkpointing and config.special_tokens == {"pad_token": "<|endoftext|>"}
    # Everything of theirs is either in ours or said
    for key in yaml.safe_load(AXOLOTL):
        assert key in yaml.safe_load(text) or f"left out  {key}: " in text or key == "lora_target_linear"


def test_a_grpo_block_is_laid_flat_and_finds_its_recipe(tmp_path):
    block = "{use_vllm: true, vllm_server_port: 9000, num_generations: 8, beta: 0.01, "
    text, path = converted(tmp_path, "base_model: x/y\nrl: grpo\ndatasets: [{path: a.jsonl, type: chat}]\n"
                           "micro_batch_size: 8\n"
                           f"trl: {block}reward_funcs: [exact_match], scale_rewards: false}}\n")  # fmt: skip
    config = parse_config(GrpoConfig, ["--config", str(path)])
    assert config.vllm_server_base_url == ["http://127.0.0.1:9000"] and config.rollout_engine == "vllm"
    assert (config.num_generations, config.beta, config.scale_rewards) == (8, 0.01, "none")
    assert "torchrun grpo.py" in text


def test_arguments_of_a_trl_trainer(tmp_path):
    text, path = converted(
        tmp_path,
        "model_name_or_path: a/b\ndataset_name: c/d\nper_device_train_batch_size: 4\nnum_train_epochs: 2\n"
        "optim: adamw_torch_fused\nlr_scheduler_type: cosine\nmax_length: 2048\npacking: true\n"
        "use_peft: true\nneftune_noise_alpha: 5\noptim_args: x\n",
    )
    config = parse_config(SftConfig, ["--config", str(path)])
    assert (config.base_model, config.micro_batch_size, config.num_epochs) == ("a/b", 4, 2)
    assert (config.optimizer, config.sequence_len, config.sample_packing) == ("adamw", 2048, True)
    assert config.datasets[0]["path"] == "hf://datasets/c/d" and config.adapter == "lora"
    assert "left out  neftune_noise_alpha" in text


@pytest.mark.parametrize("text, named", [
    ("- a", "key: value"), ("a: [", "not valid YAML"), ("rl: dpo", "is no recipe"),
])  # fmt: skip
def test_what_is_no_config_is_refused(text, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        converted(tmp_path, text)


def test_a_value_without_counterpart_is_said(tmp_path):
    text, _ = converted(tmp_path, "base_model: x\noptimizer: lion_8bit\n")
    assert "# left out  optimizer: 'lion_8bit' has no counterpart" in text


def test_the_page_is_up_to_date_and_the_command_prints(tmp_path):
    assert (ROOT / "docs" / "migration.md").read_text() == migrate.page()
    (tmp_path / "a.yaml").write_text(AXOLOTL)
    done = subprocess.run([sys.executable, "health.py", "convert", str(tmp_path / "a.yaml")], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["lora_r"] == 16, done.stderr
