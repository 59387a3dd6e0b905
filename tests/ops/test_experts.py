import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nautilus.ops.encode import encode
from nautilus.ops.experts import experts, experts_reference, experts_sorted, route
from nautilus.ops.formats import Packed

WIDTH, HIDDEN = 5, 7


def logits(tokens, count, seed=0):
    return torch.randn(tokens, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens, count, active, *, gated, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    return {
        "x_RX": normal(tokens, WIDTH),
        "index_RK": torch.stack([torch.randperm(count, generator=draw)[:active] for _ in range(tokens)]),
        "weight_RK": torch.rand(tokens, active, generator=draw, dtype=torch.float64).to(wide),
        "up_EFX": normal(count, HIDDEN, WIDTH),
        "down_EXF": normal(count, WIDTH, HIDDEN),
        "gate_EFX": normal(count, HIDDEN, WIDTH) if gated else None,
    }


def by_hand(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX):
    """Token by token, expert by expert."""
    out = torch.zeros_like(x_RX)
    for r, x in enumerate(x_RX):
        for e, weight in zip(index_RK[r].tolist(), weight_RK[r], strict=True):
            inner = up_EFX[e] @ x
            if gate_EFX is None:
                inner = torch.where(inner > 0, inner * inner, 0.0)
            else:
                gate = gate_EFX[e] @ x
                inner = gate / (1 + torch.exp(-gate)) * inner
            out[r] += weight * (down_EXF[e] @ inner)
    return out


@pytest.mark.parametrize("gated", [False, True])
def test_each_form_is_token_by_token_and_expert_by_expert(gated, close):
    t = inputs(9, 4, 2, gated=gated)
    for function in (experts_reference, experts_sorted):
        close(function.__name__, function(**t), by_hand(**t), 1e-13)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 6, 2), (3, 16, 1), (17, 4, 4), (20, 5, 3)], ids=str)
def test_sorted_equals_one_after_another_with_every_gradient(size, gated, same):
    same(experts_sorted, experts_reference, inputs(*size, gated=gated))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("favourite", [0, 3])
def test_all_tokens_to_one_expert(favourite, gated, same):
    t = inputs(12, 4, 1, gated=gated)
    t["index_RK"][:] = favourite
    same(experts_sorted, experts_reference, t)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("function", [experts_reference, experts_sorted])
def test_an_expert_without_tokens_is_not_touched_not_even_for_nan_in_it(function, gated, pushed):
    t = inputs(6, 5, 2, gated=gated)
    t["index_RK"][:] = torch.tensor([[0, 3], [3, 4], [4, 0], [0, 4], [3, 0], [4, 3]])
    (want,), want_grads = pushed(function, t)
    for name in ("up_EFX", "down_EXF", "gate_EFX"):
        if t[name] is not None:
            t[name][[1, 2]] = float("nan")
    (got,), grads = pushed(function, t)
    assert torch.equal(got, want)
    for name, grad in grads.items():
        assert torch.equal(grad, want_grads[name]), name
        assert not name.endswith(("EFX", "EXF")) or not grad[[1, 2]].any()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("function", [experts_reference, experts_sorted])
def test_nan_in_one_token_stays_with_that_token(function, gated):
    t = inputs(6, 4, 2, gated=gated)
    want, rest = function(**t), [0, 1, 3, 4, 5]
    t["x_RX"][2] = float("nan")
    got = function(**t)
    assert torch.equal(got[rest], want[rest]) and got[2].isnan().all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("function", [experts_reference, experts_sorted])
def test_gradients_are_those_of_finite_differences(function, gated):
    t = inputs(4, 3, 2, gated=gated)
    leaves = {n: v.requires_grad_() for n, v in t.items() if v is not None and v.is_floating_point()}
    call = lambda *v: function(**t | dict(zip(leaves, v, strict=True)))
    assert torch.autograd.gradcheck(call, list(leaves.values()))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 12), count=st.integers(1, 7), data=st.data(), gated=st.booleans())
def test_the_order_of_tokens_of_choices_and_of_experts_changes_nothing(tokens, count, data, gated, close):
    active = data.draw(st.integers(1, count))
    t = inputs(tokens, count, active, gated=gated, seed=data.draw(st.integers(0, 99)))
    want = experts_reference(**t)
    rows, slots, names = (torch.tensor(data.draw(st.permutations(range(n)))) for n in (tokens, active, count))
    moved = {n: None if v is None else v[names] for n, v in t.items() if n.endswith(("EFX", "EXF"))}
    index_RK = names.argsort()[t["index_RK"]][rows][:, slots]
    got = experts_sorted(t["x_RX"][rows], index_RK, t["weight_RK"][rows][:, slots], **moved)
    close("experts", got, want[rows], 1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_float32_loses_no_more_than_its_format(gated, rounds_once):
    """The longest sum is a gradient of a matrix: all tokens; three matmuls follow each other."""
    t = inputs(40, 4, 2, gated=gated, dtype=torch.float32)
    rounds_once(experts_sorted, experts_reference, t, single=2.0**-24 * 3 * 40)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("function", [experts_reference, experts_sorted])
@pytest.mark.parametrize("size", [(40, 8, 3), (80, 32, 16), (80, 60, 1)], ids=str)
def test_bf16_rounds_each_matmul_and_sums_the_experts_in_float32(function, gated, size, rounds_once):
    """Roundings on the way: up (twice its share through the square), the activation, down, and each again on the way
    back: at most eight. The sum over the experts adds one, however many experts are summed."""
    t = inputs(*size, gated=gated, dtype=torch.bfloat16)
    rounds_once(function, experts_reference, t, single=8 * 2.0**-8)


@pytest.mark.parametrize("gated", [False, True])
def test_many_tokens_in_bf16_are_each_counted_once(gated):
    """Whole numbers are exact in bf16, so padding or double counting in any gradient would show in every bit."""
    draw, count = torch.Generator().manual_seed(0), 6
    whole = lambda *shape: torch.randint(-1, 2, shape, generator=draw).double()
    t = inputs(90, count, 2, gated=gated) | {"x_RX": whole(90, 2), "weight_RK": torch.ones(90, 2)}
    t |= {"up_EFX": whole(count, 2, 2), "down_EXF": whole(count, 2, 2)}
    if gated:
        t["gate_EFX"] = torch.zeros(count, 2, 2)  # silu(0) = 0: only the gradients are left, and their halves
    leaves = lambda dtype: {n: v.to(dtype).requires_grad_() for n, v in t.items() if n != "index_RK" and v is not None}
    results = []
    for function, dtype in ((experts_sorted, torch.bfloat16), (experts_reference, torch.float64)):
        wanted = leaves(dtype) | {
            "weight_RK": t["weight_RK"].to(torch.float64 if dtype == torch.float64 else torch.float32)
        }
        out = function(**t | wanted)
        gradients = torch.autograd.grad(out.sum(), [v for n, v in wanted.items() if n != "weight_RK"])
        results.append([out, *gradients])
    assert all(torch.equal(g.double(), w.double()) for g, w in zip(*results, strict=True))


def chosen_by_trying_everything(choice, active, groups, active_groups):
    """The best K experts of the best groups, every set of groups and every set of experts tried."""
    size = len(choice) // groups
    worth = lambda g: sum(sorted(choice[g * size : (g + 1) * size])[-2:])
    open_ = max(itertools.combinations(range(groups), active_groups), key=lambda some: sum(map(worth, some)))
    allowed = [e for e in range(len(choice)) if e // size in open_]
    return set(max(itertools.combinations(allowed, active), key=lambda some: sum(choice[e] for e in some)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), score=st.sampled_from(["sigmoid", "softmax"]), normalise=st.booleans(), seed=st.integers(0, 999))
def test_routing_agrees_with_trying_everything(data, score, normalise, seed):
    groups = data.draw(st.sampled_from([1, 2, 3, 4]))
    active_groups = data.draw(st.integers(1, groups))
    count = groups * data.draw(st.integers(1, 3))
    active = data.draw(st.integers(1, active_groups * count // groups))
    scale = data.draw(st.sampled_from([1.0, 2.5]))
    logits_RE, bias_E = logits(3, count, seed), logits(1, count, seed + 1)[0] if data.draw(st.booleans()) else None
    index_RK, weight_RK, score_RE = route(
        logits_RE,
        bias_E,
        active,
        scale=scale,
        score=score,
        normalise=normalise,
        expert_groups=groups,
        active_groups=active_groups,
    )
    odds = logits_RE.exp()
    torch.testing.assert_close(score_RE, odds / (1 + odds) if score == "sigmoid" else odds / odds.sum(1, keepdim=True))
    for row, s in enumerate(score_RE):
        choice = (s if bias_E is None else s + bias_E).tolist()
        assert set(index_RK[row].tolist()) == chosen_by_trying_everything(choice, active, groups, active_groups)
        chosen = s[index_RK[row]]
        torch.testing.assert_close(weight_RK[row], scale * (chosen / chosen.sum() if normalise else chosen))


def test_the_bias_selects_but_never_weighs():
    logits_RE, bias_E = torch.tensor([[3.0, 2.0, 1.0, -1.0]]).double(), torch.tensor([0.0, 0.0, 0.0, 9.0]).double()
    index_RK, weight_RK, score_RE = route(logits_RE, bias_E, 2, scale=2.5)
    assert set(index_RK[0].tolist()) == {0, 3}
    s = torch.sigmoid(torch.tensor([3.0, -1.0]).double())
    want = dict(zip([0, 3], (2.5 * s / s.sum()).tolist(), strict=True))
    assert dict(zip(index_RK[0].tolist(), weight_RK[0].tolist(), strict=True)) == pytest.approx(want)
    assert torch.equal(score_RE, logits_RE.sigmoid())


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_gradient_of_routing_flows_through_the_chosen_scores_only(score):
    logits_RE, bias_E = logits(4, 6).requires_grad_(), logits(1, 6, 5)[0].requires_grad_()
    index_RK, weight_RK, _ = route(logits_RE, bias_E, 2, score=score)
    push = logits(4, 2, 9)
    got, nothing = torch.autograd.grad(weight_RK, [logits_RE, bias_E], push, allow_unused=True)
    assert nothing is None
    step, want = 1e-6, torch.zeros_like(got)
    for e in range(6):
        nudge = torch.zeros_like(got)
        nudge[:, e] = step
        sides = []
        for moved in (logits_RE + nudge, logits_RE - nudge):
            s = moved.sigmoid() if score == "sigmoid" else moved.softmax(1)
            chosen = s.gather(1, index_RK)
            sides.append((chosen / chosen.sum(1, keepdim=True) * push).sum(1))
        want[:, e] = (sides[0] - sides[1]).detach() / (2 * step)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_ties_choose_distinct_experts_from_open_groups_with_equal_weights():
    index_RK, weight_RK, _ = route(torch.zeros(5, 12), torch.zeros(12), 4, scale=2.5, expert_groups=3, active_groups=2)
    for row in index_RK.tolist():
        assert len(set(row)) == 4 and len({e // 4 for e in row}) <= 2
    assert torch.equal(weight_RK, torch.full((5, 4), 2.5 / 4))


def test_hopeless_scores_give_finite_weights_and_no_closed_group():
    """Scores that underflow to zero are divided by 1e-20, not by zero; a bias below zero does not open a group."""
    index_RK, weight_RK, _ = route(torch.full((2, 4), -200.0), None, 2)
    assert weight_RK.isfinite().all() and (weight_RK >= 0).all()
    bias_E = torch.tensor([-3.0, -3.0, -9.0, -9.0])
    index_RK, _, _ = route(torch.zeros(2, 4), bias_E, 2, expert_groups=2, active_groups=1)
    assert index_RK.sort().values.tolist() == [[0, 1], [0, 1]]


def test_the_chosen_form_is_the_sorted_one_unless_another_is_forced(monkeypatch):
    t = inputs(9, 4, 2, gated=False)
    assert torch.equal(experts(**t), experts_sorted(**t))
    monkeypatch.setenv("NAUTILUS_OPS", "reference")
    assert torch.equal(experts(**t), experts_reference(**t))


# ----- matrices in few bits ------------------------------------------------------------------------------------------


def in_few_bits(t, format):
    """The same call with matrices in few bits, one for each expert, and with the numbers that they stand for."""
    names = [name for name in ("up_EFX", "down_EXF", "gate_EFX") if t[name] is not None]
    packed = {name: tuple(encode(torch.nn.functional.pad(m, (0, 1)), format) for m in t[name]) for name in names}
    return packed, {name: torch.stack([m.decode(t["x_RX"].dtype) for m in packed[name]]) for name in names}


def even(tokens, count, active, *, gated, dtype):
    """Inputs whose widths are even, as two codes in a byte need them: a column more than elsewhere here."""
    t = inputs(tokens, count, active, gated=gated, dtype=dtype)
    t["x_RX"] = torch.nn.functional.pad(t["x_RX"], (0, 1), value=0.5)
    for name, rows in (("up_EFX", HIDDEN + 1), ("down_EXF", WIDTH + 1), ("gate_EFX", HIDDEN + 1)):
        if t[name] is not None:
            t[name] = torch.nn.functional.pad(t[name], (0, 0, 0, rows - t[name].shape[1]), value=0.25)
    return t


@pytest.mark.parametrize("format", ["nvfp4", "fp8_e4m3", "int8"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 70])  # from 65 on bf16 is padded
def test_matrices_in_few_bits_give_the_very_numbers_of_their_values(tokens, dtype, gated, format, monkeypatch):
    t = even(tokens, 6, 2, gated=gated, dtype=dtype)
    packed, numbers = in_few_bits(t, format)
    for name in ("torch", "reference"):
        monkeypatch.setenv("NAUTILUS_OPS", name)
        assert torch.equal(experts(**t | packed), experts(**t | numbers)), name
    monkeypatch.delenv("NAUTILUS_OPS")
    assert experts(**t | packed).isfinite().all()


def test_only_chosen_experts_are_decoded(monkeypatch):
    t = even(3, 6, 2, gated=False, dtype=torch.float32)
    packed, _ = in_few_bits(t, "nvfp4")
    decoded, decode = [], Packed.decode
    monkeypatch.setattr(Packed, "decode", lambda self, dtype: decoded.append(self) or decode(self, dtype))
    monkeypatch.setenv("NAUTILUS_OPS", "torch")
    experts(**t | packed)
    chosen = t["index_RK"].unique().tolist()
    assert 0 < len(chosen) < 6
    assert {id(m) for m in decoded} == {id(packed[name][e]) for name in packed for e in chosen}
    assert len(decoded) == 2 * len(chosen)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_reach_tokens_and_weights_through_matrices_in_few_bits(gated, monkeypatch, close):
    monkeypatch.setenv("NAUTILUS_OPS", "torch")
    t = even(9, 6, 2, gated=gated, dtype=torch.float32)
    packed, numbers = in_few_bits(t, "fp8_e4m3")
    found = []
    for matrices in (packed, numbers):
        leaves = [t[name].clone().requires_grad_() for name in ("x_RX", "weight_RK")]
        out = experts(**t | matrices | dict(zip(("x_RX", "weight_RK"), leaves, strict=True)))
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    for name, got, want in zip(("dx", "dweight"), *found, strict=True):
        close(name, got, want, 1e-5)


def test_a_stack_may_be_numbers_where_the_other_is_in_few_bits(monkeypatch):
    monkeypatch.setenv("NAUTILUS_OPS", "torch")
    t = even(9, 6, 2, gated=False, dtype=torch.float32)
    packed, numbers = in_few_bits(t, "nvfp4")
    want = experts(**t | numbers)
    for name in packed:
        assert torch.equal(experts(**t | numbers | {name: packed[name]}), want)
    some = tuple(numbers["up_EFX"][e] if e % 2 else packed["up_EFX"][e] for e in range(6))
    assert torch.equal(experts(**t | packed | {"up_EFX": some}), want)


def test_no_tokens_need_no_experts():
    t = even(2, 6, 2, gated=False, dtype=torch.float32)
    packed, _ = in_few_bits(t, "nvfp4")
    none = {name: t[name][:0] for name in ("x_RX", "index_RK", "weight_RK")}
    assert experts(**t | packed | none).shape == (0, WIDTH + 1)
