"""The symmetric indefinite factorization against LU and eigenvalues."""

from __future__ import annotations

import pytest
import torch

from _hessian import symmetric_factor
from _hessian.symmetric_factor import factor_symmetric, mirror, subtract_gram
from tests.oracles import (
    random_vector,
    relative,
)


@pytest.mark.parametrize("block, growth", [(128, 1e3), (7, 1.0), (7, 0.1), (1, 1.0)])
def test_symmetric_factor(block, growth, monkeypatch):
    """G = F Σ Fᵀ with interchanges, 2 × 2 pivots and blocks, against eigenvalues; an exactly singular G gives None."""
    monkeypatch.setattr(symmetric_factor, "BLOCK", block)
    monkeypatch.setattr(symmetric_factor, "_PIVOT_GROWTH", (growth, growth))
    for m in (1, 2, 3, 17, 64, 129):
        M = random_vector(m, m, seed=m)
        for G in (M + M.T, M @ M.T, -(M @ M.T), torch.block_diag(M @ M.T, -M - M.T)):
            factor = factor_symmetric(G.clone())
            white = factor.whiten(torch.eye(len(G), dtype=G.dtype))  # F⁻¹
            signs = torch.ones(len(G), 1).double() if factor.signs is None else factor.signs
            rebuilt = white @ G @ white.mT - torch.diag(signs[:, 0])
            inverse = factor.solve(torch.eye(len(G), dtype=G.dtype))
            eigenvalues = torch.linalg.eigvalsh(G)
            condition = (eigenvalues.abs().max() / eigenvalues.abs().min()).item()
            assert rebuilt.abs().max() <= 1e-14 * condition * m
            vectors = factor.whiten_vectors(torch.eye(len(G), dtype=G.dtype)).mT
            assert relative(vectors - white, white) <= 1e-13 * condition
            assert relative(G @ inverse - torch.eye(len(G), dtype=G.dtype), G) <= 1e-13 * condition
            assert factor.num_negative == (eigenvalues < 0).sum() == (signs < 0).sum()
            assert factor.logabsdet == pytest.approx(eigenvalues.abs().log().sum().item(), abs=1e-13 * condition)
            assert (factor_symmetric(G.clone(), definite_only=True) is None) == bool((eigenvalues < 0).any())


def test_blocks_that_are_nearly_singular_are_not_eliminated_alone(monkeypatch):
    """[[δ, B], [Bᵀ, 0]]: no eigenvalue is small, but a block's own pivots are δ, whose elimination adds BᵀB/δ."""
    monkeypatch.setattr(symmetric_factor, "BLOCK", 4)
    B = torch.linalg.qr(random_vector(12, 12)).Q
    for delta in (0.0, 1e-14, -1e-14):
        G = torch.zeros(24, 24, dtype=torch.float64)
        G[:12, 12:], G[12:, :12] = B, B.T
        G[:12, :12].diagonal().fill_(delta)
        v = random_vector(24, 2)
        factor = factor_symmetric(G.clone())
        assert factor.num_negative == 12
        assert relative(G @ factor.solve(v) - v, v) <= 1e-14


@pytest.mark.parametrize("n", [3, 128, 129, 300])
def test_cost_to_go_is_symmetric(n):
    """P − WᵀΣW, to the bit where P has blocks: what is not symmetric would grow from layer to layer."""
    P, W, signs = random_vector(n, n), random_vector(17, n, seed=1), random_vector(17, 1, seed=2).sign()
    P = P + P.mT
    expected = P - W.mT @ (signs * W)
    rounded = P + 1e-15 * random_vector(n, n, seed=3)
    signed = subtract_gram(rounded, W.clone(), signs)
    mirror(rounded)
    assert relative(signed - signs * W, W) == 0
    assert relative(rounded - expected, expected) <= 1e-14
    assert n <= 128 or torch.equal(rounded, rounded.mT)


def test_one_block_with_interchanges(monkeypatch):
    """A row more than a block, the last of them in a 2 × 2 pivot, and no pivot in the block alone: one block, whose
    rows are not in order."""
    monkeypatch.setattr(symmetric_factor, "BLOCK", 4)
    found = 0
    for seed in range(40):
        G = random_vector(5, 5, seed=seed)
        G = G + G.mT
        G[0, :4] = G[:4, 0] = 0.0
        G[0, 4] = G[4, 0] = 1.0
        factor = factor_symmetric(G.clone())
        found += factor.edges == [0, 5] and factor.order is not None
        v = random_vector(5, 3)
        assert relative(G @ factor.solve(v) - v, v) <= 1e-11
        white = factor.whiten(v.clone())
        assert relative(factor.whiten_vectors(v.mT.clone()).mT - white, white) <= 1e-11
        assert relative(white.mT @ factor.sign(white.mT.clone()).mT - v.mT @ factor.solve(v), v) <= 1e-9
    assert found > 0


@pytest.mark.parametrize("block", [1, 4, 7, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interchanges_are_those_of_lapack(block, dtype, monkeypatch):
    """L, its rows in order, and D's off-diagonals: bit for bit what LAPACK's syconv makes of the same factor."""
    monkeypatch.setattr(symmetric_factor, "BLOCK", block)
    for m, diagonal in ((2, 0.0), (33, 1.0), (64, 0.0), (65, 3.0)):
        G = random_vector(m, m, seed=m).to(dtype)
        G = G + G.mT
        G.diagonal().mul_(diagonal)  # 0: many pivots are 2 × 2
        sytrf, syconv = (symmetric_factor._lapack(name, G.numpy()) for name in ("sytrf", "syconv"))
        packed, pivots, _ = sytrf(G.numpy(), lower=1)
        expected, below, _ = syconv(packed, pivots, lower=1, way=0)
        first = (pivots < 0).nonzero()[0][::2]
        interchanges = abs(pivots) - 1
        interchanges[first] = first
        lower = packed.copy(order="F")
        found = symmetric_factor._converted(lower, first, interchanges)
        assert len(first) > m // 8 or diagonal
        assert (found == below).all() and (torch.tensor(lower - expected).tril() == 0).all()


def test_float32_factor_is_as_good_as_lu():
    """Backward error of the blocks' explicit inverses at a thousand rows, where float32 has no digits to lose."""
    M = random_vector(1024, 1024)
    G, v = M + M.mT, random_vector(1024, 4, seed=1)
    low = factor_symmetric(G.float()).solve(v.float()).double()
    lu = torch.linalg.solve(G.float(), v.float()).double()
    ours, theirs = (torch.linalg.norm(G @ x - v) / torch.linalg.norm(x) for x in (low, lu))
    assert ours <= 3 * theirs


def test_growth_is_allowed_where_the_damping_hides_its_rounding(monkeypatch):
    """The same matrix with blocks, and at a small damping with pivots from all of it."""
    monkeypatch.setattr(symmetric_factor, "BLOCK", 8)
    M = random_vector(32, 32)
    assert factor_symmetric(M + M.T, 1.0).order is None
    assert factor_symmetric(M + M.T, 1e-8).order is not None
