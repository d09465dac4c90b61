// Many people at once: a LoRA and a picture of each, side by side.

import { ask } from "./api.js";
import { learnFace, makeLoRA, newPerson } from "./person.js";
import { copy, prepare } from "./photos.js";
import { blobOf, make, urlOf } from "./pictures.js";
import { toBody } from "./settings.js";

const $ = (id) => document.getElementById(id);
const AT_ONCE = 3;
const PAUSE = 300; // ms between downloads: browsers drop some of many

/** open(person): show one in the studio. Returns {start(files), leave}. */
export function startPeople({ model, settings, open, download, guard }) {
  let all = [];
  let working = new AbortController();

  $("people-download").addEventListener("click", guard(async () => {
    for (const person of all.filter(({ base }) => base)) {
      await download(person.base, "kohya", person.name);
      await new Promise((resolve) => setTimeout(resolve, PAUSE));
    }
  }));

  async function start(files) {
    leave();
    working = new AbortController();
    const { signal } = working;
    all = files.map((file, i) => newPerson(file.name?.replace(/\.\w+$/, "") || `Person ${i + 1}`));
    const cards = all.map((person) => card(person));
    $("people-list").replaceChildren(...cards);
    $("people-title").textContent = `${all.length} people`;
    $("people").hidden = false;
    $("people-title").focus({ preventScroll: true });
    window.scrollTo({ top: 0 });
    let done = 0;
    const left = [...files.entries()];
    const work = async () => {
      for (let next = left.shift(); next && !signal.aborted; next = left.shift()) {
        const [i, file] = next;
        await makeOne(all[i], cards[i], file, signal);
        if (signal.aborted) return;
        $("people-status").textContent = `${++done} of ${all.length} done`;
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    if (signal.aborted) return;
    $("people-download").disabled = !all.some(({ base }) => base);
  }

  async function makeOne(person, item, file, signal) {
    const say = (text) => (item.querySelector(".said").textContent = text);
    try {
      const photo = await prepare(file);
      item.querySelector(".from").src = await copy(photo);
      if (!(await learnFace(person, [photo], model(), () => !signal.aborted))) return say("No face chosen");
      signal.throwIfAborted();
      item.querySelector(".from").src = person.photos[0];
      person.base = await makeLoRA(person, signal);
      const body = { ...toBody({ ...settings(), count: 1 }), lora: person.base.id, reference: person.reference };
      const { images } = await ask("v1/images", { body, signal });
      Object.assign(item.querySelector(".drawn-picture"), { src: await urlOf(blobOf(images[0])), alt: `Drawn: ${person.name}` });
      say(`likeness ${images[0].similarity.toFixed(2)}`);
      for (const button of item.querySelectorAll("button")) button.disabled = false;
      item.classList.remove("waiting");
    } catch (error) {
      if (!signal.aborted) say(error.message);
      item.classList.remove("waiting");
    }
  }

  function card(person) {
    const item = make("li", { className: "card waiting" });
    const pair = make("div", { className: "pair" });
    pair.append(make("img", { className: "picture from", alt: `The photo: ${person.name}` }), make("img", { className: "picture drawn-picture", alt: "" }));
    const row = make("div", { className: "row spread" });
    const look = make("button", { type: "button", className: "quiet", textContent: "Open", disabled: true, ariaLabel: `Open ${person.name}` });
    const take = make("button", { type: "button", className: "quiet", textContent: "Download", disabled: true, ariaLabel: `Download the LoRA of ${person.name}` });
    look.addEventListener("click", guard(() => open(person)));
    take.addEventListener("click", guard(() => download(person.base, "kohya", person.name)));
    row.append(look, take);
    item.append(pair, make("h2", { textContent: person.name }), make("p", { className: "small soft said number", textContent: "Waiting" }), row);
    return item;
  }

  function leave() {
    working.abort();
    all = [];
    $("people").hidden = true;
    $("people-download").disabled = true;
    for (const image of $("people-list").querySelectorAll(".drawn-picture")) if (image.src) URL.revokeObjectURL(image.src);
    $("people-list").replaceChildren();
    $("people-status").textContent = "";
  }

  return { start, leave, any: () => all.length > 0, show: () => ($("people").hidden = false), hide: () => ($("people").hidden = true) };
}
