"""How the features of an MLP are cut into a part that is always on, and experts."""

from __future__ import annotations

import torch

from benchmarks.mixture import EXPERTS, cut_features


def test_features_are_cut_into_equal_experts_of_features_that_are_active_together() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, features = 200, 60
    owner = torch.arange(features) % EXPERTS
    topic = torch.randint(EXPERTS, (tokens,), generator=generator)
    active = (topic[:, None] == owner).float() + 0.05 * torch.rand(tokens, features, generator=generator)
    energy = torch.rand(features, generator=generator)
    always, experts = cut_features(energy, active)
    assert sorted(torch.cat([always, *experts]).tolist()) == list(range(features))
    assert len(always) == 20
    assert energy[always].min() >= energy[torch.cat(experts)].max()
    assert {len(one) for one in experts} == {10}
    alike = sum(int(owner[one].bincount(minlength=EXPERTS).max()) for one in experts)
    assert alike >= 30  # of 40; the sizes are equal, those of the topics may not be
