"""Documents on the grid of blocks: offsets, ends, prompts, and that rows of a batch never meet."""

import random
from itertools import islice

import pytest
import torch
from tiny import random_ids, tiny_model, tiny_tokenizer

from twotower.demo.tasks import training_tasks
from twotower.training.collator import IGNORED, BlockCollator, Document, document_of, grouped

EOS, SIZE = 2, 4


def laid_out(document: Document, **options):
    """A document's row: its columns of padding, tokens, and labels."""
    batch = BlockCollator(EOS, SIZE, pad_token_id=0, **options)([document])
    mask = batch["attention_mask"][0].bool()
    lead = int(mask.int().argmax())
    return lead, batch["input_ids"][0][mask].tolist(), batch["labels"][0][mask].tolist()


@pytest.mark.parametrize("length", range(1, 14))
@pytest.mark.parametrize("prompt", [0, 1, 3, 6])
def test_a_document_ends_with_whole_blocks_of_end_of_text(length, prompt):
    ids = list(range(10, 10 + length + prompt))
    for seed in range(8):
        lead, tokens, labels = laid_out(Document(ids, prompt), seed=seed)
        assert 0 <= lead < SIZE and (lead + len(tokens)) % SIZE == 0
        assert tokens[: len(ids)] == ids and set(tokens[len(ids) :]) == {EOS} and len(tokens) <= len(ids) + SIZE
        first = next(at for at, label in enumerate(labels) if label != -100)
        assert labels[first:] == tokens[first:] and set(labels[:first]) <= {-100}
        # Neither a prompt is trained on, nor a block that padding has cut short.
        assert first == prompt if lead == 0 else first == max(prompt, SIZE - lead)


def test_offsets_vary_and_are_the_same_for_the_same_document():
    documents = [Document([10 + number, *range(20, 29)]) for number in range(200)]
    leads = [laid_out(document)[0] for document in documents]
    assert {lead: 30 < leads.count(lead) < 70 for lead in leads} == dict.fromkeys(range(SIZE), True)
    assert leads == [laid_out(document)[0] for document in documents]
    assert leads != [laid_out(document, seed=1)[0] for document in documents]
    collate = BlockCollator(EOS, SIZE)
    again = [collate([document], salt=salt)["input_ids"].tolist() for salt in (0, 1) for document in documents[:20]]
    assert again[:20] != again[20:], "another epoch is laid out otherwise"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_first_blocks_begins_where_the_prompt_ends(share):
    found = []
    for number in range(200):
        lead, _, _ = laid_out(Document([10 + number, *range(20, 32)], 7), aligned=share)
        found.append((lead + 7) % SIZE == 0)
    assert abs(sum(found) / 200 - (share + (1 - share) / SIZE)) < 0.1


def test_a_piece_of_a_longer_text_ends_with_a_whole_block():
    """What would follow in its last block is not known; end-of-text does not."""
    for seed in range(8):
        lead, tokens, labels = laid_out(Document(list(range(10, 24)), ends=False), seed=seed)
        assert (lead + len(tokens)) % SIZE == 0 and EOS not in tokens and len(tokens) > 14 - SIZE
        assert labels[-1] == tokens[-1]


def test_block_lengths_are_mixed_within_a_run_not_within_a_batch():
    collate = BlockCollator(EOS, [4, 8])
    sizes = []
    for number in range(40):
        batch = collate([Document([number + 9] * 11), Document([number + 9] * 5)])
        sizes.append(batch["block_size"])
        assert batch["input_ids"].shape[1] % batch["block_size"] == 0
    assert 10 < sizes.count(4) < 30 and set(sizes) == {4, 8}
    assert "block_size" not in BlockCollator(EOS, 4)([Document([9] * 5)])


def test_rows_of_trainers():
    marks = ({"labels": [-100, 11, 12]}, {"completion_mask": [0, 1, 1]}, {"assistant_masks": [0, 1, 1]})
    for extra in (*marks, {"labels": [10, 11, 12], **marks[1]}):
        assert document_of({"input_ids": torch.tensor([10, 11, 12]), **extra}) == Document([10, 11, 12], 1)
    assert document_of({"input_ids": [10, 11]}) == Document([10, 11])
    # Cut off before its completion: to end there would be wrong.
    prompts = [
        {"input_ids": [10, 11, 12], "labels": [IGNORED] * 3},
        {"input_ids": [10] * 4, "completion_mask": [0] * 4},
    ]
    assert (BlockCollator(EOS, 4)(prompts)["labels"] == IGNORED).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_rows_is_no_text(side):
    """As tokenizers leave it with padding="max_length", whatever its labels."""

    def padded(values, fill):
        return [fill] * 3 + values if side == "left" else values + [fill] * 3

    mask = {"attention_mask": padded([1, 1, 1], 0)}
    ids = {"input_ids": padded([10, 11, 12], EOS), **mask}
    assert document_of(ids) == document_of({**ids, "labels": ids["input_ids"]}) == Document([10, 11, 12])
    assert document_of({**ids, "labels": padded([IGNORED, 11, 12], IGNORED)}) == Document([10, 11, 12], 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "a row has text, but no input_ids; tokenize the texts first"),
        ({"input_ids": None, "labels": [1]}, "a row has labels, but no input_ids; tokenize the texts first"),
        ({"input_ids": [1, 2], "labels": [1]}, "a row has 2 input_ids and 1 labels"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "a row has 2 input_ids and 1 attention_mask; make them"),
        ({"input_ids": [1, 2, 3], "completion_mask": [1, 0, 1]}, "a row's labels have a gap"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "a row's attention_mask has a hole"),
        ({"input_ids": [1, 3], "labels": [1, 2]}, "a row has labels that are neither its input_ids nor -100"),
        ({"input_ids": [1, 2], "seq_lengths": [1, 1]}, "a row holds several texts, packed .seq_lengths.; give each"),
    ],
)
def test_rows_that_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        document_of(row)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_token_id": None, "block_size": 4}, "eos_token_id is None; give the id that ends a text"),
        ({"eos_token_id": 2, "block_size": 0}, "block_size is 0; give one of at least 1"),
        ({"eos_token_id": 2, "block_size": []}, r"block_size is \[\]"),
        ({"eos_token_id": 2, "block_size": 4, "aligned": 1.2}, r"aligned is 1.2; give a share in \[0, 1\]"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlockCollator(**options)


def test_no_document_of_a_batch_sees_another():
    """By perturbation: with other neighbours, each row's loss stays, bit for bit what it was. By gradient: none."""
    model = tiny_model("all kinds").double()
    collate = BlockCollator(EOS, SIZE, pad_token_id=0)
    documents = [Document(random_ids(length, seed=length).tolist()) for length in (13, 9, 17)]
    others = [documents[0], *(Document(random_ids(length, seed=length).tolist()) for length in (10, 16))]

    def loss_of_first(rows):
        batch = collate(rows)
        batch["labels"][1:] = -100
        return model(**batch, generator=torch.Generator().manual_seed(0)).loss

    assert loss_of_first(documents) == loss_of_first(others)
    embedded = []
    for tower in (model.context_tower, model.denoiser_tower):
        tower.embeddings.register_forward_hook(lambda _, __, output: embedded.append(output.retain_grad() or output))
    read = model.context_tower.read_blocks
    # The context pass with gradients, as the objective never takes it, so that they could show a leak there.
    model.context_tower.read_blocks = lambda *arguments: torch.enable_grad()(read)(*arguments)
    loss_of_first(documents).backward()
    context, denoiser = embedded
    blocks = context.shape[1] // SIZE
    assert context.grad[0].abs().sum() > 0 and not context.grad[1:].any()
    denoised = denoiser.grad.unflatten(0, (3, -1))
    assert denoised.shape[1] <= blocks and denoised[0].abs().sum() > 0 and not denoised[1:].any()


def padding_share(batches):
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def test_alike_lengths_share_a_batch():
    """Measured on the word problems: 1,024 documents in batches of 8."""
    tokenizer = tiny_tokenizer()
    documents = [Document(tokenizer(each.text).input_ids) for each in islice(training_tasks(1), 1024)]
    collate = BlockCollator(EOS, 16)
    rng = random.Random(0)
    shares = {
        "grouped": padding_share(map(collate, grouped(documents, 8, rng))),
        "as they come": padding_share(collate(documents[start : start + 8]) for start in range(0, 1024, 8)),
    }
    assert shares["grouped"] < 0.1 < shares["as they come"], shares
    assert sorted(len(batch) for batch in grouped(documents[:20], 8, rng)) == [4, 8, 8]


def test_answers_of_a_batch_begin_in_the_same_block():
    documents = [Document(list(range(10, 10 + prompt + 5)), prompt) for prompt in (2, 7, 15, 16, 29)]
    labels = BlockCollator(EOS, SIZE)(documents)["labels"]
    first = (labels != -100).int().argmax(1) // SIZE
    assert len(set(first.tolist())) == 1


def test_batches_are_put_together_by_how_much_is_trained_on():
    documents = [Document([10] * (prompt + answer), prompt) for prompt in (5, 40) for answer in (8, 90)]
    batches = grouped(documents, 2, random.Random(0))
    assert sorted({len(each.ids) - each.prompt for each in batch} for batch in batches) == [{8}, {90}]
