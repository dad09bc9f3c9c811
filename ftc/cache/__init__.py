"""Paged caches and cached generation, for programs that the pass insert-kv-cache has rewritten."""

from ftc.cache.blocks import Blocks
from ftc.cache.generation import continue_text, generate_batch, with_cache
from ftc.cache.paged import PagedCache, cached_by
from ftc.cache.step import CompiledStep

__all__ = ["Blocks", "CompiledStep", "PagedCache", "cached_by", "continue_text", "generate_batch", "with_cache"]
