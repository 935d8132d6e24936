// Gradio or page.js runs this once, with the board's element, its properties and the function that triggers its events.
const board = element.querySelector("canvas");
const pen = board.getContext("2d", {willReadFrequently: true});
pen.lineWidth = board.dataset.pen;
pen.lineCap = "round";
let last = null;
let changes = 0;  // a picture that is decoded late must not replace what came after it

// The drawing's value is its opacity, one byte per pixel, in base64.
const send = () => {
  const colours = pen.getImageData(0, 0, board.width, board.height).data;
  let ink = "";
  for (let i = 3; i < colours.length; i += 4) ink += String.fromCharCode(colours[i]);
  props.value = btoa(ink);
  changes++;
  trigger("draw");
};
const clear = () => {
  pen.clearRect(0, 0, board.width, board.height);
  send();
};
const drawTo = event => {
  const point = [event.offsetX * board.width / board.clientWidth, event.offsetY * board.height / board.clientHeight];
  pen.beginPath();
  pen.moveTo(...(last ?? point));
  pen.lineTo(...point);
  pen.stroke();
  last = point;
  send();
};
board.addEventListener("pointerdown", event => {
  if (!event.isPrimary || event.button !== 0) return;  // a second finger, or another button
  board.setPointerCapture(event.pointerId);
  last = null;
  drawTo(event);
});
// A stroke that began elsewhere is none: the pointer is not the board's.
board.addEventListener("pointermove", event => { if (board.hasPointerCapture(event.pointerId)) drawTo(event); });
element.querySelector("[name=clear]").addEventListener("click", clear);
document.addEventListener("keydown", event => { if (event.key == "Escape") clear(); });
