"""The recipe as a user runs it: what it computes, what it survives, what it refuses."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from checkpoints.weights import load_pretrained
from conftest import ROOT, arguments, metrics, run_ok, run_program
from rollouts.chat import load_for_inference
from run.config import ConfigError, parse_config
from sft import Config
from text.tokenizer import IGNORE, Tokenizer

WORKER = ROOT / "tests" / "worker.py"


# ------------------------------------------------------------------------------------------------------------
# The arithmetic
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def naive(small_checkpoint, chat_file):
    """Loss and gradients of the mean NLL over the assistant tokens of all rows, document by document, in
    fp64."""
    import copy

    directory, reference = small_checkpoint
    model = copy.deepcopy(reference).double()
    tokenizer = Tokenizer.load(directory)
    total, nll = 0, torch.zeros((), dtype=torch.float64)
    for line in chat_file.read_text().splitlines():
        ids, labels = tokenizer.encode_chat(json.loads(line)["messages"])
        logits = model(torch.tensor([ids])).logits[0]
        for position in range(len(ids) - 1):
            if labels[position + 1] != IGNORE:
                nll = nll - logits[position].log_softmax(-1)[labels[position + 1]]
                total += 1
    (nll / total).backward()
    gradients = {
        name.removeprefix("model."): p.grad for name, p in model.named_parameters() if p.grad is not None
    }
    return (nll / total).item(), gradients


CUTS = [  # micro_batch_size, gradient_accumulation_steps, ranks, packing: all 37 rows in one optimiser step
    (37, 1, 1, False), (1, 37, 1, False), (10, 4, 1, False), (19, 1, 2, False), (3, 7, 2, False),
    (40, 1, 1, True), (2, 20, 1, True), (1, 20, 2, True),
]


@pytest.mark.parametrize("micro, accumulation, ranks, packing", CUTS)
def test_loss_and_gradient_equal_naive_fp64_however_the_batch_is_cut(
    micro, accumulation, ranks, packing, naive, small_checkpoint, chat_file, tmp_path
):
    run_ok(
        WORKER, "gradients", str(tmp_path / "g.pt"),
        *arguments(small_checkpoint, chat_file, tmp_path / "out", micro_batch_size=micro,
                   gradient_accumulation_steps=accumulation, sample_packing=packing,
                   gradient_checkpointing=accumulation > 5),
        ranks=ranks,
    )
    loss, gradients = naive
    got = torch.load(tmp_path / "g.pt")
    assert metrics(tmp_path / "out")[0]["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert got["gradients"].keys() == gradients.keys()
    norm = sum(g.square().sum() for g in gradients.values()).sqrt()
    for name, gradient in gradients.items():
        error = (got["gradients"][name].double() - gradient).norm() / norm
        assert error < 2e-5, (name, error)
    assert got["norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    assert metrics(tmp_path / "out")[0]["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# What a run leaves behind
# ------------------------------------------------------------------------------------------------------------


def test_a_run_writes_metrics_logs_config_and_a_checkpoint_that_transformers_loads(
    small_checkpoint, chat_file, tmp_path
):
    import transformers

    out = tmp_path / "out"
    args = arguments(
        small_checkpoint, chat_file, out, max_steps=12, micro_batch_size=8, val_set_size=5, eval_steps=6,
        eval_answers=5,
        eval_max_new_tokens=4, profiler_steps="[2]", wandb_project="ballast-test", optimizer="muon",
        sample_packing=True,
    )
    done = run_ok(ROOT / "sft.py", *args, env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    rows = metrics(out)
    assert [m["step"] for m in rows] == [*range(1, 13), 12]
    assert rows[11]["train/loss"] < rows[0]["train/loss"]
    for key in ("train/loss", "train/grad_norm", "train/learning_rate", "memory/max_alloc",
    "memory/max_reserved", "num_tokens",
                "tokens_per_second", "step_time", "trained_token_share", "packing_efficiency",
                "epoch"):
        assert all(key in row for row in rows[:12]), key
    assert "eval/loss" in rows[5] and "eval/loss" in rows[11] and "eval/accuracy" in rows[12]
    assert 0.5 < rows[0]["packing_efficiency"] <= 1 and 0 < rows[0]["trained_token_share"] < 1
    assert "held-out loss" in done.stdout and f"model.py chat {out}/final" in done.stdout
    assert "held-out loss" in (out / "run.log").read_text()
    assert yaml.safe_load((out / "config.yaml").read_text())["learning_rate"] == 1e-3
    first = (out / "config.yaml").read_text().splitlines()[0]
    assert re.match(r"# Ballast \S+(, commit [0-9a-f]{7,40}(-dirty)?)?, torch 2\.", first), first
    assert list((out / "tensorboard").iterdir()) and list(
        (out / "profile").glob("step-2-rank-0.pt.trace.json")
    )
    assert list((out / "wandb").glob("offline-run-*"))
    final = transformers.AutoModelForCausalLM.from_pretrained(out / "final").eval()
    ids = torch.tensor([[5, 6, 7, 300]])
    with torch.no_grad():
        ours = load_pretrained(str(out / "final"), dtype=torch.float32)(ids)
        assert (final(ids).logits - ours).abs().max() < 1e-4
    assert Tokenizer.load(out / "final").stop_ids
    assert transformers.AutoTokenizer.from_pretrained(out / "final").chat_template

    chat = subprocess.run(
        [sys.executable, str(ROOT / "model.py"), "chat", str(out / "final"), "--max-new-tokens", "8"],
        input="Hello\n\n", capture_output=True, text=True,
    )
    assert chat.returncode == 0 and chat.stdout.strip(), chat.stderr


def test_step_time_counts_every_step_also_when_an_evaluation_falls_between_two_log_lines(
    small_checkpoint, chat_file, tmp_path
):
    out = tmp_path / "out"
    how = dict(max_steps=8, logging_steps=2, eval_steps=3, val_set_size=5, micro_batch_size=4)
    run_ok(WORKER, "slow", "0.3", *arguments(small_checkpoint, chat_file, out, **how))
    rows = [row for row in metrics(out) if "step_time" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for row in rows:  # each step waits 0.3 s: no step can have been left out of the clock
        assert row["step_time"] >= 0.3


def test_an_adapter_is_saved_as_peft_reads_it_and_can_be_gone_on_from(small_checkpoint, chat_file, tmp_path):
    import peft
    import transformers

    out = tmp_path / "out"
    options = dict(
        adapter="lora", lora_r=4, lora_target_modules="[q_proj, down_proj]", max_steps=4, micro_batch_size=4
    )
    run_ok(ROOT / "sft.py", *arguments(small_checkpoint, chat_file, out, **options))
    base = transformers.AutoModelForCausalLM.from_pretrained(small_checkpoint[0])
    model = peft.PeftModel.from_pretrained(base, out / "final").eval()
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    more = arguments(
        small_checkpoint, chat_file, tmp_path / "more", **options, lora_model_dir=str(out / "final")
    )
    run_ok(ROOT / "sft.py", *more)
    first, second = metrics(out), metrics(tmp_path / "more")
    assert second[0]["train/loss"] < first[0]["train/loss"]
    chat = subprocess.run(
        [sys.executable, str(ROOT / "model.py"), "chat", str(out / "final"), "--max-new-tokens", "4"],
        input="Hello\n", capture_output=True, text=True,
    )
    assert chat.returncode == 0 and chat.stdout.strip(), chat.stderr


def test_a_mixture_of_experts_trains_with_its_balancing_loss(
    references, tokenizer_directory, chat_file, tmp_path
):
    from conftest import CHATML_TEMPLATE, CHATML_TOKENS, make_reference, write_tokenizer

    directory = tmp_path / "moe"
    make_reference("qwen3-moe", vocab_size=512, num_hidden_layers=2).save_pretrained(directory)
    write_tokenizer(directory, CHATML_TEMPLATE, CHATML_TOKENS, "<|im_end|>")
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        args = arguments(
            (directory, None),
            chat_file,
            out,
            max_steps=4,
            micro_batch_size=8 // ranks,
            router_aux_loss_coef=0.01,
        )
        run_ok(ROOT / "sft.py", *args, ranks=ranks)
    one, two = metrics(tmp_path / "out1"), metrics(tmp_path / "out2")
    assert one[0]["train/loss"] == pytest.approx(two[0]["train/loss"], rel=1e-5)
    assert one[0]["train/router_aux_loss"] >= 1.9 and one[-1]["train/loss"] < one[0]["train/loss"]
    assert load_pretrained(str(tmp_path / "out2" / "final"), dtype=torch.float32).arch.num_experts == 6


def test_added_tokens_grow_the_embedding_and_are_saved(small_checkpoint, chat_file, tmp_path):
    out = tmp_path / "out"
    extra = [f"<extra{i}>" for i in range(20)]
    args = arguments(
        small_checkpoint, chat_file, out, max_steps=1, tokens=json.dumps(extra), pad_vocab_to_multiple_of=64
    )
    run_ok(ROOT / "sft.py", *args)
    model, tokenizer = load_pretrained(str(out / "final"), dtype=torch.float32), Tokenizer.load(out / "final")
    assert model.arch.vocab_size % 64 == 0 and model.arch.vocab_size >= tokenizer.vocab_size
    assert len(tokenizer.encode("<extra7>")) == 1


# ------------------------------------------------------------------------------------------------------------
# What it refuses
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, named",
    [
        ("lerning_rate=1", "did you mean `learning_rate`"), ("learning_rate=fast", "learning_rate"),
        ("micro_batch_size=0", "micro_batch_size"),
        ("lr_scheduler=cos", "cosine, linear"), ("warmup_steps=99", "warmup_steps"), ("merge_adapter=true",
        "adapter: lora"),
        ("eval_steps=5", "val_set_size"), ("datasets=[]", "datasets"),
        ("datasets=[{path: absent.jsonl, type: chat}]", "absent.jsonl"),
        ("base_model=no/such/model/dir", "no/such/model/dir"), ("val_set_size=0.9999", "val_set_size"),
        ("warmup_ratio=2", "warmup_ratio"),
        ("gradient_checkpointing_kwargs={reentrant: true}", "use_reentrant"), ("fsdp_cpu_offload=true",
        "CUDA"),
    ],
)
def test_a_mistake_in_the_config_is_one_line_and_exit_code_2(
    change, named, small_checkpoint, chat_file, tmp_path
):
    done = run_program(
        ROOT / "sft.py", *arguments(small_checkpoint, chat_file, tmp_path / "out", max_steps=2), change
    )
    assert done.returncode == 2
    assert (
        named in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
        and "Traceback" not in done.stdout + done.stderr
    )


def test_on_two_ranks_a_mistake_is_printed_once(small_checkpoint, chat_file, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n')
    done = run_program(
        ROOT / "sft.py",
        *arguments(small_checkpoint, bad, tmp_path / "out", max_steps=2),
        ranks=2,
        timeout=120,
    )
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("error: ") == 1 and "bad.jsonl:1" in done.stderr


def test_help_prints_every_option_with_its_meaning():
    import dataclasses

    done = run_program(ROOT / "sft.py", "--help")
    for option in dataclasses.fields(Config):
        if option.init and option.name != "config_directory":
            assert f"\n  {option.name}  (" in done.stdout, option.name
    text = " ".join(done.stdout.split())
    assert "learning_rate (float; 2.0e-05) Peak learning rate. Full fine-tuning 1e-5–5e-5, LoRA" in text
    first = [line.split()[0] for line in done.stdout.splitlines() if re.match(r"  \w", line)]
    assert first[:2] == ["base_model", "datasets"]  # what a user needs first


def test_a_config_is_checked_before_anything_is_loaded(tmp_path):
    (tmp_path / "c.yaml").write_text("base_model: x\ndatasets: [{path: y, type: chat}]\nmax_grad_nrom: 1\n")
    with pytest.raises(
        ConfigError, match=r"c.yaml: max_grad_nrom: is not an option; did you mean `max_grad_norm`"
    ):
        parse_config(Config, ["--config", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").write_text(
        "base_model: x\ndatasets: [{path: y, type: chat}]\nlearning_rate: 1e-4\n"
    )
    config = parse_config(Config, ["--config", str(tmp_path / "c.yaml"), "seed=7"])
    assert (config.learning_rate, config.seed, config.config_directory) == (1e-4, 7, str(tmp_path))
    config = parse_config(
        Config,
        [
            "--config",
            str(tmp_path / "c.yaml"),
            "gradient_checkpointing_kwargs.use_reentrant=true",
            "learning_rate=2e-5",
        ],
    )
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": True} and config.learning_rate == 2e-5


@pytest.mark.parametrize("beyond", [False, True], ids=["spare rows", "beyond the vocabulary"])
def test_new_tokens_beside_an_adapter_are_trained_saved_and_gone_on_from(
    beyond, small_checkpoint, chat_file, tmp_path
):
    """Their rows, and no others; the adapter opens in PEFT, and a resumed run ends with the same bytes."""
    import peft

    rows = [json.loads(line) for line in chat_file.read_text().splitlines()]
    for row in rows:
        row["messages"][1]["content"] = "<new0> " + row["messages"][1]["content"]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = [f"<new{i}>" for i in range(20 if beyond else 2)]
    options = dict(
        adapter="lora", lora_r=4, max_steps=4, save_steps=2, micro_batch_size=4, tokens=json.dumps(tokens)
    )
    args = arguments(small_checkpoint, tmp_path / "new.jsonl", tmp_path / "out", **options)
    done = run_ok(ROOT / "sft.py", *args)
    final, tokenizer = tmp_path / "out" / "final", Tokenizer.load(tmp_path / "out" / "final")
    new = [tokenizer.core.token_to_id(token) for token in tokens]
    assert (max(new) >= 512) == beyond and (final / "vllm").exists() != beyond
    assert ("AutoPeftModelForCausalLM" if beyond else "final/vllm") in done.stdout
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(final).eval()
    ours, _ = load_for_inference(str(final), torch.float32)
    base = load_pretrained(str(small_checkpoint[0]), dtype=torch.float32, vocab_size=ours.arch.vocab_size)
    places = torch.tensor([[new[0], 5, 300, new[-1], 9]])
    with torch.no_grad():
        assert (ours(places) - theirs(places).logits).abs().max() < 1e-4
    moved = (ours.token_rows.embedding - base.embed_tokens.weight[new]).abs().amax(1)
    assert moved[0] > 1e-4  # the token that the rows hold
    whole = (final / "adapter_model.safetensors").read_bytes()
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "out", tmp_path / "again" / "out")
    shutil.rmtree(tmp_path / "again" / "out" / "checkpoints" / "step-4")
    again = arguments(small_checkpoint, tmp_path / "new.jsonl", tmp_path / "again" / "out", **options)
    run_ok(ROOT / "sft.py", *again)
    assert (tmp_path / "again" / "out" / "final" / "adapter_model.safetensors").read_bytes() == whole
    more = dict(options, lora_model_dir=str(final), max_steps=1, merge_adapter="true")
    run_ok(ROOT / "sft.py", *arguments(small_checkpoint, tmp_path / "new.jsonl", tmp_path / "more", **more))
    merged = load_pretrained(str(tmp_path / "more" / "final"), dtype=torch.float32)
    assert (merged.embed_tokens.weight[new[0]] - ours.token_rows.embedding[0]).abs().max() < 5e-3
    if not beyond:
        run_ok(ROOT / "sft.py", *arguments(
            small_checkpoint, tmp_path / "new.jsonl", tmp_path / "two", **dict(options, micro_batch_size=2)
        ), ranks=2)
        for name, tensor in load_file(tmp_path / "two" / "final" / "adapter_model.safetensors").items():
            assert (tensor - load_file(final / "adapter_model.safetensors")[name]).abs().max() < 1e-5, name
