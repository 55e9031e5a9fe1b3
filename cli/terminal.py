"""How the command line shows things: tables, and a text while the denoiser fills it in.

On a terminal that is rich's; anywhere else plain text without escape codes.
"""

import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from rich import box, progress
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..compat_twotower import BaseStreamer

MASK_SYMBOL, END_SYMBOL = "░", "■"
# A file has no width; tables there are as wide as their content.
PLAIN_WIDTH = 10_000


def output_console() -> Console:
    """Standard output: rich on a terminal, plain text elsewhere, whatever FORCE_COLOR says."""
    if sys.stdout is None:
        raise ValueError("standard output is closed; redirect it to a file, or to /dev/null")
    if sys.stdout.isatty():
        return Console(markup=False, highlight=False)
    return Console(markup=False, highlight=False, force_terminal=False, color_system=None, width=PLAIN_WIDTH)


def show_table(
    console: Console, title: str, header: Sequence[str], rows: Iterable[Sequence[str]], left_columns: int = 1
) -> None:
    """Print a title and a table: its first `left_columns` columns to the left, the others to the right."""
    style = box.SIMPLE_HEAD if console.is_terminal else None
    table = Table(box=style, padding=(0, 1), pad_edge=False, show_header=any(header))
    for idx, name in enumerate(header):
        table.add_column(name, justify="left" if idx < left_columns else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(title, style="bold", soft_wrap=True)
    console.print(table)
    console.print()


Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """The items, `total` if they have no length, with a progress bar on standard error if that is a terminal."""
    if not sys.stderr.isatty():
        return items  # rich of older releases writes an empty line for a bar that is disabled
    return progress.track(items, description, total, console=Console(stderr=True))


def draft_text(token_ids: list[int], tokenizer: Any, mask_token_id: int) -> Text:
    """A partly masked block as text, up to its end-of-text, with a dim symbol for each masked token."""
    if tokenizer.eos_token_id in token_ids:
        token_ids = token_ids[: token_ids.index(tokenizer.eos_token_id)]
    text = Text()
    for masked, run in groupby(token_ids, key=lambda token: token == mask_token_id):
        if masked:
            text.append(MASK_SYMBOL * len(list(run)), style="dim")
        else:
            text.append(tokenizer.decode(list(run), skip_special_tokens=True), style="yellow")
    return text


class TraceStreamer(BaseStreamer):
    """
    Prints a line for each denoiser pass over one row: block, pass, how many tokens it committed, the block after it.

    In mode "self_speculative" a block is a draft, and a line more says what the context tower kept of it.

    Args:
        tokenizer: of the model.
        mask_token_id: id of the [MASK] token in drafts.
        console: a terminal, where what a pass committed stands out, or plain text.
        drafts: whether blocks are drafts.
    """

    def __init__(self, tokenizer: Any, mask_token_id: int, console: Console, drafts: bool = False):
        self.tokenizer, self.mask_token_id, self.console, self.drafts = tokenizer, mask_token_id, console, drafts
        self.block, self.step, self.prompt_seen = 1, 0, False
        self.before: list[int] = []
        console.print(
            f"One line per denoiser pass; {MASK_SYMBOL} is a token still open, {END_SYMBOL} the end of the text."
        )
        self._line("draft" if drafts else "block", "pass", "new", Text("text"))

    def put(self, value: torch.Tensor) -> None:
        """Take (1, n) tokens of the text; the first call brings the prompt, which is not shown."""
        tokens = value.flatten().tolist()
        text, new = self._text(tokens), f"+{len(tokens)}"
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        if self.drafts and not self.step:  # the context tower's, before the first draft
            self._line("-", "-", new, text)
            return
        if self.drafts:
            self._line(str(self.block), "kept", new, text)
        elif not self.step:  # mode "mock_ar"
            self._line(str(self.block), "1", new, text)
        self.block, self.step, self.before = self.block + 1, 0, []

    def put_draft(self, value: torch.Tensor) -> None:
        """Take the (1, S) block after a denoiser pass."""
        tokens = value.flatten().tolist()
        before = self.before or [self.mask_token_id] * len(tokens)
        self.step, self.before = self.step + 1, tokens
        new = [token != old for token, old in zip(tokens, before, strict=True)]
        counted = new[: self._end(tokens)]
        self._line(str(self.block), str(self.step), f"+{sum(counted)}", self._text(tokens, new))

    def end(self) -> None:
        self.console.print()

    def _end(self, tokens: list[int]) -> int:
        """How many of the tokens come before what follows the end of the text."""
        end = self.tokenizer.eos_token_id
        return tokens.index(end) + 1 if end in tokens else len(tokens)

    def _text(self, tokens: list[int], new: Sequence[bool] = ()) -> Text:
        """One line of text, with a dim symbol for each open token and the end marked; what is new is bold."""
        text, shown = Text(), self._end(tokens)
        marked = list(zip(tokens[:shown], [*new, *[False] * len(tokens)], strict=False))
        for (is_open, is_new), run in groupby(marked, key=lambda pair: (pair[0] == self.mask_token_id, pair[1])):
            ids = [token for token, _ in run]
            if is_open:
                text.append(MASK_SYMBOL * len(ids), style="dim")
                continue
            words = self.tokenizer.decode(ids, skip_special_tokens=True).replace("\n", "⏎")
            text.append(
                words + (END_SYMBOL if ids[-1] == self.tokenizer.eos_token_id else ""), "bold" if is_new else ""
            )
        return text

    def _line(self, block: str, step: str, new: str, text: Text) -> None:
        self.console.print(Text(f"{block:>5}  {step:>4}  {new:>4}  ").append_text(text), soft_wrap=True)


class DraftStreamer(BaseStreamer):
    """
    Shows one row's text on a terminal as `generate` commits it: a streamer with transformers' `put_draft`.

    While it grows, the last screenful is redrawn after every denoiser pass; afterwards the whole text is printed, for
    the terminal to wrap. (transformers' `TextDiffusionStreamer` restores a saved cursor position, which is another
    line once the screen has scrolled, and cannot show masks.) Use it as a context manager: leaving it, by an error
    too, gives the terminal back.

    Args:
        tokenizer: of the model.
        mask_token_id: id of the [MASK] token in drafts.
        console: the terminal.
    """

    def __init__(self, tokenizer: Any, mask_token_id: int, console: Console):
        self.tokenizer = tokenizer
        self.mask_token_id = mask_token_id
        self.console = console
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.committed: list[int] = []
        self.prompt_seen = False

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def put(self, value: torch.Tensor) -> None:
        """Take (1, n) committed tokens; the first call brings the prompt, which is not shown."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.committed += value.flatten().tolist()
        self._show(Text(self._committed_text()))

    def put_draft(self, value: torch.Tensor) -> None:
        """Take the (1, S) block after a denoiser pass; it replaces the last one."""
        draft = draft_text(value.flatten().tolist(), self.tokenizer, self.mask_token_id)
        self._show(Text(self._committed_text()).append_text(draft))

    def end(self) -> None:
        self.live.stop()
        self.console.print(self._committed_text().strip(), soft_wrap=True)

    def _committed_text(self) -> str:
        return self.tokenizer.decode(self.committed, skip_special_tokens=True).lstrip()

    def _show(self, text: Text) -> None:
        lines = text.wrap(self.console, self.console.width)
        # Live cuts what is taller than the screen at its end, where the news is.
        self.live.update(Text("\n").join(lines[-self.console.height + 1 :]), refresh=True)
