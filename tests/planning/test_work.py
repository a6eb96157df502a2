"""A plan of a tiny model from beginning to end: measured once, stored, checked, cancelled, refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbllm.config import RunConfig
from lbllm.errors import ConfigError, CorpusError, ModelError, ResourceError
from lbllm.planning import measuring, work
from lbllm.planning.measuring import Bench
from lbllm.planning.plan import Plan
from lbllm.planning.store import study_path
from lbllm.planning.target import parse_target
from lbllm.planning.work import Cancelled, Job
from tests.helpers.homes import own_home
from tests.helpers.tiny_models import save_tiny
from tests.helpers.tiny_plans import quick_plans
from tests.helpers.tiny_runs import stored_run_config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Settings of a tiny run, over a home of its own; little text is measured."""
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels")))
    quick_plans(monkeypatch)
    return stored_run_config(tmp_path)


def planned(config: RunConfig, target: str, said: list[tuple[float, str]] | None = None, *, check: bool = True) -> Plan:
    heard = [] if said is None else said
    return work.planned(
        config, parse_target(target), check=check, report=lambda share, what: heard.append((share, what))
    )


def test_a_plan_is_measured_once_and_checked(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[float, str]] = []
    first = planned(config, "3 bits", said)
    assert first.chosen.bits <= 3
    assert first.chosen.measured is not None
    assert first.uniform is not None
    assert first.uniform.measured is not None
    assert first.chosen.measured <= first.uniform.measured
    shares = [share for share, what in said if what.startswith(("Each", "What", "All"))]
    assert min(shares) == 0
    assert max(shares) <= 1
    assert any(what.startswith("The plan: block 2 of 2") for _, what in said)

    # The same plan again, and a prediction for another target, load no model.
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measuring, "open_teacher", refuse)
    assert planned(config, "3 bits") == first
    other = planned(config, "3.3 bits", check=False)
    assert other.chosen.bits > first.chosen.bits
    # A damaged file is measured anew, and other weights are another teacher.
    path = study_path(Bench.open(config).facts)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(AssertionError):
        planned(config, "3 bits")
    save_tiny(Path(config.model), "llama", seed=1)
    assert study_path(Bench.open(config).facts) != path


def test_a_cancelled_plan_keeps_its_finished_steps(config: RunConfig) -> None:
    said: list[str] = []

    def stop(share: float, what: str) -> None:
        said.append(what)
        if what.startswith("All layers in W(1+1), groups of 32") and "block 2" in what:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        work.planned(config, parse_target("3 bits"), report=stop)
    before = len(said)
    work.planned(config, parse_target("3 bits"), check=False, report=lambda share, what: said.append(what))
    again = said[before:]
    assert not any(
        "Each layer alone" in what or "W(1+1), groups of 128, 4-bit parameters: block 1" in what for what in again[:9]
    )
    assert any("groups of 32" in what for what in again)


def test_a_job_works_in_a_thread_and_says_what_goes_wrong(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(config, parse_target("3 bits"), "refuse", check=False)
    assert job.wait(60)
    assert job.plan is not None
    assert job.error is None
    low = Job(config, parse_target("1 bit"), "refuse", check=False)
    assert low.wait(60)
    assert "is below what the formats can reach" in str(low.error)
    stopped = Job(config.model_copy(update={"seed": 1}), parse_target("3 bits"), "refuse", check=True)
    stopped.cancel()
    assert stopped.wait(60)
    assert stopped.plan is not None or "was cancelled" in str(stopped.error)
    monkeypatch.setattr(work, "skeleton", lambda name: 1 / 0)
    broken = Job(config, parse_target("3 bits"), "refuse", check=False)
    assert broken.wait(60)
    assert broken.error == "the plan failed (ZeroDivisionError: division by zero)"


def test_what_no_plan_can_be_made_of_is_refused(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = save_tiny(tmp_path / "experts", "qwen3_moe")
    with pytest.raises(ModelError, match="is a mixture of experts, and plans for one are not built"):
        planned(config.model_copy(update={"model": str(experts)}), "3 bits")
    further = config.model_copy(update={"start": "shipped"})
    with pytest.raises(ConfigError, match="a run from a checkpoint has the checkpoint's format"):
        planned(further, "3 bits")
    short = tmp_path / "short.txt"
    short.write_text("The river runs past the old mill.")
    with pytest.raises(CorpusError, match=r"short.txt.* is too short for a plan|one sequence needs"):
        planned(config.model_copy(update={"corpus": str(short)}), "3 bits")
    monkeypatch.setattr(measuring, "free_memory", lambda device: 1000)
    with pytest.raises(ResourceError, match=r"a plan needs about .* are free; free some, or plan on a smaller model"):
        planned(config, "3 bits")
