"""Forensics: what is not finite is found in the module, direction, row and rank where it was born; weights
stay as they were; an incident can be run again."""

import json
import math

import forensics_ranks
import pytest
import torch
from safetensors.torch import load_file, save_file

import dist
from checkpoints.weights import load_pretrained
from conftest import ROOT, options, run_program
from dist import World
from grpo import StepSize, policy_loss
from health import forensics
from health.forensics import Fault, Forensics, NonFinite, owners
from kernels import SharedPrompts
from numerics import low_precision
from rollouts.policy import collate, token_logprobs
from rollouts.rollout import Rollout

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def watched(small_checkpoint, tmp_path):
    """(model, forensics) of a run whose incidents go to tmp_path."""
    model = load_pretrained(str(small_checkpoint[0]), dtype=torch.float32).train()
    config = forensics_ranks.config_of(str(small_checkpoint[0]), str(tmp_path))
    return model, Forensics(model, config, ALONE, forensics_ranks.Tokens())


def report_of(directory) -> dict:
    (found,) = (directory / "incidents").glob("step-*/report.json")
    return json.loads(found.read_text())


def judged(watch: Forensics, model, compute, names, given=dict) -> str:
    """The error that ends a step of one micro-batch."""
    watch.remember(None, names, given)
    made = compute()
    made.backward()
    norm, _ = dist.gradient_norm(model.parameters())
    with pytest.raises(NonFinite) as caught:
        watch.healthy(1, [made.detach()], norm, lambda _: compute())
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_nan_and_inf_are_named_on_the_rank_that_has_them(small_checkpoint, tmp_path, ranks):
    script = ROOT / "tests" / "forensics_ranks.py"
    done = run_program(script, str(small_checkpoint[0]), str(tmp_path), ranks=ranks, timeout=1500)
    *wrong, count = json.loads(done.stdout.strip().splitlines()[-1])
    assert not wrong, "\n".join(wrong)
    assert int(count.split()[-1]) > 120


def test_a_checkpointed_backward_pass_is_seen_into_as_well(small_checkpoint, tmp_path):
    for reentrant in (False, True):
        config = forensics_ranks.config_of(str(small_checkpoint[0]), str(tmp_path / str(reentrant)))
        model = load_pretrained(str(small_checkpoint[0]), dtype=torch.float32).train()
        config.gradient_checkpointing_kwargs = {"use_reentrant": reentrant}
        config.gradient_checkpointing = True
        dist.shard(model, config, ALONE)
        watch = Forensics(model, config, ALONE, forensics_ranks.Tokens())
        forensics_ranks.BackwardFault(model, "layers.0.mlp.gate_proj", math.nan)
        ids = torch.arange(5, 29)[None]
        compute = lambda model=model, ids=ids: model.hidden_states(ids)[0].pow(2).mean()  # noqa: E731
        said = judged(watch, model, compute, ["one"])
        assert "the backward pass of layers.0.mlp.gate_proj is the source" in said


def test_an_fp8_tile_without_a_guard_is_named(watched, tmp_path, monkeypatch):
    model, watch = watched
    for module in model.modules():
        if isinstance(module, forensics.Linear):
            module.fp8 = True
    with torch.no_grad():  # a token whose embedding is zero: a padding row that was zeroed
        model.embed_tokens.weight[7] = 0.0
        model.layers[0].self_attn.q_proj.weight.add_(0.0)
    guarded = low_precision._fp8_scale
    monkeypatch.setattr(low_precision, "_fp8_scale", lambda amax, power_of_two: amax / 448.0)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 7, 11]])
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2]])
    compute = lambda: model.hidden_states(ids, document_ids=documents)[0].pow(2).mean()  # noqa: E731
    said = judged(watch, model, compute, ["a:1", "a:2", "a:3"])
    found = report_of(tmp_path)
    assert (found["direction"], found["module"]) == ("forward", "layers.0.self_attn.q_proj"), said
    assert [r["name"] for r in found["rows"]] == ["a:2", "a:3"] and "FP8 tiles" in said and "zero" in said
    monkeypatch.setattr(low_precision, "_fp8_scale", guarded)
    assert torch.isfinite(compute())


def test_advantages_that_are_no_numbers_are_named_with_their_row(watched, tmp_path):
    model, watch = watched
    rollouts = [
        Rollout([5, 6], [7, 8, 9], row=f"p.jsonl:{i}", advantage=[1.0, math.nan, -1.0][i]) for i in range(3)
    ]
    batch = collate(rollouts, torch.device("cpu"))

    def compute():
        logprobs = token_logprobs(model, batch, 1.0)[0]
        return policy_loss(
            logprobs, old_logprobs=logprobs.detach(), advantages=batch.advantages, mask=batch.mask,
            options=options(), size=StepSize(3, 9.0),
        )[0]

    said = judged(watch, model, compute, batch.rows, batch.given)
    found = report_of(tmp_path)
    assert found["direction"] == "loss" and "advantages hold 1 NaN" in said and "p.jsonl:1" in said
    assert [r["name"] for r in found["rows"]] == ["p.jsonl:1"]


def test_a_fault_that_does_not_come_back_is_called_that(watched):
    model, watch = watched
    ids = torch.arange(5, 29)[None]
    watch.remember(ids, ["one"])
    loss = model.hidden_states(ids)[0].mean()
    loss.backward()
    with pytest.raises(NonFinite, match="a rerun of the same step was finite"):
        watch.healthy(
            1, [loss.detach()], torch.tensor(math.inf), lambda ids: model.hidden_states(ids)[0].mean()
        )


def test_the_second_run_draws_the_same_dropout(watched):
    model, watch = watched
    ids, seen = torch.arange(5, 29)[None], []

    def compute():
        hidden = torch.dropout(model.hidden_states(ids)[0], 0.5, True)
        seen.append(hidden.detach().clone())
        return hidden.mean() * math.nan

    watch.remember(None, ["other"])
    torch.rand(3)  # the micro-batch before draws too
    watch.suspects.clear()
    judged(watch, model, compute, ["one"])
    assert len(seen) == 2 and torch.equal(*seen)


def test_tokens_belong_to_their_rows():
    ids = torch.zeros(2, 5, dtype=torch.long)
    documents = torch.tensor([[0, 0, 1, 1, -1], [0, 1, 1, -1, -1]])
    found = owners({"input_ids": ids, "document_ids": documents}, list("abcd"))
    assert found == [*"aabb", "", *"cdd", "", ""]
    shared = SharedPrompts([(2, [(2, 2), (2, 1)]), (1, [(1, 1)])], torch.device("cpu"))
    flat = torch.zeros(1, 7, dtype=torch.long)
    assert owners({"input_ids": flat, "shared_prompts": shared}, list("abc")) == list("aaaabcc")
    assert owners({"input_ids": flat, "shared_prompts": shared}, list("pq")) == list("pppppqq")


def small_run(checkpoint, chat_file, out, *extra) -> list[str]:
    return [
        f"base_model={checkpoint}", f"datasets=[{{path: {chat_file}, type: chat}}]", f"output_dir={out}",
        "sequence_len=128", "micro_batch_size=2", "max_steps=4", "learning_rate=1e-3", *extra,
    ]


def test_a_broken_weight_is_found_and_the_incident_runs_again(small_checkpoint, chat_file, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in small_checkpoint[0].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 1] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    done = run_program(ROOT / "sft.py", *small_run(broken, chat_file, tmp_path / "out"))
    assert done.returncode == 2 and "the forward pass of layers.1.mlp.up_proj is the source" in done.stderr
    assert "chats.jsonl:" in done.stderr and "its weight holds 1 Inf" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out" / "final").exists()
    incident = tmp_path / "out" / "incidents" / "step-1"
    assert "What is" in (incident / "rows.txt").read_text()
    again = run_program("health", "replay", str(incident))
    assert again.returncode == 0
    assert "again: the forward pass of layers.1.mlp.up_proj is the source" in again.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_can_be_left_out_and_the_run_goes_on(small_checkpoint, chat_file, tmp_path, ranks):
    arguments = small_run(
        small_checkpoint[0], chat_file, tmp_path / "out", "on_nonfinite=skip", "eval_steps=null"
    )
    done = run_program(ROOT / "tests" / "worker.py", "poison", "2", *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "the step is skipped, 1 of at most 3" in done.stdout
    rows = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 1, 1, 1]
    assert ["train/loss" in row for row in rows] == [True, False, True, True]
    report = report_of(tmp_path / "out")
    assert (report["direction"], report["rank"]) == ("forward", ranks - 1)
    for tensor in load_file(next((tmp_path / "out" / "final").glob("*.safetensors"))).values():
        assert torch.isfinite(tensor).all()


def test_skipping_is_bounded(small_checkpoint, chat_file, tmp_path):
    arguments = small_run(
        small_checkpoint[0], chat_file, tmp_path / "out", "on_nonfinite=skip", "max_skipped_steps=1"
    )
    done = run_program(ROOT / "tests" / "worker.py", "poison", "2,3", *arguments)
    assert done.returncode == 2 and "max_skipped_steps is 1" in done.stderr


def test_a_directory_that_is_no_incident_is_said_so(tmp_path):
    done = run_program("health", "replay", str(tmp_path))
    assert done.returncode == 2 and "is no incident that can be run again" in done.stderr


def test_a_fault_reads_as_one_line():
    rows = [{"name": "x.jsonl:3", "first": 1, "last": 4}]
    line = Fault("forward", "layers.0.mlp", "output", "3 NaN of 9", given="-1 to 2", rows=rows, rank=1).line()
    assert line == (
        "the forward pass of layers.0.mlp is the source (output: 3 NaN of 9); given -1 to 2; "
        "rows x.jsonl:3 tokens 1–4; rank 1"
    )
