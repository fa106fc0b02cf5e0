"""Tokens that a checkpoint lists beside its tokenizer.json."""

from typing import Any

import tokenizers

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
LISTS = ("extra_special_tokens", "additional_special_tokens")


def _token(value: Any, special: bool) -> tokenizers.AddedToken:
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=special, normalized=not special)
    flags = {k: bool(value[k]) for k in ("single_word", "lstrip", "rstrip", "normalized") if k in value}
    return tokenizers.AddedToken(value["content"], special=bool(value.get("special", special)), **flags)


def add_tokens(
    core: tokenizers.Tokenizer, config: dict, special_tokens_map: dict, added_tokens: dict
) -> dict:
    """Add to `core` the tokens that stand in tokenizer_config.json (`config`), special_tokens_map.json and
    added_tokens.json alone, and return `config` with the special tokens that count.

    Precedence and order are those of transformers (PreTrainedTokenizerBase._from_pretrained): with an
    added_tokens_decoder the two other files are ignored; without one, special_tokens_map.json wins over
    tokenizer_config.json. Raises TypeError, ValueError, KeyError or AttributeError for what is no token.
    """
    config, known = dict(config), {token.content for token in core.get_added_tokens_decoder().values()}
    extra = next((config[name] for name in LISTS if config.get(name)), [])
    extra = list(extra.values() if isinstance(extra, dict) else extra)
    decoder = config.get("added_tokens_decoder")
    if not decoder:
        for key, value in special_tokens_map.items():
            if key in LISTS:
                extra += value.values() if isinstance(value, dict) else value
            else:
                config[key] = value["content"] if isinstance(value, dict) else value
    of_model = [v for k, v in config.items() if k.endswith("_token") and k not in SPECIAL_NAMES]
    named = [config[name] for name in SPECIAL_NAMES if config.get(name)]
    special = [_token(value, True) for value in (*named, *extra, *of_model) if isinstance(value, str | dict)]
    names = {token.content for token in special}
    if decoder:
        beside = [_token(decoder[i], False) for i in sorted(decoder, key=int)]
    else:
        new = [text for text in sorted(added_tokens, key=added_tokens.__getitem__) if text not in known]
        beside = [_token(text, text in names) for text in new]
    seen = known | {token.content for token in beside}
    for token in (*beside, *(t for t in special if t.content not in seen)):
        (core.add_special_tokens if token.special else core.add_tokens)([token])
    return config
