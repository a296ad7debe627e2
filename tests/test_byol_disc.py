"""The method's module against its equations, written again with separate passes."""
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import byol_disc
from byol_disc import BYOL
from common import Discriminator, draw_shapes


def make(coeff=0.5, layers="last"):
    torch.manual_seed(0)
    discriminator = Discriminator(4).requires_grad_(False)
    return BYOL(SimpleNamespace(width=4, emb=8, coeff=coeff, layers=layers), discriminator)


@pytest.fixture
def views(monkeypatch):
    """Three known views, which `augment` hands out in turn."""
    views = [draw_shapes(16, seed=s)[0] / 255 for s in (3, 4, 5)]
    queue = list(views)
    monkeypatch.setattr(byol_disc, "augment", lambda x: queue.pop(0))
    return views


def targets(method):
    return [p for name, p in method.named_parameters() if name.startswith("target")]


def distance(a, b):
    return (F.normalize(a) - F.normalize(b)).square().sum(1).mean()


@pytest.mark.parametrize("layers", ["last", "all"])
def test_loss_equals_the_equations(views, layers):
    method = make(coeff=0.5, layers=layers)
    method.eval()                                   # BatchNorm by running statistics: passes may be separate
    torch.manual_seed(1)
    for p in targets(method):
        p.add_(0.05 * torch.randn_like(p))          # a target unlike the online network
    loss, terms = method(None)

    h3 = method.discriminator.features(views[2], layers)
    p = [method.predictor(method.projector(method.encoder(v))) for v in views[:2]]
    t = [method.target_projector(method.target_encoder(v)) for v in views[:2]]
    p.append(method.predictor(method.view_projector(h3)))
    t.append(method.target_view_projector(h3))

    def pair(a, b):
        return distance(p[a], t[b]) + distance(p[b], t[a])

    expected = pair(0, 1) + 0.5 * (pair(0, 2) + pair(1, 2)) / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    one_way = distance(p[0], t[1]) * 2 + 0.5 * (pair(0, 2) + pair(1, 2)) / 2
    assert loss.item() != pytest.approx(one_way.item(), abs=1e-5)
    assert terms["pair23"].item() == pytest.approx(pair(1, 2).item(), abs=1e-5)


def test_gradient_flows_to_the_online_networks_alone(views):
    method = make()
    method(None)[0].backward()
    for module in (method.encoder, method.projector, method.predictor, method.view_projector):
        assert all(p.grad is not None for p in module.parameters())
        assert sum(p.grad.abs().sum() for p in module.parameters()) > 0
    assert all(p.grad is None for p in [*method.discriminator.parameters(), *targets(method)])


def test_the_views_projector_learns_through_its_prediction_alone(views, monkeypatch):
    method = make()
    losses = []
    monkeypatch.setattr(byol_disc, "byol_loss",
                        lambda p, t: losses.append((p, t)) or distance(p, t.detach()))
    method(None)
    of_view = [i for i, (p, _) in enumerate(losses)
               if torch.autograd.grad(p.sum(), method.view_projector[3].weight, retain_graph=True,
                                      allow_unused=True)[0] is not None]
    assert len(losses) == 6 and len(of_view) == 2   # p3 against t1 and against t2
    assert not any(t.requires_grad for _, t in losses)


def test_a_step_leaves_the_discriminator_and_moves_the_rest():
    method = make()
    before = deepcopy(method.state_dict())
    optimizer = torch.optim.Adam((p for p in method.parameters() if p.requires_grad), 1e-2)
    method(draw_shapes(16, seed=3)[0])[0].backward()
    optimizer.step()
    method.move_target(0.9)
    moved = {name.split(".")[0] for name, value in method.named_parameters()
             if not torch.equal(value, before[name])}
    assert moved == {"encoder", "projector", "predictor", "view_projector", "target_encoder", "target_projector",
                     "target_view_projector"}


def test_coeff_0_has_no_third_view():
    method = make(coeff=0)
    assert not hasattr(method, "discriminator") and not hasattr(method, "view_projector")
    loss, terms = method(draw_shapes(16, seed=3)[0])
    assert torch.equal(loss, terms["pair12"]) and set(terms) == {"pair12", "z_std"}
    with_view = dict(make(coeff=0.5).named_parameters())    # and the same weights to begin with
    assert all(torch.equal(p, with_view[name]) for name, p in method.named_parameters())
