"""What a Ray cluster has, and which ranks go where."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

# Label of a node (`ray start --labels rack=...`) that says which others are near it in the network.
RACK = "rack"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, and what of it is free for ranks."""

    id: str
    host: str
    address: str
    cpus: int
    gpus: int
    rack: str = ""

    def __str__(self) -> str:
        return f"{self.host} ({self.address})"


def nodes(*, held: Mapping[str, tuple[int, int]], but: Sequence[str] = ()) -> list[Node]:
    """The nodes that are alive, without those that are drained and those of `but`, near ones next to each other.

    `held`: CPUs and GPUs that this run has reserved already, by node.
    """
    ray = sys.modules["ray"]
    free, left_out = ray._private.state.available_resources_per_node(), {*but, *draining()}
    found = []
    for node in ray.nodes():
        name = node["NodeID"]
        if not node["Alive"] or name in left_out:
            continue
        cpus, gpus = held.get(name, (0, 0))
        there, whole = free.get(name, {}), node["Resources"]
        found.append(
            Node(
                name,
                node["NodeManagerHostname"],
                node["NodeManagerAddress"],
                # What was reserved a moment ago may count as free still.
                int(min(there.get("CPU", 0) + cpus, whole.get("CPU", 0))),
                int(min(there.get("GPU", 0) + gpus, whole.get("GPU", 0))),
                node.get("Labels", {}).get(RACK, ""),
            )
        )
    return sorted(found, key=lambda node: (node.rack, len(node.address), node.address))


def draining() -> dict[str, float]:
    """Nodes that are soon taken away, and until when, in seconds since 1970 (0: unknown)."""
    return {name: end / 1000 for name, end in sys.modules["ray"]._private.state.state.get_draining_nodes().items()}


def place(room: Sequence[tuple[Node, int]], ranks: int, group: int) -> list[Node]:
    """The node of each rank; empty where there is not enough room. `room`: nodes, and how many ranks each can have.

    A group is `group` ranks after each other that exchange the most: those of a sequence, or of a tensor. Whole groups
    go into one node while there is one with room for them, then into one rack, then wherever there is room.
    """
    if sum(count for _, count in room) < ranks:
        return []
    left = {node.id: count for node, count in room}
    found: list[Node] = []

    def take(some: Sequence[Node]) -> None:
        """Whole groups that lie within `some`."""
        whole = min(sum(left[node.id] for node in some) // group * group, ranks - len(found))
        for node in some:
            count = min(left[node.id], whole)
            found.extend([node] * count)
            left[node.id] -= count
            whole -= count

    known = [node for node, _ in room]
    for node in known:
        take([node])
    for _, near in groupby(known, key=lambda node: node.rack):
        take(list(near))
    take(known)
    return found if len(found) == ranks else []


def by_node(places: Sequence[Node]) -> dict[Node, list[int]]:
    """The ranks of each node."""
    found: dict[Node, list[int]] = {}
    for rank, node in enumerate(places):
        found.setdefault(node, []).append(rank)
    return found


def drawn(places: Sequence[Node], group: int) -> Iterator[str]:
    """A line a node: its ranks, those of a group between brackets; `..` where it goes on elsewhere."""
    for node, ranks in by_node(places).items():
        parts = []
        for number, members in groupby(ranks, key=lambda rank: rank // group):
            held = list(members)
            before = ".. " if held[0] > number * group else ""
            after = " .." if held[-1] < (number + 1) * group - 1 else ""
            shown = f"{held[0]}-{held[-1]}" if len(held) > 2 else " ".join(map(str, held))
            parts.append(f"[{before}{shown}{after}]")
        rack = f", rack {node.rack}" if node.rack else ""
        yield f"  {node}{rack}: {''.join(parts)}"


def straddling(places: Sequence[Node], group: int) -> int:
    """How many groups lie on more than one node, though each node they lie on could have held one."""
    spread = [{node.id for node in places[first : first + group]} for first in range(0, len(places), group)]
    return sum(len(each) > 1 for each in spread)
