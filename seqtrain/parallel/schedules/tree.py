"""A tree of composed maps (Kogge and Stone): log2(P) rounds; in round d a place sends on what 2^d places do."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape
from seqtrain.parallel.schedules.base import Message, Schedule, Travel, map_numbers, packed, unpacked
from seqtrain.parallel.schedules.links import Array, Busy, Costs, Links, Load
from seqtrain.parallel.wires import Wire


class Tree(Schedule):
    """States and transitions travel, but for places that have reached the first one: what they know is a state."""

    name = "tree"

    def receives(self, shape: AffineShape, place: int, places: int) -> list[Message]:
        messages, distance = [], 1
        while distance < places:
            if place >= distance:
                # A sender that has reached the first place knows a state: its transition has nothing to act on.
                reached = place - distance < distance
                messages.append(Message(place - distance, map_numbers(shape, reached)))
            distance *= 2
        return messages

    def prepare(self, wire: Wire, shape: AffineShape, arrivals: Tensor) -> Travel:
        return partial(self._run, wire, shape, arrivals)

    def _run(
        self, wire: Wire, shape: AffineShape, arrivals: Tensor, own: AffineMap, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        before = AffineMap(None, torch.zeros_like(own.update))  # places from the left up to here, this one not included
        upto = own  # the same, this one included
        if first is not None:
            before = AffineMap(None, first)
            upto = AffineMap(None, own.apply(before.update))
        distance, offset = 1, 0
        while distance < wire.places:
            if wire.place + distance < wire.places:
                wire.send(packed(upto, shape, state_only=wire.place < distance), wire.place + distance)
            if wire.place >= distance:
                state_only = wire.place - distance < distance
                numbers = map_numbers(shape, state_only)
                wire.receive()
                forgets = wire.forget(*range(max(wire.place - 2 * distance, 0) + 1, wire.place - distance + 1))
                message = arrivals[offset : offset + numbers]
                earlier = unpacked(message, shape, state_only=state_only, forgets=forgets)
                before = earlier if distance == 1 else before.after(earlier)
                if wire.place + 2 * distance < wire.places:
                    upto = own.after(before)
                offset += numbers
            else:
                wire.receive(0)
            distance *= 2
        return before.update, own.apply(before.update)

    def alone(self, costs: Costs, load: Load, places: int) -> float:
        # Whoever has reached the first place sends a state; the last round has no others. The first place sends its
        # state for all rounds at once: the first message shares its link with the others to some degree.
        rounds = (places - 1).bit_length()
        whole = [2 << turn < places for turn in range(rounds)]
        sent: list[float] = [load.state + travels * load.transition for travels in whole]
        sent[0] = max(sent[0], (1 + rounds) / 2 * load.state)
        local = sum(2 * load.apply + 2 * travels * load.compose for travels in whole)
        return rounds * costs.latency + sum(sent) * costs.byte + local

    def simulate(self, start: Array, busy: Busy, links: Links, load: Load) -> tuple[Array, Busy]:
        places, time = links.ranks, start
        sending, receiving = busy.sending.copy(), busy.receiving.copy()
        rounds = (places - 1).bit_length()
        for turn in range(rounds):
            distance = 1 << turn
            numbers = load.state + np.where(np.arange(places - distance) < distance, 0.0, load.transition)
            crosses = links.cluster.crosses(links.ids[:-distance], links.ids[distance:])
            byte, latency = links.byte(crosses), links.latency(crosses)
            leaves = np.maximum(np.maximum(time, sending)[:, :-distance], busy.posted[:, distance:] + latency)
            sending[:, :-distance] = leaves + numbers * byte
            if turn == 0:
                numbers[0] = max(numbers[0], (1 + rounds) / 2 * load.state)
            sent = leaves + latency + numbers * byte
            receiving[:, distance:] = np.maximum(sent, receiving[:, distance:] + numbers * byte)
            local = 0.0 if 2 * distance >= places else 2 * load.apply + 2 * load.compose * (load.transition > 0)
            later = np.maximum(time[:, distance:], receiving[:, distance:]) + local
            time = np.concatenate([time[:, :distance], later], axis=1)
        return time, busy._replace(sending=sending, receiving=receiving)
