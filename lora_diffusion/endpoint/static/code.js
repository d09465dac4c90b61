// The same as the page shows, as code to copy: curl, Python with the client, and diffusers.

import { make } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const LANGUAGES = { curl, Python: python, diffusers };

/** now(): {person, settings, lora, strengths, model}; the code is written anew whenever it is looked at. */
export function startCode({ now, copyText }) {
  let language = "curl";
  for (const name of Object.keys(LANGUAGES)) {
    const button = make("button", { type: "button", className: "chip", textContent: name });
    button.addEventListener("click", () => ((language = name), tell()));
    $("languages").append(button);
  }
  $("code").addEventListener("toggle", tell);
  $("copy-code").addEventListener("click", () => copyText($("code-text").textContent, $("copy-code")));

  function tell() {
    for (const button of $("languages").children) button.setAttribute("aria-pressed", button.textContent === language);
    const state = now();
    if ($("code").open && state.settings) $("code-text").textContent = LANGUAGES[language](state);
  }
  return { tell };
}

const server = () => new URL(".", location.href.split("#")[0]).href.replace(/\/$/, "");
const edited = ({ strengths }) => Object.keys(strengths).length > 0;
const file = ({ person }) => `${person.name.toLowerCase().replace(/[^a-z0-9]+/g, "-")}.jpg`;
const shell = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;
const py = (text) => JSON.stringify(String(text));

/** name -> value of the API's fields, without what is as usual. */
function options({ settings }) {
  const values = {
    image_seed: Number(settings.seed),
    num_images: Number(settings.count),
    num_inference_steps: settings.steps && Number(settings.steps),
    guidance_scale: settings.guidance && Number(settings.guidance),
    negative_prompt: settings.negative,
    lora_scale: Number(settings.strength) === 1 ? "" : Number(settings.strength),
  };
  return Object.entries(values).filter(([, value]) => value !== "" && value !== undefined);
}

function curl(state) {
  const { person, settings, strengths, lora } = state;
  // Of -F, curl would take an @ or < for a file, and cut at a semicolon.
  const text = (name, value) => `--form-string ${name}=${shell(value)}`;
  const fields = options(state).map(([name, value]) => (typeof value === "string" ? text(name, value) : `-F ${name}=${value}`)).join(" ");
  const prompt = text("prompt", settings.prompt);
  if (edited(state) || !person.face) {
    const change = `curl ${server()}/v1/edits -H 'Content-Type: application/json' -d ${shell(JSON.stringify({ lora: person.base?.id, edits: strengths }))}\n\n`;
    return `${edited(state) ? `# the changed LoRA, whose id is ${lora?.id}\n${change}` : ""}# its file
curl '${server()}/v1/loras/${lora?.id}?format=kohya' -o lora.safetensors

# pictures with it
curl ${server()}/v1/images -F lora=${lora?.id} ${prompt} ${fields}`;
  }
  return `# the LoRA
curl ${server()}/v1/loras -F photo=@${file(state)} -F seed=${person.seed} -F format=kohya -o lora.safetensors

# pictures
curl ${server()}/v1/images -F photo=@${file(state)} -F seed=${person.seed} ${prompt} ${fields}`;
}

function python(state) {
  const { person, settings, strengths, lora } = state;
  const given = options(state).map(([name, value]) => `${name}=${typeof value === "string" ? py(value) : value}`).join(", ");
  const make = person.face ? `(lora,) = client.loras(${py(file(state))}, seed=${person.seed})` : `lora = ${py(lora?.id)}`;
  return `from lora_diffusion.client import Client

with Client(${py(server())}) as client:
    ${make}${edited(state) ? `\n    lora = client.edit(lora, ${JSON.stringify(strengths)})` : ""}
    client.download(lora, "kohya").save("lora.safetensors")
    drawn = client.images(lora, ${py(settings.prompt)}, ${given})
    for image in drawn.images:
        image.save(f"{image.seed}{image.suffix}")
`;
}

function diffusers({ settings, model }) {
  const { base, defaults } = model;
  const shipped = base.name === "tiny-sd";
  const seed = Number(settings.seed);
  return `import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
${shipped ? "from lora_diffusion.models.stable_diffusion import resolve_model\n" : ""}
pipe = StableDiffusionPipeline.from_pretrained(${shipped ? `resolve_model("tiny-sd"), safety_checker=None` : py(base.name)})
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights(".", weight_name="lora.safetensors")  # the downloaded file
for seed in range(${seed}, ${seed + Number(settings.count)}):
    image = pipe(
        ${py(settings.prompt)},${settings.negative ? `\n        negative_prompt=${py(settings.negative)},` : ""}
        num_inference_steps=${settings.steps || defaults.num_inference_steps},
        guidance_scale=${settings.guidance || defaults.guidance_scale},
        height=${base.image_size},
        width=${base.image_size},
        cross_attention_kwargs={"scale": ${Number(settings.strength)}},  # strength of the LoRA
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    image.save(f"{seed}.png")
`;
}
