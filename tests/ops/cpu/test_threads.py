"""Work is shared out among threads, torch's or our own: which thread takes which piece changes no bit."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from nautilus.ops.cpu import library
from nautilus.ops.cpu.activation import swiglu_native
from nautilus.ops.cpu.experts import experts_native
from nautilus.ops.cpu.linear import linear_native
from nautilus.ops.cpu.mamba import mamba_native
from nautilus.ops.cpu.norm import rms_norm_native
from nautilus.ops.cpu.rotary import rotate_native

SOURCES = Path(library.__file__).parent


def case(name):
    """A kernel, and inputs that make several pieces of work of different size."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    if name.endswith("experts"):
        x, index = normal(300, 18).bfloat16(), torch.rand(300, 5, generator=draw).topk(2).indices
        matrices = {"up_EFX": normal(5, 34, 18), "down_EXF": normal(5, 18, 34)}
        matrices |= {"gate_EFX": normal(5, 34, 18)} if name == "gated experts" else {}
        return experts_native, {"x_RX": x, "index_RK": index, "weight_RK": normal(300, 2), **matrices}
    if name == "linear":
        return linear_native, {"x": normal(500, 34), "weight_OI": normal(200, 34)}
    if name == "swiglu":
        return swiglu_native, {"gate": normal(3, 16000), "up": normal(3, 16000)}
    if name == "rotary":
        place = {"position_BT": torch.arange(2, 72).view(2, 35), "frequency": normal(3).double()}
        return partial(rotate_native, **place), {"x_BTHP": normal(2, 35, 5, 6)}
    if name == "norm":
        return partial(rms_norm_native, eps=1e-5), {"hidden": normal(700, 9), "weight_D": normal(9)}
    heads, width, state, taps = 6, 5, 7, 4
    inner, channels = heads * width, heads * width + 2 * 3 * state
    shapes = {"weight_CW": (channels, taps), "bias_C": (channels,), "dt_bias_H": (heads,)}
    shapes |= {"skip_H": (heads,), "norm_I": (inner,), "tail_BRC": (2, taps - 1, channels)}
    t = {n: normal(*shape) for n, shape in shapes.items()} | {"state_BHPN": normal(2, heads, width, state)}
    t |= {"input_BTE": normal(2, 70, inner + channels + heads), "a_H": -normal(heads).exp()}
    return partial(mamba_native, groups=3, eps=1e-5), t


@pytest.fixture(params=["torch's threads", "threads of our own"])
def team(request):
    """Which threads the pieces run on; torch's again afterwards."""
    functions = library.native().functions
    if functions is None:
        pytest.skip(library.native().reason)
    torchs = library.team_of_torch()
    if request.param == "torch's threads" and torchs == (None, None):
        pytest.skip("torch does not run on libgomp here")
    functions.nautilus_borrow_team(*(torchs if request.param == "torch's threads" else (None, None)))
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)
    functions.nautilus_borrow_team(*torchs)


@pytest.mark.parametrize("name", ["mamba", "experts", "gated experts", "linear", "norm", "swiglu", "rotary"])
def test_any_number_of_threads_gives_the_same_bits_forward_and_backward(level, team, name, pushed):
    """The products in the backward of `linear` are torch's, whose bits are its own affair."""
    function, t = case(name)
    torch.set_num_threads(1)
    want, want_grads = pushed(function, t)
    for threads in (4, 2, 3):  # more than before, fewer, and then some that have slept
        torch.set_num_threads(threads)
        got, grads = pushed(function, t)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert name == "linear" or all(torch.equal(grads[n], want_grads[n]) for n in want_grads)


def test_two_callers_at_once_do_not_meet(team):
    torch.set_num_threads(2)
    jobs = [case("mamba"), case("norm")]
    want = [function(**t) for function, t in jobs]

    def repeat(which):
        torch.set_num_threads(2)  # a thread of Python has its own number
        function, t = jobs[which]
        return [function(**t) for _ in range(30)]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(repeat, [0, 1]))
    assert all(torch.equal(*pair) for got in results[0] for pair in zip(got, want[0], strict=True))
    assert all(torch.equal(y, want[1]) for y in results[1])


# Pieces of uneven length on more and more threads, in calls of their own and from threads that stay together: new ones
# join a pool that has worked before. Prints nothing; its exit status counts the calls that came back before all their
# pieces were done.
GROWING = """
#include <atomic>
#include <chrono>
#include <initializer_list>
#include <thread>
#include "pool.h"
struct Count { int threads, bad = 0; std::atomic<int> running{0}, done{0}; };
void call(void* context) {
  auto* c = static_cast<Count*>(context);
  for (int items : {64, 1, 3, 64}) {
    c->done = 0;
    run_pieces(c->threads, items, [](void* context, int64_t item, int) {
      auto* c = static_cast<Count*>(context);
      c->running++;
      std::this_thread::sleep_for(std::chrono::microseconds(item % 7 * 20));
      c->done++;
      c->running--;
    }, c);
    c->bad += c->done != items || c->running != 0;
  }
}
int main() {
  int bad = 0;
  for (int threads = 2; threads <= 8; threads++)
    for (bool together : {false, true, false}) {
      Count count{threads};
      together ? stay_together(threads, call, &count) : call(&count);
      bad += count.bad;
    }
  return bad;
}
"""


@pytest.mark.slow
def test_threads_of_our_own_never_race(tmp_path, sanitizer):
    compiler, _ = sanitizer("tsan")
    (tmp_path / "growing.cpp").write_text(GROWING)
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread", f"-I{SOURCES}"]
    sources = [str(tmp_path / "growing.cpp"), str(SOURCES / "pool.cpp")]
    subprocess.run([compiler, *flags, *sources, "-o", str(tmp_path / "growing")], check=True)
    for _ in range(3):
        ran = subprocess.run([str(tmp_path / "growing")], capture_output=True, text=True)
        if "unexpected memory mapping" in ran.stderr:
            pytest.skip("the thread sanitizer does not know this kernel's layout of memory")
        assert ran.returncode == 0 and not ran.stderr, ran.stderr[-4000:]


LEAVING = """
import os, torch
from nautilus.ops.cpu.library import leave_computing, openmp_of_torch
torch.set_num_threads(2)
double = lambda: (torch.ones(1 << 20) * 2).sum().item()
alone = len(os.listdir("/proc/self/task"))
assert double() == 1 << 21
together = len(os.listdir("/proc/self/task"))
leave_computing()
left = len(os.listdir("/proc/self/task"))
assert double() == 1 << 21, "it may compute again"
print(openmp_of_torch() is not None, together - alone, left - alone)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="there is no list of threads here")
def test_a_thread_that_leaves_computing_to_another_gives_its_team_up():
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, check=True)
    found, began, left = done.stdout.split()
    if found == "False":
        pytest.skip("torch does not run on libgomp here")
    assert (began, left) == ("1", "0")
