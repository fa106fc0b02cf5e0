"""Checkpoints: written atomically, with checksums, and resumable with another world size; and the final
model."""

import contextlib
import enum
import io
import json
import math
import pickle
import random
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as td
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from checkpoints.adapters import rows_are_served, save_adapter
from checkpoints.weights import save_pretrained
from dist import World, from_main, samples, seed_everything
from model import Transformer
from run.config import BallastError, ConfigError, check_at_least_one, check_interval
from run.files import publish, write_atomically
from run.log import log


@dataclass
class CheckpointOptions:
    output_dir: str = "outputs/run"
    """Everything the run writes goes here."""
    save_steps: int | float | None = None
    """Write a checkpoint every N steps, or, for values below 1, after that fraction of the run; unset: only
    when the run is interrupted."""
    saves_per_epoch: int | None = None
    """Write N checkpoints per epoch, instead of save_steps."""
    save_total_limit: int = 2
    """Keep the N newest checkpoints."""
    save_async: bool = True
    """Write checkpoints in the background while training continues."""
    resume: str | bool = "auto"
    """auto (or true): continue from the newest checkpoint in output_dir if there is one; never (or false); or
    a checkpoint's directory."""
    resume_with_new_data: bool = False
    """Allow resuming with other data than the checkpoint's; its position then refers to other rows."""

    def check(self) -> None:
        if isinstance(self.resume, bool):
            self.resume = "auto" if self.resume else "never"
        if not self.resume:
            raise ConfigError("resume", "", "names nothing; give auto, never or a checkpoint's directory")
        check_at_least_one(self, "save_total_limit")
        check_interval(self, "save_steps", "saves_per_epoch")


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file matches its checksum."""
    try:
        sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        for name, (size, checksum) in sums.items():
            file = path / Path(name).name  # files of this directory alone
            if not file.exists() or file.stat().st_size != size or _checksum(file) != checksum:
                return f"{file}: damaged (size or checksum differs)"
        if not {"trainer.json", ".metadata"} <= set(sums):
            return f"{path}: is not a whole checkpoint"
        json.loads((path / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{path}: is not a whole checkpoint ({error})"
    return None


def _reason(error: BaseException) -> str:
    """The first line of an error's message; DCP's own error (not an Exception) holds one per rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _member(of: Any, name: str) -> enum.Enum:
    if not (isinstance(of, type) and issubclass(of, enum.Enum)):
        raise BallastError(
            f"a checkpoint's index asks for {name} of {of}, which none of ours does: not loaded"
        )
    return of[name]


class _Unpickler(pickle.Unpickler):  # noqa: S301 - checked by find_class
    """DCP stores its tensor index as a pickle, which could call any function: only the classes that an index
    needs are allowed."""

    CLASSES = frozenset({
        ("pathlib", "PosixPath"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
        *(("torch.distributed.checkpoint.metadata", name) for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    })

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python before 3.11.4 pickles a member of an Enum
            return _member
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in self.CLASSES:
            return super().find_class(module, name)
        raise BallastError(f"a checkpoint's index names {module}.{name}, which none of ours does: not loaded")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises on anything but plain data; DCP would execute it
        value.seek(0)
        super().load_bytes(read_item, value)


# What an identity holds as a hash: a message that shows it would tell nobody anything.
HASHED = ("weights of base_model", "config.json of base_model", "tokenizer", "chat template")


def _steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending."""
    names = (p.name.removeprefix("step-") for p in folder.glob("step-*") if p.is_dir())
    return sorted(int(n) for n in names if n.isdigit())


def peek(options: CheckpointOptions) -> dict:
    """The JSON state of the checkpoint that `resume` asks for, unchecked; {} without one."""
    folder = Path(options.output_dir) / "checkpoints"
    if options.resume == "auto":
        path = folder / f"step-{max(_steps(folder), default=0)}"
    else:
        path = Path(str(options.resume))
    with contextlib.suppress(OSError, ValueError, RecursionError):
        state = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        return state if isinstance(state, dict) else {}
    return {}


class Checkpointer:
    """Sharded checkpoints (DCP) in `directory`/step-N that are published atomically.

    A checkpoint holds the trained parameters, the optimisers, each rank's random state and a JSON state of
    the loop. It is written to .step-N, with a checksum per file, and renamed when the last rank is done; then
    `latest` is updated.
    """

    def __init__(self, directory: Path, world: World, options: CheckpointOptions):
        self.directory, self.world, self.options = directory, world, options
        self._pending: Future | None = None
        # Its own group: collectives of a background save must not mix with the loop's
        self._group: Any = td.new_group(backend="gloo", timeout=world.timeout)
        if world.main:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob(".step-*"):  # of a run that was killed while saving
                replaced = directory / leftover.name.removeprefix(".").removesuffix(".old")
                if leftover.suffix == ".old" and not replaced.exists():
                    leftover.rename(replaced)  # killed between the two renames of publish
                else:
                    shutil.rmtree(leftover, ignore_errors=True)
        if world.size > 1:
            td.barrier()

    def steps(self) -> list[int]:
        return _steps(self.directory)

    def newest(self) -> Path | None:
        """The newest checkpoint whose checksums match. Damaged ones are renamed (never deleted) and reported.
        Raises BallastError if there are checkpoints but none is intact."""

        def look() -> str | None:
            tried = []
            for step in reversed(self.steps()):
                path = self.directory / f"step-{step}"
                if (wrong := damage(path)) is None:
                    return str(path)
                aside = self.directory / f"damaged-step-{step}"
                shutil.rmtree(aside, ignore_errors=True)  # an earlier one of the same step
                path.rename(aside)
                log.warning("checkpoint step-%d is damaged and now %s: %s", step, aside.name, wrong)
                tried.append(step)
            if tried:
                raise BallastError(
                    f"{self.directory}: none of its {len(tried)} checkpoints is whole; "
                    "train from the start in another output_dir"
                )
            return None

        newest = from_main(look, self.world)
        return Path(newest) if newest else None

    @staticmethod
    def _state_dict(
        model: Transformer, optimizers: list[torch.optim.Optimizer], others: Mapping[str, nn.Module]
    ) -> dict[str, Any]:
        # LoRA's frozen base weights are not saved.
        options = StateDictOptions(ignore_frozen_params=True)
        return {
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizers, options=options),
            **{name: get_model_state_dict(other) for name, other in others.items()},
        }

    def save(
        self, step: int, model: Transformer, optimizers: list[torch.optim.Optimizer], state: dict,
        others: Mapping[str, nn.Module] | None = None, files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write step-N; in the background if `save_async`. A collective. `state` must be JSON; `others` are
        frozen models whose weights change during the run (a synchronised reference), `files` further files of
        rank 0 by name; both are saved too."""
        self.finish()
        final, aside = self.directory / f"step-{step}", self.directory / f".step-{step}"
        with self._named():
            if self.world.main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                trainer_state = {**state, "step": step, "world": self.world.size}
                text = json.dumps(trainer_state, indent=2)
                (aside / "trainer.json").write_text(text + "\n", encoding="utf-8")
                for name, content in (files or {}).items():
                    (aside / name).write_bytes(content)
            td.barrier(self._group)
            own = {**_random_state(), "sums": _sums(model, optimizers)}
            torch.save(own, aside / f"random-{self.world.rank}.pt")
        state_dict = self._state_dict(model, optimizers, others or {})

        def publish_it() -> None:
            if not self.world.main:
                return
            sums = {p.name: [p.stat().st_size, _checksum(p)] for p in sorted(aside.iterdir())}
            (aside / "checksums.json").write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
            publish(aside, final)
            write_atomically(self.directory / "latest", final.name + "\n")
            for old in self.steps()[: -max(1, self.options.save_total_limit)]:
                shutil.rmtree(self.directory / f"step-{old}", ignore_errors=True)

        if not self.options.save_async:
            with self._named():
                dcp.save(state_dict, checkpoint_id=aside, process_group=self._group)
                publish_it()
            td.barrier(self._group)
            return
        # Rank 0's future resolves only after DCP has heard from every rank, so rank 0 alone decides when the
        # checkpoint is complete.
        written = dcp.async_save(state_dict, checkpoint_id=aside, process_group=self._group)
        assert isinstance(written, Future)
        done: Future = Future()

        def wait() -> None:
            try:
                written.result()
                publish_it()
                done.set_result(None)
            except BaseException as error:  # raised in the loop by finish()
                done.set_exception(error)

        threading.Thread(target=wait, daemon=True).start()
        self._pending = done

    def finish(self) -> None:
        """Wait for a save in the background; its error is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._named():
                pending.result()
            td.barrier(self._group)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turn write errors into a BallastError that names the directory."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            raise BallastError(
                f"no checkpoint could be written to {self.directory} ({_reason(error)}); earlier ones are "
                "intact: free disk space, then the same command resumes from there"
            ) from error

    def to_resume(self, identity: dict) -> tuple[Path | None, dict]:
        """The checkpoint that `resume` asks for, if there is one, and its JSON state.

        `identity` holds what must match to resume: option → value, and "data" → fingerprint. Raises
        ConfigError on a mismatch, which would silently continue a different run.
        """
        resume = str(self.options.resume)
        path = {"auto": self.newest, "never": lambda: None}.get(resume, lambda: Path(resume))()
        if resume == "never" and self.steps():
            raise ConfigError(
                "output_dir",
                self.options.output_dir,
                "holds checkpoints already; choose another, or resume: auto",
            )
        if path is None:
            return None, {}
        if not (path / "trainer.json").exists():
            raise ConfigError(
                "resume", resume, "is not a checkpoint; give auto, never or …/checkpoints/step-N"
            )
        if resume != "auto" and (wrong := from_main(lambda: damage(path), self.world)):
            raise BallastError(f"{wrong}; resume from another checkpoint")
        state = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        saved = state["identity"]
        for key, value in identity.items():
            if key not in saved or saved[key] == value:  # a checkpoint of an earlier version says less
                continue
            if key == "data" and self.options.resume_with_new_data:
                continue
            if key == "data":
                remedy = (
                    "was made with other data: its position means other rows; set resume_with_new_data: true"
                )
                raise ConfigError("datasets", None, f"{path} {remedy} to go on, or choose another output_dir")
            if key in HASHED:
                remedy = f"is not what {path} was made with: bring it back, or choose another output_dir"
                raise ConfigError(key, None, remedy)
            remedy = f"but {path} was made with {saved.get(key)!r}: set it back, or choose another output_dir"
            raise ConfigError(key, value, remedy)
        return path, state

    def load(
        self, path: Path, model: Transformer, optimizers: list[torch.optim.Optimizer], seed: int,
        others: Mapping[str, nn.Module] | None = None,
    ) -> dict[str, float]:
        """Restore parameters, optimisers and random state. If the world size differs from the checkpoint's,
        results match to rounding only, and the random state is reseeded from `seed`. Returns whether weights
        and optimiser are now what was saved, for the rules of health/."""
        log.info("resuming from %s", path)
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        state_dict = self._state_dict(model, optimizers, others or {})
        try:
            dcp.load(state_dict, storage_reader=_Reader(path), planner=_Planner(), process_group=self._group)
        except CheckpointException as error:
            raise BallastError(f"{path}: cannot be loaded ({_reason(error)})") from error
        set_model_state_dict(model, state_dict["model"], options=options)
        set_optimizer_state_dict(model, optimizers, state_dict["optimizer"], options=options)
        for name, other in (others or {}).items():
            set_model_state_dict(other, state_dict[name])
        processes = json.loads((path / "trainer.json").read_text(encoding="utf-8"))["world"]
        if processes == self.world.size:
            own = torch.load(path / f"random-{self.world.rank}.pt", weights_only=True)
            _set_random_state(own)
            if "sums" in own:  # not in a checkpoint of an earlier version
                now = _sums(model, optimizers)
                weights, optimizer = (
                    float(not math.isclose(a, b, rel_tol=1e-5)) for a, b in zip(now, own["sums"], strict=True)
                )
                return {"data/weights_not_restored": weights, "data/optimizer_not_restored": optimizer}
        else:
            seed_everything(seed, self.world.rank)
            log.info("made by %d processes: results match to rounding only", processes)
        return {}


def _sums(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[float]:
    """[Σ|w| of the trained weights, Σ|s| of the optimisers' state] over a sample of each tensor, here."""

    def total(tensors: Iterable[Tensor]) -> float:
        return sum(float(x.double().abs().sum()) for x in samples(tensors, 64))

    states = (value for optimizer in optimizers for state in optimizer.state.values()
              for value in state.values() if isinstance(value, Tensor))
    return [total(p for p in model.parameters() if p.requires_grad), total(states)]


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, pos, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(), "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), pos, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), pos, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def appearing(final: Path, world: World):
    """A temporary directory for all ranks to write to; renamed to `final` if the block ends without error."""
    aside = final.with_name(f".{final.name}.tmp")
    if world.main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    if world.size > 1:
        td.barrier()
    yield aside
    if world.size > 1:
        td.barrier()
    if world.main:
        publish(aside, final)
    if world.size > 1:
        td.barrier()


def save_final(model: Transformer, tokenizer: Any, config: Any, world: World) -> Path:
    """Write output_dir/final atomically: the model as a Hugging Face folder, or the adapter as a PEFT
    folder."""
    final = Path(config.output_dir) / "final"
    with appearing(final, world) as aside:
        if config.adapter and not config.merge_adapter:
            save_adapter(model, aside, main=world.main)
            if model.token_rows is not None and rows_are_served(model):
                save_adapter(model, aside / "vllm", main=world.main, for_vllm=True)
                log.info("vLLM does not accept token rows in PEFT's format: use final/vllm there")
            elif model.token_rows is not None:
                log.info(
                    "new tokens lie beyond the base model's vocabulary: PEFT opens this adapter through "
                    "AutoPeftModelForCausalLM, which grows the base; for vLLM set merge_adapter: true"
                )
        else:
            dtype = torch.bfloat16 if config.bf16 else torch.float32
            save_pretrained(model, aside, dtype=dtype, merge=config.adapter is not None, main=world.main)
        if world.main:
            tokenizer.save(aside)
    return final
