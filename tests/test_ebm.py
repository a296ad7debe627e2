"""EBM training: its step against its formula, its file and log, and what stops it."""
import json
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils import parametrize

import common
import linear_eval
from common import Discriminator, Generator, UserError, draw_shapes, train_ebm


def parse(*flags):
    return common.parse_flags(common.make_parser("x", common.__file__), flags)


def flags(tmp_path, *more):
    return parse("--dataset", "synthetic", "--subset", "100", "--width", "8", "--ebm-iters", "3",
                 "--precision", "fp32", "--ebm", str(tmp_path / "ebm.pt"), *more)


@pytest.fixture
def short_chains(monkeypatch):
    """One Langevin step, and two of ADE's, in place of up to thirty, which are slow."""
    monkeypatch.setattr(common, "langevin", lambda f, x, steps, langevin=common.langevin, **flags:
                        langevin(f, x, steps=1, **flags))
    monkeypatch.setattr(common, "adversarial_dynamics",
                        partial(common.adversarial_dynamics, steps=2))


def buffer_of(n):
    """The state of cd that is no network: the ends of n chains."""
    replay = torch.nn.Module()
    replay.register_buffer("images", torch.rand(n, 3, 32, 32).half())
    return replay


def turned_loss(d, x):
    """Cross entropy of the quarter turn, over each of the images x turned in each way."""
    terms = [F.cross_entropy(d.rotation(d.features(torch.rot90(image[None], k, (2, 3)))),
                             torch.tensor([k])) for image in x for k in range(4)]
    return sum(terms) / len(terms)


def moved(module, step):
    """How far each of the module's parameters goes down in a step. An old gradient is no part."""
    before = [p.detach().clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    step()
    return [old - new.detach() for old, new in zip(before, module.parameters())]


def sgd(module, lr):
    return torch.optim.SGD(module.parameters(), lr=lr)


def assert_step(moved, gradient, wrong, rel, tiny):
    """The step is the gradient, and is none of those that are wrong."""
    def close(to):
        return all((a - b).norm() < rel * b.norm() + tiny for a, b in zip(moved, to, strict=True))
    assert close(gradient) and not any(map(close, wrong))


@pytest.mark.parametrize("objective", ["gan", "cd"])
def test_discriminator_step_equals_its_formula(monkeypatch, objective):
    """Image by image, with the penalty from the Jacobian."""
    x, x_s, starts = draw_shapes(8, seed=3)[0] / 255, torch.rand(8, 3, 32, 32), []
    monkeypatch.setattr(common, "langevin",
                        lambda f, x, **flags: starts.append((x, flags)) or x_s)
    d, g = Discriminator(8), Generator(8)
    weights = {name: p.detach().clone().requires_grad_() for name, p in d.named_parameters()}

    def f(image):
        return torch.func.functional_call(d, weights, image[None])[0]

    def slope(image):
        return torch.autograd.functional.jacobian(f, image, create_graph=True).square().sum()

    def energies(a, b):
        if objective == "cd":
            return f(b) - f(a) + f(a) ** 2 + f(b) ** 2
        return F.softplus(-f(a)) + F.softplus(f(b))

    def gradient(share, weight):
        loss = sum(energies(a, b) + share * (slope(a) + slope(b)) for a, b in zip(x, x_s)) / 8
        both = [torch.autograd.grad(of, at, allow_unused=True, materialize_grads=True) for of, at in
                [(loss, list(weights.values())), (turned_loss(d, x[:2]), d.parameters())]]
        return [a + weight * b for a, b in zip(*both)]

    expected, wrong = gradient(5, 0.7), [gradient(2.5, 0.7), gradient(5, 0.9)]
    if objective == "gan":
        step = moved(d, lambda: common.gan_step(x, 0.7, d, sgd(d, 1.0), g, sgd(g, 0.0)))
    else:
        step = moved(d, lambda: common.cd_step(x, 0.7, d, sgd(d, 1.0), buffer_of(100)))
    assert_step(step, expected, wrong, 1e-3, 1e-5)
    (x_0, flags), = starts
    steps = {"gan": 5, "cd": 15}[objective]
    assert flags == dict(steps=steps, step_size=10, noise_std=0.005, grad_clip=0.01)
    if objective == "gan":              # a quarter starts at noised images, the rest at G(z)
        noise = (x_0[6:] - 0.6 * x[:2]) / 0.4
        assert noise.min() > -1e-5 and noise.max() < 1 + 1e-5 and (x_0[:6] - 0.5).abs().max() < 0.2
        assert noise.std().item() == pytest.approx(12 ** -0.5, abs=0.01)


def test_meters_of_a_linear_f():
    """f = <w, x>, of which w is the slope everywhere; a third of its entries are large."""
    d, x, x_s = torch.nn.Module(), torch.rand(6, 3, 32, 32), 0.9 * torch.rand(6, 3, 32, 32)
    d.w = torch.nn.Parameter(torch.tensor([0.003, -0.02, 0.009])[:, None, None])
    d.forward = lambda x: (d.w * x).sum((1, 2, 3))
    f, f_s = ([(0.003 * r - 0.02 * g + 0.009 * b).sum().item() for r, g, b in part]
              for part in (x, x_s))
    meters = common.discriminator_step(x, x_s, lambda real, sample: real, 0, d, sgd(d, 0.0))
    assert {name: value.item() for name, value in meters.items()} == pytest.approx({
        "f_real": fmean(f), "f_sample": fmean(f_s), "gap": fmean(f) - fmean(f_s),
        "penalty": 2 * 1024 * (0.003 ** 2 + 0.02 ** 2 + 0.009 ** 2), "clamped": 1 / 3,
        "auc": fmean(real > sample for real in f for sample in f_s), "sample_mean": fmean(
            x_s.flatten().tolist()), "sample_std": fmean(map(stdev, x_s.flatten(1).T.tolist())),
        "data_std": fmean(map(stdev, x.flatten(1).T.tolist()))}, rel=1e-3)
    assert 0 < meters["auc"] < 1 and meters["data_std"] > 1.05 * meters["sample_std"]


def test_training_is_a_plain_loop(tmp_path, short_chains):
    """Two steps of 64 images, drawn with replacement; then the features are standardised."""
    args = flags(tmp_path, "--ebm-rotation", "0.5", "--seed", "4", "--ebm-iters", "2")
    images, steps = common.training_images(args), []
    torch.manual_seed(common.seed_of(4))
    state = common.ebm_networks(args)
    d, g = state["d"], state["g"]
    torch.manual_seed(common.seed_of(4, 0))
    for _ in range(2):
        x = images[torch.randint(len(images), (64,))] / 255
        common.gan_step(x, 0.5, **state)
        steps.append(d.linear.weight.clone())
    torch.manual_seed(common.seed_of(4, 2))
    features = d.features(common.augment(images), "all").detach()
    std, mean = torch.std_mean(features, 0, correction=0)
    d.feature_mean, d.feature_std = mean, std.clamp_min(1e-6)

    train_ebm(images, args)
    saved = torch.load(args.ebm, weights_only=True)
    for name, network in [("d", d), ("g", g)]:
        assert all(torch.equal(value, saved[name][key])
                   for key, value in network.state_dict().items())
    assert not torch.equal(steps[0], steps[1])                          # a control


@pytest.mark.parametrize("objective, lr_d, lr_g, beta_2", [
    ("gan", 1e-3, 2e-4, 0.9), ("ade", 1e-4, 1e-4, 0.999), ("cd", 1e-3, None, 0.9)])
def test_state_of_each_objective(objective, lr_d, lr_g, beta_2, tmp_path):
    """ADE's rates are its authors', and its D is the only one with spectral norm."""
    state = common.ebm_networks(flags(tmp_path, "--ebm-objective", objective))
    assert state.keys() == {"d", "optimizer_d"} | ({"g", "optimizer_g"} if lr_g else {"replay"})
    for name, lr in [("d", lr_d), ("g", lr_g)] if lr_g else [("d", lr_d)]:
        group, = state[f"optimizer_{name}"].param_groups
        assert group["lr"] == lr and group["betas"] == (0, beta_2)
        assert set(group["params"]) == set(state[name].parameters())
    parametrized = [name for name, layer in state["d"].named_modules()
                    if parametrize.is_parametrized(layer)]
    assert len(parametrized) == 6 * (objective == "ade") and "rotation" not in parametrized
    assert lr_g or state["replay"].images.shape == (10000, 3, 32, 32)


@pytest.mark.parametrize("objective", ["gan", "ade"])
def test_step_in_bf16_is_that_in_fp32_but_for_rounding(tmp_path, objective):
    """G's too: it is of D's new weights, not of those that autocast had cached."""
    x, method = draw_shapes(8, seed=3)[0] / 255, getattr(common, f"{objective}_step")

    def weights_of(network):
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    def step(bf16):
        torch.manual_seed(0)
        state = common.ebm_networks(flags(tmp_path, "--ebm-objective", objective))
        networks = [state["d"], state["g"]]
        state |= {"optimizer_d": sgd(state["d"], 1.0), "optimizer_g": sgd(state["g"], 1.0)}
        before = [weights_of(network) for network in networks]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            meters = method(x, 0.7, **state)
        assert {value.dtype for value in meters.values()} == {torch.float32}
        return [weights_of(network) - old for network, old in zip(networks, before)]

    for share, rounded, exact in zip((0.1, 0.3), step(True), step(False)):
        assert 0 < (rounded - exact).norm() < share * exact.norm()


def test_chains_go_on_where_they_were_but_for_a_few(monkeypatch):
    """cd: of a batch of 1000 chains about 5 % begin anew, and the ends of all are kept. Of eight,
    others go on at the next step."""
    replay, starts, changed = buffer_of(1000), [], []
    monkeypatch.setattr(common, "langevin", lambda f, x, **_: starts.append(x) or x + 1)
    monkeypatch.setattr(common, "discriminator_step", lambda *_: None)
    for n in (8, 8, 1000):
        before = replay.images.clone() if n == 8 else replay.images.zero_().clone()
        common.cd_step(torch.rand(n, 3, 32, 32), 0, Discriminator(8), None, replay)
        changed.append((replay.images != before).flatten(1).any(1))
    assert [rows.sum() for rows in changed] == [8, 8, 1000] and not torch.equal(*changed[:2])
    assert 25 < (starts[2].flatten(1).amax(1) > 0).sum() < 80
    ends = [x.flatten(1).sum(1).sort().values for x in (replay.images, (starts[2] + 1).half())]
    assert torch.equal(*ends)


def test_generator_climbs_f_straight_through_the_sampler(monkeypatch):
    """G's step is the gradient of its loss at the samples x_s, carried to G(z) unchanged."""
    d, g, weight = Discriminator(8), Generator(8), 5
    x, x_s = draw_shapes(8, seed=3)[0] / 255, torch.rand(8, 3, 32, 32)
    monkeypatch.setattr(common, "langevin", lambda *_, **__: x_s)
    torch.manual_seed(5)
    x_g = g(torch.randn(6, g.z_dim))

    def gradient(at, weight):
        at = at.detach().requires_grad_()
        down, = torch.autograd.grad(
            0.2 * weight * turned_loss(d, at[:1]) - d(at).mean(), at)
        return torch.autograd.grad(x_g, list(g.parameters()), down, retain_graph=True)

    expected, wrong = gradient(x_s[:6], weight), [gradient(x_g, weight),
                                                  gradient(x_s[:6], weight + 5)]
    torch.manual_seed(5)
    step = moved(g, lambda: common.gan_step(x, weight, d, sgd(d, 0.0), g, sgd(g, 1.0)))
    assert_step(step, expected, wrong, 1e-2, 1e-6)
    assert all(p.requires_grad for p in d.parameters())


def test_file_log_and_picture(tmp_path, capsys, monkeypatch, short_chains):
    args, directory = flags(tmp_path), tmp_path / "ebm.ebm"
    images = common.training_images(args)
    d = train_ebm(images, args)
    assert capsys.readouterr().out.count("iteration 3/3 ") == 1 and not d.training
    assert not any(p.requires_grad for p in d.parameters())
    config = torch.load(args.ebm, weights_only=True)["config"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ebm.ebm", "ebm.pt"]
    assert {path.name for path in directory.iterdir()} == {
        ".lock", "config.json", "log.jsonl", "samples.png", f"source-{config['code']}"}
    header, row = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    assert header["torch"] == torch.__version__ and row["iteration"] == 3
    assert row["gap"] == pytest.approx(row["f_real"] - row["f_sample"], abs=1e-5)
    with Image.open(directory / "samples.png") as picture:
        assert picture.size == (16 * 34 + 2, 6 * 34 + 2)

    again = train_ebm(images, args)                                     # found, not made
    assert all(map(torch.equal, again.state_dict().values(), d.state_dict().values()))
    assert torch.equal(again.features(images / 255), d.features(images / 255))
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="--width 8, not 16"):
        train_ebm(images, flags(tmp_path, "--width", "16"))
    with pytest.raises(UserError, match="other training images"):
        train_ebm(images[1:], args)
    monkeypatch.setattr(common, "code_checksum", lambda files: "other")
    train_ebm(images, args)
    assert f"ebm.ebm: made by other code ({config['code']}" in capsys.readouterr().out


def test_each_setting_of_an_ebm_has_a_file_of_its_own(monkeypatch):
    """Of its precision and kind of device too, as they change its numbers."""
    monkeypatch.setattr(common, "prepare_device", lambda args: None)

    def name(flags):
        return parse("--precision", "fp32", "--device", "cpu", *flags.split()).ebm

    names = {name(flags) for flags in [
        "", "--dataset synthetic", "--subset 9", "--width 16", "--ebm-objective cd",
        "--ebm-rotation 1", "--ebm-iters 0", "--seed 1", "--precision bf16", "--device cuda:1"]}
    assert len(names) == 10
    assert name("--lr 1 --epochs 2") == name("")                        # what all runs share
    assert name("--precision fp16") == name("")                         # it is not for the EBM


def test_no_iterations_give_the_untrained_probe(tmp_path, monkeypatch, small, short_chains):
    """linear_eval.py compares with the discriminator as it began; the probe is a fingerprint."""
    monkeypatch.setitem(linear_eval.METRICS, "linear", lambda x, *_: x.double().square().mean())
    evaluation = SimpleNamespace(device="cpu", dataset=None, data_dir=None, split="test",
                                 untrained=True)

    def probe(iters):
        """{(iterations, layers): fingerprint}"""
        args = flags(tmp_path / str(iters), "--seed", "3", "--ebm-objective", "ade",
                     "--ebm-iters", str(iters))
        train_ebm(common.training_images(args), args)
        return {(config["ebm_iters"], config["layers"]): result["linear"].item()
                for config, result in linear_eval.evaluate_ebm(Path(args.ebm), evaluation)}

    untrained, trained = probe(0), probe(1)
    assert untrained.keys() == {(0, "last"), (0, "all")} and len({*untrained.values()}) == 2
    assert untrained.items() < trained.items() and trained.keys() - untrained.keys() == {
        (1, "last"), (1, "all")}
    assert trained[1, "last"] != trained[0, "last"]


@pytest.mark.parametrize("objective", ["gan", "ade", "cd"])
def test_resumed_training_ends_with_the_same_weights(objective, tmp_path, monkeypatch,
                                                     short_chains):
    monkeypatch.setattr(common, "EBM_ROUND", 1)
    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", -1)
    monkeypatch.setattr(common, "REPLAY_BUFFER", 100)
    args = flags(tmp_path, "--ebm-iters", "2", "--ebm-objective", objective,
                 "--ebm-rotation", "0.5")
    images = common.training_images(args)
    whole = train_ebm(images, args).state_dict()
    (tmp_path / "ebm.pt").unlink()
    with monkeypatch.context() as patch:
        end_round = common.Progress.end_round
        patch.setattr(common.Progress, "end_round", lambda *args: end_round(*args) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_ebm(images, args)
    begun = torch.load(tmp_path / "ebm.ebm" / "checkpoint.pt", weights_only=True)
    assert begun["done"] == 1 and not (tmp_path / "ebm.pt").exists()
    assert not torch.equal(begun["d"]["stages.0.0.bias"], whole["stages.0.0.bias"])
    resumed = train_ebm(images, args).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = (tmp_path / "ebm.ebm" / "log.jsonl").read_text().splitlines()
    assert [json.loads(row).get("iteration") for row in rows] == [None, 1, None, 2]
    assert "rotation" in json.loads(rows[1])


METERS = dict.fromkeys("f_real f_sample penalty auc clamped sample_std".split(), torch.zeros(()))


@pytest.mark.parametrize("what", ["f", "a weight"])
def test_it_stops_when_it_explodes_and_keeps_the_last_good_state(what, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "EBM_ROUND", 2)
    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", -1)
    args, calls = flags(tmp_path, "--ebm-iters", "6"), []

    def step(x, d, **others):
        calls.append(1)
        last_of_second_round = len(calls) == 4
        if last_of_second_round and what == "a weight":
            d.linear.weight.data[0, 0] = float("inf")
        return METERS | {"f_real": torch.tensor(1e5 * (last_of_second_round and what == "f"))}

    monkeypatch.setattr(common, "gan_step", step)
    with pytest.raises(UserError, match="ebm.pt: its training diverged before iteration 4, f"):
        train_ebm(common.training_images(args), args)
    assert not (tmp_path / "ebm.pt").exists()
    saved = torch.load(tmp_path / "ebm.ebm" / "checkpoint.pt", weights_only=True)
    assert saved["done"] == 2 and all(p.isfinite().all() for p in saved["d"].values())


def test_it_is_computed_in_fp32_where_runs_are_in_fp16(tmp_path, monkeypatch, short_chains):
    dtypes = []
    monkeypatch.setattr(common, "gan_step", lambda x, d, **_: dtypes.append(
        d.stages[0][0](x).dtype) or METERS)
    for precision in ("fp16", "fp32", "bf16"):
        args = flags(tmp_path / precision, "--precision", precision, "--ebm-iters", "1")
        train_ebm(common.training_images(args), args)
        assert args.precision == precision
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]
