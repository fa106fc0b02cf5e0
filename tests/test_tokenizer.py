"""Chat templates and what of a conversation is trained; the sandbox; files that transformers reads."""

import json
import resource

import pytest

from conftest import (
    CALL,
    CHATML_TOKENS,
    CONVERSATIONS,
    CORPUS,
    QWEN3_TEMPLATE,
    ROOT,
    TEMPLATES,
    TOOLS,
    trained_text,
    write_tokenizer,
)
from data import DataOptions
from run.config import ConfigError
from text.templates import BadRow
from text.tokenizer import IGNORE, Tokenizer


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
    from text.templates import CHATML

    marked = Tokenizer(tok.core, tok.config, CHATML, tok.source)
    messages = CONVERSATIONS["system"]
    ids, labels = marked.encode_chat(messages)
    assert trained_text(marked, ids, labels) == ["Two.<|im_end|>", "  Four, naïve 日本 \n<|im_end|>"]
    assert marked.render(messages) == tok.render(messages)  # the marks leave no trace
    assert marked.stop_ids == [tok.core.token_to_id("<|im_end|>")]
    before, after = "+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>"
    bare = Tokenizer(tok.core, tok.config, CHATML.replace(before, after), tok.source)
    assert trained_text(bare, *bare.encode_chat(messages)) == ["Two.", "  Four, naïve 日本 \n"]
    assert bare.stop_ids == marked.stop_ids
    assert marked.encode_chat(messages)[0] == ids


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
]


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


# ------------------------------------------------------------------------------------------------------------
# Templates of other shapes, each after a fault that public ones showed (bench/templates.py)
# ------------------------------------------------------------------------------------------------------------

# Mistral's: calls or content, never both; turns that are not calls must alternate; the tools stand before the
# last question, so they move when the conversation goes on.
MISTRAL = """\
{{- bos_token }}{%- set ns = namespace(i=0) %}
{%- for m in messages %}{%- if not (m.role == 'tool' or m.tool_calls) %}
{%- if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('roles must alternate') }}{%- endif %}
{%- set ns.i = ns.i + 1 %}{%- endif %}{%- endfor %}
{%- set last = messages | selectattr('role', 'equalto', 'user') | list | last %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and m == last %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}
{%- if m.tool_calls[0].id | length != 9 %}{{ raise_exception('ids have nine characters') }}{%- endif %}
{{- '[TOOL_CALLS] [' }}{%- for c in m.tool_calls %}{{- c.function | tojson }}{%- endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}
{%- else %}{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}{%- endif %}
{%- endfor %}"""
MISTRAL_TOKENS = ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                  "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]

# R1's distillations: the generation prompt opens a thought that the history does not show; calls come first.
DISTILLED = """\
{{- bos_token }}{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}
{%- elif m.role == 'assistant' %}{{- '<|Assistant|>' }}
{%- for c in m.tool_calls or [] %}{{- '<|call|>' + c.function.name + ' ' + c.function.arguments | tojson }}
{{- '<|/call|>' }}{%- endfor %}
{{- (m.content or '').split('</think>') | last }}{{- eos_token }}
{%- else %}{{- '<|out|>' + m.content + '<|/out|>' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""
DISTILLED_TOKENS = [
    "<s>",
    "</s>",
    "<|User|>",
    "<|Assistant|>",
    "<|call|>",
    "<|/call|>",
    "<|out|>",
    "<|/out|>",
]

# Channels: a thought is a message of its own before the answer, and the last answer ends in another token.
CHANNELS = """\
{%- for m in messages %}{%- if m.role == 'assistant' %}
{%- if m.thinking and loop.last %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last else '<|end|>' }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
CHANNEL_TOKENS = ["<|pad|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]

PARTS = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.content is string %}{{- m.content }}
{%- else %}{%- for part in m.content %}{{- part.text | trim + '|' }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TWICE_CLOSED = TEMPLATES["chatml"].replace(
    "<|im_end|>\n{% endfor %}", "<|im_end|>\n<|endoftext|>{% endfor %}"
)
SOFT_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
CALL_WITH_ID = [{**CALL[0], "id": "abcdefgh1"}]


@pytest.fixture
def shaped(tmp_path):
    """Our tokenizer and transformers' with a template and its tokens; `soft` ones are added, not special."""
    import transformers

    def make(template, tokens, eos, bos=None, soft=(), name="shaped"):
        directory = write_tokenizer(tmp_path / name, template, tokens, eos, bos)
        fast = transformers.AutoTokenizer.from_pretrained(directory)
        if soft:
            fast.add_tokens(list(soft))
            fast.save_pretrained(directory)
        return Tokenizer.load(directory), fast

    return make


def same_ids(ours, theirs, messages, tools=None):
    assert ours.encode_chat(messages, tools)[0] == theirs.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=False
    )


def test_the_token_that_ends_a_turn_is_trained_after_a_tool_call_and_after_a_thought(shaped):
    """`</tool_call>` and `</think>` are added tokens too: what the content ends in closes no turn."""
    ours, theirs = shaped(QWEN3_TEMPLATE, CHATML_TOKENS, "<|im_end|>", soft=SOFT_TOKENS)
    for messages, tools in (
        (CONVERSATIONS["tools"], TOOLS),
        ([*CONVERSATIONS["tools"][:1], {**CONVERSATIONS["tools"][1], "content": "I add."}], TOOLS),
        ([CONVERSATIONS["tools"][0], {"role": "assistant", "content": "", "tool_calls": CALL * 2}], TOOLS),
        ([CONVERSATIONS["tools"][0], {"role": "assistant", "content": "<think>\nno answer\n</think>"}], None),
        ([CONVERSATIONS["tools"][0], {"role": "assistant", "content": "It says </tool_call>"}], None),
    ):
        same_ids(ours, theirs, messages, tools)
        pieces = trained_text(ours, *ours.encode_chat(messages, tools))
        assert len(pieces) == sum(m["role"] == "assistant" for m in messages)
        assert all(piece.endswith("<|im_end|>") for piece in pieces), pieces
    assert pieces[0].endswith("It says </tool_call><|im_end|>")


def test_both_tokens_are_trained_where_two_close_a_turn(shaped):
    ours, theirs = shaped(TWICE_CLOSED, CHATML_TOKENS, "<|im_end|>")
    same_ids(ours, theirs, CONVERSATIONS["system"])
    pieces = trained_text(ours, *ours.encode_chat(CONVERSATIONS["system"]))
    assert pieces[0] == "Two.<|im_end|>\n<|endoftext|>"
    assert ours.stop_ids == [ours.core.token_to_id("<|im_end|>")]  # generation stops at the first


def test_an_end_token_that_stands_in_the_content_is_content(tokenizer):
    """The template closes the turn all the same, and both are trained: the mask is that of the text."""
    tok = tokenizer("chatml")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello<|im_end|>"}]
    assert trained_text(tok, *tok.encode_chat(messages)) == ["Hello<|im_end|><|im_end|>"]
    bare = Tokenizer(tok.core, tok.config, "{% for m in messages %}{{ m.content }}{% endfor %}", tok.source)
    assert trained_text(bare, *bare.encode_chat(messages)) == ["Hello<|im_end|>"]  # it alone can end it


@pytest.mark.parametrize(
    "more", [[], [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "3."}]]
)
def test_tool_conversations_of_a_template_that_refuses_a_turn_without_its_calls(more, shaped):
    ours, theirs = shaped(MISTRAL, MISTRAL_TOKENS, "</s>", "<s>")
    messages = [
        {"role": "user", "content": "Add"}, {"role": "assistant", "tool_calls": CALL_WITH_ID},
        {"role": "tool", "content": "2"}, {"role": "assistant", "content": "It is 2."}, *more,
    ]
    same_ids(ours, theirs, messages, TOOLS)
    pieces = trained_text(ours, *ours.encode_chat(messages, TOOLS))
    expected = ['[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]</s>', "It is 2.</s>", "3.</s>"]
    assert [piece.strip() for piece in pieces] == expected[: 2 + len(more) // 2]
    pair = [messages[0], {"role": "assistant", "tool_calls": CALL_WITH_ID * 2}, *messages[2:]]
    assert trained_text(ours, *ours.encode_chat(pair, TOOLS))[0].count("add") == 2
    none = {**CALL_WITH_ID[0], "function": {"name": "add", "arguments": {}}}
    without = [messages[0], {"role": "assistant", "tool_calls": [none]}, *messages[2:]]
    assert '"arguments": {}}]</s>' in trained_text(ours, *ours.encode_chat(without, TOOLS))[0]


def test_a_probe_that_is_refused_is_named_as_such(shaped):
    check = "{%- if 'ok' not in m.content %}{{ raise_exception('say ok') }}{%- endif %}"
    picky = MISTRAL.replace("{{- ' ' + m.content", check + "{{- ' ' + m.content")
    ours, theirs = shaped(picky, MISTRAL_TOKENS, "</s>", "<s>")
    messages = [{"role": "user", "content": "Add"}, {"role": "assistant", "content": "ok, 2"}]
    assert theirs.apply_chat_template(messages, tokenize=False).endswith("ok, 2</s>")
    with pytest.raises(
        BadRow, match=r"its content was replaced by a word, and .* refuses it: say ok; use a temp"
    ):
        ours.encode_chat(messages)


def test_an_answer_begins_before_its_calls_also_where_the_generation_prompt_is_not_in_the_history(shaped):
    ours, theirs = shaped(DISTILLED, DISTILLED_TOKENS, "</s>", "<s>", soft=["<think>", "</think>"])
    messages = [
        {"role": "user", "content": "Add"}, {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "2"}, {"role": "assistant", "content": "<think>\nhm\n</think>It is 2."},
        {"role": "user", "content": "And?"}, {"role": "assistant", "content": "", "tool_calls": CALL},
    ]
    same_ids(ours, theirs, messages)
    call = '<|call|>add {"a": 1}<|/call|></s>'
    assert trained_text(ours, *ours.encode_chat(messages)) == [call, "It is 2.</s>", call]


def test_a_thought_in_a_message_of_its_own_is_part_of_the_turn(shaped):
    ours, theirs = shaped(CHANNELS, CHANNEL_TOKENS, "<|return|>")
    messages = [
        {"role": "user", "content": "Add"}, {"role": "assistant", "content": "2", "reasoning": "one and one"},
        {"role": "user", "content": "And?"}, {"role": "assistant", "content": "3", "reasoning": "and one"},
    ]
    same_ids(ours, theirs, messages)
    thought = "<|channel|>analysis<|message|>and one<|end|><|start|>assistant"
    assert trained_text(ours, *ours.encode_chat(messages)) == [
        "<|channel|>final<|message|>2<|end|>", thought + "<|channel|>final<|message|>3<|return|>",
    ]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("template", ["qwen3", "channels"])
def test_reasoning_under_any_of_its_names_is_shown_as_transformers_shows_it(name, template, shaped):
    if template == "qwen3":
        ours, theirs = shaped(QWEN3_TEMPLATE, CHATML_TOKENS, "<|im_end|>")
    else:
        ours, theirs = shaped(CHANNELS, CHANNEL_TOKENS, "<|return|>")
    messages = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", name: "Deep thought"},
    ]
    same_ids(ours, theirs, messages)
    assert "Deep thought" in trained_text(ours, *ours.encode_chat(messages))[0]
    nulls = [{**message, "tool_calls": None, "reasoning_content": message.get(name)} for message in messages]
    assert ours.encode_chat(nulls) == ours.encode_chat(messages)


def test_text_parts_are_rendered_as_the_template_reads_them_or_joined(shaped, tokenizer):
    parts = [{"type": "text", "text": " Hello"}, {"type": "text", "text": "there "}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]
    ours, theirs = shaped(PARTS, CHATML_TOKENS, "<|im_end|>")
    same_ids(ours, theirs, messages)
    assert "Hello|there|<|im_end|>" in ours.render(messages)
    assert trained_text(ours, *ours.encode_chat(messages)) == ["there|<|im_end|>"]
    assert ours.with_readable_parts(messages) is messages
    plain = tokenizer("chatml")  # prints a list as Python does
    assert "{'type'" in plain.render(messages)
    joined = plain.with_readable_parts(messages)
    assert [m["content"] for m in joined] == [" Hellothere ", "there "]


def test_with_tools_the_template_named_tool_use_is_taken(shaped, tmp_path):
    import transformers

    ours, theirs = shaped(TEMPLATES["chatml"], CHATML_TOKENS, "<|im_end|>", name="named")
    named = {"default": TEMPLATES["chatml"], "tool_use": QWEN3_TEMPLATE, "rag": PARTS}
    theirs.chat_template = named
    theirs.save_pretrained(tmp_path / "folder")  # chat_template.jinja and additional_chat_templates/
    config = json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())
    (tmp_path / "list").mkdir()
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    (tmp_path / "list" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "list" / "tokenizer.json").write_bytes((tmp_path / "folder" / "tokenizer.json").read_bytes())
    for place in ("folder", "list"):
        ours = Tokenizer.load(tmp_path / place)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / place)
        for tools in (None, TOOLS):
            same_ids(ours, theirs, CONVERSATIONS["tools"], tools)
        assert "# Tools" in ours.render(CONVERSATIONS["tools"], TOOLS)
        ours.save(tmp_path / f"{place}-saved")
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{place}-saved")
        assert again.chat_template == named
        same_ids(Tokenizer.load(tmp_path / f"{place}-saved"), theirs, CONVERSATIONS["tools"], TOOLS)
    chosen = ours.configure(DataOptions(chat_template="rag"), ROOT)
    assert chosen.template == PARTS and not chosen.templates
    with pytest.raises(ConfigError, match=r"is no file .* give chatml, .*phi_3, tool_use, rag, a \.jinja"):
        ours.configure(DataOptions(chat_template="vicuna"), ROOT)


def test_generation_blocks_are_trained_exactly_and_nothing_beside_them(shaped):
    """Also a line end behind the end token, and also where they leave the end out (inspect warns of that)."""
    block = "{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}"
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        + block + "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    for text, ends in (
        (template, "<|im_end|>\n"),
        (template.replace(" + '<|im_end|>\\n' }}{% endg", " }}{% endg"), ""),
    ):
        ours, theirs = shaped(text, CHATML_TOKENS, "<|im_end|>", name=f"blocks{len(ends)}")
        for name in ("system", "consecutive", "the answer repeats the question"):
            made = theirs.apply_chat_template(
                CONVERSATIONS[name], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, labels = ours.encode_chat(CONVERSATIONS[name])
            assert ids == made["input_ids"]
            assert [int(label != IGNORE) for label in labels] == made["assistant_masks"]
        assert trained_text(ours, *ours.encode_chat(CONVERSATIONS["system"]))[0] == "Two." + ends
        if ends:
            assert ours.stop_ids == [ours.core.token_to_id("<|im_end|>")]


SAID = [{"role": "system", "content": "Be short."}, {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "So long."}]
SHIPPED = {  # by hand, from the formats that the families publish
    "chatml": "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
    "<|im_start|>assistant\n[Hello.<|im_end|>]\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[So long.<|im_end|>]\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[Hello.<|eot_id|>]"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "[So long.<|eot_id|>]",
    "gemma": "<s><start_of_turn>user\nBe short.\n\nHi<end_of_turn>\n"
    "<start_of_turn>model\n[Hello.<end_of_turn>]\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n[So long.<end_of_turn>]\n",
    "phi_3": "<|system|>\nBe short.<|end|>\n<|user|>\n Hi <|end|>\n<|assistant|>\n[Hello.<|end|>]\n"
    "<|user|>\nBye<|end|>\n<|assistant|>\n[So long.<|end|>]\n",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_template_writes_the_format_of_its_family_and_trains_the_answers_and_their_ends(
    name, tmp_path
):
    base = Tokenizer.load(write_tokenizer(tmp_path, None, ["<s>", "</s>"], "</s>", "<s>"))
    tokenizer = base.configure(DataOptions(chat_template=name), tmp_path)
    ids, labels = tokenizer.encode_chat(SAID)
    shown, inside = "", False
    for token, label in zip(ids, labels, strict=True):
        if (label != IGNORE) != inside:
            inside = not inside
            shown += "[" if inside else "]"
        shown += tokenizer.decode([token], special=True)
    assert shown + ("]" if inside else "") == SHIPPED[name]
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.encode_chat(SAID) == (ids, labels)  # what is saved carries the template


def test_a_template_can_stand_in_the_config_itself(tmp_path):
    base = Tokenizer.load(write_tokenizer(tmp_path, None, CHATML_TOKENS, "<|im_end|>"))
    ours = base.configure(DataOptions(chat_template=TEMPLATES["chatml"]), tmp_path)
    named = base.configure(DataOptions(chat_template="chatml"), tmp_path)
    assert ours.encode_chat(SAID)[0] == named.encode_chat(SAID)[0]
    with pytest.raises(ConfigError, match=r"no file.*chatml, llama3, gemma, phi_3"):
        base.configure(DataOptions(chat_template="vicuna"), tmp_path)
