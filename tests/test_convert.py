"""Configs of others in our options: what the reference page names, and nothing dropped in silence."""

import dataclasses
import subprocess
import sys

import pytest
import yaml

from conftest import ROOT, run_program
from ebft import Config as EbftConfig
from grpo import Config as GrpoConfig
from health import convert
from run.config import ConfigError, parse_config
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
    made = convert.convert_file(tmp_path / "theirs.yaml", RECIPES)
    (tmp_path / "ours.yaml").write_text(made)
    recipe = made.split("torchrun ")[1].split(".py")[0]
    return made, parse_config(RECIPES[recipe], ["--config", str(tmp_path / "ours.yaml")])


def comments(text, kind):
    """option → what the comments of a kind say of it."""
    lines = [
        line.removeprefix(f"# {kind:<12}") for line in text.splitlines() if line.startswith(f"# {kind:<12}")
    ]
    return {name.strip(): line for line in lines for name in line.split(":")[0].split(",")}


def test_an_axolotl_config_becomes_one_that_its_recipe_reads(tmp_path):
    text, config = converted(tmp_path, AXOLOTL)
    assert config.datasets == [
        {"path": "hf://datasets/owner/chats", "type": "chat", "split": "train[:90%]",
         "columns": {"messages": "turns"}},
        {"path": "./rows.jsonl", "type": "instruct"}, {"path": "/data/books", "type": "text"},
    ]
    assert (config.adapter, config.load_in_4bit, config.lora_r, config.lora_alpha) == ("lora", True, 16, 32)
    assert (config.optimizer, config.lr_scheduler, config.bf16) == ("adamw_8bit", "constant", True)
    assert config.gradient_checkpointing and config.special_tokens == {"pad_token": "<|endoftext|>"}
    assert (config.saves_per_epoch, config.val_set_size) == (2, 0.05)
    # Everything of theirs is either in ours or said
    said = {*comments(text, "LOST"), *comments(text, "changed"), *comments(text, "not needed")}
    for key in yaml.safe_load(AXOLOTL):
        assert key in yaml.safe_load(text) or key in said or key == "lora_target_linear"


BASE = "base_model: a/b\ndatasets: [{path: rows.jsonl, type: chat_template}]\nmicro_batch_size: 2\n"
TRL = "model_name_or_path: a/b\ndataset_name: c/d\n"


def test_what_axolotl_leaves_out_means_its_own_defaults(tmp_path):
    """From its schemas and builders: transformers' beta2 and decay, 3 % of warmup, 512 tokens, a save per
    epoch."""
    text, config = converted(tmp_path, BASE + "learning_rate: 1e-4\n")
    assert (config.adam_beta2, config.weight_decay, config.warmup_ratio) == (0.999, 0.0, 0.03)
    assert (config.sequence_len, config.saves_per_epoch, config.num_epochs) == (512, 1, 1)
    assert (config.learning_rate, config.lr_scheduler, config.train_on_inputs) == (1e-4, "cosine", False)
    assert "adam_beta2: 0.999  # axolotl's default" in text
    text, config = converted(tmp_path, BASE + "adam_beta2: 0.95\nweight_decay: 0.1\nwarmup_steps: 7\n"
                             "sequence_len: 4096\nsave_steps: 30\n")
    assert (config.adam_beta2, config.weight_decay, config.warmup_steps) == (0.95, 0.1, 7)
    assert (config.sequence_len, config.save_steps, config.saves_per_epoch) == (4096, 30, None)
    assert config.warmup_ratio is None and "adam_beta2: 0.95\n" in text


def test_what_trl_leaves_out_means_its_own_defaults(tmp_path):
    """From TRL 1.16's SFTConfig and GRPOConfig, and transformers' TrainingArguments."""
    text, config = converted(tmp_path, TRL)
    assert (config.num_epochs, config.micro_batch_size, config.lr_scheduler) == (3, 8, "linear")
    assert (config.adam_beta2, config.weight_decay, config.learning_rate) == (0.999, 0.0, 2e-5)
    assert (config.sequence_len, config.excess_length_strategy) == (1024, "truncate")
    assert config.train_on_inputs and config.bf16 and config.gradient_checkpointing
    assert "only the completion" in comments(text, "changed")["train_on_inputs"]
    text, config = converted(tmp_path, TRL + "assistant_only_loss: true\nbf16: false\n")
    assert not config.train_on_inputs and not config.bf16
    _, config = converted(tmp_path, TRL + "reward_funcs: [exact_match]\n")
    assert (config.learning_rate, config.max_completion_length, config.num_generations) == (1e-6, 512, 8)
    _, config = converted(tmp_path, TRL + "use_peft: true\n")
    assert (config.adapter, config.lora_dropout, config.lora_target_modules) == (
        "lora", 0.05, ["q_proj", "v_proj"]
    )


def test_a_grpo_block_is_laid_flat_and_finds_its_recipe(tmp_path):
    block = "{use_vllm: true, vllm_server_host: 10.0.0.7, vllm_server_port: 9000, beta: 0.01, "
    text, config = converted(
        tmp_path, "base_model: x/y\nrl: grpo\ndatasets: [{path: a.jsonl, type: chat_template}]\n"
        f"micro_batch_size: 8\ntrl: {block}num_generations: 8, reward_funcs: [exact_match], "
        "scale_rewards: false}\n"
        "vllm: {gpu_memory_utilization: 0.7, max_model_len: 2048, enable_prefix_caching: true}\n",
    )
    assert config.vllm_server_base_url == ["http://10.0.0.7:9000"] and config.rollout_engine == "vllm"
    assert (config.vllm_gpu_memory_utilization, config.vllm_max_model_len) == (0.7, 2048)
    assert (config.num_generations, config.beta, config.scale_rewards) == (8, 0.01, "none")
    assert "torchrun grpo.py" in text and "grpo.py serve" in comments(text, "changed")["use_vllm"]


@pytest.mark.parametrize("options, engine, urls", [
    ("use_vllm: true\n", "vllm", None),  # TRL's vllm_mode is colocate
    ("use_vllm: true\nvllm_mode: colocate\nvllm_tensor_parallel_size: 2\n", "vllm", None),
    ("use_vllm: true\nvllm_mode: server\n", "vllm", ["http://127.0.0.1:8000"]),
    ("use_vllm: true\nvllm_mode: server\nvllm_server_base_url: http://gpu2:8001\n", "vllm",
         ["http://gpu2:8001"]),
    ("use_vllm: true\nvllm_mode: server\nvllm_server_host: 0.0.0.0\nvllm_server_port: 81\n", "vllm",
     ["http://127.0.0.1:81"]),
    ("use_vllm: false\n", "embedded", None),
])
def test_the_address_of_a_server_is_kept_and_colocate_is_ours(options, engine, urls, tmp_path):
    text, config = converted(tmp_path, TRL + "reward_funcs: [exact_match]\n" + options)
    assert config.rollout_engine == engine
    assert urls is None or config.vllm_server_base_url == urls
    colocated = "use_vllm: true" in options and "server" not in options
    assert ("colocate" in comments(text, "changed").get("vllm_mode", "")) == colocated
    assert config.vllm_mode == ("colocate" if colocated else "server")
    assert config.vllm_gpu_memory_utilization == (0.3 if colocated else 0.9)


def test_arguments_of_a_trl_trainer(tmp_path):
    text, config = converted(
        tmp_path,
        "model_name_or_path: a/b\ndataset_name: c/d\ndataset_config: main\ndataset_train_split: train_sft\n"
        "eval_strategy: steps\neval_steps: 0.1\nper_device_train_batch_size: 4\nnum_train_epochs: 2\n"
        "optim: adamw_torch_fused\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: "
        "{min_lr_rate: 0.1}\n"
        "max_length: 2048\npacking: true\nmax_steps: -1\nwarmup_steps: 0.05\nsave_steps: 0.25\n"
        "neftune_noise_alpha: 5\noptim_args: x\neos_token: <|im_end|>\n",
    )
    assert (config.base_model, config.micro_batch_size, config.num_epochs) == ("a/b", 4, 2)
    assert (config.optimizer, config.sequence_len, config.sample_packing) == ("adamw", 2048, True)
    assert (config.lr_scheduler, config.min_lr_ratio, config.max_steps) == ("cosine", 0.1, None)
    assert (config.warmup_ratio, config.save_steps, config.eval_steps) == (0.05, 0.25, 0.1)
    found = {"path": "hf://datasets/c/d", "name": "main"}
    assert config.datasets == [{**found, "split": "train_sft"}]
    assert config.test_datasets == [{**found, "split": "test"}]
    assert config.special_tokens == {"eos_token": "<|im_end|>"}
    assert {"neftune_noise_alpha", "optim_args"} <= comments(text, "LOST").keys()


@pytest.mark.parametrize("entry, made, lost", [
    ("{path: o/n, name: main, split: test, revision: abc, type: chat_template}",
     [{"path": "hf://datasets/o/n@abc", "name": "main", "split": "test", "type": "chat"}], []),
    ("{path: o/n, data_files: [a.jsonl, b.jsonl], type: completion, field: body}",
     [{"path": "hf://datasets/o/n/a.jsonl", "type": "text", "columns": {"text": "body"}},
      {"path": "hf://datasets/o/n/b.jsonl", "type": "text", "columns": {"text": "body"}}], []),
    ("{path: a.jsonl, type: chat_template, field_messages: dialog, message_property_mappings: "
     "{role: from, content: value}}",
     [{"path": "a.jsonl", "type": "chat", "columns": {"messages": "dialog"}}], []),
    ("{path: a.jsonl, type: chat_template, message_property_mappings: {role: who, content: said}, "
     "field_thinking: thoughts, template_thinking_key: thinking}",
     [{"path": "a.jsonl", "type": "chat", "columns": {
         "messages.role": "who", "messages.content": "said", "messages.reasoning_content": "thoughts"}}], []),
    ("{path: a.jsonl, type: {field_instruction: q, field_output: a, system_prompt: Be short., "
     "format: 'Q: {instruction}'}}",
     [{"path": "a.jsonl", "type": "instruct", "system": "Be short.", "columns": {"instruction": "q",
      "output": "a"}}],
     ["datasets.type.format"]),
    ("{path: a.jsonl, type: chat_template, roles_to_train: [assistant], train_on_eos: turn}",
     [{"path": "a.jsonl", "type": "chat"}], []),
    ("{path: a.jsonl, type: chat_template, roles_to_train: [user], train_on_eos: last, "
     "drop_system_message: true}",
     [{"path": "a.jsonl", "type": "chat"}],
     ["datasets.roles_to_train", "datasets.train_on_eos", "datasets.drop_system_message"]),
    ("{path: a.jsonl, type: my_format.load}", [{"path": "a.jsonl", "type": "my_format.load"}],
         ["datasets.type"]),
    ("{path: a.jsonl, type: chat_template, roles: {assistant: [gpt, model], user: [human]}}",
     [{"path": "a.jsonl", "type": "chat"}], []),
    ("{path: a.jsonl, type: chat_template, roles: {assistant: [bot]}}", [{"path": "a.jsonl", "type": "chat"}],
     ["datasets.roles"]),
    ("{path: a.jsonl}", [{"path": "a.jsonl"}], []),
    ("{path: a.jsonl, type: alpaca, shuffle_by: x}", [{"path": "a.jsonl", "type": "instruct"}],
         ["datasets.shuffle_by"]),
])
def test_every_key_of_a_data_set_is_converted_or_named(entry, made, lost, tmp_path):
    text, config = converted(tmp_path, f"base_model: a/b\ndatasets: [{entry}]\n")
    assert config.datasets == made
    assert sorted(comments(text, "LOST")) == sorted(lost)


@pytest.mark.parametrize("given, option, value", [
    ("chat_template: llama3", "chat_template", "llama3"), ("chat_template: gemma3", "chat_template", "gemma"),
    ("chat_template: chatml", "chat_template", "chatml"),
    ("chat_template: tokenizer_default", "chat_template", None),
    ("chat_template: qwen_25", "chat_template", None),
    ("chat_template: tokenizer_default_fallback_chatml", "chat_template", None),
    ("chat_template: jinja\nchat_template_jinja: '{{ messages }}'", "chat_template", "{{ messages }}"),
    ("optimizer: adamw_torch_8bit", "optimizer", "adamw_8bit"),
    ("optimizer: lion_8bit", "optimizer", "adamw"),
    ("optimizer: paged_adamw_32bit", "optimizer", "adamw"),
    ("optimizer: adamw_bnb_8bit", "optimizer", "adamw_8bit"),
    ("adapter: lora\nlora_target_modules: all-linear", "lora_target_modules", None),
    ("adapter: lora\nlora_target_modules: 'model.layers.[0-9]+.mlp.up_proj'", "lora_target_modules",
     "model.layers.[0-9]+.mlp.up_proj"),
    ("adapter: lora\nlora_target_modules: ['model.layers.[\\d]+.(mlp).(up)_proj']", "lora_target_modules",
     "model.layers.[\\d]+.(mlp).(up)_proj"),
    ("lora_r: 8", "lora_r", 16), ("max_steps: -1", "max_steps", None),
    ("evals_per_epoch: 0", "evals_per_epoch", None),
    ("val_set_size: 0.1\nevals_per_epoch: 2", "evals_per_epoch", 2),
    ("save_strategy: 'no'", "saves_per_epoch", None),
    ("lr_scheduler: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}\nlearning_rate: 1e-5",
         "min_lr_ratio", 0.1),
    ("eta_min: 7e-7\nlearning_rate: 7e-6", "min_lr_ratio", 0.1),
    ("cosine_min_lr_ratio: 0.2", "min_lr_ratio", 0.2),
    ("auto_resume_from_checkpoints: true", "resume", "auto"),
    ("resume_from_checkpoint: out/c", "resume", "out/c"),
    ("fsdp_config: {fsdp_offload_params: true}", "fsdp_cpu_offload", True), ("bf16: auto", "bf16", True),
    ("batch_size: 8", "gradient_accumulation_steps", 4), ("resize_token_embeddings_to_32x: true",
     "pad_vocab_to_multiple_of", 32),
])
def test_a_value_of_axolotl_in_ours(given, option, value, tmp_path):
    _, config = converted(tmp_path, BASE + given + "\n")
    assert getattr(config, option) == value


@pytest.mark.parametrize("text, named", [
    ("- a", "key: value"), ("a: [", "not valid YAML"), ("provider: x", "neither base_model"),
    (BASE + "rl: dpo", "is DPO"), (BASE + "rl: kto", "is KTO"), (BASE + "rl: gdpo", "is GDPO"),
    (BASE + "rl: ppo", "no recipe"), (BASE + "reward_model: true", "reward_model"),
    (BASE + "process_reward_model: true", "process_reward_model"), (BASE + "orpo_alpha: 0.1", "orpo_alpha"),
    (BASE + "qat: {activation_dtype: int8}", "qat"),
    (BASE + "processor_type: AutoProcessor", "processor_type"),
    (BASE + "plugins: [axolotl.integrations.diffusion.DiffusionPlugin]", "diffusion"),
    (BASE + "adapter: llama-adapter", "adapter"), (BASE + "gradient_accumulation_steps: auto", "must "
        "be a number"),
    (BASE.replace("chat_template", "bradley_terry.chat_template"), "bradley_terry"),
    (BASE.replace("chat_template", "chat_template.argilla"), "preference data"),
    (BASE.replace("type: chat_template", "field_chosen: chosen"), "preference data"),
    (TRL + "loss_type: sigmoid", "preference optimisation"), (TRL + "beta: 0.1", "beta"),
    (TRL + "loss_type: [sigmoid, bco_pair]", "preference"), (TRL + "desirable_weight: 1.0", "KTO"),
    (TRL + "dataset_train_split: train_prefs", "preference data"), (TRL + "num_ppo_epochs: 4", "PPO"),
    ("model_name_or_path: a/b\ndataset_mixture: {datasets: [{id: o/n, split: train_prefs}]}",
         "preference data"),
    ("model_name_or_path: a/b\ndataset_mixer: {o/n: 1.0}\ndataset_splits: [train_prefs]", "preference data"),
])
def test_what_is_no_config_or_another_algorithm_is_refused(text, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        converted(tmp_path, text)


def test_mixtures_and_rewards_of_public_trl_recipes(tmp_path):
    text, config = converted(
        tmp_path, "model_name_or_path: a/b\ndataset_mixture:\n  datasets:\n    - {id: o/n, config: SFT, "
        "split: OpenHermes_2.5_no_think, weight: 0.5}\n    - {id: o/m, split: train}\n  "
        "test_split_size: 100\n"
        "assistant_only_loss: true\nchat_template: '{{ messages }}'\n",
    )
    assert config.datasets == [
        {"path": "hf://datasets/o/n", "name": "SFT", "split": "OpenHermes_2.5_no_think", "weight": 0.5},
        {"path": "hf://datasets/o/m", "split": "train"},
    ]
    assert config.val_set_size == 100 and config.chat_template == "{{ messages }}"
    text, config = converted(
        tmp_path, "model_name_or_path: a/b\ndataset_name: o/math\ndataset_prompt_column: problem\n"
        'system_prompt: "Think.\\nThen answer."\nreward_funcs: [accuracy, mine.score]\ntop_p: 0.95\n',
    )
    assert config.datasets == [{"path": "hf://datasets/o/math", "type": "instruct",
                                "columns": {"instruction": "problem"}, "system": "Think.\nThen "
                                                                                 "answer."}]
    assert "accuracy is a function of theirs" in comments(text, "LOST")["reward_funcs"]
    assert "top_p" in comments(text, "LOST") and config.top_p == 1.0
    assert "system_prompt" in comments(text, "changed") and "mine.score is" not in text


def test_options_of_the_other_mode_and_dropout_do_not_stop_a_strided_config(tmp_path):
    text, config = converted(
        tmp_path, "base_model: a/b\nrl: ebft\nebft: {mode: strided, stride: 4}\ntrl: {num_generations: 4, "
        "epsilon: 0.2}\ndatasets: [{path: o/n, type: ebft_pretrain.transform}]\nadapter: "
        "lora\nlora_dropout: 0.05\n",
    )
    assert (config.mode, config.stride, config.lora_dropout) == ("strided", 4, 0.0)
    assert config.datasets == [{"path": "hf://datasets/o/n", "type": "text"}]
    assert "not of mode strided" in comments(text, "not needed")["num_generations"]
    assert "without a ratio to clip" in comments(text, "not needed")["epsilon"]
    assert "lora_dropout" in comments(text, "changed")


def test_the_page_is_up_to_date_and_the_command_prints(tmp_path):
    assert (ROOT / "docs" / "migration.md").read_text() == convert.page(RECIPES)
    (tmp_path / "a.yaml").write_text(AXOLOTL)
    done = subprocess.run([sys.executable, "-m", "health", "convert", str(tmp_path / "a.yaml")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["lora_r"] == 16, done.stderr


def test_the_count_over_a_folder_finds_no_silent_difference(tmp_path):
    for name, text in (("a", AXOLOTL), ("b", TRL), ("c", BASE + "rl: dpo\n"), ("d", BASE + "neftune: 3\n"),
                       ("e", "services: {}\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    done = run_program(ROOT / "bench" / "convert.py", str(tmp_path), "--show")
    counts = {line.split(maxsplit=1)[1]: int(line.split()[0]) for line in done.stdout.splitlines()
              if line.startswith("  ") and line.split()[0].isdigit()}
    assert done.returncode == 0 and counts == {
        "parses": 2, "parses, with losses named": 1, "refused": 1, "failed": 0, "no config": 1,
    }


def test_the_defaults_of_trl_are_those_of_its_classes():
    """All that stands in the table, and all that needs no row because it is ours too."""
    import trl

    sft, grpo, model = ({f.name: f.default for f in dataclasses.fields(c)}
                        for c in (trl.SFTConfig, trl.GRPOConfig, trl.ModelConfig))
    theirs_of = {
        ours: its for its, ours in convert.NAMES.items() if its in sft or its in grpo or its in model
    }
    theirs_of |= {"lr_scheduler": "lr_scheduler_type", "sequence_len": "max_length"}
    tables = convert.DEFAULTS["TRL"]
    special = {
        "bf16",
        "train_on_inputs",
        "excess_length_strategy",
    }  # None, assistant_only_loss, truncation_mode
    assert sft["bf16"] is None and not sft["assistant_only_loss"] and sft["truncation_mode"] == "keep_start"
    for recipe, theirs, config_class in (("sft", sft, SftConfig), ("grpo", grpo, GrpoConfig)):
        table = {**tables["all"], **tables[recipe]}
        for name in table.keys() - special:
            assert theirs[theirs_of.get(name, name)] == table[name], name
        for entry in dataclasses.fields(config_class):
            its = theirs_of.get(entry.name, entry.name)
            if its in theirs and entry.name not in {*table, *SAID_ON_THE_PAGE}:
                value = {None: entry.default, 0: entry.default or 0}.get(theirs[its], theirs[its])
                assert value == (entry.default or 0 if value == 0 else entry.default), entry.name
    assert (model["lora_dropout"], model["lora_r"], model["lora_alpha"]) == (0.05, 16, 32)


# Where both leave something open in their own way: told on the page, or about the machine and not the result
SAID_ON_THE_PAGE = {
    "output_dir", "datasets", "resume_from_checkpoint", "save_total_limit", "eval_steps", "optimizer",
    "run_name", "wandb_name", "vllm_mode", "vllm_gpu_memory_utilization", "vllm_server_base_url",
    "vllm_timeout", "deterministic", "ref_model_sync_steps", "chat_template_kwargs",
    "gradient_checkpointing_kwargs", "sample_packing", "max_steps", "entropy_target", "eval_num_generations",
    "vllm_importance_sampling_clip_min", "kl_steps", "loss_type", "router_aux_loss_coef",
}
