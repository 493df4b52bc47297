"""The optimizer that all algorithms share: states in 32 or 8 bits, one call of the C core a step.

8-bit states are block-wise codes of 256 elements with the dynamic maps (Dettmers et al., "8-bit Optimizers
via Block-wise Quantization", arXiv:2110.02861). The layout of states and of `state_dict()` is that of
bitsandbytes, so that checkpoints go both ways.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch

from halfbyte import _C

from ..lowlevel import GlobalPageManager, get_paged, prefetch_tensor
from ..maps import create_dynamic_map
from .manager import GlobalOptimManager

__all__ = ["BLOCKSIZE", "QuantizedOptimizer"]

BLOCKSIZE = 256  # elements per scale of an 8-bit state
LEAST_PAGED = 100_000  # elements of a parameter whose states are paged, as in bitsandbytes
PREFETCHED_BYTES = 256 << 20  # of paged states at a time: all of them may be more than the GPU has room for
WRAPPED_KEY = "__bnb_optimizer_quant_state__"  # hides the states from FSDP's gather, as in bitsandbytes
QUANTIZED_KEYS = frozenset(
    ["state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2", "gnorm_vec", "unorm_vec"]
    + ["max1", "max2", "new_max1", "new_max2"]  # of bitsandbytes before block-wise states
)
_MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}
HYPERPARAMETERS = ("betas", "eps", "weight_decay", "lr", "alpha", "t_alpha", "t_beta3")
ARGUMENTS = ("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros")


class QuantizedOptimizer(torch.optim.Optimizer):
    """Base class; an algorithm names its kernel and says how many states it has.

    Parameters may be float32, bfloat16 or float16, gradients too (independently). Tensors with fewer than
    `min_8bit_size` elements keep float32 states. `optimizer.args` holds optim_bits, min_8bit_size, max_unorm
    and skip_zeros; `GlobalOptimManager` overrides any of them per parameter.
    """

    algorithm: str  # of _C.optimizer_step
    has_second_state = False
    # Names that code written for bitsandbytes' Optimizer8bit reads.
    _FSDP_WRAPPED_QUANT_STATE_KEY = WRAPPED_KEY
    non_castable_tensor_keys = QUANTIZED_KEYS

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
    ) -> None:
        if not defaults["lr"] >= 0.0:
            raise ValueError(f"Invalid learning rate: {defaults['lr']}")
        if not defaults["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {defaults['eps']}")
        if not defaults["weight_decay"] >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {defaults['weight_decay']}")
        for i, beta in enumerate(defaults["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        super().__init__(params, defaults)
        self.args = args or SimpleNamespace(
            optim_bits=optim_bits, min_8bit_size=min_8bit_size, max_unorm=max_unorm, skip_zeros=skip_zeros
        )
        self.is_paged = is_paged
        self.mng = GlobalOptimManager.get_instance()
        self.initialized = False
        self.name2qmap: dict[str, torch.Tensor] = {}
        self._maps: dict[tuple[str, torch.device], torch.Tensor] = {}
        if optim_bits == 8:
            self.fill_qmap()

    def fill_qmap(self) -> None:
        self.name2qmap["dynamic"] = create_dynamic_map(signed=True)
        self.name2qmap["udynamic"] = create_dynamic_map(signed=False)

    def _map(self, name: str, device: torch.device) -> torch.Tensor:
        """One of `name2qmap` on a device: the same tensor for all its states."""
        if not self.name2qmap:
            self.fill_qmap()
        if self.name2qmap[name].device == device:
            return self.name2qmap[name]
        key = (name, device)
        if key not in self._maps:
            self._maps[key] = self.name2qmap[name].to(device)
        return self._maps[key]

    # ---- settings ------------------------------------------------------------------------------

    def check_overrides(self) -> None:
        """Attach overrides that name a module's parameter to the parameter of this optimizer."""
        places = {
            id(p): (g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])
        }
        for module, name, config in self.mng.module_weight_config_triple:
            p = getattr(module, name)
            if id(p) in places:
                self.mng.pid2config[id(p)] = config
                self.mng.index2config[places[id(p)]] = config

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Every setting of parameter `pindex` of group `gindex`, overrides included."""
        config = {name: group.get(name) for name in HYPERPARAMETERS}
        config.update((name, getattr(self.args, name)) for name in ARGUMENTS)
        config.update(self.mng.index2config.get((gindex, pindex), {}))
        config.update(self.mng.pid2config.get(id(group["params"][pindex]), {}))
        return config

    # ---- states --------------------------------------------------------------------------------

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Zeros of p's shape; paged for a large parameter on a GPU."""
        return self._buffer(p, p.shape, dtype)

    def _buffer(self, p: torch.Tensor, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        if self.is_paged and p.device.type == "cpu" and not getattr(self, "_cpu_paged_warned", False):
            self._cpu_paged_warned = True
            warnings.warn(
                "Paged optimizers are not supported on CPU. Falling back to non-paged optimizer behavior.",
                stacklevel=2,
            )
        if self._pages(p):
            buffer = get_paged(*shape, dtype=dtype, device=p.device)
            GlobalPageManager.get_instance().paged_tensors.append(buffer)
            return buffer
        return torch.zeros(shape, dtype=dtype, device=p.device)

    def _pages(self, p: torch.Tensor) -> bool:
        return self.is_paged and p.is_cuda and p.numel() >= LEAST_PAGED

    def first_state(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.get_state_buffer(p, dtype)

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """Create the states of `p`: zeros, of 32 or 8 bits."""
        config = self.get_config(gindex, pindex, group)
        if config["optim_bits"] not in (8, 32):
            raise NotImplementedError(f"Amount of optimizer bits not supported: {config['optim_bits']}")
        is_8bit = config["optim_bits"] == 8 and p.numel() >= config["min_8bit_size"]
        dtype = torch.uint8 if is_8bit else torch.float32
        state = self.state[p]
        state["step"] = 0
        state["state1"] = self.first_state(p, dtype)
        if self.has_second_state:
            state["state2"] = self.get_state_buffer(p, dtype)
        if is_8bit:
            rows = state["state1"].numel() // p.numel()
            blocks = -(-p.numel() // BLOCKSIZE)
            shape = (rows, blocks) if rows > 1 else (blocks,)
            state["qmap1"] = self._map("dynamic", p.device)
            state["absmax1"] = torch.zeros(shape, dtype=torch.float32, device=p.device)
            if self.has_second_state:
                state["qmap2"] = self._map("udynamic", p.device)
                state["absmax2"] = torch.zeros((blocks,), dtype=torch.float32, device=p.device)
        if config["max_unorm"] > 0.0:
            state["unorm_vec"] = torch.zeros((1,), dtype=torch.float32, device=p.device)

    def to_gpu(self) -> None:
        """Bring states that lie elsewhere to the GPU of their parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.is_cuda and p in self.state:
                    values = self.state[p]
                    values.update((k, self._to_device(k, v, p)) for k, v in list(values.items()))

    def _to_device(self, key: str, value: Any, p: torch.Tensor) -> Any:
        """A state of p's where p is: paged if it shall be, one of our maps if it is one."""
        if not isinstance(value, torch.Tensor) or key not in QUANTIZED_KEYS:
            return value
        if key in _MAPS and value.device != p.device and p.is_cuda:
            own = self._map(_MAPS[key], p.device)
            return own if torch.equal(value.cpu(), self.name2qmap[_MAPS[key]]) else value.to(p.device)
        paged = key in ("state1", "state2") and self._pages(p)
        if value.device == p.device and paged == getattr(value, "is_paged", False):
            return value
        if paged:
            return self._buffer(p, value.shape, value.dtype).copy_(value)
        return value.detach().to(p.device)  # detach: without marks

    # ---- the step ------------------------------------------------------------------------------

    def schedule(self, config: dict[str, Any], step: int) -> dict[str, float]:
        """The scalars of `_C.optimizer_step` for a step counted from 1."""
        betas = config["betas"]
        return {
            "lr": float(config["lr"]),
            "beta1": float(betas[0]),
            "beta2": float(betas[1]),
            "eps": float(config["eps"]),
            "weight_decay": float(config["weight_decay"]),
            "max_unorm": float(config["max_unorm"]),
            "skip_zeros": bool(config["skip_zeros"]),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient: one call of the core per set of scalars."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        calls: dict[tuple[Any, ...], list[tuple[Any, ...]]] = defaultdict(list)
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        overridden = bool(self.mng.index2config or self.mng.pid2config)
        for gindex, group in enumerate(self.param_groups):
            alike: dict[
                tuple[int, ...], list[tuple[Any, ...]]
            ] = {}  # parameters of one call, by maps, step and device
            for pindex, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
                state = self.state[p]
                if not state:
                    self.init_state(group, p, gindex, pindex)
                state["step"] += 1
                target = p
                if not p.is_contiguous():
                    target = p.contiguous()
                    copies.append((p, target))
                maps = state.get("qmap1"), state.get("qmap2")
                short = (id(maps[0]), id(maps[1]), state["step"], p.get_device())
                entries = None if overridden else alike.get(short)
                if entries is None:
                    scalars = self.schedule(self.get_config(gindex, pindex, group), state["step"])
                    entries = calls[(*short[:2], short[3], *scalars.items())]
                    alike[short] = entries
                entries.append(self._entry(target, grad, state))
        for key, entries in calls.items():
            for part in self._prefetched(entries) if self.is_paged else (entries,):
                self._call(dict(key[3:]), part)
        for p, stepped in copies:
            p.copy_(stepped)
        return loss

    @staticmethod
    def _prefetched(entries: list[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
        """The entries in parts whose paged states, few enough to fit together, are on their way to the GPU."""
        part: list[tuple[Any, ...]] = []
        size = 0
        for entry in entries:
            paged = [t for t in entry[0][2:4] if getattr(t, "is_paged", False)]
            more = sum(t.numel() * t.element_size() for t in paged)
            if part and size + more > PREFETCHED_BYTES:
                yield part
                part, size = [], 0
            for buffer in paged:
                prefetch_tensor(buffer)
            part.append(entry)
            size += more
        yield part

    def prefetch_state(self, p: torch.Tensor) -> None:
        """Bring the paged states of p to its GPU, in the order of the current stream."""
        if self.is_paged:
            for name in ("state1", "state2"):
                buffer = self.state[p].get(name)
                if getattr(buffer, "is_paged", False):
                    prefetch_tensor(buffer)

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """One step of one parameter whose state exists, for subclasses with a `step` of their own."""
        state = self.state[p]
        state["step"] += 1
        target = p.contiguous()
        scalars = self.schedule(self.get_config(gindex, pindex, group), state["step"])
        self._call(scalars, [self._entry(target, p.grad, state)])
        if target.data_ptr() != p.data_ptr():
            p.copy_(target)

    @staticmethod
    def _entry(p: torch.Tensor, grad: torch.Tensor, state: dict[str, Any]) -> tuple[Any, ...]:
        """What `_call` needs of a parameter: the tensors of `_C.optimizer_step`, and its maps."""
        get = state.get
        arrays = (p, grad, state["state1"], get("state2"), get("absmax1"), get("absmax2"), get("unorm_vec"))
        return (*arrays, state["step"]), get("qmap1"), get("qmap2")

    def _call(self, scalars: dict[str, Any], entries: list[tuple[Any, ...]]) -> None:
        _, map1, map2 = entries[0]
        tensors = [entry[0] for entry in entries]
        _C.optimizer_step(self.algorithm, tensors, map1=map1, map2=map2, **scalars)

    # ---- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the quantized states of each parameter in a dict of their own, unseen by FSDP."""
        saved = super().state_dict()
        wrapped = {}
        for key, state in saved["state"].items():
            if isinstance(state, dict):
                quantized = {k: v for k, v in state.items() if k in QUANTIZED_KEYS}
                state = {k: v for k, v in state.items() if k not in QUANTIZED_KEYS}
                if quantized:
                    state[WRAPPED_KEY] = quantized
            wrapped[key] = state
        saved["state"] = wrapped
        return saved

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load what `state_dict()` returned, of halfbyte or bitsandbytes, wrapped or not.

        Quantized states keep their dtype; other floating-point tensors take the parameter's.
        """
        saved = deepcopy(state_dict)
        groups, saved_groups = self.param_groups, saved["param_groups"]
        if len(groups) != len(saved_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        if any(len(g["params"]) != len(s["params"]) for g, s in zip(groups, saved_groups, strict=True)):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
            )
        parameters = {
            key: p
            for group, saved_group in zip(groups, saved_groups, strict=True)
            for key, p in zip(saved_group["params"], group["params"], strict=True)
        }
        state: dict[Any, Any] = defaultdict(dict)
        for key, entry in saved["state"].items():
            if key not in parameters:
                state[key] = entry
                continue
            p = parameters[key]
            entry = {**entry, **entry.get(WRAPPED_KEY, {})}
            entry.pop(WRAPPED_KEY, None)
            state[p] = {k: self._cast(k, v, p, move_to_device) for k, v in entry.items()}
        merged = [{**s, "params": g["params"]} for g, s in zip(groups, saved_groups, strict=True)]
        self.__setstate__({"state": state, "param_groups": merged})

    def _cast(self, key: str, value: Any, p: torch.Tensor, move_to_device: bool) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if key in QUANTIZED_KEYS:
            if key in ("state1", "state2"):
                value = value.detach()  # a copy of a paged tensor has its marks, but is not paged
            return self._to_device(key, value, p) if move_to_device else value
        if p.is_floating_point() and value.is_floating_point():
            return value.to(p.dtype)
        return value
