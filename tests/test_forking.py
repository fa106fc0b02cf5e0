"""The edits of docs/forking.md, applied to a copy of the code and run there."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from test_docs import FILES

from conftest import ROOT

DIFFS = re.findall(
    r"```diff\n(.*?)```", (ROOT / "docs" / "forking.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.fixture
def forked(tmp_path):
    """A function that applies the n-th edit to a copy of the code, and returns the copy's directory."""

    def apply(n):
        fork = tmp_path / "fork"
        fork.mkdir()
        for path in (*ROOT.glob("*.py"), *FILES.values()):
            copy = fork / path.relative_to(ROOT)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)
        (fork / "configs").mkdir()
        (fork / "edit.diff").write_text(DIFFS[n], encoding="utf-8")
        subprocess.run(["git", "init", "-q"], cwd=fork, check=True)  # else apply looks for a repository above
        done = subprocess.run(["git", "apply", "edit.diff"], cwd=fork, capture_output=True, text=True)
        assert done.returncode == 0, f"docs/forking.md, edit {n + 1}: {done.stderr}"
        return fork

    return apply


def run(fork, *arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=fork, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_edit_is_short():
    assert len(DIFFS) == 3
    for diff in DIFFS:
        changed = [line for line in diff.splitlines() if re.match(r"[+-](?![+-])", line)]
        assert 0 < len(changed) < 40


def test_the_new_loss_has_the_gradient_of_dapo_where_the_batch_is_on_policy(forked):
    code = """
import torch
from dataclasses import dataclass
from grpo import LossOptions, StepSize, policy_loss
from rollouts.policy import PolicyOptions
@dataclass
class Options(LossOptions, PolicyOptions):
    pass
old = torch.randn(4, 6, dtype=torch.float64)
mask, A = (torch.rand(4, 6) < 0.8).double(), torch.randn(4, dtype=torch.float64)
def gradient(loss_type, shift):
    x = (old + shift).clone().requires_grad_()
    size = StepSize(tokens=mask.sum().item(), completions=4)
    policy_loss(x, old_logprobs=old, advantages=A, mask=mask, size=size,
                options=Options(loss_type=loss_type, num_generations=4))[0].backward()
    return x.grad
assert (gradient("reinforce", 0) - gradient("dapo", 0)).abs().max() < 1e-12
by_hand = -A[:, None] * mask / mask.sum()
assert (gradient("reinforce", 1.0) - by_hand).abs().max() < 1e-12   # off policy it has no ratio
assert (gradient("dapo", 1.0) - by_hand).abs().max() > 1e-3
print("right")
"""
    assert "right" in run(forked(0), "-c", code)


def test_the_new_family_computes_what_transformers_does(forked, tmp_path):
    config = transformers.SeedOssConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attention_bias=True, attention_out_bias=True, mlp_bias=True,
        max_position_embeddings=256, residual_dropout=0.0, attention_dropout=0.0,
    )
    torch.manual_seed(3)
    model = transformers.SeedOssForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 128, (2, 20))
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.pt")
    code = f"""
import torch
from checkpoints.weights import load_pretrained
made = torch.load("{tmp_path}/expected.pt")
with torch.no_grad():
    gap = (load_pretrained("{tmp_path}/model", dtype=torch.float32)(made["ids"]) - made["logits"]).abs().max()
assert gap < 1e-4, gap
print("right")
"""
    assert "right" in run(forked(1), "-c", code)


def test_the_new_environment_plays_in_a_training_run(forked, small_checkpoint, tmp_path):
    fork = forked(2)
    rows = [{"messages": [{"role": "user", "content": "Guess from 1 to 9."}], "number": n % 9 + 1}
            for n in range(8)]
    (fork / "configs" / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (fork / "configs" / "game.yaml").write_text(
        f"base_model: {small_checkpoint[0]}\ndatasets: [{{path: numbers.jsonl, type: chat}}]\n"
        "environment: higher_lower.HigherLower\nmax_turns: 3\nnum_generations: 4\nmicro_batch_size: 32\n"
        # Long enough that of 32 random answers some end, whatever the seed
        f"max_completion_length: 120\nmax_steps: 1\noutput_dir: {tmp_path / 'out'}\n"
    )
    run(fork, "grpo.py", "--config", "configs/game.yaml")
    lines = (tmp_path / "out" / "rollouts" / "step-0.jsonl").read_text().splitlines()
    played = [json.loads(line) for line in lines]
    assert len(played) == 32 and all("environment" in row["rewards"] for row in played)
    heard = [row for row in played if 0 in row["completion_mask"]]  # something was said, and is not trained
    assert heard and any("no number" in row["completion"] or "lower" in row["completion"]
                         or "higher" in row["completion"] for row in heard)
