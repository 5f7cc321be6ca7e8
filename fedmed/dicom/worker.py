"""A reading process: `python -m fedmed.dicom.worker`, spoken to by `workers.Workers` over its standard input.

Its first line are the settings; each further line is `[index, path]`, answered by one line `[index, outcome]`.
"""

import contextlib
import ctypes
import errno
import gc
import json
import logging
import os
import resource
import signal
import sys
import warnings
from typing import Any

# <sys/prctl.h>
_SET_PARENT_DEATH_SIGNAL = 1


def main() -> None:
    """Answer until the input ends."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "wb")
    # What pydicom or a decoder prints quotes the file.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    lines = sys.stdin.buffer
    settings = json.loads(lines.readline())
    from fedmed.dicom.reader import Reader

    limit = settings["memory_mb"] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # A crash is an outcome, not a gigabyte on the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reader = Reader(settings)
    # What is imported stays: the collector need not go through it again and again.
    gc.freeze()
    answers.write(b"ready\n")
    answers.flush()
    for line in lines:
        index, path = json.loads(line)
        answers.write(json.dumps([index, _outcome(reader, path)]).encode() + b"\n")
        answers.flush()


def _die_with_parent() -> None:
    """Where the kernel can (Linux): a decoder that never returns would not notice that its input has ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _outcome(reader: Any, path: str) -> dict[str, Any]:
    """The facts of a file, `{"reason": …}`, or `{"fatal": …}` where our own disk is the trouble."""
    from fedmed.dicom.reader import StoreFailed
    from fedmed.dicom.reasons import Quarantined, Reason

    try:
        return reader.read(path)
    except Quarantined as error:
        return {"reason": error.reason.value}
    except StoreFailed as error:
        return {"fatal": os.strerror(error.errno or 0)}
    except MemoryError:
        return {"reason": Reason.TOO_LARGE.value}
    except PermissionError:
        return {"reason": Reason.NO_PERMISSION.value}
    except OSError as error:
        gone = error.errno == errno.ENOENT
        return {"reason": (Reason.MISSING_FILE if gone else Reason.UNREADABLE).value}
    # A parser of hostile bytes may raise anything; what it says stays here.
    except Exception:
        return {"reason": Reason.UNREADABLE.value}


if __name__ == "__main__":
    main()
