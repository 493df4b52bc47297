"""The CUDA products with 4-bit weights on the emulator, against float64."""

import ctypes
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
import pytest
from host_library import DTYPES, FORMATS, Linear4, Queue, Scales4, emulated
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import _C

NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # unit roundoff
AUTO, SIMT, MMA, TILE = range(4)
LARGE, SMALL, OLD = range(3)  # devices of the emulator


def aligned(shape, dtype, at=0):
    """Memory of its own that begins `at` bytes behind a multiple of 256."""
    n = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.full(n + 512, 0xA5, np.uint8)
    start = -raw.ctypes.data % 256 + at
    return raw[start : start + n].view(dtype).reshape(shape)


@dataclass
class Case:
    """One product. experts: rows of x for each, and what is left of m for nobody."""

    m: int = 1
    rows: int = 16
    depth: int = 64
    dtype: str = "bfloat16"
    quant_type: str = "nf4"
    blocksize: int = 64
    path: int = AUTO
    nested: int = 0  # block size of the scales
    bias: str | None = None
    transposed: bool = False
    experts: list[int] | None = None
    offsets_dtype: str = "int32"
    order: int = 0
    device: int = LARGE
    at: int = 0  # bytes by which x and codes miss their alignment
    offsets: list[int] | None = None  # instead of those of `experts`
    spoil: bool = False  # a NaN in x and one in the scales, and no comparison
    without_workspace: bool = False
    workspace: int = field(default=0, compare=False)  # bytes that the last run asked for

    def tensor_cores(self) -> bool:
        """Whether codebook entries (transposed: weights) are rounded to dtype."""
        fits = self.dtype != "float32" and self.depth % 32 == 0 and self.device != OLD and self.at % 16 == 0
        if self.transposed:
            fits = fits and self.rows % 8 == 0
        return fits and self.path != SIMT

    def run(self) -> np.ndarray:
        """Runs the kernel, holds every element to its bound; returns y as bytes."""
        m, rows, depth, experts = self.m, self.rows, self.depth, len(self.experts or [0])
        outputs, steps = (depth, rows) if self.transposed else (rows, depth)
        half = NUMPY[self.dtype]
        rng = np.random.default_rng(m * 1000003 + rows * 1009 + depth)
        n = experts * rows * depth
        w = (rng.standard_normal(n) * np.exp2(rng.integers(-3, 3, n // 64 + 1)).repeat(64)[:n]).astype(
            np.float32
        )
        packed_, absmax = map(np.asarray, _C.quantize_4bit(w, self.quant_type, self.blocksize))
        x, y = aligned((m, steps), half, self.at), aligned((m, outputs), half)
        packed = aligned(packed_.shape, "u1", self.at)
        x[:] = rng.standard_normal((m, steps)).astype(half)
        if self.spoil:
            x[2, 3] = np.nan
            absmax = absmax.copy()
            absmax[(7 * depth + 32) // self.blocksize] = np.nan
        packed[:] = packed_

        emulator = emulated()
        emulator.reset(self.order, seed=rows)
        scales = Scales4(nested_blocksize=self.nested or 1)
        keep = []
        if self.nested:
            codes, nested_absmax, mean = _C.nest_absmax(absmax, self.nested)
            codes, nested_absmax = np.asarray(codes), np.asarray(nested_absmax)
            table = np.asarray(_C.map8("dynamic"), np.float32)
            outer = np.repeat(nested_absmax, self.nested)[: codes.size]
            absmax = (table[codes] * outer + np.float32(mean)).astype(np.float32)
            scales.absmax_codes, scales.nested_absmax = map(emulator.register, (codes, nested_absmax))
            scales.nested_map, scales.nested_offset_value = emulator.register(table), mean
            keep += [codes, nested_absmax, table]
        else:
            scales.absmax = emulator.register(absmax)
        args = Linear4(x=emulator.register(x), packed=emulator.register(packed), scales=scales,
                       y=emulator.register(y, True), io_dtype=DTYPES[self.dtype], path=self.path,
                       format=FORMATS[self.quant_type], transposed=self.transposed,
                       blocksize=self.blocksize, m=m, rows=rows, depth=depth)  # fmt: skip
        owner = np.zeros(m, np.int64)
        if self.experts is not None:
            ends = np.cumsum(self.experts).astype(self.offsets_dtype)
            owner = np.searchsorted(ends, np.arange(m), "right")
            if self.offsets is not None:
                ends = np.array(self.offsets, self.offsets_dtype)
            args.offsets, args.experts = emulator.register(ends), experts
            args.offsets_dtype = {"int32": 6, "int64": 7}[self.offsets_dtype]
        if self.bias is not None:
            b = rng.standard_normal((experts, rows)).astype(NUMPY[self.bias])
            args.bias, args.bias_dtype = emulator.register(b), DTYPES[self.bias]
        size = emulator.api.linear4_workspace(ctypes.byref(Queue(self.device, None)), ctypes.byref(args))
        self.workspace, workspace = size, aligned((size,), np.uint8)
        if size and not self.without_workspace:
            args.workspace = emulator.register(workspace, True)
        emulator.run("linear4", args, self.device)

        if self.spoil:
            return y.view(np.uint8)
        # Reference: codebook or weights as the kernel has them, all else exact.
        book = np.asarray(_C.codebook(self.quant_type))
        rounded = self.tensor_cores() and self.path != AUTO
        if rounded and not self.transposed:
            book = book.astype(half)
        codes = np.stack([packed >> 4, packed & 15], 1).ravel()[:n]
        scale = np.repeat(absmax, self.blocksize)[:n]
        if rounded and self.transposed:
            weight = (book[codes] * scale).astype(half).astype(np.float64)
        else:
            weight = book.astype(np.float64)[codes] * scale.astype(np.float64)
        weight = weight.reshape(experts, rows, depth)
        if not self.transposed:
            weight = weight.transpose(0, 2, 1)
        weight = np.concatenate([weight, np.zeros((1, steps, outputs))])
        wide = x.astype(np.float64)
        expected, magnitude = np.zeros((m, outputs)), np.zeros((m, outputs))
        for e in range(experts + 1):
            mine = owner == e
            expected[mine] = wide[mine] @ weight[e]
            magnitude[mine] = np.abs(wide[mine]) @ np.abs(weight[e])
        if self.bias is not None:
            b = np.concatenate([b.astype(np.float64), np.zeros((1, rows))])
            expected += b[owner]
            magnitude += np.abs(b[owner])
        # Every product is rounded at most four times (weight, product, scale, and the sum it goes into first);
        # the path of a sum to y is at most steps / 32 + 40 additions long (16 k at once in an mma, or 32 lanes).
        # Then one rounding of y itself to its dtype.
        bound = magnitude * (steps / 16 + 44) * 2.0**-24 + np.abs(expected) * UNIT[self.dtype] * 1.01
        if self.path == AUTO:  # one rounding of codebook entries or weights, or none
            bound += magnitude * UNIT[self.dtype]
        error = np.abs(y.astype(np.float64) - expected)
        assert (error <= bound).all(), (error - bound).max()
        del keep
        return y.view(np.uint8)


PATHS = {"simt": SIMT, "mma": MMA, "tile": TILE}
ROWS_OF_X = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 65, 70]


@pytest.mark.parametrize("m", ROWS_OF_X)
@pytest.mark.parametrize("path", PATHS)
def test_rows_of_x(path, m):
    """Every number of rows: whole and partly filled tiles, in turn in both dtypes and all orders."""
    dtype = ["bfloat16", "float16"][m % 2]
    rows = 37 if path == "simt" else 133
    Case(m, rows, 192, dtype, path=PATHS[path], nested=256 * (m % 2), bias="float32", order=m % 3).run()


@pytest.mark.parametrize("m", [0, 1, 8, 9, 16, 17, 33, 64, 70])
@pytest.mark.parametrize("path", ["simt", "tile"])
def test_rows_of_x_transposed(path, m):
    dtype = ["bfloat16", "float16"][m % 2]
    depth = 72 if path == "simt" else 160
    Case(m, 136, depth, dtype, path=PATHS[path], nested=256 * (m % 2), transposed=True, order=m % 3).run()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("device", [LARGE, OLD])
@pytest.mark.parametrize("depth", [1, 7, 8, 131, 264])
def test_float32(depth, device, order, transposed):
    for m in (1, 8, 11):
        bias = None if transposed else "float16"
        Case(m, 35, depth, "float32", "fp4", 32, SIMT, 256 * (m % 2), bias, transposed,
             order=order, device=device).run()  # fmt: skip


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("path", PATHS)
def test_block_sizes(path, blocksize):
    """Blocks within a row, of many rows, and that straddle rows."""
    for depth in (32, 96, 128, 320):
        case = Case(3, 20, depth, "bfloat16", "fp4", blocksize, PATHS[path], nested=2 * (depth % 64))
        case.run()
        if path != "mma":
            replace(case, rows=24, transposed=True, order=1).run()


@pytest.mark.parametrize("nested", [1, 2, 100, 4096])
def test_nested_block_sizes(nested):
    for path in (SIMT, MMA, TILE):
        if path != MMA or nested != 100:
            Case(2, 18, 192, "float16", path=path, nested=nested, order=2).run()


SPLIT = [  # deep products with few outputs, which several blocks of the large device share
    Case(2, 20, 64 * 192 + 32, path=MMA, nested=256),
    Case(2, 20, 64 * 192, "float16", path=MMA),
    Case(12, 40, 128 * 9, path=TILE),
    Case(20, 40, 128 * 13 + 32, "float16", "fp4", 32, TILE, nested=256),
    Case(40, 128 * 9 + 8, 64, path=TILE, transposed=True),
    Case(2, 20, 2048 * 3 + 8, "float32", path=SIMT),
    Case(2, 256 * 3 + 8, 40, "float32", path=SIMT, transposed=True),
    Case(9, 256 * 3 + 9, 11, "float32", path=SIMT, transposed=True, experts=[4, 3]),
    Case(12, 40, 128 * 9, path=TILE, experts=[4, 0, 7]),
    Case(12, 20, 64 * 130, path=MMA, experts=[9, 2], nested=256),
]


@pytest.mark.parametrize("case", SPLIT, ids=range(len(SPLIT)))
def test_split_depth(case):
    if not case.transposed:
        case = replace(case, bias="bfloat16")
    shared, alone = case.run(), replace(case, without_workspace=True).run()
    assert case.workspace > 0
    assert np.array_equal(shared, replace(case, order=1).run())
    assert np.array_equal(alone, replace(case, order=2, device=SMALL, without_workspace=True).run())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("path", [SIMT, TILE, MMA])
def test_same_bits_in_every_order(path, transposed):
    if path == MMA and transposed:
        return
    case = Case(19, 136, 192, path=path, nested=256, transposed=transposed, experts=[10, 1, 7])
    first = case.run()
    assert all(np.array_equal(first, replace(case, order=order).run()) for order in (0, 1, 2))


def test_blocks_that_stay():
    """More tiles than the small device holds blocks: a block goes on from tile to tile."""
    for order in range(3):
        for m, depth in ((3, 64 * 9), (19, 64 * 33 + 32), (8, 32)):
            Case(m, 16 * 11 + 3, depth, path=MMA, nested=256, bias="float32", device=SMALL, order=order).run()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_experts(path, transposed):
    """Experts without rows, more than a warp looks at in one round, rows of nobody, weights that begin anywhere."""
    if path == "mma" and transposed:
        return
    many = [0] * 30 + [9, 0, 1] + [0] * 20 + [8] + [0] * 12 + [13, 1]
    for experts, left, offsets_dtype in [
        ([5], 0, "int32"),
        ([5], 3, "int64"),
        ([0, 0, 0], 4, "int32"),
        ([20, 0, 18, 1], 2, "int64"),
        (many, 1, "int32"),
    ]:
        m, depth = sum(experts) + left, 32 if len(experts) > 9 else 96
        bias = None if transposed else "float32"
        Case(m, 24, depth, "bfloat16", "nf4", 64, PATHS[path], 256, bias, transposed, experts, offsets_dtype,
             order=m % 3).run()  # fmt: skip
    if path == "simt":  # every second expert begins in the middle of a byte
        Case(9, 5, 11, "float32", path=SIMT, transposed=transposed, experts=[2, 3, 4]).run()


@pytest.mark.parametrize("path", PATHS)
def test_offsets_that_do_not_ascend(path):
    """As if they did: never less than the one before, never outside 0 .. m."""
    case = Case(12, 24, 64, path=PATHS[path], experts=[4, 0, 3, 5, 0])
    good = case.run()
    assert np.array_equal(good, replace(case, offsets=[4, -7, 7, 99, 3]).run())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("path", [SIMT, MMA, TILE])
def test_nan_stays_where_it_is(path, transposed):
    """A scale that is not finite spoils the outputs that it scales, a row of x its row, and nothing else."""
    if path == MMA and transposed:
        return
    case = Case(5, 136, 96, "bfloat16", "nf4", 32, path, transposed=transposed, spoil=True)
    y = case.run().view(ml_dtypes.bfloat16).reshape(5, -1).astype(np.float32)
    expected = np.zeros(y.shape, bool)
    expected[2] = True
    if transposed:
        expected[:, 32:64] = True
    else:
        expected[:, 7] = True
    assert np.array_equal(np.isnan(y), expected)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    transposed = draw(st.booleans())
    experts = draw(st.one_of(st.none(), st.lists(st.integers(0, 12), min_size=1, max_size=5)))
    case = Case(
        draw(st.integers(0, 40)) if experts is None else sum(experts) + draw(st.integers(0, 3)),
        draw(st.one_of(st.integers(1, 140), st.integers(1, 10).map(lambda n: 8 * n))),
        draw(st.one_of(st.integers(1, 300), st.integers(1, 10).map(lambda n: 32 * n))),
        draw(st.sampled_from(sorted(DTYPES))),
        draw(st.sampled_from(sorted(FORMATS))),
        draw(st.sampled_from([32, 64, 128, 4096])),
        nested=draw(st.sampled_from([0, 0, 256, 100])),
        bias=None if transposed else draw(st.sampled_from([None, *DTYPES])),
        transposed=transposed,
        experts=experts,
        order=draw(st.integers(0, 2)),
        device=draw(st.integers(0, 2)),
        at=draw(st.sampled_from([0, 0, 0, 4, 8])),
    )
    case.run()


@pytest.mark.parametrize(
    ("wrong", "paths"),
    [
        ({"depth": 80}, (MMA, TILE)),
        ({"dtype": "float32"}, (MMA, TILE)),
        ({"device": OLD}, (MMA, TILE)),
        ({"at": 8}, (TILE,)),
        ({"at": 4}, (MMA, TILE)),
        ({"transposed": True}, (MMA,)),
        ({"transposed": True, "rows": 12}, (TILE,)),
    ],
)
def test_paths_refuse_what_they_cannot_do(wrong, paths):
    for path in paths:
        with pytest.raises(AssertionError, match="invalid argument"):
            Case(**{"rows": 16, "path": path, **wrong}).run()


def test_too_many_blocks_are_an_error():
    """2^31 tiles and more: an error, and no launch with the number cut off."""
    emulator = emulated()
    emulator.reset()
    args = Linear4(path=SIMT, format=0, blocksize=64, m=1 << 40, rows=1 << 20, depth=64)
    args.scales.nested_blocksize = 1
    status = emulator.api.linear4(ctypes.byref(Queue(SMALL, None)), ctypes.byref(args))
    assert (status, emulator.fault) == (9, "")
