"""What `twotower eval --card` does."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer


def check_card(file: Path | None, names: list[str] | None, dry_run: bool) -> None:
    """What is known to be wrong before a model is loaded."""
    if find_spec("lm_eval") is None:
        raise ValueError('--card asks by lm-evaluation-harness; pip install "twotower[eval]"')
    if file is None and not dry_run:
        raise ValueError("--card takes hours and goes on where it ended; give --json FILE, which keeps what is done")
    from ..evaluation.benchmarks import chosen

    chosen(names)


def show_card(
    model: Any,
    tokenizer: Any,
    name: str | None,
    file: Path | None,
    names: list[str] | None,
    batch_size: int,
    limit: int | None,
    run_code: bool,
    dry_run: bool,
) -> None:
    """Measure what `file` does not hold yet, say on standard error where it is, and print the table."""
    from ..evaluation import card
    from ..evaluation.benchmarks import chosen
    from ..evaluation.harness import TwoTowerLM
    from .terminal import output_console, show_table

    benchmarks = chosen(names)
    settings = card.settings_of(model, name or "demonstration checkpoint", limit, dry_run)
    report = card.open_report(file, settings)
    # What lm-eval says on the way is about models given by name, or about every task.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lms = {column: TwoTowerLM(model, tokenizer, batch_size, **knobs) for column, knobs in card.KNOBS.items()}
    card.measure_card(lms, report, file, benchmarks, run_code, lambda text: typer.echo(text, err=True))
    console = output_console()
    show_table(console, card.title(report), *card.table(report, benchmarks))
    console.print(card.FOOTNOTE, soft_wrap=True)
