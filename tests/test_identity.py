"""What a run's identity consists of: its flags, its code, its frozen networks, its teacher."""
import importlib
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import byol_disc
import common
import linear_eval
import processes
from common import Run, UserError, check_config, save, without_effect
from conftest import ROOT, forget


@pytest.mark.parametrize("script", ["simclr_disc", "byol_disc", "simclr_langevin", "byol_langevin"])
def test_every_flag_but_those_of_places_tells_runs_apart(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--run-dir", "run", "--ebm", "ebm.pt"])
    flags = vars(importlib.import_module(script).parse())
    flags = {**flags, "images": 1, "data": 2, "f": 3, "ranks": 1}
    where = {"run_dir", "data_dir", "ebm", "device", "eval_every", "graph", "smoke", "file"}
    assert len(flags) > 20
    for flag in flags.keys() - {"defaults"}:
        with nullcontext() if flag in where else pytest.raises(UserError, match="made with"):
            check_config("run", {**flags, flag: "other"}, flags)


def test_a_flag_that_a_config_lacks_counts_as_its_default():
    """Of either; what has no default is unknown and refuses nothing."""
    old, new = {"lr": 1, "defaults": {"lr": 1}}, {"lr": 1, "defaults": {"lr": 1, "margin": 0.0}}
    for margin, refused in [(0.0, False), (0.5, True)]:
        for pair in [(old, {**new, "margin": margin}), ({**new, "margin": margin}, old)]:
            with pytest.raises(UserError, match="--margin") if refused else nullcontext():
                check_config("run", *pair)
    check_config("run", {"lr": 1}, {"lr": 1, "code": "b", "f": 7})


OF_STEPS = ["--step-size 3", "--noise-std 3", "--noise-unit 0.1", "--grad-clip 1"]
OF_EBM = ["--ebm-iters 7", "--ebm-objective cd", "--ebm-rotation 1"]
OF_CHAIN = ["--steps 3", "--alpha 0.2", *OF_STEPS, *OF_EBM]


@pytest.mark.parametrize("script, fixed, flags", [
    ("byol_disc", "--coeff 0", ["--layers all", "--disc-input image", "--teacher gone", *OF_EBM]),
    ("simclr_disc", "--teacher TEACHER", ["--layers all", *OF_EBM]),
    ("simclr_disc", "--ebm-iters 0", ["--ebm-rotation 1", "--ebm-objective cd"]),
    ("simclr_langevin", "--coeff 0", ["--view augment", *OF_CHAIN]),
    ("simclr_langevin", "--view augment", OF_CHAIN),
    ("byol_langevin", "--use dataset", ["--coeff 0.5", "--coeff 0"]),
    ("byol_langevin", "--steps 0", [*OF_STEPS, *OF_EBM]),
    ("byol_langevin", "--step-size 0", ["--grad-clip 1", *OF_EBM]),
    ("byol_langevin", "--grad-clip 0", ["--step-size 3", *OF_EBM]),
    ("byol_langevin", "--noise-std 0", ["--noise-unit 0.1"]),
    ("byol_langevin", "--noise-unit 0", ["--noise-std 3"])])
def test_a_flag_without_effect_makes_no_other_run(script, fixed, flags, tmp_path, monkeypatch,
                                                  capsys):
    """Nor directory, nor row, and a line names it; it does without what takes its effect."""
    teacher = {"script": "byol_disc", "epochs": 1, "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(teacher))
    monkeypatch.setattr(common, "data_checksum", lambda args: 0)
    monkeypatch.setattr(common, "claim", lambda directory, config, script: config)
    images = torch.zeros(512, 3, 32, 32, dtype=torch.uint8)
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        flags = " ".join(flags).replace("TEACHER", str(tmp_path)).split()
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        args = importlib.import_module(script).parse()
        made = Run(args, images, None)
        made.lock.release()
        config = {k: v for k, v in made.config.items() if k not in common.NOT_IDENTITY}
        return args.run_dir, config, (made.config, {"linear": 1.0})

    (place, config, row), default = run(fixed), run("")
    for flag in flags:
        capsys.readouterr()
        same_place, same_config, same_row = run(fixed, flag)
        assert (same_place, same_config) == (place, config)
        name = flag.split()[0][2:].replace("-", "_")
        assert f"without effect, given the other flags: {name}\n" in capsys.readouterr().out
        assert len({*linear_eval.row_labels([row, same_row])[0]}) == 1
        if flag not in ("--teacher gone", "--coeff 0"):                 # a control
            alone = run(flag)
            assert alone[:2] != default[:2] and "without effect" not in capsys.readouterr().out
            assert len({*linear_eval.row_labels([alone[2], default[2]])[0]}) == 2


@pytest.mark.parametrize("values, unused", [
    (dict(step_size=0, grad_clip=0), {"grad_clip"}),
    (dict(noise_std=0, noise_unit=0), {"noise_unit"}),
    (dict(steps=0, step_size=0, noise_std=0), common.STEP_FLAGS)])
def test_a_flag_without_effect_disables_no_other(values, unused):
    """Of two that disable each other, one is left to tell the run from the default one."""
    flags = dict(coeff=1, use="auxiliary", view="langevin", steps=1, step_size=1, noise_std=1,
                 noise_unit=1, grad_clip=1, alpha=0.5, ebm_iters=1)
    assert without_effect(SimpleNamespace(**flags | values)) - common.EBM_FLAGS == unused


def test_a_flag_of_ones_own_for_the_ebm_makes_another_ebm(tmp_path, monkeypatch):
    """It is in the file's name and the EBM's identity, and without effect where no EBM is used."""
    def parse(*flags):
        parser = common.make_parser("", byol_disc.__file__)
        parser.add_argument("--coeff", type=float, default=1.0)
        parser.add_argument("--ebm-penalty", type=float, default=5.0)
        return common.parse_flags(parser, [*processes.EBM[:8], "--precision", "fp32", *flags])

    plain, other = parse(), parse("--ebm-penalty", "0")
    assert "penalty=0.0" in other.ebm and "penalty" not in plain.ebm
    assert "ebm_penalty" in without_effect(parse("--coeff", "0"))
    assert "ebm_penalty" not in without_effect(other)
    made, images = [], torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(common, "make_ebm", lambda path, config, *_: made.append(config) or save(
        path, {"config": config, "d": common.Discriminator(8).state_dict()}))
    plain.ebm = other.ebm = str(tmp_path / "ebm.pt")
    common.train_ebm(images, plain)
    common.train_ebm(images, plain)
    with pytest.raises(UserError, match="made with --ebm-penalty 5.0, not 0.0; name another --ebm"):
        common.train_ebm(images, other)
    assert [config["ebm_penalty"] for config in made] == [5.0]
    del made[0]["ebm_penalty"], made[0]["defaults"]       # an EBM from before there was the flag
    save(tmp_path / "ebm.pt", {"config": made[0], "d": common.Discriminator(8).state_dict()})
    common.train_ebm(images, plain)
    with pytest.raises(UserError, match="made with --ebm-penalty 5.0, not 0.0; name another --ebm"):
        common.train_ebm(images, other)


def test_a_langevin_view_without_an_ebm_is_refused_where_it_needs_one():
    x = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    flags = dict(steps=1, step_size=1, grad_clip=1, noise_std=0, noise_unit=1, alpha=1)
    for change in ({"steps": 0}, {"step_size": 0}, {"grad_clip": 0}):
        args = SimpleNamespace(**flags | change)
        assert torch.allclose(common.langevin_view(None, x, args), x / 255)
    with pytest.raises(UserError, match="needs an EBM"):
        common.langevin_view(None, x, SimpleNamespace(**flags))


def test_images_have_to_be_uint8(monkeypatch):
    images = torch.rand(9, 3, 32, 32)
    monkeypatch.setattr(common, "load_images", lambda *_: (images, torch.zeros(9).long()))
    args = SimpleNamespace(dataset="npz", data_dir="", subset=0)
    with pytest.raises(UserError, match="--dataset npz: images are torch.float32"):
        common.training_images(args)
    images = (255 * images).byte()
    assert common.training_images(args) is images


def test_a_flag_of_ones_own_named_like_another_counts():
    """simclr_disc.py with an --alpha of its own, for mixup, has no chain."""
    disc = dict(coeff=0, disc_input="augment", layers="last", alpha=0.5, steps=0, view="x")
    assert not without_effect(SimpleNamespace(**disc)) & {"alpha", "steps", "view"}
    langevin = dict(coeff=0, use="auxiliary", view="langevin", steps=1, step_size=1, noise_std=1,
                    noise_unit=1, grad_clip=1, alpha=0.5, layers=3)
    unused = without_effect(SimpleNamespace(**langevin))
    assert {"alpha", "steps", "view"} <= unused and "layers" not in unused
    third = without_effect(SimpleNamespace(coeff=0, layers=3, teacher="x", ebm_iters=1))
    assert "ebm_iters" in third and not third & {"layers", "teacher"}


def test_code_is_known_by_what_it_computes(tmp_path):
    """Comments, docstrings, blank lines, quotes and line breaks are of no account."""
    def code(text):
        (tmp_path / "a.py").write_text(text)
        forget()
        return common.code_checksum([tmp_path / "a.py"])

    plain = code('def f(x):\n    return [x, "a"]\n')
    for same in ('def f(x):\n    """Text."""\n    return [x, "a"]\n',
                 '"""Text."""\n# More.\n\n\ndef f(x):  # and more\n  return [x,\n    \'a\']\n'):
        assert code(same) == plain
    for other in ('def f(x):\n    return [x, "b"]\n', 'def f(x):\n    return [x, "a"], 0\n'):
        assert code(other) != plain


def test_the_code_has_the_imports_of_imports(tmp_path):
    ours = {"run.py": "import numpy\nimport a", "a.py": "from pk.sub import m",
            "pk/__init__.py": "", "pk/sub/__init__.py": "", "pk/sub/m.py": "x = 1"}
    for name, text in {**ours, "other.py": "y = 2"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = common.source_files(tmp_path / "run.py")
    assert set(found) == {ROOT / "common.py", *(tmp_path / name for name in ours)}

    def code():
        forget()
        return common.code_checksum(found)

    codes = [code()]
    for name in ours:
        (tmp_path / name).write_text(ours[name] + "\nMORE = 1\n")
        codes.append(code())
    (tmp_path / "a.py").rename(tmp_path / "old")          # the same texts under each other's names
    (tmp_path / "run.py").rename(tmp_path / "a.py")
    (tmp_path / "old").rename(tmp_path / "run.py")
    codes.append(code())
    assert len(set(codes)) == 7


def test_code_is_what_was_loaded(tmp_path):
    """A script and its module, edited while it runs, are recorded as they were when it started."""
    texts = {"mine.py": "SIZE = 1\n", "run.py": f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import common, mine
common.parse_flags(common.make_parser("", __file__), [])
files = [Path(__file__).resolve(), Path(mine.__file__).resolve()]
for file in files:
    file.write_text(file.read_text() + "MORE = 1\\n")
common.claim(Path("run"), {{}}, __file__)
"""}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    subprocess.run([sys.executable, "run.py"], cwd=tmp_path, check=True)
    source, = (tmp_path / "run").glob("source-*")
    for name, text in texts.items():
        copied, = source.rglob(name)
        assert copied.read_text() == text != (tmp_path / name).read_text()
    files = [*source.rglob("run.py"), *source.rglob("mine.py"), ROOT / "common.py"]
    assert source.name == f"source-{common.code_checksum(files)}"


def test_teachers_of_other_settings_have_other_names(tmp_path):
    defaults = dict(width=64, lr=0.003, coeff=0.1, temperature=0.5, seed=0, epochs=9,
                    batch_size=512, ebm_iters=2, teacher=None, disc_input="augment")
    args = SimpleNamespace(teacher=tmp_path, seed=0, width=8, lr=0.1, coeff=1, batch_size=256,
                           ebm_iters=7, disc_input="augment",
                           defaults={**defaults, "batch_size": 256})
    teacher = {**defaults, "script": "simclr_disc", "epochs": 2, "seed": 1, "width": 8, "lr": 0.1,
               "coeff": 0, "data": 7, "defaults": defaults}
    for change, expected in [({}, ", seed +1"), ({"lr": 1.0, "seed": 0}, ", lr 1.0"),
                             ({"width": 64}, ", width 64, seed +1"),     # not the student's
                             ({"batch_size": 256, "data": 8, "seed": 0}, ", other data"),
                             ({"ebm_iters": 2, "teacher": None, "seed": 0}, ""),
                             ({"ebm_iters": 3, "teacher": "x", "seed": 0},
                              ", ebm_iters 3, teacher x"),
                             ({"coeff": 1, "seed": 0}, ", coeff 1"),     # the student's, too
                             ({"temperature": 0.1}, ", temperature 0.1, seed +1"),
                             ({"coeff": 0.5, "seed": 0}, ", coeff 0.5")]:
        save(tmp_path / "config.json", {**teacher, **change})
        assert common.teacher_kind(args, 7) == "simclr_disc of 2 epochs" + expected


def test_an_encoder_of_other_classes_is_not_taken_for_ours(tmp_path):
    """Even if its weights have the same names and shapes, as those of another pooling have."""
    class Encoder(common.Encoder):                        # one of the script's own
        pass

    pooled, strided = common.Encoder(8), common.Encoder(8)
    pooled.net[-2] = torch.nn.AdaptiveMaxPool2d(1)
    strided.net[0].stride = (2, 2)
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(common.Encoder(8))
    for encoder, ours in [(common.Encoder(8), True), (synchronised, True), (pooled, False),
                          (strided, False), (Encoder(8), False)]:
        save(tmp_path / "config.json", {
            "script": "x", "width": 8, "epochs": 1, "seed": 0, "code": "",
            "encoder_modules": common.modules_checksum(encoder)})
        weights = {f"encoder.{name}": x for name, x in encoder.state_dict().items()}
        save(tmp_path / "checkpoint.pt", {"model": weights, "done": 1})
        with nullcontext() if ours else pytest.raises(UserError, match="has other modules"):
            common.load_encoder(tmp_path)


def test_each_frozen_network_is_known(stub):
    first, frozen = stub(), [torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)]
    for network in frozen:
        first.freeze(network)
    assert {"f", "f1"} <= first.config.keys()
    (first.path / "checkpoint.pt").touch()                # something was made
    again = stub()
    again.freeze(frozen[0])
    with torch.no_grad():
        frozen[1].weight += 1
    with pytest.raises(UserError, match="made with"):
        again.freeze(frozen[1])


def test_a_finished_run_gets_no_network_that_it_did_not_have(stub):
    save(stub().path / "eval.json", {})
    config = (stub().path / "config.json").read_text()
    with pytest.raises(UserError, match="made with another EBM or frozen network"):
        stub().freeze(torch.nn.Linear(2, 2))
    assert (stub().path / "config.json").read_text() == config


def test_a_setting_is_compared_as_config_json_has_it(stub):
    for _ in range(2):                                    # the second finds what the first made
        run = stub(scale=(0.2, 1.0), path=Path("somewhere"))
        (run.path / "checkpoint.pt").touch()
    with pytest.raises(UserError, match="--scale"):
        stub(scale=(0.3, 1.0), path=Path("somewhere"))


def test_accuracies_of_another_linear_eval_are_said_to_be(tmp_path, capsys):
    accuracies = dict(linear=50.0, knn5=40.0, knn_cosine=None)
    save(tmp_path / "config.json", dict(script="byol_disc", epochs=1, seed=0,
                                          dataset="synthetic", data_dir=""))
    flags = SimpleNamespace(split="test", data_dir=None, dataset=None, device="cpu")
    for code, said in [(linear_eval.evaluate.code, False), ("12345678", True)]:
        save(tmp_path / "eval.json", {**accuracies, "evaluation": code})
        (_, result), = linear_eval.evaluate_run(tmp_path, flags)
        assert result["linear"] == 50
        assert ("another linear_eval.py" in capsys.readouterr().out) == said
