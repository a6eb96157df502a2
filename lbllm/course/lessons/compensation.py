"""Lesson 5: columns are rounded one after the other, and the later ones make up for the error of the earlier."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from lbllm.course import pictures
from lbllm.course.data import layer_words
from lbllm.course.formulas import OUTPUTS_ERROR, RELATIVE_ERROR
from lbllm.course.lesson import (
    Dial,
    Figure,
    Lesson,
    LessonMaker,
    Positions,
    Progress,
    Scene,
    computed,
    number_question,
)
from lbllm.course.stream import stream_inputs
from lbllm.microscope.layer import relative_error
from lbllm.quant.levels import LEVELS, fit_levels, spans
from lbllm.sections import PtqConfig
from lbllm.stages.hessians import factorize, input_statistics
from lbllm.stages.ptq import assign_columns, one_thread

TOKENS, MEASURED = 2048, 4  # tokens of text; every fourth sequence is kept to measure on
MODES = ("no", "yes")
_WINDOW = 24  # columns in the picture of a row
_BEHIND = 8  # of them, rounded ones that stay in sight


def stops(columns: int) -> list[int]:
    """How many columns are rounded at the positions of the dial: 0, 1, 2, 3, 4, 6, 8, 12, ... and all of them."""
    places, power = [0, 1], 2
    while power < columns:
        places += [power, power * 3 // 2]
        power *= 2
    return [*(place for place in dict.fromkeys(places) if place < columns), columns]


@torch.no_grad()
def rounded_in_turn(weight: Tensor, factor: Tensor, group_size: int, count: int, steps: int) -> Iterator[Tensor]:
    """Round the columns of a weight (out, in) one after the other, and yield the weight (out, in) as it is before the
    first and after each of them: rounded columns, and those that are still free.

    The levels of a group are fitted, each weight as important as the others, when its first column's turn comes.
    ``factor`` (in, in) is U of ``factorize``, whose rows carry the error of a column to the later ones; with the
    identity nothing is carried.
    """
    latent, value = weight.t().clone(memory_format=torch.contiguous_format), torch.zeros_like(weight.t())
    yield latent.t().clone()
    for span in spans(weight.shape[1], group_size):
        levels = fit_levels(latent[span].t().contiguous(), torch.ones(1), count, steps)
        for column in range(span.start, span.stop):
            assign_columns(latent, value, slice(column, column + 1), factor, levels)
            yield torch.cat((value[: column + 1], latent[column + 1 :])).t()


class Compensation(LessonMaker):
    """Quantize real rows column by column, with and without passing the error on."""

    key = "compensation"
    title = "Errors that are passed on"

    def prepare(self) -> Iterator[Progress]:
        address, sequences = self.data.example.address, self.data.sequences(TOKENS)
        assert address.block is not None
        assert address.layer is not None
        words = f"The full model reads {sequences.numel():,} tokens, up to block {address.block + 1}."
        yield Progress(0.0, words)
        steps = stream_inputs(self.data.teacher.model, address.block, address.layer, sequences)
        while True:
            try:
                yield Progress(next(steps), words)
            except StopIteration as end:
                inputs: Tensor = end.value
                break
        rows = inputs.view(len(sequences), -1, inputs.shape[-1])
        kept = torch.arange(len(rows)) % MEASURED == MEASURED - 1
        self.learned, self.measured = rows[~kept].flatten(0, 1), rows[kept].flatten(0, 1)
        yield Progress(1.0, words)

    @cached_property
    def stops(self) -> list[int]:
        """How many columns are rounded at the positions of the dial."""
        return stops(self.data.example_rows.shape[1])

    @cached_property
    def states(self) -> dict[str, list[Tensor]]:
        """The rows (n, in) at each stop, without and with passing errors on."""
        rows, fmt, config = self.data.example_rows, self.data.example.fmt, PtqConfig()
        hessian, _ = input_statistics([self.learned], [self.learned])
        _, factor = factorize(hessian, config.damping)
        found = {}
        with one_thread():
            for mode, carried in zip(MODES, (torch.eye(len(factor)), factor), strict=True):
                every = rounded_in_turn(rows, carried, fmt.group_size, LEVELS[fmt.format], config.em_steps)
                found[mode] = [state for number, state in enumerate(every) if number in self.stops]
        return found

    @cached_property
    def row(self) -> int:
        """The row that is shown: the one whose output errors, with and without passing on, have the median ratio."""
        outputs = self.measured @ self.data.example_rows.t()
        errors = [(outputs - self.measured @ self.states[mode][-1].t()).square().sum(0) for mode in MODES]
        ratio = errors[1] / errors[0].clamp_min(torch.finfo(outputs.dtype).tiny)
        return int(ratio.argsort(stable=True)[len(ratio) // 2])

    @cached_property
    def output_errors(self) -> dict[str, list[Figure]]:
        """The error of the rows' outputs at each stop, on text that was kept apart."""
        x, exact = self.measured, self.data.example_rows
        how = ("Error of the outputs", "{:.2%}", OUTPUTS_ERROR, relative_error)
        return {
            mode: [computed(*how, x @ exact.t(), x @ now.t()) for now in states] for mode, states in self.states.items()
        }

    def weight_error(self, mode: str) -> Figure:
        """The error of the rows' weights after the last column."""
        exact, now = self.data.example_rows, self.states[mode][-1]
        return computed("Error of the weights", "{:.2%}", RELATIVE_ERROR, relative_error, exact, now)

    def lesson(self) -> Lesson:
        alone, passed = (self.output_errors[mode][-1] for mode in MODES)
        weights, moved = (self.weight_error(mode) for mode in MODES)
        columns = self.data.example_rows.shape[1]
        guess = number_question(
            f"If each of the {columns} weights in a row is rounded on its own, the outputs have an error of "
            f"{alone.text}. Now round the columns one after the other, and after each one move the weights that are "
            "not yet rounded, to make up for its error. How large is the error of the outputs?",
            passed.value,
            [alone.value, moved.value],
            "{:.2%}",
            f"The outputs are {alone.value / passed.value:.1f} times less wrong than with {alone.text}, with the same "
            "number of bits. This is measured on other text than the one that the moves were computed from.",
        )
        check = number_question(
            f"And the weights themselves? If each is rounded on its own, the error of the weights is {weights.text}. "
            "How large is it if errors are passed on?",
            moved.value,
            [weights.value, passed.value],
            "{:.2%}",
            "The weights move away from those of the full model so that the outputs come nearer to its outputs. "
            "Methods like GPTQ, and the first stage of LBLLM, round in this way. Training goes further: in the "
            f"checkpoint, the error of this layer's weights is {self.data.example.error:.2%}.",
        )
        dials = (
            Dial("columns", "Columns that are rounded", tuple(map(str, self.stops))),
            Dial("pass", "Pass the error on", MODES, 1),
        )
        return Lesson(
            self.key,
            self.title,
            "What counts is the output of a layer, not its weights: if rounding makes the weights of one input too "
            "large, those of similar inputs can become a little smaller to make up for it. All weights of one input "
            "form a column; the columns are rounded one after the other, and each passes its error on to the columns "
            "that are not rounded yet.",
            guess,
            dials,
            check,
            f"{self.data.example.address}/{self.row}",
        )

    def scene(self, positions: Positions) -> Scene:
        stop, mode = positions[0], MODES[positions[1]]
        done, columns = self.stops[stop], self.data.example_rows.shape[1]
        exact, now = self.data.example_rows[self.row], self.states[mode][stop][self.row]
        first = max(0, min(done - _BEHIND, columns - _WINDOW))
        window = slice(first, min(first + _WINDOW, columns))
        names = [str(column) for column in range(window.start, window.stop)]
        where = (
            f"columns {window.start} to {window.stop - 1} of row {self.row} in {layer_words(self.data.example.address)}"
        )
        rows = pictures.grid(
            f"Weights, {where}",
            torch.stack((exact[window], now[window])),
            row_labels=("full model", "now"),
            column_labels=names,
        )
        change = pictures.grid(
            f"What has changed, now − full model: {done} of {columns} columns are rounded",
            (now - exact)[None, window],
            row_labels=("difference",),
            column_labels=names,
        )
        curve = pictures.curve(
            f"Error of the outputs of {len(self.data.example_rows)} rows",
            self.stops,
            {
                {"yes": "errors passed on", "no": "errors not passed on"}[one]: [
                    100 * self.output_errors[one][n].value if n <= stop or one != mode else None
                    for n in range(len(self.stops))
                ]
                for one in MODES
                if one == mode or stop + 1 == len(self.stops)
            },
            x_label="columns that are rounded",
            y_label="error of the outputs, %",
            mark=stop,
        )
        # The error of the weights is left to the check.
        return Scene((rows, change, curve), (self.output_errors[mode][stop],), self._say(mode, stop))

    def _say(self, mode: str, stop: int) -> str:
        done, columns = self.stops[stop], self.data.example_rows.shape[1]
        error = self.output_errors[mode][stop].text
        if done == 0:
            return "Nothing is rounded yet, so the outputs are exact."
        if done == columns:
            other = MODES[1 - MODES.index(mode)]
            how = {"yes": "with errors passed on", "no": "without"}
            rival = self.output_errors[other][stop].text
            return f"All columns are rounded: {error} {how[mode]}, {rival} {how[other]}."
        exact, now = self.data.example_rows[self.row], self.states[mode][stop][self.row]
        moved = float((now - exact)[done:].abs().max())
        if mode == "no":
            return f"{done} columns are rounded, and the others stay as they are: the outputs are {error} off."
        return (
            f"{done} columns are rounded, and the others have moved by up to {moved:.3f}: the outputs are {error} off."
        )
