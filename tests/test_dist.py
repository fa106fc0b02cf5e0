"""Schedules, and ranks that compute the same as one process (all meshes and recipes: test_reliability.py)."""

import pytest
import torch

import sft
from checkpoints import building
from checkpoints.weights import read_architecture
from conftest import ROOT, arguments, metrics, run_ok, run_program
from dist import OptimizerOptions, World, learning_rate
from run.config import ConfigError, parse_config


def test_the_schedules_have_their_textbook_values():
    def at(step, **options):
        return learning_rate(step, OptimizerOptions(learning_rate=1.0, **options), 100)

    assert [at(s, lr_scheduler="constant", warmup_steps=4) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert at(55, lr_scheduler="cosine", warmup_steps=10) == pytest.approx(0.5)
    assert at(55, lr_scheduler="linear", warmup_ratio=0.1) == pytest.approx(0.5)
    assert at(10, lr_scheduler="cosine", warmup_steps=10) == 1.0
    assert at(79, lr_scheduler="wsd") == 1.0 and at(90, lr_scheduler="wsd") == pytest.approx(0.5)
    assert at(100, lr_scheduler="linear", min_lr_ratio=0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "options", [dict(bf16=True), dict(bf16=True, adapter="lora"), dict(optimizer="muon")]
)
def test_one_and_two_ranks_train_alike(options, small_checkpoint, chat_file, tmp_path):
    losses = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        how = dict(max_steps=5, micro_batch_size=8 // ranks, learning_rate=1e-3, **options)
        run_ok(ROOT / "sft.py", *arguments(small_checkpoint, chat_file, out, **how), ranks=ranks)
        losses.append([m["train/loss"] for m in metrics(out)])
    tolerance = 2e-2 if options.get("bf16") else 1e-4
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert losses[0][-1] < losses[0][0]


def test_hybrid_sharding_on_four_ranks_computes_the_same(small_checkpoint, chat_file, tmp_path):
    losses = []
    for ranks, extra in ((1, {}), (4, {"hsdp_shard_size": 2})):
        out = tmp_path / str(ranks)
        how = dict(max_steps=3, micro_batch_size=8 // ranks, **extra)
        run_ok(ROOT / "sft.py", *arguments(small_checkpoint, chat_file, out, **how), ranks=ranks)
        losses.append([(m["train/loss"], m["train/grad_norm"]) for m in metrics(out)])
    for one, four in zip(*losses, strict=True):
        assert four == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_after_passes_without_gradients_the_parameters_are_the_masters(ranks, small_checkpoint):
    """In bf16: FSDP keeps the root gathered, with copies in the place of the masters, and one process casts
    its weights once; neither outlives the pass, and what is exported is fp32."""
    done = run_program(ROOT / "tests" / "masters.py", str(small_checkpoint[0]), ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("masters after") == 5


def test_what_rank_0_does_alone_for_long_is_waited_for():
    """Sampling and the tokenising of a large data set take longer than a collective may."""
    done = run_program(ROOT / "tests" / "long_work.py", ranks=2)
    output = done.stdout + done.stderr
    assert "rank 0 has both" in output and "rank 1 has both" in output, output[-2000:]
    assert done.returncode != 0 and "no limit" not in done.stdout.split("rank 1")[1]


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe", "gemma2"])
@pytest.mark.parametrize("more", [[], ["fp8=true"]])
def test_a_frozen_copy_takes_half_the_memory_and_computes_the_same_bits(family, more, references):
    """As the reference of beta, and as the feature network: at the first step kl is exactly 0."""
    checkpoint = references(family)[1]
    config = parse_config(
        sft.Config, ["datasets=[{path: x, type: chat}]", f"base_model={checkpoint}", "bf16=true", *more]
    )
    arch = read_architecture(checkpoint)
    alone = World(0, 1, 0, torch.device("cpu"))
    model, frozen = (building.build_model(arch, checkpoint, config, alone, frozen=f) for f in (False, True))
    kinds = {p.dtype for p in frozen.parameters()}
    assert kinds == ({torch.float32} if more else {torch.bfloat16}) and not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    ids = torch.randint(0, 64, (1, 50))
    with torch.no_grad():
        a, b = (m.eval().hidden_states(ids)[0] for m in (model, frozen))
    assert torch.equal(a, b)


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_quantised_weights_are_not_offloaded(key, small_checkpoint):
    """They are buffers: left on the CPU they would meet tensors of the GPU."""
    config = parse_config(
        sft.Config,
        ["datasets=[{path: x, type: chat}]", f"base_model={small_checkpoint[0]}", "adapter=qlora",
         f"{key}=true", "fsdp_cpu_offload=true"],
    )
    arch = read_architecture(small_checkpoint[0])
    with pytest.raises(ConfigError, match=f"{key}.*fsdp_cpu_offload"):
        building.build_model(arch, small_checkpoint[0], config, World(0, 1, 0, torch.device("cpu")))
