"""torchvision's FCOS and RetinaNet on our kernels, in place and with the same results.

    from fcos_ext.integrations.torchvision import accelerate, restore

    print(accelerate(model))  # the model you have; train, evaluate, save and load it as before
    restore(model)            # torchvision's own again

The loss and the post-processing are replaced; the network is not touched.
"""

from __future__ import annotations

try:
    import torchvision  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fcos_ext.integrations.torchvision: torchvision must be installed and belong to this "
        f"torch, got: {error}"
    ) from error

from .fcos import AcceleratedFCOS
from .report import Report
from .retinanet import AcceleratedRetinaNet
from .swap import Refused, accelerate, restore

__all__ = [
    "AcceleratedFCOS",
    "AcceleratedRetinaNet",
    "Refused",
    "Report",
    "accelerate",
    "restore",
]
