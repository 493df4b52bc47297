"""halfbyte.torch.optim against torch's optimizers, and its states, settings and checkpoints."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from halfbyte.torch import optim  # noqa: E402

PEERS = {
    "Adam": (lambda p: optim.Adam(p, lr=1e-2), lambda p: torch.optim.Adam(p, lr=1e-2)),
    "AdamW": (
        lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    ),
    "SGD": (
        lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    ),
    "RMSprop": (
        lambda p: optim.RMSprop(p, lr=1e-2, alpha=0.9),
        lambda p: torch.optim.RMSprop(p, lr=1e-2, alpha=0.9),
    ),
    "Adagrad": (lambda p: optim.Adagrad(p, lr=1e-2), lambda p: torch.optim.Adagrad(p, lr=1e-2)),
}
SHAPES = [(64, 65), (128, 64), (7,), (5000,)]


def parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 0.01).to(p.dtype)


@pytest.mark.parametrize("name", PEERS)
def test_follows_torch(name):
    ours, theirs = parameters(), parameters()
    a, b = PEERS[name][0](ours), PEERS[name][1](theirs)
    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        # 10 steps of a few float32 roundings each, of updates of at most ~0.03
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "name", ["Adam8bit", "AdamW8bit", "Lion8bit", "AdEMAMix8bit", "RMSprop8bit", "LAMB8bit"]
)
def test_8bit_follows_32bit(name):
    ours, full = parameters(), parameters()
    a = getattr(optim, name)(ours, lr=1e-3)
    b = getattr(optim, name.replace("8bit", "32bit"))(full, lr=1e-3)
    start = [p.detach().clone() for p in ours]
    for step in range(20):
        for params in (ours, full):
            set_gradients(params, step)
        a.step()
        b.step()
    for p, q, s in zip(ours, full, start, strict=True):
        moved = (q - s).norm()
        assert (p - q).norm() <= 0.1 * moved
        if p.numel() < 4096:
            assert torch.equal(p, q)  # small tensors keep 32 bits
    assert a.state[ours[0]]["state1"].dtype == torch.uint8
    assert a.state[ours[2]]["state1"].dtype == torch.float32


def test_lion_takes_steps_of_the_learning_rate():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([2.0, -3.0, 0.0])
    optim.Lion([p], lr=0.5).step()
    assert torch.equal(p.detach(), torch.tensor([0.5, 1.5, 1.0]))


def test_ademamix_schedules_rise_to_their_values():
    opt = optim.AdEMAMix(parameters(), betas=(0.9, 0.999, 0.9999), alpha=5.0, t_alpha=10, t_beta3=10)
    config = opt.get_config(0, 0, opt.param_groups[0])
    seen = [opt.schedule(config, step) for step in (1, 5, 10, 20)]
    assert [s["alpha"] for s in seen] == [0.5, 2.5, 5.0, 5.0]
    betas = [s["beta3"] for s in seen]
    assert 0.9 < betas[0] < betas[1] < betas[2] == betas[3] == 0.9999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["AdamW8bit", "AdamW32bit", "SGD8bit", "RMSprop32bit", "Adagrad32bit", "LARS32bit"]
)
def test_half_precision_parameters(name, dtype):
    kwargs = {"momentum": 0.9} if name.startswith(("SGD", "LARS")) else {}
    half, full = parameters(dtype=dtype), [torch.nn.Parameter(p.float()) for p in parameters(dtype=dtype)]
    a, b = (getattr(optim, name)(p, lr=1e-2, **kwargs) for p in (half, full))
    set_gradients(half, 0)
    for p, q in zip(half, full, strict=True):
        q.grad = p.grad.float()
    a.step()
    b.step()
    for p, q in zip(half, full, strict=True):
        assert torch.equal(p, q.to(dtype))  # computed in float32, rounded once


def test_parameters_in_any_memory_order():
    base = torch.randn(96, 80)
    p, q = torch.nn.Parameter(base.t()), torch.nn.Parameter(base.t().contiguous())
    for x in (p, q):
        x.grad = torch.ones(80, 96)
        optim.AdamW8bit([x], lr=1e-2).step()
    assert not p.is_contiguous() and torch.equal(p, q)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW32bit", "AdEMAMix8bit", "Lion8bit", "LARS32bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_state_dict_round_trip_continues_exactly(name):
    kwargs = {"momentum": 0.9} if name.startswith("LARS") else {}
    ours = parameters()
    a = getattr(optim, name)(ours, lr=1e-2, **kwargs)
    for step in range(3):
        set_gradients(ours, step)
        a.step()
    saved = pickle.loads(pickle.dumps(a.state_dict()))
    wrapped = saved["state"][0]
    assert set(wrapped) == {"step", "__bnb_optimizer_quant_state__"} and wrapped["step"] == 3
    others = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    b = getattr(optim, name)(others, lr=5.0, **kwargs)
    b.load_state_dict(saved)
    for step in range(3, 6):
        for params, opt in ((ours, a), (others, b)):
            set_gradients(params, step)
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, others, strict=True))


def test_state_dict_without_wrapper_loads():
    ours = parameters()
    a = optim.Adam8bit(ours)
    set_gradients(ours, 0)
    a.step()
    saved = a.state_dict()
    flat = copy.deepcopy(saved)
    flat["state"] = {
        k: {"step": v["step"], **v["__bnb_optimizer_quant_state__"]} for k, v in saved["state"].items()
    }
    b = optim.Adam8bit(parameters())
    b.load_state_dict(flat)
    assert torch.equal(b.state[b.param_groups[0]["params"][0]]["state1"], a.state[ours[0]]["state1"])


def test_state_dict_of_another_shape_is_refused():
    a = optim.Adam(parameters())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optim.Adam([{"params": p} for p in parameters()]).load_state_dict(a.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        optim.Adam(parameters()[:2]).load_state_dict(a.state_dict())


@pytest.fixture
def manager():
    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()


def test_overrides_by_module_and_by_parameter(manager):
    layer = torch.nn.Linear(100, 100)
    embedding = torch.nn.Embedding(100, 100)
    manager.register_module_override(embedding, "weight", {"optim_bits": 32})
    manager.override_config(layer.bias, "lr", 0.0)
    opt = optim.AdamW8bit([*layer.parameters(), *embedding.parameters()], lr=1e-2)
    before = layer.bias.detach().clone()
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.state[embedding.weight]["state1"].dtype == torch.float32
    assert opt.state[layer.weight]["state1"].dtype == torch.uint8
    assert torch.equal(layer.bias.detach(), before)


def test_refusals():
    p = parameters()
    cases = [
        (lambda: optim.Adam8bit(p, amsgrad=True), ValueError, "Adam8bit does not support amsgrad=True"),
        (
            lambda: optim.PagedAdamW8bit(p, optim_bits=8),
            ValueError,
            "PagedAdamW8bit only supports optim_bits=32",
        ),
        (lambda: optim.Adagrad8bit(p, optim_bits=32), ValueError, "Adagrad8bit only supports optim_bits=8"),
        (lambda: optim.Adagrad(p, lr_decay=0.1), ValueError, "Lr Decay"),
        (lambda: optim.Adagrad(p, initial_accumulator_value=0.1), ValueError, "Initial accumulator"),
        (lambda: optim.LAMB8bit(p, amsgrad=True), ValueError, "LAMB8bit does not support amsgrad=True"),
        (lambda: optim.LAMB8bit(p, max_unorm=0.5), ValueError, "LAMB8bit only supports max_unorm=1.0"),
        (lambda: optim.SGD(p, lr=0.1), NotImplementedError, "SGD without momentum"),
        (lambda: optim.LARS(p, lr=0.1), NotImplementedError, "LARS without momentum"),
        (lambda: optim.RMSprop(p, alpha=0), NotImplementedError, "alpha==0.0"),
        (lambda: optim.RMSprop(p, centered=True), NotImplementedError, "Centered"),
        (lambda: optim.Adam(p, lr=-1.0), ValueError, "learning rate: -1.0"),
        (lambda: optim.Adam(p, betas=(0.9, 1.0)), ValueError, "beta parameter at index 1: 1.0"),
        (lambda: optim.Adam(p, eps=-1.0), ValueError, "epsilon value: -1.0"),
        (lambda: optim.Adam(p, weight_decay=-1.0), ValueError, "weight_decay value: -1.0"),
    ]
    for make, error, text in cases:
        with pytest.raises(error, match=text):
            make()


def test_betas_as_text():
    opt = optim.Adam(parameters(), betas="(0.8, 0.95)")
    assert opt.param_groups[0]["betas"] == (0.8, 0.95)


def test_closure_and_sparse_gradients():
    p = torch.nn.Parameter(torch.ones(4))
    opt = optim.Adam([p])

    def closure():
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert float(opt.step(closure).detach()) == 4.0 and (p < 1).all()
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optim.Adam(embedding.parameters()).step()
