"""Rules: each speaks of its own illness within its window, names the user's own options, and is silent
else."""

import fnmatch
import math

import pytest
import yaml

import grpo
from conftest import falling, noisy
from health import checks, monitor
from health.doctor import MEASURED, Doctor, rules_of
from health.rules import RULES
from run.config import ConfigError, parse_config

CONFIG = {
    "learning_rate": 1e-3, "temperature": 0.6, "vllm_sync_interval": 4, "num_generations": 8, "beta": 0.0,
    "datasets": [{"path": "x", "type": "chat"}], "whitening": "none", "on_unhealthy": "warn", "lora_r": 16,
    "weight_decay": 0.1,
}


def config_for(name: str) -> dict:
    """CONFIG of a recipe that the rule is for."""
    rule = next(rule for rule in RULES if rule.name == name)
    more: dict = {"samples": {"reward_funcs": []}, "whitened_features": {"whitening": "feature"},
                  "has_reference": {"beta": 0.01, "reward_funcs": []}}.get(rule.guard or "", {})
    return CONFIG | more


def observed(metric: str, value: float | dict[str, float]) -> dict[str, float]:
    """A value of the metric, or it and what goes with it."""
    return value if isinstance(value, dict) else {metric: value}


# rule → (metric, healthy values, then ill ones, observations within which it must speak)
MOVING = {"weights/changed": 1.0, "train/grad_norm": 0.5}  # of a run whose optimiser works
ILL: dict[str, tuple[str, list, list, int]] = {
    "loss_stuck": ("train/loss", [], noisy(5.2, 80, 0.01), 70),
    "loss_plateau": ("train/loss", falling(8.0, 4.0, 100), noisy(4.0, 150, 0.01), 150),
    "loss_spike": ("train/loss", falling(3.0, 1.0, 60), [4.0], 1),
    "loss_diverging": ("train/loss", falling(3.0, 1.0, 60), [1.0 + 0.1 * i for i in range(40)], 30),
    "overfitting": ("eval/loss", [1.5, 1.2, 1.0, 0.9], [0.95, 1.1, 1.4, 2.0, 2.8], 4),
    "grad_norm_high": ("train/grad_norm", noisy(1.0, 40, 0.3), noisy(20.0, 10, 0.2), 5),
    "grad_norm_exploding": ("train/grad_norm", noisy(1.0, 40, 0.3), [250.0], 1),
    "grad_norm_vanishing": ("train/grad_norm", noisy(1.0, 40, 0.3), [1e-6] * 20, 20),
    "loss_mis_scaled": ("train/loss_consistency", [1.0] * 5, [0.93] * 4, 3),
    "samples_identical": ("ebft/pairwise_cosine", noisy(0.6, 10), [1.0] * 6, 5),
    "step_skipped": ("skipped_steps", [0.0] * 5, [1.0], 1),
    "few_trained_tokens": ("trained_token_share", noisy(0.3, 20), [0.001] * 6, 5),
    "trained_on_prompts": ("trained_token_share", [], [1.0] * 6, 5),
    "reward_stuck_at_zero": ("rewards/exact_match/mean", [], [0.0] * 25, 21),
    "no_signal": ("reward_std", noisy(0.3, 20), [0.0] * 12, 10),
    "all_groups_flat": ("frac_reward_zero_std", noisy(0.4, 20, 0.1), [1.0] * 12, 10),
    "flat_groups": ("frac_reward_zero_std", noisy(0.4, 20, 0.1), [0.9] * 25, 20),
    "entropy_collapse": ("entropy", falling(0.5, 0.2, 60), [0.008] * 12, 10),
    "entropy_high": ("entropy", noisy(0.4, 40, 0.2), [1.5] * 25, 20),
    "kl_high": ("kl", [0.01 * i for i in range(30)], [3.0] * 4, 3),
    "kl_drifting": ("kl", [0.01 * i for i in range(30)], [0.8] * 12, 10),
    "sampler_mismatch": ("sampling/sampling_logp_difference/mean", noisy(0.01, 30), [0.4] * 6, 5),
    "off_policy": ("sampling/sampling_logp_difference/mean", noisy(0.01, 30), [1.5] * 3, 2),
    "ratio_vanishing": ("sampling/importance_sampling_ratio/min", noisy(0.8, 30), [0.01] * 6, 5),
    "correction_wastes_samples": (
        "sampling/importance_sampling_ratio/effective_share", noisy(0.9, 30), [0.37] * 6, 5),
    "correction_drops_samples": (
        "sampling/importance_sampling_ratio/outside_share", noisy(0.02, 30), [0.4] * 6, 5),
    "clipping": ("clip_ratio/region_mean", noisy(0.02, 30), [0.5] * 6, 5),
    "length_creep": ("completions/mean_length", noisy(50, 60, 0.1), [50 * 1.03**i for i in range(60)], 45),
    "completions_clipped": ("completions/clipped_ratio", noisy(0.1, 30, 0.3), [0.95] * 6, 5),
    "samples_too_old": ("staleness/dropped_share", [0.0, 0.1] * 10, [0.4] * 6, 5),
    "stale_weights": ("weight_version_lag", [0.0, 1.0, 2.0, 3.0] * 5, [9.0] * 3, 2),
    "policy_gradient_large": ("train/grad_norm", noisy(0.5, 30, 0.5), [30.0] * 6, 5),
    "no_gradient": ("train/grad_norm", noisy(0.5, 30, 0.5), [0.0] * 11, 10),
    "reward_collapse": ("reward", [0.2 + 0.01 * i for i in range(50)], [0.1] * 25, 22),
    "nonfinite_activations": ("nonfinite_hidden_states", [0.0] * 5, [3.0], 1),
    "alignment_low": ("ebft/alignment_cosine", [], noisy(0.1, 45), 25),
    "alignment_falling": ("ebft/alignment_cosine", noisy(0.7, 40, 0.03), noisy(0.5, 20, 0.03), 12),
    "samples_alike": ("ebft/diversity", noisy(0.05, 20), [1.4] * 12, 10),
    "feature_distance_high": ("ebft/cfm_unwhitened", noisy(0.5, 20), [40.0] * 4, 3),
    "feature_distance_rising": ("ebft/cfm_unwhitened", falling(0.5, 0.1, 40), [0.6] * 15, 12),
    "diversity_drowns_alignment": ("ebft/reward", noisy(0.8, 20), [-0.2] * 12, 10),
    "whitening_failed": ("ebft/whitening_fallbacks", [0.0] * 5, [1.0], 1),
    "memory_creep": ("memory/max_alloc", [1.0] * 70, [1.0 + 0.02 * i for i in range(60)], 45),
    "step_time_jump": ("step_time", noisy(1.0, 60, 0.2), [5.0] * 8, 5),
    "data_starvation": ("step_time/data_share", noisy(0.02, 20), [0.8] * 12, 10),
    # Before the first step, and in it
    "labels_differ": ("data/labels_differ", [], [0.5], 1),
    "other_tokenizer": ("data/tokens_kept", [], [0.3], 1),
    "held_out_in_training": ("data/held_out_in_training", [], [0.8], 1),
    "held_out_shares_text": ("data/held_out_shared_text", [], [0.8], 1),
    "duplicates": ("data/copied", [], [0.6], 1),
    "one_row_dominates": ("data/most_frequent_row", [], [0.3], 1),
    "not_shuffled": ("data/order", [], [1.0], 1),
    "sorted_by_length": ("data/order_by_length", [], [0.9], 1),
    "sorted_by_start": ("data/order_by_start", [], [0.9], 1),
    "rows_cut_off": ("data/truncated", [], [0.6], 1),
    "answers_without_end": ("data/without_end", [], [1.0], 1),
    "broken_text": ("data/broken_text", [], [0.2], 1),
    "frozen_network_drifts": ("weights/frozen_answers_moved", [], [20.0], 1),
    "untrained_tokens": ("data/untrained_tokens", [], [0.1], 1),
    "new_tokens_unused": ("data/new_tokens_unused", [], [0.5], 1),
    "answer_in_prompt": ("data/answer_in_prompt", [], [1.0], 1),
    "held_out_too_small": ("data/held_out_rows", [], [1.0], 1),
    "prompts_cut": ("data/prompts_cut", [], [0.9], 1),
    "prompts_left_out": ("data/prompts_left_out", [], [0.9], 1),
    "weights_not_restored": ("data/weights_not_restored", [], [1.0], 1),
    "optimizer_not_restored": ("data/optimizer_not_restored", [], [1.0], 1),
    "sees_the_future": ("first_step/future", [], [40.0], 1),
    "documents_mix": ("first_step/documents", [], [40.0], 1),
    "documents_merged": ("first_step/documents_merged", [], [0.9], 1),
    "positions_wrong": ("first_step/positions_wrong", [], [0.5], 1),
    "padding_changes_result": ("first_step/padding", [], [40.0], 1),
    "not_repeatable": ("first_step/repeat", [], [40.0], 1),
    "dropout_unasked": ("first_step/mode", [], [40.0], 1),
    "targets_shifted": ("first_step/targets_next", [], [0.1], 1),
    "trained_on_padding": ("first_step/padding_targets", [], [0.4], 1),
    "first_loss_differs": ("first_step/loss_difference", [], [300.0], 1),
    "first_update_raises_loss": ("first_step/loss_change", [], [-1.0, -0.9], 2),
    "better_not_likelier": ("first_step/better_likelier", [], [-0.5, -0.4], 2),
    "worse_than_uniform": ("loss/over_uniform", [], [1.5], 1),
    "gradients_left_over": ("first_step/gradients_left", [], [
        {"first_step/gradients_left": 0.0, **MOVING}, {"first_step/gradients_left": 1.0, **MOVING}], 2),
    "frozen_network_differs": ("first_step/frozen_difference", [], [1.2], 1),
    "kl_at_start": ("kl", [], [0.4], 1),
    # Weights
    "learning_rate_zero": ("train/learning_rate", [], [0.0] * 4, 3),
    "weights_still": ("weights/changed", [], [{"weights/changed": 0.0, "train/grad_norm": 0.5}] * 4, 3),
    "updates_rounded_away": (
        "weights/changed", [], [{"weights/changed": 0.03, "train/grad_norm": 0.5}] * 4, 3),
    "updates_too_small": ("weights/moved", [], [{"weights/moved": 1e-9, "train/grad_norm": 0.5}] * 6, 5),
    "updates_too_large": ("weights/moved", [], [
        {"weights/moved": 0.3, "train/loss": 2.0 + k} for k in range(8)], 7),
    "tensor_not_trained": ("weights/still_tensors", [0.0] * 3, [0.2] * 5, 4),
    "frozen_unasked": ("weights/frozen_share", [], [0.99], 1),
    "only_decay_moves": ("weights/shrinking", [], [{
        "weights/shrinking": 1.0, "weights/moved": 1e-4, "train/learning_rate": 1e-3, "train/grad_norm": 0.5,
    }] * 4, 3),
    "update_is_decay": ("weights/shrinking", [0.01] * 4, [0.9] * 4, 3),
    "update_goes_uphill": ("weights/along_gradient", [], [-0.6] * 3, 2),
    "frozen_network_moves": ("weights/frozen_moved", [0.0] * 2, [1.0], 1),
    "same_rows_again": ("rows/distinct", [], [0.2] * 4, 3),
    "worse_than_frequencies": ("loss/over_frequencies", [], [1.5] * 20, 16),
    "answers_unrelated": ("answers/rotated_gain", [], [0.001, -0.002], 2),
    # Rollouts
    "reference_is_policy": ("kl", [], [{"kl": 0.0, "weights/moved": 1e-3}] * 10, 9),
    "ratio_not_one": ("ratio/first_use", [1e-7] * 3, [0.4], 1),
    "prompts_mixed_in_group": ("groups/mixed", [0.0] * 3, [1.0], 1),
    "same_prompts_again": ("prompts/repeated", [0.0] * 3, [1.0] * 5, 4),
    "identical_completions": ("completions/identical_groups", [0.1] * 3, [
        {"completions/identical_groups": 1.0, "entropy": 0.7}] * 4, 3),
    "scores_not_its_own": ("scores/alone_difference", [0.0] * 2, [1.0], 1),
    "reward_is_random": ("scores/noise_share", [], [0.9] * 7, 6),
    "reward_prefers_wrong": ("scores/own_answer_gain", [], [-2.0], 1),
    "advantage_against_reward": ("advantages/agreement", [0.99] * 3, [-0.9] * 3, 2),
    "advantages_off_centre": ("advantages/off_centre", [0.0] * 3, [0.6] * 3, 2),
    "advantages_off_scale": ("advantages/size", [0.8] * 3, [1e5] * 4, 3),
    "reward_not_learnt": ("reward", [], [
        {"reward": x, "reward_std": 0.3, "frac_reward_zero_std": 0.1} for x in noisy(0.5, 120, 0.02)], 105),
    "reward_dies": ("rewards/score/mean", noisy(0.6, 30, 0.05), [0.0] * 5, 4),
    "one_token_repeated": ("completions/repetition", noisy(0.02, 10), [0.9] * 6, 5),
    "length_pays": ("scores/correlation_with_length", [0.1] * 50, [0.97] * 21, 20),
    "limit_hit_for_reward": ("completions/clipped_ratio", [
        {"completions/clipped_ratio": 0.05, "reward": x} for x in noisy(0.2, 45, 0.02)], [
        {"completions/clipped_ratio": 0.9, "reward": x} for x in noisy(0.8, 20, 0.02)], 8),
    "samples_converge": ("ebft/spread", noisy(0.5, 25), [0.01] * 11, 10),
    "truths_misplaced": ("ebft/own_truth_gain", [], [0.01, -0.02] * 6, 10),
    "features_alike": ("ebft/truths_cosine", [0.6] * 5, [0.99999] * 6, 5),
    "slow_rank": ("ranks/slowness", noisy(1.05, 10), [2.4] * 4, 3),
}


def test_every_rule_has_a_case_here():
    own = {"learning_rate_off_schedule", "setting_out_of_bounds", "resume_jump", "optimizer_reset",
           "rows_again_after_resume"}
    assert set(ILL) | own == {rule.name for rule in RULES}
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("name", [name for name in ILL if not MEASURED.search(ILL[name][0])])
def test_a_run_that_is_resumed_hears_what_it_would_have_heard(name):
    metric, healthy, ill, _ = ILL[name]
    rows = [{"step": i, **observed(metric, v)} for i, v in enumerate([*healthy, *ill], 1)]
    config = config_for(name)
    whole = Doctor(config)
    said = [[v.line(CONFIG) for v in whole.observe(row["step"], row)] for row in rows]
    # What jumps in the first step after a resume is the resume's: it has rules of its own.
    jumps = metric in ("train/loss", "train/grad_norm", "weights/moved")
    for cut in (1, len(healthy) - jumps, len(rows) - len(ill) // 2):
        if cut < 1:
            continue
        doctor = Doctor(config)
        doctor.recall(rows[:cut])
        again = [[v.line(CONFIG) for v in doctor.observe(row["step"], row)] for row in rows[cut:]]
        assert again == said[cut:] and doctor.status == whole.status


@pytest.mark.parametrize("name", ILL)
def test_a_rule_speaks_within_its_window_and_only_then_and_is_over_when_it_is_over(name):
    metric, healthy, ill, within = ILL[name]
    doctor = Doctor(config_for(name))
    for step, value in enumerate(healthy, 1):
        assert doctor.observe(step, observed(metric, value)) == [], f"{value} at {step} is healthy"
    spoken = []
    for step, value in enumerate(ill, len(healthy) + 1):
        spoken += doctor.observe(step, observed(metric, value))
    first = next(v for v in spoken if v.rule.name == name)
    assert first.ill and first.step - len(healthy) <= within
    assert [v.rule.name for v in spoken if v.ill].count(name) == 1, "one line, not a flood"
    assert first.line(CONFIG).count("\n") == 0 and f"{metric} " in first.line(CONFIG)
    if healthy and first.rule.check in ("outside", "stays_at", "spike"):
        after = [healthy[-1]] * 60
        over = [v for k, x in enumerate(after) for v in doctor.observe(1000 + k, observed(metric, x))]
        assert name in {v.rule.name for v in over if not v.ill} and name not in doctor.status


def test_a_verdict_gives_the_figures_the_cause_and_the_options_with_their_values():
    doctor = Doctor(CONFIG)
    spoken = [v for step in range(1, 12) for v in doctor.observe(step, {"entropy": 0.008})]
    (verdict,) = spoken
    line = verdict.line(CONFIG)
    for words in ("step 10", "entropy 0.008 for 10 steps, below 0.01", "completions are becoming identical",
                  "temperature is 0.6: try 0.8 to 1.0", "learning_rate is 0.001: halve it"):
        assert words in line
    assert "max_grad_norm" not in line and "beta is 0: 0.01 to 0.1" in line
    at_one = verdict.line({**CONFIG, "temperature": 1.0, "beta": 0.05})  # nothing to tell about these
    assert "temperature" not in at_one and "beta" not in at_one
    assert doctor.status == "entropy_collapse"
    assert doctor.metrics() == {"health/alarms": 1.0, "health/entropy_collapse": 1.0}


def test_where_the_page_contradicts_itself_the_interval_goes_down():
    (rule,) = (r for r in RULES if r.name == "ratio_vanishing")
    assert ("vllm_sync_interval", "lower it: sync more often") in {fix[:2] for fix in rule.fixes}


def test_every_option_that_a_fix_names_exists():
    known = {f for recipe in ("sft", "grpo", "ebft") for f in __import__(recipe).Config.__dataclass_fields__}
    for rule in RULES:
        assert rule.cause and rule.says and rule.check in checks.CHECKS
        assert rule.fixes or rule.name == "setting_out_of_bounds", rule.name
        for pattern in rule.explains:
            assert fnmatch.filter([other.name for other in RULES], pattern), f"{rule.name}: {pattern}"
        for option, *_ in rule.fixes:
            assert option in known, f"{rule.name}: {option}"


def test_a_learning_rate_that_is_not_the_schedules_is_found():
    config = {**CONFIG, "lr_scheduler": "cosine", "warmup_steps": 5, "warmup_ratio": 0.0, "min_lr_ratio": 0.0}
    options = type("Options", (), config)()
    for wrong, expected in ((1.0, []), (0.5, ["learning_rate_off_schedule"])):
        doctor = Doctor(config, total_steps=40)
        for step in range(1, 41):
            rate = monitor.dist.learning_rate(step - 1, options, 40) * (wrong if step > 20 else 1.0)
            doctor.observe(step, {"train/learning_rate": rate})
        assert list(doctor.ever) == expected


def test_a_rule_reads_one_of_its_metrics_in_whatever_order_they_come():
    both = {"reward": 0.0, "reward_std": 0.2, "rewards/good/mean": 0.0}
    for metrics in (both, dict(reversed(both.items()))):
        doctor = Doctor(CONFIG)
        spoken = [v for step in range(1, 30) for v in doctor.observe(step, metrics)]
        assert [(v.rule.name, v.metric) for v in spoken] == [("reward_stuck_at_zero", "rewards/good/mean")]


def test_the_gravest_comes_first():
    doctor = Doctor(CONFIG)
    spoken = [v for s in range(1, 12) for v in doctor.observe(s, {"kl": 5.0, "clip_ratio/region_mean": 0.9})]
    assert next(v.rule.name for v in spoken if v.ill) == "kl_high"


def test_ranges_can_be_set_and_rules_switched_off():
    config = {**CONFIG, "health_rules": {"entropy_collapse": {"low": 0.1, "window": 2}, "kl_high": "off"}}
    doctor = Doctor(config)
    spoken = [v for s in range(1, 10) for v in doctor.observe(s, {"entropy": 0.05, "kl": 50.0})]
    assert {v.rule.name for v in spoken} == {"entropy_collapse"} and spoken[0].step == 2
    raw = Doctor({**CONFIG, "whitening": "none"})  # raw features of any two samples are alike
    assert "samples_alike" not in {rule.name for rule in raw.rules}


@pytest.mark.parametrize("rules, words", [
    ({"entropy_colapse": "off"}, "did you mean entropy_collapse"), ({"kl_high": "on"}, "must be off, or set"),
    ({"kl_high": {"hihg": 1}}, "must be off, or set"), ({"kl_high": {"window": 0}}, "kl_high.window: 0"),
    ({"kl_high": {"severity": "grave"}}, "kl_high.severity"), ({"kl_high": {"high": "x"}}, "kl_high.high"),
])
def test_a_mistake_in_health_rules_is_one_clear_line(rules, words):
    with pytest.raises(ConfigError, match=words):
        rules_of({**CONFIG, "health_rules": rules})


def test_options_of_health_are_read_from_yaml(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({
        "base_model": "x", "datasets": [{"path": "x"}], "reward_funcs": ["format"],
        "health_rules": {"kl_high": False, "entropy_collapse": {"low": 0.02}},
        "on_unhealthy": {"critical": "stop"},
    }))
    config = parse_config(grpo.Config, ["--config", str(file)])
    assert config.on_unhealthy == {"critical": "stop"} and config.health_rules["kl_high"] is False
    file.write_text(file.read_text().replace("critical: stop", "critical: explode"))
    with pytest.raises(ConfigError, match="on_unhealthy"):
        parse_config(grpo.Config, ["--config", str(file)])


def test_values_that_are_not_finite_are_left_to_the_forensics():
    doctor = Doctor(CONFIG)
    assert [v for s in range(30) for v in doctor.observe(s, {"entropy": math.nan, "kl": math.inf})] == []


def test_a_held_out_loss_that_climbs_with_the_training_loss_is_not_called_overfitting():
    train = falling(3.0, 1.0, 60) + [1.0 + 0.1 * i for i in range(60)]

    def spoken(train: list[float]) -> list[str]:
        doctor = Doctor(CONFIG, None)
        found = []
        for step, loss in enumerate(train, 1):
            held_out = (
                {} if step % 20 else {"eval/loss": loss + 0.1 if step <= 60 else 1.1 + 0.1 * (step - 60)}
            )
            found += [v.rule.name for v in doctor.observe(step, {"train/loss": loss, **held_out}) if v.ill]
        return found

    assert "loss_diverging" in spoken(train) and "overfitting" not in spoken(train)
    assert spoken(train[:60] + noisy(1.0, 60, 0.01)) == ["overfitting"]
