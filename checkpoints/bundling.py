"""The code of an export: every source file that a model needs, bundled into three.

transformers downloads the files a modelling file imports by name, one folder deep, and warns of each. So the files
below `CODE_ROOT` are joined: each goes into the first bundle whose main file needs it, directly or not, after the
files that it imports itself, and all of a bundle share one namespace. A bundle begins with the imports that its files
begin with; an import further down (where it is optional, or after a check) stays where it is.
"""

import ast
import builtins
import symtable
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..compat_twotower import get_relative_imports

CODE_ROOT = Path(__file__).resolve().parents[1]
BUNDLES = ("configuration_twotower", "generation_twotower", "modeling_twotower")
LINE_LENGTH = 119


@dataclass
class SourceFile:
    """
    A source file taken apart.

    Args:
        name: path below the root.
        docstring: as it is written, quotes and all; empty without one.
        summary: what the docstring says.
        imports: module -> imported names, as written; "" for the names of plain `import` statements.
        relative: file -> names imported from it.
        body: the text from the imports at its top to its `__all__`.
        exported: its `__all__`.
        defined: every name its body binds.
    """

    name: str
    docstring: str
    summary: str
    imports: dict[str, set[str]]
    relative: dict[Path, list[str]]
    body: str
    exported: list[str]
    defined: set[str]


def write_code(folder: Path, root: Path = CODE_ROOT, bundles: Sequence[str] = BUNDLES) -> None:
    """Write one file per bundle into `folder`; the main file of each is the source file of its name."""
    sources: dict[Path, SourceFile] = {}
    homes: dict[Path, str] = {}  # source file -> its bundle
    for bundle in bundles:
        parts = _in_order(root / f"{bundle}.py", root, sources)
        homes |= dict.fromkeys(parts, bundle)
        early = [path.name for path in parts[:-1] if path.parent == root and path.stem in bundles]
        assert not early, f"{bundle} needs {early}, the main file of a later bundle"
        earlier = _from_earlier(parts, bundle, sources, homes)
        _check_names([sources[path] for path in parts], earlier)
        target = folder / f"{bundle}.py"
        target.write_text(_bundle([sources[path] for path in parts], earlier), encoding="utf-8")
        # transformers copies and downloads what its regular expression finds, comments and docstrings included.
        found, expected = set(get_relative_imports(target)), {module.removeprefix(".") for module in earlier}
        assert found == expected, f"transformers reads the imports of {bundle} as {found}, but they are {expected}"


def _in_order(path: Path, root: Path, sources: dict[Path, SourceFile], importing: tuple[Path, ...] = ()) -> list[Path]:
    """The files that a file needs and `sources` does not hold yet, each after those it imports; adds them to it."""
    assert path not in importing, f"an import cycle: {' -> '.join(step.name for step in (*importing, path))}"
    if path in sources:
        return []
    source = _read(path, root)
    needed = [file for imported in source.relative for file in _in_order(imported, root, sources, (*importing, path))]
    sources[path] = source
    return [*needed, path]


def _read(path: Path, root: Path) -> SourceFile:
    text = path.read_text(encoding="utf-8")
    lines, tree, name = text.splitlines(), ast.parse(text), path.relative_to(root).as_posix()
    # 1. The docstring and the imports at the top.
    summary = ast.get_docstring(tree)
    statements = tree.body if summary is None else tree.body[1:]
    docstring_end = 0 if summary is None else tree.body[0].end_lineno or 0
    head: list[ast.Import | ast.ImportFrom] = []
    for statement in statements:
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            break
        head.append(statement)
    head_end = (head[-1].end_lineno or 0) if head else docstring_end
    assert not any("#" in line for line in lines[docstring_end:head_end]), f"{name}: a comment at an import is lost"
    imports, relative = _split_imports(head, path, name)
    for node in ast.walk(tree):
        lower = isinstance(node, ast.ImportFrom) and node.level > 0 and node not in head
        assert not lower, f"{name}, line {getattr(node, 'lineno', 0)}: a relative import below the imports at the top"
    # 2. What is left.
    body, exported = _split_exported(lines, statements[len(head) :], head_end, name)
    symbols = symtable.symtable(body, name, "exec").get_symbols()
    defined = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    return SourceFile(
        name, "\n".join(lines[:docstring_end]), summary or "", imports, relative, body, exported, defined
    )


def _split_imports(
    head: list[ast.Import | ast.ImportFrom], path: Path, name: str
) -> tuple[dict[str, set[str]], dict[Path, list[str]]]:
    """Imported names by module, and by file."""
    imports: dict[str, set[str]] = defaultdict(set)
    relative: dict[Path, list[str]] = defaultdict(list)
    for node in head:
        where = f"{name}, line {node.lineno}"
        if isinstance(node, ast.Import):
            imports[""].update(map(ast.unparse, node.names))
        elif node.level == 0:
            imports[node.module or ""].update(map(ast.unparse, node.names))
        else:
            assert node.module is not None, f"{where}: transformers cannot follow `from . import`; name the module"
            imported = path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            assert imported.is_file(), f"{where}: {imported} is not a file, and only files can be exported"
            assert all(alias.asname is None for alias in node.names), f"{where}: the name after `as` would be lost"
            relative[imported].extend(alias.name for alias in node.names)
    return imports, relative


def _split_exported(lines: list[str], statements: list[ast.stmt], start: int, name: str) -> tuple[str, list[str]]:
    """The text of the statements without an `__all__` at their end, and what that lists."""
    texts = [ast.unparse(statement).startswith("__all__ =") for statement in statements]
    assert not any(texts[:-1]), f"{name}: __all__ is not at the end"
    if not statements or not texts[-1]:
        return "\n".join(lines[start:]).strip("\n"), []
    last = statements[-1]
    assert isinstance(last, ast.Assign) and not "".join(lines[last.end_lineno :]).strip(), f"{name}: after __all__"
    return "\n".join(lines[start : last.lineno - 1]).strip("\n"), ast.literal_eval(last.value)


def _from_earlier(
    parts: list[Path], bundle: str, sources: dict[Path, SourceFile], homes: dict[Path, str]
) -> dict[str, set[str]]:
    """What a bundle imports of earlier ones: names by module."""
    earlier: dict[str, set[str]] = defaultdict(set)
    for part in parts:
        for imported, names in sources[part].relative.items():
            for name in names:
                home = homes[_origin(name, imported, sources)]
                if home != bundle:
                    earlier[f".{home}"].add(name)
    return earlier


def _origin(name: str, path: Path, sources: dict[Path, SourceFile]) -> Path:
    """The file that a name comes from: another one than `path` where `path` imports it, too."""
    for imported, names in sources[path].relative.items():
        if name in names:
            return _origin(name, imported, sources)
    return path


def _check_names(parts: list[SourceFile], earlier: dict[str, set[str]]) -> None:
    """Refuse a name that would mean two things in a bundle."""
    meanings: dict[str, set[str]] = defaultdict(set)
    for part in parts:
        for name in part.defined:
            meanings[name].add(part.name)
            assert name not in dir(builtins), f"{part.name}: {name} would hide Python's own in the whole bundle"
    for module, names in [*earlier.items(), *_merged(part.imports for part in parts).items()]:
        for name in names:
            # `import torch.nn` binds torch, and so do its like.
            bound = name.split(" as ")[-1] if module or " as " in name else name.split(".")[0]
            meanings[bound].add(f"from {module} import {name}" if module or " as " in name else f"import {bound}")
    for name, origins in meanings.items():
        assert len(origins) == 1, f"{name} means two things in one bundle; rename one: {', '.join(sorted(origins))}"


def _merged(imports: Iterable[dict[str, set[str]]]) -> dict[str, set[str]]:
    merged: dict[str, set[str]] = defaultdict(set)
    for of_one in imports:
        for module, names in of_one.items():
            merged[module] |= names
    return merged


def _bundle(parts: list[SourceFile], earlier: dict[str, set[str]]) -> str:
    """The text of a bundle; its main file is the last of `parts`, and its docstring the bundle's."""
    names = ", ".join(part.name for part in parts)
    heading = [f"# Written by `twotower export` from these files of the twotower package: {names}."]
    heading += [parts[-1].docstring] if parts[-1].docstring else []
    sections = _import_sections(_merged(part.imports for part in parts), earlier)
    bodies = [f"{_comment(part, with_summary=part is not parts[-1])}\n\n\n{part.body}" for part in parts if part.body]
    exported = sorted({name for part in parts for name in part.exported}, key=_import_order)
    listed = ["__all__ = [\n" + "".join(f'    "{name}",\n' for name in exported) + "]"] if exported else []
    return "\n\n".join(["\n".join(heading), *sections, "\n\n\n".join([*bodies, *listed])]) + "\n"


def _comment(part: SourceFile, with_summary: bool) -> str:
    said = ["", *part.summary.splitlines()] if with_summary and part.summary else []
    return "\n".join(f"# {line}".rstrip() for line in [f"From {part.name}:", *said])


def _import_sections(imports: dict[str, set[str]], earlier: dict[str, set[str]]) -> list[str]:
    """The imports as ruff sorts them: of Python's library, of packages, of other bundles."""
    sections: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for name in sorted(imports.get("", ())):
        sections[_section(name)].append(f"import {name}")
    for module, names in sorted([*imports.items(), *earlier.items()]):
        if module:
            sections[_section(module)].append(_import_statement(module, sorted(names, key=_import_order)))
    return ["\n".join(lines) for lines in sections.values() if lines]


def _section(module: str) -> int:
    return 2 if module.startswith(".") else int(module.split(".")[0] not in sys.stdlib_module_names)


def _import_statement(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= LINE_LENGTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def _import_order(name: str) -> tuple[int, str, str]:
    """CONSTANTS, then Classes, then functions."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, name.lower(), name


__all__ = ["CODE_ROOT", "write_code"]
