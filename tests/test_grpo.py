"""GRPO: losses against golden numbers and TRL, rewards, engines, resuming."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo
from checkpoints.weights import load_pretrained
from conftest import GOLDEN, ROOT, PolicyOptions, embedded, golden, metrics, options, run_program, tallied
from dist import World
from grpo import StepSize, group_advantages, policy_loss
from rollouts.policy import Tally, completion_metrics
from rollouts.rewards import reward_metrics, weighted_rewards
from rollouts.rollout import Rollout
from run.config import ConfigError

ALONE = World(0, 1, 0, torch.device("cpu"))


def golden_rewards() -> torch.Tensor:
    columns = [GOLDEN["rewards"][name] for name in ("accuracy", "format")]
    rows = [[math.nan if x is None else float(x) for x in row] for row in zip(*columns, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_meet_the_golden_numbers(scale):
    total = weighted_rewards(golden_rewards(), torch.tensor(GOLDEN["reward_weights"]).double())
    advantages, _ = group_advantages(total, GOLDEN["num_generations"], scale)
    assert advantages.tolist() == pytest.approx(GOLDEN["advantages"][scale], abs=1e-9)


def test_every_metric_meets_the_golden_number():
    rewards = golden_rewards()
    total = weighted_rewards(rewards, torch.tensor(GOLDEN["reward_weights"]).double())
    _, metrics = group_advantages(total, GOLDEN["num_generations"], "group")
    metrics |= reward_metrics(rewards, ["accuracy", "format"])
    lengths = golden("mask").sum(-1).int().tolist()
    metrics |= completion_metrics(
        [Rollout([1], [5] * n, truncated=t) for n, t in zip(lengths, GOLDEN["truncated"], strict=True)]
    )
    tally = Tally()
    for one in range(8):  # in eight micro-batches: the means are of the whole
        part = slice(one, one + 1)
        options = PolicyOptions(off_policy_mask_threshold=0.5)
        sampled = golden("sampling_logp")[part]
        _, facts = policy_loss(
            golden("logp")[part], old_logprobs=golden("old_logp")[part], mask=golden("mask")[part],
            advantages=torch.tensor(GOLDEN["advantages"]["group"][part], dtype=torch.float64),
            options=options,
            size=StepSize(8, 25.0), sampling_logprobs=sampled, ref_logprobs=golden("ref_logp")[part],
        )
        tallied(tally, facts, golden("entropy_per_token")[part], golden("old_logp")[part], sampled)
    metrics |= tally.result(ALONE)
    metrics["reward_std_within_group_mean"] = metrics["reward_std_within_group"]
    for name, value in GOLDEN["metrics"].items():
        assert metrics[name] == pytest.approx(value, abs=1e-9), name


def test_a_row_without_any_reward_gets_no_advantage_and_stays_out_of_the_statistics():
    rewards = torch.tensor([1.0, 0.0, math.nan, 0.5, math.nan, math.nan, 2.0, 2.0], dtype=torch.float64)
    advantages, metrics = group_advantages(rewards, 4, "none")
    assert advantages.tolist() == pytest.approx([0.5, -0.5, 0, 0, 0, 0, 0, 0])
    assert metrics["reward"] == pytest.approx(5.5 / 5) and metrics["frac_reward_zero_std"] == 0.5


# ------------------------------------------------------------------------------------------------------------
# Runs on recorded rollouts
# ------------------------------------------------------------------------------------------------------------


def record(
    path: Path, *, groups: int, n: int = 4, vocab: int = 500, longest: int = 9, logprobs: bool = True, seed=0
):
    """Rollouts of unequal lengths with random tokens and rewards, as another implementation would write
    them."""
    rng = random.Random(seed)
    rows = []
    for _ in range(groups):
        prompt = [rng.randrange(3, vocab) for _ in range(rng.randrange(2, 8))]
        for _ in range(n):
            ids = [rng.randrange(3, vocab) for _ in range(rng.randrange(1, longest))]
            if rng.random() < 0.7:
                ids.append(2)  # <|im_end|>
            row = {"step": 0, "prompt_ids": prompt, "completion_ids": ids, "rewards": {"score": rng.random()}}
            if logprobs:
                row["sampling_logprobs"] = [-6.0 - rng.random() for _ in ids]
            rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def run_grpo(*options, ranks=1, code=0, **kwargs):
    done = run_program(ROOT / "grpo.py", *options, ranks=ranks, **kwargs)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def final_weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "final" / "model.safetensors")


REPLAY = ["rollout_engine=replay", "num_generations=4", "learning_rate=1e-3", "lr_scheduler=constant"]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_runs_do_not_depend_on_micro_batches_or_ranks(loss_type, small_checkpoint, tmp_path):
    record(tmp_path / "r.jsonl", groups=4)
    results = []
    for name, ranks, mb, accumulation in (("a", 1, 8, 1), ("b", 1, 2, 4), ("c", 2, 2, 2)):
        run_grpo(
            f"base_model={small_checkpoint[0]}", f"replay_path={tmp_path / 'r.jsonl'}", *REPLAY, "beta=0.05",
            f"loss_type={loss_type}", f"micro_batch_size={mb}", f"gradient_accumulation_steps={accumulation}",
            f"output_dir={tmp_path / name}", "max_completion_length=10", ranks=ranks,
        )
        results.append((metrics(tmp_path / name), final_weights(tmp_path / name)))
    (rows, weights), *others = results
    assert len(rows) == 2
    for other_rows, other in others:
        for a, b in zip(rows, other_rows, strict=True):
            for key in ("train/loss", "train/grad_norm", "entropy", "kl", "clip_ratio/region_mean",
                        "reward_std", "sampling/importance_sampling_ratio/min",
                        "sampling/sampling_logp_difference/max",
                        "completions/mean_length", "num_tokens"):
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key
        for name, weight in weights.items():
            assert (other[name] - weight).abs().max() < 2e-5, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss_type, more, trl_more",
    [
        ("dapo", [], {}),
        ("grpo", ["num_iterations=2", "beta=0.05"],
         dict(num_iterations=2, beta=0.05, use_bias_correction_kl=False)),
        ("dapo", ["num_iterations=3", "beta=0.05", "use_bias_correction_kl=true"],
        dict(num_iterations=3, beta=0.05)),
        ("dr_grpo", ["temperature=0.7", "delta=1.5"], dict(temperature=0.7, delta=1.5)),
        ("bnpo", ["importance_sampling_level=sequence"], dict(importance_sampling_level="sequence")),
        ("cispo", ["epsilon_high=5.0"], dict(epsilon_high=5.0)),
        ("sapo", ["scale_rewards=batch"], dict(scale_rewards="batch")),
        ("dapo", ["top_entropy_quantile=0.5", "mask_truncated_completions=true"],
         dict(top_entropy_quantile=0.5, mask_truncated_completions=True)),
        ("dapo", ["gradient_accumulation_steps=2", "micro_batch_size=4"],
         dict(gradient_accumulation_steps=2, per_device_train_batch_size=4)),
    ],
)
def test_three_steps_agree_with_trl_on_the_same_rollouts(
    loss_type, more, trl_more, small_checkpoint, tmp_path
):
    rows = record(tmp_path / "r.jsonl", groups=6)
    reference, logs = train_with_trl(small_checkpoint[0], rows, tmp_path, loss_type=loss_type, **trl_more)
    steps = 3
    run_grpo(
        f"base_model={small_checkpoint[0]}", f"replay_path={tmp_path / 'r.jsonl'}", *REPLAY,
        f"loss_type={loss_type}", "micro_batch_size=8", f"output_dir={tmp_path / 'out'}",
        f"max_steps={steps}",
        "max_completion_length=10", "weight_decay=0", "adam_beta2=0.999", "learning_rate=2e-4", *more,
    )
    ours = metrics(tmp_path / "out")
    assert len(ours) == len(logs) == steps
    shared = {"kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean",
    "clip_ratio/region_mean",
              "clip_ratio/low_min", "clip_ratio/high_max", "sampling/sampling_logp_difference/mean",
              "sampling/sampling_logp_difference/max", "reward", "reward_std", "frac_reward_zero_std",
              "completions/mean_length", "completions/clipped_ratio"}
    if "gradient_accumulation_steps=2" in more:
        # TRL averages the means of micro-batches, whatever they hold
        shared -= {"entropy", "clip_ratio/low_mean"}
    if "use_bias_correction_kl=true" in more:
        shared -= {"kl"}  # TRL logs it after weighting
    compared = set()
    for a, b in zip(ours, logs, strict=True):
        assert a["train/loss"] == pytest.approx(b["loss"], abs=2e-5), (a["train/loss"], b["loss"])
        assert a["train/grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4, abs=1e-5)
        for key in shared & set(a) & set(b):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key
            compared.add(key)
    assert {"reward", "sampling/sampling_logp_difference/mean"} <= compared
    weights = final_weights(tmp_path / "out")
    for name, parameter in reference.named_parameters():
        assert (weights[name] - parameter).abs().max() < 1e-5, name


def train_with_trl(checkpoint, rows, tmp_path, **options):
    """TRL's GRPOTrainer on the same completions and log-probs: (trained model, its log of each step)."""
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(**{
        **dict(output_dir=str(tmp_path / "trl"), per_device_train_batch_size=8, num_generations=4,
        max_steps=3,
               max_completion_length=10, learning_rate=2e-4, lr_scheduler_type="constant", weight_decay=0.0,
               logging_steps=1, report_to="none", bf16=False, use_cpu=True, save_strategy="no", seed=1,
               shuffle_dataset=False, disable_tqdm=True, gradient_checkpointing=False, temperature=1.0,
               beta=0.0, disable_dropout=True, vllm_importance_sampling_mode="sequence_mask"),
        **options,
    })
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    given = iter(rows)

    def rollout(prompts, trainer):
        taken = [next(given) for _ in prompts]
        return {"prompt_ids": [r["prompt_ids"] for r in taken],
        "completion_ids": [r["completion_ids"] for r in taken],
                "logprobs": [r["sampling_logprobs"] for r in taken],
                "score": [r["rewards"]["score"] for r in taken]}

    data = datasets.Dataset.from_list([{"prompt": f"p{i}"} for i in range(len(rows) // 4)])
    trainer = GRPOTrainer(
        model=model, args=arguments, processing_class=tokenizer, train_dataset=data, rollout_func=rollout,
        reward_funcs=lambda completions, score, **_: score,
    )
    # Its sampler correction is tied to this; the rollouts come from the function above
    trainer.use_vllm = True
    trainer._last_loaded_step, trainer.vllm_generation = -1, SimpleNamespace(sync_weights=lambda: None)
    trainer.train()
    return trainer.model, [entry for entry in trainer.state.log_history if "loss" in entry]


def logprobs_of(model, row) -> torch.Tensor:
    """log π of each completion token, from plain logits."""
    with torch.no_grad():
        logits = model(torch.tensor([row["prompt_ids"] + row["completion_ids"]]))[0].double()
    begin = len(row["prompt_ids"])
    chosen = torch.tensor(row["completion_ids"])[:, None]
    return logits[begin - 1 : -1].log_softmax(-1).gather(1, chosen)[:, 0]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_slice_of_a_batch_has_the_log_probs_of_the_weights_that_made_it(
    ranks, small_checkpoint, tmp_path
):
    """steps_per_generation above gradient_accumulation_steps: the second step's loss, computed independently
    from the weights before the first update and after it."""
    rows = record(tmp_path / "r.jsonl", groups=6)
    for name, steps in (("one", 1), ("all", 3)):
        run_grpo(
            f"base_model={small_checkpoint[0]}", f"replay_path={tmp_path / 'r.jsonl'}", *REPLAY,
            "learning_rate=3e-3", f"micro_batch_size={8 // ranks}", "steps_per_generation=3",
            "max_completion_length=10", "vllm_importance_sampling_correction=false", f"max_steps={steps}",
            f"output_dir={tmp_path / name}", ranks=ranks,
        )
    old = load_pretrained(str(small_checkpoint[0]), dtype=torch.float32)
    new = load_pretrained(str(tmp_path / "one" / "final"), dtype=torch.float32)
    second = rows[8:16]
    advantages, _ = group_advantages(
        torch.tensor([r["rewards"]["score"] for r in second], dtype=torch.float64), 4, "group"
    )
    total = tokens = clipped = 0
    for row, A in zip(second, advantages, strict=True):
        ratio = (logprobs_of(new, row) - logprobs_of(old, row)).exp()
        total = total - torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).sum()
        clipped += int((((ratio < 0.8) & (A < 0)) | ((ratio > 1.2) & (A > 0))).sum())
        tokens += len(ratio)
    seen = metrics(tmp_path / "all")[1]
    with_a_ratio_of_one = -sum(A * len(r["completion_ids"]) for r, A in zip(second, advantages, strict=True))
    assert seen["train/loss"] == pytest.approx((total / tokens).item(), abs=2e-6)
    assert abs(seen["train/loss"] - with_a_ratio_of_one / tokens) > 1e-3
    assert clipped and seen["clip_ratio/region_mean"] == pytest.approx(clipped / tokens, abs=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9 + 0.1, -2e-7])
def test_equal_rewards_have_no_advantage_at_all(value, scale):
    rewards = torch.tensor([value] * 12 + [0.0, 1.0] * 6 + [math.nan] * 2 + [value] * 10, dtype=torch.float64)
    rewards[14] = 0.3
    advantages, found = group_advantages(rewards, 12, scale)
    assert not advantages[:12].any() and not advantages[24:].any() and advantages[12:24].all()
    assert found["frac_reward_zero_std"] == pytest.approx(2 / 3)
    nearly = torch.tensor([value, value + 1e-10] * 6, dtype=torch.float64)  # below the metric's threshold
    advantages, found = group_advantages(nearly, 12, scale)
    assert (not advantages.any()) == (found["frac_reward_zero_std"] == 1.0) and not advantages.any()
    _, found = group_advantages(torch.full((12,), value, dtype=torch.float64), 12, scale)
    assert found["reward_std"] == 0.0 == found["reward_std_within_group"]
    assert reward_metrics(torch.full((12, 1), value, dtype=torch.float64), ["a"])["rewards/a/std"] == 0.0


# ------------------------------------------------------------------------------------------------------------
# The recipe as a user runs it
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(["adapter=lora", "lora_r=4", "learning_rate=1e-2"], marks=pytest.mark.slow),
        pytest.param(["num_iterations=2", "beta=0.01"], marks=pytest.mark.slow),
    ],
)
def test_training_makes_the_rewarded_letter_frequent(more, task, small_checkpoint, tmp_path):
    run_grpo(
        *embedded(
            task,
            small_checkpoint[0],
            tmp_path / "out",
            "max_steps=30",
            "micro_batch_size=32",
            "num_epochs=50",
            "eval_num_generations=8",
            *more,
        )
    )
    rows = metrics(tmp_path / "out")
    before, after = rows[0]["eval/reward"], rows[-1]["eval/reward"]
    assert after > before + 0.1, (before, after)
    # A step without signal has no forward pass
    last = [row for row in rows if row.get("train/grad_norm", 0) > 0][-1]
    for key in (
        "reward",
        "entropy",
        "train/grad_norm",
        "rewards/many_g/mean",
        "completions/clipped_ratio",
        "step_time/generate",
    ):
        assert math.isfinite(last[key])
    with_kl = [row["step"] for row in rows if "kl" in row and row["train/grad_norm"]]
    if "adapter=lora" in more:  # there is a reference, but its pass has a price: every kl_steps steps
        assert with_kl == [1, 21]
    else:
        assert ("kl" in last) == bool(more)  # full fine-tuning has a reference with beta
    assert last["sampling/sampling_logp_difference/max"] < 1e-4 or "num_iterations=2" in more
    files = sorted((tmp_path / "out" / "rollouts").glob("step-*.jsonl"))
    assert len(files) == (15 if "num_iterations=2" in more else 30)


def test_two_processes_sample_and_train_together(task, small_checkpoint, tmp_path):
    run_grpo(*embedded(task, small_checkpoint[0], tmp_path / "out", "max_steps=3", "beta=0.01"), ranks=2)
    rows = metrics(tmp_path / "out")[1:]
    assert len(rows) == 3
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] < 1e-4 and math.isfinite(row["kl"])
    samples = (tmp_path / "out" / "rollouts" / "step-0.jsonl").read_text().splitlines()
    assert len(samples) == 16 and len({json.loads(s)["row"] for s in samples}) == 4
    assert (tmp_path / "out" / "rollouts" / "eval-3.jsonl").exists()


def test_completions_are_logged_as_a_table_to_wandb_and_the_console(task, small_checkpoint, tmp_path):
    done = run_grpo(
        *embedded(task, small_checkpoint[0], tmp_path / "out", "max_steps=1", "log_completions=true"),
        "wandb_project=x", env={"WANDB_MODE": "offline"},
    )
    assert done.stdout.count("advantage") == 4
    tables = list((tmp_path / "out" / "wandb").rglob("completions*.table.json"))
    assert len(json.loads(tables[0].read_text())["data"]) == 8


@pytest.mark.parametrize(
    "more",
    [
        ["save_steps=3"],
        ["save_steps=3", "num_iterations=2", "steps_per_generation=2", "beta=0.05", "ref_model_sync_steps=2",
         "replay_buffer_size=3", "micro_batch_size=4"],
    ],
)
def test_a_resumed_run_ends_with_the_same_bytes(more, task, small_checkpoint, tmp_path):
    import shutil

    more = [*more, "reward_funcs=[letters.many_g, letters.spread]"]
    arguments = embedded(task, small_checkpoint[0], tmp_path / "whole", *more)
    run_grpo(*arguments)
    whole = (tmp_path / "whole" / "final" / "model.safetensors").read_bytes()
    last = metrics(tmp_path / "whole")[-1]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-6")
    run_grpo(*embedded(task, small_checkpoint[0], tmp_path / "again", *more))
    assert (tmp_path / "again" / "final" / "model.safetensors").read_bytes() == whole
    resumed = metrics(tmp_path / "again")
    assert [r["step"] for r in resumed] == list(range(7))
    for key in ("train/loss", "train/grad_norm", "reward", "entropy", "num_tokens", "eval/reward"):
        assert resumed[-1][key] == last[key], key


def test_a_run_can_be_replayed_from_what_it_recorded(task, small_checkpoint, tmp_path):
    more = "reward_funcs=[letters.many_g, letters.spread]"
    run_grpo(*embedded(task, small_checkpoint[0], tmp_path / "a", more))
    run_grpo(
        f"base_model={small_checkpoint[0]}", "rollout_engine=replay",
        f"replay_path={tmp_path / 'a' / 'rollouts'}",
        "num_generations=4", "micro_batch_size=8", "max_completion_length=12", "learning_rate=2e-3",
        "lr_scheduler=constant", f"output_dir={tmp_path / 'b'}",
    )
    a, b = metrics(tmp_path / "a")[1:], metrics(tmp_path / "b")
    assert len(a) == len(b) == 6
    for x, y in zip(a, b, strict=True):
        for key in (
            "train/loss",
            "train/grad_norm",
            "entropy",
            "reward",
            "sampling/sampling_logp_difference/max",
        ):
            assert x[key] == y[key], key
    weights = [(tmp_path / d / "final" / "model.safetensors").read_bytes() for d in "ab"]
    assert weights[0] == weights[1]


def test_a_step_whose_groups_are_all_flat_changes_nothing(small_checkpoint, tmp_path):
    rows = record(tmp_path / "r.jsonl", groups=2)
    for row in rows:
        row["rewards"] = {"score": 1.0}
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_grpo(
        f"base_model={small_checkpoint[0]}", f"replay_path={tmp_path / 'r.jsonl'}", *REPLAY,
        "micro_batch_size=4",
        "gradient_accumulation_steps=2", f"output_dir={tmp_path / 'out'}", "weight_decay=0.1",
    )
    (row,) = metrics(tmp_path / "out")
    assert (
        row["train/grad_norm"] == 0.0
        and row["skipped_micro_batches"] == 2
        and row["frac_reward_zero_std"] == 1.0
    )
    before = load_pretrained(str(small_checkpoint[0]), dtype=torch.float32).state_dict()
    after = load_pretrained(str(tmp_path / "out" / "final"), dtype=torch.float32).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "line, named",
    [
        ("{", "r.jsonl:3: is not JSON"), ("[]", "must be an object"),
        ('{"prompt_ids": [], "completion_ids": [1]}', "prompt_ids must be"),
        ('{"prompt_ids": [1], "completion_ids": [1.5]}', "completion_ids must be"),
        ('{"prompt_ids": [1], "completion_ids": [1], "sampling_logprobs": [0.1, 2]}', "1 entries"),
        ('{"prompt_ids": [1], "completion_ids": [1], "rewards": {"a": "x"}}', "rewards must be"),
        ('{"prompt_ids": [1], "completion_ids": [1], "rewards": {"a": 1}}', "adjacent"),
    ],
)
def test_a_faulty_rollout_is_named_by_file_and_line(line, named, small_checkpoint, tmp_path):
    rows = record(tmp_path / "r.jsonl", groups=2)
    lines = [json.dumps(row) for row in rows]
    lines[2] = line
    (tmp_path / "r.jsonl").write_text("\n".join(lines) + "\n")
    done = run_grpo(
        f"base_model={small_checkpoint[0]}", f"replay_path={tmp_path / 'r.jsonl'}", *REPLAY,
        "micro_batch_size=8",
        f"output_dir={tmp_path / 'out'}", code=2,
    )
    assert named in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(top_p=0.9), "renormalises"), (dict(reward_funcs=[]), "reward_funcs"),
        (dict(async_prefetch=True), "needs rollout_engine: vllm"), (dict(loss_type="cispo"), "epsilon_high"),
        (dict(steps_per_generation=3, gradient_accumulation_steps=2), "multiple of gradient_accumulation"),
        (dict(num_generations=1), "at least 2"), (dict(reward_weights=[1.0, 2.0]), "1 entries"),
        (dict(replay_path="x"), "rollout_engine: replay"), (dict(temperature=0.0), "above 0"),
        (dict(adapter="lora", lora_dropout=0.1), "the one that samples"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        options(**changes)


def test_a_batch_that_tears_groups_names_sizes_that_would_do():
    with pytest.raises(ConfigError) as caught:
        grpo.generation_batch_size(options(num_generations=8, micro_batch_size=6), 2)
    assert "12 completions" in str(caught.value) and "4, 8" in str(caught.value)


def test_test_rewards_shows_columns_and_scores(task, small_checkpoint, tmp_path):
    arguments = embedded(task, small_checkpoint[0], tmp_path / "out", "rows=2")
    done = run_program(ROOT / "grpo.py", "test-rewards", *arguments)
    assert done.returncode == 0, done.stderr
    assert "answer" in done.stdout and "many_g 0" in done.stdout
    done = run_program(ROOT / "grpo.py", "test-rewards", *arguments, "completions=[gggg, g]")
    assert "many_g 1" in done.stdout and "many_g 0.5" in done.stdout, done.stderr
    done = run_program(ROOT / "grpo.py", "test-rewards", *arguments, "source=generate")
    assert done.returncode == 0 and "scores of 2 completions" in done.stdout


def test_serve_shows_the_command_of_this_config(task, small_checkpoint, tmp_path):
    arguments = embedded(task, small_checkpoint[0], tmp_path / "out", "rollout_engine=vllm", "adapter=lora",
    "lora_r=12",
                         "vllm_server_base_url=[http://127.0.0.1:8123]", "vllm_python=/bin/echo")
    done = run_program(ROOT / "grpo.py", "serve", *arguments)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    for part in (f"--model {small_checkpoint[0].resolve()}", "--port 8123", "--max-lora-rank 16",
                 "--logprobs-mode processed_logprobs", "vllm_worker.WeightReceiver",
                 "--host 127.0.0.1"):
        assert part in command


def test_a_server_that_is_not_there_ends_the_run_with_one_line(task, small_checkpoint, tmp_path):
    arguments = embedded(task, small_checkpoint[0], tmp_path / "out", "rollout_engine=vllm", "vllm_timeout=1",
                         "vllm_server_base_url=[http://127.0.0.1:9]")
    done = run_grpo(*arguments, code=2)
    assert "http://127.0.0.1:9: no healthy answer for 1 s" in done.stderr and "grpo.py serve" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_file_is_read_by_its_recipe(file):
    import ebft
    import sft
    from run.config import parse_config

    text = file.read_text()
    recipe = grpo if "reward_funcs:" in text else ebft if "\nmode:" in text else sft
    config = parse_config(recipe.Config, ["--config", str(file)])
    assert config.output_dir.startswith("outputs/")


def test_a_reward_that_applies_to_no_completion_stops_the_run_with_the_reason(
    small_checkpoint, task, tmp_path
):
    (tmp_path / "nothing.py").write_text(
        "def never(completions, **_):\n    return [None] * len(completions)\n"
        "def spread(completion_ids, **_):\n    return [sum(ids) % 101 / 101 for ids in completion_ids]\n"
    )
    (tmp_path / "c.yaml").write_text(
        f"base_model: {small_checkpoint[0]}\ndatasets: [{{path: {task / 'rows.jsonl'}, type: chat}}]\n"
        "num_generations: 4\nmax_completion_length: 4\nmax_steps: 2\n"
    )
    arguments = ["--config", str(tmp_path / "c.yaml"), f"output_dir={tmp_path / 'out'}"]
    done = run_grpo(*arguments, "reward_funcs=[nothing.never]", code=2)
    assert "never returned None for all" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    done = run_grpo(*arguments, "reward_funcs=[nothing.never, nothing.spread]")
    assert done.stdout.count("reward never applies to none of the first 8 completions") == 1
    last = metrics(tmp_path / "out")[-1]
    assert "rewards/never/mean" not in last and last["rewards/spread/mean"] > 0


@pytest.mark.parametrize("recipe", ["sft", "grpo"])
def test_a_learning_rate_of_0_is_said(recipe, small_checkpoint, task, tmp_path):
    own = ["reward_funcs=[letters.spread]", "num_generations=4"] if recipe == "grpo" else []
    (task / "zero.yaml").write_text(
        f"base_model: {small_checkpoint[0]}\ndatasets: [{{path: rows.jsonl, type: chat}}]\n"
    )
    done = run_program(
        ROOT / f"{recipe}.py", "--config", str(task / "zero.yaml"), f"output_dir={tmp_path}", "max_steps=1",
        "learning_rate=0", *own,
    )
    assert done.returncode == 0 and "learning_rate is 0: no weight will move" in done.stdout, done.stderr
