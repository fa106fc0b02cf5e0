"""Weights to vLLM servers in the protocol of its NCCL engine, over gloo's sockets (gloo_group.py) to a server
that answers as vLLM would (fake_vllm.py)."""

import json
from concurrent.futures import Future
from types import SimpleNamespace

import gloo_group
import pytest
import torch
from fake_vllm import FakeVllm
from test_families import REAL, shrunk

from checkpoints import building
from checkpoints.families import Architecture
from checkpoints.weights import iterate_weights, load_pretrained, read_architecture, weight_shapes
from conftest import ROOT, make_reference, metrics, run_program
from data import Prompt
from dist import World
from grpo import Config
from model import Transformer
from rollouts import nccl_transfer, vllm_client
from rollouts.nccl_transfer import NcclTransfer, address_towards, packed, refuse_nccl
from rollouts.vllm_client import VllmEngine
from rollouts.vllm_server import EngineError
from run.config import ConfigError, parse_config
from text.tokenizer import Tokenizer

WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def start(small_checkpoint, tmp_path, monkeypatch):
    """An engine that syncs over NCCL, and as many servers as are asked for: start(options, servers=1)."""
    monkeypatch.setattr(nccl_transfer, "join", gloo_group.join)
    monkeypatch.setattr(nccl_transfer, "BUFFER", 1 << 16)
    monkeypatch.setattr(vllm_client, "refuse_nccl", lambda *_: None)
    made, checkpoint = [], small_checkpoint[0]

    def begin(*options: str, servers: int = 1, checkpoint=checkpoint, **faults):
        fakes = [FakeVllm(checkpoint, "policy", **(faults if i == 0 else {})) for i in range(servers)]
        made.extend(fakes)
        config = parse_config(
            Config,
            ["datasets=[{path: x, type: chat}]", f"base_model={checkpoint}", "rollout_engine=vllm",
             "vllm_model_name=policy", f"vllm_server_base_url=[{', '.join(fake.url for fake in fakes)}]",
             "num_generations=2", "micro_batch_size=2", "max_completion_length=4", "reward_funcs=[length]",
             "vllm_sync_method=nccl", "vllm_timeout=10", *options],
        )
        model = load_pretrained(str(checkpoint), dtype=torch.float32)
        engine = VllmEngine(
            model, config, Tokenizer.load(small_checkpoint[0]), WORLD, [Prompt([5, 6], "", {}, "row 1")]
        )
        return engine, *fakes

    yield begin
    for fake in made:
        fake.close()


def nudge(engine: VllmEngine) -> None:
    with torch.no_grad():
        for p in engine.model.parameters():
            p.add_(1e-2 * torch.randn_like(p).sign())


def holds(fake: FakeVllm, engine: VllmEngine) -> bool:
    ours = dict(engine.model.named_parameters())
    return all(torch.equal(p, ours[name]) for name, p in fake.model.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_worker_gets_every_tensor_in_many_buffers(tied, workers, start, tmp_path):
    make_reference("qwen3", vocab_size=512, num_hidden_layers=2, tie_word_embeddings=tied).save_pretrained(
        tmp_path / "m"
    )
    engine, fake = start(workers=workers, checkpoint=tmp_path / "m")
    engine.sync(0)
    nudge(engine)
    assert not holds(fake, engine)
    engine.sync(1)
    assert holds(fake, engine)
    assert ("lm_head.weight" in fake.received[0]) is not tied
    assert fake.asked.count("/init_weight_transfer_engine") == 1


def test_one_gather_serves_all_servers_and_shapes_need_none(start, monkeypatch):
    engine, *fakes = start(servers=3)
    count = 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return iterate_weights(*args, **kwargs)

    monkeypatch.setattr(vllm_client, "iterate_weights", counted)
    nudge(engine)
    engine.sync(1)
    assert count == 1 and all(holds(fake, engine) for fake in fakes)


@pytest.mark.parametrize("route, after", [
    ("/init_weight_transfer_engine", 0), ("/start_weight_update", 1), ("/update_weights", 1),
    ("/finish_weight_update", 2),  # the first of these ends what an earlier run may have left
])
def test_an_error_on_the_way_is_tried_again_from_the_beginning(route, after, start):
    engine, fake, other = start(servers=2, fails={route: [1, after]})
    for step in (1, 2):
        nudge(engine)
        engine.sync(step)
        assert holds(fake, engine) and holds(other, engine)
    assert fake.asked.count("/init_weight_transfer_engine") == 2
    assert other.asked.count("/init_weight_transfer_engine") == 1


def test_errors_without_end_are_one_line_that_names_the_server(start):
    engine, fake = start(fails={"/update_weights": [100, 0]})
    with pytest.raises(
        EngineError, match=rf"could not be sent in five attempts: {fake.url}/update_weights: 500"
    ):
        engine.sync(0)


def test_a_restarted_server_joins_anew_and_gets_the_weights(start):
    engine, fake = start()
    nudge(engine)
    engine.sync(1)
    fake.restart()
    assert not holds(fake, engine)
    groups = engine.generate([[5, 6, 7]], 2, seed=(1,))
    assert holds(fake, engine) and len(groups[0]) == 2
    assert fake.asked.count("/init_weight_transfer_engine") == 2


@pytest.mark.parametrize("rate", [1e-6, 1e-4])
def test_a_server_that_ignores_weights_is_found_by_the_probe_at_its_first_step(rate, start):
    engine, _ = start(ignores_weights=True)
    engine.sync(0)
    with torch.no_grad():
        for p in engine.model.parameters():
            p.add_(rate * torch.randn_like(p).sign())
    with pytest.raises(EngineError, match=r"lacks some of the weights|does not have these weights"):
        engine.sync(1)


def test_workers_that_do_not_come_are_not_waited_for_for_ever(start):
    engine, _ = start("vllm_timeout=1", never_joins=True)
    with pytest.raises(EngineError, match=r"did not meet at 127\.0\.0\.1:.*vllm_sync_address"):
        engine.sync(0)


def test_the_address_is_this_hosts_own_or_what_the_config_says(start):
    assert address_towards("http://127.0.0.1:8000") == "127.0.0.1"
    engine, _ = start("vllm_sync_address=203.0.113.9")  # an address of nobody
    with pytest.raises(EngineError, match=r"vllm_sync_address: 203\.0\.113\.9 is no address of this host"):
        engine.sync(0)


def test_what_it_needs_is_said_before_anything_is_loaded():
    options = SimpleNamespace(vllm_sync_method="auto")
    with pytest.raises(ConfigError, match=r"needs GPUs.*vllm_sync_directory"):
        refuse_nccl(options, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"trainer's Python needs vLLM.*pip install"):
        refuse_nccl(options, torch.device("cuda"))


def test_what_fails_on_one_server_does_not_stop_the_gather_or_the_other_servers():
    """All of the tensors are read: other ranks gather them with this one."""

    class Group:
        def __init__(self, breaks_after: int):
            self.left, self.destroyed = breaks_after, False

        def broadcast(self, tensor, src, stream):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("NCCL error: remote process exited")

        def destroy(self):
            self.destroyed = True

    transfer = NcclTransfer(torch.device("cpu"), None, 1.0)
    transfer.servers = [SimpleNamespace(url="a"), SimpleNamespace(url="b")]
    transfer.receiving = {"a": Future(), "b": Future()}
    groups = transfer.groups = {"a": Group(1), "b": Group(10)}
    groups = dict(groups)
    read = []

    def tensors():
        for i in range(6):
            read.append(i)
            yield f"t{i}", torch.zeros(nccl_transfer.BUFFER // 4 + 1)

    transfer.send(tensors())
    assert read == list(range(6)) and groups["a"].destroyed and not groups["b"].destroyed
    assert groups["b"].left == 4 and list(transfer.failures) == ["a"]
    groups["b"].left = 0
    transfer.send(tensors())  # nobody is left after the first buffer
    assert len(read) == 12 and groups["b"].destroyed


@pytest.mark.parametrize("sizes", [[10, 10, 10], [64, 1, 1], [30, 40, 5, 100, 2], []])
def test_buffers_are_cut_where_vllm_cuts_them(sizes):
    """By hand: each ends with the tensor that makes it more than 64 bytes."""
    tensors = [(str(i), torch.full((n,), i, dtype=torch.uint8)) for i, n in enumerate(sizes)]
    counts = [len(buffer) for buffer in packed(iter(tensors), torch.device("cpu"), 64)]
    by_hand = {(10, 10, 10): [30], (64, 1, 1): [65, 1], (30, 40, 5, 100, 2): [70, 105, 2], (): []}
    assert counts == by_hand[tuple(sizes)]


@pytest.mark.parametrize("name", REAL)
def test_names_and_shapes_are_known_without_a_gather(name):
    """Those of experts one by one, a joined projection as its parts, no head where it is the embedding."""
    with torch.device("meta"):
        model = Transformer(Architecture.from_config(shrunk(REAL[name]), name))
    sent = [(name, tuple(tensor.shape)) for name, tensor in iterate_weights(model)]
    assert weight_shapes(model) == sent and len(sent) > 10


@pytest.mark.parametrize("stored", ["load_in_4bit", "load_in_8bit"])
def test_names_and_shapes_of_quantised_layers_with_an_adapter(stored, tmp_path):
    make_reference(
        "qwen3", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2
    ).save_pretrained(tmp_path)
    config = parse_config(
        Config,
        [f"base_model={tmp_path}", "datasets=[{path: x, type: chat}]", "reward_funcs=[length]",
         "adapter=qlora", f"{stored}=true"],
    )
    model = building.build_model(read_architecture(tmp_path, []), tmp_path, config, WORLD)
    sent = [(name, tuple(tensor.shape)) for name, tensor in iterate_weights(model, merge=True)]
    assert weight_shapes(model) == sent


TRAINED = ["num_generations=4", "micro_batch_size=4", "max_steps=3", "max_completion_length=6",
           "save_steps=2", "learning_rate=1e-3", "reward_funcs=[letters.spread]",
           "vllm_model_name=policy", "rollout_engine=vllm",
           "vllm_sync_method=nccl", "vllm_timeout=10"]


def config(task) -> list[str]:
    """Beside the reward function, which is looked for there."""
    (task / "nccl.yaml").write_text("datasets: [{path: rows.jsonl, type: chat}]\n")
    return ["--config", str(task / "nccl.yaml")]


def test_two_sharded_ranks_train_with_a_server_of_two_workers(small_checkpoint, task, tmp_path):
    fake = FakeVllm(small_checkpoint[0], "policy", workers=2)
    try:
        done = run_program(
            ROOT / "tests" / "nccl_ranks.py", *config(task), f"base_model={small_checkpoint[0]}",
            f"output_dir={tmp_path / 'out'}",
            f"vllm_server_base_url=[{fake.url}]", *TRAINED, ranks=2,
        )
    finally:
        fake.close()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
    assert max(line.get("sampling/sampling_logp_difference/mean", 0.0) for line in lines) < 1e-4
    first, final = (
        load_pretrained(str(path), dtype=torch.float32).embed_tokens.weight
        for path in (small_checkpoint[0], tmp_path / "out" / "final")
    )
    assert not torch.equal(first, final)


def test_a_sync_that_fails_ends_both_ranks_with_one_line_and_a_checkpoint(small_checkpoint, task, tmp_path):
    fake = FakeVllm(small_checkpoint[0], "policy", fails={"/update_weights": [100, 2]})
    try:
        done = run_program(
            ROOT / "tests" / "nccl_ranks.py", *config(task), f"base_model={small_checkpoint[0]}",
            f"output_dir={tmp_path / 'out'}",
            f"vllm_server_base_url=[{fake.url}]", *TRAINED, "save_steps=null", ranks=2, timeout=240,
        )
    finally:
        fake.close()
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in output.split("torch/distributed/elastic")[0], output
    assert output.count("could not be sent in five attempts") >= 1 and "is saved" in output
    saved = sorted((tmp_path / "out" / "checkpoints").glob("step-*"))
    assert saved and json.loads((saved[-1] / "trainer.json").read_text())["step"] == 2
