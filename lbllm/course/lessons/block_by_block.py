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
    Question,
    Scene,
    computed,
)
from lbllm.microscope.address import Address
from lbllm.sections import stage_name

# Of the error: nobody knows the figure before the block has trained.
PARTS = ("Less than a third", "Between a third and two thirds", "More than two thirds")


class BlockByBlock(LessonMaker):
    """Guess, then watch a real block train, and step through what happened."""

    key = "block-by-block"
    title = "One block at a time"

    def prepare(self) -> Iterator[Progress]:
        """Binarize the block in the middle."""
        title = self.data.teacher_title
        yield Progress(0.0, f"{title} is loaded.")
        numbers = [number for number, names in enumerate(self.data.blocks) if names]
        training = Training(self.data, numbers[len(numbers) // 2])
        block = f"block {training.number + 1}"
        yield Progress(1 / 3, f"{title} reads a text as far as {block}, whose inputs and outputs are noted.")
        training.read()
        yield Progress(2 / 3, f"{stage_name('ptq')}: {block} gets its levels and bits. It does not train yet.")
        training.begin()
        self._training = training

    def watch(self) -> Iterator[Progress]:
        """Train it."""
        training, at = self._training, None
        if len(training.snapshots) > 1:  # an earlier training has failed
            training.begin()
        yield Progress(0.0, self._step(training.snapshots[0]), (self._curve(None),))
        for snapshot in training.run():
            # The first group in which a weight has taken another level is watched from then on.
            if at is None and snapshot.changed:
                at = training.address
            group = () if at is None else (self._group(snapshot, at),)
            yield Progress(snapshot.step / training.steps, self._step(snapshot), (self._curve(None), *group))

    def _step(self, snapshot: Snapshot) -> str:
        if not snapshot.step:
            return f"The training begins: the error of the block's output is {snapshot.error:.2%}."
        return (
            f"Step {snapshot.step} of {self._training.steps}: the error of the block's output is "
            f"{snapshot.error:.2%}, and {snapshot.changed:.2%} of the weights have taken another level."
        )

    def lesson(self) -> Lesson:
        """The texts: the guess is on what will be left of the error, the check on how it could fall."""
        training = self._training
        steps, over = training.steps, len(training.snapshots) > training.steps
        return Lesson(
            self.key,
            self.title,
            "A model is a chain of blocks, and training all of them at once takes much memory. But the full model, the "
            "teacher, shows what each block should give, so the blocks can learn one after the other.",
            self._guess(over),
            (Dial("step", "Steps of training", tuple(map(str, range(steps + 1))), steps),),
            self._check() if over else None,
            str(training.address) if over else "",
        )

    def _guess(self, over: bool) -> Question:
        training = self._training
        steps, start, end = training.steps, training.snapshots[0], training.snapshots[-1]
        weights = computed("", "{:,.0f}", "", binarized_weights, [training.block])
        everything = computed("", "{:,.0f}", "", binarized_weights, training.all_blocks)
        left = end.error / start.error
        because = (
            f"The error went from {start.error:.2%} to {end.error:.2%}: {left:.0%} of it is left. This training holds "
            f"{weights.text} weights; all blocks together have {everything.text}, and training them at once would hold "
            f"all of these. A run of the preset {training.config.preset} does {training.usual_steps} steps in each "
            "block."
        )
        return Question(
            f"Block {training.number + 1} has just been binarized (its weights got levels and bits), and its output "
            f"has an error of {start.error:.2%}. Next it trains for {steps} small steps on {training.tokens:,} tokens "
            "(pieces of words) of text, to give what the teacher's block gives. What part of the error will be left, "
            "on text that it has not seen?",
            PARTS,
            min(int(len(PARTS) * left), len(PARTS) - 1) if over else None,
            because if over else "",
        )

    def _check(self) -> Question:
        training = self._training
        start, end = training.snapshots[0], training.snapshots[-1]
        return Question(
            f"Only {end.changed:.2%} of the weights of block {training.number + 1} have taken another level, but the "
            f"error of its output went from {start.error:.2%} to {end.error:.2%}. What else has changed?",
            (
                "The levels themselves: each of them has moved a little",
                "The teacher's block: it came nearer to the binarized one",
                "The number of bits of each weight",
            ),
            0,
            "A weight keeps its bits, but the level that they name moves, and so do all weights that share it. The "
            "levels move so that the errors of many weights cancel each other in the output. The teacher stays as it "
            "is: it is the example.",
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
        return Scene((self._curve(positions[0]), self._group(snapshot, training.address)), figures, said)

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

    def _group(self, snapshot: Snapshot, at: Address) -> Picture:
        training = self._training
        latent, levels, index = training.group(snapshot, at)
        ends = training.group_ends(at)
        notes = [f"{float(value):.4f}" for value in latent]
        words = (
            f"Group {at.group} of row {at.row} in {layer_words(at)}: its weights as the training moves them, and its "
            "levels"
        )
        return pictures.line(words, latent, levels, index, notes=notes, ends=ends)
