"""Speed and memory of the kernels and of the detector, each against what one would use instead."""

import os

# The profiler, which counts memory, is not to report on itself. Before torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
