"use strict";
// Makes a picture an image for the network, step by step as pictures.py and preprocess.py do, where each step has its
// reasons; functions and constants have the names that they have there. What is rounded to float32 there is rounded here,
// too (Math.fround, Float32Array), so that the same pixels lie above the same thresholds.
//
// An array is {height, width, data}, row after row; a picture has channels, too, which lie side by side. Masks are
// arrays of 0 and 1. Boxes are {top, bottom, left, right}, without the bottom row and the right column.

const {
  SIZE, FITTED_SIZE, WORKING_SIZE, DETAIL, SMALLEST_SIDE, FAINTEST, GRAIN, SHARE_OF_DARKEST, SMALLEST_PART, HOLE,
  STROKE_WIDTHS, BLOT,
} = embedded.constants;

// Pictures: ImageData to {height, width, data: float32 (H, W, 3)} in 0..255, as read_picture's.

// Returns null if the picture is too small or too narrow.
function toColours({height, width, data}) {
  if (Math.min(height, width) < SMALLEST_SIDE * Math.max(1, Math.max(height, width) / WORKING_SIZE)) return null;
  let opaque = true;
  for (let i = 3; i < data.length; i += 4) opaque &&= data[i] === 255;
  const small = thumbnail({height, width, channels: 4, data}, opaque); // (h, w, 4)
  const colours = new Float32Array(small.height * small.width * 3); // (h, w, 3)
  for (let i = 0; i < colours.length; i++) colours[i] = small.data[4 * Math.floor(i / 3) + i % 3];
  if (!opaque) composite(colours, small.data);
  return {height: small.height, width: small.width, data: colours};
}

// As pictures.py shrinks: large pictures by a whole factor, then all by Pillow's Image.thumbnail with its filter BOX, to at
// most WORKING_SIZE pixels per side.
function thumbnail(picture, opaque) {
  const factor = Math.max(1, Math.floor(Math.max(picture.height, picture.width) / (2 * WORKING_SIZE)));
  if (factor > 1)
    picture = opaque
      ? reduce(picture, factor, factor) : unpremultiplied(reduce(premultiplied(picture), factor, factor));
  const {height, width} = picture;
  if (Math.max(height, width) <= WORKING_SIZE) return picture;
  const aspect = width / height;
  const nearest = (size, error) => {
    const [below, above] = [Math.floor(size), Math.ceil(size)];
    return Math.max(1, error(above) < error(below) ? above : below);
  };
  const newHeight = aspect > 1
    ? nearest(WORKING_SIZE / aspect, n => n === 0 ? 0 : Math.abs(aspect - WORKING_SIZE / n)) : WORKING_SIZE;
  const newWidth = aspect > 1 ? WORKING_SIZE : nearest(WORKING_SIZE * aspect, n => Math.abs(aspect - n / WORKING_SIZE));
  if (!opaque) return unpremultiplied(resize(premultiplied(picture), newHeight, newWidth, BOX));
  // Pictures of more than four times the size are first reduced by whole factors.
  const down = Math.max(1, Math.floor(height / newHeight / 2)), across = Math.max(1, Math.floor(width / newWidth / 2));
  return resize(reduce(picture, down, across), newHeight, newWidth, BOX, height / down, width / across);
}

// The means of blocks of pixels; those at the right and the bottom may be smaller.
function reduce({height, width, channels, data}, down, across) {
  if (down === 1 && across === 1) return {height, width, channels, data};
  const newHeight = Math.ceil(height / down), newWidth = Math.ceil(width / across);
  const means = new Uint8Array(newHeight * newWidth * channels);
  for (let row = 0; row < newHeight; row++) {
    const bottom = Math.min(height, (row + 1) * down);
    for (let column = 0; column < newWidth; column++) {
      const right = Math.min(width, (column + 1) * across);
      const count = (bottom - row * down) * (right - column * across);
      // Pillow divides by a multiplication of integers.
      const multiplier = Math.trunc(Math.fround(2 ** 24 / count));
      for (let channel = 0; channel < channels; channel++) {
        let sum = Math.floor(count / 2);
        for (let y = row * down; y < bottom; y++)
          for (let x = column * across; x < right; x++) sum += data[(y * width + x) * channels + channel];
        means[(row * newWidth + column) * channels + channel] = Math.floor(sum * multiplier / 2 ** 24);
      }
    }
  }
  return {height: newHeight, width: newWidth, channels, data: means};
}

const premultiplied = picture => changeColours(picture, (value, alpha) => {
  const product = value * alpha + 128;
  return ((product >> 8) + product) >> 8;
});
const unpremultiplied = picture => changeColours(
  picture, (value, alpha) => alpha === 0 || alpha === 255 ? value : Math.min(255, Math.floor(255 * value / alpha)));

function changeColours(picture, change) {
  const {data} = picture;
  return {...picture, data: data.map((value, i) => i % 4 === 3 ? value : change(value, data[i | 3]))};
}

// Lays a picture with transparency on paper, of the colour of most of it, or of the other brightness than the digit's.
function composite(colours, withAlpha) {
  const count = colours.length / 3;
  const alpha = Float32Array.from({length: count}, (_, i) => withAlpha[4 * i + 3] / 255);
  const visible = [...alpha.keys()].filter(i => alpha[i] > 0.5);
  if (visible.length === 0) {
    colours.fill(0);
    return;
  }
  const channels = [0, 1, 2].map(channel => Float32Array.from(visible, i => colours[3 * i + channel]));
  const mean = channels.reduce((sum, channel) => sum + channel.reduce((a, b) => a + b, 0), 0) / (3 * visible.length);
  const paper = visible.length > count / 2 ? channels.map(median) : Array(3).fill(mean < 127.5 ? 255 : 0);
  for (let i = 0; i < colours.length; i++) {
    const opacity = alpha[Math.floor(i / 3)];
    colours[i] = Math.fround(colours[i] * opacity) + Math.fround(paper[i % 3] * Math.fround(1 - opacity));
  }
}

// Resampling, as in Pillow's src/libImaging/Resample.c.

const BOX = {support: 0.5, weigh: x => x > -0.5 && x <= 0.5 ? 1 : 0};
const BICUBIC = {
  support: 2,
  weigh: x => {
    const distance = Math.abs(x), a = -0.5;
    if (distance < 1) return ((a + 2) * distance - (a + 3)) * distance * distance + 1;
    return distance < 2 ? (((distance - 5) * distance + 8) * distance - 4) * a : 0;
  },
};

// The part of a picture up to `bottom` and `right` is resized; where pixels are bytes, so are the results.
function resize(picture, height, width, filter, bottom = picture.height, right = picture.width) {
  const channels = picture.channels ?? 1;
  let {data} = picture;
  if (width !== picture.width || right !== picture.width)
    data = resizeAxis(data, picture.height, picture.width, channels, right, width, filter);
  if (height !== picture.height || bottom !== picture.height)
    data = resizeAxis(data, 1, picture.height, width * channels, bottom, height, filter);
  return {height, width, channels, data};
}

// Resizes the middle axis of (outer, size, inner) to (outer, newSize, inner).
function resizeAxis(data, outer, size, inner, end, newSize, filter) {
  const bytes = !(data instanceof Float32Array);
  const resized = bytes ? new Uint8Array(outer * newSize * inner) : new Float32Array(outer * newSize * inner);
  const scale = Math.fround(end) / newSize, stretch = Math.max(1, scale), support = filter.support * stretch;
  for (let i = 0; i < newSize; i++) {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(size, Math.trunc(centre + support + 0.5));
    let weights = [];
    for (let j = first; j < last; j++) weights.push(filter.weigh((j - centre + 0.5) / stretch));
    const total = weights.reduce((a, b) => a + b, 0);
    weights = weights.map(weight => weight / total);
    // Of bytes, the weights are integers, too.
    if (bytes) weights = weights.map(weight => Math.trunc(weight * 2 ** 22 + (weight < 0 ? -0.5 : 0.5)));
    for (let o = 0; o < outer; o++) {
      for (let k = 0; k < inner; k++) {
        let sum = bytes ? 2 ** 21 : 0;
        for (let j = 0, from = (o * size + first) * inner + k; j < weights.length; j++, from += inner)
          sum += data[from] * weights[j];
        resized[(o * newSize + i) * inner + k] = bytes ? Math.min(255, Math.max(0, Math.floor(sum / 2 ** 22))) : sum;
      }
    }
  }
  return resized;
}

// The digit: ink, float32 (H, W), to the box around it and the network's image, bytes (28, 28, 1), or null.

function findInInk(whole, faintest) {
  let ink = whole, threshold = inkThreshold(whole, faintest);
  for (const [candidate, level] of withoutSurroundings(whole, faintest)) {
    if (longerSide(digitMask(above(candidate, level))) > Math.sqrt(whole.data.length) / 10) {
      [ink, threshold] = [candidate, level];
      break;
    }
  }
  const mask = digitMask(above(ink, threshold));
  const image = longerSide(mask) >= SMALLEST_SIDE / 2 ? layOut(trace(ink, mask, threshold)) : null;
  return image === null ? null : {box: boxAround(mask), image};
}

// How much each pixel differs from the paper around it, float32 (H, W), and the value of the faintest ink.
function measureInk(colours) {
  const ink = inkOf(colours), {height, width, data} = ink;
  const distance = 1 + Math.floor(Math.max(height, width) / 128);
  const differences = new Float32Array(height * (width - distance));
  for (let row = 0, i = 0; row < height; row++)
    for (let column = distance; column < width; column++, i++)
      differences[i] = Math.abs(Math.fround(data[row * width + column] - data[row * width + column - distance]));
  const noise = Math.fround(Math.fround(1.4826) * median(differences)) / Math.SQRT2;
  return {ink, faintest: Math.max(FAINTEST, GRAIN * noise)};
}

// Yields the ink that is not connected to the picture's edge, and the value above which a pixel is ink.
function* withoutSurroundings(ink, faintest) {
  const threshold = inkThreshold(ink, faintest);
  yield [without(ink, connectedToEdge(above(ink, threshold))), threshold];
  const isolated = without(ink, connectedToEdge(above(ink, faintest)));
  yield [isolated, inkThreshold(isolated, faintest)];
}

function inkThreshold(ink, faintest) {
  const visible = ink.data.filter(value => value > faintest);
  if (visible.length === 0) return faintest;
  return Math.max(faintest, Math.fround(Math.fround(SHARE_OF_DARKEST) * percentile(visible, 0.97)));
}

function longerSide(mask) {
  const box = boxAround(mask);
  return box === null ? 0 : Math.max(box.bottom - box.top, box.right - box.left);
}

function inkOf(colours) {
  const {height, width} = colours;
  const [red, green, blue] = mostVaryingAxis(colours.data);
  const total = Math.fround(Math.fround(Math.abs(red) + Math.abs(green)) + Math.abs(blue));
  const axis = [red, green, blue].map(each => Math.fround(each / total));
  const grey = {height, width, data: new Float32Array(height * width)};
  for (let i = 0, j = 0; i < grey.data.length; i++, j += 3) {
    const [r, g, b] = [colours.data[j], colours.data[j + 1], colours.data[j + 2]];
    grey.data[i] = Math.fround(Math.fround(r * axis[0]) + g * axis[1]) + b * axis[2];
  }
  const window = roundHalfToEven(Math.sqrt(height * width) / 2);
  const plane = fitPlane(grey, window); // (H + 2 * window, W + 2 * window)
  const difference = {height, width, data: new Float32Array(height * width)};
  let skewness = 0;
  for (let row = 0, i = 0; row < height; row++) {
    for (let column = 0; column < width; column++, i++) {
      difference.data[i] = grey.data[i] - plane.data[(row + window) * plane.width + column + window];
      skewness += difference.data[i] ** 3;
    }
  }
  const turn = skewness < 0 ? negative : each => each;
  const smooth = gaussianFilter(turn(difference), Math.max(height, width) / WORKING_SIZE);
  const rows = reflections(height, window), columns = reflections(width, window);
  const extended = turn(plane);
  for (let row = 0, i = 0; row < extended.height; row++)
    for (let column = 0; column < extended.width; column++, i++)
      extended.data[i] += smooth.data[rows[row] * width + columns[column]];
  const opened = greyOpening(extended, window);
  const ink = {height, width, data: new Float32Array(height * width)};
  for (let row = 0, i = 0; row < height; row++) {
    for (let column = 0; column < width; column++, i++) {
      const j = (row + window) * extended.width + column + window;
      ink.data[i] = extended.data[j] - opened.data[j];
    }
  }
  const middle = median(ink.data);
  ink.data = ink.data.map(value => value - middle);
  return ink;
}

// The eigenvector of the largest eigenvalue of the colours' covariance, by Jacobi's rotations.
function mostVaryingAxis(colours) {
  const count = colours.length / 3, means = [0, 0, 0];
  for (let i = 0; i < colours.length; i++) means[i % 3] += colours[i] / count;
  const covariance = (a, b) => {
    let total = 0;
    for (let i = 0; i < colours.length; i += 3) total += (colours[i + a] - means[a]) * (colours[i + b] - means[b]);
    return total / (count - 1);
  };
  const matrix = [0, 1, 2].map(a => [0, 1, 2].map(b => covariance(a, b)));
  const vectors = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]; // in columns
  for (let sweep = 0; sweep < 20; sweep++) {
    for (const [p, q] of [[0, 1], [0, 2], [1, 2]]) {
      if (matrix[p][q] === 0) continue;
      const ratio = (matrix[q][q] - matrix[p][p]) / (2 * matrix[p][q]);
      const tangent = (ratio < 0 ? -1 : 1) / (Math.abs(ratio) + Math.sqrt(ratio ** 2 + 1));
      const cosine = 1 / Math.sqrt(tangent ** 2 + 1), sine = tangent * cosine;
      for (const each of [matrix, vectors])
        for (const row of each) [row[p], row[q]] = [cosine * row[p] - sine * row[q], sine * row[p] + cosine * row[q]];
      const [first, second] = [matrix[p], matrix[q]];
      matrix[p] = first.map((value, i) => cosine * value - sine * second[i]);
      matrix[q] = first.map((value, i) => sine * value + cosine * second[i]);
    }
  }
  let largest = 0;
  for (const i of [1, 2]) if (matrix[i][i] >= matrix[largest][largest]) largest = i;
  return vectors.map(row => Math.fround(row[largest]));
}

// Fits a plane to a picture by least absolute differences; it extends beyond each edge by a margin.
function fitPlane(grey, margin) {
  const side = Math.min(64, grey.height, grey.width);
  const values = resize(grey, side, side, BOX).data; // (side, side)
  const middles = Array.from({length: side}, (_, i) => (i + 0.5) / side);
  const inputs = Array.from(values, (_, i) => [1, middles[Math.floor(i / side)], middles[i % side]]);
  const weights = new Float64Array(values.length).fill(1);
  let plane = [0, 0, 0];
  for (let iteration = 0; iteration < 10; iteration++) {
    const matrix = [[0, 0, 0], [0, 0, 0], [0, 0, 0]], right = [0, 0, 0];
    inputs.forEach((input, i) => {
      for (let a = 0; a < 3; a++) {
        right[a] += weights[i] * input[a] * values[i];
        for (let b = 0; b < 3; b++) matrix[a][b] += weights[i] * input[a] * input[b];
      }
    });
    plane = solve(matrix, right);
    inputs.forEach(([, row, column], i) => {
      weights[i] = 1 / Math.max(Math.abs(values[i] - plane[0] - plane[1] * row - plane[2] * column), 1);
    });
  }
  const height = grey.height + 2 * margin, width = grey.width + 2 * margin, data = new Float32Array(height * width);
  for (let row = 0, i = 0; row < height; row++) {
    const beginning = plane[0] + plane[1] * ((row - margin + 0.5) / grey.height);
    for (let column = 0; column < width; column++, i++)
      data[i] = beginning + plane[2] * ((column - margin + 0.5) / grey.width);
  }
  return {height, width, data};
}

// The solution of three linear equations, by Cramer's rule.
function solve(matrix, right) {
  const determinant = ([a, b, c]) =>
    a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0]);
  const replaced = column => matrix.map((row, i) => row.map((value, j) => j === column ? right[i] : value));
  return [0, 1, 2].map(column => determinant(replaced(column)) / determinant(matrix));
}

function connectedToEdge(mask) {
  const {height, width} = mask, {labels, parts} = numberParts(mask);
  const touching = parts.map(part => !part.top || !part.left || part.bottom === height || part.right === width);
  return ofParts(mask, labels, touching);
}

// The largest connected part of a mask and the parts that belong to it.
function digitMask(mask) {
  const {labels, parts} = numberParts(mask);
  if (parts.length === 0) return mask;
  const largest = parts.reduce((best, part) => part.size > best.size ? part : best);
  const candidates = parts.filter(part => part.size >= SMALLEST_PART * largest.size);
  let box = largest, taken = [], found = [largest];
  while (found.length > taken.length) {
    taken = found;
    box = {
      top: Math.min(...taken.map(part => part.top)), bottom: Math.max(...taken.map(part => part.bottom)),
      left: Math.min(...taken.map(part => part.left)), right: Math.max(...taken.map(part => part.right)),
    };
    found = candidates.filter(part => isClose(part, box));
  }
  const chosen = new Set(taken), belongs = parts.map(part => chosen.has(part));
  return ofParts(mask, labels, belongs);
}

// The mask of the parts for which `chosen` is true.
function ofParts({height, width}, labels, chosen) {
  const data = new Uint8Array(labels.length);
  for (let i = 0; i < labels.length; i++) if (labels[i] && chosen[labels[i] - 1]) data[i] = 1;
  return {height, width, data};
}

// Numbers the connected parts of a mask from 1, in the order of their first pixels.
function numberParts({height, width, data}) {
  const labels = new Int32Array(data.length), parts = [];
  for (let start = 0; start < data.length; start++) {
    if (!data[start] || labels[start]) continue;
    const part = {top: height, bottom: 0, left: width, right: 0, size: 0}, todo = [start];
    parts.push(part);
    labels[start] = parts.length;
    while (todo.length) {
      const i = todo.pop(), row = Math.floor(i / width), column = i % width;
      part.top = Math.min(part.top, row);
      part.bottom = Math.max(part.bottom, row + 1);
      part.left = Math.min(part.left, column);
      part.right = Math.max(part.right, column + 1);
      part.size++;
      for (let y = Math.max(0, row - 1); y < Math.min(height, row + 2); y++) {
        for (let x = Math.max(0, column - 1); x < Math.min(width, column + 2); x++) {
          const j = y * width + x;
          if (!data[j] || labels[j]) continue;
          labels[j] = parts.length;
          todo.push(j);
        }
      }
    }
  }
  return {labels, parts};
}

// Whether the gap between two boxes is at most a quarter of the other's size.
function isClose(box, other) {
  const gap = Math.max(other.bottom - other.top, other.right - other.left) / 4;
  return box.top <= other.bottom + gap && box.bottom >= other.top - gap
    && box.left <= other.right + gap && box.right >= other.left - gap;
}

// The shape of the ink in and beside a mask, DETAIL times its final size.
function trace(ink, mask, threshold) {
  const {top, bottom, left, right} = boxAround(mask);
  const longer = Math.max(bottom - top, right - left), margin = 2;
  const height = bottom - top + 2 * margin, width = right - left + 2 * margin;
  const padded = {height, width, data: new Float32Array(height * width)};
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      const y = row + top - margin, x = column + left - margin;
      if (y < 0 || y >= ink.height || x < 0 || x >= ink.width) continue;
      if (isNear(mask, y, x, margin)) padded.data[row * width + column] = ink.data[y * ink.width + x];
    }
  }
  const scale = FITTED_SIZE * DETAIL / longer;
  const [newHeight, newWidth] = [height, width].map(side => Math.max(1, roundHalfToEven(scale * side)));
  return above(resize(padded, newHeight, newWidth, BICUBIC), threshold);
}

// Whether there is a mask's pixel at most so many steps up, down or aside.
function isNear({height, width, data}, row, column, steps) {
  for (let y = Math.max(0, row - steps); y <= Math.min(height - 1, row + steps); y++) {
    const aside = steps - Math.abs(y - row);
    for (let x = Math.max(0, column - aside); x <= Math.min(width - 1, column + aside); x++)
      if (data[y * width + x]) return true;
  }
  return false;
}

// Gives a shape strokes as wide as MNIST's, shrinks it and centres it; null if the shape is empty.
function layOut(shape) {
  const [narrowest, widest] = STROKE_WIDTHS.map(width => DETAIL * width);
  const closed = closeGaps(padded(shape, roundHalfToEven(narrowest)), HOLE, HOLE);
  if (!closed.data.includes(1)) return null;
  const {height, width} = closed;
  const inside = distanceTransform(closed);
  const stroke = 4 * (sum(inside) / sum(closed.data)); // 0 outside the shape
  if (stroke > BLOT * DETAIL) return null;
  const growth = (Math.min(widest, Math.max(narrowest, stroke)) - stroke) / 2;
  const data = growth > 0
    ? distanceTransform(inverted(closed)).map(distance => distance < growth ? 1 : 0)
    : inside.map(distance => distance > -growth ? 1 : 0);
  return data.includes(1) ? centre(fit({height, width, data})) : null;
}

// Shrinks a digit until its longer side has 20 pixels: bytes (h, w).
function fit(shape) {
  const {top, bottom, left, right} = boxAround(shape);
  const cropped = {height: bottom - top, width: right - left, data: new Uint8Array((bottom - top) * (right - left))};
  for (let row = top, i = 0; row < bottom; row++)
    for (let column = left; column < right; column++, i++)
      cropped.data[i] = 255 * shape.data[row * shape.width + column];
  const scale = FITTED_SIZE / Math.max(cropped.height, cropped.width);
  const [height, width] = [cropped.height, cropped.width].map(side => Math.max(1, roundHalfToEven(scale * side)));
  return resize(cropped, height, width, BOX);
}

// Places a digit into 28x28 pixels with its centre of mass in the middle: bytes (28, 28, 1).
function centre({height, width, data}) {
  let mass = 0, down = 0, across = 0;
  for (let i = 0; i < data.length; i++) {
    mass += data[i];
    down += data[i] * Math.floor(i / width);
    across += data[i] * (i % width);
  }
  const corner = (moment, side) => Math.min(SIZE - side, Math.max(0, roundHalfToEven(SIZE / 2 - moment / mass)));
  const top = corner(down, height), left = corner(across, width), image = new Uint8Array(SIZE * SIZE);
  for (let row = 0; row < height; row++)
    image.set(data.subarray(row * width, (row + 1) * width), (top + row) * SIZE + left);
  return image;
}

// A picture of anything: shrunk to the shape of the network's images, bytes (height, width, channels), or null.
function preparePicture(colours, [height, width, channels], background) {
  const spread = [0, 1, 2].map(channel => {
    let [low, high] = [255, 0];
    for (let i = channel; i < colours.data.length; i += 3) {
      low = Math.min(low, colours.data[i]);
      high = Math.max(high, colours.data[i]);
    }
    return high - low;
  });
  if (Math.max(...spread) < FAINTEST) return null;
  let picture = {...colours, channels: 3, data: Uint8Array.from(colours.data, roundHalfToEven)};
  if (channels === 1) {
    const grey = new Uint8Array(picture.data.length / 3);
    for (let i = 0; i < grey.length; i++) {
      const [red, green, blue] = picture.data.subarray(3 * i, 3 * i + 3);
      grey[i] = (19595 * red + 38470 * green + 7471 * blue + 2 ** 15) >> 16;
    }
    picture = {...colours, channels: 1, data: grey};
  }
  const image = resize(picture, height, width, BOX).data;
  if (channels !== 1) return image;
  const edges = [];
  for (let row = 0; row < height; row++) edges.push(image[row * width], image[(row + 1) * width - 1]);
  for (let column = 0; column < width; column++) edges.push(image[column], image[(height - 1) * width + column]);
  const edge = Math.trunc(median(Float32Array.from(edges)));
  return Math.abs(255 - edge - background) < Math.abs(edge - background) ? image.map(value => 255 - value) : image;
}

// What NumPy and SciPy have.

const without = ({height, width, data}, mask) =>
  ({height, width, data: data.map((value, i) => mask.data[i] ? 0 : value)});
const negative = ({height, width, data}) => ({height, width, data: data.map(value => -value)});
const inverted = ({height, width, data}) => ({height, width, data: data.map(value => 1 - value)});

function above({height, width, data}, threshold) {
  const mask = new Uint8Array(data.length);
  for (let i = 0; i < data.length; i++) mask[i] = data[i] > threshold ? 1 : 0;
  return {height, width, data: mask};
}

function roundHalfToEven(value) {
  const floor = Math.floor(value);
  return value - floor === 0.5 ? floor + floor % 2 : Math.round(value);
}

function median(values) {
  const sorted = values.slice().sort(), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : Math.fround(Math.fround(sorted[half - 1] + sorted[half]) / 2);
}

function percentile(values, share) {
  const sorted = values.slice().sort(), place = (sorted.length - 1) * share, low = Math.floor(place);
  const part = place - low, next = sorted[Math.min(low + 1, sorted.length - 1)];
  const step = Math.fround(next - sorted[low]);
  return part < 0.5
    ? Math.fround(sorted[low] + Math.fround(step * Math.fround(part)))
    : Math.fround(next - Math.fround(step * Math.fround(1 - part)));
}

function boxAround({height, width, data}) {
  let [top, bottom, left, right] = [height, 0, width, 0];
  for (let i = 0; i < data.length; i++) {
    if (!data[i]) continue;
    const row = Math.floor(i / width), column = i % width;
    [top, bottom] = [Math.min(top, row), row + 1];
    [left, right] = [Math.min(left, column), Math.max(right, column + 1)];
  }
  return bottom ? {top, bottom, left, right} : null;
}

function padded({height, width, data}, margin) {
  const newWidth = width + 2 * margin, all = new Uint8Array((height + 2 * margin) * newWidth);
  for (let row = 0; row < height; row++)
    all.set(data.subarray(row * width, (row + 1) * width), (row + margin) * newWidth + margin);
  return {height: height + 2 * margin, width: newWidth, data: all};
}

// The indices of an axis and of its reflections, by a margin beyond both ends: ... 1 0 0 1 2 ... n-1 n-1 n-2 ...
function reflections(size, margin) {
  return Array.from({length: size + 2 * margin}, (_, i) => {
    const place = ((i - margin) % (2 * size) + 2 * size) % (2 * size);
    return place < size ? place : 2 * size - 1 - place;
  });
}

// Changes each column of an array, and then each row: `ofLength` returns the function that changes a line of a length.
function alongBothAxes(array, ofLength) {
  const {height, width} = array, data = array.data.slice(), column = data.slice(0, height);
  const ofColumn = ofLength(height), ofRow = ofLength(width);
  for (let x = 0; x < width; x++) {
    for (let y = 0; y < height; y++) column[y] = data[y * width + x];
    const changed = ofColumn(column);
    for (let y = 0; y < height; y++) data[y * width + x] = changed[y];
  }
  for (let first = 0; first < data.length; first += width) data.set(ofRow(data.slice(first, first + width)), first);
  return {height, width, data};
}

function gaussianFilter(array, sigma) {
  const radius = Math.floor(4 * sigma + 0.5);
  const kernel = Array.from({length: radius + 1}, (_, i) => Math.exp(-0.5 / sigma ** 2 * i ** 2));
  const total = kernel[0] + 2 * kernel.slice(1).reduce((a, b) => a + b, 0);
  const weights = kernel.map(weight => weight / total);
  return alongBothAxes(array, length => {
    const index = reflections(length, radius);
    return line => line.map((value, i) => {
      let sum = value * weights[0];
      for (let j = radius; j > 0; j--) sum += (line[index[i + radius - j]] + line[index[i + radius + j]]) * weights[j];
      return sum;
    });
  });
}

// Removes what is narrower than a window: the minimum in it, and then the maximum of those.
function greyOpening(array, size) {
  const before = Math.floor(size / 2), after = size - before - 1;
  return negative(minimumFilter(negative(minimumFilter(array, before, after)), after, before));
}

// The minimum in a window of so many pixels before and after each along both axes; edges are reflected.
function minimumFilter(array, before, after) {
  const margin = Math.max(before, after);
  return alongBothAxes(array, length => {
    const index = reflections(length, margin);
    const places = new Int32Array(length + 2 * margin); // in the window, whose values rise: the first is the minimum
    return line => {
      const minima = line.slice();
      let head = 0, tail = 0;
      for (let end = margin - before; end < margin + length + after; end++) {
        const value = line[index[end]];
        while (tail > head && line[index[places[tail - 1]]] >= value) tail--;
        places[tail++] = end;
        if (places[head] < end - after - before) head++;
        if (end >= margin + after) minima[end - margin - after] = line[index[places[head]]];
      }
      return minima;
    };
  });
}

// The distance of each of a mask's pixels to the nearest one outside it, float64; 0 outside it.
// By Felzenszwalb and Huttenlocher, Theory of Computing 8, 2012: squared distances are lower envelopes of parabolas.
function distanceTransform({height, width, data}) {
  const distances = new Float64Array(data.length); // in the column, up or down
  for (let i = 0; i < data.length; i++) if (data[i]) distances[i] = i < width ? height + width : distances[i - width] + 1;
  for (let i = data.length - width - 1; i >= 0; i--) distances[i] = Math.min(distances[i], distances[i + width] + 1);
  const lowest = new Int32Array(width), starts = new Float64Array(width), squares = new Float64Array(width);
  for (let first = 0; first < data.length; first += width) {
    for (let x = 0; x < width; x++) squares[x] = distances[first + x] ** 2;
    const meets = (i, j) => (squares[i] + i * i - squares[j] - j * j) / (2 * i - 2 * j);
    let k = 0;
    [lowest[0], starts[0]] = [0, -Infinity];
    for (let x = 1; x < width; x++) {
      let start = meets(x, lowest[k]);
      while (start <= starts[k]) start = meets(x, lowest[--k]);
      k++;
      [lowest[k], starts[k]] = [x, start];
    }
    const last = k;
    k = 0;
    for (let x = 0; x < width; x++) {
      while (k < last && starts[k + 1] < x) k++;
      if (data[first + x]) distances[first + x] = Math.sqrt((x - lowest[k]) ** 2 + squares[lowest[k]]);
    }
  }
  return distances;
}

// What it has for masks; outside a mask there is nothing.

const sum = values => values.reduce((a, b) => a + b, 0);
const both = (mask, other) => ({...mask, data: mask.data.map((value, i) => value & other.data[i])});
const either = (mask, other) => ({...mask, data: mask.data.map((value, i) => value | other.data[i])});
const closeGaps = (mask, down, across) => erode(dilate(mask, down, across), down, across);

function transposed({height, width, data}) {
  const turned = {height: width, width: height, data: new Uint8Array(data.length)};
  for (let row = 0, i = 0; row < height; row++)
    for (let column = 0; column < width; column++, i++) turned.data[column * height + row] = data[i];
  return turned;
}

// The middles of the windows of so many rows and columns in which all pixels are set.
function erode(mask, down, across) {
  const level = countAlong(mask, false, across >> 1, (across - 1) >> 1, across);
  return countAlong(level, true, down >> 1, (down - 1) >> 1, down);
}

// The pixels of such windows around a mask's.
function dilate(mask, down, across) {
  return countAlong(countAlong(mask, false, (across - 1) >> 1, across >> 1, 1), true, (down - 1) >> 1, down >> 1, 1);
}

// The pixels for which at least so many are set among themselves and those just before and after them along an axis.
function countAlong({height, width, data}, isDown, before, after, least) {
  const counted = new Uint8Array(data.length);
  const [lines, next, length, step] = isDown ? [width, 1, height, width] : [height, width, width, 1];
  for (let line = 0; line < lines; line++) {
    const first = line * next;
    let count = 0;
    for (let end = 0; end < length + after; end++) {
      const gone = end - after - before - 1;
      if (end < length) count += data[first + end * step];
      if (gone >= 0) count -= data[first + gone * step];
      if (end >= after) counted[first + (end - after) * step] = count >= least ? 1 : 0;
    }
  }
  return {height, width, data: counted};
}

// The pixels at most so many steps up, down or aside from a mask's.
function grown(mask, steps) {
  const {height, width} = mask, data = new Uint8Array(height * width);
  for (let row = 0, i = 0; row < height; row++)
    for (let column = 0; column < width; column++, i++) data[i] = isNear(mask, row, column, steps) ? 1 : 0;
  return {height, width, data};
}

// A mask and its holes, which cannot be left by steps up, down and aside.
function filled({height, width, data}) {
  const all = {height, width, data: new Uint8Array(data.length).fill(1)}, todo = [];
  const leave = i => {
    if (data[i] || !all.data[i]) return;
    all.data[i] = 0;
    todo.push(i);
  };
  for (let row = 0; row < height; row++) [row * width, (row + 1) * width - 1].forEach(leave);
  for (let column = 0; column < width; column++) [column, (height - 1) * width + column].forEach(leave);
  while (todo.length) {
    const i = todo.pop(), column = i % width;
    if (i >= width) leave(i - width);
    if (i + width < data.length) leave(i + width);
    if (column > 0) leave(i - 1);
    if (column < width - 1) leave(i + 1);
  }
  return all;
}
