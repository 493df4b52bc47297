"""Every quantized layer of a model against its definition in float64, on the inputs it really gets.

    4 bits: y = x W^T + b,  W = codebook[code] * absmax     (bfloat16 compute: x and codebook or W rounded first)
    int8:   y = x W^T + b,  W = CB * SCB / 127                       (training)
            y = (q W_q^T) scale_x scale_w / 127^2 + x_out W^T + b    (inference, q = rint(127 x / scale_x))

Bounds: n + 8 float32 roundings in a sum of n terms, each at most u times the sum of magnitudes, whatever the
order of summation (docs/numerics.md with L = 1), and one rounding to the output's dtype. Where 127 x / scale_x
is so near to a tie that its rounding may go either way, one step of q is allowed.
"""

from contextlib import contextmanager

import torch

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def weight_4bit(state, packed):
    """The matrix [rows, depth] float64 that packed codes stand for."""
    absmax = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.long()] * outer + state.offset
    raw = packed.detach().as_subclass(torch.Tensor).contiguous().view(torch.uint8).reshape(-1)
    codes = torch.stack([raw >> 4, raw & 15], 1).reshape(-1).long()
    n = state.shape.numel()
    values = state.code.double()[codes][:n]
    return (values * absmax.double().repeat_interleave(state.blocksize)[:n]).view(state.shape)


def weight_8bit(layer):
    scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    codes = layer.weight.detach().as_subclass(torch.Tensor)
    assert codes.dtype == torch.int8
    return codes.double() * scale.double()[:, None] / 127


def expected_4bit(layer, x):
    w = weight_4bit(layer.weight.quant_state, layer.weight)
    if layer.compute_dtype == torch.bfloat16:  # one rounding of each codebook entry, or of each weight
        return _exact(x.bfloat16(), w, UNIT[torch.bfloat16])
    return _exact(x, w)


def _exact(x, w, rounding=0.0):
    x = x.double()
    magnitude = x.abs() @ w.abs().T
    return x @ w.T, (rounding + (x.shape[-1] + 8) * UNIT[torch.float32] * (1 + rounding)) * magnitude


def expected_8bit(layer, x):
    w = weight_8bit(layer)
    if layer.training:
        return _exact(x, w)
    rows = x.reshape(-1, x.shape[-1]).float()
    inner = rows
    outlier = torch.zeros(rows.shape[1], dtype=torch.bool)
    if layer.state.threshold > 0:
        big = rows.abs() >= layer.state.threshold
        outlier = big.any(0)
        inner = rows.masked_fill(big, 0)
    scale = inner.abs().amax(1, keepdim=True).double()
    inner = inner.masked_fill(outlier, 0).double()
    q = torch.where(scale > 0, inner * 127 / scale.clamp_min(1e-300), 0)
    doubtful = ((q - q.floor() - 0.5).abs() < 127 * 4 * UNIT[torch.float32]).double()
    y, bound = _exact(q.round() * scale / 127, w)
    z, more = _exact(rows.masked_fill(~outlier, 0), w)
    bound = bound + more + (doubtful * scale / 127) @ w.abs().T
    shape = (*x.shape[:-1], w.shape[0])
    return (y + z).view(shape), bound.view(shape)


@contextmanager
def recorded_calls(model):
    """{name: [(x, y), ...]} of all quantized layers while the block runs."""
    import bitsandbytes as bnb

    calls, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):

            def hook(module, args, y, name=name):
                calls.setdefault(name, []).append((args[0].detach().clone(), y.detach().clone()))

            hooks.append(module.register_forward_hook(hook))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def check_layers(model, run):
    """Run `run()` and compare every call of a quantized layer with its definition. Returns how many there were."""
    import bitsandbytes as bnb

    with recorded_calls(model) as calls, torch.no_grad():
        run()
    layers = dict(model.named_modules())
    for name, pairs in calls.items():
        layer = layers[name]
        four = isinstance(layer, bnb.nn.Linear4bit)
        for x, y in pairs:
            want, bound = (expected_4bit if four else expected_8bit)(layer, x)
            if layer.bias is not None:
                want = want + layer.bias.double()
                bound = bound + UNIT[torch.float32] * want.abs()
            bound = bound + UNIT[y.dtype] * (want.abs() + bound) + SMALLEST[y.dtype]
            worst = ((y.double() - want).abs() / bound).max()
            assert y.isfinite().all() and worst <= 1, f"{name}: error is {worst:.3g} times its bound"
    assert calls, "no quantized layer was called"
    return sum(map(len, calls.values()))
