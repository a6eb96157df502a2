"""llama.cpp beside transformers: ``python -m benchmarks.gguf_agree --llama-cpp FOLDER [CHECKPOINT|RUN]``.

The checkpoint (by default the one included with the project) is exported by the commands `export --to dense` and
`export --to gguf`. The dense folder answers in transformers, in float32, the GGUF file in llama.cpp, both greedily.
llama.cpp also splits the prompts into tokens by itself. It prints for each prompt whether both split it alike, how
many tokens of the answers agree from the first on, and, where the answers begin to differ, how likely both tokens are
in transformers. The two round differently (llama.cpp multiplies in bfloat16), so answers may differ at a near tie.

Into FOLDER

    npm install --ignore-scripts --omit=optional node-llama-cpp @node-llama-cpp/linux-x64

puts a prebuilt llama.cpp; node is needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.command_line import command_parser, one_message
from benchmarks.environment import folder_bytes
from benchmarks.llama_cpp import llama_cpp_command
from benchmarks.report import ROOT, settings_of, write_report
from lbllm.models.loading import quiet

PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "Explain what a neural network is in two sentences.",
    "List three fruits and their colours.",
    "How many legs has a spider?",
    "Wie heißt der höchste Berg der Alpen?",
    "Write a Python function that adds 17 and 25.",
)


def exported(checkpoint: str, kind: str, folder: Path) -> Path:
    """The folder that the command writes."""
    command = [sys.executable, "-m", "lbllm", "export", checkpoint, "--to", kind, "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def llama_cpp(modules: str, gguf: Path, texts: list[str], tokens: int) -> list[dict[str, list[int]]]:
    """What llama.cpp makes of each text: the ids of the prompt and of its answer."""
    command = llama_cpp_command("llama_cpp_answers.mjs", modules, gguf, tokens)
    result = subprocess.run(command, input=json.dumps(texts), stdout=subprocess.PIPE, text=True, check=True)
    answers: list[dict[str, list[int]]] = json.loads(result.stdout.splitlines()[-1])
    return answers


def as_asked(tokenizer: Any, prompt: str) -> str:
    """The prompt in the model's chat template, if it has one."""
    if not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", default="shipped", help="a packed folder, a run, or shipped")
    parser.add_argument("--llama-cpp", metavar="FOLDER", required=True, help="where npm has installed node-llama-cpp")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        dense = exported(arguments.checkpoint, "dense", Path(scratch) / "dense")
        (gguf,) = exported(arguments.checkpoint, "gguf", Path(scratch) / "gguf").glob("*.gguf")
        tokenizer = AutoTokenizer.from_pretrained(dense)
        with quiet():
            network: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
        texts = [as_asked(tokenizer, prompt) for prompt in PROMPTS]
        theirs = llama_cpp(arguments.llama_cpp, gguf, texts, arguments.tokens)
        sizes = {"dense_mb": round(folder_bytes(dense) / 1e6, 1), "gguf_mb": round(gguf.stat().st_size / 1e6, 1)}
        same = total = alike = split_alike = 0
        for prompt, text, their in zip(PROMPTS, texts, theirs, strict=True):
            ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")["input_ids"]
            split = ids[0].tolist() == their["prompt"]
            out = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                repetition_penalty=1.0,
                max_new_tokens=arguments.tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
            ours, answer = out.sequences[0, ids.shape[1] :].tolist(), their["answer"]
            pairs = list(zip(ours, answer, strict=False))
            common = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
            longest = max(len(ours), len(answer))
            same, total, alike = same + common, total + longest, alike + (split and ours == answer)
            split_alike += split
            print(f"\n{prompt}  [prompt split {'alike' if split else 'DIFFERENTLY'}; {common} of {longest} tokens]")
            print(f"  transformers: {tokenizer.decode(ours, skip_special_tokens=True)!r}")
            print(f"  llama.cpp:    {tokenizer.decode(answer, skip_special_tokens=True)!r}")
            if common < len(pairs):
                chances = out.logits[common][0].softmax(-1)
                first, second = (float(chances[one]) for one in pairs[common])
                print(f"  they differ where transformers gives its token {first:.3f} and llama.cpp's {second:.3f}")
    print(f"\n{alike} of {len(PROMPTS)} answers are the same; {same} of {total} tokens before the first difference")
    if arguments.out:
        prompts = {"prompts_split_alike": split_alike, "prompts": len(PROMPTS), "answers_same": alike}
        row = {"label": arguments.checkpoint} | sizes | prompts | {"tokens_same": same, "tokens": total}
        write_report(arguments.out, "gguf_agree", settings_of(arguments), [row])


if __name__ == "__main__":
    main()
