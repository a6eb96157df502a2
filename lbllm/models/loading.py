"""Build, load and save models: one thread at a time, without transformers' output, and with every report checked.

What a file says must be what the model has: a tensor that is missing, left over or of another shape is an error, the
files that an index names lie beside it, and no code and no path in a file is followed.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

INDEX = "model.safetensors.index.json"
_WEIGHTS_FILE = re.compile(r"[^/\\:]+\.safetensors")

# While transformers builds a model it replaces functions of its own classes, for example tie_weights, and restores them
# afterwards. Two threads at the same time would restore each other's replacements, and then no model in the process
# would have tied weights.
_ONE_AT_A_TIME = threading.RLock()


class FileFault(ValueError):
    """What is wrong with a model's files; the caller says whose files they are and what to do."""


@contextmanager
def quiet() -> Iterator[None]:
    """Make other threads wait, and turn off transformers' progress bars and warnings.

    The caller of the engine shows progress, and the engine reports the important problems as errors.
    """
    with _ONE_AT_A_TIME:
        shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if shown:
                logging.enable_progress_bar()


def load_model(
    place: str | Path,
    *,
    offline: bool = True,
    guard: str | None = None,
    placeholders: dict[str, Tensor] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a causal language model from the safetensors files of a folder or of a hub repository.

    ``guard``: what config.json may say instead of the name of a weights file. ``placeholders``: tensors to load instead
    of those of the files; ``options`` must then have the config. ``options``: further arguments of from_pretrained.
    Raises FileFault if a file names another place, or if the weights are not exactly those of the model, and the errors
    of transformers, safetensors and torch.
    """
    place = str(place)
    check_files(place, offline, guard)
    generation = generation_config(place, offline)
    with quiet():
        known = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # the report is checked below
        if placeholders is None:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=offline,
                generation_config=generation,
                **known,
                **options,
            )
        else:
            if generation is None and find_file(place, "generation_config.json", offline) is not None:
                generation = GenerationConfig.from_pretrained(place, local_files_only=offline)
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(options["config"])]
            loaded = kind.from_pretrained(
                None, state_dict=placeholders, generation_config=generation, **known, **options
            )
            loaded[0].name_or_path = loaded[0].config._name_or_path = place
    model: PreTrainedModel
    model, report = loaded
    check_report(report)
    settle_tied_weights(model)
    return model


def check_report(report: dict[str, Any]) -> None:
    """Raise FileFault unless a loading report of transformers says that all weights were found, and only these."""
    if report["missing_keys"]:
        hint = ""
        if report["missing_keys"] == {"lm_head.weight"}:
            hint = " (if the output head is the embeddings, config.json must say tie_word_embeddings: true)"
        raise FileFault(
            f"{len(report['missing_keys'])} weights are missing from its files, e.g. "
            f"{_first(report['missing_keys'])}{hint}"
        )
    if report["mismatched_keys"]:
        (key, stored, wanted), *_ = sorted(report["mismatched_keys"])
        raise FileFault(f"{key} has shape {tuple(stored)}, but config.json requires {tuple(wanted)}")
    if report["unexpected_keys"]:
        raise FileFault(
            f"its files have {len(report['unexpected_keys'])} weights that the model of its config.json does not "
            f"have, e.g. {_first(report['unexpected_keys'])}"
        )
    if report.get("error_msgs"):
        raise FileFault(str(report["error_msgs"][0]))


def _first(names: set[str]) -> str:
    return ", ".join(sorted(map(str, names))[:3])


def check_files(place: str, offline: bool = True, guard: str | None = None) -> None:
    """Raise FileFault unless all files that transformers would read for the model at ``place``, a folder or a hub id,
    lie in its own folder and are safetensors files. ``guard`` as in ``load_model``."""
    document = read_object(place, "config.json", offline)
    stated = document.get("transformers_weights")
    if stated == guard:
        stated = None
    if stated is not None and not (
        isinstance(stated, str) and _WEIGHTS_FILE.fullmatch(stated.removesuffix(".index.json"))
    ):
        raise FileFault(f"config.json names the weights file {stated!r}; only .safetensors files beside it are read")
    for value in _implementations(document):
        if re.search(r"[/:@]", value):
            raise FileFault(f"config.json names the attention code {value!r} of another place, which never runs here")
    if find_file(place, "adapter_config.json", offline) is not None:
        raise FileFault(
            "it holds an adapter (adapter_config.json); merge it into its model first (merge_and_unload and "
            "save_pretrained), or remove the file if that was done"
        )
    if isinstance(stated, str) and not stated.endswith(".index.json"):
        return
    index = stated if isinstance(stated, str) else INDEX
    if stated is None and Path(place).is_dir() and (Path(place) / "model.safetensors").is_file():
        return
    if find_file(place, index, offline) is not None:
        indexed_files(place, index, offline)


def indexed_files(place: str, name: str = INDEX, offline: bool = True) -> list[str]:
    """The names of the files that an index names, sorted. Raises FileFault if it is damaged, or names a file of
    another place or one that is missing."""
    weight_map = read_object(place, name, offline).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFault(f"{name} has no weight_map")
    files = sorted({str(value) for value in weight_map.values()})
    for file in files:
        if not _WEIGHTS_FILE.fullmatch(file):
            raise FileFault(f"{name} names the file {file!r}; only .safetensors files beside it are read")
        if Path(place).is_dir() and not (Path(place) / file).is_file():
            raise FileFault(f"{name} names the file {file}, which is missing")
    return files


def _implementations(value: object) -> Iterator[str]:
    """The names of attention or other code in a config.json, also in its sections."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if str(key).endswith("_implementation"):
                yield from map(str, inner.values() if isinstance(inner, dict) else [inner])
            else:
                yield from _implementations(inner)


def read_config(place: str, offline: bool) -> dict[str, Any]:
    """The content of a model's config.json. Raises FileFault if it is not a JSON object."""
    return read_object(place, "config.json", offline)


def read_object(place: str, name: str, offline: bool) -> dict[str, Any]:
    """The JSON object in a file of a folder or of a hub repository. Raises FileFault."""
    file = find_file(place, name, offline)
    if file is None:
        raise FileFault(f"it has no {name}")
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileFault(f"{name} is not JSON ({str(error) or type(error).__name__})") from None
    if not isinstance(document, dict):
        raise FileFault(f"{name} is not a JSON object")
    return document


def find_file(place: str, name: str, offline: bool) -> Path | None:
    """A file of a folder or of a hub repository, downloaded if need be; None if there is none."""
    if Path(place).is_dir():
        file = Path(place) / name
        return file if file.is_file() else None
    found = cached_file(
        place,
        name,
        local_files_only=offline,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def generation_config(place: str, offline: bool = True) -> GenerationConfig | None:
    """The generation settings of a model's files, without those that transformers refuses; None: it refuses none.

    So a model can be loaded and saved again, also where generation_config.json is damaged.
    """
    damaged = False
    for name in ("generation_config.json", "config.json"):
        if find_file(place, name, offline) is None:
            continue
        try:
            stated = read_object(place, name, offline)
        except FileFault:
            damaged = True
            continue
        if name == "config.json":
            known = GenerationConfig().to_dict()
            stated = {key: value for key, value in stated.items() if key in known and value is not None}
        if _is_valid(stated):
            return GenerationConfig(**stated) if damaged else None
        kept: dict[str, Any] = {}
        for key in sorted(stated, key=lambda key: key != "do_sample"):  # some are valid only with sampling
            if _is_valid(kept | {key: stated[key]}):
                kept[key] = stated[key]
        return GenerationConfig(**kept)
    return GenerationConfig() if damaged else None


def _is_valid(settings: dict[str, Any]) -> bool:
    try:
        made = GenerationConfig(**settings)
        made.validate()
        made.to_json_string()
    except Exception:  # whatever a foreign value does to it
        return False
    return True


@torch.no_grad()
def settle_tied_weights(model: PreTrainedModel) -> None:
    """Make a model's config say which weights the loaded model shares, so that all that is made of it has the same.

    Its files can have an output head of their own although config.json says that the embeddings are the head, for
    example after an adapter was merged. transformers then loads both and leaves the config as it is; whoever ties the
    weights again by that config, or counts on it, loses the head. What decides is whether both are one parameter.
    """
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = {id(config): config for part in parts for config in (part.config, part.config.get_text_config())}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    shared = head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", False)
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    if not pairs and shared:
        for config in configs.values():
            config.tie_word_embeddings = True
        pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    if not pairs and not shared:
        return
    if pairs and all(_weight(model, target) is _weight(model, source) for target, source in pairs.items()):
        model.all_tied_weights_keys = pairs
        return
    for config in configs.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    # transformers writes all of them as shared, or all on their own.
    copies = [target for target, source in pairs.items() if _weight(model, target) is _weight(model, source)]
    for module, name in [_place(model, target) for target in copies] or ([(head, "weight")] if shared else []):
        weight = getattr(module, name)
        setattr(module, name, nn.Parameter(weight.clone(), requires_grad=weight.requires_grad))


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a parameter belongs to, and its name there."""
    owner, _, last = name.rpartition(".")
    return model.get_submodule(owner), last


def _weight(model: nn.Module, name: str) -> object:
    return getattr(*_place(model, name))
