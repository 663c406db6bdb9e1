"""Progress of long work: a bar in a terminal, in a log file a line now and then."""

import contextlib
import sys

from tqdm import tqdm

from base import distributed

SECONDS = 60                    # between two lines where there is no terminal


class Lines:
    """A file that takes a bar's updates as lines."""

    def write(self, text):
        with contextlib.suppress(OSError):              # a full log is no reason to stop
            if text.strip():
                print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        pass


def progress(items=None, **how):
    """tqdm, on rank 0 alone."""
    if not sys.stderr.isatty():
        how |= dict(file=Lines(), mininterval=SECONDS, maxinterval=SECONDS, ncols=100)
    return tqdm(items, disable=distributed.rank() > 0, dynamic_ncols=sys.stderr.isatty(), **how)
