"""grpo.py whose weights go to a server as they would over NCCL, with gloo in its place: under torchrun from
test_nccl_transfer.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gloo_group

import grpo
from rollouts import nccl_transfer, vllm_client
from run import loop
from run.config import parse_config

if __name__ == "__main__":
    nccl_transfer.BUFFER = 1 << 16  # many buffers
    nccl_transfer.join = gloo_group.join
    vllm_client.refuse_nccl = lambda options, device: None
    loop.start(grpo.main, lambda: parse_config(grpo.Config, sys.argv[1:]))
