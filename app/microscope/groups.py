"""A group as ``group_view`` draws it: its levels before and after training, stored parameters, bits and bytes."""

from __future__ import annotations

from lbllm.microscope.group import GroupView, StoredBit, StoredParam
from lbllm.microscope.layer import LayerView
from lbllm.microscope.microscope import Microscope


def group_data(scope: Microscope, layer: LayerView, group: GroupView, column: int) -> dict[str, object]:
    """The data of ``group_view``, the weight in ``column`` of the matrix marked."""
    legend = [("after", "above: the stored levels, and which weights use them")]
    legend.append(("before", f"below: {scope.before_words}"))
    if group.latent is not None:
        legend.append(("latent", f"latent weights, {scope.latent_words}"))
    planes = [("Signs", group.signs), ("Bitmap", group.bitmap), ("Second bitmap", group.second)]
    return {
        "place": str(group.address),
        "label": f"Weights {group.columns.start} to {group.columns.stop - 1} of a row, with their levels",
        "keys": "The weights of this group; the left and right arrow keys mark one",
        "file": group.signs[0].file if group.signs else "",
        "legend": legend,
        "weights": group.weights.tolist(),
        "index": group.index.tolist(),
        "levels": group.levels.tolist(),
        "before": {"levels": group.before_levels.tolist(), "index": group.before_index.tolist()},
        "latent": None if group.latent is None else group.latent.tolist(),
        "lines": [_line(scope, group, number) for number in range(len(group.weights))],
        "bits_title": "The bits in the file",
        "planes": [{"name": name, "bytes": _bytes(bits)} for name, bits in planes if bits],
        "params_title": f"The parameters as stored, in {layer.fmt.param_bits} bits each",
        "params_head": ["", "code", "value", "in the file", "at byte"],
        "params": [_param(param) for param in group.params],
        "at": column - group.columns.start,
    }


def _line(scope: Microscope, group: GroupView, number: int) -> list[str]:
    """All of one weight, in parts."""
    before = group.before_levels[group.before_index[number].long()]
    parts = [
        f"column {group.columns.start + number}",
        f"teacher {_number(group.weights[number].item())}",
        f"before training {_number(before.item())}",
    ]
    if group.latent is not None:
        parts.append(f"latent {_number(group.latent[number].item())}")
    parts.append(f"stored: level {int(group.index[number]) + 1} = {_number(group.rebuilt[number].item())}")
    for name, bits in (("sign", group.signs), ("bitmap", group.bitmap), ("second bitmap", group.second)):
        if bits:
            one = bits[number]
            parts.append(f"{name} {int(one.value)}: bit {one.bit} of byte {one.offset:,}")
    return parts


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _bytes(bits: tuple[StoredBit, ...]) -> list[dict[str, object]]:
    """The bytes of a plane; each with its eight bits, the highest first, and which weight of the group each is."""
    owners = {(one.offset, one.bit): number for number, one in enumerate(bits)}
    bytes_ = {one.offset: one.byte for one in bits}
    return [
        {
            "offset": offset,
            "hex": f"0x{byte:02X}",
            "bits": [(str(byte >> bit & 1), owners.get((offset, bit))) for bit in range(7, -1, -1)],
        }
        for offset, byte in bytes_.items()
    ]


def _param(param: StoredParam) -> list[str]:
    digits = -(-param.bits // 4)
    half = ("upper half of " if param.bit else "lower half of ") if param.bits == 4 else ""
    place = f"{half}0x{param.data.hex(' ').upper()}"
    return [param.name, f"0x{param.code:0{digits}X}", _number(param.value), place, f"{param.offset:,}"]
