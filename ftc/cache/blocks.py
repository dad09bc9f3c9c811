"""Which blocks of a paged cache belong to which sequence. Counts and lists only; no tensors."""

from ftc.errors import FtcError


class Blocks:
    """Hands out blocks of `block_size` tokens to sequences as they grow, and takes them back."""

    def __init__(self, num_blocks: int, block_size: int):
        if num_blocks < 1:
            raise FtcError(f"a cache of {num_blocks} blocks holds nothing; give it 1 or more")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free = list(range(num_blocks - 1, -1, -1))  # taken from the end: lowest first
        self.of: dict[int, list[int]] = {}

    def needed(self, tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-tokens // self.block_size)

    def room(self, sequence: int) -> int:
        """Tokens that the sequence's blocks hold."""
        return len(self.of.get(sequence, ())) * self.block_size

    def grow(self, lengths: dict[int, int]) -> None:
        """Give each sequence blocks for its length; all of them or, with FtcError, none."""
        lacking = {s: max(0, self.needed(length) - len(self.of.get(s, ()))) for s, length in lengths.items()}
        if sum(lacking.values()) > len(self.free):
            raise FtcError(
                f"cache full: {sum(lacking.values())} more blocks of {self.block_size} tokens are needed and {len(self.free)} of {self.num_blocks} are "
                "free; free a sequence, or make the cache with more blocks"
            )
        for sequence, count in lacking.items():
            self.of.setdefault(sequence, []).extend(self.free.pop() for _ in range(count))

    def release(self, sequence: int) -> None:
        """Take back a sequence's blocks."""
        self.free += reversed(self.of.pop(sequence, []))
