"""Where a run is started: encodings, terminals, variables that launchers leave, and outputs that fail."""

import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import sft
from conftest import ROOT, arguments, metrics, run_program
from health.monitor import MetricLogger

STEPS = dict(max_steps=3, logging_steps=1)


def start(given, cwd=ROOT, script="sft.py", **env):
    command = [sys.executable, str(ROOT / script), *given]
    changed = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    return subprocess.run(command, cwd=cwd, env=changed, capture_output=True, timeout=300)


ENCODINGS = [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"},
             {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}]


@pytest.mark.parametrize("env", ENCODINGS, ids=["ascii", "latin-1", "C"])
def test_a_run_ends_well_whatever_the_encoding_of_its_output(env, small_checkpoint, chat_file, tmp_path):
    done = start(arguments(small_checkpoint, chat_file, tmp_path / "out", val_set_size=4, **STEPS), **env)
    assert done.returncode == 0, done.stderr
    assert b"held-out loss" in done.stdout and b"->" in done.stdout
    assert b"UnicodeEncodeError" not in done.stderr
    given = [f"datasets=[{{path: {chat_file}, type: chat}}]", f"base_model={small_checkpoint[0]}"]
    shown = start(["inspect", *given], script="data.py", **env)
    assert shown.returncode == 0 and b"trained tokens" in shown.stdout


def test_a_path_of_bytes_that_are_no_text_is_read_and_named(small_checkpoint, chat_file, tmp_path):
    odd = os.fsencode(tmp_path) + b"/d\xe9j\xe0.jsonl"
    with open(odd, "wb") as file:
        file.write(chat_file.read_bytes() + b"not json\n")
    config = {"base_model": str(small_checkpoint[0]), "datasets": [{"path": str(tmp_path), "type": "chat"}]}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    done = start(["--config", str(tmp_path / "c.yaml"), f"output_dir={tmp_path / 'out'}", "max_steps=1"])
    assert done.returncode == 2 and b"is not valid JSON" in done.stderr and b"Traceback" not in done.stderr


def test_no_colour_and_dumb_terminals_are_honoured_by_all_output():
    from run import terminal

    class Terminal:
        def isatty(self):
            return True

    def both(**env):
        old = {name: os.environ.pop(name, None) for name in ("NO_COLOR", "TERM")}
        os.environ.update(env)
        try:
            return terminal.has_colour(Terminal()), terminal.is_terminal(Terminal())
        finally:
            for name in env:
                del os.environ[name]
            os.environ.update({name: value for name, value in old.items() if value is not None})

    assert both(TERM="xterm") == (True, True) and both(TERM="xterm", NO_COLOR="") == (True, True)
    assert both(TERM="xterm", NO_COLOR="1") == (False, True) and both(TERM="dumb") == (False, False)
    folders = ("", "run/", "text/", "health/", "rollouts/")
    for path in (path for folder in folders for path in ROOT.glob(folder + "*.py")):
        if path.name not in ("terminal.py", "chat.py"):
            assert ".isatty()" not in path.read_text(), path


def test_a_command_that_is_printed_can_be_pasted(small_checkpoint, chat_file, tmp_path):
    out = tmp_path / "my run's"
    done = start(arguments(small_checkpoint, chat_file, out, **STEPS))
    line = re.search(r"talk to it\s+(python .*)", done.stdout.decode())[1]
    assert shlex.split(line) == ["python", "model.py", "chat", str(out / "final")]


@pytest.mark.parametrize("env, named", [
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE"), ({"WORLD_SIZE": ""}, "WORLD_SIZE"), ({"RANK": "x"}, "RANK"),
    ({"RANK": "0"}, "MASTER_ADDR"), ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "taken"}, "MASTER_PORT"),
])
def test_variables_of_launchers_that_do_not_fit_are_named(env, named, small_checkpoint, chat_file, tmp_path):
    clean = dict.fromkeys(("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        if env.get("MASTER_PORT") == "taken":
            env = {**env, "MASTER_PORT": str(taken.getsockname()[1])}
        done = start(arguments(small_checkpoint, chat_file, tmp_path / "out", **STEPS), **{**clean, **env})
    errors = done.stderr.decode()
    assert done.returncode == 2 and "Traceback" not in errors, errors
    assert named in re.search("^error: (.*)$", errors, re.MULTILINE)[1]


# ------------------------------------------------------------------------------------------------------------
# What only reports never ends a run
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "run.log", "config.yaml", "report.html"])
def test_a_sink_that_cannot_be_written_does_not_end_the_run(name, small_checkpoint, chat_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    if name == "tensorboard":
        (out / name).write_text("in the way")
    else:
        (out / name / "in the way").mkdir(parents=True)
    done = run_program("sft", *arguments(small_checkpoint, chat_file, out, max_steps=12, logging_steps=1))
    assert done.returncode == 0 and (out / "final" / "model.safetensors").exists(), done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert name in done.stdout or "report" in done.stdout


def test_a_disk_that_is_full_for_the_metrics_alone_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ballast"), "propagate", True)
    config = sft.Config(base_model="x", datasets=[{"path": "y"}], output_dir=str(tmp_path))
    logger = MetricLogger(config, tmp_path, main=True, first_step=0, total_steps=3)
    logger.file = open("/dev/full", "w")  # noqa: SIM115 - the logger closes it
    for step in (1, 2, 3):
        logger.log(step, {"loss": 1.0})
    logger.close()
    assert caplog.text.count("metrics.jsonl cannot be written, the run continues without it") == 1


def test_wandb_without_a_key_is_found_out_before_the_model_is_loaded(small_checkpoint, chat_file, tmp_path):
    given = arguments(small_checkpoint, chat_file, tmp_path / "out", wandb_project="p", **STEPS)
    clean = dict(WANDB_API_KEY=None, WANDB_MODE=None, HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    done = start(given, **clean)
    errors = done.stderr.decode()
    assert done.returncode == 2 and "wandb_project" in errors and "WANDB_API_KEY" in errors
    assert "Traceback" not in errors and b"parameters" not in done.stdout
    done = start(given, **{**clean, "WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_of_a_terminal_or_a_scheduler_saves_and_stops(number, small_checkpoint, chat_file, tmp_path):
    out = tmp_path / "out"
    given = arguments(small_checkpoint, chat_file, out, max_steps=5000, logging_steps=1)
    command = [sys.executable, str(ROOT / "sft.py"), *given]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and not ((out / "metrics.jsonl").exists() and metrics(out)):
        time.sleep(0.1)
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "the same command continues" in text
    assert list((out / "checkpoints").glob("step-*"))


def test_the_config_of_a_run_starts_it_again_from_any_folder(small_checkpoint, chat_file, tmp_path):
    (tmp_path / "job").mkdir()
    model = os.path.relpath(small_checkpoint[0], tmp_path / "job")
    data = os.path.relpath(chat_file, tmp_path / "job")
    (tmp_path / "job" / "c.yaml").write_text(
        f"base_model: {model}\ndatasets: [{{path: {data}, type: chat}}]\nmax_steps: 2\nadapter: lora\n"
    )
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = start(["--config", "c.yaml", f"output_dir={out}"], cwd=tmp_path / "job")
    assert done.returncode == 0, done.stderr
    again = start(["--config", str(out / "config.yaml"), f"output_dir={tmp_path / 'again'}"], cwd=elsewhere)
    assert again.returncode == 0, again.stderr
    command = [sys.executable, str(ROOT / "model.py"), "chat", str(out / "final"), "--max-new-tokens", "2"]
    talk = subprocess.run(
        command, input="Hi\n", cwd=elsewhere, capture_output=True, text=True, timeout=120
    )
    assert talk.returncode == 0, talk.stderr
    adapter = json.loads((out / "final" / "adapter_config.json").read_text())
    assert os.path.isabs(adapter["base_model_name_or_path"])
    assert torch.isfinite(torch.tensor([row["loss"] for row in metrics(out) if "loss" in row])).all()
