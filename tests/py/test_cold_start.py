"""A layer costs at its first call what it costs later: nothing is repacked, nothing kept, scratch memory is used again.

Pages are counted, not seconds: what a process touches for the first time the kernel has to map, and says so
(getrusage), on a busy machine too. A copy of the weight below would be some 2,000 pages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = [
    pytest.mark.no_asan,  # its allocator gives every call fresh pages, to find what uses old ones
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
]

SIZE = 4096
WEIGHT_KB = SIZE * SIZE // 2 // 1024
COMMON = f"""
    import gc, json, resource, time
    import numpy as np
    from halfbyte import _C

    SIZE = {SIZE}
    rng = np.random.default_rng(0)

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def resident_kb():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

    def array(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    weight = array(SIZE, SIZE)
"""


def child(code: str, **env: str):
    """What the program prints as JSON; it runs in a process of its own, whose memory nothing else has touched."""
    program = textwrap.dedent(COMMON) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({}, id="malloc as it is"),
        pytest.param({"MALLOC_TRIM_THRESHOLD_": "65536"}, id="malloc that gives memory back at once"),
    ],
)
def test_calls_touch_no_new_memory(env):
    """After three calls, the first of which brings scratch memory to its size."""
    result = child(
        """
        four = {name: _C.Linear4bit.from_float(weight, compute=name) for name in ("float32", "bfloat16")}
        nested = _C.Linear4bit(_C.Params4bit.quantize(weight, double_quant=True), compute="bfloat16")
        layers = {**four, "nested": nested}
        layers["int8"] = _C.Linear8bit(_C.Int8Params.quantize(weight), mode="dynamic")
        result = {}
        for name, layer in layers.items():
            for rows in (1, 8, 512):
                x, y = array(rows, SIZE), np.zeros((rows, SIZE), np.float32)
                for direction, call in (("forward", layer), ("dx", layer.grad_input)):
                    for _ in range(3):
                        call(x, y)
                    before = faults()
                    for _ in range(3):
                        call(x, y)
                    result[f"{name} {direction} {rows}"] = faults() - before
        print(json.dumps(result))
        """,
        **env,
    )
    assert len(result) == 24
    assert {name: pages for name, pages in result.items() if pages > 8} == {}


def test_a_layer_keeps_nothing_but_its_weight():
    """Eight layers, called once each in every way, after another one has brought scratch memory to its size."""
    result = child("""
        params = [_C.Params4bit.quantize(weight) for _ in range(9)]
        int8 = [_C.Int8Params.quantize(weight) for _ in range(3)]
        del weight
        def use(layer, rows):
            x, y = xs[rows]
            layer(x, y)
            layer.grad_input(x, y)
        xs = {rows: (array(rows, SIZE), np.zeros((rows, SIZE), np.float32)) for rows in (1, 4, 100)}
        def use_all(p, kind, modes):
            for mode in modes:
                layer = kind(p, **mode)
                kept.append(layer)
                for rows in xs:
                    use(layer, rows)
        kept = []
        modes4 = [{"compute": "float32"}, {"compute": "bfloat16"}]
        modes8 = [{"mode": "dynamic"}, {"mode": "exact"}]
        for _ in range(2):
            use_all(params[0], _C.Linear4bit, modes4)
            use_all(int8[0], _C.Linear8bit, modes8)
        gc.collect()
        before = resident_kb()
        for p in params[1:]:
            use_all(p, _C.Linear4bit, modes4)
        four = resident_kb() - before
        for p in int8[1:]:
            use_all(p, _C.Linear8bit, modes8)
        print(json.dumps([four, resident_kb() - before - four]))
        """)
    four, eight = result
    assert four < WEIGHT_KB / 4, f"eight 4-bit layers kept {four} kB"
    assert eight < WEIGHT_KB / 4, f"two 8-bit layers kept {eight} kB"


def test_first_call_takes_the_time_of_any_other():
    """CPU time on one thread, the best of eight layers: repacking would take ten times as long as the product."""
    first, later = child("""
        _C.set_num_threads(1)
        layers = [_C.Linear4bit.from_float(weight, compute="float32") for _ in range(8)]
        x, y = array(1, SIZE), np.zeros((1, SIZE), np.float32)
        def seconds(layer):
            before = time.process_time()
            layer(x, y)
            return time.process_time() - before
        layers[0](x, y)
        first = [seconds(layer) for layer in layers[1:]]
        later = [seconds(layer) for _ in range(3) for layer in layers[1:]]
        print(json.dumps([min(first), min(later)]))
        """)
    assert first < 3 * later


def test_module_keeps_nothing_but_its_weight():
    pytest.importorskip("torch")
    grown = child("""
        import torch
        import halfbyte.torch as ht
        torch.set_num_threads(1)
        def module():
            layer = ht.nn.Linear4bit(SIZE, SIZE, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            layer.weight = ht.nn.Params4bit(torch.from_numpy(weight), requires_grad=False, quant_type="nf4")
            return layer.to("cpu")
        def use(layer):
            for rows in (1, 16):  # few: buffers of x and y come and go, and their sizes are noise here
                with torch.no_grad():
                    layer(torch.ones(rows, SIZE))
                x = torch.ones(rows, SIZE, requires_grad=True)
                layer(x).sum().backward()
        modules = [module() for _ in range(9)]
        for _ in range(3):
            use(modules[0])
        gc.collect()
        before = resident_kb()
        for layer in modules[1:]:
            use(layer)
        gc.collect()
        print(json.dumps(resident_kb() - before))
        """)
    assert grown < WEIGHT_KB / 2, f"eight modules kept {grown} kB"
