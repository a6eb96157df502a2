"""The catalogue of texts, and where each text is stored."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

from lbllm.errors import CorpusError
from lbllm.places import ASSETS, data_dir


@dataclass(frozen=True)
class CorpusEntry:
    """One text of the catalogue.

    It is read from ``asset`` (part of the project), or from the first of ``files`` that exists under LBLLM_DATA_DIR,
    or else from ``hub`` (dataset, configuration).
    """

    id: str
    note: str
    licence: str
    files: tuple[str, ...] = ()
    hub: tuple[str, str | None] | None = None
    asset: str | None = None


TEXTS: tuple[CorpusEntry, ...] = (
    CorpusEntry(
        "embedded",
        "1.2 million tokens sampled from the embedded model itself, half conversations, half documents; included in "
        "this program",
        "Apache-2.0, as the model",
        asset="corpus.jsonl.gz",
    ),
    CorpusEntry(
        "everyday",
        "360 thousand tokens of everyday questions and answers, most by the embedded model, the others by its "
        "binarized copy; included in this program",
        "Apache-2.0, as the model",
        asset="everyday.jsonl.gz",
    ),
    CorpusEntry(
        "embedded-more",
        "260 thousand more tokens, of the same kind as `embedded`; included in this program",
        "Apache-2.0, as the model",
        asset="embedded_more.jsonl.gz",
    ),
    CorpusEntry(
        "everyday-more",
        "520 thousand tokens of other everyday questions and answers, three quarters by the embedded model, the others "
        "by a better binarized copy of it; included in this program",
        "Apache-2.0, as the model",
        asset="everyday_more.jsonl.gz",
    ),
    CorpusEntry(
        "wikitext2",
        "WikiText-2 raw (Merity et al. 2016): the train split to train on, the test split to evaluate",
        "CC BY-SA 3.0",
        ("wikitext-2-raw/wiki.train.raw", "wikitext-2-raw/wiki.train.head.raw.txt"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    ),
    CorpusEntry(
        "c4",
        "C4, English web text (Raffel et al. 2020)",
        "ODC-BY 1.0",
        ("text/c4_demo_300.jsonl.gz",),
        ("allenai/c4", "en"),
    ),
    CorpusEntry(
        "redpajama",
        "a sample of SlimPajama, which is RedPajama (Together 2023) without duplicates",
        "those of its sources: Common Crawl, C4, GitHub, books, arXiv, Wikipedia, StackExchange",
        ("text/redpajama.jsonl.gz",),
        ("DKYoon/SlimPajama-6B", None),
    ),
    CorpusEntry(
        "wikipedia",
        "lead sections of Wikipedia's vital articles",
        "CC BY-SA 4.0",
        ("text/wikipedia_vital_articles_leads.jsonl.gz",),
    ),
    CorpusEntry(
        "openstax",
        "running text of 22 OpenStax textbooks (OpenStax, Rice University), 7.7 million tokens",
        "CC BY 4.0",
        ("text/openstax_ccby.jsonl.gz",),
    ),
    CorpusEntry("chat", "conversations, through the model's chat template", "see the folder's source list", ("chat",)),
)


def location(entry: CorpusEntry) -> str:
    """Return where a catalogue corpus would be read from now: a path, a hub dataset, or a note on what is missing."""
    local = local_path(entry)
    if local is not None:
        return str(local)
    return f"hub: {entry.hub[0]}" if entry.hub else "not here: set LBLLM_DATA_DIR to a folder with it"


def parts(name: str) -> list[str]:
    """Split a corpus name at each "+"; the name of an existing file or folder stays whole."""
    return [name] if find_text(name) else name.split("+")


def check_available(name: str) -> None:
    """Raise CorpusError if ``name`` contains a catalogue corpus that is neither on this machine nor on the hub."""
    for one in parts(name):
        entry = next((entry for entry in TEXTS if entry.id == one), None)
        if entry is not None and entry.hub is None and local_path(entry) is None:
            raise CorpusError(f"corpus {one} is {location(entry)}")


def find_text(name: str) -> CorpusEntry | Path | None:
    """Return the catalogue entry, file or folder of a name, or None. A path can be relative to LBLLM_DATA_DIR."""
    entry = next((entry for entry in TEXTS if entry.id == name), None)
    if entry is not None:
        return entry
    below = data_dir()
    try:
        candidates = [Path(name).expanduser(), *([below / name] if below else [])]
        return next((path for path in candidates if name and path.exists()), None)
    except RuntimeError:  # no home folder of a user
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # perhaps several names joined by "+"
            return None
        raise CorpusError(f"text {name!r} can't be looked for ({error.strerror})") from None


def local_path(entry: CorpusEntry) -> Path | None:
    """Return the path of a catalogue corpus on this machine, or None."""
    if entry.asset is not None:
        path = ASSETS / entry.asset
        return path if path.is_file() else None
    below = data_dir()
    paths = [below / file for file in entry.files] if below else []
    return next((path for path in paths if path.exists()), None)
