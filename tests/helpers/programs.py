"""Programs that run in a process of their own."""

import subprocess
import sys


def last_error(program: str) -> str:
    """Return the last line that a Python program writes to its standard error."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    return done.stderr.splitlines()[-1]
