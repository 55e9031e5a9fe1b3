"""
How far one generate() call takes a reader: the functions of ours it enters, their files, and how often, from one
function to the next in the order of first entry, the file is another.

    python tools/hops.py          # figures by mode
    python tools/hops.py --list   # and the journey: file and functions, in order
"""

import argparse
import sys
from itertools import groupby, pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import twotower
from twotower import TwoTowerForBlockDiffusion
from twotower.decoding.config import MODES

ROOT = Path(twotower.__file__).parent
QUESTION = "Question: Tom has 124 apples. He buys 57 more and then gives 38 to Ana. How many apples does Tom have now?"
MOST_FUNCTIONS, MOST_FILES, MOST_CHANGES = 80, 9, 35


def journey(model: Any, inputs: Any, **knobs: Any) -> list[tuple[str, str]]:
    """File and name of every function of ours that a call enters, in the order in which it first does."""
    entered: dict[tuple[str, str], None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # Comprehensions and lambdas are read where they stand.
        if event == "call" and not code.co_name.startswith("<"):
            file = Path(code.co_filename)
            if file.is_relative_to(ROOT) and ".venv" not in file.parts:
                entered[file.relative_to(ROOT).as_posix(), code.co_qualname] = None

    sys.setprofile(note)
    try:
        model.generate(**inputs, **knobs)
    finally:
        sys.setprofile(None)
    return list(entered)


def figures(entered: list[tuple[str, str]]) -> tuple[int, int, int]:
    """Functions, files, changes of file."""
    files = [file for file, _ in entered]
    return len(entered), len(set(files)), sum(one != other for one, other in pairwise(files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the journey, too")
    shown = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = twotower.demo_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = TwoTowerForBlockDiffusion.from_pretrained(folder)
    inputs = tokenizer(QUESTION + "\nAnswer:", return_tensors="pt", return_token_type_ids=False)
    for mode in MODES:
        # What is measured once per machine is no part of a call; a first one does that.
        model.generate(**inputs, mode=mode, max_new_tokens=2)
        entered = journey(model, inputs, mode=mode, max_new_tokens=40)
        functions, files, changes = figures(entered)
        print(f"{mode}: {functions} functions, {files} files, {changes} changes of file")
        if shown.list:
            for file, names in groupby(entered, key=lambda one: one[0]):
                print(f"  {file}: {', '.join(name for _, name in names)}")
    print(f"aim: at most {MOST_FUNCTIONS} functions, {MOST_FILES} files, {MOST_CHANGES} changes of file")


if __name__ == "__main__":
    main()
