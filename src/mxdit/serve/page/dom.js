// Elements and texts. Whatever comes from the server becomes text nodes, never markup.

export const byId = (id) => document.getElementById(id);

/** An element; `props` are properties, or attributes where there is no such property. */
export function el(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/**
 * Make a list's children those of `items`, in their order. What stays is not moved where that can
 * be avoided: a video that is moved stops playing.
 *
 * @param nodes Map of id -> {element, update?, dispose?}, kept by the caller between calls.
 */
export function renderKeyed(list, items, nodes, make) {
  const wanted = new Set(items.map((item) => item.id));
  for (const [id, node] of nodes) {
    if (wanted.has(id)) continue;
    node.element.remove();
    node.dispose?.();
    nodes.delete(id);
  }
  let place = list.firstElementChild;
  for (const item of items) {
    if (!nodes.has(item.id)) nodes.set(item.id, make(item));
    const node = nodes.get(item.id);
    node.update?.(item);
    if (node.element === place) place = place.nextElementSibling;
    else list.insertBefore(node.element, place);
  }
}

/** Say something to screen readers. */
export function announce(text) {
  byId("news").textContent = text;
}

/** Show a text in an element that is hidden while it has none. */
export function showText(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}

/** Ask whether something may be removed. */
export function confirmed(question) {
  const dialog = byId("confirm");
  byId("confirm-text").textContent = question;
  return new Promise((resolve) => {
    const answer = (yes) => {
      dialog.onclose = null;
      dialog.close();
      resolve(yes);
    };
    byId("confirm-yes").onclick = () => answer(true);
    byId("confirm-no").onclick = () => answer(false);
    dialog.onclose = () => answer(false); // by the Escape key
    dialog.showModal();
    byId("confirm-no").focus();
  });
}

/** Run what a button does, once at a time. It is not disabled meanwhile, for that would lose the focus. */
export async function whileBusy(button, action) {
  if (button.getAttribute("aria-disabled")) return;
  button.setAttribute("aria-disabled", "true");
  try {
    await action();
  } finally {
    button.removeAttribute("aria-disabled");
  }
}

export function duration(seconds) {
  const whole = Math.round(seconds);
  if (seconds < 10) return `${seconds.toFixed(1)}\u00a0s`;
  if (whole < 60) return `${whole}\u00a0s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}\u00a0min ${whole % 60}\u00a0s`;
  return `${Math.floor(whole / 3600)}\u00a0h ${Math.floor((whole % 3600) / 60)}\u00a0min`;
}

export function bytes(count) {
  if (count < 1000) return `${count} B`;
  if (count < 1e6) return `${(count / 1e3).toFixed(1)} kB`;
  return `${(count / 1e6).toFixed(1)} MB`;
}

export const moment = (unix) => new Date(unix * 1000).toLocaleString();

export const prefersStill = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
