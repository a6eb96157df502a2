"""A plan from beginning to end: measure what is missing, choose, measure the choice, and fall back where it is worse.

``planned`` does it; a ``Job`` does it in a thread of its own, for a page that is drawn meanwhile.
"""

from __future__ import annotations

import threading
import traceback
from dataclasses import dataclass, field

from lbllm.config import RunConfig
from lbllm.errors import LbllmError
from lbllm.models.teacher import skeleton
from lbllm.planning.candidates import format_words
from lbllm.planning.measuring import Bench, Report
from lbllm.planning.plan import Overridden, Plan, make_plan
from lbllm.planning.target import Target

# Formats for all layers that a plan is measured against, at most: each is the best one as far as is known then.
RIVALS = 2


class Cancelled(LbllmError):
    """Somebody has ended the measurement."""


def planned(
    config: RunConfig, target: Target, *, overridden: Overridden = "refuse", check: bool = True, report: Report
) -> Plan:
    """Make a plan. With ``check`` it and the best formats for all layers are measured, and the best is the plan.
    Raises LbllmError; what was measured until then is kept."""
    bench = Bench.open(config, report)
    model = skeleton(config.model)
    make_plan(bench.blank(model), config, model, target, overridden)  # what is refused is said before it takes minutes
    study = bench.study()
    plan = make_plan(study, config, model, target, overridden)
    if not check:
        return plan
    if plan.chosen.measured is None:
        study = bench.checked(study, plan.chosen.formats, "The plan")
        plan = make_plan(study, config, model, target, overridden)
    for _ in range(RIVALS):
        if plan.rival is None or plan.rival.measured is not None:
            break
        assert plan.rival.uniform is not None
        study = bench.checked(study, plan.rival.formats, f"All layers in {format_words(plan.rival.uniform)}")
        plan = make_plan(study, config, model, target, overridden)
    return plan


@dataclass
class Job:
    """A plan that is made in a thread. ``share``: what of it is done, 0 to 1; ``what``: what it does now; ``plan`` or
    ``error`` when it has ended."""

    config: RunConfig
    target: Target
    overridden: Overridden
    check: bool
    share: float = 0.0
    what: str = "Beginning"
    plan: Plan | None = None
    error: str | None = None
    _cancelled: bool = False
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._work, name="lbllm-plan", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether nothing works on it any more."""
        return not self._thread.is_alive()

    def cancel(self) -> None:
        """End it at the next block; finished steps are kept."""
        self._cancelled = True

    def wait(self, seconds: float) -> bool:
        """Wait for its end for at most so many seconds; returns whether it has ended."""
        self._thread.join(seconds)
        return self.ended

    def _report(self, share: float, what: str) -> None:
        if self._cancelled:
            raise Cancelled("the plan was cancelled; its finished steps are kept")
        self.share, self.what = share, what

    def _work(self) -> None:
        try:
            self.plan = planned(
                self.config, self.target, overridden=self.overridden, check=self.check, report=self._report
            )
        except LbllmError as error:
            self.error = str(error)
        except Exception as error:
            traceback.print_exception(error)
            self.error = f"the plan failed ({type(error).__name__}: {error})"
