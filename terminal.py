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

from .compat_twotower import BaseStreamer

MASK_SYMBOL = "░"
# A file has no width; tables there are as wide as their content.
PLAIN_WIDTH = 10_000


def output_console() -> Console:
    """Standard output: rich on a terminal, plain text elsewhere, whatever FORCE_COLOR says."""
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


def track(items: list[Item], description: str) -> Iterable[Item]:
    """The items, with a progress bar on standard error if that is a terminal."""
    return progress.track(items, description, console=Console(stderr=True), disable=not sys.stderr.isatty())


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
