// This goes on where board.js ends: a chosen, photographed or dropped picture is shown on the board.
const input = element.querySelector("input");
const alert = element.querySelector("p");
pen.imageSmoothingQuality = "high";

// A picture becomes ink that is as opaque as the picture is dark. It is shown whole, and beside it the board is as dark
// as most of the picture, so that the picture has no edge there.
const show = async file => {
  const change = ++changes;
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    if (change === changes) alert.textContent = `this browser finds no picture in ${file.name}; choose a PNG or JPEG file`;
    return;
  }
  if (change !== changes) {
    picture.close();
    return;
  }
  const scale = Math.min(board.width / picture.width, board.height / picture.height);
  const [width, height] = [picture.width, picture.height].map(side => Math.max(1, Math.round(side * scale)));
  const left = (board.width - width) >> 1, top = (board.height - height) >> 1;
  pen.fillStyle = "white";  // behind what is transparent
  pen.fillRect(0, 0, board.width, board.height);
  pen.drawImage(picture, left, top, width, height);
  picture.close();
  const pixels = pen.getImageData(left, top, width, height), colours = pixels.data;
  for (let i = 0; i < colours.length; i += 4) {
    colours[i + 3] = 255 - (0.299 * colours[i] + 0.587 * colours[i + 1] + 0.114 * colours[i + 2]);
    colours[i] = colours[i + 1] = colours[i + 2] = 0;
  }
  const darkness = colours.filter((_, i) => i % 4 == 3).sort();
  pen.clearRect(0, 0, board.width, board.height);
  pen.fillStyle = `rgb(0 0 0 / ${darkness[darkness.length >> 1] / 255})`;
  pen.fillRect(0, 0, board.width, board.height);
  pen.putImageData(pixels, left, top);
  alert.textContent = "";
  send();
};
for (const event of ["pointerdown", "keydown"]) document.addEventListener(event, () => { alert.textContent = ""; });
element.querySelector("[name=open]").addEventListener("click", () => input.click());
input.addEventListener("change", () => {
  if (input.files.length) show(input.files[0]);
  input.value = "";  // so that the same file can be chosen again
});
element.addEventListener("dragover", event => event.preventDefault());  // or the browser would leave the page for the file
element.addEventListener("drop", event => {
  event.preventDefault();
  if (event.dataTransfer.files.length) show(event.dataTransfer.files[0]);
});
