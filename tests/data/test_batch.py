import pytest
import torch

from nautilus.data.batch import Batch, join


def batch(rows=2, length=3, **more) -> Batch:
    tokens = torch.arange(rows * length).reshape(rows, length)
    return Batch(tokens, {"next_token": torch.ones(rows, length)}, **more)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tokens=torch.zeros(2, 3)), "tokens has type torch.float32"),
        (dict(tokens=torch.zeros(3, dtype=torch.int64)), "rows, time"),
        (dict(weights={}), "at least one objective term"),
        (dict(weights={"next_token": torch.ones(2, 4)}), r"shape \(2, 4\) but tokens has \(2, 3\)"),
        (dict(weights={"next_token": torch.ones(2, 3, dtype=torch.int64)}), "floating"),
        (dict(document=torch.ones(2, 3)), "document has type"),
        (dict(document=torch.ones(2, 1, dtype=torch.int64)), "document has shape"),
        (dict(advantage=torch.ones(2)), "advantage has shape"),
        (dict(teacher_logprob=torch.ones(2, 3, dtype=torch.int32)), "teacher_logprob has type"),
    ],
)
def test_a_wrong_shape_or_type_is_named(change, message):
    right = dict(tokens=torch.zeros(2, 3, dtype=torch.int64), weights={"next_token": torch.ones(2, 3)})
    Batch(**right)
    with pytest.raises(ValueError, match=message):
        Batch(**(right | change))


def test_moving_a_batch_moves_every_tensor():
    moved = batch(document=torch.ones(2, 3, dtype=torch.int64), advantage=torch.ones(2, 3)).to("meta")
    assert {moved.tokens.device.type, moved.weights["next_token"].device.type} == {"meta"}
    assert {value.device.type for value in moved.evidence().values()} == {"meta"}


def test_taking_rows_keeps_everything_aligned():
    whole = batch(rows=4, document=torch.arange(12).reshape(4, 3), sampled_logprob=torch.rand(4, 3))
    part = whole.take([2, 0])
    assert torch.equal(part.tokens, whole.tokens[[2, 0]])
    assert torch.equal(part.document, whole.document[[2, 0]])
    assert torch.equal(part.sampled_logprob, whole.sampled_logprob[[2, 0]])
    assert torch.equal(join([whole.take([0, 1]), whole.take([2, 3])]).document, whole.document)


def test_joining_different_kinds_of_rows_gives_unknown_terms_no_weight():
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    policy = Batch(tokens, {"policy": torch.ones(1, 3)}, advantage=torch.full((1, 3), 2.0))
    both = join([batch(rows=1, document=torch.tensor([[1, 1, 2]])), policy])
    assert both.weights["next_token"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert both.weights["policy"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert both.advantage.tolist() == [[0, 0, 0], [2, 2, 2]]
    assert both.document.tolist() == [[1, 1, 2], [1, 1, 1]]
    with pytest.raises(ValueError, match=r"row lengths \[3, 4\]"):
        join([batch(), batch(length=4)])


def test_the_fingerprint_follows_every_tensor():
    plain = batch()
    changed = [
        Batch(plain.tokens + 1, plain.weights),
        Batch(plain.tokens, {"other": plain.weights["next_token"]}),
        Batch(plain.tokens, {"next_token": plain.weights["next_token"] * 2}),
        Batch(plain.tokens, plain.weights, document=torch.ones(2, 3, dtype=torch.int64)),
    ]
    assert batch().fingerprint == plain.fingerprint
    assert len({plain.fingerprint, *(other.fingerprint for other in changed)}) == 5
