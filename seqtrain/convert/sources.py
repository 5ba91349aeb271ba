"""`open_source`, by the name it has always had."""

from seqtrain.models.source import open_source as open_source
