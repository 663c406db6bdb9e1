"""Read a published pickle without running anything from it.

An ordinary loader calls whatever a file names. This one walks over the opcodes and calls nothing:
the few classes and functions that published networks name become plain values or inert records,
and any other name or opcode ends the reading. Time and memory are bounded, whatever the file says.
"""

import io
import math
import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from base.errors import UserError

MAX_OPCODES = 500_000         # the largest published network takes about 90,000
MAX_TEXT = 1 << 25            # characters of all strings, at up to 4 bytes each
MAX_READ = 1 << 27            # bytes of one string or tensor
SHORT_TEXT = 4096             # a longer string is kept as bytes: protocol 2 stores bytes as text

PERSISTENT = "torch_utils.persistence _reconstruct_persistent_obj"
MODULE_DICT = "torch.nn.modules.container ModuleDict"
STORAGES = {
    "torch FloatStorage": torch.float32, "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16, "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64, "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16, "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8, "torch BoolStorage": torch.bool}
SCALARS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


class UnsafePickle(UserError):
    """The file is damaged, or asks for something that published networks do not need."""


class Name(str):
    """A class or function that the file names: "module attribute"."""


@dataclass(eq=False, repr=False, slots=True)
class Record:
    """What would have been an object: its class or function, the arguments, the later state."""
    name: str
    args: tuple
    state: Any = None


@dataclass(eq=False, repr=False, slots=True)
class Storage:
    flat: torch.Tensor | None  # None once a tensor has taken it


class Budget:
    """What reading may still cost: opcodes, characters of text, bytes made by repeated calls."""

    def __init__(self, size, opcodes=MAX_OPCODES, text=MAX_TEXT):
        self.opcodes, self.text, self.copies = opcodes, text, size

    def spend(self, **costs):
        for name, cost in costs.items():
            left = getattr(self, name) - cost
            if left < 0:
                raise UnsafePickle(f"more {name} than a network needs")
            setattr(self, name, left)


class Reader:
    """The file as genops may read it: a length in the file is not trusted, a line is short."""

    def __init__(self, file, size):
        self.file, self.size, self.tell = file, size, file.tell

    def read(self, n):
        if n > MAX_READ:
            raise UnsafePickle(f"one item of {n} bytes")
        return self.file.read(n if n < 4096 else min(n, self.size - self.tell()))

    def readline(self):
        return self.file.readline(256)


def read_pickle(source, budget=Budget):
    """Plain values, tensors and inert records of a pickle: a path, or its bytes."""
    inline = isinstance(source, (bytes, bytearray))
    where = "pickle" if inline else str(source)
    try:
        with io.BytesIO(source) if inline else open(source, "rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            value = interpret(Reader(file, size), budget(size), CALLS)
            require(not file.read(1), "data after its end")
            return value
    except UnsafePickle as error:
        raise UnsafePickle(f"{where}: {error}") from None
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    except Exception as error:  # whatever a damaged file makes genops say
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise UnsafePickle(f"{where}: not a whole pickle ({reason})") from None


def require(ok, what):
    if not ok:
        raise UnsafePickle(what)


ARGUMENT = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE",
            "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
FRESH = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
         "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
COUNTED = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
MARKED = {"TUPLE", "APPENDS", "SETITEMS", "ADDITEMS"}  # take all that was pushed since MARK
CALLING = {"REDUCE", "NEWOBJ", "BUILD", "BINPERSID"}


def interpret(reader, budget, calls):
    """The value of one pickle; `calls` holds every name it may use."""
    stack, marks, memo = [], [], {}
    for opcode, arg, _ in pickletools.genops(reader):
        budget.spend(opcodes=1)
        op = opcode.name
        if op in ARGUMENT:
            stack.append(argument(arg, budget))
        elif op in FRESH:
            stack.append(FRESH[op]())
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif op == "MARK":
            marks.append(stack)
            stack = []
        elif op in MARKED:
            items, stack = stack, marks.pop()
            fill(stack, op, items)
        elif op in COUNTED:
            items = [stack.pop() for _ in range(COUNTED[op])]
            fill(stack, op, items[::-1])
        elif op in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(named(stack, arg, calls))
        elif op in CALLING:
            call(stack, op, budget, calls)
        elif op not in ("PROTO", "FRAME", "STOP"):
            raise UnsafePickle(f"opcode {op} is not allowed")
    value = stack.pop()
    require(not stack and not marks, "values left over at its end")
    return value


def argument(arg, budget):
    """Bytes become a bytearray, so that a tensor can take them over without a copy."""
    if type(arg) is int:
        require(arg.bit_length() <= 128, "a whole number of more than 128 bits")
    elif type(arg) is bytes:
        return bytearray(arg)
    elif type(arg) is str:
        if len(arg) > SHORT_TEXT:
            try:
                return bytearray(arg, "latin1")
            except UnicodeEncodeError:
                pass
        budget.spend(text=len(arg))
    return arg


def fill(stack, op, items):
    """Make a tuple of the items, or put them into the list, set or dict on top of the stack."""
    if op.startswith("TUPLE"):
        stack.append(tuple(items))
    elif op.startswith("APPEND"):
        require(type(stack[-1]) is list, "items for what is no list")
        stack[-1].extend(items)
    elif op == "ADDITEMS":
        require(type(stack[-1]) is set, "items for what is no set")
        stack[-1].update(map(key, items))
    else:
        require(type(stack[-1]) is dict and len(items) % 2 == 0, "entries for what is no dict")
        stack[-1].update(zip(map(key, items[::2]), items[1::2]))


def key(value):
    """Strings and small whole numbers: their hashes are quick and do not collide by design."""
    require(type(value) is str or (type(value) is int and abs(value) < 1 << 31),
            "a key that is neither text nor a small number")
    return value


def named(stack, arg, calls):
    if arg is None:  # STACK_GLOBAL
        attribute, module = stack.pop(), stack.pop()
        require(type(module) is str and type(attribute) is str, "a name that is no text")
        arg = f"{module} {attribute}"
    require(arg in calls, f"asks for {arg[:80]!r}, which networks do not need")
    return Name(arg)


def call(stack, op, budget, calls):
    if op == "BUILD":
        state, target = stack.pop(), stack[-1]
        if type(target) is not dict:  # attributes of an OrderedDict or EasyDict say nothing
            require(type(target) is Record and target.name in STATEFUL and target.state is None,
                    "a state for what takes none")
            target.state = state
    elif op == "BINPERSID":
        require(calls is STORAGES, "a persistent id outside a tensor")
        stack.append(Record("storage", stack.pop()))
    else:
        args, name = stack.pop(), stack.pop()
        require(type(name) is Name and type(args) is tuple, f"{op} of what is no name")
        way, function = calls[name] if calls is CALLS else (None, None)
        require(op == way, f"{op} of {name}")
        stack.append(function(args, budget))


# ------------------------------------------------------------------------------------------------
# What the allowed names stand for. Each takes (args, budget); types are exact before values are
# compared, and a wrong number of arguments is a ValueError.


def without_arguments(make):
    def function(args, budget):
        require(args == (), "arguments for what takes none")
        return make()
    return function


def persistent(args, budget):
    meta, = args
    require(type(meta) is dict, "a network that is no dict")
    return Record(PERSISTENT, args)


def make_set(args, budget):
    items, = args
    require(type(items) is list, "a set of what is no list")
    budget.spend(opcodes=len(items))
    return set(map(key, items))


def encode(args, budget):
    """Protocol 2 stores bytes as Latin-1 text."""
    text, codec = args
    require(type(codec) is str and codec == "latin1", "an encoding other than latin1")
    if type(text) is bytearray:
        return text
    require(type(text) is str, "encoding of what is no text")
    budget.spend(copies=len(text))
    return bytearray(text, "latin1")


def dtype(args, budget):
    require(type(args[0]) is str and args[0] in SCALARS, "an unknown numpy dtype")
    return Record("numpy dtype", args)


def scalar(args, budget):
    kind, data = args
    require(type(kind) is Record and kind.name == "numpy dtype" and type(data) is bytearray
            and type(kind.state) is tuple and len(kind.state) > 1, "an unknown numpy scalar")
    order = kind.state[1]
    require(type(order) is str and order in ("<", ">", "|", "="), "an unknown byte order")
    kind = np.dtype(order + kind.args[0])
    require(len(data) == kind.itemsize, "a numpy scalar of the wrong size")
    return np.frombuffer(bytes(data), kind)[0].item()


def storage(args, budget):
    """torch.save's old format: five pickles, an int64 count, raw little-endian data."""
    blob, = args
    require(type(blob) is bytearray and blob, "a tensor without bytes of its own")
    head = io.BytesIO(blob[:4096])
    magic, version, info, record, keys = [
        interpret(Reader(head, 4096), budget, STORAGES) for _ in range(5)]
    require(type(magic) is int and magic == 0x1950A86A20F9469CFC6C
            and type(version) is int and version == 1001
            and type(info) is dict and info.get("little_endian") is True
            and type(record) is Record and type(record.args) is tuple and len(record.args) == 6
            and type(keys) is list and len(keys) == 1, "an unknown tensor format")
    word, kind, name, _, numel, view = record.args
    require(type(word) is str and word == "storage" and type(kind) is Name and type(numel) is int
            and type(name) is str and type(keys[0]) is str and keys[0] == name and view is None,
            "an unknown kind of tensor storage")
    start = head.tell() + 8
    count = int.from_bytes(blob[start - 8:start], "little")
    require(0 < numel == count and len(blob) - start == numel * STORAGES[kind].itemsize,
            f"a tensor of {numel} numbers in {max(0, len(blob) - start)} bytes")
    data = blob[start:]  # a copy, so that the numbers are aligned
    blob.clear()         # no second tensor can be made of these bytes
    return Storage(torch.frombuffer(data, dtype=STORAGES[kind]))


def tensor(args, budget):
    """A view that fits its storage and is no larger, so tensors never exceed the file."""
    source, offset, size, stride, _, _ = args
    require(type(source) is Storage and source.flat is not None, "a storage used twice")
    require(type(size) is tuple and type(stride) is tuple and len(size) == len(stride) <= 8
            and all(type(n) is int for n in (offset, *size, *stride)), "an unknown tensor shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    require(min((1, *size)) == 1 and min((0, offset, *stride)) == 0
            and math.prod(size) <= len(source.flat) and last < len(source.flat),
            "a tensor larger than its storage")
    flat, source.flat = source.flat, None
    return flat.as_strided(size, stride, offset)


def parameter(args, budget):
    value, _, _ = args
    require(type(value) is torch.Tensor, "a parameter that is no tensor")
    return value


STATEFUL = {MODULE_DICT, "numpy dtype"}
CALLS = {
    PERSISTENT: ("REDUCE", persistent),
    MODULE_DICT: ("NEWOBJ", without_arguments(lambda: Record(MODULE_DICT, ()))),
    "torch._utils _rebuild_parameter": ("REDUCE", parameter),
    "torch._utils _rebuild_tensor_v2": ("REDUCE", tensor),
    "torch.storage _load_from_bytes": ("REDUCE", storage),
    "collections OrderedDict": ("REDUCE", without_arguments(dict)),
    "dnnlib EasyDict": ("NEWOBJ", without_arguments(dict)),
    "dnnlib.util EasyDict": ("NEWOBJ", without_arguments(dict)),
    "builtins set": ("REDUCE", make_set),
    "__builtin__ set": ("REDUCE", make_set),
    "__builtin__ bytes": ("REDUCE", without_arguments(bytearray)),
    "_codecs encode": ("REDUCE", encode),
    "numpy dtype": ("REDUCE", dtype),
    "numpy.core.multiarray scalar": ("REDUCE", scalar),
    "numpy._core.multiarray scalar": ("REDUCE", scalar),
}
