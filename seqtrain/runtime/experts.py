"""Experts under training: the losses of their routers, the biases that a rule moves, and what metrics say of them."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqtrain.models.feed_forward import MoE
from seqtrain.parallel.mesh import Mesh
from seqtrain.runtime.engine import Engine
from seqtrain.runtime.metrics import Record
from seqtrain.runtime.ranks import Ranks


class Experts:
    """The routed experts of a model on one rank, from pass to pass of a step; of a model without any it does nothing.

    A balance loss is that of a micro-batch, all its tokens (none is padding), however it is cut over ranks or into
    segments: the ranks and segments add up to it. Only counts travel, for only they must be known of all tokens before
    a part has its gradient. Biases are moved by what each expert got of the whole batch.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, device: torch.device):
        self._layers = [module for module in model.modules() if isinstance(module, MoE)]
        self._group = mesh.group
        config = self._layers[0].config if self._layers else None
        self._balance, self._z_loss, self._rate = (
            (config.balance, config.z_loss, config.moves) if config else (0.0, 0.0, 0.0)
        )
        # Tokens that each expert of each layer has had in this step, on this rank; the step's balance loss here.
        experts = self._layers[0].experts if self._layers else 0
        self._had = torch.zeros(len(self._layers), experts, dtype=torch.int64, device=device)
        self._found = torch.zeros((), device=device)

    @property
    def need_counts(self) -> bool:
        """Whether the loss of a part of a micro-batch follows from what all of it is routed to."""
        return bool(self._layers and (self._balance or self._z_loss))

    def count(self) -> Tensor | int:
        """Tokens that each expert was given in the pass just made, int64 `[layers, experts]`; it has no loss."""
        return torch.stack([layer.take_routed().counts for layer in self._layers]) if self._layers else 0

    def loss(self, counts: Tensor | int | None = None) -> Tensor | float:
        """This pass's part of the routers' losses, a mean over layers and over the tokens of its micro-batch.

        `counts`: the sum of `count` over all of a row, of which this pass was a segment.
        """
        if not self._layers:
            return 0.0
        routed = [layer.take_routed() for layer in self._layers]
        own = torch.stack([each.counts for each in routed])  # L E
        self._had += own
        if not self.need_counts:
            return 0.0
        counts = (own if counts is None else torch.as_tensor(counts)).clone()
        if self._group is not None:
            dist.all_reduce(counts, group=self._group)
        assigned = counts.sum(1, keepdim=True)
        tokens = assigned / self._layers[0].chosen
        shares = torch.stack([each.shares for each in routed]) / tokens
        balance = len(own.T) * (counts / assigned * shares).sum(1).mean()
        self._found += balance.detach()
        squares = torch.stack([each.squares for each in routed])
        return self._balance * balance + self._z_loss * (squares / tokens[:, 0]).mean()

    @torch.no_grad()
    def finish_step(self, engine: Engine, ranks: Ranks, *, taken: bool, micro_batches: int) -> Record:
        """Moves the biases, unless the step was left out, and gives what metrics say; all ranks call it.

        `micro_batches`: of the whole batch. `b += rate * sign(mean - count)`, arXiv 2408.15664, algorithm 1.
        """
        if not self._layers:
            return {}
        dist.all_reduce(self._had, group=ranks.group)
        assigned = self._had.sum(1, keepdim=True)
        if taken and self._rate:
            biases = [layer.bias for layer in self._layers if layer.bias is not None]
            with engine.changed(biases):
                for bias, had, whole in zip(biases, self._had, assigned, strict=True):
                    bias.add_(self._rate * (whole - len(had) * had).sign())
        record: Record = {"largest_expert_share": float((self._had / assigned).max() * self._layers[0].chosen)}
        if self._balance:
            record["balance_loss"] = ranks.sum(self._found.item())[0] / micro_batches
        self._had.zero_()
        self._found.zero_()
        return record
