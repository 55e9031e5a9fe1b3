"""Documents from files: every kind, in an order that can be gone on with, and what is refused about them."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from twotower.training.collator import BlockCollator, Document
from twotower.training.data import Batches, Documents, found_files
from twotower.training.recipe import DataRecipe

SIZE, MASK = 8, 3


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write(folder: Path, rows: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def documents(tokenizer, recipe: DataRecipe) -> list[Document]:
    read = Documents(recipe, tokenizer, SIZE, MASK, seed=0)
    return [document for example in read.examples for document in read.of(*example)]


TEXTS = [f"Tom has {number} apples and buys 3 more at the fair." for number in range(30)]


def test_every_kind_of_file_and_a_repository_give_the_same(tokenizer, tmp_path, monkeypatch):
    write(tmp_path, [{"text": text} for text in TEXTS])
    (tmp_path / "data.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "repository").mkdir()
    for place in (tmp_path / "data.parquet", tmp_path / "repository" / "train.parquet"):
        Dataset.from_list([{"text": text} for text in TEXTS]).to_parquet(place)
    expected = [Document(tokenizer(text).input_ids) for text in TEXTS]
    for kind in ("jsonl", "txt", "parquet"):
        assert documents(tokenizer, DataRecipe(files=[str(tmp_path / f"data.{kind}")])) == expected, kind
    assert documents(tokenizer, DataRecipe(dataset=str(tmp_path / "repository"))) == expected
    assert len(documents(tokenizer, DataRecipe(dataset=str(tmp_path / "repository"), examples=7))) == 7
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents(tokenizer, DataRecipe(dataset="~/repository")) == expected


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
@pytest.mark.parametrize("name", ["a[1].jsonl", "what?.txt", "two [2]/*.parquet"])
def test_a_file_of_any_name_is_read_whole(name, mark, tokenizer, tmp_path):
    """Also one that begins with a byte-order mark."""
    file, other = tmp_path / name, tmp_path / f"other{Path(name).suffix}"
    file.parent.mkdir(exist_ok=True)
    contents = {".jsonl": mark + b'{"text": "Tom has 3 apples."}\n', ".txt": mark + b"Tom has 3 apples.\n"}
    for place in (file, other):
        if place.suffix == ".parquet":
            Dataset.from_list([{"text": "Tom has 3 apples."}]).to_parquet(place)
        else:
            place.write_bytes(contents[place.suffix])
    expected = [Document(tokenizer("Tom has 3 apples.").input_ids)]
    assert documents(tokenizer, DataRecipe(files=[str(file)])) == expected
    assert documents(tokenizer, DataRecipe(files=[str(file), str(other)])) == expected * 2


def test_a_prompt_and_its_completion(tokenizer, tmp_path):
    file = write(tmp_path, [{"q": TEXTS[0], "a": " He has 3."}])
    (document,) = documents(tokenizer, DataRecipe(files=[file], prompt="q", completion="a"))
    prompt = tokenizer(TEXTS[0]).input_ids
    answer = tokenizer(" He has 3.", add_special_tokens=False).input_ids
    assert document == Document(prompt + answer, len(prompt))


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt(tmp_path):
    rows = [{"question": "Tom has 3 apples.", "answer": " How many apples?"}]
    recipe = DataRecipe(files=[write(tmp_path, rows)], prompt="question", completion="answer")
    ending = tiny_tokenizer()
    [expected] = documents(ending, recipe)
    bos, eos = ending.bos_token, ending.eos_token
    ending._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, ending.bos_token_id), (eos, ending.eos_token_id)]
    )
    assert ending("Tom").input_ids[-1] == ending.eos_token_id
    assert documents(ending, recipe) == [expected]


def test_long_texts_are_cut_and_lose_nothing(tokenizer, tmp_path):
    file = write(tmp_path, [{"text": " ".join(TEXTS[:5])}])
    cut = documents(tokenizer, DataRecipe(files=[file], max_tokens=20))
    assert [token for piece in cut for token in piece.ids] == tokenizer(" ".join(TEXTS[:5])).input_ids
    assert [piece.ends for piece in cut] == [False] * (len(cut) - 1) + [True]
    assert all(SIZE <= len(piece.ids) <= 20 + SIZE for piece in cut)


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet", "generated"])
def test_batches_go_on_where_they_were(kind, tokenizer, tmp_path):
    """Over epochs and pools, from a position that went through JSON."""
    write(tmp_path, [{"text": text} for text in TEXTS])
    (tmp_path / "data.txt").write_text("\n".join(TEXTS) + "\n")
    Dataset.from_list([{"text": text} for text in TEXTS]).to_parquet(tmp_path / "data.parquet")
    origin = {"files": [str(tmp_path / f"data.{kind}")]}
    if kind == "generated":
        origin = {"generated": "tasks"}
    recipe = DataRecipe(**origin, pool=12)

    def batches() -> Batches:
        return Batches(Documents(recipe, tokenizer, SIZE, MASK, 0), BlockCollator(2, SIZE), 5, seed=4)

    whole = batches()
    taken, positions = [], []
    for _ in range(20):
        positions.append(json.dumps(whole.position()))
        taken.append(next(whole)["input_ids"].tolist())
    assert whole.epoch == (0 if kind == "generated" else 2)
    for at in (0, 1, 3, 7, 8, 13):
        rest = batches()
        rest.go_to(json.loads(positions[at]))
        assert [next(rest)["input_ids"].tolist() for _ in range(4)] == taken[at : at + 4], at


@pytest.mark.parametrize("kind", ["files", "tasks"])
def test_workers_make_the_same_batches(kind, tokenizer, tmp_path):
    origin = {"generated": "tasks"}
    if kind == "files":
        origin = {"files": [write(tmp_path, [{"text": text} for text in TEXTS])]}
    alone, helped = (
        Batches(
            Documents(DataRecipe(**origin, pool=12, workers=workers), tokenizer, SIZE, MASK, 0),
            BlockCollator(2, SIZE),
            5,
            seed=4,
        )
        for workers in (0, 2)
    )
    for _ in range(12):
        position = helped.position()
        assert position == alone.position()
        assert torch.equal(next(helped)["input_ids"], next(alone)["input_ids"])
    helped.go_to(position)
    alone.go_to(position)
    assert torch.equal(next(helped)["input_ids"], next(alone)["input_ids"])
    assert helped.workers is not None and alone.workers is None and alone.epoch == (kind == "files")


def test_every_document_comes_once_an_epoch(tokenizer, tmp_path):
    recipe = DataRecipe(files=[write(tmp_path, [{"text": text} for text in TEXTS])], pool=12)
    batches = Batches(Documents(recipe, tokenizer, SIZE, MASK, 0), BlockCollator(2, SIZE), 4, seed=0)
    orders: list[list[str]] = [[], []]
    while True:
        batch = next(batches)
        if batches.epoch == 2:
            break
        for row, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            orders[batches.epoch].append(tokenizer.decode(row[mask], skip_special_tokens=True).strip())
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(TEXTS)
    assert orders[0] != orders[1] and orders[0] != TEXTS


def test_a_rest_too_short_to_be_a_document_stays_with_the_piece_before_it(tokenizer, tmp_path):
    text = " ".join(TEXTS)
    ids = tokenizer(text).input_ids
    size = next(size for size in range(40, 80) if 0 < len(ids) % size < SIZE)
    recipe = DataRecipe(files=[write(tmp_path, [{"text": text}])], max_tokens=size)
    pieces = documents(tokenizer, recipe)
    assert [token for piece in pieces for token in piece.ids] == ids
    assert len(pieces[-1].ids) == size + len(ids) % size and pieces[-1].ends


WRONG = {
    "no such column": ([{"body": "a"}], {}, "has no column 'text', but body; name one in data.text"),
    "no text": ([{"text": TEXTS[0]}, {"text": 3}], {"text": "text"}, "example [12] of .*data.jsonl .*(int|could not)"),
    "an empty document": (
        [{"text": " \n"}],
        {},
        "example 1 of .* is empty in 'text': give it text, or .*unusable: skip",
    ),
    "no document": ([{"text": None}], {}, "example 1 of .* is empty in 'text': give it text"),
    "a short one": (
        [{"text": "Tom"}],
        {},
        "example 1 of .* has 4 tokens, and a document must have 8.*data.min_tokens",
    ),
    "a block too long": (
        [{"text": TEXTS[0]}],
        {"max_tokens": 7},
        "data.max_tokens is 7, less than a block of 8 tokens",
    ),
    "paragraphs of lines that are documents": (
        [{"text": TEXTS[0]}],
        {"text_by": "paragraph"},
        "data.text_by is paragraph, which goes with .txt, but data.files has .*data.jsonl; leave it out",
    ),
    "a prompt too long": (
        [{"q": " ".join(TEXTS), "a": "b"}],
        {"prompt": "q", "completion": "a", "max_tokens": 64},
        "has a prompt of [0-9]+ tokens, of at most 64 in all; raise data.max_tokens, or leave such out",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_document_is_named(case, tokenizer, tmp_path):
    rows, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as caught:
        documents(tokenizer, DataRecipe(files=[write(tmp_path, rows)], **options))
    assert "\n" not in str(caught.value)


def test_unusable_documents_may_be_skipped_and_short_ones_filled(tokenizer, tmp_path):
    file = write(tmp_path, [{"text": "Tom"}, {"text": ""}, {"text": None}, {"text": TEXTS[0]}])
    assert len(documents(tokenizer, DataRecipe(files=[file], unusable="skip"))) == 1
    assert len(documents(tokenizer, DataRecipe(files=[file], unusable="skip", min_tokens=1))) == 2
    long = write(tmp_path, [{"q": " ".join(TEXTS), "a": "b"}, {"q": TEXTS[0], "a": "b"}], "long.jsonl")
    asked = DataRecipe(files=[long], prompt="q", completion="a", max_tokens=64, unusable="skip")
    assert len(documents(tokenizer, asked)) == 1


def test_the_mask_in_a_text_is_refused(tokenizer, tmp_path):
    recipe = DataRecipe(files=[write(tmp_path, [{"text": TEXTS[0]}])])
    read = Documents(recipe, tokenizer, SIZE, tokenizer(TEXTS[0]).input_ids[4], seed=0)
    with pytest.raises(
        ValueError, match=r"example 1 of .* has token \d+, which is to be \[MASK\]; choose as mask_token_id"
    ):
        [read.of(*example) for example in read.examples]


def test_data_without_a_usable_document_is_refused(tokenizer, tmp_path):
    recipe = DataRecipe(files=[write(tmp_path, [{"text": ""}])], unusable="skip")
    batches = Batches(Documents(recipe, tokenizer, SIZE, MASK, 0), BlockCollator(2, SIZE), 5, seed=4)
    with pytest.raises(ValueError, match="holds no usable document; give data with some"):
        next(batches)


def test_files_that_are_refused(tmp_path):
    for name in ("a.jsonl", "b.txt", "c.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder").mkdir()
    for patterns, message in (
        (["folder"], "data.files has '.*folder', and .*folder is a folder; give files, as by .../"),
        (["absent.jsonl"], "data.files has '.*absent.jsonl', which names no file"),
        (["c.csv"], "data.files are .csv; give .jsonl, .json, .txt, .parquet"),
        (["a.jsonl", "b.txt"], "data.files are .jsonl, .txt; give files of one kind"),
    ):
        with pytest.raises(ValueError, match=message):
            found_files([str(tmp_path / pattern) for pattern in patterns])
    assert found_files([str(tmp_path / "*.jsonl")]) == [str(tmp_path / "a.jsonl")]
    (tmp_path / "a[1].jsonl").write_text("")
    assert found_files([str(tmp_path / "a[1].jsonl")]) == [str(tmp_path / "a[1].jsonl")]


def test_a_broken_file_is_named(tokenizer, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"data.jsonl cannot be read") as caught:
        documents(tokenizer, DataRecipe(files=[str(file)]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [("data.jsonl", b"", "it is empty"), ("data.parquet", b"PAR1 and no more", ".*not a parquet file")],
)
def test_a_file_that_cannot_be_opened_is_named(name, content, problem, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read: {problem}") as caught:
        documents(tokenizer, DataRecipe(files=[str(tmp_path / name)]))
    assert "\n" not in str(caught.value)


def helped(tokenizer, tmp_path, rows, **options):
    recipe = DataRecipe(files=[write(tmp_path, rows)], workers=1, min_tokens=1, **options)
    return Batches(Documents(recipe, tokenizer, SIZE, MASK, 0), BlockCollator(2, SIZE), 4, seed=0)


def test_workers_never_see_ctrl_c_and_their_end_is_an_error_of_one_line(tokenizer, tmp_path):
    batches = helped(tokenizer, tmp_path, [{"text": TEXTS[0]}] * 12, pool=4)
    next(batches)
    (worker,) = batches.workers.executor._processes
    os.kill(worker, signal.SIGINT)
    next(batches)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"has been ended.*give fewer data.workers, or 0"):
        for _ in range(9):
            next(batches)


def test_what_workers_have_not_begun_when_a_run_ends_is_left(tokenizer, tmp_path):
    batches = helped(tokenizer, tmp_path, [{"text": TEXTS[0]}] * 4000, pool=2000)
    next(batches)
    executor = batches.workers.executor
    coming, manager = list(executor._pending_work_items.values()), executor._executor_manager_thread
    batches.close()
    manager.join()
    assert coming[-1].future.cancelled()
