"""Processors asked about all rows and positions at once against each asked about one row and position by itself."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from transformers import GenerationConfig, GenerationMixin, WatermarkingConfig
from transformers.generation import logits_process as lp

from twotower.decoding.text_processors import (
    VECTORISED,
    PreparedProcessors,
    TextProcessors,
    Texts,
)

VOCAB = 7
LONGEST = 40
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e30, -1e-30]


def tokens(draw, least=1, most=6):
    return [draw.randrange(VOCAB) for _ in range(draw.randint(least, most))]


def sequences(draw):
    drawn = [tokens(draw, most=draw.choice([1, 2, 3, 5])) for _ in range(draw.randint(1, 12))]
    return list({tuple(token % draw.choice([2, VOCAB]) for token in one) for one in drawn})


def eos(draw):
    ids = tokens(draw, most=3)
    return draw.choice([ids, ids[0], torch.tensor(ids)])


def ignored(draw):
    count = draw.randint(0, 8)
    return draw.choice([None, count, torch.tensor([count])])


# A processor of each class with arguments of any kind it takes; `draw` is a random.Random.
MAKERS = {
    lp.RepetitionPenaltyLogitsProcessor: lambda draw: (draw.choice([0.3, 1.7]), ignored(draw)),
    lp.EncoderRepetitionPenaltyLogitsProcessor: lambda draw: (draw.choice([0.3, 1.7]), torch.tensor([tokens(draw)])),
    lp.NoRepeatNGramLogitsProcessor: lambda draw: (draw.choice([1, 2, 3, 6]),),
    lp.EncoderNoRepeatNGramLogitsProcessor: lambda draw: (
        draw.choice([1, 2, 3, 6]),
        torch.tensor([tokens(draw, most=20)]) % draw.choice([2, VOCAB]),
    ),
    lp.SequenceBiasLogitsProcessor: lambda draw: (
        {one: draw.choice([draw.gauss(0, 3), math.inf, -math.inf]) for one in sequences(draw)},
    ),
    lp.NoBadWordsLogitsProcessor: lambda draw: ([list(one) for one in sequences(draw)], eos(draw)),
    lp.MinLengthLogitsProcessor: lambda draw: (draw.randint(0, 12), eos(draw)),
    lp.MinNewTokensLengthLogitsProcessor: lambda draw: (draw.randint(0, 6), draw.randint(0, 6), eos(draw)),
    lp.SuppressTokensAtBeginLogitsProcessor: lambda draw: (tokens(draw), draw.randint(0, 12)),
    lp.ForcedBOSTokenLogitsProcessor: lambda draw: (draw.randrange(VOCAB),),
    lp.ForcedEOSTokenLogitsProcessor: lambda draw: (draw.randint(1, 14), eos(draw)),
    lp.ExponentialDecayLengthPenalty: lambda draw: (
        (draw.randint(0, 6), draw.choice([1.01, 1.7, 0.9])),
        eos(draw),
        draw.randint(0, 6),
    ),
    lp.TopHLogitsWarper: lambda draw: (draw.choice([0.3, 0.7]),),
    lp.EtaLogitsWarper: lambda draw: (draw.choice([0.05, 0.5]), -math.inf, draw.choice([1, 2])),
}
# These refuse NaN, for which they wait.
REFUSE_NAN = {lp.TopHLogitsWarper, lp.EtaLogitsWarper}
ELEMENTWISE = {
    lp.TemperatureLogitsWarper: lambda draw: (draw.choice([0.5, 1.3]),),
    lp.TopKLogitsWarper: lambda draw: (draw.choice([2, 4]),),
    lp.TopPLogitsWarper: lambda draw: (draw.choice([0.5, 0.8]),),
    lp.SuppressTokensLogitsProcessor: lambda draw: (tokens(draw, most=2),),
    lp.InfNanRemoveLogitsProcessor: lambda draw: (),
}


def make(kind, draw):
    return kind(*{**MAKERS, **ELEMENTWISE}[kind](draw))


class Pass:
    """Random texts, a guess and scores of R rows and S positions."""

    def __init__(self, draw, rows, positions, longest=12, special=True):
        generator = torch.Generator().manual_seed(draw.randrange(2**32))
        self.lengths = [draw.randint(0, longest) for _ in range(rows)]
        width = max(self.lengths) + draw.randint(0, 2)
        used = draw.choice([2, VOCAB])  # of two tokens, long sequences come back
        self.text = torch.randint(used, (rows, width), generator=generator)
        self.guess = torch.randint(used, (rows, positions - draw.randint(0, 1)), generator=generator)
        self.scores = torch.randn(rows, positions, VOCAB, generator=generator) * 3
        if special:
            chosen = torch.rand(self.scores.shape, generator=generator) < 0.2
            values = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), self.scores.shape, generator=generator)]
            self.scores = values.where(chosen, self.scores)

    def texts(self):
        return Texts.with_guess(self.text, torch.tensor(self.lengths), self.guess)

    def ids(self, row, position):
        return torch.cat([self.text[row, : self.lengths[row]], self.guess[row, :position]])[None]

    def expected(self, lists):
        """What each row's processors answer, asked about one position after the other."""
        expected = self.scores.clone()
        for row, processors in enumerate(lists):
            for position in range(expected.shape[1]):
                answer = self.scores[row, position][None]
                for processor in processors:
                    answer = processor(self.ids(row, position), answer.clone())
                expected[row, position] = answer[0]
        return expected

    def found(self, lists):
        return prepared(lists)(self.scores, self.texts())


def prepared(lists):
    return TextProcessors([PreparedProcessors(one, VOCAB, LONGEST) for one in lists], "cpu")


def same_bits(found, expected):
    return found.dtype == expected.dtype and torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("kind", VECTORISED, ids=lambda kind: kind.__name__)
@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 6))
def test_answers_are_the_processors_own(kind, seed, rows, positions):
    draw = random.Random(seed)
    one = Pass(draw, rows, positions, special=kind not in REFUSE_NAN)
    lists = [[make(kind, draw)] for _ in range(rows)]
    before = one.scores.clone()
    found = one.found(lists)
    assert same_bits(found, one.expected(lists))
    assert same_bits(one.scores, before), "scores are the caller's"


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 4))
def test_rows_with_lists_of_their_own(seed, rows, positions):
    draw = random.Random(seed)
    one = Pass(draw, rows, positions, special=False)
    kinds = list((MAKERS.keys() | ELEMENTWISE.keys()) - REFUSE_NAN)
    kinds.sort(key=lambda kind: kind.__name__)
    patterns = [draw.sample(kinds, draw.randint(0, 4)) for _ in range(2)]
    lists = [[make(kind, draw) for kind in draw.choice(patterns)] for _ in range(rows)]
    expected = one.expected(lists)
    assert same_bits(one.found(lists), expected)
    processors = TextProcessors([PreparedProcessors(each, VOCAB, LONGEST) for each in lists], "cpu")
    chosen = draw.sample(range(rows), draw.randint(1, rows))
    index = torch.tensor(chosen)
    selected = processors.select(chosen)
    assert selected is processors.select(chosen)
    assert same_bits(selected(one.scores[index], one.texts().select(index)), expected[index])


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_a_later_position_by_itself(seed):
    draw = random.Random(seed)
    one = Pass(draw, 3, 5)
    lists = [[make(kind, draw) for kind in draw.sample(list(MAKERS), 3)]] * 3
    processors = TextProcessors([PreparedProcessors(each, VOCAB, LONGEST) for each in lists], "cpu")
    whole = processors(one.scores, one.texts())
    for position in range(5):
        here = processors(
            one.scores[:, position : position + 1], one.texts()._replace(lengths=one.texts().lengths + position)
        )
        assert same_bits(here, whole[:, position : position + 1])
    assert same_bits(processors(one.scores, one.texts()), whole), "a pass leaves what was prepared as it was"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_ngram_across_text_and_guess(size):
    text, guess = torch.tensor([[4, 1, 2, 3, 1]]), torch.tensor([[2, 3, 5]])
    scores = torch.zeros(1, 4, VOCAB)
    processors = TextProcessors([PreparedProcessors([lp.NoRepeatNGramLogitsProcessor(size)], VOCAB, LONGEST)], "cpu")
    forbidden = processors(scores, Texts.with_guess(text, torch.tensor([5]), guess)).isneginf()[0]
    expected = {
        1: [{1, 2, 3, 4}, {1, 2, 3, 4}, {1, 2, 3, 4}, {1, 2, 3, 4, 5}],
        2: [{2}, {3}, {1}, set()],
        3: [set(), {3}, {1}, set()],
    }[size]
    assert [set(row.nonzero().flatten().tolist()) for row in forbidden] == expected


def test_a_token_repeated_more_often_than_a_byte_counts():
    one = Pass(random.Random(0), 1, 3, special=False)
    one.text, one.lengths = torch.zeros(1, 256, dtype=torch.long), [256]
    lists = [[lp.NoRepeatNGramLogitsProcessor(1)]]
    assert same_bits(one.found(lists), one.expected(lists))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1)])
def test_biases_of_one_token_are_added_in_the_processors_order(order):
    one = Pass(random.Random(0), 1, 2, special=False)
    one.text, one.lengths = torch.ones(1, 5, dtype=torch.long), [5]
    biases = [((1, 2), 1e8), ((1, 1, 2), -1e8), ((1, 1, 1, 2), 1.0)]
    lists = [[lp.SequenceBiasLogitsProcessor(dict(biases[place] for place in order))]]
    assert same_bits(one.found(lists), one.expected(lists))


# What is read from the device.


@pytest.mark.parametrize("kind", VECTORISED, ids=lambda kind: kind.__name__)
def test_a_pass_reads_nothing_from_the_device(kind):
    """Tensors on the meta device hold nothing that could be read."""
    draw = random.Random(0)
    for mixed in (False, True):
        lists = [[make(kind, draw)] for _ in range(3)]
        if mixed:
            lists[1].append(lp.TopKLogitsWarper(3))
        processors = TextProcessors([PreparedProcessors(one, VOCAB, LONGEST) for one in lists], "meta")
        text = torch.empty(3, 9, dtype=torch.long, device="meta")
        lengths = torch.empty(3, dtype=torch.long, device="meta")
        scores = torch.empty(3, 4, VOCAB, device="meta")
        assert processors(scores, Texts.with_guess(text, lengths, text[:, :4])).shape == scores.shape


@pytest.mark.gpu
@pytest.mark.parametrize("kind", VECTORISED, ids=lambda kind: kind.__name__)
def test_answers_on_a_gpu(kind):
    draw = random.Random(1)
    one = Pass(draw, 4, 5, special=False)
    lists = [[make(kind, draw)] for _ in range(4)]
    processors = TextProcessors([PreparedProcessors(each, VOCAB, LONGEST) for each in lists], "cuda")
    scores, texts = one.scores.cuda(), Texts(*(part.cuda() for part in one.texts()))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = processors(scores, texts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), one.expected(lists))


# What `generate` can build.


def test_all_that_generate_builds_is_vectorised_but_what_runs_on_the_host():
    config = GenerationConfig(
        sequence_bias=[[[1, 2], 1.5]],
        encoder_repetition_penalty=1.2,
        repetition_penalty=1.2,
        no_repeat_ngram_size=2,
        encoder_no_repeat_ngram_size=2,
        bad_words_ids=[[3]],
        min_length=3,
        min_new_tokens=3,
        forced_bos_token_id=1,
        forced_eos_token_id=2,
        exponential_decay_length_penalty=(3, 1.1),
        suppress_tokens=[5],
        begin_suppress_tokens=[6],
        remove_invalid_values=True,
        renormalize_logits=True,
        do_sample=True,
        temperature=0.5,
        top_h=0.5,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        typical_p=0.9,
        epsilon_cutoff=0.1,
        eta_cutoff=0.1,
        max_length=20,
        eos_token_id=2,
        num_beams=1,
        num_return_sequences=1,
        watermarking_config=WatermarkingConfig(),
    )
    config._eos_token_tensor = torch.tensor([2])
    made = GenerationMixin._get_logits_processor(
        tiny_model("base"),
        config,
        input_ids_seq_length=4,
        encoder_input_ids=torch.tensor([[1, 2, 3, 4]]),
        prefix_allowed_tokens_fn=lambda row, ids: [1],
        device="cpu",
    )
    prepared = PreparedProcessors(made, 48, 20)
    assert len(prepared.steps) == 25
    kinds = {type(step.processors[0]): step.kind for step in prepared.steps}
    asked = {kind for kind, how in kinds.items() if how == "asked"}
    assert asked == {lp.PrefixConstrainedLogitsProcessor, lp.WatermarkLogitsProcessor}
    assert {kind for kind, how in kinds.items() if how == "vectorised"} == set(VECTORISED)


# What is asked position by position.


class Subclass(lp.MinLengthLogitsProcessor):
    """Of a user, who may have changed what it answers."""


def test_torchs_default_device_is_not_where_processors_are_prepared():
    made = [
        lp.MinLengthLogitsProcessor(9, [5, 6], device="cpu"),
        lp.SequenceBiasLogitsProcessor({(5,): 1.0, (4, 6): 2.0}),
        lp.RepetitionPenaltyLogitsProcessor(1.5),
        lp.ForcedEOSTokenLogitsProcessor(20, [5], device="cpu"),
    ]
    expected = PreparedProcessors(made, VOCAB, LONGEST).steps
    with torch.device("meta"):
        steps = PreparedProcessors(made, VOCAB, LONGEST).steps
    for step, other in zip(steps, expected, strict=True):
        assert step.kind == "vectorised"
        assert all(torch.equal(values, other.tensors[name]) for name, values in step.tensors.items())


def test_only_the_class_itself_is_vectorised():
    for processor, kind in ((lp.MinLengthLogitsProcessor(3, 1), "vectorised"), (Subclass(3, 1), "stateful")):
        assert [step.kind for step in PreparedProcessors([processor], VOCAB, LONGEST).steps] == [kind]


def watermark():
    return lp.WatermarkLogitsProcessor(VOCAB, "cpu")


def test_one_for_a_padded_batch_is_to_be_asked_and_so_says_that_it_cannot_answer():
    for processor in (
        lp.RepetitionPenaltyLogitsProcessor(1.5, torch.tensor([1, 2])),
        lp.EncoderRepetitionPenaltyLogitsProcessor(1.5, torch.zeros(2, 3, dtype=torch.long)),
        lp.EncoderNoRepeatNGramLogitsProcessor(2, torch.zeros(2, 3, dtype=torch.long)),
    ):
        assert prepared([[processor]] * 2).kinds == {"asked"}


def test_tokens_beyond_the_vocabulary():
    one = Pass(random.Random(3), 1, 3, special=False)
    one.lengths[0] = one.text.shape[1]
    with pytest.raises(ValueError, match=r"vocabulary size is 7, but the following tokens were being biased: \[9\]"):
        prepared([[lp.SequenceBiasLogitsProcessor({(1, 9): 1.0})]])
    for harmless in (lp.MinLengthLogitsProcessor(9, [2, 99]), lp.SuppressTokensAtBeginLogitsProcessor([99, 1], 4)):
        assert same_bits(one.found([[harmless]]), one.expected([[harmless]]))
    assert prepared([[lp.ForcedEOSTokenLogitsProcessor(LONGEST, 99)]]).kinds == {"asked"}  # raises where it is reached
    one.text.zero_(), one.guess.zero_()
    one.text[0, 0], one.guess[0, 0] = 99, 99  # an embedding may be larger than the scores
    for kind, arguments in ((lp.RepetitionPenaltyLogitsProcessor, 1.5), (lp.NoRepeatNGramLogitsProcessor, 1)):
        processor = kind(arguments)
        assert same_bits(one.found([[processor]]), one.expected([[processor]]))


def test_what_keeps_state_is_left_out():
    one = Pass(random.Random(5), 2, 2, special=False)
    keeps = lambda ids, scores: scores  # noqa: E731
    lists = [[keeps, lp.TemperatureLogitsWarper(0.5)], [keeps, lp.TemperatureLogitsWarper(0.25)]]
    assert torch.equal(one.found(lists)[1], one.scores[1] / 0.25)


def test_nothing_to_do_gives_the_scores_themselves():
    one = Pass(random.Random(6), 2, 2)
    assert one.found([[], []]) is one.scores


def test_a_penalty_beyond_floats_matters_only_where_it_is_reached():
    one = Pass(random.Random(7), 2, 2, special=False)
    lists = [[lp.ExponentialDecayLengthPenalty((0, 1e200), 1, length)] for length in one.lengths]
    assert same_bits(one.found(lists), one.expected(lists))
