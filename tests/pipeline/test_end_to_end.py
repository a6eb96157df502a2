"""The variants of stage 4 beside each other, from the packed checkpoint of a tiny model."""

from __future__ import annotations

import pytest

from benchmarks.end_to_end import VARIANTS, chosen, measure, table
from lbllm import load
from lbllm.config import RunConfig
from lbllm.errors import ConfigError
from lbllm.measure.perplexity import divergence
from lbllm.pipeline.start import settings_to_go_on
from lbllm.sections import E2eConfig
from lbllm.texts.corpus import Corpus
from tests.helpers.tiny_runs import SEQ_LEN, bfloat_teacher, run_config, run_tiny, token_ids


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("first")
    run_tiny(run_config(stages=["ptq"]), folder, bfloat_teacher())
    start = {**settings_to_go_on(str(folder / "checkpoint")), "model": "tiny"}
    return run_config(**start, e2e={"tokens": 4 * SEQ_LEN, "epochs": 4, "seq_len": SEQ_LEN, "batch_tokens": SEQ_LEN})


@pytest.mark.soak
def test_every_variant_is_trained_from_the_checkpoint_in_its_own_way(settings: RunConfig) -> None:
    teacher, text = bfloat_teacher(), token_ids()
    results = measure(settings, teacher, Corpus("given", "-", text), text, list(VARIANTS))
    assert [result.variant for result in results] == ["before", *VARIANTS]
    assert settings.start is not None
    begun = divergence(teacher.model, load(settings.start)[0], text)
    assert results[0].found.kl == pytest.approx(begun.kl, rel=1e-4)
    kl = {result.variant: result.found.kl for result in results}
    # Judged on the text that was trained on, which four passes must bring nearer.
    assert kl["group parameters alone"] < kl["before"]
    assert kl["latent weights"] < kl["before"]
    same = {"steps of 2048 tokens", "sequences of 128"}  # the tiny text has one sequence a step and short ones
    others = [value for name, value in kl.items() if name not in same]
    assert len(set(others)) == len(others)
    assert not any(result.taken_back for result in results[1:])


def test_variants_are_settings_that_a_run_takes_and_differ() -> None:
    made = [E2eConfig(**values) for values in VARIANTS.values()]
    assert all(one != other for place, one in enumerate(made) for other in made[:place])


def test_an_unknown_variant_is_named() -> None:
    assert chosen("latent weights,reverse KL") == ["latent weights", "reverse KL"]
    with pytest.raises(ConfigError, match="--only reverse: choose from group parameters alone, latent"):
        chosen("latent weights,reverse")


def test_a_training_that_was_taken_back_says_so(settings: RunConfig) -> None:
    teacher, text = bfloat_teacher(), token_ids()
    wild = settings.model_copy(update={"e2e": settings.e2e.model_copy(update={"lr_levels": 50.0})})
    results = measure(wild, teacher, Corpus("given", "-", text), text, ["group parameters alone"])
    assert results[1].taken_back
    assert results[1].found.kl == pytest.approx(results[0].found.kl)
    assert "| group parameters alone (taken back) |" in table(results)
