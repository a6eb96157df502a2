"""The embedded model as a mixture of experts, to binarize and to talk to.

    python -m benchmarks.mixture --minutes 120 --work out/mixture      continues where it was stopped
    python -m lbllm quantize --model out/mixture/model --preset quick

Each MLP is cut along its features: those of most energy become an expert that is always on, the others four experts of
features that are active together, of which a router chooses two for each token. A router starts as the regression of
the experts' energies on the MLP's inputs. Then the routers alone are trained, by the KL to the dense model's next
tokens. The result is a folder of transformers, of type qwen2_moe, beside its tokenizer.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.command_line import command_parser, one_message, progress
from benchmarks.report import settings_of, write_report
from lbllm.config import RunConfig
from lbllm.files import new_file, new_folder
from lbllm.measure.perplexity import HELD_OUT_TOKENS, perplexity
from lbllm.models.blocks import capture_calls, decoder_blocks, first_inputs, layer_inputs, run_batches
from lbllm.models.teacher import Teacher, load_teacher
from lbllm.stages.losses import LOSSES
from lbllm.texts.corpus import load_corpus

EXPERTS, CHOSEN = 4, 2
ALWAYS = 1 / 3  # of the features
LENGTH, CALIBRATION = 256, 4_096
RATE, BATCH = 1e-3, 2
SAVE_SECONDS = 60.0


def cut_features(energy: Tensor, active: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the features that are always on, and those of each expert, all of one size.

    ``energy`` (features,); ``active`` (tokens, features): what of each token's energy is theirs. Features join the
    expert whose mean activity theirs is most like, those with the clearest choice first.
    """
    count = int(len(energy) * ALWAYS)
    count += (len(energy) - count) % EXPERTS
    order = energy.argsort(descending=True)
    always, others = order[:count], order[count:]
    patterns = nn.functional.normalize((active[:, others] - active[:, others].mean(0)).t(), dim=1)
    centres = patterns[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:EXPERTS]]
    size = len(others) // EXPERTS
    members: list[Tensor] = []
    for _ in range(10):
        alike = patterns @ centres.t()
        left, members = dict.fromkeys(range(EXPERTS), size), [torch.zeros(0, dtype=torch.long)] * EXPERTS
        found: list[list[int]] = [[] for _ in range(EXPERTS)]
        best = alike.topk(2, 1).values
        for feature in (best[:, 0] - best[:, 1]).argsort(descending=True).tolist():
            choice = max((e for e in left if left[e]), key=lambda e: float(alike[feature, e]))
            found[choice].append(feature)
            left[choice] -= 1
        members = [torch.tensor(sorted(one)) for one in found]
        centres = nn.functional.normalize(torch.stack([patterns[one].mean(0) for one in members]), dim=1)
    return always, [others[one] for one in members]


@torch.no_grad()
def as_mixture(teacher: Teacher, text: Tensor) -> Any:
    """Return the mixture of a LLaMA-like model, calibrated on token ids (n, T)."""
    source: Any = teacher.model
    own = source.config
    width = own.intermediate_size
    shared = int(width * ALWAYS) + (width - int(width * ALWAYS)) % EXPERTS
    settings = {name: getattr(own, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "rms_norm_eps")}
    settings |= {name: getattr(own, name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_act")}
    settings |= {name: getattr(own, name) for name in ("rope_parameters", "max_position_embeddings")}
    settings |= {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(
        "qwen2_moe",
        **settings,
        tie_word_embeddings=own.tie_word_embeddings,
        qkv_bias=False,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        moe_intermediate_size=(width - shared) // EXPERTS,
        shared_expert_intermediate_size=shared,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    same = {name: value for name, value in source.state_dict().items() if ".mlp." not in name}
    missing, unexpected = model.load_state_dict(same, strict=False)
    assert not unexpected
    assert all(".mlp." in name for name in missing)
    hidden = first_inputs(source, text, 4)
    calls, blocks = capture_calls(source, text[:1]), decoder_blocks(source)[1]
    for number, block in enumerate(blocks):
        mlp: Any = block.get_submodule("mlp")
        x = torch.cat(list(layer_inputs(block, "mlp.up_proj", hidden, calls[number], 4)))
        features = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        activity = (features * mlp.down_proj.weight.norm(dim=0)).square()
        always, experts = cut_features(activity.mean(0), activity / activity.sum(1, keepdim=True))
        made: Any = model.model.layers[number].mlp
        for name in ("gate_proj", "up_proj"):
            getattr(made.shared_expert, name).weight.copy_(getattr(mlp, name).weight[always])
        # The gate of the part that is always on is sigmoid(0), and the chosen experts' weights are 1 / CHOSEN.
        made.shared_expert.down_proj.weight.copy_(2 * mlp.down_proj.weight[:, always])
        made.shared_expert_gate.weight.zero_()
        for expert, own_features in enumerate(experts):
            rows = [mlp.gate_proj.weight[own_features], mlp.up_proj.weight[own_features]]
            made.experts.gate_up_proj[expert].copy_(torch.cat(rows))
            made.experts.down_proj[expert].copy_(CHOSEN * mlp.down_proj.weight[:, own_features])
        energies = torch.stack([activity[:, one].sum(1) for one in experts], 1).sqrt()
        aim = energies / energies.mean() - (energies / energies.mean()).mean(1, keepdim=True)
        gram = x.t() @ x
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        made.gate.weight.copy_(torch.linalg.solve(gram, x.t() @ aim).t())
        hidden = torch.cat(list(run_batches(block, hidden, calls[number], 4)))
    return model


def routers(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained."""
    ends = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(ends)}


def train(model: Any, teacher: Teacher, text: Tensor, state: Path, seconds: float) -> int:
    """Train the routers for at most so many seconds, those of earlier calls included; returns the number of steps."""
    trained = routers(model.requires_grad_(False))
    optimizer = torch.optim.Adam([parameter.requires_grad_() for parameter in trained.values()], lr=RATE)
    step, spent = 0, 0.0
    if state.exists():
        kept = load_file(state)
        step, spent = int(kept["step"]), float(kept["seconds"])
        for name, parameter in trained.items():
            parameter.data.copy_(kept[name])
            moments = {key: kept[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = moments

    def keep() -> None:
        tensors = {"step": torch.tensor(step), "seconds": torch.tensor(spent, dtype=torch.float64)}
        for name, parameter in trained.items():
            tensors[name] = parameter.detach()
            tensors |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
        with new_file(state) as file:
            save_file(tensors, file)

    saved = spent
    while spent < seconds:
        began = time.perf_counter()
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(step // (len(text) // BATCH)))
        rows = order.view(-1)[step % (len(text) // BATCH) * BATCH :][:BATCH]
        with torch.no_grad():
            wanted = teacher.model(text[rows]).logits
        found = model(text[rows]).logits
        loss = torch.stack(
            [LOSSES["forward_kl"](a[:-1], b[:-1], ids[1:]) for a, b, ids in zip(found, wanted, text[rows], strict=True)]
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, spent = step + 1, spent + time.perf_counter() - began
        if step % 20 == 1:
            progress(f"step {step}, {spent:.0f} s: KL {float(loss.detach()):.3f}")
        if spent - saved > SAVE_SECONDS:
            keep()
            saved = spent
    if step:
        keep()
    return step


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=120.0, help="of training in all")
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument("--work", type=Path, default=Path("out/mixture"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    teacher = load_teacher(RunConfig().model)
    text = load_corpus(options.corpus, teacher.tokenizer, seq_len=LENGTH, tokens=options.tokens, seed=0).sequences
    held_out = load_corpus(
        options.corpus, teacher.tokenizer, seq_len=LENGTH, tokens=HELD_OUT_TOKENS, part="heldout"
    ).sequences
    model = as_mixture(teacher, text[: CALIBRATION // LENGTH])
    rows = [{"label": "dense", "perplexity": round(perplexity(teacher.model, held_out).perplexity, 3)}]
    rows.append(
        {"label": "mixture, routers by regression", "perplexity": round(perplexity(model, held_out).perplexity, 3)}
    )
    progress(str(rows))
    steps = train(model, teacher, text, options.work / "routers.safetensors", 60 * options.minutes)
    after = round(perplexity(model, held_out).perplexity, 3)
    rows.append({"label": f"mixture, routers trained for {steps} steps", "perplexity": after})
    with new_folder(options.work / "model", replace=True) as folder:
        model.save_pretrained(folder)
        teacher.tokenizer.save_pretrained(folder)
    for row in rows:
        print(f"{row['label']:48} {row['perplexity']:>10}")
    if options.out:
        write_report(options.out, "mixture", settings_of(options, "work"), rows)


if __name__ == "__main__":
    main()
