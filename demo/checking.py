"""Whether a written function passes its checks, found out in a process of its own that can do little harm.

It has a second of CPU, 256 MB, no file to write and none to read by name, no module to import, and builtins that only
compute; it is a group of processes of its own, killed as a whole when its time is over. That stops accidents of a
small model, and is no sandbox for an adversary.
"""

import json
from collections.abc import Sequence

from ..evaluation.running import run_limited

SECONDS = 5.0  # of the clock; of CPU it has one
LIMITS = {"CPU": 1, "AS": 256 * 1024**2, "FSIZE": 0, "CORE": 0, "NOFILE": 16}
# Reads [code, checks] and writes which results are right, as 0 and 1.
_RUNNER = """
import builtins, json, sys
code, checks = json.load(sys.stdin)
names = '''abs all any bool chr dict divmod enumerate filter float int isinstance len list map max min ord pow range
repr reversed round set sorted str sum tuple zip True False None ValueError IndexError KeyError TypeError'''.split()
space = {"__builtins__": {name: getattr(builtins, name) for name in names if hasattr(builtins, name)}}
right = [0] * len(checks)
try:
    exec(code, space)
    for place, (call, result) in enumerate(checks):
        try:
            right[place] = int(repr(eval(call, space)) == result)
        except Exception:
            pass
except BaseException:
    pass
sys.stdout.write("".join(map(str, right)))
"""


def passed(code: str, checks: Sequence[tuple[str, str]], seconds: float = SECONDS) -> list[bool]:
    """
    Which checks of a function give what they must.

    Args:
        code: what defines the function.
        checks: expressions, and the `repr` of what each must give.
        seconds: of the clock, after which it has failed all of them.
    """
    _, said = run_limited(_RUNNER, LIMITS, seconds, json.dumps([code, list(checks)]).encode())
    return [said[place : place + 1] == b"1" for place in range(len(checks))]
