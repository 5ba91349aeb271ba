"""Every place sends its map to all after it, which fold what they get: one latency, P states (LASP-2, fla)."""

from functools import partial

import numpy as np
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape
from seqtrain.parallel.schedules.base import Message, Schedule, Travel, map_numbers, packed, unpacked
from seqtrain.parallel.schedules.links import Array, Busy, Costs, Links, Load
from seqtrain.parallel.wires import Wire


class AllGather(Schedule):
    """The first place's map is a state; the others' travel with their transitions."""

    name = "all_gather"

    def receives(self, shape: AffineShape, place: int, places: int) -> list[Message]:
        return [Message(source, map_numbers(shape, source == 0)) for source in range(place)]

    def prepare(self, wire: Wire, shape: AffineShape, arrivals: Tensor) -> Travel:
        return partial(self._run, wire, shape, arrivals)

    def _run(
        self, wire: Wire, shape: AffineShape, arrivals: Tensor, own: AffineMap, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        incoming, mine = first, own
        if incoming is not None:
            mine = AffineMap(None, own.apply(incoming))
        message = packed(mine, shape, state_only=wire.place == 0)
        for place in range(wire.place + 1, wire.places):
            wire.send(message, place)
        wire.receive(wire.place)
        sources = self.receives(shape, wire.place, wire.places)
        for (source, _), piece in zip(sources, arrivals.split([m.numbers for m in sources]), strict=True):
            earlier = unpacked(piece, shape, state_only=source == 0, forgets=wire.forget(source))
            incoming = earlier.update if incoming is None else earlier.apply(incoming)
        assert incoming is not None, "a place after the first gets the first one's state"
        return incoming, own.apply(incoming)

    def alone(self, costs: Costs, load: Load, places: int) -> float:
        # Everything comes in on the last rank's link, where it is folded. Many senders that meet on one link take
        # longer than their bytes: by about half a latency, measured over 4 and 8 ranks at 5 ms.
        received = (places - 1) * load.state + (places - 2) * load.transition
        meeting = costs.latency / 2 if places > 2 else 0.0
        handled = (places - 2) * costs.overhead + received * costs.byte + (places - 1) * load.apply
        return costs.latency + meeting + handled

    def simulate(self, start: Array, busy: Busy, links: Links, load: Load) -> tuple[Array, Busy]:
        places = links.ranks
        index = np.arange(places)
        sizes = load.state + np.where(index == 0, 0.0, load.transition)
        before = np.concatenate([[0.0], np.cumsum(sizes)[:-1]])
        first, last = links.node_ends
        near, far = (links.byte(np.full(1, crosses)) for crosses in (False, True))
        # What comes in from the own node, and from others; what goes out likewise.
        received = (before - before[first]) * near + before[first] * far
        sent = sizes * ((last - index) * near + (places - 1 - last) * far)
        slow = np.array([first[-1] > 0])
        latency, overhead = links.latency(slow), links.overhead(slow)
        leaves = np.maximum(start, busy.sending) + sent
        ready = np.maximum(busy.receiving, busy.posted + latency)[:, 1:]
        comes = np.maximum(np.minimum.accumulate(start, axis=1)[:, :-1], ready) + received[:, 1:]
        complete = np.maximum(comes, np.maximum.accumulate(leaves, axis=1)[:, :-1])
        meeting = latency / 2 if places > 2 else 0.0
        handled = np.maximum(index[1:] - 1, 0) * overhead + index[1:] * load.apply
        arrived = np.maximum(start[:, 1:], complete + latency + meeting + handled)
        receiving = np.concatenate([busy.receiving[:, :1], comes], axis=1)
        return np.concatenate([start[:, :1], arrived], axis=1), busy._replace(sending=leaves, receiving=receiving)
