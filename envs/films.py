"""MP4 films of episodes (H.264), by the ffmpeg that imageio brings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def writing(path: Path, fps: int, **options: Any) -> Iterator[Any]:
    """A writer whose append_data() takes frames (H, W, 3) uint8, H and W even; makes the folder.
    fps: frames per second; options: imageio's. OSError, and no file, if ffmpeg cannot write it."""
    import imageio.v2 as imageio
    from imageio_ffmpeg import count_frames_and_secs

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with imageio.get_writer(path, fps=fps, codec="libx264", quality=6, **options) as writer:
            yield writer
        # ffmpeg's last words and exit code are lost: a film that is cut off shows when it is read.
        count_frames_and_secs(path)
    except (OSError, RuntimeError) as error:
        if "ffmpeg" not in str(error).lower():
            raise
        with contextlib.suppress(OSError):
            path.unlink()
        raise OSError(f"{path}: ffmpeg cannot write this film (is there room?)") from None
