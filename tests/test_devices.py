"""Two gloo ranks against one, loss and gradient to 1e-5; what a rank does, and on what device."""
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import common
import simclr_disc
from common import UserError, draw_shapes
from processes import CONTEXT, wait
from test_methods import SCRIPTS, make


def step(script, x):
    """A whole step of a method, its views and generated images a fixed function of x."""
    queue = [lambda x: x / 255, lambda x: x.flip(3) / 255, lambda x: 1 - x / 255]
    script.augment = lambda views: torch.cat([queue.pop(0)(v) for v in views.split(len(x))])
    script.langevin_view = lambda f, x, args: x
    method = make(script).eval()
    model = common.distribute(method)                   # it averages as long as it lives
    loss, _ = model(x)
    loss.backward()
    gradients = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


def everything():
    """[(loss, gradient)] of this rank's share of the batch."""
    images = draw_shapes(8, seed=3)[0][common.rank()::common.world_size()]
    return [step(script, images) for script in SCRIPTS]


def work(rank, folder):
    """Saves the results, and those of a gather without gradient."""
    def gather_without_gradient(x):
        parts = [torch.empty_like(x) for _ in range(2)]
        dist.all_gather(parts, x.detach())
        parts[rank] = x
        return torch.cat(parts)

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, gather in [("right", common.gather), ("cut", gather_without_gradient)]:
        common.gather = gather
        results = everything()
        for loss, _ in results:
            dist.all_reduce(loss)
        if rank == 0:
            torch.save([(loss / 2, gradient) for loss, gradient in results], f"{folder}/{name}")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path, monkeypatch):
    for script in SCRIPTS:                              # `step` replaces these for good
        monkeypatch.setattr(script, "augment", None)
        monkeypatch.setattr(script, "langevin_view", None, raising=False)
    one_rank = everything()
    ranks = [CONTEXT.Process(target=work, args=(rank, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert [wait(rank) for rank in ranks] == [0, 0]
    assert all(gradient.abs().max() > 1e-3 for _, gradient in one_rank)
    for name, equal in [("right", 4 * [True]),
                        ("cut", [False, True, False, True])]:           # BYOL has no negatives
        two_ranks = torch.load(tmp_path / name)
        assert all(torch.allclose(a, b, atol=1e-5) for (a, _), (b, _) in zip(one_rank, two_ranks))
        assert equal == [torch.allclose(a, b, atol=1e-5)
                         for (_, a), (_, b) in zip(one_rank, two_ranks)]


def test_ranks_share_each_batch(stub, monkeypatch):
    """Together they have the batches of a lone process, and each image once."""
    run, images, shares = stub(), torch.arange(64), []
    whole = [*run.batches(images, 1)]
    monkeypatch.setattr(common, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(common, "rank", lambda: rank)
        shares.append([*run.batches(images, 1)])
    assert {len(share) for share in shares[0] + shares[1]} == {4}
    assert all(map(torch.equal, whole, map(torch.cat, zip(*shares))))
    assert torch.cat(whole).unique().numel() == 64 and not torch.equal(torch.cat(whole), images)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_writes(rank, stub, monkeypatch, tmp_path):
    """The mean over the ranks. Each draws views of its own."""
    monkeypatch.setattr(common, "rank", lambda: rank)
    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda mean: mean.mul_(4))  # the other's is thrice this
    run, model = stub(epochs=1), torch.nn.Linear(1, 1)
    model.encoder = torch.nn.Identity()
    model(torch.ones(1, 1)).sum().backward()
    for epoch in run.epochs(model=model, optimizer=torch.optim.SGD(model.parameters())):
        assert (torch.initial_seed() == common.seed_of(0, 1, 0)) == (rank == 0)
        run.log(loss=torch.tensor(1.0), z_std=torch.tensor(1.0))
    run.finish(None)
    assert (tmp_path / "run").exists() == (rank == 0)
    if rank == 0:
        rows = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
        assert json.loads(rows[-1])["loss"] == 2 and (tmp_path / "run" / "eval.json").exists()


@pytest.mark.parametrize("size, shared", [(4, False), (3, False), (6, True), (66, False)])
def test_ranks_share_a_batch_evenly_each_at_least_two_images(size, shared, stub, monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 3)
    with nullcontext() if shared else pytest.raises(UserError, match=f"--batch-size {size}: .* 3 "):
        stub(batch_size=size)


def test_cuda_ranks_normalise_by_the_whole_batch(monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model: model)
    for on_cuda in (True, False):
        model = make(simclr_disc)
        names = [name for name, _ in model.named_parameters()]
        monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(is_cuda=on_cuda)]))
        model = common.distribute(model)
        norms = {type(m) for m in model.modules() if "BatchNorm" in type(m).__name__}
        assert (norms == {torch.nn.SyncBatchNorm}) == on_cuda and norms
        assert names == [name for name, _ in model.named_parameters()]


def test_cuda_ranks_name_their_device(monkeypatch):
    calls = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(str(device)))
    monkeypatch.setattr(torch, "zeros", lambda _, device: SimpleNamespace(
        device=torch.device("cuda:0" if device == "cuda" else device)))

    def prepare(device):
        args = SimpleNamespace(device=device)
        calls.clear()
        common.prepare_device(args)
        return args.device, calls

    assert prepare("cuda:1") == ("cuda:1", ["cuda:1"]) and prepare("cpu") == ("cpu", [])
    assert prepare("cuda") == ("cuda", ["cuda:0"])
    with pytest.raises(UserError, match="--device mps: .*use cpu or cuda"):
        prepare("mps")
    for name, value in dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    assert prepare("cuda") == ("cuda:1", ["cuda:1", "nccl"]) and prepare("cpu") == ("cpu", ["gloo"])


def test_a_layer_without_gradient_is_named(monkeypatch, capsys):
    """Several ranks cannot train it; one can, but it is a mistake more often than not."""
    model = torch.nn.ModuleDict(dict(used=torch.nn.Linear(1, 1), fc=torch.nn.Linear(1, 1),
                                     frozen=torch.nn.Linear(1, 1).requires_grad_(False)))
    model["used"](torch.ones(1, 1)).sum().backward()

    def log_a_step(run=None):
        run = run or SimpleNamespace(steps=[], model=model, noted=False)
        common.Run.log(run, loss=torch.ones(()))
        return run
    log_a_step(log_a_step())
    assert capsys.readouterr().out == "note: without gradient, so never trained: " \
                                      "fc.weight, fc.bias\n"
    monkeypatch.setattr(common, "world_size", lambda: 2)
    with pytest.raises(UserError, match="fc.weight"):
        log_a_step()
    del model["fc"]                                                              # a control
    log_a_step()
    assert capsys.readouterr().out == ""
