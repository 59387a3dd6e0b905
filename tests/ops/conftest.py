"""Shared by the tests of the ops: relative errors, and a fast form held against its reference with every gradient."""

import pytest
import torch


def assert_close(name, got, want, rel):
    """Relative error against the size of the reference, not element by element. NaN and inf never pass.

    Inputs are of size 1 everywhere here, so a reference smaller than 1e-4 is compared absolutely, as that.
    """
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    if want.numel() == 0:
        return
    error = ((got - want).norm() / want.norm().clamp_min(1e-4)).item()
    assert error <= rel, f"{name}: relative error {error:.2e}, allowed {rel:.0e}"


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def gradients(function, tensors, rounded_to=()):
    """Outputs, and the gradient of every floating tensor when random numbers are pushed back through all outputs.

    The numbers pushed through output i are first rounded to `rounded_to[i]`, by default to the output's own dtype.
    """
    draw = torch.Generator().manual_seed(0)
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items() if t is not None}
    results = outputs(function(**{**dict.fromkeys(tensors), **leaves}))
    pushes = []
    for result, dtype in zip(results, rounded_to or [r.dtype for r in results], strict=True):
        pushes.append(torch.randn(result.shape, generator=draw, dtype=torch.float64).to(dtype).to(result.dtype))
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return results, dict(zip(wanted, torch.autograd.grad(results, list(wanted.values()), pushes), strict=True))


def assert_same(fast, reference, tensors, *, rel=1e-12, grad_rel=1e-10):
    """`fast` and `reference` give the same outputs and the same gradient of every floating tensor in `tensors`."""
    got, got_grads = gradients(fast, tensors)
    want, want_grads = gradients(reference, tensors)
    for index, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == w.dtype, f"output {index} is {g.dtype}, the reference's is {w.dtype}"
        assert_close(f"output {index}", g, w, rel)
    for name, want_grad in want_grads.items():
        assert got_grads[name].dtype == want_grad.dtype
        assert_close(f"d{name}", got_grads[name], want_grad, grad_rel)


UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def assert_rounds_once(fast, reference, tensors, *, single, roundings=1):
    """Low precision against the reference in float64 on the same (already rounded) inputs.

    `single` bounds what float32 arithmetic inside may lose. A result stored narrower than float32 may lose `roundings`
    times half the distance of its neighbours more.
    """
    got, got_grads = gradients(fast, tensors)
    exact = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
    want, want_grads = gradients(reference, exact, rounded_to=[g.dtype for g in got])
    both = [(f"output {i}", g, w) for i, (g, w) in enumerate(zip(got, want, strict=True))]
    for name, g, w in [*both, *((f"d{n}", got_grads[n], w) for n, w in want_grads.items())]:
        narrow = g.dtype not in (torch.float32, torch.float64)
        assert_close(f"{name} ({g.dtype})", g, w, single + (roundings * UNIT[g.dtype] if narrow else 0))


@pytest.fixture(scope="session")
def close():
    return assert_close


@pytest.fixture(scope="session")
def same():
    return assert_same


@pytest.fixture(scope="session")
def pushed():
    return gradients


@pytest.fixture(scope="session")
def rounds_once():
    return assert_rounds_once
