"""After every kind of pass without gradients the parameters are the fp32 masters that they were:
`torchrun … masters.py CHECKPOINT`, for test_dist.py. Prints what was checked."""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed.tensor import DTensor

import dist
import ebft
from checkpoints import building
from checkpoints.weights import iterate_weights, read_architecture
from model import without_gradients
from rollouts import policy
from rollouts.blocks import Document, sample_blocks
from rollouts.generation import generate
from rollouts.rollout import Rollout
from sft import batch_nll
from text.packing import Batch


def main(checkpoint: str) -> None:
    world = dist.init(dist.DistOptions())
    config = ebft.Config(
        base_model=checkpoint, datasets=[{"path": "x"}], bf16=True, fsdp_reshard_after_forward=False
    )
    arch = read_architecture(Path(checkpoint))
    model = building.build_model(arch, Path(checkpoint), config, world)
    before = {name: (type(p), p.dtype, p.to_local().clone() if isinstance(p, DTensor) else p.clone())
              for name, p in model.named_parameters()}
    assert all(dtype == torch.float32 for _, dtype, _ in before.values())
    assert world.size == 1 or all(
        kind is DTensor or issubclass(kind, DTensor) for kind, _, _ in before.values()
    )
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    batch = Batch(ids, ids.clone(), torch.arange(8)[None], torch.zeros_like(ids), [0])
    group = [Rollout([3, 4], [5, 6, 7], ground_truth_ids=[5, 6]) for _ in range(2)]
    options = SimpleNamespace(temperature=1.0, top_entropy_quantile=1.0, beta=0.1)

    def evaluation() -> None:
        with without_gradients(model):
            batch_nll(model, batch)

    passes = {
        "generate": lambda: generate(model, [[3, 4], [5]], max_new_tokens=3),
        "an evaluation": evaluation,
        "keep_logprobs": lambda: policy.keep_logprobs(model, model, [group],
         options, world, False, old=True, kl=True),
        "group_features": lambda: ebft.group_features(model, [group], config),
        "sample_blocks": lambda: sample_blocks(
            model, [Document(list(range(3, 20)), [4, 8], [True] * 17, "a")], 2, 3, 1.0, None),
    }
    for name, run in passes.items():
        run()
        for key, parameter in model.named_parameters():
            kind, dtype, value = before[key]
            assert type(parameter) is kind and parameter.dtype == dtype, (
                name,
                key,
                type(parameter),
                parameter.dtype,
            )
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            assert torch.equal(local, value) and not hasattr(parameter, "inference_copy"), (name, key)
        for key, tensor in iterate_weights(model):
            assert tensor.dtype == torch.float32, (name, key)  # the masters, rounded by nobody
        if world.main:
            print("masters after", name)
    loss = batch_nll(model, batch)[0]  # and training goes on
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    dist.finish()


if __name__ == "__main__":
    main(sys.argv[1])
