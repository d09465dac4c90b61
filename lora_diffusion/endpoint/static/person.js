// From photos to the numbers that describe one face: they make the LoRA, and drawn faces are compared with them.

import { Problem, ask, form } from "./api.js";
import { cosine, mean, meanCosine } from "./likeness.js";
import { copy } from "./photos.js";
import { make } from "./pictures.js";
import * as session from "./session.js";

const $ = (id) => document.getElementById(id);
const DIGITS = 5;
const LEAST = 0.2; // cosine of photos of one person
let choices = Promise.resolve(); // there is one dialog: whoever needs it waits for the one before

/** A person without a LoRA yet. photos: small copies, as data URLs. made: ids of all LoRAs that show them. of: ids of those whose blend they are. */
export function newPerson(name, photos = []) {
  // A seed of their own, so that strangers with the same photo share no LoRA.
  const [id, seed] = crypto.getRandomValues(new Uint32Array(2));
  return { id: String(id), seed, name, photos, face: null, reference: null, recogniser: null, own: null, base: null, made: [], of: [] };
}

/** Whether there is a face to make a LoRA of, or a LoRA: not while the photos are being read. */
export const drawable = (person) => Boolean(person?.face || person?.base);

/**
 * Learn the face in `photos` (blobs) of one person. `again`: another photo of them, only to compare with.
 * `wanted()`: whether they still are; nobody is asked for a face of others.
 * Raises Problem for a photo without a usable face; null if nobody was chosen of several.
 */
export async function learnFace(person, photos, model, wanted, again) {
  const looked = again ? [...photos, again] : photos;
  const found = await facesOf(looked);
  const faces = [];
  for (const [i, { faces: seen }] of found.entries()) {
    const face = seen.length > 1 ? await chooseFace(looked[i], seen, wanted) : seen[0];
    if (!face) return null;
    faces.push(face);
  }
  const same = samePerson(faces.slice(0, photos.length).map((face) => face.embedding));
  const own = faces.flatMap((face, i) => (i < photos.length && same[i] ? [i] : []));
  person.leftOut = photos.length - own.length;
  person.photos = await Promise.all(own.map((i) => copy(photos[i], found[i].faces.length > 1 ? faces[i].box : undefined)));
  person.face = person.reference = mean(own.map((i) => faces[i].embedding)).map((value) => Number(value.toFixed(DIGITS)));
  person.own = meanCosine(faces.filter((face, i) => i >= photos.length || same[i]).map((face) => face.embedding));
  person.recogniser = model?.identity.recogniser.fingerprint;
  return person;
}

/** Which embeddings are those of the person whom most of them show, as the server's `one_person` tells. Raises Problem for nobody. */
function samePerson(embeddings) {
  const near = embeddings.map((a) => embeddings.filter((b) => cosine(a, b) >= LEAST));
  const most = near.reduce((best, some) => (some.length > best.length ? some : best));
  if (embeddings.length > 1 && most.length * 2 <= embeddings.length) {
    throw new Problem({ detail: "The photos show different people. Choose photos of one person, or a person each.", reason: "different_people", status: 422 });
  }
  const centre = mean(most);
  return embeddings.map((one) => embeddings.length === 1 || cosine(one, centre) >= LEAST);
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
  return (await makeLoRAs(person, "v1/loras", body, signal))[0];
}

/** The LoRAs that a route answers with. Not broken off by `signal`, so that none is made whose id the person has not. */
export async function makeLoRAs(person, route, body, signal) {
  const { loras } = await ask(route, { body });
  person.made.push(...loras.map(({ id }) => id));
  session.write();
  if (person.forgotten) await forgetLoRAs(person.made);
  signal?.throwIfAborted();
  return loras;
}

/** All of them, whatever becomes of one; then raises the first Problem of one that is still there. */
export async function forgetLoRAs(ids) {
  const done = await Promise.allSettled([...new Set(ids)].map((id) => ask(`v1/loras/${id}`, { method: "DELETE" })));
  const failed = done.find(({ reason }) => reason && reason.reason !== "unknown_lora");
  if (failed) throw failed.reason;
}

/** One of several faces, chosen by its picture; null if none was. */
function chooseFace(photo, faces, wanted) {
  const choice = choices.then(() => (wanted() ? showFaces(photo, faces) : null));
  choices = choice.catch(() => {});
  return choice;
}

async function showFaces(photo, faces) {
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
