"""Forward and backward as a CUDA graph: a stand-in on the CPU records operations and replays them.

As on a GPU, what is captured is not computed: what it changed is put back when capture ends. A
replay computes the same operations on the same memory, and no line of Python.
"""
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import common
from common import UserError, draw_shapes, graphed
from test_methods import SCRIPTS, make

GPU, CPU = (SimpleNamespace(device=device, graph=device == "cuda") for device in ("cuda", "cpu"))


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Graph(TorchDispatchMode):
    """Operations with their arguments and results, in the order in which they were called."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nsecond line")
        for x in tensors((args, kwargs)):               # BatchNorm's schema hides what it changes
            if x.untyped_storage().data_ptr() not in self.made:
                self.before.setdefault(x.data_ptr(), (x, x.clone()))
        result = function(*args, **(kwargs or {}))
        self.calls.append(tree_map_only(torch.Tensor, torch.Tensor.detach,
                                        (function, args, kwargs or {}, result)))
        self.made |= {x.untyped_storage().data_ptr() for x in tensors(result)} - {
            x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tensors(result), tensors(function(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for what `graphed` takes of torch.cuda; a list of what was done on the stream."""
    done = []

    class Stream:
        def wait_stream(self, other):
            done.append("wait")

    @contextmanager
    def stream(on):
        done.append("enter")
        yield

    @contextmanager
    def graph(graph, stream):
        done.append("capture")
        state = torch.get_rng_state()
        try:
            with graph:
                yield
        except Exception:
            raise RuntimeError("operation failed due to a previous error during capture")
        torch.set_rng_state(state)
        for x, before in graph.before.values():
            x.detach().copy_(before)

    for name, value in dict(Stream=Stream, CUDAGraph=Graph, stream=stream, graph=graph,
                            current_stream=Stream).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return done


def train(script, args):
    """Weights, buffers and logged terms after seven steps, in two epochs, seeded each."""
    method, rows = make(script), []
    optimizer = torch.optim.Adam((p for p in method.parameters() if p.requires_grad), 1e-3)

    def forward_backward(x):
        optimizer.zero_grad()
        loss, terms = method(x)
        loss.backward()
        return {"loss": loss, **terms}

    step = graphed(forward_backward, args)
    for i, x in enumerate(draw_shapes(7 * 16, seed=3)[0].split(16)):
        if i in (0, 5):
            torch.manual_seed(i)
        rows.append(step(x))
        optimizer.step()
        if hasattr(method, "update_target"):
            method.update_target(0.9)
    return tensors([method.state_dict(), rows])


@pytest.mark.parametrize("script", SCRIPTS)
def test_captured_steps_are_the_eager_ones(script, gpu):
    """The draws too, of an epoch that is seeded after the capture."""
    eager = train(script, CPU)
    assert gpu == []
    replayed = train(script, GPU)
    assert gpu.count("capture") == 1 and gpu.count("enter") == 7 == gpu.count("wait") / 2
    assert all(map(torch.equal, eager, replayed))


def test_what_waits_for_the_host_is_one_line(gpu):
    step = graphed(lambda x: {"max": x / x.max().item()}, GPU)
    for _ in range(3):
        step(torch.ones(2))
    with pytest.raises(UserError, match=r"captured .oper.* capturing\); .* without --graph"):
        step(torch.ones(2))


@pytest.mark.parametrize("flags", [{"device": "cpu"}, {"ranks": 2}, {"hip": "6.0"}])
def test_elsewhere_the_step_is_left_as_it_is_with_a_line(flags, gpu, monkeypatch, capsys):
    assert graphed(train, SimpleNamespace(device="cuda:0", graph=False)) is train
    args = SimpleNamespace(device=flags.get("device", "cuda:0"), graph=True)
    assert graphed(train, GPU) is not train             # a control
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(common, "world_size", lambda: flags.get("ranks", 1))
    monkeypatch.setattr(torch.version, "hip", flags.get("hip"))
    assert graphed(train, args) is train and "--graph is ignored" in capsys.readouterr().out
