// What this tab remembers: people, what was drawn, and where one was. In sessionStorage: it ends with the tab.

const NAME = "session";
const DRAWN = 24; // entries of the history
const LINKED = ["lora", "name", "prompt", "seed", "count", "steps", "guidance", "negative", "strength"];

let kept = read();

function read() {
  try {
    return { people: {}, drawn: [], ...JSON.parse(sessionStorage.getItem(NAME) ?? "{}") };
  } catch {
    return { people: {}, drawn: [] };
  }
}

/** Where it does not fit (5 MB), the oldest go. */
export function write() {
  while (kept.drawn.length) {
    const named = new Set(kept.drawn.map(({ person }) => person));
    kept.people = Object.fromEntries(Object.entries(kept.people).filter(([id]) => named.has(id)));
    try {
      return sessionStorage.setItem(NAME, JSON.stringify(kept));
    } catch {
      kept.drawn.pop();
    }
  }
  sessionStorage.removeItem(NAME);
}

/** entry: {lora, strengths, settings, thumb, told}; person: what `personOf` gives back. The newest comes first. */
export function remember(person, entry) {
  kept.people[person.id] = person;
  const link = linkTo(person, entry);
  kept.drawn = [{ ...entry, person: person.id, link }, ...kept.drawn.filter((other) => other.link !== link)].slice(0, DRAWN);
  write();
  history.replaceState(null, "", link);
}

export const drawn = () => kept.drawn;
export const personOf = (entry) => kept.people[entry.person];

/** The ids of all LoRAs of a person, and of the people that a blend has made of them. */
export function lorasOf(person) {
  const all = [person, ...blendsOf(person)];
  const names = new Set(all.map(({ id }) => id));
  const drawn_ = kept.drawn.filter((entry) => names.has(entry.person)).map(({ lora }) => lora.id);
  return [...new Set([...all.flatMap(({ base, made }) => [...(base ? [base.id] : []), ...made]), ...drawn_])];
}

const blendsOf = (person) => Object.values(kept.people).filter(({ of }) => of?.includes(person.id));

/** What is known of a person whom the server was told to forget goes, too. */
export function forget(person) {
  const names = new Set([person, ...blendsOf(person)].map(({ id }) => id));
  if (names.has(linked()?.person)) leave();
  kept.drawn = kept.drawn.filter((entry) => !names.has(entry.person));
  write();
}

export const leave = () => history.replaceState(null, "", location.pathname + location.search);

/** The address of a picture. What it says stands behind the #, which browsers send to nobody. */
function linkTo(person, { lora, settings }) {
  const values = { lora: lora.id, name: person.name, ...settings };
  const given = LINKED.filter((name) => values[name] !== "" && values[name] !== undefined).map((name) => [name, values[name]]);
  return `#${new URLSearchParams(given)}`;
}

/** The entry that the address names: of this session, else {lora, name, settings} of the link alone; null for none. */
export function linked() {
  const values = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (!values.lora) return null;
  const entry = kept.drawn.find(({ link }) => link === location.hash);
  const { lora, name, ...settings } = values;
  return entry ?? { lora: { id: lora }, name: name ?? "A person", strengths: {}, settings };
}
