"""Batches for the diffusion objective: documents on the grid of blocks, each in a row of its own.

A document's blocks begin anywhere in it, as those of generating do: columns of padding before it move it on the grid.
The block this cuts off at its beginning is read and not trained on; the last block is filled with end-of-text, as the
denoiser is to fill it. Documents are never joined in a row: a Mamba state would have to be forgotten between them, and
attention kept apart. Instead documents of alike lengths share a batch ([`grouped`]), which costs little padding and
cannot leak, since no row of a batch sees another.

Shapes: B rows, T columns (a multiple of S), S block.
"""

import random
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

IGNORED = -100
# What a row of a Trainer's may say of each of its tokens.
MARKS = ("attention_mask", "labels", "completion_mask", "assistant_masks")


class Document(NamedTuple):
    """
    Token ids, how many at the beginning are a prompt (read, not trained on), and whether the text ends with them or
    was cut for being too long.
    """

    ids: list[int]
    prompt: int = 0
    ends: bool = True


class BlockCollator:
    """
    Lays rows out for `model(**batch)`; a `data_collator` for transformers' Trainer and TRL's SFTTrainer.

    Which offset a document gets is a hash of its tokens, so that a resumed run draws none again; `salt` changes it.

    Args:
        eos_token_id: ends every document that does not end with it, and fills its last block.
        block_size: S; of several, one is drawn per batch, which then has a `block_size`.
        pad_token_id: default `eos_token_id`; what it is has no effect.
        aligned: share of documents with a prompt whose first block begins where the prompt ends, as in generating;
            the others' begin anywhere.
        seed: of offsets and block lengths.

    Raises:
        ValueError: for no end-of-text id, a block size below 1, or a share outside [0, 1].
    """

    def __init__(
        self,
        eos_token_id: int | None,
        block_size: int | Sequence[int],
        pad_token_id: int | None = None,
        aligned: float = 0.6,
        seed: int = 0,
    ):
        if eos_token_id is None:
            raise ValueError("eos_token_id is None; give the id that ends a text, which also fills its last block")
        self.block_sizes = [block_size] if isinstance(block_size, int) else list(block_size)
        if not self.block_sizes or min(self.block_sizes) < 1:
            raise ValueError(f"block_size is {block_size}; give one of at least 1, or several")
        if not 0 <= aligned <= 1:
            raise ValueError(f"aligned is {aligned}; give a share in [0, 1]")
        self.eos_token_id = eos_token_id
        self.pad_token_id = eos_token_id if pad_token_id is None else pad_token_id
        self.aligned, self.seed = aligned, seed

    def __call__(self, rows: Sequence[Document | Mapping[str, Any]], salt: int = 0) -> dict[str, Any]:
        """
        Args:
            rows: documents, or mappings with "input_ids" and, where a prompt is not to be trained on, "labels" (-100
                on it) or TRL's "completion_mask" or "assistant_masks" (0 on it; transformers' Trainer removes such
                columns, but with `remove_unused_columns=False`). What an "attention_mask" of theirs says is padding is
                left out.
            salt: another one lays the same documents out otherwise, in another epoch say.

        Returns:
            `input_ids`, `attention_mask` and `labels` (B, T) int64, and with several block lengths `block_size`.
        """
        documents = [row if isinstance(row, Document) else document_of(row) for row in rows]
        size = self._drawn(documents, salt).choice(self.block_sizes)
        laid_out = [self._lay_out(document, size, self._drawn([document], salt)) for document in documents]
        if all(document.prompt for document in documents):
            # What is trained on begins in the same block of all rows: the blocks from there on are denoised.
            starts = [(lead + first) // size for lead, _, first in laid_out]
            laid_out = [
                (lead + (max(starts) - start) * size, ids, first)
                for (lead, ids, first), start in zip(laid_out, starts, strict=True)
            ]
        width = max(lead + len(ids) for lead, ids, _ in laid_out)
        width += -width % size
        ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (self.pad_token_id, 0, IGNORED))
        for row, (lead, tokens, first) in enumerate(laid_out):
            end = lead + len(tokens)
            ids[row, lead:end] = torch.tensor(tokens)
            mask[row, lead:end] = 1
            labels[row, lead + first : end] = ids[row, lead + first : end]
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return batch if len(self.block_sizes) == 1 else {**batch, "block_size": size}

    def _drawn(self, documents: Iterable[Document], salt: int) -> random.Random:
        """What draws the same for the same documents."""
        content = 0
        for document in documents:
            content = zlib.crc32(array("q", document.ids).tobytes(), content)
        return random.Random(f"{self.seed} {salt} {content}")

    def _lay_out(self, document: Document, size: int, rng: random.Random) -> tuple[int, list[int], int]:
        """Columns of padding before a document, its tokens up to the end of a block, and the first one trained on."""
        ids, prompt, ends = document
        if ends and (not ids or ids[-1] != self.eos_token_id):
            ids = [*ids, self.eos_token_id]
        lead = rng.randrange(size)
        if prompt and rng.random() < self.aligned:
            lead = -prompt % size
        first = _first_trained(prompt, lead, size)
        if first >= len(ids):  # nothing but a block cut off
            lead, first = 0, prompt
        rest = -(lead + len(ids)) % size
        if ends:
            return lead, ids + [self.eos_token_id] * rest, first
        # What the next piece goes on with is not known: a block that it would fill is left out.
        whole = len(ids) - (size - rest if rest else 0)
        return (lead, ids[:whole], first) if whole > first else (lead, ids, len(ids))


def _first_trained(prompt: int, lead: int, size: int) -> int:
    """The first token trained on: after the prompt, and not in a block that padding has cut short."""
    return prompt if lead == 0 else max(prompt, size - lead)


def document_of(row: Mapping[str, Any]) -> Document:
    """A document of a row that a Trainer's dataset has."""
    if row.get("input_ids") is None:
        others = ", ".join(str(name) for name in row if name != "input_ids")
        raise ValueError(f"a row has {others or 'nothing'}, but no input_ids; tokenize the texts first")
    lengths = row.get("seq_lengths")
    if lengths is not None and len(lengths) > 1:
        raise ValueError("a row holds several texts, packed (seq_lengths); give each a row of its own: packing=False")
    ids = [int(token) for token in row["input_ids"]]
    marks = {name: list(map(int, row[name])) for name in MARKS if row.get(name) is not None}
    for name, values in marks.items():
        if len(values) != len(ids):
            raise ValueError(f"a row has {len(ids)} input_ids and {len(values)} {name}; make them equally many")
    kept = [at for at, real in enumerate(marks.pop("attention_mask", [1] * len(ids))) if real]
    if kept and len(kept) <= kept[-1] - kept[0]:
        raise ValueError("a row's attention_mask has a hole; mask padding at the ends of a row only")
    ids, marks = [ids[at] for at in kept], {name: [values[at] for at in kept] for name, values in marks.items()}
    labels = marks.pop("labels", ids)
    if any(label not in (token, IGNORED) for token, label in zip(ids, labels, strict=True)):
        raise ValueError(
            f"a row has labels that are neither its input_ids nor {IGNORED}; give these: what is masked is drawn later"
        )
    wanted = [label != IGNORED and all(flags) for label, *flags in zip(labels, *marks.values(), strict=True)]
    prompt = wanted.index(True) if True in wanted else len(ids)
    if not all(wanted[prompt:]):
        raise ValueError(
            "a row's labels have a gap: the collator lays out a prompt without labels and a text with; give each turn "
            "a row of its own, or collate such rows yourself"
        )
    # Of a prompt alone, as one cut off before its completion, it is not known that it ends.
    return Document(ids, prompt, not ids or prompt < len(ids))


def grouped(documents: Sequence[Document], batch_size: int, rng: random.Random) -> list[list[Document]]:
    """Batches of documents of alike lengths, first of what is trained on, in an order of their own."""
    ranked = sorted(documents, key=lambda document: ((len(document.ids) - document.prompt) // 16, len(document.ids)))
    batches = [ranked[start : start + batch_size] for start in range(0, len(ranked), batch_size)]
    rng.shuffle(batches)
    return batches


__all__ = ["IGNORED", "BlockCollator", "Document", "document_of", "grouped"]
