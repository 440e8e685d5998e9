"""LAMB where a matrix has no gradient any more."""

import torch

from distilcb.engine.lamb import ShardedLamb


def test_a_matrix_without_a_gradient_stays_though_it_had_momentum():
    torch.manual_seed(0)
    moving, resting = (torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2))
    groups = [
        {"name": "matrices", "params": [moving, resting], "weight_decay": 0.01},
        {"name": "vectors", "params": []},
    ]
    lamb = ShardedLamb(groups, lr=0.1, betas=(0.9, 0.999), eps=1e-6)
    moving.grad, resting.grad = torch.randn(4, 3), torch.randn(4, 3)
    lamb.step()
    before = [moving.detach().clone(), resting.detach().clone()]
    resting.grad.zero_()
    lamb.step()
    assert torch.equal(resting, before[1])
    step = (moving.detach() - before[0]).norm()
    torch.testing.assert_close(step, 0.1 * before[0].norm())
