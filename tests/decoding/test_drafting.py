"""Draft lengths against recorded acceptances: every 16-token draft of some texts of the embedded checkpoint."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from twotower.decoding.drafting import DraftController
from twotower.decoding.pass_costs import PassCosts, draft_lengths

# A hexadecimal digit says how many of 15 drafted tokens were accepted after a token of a text, two decimal ones how
# probable the context tower found that token, in hundredths.
TRACES = json.loads((Path(__file__).parent / "draft_traces.json").read_text())
LENGTHS = draft_lengths(16)
# Milliseconds of passes of that checkpoint, per tokens, per rows, on one core.
MILLISECONDS = {
    "denoise": {
        2: {1: 5.82, 4: 7.01, 16: 9.76, 64: 18.53},
        4: {1: 6.25, 4: 7.91, 16: 11.65, 64: 24.13},
        8: {1: 6.51, 4: 9.04, 16: 14.44, 64: 36.30},
        16: {1: 7.43, 4: 11.10, 16: 20.63, 64: 63.06},
    },
    "verify": {
        2: {1: 5.60, 4: 7.26, 16: 10.15, 64: 21.40},
        4: {1: 6.13, 4: 8.06, 16: 12.27, 64: 28.99},
        8: {1: 6.55, 4: 9.25, 16: 15.21, 64: 41.24},
        16: {1: 7.48, 4: 12.16, 16: 22.03, 64: 70.41},
    },
    "step": {1: {1: 3.87, 4: 5.97, 16: 8.06, 64: 13.57}},
}
COSTS = PassCosts(
    {
        kind: {tokens: {rows: each / 1e3 for rows, each in by_rows.items()} for tokens, by_rows in of.items()}
        for kind, of in MILLISECONDS.items()
    }
)

Text = tuple[list[int], list[float]]


def recorded(kind: str) -> list[Text]:
    return [
        (
            [int(digit, 16) for digit in row["accepted"]],
            [(int(row["sure"][at : at + 2]) + 1) / 100 for at in range(0, len(row["sure"]), 2)],
        )
        for row in TRACES[kind]
    ]


def made_up(accepted: Iterable[int], sure: float = 0.99) -> Text:
    accepted = list(accepted)
    return accepted, [sure] * (len(accepted) + 1)


def seconds(texts: list[Text], controller: DraftController, tells: bool = True) -> float:
    """Of writing the texts together, the controller choosing."""
    done, spent = [0] * len(texts), 0.0
    for row, (_, sure) in enumerate(texts):
        controller.start(row, sure[0])
    while active := [row for row, (accepted, _) in enumerate(texts) if done[row] < len(accepted)]:
        length = controller.choose(active)
        spent += COSTS.cycle(length, len(active))
        got = [min(texts[row][0][done[row]], length - 1) for row in active]
        sure = [(texts[row][1][done[row] + 1 :] + [1.0] * length)[:length] for row in active]
        controller.learn(active, length, got, sure if tells else None)
        for row, count in zip(active, got, strict=True):
            done[row] += count + 1
            if done[row] >= len(texts[row][0]):
                controller.forget(row)
    return spent


class Always(DraftController):
    def __init__(self, length: int):
        super().__init__(LENGTHS, COSTS.cycle)
        self.length = length

    def choose(self, rows):  # type: ignore[no-untyped-def]
        return self.length


def speed(batches: list[list[Text]], tells: bool = True) -> float:
    """Times mode "ar"."""
    ours = sum(seconds(batch, controller(), tells) for batch in batches)
    return sum(seconds(batch, Always(1)) for batch in batches) / ours


def controller() -> DraftController:
    return DraftController(LENGTHS, COSTS.cycle)


def batches_of(texts: list[Text], rows: int) -> list[list[Text]]:
    draw = random.Random(0)
    return [[text] for text in texts] if rows == 1 else [draw.choices(texts, k=rows) for _ in range(4)]


@pytest.mark.parametrize("rows, least", [(1, 3.0), (4, 2.9), (16, 2.4), (64, 1.4)])
def test_on_templates_nearly_all_of_what_whole_drafts_gain_is_kept(rows, least):
    batches = batches_of(recorded("on templates"), rows)
    whole = sum(seconds(batch, Always(16)) for batch in batches)
    ours = sum(seconds(batch, controller()) for batch in batches)
    # The first cycle is a step, and of many rows whole drafts are too dear to begin with.
    assert whole / ours > 0.92
    assert speed(batches) > least


@pytest.mark.parametrize("rows, least", [(1, 0.98), (4, 0.98), (16, 0.98), (64, 0.98)])
def test_off_templates_hardly_any_text_of_48_tokens_is_drafted(rows, least):
    assert speed(batches_of(recorded("off templates"), rows)) > least


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("tokens", [100, 256, 1000])
def test_a_drafter_that_is_always_wrong_costs_a_thirtieth_at_most(rows, tokens):
    assert speed([[made_up([0] * tokens)] * rows]) > 0.965


@pytest.mark.parametrize("rows", [1, 4])
def test_a_drafter_that_is_always_right_is_used_throughout(rows):
    rest = seconds([made_up([15] * 96)] * rows, Always(16))
    assert seconds([made_up([15] * 97)] * rows, controller()) == pytest.approx(COSTS.cycle(1, rows) + rest)


@pytest.mark.parametrize("rows", [16, 64])
def test_in_large_batches_a_drafter_that_is_always_right_is_soon_used_throughout(rows):
    text = made_up([15] * 300)
    assert seconds([text] * rows, controller()) < 1.2 * seconds([text] * rows, Always(16))


def test_where_whole_drafts_are_dear_they_follow_on_short_ones_that_were_right():
    lengths, chooser = [], controller()
    for row in range(64):
        chooser.start(row)
    for _ in range(7):
        lengths.append(chooser.choose(range(64)))
        chooser.learn(range(64), lengths[-1], [lengths[-1] - 1] * 64, [[1.0] * lengths[-1]] * 64)
    assert lengths[0] == 1 < lengths[1] < 16 and lengths == sorted(lengths) and lengths[3:] == [16] * 4


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_at_first_no_more_is_risked_than_the_allowance(rows):
    chooser = controller()
    for row in range(rows):
        chooser.start(row)
    chooser.learn(range(rows), 1, [0] * rows, [[1.0]] * rows)
    assert 0 < COSTS.cycle(chooser.choose(range(rows)), rows) / COSTS.cycle(1, rows) - 1 <= 4


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("accepted", [[15] * 200 + [0] * 200, [0] * 200 + [15] * 400])
def test_a_change_is_noticed(rows, accepted):
    assert speed([[made_up(accepted)] * rows]) > 1.1


@pytest.mark.parametrize("seed", range(5))
def test_no_acceptances_lose_more_than_the_allowance(seed):
    draw = random.Random(seed)
    accepted = [draw.choice([0, 0, 0, 1, draw.randrange(16)]) for _ in range(1000)]
    for sure in ([1.0] * 1001, [draw.random() for _ in range(1001)]):
        steps = seconds([(accepted, sure)], controller()) / COSTS.cycle(1, 1)
        # The last draft may reach beyond the end.
        assert steps < 1.015 * 1000 + 3.5 + 16


def test_where_no_draft_pays_nothing_is_watched():
    text, chooser = made_up([0] * 100), controller()
    chooser.start("a")
    watched = []
    for _ in range(len(text[0])):
        length = chooser.choose(["a"])
        watched.append(chooser.watches)
        chooser.learn(["a"], length, [0], [[1.0]] if chooser.watches else None)
    assert sum(watched) <= 15


def test_tokens_that_were_not_watched_teach_nothing():
    chooser = controller()
    chooser.start("a", confidence=0.4)
    for _ in range(100):
        chooser.learn(["a"], 1, [0])
    assert chooser.choose(["a"]) == 1


def test_without_confidences_an_always_wrong_drafter_costs_no_more():
    assert speed([[made_up([0] * 256)] * 4], tells=False) > 0.95


@pytest.mark.parametrize("confidences, length", [([1.0], 1), ([1.0, 1.0], 16), ([1.0, 0.4], 1), ([0.4, 1.0], 1)])
def test_what_the_context_tower_is_not_sure_of_is_not_drafted(confidences, length):
    chooser = controller()
    chooser.start("a", confidences[0])
    for confidence in confidences[1:]:
        chooser.learn(["a"], 1, [0], [[confidence]])
    assert chooser.choose(["a"]) == length


def test_rows_that_begin_do_not_keep_others_from_their_drafts():
    chooser = controller()
    for row in "abc":
        chooser.start(row)
    for row in "ab":
        chooser.learn([row], 1, [0], [[1.0]])
    assert chooser.choose("abc") > 1 and chooser.choose("c") == 1


def test_a_refusal_of_a_token_nobody_could_foresee_says_little():
    lengths = []
    for confidence in (0.05, 1.0):
        chooser = controller()
        chooser.start("a")
        chooser.learn(["a"], 16, [0], [[confidence] * 16])
        for _ in range(12):
            chooser.learn(["a"], 1, [0], [[1.0]])
        lengths.append(chooser.choose(["a"]))
    assert lengths[0] > 1 and lengths[1] == 1


def test_where_long_drafts_are_dear_short_ones_are_chosen():
    # As of a mixture of experts, of which every token more reads other weights.
    costs = {1: 1.0, 2: 1.3, 4: 1.8, 8: 3.5, 16: 7.0}
    chooser = DraftController(LENGTHS, lambda length, rows: costs[length])
    chooser.start("a")
    for _ in range(20):
        chooser.learn(["a"], 4, [3], [[1.0] * 4])
        chooser.learn(["a"], 8, [5], [[1.0] * 8])
    assert chooser.choose(["a"]) == 4


def test_equal_calls_choose_equally():
    def choices() -> list[int]:
        chosen: list[int] = []

        class Recorder(DraftController):
            def choose(self, rows):  # type: ignore[no-untyped-def]
                chosen.append(super().choose(rows))
                return chosen[-1]

        seconds(recorded("on templates"), Recorder(LENGTHS, COSTS.cycle))
        return chosen

    assert choices() == choices()
    assert len(set(choices())) > 1


def test_rows_join_and_leave_at_any_time():
    draw, chooser, active = random.Random(1), controller(), ["first"]
    for number in range(500):
        if draw.random() < 0.2:
            active.append(f"row {number}")
        if len(active) > 1 and draw.random() < 0.2:
            chooser.forget(active.pop(draw.randrange(len(active))))
        rows = draw.sample(active, draw.randint(1, len(active)))
        length = chooser.choose(rows)
        chooser.learn(rows, length, [draw.randrange(length) for _ in rows])
    for row in active:
        chooser.forget(row)
    assert not chooser.by_row


def test_a_new_row_is_taken_to_be_like_those_before():
    chooser = controller()
    for row in range(4):
        chooser.start(row)
    while chooser.choose([0, 1, 2, 3]) > 1:
        chooser.learn([0, 1, 2, 3], 16, [0] * 4)
    for row in range(4):
        chooser.forget(row)
    chooser.start("new")
    assert chooser.choose(["new"]) == 1


def test_of_confidences_that_are_no_numbers_nothing_is_learnt_but_insecurity():
    chooser = controller()
    chooser.start("a", float("nan"))
    chooser.learn(["a"], 16, [0], [[float("nan")] * 16])
    assert chooser.choose(["a"]) == 1


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"draft lengths are \[2, 4\]; give them ascending, the first of them 1"):
        DraftController([2, 4], COSTS.cycle)
    chooser = controller()
    with pytest.raises(ValueError, match="no rows were given"):
        chooser.choose([])
    with pytest.raises(ValueError, match="the draft's length was 3; it can only be one of"):
        chooser.learn(["a"], 3, [0])
    with pytest.raises(ValueError, match=r"accepted is \[4\]; give one number from 0 to 3 for each of 1 rows"):
        chooser.learn(["a"], 4, [4])
    with pytest.raises(ValueError, match=r"confidences are of \[1\] tokens, but the rows got \[3\]"):
        chooser.learn(["a"], 4, [2], [[0.5]])
