"""Compiles our Triton kernel for GPUs that are not here, and prints a line of the registers and stack each one uses.

A process of its own: in that of the tests Triton interprets.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from triton import compile
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

file, folder, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
spec = importlib.util.spec_from_file_location(file.stem, file)
ssd = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ssd)
cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"

for architecture, dtype, tokens, flags in cases:
    tiles = ssd.ssd_tiles(tokens, 64)
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"H": 64, "P": 64, "G": 8, "N": 128, "SEEDED": True, **flags, **tiles}
    kinds = dict.fromkeys(["x", "B", "C", "D", "y"], "*" + dtype) | {"ends": "*i64"}
    kinds |= dict.fromkeys(["dt", "A", "state", "state_after"], "*fp32") | dict.fromkeys(constants, "constexpr")
    names = ssd.ssd_kernel.arg_names
    source = ASTSource(
        ssd.ssd_kernel,
        signature={name: kinds.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    (folder / "kernel").write_bytes(compiled.asm["cubin"])
    used = subprocess.run([cuobjdump, "-res-usage", folder / "kernel"], capture_output=True, text=True, check=True)
    print(json.dumps(dict(part.split(":") for part in used.stdout.split() if part.startswith(("REG:", "STACK:")))))
