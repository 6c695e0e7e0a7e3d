"""A device that is not the CPU and needs no hardware: what would be a GPU's tensors have shapes and no values.

PyTorch's Python backend for PrivateUse1 gives the device its name, its autograd and its autocast, and FakeTensorMode
runs its operations without kernels. Tensors of the CPU stay real: samplers, files and ledgers work as ever. Inside
OtherDevice
- a tensor of the CPU with a dimension among the device's is an error, as on a GPU;
- so is what needs values of the device: item(), bool(), nonzero(), indexing by a mask, a copy to the CPU. That is
  allowed in base.device.read_back() alone, whose places are noted, and which gives zeros, or `answers[place]`;
- each copy to the device is noted, as "upload" from base.device.upload(), and else as "blocking";
- each random number drawn there is noted, and whether a generator was named for it;
- with `counting`, bytes held on the device, and their peak, are counted.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from base import device as crossing

TYPE = "npu"
aten = torch.ops.aten
# Autocast's lists for CUDA (docs.pytorch.org/docs/stable/amp.html), as far as the models have such operations.
LOWER = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv",
         "scaled_dot_product_attention")
FLOAT32 = ("exp", "log", "log1p", "expm1", "pow.Tensor_Scalar", "reciprocal", "rsqrt", "layer_norm", "softmax.int",
           "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "prod", "norm.Scalar", "nll_loss",
           "cross_entropy_loss")


class Module(_DummyBackendModule):
    """torch.npu. available: inside OtherDevice alone, so that torch.nn.DataParallel does not take it in other tests."""

    available = False

    def is_available(self) -> bool:
        return self.available

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=None) -> Tensor:
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device=None) -> None:
        pass


def register() -> torch.device:
    """Make the device known to torch, once a process: it cannot be taken back, and nothing else notices it."""
    _setup_privateuseone_for_python_backend(TYPE, Module())
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    every, operators = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

    def add(name: str, dtype: torch.dtype | None) -> None:
        packet, _, overload = name.partition(".")
        function = getattr(getattr(aten, packet), overload or "default")

        def cast(x: Tensor) -> Tensor:
            to = dtype or torch.get_autocast_dtype(TYPE)
            return x.to(to) if x.is_floating_point() and x.device.type == TYPE and x.dtype != torch.float64 else x

        def call(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(key):
                args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
                return function(*args, **kwargs)

        operators.impl(name, call, "AutocastPrivateUse1")

    for name in LOWER:
        add(name, None)
    for name in FLOAT32:
        add(name, torch.float32)
    LIBRARIES.extend([every, operators])
    return torch.device(TYPE, 0)


LIBRARIES: list[torch.library.Library] = []  # what they registered goes with them
DEVICE = register()


def place_of_read() -> str | None:
    """The place that base.device.read_back() was called with, where it is what reads now."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not crossing.read_back.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["place"]


def is_upload() -> bool:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not crossing.upload.__code__:
        frame = frame.f_back
    return frame is not None


class OtherDevice(TorchDispatchMode):
    """Inside, DEVICE can be computed on. events: (kind, place or operation) in their order."""

    def __init__(self, answers: dict[str, Callable[[Tensor], Tensor]] | None = None):
        super().__init__()
        self.fake = FakeTensorMode()
        self.answers, self.events, self.generators = answers or {}, [], []
        self.counting, self.held, self.peak = False, 0, 0
        self.storages: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True  # nothing is compiled here, and the import takes seconds

    def of(self, kind: str) -> list[str]:
        return [what for found, what in self.events if found == kind]

    def forget(self) -> None:
        self.events.clear()
        self.peak = self.held

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        wanted = kwargs.get("device", next((leaf for leaf in args if isinstance(leaf, torch.device)), None))
        if not ours and (wanted is None or torch.device(wanted).type != TYPE):
            return func(*args, **kwargs)
        packet = func.overloadpacket
        copies = packet in (aten._to_copy, aten.to)  # the second in inference mode
        if copies and ours and wanted is not None and wanted.type == "cpu":
            return self.read(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        if packet is aten.copy_ and not isinstance(args[0], FakeTensor):
            return args[0].copy_(self.read(args[1]))
        if copies or packet is aten.copy_:
            self.note_upload(args, packet)
        elif strangers := [tensor for tensor in tensors if not isinstance(tensor, FakeTensor) and tensor.dim()]:
            raise AssertionError(f"{func}: a tensor {tuple(strangers[0].shape)} of the CPU among the device's")
        if torch.Tag.nondeterministic_seeded in func.tags:
            named = " by a generator" if kwargs.get("generator") is not None else ""
            self.events.append(("random", packet.__name__ + named))
        if any(not isinstance(tensor, FakeTensor) for tensor in tensors):
            args, kwargs = tree_map_only(Tensor, self.faked, (args, kwargs))
        with self.fake:
            result = func(*args, **kwargs)
        if self.counting:
            for tensor in tree_leaves(result):
                if isinstance(tensor, FakeTensor) and tensor.device.type == TYPE:
                    self.count(tensor)
        return result

    def faked(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with self.fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    def read(self, tensor: Tensor) -> Tensor:
        place = place_of_read()
        if place is None:
            raise AssertionError(f"{tuple(tensor.shape)} {tensor.dtype} read from the device, not by read_back()")
        self.events.append(("read", place))
        zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
        return self.answers.get(place, lambda x: x)(zeros)

    def note_upload(self, args, packet) -> None:
        source = args[1] if packet is aten.copy_ else args[0]
        if not isinstance(source, FakeTensor):
            self.events.append(("upload" if is_upload() else "blocking", str(tuple(source.shape))))

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.storages:
            return
        self.storages.add(storage._cdata)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())

    def freed(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.held -= size


@contextlib.contextmanager
def other_device(monkeypatch, answers: dict[str, Callable[[Tensor], Tensor]] | None = None):
    """An OtherDevice that is entered, with generators of torch, and with the tables of sizes by kind of device.

    Modules that move there keep their tied weights tied, as on a GPU."""
    from base import products
    from privacy import unit_gradients
    from run import settings

    mode, generator = OtherDevice(answers), torch.Generator

    def make(device: torch.device | str = "cpu") -> torch.Generator:
        mode.generators.append(torch.device(device))
        return generator("cpu")

    for table in (products.BLOCK_ROWS, unit_gradients.ADDED_ENTRIES, unit_gradients.MULTIPLIED_ENTRIES,
                  settings.DEFAULT_TOKENS):
        monkeypatch.setitem(table, TYPE, table["cuda"])
    monkeypatch.setattr(torch, "Generator", make)
    monkeypatch.setattr(Module, "available", True)
    moved: dict[int, torch.nn.Parameter] = {}

    def apply(module: torch.nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        """nn.Module._apply, which puts a new parameter into each place where a tensor's class changes: into all places
        of one parameter the same, as where it changes a parameter itself."""
        for child in module.children():
            child._apply(function)
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in moved:
                with torch.no_grad():
                    value = function(parameter)
                if isinstance(value, FakeTensor) == isinstance(parameter.data, FakeTensor):
                    parameter.data = value  # twice where two share it: the second time nothing moves
                else:
                    new = torch.nn.Parameter(value, parameter.requires_grad)
                    kept.extend([parameter, new])
                    moved[id(parameter)] = new
            if id(parameter) in moved:
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else function(buffer)
        return module

    kept: list[torch.nn.Parameter] = []  # so that no other object gets their ids
    monkeypatch.setattr(torch.nn.Module, "_apply", apply)
    with mode:
        yield mode
