"""Deformable convolution: its samples are moved and weighted by what another convolution says.

Zhu et al., "Deformable ConvNets v2", https://arxiv.org/abs/1811.11168. Torchvision computes it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformableConv2d(nn.Module):
    """A 3x3 convolution whose nine samples are moved by offsets and weighted by masks.

    Args:
        inputs, outputs, stride, groups, bias: as those of :class:`torch.nn.Conv2d`; the padding
            is 1.

    ``offset`` predicts 27 channels: (y, x) of the nine samples, then the nine masks before their
    sigmoid. It starts at zero: samples in place, all weighted by a half.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.stride = stride
        plain = nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=bias)
        self.weight, self.bias = plain.weight, plain.bias
        self.offset = nn.Conv2d(inputs, 27, 3, stride, padding=1)
        self.reset_offset()

    def reset_offset(self) -> None:
        """Samples in place again."""
        nn.init.zeros_(self.offset.weight)
        if self.offset.bias is not None:
            nn.init.zeros_(self.offset.bias)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> DeformableConv2d:
        """A deformable convolution in place of a 3x3 one, with its weights."""
        new = cls(
            conv.in_channels, conv.out_channels, conv.stride[0], conv.groups, conv.bias is not None
        )
        new.weight, new.bias = conv.weight, conv.bias
        return new

    def forward(self, features: Tensor) -> Tensor:
        """
        Args:
            features (Tensor[N, C, H, W]): any floating dtype, as that of a convolution.
        """
        moves, masks = self.offset(features).split((18, 9), dim=1)
        # under autocast the offsets may be bfloat16, which cannot place a sample at 100.3; there
        # torchvision computes in float32
        dtype = self.weight.dtype
        output: Tensor = deform_conv2d(
            features.to(dtype),
            moves.to(dtype).contiguous(),
            self.weight,
            self.bias,
            stride=self.stride,
            padding=1,
            mask=masks.to(dtype).sigmoid(),
        )
        return output.to(features.dtype)
