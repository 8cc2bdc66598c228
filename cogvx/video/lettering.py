"""Text in a picture: small letters of 5x8 pixels, for the captions of sheets.

Lower-case letters, digits and some signs; capitals are written small. Anything else is a box.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

HEIGHT, WIDTH = 8, 5  # of a letter; one more column is between two of them
DESCENDING = "gjpqy,"  # a pixel lower than the others

# Every letter is five columns and seven rows under its name.
FONT = """
a     b     c     d     e     f     g     h     i     j     k     l     m
..... #.... ..... ....# ..... ..##. ..... #.... ..#.. ...#. #.... .##.. .....
..... #.... ..... ....# ..... .#... .#### #.... ..... ..... #.... ..#.. .....
.###. #.##. .###. .##.# .###. .#... #...# #.##. .##.. ..##. #..#. ..#.. ##.#.
....# ##..# #...# #..## #...# ####. #...# ##..# ..#.. ...#. #.#.. ..#.. #.#.#
.#### #...# #.... #...# ##### .#... .#### #...# ..#.. ...#. ##... ..#.. #.#.#
#...# ##..# #...# #..## #.... .#... ....# #...# ..#.. #..#. #.#.. ..#.. #.#.#
.#### #.##. .###. .##.# .###. .#... .###. #...# .###. .##.. #..#. .###. #.#.#

n     o     p     q     r     s     t     u     v     w     x     y     z
..... ..... ..... ..... ..... ..... .#... ..... ..... ..... ..... ..... .....
..... ..... #.##. .##.# ..... ..... .#... ..... ..... ..... ..... #...# .....
#.##. .###. ##..# #..## #.##. .#### ####. #...# #...# #...# #...# #...# #####
##..# #...# #...# #...# ##..# #.... .#... #...# #...# #.#.# .#.#. #...# ...#.
#...# #...# ##..# #..## #.... .###. .#... #...# #...# #.#.# ..#.. .#### ..#..
#...# #...# #.##. .##.# #.... ....# .#..# #..## .#.#. #.#.# .#.#. ....# .#...
#...# .###. #.... ....# #.... ####. ..##. .##.# ..#.. .#.#. #...# .###. #####

0     1     2     3     4     5     6     7     8     9     ,     .     -
.###. ..#.. .###. .###. ...#. ##### .###. ##### .###. .###. ..... ..... .....
#...# .##.. #...# #...# ..##. #.... #.... ....# #...# #...# ..... ..... .....
#..## ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...# ..... ..... .....
#.#.# ..#.. ...#. ..##. #..#. ....# ####. ..#.. .###. .#### ..... ..... .###.
##..# ..#.. ..#.. ....# ##### ....# #...# .#... #...# ....# ..##. ..... .....
#...# ..#.. .#... #...# ...#. #...# #...# .#... #...# ....# ..##. .##.. .....
.###. .###. ##### .###. ...#. .###. .###. .#... .###. .###. .##.. .##.. .....
"""


def _glyphs() -> dict[str, Tensor]:
    found = {" ": torch.zeros(HEIGHT, WIDTH)}
    for band in FONT.strip().split("\n\n"):
        names, *rows = band.split("\n")
        for index, name in enumerate(names.split()):
            lines = [row.split()[index] for row in rows]
            ink = torch.tensor([[float(dot == "#") for dot in line] for line in lines])
            above = int(name in DESCENDING)
            found[name] = F.pad(ink, (0, 0, above, 1 - above))
    return found


GLYPHS = _glyphs()
BOX = torch.ones(HEIGHT, WIDTH)
BOX[1:-1, 1:-1] = 0


def lettered(text: str, scale: int = 1) -> Tensor:
    """A line of text as (8 scale, 6 scale letters), 1 where there is ink and 0 elsewhere."""
    letters = [GLYPHS.get(letter, BOX) for letter in text.lower()]
    apart = torch.zeros(HEIGHT, 1)
    line = torch.cat([part for letter in letters for part in (letter, apart)] or [apart], 1)
    return line.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
