"""Lesson 6: a real block learns to give what the teacher's block gives, without the rest of the model."""

from __future__ import annotations

from collections.abc import Iterator

from lbllm.course import pictures
from lbllm.course.block_training import Snapshot, Training, binarized_weights
from lbllm.course.data import layer_words
from lbllm.course.formulas import BLOCK_ERROR, CHANGED
from lbllm.course.lesson import (
    Dial,
    Figure,
    Lesson,
    LessonMaker,
    Picture,
    Positions,
    Progress,
    Scene,
    computed,
    number_question,
)
from lbllm.sections import stage_name

FAR_FROM_ONE = 0.75  # a number between a smaller one and 1 is clearly another one


class BlockByBlock(LessonMaker):
    """Train a real block, and step through what happened."""

    key = "block-by-block"
    title = "One block at a time"

    def prepare(self) -> Iterator[Progress]:
        """Train the block in the middle; it is seen while it trains."""
        numbers = [number for number, names in enumerate(self.data.blocks) if names]
        self._training = training = Training(self.data, numbers[len(numbers) // 2])
        yield Progress(0.0, f"Block {training.number + 1} is binarized, before it trains.")
        for snapshot in training.run():
            share = (snapshot.step + 1) / (training.steps + 1)
            said = f"Step {snapshot.step} of {training.steps}: the error of the block's output is {snapshot.error:.2%}."
            yield Progress(share, said, (self._curve(None),))

    def lesson(self) -> Lesson:
        """The texts: the guess is on what is left of the error, the check on what has to change for that."""
        training = self._training
        steps, start, end = training.steps, training.snapshots[0], training.snapshots[-1]
        left = end.error / start.error
        weights = computed("", "{:,.0f}", "", binarized_weights, [training.block])
        everything = computed("", "{:,.0f}", "", binarized_weights, training.all_blocks)
        guess = number_question(
            f"Block {training.number + 1} is binarized (its weights get levels and bits), and its output has an error "
            f"of {start.error:.2%}. Then it trains for {steps} small steps on {training.tokens:,} tokens (pieces of "
            "words) of text, to give what the teacher's block gives. What part of the error is left, on text that it "
            "has not seen?",
            left,
            [left / 3, (1 + left) / 2 if left < FAR_FROM_ONE else left * 2 / 3],
            "{:.0%}",
            f"The error goes from {start.error:.2%} to {end.error:.2%}. This training holds {weights.text} weights; "
            f"all blocks together have {everything.text}, and training them at once would hold all of these. A run of "
            f"the preset {training.config.preset} does {training.usual_steps} steps in each block.",
        )
        check = number_question(
            f"After the {steps} steps, what share of the weights of block {training.number + 1} takes another of the "
            "levels of its group than before?",
            end.changed,
            [end.changed * 5, 0.5],
            "{:.1%}",
            "All other weights keep their bits. But the levels of all groups move a little, so that the errors of many "
            "weights cancel each other in the output: that is how the error of the output falls.",
        )
        return Lesson(
            self.key,
            self.title,
            "A model is a chain of blocks, and training all of them at once takes much memory. But the full model, the "
            "teacher, shows what each block should give, so the blocks can learn one after the other.",
            guess,
            (Dial("step", "Steps of training", tuple(str(one.step) for one in training.snapshots)),),
            check,
            str(training.address),
        )

    def scene(self, positions: Positions) -> Scene:
        """The error so far, and a group of weights whose levels move."""
        training = self._training
        snapshot, start = training.snapshots[positions[0]], training.snapshots[0]
        figures = (
            Figure("Error of the block's output", snapshot.error, f"{snapshot.error:.2%}", BLOCK_ERROR, Training.ERROR),
            Figure(
                "Weights with another level", snapshot.changed, f"{snapshot.changed:.2%}", CHANGED, Training.CHANGED
            ),
            computed("Weights that train at the same time", "{:,.0f}", "", binarized_weights, [training.block]),
        )
        if snapshot.step == 0:
            said = (
                f"{stage_name('ptq')} has chosen levels and bits without training; the error of the block's output is "
                f"{start.error:.2%}."
            )
        else:
            said = (
                f"After step {snapshot.step} of {training.steps} the error is {snapshot.error / start.error:.0%} of "
                f"what it was, and {snapshot.changed:.2%} of the weights have another level."
            )
        return Scene((self._curve(positions[0]), self._group(snapshot)), figures, said)

    def _curve(self, mark: int | None) -> Picture:
        training, seen = self._training, self._training.snapshots
        steps = range(training.steps + 1)
        errors = {one.step: 100 * one.error for one in seen}
        losses = {one.step: None if one.loss is None else 100 * one.loss for one in seen}
        return pictures.curve(
            f"Block {training.number + 1}: error of its output while it trains",
            [float(step) for step in steps],
            {
                "on text that it has not seen": [errors.get(step) for step in steps],
                "on the text of the step": [losses.get(step) for step in steps],
            },
            x_label="step",
            y_label="error, %",
            mark=mark,
        )

    def _group(self, snapshot: Snapshot) -> Picture:
        training = self._training
        latent, levels, index = training.group(snapshot)
        ends = training.group_ends()
        notes = [f"{float(value):.4f}" for value in latent]
        at = training.address
        words = (
            f"Group {at.group} of row {at.row} in {layer_words(at)}: its weights as the training moves them, and its "
            "levels"
        )
        return pictures.line(words, latent, levels, index, notes=notes, ends=ends)
