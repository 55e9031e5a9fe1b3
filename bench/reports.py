"""What every benchmark's report says of where it comes from, and files that are written whole or not at all."""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers


def environment(model: Any) -> dict[str, Any]:
    """Where and when: the model's dtype and device, machine, versions, commit of the code, date."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": git_commit(Path(__file__).resolve().parents[1]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor(report: dict[str, Any]) -> str:
    """What a report's figures were measured on, of a machine that may have both."""
    return report["machine"]["gpu" if report["device"].startswith("cuda") else "cpu"]


def measured_on(report: dict[str, Any]) -> str:
    """Where a report's figures were measured, as text."""
    machine, versions = report["machine"], report["versions"]
    return (
        f"{report['dtype']} on {report['device']}, {processor(report)}, "
        f"{machine['threads']} of {machine['cores']} cores; "
        f"torch {versions['torch']}, transformers {versions['transformers']}"
    )


def git_commit(folder: Path) -> str | None:
    """The checkout's commit, "-dirty" with changes; None for an installed copy or without git."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def write_json(file: Path, report: dict[str, Any]) -> None:
    """As [`write_whole`]: a reader finds the last report or this one."""
    text = json.dumps(report, indent=2) + "\n"
    write_whole(file, lambda scratch: scratch.write_text(text))


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file all at once: interrupted, it is as it was before."""
    if file.exists() and not file.is_file():  # a pipe, say
        write(file)
        return
    scratch = _sibling(file)
    try:
        write(scratch)
        os.replace(scratch, file.resolve())
    finally:
        scratch.unlink(missing_ok=True)


def new_figure(width: float, height: float, dpi: int) -> Any:
    """A matplotlib figure of so many inches, without a window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('drawing needs matplotlib; pip install "twotower[eval]"') from error
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def check_writable(file: Path) -> None:
    """Report now what would keep a file from being written after the work; nothing is left, and nothing changed."""
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; give a file")
    if not file.exists() or file.is_file():
        scratch = _sibling(file)
        scratch.open("x").close()
        scratch.unlink()


def _sibling(file: Path) -> Path:
    """On the same file system, and of the same kind."""
    target = file.resolve()
    return target.with_name(f".{target.stem}-{os.getpid()}{target.suffix}")


__all__ = [
    "check_writable",
    "environment",
    "git_commit",
    "machine",
    "measured_on",
    "new_figure",
    "processor",
    "write_json",
    "write_whole",
]
