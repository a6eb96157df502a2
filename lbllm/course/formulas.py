"""Formulas that several lessons show."""

from __future__ import annotations

from lbllm.baselines.layer import HALF
from lbllm.course.mathml import frac, math, norm, row, square, sub, total, words

# Of weights w, or of a layer's outputs X W for inputs X: ``lbllm.microscope.layer.relative_error``.
RELATIVE_ERROR = math(frac(square(norm("w", "−", sub("w", "q"))), square(norm("w"))))
OUTPUTS_ERROR = math(frac(square(norm(row("X", "W"), "−", row("X", sub("W", "q")))), square(norm(row("X", "W")))))
# The levels of a group: two of them, and four as an outer and an inner pair.
TWO_LEVELS = math(sub("w", "q"), "=", "μ", "±", "α")
OUTER_PAIR, INNER_PAIR = (math(sub("w", "q"), "=", sub("μ", k), "±", sub("α", k)) for k in ("0", "1"))
M_STEP = math(sub("l", "k"), "=", frac(row(words("sum of its "), "w"), words("number of its weights")))
E_STEP = math(words("nearest level: min"), square(row("(", "w", "−", sub("l", "k"), ")")))

LAYER_BITS = math(frac(words("bits of the layer"), words("its weights")))
# Of even levels in a row: codes, and its minimum and step in 16 bits each.
STORED_EVENLY = math(words("weights"), "×", words("bits"), "+", words("rows"), "×", "2", "×", str(HALF))

_CLEAN, _ROUNDED = row("W", "x"), row("W", sub("x", "q"))

# Of a layer's outputs where its inputs x are rounded, mean over the tokens; see ``lbllm.stages.distill.token_error``.
INPUTS_ERROR = math(
    words("mean of "),
    frac(
        square(norm(_CLEAN, "−", _ROUNDED)),
        row(words("max"), "(", square(norm(_CLEAN)), ",", square(norm(_ROUNDED)), ")"),
    ),
)
MAX_TO_MEDIAN = math(frac(row(words("max "), "|", "x", "|"), row(words("median "), "|", "x", "|")))
ZEROS = math(frac(row(words("number of "), sub("x", "q"), "=", "0"), row(words("number of "), "x", "≠", "0")))
STEP = math(frac(words("largest − smallest input"), words("number of steps")))
BODY_STEP = math(frac(row(words("knee"), "×", "(", words("largest − smallest input"), ")"), words("fine steps")))
TAIL_STEP = math(frac(words("end of the range − end of the fine steps"), words("coarse steps")))
# Of a block f and its binarized form f_q on its inputs h.
BLOCK_ERROR = math(
    words("mean of "),
    frac(
        square(norm("f", "(", "h", ")", "−", sub("f", "q"), "(", "h", ")")),
        row(words("max"), "(", square(norm("f", "(", "h", ")")), ",", square(norm(sub("f", "q"), "(", "h", ")")), ")"),
    ),
)
CHANGED = math(frac(words("weights with another level than before"), words("all weights of the block")))
KL = math(words("KL"), "=", total("i", sub("p", "i"), words("log "), frac(sub("p", "i"), sub("q", "i"))))
PART_BITS = math(frac(words("bits of this part"), words("binarized weights")))
BITS_PER_WEIGHT = math(frac(words("bits of the binarized layers"), words("binarized weights")))
FILE_BITS = math(frac(words("bits of the file"), words("all weights of the model")))
PROBABILITY = math("p", "(", words("next token"), "|", words("text"), ")")
