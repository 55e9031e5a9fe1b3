"""Short Python functions from a docstring with an example, put together from kinds of parts.

A function goes through a source (numbers of a list, numbers up to n, digits of n, characters or words of a string),
keeps some, changes each and gathers the rest; or it chooses between two expressions of n. Each part has parameters and
may be told in several ways; names of functions and arguments are drawn.

Held out is one in 6 combinations of kinds with at least two parts that do something, whatever their parameters: a
training function has none of them, and one that is asked in evaluation does.
"""

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .tasks import Task, listed

HELD_OUT_ONE_IN = 6
CHECKS = 5

VERBS = listed(
    "get find make take pick build check read scan give show keep work run solve count collect gather list choose"
)
NOUNS = listed(
    "numbers values result items data total part answer words text letters list score price level stock report sample "
    "group order input output rows marks points signal record batch table chart"
)
ARGUMENTS = {
    "list": listed("numbers values items nums data scores prices marks points xs"),
    "string": listed("text s line word string name title phrase sentence label"),
    "number": listed("n number value limit size count k amount"),
}
WORDS = listed(
    "apple book stamp shell card pencil coin bead button cookie egg ticket stone flower toy lemon Tree House blue red "
    "green sun moon star river Cat dog Bird fish table Lamp open close run walk sing old new tiny Large quick slow"
)
LETTERS = "abcdefghilmnoprstu"


@dataclass(frozen=True)
class Part:
    """How a part is told and written; `{k}` and `{m}` are its parameters, `{v}` what it works on."""

    told: tuple[str, ...]
    code: str


# Of numbers: which are kept; told behind "the numbers in xs that are ..." or before the noun.
NUMBER_FILTERS = {
    "all": Part(("",), ""),
    "even": Part(("that are even", "divisible by two"), "x % 2 == 0"),
    "odd": Part(("that are odd", "not divisible by two"), "x % 2 == 1"),
    "positive": Part(("that are positive", "above zero"), "x > 0"),
    "negative": Part(("that are negative", "below zero"), "x < 0"),
    "above": Part(("greater than {k}", "above {k}"), "x > {k}"),
    "below": Part(("less than {k}", "below {k}"), "x < {k}"),
    "least": Part(("of at least {k}", "not less than {k}"), "x >= {k}"),
    "most": Part(("of at most {k}", "not greater than {k}"), "x <= {k}"),
    "divisible": Part(("divisible by {d}", "that are multiples of {d}"), "x % {d} == 0"),
    "indivisible": Part(("not divisible by {d}", "that are no multiples of {d}"), "x % {d} != 0"),
    "between": Part(("from {k} to {m}", "between {k} and {m}"), "{k} <= x <= {m}"),
    "other": Part(("other than {k}", "different from {k}"), "x != {k}"),
    "last": Part(("ending in {d}", "with {d} as last digit"), "x % 10 == {d}"),
}
NUMBER_MAPS = {
    "same": Part(("",), "x"),
    "square": Part(("the squares of", "the square of each of"), "x * x"),
    "cube": Part(("the cubes of", "the cube of each of"), "x ** 3"),
    "double": Part(("twice", "the doubles of"), "x * 2"),
    "times": Part(("{d} times", "{d}-fold"), "x * {d}"),
    "plus": Part(("{k} plus each of", "{k} added to each of"), "x + {k}"),
    "minus": Part(("{k} less than each of", "{k} taken from each of"), "x - {k}"),
    "negated": Part(("minus each of", "the negatives of"), "-x"),
    "size": Part(("the absolute values of", "the sizes of"), "abs(x)"),
    "half": Part(("the halves, rounded down, of", "half, rounded down, of each of"), "x // 2"),
    "quotient": Part(("the whole parts of a {d}th of", "the quotients by {d} of"), "x // {d}"),
    "rest": Part(("the remainders by {d} of", "what dividing by {d} leaves of"), "x % {d}"),
    "capped": Part(("at most {k} for each of", "the smaller of {k} and each of"), "min(x, {k})"),
    "floored": Part(("at least {k} for each of", "the larger of {k} and each of"), "max(x, {k})"),
}
CHARACTER_FILTERS = {
    "all": Part(("",), ""),
    "vowel": Part(("that are vowels", "that are one of aeiou"), 'x in "aeiou"'),
    "consonant": Part(("that are no vowels", "that are none of aeiou"), 'x not in "aeiou"'),
    "digit": Part(("that are digits", "from 0 to 9"), "x.isdigit()"),
    "letter": Part(("that are letters", "of the alphabet"), "x.isalpha()"),
    "upper": Part(("in upper case", "that are capitals"), "x.isupper()"),
    "lower": Part(("in lower case", "that are small letters"), "x.islower()"),
    "printed": Part(("other than spaces", "that are no spaces"), 'x != " "'),
    "is": Part(("equal to {c}", "that are {c}"), 'x == "{c}"'),
    "is not": Part(("other than {c}", "that are not {c}"), 'x != "{c}"'),
    "after": Part(("after {c}", "that come after {c}"), 'x > "{c}"'),
    "either": Part(("that are {c} or {e}", "equal to {c} or {e}"), 'x in "{c}{e}"'),
}
CHARACTER_MAPS = {
    "same": Part(("",), "x"),
    "upper": Part(("the capitals of", "the upper case of"), "x.upper()"),
    "lower": Part(("the small letters of", "the lower case of"), "x.lower()"),
    "double": Part(("two copies of each of", "the doubles of"), "x * 2"),
    "times": Part(("{d} copies of each of", "each, {d} times, of"), "x * {d}"),
    "swapped": Part(("the other case of", "the swapped case of"), "x.swapcase()"),
    "before": Part(("{c} before each of", "each, behind {c}, of"), '"{c}" + x'),
    "behind": Part(("{c} behind each of", "each, before {c}, of"), 'x + "{c}"'),
}
WORD_FILTERS = {
    "all": Part(("",), ""),
    "longer": Part(("with more than {d} letters", "longer than {d}"), "len(x) > {d}"),
    "shorter": Part(("with less than {d} letters", "shorter than {d}"), "len(x) < {d}"),
    "long": Part(("of {d} letters", "with exactly {d} letters"), "len(x) == {d}"),
    "starting": Part(("starting with {c}", "that begin with {c}"), 'x.startswith("{c}")'),
    "ending": Part(("ending with {c}", "that end in {c}"), 'x.endswith("{c}")'),
    "containing": Part(("containing {c}", "with {c} in them"), '"{c}" in x'),
    "lacking": Part(("without {c}", "with no {c} in them"), '"{c}" not in x'),
    "lower": Part(("in lower case", "of small letters"), "x.islower()"),
    "title": Part(("with a capital", "that begin with a capital"), "x[0].isupper()"),
}
WORD_MAPS = {
    "same": Part(("",), "x"),
    "upper": Part(("the upper case of", "the capitals of"), "x.upper()"),
    "lower": Part(("the lower case of", "the small letters of"), "x.lower()"),
    "reversed": Part(("the reverse of each of", "the reversed forms of"), "x[::-1]"),
    "first": Part(("the first letters of", "the first letter of each of"), "x[0]"),
    "last": Part(("the last letters of", "the last letter of each of"), "x[-1]"),
    "length": Part(("the lengths of", "the length of each of"), "len(x)"),
    "start": Part(("the first {d} letters of", "the beginnings, {d} letters long, of"), "x[:{d}]"),
    "end": Part(("all but the first letter of", "what follows the first letter of"), "x[1:]"),
    "copies": Part(("two copies of each of", "the doubles of"), "x * 2"),
    "marked": Part(("{c} before each of", "each, behind {c}, of"), '"{c}" + x'),
    "title": Part(("the capitalized form of", "the title form of"), "x.capitalize()"),
}

# How the rest is gathered: told before what is gathered; as an expression over a comprehension `{all}`, or as a loop.
GATHERS = {
    "sum": ("the sum of", None),
    "product": ("the product of", None),
    "number": ("the number of", None),
    "list": ("a list of", "[{all}]"),
    "sorted": ("a sorted list of", "sorted({all})"),
    "descending": ("a list, largest first, of", "sorted([{all}], reverse=True)"),
    "backwards": ("a list, last first, of", "[{all}][::-1]"),
    "largest": ("the largest of", "max([{all}], default=0)"),
    "smallest": ("the smallest of", "min([{all}], default=0)"),
    "distinct": ("the number of different ones of", "len(set({all}))"),
    "joined": ("a string of", '"".join({all})'),
    "dashed": ("a string, joined by dashes, of", '"-".join({all})'),
    "spaced": ("a string, joined by spaces, of", '" ".join({all})'),
    "first": ("the first {d} of", "[{all}][:{d}]"),
}
OF_NUMBERS = (
    "sum",
    "product",
    "number",
    "list",
    "sorted",
    "descending",
    "backwards",
    "largest",
    "smallest",
    "distinct",
    "first",
)
OF_TEXT = ("number", "list", "sorted", "joined", "dashed", "backwards", "distinct", "first")
OF_WORDS = ("number", "list", "sorted", "joined", "dashed", "spaced", "backwards", "distinct", "first")


@dataclass(frozen=True)
class Source:
    """What a function goes through: its argument, how it is told and written, and which parts go with it."""

    argument: str
    told: tuple[str, ...]
    code: str
    filters: dict[str, Part]
    maps: dict[str, Part]
    gathers: tuple[str, ...]
    draw: Callable[[random.Random], Any]


def _some_numbers(rng: random.Random) -> list[int]:
    low = rng.choice((-20, 0, 0))
    return [rng.randint(low, rng.choice((9, 30))) for _ in range(rng.randint(3, 6))]


def _some_words(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 4)))


def _some_text(rng: random.Random) -> str:
    return " ".join(rng.choice((*WORDS, str(rng.randint(1, 99)))) for _ in range(rng.randint(1, 3)))


SOURCES = {
    "numbers": Source(
        "list",
        ("the numbers in {a}", "those in {a}"),
        "{a}",
        NUMBER_FILTERS,
        NUMBER_MAPS,
        OF_NUMBERS,
        _some_numbers,
    ),
    "range": Source(
        "number",
        ("the numbers from 1 to {a}", "the whole numbers up to {a}"),
        "range(1, {a} + 1)",
        NUMBER_FILTERS,
        NUMBER_MAPS,
        OF_NUMBERS,
        lambda rng: rng.randint(3, 12),
    ),
    "characters": Source(
        "string",
        ("the characters of {a}", "the characters in {a}"),
        "{a}",
        CHARACTER_FILTERS,
        CHARACTER_MAPS,
        OF_TEXT,
        _some_text,
    ),
    "words": Source(
        "string",
        ("the words of {a}", "the words in {a}"),
        "{a}.split()",
        WORD_FILTERS,
        WORD_MAPS,
        OF_WORDS,
        _some_words,
    ),
}
CHOICE = "choice"
KINDS = (*SOURCES, CHOICE)
KIND_WEIGHTS = (4, 2, 3, 3, 2)
EMPTY = ("0", "[]", "''")
OPENINGS = ("Return", "Give", "Compute", "Find")


@dataclass(frozen=True)
class Function:
    """A drawn function: its docstring's sentence, body lines, and what draws arguments."""

    combination: tuple[str, ...]
    argument: str
    sentence: str
    body: tuple[str, ...]
    draw: Callable[[random.Random], Any]


def combination_held_out(combination: tuple[str, ...]) -> bool:
    """True for one in 6 combinations of which two parts or more do something, the same ones in every run."""
    if sum(part in ("all", "same") for part in combination):
        return False
    return zlib.crc32(" ".join(combination).encode()) % HELD_OUT_ONE_IN == 0


def function_task(rng: random.Random, held_out: bool) -> Task:
    """A function to write, on the wanted side of the split."""
    while True:
        combination = _combination(rng)
        if combination_held_out(combination) != held_out:
            continue
        function = _choice(rng, combination) if combination[0] == CHOICE else _gathering(rng, combination)
        task = _task(rng, function)
        if task is not None:
            return task


def _combination(rng: random.Random) -> tuple[str, ...]:
    kind = rng.choices(KINDS, KIND_WEIGHTS)[0]
    if kind == CHOICE:
        first, second = rng.sample(list(NUMBER_MAPS), 2)
        return (kind, rng.choice([name for name in NUMBER_FILTERS if name != "all"]), first, second)
    source = SOURCES[kind]
    kept = rng.choice(list(source.filters)) if rng.random() < 0.85 else "all"
    gathered = rng.choice(source.gathers)
    changed = rng.choice(list(source.maps)) if gathered != "number" and rng.random() < 0.75 else "same"
    return (kind, kept, changed, gathered)


def _gathering(rng: random.Random, combination: tuple[str, ...]) -> Function:
    kind, kept, changed, gathered = combination
    source = SOURCES[kind]
    argument = rng.choice(ARGUMENTS[source.argument])
    which, each = (
        _filled(rng, part, rng.choice((0, 1)), d=rng.randint(2, 9))
        for part in (source.filters[kept], source.maps[changed])
    )
    beginning, expression = GATHERS[gathered]
    d = rng.randint(1, 4)
    nouns = rng.choice(source.told).format(a=argument)
    told = " ".join(text for text in (beginning.format(d=d), each[0], nouns, which[0]) if text)
    through = source.code.format(a=argument)
    value = f"str({each[1]})" if gathered in ("joined", "dashed", "spaced") and changed == "length" else each[1]
    if expression is None:
        body = _loop(gathered, through, which[1], value)
    else:
        every = f"{value} for x in {through}" + (f" if {which[1]}" if which[1] else "")
        body = ("return " + expression.format(all=every, d=d),)
    return Function(combination, argument, told, body, source.draw)


def _loop(gathered: str, through: str, condition: str, value: str) -> tuple[str, ...]:
    name, start, change = {
        "sum": ("total", "0", f"total += {value}"),
        "product": ("product", "1", f"product *= {value}"),
        "number": ("count", "0", "count += 1"),
    }[gathered]
    inner = (f"    if {condition}:", f"        {change}") if condition else (f"    {change}",)
    return (f"{name} = {start}", f"for x in {through}:", *inner, f"return {name}")


def _choice(rng: random.Random, combination: tuple[str, ...]) -> Function:
    _, kept, first, second = combination
    argument = rng.choice(ARGUMENTS["number"])
    way = rng.choice((0, 1))
    which = _filled(rng, NUMBER_FILTERS[kept], way, d=rng.randint(2, 9))
    one, two = (_filled(rng, NUMBER_MAPS[name], rng.choice((0, 1)), d=rng.randint(2, 9)) for name in (first, second))
    said = [f"{each[0].replace('each of', '').strip()} {argument}".strip() for each in (one, two)]
    condition = which[0].removeprefix("that are ").removeprefix("of ")
    told = f"{said[0]} if it is {condition}, otherwise {said[1]}"
    named = [_renamed(each[1], argument) for each in (which, one, two)]
    body = (f"if {named[0]}:", f"    return {named[1]}", f"return {named[2]}")
    return Function(combination, argument, told, body, lambda rng: rng.randint(-12, 40))


def _renamed(code: str, argument: str) -> str:
    """An expression of x as one of the argument."""
    return re.sub(r"\bx\b", argument, code)


def _filled(rng: random.Random, part: Part, way: int, d: int) -> tuple[str, str]:
    """A part told and written with parameters drawn for it."""
    k = rng.randint(1, 20)
    c, e = rng.sample(LETTERS, 2)
    values = {"k": k, "m": k + rng.randint(2, 15), "d": d, "c": c, "e": e}
    told = part.told[min(way, len(part.told) - 1)]
    return told.format(**values), part.code.format(**values)


def _task(rng: random.Random, function: Function) -> Task | None:
    """None where the function's values say too little, or too much."""
    name = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    head = f"def {name}({function.argument}):"
    code = "\n".join([head, *("    " + line for line in function.body)])
    space: dict[str, Any] = {}
    exec(code, space)  # of our own making
    asked = [function.draw(rng) for _ in range(1 + CHECKS)]
    checks = [(f"{name}({argument!r})", repr(space[name](argument))) for argument in asked]
    # The example shows something, if one of them does.
    checks.sort(key=lambda check: check[1] in EMPTY)
    (call, result), *rest = checks
    if len({result for _, result in checks}) < 3 or len(result) > 40:
        return None
    sentence = f"{rng.choice(OPENINGS)} {function.sentence}."
    docstring = f'    """{sentence}\n\n    >>> {call}\n    {result}\n    """'
    return Task(
        skill="code",
        question=f"{head}\n{docstring}",
        answer=code,
        composition=function.combination,
        checks=tuple(rest),
    )
