"""Experts as layers of their own: the same outputs as the fused ones, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.architectures import tiny_of
from lbllm.errors import ModelError
from lbllm.models.blocks import check_supported, decoder_blocks, linear_layers, outer_layers
from lbllm.models.experts import Expert, Experts, Form, experts_of, form_of, routed, routers, split_experts
from lbllm.models.streamed import weight_hashes
from lbllm.models.teacher import load_teacher, stream_teacher
from tests.helpers.tiny_models import save_tiny, tiny, tiny_tokenizer
from tests.helpers.tiny_runs import token_ids

# gate and up joined; interleaved, transposed, with biases and a gate of its own; sorted tokens, transposed
FORMS = ("qwen3_moe", "gpt_oss", "llama4_text")


def with_biases(kind: str) -> Any:
    model = tiny_of(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("kind", FORMS)
def test_split_experts_compute_what_the_fused_ones_did(kind: str) -> None:
    model, ids = with_biases(kind), token_ids(2)
    with torch.no_grad():
        before = model(ids).logits
        count = model.num_parameters()
        split_experts(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)
    assert model.num_parameters() == count
    block = decoder_blocks(model)[1][1]
    found = experts_of(block)
    assert found is not None
    path, experts = found
    layers = linear_layers(block)
    own = [f"{path}.{k}.{name}" for k in range(4) for name in ("gate_proj", "up_proj", "down_proj")]
    assert experts.count == 4
    assert [name for name in layers if name not in outer_layers(block)] == own


@pytest.mark.parametrize("kind", FORMS)
def test_one_expert_is_read_from_the_files_at_a_time(kind: str, tmp_path: Path) -> None:
    model, ids = with_biases(kind), token_ids(1)
    model.save_pretrained(tmp_path)
    tiny_tokenizer(chat=False).save_pretrained(tmp_path)
    whole, opened = load_teacher(str(tmp_path)).model, stream_teacher(str(tmp_path), torch.device("cpu")).model
    found = experts_of(opened.block(1))
    assert found is not None
    assert found[1].source is not None
    assert all(parameter.is_meta for parameter in found[1].parameters())
    assert opened.survey(ids).hashes == weight_hashes(whole)
    assert set(opened.files) == set(weight_hashes(whole))
    with torch.no_grad():
        last = opened.last_hidden(ids)
        logits = torch.cat([part for _, part in opened.logits(ids, last)], -1)
        torch.testing.assert_close(logits, whole(ids).logits, rtol=0, atol=1e-5)


def test_files_without_all_experts_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"3 tensors like model.layers.1.mlp.experts.0.up_proj.weight.*4 experts"):
        stream_teacher(str(tmp_path), torch.device("cpu"))


def test_routers_stay_dense() -> None:
    for kind, expected in (("llama4_text", "feed_forward.router"), ("qwen2_moe", "mlp.shared_expert_gate")):
        with torch.device("meta"):
            model = tiny_of(kind)
        split_experts(model)
        block = decoder_blocks(model)[1][1]
        assert routers(block) == {expected}
        assert expected not in linear_layers(block)
        assert isinstance(block.get_submodule(expected), nn.Linear)


def test_experts_of_an_unknown_form_are_refused_by_name() -> None:
    model, _ = tiny("qwen3_moe")
    for block in decoder_blocks(model)[1]:
        experts: Any = block.get_submodule("mlp.experts")
        experts.scale = nn.Parameter(torch.ones(4, 2, 2))
        assert form_of(experts) is None
    split_experts(model)
    with pytest.raises(ModelError, match=r"Qwen3Moe.*\d+% .*model\.layers\.0 .*experts.*Experts of this form"):
        check_supported(model)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_parts_of_a_fused_parameter_can_be_joined_again(transposed: bool, interleaved: bool) -> None:
    form = Form(transposed, True, interleaved, False)
    for name, shape in (("gate_up_proj", (10, 6)), ("down_proj", (6, 5)), ("gate_up_proj_bias", (10,))):
        fused = torch.randn(shape[::-1] if transposed else shape)
        parts = form.parts(name, fused)
        assert sorted(parts) == (["down_proj"] if name == "down_proj" else ["gate_proj", "up_proj"])
        assert torch.equal(form.fused(name, parts), fused)


def test_only_the_chosen_experts_compute() -> None:
    model, _ = tiny("qwen3_moe")
    split_experts(model)
    found = experts_of(decoder_blocks(model)[1][0])
    assert found is not None
    experts, asked = found[1], []

    def make(number: int) -> Expert:
        asked.append(number)
        own = experts.get_submodule(str(number))
        assert isinstance(own, Expert)
        return own

    experts.source = make
    x, chosen = torch.randn(3, 48), torch.tensor([[2, 0], [2, 0], [0, 2]])
    weights = torch.rand(3, 2)
    result = experts(x, chosen, weights)
    assert asked == [0, 2]
    expected = torch.stack([by_hand(experts, x[k], chosen[k], weights[k]) for k in range(3)])
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)
    # The number of experts stands for none.
    assert not experts(x, torch.full((3, 2), 4), weights).any()
    rows = {one.expert: one.rows.tolist() for one in routed(chosen, 4)}
    assert rows == {0: [0, 1, 2], 2: [0, 1, 2]}


def by_hand(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    total = torch.zeros(48, dtype=torch.float64)
    for number, weight in zip(chosen.tolist(), weights.double(), strict=True):
        expert: Any = experts.get_submodule(str(number))
        gate, up, down = (getattr(expert, f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
        hidden = gate @ x.double()
        total += weight * (down @ (hidden * hidden.sigmoid() * (up @ x.double())))
    return total


def test_experts_compute_few_numbers_of_rows_where_each_is_compiled() -> None:
    torch.manual_seed(0)
    model = tiny_of("qwen2_moe")
    split_experts(model)
    found = experts_of(decoder_blocks(model)[1][0])
    assert found is not None
    experts, expert = found[1], found[1].expert(0)
    sizes: set[int] = set()
    expert.down_proj.register_forward_pre_hook(lambda _, args: sizes.add(len(args[0])))
    width = expert.up_proj.weight.shape[1]
    for count in range(1, 1_025):
        x = torch.randn(count, width, requires_grad=True)
        alone = experts.inner(expert, x) @ expert.down_proj.weight.t()
        with torch.autocast("cpu", torch.bfloat16):
            output = experts.output(expert, x)
        assert output.shape == alone.shape
        assert max(sizes) <= 1.125 * count + 1
        if count % 100 == 1:
            torch.testing.assert_close(output.float(), alone, rtol=0.1, atol=0.02 * float(alone.detach().abs().max()))
            weight = torch.randn(alone.shape)
            (gradient,) = torch.autograd.grad((output.float() * weight).sum(), x)
            (wanted,) = torch.autograd.grad((alone * weight).sum(), x)
            assert float((gradient - wanted).norm() / wanted.norm()) < 0.03
    assert len(sizes) <= 64
    # Without such products each token is computed once.
    sizes.clear()
    assert len(experts.output(expert, torch.randn(1_001, width))) == 1_001
    assert sizes == {1_001}
