"""Takes what a GPU has free, and what is given back, until its standard input ends: ``gpu_hog.py BYTES_TO_LEAVE``."""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager

SIZES = (1 << 30, 64 << 20, 2 << 20)


@contextmanager
def gpu_taken(leave=0):
    """Another process holds all of the GPU's memory but so many bytes, inside ``with``."""
    hog = subprocess.Popen([sys.executable, __file__, str(leave)], stdin=-1, stdout=-1, text=True)
    try:
        assert hog.stdout.readline() == "taken\n"
        yield
    finally:
        hog.communicate(timeout=60)


def main(leave):
    import torch

    ended, held = threading.Event(), []
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()

    def take(size):
        if torch.cuda.mem_get_info()[0] - leave < size:
            return False
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            return False
        return True

    told = False
    while not ended.is_set():
        for size in SIZES:
            while not ended.is_set() and take(size):
                pass
        if not told:
            print("taken", flush=True)
            told = True
        ended.wait(0.005)


if __name__ == "__main__":
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each piece comes from the driver
    main(int(sys.argv[1]))
