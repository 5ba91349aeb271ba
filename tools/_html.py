"""Moved to `seqtrain.report`; gone once the tools are packages."""

from seqtrain.report import listing, picture, table, text, write_page

__all__ = ["listing", "picture", "table", "text", "write_page"]
