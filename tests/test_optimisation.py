"""Learning rate and moving average at start, middle and end."""
import math

import pytest
import torch
import torch.nn as nn

from common import lr_factor, ema_update, target_tau


def rates(schedule, steps):
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(schedule, steps))
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_step_schedule():
    used = rates("step", steps=20_000)                                  # 1000 epochs of 20
    assert used[0] == pytest.approx(1 / 500) and used[249] == pytest.approx(0.5)
    assert used[499] == used[500] == used[10_000] == used[18_999] == 1
    assert used[19_000] == used[19_499] == pytest.approx(0.2)           # epoch 950
    assert used[19_500] == used[19_999] == pytest.approx(0.04)          # epoch 975


def test_warm_up_is_at_most_a_tenth_of_a_short_run():
    for schedule in ("step", "cosine"):
        used = rates(schedule, steps=100)
        assert used[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and used[10] == 1
        assert lr_factor(schedule, 3)(0) == 1                           # too short to warm up
    assert used[55] == pytest.approx(0.5) and 0 < used[99] < 1e-3       # cosine
    assert rates("step", steps=100)[94:99] == pytest.approx([1, 0.2, 0.2, 0.2, 0.04])


def test_target_tau():
    assert target_tau(0.99, 0) == pytest.approx(0.99) and target_tau(0.99, 1) == 1
    assert target_tau(0.99, 0.5) == pytest.approx(0.995)
    assert target_tau(0.96, 0.25) == pytest.approx(1 - 0.04 * (math.cos(math.pi / 4) + 1) / 2)


def test_ema_update_moves_parameters_and_no_buffers():
    target, online = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(target.weight, 1.0)
    nn.init.constant_(online.weight, 3.0)
    online.running_mean += 5
    ema_update(target, online, 0.75)
    assert target.weight.tolist() == [1.5, 1.5] and online.weight.tolist() == [3, 3]
    assert target.running_mean.tolist() == [0, 0]
    ema_update(target, online, 1.0)
    assert target.weight.tolist() == [1.5, 1.5]
