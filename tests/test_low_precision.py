"""FP8, NF4, int8 and 8-bit AdamW. Triton kernels run in Triton's interpreter, in processes of their own
(TRITON_INTERPRET must be set before triton is imported): tests/interpreted.py."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as model_module
from checkpoints.weights import load_pretrained, load_weights, read_architecture
from conftest import CHATML_TEMPLATE, CHATML_TOKENS, ROOT, make_reference, run_program, write_tokenizer
from health import memory
from model import ModelOptions
from numerics import low_precision


def fp8_step(x):
    """Distance of neighbouring e4m3 numbers around x: 2⁻³ of its power of two, at least 2⁻⁹."""
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=2.0**-6))) - 3)


@pytest.mark.parametrize("shape", [(1, 1), (5, 128), (3, 300), (130, 257), (64, 1)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_tiles_are_within_half_a_step_and_use_the_whole_range(shape, power_of_two):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).float() * torch.logspace(-6, 6, shape[0])[:, None]
    q, scale = low_precision.quantize_fp8_reference(x, power_of_two)
    back = low_precision.dequantize_fp8(q, scale).double()
    tile = scale.repeat_interleave(128, 1)[:, : shape[1]].double()
    assert ((back - x).abs() <= 0.5001 * fp8_step(x.double() / tile) * tile).all()
    exact = torch.nn.functional.pad(x.abs(), (0, -shape[1] % 128)).view(shape[0], -1, 128).amax(-1) / 448
    if power_of_two:
        assert (torch.frexp(scale).mantissa == 0.5).all()
        assert (scale >= exact).all() and (scale < 2 * exact * 1.0001).all()
    else:
        torch.testing.assert_close(scale, exact, rtol=1e-6, atol=0)


def test_fp8_zero_tiles_get_scale_one_and_faults_stay_where_they_are():
    x = torch.randn(4, 256)
    x[0, :128] = 0
    x[1, 5], x[1, 6], x[1, 7] = float("nan"), float("inf"), -float("inf")
    x[2, :128] = 1e-42
    x[3, 200] = 3e38
    for quantize, rows in (
        (low_precision.quantize_fp8_reference, 1),
        (low_precision.quantize_fp8_blocks_reference, 128),
    ):
        q, scale = quantize(x)
        assert scale.isfinite().all() and (scale > 0).all()
        back = low_precision.dequantize_fp8(q, scale, rows)
        assert back[1].isnan().nonzero().flatten().tolist() == [5, 6, 7]
        assert back[[0, 2, 3]].isfinite().all()
    q, scale = low_precision.quantize_fp8_reference(x)
    assert scale[0, 0] == 1 and (q[0, :128].float() == 0).all()
    assert (low_precision.dequantize_fp8(q, scale)[3, 200] / 3e38 - 1).abs() < 1e-5


@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (7, 130, 300), (128, 128, 128), (33, 5, 129)])
def test_fp8_linear_is_close_to_fp32_in_value_and_both_gradients(M, N, K):
    torch.manual_seed(0)
    x = torch.randn(M, K, requires_grad=True)
    w = torch.randn(N, K, requires_grad=True)
    g = torch.randn(M, N)
    y = low_precision.fp8_linear(x, w)
    exact = x @ w.T
    grads = torch.autograd.grad(y, (x, w), g)
    expected = torch.autograd.grad(exact, (x, w), g)
    for got, want in zip((y, *grads), (exact, *expected), strict=True):
        # Two operands with relative rounding errors of at most 2⁻⁴, averaging out over the sum.
        assert (got - want).norm() <= 0.06 * want.norm() + 1e-6, (got - want).norm() / want.norm()


def test_nf4_codes_packing_and_both_levels_are_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    w = torch.randn(96, 640) * torch.rand(96, 1)
    packed, absmax_codes, nested, offset = low_precision.quantize_nf4(w)
    theirs, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert (theirs.flatten() == packed.flatten()).float().mean() > 0.9999
    torch.testing.assert_close(state.offset.float(), offset)
    torch.testing.assert_close(state.state2.absmax, nested)
    torch.testing.assert_close(state.state2.code, low_precision.dynamic_code(True), atol=1e-6, rtol=0)
    assert (state.absmax.flatten() == absmax_codes.flatten()).float().mean() > 0.99
    back = bnb.functional.dequantize_4bit(theirs, state)
    ours = low_precision.dequantize_nf4(
        theirs.view(96, -1), state.absmax.view(96, -1), state.state2.absmax, state.offset
    )
    torch.testing.assert_close(ours, back, atol=1e-5, rtol=1e-5)


def test_int8_rows_are_bitsandbytes_and_within_half_a_step():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    w = torch.randn(64, 128)
    q, scale = low_precision.quantize_int8(w)
    theirs, absmax, _ = bnb.functional.int8_vectorwise_quant(w.half())
    assert (theirs - q).abs().max() <= 1
    torch.testing.assert_close(absmax / 127, scale, rtol=1e-3, atol=0)
    assert ((q * scale[:, None] - w).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("kind, most", [("nf4", 0.55), ("int8", 1.04), ("fp8", 1.04)])
def test_a_stored_weight_takes_few_bytes_and_multiplies_like_its_dense_form(kind, most):
    torch.manual_seed(0)
    w = torch.randn(256, 512)
    stored = low_precision.quantize(kind, w)
    assert sum(t.numel() * t.element_size() for t in stored) / w.numel() <= most
    dense = low_precision.dequantize(kind, stored)
    assert (dense - w).norm() / w.norm() < {"nf4": 0.11, "int8": 0.012, "fp8": 0.03}[kind]
    x = torch.randn(5, 3, 512, requires_grad=True)
    y = low_precision.frozen_linear(x, kind, stored, bias=torch.ones(256))
    expected = x @ dense.T + 1
    g = torch.randn_like(expected)
    tolerance = 0.05 if kind == "fp8" else 1e-5  # FP8 quantises the input too
    assert (y - expected).norm() <= tolerance * expected.norm()
    (dx,) = torch.autograd.grad(y, x, g)
    assert (dx - g @ dense).norm() <= tolerance * dx.norm()


def test_nf4_refuses_rows_that_blocks_would_straddle():
    with pytest.raises(ValueError, match="multiple of 64"):
        low_precision.quantize_nf4(torch.randn(4, 100))


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_code_is_bitsandbytes_and_requantising_is_exact(signed):
    code = low_precision.dynamic_code(signed)
    assert len(code) == 256 and (code.diff() > 0).all() and code[-1] == 1 and (code == 0).any()
    torch.manual_seed(0)
    x = torch.randn(1000) if signed else torch.rand(1000)
    q, absmax = low_precision.quantize_blockwise(x, code, signed_scale=True)
    back = low_precision.dequantize_blockwise(q, absmax, code)
    again, absmax_again = low_precision.quantize_blockwise(back, code, signed_scale=True)
    assert torch.equal(q, again) and torch.equal(absmax, absmax_again)
    zero, absmax = low_precision.quantize_blockwise(torch.zeros(300), code)
    assert (low_precision.dequantize_blockwise(zero, absmax, code) == 0).all()


def test_adamw_8bit_is_as_close_to_adamw_as_bitsandbytes_and_its_state_dict_goes_on_exactly():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, target = torch.randn(64, 128), torch.randn(64, 128)
    how = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    make = {
        "exact": torch.optim.AdamW, "ours": low_precision.AdamW8bit, "resumed": low_precision.AdamW8bit,
        "theirs": bnb.optim.AdamW8bit,
    }
    ends = {}
    for name, optimizer_class in make.items():
        p = torch.nn.Parameter(start.clone())
        optimizer = optimizer_class([p], **how)
        for step in range(60):
            if name == "resumed" and step == 30:
                state = optimizer.state_dict()
                assert state["state"][0]["exp_avg"].shape == p.shape
                optimizer = optimizer_class([p], **how)
                optimizer.load_state_dict(state)
            noise = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
            p.grad = 2 * (p.detach() - target) + 0.1 * noise
            optimizer.step()
        ends[name] = p.detach().clone()
        if name == "ours":
            assert memory.optimizer_bytes([optimizer]) / p.numel() < 2.04
    assert torch.equal(ends["ours"], ends["resumed"])
    error = {name: (ends[name] - ends["exact"]).norm() for name in ("ours", "theirs")}
    assert error["ours"] < 1.1 * error["theirs"] and error["ours"] < 0.1 * (ends["exact"] - start).norm()


def test_adamw_8bit_in_slices_gives_the_same_bits_and_only_ever_copies_a_slice(monkeypatch):
    largest = 0
    plain = low_precision.quantize_blockwise

    def noted(x, *args, **kwargs):
        nonlocal largest
        largest = max(largest, x.numel())
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(low_precision, "quantize_blockwise", noted)
    ends = []
    for size in (1 << 22, 1024):
        monkeypatch.setattr(low_precision, "SLICE", size)
        largest, state = 0, None
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(77, 91, generator=generator))  # no multiple of a block
        for _ in range(2):
            optimizer = low_precision.AdamW8bit([p], lr=1e-2)
            if state is not None:
                optimizer.load_state_dict(state)
            for _ in range(5):
                p.grad = torch.randn(p.shape, generator=generator)
                optimizer.step()
            state = optimizer.state_dict()
        ends.append((p.detach().clone(), state["state"][0]["exp_avg_sq"]))
        assert largest == min(size, p.numel())
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])


# ------------------------------------------------------------------------------------------------------------
# In the recipe
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory):
    """A random Qwen3 whose widths are multiples of 64 but not of 128."""
    directory = tmp_path_factory.mktemp("wide")
    write_tokenizer(directory, CHATML_TEMPLATE, CHATML_TOKENS, "<|im_end|>")
    shape = dict(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        vocab_size=512,
        max_position_embeddings=512,
    )
    make_reference("qwen3", **shape).save_pretrained(directory)
    return directory


WAYS = {
    "fp32": {}, "fp8": dict(fp8=True), "adamw_8bit": dict(optimizer="adamw_8bit"),
    "lora": dict(adapter="lora"),
    "fp8_frozen": dict(adapter="lora", fp8_frozen=True), "nf4": dict(adapter="qlora", load_in_4bit=True),
    "int8": dict(adapter="lora", load_in_8bit=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WAYS if name not in ("fp32", "lora")])
def test_the_recipe_trains_in_low_precision_on_one_and_two_ranks(name, wide_checkpoint, chat_file, tmp_path):
    """Losses follow full precision, two ranks follow one, and what is saved loads."""
    losses = {}
    base = "lora" if "adapter" in WAYS[name] else "fp32"
    for way, ranks in ((base, 1), (name, 1), (name, 2)):
        out = tmp_path / f"{way}-{ranks}"
        options = {**WAYS[way], "merge_adapter": "adapter" in WAYS[way]}
        options |= {"gradient_checkpointing": ranks == 2, "micro_batch_size": 8 // ranks}
        done = run_program(
            ROOT / "sft.py", f"base_model={wide_checkpoint}", f"output_dir={out}", "sequence_len=256",
            f"datasets=[{{path: {chat_file}, type: chat}}]", "learning_rate=2e-3", "max_steps=6",
            "save_steps=3", *[f"{key}={value}" for key, value in options.items()], ranks=ranks,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[way, ranks] = [row["train/loss"] for row in rows]
    one, two, full = losses[name, 1], losses[name, 2], losses[base, 1]
    assert one == pytest.approx(two, rel=5e-3)
    assert one == pytest.approx(full, rel=0.06 if name == "nf4" else 0.03)
    assert one[-1] < one[0]
    model = load_pretrained(str(tmp_path / f"{name}-2" / "final"), dtype=torch.float32)
    assert model.arch.num_layers == 2 and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["adamw_8bit", "nf4"])
def test_low_precision_runs_resume_to_the_same_bytes(name, wide_checkpoint, chat_file, tmp_path):
    finals = []
    for out, stops in ((tmp_path / "whole", [6]), (tmp_path / "halves", [3, 6])):
        for stop in stops:
            if stop == 6 and len(stops) == 2:  # as after a kill: only the checkpoint of step 3 is left
                for path in (out / "checkpoints").iterdir():
                    if path.name not in ("step-3", "latest"):
                        shutil.rmtree(path)
            done = run_program(
                ROOT / "sft.py", f"base_model={wide_checkpoint}", f"output_dir={out}", "sequence_len=256",
                f"datasets=[{{path: {chat_file}, type: chat}}]", "learning_rate=2e-3", "micro_batch_size=8",
                "max_steps=6", "save_steps=3", "save_total_limit=5",
                "merge_adapter=" + str("adapter" in WAYS[name]),
                *[f"{key}={value}" for key, value in WAYS[name].items()],
            )
            assert done.returncode == 0, done.stdout + done.stderr
        finals.append((out / "final" / "model.safetensors").read_bytes())
    assert finals[0] == finals[1]


@pytest.mark.parametrize("kind, option", [("nf4", "load_in_4bit"), ("int8", "load_in_8bit")])
def test_a_checkpoint_that_bitsandbytes_quantised_is_read_as_it_is(kind, option, wide_checkpoint, tmp_path):
    """Its tensors, in the layout that transformers saves; no GPU is needed to make them."""
    bnb = pytest.importorskip("bitsandbytes")
    weights = load_file(wide_checkpoint / "model.safetensors")
    quantised, dense = {}, {}
    for name, w in weights.items():
        if "_proj" not in name:
            quantised[name] = dense[name] = w
        elif kind == "nf4":
            q, state = bnb.functional.quantize_4bit(
                w, blocksize=64, quant_type="nf4", compress_statistics=True
            )
            quantised[name] = q
            quantised |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
            dense[name] = bnb.functional.dequantize_4bit(q, state)
        else:
            q, scb, _ = bnb.functional.int8_vectorwise_quant(w.half())
            quantised[name], quantised[name.removesuffix("weight") + "SCB"] = q, scb
            dense[name] = q.float() * scb.float()[:, None] / 127
    for directory, tensors in ((tmp_path / "quantised", quantised), (tmp_path / "dense", dense)):
        directory.mkdir()
        config = json.loads((wide_checkpoint / "config.json").read_text())
        if tensors is quantised:
            config["quantization_config"] = {
                "quant_method": "bitsandbytes",
                option: True,
                "bnb_4bit_quant_type": "nf4",
            }
        (directory / "config.json").write_text(json.dumps(config))
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    expected = load_pretrained(str(tmp_path / "dense"), dtype=torch.float32)
    ids = torch.randint(3, 500, (1, 20))
    with torch.no_grad():
        got = load_pretrained(str(tmp_path / "quantised"), dtype=torch.float32)
        assert (got(ids) - expected(ids)).abs().max() < 1e-4
        arch = read_architecture(tmp_path / "quantised")
        stored = model_module.Transformer(arch)
        model_module.set_precision(stored, ModelOptions(**{option: True}))
        load_weights(stored, tmp_path / "quantised")
        assert stored.layers[0].mlp.up_proj.kind == kind
        assert (stored(ids) - expected(ids)).abs().max() < 1e-3


@pytest.mark.parametrize(
    "options, named",
    [
        (["load_in_4bit=true"], "adapter: qlora"), (["adapter=qlora"], "load_in_4bit"),
        (["adapter=qlora", "load_in_4bit=true", "load_in_8bit=true"], "contradicts"),
        (["adapter=qlora", "load_in_4bit=true", "fp8=true"], "contradicts"),
    ],
)
def test_low_precision_options_that_contradict_are_refused(
    options, named, wide_checkpoint, chat_file, tmp_path
):
    done = run_program(
        ROOT / "sft.py", f"base_model={wide_checkpoint}",
            f"datasets=[{{path: {chat_file}, type: chat}}]",
        f"output_dir={tmp_path}", *options,
    )
    assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_triton_kernels_equal_their_references_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(ROOT / "tests" / "interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "KERNELS": "triton"}, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_its_whole_table_on_small_shapes():
    done = run_program(ROOT / "bench" / "gpu.py", "--small", "linear", "norm", "attention E 64", "nf4")
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [line.split()[-2] for line in done.stdout.splitlines() if line.startswith("  ours")]
    assert len(errors) >= 6 and all(float(error) < 0.2 for error in errors if error != "—")


@pytest.mark.parametrize("capability, taken", [((8, 0), "torch"), ((8, 6), "torch"), ((8, 9), "triton"),
                                               ((9, 0), "triton"), ((10, 0), "triton")])
def test_no_kernel_with_e4m3_is_taken_on_a_gpu_that_has_none(capability, taken, monkeypatch):
    """Triton has e4m3 from sm_89 on: every entry that could reach such a kernel asks."""
    gpu = SimpleNamespace(is_cuda=True, device="cuda:0", shape=(4, 128))
    monkeypatch.setattr(low_precision, "use_triton", lambda x: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for name in ("quantize_fp8_reference", "quantize_fp8_blocks_reference", "fp8_matmul_reference"):
        monkeypatch.setattr(low_precision, name, lambda *_: "torch")

    class Launched(Exception):
        pass

    def launch(*_, **__):
        raise Launched

    monkeypatch.setattr(low_precision, "_quantize_fp8_triton", launch)
    monkeypatch.setattr(torch, "empty", launch)  # the first thing that fp8_matmul does for its kernel
    calls = [
        lambda: low_precision.quantize_fp8(gpu), lambda: low_precision.quantize_fp8_blocks(gpu),
        lambda: low_precision.fp8_matmul(gpu, None, gpu, None),
    ]
    for call in calls:
        if taken == "torch":
            assert call() == "torch"
        else:
            with pytest.raises(Launched):
                call()
