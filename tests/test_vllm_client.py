"""What the client of vLLM decides by itself, without a server (with one: test_vllm.py)."""

from types import SimpleNamespace

import pytest
import torch

from config import ConfigError
from dist import World
from vllm_client import VllmEngine

WORLD = World(0, 1, 0, torch.device("cpu"))


def engine_for(new_ids, base_rows, adapter, trains_rows):
    """An engine whose model has new tokens; no server is asked before the refusal."""
    options = SimpleNamespace(
        vllm_model_name=None, base_model="base", vllm_server_base_url=["http://127.0.0.1:9"], vllm_timeout=1,
        vllm_sync_method="auto", adapter=adapter, tokens=["<a>"], vllm_wait_timeout=0,
    )  # fmt: skip
    model = SimpleNamespace(
        arch=SimpleNamespace(checkpoint_vocab_size=base_rows),
        token_rows=SimpleNamespace(ids=new_ids) if trains_rows else None,
    )
    tokenizer = SimpleNamespace(new_ids=new_ids, stop_ids=[0])
    return VllmEngine(model, options, tokenizer, WORLD, [])


@pytest.mark.parametrize("adapter, trains_rows", [("lora", True), (None, False)])
def test_tokens_beyond_the_rows_of_the_server_are_refused_before_it_is_asked(adapter, trains_rows):
    """A server of base_model would have no row for them: sync and sampling would both be wrong."""
    with pytest.raises(ConfigError, match=r"tokens.*beyond the rows.*merge_adapter"):
        engine_for([99, 100], 100, adapter, trains_rows)


def test_tokens_within_the_rows_of_the_server_are_no_reason_to_refuse():
    """The reserved rows of a padded vocabulary can be trained and served."""
    with pytest.raises(Exception, match=r"127\.0\.0\.1:9"):  # it asks the server, which is not there
        engine_for([98, 99], 100, "lora", True)
