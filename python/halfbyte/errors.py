"""Errors of the checkpoint tool: what failed, what was seen, what to do, which exit code.

Every error carries a stable code `HB-Exyz` whose first digit is the exit code of the command line:

    E2xx  2  wrong usage                E5xx  5  not enough memory or disk
    E3xx  3  something is not installed E6xx  6  interrupted, or another run holds the output
    E4xx  4  bad or hostile input       E7xx  7  a verification failed

`str(error)` is the whole message as the command line prints it, `fix` included.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written.

    Parameters
    ----------
    code : str
        "E412" and the like; see the table of the module.
    what : str
        One line: what failed, with the file and tensor.
    details : sequence of str
        More lines: the values seen and the limits.
    fix : str or None
        What the user can do.
    """

    def __init__(self, code: str, what: str, details: Sequence[str] = (), fix: str | None = None):
        self.code = "HB-" + code
        self.what = what
        self.details = tuple(details)
        self.fix = fix
        super().__init__(code, what, details, fix)

    @property
    def exit_code(self) -> int:
        return int(self.code[4])

    def __str__(self) -> str:
        lines = [f"{self.code}: {self.what}", *(f"  {line}" for line in self.details)]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        return {"code": self.code, "message": self.what, "details": list(self.details), "fix": self.fix}


def from_os_error(error: OSError, what: str) -> CheckpointError:
    """The CheckpointError for an operating-system error: a full disk is E501, the rest E402."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError("E501", f"{what}: {reason}", fix="free some space, or write to another disk")
    if error.errno == errno.EFBIG:
        return CheckpointError(
            "E502", f"{what}: {reason}", fix="raise the limit (ulimit -f), or use --max-shard-size"
        )
    return CheckpointError("E402", f"{what}: {reason}")
