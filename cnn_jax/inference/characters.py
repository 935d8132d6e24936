"""Find the characters in a picture, line by line: where each lies, and its image in MNIST's layout.

Ink is cut wherever characters may touch, and the pieces are joined in every way in which a stroke may be broken. Of all
ways to read a line the most probable one counts (LeCun et al., Proc. IEEE 86, 1998, section V: over-segmentation).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from cnn_jax.inference.preprocess import (
    SMALLEST_PART,
    SMALLEST_SIDE,
    Box,
    Character,
    connected_to_edge,
    find_in_ink,
    ink_threshold,
    lay_out,
    measure_ink,
    number_parts,
    trace,
)

# Lines and frames are found if they are turned by up to this slope, either way.
SLOPES = np.linspace(-0.06, 0.06, 9)
# Ink in a frame is at least so long, in sizes of its cell.
ENCLOSED = 0.35
# A printed line has fewer pixels across than this, or than a fiftieth of the picture; gaps in it are shorter than DASH.
THIN, DASH = 7, 9
# Pixels by which a printed line may be wider than what is straight of it, and across which strokes go on.
BESIDE, ACROSS = 1, 7
# Ink of this share of the threshold does not part a stroke: a pencil leaves such gaps.
FAINT = 0.5
# The tallest character has more than this part of the picture's size, the root of its pixels.
SMALLEST_SHARE = 25
# Parts of at most so many pixels per side are specks.
SPECK = 3
# Of more parts, as noise has, the largest are taken.
MOST_PARTS = 400
# Parts may be of one character if one lies at most so far below the other, in heights of the taller.
STACKED = 0.2
# Two parts of more than this share of the tallest part's height are never of one character, and that part has at least
# the other share of the tallest character's height.
WHOLE, BROKEN = 0.7, 0.6
# Parts are pieces of a line's characters if they are at least this tall, in heights of the picture's characters.
SHORTEST = 0.25
# A part wider and taller than this, in heights of its line, may be several characters.
SINGLE = 0.5
# A character is at most so wide, so low and so tall, in heights of its line, and consists of at most so many pieces.
WIDEST, LOWEST, TALLEST, MOST_PIECES = 1.3, 0.3, 1.5, 12
# Another character costs so much, and a cut before it so much more, as characters seldom touch; what cannot be read at
# all costs no more than the third, and to leave a piece out even more. All are negative logarithms of probabilities.
ANOTHER, CUT, NO_CHARACTER, LEFT_OUT = 0.2, 0.3, 5.0, 6.0
# A character is seldom wider than the first, in its own heights; each height more costs the second.
USUAL_WIDTH, WIDER = 0.5, 5.0
# All that is found may be one character if the largest has this share of the box around it,
# and if to read it costs at most this.
ONE, READABLE = 0.7, 0.6
# Cuts go through rows at these shares of a part's height. They cross ink for at most this share of the line's height,
# and between two lies at least this much ink, in squares of the line's height: a digit has about a tenth of it.
STARTS = 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9
THROUGH, LEAST_INK = 0.45, 0.02
# Pixels around a character that may have some of its ink.
BORDER = 2


class Piece(NamedTuple):
    """Pixels that belong to one character: `mask`, (h, w), bool, of the picture from `top` and `left` on."""

    top: int
    left: int
    mask: np.ndarray

    @property
    def bottom(self) -> int:
        return self.top + self.mask.shape[0]

    @property
    def right(self) -> int:
        return self.left + self.mask.shape[1]


# Returns how improbable it is, (N,), that each of the images (N, 28, 28, 1), uint8, is one character: the negative
# logarithm of the probability.
Cost = Callable[[np.ndarray], np.ndarray]


def find_characters(colours: np.ndarray, cost: Cost | None) -> list[list[Character]]:
    """Return the characters of each line, from left to right and from the first line to the last.

    Args:
      colours: (H, W, 3), float32, in 0..255.
      cost: Decides how touching and broken characters are read; None to join only what lies above each other.
    """
    measured, faintest = measure_ink(colours)
    whole = _without_rulings(measured, max(faintest, FAINT * ink_threshold(measured, faintest)))
    ink, parts = whole, []
    # What is connected to the edge is no character, as long as there are others; they may be fainter.
    for _ in range(2):
        threshold = ink_threshold(ink, faintest)
        mask = ink > max(faintest, FAINT * threshold)
        edge = connected_to_edge(mask)
        parts = _parts(mask & ~edge)
        if max((part.mask.shape[0] for part in parts), default=0) > np.sqrt(ink.size) / SMALLEST_SHARE:
            break
        ink = np.where(edge, 0, ink)
    else:
        ink, threshold = whole, ink_threshold(whole, faintest)
        parts = _parts(ink > max(faintest, FAINT * threshold))
    in_lines = _lines(parts)
    if cost is None:
        lines = [[lay_out_pieces(pieces, ink, threshold) for pieces in _columns(line)] for line in in_lines]
        return [line for line in ([each for each in line if each is not None] for line in lines) if line]
    read = [_read_line(candidates_of(line), ink, threshold, cost) for line in in_lines]
    as_several, lines = sum(as_line for as_line, _ in read), [line for _, line in read if line]
    one = find_in_ink(measured, faintest)
    if one is None:
        return lines
    around = _area(_around([character.box for line in lines for character in line])) if lines else 0
    as_one = cost(one.image[np.newaxis])[0]
    is_read = as_one <= READABLE and as_one + _cost_of_width(one.box) <= as_several - ANOTHER
    return [[one]] if is_read and _area(one.box) >= ONE * around else lines


def _parts(mask: np.ndarray) -> list[Piece]:
    """Return the connected parts of a mask, (H, W) bool."""
    labels = number_parts(mask)
    return [
        Piece(rows.start, columns.start, labels[rows, columns] == number)
        for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1)
    ]


def _without_rulings(ink: np.ndarray, threshold: float) -> np.ndarray:
    """Erase lines across the picture and frames around characters, but not the strokes that cross them."""
    mask = ink > threshold
    height, width = mask.shape
    thick = np.ones((max(THIN, round(np.sqrt(ink.size) / 50)),) * 2)
    thin = mask & ~np.asarray(ndimage.binary_opening(mask, thick), bool)
    # Where a line runs along a thick stroke, it goes on below it.
    closed = (np.asarray(ndimage.binary_closing(thin, np.ones(size)), bool) for size in ((1, DASH), (DASH, 1)))
    across, down = (mask | dashes for dashes in closed)
    lines = (_straight(across, width * 8 // 10) | _straight(down.T, height * 9 // 10).T) & thin
    for part in _parts(mask):
        if min(part.mask.shape) > 2 * SMALLEST_SIDE:
            rows, columns = slice(part.top, part.bottom), slice(part.left, part.right)
            lines[rows, columns] |= _frame(part.mask, mask[rows, columns])
    lines = np.asarray(ndimage.binary_dilation(lines, iterations=BESIDE), bool) & mask
    rest = np.pad(mask & ~lines, ACROSS)
    strokes = [ndimage.binary_closing(rest, np.ones(size)) for size in ((ACROSS, 1), (1, ACROSS))]
    crossing = np.any(strokes, axis=0)[ACROSS:-ACROSS, ACROSS:-ACROSS]
    return np.where(ndimage.binary_dilation(lines & ~crossing), np.minimum(ink, 0), ink)


def _frame(part: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the lines of a part, (h, w) bool, if it is a frame: a rectangle, or cells or a ring around other ink.

    Args:
      part: The part.
      mask: All ink in its box, (h, w) bool.
    """
    height, width = part.shape
    across, down = _straight(part, width * 7 // 10), _straight(part.T, height * 7 // 10).T
    tops, sides = max(2, height // 8), max(2, width // 8)
    if all(end.any() for end in (across[:tops], across[-tops:], down[:, :sides], down[:, -sides:])):
        return across | down
    holes = number_parts(ndimage.binary_fill_holes(part) & ~part)
    cells = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(holes), start=1):
        enclosed = (
            mask[rows, columns] & ndimage.binary_fill_holes(holes[rows, columns] == number) & ~part[rows, columns]
        )
        cell = min(rows.stop - rows.start, columns.stop - columns.start)
        if any(max(other.mask.shape) > ENCLOSED * cell for other in _parts(enclosed)):
            cells.append(cell)
    if not cells:
        return np.zeros_like(part)
    lines = _straight(part, min(cells) * 7 // 10) | _straight(part.T, min(cells) * 7 // 10).T
    return lines if lines.sum() > part.sum() / 2 else part


def _straight(mask: np.ndarray, length: int) -> np.ndarray:
    """Return the pixels of a mask, (H, W) bool, on straight and nearly level runs of at least `length` pixels."""
    height, width = mask.shape
    length = max(3, length) | 1  # odd, so that both filters have a middle
    margin = int(np.ceil(abs(SLOPES).max() * width / 2)) + 1
    padded = np.pad(mask, ((margin, margin), (0, 0))).astype(np.uint8)
    lines = np.zeros_like(padded)
    for slope in SLOPES:
        shifts = np.round(slope * (np.arange(width) - width / 2)).astype(int) + margin
        index = np.arange(height)[:, np.newaxis] + shifts
        level = np.take_along_axis(padded, index, axis=0)
        runs = ndimage.minimum_filter1d(level, length, axis=1, mode="constant")
        if runs.any():
            runs = np.asarray(ndimage.maximum_filter1d(runs, length, axis=1, mode="constant"))
            np.put_along_axis(lines, index, np.take_along_axis(lines, index, axis=0) | runs, axis=0)
    return lines[margin:-margin].astype(bool)


def _lines(parts: list[Piece]) -> list[list[Piece]]:
    """Return the parts of each line of writing, from left to right; specks are left out."""
    parts = [part for part in parts if max(part.mask.shape) > SPECK]
    parts = sorted(parts, key=lambda part: part.mask.sum())[-MOST_PARTS:]
    if not parts:
        return []
    stacks: list[list[Piece]] = []
    tallest = max(part.mask.shape[0] for part in parts)
    for part in sorted(parts, key=lambda part: part.top):
        below = next((stack for stack in stacks if _is_below(part, stack, tallest)), None)
        if below is None:
            stacks.append([part])
        else:
            below.append(part)
    boxes = [_box(stack) for stack in stacks]
    heights = np.array([max(bottom - top, right - left) for left, top, right, bottom in boxes])
    sizes = np.array([sum(part.mask.sum() for part in stack) for stack in stacks])
    order = np.argsort(heights, kind="stable")
    # The median over pixels, not over stacks, of which many may be specks.
    typical = order[np.searchsorted(sizes[order].cumsum(), sizes.sum() / 2)]
    height, size = float(heights[typical]), float(sizes[typical])
    lines: list[list[int]] = []
    for i in order[::-1]:
        if heights[i] < max(SHORTEST * height, SMALLEST_SIDE / 2) or sizes[i] < SMALLEST_PART * size:
            continue
        shares = [_share_beside(boxes[i], [boxes[j] for j in line], 2 * height) for line in lines]
        if max(shares, default=0) < 0.5:
            lines.append([i])
        else:
            lines[int(np.argmax(shares))].append(i)
    lines.sort(key=lambda line: np.mean([boxes[i][1] + boxes[i][3] for i in line]))
    return [
        sorted((part for i in line for part in stacks[i]), key=lambda part: part.left + part.right) for line in lines
    ]


def _box(pieces: Sequence[Piece]) -> Box:
    """Return the box around pieces."""
    return _around([(piece.left, piece.top, piece.right, piece.bottom) for piece in pieces])


def _around(boxes: Sequence[Box]) -> Box:
    """Return the box around boxes."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _is_below(part: Piece, stack: list[Piece], tallest: int) -> bool:
    """Whether a part lies so close below a stack of them that both may be of one character.

    Args:
      part: The part.
      stack: The stack.
      tallest: The height of the picture's tallest part.
    """
    left, top, right, bottom = _box(stack)
    if min(bottom - top, part.mask.shape[0]) > WHOLE * tallest or part.bottom - top > tallest / BROKEN:
        return False
    beside = min(right, part.right) - max(left, part.left)
    gap, taller = part.top - bottom, max(piece.mask.shape[0] for piece in (part, *stack))
    return beside > 0.3 * min(right - left, part.mask.shape[1]) and gap <= STACKED * taller


def _share_beside(box: Box, line: list[Box], near: float) -> float:
    """Return the share of a box's height that lies beside the nearest box of a line, and what else is near."""
    left, top, right, bottom = box
    distances = [max(other[0] - right, left - other[2]) for other in line]
    neighbours = [
        other for other, distance in zip(line, distances, strict=True) if distance <= max(near, min(distances))
    ]
    highest, lowest = min(other[1] for other in neighbours), max(other[3] for other in neighbours)
    return (min(bottom, lowest) - max(top, highest)) / (bottom - top)


class Candidates(NamedTuple):
    """The pieces of a line's ink, from left to right, and the ways in which they may be characters.

    Attributes:
      cuts: The numbers of the pieces that were cut from the one before.
      spans: The numbers of the first piece of a possible character and of the first after it.
    """

    pieces: list[Piece]
    cuts: set[int]
    spans: list[tuple[int, int]]


def candidates_of(line: list[Piece]) -> Candidates:
    """Cut a line's parts, and join their pieces in all ways in which they may be characters."""
    _, top, _, bottom = _box(line)
    tallest = max(part.mask.shape[0] for part in line)
    height = min(bottom - top, tallest / BROKEN)  # of a line that is level, or whose characters are not all broken
    found = Candidates([], set(), [])
    for part in line:
        of_part = list(_cut(part, height))
        found.cuts.update(range(len(found.pieces) + 1, len(found.pieces) + len(of_part)))
        found.pieces.extend(of_part)
    count = len(found.pieces)
    for first in range(count):
        for last in range(first + 1, min(first + MOST_PIECES, count) + 1):
            left, top, right, bottom = _box(found.pieces[first:last])
            if right - left <= WIDEST * height and LOWEST * height <= bottom - top <= TALLEST * height:
                found.spans.append((first, last))
    return found


def candidates_in(ink: np.ndarray, threshold: float) -> list[Candidates]:
    """Return the possible characters of each line in ink, (H, W), of which a value above the threshold is ink."""
    return [candidates_of(line) for line in _lines(_parts(ink > FAINT * threshold))]


def lay_out_pieces(pieces: Sequence[Piece], ink: np.ndarray, threshold: float) -> Character | None:
    """Lay pieces of the ink, (H, W), out as one character; None if nothing is left of them."""
    left, top, right, bottom = box = _box(pieces)
    mask = np.zeros(ink.shape, bool)
    for piece in pieces:
        mask[piece.top : piece.bottom, piece.left : piece.right] |= piece.mask
    around = slice(max(0, top - BORDER), bottom + BORDER), slice(max(0, left - BORDER), right + BORDER)
    image = lay_out(trace(ink[around], mask[around], threshold))
    return None if image is None else Character(box, image)


def _read_line(line: Candidates, ink: np.ndarray, threshold: float, cost: Cost) -> tuple[float, list[Character]]:
    """Return what the most probable way to read a line costs, and its characters.

    Only the characters that the cheapest way takes are laid out, until it takes no others; before, one costs the least
    that it can (Dellin and Srinivasa, ICAPS 2016: LazySP). If all were laid out, 7.5 times as many in pictures of
    several digits, the same way would be the cheapest.
    """
    least = [
        ANOTHER + CUT * (first in line.cuts) + _cost_of_width(_box(line.pieces[first:last]))
        for first, last in line.spans
    ]
    costs, characters = least.copy(), dict[int, Character | None]()
    while True:
        as_line, chosen = _best(line, costs)
        new = [i for i in chosen if i not in characters]
        if not new:
            return as_line, [each for each in (characters[i] for i in chosen) if each is not None]
        characters |= {i: lay_out_pieces(line.pieces[slice(*line.spans[i])], ink, threshold) for i in new}
        images = [each.image for i in new if (each := characters[i]) is not None]
        found = iter(cost(np.stack(images)) if images else [])
        for i in new:
            costs[i] = least[i] + (NO_CHARACTER if characters[i] is None else min(next(found), NO_CHARACTER))


def _best(line: Candidates, costs: Sequence[float]) -> tuple[float, list[int]]:
    """Return what the most probable way to read a line costs, and which of its spans are the characters."""
    ending: dict[int, list[int]] = {}
    for i, (_, last) in enumerate(line.spans):
        ending.setdefault(last, []).append(i)
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for last in range(1, len(line.pieces) + 1):
        ways = [(best[-1][0] + LEFT_OUT, best[-1][1])]
        for i in ending.get(last, []):
            before, chosen = best[line.spans[i][0]]
            ways.append((before + costs[i], [*chosen, i]))
        best.append(min(ways, key=lambda way: way[0]))
    return best[-1]


def _cost_of_width(box: Box) -> float:
    """Return what a character of this width costs: two that lie beside each other are wider than one."""
    left, top, right, bottom = box
    return WIDER * max(0.0, (right - left) / (bottom - top) - USUAL_WIDTH)


def _columns(line: list[Piece]) -> list[list[Piece]]:
    """Return the pieces of a line that lie above each other."""
    columns: list[list[Piece]] = []
    for piece in sorted(line, key=lambda piece: piece.left):
        left, _, right, _ = _box(columns[-1]) if columns else (0, 0, 0, 0)
        if min(right, piece.right) - piece.left > min(right - left, piece.mask.shape[1]) / 2:
            columns[-1].append(piece)
        else:
            columns.append([piece])
    return columns


def _cut(part: Piece, height: float) -> Iterator[Piece]:
    """Yield the pieces of a part that may be several characters, from left to right."""
    rows, columns = part.mask.shape
    if columns <= SINGLE * height or rows <= SINGLE * height:
        yield part
        return
    cuts = _cuts(part.mask, height)
    # How many of the cuts lie to the left of each pixel.
    number = sum((np.arange(columns) >= cut[:, np.newaxis] for cut in cuts), np.zeros(part.mask.shape, int))
    for i in range(len(cuts) + 1):
        piece = part.mask & (number == i)
        box = ndimage.find_objects(piece.astype(int))[0]
        yield Piece(part.top + box[0].start, part.left + box[1].start, piece[box])


def _cuts(mask: np.ndarray, height: float) -> list[np.ndarray]:
    """Return where a mask, (h, w) bool, may be cut between characters: the column in each row, (h,), of each cut.

    A cut is a path from top to bottom, by single pixels down or down and aside, that crosses the least ink of all
    through a pixel of one of some rows. Those that cross the least ink come first; others neither cross them nor lie
    close to them.
    """
    rows = len(mask)
    down, up = _least_ink(mask), _least_ink(mask[::-1])[::-1]
    starts = [int(share * rows) for share in STARTS]
    paths = _paths(down, up, starts)
    through = (down + up - mask)[starts].ravel()
    # How much ink of each row lies to the left of a path; none of it, or all of it, may not be a cut either.
    left = np.pad(mask, ((0, 0), (1, 0))).cumsum(axis=1)[np.arange(rows), paths]
    order = np.argsort(through, kind="stable")[: np.count_nonzero(through <= THROUGH * height)]
    cuts: list[np.ndarray] = []
    for ink in np.zeros(rows, int), mask.sum(axis=1):
        order = order[_are_beside(left[order], ink, LEAST_INK * height**2)]
    while len(order):
        cuts.append(paths[order[0]])
        order = order[_are_beside(left[order], left[order[0]], LEAST_INK * height**2)]
    return cuts


def _are_beside(left: np.ndarray, other: np.ndarray, least: float) -> np.ndarray:
    """Return which paths do not cross another, and have at least so much ink between them and it.

    Args:
      left: How much ink lies to the left of each path in each row, (N, h).
      other: The same of the other one, (h,).
      least: In pixels.
    """
    between = left - other
    crossing = (between > 0).any(axis=1) & (between < 0).any(axis=1)
    return ~crossing & (np.abs(between).sum(axis=1) >= least)


def _least_ink(mask: np.ndarray) -> np.ndarray:
    """Return how many pixels of ink a path from the first row to each pixel of a mask, (h, w), crosses at least."""
    least = mask.astype(np.int32)
    for row in range(1, len(least)):
        least[row] += ndimage.minimum_filter1d(least[row - 1], 3, mode="nearest")
    return least


def _paths(down: np.ndarray, up: np.ndarray, starts: list[int]) -> np.ndarray:
    """Return the column in each row, (N * w, h), of the cheapest path through each pixel of N rows."""
    height, width = down.shape
    paths = np.tile(np.arange(width), (len(starts), height, 1))
    above, below = _next_columns(down), _next_columns(up)
    for path, start in zip(paths, starts, strict=True):
        for row in range(start - 1, -1, -1):
            path[row] = above[row][path[row + 1]]
        for row in range(start + 1, height):
            path[row] = below[row][path[row - 1]]
    return paths.transpose(0, 2, 1).reshape(-1, height)


def _next_columns(least: np.ndarray) -> np.ndarray:
    """Return the columns, (h, w), in which paths through the columns of a neighbouring row are cheapest in each row."""
    sides = np.pad(least, ((0, 0), (1, 1)), constant_values=np.iinfo(least.dtype).max)
    # Straight on, where nothing is gained by going aside.
    near = np.stack([least, sides[:, :-2], sides[:, 2:]])
    return np.arange(least.shape[1]) + np.array([0, -1, 1])[near.argmin(axis=0)]
