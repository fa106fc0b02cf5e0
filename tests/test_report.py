"""The report: verdict first, every metric, text of samples as text; errors with a known cause explained."""

import json
import re
import shutil

import pytest

from conftest import run_program
from health import report
from run import loop

EVIL = "<script>alert('x')</script>"


@pytest.fixture
def run(tmp_path):
    """A finished run of 30 steps whose entropy collapsed, with an incident and samples."""
    path = tmp_path / "run"
    (path / "incidents" / "step-7").mkdir(parents=True)
    (path / "rollouts").mkdir()
    rows = [
        {"step": i, "reward": 0.2 + 0.01 * i, "entropy": 0.3 if i < 15 else 0.001, "grad_norm": 0.5}
        for i in range(1, 31)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.yaml").write_text("learning_rate: 0.001\ntemperature: 0.6\nbase_model: " + repr(EVIL))
    incident = {
        "step": 7,
        "says": "it",
        "advice": "do",
        "rows": [{"name": "a:1", "first": 0, "last": 2, "text": EVIL}],
    }
    (path / "incidents" / "step-7" / "report.json").write_text(json.dumps(incident))
    sample = {"prompt": "2+2", "completion": EVIL, "rewards": {"exact": 1.0}, "advantage": 0.5}
    (path / "rollouts" / "step-1.jsonl").write_text(json.dumps(sample) + "\n")
    return path


def test_the_verdict_comes_first_and_every_metric_is_drawn(run):
    page = report.render([run])
    assert page.index("entropy_collapse") < page.index("<svg")
    assert "1 incident" in page and "temperature is 0.6: try 0.8 to 1.0" in page
    assert page.count("<svg") == 3
    assert not re.search(r'(?:src|href)="http', page), "the page must need nothing from elsewhere"


def test_text_of_a_run_is_never_markup(run):
    page = report.render([run])
    assert EVIL not in page and page.count("&lt;script&gt;") == 3 and "default-src 'none'" in page


def test_runs_side_by_side(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    rows = [{"step": i, "entropy": 0.3, "kl": 0.1} for i in range(1, 31)]
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_program("health", "report", str(run), str(other), f"out={tmp_path / 'both.html'}")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "both.html").read_text()
    assert "well from beginning to end" in page and "entropy_collapse" in page and page.count("<svg") == 4
    assert run_program("health", "report", str(tmp_path / "none")).returncode == 2


def test_bands_are_the_pages_and_else_the_rules():
    assert report.band("entropy", {}) == (0.05, 0.5)
    assert report.band("ebft/cfm_unwhitened", {})[1] == 10.0
    assert report.band("train/learning_rate", {}) == (None, None)


# Messages as torch, NCCL, the hub and the system write them, and a word of the answer.
SEEN = {
    "RuntimeError: [unbound_buffer.cc:129] Timed out waiting 15000ms for recv operation": "gpu_timeout",
    "RuntimeError: [gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:3456": "exit code −9",
    "DistBackendError: NCCL error: unhandled system error, ncclSystemError": "NCCL_DEBUG",
    "RuntimeError: NCCL communicator was aborted on rank 1": "NCCL_DEBUG",
    "RuntimeError: CUDA error: device-side assert triggered": "CUDA_LAUNCH_BLOCKING",
    "CheckpointError: torch.utils.checkpoint: A different number of tensors was saved": "use_reentrant",
    "RuntimeError: Function 'MulBackward0' returned nan values in its 0th output.": "detect_anomaly",
    "RuntimeError: Data processing error: CAS service error : Reqwest Error": "HF_HUB_DISABLE_XET",
    "OSError: [Errno 28] No space left on device": "save_total_limit",
    "OSError: [Errno 30] Read-only file system: '/data/x'": "output_dir",
    "OutOfResources: triton: out of resource: shared memory, Required: 1": "triton/cache",
}


@pytest.mark.parametrize("message", SEEN, ids=[m[:40] for m in SEEN])
def test_an_error_of_the_pages_table_is_answered(message):
    name, _, text = message.partition(": ")
    said = loop.explain_error(type(name, (RuntimeError,), {})(text))
    assert said is not None and SEEN[message] in said and "\n" not in said


def test_an_unknown_error_is_left_alone():
    assert loop.explain_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_every_pattern_has_a_message_here():
    for pattern, _, _ in loop.ERRORS[:10]:
        assert any(re.search(pattern, m, re.IGNORECASE | re.DOTALL) for m in SEEN), pattern


def test_a_run_that_ended_in_an_error_is_not_called_well_until_it_has_gone_on(run):
    rows = [{"step": i, "entropy": 0.3} for i in range(1, 31)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(run / "incidents")
    stamp = "2026-11-26 01:20:06,010"
    ended = (
        f"{stamp} INFO step 3\n{stamp} DEBUG error: the disk is full\n{stamp} INFO health              none\n"
    )
    (run / "run.log").write_text(ended)
    page = report.render([run])
    assert "ended in an error" in page and "error: the disk is full" in page and "well from" not in page
    done = run_program("health", "diagnose", str(run))
    assert done.returncode == 1 and done.stdout == "ended in an error: the disk is full\n"
    (run / "run.log").write_text(ended + f"{stamp} INFO resuming\n")
    assert "well from beginning to end" in report.render([run])
