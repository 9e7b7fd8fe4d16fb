"""What inference puts in the place of plain modules: fused twins on kernels compiled for the processor.

`modeling` knows nothing of it. See `swap` for what a twin is and when it steps back.
"""

from m2f_video.acceleration.context import accelerated, prepare, release, report
from m2f_video.acceleration.swap import ModuleReport

__all__ = ["ModuleReport", "accelerated", "prepare", "release", "report"]
