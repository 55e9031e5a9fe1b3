"""Starting other Python processes from a test."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).parent / "train_in_processes.py"


def launch(arguments: str, folder: Path) -> dict[str, Any]:
    """Run Python with such arguments and a file in `folder` behind them; returns what it stored there."""
    result = folder / "result.pt"
    # The script's own folder comes first on its path, where `import tools` and `import tiny` find nothing.
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, *arguments.split(), str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(result, weights_only=True)
