"""No step copies from the host or waits for the device: counted on fake CUDA tensors, on any CPU.

FakeTensorMode computes shapes and devices alone. The forward passes, losses, optimizers and moving
averages run through it as they are. Backward passes cannot: the autograd engine asks for the
streams of a real device. So `backward` and `torch.autograd.grad` are stubs that give zeros, and
what autograd does on the way back, which is PyTorch's own, is not seen.
"""
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
from common import augment, lr_factor, target_tau
from test_methods import SCRIPTS, make

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, "_ensureCUDADeviceGuardSet"),
    reason="this torch cannot index fake CUDA tensors without a driver")
aten = torch.ops.aten
WAITS = {aten.nonzero, aten.equal, aten.masked_select}


class Count(TorchDispatchMode):
    """Note copies between the host and the device, and what makes the host wait for a value."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        kinds = {x.device.type for x in tensors if x.dim() > 0}
        to = (kwargs or {}).get("device")
        moved = to is not None and tensors and {torch.device(to).type} != {
            x.device.type for x in tensors}
        if function.overloadpacket is aten._local_scalar_dense:
            self.seen += ["item"] if tensors[0].is_cuda else []
            return 1                                                    # of no account
        by_mask = function.overloadpacket in (aten.index, aten.index_put_) and any(
            x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if x is not None)
        if moved or len(kinds) > 1 or by_mask or function.overloadpacket in WAITS:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def to(module, device=None, **_):
    """Module.to, which cannot move fake parameters: put others in their place."""
    for part in module.modules() if device else []:
        for name, p in part.named_parameters(recurse=False):
            moved = torch.zeros(p.shape, device=device)
            setattr(part, name, torch.nn.Parameter(moved, requires_grad=p.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    return module


@pytest.fixture
def cuda(monkeypatch):
    """A device of fake tensors; autograd gives zeros to the parameters handed to this."""
    def backward(loss, *_, **__):
        for p in learning:
            p.grad = torch.zeros_like(p)

    def register(parameters):
        learning[:] = [p for p in parameters if p.requires_grad]
        return learning
    learning = []
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", lambda of, at, **_: [torch.zeros_like(at)])
    monkeypatch.setattr(torch.nn.Module, "to", to)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield register


def counted(function, *args):
    with Count() as count:
        function(*args)
    return count.seen


def images(n=16):
    return torch.zeros(n, 3, 32, 32, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_training_step(script, cuda):
    """That of the script's loop, its batch included."""
    with unset_fake_temporarily():                      # deepcopy cannot copy fake parameters
        model = make(script, layers="all")
    model.to("cuda")
    optimizer = torch.optim.Adam(cuda(model.parameters()), lr=3e-3, weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor("cosine", 100))
    args = SimpleNamespace(batch_size=8, seed=0)
    run = SimpleNamespace(args=args, steps=[], model=model, noted=False)
    batches = common.Run.batches(run, images(64), 1)

    def step():
        loss, terms = model(next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if hasattr(model, "update_target"):
            model.update_target(target_tau(0.99, schedule.last_epoch / 100))
        common.Run.log(run, loss=loss, **terms)
    step()                                              # copies the order of the epoch's batches
    assert counted(step) == []


@pytest.mark.parametrize("objective", common.EBM_ADAM)
def test_an_ebm_step(objective, cuda):
    state = common.ebm_networks(SimpleNamespace(width=8, device="cuda", ebm_objective=objective))
    cuda(p for part in state.values() if isinstance(part, torch.nn.Module)
         for p in part.parameters())
    x = torch.rand(8, 3, 32, 32, device="cuda")
    step = partial(getattr(common, f"{objective}_step"), x, 1.0, **state)
    step()
    assert counted(step) == []


@pytest.mark.parametrize("fault, name", [
    (lambda x: torch.tensor([0.3, 0.6], device="cuda"), "aten._to_copy.default"),
    (lambda x: x.copy_(torch.zeros(2, 3)), "aten.copy_.default"),
    (lambda x: x[torch.tensor([0, 1])], "aten.index.Tensor"),
    (lambda x: x.cpu(), "aten._to_copy.default"), (lambda x: x.sum().item(), "item")])
def test_faults_are_noticed(fault, name, cuda, monkeypatch):
    x = torch.rand(2, 3, device="cuda")
    assert counted(fault, x) == [name]
    real = common.rgb_to_grayscale
    monkeypatch.setattr(common, "rgb_to_grayscale",
                        lambda x: (fault(x[:2, :, 0, 0].clone()), real(x))[1])
    assert name in counted(augment, images())
