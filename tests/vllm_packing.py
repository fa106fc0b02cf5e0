"""In vLLM's environment: our buffers beside those that vLLM's own sender would make. test_vllm.py starts it
with the project's root as argument."""

import random
import sys
from unittest.mock import MagicMock

import torch
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

sys.path.append(sys.argv[1])  # last: our module names are others' too
sys.modules["run.config"] = sys.modules["rollouts.vllm_server"] = MagicMock()  # need what is missing here

from rollouts.nccl_transfer import packed  # noqa: E402

random.seed(0)
for trial in range(300):
    tensors = [
        (str(i), torch.randn(random.randint(1, 40), random.randint(1, 9)).to(
            random.choice([torch.bfloat16, torch.float32])
        ))
        for i in range(random.randint(0, 20))
    ]
    size = random.choice([1, 64, 500, 3000, 10**6])
    ours, theirs, source = list(packed(iter(tensors), torch.device("cpu"), size)), [], iter(tensors)
    while (chunk := pack_tensors(source, lambda item: item[1], size)) is not None:
        theirs.append(chunk.packed_tensor)
    assert len(ours) == len(theirs), (trial, len(ours), len(theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), trial
print("all equal")
