"""What every test runs under: checked shapes, one thread, no network, a fixed seed."""

import os
import platform

# Before torch or nautilus is imported anywhere. Workers share the cores, so one thread each is fastest.
os.environ["NAUTILUS_CHECK"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pathlib  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

GOLDEN = pathlib.Path(__file__).parent / "golden"

hypothesis.settings.register_profile("developer", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "developer")


def pytest_addoption(parser):
    parser.addoption("--rewrite-golden", action="store_true", help="record golden curves instead of comparing them")


def pytest_collection_modifyitems(items):
    # The fast lane first: most mistakes show there.
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in for_gpu:
                item.add_marker(pytest.mark.skip(reason="no GPU that torch can use"))


@pytest.fixture(autouse=True)
def fixed_seeds():
    """The package takes generators; this only makes a test that forgot to hand one in repeatable."""
    random.seed(0)
    for name, seed in (("numpy", lambda numpy: numpy.random.seed(0)), ("torch", lambda torch: torch.manual_seed(0))):
        if name in sys.modules:
            seed(sys.modules[name])


ARM = platform.machine() in ("aarch64", "arm64")


@pytest.fixture(params=["neon_dot", "neon", "baseline"] if ARM else ["avx512", "avx2", "baseline"])
def level(request):
    """Runs the test with native kernels of one instruction level, and leaves the best one behind."""
    from nautilus.ops.cpu.library import FILE, native

    library = native()
    if library.functions is None:
        # One that is there and refused, an old build for example, would otherwise hide all these tests.
        (pytest.fail if FILE.exists() and os.environ.get("NAUTILUS_NATIVE") != "off" else pytest.skip)(library.reason)
    name, names = library.functions.nautilus_level_name, []
    while (found := name(len(names))) is not None:
        names.append(found.decode())
    if request.param not in names or not library.functions.nautilus_level_is_here(names.index(request.param)):
        pytest.skip(f"this machine cannot run {request.param}")
    library.functions.nautilus_choose(names.index(request.param))
    yield request.param
    library.functions.nautilus_choose(names.index(library.level))


@pytest.fixture(scope="session")
def in_few_bits():
    """in_few_bits(model, format): the model with every matrix encoded but the embedding's and the routers'."""
    from nautilus.model.linear import Linear
    from nautilus.model.moe import ExpertWeights
    from nautilus.ops.encode import encode

    def quantise(model, format):
        for module in model.modules():
            if isinstance(module, Linear):
                module.hold(encode(module.weight, format))
            elif isinstance(module, ExpertWeights):
                for name, stack in list(module.named_parameters()):
                    module.hold(name, tuple(encode(matrix, format) for matrix in stack))
        return model.requires_grad_(False)

    return quantise


@pytest.fixture
def check_golden(request):
    """check_golden(name, values, rel=...) compares a curve with tests/golden/<name>.txt, or records it on request."""

    def check(name: str, got: list[float], *, rel: float):
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--rewrite-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{i} {value:.6f}\n" for i, value in enumerate(got)))
            return
        want = [float(line.split()[1]) for line in path.read_text().splitlines()]
        assert len(got) == len(want), f"{name}: {len(got)} points, recorded {len(want)}"
        far = [(i, g, w) for i, (g, w) in enumerate(zip(got, want, strict=True)) if not abs(g - w) <= rel * abs(w)]
        assert not far, f"{name}: first departs at step {far[0][0]}: {far[0][1]:.6f}, recorded {far[0][2]:.6f}"

    return check
