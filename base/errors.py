"""Two exceptions that end a program with one line, and where they become exit codes.

Exit codes of every script: 0 done; 1 the run failed; 2 the user's mistake; 3 stopped by a signal
after saving, the same command goes on; 130 interrupted before there was anything to save,
or by a second Ctrl-C.
"""

import argparse
import contextlib
import errno
import os
import signal
import sys

from tqdm import tqdm


class UserError(ValueError):
    """A wrong flag, file or value: exit code 2; says what and how to mend."""


class RunFailed(RuntimeError):
    """The run cannot go on (divergence, a dead rank, a full disk): exit code 1."""


class Parser(argparse.ArgumentParser):
    """A wrong flag ends with one line, as every other mistake does."""

    def error(self, message):
        raise UserError(f"{message}; {self.prog} --help lists the flags")


# Asked to stop: by a user, by a batch system before its time limit, by a terminal that is closed.
INTERRUPTING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)     # not the user's mistake
BEYOND = "Storage size calculation overflowed"      # torch, of more bytes than it can count
LOST = ("closed by peer", "reset by peer", "Broken pipe", "imed out", "imeout")


def lost_another(error):
    """Whether this is what torch.distributed raises where another process has died or hangs."""
    return "RANK" in os.environ and (type(error).__name__.startswith("Dist")
                                     or any(words in str(error) for words in LOST))


def out_of_memory(error):
    """Python's and numpy's, torch's of a GPU, torch's of the host, which is no class of its own."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def explained(error):
    """(exit code, line for the user); None for a mistake of ours, which shows its traceback."""
    if isinstance(error, (UserError, RunFailed)):
        rank = os.environ.get("RANK", "0")                  # it may be only this process's
        who = "error" if rank == "0" else f"error in process {rank}"
        return 2 if isinstance(error, UserError) else 1, f"{who}: {error}"
    if out_of_memory(error) or BEYOND in str(error):
        whose = "the GPU's memory" if type(error).__name__ == "OutOfMemoryError" else "the memory"
        return 1, (f"error: {whose} is full; in training a smaller --batch-per-gpu needs less, or "
                   "a smaller --batch, and --dry-run says how much")
    if lost_another(error):
        return 1, (f"error in process {os.environ['RANK']}: another process of this run is gone or "
                   "cannot be reached; what was saved last is good, the same command goes on")
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return 1, f"error: --compile: {str(error).strip().splitlines()[0]}; leave out the flag"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, BrokenPipeError):                  # of `train.py --dry-run | head`
        return 1, ""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK):
        where = f"{str(error.filename)[:200]!r}" if error.filename is not None else "cannot write"
        return 1 if error.errno in DISK else 2, f"error: {where}: {error.strerror}"
    for text in map(os.strerror, DISK):         # safetensors and shutil.copytree say it in words
        if text in str(error):
            return 1, f"error: cannot write: {text}"
    return None


def run(main):
    """Call main() and leave with its exit code."""
    replace_closed_streams()
    for number in INTERRUPTING:                             # clean up, as after Ctrl-C
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        code = main()
        sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code
    except (Exception, KeyboardInterrupt) as error:
        if not (found := explained(error)):
            raise
        code, line = found
        end_bars()
        with contextlib.suppress(OSError):
            if line:
                print(" ".join(line.split()), file=sys.stderr, flush=True)
    leave(code)


def replace_closed_streams():
    """By /dev/null, as after `>&-`; the next file that is opened would take their numbers."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def end_bars():
    """Progress bars that an error has interrupted end their line."""
    for bar in list(getattr(tqdm, "_instances", ())):
        with contextlib.suppress(OSError):
            bar.close()


def leave(code):
    """Exit; what could not be written is dropped, or Python would complain of it once more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
