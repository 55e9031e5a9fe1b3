"""Documents of a recipe's data, in an order that a resumed run goes on with.

`datasets` streams files or a repository. Documents are read a pool at a time; a pool is shuffled, put together by
length and cut into batches. What a run has to remember is where its pool began and how many batches of it are done:
the pool is read again, and its order is drawn from seed, epoch and pool alone. With `workers` the next pool is made
into documents by other processes while this one is trained on.
"""

import glob
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .collator import BlockCollator, Document, grouped
from .recipe import DataRecipe

BUILDERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
GENERATED = "generated task"


class Examples:
    """A recipe's examples as mappings of columns, from a position on that can be stored."""

    def __init__(self, recipe: DataRecipe, seed: int = 0):
        self.recipe, self.seed = recipe, seed
        self.origin = recipe.dataset or GENERATED
        self.stream: Any = None
        if recipe.generated is None:
            self.stream = self._open()
        self.taken = 0

    def _open(self) -> Any:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError('reading data needs datasets; pip install "twotower[train]"') from error
        recipe = self.recipe
        options: dict[str, Any] = {"name": recipe.subset}
        if recipe.files is not None:
            files = found_files(recipe.files)
            self.origin = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
            kind = BUILDERS[Path(files[0]).suffix]
            if kind != "text" and recipe.text_by != "line":
                raise ValueError(
                    f"data.text_by is {recipe.text_by}, which goes with .txt, but data.files has {files[0]}; leave it "
                    "out"
                )
            # `datasets` would take the brackets of a name for a pattern, and read no such file.
            options = {"data_files": [glob.escape(file) for file in files]}
            if kind == "text":
                options |= {"sample_by": recipe.text_by, "encoding": "utf-8-sig"}  # without the mark that may begin it
        else:
            assert recipe.dataset is not None
            kind = os.path.expanduser(recipe.dataset)
        try:
            return load_dataset(kind, split=recipe.split, streaming=True, **options)
        except (RuntimeError, StopIteration, ValueError) as error:  # as of a script, an empty file, a broken one
            problem = " ".join(str(error).split()) or "it is empty"
            raise ValueError(f"{self.origin} cannot be read: {problem}") from error

    def state(self) -> Any:
        """Where the next example is."""
        return {"taken": self.taken, "stream": None if self.stream is None else self.stream.state_dict()}

    def load_state(self, state: Any) -> None:
        self.taken = state["taken"]
        if self.stream is not None and state["stream"] is not None:
            self.stream.load_state_dict(state["stream"])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "stream": None}  # another process gets examples one by one

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rest of the epoch, with their numbers from 1; afterwards the next epoch's."""
        source = islice(self._source(), self._left())
        while (example := self._next(source)) is not None:
            self.taken += 1
            yield self.taken, example
        self.taken = 0
        if self.stream is not None:
            # A stream that has ended, or is left early, would go on there.
            self.stream = self._open()

    def _next(self, source: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        if self.stream is None:
            return next(source, None)
        from datasets.exceptions import DatasetsError
        from pyarrow import ArrowException

        try:
            return next(source, None)
        except (DatasetsError, ArrowException, ValueError) as error:
            problem = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{self.origin} cannot be read after example {self.taken}: {problem}") from error

    def _left(self) -> int | None:
        return None if self.recipe.examples is None else self.recipe.examples - self.taken

    def _source(self) -> Iterator[dict[str, Any]]:
        if self.stream is not None:
            return iter(self.stream)
        return ({"task": number} for number in count(self.taken))

    def drawn(self, example: dict[str, Any]) -> dict[str, Any]:
        """A generated task as columns; other examples as they are."""
        if self.recipe.generated is None:
            return example
        from ..demo.tasks import training_task

        task = training_task(self.seed, example["task"], self.recipe.generated)
        return {"prompt": task.prompt, "completion": " " + task.answer}


class Documents:
    """Examples as documents of token ids: checked, tokenized, and cut where they are too long."""

    def __init__(
        self, recipe: DataRecipe, tokenizer: PreTrainedTokenizerBase, block_size: int, mask_token_id: int, seed: int
    ):
        self.recipe, self.tokenizer, self.mask_token_id = recipe, tokenizer, mask_token_id
        self.examples = Examples(recipe, seed)
        sizes = recipe.block_sizes or [block_size]
        if recipe.max_tokens < max(sizes):
            raise ValueError(
                f"data.max_tokens is {recipe.max_tokens}, less than a block of {max(sizes)} tokens; give at least that"
            )
        self.min_tokens = max(sizes) if recipe.min_tokens is None else recipe.min_tokens
        self.columns = [name for name in (recipe.text, recipe.prompt, recipe.completion) if name is not None]
        if recipe.generated is not None:
            self.columns = self.columns or ["prompt", "completion"]
        self.columns = self.columns or ["text"]

    def of(self, number: int, example: dict[str, Any]) -> list[Document]:
        """The documents of example `number`; none, where it is unusable and may be skipped."""
        example = self.examples.drawn(example)
        where = f"example {number} of {self.examples.origin}"
        texts = [self._text(example, column, where) for column in self.columns]
        ids = self._ids(texts[0], special=True)
        prompt = 0
        if len(texts) == 2:
            if ids[-1:] == [self.tokenizer.eos_token_id] != self._ids(texts[0], special=False)[-1:]:
                del ids[-1]  # of a tokenizer that ends every text; this one goes on
            prompt, ids = len(ids), ids + self._ids(texts[1], special=False)
        problem = self._problem(texts, ids, prompt)
        if problem is not None:
            if self.recipe.unusable == "skip":
                return []
            raise ValueError(f"{where} {problem}, or leave such out with data.unusable: skip")
        if self.mask_token_id in ids:
            raise ValueError(
                f"{where} has token {self.mask_token_id}, which is to be [MASK]; choose as mask_token_id one "
                "that no text has"
            )
        return self._cut(ids, prompt)

    def _cut(self, ids: list[int], prompt: int) -> list[Document]:
        """Pieces of at most `max_tokens`; a rest shorter than a document may be is left with the piece before it."""
        size = self.recipe.max_tokens
        starts = [start for start in range(0, len(ids), size) if start == 0 or len(ids) - start >= self.min_tokens]
        ends = [*starts[1:], len(ids)]
        return [
            Document(ids[start:end], prompt if start == 0 else 0, end == len(ids))
            for start, end in zip(starts, ends, strict=True)
        ]

    def _text(self, example: dict[str, Any], column: str, where: str) -> str:
        if column not in example:
            raise ValueError(
                f"{self.examples.origin} has no column {column!r}, but {', '.join(map(str, example))}; name one in "
                "data.text, or two in data.prompt and data.completion"
            )
        text = "" if example[column] is None else example[column]
        if not isinstance(text, str):
            raise ValueError(f"{where} has a {type(text).__name__} as {column!r}; give text")
        return text

    def _ids(self, text: str, special: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids

    def _problem(self, texts: list[str], ids: list[int], prompt: int) -> str | None:
        for column, text in zip(self.columns, texts, strict=True):
            if not text.strip():
                return f"is empty in {column!r}: give it text"
        if len(ids) < self.min_tokens:
            return (
                f"has {len(ids)} tokens, and a document must have {self.min_tokens}: fill it up with end-of-text by a "
                "smaller data.min_tokens"
            )
        if prompt >= self.recipe.max_tokens:
            return (
                f"has a prompt of {prompt} tokens, of at most {self.recipe.max_tokens} in all; raise data.max_tokens"
            )
        return None


class Workers:
    """
    Processes that make examples into documents.

    Args:
        documents: how.
        count: of processes.
    """

    AT_A_TIME = 64

    def __init__(self, documents: Documents, count: int):
        # Not forked: this process may have looked at a GPU, and has threads.
        context = multiprocessing.get_context("spawn")
        self.executor = ProcessPoolExecutor(count, context, _begin_worker, (documents,))

    def submit(self, examples: list[tuple[int, dict[str, Any]]]) -> Iterator[list[Document]]:
        """Each example's documents, in their order; the work begins at once."""
        with _workers_hold(), _without_interrupts():
            return self._made(self.executor.map(_documents_of, examples, chunksize=self.AT_A_TIME))

    def _made(self, coming: Iterator[list[Document]]) -> Iterator[list[Document]]:
        with _workers_hold():
            yield from coming

    def close(self) -> None:
        """Nothing more is wanted: what has not begun is left, which this process would wait for as it ends."""
        self.executor.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _workers_hold() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that makes documents has been ended, for example for memory; give fewer data.workers, or 0 (a "
            'script of yours needs `if __name__ == "__main__":` around what trains)'
        ) from error


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that begin within never see Ctrl-C, which a terminal sends to all: they end with this one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield  # on Windows
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(documents: Documents) -> None:
    global _worker_documents
    _worker_documents = documents
    # A run that is killed cannot tell its workers to end.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _documents_of(example: tuple[int, dict[str, Any]]) -> list[Document]:
    return _worker_documents.of(*example)


_worker_documents: Documents  # in a worker


class Batches:
    """
    Laid-out batches without end, epoch after epoch.

    `position()` is where the next batch is, as plain values; `go_to` a position of the same recipe goes on there.
    """

    def __init__(self, documents: Documents, collator: BlockCollator, batch_size: int, seed: int):
        self.documents, self.collator, self.batch_size, self.seed = documents, collator, batch_size, seed
        self.epoch = self.pool = self.done = 0
        self.start: Any = None
        self.batches: list[list[Document]] = []
        self.examples: Iterator[tuple[int, dict[str, Any]]] | None = None
        self.workers: Workers | None = None
        self.ahead: tuple[Any, Iterable[list[Document]] | None] | None = None  # what the next pool will be made of

    def position(self) -> dict[str, Any]:
        """JSON-able."""
        return {"epoch": self.epoch, "pool": self.pool, "done": self.done, "start": self.start}

    def go_to(self, position: dict[str, Any]) -> None:
        self.epoch, self.pool, self.start = position["epoch"], position["pool"], position["start"]
        self.examples = self.ahead = None
        if self.start is not None:
            self.documents.examples.load_state(self.start)
            self._start_pool()
        self.done = position["done"]

    def close(self) -> None:
        """No batch is wanted any more."""
        if self.workers is not None:
            self.workers.close()

    def __next__(self) -> dict[str, Any]:
        if self.done == len(self.batches):
            self._next_pool()
        batch = self.batches[self.done]
        self.done += 1
        return self.collator(batch, salt=self.epoch)

    def _next_pool(self) -> None:
        self.pool += 1
        self._start_pool()
        if self.batches:
            return
        # The epoch has ended. (Not "while": data without a usable document would be read for ever.)
        self.epoch, self.pool, self.examples, self.ahead = self.epoch + 1, 0, None, None
        self._start_pool()
        if not self.batches:
            raise ValueError(f"{self.documents.examples.origin} holds no usable document; give data with some")

    def _start_pool(self) -> None:
        self.start, documents = self.ahead or self._read_pool()
        pool: list[Document] = []
        while documents is not None and not pool:
            pool = [each for several in documents for each in several]
            if not pool:
                documents = self._read_pool()[1]
        if self.documents.recipe.workers:
            self.ahead = self._read_pool()
        rng = random.Random(f"{self.seed} {self.epoch} {self.pool}")
        self.batches, self.done = grouped(pool, self.batch_size, rng), 0

    def _read_pool(self) -> tuple[Any, Iterable[list[Document]] | None]:
        """Where a pool begins, and its examples' documents; None at the end of an epoch."""
        recipe, start = self.documents.recipe, self.documents.examples.state()
        if self.examples is None:
            self.examples = iter(self.documents.examples)
        examples = list(islice(self.examples, recipe.pool))
        if not examples:
            return start, None
        if not recipe.workers:
            return start, (self.documents.of(*example) for example in examples)
        self.workers = self.workers or Workers(self.documents, recipe.workers)
        return start, self.workers.submit(examples)


def found_files(patterns: list[str]) -> list[str]:
    """The files that paths and patterns name, of one kind."""
    files: list[str] = []
    for pattern in patterns:
        path = str(Path(pattern).expanduser())
        # A path that is there names itself, also with the brackets of a pattern.
        found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not found:
            raise ValueError(f"data.files has {pattern!r}, which names no file; give a path that exists")
        if folders := [each for each in found if os.path.isdir(each)]:
            raise ValueError(
                f"data.files has {pattern!r}, and {folders[0]} is a folder; give files, as by .../*.jsonl"
            )
        files += found
    kinds = {Path(file).suffix for file in files}
    if unknown := sorted(kinds - BUILDERS.keys()):
        raise ValueError(f"data.files are {', '.join(unknown)}; give {', '.join(BUILDERS)}")
    if len({BUILDERS[kind] for kind in kinds}) > 1:
        raise ValueError(f"data.files are {', '.join(sorted(kinds))}; give files of one kind")
    return files


def sizes_of(recipe: DataRecipe) -> dict[str, int]:
    """Each file's size, by which a resumed run notices other data."""
    return {} if recipe.files is None else {file: Path(file).stat().st_size for file in found_files(recipe.files)}


__all__ = ["Batches", "Documents", "Examples", "found_files", "sizes_of"]
