"""The optimizers on CUDA tensors: against themselves on the CPU, paged, saved and loaded."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch_side import CUDA, tensor

from halfbyte import _C
from halfbyte.torch import functional as F
from halfbyte.torch import optim
from halfbyte.torch.optim import base

SHAPES = [(20, 32), (700,), (3, 5), (1,)]
SMALL = 600  # elements from which states have 8 bits, or pages, here


def parameters(device, dtype=torch.float32, shapes=SHAPES):
    return [torch.nn.Parameter(tensor(*s, dtype=dtype, seed=i).to(device)) for i, s in enumerate(shapes)]


def give_gradients(params, seed, dtype=None):
    for i, p in enumerate(params):
        g = tensor(*p.shape, dtype=dtype or p.dtype, seed=100 * seed + i)
        p.grad = g.to(p.device)


def pair(cls, dtype=torch.float32, **kwargs):
    cpu, cuda = parameters("cpu", dtype), parameters("cuda", dtype)
    return cls(cpu, min_8bit_size=SMALL, **kwargs), cpu, cls(cuda, min_8bit_size=SMALL, **kwargs), cuda


CASES = [
    (optim.AdamW, {"weight_decay": 0.1}),
    (optim.AdamW8bit, {"weight_decay": 0.1}),
    (optim.AdEMAMix, {}),
    (optim.AdEMAMix8bit, {}),
    (optim.Lion, {"weight_decay": 0.1}),
    (optim.Lion8bit, {}),
    (optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    (optim.SGD8bit, {"lr": 0.01, "momentum": 0.9}),
    (optim.RMSprop, {}),
    (optim.RMSprop8bit, {}),
    (optim.Adagrad, {}),
    (optim.Adagrad8bit, {}),
    (optim.LAMB, {}),
    (optim.LARS, {"lr": 0.01, "momentum": 0.9}),
    (optim.LAMB8bit, {}),
]


@pytest.mark.parametrize("cls, kwargs", CASES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_as_on_the_cpu(fake, cls, kwargs, dtype):
    ours, params, theirs, on_cuda = pair(cls, dtype, **kwargs)
    for step in range(2):
        give_gradients(params, step)
        give_gradients(on_cuda, step)
        ours.step()
        theirs.step()
    for p, q in zip(params, on_cuda, strict=True):
        assert q.device == CUDA and q.dtype == dtype
        # The same formula in float32; 8-bit codes may fall to the neighbour where a value lies between two.
        scale = p.detach().float().abs().max()
        rtol, atol = (2**-7, scale * 2**-7) if dtype == torch.bfloat16 else (1e-4, scale * 1e-4)
        torch.testing.assert_close(q.detach().float().cpu(), p.detach().float(), rtol=rtol, atol=float(atol))
        for key, value in theirs.state[q].items():
            if isinstance(value, torch.Tensor):
                assert value.device == CUDA and value.dtype == ours.state[p][key].dtype, key


@pytest.mark.parametrize("cls", [optim.AdamW8bit, optim.AdamW32bit, optim.Lion8bit, optim.AdEMAMix8bit])
def test_a_step_waits_for_nothing_and_is_one_call(fake, monkeypatch, cls):
    params = parameters("cuda", shapes=[(20, 32), (32, 32), (700,)])
    optimizer = cls(params, min_8bit_size=SMALL)
    give_gradients(params, 0)
    optimizer.step()
    calls = []
    step = _C.optimizer_step
    monkeypatch.setattr(_C, "optimizer_step", lambda *a, **kw: calls.append(len(a[1])) or step(*a, **kw))
    with fake.no_synchronisation():
        optimizer.step()
    assert calls == [3]


def test_parameters_of_two_devices_are_two_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(_C, "optimizer_step", lambda *a, **kw: calls.append({t[0].device for t in a[1]}))
    params = parameters("cuda:0") + parameters("cuda:1") + parameters("cpu")
    for cls in (optim.AdamW8bit, optim.AdamW32bit):
        calls.clear()
        optimizer = cls(params, min_8bit_size=1)
        give_gradients(params, 0)
        optimizer.step()
        assert len(calls) == 3 and all(len(devices) == 1 for devices in calls)


def test_maps_are_one_tensor_of_the_device(fake):
    params = parameters("cuda", shapes=[(20, 32), (32, 32)])
    optimizer = optim.AdamW8bit(params, min_8bit_size=SMALL)
    give_gradients(params, 0)
    optimizer.step()
    first, second = (optimizer.state[p] for p in params)
    assert first["qmap1"] is second["qmap1"] and first["qmap2"] is second["qmap2"]
    assert first["qmap1"].device == CUDA


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("cls", [optim.AdamW8bit, optim.AdamW, optim.PagedAdamW8bit])
def test_state_dict_across_devices(fake, monkeypatch, cls):
    monkeypatch.setattr(base, "LEAST_PAGED", SMALL)
    params = parameters("cuda")
    optimizer = cls(params, min_8bit_size=SMALL)
    give_gradients(params, 0)
    optimizer.step()
    state = saved(optimizer)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = cls(copies, min_8bit_size=SMALL)
    loaded.load_state_dict(state)
    for p, q in zip(params, copies, strict=True):
        ours, theirs = loaded.state[q], optimizer.state[p]
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert ours[key].device == CUDA and torch.equal(ours[key].cpu(), value.cpu())
                assert getattr(ours[key], "is_paged", False) == getattr(value, "is_paged", False)
    maps = {id(entry["qmap1"]) for entry in loaded.state.values() if "qmap1" in entry}
    assert len(maps) <= 1
    give_gradients(params, 1)
    give_gradients(copies, 1)
    optimizer.step()
    loaded.step()
    assert all(torch.equal(p.cpu(), q.cpu()) for p, q in zip(params, copies, strict=True))


def test_states_loaded_elsewhere_follow_at_the_first_step(fake):
    params = parameters("cuda")
    optimizer = optim.AdamW8bit(params, min_8bit_size=SMALL)
    give_gradients(params, 0)
    optimizer.step()
    state = saved(optimizer)
    new = optim.AdamW8bit(params, min_8bit_size=SMALL)
    new.load_state_dict(state, move_to_device=False)
    assert new.state[params[0]]["state1"].device.type == "cpu"
    give_gradients(params, 1)
    new.step()
    assert all(v.device == CUDA for v in new.state[params[0]].values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize(
    "cls", [optim.PagedAdamW8bit, optim.PagedAdamW32bit, optim.PagedLion, optim.PagedAdEMAMix]
)
def test_paged(fake, monkeypatch, cls):
    monkeypatch.setattr(base, "LEAST_PAGED", SMALL)
    monkeypatch.setattr(base, "PREFETCHED_BYTES", 3000)
    F.GlobalPageManager.get_instance().initialize()
    prefetched = []
    prefetch = _C.cuda_prefetch
    monkeypatch.setattr(_C, "cuda_prefetch", lambda t: prefetched.append(t) or prefetch(t))
    params = parameters("cuda")
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    paged, other = (
        cls(params, min_8bit_size=SMALL),
        getattr(optim, cls.__name__.removeprefix("Paged"))(plain, min_8bit_size=SMALL),
    )
    for step in range(2):
        give_gradients(params, step)
        give_gradients(plain, step)
        if step == 1:
            with fake.no_synchronisation():
                paged.step()
        else:
            paged.step()
        other.step()
    states = [paged.state[p][key] for p in params for key in ("state1", "state2") if key in paged.state[p]]
    large = [t for t in states if t.numel() >= SMALL]
    assert large and all(getattr(t, "is_paged", False) == (t.numel() >= SMALL) for t in states)
    assert list(F.GlobalPageManager.get_instance().paged_tensors) == large
    assert len(prefetched) == 2 * len(large)
    assert all(torch.equal(p.cpu(), q.cpu()) for p, q in zip(params, plain, strict=True))
    del paged, states, large, prefetched[:]
    assert not F.GlobalPageManager.get_instance().paged_tensors


def test_paged_on_the_cpu_warns():
    optimizer = optim.PagedAdamW8bit(parameters("cpu"))
    give_gradients(optimizer.param_groups[0]["params"], 0)
    with pytest.warns(UserWarning, match="not supported on CPU"):
        optimizer.step()


def test_one_update_of_one_parameter(fake):
    p, g = tensor(300), tensor(300, seed=1)
    m, v = torch.zeros(300), torch.zeros(300)
    there = [t.to("cuda") for t in (g, p, m)], v.to("cuda")
    F.optimizer_update_32bit("adam", g, p, m, 0.9, 1e-8, 1, 1e-3, v, 0.99)
    with fake.no_synchronisation():
        F.optimizer_update_32bit("adam", *there[0], 0.9, 1e-8, 1, 1e-3, there[1], 0.99)
    torch.testing.assert_close(there[0][1].cpu(), p)
    strided = tensor(20, 30).to("cuda").t()
    before = strided.cpu()
    F.optimizer_update_32bit(
        "adam", torch.ones(30, 20, device="cuda"), strided, torch.zeros(30, 20, device="cuda"), 0.9, 1e-8, 1, 1e-3,
        torch.zeros(30, 20, device="cuda"), 0.99,
    )  # fmt: skip
    assert (strided.cpu() < before).all()


def test_deepcopied_states_are_not_taken_for_paged(fake, monkeypatch):
    monkeypatch.setattr(base, "LEAST_PAGED", SMALL)
    params = parameters("cuda")
    optimizer = optim.PagedAdamW8bit(params, min_8bit_size=SMALL)
    give_gradients(params, 0)
    optimizer.step()
    plain = optim.AdamW8bit(params, min_8bit_size=SMALL)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not any(getattr(v, "is_paged", False) for entry in plain.state.values() for v in entry.values())
    give_gradients(params, 1)
    plain.step()
