"""Many prompts from a file of JSON lines, answered into another as they finish, which a later run goes on with.

A line of the input is an object: `prompt`, a text, or `input_ids`; perhaps an `id`; and knobs of its own. A line of
the output names what it answers, by that id or by the number of the line, from 0. Of what a kill cuts off in its
midst, nothing is kept.
"""

import json
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

# Of generate's flags those that would change what a line of the output is.
NOT_PLAIN = ("return_dict_in_generate", "output_scores", "output_logits", "num_return_sequences")
OWN = ("id", "prompt", "input_ids")
# What transformers, which checks few of its flags, raises for a value of another kind, or one that no vocabulary has.
UNCHECKED = (TypeError, AttributeError, LookupError, ArithmeticError)


@dataclass(frozen=True)
class Line:
    """
    What one line asks for.

    Args:
        number: of the line in its file, from 0.
        key: ("id", its id), or ("index", its number).
        prompt: a text, or None where it gives `input_ids`.
        input_ids: or None.
        knobs: its own.
    """

    number: int
    key: tuple[str, str | int]
    prompt: str | None
    input_ids: list[int] | None
    knobs: dict[str, Any]


def read_lines(file: Path, check: Callable[[Line], None]) -> list[Line]:
    """
    All lines but empty ones, behind a byte-order mark or not; a ValueError that names file and line for the first that
    can not be answered.
    """
    lines: list[Line] = []
    first_of: dict[tuple[str, str | int], int] = {}
    for number, raw in enumerate(file.read_bytes().removeprefix(BOM_UTF8).split(b"\n")):
        if not raw.strip():
            continue
        with_place = at_line(file, number)
        line = with_place(_parsed, raw, number)
        if line.key in first_of:
            name, value = line.key
            raise ValueError(
                f"{file}, line {number + 1}: {name} {value!r} is that of line {first_of[line.key] + 1}, too"
            )
        first_of[line.key] = number
        with_place(check, line)
        lines.append(line)
    return lines


def at_line(file: Path, number: int) -> Callable[..., Any]:
    """A way to call a function so that what is wrong with its argument is said of that line."""

    def call(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except (ValueError, RuntimeError, *UNCHECKED) as error:
            raise ValueError(f"{file}, line {number + 1}: {_said(error)}") from error

    return call


def _said(error: Exception) -> str:
    """Its text; of an error that nobody has written for a user, with its kind, without which it may say nothing."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


class GivenTwice(ValueError):
    """A key of an object, of which JSON's readers keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise GivenTwice(f"{name} is given twice; leave one out")
    return dict(pairs)


def _parsed(raw: bytes, number: int) -> Line:
    try:
        content = json.loads(raw.decode(), object_pairs_hook=_object)
    except GivenTwice:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f'not JSON ({error}); give an object such as {{"prompt": "..."}}') from error
    if not isinstance(content, dict):
        raise ValueError(f'a {type(content).__name__}; give an object such as {{"prompt": "..."}}')
    prompt, input_ids, name = (content.get(key) for key in ("prompt", "input_ids", "id"))
    if (prompt is None) == (input_ids is None):
        raise ValueError('give either "prompt", a text, or "input_ids"')
    if prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
        raise ValueError(f"prompt is {prompt!r}; give a text")
    if input_ids is not None and not (isinstance(input_ids, list) and set(map(type, input_ids)) == {int}):
        raise ValueError(f"input_ids is {input_ids!r}; give a list of token ids")
    if name is not None and type(name) not in (str, int):
        raise ValueError(f"id is {name!r}; give a text or a whole number")
    for text in (name, prompt):
        if isinstance(text, str):
            text.encode()  # halves of surrogate pairs are no text
    knobs = {key: value for key, value in content.items() if key not in OWN and value is not None}
    key = ("index", number) if name is None else ("id", name)
    return Line(number, key, prompt, input_ids, knobs)


@dataclass(frozen=True)
class Written:
    """
    What an output holds already.

    Args:
        errors: by key, whether that line was no more than an error.
        size: bytes of its whole lines.
        found: bytes of all there was.
    """

    errors: dict[tuple[str, str | int], bool]
    size: int
    found: int


def read_written(file: Path, lines: Iterable[Line]) -> Written:
    """What a former run has written; a ValueError where it is not about these lines, so that nothing of it is lost."""
    if not file.is_file():
        return Written({}, 0, 0)
    content = file.read_bytes()
    size = content.rfind(b"\n") + 1
    expected = {line.key for line in lines}
    errors: dict[tuple[str, str | int], bool] = {}
    for number, raw in enumerate(content[:size].split(b"\n")[:-1]):
        errors.update([at_line(file, number)(_written_line, raw, expected)])
    # What was cut off in its midst begins as our lines do.
    if not any(_begin_alike(content[size:], begin) for begin in (b'{"id": ', b'{"index": ')):
        raise ValueError(f"{file} ends in what this command did not write; give another --output")
    return Written(errors, size, len(content))


def _begin_alike(one: bytes, other: bytes) -> bool:
    return one.startswith(other) or other.startswith(one)


def _written_line(raw: bytes, expected: set[tuple[str, str | int]]) -> tuple[tuple[str, str | int], bool]:
    try:
        content = json.loads(raw.decode())
    except (ValueError, RecursionError):
        content = None
    name = next((name for name in ("id", "index") if isinstance(content, dict) and name in content), None)
    if content is None or name is None:
        raise ValueError("this command did not write it; give another --output")
    value = content[name]
    if not isinstance(value, str | int) or (name, value) not in expected:
        raise ValueError(f"it answers {name} {value!r}, which the input does not hold; give another --output")
    return (name, value), "error" in content


def write_answers(
    file: Path, written: Written, answers: Iterable[tuple[Line, dict[str, Any]]]
) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Append a line for each answer as it comes, behind the whole lines; the answers, once they are written."""
    with file.open("ab") as output:
        if file.is_file():
            _keep_for_us(output, file)
            if file.stat().st_size != written.found:
                raise ValueError(f"{file} has been written to since it was read; run the command again")
            output.truncate(written.size)
        for line, answer in answers:
            name, value = line.key
            output.write(json.dumps({name: value, **answer}, ensure_ascii=False).encode() + b"\n")
            output.flush()
            yield line, answer


def _keep_for_us(output: BinaryIO, file: Path) -> None:
    """Until it is closed or its process ends: two of this command would answer every line twice."""
    if find_spec("fcntl") is None:
        return  # on Windows
    import fcntl

    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{file} is being written by another process; wait for it, or give another one") from error


def answers(
    engine: Any,
    lines: Iterable[Line],
    arguments: Callable[[Line], dict[str, Any]],
    answer: Callable[[Line, Any], dict[str, Any]],
) -> Iterator[tuple[Line, dict[str, Any]]]:
    """
    What the engine gives for each line, in the order in which they finish; what is wrong with one is its answer.

    (`generate_many` would end at the first that fails, and not say which it was.)

    Args:
        engine: [`TwoTowerEngine`], driven here.
        lines: taken as slots become free.
        arguments: of `add_request`.
        answer: what is to be written of a line, by generate's output.
    """
    coming = iter(lines)
    waiting: dict[Any, Line] = {}
    while True:
        for line in islice(coming, 2 * engine.slots - len(waiting)):
            waiting[engine.add_request(**arguments(line))] = line
        if not waiting:
            return
        engine.step()
        for handle in [handle for handle in waiting if handle.done()]:
            line = waiting.pop(handle)
            try:
                output = handle.result()
            except (ValueError, *UNCHECKED) as error:  # not RuntimeError: memory that is short is no line's fault
                yield line, {"error": _said(error)}
            else:
                yield line, answer(line, output)
