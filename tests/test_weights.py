"""Checkpoints and adapters in and out, against transformers and peft, and what is refused."""

import copy
import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import model as ballast
from checkpoints import adapters, weights
from checkpoints.weights import load_pretrained, save_pretrained
from conftest import ids, make_reference, with_hub
from model import ModelOptions
from run.config import CheckpointError, ConfigError


def test_a_checkpoint_in_several_files_and_in_half_precision_loads(tmp_path):
    import transformers

    for dtype in (torch.float16, torch.bfloat16):
        directory = tmp_path / str(dtype)
        half = make_reference("qwen3").to(dtype)
        half.save_pretrained(directory, max_shard_size="20KB")
        assert len(list(directory.glob("*.safetensors"))) > 2
        model = load_pretrained(str(directory), dtype=torch.float32)
        reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            assert (model(ids()) - reference(ids()).logits).abs().max() < 1e-4


def test_rows_of_the_embedding_that_no_text_has_trained_are_found(tmp_path):
    make_reference("qwen3").save_pretrained(tmp_path)
    assert weights.untrained_rows(tmp_path, range(10)) == []
    tensors = _tensors(tmp_path)
    rows = tensors["model.embed_tokens.weight"]
    rows[3] *= 0.01  # as good as nothing, as the reserved tokens of Llama 3
    rows[5] = rows[7]  # never told apart, as those of SmolLM2
    rows[12] = rows[9]  # not asked for
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert weights.untrained_rows(tmp_path, range(10)) == [3, 5, 7]
    assert weights.untrained_rows(tmp_path, [10**6]) == []


def _tensors(directory):
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _with_config(references, name, tmp_path, **changes):
    directory = references(name)[1]
    raw = json.loads((directory / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return _tensors(directory)


def _refused(directory, *words):
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(str(directory), dtype=torch.float32)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_a_tied_matrix_is_found_under_either_name_and_must_not_differ_from_itself(references, tmp_path):
    import transformers

    tensors = _with_config(references, "llama2", tmp_path, tie_word_embeddings=True)
    embedding = tensors["model.embed_tokens.weight"]
    for names in (("model.embed_tokens.weight",), ("lm_head.weight",),
                  ("model.embed_tokens.weight", "lm_head.weight")):
        rest = {n: t for n, t in tensors.items() if n not in ("model.embed_tokens.weight", "lm_head.weight")}
        stored = {**rest, **{n: embedding.clone() for n in names}}
        save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
        model = load_pretrained(str(tmp_path), dtype=torch.float32)
        reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        with torch.no_grad():
            assert (model(ids()) - reference(ids()).logits).abs().max() < 1e-5
    other = {**rest, names[0]: embedding, names[1]: embedding + 1}
    save_file(other, tmp_path / "model.safetensors", {"format": "pt"})
    _refused(tmp_path, "lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize("rows", [64, 95, 97])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_vocabulary_of_another_size_than_config_json_says_is_refused(name, rows, references, tmp_path):
    tensors = _with_config(references, "llama2", tmp_path)
    tensors[name] = torch.randn(rows, tensors[name].shape[1])
    save_file(tensors, tmp_path / "model.safetensors")
    _refused(tmp_path, name, f"[{rows}, ", "config.json says [96, ", "vocab_size")


def test_one_file_is_read_before_an_index_and_it_is_said(references, tmp_path, caplog, monkeypatch):
    import transformers

    monkeypatch.setattr(logging.getLogger("ballast"), "propagate", True)
    tensors = _with_config(references, "llama2", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    old = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(old, tmp_path / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = load_pretrained(str(tmp_path), dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (model(ids()) - reference(ids()).logits).abs().max() < 1e-5
    assert "model.safetensors is read, as in transformers" in caplog.text


def test_an_index_and_its_files_must_agree(references, tmp_path):
    tensors = _with_config(references, "llama2", tmp_path)
    names = sorted(tensors)
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}

    def write(extra):
        for file in ("part-0.safetensors", "part-1.safetensors"):
            part = {n: t for n, t in tensors.items() if where[n] == file}
            save_file({**part, **extra.get(file, {})}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    write({"part-1.safetensors": {names[0]: tensors[names[0]].clone()}})  # twice, and equal
    load_pretrained(str(tmp_path), dtype=torch.float32)
    write({"part-1.safetensors": {names[0]: tensors[names[0]] + 1}})
    _refused(tmp_path, names[0], "part-0.safetensors", "part-1.safetensors")
    write({"part-1.safetensors": {"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}})  # of no entry
    _refused(tmp_path, "model.layers.9.mlp.up_proj.weight")
    write({})
    where["model.norm.weight"] = next(f for f in where.values() if f != where["model.norm.weight"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    _refused(tmp_path, where["model.norm.weight"], "model.norm.weight", "cannot be read")


def test_weights_that_are_no_floating_point_numbers_are_refused(references, tmp_path):
    tensors = _with_config(references, "llama2", tmp_path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    _refused(tmp_path, "model.norm.weight", "torch.int8")


def test_a_saved_model_larger_than_one_shard_is_split_and_indexed(references, tmp_path, monkeypatch):
    import transformers

    reference, directory = references("mixtral")
    model = load_pretrained(str(directory), dtype=torch.float32)
    monkeypatch.setattr(weights, "SHARD_BYTES", 30_000)
    save_pretrained(model, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() and not (
        tmp_path / "model.safetensors"
    ).exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert (again(ids()).logits - reference(ids()).logits).abs().max() == 0
    assert load_pretrained(str(tmp_path), dtype=torch.float32).arch.num_experts == 4


@pytest.mark.parametrize("folder, file", [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600)])
def test_weights_can_be_read_by_those_who_may_read_their_folder(folder, file, references, tmp_path):
    model = load_pretrained(str(references("llama2")[1]), dtype=torch.float32)
    tmp_path.chmod(folder)
    save_pretrained(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == file


def test_a_directory_without_usable_weights_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="hub id"):
        load_pretrained(str(tmp_path / "nothing/here/at/all"), dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_pretrained(str(tmp_path), dtype=torch.float32)
    reference = make_reference("llama2")
    reference.config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="convert it to safetensors"):
        load_pretrained(str(tmp_path), dtype=torch.float32)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_pretrained(str(tmp_path), dtype=torch.float32)


def test_a_grown_vocabulary_keeps_its_rows_and_adds_mean_rows(references, tmp_path):
    from pathlib import Path

    _, directory = references("llama2")
    arch = weights.resized(weights.read_architecture(Path(directory)), 128)
    model = ballast.Transformer(arch)
    weights.load_weights(model, Path(directory))
    old = load_pretrained(str(directory), dtype=torch.float32)
    for grown, original in (
        (model.embed_tokens.weight, old.embed_tokens.weight),
        (model.lm_head.weight, old.lm_head.weight),
    ):
        assert torch.equal(grown[:96], original)
        torch.testing.assert_close(grown[96:], original.mean(0).expand(32, -1))
    save_pretrained(model, tmp_path)
    again = load_pretrained(str(tmp_path), dtype=torch.float32)
    assert again.arch.vocab_size == 128 and torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)


def test_a_hub_id_is_downloaded_once_and_an_unknown_one_is_named(references, tmp_path):
    _, directory = references("qwen3")
    code = (
        "import torch\nfrom checkpoints import weights\nfrom run import config\n"
        "m = weights.load_pretrained('org/tiny', dtype=torch.float32)\n"
        "print('layers', len(m.layers))\n"
        "try: weights.load_pretrained('org/absent', dtype=torch.float32)\n"
        "except config.CheckpointError as error: print('refused', error)\n"
    )
    done, requests = with_hub(code, directory, tmp_path)
    assert "layers 4" in done.stdout, done.stderr
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused")]
    assert len(refused) == 1 and "org/absent" in refused[0]
    assert any("model.safetensors" in path for path in requests)


def test_random_initialisation_depends_on_the_seed_alone():
    from pathlib import Path

    arch = weights.read_architecture(Path(__file__).parent.parent / "configs/tiny")
    models = [ballast.Transformer(arch) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        weights.initialize(model, seed)
    one, same, other = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embed_tokens.weight"], other["embed_tokens.weight"])
    weight = one["layers.0.mlp.up_proj.weight"]
    assert weight.std().item() == pytest.approx(arch.raw["initializer_range"], rel=0.05)


# ------------------------------------------------------------------------------------------------------------
# LoRA against PEFT
# ------------------------------------------------------------------------------------------------------------


def _peft(reference, **kwargs):
    import copy

    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 10, **kwargs})
    model = peft.get_peft_model(copy.deepcopy(reference), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("qwen3", dict(target_modules=["q_proj", "v_proj"])),
        ("llama3", dict(target_modules="all-linear", use_rslora=True)),
        ("phi3", dict(target_modules=["qkv_proj", "down_proj"])),
    ],
)
@torch.no_grad()
def test_adapters_go_between_peft_and_here_and_merge_exactly(name, kwargs, references, tmp_path):
    import peft
    import transformers

    reference, directory = references(name)
    theirs = _peft(reference, **kwargs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(ids()).logits

    base = load_pretrained(str(directory), dtype=torch.float32)
    before = base(ids())
    model = adapters.apply_lora(base, adapters.read_adapter_options(tmp_path / "theirs", str(directory)))
    adapters.load_adapter(model, tmp_path / "theirs")
    assert (model.eval()(ids()) - expected).abs().max() < 1e-4
    with adapters.adapters_disabled(model):
        assert torch.equal(model(ids()), before)
    assert (model(ids()) - before).abs().max() > 1e-2

    adapters.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(directory), tmp_path / "ours"
    ).eval()
    assert (again(ids()).logits - expected).abs().max() < 1e-4

    kept = {n: p.clone() for n, p in model.named_parameters()}
    save_pretrained(model, tmp_path / "merged", merge=True)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())  # nothing is merged in place
    merged = load_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    assert (merged(ids()) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("targets", [
    r".*\.layers\.[0]\..*(q|v)_proj", r"model\.layers\.\d+\.(mlp|self_attn)\.(up|down|o)_proj",
    "all-linear",
    ["self_attn.q_proj", "down_proj"], ["model.layers.1.mlp.up_proj"],
])
def test_target_modules_choose_the_layers_that_peft_chooses(targets, references, tmp_path):
    reference, directory = references("qwen3")
    theirs = _peft(reference, target_modules=targets)
    wanted = {n.split(".lora_A")[0].removeprefix("base_model.model.model.")
              for n, _ in theirs.named_parameters() if ".lora_A" in n}
    model = load_pretrained(str(directory), dtype=torch.float32)
    options = ModelOptions(base_model=str(directory), adapter="lora", lora_r=4, lora_target_modules=targets)
    adapters.apply_lora(model, options)
    assert set(adapters.lora_modules(model)) == wanted
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_pretrained(str(directory), dtype=torch.float32)
    adapters.apply_lora(again, adapters.read_adapter_options(tmp_path / "theirs", str(directory)))
    adapters.load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        assert (again(ids()) - theirs(ids()).logits).abs().max() < 1e-4
    adapters.save_adapter(again, tmp_path / "ours")
    import peft

    opened = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "ours").eval()
    with torch.no_grad():
        assert (opened(ids()).logits - again(ids())).abs().max() < 1e-4


@pytest.mark.parametrize("targets, reason", [
    ("q_proj", "matches no linear layer.*a text is a regular expression"),
    ("(q_proj", "no regular expression"),
    (["w_proj"], "matches no linear layer; there are .*q_proj"),
])
def test_target_modules_that_match_nothing_say_what_there_is(targets, reason, references):
    model = load_pretrained(str(references("qwen3")[1]), dtype=torch.float32)
    with pytest.raises(ConfigError, match=reason):
        options = ModelOptions(base_model="x", adapter="lora", lora_target_modules=targets)
        adapters.apply_lora(model, options)


def test_lora_trains_adapters_only_and_starts_as_the_base(references):
    _, directory = references("qwen3")
    model = load_pretrained(str(directory), dtype=torch.float32)
    with torch.no_grad():
        before = model(ids())
    adapters.apply_lora(model, ModelOptions(base_model="x", adapter="lora", lora_r=3, lora_dropout=0.5))
    adapters.initialize_lora(model, seed=0)
    assert torch.equal(model.eval()(ids()), before)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n for n in names)
    assert {n.split(".")[-2] for n in names} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    model.train()(ids()).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("lora_B"))
    with pytest.raises(ConfigError, match="query_proj"):
        options = ModelOptions(base_model="x", adapter="lora", lora_target_modules=["query_proj"])
        adapters.apply_lora(load_pretrained(str(directory), dtype=torch.float32), options)


def test_an_adapter_of_an_unknown_kind_is_refused_by_name(tmp_path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="use_dora"):
        adapters.read_adapter_options(tmp_path, "x")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="IA3"):
        adapters.read_adapter_options(tmp_path, "x")


# ------------------------------------------------------------------------------------------------------------
# Rows of new tokens beside an adapter
# ------------------------------------------------------------------------------------------------------------


def with_rows(directory, ids, options=None, vocab_size=0):
    model = load_pretrained(str(directory), dtype=torch.float32, vocab_size=vocab_size)
    options = options or ModelOptions(base_model=str(directory), adapter="lora", lora_r=4, lora_alpha=10)
    adapters.apply_lora(model, options, token_rows=ids)
    adapters.initialize_lora(model, 0)
    return model


def shaken(model):
    """Adapters and rows as training might leave them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


NEW = [11, 40, 90]


@pytest.mark.parametrize("name", ["llama2", "llama3", "gemma2", "phi3"])  # an untied head, and tied ones
def test_rows_of_new_tokens_go_between_peft_and_here_and_merge_exactly(name, references, tmp_path):
    import copy

    import peft

    reference, directory = references(name)
    ours = with_rows(directory, NEW)
    with torch.no_grad():
        assert (ours(ids()) - load_pretrained(str(directory), dtype=torch.float32)(ids())).abs().max() < 1e-5
    shaken(ours)
    adapters.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "ours").eval()
    save_pretrained(ours, tmp_path / "merged", merge=True)
    merged = load_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    with torch.no_grad():
        expected = ours(ids())
        assert (expected - theirs(ids()).logits).abs().max() < 1e-4
        assert (expected - merged(ids())).abs().max() < 1e-4
        assert (expected - theirs.merge_and_unload()(ids()).logits).abs().max() < 1e-4
    with adapters.adapters_disabled(ours), torch.no_grad():
        assert torch.equal(ours(ids()), load_pretrained(str(directory), dtype=torch.float32)(ids()))
    # What PEFT trained and saved
    rows = {"embed_tokens": NEW} if ours.arch.tied else {"embed_tokens": NEW, "lm_head": NEW}
    made = shaken(_peft(reference, target_modules="all-linear", trainable_token_indices=rows))
    made.save_pretrained(tmp_path / "theirs")
    options = adapters.read_adapter_options(tmp_path / "theirs", str(directory))
    again = with_rows(directory, adapters.adapter_token_rows(tmp_path / "theirs"), options)
    adapters.load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        assert (again(ids()) - made(ids()).logits).abs().max() < 1e-4


def test_rows_beyond_the_base_s_vocabulary_open_in_peft_which_grows_the_base(small_checkpoint, tmp_path):
    import peft

    from rollouts.chat import load_for_inference
    from text.tokenizer import Tokenizer

    directory = small_checkpoint[0]
    tokenizer = Tokenizer.load(directory)
    tokenizer.core.add_tokens([f"<new{i}>" for i in range(520 - tokenizer.vocab_size)])
    new = list(range(510, 520))
    ours = shaken(with_rows(directory, new, vocab_size=520))
    assert not adapters.rows_are_served(ours)
    adapters.save_adapter(ours, tmp_path / "final")
    tokenizer.save(tmp_path / "final")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    places = torch.tensor([[3, 519, 7, 511, 510, 9]])
    again, _ = load_for_inference(str(tmp_path / "final"), torch.float32)
    with torch.no_grad():
        assert (ours(places) - theirs(places).logits).abs().max() < 1e-4
        assert torch.equal(ours(places), again(places))
        assert ours.logits(ours.hidden_states(places)[0]).shape[-1] == 520


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_only_the_rows_of_new_tokens_learn_and_with_the_gradient_that_the_whole_matrix_has(name, references):
    """Against full fine-tuning's gradient of embedding and head, in fp64, at the base's weights."""
    from numerics.losses import linear_cross_entropy

    _, directory = references(name)
    whole = load_pretrained(str(directory), dtype=torch.float64).train()
    part = with_rows(directory, NEW).double().train()
    part.token_rows._index = None
    batch = ids()
    for model in (whole, part):
        hidden = model.hidden_states(batch)[0].flatten(0, 1)
        targets = torch.cat([batch[:, 1:], batch[:, :1]], 1).flatten()
        linear_cross_entropy(hidden, model.head_weight, targets).backward()
    rows = part.token_rows
    assert {n for n, p in part.named_parameters() if p.requires_grad and "lora_" not in n} == {
        f"token_rows.{n}" for n, _ in rows.named_parameters()
    }
    expected = whole.embed_tokens.weight.grad[NEW]
    assert (rows.embedding.grad - expected).abs().max() < 1e-9 and expected.abs().max() > 1e-3
    if not part.arch.tied:
        assert (rows.head.grad - whole.lm_head.weight.grad[NEW]).abs().max() < 1e-9
    assert part.embed_tokens.weight.grad is None


def test_an_adapter_whose_rows_are_no_list_of_ids_is_refused(references, tmp_path):
    _, directory = references("llama2")
    adapters.save_adapter(with_rows(directory, NEW), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for wrong in ({"embed_tokens": [1], "lm_head": [2]}, {"q_proj": [1]}, ["a"], {"embed_tokens": [-1]}, 3):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({**config, "trainable_token_indices": wrong})
        )
        with pytest.raises(CheckpointError, match="trainable_token_indices"):
            adapters.adapter_token_rows(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": [11]}))
    with pytest.raises(CheckpointError, match="not trained here"):
        adapters.load_adapter(with_rows(directory, []), tmp_path)
