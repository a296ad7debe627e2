"""Two gloo ranks against one, loss and gradient to 1e-5; and how ranks meet, wait and part."""
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import byol_disc
import byol_langevin
import common
import simclr_disc
import simclr_langevin
from common import draw_shapes, nt_xent
from processes import CONTEXT, wait
from test_methods import make

SCRIPTS = [simclr_disc, byol_disc, simclr_langevin, byol_langevin]


def flattened_gradient(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def contrast(x):
    """nt_xent alone, on two linear views of x (B, 8)."""
    torch.manual_seed(0)
    linear = common.distribute(torch.nn.Linear(8, 6))
    z = linear(x)
    loss = nt_xent(z, z.flip(1) + z.square())
    loss.backward()
    return loss.detach(), flattened_gradient(linear)


def step(script, x):
    """A whole step of a method, its views and generated images a fixed function of x."""
    queue = [lambda x: x / 255, lambda x: x.flip(3) / 255, lambda x: 1 - x / 255]
    script.augment = lambda views: torch.cat([queue.pop(0)(v) for v in views.split(len(x))])
    script.chain_end = lambda f, x, **_: x
    method = make(script).eval()
    model = common.distribute(method)                   # it averages as long as it lives
    loss, _ = model(x)
    loss.backward()
    return loss.detach(), flattened_gradient(method)


def everything():
    """[(loss, gradient)] of this rank's share of the batches."""
    torch.manual_seed(1)
    x, images = torch.randn(12, 8), draw_shapes(8, seed=3)[0]
    share = slice(common.rank(), None, common.world_size())
    return [contrast(x[share]), *(step(script, images[share]) for script in SCRIPTS)]


def work(rank, folder, cut):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    if cut:
        def gather_without_gradient(x):
            parts = [torch.empty_like(x) for _ in range(2)]
            dist.all_gather(parts, x.detach())
            parts[rank] = x
            return torch.cat(parts)
        common.gather = gather_without_gradient
    results = everything()
    for loss, _ in results:
        dist.all_reduce(loss)
    if rank == 0:
        torch.save([(loss / 2, gradient) for loss, gradient in results], f"{folder}/results")
    dist.destroy_process_group()


def on_two_ranks(folder, cut=False):
    ranks = [CONTEXT.Process(target=work, args=(rank, folder, cut)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert [wait(rank) for rank in ranks] == [0, 0]
    return torch.load(folder / "results")


@pytest.fixture
def one_rank(monkeypatch):
    for script in SCRIPTS:                              # `step` replaces these for good
        monkeypatch.setattr(script, "augment", None)
        monkeypatch.setattr(script, "chain_end", None, raising=False)
    return everything()


def test_two_ranks_equal_one(one_rank, tmp_path):
    for (loss, gradient), (loss_2, gradient_2) in zip(one_rank, on_two_ranks(tmp_path)):
        assert gradient.abs().max() > 1e-3
        assert torch.allclose(loss, loss_2, atol=1e-5)
        assert torch.allclose(gradient, gradient_2, atol=1e-5)


def test_a_gather_without_gradient_is_noticed(one_rank, tmp_path):
    cut = on_two_ranks(tmp_path, cut=True)
    same = [torch.allclose(a, b, atol=1e-5) for (_, a), (_, b) in zip(one_rank, cut)]
    assert same == [False, False, True, False, True]    # BYOL has no negatives to gather
    assert all(torch.allclose(a, b, atol=1e-5) for (a, _), (b, _) in zip(one_rank, cut))


def test_cuda_ranks_name_their_device(monkeypatch):
    calls = []
    for name, value in dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))        # is there
    args = SimpleNamespace(device="cuda")
    common.set_up(args)
    assert args.device == "cuda:1"
    assert calls == [torch.device("cuda:1"), "nccl"]
    args = SimpleNamespace(device="cpu")
    common.set_up(args)
    assert args.device == "cpu" and calls[2:] == ["gloo"]


def test_nccl_is_told_its_device_at_a_barrier(monkeypatch):
    told = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "barrier", lambda device_ids: told.append(device_ids))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for backend in ("nccl", "gloo"):
        monkeypatch.setattr(dist, "get_backend", lambda: backend)
        common.barrier()
    assert told == [[3], None]


def test_the_ranks_part_at_the_end(monkeypatch):
    parted = []
    monkeypatch.setattr(common.signal, "signal", lambda *_: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: parted.append(True))
    common.launch(lambda: None)
    assert parted == []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    common.launch(lambda: None)
    assert parted == [True]


@pytest.mark.parametrize("status", [None, 3])
def test_a_status_of_its_own_reaches_the_shell(status):
    with pytest.raises(SystemExit) as end:
        common.launch(lambda: sys.exit(status))
    assert end.value.code == status
