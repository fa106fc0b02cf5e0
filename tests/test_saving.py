"""Going on after an interruption: kills, signals, damage, other numbers of processes, locks."""

import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib

import pytest
import torch
from safetensors.torch import load_file

import sft
from checkpoints import saving
from conftest import ROOT, arguments, metrics, run_ok, run_program
from run import files
from run.config import BallastError, ConfigError

# Dropout draws random numbers in every step; evaluation and saving must not disturb them.
BUSY = dict(num_epochs=8, sequence_len=128, micro_batch_size=3, gradient_accumulation_steps=2, save_steps=3,
val_set_size=4, eval_steps=4,
            sample_packing=True, adapter="lora", lora_r=4, lora_dropout=0.2, merge_adapter=True)

WORKER = ROOT / "tests" / "worker.py"


def final_bytes(output_dir):
    return (output_dir / "final" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(small_checkpoint, chat_file, tmp_path_factory):
    """ranks → the output directory of a run that nothing interrupted."""
    made = {}

    def get(ranks):
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp(f"undisturbed-{ranks}") / "out"
            run_ok(
                WORKER,
                "plain",
                "-",
                *arguments(small_checkpoint, chat_file, made[ranks], **BUSY),
                ranks=ranks,
            )
        return made[ranks]

    return get


def start(probe, value, *args, ranks=1):
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launch, str(WORKER), probe, value, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=env,
        start_new_session=True,
    )


def wait_for_step(process, output_dir, step):
    """Until the run has written the metrics of `step`; fails if it ends before."""
    deadline = time.time() + 200
    while time.time() < deadline:
        path = output_dir / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError("no progress")


@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_at_random_steps_and_resume_gives_the_same_bytes(
    ranks, undisturbed, small_checkpoint, chat_file, tmp_path
):
    expected = undisturbed(ranks)
    total = metrics(expected)[-1]["step"]
    out = tmp_path / "out"
    args = arguments(small_checkpoint, chat_file, out, **BUSY)
    seed = random.randrange(1000)
    kills = sorted(random.Random(seed).sample(range(2, total), 2 if ranks == 1 else 1))
    for step in kills:
        process = start("slow", "0.05", *args, ranks=ranks)
        wait_for_step(process, out, step)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / "final").exists()
    run_ok(WORKER, "plain", "-", *args, ranks=ranks)
    assert final_bytes(out) == final_bytes(expected), f"kills after steps {kills}"
    ours, theirs = metrics(out), metrics(expected)
    assert [m["step"] for m in ours] == [m["step"] for m in theirs]  # no step is missing, none is there twice
    for a, b in zip(ours, theirs, strict=True):
        for key in ("train/loss", "train/grad_norm", "num_tokens", "eval/loss"):
            assert a.get(key) == b.get(key), (a["step"], key)


@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_during_a_save_leaves_the_older_checkpoint_and_resumes_to_the_same_bytes(
    ranks, undisturbed, small_checkpoint, chat_file, tmp_path
):
    out = tmp_path / "out"
    args = arguments(small_checkpoint, chat_file, out, **BUSY)
    died = run_program(WORKER, "kill-in-save", "6", *args, ranks=ranks)
    assert died.returncode != 0
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert names == {"step-3", "latest", ".step-6"} and (out / "checkpoints/latest").read_text() == "step-3\n"
    run_ok(WORKER, "plain", "-", *args, ranks=ranks)
    assert not (out / "checkpoints/.step-6").exists()
    assert final_bytes(out) == final_bytes(undisturbed(ranks))


def test_sigterm_saves_exits_cleanly_and_the_same_command_goes_on(
    undisturbed, small_checkpoint, chat_file, tmp_path
):
    out = tmp_path / "out"
    args = arguments(small_checkpoint, chat_file, out, **{**BUSY, "save_steps": 1000})
    process = start("slow", "0.1", *args)
    wait_for_step(process, out, 4)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "the same command continues" in text
    assert [p.name for p in (out / "checkpoints").glob("step-*")]
    run_ok(WORKER, "plain", "-", *args)
    assert final_bytes(out) == final_bytes(undisturbed(1))


def test_a_checkpoint_goes_on_at_another_world_size(undisturbed, small_checkpoint, chat_file, tmp_path):
    """Without dropout one and two ranks compute the same; the optimiser is resharded."""
    options = {
        **BUSY,
        "lora_dropout": 0.0,
        "save_steps": 4,
        "max_steps": 8,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    one = arguments(small_checkpoint, chat_file, tmp_path / "one", **options)
    run_ok(WORKER, "plain", "-", *one)
    two = {**options, "gradient_accumulation_steps": 1, "max_steps": 8}
    mixed = tmp_path / "mixed"
    run_ok(
        WORKER,
        "plain",
        "-",
        *arguments(small_checkpoint, chat_file, mixed, **{**two, "max_steps": 5}),
        ranks=2,
    )
    # The run of 5 steps had another schedule: go on from a checkpoint of step 4 of the 8-step schedule
    # instead.
    import shutil

    shutil.rmtree(mixed)
    shutil.copytree(tmp_path / "one" / "checkpoints" / "step-4", mixed / "checkpoints" / "step-4")
    done = run_ok(WORKER, "plain", "-", *arguments(small_checkpoint, chat_file, mixed, **two), ranks=2)
    assert "match to rounding only" in done.stdout
    a, b = (load_file(d / "final" / "model.safetensors") for d in (tmp_path / "one", mixed))
    for name in a:
        assert (a[name] - b[name]).abs().max() < 1e-5, name


def test_save_total_limit_keeps_the_newest_and_a_damaged_checkpoint_gives_way_to_the_one_before(
    small_checkpoint, chat_file, tmp_path
):
    out = tmp_path / "out"
    args = arguments(
        small_checkpoint, chat_file, out, max_steps=6, save_steps=1, save_total_limit=2, save_async=False
    )
    run_ok(ROOT / "sft.py", *args)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["latest", "step-5", "step-6"]
    whole = final_bytes(out)

    def flip_a_bit(step):
        victim = next((out / f"checkpoints/step-{step}").glob("*.distcp"))
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
        return victim

    victim = flip_a_bit(6)
    done = run_program(ROOT / "sft.py", *args, f"resume={victim.parent}")
    assert done.returncode == 2 and "damaged" in done.stderr and victim.name in done.stderr
    shutil.rmtree(out / "final")
    done = run_ok(ROOT / "sft.py", *args)
    assert "step-6 is damaged and now damaged-step-6" in done.stdout and victim.name in done.stdout
    assert "resuming from" in done.stdout and final_bytes(out) == whole
    assert (out / "checkpoints/damaged-step-6").is_dir()

    flip_a_bit(5), flip_a_bit(6)
    done = run_program(ROOT / "sft.py", *args)
    assert done.returncode == 2 and "none of its 2 checkpoints is whole" in done.stderr


def test_two_runs_cannot_share_an_output_directory(small_checkpoint, chat_file, tmp_path):
    files.claim(tmp_path / "out")  # by this process
    files.claim(tmp_path / "out")  # its own is no other
    done = run_program(
        ROOT / "sft.py", *arguments(small_checkpoint, chat_file, tmp_path / "out", max_steps=1)
    )
    assert done.returncode == 2 and f"process {os.getpid()} on" in done.stderr
    assert not (tmp_path / "out" / "run.log").exists()


def test_a_checkpoint_made_to_run_code_is_refused(small_checkpoint, chat_file, tmp_path):
    """DCP's index and its plain values are pickles: what they may name is limited."""
    out = tmp_path / "out"
    args = arguments(small_checkpoint, chat_file, out, max_steps=2, save_steps=1)
    run_ok(ROOT / "sft.py", *args)
    path = out / "checkpoints/step-1"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "broken in"),)

    (path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    sums = {p.name: [p.stat().st_size, zlib.crc32(p.read_bytes())]
            for p in path.iterdir() if p.name != "checksums.json"}
    (path / "checksums.json").write_text(json.dumps(sums))
    done = run_program(ROOT / "sft.py", *args, f"resume={path}")
    assert done.returncode == 2 and "posix.mkdir, which none of ours does" in done.stderr

    class Member:  # as an older Python writes a member of an Enum; and the same with what is none
        def __init__(self, of, name):
            self.of = (of, name)

        def __reduce__(self):
            return getattr, self.of

    encoding = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    contiguous = pickle.dumps(Member(encoding, "TORCH_CONTIGUOUS_FORMAT"))
    assert saving._Unpickler(io.BytesIO(contiguous)).load() is encoding.TORCH_CONTIGUOUS_FORMAT
    with pytest.raises(BallastError, match="asks for __class__"):
        saving._Unpickler(io.BytesIO(pickle.dumps(Member(torch.float32, "__class__")))).load()
    value = io.BytesIO()
    torch.save({"rate": Hostile()}, value)
    value.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        saving._Planner().load_bytes(None, value)
    assert not (tmp_path / "broken in").exists()


def test_resuming_another_run_is_refused_by_key(small_checkpoint, chat_file, tmp_path):
    out = tmp_path / "out"
    args = arguments(small_checkpoint, chat_file, out, max_steps=4, save_steps=2)
    run_ok(ROOT / "sft.py", *args)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(chat_file.read_text().splitlines(keepends=True)[:30]))
    for change, named in (
        ("seed=6", "seed"), ("micro_batch_size=2", "micro_batch_size"),
        (f"datasets=[{{path: {other}, type: chat}}]", "resume_with_new_data"),
        ("resume=never", "output_dir"), ("resume=nowhere", "resume"), ("optimizer=muon", "optimizer"),
    ):
        done = run_program(ROOT / "sft.py", *args, change)
        assert done.returncode == 2 and named in done.stderr and len(done.stderr.strip().splitlines()) == 1, (
            done.stderr
        )
    run_ok(
        ROOT / "sft.py",
        *args,
        f"datasets=[{{path: {other}, type: chat}}]",
        "resume_with_new_data=true",
        "max_steps=5",
    )


def test_resume_is_also_a_switch():
    from run.config import parse_config

    given = ["base_model=x", "datasets=[{path: y}]"]
    meanings = {"true": "auto", "false": "never", "auto": "auto", "never": "never", "a/b": "a/b"}
    for text, meant in meanings.items():
        assert parse_config(sft.Config, [*given, f"resume={text}"]).resume == meant
    with pytest.raises(ConfigError, match="resume: '' names nothing"):
        parse_config(sft.Config, [*given, "resume=''"])


def test_a_link_that_stands_for_the_final_folder_is_replaced_as_often_as_it_is_written(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "final").symlink_to(elsewhere)
    for number in range(3):
        aside = tmp_path / ".final"
        aside.mkdir()
        (aside / "number").write_text(str(number))
        files.publish(aside, tmp_path / "final")
        assert (tmp_path / "final" / "number").read_text() == str(number)
    assert elsewhere.is_dir() and not list(tmp_path.glob(".final*"))
