// Jobs that wait or run.

import { announce, byId, duration, el, renderKeyed, whileBusy } from "./dom.js";
import { titleOf } from "./models.js";

export class Queue {
  #rows = new Map();
  #models;
  #cancel;

  /**
   * @param models gives the server's models.
   * @param cancel called with a video; a promise.
   */
  constructor(models, cancel) {
    this.#models = models;
    this.#cancel = cancel;
    setInterval(() => this.#tick(), 1000);
  }

  render(videos) {
    const place = (video) => (video.status === "in_progress" ? -1 : video.queue_position ?? 0);
    const sorted = [...videos].sort((a, b) => place(a) - place(b));
    byId("queue-empty").hidden = sorted.length > 0;
    const list = byId("queue");
    const focused = list.contains(document.activeElement);
    renderKeyed(list, sorted, this.#rows, (video) =>
      makeRow(video, titleOf(this.#models(), video.model), this.#cancel));
    if (focused && !list.contains(document.activeElement)) byId("queue-title").focus();
  }

  #tick() {
    for (const row of this.#rows.values()) row.tick();
  }
}

function makeRow(video, title, cancel) {
  const state = el("span");
  const left = el("span", { className: "left" });
  const bar = el("progress", { "aria-label": `Progress of ${title}` });
  const button = el("button", { type: "button", "aria-label": `Cancel ${title}` }, "Cancel");
  button.onclick = async () => {
    let told = false;
    await whileBusy(button, async () => (told = await cancel(video)));
    if (!told) return;
    button.setAttribute("aria-disabled", "true"); // a job that runs ends only with its step
    button.textContent = "Cancelling";
  };
  const element = el("li", { className: "job" },
    el("div", { className: "job-text" },
      el("p", { className: "prompt" }, video.prompt || "(no prompt)"),
      el("p", { className: "hint" }, [title, video.size].filter(Boolean).join(" · ")),
      bar,
      el("p", { className: "job-state" }, state, left)),
    button);
  let step = null;
  let end = null; // when it ends, by the clock here
  let announced = 0; // quarters of the steps

  function tick() {
    left.textContent = end === null ? "" : `about ${roughly(end - Date.now())} left`;
  }

  function update(now) {
    const runs = now.status === "in_progress";
    bar.hidden = !runs;
    const [done, all] = now.steps ? [now.step, now.steps] : [now.progress, 100];
    bar.max = all;
    if (now.steps || done) bar.value = done;
    else bar.removeAttribute("value"); // an engine that does not say how far it is
    state.textContent = runs ? stepText(now) : positionText(now);
    if (!runs) end = null;
    else if (step !== done && now.eta_seconds !== null) {
      end = Date.now() + now.eta_seconds * 1000;
    }
    step = done;
    tick();
    const quarter = runs ? Math.floor((4 * done) / all) : 0;
    if (quarter > announced) announce(`${title}: ${stepText(now)}`);
    announced = quarter;
  }

  return { element, update, tick };
}

const roughly = (ms) => duration(Math.max(1, Math.round(ms / 1000))).replace(".0", "");

function stepText({ step, steps, progress, attempts }) {
  const again = attempts > 1 ? `, attempt ${attempts}` : "";
  if (!steps) return progress ? `${progress} %${again}` : `runs${again}`;
  if (step === 0) return `starts${again}`;
  return step < steps ? `step ${step} of ${steps}${again}` : `all ${steps} steps, decoding`;
}

function positionText({ queue_position: ahead }) {
  if (ahead === null || ahead === undefined) return "waits";
  return ahead === 0 ? "next" : `waits, ${ahead} before it`;
}
