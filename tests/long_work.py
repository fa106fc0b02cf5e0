"""Under torchrun: rank 0 works alone for longer than a collective may take (3 s). test_dist.py starts it."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dist
from dist import DistOptions

if __name__ == "__main__":
    world = dist.init(DistOptions(gpu_timeout_minutes=0.05))

    def slow(answer: int, seconds: float = 6.0) -> int:
        time.sleep(seconds if world.main else 0)
        return answer

    assert dist.from_main(lambda: slow(1), world, long=True) == 1
    assert dist.main_first(lambda: slow(2), world) == 2
    sys.stdout.write(f"rank {world.rank} has both\n")  # in one piece: two ranks write at once
    sys.stdout.flush()
    dist.from_main(lambda: slow(3), world)  # not announced: a collective's limit holds
    print("no limit", flush=True)
