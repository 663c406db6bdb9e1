"""Pickles to read and pickles to refuse, and a harness that reads each within hard limits.

    python hostile_pickles.py FOLDER    reads FOLDER/*.pkl; one JSON line per file
"""

import json
import os
import pickle
import resource
import signal
import struct
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch

SECONDS, MEMORY = 5, 1 << 30  # and the file's size on top
PERSISTENT = ("torch_utils.persistence", "_reconstruct_persistent_obj")

# ------------------------------------------------------------------------------------------------
# Files such as the published ones, from classes that have the published names


def published_module(name, **members):
    sys.modules[name] = module = types.ModuleType(name)
    for member, value in members.items():
        value.__module__, value.__qualname__ = name, member
        setattr(module, member, value)


class EasyDict(dict):
    pass


def reconstruct(meta):
    raise AssertionError("a test has run what a pickle names")


class Layer:
    """Pickled as published networks and layers are."""

    def __init__(self, class_name, state):
        self.meta = {"type": "class", "version": 6, "module_src": "raise RuntimeError('“run”')\n",
                     "class_name": class_name, "state": state}

    def __reduce__(self):
        return reconstruct, (self.meta,)


def layer_state(tree, **more):
    tables = {"_parameters": {"none": None}, "_buffers": {}, "_modules": {}}
    for name, value in tree.items():
        if isinstance(value, dict):
            tables["_modules"][name] = (dict_of_modules(value) if name in ("enc", "dec")
                                        else Layer("Any", layer_state(value)))
        elif name in ("resample_filter", "freqs"):
            tables["_buffers"][name] = value
        else:
            tables["_parameters"][name] = torch.nn.Parameter(value, requires_grad=False)
    tables["_buffers"]["scratch"] = torch.ones(2)  # not persistent: must not be read
    return {"training": False, "scale": np.float64(0.5), "_non_persistent_buffers_set": {"scratch"},
            **tables, **more}


def dict_of_modules(tree):
    modules = torch.nn.ModuleDict.__new__(torch.nn.ModuleDict)
    modules.__dict__.update(layer_state(tree))
    return modules


def network_pickle(config, state, protocol, args=()):
    """The network as a published file of this pickle protocol would hold it."""
    published_module("torch_utils")
    published_module("torch_utils.persistence", _reconstruct_persistent_obj=reconstruct)
    published_module("dnnlib", EasyDict=EasyDict)
    tree = {}
    for name, value in state.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    network = Layer("EDMPrecond", layer_state(tree, _init_args=args, _init_kwargs=config))
    return pickle.dumps({"ema": network, "loss_fn": None, "augment_pipe": Layer("AugmentPipe", {}),
                         "dataset_kwargs": EasyDict(path="data.zip", empty=b"")}, protocol)


# ------------------------------------------------------------------------------------------------
# An assembler of opcodes


def number(n):
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def text(s):
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def binary(data):
    return b"B" + struct.pack("<I", len(data)) + data


def name(module, attribute):
    return text(module) + text(attribute) + b"\x93"


def items(*values):
    return b"(" + b"".join(values) + b"t"


def mapping(**entries):
    return b"}(" + b"".join(text(k) + v for k, v in entries.items()) + b"u"


def call(module, attribute, *args):
    return name(module, attribute) + items(*args) + b"R"


def whole(body):
    return b"\x80\x04" + body + b"."


def module(class_name="Any", **entries):
    return call(*PERSISTENT, mapping(class_name=text(class_name), state=mapping(**entries)))


def network(**entries):
    return whole(mapping(ema=module("EDMPrecond", **entries)))


def with_weight(weight):
    return network(_parameters=mapping(weight=weight))


def legacy(kind=b"ctorch\nFloatStorage\n", numel=4, count=None, raw=b"\0" * 16, first=None,
           last=None, view=b"N"):
    """The bytes of one storage, in torch.save's old format."""
    record = items(text("storage"), kind, text("0"), text("cpu"), number(numel), view)
    first = first or number(0x1950A86A20F9469CFC6C)
    streams = [first, number(1001), mapping(little_endian=b"\x88"),
               record + b"Q", last or b"](" + text("0") + b"e"]
    return (b"".join(b"\x80\x02" + body + b"." for body in streams)
            + struct.pack("<q", numel if count is None else count) + raw)


def loaded(blob):
    return call("torch.storage", "_load_from_bytes", binary(blob))


def view(storage, size, stride, offset=0):
    return call("torch._utils", "_rebuild_tensor_v2", storage, number(offset),
                items(*map(number, size)), items(*map(number, stride)), b"\x89", b"}")


# ------------------------------------------------------------------------------------------------
# The hostile ones


def code(run):
    """Ways to make a loader run os.system(run)."""
    system, shell = b"cos\nsystem\n", text(run)
    yield "reduce", with_weight(call("os", "system", shell))
    yield "reduce-by-global", with_weight(system + items(shell) + b"R")
    yield "reduce-exec", with_weight(
        call("builtins", "exec", text(f"import os; os.system({run!r})")))
    yield "reduce-at-top", whole(call("posix", "system", shell))
    yield "inst", with_weight(b"(" + shell + b"ios\nsystem\n")
    yield "obj", with_weight(b"(" + system + shell + b"o")
    yield "newobj", with_weight(name("subprocess", "Popen") + items(shell) + b"\x81")
    yield "newobj-ex", with_weight(name("subprocess", "Popen") + items(shell) + b"}\x92")
    yield "newobj-of-function", with_weight(name(*PERSISTENT) + items(b"}") + b"\x81")
    for opcode, length in ((b"\x82\x01", "1"), (b"\x83\x01\0", "2"), (b"\x84\x01\0\0\0", "4")):
        yield f"ext{length}", with_weight(opcode + items(shell) + b"R")
    yield "persid", with_weight(b"P" + run.encode() + b"\n")
    yield "binpersid", with_weight(items(text("storage"), system, shell) + b"Q")
    yield "build-class", with_weight(
        name("collections", "OrderedDict") + mapping(__setitem__=name(*PERSISTENT)) + b"b")
    yield "build-function", with_weight(
        name("torch.storage", "_load_from_bytes") + mapping(__code__=shell) + b"b")
    yield "build-network", whole(module("EDMPrecond") + mapping(__class__=shell) + b"b")
    yield "build-setstate", with_weight(
        name("dnnlib", "EasyDict") + b")\x81" + mapping(__setstate__=system) + b"b" + shell + b"b")
    for walk in ("__globals__", "io.BytesIO", "__globals__.__getitem__", "torch.load"):
        yield f"walk-{walk}", with_weight(call("torch.storage", f"_load_from_bytes.{walk}", shell))
    yield "walk-module", with_weight(call("collections", "OrderedDict.__init__.__class__", shell))
    yield "walk-sys", with_weight(call("torch.storage", "sys.modules", shell))
    yield "getattr", with_weight(
        call("builtins", "getattr", name("torch", "load"), text("__call__")))
    yield "torch-load", with_weight(call("torch", "load", text("/dev/zero")))
    yield "name-with-spaces", with_weight(call("torch storage", "_load_from_bytes", shell))
    yield "name-of-bytes", with_weight(
        binary(b"os") + binary(b"system") + b"\x93" + items(shell) + b"R")
    yield "call-of-a-string", with_weight(text("os system") + items(shell) + b"R")
    yield "codec", with_weight(call("_codecs", "encode", shell, text("zlib")))
    yield "object-dtype", with_weight(call("numpy.core.multiarray", "scalar", call(
        "numpy", "dtype", text("O8"), b"\x89", b"\x88"), binary(b"\0" * 8)))
    yield "inner-first", with_weight(loaded(legacy(first=system + items(shell) + b"R")))
    yield "inner-last", with_weight(loaded(legacy(last=system + items(shell) + b"R")))
    yield "inner-kind", with_weight(loaded(legacy(kind=system)))
    yield "inner-allowed-outside", with_weight(loaded(legacy(
        first=b"ctorch.storage\n_load_from_bytes\n" + items(binary(legacy())) + b"R")))
    yield "inner-view", with_weight(loaded(legacy(view=system)))
    yield "inner-build", with_weight(loaded(legacy(kind=system + b"}b")))


def bombs():
    for opcode, form, n in (
            (b"B", "<I", 2**32 - 1), (b"\x8e", "<Q", 2**62), (b"\x8e", "<Q", 2**36),
            (b"\x8d", "<Q", 2**40), (b"\x96", "<Q", 2**40), (b"X", "<I", 2**32 - 1),
            (b"\x8b", "<i", 2**31 - 1), (b"T", "<i", 2**31 - 1)):
        yield f"length-{opcode.hex()}-{n:x}", with_weight(opcode + struct.pack(form, n))
    yield "frame", b"\x80\x04\x95" + struct.pack("<Q", 2**63) + network()[2:]
    yield "long-number", with_weight(b"\x8b" + struct.pack("<i", 2**24) + b"\x7f" * 2**24)
    yield "decimal-number", with_weight(b"I" + b"9" * 2**20 + b"\n")
    yield "decimal-long", with_weight(b"L" + b"9" * 2**20 + b"L\n")
    yield "wide-text", with_weight(text("a" * (120 << 20) + "\U0001f600"))
    yield "wide-texts", with_weight(items(*[text("a" * (1 << 20) + "\U0001f600")] * 60))
    yield "memo-index", with_weight(b"Nr" + struct.pack("<I", 2**32 - 1))
    yield "memo-indices", with_weight(
        b"N" + b"".join(b"r" + struct.pack("<I", n << 13) for n in range(400_000)))
    yield "memo-missing", with_weight(b"j" + struct.pack("<I", 2**31))
    yield "dup", with_weight(b"]" + b"2a" * 10**6)
    yield "doubling-lists", network(x=b"](]q\0" + b"](h\0h\0eq\0" * 10_000 + b"e",
                                    _init_kwargs=mapping(channel_mult=b"h\0"))
    yield "doubling-modules", network(_modules=mapping(first=module() + b"q\0", **{
        f"m{n}": module(_modules=mapping(a=b"h\0", b=b"h\0")) + b"q\0" for n in range(50)}))
    yield "sets", with_weight(b"](" + b"".join(map(number, range(10**5))) + b"eq\0" + b"".join(
        [name("builtins", "set") + b"q\x01h\0\x85R"] + [b"h\x01h\0\x85R"] * 10**5))
    yield "encodings", with_weight(
        text("\xe9" * 4000) + b"q\0" + text("latin1") + b"q\x01" + name("_codecs", "encode")
        + b"q\x02" + b"h\x02h\0h\x01\x86R" * 10**5)
    yield "opcodes", with_weight(b"N" * 10**7)
    yield "empty-sets", with_weight(b"\x8f" * 10**6)
    yield "marks", with_weight(b"(" * 10**6)
    again = b"".join(text(str(n)) + b"h\0" for n in range(1000))
    yield "tensor-names", network(_parameters=b"}(" + text("a") + view(
        loaded(legacy()), [4], [1]) + b"q\0" + again + b"u")
    for size, stride, offset in (
            ([10**6, 10**6], [0, 0], 0), ([2**62, 4], [1, 1], 0), ([4], [10**9], 0), ([4], [-1], 3),
            ([4], [1], 1), ([4], [1], -1), ([1], [1], 2**62), ([-1], [1], 0), ([5], [0], 0),
            ([0, 2**40], [1, 1], 0), ([1] * 64, [1] * 64, 0), ([2, 2], [1], 0), ([2**200], [0], 0)):
        yield f"view-{size}-{stride}-{offset}"[:40], with_weight(
            view(loaded(legacy()), size, stride, offset))
    for numel in (2**40, 2**62, -1, 0, 3, 5):
        yield f"storage-{numel}", with_weight(view(loaded(legacy(numel=numel)), [1], [1]))
    yield "storage-count", with_weight(view(loaded(legacy(count=2**40)), [1], [1]))
    yield "storage-padding", with_weight(view(loaded(legacy(raw=b"\0" * 17)), [1], [1]))
    yield "storage-twice", network(_parameters=mapping(
        a=view(loaded(legacy()) + b"q\0", [4], [1]), b=view(b"h\0", [4], [1])))
    yield "bytes-twice", network(_parameters=mapping(
        a=view(call("torch.storage", "_load_from_bytes", binary(legacy()) + b"q\0"), [4], [1]),
        b=view(call("torch.storage", "_load_from_bytes", b"h\0"), [4], [1])))
    kwargs = {"img_resolution": number(8), "img_channels": number(1),
              "model_type": text("SongUNet")}
    for argument, value in (
            ("model_channels", number(2**60)), ("num_blocks", number(10**9)),
            ("channel_mult", b"](" + number(1) * 10**5 + b"e"), ("channel_mult", b"N"),
            ("img_channels", number(2**100)), ("dropout", module()), ("attn_resolutions", b"N"),
            ("resample_filter", b"](" + number(2**90) * 9 + b"e"), ("nonsense", number(1)),
            ("model_channels", b"G" + struct.pack(">d", 1e300))):
        yield f"config-{argument}-{len(value)}", network(
            _init_kwargs=mapping(**kwargs | {argument: value}))


def structures():
    deep = 200_000
    yield "nested-lists", with_weight(b"]" * deep + b"a" * (deep - 1))
    yield "nested-tuples", with_weight(b")" + b"\x85" * deep)
    yield "nested-dicts", with_weight(
        b"}" + (text("a") + b"}") * 50_000 + b"s" * 50_000)
    body = module()
    for _ in range(300):
        body = module(_modules=mapping(a=body))
    yield "nested-modules", network(_modules=mapping(a=body))
    hashed = b"()q\0" + b"h\0h\0\x86q\0" * 60 + b"t"  # a tuple of tuples of 2^60 leaves
    yield "key-nested-tuple", with_weight(b"}" + hashed + b"Ns")
    yield "set-of-nested-tuple", with_weight(b"\x8f(" + hashed + b"\x90")
    yield "set-call-of-nested-tuple", with_weight(call("builtins", "set", b"]" + hashed + b"a"))
    yield "key-deep-tuple", with_weight(b"})" + b"\x85" * deep + b"Ns")
    yield "key-collisions", with_weight(
        b"}(" + b"".join(number(n * (2**61 - 1)) + b"N" for n in range(1, 10**5)) + b"u")
    yield "key-bytes", with_weight(b"}" + binary(b"a") + b"Ns")
    yield "key-float", with_weight(b"}G" + struct.pack(">d", float("nan")) + b"Ns")
    yield "key-tensor", with_weight(b"}" + view(loaded(legacy()), [4], [1]) + b"Ns")
    yield "set-list", with_weight(b"\x8f(]\x90")
    yield "odd-entries", with_weight(b"}(" + text("a") + b"u")
    yield "append-to-tuple", with_weight(b")Na")
    yield "cyclic-module", network(_modules=b"}q\0" + text("a") + module(_modules=b"h\0") + b"s")
    yield "cyclic-list", with_weight(b"]q\0h\0a")
    yield "shared-module", network(_modules=mapping(a=module() + b"q\0", b=b"h\0"))
    yield "module-dict-cycle", network(_modules=mapping(a=name(
        "torch.nn.modules.container", "ModuleDict") + b")\x81q\0" + mapping(
            _modules=mapping(a=b"h\0")) + b"b"))
    yield "module-dict-two-states", network(_modules=mapping(a=name(
        "torch.nn.modules.container", "ModuleDict") + b")\x81" + b"}b" * 2))
    yield "name-with-dot", network(_modules=mapping(**{"a.b": module()}))
    yield "name-of-number", network(_modules=b"}" + number(1) + module() + b"s")
    yield "name-too-long", network(_modules=mapping(**{"a" * 4000: module()}))
    yield "module-no-record", network(_modules=mapping(a=text("b")))
    yield "tables-no-dicts", network(_modules=b"]")
    yield "parameter-no-tensor", with_weight(
        call("torch._utils", "_rebuild_parameter", b"N", b"N", b"N"))
    yield "no-arguments", with_weight(name("torch.storage", "_load_from_bytes") + b")R")
    yield "other-class", whole(mapping(ema=module("VPPrecond")))
    yield "class-of-lists", whole(mapping(ema=call(*PERSISTENT, mapping(
        x=b"](]q\0" + b"](h\0h\0eq\0" * 100 + b"e", class_name=b"h\0", state=b"}"))))
    yield "no-ema", whole(mapping(G=module("EDMPrecond")))
    yield "not-a-dict", whole(b"]")
    yield "no-weights", network()
    yield "no-stop", network()[:-1]
    yield "stop-first", b"\x80\x04."
    yield "two-values", b"\x80\x04NN."
    yield "open-mark", b"\x80\x04(N."
    yield "trailing-data", network() + b"\0"
    yield "two-pickles", network() * 2
    yield "empty", b""
    yield "html", b"<!DOCTYPE html><html></html>"
    yield "zip", b"PK\3\4" + b"\0" * 1000
    yield "zeros", bytes(1 << 20)
    yield "unknown-opcode", with_weight(b"\xff")
    yield "bad-utf8", with_weight(b"X\2\0\0\0\xff\xfe")


def damaged(good):
    for tenth in range(10):
        yield f"truncated-{tenth}", good[:len(good) * tenth // 10]
    yield "truncated-by-one", good[:-1]


def hostile(run, good):
    """(name, bytes) of every hostile pickle; those with code in them try os.system(run)."""
    for kind in (code(run), bombs(), structures(), damaged(good)):
        yield from kind


# ------------------------------------------------------------------------------------------------


def read_within_limits(path, cache):
    """In a forked process, what load_network says of the file, and how long it took."""
    from weights import pretrained
    inlet, outlet = os.pipe()
    start = time.monotonic()
    if (child := os.fork()) == 0:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = now + MEMORY + path.stat().st_size
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process, on a busy machine too
        signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
        try:
            pretrained.load_network(path, cache)
            said = "loaded"
        except Exception as error:  # the kind of error is the result
            said = f"{type(error).__name__}: {error}"
        os.write(outlet, said[:4000].encode(errors="replace"))
        os._exit(0)
    os.close(outlet)
    with open(inlet, "rb") as pipe:
        said = pipe.read().decode()
    _, status, usage = os.wait4(child, 0)
    return {"name": path.stem, "said": said, "status": status, "mb": usage.ru_maxrss // 1024,
            "seconds": round(time.monotonic() - start, 3)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for file in sorted(Path(sys.argv[1]).glob("*.pkl")):
        print(json.dumps(read_within_limits(file, sys.argv[1])), flush=True)
