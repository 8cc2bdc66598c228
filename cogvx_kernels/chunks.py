"""Valid lengths and sizes of clips, and the chunks of a causal coder. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chunking:
    """Cuts a clip into chunks along time.

    Attributes:
        size: frames of every chunk but the first and last.
        first_alone: the first chunk is one frame, and the last may be short; otherwise the first
            chunk also takes the remainder.
        period, remainders: valid lengths are 1 and every n with n % period in remainders.
        rule: valid lengths in words, for messages; "" if every length is valid.
    """

    size: int
    first_alone: bool = False
    period: int = 1
    remainders: tuple[int, ...] = (0,)
    rule: str = ""

    def is_valid(self, length: int) -> bool:
        """True if `length` frames are a whole clip."""
        return length == 1 or (length > 1 and length % self.period in self.remainders)

    def nearest(self, length: int) -> tuple[int, ...]:
        """The valid lengths nearest to `length`: itself, or the next below and above."""
        if self.is_valid(length):
            return (length,)
        below = [n for n in range(length - 1, length - self.period, -1) if self.is_valid(n)]
        start = max(length, 0) + 1
        above = [n for n in range(start, start + self.period) if self.is_valid(n)]
        return (*below[:1], *above[:1])

    def check(self, where: str, name: str, length: int) -> None:
        """Raises ValueError, with the nearest valid lengths, if `length` is not valid."""
        if self.is_valid(length):
            return
        if not self.rule:
            raise ValueError(f"{where}: {name} must have at least 1 frame; got {length}")
        nearest = " or ".join(map(str, self.nearest(length)))
        raise ValueError(
            f"{where}: {name} must have {self.rule} frames, nearest {nearest}; got {length}"
        )

    def plan(self, length: int) -> tuple[int, ...]:
        """Frames of each chunk of a valid clip, in order."""
        if self.first_alone:
            count, rest = divmod(length - 1, self.size)
            return (1, *(self.size,) * count, *((rest,) if rest else ()))
        count, rest = divmod(length, self.size)
        return (self.size + rest, *(self.size,) * (count - 1)) if count else (rest,)

    def first_sizes(self) -> tuple[int, ...]:
        """Frames that the first chunk of a clip can have."""
        if self.first_alone:
            return (1,)
        return tuple(n for n in range(1, 2 * self.size) if self.is_valid(n))


def check_size(where: str, name: str | None, height: int, width: int, multiple: int) -> None:
    """Raises ValueError, with the nearest valid sizes, unless `multiple` divides both sides.

    name: the argument that has the size; None where height and width are arguments themselves.
    """
    for side, size in (("height", height), ("width", width)):
        if size < 1 or size % multiple:
            nearest = nearest_multiples(size, multiple)
            if name is None:
                raise ValueError(
                    f"{where}: {side} must be a multiple of {multiple}, nearest {nearest}; "
                    f"got {size}"
                )
            raise ValueError(
                f"{where}: {name} must have a {side} that is a multiple of {multiple}, nearest "
                f"{nearest}; got {height}x{width}"
            )


def nearest_multiples(size: int, multiple: int) -> str:
    """The positive multiples next to a size, as text: "80 or 96"."""
    below = size // multiple * multiple
    return " or ".join(str(n) for n in (below, below + multiple) if n > 0)
