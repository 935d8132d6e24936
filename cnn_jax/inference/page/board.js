// Gradio or page.js runs this once, with the board's element, its properties and the function that triggers its events.
const board = element.querySelector("canvas");
const pen = board.getContext("2d", {willReadFrequently: true});
pen.lineWidth = board.dataset.pen;
pen.lineCap = "round";
let last = null;

// The drawing's value is its opacity, one byte per pixel, in base64.
const send = () => {
  const colours = pen.getImageData(0, 0, board.width, board.height).data;
  let ink = "";
  for (let i = 3; i < colours.length; i += 4) ink += String.fromCharCode(colours[i]);
  props.value = btoa(ink);
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
  if (!event.isPrimary) return;  // a second finger
  board.setPointerCapture(event.pointerId);
  last = null;
  drawTo(event);
});
board.addEventListener("pointermove", event => { if (event.isPrimary && event.buttons) drawTo(event); });
element.querySelector("[name=clear]").addEventListener("click", clear);
document.addEventListener("keydown", event => { if (event.key == "Escape") clear(); });
