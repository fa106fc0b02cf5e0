"""Loaded inside vLLM's workers (--worker-extension-cls vllm_worker.WeightReceiver): takes new weights from
safetensors files. It runs in the server's environment, which may lack the trainer's packages: only torch,
safetensors and vLLM are imported.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

if not torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None:
    # vLLM's CPU build prepacks linear weights for oneDNN when a model is loaded and empties the plain ones:
    # what is loaded later never reaches the packed copies. Imported before the model loads, this keeps them
    # plain.
    import vllm._custom_ops  # pyright: ignore[reportMissingImports]

    vllm._custom_ops._supports_onednn = False


def read_tensors(directory: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of directory/*.safetensors."""
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def checksum(tensor: torch.Tensor) -> list[int]:
    """[sum of the elements' bits, shape …]: a single changed bit changes it."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return [int(tensor.contiguous().view(bits).sum(dtype=torch.int64)), *tensor.shape]


def group_of(name: str) -> str:
    """The layer of a parameter, by Hugging Face's or vLLM's names."""
    index = next((piece for piece in name.split(".") if piece.isdigit()), None)
    return "the rest" if index is None else f"layer {index}"


class WeightReceiver:
    """Methods of vLLM's worker, called through /collective_rpc. Arguments are strings."""

    def ballast_load_weights(self, directory: str) -> dict:
        """Load every tensor of directory/*.safetensors. `received`: the checksum of each by name; `missing`:
        parameters of the model that got no tensor; `held`: by layer, the sum of the bits of the loaded
        parameters."""
        received: dict[str, list[int]] = {}

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in read_tensors(directory):
                received[name] = checksum(tensor)
                yield name, tensor

        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        if torch.cuda.is_available():
            # Like vLLM's own engines: layouts derived after the first load are rebuilt.
            from vllm.config import set_current_vllm_config  # pyright: ignore[reportMissingImports]
            from vllm.model_executor.model_loader import reload  # pyright: ignore[reportMissingImports]

            with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
                reload.initialize_layerwise_reload(model)
                loaded = model.load_weights(tensors())
                reload.finalize_layerwise_reload(model, self.model_runner.model_config)  # type: ignore[attr-defined]
        else:
            loaded = model.load_weights(tensors())
        held: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            held[group_of(name)] = held.get(group_of(name), 0) + checksum(parameter.detach())[0]
        names = {name for name, _ in model.named_parameters()}
        return {"received": received, "missing": sorted(names - loaded) if loaded else [], "held": held}
