// From photos to the numbers that describe one face: they make the LoRA, and drawn faces are compared with them.

import { Problem, ask, form } from "./api.js";
import { mean, meanCosine } from "./likeness.js";
import { copy } from "./photos.js";
import { make } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const DIGITS = 5;

/** A person without a LoRA yet. photos: small copies, as data URLs. */
export function newPerson(name, photos = []) {
  // A seed of their own, so that strangers with the same photo share no LoRA.
  const [id, seed] = crypto.getRandomValues(new Uint32Array(2));
  return { id: String(id), seed, name, photos, face: null, reference: null, recogniser: null, own: null, base: null };
}

/**
 * Learn the face in `photos` (blobs) of one person. `again`: another photo of them, only to compare with.
 * Raises Problem for a photo without a usable face; null if nobody was chosen of several.
 */
export async function learnFace(person, photos, model, again) {
  const looked = again ? [...photos, again] : photos;
  const found = await facesOf(looked);
  const faces = [];
  for (const [i, { faces: seen }] of found.entries()) {
    const face = seen.length > 1 ? await chooseFace(looked[i], seen) : seen[0];
    if (!face) return null;
    faces.push(face);
  }
  const own = faces.slice(0, photos.length);
  person.photos = await Promise.all(own.map((face, i) => copy(photos[i], found[i].faces.length > 1 ? face.box : undefined)));
  person.face = person.reference = mean(own.map((face) => face.embedding)).map((value) => Number(value.toFixed(DIGITS)));
  person.own = meanCosine(faces.map((face) => face.embedding));
  person.recogniser = model?.identity.recogniser.fingerprint;
  return person;
}

/** [{faces}] of each photo, none of them empty. */
async function facesOf(photos) {
  const { photos: found } = await ask("v1/embeddings", { body: form({ photo: photos }) });
  for (const [i, { faces, reason, detail }] of found.entries()) {
    const which = found.length > 1 ? `Photo ${i + 1}: ` : "";
    if (!faces.length) throw new Problem({ detail: which + detail, reason, status: 422 });
  }
  return found;
}

/** A new LoRA of the person's face, or of one that was changed. */
export async function makeLoRA(person, signal) {
  const body = { embedding: person.face, recogniser: person.recogniser || undefined, seed: person.seed };
  return (await ask("v1/loras", { body, signal })).loras[0];
}

/** One of several faces, chosen by its picture; null if none was. */
async function chooseFace(photo, faces) {
  const crops = await Promise.all(faces.map((face) => copy(photo, face.box)));
  let chosen = null;
  $("found").replaceChildren(
    ...crops.map((src, i) => {
      const button = make("button", { type: "button" });
      button.append(make("img", { src, alt: `Face ${i + 1} of ${crops.length}` }));
      button.addEventListener("click", () => ((chosen = faces[i]), $("faces").close()));
      const item = make("li");
      item.append(button);
      return item;
    }),
  );
  $("faces").showModal();
  await new Promise((resolve) => $("faces").addEventListener("close", resolve, { once: true }));
  return chosen;
}
