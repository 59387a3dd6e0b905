"""The chunked divergence and its gradients are those of the formula."""

import pytest
import torch

from nautilus.ops.encode import encode
from nautilus.posttrain import divergence
from nautilus.posttrain.divergence import weighted_kl, weighted_kl_reference

torch.set_num_threads(1)


def problem(dtype=torch.float64, students=3, rows=37, words=29):
    draw = torch.Generator().manual_seed(1)
    shapes = (students, rows, 8), (words, 8), (rows, 6), (words, 6)
    student, own, teacher, other = (torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes)
    weight = torch.rand(students, rows, generator=draw, dtype=dtype)
    weight = weight * (torch.rand(students, rows, generator=draw) > 0.4)
    return student.requires_grad_(), own.requires_grad_(), teacher, other, weight


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradients(temperature, reverse, monkeypatch):
    monkeypatch.setattr(divergence, "ELEMENTS", 1)  # chunks of 16 rows
    student, own, teacher, other, weight = problem()
    weight[:, 5] = 0
    results = []
    for function in (weighted_kl, weighted_kl_reference):
        total, parts = function(student, own, teacher, other, weight, temperature=temperature, reverse=reverse)
        results.append((total, parts, *torch.autograd.grad(3 * total, (student, own))))
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted)
    assert results[0][0] > 0 and not results[0][1].requires_grad


def test_a_student_like_its_teacher_has_nothing_to_learn():
    student, own, teacher, other, weight = problem(students=1)
    for reverse in (False, True):
        same = teacher[None].clone().requires_grad_()
        total, _ = weighted_kl(same, other, teacher, other, weight, reverse=reverse)
        torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-12, rtol=0)


def test_rows_without_weight_are_not_looked_at():
    student, own, teacher, other, weight = problem()
    weight[:, 3], poisoned = 0, student.detach().clone()
    poisoned[:, 3] = float("nan")
    clean, _ = weighted_kl(student, own, teacher, other, weight)
    total, _ = weighted_kl(poisoned.requires_grad_(), own, teacher, other, weight)
    assert torch.equal(clean, total)


def test_the_teacher_and_a_frozen_matrix_get_no_gradient():
    student, own, teacher, other, weight = problem()
    teacher.requires_grad_()
    own.requires_grad_(False)
    weighted_kl(student, own, teacher, other, weight)[0].backward()
    assert teacher.grad is None and own.grad is None and student.grad is not None


def test_a_head_in_few_bits_stands_for_its_numbers():
    student, _, _, _, weight = problem(torch.float32)
    packed = encode(torch.randn(64, 32), "fp8_e4m3")
    rows = torch.randn(3, 37, 32, requires_grad=True)
    total, _ = weighted_kl(rows, packed, rows[0].detach(), packed, weight.float())
    wanted, _ = weighted_kl_reference(rows, packed.decode(torch.float32), rows[0], packed.decode(torch.float32), weight)
    torch.testing.assert_close(total, wanted)


def test_bf16_rows_are_compared_in_float32():
    *numbers, weight = (t.detach() for t in problem(torch.float32))
    student, own, teacher, other = (t.bfloat16() for t in numbers)
    total, _ = weighted_kl(student, own, teacher, other, weight)
    wanted, _ = weighted_kl_reference(student.float(), own.float(), teacher.float(), other.float(), weight)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, wanted, rtol=2e-2, atol=0)
