"""Lesson 10: what binarizing does to the words of an answer, block by block."""

from __future__ import annotations

from collections.abc import Iterator

from lbllm.chat.lens import Candidate
from lbllm.chat.settings import ChatSettings
from lbllm.course import pictures
from lbllm.course.formulas import KL, PROBABILITY
from lbllm.course.lesson import (
    OPTIONS,
    Dial,
    Figure,
    Lesson,
    LessonMaker,
    Picture,
    Positions,
    Progress,
    Question,
    Scene,
    dotted,
    number_question,
)
from lbllm.microscope.effect import Effect, answer, effect
from lbllm.microscope.hybrid import FirstBlocks, Only

SENTENCES = ("The capital of France is", "The sky is blue because", "A good friend is someone who")
LESS = (
    "Together they do less harm than one by one: the binarized blocks have learned together, and the later ones "
    "correct what the earlier ones do. The full model's blocks have not learned that."
)
MORE = (
    "Together they do more harm than one by one: the error of a block goes into all blocks after it, and they make it "
    "larger."
)
POSITIONS = 7  # of the dial of blocks, at most
ANSWER = ChatSettings(temperature=0, max_new_tokens=24)


class Answers(LessonMaker):
    """Binarize the first blocks, more and more of them, and read what the model says."""

    key = "answers"
    title = "What it does to an answer"

    def prepare(self) -> Iterator[Progress]:
        """Read the sentences, and write an answer, with more and more blocks binarized."""
        yield Progress(0.0, "Both models are loaded.")
        self._pair = self.data.pair
        blocks, last = self._pair.blocks, min(POSITIONS - 1, self._pair.blocks)
        self._counts = sorted({round(blocks * n / last) for n in range(last + 1)})
        self._effects: dict[tuple[int, int], Effect] = {}
        self._answers: dict[int, str] = {}
        for done, count in enumerate(self._counts):
            for number, sentence in enumerate(SENTENCES):
                self._effects[number, count] = effect(self._pair, FirstBlocks(count), sentence)
            messages = [{"role": "user", "content": self.data.question}]
            pieces = answer(self._pair, FirstBlocks(count), messages, ANSWER)
            self._answers[count] = "".join(piece.text for piece in pieces)
            part = (done + 1) / (len(self._counts) + 1)
            yield Progress(part, f"{count} of {blocks} blocks are binarized.", (self._curve(0, None),))
        yield Progress(part, "Each block is binarized alone.", (self._curve(0, None),))
        places = [number for number, names in enumerate(self._pair.binarized) if names]
        self._alone = [effect(self._pair, Only(number), SENTENCES[0]).hybrid.kl for number in places]

    def lesson(self) -> Lesson:
        """The texts: the guess is on the next word, the check on whether divergences add up."""
        blocks = self._pair.blocks
        whole = self._effects[0, blocks]
        teacher, student = whole.teacher.next, whole.student.next
        words = list(dict.fromkeys(word(one) for one in (student[0], *teacher, *student)))[:OPTIONS]
        options = sorted(words)
        guess = Question(
            f"After “{SENTENCES[0]}” the full model's likeliest next token is “{word(teacher[0])}”, with a "
            f"probability of {teacher[0].probability:.0%}. What is the likeliest one when all blocks are binarized?",
            tuple(f"“{option}”" for option in options),
            options.index(word(student[0])),
            f"The binarized model says “{word(student[0])}” with {student[0].probability:.0%}. KL, the distance of "
            f"both models' probabilities, is {whole.student.kl:.2f} over the sentence; it is zero for equal models.",
        )
        together, alone = whole.student.kl, sum(self._alone)
        check = number_question(
            f"“{SENTENCES[0]}”: with all blocks binarized, KL is {together:.2f}. Now only one block is binarized at a "
            f"time, each of the {len(self._alone)} in its turn, and their KLs are added. What is the sum?",
            alone,
            [together, together / len(self._alone)],
            "{:.2f}",
            f"Alone, a block moves KL by {min(self._alone):.3f} to {max(self._alone):.3f}. "
            f"{LESS if alone > together else MORE} So KLs do not add up.",
        )
        return Lesson(
            self.key,
            self.title,
            "Each binarized block changes what the next one receives, and at the end the probabilities of the next "
            "word have moved. KL says how far they moved; a word changes first where two were about equally "
            "likely.",
            guess,
            (
                Dial("blocks", "Blocks that are binarized, from the first on", tuple(map(str, self._counts))),
                Dial("sentence", "Sentence", SENTENCES),
            ),
            check,
        )

    def scene(self, positions: Positions) -> Scene:
        """The likeliest next tokens, the divergence over the blocks, and the answers."""
        count, number = self._counts[positions[0]], positions[1]
        found = self._effects[number, count]
        first = found.hybrid.next[0]
        figures = (
            Figure(
                "KL: how far the probabilities of the next token have moved",
                found.hybrid.kl,
                f"{found.hybrid.kl:.3f}",
                KL,
                dotted(effect),
            ),
            Figure(
                f"Probability of “{word(first)}”",
                first.probability,
                f"{first.probability:.0%}",
                PROBABILITY,
                dotted(effect),
            ),
        )
        same = first.text == found.teacher.next[0].text
        said = (
            f"With {count} of {self._pair.blocks} blocks binarized the likeliest next token is “{word(first)}” "
            f"({first.probability:.0%}), {'the same as' if same else 'another one than'} in the full model."
        )
        return Scene((self._next(found), self._curve(number, positions[0]), self._table(count)), figures, said)

    def _next(self, found: Effect) -> Picture:
        likeliest = {one.text: word(one) for one in (*found.teacher.next, *found.hybrid.next[:2])}

        def probabilities(candidates: tuple[Candidate, ...]) -> list[float | None]:
            known = {one.text: one.probability for one in candidates}
            return [known.get(text) for text in likeliest]

        series = {
            "full model": probabilities(found.teacher.next),
            "these blocks binarized": probabilities(found.hybrid.next),
        }
        labels = [f"“{shown}”" for shown in likeliest.values()]
        return pictures.bars("The likeliest next tokens", labels, series, percent=True)

    def _curve(self, sentence: int, mark: int | None) -> Picture:
        known = [self._effects.get((sentence, count)) for count in self._counts]
        return pictures.curve(
            f"Divergence from the full model on “{SENTENCES[sentence]}”",
            [float(count) for count in self._counts],
            {"KL, nats a token": [None if one is None else one.hybrid.kl for one in known]},
            x_label="blocks binarized",
            y_label="KL",
            mark=mark,
        )

    def _table(self, count: int) -> Picture:
        shown = {f"{n} of {self._pair.blocks}": self._answers[n] for n in dict.fromkeys((0, count, self._pair.blocks))}
        rows = [[blocks, text.strip()] for blocks, text in shown.items()]
        return pictures.table(
            f"Answers to “{self.data.question}”", ["blocks binarized", "beginning of the answer"], rows
        )


def word(candidate: Candidate) -> str:
    """A token as texts show it: without the space before it, or a space where it has nothing else."""
    return candidate.text.strip() or "␣"
