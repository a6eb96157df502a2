"""Sample a training corpus from a teacher: the embedded corpus of this project, made by one command.

    python -m lbllm corpora sample --model smollm2-135m-instruct --tokens 1000000 --out assets/corpus.jsonl.gz
    python -m lbllm corpora sample --questions questions.txt --temperature 0.6 --tokens 100000 --out answers.jsonl.gz

The student has to match the distribution of the teacher's own samples, and these need no download and no foreign
licence (data-free distillation, LLM-QAT, Liu et al. 2023). Half of the rows are conversations in the chat
template: a seed question, the teacher's answer, then the teacher also writes the next user turn (Magpie, Xu et al.
2024). The other half are documents that continue a short opening. If you give questions, all rows are
conversations on them. Rows advance in lock step and have the same length, so nothing is padded: when a turn or a
document ends, forced template or seed tokens follow in the row.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from lbllm.errors import CorpusError
from lbllm.files import new_file, remove_drafts, write_file
from lbllm.json_input import decode_object
from lbllm.machine import bfloat16_products
from lbllm.models.blocks import check_length
from lbllm.places import ASSETS
from lbllm.texts.corpus import document_separator


class PreallocatedLayer(DynamicLayer):
    """Key/value cache of one layer with room for ``capacity`` positions: a step writes in place instead of copying
    all."""

    capacity = 2048

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (batch, heads, new, head_dim) states; returns views of all positions so far."""
        new = key_states.shape[-2]
        if not self.is_initialized:
            batch, heads, _, dim = key_states.shape
            self.key_room = key_states.new_empty(batch, heads, self.capacity, dim)
            self.value_room = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
            self.length = 0
            self.is_initialized = True
            self.dtype, self.device = key_states.dtype, key_states.device
        self.key_room[:, :, self.length : self.length + new] = key_states
        self.value_room[:, :, self.length : self.length + new] = value_states
        self.length += new
        self.keys = self.key_room[:, :, : self.length]
        self.values = self.value_room[:, :, : self.length]
        return self.keys, self.values


def chat_pieces(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str, str]:
    """The literal text of the chat template before a conversation's first question, between question and answer,
    between answer and next question, and after a conversation's last answer."""
    marks = ["QUESTIONONE", "ANSWERONE", "QUESTIONTWO"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    head, rest = text.split(marks[0])
    middle, rest = rest.split(marks[1])
    end = str(tokenizer.apply_chat_template(messages[:2], tokenize=False)).split(marks[1])[1]
    return head, middle, rest.split(marks[2])[0], end


def _seeds(rng: random.Random, table: dict[str, list[str]]) -> tuple[str, str]:
    """A random user question and a random document opening."""
    topic = rng.choice(table["topics"])
    question = rng.choice(table["prompts"]) if rng.random() < 0.15 else rng.choice(table["questions"])
    opener = rng.choice(table["openers"])
    fill = {"t": topic, "T": topic[0].upper() + topic[1:]}
    return question.format(**fill), opener.format(**fill)


def draw(logits: torch.Tensor, temperature: float, min_p: float, generator: torch.Generator) -> torch.Tensor:
    """One token per row, (rows,) int64, from (rows, vocabulary) logits, after Nguyen et al. 2024 (min-p).

    Works only on the few tokens above the threshold: a softmax and a cumulative sum over a large vocabulary take as
    long as a large part of a small model.
    """
    least = logits.amax(-1, keepdim=True) + temperature * math.log(min_p)
    row, token = (logits >= least).nonzero(as_tuple=True)
    weight = torch.exp((logits[row, token] - least[row, 0]).double() / temperature)
    counts = torch.bincount(row, minlength=len(logits))
    last = counts.cumsum(0) - 1
    total = weight.cumsum(0)
    before = torch.cat([total.new_zeros(1), total[last[:-1]]])
    point = before + torch.rand(len(logits), generator=generator, dtype=torch.float64) * (total[last] - before)
    place = torch.searchsorted(total, point, right=True)
    return token[torch.minimum(torch.maximum(place, last - counts + 1), last)]


def sample_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    length: int,
    seed: int,
    questions: Sequence[str] = (),
    temperature: float = 1.0,
    min_p: float = 0.002,
) -> Iterator[dict[str, str]]:
    """Sample ``rows`` rows of ``length`` tokens in lock step; yields {"kind": "chat" | "text", "text": str}.

    If ``questions`` are given, a row is a series of conversations, each with one question and its answer. Tokens
    below ``min_p`` times the most likely token's probability are never drawn. Matrix products are in bfloat16 if the
    CPU supports it; deterministic in ``seed`` on one machine. Raises CorpusError for questions to a model without a
    chat template.
    """
    if questions and tokenizer.chat_template is None:
        raise CorpusError("questions need a model with a chat template, which this one lacks; leave --questions out")
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    table = json.loads((ASSETS / "seeds.json").read_text())
    seeds = lambda: (rng.choice(questions), "") if questions else _seeds(rng, table)  # noqa: E731
    templated = tokenizer.chat_template is not None
    head, middle, after, end = chat_pieces(tokenizer) if templated else ("", "", "", "")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    end_ids = {tokenizer.eos_token_id, document_separator(tokenizer) if templated else None}
    # The template's end of turn is sampled; only what follows it in the template is forced.
    eos = tokenizer.eos_token or ""
    to_answer = encode(middle.removeprefix(eos))
    to_question = encode(after.removeprefix(eos))
    to_conversation = end.removeprefix(eos) + head

    kinds = ["chat" if templated and (questions or row % 2 == 0) else "text" for row in range(rows)]
    forced: list[deque[int]] = []
    answering = [True] * rows
    for kind in kinds:
        question, opener = seeds()
        text = head + question + middle if kind == "chat" else opener
        forced.append(deque(encode(text) or [tokenizer.eos_token_id]))

    PreallocatedLayer.capacity = length
    cache = Cache(layer_class_to_replicate=PreallocatedLayer)
    tokens = torch.empty(rows, length, dtype=torch.long)
    current = torch.tensor([[queue.popleft()] for queue in forced])
    with torch.inference_mode(), bfloat16_products(model):
        for step in range(length):
            tokens[:, step] = current[:, 0]
            if step + 1 == length:
                break
            logits = model(input_ids=current, past_key_values=cache, use_cache=True).logits[:, -1]
            drawn = draw(logits, temperature, min_p, generator).tolist()
            for row in range(rows):
                if forced[row]:
                    drawn[row] = forced[row].popleft()
                elif drawn[row] in end_ids:
                    if kinds[row] == "text":
                        forced[row].extend(encode(seeds()[1]))
                    elif questions:
                        drawn[row] = tokenizer.eos_token_id
                        forced[row].extend(encode(to_conversation + seeds()[0] + middle))
                    else:
                        drawn[row] = tokenizer.eos_token_id
                        forced[row].extend(to_question if answering[row] else to_answer)
                        answering[row] = not answering[row]
            current = torch.tensor(drawn)[:, None]
    for row in range(rows):
        yield {"kind": kinds[row], "text": str(tokenizer.decode(tokens[row], skip_special_tokens=False))}


def sample_corpus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    tokens: int,
    length: int = 512,
    batch: int = 256,
    seed: int = 0,
    questions: Sequence[str] = (),
    temperature: float = 1.0,
) -> Iterator[int]:
    """Write about ``tokens`` sampled tokens to ``out`` (.jsonl.gz); yields the tokens done after each batch of rows.

    Each finished batch lies in ``out``'s folder as ``<name>.part<k>``; a second call with the same model and settings
    continues from there, one with others raises CorpusError. A damaged part is sampled again. Several
    processes may work on one file, each on its own batches; the last one to finish writes it. Small batches on one
    thread each (OMP_NUM_THREADS=1) make better use of the cores than one process on all of them.
    """
    check_length(model, length, "--length")
    _check_out(out)
    parts = [out.with_name(f"{out.name}.part{index}") for index in range(-(-tokens // (batch * length)))]
    mark = _settings_hash(model, tokenizer, length, batch, seed, questions, temperature)
    for part in parts:
        _read_part(part, mark)
    for index, part in enumerate(parts):
        with _lock_of(part).open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if out.exists():  # another process has just written it
                lock.close()
                _lock_of(part).unlink()
                return
            if _read_part(part, mark) is None:
                rows = list(
                    sample_rows(
                        model,
                        tokenizer,
                        rows=batch,
                        length=length,
                        seed=seed + index,
                        questions=questions,
                        temperature=temperature,
                    )
                )
                _write_part(part, mark, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        yield sum(part.exists() for part in parts) * batch * length
    with _lock_of(out).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(part.exists() for part in parts):
            return  # another process still works on a batch, or has just written the file
        _check_out(out)
        with (
            new_file(out) as file,
            file.open("wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
        ):
            for part in parts:
                rows_of = _read_part(part, mark)
                if rows_of is None:
                    raise CorpusError(f"{part} was damaged just now; sample again to make it anew")
                packed.write(rows_of)
        for part in parts:
            part.unlink()
            remove_drafts(part)
            _lock_of(part).unlink()
    _lock_of(out).unlink(missing_ok=True)


def _check_out(out: Path) -> None:
    if out.exists():
        raise CorpusError(f"{out} exists already; delete it, or choose another --out")


def _settings_hash(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    batch: int,
    seed: int,
    questions: Sequence[str],
    temperature: float,
) -> str:
    """A hash over all that decides what is sampled."""
    weights = {name: torch.hash_tensor(w).view(torch.int64).item() for name, w in model.named_parameters()}
    vocabulary = sorted(tokenizer.get_vocab().items())
    sampled = [length, batch, seed, list(questions), temperature]
    text = json.dumps([weights, vocabulary, tokenizer.chat_template, sampled], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _write_part(part: Path, mark: str, rows: bytes) -> None:
    """Write the rows of a batch after a line with the hashes of the settings and of the rows."""
    head = {"settings": mark, "sha256": hashlib.sha256(rows).hexdigest()}
    write_file(part, json.dumps(head).encode() + b"\n" + rows)


def _read_part(part: Path, mark: str) -> bytes | None:
    """The rows of a finished batch; None if it is missing or damaged, so that it is sampled again. Raises CorpusError
    if it was sampled with other settings."""
    try:
        head, _, rows = part.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    try:
        stated = decode_object(head)
    except ValueError:
        return None
    # A part of version 0.2 begins with its first row.
    if "kind" in stated or ("settings" in stated and stated["settings"] != mark):
        raise CorpusError(
            f"{part} was sampled from another model, with other settings or by an earlier version; give the same "
            "settings to continue it, choose another --out, or delete the parts to begin anew"
        )
    return rows if stated == {"settings": mark, "sha256": hashlib.sha256(rows).hexdigest()} else None


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")
