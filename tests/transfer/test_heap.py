"""Freed memory of a frame's size stays mapped: taking it again costs no page faults."""

import subprocess
import sys

PROGRAM = """
import ctypes, resource, sys
from transfer.heap import keep_freed
if sys.argv[1] == "keep":
    keep_freed(64 << 20)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def turn(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        blocks = [libc.malloc(4 << 20) for _ in range(4)]
        for block in blocks:
            ctypes.memset(block, 1, 4 << 20)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
turn(3)
print(turn(5))
"""


def faults(how):
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


def test_freed_frames_are_not_faulted_in_again():
    assert faults("keep") < 100 < faults("leave")
