// The first frame of a video: chosen, dropped or pasted.

import { byId } from "./dom.js";

const TYPES = ["image/png", "image/jpeg", "image/webp"];

export class FirstFrame {
  #file = null;
  #input = byId("input_reference");
  #preview = byId("first-frame-image");
  #wanted = false;
  #tell;

  /** @param tell called with what is wrong with a file, or null. */
  constructor(tell) {
    this.#tell = tell;
    const drop = byId("drop");
    this.#input.onchange = () => {
      if (this.#input.files.length) this.#take(this.#input.files);
    };
    byId("first-frame-remove").onclick = () => {
      this.#set(null);
      this.#input.focus();
    };
    drop.ondragover = (event) => {
      event.preventDefault();
      drop.classList.add("over");
    };
    drop.ondragleave = () => drop.classList.remove("over");
    drop.ondrop = (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      this.#take(event.dataTransfer.files);
    };
    document.addEventListener("paste", (event) => {
      const files = event.clipboardData?.files ?? [];
      if (!this.#wanted || !files.length || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      this.#take(files);
    });
  }

  get wanted() {
    return this.#wanted;
  }

  set wanted(is) {
    this.#wanted = is;
    this.#input.disabled = !is;
    this.#input.closest(".field").hidden = !is;
  }

  /** The image to send, or null. */
  get file() {
    return this.#wanted ? this.#file : null;
  }

  #take(files) {
    const file = [...files].find((one) => TYPES.includes(one.type));
    this.#set(file ?? null);
    this.#tell(file ? null : "Not a PNG, JPEG or WebP image.");
  }

  #set(file) {
    if (this.#preview.src) URL.revokeObjectURL(this.#preview.src);
    this.#file = file;
    this.#input.value = ""; // so that the same file can be chosen again
    if (file) this.#preview.src = URL.createObjectURL(file);
    else this.#preview.removeAttribute("src");
    byId("first-frame-name").textContent = file?.name ?? "";
    byId("first-frame").hidden = file === null;
  }
}
