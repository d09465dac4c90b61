// Pictures of the API: their bytes, enlarged where they are small, and saved.

const SMOOTH_UP_TO = 128; // px: smaller pictures are enlarged with a better filter than the browser's
const ENLARGED = 512; // px

export function blobOf({ data, media_type }) {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: media_type });
}

/** The URL of a picture as it is shown and saved: a small one enlarged, so that 64 px are neither a blur nor a mosaic. */
export async function urlOf(blob) {
  const url = URL.createObjectURL(blob);
  const image = await loaded(url);
  if (image.naturalWidth > SMOOTH_UP_TO) return url;
  URL.revokeObjectURL(url);
  return URL.createObjectURL(await enlarge(image, Math.floor(ENLARGED / image.naturalWidth)));
}

/** A JPEG of `side` px as a data URL: small enough to be kept by the hundred. */
export async function thumbnail(url, side = 96) {
  const image = await loaded(url);
  const canvas = make("canvas", { width: side, height: side });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, side, side);
  return canvas.toDataURL("image/jpeg", 0.85);
}

/** The image at a URL. Not `decode()`, which waits for the page to be painted. */
function loaded(url) {
  return new Promise((resolve, reject) => {
    const image = make("img", { onload: () => resolve(image), onerror: () => reject(new Error("a picture cannot be read")) });
    image.src = url;
  });
}

export function save(url, name) {
  make("a", { href: url, download: name }).click();
}

/** A PNG of the picture `times` as large, by Lanczos' filter (3 lobes): clearer edges than a browser's bilinear one. */
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
  return new Promise((resolve) => canvas.toBlob(resolve));
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
