"use strict";
// What happens on the page: a drawing or a picture becomes ImageData, `read` reads it, and the answer is shown.

const LARGEST = 4096; // pixels per side of a canvas that every browser has
const SHOWN_CLASSES = 10; // the most probable ones
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

function show(picture) {
  const reading = read(picture);
  if (reading === undefined) say("?", "The picture is too small or too narrow; give one of a whole digit.");
  else if (reading === null) say("?", "Nothing was found; give a picture with more contrast.");
  else if (reading.index === null) say("?", "This is no digit.", reading);
  else say(embedded.class_names[reading.index], "", reading);
}

function say(answer, told, reading = null) {
  find("output").textContent = answer;
  find("#told").textContent = told;
  find("#seen").hidden = reading === null;
  if (reading) drawImage(find("#seen"), reading.image);
  const shown = reading === null || reading.index === null ? [] : rowsOf(reading);
  find("#classes").replaceChildren(...shown);
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
  const url = URL.createObjectURL(file);
  sheet.getContext?.("2d").clearRect(0, 0, sheet.width, sheet.height);
  showOnSheet(url);
  let picture = null;
  try {
    picture = await pictureOf(url);
  } catch {}
  if (shown !== url) return; // there is something newer
  if (picture) show(picture);
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
  let asked = false; // a drawing is read at most once for each of the screen's frames
  startBoard(find("#board"), drawn, () => {
    showOnSheet(null);
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      if (shown) return;
      const drawing = atob(drawn.value);
      if (/[^\0]/.test(drawing)) show(pictureOfDrawing(drawing, sheet.width));
      else say("nothing yet", "");
    });
  });
}
