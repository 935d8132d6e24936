"use strict";
// Computes what a network makes of an image, and reads pictures as TrainedModel.read does.
//
// A network is {image_shape, params, temperature}: kernels (3, 3, C, F) and (D, K), and biases (F) and (K), in float32.
// The comments give the shapes for MNIST's images.

const TINY = 2 ** -1022; // the smallest normal number
const MOST_JUDGEMENTS = 1000;

// Returns for each line what the network got of each character, bytes (H, W, C), the probability of each class, and the
// most probable class, or null as its index where there is no digit. If there is no character, `unread` is what is there,
// or null if nothing is on the picture's paper. Returns undefined if the picture is too small.
async function read(imageData, pause = async () => {}) {
  const {network, detector, preparation, background} = embedded;
  const colours = toColours(imageData);
  if (colours === null) return undefined;
  let lines, unread = null;
  if (preparation === "character") {
    const found = await findCharacters(colours, detector && (image => judge(image).cost), pause);
    lines = found.lines.map(line => line.map(({image}) => image));
    unread = found.one && found.one.image;
  } else {
    const image = preparePicture(colours, network.image_shape, background);
    lines = image === null ? [] : [[image]];
  }
  const sure = lines.flat().map(image => judge(image).digit >= detector?.least_of_several);
  const readings = lines.map(line => {
    const judged = line.map(judge);
    const mean = judged.reduce((sum, {digit}) => sum + digit, 0) / judged.length;
    const ofDigits = sure.includes(true) && mean >= detector?.least_of_line;
    let least = sure.length === 1 || ofDigits ? detector?.least : Infinity;
    if (judged.some(({digit}) => digit >= least)) least = detector.least_beside_digits;
    return judged.map(({classes, digit}, i) => ({
      image: line[i], probabilities: classes,
      index: detector === null || digit >= least ? classes.indexOf(Math.max(...classes)) : null,
    }));
  });
  return {lines: readings, unread};
}

const judgements = new Map(); // of the images of the last pictures, of which a growing drawing has many again

// The probability of each class, that it is a digit, and how improbable it is that it is one digit.
function judge(image) {
  const {network, detector} = embedded, key = String(image);
  let judged = judgements.get(key);
  if (judged) return judged;
  judged = {classes: softmax(logits(network, image), network.temperature)};
  if (detector !== null) {
    // The detector's first classes are the digits, and its last one is all else.
    const digits = softmax(logits(detector, image), 1).slice(0, detector.digits);
    judged.digit = digits.reduce((a, b) => a + b);
    const both = digits.map((digit, i) => Math.log(digit) + detector.share * Math.log(Math.max(judged.classes[i], TINY)));
    judged.cost = -Math.max(...both);
    if (detector.asked) judged.classes = softmax(both, 1);
  }
  if (judgements.size >= MOST_JUDGEMENTS) judgements.clear();
  judgements.set(key, judged);
  return judged;
}

function logits({image_shape: [height, width, channels], params}, image) {
  let x = {height, width, channels, data: Float32Array.from(image, pixel => pixel / 255)}; // (28, 28, 1)
  x = maxPool(convolve(x, params.layer1)); // (14, 14, 32)
  x = maxPool(convolve(x, params.layer2)); // (7, 7, 64)
  return dense(x.data, params.fc); // (10)
}

// A 3x3 convolution with stride 1 and padding 1, and ReLU: (H, W, C) -> (H, W, F).
function convolve({height, width, channels, data}, {kernel, bias}) {
  const features = bias.length, sums = new Float64Array(features);
  const convolved = new Float32Array(height * width * features);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      sums.set(bias);
      for (let y = Math.max(0, row - 1); y < Math.min(height, row + 2); y++) {
        for (let x = Math.max(0, column - 1); x < Math.min(width, column + 2); x++) {
          for (let channel = 0; channel < channels; channel++) {
            const value = data[(y * width + x) * channels + channel];
            const first = (((y - row + 1) * 3 + x - column + 1) * channels + channel) * features;
            if (value !== 0) for (let f = 0; f < features; f++) sums[f] += value * kernel[first + f];
          }
        }
      }
      for (let f = 0; f < features; f++) convolved[(row * width + column) * features + f] = Math.max(0, sums[f]);
    }
  }
  return {height, width, channels: features, data: convolved};
}

// The maximum of each 2x2 pixels: (H, W, F) -> (H/2, W/2, F).
function maxPool({height, width, channels, data}) {
  const pooled = {height: height >> 1, width: width >> 1, channels};
  pooled.data = new Float32Array(pooled.height * pooled.width * channels);
  for (let row = 0, i = 0; row < pooled.height; row++) {
    for (let column = 0; column < pooled.width; column++) {
      const first = (2 * row * width + 2 * column) * channels, below = first + width * channels;
      for (let f = 0; f < channels; f++, i++)
        pooled.data[i] = Math.max(
          data[first + f], data[first + channels + f], data[below + f], data[below + channels + f]);
    }
  }
  return pooled;
}

// A dense layer: (D) -> (K).
function dense(x, {kernel, bias}) {
  const sums = Float64Array.from(bias);
  for (let i = 0; i < x.length; i++)
    for (let k = 0; k < sums.length; k++) sums[k] += x[i] * kernel[i * sums.length + k];
  return sums;
}

function softmax(logits, temperature) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, logit => Math.exp((logit - largest) / temperature));
  const total = powers.reduce((a, b) => a + b);
  return powers.map(power => power / total);
}
