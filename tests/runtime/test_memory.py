import subprocess
import sys

# In a process of its own: the setting lasts as long as the process.
SCRIPT = """
import resource
from nautilus.runtime import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(32_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = faults()
print(int(keep_memory()), fresh, faults())
"""


def test_freed_memory_is_kept_for_the_next_tensor():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept, before, after = map(int, done.stdout.split())
    assert not kept or after < before / 5
