"""Computes lessons and scenes in the background, once for all sessions, and says how far it is meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from lbllm.chat.pool import Loaded, ModelPool, Slot
from lbllm.config import labels_alone
from lbllm.course.course import Course
from lbllm.course.lesson import Positions, Progress
from lbllm.errors import LbllmError

# A computation that nobody has asked for so long stops; the next reader continues it.
PATIENCE = 10.0
# A page waits so long for an answer before it shows progress.
MOMENT = 0.25
_log = logging.getLogger(__name__)

Where = tuple[str, Positions | None]


@dataclass
class _Job:
    """One computation. Its thread alone writes the fields but ``asked``."""

    asked: float = field(default_factory=time.monotonic)
    progress: Progress | None = None
    result: dict[str, Any] | None = None
    over: threading.Event = field(default_factory=threading.Event)


class Desk:
    """A course whose parts are asked for by key and positions; threads may share it."""

    def __init__(self, open_course: Callable[[Callable[[str], Loaded]], Course], pool: ModelPool) -> None:
        self._pool = pool
        self._slots: list[Slot] = []
        self._jobs: dict[Where, _Job] = {}
        self._mutex = threading.Lock()
        self.course = open_course(self._load)

    def ask(self, key: str, positions: Positions | None, moment: float = MOMENT) -> dict[str, Any]:
        """A lesson (``positions`` None) or a scene with its lesson, as JSON: {"lesson": ...}, {"scene": ..., "lesson":
        ...}, {"progress": ...} if it is still being computed after ``moment`` seconds, or {"error": a sentence}."""
        where = (key, positions)
        with self._mutex:
            job = self._jobs.get(where)
            if job is None:
                job = self._jobs[where] = _Job()
                threading.Thread(target=self._work, args=(where, job), name="lbllm-course", daemon=True).start()
            job.asked = time.monotonic()
        job.over.wait(moment)
        if job.result is not None:
            return job.result
        known = job.progress or Progress(0.0, "Computing this lesson from the model")
        return {"progress": asdict(known) | {"share": known.share if job.progress else None}}

    def _work(self, where: Where, job: _Job) -> None:
        """Compute one part. Its job is forgotten at the end: the course itself keeps what it has computed."""
        key, positions = where
        try:
            steps = self.course.prepare(key) if positions is None else self.course.watch(key)
            for job.progress in steps:
                if time.monotonic() - job.asked > PATIENCE:
                    return
            shown = {} if positions is None else {"scene": asdict(self.course.scene(key, positions))}
            job.result = shown | {"lesson": asdict(self.course.lesson(key))}
        except LbllmError as error:
            text = labels_alone(str(error))
            job.result = {"error": text[:1].upper() + text[1:]}
        except Exception as error:
            _log.exception("lesson %s", key)
            job.result = {"error": f"This lesson can't be computed ({type(error).__name__}: {error})"}
        finally:
            with self._mutex:
                del self._jobs[where]
            job.over.set()

    def _load(self, name: str) -> Loaded:
        """A model of the pool, held as long as this desk."""
        slot = self._pool.get(name)
        slot.wait()
        self._slots.append(slot)
        return slot.loaded
