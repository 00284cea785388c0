"""What could be done to words: the edits that perturbations of names and of docstrings draw from.

To add one, write a function that proposes edits, each with its probability, and list it in ``perturbation.py``.
ReCode (Wang et al., 2022) takes synonyms from WordNet and forms from lemminflect and Pattern. Here they come from small
tables of words that are frequent in docstrings of functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from itertools import pairwise
from random import Random
from typing import NamedTuple

Span = tuple[int, int]


class Edit(NamedTuple):
    """Text to put in place of ``[start, end)``, and the probability that it is."""

    start: int
    end: int
    text: str
    chance: float


#: What could be done to the words at some places of a text.
Propose = Callable[[str, list[Span], Random], list[Edit]]

#: Probabilities as in ReCode, per character or per word.
TYPO, CASE, SPACE_OUT, SPACE_IN, SYNONYM = 0.05, 0.35, 0.1, 0.05, 0.5


def _families(text: str) -> list[list[str]]:
    return [[word.replace("_", " ") for word in family.split()] for family in text.split(",")]


#: Words that the ones after them may replace wherever docstrings have them.
THESAURUS = _families("""
    find locate, finds locates, check verify, checks verifies, create make build, creates makes builds,
    write implement, implement write, calculate compute, calculates computes, compute calculate, computes calculates,
    convert transform, converts transforms, transform convert, remove delete, removed deleted, contains holds,
    containing holding, largest biggest greatest, biggest largest, larger bigger, bigger larger, element item,
    elements items, item element, items elements, consecutive successive, unique distinct, begin start, begins starts,
    starts begins, given provided supplied, provided given, take accept, takes accepts, accepts takes,
    should ought_to, exactly precisely, result outcome, task job, occurrence appearance, occurrences appearances,
    appear occur, appears occurs, occurs appears, represents denotes, representing denoting, ignore disregard,
    possible feasible, sequence series, produce generate, produces generates, generate produce, assume suppose,
    closest nearest, entire whole, every each, select choose pick, choose select pick, combine merge, get obtain,
    return give_back, returns gives_back, returned given_back, determine establish, determines establishes,
    satisfy fulfil, satisfies fulfils, guaranteed assured, various diverse, idea notion
""")
#: Verbs: base, third person, past and gerund.
VERBS = _families("""
    return returns returned returning, take takes took taking, find finds found finding,
    check checks checked checking, create creates created creating, write writes wrote writing,
    contain contains contained containing, give gives gave giving, determine determines determined determining,
    represent represents represented representing, appear appears appeared appearing, begin begins began beginning,
    start starts started starting, implement implements implemented implementing,
    evaluate evaluates evaluated evaluating, calculate calculates calculated calculating,
    compute computes computed computing, convert converts converted converting, remove removes removed removing,
    replace replaces replaced replacing, ignore ignores ignored ignoring, satisfy satisfies satisfied satisfying,
    consist consists consisted consisting, produce produces produced producing, encode encodes encoded encoding,
    decode decodes decoded decoding, include includes included including, follow follows followed following,
    need needs needed needing, make makes made making, accept accepts accepted accepting,
    receive receives received receiving, filter filters filtered filtering, insert inserts inserted inserting,
    generate generates generated generating, add adds added adding, get gets got getting, sort sorts sorted sorting
""")
#: Nouns: singular and plural.
NOUNS = _families("""
    element elements, number numbers, string strings, integer integers, word words, letter letters, digit digits,
    character characters, value values, array arrays, vowel vowels, bracket brackets, substring substrings,
    prefix prefixes, interval intervals, function functions, argument arguments, input inputs, parameter parameters,
    point points, operation operations, sum sums, count counts, product products, length lengths, group groups,
    palindrome palindromes, bound bounds, note notes, file files, fruit fruits, side sides, row rows, day days,
    planet planets, name names, case cases, index indices, prime primes, factor factors, solution solutions
""")
#: Finite forms of be and have: past and future.
AUXILIARIES = {"is": ("was", "will be"), "are": ("were", "will be"), "has": ("had", "will have")}

_SYNONYMS = {word: others for word, *others in THESAURUS}
_FORMS = {word: [other for other in family if other != word] for family in (*NOUNS, *VERBS) for word in family}
# A verb's base is finite where it is an imperative: where it begins a sentence.
_FINITE = {word: verb for verb in VERBS for word in (verb[0].capitalize(), verb[1], verb[1].capitalize())}
_PAST = {word: past for word, (_, _, past, _) in _FINITE.items()} | {w: past for w, (past, _) in AUXILIARIES.items()}
_FUTURE = {word: f"will {base}" for word, (base, *_) in _FINITE.items()} | {
    w: will for w, (_, will) in AUXILIARIES.items()
}

_KEYS = {
    letter: (row, column + row / 2)
    for row, letters in enumerate(("qwertyuiop", "asdfghjkl", "zxcvbnm"))
    for column, letter in enumerate(letters)
}
#: The letters around each letter of a QWERTY keyboard.
NEIGHBOURS = {
    key: [other for other, (y, x) in _KEYS.items() if other != key and max(abs(y - row), abs(x - column)) <= 1]
    for key, (row, column) in _KEYS.items()
}


def butter_finger(text: str, words: list[Span], rng: Random) -> list[Edit]:
    """Letters typed as their neighbours."""
    places = [(at, NEIGHBOURS[text[at].lower()]) for at in _letters(words) if text[at].lower() in NEIGHBOURS]
    return [Edit(at, at + 1, _like(rng.choice(near), text[at]), TYPO) for at, near in places]


def swap_characters(text: str, words: list[Span], rng: Random) -> list[Edit]:
    """Letters in the wrong order."""
    pairs = [(a, b) for a, b in pairwise(_letters(words)) if b == a + 1 and text[a] != text[b]]
    return [Edit(a, b + 1, text[b] + text[a], TYPO) for a, b in pairs]


def change_case(text: str, words: list[Span], rng: Random) -> list[Edit]:
    """Capitals for small letters and the other way round."""
    return [Edit(at, at + 1, text[at].swapcase(), CASE) for at in _letters(words)]


def whitespace(text: str, words: list[Span], rng: Random) -> list[Edit]:
    """Spaces lost between words and gained in them."""
    gaps = [(a, b) for (_, a), (b, _) in pairwise(words) if text[a:b] == " " * (b - a)]
    inner = [at for start, end in words for at in range(start + 1, end)]
    return [Edit(a, b, "", SPACE_OUT) for a, b in gaps] + [Edit(at, at, " ", SPACE_IN) for at in inner]


def synonym(text: str, words: list[Span], rng: Random) -> list[Edit]:
    """Words for other words of the same meaning."""
    known = _known(_SYNONYMS, text, words)
    return [Edit(*span, _like(rng.choice(_SYNONYMS[word.lower()]), word), SYNONYM) for span, word in known]


def synonym_insertion(text: str, words: list[Span], rng: Random) -> list[Edit]:
    """Words followed by others of the same meaning."""
    known = _known(_SYNONYMS, text, words)
    return [Edit(end, end, f" {rng.choice(_SYNONYMS[word.lower()])}", SYNONYM) for (_, end), word in known]


def inflection(text: str, words: list[Span], rng: Random) -> list[Edit]:
    """Nouns and verbs in other forms, all that are known."""
    known = _known(_FORMS, text, words)
    return [Edit(*span, _like(rng.choice(_FORMS[word.lower()]), word), 1.0) for span, word in known]


def tense_past(text: str, words: list[Span], rng: Random) -> list[Edit]:
    """Imperatives and the third person in the past tense."""
    return _tense(_PAST, text, words)


def tense_future(text: str, words: list[Span], rng: Random) -> list[Edit]:
    """Imperatives and the third person in the future tense."""
    return _tense(_FUTURE, text, words)


def camel_case(text: str, words: list[Span], rng: Random) -> list[Edit]:
    """A name from snake_case to camelCase, or the other way round."""
    if "_" in text.strip("_"):
        other = re.sub(r"(?<=[^_])_+([^_])", lambda match: match[1].upper(), text)
    else:
        other = re.sub(r"(?<=[^_])[A-Z]", lambda match: f"_{match[0].lower()}", text)
    return [Edit(0, len(text), other, 1.0)] if other != text else []


def draw(edits: list[Edit], rng: Random) -> list[Edit]:
    """Those that the dice choose, at least one."""
    return [edit for edit in edits if rng.random() < edit.chance] or [rng.choice(edits)]


def carry_out(edits: list[Edit], text: str) -> str:
    """The text after edits, from left to right; one that begins inside another is left out."""
    parts, at = [], 0
    for start, end, new, _ in sorted(edits):
        if start >= at:
            parts += [text[at:start], new]
            at = end
    return "".join([*parts, text[at:]])


def _letters(words: list[Span]) -> list[int]:
    return [at for start, end in words for at in range(start, end)]


def _known(table: Collection[str], text: str, words: list[Span]) -> list[tuple[Span, str]]:
    return [(span, text[slice(*span)]) for span in words if text[slice(*span)].lower() in table]


def _tense(table: dict[str, str], text: str, words: list[Span]) -> list[Edit]:
    known = [(span, text[slice(*span)]) for span in words if text[slice(*span)] in table]
    return [Edit(*span, _like(table[word], word), 1.0) for span, word in known]


def _like(word: str, model: str) -> str:
    """The word, with a capital where the model has one."""
    return word[0].upper() + word[1:] if model[0].isupper() else word
