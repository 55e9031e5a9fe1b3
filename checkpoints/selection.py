"""Loading a part of a checkpoint: of a sharded one, only the files that hold tensors of it are fetched and opened."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..compat_twotower import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    add_variant,
    cached_file,
    extract_commit_hash,
)
from .loading import is_of

# Arguments of `from_pretrained` that say where a checkpoint's files are.
WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@contextmanager
def only_tensors_of(
    parts: Sequence[str], path: str | os.PathLike, kwargs: dict[str, Any], renamed: bool
) -> Iterator[tuple[str | os.PathLike, dict[str, Any]]]:
    """
    Where `from_pretrained`, which would take all files of the checkpoint at `path`, finds those of some parts.

    Where some files are of no use, that is a folder, for as long as this lasts, with an index of the others, by their
    absolute paths. A checkpoint in one file, or whose tensors are `renamed` on loading, is left as it is.

    Args:
        parts: names of modules of the model.
        path: a folder or a repository.
        kwargs: of `from_pretrained`.

    Returns:
        Path and arguments for `from_pretrained`.
    """
    where = where_of(kwargs)
    single_name, index_name = (
        add_variant(name, kwargs.get("variant")) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    index_file = None if renamed or path is None else _found(path, index_name, where)
    if index_file is not None and Path(index_file).with_name(single_name).is_file():
        index_file = None  # transformers goes by that file, whatever an index beside it says
    content = {} if index_file is None else json.loads(Path(index_file).read_text(encoding="utf-8"))
    weight_map = content.get("weight_map", {})
    wanted = {name: shard for name, shard in weight_map.items() if is_of(name, parts)}
    if not wanted or set(wanted.values()) == set(weight_map.values()):
        yield path, kwargs
        return
    # What was found is of one commit, whatever is pushed meanwhile.
    if (commit := extract_commit_hash(index_file, None)) is not None:
        where["revision"] = commit
    files = {shard: str(_file(path, shard, where)) for shard in sorted(set(wanted.values()))}
    content["weight_map"] = {name: files[shard] for name, shard in wanted.items()}
    with TemporaryDirectory(prefix="twotower") as folder:
        for name in (CONFIG_NAME, GENERATION_CONFIG_NAME):
            if (file := _found(path, name, where)) is not None:
                shutil.copyfile(file, Path(folder, name))
        Path(folder, index_name).write_text(json.dumps(content), encoding="utf-8")
        yield folder, {name: value for name, value in kwargs.items() if name not in WHERE}


def where_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where files are."""
    return {name: kwargs[name] for name in WHERE if name in kwargs}


def _found(path: str | os.PathLike, name: str, where: dict[str, Any]) -> str | None:
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where)


def _file(path: str | os.PathLike, name: str, where: dict[str, Any]) -> Path:
    file = cached_file(path, name, **where)
    assert file is not None, "cached_file raises where there is none"
    return Path(os.path.abspath(file))


__all__ = ["WHERE", "only_tensors_of", "where_of"]
