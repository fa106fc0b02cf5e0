"""What holds for every recipe whatever happens around it: the number of processes, processes that die or
hang, what must never be written down. Crashes, full disks and bad input have programs of their own:
bench/crash.py, bench/fuzz.py, bench/long.py; their short forms run in CI."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from conftest import ROOT, arguments, embedded, metrics, run_ok, run_program
from grpo import Config as GrpoConfig
from run.config import ConfigError, load_yaml, one_line, parse_config, shown

WORKER = ROOT / "tests" / "worker.py"
# 37 rows in steps of 8: the last step of an epoch has 5, and with 4 ranks one has none. Adam's epsilon:
# at 1e-8 an element whose gradient is rounding noise moves by the learning rate all the same.
EIGHT = dict(num_epochs=2, learning_rate=1e-3, save_steps=5, save_total_limit=9, adam_epsilon=1e-4)
MESHES = {"1": (1, {}), "2": (2, {}), "4": (4, {}), "4 replicated": (4, {"hsdp_shard_size": 1}),
          "4 hybrid": (4, {"hsdp_shard_size": 2})}


def gap(a, b) -> float:
    """The largest difference of two checkpoints' weights."""
    one, two = (load_file(d / "model.safetensors") for d in (a, b))
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def trained(small_checkpoint, chat_file, tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            ranks, more = MESHES[name]
            made[name] = tmp_path_factory.mktemp("ranks") / "out"
            how = {**EIGHT, **more, "micro_batch_size": 8 // ranks}
            run_ok(ROOT / "sft.py", *arguments(small_checkpoint, chat_file, made[name], **how), ranks=ranks)
        return made[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MESHES if name != "1"])
def test_losses_and_weights_do_not_depend_on_the_number_of_processes(name, trained, small_checkpoint):
    alone, many = metrics(trained("1")), metrics(trained(name))
    assert len(alone) == len(many) == 10
    for a, b in zip(alone, many, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-6), a["step"]
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-5)
    one, many = trained("1") / "final", trained(name) / "final"
    assert gap(one, many) < 1e-6 < 1e-4 < gap(one, small_checkpoint[0])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_checkpoint_of_two_processes_goes_on_on_one_and_on_four(
    ranks, trained, small_checkpoint, chat_file, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(trained("2") / "checkpoints" / "step-5", out / "checkpoints" / "step-5")
    how = {**EIGHT, "micro_batch_size": 8 // ranks}
    done = run_ok(ROOT / "sft.py", *arguments(small_checkpoint, chat_file, out, **how), ranks=ranks)
    assert "made by 2 processes" in done.stdout
    assert gap(out / "final", trained("2") / "final") < 1e-6


# Every mesh trains on what one process has sampled: 16 completions (or blocks' documents) a step.
STEP = {"grpo": 16, "ebft": 16, "strided": 8}


@pytest.fixture(scope="module")
def replayed(small_checkpoint, task, texts, tmp_path_factory):
    """(recipe, mesh) → the output_dir of its run of four steps; `from_step_2_of` another mesh's."""
    made = {}

    def command(recipe, out, *more):
        checkpoint = small_checkpoint[0]
        # Where a gradient is rounding noise, Adam makes a step of learning_rate out of it but for epsilon
        last = (
            "max_steps=4",
            "save_steps=2",
            "val_set_size=0",
            "learning_rate=1e-3",
            "adam_epsilon=1e-4",
            *more,
        )
        if recipe == "grpo":
            spread = "reward_funcs=[letters.many_g, letters.spread]"
            return [ROOT / "grpo.py", *embedded(task, checkpoint, out, spread, "beta=0.01", *last)]
        common = [f"base_model={checkpoint}", f"output_dir={out}", "temperature=1.0"]
        if recipe == "ebft":
            data = f"datasets=[{{path: {task / 'rows.jsonl'}, type: chat}}]"
            return [ROOT / "ebft.py", *common, data, "num_generations=4", "max_completion_length=8", *last]
        mode = ["mode=strided", "stride=4", "generate_max_len=4", "n_samples_per_prompt=3", "ce_coef=0.1"]
        return [ROOT / "ebft.py", *common, f"datasets=[{{path: {texts}, type: text}}]", *mode, *last]

    def get(recipe, mesh, from_step_2_of=None):
        key = (recipe, mesh, from_step_2_of)
        if key not in made:
            out = made[key] = tmp_path_factory.mktemp("replay") / "out"
            ranks, more = MESHES[mesh]
            size = f"micro_batch_size={STEP[recipe] // ranks}"
            if mesh == "1" and not from_step_2_of:
                run_ok(*command(recipe, out, size))
            else:
                if from_step_2_of:
                    shutil.copytree(get(recipe, from_step_2_of), out)
                    shutil.rmtree(out / "checkpoints" / "step-4")
                replay = [
                    "rollout_engine=replay",
                    f"replay_path={get(recipe, '1') / 'rollouts'}",
                    "datasets=[]",
                ]
                mesh_options = [f"{k}={v}" for k, v in more.items()]
                run_ok(*command(recipe, out, size, *replay, *mesh_options), ranks=ranks)
        return made[key]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "1"])
@pytest.mark.parametrize("recipe", STEP)
def test_the_same_samples_train_alike_on_any_number_of_processes(recipe, mesh, replayed, small_checkpoint):
    alone, many = (
        {row["step"]: row for row in metrics(replayed(recipe, name)) if "train/grad_norm" in row}
        for name in ("1", mesh)
    )
    assert alone.keys() == many.keys() == {1, 2, 3, 4}
    for step, row in alone.items():
        for name in ("train/loss", "kl", "entropy", "ebft/cfm_loss", "ebft/alignment", "reward"):
            assert (name in row) == (name in many[step])
            if name in row:
                assert many[step][name] == pytest.approx(row[name], rel=1e-5, abs=1e-6), (step, name)
        assert many[step]["train/grad_norm"] == pytest.approx(row["train/grad_norm"], rel=1e-4)
    one, many = replayed(recipe, "1"), replayed(recipe, mesh)
    assert gap(one / "final", many / "final") < 1e-6 < 1e-4 < gap(one / "final", small_checkpoint[0])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1", "4"])
@pytest.mark.parametrize("recipe", STEP)
def test_rl_goes_on_at_another_number_of_processes(recipe, mesh, replayed):
    went_on = replayed(recipe, mesh, from_step_2_of="2")
    assert "made by 2 processes" in (went_on / "run.log").read_text()
    assert gap(went_on / "final", replayed(recipe, "2") / "final") < 1e-6


@pytest.mark.parametrize("what", ["KILL", "STOP"])
def test_a_rank_that_dies_or_hangs_is_named_with_its_step_and_nobody_waits_for_ever(
    what, small_checkpoint, chat_file, tmp_path
):
    args = arguments(small_checkpoint, chat_file, tmp_path / "out", num_epochs=4, gpu_timeout_minutes=0.3)
    done = run_program(WORKER, "last-rank", f"{what}-3", *args, ranks=2, timeout=240)
    assert done.returncode != 0
    assert "error: rank 1 is in step 2, the others in step 3" in done.stderr, done.stderr[-2000:]


def test_the_slowest_rank_is_measured_and_named(small_checkpoint, chat_file, tmp_path):
    args = arguments(small_checkpoint, chat_file, tmp_path / "out", max_steps=31, micro_batch_size=2)
    done = run_ok(WORKER, "slow-rank", "0.3", *args, ranks=2)
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows if "ranks/slowness" in row] == [10, 20, 30]
    assert all(row["ranks/slowest"] == 1 for row in rows if "ranks/slowest" in row)
    assert "step 30: slow_rank: " in done.stdout


TOKEN = "hf_thisisasecretthatnobodymayread"


def test_tokens_are_never_written_down(small_checkpoint, chat_file, tmp_path):
    """Not in the log, the config, the metrics, the report or an incident of a run that fails."""
    out = tmp_path / "out"
    env = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "LOG_LEVEL": "DEBUG"}
    args = arguments(small_checkpoint, chat_file, out, num_epochs=4, save_steps=5)
    done = run_program(WORKER, "poison", "12", *args, env=env)
    assert done.returncode == 2 and (out / "incidents" / "step-12").is_dir()
    assert "step-12" in (out / "report.html").read_text()  # drawn also where a run ends in an error
    made = subprocess.run(
        [sys.executable, "-m", "health", "report", str(out)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **env},
    )
    assert made.returncode == 0, made.stderr
    files = [p for p in out.rglob("*") if p.is_file()]
    assert len(files) > 12
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in done.stdout + done.stderr + made.stdout + made.stderr


def test_a_password_in_a_servers_address_is_refused():
    given = ["base_model=x", "datasets=[{path: x, type: chat}]", "reward_funcs=[exact_match]",
             "rollout_engine=vllm", f"vllm_server_base_url=[http://me:{TOKEN}@host:8000]"]
    with pytest.raises(ConfigError) as refused:
        parse_config(GrpoConfig, given)
    assert "password" in str(refused.value) and TOKEN not in str(refused.value)


def test_an_error_is_one_line_that_a_terminal_can_show():
    assert one_line("a\nb\x1b[31m\ud800") == "a\\nb\\x1b[31m\\ud800"
    assert len(one_line("x" * 10**6)) < 1100
    assert len(shown([["x" * 500] * 500] * 500)) < 5000


def test_a_yaml_bomb_is_refused_before_it_is_written_out():
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(ConfigError, match="more than 100,000 values"):
        load_yaml(bomb, "c.yaml")
    with pytest.raises(ConfigError, match="contains itself"):
        load_yaml("a: &a [*a]", "c.yaml")
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_yaml("a: " + "[" * 5000, "c.yaml")
    assert load_yaml("a: &x {b: 1}\nc: *x", "c.yaml") == json.loads('{"a": {"b": 1}, "c": {"b": 1}}')
