"""Chat templates and what of a conversation is trained; the sandbox; files that transformers reads."""

import json
import resource

import pytest

from conftest import CONVERSATIONS, CORPUS, ROOT, TEMPLATES, TOOLS, trained_text
from data import DataOptions
from tokenizer import IGNORE, BadRow, Tokenizer


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_rendering_and_token_ids_equal_transformers(template, name, tools, tokenizer, tokenizer_directory):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_directory(template))
    ours = tokenizer(template)
    messages = CONVERSATIONS[name]
    for prompt in (False, True):
        text = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(messages, tools, prompt) == text
    ids = theirs.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    assert ours.encode_chat(messages, tools)[0] == ids
    ids = theirs.apply_chat_template(
        messages,
        tools=tools,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert ours.encode_prompt(messages, tools, enable_thinking=False) == ids


@pytest.mark.parametrize(
    "template, end", [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("qwen3", "<|im_end|>")]
)
@pytest.mark.parametrize("name", ["one turn", "system", "consecutive", "the answer repeats the question"])
def test_what_the_assistant_wrote_and_its_end_of_turn_are_trained_and_nothing_else(
    template, end, name, tokenizer
):
    tok = tokenizer(template)
    messages = CONVERSATIONS[name]
    ids, labels = tok.encode_chat(messages)
    expected = [m["content"] for m in messages if m["role"] == "assistant"]
    if template == "llama3":
        expected = [text.strip() for text in expected]
    if template == "qwen3":  # the last turn begins with the (empty) thought that the model would write itself
        expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    assert trained_text(tok, ids, labels) == [text + end for text in expected]


def test_reasoning_and_tool_calls_are_trained_where_the_template_shows_them(tokenizer):
    tok = tokenizer("qwen3")
    pieces = trained_text(tok, *tok.encode_chat(CONVERSATIONS["reasoning"]))
    assert pieces == ["So.<|im_end|>", "<think>\nOnce more\nwith lines\n</think>\n\nThus.<|im_end|>"]
    pieces = trained_text(tok, *tok.encode_chat(CONVERSATIONS["tools"], TOOLS))
    assert pieces[0] == '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert pieces[1] == "<think>\n\n</think>\n\nIt is 2.<|im_end|>"
    llama = tokenizer("llama3")
    pieces = trained_text(llama, *llama.encode_chat(CONVERSATIONS["tools"], TOOLS))
    assert pieces == ['{"name": "add", "parameters": {"a": 1}}<|eot_id|>', "It is 2.<|eot_id|>"]


def test_generation_blocks_decide_where_the_template_has_them(tokenizer, tokenizer_directory):
    tok = tokenizer("chatml")
    from tokenizer import CHATML

    marked = Tokenizer(tok.core, tok.config, CHATML, tok.source)
    messages = CONVERSATIONS["system"]
    ids, labels = marked.encode_chat(messages)
    assert trained_text(marked, ids, labels) == ["Two.<|im_end|>", "  Four, naïve 日本 \n<|im_end|>"]
    assert marked.render(messages) == tok.render(messages)  # the marks leave no trace
    assert marked.stop_ids == [tok.core.token_to_id("<|im_end|>")]
    before, after = "+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>"
    bare = Tokenizer(tok.core, tok.config, CHATML.replace(before, after), tok.source)
    assert bare.encode_chat(messages) == (ids, labels)  # EOS is trained also where the block leaves it out


def test_train_and_weight_choose_turns(tokenizer):
    messages = [dict(m) for m in CONVERSATIONS["system"]]
    for flag in ({"train": False}, {"weight": 0}):
        messages[2] = {**CONVERSATIONS["system"][2], **flag}
        tok = tokenizer("chatml")
        assert trained_text(tok, *tok.encode_chat(messages)) == ["  Four, naïve 日本 \n<|im_end|>"]
    ids, labels = tok.encode_chat(messages, train_on_inputs=True)
    assert ids == labels


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "not closed by a special token"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}", "0 times"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}", "2 times"),
        (
            "{% for m in messages %}{{ m.content | length }}{{ m.content }}<|im_end|>{% endfor %}",
            "where this assistant turn",
        ),
        (
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{{ raise_exception('no') }}",
            "refuses it: no",
        ),
        ("{{ messages.missing.thing }}", "refuses it"),
    ],
)
def test_a_conversation_whose_bounds_cannot_be_trusted_is_refused(template, reason, tokenizer):
    tok = tokenizer("chatml")
    with pytest.raises(BadRow, match=reason):
        Tokenizer(tok.core, tok.config, template, tok.source).encode_chat(CONVERSATIONS["one turn"])


def test_a_token_across_the_start_of_an_answer_is_refused(tokenizer):
    """The prompt ends in the middle of a token: at inference the model would see other ids."""
    tok = tokenizer("chatml")
    start = "{% if m.role == 'assistant' %}sel{% endif %}"
    template = "{% for m in messages %}" + start + "{{ m.content }}<|im_end|>{% endfor %}"
    glued = Tokenizer(tok.core, tok.config, template, tok.source)
    assert len(tok.encode("self")) == 1
    with pytest.raises(BadRow, match="reaches across the start"):
        glued.encode_chat([{"role": "user", "content": "x"}, {"role": "assistant", "content": "f y"}])


@pytest.mark.parametrize("prepend", ["first", "always", "never"])
def test_an_answer_whose_first_word_carries_a_space_is_trained_from_that_space(prepend, tmp_path):
    """Sentencepiece-like tokenizers and Llama 2's template: no generation prompt, `▁word` after `[/INST]`."""
    import tokenizers

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=prepend)
    core.decoder = tokenizers.decoders.Metaspace(prepend_scheme=prepend)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False
    )
    core.train([CORPUS], trainer)
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tok = Tokenizer(core, {"bos_token": "<s>", "eos_token": "</s>"}, template, "here")
    ids, labels = tok.encode_chat(CONVERSATIONS["the answer repeats the question"])
    assert ids == tok.encode(tok.render(CONVERSATIONS["the answer repeats the question"]))
    pieces = trained_text(tok, ids, labels)
    assert [piece.replace(" ", "") for piece in pieces] == ["assistant</s>"] * 2
    first = labels.index(next(label for label in labels if label != IGNORE))
    prompt = tok.render(CONVERSATIONS["the answer repeats the question"][:1])
    assert ids[:first] == tok.encode(prompt)  # what the model is given at inference


def test_templates_run_in_a_sandbox(tokenizer):
    tok = tokenizer("chatml")
    for attack in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ):
        with pytest.raises(BadRow):
            Tokenizer(tok.core, tok.config, attack, tok.source).render(CONVERSATIONS["one turn"])


BIG = "{% set b = 'a' * 100000 %}"
GROWS = "{% set ns = namespace(s='aaaaaaaa', x=10, l=[1]) %}{% for i in range(60) %}"
GREEDY = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ 'a' * 10**9 }}", "{{ 'a'.center(10**9) }}", "{{ 'a' | center(10**9) }}", "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}", "{{ '{:999999999}'.format(1) }}", "{{ '{:{}}'.format(1, 99999999) }}",
    "{{ 2**(2**(2**10)) }}", "{{ (1).to_bytes(10**9, 'little') }}", "{{ [1] | batch(10**9, 1) | list }}",
    "{{ range(10**9) | list }}", "{{ lipsum(10**6) }}", "{{ 'a' | indent(10**9, true) }}",
    GROWS + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}", GROWS + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    GROWS + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    GROWS + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    GROWS + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
    BIG + "{% for i in range(9999) %}{{ b }}{% endfor %}", BIG + "{{ b.replace('a', b) }}",
    BIG + "{{ b | replace('a', b) }}", BIG + "{{ b.join([b] * 10000) }}", BIG + "{{ [b] * 9999 | join(b) }}",
    BIG + "{% set c %}{% for i in range(999) %}{{ b }}{% endfor %}{% endset %}{{ c | length }}",
]  # fmt: skip


@pytest.mark.parametrize("template", GREEDY)
def test_a_template_can_neither_run_for_ever_nor_fill_the_memory(template, tokenizer):
    tok = tokenizer("chatml")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadRow, match=r"the chat template (refuses|fails on) it"):
        Tokenizer(tok.core, tok.config, template, tok.source).render([{"role": "user", "content": "x"}])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_saved_tokenizer_reads_back_here_and_in_transformers(tokenizer, tmp_path):
    import transformers

    options = DataOptions(special_tokens={"pad_token": "<|pad|>"}, tokens=["<think>"], chat_template="chatml")
    tok = tokenizer("llama3").configure(options, ROOT)
    assert tok.core.token_to_id("<|pad|>") == tok.pad_id and tok.vocab_size == len(tok)
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    messages = CONVERSATIONS["one turn"]
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == again.encode_chat(messages)[0] == tok.encode_chat(messages)[0]
    assert theirs.pad_token == "<|pad|>" and again.stop_ids == tok.stop_ids
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == tok.stop_ids
