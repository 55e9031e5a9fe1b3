"""A run's folder: checkpoints that are whole or not there, a lock, and what a run remembers.

A checkpoint is written beside its place, synced to disk, and renamed to it; deleted ones are renamed away first. So
whatever is called checkpoint-N is whole, wherever the process was killed. It is a model that `from_pretrained` loads,
with its tokenizer (or an adapter that peft loads), and beside it `optimizer.safetensors` and `state.json`.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
CHECKPOINT = re.compile(r"checkpoint-(\d{8,})")
UNFINISHED = (".new-", ".old-")  # what such folders' names begin with


class FolderLock:
    """
    Held by the one process that trains in a folder; used with `with`.

    The system gives it up when the process ends, however it does: a lock file of a dead process is no lock.
    """

    def __init__(self, folder: Path):
        self.file = folder / "lock"

    def __enter__(self) -> "FolderLock":
        if find_spec("fcntl") is None:
            raise ValueError(
                "this system cannot lock and sync a run's folder, as Windows cannot; train on Linux, on macOS, or in "
                "the Windows Subsystem for Linux"
            )
        import fcntl

        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"folder is {self.file.parent}, where a file is in the way; give another folder"
            ) from error
        self.opened = open(self.file, "a+")
        try:
            fcntl.flock(self.opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.opened.seek(0)
            owner = self.opened.read().strip() or "another process"
            self.opened.close()
            raise ValueError(
                f"{self.file.parent} is being trained in by {owner}; wait for it, stop it, or give another folder"
            ) from error
        except OSError as error:  # as of some network file systems
            self.opened.close()
            raise ValueError(
                f"{self.file} cannot be locked ({error.strerror}); give a folder on a file system that has locks"
            ) from error
        self.opened.truncate(0)
        self.opened.write(f"process {os.getpid()} on {os.uname().nodename}")
        self.opened.flush()
        return self

    def __exit__(self, *_: Any) -> None:
        self.opened.truncate(0)
        self.opened.close()


def write_whole(place: Path, fill: Callable[[Path], Any]) -> None:
    """Make a folder that is either all of what `fill` writes into it, or as it was before."""
    new = place.with_name(f".new-{place.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    fill(new)
    for path in [*new.rglob("*"), new]:
        _sync(path)
    if place.exists():
        delete(place)
    os.rename(new, place)
    _sync(place.parent)


def delete(folder: Path) -> None:
    """Remove a folder, of which nothing under its name may be seen half-removed."""
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(folder, old)
    shutil.rmtree(old)


def clean(folder: Path) -> None:
    """Remove what a killed process was writing or removing."""
    for path in folder.iterdir():
        if path.is_dir() and path.name.startswith(UNFINISHED):
            shutil.rmtree(path)


def write_file(file: Path, text: str) -> None:
    """Replace a file at once."""
    new = file.with_name(f".new-{file.name}")
    new.write_text(text, encoding="utf-8")
    _sync(new)
    os.replace(new, file)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest last."""
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(
    folder: Path, step: int, save_model: Callable[[Path], Any], optimizer: Any, state: dict[str, Any], keep: int
) -> Path:
    """
    Write checkpoint-STEP and remove all but the `keep` newest.

    Args:
        save_model: writes the model's files into a folder.
        optimizer: its state, of tensors and plain values in dicts and lists.
        state: JSON-able, what else a run goes on with.
    """
    place = folder / f"checkpoint-{step:08d}"

    def fill(new: Path) -> None:
        save_model(new)
        tensors: dict[str, torch.Tensor] = {}
        plain = _without_tensors(optimizer, "", tensors)
        save_file(tensors, new / OPTIMIZER)
        sizes = {file.name: file.stat().st_size for file in new.iterdir() if file.is_file()}
        content = json.loads(json.dumps({"step": step, **state, "optimizer": plain, "sizes": sizes}))
        (new / STATE).write_text(json.dumps({**content, "checksum": _checksum(content)}), encoding="utf-8")

    write_whole(place, fill)
    prune(folder, keep)
    return place


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`."""
    for old in checkpoints(folder)[:-keep]:
        delete(old)


def load_checkpoint(place: Path) -> dict[str, Any]:
    """
    The state that `save_checkpoint` was given, with "optimizer" and "step".

    Raises:
        ValueError: for a file that is missing, cut off or no such file, naming it.
    """
    file = place / STATE
    remedy = f"copy the checkpoint again, or delete {place} to go on from an older one"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        sizes, plain = dict(state["sizes"]), state["optimizer"]
        state["step"], state["recipe"], state["data"]
        # Of an earlier edition's there is none.
        if state.pop("checksum", None) not in (None, _checksum(state)):
            raise ValueError("its checksum is another")
    except (OSError, ValueError, KeyError, TypeError) as error:
        kind = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error!r})"
        raise ValueError(f"{file} {kind}; {remedy}") from error
    for name, size in sizes.items():
        found = (place / name).stat().st_size if (place / name).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes of {size}"
            raise ValueError(f"{place / name} {what}; {remedy}")
    try:
        with safe_open(place / OPTIMIZER, framework="pt") as tensors:
            state["optimizer"] = _with_tensors(plain, tensors)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{place / OPTIMIZER} does not hold what {STATE} says ({error}); {remedy}") from error
    return state


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A JSON-able copy; tensors go into `tensors`, and dicts become pairs, since JSON has no whole-number keys."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"pairs": [[key, _without_tensors(each, f"{path}/{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return [_without_tensors(each, f"{path}/{at}", tensors) for at, each in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Any) -> Any:
    if isinstance(value, list):
        return [_with_tensors(each, tensors) for each in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors.get_tensor(value["tensor"]).clone()
        return {key: _with_tensors(each, tensors) for key, each in value["pairs"]}
    return value


def cut_lines(file: Path, step: int) -> None:
    """Remove the lines of steps after `step`, and one that was cut off: they are written again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_file(file, "".join(kept))


__all__ = [
    "FolderLock",
    "checkpoints",
    "clean",
    "cut_lines",
    "delete",
    "load_checkpoint",
    "prune",
    "save_checkpoint",
    "write_file",
    "write_whole",
]
