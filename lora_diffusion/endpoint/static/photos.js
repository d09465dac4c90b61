// Photos on their way to the server: made smaller, without their metadata; and the small copies that the page shows.

const MAX_SIDE = 1600; // px: more than a recogniser looks at
const SMALL = 200_000; // bytes: goes as it is
const SHOWN = 256; // px, of the copy
const MARGIN = 0.6; // of a face's box, around it: hair and chin

/** The photo as a blob that is quick to send. A kind that the browser cannot read goes as it is: the server knows more. */
export async function prepare(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return file;
  }
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size < SMALL) return file;
  return blob(draw(bitmap, 0, 0, bitmap.width, bitmap.height, scale));
}

/** A small square copy as a data URL, or "" of a kind that the browser cannot read. box: x1, y1, x2, y2 of the face, px. */
export async function copy(file, box) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return "";
  }
  const { width, height } = bitmap;
  const face = box ? Math.max(box[2] - box[0], box[3] - box[1]) * (1 + 2 * MARGIN) : Infinity;
  const side = Math.min(width, height, face);
  const [x, y] = box ? [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2] : [width / 2, height / 2];
  const [left, top] = [clamp(x - side / 2, width - side), clamp(y - side / 2, height - side)];
  return draw(bitmap, left, top, side, side, Math.min(1, SHOWN / side)).toDataURL("image/jpeg", 0.88);
}

const clamp = (value, most) => Math.max(0, Math.min(most, value));
const blob = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.94));

function draw(bitmap, left, top, width, height, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, left, top, width, height, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas;
}
