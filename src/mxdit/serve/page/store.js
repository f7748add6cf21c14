// What the page knows of the server's videos, newest first.

import * as api from "./api.js";

const PAGE = 20;
const FIRST_PAGE = 100; // more, so that an old job that still waits is found
const MOST_PAGES = 20;

export const ended = (video) => video.status === "completed" || video.status === "failed";

/** Tells of changes by "change" events. */
export class Store extends EventTarget {
  #videos = new Map();
  #order = [];
  #removed = new Set(); // an answer that was under way may still have them
  #last = Promise.resolve();
  hasMore = false;

  get all() {
    return this.#order.map((id) => this.#videos.get(id));
  }

  get active() {
    return this.all.filter((video) => !ended(video));
  }

  get ended() {
    return this.all.filter(ended);
  }

  get(id) {
    return this.#videos.get(id);
  }

  put(video) {
    if (this.#removed.has(video.id)) return;
    if (!this.#videos.has(video.id)) this.#order.unshift(video.id);
    this.#set(video);
    this.#changed();
  }

  remove(id) {
    this.#removed.add(id);
    this.#forget(id);
    this.#changed();
  }

  /** Look for new videos and for what became of those that were not ended. */
  refresh() {
    return this.#inTurn(async () => {
      const { videos, more } = await this.#newest();
      this.#merge(videos, more);
      await this.#lookAfter(videos);
      this.#changed();
    });
  }

  /** Get older ones. */
  more() {
    return this.#inTurn(async () => {
      const page = await this.#older();
      const known = new Set(this.#order);
      this.#take(page.data);
      this.#order.push(...this.#ids(page.data).filter((id) => !known.has(id)));
      this.hasMore = page.has_more;
      this.#changed();
    });
  }

  // One after the other: an old page that is put behind a new list would leave a gap.
  #inTurn(task) {
    this.#last = this.#last.then(task, task);
    return this.#last;
  }

  /** Pages of the list until they reach what is known, and past the jobs that wait. */
  async #newest() {
    const limit = this.#order.length ? PAGE : FIRST_PAGE;
    const known = new Set(this.#order);
    const videos = [];
    for (let number = 1; ; number++) {
      const page = await api.list(limit, videos.at(-1)?.id);
      videos.push(...page.data);
      const end = page.data.at(-1);
      const met = end && ended(end) && (known.size === 0 || known.has(end.id));
      if (!page.has_more || met || number === MOST_PAGES) return { videos, more: page.has_more };
    }
  }

  /** The page behind the oldest one that is known and still there: old ones expire. */
  async #older() {
    for (;;) {
      const oldest = this.#order.at(-1);
      try {
        return await api.list(PAGE, oldest);
      } catch (error) {
        if (error.param !== "after" || !oldest) throw error;
        this.#forget(oldest);
      }
    }
  }

  #merge(videos, more) {
    this.#take(videos);
    const place = more ? this.#order.indexOf(videos.at(-1).id) : -1;
    const older = place < 0 ? [] : this.#order.slice(place + 1);
    if (!older.length) this.hasMore = more;
    this.#order = [...this.#ids(videos), ...older];
    const kept = new Set(this.#order);
    for (const id of this.#videos.keys()) if (!kept.has(id)) this.#videos.delete(id);
  }

  /** Ask for jobs that wait or run and are older than the newest pages. */
  async #lookAfter(newest) {
    const seen = new Set(newest.map((video) => video.id));
    for (const { id } of this.active.filter((video) => !seen.has(video.id))) {
      try {
        this.#take([await api.retrieve(id)]);
      } catch (error) {
        if (error.status !== 404) throw error;
        this.#forget(id);
      }
    }
  }

  #ids(videos) {
    return videos.map((video) => video.id).filter((id) => !this.#removed.has(id));
  }

  #take(videos) {
    for (const video of videos) if (!this.#removed.has(video.id)) this.#set(video);
  }

  // A list's answer may be older than an event that came meanwhile.
  #set(video) {
    const known = this.#videos.get(video.id);
    const older = known && (ended(known) || isBehind(video, known));
    if (!older) this.#videos.set(video.id, video);
  }

  #forget(id) {
    this.#videos.delete(id);
    this.#order = this.#order.filter((other) => other !== id);
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

function isBehind(video, known) {
  if (ended(video) || video.attempts > known.attempts) return false;
  return video.attempts === known.attempts && video.status === known.status
    && (video.step ?? video.progress) < (known.step ?? known.progress);
}
