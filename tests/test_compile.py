"""--compile: the same losses, weights of the same names. Mostly without the C++ code generator,
which takes minutes over an encoder on a CPU: TorchDynamo and, for the script that has the most
graphs, the compiled backward passes are real.
"""
import os
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

import byol_disc
import byol_langevin
import common
import simclr_disc
import simclr_langevin
from common import (Discriminator, Encoder, UserError, augment, compile_model, draw_shapes,
                    langevin, make_parser, prepare_device)
from linear_eval import extract_features
from test_augmentation import distance, picture, statistics
from test_methods import make

YES, NO = SimpleNamespace(compile=True), SimpleNamespace(compile=False)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def losses(method):
    """The losses of three steps of plain gradient descent, and the encoder's mean feature."""
    x = draw_shapes(8, seed=3)[0]
    torch.manual_seed(1)
    optimizer = torch.optim.SGD((p for p in method.parameters() if p.requires_grad), 1e-2)
    rows = []
    for _ in range(3):
        loss, _ = method(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(method, "update_target"):
            method.update_target(0.9)
        rows.append(loss.item())
    return [*rows, extract_features(method.encoder, x).mean().item()]


@pytest.mark.parametrize("script, graphs, backend", [
    (simclr_disc, 4, "eager"),          # augment, encoder in train and evaluation mode, D;
    (byol_disc, 5, "eager"),            # the target;
    (simclr_langevin, 6, "eager"),      # augment and encoders once more for a generated view
    (byol_langevin, 8, "aot_eager")])
def test_losses_are_those_without(script, graphs, backend, monkeypatch):
    plain = make(script)
    expected, names = losses(plain), list(plain.state_dict())
    assert counters["stats"]["unique_graphs"] == 0
    losses(compile_model(make(script), NO))
    assert counters["stats"]["unique_graphs"] == 0                      # a control
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    method = compile_model(make(script), YES)
    assert losses(method) == pytest.approx(expected, abs=1e-3)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert list(method.state_dict()) == names                           # no prefix of a wrapper
    method.load_state_dict(plain.state_dict())
    copy = deepcopy(method.encoder)
    assert isinstance(copy, Encoder) and copy._compiled_call_impl is None
    assert len({round(value, 3) for value in expected}) == 4            # each step changes the loss


def test_cpus_whose_compiled_gradients_are_nan_are_refused(monkeypatch):
    for capability, device, refused in [("AVX2", "cpu", True), ("AVX2", "cpu:0", True),
                                        ("AVX512", "cpu", False), ("AVX2", "meta", False)]:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))    # is there
        with pytest.raises(UserError, match="--compile: ") if refused else nullcontext():
            prepare_device(SimpleNamespace(device=device, compile=True))
        prepare_device(SimpleNamespace(device=device, compile=False))


def test_several_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for ranks, refused in [(1, False), (2, True)]:
        monkeypatch.setattr(common, "world_size", lambda: ranks)
        with pytest.raises(UserError, match="several ranks") if refused else nullcontext():
            prepare_device(SimpleNamespace(device="cpu", compile=True))
        prepare_device(SimpleNamespace(device="cpu", compile=False))


@pytest.mark.skipif("INDUCTOR" not in os.environ, reason="half a minute for a C++ compiler; "
                    "INDUCTOR=1 in the environment asks for it")
def test_a_chain_by_the_code_generator_is_that_without():
    method = torch.nn.Module()
    method.f = Discriminator(8).requires_grad_(False)
    x = torch.rand(4, 3, 32, 32)
    expected = langevin(method.f, x, 3, 10, 0.0)
    assert (expected - x).abs().max() > 1e-3
    method.augment = augment
    compile_model(method, YES)
    assert torch.allclose(langevin(method.f, x, 3, 10, 0.0), expected, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif("INDUCTOR" not in os.environ, reason="as above")
def test_views_by_the_code_generator_are_of_the_same_distribution():
    torch.manual_seed(0)
    method, x = torch.nn.Module(), picture().expand(4000, 3, 32, 32)
    method.augment = augment
    plain, views = augment(x), compile_model(method, YES).augment(x)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for name, values in statistics(plain).items():
        assert distance(values, statistics(views)[name]) < 0.05, name
    assert distance(statistics(plain)["mean"], statistics(0.95 * views)["mean"]) > 0.05


def test_it_is_off_by_default():
    parse = make_parser("x").parse_args
    assert parse([]).compile is False and parse(["--compile"]).compile is True
