"""EBM training: its step against its formula, its file and log, and what stops it."""
import json
import statistics
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import linear_eval
from common import Discriminator, Generator, UserError, draw_shapes, load_ebm, train_ebm


def parse(*flags):
    return common.parse_flags(common.make_parser("x", "x.py"), flags)


def flags(tmp_path, *more):
    return parse("--dataset", "synthetic", "--subset", "100", "--width", "8", "--ebm-iters", "3",
                 "--precision", "fp32", "--ebm", str(tmp_path / "ebm.pt"), *more)


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


def is_close(moved, gradient, rel, tiny):
    return all((a - b).norm() < rel * b.norm() + tiny for a, b in zip(moved, gradient))


@pytest.mark.parametrize("objective", ["gan", "cd"])
@pytest.mark.parametrize("weight", [0, 0.7])
def test_discriminator_step_equals_its_formula(monkeypatch, objective, weight):
    x, negatives = draw_shapes(8, seed=3)[0] / 255, torch.rand(8, 3, 32, 32)
    starts = []
    monkeypatch.setattr(common, "langevin",
                        lambda f, x, **flags: starts.append((x, flags)) or negatives)
    d, g, replay = Discriminator(8), Generator(8), buffer_of(100)
    weights = {name: p.detach().clone().requires_grad_() for name, p in d.named_parameters()}

    def f(image):
        return torch.func.functional_call(d, weights, image[None])[0]

    def energies(a, b):
        if objective == "cd":
            return f(b) - f(a) + f(a) ** 2 + f(b) ** 2
        return F.softplus(-f(a)) + F.softplus(f(b))

    def loss(share):                    # image by image; the penalty from the Jacobian
        terms = [energies(a, b) + share * sum(
            torch.autograd.functional.jacobian(f, image, create_graph=True).square().sum()
            for image in (a, b)) for a, b in zip(x, negatives)]
        return sum(terms) / len(terms)

    def gradient(share, weight):
        both = [torch.autograd.grad(of, at, allow_unused=True, materialize_grads=True) for of, at in
                [(loss(share), list(weights.values())), (turned_loss(d, x[:2]), d.parameters())]]
        return [a + weight * b for a, b in zip(*both)]

    expected, wrong = gradient(5, weight), [gradient(2.5, weight), gradient(5, weight + 0.2)]
    step = {"gan": lambda: common.gan_step(x, weight, d, sgd(d, 1.0), g, sgd(g, 0.0)),
            "cd": lambda: common.cd_step(x, weight, d, sgd(d, 1.0), replay)}[objective]
    step = moved(d, step)
    (x_0, flags), = starts
    steps = {"gan": 5, "cd": 15}[objective]
    assert flags == dict(steps=steps, step_size=10, noise_std=0.005, grad_clip=0.01)
    if objective == "gan":              # a quarter starts at noised images, the rest at G(z)
        noise = (x_0[6:] - 0.6 * x[:2]) / 0.4
        assert noise.min() > -1e-5 and noise.max() < 1 + 1e-5
        for image, uniform in [(noise, True), (x[:2], False)]:
            assert (image.std().item() == pytest.approx(12 ** -0.5, abs=0.01)) == uniform
        assert (x_0[:6] - 0.5).abs().max() < 0.2

    def close(to):
        return all(torch.allclose(a, b, atol=1e-5, rtol=1e-3) for a, b in zip(step, to))
    assert close(expected) and not any(map(close, wrong))


def test_meters_in_loops():
    """Of f at the images and at the samples, each beside the other way round, which differs."""
    x, x_s = draw_shapes(6, seed=3)[0] / 255, 0.8 * draw_shapes(6, seed=8)[0] / 255 + 0.1
    d = Discriminator(8)
    d.linear.weight.data *= 30
    meters = common.discriminator_step(x, x_s, lambda real, sample: real, 0, d, sgd(d, 0.0))
    meters = {name: value.item() for name, value in meters.items()}

    def expected(x, x_s):
        energies = [[d(image[None]).item() for image in part] for part in (x, x_s)]
        gradients = [torch.autograd.functional.jacobian(lambda image: d(image[None])[0], image)
                     for image in torch.cat([x, x_s])]
        clamped = [value.item() for gradient in gradients[len(x):] for value in
                   (gradient.abs() >= 0.01).float().flatten()]
        f_real, f_sample = map(statistics.fmean, energies)
        wins = [real > sample for real in energies[0] for sample in energies[1]]
        pixels = list(zip(*x_s.flatten(1).tolist())), list(zip(*x.flatten(1).tolist()))
        spread = [statistics.fmean(map(statistics.stdev, part)) for part in pixels]
        return {"f_real": f_real, "f_sample": f_sample, "gap": f_real - f_sample,
                "penalty": 2 * statistics.fmean(g.square().sum().item() for g in gradients),
                "auc": statistics.fmean(wins), "clamped": statistics.fmean(clamped),
                "sample_mean": x_s.mean().item(), "sample_std": spread[0], "data_std": spread[1]}

    assert meters == pytest.approx(expected(x, x_s), rel=1e-3)
    for name, value in expected(x_s, x).items():
        assert name == "penalty" or value != pytest.approx(meters[name], rel=1e-2), name
    assert 0 < meters["auc"] < 1 and 0 < meters["clamped"] < 1


@pytest.mark.parametrize("objective", ["gan", "cd"])
def test_training_is_a_plain_loop(tmp_path, monkeypatch, objective):
    """Two steps of 64 images, drawn with replacement; Adam with IGEBM's and ADE's rates."""
    args = flags(tmp_path, "--ebm-objective", objective, "--ebm-rotation", "0.5", "--seed", "4",
                 "--ebm-iters", "2")
    images = common.training_images(args)

    def plain(lr_d=1e-3, lr_g=2e-4):
        torch.manual_seed(common.seed_of(4))
        d = Discriminator(8)
        parts = {"d": d, **({"g": Generator(8)} if objective == "gan" else
                            {"replay": buffer_of(10000)})}
        optimizers = {f"optimizer_{name}": torch.optim.Adam(
            parts[name].parameters(), lr, betas=(0.0, 0.9), fused=True)
            for name, lr in [("d", lr_d), ("g", lr_g)] if name in parts}
        torch.manual_seed(common.seed_of(4, 0))
        for _ in range(2):
            x = images[torch.randint(len(images), (64,))] / 255
            getattr(common, f"{objective}_step")(x, 0.5, **parts, **optimizers)
        torch.manual_seed(common.seed_of(4, 2))
        features = d.features(common.augment(images), "all").detach()
        std, mean = torch.std_mean(features, 0, correction=0)
        d.feature_mean, d.feature_std = mean, std.clamp_min(1e-6)
        return {name: part.state_dict() for name, part in parts.items() if name != "replay"}

    train_ebm(images, args)
    saved = torch.load(args.ebm, weights_only=True)

    def same(parts):
        return all(torch.equal(value, saved[part][name])
                   for part, state in parts.items() for name, value in state.items())
    assert same(plain()) and not same(plain(lr_d=2e-4, lr_g=1e-3))
    assert saved.keys() - {"config"} == {"d", "g"} - ({"g"} if objective == "cd" else set())


@pytest.mark.parametrize("objective", ["gan", "ade", "cd"])
def test_step_in_bf16_is_that_in_fp32_but_for_rounding(tmp_path, objective):
    """G's too: it is of D's new weights, not of those that autocast had cached."""
    args = flags(tmp_path, "--ebm-objective", objective)
    x, method = draw_shapes(8, seed=3)[0] / 255, getattr(common, f"{objective}_step")

    def weights_of(d):
        return torch.cat([p.detach().flatten() for p in d.parameters()])

    def step(**autocast):
        torch.manual_seed(0)
        state = common.ebm_networks(args)
        networks = [state[name] for name in "dg" if name in state]
        for name, network in zip("dg", networks):
            state[f"optimizer_{name}"] = sgd(network, 1.0)
        before = [weights_of(network) for network in networks]
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            meters = method(x, 0.7, **state)
        assert {value.dtype for value in meters.values()} == {torch.float32}
        return [weights_of(network) - old for network, old in zip(networks, before)]

    for share, rounded, exact, again in zip((0.1, 0.3), step(), step(enabled=False), step()):
        assert 0 < (rounded - exact).norm() < share * exact.norm()
        assert torch.equal(again, rounded)


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


@pytest.mark.parametrize("weight", [0, 5])
def test_generator_climbs_f_straight_through_the_sampler(monkeypatch, weight):
    """G's step is the gradient of its loss at the samples x_s, carried to G(z) unchanged."""
    d, g = Discriminator(8), Generator(8)
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
    assert is_close(step, expected, 1e-2, 1e-6)
    assert not any(is_close(step, gradient, 1e-2, 1e-6) for gradient in wrong)
    assert all(p.requires_grad for p in d.parameters())


def test_file_log_and_picture(tmp_path, capsys, monkeypatch):
    args = flags(tmp_path)
    images = common.training_images(args)
    d = train_ebm(images, args)
    out = capsys.readouterr().out
    assert out.count("iteration 3/3 ") == 1 and not d.training
    loaded = load_ebm(args.ebm, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(d.parameters(), loaded.parameters()))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded.features(images / 255), d.features(images / 255))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["ebm.ebm", "ebm.pt"]
    config = torch.load(args.ebm, weights_only=True)["config"]
    assert {path.name for path in (tmp_path / "ebm.ebm").iterdir()} == {
        ".lock", "config.json", "log.jsonl", "samples.png", f"source-{config['code']}"}
    header, row = map(json.loads, (tmp_path / "ebm.ebm" / "log.jsonl").read_text().splitlines())
    assert header["torch"] == torch.__version__
    assert {"f_real", "f_sample", "gap", "auc", "clamped", "sample_mean", "sample_std"} < set(row)
    assert row["gap"] == pytest.approx(row["f_real"] - row["f_sample"], abs=1e-5)
    assert 0 <= row["auc"] <= 1 and 0 <= row["clamped"] <= 1
    with Image.open(tmp_path / "ebm.ebm" / "samples.png") as picture:
        assert picture.size == (16 * 34 + 2, 6 * 34 + 2)

    again = train_ebm(images, args)                                     # found, not made
    assert torch.equal(again.linear.weight, d.linear.weight) and capsys.readouterr().out == ""
    with monkeypatch.context() as patch:
        patch.setattr(common, "code_checksum", lambda files: "other")
        train_ebm(images, args)
    assert f"ebm.pt: made by other code ({config['code']}" in capsys.readouterr().out
    with pytest.raises(UserError, match="--width 8, not 16"):
        train_ebm(images, flags(tmp_path, "--width", "16"))
    with pytest.raises(UserError, match="other training images"):
        train_ebm(images[1:], args)


def test_each_setting_of_an_ebm_has_a_file_of_its_own(monkeypatch):
    """Of its precision and kind of device too, as they change its numbers."""
    monkeypatch.setattr(common, "prepare_device", lambda args: None)

    def name(*flags):
        return parse("--precision", "fp32", "--device", "cpu", *flags).ebm

    names = [name(), name("--dataset", "synthetic"), name("--subset", "9"), name("--width", "16"),
             *(name("--ebm-objective", objective) for objective in ("cd", "ade")),
             name("--ebm-rotation", "1"), name("--ebm-iters", "0"),
             name("--seed", "1"), name("--seed", "2"), name("--precision", "bf16"),
             name("--device", "cuda:1")]
    assert len(set(names)) == len(names)
    assert name("--lr", "1", "--epochs", "2") == name()                 # what all runs share
    assert name("--precision", "fp16") == name()                        # it is not for the EBM


def test_an_unusual_gradient_moves_no_weight_far(tmp_path):
    def moved_by_an_outlier(optimizer, steps=500):
        weight = optimizer.param_groups[0]["params"][0]
        for gradient in steps * [1e-3] + [1e3]:
            before, weight.grad = weight.detach().clone(), torch.full_like(weight, gradient)
            optimizer.step()
        return (weight - before).abs().max().item() / optimizer.param_groups[0]["lr"]

    state = common.ebm_networks(flags(tmp_path))
    assert moved_by_an_outlier(state["optimizer_d"]) < 3.2
    assert moved_by_an_outlier(state["optimizer_g"]) < 3.2
    assert moved_by_an_outlier(torch.optim.Adam(state["d"].parameters(), betas=(0.0, 0.999))) > 10


def test_no_iterations_give_the_untrained_probe(tmp_path, monkeypatch, small):
    """linear_eval.py compares with the discriminator as it began; the probe is a fingerprint."""
    monkeypatch.setitem(linear_eval.METRICS, "linear",
                        lambda x, *_: x.double().square().mean())
    evaluation = SimpleNamespace(device="cpu", dataset=None, data_dir=None, split="test",
                                 untrained=True)

    def probe(*more):
        args = flags(tmp_path / "-".join(["ebm", *more]), "--seed", "3", *more)
        train_ebm(common.training_images(args), args)
        rows = list(linear_eval.evaluate_ebm(Path(args.ebm), evaluation))
        assert [row["layers"] for row, _ in rows] == len(rows) // 2 * ["last", "all"]
        assert [row["ebm_iters"] for row, _ in rows][::2] == [args.ebm_iters, 0][:len(rows) // 2]
        return [result["linear"].item() for _, result in rows]

    for objective in ("ade", "gan"):
        last, every, *untrained = probe("--ebm-iters", "0", "--ebm-objective", objective)
        assert untrained == [] and last != every
    trained, _, *untrained = probe()
    assert untrained == [last, every] and trained != last


@pytest.mark.parametrize("objective", ["gan", "ade", "cd"])
def test_resumed_training_ends_with_the_same_weights(tmp_path, monkeypatch, objective):
    monkeypatch.setattr(common, "EBM_ROUND", 1)
    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", -1)
    args = flags(tmp_path, "--ebm-iters", "2", "--ebm-objective", objective,
                 "--ebm-rotation", "0.5")
    monkeypatch.setattr(common, "adversarial_dynamics",
                        partial(common.adversarial_dynamics, steps=2))
    monkeypatch.setattr(common, "REPLAY_BUFFER", 100)
    images = common.training_images(args)
    whole = train_ebm(images, args)
    (tmp_path / "ebm.pt").unlink()
    with monkeypatch.context() as patch:
        end_round = common.Progress.end_round
        patch.setattr(common.Progress, "end_round", lambda progress, done, *row: (
            end_round(progress, done, *row) if done == 1 else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            train_ebm(images, args)
    assert (tmp_path / "ebm.ebm" / "checkpoint.pt").exists() and not (tmp_path / "ebm.pt").exists()
    resumed = train_ebm(images, args)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    rows = (tmp_path / "ebm.ebm" / "log.jsonl").read_text().splitlines()
    assert [json.loads(row).get("iteration") for row in rows] == [None, 1, None, 2]
    assert "rotation" in json.loads(rows[1])
    (tmp_path / "ebm.pt").unlink()
    args.seed = 1                                                       # a control
    assert not torch.equal(train_ebm(images, args).linear.weight, whole.linear.weight)


@pytest.mark.parametrize("what", ["f", "a weight"])
def test_it_stops_when_it_explodes_and_keeps_the_last_good_state(tmp_path, monkeypatch, what):
    monkeypatch.setattr(common, "EBM_ROUND", 2)
    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", -1)
    args, calls = flags(tmp_path, "--ebm-iters", "6"), []

    def step(x, rotation_weight, d, **others):
        calls.append(1)
        meters = gan_step(x, rotation_weight, d, **others)
        if len(calls) == 4:                             # the last of the second block
            if what == "f":
                meters["f_real"] = meters["f_real"] + 1e5
            else:
                d.linear.weight.data[0, 0] = float("inf")
        return meters
    gan_step = common.gan_step
    monkeypatch.setattr(common, "gan_step", step)
    with pytest.raises(UserError, match="ebm.pt: its training diverged before iteration 4, f"):
        train_ebm(common.training_images(args), args)
    assert not (tmp_path / "ebm.pt").exists()
    saved = torch.load(tmp_path / "ebm.ebm" / "checkpoint.pt", weights_only=True)
    assert saved["done"] == 2 and all(p.isfinite().all() for p in saved["d"].values())


def test_it_is_computed_in_fp32_where_runs_are_in_fp16(tmp_path):
    weights = []
    for precision in ("fp16", "fp32", "bf16"):
        args = flags(tmp_path / precision, "--precision", precision, "--ebm-iters", "1")
        weights.append(train_ebm(common.training_images(args), args).linear.weight)
        assert args.precision == precision
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
