"""The lessons, one a file, in the order of the course."""

from __future__ import annotations

from lbllm.course.lesson import LessonMaker
from lbllm.course.lessons.answers import Answers
from lbllm.course.lessons.bitmap import Bitmap
from lbllm.course.lessons.block_by_block import BlockByBlock
from lbllm.course.lessons.compensation import Compensation
from lbllm.course.lessons.counting_bits import CountingBits
from lbllm.course.lessons.em import Em
from lbllm.course.lessons.knee import Knee
from lbllm.course.lessons.massive_activations import MassiveActivations
from lbllm.course.lessons.one_bit import OneBit
from lbllm.course.lessons.what_a_weight_is import WhatAWeightIs

LESSONS: tuple[type[LessonMaker], ...] = (
    WhatAWeightIs,
    OneBit,
    Bitmap,
    Em,
    Compensation,
    BlockByBlock,
    MassiveActivations,
    Knee,
    CountingBits,
    Answers,
)
