// Photos on their way to the server: made smaller, without their metadata, cropped to one face if there are several.

const MAX_SIDE = 1600; // px: more than a recogniser looks at
const SMALL = 200_000; // bytes: goes as it is
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
  return draw(bitmap, 0, 0, bitmap.width, bitmap.height, scale);
}

/** The part of a photo around a box [x1, y1, x2, y2] in px. */
export async function crop(file, [x1, y1, x2, y2]) {
  const bitmap = await createImageBitmap(file);
  const margin = MARGIN * Math.max(x2 - x1, y2 - y1);
  const left = Math.max(0, x1 - margin);
  const top = Math.max(0, y1 - margin);
  const width = Math.min(bitmap.width, x2 + margin) - left;
  const height = Math.min(bitmap.height, y2 + margin) - top;
  return draw(bitmap, left, top, width, height, 1);
}

function draw(bitmap, left, top, width, height, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, left, top, width, height, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.94));
}
