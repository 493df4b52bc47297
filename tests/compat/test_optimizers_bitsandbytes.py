"""Optimizers and their checkpoints beside the real bitsandbytes, in one process."""

import inspect

import pytest

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")
if "halfbyte" in (bnb.__file__ or ""):
    pytest.skip("the stand-in is installed in this process", allow_module_level=True)

from halfbyte.torch import optim  # noqa: E402

SHARED = [n for n in dir(bnb.optim) if inspect.isclass(getattr(bnb.optim, n)) and n != "GlobalOptimManager"]


def make(module, name, params):
    kwargs = {"lr": 1e-2}
    if name.startswith(("SGD", "LARS", "PytorchLARS")):
        kwargs["momentum"] = 0.9
    return getattr(module, name)(params, **kwargs)


def parameters():
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((64, 80), (64,))]


def step(opt, params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 0.01
    opt.step()


@pytest.mark.parametrize("name", SHARED)
def test_has_the_defaults_of_bitsandbytes(name):
    def defaults(cls):
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.name not in ("self", "params")}

    ours, theirs = defaults(getattr(optim, name)), defaults(getattr(bnb.optim, name))
    # Fixed variants of ours keep the arguments that they fix.
    assert theirs.items() <= ours.items()
    assert set(ours) - set(theirs) <= {"is_paged", "optim_bits"}
    with pytest.warns(UserWarning, match="Paged") if name.startswith("Paged") else _nothing():
        mine, real = make(optim, name, parameters()), make(bnb.optim, name, parameters())
        assert mine.param_groups[0].keys() == real.param_groups[0].keys()
        if name != "PytorchLARS":
            step(mine, mine.param_groups[0]["params"], 0)


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *args):
        return None


# Left out: (Paged)AdEMAMix32bit of bitsandbytes lacks the double state and does not run, and its LAMB on the
# CPU limits the norm of an update without bias correction (its CUDA kernel and the paper have it).
COMPARABLE = [n for n in SHARED if (n.endswith("32bit") and "AdEMAMix" not in n and "LAMB" not in n)]


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", [*COMPARABLE, "AdEMAMix", "PytorchLARS"])
def test_32bit_steps_equal_bitsandbytes(name):
    ours, theirs = parameters(), parameters()
    a, b = make(optim, name, ours), make(bnb.optim, name, theirs)
    for seed in range(5):
        step(a, ours, seed)
        step(b, theirs, seed)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize(
    "name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "AdEMAMix8bit", "Adam32bit", "SGD8bit"]
)
@pytest.mark.parametrize("direction", ["from_bitsandbytes", "to_bitsandbytes"])
def test_checkpoints_go_both_ways(name, direction):
    source, target = (bnb.optim, optim) if direction == "from_bitsandbytes" else (optim, bnb.optim)
    p = parameters()
    a = make(source, name, p)
    for seed in range(3):
        step(a, p, seed)
    q = [torch.nn.Parameter(x.detach().clone()) for x in p]
    b = make(target, name, q)
    b.load_state_dict(a.state_dict())
    for x, y in zip(p, q, strict=True):
        old, new = a.state[x], b.state[y]
        assert old.keys() == new.keys()
        for key, value in old.items():
            same = torch.equal(value, new[key]) if isinstance(value, torch.Tensor) else value == new[key]
            assert same, key
    step(b, q, 3)  # and goes on
    assert all(torch.isfinite(y).all() for y in q)
