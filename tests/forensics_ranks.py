"""Every injection on however many ranks there are: `torchrun … forensics_ranks.py CHECKPOINT OUT`, or
imported by test_forensics.py for one rank."""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import dist
from checkpoints import building
from checkpoints.weights import read_architecture
from health.forensics import Forensics, NonFinite

NAMES = ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
LENGTHS = [9, 7, 8]
BAD_TOKENS = slice(9 + 2, 9 + 5)  # tokens 2 to 4 of the second row


class Tokens:
    def decode(self, ids: list[int], special: bool = False) -> str:
        return " ".join(map(str, ids))


def config_of(checkpoint: str, out: str, **changes) -> SimpleNamespace:
    from sft import Config

    values = dict(base_model=checkpoint, datasets=[{"path": "x", "type": "chat"}], output_dir=out)
    return Config(**values, **changes)  # type: ignore[arg-type]


class Poisoned(torch.autograd.Function):
    """Identity whose gradient is `value` at some tokens (where=None: at one place of a parameter), unless
    what comes back is zero everywhere: a rank whose loss counts nothing sends nothing back."""

    @staticmethod
    def forward(ctx, x, value, where):
        ctx.value, ctx.where = value, where
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        if gradient.any():
            gradient = gradient.clone()
            if ctx.where is None:
                gradient.view(-1)[0] = ctx.value
            else:
                gradient.view(-1, gradient.shape[-1])[ctx.where] = ctx.value
        return gradient, None, None


def modules_of(model) -> list[str]:
    return [
        n for n, m in model.named_modules() if n not in ("", "lm_head") and not isinstance(m, nn.ModuleList)
    ]


def inject_forward(model, name: str, value: float):
    def hook(module, inputs, output):
        first, *rest = output if isinstance(output, tuple) else (output,)
        changed = first.clone()
        changed.view(-1, changed.shape[-1])[BAD_TOKENS] = value
        return (changed, *rest) if rest else changed

    return model.get_submodule(name).register_forward_hook(hook)


class BackwardFault:
    """What a module sends back to its input goes wrong, inside of it."""

    def __init__(self, model, name: str, value: float):
        self.module = model.get_submodule(name)
        plain = self.module.forward
        self.module.forward = lambda x, *rest: plain(Poisoned.apply(x, value, BAD_TOKENS), *rest)

    def remove(self):
        del self.module.forward


class ParameterFault:
    """The gradient of one parameter goes wrong where its module computes it."""

    def __init__(self, model, name: str, value: float):
        path, _, self.parameter = name.rpartition(".")
        self.module, self.value = model.get_submodule(path), value
        self.before = self.module.register_forward_pre_hook(self._swap)
        self.after = self.module.register_forward_hook(self._back)

    def _swap(self, module, inputs):
        self.plain = module._parameters.pop(self.parameter)
        setattr(module, self.parameter, Poisoned.apply(self.plain, self.value, None))

    def _back(self, module, inputs, output):
        delattr(module, self.parameter)
        module._parameters[self.parameter] = self.plain

    def remove(self):
        self.before.remove()
        self.after.remove()


def cases(model):
    """(what was injected, how, what should be found: direction, module, tensor or None)."""
    for value in (math.nan, math.inf):
        for name in modules_of(model):
            yield (
                f"{value} in {name}",
                lambda n=name, v=value: inject_forward(model, n, v),
                ("forward", name, "output"),
            )
            if name != "embed_tokens":
                yield (
                    f"{value} back from {name}", lambda n=name, v=value: BackwardFault(model, n, v),
                    ("backward", name, "gradient of its input"),
                )
        for name in [name for name, _ in model.named_parameters()]:
            module, _, parameter = name.rpartition(".")
            if module == "lm_head":  # a weight of the loss, never run as a module
                continue
            yield f"{value} in d {name}", lambda n=name, v=value: ParameterFault(model, n, v), (
                "parameter", module, parameter,
            )


def run_cases(checkpoint: str, out: str, **changes) -> list[str]:
    """What went wrong: a line for every case that was not named right."""
    config = config_of(checkpoint, out, **changes)
    world = dist.init(config)
    torch.manual_seed(0)
    directory = Path(checkpoint)
    model = building.build_model(read_architecture(directory), directory, config, world)
    before = {n: dist_local(p).clone() for n, p in model.named_parameters()}
    N = sum(LENGTHS)
    generator = torch.Generator().manual_seed(world.rank)
    ids = torch.randint(5, 300, (1, N), generator=generator)
    documents = torch.tensor([[i for i, n in enumerate(LENGTHS) for _ in range(n)]])
    wrong = []
    guilty = world.size - 1
    names = [f"{name} of rank {world.rank}" for name in NAMES]
    for number, (said, inject, expected) in enumerate(cases(model)):
        watch = Forensics(model, config, world, Tokens())
        watch.skipped = 1  # no weights beside the report: they are tried once, elsewhere
        handle = inject() if world.rank == guilty else None
        losses = []

        def compute(ids):
            hidden, _ = model.hidden_states(ids, document_ids=documents)
            return hidden.float().pow(2).mean() * 0.1 * world.size + 0.0 * model.head_weight.sum()

        for _ in range(2):
            watch.remember(ids, names)
            loss = compute(ids)
            loss.backward()
            losses.append(loss.detach())
        norm, _ = dist.gradient_norm(model.parameters())
        try:
            watch.healthy(number + 1, losses, norm, compute)
            wrong.append(f"{said}: not noticed")
        except NonFinite as error:
            incident = Path(out) / "incidents" / f"step-{number + 1}"
            report = json.loads((incident / "report.json").read_text())
            found = (report["direction"], report["module"], report["tensor"])
            rows = [(r["name"], r["first"], r["last"]) for r in report["rows"]]
            wanted_rows = [(f"{NAMES[1]} of rank {guilty}", 2, 4)]
            if found != expected or report["rank"] != guilty:
                wrong.append(f"{said}: {found} on rank {report['rank']} ({error})")
            if (
                expected[0] != "parameter"
                and "k_norm" not in said
                and "q_norm" not in said
                and rows != wanted_rows
            ):
                wrong.append(f"{said}: rows {rows}")
        if handle is not None:
            handle.remove()
        if any(p.grad is not None for p in model.parameters()):
            wrong.append(f"{said}: gradients are still there")
    for n, p in model.named_parameters():
        if not torch.equal(dist_local(p), before[n]):
            wrong.append(f"{n} has changed")
    wrong.append(f"cases: {number + 1}")
    return wrong


def dist_local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


if __name__ == "__main__":
    result = run_cases(sys.argv[1], sys.argv[2])
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(result))
    dist.finish()
