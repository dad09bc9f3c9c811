"""Paged caches and cached generation, for programs that the pass insert-kv-cache has rewritten."""

from ftc.cache.blocks import Blocks
from ftc.cache.paged import PagedCache, cached_by

__all__ = ["Blocks", "PagedCache", "cached_by"]
