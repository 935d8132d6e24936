"use strict";
// Finds the characters in a picture, line by line, step by step as characters.py does, where each step has its reasons;
// functions and constants have the names that they have there.
//
// A piece is the box around pixels that belong to one character, with their number, `size`, and their `mask` in that box.

const {
  SLOPES, ENCLOSED, THIN, DASH, BESIDE, ACROSS, FAINT, SMALLEST_SHARE, SPECK, MOST_PARTS, STACKED, WHOLE, BROKEN,
  SHORTEST, SINGLE, WIDEST, LOWEST, TALLEST, MOST_PIECES, ANOTHER, CUT, NO_CHARACTER, LEFT_OUT, USUAL_WIDTH, WIDER, ONE,
  READABLE, STARTS, THROUGH, LEAST_INK, BORDER,
} = embedded.constants;

// Returns the characters, {box, image}, of each line, and what all that is found is as one character, or null.
// `costOf` tells how improbable it is that an image is one character, or is null to join only what lies above each
// other. `pause` is awaited often, so that the page goes on meanwhile.
async function findCharacters(colours, costOf, pause) {
  const {ink: measured, faintest} = measureInk(colours);
  const levelOf = ink => Math.max(faintest, FAINT * inkThreshold(ink, faintest));
  const whole = withoutRulings(measured, levelOf(measured));
  let ink = whole, parts = null;
  for (let trial = 0; trial < 2 && parts === null; trial++) {
    const mask = above(ink, levelOf(ink)), edge = connectedToEdge(mask), inside = partsOf(without(mask, edge));
    if (tallestOf(inside) > Math.sqrt(whole.data.length) / SMALLEST_SHARE) parts = inside;
    else ink = without(ink, edge);
  }
  if (parts === null) {
    ink = whole;
    parts = partsOf(above(ink, levelOf(ink)));
  }
  const threshold = inkThreshold(ink, faintest), lines = [], one = findInInk(measured, faintest);
  const layOutNext = async pieces => {
    await pause();
    return layOutPieces(pieces, ink, threshold);
  };
  let asSeveral = 0;
  for (const line of linesOf(parts)) {
    const read = await (costOf === null ? readColumns : readLine)(line, layOutNext, costOf);
    asSeveral += read.cost;
    lines.push(read.characters.filter(each => each !== null));
  }
  const found = lines.filter(line => line.length);
  if (one === null || costOf === null) return {lines: found, one};
  const around = found.length ? areaOf(boxOf(found.flat().map(({box}) => box))) : 0;
  const asOne = costOf(one.image);
  const isRead = asOne <= READABLE && asOne + costOfWidth(one.box) <= asSeveral - ANOTHER;
  return {lines: isRead && areaOf(one.box) >= ONE * around ? [[one]] : found, one};
}

const heightOf = ({top, bottom}) => bottom - top;
const widthOf = ({left, right}) => right - left;
const areaOf = box => heightOf(box) * widthOf(box);
const sizeOf = pieces => pieces.reduce((sum, {size}) => sum + size, 0);
const tallestOf = pieces => pieces.reduce((most, piece) => Math.max(most, heightOf(piece)), 0);

const boxOf = boxes => ({
  top: Math.min(...boxes.map(({top}) => top)), bottom: Math.max(...boxes.map(({bottom}) => bottom)),
  left: Math.min(...boxes.map(({left}) => left)), right: Math.max(...boxes.map(({right}) => right)),
});

// The connected parts of a mask.
function partsOf(mask) {
  const {labels, parts} = numberParts(mask);
  return parts.map((part, number) => ({...part, mask: maskIn(part, mask, labels, number + 1)}));
}

// Where an array's values are equal to one, in a box.
function maskIn({top, bottom, left, right}, {width}, values, value) {
  const mask = {height: bottom - top, width: right - left, data: new Uint8Array((bottom - top) * (right - left))};
  for (let row = top, i = 0; row < bottom; row++)
    for (let column = left; column < right; column++, i++) mask.data[i] = values[row * width + column] === value ? 1 : 0;
  return mask;
}

// Erases lines across the picture and frames around characters, but not the strokes that cross them.
function withoutRulings(ink, threshold) {
  const mask = above(ink, threshold), {height, width} = mask;
  const thick = Math.max(THIN, roundHalfToEven(Math.sqrt(mask.data.length) / 50));
  const thin = without(mask, dilate(erode(mask, thick, thick), thick, thick));
  // Where a line runs along a thick stroke, it goes on below it.
  const across = straight(either(mask, closeGaps(thin, 1, DASH)), Math.floor(width * 8 / 10));
  const down = transposed(straight(transposed(either(mask, closeGaps(thin, DASH, 1))), Math.floor(height * 9 / 10)));
  const lines = both(either(across, down), thin);
  for (const part of partsOf(mask)) {
    if (Math.min(heightOf(part), widthOf(part)) <= 2 * SMALLEST_SIDE) continue;
    const frame = frameOf(part.mask, maskIn(part, mask, mask.data, 1));
    for (let row = part.top, i = 0; row < part.bottom; row++)
      for (let column = part.left; column < part.right; column++, i++) lines.data[row * width + column] |= frame.data[i];
  }
  if (!lines.data.includes(1)) return ink;
  const beside = both(grown(lines, BESIDE), mask);
  const rest = padded(without(mask, beside), ACROSS);
  const strokes = either(closeGaps(rest, ACROSS, 1), closeGaps(rest, 1, ACROSS));
  const inside = {top: ACROSS, bottom: height + ACROSS, left: ACROSS, right: width + ACROSS};
  const erased = grown(without(beside, maskIn(inside, strokes, strokes.data, 1)), 1);
  return {height, width, data: ink.data.map((value, i) => erased.data[i] ? Math.min(value, 0) : value)};
}

// The lines of a part, if it is a frame: a rectangle, or cells or a ring around other ink; `mask` is all ink in its box.
function frameOf(part, mask) {
  const {height, width} = part;
  const level = straight(part, Math.floor(width * 7 / 10));
  const upright = transposed(straight(transposed(part), Math.floor(height * 7 / 10)));
  const tops = Math.max(2, height >> 3), sides = Math.max(2, width >> 3);
  const [rows, columns] = [boxAround(level), boxAround(upright)];
  if (rows && columns && rows.top < tops && rows.bottom > height - tops && columns.left < sides
    && columns.right > width - sides) return either(level, upright);
  const others = without(mask, part);
  const cells = partsOf(without(filled(part), part)).filter(hole => {
    const enclosed = both(maskIn(hole, others, others.data, 1), filled(hole.mask));
    const cell = Math.min(heightOf(hole), widthOf(hole));
    return partsOf(enclosed).some(other => Math.max(heightOf(other), widthOf(other)) > ENCLOSED * cell);
  }).map(hole => Math.min(heightOf(hole), widthOf(hole)));
  if (cells.length === 0) return {height, width, data: new Uint8Array(part.data.length)};
  const length = Math.floor(Math.min(...cells) * 7 / 10);
  const lines = either(straight(part, length), transposed(straight(transposed(part), length)));
  return sum(lines.data) > sum(part.data) / 2 ? lines : part;
}

// The pixels of a mask on straight and nearly level runs of at least so many pixels.
function straight({height, width, data}, length) {
  length = Math.max(3, length) | 1;
  const lines = {height, width, data: new Uint8Array(data.length)};
  for (const slope of SLOPES) {
    const shifts = Array.from({length: width}, (_, x) => roundHalfToEven(slope * (x - width / 2)));
    for (let y = 0; y < height; y++) {
      for (let x = 0, first = 0; x <= width; x++) {
        const row = y + shifts[x];
        if (x < width && row >= 0 && row < height && data[row * width + x]) continue;
        if (x - first >= length) for (let i = first; i < x; i++) lines.data[(y + shifts[i]) * width + i] = 1;
        first = x + 1;
      }
    }
  }
  return lines;
}

// The parts of each line of writing, from left to right; specks are left out.
function linesOf(found) {
  const parts = found.filter(part => Math.max(heightOf(part), widthOf(part)) > SPECK)
    .sort((a, b) => a.size - b.size).slice(-MOST_PARTS);
  if (parts.length === 0) return [];
  const stacks = [], tallest = tallestOf(parts);
  for (const part of parts.sort((a, b) => a.top - b.top)) {
    const below = stacks.find(stack => isBelow(part, stack, tallest));
    if (below) below.push(part);
    else stacks.push([part]);
  }
  const sorted = stacks.map(pieces => ({pieces, size: sizeOf(pieces), ...boxOf(pieces)}))
    .sort((a, b) => longerOf(a) - longerOf(b));
  let before = 0;
  const half = sizeOf(sorted) / 2, typical = sorted.find(({size}) => (before += size) >= half), height = longerOf(typical);
  const lines = [];
  for (const stack of sorted.reverse()) {
    if (longerOf(stack) < Math.max(SHORTEST * height, SMALLEST_SIDE / 2)) continue;
    if (stack.size < SMALLEST_PART * typical.size) continue;
    const shares = lines.map(line => shareBeside(stack, line, 2 * height)), most = Math.max(0, ...shares);
    if (most < 0.5) lines.push([stack]);
    else lines[shares.indexOf(most)].push(stack);
  }
  const middle = line => line.reduce((sum, {top, bottom}) => sum + top + bottom, 0) / line.length;
  return lines.sort((a, b) => middle(a) - middle(b))
    .map(line => line.flatMap(({pieces}) => pieces).sort((a, b) => a.left + a.right - b.left - b.right));
}

const longerOf = box => Math.max(heightOf(box), widthOf(box));

// Whether a part lies so close below a stack of them that both may be of one character.
function isBelow(part, stack, tallest) {
  const box = boxOf(stack);
  if (Math.min(heightOf(box), heightOf(part)) > WHOLE * tallest) return false;
  if (part.bottom - box.top > tallest / BROKEN) return false;
  const beside = Math.min(box.right, part.right) - Math.max(box.left, part.left);
  const gap = part.top - box.bottom, taller = Math.max(heightOf(part), tallestOf(stack));
  return beside > 0.3 * Math.min(widthOf(box), widthOf(part)) && gap <= STACKED * taller;
}

// The share of a box's height that lies beside the nearest box of a line, and what else is near.
function shareBeside(box, line, near) {
  const distances = line.map(other => Math.max(other.left - box.right, box.left - other.right));
  const nearest = Math.min(...distances);
  const {top, bottom} = boxOf(line.filter((_, i) => distances[i] <= Math.max(near, nearest)));
  return (Math.min(box.bottom, bottom) - Math.max(box.top, top)) / heightOf(box);
}

// Cuts a line's parts, and joins their pieces in all ways in which they may be characters: `spans` has the numbers of
// the first piece of each and of the first after it, and `cuts` those of the pieces that were cut from the one before.
function candidatesOf(line) {
  const height = Math.min(heightOf(boxOf(line)), tallestOf(line) / BROKEN);
  const pieces = [], cuts = new Set(), spans = [];
  for (const part of line)
    cut(part, height).forEach((piece, i) => {
      if (i) cuts.add(pieces.length);
      pieces.push(piece);
    });
  for (let first = 0; first < pieces.length; first++) {
    for (let last = first + 1; last <= Math.min(first + MOST_PIECES, pieces.length); last++) {
      const box = boxOf(pieces.slice(first, last)), tall = heightOf(box);
      if (widthOf(box) <= WIDEST * height && LOWEST * height <= tall && tall <= TALLEST * height) spans.push([first, last]);
    }
  }
  return {pieces, cuts, spans};
}

// The pieces of a line that lie above each other.
function columnsOf(line) {
  const columns = [];
  for (const piece of line.slice().sort((a, b) => a.left - b.left)) {
    const last = columns[columns.length - 1], {left, right} = last ? boxOf(last) : {left: 0, right: 0};
    if (Math.min(right, piece.right) - piece.left > Math.min(right - left, widthOf(piece)) / 2) last.push(piece);
    else columns.push([piece]);
  }
  return columns;
}

// Each column is a character.
async function readColumns(line, layOutNext) {
  const characters = [];
  for (const pieces of columnsOf(line)) characters.push(await layOutNext(pieces));
  return {cost: 0, characters};
}

// What the most probable way to read a line costs, and its characters. One costs the least that it can until the cheapest
// way takes it; then it is laid out.
async function readLine(line, layOutNext, costOf) {
  const candidates = candidatesOf(line), {pieces, cuts, spans} = candidates, characters = new Map();
  const least = spans.map(([first, last]) =>
    ANOTHER + CUT * cuts.has(first) + costOfWidth(boxOf(pieces.slice(first, last))));
  const costs = [...least];
  for (;;) {
    const {cost, chosen} = bestOf(candidates, costs), next = chosen.filter(i => !characters.has(i));
    if (next.length === 0) return {cost, characters: chosen.map(i => characters.get(i))};
    for (const i of next) {
      const character = await layOutNext(pieces.slice(...spans[i]));
      characters.set(i, character);
      costs[i] = least[i] + (character === null ? NO_CHARACTER : Math.min(costOf(character.image), NO_CHARACTER));
    }
  }
}

// Lays pieces of the ink out as one character; null if nothing is left of them.
function layOutPieces(pieces, ink, threshold) {
  const box = boxOf(pieces), top = Math.max(0, box.top - BORDER), left = Math.max(0, box.left - BORDER);
  const height = Math.min(ink.height, box.bottom + BORDER) - top, width = Math.min(ink.width, box.right + BORDER) - left;
  const around = {height, width, data: new Float32Array(height * width)};
  for (let row = 0; row < height; row++) {
    const first = (top + row) * ink.width + left;
    around.data.set(ink.data.subarray(first, first + width), row * width);
  }
  const mask = {height, width, data: new Uint8Array(height * width)};
  for (const piece of pieces)
    for (let row = 0, i = 0; row < piece.mask.height; row++)
      for (let column = 0; column < piece.mask.width; column++, i++)
        mask.data[(piece.top - top + row) * width + piece.left - left + column] |= piece.mask.data[i];
  const image = layOut(trace(around, mask, threshold));
  return image === null ? null : {box, image};
}

// What the most probable way to read a line costs, and which of its spans are the characters.
function bestOf({pieces, spans}, costs) {
  const best = [{cost: 0, chosen: []}];
  for (let last = 1; last <= pieces.length; last++) {
    let least = {cost: best[last - 1].cost + LEFT_OUT, chosen: best[last - 1].chosen};
    spans.forEach(([first, end], i) => {
      if (end !== last) return;
      const cost = best[first].cost + costs[i];
      if (cost < least.cost) least = {cost, chosen: [...best[first].chosen, i]};
    });
    best.push(least);
  }
  return best[pieces.length];
}

// What a character of this width costs.
const costOfWidth = box => WIDER * Math.max(0, widthOf(box) / heightOf(box) - USUAL_WIDTH);

// The pieces of a part that may be several characters, from left to right, along the paths that cross the least ink.
function cut(part, height) {
  const {mask} = part, {width} = mask;
  if (width <= SINGLE * height || mask.height <= SINGLE * height) return [part];
  const rows = [...Array(mask.height).keys()], inkTo = rows.map(row => {
    const ink = new Int32Array(width + 1);
    for (let x = 0; x < width; x++) ink[x + 1] = ink[x] + mask.data[row * width + x];
    return ink;
  });
  const down = leastInk(mask, rows), up = leastInk(mask, rows.slice().reverse()), candidates = [];
  for (const start of STARTS.map(share => Math.floor(share * mask.height)))
    for (let x = 0; x < width; x++) {
      const i = start * width + x, through = down[i] + up[i] - mask.data[i];
      if (through > THROUGH * height) continue;
      const path = pathThrough(down, up, mask, x, start);
      candidates.push({through, path, left: path.map((column, row) => inkTo[row][column])});
    }
  candidates.sort((a, b) => a.through - b.through);
  const besideOf = other => ({left}) => areBeside(left, other, LEAST_INK * height * height), cuts = [];
  let open = candidates.filter(besideOf(rows.map(() => 0))).filter(besideOf(inkTo.map(ink => ink[width])));
  while (open.length) {
    cuts.push(open[0].path);
    open = open.filter(besideOf(open[0].left));
  }
  const lefts = new Int32Array(mask.data.length); // how many of the cuts lie to the left of each pixel
  for (const path of cuts)
    path.forEach((beginning, row) => {
      for (let x = beginning; x < width; x++) lefts[row * width + x]++;
    });
  return Array.from({length: cuts.length + 1}, (_, number) => {
    const piece = {...mask, data: mask.data.map((value, i) => value && lefts[i] === number ? 1 : 0)};
    const box = boxAround(piece);
    return {
      top: part.top + box.top, bottom: part.top + box.bottom, left: part.left + box.left, right: part.left + box.right,
      size: sum(piece.data), mask: maskIn(box, piece, piece.data, 1),
    };
  });
}

// Whether two paths, with so much ink to the left of them in each row, do not cross, and have at least so much between.
function areBeside(left, other, least) {
  let between = 0, beyond = 0;
  for (let row = 0; row < left.length; row++) {
    between += Math.max(0, left[row] - other[row]);
    beyond += Math.max(0, other[row] - left[row]);
  }
  return Math.min(between, beyond) === 0 && between + beyond >= least;
}

// How many pixels of ink a path from the first of some rows to each pixel of a mask crosses at least.
function leastInk({width, data}, rows) {
  const least = Int32Array.from(data);
  for (let i = 1; i < rows.length; i++) {
    const row = rows[i] * width, before = rows[i - 1] * width;
    for (let x = 0; x < width; x++)
      least[row + x] += Math.min(
        least[before + Math.max(0, x - 1)], least[before + x], least[before + Math.min(width - 1, x + 1)]);
  }
  return least;
}

// The column in each row of the cheapest path through one pixel of a row.
function pathThrough(down, up, {height, width}, column, start) {
  const path = Array(height).fill(column);
  for (const [least, step] of [[down, -1], [up, 1]]) {
    let current = column;
    for (let row = start + step; row >= 0 && row < height; row += step) {
      const at = x => x < 0 || x >= width ? Infinity : least[row * width + x];
      const lowest = Math.min(at(current - 1), at(current), at(current + 1));
      if (at(current) !== lowest) current += at(current - 1) === lowest ? -1 : 1;
      path[row] = current;
    }
  }
  return path;
}
