"""A stream of groups: how old they may be, and what updates, lost servers and checkpoints do to them."""

import json
import threading
import time

import numpy as np
import pytest
import torch
from fake_vllm import FakeVllm

from checkpoints.weights import load_pretrained
from conftest import ROOT, embedded, metrics, run_program
from data import Prompt
from dist import World
from grpo import Config
from rollouts.gate import Gate
from rollouts.queues import Stream
from rollouts.records import kept
from rollouts.vllm_client import VllmEngine
from rollouts.vllm_server import ServerLost, StaleServer
from run.config import ConfigError, parse_config
from text.tokenizer import Tokenizer

WORLD = World(0, 1, 0, torch.device("cpu"))


class Slow:
    """An engine whose completions are done when the test says so: those of the groups in `held` are not."""

    def __init__(self):
        self.gate, self.sent, self.stale = Gate(), 0, False
        self.held: set[int] = set()
        self.changed = threading.Condition()

    def go_on(self, era, place, number):
        begun = self.sent
        with self.changed:
            self.changed.wait_for(lambda: number not in self.held)
        with self.gate.passage(era):
            return [begun]

    def release(self, *numbers):
        with self.changed:
            self.held.difference_update(numbers)
            self.changed.notify_all()

    def check_versions(self):
        if self.stale:
            raise StaleServer("restarted")

    def abort(self):
        pass


def stream_of(engine, *, batch=2, updates=1, staleness=1, batches=100, n=2):
    def task(group, k):
        return lambda ask: {"prompt_ids": [group.index + 1], "completion_ids": [k + 1],
                            "sampling_logprobs": [-0.5],
                            "token_versions": np.array(ask(group.number), np.int32)}

    return Stream(engine, lambda number: number % 7, n, task, lambda group: {}, batch=batch, updates=updates,
                  staleness=staleness, batches=batches, workers=64)


@pytest.fixture
def slow():
    engine = Slow()
    yield engine
    engine.release(*range(1000))


def until_done(stream, count=None):
    """Wait until so many of its groups are done, or all."""
    deadline = time.monotonic() + 20
    while sum(g.done for g in stream.groups) < (len(stream.groups) if count is None else count):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def numbers(stream, count, step, last=False):
    state, groups = stream.take(count, step, last)
    assert state == "ok"
    return [g.number for g in groups]


@pytest.mark.parametrize(
    "updates, staleness, ahead", [(1, 1, 2), (1, 3, 4), (4, 1, 1), (4, 4, 2), (4, 7, 2), (4, 8, 3)]
)
def test_no_more_is_begun_than_can_be_used_in_time(updates, staleness, ahead, slow):
    """`ahead`: batches on their way when a batch is needed."""
    stream = stream_of(slow, updates=updates, staleness=staleness)
    stream.fill(0)
    assert stream.following == 2 * ahead
    lags = []
    for step in range(20):
        slow.sent = step
        number, used = divmod(step, updates)
        stream.fill(number + (used > 0))
        until_done(stream)
        if used == 0:
            _, groups = stream.take(2, step, last=False)
            lags += [step - g.oldest for g in groups]
            stream.fill(number + 1)
    assert max(lags) <= staleness and stream.dropped == 0
    assert max(lags[2 * ahead :]) > 0  # it does run ahead


def test_a_slow_group_does_not_hold_those_begun_after_it(slow):
    slow.held = {0}
    stream = stream_of(slow)
    stream.fill(0)
    until_done(stream, 3)
    assert numbers(stream, 2, 0) == [1, 2]
    slow.release(0)
    slow.sent = 1
    stream.fill(1)
    until_done(stream)
    assert numbers(stream, 2, 1) == [0, 3]  # the oldest first


def test_what_is_too_old_is_dropped_counted_and_begun_anew_and_then_waited_for(slow):
    slow.held = {0}
    stream = stream_of(slow)
    for step in range(3):
        slow.sent = step
        stream.fill(step)
        until_done(stream, len(stream.groups) - 1)
        got = numbers(stream, 2, step)
        assert 0 not in got
    assert stream.dropped == 2  # at step 2 its two completions would have been two updates old
    slow.sent = 3
    stream.fill(3)
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(numbers(stream, 2, 3)))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()  # begun anew at step 2: at step 4 it would be too old again
    slow.release(0)
    thread.join(10)
    assert 0 in found[0] and stream.dropped == 2


def test_what_waits_for_an_environment_and_has_no_token_yet_does_not_grow_old(slow):
    opened = threading.Event()

    def task(group, k):
        def run(ask):
            if group.number == 0:
                opened.wait(10)
            return {"prompt_ids": [1], "completion_ids": [1],
                    "token_versions": np.array(ask(group.number), np.int32)}

        return run

    stream = stream_of(slow)
    stream.task = task
    for step in range(5):
        slow.sent = step
        stream.fill(step)
        until_done(stream, len(stream.groups) - 1)
        assert 0 not in numbers(stream, 2, step)
    opened.set()
    until_done(stream)
    slow.sent = 5
    stream.fill(5)
    _, groups = stream.take(2, 5, last=False)
    assert (groups[0].number, groups[0].oldest) == (0, 4) and stream.dropped == 0


def test_the_last_batch_takes_what_is_left(slow):
    stream = stream_of(slow, batches=3)
    taken = []
    for step in range(3):
        slow.sent = step
        stream.fill(step)
        taken += numbers(stream, 2, step, last=step == 2)
    assert sorted(taken) == list(range(6)) and stream.following == 6 and not stream.groups


def test_after_a_lost_server_only_what_was_known_to_be_right_remains(slow):
    slow.held = {3}
    stream = stream_of(slow, staleness=5, batches=2)
    stream.fill(0)
    until_done(stream, 3)
    assert numbers(stream, 1, 0) == [0]
    stream.verify()
    slow.release(3)
    until_done(stream, 3)
    slow.stale, slow.sent = True, 2
    state, why = stream.take(3, 0, last=False)
    assert (state, why) == ("stale", "restarted")
    assert sorted(g.number for g in stream.groups if g.known) == [1, 2] and len(stream.groups) == 3
    slow.stale = False
    with slow.gate.shut(slow.abort):
        pass
    assert sorted(numbers(stream, 3, 2)) == [1, 2, 3]


def test_what_was_done_while_an_evaluation_mended_a_server_is_not_believed(slow):
    """The versions agree again, and yet nobody knows what a group of before was sampled with."""
    stream = stream_of(slow, staleness=5, batches=2)
    stream.fill(0)
    until_done(stream, 4)
    slow.gate.lost("seen by an evaluation", slow.gate.era)
    with slow.gate.shut(slow.abort):
        slow.sent = 3
    state, groups = stream.take(2, 3, last=False)
    assert state == "ok" and [g.oldest for g in groups] == [3, 3]


def test_a_checkpoint_keeps_what_is_done_and_names_what_is_not(slow):
    slow.held = {1}
    stream = stream_of(slow, batches=2)
    stream.fill(0)
    until_done(stream, 3)
    rollouts, state = stream.keep()
    state = json.loads(json.dumps(state))
    assert state == {"following": 4, "done": [[0, 0], [2, 0], [3, 0]], "begun": [[1, False]]}
    other = Slow()
    other.sent = 1
    again = stream_of(other, batches=2)
    again.restore(rollouts, state)
    again.fill(0)
    state, groups = again.take(4, 1, last=False)
    assert sorted(g.number for g in groups) == [0, 1, 2, 3]
    by_number = {g.number: g.rollouts(Prompt([1], "", {}, "f:1"), 1) for g in groups}
    assert [by_number[k][0].weight_version for k in range(4)] == [0, 1, 0, 0]
    assert by_number[2][1].completion_ids.tolist() == [2] and by_number[2][1].prompt_ids.tolist() == [3]


def test_an_error_on_a_thread_is_raised_where_a_batch_is_taken(slow):
    stream = stream_of(slow)
    stream.score = lambda group: 1 / 0
    stream.fill(0)
    with pytest.raises(ZeroDivisionError):
        stream.take(2, 0, last=False)


def test_nobody_passes_a_gate_that_is_shut_and_those_inside_are_asked_to_leave():
    gate, told, passed = Gate(), threading.Event(), []

    def inside():
        with gate.passage(0):
            told.wait(10)
        with gate.passage(0):
            passed.append(time.monotonic())

    thread = threading.Thread(target=inside)
    thread.start()
    with gate.shut(told.set):
        time.sleep(0.2)
        assert not passed
        opened = time.monotonic()
    thread.join(10)
    assert passed[0] >= opened and sum(end - begin for begin, end in gate.busy()) < 5
    gate.lost("gone", 0)
    with pytest.raises(ServerLost, match="gone"), gate.passage(0):
        pass
    gate.lost("the same loss, seen by another", 0)
    assert gate.trouble == "gone" and gate.era == 1


# ------------------------------------------------------------------------------------------------------------
# With an engine and a server
# ------------------------------------------------------------------------------------------------------------


def test_max_staleness_is_checked_against_what_it_needs():
    def parse(*more):
        return parse_config(Config, ["base_model=x", "datasets=[{path: x}]", "reward_funcs=[length]",
                                     "max_staleness=2", *more])

    parse("rollout_engine=vllm")
    for more, named in ((["rollout_engine=embedded"], "max_staleness"),
                        (["rollout_engine=vllm", "async_prefetch=true"], "async_prefetch"),
                        (["rollout_engine=vllm", "vllm_sync_interval=3"], "vllm_sync_interval")):
        with pytest.raises(ConfigError, match=named):
            parse(*more)


@pytest.fixture
def served(small_checkpoint, tmp_path):
    """(engine, its fake server, weights by version, update), where update(step) trains and sends."""
    fake = FakeVllm(small_checkpoint[0], "policy", token_seconds=0.02)
    config = parse_config(
        Config,
        ["datasets=[{path: x, type: chat}]", f"base_model={small_checkpoint[0]}", "rollout_engine=vllm",
         "vllm_model_name=policy", f"vllm_server_base_url=[{fake.url}]", "num_generations=2",
         "micro_batch_size=2", "max_completion_length=40", "reward_funcs=[length]", "temperature=0.8",
         f"vllm_sync_directory={tmp_path}"],
    )
    model = load_pretrained(str(small_checkpoint[0]), dtype=torch.float32).eval()
    asked = [Prompt([5, 6, 7], "", {}, "row 1")]
    engine, weights = VllmEngine(model, config, Tokenizer.load(small_checkpoint[0]), WORLD, asked), {}
    engine.stop_ids = []

    def update(step):
        if step:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.05 * torch.randn_like(p))
        weights[step] = {k: v.clone() for k, v in model.state_dict().items()}
        engine.sync(step)

    yield engine, fake, weights, update
    fake.close()


def deviation(model, weights, prompt, ids, logprobs, versions):
    """The largest difference between a token's log-prob and that under the weights of its version, after all
    that was written before it."""
    worst, whole = 0.0, torch.tensor([prompt + ids.tolist()])
    for version in set(versions.tolist()):
        model.load_state_dict(weights[version])
        with torch.no_grad():
            hidden, _ = model.hidden_states(whole)
            expected = (model.logits(hidden[0]).float() / 0.8).log_softmax(-1).numpy()
        for k in np.flatnonzero(versions == version):
            worst = max(worst, abs(expected[len(prompt) - 1 + k, ids[k]] - logprobs[k]))
    return worst


def test_a_completion_goes_on_with_new_weights_and_each_token_tells_which(served):
    engine, _, weights, update = served
    found, prompt = [], [5, 6, 7]
    update(0)
    thread = threading.Thread(
        target=lambda: found.extend(engine.go_on(engine.gate.era, 0, prompt, 1, 40, None, (1, 0)))
    )
    thread.start()
    for step in (1, 2):
        time.sleep(0.25)
        update(step)
    thread.join(30)
    (completion,) = found
    versions = completion.versions
    assert completion.finish_reason == "length" and len(completion.ids) == 40
    assert set(versions.tolist()) == {0, 1, 2} and (np.diff(versions) >= 0).all()
    assert deviation(engine.model, weights, prompt, completion.ids, completion.logprobs, versions) < 1e-4


def test_a_server_that_is_restarted_costs_what_was_on_its_way(served):
    """It has other weights then, and answers as before: nothing of them may be taken for the run's own."""
    engine, fake, weights, update = served
    fake.faults["token_seconds"] = 0.002

    def task(group, k):
        def run(ask):
            (c,) = ask([5, 6, 7 + group.index], 1, 12, None, (1, group.number, k))
            return {"prompt_ids": [5, 6, 7 + group.index], "completion_ids": c.ids,
                    "sampling_logprobs": c.logprobs, "token_versions": c.versions}

        return run

    stream = Stream(engine, lambda number: number % 7, 2, task, lambda group: {}, batch=2, updates=1,
                    staleness=2, batches=12, workers=8)
    taken, lost = [], 0
    for step in range(12):
        stream.verify()
        update(step)
        stream.fill(step)
        if step in (3, 7):
            fake.restart()
        while True:
            state, groups = stream.take(2, step, last=step == 11)
            if state == "ok":
                break
            lost += 1
            engine.restore(groups)
        taken += [(g.made[k], step) for g in groups for k in range(2)]
        stream.fill(step + 1)
    stream.close()
    assert lost >= 2 and len(taken) == 48
    for made, step in taken:
        versions = made["token_versions"]
        assert step - versions.min() <= 2
        of = (made["prompt_ids"], made["completion_ids"], made["sampling_logprobs"], versions)
        assert deviation(engine.model, weights, *of) < 1e-4


@pytest.fixture
def server(small_checkpoint):
    fake = FakeVllm(small_checkpoint[0], "policy", token_seconds=0.002)
    yield fake
    fake.close()


def stream_run(task, checkpoint, server, out, *more, **how):
    given = embedded(task, checkpoint, out, "rollout_engine=vllm", "vllm_model_name=policy",
                     f"vllm_server_base_url=[{server.url}]", f"vllm_sync_directory={out}", *more)
    out.mkdir(exist_ok=True)
    done = run_program(ROOT / "grpo.py", *given, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return [row for row in metrics(out) if "train/loss" in row]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_stays_within_its_bound_and_its_replay_has_the_same_losses(
    ranks, task, small_checkpoint, server, tmp_path
):
    rows = stream_run(
        task, small_checkpoint[0], server, tmp_path / "a", "max_staleness=2", "max_steps=6",
        f"micro_batch_size={8 // ranks}", "max_completion_length=24", ranks=ranks,
    )
    assert len(rows) == 6 and max(row["weight_version_lag"] for row in rows) in (1, 2)
    assert sum(row["staleness/through_updates"] for row in rows) > 0
    assert all(0 <= row["staleness/mean"] <= row["weight_version_lag"] for row in rows)
    if ranks > 1:
        return
    recorded = [json.loads(line) for file in (tmp_path / "a" / "rollouts").glob("step-*.jsonl")
                for line in file.read_text().splitlines()]
    mixed = [row for row in recorded if row.get("token_versions")]
    assert mixed and all(
        row["token_versions"] == sorted(row["token_versions"])
        and row["weight_version"] == row["token_versions"][0] < row["token_versions"][-1] <= row["step"]
        and len(row["token_versions"]) == len(row["completion_ids"]) for row in mixed
    )
    given = embedded(task, small_checkpoint[0], tmp_path / "b", "rollout_engine=replay", "max_steps=6",
                     f"replay_path={tmp_path / 'a' / 'rollouts'}", "max_completion_length=24")
    done = run_program(ROOT / "grpo.py", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    again = [row for row in metrics(tmp_path / "b") if "train/loss" in row]
    for name in ("train/loss", "train/grad_norm", "weight_version_lag",
                 "sampling/importance_sampling_ratio/min"):
        assert [row[name] for row in again] == [row[name] for row in rows], name


def test_a_stream_goes_on_after_a_checkpoint_with_what_was_done(task, small_checkpoint, server, tmp_path):
    more = ("max_staleness=3", "save_steps=2", "max_completion_length=16")
    stream_run(task, small_checkpoint[0], server, tmp_path / "a", *more, "max_steps=4")
    folder = tmp_path / "a" / "checkpoints" / "step-2"
    state = json.loads((folder / "trainer.json").read_text())["queue"]
    ahead = kept(folder, "ahead", {})
    assert len(ahead) == 4 * len(state["done"]) and state["following"] > 2
    import shutil

    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-4")
    rows = stream_run(task, small_checkpoint[0], server, tmp_path / "a", *more, "max_steps=4")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    later = [json.loads(line)["completion_ids"] for n in (2, 3)
             for line in (tmp_path / "a" / "rollouts" / f"step-{n}.jsonl").read_text().splitlines()]
    done_first = [r.completion_ids.tolist() for r in ahead]
    assert sum(ids in later for ids in done_first) >= min(len(done_first), 8)


@pytest.mark.parametrize("more", [["dynamic_sampling=2"], ["environment=turns.Turns", "reward_funcs=[]"]])
def test_a_stream_with_dynamic_sampling_or_an_environment(more, task, small_checkpoint, server, tmp_path):
    (task / "turns.py").write_text(
        "class Turns:\n"
        "    def reset(self, prompt, **columns):\n"
        "        self.turn = 0\n"
        "    def step(self, text, ids):\n"
        "        self.turn += 1\n"
        "        return ' more', len(set(ids)) / 10, self.turn == 2\n"
    )
    rows = stream_run(task, small_checkpoint[0], server, tmp_path / "a", "max_staleness=2", "max_steps=4",
                      "max_completion_length=24", *more)
    assert len(rows) == 4 and max(row["weight_version_lag"] for row in rows) <= 2


def test_of_two_servers_one_may_die_while_both_are_busy(task, small_checkpoint, server, tmp_path):
    """What it had on its way is sampled again by the other one."""
    other = FakeVllm(small_checkpoint[0], "policy", token_seconds=0.002)

    def die():
        while other.asked.count("/v1/completions") < 20:
            time.sleep(0.02)
        other.faults["dead"] = True

    thread = threading.Thread(target=die, daemon=True)
    thread.start()
    rows = stream_run(
        task, small_checkpoint[0], server, tmp_path / "a", "max_staleness=1", "max_steps=6",
        f"vllm_server_base_url=[{server.url}, {other.url}]", "vllm_allow_missing_servers=true",
        "vllm_timeout=2",
    )
    other.close()
    assert not thread.is_alive() and len(rows) == 6
    before = len(other.bodies)
    assert before < len(server.bodies) and max(row["weight_version_lag"] for row in rows) <= 1
