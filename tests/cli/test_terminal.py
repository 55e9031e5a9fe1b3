"""The draft on a terminal, scripted as `generate` would send it, and tables on a terminal and elsewhere."""

import io

import pytest
import torch
from rich.console import Console
from tiny import tiny_tokenizer

from twotower.cli.terminal import (
    MASK_SYMBOL,
    DraftStreamer,
    TraceStreamer,
    draft_text,
    output_console,
    show_table,
    track,
)

MASK = 3


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=20, height=5, markup=False, highlight=False)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_draft_text_shows_masks_and_stops_at_the_end(tokenizer):
    tokens = [
        *ids(tokenizer, " 12"),
        MASK,
        MASK,
        *ids(tokenizer, "7"),
        tokenizer.eos_token_id,
        MASK,
        *ids(tokenizer, "9"),
    ]
    assert draft_text(tokens, tokenizer, MASK).plain == f" 12{MASK_SYMBOL * 2}7"


def test_streamer_shows_drafts_and_leaves_the_text(tokenizer, terminal):
    answer = ids(tokenizer, " 4 + 5 = 9")
    with DraftStreamer(tokenizer, MASK, terminal) as streamer:
        streamer.put(torch.tensor([ids(tokenizer, "Question: 77?")]))
        streamer.put_draft(torch.tensor([[*answer[:2], *[MASK] * (len(answer) - 2)]]))
        drawn = terminal.file.getvalue()
        streamer.put(torch.tensor([answer]))
        streamer.put(torch.tensor([[tokenizer.eos_token_id]]))
        streamer.end()
    shown = terminal.file.getvalue()
    assert MASK_SYMBOL in drawn
    assert "77" not in shown, "the prompt is not shown"
    assert shown.rstrip().endswith("4 + 5 = 9")
    assert MASK_SYMBOL not in shown[shown.rindex("\x1b[2K") :], "no draft is left"
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is back"


def test_streamer_draws_the_last_screenful(tokenizer, terminal):
    with DraftStreamer(tokenizer, MASK, terminal) as streamer:
        streamer.put(torch.tensor([[1]]))
        streamer.put(torch.tensor([ids(tokenizer, "".join(f"line {number}\n" for number in range(9)))]))
        drawn = terminal.file.getvalue()
        streamer.end()
    assert "line 8" in drawn
    assert "line 1" not in drawn
    assert "line 1" in terminal.file.getvalue(), "the whole text is printed in the end"


def test_streamer_gives_the_terminal_back_after_an_error(tokenizer, terminal):
    streamer = DraftStreamer(tokenizer, MASK, terminal)
    with pytest.raises(RuntimeError), streamer:
        raise RuntimeError
    assert not streamer.live.is_started


def test_table_is_plain_where_it_is_not_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_table(output_console(), "Numbers", ("name", "count"), [("[one]", "1"), ("thirteen", "13")])
    assert capsys.readouterr().out == "Numbers\nname      count\n[one]         1\nthirteen     13\n\n"


def test_table_has_rules_on_a_terminal(terminal):
    show_table(terminal, "Numbers", ("name", "count"), [("one", "1")])
    assert "───" in terminal.file.getvalue()


def test_track_is_silent_where_it_is_not_a_terminal(capsys):
    assert list(track([1, 2], "counting")) == [1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def plain():
    return Console(
        file=io.StringIO(), force_terminal=False, color_system=None, width=200, markup=False, highlight=False
    )


def test_trace_has_a_line_per_pass_with_what_it_committed(tokenizer, plain):
    answer = ids(tokenizer, " 4 + 5 = 9")
    opened = [*answer[:2], *[MASK] * (len(answer) - 2)]
    streamer = TraceStreamer(tokenizer, MASK, plain)
    streamer.put(torch.tensor([ids(tokenizer, "Question: 77?")]))
    streamer.put_draft(torch.tensor([opened]))
    streamer.put_draft(torch.tensor([answer]))
    streamer.put(torch.tensor([answer]))
    ends = [*ids(tokenizer, "\n7"), tokenizer.eos_token_id, 9, 9]
    streamer.put_draft(torch.tensor([ends]))
    streamer.put(torch.tensor([ends[:-2]]))
    streamer.end()
    legend, *lines = plain.file.getvalue().splitlines()
    open_count = len(answer) - 2
    assert MASK_SYMBOL in legend and "■" in legend
    assert lines == [
        "block  pass   new  text",
        f"    1     1    +2  {tokenizer.decode(answer[:2])}{MASK_SYMBOL * open_count}",
        f"    1     2  {f'+{open_count}':>4}   4 + 5 = 9",
        f"    2     1  {f'+{len(ends) - 2}':>4}  ⏎7■",
        "",
    ]


def test_trace_of_drafts_says_what_was_kept(tokenizer, plain):
    streamer = TraceStreamer(tokenizer, MASK, plain, drafts=True)
    one, two = ids(tokenizer, "1"), ids(tokenizer, "2")
    for put, tokens in (("put", one), ("put", one), ("put_draft", [*two, MASK]), ("put", [*two, *one])):
        getattr(streamer, put)(torch.tensor([tokens]))
    assert plain.file.getvalue().splitlines()[1:] == [
        "draft  pass   new  text",
        "    -     -    +1  1",
        f"    1     1    +1  2{MASK_SYMBOL}",
        "    1  kept    +2  21",
    ]


def test_trace_makes_what_is_new_stand_out_on_a_terminal(tokenizer, terminal):
    streamer = TraceStreamer(tokenizer, MASK, terminal)
    one = ids(tokenizer, "1")
    for tokens in ([*one, MASK], [*one, *one]):
        streamer.prompt_seen = True
        streamer.put_draft(torch.tensor([tokens]))
    assert "1\x1b[1m1\x1b[0m" in terminal.file.getvalue().splitlines()[-1]


def test_a_closed_standard_output_is_told_of(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(ValueError, match="standard output is closed; redirect it"):
        output_console()
