// Two results side by side on one clock, and their difference.

import { urlOf } from "./contents.js";
import { el, prefersStill } from "./dom.js";
import { makePlayer } from "./gallery.js";
import { titleOf } from "./models.js";

const GAIN = 4;
const FRAME_EDGE = 0.01; // of a frame: times of frames are rounded in files

/** Show the dialog. It forgets everything when it is closed. */
export async function openCompare(dialog, models, first, second) {
  const urls = await Promise.all([urlOf(first.id), urlOf(second.id)]);
  const sides = [first, second].map((video, n) => new Side(video, urls[n]));
  const comparison = new Comparison(sides);
  const close = el("button", { type: "button", onclick: () => dialog.close() }, "Close");
  const panes = sides.map((side, n) => {
    const title = `${"AB"[n]}: ${titleOf(models, side.video.model)}`;
    const seed = `${side.video.size}, seed ${side.video.parameters.seed}`;
    return makePane(side.element, el("strong", {}, title), el("span", { className: "hint" }, seed));
  });
  const difference = makePane(comparison.canvas,
    el("strong", {}, `|A − B| × ${GAIN}`), comparison.psnrText);
  dialog.replaceChildren(
    el("div", { className: "compare-head" }, el("h2", { id: "compare-title" }, "Compare"), close),
    el("div", { className: "panes" }, ...panes, difference),
    comparison.controls);
  dialog.onclose = () => {
    comparison.stop();
    dialog.replaceChildren();
  };
  dialog.showModal();
  comparison.start();
}

function makePane(content, ...caption) {
  return el("figure", {}, content, el("figcaption", {}, ...caption));
}

/** One of the two: an image, or a video with the time of the frame that it shows. */
class Side {
  constructor(video, url) {
    const { fps, num_frames: frames } = video.parameters;
    this.video = video;
    this.fps = fps;
    this.element = makePlayer(video, url, { autoplay: false, loop: false });
    this.still = this.element instanceof HTMLImageElement;
    this.last = this.still ? 0 : frames - 1;
    this.frame = 0;
    [this.width, this.height] = video.size.split("x").map(Number);
  }

  get half() {
    return 0.5 / this.fps;
  }

  get ready() {
    return this.still ? this.element.complete : this.element.readyState >= 2;
  }

  /** When the frame that is shown begins. */
  get shownAt() {
    return this.frame / this.fps;
  }

  note(time) {
    const frame = Math.floor(time * this.fps + FRAME_EDGE);
    this.frame = Math.min(Math.max(frame, 0), this.last);
  }
}

class Comparison {
  #sides;
  #leader;
  #follower;
  #stops = [];
  #playing = false;
  #drawing;

  constructor(sides) {
    this.#sides = sides;
    [this.#leader, this.#follower] = sides.filter((side) => !side.still);
    const width = Math.min(...sides.map((side) => side.width));
    const height = Math.min(...sides.map((side) => side.height));
    this.#drawing = new Difference(width, height);
    this.canvas = this.#drawing.canvas;
    this.canvas.className = sides[0].element.className;
    this.psnrText = el("output", {});
    this.controls = this.#makeControls();
  }

  start() {
    for (const side of this.#sides) {
      this.#stops.push(watchFrames(side, () => this.#shown(side)));
    }
    if (!this.#leader) return;
    // At its end, rather than by `loop`, so that both begin anew together.
    this.#leader.element.onended = () => this.#restart();
    this.#seek(0);
    if (!prefersStill()) this.#play();
  }

  stop() {
    this.#pause();
    for (const stop of this.#stops) stop();
    for (const { element } of this.#sides) element.removeAttribute("src");
  }

  #makeControls() {
    this.playButton = el("button", { type: "button", className: "main" }, "Play");
    this.playButton.onclick = () => (this.#playing ? this.#pause() : this.#play());
    const last = this.#leader?.last ?? 0;
    const range = { type: "range", min: 0, max: last, value: 0 };
    this.slider = el("input", { ...range, "aria-label": "Frame" });
    this.slider.oninput = () => this.#stopAt(this.slider.valueAsNumber);
    this.place = el("output", {}, this.#placeText(0));
    const step = (text, label, by) => el("button", {
      type: "button", "aria-label": label, title: label,
      onclick: () => this.#stopAt(this.#leader.frame + by),
    }, text);
    return el("div", { className: "controls", hidden: !this.#leader },
      this.playButton, step("−1", "One frame back", -1), step("+1", "One frame on", 1),
      this.slider, this.place);
  }

  #placeText(frame) {
    return `Frame ${frame + 1} of ${(this.#leader?.last ?? 0) + 1}`;
  }

  #play() {
    this.#setPlaying(true);
    if (this.#leader.element.ended) this.#seek(0);
    this.#run(this.#leader);
    this.#follow();
  }

  #pause() {
    if (!this.#leader) return;
    this.#setPlaying(false);
    this.#leader.element.pause();
    this.#follower?.element.pause();
    this.#seek(this.#leader.frame);
  }

  #restart() {
    if (!this.#playing) return;
    this.#seek(0);
    this.#run(this.#leader);
  }

  #stopAt(frame) {
    this.#leader.frame = Math.min(Math.max(frame, 0), this.#leader.last);
    this.#pause();
    this.#showPlace();
  }

  #setPlaying(is) {
    this.#playing = is;
    this.playButton.textContent = is ? "Pause" : "Play";
  }

  // In the middle of a frame, where rounding of times does not matter.
  #seek(frame) {
    this.#leader.element.currentTime = frame / this.#leader.fps + this.#leader.half;
    this.#follow();
  }

  #run(side) {
    side.element.play().catch(() => {}); // interrupted by a pause
  }

  /** Bring the second video to the time of the first. */
  #follow() {
    if (!this.#follower) return;
    const { element, half, fps, last } = this.#follower;
    const end = last / fps + half;
    const time = Math.min(this.#leader.element.currentTime, end);
    const allowed = this.#playing ? half : 0.001;
    if (!element.seeking && Math.abs(element.currentTime - time) > allowed) {
      element.currentTime = time;
    }
    if (this.#playing && element.paused && time < end) this.#run(this.#follower);
  }

  #shown(side) {
    if (side === this.#leader) this.#showPlace();
    if (this.#leader) this.#follow();
    if (this.#sides.every((one) => one.ready) && this.#agree()) this.#draw();
  }

  #showPlace() {
    const { frame } = this.#leader;
    this.slider.value = frame;
    this.slider.setAttribute("aria-valuetext", this.#placeText(frame));
    this.place.textContent = this.#placeText(frame);
  }

  /** Whether both show the same moment: one may be a frame ahead for an instant. */
  #agree() {
    if (!this.#follower) return true;
    const end = Math.min(...this.#sides.map((side) => side.last / side.fps));
    const [a, b] = this.#sides.map((side) => Math.min(side.shownAt, end));
    return Math.abs(a - b) < Math.max(...this.#sides.map((side) => side.half)) + 0.001;
  }

  #draw() {
    const [a, b] = this.#sides;
    const psnr = this.#drawing.draw(a.element, b.element);
    const text = psnr === Infinity ? "∞ dB, equal" : `${psnr.toFixed(2)} dB`;
    this.psnrText.textContent = `PSNR ${text}`;
  }
}

/** Note each frame that a side shows, and call `shown`. Returns what ends that. */
function watchFrames(side, shown) {
  const { element } = side;
  if (side.still) {
    element.decode().then(shown, () => {});
    return () => {};
  }
  const note = (time) => {
    side.note(time);
    shown();
  };
  // Also where a seek ends at the frame that was shown before.
  element.onseeked = element.onloadeddata = () => note(element.currentTime);
  const precise = "requestVideoFrameCallback" in element;
  const request = (next) => (precise
    ? element.requestVideoFrameCallback((_, frame) => next(frame.mediaTime))
    : requestAnimationFrame(() => next(element.currentTime)));
  let handle;
  const next = (time) => {
    handle = request(next);
    note(time);
  };
  handle = request(next);
  return () => (precise ? element.cancelVideoFrameCallback(handle) : cancelAnimationFrame(handle));
}

/** Draws the absolute difference of two images or videos. */
class Difference {
  constructor(width, height) {
    this.canvas = el("canvas", { width, height, role: "img", "aria-label": "Difference" });
    this.context = this.canvas.getContext("2d");
    this.inputs = [0, 1].map(() => {
      const canvas = el("canvas", { width, height });
      return canvas.getContext("2d", { willReadFrequently: true });
    });
    this.result = this.context.createImageData(width, height);
  }

  /** Returns the PSNR in dB, over red, green and blue. */
  draw(first, second) {
    const { width, height } = this.canvas;
    const [a, b] = [first, second].map((source, n) => {
      this.inputs[n].drawImage(source, 0, 0, width, height);
      return this.inputs[n].getImageData(0, 0, width, height).data;
    });
    const squares = subtract(a, b, this.result.data);
    this.context.putImageData(this.result, 0, 0);
    return 10 * Math.log10((255 * 255 * 3 * width * height) / squares);
  }
}

/** Writes the amplified difference of RGBA pixels; returns the sum of its squares before. */
function subtract(a, b, result) {
  let squares = 0;
  for (let pixel = 0; pixel < a.length; pixel += 4) {
    for (let n = pixel; n < pixel + 3; n++) {
      const difference = Math.abs(a[n] - b[n]);
      squares += difference * difference;
      result[n] = difference * GAIN; // clamped by the array
    }
    result[pixel + 3] = 255;
  }
  return squares;
}
