"""Put first on the Python path, samples every thread of every Python process while /tmp/profile/on exists, and then writes the stacks, most frequent first, into /tmp/profile.

For seeing where a server's processes spend a request when no profiler may be attached. It holds the interpreter's lock for a fraction of a millisecond every two.
"""

import collections
import os
import sys
import threading
import time
from pathlib import Path

FOLDER = Path("/tmp/profile")  # noqa: S108 (a machine of one's own)
EVERY_SECONDS, LOOK_SECONDS, MOST_FRAMES = 0.002, 0.05, 60


def stack_of(frame: object) -> str:
    parts: list[str] = []
    while frame is not None and len(parts) < MOST_FRAMES:
        code = frame.f_code  # type: ignore[attr-defined]
        parts.append(f"{'/'.join(code.co_filename.rsplit('/', 2)[-2:])}:{code.co_name}:{frame.f_lineno}")  # type: ignore[attr-defined]
        frame = frame.f_back  # type: ignore[attr-defined]
    return ";".join(reversed(parts))


def sample() -> None:
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    samples = 0
    while True:
        if (FOLDER / "on").exists():
            samples += 1
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for thread, frame in sys._current_frames().items():
                if thread != threading.get_ident():
                    seen[names.get(thread, "?"), stack_of(frame)] += 1
            time.sleep(EVERY_SECONDS)
            continue
        if samples:
            lines = [f"{samples} samples: {' '.join(sys.argv)[:200]}", *(f"{count} {name} {stack}" for (name, stack), count in seen.most_common())]
            (FOLDER / f"{os.getpid()}-{int(time.time())}.txt").write_text("\n".join(lines) + "\n", "utf-8")
            seen.clear()
            samples = 0
        time.sleep(LOOK_SECONDS)


threading.Thread(target=sample, daemon=True, name="sampler").start()
