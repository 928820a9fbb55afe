"""What the residual networks share: a stem, blocks, and a linear layer on the mean of their last maps."""

from __future__ import annotations

from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.encode import as_sequence
from spikeloom.layers import GlobalAvgPool, MembraneBlock, NormSpike, channels_last


class ResidualNet(nn.Module):
    """Stem - blocks - global mean - head. Membrane blocks hand on the membrane input U beside the spikes S.

    Args:
        stem: up to a convolution.
        stem_spike: the norm and the neuron behind it.
        blocks: all of one kind.
        head: from the features to the classes.
        T: repeats of a static image.
        stem_pool: between the stem's spikes and the first block; not with membrane blocks.

    Shapes: [N, C, H, W] or [T, N, C, H, W] -> logits [T, N, num_classes].
    """

    dims = 4  # axes of a batch; one more is a sequence

    def __init__(
        self,
        stem: nn.Module,
        stem_spike: NormSpike,
        blocks: nn.ModuleList,
        head: nn.Module,
        T: int,
        stem_pool: nn.Module | None = None,
    ):
        super().__init__()
        self.T = count("T", T)
        self.stem, self.stem_spike, self.stem_pool = stem, stem_spike, stem_pool or nn.Identity()
        self.blocks = blocks
        self.pool = GlobalAvgPool()
        self.head = head
        self.carries_membrane = isinstance(blocks[0], MembraneBlock)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(channels_last(as_sequence(x, self.T, self.dims)))
        if self.carries_membrane:
            s, u = self.stem_spike.with_sum(x)
            for block in self.blocks:
                s, u = block(s, u)
        else:
            s = self.stem_pool(self.stem_spike(x))
            for block in self.blocks:
                s = block(s)
        return self.head(self.pool(s))
