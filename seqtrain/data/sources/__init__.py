"""Where text comes from: one file per source, found by its name."""

from seqtrain.data.sources._base import Document, Source
from seqtrain.registry import Registry

SOURCES: Registry[Source] = Registry("data.source", "seqtrain.data.sources", Source)

__all__ = ["SOURCES", "Document", "Source"]
