"""A loaded packed model whose blocks are changed or listened to answers as transformers' own code does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lbllm
from lbllm.checkpoints.decode import FusedForward
from tests.checkpoints.test_decode import count_fused
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids

# 8 bits: a value that falls on the neighbouring code changes little.
QUANT = {"group_size": 16, "act_bits": 8, "kv_bits": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changes")
    run_tiny(run_config(quant=QUANT), folder, tiny_teacher("qwen3"))
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    """The model as it was loaded; tests change copies of it."""
    return lbllm.load(checkpoint)[0]


@pytest.fixture
def model(loaded: Any) -> Any:
    return copy.deepcopy(loaded)


class Twice(nn.Module):
    """A wrapper: the output, or its first part, times 1.5."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return louder(self.inner(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Adapter(nn.Module):
    """A linear layer with a low-rank addition, as LoRA has it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        torch.manual_seed(0)
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Shift(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.5


def louder(output: Any) -> Any:
    return (louder(output[0]), *output[1:]) if isinstance(output, tuple) else output * 1.5 + 0.2


def hook(module: nn.Module, args: Any, output: Any) -> Any:
    return louder(output)


def pre_hook(module: nn.Module, args: Any) -> Any:
    return (louder(args[0]), *args[1:])


def everywhere(kind: str, change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, *rest: change(module, *rest) if type(module).__name__ == kind else None


def swapped(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    setattr(owner, name, wrapper(getattr(owner, name)))


def new_forward(module: Any) -> None:
    usual = module.forward
    module.forward = lambda *args, **kwargs: louder(usual(*args, **kwargs))


def tensor_for(norm: Any) -> None:
    del norm.weight
    norm.weight = torch.rand(48) * 3


def one_less(model: Any) -> None:
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


def one_more(model: Any) -> None:
    extra = copy.deepcopy(model.model.layers[0])
    extra.self_attn.layer_idx = len(model.model.layers)
    model.model.layers.append(extra)
    model.config.num_hidden_layers += 1
    model.config.layer_types = ["full_attention"] * len(model.model.layers)


@contextmanager
def global_hook(register: Callable[..., Any], change: Callable[..., Any]) -> Iterator[None]:
    handle = register(change)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


def block(model: Any) -> Any:
    return model.model.layers[1]


def louder_forward(kind: Any) -> Any:
    usual = kind.forward
    return lambda self, *args, **kwargs: louder(usual(self, *args, **kwargs))


def own_attention(model: Any) -> None:
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        average = value.mean(2, keepdim=True).repeat_interleave(2, 1).transpose(1, 2)
        return average.expand(-1, query.shape[2], -1, -1), None

    ALL_ATTENTION_FUNCTIONS.register("averages", attend)
    model.config._attn_implementation = "averages"


# What is done to a model. A context manager ends with the test, the rest is done to a copy.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook on a block": lambda m: block(m).register_forward_hook(hook),
    "hook on attention": lambda m: block(m).self_attn.register_forward_hook(hook),
    "hook with keywords": lambda m: block(m).mlp.register_forward_hook(
        lambda module, args, kwargs, output: louder(output), with_kwargs=True
    ),
    "hook on a packed layer": lambda m: block(m).mlp.down_proj.register_forward_hook(hook),
    "hook on the activation": lambda m: block(m).mlp.act_fn.register_forward_hook(hook),
    "hook on the norm of keys": lambda m: block(m).self_attn.k_norm.register_forward_hook(hook),
    "hook on the last norm": lambda m: m.model.norm.register_forward_hook(hook),
    "pre-hook on a packed layer": lambda m: block(m).self_attn.o_proj.register_forward_pre_hook(pre_hook),
    "pre-hook on a norm": lambda m: block(m).post_attention_layernorm.register_forward_pre_hook(pre_hook),
    "hook on all modules": lambda m: global_hook(register_module_forward_hook, everywhere("Qwen3MLP", hook)),
    "pre-hook on all modules": lambda m: global_hook(
        register_module_forward_pre_hook, everywhere("Qwen3MLP", pre_hook)
    ),
    "wrapper of a block": lambda m: m.model.layers.__setitem__(1, Twice(block(m))),
    "wrapper of attention": lambda m: swapped(block(m), "self_attn", Twice),
    "wrapper of the MLP": lambda m: swapped(block(m), "mlp", Twice),
    "wrapper of a norm": lambda m: swapped(block(m), "input_layernorm", Twice),
    "wrapper of the last norm": lambda m: swapped(m.model, "norm", Twice),
    "adapter on a packed layer": lambda m: swapped(block(m).self_attn, "v_proj", Adapter),
    "forward of one MLP": lambda m: new_forward(block(m).mlp),
    "forward of one packed layer": lambda m: new_forward(block(m).mlp.up_proj),
    "forward of a class": lambda m: patched(type(block(m).mlp), "forward", louder_forward(type(block(m).mlp))),
    "function of the model's code": lambda m: patched(
        __import__(type(block(m)).__module__, fromlist=["_"]), "apply_rotary_pos_emb", lambda q, k, *_: (q, k)
    ),
    "parametrization of a norm": lambda m: parametrize.register_parametrization(
        block(m).input_layernorm, "weight", Shift()
    ),
    "another activation": lambda m: setattr(block(m).mlp, "act_fn", nn.ReLU()),
    "another attention": own_attention,
    "norm in place": lambda m: block(m).input_layernorm.weight.data.mul_(2),
    "norm replaced": lambda m: setattr(block(m).self_attn.q_norm, "weight", nn.Parameter(torch.rand(16) * 3)),
    "a tensor for a norm": lambda m: tensor_for(block(m).input_layernorm),
    "last norm in place": lambda m: m.model.norm.weight.data.mul_(2),
    "epsilon of one norm": lambda m: setattr(block(m).post_attention_layernorm, "variance_epsilon", 1.0),
    "scaling of one attention": lambda m: setattr(block(m).self_attn, "scaling", 2.0),
    "clips in place": lambda m: block(m).mlp.up_proj.quantizer.act.data.mul_(0.5),
    "clips replaced": lambda m: setattr(
        block(m).mlp.up_proj.quantizer, "act", nn.Parameter(torch.tensor([1, 0.3, 0.3]))
    ),
    "a block less": one_less,
    "fewer blocks in the config": lambda m: setattr(m.config, "num_hidden_layers", 1),
    "a block more": one_more,
    "blocks changed places": lambda m: m.model.layers._modules.update({"0": block(m), "1": m.model.layers[0]}),
    "packed levels in place": lambda m: block(m).mlp.up_proj.params.mul_(2),
}


def answers(model: Any, fused: bool = True) -> Tensor:
    """Logits (8, vocabulary) of a prompt's end and seven more tokens, or those of the class's own forward."""
    usual = model.model.forward
    assert isinstance(usual, FusedForward)
    if not fused:
        del model.model.forward
    try:
        ids = token_ids(1, seed=3)
        first = model(ids[:, :20], use_cache=True)
        rows = [first.logits[0, -1:]]
        cache = first.past_key_values
        rows += [model(ids[:, k : k + 1], past_key_values=cache, use_cache=True).logits[0] for k in range(20, 27)]
        return torch.cat(rows)
    finally:
        model.model.forward = usual


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    "moment", ["after some tokens", pytest.param("before the first token", marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_model_answers_as_its_class_does(model: Any, change: str, moment: str) -> None:
    before = answers(model)
    if moment == "before the first token":
        model = copy.deepcopy(model)  # it has not answered
    done = CHANGES[change](model)
    with done if isinstance(done, AbstractContextManager) else nullcontext():
        mine, plain = answers(model), answers(model, fused=False)
    assert apart(plain, before) > 0.02
    assert apart(mine, plain) < 0.01


@torch.no_grad()
def test_a_hook_sees_every_token_and_then_the_operator_is_back(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[bool] = count_fused(monkeypatch)
    seen: list[int] = []
    handle = block(model).self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    answers(model)
    assert (len(seen), fused) == (8, [])
    handle.remove()
    answers(model)
    assert (len(seen), len(fused)) == (8, 7)
    base = block(model).mlp.up_proj
    block(model).mlp.up_proj = Adapter(base)
    answers(model)
    block(model).mlp.up_proj = base
    assert len(fused) == 7
    answers(model)
    assert len(fused) == 14


@torch.no_grad()
def test_states_and_attentions_are_given_when_they_are_asked_for(model: Any) -> None:
    model.set_attn_implementation("eager")
    cache = model(token_ids(1, seed=3), use_cache=True).past_key_values
    token = torch.tensor([[7]])
    for wanted in (True, 1, [0, 1]):
        output = model(token, past_key_values=cache, use_cache=True, output_hidden_states=wanted)
        assert len(output.hidden_states) == len(model.model.layers) + 1
    assert len(model(token, past_key_values=cache, output_attentions=True).attentions) == len(model.model.layers)


@torch.no_grad()
def test_weights_given_for_one_call_are_the_ones_used(model: Any) -> None:
    ids = token_ids(1, seed=3)
    before = answers(model)
    given = {name: tensor.clone() for name, tensor in copy.deepcopy(model).state_dict().items()}
    given["model.layers.1.mlp.up_proj.params"] *= 2
    given["model.layers.0.input_layernorm.weight"] *= 2
    got = torch.func.functional_call(model, given, (ids,), {"use_cache": False}, tie_weights=False).logits
    other = copy.deepcopy(model)
    other.load_state_dict(given)
    torch.testing.assert_close(got, other(ids).logits, rtol=0, atol=1e-2 * float(got.abs().max()))
    assert torch.equal(answers(model), before)


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
@torch.no_grad()
def test_a_model_can_be_pickled_saved_and_copied(tmp_path: Path, kv_bits: int) -> None:
    with torch.enable_grad():
        run_tiny(run_config(quant=QUANT | {"kv_bits": kv_bits, "act_bits": 4}), tmp_path, tiny_teacher("llama"))
    model: Any = lbllm.load(tmp_path / "checkpoint")[0]
    fresh = pickle.loads(pickle.dumps(model))
    before = answers(model)
    torch.save(model, tmp_path / "model.pt")
    cache = model(token_ids(1), use_cache=True).past_key_values
    again: list[Any] = [
        fresh,
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
        copy.deepcopy(model),
        copy.deepcopy(pickle.loads(pickle.dumps(model))),
    ]
    for number, twin in enumerate(again):
        assert torch.equal(answers(twin), before)
        assert twin.model.forward.decoder is twin.model
        twin.save_pretrained(tmp_path / str(number))
        assert not any(key not in model.state_dict() for key in twin.state_dict())
        block(twin).input_layernorm.weight.data.mul_(3)
    assert torch.equal(answers(model), before)
    other = pickle.loads(pickle.dumps(cache))
    token = torch.tensor([[7]])
    assert torch.equal(model(token, past_key_values=cache).logits, model(token, past_key_values=other).logits)
