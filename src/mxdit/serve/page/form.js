// The form for a new video.

import * as api from "./api.js";
import { byId, el, showText } from "./dom.js";
import { FirstFrame } from "./firstframe.js";
import { TAKEN, byName, titleOf } from "./models.js";

const FIELDS = [
  "model", "prompt", "negative_prompt", "size", "num_frames", "num_inference_steps",
  "guidance_scale", "guidance_scale_2", "seed", "input_reference",
];
const NUMBERS = ["num_frames", "num_inference_steps", "guidance_scale", "guidance_scale_2"];
const OTHER_NAMES = {
  width: "size", height: "size", seconds: "num_frames",
  image: "input_reference", image_reference: "input_reference",
};

export class RequestForm {
  #form = byId("request");
  #models = [];
  #frame;
  #created;
  #failed;

  /**
   * @param created called with the video that was asked for.
   * @param failed called with an error; returns whether that is dealt with.
   */
  constructor(created, failed) {
    this.#created = created;
    this.#failed = failed;
    this.#frame = new FirstFrame((text) => this.#showError("input_reference", text));
    this.#form.onsubmit = (event) => {
      event.preventDefault();
      this.#submit();
    };
    this.#form.onkeydown = (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#form.requestSubmit();
    };
    this.#form.oninput = (event) => this.#showError(event.target.name, null);
    byId("model").onchange = () => this.#showModel();
    byId("num_frames").addEventListener("input", () => this.#showLength());
    byId("size").onchange = ({ target }) => {
      target.value = target.value.trim().replace(/\s*[xX×*]\s*/, "x");
    };
    byId("random-seed").onclick = () => {
      byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
      this.#showError("seed", null);
    };
  }

  set models(models) {
    this.#models = models;
    // The name once more: a closed select shows only the option.
    const options = (group) => group.map((model) =>
      el("option", { value: model.id }, titleOf(models, model.id)));
    const groups = [...byName(models)].map(([name, group]) =>
      el("optgroup", { label: name }, ...options(group)));
    byId("model").replaceChildren(...groups);
    byId("submit").disabled = models.length === 0;
    this.#showModel();
  }

  get #model() {
    return this.#models.find((model) => model.id === byId("model").value);
  }

  /** Show the fields that the model takes, with its defaults. */
  #showModel() {
    const model = this.#model;
    if (!model) return;
    for (const name of TAKEN) {
      if (FIELDS.includes(name)) this.#enable(name, model.takes.includes(name));
    }
    this.#frame.wanted = model.task === "i2v";
    for (const name of FIELDS) {
      const value = model.defaults[name];
      if (name in model.defaults) byId(name).placeholder = value ?? "";
      this.#showError(name, null);
    }
    byId("prompt").required = model.defaults.prompt === null;
    this.#showLength();
    showText(byId("request-error"), null);
  }

  #showLength() {
    const { num_frames: frames, fps } = this.#model?.defaults ?? {};
    const asked = byId("num_frames").valueAsNumber || frames;
    byId("length").textContent = fps ? `${(asked / fps).toFixed(1)} s at ${fps} a second` : "";
  }

  // A disabled field is neither sent nor checked.
  #enable(name, is) {
    byId(name).disabled = !is;
    byId(name).closest(".field").hidden = !is;
  }

  async #submit() {
    const button = byId("submit");
    if (button.disabled) return;
    for (const name of FIELDS) this.#showError(name, null);
    showText(byId("request-error"), null);
    if (this.#frame.wanted && !this.#frame.file) {
      this.#showError("input_reference", "This model needs a first frame.");
      byId("input_reference").focus();
      return;
    }
    button.disabled = true;
    try {
      this.#created(await api.create(this.#fields(), this.#frame.file));
    } catch (error) {
      if (!this.#failed(error)) this.#refused(error);
    } finally {
      button.disabled = false;
    }
  }

  #fields() {
    const given = [...new FormData(this.#form)].map(([name, value]) => [name, value.trim()]);
    const fields = Object.fromEntries(given.filter(([, value]) => value !== ""));
    for (const name of NUMBERS) if (name in fields) fields[name] = Number(fields[name]);
    return fields; // the seed stays text: a number here would lose digits of a long one
  }

  #refused(error) {
    const name = OTHER_NAMES[error.param] ?? error.param;
    const shown = FIELDS.includes(name) && !byId(name).closest(".field").hidden;
    if (!shown) {
      showText(byId("request-error"), error.message);
      byId("request-error").scrollIntoView({ block: "nearest" });
      return;
    }
    this.#showError(name, error.message);
    byId(name).focus();
  }

  #showError(name, text) {
    if (!FIELDS.includes(name)) return;
    showText(byId(`${name}-error`), text);
    if (text) byId(name).setAttribute("aria-invalid", "true");
    else byId(name).removeAttribute("aria-invalid");
  }
}
