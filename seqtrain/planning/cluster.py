"""Cluster files: what the links between ranks, and the processors, of a named or a measured cluster take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field

from seqtrain.errors import ConfigError, SeqtrainError
from seqtrain.parallel.schedules.links import Cluster, Costs
from seqtrain.planning.layout import Machine
from seqtrain.validation import validate

CLUSTERS = Path(__file__).parent / "clusters"
Scale = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class ClusterFile:
    """What a cluster file says; seconds, and ranks per node. 0 between nodes: as inside."""

    latency: Scale
    overhead: Scale
    byte: Scale
    product: Scale
    source: str
    node: Annotated[int, Field(ge=0)] = 0
    between_latency: Scale = 0.0
    between_overhead: Scale = 0.0
    between_byte: Scale = 0.0
    # Of a layer, one way, for the simulation of steps.
    forward: Scale = 0.0
    backward: Scale = 0.0
    # What a scan takes of the computing thread's own time.
    caller: Scale = 0.0
    # One rank's processor, for the planner.
    machine: Machine | None = None

    def links(self, *, node: int = 0, latency_add: float = 0.0, byte_factor: float = 1.0) -> Cluster:
        """The links, their latency changed by `latency_add` seconds, with `byte_factor` times the seconds per byte.

        `node`: ranks per node in place of the file's.
        """
        inside = Costs(max(0.0, self.latency + latency_add), self.overhead, self.byte * byte_factor, self.product)
        between = Costs(
            max(0.0, self.between_latency + latency_add) if self.between_latency else inside.latency,
            self.between_overhead or inside.overhead,
            self.between_byte * byte_factor if self.between_byte else inside.byte,
            self.product,
        )
        return Cluster(inside, between, node or self.node)


def read_cluster(cluster: str) -> ClusterFile:
    """A cluster file, or the shipped one of this name; `ConfigError` says what is wrong with it."""
    shipped = CLUSTERS / f"{cluster}.yaml"
    try:
        values = yaml.safe_load((shipped if shipped.exists() else Path(cluster)).read_text())
        return validate(ClusterFile, values)
    except (OSError, yaml.YAMLError, SeqtrainError) as error:
        raise ConfigError(f"cluster={cluster}: {error}") from error
