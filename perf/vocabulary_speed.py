"""Measures how long the vocabulary stage takes to count a corpus, and to close, shrink and grow a set of tokens.

    python perf/vocabulary_speed.py smollm2-135m
    python perf/vocabulary_speed.py smollm2-135m qwen2.5=some-folder --megabytes 100

The text is the Python files of the installed packages, read as a stream. The result goes to ``perf/results``.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flabc.compress import load, vocab
from flabc.compress.data import source
from flabc.compress.data.corpus import Document
from flabc.compress.location import locate
from flabc.compress.model import TokenizerFiles
from flabc.compress.stage import encoder
from flabc.runtime.measure.environment import environment

RESULT = Path(__file__).resolve().parent / "results" / "vocabulary-speed.json"


class Stream:
    """The begin of a corpus, never held as a whole."""

    def __init__(self, name: str, bytes_at_most: int) -> None:
        self.name = name
        self.left = self.asked = bytes_at_most

    def __iter__(self) -> Iterator[Document]:
        """Documents until the bytes are read; the corpus is read again if it is too short."""
        self.left = self.asked
        while self.left > 0:
            for name, text in source.read(self.name):
                yield Document(name, text, self.name)
                self.left -= len(text.encode())
                if self.left <= 0:
                    return


def main() -> None:
    """Measure each tokenizer in turn and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="[NAME=]MODEL; only its tokenizer is read")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--corpus", default="python-packages")
    asked = parser.parse_args()
    stream = Stream(asked.corpus, asked.megabytes * 10**6)
    rows = {}
    for model in asked.models:
        name, _, place = model.rpartition("=")
        rows[name or place] = measure(load.read_tokenizer(locate(place)), stream)
    result = {"corpus": asked.corpus, "tokenizers": rows, "environment": environment()}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(RESULT)


def measure(files: TokenizerFiles, stream: Stream) -> dict[str, Any]:
    """Seconds for each step of a plan that counts the stream and keeps half of the vocabulary."""
    tokenizer = encoder(files)
    size = tokenizer.get_vocab_size()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    (counts,) = vocab.count_tokens(tokenizer, stream, size).values()
    counting = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    steps = {"start": time.perf_counter()}
    subwords = vocab.subwords_of(files.tokenizer)
    everything = subwords.closure(range(size))
    steps["close_everything_s"] = time.perf_counter()
    seen = subwords.closure(vocab.frequent(counts, 1.0)) | subwords.symbols
    half = subwords.shrink(seen, set(subwords.symbols), dict(enumerate(counts.tolist())), len(seen) // 2)
    steps["shrink_by_half_s"] = time.perf_counter()
    subwords.grow(half, len(everything), vocab.by_frequency(counts))
    steps["grow_to_everything_s"] = time.perf_counter()
    vocab.remap_tokenizer(TokenizerFiles(dict(files.tokenizer) | NO_IDS, {}), sorted(half))
    steps["remap_s"] = time.perf_counter()
    times = list(steps.items())
    return {
        "vocab_size": size,
        "megabytes": round((stream.asked - stream.left) / 1e6, 1),
        "tokens": int(counts.sum()),
        "counting_s": round(counting, 1),
        "peak_memory_growth_mib": round((after - before) / 1024),
        **{name: round(at - times[n][1], 2) for n, (name, at) in enumerate(times[1:])},
    }


#: Parts of a ``tokenizer.json`` that name ids which need not be among those kept here.
NO_IDS: dict[str, Any] = {"added_tokens": [], "post_processor": None, "padding": None}

if __name__ == "__main__":
    main()
