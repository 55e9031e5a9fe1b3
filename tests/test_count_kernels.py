"""`tools/count_kernels.py` counts what passes launch; it is no part of the package."""

import json
import re
import subprocess
import sys
from pathlib import Path


from tiny import BASE

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "count_kernels.py"
KINDS = ("denoiser pass", "block read", "accept", "AR step")


def counts(*arguments) -> dict[str, int]:
    shown = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"^(\d+ rows, .+): (\d+) kernels$", shown, re.MULTILINE)}


def test_every_kind_of_pass_is_counted_and_more_layers_launch_more(tmp_path):
    found = []
    for layers in ("ME*", "ME*ME*"):
        config = tmp_path / f"{len(layers)}.json"
        config.write_text(json.dumps({**BASE, "hybrid_override_pattern": layers, "moe_intermediate_size": 64}))
        found.append(counts("--config", config))
    few, many = found
    assert few.keys() == {f"{rows} rows, {kind}" for rows in (1, 16) for kind in KINDS}
    assert all(few[kind] < many[kind] < 2 * few[kind] + 1 for kind in few)
