"""EBFT: whitening, reward and advantage against golden numbers; blocks against ordinary causal passes; the
recipe."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import dist
from checkpoints.weights import load_pretrained
from conftest import ROOT, run_program
from data import DataOptions, Prompt, read_prompts
from ebft import (
    Config,
    Conversation,
    advantages,
    alignment,
    cfm_loss,
    diversity,
    group_features,
    true_completion,
    whiten,
)
from rollouts.blocks import read_blocks
from rollouts.environments import play
from rollouts.rollout import Rollout
from rollouts.vllm_server import Completion
from run.config import DataError
from text.tokenizer import Tokenizer

ALONE = dist.World(0, 1, 0, torch.device("cpu"))
GOLDEN = json.loads((Path(__file__).parent / "ebft_golden.json").read_text())


def golden(case: str, name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[case][name], dtype=torch.float64)[None]


@pytest.mark.parametrize("case", [name for name, value in GOLDEN.items() if isinstance(value, dict)])
def test_reward_and_advantage_meet_the_golden_numbers(case):
    samples, truth = golden(case, "gen"), golden(case, "gt")
    if "whiten" in case:
        if case.startswith("n4"):
            raw, target = golden("n4_plain", "gen"), golden("n4_plain", "gt")[:, 0]
        else:
            raw = torch.tensor(GOLDEN["gen"], dtype=torch.float64)[None]
            target = torch.tensor(GOLDEN["gt"], dtype=torch.float64)[None]
        white, its_truth, fallback = whiten(raw, target, "feature" if "feature" in case else "sample")
        assert (
            (white - samples).abs().max() < 1e-9 and (its_truth - truth).abs().max() < 1e-9 and not fallback
        )
        samples, truth = white, its_truth
    align, diverse = alignment(samples, truth), diversity(samples)
    made = {
        "alignment": align, "diversity": diverse, "reward": align - diverse,
        "advantage_rloo": advantages(align, diverse, "rloo"),
        "group_norm": advantages(align, diverse, "group_norm"),
    }
    for name, value in made.items():
        assert (value - golden(case, name)).abs().max() < 1e-9, name
    # In sample space the truth has a row a sample, and the golden number is for the first row alone: it would
    # change with the order of the samples. Ours is for their mean.
    expected = (
        (samples.mean(1) - truth[:, 0]).square().sum() if "sample_space" in case else cfm_loss(samples, truth)
    )
    assert expected.item() == pytest.approx(GOLDEN[case]["cfm_loss"], abs=1e-9)


@pytest.mark.parametrize("n, D, rank", [(4, 9, 4), (4, 9, 2), (6, 3, 3), (5, 8, 1), (3, 5, 0)])
def test_whitening_equals_the_pseudo_inverse_square_root(n, D, rank):
    generator = torch.Generator().manual_seed(n * D + rank)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, g = draw(2, n, rank) @ draw(2, rank, D), draw(2, D)

    def inverse_root(gram: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(gram)
        kept = values > 1e-10 * values.max().clamp(min=1e-300)
        return vectors @ torch.diag(torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)) @ vectors.T

    for form in ("feature", "sample"):
        white, truth, _ = whiten(x, g, form)
        assert torch.isfinite(white).all() and torch.isfinite(truth).all()
        for i in range(2):
            if form == "feature":
                W = inverse_root(x[i].T @ x[i])
                expected, its = x[i] @ W, (g[i] @ W).expand(n, D)
            else:
                W = inverse_root(x[i] @ x[i].T)
                expected, its = W @ x[i], W @ g[i].expand(n, D)
            assert (white[i] - expected).abs().max() < 1e-7 and (truth[i] - its).abs().max() < 1e-7


def test_independent_samples_have_no_diversity_after_whitening_and_repeated_ones_do():
    x = torch.randn(1, 4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert diversity(whiten(x, x[:, 0], "feature")[0]).abs().max() < 1e-9
    x[0, 1] = x[0, 0]
    assert diversity(whiten(x, x[:, 0], "feature")[0])[0, :2].min() > 0.1


def test_feature_whitening_spreads_one_unit_of_alignment_over_independent_samples():
    """Their whitened rows are an orthonormal basis of the space that the truth is projected into: the squares
    of its cosines sum to 1 whatever the truth is, so their mean cannot rise. In sample space it can."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, unrelated = draw(50, 6, 40), draw(50, 40)
    total = {}
    for form in ("feature", "sample"):
        for name, truth in (("one of them", x[:, 0]), ("their mean", x.mean(1)), ("unrelated", unrelated)):
            white, its, _ = whiten(x, truth, form)
            total[form, name] = (alignment(white, its) / 2).square().sum(-1)
    for name in ("one of them", "their mean", "unrelated"):
        assert (total["feature", name] - 1).abs().max() < 1e-9
    assert (total["sample", "one of them"] - 1).abs().max() < 1e-9
    assert total["sample", "unrelated"].mean() < 0.4


@pytest.mark.parametrize("form, independent", [("none", True), ("feature", False), ("sample", False)])
def test_the_baseline_depends_on_the_sample_only_through_whitening(form, independent):
    generator = torch.Generator().manual_seed(3)
    x = torch.nn.functional.normalize(torch.randn(1, 4, 9, generator=generator, dtype=torch.float64), dim=-1)
    g = torch.nn.functional.normalize(torch.randn(1, 9, generator=generator, dtype=torch.float64), dim=-1)

    def baseline(x: torch.Tensor) -> float:
        white, its = (x, g[:, None].expand_as(x)) if form == "none" else whiten(x, g, form)[:2]
        align, diverse = alignment(white, its), diversity(white)
        return (align - diverse - advantages(align, diverse, "rloo"))[0, 0].item()

    changed = torch.cat([-x[:, :1] + 0.3 * x[:, 1:2], x[:, 1:]], dim=1)
    assert (abs(baseline(changed) - baseline(x)) < 1e-12) == independent


def test_features_that_are_not_finite_fall_back_and_never_give_nan():
    x = torch.randn(2, 3, 5)
    x[0, 0, 0] = float("nan")
    white, truth, fallback = whiten(x, torch.randn(2, 5), "feature")
    assert torch.isfinite(white).all() and torch.isfinite(truth).all() and fallback == 2


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_baseline_of_a_sample_does_not_depend_on_the_sample(n):
    generator = torch.Generator().manual_seed(n)
    x, g = torch.randn(1, n, 7, generator=generator), torch.randn(1, 1, 7, generator=generator)

    def baseline(x: torch.Tensor) -> float:
        x = F.normalize(x, dim=-1)
        align, diverse = alignment(x, g.expand_as(x)), diversity(x)
        return (align - diverse - advantages(align, diverse, "rloo"))[0, 0].item()

    before = baseline(x)
    x[0, 0] = torch.randn(7, generator=generator) * 5
    assert baseline(x) == pytest.approx(before, abs=1e-6)


def test_the_policy_gradient_is_unbiased_for_the_feature_matching_objective():
    """A policy over six outcomes, whose exact gradient of E[alignment] − ½·E[x·x′·2] can be written down."""
    torch.manual_seed(0)
    features = F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=-1)
    truth = F.normalize(torch.randn(4, dtype=torch.float64), dim=-1)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    p = logits.softmax(-1)
    pairs = features @ features.T
    # A sample's own diversity term: half of the pair's gradient each
    objective = 2 * p @ (features @ truth) - p @ pairs @ p
    (exact,) = torch.autograd.grad(objective, logits)
    n, draws = 4, 60000
    chosen = torch.multinomial(p.detach().expand(draws, 6), n, replacement=True)
    x = features[chosen]
    weights = advantages(alignment(x, truth.expand_as(x)), diversity(x), "rloo")
    score = F.one_hot(chosen, 6).double() - p.detach()  # ∇ log p
    estimate = (weights[..., None] * score).mean(1)
    error = estimate.std(0) / draws**0.5
    assert ((estimate.mean(0) - exact).abs() < 4 * error).all(), (estimate.mean(0), exact, error)


# ------------------------------------------------------------------------------------------------------------
# The recipe
# ------------------------------------------------------------------------------------------------------------


def run_ebft(checkpoint, texts, out, *options, ranks=1, code=0):
    done = run_program(
        ROOT / "ebft.py", f"base_model={checkpoint}", f"datasets=[{{path: {texts}, type: text}}]",
        f"output_dir={out}",
        "mode=strided", "val_set_size=4", "micro_batch_size=2", "max_steps=4", "learning_rate=1e-3",
        "stride=4",
        "generate_max_len=4",
        "n_samples_per_prompt=3", "temperature=1.0", "sequence_len=64", *options, ranks=ranks,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more",
[["ce_coef=0.1"], ["adapter=lora", "lora_r=4", "gradient_checkpointing=true"],
                                  ["use_whitening=true", "gradient_checkpointing=true",
                                   "gradient_checkpointing_kwargs={use_reentrant: true}"]])
def test_a_run_reports_its_energy_and_records_its_blocks(more, small_checkpoint, texts, tmp_path):
    rows = run_ebft(small_checkpoint[0], texts, tmp_path, *more)
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4]
    last = rows[-1]
    for name in ("alignment", "diversity", "cfm_loss", "reward", "rl_loss", "advantages_std", "num_blocks",
                 "skipped_documents", "alignment_cosine", "pairwise_cosine"):
        assert abs(last[f"ebft/{name}"]) < 1e4, name
    assert last["train/grad_norm"] > 0 and last["sampling/sampling_logp_difference/max"] < 1e-4
    assert (
        last["ebft/alignment"] == pytest.approx(2 * last["ebft/alignment_cosine"], abs=1e-5)
        or "whitening" in more[0]
    )
    lines = [json.loads(x) for x in (tmp_path / "rollouts" / "step-0.jsonl").read_text().splitlines()]
    samples = [sample for line in lines for block in line["block_ids"] for sample in block]
    assert len(samples) == rows[1]["ebft/num_blocks"] * 3 and all(len(x) == 4 for x in samples)


@pytest.mark.slow
def test_runs_do_not_depend_on_how_samples_and_documents_are_cut(small_checkpoint, texts, tmp_path):
    """The same samples: one micro-batch, so the same random numbers; one, two or three of them a pass."""
    results = []
    for m in (1, 2, 3):
        rows = run_ebft(
            small_checkpoint[0], texts, tmp_path / str(m), f"samples_a_pass={m}", "ce_coef=0.1", "max_steps=2"
        )
        results.append(
            [
                {
                    k: r.get(k)
                    for k in ("train/loss", "train/grad_norm", "entropy", "ebft/reward", "ebft/ce_loss")
                }
                for r in rows[1:]
            ]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            for key, value in a.items():
                assert b[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_a_resumed_run_ends_with_the_same_bytes(small_checkpoint, texts, tmp_path):
    run_ebft(small_checkpoint[0], texts, tmp_path / "a", "save_steps=2")
    whole = (tmp_path / "a" / "final" / "model.safetensors").read_bytes()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-4")
    run_ebft(small_checkpoint[0], texts, tmp_path / "b", "save_steps=2")
    assert (tmp_path / "b" / "final" / "model.safetensors").read_bytes() == whole


def test_recorded_blocks_replay_to_the_same_bytes(small_checkpoint, texts, tmp_path):
    more = ("ce_coef=0.1", "val_set_size=0", "n_samples_per_prompt=2", "log_completions=true")
    run_ebft(small_checkpoint[0], texts, tmp_path / "a", *more)
    assert "true '" in (tmp_path / "a" / "run.log").read_text()
    replay = (f"replay_path={tmp_path / 'a' / 'rollouts'}", "rollout_engine=replay", "datasets=[]")
    run_ebft(small_checkpoint[0], texts, tmp_path / "b", *more, *replay)
    names = [tmp_path / run / "final" / "model.safetensors" for run in "ab"]
    assert names[0].read_bytes() == names[1].read_bytes()
    ranks = (*more, *replay, "micro_batch_size=1")  # two processes' blocks stand in the order of the step
    run_ebft(small_checkpoint[0], texts, tmp_path / "c", *ranks, ranks=2)
    for name in ("step-0.jsonl", "step-3.jsonl"):
        lines = [
            [json.loads(x) for x in (tmp_path / run / "rollouts" / name).read_text().splitlines()]
            for run in "ac"
        ]
        for a, c in zip(*lines, strict=True):
            assert a["document_ids"] == c["document_ids"] and a["block_ids"] == c["block_ids"]


@pytest.mark.parametrize("harm, words", [
    ({"anchors": [500]}, "anchors must be places"), ({"block_ids": [[[1, 2]]]}, "block_ids and sampling"),
    ({"counted": [1]}, "one entry per token"), ({"document_ids": []}, "non-empty list"),
    ({"block_ids": "x"}, "block_ids and sampling"),
])
def test_a_bad_line_of_recorded_blocks_is_named(harm, words, tmp_path):
    good = {"document_ids": list(range(3, 15)), "counted": [1] * 12, "anchors": [8],
            "block_ids": [[[1, 2, 3, 4]] * 2], "sampling_logprobs": [[[-1.0] * 4] * 2]}
    file = tmp_path / "step-0.jsonl"
    file.write_text(json.dumps(good) + "\n")
    (document,) = read_blocks(str(tmp_path), tmp_path, 2, 4, 96)
    assert document.recorded is not None and document.recorded[0].shape == (1, 2, 4)
    file.write_text(json.dumps(good) + "\n" + json.dumps({**good, **harm}) + "\n")
    with pytest.raises(DataError, match=rf"step-0.jsonl:2: .*{words}"):
        read_blocks(str(file), tmp_path, 2, 4, 96)


@pytest.mark.parametrize("mode", ["structured", "strided"])
def test_with_cross_entropy_alone_a_step_is_that_of_supervised_fine_tuning(
    mode, small_checkpoint, questions, tmp_path
):
    """One AdamW step over the whole data set; SGD would do as well, but every recipe has AdamW."""
    common = (f"base_model={small_checkpoint[0]}", f"datasets=[{{path: {questions}, type: chat}}]",
              "max_steps=1", "learning_rate=1e-3", "lr_scheduler=constant", "weight_decay=0.0",
              "adam_epsilon=1e-3", "max_grad_norm=1000")
    cut = {"structured": ("num_generations=2", "micro_batch_size=20", "max_completion_length=4"),
           "strided": ("generate_max_len=2", "micro_batch_size=10")}
    own = ("temperature=1.0", "rl_coef=0", "ce_coef=1.0", "gradient_accumulation_steps=3", f"mode={mode}")
    for recipe, options in (("sft", ("micro_batch_size=30",)), ("ebft", (*own, *cut[mode]))):
        done = run_program(ROOT / f"{recipe}.py", *common, *options, f"output_dir={tmp_path / recipe}")
        assert done.returncode == 0, done.stdout + done.stderr
    sft, mine = (load_file(tmp_path / r / "final" / "model.safetensors") for r in ("sft", "ebft"))
    start = load_file(small_checkpoint[0] / "model.safetensors")
    moved = max((sft[name] - start[name]).abs().max() for name in sft)
    assert moved > 1e-4
    for name, tensor in sft.items():
        assert (mine[name] - tensor).abs().max() < 1e-5, name


@pytest.mark.parametrize("mode", ["structured", "strided"])
def test_a_warmup_that_is_longer_than_the_run_is_refused(mode, small_checkpoint, questions, tmp_path):
    done = run_program(
        ROOT / "ebft.py", f"base_model={small_checkpoint[0]}", f"output_dir={tmp_path}", f"mode={mode}",
        f"datasets=[{{path: {questions}, type: chat}}]", "max_steps=2", "warmup_steps=3",
        "micro_batch_size=8", *(["generate_max_len=2"] if mode == "strided" else []),
    )
    assert done.returncode == 2 and "warmup_steps: 3 is longer than the run of 2 steps" in done.stderr


def test_two_processes_train_together(small_checkpoint, texts, tmp_path):
    rows = run_ebft(small_checkpoint[0], texts, tmp_path, "micro_batch_size=1", ranks=2)
    assert len(rows) == 5 and rows[-1]["train/grad_norm"] > 0


def test_documents_that_are_too_short_for_a_block_are_told(small_checkpoint, texts, tmp_path):
    done = run_program(
        ROOT / "ebft.py", f"base_model={small_checkpoint[0]}", f"datasets=[{{path: {texts}, type: text}}]",
        f"output_dir={tmp_path}", "mode=strided", "context_length=500",
    )
    assert done.returncode == 2 and "context_length" in done.stderr and "leave 0 documents" in done.stderr


# ------------------------------------------------------------------------------------------------------------
# Structured mode
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["last_token", "mean_pooling", "completion_mean", "concat"])
def test_features_of_completions_equal_those_of_each_sequence_alone(method, references):
    model = load_pretrained(str(references("mistral")[1]), dtype=torch.float32)
    rng = random.Random(2)
    draw = lambda n: [rng.randrange(3, 96) for _ in range(n)]  # noqa: E731
    groups = []
    for P, lengths in ((6, (3, 9, 1)), (11, (4, 4, 8))):
        prompt, truth = draw(P), draw(5)
        groups.append([Rollout(prompt, draw(n), ground_truth_ids=truth) for n in lengths])
    config = Config(
        base_model="x", datasets=[{"path": "x"}], embed_method=method, feature_layers=[0.25, 0.75]
    )
    samples, truths = group_features(model, groups, config)

    def alone(prompt: list[int], own: list[int]) -> torch.Tensor:
        with torch.no_grad():
            states = model.hidden_states(torch.tensor([prompt + own]), layers=(1, 3))[0][0]
        mine = states[len(prompt) :]
        parts = [min(len(mine) - 1, int(share * len(mine))) for share in (0.25, 0.5, 0.75)]
        return {"last_token": mine[-1], "mean_pooling": states.mean(0), "completion_mean": mine.mean(0),
                "concat": torch.cat([mine[i] for i in parts])}[method]

    for g, group in enumerate(groups):
        prompt = group[0].prompt_ids.tolist()
        assert (truths[g] - alone(prompt, group[0].ground_truth_ids.tolist())).abs().max() < 1e-4
        for j, r in enumerate(group):
            assert (samples[g, j] - alone(prompt, r.completion_ids.tolist())).abs().max() < 1e-4


@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen3"])
def test_the_true_completion_is_what_the_policy_would_write_its_end_included(template, tokenizer_directory):
    tokenizer = Tokenizer.load(tokenizer_directory(template))
    messages = [{"role": "user", "content": "2 + 2?"}]
    prompt = Prompt(tokenizer.encode_prompt(messages), messages, {"answer": "It is 4."}, "f:1")
    truth, mask = true_completion(prompt, tokenizer)
    assert mask is None
    assert truth[-1] in tokenizer.stop_ids and "It is 4." in tokenizer.decode(truth)
    plain = Prompt(tokenizer.encode("2 + 2 ="), "2 + 2 =", {"answer": " 4"}, "f:2")
    assert true_completion(plain, tokenizer) == ([*tokenizer.encode(" 4"), tokenizer.eos_id], None)
    with pytest.raises(DataError, match="f:3: has no true completion"):
        true_completion(Prompt([1], "x", {}, "f:3"), tokenizer)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 1 more?"}, {"role": "assistant", "content": "<think>4+1</think>5."},
    {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Sure."},
    {"role": "user", "content": "Unanswered"},
]


@pytest.mark.parametrize("turns, asked, answers, after", [
    ("last", [6], ["Sure."], [0]), ("first", [2], ["4."], [0]),
    ("every", [2, 4, 6], ["4.", "5.", "Sure."], [0, 0, 0]), ("rollout", [2], ["4."], [4]),
])
def test_a_conversation_asks_for_its_last_first_or_every_answer_or_is_rolled_out(
    turns, asked, answers, after, tokenizer_directory, tmp_path
):
    tokenizer = Tokenizer.load(tokenizer_directory("chatml"))
    rows = CONVERSATION[:-1] if turns == "last" else CONVERSATION  # `last` asks for what ends the row
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": rows, "answer": "the row's"}) + "\n")
    specs = [{"path": "rows.jsonl", "type": "chat"}]
    options = DataOptions(datasets=specs, strip_thinking=True)
    prompts, _ = read_prompts(specs, tokenizer, options, tmp_path, turns=turns)
    plain = [{**m, "content": m["content"].replace("<think>4+1</think>", "")} for m in CONVERSATION]
    assert [p.ids for p in prompts] == [tokenizer.encode_prompt(plain[:i]) for i in asked]
    for prompt, answer, more in zip(prompts, answers, after, strict=True):
        assert prompt.completion == answer and len(prompt.columns.get("remaining_turns", [])) == more
        truth, _ = true_completion(prompt, tokenizer, 8)
        assert tokenizer.decode(truth).startswith(answer)  # not the `answer` column, which is for rewards


@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_a_policy_that_says_the_truth_rolls_out_the_true_conversation(template, tokenizer_directory):
    tokenizer = Tokenizer.load(tokenizer_directory(template))
    messages, remaining = CONVERSATION[:2], CONVERSATION[3:7]
    prompt = Prompt(tokenizer.encode_prompt(messages), messages, {"remaining_turns": remaining}, "f:1", "4.")
    truth, mask = true_completion(prompt, tokenizer, 8)
    assert mask is not None and len(mask) == len(truth)
    said = [t for t, m in zip(truth, mask, strict=True) if m]
    ends = [i + 1 for i, t in enumerate(said) if t in tokenizer.stop_ids]
    answers = [said[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert [tokenizer.decode(a) for a in answers] == ["4.", "<think>4+1</think>5.", "Sure."]
    assert "And 1 more?" in tokenizer.decode([t for t, m in zip(truth, mask, strict=True) if not m])

    class Truthful:
        turn = 0

        def version(self, step):
            return step

        def generate(self, prompts, n, **_):
            ids = answers[self.turn]
            self.turn += 1
            return [[Completion(ids, [-0.5] * len(ids), "stop") for _ in range(n)] for _ in prompts]

    config = Config(base_model="x", datasets=[{"path": "x"}], max_completion_length=200)
    rollouts = play(
        Truthful(), Conversation, [prompt], [0], 2, step=0, seed=(1,), options=config,  # type: ignore[arg-type]
        tokenizer=tokenizer, world=ALONE,
    )
    for r in rollouts:
        assert r.completion_ids.tolist() == truth and r.written().tolist() == mask and not r.truncated


@pytest.mark.parametrize("remaining, words", [
    ([{"role": "user", "content": "?"}], "must end with an answer"),
    ([{"role": "assistant", "content": "?"}], "without a question"), (["x"], "list of messages"),
    (CONVERSATION[3:5] * 9, "raise max_turns"),
])
def test_remaining_turns_that_cannot_be_played_are_refused(remaining, words, tokenizer_directory):
    tokenizer = Tokenizer.load(tokenizer_directory("chatml"))
    messages = CONVERSATION[:2]
    prompt = Prompt(tokenizer.encode_prompt(messages), messages, {"remaining_turns": remaining}, "f:1", "4.")
    with pytest.raises(DataError, match=f"f:1: .*{words}"):
        true_completion(prompt, tokenizer, 8)
    prompt.columns["remaining_turns"] = CONVERSATION[3:5]
    with pytest.raises(DataError, match="has 2 answers; raise max_turns"):
        true_completion(prompt, tokenizer, 1)


def test_a_template_that_rewrites_earlier_turns_cannot_roll_out(tokenizer_directory):
    tokenizer = Tokenizer.load(tokenizer_directory("qwen3"))
    messages, remaining = CONVERSATION[:2], CONVERSATION[3:7]
    prompt = Prompt(
        tokenizer.encode_prompt(messages),
        messages,
        {"remaining_turns": remaining},
        "f:1",
        "<think>a</think>4.",
    )
    with pytest.raises(DataError, match="changes earlier turns"):
        true_completion(prompt, tokenizer, 8)


def test_conversations_are_trained_on_their_answers_only_and_replay(small_checkpoint, tmp_path):
    file = tmp_path / "rows.jsonl"
    row = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "gg"}] * 2
    file.write_text((json.dumps({"messages": row}) + "\n") * 12)
    more = ("chat_turns=rollout", "max_completion_length=40", "max_turns=3", "max_steps=2", "ce_coef=0.1")
    run_structured(small_checkpoint[0], file, tmp_path / "a", *more)
    lines = [json.loads(x) for x in (tmp_path / "a" / "rollouts" / "step-0.jsonl").read_text().splitlines()]
    for line in lines:
        assert len(line["completion_mask"]) == len(line["completion_ids"])
        assert 0 in line["ground_truth_mask"] and len(line["ground_truth_mask"]) == len(
            line["ground_truth_ids"]
        )
    run_structured(
        small_checkpoint[0], file, tmp_path / "b", *more, "rollout_engine=replay", "val_set_size=0",
        f"replay_path={tmp_path / 'a' / 'rollouts'}", "datasets=[]",
    )
    names = [tmp_path / run / "final" / "model.safetensors" for run in "ab"]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "rows.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"Say {i}."},
    {"role": "assistant", "content": f"gg {i % 3}"}]}
            for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_structured(checkpoint, questions, out, *options, ranks=1):
    done = run_program(
        ROOT / "ebft.py", f"base_model={checkpoint}", f"datasets=[{{path: {questions}, type: chat}}]",
        f"output_dir={out}", "val_set_size=6", "num_generations=4", "micro_batch_size=8",
        "max_completion_length=8",
        "max_steps=4", "learning_rate=1e-3", "lr_scheduler=constant", "temperature=1.0", "num_epochs=50",
        *options,
        ranks=ranks,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_structured_training_brings_the_features_of_samples_to_those_of_the_truth(
    small_checkpoint, questions, tmp_path
):
    rows = run_structured(
        small_checkpoint[0], questions, tmp_path, "max_steps=40", "micro_batch_size=64", "learning_rate=3e-3",
        "embed_method=completion_mean",
    )
    before, after = rows[0], rows[-1]
    assert after["eval/cfm_unwhitened"] < before["eval/cfm_unwhitened"]
    assert after["eval/alignment_cosine"] > before["eval/alignment_cosine"] + 0.02
    for key in ("ebft/alignment", "ebft/diversity", "ebft/cfm_loss", "entropy", "completions/mean_length",
                "sampling/importance_sampling_ratio/min",
                "step_time/features"):
        assert key in after


@pytest.mark.parametrize("more", [["adapter=lora", "lora_r=4", "use_whitening=true"], ["beta=0.01"]])
def test_structured_runs_resume_and_replay_to_the_same_bytes(more, small_checkpoint, questions, tmp_path):
    run_structured(small_checkpoint[0], questions, tmp_path / "a", "save_steps=2", *more)
    name = "adapter_model.safetensors" if "adapter=lora" in more else "model.safetensors"
    whole = (tmp_path / "a" / "final" / name).read_bytes()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-4")
    run_structured(small_checkpoint[0], questions, tmp_path / "b", "save_steps=2", *more)
    assert (tmp_path / "b" / "final" / name).read_bytes() == whole
    run_structured(
        small_checkpoint[0], questions, tmp_path / "c", *more, "rollout_engine=replay", "val_set_size=0",
        f"replay_path={tmp_path / 'a' / 'rollouts'}", "datasets=[]",
    )
    assert (tmp_path / "c" / "final" / name).read_bytes() == whole


def test_two_processes_sample_and_train_by_energy(small_checkpoint, questions, tmp_path):
    rows = run_structured(
        small_checkpoint[0], questions, tmp_path, "micro_batch_size=4", "adapter=lora", "kl_steps=1", ranks=2
    )
    assert rows[-1]["step"] == 4 and rows[-1]["kl"] >= 0
    assert rows[-1]["sampling/sampling_logp_difference/max"] < 1e-4


def test_strided_mode_keeps_the_experts_of_a_mixture_in_use(small_checkpoint, texts, tmp_path):
    """The load-balancing loss alone, on documents and blocks: experts are chosen more evenly afterwards."""
    from conftest import make_reference
    from model import load_balancing_loss

    start = tmp_path / "start"
    shutil.copytree(small_checkpoint[0], start)
    reference = make_reference("qwen3-moe", vocab_size=512, max_position_embeddings=512)
    reference.save_pretrained(start)
    lines = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    tokenizer = Tokenizer.load(start)

    def balance(directory) -> float:
        model = load_pretrained(str(directory), dtype=torch.float32)
        with torch.no_grad():
            routed = [model.hidden_states(torch.tensor([tokenizer.encode(line)]))[1] for line in lines]
        together = [torch.cat(layer) for layer in zip(*routed, strict=True)]
        return load_balancing_loss(together, model.arch).item()

    ends = {}
    for coef in (0.0, 10.0):
        run_ebft(
            start, texts, tmp_path / str(coef), f"router_aux_loss_coef={coef}", "rl_coef=0", "ce_coef=1e-9",
            "adam_epsilon=1e-3", "max_steps=8", "num_epochs=9", "learning_rate=2e-3", "micro_batch_size=8",
        )
        ends[coef] = balance(tmp_path / str(coef) / "final")
    assert abs(ends[0.0] - balance(start)) < 1e-3 and ends[10.0] < balance(start) - 0.05, (
        ends,
        balance(start),
    )


def test_a_profile_is_written_in_both_modes(small_checkpoint, texts, questions, tmp_path):
    run_ebft(small_checkpoint[0], texts, tmp_path / "a", "profiler_steps=[1]", "max_steps=1")
    run_structured(small_checkpoint[0], questions, tmp_path / "b", "profiler_steps=[1]", "max_steps=1")
    for name in "ab":
        assert list((tmp_path / name / "profile").glob("step-1-*.json"))
