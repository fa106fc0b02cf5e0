import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest
import torch

import model as ballast
from config import CheckpointError, ConfigError
from conftest import FAMILIES, make_reference
from generation import generate, sampling_logprobs
from model import ModelOptions
from weights import load_pretrained, save_pretrained

T = 40


def ids(seed=0, *shape):
    return torch.randint(3, 96, shape or (2, T), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------
# Against transformers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers_and_a_saved_copy_goes_back(name, references, tmp_path):
    import transformers

    reference, directory = references(name)
    model = load_pretrained(str(directory), dtype=torch.float32)
    expected = reference(ids()).logits
    assert (model(ids()) - expected).abs().max() < 1e-4

    save_pretrained(model, tmp_path)
    attention = reference.config._attn_implementation
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation=attention
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (again.eval()(ids()).logits - expected).abs().max() == 0


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_packed_padded_and_separate_documents_have_the_same_logits(name, references):
    reference, directory = references(name)
    model = load_pretrained(str(directory), dtype=torch.float32)
    lengths = [5, 1, 20, 14]
    documents = [ids(1, 1, n) for n in lengths]
    separate = [reference(document).logits[0] for document in documents]
    packed_ids = torch.cat(documents, 1)
    document_ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model(packed_ids, document_ids=document_ids)[0]
    assert (packed - torch.cat(separate)).abs().max() < 1e-4

    padded_ids = torch.zeros(4, 20, dtype=torch.long)
    padding = torch.full((4, 20), -1)
    for i, document in enumerate(documents):
        padded_ids[i, : lengths[i]] = document
        padding[i, : lengths[i]] = 0
    padded = model(padded_ids, document_ids=padding)
    for i, n in enumerate(lengths):
        assert (padded[i, :n] - separate[i]).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_cached_generation_agrees_with_the_full_forward(name, references):
    _, directory = references(name)
    model = load_pretrained(str(directory), dtype=torch.float32)
    prompts = [ids(2, 20).tolist(), ids(3, 7).tolist(), [5]]
    made = generate(
        model, prompts, max_new_tokens=15, num_return_sequences=2, generator=torch.Generator().manual_seed(0),
        stop_token_ids=[7, 8, 9],
    )  # fmt: skip
    for i, (completion, logprobs) in enumerate(zip(made.completion_ids, made.logprobs, strict=True)):
        prompt = prompts[i // 2]
        for j, (token, logprob) in enumerate(zip(completion, logprobs, strict=True)):
            full = model(torch.tensor([prompt + completion[:j]]))[0, -1].log_softmax(-1)
            assert abs(full[token].item() - logprob) < 1e-5


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


def test_a_saved_model_larger_than_one_shard_is_split_and_indexed(references, tmp_path, monkeypatch):
    import transformers

    reference, directory = references("mixtral")
    model = load_pretrained(str(directory), dtype=torch.float32)
    monkeypatch.setattr(ballast, "SHARD_BYTES", 30_000)
    save_pretrained(model, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() and not (
        tmp_path / "model.safetensors"
    ).exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert (again(ids()).logits - reference(ids()).logits).abs().max() == 0
    assert load_pretrained(str(tmp_path), dtype=torch.float32).arch.num_experts == 4


OLD_DIALECT = {
    "llama3": {"rope_theta": 10000.0, "rope_scaling": {k: v for k,
    v in FAMILIES["llama3"][1]["rope_parameters"].items() if k != "rope_theta"}},
    "llama-linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-dynamic": {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "qwen3-yarn": {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
    "original_max_position_embeddings": 16}},
    "gemma3": {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
    "gemma2": {"rope_theta": 10000.0},
    "qwen2": {"rope_theta": 10000.0},
    "smollm3": {"rope_theta": 2000000.0},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_DIALECT)
def test_the_older_dialect_of_config_json_means_the_same(name, references, tmp_path):
    """transformers 4 writes rope_theta and rope_scaling, and leaves layer_types out."""
    _, directory = references(name)
    raw = json.loads((directory / "config.json").read_text())
    old = {
        k: v
        for k, v in raw.items()
        if k not in ("rope_parameters", "layer_types", "dtype", "_sliding_window_pattern")
    }
    old |= {"torch_dtype": "float32", **OLD_DIALECT[name]}
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    with torch.no_grad():
        new_logits = load_pretrained(str(directory), dtype=torch.float32)(ids())
        assert (load_pretrained(str(tmp_path), dtype=torch.float32)(ids()) - new_logits).abs().max() == 0


def test_greedy_generation_equals_transformers(references):
    reference, directory = references("llama3")
    model = load_pretrained(str(directory), dtype=torch.float32)
    prompt = ids(4, 9)
    made = generate(model, [prompt.tolist()], max_new_tokens=20, temperature=0)
    expected = reference.generate(
        prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert made.completion_ids[0] == expected[0, 9:].tolist()
    assert made.finish_reasons == ["length"] and made.logprobs[0] == [0.0] * 20


def test_the_load_balancing_loss_equals_transformers(references):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    _, directory = references("mixtral")
    model = load_pretrained(str(directory), dtype=torch.float32)
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, 25:] = 0
    _, router_logits = model.hidden_states(ids())
    expected = load_balancing_loss_func(tuple(router_logits), 4, 2, mask)
    got = ballast.load_balancing_loss(router_logits, model.arch, mask.flatten() == 1)
    torch.testing.assert_close(got, expected)


# ------------------------------------------------------------------------------------------------------------
# What must be refused
# ------------------------------------------------------------------------------------------------------------


def _changed(references, tmp_path, name="llama2", **changes):
    _, directory = references(name)
    raw = json.loads((directory / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if not (tmp_path / "model.safetensors").exists():
        (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    return str(tmp_path)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"attention_sinks": 4}, "attention_sinks"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_act": "relu2"}, "relu2"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "twist": 2}}, "twist"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"intermediate_size": 64}, "mlp.gate_proj.weight"),
        ({"num_hidden_layers": 5}, "model.layers.4"),
        ({"num_hidden_layers": 3}, "model.layers.3"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(changes, named, references, tmp_path):
    with pytest.raises(CheckpointError, match=named) as caught:
        load_pretrained(_changed(references, tmp_path, **changes), dtype=torch.float32)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_switches_that_are_off_and_fields_that_the_user_vouches_for_are_accepted(references, tmp_path):
    load_pretrained(
        _changed(references, tmp_path, some_feature=False, other=None, attention_dropout=0.0),
        dtype=torch.float32,
    )
    raw = json.loads((tmp_path / "config.json").read_text()) | {"training_note": "x"}
    with pytest.raises(CheckpointError, match="training_note"):
        ballast.Architecture.from_config(raw)
    ballast.Architecture.from_config(raw, ignore=["training_note"])


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


# ------------------------------------------------------------------------------------------------------------
# Vocabulary, hub, recomputation
# ------------------------------------------------------------------------------------------------------------


def test_a_grown_vocabulary_keeps_its_rows_and_adds_mean_rows(references, tmp_path):
    from pathlib import Path

    _, directory = references("llama2")
    arch = ballast.resized(ballast.read_architecture(Path(directory)), 128)
    model = ballast.Transformer(arch)
    ballast.load_weights(model, Path(directory))
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


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download of one repository uses."""

    folder, requests, kind = None, [], "models"

    def _answer(self, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        self.requests.append(path)
        files = {p.name: p for p in self.folder.iterdir()}
        if path.startswith(f"/api/{self.kind}/org/tiny/tree/"):
            tree = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": "b" * 40}
                for n, p in files.items()
            ]
            data, headers = json.dumps(tree).encode(), {"Content-Type": "application/json"}
        elif path.startswith(f"/api/{self.kind}/org/tiny"):
            facts = {"id": "org/tiny", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in files]}
            facts["private"], facts["tags"], facts["downloads"], facts["likes"] = False, [], 0, 0
            data, headers = json.dumps(facts).encode(), {"Content-Type": "application/json"}
        elif "/org/tiny/resolve/" in path and path.rsplit("/", 1)[1] in files:
            data = files[path.rsplit("/", 1)[1]].read_bytes()
            headers = {"ETag": f'"{abs(hash(path))}"', "X-Repo-Commit": "a" * 40}
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def do_GET(self):
        self._answer(True)

    def do_HEAD(self):
        self._answer(False)

    def log_message(self, *_):
        pass


def test_a_hub_id_is_downloaded_once_and_an_unknown_one_is_named(references, tmp_path):
    """In a process of its own: huggingface-hub reads its address when it is imported."""
    import subprocess
    import sys

    from conftest import ROOT

    _, directory = references("qwen3")
    handler = type("Hub", (_Hub,), {"folder": directory, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import torch, weights, config\n"
        "m = weights.load_pretrained('org/tiny', dtype=torch.float32)\n"
        "print('layers', len(m.layers))\n"
        "try: weights.load_pretrained('org/absent', dtype=torch.float32)\n"
        "except config.CheckpointError as error: print('refused', error)\n"
    )
    import os

    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path),
           "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    server.shutdown()
    assert "layers 4" in done.stdout, done.stderr
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused")]
    assert len(refused) == 1 and "org/absent" in refused[0]
    assert any("model.safetensors" in path for path in handler.requests)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(reentrant, references):
    _, directory = references("mixtral")
    model = load_pretrained(str(directory), dtype=torch.float64).train()
    gradients = []
    for checkpointing in (None, reentrant):
        for block in model.layers:
            block.checkpointing = checkpointing
        model.zero_grad()
        hidden, router_logits = model.hidden_states(ids())
        (hidden.square().sum() + ballast.load_balancing_loss(router_logits, model.arch)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_random_initialisation_depends_on_the_seed_alone():
    from pathlib import Path

    arch = ballast.read_architecture(Path(__file__).parent.parent / "configs/tiny")
    models = [ballast.Transformer(arch) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        ballast.initialize(model, seed)
    one, same, other = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embed_tokens.weight"], other["embed_tokens.weight"])
    weight = one["layers.0.mlp.up_proj.weight"]
    assert weight.std().item() == pytest.approx(arch.raw["initializer_range"], rel=0.05)


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [dict(top_k=3), dict(top_p=0.7), dict(min_p=0.2), dict(top_k=6, top_p=0.8, min_p=0.05), dict()]
)
def test_the_sampled_distribution_is_the_truncated_and_renormalised_one(how):
    torch.manual_seed(0)
    logits = torch.randn(50, 20, dtype=torch.float64) * 2
    got = sampling_logprobs(logits, 0.7, **how).exp()
    for row in range(50):
        p = torch.softmax(logits[row] / 0.7, -1)
        keep = p >= how.get("min_p", 0.0) * p.max()
        if how.get("top_k"):
            order = (p * keep).argsort(descending=True)[: how["top_k"]]
            keep &= torch.isin(torch.arange(20), order)
        q = p * keep / (p * keep).sum()
        if how.get("top_p", 1.0) < 1:
            mass = 0.0
            chosen = []
            for token in q.argsort(descending=True).tolist():
                if mass < how["top_p"]:
                    chosen.append(token)
                mass += q[token].item()
            q = torch.where(torch.isin(torch.arange(20), torch.tensor(chosen)), q, 0.0)
            q = q / q.sum()
        torch.testing.assert_close(got[row], q)


def test_draws_follow_the_distribution_and_never_leave_its_support():
    torch.manual_seed(0)
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    draws = ballast.sample(p.log().expand(20000, -1), torch.Generator().manual_seed(1))
    counts = torch.bincount(draws, minlength=6) / 20000
    assert (counts[p == 0] == 0).all()
    assert (counts - p).abs().max() < 4 * math.sqrt(0.25 / 20000)  # four standard errors


def test_generation_is_reproducible_shares_a_prefill_and_ends_at_stop_tokens(references):
    _, directory = references("qwen3")
    model = load_pretrained(str(directory), dtype=torch.float32)
    prompts = [ids(5, 11).tolist(), ids(6, 4).tolist()]
    passes = []
    original = model.hidden_states

    def counted(input_ids, **kwargs):
        passes.append(tuple(input_ids.shape))
        return original(input_ids, **kwargs)

    model.hidden_states = counted
    how = dict(max_new_tokens=12, num_return_sequences=3, stop_token_ids=range(3, 20))
    one = generate(model, prompts, generator=torch.Generator().manual_seed(3), **how)
    assert passes[0] == (1, 15)  # both prompts once, packed, for six completions
    assert passes[-1][0] < 6  # finished sequences have left
    two = generate(model, prompts, generator=torch.Generator().manual_seed(3), **how)
    assert one == two and len(one.completion_ids) == 6
    for completion, reason in zip(one.completion_ids, one.finish_reasons, strict=True):
        stops = [token in range(3, 20) for token in completion]
        assert not any(stops[:-1]) and stops[-1] == (reason == "stop")
        assert reason == "stop" or len(completion) == 12
    for bad in (
        dict(max_new_tokens=0),
        dict(max_new_tokens=1, top_p=0.0),
        dict(max_new_tokens=1, temperature=-1),
    ):
        with pytest.raises(ValueError):
            generate(model, prompts, **bad)
    with pytest.raises(ValueError):
        generate(model, [[]], max_new_tokens=1)


def test_a_cache_that_outgrows_its_room_goes_on(references):
    _, directory = references("qwen3")
    model = load_pretrained(str(directory), dtype=torch.float32)
    prompt = [5, 6, 7]
    made = generate(model, [prompt], max_new_tokens=150, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model(torch.tensor([prompt + made.completion_ids[0]]))[0].log_softmax(-1)
    expected = full[2:-1].gather(-1, torch.tensor(made.completion_ids[0])[:, None])[:, 0]
    assert (expected - torch.tensor(made.logprobs[0])).abs().max() < 1e-5


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
    model = ballast.apply_lora(base, ballast.read_adapter_options(tmp_path / "theirs", str(directory)))
    ballast.load_adapter(model, tmp_path / "theirs")
    assert (model.eval()(ids()) - expected).abs().max() < 1e-4
    with ballast.adapters_disabled(model):
        assert torch.equal(model(ids()), before)
    assert (model(ids()) - before).abs().max() > 1e-2

    ballast.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(directory), tmp_path / "ours"
    ).eval()
    assert (again(ids()).logits - expected).abs().max() < 1e-4

    weights = {n: p.clone() for n, p in model.named_parameters()}
    save_pretrained(model, tmp_path / "merged", merge=True)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())  # nothing is merged in place
    merged = load_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    assert (merged(ids()) - expected).abs().max() < 1e-4


def test_lora_trains_adapters_only_and_starts_as_the_base(references):
    _, directory = references("qwen3")
    model = load_pretrained(str(directory), dtype=torch.float32)
    with torch.no_grad():
        before = model(ids())
    ballast.apply_lora(model, ModelOptions(base_model="x", adapter="lora", lora_r=3, lora_dropout=0.5))
    ballast.initialize_lora(model, seed=0)
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
        ballast.apply_lora(load_pretrained(str(directory), dtype=torch.float32), options)


def test_an_adapter_of_an_unknown_kind_is_refused_by_name(tmp_path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="use_dora"):
        ballast.read_adapter_options(tmp_path, "x")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="IA3"):
        ballast.read_adapter_options(tmp_path, "x")
