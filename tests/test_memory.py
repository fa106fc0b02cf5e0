"""The memory estimate against what torch's allocator counts in a real step; the ladder; running out."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import dist
import grpo
from checkpoints import building
from checkpoints.adapters import apply_lora, initialize_lora
from checkpoints.families import Architecture
from checkpoints.weights import initialize, read_architecture
from conftest import ROOT, run_program
from dist import World
from health import memory
from run.config import parse_config
from sft import Config, batch_nll
from text.packing import Batch

ALONE = World(0, 1, 0, torch.device("cpu"))
TINY = json.loads((ROOT / "configs" / "tiny" / "config.json").read_text())


def config_of(**changes) -> Config:
    datasets = [{"path": "x", "type": "chat"}]
    values: dict = dict(base_model="x", micro_batch_size=16, sequence_len=64, datasets=datasets)
    return Config(**{**values, **changes})


def measured_peak(arch: Architecture, config: Config) -> int:
    """Weights and optimiser, and the highest sum of allocations and frees of a second step."""
    config = dataclasses.replace(config)
    adapter, config.adapter = config.adapter, None
    model = building.build_model(arch, Path("."), config, ALONE, random_init=True)
    if adapter:
        apply_lora(model, dataclasses.replace(config, adapter=adapter))
        initialize(model, 0)
        initialize_lora(model, 0)
    optimizers = dist.make_optimizers(model, config)
    B, T = config.micro_batch_size, config.sequence_len
    ids = torch.randint(0, arch.vocab_size, (B, T))
    documents = torch.arange(B)[:, None].expand(B, T).contiguous()
    batch = Batch(ids, ids.clone(), torch.arange(T).expand(B, T).contiguous(), documents, list(range(B)))

    def step():
        for _ in range(config.gradient_accumulation_steps):
            batch_nll(model, batch)[0].backward()
        dist.update(optimizers, 1e-4)

    step()
    before = memory.weight_bytes(model) + memory.optimizer_bytes(optimizers)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        step()
    now = peak = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return before + peak


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"bf16": True},
        {"micro_batch_size": 64, "sequence_len": 128}, {"adapter": "lora"}, {"optimizer": "muon"},
        {"optimizer": "adamw_8bit"}, {"bf16": True, "gradient_checkpointing": True, "micro_batch_size": 64},
    ],
    ids=str,
)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(changes):
    arch, config = Architecture.from_config(TINY), config_of(**changes)
    ratio = memory.estimate(arch, config).peak / measured_peak(arch, config)
    assert 0.9 < ratio < 1.1


@pytest.mark.parametrize("family", ["llama3", "gemma2", "qwen3-moe"])
def test_of_other_families_too(references, family):
    arch = read_architecture(references(family)[1])
    config = config_of(micro_batch_size=32)
    ratio = memory.estimate(arch, config).peak / measured_peak(arch, config)
    assert 0.9 < ratio < 1.1


def test_more_processes_share_weights_and_optimiser():
    arch = Architecture.from_config(TINY)
    one, four = (memory.estimate(arch, config_of(), n) for n in (1, 4))
    assert four.optimizer * 4 == pytest.approx(one.optimizer, rel=0.01)
    assert four.gradients * 4 == pytest.approx(one.gradients, rel=0.01)
    assert four.activations == one.activations


def test_an_estimate_in_bf16_is_the_same_each_time_and_falls_with_every_process_more():
    arch = Architecture.from_config(TINY)

    def peak(processes: int) -> int:
        return memory.estimate(arch, config_of(bf16=True), processes).peak

    peaks = [peak(processes) for processes in (1, 2, 4, 8, 64)]
    assert peaks == sorted(peaks, reverse=True)
    assert [peak(8) for _ in range(3)] == [peaks[3]] * 3


def test_as_many_sequences_are_sampled_at_once_as_a_gpu_has_room_for():
    """Qwen3-0.6B by hand: 114,688 bytes of keys and values a token (28 layers · 2 · 8 heads · 128 · 2), 2.43
    MB of logits a sequence. AdamW in full: 596 M parameters · 16 bytes = 9.54 GB."""
    arch = Architecture.from_config(
        json.loads((ROOT / "tests" / "real_configs.json").read_text())["Qwen3-0.6B"]
    )
    config = parse_config(
        grpo.Config,
        ["base_model=x", "datasets=[{path: x, type: chat}]", "reward_funcs=[length]", "bf16=true",
         "num_generations=8"],
    )
    assert memory.sampled_bytes(arch, config, 768) == 768 * 114_688 + 16 * 151_936
    left = memory.left_for_sampling(arch, config, 80 * 2**30)
    assert left == pytest.approx(0.9 * 80 * 2**30 - 16 * 596_049_920, rel=1e-3)
    rows = [memory.rollout_rows(arch, config, length, left) for length in (100, 768, 4096, 10**6)]
    assert rows == [512, 512, 128, 1]
    assert memory.rollout_rows(arch, config, 768, left / 3) == 128
    assert memory.rollout_rows(arch, config, 768, -1.0) == 1


def test_a_server_on_the_same_gpu_is_awake_while_no_activation_is_kept():
    """16 completions of 100 + 156 tokens; its weights and theirs are never on the GPU with activations."""
    arch = read_architecture(ROOT / "configs" / "tiny")
    given = ["base_model=x", "datasets=[{path: x}]", "reward_funcs=[length]", "rollout_engine=vllm",
             "micro_batch_size=8", "gradient_accumulation_steps=2", "max_prompt_length=100", "bf16=true",
             "max_completion_length=156"]
    alone = memory.estimate(arch, parse_config(grpo.Config, given))
    config = parse_config(grpo.Config, [*given, "vllm_mode=colocate"])
    beside = memory.estimate(arch, config)
    with torch.device("meta"):
        weights = building.Transformer(arch).count_parameters()
    a_token = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim
    assert alone.server == 0 and beside.server == 2 * (weights + 16 * 256 * a_token)
    assert beside.peak == max(alone.peak, beside.resident + beside.server)
    text = memory.table(arch, config)
    assert "vLLM, awake" in text and "vllm_gpu_memory_utilization: at most 0.9" in text


def test_the_ladder_saves_more_at_each_rung_and_names_values_of_now():
    rungs = memory.ladder(Architecture.from_config(TINY), config_of())
    saved = [bytes_ for _, bytes_ in rungs]
    assert saved == sorted(saved) and saved[0] > 0
    assert rungs[0][0].startswith("micro_batch_size: 1 (is 16) with gradient_accumulation_steps: 16 (is 1)")
    assert any("sequence_len: 32 (is 64)" in text for text, _ in rungs)


def test_the_command_prints_a_table_for_each_recipe():
    for name, expected in (("sft", "activations"), ("grpo", "keys and values"), ("ebft", "frozen copy")):
        where = f"base_model={ROOT / 'configs' / 'tiny'}"
        config = ROOT / "configs" / "tiny" / f"{name}.yaml"
        done = run_program("health", "memory", "--config", str(config), where, "processes=2")
        assert done.returncode == 0, done.stderr
        assert "estimated peak of a process" in done.stdout and expected in done.stdout
    done = run_program("health", "memory", "--config", str(config), "processes=no")
    assert done.returncode == 2 and "processes" in done.stderr and "Traceback" not in done.stderr


def test_running_out_says_what_was_alive_and_what_to_change(small_checkpoint, chat_file, tmp_path):
    arguments = [
        f"base_model={small_checkpoint[0]}", f"datasets=[{{path: {chat_file}, type: chat}}]",
        f"output_dir={tmp_path / 'out'}", "sequence_len=256", "micro_batch_size=4", "max_steps=3",
    ]
    done = run_program(ROOT / "tests" / "worker.py", "out-of-memory", "2", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: out of memory: " in done.stderr
    assert "micro_batch_size: 1 (is 4) with gradient_accumulation_steps: 4" in done.stderr
    assert "alive: " in done.stdout and "float32" in done.stdout
