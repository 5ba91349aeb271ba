"""One sequence over two ranks: each holds its own tokens, and the layer gives what it gives on one rank.

torchrun --nproc-per-node=2 examples/two_ranks.py
"""

import torch
import torch.distributed as dist

from seqtrain.data.batches import even_offsets
from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.parallel import ShardedSequence

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same layer and the same tokens on every rank
layer = MIXERS.get("gated_delta_net")
mixer = layer(layer.Config(), LayerShape(width=64, heads=4))
x = torch.randn(1, 301, 64)

offsets = even_offsets(x.shape[1], dist.get_world_size())
sequence = ShardedSequence(group=dist.group.WORLD, offsets=offsets)
out, _ = mixer(x[:, sequence.start : sequence.end], sequence=sequence)
whole, _ = mixer(x)
difference = (out - whole[:, sequence.start : sequence.end]).abs().max()
print(f"rank {dist.get_rank()}: tokens {sequence.start} to {sequence.end}, largest difference {difference:.1e}")
out.sum().backward()  # gradients travel back the same way
dist.destroy_process_group()
