"""Where the experts of a model lie in its safetensors files, and how one of them is read.

Files hold an expert's matrices one by one, or those of all experts as one tensor with three dimensions. transformers
joins the former when it loads a model; its own converters say how, and here they are applied to the tensors of a single
expert, so that no more than one is in memory.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lbllm.models.experts import form_of
from lbllm.models.loading import FileFault, quiet
from lbllm.models.weights import StoredWeights


@dataclass
class FusedParameter:
    """A fused parameter of experts, of ``shape``, and the names of the stored tensors that it is made of.

    ``names``: one name, of a tensor with all experts; or for each pattern of ``converter`` one for each expert.
    """

    name: str
    shape: tuple[int, ...]
    names: dict[str, list[str]]
    converter: WeightConverter | None
    config: Any

    def read(self, weights: StoredWeights, expert: int) -> Tensor:
        """Return the entry of one expert, in the dtype of the files. Raises FileFault, OSError."""
        if self.converter is None:
            ((name,),) = self.names.values()
            return weights.read(name, slice(expert, expert + 1))[0]
        return self._converted({pattern: weights.read(names[expert]) for pattern, names in self.names.items()})

    def stored(self, expert: int) -> str:
        """Return the name of a stored tensor with values of one expert."""
        names = next(iter(self.names.values()))
        return names[0] if self.converter is None else names[expert]

    def _converted(self, tensors: dict[str, Tensor]) -> Tensor:
        converter = copy.deepcopy(self.converter)
        assert converter is not None
        for pattern, tensor in tensors.items():
            converter.add_tensor(self.name, pattern, pattern, tensor)  # type: ignore[arg-type]
        (result,) = converter.convert(self.name, config=self.config).values()
        value: Tensor = result[0] if isinstance(result, list) else result
        return value[0]

    def check(self, weights: StoredWeights) -> None:
        """Raise FileFault unless every expert is in the files, in the shape that config.json requires."""
        for names in self.names.values():
            found = [weights.tensors[name].shape for name in names]
            if self.converter is None and found != [self.shape]:
                raise FileFault(f"{names[0]} has shape {found[0]}, but config.json requires {self.shape}")
            if self.converter is not None and (len(found) != self.shape[0] or len(set(found)) > 1):
                raise FileFault(
                    f"its files have {len(found)} tensors like {names[0]}, of {len(set(found))} shapes, but "
                    f"config.json requires {self.shape[0]} experts of one shape"
                )
        if self.converter is not None:
            if set(self.names) != set(self.converter.source_patterns):
                missing = min(set(self.converter.source_patterns) - set(self.names))
                raise FileFault(f"weights are missing from its files: those like {missing}, for {self.name}")
            empty = {key: torch.empty(weights.tensors[one[0]].shape, device="meta") for key, one in self.names.items()}
            shape = tuple(self._converted(empty).shape)
            if shape != self.shape[1:]:
                raise FileFault(
                    f"an expert of {self.name} has shape {shape}, but config.json requires {self.shape[1:]}"
                )


def fused_parameters(config: PretrainedConfig, weights: StoredWeights) -> dict[str, FusedParameter]:
    """Return the fused parameters of all experts of a model by name; empty where it has no experts of a known form, or
    where transformers makes them of stored tensors in another way than expert by expert.

    Raises FileFault where a parameter is incomplete, or has another shape than config.json requires.
    """
    if not any("expert" in name or len(tensor.shape) == 3 for name, tensor in weights.tensors.items()):
        return {}
    with quiet(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    fused = dict(_fused(model))
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known: dict[str, Any] = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, FusedParameter] = {}
    for key in sorted(weights.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name in fused:
            converter = None if pattern is None else by_pattern[pattern]
            if converter is not None and len(converter.target_patterns) > 1:
                return {}
            one = found.setdefault(name, FusedParameter(name, tuple(fused[name].shape), {}, converter, model.config))
            one.names.setdefault(pattern or name, []).append(key)
    if missing := fused.keys() - found.keys():
        raise FileFault(f"{len(missing)} weights are missing from its files, e.g. {min(missing)}")
    for parameter in found.values():
        parameter.check(weights)
    return found


def _fused(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"{path}.{name}", parameter)
        for path, module in model.named_modules()
        if form_of(module) is not None
        for name, parameter in module.named_parameters(recurse=False)
    ]
