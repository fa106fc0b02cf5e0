"""Shared fixtures: tiny checkpoints of every family and tokenizers with the field's chat templates, made
here."""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: as many workers as cores, a thread each

import pytest
import torch
from programs import run_forked

import grpo
from rollouts import policy
from text.tokenizer import IGNORE, Tokenizer

CORPUS = argparse.__file__  # text that no change of ours touches, for tokenizers
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
torch.set_num_threads(2)

COMMON = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=16)

# name → (transformers config class, its arguments); every family, every rope, windows shorter than the test
# sequences.
FAMILIES = {
    "llama2": ("LlamaConfig", {}),
    "llama3": ("LlamaConfig", dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "llama-biases": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True, head_dim=12)),
    "llama-linear": ("LlamaConfig", dict(rope_parameters=dict(rope_type="linear", factor=2.0,
    rope_theta=1e4))),
    "llama-dynamic": (
        "LlamaConfig",
        dict(max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", factor=2.0,
        rope_theta=1e4)),
    ),
    "mistral": ("MistralConfig", dict(sliding_window=7)),
    "qwen2": ("Qwen2Config", dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "qwen3-yarn": ("Qwen3Config", dict(head_dim=16, rope_parameters=YARN)),
    "gemma2": ("Gemma2Config", dict(head_dim=16, query_pre_attn_scalar=12, sliding_window=6)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=16, query_pre_attn_scalar=12, sliding_window=6,
    num_hidden_layers=7)),
    "phi3": ("Phi3Config", dict(sliding_window=9)),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4)),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        dict(head_dim=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[1],
             norm_topk_prob=True),
    ),
}


def make_reference(name: str, **changes):
    """A transformers model of a family with random weights that are far from its initialisation."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    class_name, arguments = FAMILIES[name]
    config = getattr(transformers, class_name)(**{**COMMON, **arguments, **changes})
    attention = "eager" if name == "gemma2" else "sdpa"  # transformers' SDPA path has no soft cap
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.normal_(parameter, mean=0.0 if "gemma" in name else 1.0, std=0.1)
    model.tie_weights()
    return model


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """name → (transformers model, its directory), made when first asked for."""
    made = {}

    def get(name: str):
        if name not in made:
            model = make_reference(name)
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            made[name] = (model, directory)
        return made[name]

    return get


# ------------------------------------------------------------------------------------------------------------
# Tokenizers
# ------------------------------------------------------------------------------------------------------------

# Written for these tests in the manner of the templates that checkpoints ship: same turns, tools and
# reasoning rules.
CHATML_TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- if message.tool_calls %}
{%- for call in message.tool_calls %}
<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}
{%- endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\nYou may call:\\n' }}
{%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\\n\\n' }}{%- endfor %}{{ '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
{{- message.tool_calls[0].function.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

QWEN3_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set thought = '' %}
{%- set content = message.content %}
{%- if message.reasoning_content is string %}
{%- set thought = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

TEMPLATES = {"chatml": CHATML_TEMPLATE, "llama3": LLAMA3_TEMPLATE, "qwen3": QWEN3_TEMPLATE}
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def write_tokenizer(
    directory: Path, template: str | None, tokens: list[str], eos: str, bos: str | None = None
) -> Path:
    """A byte-level BPE tokenizer in Hugging Face's files, trained on this project's own sources."""
    import tokenizers
    import transformers

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=tokens, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train([CORPUS], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, bos_token=bos, pad_token=tokens[0]
    )
    if template:
        fast.chat_template = template
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    """template name → a directory with a tokenizer that has it."""
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            directory = tmp_path_factory.mktemp(f"tokenizer-{name}")
            if name == "llama3":
                write_tokenizer(directory, TEMPLATES[name], LLAMA3_TOKENS, "<|eot_id|>", "<|begin_of_text|>")
            else:
                template = TEMPLATES.get(name)
                write_tokenizer(directory, template, CHATML_TOKENS, "<|im_end|>")
            made[name] = directory
        return made[name]

    return get


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int", "note": "<&> é"}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi, you!"}],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "  Four, naïve 日本 \n"},
    ],
    "tools": [
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ],
    "reasoning": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", "reasoning_content": "Let me think"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Thus.", "reasoning_content": "Once more\nwith lines"},
    ],
    "consecutive": [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "First"},
        {"role": "assistant", "content": "Second"},
    ],
    "the answer repeats the question": [
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "assistant"},
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "assistant"},
    ],
}


def trained_text(tokenizer, ids, labels):
    """The trained stretches as text."""
    pieces, current = [], []
    for token, label in zip([*ids, None], [*labels, IGNORE], strict=True):
        if label != IGNORE:
            assert label == token
            current.append(token)
        elif current:
            pieces.append(tokenizer.decode(current, special=True))
            current = []
    return pieces


@pytest.fixture
def tokenizer(tokenizer_directory):
    return lambda name: Tokenizer.load(tokenizer_directory(name))


def write(path, rows):
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return str(path)


# ------------------------------------------------------------------------------------------------------------
# A checkpoint with a tokenizer, data for it, and runs of the recipe as a user starts them
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory):
    """A random Qwen3 of 2 layers with the ChatML tokenizer: (directory, transformers model)."""
    directory = tmp_path_factory.mktemp("small")
    write_tokenizer(directory, CHATML_TEMPLATE, CHATML_TOKENS, "<|im_end|>")
    model = make_reference("qwen3", vocab_size=512, num_hidden_layers=2, max_position_embeddings=512)
    model.save_pretrained(directory)
    return directory, model


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory):
    """37 conversations of unequal lengths."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = []
    for i in range(37):
        messages = []
        for turn in range(1 + i % 3):
            messages.append({"role": "user", "content": f"What is {i} plus {turn}?" + " Please." * (i % 5)})
            messages.append({"role": "assistant", "content": f"It is {i + turn}." + " Truly." * (i % 7)})
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """40 lines of a few words each."""
    path, rng = tmp_path_factory.mktemp("texts") / "texts.jsonl", random.Random(0)
    words = "the cat sat on a mat and saw the dog run far away from home".split()  # noqa: SIM905
    rows = [{"text": " ".join(rng.choice(words) for _ in range(12 + i % 9))} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """Prompts, and a reward that is higher the more often a completion has the letter g."""
    directory = tmp_path_factory.mktemp("task")
    rows = [{"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": str(i)}]}
            for i in range(30)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "letters.py").write_text(
        "def many_g(completions, answer, **_):\n"
        "    return [min(1.0, c[0]['content'].count('g') / 2) for c in completions]\n"
        # Hardly ever the same for two completions: no step is without signal
        "def spread(completion_ids, **_):\n"
        "    return [sum(ids) % 101 / 101 for ids in completion_ids]\n"
    )
    return directory


@dataclass
class PolicyOptions(grpo.LossOptions, policy.PolicyOptions):
    """What the loss of GRPO reads."""


def tallied(tally: policy.Tally, stats: dict, entropy, old, sampled) -> None:
    """Add to the metrics what a loss computed on the way, of a batch that these are of."""
    stats = {**stats, "entropy": entropy, "old_logprobs": old, "nonfinite_hidden_states": 0}
    policy.tally_policy(tally, stats, SimpleNamespace(sampling_logprobs=sampled, rows=[]), 1)


def run_program(
    script: str | Path, *arguments: str, ranks: int = 1, timeout: int = 900, env: dict | None = None
):
    """Run a script, or a module as by `python -m`, as a user would; with `ranks` > 1 under torchrun. Returns
    the finished process."""
    if ranks == 1 and env is None:
        return run_forked(script, *arguments, timeout=timeout)
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(
        [*launch, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        cwd=ROOT,
    )


def arguments(small_checkpoint, chat_file, output_dir, **options):
    """Of a run of sft.py."""
    values = {
        "base_model": str(small_checkpoint[0]), "datasets": f"[{{path: {chat_file}, type: chat}}]",
        "output_dir": str(output_dir),
        "sequence_len": 256, "learning_rate": 1e-3, "seed": 5, **options,
    }
    return [f"{key}={value}" for key, value in values.items()]


def metrics(output_dir):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def run_ok(*args, **kwargs):
    """run_program, and it must succeed."""
    done = run_program(*args, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def embedded(task, checkpoint, out, *more):
    """Arguments of a run of grpo.py with its own engine."""
    (task / "c.yaml").write_text(
        f"base_model: {checkpoint}\ndatasets: [{{path: {task / 'rows.jsonl'}, type: chat}}]\n"
        "reward_funcs: [letters.many_g]\nval_set_size: 6\nnum_generations: 4\nmicro_batch_size: 8\n"
        "max_completion_length: 12\nlearning_rate: 2.0e-3\nlr_scheduler: constant\nmax_steps: 6\n"
    )
    return ["--config", str(task / "c.yaml"), f"output_dir={out}", *more]


def ids(seed=0, *shape):
    """Token ids [2, 40] below 96, the vocabulary of `make_reference`."""
    return torch.randint(3, 96, shape or (2, 40), generator=torch.Generator().manual_seed(seed))


def options(**changes) -> grpo.Config:
    """A GRPO config, that of groups of four."""
    given = dict(
        base_model="x", datasets=[{"path": "x"}], reward_funcs=["exact_match"], num_generations=4,
        micro_batch_size=4,
    )
    return grpo.Config(**{**given, **changes})


# Made with an independent script in fp64 from the published formulas: eight completions of two groups.
GOLDEN = json.loads((Path(__file__).parent / "grpo_golden.json").read_text())


def golden(name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[name], dtype=torch.float64)


def noisy(level: float, steps: int, noise: float = 0.05, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [level * (1 + rng.gauss(0, noise)) for _ in range(steps)]


def falling(start: float, end: float, steps: int) -> list[float]:
    """A loss curve: exponential, with 3 % of noise."""
    clean = [end + (start - end) * math.exp(-5 * i / steps) for i in range(steps)]
    return [x * f for x, f in zip(clean, noisy(1.0, steps, 0.03), strict=True)]


class HubStandIn(BaseHTTPRequestHandler):
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


def with_hub(code: str, folder: Path, home: Path, kind: str = "models"):
    """Run Python code in a process of its own (huggingface-hub reads its address when it is imported), beside
    a hub that has `folder` as org/tiny: (the finished process, the paths that were asked for)."""
    handler = type("Hub", (HubStandIn,), {"folder": folder, "requests": [], "kind": kind})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home),
           "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    server.shutdown()
    return done, handler.requests
