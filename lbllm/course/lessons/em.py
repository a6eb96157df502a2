"""Lesson 4: EM finds the levels of a group in turns, and no turn makes the error larger."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lbllm.baselines.rtn import even_levels
from lbllm.course import pictures
from lbllm.course.data import SHOWN, layer_words
from lbllm.course.formulas import E_STEP, M_STEP, RELATIVE_ERROR
from lbllm.course.lesson import (
    Dial,
    Figure,
    Lesson,
    LessonMaker,
    Positions,
    Question,
    Scene,
    computed,
    dotted,
    number_question,
)
from lbllm.microscope.layer import relative_error
from lbllm.quant.levels import LEVELS, assign, fit_levels, refit, take_levels, to_groups

COUNT = LEVELS["w1+1"]
ROUNDS = 8  # E- and M-steps at most
FINER = 3  # bits of the evenly spaced levels of a wrong option
LEAST = 1e-6  # a step that lowers the error by a smaller share of it has changed nothing
DIFFERS = 1.2  # two ends are different if one error is so many times the other
_NARROW = 0.1  # of the standard deviation: how far levels of the second start are apart


@dataclass(frozen=True)
class State:
    """After a step: levels (..., n, K) and the level index (..., n, g) of each weight."""

    levels: Tensor
    index: Tensor


def starts(groups: Tensor) -> dict[str, Tensor]:
    """The starts of the levels (out, n, K) of groups (out, n, g), by their names for people."""
    even = even_levels(groups.flatten(0, 1), 2).view(*groups.shape[:2], COUNT)
    places = torch.arange(COUNT) - (COUNT - 1) / 2
    narrow = groups.mean(-1, keepdim=True) + _NARROW * groups.std(-1, keepdim=True) * places
    own = fit_levels(groups, torch.ones(1), COUNT, 0)
    return {"evenly spaced": even, "close together": narrow, "this program's start": own}


def run(groups: Tensor, levels: Tensor) -> list[State]:
    """The states after each of ``2 ROUNDS`` steps, E and M in turn, from these levels (out, n, K)."""
    importance, states = torch.ones(1), []
    for _ in range(ROUNDS):
        index = assign(groups, levels)
        states.append(State(levels, index))
        levels, index = refit(groups, importance, levels, index)
        states.append(State(levels, index))
    return states


def errors(groups: Tensor, states: list[State]) -> Tensor:
    """The squared error of each group (steps, out, n) after each step."""
    return torch.stack([(groups - take_levels(state.levels, state.index)).square().sum(-1) for state in states])


class Em(LessonMaker):
    """E- and M-steps on one real group, one at a time."""

    key = "em"
    title = "How the levels are found"

    @cached_property
    def place(self) -> tuple[int, int]:
        """Row, and number of the stretch of ``SHOWN`` weights in it, that are shown: of those in the first rows that
        come to rest, and where the start decides how good the end is, the one that takes the most steps; without any,
        of all that come to rest."""
        groups = self._stretches
        ends, steps = [], torch.zeros(groups.shape[:2], dtype=torch.long)
        rests = torch.ones(groups.shape[:2], dtype=torch.bool)
        for levels in starts(groups).values():
            found = errors(groups, run(groups, levels))
            ends.append(found[-1])
            falls = found[:-1] - found[1:] > LEAST * found[:-1]
            steps = steps.maximum(falls.sum(0))
            rests &= ~falls[-2:].any(0)
        last = torch.stack(ends)
        differs = last.amax(0) > DIFFERS * last.amin(0)
        chosen = int((rests * (1 + steps + 2 * ROUNDS * differs)).flatten().argmax())
        return chosen // groups.shape[1], chosen % groups.shape[1]

    @cached_property
    def _stretches(self) -> Tensor:
        rows = self.data.example_rows
        length = min(SHOWN, rows.shape[1])
        return to_groups(rows[:, : rows.shape[1] // length * length], length)

    @property
    def group(self) -> Tensor:
        """The weights (1, 1, g) that are shown."""
        return self._stretches[self.place][None, None]

    @cached_property
    def runs(self) -> dict[str, list[State]]:
        """The states after each step, from each start: as many steps as the longest of them needs, and one round."""
        runs = {name: run(self.group, levels) for name, levels in starts(self.group).items()}
        moved = [self._errors(states) for states in runs.values()]
        last = max(
            (n + 1 for one in moved for n in range(2 * ROUNDS - 1) if one[n] - one[n + 1] > LEAST * one[n]), default=0
        )
        count = min(2 * ROUNDS, last + 3 - last % 2)
        return {name: states[:count] for name, states in runs.items()}

    def _errors(self, states: list[State]) -> list[float]:
        return [relative_error(self.group, take_levels(one.levels, one.index)) for one in states]

    def error(self, start: str, step: int) -> Figure:
        """The error after a step, counted from 0."""
        state = self.runs[start][step]
        rounded = take_levels(state.levels, state.index)
        return computed("Error after this step", "{:.1%}", RELATIVE_ERROR, relative_error, self.group, rounded)

    def lesson(self) -> Lesson:
        count, steps = self.group.shape[-1], len(next(iter(self.runs.values())))
        first, *_ = self.runs
        begun, ended = self.error(first, 0), self.error(first, steps - 1)
        finer = even_levels(self.group[0], FINER)[None]
        eight = relative_error(self.group, take_levels(finer, assign(self.group, finer)))
        guess = number_question(
            f"{COUNT} levels are spread evenly over {count} real weights, and each weight takes the nearest: the error "
            f"is {begun.text}. Now the levels may move, and the weights may choose again, until nothing changes. How "
            "large is the error then?",
            ended.value,
            [begun.value, eight],
            "{:.1%}",
            f"The levels end where more of the weights are. {2**FINER} levels would leave {eight:.1%}, even without "
            "moving.",
        )
        rise = max(
            self.error(name, n + 1).value - self.error(name, n).value for name in self.runs for n in range(steps - 1)
        )
        check = Question(
            "Which step can make the error of a group larger?",
            ("An E-step", "An M-step", "Neither of them"),
            2,
            "In an E-step each weight takes the nearest level; in an M-step each level moves to the mean of its "
            "weights. Both are the best choice while the other part stays. Over all the steps here, from "
            f"{len(self.runs)} starts, the largest rise of the error was {max(rise, 0):.1%}.",
        )
        names = [f"{'E' if n % 2 == 0 else 'M'}-step {n // 2 + 1}" for n in range(steps)]
        address = self.data.example.address
        row, stretch = self.place
        return Lesson(
            self.key,
            self.title,
            "The levels of a group are found by two steps in turn, which statistics calls expectation (E) and "
            "maximization (M): in an E-step each weight takes the nearest level, in an M-step each level moves to the "
            "mean of the weights that took it. The error falls until nothing moves, and where it ends depends on where "
            "it starts.",
            guess,
            (Dial("step", "Step", tuple(names)), Dial("start", "Levels start", tuple(self.runs))),
            check,
            f"{address}/{row}/{stretch * count // self.data.example.length}",
        )

    def scene(self, positions: Positions) -> Scene:
        step, start = positions[0], list(self.runs)[positions[1]]
        states, state = self.runs[start], self.runs[start][positions[0]]
        weights, levels = self.group[0, 0], state.levels[0, 0]
        kind = (
            "E-step: each weight takes the nearest level"
            if step % 2 == 0
            else "M-step: each level moves to the mean of its weights"
        )
        line = pictures.line(
            f"{kind}. {len(weights)} weights of row {self.place[0]} in {layer_words(self.data.example.address)}",
            weights,
            levels,
            state.index[0, 0],
            notes=[f"{weight:.3f}" for weight in weights.tolist()],
            level_labels=[f"{level:.3f}" for level in levels.tolist()],
        )
        course = {
            name: [100 * self.error(name, n).value if n <= step or name != start else None for n in range(len(states))]
            for name in ([start] if step + 1 < len(states) else self.runs)
        }
        curve = pictures.curve(
            "Error after each step, by start",
            list(range(1, len(states) + 1)),
            course,
            x_label="E- and M-steps",
            y_label="error, %",
            mark=step,
        )
        now = self.error(start, step)
        engine = fit_levels(self.group, torch.ones(1), COUNT, ROUNDS)
        best = computed(
            "Error of this program's levels",
            "{:.1%}",
            RELATIVE_ERROR,
            relative_error,
            self.group,
            take_levels(engine, assign(self.group, engine)),
        )
        return Scene((line, curve), (now, self._step(state, step), best), self._say(start, step))

    def _step(self, state: State, step: int) -> Figure:
        """What the step computes: the number of weights at each level, or the levels."""
        if step % 2 == 0:
            found = [float(count) for count in state.index.flatten().long().bincount(minlength=COUNT)]
            shown, label, formula, function = "{:.0f}", "Weights at each level", E_STEP, dotted(assign)
        else:
            found = state.levels.flatten().tolist()
            shown, label, formula, function = "{:.3f}", "Levels", M_STEP, dotted(refit)
        return Figure(label, found[0], ", ".join(map(shown.format, found)), formula, function)

    def _say(self, start: str, step: int) -> str:
        state = self.runs[start][step]
        if step == 0:
            begun = self.error(start, 0).text
            return f"From this start ({start}) each weight takes the nearest level: the error is {begun}."
        before = self.runs[start][step - 1]
        was, now = self.error(start, step - 1), self.error(start, step)
        if step % 2 == 0:
            moved = int((state.index != before.index).sum())
            what = f"{moved} of {state.index.numel()} weights change their level"
        else:
            moved = int((state.levels != before.levels).sum())
            what = f"{moved} of {COUNT} levels move"
        if not moved:
            best = min((self.error(name, len(self.runs[name]) - 1) for name in self.runs), key=lambda one: one.value)
            return (
                f"Nothing moves any more: from this start the error ends at {now.text}, and from the best of the "
                f"{len(self.runs)} starts at {best.text}."
            )
        return f"{what[0].upper()}{what[1:]}: the error goes from {was.text} to {now.text}."
