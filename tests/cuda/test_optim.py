"""Optimizer steps of the CUDA library, on the emulator: the bits of the CPU's, for lists of tensors."""

import ctypes

import ml_dtypes
import numpy as np
import pytest
from host_library import DTYPES, STRUCTURES, Queue, emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codecs import aligned, same

from halfbyte import _C

NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
OPTIMIZERS = ("adam", "ademamix", "momentum", "lion", "rmsprop", "adagrad")
SETTINGS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "beta3": 0.9999, "alpha": 5.0, "eps": 1e-8}
MAPS = {name: np.asarray(_C.map8(name), np.float32) for name in ("dynamic", "dynamic_unsigned", "linear")}
Tensor, Settings, Optimizer = (
    STRUCTURES[f"hb_{name}"] for name in ("optim_tensor", "optim_settings", "cuda_optimizer")
)


class Parameter:
    """A tensor of the list with its states, as the CPU and (copied) the GPU see it."""

    def __init__(self, optimizer, n, p_dtype="float32", g_dtype="float32", bits=8, offset=0, step=1, seed=0):
        self.rng = np.random.default_rng([n, seed])
        rows, second, blocks = 1 + (optimizer == "ademamix"), optimizer in ("adam", "ademamix"), -(-n // 256)
        self.n, self.step, self.g_dtype, self.offset = n, step, NUMPY[g_dtype], offset
        dtype = np.uint8 if bits == 8 else np.float32
        self.arrays = {
            "p": self.place(self.rng.standard_normal(n).astype(np.float32).astype(NUMPY[p_dtype])),
            "g": self.place(np.zeros(n, self.g_dtype)),
            "state1": self.place(np.zeros(rows * n, dtype)),
            "state2": self.place(np.zeros(n, dtype)) if second else None,
            "absmax1": np.zeros(rows * blocks, np.float32) if bits == 8 else None,
            "absmax2": np.zeros(blocks, np.float32) if bits == 8 and second else None,
            "unorm": np.zeros(1, np.float32),
        }

    def place(self, values):
        array = aligned(values.size, values.dtype, self.offset)
        array[:] = values
        return array

    def new_gradient(self, kind="normal"):
        g = self.rng.standard_normal(self.n).astype(np.float32) * np.float32(0.01)
        if kind == "wild":  # every magnitude, zeros of both signs, and blocks of them
            g *= np.float32(10) ** self.rng.integers(-12, 6, self.n).astype(np.float32)
            g[self.rng.random(self.n) < 0.2] = 0
            g[self.rng.random(self.n) < 0.1] = -0.0
            g[256:512] = 0
        if kind == "broken" and self.n:
            g[self.rng.integers(0, self.n, 1 + self.n // 50)] = np.nan
            g[self.rng.integers(0, self.n, 2)] = np.inf
            g[self.rng.integers(0, self.n, 2)] = -np.inf
            g[self.rng.random(self.n) < 0.2] = 0
        with np.errstate(over="ignore"):
            self.arrays["g"][:] = g.astype(self.g_dtype)

    def copies(self):
        return {k: None if a is None else self.place(a) for k, a in self.arrays.items()}


def on_cpu(optimizer, parameters, maps, **options):
    tensors = [tuple(p.arrays[k] for k in ("p", "g", "state1", "state2", "absmax1", "absmax2", "unorm")) + (p.step,)
               for p in parameters]  # fmt: skip
    _C.optimizer_step(optimizer, tensors, map1=maps[0], map2=maps[1], **options)


def on_gpu(optimizer, parameters, maps, order=0, **options):
    """The step on copies of all arrays, which are returned; launches of the list are checked one by one."""
    emulator = emulated()
    emulator.reset(order, seed=len(parameters))
    copies = [p.copies() for p in parameters]
    tensors = (Tensor * max(len(copies), 1))()
    for tensor, parameter, arrays in zip(tensors, parameters, copies, strict=False):
        for key, array in arrays.items():
            if array is not None and array.size:
                setattr(tensor, key, emulator.register(array, key != "g"))
        tensor.p_dtype, tensor.g_dtype = (DTYPES[arrays[k].dtype.name] for k in ("p", "g"))
        tensor.n, tensor.step = parameter.n, parameter.step
        tensor.state_is_8bit = arrays["absmax1"] is not None
    chosen = Settings(**{"gnorm_scale": 1.0, **options})
    map1, map2 = maps
    args = Optimizer(tensors=ctypes.addressof(tensors), settings=ctypes.addressof(chosen), count=len(copies),
                     optimizer=OPTIMIZERS.index(optimizer), map1=emulator.register(map1),
                     map2=emulator.register(map2))  # fmt: skip
    room = emulator.api.optimizer_workspace(ctypes.byref(Queue(0, None)), ctypes.byref(args))
    workspace = aligned(room // 8, np.float64)
    if room:
        args.workspace = emulator.register(workspace, True)
    emulator.run("optimizer", args)
    return copies


def check(
    optimizer,
    parameters,
    maps=("dynamic", "dynamic_unsigned"),
    steps=3,
    kinds=("normal",),
    order=0,
    **options,
):
    options = {**SETTINGS, **options}
    maps = [MAPS[m] if isinstance(m, str) else m for m in maps]
    for step in range(steps):
        for parameter in parameters:
            parameter.new_gradient(kinds[step % len(kinds)])
        copies = on_gpu(optimizer, parameters, maps, order, **options)
        on_cpu(optimizer, parameters, maps, **options)
        for i, (parameter, arrays) in enumerate(zip(parameters, copies, strict=True)):
            for key, array in arrays.items():
                if array is not None:
                    assert same(array, parameter.arrays[key]), (optimizer, step, i, key)
            parameter.step += 1


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_list(optimizer, bits):
    """Tails, alignments, gradients of every kind, more tensors than one launch takes."""
    sizes = [0, 1, 7, 8, 255, 256, 257, 1000, 2048, 5001] + [3] * 45 + [640]
    parameters = [
        Parameter(optimizer, n, *[("float32", "bfloat16", "float16")[k] for k in (i % 3, i // 3 % 3)], bits,
                  offset=i % 5 % 3, step=1 + i % 4, seed=i)
        for i, n in enumerate(sizes)
    ]  # fmt: skip
    check(optimizer, parameters, kinds=("normal", "wild", "broken"), order=bits % 3, weight_decay=0.1)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(OPTIMIZERS),
    st.lists(
        st.tuples(
            st.integers(0, 1500),
            st.sampled_from(sorted(DTYPES)),
            st.sampled_from(sorted(DTYPES)),
            st.sampled_from([8, 8, 32]),
            st.integers(0, 3),
            st.integers(1, 9),
        ),
        min_size=1,
        max_size=4,
    ),
    st.fixed_dictionaries({}, optional={
        "weight_decay": st.sampled_from([0.01, 0.5]), "gnorm_scale": st.sampled_from([0.3, 2.0]),
        "skip_zeros": st.just(True), "lr": st.sampled_from([1.0, 1e-6]), "eps": st.sampled_from([0.0, 1e-3]),
        "beta1": st.sampled_from([0.0, 0.5]), "beta2": st.sampled_from([0.0, 0.999])}),
    st.sampled_from([("normal",), ("wild",), ("broken", "normal"), ("wild", "broken")]),
    st.integers(0, 2),
)  # fmt: skip
def test_any_list(optimizer, shapes, options, kinds, order):
    parameters = [Parameter(optimizer, *shape, seed=i) for i, shape in enumerate(shapes)]
    check(optimizer, parameters, steps=2, kinds=kinds, order=order, **options)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["adam", "momentum"]),
    st.lists(st.tuples(st.integers(0, 7000), st.sampled_from([8, 32])), min_size=1, max_size=5),
    st.sampled_from([1e-6, 0.02, 1e3]),
    st.sampled_from([("normal",), ("wild",), ("broken", "normal")]),
    st.integers(0, 2),
)
def test_norm_limit(optimizer, shapes, max_unorm, kinds, order):
    """The float64 norms too: the update's square is written, and the limit works on the same bits."""
    parameters = [
        Parameter(optimizer, n, ("float32", "bfloat16", "float16")[i % 3], "float16", bits, seed=i)
        for i, (n, bits) in enumerate(shapes)
    ]
    check(optimizer, parameters, steps=2, kinds=kinds, order=order, max_unorm=max_unorm, weight_decay=0.1)


@pytest.mark.parametrize(
    "maps", [("linear", "linear"), ("dynamic_unsigned", "dynamic"), ("dynamic", "linear")]
)
@pytest.mark.parametrize("optimizer", ["adam", "ademamix", "lion"])
def test_maps_that_need_the_tree(optimizer, maps):
    parameters = [Parameter(optimizer, n, seed=n) for n in (256, 700)]
    check(optimizer, parameters, maps, kinds=("wild", "normal", "broken"))


def test_a_skewed_map_is_not_looked_up():
    """A map whose thresholds do not mirror each other, by one unit, and one with two of them in a bucket."""
    skewed, crowded = MAPS["dynamic"].copy(), MAPS["dynamic"].copy()
    skewed[40] = np.nextafter(skewed[40], np.float32(0))
    crowded[200] = crowded[201]
    for table in (skewed, crowded):
        check("lion", [Parameter("lion", 2000)], (table, MAPS["dynamic_unsigned"]), kinds=("wild",))


def test_every_border_of_the_maps():
    """States that lie on, below and above each threshold of both maps come to the CPU's codes.

    Momentum with beta1 = 0 stores the gradient, Adam with beta2 = 0 its square; a block's absmax is 1.
    """
    for name, optimizer in (("dynamic", "momentum"), ("dynamic_unsigned", "adam")):
        table = MAPS[name]
        border = ((table[1:] + table[:-1]) / np.float32(2))[:, None].view(np.int32)
        near = (border + np.arange(-3, 4, dtype=np.int32)).view(np.float32).ravel()
        values = np.concatenate(
            [near, -near, table, np.float32([0.0, -0.0, 1e-45, -1e-45, 1e-7, 2**-23, -(2**-23)])]
        )
        values = values[np.abs(values) <= 1]
        if optimizer == "adam":  # squares of these come near the borders
            values = np.abs(values)
            root = np.sqrt(values)[:, None].view(np.int32) + np.arange(-2, 3, dtype=np.int32)
            values = root.view(np.float32).ravel()
            values = values[values <= 1]
        blocks = -(-values.size // 255)
        g = np.zeros((blocks, 256), np.float32)
        g[:, 0] = 1
        g[:, 1:] = np.resize(values, (blocks, 255))
        parameter = Parameter(optimizer, g.size)
        parameter.new_gradient = lambda kind, parameter=parameter, g=g: parameter.arrays["g"].__setitem__(
            slice(None), g.ravel()
        )
        check(optimizer, [parameter], steps=2, beta1=0.0, beta2=0.0, eps=1.0)


def test_nothing_to_do():
    check("adam", [])
    check("adam", [Parameter("adam", 0)], max_unorm=1.0)
