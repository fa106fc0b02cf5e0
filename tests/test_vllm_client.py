"""What the client of vLLM decides by itself, without a server (with one: test_vllm.py)."""

import threading
from types import SimpleNamespace

import pytest
import torch
from fake_vllm import FakeVllm

from checkpoints.weights import load_pretrained
from conftest import ROOT, metrics, run_program
from data import Prompt
from dist import World
from grpo import Config
from rollouts.environments import conversations, play, played
from rollouts.vllm_client import VllmEngine
from rollouts.vllm_server import MEMORY, EngineError, ServerLost, sync_method
from rollouts.vllm_worker import checksum
from run.config import ConfigError, parse_config
from text.tokenizer import Tokenizer

WORLD = World(0, 1, 0, torch.device("cpu"))


def engine_for(new_ids, base_rows, adapter, trains_rows):
    """An engine whose model has new tokens; no server is asked before the refusal."""
    options = SimpleNamespace(
        vllm_model_name=None, base_model="base", vllm_server_base_url=["http://127.0.0.1:9"], vllm_timeout=1,
        vllm_sync_method="auto", adapter=adapter, tokens=["<a>"], vllm_sync_directory=MEMORY,
        vllm_sync_address=None, vllm_allow_missing_servers=False, vllm_mode="server",
    )
    model = SimpleNamespace(
        arch=SimpleNamespace(checkpoint_vocab_size=base_rows),
        token_rows=SimpleNamespace(ids=new_ids) if trains_rows else None,
    )
    tokenizer = SimpleNamespace(new_ids=new_ids, stop_ids=[0])
    return VllmEngine(model, options, tokenizer, WORLD, [])


@pytest.mark.parametrize("adapter, trains_rows", [("lora", True), (None, False)])
def test_tokens_beyond_the_rows_of_the_server_are_refused_before_it_is_asked(adapter, trains_rows):
    """A server of base_model would have no row for them: sync and sampling would both be wrong."""
    with pytest.raises(ConfigError, match=r"tokens.*beyond the rows.*merge_adapter"):
        engine_for([99, 100], 100, adapter, trains_rows)


def test_tokens_within_the_rows_of_the_server_are_no_reason_to_refuse():
    """The reserved rows of a padded vocabulary can be trained and served."""
    with pytest.raises(Exception, match=r"127\.0\.0\.1:9"):  # it asks the server, which is not there
        engine_for([98, 99], 100, "lora", True)


@pytest.fixture
def start(small_checkpoint, tmp_path):
    """An engine and its server, which has the faults that are asked for: start(options, **faults)."""
    made, small_checkpoint = [], small_checkpoint[0]

    def begin(*options: str, prompts=((5, 6, 7), (8, 9), (10, 11, 12, 13)), servers=(), **faults):
        fake = FakeVllm(small_checkpoint, "policy", **faults)
        made.append(fake)
        config = parse_config(
            Config,
            ["datasets=[{path: x, type: chat}]", f"base_model={small_checkpoint}", "rollout_engine=vllm",
             "vllm_model_name=policy", f"vllm_server_base_url=[{', '.join([fake.url, *servers])}]",
             "num_generations=2", "micro_batch_size=2", "max_completion_length=4", "reward_funcs=[length]",
             f"vllm_sync_directory={tmp_path}", "vllm_timeout=30", *options],
        )
        model = load_pretrained(str(small_checkpoint), dtype=torch.float32)
        asked = [Prompt(list(ids), "", {}, f"row {i}") for i, ids in enumerate(prompts)]
        engine = VllmEngine(model, config, Tokenizer.load(small_checkpoint), WORLD, asked)
        return engine, fake

    yield begin
    for fake in made:
        fake.close()


def nudge(engine: VllmEngine, by: float) -> None:
    """A step of Adam at this learning rate, in a random direction."""
    with torch.no_grad():
        for p in engine.model.parameters():
            p.add_(by * torch.randn_like(p).sign())


def test_a_request_leaves_nothing_to_the_servers_defaults_and_names_its_weights(start):
    """vLLM fills what is missing from the checkpoint's generation_config.json."""
    engine, fake = start()
    engine.sync(0)
    engine.generate([[5, 6, 7]], 2, seed=(1,))
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
               "frequency_penalty": 0.0}
    assert len(fake.bodies) >= 3 and all(neutral.items() <= body.items() for body in fake.bodies)
    salts = {body["cache_salt"] for body in fake.bodies}
    nudge(engine, 1e-3)
    engine.sync(1)
    assert len(salts) == 1 and fake.bodies[-1]["cache_salt"] not in salts


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rate", [1e-6, 1e-4])
def test_a_server_that_ignores_weights_is_found_at_its_first_step_also_where_it_is_small(
    rate, precision, start
):
    """By the sums of what it holds: in bf16 no probe could tell (0.002 on its log-probs)."""
    engine, _ = start(f"bf16={precision == 'bf16'}".lower(), ignores_weights=True)
    engine.sync(0)
    nudge(engine, rate)
    with pytest.raises(EngineError, match=r"does not hold what was sent"):
        engine.sync(1)


def test_a_server_that_takes_weights_is_believed_however_small_the_step(start):
    engine, _ = start()
    for step in range(5):
        engine.sync(step)
        nudge(engine, 1e-7)


def test_log_probs_before_temperature_are_found_before_anything_is_sampled(start):
    """--logprobs-mode raw_logprobs at a temperature of 0.7; those of a prompt agree."""
    engine, _ = start("temperature=0.7", raw_logprobs=True)
    with pytest.raises(EngineError, match="processed_logprobs"):
        engine.sync(0)


@pytest.mark.parametrize("recipe", ["grpo", "ebft"])
def test_the_first_batch_must_agree_before_anything_is_trained_on_it(
    recipe, small_checkpoint, task, tmp_path
):
    """A server that answers a probe well, and prompts with log-probs before temperature."""
    for faults in ({}, {"raw_below": 100}):
        fake = FakeVllm(small_checkpoint[0], "policy", **faults)
        out = tmp_path / str(len(faults))
        (task / "first.yaml").write_text("datasets: [{path: rows.jsonl, type: chat}]\n")
        own = ["reward_funcs=[letters.spread]"] if recipe == "grpo" else []
        done = run_program(
            ROOT / f"{recipe}.py", "--config", str(task / "first.yaml"), f"base_model={small_checkpoint[0]}",
            f"output_dir={out}", f"vllm_server_base_url=[{fake.url}]", "rollout_engine=vllm",
            "vllm_model_name=policy", "num_generations=4", "micro_batch_size=8", "max_completion_length=6",
            "max_steps=1", "temperature=0.7", f"vllm_sync_directory={tmp_path}", *own,
        )
        fake.close()
        if not faults:
            assert done.returncode == 0, done.stdout + done.stderr
            continue
        assert done.returncode == 2, done.stdout + done.stderr
        assert "are those of temperature 1" in done.stderr and "raw_logprobs" in done.stderr
        assert not metrics(out)


def test_a_prefix_cache_that_is_held_is_asked_for_again_and_what_holds_it_ended(start):
    engine, fake = start(cache_is_held=2)
    engine.sync(0)
    assert fake.asked.count("/reset_prefix_cache") == 3 and fake.aborted.is_set()


def test_no_request_outlives_its_attempt(start):
    """A prompt fails at once, its siblings would run on: they are ended before the batch is asked for again,
    and only the second attempt reports."""
    prompts = [[8, 9], [5, 6, 7], [10, 11, 12, 13]]
    engine, fake = start()
    engine.sync(0)
    fake.faults["fails_once"] = [8, 9]
    fake.aborted.clear()
    reports: list[tuple[int, bool]] = []

    def on_group(i, group):
        reports.append((i, fake.aborted.is_set()))

    groups = engine.generate(prompts, 2, seed=(1,), on_group=on_group)
    assert fake.aborted.is_set() and not fake.overlap
    assert sorted(reports) == [(0, True), (1, True), (2, True)] and all(len(g) == 2 for g in groups)


def test_greedy_completions_are_asked_for_once(start):
    engine, fake = start()
    engine.sync(0)
    (group,) = engine.generate([[5, 6, 7]], 3, seed=(1,), temperature=0.0)
    assert len(group) == 3 and group[0] == group[2] and fake.bodies[-1]["n"] == 1


def test_room_is_for_the_longest_prompt_that_was_read(start):
    """vLLM shortens completions to what is left, in silence."""
    with pytest.raises(EngineError, match=r"longest prompt has 30.*--max-model-len 34"):
        start(prompts=[[5] * 30], max_model_len=32)


def test_a_dead_server_beside_a_living_one(start):
    """9 is a port that nothing listens on."""
    dead = "http://127.0.0.1:9"
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9: no healthy answer"):
        start("vllm_timeout=1", servers=[dead])
    engine, _ = start("vllm_timeout=1", "vllm_allow_missing_servers=true", servers=[dead])
    engine.sync(0)
    assert len(engine.generate([[5, 6, 7], [8]], 2, seed=(1,))) == 2


@pytest.mark.parametrize("fault", ["loses", "corrupts", "leaves_out"])
def test_a_tensor_that_does_not_arrive_is_named(fault, start):
    """However little it moved: each is compared by its checksum."""
    name = "model.layers.1.mlp.down_proj.weight"
    engine, _ = start(**{fault: [name]})
    with pytest.raises(EngineError, match=f"1 of .*{name}"):
        engine.sync(0)


def test_a_checksum_sees_one_bit():
    tensor = torch.randn(7, 5).to(torch.bfloat16)
    changed = tensor.clone()
    changed.view(torch.int16)[3, 2] ^= 1
    assert checksum(tensor) == checksum(tensor.clone()) != checksum(changed)
    assert checksum(tensor) != checksum(tensor.T)


@pytest.mark.parametrize(
    "adapter, url, directory, way",
    [
        (None, "http://127.0.0.1:1", MEMORY, "file"), ("lora", "http://localhost:1", MEMORY, "adapter"),
        (None, "http://other:1", MEMORY, "nccl"), ("lora", "http://other:1", MEMORY, "nccl"),
        ("lora", "http://other:1", "/shared", "adapter"), (None, "http://other:1", "/shared", "file"),
    ],
)
def test_memory_of_this_host_is_no_way_to_another(adapter, url, directory, way):
    options = SimpleNamespace(vllm_sync_method="auto", vllm_server_base_url=[url], adapter=adapter,
                              vllm_sync_directory=directory, vllm_mode="server")
    assert sync_method(options) == way


def test_a_server_that_is_lost_during_the_probe_leaves_the_model_in_training(start, monkeypatch):
    """Dropout would stay off for the rest of the run."""
    engine, _ = start()
    engine.model.train()
    ask, lost = engine._ask_probe, [True]

    def once():
        if lost:
            lost.clear()
            raise ServerLost("gone for a moment")
        return ask()

    monkeypatch.setattr(engine, "_ask_probe", once)
    engine.sync(0)
    assert engine.model.training and engine.sent == 0 and not lost


class Pace:
    """Three turns; the row with `slow` waits until every other row is done, so it must not hold them."""

    done: threading.Semaphore
    order: list[tuple[int, int]]

    def reset(self, prompt, row=0, **columns):
        self.row, self.turn = row, 0

    def step(self, text, ids):
        if self.row == 0 and self.turn == 0:
            assert all(Pace.done.acquire(timeout=20) for _ in range(2)), Pace.order
        self.turn += 1
        Pace.order.append((self.row, self.turn))
        if self.turn == 3:
            Pace.done.release()
        return " on", 0.5, self.turn == 3


def test_a_slow_environment_does_not_hold_the_conversations_beside_it(start, small_checkpoint):
    engine, _ = start("max_completion_length=400")
    engine.sync(0)
    engine.stop_ids = list(range(0, 500, 3))  # a random model hardly ever ends its turn
    tokenizer = Tokenizer.load(small_checkpoint[0])
    prompts = [Prompt([5 + k, 6], "q", {"row": k}, f"f:{k}") for k in range(3)]
    config = SimpleNamespace(
        max_completion_length=400, max_turns=8, environment_workers=4, environment_timeout=30.0
    )
    found = []
    for _ in range(2):
        Pace.done, Pace.order = threading.Semaphore(0), []
        rollouts = play(engine, Pace, prompts, [0, 1, 2], 1, step=0, seed=(1, 7), options=config,
                        tokenizer=tokenizer, world=WORLD)
        first = Pace.order.index((0, 1))
        assert sum(1 for row, _ in Pace.order[:first] if row) == 6  # all turns of the two others came before
        assert [r.rewards["environment"] for r in rollouts] == [1.5] * 3
        assert all(len(r.step_ends) == 3 and not r.truncated for r in rollouts)
        found.append([r.completion_ids.tolist() for r in rollouts])
    assert found[0] == found[1]  # drawn by row and turn, not by who comes first
    Pace.done, Pace.order = threading.Semaphore(0), []
    engine.prefetch(engine.conversations_of(conversations(Pace, prompts, 1, (1, 7), config, tokenizer)))
    ahead = played(engine.collect(1), prompts, [0, 1, 2], 1, 1, engine)
    assert [r.completion_ids.tolist() for r in ahead] == found[0] and ahead[0].prompt_index == 0


def test_conversations_begin_anew_after_the_server_was_restarted(start, small_checkpoint):
    engine, fake = start("max_completion_length=40")
    engine.sync(0)
    tokenizer, begun = Tokenizer.load(small_checkpoint[0]), []

    class Restarts:
        def reset(self, prompt, **columns):
            begun.append(self)

        def step(self, text, ids):
            if len(begun) == 1:
                fake.restart()
            return None, 1.0, True

    config = SimpleNamespace(max_completion_length=40, max_turns=8)
    (one,) = play(engine, Restarts, [Prompt([5, 6], "q", {}, "f:1")], [0], 1, step=0, seed=(1,),
                  options=config, tokenizer=tokenizer, world=WORLD)
    assert len(begun) == 2 and one.rewards == {"environment": 1.0}


# ------------------------------------------------------------------------------------------------------------
# On the trainer's GPU
# ------------------------------------------------------------------------------------------------------------


def test_a_server_that_sleeps_gets_the_weights_before_its_cache_and_before_anything_is_sampled(start):
    """Asleep it has no weights: also those of the step that it had are sent again."""
    engine, fake = start()
    engine.colocated = True
    engine.sync(0)
    engine.generate([[5, 6, 7]], 2, seed=(1,))
    engine.rest()
    engine.rest()  # it sleeps already
    assert fake.asked.count("/sleep?level=2") == 1
    fake.asked.clear()
    engine.sync(0)
    order = ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache", "/reset_prefix_cache"]
    assert [route for route in fake.asked if route in order] == order
    engine.generate([[5, 6, 7]], 2, seed=(1,))
    fake.asked.clear()
    assert engine.sync(0) == {} and not fake.asked


def test_a_server_that_is_lost_when_it_should_sleep_costs_no_checkpoint(start):
    """`rest` is called while one is written after the loss of a server."""
    engine, fake = start("vllm_timeout=1")
    engine.colocated = True
    engine.sync(0)
    fake.faults["dead"] = True
    engine.rest()
    assert engine.asleep
    with pytest.raises(EngineError, match="no healthy answer"):
        engine.sync(1)


@pytest.mark.parametrize(
    "more, named",
    [(["rollout_engine=embedded"], "vllm_mode"), (["async_prefetch=true"], "async_prefetch"),
     (["max_staleness=1"], "max_staleness"), (["vllm_sync_interval=2"], "vllm_sync_interval"),
     (["vllm_sync_method=nccl"], "vllm_sync_method"),
     (["vllm_tensor_parallel_size=2"], "vllm_tensor_parallel_size")],
)
def test_what_a_sleeping_server_cannot_do_is_refused(more, named):
    with pytest.raises(ConfigError, match=named):
        parse_config(Config, ["base_model=x", "datasets=[{path: x}]", "reward_funcs=[length]",
                              "rollout_engine=vllm", "vllm_mode=colocate", *more])


@pytest.mark.parametrize("python, told", [("/bin/nothing", "vllm_python"), ("/bin/false", "ended")])
def test_a_server_that_cannot_be_started_ends_the_run_with_a_line(
    python, told, small_checkpoint, task, tmp_path
):
    (task / "colocate.yaml").write_text("datasets: [{path: rows.jsonl, type: chat}]\n")
    done = run_program(
        ROOT / "grpo.py", "--config", str(task / "colocate.yaml"), f"base_model={small_checkpoint[0]}",
        f"output_dir={tmp_path}", "rollout_engine=vllm", "vllm_mode=colocate", f"vllm_python={python}",
        "reward_funcs=[letters.spread]", "num_generations=4", "micro_batch_size=8", "max_steps=1",
    )
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr
