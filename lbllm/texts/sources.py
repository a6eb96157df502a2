"""Read the documents of a corpus from a file, the assets or the hub, in a fixed order."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lbllm.errors import CorpusError
from lbllm.extras import extra
from lbllm.models import hub
from lbllm.models.chat_template import render
from lbllm.places import ASSETS, data_dir
from lbllm.texts.catalogue import TEXTS, find_text, local_path
from lbllm.texts.documents import (
    Document,
    parse_row,
    read_documents,
    read_lines,
    sections,
    wikitext_articles,
    wikitext_rows,
)

_NO_HUB = (
    "{} can't be read from the hub ({}). Without a connection use the corpus 'embedded', or download the text on "
    "another machine and give its file or folder"
)


def open_text(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, Iterable[Document]]:
    """Return whether a corpus comes from the network, and its documents in a fixed order. Raises CorpusError."""
    found = find_text(name)
    if found is None:
        known = [entry.id for entry in TEXTS]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise CorpusError(
            f"corpus {name!r} is not known, and no file or folder has this name; "
            f"{'close names: ' + ', '.join(close) if close else 'known: ' + ', '.join(known)}"
        )
    if isinstance(found, Path):
        return False, read_documents(found)
    if found.id == "wikitext2":
        return False, wikitext_articles(wikitext_rows_of("train"), found.id)
    local = local_path(found)
    if found.asset is not None:
        if local is None:
            raise CorpusError(
                f"{ASSETS / found.asset} is missing; get the project's assets again, make it with "
                "`python -m lbllm corpora sample`, or choose another corpus"
            )
        return False, _sampled(read_documents(local), tokenizer)
    if local is not None:
        return False, read_documents(local)
    if found.hub is None:
        raise CorpusError(f"corpus {name} is not here: set LBLLM_DATA_DIR to a folder that contains {found.files[0]}")
    return True, _hub_rows(*found.hub)


def wikitext_rows_of(split: str) -> list[str]:
    """Return the rows of a WikiText-2 split; a local file and the hub give the same rows. Raises CorpusError."""
    below = data_dir()
    names = [f"wiki.{split}.raw"] + (["wiki.train.head.raw.txt"] if split == "train" else [])
    for name in names:
        path = below / "wikitext-2-raw" / name if below else None
        if path is not None and path.is_file():
            return wikitext_rows(read_lines(path))
    return [row["text"] for row in hub_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split, streaming=False)]


def _hub_rows(dataset: str, configuration: str | None) -> Iterator[Document]:
    rows = iter(hub_dataset(dataset, configuration, "train", streaming=True))
    for number in itertools.count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the network and the file formats raise exceptions of many types
            raise CorpusError(f"reading {dataset} from the hub stopped at row {number}: {error}") from error
        yield from parse_row(row, f"{dataset}, row {number}")


def hub_dataset(dataset: str, configuration: str | None, split: str, *, streaming: bool) -> Any:
    """Return the rows of a split of a hub dataset, as the datasets library gives them. Raises CorpusError."""
    if hub.ask(dataset, "dataset") == "unreachable":
        raise CorpusError(_NO_HUB.format(dataset, "it does not answer"))
    with extra("eval", f"reading {dataset} from the hub"):
        import datasets  # late: the import takes seconds and only this function needs it

    try:
        return datasets.load_dataset(dataset, configuration, split=split, streaming=streaming)
    except Exception as error:  # the network and the hub's client raise exceptions of many types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CorpusError(_NO_HUB.format(dataset, reason)) from error


def _sampled(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Yield the documents of a corpus that was sampled from the embedded model, for any tokenizer.

    The embedded model's tokenizer gets the rows unchanged. For other tokenizers the chat markup is removed: a
    conversation becomes messages for the tokenizer's own template, and a row of documents is split into documents.
    """
    rows = list(documents)
    head = None
    if tokenizer.chat_template is not None:
        rendered = render(tokenizer, [{"role": "user", "content": "QUESTION"}])
        head = rendered.split("QUESTION")[0]
    chats = [row.text.startswith("<|im_start|>") for row in rows]
    own = head is not None and any(row.text.startswith(head) for row, chat in zip(rows, chats, strict=True) if chat)
    for row, chat in zip(rows, chats, strict=True):
        if own:
            yield replace(row, templated=chat)
        elif chat:
            for talk in row.text.split("<|im_start|>system\n"):
                turns = re.findall(r"<\|im_start\|>(user|assistant)\n(.*?)(?:<\|im_end\|>|\Z)", talk, re.DOTALL)
                if turns:
                    yield Document(messages=tuple(turns), place=row.place)
        else:
            for text in re.split(r"(?:<\|im_end\|>|<\|endoftext\|>|<\|im_start\|>(?:\w+\n)?)+", row.text):
                yield from sections(text, row.place)
