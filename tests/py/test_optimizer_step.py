"""`_C.optimizer_step` against NumPy: the same float32 operations in the same order, so equal to the bit."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from halfbyte import _C

OPTIMIZERS = ("adam", "ademamix", "momentum", "lion", "rmsprop", "adagrad")
SETTINGS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "beta3": 0.9999, "alpha": 5.0, "eps": 1e-8}
MAPS = {"map1": _C.map8("dynamic"), "map2": _C.map8("dynamic_unsigned")}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
f32 = np.float32


def reference(
    name, p, g, m, slow, v, step, *, lr, beta1, beta2, beta3, alpha, eps, weight_decay=0.0, scale=1.0
):
    """One step in float32; returns the new (p, m, slow, v)."""
    b1, r1, b2, r2 = f32(beta1), f32(1 - beta1), f32(beta2), f32(1 - beta2)
    corr1, corr2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
    i1, i2, e, rate, s = f32(1 / corr1), f32(1 / corr2), f32(eps), f32(lr), f32(scale)
    keep = f32(1 - lr * weight_decay)
    if name in ("momentum", "rmsprop", "adagrad"):
        g = g + f32(weight_decay) * p
    if name == "adam":
        m, v = b1 * m + r1 * g, b2 * v + r2 * (g * g)
        p = keep * p - (f32(lr / corr1) * s) * (m / (np.sqrt(v) * i2 + e))
    elif name == "ademamix":
        m, slow, v = b1 * m + r1 * g, f32(beta3) * slow + f32(1 - beta3) * g, b2 * v + r2 * (g * g)
        p = keep * p - rate * ((m * i1 + f32(alpha) * slow) / (np.sqrt(v) * i2 + e))
    elif name == "momentum":
        m = (f32(0) if step == 1 else b1) * m + g
        p = p - (rate * s) * m
    elif name == "lion":
        p = keep * p - (rate * s) * np.sign(b1 * m + r1 * g)
        m = b2 * m + r2 * g
    elif name == "rmsprop":
        m = b1 * m + r1 * (g * g)
        p = p - (rate * s) * (g / (np.sqrt(m) + e))
    else:
        m = m + g * g
        p = p - rate * (g / (np.sqrt(m) + e))
    return p, m, slow, v


def encode(x, name):
    """8-bit codes of x by the definition, with the sign rule of the first state."""
    map8 = MAPS[name]
    codes, absmax = _C.quantize_8bit(x, map8, 256)
    if name == "map1":
        zero = int((map8 < 0).sum())
        codes = codes + ((x > 0) & (codes < zero)) - ((x < 0) & (codes >= zero))
    return codes.astype(np.uint8), absmax


def decode(codes, absmax, name):
    return _C.dequantize_8bit(codes, absmax, MAPS[name], 256)


def rows(name):
    return 2 if name == "ademamix" else 1


def second(name):
    return name in ("adam", "ademamix")


def entry(name, p, g, step, bits, state=None):
    """A tensor tuple with fresh states (or those of `state`)."""
    n, blocks = p.size, -(-p.size // 256)
    dtype = np.float32 if bits == 32 else np.uint8
    state1, state2 = np.zeros(rows(name) * n, dtype), np.zeros(n, dtype) if second(name) else None
    absmax1 = absmax2 = None
    if bits == 8:
        absmax1 = np.zeros(rows(name) * blocks, np.float32)
        absmax2 = np.zeros(blocks, np.float32) if second(name) else None
    return (p, g, state1, state2, absmax1, absmax2, None, step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_states_follow_the_definition_to_the_bit(name, weight_decay, dtype):
    rng = np.random.default_rng(0)
    n = 5000
    p = rng.standard_normal(n).astype(np.float32).astype(DTYPES[dtype])
    t = list(entry(name, p, None, 0, 32))
    want_p = p.copy()
    m, slow, v = (np.zeros(n, np.float32) for _ in range(3))
    for step in range(1, 5):
        t[1] = (rng.standard_normal(n) * 0.01).astype(np.float32).astype(DTYPES[dtype])
        t[7] = step
        _C.optimizer_step(name, [tuple(t)], **SETTINGS, weight_decay=weight_decay)
        new, m, slow, v = reference(
            name,
            want_p.astype(np.float32),
            t[1].astype(np.float32),
            m,
            slow,
            v,
            step,
            **SETTINGS,
            weight_decay=weight_decay,
        )
        want_p = new.astype(DTYPES[dtype])
        assert np.array_equal(t[0].view(np.uint8), want_p.view(np.uint8))
        assert np.array_equal(t[2][:n], m)
        if name == "ademamix":
            assert np.array_equal(t[2][n:], slow)
        if second(name):
            assert np.array_equal(t[3], v)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_8bit_states_follow_the_definition_to_the_bit(name, n):
    rng = np.random.default_rng(n)
    blocks = -(-n // 256)
    p = rng.standard_normal(n).astype(np.float32)
    want_p = p.copy()
    t = list(entry(name, p, None, 0, 8))
    for step in range(1, 5):
        t[1] = (rng.standard_normal(n) * 0.01).astype(np.float32)
        t[7] = step
        m = decode(t[2][:n], t[4][:blocks], "map1")
        slow = decode(t[2][n:], t[4][blocks:], "map1") if rows(name) == 2 else None
        v = decode(t[3], t[5], "map2") if second(name) else None
        want_p, m, slow, v = reference(name, want_p, t[1], m, slow, v, step, **SETTINGS)
        _C.optimizer_step(name, [tuple(t)], **SETTINGS, **MAPS)
        assert np.array_equal(t[0], want_p)
        codes, absmax = encode(m, "map1")
        assert np.array_equal(t[2][:n], codes) and np.array_equal(t[4][:blocks], absmax)
        if slow is not None:
            codes, absmax = encode(slow, "map1")
            assert np.array_equal(t[2][n:], codes) and np.array_equal(t[4][blocks:], absmax)
        if v is not None:
            codes, absmax = encode(v, "map2")
            assert np.array_equal(t[3], codes) and np.array_equal(t[5], absmax)


@pytest.mark.parametrize(("name", "limit"), [("adam", 1e-3), ("momentum", 1e-4), ("adam", 1e3)])
def test_max_unorm_limits_the_update(name, limit):
    rng = np.random.default_rng(3)
    n = 10_000
    p, g = rng.standard_normal(n).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    before = p.copy()
    unorm = np.zeros(1, np.float32)
    t = (*entry(name, p, g, 1, 32)[:6], unorm, 1)
    _C.optimizer_step(name, [t], **SETTINGS, max_unorm=limit)
    free = reference(name, before, g, *(np.zeros(n, np.float32) for _ in range(3)), 1, **SETTINGS)[0]
    update = (before.astype(np.float64) - free) / SETTINGS["lr"]
    norm = np.sqrt((update**2).sum())
    assert math.sqrt(float(unorm[0])) == pytest.approx(norm, rel=1e-3)
    scale = min(1.0, limit * np.sqrt((before.astype(np.float64) ** 2).sum()) / norm)
    assert np.allclose(before - p, SETTINGS["lr"] * scale * update, rtol=1e-3, atol=2e-7)


def test_a_list_is_stepped_as_its_tensors_alone():
    rng = np.random.default_rng(4)
    sizes = [0, 1, 300, 2048, 2049, 20_000]
    one, many = [], []
    for i, n in enumerate(sizes):
        p, g = rng.standard_normal(n).astype(np.float32), rng.standard_normal(n).astype(np.float32)
        bits = 8 if i % 2 else 32
        one.append(entry("adam", p.copy(), g, i + 1, bits))
        many.append(entry("adam", p.copy(), g, i + 1, bits))
    for t in one:
        _C.optimizer_step("adam", [t], **SETTINGS, **MAPS)
    _C.optimizer_step("adam", many, **SETTINGS, **MAPS)
    for a, b in itertools.chain.from_iterable(zip(s, t, strict=True) for s, t in zip(one, many, strict=True)):
        assert np.array_equal(a, b)


def test_the_result_does_not_depend_on_the_threads():
    rng = np.random.default_rng(5)
    p, g = rng.standard_normal(200_003).astype(np.float32), rng.standard_normal(200_003).astype(np.float32)
    results = []
    threads = _C.get_num_threads()
    try:
        for n in (1, 2, 3, 4):
            _C.set_num_threads(n)
            t = (*entry("adam", p.copy(), g, 1, 8)[:6], np.zeros(1, np.float32), 1)
            _C.optimizer_step("adam", [t], **SETTINGS, **MAPS, max_unorm=0.01)
            results.append(b"".join(np.asarray(a).tobytes() for a in t[:7]))
    finally:
        _C.set_num_threads(threads)
    assert len(set(results)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_spoils_nothing_in_8_bits(bad):
    rng = np.random.default_rng(6)
    p, g = rng.standard_normal(600).astype(np.float32), rng.standard_normal(600).astype(np.float32)
    before = p.copy()
    g[100] = bad
    t = entry("adam", p, g, 1, 8)
    _C.optimizer_step("adam", [t], **SETTINGS, **MAPS)
    assert p[100] == before[100]
    assert np.isfinite(p).all() and (np.delete(p, 100) != np.delete(before, 100)).all()
    assert abs(decode(t[2], t[4], "map1")[100]) <= 1e-6 * t[4][0]
    assert decode(t[3], t[5], "map2")[100] == 0


@pytest.mark.parametrize("bits", [8, 32])
def test_skip_zeros_leaves_elements_without_gradient(bits):
    p, g = np.ones(600, np.float32), np.ones(600, np.float32)
    g[::3] = 0
    _C.optimizer_step(
        "adam", [entry("adam", p, g, 1, bits)], **SETTINGS, **MAPS, weight_decay=0.5, skip_zeros=True
    )
    assert (p[::3] == 1).all() and (np.delete(p, np.s_[::3]) != 1).all()


def test_bad_arguments_name_the_argument():
    p, g = np.zeros(8, np.float32), np.zeros(8, np.float32)
    good = entry("adam", p, g, 1, 32)
    cases = [
        ("adamax", good, "optimizer"),
        ("adam", good[:3], "tuple"),
        ("adam", (p, g[:4], *good[2:]), "g"),
        ("adam", (p.astype(np.float64), *good[1:]), "p"),
        ("adam", (*good[:3], None, *good[4:]), "state2"),
        ("adam", (*good[:7], 0), "step"),
        (
            "adam",
            (p[::2], g[::2], np.zeros(4, np.float32), np.zeros(4, np.float32), None, None, None, 1),
            "p",
        ),
        ("adam", (*good[:3], np.zeros(8, np.uint8), *good[4:]), "state2"),
        ("adam", entry("adam", p, g, 1, 8), "map1"),
    ]
    for name, t, word in cases:
        with pytest.raises((TypeError, ValueError, BufferError), match=f"optimizer_step.*{word}"):
            _C.optimizer_step(name, [t], **SETTINGS)
    readonly = p.copy()
    readonly.flags.writeable = False
    with pytest.raises(BufferError, match=r"optimizer_step.*p"):
        _C.optimizer_step("adam", [(readonly, *good[1:])], **SETTINGS)
    with pytest.raises(ValueError, match="max_unorm"):
        _C.optimizer_step("lion", [entry("lion", p, g, 1, 32)], **SETTINGS, max_unorm=1.0)
    assert (p == 0).all()
