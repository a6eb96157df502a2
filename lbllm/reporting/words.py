"""A run's settings in sentences, for people who do not know their names."""

from __future__ import annotations

from collections.abc import Mapping

from lbllm.checkpoints.record import checkpoint_name
from lbllm.config import RunConfig
from lbllm.labels import STAGE_NAMES, format_name
from lbllm.models.catalogue import last_part, model_title
from lbllm.sections import WHOLE_ROW, Format, LayerOverride, QuantConfig, Stage
from lbllm.texts.catalogue import TEXTS, parts

_WEIGHTS: dict[Format, str] = {
    "w1+1": "Two bits each: the sign, and a bit that chooses one of its group's two pairs of levels. So a group has "
    "four levels.",
    "w1": "One bit each, the sign. So a group has two levels.",
    "w1+1+1": "Three bits each, which choose one of eight levels: a table for the whole layer, times a scale of its "
    "group. This is not LBLLM's own format.",
}
_STAGES: dict[Stage, str] = {
    "ptq": "levels and bits are computed from the weights and from calibration text, without training",
    "wat": "block by block, levels and weights learn to give the teacher's output, with activations in full precision",
    "aar": "block by block, levels and the steps of activations learn, with activations and KV cache as they are used",
    "e2e": "the whole model learns the teacher's distribution of next tokens",
}


def in_words(config: RunConfig) -> dict[str, str]:
    """What was made from what, and how: sentences by their headings."""
    quant = config.precision(config.stages[-1])
    said = {
        "Model": f"{model_title(config.model)}, binarized to {format_name(config, config.stages[-1])}.",
        "Weights": _WEIGHTS[quant.format],
        "Groups": f"{_groups(quant.group_size)} The numbers that give them have {quant.param_bits} bits each.",
    }
    if quant.overrides:
        said["Some layers differ"] = (
            "; ".join(f"{name}: {_override(one)}" for name, one in quant.overrides.items()) + "."
        )
    if quant.skip:
        said["Left in 16 bits"] = f"The layers named {', '.join(quant.skip)}."
    said |= {"Activations": _activations(quant), "KV cache": _cache(quant), "Embeddings": _embeddings(quant)}
    if config.start is not None:
        said["Starting point"] = f"The checkpoint {checkpoint_name(config.start)}, which was binarized before."
    for stage in config.stages:
        said[STAGE_NAMES[stage]] = _stage(config, stage)
    said["Text"] = f"{_texts(config.corpus)}; sequences of {config.seq_len:,} tokens, seed {config.seed}."
    return said


def _groups(size: int) -> str:
    return (
        "All weights of a row share their levels."
        if size == WHOLE_ROW
        else f"{size} neighbouring weights of a row share their levels."
    )


def _override(one: LayerOverride) -> str:
    words = {"format": "format {}", "group_size": "groups of {}", "param_bits": "parameters of {} bits"}
    words |= {"act_bits": "activations of {} bits"}
    changed = {name: value for name, value in one.model_dump().items() if value is not None}
    said = ("one group a row" if value == WHOLE_ROW else words[name].format(value) for name, value in changed.items())
    return ", ".join(said) or "as all others"


def _activations(quant: QuantConfig) -> str:
    if quant.act_bits == 16:
        return "The inputs of the layers are not quantized; they have 16 bits."
    shared = (
        "all inputs of a token" if quant.act_group_size == WHOLE_ROW else f"{quant.act_group_size} inputs of a token"
    )
    return f"The inputs of the layers have {quant.act_bits} bits; {shared} share a range."


def _cache(quant: QuantConfig) -> str:
    if quant.kv_bits == 16:
        return "The keys and values of earlier tokens are not quantized; they have 16 bits."
    said = f"The keys and values of earlier tokens have {quant.kv_bits} bits"
    if quant.kv_group_size != WHOLE_ROW:
        said += f"; the keys of {quant.kv_group_size} tokens share a range in each channel"
    if quant.kv_first:
        said += f"; the first {quant.kv_first} {'token keeps' if quant.kv_first == 1 else 'tokens keep'} 16 bits"
    return f"{said}."


def _embeddings(quant: QuantConfig) -> str:
    return f"Token embeddings and output head have {quant.embedding_bits} bits; norms have 16."


def _stage(config: RunConfig, stage: Stage) -> str:
    section = getattr(config, stage)
    said = f"{_STAGES[stage]}. {section.tokens:,} tokens"
    epochs = getattr(section, "epochs", None)
    if epochs is not None:
        said += f", {epochs} {'pass' if epochs == 1 else 'passes'} over them"
    return said[:1].upper() + said[1:] + "."


def _texts(corpus: str) -> str:
    notes: Mapping[str, str] = {entry.id: entry.note for entry in TEXTS}
    return "; ".join(f"{name} ({notes[name]})" if name in notes else last_part(name) for name in parts(corpus))
