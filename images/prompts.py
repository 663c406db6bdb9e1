"""Prompts from a file: what a text-to-image network is asked for."""

import json
from functools import partial
from pathlib import Path

from base.errors import UserError
from weights.pickle_reader import Budget, read_pickle

KEYS = ("caption", "prompt", "text")
# DMD2's list of three million prompts takes two opcodes a prompt and 300 million characters.
LARGE = partial(Budget, opcodes=1 << 25, text=1 << 30)


def read_prompts(path):
    """The prompts of a text file, one a line; of a .json list, a .jsonl, or DMD2's pickled list.

    An entry is a text, an object that has it as its caption, prompt or text, or nothing: "".
    """
    path = Path(path)
    entries = read_pickle(path, LARGE) if path.suffix in (".pkl", ".pickle") else parse(path)
    if type(entries) is not list or not entries:
        raise UserError(f"{path}: no prompts in it; allowed: a text file, one prompt a line, or a "
                        "list of prompts in .json, .jsonl or .pkl")
    return [prompt(path, i, entry) for i, entry in enumerate(entries, 1)]


def parse(path):
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return json.loads(text)
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        return [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    except OSError as error:
        raise UserError(f"cannot read the prompts {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no {path.suffix[1:]}: {error}") from None


def prompt(path, number, entry):
    if type(entry) is dict:
        entry = next((entry[key] for key in KEYS if key in entry), entry)
    if type(entry) is bytearray:        # how the reader of pickles keeps a long text
        entry = entry.decode("latin1")
    if entry is not None and type(entry) is not str:
        raise UserError(f"{path}: prompt {number} is {str(entry)[:60]!r}; allowed: a text, or an "
                        f"object with a {', '.join(KEYS[:-1])} or {KEYS[-1]}")
    return whole(entry or "")


def whole(text):
    """Half a character, as of a caption that was cut within one, becomes "?"."""
    return text.encode("utf-8", "replace").decode()
