"""The four methods against their equations, written again with a separate pass for each view."""
from contextlib import nullcontext
from copy import deepcopy
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import byol_disc
import byol_langevin
import common
import simclr_disc
import simclr_langevin
from common import Discriminator, Encoder, draw_shapes, nt_xent

SCRIPTS = [simclr_disc, byol_disc, simclr_langevin, byol_langevin]
FLAGS = dict(width=8, emb=8, layers="last", temperature=0.3, use="auxiliary", alpha=0.7, steps=2,
             view="langevin", disc_input="augment", step_size=7, noise_std=2.0, noise_unit=0.004,
             grad_clip=0.02)


def make(script, **flags):
    """The script's method with a third view of weight 0.5, and random target weights."""
    torch.manual_seed(0)
    args = SimpleNamespace(**{**FLAGS, "coeff": 0.5, **flags})
    f = Discriminator(8).requires_grad_(False)
    torch.manual_seed(0)
    return (script.BYOL if hasattr(script, "BYOL") else script.SimCLR)(args, f)


def targets(method):
    return [p for name, p in method.named_parameters() if name.startswith("target")]


@pytest.fixture
def views(monkeypatch):
    """Three known views, which `augment` hands out in turn, for each 16 images one."""
    views = [draw_shapes(16, seed=s)[0] / (255 * s - 510) for s in (3, 4, 5)]       # each darker
    for script in SCRIPTS:
        queue = list(views)
        monkeypatch.setattr(script, "augment", lambda x, queue=queue: torch.cat(
            [queue.pop(0) for _ in range(len(x) // 16)]))
        monkeypatch.setattr(script, "langevin_view", lambda f, x, args: x, raising=False)
    return views


X = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)       # a batch of which `views` are


def distance(a, b):
    return (F.normalize(a) - F.normalize(b)).square().sum(1).mean()


@pytest.mark.parametrize("script, layers", [*zip(SCRIPTS, ["all", "last", "", ""])])
def test_loss_equals_the_equations(script, layers, views):
    method = make(script, layers=layers).eval()         # so that BatchNorm lets passes be separate
    torch.manual_seed(1)
    for p in targets(method):
        p.add_(0.05 * torch.randn_like(p))              # a target unlike the online network
    loss, terms = method(X)

    z = [method.projector(method.encoder(v)) for v in views]
    if hasattr(method, "view_projector"):
        h3 = method.discriminator.features(views[2], layers)
        z[2] = method.view_projector(h3)
    if targets(method):
        t = [method.target_projector(method.target_encoder(v)) for v in views]
        if hasattr(method, "view_projector"):
            t[2] = method.target_view_projector(h3)
        p = [method.predictor(view) for view in z]

    def pair(a, b):
        if targets(method):
            return distance(p[a], t[b]) + distance(p[b], t[a])
        return nt_xent(z[a], z[b], 0.3)

    pairs = {f"pair{a + 1}{b + 1}": pair(a, b).item() for a, b in combinations(range(3), 2)}
    for name, value in pairs.items():
        assert terms[name].item() == pytest.approx(value, abs=2e-5)
    expected = pairs["pair12"] + 0.5 * (pairs["pair13"] + pairs["pair23"]) / 2
    assert loss.item() == pytest.approx(expected, abs=2e-5)
    assert len({round(value, 4) for value in pairs.values()}) == 3      # no pair is another's
    spread = [(F.normalize(view)).std(0).mean().item() * 8 ** 0.5 for view in z]
    assert terms["z_std"].item() == pytest.approx(spread[0], abs=1e-4) != spread[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_online_networks_learn_and_nothing_else(script, views):
    method = make(script)
    method(X)[0].backward()
    still = {"f" if hasattr(method, "f") else "discriminator"} | {
        name for name, _ in method.named_children() if name.startswith("target")}
    for name, p in method.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (name.split(".")[0] not in still), name


@pytest.mark.parametrize("script", [simclr_langevin, byol_langevin])
def test_a_generated_view_leaves_the_running_statistics_alone(script, monkeypatch):
    x = draw_shapes(16, seed=3)[0]

    def buffers(**flags):
        method = make(script, **flags)
        torch.manual_seed(2)
        method(x)
        return torch.cat([b.flatten().float() for b in method.buffers()])

    plain = buffers(coeff=0)
    assert torch.equal(buffers(), plain)
    monkeypatch.setattr(script, "batch_statistics", lambda _: nullcontext())
    assert not torch.equal(buffers(), plain)


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_view_passes_in_a_batch_of_its_own(script, views):
    """The second view's statistics move the running mean by a tenth, after the first's did."""
    method = make(script, coeff=0)
    convolution, norm = deepcopy(method.encoder.net[0]), method.encoder.net[1]
    method(X)
    mean = [convolution((view - 0.5) / 0.25).mean((0, 2, 3)) for view in views]
    assert torch.allclose(norm.running_mean, 0.09 * mean[0] + 0.1 * mean[1], atol=1e-5)
    assert not torch.allclose(norm.running_mean, 0.05 * (mean[0] + mean[1]), atol=1e-5)


@pytest.mark.parametrize("script", [simclr_langevin, simclr_disc])
def test_simclrs_projector_sees_both_views_together(script, views):
    method = make(script, coeff=0)
    h = torch.cat([method.encoder(view) for view in views[:2]])
    first = F.linear(h, method.projector[0][0].weight, method.projector[0][0].bias)
    method(X)
    norm = method.projector[0][1]
    assert torch.allclose(norm.running_mean, 0.1 * first.mean(0), atol=1e-5)
    apart = 0.09 * first[:16].mean(0) + 0.1 * first[16:].mean(0)
    assert not torch.allclose(norm.running_mean, apart, atol=1e-5)
    assert norm.num_batches_tracked == method.projector[1].num_batches_tracked == 1


@pytest.mark.parametrize("script, flags", [
    (simclr_disc, {}), (byol_disc, {}),
    (simclr_langevin, {"view": "augment"}), (byol_langevin, {"view": "augment"})])
def test_every_view_is_of_the_batch_itself(script, flags, monkeypatch):
    x, seen = draw_shapes(16, seed=3)[0], []
    monkeypatch.setattr(script, "augment", lambda x: seen.append(x) or torch.rand(x.shape))
    monkeypatch.setattr(common, "langevin", None)                       # it has no chain
    make(script, **flags)(x)
    assert len(seen) == 1 and torch.equal(seen[0], torch.cat([x, x, x]))


@pytest.mark.parametrize("script", [simclr_langevin, byol_langevin])
def test_the_third_view_is_the_end_of_a_chain_augmented(script, monkeypatch):
    """The chain itself is tested in test_loops.py."""
    x, seen, calls = draw_shapes(16, seed=3)[0], [], []
    monkeypatch.setattr(script, "augment", lambda x: seen.append(x) or torch.rand(x.shape))
    monkeypatch.setattr(script, "langevin_view", lambda *given: calls.append(given) or 1 - x / 255)
    method = make(script)
    method(x)
    assert calls == [(method.f, x, method.args)]
    assert all(map(torch.equal, seen, [torch.cat([x, x]), 1 - x / 255])) and len(seen) == 2


@pytest.mark.parametrize("script", [byol_langevin, byol_disc])
def test_each_target_follows_its_online_network(script):
    method = make(script)
    online = {name: method.get_parameter(name.removeprefix("target_"))
              for name, _ in method.named_parameters() if name.startswith("target_")}
    assert all(torch.equal(method.get_parameter(name), online[name]) for name in online)
    assert {name.split(".")[0] for name in online} == {"target_encoder", "target_projector"} | (
        {"target_view_projector"} if script is byol_disc else set())
    for p in method.parameters():
        p.data += 0.1 * torch.randn_like(p)
    before = deepcopy(method.state_dict())
    method.update_target(0.75)
    for name, p in method.named_parameters():
        expected = before[name]
        if name in online:
            expected = 0.75 * expected + 0.25 * before[name.removeprefix("target_")]
            assert not torch.allclose(p, before[name])
        assert torch.allclose(p, expected, atol=1e-6)


@pytest.mark.parametrize("script, norms", [*zip(SCRIPTS, 2 * [[1024, 24], [1024]])])
def test_heads_are_the_base_codes(script, norms):
    """Hidden layers of 1024; a BatchNorm after SimCLR's projectors alone."""
    heads = [module for module in make(script, emb=24).children()
             if not isinstance(module, (Encoder, Discriminator))]
    assert len(heads) >= 1
    for head in heads:
        layers = [m for m in head.modules() if isinstance(m, (nn.Linear, nn.BatchNorm1d))]
        assert [m.out_features for m in layers if isinstance(m, nn.Linear)] == [1024, 24]
        assert [m.num_features for m in layers if isinstance(m, nn.BatchNorm1d)] == norms


DECK = dict(epochs=1000, lr=3e-3, schedule="step", emb=64, width=64, seed=0, subset=0,
            ebm_iters=4000, dataset="cifar10")
DISC = dict(coeff=0.1, layers="last")
LANGEVIN = dict(coeff=0.01, steps=15, step_size=10, noise_std=1.0, noise_unit=0.005,
                grad_clip=0.01, alpha=0.6, use="auxiliary", view="langevin")
OF_SIMCLR, OF_BYOL = dict(batch_size=512, temperature=0.5), dict(batch_size=256, tau=0.99)


@pytest.mark.parametrize("script, defaults", [
    (simclr_disc, DISC | OF_SIMCLR), (byol_disc, DISC | OF_BYOL),
    (simclr_langevin, LANGEVIN | OF_SIMCLR), (byol_langevin, LANGEVIN | OF_BYOL)])
def test_defaults_are_the_decks(script, defaults, monkeypatch):
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py"])
    args = vars(script.parse())
    assert {flag: args[flag] for flag in DECK | defaults} == DECK | defaults


@pytest.mark.parametrize("pair", [(simclr_disc, simclr_langevin), (byol_disc, byol_langevin)])
def test_coeff_0_is_one_baseline_without_a_third_view(pair):
    x, losses = draw_shapes(16, seed=3)[0], []
    for script in pair:
        method = make(script, coeff=0)
        torch.manual_seed(2)
        loss, terms = method(x)
        assert torch.equal(loss, terms["pair12"]) and set(terms) == {"pair12", "z_std"}
        losses.append((loss.item(), terms["z_std"].item()))
        with_view = dict(make(script).named_parameters())               # it starts alike
        assert all(torch.equal(p, with_view[name]) for name, p in method.named_parameters())
    assert losses[0] == losses[1]
    assert not make(pair[1], use="dataset").third_view                  # nor has it one


@pytest.mark.parametrize("script", [simclr_disc, byol_disc])
def test_disc_input_image_is_the_image_itself(script, monkeypatch):
    """The discriminator sees x / 255, and a third augmented view otherwise."""
    x, seen = draw_shapes(16, seed=3)[0], []
    monkeypatch.setattr(script, "augment", lambda x: torch.rand(x.shape))
    for disc_input in ("image", "augment"):
        method = make(script, disc_input=disc_input)
        features = method.discriminator.features
        method.discriminator.features = lambda v, layers: seen.append(v) or features(v, layers)
        method(x)
    assert [torch.equal(v, x / 255) for v in seen] == [True, False]
