"""What all types of the module have in common (csrc/python/object.c, module.c): final, immutable, collectable,
weakly referable, copyable, callable without a tuple; and how the module itself is made."""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib
import subprocess
import sys
import weakref

import numpy as np
import pytest

from halfbyte import _C

RNG = np.random.default_rng(41)
W = RNG.standard_normal((8, 64)).astype(np.float32)
B = RNG.standard_normal(8).astype(np.float32)
MAKE = {
    _C.Params4bit: lambda: _C.Params4bit.quantize(W, double_quant=True),
    _C.Linear4bit: lambda: _C.Linear4bit.from_float(W, B.copy()),
    _C.Int8Params: lambda: _C.Int8Params.quantize(W),
    _C.Linear8bit: lambda: _C.Linear8bit.from_float(W, B.copy(), 2.0),
    _C.Params8bit: lambda: _C.Params8bit.quantize(W),
}
PARAMS = (_C.Params4bit, _C.Int8Params, _C.Params8bit)
LAYERS = (_C.Linear4bit, _C.Linear8bit)
# From Include/object.h, the same in every version that has them.
IMMUTABLE, DISALLOW_INSTANTIATION, HEAP, BASE, VECTORCALL, GC = (
    1 << 8,
    1 << 7,
    1 << 9,
    1 << 10,
    1 << 11,
    1 << 14,
)

each = pytest.mark.parametrize("kind", MAKE, ids=lambda k: k.__name__)


def test_these_are_all_types():
    found = {t for t in vars(_C).values() if isinstance(t, type) and not issubclass(t, Exception)}
    assert found == set(MAKE)


@each
def test_flags(kind):
    assert kind.__flags__ & (IMMUTABLE | HEAP | GC) == IMMUTABLE | HEAP | GC
    assert not kind.__flags__ & BASE
    assert bool(kind.__flags__ & VECTORCALL) == (kind in LAYERS)
    assert bool(kind.__flags__ & DISALLOW_INSTANTIATION) == (kind in PARAMS)
    assert kind.__module__ == "halfbyte._C" and getattr(_C, kind.__name__) is kind
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Sub", (kind,), {})
    with pytest.raises(TypeError, match="immutable type"):
        kind.extra = 1
    with pytest.raises(TypeError):
        kind()


@each
def test_objects_never_change(kind):
    thing = MAKE[kind]()
    names = [n for n in dir(thing) if n[0] != "_"]
    assert names
    for name in [*names, "extra", "__dict__", "__class__"]:
        with pytest.raises((AttributeError, TypeError)):
            setattr(thing, name, None)
        with pytest.raises((AttributeError, TypeError)):
            delattr(thing, name)
    assert not hasattr(thing, "__dict__") and not hasattr(thing, "__setstate__")
    for name in names:
        part = getattr(thing, name)
        if isinstance(part, np.ndarray):
            assert not part.flags.writeable, name
            with pytest.raises(ValueError, match="WRITEABLE"):
                part.flags.writeable = True


@each
def test_collected_when_only_a_cycle_holds_it(kind):
    """The cycle goes through the memory that the object views."""

    class Holder(np.ndarray):
        pass

    thing = MAKE[kind]()
    if kind in PARAMS:
        parts = {k: v.view(Holder) if isinstance(v, np.ndarray) else v for k, v in thing.parts().items()}
        holders = [v for v in parts.values() if isinstance(v, Holder)]
        thing = kind.from_parts(**parts)
        del parts
    else:
        holders = [thing.bias.view(Holder)]
        thing = kind(thing.weight, holders[0])
    assert gc.is_tracked(thing) and holders
    for holder in holders:
        holder.thing = thing
    assert any(referent is kind for referent in gc.get_referents(thing))  # an instance keeps its heap type
    alive = weakref.ref(thing)
    del thing, holder, holders
    gc.collect()
    assert alive() is None


@each
def test_weak_references_are_told(kind):
    thing = MAKE[kind]()
    told = []
    alive = weakref.ref(thing, told.append)
    assert alive() is thing
    del thing
    assert alive() is None and told == [alive]


def arrays(thing) -> dict[str, np.ndarray]:
    if isinstance(thing, PARAMS):
        return {k: v for k, v in thing.parts().items() if isinstance(v, np.ndarray)}
    return {"bias": thing.bias, **arrays(thing.weight)}


@each
def test_copies(kind):
    thing = MAKE[kind]()
    assert copy.copy(thing) is thing
    deep = copy.deepcopy([thing])[0]
    assert type(deep) is kind and deep is not thing and repr(deep) == repr(thing)
    here, there = arrays(thing), arrays(deep)
    assert list(here) == list(there)
    for name in here:
        np.testing.assert_array_equal(here[name], there[name])
        if name != "nested_map" and name != "map":  # a named map is a constant of the module
            assert here[name].ctypes.data != there[name].ctypes.data, name


@each
def test_html(kind):
    text = MAKE[kind]()._repr_html_()
    assert text.startswith("<table>") and text.endswith("</table>") and kind.__name__ in text
    assert "<script" not in text and "http" not in text
    assert text.count("<tr>") == text.count("</tr>") > 3


@pytest.mark.parametrize("kind", LAYERS)
def test_calls_take_one_or_two_arguments(kind):
    layer = MAKE[kind]()
    x, out = W[:2], np.empty((2, 8), np.float32)
    want = layer(x)
    for y in (layer(x, out), layer(x, out=out), layer.__call__(x, out=out)):
        assert y is out
        np.testing.assert_array_equal(y, want)
    name = kind.__name__
    for args, kwargs, words in [
        ((), {}, f"{name}: x, expected an argument, got none"),
        ((x, out, 1), {}, f"{name}: positional arguments, expected at most 2, got 3"),
        ((x, out), {"out": out}, f"{name}: out, expected once"),
        ((), {"x": x}, f"{name}: got an unexpected keyword argument 'x'"),
    ]:
        with pytest.raises(TypeError, match=words):
            layer(*args, **kwargs)


# ---- the module ------------------------------------------------------------------------------------------


class Slot(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int), ("value", ctypes.c_void_p))


class Definition(ctypes.Structure):
    """PyModuleDef of an interpreter with a GIL."""

    _fields_ = (
        ("base", ctypes.c_ssize_t * 5), ("name", ctypes.c_char_p), ("doc", ctypes.c_char_p),
        ("size", ctypes.c_ssize_t), ("methods", ctypes.c_void_p), ("slots", ctypes.POINTER(Slot)),
        ("traverse", ctypes.c_void_p), ("clear", ctypes.c_void_p), ("free", ctypes.c_void_p),
    )  # fmt: skip


@pytest.mark.skipif(hasattr(sys, "_is_gil_enabled") and not sys._is_gil_enabled(), reason="another layout")
def test_definition():
    """Multi-phase init; state that the collector sees; no GIL needed; sub-interpreters refused, as NumPy does."""
    init = ctypes.PyDLL(_C.__file__).PyInit__C
    init.restype = ctypes.POINTER(Definition)
    definition = init().contents
    assert definition.name == b"halfbyte._C" and definition.size > 0
    assert definition.traverse and definition.clear and definition.free
    slots = {}
    for slot in definition.slots[:8]:
        if slot.number == 0:
            break
        slots[slot.number] = slot.value or 0
    create, execute, interpreters, gil = 1, 2, 3, 4
    assert create not in slots and slots.pop(execute)
    want = {interpreters: 0} if sys.version_info >= (3, 12) else {}
    assert slots == (want | {gil: 1} if sys.version_info >= (3, 13) else want)


def test_free_threading_stays_on():
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.skip("this interpreter has a GIL")
    subprocess.run([sys.executable, "-W", "error", "-c", "import halfbyte._C, sys; assert not sys._is_gil_enabled()"],
                   check=True)  # fmt: skip


def test_sub_interpreters_are_refused_or_work():
    """From 3.12 on Python refuses for us; before, NumPy allows one interpreter a process. Never a crash."""
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            interpreters = importlib.import_module(name)
            break
        except ImportError:
            continue
    else:
        pytest.skip("this Python has no sub-interpreters to play with")
    inside = f"""
import sys
sys.path = {sys.path!r}
try:
    import halfbyte._C, numpy
    sys.modules["halfbyte._C"].Params4bit.quantize(numpy.ones(64, "f4")).dequantize()
    print("works")
except ImportError as error:
    print("refused:", str(error).splitlines()[0])
"""
    code = f"""
import sys
sys.path = {sys.path!r}
import halfbyte._C, {interpreters.__name__} as interpreters
run = getattr(interpreters, "exec", None) or interpreters.run_string
one = interpreters.create()
run(one, {inside!r})
interpreters.destroy(one)
import numpy
halfbyte._C.quantize_4bit(numpy.ones(64, "f4"))
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert last == "fine" and (first == "works" or first.startswith("refused:"))
    if sys.version_info >= (3, 12):
        assert first == "refused: module halfbyte._C does not support loading in subinterpreters"
