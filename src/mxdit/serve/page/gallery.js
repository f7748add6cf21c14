// Videos that are made, and jobs that failed.

import { fileName, isStill, release, urlOf } from "./contents.js";
import {
  byId, bytes, duration, el, moment, prefersStill, renderKeyed, showText, whileBusy,
} from "./dom.js";
import { choicesFor, modeName, titleOf } from "./models.js";

const SHOWN = 20;
const NEAR = "300px"; // of the viewport: how far away a video is loaded
const SMALL = 160; // pixels: what is smaller is shown with hard edges

const NAMES = {
  negative_prompt: "Negative prompt", size: "Size", num_frames: "Frames", fps: "Frames a second",
  num_inference_steps: "Steps", seed: "Seed", guidance_scale: "Guidance",
  guidance_scale_2: "Guidance 2", boundary_ratio: "Boundary", flow_shift: "Flow shift",
  activation_steps: "Activation steps",
};

export class Gallery {
  #cards = new Map();
  #chosen = []; // ids to compare, at most two
  #shown = SHOWN;
  #store;
  #models;
  #actions;
  #observer = new IntersectionObserver((entries) => this.#near(entries), { rootMargin: NEAR });

  /**
   * @param models gives the server's models.
   * @param actions again(video, model) and remove(video), promises; compare(first, second).
   */
  constructor(store, models, actions) {
    this.#store = store;
    this.#models = models;
    this.#actions = actions;
    byId("more").onclick = () => whileBusy(byId("more"), () => this.#more());
    byId("clear-chosen").onclick = () => {
      this.#choose([]);
      byId("gallery-title").focus(); // the button is gone
    };
    byId("compare-chosen").onclick = () => {
      const [first, second] = this.#chosen.map((id) => this.#store.get(id));
      this.#actions.compare(first, second);
    };
  }

  render() {
    const ended = this.#store.ended;
    byId("gallery-empty").hidden = ended.length > 0;
    byId("more").hidden = ended.length <= this.#shown && !this.#store.hasMore;
    const shown = ended.slice(0, this.#shown);
    renderKeyed(byId("gallery"), shown, this.#cards, (video) => this.#card(video));
    const still = this.#chosen.filter((id) => this.#cards.has(id));
    if (still.length < this.#chosen.length) this.#choose(still);
  }

  /** Make every card anew: the models have changed, and what a card offers with them. */
  renew() {
    const chosen = this.#chosen;
    renderKeyed(byId("gallery"), [], this.#cards);
    this.render();
    this.#choose(chosen.filter((id) => this.#cards.has(id)));
  }

  async #more() {
    this.#shown += SHOWN;
    if (this.#store.ended.length < this.#shown && this.#store.hasMore) await this.#actions.more();
    this.render();
  }

  #near(entries) {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      this.#observer.unobserve(target);
      target.load();
    }
  }

  #choose(ids) {
    this.#chosen = ids.slice(-2); // a third one takes the place of the first
    for (const [id, card] of this.#cards) card.choose(this.#chosen.includes(id));
    byId("chosen").hidden = ids.length === 0;
    byId("compare-chosen").disabled = ids.length < 2;
    byId("chosen-text").textContent = ids.length < 2 ? "Choose one more." : "Two are chosen.";
  }

  #card(video) {
    const done = video.status === "completed";
    const trouble = el("p", { className: "error", role: "alert", hidden: true });
    const attempt = async (action) => showText(trouble, await action());
    const box = el("input", { type: "checkbox" });
    box.onchange = () => {
      const others = this.#chosen.filter((id) => id !== video.id);
      this.#choose(box.checked ? [...others, video.id] : others);
    };
    const media = done ? makeMedia(video) : makeFailure(video);
    if (done) this.#observer.observe(media);
    const element = el("li", { className: done ? "card" : "card failed" },
      media,
      el("div", { className: "card-text" },
        el("p", { className: "prompt" }, video.prompt || "(no prompt)"),
        el("p", { className: "hint" }, summaryOf(video, this.#models())),
        makeDetails(video),
        trouble,
        done ? el("label", { className: "check" }, box, "Compare") : null,
        makeAgainRow(video, this.#models(), (model) =>
          attempt(() => this.#actions.again(video, model))),
        el("div", { className: "actions" },
          done ? makeDownload(video, trouble) : null,
          makeButton("Remove", () => attempt(() => this.#actions.remove(video))))));
    const dispose = () => {
      this.#observer.unobserve(media);
      release(video.id);
    };
    return { element, dispose, choose: (is) => (box.checked = is) };
  }
}

function summaryOf(video, models) {
  const parts = [titleOf(models, video.model), video.size];
  if (!isStill(video)) parts.push(`${video.seconds} s`);
  if (video.inference_time_s !== null) parts.push(`made in ${duration(video.inference_time_s)}`);
  return parts.join(" · ");
}

/** The place of a video; its `load` gets it. */
function makeMedia(video) {
  const place = el("div", { className: "media" }, el("span", { className: "hint" }, "Loading…"));
  const [width, height] = video.size.split("x").map(Number);
  place.style.aspectRatio = `${width} / ${height}`;
  place.load = async () => {
    try {
      place.replaceChildren(makePlayer(video, await urlOf(video.id), { controls: true }));
    } catch (error) {
      const again = makeButton("Load", place.load);
      place.replaceChildren(el("span", { className: "hint" }, error.message), again);
    }
  };
  return place;
}

/** An image or a video that shows what is behind a URL. */
export function makePlayer(video, src, props = {}) {
  const small = Math.max(...video.size.split("x").map(Number)) <= SMALL ? "small" : "";
  const label = video.prompt || "(no prompt)";
  if (isStill(video)) return el("img", { src, className: small, alt: label });
  return el("video", {
    muted: true, loop: true, playsInline: true, autoplay: !prefersStill(),
    className: small, "aria-label": label, ...props, src,
  });
}

function makeFailure(video) {
  const cancelled = video.error?.code === "cancelled";
  return el("div", { className: "media failure" },
    el("strong", {}, cancelled ? "Cancelled" : "Failed"),
    cancelled ? null : el("p", {}, video.error?.message ?? "without a reason"));
}

function makeDetails(video) {
  const rows = [["Prompt", video.prompt], ["Model", video.model]];
  for (const [name, title] of Object.entries(NAMES)) {
    const value = video.parameters[name];
    if (value === null || value === undefined || value === "") continue;
    rows.push([title, typeof value === "object" ? JSON.stringify(value) : String(value)]);
  }
  if (video.parameters.has_image) rows.push(["First frame", "yes"]);
  if (video.error) rows.push(["Error", `${video.error.code}: ${video.error.message}`]);
  if (video.attempts > 1) rows.push(["Attempts", String(video.attempts)]);
  if (video.file_size !== null) rows.push(["File", bytes(video.file_size)]);
  rows.push(["Asked for", moment(video.created_at)]);
  if (video.completed_at !== null) rows.push(["Ended", moment(video.completed_at)]);
  if (video.expires_at !== null) rows.push(["Kept until", moment(video.expires_at)]);
  rows.push(["Id", video.id]);
  const terms = rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value ?? "")]);
  return el("details", {}, el("summary", {}, "Parameters"), el("dl", {}, ...terms));
}

function makeAgainRow(video, models, again) {
  const choices = choicesFor(models, video);
  if (!choices.length) return null;
  const options = choices.map(({ id, mode }) => el("option", { value: id }, modeName(mode)));
  const select = el("select", { "aria-label": "Mode to make it again with" }, ...options);
  const run = () => again(choices.find((model) => model.id === select.value));
  return el("div", { className: "joined" }, select, makeButton("Again", run));
}

function makeDownload(video, trouble) {
  return makeButton("Download", async () => {
    try {
      el("a", { href: await urlOf(video.id), download: fileName(video) }).click();
      showText(trouble, null);
    } catch (error) {
      showText(trouble, error.message);
    }
  });
}

function makeButton(text, action) {
  const button = el("button", { type: "button" }, text);
  button.onclick = () => whileBusy(button, action);
  return button;
}
