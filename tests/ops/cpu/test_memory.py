"""What leaves memory, and above all what does not: whoever lets go of other memory than a file's loses it."""

import ctypes
import dataclasses
import mmap
import os
import sys
import time

import pytest
import torch

from nautilus.ops.cpu import memory
from nautilus.ops.cpu.linear import linear_native
from nautilus.ops.cpu.memory import let_go, roomy
from nautilus.ops.cpu.norm import embed_native
from nautilus.ops.cpu.packs import packed_once
from nautilus.ops.cpu.quant import repacked, repacked_form
from nautilus.ops.cpu.tape import record
from nautilus.ops.encode import encode

PAGE = mmap.PAGESIZE
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages are a file's")


def resident(tensor) -> int:
    """Pages of the tensor that this process has in its memory, those at its ends included."""
    first, end = tensor.data_ptr() // PAGE, -(-(tensor.data_ptr() + tensor.nbytes) // PAGE)
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(8 * first)
        entries = torch.frombuffer(bytearray(pages.read(8 * (end - first))), dtype=torch.int64)
    return int((entries < 0).sum())


def numbers(count):
    return torch.arange(count, dtype=torch.int64).mul(2654435761).to(torch.uint8)


def mapped(path, content, flags=mmap.MAP_PRIVATE):
    """The file's memory as the model's files are mapped: what is written to it stays out of the file."""
    path.write_bytes(bytes(content.numpy()))
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def test_what_lies_in_a_file_leaves_memory_and_comes_back(tmp_path):
    want = numbers(40 * PAGE)
    tensor = mapped(tmp_path / "file", want)
    assert torch.equal(tensor, want) and resident(tensor) == 40
    let_go([tensor])
    assert resident(tensor) == 0
    assert torch.equal(tensor, want) and resident(tensor) == 40


def test_a_file_without_a_name_comes_back_too(tmp_path):
    want = numbers(8 * PAGE)
    tensor = mapped(tmp_path / "file", want)
    assert torch.equal(tensor, want)
    (tmp_path / "file").unlink()
    let_go([tensor])
    assert torch.equal(tensor, want)


def anonymous(want, flags):
    return torch.frombuffer(mmap.mmap(-1, len(want), flags=flags), dtype=torch.uint8).copy_(want)


MEMORY = {
    "of torch": lambda want: want.clone(),
    "of numpy": lambda want: torch.from_numpy(want.numpy().copy()),
    "large pages": lambda want: roomy(len(want)).copy_(want),
    "private": lambda want: anonymous(want, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    "shared": lambda want: anonymous(want, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS),
    "shared by torch": lambda want: want.clone().share_memory_(),
}


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("size", [1, 100, PAGE, 40 * PAGE, (1 << 23) + 5])
def test_no_other_memory_loses_a_byte(kind, size):
    want = numbers(size)
    tensor = MEMORY[kind](want)
    let_go([tensor, tensor[1:], tensor[PAGE // 2 : -3]])
    assert torch.equal(tensor, want)


@pytest.mark.parametrize("byte", [0, 7 * PAGE + 5, 20 * PAGE - 1])
def test_what_was_written_to_a_mapped_file_is_kept(byte, tmp_path):
    """As optimisers write to the weights of a loaded model."""
    want = numbers(20 * PAGE)
    tensor = mapped(tmp_path / "file", want)
    tensor[byte] += 1
    want[byte] += 1
    let_go([tensor])
    assert torch.equal(tensor, want)
    assert resident(tensor) == 20


def test_what_was_written_to_a_shared_mapping_is_kept(tmp_path):
    want = numbers(20 * PAGE)
    tensor = mapped(tmp_path / "file", want, flags=mmap.MAP_SHARED)
    tensor.add_(1)
    let_go([tensor])
    assert torch.equal(tensor, want + 1)


def test_neighbours_in_the_same_pages_stay(tmp_path):
    tensor = mapped(tmp_path / "file", numbers(12 * PAGE))
    tensor.sum()
    let_go([tensor[3 * PAGE + 1 : 6 * PAGE - 1], tensor[7 * PAGE + 1 : 8 * PAGE]])
    assert resident(tensor[3 * PAGE : 4 * PAGE]) == resident(tensor[5 * PAGE : 6 * PAGE]) == 1
    assert resident(tensor[4 * PAGE : 5 * PAGE]) == 0
    assert resident(tensor) == 11


def test_only_what_is_contiguous_leaves(tmp_path):
    tensor = mapped(tmp_path / "file", numbers(16 * PAGE))
    tensor.sum()
    let_go([tensor.view(4, 4 * PAGE)[:, : 2 * PAGE]])
    assert resident(tensor) == 16


def test_nothing_leaves_where_the_system_does_not_say(tmp_path, monkeypatch):
    tensor = mapped(tmp_path / "file", numbers(16 * PAGE))
    tensor.sum()
    for answer in (b"", bytes(8 * 15)):
        monkeypatch.setattr(memory.os, "pread", lambda *_, answer=answer: answer)
        let_go([tensor])
        assert resident(tensor) == 16

    def refuses(*_):
        raise PermissionError

    monkeypatch.setattr(memory.os, "pread", refuses)
    let_go([tensor])
    assert resident(tensor) == 16


# ----- what comes back -----------------------------------------------------------------------------------------------

ROWS = 8192  # of a page each: more than the system reads ahead


def cached(tensor) -> int:
    """Pages of a file's memory that the system has, whether this process does or not."""
    count = -(-tensor.nbytes // PAGE)
    held = (ctypes.c_ubyte * count)()
    assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), held)
    return sum(page & 1 for page in held)


def test_a_table_that_steps_look_rows_up_in_is_read_back_when_they_are_recorded(tmp_path, built):
    path, tokens = tmp_path / "table", torch.tensor([3])
    table = mapped(path, torch.zeros(ROWS * PAGE, dtype=torch.uint8)).view(torch.float32).view(ROWS, -1)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(table) == ROWS:
        pytest.skip("the file system keeps its files in memory")
    with torch.inference_mode():
        embed_native(tokens, table, torch.float32)
        assert cached(table) < ROWS  # a row, and what the system reads ahead
        record(lambda: embed_native(tokens, table, torch.float32), [tokens])
    end = time.monotonic() + 20
    while cached(table) < ROWS and time.monotonic() < end:
        time.sleep(0.01)
    assert cached(table) == ROWS


# ----- packed once ---------------------------------------------------------------------------------------------------


def in_file(path, tensor):
    flat = mapped(path, tensor.contiguous().view(torch.uint8).flatten())
    return flat.view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4", "int8", "fp8_e4m3"])
def test_matrices_in_few_bits_leave_memory_once_they_are_packed(name, built, tmp_path):
    held = [encode(torch.randn(256, 512), name) for _ in range(3)]
    codes = [in_file(tmp_path / str(i), matrix.codes) for i, matrix in enumerate(held)]
    lying = tuple(dataclasses.replace(m, codes=c) for m, c in zip(held, codes, strict=True))
    want = repacked(held)
    assert sum(map(resident, codes)) == 0 and torch.equal(repacked_form(lying).codes, want.codes)
    assert all(resident(c) == c.nbytes // PAGE for c in codes)  # packed anew at each use
    with packed_once({}):
        assert torch.equal(repacked_form(lying).codes, want.codes)
    assert sum(map(resident, codes)) == 0
    assert all(torch.equal(m.decode(), h.decode()) for m, h in zip(lying, held, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_leave_memory_once_they_are_packed_unless_they_were_changed(dtype, built, tmp_path):
    want_OI, x = torch.randn(300, 512).to(dtype), torch.randn(2, 512).to(dtype)
    weight_OI = in_file(tmp_path / "weight", want_OI)
    for changed in (False, True):
        if changed:
            for weight in (want_OI, weight_OI):
                weight[150].mul_(2)
        with packed_once({}):
            assert torch.equal(linear_native(x, weight_OI), linear_native(x, want_OI.clone()))
        assert (resident(weight_OI) == 0) is not changed
        assert torch.equal(weight_OI, want_OI)
