"""Grade-school word problems with worked answers: fifteen fixed templates, and chains put together of kinds of steps.

A chain has a beginning, steps that change what somebody has, and a question. How a step is told decides how its line
of the answer begins, so that every question has one answer. Some questions tell a number that is not needed.

Held out are one in 16 sets of needed numbers, whatever their order, and of chains besides one in 8 compositions (of
beginning, steps and question): a training problem has neither, and a chain that is asked in evaluation has both.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from .tasks import Task, listed
from .templates import HIGHEST, LOWEST, TEMPLATES, Template, draw, line_of, solve

SHE = listed(
    "Ada Agnes Aisha Alice Alma Amelia Amina Amy Ana Anita Anna Anya April Asha Astrid Aurora Ava Bella Beth "
    "Bianca Birgit Bonnie Carla Carmen Carol Cecilia Celia Chloe Clara Cora Daisy Dana Daria Diana Dina Dora "
    "Edith Elena Elin Elisa Ella Elsa Emily Emma Erika Esther Eva Eve Fatima Faye Fiona Flora Frida Gail Gina "
    "Gloria Grace Greta Hana Hanna Hazel Heidi Helen Hilda Holly Ida Ines Inga Irene Iris Isabel Ivy Jane Jasmin "
    "Jenny Jill Joan Johanna Joy Judy Julia June Karin Kate Keiko Kim Lara Laura Layla Lea Leila Lena Lily Lina "
    "Linda Lisa Lola Lotte Lucy Luna Lydia Mae Maja Mara Maria Marta Mary Maya Megan Mei Mia Mila Mina Mira Molly "
    "Mona Nadia Nancy Naomi Nell Nina Nora Olga Olivia Paula Pia Rita Rosa Ruby Ruth Sally Sara Selma Sofia "
    "Stella Susan Tara Tess Tina Uma Vera Wanda Yuki Zoe"
)
HE = listed(
    "Aaron Abel Adam Ahmed Alan Albert Alex Ali Amir Anders Andre Anton Arne Arthur Axel Ben Bill Bjorn Bob Boris "
    "Brian Bruno Carl Carlos Chen Chris Clark Colin Cyril Dan Daniel David Dennis Dirk Edgar Eli Elias Emil Eric "
    "Ernst Ethan Evan Felix Finn Frank Franz Fred Gabriel Gary George Gino Glen Greg Gustav Hal Hans Harry Hassan "
    "Henry Hiro Hugo Ian Igor Ilya Isaac Ivan Jack Jacob Jakob Jan Jens Jim Joel John Jonas Jorge Jose Juan Jude "
    "Jules Karl Keith Ken Kevin Kofi Kurt Lars Leo Levi Liam Louis Lucas Luis Luke Marco Mario Mark Martin Max "
    "Milo Mohan Nathan Neil Nick Nils Noah Olaf Oleg Oliver Omar Oscar Otto Pablo Paul Pedro Peter Phil Pierre "
    "Rafael Raj Ralph Ravi Ray Robert Roger Roman Rudi Sam Samir Scott Sean Simon Stan Steve Sven Tariq Theo "
    "Thomas Tim Toby Tom Tony Victor Walter Will Yusuf"
)
ITEMS = listed(
    "apples books stamps shells cards pencils coins beads buttons cookies eggs tickets stones flowers toys lemons "
    "oranges pears plums nuts marbles balls pens stickers candles photos keys leaves feathers ribbons bottles cups "
    "plates spoons hats socks gloves badges maps kites bricks nails screws rings pearls seeds roses tulips carrots "
    "onions melons cakes muffins sweets posters magnets puzzles letters tiles dolls ropes bells lamps chairs"
)
PLACES = listed(
    "market school library park fair museum farm station beach garden shop bakery harbour castle zoo theatre stadium "
    "church mill bridge river forest factory hotel"
)
BOXES = listed("boxes bags baskets jars crates drawers bowls chests tins sacks")

PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her"},
    "he": {"he": "he", "him": "him", "his": "his"},
}

TEMPLATE_SHARE = 0.35
DISTRACTOR_SHARE = 0.35
# Chances of a chain of two to five steps.
LENGTH_WEIGHTS = {2: 30, 3: 30, 4: 25, 5: 15}
NUMBERS_HELD_OUT_ONE_IN = 16
COMPOSITIONS_HELD_OUT_ONE_IN = 8

# How a step is told, and how its line begins.
GAIN = (
    ("{Who} buys {n} more.", "After buying"),
    ("Then {who} finds {n} more {items}.", "After finding"),
    ("{other} gives {him} {n} more.", "With those of {other}"),
    ("{Who} wins {n} {items} in a game.", "After winning"),
    ("At the {place}, {who} gets {n} more.", "After the {place}"),
    ("Then {other} brings {n} {items} for {him}.", "Thanks to {other}"),
)
LOSS = (
    ("{Who} loses {n} of them.", "After losing"),
    ("{Who} gives {n} {items} to {other}.", "After giving to {other}"),
    ("{Who} sells {n} of them at the {place}.", "After the {place}"),
    ("{n} of the {items} break.", "Without the broken"),
    ("Then {other} takes {n} of them away.", "After {other}"),
    ("{Who} uses up {n} {items}.", "After using some"),
)
TIMES = (
    ("A week later {who} has {k} times as many.", "A week later"),
    ("By the summer {his} {items} become {k} times as many.", "By the summer"),
)
DOUBLE = (
    ("{Who} doubles the number of {his} {items}.", "Twice as many"),
    ("Then the number of {his} {items} doubles.", "After doubling"),
)
HALF = (
    ("{Who} gives half of them to {other}.", "After giving to {other}"),
    ("Half of the {items} get lost.", "After the loss"),
    ("{Who} leaves half of them at the {place}.", "After the {place}"),
)
SPLIT = (
    ("{Who} divides them equally among {n} {boxes} and keeps one of the {boxes}.", "In one of the {boxes}"),
    ("{Who} shares them equally with others, {n} people in all.", "After sharing"),
)
# Somebody else's; told about from then on.
MORE = (
    ("{other} has {n} more {items} than {name}.", "more"),
    ("{name} has {n} {items} fewer than {other}.", "fewer"),
)
FEWER = (
    ("{other} has {n} fewer {items} than {name}.", "fewer"),
    ("{name} has {n} more {items} than {other}.", "more"),
)
TWICE = (("{other} has twice as many {items} as {name}.", ""),)
MANY = (("{other} has {k} times as many {items} as {name}.", ""),)
HALVED = (("{other} has half as many {items} as {name}.", ""),)

DISTRACTORS = (
    "{third} is {n} years old.",
    "The {place} is {n} miles away.",
    "There are {n} {things} at the {place}.",
    "{third} has {n} {things}.",
    "The walk to the {place} takes {n} minutes.",
    "In the {place} there are {n} people.",
    "{name} also has {n} {things}.",
)


@dataclass(frozen=True)
class Kind:
    """A kind of step: its sign, where its number comes from, how it may be told, and whether another owner follows."""

    sign: str
    draw: str
    told: tuple[tuple[str, str], ...]
    switches: bool = False


KINDS = {
    "gain": Kind("+", "any", GAIN),
    "loss": Kind("-", "any", LOSS),
    "times": Kind("*", "times", TIMES),
    "double": Kind("*", "two", DOUBLE),
    "half": Kind("/", "two", HALF),
    "split": Kind("/", "divisor", SPLIT),
    "more": Kind("+", "any", MORE, switches=True),
    "fewer": Kind("-", "any", FEWER, switches=True),
    "twice": Kind("*", "two", TWICE, switches=True),
    "many": Kind("*", "times", MANY, switches=True),
    "halved": Kind("/", "two", HALVED, switches=True),
}
KIND_WEIGHTS = (5, 5, 2, 2, 2, 2, 2, 2, 2, 1, 1)
BEGINNINGS = ("has", "boxes", "days")
ENDS = ("now", "together", "friends", "coins", "packs")
END_WEIGHTS = (5, 2, 2, 2, 2)


class Impossible(Exception):
    """The numbers drawn so far leave none for a step."""


@dataclass
class Chain:
    """A chain while it is being told."""

    rng: random.Random
    words: dict[str, str]
    sentences: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    value: int = 0
    before: int = 0
    by_name: bool = True  # whether who is meant must be named

    def draw(self, kind: str, low: int, high: int) -> int:
        for _ in range(8):
            number = draw(self.rng, kind)
            if low <= number <= high:
                return number
        raise Impossible

    def fill(self, text: str, **more: object) -> str:
        words = self.words
        name = words["name"]
        who = name if self.by_name or self.rng.random() < 0.3 else words["he"]
        return text.format(**words, who=who, Who=who[0].upper() + who[1:], **more)

    def line(self, beginning: str, equation: str, result: int, unit: str = "{items}") -> None:
        """One line of the answer; its result goes on."""
        if not LOWEST <= result <= HIGHEST:
            raise Impossible
        self.lines.append(f"{beginning} {equation} = {result} {unit.format(**self.words)}.")
        self.before, self.value = self.value, result


def word_problem(rng: random.Random, held_out: bool) -> Task:
    """A word problem on the wanted side of the split."""
    return template_problem(rng, held_out) if rng.random() < TEMPLATE_SHARE else _chain(rng, held_out)


def numbers_held_out(numbers: tuple[int, ...]) -> bool:
    """True for one in 16 sets of given numbers, in whatever order, the same ones in every run."""
    return _one_in(NUMBERS_HELD_OUT_ONE_IN, ",".join(map(str, sorted(numbers))))


def composition_held_out(composition: tuple[str, ...]) -> bool:
    """True for one in 8 compositions of chains, the same ones in every run."""
    return _one_in(COMPOSITIONS_HELD_OUT_ONE_IN, " ".join(composition))


def _one_in(share: int, key: str) -> bool:
    return zlib.crc32(key.encode()) % share == 0


def template_problem(rng: random.Random, held_out: bool) -> Task:
    steps = rng.choices(range(len(TEMPLATES)), (25, 40, 35))[0]
    place = rng.randrange(len(TEMPLATES[steps]))
    template = TEMPLATES[steps][place]
    numbers = _template_numbers(rng, template, held_out)
    values, words = solve(template, numbers), _draw_words(rng)
    result = values[f"r{len(template.steps)}"]
    lines = [line_of(step, f"r{i}", values, words) for i, step in enumerate(template.steps, start=1)]
    return Task(
        skill="words",
        question=template.question.format(**words, **values),
        answer=" ".join([*lines, f"#### {result}"]),
        composition=(f"template {steps + 1}.{place + 1}",),
        numbers=numbers,
        result=result,
        built_in=True,
    )


def _template_numbers(rng: random.Random, template: Template, held_out: bool) -> tuple[int, ...]:
    while True:
        numbers = tuple(draw(rng, kind) for kind in template.kinds.split())
        in_range = all(LOWEST <= value <= HIGHEST for value in solve(template, numbers).values())
        if in_range and numbers_held_out(numbers) == held_out:
            return numbers


def _draw_words(rng: random.Random) -> dict[str, str]:
    pronoun = rng.choice(("she", "he"))
    name = rng.choice(SHE if pronoun == "she" else HE)
    other, third = _others(rng, name)
    items, things = rng.sample(ITEMS, 2)
    return {
        "name": name,
        "other": other,
        "third": third,
        "He": pronoun.capitalize(),
        "items": items,
        "things": things,
        "place": rng.choice(PLACES),
        "boxes": rng.choice(BOXES),
        **PRONOUNS[pronoun],
    }


def _others(rng: random.Random, *taken: str) -> list[str]:
    names = rng.sample(SHE, 3) + rng.sample(HE, 3)
    rng.shuffle(names)
    return [name for name in names if name not in taken][:2]


def _chain(rng: random.Random, held_out: bool) -> Task:
    while True:
        composition = _composition(rng)
        if composition_held_out(composition) != held_out:
            continue
        for _ in range(10):
            try:
                told = _tell(rng, composition)
            except Impossible:
                continue
            if numbers_held_out(tuple(told.numbers)) == held_out:
                return _task_of(told, composition)


def _composition(rng: random.Random) -> tuple[str, ...]:
    length = rng.choices(list(LENGTH_WEIGHTS), list(LENGTH_WEIGHTS.values()))[0]
    beginning = rng.choice(BEGINNINGS)
    end = rng.choices(ENDS, END_WEIGHTS)[0]
    steps = length - (beginning != "has") - (end != "now")
    kinds = rng.choices(list(KINDS), KIND_WEIGHTS, k=steps)
    if end == "together" and not (kinds and KINDS[kinds[-1]].switches):
        end = "friends"
    return (beginning, *kinds, end)


def _tell(rng: random.Random, composition: tuple[str, ...]) -> Chain:
    chain = Chain(rng, _draw_words(rng))
    beginning, *kinds, end = composition
    _begin(chain, beginning)
    for kind in kinds:
        _tell_step(chain, KINDS[kind])
    question = _end(chain, end)
    if rng.random() < DISTRACTOR_SHARE:
        _distract(chain)
    chain.sentences.append(question)
    return chain


def _task_of(chain: Chain, composition: tuple[str, ...]) -> Task:
    return Task(
        skill="words",
        question=" ".join(chain.sentences),
        answer=" ".join([*chain.lines, f"#### {chain.value}"]),
        composition=composition,
        numbers=tuple(chain.numbers),
        result=chain.value,
    )


def _begin(chain: Chain, beginning: str) -> None:
    draw, rng = chain.draw, chain.rng
    if beginning == "has":
        a = draw("any", LOWEST, HIGHEST)
        told = rng.choice(("{name} has {a} {items}.", "{name} begins with {a} {items}.", "{name} owns {a} {items}."))
        chain.value, chain.numbers = a, [a]
        chain.sentences.append(chain.fill(told, a=a))
    elif beginning == "boxes":
        a = draw("factor", 2, 6)
        b = draw("small", LOWEST, HIGHEST // a)
        told = rng.choice(
            ("{name} has {a} {boxes} with {b} {items} each.", "{name} fills {a} {boxes}, each with {b} {items}.")
        )
        chain.numbers = [a, b]
        chain.sentences.append(chain.fill(told, a=a, b=b))
        chain.line(chain.fill("In the {boxes}, {name} has"), f"{a} * {b}", a * b)
    else:
        a = draw("any", LOWEST, HIGHEST - LOWEST)
        b = draw("any", LOWEST, HIGHEST - a)
        told = rng.choice(
            (
                "{name} collects {a} {items} on Monday and {b} on Tuesday.",
                "{name} gets {a} {items} from {third} and {b} from {other}.",
            )
        )
        chain.numbers = [a, b]
        chain.sentences.append(chain.fill(told, a=a, b=b))
        beginning = "On both days" if "Monday" in told else "From both"
        chain.line(f"{beginning}, {chain.words['name']} has", f"{a} + {b}", a + b)
    chain.by_name = "from {third}" in told


_LIMITS: dict[str, Callable[[int], tuple[int, int]]] = {
    "+": lambda value: (LOWEST, HIGHEST - value),
    "-": lambda value: (LOWEST, value - LOWEST),
    "*": lambda value: (2, HIGHEST // value),
    "/": lambda value: (2, value // 2),
}


def _number(chain: Chain, kind: Kind) -> int:
    """A step's number; those that words give ("half") are none of the given ones."""
    low, high = _LIMITS[kind.sign](chain.value)
    if kind.draw == "two":
        number = 2
    elif kind.draw == "times":
        number = chain.rng.choice((3, 4))
    else:
        number = chain.draw(kind.draw, low, high)
    if not low <= number <= high or (kind.sign == "/" and chain.value % number):
        raise Impossible
    return number


SPELLED = {3: "three", 4: "four"}


def _tell_step(chain: Chain, kind: Kind) -> None:
    number = _number(chain, kind)
    told, beginning = chain.rng.choice(kind.told)
    if kind.draw in ("any", "divisor"):
        chain.numbers.append(number)
    equation = f"{chain.value} {kind.sign} {number}"
    result = _result(chain.value, kind.sign, number)
    chain.words["other"], chain.words["third"] = _others(chain.rng, chain.words["name"])
    chain.sentences.append(chain.fill(told, n=number, k=SPELLED.get(number, "two")))
    if kind.switches:
        chain.line(f"{chain.words['other']} has", equation, result)
        _switch(chain)
    else:
        chain.line(chain.fill(beginning + ", {name} has"), equation, result)
        chain.by_name = "{other}" in told


def _switch(chain: Chain) -> None:
    words = chain.words
    words["first"], words["name"] = words["name"], words["other"]
    words |= PRONOUNS["she" if words["name"] in SHE else "he"]
    chain.by_name = True


def _result(left: int, sign: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]


def _end(chain: Chain, end: str) -> str:
    """The question, and the sentence and line it needs."""
    rng, value = chain.rng, chain.value
    if end == "now":
        return chain.fill(
            rng.choice(
                (
                    "How many {items} does {name} have now?",
                    "How many {items} does {name} have?",
                    "How many are there now?",
                )
            )
        )
    if end == "together":
        question = chain.fill("How many {items} do {first} and {name} have together?")
        chain.line("Together, they have", f"{chain.before} + {value}", chain.before + value)
        return question
    if end == "coins":
        k = chain.draw("factor", 2, HIGHEST // value)
        chain.numbers.append(k)
        chain.sentences.append(chain.fill("{Who} sells all of them for {k} coins each.", k=k))
        chain.line(chain.fill("For all, {name} gets"), f"{value} * {k}", value * k, "coins")
        return chain.fill("How many coins does {name} get?")
    k = chain.draw("divisor", 2, value // 2)
    if value % k:
        raise Impossible
    chain.numbers.append(k)
    if end == "friends":
        chain.sentences.append(chain.fill("{Who} shares them equally among {k} friends.", k=k))
        chain.line("Each friend gets", f"{value} / {k}", value // k)
        return chain.fill("How many {items} does each friend get?")
    chain.sentences.append(chain.fill("{Who} puts them into {boxes}, {k} in each.", k=k))
    chain.line(chain.fill("{name} needs"), f"{value} / {k}", value // k, "{boxes}")
    return chain.fill("How many {boxes} does {name} need?")


def _distract(chain: Chain) -> None:
    """Tell a number that is not needed, somewhere after the beginning."""
    rng = chain.rng
    chain.words["third"] = _others(rng, chain.words["name"], chain.words["other"], chain.words.get("first", ""))[0]
    sentence = chain.fill(rng.choice(DISTRACTORS), n=draw(rng, "any"))
    place = rng.randint(1, len(chain.sentences))
    # A pronoun behind it would mean somebody else.
    if place == len(chain.sentences) or not chain.sentences[place].startswith(("She ", "He ", "Then she", "Then he")):
        chain.sentences.insert(place, sentence)
