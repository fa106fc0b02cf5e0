"""Loaded inside vLLM's workers (--worker-extension-cls vllm_worker.WeightReceiver): takes new weights from
safetensors files. It runs in the server's environment, which may lack the trainer's packages: only torch,
safetensors and vLLM are imported.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

if not torch.cuda.is_available():
    # vLLM's CPU build prepacks linear weights for oneDNN when a model is loaded and empties the plain ones:
    # what is loaded later never reaches the packed copies. Imported before the model loads, this keeps them
    # plain.
    import vllm._custom_ops  # pyright: ignore[reportMissingImports]

    vllm._custom_ops._supports_onednn = False


class WeightReceiver:
    """Methods of vLLM's worker, called through /collective_rpc. Arguments are strings."""

    def ballast_load_weights(self, directory: str) -> int:
        """Load every tensor of directory/*.safetensors under its Hugging Face name; returns how many."""
        count = 0

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal count
            for path in sorted(Path(directory).glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        count += 1
                        yield name, file.get_tensor(name)

        self.model_runner.get_model().load_weights(tensors())  # type: ignore[attr-defined]
        return count
