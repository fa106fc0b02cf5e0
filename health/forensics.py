"""Locates the origin of a NaN or Inf: which module, which direction, which rows, which rank.

Every step is checked for non-finite values before the optimiser changes a weight. If there is one, the step
is rerun with hooks from the same batches and random state, and the findings are written to
output_dir/incidents/step-N; `python -m health replay DIR` reruns that in one CPU process (reference page:
NaN and Inf Handling).
"""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import dist
from checkpoints import saving
from checkpoints.adapters import save_adapter
from checkpoints.building import build_model
from checkpoints.weights import read_architecture, save_pretrained, write_tensors
from dist import World
from health.vitals import Vitals
from kernels import SharedPrompts
from model import Linear, Transformer
from numerics.low_precision import FP8_BLOCK
from run.config import BallastError, ConfigError, check_at_least_one, read_options, resolve_checkpoint
from run.log import log


@dataclass
class ForensicOptions:
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss or a gradient is NaN or infinite: stop the run, or skip the step and continue."""
    max_skipped_steps: int = 3
    """on_nonfinite: skip: stop after N skipped steps."""
    detect_anomaly: bool = False
    """Let autograd check every backward pass for NaN and name the operation: several times slower."""

    def check(self) -> None:
        check_at_least_one(self, "max_skipped_steps")


class NonFinite(BallastError):
    """A loss or gradient that is NaN or infinite; the optimiser has not touched anything."""


@dataclass
class Fault:
    """Where a non-finite value originated."""

    direction: Literal["forward", "loss", "backward", "parameter", "unseen"]
    module: str = ""
    tensor: str = ""
    value: str = ""  # counts, as in '3 NaN, 1 Inf of 512'
    given: str = ""  # the range of the module's input
    places: list[int] = field(default_factory=list)  # tokens of the flat batch
    notes: list[str] = field(default_factory=list)
    rank: int = 0
    micro_batch: int = 0
    rows: list[dict] = field(default_factory=list)

    def line(self) -> str:
        what = {
            "forward": f"the forward pass of {self.module} is the source ({self.tensor}: {self.value})",
            "loss": f"the loss is the source, from finite hidden states ({self.value})",
            "backward": f"the backward pass of {self.module} is the source ({self.tensor}: {self.value})",
            "parameter": f"the backward pass of {self.module} is the source, in the gradient of its "
            f"{self.tensor} ({self.value})",
            "unseen": "a rerun of the same step was finite: a race condition or a hardware fault",
        }[self.direction]
        rows = ", ".join(f"{r['name']} tokens {r['first']}–{r['last']}" for r in self.rows[:4])
        more = " …" if len(self.rows) > 4 else ""
        parts = [what, f"given {self.given}" if self.given else "", f"rows {rows}{more}" if rows else ""]
        return "; ".join([*filter(None, parts), *self.notes, f"rank {self.rank}"])


ORDER = ("forward", "loss", "backward", "parameter", "unseen")  # the first of a step explains the rest


def not_finite(tensor: Tensor) -> Tensor:
    """Mask of the NaN and infinite values in this process's shard."""
    return ~torch.isfinite(dist.local(tensor))


def described(tensor: Tensor) -> str:
    """'3 NaN, 1 Inf of 512'."""
    tensor = dist.local(tensor)
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    counts = ", ".join(f"{n:,} {name}" for n, name in ((nan, "NaN"), (inf, "Inf")) if n)
    return f"{counts or 'none'} of {tensor.numel():,}"


def span(tensor: Tensor) -> str:
    """The range of the finite values, and the counts of the others."""
    tensor = dist.local(tensor).float()
    finite = tensor[torch.isfinite(tensor)]
    if not finite.numel():
        return "nothing finite" if tensor.numel() else "nothing at all"
    rest = tensor.numel() - finite.numel()
    return f"{finite.min():.4g} to {finite.max():.4g}" + (f" and {described(tensor)}" if rest else "")


def in_fp8(module: nn.Module) -> bool:
    return isinstance(module, Linear) and (module.fp8 or module.kind == "fp8")


def zero_tiles(x: Tensor, what: str) -> list[str]:
    """A note if some 1 × 128 tiles of `x` are all zero."""
    x = x.detach().reshape(-1, x.shape[-1])
    padded = nn.functional.pad(x, (0, -x.shape[-1] % FP8_BLOCK))
    tiles = padded.view(len(x), -1, FP8_BLOCK).abs().amax(-1)
    zero = int((tiles == 0).sum())
    message = f"{zero:,} of {tiles.numel():,} FP8 tiles of {what} are all zero"
    return [f"{message}: without a guard their scale is 0 and they are divided by it"] if zero else []


class Probe:
    """Hooks on every module for one forward and backward pass that record the first non-finite output and the
    first non-finite gradient, in order of computation.

    Each input of a module becomes a separate view, so that the module's contribution to the gradient is seen
    apart from the contributions of other users of the same tensor.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self.forward_fault: Fault | None = None
        self.backward_fault: Fault | None = None
        self.batch: dict[str, Any] = {}  # arguments of hidden_states
        self.hidden: Tensor | None = None  # its result
        self.gradient: Tensor | None = None  # the gradient of its result
        self._names = {module: name for name, module in model.named_modules()}
        self._handles: list[Any] = []
        self._arrived: dict[nn.Module, Tensor] = {}  # gradients of the outputs of FP8 layers

    def __enter__(self) -> "Probe":
        for module in self._names:
            if module is not self.model and not isinstance(module, nn.ModuleList):
                self._handles.append(module.register_forward_pre_hook(self._before))
                self._handles.append(module.register_forward_hook(self._after))
        self._own = vars(self.model).get("hidden_states")  # FSDP wraps the method
        self._plain = self.model.hidden_states
        self.model.hidden_states = self._observed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        del self.model.hidden_states
        if self._own is not None:
            self.model.hidden_states = self._own  # type: ignore[method-assign]

    def _observed(self, input_ids: Tensor, **how: Any) -> tuple[Tensor, list[Tensor]]:
        hidden, others = self._plain(input_ids, **how)
        if torch.is_grad_enabled() and hidden.requires_grad:
            self.batch = {"input_ids": input_ids, **how}
            self.hidden = hidden.detach()
            hidden.register_hook(self._returned)
        return hidden, others

    def _returned(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach()

    @staticmethod
    def _tensors(values: Any) -> list[Tensor]:
        values = values if isinstance(values, tuple) else (values,)
        return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]

    def _before(self, module: nn.Module, inputs: tuple) -> tuple:
        if not torch.is_grad_enabled():
            return inputs
        given = []
        for value in inputs:
            if isinstance(value, Tensor) and value.requires_grad:
                value = value.view_as(value)
                value.register_hook(functools.partial(self._sent_back, module, "gradient of its input"))
            given.append(value)
        return tuple(given)

    def _after(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        for out in self._tensors(output):
            if out.requires_grad:
                if in_fp8(module):
                    out.register_hook(functools.partial(self._arrived.__setitem__, module))
                out.register_hook(functools.partial(self._sent_back, module, "gradient of its output"))
            if self.forward_fault is None and not_finite(out).any():
                self.forward_fault = self._born(module, self._tensors(inputs), out)

    def _sent_back(self, module: nn.Module, tensor: str, gradient: Tensor) -> None:
        if self.backward_fault is not None or not not_finite(gradient).any():
            return
        name = self._names[module]
        if module is self.model.norm and tensor == "gradient of its output":
            self.backward_fault = self._fault("loss", "the loss", "gradient of the hidden states", gradient)
            return
        if tensor == "gradient of its output":  # the module is not to blame: what used its output is
            culprit = name.rpartition(".")[0]
            culprit = culprit.removesuffix(".layers").removesuffix("layers")
            tensor = f"gradient of {name}'s output"
            name = culprit or "the model"
        self.backward_fault = self._fault("backward", name, tensor, gradient)
        if module in self._arrived:
            self.backward_fault.notes += zero_tiles(self._arrived[module], "the gradient of its output")

    def _born(self, module: nn.Module, inputs: list[Tensor], output: Tensor) -> Fault:
        name = self._names[module]
        bad = [x for x in inputs if not_finite(x).any()]
        if bad:  # the input was already non-finite: produced between modules, by their parent
            holder = name.rpartition(".")[0].removesuffix(".layers").removesuffix("layers")
            return self._fault("forward", holder or "the model", f"what it gives to {name}", bad[0])
        fault = self._fault("forward", name, "output", output)
        fault.given = span(inputs[0]) if inputs else ""
        for label, values in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if values.is_floating_point() and not_finite(values.float()).any():
                fault.notes.append(f"its {label} holds {described(values.float())}")
        if in_fp8(module) and inputs:
            fault.notes += zero_tiles(inputs[0], "its input")
        return fault

    def _fault(self, direction: Any, name: str, tensor: str, values: Tensor) -> Fault:
        flags = not_finite(values)
        ids = self.batch.get("input_ids")
        tokens = ids.numel() if ids is not None else flags[..., 0].numel()
        places: list[int] = []
        # Tokens come first in every shape of activations: [B, T, D] or [N, D]
        if flags.dim() >= 2 and flags.numel() % tokens == 0:
            places = flags.reshape(tokens, -1).any(-1).nonzero().flatten().tolist()
        return Fault(direction, name, tensor, described(values), places=places)


@dataclass
class Suspect:
    """One micro-batch of a step, and the names of its documents."""

    batch: Any
    names: Sequence[str]  # of the documents, in order
    given: Callable[[], dict[str, Tensor]]  # the loss's inputs besides the model, by document
    random: dict[str, Tensor]


class Forensics:
    """Finds the origin of a non-finite number. The loop registers each micro-batch before its forward pass
    (`remember`), and asks before the update whether everything is finite (`healthy`)."""

    def __init__(
        self, model: Transformer, config: Any, world: World, tokenizer: Any, frozen: nn.Module | None = None
    ):
        self.model, self.config, self.world, self.tokenizer = model, config, world, tokenizer
        self.suspects: list[Suspect] = []
        self.skipped = 0
        self.vitals = Vitals(model, config, world, frozen) if config.health else None
        torch.autograd.set_detect_anomaly(config.detect_anomaly)

    def remember(
        self, batch: Any, names: Sequence[str], given: Callable[[], dict[str, Tensor]] = dict
    ) -> None:
        """Keep a micro-batch, with the random state before its forward pass, until the step is judged.
        `given()` returns the loss's inputs besides the model, by document [B] or [B, T]; it is called only
        if the step is faulty."""
        if self.vitals is not None and not self.suspects:
            self.vitals.step_begins()
        self.suspects.append(Suspect(batch, names, given, random_state()))

    def metrics(self) -> dict[str, float]:
        """What was skipped, and the vital signs of a step that is done."""
        found = {"skipped_steps": float(self.skipped)} if self.skipped else {}
        return found | (self.vitals.metrics() if self.vitals is not None else {})

    def healthy(
        self, step: int, losses: Sequence[Tensor], norm: Tensor,
        loss_of: Callable[[Any], Tensor | tuple[Tensor, Any]],
    ) -> bool:
        """Whether the update of this step (counted from 1) may be made. A collective. `loss_of(batch)` is
        a micro-batch's loss, alone or before its statistics; called, with hooks on every module, only
        if something is not finite. Raises NonFinite if the run has to end. Gradients of a skipped step are
        dropped."""
        suspects, self.suspects = self.suspects, []
        sane = math.isfinite(norm.item()) and all(math.isfinite(x) for x in map(float, losses))
        if dist.all_reduce([float(not sane)], self.world)[0] == 0:
            if self.vitals is not None and suspects:
                names = [str(name) for suspect in suspects for name in suspect.names]
                first = functools.partial(random_state_of, suspects[0].random)
                self.vitals.before_update(step, [s.batch for s in suspects], names, losses, loss_of, first)
            return True
        before = random_state()
        self.loss_of = loss_of
        fault, suspect, probe = self._search(suspects)
        self.model.zero_grad(set_to_none=True)
        set_random_state(before)
        self.skipped += 1
        directory = Path(self.config.output_dir) / "incidents" / f"step-{step}"
        values = f"loss {sum(map(float, losses)):.4g}, gradient norm {norm.item():.4g}"
        self._write(directory, step, values, fault, suspect, probe)
        message = f"step {step} is not finite ({values}): {fault.line()}; details in {directory}"
        if self.config.on_nonfinite == "skip" and self.skipped <= self.config.max_skipped_steps:
            log.warning("%s; the step is skipped, %d of at most %d", message, self.skipped,
                        self.config.max_skipped_steps)
            return False
        if self.config.on_nonfinite == "skip":
            message += f"; max_skipped_steps is {self.config.max_skipped_steps}"
        raise NonFinite(f"{message}; {advice(fault, self.config)}")

    def _search(self, suspects: list[Suspect]) -> tuple[Fault, Suspect | None, Probe | None]:
        """Every rank reruns its micro-batches, in lockstep, until one of them shows the fault."""
        for number, suspect in enumerate(suspects):
            fault, probe = self._again(suspect, 1.0)
            faults = dist.gather(None if fault is None else asdict(fault), self.world)
            known = [(ORDER.index(f["direction"]), rank, f) for rank, f in enumerate(faults) if f]
            if not known:
                continue
            first = min(known, key=lambda entry: entry[:2])
            rank, whose = first[1], Fault(**first[2])
            if whose.direction == "parameter" and self.world.size > 1:
                rank = self._whose(suspect)
            whose.rank, whose.micro_batch = rank, number
            places = dist.gather(owners(probe.batch, suspect.names), self.world)[rank]
            texts = dist.gather(self._texts(probe.batch), self.world)[rank]
            whose.rows = rows_of(whose.places, places, texts)
            return whose, suspect, probe
        return Fault("unseen"), None, None

    def _again(self, suspect: Suspect, weight: float) -> tuple[Fault | None, Probe]:
        self.model.zero_grad(set_to_none=True)
        set_random_state(suspect.random)
        with Probe(self.model) as probe:
            result = self.loss_of(suspect.batch)
            loss = result[0] if isinstance(result, tuple) else result
            (loss * weight).backward()
        if probe.forward_fault is not None:
            return probe.forward_fault, probe
        if not math.isfinite(loss.item()) or (
            probe.backward_fault and probe.backward_fault.direction == "loss"
        ):
            return self._in_loss(suspect, probe, loss), probe
        if probe.backward_fault is not None:
            return probe.backward_fault, probe
        return bad_parameter(self.model), probe

    def _in_loss(self, suspect: Suspect, probe: Probe, loss: Tensor) -> Fault:
        """The fault if the hidden states are finite, but the loss or its gradient is not."""
        fault = probe.backward_fault or Fault("loss", "the loss")
        fault.value = f"loss {loss.item():.4g}" + (f"; {fault.value}" if fault.value else "")
        for name, values in suspect.given().items():
            flags = not_finite(values)
            if not flags.any():
                continue
            which = flags.reshape(len(flags), -1).any(-1).nonzero().flatten().tolist()
            named = ", ".join(str(suspect.names[i]) for i in which[:4] if i < len(suspect.names))
            fault.notes.append(f"{name} hold {described(values)} (rows {named})")
            owner = owners(probe.batch, suspect.names)
            marked = {suspect.names[i] for i in which if i < len(suspect.names)}
            fault.places = [index for index, name in enumerate(owner) if name in marked]
        if probe.hidden is not None:
            fault.given = f"hidden states from {span(probe.hidden)}"
            weight = self.model.head_weight
            if not isinstance(weight, DTensor):
                rows = probe.hidden.reshape(-1, probe.hidden.shape[-1])[:4096]
                with torch.no_grad():
                    logits = self.model.logits(rows.to(weight.dtype)).float()
                    least = torch.log_softmax(logits, -1).amin().item()
                fault.notes.append(f"logits from {span(logits)}, smallest log-probability {least:.4g}")
        return fault

    def _whose(self, suspect: Suspect) -> int:
        """The rank whose contribution to a reduced gradient is not finite, by bisection: the other ranks'
        losses get weight 0."""
        low, high = 0, self.world.size
        while high - low > 1:
            middle = (low + high) // 2
            fault, _ = self._again(suspect, float(low <= self.world.rank < middle))
            guilty = any(dist.gather(fault is not None, self.world))
            low, high = (low, middle) if guilty else (middle, high)
        return low

    def _texts(self, batch: dict[str, Any]) -> list[int]:
        ids = batch.get("input_ids")
        return [] if ids is None else ids.flatten().tolist()

    def _write(
        self, directory: Path, step: int, values: str, fault: Fault, suspect: Suspect | None,
        probe: Probe | None,
    ) -> None:
        """Write the incident: report, batch, random state, config, text, and the weights of the step."""
        with saving.appearing(directory, self.world) as aside:
            if self.world.rank == fault.rank and suspect is not None and probe is not None:
                write_tensors(batch_tensors(probe), aside / "batch.safetensors")
                write_tensors(suspect.random, aside / "random.safetensors")
                if given := {k: v.detach().cpu().contiguous() for k, v in suspect.given().items()}:
                    write_tensors(given, aside / "given.safetensors")
            for row in fault.rows:
                row["text"] = self.tokenizer.decode(row.pop("ids"), special=True)
            if self.world.main:
                report = {
                    "step": step, "values": values, "world": self.world.size, **asdict(fault),
                    "says": fault.line(), "advice": advice(fault, self.config), "torch": torch.__version__,
                    "device": str(self.world.device),
                }
                text = json.dumps(report, indent=2, ensure_ascii=False)
                (aside / "report.json").write_text(text + "\n", encoding="utf-8")
                texts = [f"{r['name']} tokens {r['first']}–{r['last']}\n{r['text']}\n" for r in fault.rows]
                (aside / "rows.txt").write_text("\n".join(texts), encoding="utf-8")
                values_of = asdict(self.config)
                (aside / "config.yaml").write_text(
                    yaml.safe_dump(values_of, sort_keys=False, allow_unicode=True), encoding="utf-8"
                )
            if self.skipped == 1:  # only for the first incident: a model can be large
                if self.model.adapter:
                    save_adapter(self.model, aside / "model", main=self.world.main)
                else:
                    save_pretrained(self.model, aside / "model", main=self.world.main)


def random_state() -> dict[str, Tensor]:
    """The states of dropout's random generators, as tensors."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def random_state_of(state: dict[str, Tensor]) -> Iterator[None]:
    """A context with this random state; the one before it comes back."""
    before = random_state()
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(before)


def bad_parameter(model: Transformer) -> Fault | None:
    """The first parameter in backward order whose gradient is not finite."""
    bad = [
        (name, p.grad) for name, p in model.named_parameters()
        if p.grad is not None and not_finite(p.grad).any()
    ]
    if not bad:
        return None
    name, gradient = bad[-1]
    module, _, parameter = name.rpartition(".")
    notes = [f"{len(bad)} parameters have such a gradient"] if len(bad) > 1 else []
    return Fault("parameter", module, parameter, described(gradient), notes=notes)


def owners(batch: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The name of the document that each token of a flat batch belongs to; '' for padding."""
    ids = batch.get("input_ids")
    if ids is None:
        return []
    shared = batch.get("shared_prompts")
    if shared is not None:
        by_document = len(names) == len(shared.groups)
        owner, at = [], 0
        for number, (length, continuations) in enumerate(shared.groups):
            owner += [names[number if by_document else at]] * length
            for _, count in continuations:
                owner += [names[number if by_document else at]] * count
                at += 1
        return owner
    documents = batch.get("document_ids")
    if documents is None:
        return [names[row] for row in range(len(ids)) for _ in range(ids.shape[1])]
    owner, number = [], -1
    for row in documents.tolist():
        last = None
        for which in row:
            if which != last and which >= 0:
                number += 1
            last = which
            owner.append(names[number] if which >= 0 and number < len(names) else "")
    return owner


def rows_of(places: list[int], owner: list[str], ids: list[int]) -> list[dict]:
    """Rows that hold these places: name, first and last token within the row, and the row's ids."""
    rows: dict[str, dict] = {}
    start: dict[str, int] = {}
    tokens_of: dict[str, list[int]] = {}
    for index, name in enumerate(owner):
        start.setdefault(name, index)
        tokens_of.setdefault(name, []).append(ids[index])
    for index in places:
        name = owner[index] if index < len(owner) else ""
        if name:
            at = index - start[name]
            ids_of_row = tokens_of[name][:2048]
            row = rows.setdefault(name, {"name": name, "first": at, "last": at, "ids": ids_of_row})
            row["last"] = at
    return list(rows.values())


def batch_tensors(probe: Probe) -> dict[str, Tensor]:
    """The model's inputs and the gradient of its hidden states, for replay."""
    tensors: dict[str, Tensor] = {}
    for name in ("input_ids", "position_ids", "document_ids"):
        if probe.batch.get(name) is not None:
            tensors[name] = probe.batch[name]
    shared = probe.batch.get("shared_prompts")
    if shared is not None:
        flat = [(g, length, *c) for g, (length, some) in enumerate(shared.groups) for c in some or [(0, 0)]]
        tensors["groups"] = torch.tensor(flat)
    if probe.gradient is not None:
        tensors["gradient"] = probe.gradient
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def advice(fault: Fault, config: Any) -> str:
    """What to do, with the options' current values."""
    rate = f"learning_rate is {config.learning_rate:g}"
    precision = "bf16 is true: try false to see if precision is the cause" if config.bf16 else ""
    fp8 = "fp8 is true: try false" if getattr(config, "fp8", False) else ""
    if any("holds" in note for note in fault.notes):
        return "the weights themselves are not finite: go back to an earlier checkpoint, or to another model"
    if fault.direction == "loss":
        rest = "see `given` in the report: rewards, advantages or log-probs are not numbers" if any(
            "hold" in note for note in fault.notes
        ) else f"logits have grown beyond what exp() takes; {rate}: halve it"
        return rest
    if fault.direction == "unseen":
        return "run it again with deterministic: true; if it comes back elsewhere, suspect the machine"
    parts = [f"{rate}: divide it by 2 to 5", precision, fp8]
    if fault.direction in ("backward", "parameter"):
        parts.append(f"max_grad_norm is {config.max_grad_norm:g}" if config.max_grad_norm else
                     "max_grad_norm is 0: 1.0 clips what a step can do")
    elif fault.rows:
        parts.append("look at the rows in rows.txt")
    return "; ".join(filter(None, parts))


# ------------------------------------------------------------------------------------------------------------
# Replay in one CPU process
# ------------------------------------------------------------------------------------------------------------


def _read_incident(directory: Path) -> tuple[dict, Any, dict[str, Tensor], dict[str, Tensor], Path]:
    """(report, config, batch, random state, folder of the step's initial weights)."""
    try:
        report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        batch = load_file(directory / "batch.safetensors")
        random = load_file(directory / "random.safetensors")
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ConfigError(str(directory), None, f"is no incident that can be run again ({error})") from None
    config = SimpleNamespace(**read_options(directory / "config.yaml", str(directory)))
    folder = directory / "model"
    if not folder.exists():
        kept = sorted(directory.parent.glob("step-*/model"))
        hint = f"; {kept[0].parent.name} has some" if kept else ""
        raise ConfigError(
            str(directory), None, f"has no weights: only a run's first incident keeps them{hint}"
        )
    checkpoint = folder
    if config.adapter:
        checkpoint = resolve_checkpoint(config.base_model, config.base_model_revision,
                                        Path(config.config_directory))
        config.lora_model_dir = str(folder)
    config.fsdp_cpu_offload = False
    return report, config, batch, random, checkpoint


def replay(directory: Path) -> bool:
    """Rerun an incident's micro-batch and print the finding; returns whether it is the same. Raises
    ConfigError if the directory holds no incident, or one that was changed so that it cannot be run."""
    try:
        return _replay(*_read_incident(directory))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        why = f"is no incident that can be run again ({type(error).__name__}: {error})"
        raise ConfigError(str(directory), None, why) from error


def _replay(
    report: dict, config: Any, batch: dict[str, Tensor], random: dict[str, Tensor], checkpoint: Path
) -> bool:
    world = World(0, 1, 0, torch.device("cpu"))
    model = build_model(read_architecture(checkpoint, config.ignore_config_fields), checkpoint, config,
                             world)
    ids, shared = batch["input_ids"], None
    if "groups" in batch:
        groups: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        for number, length, P, L in batch["groups"].tolist():
            groups.setdefault(number, (length, []))[1].extend([(P, L)] if L else [])
        tokens = [(length, sum(L for _, L in rows)) for length, rows in groups.values()]
        if min(map(min, tokens)) < 0 or sum(map(sum, tokens)) != ids.numel():
            raise ValueError(f"its groups are not those of {ids.numel()} tokens")
        shared = SharedPrompts(list(groups.values()), world.device)
    print(f"step {report['step']}, rank {report['rank']} of {report['world']}: {report['says']}")
    set_random_state(random)
    gradient = batch.get("gradient")
    with Probe(model) as probe:
        hidden, _ = model.hidden_states(
            ids, position_ids=batch.get("position_ids"),
            document_ids=batch.get("document_ids"), shared_prompts=shared,
        )
        fault = probe.forward_fault
        if fault is None and gradient is not None:
            print(f"forward: finite, from {span(hidden)}; gradient that came back to it: {span(gradient)}")
            if not_finite(gradient).any():
                fault = Fault("loss", "the loss", "gradient of the hidden states", described(gradient))
            else:
                hidden.backward(gradient.to(hidden.dtype))
                fault = probe.backward_fault or bad_parameter(model)
    if fault is None:
        print("here, in one CPU process, the same batch and weights are finite")
        return False
    fault.rank, fault.rows = report["rank"], report["rows"]
    print(f"again: {fault.line()}")
    return (fault.direction, fault.module) == (report["direction"], report["module"])
