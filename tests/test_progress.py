"""Progress: a bar in a terminal, in a log file a line now and then."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import train
from base import progress as module
from base.progress import progress
from training.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def said_to(stream, monkeypatch):
    """In the test itself: pytest puts its own stderr back before each."""
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_without_a_terminal_fast_work_is_two_whole_lines(monkeypatch):
    stderr = said_to(io.StringIO(), monkeypatch)
    assert sum(progress(range(100_000), desc="counting", unit="number")) == 4_999_950_000
    lines = stderr.getvalue().split("\n")
    assert len(lines) <= 3 and lines[-1] == ""
    assert all(line.startswith("counting: ") for line in lines[:-1])
    assert "100000/100000" in lines[-2] and "number/s" in lines[-2]
    assert "\r" not in stderr.getvalue() and "\x1b" not in stderr.getvalue()


def test_without_a_terminal_slow_work_is_a_line_now_and_then(monkeypatch):
    stderr = said_to(io.StringIO(), monkeypatch)
    monkeypatch.setattr(module, "SECONDS", 0.1)
    bar, begun = progress(total=1000, desc="slow"), time.monotonic()
    for _ in range(100):
        time.sleep(0.005)
        bar.set_postfix(loss="1.0", refresh=False)
        bar.update()
    bar.close()
    took = time.monotonic() - begun
    lines = stderr.getvalue().splitlines()
    assert 4 <= len(lines) <= took / 0.1 + 3                # not one for each of the 100 updates
    counts = [int(line.split("|")[2].split("/")[0]) for line in lines]
    assert counts == sorted(counts) and counts[-1] == 100 and "loss=1.0" in lines[-1]


def test_in_a_terminal_it_is_a_bar_on_one_line(monkeypatch):
    stderr = said_to(Terminal(), monkeypatch)
    for _ in progress(range(3), desc="work", mininterval=0):
        pass
    said = stderr.getvalue()
    assert said.count("\r") >= 4 and said.count("\n") == 1 and "3/3" in said


def test_rank_0_alone_shows_it(monkeypatch):
    stderr = said_to(io.StringIO(), monkeypatch)
    monkeypatch.setattr(module.distributed, "rank", lambda: 1)
    assert list(progress(range(3))) == [0, 1, 2] and stderr.getvalue() == ""


def test_the_log_file_of_a_run_has_no_line_for_each_line_of_its_metrics(tmp_path, monkeypatch):
    stderr = said_to(io.StringIO(), monkeypatch)
    train.main(["--stage", "1", "--iterations", "60", "--batch", "2", "--evaluate-every", "0",
                "--folder", str(tmp_path)])
    assert len(read_metrics(tmp_path / "stage1" / "metrics.jsonl")) >= 7
    lines = stderr.getvalue().splitlines()
    assert len(lines) <= 3 and "60/60" in lines[-1]


CODE = """
import time
from base.progress import progress
for _ in progress(range(300), desc="work"):
    time.sleep(0.002)
"""


def test_a_program_in_a_pipe_and_in_a_real_terminal():
    piped = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert piped.returncode == 0 and piped.stderr.count("work: ") <= 3
    assert "\r" not in piped.stderr and piped.stderr.endswith("\n")

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))    # 24 lines of 80
    shown = subprocess.Popen([sys.executable, "-c", CODE], cwd=ROOT, stderr=theirs)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:                                     # a terminal's end of file, on Linux
            break
        if not part:
            break
        said += part
    os.close(ours)
    assert shown.wait() == 0 and said.count(b"\rwork: ") > 3
