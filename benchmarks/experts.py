"""What training experts one after the other costs beside training them together, and how far Hessians are shrunk.

    python -m benchmarks.experts
    python -m benchmarks.experts --block 4 --experts 16 --chosen 4 --tokens 4096 --parts prior

The MLP of a block of the embedded model is cut into experts along its features. A router chooses some of them for each
token: those whose centres are nearest, of clusters of such inputs, so that experts see unlike tokens. This mixture is
its own teacher, on the inputs that the MLP has for real text. Errors are
relative, a token at a time, of the experts' sum, on the text that was trained on and on other text.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command_line import command_parser, count, one_message, progress
from benchmarks.report import settings_of, write_report
from lbllm.config import RunConfig
from lbllm.errors import ConfigError
from lbllm.models.blocks import capture_calls, decoder_blocks, first_inputs, layer_inputs, run_batches
from lbllm.models.experts import Expert, Experts, Form, linear_of
from lbllm.models.teacher import load_teacher
from lbllm.sections import LayerFormat, PtqConfig, WatConfig
from lbllm.stages import experts as stage
from lbllm.stages.distill import binary_layers, distill, token_error
from lbllm.stages.routing import Entered, enter, outputs, summed
from lbllm.stages.wat import thaw_layers
from lbllm.streams import Streams
from lbllm.texts.corpus import load_corpus

LENGTH = 256
PRIORS = (0.0, 0.05, 0.1, 0.25, 1.0, 4.0)
CPU = torch.device("cpu")
SHARPNESS = 10.0  # of the router: its logits are so many times the cosine to a centre
PARTS = ("prior", "training")


class Mixture(nn.Module):
    """A router (experts, hidden) and experts, which return their sum (b, T, hidden)."""

    def __init__(self, experts: Experts, chosen: int, router: Tensor) -> None:
        super().__init__()
        self.experts, self.chosen, self.router = experts, chosen, router

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts."""
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, index = (x @ self.router.t()).softmax(-1).topk(self.chosen, -1)
        result: Tensor = self.experts(x, index, weights / weights.sum(-1, keepdim=True))
        return result.view_as(hidden)


def centres(x: Tensor, clusters: int) -> Tensor:
    """Return a router (clusters, hidden): the directions of clusters of x (tokens, hidden), by spherical k-means."""
    scale = SHARPNESS / x.norm(dim=1).mean()
    x = nn.functional.normalize(x, dim=1)
    found = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:clusters]]
    for _ in range(10):
        nearest = (x @ found.t()).argmax(1)
        sums = torch.zeros_like(found).index_add_(0, nearest, x)
        found = nn.functional.normalize(sums, dim=1)
    return found * scale


def cut(mlp: Any, experts: int, chosen: int, inputs: Tensor) -> Mixture:
    """Return a mixture whose experts have equal parts of an MLP's features, for its inputs (tokens, hidden)."""
    rows = zip(mlp.gate_proj.weight.chunk(experts), mlp.up_proj.weight.chunk(experts), strict=True)
    made = [
        Expert({"gate_proj": linear_of(gate), "up_proj": linear_of(up), "down_proj": linear_of(down.contiguous())})
        for (gate, up), down in zip(rows, mlp.down_proj.weight.chunk(experts, 1), strict=True)
    ]
    rule = nn.Module()
    rule.act_fn = mlp.act_fn
    return Mixture(Experts(rule, Form(False, True, False, False), made), chosen, centres(inputs, experts))


class Trial:
    """A mixture with its inputs (n, T, hidden) and sums, of the text that is trained on and of other text."""

    def __init__(self, mixture: Mixture, seen: list[Tensor]) -> None:
        self.mixture, self.seen = mixture, seen
        self.streams = Streams(torch.float32, None)
        with torch.no_grad():
            self.sums = [mixture(x) for x in seen]
        self.entered = self._entered(mixture)
        self.fmt = LayerFormat(format="w1+1", group_size=16, param_bits=4, act_bits=16)

    def _entered(self, mixture: Mixture) -> Entered:
        return enter(mixture, self.seen[0], {}, 4, self.streams, contextlib.nullcontext)

    def initialize(self) -> tuple[Mixture, dict[str, Tensor]]:
        """Stage 1; returns the student and its latent weights by layer."""
        student, dense = copy.deepcopy(self.mixture), self.mixture.experts
        layer = stage.LayerInputs.of(self.entered, self.entered.x, CPU)
        rows, latents = self.entered.routed(dense.count), {}
        for number in range(dense.count):
            path = f"experts.{number}"
            formats = {f"{path}.{name}": self.fmt for name, _ in dense.expert(number).named_children()}
            found, *_ = stage.ptq_expert(dense, number, path, rows.get(number), layer, formats, PtqConfig(), CPU)
            for name, (result, frozen) in found.items():
                student.set_submodule(name, frozen)
                latents[name] = result.latent.float()
        return student, latents

    @torch.no_grad()
    def errors(self, student: Mixture) -> dict[str, float]:
        """The error on each of the two texts."""
        pairs = zip(("trained", "other"), self.seen, self.sums, strict=True)
        return {name: float(token_error(student(x), target)) for name, x, target in pairs}

    def together(self, student: Mixture, latents: dict[str, Tensor], config: WatConfig) -> None:
        """Train all experts in each step."""
        groups = thaw_layers(binary_layers(student), latents, config)
        for _ in distill(
            student,
            {},
            self.seen[0],
            self.sums[0],
            groups,
            config,
            loss_kind=config.loss,
            seed=0,
            autocast=contextlib.nullcontext,
        ):
            pass
        for layer in binary_layers(student).values():
            layer.freeze()
            layer.round_params()

    def one_by_one(self, student: Mixture, latents: dict[str, Tensor], config: WatConfig) -> None:
        """Train one expert after the other."""
        experts, plain = student.experts, contextlib.nullcontext
        total, wanted = summed(experts, self.entered, self.streams, CPU, plain), self.sums[0].flatten(0, -2)
        scale = torch.maximum(total.square().sum(-1), wanted.square().sum(-1)).clamp_min(1e-12)
        aim = stage.Aim(total, wanted, scale)
        for number, one in self.entered.routed(experts.count).items():
            expert = experts.expert(number)
            with torch.no_grad():
                own = outputs(experts, expert, self.entered, one, CPU, plain)
            start = {name: latents[f"experts.{number}.{name}"] for name in binary_layers(expert)}
            for _ in stage.train_expert(
                experts,
                expert,
                one,
                self.entered,
                aim,
                own,
                config,
                start,
                sequences=len(self.seen[0]),
                seed=0,
                device=CPU,
                autocast=plain,
            ):
                pass
            with torch.no_grad():
                aim.replace(self.entered, one, own, outputs(experts, expert, self.entered, one, CPU, plain))


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--experts", type=count, default=8)
    parser.add_argument("--chosen", type=count, default=2)
    parser.add_argument("--tokens", type=count, default=16_384)
    parser.add_argument("--parts", default=",".join(PARTS))
    options = parser.parse_args()
    teacher = load_teacher(RunConfig().model)
    blocks = decoder_blocks(teacher.model)[1]
    if not 0 <= options.block < len(blocks) or not options.chosen <= options.experts:
        raise ConfigError(f"--block is 0 to {len(blocks) - 1}, and --chosen at most --experts")
    text = load_corpus("embedded", teacher.tokenizer, seq_len=LENGTH, tokens=2 * options.tokens, seed=0).sequences
    calls, hidden = capture_calls(teacher.model, text[:1]), first_inputs(teacher.model, text, 4)
    with torch.no_grad():
        for number in range(options.block):
            hidden = torch.cat(list(run_batches(blocks[number], hidden, calls[number], 4)))
        inputs = torch.cat(list(layer_inputs(blocks[options.block], "mlp.up_proj", hidden, calls[options.block], 4)))
    seen = [*inputs.view(len(text), LENGTH, -1).chunk(2)]
    mlp = blocks[options.block].get_submodule("mlp")
    trial = Trial(cut(mlp, options.experts, options.chosen, seen[0].flatten(0, -2)), seen)
    tokens = [len(one.rows) for one in trial.entered.routed(options.experts).values()]
    progress(f"tokens of the experts: {min(tokens):,} to {max(tokens):,}")
    rows: list[dict[str, Any]] = []

    def keep(label: str, student: Mixture, began: float) -> None:
        rows.append({"label": label, **trial.errors(student), "seconds": round(time.perf_counter() - began, 1)})
        progress(f"{label:32} " + " ".join(f"{name} {value:.4f}" for name, value in list(rows[-1].items())[1:]))

    if "prior" in options.parts:
        usual = stage.PRIOR
        for prior in PRIORS:
            stage.PRIOR, began = prior, time.perf_counter()
            keep(f"stage 1, m = {prior} columns", trial.initialize()[0], began)
        stage.PRIOR = usual
    if "training" in options.parts:
        student, latents = trial.initialize()
        keep("stage 1", student, time.perf_counter())
        config = WatConfig(tokens=options.tokens, batch_tokens=512)
        ways: dict[str, Callable[..., None]] = {"together": trial.together, "one by one": trial.one_by_one}
        for name, train in ways.items():
            trained, began = copy.deepcopy(student), time.perf_counter()
            train(trained, latents, config)
            keep(f"stage 2, {name}", trained, began)
    if options.out:
        write_report(options.out, "experts", settings_of(options), rows)


if __name__ == "__main__":
    main()
