"""Integer arithmetic of 4-bit products (compute="int16", "int8") against float64.

With a = the largest |x| of 64 columns, L = 16383 or 127, C the codebook in integers times one step, u = 2^-24 and
e = 0.502 a / L, |err| <= sum absmax (|c| e + |c - C| (|x| + e) + n u |C| (|x| + e)); n = depth/128 + 10 in dot,
depth/64 + 5 in panels, and min(depth, 256) + depth/128 + 14 where the product is exact instead (test_linear_4bit.py).
"""

import copy
import pickle

import numpy as np
import pytest

from halfbyte import _C

LIMIT = {"int16": 16383, "int8": 127}
U = 2.0**-24


def rounded_codebook(values, limit):
    """The codebook in integers, as formats.h defines it: the largest becomes one of the 64 largest integers."""
    values = values.astype(np.float64)
    best = None
    for top in range(limit, limit - 64, -1):
        step = np.abs(values).max() / top
        error = np.sum((values - np.rint(values / step) * step) ** 2)
        if best is None or error < best[0]:
            best = error, np.rint(values / step) * np.float64(np.float32(step))
    return best[1]


class Weight:
    def __init__(self, rng, rows, depth, blocksize, quant_type, nested):
        values = rng.standard_normal((rows, depth)).astype(np.float32)
        self.params = _C.Params4bit.quantize(values, quant_type, blocksize, nested)
        self.exact = self.params.dequantize().astype(np.float64)
        codes = np.asarray(self.params.packed).reshape(-1)
        codes = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[: rows * depth].reshape(rows, depth)
        table = _C.codebook(quant_type).astype(np.float64)
        ones = _C.Params4bit.quantize(np.ones((1, 1), np.float32), quant_type, 32)
        assert ones.dequantize()[0, 0] == 1.0
        value = table[codes]
        # absmax of every element: from a weight that is not zero, else it does not matter
        n = rows * depth
        blocks = np.arange(n) // blocksize
        ratio = np.zeros(blocks[-1] + 1)
        nonzero = value.reshape(-1) != 0
        with np.errstate(divide="ignore", invalid="ignore"):
            np.maximum.at(
                ratio, blocks[nonzero], self.exact.reshape(-1)[nonzero] / value.reshape(-1)[nonzero]
            )
        self.absmax = ratio[blocks].reshape(rows, depth)
        self.codes, self.value, self.table = codes, value, table


def bound_of(w, x, compute):
    m, depth = x.shape
    limit = LIMIT[compute]
    padded = np.zeros((m, -(-depth // 64) * 64))
    padded[:, :depth] = np.abs(x)
    amax = padded.reshape(m, -1, 64).max(axis=2).repeat(64, axis=1)[:, :depth]
    e = 0.502 * np.maximum(amax / limit, 2.0**-112)
    most = np.abs(x) + e
    off = np.abs(w.table - rounded_codebook(w.table, limit))[w.codes]
    terms = (min(depth, 256) + depth / 64 + 14) * U
    magnitude = np.abs(w.value) + off
    return e @ (w.absmax * np.abs(w.value)).T + most @ (w.absmax * (off + terms * magnitude)).T


def cases():
    rng = np.random.default_rng(7)
    for seed in range(60):
        depth = int(rng.integers(1, 200)) if seed % 4 == 0 else 32 * int(rng.integers(1, 20))
        m = int(rng.integers(1, 80)) if seed % 3 == 0 else int(rng.integers(1, 9))
        yield seed, m, int(rng.integers(1, 200)), depth, 32 << int(rng.integers(0, 4))


@pytest.mark.parametrize("compute", ["int16", "int8"])
@pytest.mark.parametrize(("seed", "m", "rows", "depth", "blocksize"), list(cases()))
def test_against_float64(seed, m, rows, depth, blocksize, compute):
    rng = np.random.default_rng(seed)
    w = Weight(rng, rows, depth, blocksize, ("nf4", "fp4")[seed % 2], seed % 3 == 1)
    x = rng.standard_normal((m, depth)).astype(np.float32)
    if seed % 2:
        x[:, rng.integers(0, depth, 3)] *= 100  # outlier columns, as activations have
    layer = _C.Linear4bit(w.params, None, compute)
    results = []
    before = _C.get_num_threads()
    try:
        for threads in (1, 2, 3):
            _C.set_num_threads(threads)
            results.append(np.asarray(layer(x)).tobytes())
    finally:
        _C.set_num_threads(before)
    assert len(set(results)) == 1, "the result depends on the number of threads"
    got = np.frombuffer(results[0], np.float32).reshape(m, rows).astype(np.float64)
    error = np.abs(got - x.astype(np.float64) @ w.exact.T)
    bound = bound_of(w, x.astype(np.float64), compute) * (1 + 1e-6) + 1e-30  # absmax was found by a division
    assert np.all(error <= bound), f"{np.max(error / bound)} times the bound"


@pytest.mark.parametrize(("compute", "most"), [("int16", 7e-5), ("int8", 1e-2)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_it_is_integer_arithmetic(compute, most, quant_type):
    """As inexact as it may be for normal numbers, and not exact: the integer kernels ran."""
    rng = np.random.default_rng(3)
    w = Weight(rng, 256, 4096, 64, quant_type, False)
    x = rng.standard_normal((1, 4096)).astype(np.float32)
    y = x.astype(np.float64) @ w.exact.T
    error = np.linalg.norm(np.asarray(_C.Linear4bit(w.params, None, compute)(x)) - y) / np.linalg.norm(y)
    assert most / 20 < error < most


@pytest.mark.parametrize("compute", ["int16", "int8"])
@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(compute, m, bad):
    rng = np.random.default_rng(4)
    w = Weight(rng, 70, 256, 64, "nf4", False)
    x = rng.standard_normal((m, 256)).astype(np.float32)
    x[m // 2, 77] = bad
    y = np.asarray(_C.Linear4bit(w.params, None, compute)(x))
    nonzero = w.value[:, 77] != 0
    assert not np.isfinite(y[m // 2, nonzero]).any()
    assert np.isfinite(np.delete(y, m // 2, axis=0)).all()


@pytest.mark.parametrize("compute", ["int16", "int8"])
def test_gradient_is_exact(compute):
    rng = np.random.default_rng(5)
    w = Weight(rng, 96, 128, 64, "nf4", False)
    dy = rng.standard_normal((5, 96)).astype(np.float32)
    exact = _C.Linear4bit(w.params).grad_input(dy)
    assert np.array_equal(_C.Linear4bit(w.params, None, compute).grad_input(dy), exact)


def test_layers_keep_it():
    w = Weight(np.random.default_rng(6), 4, 64, 64, "nf4", False)
    layer = _C.Linear4bit(w.params, None, compute="int8")
    for other in (layer, copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.compute == "int8" and "int8" in repr(other)
    with pytest.raises(ValueError, match="compute"):
        _C.Linear4bit(w.params, None, compute="int4")


def test_torch_layer():
    torch = pytest.importorskip("torch")
    import halfbyte.torch.functional as functional
    from halfbyte.torch.nn import Linear4bit, LinearNF4

    torch.manual_seed(0)
    layer = LinearNF4(256, 96, bias=True, compute_dtype=torch.float32, arithmetic="int8")
    plain = LinearNF4(256, 96, bias=True, compute_dtype=torch.float32)
    plain.load_state_dict(layer.state_dict())
    layer, plain = layer.to("cpu"), plain.to("cpu")
    x = torch.randn(3, 256, requires_grad=True)
    y, want = layer(x), plain(x)
    assert 1e-3 < (y - want).norm() / want.norm() < 2e-2
    grad = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(grad, torch.autograd.grad(plain(x).sum(), x)[0])
    with torch.no_grad():
        assert torch.equal(layer(x), y)
        state, weight = layer.weight.quant_state, layer.weight
        assert torch.equal(functional.linear_4bit(x, weight, state, layer.bias, "int8"), y)
    assert copy.deepcopy(layer).arithmetic == "int8" and plain.arithmetic is None
    with pytest.raises(ValueError, match="arithmetic"):
        Linear4bit(8, 8, arithmetic="int4")


@pytest.mark.parametrize("compute", ["int16", "int8"])
@pytest.mark.parametrize("rows", [1, 40])
def test_sums_of_nothing(compute, rows):
    """A depth of 0 has no columns to quantize: the bias, or zeros."""
    weight = np.zeros(0, np.uint8), np.zeros(0, np.float32), "nf4", 64, (3, 0)
    x, bias = np.ones((rows, 0), np.float32), np.arange(3, dtype=np.float32)
    assert not _C.linear_4bit(x, *weight, None, compute).any()
    assert (_C.linear_4bit(x, *weight, bias, compute) == bias).all()
