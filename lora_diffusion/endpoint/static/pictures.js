// Pictures on the page: places that fill as pictures become ready, and what can be done with each.

const SMOOTH_UP_TO = 128; // px: smaller pictures are enlarged with a better filter than the browser's
const ENLARGED = 512; // px

/** A list item that waits for a picture. */
export function place() {
  const item = document.createElement("li");
  item.className = "waiting";
  item.append(make("div", { className: "picture" }));
  return item;
}

/** Put a picture of the API ({seed, media_type, data, similarity}) into its place. `saveAs`: name of the file. */
export function fill(item, image, { alt, saveAs }) {
  const blob = blobOf(image);
  const url = URL.createObjectURL(blob);
  const picture = make("img", { className: "picture", alt });
  show(picture, url);
  const caption = make("p", { className: "row spread small soft" });
  const told = make("span", { className: "number", textContent: `seed ${image.seed}` });
  if (image.similarity !== null && image.similarity !== undefined) {
    told.append(" · ", make("span", { className: "hidden-visually", textContent: "likeness " }), image.similarity.toFixed(2));
    told.title = "seed · likeness to the photo";
  }
  caption.append(
    told,
    make("a", { href: url, download: saveAs, textContent: "Save", ariaLabel: `Save the picture of seed ${image.seed}` }),
  );
  item.className = "";
  item.replaceChildren(picture, caption);
  item.dataset.url = url;
}

/** Empty a list and free what its pictures held. */
export function clear(list) {
  for (const item of list.children) if (item.dataset.url) URL.revokeObjectURL(item.dataset.url);
  list.replaceChildren();
}

export function blobOf({ data, media_type }) {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: media_type });
}

/** Show a picture in an <img>; a small one enlarged, so that 64 px are neither a blur nor a mosaic. */
export async function show(element, url) {
  element.src = url;
  await element.decode().catch(() => {});
  if (element.naturalWidth > SMOOTH_UP_TO || element.src !== url) return;
  const sharp = enlarge(element, Math.floor(ENLARGED / element.naturalWidth));
  if (element.src === url) element.src = sharp;
}

/** A data URL of the picture `times` as large, by Lanczos' filter (3 lobes): clearer edges than a browser's bilinear one. */
function enlarge(image, times) {
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const source = Float32Array.from(context.getImageData(0, 0, width, height).data);
  const wide = stretch(source, width, height, times); // (height, width * times), then transposed
  const tall = stretch(wide, height, width * times, times);
  canvas.width = width * times;
  canvas.height = height * times;
  context.putImageData(new ImageData(Uint8ClampedArray.from(tall), canvas.width, canvas.height), 0, 0);
  return canvas.toDataURL();
}

/** Rows of RGBA, `length` long and `rows` many, made `times` as long; the result is transposed, so that calling twice is 2-D. */
function stretch(source, length, rows, times) {
  const result = new Float32Array(length * times * rows * 4);
  for (let x = 0; x < length * times; x++) {
    const centre = (x + 0.5) / times - 0.5;
    const first = Math.floor(centre) - 2;
    const weights = Array.from({ length: 6 }, (_, k) => lanczos(centre - first - k));
    const sum = weights.reduce((a, b) => a + b);
    for (let y = 0; y < rows; y++) {
      for (let k = 0; k < 6; k++) {
        const from = 4 * (y * length + Math.min(length - 1, Math.max(0, first + k)));
        const to = 4 * (x * rows + y);
        for (let c = 0; c < 4; c++) result[to + c] += (weights[k] / sum) * source[from + c];
      }
    }
  }
  return result;
}

function lanczos(x) {
  if (Math.abs(x) < 1e-6) return 1;
  if (Math.abs(x) >= 3) return 0;
  const angle = Math.PI * x;
  return (3 * Math.sin(angle) * Math.sin(angle / 3)) / (angle * angle);
}

export function make(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}
