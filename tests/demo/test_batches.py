"""Rows laid out on the grid of blocks."""

from itertools import islice

import pytest
import torch

from twotower.demo.batches import IGNORED, collate, training_batches
from twotower.demo.problems import training_problems
from twotower.demo.tokenizer import train_tokenizer

PAD, EOS, SIZE = 0, 2, 8


@pytest.mark.parametrize(("offset", "answer"), [(0, 5), (0, 7), (0, 8), (3, 4), (7, 20)])
def test_a_prompt_ends_where_it_should_and_the_last_block_is_full(offset, answer):
    prompt, target = list(range(10, 15)), list(range(30, 30 + answer))
    batch = collate([(prompt, target), ([9] * 11, [8] * 3)], [offset, 0], SIZE, PAD, EOS)
    width = batch.input_ids.shape[1]
    assert width % SIZE == 0
    start = int((batch.labels[0] != IGNORED).nonzero()[0])
    assert start % SIZE == offset
    assert batch.input_ids[0, start - 5 : start].tolist() == prompt
    assert batch.input_ids[0, start : start + answer].tolist() == target
    assert (batch.input_ids[0, start + answer :] == EOS).all()
    assert 0 < width - start - answer <= SIZE
    assert torch.equal(batch.labels[0, start:], batch.input_ids[0, start:])
    assert batch.attention_mask[0].tolist() == [0] * (start - 5) + [1] * (width - start + 5)
    assert (batch.input_ids[0, : start - 5] == PAD).all()


def test_batches_are_seeded_and_offsets_vary_as_asked():
    tokenizer = train_tokenizer(islice(training_problems(0), 500))

    def batches(seed, aligned):
        return list(islice(training_batches(tokenizer, 4, SIZE, aligned, seed), 20))

    def offsets(drawn):
        return [int((row != IGNORED).nonzero()[0]) % SIZE for batch in drawn for row in batch.labels]

    first, again, other = batches(1, 0.5), batches(1, 0.5), batches(2, 0.5)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, other, strict=True))
    assert set(offsets(batches(1, 1.0))) == {0}
    assert set(offsets(first)) == set(range(SIZE))


def test_a_share_of_rows_is_labelled_on_numbers_only():
    tokenizer = train_tokenizer(islice(training_problems(0), 500))
    digits = set(tokenizer.convert_tokens_to_ids(list("0123456789")))
    plain = next(training_batches(tokenizer, 4, SIZE, 1.0, 1))
    batch = next(training_batches(tokenizer, 4, SIZE, 1.0, 1, numbers_only=1.0))
    assert torch.equal(batch.input_ids, plain.input_ids)
    expected = [[token if token in digits else IGNORED for token in row] for row in plain.labels.tolist()]
    assert batch.labels.tolist() == expected
    drawn = islice(training_batches(tokenizer, 4, SIZE, 1.0, 1, numbers_only=0.5), 20)
    shares = [set(row.tolist()) <= digits | {IGNORED} for batch in drawn for row in batch.labels]
    assert 0.3 < sum(shares) / len(shares) < 0.7
