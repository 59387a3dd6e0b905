import torch
from hypothesis import given
from hypothesis import strategies as st

from nautilus.ops.tiles import tiles


@given(rows=st.integers(0, 40), width=st.integers(1, 50), elements=st.integers(1, 400))
def test_tiles_cover_every_row_once_in_order_and_stay_small(rows, width, elements):
    tensor = torch.arange(rows * width).view(rows, width)
    parts = [tensor[rows] for rows in tiles(tensor, elements)]
    assert torch.equal(torch.cat(parts), tensor)
    assert all(part.numel() <= max(elements, width) for part in parts)


def test_elsewhere_than_on_the_cpu_everything_is_one_tile():
    assert [*tiles(torch.empty(1000, 1000, device="meta"), 10)] == [slice(0, 1000)]
