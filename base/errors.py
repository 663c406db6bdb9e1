"""Two exceptions that end a program with one line, and where they become exit codes.

Exit codes of every script: 0 done; 1 the run failed; 2 the user's mistake; 3 stopped by a signal
after saving, the same command goes on; 130 interrupted before there was anything to save.
"""

import argparse
import errno
import os
import signal
import sys


class UserError(ValueError):
    """A wrong flag, file or value: exit code 2; says what and how to mend."""


class RunFailed(RuntimeError):
    """The run cannot go on (divergence, a dead rank, a full disk): exit code 1."""


class Parser(argparse.ArgumentParser):
    """A wrong flag ends with one line, as every other mistake does."""

    def error(self, message):
        raise UserError(f"{message}; {self.prog} --help lists the flags")


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)     # not the user's mistake
LOST = ("closed by peer", "reset by peer", "Broken pipe", "imed out", "imeout")


def lost_another(error):
    """Whether this is what torch.distributed raises where another process has died or hangs."""
    return "RANK" in os.environ and (type(error).__name__.startswith("Dist")
                                     or any(words in str(error) for words in LOST))


def run(main):
    """Call main() and leave with its exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):          # clean up, as after Ctrl-C
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except (UserError, RunFailed) as error:
        rank = os.environ.get("RANK", "0")                  # it may be only this process's
        who = "error" if rank == "0" else f"error in process {rank}"
        print(f"{who}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":      # torch's, of a GPU
            print("error: the GPU's memory is full; a smaller --batch-per-gpu needs less, and "
                  "--dry-run says how much", file=sys.stderr, flush=True)
            sys.exit(1)
        if not lost_another(error):
            raise
        print(f"error in process {os.environ['RANK']}: another process of this run is gone or "
              "cannot be reached; what was saved last is good, the same command goes on",
              file=sys.stderr, flush=True)
        sys.exit(1)
    except BrokenPipeError:                                 # of `train.py --dry-run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {str(error.filename)[:200]!r}: {error.strerror}", file=sys.stderr)
        sys.exit(1 if error.errno in DISK else 2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
