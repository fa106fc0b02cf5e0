"""Rules: each speaks of its own illness within its window, names the user's own options, and is silent on
what is healthy."""

import json
import subprocess

import pytest

from conftest import ROOT, falling, run_program
from health.monitor import FORMATS, made_by
from health.report import judge, read_history
from health.rules import RULES
from run.config import ConfigError

NAMES = {*FORMATS, *(name for rule in RULES for name in rule.metrics), "ebft/alignment", "ebft/cfm_loss"}


@pytest.mark.parametrize("metric", FORMATS)
def test_a_name_on_the_console_reads_as_no_other_metric(metric):
    """`clipped` was PPO's ratio, and read as completions/clipped_ratio, which the reference page flags."""
    label, own = FORMATS[metric][0], metric.rpartition("/")[2]
    for other in NAMES - {metric}:
        last = other.rpartition("/")[2]
        assert last != label or own == label, other
        assert not last.startswith(label) or own.startswith(label), other
    assert [label for label, _ in FORMATS.values()].count(label) <= 2  # sft's and grpo's norm


# ------------------------------------------------------------------------------------------------------------
# Histories of finished runs
# ------------------------------------------------------------------------------------------------------------


def test_histories_of_other_trainers_get_the_same_verdicts(tmp_path):
    losses = [*falling(3.0, 1.0, 60), 6.0]
    rows = [{"step": i, "train/loss": x, "train/grad_norm": 1.0} for i, x in enumerate(losses, 1)]
    ours = tmp_path / "ours" / "metrics.jsonl"
    ours.parent.mkdir()
    ours.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trl = tmp_path / "trainer_state.json"
    log = [{"step": r["step"], "loss": r["train/loss"], "grad_norm": 1.0, "epoch": 0.1} for r in rows]
    trl.write_text(json.dumps({"log_history": log, "global_step": 61}))
    wandb = tmp_path / "export.csv"
    wandb.write_text(
        '"Step","run-1 - train/loss"\n' + "".join(f"{r['step']},{r['train/loss']}\n" for r in rows)
    )
    for path in (ours.parent, ours, trl, wandb):
        doctor, verdicts = judge(*read_history(path))
        assert list(doctor.ever) == ["loss_spike"] and doctor.ever["loss_spike"].step == 61
        assert "loss_spike: train/loss 6 after a median of" in verdicts[0].line({})
    grpo_log = tmp_path / "rl.json"
    log = [{"step": i, "loss": 0.0, "grad_norm": 0.5, "reward": 0.4, "entropy": 0.005} for i in range(1, 20)]
    grpo_log.write_text(json.dumps({"log_history": log}))
    assert list(judge(*read_history(grpo_log))[0].ever) == ["entropy_collapse"]


@pytest.mark.parametrize("name, text", [
    ("x.json", "{"), ("x.json", "{}"), ("x.jsonl", "[1]\n"), ("x.jsonl", ""), ("x.csv", "Step\n"),
])
def test_what_is_no_history_is_said_in_a_line(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        read_history(tmp_path / name)
    done = run_program("health", "diagnose", str(tmp_path / name))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------
# Live runs
# ------------------------------------------------------------------------------------------------------------


def sft(checkpoint, rows, out, *options, ranks=1):
    return run_program(
        ROOT / "sft.py", f"base_model={checkpoint}", f"datasets=[{{path: {rows}, type: chat}}]",
        f"output_dir={out}", "micro_batch_size=4", "max_steps=60", "num_epochs=20", "lr_scheduler=constant",
        *options, ranks=ranks,
    )


def test_a_healthy_run_says_so_once_and_nothing_else(small_checkpoint, chat_file, tmp_path):
    done = sft(small_checkpoint[0], chat_file, tmp_path, "learning_rate=1e-3", "max_steps=40")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("health")]
    assert lines == ["health              well from beginning to end"]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["health/alarms"] == 0.0
    assert run_program("health", "diagnose", str(tmp_path)).returncode == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_unhealthy_run_stops_where_that_is_asked_for(ranks, small_checkpoint, chat_file, tmp_path):
    harm = ("learning_rate=3.0", "max_grad_norm=1e9")
    done = sft(
        small_checkpoint[0], chat_file, tmp_path / "stop", *harm, "on_unhealthy={critical: stop}", ranks=ranks
    )
    assert done.returncode != 0 and "stopped by on_unhealthy, without a checkpoint" in done.stderr
    assert not (tmp_path / "stop" / "checkpoints").exists() or not list(
        (tmp_path / "stop" / "checkpoints").iterdir()
    )
    done = sft(
        small_checkpoint[0],
        chat_file,
        tmp_path / "save",
        *harm,
        "on_unhealthy=checkpoint_and_stop",
        ranks=ranks,
    )
    assert done.returncode != 0 and "saved and stopped by on_unhealthy" in done.stderr
    assert list((tmp_path / "save" / "checkpoints").glob("step-*"))


def test_health_off_judges_nothing(small_checkpoint, chat_file, tmp_path):
    done = sft(
        small_checkpoint[0], chat_file, tmp_path, "learning_rate=3.0", "max_grad_norm=1e9", "health=false"
    )
    assert done.returncode == 0 and "\nhealth" not in done.stdout
    assert "health/alarms" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_finished_run_is_judged_by_what_it_was_judged_by_while_it_ran():
    """Not by the evaluation before its first step, which a run of EBFT may leave behind for good."""
    rows = [{"step": 0, "eval/loss": 1.0, "health/alarms": 0.0}]
    rows += [{"step": 25 * i, "eval/loss": 1.2 - 0.01 * i, "kl": 0.1} for i in range(1, 8)]
    _, verdicts = judge(rows, {})
    assert not verdicts
    _, verdicts = judge([{**rows[0], "train/loss": 1.0}, *rows[1:]], {})  # of a run that counts from 0
    assert [v.rule.name for v in verdicts] == ["overfitting"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a clone has a commit")
def test_a_clone_tells_its_commit():
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"commit {head.stdout.strip()}" in made_by()
