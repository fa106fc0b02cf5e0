"""The options' page is what the dataclasses say; every config that is shipped loads and is valid."""

import dataclasses
import inspect
import json
import math
import typing

import pytest
from executed import names_in

import ebft
import grpo
import sft
from conftest import ROOT, metrics, run_program
from health.__main__ import recipe_config
from health.options import options_page
from rollouts import judge, nccl_transfer, vllm_client, vllm_server
from run.config import ConfigError, UnknownOption, parse_config

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml")) + sorted((ROOT / "drills" / "base").glob("*.yaml"))


def test_the_page_of_options_is_up_to_date():
    page = options_page({"sft": sft.Config, "grpo": grpo.Config, "ebft": ebft.Config})
    assert page == (ROOT / "docs" / "configs.md").read_text(encoding="utf-8"), (
        "run python -m health options > docs/configs.md"
    )
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 150 and not [row for row in rows if row.endswith("|  |")], (
        "an option without its meaning"
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_config_that_is_shipped_is_valid_and_belongs_to_one_recipe(path):
    config = recipe_config(["--config", str(path)])
    assert type(config) in (sft.Config, grpo.Config, ebft.Config)
    named = next((n for n in ("sft", "grpo", "ebft") if path.stem.startswith(n)), None)
    assert named is None or type(config).__module__ == named
    again = parse_config(type(config), ["--config", str(path), "max_steps=3"])
    assert again.max_steps == 3


# ------------------------------------------------------------------------------------------------------------
# One check beside each dataclass, the same in every recipe that has it
# ------------------------------------------------------------------------------------------------------------

RECIPES = {"sft": sft.Config, "grpo": grpo.Config, "ebft": ebft.Config, "strided": ebft.Config}
VALID = {
    "sft": dict(datasets=[{"path": "x", "type": "chat"}]),
    "grpo": dict(datasets=[{"path": "x", "type": "chat"}], reward_funcs=["exact_match"]),
    "ebft": dict(datasets=[{"path": "x", "type": "chat"}]),
    "strided": dict(datasets=[{"path": "x", "type": "text"}], mode="strided"),
}
HELD_OUT = [{"path": "y", "type": "chat"}]
BAD = [  # (options, what the error names); in every recipe that has them
    (dict(base_model=""), "base_model"), (dict(datasets=[]), "datasets"),
    (dict(save_steps=1.5), "save_steps"), (dict(saves_per_epoch=0), "saves_per_epoch"),
    (dict(save_steps=2, saves_per_epoch=2), "contradicts save_steps"),
    (dict(test_datasets=[{"path": "y", "type": "chat"}], eval_steps=2.5), "eval_steps"),
    (dict(evals_per_epoch=2), "held-out"),
    (dict(test_datasets=[{"path": "y", "type": "chat"}], evals_per_epoch=0), "evals_per_epoch"),
    (dict(test_datasets=[{"path": "y", "type": "chat"}], eval_steps=2, evals_per_epoch=2), "contradicts"),
    (dict(datasets=[{"path": "x", "weight": -1}]), "weight"),
    (dict(datasets=[{"path": "x", "weight": "0.5"}]), "weight"),
    (dict(datasets=[{"path": "x", "weight": 0}]), "every weight is 0"),
    (dict(val_set_size=10, test_datasets=HELD_OUT), "test_datasets: contradicts"),
    (dict(val_set_size=-1), "val_set_size"), (dict(val_set_size=1.5), "val_set_size"),
    (dict(val_set_size=math.nan), "val_set_size"), (dict(eval_steps=5), "eval_steps: 5 needs held-out"),
    (dict(eval_answers=5), "eval_answers: 5 needs held-out"),
    (dict(eval_steps=0, val_set_size=2), "eval_steps"),
    (dict(num_epochs=0), "num_epochs"), (dict(num_epochs=math.inf), "num_epochs"),
    (dict(max_steps=0), "max_steps"), (dict(micro_batch_size=0), "micro_batch_size"),
    (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps"),
    (dict(sequence_len=0), "sequence_len"), (dict(lora_r=0), "lora_r"),
    (dict(adapter="lora", lora_alpha=0), "lora_alpha: 0 must be above 0: adapters"),
    (dict(adapter="lora", lora_alpha=-1), "lora_alpha"),
    (dict(adapter="lora", lora_target_modules=[]), "lora_target_modules"),
    (dict(lora_model_dir="x"), "lora_model_dir: 'x' needs adapter"), (dict(adapter="qlora"), "load_in_4bit"),
    (dict(load_in_4bit=True), "adapter: qlora"), (dict(lora_dropout=1.0, adapter="lora"), "lora_dropout"),
    (dict(pad_vocab_to_multiple_of=0), "pad_vocab"), (dict(router_aux_loss_coef=-1.0), "router_aux"),
    (dict(save_total_limit=0), "save_total_limit"), (dict(save_steps=0), "save_steps"),
    (dict(logging_steps=0), "logging_steps"), (dict(profiler_steps=[0]), "profiler_steps"),
    (dict(health_rules={"nope": "off"}), "no rule"),
    (dict(on_unhealthy="explode"), "on_unhealthy"), (dict(max_skipped_steps=0), "max_skipped_steps"),
    (dict(gpu_timeout_minutes=0), "gpu_timeout_minutes"), (dict(hsdp_shard_size=0), "hsdp_shard_size"),
    (dict(gradient_checkpointing_kwargs={"foo": 1}), "gradient_checkpointing_kwargs.foo"),
    (dict(learning_rate=-1.0), "learning_rate"), (dict(learning_rate=math.nan), "learning_rate"),
    (dict(adam_beta1=1.0), "adam_beta1"), (dict(adam_beta2=-0.1), "adam_beta2"),
    (dict(adam_epsilon=0.0), "adam_epsilon"),
    (dict(warmup_steps=1, warmup_ratio=0.1), "warmup_ratio"), (dict(warmup_ratio=2.0), "warmup_ratio"),
    (dict(max_grad_norm=-1.0), "max_grad_norm"), (dict(min_lr_ratio=2.0), "min_lr_ratio"),
    (dict(temperature=0.0), "temperature"), (dict(temperature=math.inf), "temperature"),
    (dict(top_p=0.9), "top_p"), (dict(top_k=5), "top_k"), (dict(min_p=0.1), "min_p"),
    (dict(num_generations=0), "num_generations"), (dict(max_completion_length=0), "max_completion_length"),
    (dict(max_prompt_length=0), "max_prompt_length"), (dict(rollout_batch_size=0), "rollout_batch_size"),
    (dict(async_prefetch=True), "async_prefetch"), (dict(vllm_timeout=0.0), "vllm_timeout"),
    (dict(vllm_gpu_memory_utilization=1.5), "vllm_gpu"), (dict(vllm_sync_interval=0), "vllm_sync_interval"),
    (dict(rollout_engine="vllm", vllm_server_base_url=["x"]), "http"),
    (dict(rollout_engine="replay"), "replay_path"), (dict(epsilon=-1.0), "epsilon"),
    (dict(loss_type="cispo"), "epsilon_high"), (dict(beta=-0.1), "beta"), (dict(kl_steps=0), "kl_steps"),
    (dict(top_entropy_quantile=0.0), "top_entropy_quantile"), (dict(entropy_coef=math.nan), "entropy_coef"),
    (dict(vllm_importance_sampling_clip_min=4.0), "clip_min"),
    (dict(reward_weights=[1.0, 2.0]), "reward_weights"),
    (dict(reward_weights=[0.0]), "all 0"), (dict(reward_weights=[math.inf]), "finite"),
    (dict(reward_timeout=0.0), "reward_timeout"), (dict(reward_format="("), "reward_format"),
    (dict(num_iterations=0), "num_iterations"), (dict(steps_per_generation=0), "steps_per_generation"),
    (dict(distillation_coef=-1.0), "distillation_coef"), (dict(dynamic_sampling=-1), "dynamic_sampling"),
    (dict(max_staleness=-1), "max_staleness"), (dict(environment_workers=0), "environment_workers"),
    (dict(environment_timeout=0.0), "environment_time"),
    (dict(tool_timeout=0.0), "tool_timeout"), (dict(judge_max_tokens=0), "judge_max_tokens"),
    (dict(judge_workers=0), "judge_workers"), (dict(judge_retries=-1), "judge_retries"),
    (dict(judge_timeout=0.0), "judge_timeout"), (dict(judge_range=[1.0, 0.0]), "judge_range"),
    (dict(judge_price=[-1.0, 0.0]), "judge_price"),
    (dict(ref_model_mixup_alpha=2.0), "ref_model_mixup"), (dict(replay_buffer_size=-1), "replay_buffer"),
    (dict(eval_temperature=-1.0), "eval_temperature"), (dict(eval_num_generations=0), "eval_num_generations"),
    (dict(stride=0), "stride"), (dict(context_length=0), "context_length"),
    (dict(generate_max_len=0), "generate_max_len"), (dict(min_completion_prefix=-1), "min_completion_prefix"),
    (dict(n_samples_per_prompt=0), "n_samples"), (dict(samples_a_pass=0), "samples_a_pass"),
    (dict(feature_layers=[]), "feature_layers"), (dict(feature_layers=[1.5]), "feature_layers"),
    (dict(rl_coef=0.0), "rl_coef"), (dict(alignment_coef=0.0, diversity_coef=0.0), "alignment_coef"),
    (dict(gt_length_multiplier=0.0), "gt_length_multiplier"), (dict(eval_max_new_tokens=0), "eval_max_new"),
    (dict(weight_decay=-1.0), "weight_decay"), (dict(wsd_decay_ratio=2.0), "wsd_decay_ratio"),
    (dict(entropy_target=-1.0), "entropy_target"), (dict(delta=-1.0), "delta"),
    (dict(off_policy_mask_threshold=math.nan), "off_policy"), (dict(epsilon_high=-1.0), "epsilon_high"),
    (dict(sapo_temperature_pos=0.0), "sapo_t"), (dict(sapo_temperature_neg=0.0), "sapo_t"),
    (dict(vllm_importance_sampling_clip_max=-1.0), "clip_max"), (dict(max_turns=0), "max_turns"),
    (dict(vllm_probe_tolerance=0.0), "vllm_probe"), (dict(vllm_max_model_len=0), "vllm_max_model_len"),
    (dict(vllm_tensor_parallel_size=0), "vllm_tensor"), (dict(ref_model_sync_steps=0), "ref_model_sync"),
    (dict(ce_coef=math.nan), "ce_coef"), (dict(diversity_coef=math.nan), "diversity_coef"),
    (dict(eval_success_reward=math.nan), "eval_success_reward"),
    (dict(tokenizer_vocab_size=300), "random_init"), (dict(random_init=True, adapter="lora"), "adapter"),
]
HAVING = [
    (recipe, given, named)
    for given, named in BAD
    for recipe, config in RECIPES.items()
    if set(given) <= {entry.name for entry in dataclasses.fields(config)}
]


@pytest.mark.parametrize("recipe, given, named", HAVING, ids=lambda x: x if isinstance(x, str) else None)
def test_an_impossible_value_is_refused_by_name_in_every_recipe_that_has_the_option(recipe, given, named):
    RECIPES[recipe](**{"base_model": "x", **VALID[recipe]})  # it is the option that is wrong
    with pytest.raises(ConfigError) as caught:
        RECIPES[recipe](**{"base_model": "x", **VALID[recipe], **given})
    own = named.split(":")[0].split()[0]
    assert named in str(caught.value) or (own in str(caught.value) and "is of mode" in str(caught.value))


def test_every_option_that_takes_a_number_has_an_impossible_value_above():
    """So that a new option comes with its check."""
    tried = {name for given, _ in BAD for name in given} | {"seed"}
    for config in RECIPES.values():
        for name, hint in typing.get_type_hints(config).items():
            kinds = {hint, *typing.get_args(hint)}
            assert not kinds & {int, float} or name in tried, name


@pytest.mark.parametrize(
    "recipe, name, value, says",
    [
        ("grpo", "sample_packing", "true", "packed anyway"),
        ("grpo", "sequence_len", "512", "max_prompt_length"),
        ("grpo", "train_on_inputs", "true", "is not an option here"),
        ("grpo", "random_init", "true", "sft.py first"),
        ("ebft", "loss_type", "grpo", "without a ratio to clip"), ("ebft", "epsilon", "0.1", "grpo.py"),
        ("ebft", "environment", "a.B", "grpo.py"), ("ebft", "reward_funcs", "[exact_match]", "grpo.py"),
        ("sft", "num_generations", "8", "is not an option"), ("sft", "beta", "0.1", "is not an option"),
    ],
)
def test_an_option_of_another_recipe_is_refused_by_name(recipe, name, value, says):
    with pytest.raises(UnknownOption, match=name) as caught:
        parse_config(RECIPES[recipe], ["base_model=x", "datasets=[{path: x, type: chat}]", f"{name}={value}"])
    assert says in str(caught.value)


OF_MODES = [
    ("strided", dict(beta=0.1)), ("strided", dict(share_prompts=True)), ("strided", dict(kl_steps=3)),
    ("strided", dict(num_generations=4)),
    ("strided", dict(max_completion_length=99)), ("strided", dict(gt_length_multiplier=2.0)),
    ("strided", dict(chat_turns="every")), ("strided", dict(vllm_model_name="x")),
    ("structured", dict(stride=4)), ("structured", dict(n_samples_per_prompt=8)),
    ("structured", dict(sequence_len=64)), ("structured", dict(train_on_inputs=True)),
    ("structured", dict(samples_a_pass=2)), ("structured", dict(dataset_prepared_path="x")),
]


@pytest.mark.parametrize("mode, given", OF_MODES)
def test_an_option_of_the_other_mode_is_refused_by_name(mode, given):
    other = "structured" if mode == "strided" else "strided"
    with pytest.raises(ConfigError, match=f"{next(iter(given))}: .* is of mode: {other}"):
        ebft.Config(base_model="x", datasets=[{"path": "x"}], mode=mode, **given)
    ebft.Config(base_model="x", datasets=[{"path": "x"}], mode=other, **given)


# ------------------------------------------------------------------------------------------------------------
# Nothing is accepted that nothing reads
# ------------------------------------------------------------------------------------------------------------

RUNS = {  # for each recipe and mode: runs whose code together reads its options
    "sft": [["sample_packing=true", "val_set_size=4", "eval_answers=2", "save_steps=1"],
            ["adapter=lora", "lora_r=4"], ["random_init=true", "tokenizer_vocab_size=300"]],
    "grpo": [["beta=0.01", "ref_model_sync_steps=1", "replay_buffer_size=2", "val_set_size=4",
              "reward_funcs=[letters.many_g, format, length]", "log_completions=true", "save_steps=1",
              "eval_greedy=true"],
             ["adapter=lora", "lora_r=4", "top_entropy_quantile=0.5", "reward_funcs=[letters.many_g]"],
             ["environment=letters.Once", "reward_funcs=[]"],
             ["tools=[letters.look]", "reward_funcs=[format]"],
             ["teacher_model=CHECKPOINT", "reward_funcs=[letters.many_g]", "dynamic_sampling=1"]],
    "structured": [["val_set_size=4", "log_completions=true", "save_steps=1"], ["adapter=lora", "lora_r=4"]],
    "strided": [["val_set_size=4", "log_completions=true", "save_steps=1"], ["adapter=lora", "lora_r=4"]],
}
OWN = {
    "sft": [], "strided": ["mode=strided"], "grpo": ["num_generations=4", "max_completion_length=4"],
    "structured": ["num_generations=4", "micro_batch_size=4", "max_completion_length=4"],
}
BY_KEY = {"health_rules", "on_unhealthy"}  # read from a dict, in rules.py and health.py
NEUTRAL = {"top_p", "top_k", "min_p"}  # there to be refused unless they are


@pytest.mark.parametrize("kind", RUNS)
def test_every_option_is_read_by_the_recipe_and_mode_that_takes_it(
    kind, small_checkpoint, task, texts, tmp_path
):
    (tmp_path / "letters.py").write_text(
        (task / "letters.py").read_text() + "def look(a: int) -> int:\n    'Look it up.'\n    return a\n"
        "class Once:\n"
        "    def reset(self, prompt, **columns): pass\n"
        "    def step(self, text, ids): return None, 1.0, True\n"
    )
    rows, form = (texts, "text") if kind == "strided" else (task / "rows.jsonl", "chat")
    (tmp_path / "c.yaml").write_text(
        f"base_model: {small_checkpoint[0]}\ndatasets: [{{path: {rows}, type: {form}}}]\nmax_steps: 1\n"
    )
    recipe = "ebft" if kind in ("structured", "strided") else kind
    read = BY_KEY | NEUTRAL | {"use_whitening"}  # which sets `whitening` when the config is made
    for k, more in enumerate(RUNS[kind]):
        done = run_program(
            ROOT / "tests" / "executed.py", recipe, "--config", str(tmp_path / "c.yaml"), *OWN[kind],
            *[option.replace("CHECKPOINT", str(small_checkpoint[0])) for option in more],
            f"output_dir={tmp_path / str(k)}",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        read |= set(json.loads(done.stdout.splitlines()[-1]))
    if kind in ("grpo", "structured"):  # no server is at hand: what its client and `serve` read counts
        modules = (vllm_client, vllm_server, nccl_transfer, judge)
        every = [(m.__name__, c) for m in modules for c in vars(m).values() if inspect.isclass(c)]
        classes = [c for name, c in every if c.__module__ == name]
        for owner in (*modules, *classes):
            functions = [inspect.unwrap(f) for f in vars(owner).values() if inspect.isfunction(f)]
            read = read.union(*(names_in(f.__code__) for f in functions))
    refused = dict(zip(("strided", "structured"), ebft.options_by_mode(), strict=True)).get(kind, set())
    taken = {entry.name for entry in dataclasses.fields(RECIPES[recipe])} - refused
    assert not taken - read, sorted(taken - read)


@pytest.mark.parametrize("kind", RUNS)
def test_max_steps_is_the_number_of_steps_and_intervals_may_be_shares_in_every_recipe(
    kind, small_checkpoint, task, texts, tmp_path
):
    """Also where max_steps is more than an epoch: 12 rows in batches of 4, 7 steps, two saves per epoch."""
    rows = texts if kind == "strided" else task / "rows.jsonl"
    lines = rows.read_text().splitlines()[:12]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "letters.py").write_text((task / "letters.py").read_text())
    form = "text" if kind == "strided" else "chat"
    (tmp_path / "c.yaml").write_text(
        f"base_model: {small_checkpoint[0]}\ndatasets: [{{path: rows.jsonl, type: {form}}}]\nmax_steps: 7\n"
        "save_total_limit: 9\nsave_async: false\n"
    )
    more = {"sft": ["micro_batch_size=4"], "grpo": ["micro_batch_size=16", "reward_funcs=[letters.many_g]"],
            "structured": ["micro_batch_size=16"], "strided": ["micro_batch_size=4"]}[kind]
    recipe = "ebft" if kind in ("structured", "strided") else kind
    own = [option for option in OWN[kind] if not option.startswith("micro_batch_size")]
    for name, saves in (("epochs", "saves_per_epoch=1"), ("shares", "save_steps=0.5")):
        done = run_program(
            ROOT / f"{recipe}.py", "--config", str(tmp_path / "c.yaml"), *own, *more, saves,
            f"output_dir={tmp_path / name}",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert metrics(tmp_path / name)[-1]["step"] == 7
        saved = {int(p.name.split("-")[1]) for p in (tmp_path / name / "checkpoints").glob("step-*")}
        assert saved == ({3, 6, 7} if name == "epochs" else {4, 7})
