"use strict";
// What happens on the page: a drawing or a picture becomes ImageData, `read` reads it, and the answer is shown.

const LARGEST = 4096; // pixels per side of a canvas that every browser has
const SHOWN_CLASSES = 10; // the most probable ones
const MOST_BUSY = 30; // milliseconds after which the page may draw and listen again
const find = selector => document.querySelector(selector);

for (const network of [embedded.network, embedded.detector])
  for (const weights of Object.values(network?.params ?? {}))
    for (const kind of Object.keys(weights))
      weights[kind] = new Float32Array(Uint8Array.from(atob(weights[kind]), byte => byte.charCodeAt(0)).buffer);

// Decodes the picture at an address, upright.
async function pictureOf(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const scale = Math.min(1, LARGEST / Math.max(image.naturalWidth, image.naturalHeight));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight].map(side => Math.round(scale * side));
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

// Returns a drawing, bytes of ink in base64, as a picture: black on white, with a margin of paper, so that ink at the
// board's edge counts as part of the digit and not of a frame.
function pictureOfDrawing(drawing, side) {
  const margin = Math.floor(side / 10), picture = new ImageData(side + 2 * margin, side + 2 * margin);
  picture.data.fill(255);
  for (let i = 0; i < drawing.length; i++) {
    const pixel = (Math.floor(i / side) + margin) * picture.width + i % side + margin;
    picture.data.fill(255 - drawing.charCodeAt(i), 4 * pixel, 4 * pixel + 3);
  }
  return picture;
}

let newest = new AbortController(); // of the reading of the newest picture or drawing

// Ends the reading of what was given before, and returns the signal of what is given now.
function begin() {
  newest.abort();
  newest = new AbortController();
  return newest.signal;
}

async function show(picture, signal) {
  let since = performance.now();
  const pause = async () => {
    if (performance.now() - since < MOST_BUSY) return;
    await new Promise(resolve => setTimeout(resolve));
    signal.throwIfAborted();
    since = performance.now();
  };
  try {
    tell(await read(picture, pause));
  } catch (error) {
    if (!signal.aborted) throw error;
  }
}

function tell(reading) {
  const readings = reading?.lines.flat() ?? [];
  if (reading === undefined) say("?", "The picture is too small or too narrow; give a larger one.");
  else if (readings.length === 0 && reading.unread === null)
    say("?", "Nothing was found; give a picture with more contrast.");
  else if (readings.every(({index}) => index === null)) say("?", "This is no digit.", readings[0]?.image ?? reading.unread);
  else if (readings.length === 1) say(nameOf(readings[0]), "", readings[0].image, rowsOf(readings[0]));
  else say(readings.map(nameOf).join(" "), "", null, [], reading.lines.map(rowOfFigures));
}

function say(answer, told, seen = null, classes = [], characters = []) {
  find("output").textContent = answer;
  find("#told").textContent = told;
  find("#seen").hidden = seen === null;
  if (seen) drawImage(find("#seen"), seen);
  find("#classes").replaceChildren(...classes);
  find("#characters").replaceChildren(...characters);
}

const nameOf = ({index}) => index === null ? "?" : embedded.class_names[index];

// Returns what the network got of each character of a line, with its name and probability below.
function rowOfFigures(line) {
  const row = document.createElement("div");
  row.append(...line.map(reading => {
    const figure = document.createElement("figure"), probability = Math.max(...reading.probabilities);
    const [canvas, caption] = ["canvas", "figcaption"].map(tag => figure.appendChild(document.createElement(tag)));
    const [name, told] = ["b", "span"].map(tag => caption.appendChild(document.createElement(tag)));
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "what the network sees");
    drawImage(canvas, reading.image);
    name.textContent = nameOf(reading);
    const certain = reading.index !== null && probability >= embedded.certain;
    told.textContent = reading.index === null ? "no digit" : describeProbability(probability) + (certain ? "" : ", not sure");
    figure.classList.toggle("uncertain", !certain);
    return figure;
  }));
  return row;
}

function drawImage(canvas, image) {
  const [height, width, channels] = embedded.network.image_shape, picture = new ImageData(width, height);
  for (let i = 0; i < picture.data.length; i++)
    picture.data[i] = i % 4 === 3 ? 255 : image[Math.floor(i / 4) * channels + Math.min(i % 4, channels - 1)];
  [canvas.height, canvas.width] = [height, width];
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

// Returns a row with its name and probability for each of the most probable classes, in the classes' order.
function rowsOf({probabilities, index}) {
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  return order.slice(0, SHOWN_CLASSES).sort((a, b) => a - b).map(i => {
    const row = document.createElement("div");
    row.className = i === index ? "class most" : "class";
    const [name, meter, told] = ["b", "meter", "span"].map(tag => row.appendChild(document.createElement(tag)));
    name.textContent = embedded.class_names[i];
    meter.value = probabilities[i];
    meter.setAttribute("aria-label", embedded.class_names[i]);
    told.textContent = describeProbability(probabilities[i]);
    return row;
  });
}

function describeProbability(probability) {
  return probability > 0.999 ? ">99.9%" : probability < 0.001 ? "<0.1%" : `${(100 * probability).toFixed(1)}%`;
}

const sheet = find("#board > *"); // the board, on which a chosen picture is shown, too
let shown = null; // the chosen picture's address

function showOnSheet(url) {
  if (shown) URL.revokeObjectURL(shown);
  shown = url;
  sheet.style.backgroundImage = url ? `url(${url})` : "";
}

async function take(file) {
  if (!file) return;
  const url = URL.createObjectURL(file), signal = begin();
  sheet.getContext?.("2d").clearRect(0, 0, sheet.width, sheet.height);
  showOnSheet(url);
  say("…", "The picture is read.");
  let picture = null;
  try {
    picture = await pictureOf(url);
  } catch {}
  if (signal.aborted) return;
  if (picture) await show(picture, signal);
  else say("?", "The file is no picture that this browser can read; save it as PNG or JPEG.");
}

for (const input of document.querySelectorAll("input"))
  input.addEventListener("change", () => {
    take(input.files[0]);
    input.value = ""; // so that the same file can be chosen again
  });
document.addEventListener("dragover", event => event.preventDefault());
document.addEventListener("drop", event => {
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", event => take(event.clipboardData.files[0]));

if (sheet.getContext) {
  const drawn = {value: ""};
  const isEmpty = () => !/[^\0]/.test(atob(drawn.value));
  let isNew = false, isReading = false; // while a drawing is read, newer ones wait, and only the last of them is read
  startBoard(find("#board"), drawn, async () => {
    showOnSheet(null);
    if (isEmpty()) begin();
    isNew = true;
    if (isReading) return;
    isReading = true;
    try {
      while (isNew) {
        isNew = false;
        await new Promise(requestAnimationFrame);
        if (shown) continue; // a picture has taken the drawing's place
        if (isEmpty()) say("nothing yet", "");
        else await show(pictureOfDrawing(atob(drawn.value), sheet.width), begin());
      }
    } finally {
      isReading = false;
    }
  });
}
