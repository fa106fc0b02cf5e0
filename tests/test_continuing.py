"""What a run may continue from: adapters with their options, checkpoints of the same function and data."""

import dataclasses
import datetime
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import ebft
import grpo
import sft
from checkpoints.adapters import adopt_adapter
from checkpoints.weights import read_architecture, weights_fingerprint
from conftest import ROOT, arguments, embedded, ids, metrics, run_ok, run_program
from rollouts.chat import load_for_inference
from run.config import BallastError, parse_config
from run.loop import MAY_CHANGE

CONFIGS = {"sft": sft.Config, "grpo": grpo.Config, "ebft": ebft.Config}


@pytest.fixture(scope="module")
def peft_folder(references, tmp_path_factory):
    """changes of LoraConfig → (folder of the adapter, its base, the PEFT model)."""
    import peft

    def get(**changes):
        reference, base = references("qwen3")
        folder = tmp_path_factory.mktemp("adapter")
        options = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "up_proj"], **changes}
        model = peft.get_peft_model(reference.__class__.from_pretrained(base), peft.LoraConfig(**options))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        raw = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**raw, "base_model_name_or_path": str(base)}))
        return folder, base, model.eval()

    return get


def adopted(folder, base, *given, directory=None):
    words = [f"base_model={base}", "datasets=[{path: x}]", "adapter=lora", f"lora_model_dir={folder}", *given]
    config = parse_config(sft.Config, words)
    adopt_adapter(config, read_architecture(base), base, directory or folder)
    return config


@pytest.mark.parametrize("changes", [
    {}, {"use_rslora": True}, {"lora_alpha": 3, "r": 2}, {"target_modules": ["k_proj"]},
    {"target_modules": ["q_proj", "W_pack"]}, {"lora_dropout": 0.3},
])
def test_an_adapter_brings_its_own_rank_scale_and_layers(changes, peft_folder):
    folder, base, theirs = peft_folder(**changes)
    config = adopted(folder, base)
    expected = {"r": 4, "lora_alpha": 64, "use_rslora": False, **changes}
    assert (config.lora_r, config.lora_alpha) == (expected["r"], expected["lora_alpha"])
    assert config.lora_use_rslora == expected["use_rslora"] and config.lora_dropout == 0
    model, _ = load_for_inference(str(folder), torch.float32)
    with torch.no_grad():
        assert (model(ids()) - theirs(ids()).logits).abs().max() < 1e-4


@pytest.mark.parametrize("given, key", [
    ("lora_alpha=16", "lora_alpha"), ("lora_r=8", "lora_r"), ("lora_use_rslora=true", "lora_use_rslora"),
    ("lora_target_modules=[q_proj]", "lora_target_modules"), ("lora_alpha=32", "lora_alpha"),
])
def test_an_option_that_contradicts_the_adapter_is_an_error(given, key, peft_folder):
    folder, base, _ = peft_folder()
    with pytest.raises(BallastError, match=rf"^{key}: .*contradicts .*adapter_config\.json.*leave it out"):
        adopted(folder, base, given)


def test_an_option_that_says_what_the_adapter_says_is_none(peft_folder):
    folder, base, _ = peft_folder()
    same = ("lora_alpha=64", "lora_target_modules=[up_proj, q_proj]", "lora_r=4", "lora_dropout=0.1")
    assert adopted(folder, base, *same).lora_dropout == 0.1


@pytest.mark.parametrize("changes", [
    {"rank_pattern": {"q_proj": 2}}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
    {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "corda"}, {"init_lora_weights": "loftq"},
    {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"layers_to_transform": [1]}, {"bias": "all"},
    {"fan_in_fan_out": True}, {"target_modules": ["lm_head"]}, {"target_modules": ["nothing"]},
])
def test_variants_that_would_be_computed_wrongly_are_refused_by_file_and_field(changes, peft_folder):
    folder, base, _ = peft_folder()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for load in (lambda: adopted(folder, base), lambda: load_for_inference(str(folder), torch.float32)):
        with pytest.raises(BallastError, match=rf"adapter_config\.json: {next(iter(changes))}") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_an_adapter_belongs_to_its_base(peft_folder, tmp_path):
    folder, base, _ = peft_folder()
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(base, copy)
    adopted(folder, copy)  # the same weights in another place
    shutil.copytree(base, other)
    stored = load_file(base / "model.safetensors")
    tensors = {name: t + 1e-3 * torch.randn_like(t) for name, t in stored.items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(BallastError, match=r"lora_model_dir: .*has other weights"):
        adopted(folder, other)
    halves = {name: t.to(torch.bfloat16) for name, t in stored.items()}
    save_file(halves, copy / "model.safetensors", {"format": "pt"})
    assert weights_fingerprint(copy) == weights_fingerprint(base) != weights_fingerprint(other)


def test_trained_rows_are_those_of_their_tokens_in_any_order(references, tmp_path):
    import peft

    for name, indices in (("llama3", [7, 3, 5]), ("llama2", {"embed_tokens": [7, 3], "lm_head": [3, 7]})):
        reference, base = references(name)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
        theirs = peft.get_peft_model(reference.__class__.from_pretrained(base), config)
        for parameter_name, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in parameter_name:
                torch.nn.init.normal_(parameter)
        folder = tmp_path / name
        theirs.save_pretrained(folder)
        raw = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**raw, "base_model_name_or_path": str(base)}))
        ours, _ = load_for_inference(str(folder), torch.float32)
        prompt = torch.tensor([[1, 7, 3, 5, 2]])
        with torch.no_grad():
            assert (ours(prompt) - theirs.eval()(prompt).logits).abs().max() < 1e-4


def test_an_adapter_without_a_base_and_an_adapter_as_a_base_say_so(
    peft_folder, chat_file, tmp_path, monkeypatch, small_checkpoint
):
    folder, base, _ = peft_folder()
    path = folder / "adapter_config.json"
    data = "datasets=" + json.dumps([{"path": str(chat_file), "type": "chat"}])
    done = run_program("sft", f"base_model={folder}", data, f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 2 and "is a PEFT adapter" in done.stderr
    assert f"base_model: {base}" in done.stderr and "lora_model_dir" in done.stderr
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    monkeypatch.chdir(base)  # a model lies in the working directory
    with pytest.raises(BallastError, match=r"adapter_config\.json: base_model_name_or_path is missing"):
        load_for_inference(str(folder), torch.float32)


def test_lora_model_dir_is_looked_for_beside_the_config_and_saved_adapters_work_from_anywhere(
    small_checkpoint, chat_file, tmp_path
):
    out = tmp_path / "first"
    run_ok("sft", *arguments(small_checkpoint, chat_file, out, adapter="lora", lora_alpha=64, max_steps=2))
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "c.yaml").write_text(
        f"base_model: {os.path.relpath(small_checkpoint[0], tmp_path / 'job')}\n"
        f"datasets: [{{path: {chat_file}, type: chat}}]\nadapter: lora\nlora_model_dir: ../first/final\n"
        "max_steps: 1\n"
    )
    run_ok("sft", "--config", str(tmp_path / "job" / "c.yaml"), f"output_dir={tmp_path / 'second'}")
    saved = json.loads((tmp_path / "second" / "final" / "adapter_config.json").read_text())
    assert saved["lora_alpha"] == 64
    assert saved["base_model_name_or_path"] == str(small_checkpoint[0].resolve())


# ------------------------------------------------------------------------------------------------------------
# What a checkpoint may continue with
# ------------------------------------------------------------------------------------------------------------


def test_options_that_may_change_exist():
    known = {field.name for config in CONFIGS.values() for field in dataclasses.fields(config)}
    assert known >= MAY_CHANGE


MUST_STAY = {
    "lora_alpha=1", "lora_use_rslora=true", "lora_dropout=0.1", "lora_target_modules=[q_proj]", "lora_r=4",
    "sequence_len=48", "sample_packing=true", "train_on_inputs=true", "seed=3", "optimizer=muon",
    "pad_vocab_to_multiple_of=64", "chat_template_kwargs={x: 1}", "strip_thinking=true", "val_set_size=3",
    "excess_length_strategy=truncate",
}


@pytest.fixture(scope="module")
def lora_run(small_checkpoint, chat_file, tmp_path_factory):
    """A LoRA run that stands at step 2 of 4, and the arguments that continue it."""
    out = tmp_path_factory.mktemp("lora") / "out"
    given = arguments(small_checkpoint, chat_file, out, adapter="lora", lora_alpha=64, save_steps=2)
    run_ok("sft", *given, "max_steps=2")
    return out, [*given, "max_steps=4"]


@pytest.mark.parametrize("option", sorted(MUST_STAY))
def test_another_function_or_other_data_is_no_continuation(option, lora_run, tmp_path):
    out, given = lora_run
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    given = [f"output_dir={copy}" if argument.startswith("output_dir=") else argument for argument in given]
    done = run_program("sft", *given, option)
    key = option.partition("=")[0]
    assert done.returncode == 2 and key in done.stderr and "step-2" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_weights_config_and_tokenizer_of_the_base_must_stay(small_checkpoint, chat_file, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(small_checkpoint[0], base)
    given = ["datasets=" + json.dumps([{"path": str(chat_file), "type": "chat"}]), f"output_dir={out}",
             f"base_model={base}", "adapter=lora", "save_steps=1", "learning_rate=1e-3"]
    run_ok("sft", *given, "max_steps=1")
    moved = tmp_path / "moved"
    base.rename(moved)
    given[2] = f"base_model={moved}"
    assert "learning_rate 0.001 → 0.002" in run_ok("sft", *given, "max_steps=2", "learning_rate=2e-3").stdout

    def refused(name, change):
        before = (moved / name).read_bytes()
        change(moved / name)
        done = run_program("sft", *given, "max_steps=3")
        (moved / name).write_bytes(before)
        assert done.returncode == 2 and "is not what" in done.stderr, done.stderr
        return done.stderr

    def shifted(path):
        save_file({n: t + 0.01 for n, t in load_file(path).items()}, path, {"format": "pt"})

    def changed(**values):
        return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    assert "weights of base_model" in refused("model.safetensors", shifted)
    assert "config.json" in refused("config.json", changed(rms_norm_eps=1e-3))
    assert "tokenizer" in refused("tokenizer_config.json", changed(eos_token="<|endoftext|>"))
    run_ok("sft", *given, "max_steps=3")


def test_a_finished_run_is_not_trained_over(small_checkpoint, chat_file, tmp_path):
    out = tmp_path / "out"
    given = arguments(small_checkpoint, chat_file, out, logging_steps=1)
    run_ok("sft", *given, "max_steps=2")
    files = (out / "metrics.jsonl", out / "final" / "model.safetensors")
    before = [file.read_bytes() for file in files]
    done = run_program("sft", *given, "max_steps=2")
    assert done.returncode == 2 and "output_dir" in done.stderr and "finished run" in done.stderr
    assert before == [file.read_bytes() for file in files]


def test_a_finished_run_that_is_started_again_says_that_nothing_is_trained_and_what_differs(
    small_checkpoint, chat_file, tmp_path
):
    out = tmp_path / "out"
    given = arguments(small_checkpoint, chat_file, out, save_steps=2)
    run_ok("sft", *given, "max_steps=2", "learning_rate=1e-3")
    done = run_ok("sft", *given, "max_steps=2", "learning_rate=5e-3")
    assert "nothing is trained" in done.stdout and "learning_rate 0.001 → 0.005" in done.stdout
    done = run_ok("sft", *given, "max_steps=3", "learning_rate=5e-3")
    assert "nothing is trained" not in done.stdout and metrics(out)[-1]["step"] == 3


IN_THREE_DAYS = """
import datetime, runpy, sys
import pyarrow.compute, pyarrow.parquet, zoneinfo  # compiled against the real class
pyarrow.array([1]).to_pylist()  # which imports pandas, where it is installed
class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=3)
datetime.datetime = Later
sys.path.insert(0, {root!r})
runpy.run_path({root!r} + "/grpo.py", run_name="__main__")
"""


def test_a_run_whose_template_writes_the_date_resumes_on_another_day(task, small_checkpoint, tmp_path):
    template = tmp_path / "dated.jinja"
    template.write_text(
        "Today is {{ strftime_now('%d %b %Y') }}.\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    out, later = tmp_path / "out", tmp_path / "later.py"
    later.write_text(IN_THREE_DAYS.format(root=str(ROOT)))
    given = embedded(task, small_checkpoint[0], out, f"chat_template={template}", "save_steps=1")
    run_ok("grpo", *given, "max_steps=1")
    done = run_ok(later, *given, "max_steps=2", env={})
    assert "resuming from" in done.stdout
    today = datetime.date.today().strftime("%d %b %Y")
    for step in (0, 1):
        text = (out / "rollouts" / f"step-{step}.jsonl").read_text()
        assert f"Today is {today}" in json.loads(text.splitlines()[0])["prompt"]
    run_ok(later, *given, f"output_dir={tmp_path / 'fresh'}", "max_steps=1", env={})
    assert today not in (tmp_path / "fresh" / "rollouts" / "step-0.jsonl").read_text()


def test_the_pinned_date_is_what_a_template_writes(tokenizer):
    tok = tokenizer("chatml")
    tok.template = "{{ strftime_now('%Y-%m-%d') }}"
    assert tok.date == ""
    tok.pin_date(datetime.datetime(2024, 2, 29))
    assert tok.render([{"role": "user", "content": "Hi"}]) == "2024-02-29" == tok.date
    tok.template = "no date"
    assert tok.date == ""


def test_the_table_of_memory_counts_the_adapter_that_is_continued(peft_folder):
    folder, base, _ = peft_folder(r=3)
    given = (f"base_model={base}", "datasets=[{path: x}]", "adapter=lora", "recipe=sft")
    by_hand = ("lora_r=3", "lora_target_modules=[q_proj, up_proj]")
    ways = ((f"lora_model_dir={folder}",), by_hand, ())
    tables = [run_ok("health", "memory", *given, *more).stdout for more in ways]
    figures = [re.findall(r"[\d.,]+", table) for table in tables]
    assert figures[0] == figures[1] != figures[2]
