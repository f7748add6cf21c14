// The form for a new video.

import * as api from "./api.js";
import { byId, el, showText, whileBusy } from "./dom.js";
import { FirstFrame } from "./firstframe.js";
import { FIELDS, byName, linearsOf, methodsOf, offerOf, offers, takesFrame, titleOf } from "./models.js";

const SHOWN = ["model", "input_reference", ...FIELDS];
const TEXTS = ["model", "prompt", "negative_prompt", "size", "seed"]; // others are numbers
const ADVANCED = ["fps", "flow_shift", "boundary_ratio"];
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
      if (this.#model) whileBusy(byId("submit"), () => this.#submit());
    };
    this.#form.onkeydown = (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#form.requestSubmit();
    };
    this.#form.oninput = (event) => this.#showError(event.target.name, null);
    // The browser says nothing of a field that it cannot show.
    this.#form.addEventListener("invalid", ({ target }) => this.#reveal(target.name), true);
    byId("model").onchange = () => this.#choose();
    for (const name of ["num_frames", "fps"]) {
      byId(name).addEventListener("input", () => this.#showLength());
    }
    byId("size").onchange = ({ target }) => {
      target.value = target.value.trim().replace(/\s*[xX×*]\s*/, "x");
    };
    byId("random-seed").onclick = () => {
      byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
      this.#showError("seed", null);
    };
  }

  set models(models) {
    const before = this.#model?.id;
    const same = offerOf(models) === offerOf(this.#models);
    this.#models = models;
    if (!same) this.#list(before); // one that is open would close
    byId("submit").disabled = models.length === 0;
    if (this.#model?.id === before) this.#showModel();
    else this.#choose();
  }

  /** Fill the select; the model `id` stays chosen, if it is still there. */
  #list(id) {
    // The name once more: a closed select shows only the option.
    const options = (group) => group.map((model) =>
      el("option", { value: model.id }, titleOf(this.#models, model.id)));
    const groups = [...byName(this.#models)].map(([name, group]) =>
      el("optgroup", { label: name }, ...options(group)));
    byId("model").replaceChildren(...groups);
    if (this.#models.some((model) => model.id === id)) byId("model").value = id;
  }

  get #model() {
    return this.#models.find((model) => model.id === byId("model").value);
  }

  #choose() {
    for (const name of SHOWN) this.#showError(name, null);
    showText(byId("request-error"), null);
    this.#showModel();
  }

  /** Show the fields that the model takes, with its defaults. */
  #showModel() {
    const model = this.#model;
    if (!model) return;
    for (const name of FIELDS) {
      this.#enable(name, offers(model, name));
      byId(name).placeholder = model.defaults[name] ?? "";
    }
    byId("advanced").hidden = !ADVANCED.some((name) => offers(model, name));
    this.#frame.wanted = takesFrame(model);
    byId("prompt").required = !model.defaults.prompt;
    byId("linears").textContent = `${linearsOf(model)} ${methodsOf(model)}`.trim();
    this.#showLength();
  }

  #showLength() {
    const { num_frames, fps } = this.#model?.defaults ?? {};
    const frames = byId("num_frames").valueAsNumber || num_frames;
    const rate = byId("fps").valueAsNumber || fps;
    byId("length").textContent = rate && frames ? `${(frames / rate).toFixed(1)} s at ${rate} a second` : "";
  }

  // A disabled field is neither sent nor checked.
  #enable(name, is) {
    byId(name).disabled = !is;
    byId(name).closest(".field").hidden = !is;
  }

  async #submit() {
    for (const name of SHOWN) this.#showError(name, null);
    showText(byId("request-error"), null);
    if (this.#model.task === "i2v" && !this.#frame.file) {
      this.#showError("input_reference", "This model needs a first frame.");
      byId("input_reference").focus();
      return;
    }
    try {
      this.#created(await api.create(this.#fields(), this.#frame.file));
    } catch (error) {
      if (!this.#failed(error)) this.#refused(error);
    }
  }

  #fields() {
    const given = [...new FormData(this.#form)].map(([name, value]) => [name, value.trim()]);
    const fields = Object.fromEntries(given.filter(([, value]) => value !== ""));
    for (const name of Object.keys(fields)) {
      if (!TEXTS.includes(name)) fields[name] = Number(fields[name]);
    }
    return fields; // the seed stays text: a number here would lose digits of a long one
  }

  #refused(error) {
    const name = OTHER_NAMES[error.param] ?? error.param;
    const shown = SHOWN.includes(name) && !byId(name).closest(".field").hidden;
    if (!shown) {
      showText(byId("request-error"), error.message);
      byId("request-error").scrollIntoView({ block: "nearest" });
      return;
    }
    this.#showError(name, error.message);
    this.#reveal(name);
    byId(name).focus();
  }

  #reveal(name) {
    if (ADVANCED.includes(name)) byId("advanced").open = true;
  }

  #showError(name, text) {
    if (!SHOWN.includes(name)) return;
    showText(byId(`${name}-error`), text);
    if (text) byId(name).setAttribute("aria-invalid", "true");
    else byId(name).removeAttribute("aria-invalid");
  }
}
