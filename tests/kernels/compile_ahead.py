"""Compiles our Triton kernels for GPUs that are not here, and prints a line of the registers and stack each one uses.

    python compile_ahead.py MODULE FOLDER CASES    each: architecture, kernel, types of arguments, constants, options

A process of its own: in that of the tests Triton interprets.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

from triton import compile
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module, folder, cases = importlib.import_module(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"

for architecture, name, types, constants, options in cases:
    kernel = getattr(module, name)
    kinds = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        signature={argument: kinds.get(argument, "i32") for argument in kernel.arg_names},
        constexprs={(kernel.arg_names.index(argument),): value for argument, value in constants.items()},
    )
    compiled = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    (folder / "kernel").write_bytes(compiled.asm["cubin"])
    used = subprocess.run([cuobjdump, "-res-usage", folder / "kernel"], capture_output=True, text=True, check=True)
    print(json.dumps(dict(part.split(":") for part in used.stdout.split() if part.startswith(("REG:", "STACK:")))))
