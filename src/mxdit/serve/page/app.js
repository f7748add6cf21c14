// The page of `mxdit serve`: what belongs together is in the modules, what happens when is here.

import * as api from "./api.js";
import { openCompare } from "./compare.js";
import { announce, byId, confirmed, showText } from "./dom.js";
import { RequestForm } from "./form.js";
import { Gallery } from "./gallery.js";
import { makeAgain, offerOf, titleOf } from "./models.js";
import { Queue } from "./queue.js";
import { Store, ended } from "./store.js";

const IDLE = 5000; // ms between two looks at the list
const BUSY = 2000;
const STREAMS = 3; // at a time: browsers open six connections to a server, videos need some

let models = [];
let timer = null;
let failing = false; // whether the last look did, and says so on top
const streams = new Map();
const store = new Store();

const form = new RequestForm(created, askedForKey);
const queue = new Queue(() => models, cancel);
const gallery = new Gallery(store, () => models, {
  again,
  remove,
  more: () => attempt(() => store.more()),
  compare: (first, second) =>
    attempt(() => openCompare(byId("compare"), models, first, second)),
});

// -- looking at the server

/** Look now, and then again and again while the page is visible. */
async function look() {
  clearTimeout(timer);
  timer = null;
  if (document.hidden) return;
  try {
    await loadModels(); // more are loaded meanwhile, and a server that was restarted may have others
    await store.refresh();
    if (failing) showText(byId("trouble"), null);
    failing = false;
  } catch (error) {
    if (askedForKey(error)) return;
    failing = true;
    const text = error instanceof api.ApiError ? error.message : "The server does not answer.";
    showText(byId("trouble"), `${text} Trying again.`);
  }
  clearTimeout(timer); // another look may have begun meanwhile
  timer = setTimeout(look, store.active.length ? BUSY : IDLE);
}

async function loadModels() {
  const before = models;
  models = await api.models();
  form.models = models;
  if (offerOf(models) !== offerOf(before)) gallery.renew();
}

function follow(video) {
  if (streams.has(video.id) || streams.size >= STREAMS) return;
  const stop = new AbortController();
  streams.set(video.id, stop);
  listen(video.id, stop.signal).finally(() => streams.delete(video.id));
}

async function listen(id, signal) {
  try {
    for await (const video of api.events(id, signal)) store.put(video);
  } catch {
    // The next look at the list sees whether the server is there, and opens another stream.
  }
}

store.addEventListener("change", () => {
  const active = store.active;
  queue.render(active);
  gallery.render();
  tellEnds(active);
  for (const video of active) if (video.status === "in_progress") follow(video);
  for (const [id, stop] of streams) if (!store.get(id)) stop.abort();
});

let watched = new Set();

/** Say which of the jobs that were active a moment ago have ended. */
function tellEnds(active) {
  const ends = [...watched].map((id) => store.get(id)).filter((video) => video && ended(video));
  for (const video of ends) {
    const end = video.status === "completed" ? "is ready" : video.error?.message ?? "failed";
    announce(`${titleOf(models, video.model)}: ${end}`);
  }
  watched = new Set(active.map((video) => video.id));
}

// -- what the user does

function created(video) {
  store.put(video);
  announce(`Queued: ${titleOf(models, video.model)}`);
  look();
}

/** Returns whether the job was told to end. */
async function cancel(video) {
  const trouble = await attempt(async () => store.put(await api.cancel(video.id)));
  look();
  return trouble === null;
}

// Both return what went wrong, for the card, or null.
function again(video, model) {
  return attempt(async () => created(await makeAgain(video, model)), { quiet: true });
}

async function remove(video) {
  if (!(await confirmed(`Remove this one for good? “${shortened(video.prompt)}”`))) return null;
  const trouble = await attempt(() => removeKnown(video.id), { quiet: true });
  if (trouble === null) byId("gallery-title").focus(); // the button that had it is gone
  return trouble;
}

async function removeKnown(id) {
  try {
    await api.remove(id);
  } catch (error) {
    if (error.status !== 404) throw error; // gone already
  }
  store.remove(id);
}

function shortened(text) {
  return text?.length > 80 ? `${text.slice(0, 80)}…` : text ?? "";
}

/** Do something; returns the message of its error, which is also shown on top, or null. */
async function attempt(action, { quiet = false } = {}) {
  try {
    await action();
    if (!quiet) showText(byId("trouble"), null);
    return null;
  } catch (error) {
    if (askedForKey(error)) return error.message;
    if (!quiet) showText(byId("trouble"), error.message);
    return error.message;
  }
}

// -- the key

/** Ask for a key where that is what an error is about; returns whether it is. */
function askedForKey(error) {
  if (!api.needsKey(error)) return false;
  clearTimeout(timer);
  if (byId("key").hidden) {
    byId("key").hidden = false;
    byId("content").hidden = true;
    byId("key-value").focus();
  }
  return true;
}

byId("key").onsubmit = async (event) => {
  event.preventDefault();
  const input = byId("key-value");
  api.useKey(input.value.trim());
  try {
    await loadModels();
  } catch (error) {
    showText(byId("key-error"), error.message);
    return;
  }
  input.value = "";
  showText(byId("key-error"), null);
  byId("key").hidden = true;
  byId("content").hidden = false;
  byId("model").focus();
  look();
};

document.addEventListener("visibilitychange", look);
look();
